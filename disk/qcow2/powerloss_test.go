package qcow2

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/bitmap"
	"github.com/gnomon-vmm/gnomon/disk/block"
)

// change is something that happens to a file: a write, a new size, or a flush.
type change struct {
	flush bool
	at    int64
	data  []byte
	size  int64 // where data is nil
}

func (c change) apply(b []byte) []byte {
	switch {
	case c.flush:
	case c.data == nil && c.size < int64(len(b)):
		return b[:c.size:c.size]
	case c.data == nil:
		return append(b, make([]byte, c.size-int64(len(b)))...)
	default:
		if end := c.at + int64(len(c.data)); end > int64(len(b)) {
			b = append(b, make([]byte, end-int64(len(b)))...)
		}
		copy(b[c.at:], c.data)
	}
	return b
}

// memory is a file's content as a store, which may tell what happens to it.
type memory struct {
	mu       sync.Mutex
	b        []byte
	size     int64 // at least; b may be shorter
	limit    int64 // 0: none
	readOnly bool
	log      *[]change // or nil
	flushes  int
	writes   int
}

func (m *memory) Size() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return (max(m.size, int64(len(m.b))) + sector - 1) / sector * sector
}
func (m *memory) ReadOnly() bool { return m.readOnly }
func (m *memory) Info() block.Info {
	return block.Info{Format: "raw", Filename: "image", ActualSize: 1 << 40}
}
func (m *memory) Close() error   { return nil }
func (m *memory) Freeze() error  { return nil }
func (m *memory) IgnoreFlushes() {}

func (m *memory) Grow(size int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.size = max(m.size, size)
}

func (m *memory) Resize(size int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.size = size
	m.do(change{size: size})
	return nil
}

// do applies a change, and logs it as one of whole sectors: what a disk gets of a
// sector has all that was written to it before. Preconditions: mu is held.
func (m *memory) do(c change) {
	m.b = c.apply(m.b)
	if m.log == nil {
		return
	}
	if c.data != nil {
		end := (c.at + int64(len(c.data)) + sector - 1) / sector * sector
		c.at -= c.at % sector
		c.data = slices.Clone(m.b[c.at:min(end, int64(len(m.b)))])
	}
	*m.log = append(*m.log, c)
}

func (m *memory) Flush() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.flushes++
	m.do(change{flush: true})
	return nil
}

func (m *memory) Readv(bufs [][]byte, off int64) error {
	size := m.Size()
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, b := range bufs {
		if off < 0 || off > size || int64(len(b)) > size-off {
			return block.ErrOutOfRange // nobody may ask for what is not there
		}
		there := 0
		if off < int64(len(m.b)) {
			there = copy(b, m.b[off:])
		}
		clear(b[there:])
		off += int64(len(b))
	}
	return nil
}

func (m *memory) Writev(bufs [][]byte, off int64) error {
	size := m.Size()
	m.mu.Lock()
	defer m.mu.Unlock()
	data := slices.Concat(bufs...)
	if off < 0 || off > size || int64(len(data)) > size-off {
		return block.ErrOutOfRange
	}
	if m.limit != 0 && off+int64(len(data)) > m.limit {
		return fs.ErrInvalid // a full disk
	}
	m.writes++
	if len(data) > 0 {
		m.do(change{at: off, data: data})
	}
	return nil
}

func (m *memory) Discard(off, n int64) error { return m.WriteZeroes(off, n, true) }

func (m *memory) WriteZeroes(off, n int64, _ bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if n = min(n, int64(len(m.b))-off); n > 0 {
		m.do(change{at: off, data: make([]byte, n)})
	}
	return nil
}

// inMemory opens an image whose files are in memory, by the names of their paths.
func inMemory(t testing.TB, files map[string]*memory, readOnly bool) (*Node, error) {
	t.Helper()
	c := newChain()
	places := map[string]string{"image": "/", "base": ".", "between": ".."}
	c.openFile = func(path string, _ bool) (block.Node, fs.FileInfo, error) {
		path = strings.TrimLeft(path, "./")
		info, err := os.Stat(places[path])
		if err != nil || files[path] == nil {
			return nil, nil, fs.ErrNotExist
		}
		return files[path], info, nil
	}
	if readOnly {
		file, err := c.open("image", true)
		if err != nil {
			return nil, err
		}
		return c.openImage(file, "image")
	}
	n, err := c.openWritable("image")
	if err != nil {
		return nil, err
	}
	n.backing, err = c.openBacking("image", n.header)
	return n, err
}

