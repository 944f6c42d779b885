package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

const (
	// holeLength is what a run of zeroes must have to be told instead of sent, and
	// a read to be looked at for such runs: less costs more to find than to send.
	holeLength = 16 << 10
	// maxChunks is how many chunks a read's reply has.
	maxChunks = 32
	// cacheStep is how much cmdCache reads at a time.
	cacheStep = 1 << 20
	// maxMessage is how much clients are told of an error.
	maxMessage = 512
	// maxLooks is how often one block status asks for an extent.
	maxLooks = 1 << 16
)

// A chunkHead is what stands before the data of a chunk, or all of a hole.
type chunkHead [structuredSize + 8 + 4]byte

// request is a request of a client and the reply to it.
type request struct {
	header
	client  *connection
	refusal error   // why it is not done; found before it begins
	payload int64   // bytes it counts for
	own     bool    // they are of the client's own part
	data    *buffer // what is read or written, or nil

	head  chunkHead             // of a reply that has one part
	heads *[maxChunks]chunkHead // of the chunks of others
	body  []byte                // block status, and errors; reused
	parts [][]byte              // the reply
	one   [1][]byte             // for the node
	io    block.Request         // where the ring does it
	runs  []span
}

// span is a part of a read: data, or a hole.
type span struct {
	start, length int64
	hole          bool
}

// refusalError is why a request is not done.
type refusalError struct {
	code    uint32
	message string
}

func (e *refusalError) Error() string { return e.message }

func refuse(code uint32, format string, args ...any) error {
	return &refusalError{code, fmt.Sprintf(format, args...)}
}

// check tells why a request cannot be: "Request types".
func (c *connection) check(h header) error {
	var known uint16
	isWrite := false
	switch h.command {
	case cmdRead:
		if c.structured {
			known = cmdDontFragment
		}
		if h.length > maxPayload {
			return refuse(codeInvalid, "reads are of at most %d bytes", maxPayload)
		}
	case cmdWrite, cmdTrim:
		isWrite = true
	case cmdWriteZeroes:
		isWrite, known = true, cmdNoHole|cmdFastZero
	case cmdFlush:
		if h.offset != 0 || h.length != 0 {
			return refuse(codeInvalid, "a flush has neither offset nor length")
		}
	case cmdCache:
	case cmdBlockStatus:
		known = cmdReqOne
		if len(c.contexts) == 0 {
			return refuse(codeInvalid, "no metadata context was chosen")
		}
		if h.length == 0 {
			return refuse(codeInvalid, "block status of no bytes")
		}
	default:
		return refuse(codeInvalid, "unknown command %d", h.command)
	}
	switch size := uint64(c.size); {
	case h.flags&^(known|cmdFUA) != 0:
		return refuse(codeInvalid, "command %d has unknown flags %#x", h.command, h.flags)
	case isWrite && c.export.ReadOnly:
		return refuse(codePerm, "the export is read-only")
	case h.offset <= size && uint64(h.length) <= size-h.offset:
		return nil
	case isWrite:
		return refuse(codeNoSpace, "%d bytes at %d pass the end, %d", h.length, h.offset, size)
	default:
		return refuse(codeInvalid, "%d bytes at %d pass the end, %d", h.length, h.offset, size)
	}
}

// vectors implements packet.
func (r *request) vectors(bufs [][]byte) [][]byte { return append(bufs, r.parts...) }

// sent implements packet.
func (r *request) sent() { r.client.end(r) }

// do does the request, and makes the reply to it.
func (r *request) do() {
	r.parts = r.parts[:0]
	err := r.refusal
	if err == nil {
		switch r.command {
		case cmdRead:
			err = r.read()
		case cmdBlockStatus:
			err = r.blockStatus()
		default:
			err = r.change()
		}
	}
	if err != nil {
		r.replyError(err)
	}
}

// replyDone makes the reply to a request that has no data to answer with.
func (r *request) replyDone() {
	putSimple(r.head[:], 0, r.cookie)
	r.parts = append(r.parts[:0], r.head[:simpleSize])
}

