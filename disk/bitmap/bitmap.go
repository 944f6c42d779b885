// Package bitmap tells which parts of a disk have changed: one bit for each
// granule of it.
package bitmap

import (
	"errors"
	"fmt"
	"math/bits"
	"sync/atomic"
)

// Limits of granularities, which are powers of two, and of the memory of a bitmap.
const (
	MinGranularity     = 512
	MaxGranularity     = 1 << 31
	DefaultGranularity = 64 << 10
	maxBits            = 1 << 30 // 128 MiB
)

// Errors of making and combining bitmaps.
var (
	ErrGranularity = errors.New("bitmap granularity")
	ErrSize        = errors.New("bitmap of another size")
)

// Bitmap has a bit for each granule of a disk. Its methods may be called
// concurrently; those that change many bits are seen to do so one by one.
type Bitmap struct {
	name    string
	shift   uint
	size    int64 // of the disk, bytes
	words   []atomic.Uint64
	count   atomic.Int64
	enabled atomic.Bool
}

// New makes a bitmap of a disk of size bytes, all clear and enabled. granularity
// is in bytes; 0: DefaultGranularity.
func New(name string, size, granularity int64) (*Bitmap, error) {
	if granularity == 0 {
		granularity = DefaultGranularity
	}
	if granularity < MinGranularity || granularity > MaxGranularity || granularity&(granularity-1) != 0 {
		return nil, fmt.Errorf("%w: %d: powers of two from %d to %d are possible", ErrGranularity, granularity, MinGranularity, int64(MaxGranularity))
	}
	b := &Bitmap{name: name, shift: uint(bits.TrailingZeros64(uint64(granularity))), size: size}
	if size < 0 || b.Bits() > maxBits {
		return nil, fmt.Errorf("%w: %d is too fine for a disk of %d bytes", ErrGranularity, granularity, size)
	}
	b.words = make([]atomic.Uint64, (b.Bits()+63)/64)
	b.enabled.Store(true)
	return b, nil
}

// Name is the bitmap's name.
func (b *Bitmap) Name() string { return b.name }

// Granularity is how many bytes of the disk a bit is about.
func (b *Bitmap) Granularity() int64 { return 1 << b.shift }

// Size is the disk's size in bytes.
func (b *Bitmap) Size() int64 { return b.size }

// Bits is the number of bits.
func (b *Bitmap) Bits() int64 {
	n := b.size >> b.shift
	if b.size&(1<<b.shift-1) != 0 {
		n++
	}
	return n
}

// Count is how many bits are set.
func (b *Bitmap) Count() int64 { return b.count.Load() }

// Enabled tells that Record sets bits.
func (b *Bitmap) Enabled() bool { return b.enabled.Load() }

// SetEnabled has Record set bits, or not.
func (b *Bitmap) SetEnabled(on bool) { b.enabled.Store(on) }

// Record is Set of a bitmap that is enabled, and nothing of another.
func (b *Bitmap) Record(off, n int64) {
	if b.enabled.Load() {
		b.Set(off, n)
	}
}

// Set sets the bits of all granules that n bytes from off on touch. What lies
// outside the disk does not matter.
func (b *Bitmap) Set(off, n int64) {
	b.change(off, n, func(w *atomic.Uint64, mask uint64) {
		if w.Load()&mask == mask {
			return
		}
		b.count.Add(int64(bits.OnesCount64(mask &^ w.Or(mask))))
	})
}

// Clear clears the bits of all granules that n bytes from off on touch.
func (b *Bitmap) Clear(off, n int64) {
	b.change(off, n, func(w *atomic.Uint64, mask uint64) {
		if w.Load()&mask == 0 {
			return
		}
		b.count.Add(-int64(bits.OnesCount64(mask & w.And(^mask))))
	})
}

// ClearAll clears every bit.
func (b *Bitmap) ClearAll() { b.Clear(0, b.size) }

// change calls f for the words of a range, with the bits that are meant.
func (b *Bitmap) change(off, n int64, f func(w *atomic.Uint64, mask uint64)) {
	if off < 0 {
		off, n = 0, n+off
	}
	n = min(n, b.size-off)
	if n <= 0 {
		return
	}
	first, last := uint64(off)>>b.shift, uint64(off+n-1)>>b.shift
	for i := first / 64; i <= last/64; i++ {
		mask := ^uint64(0)
		if i == first/64 {
			mask <<= first % 64
		}
		if i == last/64 {
			mask &= ^uint64(0) >> (63 - last%64)
		}
		f(&b.words[i], mask)
	}
}

