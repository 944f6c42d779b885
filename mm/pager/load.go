package pager

import (
	"cmp"
	"fmt"
	"runtime"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
	"github.com/gnomon-vmm/gnomon/mm/uffd"
)

const pageSize = guestmem.PageSize

// origin is on whose behalf pages are loaded.
type origin int

const (
	demand     origin = iota // somebody waits
	ahead                    // of a walk, or because an earlier run wanted it
	background               // because all must come in the end
	sweeping                 // and this is the last of it
)

// loader is what one goroutine needs to load pages.
type loader struct {
	block  [BlockPages * pageSize]byte // a decompressed block
	gather [BlockPages * pageSize]byte // pages made adjacent
	pages  [BlockPages]slotPage
	faults [8]uffd.Fault
	zeros  stretch // of zeros that were demanded
	equals stretch // of pages that equal others
	// walking says that the demand continues a walk.
	walking bool
}

// slotPage is a page to be installed from a slot of a block.
type slotPage struct {
	place
	slot int
}

// read reads a block from the source.
func (p *Pager) read(b Block, buf []byte) ([]byte, error) {
	pages, stored, err := p.src.ReadBlock(b, buf)
	p.counts.blockReads.Add(1)
	p.counts.bytesRead.Add(uint64(stored))
	if err != nil {
		return nil, fmt.Errorf("%w: block %d: %w", ErrLoad, b, err)
	}
	return pages, nil
}

// loadBlock installs what is missing of a block. If somebody waits for a page,
// it is answered before the others come; but a guest that walks will want them
// all, and would only stumble over the next, so it waits for the whole block and
// is woken by the caller.
func (p *Pager) loadBlock(l *loader, b Block, first place, from origin) error {
	pages, err := p.cache.block(p, b, l.block[:])
	if err != nil {
		return err
	}
	pfns, err := p.src.Pages(b)
	if err == nil && (len(pfns) > BlockPages || len(pages) != len(pfns)*pageSize) {
		err = fmt.Errorf("%d bytes for %d pages", len(pages), len(pfns))
	}
	if err != nil {
		return fmt.Errorf("%w: block %d: %w", ErrLoad, b, err)
	}
	equal, err := p.src.Shared(b)
	if err != nil {
		return fmt.Errorf("%w: block %d: %w", ErrLoad, b, err)
	}
	n := 0
	for slot, pfn := range pfns {
		at := p.place(pfn)
		if at.r == nil {
			p.unclaim(l.pages[:n])
			return fmt.Errorf("%w: block %d: page %#x in slot %d is none of the memory's", ErrLoad, b, pfn, slot)
		}
		if loc := p.src.Find(pfn); isZero(loc) || loc.Block != b || loc.Slot != slot {
			continue
		}
		if at.r.change(at.i, missing, loading) {
			l.pages[n] = slotPage{at, slot}
			n++
		}
	}
	p.shared.keep(b, equal, pages)
	todo := l.pages[:n]
	slices.SortFunc(todo, func(a, b slotPage) int { return cmp.Compare(a.pfn(), b.pfn()) })
	wake := from != ahead
	if from == demand {
		if wake = !l.walking; wake {
			putFirst(todo, first)
		}
	}
	for calls := 0; len(todo) > 0; calls++ {
		if from != demand && calls%8 == 0 {
			runtime.Gosched() // demands first
		}
		n := runLength(todo)
		if err := p.installRun(l, todo[:n], pages, from, wake); err != nil {
			p.unclaim(todo)
			return err
		}
		todo = todo[n:]
	}
	return nil
}

// putFirst puts the run with a page before the others.
func putFirst(pages []slotPage, first place) {
	for i := 0; i < len(pages); {
		end := i + runLength(pages[i:])
		if pages[i].r == first.r && first.i >= pages[i].i && first.i <= pages[end-1].i {
			// Three reversals exchange what is before the run with the run.
			slices.Reverse(pages[:i])
			slices.Reverse(pages[i:end])
			slices.Reverse(pages[:end])
			return
		}
		i = end
	}
}

// unclaim gives pages back that were not installed.
func (p *Pager) unclaim(pages []slotPage) {
	for _, at := range pages {
		at.r.change(at.i, loading, missing)
	}
}

// runLength is how many pages, in ascending order, are adjacent.
func runLength(pages []slotPage) int {
	n := 1
	for n < len(pages) && pages[n].r == pages[0].r && pages[n].i == pages[0].i+uint64(n) {
		n++
	}
	return n
}

// installRun installs adjacent pages with one copy.
func (p *Pager) installRun(l *loader, run []slotPage, block []byte, from origin, wake bool) error {
	n := len(run)
	inOrder := true
	for i := range run {
		inOrder = inOrder && run[i].slot == run[0].slot+i
	}
	src := block[run[0].slot*pageSize:]
	if inOrder {
		src = src[:n*pageSize]
	} else {
		for i := range run {
			copy(l.gather[i*pageSize:(i+1)*pageSize], block[run[i].slot*pageSize:])
		}
		src = l.gather[:n*pageSize]
	}
	return p.install(run[0].place, src, from, wake)
}

// install copies whole pages to where they belong and marks them as present. If
// it is not to wake who waits for them, release or the caller will.
func (p *Pager) install(at place, src []byte, from origin, wake bool) error {
	mode := uffd.CopyDontWake
	if wake {
		mode = 0
	}
	pages := uint64(len(src) / pageSize)
	for len(src) > 0 {
		done, err := p.u.Copy(at.r.addrOf(at.i), src, mode)
		p.counts.copies.Add(1)
		n := uint64(done / pageSize)
		if err == unix.EEXIST { // then whoever put it there, the page is there
			if wake {
				_ = p.u.Wake(at.r.addrOf(at.i+n), pageSize)
			}
			n, err = n+1, nil
		}
		at.r.arrived(at.i, n)
		if from != background && from != sweeping {
			at.r.markFetched(at.i, n)
		}
		at.i += n
		src = src[n*pageSize:]
		if err == unix.EAGAIN {
			runtime.Gosched() // the address space is being changed
			continue
		}
		if err != nil {
			return p.installError(at, err)
		}
	}
	p.counts.installed[from].Add(pages)
	return nil
}

// installError explains why a page could not be put at a place.
func (p *Pager) installError(at place, err error) error {
	if err == unix.EBADF { // nothing but Close closes it
		err = ErrClosed
	}
	return fmt.Errorf("%w: install the page at GPA %#x: %w", ErrLoad, at.pfn()*pageSize, err)
}
