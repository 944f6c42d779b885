package wire

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
)

// Pattern fills p with what stands at offset in the endless pattern of seed.
// It is the same inside and outside the guest. Any offset can be had at once,
// and no two 8-byte words of one seed are alike.
func Pattern(p []byte, seed uint64, offset int64) {
	var word [8]byte
	for len(p) > 0 {
		index, skip := uint64(offset)/8, int(offset%8)
		if skip == 0 && len(p) >= 8 {
			binary.LittleEndian.PutUint64(p, mix(seed, index))
			p, offset = p[8:], offset+8
			continue
		}
		binary.LittleEndian.PutUint64(word[:], mix(seed, index))
		n := copy(p, word[skip:])
		p, offset = p[n:], offset+int64(n)
	}
}

// mix is SplitMix64's output function over a counter; for one seed it is a
// bijection, which is why no two words are alike.
func mix(seed, index uint64) uint64 {
	z := seed + (index+1)*0x9e3779b97f4a7c15
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

// PatternSum returns the length and hash of the first size bytes of seed's
// pattern.
func PatternSum(seed uint64, size int64) SumResult {
	h := sha256.New()
	buf := make([]byte, 64<<10)
	for off := int64(0); off < size; {
		n := min(int64(len(buf)), size-off)
		Pattern(buf[:n], seed, off)
		h.Write(buf[:n])
		off += n
	}
	return SumResult{Size: size, SHA256: hex.EncodeToString(h.Sum(nil))}
}
