package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/gnomon-vmm/gnomon/disk/bitmap"
	"github.com/gnomon-vmm/gnomon/disk/block"
)

// maxBitmapMemory is what the bitmaps of an image that is written have together,
// in bytes.
const maxBitmapMemory = 512 << 20

// BitmapInfo describes a persistent bitmap.
type BitmapInfo struct {
	Name        string
	Granularity int64 // bytes
	Enabled     bool  // it records writes
	// Inconsistent: the disk was written and not closed, so the bitmap does not tell
	// of all writes. It can only be removed.
	Inconsistent bool
}

// bitmaps are those of an image that is written.
type bitmaps struct {
	recording atomic.Pointer[[]*bitmap.Bitmap] // nil where there are none

	mu      sync.Mutex
	all     []keptBitmap  // guarded by mu
	removed []bitmapEntry // which the file still has; guarded by mu
	changed bool          // all is not what the file has; guarded by mu
	marked  atomic.Bool   // the file says of all that they are in use
}

// keptBitmap is a bitmap with its place in the file, if it has one.
type keptBitmap struct {
	bitmapEntry
	*bitmap.Bitmap // nil: it is inconsistent
}

// Bitmaps lists the image's persistent bitmaps.
func (n *Node) Bitmaps() ([]BitmapInfo, error) {
	var out []BitmapInfo
	if n.w != nil {
		n.bitmaps.mu.Lock()
		defer n.bitmaps.mu.Unlock()
		for _, k := range n.bitmaps.all {
			enabled := k.flags&bitmapAuto != 0
			if k.Bitmap != nil {
				enabled = k.Enabled()
			}
			out = append(out, BitmapInfo{k.name, k.granularity, enabled, k.Bitmap == nil})
		}
		return out, nil
	}
	all, err := n.bitmapDirectory()
	if err != nil {
		return nil, fmt.Errorf("disk %s: %w", n.path, err)
	}
	for _, e := range all {
		out = append(out, BitmapInfo{e.name, e.granularity, e.flags&bitmapAuto != 0, e.flags&bitmapInUse != 0})
	}
	return out, nil
}

// Bitmap returns a persistent bitmap: of an image that is written the one that
// records its writes and is stored when it is closed, otherwise a copy.
func (n *Node) Bitmap(name string) (*bitmap.Bitmap, error) {
	if n.w != nil {
		n.bitmaps.mu.Lock()
		defer n.bitmaps.mu.Unlock()
		if i := n.bitmapIndex(name); i >= 0 {
			if b := n.bitmaps.all[i].Bitmap; b != nil {
				return b, nil
			}
			return nil, fmt.Errorf("disk %s: %w %s: it is inconsistent: remove it", n.path, ErrBitmap, name)
		}
		return nil, n.noBitmap(name)
	}
	all, err := n.bitmapDirectory()
	if err != nil {
		return nil, fmt.Errorf("disk %s: %w", n.path, err)
	}
	for _, e := range all {
		if e.name == name {
			b, err := n.loadBitmap(e)
			if err != nil {
				return nil, fmt.Errorf("disk %s: %w", n.path, err)
			}
			return b, nil
		}
	}
	return nil, n.noBitmap(name)
}

func (n *Node) noBitmap(name string) error {
	return fmt.Errorf("disk %s: %w %s: there is none of this name", n.path, ErrBitmap, name)
}

// bitmapIndex finds a bitmap, or returns -1. Preconditions: bitmaps.mu is held.
func (n *Node) bitmapIndex(name string) int {
	return slices.IndexFunc(n.bitmaps.all, func(k keptBitmap) bool { return k.name == name })
}

