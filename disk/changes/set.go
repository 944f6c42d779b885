package changes

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"iter"

	"github.com/gnomon-vmm/gnomon/disk/bitmap"
	"github.com/gnomon-vmm/gnomon/disk/block"
)

// Set is what changed since an application's last backup up to an instant.
type Set struct {
	Application string
	// Changed has a bit for each block; nil: all of the disk counts as changed,
	// and Reason tells why.
	Changed *bitmap.Bitmap
	Reason  string
	Size    int64 // of the disk
	// From is where the application's last backup ended, of no meaning where all
	// of the disk counts as changed, and To is where this set ends.
	From, To Point

	recorder *Recorder
}

// Point is an instant of a recording.
type Point struct {
	Recording string `json:"recording"` // its id; another recording has another
	Epoch     uint32 `json:"epoch"`     // the last that lies before the instant
}

// point is the end of an epoch of the present recording.
func (h *header) point(epoch uint32) Point { return Point{hex.EncodeToString(h.id[:]), epoch} }

// Extents yields the runs of bytes that changed, ascending.
func (s *Set) Extents() iter.Seq2[int64, int64] {
	return func(yield func(off, n int64) bool) {
		if s.Changed == nil {
			if s.Size > 0 {
				yield(0, s.Size)
			}
			return
		}
		for off := int64(0); ; {
			start, n := s.Changed.Next(off)
			if n == 0 || !yield(start, n) {
				return
			}
			off = start + n
		}
	}
}

// Bytes is how many bytes changed, in whole blocks.
func (s *Set) Bytes() int64 {
	total := int64(0)
	for _, n := range s.Extents() {
		total += n
	}
	return total
}

// Pending is a set about to be made.
type Pending struct {
	r      *Recorder
	disk   block.Node
	set    *Set
	reason string // why the recording begins anew
}

// Prepare does what takes long about the set of changes since an application's last
// backup, which may be its first: then the set is all of the disk. disk is the node
// now in use. It is followed by Raise or Cancel; whatever else uses the recorder
// waits meanwhile, but for Record.
func (r *Recorder) Prepare(disk block.Node, application string) (*Pending, error) {
	if err := checkName(application); err != nil {
		return nil, err
	}
	r.op.Lock()
	p, err := r.prepare(disk, application)
	if err != nil {
		r.op.Unlock()
		return nil, err
	}
	return p, nil
}

func (r *Recorder) prepare(disk block.Node, application string) (*Pending, error) {
	if r.closed {
		return nil, ErrClosed
	}
	p := &Pending{r: r, disk: disk, set: &Set{Application: application, recorder: r}}
	r.meta.Lock()
	app := Application{}
	if a := r.head.app(application); a != nil {
		app = *a
	} else if len(r.head.apps) >= maxApps {
		r.meta.Unlock()
		return nil, fmt.Errorf("%w: %q: a disk has at most %d: forget some", ErrApplication, application, maxApps)
	}
	failed := r.err
	r.meta.Unlock()
	switch is := r.identify(disk); {
	case failed != nil:
		p.reason = fmt.Sprintf("changes could not be recorded: %v", failed)
	case disk.Size() != r.size:
		p.reason = fmt.Sprintf("the disk had %d bytes, and has %d now", r.size, disk.Size())
	case is.identity != r.identity:
		p.reason = "the machine goes on in another image"
	case !r.head.epochsLeft():
		p.reason = "there is no higher epoch"
	default:
		if err := r.collect(p, app.Epoch); err != nil {
			p.reason = fmt.Sprintf("changes could not be read: %v", err)
		}
	}
	return p, nil
}

// collect puts into the set what is known so far.
func (r *Recorder) collect(p *Pending, since uint32) error {
	if err := r.flushAll(nil); err != nil {
		return err
	}
	if since == 0 {
		p.set.Reason = fmt.Sprintf("application %q has no earlier backup; %s", p.set.Application, r.head.reason)
		return nil
	}
	changed, err := bitmap.New(p.set.Application, r.size, 1<<r.shift)
	if err != nil {
		return err
	}
	if err := r.readChanged(since, changed); err != nil {
		return err
	}
	p.set.Changed, p.set.From = changed, r.head.point(since)
	return nil
}

