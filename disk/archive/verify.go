package archive

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
)

// Problem is what is wrong with a backup.
type Problem struct {
	Number int    `json:"number"`
	Text   string `json:"problem"`
}

// Verify reads all backups, and tells what is wrong with them: one that is not as it was
// made, is not sound, or lies on another than it should or on one with which something
// is wrong.
func (a *Archive) Verify(ctx context.Context, progress func(done, total int64)) ([]Problem, error) {
	var all []Problem
	bad := 0 // the newest backup that something is wrong with
	for i := range a.catalog.Steps {
		if err := ctx.Err(); err != nil {
			return all, err
		}
		s := &a.catalog.Steps[i]
		switch err := a.files.verify(ctx, i); {
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

// VerifyStep verifies one backup, 0 the newest, and those it lies on.
func (a *Archive) VerifyStep(ctx context.Context, number int) error {
	i, err := a.index(number)
	if err != nil {
		return err
	}
	for k := i - len(a.chain(i)) + 1; k <= i; k++ {
		if err := a.files.verify(ctx, k); err != nil {
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
		if err := a.files.merge(ctx, first, progress); err != nil {
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
		for _, name := range a.files.names(&old[i]) {
			errs = append(errs, os.Remove(a.path(name)))
		}
	}
	return errors.Join(errs...)
}
