package guestmem

import (
	"errors"
	"slices"
	"testing"
)

// touches records what a pager is asked for.
type touches struct {
	asked []Range
	err   error
}

func (p *touches) Touch(gpa, n uint64) error {
	p.asked = append(p.asked, Range{gpa, n})
	return p.err
}

func TestEveryAccessAsksThePager(t *testing.T) {
	m := newMemory(t)
	first, second := &touches{}, &touches{}
	m.AddPager(first)
	m.AddPager(second)
	for name, c := range map[string]struct {
		access func() error
		want   []Range
	}{
		"Slice":         {func() error { _, err := m.Slice(100, 50); return err }, []Range{{100, 50}}},
		"Pin":           {func() error { _, err := m.Pin(100, 50); m.Unpin(100, 50); return err }, []Range{{100, 50}}},
		"Read":          {func() error { return m.Read(4*PageSize-8, make([]byte, 16)) }, []Range{{4*PageSize - 8, 8}, {4 * PageSize, 8}}},
		"Write":         {func() error { return m.Write(4*PageSize-8, make([]byte, 16)) }, []Range{{4*PageSize - 8, 8}, {4 * PageSize, 8}}},
		"Discard":       {func() error { return m.Discard(1<<32+100, 3*PageSize) }, []Range{{1<<32 + PageSize, 2 * PageSize}}},
		"nothing":       {func() error { return m.Read(0, nil) }, nil},
		"out of bounds": {func() error { _, err := m.Slice(7*PageSize, 1); return errors.Unwrap(err) }, nil},
	} {
		first.asked, second.asked = nil, nil
		err := c.access()
		if name != "out of bounds" && err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if !slices.Equal(first.asked, c.want) || !slices.Equal(second.asked, c.want) {
			t.Errorf("%s asked for %x and %x, want %x", name, first.asked, second.asked, c.want)
		}
	}

	// A page that cannot be had is an error, and nothing is given out.
	first.err = errors.New("damaged block")
	if b, err := m.Slice(0, 1); !errors.Is(err, first.err) || b != nil {
		t.Errorf("slice of what cannot be loaded: %v", err)
	}
	for name, err := range map[string]error{"Read": m.Read(0, []byte{1}), "Write": m.Write(0, []byte{1}), "Discard": m.Discard(0, PageSize)} {
		if !errors.Is(err, first.err) {
			t.Errorf("%s of what cannot be loaded: %v", name, err)
		}
	}
	m.RemovePager(first)
	if _, err := m.Slice(0, 1); err != nil {
		t.Errorf("slice without the pager that failed: %v", err)
	}
	m.RemovePager(second)
	n := len(second.asked)
	if _, err := m.Slice(0, 1); err != nil || len(second.asked) != n {
		t.Errorf("a removed pager was asked, %v", err)
	}
}

func TestPins(t *testing.T) {
	m := newMemory(t)
	pin := func(gpa, n uint64) {
		t.Helper()
		if _, err := m.Pin(gpa, n); err != nil {
			t.Fatal(err)
		}
	}
	pin(PageSize+100, 2*PageSize)
	pin(2*PageSize, 1)
	pin(1<<32, 0)
	if _, err := m.Pin(7*PageSize, 1); err == nil {
		t.Error("pinned what is not RAM")
	}
	if got := m.Pinned(); !slices.Equal(got, []uint64{PageSize, 2 * PageSize, 3 * PageSize}) {
		t.Errorf("pinned %x", got)
	}
	m.Unpin(PageSize+100, 2*PageSize)
	if got := m.Pinned(); !slices.Equal(got, []uint64{2 * PageSize}) {
		t.Errorf("pinned %x", got)
	}
	m.Unpin(2*PageSize, 1)
	if got := m.Pinned(); len(got) != 0 {
		t.Errorf("pinned %x", got)
	}
}

func TestTheTwoMappingsAreOneMemory(t *testing.T) {
	m := newMemory(t)
	for i, r := range m.Regions() {
		r.Bytes()[7] = byte(i + 1)
		if got := r.GuestBytes()[7]; got != byte(i+1) || len(r.GuestBytes()) != len(r.Bytes()) || &r.GuestBytes()[0] == &r.Bytes()[0] {
			t.Errorf("region %d: the guest's mapping has %d", i, got)
		}
	}
}
