package pager

import "github.com/gnomon-vmm/gnomon/mm/guestmem"

// BlockPages is the most pages a block holds.
const BlockPages = 64

// Block names a storage block of a Source. Blocks count from 0 in the order of
// the file, which is that of the guest's virtual addresses.
type Block uint32

// Location is where a page's bytes are.
type Location struct {
	Zero  bool  // nowhere: it is all zeros
	Block Block // and otherwise in this block
	Slot  int   // as its page of this index
}

// Source is what a Pager loads pages from. Its methods may be called from
// several goroutines at once.
type Source interface {
	// Memory is the RAM that it has the pages of.
	Memory() []guestmem.Range
	// Blocks is how many blocks there are.
	Blocks() int
	// Pages has the page number (GPA / 4096) that each slot of a block was made
	// for. Whether the slot still is that page's is for Find to say. The result
	// is not changed, by either side.
	Pages(Block) []uint64
	// Find tells where a page of Memory is. It must be quick.
	Find(pfn uint64) Location
	// Read returns a block's pages, in buf if they fit. What it returns is good
	// as long as buf is. stored is how many bytes of the file that took.
	Read(b Block, buf []byte) (pages []byte, stored int, err error)
}
