package device

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"sync"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// ErrGenerationID is the stage of placing a generation id.
var ErrGenerationID = errors.New("generation id")

// GUID is a globally unique identifier as it lies in memory: the first three
// groups of its text form little-endian, the rest in order.
type GUID [16]byte

// NewGUID makes a random (version 4) GUID.
func NewGUID() GUID {
	var text [16]byte
	rand.Read(text[:]) // never fails
	text[6] = text[6]&0x0F | 0x40
	text[8] = text[8]&0x3F | 0x80
	return swapGUID(text)
}

// ParseGUID reads the 8-4-4-4-12 form.
func ParseGUID(s string) (GUID, error) {
	var text [16]byte
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return GUID{}, fmt.Errorf("%w: GUID %q: must look like 123e4567-e89b-42d3-a456-426614174000", ErrGenerationID, s)
	}
	if _, err := hex.Decode(text[:], []byte(s[:8]+s[9:13]+s[14:18]+s[19:23]+s[24:])); err != nil {
		return GUID{}, fmt.Errorf("%w: GUID %q: %w", ErrGenerationID, s, err)
	}
	return swapGUID(text), nil
}

// String is the 8-4-4-4-12 form.
func (g GUID) String() string {
	t := swapGUID(g)
	return fmt.Sprintf("%x-%x-%x-%x-%x", t[0:4], t[4:6], t[6:8], t[8:10], t[10:16])
}

// swapGUID goes from bytes in text order to bytes in memory and back.
func swapGUID(g [16]byte) GUID {
	binary.LittleEndian.PutUint32(g[0:], binary.BigEndian.Uint32(g[0:]))
	binary.LittleEndian.PutUint16(g[4:], binary.BigEndian.Uint16(g[4:]))
	binary.LittleEndian.PutUint16(g[6:], binary.BigEndian.Uint16(g[6:]))
	return g
}

// GenerationID is the "Virtual Machine Generation ID" (Microsoft, 2012): 16
// bytes of guest memory that change whenever the machine's execution may have
// forked, so that guests renew what must be unique. A device in the DSDT
// tells the guest where it is; the change comes with a general purpose event.
type GenerationID struct {
	mem   *guestmem.Memory
	power *Power
	mu    sync.Mutex
	s     GenerationIDState // guarded by mu
}

// GenerationIDState is what of a GenerationID survives a checkpoint.
type GenerationIDState struct {
	GPA uint64
	ID  GUID
}

// NewGenerationID keeps id at gpa, which must be 8-byte aligned RAM that the
// guest does not use otherwise. Place writes it.
func NewGenerationID(mem *guestmem.Memory, power *Power, gpa uint64, id GUID) (*GenerationID, error) {
	g := &GenerationID{mem: mem, power: power}
	if err := g.Restore(GenerationIDState{gpa, id}); err != nil {
		return nil, err
	}
	return g, nil
}

// GPA is where the id lies.
func (g *GenerationID) GPA() uint64 { return g.State().GPA }

// ID is the current id.
func (g *GenerationID) ID() GUID { return g.State().ID }

// Place writes the id to guest memory, as before each boot.
func (g *GenerationID) Place() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.place()
}

func (g *GenerationID) place() error {
	if err := g.mem.Write(g.s.GPA, g.s.ID[:]); err != nil {
		return fmt.Errorf("%w: %w", ErrGenerationID, err)
	}
	return nil
}

// Change gives the machine a new id and tells the guest. After a restore it
// comes before the vCPUs run.
func (g *GenerationID) Change(id GUID) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.s.ID = id
	if err := g.place(); err != nil {
		return err
	}
	g.power.NotifyGeneration()
	return nil
}

// State returns what must survive a checkpoint.
func (g *GenerationID) State() GenerationIDState {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.s
}

// Restore takes over saved state. It does not touch guest memory, where the
// id lies already.
func (g *GenerationID) Restore(s GenerationIDState) error {
	if s.GPA%8 != 0 {
		return fmt.Errorf("%w: GPA %#x is not 8-byte aligned", ErrGenerationID, s.GPA)
	}
	if _, err := g.mem.Slice(s.GPA, uint64(len(s.ID))); err != nil {
		return fmt.Errorf("%w: %w", ErrGenerationID, err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.s = s
	return nil
}