// sectors are what each sector of a disk held, since it was durable for the last time.
type sectors struct {
	now  []byte     // as large as the disk may become; zero behind its end
	was  [][][]byte // by sector: what was durable last, and what came after it
	size int64
}

func newSectors(now []byte, size int64) *sectors {
	s := &sectors{now: now, was: make([][][]byte, len(now)/sector), size: size}
	s.durable()
	return s
}

func (s *sectors) durable() {
	for i := range s.was {
		s.was[i] = [][]byte{slices.Clone(s.now[i*sector:][:sector])}
	}
}

// wrote tells that now has changed in a range.
func (s *sectors) wrote(off, length int64) {
	for i := off / sector; i <= (off+length-1)/sector; i++ {
		s.was[i] = append(s.was[i], slices.Clone(s.now[i*sector:][:sector]))
	}
}

// moment is what a disk may be after the log has that many entries.
type moment struct {
	log     int
	was     [][][]byte
	sizes   []int64
	started []byte // what the disk held when its bitmap was made, or nil
}

// TestPowerLoss cuts the power at every write of random workloads. The writes
// since the last flush are then there, or not, or torn between sectors. The image
// opens; each sector holds what was flushed last or was written since; nothing but
// space is lost; and a bitmap that counts knows of all that changed.
func TestPowerLoss(t *testing.T) {
	const enough = 10_000
	var cuts atomic.Int64
	t.Cleanup(func() {
		t.Logf("%d cuts", cuts.Load())
		if cuts.Load() < enough && !t.Failed() {
			t.Errorf("%d cuts, of %d", cuts.Load(), enough)
		}
	})
	for i, tt := range []struct {
		o           CreateOptions // Size is the most that the disk becomes
		seeds, acts int
	}{
		{CreateOptions{Size: 40 << 10, ClusterSize: 512}, 6, 30},
		{CreateOptions{Size: 40 << 10, ClusterSize: 512, Version: 2}, 5, 30},
		{CreateOptions{Size: 40 << 10, ClusterSize: 512, RefcountBits: 64}, 5, 30},
		{CreateOptions{Size: 40 << 10, ClusterSize: 512, Backing: "base", BackingFormat: "raw"}, 5, 30},
		{CreateOptions{Size: 48 << 10, ClusterSize: 1024, RefcountBits: 1}, 5, 30},
		{CreateOptions{Size: 48 << 10, ClusterSize: 2048, Backing: "base", BackingFormat: "raw", Version: 2}, 5, 30},
		{CreateOptions{Size: 64 << 10, ClusterSize: 4096, Compression: Zstd}, 5, 30},
		{CreateOptions{Size: 96 << 10, ClusterSize: 16 << 10, Backing: "base", BackingFormat: "raw"}, 1, 15},
		{CreateOptions{Size: 256 << 10, ClusterSize: 64 << 10}, 1, 4},
	} {
		t.Run(fmt.Sprintf("%d bytes, workload %d", tt.o.ClusterSize, i), func(t *testing.T) {
			t.Parallel()
			for seed := range tt.seeds * effort() {
				o := tt.o
				if seed%2 == 0 {
					o.Size /= 2 // its L1 table may have to be moved
				}
				w := newWorkload(t, o, tt.o.Size, tt.acts, rand.New(rand.NewPCG(uint64(seed), uint64(i))))
				w.run()
				w.cut(fmt.Sprintf("%+v, seed %d", o, seed))
				cuts.Add(int64(len(w.log)))
			}
		})
	}
}

// workload does things to an image in memory, and keeps what happened to its file,
// and what was to be expected meanwhile.
type workload struct {
	t       *testing.T
	r       *rand.Rand
	acts    int                // each time that it is opened
	read    []byte             // what lookAt reads into
	first   []byte             // the file at the beginning
	files   map[string]*memory // that the image may lie on
	stay    map[string]*memory // those of them that it lies on in the end, or nil
	done    int                // what the log had when it did so
	log     []change
	moments []moment
	s       *sectors
	started []byte
}

