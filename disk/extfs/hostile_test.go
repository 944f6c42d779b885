package extfs

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/extfs/extfstest"
)

// image is a file system in memory that can be changed behind right checksums.
type image struct {
	content []byte
	f       *fileSystem
}

func newImage(t testing.TB, content []byte) *image {
	t.Helper()
	f, err := open(&area{node: memory{content: content}, size: int64(len(content))})
	if err != nil {
		t.Fatal(err)
	}
	return &image{slices.Clone(content), f}
}

func (i *image) clone() *image { return &image{slices.Clone(i.content), i.f} }

// super sets n bytes of the superblock.
func (i *image) super(at, n int, v uint64) { i.put(superOffset+int64(at), n, v) }

// desc sets n bytes of a group's descriptor.
func (i *image) desc(g int64, at, n int, v uint64) {
	per := i.f.descsPerBlock()
	i.put(i.f.descBlock(g/per)*i.f.blockSize+g%per*i.f.descSize+int64(at), n, v)
}

func (i *image) put(at int64, n int, v uint64) {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], v)
	copy(i.content[at:at+int64(n)], b[:])
}

// seal computes the checksums of superblock, descriptors, bitmaps and the journal's
// superblock anew.
func (i *image) seal() *image {
	d := i.content
	if i.f.hasRO(roMetadataCsum) {
		binary.LittleEndian.PutUint32(d[superOffset+0x3fc:], crc32c(^uint32(0), d[superOffset:superOffset+0x3fc]))
	}
	for g := range i.f.groups {
		per := i.f.descsPerBlock()
		p := d[i.f.descBlock(g/per)*i.f.blockSize+g%per*i.f.descSize:][:i.f.descSize]
		if i.f.hasRO(roMetadataCsum) {
			at := uint64(binary.LittleEndian.Uint32(p)) * uint64(i.f.blockSize)
			if n := uint64(i.f.clustersPerGroup / 8); at+n <= uint64(len(d)) {
				sum := crc32c(i.f.seed, d[at:at+n])
				binary.LittleEndian.PutUint16(p[0x18:], uint16(sum))
				if i.f.descSize >= 64 {
					binary.LittleEndian.PutUint16(p[0x38:], uint16(sum>>16))
				}
			}
		}
		binary.LittleEndian.PutUint16(p[0x1e:], i.f.descriptorChecksum(g, p))
	}
	if file, err := i.f.openJournalFile(); err == nil && file.blocks > 0 {
		s := d[file.block(0)*i.f.blockSize:][:1024]
		binary.BigEndian.PutUint32(s[0xfc:], 0)
		binary.BigEndian.PutUint32(s[0xfc:], crc32c(^uint32(0), s))
	}
	return i
}

func (i *image) used() (*Map, error) {
	return Used(context.Background(), memory{content: i.content}, 0, int64(len(i.content)))
}

