package tests

import (
	"context"
	"encoding/binary"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk"
	"github.com/gnomon-vmm/gnomon/mm/pager"
	"github.com/gnomon-vmm/gnomon/tests/guest/probe"
	"github.com/gnomon-vmm/gnomon/vmm"
	"github.com/gnomon-vmm/gnomon/vmm/boot"
	"github.com/gnomon-vmm/gnomon/vmm/chardev"
	"github.com/gnomon-vmm/gnomon/vmm/snapshot"
	"github.com/gnomon-vmm/gnomon/vmm/virtio"
)

// keptBack is how many frames a mirror keeps: they are under way at every instant.
const keptBack = 3

// mirror is the other end of a guest's network: it sends every frame back, in
// order, the last ones late. What waits in it when the machine stops belongs to
// that instant.
type mirror struct {
	moved chan struct{} // capacity 1: another frame has come

	mu       sync.Mutex
	waiting  [][]byte // guarded by mu
	frames   int      // that have come; guarded by mu
	keep     int      // how many frames wait for more to come; guarded by mu
	readable func()   // nil: not started; guarded by mu
}

func newMirror(waiting [][]byte) *mirror {
	return &mirror{moved: make(chan struct{}, 1), waiting: waiting, keep: keptBack}
}

func (m *mirror) Offloads() uint64 { return 0 }
func (m *mirror) Describe() string { return "mirror" }
func (m *mirror) Close() error     { return nil }

func (m *mirror) Start(_ uint64, readable, _ func()) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.readable = readable
	return nil
}

func (m *mirror) Stop() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.readable = nil
}

func (m *mirror) Send(pieces [][]byte) error {
	var frame []byte
	for _, p := range pieces {
		frame = append(frame, p...)
	}
	m.mu.Lock()
	m.waiting = append(m.waiting, frame) // as many as the guest has under way
	m.frames++
	readable := m.readable
	m.mu.Unlock()
	if readable != nil {
		readable()
	}
	select {
	case m.moved <- struct{}{}:
	default:
	}
	return nil
}

func (m *mirror) Receive(pieces [][]byte) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.waiting) <= m.keep {
		return 0, virtio.ErrAgain
	}
	frame := m.waiting[0]
	m.waiting = m.waiting[1:]
	size := len(frame)
	for _, p := range pieces {
		frame = frame[copy(p, frame):]
	}
	return size, nil
}

// flush has no frame wait any more.
func (m *mirror) flush() {
	m.mu.Lock()
	m.keep = 0
	readable := m.readable
	m.mu.Unlock()
	if readable != nil {
		readable()
	}
}

// printed is a serial port that outlives the machine it is attached to.
type printed struct{ *output }

func (printed) Connect(chardev.Frontend) {}
func (printed) Info() chardev.Info       { return chardev.Info{Label: "serial0"} }
func (printed) Close() error             { return nil }

// instant is what there was outside of a machine's memory when it stopped.
type instant struct {
	waiting  [][]byte
	frames   int
	requests int64  // served by the disk
	turns    uint64 // in the guest's mailbox, to be found there again
}

// loaded is a machine whose guest uses memory, disk and network.
type loaded struct {
	*vmm.Machine
	restored *snapshot.Machine // nil: its guest was booted
	mirror   *mirror
	disk     *virtio.Blk
	saver    *snapshot.Saver
	done     chan struct{}
	exit     vmm.Exit // after done
	err      error    // after done

	stopped instant // of the last pause
}

