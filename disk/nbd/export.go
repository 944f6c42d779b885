package nbd

import (
	"context"
	"fmt"
	"math"
	"unicode/utf8"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// Bitmap tells which bytes of an export are dirty; clients read it as the
// context qemu:dirty-bitmap:NAME. It may be called concurrently.
type Bitmap interface {
	// Name is how clients ask for it.
	Name() string
	// NextDirty returns the first run of dirty bytes at or behind off, as far as it
	// lies below end: start >= off, stop <= end. Where there is none, start ==
	// stop.
	NextDirty(off, end int64) (start, stop int64, err error)
}

// Export is a disk that a Server serves.
type Export struct {
	// Name is how clients ask for it; "" is what they get who ask for none. At most
	// 4096 bytes of UTF-8.
	Name string
	// Description is for people who list the exports.
	Description string
	// Node is the disk. It stays the caller's, who closes it once the export is
	// removed. A Mapper's holes are told to clients.
	Node block.Node
	// ReadOnly keeps clients from writing, also where the node can be written.
	ReadOnly bool
	// Bitmaps are those that clients can read.
	Bitmaps []Bitmap
	// FastZero tells that Node.WriteZeroes is never slower than the writing of data
	// would be; clients that want zeroes only if they are fast get them then.
	FastZero bool
}

// Removal says how an export goes whose clients are still connected.
type Removal int

// How an export goes.
const (
	RemoveIfUnused Removal = iota // not at all: ErrInUse
	RemoveWaiting                 // when the last has left; new ones find no export
	RemoveHard                    // at once: they are disconnected
)

// exported is an export that is being served.
type exported struct {
	Export
	mapper block.Mapper // or nil
	flags  uint16       // transmission flags
	// clients is guarded by Server.mu, as is leaving: no new ones.
	clients map[*connection]struct{}
	leaving bool
	unused  chan struct{} // closed when leaving and without clients
}

// Add serves e from now on.
func (s *Server) Add(e Export) error {
	switch {
	case len(e.Name) > maxString || !utf8.ValidString(e.Name):
		return fmt.Errorf("%w %.40q: names are at most %d bytes of UTF-8", ErrExport, e.Name, maxString)
	case len(e.Description) > maxString || !utf8.ValidString(e.Description):
		return fmt.Errorf("%w %q: descriptions are at most %d bytes of UTF-8", ErrExport, e.Name, maxString)
	}
	for _, b := range e.Bitmaps {
		if name := b.Name(); name == "" || len(ContextDirtyBitmap)+len(name) > maxString {
			return fmt.Errorf("%w %q: bitmap %.40q: names are 1 to %d bytes", ErrExport, e.Name, name, maxString-len(ContextDirtyBitmap))
		}
	}
	x := &exported{Export: e, clients: map[*connection]struct{}{}, unused: make(chan struct{})}
	x.mapper, _ = e.Node.(block.Mapper)
	x.ReadOnly = e.ReadOnly || e.Node.ReadOnly()
	// Several connections see one node, whose flush makes durable what any of them
	// was told to be written.
	x.flags = flagHasFlags | flagFlush | flagFUA | flagCache | flagMultiConn
	if x.ReadOnly {
		x.flags |= flagReadOnly
	} else {
		x.flags |= flagTrim | flagWriteZeroes | flagFastZero
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return fmt.Errorf("%w %q: %w", ErrExport, e.Name, ErrClosed)
	}
	if s.exports[e.Name] != nil {
		return fmt.Errorf("%w %q: there is one of this name already", ErrExport, e.Name)
	}
	s.exports[e.Name] = x
	return nil
}

// Remove ends the export. When it returns nil, no request is under way and none
// will come; the node can be closed. When ctx ends before, the export goes on
// being served, except that RemoveHard cannot be taken back: then some request
// still uses the node.
func (s *Server) Remove(ctx context.Context, name string, how Removal) error {
	s.mu.Lock()
	x := s.exports[name]
	switch {
	case x == nil:
		s.mu.Unlock()
		return fmt.Errorf("%w %q: there is none of this name", ErrExport, name)
	case x.leaving && how != RemoveHard:
		s.mu.Unlock()
		return fmt.Errorf("%w %q: it is being removed already", ErrExport, name)
	case how == RemoveIfUnused && len(x.clients) > 0:
		s.mu.Unlock()
		return fmt.Errorf("%w %q: %w: disconnect them, or remove it hard", ErrExport, name, ErrInUse)
	}
	if !x.leaving {
		x.leaving = true
		if len(x.clients) == 0 {
			close(x.unused)
		}
	}
	if how == RemoveHard {
		for c := range x.clients {
			c.hangUp()
		}
	}
	unused := x.unused
	s.mu.Unlock()

	select {
	case <-unused:
	case <-ctx.Done():
		s.mu.Lock()
		defer s.mu.Unlock()
		if len(x.clients) > 0 {
			if how == RemoveWaiting {
				x.leaving = false
			}
			return fmt.Errorf("%w %q: %w: %w", ErrExport, name, ErrInUse, ctx.Err())
		}
		delete(s.exports, name)
		return nil
	}
	s.mu.Lock()
	delete(s.exports, name)
	s.mu.Unlock()
	return nil
}

// find returns the export named, without using it.
func (s *Server) find(name string) *exported {
	s.mu.Lock()
	defer s.mu.Unlock()
	if x := s.exports[name]; x != nil && !x.leaving {
		return x
	}
	return nil
}

// enter makes c a client of x, unless x goes.
func (s *Server) enter(x *exported, c *connection) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if x.leaving || s.closed || s.exports[x.Name] != x {
		return false
	}
	x.clients[c] = struct{}{}
	return true
}

// leave ends what enter began.
func (s *Server) leave(x *exported, c *connection) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(x.clients, c)
	if x.leaving && len(x.clients) == 0 {
		close(x.unused)
	}
}

// blockSizes are what a client is told of x: minimum, preferred and maximum.
func (x *exported) blockSizes() (minimum, preferred, maximum uint32) {
	preferred = 4096
	if c := x.Node.Info().ClusterSize; c > 4096 && c <= maxPayload && c&(c-1) == 0 {
		preferred = uint32(c)
	}
	return 1, preferred, maxPayload
}

// contexts are the names of what block status can tell, in the order of their
// IDs, for clients of x.
func (x *exported) contexts() []string {
	names := make([]string, 0, 1+len(x.Bitmaps))
	names = append(names, ContextAllocation)
	for _, b := range x.Bitmaps {
		names = append(names, ContextDirtyBitmap+b.Name())
	}
	return names
}

// extent returns the length, at most n, of the bytes at off for which a context
// tells the same, and what it tells.
func (x *exported) extent(context contextID, off, n int64) (int64, uint32, error) {
	n = min(n, math.MaxUint32)
	if context > 0 {
		start, stop, err := x.Bitmaps[context-1].NextDirty(off, off+n)
		switch {
		case err != nil:
			return 0, 0, err
		case stop <= start || start >= off+n:
			return n, 0, nil
		case start > off:
			return start - off, 0, nil
		}
		return max(min(stop-off, n), 1), StateDirty, nil
	}
	if x.mapper == nil {
		return n, 0, nil
	}
	e, err := x.mapper.Map(off, n)
	if err != nil {
		return 0, 0, err
	}
	if e.Length <= 0 {
		return 0, 0, fmt.Errorf("the disk's map has an extent of %d bytes at %d", e.Length, off)
	}
	var state uint32
	if !e.Data {
		state |= StateHole
	}
	if e.Zero {
		state |= StateZero
	}
	return min(e.Length, n), state, nil
}
