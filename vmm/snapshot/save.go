// Package snapshot saves a machine into a checkpoint file while it runs, and
// makes a machine of such a file that runs before its memory has been read.
package snapshot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"sync"
	"time"

	"github.com/gnomon-vmm/gnomon/mm/capture"
	"github.com/gnomon-vmm/gnomon/mm/checkpoint"
	"github.com/gnomon-vmm/gnomon/mm/dirty"
	"github.com/gnomon-vmm/gnomon/mm/guestmem"
	"github.com/gnomon-vmm/gnomon/mm/pager"
	"github.com/gnomon-vmm/gnomon/mm/paging"
	"github.com/gnomon-vmm/gnomon/vmm"
)

// Errors by stage; each is wrapped around its cause.
var (
	ErrSave    = errors.New("save machine")
	ErrRestore = errors.New("restore machine")
)

// Sections of the checkpoint file beside the machine's state, whose names begin
// with statePrefix.
const (
	sectionRecipe = "recipe"
	sectionDisks  = "disks"
	sectionLeft   = "left-disks" // instead of disks, after LeaveDisks
	statePrefix   = "state:"

	sectionVersion = 1
)

// Disks is what a save does about the disks that can be written.
type Disks int

const (
	// KeepDisks keeps them for the checkpoint, as they are at its instant. The
	// machine goes on in qcow2 overlays beside them, whose names are the disk's
	// with the tag added. After a save that fails once the machine has gone on,
	// the overlays stay in use: the error is a SwitchedError.
	KeepDisks Disks = iota
	// CopyDisks copies them into qcow2 images beside the checkpoint, FILE.ID.qcow2.
	// The machine stays in its own.
	CopyDisks
	// LeaveDisks leaves them to the caller, who sees to it that a restored machine
	// finds them as they were. Which they were is noted.
	LeaveDisks
)

// SaveOptions say how a machine is saved.
type SaveOptions struct {
	// Parent is the path of the machine's last checkpoint; the new file then
	// holds only what changed since. "": it holds everything.
	Parent string
	// Stop keeps the machine paused until the file is complete.
	Stop bool
	// Disks is what becomes of disks that can be written.
	Disks Disks
	// Tag is in the names of overlays and copies; "": the file's name.
	Tag string
	// SideCopies is how many pages may be kept aside for the checkpoint that the
	// guest writes before they are saved; 0 means 8192, 32 MiB. With fewer the guest
	// waits more often.
	SideCopies int
	// NoFlush has Save return when the file is complete, though perhaps not on disk
	// yet: see checkpoint.CreateOptions.
	NoFlush bool
	// Progress, where not nil, is told how many bytes of memory are done.
	Progress func(done, total int64)
}

// Report tells what saving a machine took.
type Report struct {
	File   string
	ID     checkpoint.ID
	Parent string // path; "": none
	// Prepared is how long the machine ran while the save was prepared, Pause for
	// how long it then stood still, Total how long it all took.
	Prepared, Pause, Total time.Duration

	Disks []SavedDisk // those kept, and those that cannot be written

	Memory  capture.Stats
	Written checkpoint.WriteStats
}

// Saver saves one machine, as often as wanted.
type Saver struct {
	m      *vmm.Machine
	recipe []byte

	mu sync.Mutex // held while saving: one save at a time
	// loader is what loads the machine's memory, nil if it was not restored;
	// guarded by mu.
	loader *pager.Pager
	last   checkpoint.ID // what the next save can continue; guarded by mu
	// order is that of the pages when all, or many, were last saved; guarded by mu.
	order []uint64
	// since are pages written since the last checkpoint that an attempt at its
	// child collected and did not save; guarded by mu.
	since *dirty.Bitmap
	side  *capture.Side // guarded by mu; see sideOf
}

// orderShare: a child of more than this part of the pages has them put in order anew.
const orderShare = 8

// NewSaver makes a machine's Saver; one machine has one. recipe is kept in each
// checkpoint for whoever restores it: how to make a machine like this one.
// loader is what loads the machine's memory if it was restored, and otherwise nil.
func NewSaver(m *vmm.Machine, recipe []byte, loader *pager.Pager) *Saver {
	return &Saver{m: m, recipe: recipe, loader: loader, since: dirty.NewBitmapOf(m.Memory())}
}

