package main

import (
	"context"
	"fmt"
	"os"
	"time"
)

// dirtyRate is how many pages a second a guest writes while it is saved.
const dirtyRate = 2000

// A heavy is a guest that has filled so much memory, and then counts in the
// mailbox or writes its pages one after the other. It stands still unless
// it is used, so that others can be measured.
type heavy struct {
	*machine
	b       *bench
	size    int // MiB
	file    string
	writing bool
}

// fill starts a guest and waits until its memory is filled. It stands still then.
func (b *bench) fill(ctx context.Context, v vmm, size int) (*heavy, error) {
	m, err := b.startMachine(ctx, v, fmt.Sprintf("fill size=%dM; spin; dirty rate=%d ms=3600000", size, dirtyRate), "")
	if err != nil {
		return nil, err
	}
	h := &heavy{machine: m, b: b, size: size}
	if _, _, err = m.line("fill"); err == nil {
		_, err = m.counting(ctx)
	}
	if err == nil {
		err = m.qmp.ask("stop")
	}
	if err != nil {
		h.close()
		return nil, err
	}
	return h, nil
}

func (h *heavy) close() {
	if h == nil {
		return
	}
	h.machine.close()
	if h.file != "" {
		os.Remove(h.file)
	}
}

// write has the guest stop counting and write from now on.
func (h *heavy) write() error {
	if h.writing {
		return nil
	}
	box, err := openMailbox(h.guest)
	if err != nil {
		return err
	}
	defer box.close()
	box.stop()
	h.writing = true
	return nil
}

// during runs the guest for a while and then does something.
func (h *heavy) during(ctx context.Context, f func() error) error {
	if err := h.write(); err != nil {
		return err
	}
	if err := h.qmp.ask("cont"); err != nil {
		return err
	}
	select {
	case <-time.After(200 * time.Millisecond):
	case <-ctx.Done():
		return ctx.Err()
	}
	if err := f(); err != nil {
		return err
	}
	return h.qmp.ask("stop")
}

// saveOurs saves Gnomon's guest while it writes.
func (h *heavy) saveOurs(ctx context.Context) (s *saved, err error) {
	file, err := h.b.scratch("save")
	if err != nil {
		return nil, err
	}
	defer os.Remove(file)
	if err := touchMemory(h.size); err != nil {
		return nil, err
	}
	err = h.during(ctx, func() error {
		s, err = h.checkpoint(ctx, file, "", "running")
		return err
	})
	return s, err
}

// throughput is MB of memory that was not zero a second.
func (s *saved) throughput() float64 {
	return float64(s.Touched) / 1e6 / time.Duration(s.Total).Seconds()
}

// saveQEMU saves QEMU's guest: it stands still from before to after. flush is how much
// longer it takes until the file is on disk, for which QEMU does not wait.
func (h *heavy) saveQEMU(ctx context.Context, file string, program bool) (pause, flush time.Duration, err error) {
	if err := touchMemory(h.size); err != nil {
		return 0, 0, err
	}
	err = h.during(ctx, func() error {
		begin := clock()
		if err := h.qmp.ask("stop"); err != nil {
			return err
		}
		if err := h.migrate(ctx, file, program); err != nil {
			return err
		}
		err := h.qmp.ask("cont")
		if pause = clock() - begin; err != nil {
			return err
		}
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		defer f.Close()
		begin = clock()
		err = f.Sync()
		flush = clock() - begin
		return err
	})
	return pause, flush, err
}

// saveStopped saves Gnomon's guest, which stands still, and returns how many MB a second.
func (h *heavy) saveStopped(ctx context.Context, noFlush bool) (float64, error) {
	file, err := h.b.scratch("stopped")
	if err != nil {
		return 0, err
	}
	defer os.Remove(file)
	if err := touchMemory(h.size); err != nil {
		return 0, err
	}
	s, err := h.checkpointWith(ctx, map[string]any{"file": file, "mode": "stop", "no-flush": noFlush})
	if err != nil {
		return 0, err
	}
	return s.throughput(), nil
}

