package qcow2

import (
	"encoding/binary"
	"fmt"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// Backing is the node of the backing file; nil: there is none.
func (n *Node) Backing() block.Node { return n.backing }

// SetBacking has the image read from b what it does not hold itself, and returns
// the node that it read from so far, which is the caller's then. There are no
// requests meanwhile, and b holds the same bytes; the image's header stays as it is.
func (n *Node) SetBacking(b block.Node) (old block.Node) {
	old, n.backing = n.backing, b
	return old
}

// RenameBacking has the header name another image to lie on, by its path and format,
// or none, with "": what SetBacking is for requests, it is for who opens the image
// later. There are no requests meanwhile.
func (n *Node) RenameBacking(name, format string) error {
	if n.w == nil {
		return fmt.Errorf("disk %s: %w", n.path, block.ErrReadOnly)
	}
	n.w.flushing.Lock()
	defer n.w.flushing.Unlock()
	if err := n.nameBacking(name, format); err != nil {
		return fmt.Errorf("disk %s: name of its backing file: %w", n.path, err)
	}
	return nil
}

func (n *Node) nameBacking(name, format string) error {
	old := make([]byte, n.header.ClusterSize())
	if err := n.file.Readv([][]byte{old}, 0); err != nil {
		return err
	}
	first, err := n.header.lyingOn(old, name, format)
	if err != nil {
		return err
	}
	h, err := ParseHeader(first)
	if err != nil {
		return err
	}
	if err := n.writeHeader(0, first); err != nil {
		return err
	}
	*n.header = *h
	return nil
}

// lyingOn is the first cluster of an image, which is old, with another name of the
// backing file behind its extensions. These stay, known or not, except the one that
// tells the backing file's format.
func (h *Header) lyingOn(old []byte, name, format string) ([]byte, error) {
	be := binary.BigEndian
	at, end := headerLenV2, len(old)
	if h.Version >= 3 {
		at = int(be.Uint32(old[100:]))
	}
	if h.nameOffset != 0 {
		end = int(h.nameOffset)
	}
	b := append([]byte(nil), old[:at]...)
	add := func(kind uint32, data []byte) {
		b = be.AppendUint32(b, kind)
		b = be.AppendUint32(b, uint32(len(data)))
		b = append(append(b, data...), make([]byte, -len(data)&7)...)
	}
	if name != "" {
		add(extBackingFormat, []byte(format))
	}
	for at+8 <= end { // ParseHeader has found them to be whole
		kind, length := be.Uint32(old[at:]), int(be.Uint32(old[at+4:]))
		if kind == extEnd {
			break
		}
		if kind != extBackingFormat && kind != extNothing {
			add(kind, old[at+8:at+8+length])
		}
		at += 8 + (length+7)&^7
	}
	b = append(b, make([]byte, 8)...) // extEnd
	be.PutUint64(b[8:], 0)
	be.PutUint32(b[16:], uint32(len(name)))
	if name != "" {
		if len(b)+bitmapsGap+len(name) <= len(old) {
			b = append(b, make([]byte, bitmapsGap)...)
		}
		be.PutUint64(b[8:], uint64(len(b)))
		b = append(b, name...)
	}
	if len(b) > len(old) || len(name) > maxBackingName {
		return nil, fmt.Errorf("%w: it has %d bytes, for which the header has no room", ErrBacking, len(name))
	}
	return append(b, make([]byte, len(old)-len(b))...), nil
}
