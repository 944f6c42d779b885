package checkpoint

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"hash/maphash"
	"sync"
	"sync/atomic"
)

// duplicates finds pages whose like is in the file already. Its memory is bounded: what
// falls out of it is written again.
//
// A page is known by a sum of 16 bytes, or else by a print: a hash of some words of it,
// at places that nobody knows, which costs a tenth. Pages with equal prints need not be
// equal, and are compared; those with equal sums are equal.
//
// The sum is GMAC with a key and nonce that nobody knows and that are never used
// again: a polynomial over GF(2^128), evaluated at a secret point. That two pages
// which differ have the same has a probability of at most 2^-119, whatever a
// guest puts in them, as long as it learns nothing of sums; and it cannot even
// learn that two were equal. So equal sums are equal pages, and need not be read
// back to be compared.
type duplicates struct {
	gmac   cipher.AEAD
	nonce  []byte
	seed   maphash.Seed
	places [printWords]int // of the words of a print

	// By the low bits of the sum, and of the print, some behind each other in the order in
	// which they came, the newest first.
	mu      sync.Mutex
	summed  [][ways]summedPage // guarded by mu
	printed [][ways]atomic.Uint64
}

type (
	pageSum   [16]byte
	pagePrint uint64

	// summedPage is a page that was added, by its sum.
	summedPage struct {
		sum  pageSum
		slot uint32 // 0: none
	}
)

// A page in printed is the upper 31 bits of its print, then a bit if its sum is not known,
// then 32 for the slot. 0: none.
const (
	printMask = (1<<31 - 1) << 33
	aloneBit  = 1 << 32
)

const (
	minDuplicates = 1 << 10
	maxDuplicates = 1 << 20 // 32 MiB
	ways          = 4

	printWords = 8
)

// newDuplicates is for a memory of so many pages.
func newDuplicates(pages uint64) (*duplicates, error) {
	n := uint64(minDuplicates)
	for n < pages && n < maxDuplicates {
		n *= 2
	}
	d := &duplicates{summed: make([][ways]summedPage, n/ways), printed: make([][ways]atomic.Uint64, n/ways), seed: maphash.MakeSeed()}
	secret := make([]byte, 32+printWords)
	rand.Read(secret) // never fails
	block, err := aes.NewCipher(secret[:32])
	if err != nil {
		return nil, err
	}
	if d.gmac, err = cipher.NewGCM(block); err != nil {
		return nil, err
	}
	d.nonce = make([]byte, d.gmac.NonceSize())
	rand.Read(d.nonce)
	const stretch = PageSize / printWords
	for i := range d.places {
		d.places[i] = i*stretch + int(secret[32+i])%(stretch/8)*8
	}
	return d, nil
}

// sum computes the sum of a page. It may be called from several goroutines.
func (d *duplicates) sum(into *pageSum, page []byte) { d.gmac.Seal(into[:0], d.nonce, nil, page) }

// print computes the print of a page. It may be called from several goroutines.
func (d *duplicates) print(page []byte) pagePrint {
	var words [printWords * 8]byte
	for i, at := range d.places {
		copy(words[i*8:], page[at:at+8])
	}
	return pagePrint(maphash.Bytes(d.seed, words[:]))
}

// find returns the slot that holds a page of that sum, or 0.
func (d *duplicates) find(sum *pageSum) uint32 {
	d.mu.Lock()
	defer d.mu.Unlock()
	like := d.like(sum)
	for i := range like {
		if p := &like[i]; p.slot != 0 && p.sum == *sum {
			return p.slot
		}
	}
	return 0
}

// findPrint returns the slot that holds a page of that print, or 0, and whether it is known
// by the print alone.
func (d *duplicates) findPrint(print pagePrint) (slot uint32, alone bool) {
	like := d.likePrint(print)
	for i := range like {
		if p := like[i].Load(); p != 0 && (p^uint64(print))&printMask == 0 {
			return uint32(p), p&aloneBit != 0
		}
	}
	return 0, false
}

// add adds a page. sum is nil if it is to be known by its print alone.
func (d *duplicates) add(sum *pageSum, print pagePrint, slot uint32) {
	p := uint64(print)&printMask | uint64(slot)
	if sum == nil {
		p |= aloneBit
	}
	// Whoever adds another at the same time may make one of them be forgotten.
	for like, i := d.likePrint(print), 0; i < ways && p != 0; i++ {
		p = like[i].Swap(p)
	}
	if sum != nil {
		d.mu.Lock()
		defer d.mu.Unlock()
		like := d.like(sum)
		copy(like[1:], like[:])
		like[0] = summedPage{sum: *sum, slot: slot}
	}
}

func (d *duplicates) like(sum *pageSum) *[ways]summedPage {
	return &d.summed[le.Uint64(sum[:])%uint64(len(d.summed))]
}

func (d *duplicates) likePrint(print pagePrint) *[ways]atomic.Uint64 {
	return &d.printed[uint64(print)%uint64(len(d.printed))]
}
