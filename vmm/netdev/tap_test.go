package netdev

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/vmm/virtio"
)

// inNetworkNamespace runs f on a thread of its own with a network of its own.
func inNetworkNamespace(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skipf("host has no /dev/net/tun: %v", err)
	}
	done := make(chan error)
	go func() {
		// The thread is not unlocked, and so ends with the goroutine.
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		defer close(done)
		f(t)
	}()
	if err := <-done; errors.Is(err, unix.EPERM) {
		t.Skipf("host lets this user make no network namespace: %v", err)
	} else if err != nil {
		t.Error(err)
	}
}

// addressed gives the host's end of a tap an address and brings it up.
func addressed(t *testing.T, name, address string) bool {
	link, err := netlink.LinkByName(name)
	if err != nil {
		t.Error(err)
		return false
	}
	addr, err := netlink.ParseAddr(address)
	if err == nil {
		err = netlink.AddrAdd(link, addr)
	}
	if err == nil {
		err = netlink.LinkSetUp(link)
	}
	if err != nil {
		t.Errorf("set up %s: %v", name, err)
	}
	return err == nil
}

// TestTapFetch fetches over a real tap, without and with offloads.
func TestTapFetch(t *testing.T) {
	data := make([]byte, 4<<20)
	_, _ = rand.NewChaCha8([32]byte{3}).Read(data)
	for name, features := range map[string]uint64{
		"plain": 0, "offloads": virtio.NetOffloadGuestCSum | virtio.NetOffloadGuestTSO4 | virtio.NetOffloadGuestECN,
	} {
		t.Run(name, func(t *testing.T) {
			inNetworkNamespace(t, func(t *testing.T) {
				tap, err := OpenTap("gnomon-test")
				if err != nil {
					t.Error(err)
					return
				}
				defer tap.Close()
				if !addressed(t, "gnomon-test", "192.0.2.1/24") {
					return
				}
				listener, err := net.Listen("tcp", "192.0.2.1:80")
				if err != nil {
					t.Error(err)
					return
				}
				server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					sum := sha256.New()
					_, _ = io.Copy(sum, r.Body)
					w.Header().Set("Sum", hexSum(sum.Sum(nil)))
					_, _ = w.Write(data)
				})}
				go func() { _ = server.Serve(listener) }()
				defer server.Close()
				g := newGuestStack(t, tap, features, netip.MustParsePrefix("192.0.2.2/24"), netip.Addr{})
				client := http.Client{Transport: &http.Transport{DialContext: g.dial, DisableKeepAlives: true}, Timeout: patience}
				resp, err := client.Post("http://192.0.2.1:80/", "", bytes.NewReader(data[:1<<20]))
				if err != nil {
					t.Error(err)
					return
				}
				got, err := io.ReadAll(resp.Body)
				resp.Body.Close()
				if err != nil || !bytes.Equal(got, data) {
					t.Errorf("%d bytes, %v", len(got), err)
				}
				up := sha256.Sum256(data[:1<<20])
				if s := resp.Header.Get("Sum"); s != hexSum(up[:]) {
					t.Errorf("the server read something else: %s", s)
				}
				if big := g.largestFrame() > 1514; big != (features != 0) {
					t.Errorf("largest frame %d bytes", g.largestFrame())
				}
			})
		})
	}
}

func hexSum(p []byte) string {
	const digits = "0123456789abcdef"
	var b strings.Builder
	for _, v := range p {
		b.WriteByte(digits[v>>4])
		b.WriteByte(digits[v&15])
	}
	return b.String()
}

// TestTapErrors: each says what is wrong and what to do.
func TestTapErrors(t *testing.T) {
	inNetworkNamespace(t, func(t *testing.T) {
		expect := func(name, want string) {
			t.Helper()
			tap, err := OpenTap(name)
			if err == nil {
				tap.Close()
			}
			if !errors.Is(err, ErrTap) || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%q: %v, want %q", name, err, want)
			}
		}
		expect("", "interface name")
		expect("sixteen-letters-", "interface name")
		expect("a/b", "interface name")
		expect("lo", "is not a single-queue tap interface")
		first, err := OpenTap("gnomon-test")
		if err != nil {
			t.Error(err)
			return
		}
		expect("gnomon-test", "in use by another program")
		if err := first.Close(); err != nil {
			t.Error(err)
		}
		if _, err := net.InterfaceByName("gnomon-test"); err == nil {
			t.Error("the interface is still there")
		}
		// Only this thread becomes somebody else.
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, 65534, 65534, 65534); errno != 0 {
			t.Error(errno)
			return
		}
		expect("gnomon-test", "no permission")
	})
}
