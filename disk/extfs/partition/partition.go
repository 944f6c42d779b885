// Package partition reads the partition tables of disks: MBR with logical
// partitions, and GPT (UEFI specification 2.10, chapter 5).
package partition

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// Errors of reading a table, wrapped with the byte of the disk they are about.
var (
	// ErrNone: there is no partition table, or an empty one.
	ErrNone = errors.New("no partition table")
	// ErrCorrupt: it contradicts itself, its checksums or the disk's size.
	ErrCorrupt = errors.New("corrupt partition table")
	// ErrRead is the stage of reading the disk.
	ErrRead = errors.New("read partition table")
)

// Kinds of tables.
const (
	MBR = "mbr"
	GPT = "gpt"
)

// Table is what a disk is divided into.
type Table struct {
	Kind       string // MBR or GPT
	ID         string // of the disk: 8 hexadecimal digits, or a UUID
	SectorSize int64  // bytes that the table counts in
	// Backup tells that the GPT is the one at the disk's end, because that at its
	// beginning is damaged.
	Backup     bool
	Partitions []Partition // in the table's order; they do not overlap
}

// Partition is one of a table.
type Partition struct {
	Number       int   // as Linux numbers it
	Offset, Size int64 // bytes
	// Type is a UUID, or the MBR's type as two hexadecimal digits.
	Type string
	ID   string // a UUID; "" with an MBR
	Name string // of a GPT's partition
}

// mbrSector is what an MBR counts in. That of a disk with larger sectors is not
// understood; its GPT is.
const mbrSector = 512

// disk reads sectors.
type disk struct {
	node block.Node
	size int64
}

func (d *disk) read(p []byte, off int64) error {
	if off < 0 || off > d.size || int64(len(p)) > d.size-off {
		return fmt.Errorf("%w: %d bytes at %d lie outside the disk's %d", ErrCorrupt, len(p), off, d.size)
	}
	if err := d.node.Readv([][]byte{p}, off); err != nil {
		return fmt.Errorf("%w: %d bytes at %d: %w", ErrRead, len(p), off, err)
	}
	return nil
}

// Read reads the partition table of a disk.
func Read(node block.Node) (*Table, error) {
	d := &disk{node: node, size: node.Size()}
	if d.size < mbrSector {
		return nil, fmt.Errorf("%w: the disk has %d bytes", ErrNone, d.size)
	}
	var sector [mbrSector]byte
	if err := d.read(sector[:], 0); err != nil {
		return nil, err
	}
	var t *Table
	var err error
	if protective(&sector) {
		t, err = d.gpt()
	} else {
		t, err = d.mbr(&sector)
	}
	if err != nil {
		return nil, err
	}
	if err := t.check(d.size); err != nil {
		return nil, err
	}
	return t, nil
}

// check refuses partitions that overlap or pass the disk's end.
func (t *Table) check(size int64) error {
	order := t.ascending()
	for i, p := range order {
		if p.Size <= 0 || p.Offset <= 0 || p.Offset > size || p.Size > size-p.Offset {
			return fmt.Errorf("%w: partition %d: %d bytes at %d of a disk of %d", ErrCorrupt, p.Number, p.Size, p.Offset, size)
		}
		if i > 0 && order[i-1].Offset+order[i-1].Size > p.Offset {
			return fmt.Errorf("%w: partition %d at %d and partition %d at %d overlap", ErrCorrupt, order[i-1].Number, order[i-1].Offset, p.Number, p.Offset)
		}
	}
	return nil
}

func le32(p []byte) int64 { return int64(binary.LittleEndian.Uint32(p)) }