func (r *request) replyError(err error) {
	code, refusal := errorCode(err), (*refusalError)(nil)
	if errors.As(err, &refusal) {
		code = refusal.code
	}
	if !r.client.structured {
		putSimple(r.head[:], code, r.cookie)
		r.parts = append(r.parts[:0], r.head[:simpleSize])
		return
	}
	message := err.Error()
	message = message[:min(len(message), maxMessage)]
	r.body = binary.BigEndian.AppendUint32(r.body[:0], code)
	r.body = binary.BigEndian.AppendUint16(r.body, uint16(len(message)))
	r.body = append(r.body, message...)
	putChunk(r.head[:], chunkDone, chunkError, r.cookie, uint32(len(r.body)))
	r.parts = append(r.parts[:0], r.head[:structuredSize], r.body)
}

// observe takes how long the request took into account, if it is a small one.
func (r *request) observe(average *atomic.Int64, start time.Time) {
	if r.length <= quickLength {
		observe(average, time.Since(start))
	}
}

// replyRead makes the reply to a read of data alone, which is there.
func (r *request) replyRead() {
	data := r.data.bytes[:r.length]
	if !r.client.structured {
		r.replyDone()
		r.parts = append(r.parts, data)
		return
	}
	putChunk(r.head[:], chunkDone, chunkData, r.cookie, 8+r.length)
	binary.BigEndian.PutUint64(r.head[structuredSize:], r.offset)
	r.parts = append(r.parts[:0], r.head[:structuredSize+8], data)
}

func (r *request) read() error {
	defer r.observe(&r.client.readTime, time.Now())
	length := int64(r.length)
	if !r.client.structured {
		r.data = getBuffer(int(length))
		if err := r.readInto(0, length); err != nil {
			return err
		}
		r.replyRead()
		return nil
	}
	if length == 0 {
		putChunk(r.head[:], chunkDone, chunkNone, r.cookie, 0)
		r.parts = append(r.parts, r.head[:structuredSize])
		return nil
	}
	r.runs = append(r.runs[:0], span{0, length, false})
	if r.client.export.mapper != nil && length >= holeLength && r.flags&cmdDontFragment == 0 {
		if err := r.findRuns(); err != nil {
			return err
		}
	}
	if r.data == nil && !(len(r.runs) == 1 && r.runs[0].hole) {
		r.data = getBuffer(int(length))
	}
	for i, run := range r.runs {
		head := &r.head
		if len(r.runs) > 1 {
			if r.heads == nil {
				r.heads = new([maxChunks]chunkHead)
			}
			head = &r.heads[i]
		}
		flags := uint16(0)
		if i == len(r.runs)-1 {
			flags = chunkDone
		}
		binary.BigEndian.PutUint64(head[structuredSize:], r.offset+uint64(run.start))
		if run.hole {
			putChunk(head[:], flags, chunkHole, r.cookie, 12)
			binary.BigEndian.PutUint32(head[structuredSize+8:], uint32(run.length))
			r.parts = append(r.parts, head[:])
			continue
		}
		if err := r.readInto(run.start, run.length); err != nil {
			return err
		}
		putChunk(head[:], flags, chunkData, r.cookie, uint32(8+run.length))
		r.parts = append(r.parts, head[:structuredSize+8], r.data.bytes[run.start:run.start+run.length])
	}
	return nil
}

// readInto reads a part of the request.
func (r *request) readInto(start, length int64) error {
	if length == 0 {
		return nil
	}
	r.one[0] = r.data.bytes[start : start+length]
	return r.client.export.Node.Readv(r.one[:], int64(r.offset)+start)
}

