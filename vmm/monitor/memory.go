package monitor

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
	"github.com/gnomon-vmm/gnomon/qmp"
)

// chunkSize is how much guest memory is held at a time on its way to a file.
const chunkSize = 1 << 20

// ErrMemory is the stage of reading guest memory for a command.
var ErrMemory = errors.New("read guest memory")

// ram reads guest RAM by a descriptor of its own: that stays good when the
// machine is closed meanwhile, and reading what the guest never touched
// allocates nothing.
type ram struct {
	file    *os.File
	regions []*guestmem.Region // for their ranges and offsets only
}

// openRAM opens the machine's RAM, once all of it is there.
func (mon *monitor) openRAM(ctx context.Context) (*ram, error) {
	if p := mon.checkpoints.pager; p != nil {
		// What has not been loaded yet would be taken for holes.
		p.LoadAll()
		if err := p.Wait(ctx); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrMemory, err)
		}
	}
	var r *ram
	m := mon.m
	// Inside Stopped the machine cannot be closed.
	err := m.Stopped(func() error {
		fd, err := unix.FcntlInt(uintptr(m.Memory().FD()), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("%w: duplicate descriptor: %w", ErrMemory, err)
		}
		r = &ram{file: os.NewFile(uintptr(fd), "guest memory"), regions: m.Memory().Regions()}
		return nil
	})
	return r, err
}

func (r *ram) close() { r.file.Close() }

// find returns where in the descriptor a guest-physical address lies, and how
// many bytes of its region there are from there on: 0 outside RAM.
func (r *ram) find(gpa uint64) (offset int64, n uint64) {
	for _, region := range r.regions {
		if gpa-region.GPA < region.Size {
			return int64(region.Offset + gpa - region.GPA), region.End() - gpa
		}
	}
	return 0, 0
}

// contains tells whether n bytes from gpa on are RAM.
func (r *ram) contains(gpa, n uint64) bool {
	for n > 0 {
		_, there := r.find(gpa)
		if there == 0 {
			return false
		}
		step := min(n, there)
		gpa, n = gpa+step, n-step
	}
	return true
}

// read fills p, which must lie in one region.
func (r *ram) read(gpa uint64, p []byte) error {
	offset, there := r.find(gpa)
	if there < uint64(len(p)) {
		return fmt.Errorf("%w: %d bytes at GPA %#x: outside RAM", ErrMemory, len(p), gpa)
	}
	if _, err := r.file.ReadAt(p, offset); err != nil {
		return fmt.Errorf("%w: GPA %#x: %w", ErrMemory, gpa, err)
	}
	return nil
}

// copyTo writes n bytes from gpa on, which must be RAM, to out. progress is
// called with the number of bytes done since the last call; an error of it, or
// the context's end, ends the copy.
func (r *ram) copyTo(ctx context.Context, out *outFile, gpa, n uint64, progress func(n uint64) error) error {
	buf := make([]byte, min(n, chunkSize))
	for n > 0 {
		if ctx.Err() != nil {
			return qmp.ErrCanceled
		}
		offset, there := r.find(gpa)
		data, step := r.extent(offset, int64(min(there, n)))
		if data {
			step = min(step, chunkSize)
			if err := r.read(gpa, buf[:step]); err != nil {
				return err
			}
			if err := out.write(buf[:step]); err != nil {
				return err
			}
		} else {
			if !out.sparse {
				step = min(step, 64*chunkSize)
			}
			if err := out.skip(step); err != nil {
				return err
			}
		}
		if err := progress(uint64(step)); err != nil {
			return err
		}
		gpa, n = gpa+uint64(step), n-uint64(step)
	}
	return nil
}

// extent tells whether there is data at offset, or a hole that reads as
// zeroes, and how far that goes on, up to limit.
func (r *ram) extent(offset, limit int64) (data bool, n int64) {
	fd := int(r.file.Fd())
	next, err := unix.Seek(fd, offset, unix.SEEK_DATA)
	switch {
	case err == unix.ENXIO:
		return false, limit
	case err != nil:
		return true, limit // whatever it is, it can be read
	case next > offset:
		return false, min(limit, next-offset)
	}
	if next, err = unix.Seek(fd, offset, unix.SEEK_HOLE); err != nil {
		return true, limit
	}
	return true, min(limit, next-offset)
}

