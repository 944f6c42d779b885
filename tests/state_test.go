package tests

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/raw"
	"github.com/gnomon-vmm/gnomon/mm/guestmem"
	"github.com/gnomon-vmm/gnomon/tests/guest"
	"github.com/gnomon-vmm/gnomon/tests/guest/wire"
	"github.com/gnomon-vmm/gnomon/vmm"
	"github.com/gnomon-vmm/gnomon/vmm/boot"
	"github.com/gnomon-vmm/gnomon/vmm/chardev"
	"github.com/gnomon-vmm/gnomon/vmm/netdev"
	"github.com/gnomon-vmm/gnomon/vmm/vsockhost"
)

// cable is a serial port's host end that is plugged from machine to machine.
type cable struct {
	out *io.PipeReader
	in  *io.PipeWriter // what the guest prints

	front chan chardev.Frontend // of the machine that runs; empty while a write uses it
}

func newCable() *cable {
	out, in := io.Pipe()
	return &cable{out: out, in: in, front: make(chan chardev.Frontend, 1)}
}

// unplug has what is written wait for the next machine.
func (c *cable) unplug() { <-c.front }

// Read and Write are the test's side.
func (c *cable) Read(p []byte) (int, error) { return c.out.Read(p) }

func (c *cable) Write(p []byte) (int, error) {
	front := <-c.front
	front.Input(p)
	c.front <- front
	return len(p), nil
}

// plug is one machine's end of a cable.
type plug struct{ *cable }

func (p plug) Write(b []byte) (int, error) { return p.in.Write(b) }
func (p plug) Info() chardev.Info          { return chardev.Info{Label: "serial0"} }
func (p plug) Close() error                { return nil }

func (p plug) Connect(f chardev.Frontend) { p.front <- f }

// lent is a disk that outlives the machine it is attached to.
type lent struct{ block.Node }

func (lent) Close() error { return nil }

// moving is a Linux guest that is moved from one machine to the next.
type moving struct {
	*vmm.Machine
	cable *cable
	disk  block.Node
	vsock string // path of the host's side
	ended chan error
	exit  vmm.Exit // valid once ended has been read
}

// power makes and runs the machine that change describes.
func (g *moving) power(t *testing.T, vsock string, change func(*vmm.Config)) {
	t.Helper()
	network, err := netdev.NewUser(netdev.UserConfig{})
	if err != nil {
		t.Fatal(err)
	}
	host, err := vsockhost.Listen(vsock)
	if err != nil {
		t.Fatal(err)
	}
	cfg := vmm.Config{
		Disks:  []vmm.Disk{{Node: lent{g.disk}}},
		Nets:   []vmm.Net{{Backend: network}},
		Vsock:  &vmm.Vsock{CID: 3, Host: host},
		Serial: plug{g.cable},
		Log:    t.Logf,
	}
	change(&cfg)
	m, err := vmm.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if g.Machine != nil {
		g.cable.unplug()
		if err := g.Close(); err != nil {
			t.Fatal(err)
		}
		<-g.ended
	}
	g.Machine, g.vsock, g.ended = m, vsock, make(chan error, 1)
	go func() {
		var err error
		g.exit, err = m.Run(context.Background())
		g.ended <- err
	}()
}

// move has the guest, which is paused, go on in another machine.
func (g *moving) move(t *testing.T, vsock string, restore vmm.Restore) {
	t.Helper()
	var err error
	if restore.Sections, err = g.SaveState(); err != nil {
		t.Fatal(err)
	}
	from := g.Memory()
	restore.Prepare = func(to *guestmem.Memory) error {
		for i, r := range from.Regions() {
			copy(to.Regions()[i].Bytes(), r.Bytes())
		}
		return nil
	}
	g.power(t, vsock, func(c *vmm.Config) { c.Restore = &restore })
}

