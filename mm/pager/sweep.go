package pager

import (
	"cmp"
	"slices"
)

// sweepPages bounds how many pages one step of the sweep looks at, and how many
// it remembers.
const sweepPages = 1 << 14

// sweep is the background's last pass, when all blocks are installed: it finds
// the pages that equal one of another block, and those alone are still missing.
// Only the worker that is sweeping uses it.
type sweep struct {
	region int
	page   uint64
	found  []equalPage // still to be installed, ordered by where they are
	missed bool        // something was missing in this pass
}

type equalPage struct {
	place
	loc Location
}

// sweepStep does a part of the sweep: it looks for some pages, or installs those
// of one block. When there was nothing to do in a whole pass, all is loaded.
func (p *Pager) sweepStep(l *loader) {
	s := &p.sweep
	switch {
	case len(s.found) > 0:
		b := s.found[0].loc.Block
		for len(s.found) > 0 && s.found[0].loc.Block == b {
			at := s.found[0]
			s.found = s.found[1:]
			if !at.r.change(at.i, missing, loading) {
				continue
			}
			if p.loadPage(l.gather[:], at.place, at.loc) != nil {
				break
			}
			if err := p.install(at.place, l.gather[:pageSize], sweeping, true); err != nil {
				_ = p.failPage(at.place, b, err) // which reports it
				break
			}
		}
	case s.region < len(p.regions):
		p.look(s)
	case s.missed:
		*s = sweep{}
	default:
		p.letGo()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stepping--
	p.release(noBatch)
}

// look remembers which of the next pages are missing.
func (p *Pager) look(s *sweep) {
	r := p.regions[s.region]
	end := min(s.page+sweepPages, r.pages)
	for ; s.page < end; s.page++ {
		if s.page%statesPerWord == 0 && r.states[s.page/statesPerWord].Load() == 1<<32-1 {
			s.page += statesPerWord - 1 // all present
			continue
		}
		at := place{r, s.page}
		switch st := r.get(s.page); {
		case st >= hole:
		case st == loading:
			s.missed = true
		default:
			if loc := p.src.Find(at.pfn()); !isZero(loc) {
				s.missed = true
				s.found = append(s.found, equalPage{at, loc})
			}
		}
	}
	if s.page >= r.pages {
		s.region, s.page = s.region+1, 0
	}
	slices.SortFunc(s.found, func(a, b equalPage) int {
		return cmp.Or(cmp.Compare(a.loc.Block, b.loc.Block), cmp.Compare(a.loc.Slot, b.loc.Slot))
	})
}
