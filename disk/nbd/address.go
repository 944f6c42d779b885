package nbd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"syscall"
)

// splitAddress tells net's network and address of "unix:PATH" or "HOST:PORT";
// a path that begins with "/" is a Unix socket's too.
func splitAddress(address string) (network, addr string, err error) {
	if path, ok := strings.CutPrefix(address, "unix:"); ok || strings.HasPrefix(address, "/") {
		if path == "" {
			return "", "", fmt.Errorf("%w %q: the socket's path is missing", ErrAddress, address)
		}
		return "unix", path, nil
	}
	_, port, err := net.SplitHostPort(address)
	if err == nil {
		_, err = net.LookupPort("tcp", port)
	}
	if err != nil {
		return "", "", fmt.Errorf("%w %q: unix:PATH or HOST:PORT are possible: %w", ErrAddress, address, err)
	}
	return "tcp", address, nil
}

// CheckAddress refuses what Listen cannot listen at anywhere.
func CheckAddress(address string) error {
	_, _, err := splitAddress(address)
	return err
}

// Listen listens at "unix:PATH" or "HOST:PORT". A Unix socket that a dead server
// left behind is replaced.
func Listen(address string) (net.Listener, error) {
	network, addr, err := splitAddress(address)
	if err != nil {
		return nil, err
	}
	l, err := net.Listen(network, addr)
	if network == "unix" && errors.Is(err, syscall.EADDRINUSE) && isStale(addr) {
		if err := os.Remove(addr); err != nil {
			return nil, fmt.Errorf("%w %q: %w", ErrAddress, address, err)
		}
		l, err = net.Listen(network, addr)
	}
	if err != nil {
		return nil, fmt.Errorf("%w %q: %w", ErrAddress, address, err)
	}
	return l, nil
}

func isStale(path string) bool {
	info, err := os.Lstat(path)
	if err != nil || info.Mode().Type() != os.ModeSocket {
		return false
	}
	c, err := net.Dial("unix", path)
	if err == nil {
		c.Close()
	}
	return errors.Is(err, syscall.ECONNREFUSED)
}

func dial(ctx context.Context, address string) (net.Conn, error) {
	network, addr, err := splitAddress(address)
	if err != nil {
		return nil, err
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, network, addr)
	if err != nil {
		return nil, fmt.Errorf("%w %q: %w", ErrAddress, address, err)
	}
	return conn, nil
}

// ParseURI takes a URI apart as QEMU does, into what Dial takes:
// nbd://HOST[:PORT][/EXPORT], the same with nbd+tcp, and
// nbd+unix:///[EXPORT]?socket=PATH.
func ParseURI(uri string) (address, export string, err error) {
	fail := func(format string, args ...any) (string, string, error) {
		return "", "", fmt.Errorf("%w %q: "+format, append([]any{ErrAddress, uri}, args...)...)
	}
	u, err := url.Parse(uri)
	if err != nil {
		return fail("%w", err)
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return fail("%w", err)
	}
	export = strings.TrimLeft(u.Path, "/")
	switch u.Scheme {
	case "nbd", "nbd+tcp":
		if u.Hostname() == "" {
			return fail("the host is missing")
		}
		if len(query) != 0 {
			return fail("a TCP address takes no parameters")
		}
		if strings.Contains(u.Hostname(), ":") {
			if _, err := netip.ParseAddr(u.Hostname()); err != nil {
				return fail("%w", err)
			}
		}
		port := u.Port()
		if port == "" {
			port = DefaultPort
		}
		return net.JoinHostPort(u.Hostname(), port), export, nil
	case "nbd+unix":
		if u.Host != "" {
			return fail("a Unix address has no host: nbd+unix:///EXPORT?socket=PATH")
		}
		if len(query) != 1 || len(query["socket"]) != 1 || query.Get("socket") == "" {
			return fail("a Unix address takes one parameter, socket=PATH")
		}
		return "unix:" + query.Get("socket"), export, nil
	}
	return fail("the scheme is none of nbd, nbd+tcp, nbd+unix")
}
