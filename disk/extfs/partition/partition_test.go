package partition

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

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

// tables are disks on which sfdisk and sgdisk made partitions.
var tables = []struct {
	name   string
	kind   string
	sector int64
	count  int
	backup bool
}{
	{"mbr", MBR, 512, 5, false},
	{"mbr-sparse-numbers", MBR, 512, 2, false},
	{"mbr-empty-extended", MBR, 512, 1, false},
	{"gpt", GPT, 512, 3, false},
	{"gpt4k", GPT, 4096, 2, false},
	{"hybrid", GPT, 512, 2, false},
	{"gpt-backup", GPT, 512, 1, true},
}

// images are the disks, read once.
var images = sync.OnceValues(func() (map[string][]byte, error) {
	all := map[string][]byte{}
	for _, table := range tables {
		f, err := os.Open(filepath.Join("testdata", table.name+".gz"))
		if err != nil {
			return nil, err
		}
		defer f.Close()
		z, err := gzip.NewReader(f)
		if err != nil {
			return nil, err
		}
		if all[table.name], err = io.ReadAll(z); err != nil {
			return nil, err
		}
	}
	return all, nil
})

func image(t testing.TB, name string) []byte {
	t.Helper()
	all, err := images()
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Clone(all[name])
}

// partx is what util-linux reads of a disk.
func partx(t *testing.T, content []byte, sector int64, isMBR bool) []string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("partx", "--pairs", "--output", "NR,START,SECTORS,TYPE,UUID,NAME", "--sector-size", fmt.Sprint(sector), path)
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %v", cmd, err)
	}
	var lines []string
	for line := range strings.Lines(string(out)) {
		// The extended partition holds others, and is none itself.
		if isMBR && (strings.Contains(line, `TYPE="0x5"`) || strings.Contains(line, `TYPE="0xf"`)) {
			continue
		}
		line = strings.ReplaceAll(line, `\xc3\xa9`, "é")
		lines = append(lines, strings.TrimSpace(line))
	}
	slices.Sort(lines)
	return lines
}

// TestReadEqualsPartx compares tables with what util-linux reads.
func TestReadEqualsPartx(t *testing.T) {
	for _, want := range tables {
		t.Run(want.name, func(t *testing.T) {
			content := image(t, want.name)
			table, err := Read(memory{content: content})
			if err != nil {
				t.Fatal(err)
			}
			if table.Kind != want.kind || table.SectorSize != want.sector || table.Backup != want.backup || len(table.Partitions) != want.count {
				t.Errorf("%+v, not %+v", table, want)
			}
			var got []string
			for _, p := range table.Partitions {
				kind, id := p.Type, p.ID
				if table.Kind == MBR {
					kind = "0x" + strings.TrimLeft(kind, "0")
					id = fmt.Sprintf("%s-%02x", table.ID, p.Number)
				}
				got = append(got, fmt.Sprintf(`NR="%d" START="%d" SECTORS="%d" TYPE="%s" UUID="%s" NAME="%s"`,
					p.Number, p.Offset/512, p.Size/512, kind, id, p.Name))
			}
			slices.Sort(got)
			if oracle := partx(t, content, want.sector, table.Kind == MBR); !slices.Equal(got, oracle) {
				t.Errorf("read:\n%s\npartx:\n%s", strings.Join(got, "\n"), strings.Join(oracle, "\n"))
			}
		})
	}
}

// sealGPT computes the checksums of the GPT at the disk's beginning anew.
func sealGPT(d []byte) {
	n := binary.LittleEndian.Uint32(d[512+80:]) * binary.LittleEndian.Uint32(d[512+84:])
	table := binary.LittleEndian.Uint64(d[512+72:]) * 512
	if end := table + uint64(n); end <= uint64(len(d)) {
		binary.LittleEndian.PutUint32(d[512+88:], crc32.ChecksumIEEE(d[table:end]))
	}
	binary.LittleEndian.PutUint32(d[512+16:], 0)
	binary.LittleEndian.PutUint32(d[512+16:], crc32.ChecksumIEEE(d[512:512+92]))
}

