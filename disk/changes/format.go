package changes

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"math/bits"
	"time"
	"unicode/utf8"
)

// The format of a sidecar: docs/changes-format.md.
const (
	magic   = "GNOMONCH"
	version = 1

	slotSize   = 64 << 10 // a header's place; there are two
	marksAt    = 2 * slotSize
	markSize   = 512 // a mark sector
	markHeader = 8   // checksum, index
	perMark    = (markSize - markHeader) * 4
	recordsAt  = marksAt + 32<<10

	regionBlocks = 256 // blocks of a region
	recordHeader = 8   // checksum, region
	recordSize   = recordHeader + 4*regionBlocks

	// maxBlocks bounds the memory: larger disks have larger blocks.
	maxBlocks  = 1 << 24
	maxRegions = maxBlocks / regionBlocks

	minBlockSize     = 4 << 10
	maxBlockSize     = 1 << 31
	defaultBlockSize = 64 << 10

	headerFixed = 424
	appSize     = 128
	maxApps     = 500
	nameLimit   = 112
	reasonLimit = 256
)

// Errors of sidecars.
var (
	// ErrSidecar is a sidecar that cannot be read as one, or not be kept any more.
	ErrSidecar = errors.New("changes file")
	// ErrNewer is a sidecar with incompatible features that this program does not
	// know.
	ErrNewer = errors.New("changes file of a newer program")
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// The states of a header.
const (
	stateOpen   = 1 // the disk may have been written since
	stateClosed = 2
)

// The states of a region, in two bits of its mark sector.
const (
	regionEmpty    = 0 // never changed, and there is no record
	regionMarked   = 1 // may have changed in any way
	regionRecorded = 2 // its record tells
)

// header is what a sidecar says of all of the disk.
type header struct {
	sequence   uint64
	compatible uint64 // features that need not be known, kept as they were
	id         [16]byte
	identity   [32]byte // of the disk; zeros: it cannot be told from others
	stamp      [32]byte // of the disk's last change, if closed
	diskSize   int64
	blockSize  int64
	epoch      uint32
	state      uint32
	alive      int64  // when the recorder last said that it lives, ns since 1970
	reason     string // why the record began, for applications whose epoch is 0
	apps       []Application
}

func (h *header) encode() []byte {
	b := make([]byte, headerFixed+len(h.apps)*appSize+4)
	le := binary.LittleEndian
	copy(b, magic)
	le.PutUint32(b[8:], version)
	le.PutUint32(b[12:], uint32(len(b)))
	le.PutUint64(b[24:], h.compatible)
	le.PutUint64(b[40:], h.sequence)
	copy(b[48:], h.id[:])
	copy(b[64:], h.identity[:])
	copy(b[96:], h.stamp[:])
	le.PutUint64(b[128:], uint64(h.diskSize))
	le.PutUint64(b[136:], uint64(h.blockSize))
	le.PutUint32(b[144:], h.epoch)
	le.PutUint32(b[148:], h.state)
	le.PutUint32(b[152:], uint32(len(h.apps)))
	le.PutUint32(b[156:], uint32(copy(b[168:headerFixed], h.reason)))
	le.PutUint64(b[160:], uint64(h.alive))
	for i, a := range h.apps {
		e := b[headerFixed+i*appSize:]
		le.PutUint32(e, a.Epoch)
		le.PutUint32(e[4:], uint32(len(a.Name)))
		le.PutUint64(e[8:], uint64(a.Time.UnixNano()))
		copy(e[16:appSize], a.Name)
	}
	le.PutUint32(b[len(b)-4:], crc32.Checksum(b[:len(b)-4], castagnoli))
	return b
}

// decodeHeader reads a slot.
func decodeHeader(b []byte) (*header, error) {
	le := binary.LittleEndian
	if len(b) < headerFixed+4 || string(b[:8]) != magic {
		return nil, fmt.Errorf("%w: does not begin with %s", ErrSidecar, magic)
	}
	size := int(min(le.Uint32(b[12:]), math.MaxInt32))
	if size < headerFixed+4 || size > len(b) || size > slotSize {
		return nil, fmt.Errorf("%w: header of %d bytes", ErrSidecar, size)
	}
	b = b[:size]
	if le.Uint32(b[size-4:]) != crc32.Checksum(b[:size-4], castagnoli) {
		return nil, fmt.Errorf("%w: wrong checksum of the header", ErrSidecar)
	}
	if v, bits := le.Uint32(b[8:]), le.Uint64(b[16:]); v != version || bits != 0 {
		return nil, fmt.Errorf("%w: version %d, incompatible features %#x", ErrNewer, v, bits)
	}
	h := &header{
		compatible: le.Uint64(b[24:]), sequence: le.Uint64(b[40:]),
		id: [16]byte(b[48:]), identity: [32]byte(b[64:]), stamp: [32]byte(b[96:]),
		diskSize: int64(le.Uint64(b[128:])), blockSize: int64(le.Uint64(b[136:])),
		epoch: le.Uint32(b[144:]), state: le.Uint32(b[148:]), alive: int64(le.Uint64(b[160:])),
	}
	apps, reason := le.Uint32(b[152:]), le.Uint32(b[156:])
	switch {
	case h.diskSize < 0 || !goodBlockSize(h.blockSize, h.diskSize):
		return nil, fmt.Errorf("%w: %d bytes in blocks of %d", ErrSidecar, h.diskSize, h.blockSize)
	case h.epoch == 0 || h.state != stateOpen && h.state != stateClosed:
		return nil, fmt.Errorf("%w: epoch %d, state %d", ErrSidecar, h.epoch, h.state)
	case apps > maxApps || headerFixed+int(apps)*appSize+4 != size:
		return nil, fmt.Errorf("%w: %d applications in %d bytes", ErrSidecar, apps, size)
	case reason > reasonLimit || !utf8.Valid(b[168:168+reason]) || !zero(b[168+reason:headerFixed]):
		return nil, fmt.Errorf("%w: reason of %d bytes", ErrSidecar, reason)
	}
	h.reason = string(b[168 : 168+reason])
	for i := range int(apps) {
		e := b[headerFixed+i*appSize:][:appSize]
		length := le.Uint32(e[4:])
		if length > nameLimit || !zero(e[16+length:]) {
			return nil, fmt.Errorf("%w: application %d: name of %d bytes", ErrSidecar, i, length)
		}
		a := Application{Epoch: le.Uint32(e), Time: time.Unix(0, int64(le.Uint64(e[8:]))), Name: string(e[16 : 16+length])}
		if err := checkName(a.Name); err != nil || a.Epoch >= h.epoch || h.app(a.Name) != nil {
			return nil, fmt.Errorf("%w: application %d: %q, epoch %d of %d", ErrSidecar, i, a.Name, a.Epoch, h.epoch)
		}
		h.apps = append(h.apps, a)
	}
	return h, nil
}

func zero(b []byte) bool { return len(bytes.TrimLeft(b, "\x00")) == 0 }

func checkName(name string) error {
	if name == "" || len(name) > nameLimit || !utf8.ValidString(name) {
		return fmt.Errorf("%w: %q: 1 to %d bytes of UTF-8", ErrApplication, name, nameLimit)
	}
	for _, c := range name {
		if c < ' ' || c == 0x7f { // it ends up on terminals
			return fmt.Errorf("%w: %q has control characters", ErrApplication, name)
		}
	}
	return nil
}

// app is the application of that name, or nil.
func (h *header) app(name string) *Application {
	for i := range h.apps {
		if h.apps[i].Name == name {
			return &h.apps[i]
		}
	}
	return nil
}

// chooseHeader finds the newer of the headers in the two slots, which are written in
// turn: what tears while it is written leaves the one before.
func chooseHeader(b []byte) (*header, error) {
	first, err := decodeHeader(b[:min(len(b), slotSize)])
	second, err2 := decodeHeader(b[min(len(b), slotSize):])
	switch {
	case errors.Is(err, ErrNewer) || errors.Is(err2, ErrNewer):
		return nil, errors.Join(err, err2)
	case err != nil && err2 != nil:
		return nil, err
	case err != nil:
		return second, nil
	case err2 != nil:
		return first, nil
	case first.id != second.id:
		return nil, fmt.Errorf("%w: its headers do not belong together", ErrSidecar)
	case first.sequence > second.sequence:
		return first, nil
	}
	return second, nil
}

// blocksOf is how many blocks a disk of size bytes has.
func blocksOf(size, blockSize int64) int64 {
	blocks := size / blockSize
	if size%blockSize != 0 {
		blocks++
	}
	return blocks
}

func goodBlockSize(blockSize, diskSize int64) bool {
	return blockSize >= minBlockSize && blockSize <= maxBlockSize && bits.OnesCount64(uint64(blockSize)) == 1 && blocksOf(diskSize, blockSize) <= maxBlocks
}

// fitBlockSize is wanted, or more if the disk had more than maxBlocks such blocks.
func fitBlockSize(wanted, diskSize int64) int64 {
	for blocksOf(diskSize, wanted) > maxBlocks {
		wanted *= 2
	}
	return wanted
}

// checksum is that of a part of the sidecar with that id: parts of another one do
// not pass for it.
func checksum(id [16]byte, b []byte) uint32 {
	return crc32.Update(crc32.Checksum(id[:], castagnoli), castagnoli, b)
}

// seal makes b, whose first four bytes are free, part index of the sidecar with
// that id.
func seal(b []byte, id [16]byte, index int) {
	binary.LittleEndian.PutUint32(b[4:], uint32(index))
	binary.LittleEndian.PutUint32(b, checksum(id, b[4:]))
}

func sealed(b []byte, id [16]byte, index int) bool {
	return binary.LittleEndian.Uint32(b[4:]) == uint32(index) && binary.LittleEndian.Uint32(b) == checksum(id, b[4:])
}

// record is the counters of a region as they are in the sidecar.
type record [recordSize]byte

func (r *record) setCounter(i int, epoch uint32) {
	binary.LittleEndian.PutUint32(r[recordHeader+4*i:], epoch)
}

func recordAt(region int) int64 { return recordsAt + int64(region)*recordSize }

// encodeMarks makes the sector of that index of all regions' states.
func encodeMarks(b []byte, id [16]byte, sector int, state []byte) {
	clear(b)
	for i := range min(perMark, len(state)-sector*perMark) {
		b[markHeader+i/4] |= state[sector*perMark+i] << (i % 4 * 2)
	}
	seal(b, id, sector)
}

// decodeMarks fills in the states of the regions of a sector. Of one that is damaged
// all may have changed.
func decodeMarks(b []byte, id [16]byte, sector int, state []byte) {
	good := sealed(b, id, sector)
	for i := range min(perMark, len(state)-sector*perMark) {
		s := b[markHeader+i/4] >> (i % 4 * 2) & 3
		if !good || s > regionRecorded {
			s = regionMarked
		}
		state[sector*perMark+i] = s
	}
}
