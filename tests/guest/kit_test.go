package guest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gnomon-vmm/gnomon/tests/guest/wire"
)

// machine is the kit in QEMU, whose own emulation of a processor runs on every
// host. The kit is tried here without our VMM, so that a failure there is not
// the kit's.
type machine struct {
	*Agent
	monitor net.Conn
	console *bytes.Buffer // complete once the Agent is gone
	done    chan error    // QEMU's end
	disk    string
}

// startMachine boots the kit and waits until its init is ready.
func startMachine(ctx context.Context, t *testing.T, cpus int, parameters string) *machine {
	t.Helper()
	kit := Linux(t)
	dir := t.TempDir()
	m := &machine{console: new(bytes.Buffer), done: make(chan error, 1), disk: filepath.Join(dir, "disk")}
	if err := os.WriteFile(m.disk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(m.disk, 64<<20); err != nil {
		t.Fatal(err)
	}
	// QEMU connects to us, so there is nothing to wait for but the connection.
	serial, monitor := listen(t, dir, "serial"), listen(t, dir, "monitor")
	cmd := exec.Command("qemu-system-x86_64",
		"-accel", "tcg", "-machine", "q35", "-m", "128", "-smp", fmt.Sprint(cpus),
		"-nodefaults", "-display", "none", "-no-reboot",
		"-kernel", kit.Kernel, "-initrd", kit.Initrd, "-append", kit.Cmdline+" nokaslr "+parameters,
		"-chardev", "socket,id=s,path="+serial.Addr().String(), "-serial", "chardev:s",
		"-chardev", "socket,id=m,path="+monitor.Addr().String(), "-mon", "chardev=m",
		"-drive", "if=none,id=d,format=raw,file="+m.disk, "-device", "virtio-blk-pci,drive=d,disable-legacy=on",
		"-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n,disable-legacy=on,romfile=",
		"-device", "virtio-rng-pci,disable-legacy=on",
		"-device", "pvpanic",
	)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		err := cmd.Wait()
		if err != nil {
			err = fmt.Errorf("%w: %s", err, stderr.String())
		}
		m.done <- err
		close(ended)
		_, _ = serial.Close(), monitor.Close() // an Accept below ends, too
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-ended
	})
	conn, err := serial.Accept()
	if err != nil {
		t.Fatalf("QEMU did not connect: %v %s", err, stderr.String())
	}
	t.Cleanup(func() { _ = conn.Close() })
	if m.monitor, err = monitor.Accept(); err != nil {
		t.Fatalf("QEMU did not connect: %v %s", err, stderr.String())
	}
	t.Cleanup(func() { _ = m.monitor.Close() })
	go func() { _, _ = io.Copy(io.Discard, m.monitor) }()
	m.Agent = NewAgent(conn, m.console)
	if err := m.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	return m
}