// TestUsedRefuses changes single fields, behind right checksums.
func TestUsedRefuses(t *testing.T) {
	content, _ := contents(t, 20*mib, "-t ext4 -b 1024 -O "+extfstest.Modern)
	plain, _ := contents(t, 20*mib, "-t ext2 -b 1024")
	csum, ext2 := newImage(t, content), newImage(t, plain)
	descAt := fmt.Sprint("descriptor at ", 2048+64)
	bitmap := int64(binary.LittleEndian.Uint32(content[2048+64:])) * 1024
	for _, c := range []struct {
		name   string
		of     *image
		damage func(i *image)
		want   error
		says   string
	}{
		{"magic", csum, func(i *image) { i.super(0x38, 2, 0xef54) }, ErrNone, "at 1024"},
		{"superblock's checksum", csum, func(i *image) { i.super(0x3fc, 4, 1) }, ErrCorrupt, "checksum 0x1, computed"},
		{"checksum type", csum, func(i *image) { i.super(0x175, 1, 2); i.seal() }, ErrUnsupported, "at 1024"},
		{"revision", ext2, func(i *image) { i.super(0x4c, 4, 2) }, ErrUnsupported, "revision 2"},
		{"incompatible feature", csum, func(i *image) { i.super(0x60, 4, 1<<30|uint64(i.f.incompat)); i.seal() }, ErrUnsupported, "0x40000000"},
		{"journal device", ext2, func(i *image) { i.super(0x60, 4, 8) }, ErrUnsupported, "0x8"},
		{"read-only feature", csum, func(i *image) { i.super(0x64, 4, 1<<30|uint64(i.f.ro)); i.seal() }, ErrUnsupported, "0x40000000"},
		{"block size", csum, func(i *image) { i.super(0x18, 4, 7); i.seal() }, ErrCorrupt, "2^7"},
		{"block size's sign", csum, func(i *image) { i.super(0x18, 4, 0xffffffff); i.seal() }, ErrCorrupt, "at 1024"},
		{"too many blocks", csum, func(i *image) { i.super(0x4, 4, 20*1024+1); i.seal() }, ErrCorrupt, "20481 blocks"},
		{"giant", csum, func(i *image) { i.super(0x150, 4, 0xffffffff); i.seal() }, ErrCorrupt, "at 1024"},
		{"no blocks", csum, func(i *image) { i.super(0x4, 4, 0); i.seal() }, ErrCorrupt, "0 blocks"},
		{"group size 0", csum, func(i *image) { i.super(0x20, 4, 0); i.seal() }, ErrCorrupt, "groups of 0"},
		{"group size odd", csum, func(i *image) { i.super(0x20, 4, 8191); i.seal() }, ErrCorrupt, "groups of 8191"},
		{"group size large", csum, func(i *image) { i.super(0x20, 4, 8200); i.seal() }, ErrCorrupt, "groups of 8200"},
		{"first block", csum, func(i *image) { i.super(0x14, 4, 0); i.seal() }, ErrCorrupt, "first block 0"},
		{"inodes", csum, func(i *image) { i.super(0x28, 4, 0); i.seal() }, ErrCorrupt, "0 inodes"},
		{"inode size", csum, func(i *image) { i.super(0x58, 2, 192); i.seal() }, ErrCorrupt, "192"},
		{"descriptor size", csum, func(i *image) { i.super(0xfe, 2, 32); i.seal() }, ErrCorrupt, "32 bytes"},
		{"descriptor's checksum", csum, func(i *image) { i.desc(1, 0x1e, 2, 1) }, ErrCorrupt, descAt},
		{"descriptor", csum, func(i *image) { i.desc(1, 0x10, 1, 77) }, ErrCorrupt, descAt},
		{"bitmap outside", csum, func(i *image) { i.desc(1, 0, 4, 20*1024); i.seal() }, ErrCorrupt, descAt},
		{"bitmap far outside", csum, func(i *image) { i.desc(1, 0x20, 4, 0xffffffff); i.seal() }, ErrCorrupt, descAt},
		{"bitmap is superblock", csum, func(i *image) { i.desc(1, 0, 4, 1); i.seal() }, ErrCorrupt, descAt},
		{"inode bitmap outside", csum, func(i *image) { i.desc(1, 4, 4, 1<<31); i.seal() }, ErrCorrupt, descAt},
		{"inode table passes the end", csum, func(i *image) { i.desc(1, 8, 4, 20*1024-1); i.seal() }, ErrCorrupt, descAt},
		{"bitmap", csum, func(i *image) { i.content[bitmap] ^= 1 }, ErrCorrupt, fmt.Sprint("block bitmap at ", bitmap)},
		{"bitmap without checksum", ext2, func(i *image) {
			i.content[int64(binary.LittleEndian.Uint32(plain[2048+32:]))*1024+100] ^= 1
		}, ErrCorrupt, "group 1: block bitmap at"},
		{"free count", csum, func(i *image) { i.desc(1, 0xc, 2, 3); i.seal() }, ErrCorrupt, "not 3 as"},
	} {
		t.Run(c.name, func(t *testing.T) {
			i := c.of.clone()
			c.damage(i)
			m, err := i.used()
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v, %v; the error is to be %v and say %q", m, err, c.want, c.says)
			}
		})
	}
	good, err := csum.clone().seal().used()
	if err != nil {
		t.Fatal("sealing breaks it:", err)
	}
	// A backup of the superblock that the bitmap says is free is not.
	i := csum.clone()
	clear(i.content[bitmap : bitmap+8])
	if m, err := i.seal().used(); err != nil || !slices.Equal(freeOf(m), freeOf(good)) {
		t.Errorf("free: %v, %v", freeOf(m), err)
	}
	for _, r := range [][2]int64{{-1, 5}, {0, 20*mib + 1}, {20 * mib, 1}, {5, -1}, {1, 1<<63 - 1}} {
		if _, err := Used(context.Background(), memory{content: content}, r[0], r[1]); err == nil {
			t.Errorf("%d bytes at %d", r[1], r[0])
		}
	}
}

