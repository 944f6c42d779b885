package archive

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/changes"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
)

// restoredByHand does what the page of the format says of restoring without Gnomon.
func restoredByHand(t *testing.T, a *Archive, want [][]byte) {
	t.Helper()
	page, err := os.ReadFile("../../docs/backup-format.md")
	if err != nil {
		t.Fatal(err)
	}
	_, recipe, _ := strings.Cut(string(page), "    cp --sparse")
	recipe, _, ok := strings.Cut("    cp --sparse"+recipe, "\n\n")
	if !ok || !strings.Contains(recipe, "done") {
		t.Fatal("the page has no recipe any more")
	}
	for _, i := range []int{0, 2, len(want) - 1} {
		steps := ""
		for k := 1; k <= i; k++ {
			steps += fmt.Sprintf(" %06d", k+1)
		}
		cmd := exec.Command("sh", "-e")
		cmd.Dir = a.dir
		cmd.Stdin = strings.NewReader(strings.NewReplacer("000002 000003", steps, "disk.img", "../disk.img").Replace(recipe))
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		path := filepath.Join(a.dir, "../disk.img")
		got, err := os.ReadFile(path)
		if err != nil || !bytes.Equal(got, want[i]) {
			t.Errorf("backup %d, by hand: %v, not the disk as it was", i+1, err)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

// newPlain makes an archive of raw files with a full backup of 4 MiB and two of changes.
func newPlain(t testing.TB) *Archive {
	t.Helper()
	a, err := Create(filepath.Join(t.TempDir(), "backups"), FormatRaw)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	for n := range 3 {
		p, err := a.Begin(4<<20, n == 0)
		if err != nil {
			t.Fatal(err)
		}
		write(t, p, func(d block.Node) error {
			err := d.Writev([][]byte{bytes.Repeat([]byte{byte(n + 1)}, 192<<10)}, int64(n)<<18)
			return errors.Join(err, d.Writev([][]byte{make([]byte, 128<<10)}, int64(n)<<18+1<<20), d.WriteZeroes(3<<20, 64<<10, true))
		})
		if _, err := p.Finish(nil, ""); err != nil {
			t.Fatal(err)
		}
	}
	return a
}

// write does what a machine does with the image of a backup that is being made.
func write(t testing.TB, p *Pending, f func(block.Node) error) {
	t.Helper()
	d, err := p.Target()
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f(d), d.Close()); err != nil {
		t.Fatal(err)
	}
}

// What changed to zeroes is zero in the backup, whether it was written as data or as
// zeroes, and takes no space.
func TestZeroes(t *testing.T) {
	a := newPlain(t)
	p, err := a.Begin(4<<20, false)
	if err != nil {
		t.Fatal(err)
	}
	write(t, p, func(d block.Node) error {
		return errors.Join(d.Writev([][]byte{make([]byte, 64<<10)}, 0), d.WriteZeroes(256<<10, 64<<10, true), d.Discard(512<<10, 64<<10))
	})
	s, err := p.Finish(nil, "")
	if err != nil || s.Bytes != 0 {
		t.Fatalf("%+v, %v", s, err)
	}
	n, err := a.OpenStep(0)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	got := content(t, n)
	for _, off := range []int{0, 256 << 10} {
		if !block.IsZero(got[off : off+64<<10]) {
			t.Errorf("at %d: not zero", off)
		}
		if block.IsZero(got[off+64<<10 : off+192<<10]) {
			t.Errorf("behind %d: zero", off)
		}
	}
	sound(t, a)
	var st unix.Stat_t
	if err := unix.Stat(a.path(a.File(s)), &st); err != nil || st.Blocks != 0 || st.Size != 4<<20 {
		t.Errorf("the file of nothing but zeroes has %d blocks, %d bytes, %v", st.Blocks, st.Size, err)
	}
}

// What changed is written once, into the file that has it in the end; by whole blocks.
func TestChangesAreWrittenOnce(t *testing.T) {
	a := newPlain(t)
	entries := func() (names []string) {
		all, err := os.ReadDir(a.dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range all {
			if strings.HasPrefix(e.Name(), "000004") {
				names = append(names, e.Name())
			}
		}
		return names
	}
	p, err := a.Begin(4<<20, false)
	if err != nil {
		t.Fatal(err)
	}
	if p.Path() != "" {
		t.Errorf("a machine is told to write to %s", p.Path())
	}
	pending := entries()
	if len(pending) != 1 {
		t.Fatalf("%v are being written", pending)
	}
	first, err := os.Stat(a.path(pending[0]))
	if err != nil {
		t.Fatal(err)
	}
	mixed := slices.Concat(make([]byte, 64<<10), bytes.Repeat([]byte{7}, 128<<10), make([]byte, 64<<10))
	write(t, p, func(d block.Node) error {
		for _, bad := range [][2]int64{{512, 64 << 10}, {0, 512}, {4<<20 - 512, 512}, {-64 << 10, 64 << 10}} {
			if d.Writev([][]byte{make([]byte, bad[1])}, bad[0]) == nil || d.WriteZeroes(bad[0], bad[1], true) == nil {
				t.Errorf("%d bytes at %d were taken", bad[1], bad[0])
			}
		}
		return errors.Join(d.Writev([][]byte{mixed[:1000], mixed[1000:]}, 1<<20), d.Writev([][]byte{mixed[64<<10:][:64<<10]}, 0), d.WriteZeroes(0, 64<<10, false))
	})
	s, err := p.Finish(nil, "")
	if err != nil {
		t.Fatal(err)
	}
	last, err := os.Stat(a.path(a.File(s)))
	if err != nil || !os.SameFile(first, last) || len(entries()) != 2 {
		t.Errorf("the data was written elsewhere first: %v", entries())
	}
	m, err := plain{a}.manifest(3)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range m.extents {
		got = append(got, fmt.Sprint(e.start>>10, "+", e.length>>10, " ", e.zero))
	}
	if want := "[0+64 true 1024+64 true 1088+128 false 1216+64 true]"; fmt.Sprint(got) != want || s.Bytes != 128<<10 {
		t.Errorf("%v, %d bytes; not %v", got, s.Bytes, want)
	}
	if d := contentOf(t, a, 0); !bytes.Equal(d[1<<20:][:len(mixed)], mixed) || !block.IsZero(d[:64<<10]) || block.IsZero(d[64<<10:][:64<<10]) {
		t.Error("the backup is not what was written")
	}
	sound(t, a)
}

// The first backup decides on the format; another is refused, and nothing is changed.
func TestFormatIsKept(t *testing.T) {
	for _, format := range []string{FormatRaw, FormatQcow2} {
		dir := filepath.Join(t.TempDir(), "backups")
		for i, o := range []string{format, "", format, map[string]string{FormatRaw: FormatQcow2, FormatQcow2: FormatRaw}[format], "vmdk"} {
			a, err := Create(dir, o)
			if i > 2 {
				if !errors.Is(err, ErrFormat) || !errors.Is(err, ErrArchive) {
					t.Errorf("%s, opened as %s: %v", format, o, err)
				}
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			if a.Format() != format {
				t.Errorf("%s, opened as %q, is %s", format, o, a.Format())
			}
			p, err := a.Begin(1<<20, i == 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := p.Finish(&changes.Point{}, ""); err != nil {
				t.Fatal(err)
			}
			a.Close()
		}
		a, err := Open(dir)
		if err != nil || len(a.Steps()) != 3 {
			t.Fatalf("%v: %v", a, err)
		}
		sound(t, a)
		a.Close()
	}
}

// A prune that ends between any two of its steps leaves the backups as they were before
// it or after it, and nothing else once the directory has been opened again.
func TestInterruptedPrune(t *testing.T) {
	a := newPlain(t)
	var want [][]byte
	for i := range 3 {
		want = append(want, contentOf(t, a, i+1))
	}
	files := func() map[string][]byte {
		all := map[string][]byte{}
		entries, err := os.ReadDir(a.dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if all[e.Name()], err = os.ReadFile(a.path(e.Name())); err != nil {
				t.Fatal(err)
			}
		}
		return all
	}
	before := files()
	if _, err := a.Prune(context.Background(), 2, nil); err != nil {
		t.Fatal(err)
	}
	after := files()
	if len(before) != 7 || len(after) != 5 || after["000002-full.raw"] == nil || after["000002-changes.raw"] != nil {
		t.Fatalf("%d files became %d", len(before), len(after))
	}
	a.Close()
	both := maps.Clone(before)
	maps.Copy(both, after)
	half := maps.Clone(before) // the manifest has not got its name yet
	half["000002-full.raw"], half["000002-full.json.part"] = after["000002-full.raw"], after["000002-full.json"][:200]
	written := maps.Clone(before)
	written["000002-full.raw.part"] = make([]byte, 1<<20)
	some := maps.Clone(after) // not all have been removed yet
	some["000001-full.json"] = before["000001-full.json"]
	for name, state := range map[string]struct {
		files, catalog map[string][]byte
		first          int
	}{
		"half merged": {written, before, 1}, "half named": {half, before, 1}, "merged": {both, before, 1},
		"in the catalog": {both, after, 2}, "half removed": {some, after, 2},
	} {
		dir := t.TempDir()
		for file, b := range state.files {
			if file == catalogName {
				b = state.catalog[file]
			}
			if err := os.WriteFile(filepath.Join(dir, file), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		a, err := Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		sound(t, a)
		for i := state.first; i <= 3; i++ {
			if !bytes.Equal(contentOf(t, a, i), want[i-1]) {
				t.Errorf("%s: backup %d is not the disk as it was", name, i)
			}
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != len(state.catalog) {
			t.Errorf("%s: %v, %v are left", name, entries, err)
		}
		if _, err := a.Prune(context.Background(), 1, nil); err != nil {
			t.Errorf("%s: prune: %v", name, err)
		}
		a.Close()
	}
}

// As many backups lie one on another as may, and no more.
func TestLongChain(t *testing.T) {
	a := newPlain(t)
	for len(a.catalog.Steps) < maxPlain {
		s := *a.Last()
		s.Number++
		a.catalog.Steps = append(a.catalog.Steps, s)
	}
	if _, err := a.Begin(4<<20, false); !errors.Is(err, qcow2.ErrBacking) || !strings.Contains(err.Error(), "gnomon backup prune") {
		t.Errorf("backup %d: %v", maxPlain+1, err)
	}
	if _, err := a.Begin(4<<20, true); err != nil {
		t.Errorf("another full one: %v", err)
	}
}

// forge changes the manifest of a backup, and has the catalog agree.
func forge(t *testing.T, a *Archive, i int, f func(m map[string]any)) {
	t.Helper()
	s := &a.catalog.Steps[i]
	path := a.path(manifestOf(s))
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	if err := d.Decode(&m); err != nil {
		t.Fatal(err)
	}
	f(m)
	if b, err = json.MarshalIndent(m, "", " "); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Remove(path), os.WriteFile(path, b, 0o600)); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(b)
	s.SHA256 = hex.EncodeToString(sum[:])
}

// A directory that somebody has forged, checksums and all, is refused, and nothing outside
// it is opened.
func TestForged(t *testing.T) {
	type object = map[string]any
	extents := func(e ...any) func(t *testing.T, a *Archive) {
		return func(t *testing.T, a *Archive) {
			forge(t, a, 2, func(m object) { m["extents"], m["bytes"] = e, 0 })
		}
	}
	field := func(name string, value any) func(t *testing.T, a *Archive) {
		return func(t *testing.T, a *Archive) {
			forge(t, a, 2, func(m object) { m[name] = value })
		}
	}
	replaced := func(name func(*Step) string, f func(path, outside string) error) func(t *testing.T, a *Archive) {
		return func(t *testing.T, a *Archive) {
			path, outside := a.path(name(&a.catalog.Steps[2])), filepath.Join(t.TempDir(), "outside")
			b, err := os.ReadFile(path)
			if err := errors.Join(err, os.WriteFile(outside, b, 0o600), os.Remove(path), f(path, outside)); err != nil {
				t.Fatal(err)
			}
		}
	}
	zero := func(start, length any) object { return object{"start": start, "length": length, "zero": true} }
	says := map[string]string{
		"overlap":              "extent before",
		"descending":           "extent before",
		"twice":                "extent before",
		"negative start":       "extent before",
		"negative length":      "extent before",
		"no length":            "extent before",
		"past the end":         "the disk at",
		"overflow":             "the disk at",
		"giant number":         "1e300",
		"no checksum":          "checksum",
		"short checksum":       "checksum",
		"checksum of zero":     "checksum",
		"not an extent":        "cannot unmarshal",
		"no extents":           "must be",
		"long line":            "too long",
		"unknown key":          "backing",
		"version":              "version 2",
		"directory":            "another backup",
		"number":               "on 2",
		"base":                 "lies on",
		"base above":           "on 4",
		"giant disk":           "another backup",
		"smaller disk":         "the disk at 512",
		"data elsewhere":       "another backup",
		"absolute data":        "another backup",
		"data of another":      "another backup",
		"bytes":                "not the 0",
		"manifest is a link":   "symbolic link",
		"data is a link":       "symbolic link",
		"manifest is a FIFO":   "regular",
		"data is a FIFO":       "regular",
		"data is a directory":  "regular",
		"data is longer":       "does not have",
		"data is shorter":      "does not have",
		"data outside extents": "not zero",
	}
	for name, forgery := range map[string]func(t *testing.T, a *Archive){
		"overlap":             extents(zero(0, 1024), zero(512, 1024)),
		"descending":          extents(zero(4096, 512), zero(0, 512)),
		"twice":               extents(zero(0, 512), zero(0, 512)),
		"negative start":      extents(zero(-512, 1024)),
		"negative length":     extents(zero(1024, -512)),
		"no length":           extents(zero(0, 0)),
		"past the end":        extents(zero(4<<20-512, 1024)),
		"overflow":            extents(zero(512, int64(1<<63-1))),
		"giant number":        extents(zero(0, json.Number("1e300"))),
		"no checksum":         extents(object{"start": 0, "length": 512}),
		"short checksum":      extents(object{"start": 0, "length": 512, "sha256": "00"}),
		"checksum of zero":    extents(object{"start": 0, "length": 512, "zero": true, "sha256": strings.Repeat("00", 32)}),
		"not an extent":       extents("extent"),
		"no extents":          field("extents", nil),
		"long line":           field("data", strings.Repeat("x", 10<<20)),
		"unknown key":         field("backing", "/etc/passwd"),
		"version":             field("version", 2),
		"directory":           field("directory", "0000000000000000"),
		"number":              field("number", 2),
		"base":                field("base", 1),
		"base above":          field("base", 4),
		"giant disk":          field("size", int64(1<<62)),
		"smaller disk":        field("size", 512),
		"data elsewhere":      field("data", "../../disk.raw"),
		"absolute data":       field("data", "/etc/passwd"),
		"data of another":     field("data", "000001-full.raw"),
		"bytes":               field("bytes", 0),
		"manifest is a link":  replaced(manifestOf, func(path, outside string) error { return os.Symlink(outside, path) }),
		"data is a link":      replaced(dataOf, func(path, outside string) error { return os.Symlink(outside, path) }),
		"manifest is a FIFO":  replaced(manifestOf, func(path, _ string) error { return unix.Mkfifo(path, 0o600) }),
		"data is a FIFO":      replaced(dataOf, func(path, _ string) error { return unix.Mkfifo(path, 0o600) }),
		"data is a directory": replaced(dataOf, func(path, _ string) error { return os.Mkdir(path, 0o700) }),
		"data is longer": replaced(dataOf, func(path, outside string) error {
			return errors.Join(os.Rename(outside, path), os.Truncate(path, 1<<40))
		}),
		"data is shorter": replaced(dataOf, func(path, outside string) error {
			return errors.Join(os.Rename(outside, path), os.Truncate(path, 1<<20))
		}),
		"data outside extents": replaced(dataOf, func(path, outside string) error {
			b, err := os.ReadFile(outside)
			b[4<<20-1] ^= 1
			return errors.Join(err, os.WriteFile(path, b, 0o600))
		}),
	} {
		t.Run(name, func(t *testing.T) {
			a := newPlain(t)
			if forgery(t, a); t.Failed() {
				return
			}
			ctx := context.Background()
			problems, err := a.Verify(ctx, nil)
			if err != nil || len(problems) != 1 || problems[0].Number != 3 || says[name] == "" || !strings.Contains(problems[0].Text, says[name]) {
				t.Errorf("verify: %v, %v, and nothing of %q", problems, err, says[name])
			}
			if err := a.VerifyStep(ctx, 3); !errors.Is(err, ErrDamaged) {
				t.Errorf("verify backup 3: %v", err)
			}
			if err := a.VerifyStep(ctx, 2); err != nil {
				t.Errorf("verify backup 2: %v", err)
			}
			if _, err := a.Prune(ctx, 1, nil); !errors.Is(err, ErrDamaged) {
				t.Errorf("prune: %v", err)
			}
			if n, err := a.OpenStep(3); err == nil && name != "data outside extents" {
				n.Close()
				t.Error("it is opened")
			}
		})
	}
}

// Links in place of what is about to be written do not lead out of the directory.
func TestPlantedLinks(t *testing.T) {
	for _, format := range []string{FormatQcow2, FormatRaw} {
		dir := t.TempDir()
		a, err := Create(filepath.Join(dir, "backups"), format)
		if err != nil {
			t.Fatal(err)
		}
		a.Close()
		outside := filepath.Join(dir, "outside")
		if err := os.WriteFile(outside, []byte("mine"), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"000001.qcow2.part", "000001.qcow2", "000001-full.raw.part", "000001-full.raw", "000001-full.json.part", "000001-full.json", "backups.json.new"} {
			if err := os.Symlink(outside, a.path(name)); err != nil {
				t.Fatal(err)
			}
		}
		if a, err = Create(a.dir, ""); err != nil {
			t.Fatal(err)
		}
		p, err := a.Begin(1<<20, true)
		if err == nil {
			_, err = p.Finish(nil, "")
		}
		if err != nil {
			t.Fatal(err)
		}
		sound(t, a)
		a.Close()
		if b, err := os.ReadFile(outside); err != nil || string(b) != "mine" {
			t.Errorf("%s: a file outside is now %q, %v", format, b, err)
		}
	}
}

// over has each byte be from the last file that has it: as laying files on an array does.
func TestOver(t *testing.T) {
	const length = 200
	r := rand.New(rand.NewPCG(5, 6))
	for range 2000 {
		var segments []segment
		want := slices.Repeat([]int{-1}, length)
		for file := range 1 + r.IntN(6) {
			var extents []extent
			for off := r.Int64N(20); off < length; {
				e := extent{start: off, length: min(1+r.Int64N(30), length-off), zero: r.IntN(4) == 0}
				for i := e.start; i < e.end(); i++ {
					if want[i] = file; e.zero {
						want[i] = -1
					}
				}
				extents = append(extents, e)
				off = e.end() + max(0, r.Int64N(40)-10)
			}
			segments = over(segments, extents, file)
		}
		c := chain{segments: segments, info: block.Info{VirtualSize: length}}
		for i := int64(0); i < length; {
			s := c.at(i, length-i)
			if s.length <= 0 || s.start != i {
				t.Fatalf("at %d: %+v", i, s)
			}
			for ; s.length > 0; i, s.length = i+1, s.length-1 {
				if want[i] != s.file {
					t.Fatalf("byte %d is of file %d, not %d: %+v", i, s.file, want[i], segments)
				}
			}
		}
	}
}

// FuzzManifest: what is read as a manifest can be a disk's, and is the same when it has
// been written again.
func FuzzManifest(f *testing.F) {
	a := newPlain(f)
	for i := range a.catalog.Steps {
		b, err := os.ReadFile(a.path(manifestOf(&a.catalog.Steps[i])))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(`{"version":1,"extents":[{"start":0,"length":9223372036854775807,"zero":true}],"size":512}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := readManifest(bytes.NewReader(b))
		if err != nil {
			if !errors.Is(err, errManifest) {
				t.Errorf("%v", err)
			}
			return
		}
		end := int64(0)
		for _, s := range over([]segment{{0, max(m.size/2, 1), 0}}, m.extents, 1) {
			if s.start < end || s.length <= 0 {
				t.Errorf("laid on another: %+v after %d", s, end)
			}
			end = s.start + s.length
		}
		var w bytes.Buffer
		if err := m.write(&w); err != nil {
			t.Fatal(err)
		}
		again, err := readManifest(&w)
		if err != nil {
			t.Fatalf("written again: %v", err)
		}
		if !again.time.Equal(m.time) || !again.completed.Equal(m.completed) || !slices.Equal(again.extents, m.extents) {
			t.Errorf("%+v is %+v when it has been written again", m, again)
		}
		again.time, again.completed, again.extents = m.time, m.completed, m.extents
		if fmt.Sprint(again) != fmt.Sprint(m) {
			t.Errorf("%+v is %+v when it has been written again", m, again)
		}
	})
}

// However the data of a disk lies, there are not more extents than a manifest has.
func TestExtentsAreBounded(t *testing.T) {
	for _, size := range []int64{512, 64 << 10, 1 << 36, 1 << 40, 64 << 40} {
		g := granuleOf(size, true)
		most := size/g/2 + size/max(longest, 16*g) + 1
		if g%granule != 0 || most > maxExtents {
			t.Errorf("a disk of %d bytes by %d may have %d extents", size, g, most)
		}
	}
	c := collector{granule: granule, extents: make([]extent, maxExtents)}
	if err := c.add(make([]byte, 512), 512); err == nil || !strings.Contains(err.Error(), "full backup") {
		t.Errorf("one more: %v", err)
	}
}
