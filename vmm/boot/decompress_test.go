package boot

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"os"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/ulikunitz/xz/lzma"
	"pgregory.net/rapid"
)

var supported = []compression{gzipped, lz4ed, zstded, xzed}

// expand decompresses packed and checks that it gives size bytes.
func expand(c compression, packed []byte, size int) ([]byte, error) {
	r, err := decompress(c, io.NewSectionReader(bytes.NewReader(packed), 0, int64(len(packed))), uint64(size))
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(io.LimitReader(r, int64(size)+1))
}

func TestDecompressGivesBackWhatWasPacked(t *testing.T) {
	for _, c := range supported {
		sizes := []int{1, 4, 5, 100, 70_000}
		if c == lz4ed {
			sizes = append(sizes, lz4LegacyBlock, lz4LegacyBlock+1)
		}
		for _, n := range sizes {
			t.Run(fmt.Sprintf("%s %d", c, n), func(t *testing.T) {
				want := bytes.Repeat(codeLike(min(n, 100_000), uint32(n)), n/100_000+1)[:n]
				packed := pack(t, c, want)
				if c != gzipped {
					packed = packed[:len(packed)-sizeTrailer]
				}
				got, err := expand(c, packed, n)
				if err != nil || !bytes.Equal(got, want) {
					t.Errorf("%d bytes, equal: %v, %v", len(got), bytes.Equal(got, want), err)
				}
			})
		}
	}
}

// TestXZFromXZ reads what the xz program made of codeLike(6000, 7) with
// `xz --check=crc32 --x86 --lzma2=preset=9e,dict=1MiB`.
func TestXZFromXZ(t *testing.T) {
	packed, err := os.ReadFile("testdata/codelike-x86.xz")
	if err != nil {
		t.Fatal(err)
	}
	want := codeLike(6000, 7)
	got, err := expand(xzed, packed, len(want))
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes, equal: %v, %v", len(got), bytes.Equal(got, want), err)
	}
	// The model encoder agrees with xz's, so that other tests can trust it.
	block := packed[xzStreamHeaderSize:]
	r, err := lzma.NewReader2(bytes.NewReader(block[(int(block[0])+1)*4:]))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, encodeX86(want)) {
		t.Errorf("encodeX86 is not what xz does (%v)", err)
	}
}

func TestXZChecks(t *testing.T) {
	want := codeLike(5000, 11)
	for _, check := range []byte{xzCheckNone, xzCheckCRC32, xzCheckCRC64, xzCheckSHA256} {
		packed := packXZ(t, want, check)
		if got, err := expand(xzed, packed, len(want)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("check %d: equal: %v, %v", check, bytes.Equal(got, want), err)
		}
		if check == xzCheckNone {
			continue
		}
		packed[len(packed)-2] ^= 1 // the check's last byte
		if _, err := expand(xzed, packed, len(want)); !errors.Is(err, errXZ) || !strings.Contains(err.Error(), "checksum") {
			t.Errorf("check %d, wrong: %v", check, err)
		}
	}
	if _, err := expand(xzed, packXZ(t, want, 2), len(want)); !errors.Is(err, errXZ) {
		t.Errorf("unknown check: %v", err)
	}
	// Two blocks, the second with a filter offset that starts anew.
	one, two := packXZ(t, want, xzCheckCRC32), packXZ(t, want, xzCheckCRC32)
	both := append(one[:len(one)-1], two[xzStreamHeaderSize:]...)
	if got, err := expand(xzed, both, 2*len(want)); err != nil || !bytes.Equal(got, append(want, want...)) {
		t.Errorf("two blocks: %d bytes, %v", len(got), err)
	}
}

func TestX86FilterUndoesEncoder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		plain := rapid.SliceOfN(rapid.SampledFrom([]byte{0xE8, 0xE9, 0x00, 0xFF, 0x01, 0x80, 0x90}), 0, 200).Draw(t, "plain")
		r := io.Reader(bytes.NewReader(encodeX86(plain)))
		if rapid.Bool().Draw(t, "a byte at a time") {
			r = iotest.OneByteReader(r)
		}
		if got, err := io.ReadAll(newX86Filter(r)); err != nil || !bytes.Equal(got, plain) {
			t.Fatalf("% x became % x (%v)", plain, got, err)
		}
	})
}

