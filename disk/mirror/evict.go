package mirror

import "github.com/gnomon-vmm/gnomon/disk/block"

// The host's page cache holds a file in pieces as large as it was written or read in, up
// to largestPiece, and the larger the piece the longer a small write to it takes: with ext4
// on Linux 6.18, 4 KiB take 3 us in 64 KiB and 15 us in 2 MiB. So the target is written in
// small pieces, after the page cache has given up what it held of it.
const (
	writeSize    = clusterSize
	largestPiece = 2 << 20
	evictAhead   = 16 << 20
)

// evictor has the host's page cache give up the target in front of the pass, where all
// will be written anew. Nobody reads it meanwhile: the source's images cover it.
type evictor struct {
	covered int64 // from here on up to at all is covered
	evicted int64 // up to here
	at      int64
}

// evict goes on to a distance in front of the pass, which calls it at a place of the disk.
func (f *Filter) evict(place int64) {
	if f.o.Depth == 0 {
		return
	}
	v := &f.evictor
	for v.at = max(v.at, place); v.at < min(place+evictAhead, f.Size()); {
		e, err := f.extent(v.at, min(evictAhead, f.Size()-v.at))
		if err != nil {
			return // the pass finds it
		}
		covered := e.take && !e.zero
		if !covered {
			v.evict(f.target)
		}
		v.at += e.length
		if !covered {
			v.covered, v.evicted = v.at, v.at
		} else if v.at-v.evicted >= largestPiece {
			v.evict(f.target)
		}
	}
	if v.at == f.Size() {
		v.evict(f.target)
	}
}

func (v *evictor) evict(target block.Node) {
	if v.at > v.evicted {
		from := max(v.evicted-largestPiece, v.covered) // where a piece may begin that ends behind
		block.Evict(target, from, v.at-from)
		v.evicted = v.at
	}
}
