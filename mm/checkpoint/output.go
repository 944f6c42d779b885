package checkpoint

import (
	"os"
	"sync"

	"github.com/klauspost/compress/s2"
	"golang.org/x/sys/unix"
)

const (
	// writeSize is how much the file grows by with one system call, at least.
	writeSize = 1 << 20
	// maxBuffers is how many buffers may be filled or being written at a time.
	maxBuffers = 3
)

// output gathers what is written into few large system calls, which are made
// without its lock, so that others go on meanwhile. Its methods want the lock to
// be held; writeFull releases it in between.
type output struct {
	mu *sync.Mutex // guards everything below

	file    *os.File   // nil when it has its name, or is gone; err is not nil then
	err     error      // the first of a write; nothing is written after it
	buf     []byte     // the end of the file that is not written yet; nil: no buffer is at hand
	offset  uint64     // of buf in the file
	free    [][]byte   // buffers without use
	made    int        // how many there are in all
	writing int        // how many are being written
	written *sync.Cond // one more is not any longer
	writes  int64      // system calls
}

func (o *output) init(file *os.File, mu *sync.Mutex) {
	o.file, o.mu, o.written = file, mu, sync.NewCond(mu)
}

// size is that of the file so far.
func (o *output) size() uint64 { return o.offset + uint64(len(o.buf)) }

// add adds bytes to the file, one behind the other, and tells where they are. It
// may release the lock, but not once it has begun to add.
func (o *output) add(b []byte, sum uint32) extent {
	for o.buf == nil {
		switch n := len(o.free); {
		case n > 0:
			o.buf, o.free = o.free[n-1], o.free[:n-1]
		case o.made < maxBuffers:
			o.buf = make([]byte, 0, writeSize+s2.MaxEncodedLen(blockBytes))
			o.made++
		default:
			o.written.Wait()
		}
	}
	e := extent{offset: o.size(), length: uint32(len(b)), sum: sum}
	for {
		n := min(len(b), cap(o.buf)-len(o.buf))
		o.buf = append(o.buf, b[:n]...)
		if b = b[n:]; len(b) == 0 {
			return e
		}
		if o.err == nil {
			_, o.err = o.file.WriteAt(o.buf, int64(o.offset))
			o.writes++
		}
		o.offset += uint64(len(o.buf))
		o.buf = o.buf[:0]
	}
}

// writeFull writes what has been added, if it is enough for a system call.
func (o *output) writeFull() {
	if len(o.buf) >= writeSize {
		o.write()
	}
}

// write writes what has been added.
func (o *output) write() {
	if o.err != nil || len(o.buf) == 0 {
		o.offset += uint64(len(o.buf))
		o.buf = o.buf[:0]
		return
	}
	file, full, at := o.file, o.buf, o.offset
	o.buf, o.offset = nil, o.size()
	o.writing++
	o.mu.Unlock()
	_, err := file.WriteAt(full, int64(at))
	// On its way to the disk while the rest is compressed, so that Commit, which
	// waits for all of it, need not begin there. If that cannot be, nothing is lost.
	// Abort may close the file meanwhile.
	if conn, cerr := file.SyscallConn(); cerr == nil {
		_ = conn.Control(func(fd uintptr) {
			_ = unix.SyncFileRange(int(fd), int64(at), int64(len(full)), unix.SYNC_FILE_RANGE_WRITE)
		})
	}
	o.mu.Lock()
	o.writing--
	o.writes++
	if o.err == nil {
		o.err = err
	}
	o.free = append(o.free, full[:0])
	o.written.Broadcast()
}

// finish writes everything that has been added.
func (o *output) finish() error {
	o.write()
	for o.writing > 0 {
		o.written.Wait()
	}
	return o.err
}
