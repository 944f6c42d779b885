package tests

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gnomon-vmm/gnomon/tests/guest"
	"github.com/gnomon-vmm/gnomon/tests/guest/wire"
)

// relay is the serial port of a guest that goes from process to process.
type relay struct {
	out *io.PipeReader
	in  *io.PipeWriter

	mu sync.Mutex
	to io.Writer // of the process that runs; guarded by mu

	ended chan struct{} // closed when all of the last process's output was taken
}

func newRelay() *relay {
	out, in := io.Pipe()
	r := &relay{out: out, in: in, ended: make(chan struct{})}
	close(r.ended)
	return r
}

// plug has a process's end be the one that is used. The one before has ended.
func (r *relay) plug(rw io.ReadWriter) {
	<-r.ended
	ended := make(chan struct{})
	r.ended = ended
	r.mu.Lock()
	r.to = rw
	r.mu.Unlock()
	go func() {
		defer close(ended)
		io.Copy(r.in, rw)
	}()
}

func (r *relay) Read(p []byte) (int, error) { return r.out.Read(p) }

func (r *relay) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.to.Write(p)
}

// echoes sends back what comes on a listener's connections, or only takes it.
type echoes struct {
	net.Listener
	came chan struct{} // capacity 1: something has come since

	bytes atomic.Int64 // that came
}

func listenEchoes(t *testing.T, network, address string, silent bool) *echoes {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	e := &echoes{Listener: l, came: make(chan struct{}, 1)}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				if silent {
					io.Copy(e, conn)
				} else {
					io.Copy(io.MultiWriter(conn, e), conn)
				}
			}()
		}
	}()
	return e
}

// Write counts what has come.
func (e *echoes) Write(p []byte) (int, error) {
	e.bytes.Add(int64(len(p)))
	select {
	case e.came <- struct{}{}:
	default:
	}
	return len(p), nil
}

// wait waits until so many bytes have come in all, from a guest that talk is with.
func (e *echoes) wait(ctx context.Context, t *testing.T, talk *talk, bytes int64) {
	t.Helper()
	for e.bytes.Load() < bytes {
		select {
		case <-e.came:
		case <-talk.ended:
			t.Fatalf("%d bytes of %d have come, and the connection ended: %v", e.bytes.Load(), bytes, talk.err)
		case <-ctx.Done():
			t.Fatalf("%d bytes of %d have come: %v", e.bytes.Load(), bytes, ctx.Err())
		}
	}
}

// talk is a connection that the guest holds.
type talk struct {
	call  *guest.Call
	ended chan struct{}
	said  wire.ConverseResult // after ended
	err   error               // after ended
}

func (g *traveller) talk(ctx context.Context, t *testing.T, command wire.Command, args any) *talk {
	t.Helper()
	k := &talk{call: g.begin(t, command, args), ended: make(chan struct{})}
	go func() {
		defer close(k.ended)
		k.err = k.call.Wait(ctx, &k.said)
	}()
	return k
}

// converse has the guest begin a conversation that goes on for ever.
func (g *traveller) converse(ctx context.Context, t *testing.T, network, address string, seed uint64) *talk {
	t.Helper()
	return g.talk(ctx, t, wire.CommandConverse, wire.ConverseArgs{Network: network, Address: address, Seed: seed, MS: 100})
}

// diary is the script of processes that write down how often they have been
// here, one by a pipe to another, which appends it to an open file. Nothing in it
// starts a further process.
const diary = `mkfifo /tmp/tick
exec 3<>/tmp/tick
here() { read pid rest </proc/self/stat; echo $pid >>/tmp/pids; }
here
{ here; i=0; while [ ! -e /tmp/stop ]; do
	i=$((i+1)); read up rest </proc/uptime; echo "$i $up"; read -t 0.2 rest <&3
done; } | { here; while read line; do echo "$line"; done >>/mnt/diary; }`

// traveller is a Linux guest and all that it is in the middle of.
type traveller struct {
	*process
	agent  *guest.Agent
	serial *relay
	dir    string

	diary, clock *guest.Call
	inner, outer *talk   // within the guest, and with the host over a tap device
	host         *echoes // the other end of outer
	vsockPath    string
}