// AddBitmap makes a bitmap one of the image: it records writes from now on, if it is
// enabled, and is stored when the image is closed.
func (n *Node) AddBitmap(b *bitmap.Bitmap) error {
	n.bitmaps.mu.Lock()
	defer n.bitmaps.mu.Unlock()
	reason := ""
	switch {
	case n.w == nil:
		return fmt.Errorf("disk %s: %w", n.path, block.ErrReadOnly)
	case n.header.Version < 3:
		return fmt.Errorf("disk %s: %w: persistent bitmaps in version 2", n.path, ErrUnsupported)
	case b.Name() == "" || len(b.Name()) > maxBitmapName:
		reason = fmt.Sprintf("names of 1 to %d bytes are possible", maxBitmapName)
	case b.Size() != n.Size():
		reason = fmt.Sprintf("it is of a disk of %d bytes, and not of %d", b.Size(), n.Size())
	case n.bitmapIndex(b.Name()) >= 0:
		reason = "there is one of this name"
	case len(n.bitmaps.all) == maxBitmaps:
		reason = "there are too many"
	case n.header.Bitmaps == nil && !n.header.roomForBitmaps():
		reason = "the header has no room for bitmaps: larger clusters give it some"
	}
	if reason != "" {
		return fmt.Errorf("disk %s: %w %s: %s", n.path, ErrBitmap, b.Name(), reason)
	}
	n.bitmaps.all = append(n.bitmaps.all, keptBitmap{bitmapEntry{name: b.Name(), granularity: b.Granularity()}, b})
	n.bitmaps.changed = true
	n.publishBitmaps()
	return nil
}

// RemoveBitmap takes a bitmap away from the image.
func (n *Node) RemoveBitmap(name string) error {
	n.bitmaps.mu.Lock()
	defer n.bitmaps.mu.Unlock()
	if n.w == nil {
		return fmt.Errorf("disk %s: %w", n.path, block.ErrReadOnly)
	}
	i := n.bitmapIndex(name)
	if i < 0 {
		return n.noBitmap(name)
	}
	if e := n.bitmaps.all[i].bitmapEntry; e.tableAt != 0 {
		n.bitmaps.removed = append(n.bitmaps.removed, e)
	}
	n.bitmaps.all = slices.Delete(n.bitmaps.all, i, i+1)
	n.bitmaps.changed = true
	n.publishBitmaps()
	return nil
}

// publishBitmaps has record see what there is now. Preconditions: bitmaps.mu is held.
func (n *Node) publishBitmaps() {
	var all []*bitmap.Bitmap
	for _, k := range n.bitmaps.all {
		if k.Bitmap != nil {
			all = append(all, k.Bitmap)
		}
	}
	if all == nil {
		n.bitmaps.recording.Store(nil)
		return
	}
	n.bitmaps.recording.Store(&all)
}

// openBitmaps reads the bitmaps of an image that is going to be written, and clears
// the autoclear features that this package does not know.
func (n *Node) openBitmaps() error {
	h := n.header
	if h.Autoclear&^AutoclearBitmaps != 0 {
		if err := n.writeAutoclear(h.Autoclear & AutoclearBitmaps); err != nil {
			return err
		}
	}
	if h.Bitmaps != nil && !h.consistentBitmaps() {
		return n.dropBitmapsExt() // who wrote the disk did not know of them
	}
	dir, err := n.bitmapDirectory()
	if err != nil {
		return err
	}
	memory := int64(0)
	for _, e := range dir {
		k := keptBitmap{bitmapEntry: e}
		if e.flags&bitmapInUse == 0 {
			if memory += n.Size() / e.granularity / 8; memory > maxBitmapMemory {
				return fmt.Errorf("%w: bitmaps of more than %d bytes", ErrUnsupported, maxBitmapMemory)
			}
			if k.Bitmap, err = n.loadBitmap(e); err != nil {
				return err
			}
		}
		if n.bitmapIndex(e.name) >= 0 {
			return fmt.Errorf("%w: two bitmaps have the name %s", ErrCorrupt, e.name)
		}
		n.bitmaps.all = append(n.bitmaps.all, k)
	}
	n.publishBitmaps()
	return nil
}

// record tells the bitmaps of a write, before it is made. Before the first one the
// file says that its bitmaps do not tell of all writes.
func (n *Node) record(off, length int64) error {
	all := n.bitmaps.recording.Load()
	if all == nil {
		return nil
	}
	if !n.bitmaps.marked.Load() {
		if err := n.markBitmaps(); err != nil {
			return fmt.Errorf("disk %s: mark bitmaps as in use: %w", n.path, err)
		}
	}
	for _, b := range *all {
		b.Record(off, length)
	}
	return nil
}

// RecordChange tells the image's bitmaps that a range of the disk changes otherwise
// than by requests of this node.
func (n *Node) RecordChange(off, length int64) error { return n.record(off, length) }

