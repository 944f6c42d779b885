package qcow2

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"
)

// compressor is the state of one compression.
type compressor struct {
	out   bytes.Buffer
	buf   []byte
	flate *flate.Writer // created when first needed
	zstd  *zstd.Encoder // created when first needed
	whole []byte        // the disk's last cluster, filled up with zeroes
}

var compressors = make(spares[compressor], 4)

// flateWindow is how far back a stream may refer: QEMU inflates with a window of
// 2^12 bytes.
const flateWindow = 4096

// compress returns the stream of a cluster, until the next call.
func (c *compressor) compress(cluster []byte, method Compression) ([]byte, error) {
	c.out.Reset()
	if method == Zstd {
		if c.zstd == nil {
			enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithLowerEncoderMem(true), zstd.WithEncoderCRC(false))
			if err != nil {
				return nil, err
			}
			c.zstd = enc
		}
		c.buf = c.zstd.EncodeAll(cluster, c.buf[:0])
		return c.buf, nil
	}
	if c.flate == nil {
		w, err := flate.NewWriterWindow(&c.out, flateWindow)
		if err != nil {
			return nil, err
		}
		c.flate = w
	} else {
		c.flate.Reset(&c.out)
	}
	if _, err := c.flate.Write(cluster); err != nil {
		return nil, err
	}
	if err := c.flate.Close(); err != nil {
		return nil, err
	}
	return c.out.Bytes(), nil
}

// WriteCompressed is Writev of data whose whole clusters, and the last one if it
// ends with the disk, are compressed where that makes them smaller. Such clusters
// are never changed in place: to write to them costs more.
func (n *Node) WriteCompressed(p []byte, off int64) error {
	if err := n.checkWrite(off, int64(len(p))); err != nil {
		return err
	}
	if err := n.record(off, int64(len(p))); err != nil {
		return err
	}
	size := n.header.ClusterSize()
	for len(p) > 0 {
		part := p[:min(int64(len(p)), size-off%size)]
		var err error
		if off%size == 0 && (int64(len(part)) == size || off+int64(len(part)) == n.Size()) {
			err = n.compressCluster(part, off)
		} else {
			err = n.Writev([][]byte{part}, off)
		}
		if err == nil {
			err = n.bound()
		}
		if err != nil {
			return fmt.Errorf("disk %s: write compressed at %d: %w", n.path, off, err)
		}
		p, off = p[len(part):], off+int64(len(part))
	}
	return nil
}

// compressCluster writes a cluster that p is, or begins.
func (n *Node) compressCluster(p []byte, off int64) error {
	size := n.header.ClusterSize()
	c := compressors.get()
	defer compressors.put(c)
	cluster := p
	if int64(len(p)) < size {
		c.whole = append(append(c.whole[:0], p...), make([]byte, size-int64(len(p)))...)
		cluster = c.whole
	}
	stream, err := c.compress(cluster, n.header.Compression)
	if err != nil {
		return err
	}
	if int64(len(stream)) >= size {
		return n.Writev([][]byte{p}, off)
	}
	return n.placeStream(stream, off/size)
}

// placeStream writes a stream and has a cluster of the disk refer to it.
func (n *Node) placeStream(stream []byte, cluster int64) error {
	w := n.w
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.busy[cluster] {
		w.change.Wait()
	}
	if w.broken != nil {
		return w.broken
	}
	at, err := n.allocBytes(int64(len(stream)))
	if err != nil {
		return err
	}
	w.busy[cluster] = true
	w.mu.Unlock()
	err = n.file.Writev([][]byte{stream}, at)
	// What was read from there once was freed since, and is read no more.
	n.clusters.drop(key{n.id, at})
	w.mu.Lock()
	if err == nil {
		entry := n.header.streamEntry(at, int64(len(stream)))
		_, err = n.set(cluster, 1, func(int64, uint64) uint64 { return entry })
	}
	delete(w.busy, cluster)
	w.change.Broadcast()
	if err != nil {
		size := n.header.ClusterSize()
		for i := at / size; i <= (at+int64(len(stream))-1)/size; i++ {
			err = errors.Join(err, n.lower(i))
		}
		w.pack = 0
	}
	return err
}

// streamEntry is the L2 entry of a cluster whose stream is there; the inverse of
// stream.
func (h *Header) streamEntry(at, length int64) uint64 {
	offsetBits := 62 - (h.ClusterBits - 8)
	sectors := (at+length-1)/sector - at/sector
	return entryCompressed | uint64(sectors)<<offsetBits | uint64(at)
}

// allocBytes finds a place for a stream of n bytes, fewer than a cluster has,
// behind the last one if there is room, and counts one reference to each cluster
// of its. Preconditions: mu is held.
func (n *Node) allocBytes(length int64) (int64, error) {
	w, size := n.w, n.header.ClusterSize()
	if w.pack != 0 {
		cluster, room := w.pack/size, size-w.pack%size
		refs, err := n.refcount(cluster)
		if err != nil {
			return 0, err
		}
		if length <= room && refs < w.counts.max() {
			if err := n.setRefcount(cluster, refs+1); err != nil {
				return 0, err
			}
			return n.packed(w.pack, length), nil
		}
		next, err := n.refcount(cluster + 1)
		if err != nil {
			return 0, err
		}
		if refs < w.counts.max() && next == 0 && n.overlaps((cluster+1)*size, size) == nil {
			if (cluster+1)*size >= w.end {
				w.extend(size)
			}
			if err := errors.Join(n.setRefcount(cluster, refs+1), n.setRefcount(cluster+1, 1)); err != nil {
				return 0, err
			}
			return n.packed(w.pack, length), nil
		}
	}
	at, _, err := n.alloc(1)
	if err != nil {
		return 0, err
	}
	return n.packed(at, length), nil
}

// packed has the next stream follow that at a place.
func (n *Node) packed(at, length int64) int64 {
	n.w.pack = at + length
	if n.w.pack%n.header.ClusterSize() == 0 {
		n.w.pack = 0 // the next cluster belongs to somebody else
	}
	return at
}
