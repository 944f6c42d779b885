package tests

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
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

	"github.com/vishvananda/netlink"

	"github.com/gnomon-vmm/gnomon/kvm/hostinfo"
	"github.com/gnomon-vmm/gnomon/qmp/client"
	"github.com/gnomon-vmm/gnomon/tests/guest"
	"github.com/gnomon-vmm/gnomon/tests/guest/wire"
)

// linux is one booted Linux kit that the subtests of TestLinux share.
type linux struct {
	*process
	agent *guest.Agent
	dir   string
	web   http.Handler
	tap   string // host's address on the tap
	port  int    // on the host, forwarded to the guest's port 80
	disk  string // image behind /dev/vda
	bytes int64  // how much is pushed through the guest's kernel
}

// Linux with 2 vCPUs and every device uses each of them for real.
func TestLinux(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	m := &linux{dir: t.TempDir(), port: freePort(t), bytes: 64 << 20}
	if interpreted(t) {
		m.bytes = 256 << 10
	}
	m.web = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		p := make([]byte, m.bytes)
		wire.Pattern(p, 7, 0)
		w.Write(p)
	})
	m.disk = image(t, filepath.Join(m.dir, "a.img"), 64<<20)
	second := image(t, filepath.Join(m.dir, "b.img"), 1<<20)
	tap := tapDevice(t, "gnmtest0", "192.168.77.1/24")
	m.tap = "192.168.77.1"

	m.process, m.agent = bootLinux(ctx, t, "--cpus", "2", "--memory", "256M",
		"--disk", "file="+m.disk+",serial=alpha",
		"--disk", "file="+second+",readonly=on,serial=beta",
		"--net", fmt.Sprintf("user,forward=tcp:%d:80", m.port),
		"--net", "tap="+tap+",mac=52:54:00:12:34:57",
		"--vsock", "cid=3,path="+filepath.Join(m.dir, "vsock"),
		"--console", "unix:"+filepath.Join(m.dir, "console"))
	m.connect(ctx, t)

	for _, test := range []struct {
		name string
		run  func(context.Context, *testing.T, *linux)
	}{
		{"Facts", testFacts},
		{"Entropy", testEntropy},
		{"UserNetwork", testUserNetwork},
		{"Forward", testForward},
		{"Tap", testTap},
		{"SetLink", testSetLink},
		{"Vsock", testVsock},
		{"Console", testConsole},
		{"Disk", testDisk},
		{"ReadOnlyDisk", testReadOnlyDisk},
		{"Discard", testDiscard},
		{"HotPlug", testHotPlug},
		{"BothCPUs", testBothCPUs},
		{"TimeStandsStill", testTimeStandsStill},
		{"Reboot", testReboot},
		{"PowerButton", testPowerButton}, // ends the machine
		{"ImageAfter", testImageAfter},
	} {
		if !t.Run(test.name, func(t *testing.T) {
			start := time.Now()
			test.run(ctx, t, m)
			t.Logf("took %v", time.Since(start).Round(time.Millisecond))
		}) {
			return
		}
	}
}

// interpreted tells whether this host interprets guests' ring 0.
func interpreted(t *testing.T) bool {
	t.Helper()
	return !hostinfo.Probe().KVM.NativeRing0
}

func image(t *testing.T, path string, size int64) string {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return path
}

// tapDevice makes a tap interface with an address for the host.
func tapDevice(t *testing.T, name, address string) string {
	t.Helper()
	link := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: name}, Mode: netlink.TUNTAP_MODE_TAP}
	if err := netlink.LinkAdd(link); err != nil {
		t.Fatalf("make a tap interface (as root): %v", err)
	}
	t.Cleanup(func() {
		if err := netlink.LinkDel(link); err != nil {
			t.Errorf("remove %s: %v", name, err)
		}
	})
	addr, err := netlink.ParseAddr(address)
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.AddrAdd(link, addr); err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		t.Fatal(err)
	}
	return name
}