// TestX86FilterAcrossBuffers has instructions at each alignment to the
// filter's buffer.
func TestX86FilterAcrossBuffers(t *testing.T) {
	plain := codeLike(3*x86FilterBytes+17, 5)
	if got, err := io.ReadAll(newX86Filter(bytes.NewReader(encodeX86(plain)))); err != nil || !bytes.Equal(got, plain) {
		t.Errorf("%d bytes of %d, %v", len(got), len(plain), err)
	}
}

// TestDamage flips bytes and cuts ends. A checksum must find each flip, except
// that LZ4's legacy frame has none; nothing may give more than was due.
func TestDamage(t *testing.T) {
	want := codeLike(20_000, 9)
	random := rand.New(rand.NewSource(1))
	for _, c := range supported {
		packed := pack(t, c, want)
		if c != gzipped {
			packed = packed[:len(packed)-sizeTrailer]
		}
		for range 150 {
			bad := bytes.Clone(packed)
			at := random.Intn(len(bad))
			bad[at] ^= byte(1 << random.Intn(8))
			got, err := expand(c, bad, len(want))
			if c == gzipped && at < 10 && err == nil && bytes.Equal(got, want) {
				continue // time stamp and the like
			}
			if err == nil && len(got) == len(want) && !bytes.Equal(got, want) && c != lz4ed {
				t.Errorf("%s: flip at %d of %d goes unseen", c, at, len(bad))
			}
			if err != nil && !errors.Is(err, ErrCompression) {
				t.Errorf("%s: flip at %d: %v", c, at, err)
			}
		}
		for range 50 {
			cut := packed[:random.Intn(len(packed)-1)] // of xz, without the index indicator
			got, err := expand(c, cut, len(want))
			if err == nil && (c != lz4ed || len(got) == len(want)) {
				t.Errorf("%s: cut to %d of %d goes unseen", c, len(cut), len(packed))
			}
			if err != nil && !errors.Is(err, ErrCompression) {
				t.Errorf("%s: cut to %d: %v", c, len(cut), err)
			}
		}
	}
}

// TestXZRefuses has what a stream can say that is not supported.
func TestXZRefuses(t *testing.T) {
	for _, x := range []struct {
		name string
		body []byte
	}{
		{"no filter is LZMA2", []byte{0, xzFilterX86, 0}},
		{"ARM64 filter", []byte{1, 0x0A, 0, xzFilterLZMA2, 1, 16}},
		{"delta filter", []byte{1, 3, 1, 0, xzFilterLZMA2, 1, 16}},
		{"x86 filter that starts elsewhere", []byte{1, xzFilterX86, 4, 0, 1, 0, 0, xzFilterLZMA2, 1, 16}},
		{"LZMA2 twice", []byte{1, xzFilterLZMA2, 1, 16, xzFilterLZMA2, 1, 16}},
		{"dictionary code out of range", []byte{0, xzFilterLZMA2, 1, 41}},
		{"properties past the end", []byte{0, xzFilterLZMA2, 200, 1}},
		{"reserved flag", []byte{4, xzFilterLZMA2, 1, 16}},
		{"cut short", []byte{3}},
		{"nothing", []byte{0x40}},
	} {
		if _, _, err := parseXZBlockHeader(x.body); err == nil {
			t.Errorf("%s: accepted", x.name)
		}
	}
	x86, dict, err := parseXZBlockHeader([]byte{0xC1, 1, 2, xzFilterX86, 4, 0, 0, 0, 0, xzFilterLZMA2, 1, 16, 0, 0})
	if err != nil || !x86 || dict != 1<<20 {
		t.Errorf("sizes, x86 filter with offset 0, LZMA2: x86 %v, dictionary %d, %v", x86, dict, err)
	}
}
