package extfs

import (
	"context"
	"encoding/binary"
	"fmt"
)

// Bits of bg_flags.
const groupBlockUninit = 0x2

const (
	// readAtOnce is how much of descriptors or bitmaps is read by one request.
	readAtOnce = 1 << 20
	// maxBitmaps bounds the memory for the bitmaps of groups that are neither
	// free nor used as a whole: 32 TiB with blocks of 4 KiB.
	maxBitmaps = 1 << 30
)

// descriptor is what is needed of a struct ext4_group_desc.
type descriptor struct {
	blockBitmap, inodeBitmap, inodeTable int64
	free                                 uint32 // clusters
	bitmapChecksum                       uint32
	uninit                               bool // there is no bitmap on the disk
}

// read fills p from byte off of the file system on, as replaying the journal
// leaves it.
func (f *fileSystem) read(p []byte, off int64) error {
	if err := f.area.read(p, off); err != nil {
		return err
	}
	return f.journal.apply(f, p, off)
}

// byteOf is where on the disk a block is.
func (f *fileSystem) byteOf(block int64) int64 { return f.area.base + block*f.blockSize }

// load reads which clusters are used.
func (f *fileSystem) load(ctx context.Context) (*region, error) {
	descs, err := f.readDescriptors(ctx)
	if err != nil {
		return nil, err
	}
	r := newRegion(f)
	if err := f.readBitmaps(ctx, descs, r); err != nil {
		return nil, err
	}
	if err := f.markMetadata(ctx, descs, r); err != nil {
		return nil, err
	}
	if err := f.checkFree(descs, r); err != nil {
		return nil, err
	}
	return r, nil
}

// readDescriptors reads and checks the descriptors of all groups.
func (f *fileSystem) readDescriptors(ctx context.Context) ([]descriptor, error) {
	descs := make([]descriptor, 0, min(f.groups, readAtOnce/f.descSize))
	buf := make([]byte, readAtOnce)
	for i := int64(0); i < f.descBlocks; {
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrRead, err)
		}
		first, n := f.descBlock(i), int64(1)
		for i+n < f.descBlocks && f.descBlock(i+n) == first+n && (n+1)*f.blockSize <= readAtOnce {
			n++
		}
		blocks := buf[:n*f.blockSize]
		if err := f.read(blocks, first*f.blockSize); err != nil {
			return nil, err
		}
		for at := int64(0); at < int64(len(blocks)) && int64(len(descs)) < f.groups; at += f.descSize {
			g := int64(len(descs))
			d, err := f.parseDescriptor(g, blocks[at:at+f.descSize])
			if err != nil {
				return nil, fmt.Errorf("%w: group %d: descriptor at %d: %w", ErrCorrupt, g, f.byteOf(first)+at, err)
			}
			descs = append(descs, d)
		}
		i += n
	}
	return descs, nil
}

func (f *fileSystem) parseDescriptor(g int64, p []byte) (descriptor, error) {
	if f.groupChecksums() {
		if got, want := binary.LittleEndian.Uint16(p[0x1e:]), f.descriptorChecksum(g, p); got != want {
			return descriptor{}, fmt.Errorf("checksum %#x, computed %#x", got, want)
		}
	}
	return f.parseFields(p)
}

// parseFields is parseDescriptor without the checksum.
func (f *fileSystem) parseFields(p []byte) (descriptor, error) {
	u16 := func(at int) uint16 { return binary.LittleEndian.Uint16(p[at:]) }
	u32 := func(at int) uint32 { return binary.LittleEndian.Uint32(p[at:]) }
	d := descriptor{
		free:           uint32(u16(0xc)),
		bitmapChecksum: uint32(u16(0x18)),
		// Flags are there only with checksums.
		uninit: f.groupChecksums() && u16(0x12)&groupBlockUninit != 0,
	}
	where := [3]uint64{uint64(u32(0x0)), uint64(u32(0x4)), uint64(u32(0x8))}
	if f.descSize >= 64 {
		for i := range where {
			where[i] |= uint64(u32(0x20+4*i)) << 32
		}
		d.free |= uint32(u16(0x2c)) << 16
		d.bitmapChecksum |= uint32(u16(0x38)) << 16
	}
	for i, w := range where {
		n := uint64(1)
		if i == 2 {
			n = uint64(f.inodeTableBlocks())
		}
		if w <= uint64(f.superBlock()) || w > uint64(f.blocks) || n > uint64(f.blocks)-w {
			return descriptor{}, fmt.Errorf("%s at block %d of %d", [...]string{"block bitmap", "inode bitmap", "inode table"}[i], w, f.blocks)
		}
	}
	d.blockBitmap, d.inodeBitmap, d.inodeTable = int64(where[0]), int64(where[1]), int64(where[2])
	return d, nil
}

