package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gnomon-vmm/gnomon/disk/raw"
)

// scribble makes random changes of an image.
func scribble(t *testing.T, path string, r *rand.Rand) {
	t.Helper()
	n, err := Open(path, false)
	if err != nil {
		t.Fatal(err)
	}
	for range 10 {
		off := r.Int64N(n.Size()/sector) * sector
		length := min((1+r.Int64N(400))*sector, n.Size()-off)
		switch r.IntN(4) {
		case 0:
			err = n.WriteZeroes(off, length, r.IntN(2) == 0)
		case 1:
			err = n.Discard(off, length)
		default:
			p := make([]byte, length)
			for i := range p {
				p[i] = byte(r.Uint32() >> 3)
			}
			err = n.Writev([][]byte{p}, off)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
}

// Commit leaves each image that counts as qemu-img commit leaves it, whichever image of
// the chain is the base, and whatever their sizes.
func TestCommitAsQEMU(t *testing.T) {
	const mib = 1 << 20
	for seed, tt := range []struct {
		sizes []int64 // of the images, the base of all first
		base  int     // the image that is committed to; -1: none is named
		raw   bool    // the lowest is raw
		keep  bool    // -d
	}{
		{[]int64{mib, mib}, -1, false, false},
		{[]int64{mib, mib}, -1, true, true},
		{[]int64{mib, 2 * mib}, -1, true, false},
		{[]int64{2 * mib, mib}, -1, false, false},
		{[]int64{mib, mib, mib}, -1, false, false},
		{[]int64{mib, mib, mib}, 1, false, true},
		{[]int64{mib, mib, mib}, 0, false, true},
		{[]int64{mib, mib, mib, mib}, 0, true, true},
		{[]int64{mib, mib, mib, mib}, 1, true, true},
		{[]int64{2 * mib, mib, 2 * mib}, 0, false, true}, // what the base holds behind the end of another is not to be seen
		{[]int64{2 * mib, mib, 3 * mib}, 0, true, true},
		{[]int64{mib, 2 * mib, mib}, 0, false, true},
		{[]int64{mib, 3 * mib, mib / 2, 2 * mib}, 0, false, true},
	} {
		t.Run(fmt.Sprintf("%d of %v", tt.base, tt.sizes), func(t *testing.T) {
			r := rand.New(rand.NewPCG(uint64(seed), 8))
			ours, theirs := t.TempDir(), t.TempDir()
			var names, formats []string
			for i, size := range tt.sizes {
				o := CreateOptions{Size: size, ClusterSize: []int64{64 << 10, 4 << 10, 32 << 10}[r.IntN(3)]}
				name, format := fmt.Sprintf("%d.qcow2", i), "qcow2"
				if i > 0 {
					o.Backing, o.BackingFormat = names[i-1], formats[i-1]
				}
				if i == 0 && tt.raw {
					name, format = "0.img", "raw"
					p := make([]byte, size)
					for i := range p {
						p[i] = byte(r.Uint32())
					}
					writeFile(t, filepath.Join(ours, name), p)
				} else {
					if err := Create(filepath.Join(ours, name), o); err != nil {
						t.Fatal(err)
					}
					scribble(t, filepath.Join(ours, name), r)
				}
				names, formats = append(names, name), append(formats, format)
			}
			for _, name := range names {
				b, err := os.ReadFile(filepath.Join(ours, name))
				if err != nil {
					t.Fatal(err)
				}
				writeFile(t, filepath.Join(theirs, name), b)
			}
			last := len(names) - 1
			o, args := CommitOptions{Empty: !tt.keep}, []string{"commit", "-q", "-f", "qcow2"}
			if tt.keep {
				args = append(args, "-d")
			}
			base := last - 1
			if tt.base >= 0 {
				base = tt.base
				o.Base = filepath.Join(ours, names[base])
				args = append(args, "-b", filepath.Join(theirs, names[base]))
			}
			before := contentOf(t, filepath.Join(ours, names[last]))
			invalid, err := Commit(context.Background(), filepath.Join(ours, names[last]), o)
			if err != nil {
				t.Fatal(err)
			}
			qemuImg(t, append(args, filepath.Join(theirs, names[last]))...)
			var between []string
			for _, name := range slices.Backward(names[base+1 : last]) {
				between = append(between, filepath.Join(ours, name))
			}
			if !slices.Equal(invalid, between) {
				t.Errorf("invalid are %v, and not %v", invalid, between)
			}
			for i := range names {
				if i > base && i < last {
					continue
				}
				qemuImg(t, "compare", "-q", "-f", formats[i], "-F", formats[i], filepath.Join(ours, names[i]), filepath.Join(theirs, names[i]))
				if a, b := sizeOf(t, filepath.Join(ours, names[i]), formats[i]), sizeOf(t, filepath.Join(theirs, names[i]), formats[i]); a != b {
					t.Errorf("%s has %d bytes, and QEMU's %d", names[i], a, b)
				}
				if formats[i] == "qcow2" {
					qemuImg(t, "check", "-q", filepath.Join(ours, names[i]))
				}
			}
			if string(contentOf(t, filepath.Join(ours, names[last]))) != string(before) {
				t.Error("the image does not read as before")
			}
			n, err := Open(filepath.Join(ours, names[last]), true)
			if err != nil {
				t.Fatal(err)
			}
			defer n.Close()
			for off := int64(0); off < n.Size(); {
				e, err := n.Map(off, n.Size()-off)
				if err != nil {
					t.Fatal(err)
				}
				if !tt.keep && e.Depth == 0 && e.Present {
					t.Fatalf("the empty image holds %d bytes at %d", e.Length, off)
				}
				off += e.Length
			}
			if size := n.file.Size(); !tt.keep && size > 8*n.header.ClusterSize() {
				t.Errorf("the empty image has %d bytes", size)
			}
		})
	}
}

func sizeOf(t *testing.T, path, format string) int64 {
	t.Helper()
	n, err := newChain().openBase("", path, format, raw.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	return n.Size()
}

func contentOf(t *testing.T, path string) []byte {
	t.Helper()
	n, err := Open(path, true)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	b := make([]byte, n.Size())
	if err := n.Readv([][]byte{b}, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// What cannot be committed is refused, and nothing is changed.
func TestCommitRefused(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	for i, name := range []string{"0", "1", "2", "alone"} {
		o := CreateOptions{Size: 1 << 20}
		if i == 1 || i == 2 {
			o.Backing, o.BackingFormat = fmt.Sprint(i-1), "qcow2"
		}
		if err := Create(at(name), o); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		path string
		o    CommitOptions
		says string
	}{
		{"alone", CommitOptions{}, "it lies on none"},
		{"2", CommitOptions{Base: at("alone")}, "does not lie on " + at("alone")},
		{"2", CommitOptions{Base: at("2")}, "does not lie on"},
		{"2", CommitOptions{Base: at("nothing")}, "no such file"},
		{"2", CommitOptions{Base: at("0"), Empty: true}, "cannot be emptied"},
	} {
		if _, err := Commit(context.Background(), at(tt.path), tt.o); !errors.Is(err, ErrBacking) || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s, %+v: %v", tt.path, tt.o, err)
		}
	}
	// Nothing was left open: all can be written.
	for _, name := range []string{"0", "1", "2", "alone"} {
		n, err := raw.Open(at(name), false)
		if err != nil {
			t.Fatal(err)
		}
		defer n.Close()
	}
	if _, err := Commit(context.Background(), at("2"), CommitOptions{Base: at("0")}); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("in use: %v", err)
	}
}

// A commit keeps to its rate: it waits before more is written, and hears meanwhile that
// it is to end.
func TestCommitRate(t *testing.T) {
	dir := t.TempDir()
	base, top := filepath.Join(dir, "base"), filepath.Join(dir, "top")
	size := int64(3 * maxRun)
	if err := errors.Join(os.WriteFile(base, nil, 0o600), os.Truncate(base, size)); err != nil {
		t.Fatal(err)
	}
	if err := Create(top, CreateOptions{Size: size, Backing: "base", BackingFormat: "raw"}); err != nil {
		t.Fatal(err)
	}
	n, err := Open(top, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(n.Writev([][]byte{bytes.Repeat([]byte{1}, int(size))}, 0), n.Close()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := Commit(ctx, top, CommitOptions{Rate: 1, Empty: true}); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	b, err := os.ReadFile(base)
	if err != nil || bytes.Count(b, []byte{1}) > maxRun {
		t.Errorf("%d bytes were written at once, %v", bytes.Count(b, []byte{1}), err)
	}
	if _, err := Commit(t.Context(), top, CommitOptions{Rate: 1 << 40, Empty: true, Files: raw.Options{WriteThrough: true}}); err != nil {
		t.Fatal(err)
	}
	if b, err = os.ReadFile(base); err != nil || bytes.Count(b, []byte{1}) != len(b) {
		t.Errorf("%d bytes of %d, %v", bytes.Count(b, []byte{1}), len(b), err)
	}
}
