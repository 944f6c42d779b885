package pager

import "golang.org/x/sys/unix"

// How many pages of zeros are installed around one that is demanded: what a
// guest allocates, it allocates in stretches. Zeros cost memory, so a stretch
// must be used up before the next is larger.
const (
	minZeroPages = 64
	maxZeroPages = 512
)

// zeroWindow is the last stretch of zeros that was wanted. The fault handler
// alone uses it.
type zeroWindow struct {
	first, end uint64 // page numbers
	pages      uint64
}

// next returns how many pages, aligned, to look at around a page.
func (z *zeroWindow) next(pfn uint64) uint64 {
	if z.pages != 0 && pfn+z.pages >= z.first && pfn < z.end+z.pages {
		z.pages = min(2*z.pages, maxZeroPages)
	} else {
		z.pages = minZeroPages
	}
	z.first = pfn / z.pages * z.pages
	z.end = z.first + z.pages
	return z.pages
}

// zeroAround answers a fault on a page of zeros, and on pages of zeros around it
// as the policy says.
func (p *Pager) zeroAround(at place) error {
	pages := uint64(1)
	switch {
	case p.o.Policy&Locality != 0:
		pages = p.zeros.next(at.pfn())
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