// TestJournalRefused changes what is needed of the journal.
func TestJournalRefused(t *testing.T) {
	content := read(t, journalled(t, 1))
	whole := newImage(t, content)
	file, err := whole.f.openJournalFile()
	if err != nil {
		t.Fatal(err)
	}
	super := file.block(0) * 1024
	table := int64(binary.LittleEndian.Uint32(content[2048+8:])) * 1024
	inode := table + 7*whole.f.inodeSize
	big := func(at int64, v uint32) func(*image) {
		return func(i *image) { binary.BigEndian.PutUint32(i.content[at:], v); i.seal() }
	}
	little := func(at int64, v uint32) func(*image) {
		return func(i *image) { binary.LittleEndian.PutUint32(i.content[at:], v) }
	}
	for _, c := range []struct {
		name   string
		damage func(i *image)
		want   error
		says   string
	}{
		{"external", func(i *image) { i.super(0xe0, 4, 0); i.seal() }, ErrUnsupported, "another disk"},
		{"inode number", func(i *image) { i.super(0xe0, 4, 1<<31); i.seal() }, ErrCorrupt, "inode 2147483648"},
		{"size", little(inode+0x6c, 1), ErrUnsupported, fmt.Sprint("inode at ", inode)},
		{"larger than its blocks", little(inode+4, 1<<30), ErrCorrupt, fmt.Sprint("inode at ", inode)},
		{"no blocks", little(inode+4, 0), ErrCorrupt, "is empty"},
		{"extent magic", little(inode+0x28, 0), ErrCorrupt, fmt.Sprint("extents at ", inode+0x28)},
		{"no extents", little(inode+0x28, 0xf30a), ErrCorrupt, "0 entries"},
		{"depth", little(inode+0x2c, 0x00060004), ErrCorrupt, "depth 6"},
		{"extent outside", little(inode+0x28+12+8, 1<<30), ErrCorrupt, fmt.Sprint("at ", inode+0x28+12)},
		{"extent elsewhere", little(inode+0x28+12, 9), ErrCorrupt, "is for block 9"},
		{"magic", big(super, 0), ErrCorrupt, fmt.Sprint("block 0 at ", super)},
		{"type", big(super+4, 3), ErrUnsupported, "type 3"},
		{"feature", big(super+0x28, 0x20), ErrUnsupported, "0x20"},
		{"checksum", func(i *image) { i.content[super+0x200] ^= 1 }, ErrCorrupt, fmt.Sprint("block 0 at ", super)},
		{"block size", big(super+0xc, 4096), ErrCorrupt, "4096"},
		{"longer than the file", big(super+0x10, 1<<31), ErrCorrupt, "block 0 at"},
		{"start", big(super+0x1c, 1<<31), ErrCorrupt, "block 0 at"},
		{"descriptor", func(i *image) { i.content[super+1024+900] ^= 1 }, ErrCorrupt, fmt.Sprint("block 1 at ", super+1024)},
		{"data", func(i *image) { i.content[super+2048+900] ^= 1 }, ErrCorrupt, fmt.Sprint("block 2 at ", super+2048)},
	} {
		t.Run(c.name, func(t *testing.T) {
			i := whole.clone()
			c.damage(i)
			m, err := i.used()
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v, %v; the error is to be %v and say %q", m, err, c.want, c.says)
			}
		})
	}
}

// giant is a disk of any size that begins with a content and is zero elsewhere.
type giant struct {
	memory
	size int64
}

func (g giant) Size() int64 { return g.size }

