package qcow2

import (
	"encoding/binary"
	"fmt"
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
	host   int64 // data: offset in the file of the first byte; zero: of the place kept for it, or 0; compressed: of the cluster's stream
	csize  int64 // compressed: bytes that the stream has at most
	within int64 // compressed: where in the cluster the extent begins
	own    bool  // data, and zero with a host: the cluster belongs to nothing else, so that it can be written
}

// lookup returns the extent that starts at off and has at most limit bytes.
// Neighbouring clusters are one extent where they can be read at once.
func (im *image) lookup(off, limit int64) (extent, error) {
	if im.w != nil {
		im.w.mu.Lock()
		defer im.w.mu.Unlock()
	}
	return im.lookupLocked(off, limit)
}

// lookupLocked is lookup with the writer's mu held, if there is a writer.
func (im *image) lookupLocked(off, limit int64) (extent, error) {
	size := im.header.ClusterSize()
	within := off % size
	var e extent
	for cluster, first := off/size, true; e.length < limit; first = false {
		entries, count, err := im.l2Slice(cluster)
		if err != nil {
			return extent{}, err
		}
		if entries == nil {
			if !first && e.kind != unallocated {
				break
			}
			e.length += count*size - within
			within = 0
			cluster += count
			continue
		}
		done := false
		for i := int64(0); i < count && e.length < limit; i++ {
			next, err := im.decode(binary.BigEndian.Uint64(entries[i*entrySize:]), cluster)
			if err != nil {
				return extent{}, err
			}
			if first {
				e, first = next, false
				if e.kind == data || e.kind == zero && e.host != 0 {
					e.host += within
				}
				e.within, e.length = within, size-within
				if e.kind == compressed {
					done = true
					break
				}
			} else if !continues(e, next) {
				done = true
				break
			} else {
				e.length += size
			}
			within = 0
			cluster++
		}
		if done {
			break
		}
	}
	e.length = min(e.length, limit)
	return e, nil
}

// continues tells whether the cluster next prolongs e.
func continues(e, next extent) bool {
	if e.kind != next.kind || e.own != next.own || e.kind == compressed {
		return false
	}
	return e.host == 0 && next.host == 0 || e.host != 0 && e.host+e.length == next.host
}

// decode takes the L2 entry of a cluster apart.
func (im *image) decode(entry uint64, cluster int64) (extent, error) {
	if entry&entryCompressed != 0 {
		// The lower bits are an offset, the ones above it a number of sectors,
		// the more of them the larger the clusters are.
		offsetBits := 62 - (im.header.ClusterBits - 8)
		host := int64(entry & (1<<offsetBits - 1))
		sectors := int64(entry&(entryCompressed-1)>>offsetBits) + 1
		e := extent{kind: compressed, host: host, csize: sectors*sector - host%sector}
		if e.host >= im.file.Size() {
			return extent{}, im.beyondFile(cluster, host)
		}
		e.csize = min(e.csize, im.file.Size()-host)
		return e, nil
	}
	host := int64(entry & offsetMask)
	switch {
	case entry&entryZero != 0:
		if im.header.Version < 3 {
			return extent{}, fmt.Errorf("%w: cluster %d is a zero cluster, which version 2 does not have", ErrCorrupt, cluster)
		}
		if host%im.header.ClusterSize() != 0 || host >= im.file.Size() {
			host = 0 // it is not read, and not to be written either
		}
		return extent{kind: zero, host: host, own: host != 0 && entry&entryOwn != 0}, nil
	case host == 0:
		return extent{kind: unallocated}, nil
	case host%im.header.ClusterSize() != 0:
		return extent{}, fmt.Errorf("%w: cluster %d at %#x does not start at a cluster of the file", ErrCorrupt, cluster, host)
	case host >= im.file.Size():
		return extent{}, im.beyondFile(cluster, host)
	}
	return extent{kind: data, host: host, own: entry&entryOwn != 0}, nil
}

func (im *image) beyondFile(cluster, host int64) error {
	return fmt.Errorf("%w: cluster %d at %#x lies behind the file's %d bytes; is the file cut off?", ErrCorrupt, cluster, host, im.file.Size())
}
