package owner

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// Disk is an owned disk: a node that passes requests on as long as the lease is
// valid. A request is acknowledged only if the lease was valid when it had ended.
type Disk struct {
	dir     directory
	options Options
	record  Record // of this owner; constant once there are requests
	raw     []byte // its encoding
	anchor  *os.File
	server  *server
	cancel  context.CancelFunc // of the server and of renewals

	// deadline is when, by CLOCK_BOOTTIME in ns, the owner file has to have been
	// looked at again.
	deadline atomic.Int64

	renewing sync.Mutex
	taken    error // guarded by renewing: ErrLost, once the owner file is not this one's any more

	// mu is held for reading by each request under way.
	mu   sync.RWMutex
	node block.Node // guarded by mu; nil when the disk has been let go of
	err  error      // guarded by mu: why it is nil
	last struct {   // guarded by mu: what node said before it was closed
		size     int64
		info     block.Info
		readOnly bool
	}

	ending sync.Mutex // held while the disk is opened or let go of
	ended  bool       // guarded by ending
	done   chan struct{}
}

var _ block.Node = (*Disk)(nil)

// newDisk makes the disk of an owner that is to follow cur.
func newDisk(dir directory, cur *Record, o Options) (*Disk, error) {
	l, address, err := listen(o.Address)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	d := &Disk{dir: dir, options: o, cancel: cancel, done: make(chan struct{})}
	d.record = Record{
		Generation: cur.Generation, Epoch: cur.Epoch + 1, Owner: ID(random(16)), Address: address, Name: o.Name,
		PID: uint32(os.Getpid()), Lease: o.Lease, token: [32]byte(random(32)),
	}
	d.ending.Lock()
	d.server = &server{listener: l, record: d.record, release: d.release}
	d.server.wg.Go(func() { d.server.serve(ctx) })
	context.AfterFunc(ctx, func() { l.Close() })
	return d, nil
}

// publish writes the next owner file. keep is the claim directory that stays.
func (d *Disk) publish(s State, wait time.Duration, boot [16]byte, keep string) error {
	d.record.Generation++
	d.record.State, d.record.Wait, d.record.Boot = s, wait, boot
	return d.dir.publish(&d.record, keep)
}

// shutOut takes the disk from the owner of cur and returns with the anchor.
func (d *Disk) shutOut(ctx context.Context, cur *Record) error {
	h := d.options.host
	seen := h.reaches(cur, d.dir.image)
	boot := h.boot
	if !seen && cur.Boot != boot {
		boot = [16]byte{} // there are several who may write
	}
	name, err := d.dir.makeClaim(d.record.Generation + 1)
	if err != nil {
		return err
	}
	if err := d.publish(Claimed, cur.Wait, boot, name); err != nil {
		removeClaim(filepath.Join(d.dir.path, name))
		return err
	}
	// The owner file of cur is gone: the last look at it that found it was before,
	// and the lease goes on from that look.
	if err := pause(ctx, cur.Wait); err != nil {
		return err
	}
	if seen {
		// An owner that runs has noticed and lets go.
		for end := now() + int64(max(cur.Wait, silenceFloor)); ; {
			f, err := takeAnchor(d.dir.image)
			if err == nil {
				d.anchor = f
				return nil
			}
			if !errors.Is(err, errAnchorHeld) {
				return err
			}
			if now() >= end {
				break
			}
			if err := pause(ctx, poll); err != nil {
				return err
			}
		}
	}
	if d.options.KeepFile {
		return fmt.Errorf("%w: %s does not answer, and may still write: end it", ErrFence, cur.Name)
	}
	d.anchor, err = replaceDisk(ctx, d.dir, name)
	if err != nil && !errors.Is(err, errRaced) {
		err = fmt.Errorf("%s does not answer, and may still write: end it: %w", cur.Name, err)
	}
	return err
}

// become makes who holds the anchor the owner and opens the disk.
func (d *Disk) become(opener func() (block.Node, error)) (*Disk, error) {
	err := d.publish(Owned, d.options.Lease, d.options.host.boot, "")
	if err != nil {
		d.abandon(err)
		return nil, err
	}
	// A claimant whose directory has been removed only now may have replaced the
	// file before.
	same, err := anchors(d.anchor, d.dir.image)
	if err == nil && !same {
		err = errRaced
	}
	d.raw = d.record.encode()
	if err == nil {
		err = d.renew()
	}
	if err != nil {
		d.letGo(err)
		d.ending.Unlock()
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	stopServer := d.cancel
	d.cancel = func() { cancel(); stopServer() }
	d.server.wg.Go(func() { d.keep(ctx) })
	node, err := opener()
	if err == nil {
		d.mu.Lock()
		d.node = node
		d.mu.Unlock()
		err = d.check()
	}
	if err != nil {
		d.letGo(err)
	}
	d.ending.Unlock()
	if err != nil {
		return nil, err
	}
	return d, nil
}

// abandon ends what newDisk began, without having become an owner.
func (d *Disk) abandon(err error) {
	if d.anchor != nil {
		d.anchor.Close()
	}
	d.mu.Lock()
	d.err = err
	d.mu.Unlock()
	d.ended = true
	d.cancel()
	close(d.done)
	d.ending.Unlock()
}

// keep renews the lease until ctx ends.
func (d *Disk) keep(ctx context.Context) {
	t := time.NewTicker(d.options.Lease / 4)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			d.renew()
		}
	}
}

var errTaken = errors.New("there is another owner file")

// holds tells whether the owner file is still this owner's. Opening it by name asks
// the server of a network file system.
func (d *Disk) holds() error {
	b, err := d.dir.readRaw(d.record.Generation)
	switch {
	case errors.Is(err, fs.ErrNotExist) || err == nil && !bytes.Equal(b, d.raw):
		return errTaken
	default:
		return err
	}
}

