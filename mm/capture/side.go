package capture

import (
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Side is the room for pages that are kept aside, and for the states of all pages. One capture
// after the other may use it: then the kernel need not find and clear memory for each.
type Side struct {
	bytes []byte
	used  atomic.Bool // a capture has it

	states []atomic.Uint32 // all free; who has used them last left them; nil: nobody did
}

const (
	sideCopies = 8192 // by default
	// keptSide is how much of the memory stays from one capture to the next, and how much
	// of states.
	keptSide = 16 << 20
)

var errSideUsed = errors.New("the room for side copies is in use by another capture")

// NewSide makes room for so many pages; 0 means 8192, 32 MiB. It takes no memory until
// it is used.
func NewSide(copies int) (*Side, error) {
	if copies <= 0 {
		copies = sideCopies
	}
	if copies > maxSlots/2 {
		return nil, fmt.Errorf("%w: %d side copies are too many", ErrSetup, copies)
	}
	// Not Go's memory, which would be cleared, used or not.
	b, err := unix.Mmap(-1, 0, copies*pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("%w: room for %d side copies: %w", ErrSetup, copies, err)
	}
	_ = unix.Madvise(b, unix.MADV_HUGEPAGE) // fewer faults, where it is possible
	s := &Side{bytes: b}
	runtime.AddCleanup(s, func(b []byte) { _ = unix.Munmap(b) }, b)
	return s, nil
}

// take lets one capture use the room, for a memory of so many pages.
func (s *Side) take(pages uint64) ([]atomic.Uint32, error) {
	if s.used.Swap(true) {
		return nil, errSideUsed
	}
	states := s.states
	if s.states = nil; uint64(len(states)) != pages {
		states = make([]atomic.Uint32, pages)
	}
	return states, nil
}

// release ends that, and gives most of the memory back. states are nil unless they are all free.
func (s *Side) release(states []atomic.Uint32) error {
	defer s.used.Store(false)
	if len(states)*4 <= keptSide {
		s.states = states
	}
	if len(s.bytes) <= keptSide {
		return nil
	}
	return unix.Madvise(s.bytes[keptSide:], unix.MADV_DONTNEED)
}
