package extfs

import (
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/extfs/extfstest"
)

// variants are file systems as mke2fs makes them, by what the map has to know.
var variants = []struct {
	name string
	size int64
	args string
	kind string
}{
	{"ext2 1k", 40 << 20, "-t ext2 -b 1024", "ext2"},
	{"ext2 revision 0", 20 << 20, "-t ext2 -b 1024 -r 0", "ext2"},
	{"ext2 no sparse_super", 80 << 20, "-t ext2 -b 1024 -O none", "ext2"},
	{"ext2 2k", 60 << 20, "-t ext2 -b 2048 -g 8192", "ext2"},
	{"ext3 4k", 200 << 20, "-t ext3 -b 4096 -O has_journal,filetype,sparse_super", "ext3"},
	{"ext3 1k resize", 64 << 20, "-t ext3 -b 1024 -O has_journal,resize_inode", "ext3"},
	{"ext4 default", 256 << 20, "-t ext4 -b 4096 -O " + modern, "ext4"},
	{"ext4 1k", 100 << 20, "-t ext4 -b 1024 -O " + modern, "ext4"},
	{"ext4 2k", 100 << 20, "-t ext4 -b 2048 -O " + modern, "ext4"},
	{"ext4 64k", 1 << 30, "-t ext4 -b 65536 -O " + modern, "ext4"},
	{"ext4 uninit_bg", 160 << 20, "-t ext4 -b 1024 -O has_journal,extent,flex_bg,uninit_bg,sparse_super", "ext4"},
	{"ext4 uninit_bg 64bit", 160 << 20, "-t ext4 -b 1024 -O extent,flex_bg,uninit_bg,sparse_super,64bit", "ext4"},
	{"ext4 no flex_bg", 160 << 20, "-t ext4 -b 1024 -O has_journal,extent,metadata_csum,sparse_super,resize_inode", "ext4"},
	{"ext4 32bit metadata_csum", 100 << 20, "-t ext4 -b 1024 -O extent,flex_bg,metadata_csum,^64bit", "ext4"},
	{"ext4 meta_bg", 1 << 30, "-t ext4 -b 1024 -O extent,meta_bg,metadata_csum,64bit,sparse_super,^resize_inode", "ext4"},
	{"ext4 meta_bg flex_bg 32bit", 1 << 30, "-t ext4 -b 1024 -O extent,flex_bg,meta_bg,uninit_bg,^resize_inode", "ext4"},
	{"ext2 meta_bg", 600 << 20, "-t ext2 -b 1024 -O meta_bg,^resize_inode", "ext2"},
	{"ext4 sparse_super2", 200 << 20, "-t ext4 -b 1024 -O extent,sparse_super2,metadata_csum,^resize_inode,^sparse_super", "ext4"},
	{"ext4 sparse_super2 no backups", 200 << 20, "-t ext4 -b 1024 -E num_backup_sb=0 -O extent,sparse_super2,metadata_csum,^resize_inode,^sparse_super", "ext4"},
	{"ext4 bigalloc 64k", 512 << 20, "-t ext4 -b 4096 -C 65536 -O bigalloc," + modern, "ext4"},
	{"ext4 bigalloc 1k", 300<<20 + 5<<10, "-t ext4 -b 1024 -C 16384 -O bigalloc," + modern + ",^resize_inode", "ext4"},
	{"ext4 bigalloc small groups", 300 << 20, "-t ext4 -b 4096 -C 8192 -g 2048 -O bigalloc," + modern, "ext4"},
	{"ext4 csum_seed", 64 << 20, "-t ext4 -b 4096 -O metadata_csum_seed," + modern, "ext4"},
	{"ext4 small groups", 64 << 20, "-t ext4 -b 4096 -g 1024 -O " + modern, "ext4"},
	{"ext4 packed metadata", 300 << 20, "-t ext4 -b 1024 -E packed_meta_blocks=1 -O " + modern, "ext4"},
	{"ext4 odd end", 100<<20 + 3<<10, "-t ext4 -b 1024 -O " + modern, "ext4"},
	{"ext4 quota, project, orphan_file", 64 << 20, "-t ext4 -b 4096 -I 512 -O quota,project,orphan_file,inline_data,ea_inode,large_dir,verity,encrypt,casefold," + modern, "ext4"},
	{"ext4 mmp", 64 << 20, "-t ext4 -b 4096 -O mmp," + modern, "ext4"},
	{"ext4 inodes of 1k", 64 << 20, "-t ext4 -b 4096 -I 1024 -N 20000 -O " + modern, "ext4"},
}

const modern = extfstest.Modern

// TestUsedEqualsDumpe2fs compares maps, of empty file systems and of those that
// were written to, with dumpe2fs's.
func TestUsedEqualsDumpe2fs(t *testing.T) {
	for i, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			path := extfstest.Make(t, v.size, strings.Fields(v.args)...)
			compare(t, path, v.kind)
			if strings.Contains(v.args, "mmp") {
				return // debugfs would wait for other hosts to tell that they use it
			}
			extfstest.Populate(t, path, 30, min(v.size/200, 400<<10), uint64(i))
			compare(t, path, v.kind)
		})
	}
}

func compare(t *testing.T, path, kind string) {
	t.Helper()
	node := openRaw(t, path)
	defer node.Close()
	m, err := Used(context.Background(), node, 0, node.Size())
	if err != nil {
		t.Fatal(err)
	}
	want, got := extfstest.Free(t, path), freeOf(m)
	if !slices.Equal(got, want) {
		t.Fatalf("free:\n%v\ndumpe2fs:\n%v", got, want)
	}
	if between := complement(m); !slices.Equal(between, want) {
		t.Fatalf("between what is used:\n%v\ndumpe2fs:\n%v", between, want)
	}
	f, err := open(&area{node: node, size: node.Size()})
	if err != nil {
		t.Fatal(err)
	}
	var supers []int64
	for g := range f.groups {
		if f.hasSuper(g) {
			supers = append(supers, f.superIn(g))
		}
	}
	if want := extfstest.Superblocks(t, path); !slices.Equal(supers, want) {
		t.Fatalf("superblocks: %v, dumpe2fs: %v", supers, want)
	}
	var free int64
	for _, e := range want {
		free += e.End - e.Start
	}
	fs := m.FileSystems()
	if len(fs) != 1 || fs[0].Kind != kind || fs[0].State != Clean || fs[0].FreeBytes != free {
		t.Fatalf("described as %+v; %d bytes are free", fs, free)
	}
	if m.UsedBytes() != node.Size()-free {
		t.Fatalf("%d bytes are used, of %d with %d free", m.UsedBytes(), node.Size(), free)
	}
}

func TestRunDoesNotAllocate(t *testing.T) {
	content, want := contents(t, 20*mib, "-t ext4 -b 1024 -O "+extfstest.Modern)
	m, err := Disk(context.Background(), memory{content: content})
	if err != nil {
		t.Fatal(err)
	}
	runs := 0
	if n := testing.AllocsPerRun(5, func() {
		runs = 0
		for off := int64(0); off < m.End(); runs++ {
			_, off = m.Run(off, m.End())
		}
	}); n != 0 || runs < 2*len(want) {
		t.Errorf("%v allocations for %d runs", n, runs)
	}
}
