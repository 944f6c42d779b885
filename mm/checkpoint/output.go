package checkpoint

import (
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// writeSize is how much the file grows by with one system call, at least, unless
	// directSize are written from where they are: few calls are worth a copy, and no
	// more are promised than one for each so many.
	writeSize  = 1 << 20
	directSize = blockBytes
	// flushSize and flushMost are of how much the kernel is asked at a time to begin to
	// put it on disk. Where nobody waits for that it is asked nevertheless if the memory is
	// larger than cachedMemory: of so much the kernel makes those wait who write it.
	flushSize    = 8 << 20
	flushMost    = 32 << 20
	cachedMemory = 1 << 30
	// maxBuffers is how many buffers there may be: one that is written, one that waits,
	// and one that is filled. Each takes a block more than is needed to write it.
	maxBuffers = 3
	bufferSize = writeSize + blockBytes
)

// output gathers what is written into few large system calls. One is made at a time,
// since the kernel lets no two write to a file, and without the lock, so that others go on
// meanwhile. Its methods want the lock to be held; those that write release it in between.
type output struct {
	noFlush bool // what is written need not be on disk at the end
	late    bool // nor begin to be put there

	mu *sync.Mutex // guards everything below

	file     *os.File   // nil when it has its name, or is gone; err is not nil then
	err      error      // the first of a write; nothing is written after it
	end      uint64     // the size of the file with all that was added
	buf      []byte     // what was added last; nil: no buffer is at hand
	full     [][]byte   // what was added before it and is not being written yet
	free     [][]byte   // buffers without use
	made     int        // how many there are in all
	writing  bool       // somebody writes
	parts    [][]byte   // what they write at the moment: the end of what is before offset
	offset   uint64     // up to where the file is written, or being written
	written  uint64     // up to where it is written
	flushed  uint64     // up to where the kernel was asked to put it on disk
	flushing bool       // flush runs
	changed  *sync.Cond // there is a free buffer, or writing is over
	writes   int64      // system calls
}

// init is for a file of so many bytes of memory.
func (o *output) init(file *os.File, memory uint64, noFlush bool, mu *sync.Mutex) {
	o.file, o.noFlush, o.late = file, noFlush, noFlush && memory <= cachedMemory
	o.mu, o.changed = mu, sync.NewCond(mu)
}

// size is that of the file so far.
func (o *output) size() uint64 { return o.end }

// add adds bytes to the file, one behind the other, and tells where they are. It may
// release the lock.
func (o *output) add(sum uint32, parts ...[]byte) extent {
	length := total(parts)
	for {
		switch n := len(o.free); {
		case o.buf == nil && n > 0:
			o.buf, o.free = o.free[n-1], o.free[:n-1]
		case o.buf == nil && o.made < maxBuffers:
			o.buf = buffers.Get().(*[bufferSize]byte)[:0]
			o.made++
		case o.buf == nil:
			o.changed.Wait()
		case length <= cap(o.buf)-len(o.buf):
			e := o.extend(length, sum)
			for _, b := range parts {
				o.buf = append(o.buf, b...)
			}
			return e
		case len(o.buf) > 0:
			o.write()
		case o.writing:
			o.changed.Wait()
		default: // larger than a buffer
			e := o.extend(length, sum)
			o.write(parts...)
			return e
		}
	}
}

// extend notes that the file gets longer.
func (o *output) extend(length int, sum uint32) extent {
	e := extent{offset: o.end, length: uint32(length), sum: sum}
	o.end += uint64(length)
	return e
}

// addBehind adds bytes without a copy, if that is worth a system call of its own and nobody
// else writes. Then the caller must call write with them before it releases the lock.
func (o *output) addBehind(sum uint32, parts [][]byte) (e extent, ok bool) {
	length := total(parts)
	if o.writing || len(o.buf)+length < directSize {
		return e, false
	}
	return o.extend(length, sum), true
}

// writeFull writes what has been added, if it is enough for a system call.
func (o *output) writeFull() {
	if len(o.buf) >= writeSize {
		o.write()
	}
}

// write has what was added written, and behind it what addBehind was told of: by whoever
// writes already, or else by the caller, who then writes for others too.
func (o *output) write(behind ...[]byte) {
	if len(o.buf) > 0 {
		o.full, o.buf = append(o.full, o.buf), nil
	}
	if o.writing {
		return
	}
	o.writing = true
	for len(o.full) > 0 || len(behind) > 0 {
		o.writeOnce(behind)
		behind = nil
	}
	o.writing = false
	o.changed.Broadcast()
}

