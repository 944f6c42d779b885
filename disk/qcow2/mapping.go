package qcow2

import (
	"encoding/binary"
	"fmt"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// kind is where the bytes of an extent come from.
type kind uint8

const (
	unallocated kind = iota // the backing file, or zero where there is none
	zero
	data       // the file, from extent.host on
	compressed // the compressed cluster that extent.host and extent.csize tell
)

// extent is a stretch of the virtual disk that one source serves.
type extent struct {
	kind   kind
	length int64 // bytes
	host   int64 // data: offset in the file of the first byte; zero, unallocated: of the place kept for it, or 0; compressed: of the cluster's stream
	csize  int64 // compressed: bytes that the stream has at most
	within int64 // compressed: where in the cluster the extent begins
	own    bool  // data, and zero with a host: the cluster belongs to nothing else, so that it can be written
}

// lookup returns the extent that starts at off and has at most limit bytes.
// Neighbouring clusters are one extent where they can be read at once. Of an image
// that is written, the extent's place stays what it is until leave is called.
func (im *image) lookup(off, limit int64) (e extent, epoch int, err error) {
	w := im.w
	if w == nil {
		e, err = im.lookupLocked(off, limit)
		return e, 0, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for {
		e, err = im.lookupLocked(off, limit)
		if err == errMissing {
			err = im.load(w.missing)
			if err == nil {
				continue
			}
		}
		if err != nil {
			return extent{}, 0, err
		}
		return e, w.enter(), nil
	}
}

// leave ends the use of what lookup found.
func (im *image) leave(epoch int) {
	if im.w != nil {
		im.w.leave(epoch)
	}
}

// lookupLocked is lookup with the writer's mu held, if there is a writer. Then it
// may fail with errMissing.
func (im *image) lookupLocked(off, limit int64) (extent, error) {
	size, unit := im.header.ClusterSize(), im.header.unit()
	var e extent
	for e.length < limit {
		at := off + e.length
		cluster := at / size
		entries, count, err := im.l2Slice(cluster)
		if err == errMissing && e.length > 0 {
			break
		}
		if err != nil {
			return extent{}, err
		}
		end := (cluster + count) * size
		if entries == nil {
			if e.length > 0 && (e.kind != unallocated || e.host != 0) {
				break
			}
			e.length += end - at
			continue
		}
		for ; at < end && e.length < limit; at = off + e.length {
			next, err := im.entry(entries, at/size-cluster, at)
			switch {
			case err != nil:
				return extent{}, err
			case e.length > 0 && !continues(e, next):
				e.length = min(e.length, limit)
				return e, nil
			case e.length > 0:
				e.length += unit
				continue
			}
			e = next
			if e.kind == compressed {
				e.within = at % size
				e.length = min(size-e.within, limit)
				return e, nil
			}
			if e.kind == data || e.host != 0 {
				e.host += at % unit
			}
			e.length = unit - at%unit
		}
	}
	e.length = min(e.length, limit)
	return e, nil
}

// entry takes apart the i-th of some L2 entries, as far as it is about what is at
// off of the disk.
func (im *image) entry(entries []byte, i, off int64) (extent, error) {
	cluster := off >> im.header.ClusterBits
	if im.header.Incompatible&FeatureExtendedL2 == 0 {
		return im.decode(binary.BigEndian.Uint64(entries[i*entrySize:]), cluster)
	}
	entry, bitmap := binary.BigEndian.Uint64(entries[i*16:]), binary.BigEndian.Uint64(entries[i*16+8:])
	return im.decodeExtended(entry, bitmap, cluster, off%im.header.ClusterSize()/im.header.unit())
}

// continues tells whether the cluster next prolongs e.
func continues(e, next extent) bool {
	if e.kind != next.kind || e.own != next.own || e.kind == compressed {
		return false
	}
	return e.kind != data && e.host == 0 && next.host == 0 || (e.kind == data || e.host != 0) && e.host+e.length == next.host
}

// stream is where the stream is that the L2 entry of a compressed cluster points
// to, and how long it is at most. The lower bits are an offset, the ones above it
// a number of sectors, the more of them the larger the clusters are.
func (h *Header) stream(entry uint64) (at, length int64) {
	offsetBits := 62 - (h.ClusterBits - 8)
	at = int64(entry & (1<<offsetBits - 1))
	sectors := int64(entry&(entryCompressed-1)>>offsetBits) + 1
	return at, sectors*sector - at%sector
}

// decode takes the L2 entry of a cluster apart.
func (im *image) decode(entry uint64, cluster int64) (extent, error) {
	if entry&entryCompressed != 0 {
		return im.decodeCompressed(entry, cluster)
	}
	host := int64(entry & offsetMask)
	own := entry&entryOwn != 0
	if entry&entryZero != 0 {
		if im.header.Version < 3 {
			return extent{}, fmt.Errorf("%w: cluster %d is a zero cluster, which version 2 does not have", ErrCorrupt, cluster)
		}
		if host%im.header.ClusterSize() != 0 || host >= im.dataFile().Size() {
			host = 0 // it is not read, and not to be written either
		}
		return extent{kind: zero, host: host, own: host != 0 && own}, nil
	}
	if host == 0 && !(own && im.external != nil) {
		return extent{kind: unallocated}, nil
	}
	return extent{kind: data, host: host, own: own}, im.checkHost(cluster, host)
}

func (im *image) decodeCompressed(entry uint64, cluster int64) (extent, error) {
	host, length := im.header.stream(entry)
	switch {
	case im.external != nil:
		return extent{}, fmt.Errorf("%w: cluster %d is compressed, in an image with a data file", ErrCorrupt, cluster)
	case host >= im.file.Size():
		return extent{}, im.beyondFile(cluster, host)
	}
	return extent{kind: compressed, host: host, csize: min(length, im.file.Size()-host)}, nil
}

// decodeExtended takes an extended L2 entry apart, as far as it is about one of
// the cluster's 32 subclusters (specification, "Extended L2 Entries").
func (im *image) decodeExtended(entry, bitmap uint64, cluster, sub int64) (extent, error) {
	if entry&entryCompressed != 0 {
		return im.decodeCompressed(entry, cluster)
	}
	host, own := int64(entry&offsetMask), entry&entryOwn != 0
	allocated, reads := bitmap>>sub&1 != 0, bitmap>>(32+sub)&1 != 0
	hasHost := host != 0 || own && im.external != nil
	place := host + sub*im.header.unit()
	switch {
	case allocated && reads:
		return extent{}, fmt.Errorf("%w: subcluster %d of cluster %d is both data and zero", ErrCorrupt, sub, cluster)
	case reads && hasHost:
		return extent{kind: zero, host: place}, nil
	case reads:
		return extent{kind: zero}, nil
	case !allocated && hasHost:
		return extent{kind: unallocated, host: place}, nil
	case !allocated:
		return extent{kind: unallocated}, nil
	case !hasHost:
		return extent{}, fmt.Errorf("%w: subcluster %d of cluster %d is data without a place", ErrCorrupt, sub, cluster)
	}
	return extent{kind: data, host: place, own: own}, im.checkHost(cluster, host)
}

// checkHost refuses a place that a cluster cannot have.
func (im *image) checkHost(cluster, host int64) error {
	switch {
	case host%im.header.ClusterSize() != 0:
		return fmt.Errorf("%w: cluster %d at %#x does not start at a cluster of the file", ErrCorrupt, cluster, host)
	case host >= im.dataFile().Size():
		return im.beyondFile(cluster, host)
	}
	return nil
}

// dataFile is the file that has the disk's data.
func (im *image) dataFile() block.Node {
	if im.external != nil {
		return im.external
	}
	return im.file
}

func (im *image) beyondFile(cluster, host int64) error {
	return fmt.Errorf("%w: cluster %d at %#x lies behind the file's %d bytes; is the file cut off?", ErrCorrupt, cluster, host, im.dataFile().Size())
}