// Save saves the machine into a new file at path, as it is at one instant
// during the call. A machine that ran goes on, whether saving succeeds or not,
// unless it is paused meanwhile.
func (s *Saver) Save(ctx context.Context, path string, o SaveOptions) (*Report, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, err := s.save(ctx, path, o)
	if err != nil {
		return nil, fmt.Errorf("%w %s: %w", ErrSave, s.m.Name(), err)
	}
	return r, nil
}

// save is Save with mu held.
func (s *Saver) save(ctx context.Context, path string, o SaveOptions) (r *Report, err error) {
	begin := time.Now()
	r = &Report{File: path, Parent: o.Parent}
	if err := s.checkParent(o.Parent); err != nil {
		return nil, err
	}
	if err := s.loaded(ctx); err != nil {
		return nil, err
	}
	mem, tracker := s.m.Memory(), s.m.Dirty()
	var only *dirty.Bitmap
	create := checkpoint.CreateOptions{Memory: ranges(mem), Parent: o.Parent, NoFlush: o.NoFlush}
	if o.Parent != "" {
		if err := tracker.CollectInto(s.since); err != nil {
			return nil, err
		}
		only = s.since
		create.Pages = only.Count()
	}
	w, err := checkpoint.Create(path, create)
	if err != nil {
		return nil, err
	}
	defer w.Abort()
	side, err := s.sideOf(o)
	if err != nil {
		return nil, err
	}
	options := capture.Options{Side: side, Still: o.Stop, Workers: w.Depth()}
	c, err := capture.New(mem, options)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	disks := &keeper{leaves: s.m}
	if o.Disks != LeaveDisks {
		if disks, err = keepDisks(s.m, path, o); err != nil {
			return nil, err
		}
		defer disks.undo()
		defer func() {
			if err != nil {
				err = disks.explain(err)
			}
		}()
	}

	// Ahead of the pause: what takes time that grows with the memory.
	if only == nil || s.order == nil || only.Count() > uint64(len(s.order)/orderShare) {
		if s.order, err = Order(s.m); err != nil {
			return nil, err
		}
	}
	if only == nil {
		if err := tracker.Start(); err != nil {
			return nil, err
		}
		// What was written up to now need not be collected during the pause. It is
		// kept, for a child of the last checkpoint, should this save fail.
		if err := tracker.CollectInto(s.since); err != nil {
			return nil, err
		}
	}
	if err := c.Arm(only); err != nil {
		return nil, err
	}
	if c, err = s.settle(c, only, options); err != nil {
		return nil, err
	}
	defer c.Close()
	r.Prepared = time.Since(begin)

	sections, resume, err := s.freeze(c, disks, o, r)
	if err != nil {
		return nil, err
	}
	defer resume()
	for _, section := range sections {
		if err := w.Section(statePrefix+section.Name, section.Version, section.Data); err != nil {
			return nil, err
		}
	}
	if len(s.recipe) > 0 {
		if err := w.Section(sectionRecipe, sectionVersion, s.recipe); err != nil {
			return nil, err
		}
	}
	if err := c.Save(ctx, w, s.order, func(done, total uint64) {
		if o.Progress != nil {
			o.Progress(int64(done*guestmem.PageSize), int64(total*guestmem.PageSize))
		}
	}); err != nil {
		return nil, err
	}
	if err := disks.finish(ctx); err != nil {
		return nil, err
	}
	section, list := sectionLeft, disks.left
	if o.Disks != LeaveDisks {
		r.Disks = disks.saved()
		section, list = sectionDisks, r.Disks
	}
	data, err := json.Marshal(list)
	if err != nil {
		return nil, err
	}
	if err := w.Section(section, sectionVersion, data); err != nil {
		return nil, err
	}
	if err := w.Commit(); err != nil {
		return nil, err
	}
	disks.done = true
	s.last = w.ID()
	s.since.Reset()
	r.ID, r.Memory, r.Written, r.Total = w.ID(), c.Stats(), w.Stats(), time.Since(begin)
	return r, nil
}

