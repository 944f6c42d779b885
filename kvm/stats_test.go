package kvm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"
)

// statsImage makes what a statistics descriptor reads as.
func statsImage(header statsHeader, desc statsDesc, name string, values ...uint64) []byte {
	var image bytes.Buffer
	for _, part := range []any{header, desc} {
		if err := binary.Write(&image, binary.NativeEndian, part); err != nil {
			panic(err)
		}
	}
	padded := make([]byte, header.NameSize)
	copy(padded, name)
	image.Write(padded)
	for _, v := range values {
		image.Write(binary.NativeEndian.AppendUint64(nil, v))
	}
	return image.Bytes()
}

var (
	goodHeader = statsHeader{NameSize: 48, Count: 1, IDOffset: 24, DescOffset: 24, DataOffset: 24 + 16 + 48}
	goodDesc   = statsDesc{Flags: 0x123, Exponent: -9, Size: 2, BucketSize: 5}
)

func TestParseStats(t *testing.T) {
	stats, err := parseStats(statsImage(goodHeader, goodDesc, "halt_wait", 7, 8))
	if err != nil || len(stats) != 1 {
		t.Fatalf("%+v, %v", stats, err)
	}
	s := stats[0]
	if s.Name != "halt_wait" || s.Type != StatLinearHistogram || s.Unit != StatSeconds || s.Base != 2 ||
		s.Exponent != -9 || s.BucketSize != 5 || len(s.Value) != 2 || s.Value[0] != 7 || s.Value[1] != 8 {
		t.Errorf("%+v", s)
	}
}

func FuzzParseStats(f *testing.F) {
	f.Add(statsImage(goodHeader, goodDesc, "halt_wait", 7, 8))
	huge := goodHeader
	huge.Count, huge.NameSize = 0xffffffff, 0
	f.Add(statsImage(huge, goodDesc, ""))
	outside := goodDesc
	outside.Offset = 0xffffffff
	f.Add(statsImage(goodHeader, outside, "outside", 1))
	f.Fuzz(func(t *testing.T, image []byte) {
		stats, err := parseStats(image)
		if err != nil && !errors.Is(err, ErrStats) {
			t.Errorf("%v", err)
		}
		for _, s := range stats {
			if 8*len(s.Value) > len(image) || len(s.Name) > len(image) {
				t.Errorf("%d values and a name of %d from %d bytes", len(s.Value), len(s.Name), len(image))
			}
		}
	})
}
