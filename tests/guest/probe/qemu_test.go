package probe

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// A qemu is a QEMU to run the guest in. The firmware is the quick one: SeaBIOS
// takes seconds where ring 0 is interpreted.
type qemu struct {
	accel, machine string
}

func machines() []qemu {
	return []qemu{{"kvm", "microvm"}, {"kvm", "pc"}, {"kvm", "q35"}, {"tcg", "q35"}}
}

func (q qemu) String() string { return q.accel + "-" + q.machine }

func (q qemu) command(ctx context.Context, t *testing.T, words string, args ...string) *exec.Cmd {
	t.Helper()
	elf, err := Path()
	if err != nil {
		t.Fatal(err)
	}
	if q.accel == "kvm" {
		kvm, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
		if err != nil {
			t.Skipf("host feature missing: KVM (%v)", err)
		}
		kvm.Close()
	}
	binary, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("host feature missing: qemu-system-x86_64 (Debian's qemu-system-x86)")
	}
	all := []string{
		"-accel", q.accel, "-machine", q.machine, "-bios", "qboot.rom", "-m", "256", "-nodefaults",
		"-display", "none", "-no-reboot", "-serial", "stdio", "-kernel", elf, "-append", words,
	}
	cmd := exec.CommandContext(ctx, binary, append(all, args...)...)
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// run runs the guest to its end and returns what it reported.
func (q qemu) run(t *testing.T, words string, args ...string) Results {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := q.command(ctx, t, words, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s%s", q, err, out, stderr.Bytes())
	}
	t.Logf("%s", out)
	return Parse(string(out))
}

func (q qemu) runGood(t *testing.T, words string, args ...string) Results {
	t.Helper()
	r := q.run(t, words, args...)
	if err := r.Err(); err != nil {
		t.Fatal(err)
	}
	return r
}