// Get tells whether the bit of the granule at off is set.
func (b *Bitmap) Get(off int64) bool {
	if off < 0 || off >= b.size {
		return false
	}
	i := uint64(off) >> b.shift
	return b.words[i/64].Load()>>(i%64)&1 != 0
}

// Next is the first run of set bits at off or behind it, in bytes. The run begins
// at off if that lies within a granule, and ends with the disk at the latest; n is
// 0 where there is none.
func (b *Bitmap) Next(off int64) (start, n int64) {
	off = max(off, 0)
	if off >= b.size {
		return b.size, 0
	}
	first := b.find(off>>b.shift, 0)
	if first == b.Bits() {
		return b.size, 0
	}
	end := b.find(first, ^uint64(0))
	start = max(off, first<<b.shift)
	if end == b.Bits() {
		return start, b.size - start
	}
	return start, end<<b.shift - start
}

// find is the first bit from i on that is set in its word xor flip, or Bits.
func (b *Bitmap) find(i int64, flip uint64) int64 {
	for w := i / 64; w < int64(len(b.words)); w++ {
		v := b.words[w].Load() ^ flip
		if w == i/64 {
			v &= ^uint64(0) << (i % 64)
		}
		if v != 0 {
			return min(w*64+int64(bits.TrailingZeros64(v)), b.Bits())
		}
	}
	return b.Bits()
}

// Merge sets all bits that stand for what other's stand for. Disks that differ in
// size are refused.
func (b *Bitmap) Merge(other *Bitmap) error {
	if b.size != other.size {
		return fmt.Errorf("%w: %s is of %d bytes, %s of %d", ErrSize, b.name, b.size, other.name, other.size)
	}
	if b.shift == other.shift {
		for i := range other.words {
			if v := other.words[i].Load(); v != 0 {
				b.count.Add(int64(bits.OnesCount64(v &^ b.words[i].Or(v))))
			}
		}
		return nil
	}
	for off := int64(0); ; {
		start, n := other.Next(off)
		if n == 0 {
			return nil
		}
		b.Set(start, n)
		off = start + n
	}
}

// Copy is a bitmap of another name with the same bits, that is enabled or not.
func (b *Bitmap) Copy(name string, enabled bool) *Bitmap {
	c := &Bitmap{name: name, shift: b.shift, size: b.size, words: make([]atomic.Uint64, len(b.words))}
	for i := range b.words {
		v := b.words[i].Load()
		c.words[i].Store(v)
		c.count.Add(int64(bits.OnesCount64(v)))
	}
	c.enabled.Store(enabled)
	return c
}

// Resize makes it a bitmap of a disk of another size, whose new parts, if any, have
// not changed. Nothing else uses it meanwhile.
func (b *Bitmap) Resize(size int64) error {
	other, err := New(b.name, size, b.Granularity())
	if err != nil {
		return err
	}
	for i := range other.words {
		if i < len(b.words) {
			other.words[i].Store(b.words[i].Load())
		}
	}
	if tail := uint64(other.Bits()) % 64; tail != 0 && size < b.size {
		other.words[len(other.words)-1].And(1<<tail - 1)
	}
	count := int64(0)
	for i := range other.words {
		count += int64(bits.OnesCount64(other.words[i].Load()))
	}
	b.size, b.words = size, other.words
	b.count.Store(count)
	return nil
}

// Bytes fills p with the bits from the given one on, a multiple of 8: bit i of the
// bitmap is bit i%8 of byte i/8, as qcow2 images and NBD keep them. Bits behind
// the last are clear.
func (b *Bitmap) Bytes(p []byte, from int64) {
	for i := range p {
		p[i] = 0
		if bit := from + int64(i)*8; bit/64 < int64(len(b.words)) {
			p[i] = byte(b.words[bit/64].Load() >> (bit % 64))
		}
	}
}

// SetBytes sets the bits that are set in p, as Bytes returns them.
func (b *Bitmap) SetBytes(p []byte, from int64) {
	for i, v := range p {
		bit := from + int64(i)*8
		if v == 0 || bit >= b.Bits() {
			continue
		}
		if left := b.Bits() - bit; left < 8 {
			v &= 1<<left - 1
		}
		mask := uint64(v) << (bit % 64)
		b.count.Add(int64(bits.OnesCount64(mask &^ b.words[bit/64].Or(mask))))
	}
}
