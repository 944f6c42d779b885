package monitor

import (
	"errors"
	"os"
	"syscall"

	"github.com/gnomon-vmm/gnomon/disk/aio"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/raw"
	"github.com/gnomon-vmm/gnomon/qmp"
)

// discardMode is BlockdevDiscardOptions, aioMode BlockdevAioOptions, cacheOptions
// BlockdevCacheOptions of QEMU's qapi/block-core.json.
type (
	discardMode  string
	aioMode      string
	cacheOptions struct {
		Direct  *bool `qmp:"direct"`
		NoFlush *bool `qmp:"no-flush"`
	}
)

const (
	discardIgnore discardMode = "ignore"
	discardUnmap  discardMode = "unmap"

	aioThreads aioMode = "threads"
	aioNative  aioMode = "native" // of direct I/O only; QEMU's is Linux AIO, ours what took its place: io_uring
	aioRing    aioMode = "io_uring"

	detectOff   detectZeroes = "off"
	detectOn    detectZeroes = "on"
	detectUnmap detectZeroes = "unmap"
)

func (discardMode) Values() []string {
	return []string{string(discardIgnore), string(discardUnmap)}
}

func (aioMode) Values() []string {
	return []string{string(aioThreads), string(aioNative), string(aioRing)}
}

// errReadOnlyExport is an export to be written that its server lets be read only.
var errReadOnlyExport = qmp.Errorf("request on write denied without write permission")

// cannotWrite tells of an error that opening to read only may not have.
func cannotWrite(err error) bool {
	return errors.Is(err, os.ErrPermission) || errors.Is(err, syscall.EROFS) || errors.Is(err, errReadOnlyExport)
}

// manner is how a node is read and written, as far as it is said by options that all
// drivers have and that what is described in a node takes over from it.
type manner struct {
	readOnly, autoReadOnly bool
	direct, noFlush        bool
	unmap                  bool // discards are passed on where options do not say
	engine                 aio.Engine
	rules                  block.WriteRules
}

// with is the manner of a node with options below one with a manner.
func (m manner) with(o *blockdevOptions) (manner, error) {
	set := func(to, option *bool) {
		if option != nil {
			*to = *option
		}
	}
	set(&m.readOnly, o.ReadOnly)
	set(&m.autoReadOnly, o.AutoReadOnly)
	if o.Cache != nil {
		set(&m.direct, o.Cache.Direct)
		set(&m.noFlush, o.Cache.NoFlush)
	}
	if o.Discard != nil {
		m.unmap = *o.Discard == discardUnmap
	}
	m.rules = block.WriteRules{KeepDiscarded: !m.unmap}
	if o.DetectZeroes != nil {
		switch *o.DetectZeroes {
		case detectOn:
			m.rules.Zeroes = block.ZeroesOn
		case detectUnmap:
			if !m.unmap {
				return m, qmp.Errorf("setting detect-zeroes to unmap is not allowed without setting discard operation to unmap")
			}
			m.rules.Zeroes = block.ZeroesUnmap
		}
	}
	if f := o.fileOptions(); f != nil && f.AIO != nil {
		switch *f.AIO {
		case aioThreads:
			m.engine = aio.Threads
		case aioNative:
			if !m.direct {
				return m, qmp.Errorf("aio=native was specified, but it requires cache.direct=on, which was not specified.")
			}
			m.engine = aio.IOUring
		case aioRing:
			m.engine = aio.IOUring
		}
	}
	return m, nil
}

// below is what a format's file or backing file takes over: formats pass on what is to
// be discarded as they see fit, and backing files are only read.
func (m manner) below(backing bool) manner {
	m.unmap, m.engine = true, aio.Auto
	if backing {
		m.readOnly, m.autoReadOnly = true, false
	}
	return m
}

// options are those of a file.
func (m manner) options() raw.Options {
	return raw.Options{Direct: m.direct, NoFlush: m.noFlush, Engine: m.engine, Rules: m.rules}
}

// fileOptions are those of a file or a device, or nil.
func (o *blockdevOptions) fileOptions() *fileOptions {
	if o.Device != nil {
		return o.Device
	}
	return o.File
}

// path is the file of a file's node.
func (e *graphNode) path() string { return e.options.fileOptions().Filename }

// openFile opens a file's node, and locks the file.
func (e *graphNode) openFile() (block.Node, error) {
	n, err := raw.OpenWith(e.path(), e.readOnly, e.manner.options())
	if err != nil {
		return nil, err
	}
	return n, nil
}

// rawFormat is the format raw over a file that is a node itself.
type rawFormat struct {
	*raw.Node
	rules block.WriteRules // changed only while there are no requests
}

// ruled is a node that is no file, or the format raw over one, in some manner.
type ruled struct {
	block.Mapper
	manner // changed only while there are no requests
}

func (f *rawFormat) Writev(bufs [][]byte, off int64) error {
	return writeBy(f.rules, f.Node, bufs, off)
}

func (f *rawFormat) Discard(off, n int64) error { return discardBy(f.rules, f.Node, off, n) }

func (f *rawFormat) WriteZeroes(off, n int64, unmap bool) error {
	return f.Node.WriteZeroes(off, n, f.rules.Unmaps(unmap))
}

func (f *rawFormat) Rules() block.WriteRules     { return f.rules }
func (f *rawFormat) SetRules(r block.WriteRules) { f.rules = r }

func (f *rawFormat) Info() block.Info {
	i := f.Node.Info()
	i.Rules = f.rules
	return i
}

func (r *ruled) Writev(bufs [][]byte, off int64) error {
	return writeBy(r.rules, r.Mapper, bufs, off)
}

func (r *ruled) Discard(off, n int64) error { return discardBy(r.rules, r.Mapper, off, n) }

func (r *ruled) WriteZeroes(off, n int64, unmap bool) error {
	return r.Mapper.WriteZeroes(off, n, r.rules.Unmaps(unmap))
}

func (r *ruled) Flush() error {
	if r.noFlush {
		return nil
	}
	return r.Mapper.Flush()
}

func (r *ruled) Rules() block.WriteRules     { return r.rules }
func (r *ruled) SetRules(w block.WriteRules) { r.rules = w }

func (r *ruled) Info() block.Info {
	i := r.Mapper.Info()
	i.Rules, i.Cache = r.rules, block.CacheInfo{Direct: r.direct, NoFlush: r.noFlush}
	return i
}

// writeBy writes as a node's rules say, to the node below.
func writeBy(r block.WriteRules, n block.Node, bufs [][]byte, off int64) error {
	if r.Detects(bufs) {
		return n.WriteZeroes(off, lengthOf(bufs), r.Zeroes == block.ZeroesUnmap)
	}
	return n.Writev(bufs, off)
}

func discardBy(r block.WriteRules, n block.Node, off, length int64) error {
	if r.KeepDiscarded {
		return nil
	}
	return n.Discard(off, length)
}
