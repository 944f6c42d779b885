package boot

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"hash/crc64"
	"io"

	"github.com/ulikunitz/xz/lzma"
)

// Parts of the .xz file format 1.2.0 that a kernel's payload has.
const (
	xzStreamHeaderSize = 12 // section 2.1.1
	xzCheckNone        = 0  // section 2.1.1.2
	xzCheckCRC32       = 1
	xzCheckCRC64       = 4
	xzCheckSHA256      = 10
	xzIndexIndicator   = 0 // section 4.1
	xzFilterX86        = 0x04
	xzFilterLZMA2      = 0x21
	xzSmallestDict     = lzma.MinDictCap
	// lzmaExpansion bounds what a byte of LZMA2 can expand to: a match of 273
	// bytes costs more than a hundredth of a byte.
	lzmaExpansion = 1 << 15
)

var errXZ = errors.New("damaged data")

// xzReader reads one .xz stream of LZMA2 blocks, with or without the BCJ filter
// for x86 code before it, which Linux uses and the lzma module does not have.
// The blocks' checksums are verified. The index behind them serves random
// access only, and is not looked at.
type xzReader struct {
	packed   *countingReader
	maxDict  uint64 // bytes: no more output than that is due
	newCheck func() hash.Hash
	started  bool
	block    io.Reader // expands the current block; nil between blocks
	check    hash.Hash // nil when the stream has none
	err      error     // sticks
}

func newXZReader(packed io.Reader, length int64, size uint64) *xzReader {
	return &xzReader{
		packed:  &countingReader{r: bufio.NewReaderSize(packed, 64<<10)},
		maxDict: max(xzSmallestDict, min(size, uint64(length)*lzmaExpansion)),
	}
}

// countingReader counts what was read. Everything in the format but a block's
// data has a multiple of four bytes, so the count tells the data's padding.
type countingReader struct {
	r *bufio.Reader
	n int64
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

func (x *xzReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for x.err == nil {
		if x.block == nil {
			x.err = x.nextBlock()
			continue
		}
		n, err := x.block.Read(p)
		if x.check != nil {
			x.check.Write(p[:n])
		}
		if err == io.EOF {
			x.block, err = nil, x.endBlock()
		}
		x.err = err
		if n > 0 {
			return n, nil
		}
	}
	return 0, x.err
}

// readHeader reads the stream header.
func (x *xzReader) readHeader() error {
	var h [xzStreamHeaderSize]byte
	if err := x.full(h[:]); err != nil {
		return err
	}
	if !bytes.HasPrefix(h[:], []byte(compressions[xzed].magic)) || h[6] != 0 ||
		binary.LittleEndian.Uint32(h[8:]) != crc32.ChecksumIEEE(h[6:8]) {
		return fmt.Errorf("%w: stream header % x", errXZ, h)
	}
	switch h[7] {
	case xzCheckNone:
	case xzCheckCRC32:
		x.newCheck = func() hash.Hash { return crc32.NewIEEE() }
	case xzCheckCRC64:
		x.newCheck = func() hash.Hash { return crc64.New(crc64.MakeTable(crc64.ECMA)) }
	case xzCheckSHA256:
		x.newCheck = sha256.New
	default:
		return fmt.Errorf("%w: unknown check %d", errXZ, h[7])
	}
	return nil
}

// nextBlock reads the next block's header; it returns io.EOF at the index.
func (x *xzReader) nextBlock() error {
	if !x.started {
		x.started = true
		if err := x.readHeader(); err != nil {
			return err
		}
	}
	// Section 3.1: size in words, flags, filters, padding, CRC32.
	var size [1]byte
	if err := x.full(size[:]); err != nil {
		return err
	}
	if size[0] == xzIndexIndicator {
		return io.EOF
	}
	h := make([]byte, (int(size[0])+1)*4)
	h[0] = size[0]
	if err := x.full(h[1:]); err != nil {
		return err
	}
	body := h[:len(h)-4]
	if binary.LittleEndian.Uint32(h[len(body):]) != crc32.ChecksumIEEE(body) {
		return fmt.Errorf("%w: block header's checksum is wrong", errXZ)
	}
	x86, dict, err := parseXZBlockHeader(body[1:])
	if err != nil {
		return err
	}

	config := lzma.Reader2Config{DictCap: int(max(xzSmallestDict, min(dict, x.maxDict)))}
	if x.block, err = config.NewReader2(x.packed); err != nil {
		return fmt.Errorf("%w: %w", errXZ, err)
	}
	if x86 {
		x.block = newX86Filter(x.block)
	}
	x.check = nil
	if x.newCheck != nil {
		x.check = x.newCheck()
	}
	return nil
}

// parseXZBlockHeader reads a block header from its flags on.
func parseXZBlockHeader(h []byte) (x86 bool, dict uint64, err error) {
	r := bytes.NewReader(h)
	flags, _ := r.ReadByte() // a header has at least 8 bytes
	if flags&0x3C != 0 {
		return false, 0, fmt.Errorf("%w: block flags %#x", errXZ, flags)
	}
	for _, present := range []bool{flags&0x40 != 0, flags&0x80 != 0} { // the sizes, packed and not
		if present {
			if _, err := binary.ReadUvarint(r); err != nil {
				return false, 0, fmt.Errorf("%w: block header: %w", errXZ, err)
			}
		}
	}
	for left := int(flags&3) + 1; left > 0; left-- {
		id, err := binary.ReadUvarint(r)
		if err != nil {
			return false, 0, fmt.Errorf("%w: block header: %w", errXZ, err)
		}
		n, err := binary.ReadUvarint(r)
		if err != nil || n > uint64(r.Len()) {
			return false, 0, fmt.Errorf("%w: filter %#x has bad properties", errXZ, id)
		}
		props := make([]byte, n)
		r.Read(props)
		switch {
		case id == xzFilterX86 && left > 1 && !x86 && bytes.Count(props, []byte{0}) == len(props):
			x86 = true // no properties, or a start offset of zero
		case id == xzFilterLZMA2 && left == 1 && n == 1:
			d, err := lzma.DecodeDictCap(props[0])
			return x86, uint64(max(d, 0)), err
		default:
			return false, 0, fmt.Errorf("%w: filter %#x: only LZMA2 and x86 BCJ before it are supported", errXZ, id)
		}
	}
	return false, 0, fmt.Errorf("%w: the last filter is not LZMA2", errXZ)
}

// endBlock reads what follows a block's data: padding to 4 bytes, and the check.
func (x *xzReader) endBlock() error {
	var pad [3]byte
	if err := x.full(pad[:-x.packed.n&3]); err != nil {
		return err
	}
	if x.check == nil {
		return nil
	}
	want := make([]byte, x.check.Size())
	if err := x.full(want); err != nil {
		return err
	}
	got := x.check.Sum(nil)
	if len(got) <= 8 { // the CRCs are stored little-endian, Go sums are big-endian
		for i, j := 0, len(got)-1; i < j; i, j = i+1, j-1 {
			got[i], got[j] = got[j], got[i]
		}
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("%w: block's checksum is % x, should be % x", errXZ, got, want)
	}
	return nil
}

// full fills p; the stream may not end within it.
func (x *xzReader) full(p []byte) error {
	_, err := io.ReadFull(x.packed, p)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return err
}
