package extfs

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/extfs/partition"
)

// Disk maps a whole disk: a file system on all of it, or one in each partition of
// its table. All that is not known for certain to be free counts as used: tables
// and gaps between partitions, other file systems, and those that are damaged or
// whose State is not reliable; Map.Unknown tells of them. Only an error of
// reading the disk, which wraps ErrRead, or of ctx is returned.
func Disk(ctx context.Context, node block.Node) (*Map, error) {
	m := Everything(node.Size())
	table, err := partition.Read(node)
	if err != nil && errors.Is(err, partition.ErrRead) {
		return nil, fmt.Errorf("%w: %w", ErrRead, err)
	}
	whole := &area{node: node, size: node.Size()}
	switch {
	case errors.Is(err, partition.ErrNone):
		return m, m.add(ctx, whole)
	case err != nil:
		m.unknown = []Unknown{{0, node.Size(), err}}
		return m, nil
	}
	// A superblock outside of partitions was there before the table, or is what
	// the disk is used as in spite of it.
	if _, err := open(whole); !errors.Is(err, ErrNone) {
		if errors.Is(err, ErrRead) {
			return nil, err
		}
		m.unknown = []Unknown{{0, node.Size(), fmt.Errorf("%w: partitions, and a superblock at %d", ErrAmbiguous, superOffset)}}
		return m, nil
	}
	parts := slices.Clone(table.Partitions)
	slices.SortFunc(parts, func(a, b partition.Partition) int {
		if a.Offset < b.Offset {
			return -1
		}
		return 1
	})
	for _, p := range parts {
		if err := m.add(ctx, &area{node: node, base: p.Offset, size: p.Size}); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// add maps an area behind all that was added before.
func (m *Map) add(ctx context.Context, a *area) error {
	r, err := trusted(ctx, a)
	switch {
	case err == nil:
		m.regions = append(m.regions, r)
	case errors.Is(err, ErrRead):
		return err
	default:
		m.unknown = append(m.unknown, Unknown{a.base, a.size, err})
	}
	return nil
}

// trusted maps a file system if there is no doubt about it.
func trusted(ctx context.Context, a *area) (*region, error) {
	f, err := open(a)
	if err != nil {
		return nil, err
	}
	if err := checkForeign(a); err != nil {
		return nil, err
	}
	if s := f.describe().State; !s.Reliable() {
		return nil, fmt.Errorf("%w: the file system at %d is %s", ErrUnreliable, a.base, s)
	}
	return f.load(ctx)
}
