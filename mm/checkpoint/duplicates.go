package checkpoint

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
)

// duplicates finds pages whose like is in the file already, by a sum of 16
// bytes. Its memory is bounded: what falls out of it is written again.
//
// The sum is GMAC with a key and nonce that nobody knows and that are never used
// again: a polynomial over GF(2^128), evaluated at a secret point. That two pages
// which differ have the same has a probability of at most 2^-119, whatever a
// guest puts in them, as long as it learns nothing of sums; and it cannot even
// learn that two were equal. So equal sums are equal pages, and need not be read
// back to be compared.
type duplicates struct {
	gmac  cipher.AEAD
	nonce []byte

	// By the low bits of the sum; both guarded by the Writer's mu.
	sums  []pageSum
	slots []uint32 // 0: none
}

type pageSum [16]byte

const (
	minDuplicates = 1 << 10
	maxDuplicates = 1 << 20 // 20 MiB
)

// newDuplicates is for a memory of so many pages.
func newDuplicates(pages uint64) (*duplicates, error) {
	n := uint64(minDuplicates)
	for n < pages && n < maxDuplicates {
		n *= 2
	}
	d := &duplicates{sums: make([]pageSum, n), slots: make([]uint32, n)}
	secret := make([]byte, 32)
	rand.Read(secret) // never fails
	block, err := aes.NewCipher(secret)
	if err != nil {
		return nil, err
	}
	if d.gmac, err = cipher.NewGCM(block); err != nil {
		return nil, err
	}
	d.nonce = make([]byte, d.gmac.NonceSize())
	rand.Read(d.nonce)
	return d, nil
}

// sum computes the sum of a page. It may be called from several goroutines.
func (d *duplicates) sum(into *pageSum, page []byte) { d.gmac.Seal(into[:0], d.nonce, nil, page) }

// find returns the slot that holds a page of that sum, or 0.
func (d *duplicates) find(sum *pageSum) uint32 {
	if i := d.place(sum); d.sums[i] == *sum {
		return d.slots[i]
	}
	return 0
}

func (d *duplicates) add(sum *pageSum, slot uint32) {
	i := d.place(sum)
	d.sums[i], d.slots[i] = *sum, slot
}

func (d *duplicates) place(sum *pageSum) uint64 { return le.Uint64(sum[:]) % uint64(len(d.sums)) }
