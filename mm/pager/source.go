package pager

import (
	"fmt"

	"github.com/gnomon-vmm/gnomon/mm/checkpoint"
	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// BlockPages is the most pages that a block holds.
const BlockPages = checkpoint.BlockPages

// Block names a storage block. Blocks count from 0 in the order of the file,
// which is that of the guest's virtual addresses.
type Block = checkpoint.BlockID

// Location is where a page is.
type Location = checkpoint.Location

// Source is what a Pager loads pages from; checkpoint.Reader is one. Its methods
// may be called from several goroutines at once.
type Source interface {
	// Memory is the RAM that it has the pages of.
	Memory() []guestmem.Range
	// Blocks is how many blocks there are.
	Blocks() int
	// Pages has the number (GPA / 4096) of the page that each slot of a block was
	// made for. Whether the slot still is that page's is for Find to say. Nobody
	// changes the result.
	Pages(Block) ([]uint64, error)
	// Shared has a bit for each slot of a block that more pages than the one it was
	// made for may be equal to.
	Shared(Block) (uint64, error)
	// Find tells where a page is. It must be quick.
	Find(pfn uint64) Location
	// ReadBlock returns a block's pages, in buf if they fit; they are good as long
	// as buf is. stored is how many bytes of the file that took.
	ReadBlock(b Block, buf []byte) (pages []byte, stored int, err error)
}

var _ Source = (*checkpoint.Reader)(nil)

// isZero tells whether a page is zeros and nowhere in the file.
func isZero(loc Location) bool { return loc.Kind == checkpoint.Zero }

// owns tells whether a page is the one that its slot was made for. If not it
// equals that one, and who loads the block does not bring it along.
func (p *Pager) owns(at place, loc Location) (bool, error) {
	pages, err := p.src.Pages(loc.Block)
	if err != nil {
		return false, fmt.Errorf("%w: block %d: %w", ErrLoad, loc.Block, err)
	}
	return loc.Slot < len(pages) && pages[loc.Slot] == at.pfn(), nil
}