func newWorkload(t *testing.T, o CreateOptions, most int64, acts int, r *rand.Rand) *workload {
	t.Helper()
	content := make([]byte, most)
	base := &memory{b: make([]byte, most/2), readOnly: true}
	w := &workload{t: t, r: r, acts: acts, files: map[string]*memory{"base": base}}
	for i := range base.b {
		base.b[i] = byte(r.Uint32() >> (i / 1024 % 2 * 32)) // each other KiB is zero
	}
	if o.Backing != "" {
		copy(content, base.b)
	}
	first, err := o.encode()
	if err != nil {
		t.Fatal(err)
	}
	w.first, w.s = first, newSectors(content, o.Size)
	return w
}

func (w *workload) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// note tells what may be there from here on.
func (w *workload) note(sizes ...int64) {
	if sizes == nil {
		sizes = []int64{w.s.size}
	}
	w.moments = append(w.moments, moment{len(w.log), slices.Clone(w.s.was), sizes, w.started})
}

// open opens an image.
func (w *workload) open(file *memory) (*Node, error) {
	files := maps.Clone(w.files)
	files["image"] = file
	return inMemory(w.t, files, false)
}

func (w *workload) run() {
	file := &memory{b: slices.Clone(w.first), log: &w.log}
	for range 3 {
		n, err := w.open(file)
		w.must(err)
		for range w.acts {
			w.act(n)
		}
		if w.started == nil && n.header.Version > 2 {
			b, err := bitmap.New("b", n.Size(), 512)
			w.must(err)
			if n.AddBitmap(b) == nil {
				w.started = slices.Clone(w.s.now)
				w.note()
			}
		}
		w.must(n.Close())
		w.s.durable()
		w.note()
	}
}

// act does something.
func (w *workload) act(n *Node) {
	s, r := w.s, w.r
	off := r.Int64N(s.size)
	length := min(1+r.Int64N(int64(len(s.now)/8)), s.size-off)
	part := s.now[off : off+length]
	fill := func() {
		for i := range part {
			part[i] = byte(r.Uint32())
		}
	}
	switch r.IntN(20) {
	case 0, 1:
		clear(part)
		s.wrote(off, length)
		w.note()
		w.must(n.WriteZeroes(off, length, true))
	case 2, 3, 4, 5:
		old := slices.Clone(part)
		clear(part)
		s.wrote(off, length)
		w.note()
		w.must(n.Discard(off, length))
		w.must(n.Readv([][]byte{part}, off))
		if !bytes.Equal(part, old) {
			s.wrote(off, length)
		}
	case 6, 7, 8, 9:
		w.must(n.Flush())
		s.durable()
	case 10:
		off -= off % n.header.ClusterSize()
		part = s.now[off:min(s.size, off+2*n.header.ClusterSize())]
		for i := range part {
			part[i] = byte(r.IntN(7))
		}
		s.wrote(off, int64(len(part)))
		w.note()
		w.must(n.WriteCompressed(part, off))
	case 11:
		w.resize(n)
	default:
		fill()
		s.wrote(off, length)
		w.note()
		w.must(n.Writev([][]byte{part}, off))
	}
	w.note()
}

// resize makes the disk larger or smaller, down to half of the most that it
// becomes. What is behind its end is zero when it comes back.
func (w *workload) resize(n *Node) {
	s := w.s
	most := int64(len(s.now))
	size := (most/2 + w.r.Int64N(most/2+1)) / sector * sector
	w.note(s.size, size)
	w.must(n.Resize(size))
	if size < s.size {
		clear(s.now[size:])
		for i := size / sector; i < s.size/sector; i++ {
			s.was[i] = [][]byte{make([]byte, sector)}
		}
		if w.started != nil {
			w.started = slices.Clone(w.started)
			clear(w.started[size:])
		}
	}
	s.size = size
}