// A Linux guest with timers, files, memory and connections in use goes on in a
// second and a third machine.
func TestStateOfLinux(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	dir := t.TempDir()
	node, err := raw.Open(image(t, filepath.Join(dir, "disk.img"), 16<<20), false)
	if err != nil {
		t.Fatal(err)
	}
	defer node.Close()
	kit := guest.Linux(t)
	kernel, err := boot.OpenKernel(kit.Kernel)
	if err != nil {
		t.Fatal(err)
	}
	initrd, err := os.Open(kit.Initrd)
	if err != nil {
		t.Fatal(err)
	}
	defer initrd.Close()
	size, err := initrd.Seek(0, io.SeekEnd)
	if err != nil {
		t.Fatal(err)
	}

	g := &moving{cable: newCable(), disk: node}
	g.power(t, filepath.Join(dir, "vsock1"), func(c *vmm.Config) {
		c.CPUs, c.Memory = 2, 128<<20
		c.Kernel, c.Cmdline, c.Initrd, c.InitrdSize = kernel, kit.Cmdline, initrd, size
	})
	defer func() { g.Close() }()
	var console output
	agent := guest.NewAgent(g.cable, &console)
	defer func() {
		if t.Failed() {
			t.Logf("the guest's console:\n%s", &console)
		}
	}()
	if err := agent.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	step := func(name string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	start := func(command wire.Command, args any) *guest.Call {
		t.Helper()
		call, err := agent.Start(command, args)
		step(string(command), err)
		return call
	}

	const heap = 1 << 20
	_, err = agent.DHCP(ctx, "eth0")
	step("DHCP", err)
	_, err = agent.Fill(ctx, "heap", 5, heap)
	step("fill memory", err)
	churn := start(wire.CommandChurn, wire.ChurnArgs{Path: "/dev/vda", Seed: 4, Blocks: 512, Direct: true, MS: 3600_000})
	sleep := start(wire.CommandSleep, wire.SleepArgs{MS: 5000})

	// A connection to a host that answers nothing.
	reached := make(chan struct{})
	silent, err := net.Listen("unix", filepath.Join(dir, "vsock1_5000"))
	step("listen", err)
	defer silent.Close()
	go func() {
		conn, err := silent.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		if _, err := io.CopyN(io.Discard, conn, 100); err == nil {
			close(reached)
		}
		_, _ = io.Copy(io.Discard, conn)
	}()
	held := start(wire.CommandEchoTest, wire.EchoTestArgs{Network: "vsock", Address: "2:5000", Seed: 1, Size: 100})
	select {
	case <-reached:
	case <-ctx.Done():
		t.Fatal(ctx.Err())
	}

	// Once its clocks stand still meanwhile, once they jump.
	const away = 2 * time.Second
	for i, goesOn := range []bool{false, true} {
		hostStart := time.Now()
		before, err := agent.Clocks(ctx)
		step("clocks", err)
		step("pause", g.Pause())
		writes := g.Disks()[0].Device.Stats().Write.Ops
		time.Sleep(away) // what must not pass in the guest, or must at once
		g.move(t, filepath.Join(dir, "vsock"+string(rune('2'+i))), vmm.Restore{ClockGoesOn: goesOn})
		after, err := agent.Clocks(ctx)
		step("clocks after the move", err)
		host := time.Since(hostStart)
		for name, d := range map[string]int64{
			"monotonic": after.Monotonic - before.Monotonic,
			"real time": after.Realtime - before.Realtime,
		} {
			passed := time.Duration(d)
			t.Logf("ClockGoesOn %v: %s went on by %v of %v (%s)", goesOn, name, passed, host, after.Source)
			if passed <= 0 || passed > host || goesOn && passed < away || !goesOn && passed > host-away {
				t.Errorf("ClockGoesOn %v: %s went on by %v of %v, of which %v was a pause", goesOn, name, passed, host, away)
			}
		}
		if writes == 0 {
			t.Error("the guest did not use its disk")
		}
	}

	step("timer", sleep.Wait(ctx, nil))
	// The guest waited for an answer, and no timeout ended that.
	if err := held.Wait(ctx, nil); !errors.Is(err, guest.ErrAgent) {
		t.Errorf("a vsock connection to the first machine's host: %v", err)
	} else {
		t.Logf("the vsock connection: %v", err)
	}
	for n := g.Disks()[0].Device.Stats(); g.Disks()[0].Device.Stats() == n; {
		time.Sleep(10 * time.Millisecond) // until the guest uses the disk of its new machine
	}
	var churned wire.ChurnResult
	step("end the churn", churn.Cancel(ctx))
	step("churn", churn.Wait(ctx, &churned))
	if churned.Wrong != 0 || churned.Reads == 0 {
		t.Errorf("churn: %+v", churned)
	}
	sum, err := agent.Verify(ctx, "heap")
	step("verify memory", err)
	if want := wire.PatternSum(5, heap); sum != want {
		t.Errorf("memory is %+v, want %+v", sum, want)
	}
	burn, err := agent.Burn(ctx, 2, 300)
	step("both CPUs", err)
	if len(burn.Turns) != 2 || burn.Turns[0] == 0 || burn.Turns[1] == 0 {
		t.Errorf("turns %v", burn.Turns)
	}

	// The network and new connections work without further ado.
	m := &linux{agent: agent, bytes: 16 << 10}
	m.web = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		p := make([]byte, m.bytes)
		wire.Pattern(p, 7, 0)
		w.Write(p)
	})
	m.fetch(ctx, t, "127.0.0.1:0", "http://10.0.2.2:%d/")
	l, err := net.Listen("unix", g.vsock+"_5000")
	step("listen again", err)
	defer l.Close()
	go func() {
		conn, err := l.Accept()
		if err == nil {
			io.Copy(conn, conn)
			conn.Close()
		}
	}()
	sum, err = agent.EchoTest(ctx, wire.EchoTestArgs{Network: "vsock", Address: "2:5000", Seed: 5, Size: 16 << 10})
	step("vsock", err)
	if want := wire.PatternSum(5, 16<<10); sum != want {
		t.Errorf("the host's echo: %+v, want %+v", sum, want)
	}

	step("power off", agent.PowerOff(ctx))
	if err := <-g.ended; err != nil || g.exit != vmm.ExitPowerOff {
		t.Errorf("exit %q: %v", g.exit, err)
	}
	g.ended <- nil
}