// Linux goes from process to process by files, with what it is in the middle of:
// its processes, files, timers and connections go on, but for those whose other
// end is gone with the process.
func TestRestoredLinuxWhole(t *testing.T) {
	for _, cpus := range []int{1, 2} {
		t.Run(fmt.Sprint(cpus, "vCPU"), func(t *testing.T) { testTraveller(t, cpus) })
	}
}

func testTraveller(t *testing.T, cpus int) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	g := depart(ctx, t, cpus)
	var disk string
	for i, clock := range []string{"guest", "host"}[:cpus] { // one journey is enough for one vCPU
		file := filepath.Join(g.dir, "checkpoint"+clock)
		g.hop(ctx, t, file, clock, i == 0)
		disk = file + "." + g.name + ".disk0.qcow2"
	}
	g.arrive(ctx, t)
	checkDiary(ctx, t, disk, filepath.Join(g.dir, "raw"))
}

// must ends the test where a step in the guest failed.
func must(t *testing.T, name string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
}

func (g *traveller) begin(t *testing.T, command wire.Command, args any) *guest.Call {
	t.Helper()
	call, err := g.agent.Start(command, args)
	must(t, string(command), err)
	return call
}

// depart boots the guest and has it begin everything.
func depart(ctx context.Context, t *testing.T, cpus int) *traveller {
	t.Helper()
	dir := t.TempDir()
	g := &traveller{serial: newRelay(), dir: dir, vsockPath: filepath.Join(dir, "vsock")}
	tap := tapDevice(t, fmt.Sprint("gnmwhole", cpus), "192.168.78.1/24")
	disk := image(t, filepath.Join(dir, "disk.img"), 16<<20)
	out, err := exec.CommandContext(ctx, "mke2fs", "-q", "-t", "ext4", "-N", "256", "-J", "size=4", disk).CombinedOutput()
	must(t, "mke2fs: "+string(out), err)
	kit := guest.Linux(t)
	var rw io.ReadWriter
	g.process, rw = launch(t, "--kernel", kit.Kernel, "--initrd", kit.Initrd, "--append", kit.Cmdline,
		"--cpus", fmt.Sprint(cpus), "--memory", "128M", "--disk", "file="+disk,
		"--net", "tap="+tap, "--vsock", "cid=3,path="+g.vsockPath)
	g.serial.plug(rw)
	var console output
	g.agent = guest.NewAgent(g.serial, &console)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the guest's console:\n%s", &console)
		}
	})
	must(t, "boot", g.agent.WaitReady(ctx))
	g.connect(ctx, t)
	must(t, "mount", g.agent.Mount(ctx, "/dev/vda", "/mnt", "ext4", ""))
	must(t, "address", g.agent.SetAddress(ctx, wire.AddressArgs{Address: "192.168.78.2/24"}))

	g.host = listenEchoes(t, "tcp", "192.168.78.1:0", false)
	must(t, "begin the diary", g.agent.PutFile(ctx, "/mnt/diary", nil, 0))
	g.diary = g.begin(t, wire.CommandExec, wire.ExecArgs{Argv: []string{"sh", "-c", diary}})
	g.inner = g.converse(ctx, t, "tcp", fmt.Sprint("127.0.0.1:", wire.TCPEchoPort), 1)
	g.outer = g.converse(ctx, t, "tcp", g.host.Addr().String(), 2)
	g.clock = g.begin(t, wire.CommandWatchClock, wire.WatchClockArgs{MS: 100})
	return g
}

// entries reads the diary in the guest.
func (g *traveller) entries(ctx context.Context, t *testing.T) int {
	t.Helper()
	text, err := g.agent.GetFile(ctx, "/mnt/diary")
	must(t, "read the diary", err)
	return bytes.Count(text, []byte("\n"))
}

// write waits until the diary has so many entries.
func (g *traveller) write(ctx context.Context, t *testing.T, entries int) {
	t.Helper()
	for g.entries(ctx, t) < entries {
		must(t, "sleep", g.agent.Do(ctx, wire.CommandSleep, wire.SleepArgs{MS: 200}, nil))
	}
}

