package pager

import "golang.org/x/sys/unix"

// How many pages are installed around one that is demanded and whose
// neighbourhood is not known: what a guest allocates or fills, it does in
// stretches. That costs memory, so a stretch must be used up before the next is
// longer.
const (
	minStretch = 64
	maxStretch = 512
)

// stretch is the last one that was wanted.
type stretch struct {
	first, end uint64 // page numbers
	pages      uint64
}

// next returns how many pages, aligned, to look at around a page.
func (s *stretch) next(pfn uint64) uint64 {
	if s.pages != 0 && pfn+s.pages >= s.first && pfn < s.end+s.pages {
		s.pages = min(2*s.pages, maxStretch)
	} else {
		s.pages = minStretch
	}
	s.first = pfn / s.pages * s.pages
	s.end = s.first + s.pages
	return s.pages
}

// zeroAround answers a fault on a page of zeros, and on pages of zeros around it
// as the policy says.
func (p *Pager) zeroAround(l *loader, at place) error {
	pages := uint64(1)
	switch {
	case p.o.Policy&Locality != 0:
		pages = l.zeros.next(at.pfn())
	case p.o.Policy&Physical != 0:
		pages = uint64(p.o.Pages)
	}
	lo, hi := around(at, pages)
	first, end := at.i, at.i+1
	for first > lo && p.isHole(place{at.r, first - 1}) {
		first--
	}
	for end < hi && p.isHole(place{at.r, end}) {
		end++
	}
	if err := p.zeroRun(place{at.r, first}, end-first); err != nil {
		return err
	}
	run := uint64(0)
	for i := lo; i <= hi; i++ {
		if i < hi && p.isHole(place{at.r, i}) {
			run++
			continue
		}
		if run > 0 {
			if err := p.zeroRun(place{at.r, i - run}, run); err != nil {
				return err
			}
			run = 0
		}
	}
	return nil
}

// isHole tells whether a page is zeros that are not installed.
func (p *Pager) isHole(at place) bool {
	switch at.r.get(at.i) {
	case hole:
		return true
	case missing:
		return isZero(p.src.Find(at.pfn()))
	default:
		return false
	}
}

// zeroRun installs zeros where nothing is, and wakes who waits there.
func (p *Pager) zeroRun(at place, pages uint64) error {
	for pages > 0 {
		done, err := p.u.ZeroPage(at.r.addrOf(at.i), uintptr(pages)*pageSize, false)
		p.counts.zeroCalls.Add(1)
		n := uint64(done) / pageSize
		p.counts.zeroPages.Add(n)
		if err == unix.EEXIST { // a device was faster, or the fault is late
			_ = p.u.Wake(at.r.addrOf(at.i+n), pageSize)
			n, err = n+1, nil
		}
		at.r.arrived(at.i, n)
		at.i, pages = at.i+n, pages-n
		if err != nil && err != unix.EAGAIN {
			if p.finished.Load() {
				return nil // the kernel answers by itself now
			}
			return p.installError(at, err)
		}
	}
	return nil
}