// findRuns divides a read into data and holes.
func (r *request) findRuns() error {
	r.runs = r.runs[:0]
	for at, length := int64(0), int64(r.length); at < length; {
		if len(r.runs) >= maxChunks-1 {
			r.runs = append(r.runs, span{at, length - at, false})
			break
		}
		e, err := r.client.export.mapper.Map(int64(r.offset)+at, length-at)
		if err != nil {
			return err
		}
		n := min(e.Length, length-at)
		if n <= 0 {
			return fmt.Errorf("the disk's map has an extent of %d bytes at %d", e.Length, int64(r.offset)+at)
		}
		hole := e.Zero && n >= holeLength
		if last := len(r.runs) - 1; last >= 0 && r.runs[last].hole == hole {
			r.runs[last].length += n
		} else {
			r.runs = append(r.runs, span{at, n, hole})
		}
		at += n
	}
	return nil
}

// change does what is answered without data.
func (r *request) change() error {
	c := r.client
	node, off, length := c.export.Node, int64(r.offset), int64(r.length)
	var err error
	switch r.command {
	case cmdWrite:
		start := time.Now()
		r.one[0] = r.data.bytes[:length]
		err = node.Writev(r.one[:], off)
		r.observe(&c.writeTime, start)
	case cmdTrim:
		err = node.Discard(off, length)
	case cmdWriteZeroes:
		if r.flags&cmdFastZero != 0 && !c.export.FastZero {
			return unix.EOPNOTSUPP
		}
		err = node.WriteZeroes(off, length, r.flags&cmdNoHole == 0)
	case cmdCache:
		err = r.cache()
	case cmdFlush:
		err = node.Flush()
	}
	if err == nil && r.flags&cmdFUA != 0 && r.command != cmdFlush && r.command != cmdCache {
		err = node.Flush()
	}
	if err != nil {
		return err
	}
	r.replyDone()
	return nil
}

// cache reads the request's bytes so that the host's caches have them.
func (r *request) cache() error {
	r.data = getBuffer(cacheStep)
	for at := int64(0); at < int64(r.length); at += cacheStep {
		r.one[0] = r.data.bytes[:min(cacheStep, int64(r.length)-at)]
		if err := r.client.export.Node.Readv(r.one[:], int64(r.offset)+at); err != nil {
			return err
		}
	}
	return nil
}

// blockStatus makes a reply of one chunk for each context.
func (r *request) blockStatus() error {
	c := r.client
	r.body = r.body[:0]
	heads := make([]byte, len(c.contexts)*(structuredSize+4))
	var ends []int
	for _, context := range c.contexts {
		if err := r.appendExtents(context); err != nil {
			return err
		}
		ends = append(ends, len(r.body))
	}
	start := 0
	for i, context := range c.contexts {
		head := heads[i*(structuredSize+4):][:structuredSize+4]
		flags := uint16(0)
		if i == len(c.contexts)-1 {
			flags = chunkDone
		}
		putChunk(head, flags, chunkBlockStatus, r.cookie, uint32(4+ends[i]-start))
		binary.BigEndian.PutUint32(head[structuredSize:], context)
		r.parts = append(r.parts, head, r.body[start:ends[i]])
		start = ends[i]
	}
	return nil
}

// appendExtents puts what a context tells of the request's bytes into body,
// neighbours that are alike as one; maxExtents of them at most.
func (r *request) appendExtents(context contextID) error {
	first := len(r.body)
	at, end := int64(r.offset), int64(r.offset)+int64(r.length)
	var length int64
	var state uint32
	count := 0
	limit := maxExtents
	if r.flags&cmdReqOne != 0 {
		limit = 1
	}
	for looks := 0; at < end && looks < maxLooks; looks++ {
		n, s, err := r.client.export.extent(context, at, end-at)
		if err != nil {
			return err
		}
		at += n
		if length > 0 && s == state {
			length += n
			continue
		}
		if length > 0 {
			r.appendExtent(length, state)
			if count++; count == limit {
				return nil
			}
		}
		length, state = n, s
	}
	if length > 0 {
		r.appendExtent(length, state)
	}
	if len(r.body) == first {
		return fmt.Errorf("the disk's map has nothing at %d", r.offset)
	}
	return nil
}

func (r *request) appendExtent(length int64, state uint32) {
	r.body = binary.BigEndian.AppendUint32(r.body, uint32(length))
	r.body = binary.BigEndian.AppendUint32(r.body, state)
}
