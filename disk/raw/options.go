package raw

import (
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/disk/aio"
	"github.com/gnomon-vmm/gnomon/disk/block"
)

// Options say how an image is read and written.
type Options struct {
	// Direct passes the host's page cache by (O_DIRECT).
	Direct bool
	// Engine is how direct requests, and with aio.IOUring all, get to the kernel.
	Engine aio.Engine
	// WriteThrough makes each write durable before it ends.
	WriteThrough bool
	// NoFlush has Flush do nothing: see Node.IgnoreFlushes.
	NoFlush bool
	// Rules say what becomes of discards and of zeroes that are written.
	Rules block.WriteRules
}

// Opened is a node that knows with which options its files are open.
type Opened interface {
	block.Node
	Options() Options
	// SetOptions has them be others from now on. When it fails they are as before.
	// There are no requests meanwhile.
	SetOptions(Options) error
}

var (
	_ Opened      = (*Node)(nil)
	_ block.Ruled = (*Node)(nil)
)

// OptionsOf are the options of a node's files; of one that has none they are the
// zero value.
func OptionsOf(n block.Node) Options {
	if o, ok := n.(Opened); ok {
		return o.Options()
	}
	return Options{}
}

// Options implements Opened.
func (n *Node) Options() Options { return n.options }

// SetOptions implements Opened. Errors are those of OpenWith.
func (n *Node) SetOptions(o Options) error {
	was := n.options
	if o.Direct != was.Direct || o.Engine != was.Engine {
		if err := n.setWay(o); err != nil {
			return err
		}
	}
	n.options = o
	return nil
}

// setWay changes how requests are made.
func (n *Node) setWay(o Options) error {
	flags, err := unix.FcntlInt(uintptr(n.fd), unix.F_GETFL, 0)
	if err != nil {
		return fmt.Errorf("disk %s: %w", n.file.Name(), err)
	}
	now := flags &^ unix.O_DIRECT
	if o.Direct {
		now |= unix.O_DIRECT
	}
	if _, err := unix.FcntlInt(uintptr(n.fd), unix.F_SETFL, now); err != nil {
		return explain(n.file.Name(), n.readOnly, o.Direct, err)
	}
	old := n.io
	n.io = nil
	if err := n.bypass(o); err != nil {
		n.io = old
		if _, back := unix.FcntlInt(uintptr(n.fd), unix.F_SETFL, flags); back != nil {
			return fmt.Errorf("disk %s: %w, and %w", n.file.Name(), err, back)
		}
		return fmt.Errorf("disk %s: %w", n.file.Name(), err)
	}
	if old != nil {
		return old.Close()
	}
	return nil
}

// bypass has requests be made in another way than by preadv and pwritev, where o
// wants it.
func (n *Node) bypass(o Options) (err error) {
	if !o.Direct && o.Engine != aio.IOUring {
		return nil
	}
	// An io_uring would not wait for what a file that is O_NONBLOCK has to wait for.
	if err := syscall.SetNonblock(n.fd, false); err != nil {
		return err
	}
	n.io, err = aio.New(n.fd, aio.Options{Engine: o.Engine, Direct: o.Direct})
	return err
}

// IgnoreFlushes has Flush do nothing from now on, as QEMU's cache=unsafe does:
// whether what was written outlives the host is left to the host.
func (n *Node) IgnoreFlushes() { n.options.NoFlush = true }

// Rules implements block.Ruled.
func (n *Node) Rules() block.WriteRules { return n.options.Rules }

// SetRules implements block.Ruled.
func (n *Node) SetRules(r block.WriteRules) { n.options.Rules = r }

func (o Options) cache() block.CacheInfo {
	return block.CacheInfo{Direct: o.Direct, NoFlush: o.NoFlush, WriteThrough: o.WriteThrough}
}