// writeOnce writes all that is full, and what is behind it, by one system call.
func (o *output) writeOnce(behind [][]byte) {
	full, at := o.full, o.offset
	o.full = nil
	o.parts = append(append(o.parts[:0], full...), behind...)
	o.offset += uint64(total(o.parts))
	if o.err == nil {
		file, parts := o.file, o.parts
		o.mu.Unlock()
		err := writeAt(file, parts, int64(at))
		o.mu.Lock()
		o.writes++
		if o.err == nil {
			o.err = err
		}
	}
	clear(o.parts)
	o.parts = o.parts[:0]
	if o.written = o.offset; !o.flushing && o.mayFlush() {
		o.flushing = true
		go o.flush()
	}
	for _, b := range full {
		o.free = append(o.free, b[:0])
	}
	o.changed.Broadcast()
}

// mayFlush tells whether enough is written for the kernel to be asked to put it on disk.
func (o *output) mayFlush() bool {
	return o.err == nil && o.written >= o.flushed+flushSize && !o.late
}

// flush has the kernel put on disk what is written, while the rest is made, so that
// Commit, which waits for all of it, need not begin there, and the kernel need not hold up
// who writes. If that cannot be, nothing is lost. It is called without the lock.
func (o *output) flush() {
	o.mu.Lock()
	defer o.mu.Unlock()
	defer func() { o.flushing = false }()
	for o.mayFlush() {
		file, from := o.file, o.flushed
		length := min(o.written-from, flushMost)
		o.flushed += length
		o.mu.Unlock()
		// Which waits where the disk has enough to do already.
		err := control(file, func(fd int) error {
			return unix.SyncFileRange(fd, int64(from), int64(length), unix.SYNC_FILE_RANGE_WRITE)
		})
		o.mu.Lock()
		if err != nil {
			return
		}
	}
}

// unwritten is what was added at a place of the file and behind it, up to the end of the
// same call or further, or nil if that is written.
func (o *output) unwritten(at uint64) []byte {
	from := o.offset
	for _, parts := range [][][]byte{o.full, {o.buf}} {
		for _, b := range parts {
			if at >= from && at-from < uint64(len(b)) {
				return b[at-from:]
			}
			from += uint64(len(b))
		}
	}
	from = o.offset - uint64(total(o.parts))
	for _, b := range o.parts {
		if at >= from && at-from < uint64(len(b)) {
			return b[at-from:]
		}
		from += uint64(len(b))
	}
	return nil
}

// finish writes everything that has been added.
func (o *output) finish() error {
	for o.writing {
		o.changed.Wait()
	}
	o.write()
	return o.err
}

// buffers serve one checkpoint after the other.
var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

// recycle lets others use the buffers, once nothing is going to be added.
func (o *output) recycle() {
	for _, b := range o.free {
		buffers.Put((*[bufferSize]byte)(b[:bufferSize]))
	}
	o.made -= len(o.free)
	o.free = nil
}

func total(parts [][]byte) int {
	n := 0
	for _, b := range parts {
		n += len(b)
	}
	return n
}

// writeAt writes some buffers, one behind the other.
func writeAt(file *os.File, bufs [][]byte, at int64) error {
	n := 0
	err := control(file, func(fd int) (err error) {
		n, err = unix.Pwritev(fd, bufs, at)
		return err
	})
	if err != nil && err != unix.EINTR {
		return os.NewSyscallError("pwritev", err)
	}
	at += int64(max(n, 0))
	for _, b := range bufs { // what it left
		skip := min(max(n, 0), len(b))
		n -= skip
		if b = b[skip:]; len(b) == 0 {
			continue
		}
		if _, err := file.WriteAt(b, at); err != nil {
			return err
		}
		at += int64(len(b))
	}
	return nil
}

// control calls f with the descriptor of a file that Abort may close meanwhile.
func control(file *os.File, f func(fd int) error) error {
	conn, err := file.SyscallConn()
	if err != nil {
		return err
	}
	if cerr := conn.Control(func(fd uintptr) { err = f(int(fd)) }); cerr != nil {
		return cerr
	}
	return err
}