// cut looks at the file after each of its changes.
func (w *workload) cut(what string) {
	w.t.Helper()
	durable := slices.Clone(w.first)
	var b []byte
	flushed, at := 0, 0
	dir := w.t.TempDir()
	for name, file := range w.files {
		writeFile(w.t, filepath.Join(dir, name), file.b)
	}
	for k := range w.log {
		if w.stay != nil && k >= w.done {
			w.files = w.stay
		}
		if w.log[k].flush {
			for _, c := range w.log[flushed:k] {
				durable = c.apply(durable)
			}
			flushed = k + 1
		}
		// What may be there is what the moment before says, and the one after.
		for at+1 < len(w.moments) && w.moments[at+1].log <= k {
			at++
		}
		b = append(b[:0], durable...)
		for _, c := range w.log[flushed : k+1] {
			b = w.torn(c, b)
		}
		what := fmt.Sprintf("%s, cut after change %d of %d", what, k, len(w.log))
		if k%500 == 7 {
			path := filepath.Join(dir, "image.qcow2")
			writeFile(w.t, path, b)
			if q := checkByQEMU(w.t, path); q.Corruptions != 0 || q.CheckErrors != 0 {
				w.t.Fatalf("%s: QEMU: %+v", what, q)
			}
		}
		b = w.lookAt(what, b, w.moments[at:min(at+2, len(w.moments))], k%3 == 0)
	}
}

// torn makes of a file what a change that nobody waited for does: all, nothing, or
// some sectors.
func (w *workload) torn(c change, b []byte) []byte {
	switch whole := w.r.IntN(3); {
	case c.flush || whole == 0:
	case whole == 1 || c.data == nil:
		return c.apply(b)
	default:
		for from := int64(0); from < int64(len(c.data)); from += sector {
			if to := min(from+sector, int64(len(c.data))); w.r.IntN(2) == 0 {
				b = change{at: c.at + from, data: c.data[from:to]}.apply(b)
			}
		}
	}
	return b
}

// lookAt opens an image after a cut, goes on writing it if it is told so, and
// returns the memory that it was in.
func (w *workload) lookAt(what string, b []byte, moments []moment, goOn bool) []byte {
	t := w.t
	t.Helper()
	file := &memory{b: b}
	report, err := (&chain{}).node(file, "image").check(context.Background(), CheckOptions{})
	if err != nil || report.Corruptions != 0 || report.CheckErrors != 0 {
		t.Fatalf("%s: %v\n%+v", what, err, report)
	}
	n, err := w.open(file)
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	sized := slices.DeleteFunc(slices.Clone(moments), func(m moment) bool { return !slices.Contains(m.sizes, n.Size()) })
	if len(sized) == 0 {
		t.Fatalf("%s: the disk has %d bytes: %v, %v", what, n.Size(), moments[0].sizes, moments[len(moments)-1].sizes)
	}
	w.read = slices.Grow(w.read[:0], int(n.Size()))
	got := w.read[:n.Size()]
	if err := n.Readv([][]byte{got}, 0); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	for i := range len(got) / sector {
		part := got[i*sector:][:sector]
		if !slices.ContainsFunc(sized, func(m moment) bool {
			return slices.ContainsFunc(m.was[i], func(b []byte) bool { return bytes.Equal(b, part) })
		}) {
			t.Fatalf("%s: sector %d holds neither what was flushed nor what was written since", what, i)
		}
	}
	if bits, err := n.Bitmap("b"); err == nil && moments[0].started != nil {
		for i := range len(got) / sector {
			if !bytes.Equal(got[i*sector:][:sector], moments[0].started[i*sector:][:sector]) && !bits.Get(int64(i*sector)) {
				t.Fatalf("%s: the bitmap does not know of sector %d", what, i)
			}
		}
	}
	if !goOn {
		return file.b
	}
	// It can be written on, and what is lost be given back.
	for off := int64(0); off < n.Size(); off += 16 << 10 {
		if err := n.Writev([][]byte{bytes.Repeat([]byte{0x5a}, int(min(1000, n.Size()-off)))}, off); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	if err := n.Close(); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	again := (&chain{}).node(file, "image")
	if report, err := again.check(context.Background(), CheckOptions{Repair: RepairLeaks}); err != nil || !report.Clean() || report.CorruptionsFixed != 0 {
		t.Fatalf("%s: written on: %v\n%+v", what, err, report)
	}
	return file.b
}