// settle has c take in what was written since it was armed, so that little is
// left to the pause. The capture it returns may be another, with the same options but Protect.
func (s *Saver) settle(c *capture.Capture, only *dirty.Bitmap, options capture.Options) (*capture.Capture, error) {
	if only == nil {
		if err := c.Rearm(); err != nil {
			return c, err
		}
		// What was written until now will be in this file, if it is completed. What is
		// written from now until the pause is in the next child, too: to collect it in the
		// pause would take time that grows with the memory.
		return c, s.m.Dirty().CollectInto(s.since)
	}
	more := dirty.NewBitmapOf(s.m.Memory())
	if err := s.m.Dirty().CollectInto(more); err != nil {
		return c, err
	}
	if err := s.since.Merge(more); err != nil {
		return c, err
	}
	enough, err := c.Refresh(more)
	if err != nil {
		return c, err
	}
	if enough {
		return c, c.Rearm()
	}
	// The guest writes faster than pages can be copied.
	if err := c.Close(); err != nil { // which gives back the room for side copies
		return c, err
	}
	options.Protect = true
	protecting, err := capture.New(s.m.Memory(), options)
	if err != nil {
		return c, err
	}
	if err := protecting.Arm(s.since); err != nil {
		return c, errors.Join(err, protecting.Close())
	}
	return protecting, nil
}

// sideOf is where a save keeps pages aside: the same for all that do not say how much room
// there is to be. mu is held.
func (s *Saver) sideOf(o SaveOptions) (side *capture.Side, err error) {
	if o.SideCopies != 0 {
		return capture.NewSide(o.SideCopies)
	}
	if s.side == nil {
		s.side, err = capture.NewSide(0)
	}
	return s.side, err
}

// freeze pauses the machine, takes its state and makes its memory of this
// instant what c saves. The machine goes on when freeze returns, or, with
// Options.Stop or after an error of Save, when resume is called.
func (s *Saver) freeze(c *capture.Capture, disks *keeper, o SaveOptions, r *Report) (sections []vmm.Section, resume func() error, err error) {
	running := s.m.Status() == vmm.StatusRunning
	paused := time.Now()
	end, err := s.m.Suspend()
	if err != nil {
		return nil, nil, err
	}
	goOn := sync.OnceValue(func() error {
		err := end()
		if running {
			r.Pause = time.Since(paused)
		}
		return err
	})
	defer func() {
		if err != nil {
			err = errors.Join(err, goOn())
		}
	}()
	if sections, err = s.m.SaveState(); err != nil {
		return nil, nil, err
	}
	var more *dirty.Bitmap
	if o.Parent != "" {
		more = dirty.NewBitmapOf(s.m.Memory())
		if err = s.m.Dirty().CollectInto(more); err == nil {
			err = s.since.Merge(more)
		}
		if err != nil {
			return nil, nil, err
		}
	}
	if err = c.Freeze(more); err != nil {
		return nil, nil, err
	}
	if err = disks.switchOver(); err != nil {
		return nil, nil, err
	}
	if !o.Stop {
		err = goOn()
	}
	return sections, goOn, err
}

// checkParent refuses a parent that is not the machine's last checkpoint. mu is held.
func (s *Saver) checkParent(path string) error {
	if path == "" {
		return nil
	}
	p, err := checkpoint.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %s is not there: name the machine's last checkpoint, or save everything", checkpoint.ErrParent, path)
	}
	if err != nil {
		return err
	}
	defer p.Close()
	if p.ID() != s.last || s.last == (checkpoint.ID{}) {
		return fmt.Errorf("%w: %s is not the last checkpoint that was taken of this machine: continue that one, or save everything", checkpoint.ErrParent, filepath.Base(path))
	}
	return nil
}

func ranges(mem *guestmem.Memory) []guestmem.Range {
	var all []guestmem.Range
	for _, r := range mem.Regions() {
		all = append(all, r.Range)
	}
	return all
}

// Order lists a machine's pages in the order in which its guest sees them, by
// the page tables of its vCPUs and of what else can be found. The machine stands
// still for a moment, in which registers are read.
func Order(m *vmm.Machine) ([]uint64, error) {
	var cpus []paging.Root
	if err := m.Stopped(func() error {
		for i := range m.CPUs() {
			s, err := m.CPUState(i)
			if err != nil {
				return err
			}
			if root, ok := paging.RootOfCPU(s.Sregs.CR0, s.Sregs.CR3, s.Sregs.CR4, s.Sregs.EFER); ok {
				cpus = append(cpus, root)
			}
		}
		return nil
	}); err != nil {
		return nil, err
	}
	mem := m.Memory()
	populated, err := paging.Populated(mem)
	if err != nil {
		return nil, err
	}
	roots, err := paging.FindRoots(mem, populated, cpus...)
	if err != nil {
		return nil, err
	}
	pages, err := paging.NewMap(mem, ranges(mem), roots)
	if err != nil {
		return nil, err
	}
	return pages.Order(), nil
}
