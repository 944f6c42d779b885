package wire

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"testing"

	"pgregory.net/rapid"
)

// TestPatternIsOneStream cuts the pattern at any place: the pieces must be
// those of the whole, whose words a plain loop makes.
func TestPatternIsOneStream(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		seed := rapid.Uint64().Draw(t, "seed")
		whole := make([]byte, 4096)
		for i := 0; i < len(whole); i += 8 {
			binary.LittleEndian.PutUint64(whole[i:], mix(seed, uint64(i/8)))
		}
		offset := rapid.IntRange(0, len(whole)).Draw(t, "offset")
		size := rapid.IntRange(0, len(whole)-offset).Draw(t, "size")
		got := make([]byte, size)
		Pattern(got, seed, int64(offset))
		if !bytes.Equal(got, whole[offset:offset+size]) {
			t.Fatalf("%d bytes at %d are not those of the whole pattern", size, offset)
		}
	})
}

func TestPatternSumHashesThePattern(t *testing.T) {
	const seed, size = 42, 200_001 // more than one buffer, and not whole words
	p := make([]byte, size)
	Pattern(p, seed, 0)
	want := sha256.Sum256(p)
	got := PatternSum(seed, size)
	if got.Size != size || got.SHA256 != hex.EncodeToString(want[:]) {
		t.Fatalf("got %+v, want %x", got, want)
	}
}

func TestPatternsOfSeedsDiffer(t *testing.T) {
	seen := map[string]uint64{}
	for seed := range uint64(1000) {
		p := make([]byte, 16)
		Pattern(p, seed, 0)
		if other, ok := seen[string(p)]; ok {
			t.Fatalf("seeds %d and %d begin alike", other, seed)
		}
		seen[string(p)] = seed
	}
}
