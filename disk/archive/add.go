package archive

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/gnomon-vmm/gnomon/disk/backup"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/changes"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
)

// Pending is a backup that is being made.
type Pending struct {
	a      *Archive
	step   Step
	target block.Node // that was opened last, or nil
}

// Begin makes the empty image of the next backup of a disk of size bytes: full, or one
// that lies on the newest.
func (a *Archive) Begin(size int64, full bool) (*Pending, error) {
	p := &Pending{a: a, step: Step{Number: 1, Time: time.Now(), Full: full, Size: size}}
	if last := a.Last(); last != nil {
		p.step.Number = last.Number + 1
	} else if !full {
		return nil, fmt.Errorf("%w %s: there is no backup that another could lie on", ErrArchive, a.dir)
	}
	if p.step.Number > maxNumber {
		return nil, fmt.Errorf("%w %s: there have been %d: choose another directory", ErrArchive, a.dir, maxNumber)
	}
	err := a.files.begin(&p.step)
	if errors.Is(err, qcow2.ErrBacking) {
		err = fmt.Errorf("%w %s: no more backups can lie on the last full one: make another full one, or merge the oldest (gnomon backup prune): %w", ErrArchive, a.dir, err)
	}
	if err != nil {
		return nil, err
	}
	return p, nil
}

// Target opens what the disk is to be copied to: with changes, whole blocks of 64 KiB. It
// is to be closed before Finish.
func (p *Pending) Target() (n block.Node, err error) {
	if n, err = p.a.files.target(&p.step); err == nil {
		p.target = n
	}
	return n, err
}

// Path is where the image is that the disk is to be copied to; "": it can only be written
// by way of Target.
func (p *Pending) Path() string {
	if !p.a.files.byName(&p.step) {
		return ""
	}
	name, _ := p.a.files.part(&p.step)
	return p.a.path(name)
}

// Format is that of the image at Path: disk.FormatQcow2 or disk.FormatRaw.
func (p *Pending) Format() string {
	_, format := p.a.files.part(&p.step)
	return format
}

// Number is what the backup will have.
func (p *Pending) Number() int { return p.step.Number }

// Finish makes it a backup. point and bitmap are what Step says of them.
func (p *Pending) Finish(point *changes.Point, bitmap string) (Step, error) {
	p.step.Point, p.step.Bitmap = point, bitmap
	if err := p.finish(); err != nil {
		p.Abandon()
		return Step{}, fmt.Errorf("%w %s: %w", ErrArchive, p.a.dir, err)
	}
	return p.step, nil
}

func (p *Pending) finish() error {
	a := p.a
	if err := a.files.finish(&p.step, p.target); err != nil {
		return err
	}
	a.catalog.Steps = append(a.catalog.Steps, p.step)
	if err := a.save(); err != nil {
		a.catalog.Steps = a.catalog.Steps[:len(a.catalog.Steps)-1]
		return err
	}
	return nil
}

// Abandon removes the image.
func (p *Pending) Abandon() { p.a.files.abandon(&p.step) }

// Continues tells whether a set of changes has all that the disk and the newest backup
// differ in; if not, why.
func (a *Archive) Continues(set *changes.Set) (ok bool, why string) {
	last := a.Last()
	switch {
	case last == nil:
		return false, "there is no earlier backup"
	case set.Changed == nil:
		return false, set.Reason
	case last.Size != set.Size:
		return false, fmt.Sprintf("the disk had %d bytes, and has %d now", last.Size, set.Size)
	case last.Point == nil || last.Point.Recording != set.From.Recording || last.Point.Epoch < set.From.Epoch:
		return false, fmt.Sprintf("the newest backup here is not the last of application %q", set.Application)
	}
	return true, ""
}

// Add backs up a disk to which nobody writes. set is what changed since the newest
// backup, or nil: then, and where it does not continue that backup, all of the disk is
// copied. Once it is a backup the set can be committed.
func (a *Archive) Add(ctx context.Context, src block.Node, set *changes.Set, progress func(done, total int64)) (Step, error) {
	full := true
	var o backup.Options
	var point *changes.Point
	if set != nil {
		point = &set.To
		if ok, _ := a.Continues(set); ok {
			full, o.Only = false, set.Changed
		}
	}
	p, err := a.Begin(src.Size(), full)
	if err != nil {
		return Step{}, err
	}
	if err := p.copy(ctx, src, o, progress); err != nil {
		p.Abandon()
		return Step{}, fmt.Errorf("%w %s: %w", ErrArchive, a.dir, err)
	}
	return p.Finish(point, "")
}

func (p *Pending) copy(ctx context.Context, src block.Node, o backup.Options, progress func(done, total int64)) error {
	target, err := p.Target()
	if err != nil {
		return err
	}
	f, err := backup.New(src, target, o)
	if err == nil {
		err = f.Copy(ctx, progress)
	}
	return errors.Join(err, target.Close())
}
