package qcow2

import (
	"encoding/binary"
	"fmt"
	"math"
)

// references are how often each cluster of a file is referred to.
type references struct {
	bits   uint32
	chunks map[int64]*[refsPerChunk]uint16
}

// Memory of references: a chunk for each stretch of the file that has any.
const (
	refsPerChunk = 1024
	maxRefChunks = 1 << 18 // 512 MiB: files of 16 TiB at 64 KiB a cluster
)

func (r *references) get(cluster int64) uint16 {
	if c := r.chunks[cluster/refsPerChunk]; c != nil {
		return c[cluster%refsPerChunk]
	}
	return 0
}

// add counts references to each cluster that length bytes at off touch.
func (r *references) add(off, length int64, weight uint16) error {
	for i := off >> r.bits; i <= (off+length-1)>>r.bits; i++ {
		c := r.chunks[i/refsPerChunk]
		if c == nil {
			if len(r.chunks) == maxRefChunks {
				return fmt.Errorf("%w: the file is too large to be checked", ErrUnsupported)
			}
			if r.chunks == nil {
				r.chunks = map[int64]*[refsPerChunk]uint16{}
			}
			c = new([refsPerChunk]uint16)
			r.chunks[i/refsPerChunk] = c
		}
		v := &c[i%refsPerChunk]
		if *v > math.MaxUint16-weight {
			return fmt.Errorf("%w: cluster at %#x has too many references", ErrCorrupt, i<<r.bits)
		}
		*v += weight
	}
	return nil
}

// merge adds the references of other.
func (r *references) merge(other *references) error {
	for k, c := range other.chunks {
		for i, v := range c {
			if v == 0 {
				continue
			}
			if err := r.add((k*refsPerChunk+int64(i))<<r.bits, 1, v); err != nil {
				return err
			}
		}
	}
	return nil
}

// maxSnapshotExtra is QEMU's limit of what a snapshot's entry has beside the known.
const maxSnapshotExtra = 1024

// snapshotL1 is where an internal snapshot has its L1 table.
type snapshotL1 struct{ l1At, l1Entries int64 }

// snapshots reads the table of internal snapshots (specification, "Snapshots"), and
// returns its length in bytes.
func (n *Node) snapshots() ([]snapshotL1, int64, error) {
	h := n.header
	if h.Snapshots == 0 {
		return nil, 0, nil
	}
	if h.Snapshots > 65536 || !n.within(h.SnapshotOffset, 40) {
		return nil, 0, fmt.Errorf("%w: table of %d snapshots at %#x", ErrCorrupt, h.Snapshots, h.SnapshotOffset)
	}
	var out []snapshotL1
	be := binary.BigEndian
	at, total := h.SnapshotOffset, int64(0)
	var b [40]byte
	for i := range h.Snapshots {
		if at > n.file.Size()-int64(len(b)) {
			return nil, 0, fmt.Errorf("%w: snapshot %d ends behind the file", ErrCorrupt, i)
		}
		if err := n.file.Readv([][]byte{b[:]}, at); err != nil {
			return nil, 0, fmt.Errorf("read snapshot %d: %w", i, err)
		}
		s := snapshotL1{int64(be.Uint64(b[:])), int64(be.Uint32(b[8:]))}
		total += s.l1Entries * entrySize
		if total > 2*maxL1Bytes || s.l1Entries > 0 && !n.within(s.l1At, s.l1Entries*entrySize) {
			return nil, 0, fmt.Errorf("%w: snapshot %d: L1 table of %d entries at %#x", ErrCorrupt, i, s.l1Entries, s.l1At)
		}
		out = append(out, s)
		id, name, extra := int64(be.Uint16(b[12:])), int64(be.Uint16(b[14:])), int64(be.Uint32(b[36:]))
		at += 40 + extra + id + name
		if extra > maxSnapshotExtra || at > n.file.Size() {
			return nil, 0, fmt.Errorf("%w: snapshot %d ends at %#x, behind the file", ErrCorrupt, i, at)
		}
		at = (at + 7) &^ 7
	}
	if length := at - h.SnapshotOffset; length <= 64<<20 {
		return out, length, nil
	}
	return nil, 0, fmt.Errorf("%w: table of snapshots of %d bytes", ErrCorrupt, at-h.SnapshotOffset)
}
