// Package owner gives each disk at most one writer, who lets go of it when he is
// asked to. The owner files beside a disk say who has it and where to ask;
// docs/owner-format.md has their format and what is guaranteed.
package owner

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// Errors of owning a disk.
var (
	// ErrRefused is an owner that keeps its disk.
	ErrRefused = errors.New("the disk's owner keeps it")
	// ErrSilent is an owner that does not answer, or nothing that makes sense.
	ErrSilent = errors.New("the owner does not answer")
	// ErrNotOwned is a disk that nobody has.
	ErrNotOwned = errors.New("nobody owns the disk")
	// ErrLost is a request to a disk that somebody else has taken.
	ErrLost = errors.New("the disk has been taken by another owner")
	// ErrReleased is a request to a disk that was released on demand.
	ErrReleased = errors.New("the disk has been released to another owner")
	// ErrClosed is a request to a disk that was closed.
	ErrClosed = errors.New("the disk is closed")
	// ErrOptions are Options that make no sense.
	ErrOptions = errors.New("owner options")
)

// Defaults of Options.
const (
	DefaultLease    = 5 * time.Second
	DefaultPatience = 30 * time.Second
	leastLease      = 10 * time.Millisecond
)

// poll is how often is looked whether a lock has become free.
const poll = 2 * time.Millisecond

// Options of Open.
type Options struct {
	// Lease is how long others wait before they take the disk when this owner does
	// not answer: 10 ms to LeaseLimit; 0: DefaultLease. The owner looks at its file
	// four times in a lease.
	Lease time.Duration
	// Address is where others ask for the disk: unix:/PATH, unix:@NAME or
	// tcp:IP:PORT (port 0: any). "": a Unix socket of a random abstract name, which
	// leads here from this host only.
	Address string
	// Patience is how long an owner that answers may take to let go; 0: DefaultPatience.
	Patience time.Duration
	// Name tells people who the owner is; "": process and host. At most 63
	// printable ASCII characters count.
	Name string
	// OnRelease is called before the disk is released because another asks for
	// it, or takes it: the device is paused, no requests are to come any more, and
	// what belongs to the disk (bitmaps) is stored. It may use the Disk, but
	// not Close it. With an error the disk is kept, unless it is being taken:
	// then ctx ends when writes begin to fail.
	OnRelease func(ctx context.Context) error
	// KeepFile forbids to replace the disk's file by a copy in order to shut out an
	// owner that does not answer and may still write: Open then fails with ErrFence.
	KeepFile bool

	host *host // in tests: another one than this
}

func (o Options) complete() (Options, error) {
	if o.Lease == 0 {
		o.Lease = DefaultLease
	}
	if o.Lease < leastLease || o.Lease > LeaseLimit {
		return o, fmt.Errorf("%w: lease of %v: %v to %v are possible", ErrOptions, o.Lease, leastLease, LeaseLimit)
	}
	if o.Patience <= 0 {
		o.Patience = DefaultPatience
	}
	if o.Name == "" {
		o.Name = describeHost()
	}
	name := make([]byte, 0, nameLimit)
	for _, c := range []byte(o.Name)[:min(len(o.Name), nameLimit)] {
		if c < ' ' || c > '~' {
			c = '?'
		}
		name = append(name, c)
	}
	o.Name = string(name)
	if o.host == nil {
		o.host = &thisHost
	}
	return o, nil
}

// Open becomes the owner of the disk at path and opens it with opener. An owner that
// answers is asked to release it; one that does not is waited for as long as its
// lease says and then shut out. Opener opens the file at path for writing, with
// the locks of packages raw and qcow2.
//
// Errors wrap ErrRefused (the owner will not, or not within o.Patience), ErrFence (an
// owner that does not answer may still write), block.ErrInUse (a program that
// knows nothing of owner files has the disk), ErrRecord, ErrDirectory,
// opener's and ctx's.
func Open(ctx context.Context, path string, opener func() (block.Node, error), o Options) (*Disk, error) {
	o, err := o.complete()
	if err != nil {
		return nil, err
	}
	dir, err := directoryOf(path)
	if err == nil {
		err = dir.create()
	}
	if err != nil {
		return nil, fmt.Errorf("disk %s: %w", path, err)
	}
	for {
		d, err := tryOpen(ctx, dir, opener, o)
		if err == nil {
			return d, nil
		}
		if !errors.Is(err, errRaced) {
			return nil, fmt.Errorf("disk %s: %w", path, err)
		}
		if err := pause(ctx, poll); err != nil {
			return nil, fmt.Errorf("disk %s: %w", path, err)
		}
	}
}