type (
	memsaveArguments struct {
		Val      int64  `qmp:"val"`
		Size     int64  `qmp:"size"`
		Filename string `qmp:"filename"`
		CPUIndex *int64 `qmp:"cpu-index"`
	}
	pmemsaveArguments struct {
		Val      int64  `qmp:"val"`
		Size     int64  `qmp:"size"`
		Filename string `qmp:"filename"`
	}
)

func (mon *monitor) registerMemory(reg *qmp.Registry) {
	qmp.Register(reg, "memsave", mon.memsave)
	qmp.Register(reg, "pmemsave", mon.pmemsave)
}

func invalidRange(addr uint64, size int64) error {
	return qmp.Errorf("Invalid addr 0x%016x/size %d specified", addr, size)
}

// pmemsave saves guest-physical memory. Where the guest runs it may change
// while it is saved.
func (mon *monitor) pmemsave(ctx context.Context, _ *qmp.Session, a pmemsaveArguments) (e qmp.Empty, err error) {
	gpa := uint64(a.Val)
	r, err := mon.openRAM(ctx)
	if err != nil {
		return e, err
	}
	defer r.close()
	if a.Size < 0 || !r.contains(gpa, uint64(a.Size)) {
		return e, invalidRange(gpa, a.Size)
	}
	out, err := create(a.Filename)
	if err != nil {
		return e, err
	}
	defer func() { err = out.end(err) }()
	defer out.interruptible(ctx)()
	return e, r.copyTo(ctx, out, gpa, uint64(a.Size), func(uint64) error { return nil })
}

// memsave saves memory by the guest-virtual addresses of a vCPU. The guest
// stands still only while one chunk is read.
func (mon *monitor) memsave(ctx context.Context, _ *qmp.Session, a memsaveArguments) (e qmp.Empty, err error) {
	gva, cpu := uint64(a.Val), 0
	if a.CPUIndex != nil {
		if *a.CPUIndex < 0 || *a.CPUIndex >= int64(len(mon.m.CPUs())) {
			return e, qmp.Errorf("Parameter 'cpu-index' expects a CPU number")
		}
		cpu = int(*a.CPUIndex)
	}
	if a.Size < 0 || a.Size > 0 && gva+uint64(a.Size)-1 < gva {
		return e, invalidRange(gva, a.Size)
	}
	r, err := mon.openRAM(ctx)
	if err != nil {
		return e, err
	}
	defer r.close()
	// each calls f for each page or part of one in the range, by its GPA, in
	// chunks between which the guest may run and after tells that one is done.
	each := func(f func(gpa uint64, at, n int) error, after func(n int) error) error {
		for at, left := gva, uint64(a.Size); left > 0; {
			if ctx.Err() != nil {
				return qmp.ErrCanceled
			}
			chunk := int(min(left, chunkSize))
			if err := mon.m.Stopped(func() error {
				for i := 0; i < chunk; {
					n := min(chunk-i, guestmem.PageSize-int((at+uint64(i))%guestmem.PageSize))
					gpa, err := mon.m.Translate(cpu, at+uint64(i))
					if err != nil || !r.contains(gpa, uint64(n)) {
						return invalidRange(gva, a.Size)
					}
					if err := f(gpa, i, n); err != nil {
						return err
					}
					i += n
				}
				return nil
			}); err != nil {
				return err
			}
			if err := after(chunk); err != nil {
				return err
			}
			at, left = at+uint64(chunk), left-uint64(chunk)
		}
		return nil
	}
	if err := each(func(uint64, int, int) error { return nil }, func(int) error { return nil }); err != nil {
		return e, err
	}
	out, err := create(a.Filename)
	if err != nil {
		return e, err
	}
	defer func() { err = out.end(err) }()
	defer out.interruptible(ctx)()
	buf := make([]byte, min(a.Size, chunkSize))
	return e, each(
		func(gpa uint64, at, n int) error { return r.read(gpa, buf[at:at+n]) },
		func(n int) error { return out.write(buf[:n]) })
}