// describe describes the machine, but for where its guest comes from.
func (m *loaded) describe(t *testing.T, image string, serial printed, waiting [][]byte) vmm.Config {
	t.Helper()
	node, err := disk.Open(image, disk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	m.mirror, m.done = newMirror(waiting), make(chan struct{})
	return vmm.Config{
		Disks:  []vmm.Disk{{Node: node, Queues: 1}},
		Nets:   []vmm.Net{{Backend: m.mirror}},
		Serial: serial, Log: t.Logf,
	}
}

// made takes the machine that was made of the description.
func (m *loaded) made(t *testing.T, machine *vmm.Machine, loader *pager.Pager) {
	m.Machine, m.disk = machine, machine.Disks()[0].Device
	m.saver = snapshot.NewSaver(machine, nil, loader)
	m.Observe(func(e vmm.Event) {
		if _, ok := e.(vmm.Stopped); ok {
			m.stopped = m.now(t)
		}
	})
}

// bootLoaded makes a machine that boots the probe guest.
func bootLoaded(t *testing.T, cpus int, words, image string, serial printed) *loaded {
	t.Helper()
	elf, err := probe.Path()
	if err != nil {
		t.Fatal(err)
	}
	m := &loaded{}
	cfg := m.describe(t, image, serial, nil)
	if cfg.Kernel, err = boot.OpenKernel(elf); err != nil {
		t.Fatal(err)
	}
	cfg.CPUs, cfg.Memory, cfg.Cmdline = cpus, 32<<20, words
	machine, err := vmm.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	m.made(t, machine, nil)
	return m
}

// restoreLoaded makes a machine that goes on from the instant that image holds.
func restoreLoaded(t *testing.T, from *snapshot.Image, at instant, o snapshot.Options, image string, serial printed) *loaded {
	t.Helper()
	m := &loaded{}
	machine, err := from.Restore(m.describe(t, image, serial, at.waiting), o)
	if err != nil {
		t.Fatal(err)
	}
	m.restored = machine
	m.made(t, machine.Machine, machine.Pager)
	if got := m.now(t).turns; got != at.turns {
		t.Fatalf("the guest is there after %d turns, and was saved after %d", got, at.turns)
	}
	return m
}

func (m *loaded) start() {
	go func() {
		defer close(m.done)
		m.exit, m.err = m.Run(context.Background())
	}()
}

// end closes the machine, whatever its guest does.
func (m *loaded) end(t *testing.T) {
	t.Helper()
	end := m.Close
	if m.restored != nil {
		end = m.restored.Close
	}
	if err := end(); err != nil {
		t.Fatal(err)
	}
	<-m.done
}

func (m *loaded) now(t *testing.T) instant {
	t.Helper()
	var turns [8]byte
	if err := m.Memory().Read(probe.MailboxAddr+probe.MailboxCounter, turns[:]); err != nil {
		t.Error(err)
	}
	s := m.disk.Stats()
	m.mirror.mu.Lock()
	defer m.mirror.mu.Unlock()
	return instant{
		waiting: slices.Clone(m.mirror.waiting), frames: m.mirror.frames,
		requests: s.Read.Ops + s.Write.Ops + s.Flush.Ops, turns: binary.LittleEndian.Uint64(turns[:]),
	}
}

// use returns when the guest has gone on to use its memory, disk and network.
func (m *loaded) use(t *testing.T) {
	t.Helper()
	const most = 12
	from := m.now(t)
	for now := from; now.frames < from.frames+most || now.requests < from.requests+most || now.turns == from.turns; now = m.now(t) {
		select {
		case <-m.mirror.moved:
		case <-m.done:
			t.Fatalf("the machine ended: %s, %v", m.exit, m.err)
		}
	}
}

// saving is one way of saving a machine.
type saving struct {
	child  bool // of a checkpoint that was taken a little before
	paused bool // it is stopped before, and not resumed
	stop   bool // it stands still until the file is complete
	disks  snapshot.Disks
}

// The ways of saving and of restoring that rounds go through, one after another.
var (
	savings = []saving{
		{disks: snapshot.KeepDisks},
		{disks: snapshot.CopyDisks, child: true},
		{disks: snapshot.LeaveDisks, paused: true},
		{disks: snapshot.KeepDisks, child: true, stop: true},
		{disks: snapshot.CopyDisks},
		{disks: snapshot.LeaveDisks, paused: true, child: true},
		{disks: snapshot.CopyDisks, stop: true},
	}
	policies = []pager.Policy{pager.Locality, 0, pager.Physical, pager.Locality | pager.Recorded, pager.Recorded}
)

// save saves a machine that was used since it began, into path.
func (m *loaded) save(t *testing.T, path string, s saving) *snapshot.Report {
	t.Helper()
	m.use(t)
	o := snapshot.SaveOptions{Disks: s.disks, Stop: s.stop}
	if s.child {
		o.Parent = path + ".parent"
		if _, err := m.saver.Save(context.Background(), o.Parent, snapshot.SaveOptions{Disks: snapshot.LeaveDisks}); err != nil {
			t.Fatal(err)
		}
		m.use(t)
	}
	if s.paused {
		if err := m.Pause(); err != nil {
			t.Fatal(err)
		}
	}
	report, err := m.saver.Save(context.Background(), path, o)
	if err != nil {
		t.Fatal(err)
	}
	return report
}

// A guest that uses memory, disk and network all the while is moved from machine
// to machine by files, 200 times in all. Whatever it had written is there,
// and no request or frame is lost, or comes twice.
func TestRestoreRounds(t *testing.T) {
	const roundsEach = 50
	for _, c := range []struct {
		cpus   int
		format string
	}{{1, disk.FormatRaw}, {2, disk.FormatRaw}, {1, disk.FormatQcow2}, {2, disk.FormatQcow2}} {
		t.Run(fmt.Sprintf("%dvCPU-%s", c.cpus, c.format), func(t *testing.T) {
			testRestoreRounds(t, c.cpus, c.format, roundsEach)
		})
	}
}

func testRestoreRounds(t *testing.T, cpus int, format string, count int) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	dir := t.TempDir()
	serial := printed{&output{}}
	img := filepath.Join(dir, "disk."+format)
	qemuImg(ctx, t, "create", "-q", "-f", format, img, "2M")
	m := bootLoaded(t, cpus, "mix size=6M seed=7", img, serial)
	m.start()
	defer func() {
		m.end(t)
		if t.Failed() {
			t.Logf("the guest says:\n%s", serial)
		}
	}()

	frames, requests := 0, int64(0) // up to the instants at which the machines were saved
	faults, recorded, waited := uint64(0), 0, 0
	for i := range count {
		s, policy := savings[i%len(savings)], policies[i%len(policies)]
		path := filepath.Join(dir, fmt.Sprint("c", i))
		report := m.save(t, path, s)
		at := m.stopped
		frames, requests, waited = frames+at.frames, requests+at.requests, waited+len(at.waiting)
		if m.restored != nil {
			faults += m.restored.Pager.Stats().GuestFaults
		}
		m.end(t)
		image, err := snapshot.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer image.Close()
		o := snapshot.Options{Policy: policy, NoBackground: i%2 == 1, ClockGoesOn: i%3 == 1}

		switch s.disks {
		case snapshot.KeepDisks:
			img = filepath.Join(dir, fmt.Sprintf("disk%d.qcow2", i))
			if err := report.Disks[0].OverlayDisk(img); err != nil {
				t.Fatal(err)
			}
		case snapshot.CopyDisks:
			img = report.Disks[0].File
			if format == disk.FormatRaw {
				img = filepath.Join(dir, fmt.Sprintf("disk%d.raw", i))
				qemuImg(ctx, t, "convert", "-O", "raw", report.Disks[0].File, img)
			}
		}
		if policy&pager.Recorded != 0 {
			// One that is restored before leaves the checkpoint and its disk as they are.
			scratch := filepath.Join(dir, "scratch.qcow2")
			qemuImg(ctx, t, "create", "-q", "-f", "qcow2", "-b", img, "-F", strings.TrimPrefix(filepath.Ext(img), "."), scratch)
			first := restoreLoaded(t, image, at, o, scratch, printed{&output{}})
			first.start()
			first.use(t)
			if err := first.restored.SaveRecorded(); err != nil {
				t.Fatal(err)
			}
			first.end(t)
			recorded++
		}
		m = restoreLoaded(t, image, at, o, img, serial)
		m.start()
	}
	m.use(t)
	if err := m.Memory().Write(probe.MailboxAddr+probe.MailboxStop, binary.LittleEndian.AppendUint64(nil, 1)); err != nil {
		t.Fatal(err)
	}
	m.mirror.flush()
	<-m.done
	if m.err != nil || m.exit != vmm.ExitPowerOff {
		t.Fatalf("%s %v", m.exit, m.err)
	}
	last := m.now(t)
	results := probe.Parse(serial.String())
	if err := results.Err(); err != nil {
		t.Fatal(err)
	}
	found := func(of int, key string) int64 {
		t.Helper()
		line, err := results.Find("mix", of)
		if err != nil {
			t.Fatal(err)
		}
		n, err := line.Number(key)
		if err != nil {
			t.Fatal(err)
		}
		return int64(n)
	}
	const memory, block, net = 1, 2, 3 // lines of mix; the first tells that it begins
	for _, zero := range []struct {
		of  int
		key string
	}{{memory, "bad"}, {block, "failed"}, {block, "bad"}, {net, "lost"}, {net, "again"}, {net, "bad"}} {
		if n := found(zero.of, zero.key); n != 0 {
			t.Errorf("mix %d: %s=%d", zero.of, zero.key, n)
		}
	}
	// The guest's count is the host's.
	if got, want := found(block, "writes")+found(block, "reads")+found(block, "flushes"), requests+last.requests; got != want {
		t.Errorf("the guest made %d requests of its disk, and %d were served", got, want)
	}
	if got, want := found(net, "sent"), int64(frames+last.frames); got != want || found(net, "received") != want {
		t.Errorf("the guest sent %d frames and received %d, and %d came to the other end", got, found(net, "received"), want)
	}
	if waited < count*keptBack {
		t.Errorf("only %d frames were away when machines stopped", waited)
	}
	if faults == 0 {
		t.Error("the guests never wanted a page that was not there yet")
	}
	t.Logf("%d pages written, %d requests, %d frames, of which %d were away when a machine stopped; %d faults; %d restored twice",
		found(memory, "writes"), requests+last.requests, frames+last.frames, waited, faults, recorded)
}