func (n *Node) markBitmaps() error {
	n.bitmaps.mu.Lock()
	defer n.bitmaps.mu.Unlock()
	if n.bitmaps.marked.Load() {
		return nil
	}
	for i := range n.bitmaps.all {
		k := &n.bitmaps.all[i]
		if k.Bitmap == nil || k.flagsAt == 0 {
			continue
		}
		k.flags |= bitmapInUse
		if err := n.file.Writev([][]byte{binary.BigEndian.AppendUint32(nil, k.flags)}, k.flagsAt); err != nil {
			return err
		}
	}
	if err := n.file.Flush(); err != nil {
		return err
	}
	n.bitmaps.marked.Store(true)
	return nil
}

// storeBitmaps writes the bitmaps to new places, and then has the header point to
// them. The image is not written any more.
func (n *Node) storeBitmaps() error {
	n.bitmaps.mu.Lock()
	defer n.bitmaps.mu.Unlock()
	k := &n.bitmaps
	if !k.changed && !k.marked.Load() {
		return nil
	}
	if err := n.writeBitmaps(); err != nil {
		return fmt.Errorf("disk %s: store bitmaps: %w", n.path, err)
	}
	k.all = nil
	k.changed = false
	k.recording.Store(nil)
	return nil
}

// writeBitmaps is storeBitmaps with bitmaps.mu held.
func (n *Node) writeBitmaps() error {
	old := n.header.Bitmaps
	if len(n.bitmaps.all) == 0 {
		if old != nil {
			if err := n.dropBitmapsExt(); err != nil {
				return err
			}
		}
		return n.freeBitmaps(n.bitmaps.removed, old)
	}
	var dir []byte
	replaced := n.bitmaps.removed
	for _, k := range n.bitmaps.all {
		e := k.bitmapEntry
		if k.Bitmap != nil {
			if e.tableAt != 0 {
				replaced = append(replaced, e)
			}
			var err error
			if e, err = n.writeBitmap(k.Bitmap); err != nil {
				return err
			}
		}
		dir = e.append(dir)
	}
	at, err := n.writeNew(dir)
	if err != nil {
		return err
	}
	if err := n.Flush(); err != nil {
		return err
	}
	ext := &bitmapsExt{count: uint32(len(n.bitmaps.all)), dirSize: int64(len(dir)), dirOffset: at}
	if err := n.writeBitmapsExt(ext); err != nil {
		return err
	}
	return n.freeBitmaps(replaced, old)
}

// writeBitmap writes a bitmap's bits and table to new clusters.
func (n *Node) writeBitmap(b *bitmap.Bitmap) (bitmapEntry, error) {
	size := n.header.ClusterSize()
	e := bitmapEntry{name: b.Name(), granularity: b.Granularity(), tableSize: n.bitmapClusters(b.Granularity())}
	if b.Enabled() {
		e.flags = bitmapAuto
	}
	table := make([]byte, e.tableSize*entrySize)
	p := make([]byte, size)
	for i := range e.tableSize {
		start, length := b.Next(i * size * 8 * e.granularity)
		if length == 0 {
			break
		}
		if start >= (i+1)*size*8*e.granularity {
			continue
		}
		b.Bytes(p, i*size*8)
		at, err := n.writeNew(p)
		if err != nil {
			return e, err
		}
		binary.BigEndian.PutUint64(table[i*entrySize:], uint64(at))
	}
	var err error
	e.tableAt, err = n.writeNew(table)
	return e, err
}

// writeNew writes p to new clusters that lie side by side.
func (n *Node) writeNew(p []byte) (int64, error) {
	size := n.header.ClusterSize()
	clusters := max(1, (int64(len(p))+size-1)/size)
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	take := n.alloc
	if clusters > 1 {
		take = n.allocEnd
	}
	at, _, err := take(clusters)
	if err != nil {
		return 0, err
	}
	whole := append(slices.Clip(p), make([]byte, clusters*size-int64(len(p)))...)
	return at, n.file.Writev([][]byte{whole}, at)
}

// freeBitmaps gives the clusters of bitmaps, and of their directory if there was
// one, back. The header does not lead to them any more.
func (n *Node) freeBitmaps(all []bitmapEntry, dir *bitmapsExt) error {
	size := n.header.ClusterSize()
	for _, e := range all {
		table, err := n.bitmapTable(e)
		if err != nil {
			return err
		}
		n.w.mu.Lock()
		for _, v := range table {
			if at := int64(v & offsetMask); at != 0 {
				n.w.free(at/size, 1)
			}
		}
		n.w.free(e.tableAt/size, (e.tableSize*entrySize+size-1)/size)
		n.w.mu.Unlock()
	}
	n.bitmaps.removed = nil
	if dir != nil {
		n.w.mu.Lock()
		n.w.free(dir.dirOffset/size, (dir.dirSize+size-1)/size)
		n.w.mu.Unlock()
	}
	return nil
}