func (f *fileSystem) inodeTableBlocks() int64 {
	return (f.inodesPerGroup*f.inodeSize + f.blockSize - 1) / f.blockSize
}

// descriptorChecksum is of all of a descriptor but the checksum itself.
func (f *fileSystem) descriptorChecksum(g int64, p []byte) uint16 {
	var group [4]byte
	binary.LittleEndian.PutUint32(group[:], uint32(g))
	if f.hasRO(roMetadataCsum) {
		c := crc32c(crc32c(f.seed, group[:]), p[:0x1e])
		c = crc32c(c, []byte{0, 0})
		return uint16(crc32c(c, p[0x20:]))
	}
	c := crc16(crc16(^uint16(0), f.uuid[:]), group[:])
	return crc16(crc16(c, p[:0x1e]), p[0x20:])
}

// readBitmaps reads the bitmaps of all groups that have one; those that are next
// to each other by one request.
func (f *fileSystem) readBitmaps(ctx context.Context, descs []descriptor, r *region) error {
	buf := make([]byte, max(readAtOnce, f.blockSize))
	for g := 0; g < len(descs); {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("%w: %w", ErrRead, err)
		}
		if descs[g].uninit {
			r.groups[g] = allFree
			g++
			continue
		}
		first, n := descs[g].blockBitmap, 1
		for g+n < len(descs) && !descs[g+n].uninit && descs[g+n].blockBitmap == first+int64(n) && int64(n+1)*f.blockSize <= readAtOnce {
			n++
		}
		if err := f.read(buf[:int64(n)*f.blockSize], first*f.blockSize); err != nil {
			return err
		}
		for i := range n {
			bitmap := buf[int64(i)*f.blockSize:][:f.clustersPerGroup/8]
			if err := f.checkBitmap(&descs[g+i], bitmap); err != nil {
				return fmt.Errorf("%w: group %d: block bitmap at %d: %w", ErrCorrupt, g+i, f.byteOf(first+int64(i)), err)
			}
			if err := r.set(int64(g+i), bitmap); err != nil {
				return err
			}
		}
		g += n
	}
	return nil
}

func (f *fileSystem) checkBitmap(d *descriptor, bitmap []byte) error {
	if !f.hasRO(roMetadataCsum) {
		return nil
	}
	want := crc32c(f.seed, bitmap)
	if f.descSize < 64 {
		want &= 0xffff
	}
	if d.bitmapChecksum != want {
		return fmt.Errorf("checksum %#x, computed %#x", d.bitmapChecksum, want)
	}
	return nil
}

// markMetadata marks what the file system itself consists of: in groups without
// a bitmap nothing else tells.
func (f *fileSystem) markMetadata(ctx context.Context, descs []descriptor, r *region) error {
	for g := range f.groups {
		if g%1024 == 0 && ctx.Err() != nil {
			return fmt.Errorf("%w: %w", ErrRead, ctx.Err())
		}
		d := &descs[g]
		if first, n := f.baseBlocks(g); n > 0 {
			if g == 0 {
				// With bigalloc a group may begin before the superblock's block.
				first, n = f.firstBlock, n+first-f.firstBlock
			}
			if err := f.mark(r, first, min(n, f.groupEnd(g)-first)); err != nil {
				return err
			}
		}
		for _, run := range [...]struct{ first, n int64 }{{d.blockBitmap, 1}, {d.inodeBitmap, 1}, {d.inodeTable, f.inodeTableBlocks()}} {
			if err := f.mark(r, run.first, run.n); err != nil {
				return err
			}
		}
	}
	return nil
}

// mark has n blocks from first on be used, whatever groups they are in.
func (f *fileSystem) mark(r *region, first, n int64) error {
	for end := first + n; first < end; {
		g := (first - f.firstBlock) / f.blocksPerGroup
		next := min(end, f.groupEnd(g))
		start := f.groupStart(g)
		if err := r.mark(g, (first-start)/f.ratio, (next-start+f.ratio-1)/f.ratio); err != nil {
			return err
		}
		first = next
	}
	return nil
}

// checkFree compares the map with how many clusters of each group are free.
func (f *fileSystem) checkFree(descs []descriptor, r *region) error {
	for g, d := range descs {
		if free := r.groups[g].free(r.clusters(int64(g))); free != int64(d.free) {
			return fmt.Errorf("%w: group %d: block bitmap at %d: %d clusters are free, not %d as the descriptor says",
				ErrCorrupt, g, f.byteOf(d.blockBitmap), free, d.free)
		}
	}
	return nil
}