func testFacts(ctx context.Context, t *testing.T, m *linux) {
	facts, err := m.agent.Facts(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("Linux %s, init after %d ms of guest time", facts.Release, facts.BootMS)
	if facts.CPUs != 2 {
		t.Errorf("%d CPUs", facts.CPUs)
	}
	out, err := exec.Command(gnomon, "ps").CombinedOutput()
	if err != nil || !strings.Contains(string(out), m.name) {
		t.Errorf("gnomon ps: %v\n%s", err, out)
	}
}

func testEntropy(ctx context.Context, t *testing.T, m *linux) {
	a, err := m.agent.Random(ctx, "/dev/hwrng", 64)
	if err != nil {
		t.Fatal(err)
	}
	b, err := m.agent.Random(ctx, "/dev/hwrng", 64)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(a, b) || len(a) != 64 || len(b) != 64 {
		t.Errorf("two reads of the entropy device: %x, %x", a, b)
	}
}

// fetch has the guest fetch what the host's web server at address serves.
func (m *linux) fetch(ctx context.Context, t *testing.T, listen, url string) {
	t.Helper()
	l, err := net.Listen("tcp", listen)
	if err != nil {
		t.Fatal(err)
	}
	server := &httptest.Server{Listener: l, Config: &http.Server{Handler: m.web}}
	server.Start()
	defer server.Close()
	got, err := m.agent.HTTPGet(ctx, fmt.Sprintf(url, l.Addr().(*net.TCPAddr).Port))
	if err != nil {
		t.Fatal(err)
	}
	if want := wire.PatternSum(7, m.bytes); got.SumResult != want {
		t.Errorf("the guest fetched %+v, the host served %+v", got, want)
	}
}

func testUserNetwork(ctx context.Context, t *testing.T, m *linux) {
	lease, err := m.agent.DHCP(ctx, "eth0")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(lease.Address, "10.0.2.15/") {
		t.Errorf("address %s", lease.Address)
	}
	m.fetch(ctx, t, "127.0.0.1:0", "http://10.0.2.2:%d/")
}

func testForward(ctx context.Context, t *testing.T, m *linux) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d/pattern?seed=11&size=%d", m.port, m.bytes), nil)
	if err != nil {
		t.Fatal(err)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	h := sha256.New()
	n, err := io.Copy(h, response.Body)
	if err != nil {
		t.Fatal(err)
	}
	got := wire.SumResult{Size: n, SHA256: hex.EncodeToString(h.Sum(nil))}
	if want := wire.PatternSum(11, m.bytes); got != want {
		t.Errorf("the host fetched %+v, the guest served %+v", got, want)
	}
}

func testTap(ctx context.Context, t *testing.T, m *linux) {
	if err := m.agent.SetAddress(ctx, wire.AddressArgs{Interface: "eth1", Address: "192.168.77.2/24"}); err != nil {
		t.Fatal(err)
	}
	m.fetch(ctx, t, m.tap+":0", "http://"+m.tap+":%d/")
}

func testSetLink(ctx context.Context, t *testing.T, m *linux) {
	for _, up := range []bool{false, true} {
		m.do(ctx, t, "set_link", map[string]any{"name": "net0", "up": up}, nil)
		for {
			link, err := m.agent.Link(ctx, "eth0")
			if err != nil {
				t.Fatal(err)
			}
			if link.Carrier == up {
				break
			}
		}
	}
}

func testVsock(ctx context.Context, t *testing.T, m *linux) {
	path := filepath.Join(m.dir, "vsock")

	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "CONNECT %d\n", wire.VsockEchoPort)
	line := make([]byte, 0, 32)
	for !bytes.HasSuffix(line, []byte("\n")) {
		var b [1]byte
		if _, err := conn.Read(b[:]); err != nil {
			t.Fatalf("after %q: %v", line, err)
		}
		line = append(line, b[0])
	}
	if !bytes.HasPrefix(line, []byte("OK ")) {
		t.Fatalf("answer %q", line)
	}
	sent, got := make([]byte, 64<<10), make([]byte, 64<<10)
	wire.Pattern(sent, 3, 0)
	go conn.Write(sent)
	if _, err := io.ReadFull(conn, got); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(sent, got) {
		t.Error("the guest's echo differs")
	}

	l, err := net.Listen("unix", path+"_5000")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		conn, err := l.Accept()
		if err == nil {
			io.Copy(conn, conn)
			conn.Close()
		}
	}()
	sum, err := m.agent.EchoTest(ctx, wire.EchoTestArgs{Network: "vsock", Address: "2:5000", Seed: 5, Size: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	if want := wire.PatternSum(5, 64<<10); sum != want {
		t.Errorf("the host's echo: %+v, want %+v", sum, want)
	}
}

func testConsole(ctx context.Context, t *testing.T, m *linux) {
	conn, err := net.Dial("unix", filepath.Join(m.dir, "console"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := m.agent.Run(ctx, "sh", "-c", "echo through the console > /dev/hvc0"); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len("through the console"))
	if _, err := io.ReadFull(conn, got); err != nil {
		t.Fatal(err)
	}
	if string(got) != "through the console" {
		t.Errorf("the console printed %q", got)
	}
}

func testDisk(ctx context.Context, t *testing.T, m *linux) {
	serial, err := m.agent.GetFile(ctx, "/sys/block/vda/serial")
	if err != nil || strings.TrimSpace(string(serial)) != "alpha" {
		t.Errorf("serial %q, %v", serial, err)
	}
	step := func(name string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	step("mkfs", m.agent.MakeExt4(ctx, "/dev/vda"))
	step("mount", m.agent.Mount(ctx, "/dev/vda", "/mnt", "ext4", ""))
	wrote, err := m.agent.Write(ctx, wire.WriteArgs{Path: "/mnt/file", Seed: 42, Size: m.bytes, Sync: true})
	step("write and fsync", err)
	step("unmount", m.agent.Unmount(ctx, "/mnt"))
	step("fsck in the guest", m.agent.CheckExt4(ctx, "/dev/vda"))
	step("drop caches", m.agent.DropCaches(ctx))
	step("mount again", m.agent.Mount(ctx, "/dev/vda", "/mnt", "ext4", ""))
	read, err := m.agent.Read(ctx, wire.ReadArgs{Path: "/mnt/file"})
	step("read", err)
	if want := wire.PatternSum(42, m.bytes); wrote != want || read != want {
		t.Errorf("wrote %+v, read %+v, want %+v", wrote, read, want)
	}
	step("unmount again", m.agent.Unmount(ctx, "/mnt"))
}

func testReadOnlyDisk(ctx context.Context, t *testing.T, m *linux) {
	ro, err := m.agent.GetFile(ctx, "/sys/block/vdb/ro")
	if err != nil || strings.TrimSpace(string(ro)) != "1" {
		t.Errorf("/dev/vdb: ro=%q, %v", ro, err)
	}
	if _, err := m.agent.Write(ctx, wire.WriteArgs{Path: "/dev/vdb", Seed: 1, Size: 4096, Sync: true}); err == nil {
		t.Error("the guest wrote to a read-only disk")
	}
}

// The guest's discard gives the image's space back to the host.
func testDiscard(ctx context.Context, t *testing.T, m *linux) {
	const at, size = 40 << 20, 256 << 10
	if _, err := m.agent.Write(ctx, wire.WriteArgs{Path: "/dev/vda", Seed: 9, Offset: at, Size: size, Sync: true, Direct: true}); err != nil {
		t.Fatal(err)
	}
	before := allocated(t, m.disk)
	if _, err := m.agent.Run(ctx, "blkdiscard", "-o", fmt.Sprint(at), "-l", fmt.Sprint(size), "/dev/vda"); err != nil {
		t.Fatal(err)
	}
	if after := allocated(t, m.disk); after > before-size {
		t.Errorf("the image has %d bytes before the discard and %d after", before, after)
	}
}

func testBothCPUs(ctx context.Context, t *testing.T, m *linux) {
	burn, err := m.agent.Burn(ctx, 2, 500)
	if err != nil {
		t.Fatal(err)
	}
	if len(burn.Turns) != 2 || burn.Turns[0] == 0 || burn.Turns[1] == 0 {
		t.Errorf("turns %v", burn.Turns)
	}
}

// A pause is not in the guest's monotonic time.
func testTimeStandsStill(ctx context.Context, t *testing.T, m *linux) {
	const pause = 3 * time.Second
	hostStart := time.Now()
	before, err := m.agent.Clocks(ctx)
	if err != nil {
		t.Fatal(err)
	}
	m.do(ctx, t, "stop", nil, nil)
	time.Sleep(pause) // what must not pass in the guest
	m.do(ctx, t, "cont", nil, nil)
	after, err := m.agent.Clocks(ctx)
	if err != nil {
		t.Fatal(err)
	}
	host, guest := time.Since(hostStart), time.Duration(after.Monotonic-before.Monotonic)
	if guest < 0 || guest > host-pause {
		t.Errorf("the guest's clock (%s) went on by %v of %v, of which %v was a pause", after.Source, guest, host, pause)
	}
}

func testReboot(ctx context.Context, t *testing.T, m *linux) {
	events := m.qmp.Subscribe(ctx)
	if err := m.agent.Reboot(ctx); err != nil {
		t.Fatal(err)
	}
	waitEvent(ctx, t, events, "RESET")
	// What is sent before init reads the serial port again would be lost.
	for strings.Count(m.log.String(), wire.Ready) < 2 {
		select {
		case <-m.stopped:
			t.Fatalf("the machine ended: %v", m.err)
		case <-ctx.Done():
			t.Fatal(ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
	facts, err := m.agent.Facts(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if facts.CPUs != 2 {
		t.Errorf("%d CPUs after the reboot", facts.CPUs)
	}
}

func testPowerButton(ctx context.Context, t *testing.T, m *linux) {
	events := m.qmp.Subscribe(ctx)
	m.do(ctx, t, "system_powerdown", nil, nil)
	waitEvent(ctx, t, events, "POWERDOWN")
	waitEvent(ctx, t, events, "SHUTDOWN")
	if status := m.status(ctx, t); status != 0 {
		t.Errorf("exit status %d", status)
	}
	for _, name := range []string{"vsock", "console"} {
		if _, err := os.Lstat(filepath.Join(m.dir, name)); err == nil {
			t.Errorf("socket %s was left behind", name)
		}
	}
}

// The image is clean to the host's fsck, and its file is the guest's.
func testImageAfter(ctx context.Context, t *testing.T, m *linux) {
	if out, err := exec.CommandContext(ctx, "e2fsck", "-f", "-n", m.disk).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
	out, err := exec.CommandContext(ctx, "debugfs", "-R", "cat /file", m.disk).Output()
	if err != nil {
		t.Fatalf("debugfs: %v", err)
	}
	sum := sha256.Sum256(out)
	got := wire.SumResult{Size: int64(len(out)), SHA256: hex.EncodeToString(sum[:])}
	if want := wire.PatternSum(42, m.bytes); got != want {
		t.Errorf("the image's file is %+v, want %+v", got, want)
	}
}

func allocated(t *testing.T, path string) int64 {
	t.Helper()
	out, err := exec.Command("stat", "-c", "%b %B", path).Output()
	if err != nil {
		t.Fatal(err)
	}
	var blocks, size int64
	if _, err := fmt.Sscan(string(out), &blocks, &size); err != nil {
		t.Fatal(err)
	}
	return blocks * size
}

// waitEvent returns when the machine sends the named event.
func waitEvent(ctx context.Context, t *testing.T, events <-chan client.Event, name string) {
	t.Helper()
	for {
		select {
		case e, ok := <-events:
			if !ok {
				t.Fatalf("the QMP session ended before %s", name)
			}
			if e.Event == name {
				return
			}
		case <-ctx.Done():
			t.Fatalf("no %s: %v", name, ctx.Err())
		}
	}
}