func (n *Node) writeAutoclear(features uint64) error {
	if err := n.writeHeader(88, binary.BigEndian.AppendUint64(nil, features)); err != nil {
		return err
	}
	n.header.Autoclear = features
	return nil
}

// writeHeader writes some bytes of the header, durably.
func (n *Node) writeHeader(at int64, b []byte) error {
	if err := n.file.Writev([][]byte{b}, at); err != nil {
		return fmt.Errorf("write header: %w", err)
	}
	return n.file.Flush()
}

// dropBitmapsExt takes the extension out of the header.
func (n *Node) dropBitmapsExt() error {
	h := n.header
	at := h.Bitmaps.at - 8
	word := binary.BigEndian.AppendUint64(nil, uint64(extNothing)<<32|bitmapsExtBytes)
	if h.Bitmaps.at+bitmapsExtBytes == h.extensionEnd {
		word = make([]byte, 8)
	}
	if err := errors.Join(n.writeAutoclear(h.Autoclear&^AutoclearBitmaps), n.writeHeader(at, word)); err != nil {
		return err
	}
	if h.Bitmaps.at+bitmapsExtBytes == h.extensionEnd {
		h.extensionEnd = at
	}
	h.Bitmaps = nil
	return nil
}

// Bytes that the extension needs in the header: with its type and length, and with
// the end of all extensions.
const bitmapsExtRoom = 8 + bitmapsExtBytes + 8

// nameBehind is where the backing file's name can be that there is room for the
// extension before it.
func (h *Header) nameBehind() int64 {
	if h.nameOffset == 0 || h.extensionEnd+bitmapsExtRoom <= h.nameOffset {
		return h.nameOffset
	}
	return (max(h.extensionEnd+bitmapsExtRoom, h.nameOffset+int64(len(h.BackingFile))) + 7) &^ 7
}

func (h *Header) roomForBitmaps() bool {
	return h.extensionEnd != 0 && max(h.extensionEnd+bitmapsExtRoom, h.nameBehind()+int64(len(h.BackingFile))) <= h.ClusterSize()
}

// writeBitmapsExt has the header point to a directory. Until all is durable, the
// bitmaps do not count, where it takes more than one sector.
func (n *Node) writeBitmapsExt(x *bitmapsExt) error {
	h := n.header
	if h.Bitmaps == nil {
		return n.addBitmapsExt(x)
	}
	x.at = h.Bitmaps.at
	if x.at/sector == (x.at+bitmapsExtBytes-1)/sector {
		if err := n.writeHeader(x.at, x.encode()); err != nil {
			return err
		}
		h.Bitmaps = x
		return nil
	}
	if err := n.writeAutoclear(h.Autoclear &^ AutoclearBitmaps); err != nil {
		return err
	}
	if err := n.writeHeader(x.at, x.encode()); err != nil {
		return err
	}
	h.Bitmaps = x
	return n.writeAutoclear(h.Autoclear | AutoclearBitmaps)
}

// addBitmapsExt puts the extension behind the others. The name of the backing file,
// which may be in the way, is copied first; each step leaves a header that is right.
func (n *Node) addBitmapsExt(x *bitmapsExt) error {
	h := n.header
	if to := h.nameBehind(); to != h.nameOffset {
		if err := n.writeHeader(to, []byte(h.BackingFile)); err != nil {
			return err
		}
		if err := n.writeHeader(8, binary.BigEndian.AppendUint64(nil, uint64(to))); err != nil {
			return err
		}
		h.nameOffset = to
	}
	at := h.extensionEnd
	x.at = at + 8
	if err := n.writeHeader(x.at, append(x.encode(), make([]byte, 8)...)); err != nil {
		return err
	}
	if err := n.writeHeader(at, binary.BigEndian.AppendUint64(nil, uint64(extBitmaps)<<32|bitmapsExtBytes)); err != nil {
		return err
	}
	h.Bitmaps, h.extensionEnd = x, at+bitmapsExtRoom-8
	return n.writeAutoclear(h.Autoclear | AutoclearBitmaps)
}