// value is a number that must be there.
func value(t *testing.T, r Results, name string, n int, key string) uint64 {
	t.Helper()
	line, err := r.Find(name, n)
	if err != nil {
		t.Fatal(err)
	}
	v, err := line.Number(key)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestMemoryWorkloads(t *testing.T) {
	for _, q := range machines() {
		t.Run(q.String(), func(t *testing.T) {
			r := q.runGood(t, "console=none boot; fill size=16M seed=3; verify seed=3; verify seed=4;"+
				"touch op=write; verify seed=3; touch order=random size=8M scatter=9; chase hops=2047; chase build=0 hops=6144; dirty rounds=3;"+
				"dirty writes=100 seed=2; out count=10; mmio count=10; cpuid count=10; time ms=20; spin ms=5; tick ms=1 count=2")
			const pages = 16 << 20 / 4096
			if ram := value(t, r, "boot", 0, "ram"); ram < 255<<20 || ram > 256<<20 {
				t.Errorf("%d bytes of RAM", ram)
			}
			want := make([]byte, 16<<20)
			Pattern(want, 3, 0)
			if sum := value(t, r, "verify", 0, "sum"); sum != Checksum(0, want) {
				t.Errorf("checksum %#x, want %#x", sum, Checksum(0, want))
			}
			for i, bad := range []uint64{0, pages, pages} { // the right seed, a wrong one, and after a write to each page
				if got := value(t, r, "verify", i, "bad"); got != bad {
					t.Errorf("verify %d: %d bad pages, want %d", i, got, bad)
				}
			}
			// One step less than once round, then three times round.
			for i, want := range []uint64{0, 3} {
				if rounds := value(t, r, "chase", i, "rounds"); rounds != want {
					t.Errorf("chase %d: %d rounds, want %d", i, rounds, want)
				}
			}
			for i, writes := range []uint64{3 * 2048, 100} {
				if n, bad := value(t, r, "dirty", i, "writes"), value(t, r, "dirty", i, "bad"); n != writes || bad != 0 {
					t.Errorf("dirty %d: %d writes, %d bad", i, n, bad)
				}
			}
			if n := value(t, r, "out", 0, "count"); n != 10 {
				t.Errorf("%d OUTs", n)
			}
			if khz := value(t, r, "out", 0, "khz"); khz < 100_000 || khz > 10_000_000 {
				t.Errorf("TSC at %d kHz", khz)
			}
			if n := value(t, r, "spin", 0, "count"); n == 0 {
				t.Error("spin did not count")
			}
			if n := value(t, r, "tick", 1, "n"); n != 2 {
				t.Errorf("last tick is %d", n)
			}
		})
	}
}

// TestPartsAndSums checks what the workloads for restores report against what
// the host computes: the sums tell which pages were met, with what in them, and
// in which order.
func TestPartsAndSums(t *testing.T) {
	const size, off, span = 8 << 20, 3 << 20, 2 << 20
	const page = 4096
	r := qemu{"kvm", "microvm"}.runGood(t, "fill size=8M seed=3; touch op=sum; touch op=sum order=reverse off=3M span=2M;"+
		"fill off=3M span=2M seed=4; verify seed=3; verify off=3M span=2M seed=4; verify off=5M seed=3;"+
		"map; chase off=3M span=2M seed=7; chase off=3M span=2M build=0 hops=1024; touch op=write off=8384512; verify off=5M seed=3")
	memory := make([]byte, size)
	Pattern(memory, 3, 0)
	if got, want := value(t, r, "touch", 0, "sum"), Checksum(0, memory); got != want {
		t.Errorf("sum %#x of all pages, want %#x", got, want)
	}
	var sum uint64
	for at := off + span - page; at >= off; at -= page {
		sum = Checksum(sum, memory[at:at+page])
	}
	if got, n := value(t, r, "touch", 1, "sum"), value(t, r, "touch", 1, "pages"); got != sum || n != span/page {
		t.Errorf("sum %#x of %d pages backwards, want %#x", got, n, sum)
	}
	Pattern(memory[off:off+span], 4, off)
	if got, want := value(t, r, "verify", 0, "sum"), Checksum(0, memory); got != want {
		t.Errorf("sum %#x after a part was filled, want %#x", got, want)
	}
	for i, bad := range []uint64{span / page, 0, 0, 1} {
		if got := value(t, r, "verify", i, "bad"); got != bad {
			t.Errorf("verify %d: %d bad pages, want %d", i, got, bad)
		}
	}
	if got := value(t, r, "verify", 3, "first"); got != (size-off-span)/page-1 {
		t.Errorf("page %d was written to", got)
	}

	// The chase begins at the first page of its part, wherever that stands in the cycle.
	va := value(t, r, "map", 0, "va")
	cycle := Shuffled(span/page, 7)
	next := make(map[uint64]uint64, len(cycle))
	for i, n := range cycle {
		next[uint64(n)] = uint64(cycle[(i+1)%len(cycle)])
	}
	sum = 0
	for n, hop := uint64(0), 0; hop < 1024; hop++ {
		node := binary.LittleEndian.AppendUint64(nil, va+off+next[n]*page)
		node = append(node, memory[off+n*page+8:off+n*page+16]...)
		sum = Checksum(sum, node)
		n = next[n]
		if hop+1 == span/page {
			if got := value(t, r, "chase", 0, "sum"); got != sum {
				t.Errorf("sum %#x once round, want %#x", got, sum)
			}
		}
	}
	if got := value(t, r, "chase", 1, "sum"); got != sum {
		t.Errorf("sum %#x twice round, want %#x", got, sum)
	}
}

func TestBadPartsAreErrors(t *testing.T) {
	for _, words := range []string{"touch size=1M off=1M", "fill size=1M span=2M", "chase size=1M off=512k span=516k", "verify size=1M off=0xfffffffffffff000 span=4k"} {
		if err := (qemu{"kvm", "microvm"}).run(t, words).Err(); !errors.Is(err, ErrWorkload) {
			t.Errorf("%q: %v", words, err)
		}
	}
}

func TestFaultsAreReported(t *testing.T) {
	for _, test := range []struct{ kind, vector, cr2 string }{
		{"page", "14", "0x7eadbeef000"},
		{"ud", "6", ""},
		{"gp", "13", ""},
	} {
		t.Run(test.kind, func(t *testing.T) {
			r := qemu{"kvm", "microvm"}.run(t, "boot fault kind="+test.kind)
			line, err := r.Find("fault", 0)
			if err != nil {
				t.Fatal(err)
			}
			if line.Values["vector"] != test.vector || test.cr2 != "" && line.Values["cr2"] != test.cr2 {
				t.Errorf("%v", line)
			}
			if r.Done {
				t.Error("it went on after the fault")
			}
		})
	}
}

// disk makes a raw image and the arguments that attach it.
func disk(t *testing.T, size int64, options string) (path string, args []string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path, []string{
		"-drive", "file=" + path + ",format=raw,if=none,id=d,discard=unmap",
		"-device", "virtio-blk-pci,drive=d,disable-legacy=on,serial=sundial" + options,
	}
}

func TestBlockWritesReachTheImage(t *testing.T) {
	for _, q := range machines()[1:] { // microvm has no PCI ports
		for _, ring := range []string{"", "indirect=1", "packed=1", "packed=1 indirect=1"} {
			t.Run(q.String()+" "+ring, func(t *testing.T) {
				const size = 32 << 20
				path, args := disk(t, size, ",packed=on")
				r := q.runGood(t, strings.ReplaceAll("blk op=info R; blk op=id R; blk op=seqwrite bs=1M qd=3 total=16M seed=5 R;"+
					"blk op=randwrite bs=8k qd=20 segs=2 off=16M span=1M total=4M seed=6 R; blk op=flush R;"+
					"blk op=zero off=1M total=64k R; blk op=discard off=2M total=64k R;"+
					"blk op=seqread bs=64k qd=8 span=1M total=1M seed=5 verify=1 R;"+
					"blk op=randread qd=32 span=1M total=2M seed=6 verify=1 R", "R", ring), args...)
				if capacity := value(t, r, "blk", 0, "capacity"); capacity != size {
					t.Errorf("capacity %d", capacity)
				}
				if id, err := r.Find("blk", 1); err != nil || id.Values["serial"] != "sundial" {
					t.Errorf("serial: %v, %v", id, err)
				}
				for i, ios := range map[int]uint64{2: 16, 3: 512, 7: 16, 8: 512} {
					if n, failed := value(t, r, "blk", i, "ios"), value(t, r, "blk", i, "failed"); n != ios || failed != 0 {
						t.Errorf("blk %d: %d ios, %d failed", i, n, failed)
					}
				}
				for _, i := range []int{4, 5, 6} {
					if status := value(t, r, "blk", i, "status"); status != 0 {
						t.Errorf("blk %d: status %d", i, status)
					}
				}
				if bad := value(t, r, "blk", 7, "bad"); bad != 0 {
					t.Errorf("%d bad reads", bad)
				}
				if bad := value(t, r, "blk", 8, "bad"); bad != 512 { // the pattern there has another seed
					t.Errorf("%d bad reads of a foreign pattern, want all 512", bad)
				}
				got, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				want := make([]byte, 16<<20)
				Pattern(want, 5, 0)
				clear(want[1<<20:][:64<<10])
				clear(want[2<<20:][:64<<10])
				if !bytes.Equal(got[:16<<20], want) {
					t.Error("the image differs from what the guest wrote in sequence")
				}
				// Random writes cover most of their span: what is there is right.
				block, written := make([]byte, 8192), 0
				for at := 16 << 20; at < 17<<20; at += len(block) {
					Pattern(block, 6, uint64(at))
					if bytes.Equal(got[at:at+len(block)], block) {
						written++
					} else if !bytes.Equal(got[at:at+len(block)], make([]byte, len(block))) {
						t.Fatalf("block at %#x is neither empty nor what was written", at)
					}
				}
				if written < 100 {
					t.Errorf("%d of 128 blocks written by 512 random writes", written)
				}
			})
		}
	}
}

func TestEvilDriverLeavesMachineAndDeviceUsable(t *testing.T) {
	kinds := map[string]bool{ // whether QEMU calls the device broken
		"loop": true, "self": true, "next": true, "length": true, "readonly": true, "short": true,
		"bare": true, "indirect": true, "head": true, "jump": true,
		"range": false, "wrap": false, "device": false, "mmio": false, "beyond": false,
	}
	var words strings.Builder
	var order []string
	for kind := range kinds {
		fmt.Fprintf(&words, "blk evil=%s;", kind)
		order = append(order, kind)
	}
	_, args := disk(t, 1<<20, "")
	r := qemu{"kvm", "q35"}.runGood(t, words.String(), args...)
	for i, kind := range order {
		line, err := r.Find("evil", i)
		if err != nil {
			t.Fatal(err)
		}
		if line.Values["kind"] != kind || line.Values["read_after"] != "ok" {
			t.Errorf("%s: %v", kind, line)
		}
		if broken := line.Values["needs_reset"] == "1"; broken != kinds[kind] {
			t.Errorf("%s: needs_reset %v, want %v", kind, broken, kinds[kind])
		}
	}
}

func TestMissingDevicesAreErrors(t *testing.T) {
	for _, words := range []string{"blk", "rng", "net", "blk op=nonsense", "touch size=1G", "nonsense"} {
		if err := (qemu{"kvm", "q35"}).run(t, words).Err(); err == nil {
			t.Errorf("%q: no error", words)
		}
	}
}

func TestBadBlockParametersAreErrors(t *testing.T) {
	for _, words := range []string{
		"blk qd=300", "blk bs=100", "blk off=2M", "blk off=512k span=1M", "blk segs=17", "blk queue=3",
		"blk packed=1", "blk evil=nonsense", "blk evil=loop indirect=1", "blk dev=1",
	} {
		_, args := disk(t, 1<<20, ",packed=off")
		r := (qemu{"kvm", "q35"}).run(t, words, args...)
		if err := r.Err(); !errors.Is(err, ErrWorkload) || !r.Done {
			t.Errorf("%q: %v", words, err)
		}
	}
}

func TestEntropy(t *testing.T) {
	r := qemu{"kvm", "q35"}.runGood(t, "rng bytes=16k", "-device", "virtio-rng-pci")
	if n, distinct := value(t, r, "rng", 0, "bytes"), value(t, r, "rng", 0, "distinct"); n != 16<<10 || distinct != 256 {
		t.Errorf("%d bytes, %d values of a byte among them", n, distinct)
	}
}

func TestNetFrames(t *testing.T) {
	dir := t.TempDir()
	local, peer := filepath.Join(dir, "qemu"), filepath.Join(dir, "test")
	wire, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: peer, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer wire.Close()
	const blasted, echoed = 200, 50
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	words := fmt.Sprintf("net op=blast count=%d bs=100; net op=echo count=%d qd=8", blasted, echoed)
	cmd := qemu{"kvm", "q35"}.command(ctx, t, words,
		"-netdev", "dgram,id=n,local.type=unix,local.path="+local+",remote.type=unix,remote.path="+peer,
		"-device", "virtio-net-pci,netdev=n,mac=52:54:00:12:34:56")
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ready := make(chan struct{})
	serial := make(chan string, 1)
	go func() {
		var all strings.Builder
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			all.WriteString(lines.Text() + "\n")
			if strings.Contains(lines.Text(), "op=ready") {
				close(ready)
			}
		}
		serial <- all.String()
	}()

	deadline, _ := ctx.Deadline()
	if err := wire.SetDeadline(deadline); err != nil {
		t.Fatal(err)
	}
	frame := make([]byte, 2048)
	for i := range uint64(blasted) {
		n, err := wire.Read(frame)
		if err != nil {
			t.Fatalf("frame %d: %v", i, err)
		}
		if n != 100 || binary.LittleEndian.Uint64(frame[14:]) != i {
			t.Fatalf("frame %d: %d bytes: %x", i, n, frame[:n])
		}
	}
	select {
	case <-ready:
	case <-ctx.Done():
		t.Fatal("the guest never got ready to echo")
	}
	to := &net.UnixAddr{Name: local, Net: "unixgram"}
	for i := range echoed {
		out := make([]byte, 60+i)
		copy(out, "\x52\x54\x00\x12\x34\x56\x02\x00\x00\x00\x00\x01\x88\xb5")
		Pattern(out[16:16+40], 1, uint64(i)*64)
		if _, err := wire.WriteToUnix(out, to); err != nil {
			t.Fatal(err)
		}
		n, err := wire.Read(frame)
		if err != nil {
			t.Fatalf("echo %d: %v", i, err)
		}
		want := append([]byte("\x02\x00\x00\x00\x00\x01\x52\x54\x00\x12\x34\x56"), out[12:]...)
		if !bytes.Equal(frame[:n], want) {
			t.Fatalf("echo %d:\n%x, want\n%x", i, frame[:n], want)
		}
	}
	text := <-serial
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	r := Parse(text)
	if err := r.Err(); err != nil {
		t.Fatal(err)
	}
	if n := value(t, r, "net", 2, "frames"); n != echoed {
		t.Errorf("%d frames echoed", n)
	}
}

