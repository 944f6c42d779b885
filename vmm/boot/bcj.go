package boot

import (
	"encoding/binary"
	"io"
	"math/bits"
)

// x86Filter undoes the BCJ filter for x86 code: operands of CALL (E8) and JMP
// (E9), made absolute to compress better, become relative again. Encoder and
// decoder must agree on what looks like an instruction, so the rules are those
// of the LZMA SDK and of .xz. An operand is converted only if its top byte is
// 00 or FF. Opcode-like bytes just before, left unconverted, raise the doubt
// that this one is part of an operand of theirs: with two in the last three
// bytes nothing is converted; with one, the byte at its distance before the
// operand's last must not be 00 or FF.
type x86Filter struct {
	r   io.Reader
	err error // of r

	buf      []byte
	done     int // bytes of buf that are converted
	returned int // bytes of buf, at most done, that the caller has

	offset int64 // of buf[0] in the block
	opcode int64 // where in the block the last opcode-like byte was
	near   uint8 // bit n: n bytes before that, or there, was one that is left unconverted
}

const (
	callLength     = 5 // E8 or E9 and 4 bytes of operand
	x86FilterBytes = 64 << 10
)

func newX86Filter(r io.Reader) *x86Filter {
	return &x86Filter{r: r, buf: make([]byte, 0, x86FilterBytes), opcode: -callLength}
}

func (f *x86Filter) Read(p []byte) (int, error) {
	for f.returned == f.done {
		if f.err != nil {
			if f.done == len(f.buf) {
				return 0, f.err
			}
			f.done = len(f.buf) // a tail too short for an instruction stays as it is
			break
		}
		f.fill()
	}
	n := copy(p, f.buf[f.returned:f.done])
	f.returned += n
	return n, nil
}

// fill reads more of r, behind what is still too short to be converted.
func (f *x86Filter) fill() {
	f.offset += int64(f.done)
	rest := copy(f.buf[:cap(f.buf)], f.buf[f.done:])
	n, err := f.r.Read(f.buf[rest:cap(f.buf)])
	f.buf, f.err = f.buf[:rest+n], err
	f.done, f.returned = f.convert(), 0
}

// convert works through buf and returns how many bytes it is done with.
func (f *x86Filter) convert() int {
	i := 0
	for i+callLength <= len(f.buf) {
		if f.buf[i]&0xFE != 0xE8 {
			i++
			continue
		}
		gap := f.offset + int64(i) - f.opcode
		f.opcode += gap
		if gap > 3 {
			f.near = 0
		} else {
			f.near = f.near << (gap - 1) & 7
		}
		distance := bits.Len8(f.near) // of the unconverted one, if there is just one
		operand := f.buf[i+1 : i+callLength]
		if !signByte(operand[3]) || bits.OnesCount8(f.near) > 1 || distance > 0 && signByte(operand[3-distance]) {
			f.near = f.near<<1 | 1
			i++
			continue
		}
		next := uint32(f.offset) + uint32(i) + callLength
		v := binary.LittleEndian.Uint32(operand) - next
		if distance > 0 {
			// The encoder kept the byte that was looked at from becoming 00 or FF.
			shift := 8 * (3 - distance)
			if signByte(byte(v >> shift)) {
				v = v ^ (1<<(shift+8) - 1) - next
			}
		}
		// Bit 24 is the sign of what fits into 25 bits.
		v = uint32(int32(v<<7) >> 7)
		binary.LittleEndian.PutUint32(operand, v)
		i += callLength
	}
	return i
}

// signByte tells whether b is the top byte of a small number of either sign.
func signByte(b byte) bool { return b == 0x00 || b == 0xFF }
