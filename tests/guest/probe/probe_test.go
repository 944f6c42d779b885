package probe

import (
	"bytes"
	"errors"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	serial := "SeaBIOS (version 1)\r\n\x1b[cprobe: boot tsc=12 ram=0x100\r\nprobe: \r\nnoise\r\n" +
		"probe: blk op=randread ios=8 cycles=4000 khz=2000\r\nprobe: blk op=flush status=0\r\nprobe: done\r\nprobe: cut=of"
	r := Parse(serial)
	if err := r.Err(); err != nil {
		t.Fatal(err)
	}
	if len(r.Lines) != 3 {
		t.Fatalf("%d lines, want 3: %v", len(r.Lines), r.Lines)
	}
	if !maps.Equal(r.Lines[0].Values, map[string]string{"tsc": "12", "ram": "0x100"}) {
		t.Errorf("first line: %v", r.Lines[0])
	}
	if n, err := r.Number("boot", "ram"); err != nil || n != 256 {
		t.Errorf("ram = %d, %v", n, err)
	}
	second, err := r.Find("blk", 1)
	if err != nil || second.Values["op"] != "flush" {
		t.Errorf("second blk: %v, %v", second, err)
	}
	first, _ := r.Find("blk", 0)
	if s, err := first.Seconds(); err != nil || s != 0.002 {
		t.Errorf("seconds = %v, %v", s, err)
	}
	if _, err := r.Find("blk", 2); !errors.Is(err, ErrNoResult) {
		t.Errorf("third blk: %v", err)
	}
	if _, err := r.Number("boot", "absent"); !errors.Is(err, ErrNoResult) {
		t.Errorf("absent value: %v", err)
	}
}

func TestErrors(t *testing.T) {
	for _, test := range []struct {
		serial string
		want   error
	}{
		{"probe: done\r\n", nil},
		{"", ErrIncomplete},
		{"probe: done", ErrIncomplete},
		{"probe: boot tsc=1\r\n", ErrIncomplete},
		{"probe: fault vector=14 error=0x6 rip=0x1 cr2=0x2\r\nprobe: done\r\n", ErrFault},
		{"probe: error at=blk why=timeout\r\nprobe: done\r\n", ErrWorkload},
		{"probe: unknown word=x\r\nprobe: done\r\n", ErrWorkload},
	} {
		if err := Parse(test.serial).Err(); !errors.Is(err, test.want) {
			t.Errorf("%q: %v, want %v", test.serial, err, test.want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("probe: boot tsc=12\r\nprobe: done\r\n")
	f.Add("probe: =\nprobe: a=b=c d\nprobe: probe: done\n")
	f.Fuzz(func(t *testing.T, serial string) {
		r := Parse(serial)
		_ = r.Err()
		for _, line := range r.Lines {
			if line.Name == "" || strings.ContainsAny(line.Name, " \n") {
				t.Errorf("name %q", line.Name)
			}
			_, _ = line.Seconds()
		}
	})
}

func TestPathBuildsAndCaches(t *testing.T) {
	t.Setenv("GNOMON_CACHE", t.TempDir())
	first, err := Path()
	if err != nil {
		t.Fatal(err)
	}
	built, err := os.Stat(first)
	if err != nil {
		t.Fatal(err)
	}
	second, err := Path()
	if err != nil || second != first {
		t.Fatalf("second call: %s, %v; first was %s", second, err, first)
	}
	if again, err := os.Stat(second); err != nil || !again.ModTime().Equal(built.ModTime()) {
		t.Errorf("built again: %v", err)
	}
	byMake, err := exec.Command("make", "-s", "path").Output()
	if err != nil || strings.TrimSpace(string(byMake)) != first {
		t.Errorf("the makefile's path is %s (%v), ours %s", byMake, err, first)
	}
	left, _ := filepath.Glob(filepath.Join(filepath.Dir(first), "*"))
	if len(left) != 1 {
		t.Errorf("left behind: %v", left)
	}
}

func TestPathReportsABrokenToolchain(t *testing.T) {
	make, err := exec.LookPath("make")
	if err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir() // make, a shell's basics, and no gcc
	for _, tool := range []string{"sh", "cat", "sha256sum", "cut", "mkdir", "mv", "sort"} {
		path, err := exec.LookPath(tool)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(path, filepath.Join(bin, tool)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(make, filepath.Join(bin, "make")); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin)
	t.Setenv("GNOMON_CACHE", t.TempDir())
	if path, err := Path(); !errors.Is(err, ErrBuild) || !strings.Contains(err.Error(), "gcc") {
		t.Errorf("without gcc: %q, %v", path, err)
	}
}

func TestPattern(t *testing.T) {
	whole := make([]byte, 4096)
	Pattern(whole, 7, 512)
	part := make([]byte, 1024)
	Pattern(part, 7, 1024)
	if !bytes.Equal(whole[512:1536], part) {
		t.Error("the pattern depends on where one starts to write it")
	}
	if Checksum(Checksum(0, whole[:1024]), whole[1024:]) != Checksum(0, whole) {
		t.Error("the checksum of a whole is not that of its parts in order")
	}
	other := make([]byte, 4096)
	Pattern(other, 8, 512)
	if Checksum(0, other) == Checksum(0, whole) || bytes.Equal(other, whole) {
		t.Error("two seeds give one pattern")
	}
}

func TestShuffled(t *testing.T) {
	p := Shuffled(1000, 5)
	seen := map[uint32]bool{}
	for _, n := range p {
		seen[n] = true
	}
	if len(seen) != len(p) || slices.Max(p) != 999 {
		t.Errorf("not a permutation: %d different numbers up to %d", len(seen), slices.Max(p))
	}
	if slices.Equal(p, Shuffled(1000, 6)) || slices.IsSorted(p) {
		t.Error("two seeds give one permutation, or none happens")
	}
	if len(Shuffled(0, 1)) != 0 || len(Shuffled(1, 1)) != 1 {
		t.Error("short permutations")
	}
}