// TestMailboxFollowsPause reads the mailbox as any host can, and sees that the
// guest counts while it runs and stands still while it is stopped.
func TestMailboxFollowsPause(t *testing.T) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "qmp")
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := qemu{"kvm", "microvm"}.command(ctx, t, "wait; spin", "-qmp", "unix:"+socket+",server=on,wait=on")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	conn := dial(ctx, t, socket)
	defer conn.Close()
	monitor := &monitor{t: t, in: bufio.NewReader(conn), out: conn}
	monitor.read() // greeting
	monitor.call("qmp_capabilities", nil)

	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || Parse(line).Lines[0].Name != "wait" {
		t.Fatalf("%q, %v", line, err)
	}
	mailbox := func() (magic, counter uint64) {
		path := filepath.Join(dir, "mailbox")
		monitor.call("pmemsave", map[string]any{"val": MailboxAddr, "size": 32, "filename": path})
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return binary.LittleEndian.Uint64(b[MailboxMagic:]), binary.LittleEndian.Uint64(b[MailboxCounter:])
	}
	if magic, counter := mailbox(); magic != Magic || counter != 0 {
		t.Errorf("waiting: magic %#x, counter %d", magic, counter)
	}
	if _, err := stdin.Write([]byte("go\n")); err != nil {
		t.Fatal(err)
	}
	var last uint64
	for range 5 {
		for {
			if _, counter := mailbox(); counter > last {
				break
			}
			if ctx.Err() != nil {
				t.Fatal("the guest does not count")
			}
		}
		monitor.call("stop", nil)
		_, last = mailbox()
		if _, again := mailbox(); again != last {
			t.Errorf("stopped, and yet it counted from %d to %d", last, again)
		}
		monitor.call("cont", nil)
	}
	monitor.call("quit", nil)
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

