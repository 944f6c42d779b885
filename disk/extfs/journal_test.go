package extfs

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/extfs/extfstest"
)

// journals are file systems whose journals differ.
var journals = []struct {
	name, args string
	blockSize  int64
	open       string // how debugfs opens the journal
}{
	{"ext3", "-t ext3 -b 1024 -O has_journal,filetype,sparse_super", 1024, "jo"},
	{"ext4 csum v3", "-t ext4 -b 1024 -O " + extfstest.Modern, 1024, "jo -c -v 3"},
	{"ext4 csum v2", "-t ext4 -b 4096 -O " + extfstest.Modern, 4096, "jo -c -v 2"},
	{"ext4 32bit", "-t ext4 -b 4096 -O has_journal,extent,flex_bg,uninit_bg", 4096, "jo"},
	{"ext4 64bit", "-t ext4 -b 1024 -O has_journal,extent,flex_bg,64bit", 1024, "jo"},
}

// journalled makes a file system in whose journal is all that a lot of files
// changed, as it would be with data=journal.
func journalled(t testing.TB, i int) string {
	t.Helper()
	v := journals[i]
	path := extfstest.Make(t, 20<<20, append([]string{"-J", "size=4"}, strings.Fields(v.args)...)...)
	before := read(t, path)
	extfstest.Populate(t, path, 40, 120<<10, uint64(i))
	after := read(t, path)
	if err := os.WriteFile(path, before, 0o600); err != nil {
		t.Fatal(err)
	}
	var changed []int64
	for at := int64(0); at < int64(len(before)); at += v.blockSize {
		if !bytes.Equal(before[at:at+v.blockSize], after[at:at+v.blockSize]) {
			changed = append(changed, at/v.blockSize)
		}
	}
	// Older content first, and another transaction that is revoked: all of it
	// must give way.
	dir := t.TempDir()
	script := v.open + "\n"
	write := func(blocks []int64, content func(n int64) []byte, revoke bool) {
		host := filepath.Join(dir, fmt.Sprint(len(script)))
		var list []string
		var data []byte
		for _, n := range blocks {
			list = append(list, fmt.Sprint(n))
			data = append(data, content(n)...)
		}
		if err := os.WriteFile(host, data, 0o600); err != nil {
			t.Fatal(err)
		}
		script += fmt.Sprintf("jw -b %s %s\n", strings.Join(list, ","), host)
		if revoke {
			script += fmt.Sprintf("jw -r %s\n", strings.Join(list, ","))
		}
	}
	garbage := func(int64) []byte { return bytes.Repeat([]byte{0xc0, 0x3b, 0x39, 0x98}, int(v.blockSize)/4) }
	write(changed[1:min(40, len(changed))], garbage, false)
	for part := range slices.Chunk(changed, 50) {
		write(part, func(n int64) []byte { return after[n*v.blockSize : (n+1)*v.blockSize] }, false)
	}
	// The bitmap of an untouched block that is revoked stays as it is.
	var untouched []int64
	for n := int64(2); len(untouched) < 21; n++ {
		if !slices.Contains(changed, n) {
			untouched = append(untouched, n)
		}
	}
	write(untouched[1:], garbage, true)
	// It begins with the journal's magic number, which is not written there.
	write(untouched[:1], garbage, false)
	extfstest.Run(t, script+"jc\n", "debugfs", "-w", "-f", "-", path)
	return path
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestUsedOfAJournal compares the map of a file system whose journal needs
// recovery with that of the one which debugfs recovers.
func TestUsedOfAJournal(t *testing.T) {
	for i, v := range journals {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			path := journalled(t, i)
			stale := extfstest.Free(t, path)
			node := openRaw(t, path)
			m, err := Used(context.Background(), node, 0, node.Size())
			if err != nil {
				t.Fatal(err)
			}
			if s := m.FileSystems()[0].State; s != Recovered {
				t.Errorf("the file system is %v", s)
			}
			content := replayedContent(t, memory{content: read(t, path)})
			node.Close()
			extfstest.Run(t, "jr\n", "debugfs", "-w", "-f", "-", path)
			want := extfstest.Free(t, path)
			if slices.Equal(stale, want) {
				t.Fatal("the journal changes nothing")
			}
			if got := freeOf(m); !slices.Equal(got, want) {
				t.Errorf("free:\n%v\nafter recovery:\n%v", got, want)
			}
			recovered := read(t, path)
			for block, got := range content {
				if !bytes.Equal(got, recovered[block*v.blockSize:(block+1)*v.blockSize]) {
					t.Errorf("block %d differs after recovery", block)
				}
			}
		})
	}
}

