package monitor_test

import (
	"encoding/binary"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/qmp"
	"github.com/gnomon-vmm/gnomon/vmm"
	"github.com/gnomon-vmm/gnomon/vmm/device"
	"github.com/gnomon-vmm/gnomon/vmm/virtio"
)

var errNothing = virtio.ErrAgain

// everything is a machine with a device of each kind.
func everything(t *testing.T, cmdline string) *ours {
	t.Helper()
	return start(t, cmdline, func(c *vmm.Config) {
		c.CPUs = 2
		c.Disks = []vmm.Disk{{Node: openImage(t, 1<<20)}}
		c.Nets = []vmm.Net{{Backend: cable{}}}
	})
}

// queryArguments are what queries need.
var queryArguments = map[string]map[string]any{"query-stats": {"target": "vcpu"}}

// promised are the commands that there must be.
const promised = `
	query-status stop cont system_powerdown system_reset quit query-version query-name query-uuid query-kvm
	query-cpus-fast query-cpus query-memory-size-summary query-pci query-block query-blockstats
	query-named-block-nodes query-block-jobs query-chardev query-iothreads query-balloon balloon set_link query-jobs
	job-cancel query-events query-stats query-stats-schemas inject-nmi memsave pmemsave dump-guest-memory query-dump
	query-dump-guest-memory-capability query-machines query-target query-current-machine query-hotpluggable-cpus`