// saving measures the save of a guest with 4 GiB of memory in use, and its
// restore, beside QEMU's stop, migrate to a file, and -incoming.
func (b *bench) saving() experiment {
	size := b.pick(4096, 512)
	memory := size + size/8 + 128
	var ours, theirs *heavy
	ready := func(h **heavy, v vmm) func(context.Context) error {
		return func(ctx context.Context) (err error) {
			if *h != nil {
				return nil
			}
			if *h, err = b.fill(ctx, v, size); err != nil {
				return err
			}
			if (*h).file, err = b.scratch("heavy"); err != nil {
				return err
			}
			if (*h).vmm.binary == b.qemu {
				// While it runs: one that stands still would not run on.
				if err := (*h).qmp.ask("cont"); err != nil {
					return err
				}
				return (*h).migrate(ctx, (*h).file, false)
			}
			_, err = (*h).checkpoint(ctx, (*h).file, "", "running")
			return err
		}
	}
	readyOurs := ready(&ours, b.ours(memory, "--net", "none"))
	peer := b.peer("q35", memory)
	readyTheirs := ready(&theirs, peer)
	qemu := func(program bool) func(context.Context) (figures, error) {
		return func(ctx context.Context) (figures, error) {
			if err := readyTheirs(ctx); err != nil {
				return nil, err
			}
			file, err := b.scratch("migrate")
			if err != nil {
				return nil, err
			}
			defer os.Remove(file)
			pause, flush, err := theirs.saveQEMU(ctx, file, program)
			if err != nil {
				return nil, err
			}
			st, err := os.Stat(file)
			if err != nil {
				return nil, err
			}
			whole := float64(size) * mib / 1e6
			f := figures{"pause": milliseconds(pause), "stopped": whole / pause.Seconds(), "bytes": float64(st.Size()) / mib}
			f["flushed"] = whole / (pause + flush).Seconds()
			f["throughput"] = f["flushed"]
			from, fd := "exec:cat "+theirs.file, (*os.File)(nil)
			if !program {
				if fd, err = os.Open(theirs.file); err != nil {
					return nil, err
				}
				defer fd.Close()
				from = "fd:3"
			}
			v := b.peer("q35", memory, "-incoming", from)
			v.file = fd
			return f, b.resume(ctx, v, f)
		}
	}
	running := func(ctx context.Context) (figures, error) {
		if err := readyOurs(ctx); err != nil {
			return nil, err
		}
		s, err := ours.saveOurs(ctx)
		if err != nil {
			return nil, err
		}
		f := figures{"pause": float64(s.Pause) / 1e6, "throughput": s.throughput(), "bytes": float64(s.Bytes) / mib}
		return f, b.resume(ctx, b.restore(ours.file), f)
	}
	stopped := func(metric string, noFlush bool) func(context.Context) (figures, error) {
		return func(ctx context.Context) (figures, error) {
			throughput, err := ours.saveStopped(ctx, noFlush)
			return figures{metric: throughput}, err
		}
	}
	return experiment{
		name: "saving",
		// No save of a side follows another of its own: a disk may be slower after much was
		// written.
		schedule: contenders{
			{"gnomon", running},
			{"QEMU stop, migrate to file", qemu(false)},
			{"gnomon", stopped("stopped", true)},
			{"QEMU stop, migrate exec:cat", qemu(true)},
			{"gnomon", stopped("flushed", false)},
		},
		promises: []promise{
			{metric: "pause", text: "pause of a guest of 4 GiB that is saved", unit: "ms", bound: bound{"ratio", "<=", 0.02}},
			// No bound: QEMU's guest stands still, and leaves both processors to the save.
			{metric: "throughput", text: "memory saved a second to the disk, while the guest runs", unit: "MB/s", higher: true},
			{metric: "flushed", text: "memory saved a second to the disk, while the guest stands still", unit: "MB/s", higher: true, bound: bound{"ratio", ">=", 1}},
			{metric: "stopped", text: "memory saved a second to a file, not flushed, while the guest stands still", unit: "MB/s", higher: true, bound: bound{"ratio", ">=", 1}},
			{metric: "bytes", text: "file of a guest with 4 GiB that cannot be compressed", unit: "MiB"},
			{metric: "first", text: "restore of 4 GiB to the guest's first count", unit: "ms", bound: bound{"ratio", "<=", 0.05}},
		},
		end: func() {
			ours.close()
			theirs.close()
		},
	}
}