// TestReadRefuses damages tables, behind right checksums where there are some.
func TestReadRefuses(t *testing.T) {
	le := binary.LittleEndian
	for _, c := range []struct {
		name, image string
		damage      func(d []byte)
		want        error
		says        string
	}{
		{"no signature", "mbr", func(d []byte) { d[510] = 0 }, ErrNone, "at 510"},
		{"boot code", "mbr", func(d []byte) { d[446+16] = 0x12 }, ErrNone, "at 462"},
		{"empty", "mbr", func(d []byte) { clear(d[446:510]) }, ErrNone, "at 446"},
		{"behind the end", "mbr", func(d []byte) { le.PutUint32(d[446+12:], 1<<20) }, ErrCorrupt, "at 1048576"},
		{"overlap", "mbr", func(d []byte) { le.PutUint32(d[446+12:], 2049) }, ErrCorrupt, "overlap"},
		{"primary in extended", "mbr", func(d []byte) { le.PutUint32(d[446+16+12:], 1025) }, ErrCorrupt, "overlap"},
		{"two extended", "mbr", func(d []byte) { d[446+16+4] = 5 }, ErrCorrupt, "at 478"},
		{"chain's signature", "mbr", func(d []byte) { d[next(d, 5120)*512+510] = 0 }, ErrCorrupt, "no signature at"},
		{"chain's loop", "mbr", func(d []byte) { le.PutUint32(d[5120*512+446+16+8:], 0) }, ErrCorrupt, "next one at 2621440"},
		{"chain leaves", "mbr", func(d []byte) { le.PutUint32(d[5120*512+446+16+8:], 10000) }, ErrCorrupt, "at 7741440"},
		{"logical leaves", "mbr", func(d []byte) { le.PutUint32(d[5120*512+446+12:], 10000) }, ErrCorrupt, "at 2621886"},
		{"logical on its table", "mbr", func(d []byte) { le.PutUint32(d[5120*512+446+8:], 0) }, ErrCorrupt, "at 2621886"},
		{"both headers", "gpt-backup", func(d []byte) { d[len(d)-512+20]++; d[len(d)-512]++ }, ErrCorrupt, "header at 8388096: no signature"},
		{"both tables", "gpt-backup", func(d []byte) { d[len(d)-33*512]++ }, ErrCorrupt, "entries at 8371712"},
		{"partition overlaps", "gpt", func(d []byte) { le.PutUint64(d[1024+40:], 5000); sealGPT(d) }, ErrCorrupt, "overlap"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := image(t, c.image)
			c.damage(d)
			table, err := Read(memory{content: d})
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%+v, %v; the error is to be %v and say %q", table, err, c.want, c.says)
			}
		})
	}
}

// next is where the chain of logical partitions goes from its first table, in sectors.
func next(d []byte, first int) int {
	return first + int(binary.LittleEndian.Uint32(d[first*512+446+16+8:]))
}

// TestReadTakesTheBackup damages each field that is checked of the first GPT,
// behind right checksums; the one at the end is read instead.
func TestReadTakesTheBackup(t *testing.T) {
	good, err := Read(memory{content: image(t, "gpt")})
	if err != nil {
		t.Fatal(err)
	}
	for name, damage := range map[string]func(d []byte){
		"revision":     func(d []byte) { d[512+8] = 1; sealGPT(d) },
		"header size":  func(d []byte) { d[512+12] = 91; sealGPT(d) },
		"checksum":     func(d []byte) { d[512+16]++ },
		"self":         func(d []byte) { d[512+24] = 2; sealGPT(d) },
		"last usable":  func(d []byte) { d[512+55] = 0x80; sealGPT(d) },
		"table":        func(d []byte) { d[512+76] = 1; sealGPT(d) },
		"table's end":  func(d []byte) { binary.LittleEndian.PutUint64(d[512+72:], 16383); sealGPT(d) },
		"no entries":   func(d []byte) { d[512+80] = 0; sealGPT(d) },
		"many entries": func(d []byte) { d[512+83] = 0xff; sealGPT(d) },
		"entry size":   func(d []byte) { d[512+84] = 127; sealGPT(d) },
		"large size":   func(d []byte) { d[512+87] = 0x80; sealGPT(d) },
		"entries":      func(d []byte) { d[1024+40]++ },
		"first":        func(d []byte) { d[1024+32+7] = 0xff; sealGPT(d) },
		"last":         func(d []byte) { d[1024+40+7] = 0x7f; sealGPT(d) },
		"before first": func(d []byte) { d[1024+33] = 0; sealGPT(d) },
	} {
		t.Run(name, func(t *testing.T) {
			d := image(t, "gpt")
			damage(d)
			table, err := Read(memory{content: d})
			if err != nil {
				t.Fatal(err)
			}
			if !table.Backup || !slices.Equal(table.Partitions, good.Partitions) {
				t.Errorf("%+v", table)
			}
		})
	}
}

func TestReadErrors(t *testing.T) {
	if _, err := Read(memory{content: make([]byte, 511)}); !errors.Is(err, ErrNone) {
		t.Errorf("511 bytes: %v", err)
	}
	broken := errors.New("broken")
	if _, err := Read(block.Failed(memory{content: make([]byte, 4096)}, broken)); !errors.Is(err, ErrRead) || !errors.Is(err, broken) {
		t.Errorf("a disk that cannot be read: %v", err)
	}
}

// FuzzRead looks for tables that have Read panic, or return partitions that are
// not on the disk.
func FuzzRead(f *testing.F) {
	for _, table := range tables {
		d := image(f, table.name)
		// The first and the last of it; what is between is far from all tables.
		f.Add(d[:64<<10], d[len(d)-64<<10:], uint16(len(d)>>10))
		f.Add(d[5120*512:5120*512+64<<10], d[:0], uint16(100))
	}
	f.Fuzz(func(t *testing.T, first, last []byte, kib uint16) {
		d := make([]byte, max(int(kib)<<10, len(first)+len(last)))
		copy(d, first)
		copy(d[len(d)-len(last):], last)
		if bytes.HasPrefix(d[min(len(d), 512):], []byte(gptSignature)) && len(d) >= 1024 {
			sealGPT(d)
		}
		table, err := Read(memory{content: d})
		if err != nil {
			return
		}
		end := int64(0)
		for _, p := range table.ascending() {
			if p.Offset < end || p.Size <= 0 || p.Offset+p.Size > int64(len(d)) {
				t.Fatalf("%+v on a disk of %d bytes", p, len(d))
			}
			end = p.Offset + p.Size
		}
	})
}
