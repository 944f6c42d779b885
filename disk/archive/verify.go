package archive

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/gnomon-vmm/gnomon/disk/convert"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
)

// Problem is what is wrong with a backup.
type Problem struct {
	Number int    `json:"number"`
	Text   string `json:"problem"`
}

// Verify reads all backups, and tells what is wrong with them: an image that is not
// as it was made, is no sound qcow2 image, or lies on another than it should or on
// one with which something is wrong.
func (a *Archive) Verify(ctx context.Context, progress func(done, total int64)) ([]Problem, error) {
	var all []Problem
	bad := 0 // the newest backup that something is wrong with
	for i := range a.catalog.Steps {
		if err := ctx.Err(); err != nil {
			return all, err
		}
		s := &a.catalog.Steps[i]
		switch err := a.verify(ctx, i); {
		case err != nil:
			all = append(all, Problem{s.Number, err.Error()})
			bad = s.Number
		case !s.Full && bad == a.catalog.Steps[i-1].Number:
			all = append(all, Problem{s.Number, fmt.Sprintf("it lies on backup %d, which is damaged", bad)})
			bad = s.Number
		}
		if progress != nil {
			progress(int64(i+1), int64(len(a.catalog.Steps)))
		}
	}
	return all, ctx.Err()
}

// verify reads the image of one backup.
func (a *Archive) verify(ctx context.Context, i int) error {
	s := &a.catalog.Steps[i]
	path := a.path(s.File())
	sum, err := fileSum(path)
	if err != nil {
		return err
	}
	if sum != s.SHA256 {
		return fmt.Errorf("%s is not as it was when it was made: its checksum is another", s.File())
	}
	report, err := qcow2.Check(ctx, path, qcow2.CheckOptions{})
	if err != nil {
		return err
	}
	if report.Corruptions > 0 || report.CheckErrors > 0 {
		return fmt.Errorf("%s: the image has %d errors", s.File(), report.Corruptions+report.CheckErrors)
	}
	n, err := qcow2.Open(path, true)
	if err != nil {
		return err
	}
	defer n.Close()
	if got, want := n.Header().BackingFile, a.backing(i); got != want {
		return fmt.Errorf("%s lies on %q, not on %q", s.File(), got, want)
	}
	if n.Size() != s.Size {
		return fmt.Errorf("%s is of a disk of %d bytes, not %d", s.File(), n.Size(), s.Size)
	}
	return nil
}

// VerifyStep verifies one backup, 0 the newest, and those it lies on.
func (a *Archive) VerifyStep(ctx context.Context, number int) error {
	i, err := a.index(number)
	if err != nil {
		return err
	}
	for k := i - len(a.chain(i)) + 1; k <= i; k++ {
		if err := a.verify(ctx, k); err != nil {
			return fmt.Errorf("%w %d: %w", ErrDamaged, a.catalog.Steps[k].Number, err)
		}
	}
	return nil
}

// Prune removes all but the newest backups, of which it keeps at least one. The
// oldest of these comes to lie on no other: what it needs is copied into it.
// Interrupted anywhere, it leaves all that are to be kept. It returns how many it has
// removed.
func (a *Archive) Prune(ctx context.Context, keep int, progress func(done, total int64)) (int, error) {
	removed := len(a.catalog.Steps) - max(keep, 1)
	if removed <= 0 {
		return 0, nil
	}
	if err := a.prune(ctx, removed, progress); err != nil {
		return 0, fmt.Errorf("%w %s: %w", ErrArchive, a.dir, err)
	}
	return removed, nil
}

func (a *Archive) prune(ctx context.Context, first int, progress func(done, total int64)) error {
	if !a.catalog.Steps[first].Full {
		if err := a.VerifyStep(ctx, a.catalog.Steps[first].Number); err != nil {
			return err // damage must not become a sound image
		}
		if err := a.merge(ctx, first, progress); err != nil {
			return err
		}
	}
	old := a.catalog.Steps[:first]
	a.catalog.Steps = slices.Clone(a.catalog.Steps[first:])
	if err := a.save(); err != nil {
		return err
	}
	var errs []error
	for i := range old {
		errs = append(errs, os.Remove(a.path(old[i].File())))
	}
	return errors.Join(errs...)
}

// merge makes the image of a backup one that lies on no other.
func (a *Archive) merge(ctx context.Context, i int, progress func(done, total int64)) (err error) {
	s := &a.catalog.Steps[i]
	src, err := a.OpenStep(s.Number)
	if err != nil {
		return err
	}
	defer src.Close()
	path := a.path(s.File()) + part
	if err := qcow2.Create(path, qcow2.CreateOptions{Size: s.Size}); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(path)
		}
	}()
	dst, err := qcow2.Open(path, false)
	if err != nil {
		return err
	}
	err = convert.Copy(ctx, dst, src, convert.Options{TargetIsZero: true, Progress: progress})
	if err = errors.Join(err, dst.Close()); err != nil {
		return err
	}
	if err := syncFile(path); err != nil {
		return err
	}
	sum, err := fileSum(path)
	if err != nil {
		return err
	}
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	// Until it is renamed either checksum is right: see recover.
	s.Merged = sum
	if err := a.save(); err != nil {
		return err
	}
	if err := a.rename(path, a.path(s.File())); err != nil {
		return err
	}
	s.SHA256, s.Bytes, s.Full, s.Merged = sum, info.Size(), true, ""
	return a.save()
}
