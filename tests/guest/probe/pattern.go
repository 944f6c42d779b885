package probe

import "encoding/binary"

// PatternWord is the 8-byte word that fill and blk write at a byte offset
// (in the arena, or on the disk) for a seed.
func PatternWord(seed, offset uint64) uint64 {
	x := seed*0x9e3779b97f4a7c15 + offset/8 + 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// Pattern fills p, whose length is a multiple of 8, with what the guest writes
// from offset on.
func Pattern(p []byte, seed, offset uint64) {
	for i := 0; i+8 <= len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], PatternWord(seed, offset+uint64(i)))
	}
}

// Checksum adds p, whose length is a multiple of 8, to the checksum that
// verify and blk report as sum. Start with 0.
func Checksum(sum uint64, p []byte) uint64 {
	for ; len(p) >= 8; p = p[8:] {
		sum = (sum ^ binary.LittleEndian.Uint64(p)) * 0x100000001b3
		sum ^= sum >> 32
	}
	return sum
}