func TestEveryQueryAnswers(t *testing.T) {
	o := everything(t, "spin")
	names, err := o.Commands(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range strings.Fields(promised) {
		if !slices.Contains(names, name) {
			t.Errorf("there is no %s", name)
		}
	}
	for _, name := range names {
		if strings.HasPrefix(name, "query-") {
			o.do(t, name, queryArguments[name], nil)
		}
	}
	o.do(t, "quit", nil, nil)
	<-o.done
	if o.exit != vmm.ExitQuit {
		t.Errorf("exit %q", o.exit)
	}
}

// What is left of a machine that has ended still answers.
func TestEndedMachine(t *testing.T) {
	o := start(t, "boot", func(c *vmm.Config) { c.Paused = true })
	if s := o.status(t); s != "prelaunch" {
		t.Errorf("status %q", s)
	}
	o.do(t, "stop", nil, nil)
	if s := o.status(t); s != "prelaunch" {
		t.Errorf("status %q after stop", s)
	}
	o.do(t, "cont", nil, nil)
	want := []happening{{"RESUME", nil}, {"SHUTDOWN", map[string]any{"guest": true, "reason": "guest-shutdown"}}}
	if d := cmp.Diff(want, o.rest(t)); d != "" {
		t.Errorf("events -want +got\n%s", d)
	}
}

// The same commands cause the same events, in the same order, as with QEMU.
func TestEventsLikeQEMU(t *testing.T) {
	for _, test := range []struct {
		name, guest string
		steps       []string // a command, or an event to wait for
	}{
		{"commands", "spin", []string{
			"cont", "RESUME", "stop", "STOP", "stop", "cont", "RESUME", "cont", "system_reset", "RESET",
			"system_powerdown", "POWERDOWN", "stop", "STOP", "quit",
		}},
		{"power-off", "boot", []string{"cont"}},
		{"panic", "out count=2 port=0x505", []string{"cont"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			var got [2][]happening
			for i, p := range []peer{
				startQEMU(t, "q35", test.guest, "-device", "pvpanic"),
				start(t, test.guest, func(c *vmm.Config) { c.Paused = true }).peer,
			} {
				for _, step := range test.steps {
					if strings.ToUpper(step) != step {
						p.do(t, step, nil, nil)
						continue
					}
					e := p.event(t, step)
					got[i] = append(got[i], happening{e.Event, e.Data})
				}
				got[i] = append(got[i], p.rest(t)...)
			}
			if d := cmp.Diff(got[0], got[1]); d != "" {
				t.Errorf("events -QEMU +ours\n%s", d)
			}
		})
	}
}

func TestCrashLoaded(t *testing.T) {
	o := start(t, "spin", nil)
	o.m.Panicked(device.GuestCrashLoaded)
	if e := o.event(t, "GUEST_CRASHLOADED"); !cmp.Equal(e.Data, map[string]any{"action": "run"}) {
		t.Errorf("data %v", e.Data)
	}
	if s := o.status(t); s != "running" {
		t.Errorf("status %q", s)
	}
}

func TestBalloon(t *testing.T) {
	const ram = 64 << 20
	o := start(t, "spin", nil)
	for _, c := range []struct{ value, target uint64 }{{48 << 20, 48 << 20}, {1 << 40, ram}, {1, 4096}} {
		o.do(t, "balloon", map[string]any{"value": c.value}, nil)
		if got := o.m.Balloon().Target(); got > c.target || got+4096 <= c.target {
			t.Errorf("balloon %d: the target is %d", c.value, got)
		}
	}
	for _, bad := range []int{0, -1} {
		want := qmp.Error{Class: qmp.GenericError, Desc: "Parameter 'target' expects a size"}
		if got := o.refuse(t, "balloon", map[string]any{"value": bad}); got != want {
			t.Errorf("balloon %d: %+v", bad, got)
		}
	}
	// What the driver would do: of three changes at once the first and, a
	// second later, the last are told.
	for _, pages := range []uint32{1, 2, 3} {
		o.m.Balloon().WriteConfig(4, binary.LittleEndian.AppendUint32(nil, pages))
	}
	for _, pages := range []float64{1, 3} {
		if e := o.event(t, "BALLOON_CHANGE"); e.Data["actual"] != ram-4096*pages {
			t.Errorf("data %v, want %d pages less than %d", e.Data, int(pages), ram)
		}
	}
	var info struct{ Actual uint64 }
	if o.do(t, "query-balloon", nil, &info); info.Actual != ram-3*4096 {
		t.Errorf("query-balloon: %d", info.Actual)
	}
}

func TestNoBalloon(t *testing.T) {
	o := start(t, "spin", func(c *vmm.Config) { c.NoBalloon = true })
	want := qmp.Error{Class: qmp.DeviceNotActive, Desc: "No balloon device has been activated"}
	if got := o.refuse(t, "query-balloon", nil); got != want {
		t.Errorf("%+v", got)
	}
	if got := o.refuse(t, "balloon", map[string]any{"value": 1}); got != want {
		t.Errorf("%+v", got)
	}
}

func TestSetLink(t *testing.T) {
	o := everything(t, "spin")
	nic := o.m.Nets()[0].Device
	for _, up := range []bool{false, false, true} {
		o.do(t, "set_link", map[string]any{"name": "net0", "up": up}, nil)
		if nic.LinkUp() != up {
			t.Errorf("set_link %v had no effect", up)
		}
	}
	want := qmp.Error{Class: qmp.DeviceNotFound, Desc: "Device 'net1' not found"}
	if got := o.refuse(t, "set_link", map[string]any{"name": "net1", "up": false}); got != want {
		t.Errorf("%+v", got)
	}
}

func TestInjectNMI(t *testing.T) {
	o := start(t, "spin", nil)
	o.do(t, "inject-nmi", nil, nil)
	// The probe has a gate for it, or dies of it: it is the machine that must live on.
	if s := o.status(t); s != "running" && s != "shutdown" {
		t.Errorf("status %q", s)
	}
}

func TestStats(t *testing.T) {
	o := everything(t, "boot wait for=go")
	o.serial.waitFor(t, "for=go")
	type result struct {
		QOMPath string `json:"qom-path"`
		Stats   []struct {
			Name  string
			Value any
		}
	}
	var all, one []result
	o.do(t, "query-stats", map[string]any{"target": "vcpu"}, &all)
	if len(all) != 2 || len(all[0].Stats) < 10 {
		t.Fatalf("%d vCPUs: %+v", len(all), all)
	}
	o.do(t, "query-stats", map[string]any{
		"target": "vcpu", "vcpus": []string{all[0].QOMPath},
		"providers": []any{map[string]any{"provider": "kvm", "names": []string{"exits", "guest_mode"}}},
	}, &one)
	if len(one) != 1 || one[0].QOMPath != all[0].QOMPath || len(one[0].Stats) != 2 {
		t.Fatalf("filtered: %+v", one)
	}
	for _, s := range one[0].Stats {
		switch v := s.Value.(type) {
		case float64:
			if s.Name != "exits" || v == 0 {
				t.Errorf("%+v", s)
			}
		case bool:
			if s.Name != "guest_mode" {
				t.Errorf("%+v", s)
			}
		default:
			t.Errorf("%+v", s)
		}
	}
	for _, none := range []map[string]any{
		{"target": "vcpu", "vcpus": []string{"/nope"}},
		{"target": "vm", "providers": []any{}},
		{"target": "vm", "providers": []any{map[string]any{"provider": "kvm", "names": []string{"nope"}}}},
	} {
		one = nil
		if o.do(t, "query-stats", none, &one); len(one) != 0 {
			t.Errorf("%v: %+v", none, one)
		}
	}
}

// blockCounts are what query-blockstats counts.
type blockCounts struct {
	Stats struct {
		ReadOps    uint64 `json:"rd_operations"`
		WriteOps   uint64 `json:"wr_operations"`
		FlushOps   uint64 `json:"flush_operations"`
		UnmapOps   uint64 `json:"unmap_operations"`
		ReadBytes  uint64 `json:"rd_bytes"`
		WriteBytes uint64 `json:"wr_bytes"`
		UnmapBytes uint64 `json:"unmap_bytes"`
	}
}

// The counts are the guest's own, and QEMU's.
func TestBlockStatsLikeQEMU(t *testing.T) {
	const guest = "blk op=seqwrite bs=8k count=37 blk op=randread bs=4k qd=4 count=53 blk op=flush blk op=discard off=64k total=64k blk op=zero total=32k wait for=go"
	path := image(t, 16<<20)
	qemu := startQEMU(t, "q35", guest,
		"-drive", "file="+path+",format=raw,if=none,id=disk0,discard=unmap", "-device", "virtio-blk-pci,drive=disk0")
	qemu.do(t, "cont", nil, nil)
	o := start(t, guest, func(c *vmm.Config) { c.Disks = []vmm.Disk{{Node: openImage(t, 16<<20)}} })
	var got [2][]blockCounts
	for i, p := range []peer{qemu, o.peer} {
		results := p.serial.waitFor(t, "for=go")
		p.do(t, "query-blockstats", nil, &got[i])
		if len(got[i]) != 1 {
			t.Fatalf("%d disks", len(got[i]))
		}
		writes, _ := results.Find("blk", 0)
		reads, _ := results.Find("blk", 1)
		w, err := writes.Number("ios")
		if err != nil {
			t.Fatal(err)
		}
		r, err := reads.Number("ios")
		if err != nil {
			t.Fatal(err)
		}
		s := got[i][0].Stats
		if s.ReadOps != r || s.ReadBytes != r*4096 || s.WriteOps < w || s.FlushOps == 0 {
			t.Errorf("the guest read %d and wrote %d times: %+v", r, w, s)
		}
	}
	// QEMU's virtio-blk leaves discards out of account.
	stats := &got[1][0].Stats
	if stats.UnmapOps != 1 || stats.UnmapBytes != 64<<10 {
		t.Errorf("a discard of 64 KiB: %+v", stats)
	}
	stats.UnmapOps, stats.UnmapBytes = 0, 0
	if d := cmp.Diff(got[0], got[1]); d != "" {
		t.Errorf("-QEMU +ours\n%s", d)
	}
}

// full is a disk that has no room.
type full struct{ block.Node }

func (full) Writev([][]byte, int64) error { return syscall.ENOSPC }

func TestBlockIOError(t *testing.T) {
	o := start(t, "blk op=seqwrite bs=4k count=1 spin", func(c *vmm.Config) {
		c.Disks = []vmm.Disk{{ID: "root", Node: full{openImage(t, 1<<20)}}}
	})
	want := map[string]any{
		"device": "root", "node-name": "#root", "operation": "write", "action": "report", "nospace": true,
		"reason": "no space left on device",
	}
	if e := o.event(t, "BLOCK_IO_ERROR"); !cmp.Equal(e.Data, want) {
		t.Errorf("data %v", e.Data)
	}
}

func TestDeviceBroken(t *testing.T) {
	o := start(t, "blk evil=loop spin", func(c *vmm.Config) { c.Disks = []vmm.Disk{{Node: openImage(t, 1<<20)}} })
	e := o.event(t, "__ORG.GNOMON_DEVICE_BROKEN")
	if e.Data["device"] != "disk0" || e.Data["error"] == "" {
		t.Errorf("data %v", e.Data)
	}
	if s := o.status(t); s != "running" {
		t.Errorf("status %q", s)
	}
}

// counter is what the probe's spin counts.
func (o *ours) counter(t *testing.T) uint64 {
	t.Helper()
	var p [8]byte
	if err := o.m.Memory().Read(mailboxCounter, p[:]); err != nil {
		t.Fatal(err)
	}
	return binary.LittleEndian.Uint64(p[:])
}

func (o *ours) waitCounting(t *testing.T, from uint64) {
	t.Helper()
	for o.counter(t) == from {
		runtime.Gosched()
	}
}

func TestCPUs(t *testing.T) {
	o := everything(t, "spin")
	o.waitCounting(t, 0)
	var cpus []struct {
		CPU      int
		Current  bool
		Halted   bool
		PC       uint64
		ThreadID int `json:"thread_id"`
	}
	o.do(t, "query-cpus", nil, &cpus)
	if len(cpus) != 2 || !cpus[0].Current || cpus[0].Halted || !cpus[1].Halted || cpus[1].PC != 0xFFFF_FFF0 {
		t.Errorf("%+v: vCPU 0 spins, vCPU 1 was never started", cpus)
	}
	var fast []struct {
		ThreadID int `json:"thread-id"`
	}
	o.do(t, "query-cpus-fast", nil, &fast)
	if len(fast) != 2 || fast[0].ThreadID == 0 || fast[0].ThreadID != cpus[0].ThreadID || fast[0] == fast[1] {
		t.Errorf("%+v beside %+v", fast, cpus)
	}
}

func TestPCINames(t *testing.T) {
	o := everything(t, "spin")
	var buses []struct {
		Devices []struct {
			ID   struct{ Device, Vendor int }
			Qdev string `json:"qdev_id"`
		}
	}
	o.do(t, "query-pci", nil, &buses)
	got := map[string]int{}
	for _, d := range buses[0].Devices {
		got[d.Qdev] = d.ID.Device
	}
	want := map[string]int{"": 0x29C0, "disk0": 0x1042, "net0": 0x1041, "rng0": 0x1044, "balloon0": 0x1045}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("device ids by name -want +got\n%s", d)
	}
}