// processes tells of init and of the diary's processes what each is, whose child,
// and when it was started.
func (g *traveller) processes(ctx context.Context, t *testing.T) []string {
	t.Helper()
	pids, err := g.agent.GetFile(ctx, "/tmp/pids")
	must(t, "list processes", err)
	var all []string
	for _, pid := range append([]string{"1"}, strings.Fields(string(pids))...) {
		stat, err := g.agent.GetFile(ctx, "/proc/"+pid+"/stat")
		must(t, "process "+pid, err)
		// proc(5): the name in brackets may hold anything.
		at := strings.LastIndex(string(stat), ") ")
		fields := strings.Fields(string(stat[at+1:]))
		const ppid, started = 1, 19
		all = append(all, fmt.Sprintf("%s of %s, started at %s", stat[:at+1], fields[ppid], fields[started]))
	}
	return all
}

// hop saves the guest, ends its process, and goes on in another. What must not
// be lost to the host's TCP while the file is written stands still.
func (g *traveller) hop(ctx context.Context, t *testing.T, file, clock string, kill bool) {
	t.Helper()
	const away = 2 * time.Second
	host := listenEchoes(t, "unix", g.vsockPath+"_5000", false)
	mute := listenEchoes(t, "unix", g.vsockPath+"_5001", true)
	gone := map[string]*talk{
		"conversation":     g.converse(ctx, t, "vsock", "2:5000", 3),
		"wait for an echo": g.talk(ctx, t, wire.CommandEchoTest, wire.EchoTestArgs{Network: "vsock", Address: "2:5001", Seed: 4, Size: 100}),
	}
	host.wait(ctx, t, gone["conversation"], 2*wire.ConversePiece)
	mute.wait(ctx, t, gone["wait for an echo"], 100)
	g.host.wait(ctx, t, g.outer, 2*wire.ConversePiece)
	g.write(ctx, t, 2)
	processes := g.processes(ctx, t)
	if len(processes) != 4 { // init, and three of the diary
		t.Errorf("the guest's processes: %q", processes)
	}
	entries := g.entries(ctx, t)
	timer := g.begin(t, wire.CommandSleep, wire.SleepArgs{MS: 2500})
	hostStart := time.Now()
	before, err := g.agent.Clocks(ctx)
	must(t, "clocks", err)

	g.do(ctx, t, "stop", nil, nil)
	command(ctx, t, "checkpoint", g.name, "--to", file)
	if kill {
		must(t, "kill", g.Process.Kill())
	} else {
		g.do(ctx, t, "quit", nil, nil)
	}
	<-g.stopped
	must(t, "close the host's end", errors.Join(host.Close(), mute.Close()))
	overTap := g.host.bytes.Load()
	time.Sleep(away) // what must not pass in the guest, or must at once
	var rw io.ReadWriter
	g.process, rw = launchCommand(t, "restore", file, "--clock", clock)
	g.serial.plug(rw)
	g.connect(ctx, t)

	after, err := g.agent.Clocks(ctx)
	must(t, "clocks after the restore", err)
	hostPassed := time.Since(hostStart)
	for name, d := range map[string]int64{
		"monotonic": after.Monotonic - before.Monotonic,
		"boot time": after.Boottime - before.Boottime,
		"real time": after.Realtime - before.Realtime,
	} {
		passed := time.Duration(d)
		t.Logf("--clock %s: %s went on by %v of %v (%s)", clock, name, passed, hostPassed, after.Source)
		if passed <= 0 || passed > hostPassed || clock == "host" && passed < away || clock == "guest" && passed > hostPassed-away {
			t.Errorf("--clock %s: %s went on by %v of %v, of which %v was away", clock, name, passed, hostPassed, away)
		}
	}
	must(t, "timer", timer.Wait(ctx, nil))

	// The host's end of a vsock connection was the process's: the guest is told.
	for name, k := range gone {
		if <-k.ended; !errors.Is(k.err, guest.ErrAgent) || !strings.Contains(k.err.Error(), "after ") {
			t.Errorf("a %s over vsock with a process that ended: %v", name, k.err)
		} else {
			t.Logf("a %s over vsock: %v", name, k.err)
		}
	}
	again := listenEchoes(t, "unix", g.vsockPath+"_5000", false)
	sum, err := g.agent.EchoTest(ctx, wire.EchoTestArgs{Network: "vsock", Address: "2:5000", Seed: 5, Size: 16 << 10})
	must(t, "a new vsock connection", err)
	if want := wire.PatternSum(5, 16<<10); sum != want {
		t.Errorf("the host's echo over vsock: %+v, want %+v", sum, want)
	}
	must(t, "close the host's end", again.Close())

	g.host.wait(ctx, t, g.outer, overTap+3*wire.ConversePiece)
	g.write(ctx, t, entries+3)
	if now := g.processes(ctx, t); !slices.Equal(now, processes) {
		t.Errorf("the guest's processes were\n%q\nand are\n%q", processes, now)
	}
}

