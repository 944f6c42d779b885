package qcow2

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// rename has the header name another backing file, or none. The power may fail at any
// time, wherever the name lies: what counts is one sector, which is written when the new
// name is durable beside the old one. Only where the header has no room for both, or the
// format of a backing file that had none must be squeezed in before extensions that fill
// more than a sector, it is not safe between sectors, as QEMU's is not.
func (n *Node) rename(name, format string) error {
	n.w.flushing.Lock()
	defer n.w.flushing.Unlock()
	first := make([]byte, n.header.ClusterSize())
	if err := n.file.Readv([][]byte{first}, 0); err != nil {
		return fmt.Errorf("read header: %w", err)
	}
	b, at, err := withBacking(first, name, format)
	if err != nil {
		return err
	}
	h, err := ParseHeader(b)
	if err != nil {
		return err
	}
	if at < 0 {
		if err := n.writeHeader(0, b); err != nil {
			return err
		}
		*n.header = *h
		return nil
	}
	if name != "" {
		if err := n.writeHeader(int64(at), []byte(name)); err != nil {
			return err
		}
	}
	if err := n.writeHeader(0, b[:sector]); err != nil {
		return err
	}
	*n.header = *h
	if len(b) == sector {
		return nil
	}
	return n.writeHeader(sector, b[sector:]) // the old name, of no use any more, goes
}

// withBacking is an image's first cluster with another backing file's name: the
// extensions but its format stay as they are, known or not. The name is at a place where
// nothing was that counted before, and what else counts differs in the first sector
// alone; at -1, where that cannot be.
func withBacking(first []byte, name, format string) (b []byte, at int, err error) {
	be := binary.BigEndian
	oldAt, oldLen := int(be.Uint64(first[8:])), int(be.Uint32(first[16:]))
	head, oldEnd, _ := extensionsFor(first, name, format, false)
	if !sameBehind(first, head) {
		if kept, _, ok := extensionsFor(first, name, format, true); ok && sameBehind(first, kept) {
			head = kept
		}
	}
	if len(name) > maxBackingName || len(head)+len(name) > len(first) {
		return nil, 0, fmt.Errorf("%w: its name has %d bytes, for which the header has no room", ErrBacking, len(name))
	}
	be.PutUint64(head[8:], 0)
	be.PutUint32(head[16:], 0)
	b = make([]byte, len(first))
	free := func(at int) bool {
		return at+len(name) <= len(first) && (oldAt == 0 || at >= oldAt+oldLen || at+len(name) <= oldAt)
	}
	safe, end := sameBehind(first, head), max(len(head), oldEnd)
	switch {
	case name == "":
		at = end
	case safe && free(end+bitmapsGap):
		at = end + bitmapsGap
	case safe && oldAt != 0 && free(max(end, oldAt+oldLen)):
		at = max(end, oldAt+oldLen)
	case safe && free(end):
		at = end
	default:
		safe = false
		if at = len(head) + bitmapsGap; at+len(name) > len(first) {
			at = len(head)
		}
	}
	if name != "" {
		be.PutUint64(head[8:], uint64(at))
		be.PutUint32(head[16:], uint32(len(name)))
		copy(b[at:], name)
	}
	copy(b, head)
	if !safe {
		at = -1
	}
	return b, at, nil
}

// sameBehind tells that a header's extensions are those that there are, but for the first
// sector.
func sameBehind(first, head []byte) bool {
	return len(head) <= sector || len(head) <= len(first) && bytes.Equal(first[sector:len(head)], head[sector:])
}

// extensionsFor are the header and its extensions, to their end, with the format of
// another backing file, or none; and where those that there are end. In place nothing
// moves, and what is not needed any more leaves a place that is not used; ok tells that
// there is one for the format.
func extensionsFor(first []byte, name, format string, inPlace bool) (b []byte, oldEnd int, ok bool) {
	be := binary.BigEndian
	at := headerLenV2
	if be.Uint32(first[4:]) >= 3 {
		at = int(be.Uint32(first[100:]))
	}
	end := len(first)
	if old := int(be.Uint64(first[8:])); old != 0 {
		end = old
	}
	b = bytes.Clone(first[:at])
	padded := (len(format) + 7) &^ 7
	addFormat := func() {
		b = be.AppendUint32(b, extBackingFormat)
		b = be.AppendUint32(b, uint32(len(format)))
		b = append(b, format...)
		b = append(b, make([]byte, padded-len(format))...)
		ok = true
	}
	if ok = name == ""; !ok && !inPlace {
		addFormat()
	}
	for at+8 <= end { // ParseHeader has found them to be whole
		kind, length := be.Uint32(first[at:]), (int(be.Uint32(first[at+4:]))+7)&^7
		if kind == extEnd {
			break
		}
		switch {
		case kind == extBackingFormat && inPlace && name != "" && length == padded:
			addFormat()
		case kind == extBackingFormat && inPlace && name == "":
			b = be.AppendUint32(b, extNothing)
			b = append(b, first[at+4:at+8+length]...)
		case kind != extBackingFormat && (kind != extNothing || inPlace):
			b = append(b, first[at:at+8+length]...)
		}
		at += 8 + length
	}
	return append(b, make([]byte, 8)...), min(at+8, end), ok // extEnd
}
