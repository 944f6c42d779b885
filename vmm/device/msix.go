package device

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
)

// Layout of an MSIX handler's range, which a device places page aligned in one
// of its BARs: the vector table, then the pending bits.
const (
	MSIXSize       = 0x1000
	MSIXPBAOffset  = 0x800
	MaxMSIXVectors = MSIXPBAOffset / msixEntrySize

	msixEntrySize = 16
)

// Bits of the message control register in configuration space and of a
// vector's control word.
const (
	msixControlEnable = 1 << 15
	msixControlMask   = 1 << 14
	msixVectorMask    = 1 << 0
)

// ErrMSIXState is the stage of loading saved MSI-X state.
var ErrMSIXState = errors.New("restore MSI-X state")

// MSIXEntry is one vector of the table (PCI Local Bus 3.0, section 6.8.2).
type MSIXEntry struct {
	Addr    uint64
	Data    uint32
	Control uint32 // bit 0: masked
}

// MSIXState is what survives a checkpoint. Enable and function mask are part
// of the configuration space.
type MSIXState struct {
	Entries []MSIXEntry
	Pending []uint64 // one bit for each vector
}

// MSIX is a function's MSI-X capability: the table and pending bits, which the
// guest reaches through the Handler methods, and the way to send a vector.
type MSIX struct {
	sender  MSISender
	enabled atomic.Bool
	// mu guards everything below.
	mu     sync.Mutex
	masked bool // the function mask
	state  MSIXState
}

func newMSIX(vectors int) *MSIX {
	m := &MSIX{state: MSIXState{
		Entries: make([]MSIXEntry, vectors),
		Pending: make([]uint64, (vectors+63)/64),
	}}
	m.reset()
	return m
}

// Vectors is the size of the table.
func (m *MSIX) Vectors() int { return len(m.state.Entries) }

// Enabled tells whether the guest chose MSI-X over the INTx line.
func (m *MSIX) Enabled() bool { return m.enabled.Load() }

// Notify sends a vector, or marks it pending while it is masked. It does
// nothing for a vector outside the table or while MSI-X is disabled. Any
// goroutine may call it.
func (m *MSIX) Notify(vector int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if vector < 0 || vector >= len(m.state.Entries) || !m.enabled.Load() {
		return
	}
	if m.masked || m.state.Entries[vector].Control&msixVectorMask != 0 {
		m.state.Pending[vector/64] |= 1 << (vector % 64)
		return
	}
	m.send(vector)
}

// send delivers a vector; m.mu is held, so that no message follows a mask the
// guest has seen take effect. A message to an address that is no interrupt
// controller is lost, as it would be on a real bus.
func (m *MSIX) send(vector int) {
	if m.sender == nil {
		return
	}
	e := &m.state.Entries[vector]
	_ = m.sender.SignalMSI(e.Addr, e.Data)
}

// flush sends what is pending and no longer masked; m.mu is held.
func (m *MSIX) flush() {
	if m.masked || !m.enabled.Load() {
		return
	}
	for v := range m.state.Entries {
		bit := uint64(1) << (v % 64)
		if m.state.Pending[v/64]&bit != 0 && m.state.Entries[v].Control&msixVectorMask == 0 {
			m.state.Pending[v/64] &^= bit
			m.send(v)
		}
	}
}

// setControl follows a write to the message control register.
func (m *MSIX) setControl(control uint16) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.enabled.Store(control&msixControlEnable != 0)
	m.masked = control&msixControlMask != 0
	m.flush()
}

// reset masks every vector and forgets what is pending.
func (m *MSIX) reset() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.enabled.Store(false)
	m.masked = false
	for i := range m.state.Entries {
		m.state.Entries[i] = MSIXEntry{Control: msixVectorMask}
	}
	clear(m.state.Pending)
}

// word returns the 32-bit word at off of the table or the pending bits; m.mu
// is held.
func (m *MSIX) word(off uint64) uint32 {
	if off >= MSIXPBAOffset {
		if i := (off - MSIXPBAOffset) / 8; i < uint64(len(m.state.Pending)) {
			return uint32(m.state.Pending[i] >> (8 * (off & 4)))
		}
		return 0
	}
	i := off / msixEntrySize
	if i >= uint64(len(m.state.Entries)) {
		return 0
	}
	e := &m.state.Entries[i]
	switch off % msixEntrySize / 4 {
	case 0:
		return uint32(e.Addr)
	case 1:
		return uint32(e.Addr >> 32)
	case 2:
		return e.Data
	}
	return e.Control
}

// Read reads the table or the pending bits.
func (m *MSIX) Read(off uint64, p []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range p {
		o := off + uint64(i)
		p[i] = byte(m.word(o&^3) >> (8 * (o & 3)))
	}
}

// Write changes table entries by aligned 4- or 8-byte accesses; others, which
// the specification leaves undefined, and the pending bits do not change.
func (m *MSIX) Write(off uint64, p []byte) {
	if len(p)%4 != 0 || off%4 != 0 {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for ; len(p) > 0; off, p = off+4, p[4:] {
		i := off / msixEntrySize
		if off >= MSIXPBAOffset || i >= uint64(len(m.state.Entries)) {
			return
		}
		e, v := &m.state.Entries[i], binary.LittleEndian.Uint32(p)
		switch off % msixEntrySize / 4 {
		case 0:
			e.Addr = e.Addr&^0xFFFF_FFFF | uint64(v&^3)
		case 1:
			e.Addr = e.Addr&0xFFFF_FFFF | uint64(v)<<32
		case 2:
			e.Data = v
		case 3:
			e.Control = v & msixVectorMask
		}
	}
	m.flush()
}

// save returns a copy of the state.
func (m *MSIX) save() *MSIXState {
	m.mu.Lock()
	defer m.mu.Unlock()
	return &MSIXState{
		Entries: append([]MSIXEntry(nil), m.state.Entries...),
		Pending: append([]uint64(nil), m.state.Pending...),
	}
}

// load takes over saved state and sends nothing; setControl follows.
func (m *MSIX) load(s *MSIXState) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if s == nil || len(s.Entries) != len(m.state.Entries) || len(s.Pending) != len(m.state.Pending) {
		return fmt.Errorf("%w: not a table of %d vectors", ErrMSIXState, len(m.state.Entries))
	}
	copy(m.state.Entries, s.Entries)
	copy(m.state.Pending, s.Pending)
	return nil
}
