package nbd

import (
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/disk/aio"
	"github.com/gnomon-vmm/gnomon/disk/block"
)

// ring begins small reads and writes of a disk past the page cache by an io_uring: the
// connection's reader begins them, and one goroutine hears of their ends. So they cost no
// goroutine each, and those that come together go to the kernel together. To send what a
// large one read takes long, which several goroutines do better.
type ring struct {
	client *connection
	event  *os.File // an eventfd: some have ended

	underWay atomic.Int32

	mu   sync.Mutex
	idle sync.Cond // on mu: none is under way
	aio  *aio.Ring // nil: closed; guarded by mu
}

// newRing makes a ring; nil: there can be none, or it would be of no use.
func newRing(c *connection) *ring {
	if _, ok := c.export.Node.(block.Starter); !ok || !block.Waits(c.export.Node) {
		return nil
	}
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil
	}
	g := &ring{client: c, event: os.NewFile(uintptr(fd), "eventfd")}
	g.idle.L = &g.mu
	if g.aio, err = aio.NewRing(fd); err != nil {
		g.event.Close()
		return nil
	}
	c.done.Add(1)
	go g.run()
	return g
}

// start begins a request, if that can be done without waiting. The kernel hears of it at
// the next submit.
func (g *ring) start(r *request) bool {
	if r.flags&cmdFUA != 0 || r.length == 0 || r.length > quickLength || r.command != cmdRead && r.command != cmdWrite {
		return false
	}
	if r.command == cmdRead && r.length >= holeLength && r.client.structured {
		return false // its holes may be told
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if r.command == cmdRead {
		r.data = getBuffer(int(r.length))
	}
	r.one[0] = r.data.bytes[:r.length]
	r.io.Write, r.io.Bufs, r.io.Off, r.io.Ring = r.command == cmdWrite, r.one[:], int64(r.offset), g.aio
	r.io.Enter(r, 0)
	g.underWay.Add(1)
	if block.Start(g.client.export.Node, &r.io) {
		return true
	}
	r.io.Leave()
	g.underWay.Add(-1)
	g.refused(r)
	return false
}

// refused has a request be as it was before start.
func (g *ring) refused(r *request) {
	if r.command == cmdRead {
		putBuffer(r.data)
		r.data = nil
	}
}

// submit tells the kernel of what was started.
func (g *ring) submit() {
	g.mu.Lock()
	g.aio.Submit()
	g.mu.Unlock()
}

// run hears of the ends of requests, until the ring is closed.
func (g *ring) run() {
	defer g.client.done.Done()
	var count [8]byte
	for {
		g.mu.Lock()
		if g.aio == nil {
			g.mu.Unlock()
			return
		}
		for again := true; again; {
			g.aio.Reap()
			again = g.aio.Arm()
		}
		if g.aio.UnderWay() == 0 {
			g.idle.Broadcast()
		}
		g.mu.Unlock()
		g.client.out.flush()
		if _, err := g.event.Read(count[:]); err != nil {
			return
		}
	}
}

// close waits for the requests under way.
func (g *ring) close() {
	g.mu.Lock()
	g.aio.Submit()
	for g.aio.UnderWay() > 0 {
		g.idle.Wait()
	}
	_ = g.aio.Close() // nothing is under way that could be lost
	g.aio = nil
	g.mu.Unlock()
	g.event.Close()
}

// Ended implements block.Ender.
func (r *request) Ended(_ *block.Request, _ int64, err error) {
	c := r.client
	c.ring.underWay.Add(-1)
	switch {
	case err == block.ErrAgain:
		c.ring.refused(r)
		c.done.Add(1)
		go func() {
			defer c.done.Done()
			r.do()
			c.out.add(r)
			c.out.flush()
		}()
		return
	case err != nil:
		r.parts = r.parts[:0]
		r.replyError(err)
	case r.command == cmdWrite:
		r.replyDone()
	default:
		r.replyRead()
	}
	c.out.add(r)
}