// dial waits for QEMU to make its socket.
func dial(ctx context.Context, t *testing.T, socket string) net.Conn {
	t.Helper()
	for {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			deadline, _ := ctx.Deadline()
			if err := conn.SetDeadline(deadline); err != nil {
				t.Fatal(err)
			}
			return conn
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
	}
}

// A monitor is as much of a QMP client as these tests need.
type monitor struct {
	t   *testing.T
	in  *bufio.Reader
	out net.Conn
}

func (m *monitor) read() map[string]json.RawMessage {
	m.t.Helper()
	text, err := m.in.ReadBytes('\n')
	if err != nil {
		m.t.Fatal(err)
	}
	var message map[string]json.RawMessage
	if err := json.Unmarshal(text, &message); err != nil {
		m.t.Fatal(err)
	}
	return message
}

func (m *monitor) call(command string, arguments map[string]any) {
	m.t.Helper()
	text, err := json.Marshal(map[string]any{"execute": command, "arguments": arguments})
	if arguments == nil {
		text = []byte(`{"execute":` + strconv.Quote(command) + `}`)
	}
	if err != nil {
		m.t.Fatal(err)
	}
	if _, err := m.out.Write(text); err != nil {
		m.t.Fatal(err)
	}
	for {
		message := m.read()
		if message["error"] != nil {
			m.t.Fatalf("%s: %s", command, message["error"])
		}
		if message["return"] != nil {
			return
		}
	}
}