func TestBackingFiles(t *testing.T) {
	node := backed{openImage(t, 1<<20)}
	o := start(t, "spin", func(c *vmm.Config) { c.Disks = []vmm.Disk{{Node: node}} })
	type nodeInfo struct {
		NodeName string `json:"node-name"`
		File     string
		Backing  string `json:"backing_file"`
		Depth    int    `json:"backing_file_depth"`
		Image    struct {
			BackingImage *struct {
				Filename string
			} `json:"backing-image"`
		}
	}
	for _, flat := range []bool{false, true} {
		var nodes []nodeInfo
		o.do(t, "query-named-block-nodes", map[string]any{"flat": flat}, &nodes)
		names := []string{}
		for _, n := range nodes {
			names = append(names, n.NodeName)
		}
		if !slices.Equal(names, []string{"#disk0", "#disk0-backing1"}) {
			t.Fatalf("nodes %v", names)
		}
		n := nodes[0]
		if n.File != "top" || n.Backing != "base" || n.Depth != 1 || (n.Image.BackingImage == nil) != flat {
			t.Errorf("flat=%v: %+v", flat, n)
		}
	}
}

// backed is a disk with a backing file.
type backed struct{ block.Node }

func (b backed) Info() block.Info {
	return block.Info{
		Format: "qcow2", Filename: "top", VirtualSize: b.Size(), ClusterSize: 65536,
		Backing: &block.Info{Format: "raw", Filename: "base", VirtualSize: b.Size()},
	}
}
