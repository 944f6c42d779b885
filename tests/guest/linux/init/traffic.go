//go:build linux

package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/gnomon-vmm/gnomon/tests/guest/wire"
)

// httpGet fetches with HTTP/1.0, which needs no more than a few lines here
// where net/http would double the size of this program.
func httpGet(ctx context.Context, args wire.HTTPGetArgs) (any, error) {
	u, err := url.Parse(args.URL)
	if err != nil {
		return nil, err
	}
	if u.Scheme != "http" || u.Host == "" {
		return nil, fmt.Errorf("%q is not an http URL", args.URL)
	}
	timeout := time.Minute
	if args.TimeoutMS > 0 {
		timeout = time.Duration(args.TimeoutMS) * time.Millisecond
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	port := u.Port()
	if port == "" {
		port = "80"
	}
	conn, err := new(net.Dialer).DialContext(ctx, "tcp4", net.JoinHostPort(u.Hostname(), port))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(0, 0)) })
	defer stop()
	if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.0\r\nHost: %s\r\nUser-Agent: gnomon-init\r\n\r\n", u.RequestURI(), u.Host); err != nil {
		return nil, err
	}
	return readHTTP(conn)
}

// readHTTP hashes the body of an answer that ends with the connection.
func readHTTP(conn io.Reader) (wire.HTTPGetResult, error) {
	var result wire.HTTPGetResult
	r := bufio.NewReaderSize(conn, transferSize)
	length := int64(-1)
	for first := true; ; first = false {
		line, err := r.ReadString('\n')
		if err != nil {
			return result, fmt.Errorf("read the answer's head: %w", err)
		}
		line = strings.TrimRight(line, "\r\n")
		if first {
			f := strings.Fields(line)
			if len(f) < 2 || !strings.HasPrefix(f[0], "HTTP/1.") {
				return result, fmt.Errorf("%q is not HTTP", line)
			}
			if result.Status, err = strconv.Atoi(f[1]); err != nil {
				return result, err
			}
			continue
		}
		if line == "" {
			break
		}
		if key, value, _ := strings.Cut(line, ":"); strings.EqualFold(key, "Content-Length") {
			if length, err = strconv.ParseInt(strings.TrimSpace(value), 10, 64); err != nil {
				return result, err
			}
		}
	}
	h := sha256.New()
	n, err := io.Copy(h, r)
	if err != nil {
		return result, err
	}
	if length >= 0 && n != length {
		return result, fmt.Errorf("the answer has %d bytes of %d", n, length)
	}
	result.Size, result.SHA256 = n, hex.EncodeToString(h.Sum(nil))
	return result, nil
}

// echoTest sends a pattern and compares what comes back.
func echoTest(ctx context.Context, args wire.EchoTestArgs) (any, error) {
	conn, err := dial(ctx, args.Network, args.Address)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	// Chunks below any sensible socket buffer, sent while earlier ones come
	// back, so that neither side waits for the other for ever.
	const chunk = 16 << 10
	sent := make(chan error, 1)
	go func() {
		p := make([]byte, min(chunk, max(args.Size, 1)))
		for off := int64(0); off < args.Size; {
			n := min(int64(len(p)), args.Size-off)
			wire.Pattern(p[:n], args.Seed, off)
			if _, err := conn.Write(p[:n]); err != nil {
				sent <- err
				return
			}
			off += n
		}
		sent <- nil
	}()
	h := sha256.New()
	n, err := io.Copy(h, io.LimitReader(conn, args.Size))
	if err != nil {
		return nil, fmt.Errorf("after %d bytes came back: %w", n, err)
	}
	if n < args.Size {
		return nil, fmt.Errorf("%d bytes of %d came back", n, args.Size)
	}
	if err := <-sent; err != nil {
		return nil, err
	}
	got := wire.SumResult{Size: n, SHA256: hex.EncodeToString(h.Sum(nil))}
	if want := wire.PatternSum(args.Seed, args.Size); got != want {
		return nil, fmt.Errorf("what came back has hash %s, what was sent %s", got.SHA256, want.SHA256)
	}
	return got, nil
}

func dial(ctx context.Context, network, address string) (io.ReadWriteCloser, error) {
	switch network {
	case "tcp":
		return new(net.Dialer).DialContext(ctx, "tcp4", address)
	case "vsock":
		cid, port, _ := strings.Cut(address, ":")
		c, err := strconv.ParseUint(cid, 10, 32)
		if err != nil {
			return nil, err
		}
		p, err := strconv.ParseUint(port, 10, 32)
		if err != nil {
			return nil, err
		}
		return dialVsock(uint32(c), uint32(p))
	}
	return nil, fmt.Errorf("no network %q", network)
}

// serveNetwork answers on TCP: an echo, and a web server.
func serveNetwork() {
	for port, serve := range map[int]func(net.Conn){
		wire.TCPEchoPort: func(c net.Conn) { echo(c) },
		wire.TCPHTTPPort: func(c net.Conn) { _ = answerHTTP(c) },
	} {
		l, err := net.Listen("tcp4", ":"+strconv.Itoa(port))
		if err != nil {
			fmt.Fprintln(os.Stderr, "init:", err)
			continue
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					fmt.Fprintln(os.Stderr, "init:", err)
					return
				}
				go func() {
					defer c.Close()
					serve(c)
				}()
			}
		}()
	}
}

// maxServed bounds one answer of the web server.
const maxServed = 1 << 30

// answerHTTP answers one request: /pattern?seed=S&size=N with that pattern,
// everything else with a greeting.
func answerHTTP(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(5 * time.Minute)); err != nil {
		return err
	}
	r := bufio.NewReader(io.LimitReader(c, 64<<10))
	var target string
	for first := true; ; first = false {
		line, err := r.ReadString('\n')
		if err != nil {
			return err
		}
		if strings.TrimRight(line, "\r\n") == "" {
			break
		}
		if first {
			f := strings.Fields(line)
			if len(f) != 3 || f[0] != "GET" {
				_, err := io.WriteString(c, "HTTP/1.0 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
				return err
			}
			target = f[1]
		}
	}
	u, err := url.ParseRequestURI(target)
	if err != nil || u.Path != "/pattern" {
		const greeting = "This is a guest of Gnomon.\n"
		_, err := fmt.Fprintf(c, "HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(greeting), greeting)
		return err
	}
	q := u.Query()
	seed, seedErr := strconv.ParseUint(q.Get("seed"), 10, 64)
	size, sizeErr := strconv.ParseInt(q.Get("size"), 10, 64)
	if err := errors.Join(seedErr, sizeErr); err != nil || size < 0 || size > maxServed {
		_, err := io.WriteString(c, "HTTP/1.0 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
		return err
	}
	if _, err := fmt.Fprintf(c, "HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n", size); err != nil {
		return err
	}
	p := make([]byte, min(transferSize, max(size, 1)))
	for off := int64(0); off < size; {
		n := min(int64(len(p)), size-off)
		wire.Pattern(p[:n], seed, off)
		if _, err := c.Write(p[:n]); err != nil {
			return err
		}
		off += n
	}
	return nil
}