// renew looks at the owner file. As long as it is there nobody else has begun to
// wait for the end of the lease.
func (d *Disk) renew() error {
	d.renewing.Lock()
	defer d.renewing.Unlock()
	if d.taken != nil {
		return d.taken
	}
	before := now()
	err := d.holds()
	if err == nil {
		// An eighth is for clocks that run at different speeds.
		d.deadline.Store(before + int64(d.options.Lease-d.options.Lease/8))
		return nil
	}
	if !errors.Is(err, errTaken) {
		return fmt.Errorf("%w, or may have been: %w", ErrLost, err)
	}
	d.taken = fmt.Errorf("%w: %w", ErrLost, err)
	go d.lose(d.taken)
	return d.taken
}

// check tells whether the lease is valid, and tries to renew one that is not: an
// owner that was frozen for a while goes on if nobody wanted the disk meanwhile.
func (d *Disk) check() error {
	if now() < d.deadline.Load() {
		return nil
	}
	return d.renew()
}

// lose lets go of a disk that another takes, in order if there is time left.
func (d *Disk) lose(cause error) {
	d.ending.Lock()
	defer d.ending.Unlock()
	if d.ended {
		return
	}
	if left := d.deadline.Load() - now(); left > 0 && d.options.OnRelease != nil {
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(left))
		d.options.OnRelease(ctx)
		cancel()
	}
	d.letGo(cause)
}

// release lets go of the disk because somebody asks for it.
func (d *Disk) release(ctx context.Context) error {
	d.ending.Lock()
	defer d.ending.Unlock()
	if d.ended {
		return nil
	}
	if d.options.OnRelease != nil {
		if err := d.options.OnRelease(ctx); err != nil {
			return err
		}
	}
	return d.letGo(ErrReleased)
}

// letGo waits for requests under way, closes the node, which flushes, then lets go of
// the anchor and writes that the disk is released. Late writes of
// the node's closing do no harm: until the anchor is free nobody else writes to
// this file. d.ending is held.
func (d *Disk) letGo(cause error) error {
	d.mu.Lock()
	d.err = cause
	var err error
	if d.node != nil {
		d.last.size, d.last.info, d.last.readOnly = d.node.Size(), d.node.Info(), d.node.ReadOnly()
		err = d.node.Close()
		d.node = nil
	}
	d.mu.Unlock()
	d.anchor.Close()
	d.ended = true
	next := d.record
	next.Generation, next.State, next.Wait = next.Generation+1, Released, 0
	if raced := d.dir.publish(&next, ""); raced != nil && !errors.Is(raced, errRaced) && err == nil {
		err = raced
	}
	d.cancel()
	close(d.done)
	return err
}

// Epoch is one higher for each owner of the disk.
func (d *Disk) Epoch() uint64 { return d.record.Epoch }

// Done is closed when the disk has been let go of, for whatever reason.
func (d *Disk) Done() <-chan struct{} { return d.done }

// Err tells why the disk has been let go of: ErrReleased, ErrLost or ErrClosed; nil: it
// has not.
func (d *Disk) Err() error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.err
}

// enter begins a request: it keeps the node from being closed until leave.
func (d *Disk) enter() (block.Node, error) {
	d.mu.RLock()
	if d.node == nil {
		return nil, d.err
	}
	return d.node, d.check()
}

// leave ends a request that ended with err.
func (d *Disk) leave(err error) error {
	if err == nil {
		err = d.check()
	}
	d.mu.RUnlock()
	return err
}

// Readv implements block.Node.
func (d *Disk) Readv(bufs [][]byte, off int64) error {
	n, err := d.enter()
	if err == nil {
		err = n.Readv(bufs, off)
	}
	return d.leave(err)
}

// Writev implements block.Node.
func (d *Disk) Writev(bufs [][]byte, off int64) error {
	n, err := d.enter()
	if err == nil {
		err = n.Writev(bufs, off)
	}
	return d.leave(err)
}

// Flush implements block.Node.
func (d *Disk) Flush() error {
	n, err := d.enter()
	if err == nil {
		err = n.Flush()
	}
	return d.leave(err)
}

// Discard implements block.Node.
func (d *Disk) Discard(off, length int64) error {
	n, err := d.enter()
	if err == nil {
		err = n.Discard(off, length)
	}
	return d.leave(err)
}

// WriteZeroes implements block.Node.
func (d *Disk) WriteZeroes(off, length int64, unmap bool) error {
	n, err := d.enter()
	if err == nil {
		err = n.WriteZeroes(off, length, unmap)
	}
	return d.leave(err)
}

// Size implements block.Node.
func (d *Disk) Size() int64 {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.node == nil {
		return d.last.size
	}
	return d.node.Size()
}

// ReadOnly implements block.Node.
func (d *Disk) ReadOnly() bool {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.node == nil {
		return d.last.readOnly
	}
	return d.node.ReadOnly()
}

// Info implements block.Node.
func (d *Disk) Info() block.Info {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.node == nil {
		return d.last.info
	}
	return d.node.Info()
}

// Unwrap is the node that requests are passed on to, or nil. What goes there past the
// Disk is not checked.
func (d *Disk) Unwrap() block.Node {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.node
}

// Close flushes and closes the disk and writes that it is released. A disk that has
// been let go of is closed already.
func (d *Disk) Close() error {
	d.ending.Lock()
	var err error
	if !d.ended {
		err = d.letGo(ErrClosed)
	}
	d.ending.Unlock()
	d.server.wg.Wait()
	return err
}
