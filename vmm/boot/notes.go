package boot

import (
	"encoding/binary"
	"fmt"
)

// Note types of owner "Xen" (xen/include/public/elfnote.h).
const (
	noteXenGuestOS     = 6
	noteXenPhys32Entry = 18
)

// elfNotes is what the image's ELF notes tell.
type elfNotes struct {
	linux    bool // a note of owner "Linux", or Xen's GUEST_OS is "linux"
	hasPVH   bool
	pvhEntry uint32
}

// add reads a PT_NOTE segment. Linux is recognised by notes only: each vmlinux
// since 4.19 has one of owner "Linux" (its build salt), and those of Xen
// configurations name the guest OS.
func (n *elfNotes) add(p []byte) error {
	le := binary.LittleEndian
	for len(p) >= 12 {
		nameSize, descSize, kind := uint64(le.Uint32(p)), uint64(le.Uint32(p[4:])), le.Uint32(p[8:])
		name, rest, ok := cutPadded(p[12:], nameSize)
		if !ok {
			break
		}
		desc, rest, ok := cutPadded(rest, descSize)
		if !ok {
			break
		}
		p = rest
		switch owner := cString(name); {
		case owner == "Linux":
			n.linux = true
		case owner == "Xen" && kind == noteXenGuestOS:
			n.linux = n.linux || cString(desc) == "linux"
		case owner == "Xen" && kind == noteXenPhys32Entry:
			if len(desc) < 4 || len(desc) >= 8 && le.Uint32(desc[4:]) != 0 {
				return fmt.Errorf("%w: PVH entry note with value % x: it must be a 32-bit address", ErrNotKernel, desc)
			}
			n.hasPVH, n.pvhEntry = true, le.Uint32(desc)
		}
	}
	return nil
}

// cutPadded cuts n bytes and their padding to 4 off p; the last padding may be
// missing.
func cutPadded(p []byte, n uint64) (head, rest []byte, ok bool) {
	if n > uint64(len(p)) {
		return nil, nil, false
	}
	return p[:n], p[min((n+3)&^3, uint64(len(p))):], true
}

func cString(b []byte) string {
	for i, c := range b {
		if c == 0 {
			return string(b[:i])
		}
	}
	return string(b)
}
