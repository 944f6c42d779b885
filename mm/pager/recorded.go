package pager

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/gnomon-vmm/gnomon/mm/checkpoint"
)

// ErrRecorded is a file of recorded blocks that cannot be used.
var ErrRecorded = errors.New("recorded set")

// A recorded set is a small file beside a checkpoint, by the name of
// RecordedPath. Its numbers are little-endian:
//
//	 0  8 bytes  "GNOMNSET"
//	 8  u32      version, 1
//	12  u32      how many blocks follow
//	16  16 bytes the checkpoint's id
//	32  u32 each block numbers, in the order in which a run wanted them
//	    u32      CRC32C of all before
const (
	recordedMagic   = "GNOMNSET"
	recordedVersion = 1
	recordedHeader  = 32
	maxRecorded     = 1 << 24 // blocks: 4 TiB of guest memory
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// RecordedPath is where a checkpoint's recorded set is kept.
func RecordedPath(path string) string { return checkpoint.RecordedPath(path) }

// RecordedSet returns the blocks that the guest has wanted so far, for a later
// run to begin with: those that were demanded or loaded ahead, in this order, and
// then those that the background brought and of which pages were used since, as
// far as Usage can know.
func (p *Pager) RecordedSet() []Block {
	p.mu.Lock()
	set := slices.Clone(p.demanded)
	p.mu.Unlock()
	used, err := p.usedBlocks()
	if err != nil {
		return set
	}
	for _, b := range set {
		used[b] = false
	}
	for b, is := range used {
		if is {
			set = append(set, Block(b))
		}
	}
	return set
}

// usedBlocks tells of which blocks pages were used.
func (p *Pager) usedBlocks() ([]bool, error) {
	f, err := openPageFlags()
	if err != nil {
		return nil, err
	}
	defer f.close()
	blocks := make([]bool, p.src.Blocks())
	for _, r := range p.regions {
		for i := uint64(0); i < r.pages; i++ {
			if r.get(i) != present {
				continue
			}
			loc := p.src.Find(r.first + i)
			if isZero(loc) || blocks[loc.Block] {
				continue
			}
			if blocks[loc.Block], err = f.used(r.addrOf(i)); err != nil {
				return nil, err
			}
		}
	}
	return blocks, nil
}

// SaveRecorded writes the recorded set of the checkpoint with an id to a file,
// which it replaces at once or not at all.
func SaveRecorded(path string, id checkpoint.ID, blocks []Block) error {
	if len(blocks) > maxRecorded {
		return fmt.Errorf("%w: %s: %d blocks are too many", ErrRecorded, path, len(blocks))
	}
	b := []byte(recordedMagic)
	b = binary.LittleEndian.AppendUint32(b, recordedVersion)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(blocks)))
	b = append(b, id[:]...)
	for _, block := range blocks {
		b = binary.LittleEndian.AppendUint32(b, uint32(block))
	}
	b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
	if err := replaceFile(path, b); err != nil {
		return fmt.Errorf("%w: %w", ErrRecorded, err)
	}
	return nil
}

// replaceFile makes b the contents of a file, for good.
func replaceFile(path string, b []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	if _, err := f.Write(b); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// CheckRecordable tells whether SaveRecorded can make a file, as far as that can be
// known ahead.
func CheckRecordable(path string) error {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("%w: %w", ErrRecorded, err)
	}
	_, err = f.Write(make([]byte, recordedHeader))
	if err := errors.Join(err, f.Close(), os.Remove(f.Name())); err != nil {
		return fmt.Errorf("%w: %w", ErrRecorded, err)
	}
	return nil
}

// LoadRecorded reads the recorded set of the checkpoint with an id. Without a
// file the error is fs.ErrNotExist.
func LoadRecorded(path string, id checkpoint.ID) ([]Block, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRecorded, err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, recordedHeader+4*maxRecorded+5))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRecorded, err)
	}
	blocks, err := parseRecorded(b, id)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrRecorded, path, err)
	}
	return blocks, nil
}

func parseRecorded(b []byte, id checkpoint.ID) ([]Block, error) {
	if len(b) < recordedHeader+4 || string(b[:8]) != recordedMagic {
		return nil, errors.New("not a recorded set")
	}
	if v := binary.LittleEndian.Uint32(b[8:]); v != recordedVersion {
		return nil, fmt.Errorf("version %d, this program knows %d", v, recordedVersion)
	}
	n := uint64(binary.LittleEndian.Uint32(b[12:]))
	if want := recordedHeader + 4*n + 4; uint64(len(b)) != want || n > maxRecorded {
		return nil, fmt.Errorf("%d bytes for %d blocks, want %d", len(b), n, want)
	}
	body := b[:len(b)-4]
	if got, want := crc32.Checksum(body, castagnoli), binary.LittleEndian.Uint32(b[len(b)-4:]); got != want {
		return nil, fmt.Errorf("damaged: checksum %#08x, want %#08x", got, want)
	}
	if got := checkpoint.ID(b[16:32]); got != id {
		return nil, fmt.Errorf("it belongs to checkpoint %v, not to %v", got, id)
	}
	blocks := make([]Block, n)
	for i := range blocks {
		blocks[i] = Block(binary.LittleEndian.Uint32(b[recordedHeader+4*i:]))
	}
	return blocks, nil
}