// arrive ends what the guest was in the middle of.
func (g *traveller) arrive(ctx context.Context, t *testing.T) {
	t.Helper()
	for name, k := range map[string]*talk{"within the guest": g.inner, "with the host over a tap device": g.outer} {
		must(t, "end a connection "+name, k.call.Cancel(ctx))
		<-k.ended
		must(t, "a connection "+name, k.err)
		t.Logf("a TCP connection %s: %+v", name, k.said)
		if k.said.Wrong != 0 || k.said.Rounds == 0 {
			t.Errorf("a TCP connection %s: %+v", name, k.said)
		}
	}
	var watched wire.WatchClockResult
	must(t, "end the clock's watch", g.clock.Cancel(ctx))
	must(t, "the clock's watch", g.clock.Wait(ctx, &watched))
	t.Logf("the monotonic clock: %+v", watched)
	if watched.Back != 0 || watched.Early != 0 || watched.Samples == 0 || watched.Naps == 0 {
		t.Errorf("the monotonic clock: %+v", watched)
	}
	must(t, "stop the diary", g.agent.PutFile(ctx, "/tmp/stop", nil, 0))
	var wrote wire.ExecResult
	must(t, "the diary", g.diary.Wait(ctx, &wrote))
	if wrote.Status != 0 || wrote.Stderr != "" {
		t.Errorf("the diary: %+v", wrote)
	}
	_, err := g.agent.Run(ctx, "sync", "/mnt/diary")
	must(t, "fsync", err)
	must(t, "unmount", g.agent.Unmount(ctx, "/mnt"))
	must(t, "power off", g.agent.PowerOff(ctx))
	if status := g.status(ctx, t); status != 0 {
		t.Errorf("status %d", status)
	}
}

// checkDiary reads, on the host, what the guest wrote to its disk.
func checkDiary(ctx context.Context, t *testing.T, disk, raw string) {
	t.Helper()
	if out := qemuImg(ctx, t, "check", disk); !strings.Contains(out, "No errors were found") {
		t.Errorf("%s: %s", disk, out)
	}
	qemuImg(ctx, t, "convert", "-O", "raw", disk, raw)
	if out, err := exec.CommandContext(ctx, "e2fsck", "-f", "-n", raw).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
	text, err := exec.CommandContext(ctx, "debugfs", "-R", "cat /diary", raw).Output()
	if err != nil {
		t.Fatalf("debugfs: %v", err)
	}
	n, last := 0, 0.0
	for line := range strings.Lines(string(text)) {
		n++
		number, uptime, _ := strings.Cut(strings.TrimSpace(line), " ")
		up, err := strconv.ParseFloat(uptime, 64)
		if err != nil || number != fmt.Sprint(n) || up < last {
			t.Fatalf("entry %d of the diary, after %v s, is %q (%v)", n, last, line, err)
		}
		last = up
	}
	t.Logf("%d entries in the diary", n)
	if n < 5 { // each journey has two before it and three after it
		t.Errorf("only %d entries in the diary", n)
	}
}
