package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// consolidate measures what it takes to delete the snapshot of a running machine,
// block-commit of its newest image, with 1 GiB in that image, while the guest
// writes 4 KiB at random places of it.
func (b *bench) consolidate() experiment {
	base, top := filepath.Join(b.dir, "base.qcow2"), filepath.Join(b.dir, "top.qcow2")
	size := int64(b.pick(1024, 128)) * mib
	run := func(v vmm) func(context.Context) (figures, error) {
		return func(ctx context.Context) (figures, error) {
			defer os.Remove(base)
			defer os.Remove(top)
			// Twice, as the first time finds memory that a virtual host may yet have to
			// get from its own host.
			for range 2 {
				if err := makeChain(base, top, size); err != nil {
					return nil, err
				}
			}
			unix.Sync() // nothing is left to write back when it begins
			return b.consolidateOnce(ctx, v, size)
		}
	}
	e := experiment{
		name: "consolidate",
		schedule: contenders{
			{"gnomon", run(b.ours(256, "--disk", "file="+top+",format=qcow2", "--net", "none"))},
			{"QEMU q35", run(b.peer("q35", 256,
				// Threads, whose writes are counted for the process, unlike those of io_uring.
				"-drive", "file="+top+",format=qcow2,if=none,id=disk0,cache=writeback,aio=threads",
				"-object", "iothread,id=io0", "-device", "virtio-blk-pci,drive=disk0,disable-legacy=on,iothread=io0"))},
		},
	}
	for _, p := range []promise{
		{metric: "time", text: "in all", unit: "s", bound: bound{"ratio", "<=", 1}},
		{metric: "written", text: "bytes written to the base, of the overlay's and the guest's", unit: "1", bound: bound{"ours", "<=", 1.02}},
		{metric: "foreground", text: "the guest's writes a second, of before", unit: "1", higher: true, bound: bound{"ours", ">=", 0.6}},
		{metric: "p99", text: "99th percentile of the guest's writes, of before", unit: "1", bound: bound{"ours", "<=", 3}},
		{metric: "ios", text: "the guest's writes a second", unit: "1/s", higher: true},
	} {
		p.text = "consolidation of 1 GiB: " + p.text
		e.promises = append(e.promises, p)
	}
	return e
}

// makeChain makes a base and an overlay that both hold size bytes of 2 GiB.
func makeChain(base, top string, size int64) error {
	for _, path := range []string{base, top} {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return errors.Join(
		qemuImg("create", "-q", "-f", "qcow2", base, "2G"),
		qemuIO(base, fmt.Sprintf("write -P 1 0 %d", size)),
		qemuImg("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, top),
		qemuIO(top, fmt.Sprintf("write -P 2 0 %d", size)),
	)
}

// A writing is one of the guest's lines: what it did with its disk in some 100 ms.
type writing struct {
	ios, p99 uint64
	seconds  float64
}

// writing is the guest's next line.
func (g *guest) writing() (w writing, err error) {
	line, _, err := g.line("blk")
	if err != nil {
		return w, err
	}
	if failed, err := line.Number("failed"); err != nil || failed != 0 {
		return w, fmt.Errorf("%d requests failed (%v)", failed, err)
	}
	if w.seconds, err = line.Seconds(); err == nil {
		w.ios, err = line.Number("ios")
	}
	if err == nil {
		w.p99, err = line.Number("p99")
	}
	return w, err
}

// summary is the rate of some of them, and the percentile, which is of all so far.
func summary(all []writing) (rate float64, p99 uint64) {
	ios, seconds := 0.0, 0.0
	for _, w := range all {
		ios, seconds = ios+float64(w.ios), seconds+w.seconds
	}
	return ios / seconds, all[len(all)-1].p99
}

func (b *bench) consolidateOnce(ctx context.Context, v vmm, size int64) (figures, error) {
	rounds := b.pick(18, 5)
	write := fmt.Sprintf("blk op=randwrite bs=4k qd=4 data=same span=%d ms=100 rounds=", size)
	// After the first, caches and threads are warm.
	m, err := b.startMachine(ctx, v, fmt.Sprintf("%s2; %s%d; wait for=job; %s6000", write, write, rounds, write), "")
	if err != nil {
		return nil, err
	}
	defer m.close()
	var before, during []writing
	for i := range 2 + rounds {
		w, err := m.writing()
		if err != nil {
			return nil, err
		}
		if i >= 2 {
			before = append(before, w)
		}
	}
	begin, err := m.bytesWritten()
	if err != nil {
		return nil, err
	}
	if _, err := io.WriteString(m.stdin, "\n"); err != nil {
		return nil, err
	}
	if err := m.qmp.execute("block-commit", map[string]any{"device": "disk0", "job-id": "commit"}, nil, nil); err != nil {
		return nil, err
	}
	committed := make(chan error, 1)
	var end moment
	go func() {
		err := m.commit(ctx)
		if err == nil {
			end, err = m.bytesWritten()
		}
		committed <- err
	}()
	for done := false; !done; {
		w, err := m.writing()
		if err != nil {
			return nil, err
		}
		during = append(during, w)
		select {
		case err := <-committed:
			if err != nil {
				return nil, err
			}
			done = true
		default:
		}
	}
	rate, p99 := summary(before)
	rateDuring, p99During := summary(during)
	guest := end.guest - begin.guest
	return figures{
		"time":    (end.at - begin.at).Seconds(),
		"written": float64(end.process-begin.process-guest) / float64(size+guest),
		// Its last moments may be those after the end.
		"foreground": rateDuring / rate, "p99": float64(p99During) / float64(p99), "ios": rateDuring,
	}, nil
}

// commit waits until the job is over.
func (m *machine) commit(ctx context.Context) error {
	told := false
	return until(ctx, poll, func() (bool, error) {
		var jobs []struct {
			Device string
			Ready  bool
		}
		if err := m.qmp.execute("query-block-jobs", struct{}{}, &jobs, nil); err != nil || len(jobs) == 0 {
			return true, err
		}
		if told || !jobs[0].Ready {
			return false, nil
		}
		told = true
		return false, m.qmp.execute("block-job-complete", map[string]any{"device": "commit"}, nil, nil)
	})
}

// A moment is what has been written until then.
type moment struct {
	at             time.Duration
	guest, process int64 // bytes: by the guest to its disk, and by the process in all
}

func (m *machine) bytesWritten() (now moment, err error) {
	var stats []struct {
		Stats struct {
			Written int64 `json:"wr_bytes"`
		}
	}
	if err := m.qmp.execute("query-blockstats", struct{}{}, &stats, nil); err != nil {
		return now, err
	}
	for _, s := range stats {
		now.guest += s.Stats.Written
	}
	now.at = clock()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", m.pid()))
	if err != nil {
		return now, err
	}
	for line := range bytes.Lines(text) {
		if n, _ := fmt.Sscanf(string(line), "wchar: %d", &now.process); n == 1 {
			return now, nil
		}
	}
	return now, errors.New("/proc tells nothing of bytes written")
}
