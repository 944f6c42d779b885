package capture

import (
	"errors"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/mm/uffd"
)

// readFaults answers the guest's write faults until the descriptor is closed.
// It never waits for anything but faults.
func (c *Capture) readFaults() {
	var faults [16]uffd.Fault
	for {
		n, err := c.fd.ReadFaults(faults[:])
		if err != nil {
			if !errors.Is(err, uffd.ErrClosed) {
				c.fail(err)
			}
			return
		}
		for _, f := range faults[:n] {
			if err := c.answer(f.Addr); err != nil {
				c.fail(err)
				return
			}
		}
	}
}

// fail gives the capture up: with nobody to answer faults, no page may stay
// protected.
func (c *Capture) fail(err error) {
	c.mu.Lock()
	c.failed = err
	c.mu.Unlock()
	c.end()
	go c.letGo() // which waits for readFaults
}

// answer serves a write fault at an address in the guest's mapping.
func (c *Capture) answer(addr uintptr) error {
	i, ok := c.indexAt(addr)
	if !ok {
		return fmt.Errorf("a fault at %#x, outside of the guest's memory", addr)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch c.phase {
	case frozen:
		c.count.faultsSaving.Add(1)
		if !c.keep(i, &c.count.copiedByFault) {
			return nil // who copies the page lets the writer go
		}
		return c.liftAround(i)
	case armed:
		c.count.faultsArming.Add(1)
		r := c.regionAt(i)
		c.written.Set(r.firstPFN + uint64(i) - r.firstIndex)
	}
	return c.lift(i, 1)
}

// indexAt returns the index of the page at an address in the guest's mapping.
func (c *Capture) indexAt(addr uintptr) (uint32, bool) {
	for i := range c.regions {
		r := &c.regions[i]
		if page := uint64(addr-r.guest) / pageSize; addr >= r.guest && page < r.pages {
			return uint32(r.firstIndex + page), true
		}
	}
	return 0, false
}

// lift lets the guest write n pages of one region, and wakes it.
func (c *Capture) lift(i uint32, n uint64) error {
	r := c.regionAt(i)
	addr := r.guest + uintptr((uint64(i)-r.firstIndex)*pageSize)
	err := retry(func() error { return c.fd.WriteProtect(addr, uintptr(n*pageSize), false, false) })
	if err != nil && c.isOver.Load() {
		return nil // it is let go by other means
	}
	if err != nil {
		return fmt.Errorf("%w: let page %#x go: %w", ErrArm, uint64(i)-r.firstIndex+r.firstPFN, err)
	}
	return nil
}

// liftPages is how many pages, aligned, one fault lets go at most.
const liftPages = 64

// liftAround lets a page go that may be written, and its neighbours that are
// saved already: they need no faults of their own.
func (c *Capture) liftAround(i uint32) error {
	r := c.regionAt(i)
	low := max(i&^(liftPages-1), uint32(r.firstIndex))
	high := uint32(min(uint64(i|(liftPages-1))+1, r.firstIndex+r.pages))
	from, to := i, i+1
	for from > low && c.pages.state[from-1].Load() == free {
		from--
	}
	for to < high && c.pages.state[to].Load() == free {
		to++
	}
	return c.lift(from, uint64(to-from))
}

// Touch implements guestmem.Pager: it returns when the pages are kept. It does
// not wait unless there is no room to keep them.
func (c *Capture) Touch(gpa, n uint64) error {
	if n == 0 {
		return nil
	}
	last := (gpa + n - 1) / pageSize
	for pfn := gpa / pageSize; pfn <= last; pfn++ {
		i, ok := c.indexOf(pfn)
		if !ok {
			return nil // the caller's bounds are not ours to check
		}
		if !writable(c.pages.state[i].Load()) {
			c.touch(i)
		}
	}
	return nil
}

// touch returns when a page is kept, or needs not be any more.
func (c *Capture) touch(i uint32) {
	for !c.keepTouched(i) {
		c.waiting.Lock()
		for !c.isOver.Load() && !writable(c.pages.state[i].Load()) {
			c.waiting.Wait()
		}
		c.waiting.Unlock()
	}
}

// keepTouched keeps a page, unless the capture is over, and returns whether it may be
// written now.
func (c *Capture) keepTouched(i uint32) bool {
	c.touching.Add(1) // before it looks, so that Close waits for it
	defer c.touching.Add(-1)
	return c.isOver.Load() || c.keep(i, &c.count.copiedByTouch)
}

func (c *Capture) wakeTouching() {
	c.waiting.Lock()
	defer c.waiting.Unlock()
	c.waiting.Broadcast()
}

// keep copies a page aside, if it is not saved, and returns whether it may be
// written now. If not, whoever has it will lift its protection.
func (c *Capture) keep(i uint32, count *counter) bool {
	state := &c.pages.state[i]
	for {
		switch s := state.Load(); s & stateMask {
		case free, zero, copied:
			return true
		case wanted, busyWanted:
			return false
		case busy:
			if state.CompareAndSwap(busy, busyWanted) {
				return false
			}
		case pending:
			slot, ok := c.pages.get()
			if !ok {
				if state.CompareAndSwap(pending, wanted) {
					c.count.waited.Add(1)
					select {
					case c.urgent <- i:
					default:
					}
					return false
				}
				continue
			}
			if !state.CompareAndSwap(pending, busy) {
				c.pages.put(slot)
				continue
			}
			page := c.hostPage(i)
			count.Add(1)
			if isZero(page) {
				c.pages.put(slot)
				c.settle(i, zero)
			} else {
				copy(c.pages.slot(slot), page)
				c.settle(i, slot<<stateBits|copied)
			}
			return true
		}
	}
}

// take makes a page that is not saved busy, and waits while another does so.
// It returns false when the page is not pending.
func (c *Capture) take(i uint32) bool {
	state := &c.pages.state[i]
	for {
		switch s := state.Load(); s & stateMask {
		case pending:
			if state.CompareAndSwap(pending, busy) {
				return true
			}
		case wanted:
			if state.CompareAndSwap(wanted, busyWanted) {
				return true
			}
		case busy, busyWanted:
			runtime.Gosched() // for as long as it takes to copy a page
		default:
			return false
		}
	}
}

// settle ends the business with a page, and lets go who waited for it.
func (c *Capture) settle(i, to uint32) {
	if c.pages.state[i].Swap(to) != busyWanted {
		return
	}
	c.wakeTouching()
	if c.still {
		return // it is not protected
	}
	if err := c.lift(i, 1); err != nil {
		// Nobody else would wake the writer.
		go c.fail(err)
	}
}

// temporary tells whether the kernel asks to try again.
func temporary(err error) bool { return errors.Is(err, unix.EAGAIN) }
