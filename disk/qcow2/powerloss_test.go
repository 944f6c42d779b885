package qcow2

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
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
func (m *memory) ReadOnly() bool   { return m.readOnly }
func (m *memory) Info() block.Info { return block.Info{Filename: "image", ActualSize: 1 << 40} }
func (m *memory) Close() error     { return nil }
func (m *memory) Freeze() error    { return nil }

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
		clear(b)
		if off < int64(len(m.b)) {
			copy(b, m.b[off:])
		}
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
	places := map[string]string{"image": "/", "base": "."}
	c.openFile = func(path string, _ bool) (block.Node, fs.FileInfo, error) {
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
	now  []byte
	was  [][][]byte // by sector: what was durable last, and what came after it
	size int64
}

func newSectors(now []byte) *sectors {
	s := &sectors{now: now, was: make([][][]byte, len(now)/sector), size: int64(len(now))}
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

// moment is what sectors may hold after the log has that many entries.
type moment struct {
	log     int
	was     [][][]byte
	started []byte // what the disk held when its bitmap was made, or nil
}

// TestPowerLoss cuts the power at every write of a random workload. The writes
// since the last flush are then there, or not, or torn between sectors. The image
// opens; each sector holds what was flushed last or was written since; nothing but
// space is lost; and a bitmap that counts knows of all that changed.
func TestPowerLoss(t *testing.T) {
	const size = 128 << 10
	cuts := 0
	for i, o := range []CreateOptions{
		{ClusterSize: 512},
		{ClusterSize: 512, Version: 2},
		{ClusterSize: 1024, RefcountBits: 64},
		{ClusterSize: 4096, Compression: Zstd},
		{ClusterSize: 4096, Backing: "base", BackingFormat: "raw"},
		{ClusterSize: 2048, Backing: "base", BackingFormat: "raw", Version: 2},
	} {
		o.Size = size
		first, err := o.encode()
		if err != nil {
			t.Fatal(err)
		}
		for seed := range effort() {
			r := rand.New(rand.NewPCG(uint64(seed), uint64(i)))
			base := &memory{b: mixed(4, size/2), readOnly: true}
			content := make([]byte, size)
			if o.Backing != "" {
				copy(content, base.b)
			}
			moments, log := workload(t, r, slices.Clone(first), base, content)
			cuts += cut(t, r, first, base, moments, log, o)
		}
	}
	t.Logf("%d cuts", cuts)
}

// workload does things to an image, and returns what happened to its file, and
// what was to be expected meanwhile.
func workload(t *testing.T, r *rand.Rand, first []byte, base *memory, content []byte) ([]moment, []change) {
	t.Helper()
	var log []change
	file := &memory{b: first, log: &log}
	s := newSectors(content)
	var moments []moment
	var started []byte
	note := func() {
		was := make([][][]byte, len(s.was))
		copy(was, s.was)
		moments = append(moments, moment{len(log), was, started})
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for range 3 {
		n, err := inMemory(t, map[string]*memory{"image": file, "base": base}, false)
		must(err)
		for range 30 {
			off := r.Int64N(s.size)
			length := min(1+r.Int64N(12<<10), s.size-off)
			part := s.now[off : off+length]
			switch r.IntN(10) {
			case 0:
				clear(part)
				s.wrote(off, length)
				note() // it may be there from here on
				must(n.WriteZeroes(off, length, true))
			case 1, 2:
				old := slices.Clone(part)
				clear(part)
				s.wrote(off, length)
				note()
				must(n.Discard(off, length))
				must(n.Readv([][]byte{part}, off))
				if !bytes.Equal(part, old) {
					s.wrote(off, length)
				}
			case 3, 4:
				must(n.Flush())
				s.durable()
			case 5:
				off -= off % n.header.ClusterSize()
				part = s.now[off:min(s.size, off+2*n.header.ClusterSize())]
				for i := range part {
					part[i] = byte(r.IntN(7))
				}
				s.wrote(off, int64(len(part)))
				note()
				must(n.WriteCompressed(part, off))
			default:
				for i := range part {
					part[i] = byte(r.Uint32())
				}
				s.wrote(off, length)
				note()
				must(n.Writev([][]byte{part}, off))
			}
			note()
		}
		if started == nil && n.header.Version > 2 {
			b, err := bitmap.New("b", n.Size(), 512)
			must(err)
			if n.AddBitmap(b) == nil {
				started = slices.Clone(s.now)
				note()
			}
		}
		must(n.Close())
		s.durable()
		note()
	}
	return moments, log
}

// cut looks at the file after each of its changes, and returns how many there were.
func cut(t *testing.T, r *rand.Rand, first []byte, base *memory, moments []moment, log []change, o CreateOptions) int {
	t.Helper()
	durable := slices.Clone(first)
	flushed, at := 0, 0
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "base"), base.b)
	for k := range log {
		if log[k].flush {
			for _, c := range log[flushed:k] {
				durable = c.apply(durable)
			}
			flushed = k + 1
		}
		// What may be there is what the moment before says, and the one after.
		for at+1 < len(moments) && moments[at+1].log <= k {
			at++
		}
		b := slices.Clone(durable)
		for _, c := range log[flushed : k+1] {
			switch whole := r.IntN(3); {
			case c.flush || whole == 0:
			case whole == 1 || c.data == nil:
				b = c.apply(b)
			default: // some of its sectors
				for from := int64(0); from < int64(len(c.data)); {
					to := min((c.at+from)/sector*sector+sector-c.at, int64(len(c.data)))
					if r.IntN(2) == 0 {
						b = change{at: c.at + from, data: c.data[from:to]}.apply(b)
					}
					from = to
				}
			}
		}
		what := fmt.Sprintf("%+v, cut after change %d of %d", o, k, len(log))
		if k%100 == 7 {
			path := filepath.Join(dir, "image.qcow2")
			writeFile(t, path, b)
			if q := checkByQEMU(t, path); q.Corruptions != 0 || q.CheckErrors != 0 {
				t.Fatalf("%s: QEMU: %+v", what, q)
			}
		}
		lookAt(t, what, b, base, moments[at:min(at+2, len(moments))])
	}
	return len(log)
}

// lookAt opens an image after a cut.
func lookAt(t *testing.T, what string, b []byte, base *memory, moments []moment) {
	t.Helper()
	unopened := (&chain{}).node(&memory{b: b}, "image")
	report, err := unopened.check(context.Background(), CheckOptions{})
	if err != nil || report.Corruptions != 0 || report.CheckErrors != 0 {
		t.Fatalf("%s: %v\n%+v", what, err, report)
	}
	file := &memory{b: b}
	n, err := inMemory(t, map[string]*memory{"image": file, "base": base}, false)
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	got := readAll(t, n)
	for i := range len(got) / sector {
		part := got[i*sector:][:sector]
		if !slices.ContainsFunc(moments, func(m moment) bool {
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
	// It can be written on, and what is lost be given back.
	for off := int64(0); off < n.Size(); off += 16 << 10 {
		if err := n.Writev([][]byte{bytes.Repeat([]byte{0x5a}, 1000)}, off); err != nil {
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
}