func (g giant) Readv(bufs [][]byte, off int64) error {
	for _, b := range bufs {
		clear(b)
		if off < int64(len(g.content)) {
			copy(b, g.content[off:])
		}
		off += int64(len(b))
	}
	return nil
}

// TestGiantSizesNeedLittleMemory gives small file systems the sizes of giant disks.
func TestGiantSizesNeedLittleMemory(t *testing.T) {
	content, _ := contents(t, 20*mib, "-t ext4 -b 1024 -O "+extfstest.Modern)
	for _, high := range []uint64{0, 1, 2, 0x1ffff, 0xfffff} {
		i := newImage(t, content)
		i.super(0x150, 4, high)
		i.super(0x4, 4, 0xfffffff0)
		i.seal()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := Used(context.Background(), giant{memory{content: i.content}, 1 << 62}, 0, 1<<62)
		runtime.ReadMemStats(&after)
		if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrUnsupported) {
			t.Errorf("%#x: %v", high, err)
		}
		if n := after.TotalAlloc - before.TotalAlloc; n > 16*mib {
			t.Errorf("%#x: %d bytes were allocated: %v", high, n, err)
		}
	}
}

// FuzzUsed changes bytes of real file systems where their structure is, and seals
// them again.
func FuzzUsed(f *testing.F) {
	var seeds []*image
	for _, v := range variants {
		switch v.name {
		case "ext2 1k", "ext4 1k", "ext4 uninit_bg":
			path := extfstest.Make(f, v.size/5, strings.Fields(v.args)...)
			extfstest.Populate(f, path, 10, 100<<10, 1)
			seeds = append(seeds, newImage(f, read(f, path)))
		}
	}
	for i := range 2 {
		seeds = append(seeds, newImage(f, read(f, journalled(f, i))))
	}
	for i := range seeds {
		f.Add(uint8(i), []byte{})
		f.Add(uint8(i), []byte{0, 0x64, 0, 0xff, 1, 0x12, 0, 2, 2, 0x28, 0, 1, 3, 0x1c, 0, 1, 4, 12, 0, 9})
		f.Add(uint8(i), []byte{1, 0, 0, 5, 1, 0x20, 0, 1, 1, 0x40, 0, 7})
	}
	f.Fuzz(func(t *testing.T, which uint8, changes []byte) {
		i := seeds[int(which)%len(seeds)]
		fs, whole := i.f, i.f.area.node.(memory).content
		where := []int64{superOffset, fs.descBlock(0) * fs.blockSize}
		if file, err := fs.openJournalFile(); err == nil {
			raw := whole[fs.descBlock(0)*fs.blockSize:][:fs.descSize]
			d, err := fs.parseFields(raw)
			if err != nil {
				t.Fatal(err)
			}
			where = append(where, d.inodeTable*fs.blockSize+7*fs.inodeSize, file.block(0)*fs.blockSize, file.block(1)*fs.blockSize)
		}
		const reach = 4096
		// Only that much is put back, as all of it takes long.
		defer func() {
			for _, at := range where {
				copy(i.content[at:], whole[at:at+reach])
			}
			table := where[1]
			copy(i.content[table:], whole[table:table+fs.descBlocks*fs.blockSize])
		}()
		for ; len(changes) >= 4; changes = changes[4:] {
			at := where[int(changes[0])%len(where)] + int64(binary.LittleEndian.Uint16(changes[1:])%reach)
			i.content[at] = changes[3]
		}
		m, err := i.seal().used()
		if err != nil {
			for _, known := range []error{ErrNone, ErrUnsupported, ErrCorrupt} {
				if errors.Is(err, known) {
					return
				}
			}
			t.Fatal(err)
		}
		free := int64(0)
		for start, end := range m.Free() {
			if start < superOffset+superSize || end <= start || end > int64(len(i.content)) {
				t.Fatalf("bytes %d to %d are free, of %d", start, end, len(i.content))
			}
			free += end - start
		}
		if free != m.FileSystems()[0].FreeBytes || !slices.Equal(freeOf(m), complement(m)) {
			t.Fatalf("%d bytes are free: %+v", free, m.FileSystems())
		}
	})
}
