package monitor_test

import (
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/vmm"
)

func limits(more m) m {
	all := m{"device": "disk0", "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0}
	for k, v := range more {
		all[k] = v
	}
	return all
}

type blockCountsOf struct {
	Writes int64 `json:"wr_operations"`
}

// A guest that may do next to nothing can be paused, and goes on when it may do more.
func TestThrottle(t *testing.T) {
	o := start(t, "blk op=seqwrite bs=4k count=200 wait for=go", func(c *vmm.Config) {
		c.Disks = []vmm.Disk{{Node: openImage(t, 1<<20)}}
		c.Paused = true
	})
	for text, args := range map[string]m{
		"Need exactly one of":          {"device": "disk0", "id": "disk0"},
		"Device 'no' not found":        {"device": "no"},
		"cannot be used at the same":   {"bps": 1, "bps_rd": 1},
		"must be within [0, 10000000":  {"iops": -1},
		"require corresponding":        {"bps_max": 1},
		"cannot be lower than":         {"bps": 2, "bps_max": 1},
		"the burst length cannot be 0": {"bps": 2, "bps_max": 3, "bps_max_length": 0},
		"without burst rate":           {"iops": 2, "iops_max_length": 2},
	} {
		if err := o.refuse(t, "block_set_io_throttle", limits(args)); !strings.Contains(err.Desc, text) {
			t.Errorf("%v: %q, want %q", args, err.Desc, text)
		}
	}
	type blocks []struct {
		Inserted struct {
			IOPS    int64 `json:"iops_wr"`
			IOPSMax int64 `json:"iops_wr_max"`
		}
	}
	var b blocks
	o.do(t, "query-block", nil, &b)
	if b[0].Inserted.IOPS != 0 {
		t.Errorf("refused limits are in force: %+v", b)
	}
	o.do(t, "block_set_io_throttle", limits(m{"iops_wr": 1, "iops_wr_max": 2}), nil)
	o.do(t, "query-block", nil, &b)
	if b[0].Inserted.IOPS != 1 || b[0].Inserted.IOPSMax != 2 {
		t.Errorf("%+v", b)
	}
	o.do(t, "cont", nil, nil)
	o.event(t, "RESUME")
	var stats []struct{ Stats blockCountsOf }
	for len(stats) == 0 || stats[0].Stats.Writes == 0 {
		o.do(t, "query-blockstats", nil, &stats)
	}
	o.do(t, "stop", nil, nil)
	o.event(t, "STOP")
	o.do(t, "cont", nil, nil)
	o.event(t, "RESUME")
	o.do(t, "block_set_io_throttle", limits(nil), nil)
	o.serial.waitFor(t, "for=go")
}

func TestLatencyHistogram(t *testing.T) {
	const guest = "blk op=seqwrite bs=4k count=100 blk op=seqread bs=4k count=50 blk op=flush wait for=go"
	o := start(t, guest, func(c *vmm.Config) {
		c.Disks = []vmm.Disk{{Node: openImage(t, 1<<20)}}
		c.Paused = true
	})
	for _, args := range []m{{"id": "disk0", "boundaries": []int{2, 1}}, {"id": "disk0", "boundaries": []int{0}}, {"id": "disk0", "boundaries-read": []int{}}, {"id": "no"}} {
		o.refuse(t, "block-latency-histogram-set", args)
	}
	o.do(t, "block-latency-histogram-set", m{"id": "disk0", "boundaries": []int{1, 1e12}, "boundaries-flush": []int{1e12}}, nil)
	o.do(t, "cont", nil, nil)
	o.serial.waitFor(t, "for=go")
	type histogram struct{ Boundaries, Bins []int64 }
	var stats []struct {
		Stats struct {
			Read    *histogram `json:"rd_latency_histogram"`
			Write   *histogram `json:"wr_latency_histogram"`
			Flush   *histogram `json:"flush_latency_histogram"`
			Flushes int64      `json:"flush_operations"`
			Reads   int64      `json:"rd_operations"`
			Writes  int64      `json:"wr_operations"`
		}
	}
	o.do(t, "query-blockstats", nil, &stats)
	s := stats[0].Stats
	for _, c := range []struct {
		got, want *histogram
	}{
		{s.Read, &histogram{[]int64{1, 1e12}, []int64{0, s.Reads, 0}}},
		{s.Write, &histogram{[]int64{1, 1e12}, []int64{0, s.Writes, 0}}},
		{s.Flush, &histogram{[]int64{1e12}, []int64{s.Flushes, 0}}},
	} {
		if d := cmp.Diff(c.want, c.got); d != "" || s.Reads < 50 {
			t.Errorf("-want +got\n%s", d)
		}
	}
	o.do(t, "block-latency-histogram-set", m{"id": "disk0"}, nil)
	stats = nil
	o.do(t, "query-blockstats", nil, &stats)
	if stats[0].Stats.Read != nil {
		t.Error("there is a histogram still")
	}
}

// failing fails writes while it has an error.
type failing struct {
	block.Node
	err atomic.Pointer[error]
}

func (f *failing) Writev(bufs [][]byte, off int64) error {
	if err := f.err.Load(); err != nil {
		return *err
	}
	return f.Node.Writev(bufs, off)
}

func (f *failing) fail(err error) { f.err.Store(&err) }

// Policies for errors: a machine that stops goes on by cont, with the request that
// failed, and the guest notices nothing.
func TestErrorPolicies(t *testing.T) {
	const guest = "blk op=seqwrite bs=4k qd=4 count=64 seed=3 blk op=seqread bs=4k count=64 seed=3 verify=1 wait for=go"
	for _, c := range []struct {
		policy  vmm.OnError
		err     error
		action  string
		nospace bool
		status  string // of the device
	}{
		{vmm.OnErrorStop, syscall.EIO, "stop", false, "failed"},
		{vmm.OnErrorStop, syscall.ENOSPC, "stop", true, "nospace"},
		{vmm.OnErrorNoSpace, syscall.ENOSPC, "stop", true, "nospace"},
		{vmm.OnErrorNoSpace, syscall.EIO, "report", false, "ok"},
		{vmm.OnErrorIgnore, syscall.EIO, "ignore", false, "ok"},
	} {
		t.Run(string(c.policy)+" "+c.err.Error(), func(t *testing.T) {
			node := &failing{Node: openImage(t, 1<<20)}
			node.fail(c.err)
			o := start(t, guest, func(cfg *vmm.Config) { cfg.Disks = []vmm.Disk{{Node: node, WriteError: c.policy}} })
			for round := range 2 {
				e := o.event(t, "BLOCK_IO_ERROR")
				if e.Data["action"] != c.action || e.Data["nospace"] != c.nospace || e.Data["operation"] != "write" {
					t.Errorf("%v", e.Data)
				}
				if c.action != "stop" {
					return
				}
				for e := o.next(t); e.Event != "STOP"; e = o.next(t) {
					if e.Event != "BLOCK_IO_ERROR" {
						t.Fatalf("%+v", e)
					}
				}
				if s := o.status(t); s != "io-error" {
					t.Errorf("status %q", s)
				}
				var blocks []struct {
					Status string `json:"io-status"`
				}
				o.do(t, "query-block", nil, &blocks)
				if blocks[0].Status != c.status {
					t.Errorf("io-status %q, want %q", blocks[0].Status, c.status)
				}
				if round == 1 {
					node.err.Store(nil)
				}
				o.do(t, "cont", nil, nil)
				o.event(t, "RESUME")
			}
			results := o.serial.waitFor(t, "for=go")
			for i := range 2 {
				r, err := results.Find("blk", i)
				if err != nil {
					t.Fatal(err)
				}
				if n, err := r.Number("failed"); err != nil || n != 0 {
					t.Errorf("the guest has seen errors: %v, %v", r, err)
				}
			}
			if s := o.status(t); s != "running" {
				t.Errorf("status %q", s)
			}
		})
	}
}
