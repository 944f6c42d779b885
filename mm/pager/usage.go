package pager

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"os"

	"golang.org/x/sys/unix"
)

// ErrUsage says that the kernel does not tell which pages were used.
var ErrUsage = errors.New("it cannot be found out which pages were used")

// Usage tells, of the pages that were installed because they, or pages near
// them, were demanded (those that the background brought do not count, nor
// zeros), how many the guest has used since and how many not.
//
// It goes by /proc/kpageflags, so it needs root: a page is clean and not
// referenced when UFFDIO_COPY has installed it, and KVM marks it as dirty or
// accessed when it maps it for the guest. Where KVM shadows the guest's page
// tables it maps up to seven neighbours along with a page, if they are there;
// these count as used. What only devices used, or KVM's instruction emulator,
// counts as unused.
func (p *Pager) Usage() (used, unused int, err error) {
	f, err := openPageFlags()
	if err != nil {
		return 0, 0, err
	}
	defer f.close()
	for _, r := range p.regions {
		err := r.eachFetched(func(i uint64) error {
			is, err := f.used(r.addrOf(i))
			if is {
				used++
			} else {
				unused++
			}
			return err
		})
		if err != nil {
			return 0, 0, err
		}
	}
	return used, unused, nil
}

// UsageOf is Usage for those who know which pages were used.
func (p *Pager) UsageOf(touched func(pfn uint64) bool) (used, unused int) {
	for _, r := range p.regions {
		_ = r.eachFetched(func(i uint64) error {
			if touched(r.first + i) {
				used++
			} else {
				unused++
			}
			return nil
		})
	}
	return used, unused
}

// eachFetched calls f for the pages that markFetched has marked.
func (r *region) eachFetched(f func(i uint64) error) error {
	for at := range r.fetched {
		for word := r.fetched[at].Load(); word != 0; word &= word - 1 {
			if err := f(uint64(at*64 + bits.TrailingZeros64(word))); err != nil {
				return err
			}
		}
	}
	return nil
}

// pageFlags reads what the kernel knows of the pages of our own memory.
type pageFlags struct {
	pagemap, flags *os.File
	// entries of pagemap from page first on
	first   uintptr
	entries [512]uint64
	have    int
	buf     [8 * 512]byte
}

func openPageFlags() (*pageFlags, error) {
	pagemap, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUsage, err)
	}
	flags, err := os.Open("/proc/kpageflags")
	if err != nil {
		pagemap.Close()
		return nil, fmt.Errorf("%w: %w", ErrUsage, err)
	}
	return &pageFlags{pagemap: pagemap, flags: flags}, nil
}

func (f *pageFlags) close() {
	f.pagemap.Close()
	f.flags.Close()
}

// Bits of a pagemap entry and of kpageflags (admin-guide/mm/pagemap.rst).
const (
	pagemapPresent = 1 << 63
	pagemapPFN     = 1<<55 - 1
	flagReferenced = 1 << 2
	flagDirty      = 1 << 4
	flagActive     = 1 << 6
)

// used tells whether the page that is mapped at addr was used. One that is not
// mapped any more was: only writing to it or giving it back unmaps it.
func (f *pageFlags) used(addr uintptr) (bool, error) {
	page := addr / pageSize
	if page < f.first || page >= f.first+uintptr(f.have) {
		n, err := unix.Pread(int(f.pagemap.Fd()), f.buf[:], int64(page)*8)
		if err != nil || n < 8 {
			return false, fmt.Errorf("%w: pagemap: %d bytes, %w", ErrUsage, n, orShort(err))
		}
		f.first, f.have = page, n/8
		for i := range f.have {
			f.entries[i] = binary.LittleEndian.Uint64(f.buf[i*8:])
		}
	}
	entry := f.entries[page-f.first]
	if entry&pagemapPresent == 0 {
		return true, nil
	}
	pfn := entry & pagemapPFN
	if pfn == 0 {
		return false, fmt.Errorf("%w: page frames are hidden: %w", ErrUsage, unix.EPERM)
	}
	var word [8]byte
	if n, err := unix.Pread(int(f.flags.Fd()), word[:], int64(pfn)*8); err != nil || n != 8 {
		return false, fmt.Errorf("%w: kpageflags: %d bytes, %w", ErrUsage, n, orShort(err))
	}
	return binary.LittleEndian.Uint64(word[:])&(flagReferenced|flagDirty|flagActive) != 0, nil
}

func orShort(err error) error {
	if err == nil {
		return unix.ENODATA
	}
	return err
}
