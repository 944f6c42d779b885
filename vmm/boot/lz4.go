package boot

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/pierrec/lz4/v4"
)

const (
	lz4LegacyMagic = 0x184C2102
	lz4LegacyBlock = 8 << 20 // bytes a block expands to at most
)

var errLZ4 = errors.New("damaged data")

// lz4Reader reads LZ4's legacy frame: blocks of at most 8 MiB, each packed on
// its own behind its packed size. There is no end mark and no checksum.
// (lz4_Frame_format.md, "Legacy frame")
type lz4Reader struct {
	packed    io.Reader
	left      int64  // bytes of packed
	size      uint64 // bytes still to come out
	block     []byte // packed
	expanded  []byte
	available []byte // of expanded
}

func newLZ4Reader(packed io.Reader, length int64, size uint64) *lz4Reader {
	return &lz4Reader{packed: packed, left: length, size: size}
}

func (r *lz4Reader) Read(p []byte) (int, error) {
	for len(r.available) == 0 {
		if err := r.nextBlock(); err != nil {
			return 0, err
		}
	}
	n := copy(p, r.available)
	r.available = r.available[n:]
	return n, nil
}

// nextBlock expands the next block; it returns io.EOF after the last.
func (r *lz4Reader) nextBlock() error {
	if r.left == 0 {
		return io.EOF
	}
	n, err := r.readWord()
	if err == nil && n == lz4LegacyMagic { // at the start, and between frames
		n, err = r.readWord()
	}
	if err != nil {
		return err
	}
	if int64(n) > r.left {
		return fmt.Errorf("%w: block of %d bytes where %d are left", io.ErrUnexpectedEOF, n, r.left)
	}
	if uint64(n) > uint64(lz4.CompressBlockBound(lz4LegacyBlock)) {
		return fmt.Errorf("%w: block of %d bytes", errLZ4, n)
	}
	if cap(r.block) < int(n) {
		r.block = make([]byte, n)
	}
	r.block = r.block[:n]
	if _, err := io.ReadFull(r.packed, r.block); err != nil {
		return err
	}
	r.left -= int64(n)
	if r.expanded == nil {
		// One byte more than is due lets a block that is too big be seen.
		r.expanded = make([]byte, min(lz4LegacyBlock, r.size+1))
	}
	m, err := lz4.UncompressBlock(r.block, r.expanded)
	if err != nil {
		return fmt.Errorf("%w: %w", errLZ4, err)
	}
	r.available = r.expanded[:m]
	return nil
}

func (r *lz4Reader) readWord() (uint32, error) {
	if r.left < 4 {
		return 0, io.ErrUnexpectedEOF
	}
	var b [4]byte
	_, err := io.ReadFull(r.packed, b[:])
	r.left -= int64(len(b))
	return binary.LittleEndian.Uint32(b[:]), err
}
