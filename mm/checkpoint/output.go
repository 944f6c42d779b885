package checkpoint

import (
	"errors"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// writeSize is how much the file grows by with one system call, at least: no more are
	// promised than one for each so much. Calls for more took longer in all: for
	// them the kernel takes larger pieces of memory for the page cache.
	writeSize = blockBytes
	// flushSize and flushMost are of how much the kernel is asked at a time to begin to
	// put it on disk.
	flushSize = 8 << 20
	flushMost = 32 << 20

	// cachedMemory is the largest memory that is written by way of the page cache. For more
	// the kernel would have to find room, and write back, as fast as the disk does anyway,
	// and take the processors, and what others have in the page cache, for that.
	cachedMemory = 1 << 30
	// cachedDepth and directDepth are how many writes there may be at a time, by way of the
	// page cache and past it. The kernel lets no two write to a file there, but has the second
	// wait for less time than it takes to sleep and be woken.
	cachedDepth = 2
	directDepth = 8
	// growSize is how much longer the file is made ahead of writes past the page cache: those
	// that make it longer themselves have to wait for each other.
	growSize = 64 << 20
	// maxBuffers is how many buffers there may be: two that are written, one that waits, and
	// one that is filled. Each takes a block more than is needed to write it.
	maxBuffers = 4
	bufferSize = writeSize + blockBytes
)

// output gathers what is written into few large system calls, made without the lock, so
// that others go on meanwhile. Past the page cache each begins at a page of the file and
// consists of whole pages, to which zeros fill up what is not.
//
// Its methods want the lock to be held; those that write release it in between.
type output struct {
	noFlush bool // what is written need not be on disk at the end

	mu *sync.Mutex // guards everything below

	file     *os.File   // nil when it has its name, or is gone; err is not nil then
	direct   *os.File   // the same, past the page cache; nil: all goes by way of it
	err      error      // the first of a write; nothing is written after it
	end      uint64     // the size of the file with all that was added
	buf      []byte     // what was added last; nil: no buffer is at hand
	full     [][]byte   // what was added before it and is not being written yet
	free     [][]byte   // buffers without use
	made     int        // how many there are in all
	flights  []*flight  // what is being written
	offset   uint64     // up to where the file is written, or being written
	flushed  uint64     // up to where the kernel was asked to put it on disk
	flushing bool       // flush runs
	changed  *sync.Cond // there is a free buffer, or a write is over
	writes   int64      // system calls

	growing sync.Mutex // may be locked without mu
	grown   uint64     // guarded by growing: how long the file was made
}

// flight is a write that is under way.
type flight struct {
	at    uint64
	parts [][]byte
}

// init is for a file of so many bytes of memory.
func (o *output) init(file *os.File, memory uint64, noFlush bool, mu *sync.Mutex) {
	o.file, o.noFlush = file, noFlush
	o.mu, o.changed = mu, sync.NewCond(mu)
	if memory > cachedMemory {
		// nil where the file system knows no such thing.
		o.direct, _ = os.OpenFile(file.Name(), os.O_WRONLY|unix.O_DIRECT, 0)
	}
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
		case !o.mayWrite():
			o.changed.Wait()
		default: // larger than a buffer
			e := o.extend(length, sum)
			o.write(append(slices.Clip(parts), o.padding())...)
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
	if !o.mayWrite() || len(o.buf)+length < writeSize {
		return e, false
	}
	o.buf = append(o.buf, o.padding()...)
	return o.extend(length, sum), true
}

// padding is the zeros up to the next page of the file, past the page cache: the file gets
// longer by them. A buffer begins at a page, and so has room for them.
func (o *output) padding() []byte {
	if o.direct == nil {
		return nil
	}
	n := -o.end % PageSize
	o.end += n
	return zeroPage[:n]
}

// depth is how many may write at a time.
func (o *output) depth() int {
	if o.direct != nil {
		return directDepth
	}
	return cachedDepth
}

// mayWrite tells whether one more may write.
func (o *output) mayWrite() bool {
	return len(o.flights) < o.depth()
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
		o.buf = append(o.buf, o.padding()...)
		o.full, o.buf = append(o.full, o.buf), nil
	}
	for o.mayWrite() && (len(o.full) > 0 || len(behind) > 0) {
		o.writeOnce(behind)
		behind = nil
	}
}

// writeOnce writes all that is full, and what is behind it, by one system call.
func (o *output) writeOnce(behind [][]byte) {
	full := o.full
	f := &flight{at: o.offset, parts: slices.Concat(full, behind)}
	o.full = nil
	o.offset += uint64(total(f.parts))
	o.flights = append(o.flights, f)
	if o.err == nil {
		file, direct := o.file, o.direct
		o.mu.Unlock()
		err := o.put(f, file, direct)
		o.mu.Lock()
		o.writes++
		if o.err == nil {
			o.err = err
		}
	}
	o.flights = slices.DeleteFunc(o.flights, func(other *flight) bool { return other == f })
	if !o.flushing && o.mayFlush() {
		o.flushing = true
		go o.flush()
	}
	for _, b := range full {
		o.free = append(o.free, b[:0])
	}
	o.changed.Broadcast()
}

// put writes, without the lock: past the page cache if that is possible.
func (o *output) put(f *flight, file, direct *os.File) error {
	odd := func(b []byte) bool { return len(b)%PageSize != 0 }
	if direct != nil && !slices.ContainsFunc(f.parts, odd) {
		o.grow(direct, f.at+uint64(total(f.parts)))
		err := writeAt(direct, f.parts, int64(f.at))
		if !errors.Is(err, unix.EINVAL) { // or else not on this file system, or from this memory
			return err
		}
	}
	return writeAt(file, f.parts, int64(f.at))
}

// grow makes the file longer ahead of a write. If that cannot be, the write does.
func (o *output) grow(direct *os.File, end uint64) {
	o.growing.Lock()
	defer o.growing.Unlock()
	for ; o.grown < end; o.grown += growSize {
		_ = control(direct, func(fd int) error { return unix.Fallocate(fd, 0, int64(o.grown), growSize) })
	}
}

// mayFlush tells whether enough is written for the kernel to be asked to put it on disk.
func (o *output) mayFlush() bool {
	return o.err == nil && o.written() >= o.flushed+flushSize && !o.noFlush && o.direct == nil
}

// written is up to where the file is written, by way of the page cache.
func (o *output) written() uint64 {
	if len(o.flights) > 0 {
		return o.flights[0].at
	}
	return o.offset
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
		length := min(o.written()-from, flushMost)
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
	for _, f := range o.flights {
		if b := find(f.parts, f.at, at); b != nil {
			return b
		}
	}
	if b := find(o.full, o.offset, at); b != nil {
		return b
	}
	return find([][]byte{o.buf}, o.offset+uint64(total(o.full)), at)
}

// find is what parts, one behind the other from a place of the file on, have at another.
func find(parts [][]byte, from, at uint64) []byte {
	for _, b := range parts {
		if at >= from && at-from < uint64(len(b)) {
			return b[at-from:]
		}
		from += uint64(len(b))
	}
	return nil
}

// finish writes everything that has been added. What is added later goes by way of the
// page cache, and is behind it without zeros between.
func (o *output) finish() error {
	for o.write(); len(o.flights) > 0; o.write() {
		o.changed.Wait()
	}
	if direct := o.direct; direct != nil {
		o.direct = nil
		err := errors.Join(direct.Close(), o.file.Truncate(int64(o.offset))) // it was made longer ahead
		if o.err == nil {
			o.err = err
		}
		o.flushed = o.offset
	}
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