// recordsAtOnce are read with one request.
const recordsAtOnce = 64

// readChanged sets the bits of blocks whose counters are above an epoch. op is held,
// and the records hold all but what came since.
func (r *Recorder) readChanged(since uint32, changed *bitmap.Bitmap) error {
	buf := make([]byte, recordsAtOnce*recordSize)
	for first := 0; first < len(r.regions); first += recordsAtOnce {
		n := min(recordsAtOnce, len(r.regions)-first)
		read := false
		for i := first; i < first+n; i++ {
			if r.regions[i].Load()&recorded == 0 {
				continue
			}
			if !read {
				clear(buf)
				if _, err := readAll(r.store, buf[:n*recordSize], recordAt(first)); err != nil {
					return fmt.Errorf("%w: read counters: %w", ErrSidecar, err)
				}
				read = true
			}
			rec := buf[(i-first)*recordSize:][:recordSize]
			if sealed(rec, r.head.id, i) {
				addRegion(rec, int64(i)*regionBlocks<<r.shift, 1<<r.shift, since, changed)
				continue
			}
			// It may have said anything: all of it changes now.
			r.mark(i, i)
			r.setAll(i)
		}
	}
	return nil
}

// addRegion adds what a record says of the region at an offset.
func addRegion(rec []byte, at, blockSize int64, since uint32, changed *bitmap.Bitmap) {
	for i := range int64(regionBlocks) {
		if binary.LittleEndian.Uint32(rec[recordHeader+4*i:]) > since {
			changed.Set(at+i*blockSize, blockSize)
		}
	}
}

// Cancel gives the set up.
func (p *Pending) Cancel() { p.r.op.Unlock() }

// Raise ends the epoch, and the set is complete: it has every change that was
// recorded before. There are no writes to the disk meanwhile: see block.Root's
// Drained.
func (p *Pending) Raise() (*Set, error) {
	r := p.r
	defer r.op.Unlock()
	s := p.set
	if p.reason == "" {
		var add func(off, n int64)
		if s.Changed != nil {
			add = s.Changed.Set
		}
		if err := r.flushAll(add); err != nil {
			p.reason = fmt.Sprintf("changes could not be written: %v", err)
		}
	}
	if p.reason != "" {
		s.Changed, s.Reason = nil, p.reason
		if err := r.begin(p.disk, r.identify(p.disk), p.reason); err != nil {
			r.meta.Lock()
			defer r.meta.Unlock()
			err = fmt.Errorf("%w: begin anew: %w", ErrSidecar, err)
			r.failLocked(err)
			return nil, err
		}
		r.node = p.disk
	}
	r.meta.Lock()
	defer r.meta.Unlock()
	if r.err != nil {
		return nil, r.err
	}
	s.Size, s.To = r.size, r.head.point(r.head.epoch)
	r.head.epoch++
	if err := r.savedLocked(); err != nil {
		return nil, err
	}
	return s, nil
}

// Commit has the application's next set begin where this one ended: its backup is
// complete, and durable. Without it the next set has the changes of this one too.
func (s *Set) Commit() error {
	r := s.recorder
	r.op.Lock()
	defer r.op.Unlock()
	r.meta.Lock()
	defer r.meta.Unlock()
	if err := r.usableLocked(); err != nil {
		return err
	}
	if r.head.point(s.To.Epoch) != s.To {
		return fmt.Errorf("%w: %s", ErrStale, r.head.reason)
	}
	a := r.head.app(s.Application)
	if a == nil {
		if len(r.head.apps) >= maxApps {
			return fmt.Errorf("%w: %q: a disk has at most %d: forget some", ErrApplication, s.Application, maxApps)
		}
		r.head.apps = append(r.head.apps, Application{Name: s.Application})
		a = &r.head.apps[len(r.head.apps)-1]
	}
	if s.To.Epoch > a.Epoch {
		a.Epoch, a.Time = s.To.Epoch, r.now()
	}
	return r.savedLocked()
}

// Since is Prepare and Raise on a disk to which nobody writes.
func (r *Recorder) Since(disk block.Node, application string) (*Set, error) {
	p, err := r.Prepare(disk, application)
	if err != nil {
		return nil, err
	}
	return p.Raise()
}
