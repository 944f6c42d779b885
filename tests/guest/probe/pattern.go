package probe

import "encoding/binary"

// PatternWord is the 8-byte word that fill and blk write at a byte offset
// (in the arena, or on the disk) for a seed.
func PatternWord(seed, offset uint64) uint64 {
	return mix(seed*step + offset/8)
}

const step = 0x9e3779b97f4a7c15

func mix(x uint64) uint64 {
	x += step
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// Random is the guest's next random number, as blk takes its places from them: state
// begins as order=.
func Random(state *uint64) uint64 {
	*state += step
	return mix(*state)
}

// Pattern fills p, whose length is a multiple of 8, with what the guest writes
// from offset on.
func Pattern(p []byte, seed, offset uint64) {
	for i := 0; i+8 <= len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], PatternWord(seed, offset+uint64(i)))
	}
}

// Checksum adds p, whose length is a multiple of 8, to the checksum that
// verify, touch, chase and blk report as sum. Start with 0.
func Checksum(sum uint64, p []byte) uint64 {
	for ; len(p) >= 8; p = p[8:] {
		sum = (sum ^ binary.LittleEndian.Uint64(p)) * 0x100000001b3
		sum ^= sum >> 32
	}
	return sum
}

// Shuffled is the guest's permutation of n numbers for a seed. An arena of n
// pages with scatter=seed has its i-th page at the number it gives to i, counted
// in pages from where the heap begins (which map reports; RAM above 4 GiB
// follows that below). The nodes of a chase of n pages follow each other by it.
func Shuffled(n int, seed uint64) []uint32 {
	p := make([]uint32, n)
	for i := range p {
		p[i] = uint32(i)
	}
	for i := n - 1; i > 0; i-- {
		seed += step
		j := mix(seed) % uint64(i+1)
		p[i], p[j] = p[j], p[i]
	}
	return p
}