// resume starts a VMM that goes on with a guest that counts, and adds when it
// did: to the first KVM_RUN, where tracing tells; to the guest's first count;
// and to its first line, which it writes when it is told to stop counting.
func (b *bench) resume(ctx context.Context, v vmm, f figures) error {
	trace, err := newTrace()
	if err != nil {
		return err
	}
	defer trace.close()
	g, err := v.start(ctx, "")
	if err != nil {
		return err
	}
	defer g.kill()
	first, err := g.counting(ctx)
	if err != nil {
		return err
	}
	f["first"] = milliseconds(first - g.started)
	if trace != nil {
		at, err := trace.firstRun(g.pid())
		if err != nil {
			return err
		}
		f["run"] = milliseconds(at - g.started)
	}
	box, err := openMailbox(g)
	if err != nil {
		return err
	}
	defer box.close()
	box.stop()
	_, at, err := g.line("spin")
	f["line"] = milliseconds(at - g.started)
	return err
}

// growth measures how the pause of a save, and the time to go on with what was
// saved, grow with the memory in use. The peer is ourselves.
func (b *bench) growth() experiment {
	large, small, tiny := b.pick(8192, 1024), b.pick(1024, 256), b.pick(256, 64)
	guests := map[int]*heavy{}
	get := func(ctx context.Context, size int) (*heavy, error) {
		h := guests[size]
		if h != nil {
			return h, nil
		}
		h, err := b.fill(ctx, b.ours(size+size/8+128, "--net", "none"), size)
		if err != nil {
			return nil, err
		}
		guests[size] = h
		if h.file, err = b.scratch("heavy"); err != nil {
			return nil, err
		}
		_, err = h.checkpoint(ctx, h.file, "", "running")
		return h, err
	}
	run := func(size int, save, restore bool) func(context.Context) (figures, error) {
		return func(ctx context.Context) (figures, error) {
			h, err := get(ctx, size)
			if err != nil {
				return nil, err
			}
			f := figures{}
			if save {
				s, err := h.saveOurs(ctx)
				if err != nil {
					return nil, err
				}
				f["pause"], f["prepared"] = float64(s.Pause)/1e6, float64(s.Prepared)/1e6
			}
			if restore {
				err = b.resume(ctx, b.restore(h.file), f)
			}
			return f, err
		}
	}
	promises := []promise{
		{metric: "pause", text: "pause of a guest of 8 GiB that is saved, to one of 1 GiB", unit: "ms", bound: bound{"ratio", "<=", 2}},
		{metric: "prepared", text: "preparing that, while the guest runs", unit: "ms"},
	}
	if traceable() {
		promises = append(promises, promise{metric: "run", text: "restore of 8 GiB to first KVM_RUN, to one of 256 MiB", unit: "ms"})
	}
	return experiment{
		name: "growth",
		schedule: contenders{
			{fmt.Sprintf("gnomon %d MiB", large), run(large, true, true)},
			{fmt.Sprintf("gnomon %d MiB", small), run(small, true, false)},
			{fmt.Sprintf("gnomon %d MiB", tiny), run(tiny, false, true)},
		},
		promises: append(promises,
			promise{metric: "first", text: "restore of 8 GiB to the guest's first count, to one of 256 MiB", unit: "ms", bound: bound{"ratio", "<=", 1.5}},
			promise{metric: "line", text: "restore of 8 GiB to the guest's first line, to one of 256 MiB", unit: "ms"}),
		end: func() {
			for _, h := range guests {
				h.close()
			}
		},
	}
}