// replayedContent is what the journal writes, but for the superblock's block, in
// which recovery itself changes more.
func replayedContent(t *testing.T, node memory) map[int64][]byte {
	t.Helper()
	f, err := open(&area{node: node, size: node.Size()})
	if err != nil {
		t.Fatal(err)
	}
	content := map[int64][]byte{}
	for block := range f.journal {
		if block == f.superBlock() {
			continue
		}
		content[block] = make([]byte, f.blockSize)
		if err := f.read(content[block], block*f.blockSize); err != nil {
			t.Fatal(err)
		}
	}
	return content
}

// TestJournalGoesRound turns the ring of a journal so that the log passes its end.
func TestJournalGoesRound(t *testing.T) {
	content := read(t, journalled(t, 1))
	i := newImage(t, content)
	want := replayedContent(t, memory{content: content})
	file, err := i.f.openJournalFile()
	if err != nil {
		t.Fatal(err)
	}
	at := func(n int64) []byte { return i.content[file.block(n)*i.f.blockSize:][:i.f.blockSize] }
	ring := file.blocks - 1
	for _, turn := range []int64{1, ring / 2, ring - 1, ring - 2, ring - 3, ring - 45, ring - 200} {
		for n := range ring {
			copy(at(1+(n+turn)%ring), content[file.block(1+n)*i.f.blockSize:][:i.f.blockSize])
		}
		start := binary.BigEndian.Uint32(content[file.block(0)*i.f.blockSize+0x1c:])
		binary.BigEndian.PutUint32(at(0)[0x1c:], uint32(1+(int64(start)-1+turn)%ring))
		i.seal()
		if got := replayedContent(t, memory{content: i.content}); !maps.EqualFunc(got, want, bytes.Equal) {
			t.Errorf("turned by %d, the journal writes %d blocks; by 0, %d", turn, len(got), len(want))
		}
	}
}

// TestJournalCutShort cuts the journal before each descriptor and commit: it is
// that of the transactions before.
func TestJournalCutShort(t *testing.T) {
	path := journalled(t, 1)
	node := openRaw(t, path)
	f, err := open(&area{node: node, size: node.Size()})
	if err != nil {
		t.Fatal(err)
	}
	file, err := f.openJournalFile()
	if err != nil {
		t.Fatal(err)
	}
	whole := len(f.journal)
	content := read(t, path)
	var sizes []int
	for n := int64(1); n < file.blocks; n++ {
		magic := content[file.block(n)*f.blockSize:][:4]
		if binary.BigEndian.Uint32(magic) != journalMagic {
			continue // of a block that is written
		}
		magic[0] ^= 0xff
		cut, err := open(&area{node: memory{content: content}, size: int64(len(content))})
		magic[0] ^= 0xff
		if err != nil {
			t.Fatalf("without block %d: %v", n, err)
		}
		sizes = append(sizes, len(cut.journal))
	}
	// The last transaction but one revokes what the one before it writes.
	n := len(sizes)
	if n < 20 || sizes[0] != 0 || !slices.IsSorted(sizes[:n-2]) || sizes[n-3] != whole-1+20 || sizes[n-1] != whole-1 {
		t.Errorf("the journal writes %d blocks; cut short: %v", whole, sizes)
	}
}

// memory is a disk in memory.
type memory struct {
	block.Node
	content []byte
}

func (m memory) Size() int64      { return int64(len(m.content)) }
func (m memory) ReadOnly() bool   { return true }
func (m memory) Info() block.Info { return block.Info{VirtualSize: m.Size()} }

func (m memory) Readv(bufs [][]byte, off int64) error {
	for _, b := range bufs {
		off += int64(copy(b, m.content[off:off+int64(len(b))]))
	}
	return nil
}