func listen(t *testing.T, dir, name string) net.Listener {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

// order gives QEMU's monitor a command.
func (m *machine) order(t *testing.T, command string) {
	t.Helper()
	if _, err := io.WriteString(m.monitor, command+"\n"); err != nil {
		t.Fatal(err)
	}
}

// waitEnd waits until QEMU has ended.
func (m *machine) waitEnd(ctx context.Context, t *testing.T) {
	t.Helper()
	select {
	case err := <-m.done:
		if err != nil {
			t.Fatal(err)
		}
	case <-ctx.Done():
		t.Fatal("the machine goes on")
	}
}

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func TestLinuxKit(t *testing.T) {
	ctx := testContext(t)
	m := startMachine(ctx, t, 2, "")

	t.Run("facts", func(t *testing.T) {
		f, err := m.Facts(ctx)
		if err != nil || f.CPUs != 2 || !strings.HasSuffix(f.Release, "-gnomon") || f.ReadyMS < f.BootMS {
			t.Fatalf("got %+v, %v", f, err)
		}
	})
	t.Run("programs", func(t *testing.T) { testPrograms(ctx, t, m.Agent) })
	t.Run("ext4", func(t *testing.T) { testExt4(ctx, t, m) })
	t.Run("network", func(t *testing.T) { testNetwork(ctx, t, m) })
	t.Run("memory", func(t *testing.T) {
		const size = 1 << 20
		want := wire.PatternSum(9, size)
		if got, err := m.Fill(ctx, "a", 9, size); err != nil || got != want {
			t.Fatalf("fill: %+v, %v", got, err)
		}
		if got, err := m.Verify(ctx, "a"); err != nil || got != want {
			t.Fatalf("verify: %+v, %v", got, err)
		}
		if err := m.Forget(ctx, "a"); err != nil {
			t.Fatal(err)
		}
		if _, err := m.Verify(ctx, "a"); !errors.Is(err, ErrAgent) {
			t.Fatalf("verify what is forgotten: %v", err)
		}
	})
	t.Run("processors", func(t *testing.T) {
		b, err := m.Burn(ctx, 2, 200)
		if err != nil || len(b.Turns) != 2 || b.Turns[0] == 0 || b.Turns[1] == 0 {
			t.Fatalf("got %+v, %v", b, err)
		}
		if _, err := m.Burn(ctx, 3, 200); !errors.Is(err, ErrAgent) {
			t.Fatalf("three of two processors: %v", err)
		}
	})
	t.Run("entropy", func(t *testing.T) {
		a, err := m.Random(ctx, "/dev/hwrng", 32)
		if err != nil {
			t.Fatal(err)
		}
		b, err := m.Random(ctx, "/dev/random", 32)
		if err != nil || len(a) != 32 || len(b) != 32 || bytes.Equal(a, b) {
			t.Fatalf("got %x and %x, %v", a, b, err)
		}
	})
	t.Run("clocks and log", func(t *testing.T) {
		first, err := m.Clocks(ctx)
		if err != nil {
			t.Fatal(err)
		}
		second, err := m.Clocks(ctx)
		if err != nil || second.Monotonic <= first.Monotonic || second.Realtime <= first.Realtime {
			t.Fatalf("%+v and then %+v, %v", first, second, err)
		}
		log, err := m.Dmesg(ctx, 0)
		if err != nil || !strings.Contains(log, "Linux version 6.1.") {
			t.Fatalf("dmesg: %v: %q", err, log)
		}
	})
	t.Run("nonsense", func(t *testing.T) {
		if err := m.Do(ctx, "dance", nil, nil); !errors.Is(err, ErrAgent) {
			t.Fatalf("an unknown command: %v", err)
		}
		if err := m.Do(ctx, wire.CommandMount, []int{1}, nil); !errors.Is(err, ErrAgent) {
			t.Fatalf("arguments of another type: %v", err)
		}
		if _, err := m.Exec(ctx); !errors.Is(err, ErrAgent) {
			t.Fatalf("no program: %v", err)
		}
	})
	t.Run("power off", func(t *testing.T) {
		if err := m.PowerOff(ctx); err != nil {
			t.Fatal(err)
		}
		m.waitEnd(ctx, t)
		hostCheck(t, m.disk) // the mounted file system was left clean
	})
}

func testPrograms(ctx context.Context, t *testing.T, a *Agent) {
	r, err := a.Exec(ctx, "sh", "-c", "cat; echo out; echo err >&2; exit 3")
	if err != nil || r.Status != 3 || r.Stdout != "out\n" || r.Stderr != "err\n" {
		t.Fatalf("got %+v, %v", r, err)
	}
	var status wire.ExecResult
	err = a.Do(ctx, wire.CommandExec, wire.ExecArgs{Argv: []string{"sleep", "1000"}, TimeoutMS: 100}, &status)
	if err != nil || status.Status != 128+9 {
		t.Fatalf("a program that takes too long: %+v, %v", status, err)
	}
	if err := a.PutFile(ctx, "/tmp/f", []byte("\x00\xff"), 0o600); err != nil {
		t.Fatal(err)
	}
	if data, err := a.GetFile(ctx, "/tmp/f"); err != nil || string(data) != "\x00\xff" {
		t.Fatalf("got %q, %v", data, err)
	}
	// An orphan that ends must not stay a zombie for ever.
	if _, err := a.Run(ctx, "sh", "-c", "(sleep 0.1 &) ; exit 0"); err != nil {
		t.Fatal(err)
	}
	deadline, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		out, err := a.Run(deadline, "ps", "-o", "stat,args")
		if err != nil {
			t.Fatalf("the orphan is still there: %v", err)
		}
		if !strings.Contains(out, "sleep") && !strings.Contains(out, "Z") {
			return
		}
	}
}

