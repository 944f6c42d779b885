package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/mm/guestmem"
	"github.com/gnomon-vmm/gnomon/mm/pager"
	"github.com/gnomon-vmm/gnomon/vmm"
)

// RevertOptions say how a machine goes back to a checkpoint.
type RevertOptions struct {
	Policy pager.Policy
	// Tag is in the names of the overlays; "": the file's name.
	Tag string
	// Progress, where not nil, is told how many bytes of memory are loaded.
	Progress func(done, total int64)
}

// Revert takes the machine back to a checkpoint that was taken of it, or of one
// with the same devices. What it held since is lost: its disks that can be
// written go on in new overlays of the checkpoint's, and those in which it wrote
// so far are closed and stay where they are. A machine that ran goes on at once,
// and its memory is loaded meanwhile; Revert returns when all of it is there. If
// ctx ends before the machine was touched, nothing has happened.
func (s *Saver) Revert(ctx context.Context, path string, o RevertOptions) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	i, err := Open(path)
	if err != nil {
		return err
	}
	defer i.Close()
	if err := s.revert(ctx, i, o); err != nil {
		return fmt.Errorf("%w %s from %s: %w", ErrRestore, s.m.Name(), filepath.Base(path), err)
	}
	return nil
}

// revert is Revert with mu held.
func (s *Saver) revert(ctx context.Context, i *Image, o RevertOptions) error {
	if err := s.loaded(ctx); err != nil {
		return err
	}
	tag := o.Tag
	if tag == "" {
		tag = filepath.Base(i.path)
	}
	disks, err := replaceDisks(s.m, i, tag)
	if err != nil {
		return err
	}
	defer disks.undo()
	if err := ctx.Err(); err != nil {
		return err
	}
	resume, err := s.m.Suspend()
	if err != nil {
		return err
	}
	var p *pager.Pager
	ready := make(chan struct{}) // closed when p is set, or is not going to be
	total := int64(s.m.Memory().Size())
	err = s.m.Revert(vmm.Restore{
		Sections: i.state,
		Prepare: func(mem *guestmem.Memory) (err error) {
			s.last = i.reader.ID()
			if err := s.trackFromHere(); err != nil {
				return err
			}
			if p, err = pager.New(mem, i.reader, pager.Options{Policy: o.Policy, Background: true, OnError: func(err error) {
				<-ready
				s.m.Fail(fmt.Errorf("%w: %w", ErrRestore, err))
				if p != nil {
					p.Close() // which ends the wait of who wants that memory
				}
			}}); err == nil {
				p.Start()
				s.loader = p
			}
			return err
		},
	})
	close(ready)
	if err != nil {
		if p != nil {
			return errors.Join(err, p.Close())
		}
		if st := s.m.Status(); st == vmm.StatusPaused || st == vmm.StatusPrelaunch {
			err = errors.Join(err, resume())
		}
		return err
	}
	if err := disks.switchOver(); err != nil {
		s.m.Fail(err) // its memory is of another time than its disks
		return err
	}
	if err := resume(); err != nil {
		return err
	}
	if o.Progress != nil {
		o.Progress(0, total)
	}
	// From here on nothing can be taken back: a machine without its memory has ended.
	if err := p.Wait(context.WithoutCancel(ctx)); err != nil {
		return err
	}
	if o.Progress != nil {
		o.Progress(total, total)
	}
	return nil
}

// loaded returns when a restored machine's memory is all there: what is not there
// can be neither saved nor protected, nor be given up.
func (s *Saver) loaded(ctx context.Context) error {
	if s.loader == nil {
		return nil
	}
	s.loader.LoadAll()
	return s.loader.Wait(ctx)
}

// trackFromHere has the next save that continues s.last hold what is written from
// now on. The machine stands still.
func (s *Saver) trackFromHere() error {
	s.since.Reset()
	if err := s.m.Dirty().Start(); err != nil {
		return err
	}
	return s.m.Dirty().Collect(func(uint64, uint64) {})
}

// replacer puts a machine's disks back to those of a checkpoint.
type replacer struct {
	disks    []replacedDisk
	claimed  []*block.Root
	release  func() // lets disks come and go again
	switched bool
}

type replacedDisk struct {
	root    *block.Root
	overlay *qcow2.Node
	path    string
}

// replaceDisks makes the overlays in which the machine will write.
func replaceDisks(m *vmm.Machine, i *Image, tag string) (*replacer, error) {
	r := &replacer{release: m.HoldDevices()}
	if err := r.prepare(m, i, tag); err != nil {
		r.undo()
		return nil, err
	}
	return r, nil
}

func (r *replacer) prepare(m *vmm.Machine, i *Image, tag string) error {
	saved := map[string]*SavedDisk{}
	for n := range i.disks {
		saved[i.disks[n].ID] = &i.disks[n]
	}
	for _, d := range m.Disks() {
		if d.Node.ReadOnly() {
			continue
		}
		was := saved[d.ID]
		if was == nil || was.ReadOnly {
			return fmt.Errorf("disk %s: the checkpoint does not hold it", d.ID)
		}
		if was.Size != d.Node.Size() {
			return fmt.Errorf("disk %s: it has %d bytes and had %d", d.ID, d.Node.Size(), was.Size)
		}
		if err := d.Root.Claim("snapshot-load"); err != nil {
			return fmt.Errorf("disk %s: %w", d.ID, err)
		}
		r.claimed = append(r.claimed, d.Root)
		original, err := originalOf(was.File, d.Node.Info())
		if err != nil {
			return err
		}
		path, err := overlayName(original, tag, true)
		if err != nil {
			return fmt.Errorf("disk %s: %w", d.ID, err)
		}
		if err := was.OverlayDisk(path); err != nil {
			return err
		}
		r.disks = append(r.disks, replacedDisk{root: d.Root, path: path})
		if r.disks[len(r.disks)-1].overlay, err = qcow2.Open(path, false); err != nil {
			return fmt.Errorf("disk %s: %w", d.ID, err)
		}
	}
	return nil
}

// switchOver puts the overlays in place. The machine is paused.
func (r *replacer) switchOver() error {
	r.switched = true
	var errs []error
	for _, d := range r.disks {
		old := d.root.Current()
		d.root.Swap(d.overlay)
		errs = append(errs, old.Close())
	}
	return errors.Join(errs...)
}

// undo removes overlays that are not in use.
func (r *replacer) undo() {
	defer func() {
		for _, root := range r.claimed {
			root.Release()
		}
		r.claimed = nil
		r.release()
	}()
	if r.switched {
		return
	}
	for _, d := range r.disks {
		if d.overlay != nil {
			d.overlay.Close()
		}
		os.Remove(d.path)
	}
}
