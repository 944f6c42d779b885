package aio

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// safeAlignment does where the kernel does not tell.
	safeAlignment = 4096
	// maxAlignment is what we have memory for.
	maxAlignment = 64 << 10
	// bounceBytes is how much goes through aligned memory at a time.
	bounceBytes = 1 << 20
	// smallBytes is the size of such memory for small requests.
	smallBytes = 2 * maxAlignment
)

// alignment is what the file system wants of direct requests: of their offsets and
// lengths, and of their memory.
func alignment(fd int) (offset, memory int64, err error) {
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN|unix.STATX_TYPE, &st); err != nil && !errors.Is(err, unix.ENOSYS) {
		return 0, 0, fmt.Errorf("statx: %w", err)
	}
	offset, memory = safeAlignment, safeAlignment
	switch {
	case st.Mask&unix.STATX_DIOALIGN != 0:
		offset, memory = int64(st.Dio_offset_align), int64(st.Dio_mem_align)
		if offset == 0 {
			return 0, 0, errors.New("the file system does not have it for this file: use cache=writeback, or another file system")
		}
	case st.Mode&unix.S_IFMT == unix.S_IFBLK:
		n, err := unix.IoctlGetInt(fd, unix.BLKSSZGET)
		if err != nil {
			return 0, 0, fmt.Errorf("ask for the device's block size: %w", err)
		}
		offset = int64(n)
		memory = max(offset, 512)
	}
	memory = max(memory, 1)
	for _, a := range []int64{offset, memory} {
		if a < 1 || a > maxAlignment || a&(a-1) != 0 {
			return 0, 0, fmt.Errorf("requests must be aligned to %d bytes: powers of two up to %d are possible", a, maxAlignment)
		}
	}
	return offset, memory, nil
}

// bounce is aligned memory.
type bounce struct {
	bytes []byte
	one   [1][]byte // for requests
	pool  *sync.Pool
}

var (
	bounces = bouncePool(bounceBytes)
	small   = bouncePool(smallBytes)
)

func bouncePool(size int) *sync.Pool {
	p := &sync.Pool{}
	p.New = func() any { return &bounce{bytes: alignedMemory(size), pool: p} }
	return p
}

// getBounce returns memory for n bytes, or for as many as there are at most.
func getBounce(n int64) *bounce {
	if n <= smallBytes {
		return small.Get().(*bounce)
	}
	return bounces.Get().(*bounce)
}

func (b *bounce) release() {
	b.one[0] = nil
	b.pool.Put(b)
}

// list is the first n bytes as a list of buffers.
func (b *bounce) list(n int64) [][]byte {
	b.one[0] = b.bytes[:n]
	return b.one[:]
}

func (f *File) down(off int64) int64 { return off &^ (f.align - 1) }
func (f *File) up(off int64) int64   { return f.down(off + f.align - 1) }

// cursor walks through the buffers of a request, which it leaves as they are.
type cursor struct {
	bufs [][]byte
	skip int // bytes of bufs[0] that are done
}

// next is the next stretch of at most n bytes, n > 0, that lies in one buffer.
func (c *cursor) next(n int) []byte {
	for len(c.bufs[0]) == c.skip {
		c.bufs, c.skip = c.bufs[1:], 0
	}
	b := c.bufs[0][c.skip:]
	b = b[:min(len(b), n)]
	c.skip += len(b)
	return b
}

// readAround reads n bytes by whole blocks.
func (f *File) readAround(bufs [][]byte, off, n int64) (int64, error) {
	b := getBounce(f.up(off+n) - f.down(off))
	defer b.release()
	c, done := cursor{bufs: bufs}, int64(0)
	for done < n {
		first := f.down(off + done)
		length := min(f.up(off+n)-first, int64(len(b.bytes)))
		got, err := f.transfer(opRead, b.list(length), first)
		if err != nil {
			return done, err
		}
		skip := off + done - first
		there := min(got-skip, n-done)
		for from := b.bytes[skip:max(skip, skip+there)]; len(from) > 0; {
			from = from[copy(c.next(len(from)), from):]
		}
		done += max(there, 0)
		if got < length {
			break // the file's end
		}
	}
	return done, nil
}

// writeAround writes n bytes by whole blocks, and keeps others from the blocks of
// which only a part is written.
func (f *File) writeAround(bufs [][]byte, off, n, limit int64) error {
	first, end := f.down(off), f.up(off+n)
	f.writes.lock(first, end, true)
	defer f.writes.unlock(first, end, true)
	b := getBounce(end - first)
	defer b.release()
	c, last := cursor{bufs: bufs}, off+n
	for at := off; at < last; {
		first := f.down(at)
		stop := min(last, first+int64(len(b.bytes)))
		block := b.bytes[:f.up(stop)-first]
		cached := f.up(stop) > max(limit, last)
		if cached { // that block cannot be written as a whole
			if stop = f.down(stop); stop <= at {
				stop = last
				block = block[:stop-first]
			} else {
				block = block[:stop-first]
				cached = false
			}
		}
		if !cached {
			if err := f.edges(block, first, at, stop); err != nil {
				return err
			}
		}
		for into := block[at-first : stop-first]; len(into) > 0; {
			into = into[copy(into, c.next(len(into))):]
		}
		var err error
		if cached {
			err = f.writeCached(block[at-first:], at)
		} else {
			err = f.write(b.list(int64(len(block))), first, int64(len(block)))
		}
		if err != nil {
			return err
		}
		at = stop
	}
	return nil
}

// edges reads the blocks of block, which is at first, that are only partly going to be
// written with what is from start to stop.
func (f *File) edges(block []byte, first, start, stop int64) error {
	end := first + int64(len(block))
	if start > first {
		if err := f.readBlock(block[:f.align], first); err != nil {
			return err
		}
	}
	if stop < end && (start == first || end-first > f.align) {
		return f.readBlock(block[end-f.align-first:], end-f.align)
	}
	return nil
}

// readBlock reads one block; behind the file's end there are zeroes.
func (f *File) readBlock(block []byte, off int64) error {
	b := getBounce(0) // for its list
	defer b.release()
	b.one[0] = block
	got, err := f.transfer(opRead, b.one[:], off)
	clear(block[got:])
	return err
}

// writeCached writes by the page cache: what stands in the file's last block where that
// is not whole.
func (f *File) writeCached(p []byte, off int64) error {
	fd := f.cached.Load() - 1
	if fd < 0 {
		n, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", f.fd), unix.O_WRONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open the file again for its last block: %w", err)
		}
		if fd = int64(n); !f.cached.CompareAndSwap(0, fd+1) {
			unix.Close(n)
			fd = f.cached.Load() - 1
		}
	}
	for len(p) > 0 {
		n, err := unix.Pwrite(int(fd), p, off)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return os.NewSyscallError("pwrite", err)
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}