func testExt4(ctx context.Context, t *testing.T, m *machine) {
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(m.MakeExt4(ctx, "/dev/vda"))
	must(m.Mount(ctx, "/dev/vda", "/mnt", "ext4", "noatime"))
	const size = 1<<20 + 123
	want := wire.PatternSum(7, size)
	if got, err := m.Write(ctx, wire.WriteArgs{Path: "/mnt/file", Seed: 7, Size: size, Sync: true}); err != nil || got != want {
		t.Fatalf("write: %+v, %v, want %+v", got, err, want)
	}
	for _, direct := range []bool{false, true} {
		churn, err := m.Churn(ctx, wire.ChurnArgs{Path: "/mnt/churn", Seed: 1, Blocks: 32, MS: 200, Direct: direct})
		if err != nil || churn.Writes == 0 || churn.Reads == 0 || churn.Wrong != 0 {
			t.Fatalf("churn: %+v, %v", churn, err)
		}
	}
	c, err := m.Start(wire.CommandChurn, wire.ChurnArgs{Path: "/mnt/churn", Seed: 2, Blocks: 32})
	must(err)
	must(c.Cancel(ctx))
	must(c.Wait(ctx, &wire.ChurnResult{}))
	must(m.Unmount(ctx, "/mnt"))
	must(m.CheckExt4(ctx, "/dev/vda"))
	must(m.Mount(ctx, "/dev/vda", "/mnt", "ext4", ""))
	must(m.DropCaches(ctx))
	if got, err := m.Read(ctx, wire.ReadArgs{Path: "/mnt/file"}); err != nil || got != want {
		t.Fatalf("read: %+v, %v, want %+v", got, err, want)
	}
}

// hostCheck runs the host's fsck on an image.
func hostCheck(t *testing.T, image string) {
	t.Helper()
	fsck, err := exec.LookPath("fsck.ext4")
	if err != nil {
		fsck = "/sbin/fsck.ext4" // not in the path of everybody
	}
	if out, err := exec.Command(fsck, "-f", "-n", image).CombinedOutput(); err != nil {
		t.Fatalf("fsck: %v: %s", err, out)
	}
}

func testNetwork(ctx context.Context, t *testing.T, m *machine) {
	lease, err := m.DHCP(ctx, "")
	if err != nil || lease.Address != "10.0.2.15/24" || lease.Router != "10.0.2.2" {
		t.Fatalf("got %+v, %v", lease, err)
	}
	link, err := m.Link(ctx, "eth0")
	if err != nil || !link.Up || !link.Carrier || link.Address != lease.Address {
		t.Fatalf("got %+v, %v", link, err)
	}
	body := make([]byte, 100_001)
	wire.Pattern(body, 3, 0)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/a" {
			http.NotFound(w, r)
			return
		}
		_, _ = w.Write(body)
	}))
	defer server.Close()
	// QEMU shows the host's loopback to the guest as its router.
	url := strings.Replace(server.URL, "127.0.0.1", lease.Router, 1)
	hash := sha256.Sum256(body)
	got, err := m.HTTPGet(ctx, url+"/a")
	if err != nil || got.Status != 200 || got.Size != int64(len(body)) || got.SHA256 != hex.EncodeToString(hash[:]) {
		t.Fatalf("got %+v, %v", got, err)
	}
	if got, err := m.HTTPGet(ctx, url+"/b"); err != nil || got.Status != 404 {
		t.Fatalf("what is not there: %+v, %v", got, err)
	}
	// The guest's own servers, reached from inside.
	address, _, _ := strings.Cut(lease.Address, "/")
	if got, err := m.HTTPGet(ctx, "http://"+address+"/pattern?seed=3&size=5000"); err != nil || got.SumResult != wire.PatternSum(3, 5000) {
		t.Fatalf("the guest's server: %+v, %v", got, err)
	}
	if _, err := m.EchoTest(ctx, wire.EchoTestArgs{Network: "tcp", Address: "127.0.0.1:7", Seed: 5, Size: 300_000}); err != nil {
		t.Fatal(err)
	}
	m.order(t, "set_link n off")
	for {
		link, err := m.Link(ctx, "")
		if err != nil {
			t.Fatal(err)
		}
		if !link.Carrier {
			return
		}
	}
}

func TestPowerButton(t *testing.T) {
	ctx := testContext(t)
	m := startMachine(ctx, t, 1, "")
	m.order(t, "system_powerdown")
	m.waitEnd(ctx, t)
	<-m.Gone()
	if !strings.Contains(m.console.String(), "gnomon-init: power button") {
		t.Fatalf("the console does not speak of the power button: %s", m.console)
	}
}

func TestReboot(t *testing.T) {
	ctx := testContext(t)
	m := startMachine(ctx, t, 1, "")
	if err := m.Reboot(ctx); err != nil {
		t.Fatal(err)
	}
	m.waitEnd(ctx, t) // QEMU was told -no-reboot
}

func TestPanicReachesTheMachine(t *testing.T) {
	ctx := testContext(t)
	m := startMachine(ctx, t, 1, "")
	if err := m.Panic(ctx); err != nil {
		t.Fatal(err)
	}
	m.waitEnd(ctx, t) // pvpanic ends QEMU
	<-m.Gone()
	if !strings.Contains(m.console.String(), "Kernel panic") {
		t.Fatalf("no panic on the console: %s", m.console)
	}
}