// tryOpen makes one attempt. errRaced: the owner file has changed, look again.
func tryOpen(ctx context.Context, dir directory, opener func() (block.Node, error), o Options) (*Disk, error) {
	cur, err := dir.current()
	if err != nil {
		return nil, err
	}
	anchor, err := takeAnchor(dir.image)
	switch {
	case err == nil && (cur.State <= Released || o.host.reaches(&cur, dir.image)):
		// Who could write has closed the disk or is dead.
		return seize(dir, &cur, anchor, opener, o)
	case err == nil:
		anchor.Close() // an owner on another host may have one that cannot be seen here
	case !errors.Is(err, errAnchorHeld):
		return nil, err
	}
	if cur.State <= Released {
		// Somebody is about to become the owner.
		wait := max(silenceFloor, o.Lease)
		if cur.State == Unowned {
			wait = o.Patience // it may be one whose owner file was removed
		}
		if err := dir.watch(ctx, &cur, wait); err != nil {
			return nil, err
		}
		if cur.State == Unowned {
			return nil, fmt.Errorf("%w, whose owner file is missing", block.ErrInUse)
		}
		return claim(ctx, dir, &cur, opener, o)
	}
	patient, cancel := context.WithTimeout(ctx, o.Patience)
	err = ask(patient, &cur)
	cancel()
	if err == nil {
		return nil, errRaced // for the file to tell
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if changed := dir.watch(ctx, &cur, 0); changed != nil {
		return nil, changed
	}
	if errors.Is(err, ErrSilent) {
		return claim(ctx, dir, &cur, opener, o)
	}
	if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("%w: has not let go within %v", ErrRefused, o.Patience)
	}
	return nil, fmt.Errorf("owner %s: %w", cur.Name, err)
}

// watch waits for d and returns errRaced as soon as cur does not count any more
// or nobody has the lock on the disk.
func (d directory) watch(ctx context.Context, cur *Record, wait time.Duration) error {
	for end := now() + int64(wait); ; {
		r, err := d.current()
		if err != nil {
			return err
		}
		if r.Generation != cur.Generation {
			return errRaced
		}
		if now() >= end {
			return nil
		}
		if f, err := takeAnchor(d.image); err == nil {
			f.Close()
			return errRaced
		}
		if err := pause(ctx, poll); err != nil {
			return err
		}
	}
}

// seize makes an owner of who has the anchor, where nobody can write to the disk.
func seize(dir directory, cur *Record, anchor *os.File, opener func() (block.Node, error), o Options) (*Disk, error) {
	d, err := newDisk(dir, cur, o)
	if err != nil {
		anchor.Close()
		return nil, err
	}
	d.anchor = anchor
	return d.become(opener)
}

// claim makes an owner of who gets no answer: it announces itself, so that the owner's
// lease is not renewed any more, waits for the end of the lease, and shuts the owner
// out if it may still write.
func claim(ctx context.Context, dir directory, cur *Record, opener func() (block.Node, error), o Options) (*Disk, error) {
	d, err := newDisk(dir, cur, o)
	if err != nil {
		return nil, err
	}
	if err := d.shutOut(ctx, cur); err != nil {
		d.abandon(err)
		return nil, err
	}
	return d.become(opener)
}

// Status returns what the owner file of the disk at path says. That its State is
// Owned does not tell that the owner lives.
func Status(path string) (Record, error) {
	dir, err := directoryOf(path)
	if err != nil {
		return Record{}, err
	}
	return dir.current()
}

// Release asks the owner of the disk at path to release it and waits until it has. Errors
// wrap ErrNotOwned, ErrRefused, ErrSilent (the owner does not answer; an Open
// can take the disk) or ctx's.
func Release(ctx context.Context, path string) error {
	dir, err := directoryOf(path)
	if err != nil {
		return err
	}
	r, err := dir.current()
	if err != nil {
		return err
	}
	if r.State <= Released {
		return fmt.Errorf("%w: %s", ErrNotOwned, path)
	}
	if err := ask(ctx, &r); err != nil {
		return fmt.Errorf("disk %s: owner %s: %w", path, r.Name, err)
	}
	return nil
}
