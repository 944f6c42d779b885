package extfs

import (
	"context"
	"encoding/binary"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/extfs/extfstest"
	"github.com/gnomon-vmm/gnomon/disk/extfs/partition"
)

const mib = 1 << 20

// part is a partition of a disk that mbr makes; offset and size in MiB.
type part struct {
	offset, size int
	kind         byte
	content      []byte
}

// mbr makes a disk of size MiB. Parts from the fourth on are logical, one MiB
// behind their tables.
func mbr(size int, parts ...part) []byte {
	d := make([]byte, size*mib)
	entry := func(table, i int, kind byte, first, count int) {
		p := d[table*mib+446+i*16:]
		p[4] = kind
		binary.LittleEndian.PutUint32(p[8:], uint32(first*2048))
		binary.LittleEndian.PutUint32(p[12:], uint32(count*2048))
		d[table*mib+510], d[table*mib+511] = 0x55, 0xaa
	}
	for i, p := range parts {
		copy(d[p.offset*mib:], p.content)
		if i < 3 {
			entry(0, i, p.kind, p.offset, p.size)
			continue
		}
		first := parts[3].offset - 1
		if i == 3 {
			entry(0, 3, 0x0f, first, size-first)
		} else {
			entry(parts[i-1].offset-1, 1, 0x05, p.offset-1-first, p.size+1)
		}
		entry(p.offset-1, 0, p.kind, 1, p.size)
	}
	return d
}

// contents makes a file system with files, and tells what is free in it.
func contents(t *testing.T, size int64, args string) ([]byte, []extfstest.Extent) {
	t.Helper()
	path := extfstest.Make(t, size, strings.Fields(args)...)
	extfstest.Populate(t, path, 20, size/100, 5)
	return read(t, path), extfstest.Free(t, path)
}

// TestDisk maps a disk of many partitions.
func TestDisk(t *testing.T) {
	one, oneFree := contents(t, 20*mib, "-t ext4 -b 1024 -O "+extfstest.Modern)
	two, twoFree := contents(t, 10*mib, "-t ext2 -b 1024")
	mounted := slices.Clone(two)
	mounted[superOffset+0x3a] = 0 // not unmounted
	failed := slices.Clone(two)
	failed[superOffset+0x3a] = 3 // with errors
	damaged := slices.Clone(one)
	damaged[superOffset+0x100]++
	luks := slices.Clone(one)
	copy(luks, "LUKS\xba\xbe")
	d := mbr(120,
		part{40, 30, 0x83, one}, // larger than the file system
		part{1, 10, 0x82, nil},
		part{12, 10, 0x83, mounted},
		part{72, 11, 0x83, two},
		part{84, 10, 0x8e, failed},
		part{95, 20, 0x83, damaged[:20*mib]},
	)
	m, err := Disk(context.Background(), memory{content: d})
	if err != nil {
		t.Fatal(err)
	}
	var want []extfstest.Extent
	for _, e := range oneFree {
		want = append(want, extfstest.Extent{Start: 40*mib + e.Start, End: 40*mib + e.End})
	}
	for _, e := range twoFree {
		want = append(want, extfstest.Extent{Start: 72*mib + e.Start, End: 72*mib + e.End})
	}
	if got := freeOf(m); !slices.Equal(got, want) {
		t.Errorf("free:\n%v\nnot:\n%v", got, want)
	}
	if got := complement(m); !slices.Equal(got, want) {
		t.Errorf("between what is used:\n%v\nnot:\n%v", got, want)
	}
	for _, u := range []struct {
		offset int64
		reason error
	}{{1, ErrNone}, {12, ErrUnreliable}, {84, ErrUnreliable}, {95, ErrCorrupt}} {
		i := slices.IndexFunc(m.Unknown(), func(x Unknown) bool { return x.Offset == u.offset*mib })
		if i < 0 || !errors.Is(m.Unknown()[i].Reason, u.reason) {
			t.Errorf("partition at %d MiB: %v in %v", u.offset, u.reason, m.Unknown())
		}
	}
	if len(m.Unknown()) != 4 || len(m.FileSystems()) != 2 {
		t.Errorf("%v and %v", m.Unknown(), m.FileSystems())
	}

	t.Run("whole", func(t *testing.T) {
		m, err := Disk(context.Background(), memory{content: one})
		if err != nil || !slices.Equal(freeOf(m), oneFree) {
			t.Errorf("%v, %v, not %v", freeOf(m), err, oneFree)
		}
	})
	for name, c := range map[string]struct {
		disk   []byte
		reason error
	}{
		"empty":       {make([]byte, mib), ErrNone},
		"tiny":        {make([]byte, 512), ErrNone},
		"LUKS":        {luks, ErrAmbiguous},
		"superblock":  {mbr(30, part{offset: 1, size: 20, kind: 0x83, content: one}), ErrAmbiguous},
		"overlapping": {mbr(30, part{1, 20, 0x83, one}, part{5, 4, 0x83, nil}), partition.ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			if name == "superblock" {
				copy(c.disk[superOffset:], one[superOffset:2*superOffset])
			}
			m, err := Disk(context.Background(), memory{content: c.disk})
			if err != nil {
				t.Fatal(err)
			}
			if len(freeOf(m)) != 0 || m.UsedBytes() != int64(len(c.disk)) {
				t.Errorf("free: %v", freeOf(m))
			}
			if u := m.Unknown(); len(u) != 1 || !errors.Is(u[0].Reason, c.reason) {
				t.Errorf("%v, not %v", u, c.reason)
			}
		})
	}
	t.Run("broken", func(t *testing.T) {
		if _, err := Disk(context.Background(), block.Failed(memory{content: one}, os.ErrInvalid)); !errors.Is(err, ErrRead) || !errors.Is(err, os.ErrInvalid) {
			t.Error(err)
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if _, err := Disk(ctx, memory{content: one}); !errors.Is(err, ErrRead) || !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}
