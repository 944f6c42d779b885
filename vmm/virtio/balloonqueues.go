package virtio

import (
	"fmt"
	"slices"
)

// Handle serves one queue.
func (b *Balloon) Handle(q *Queue) error {
	var err error
	switch q.Index() {
	case balloonInflateQueue:
		err = eachChain(q, &b.chains[q.Index()], b.giveFrames)
	case balloonDeflateQueue:
		// The driver may use the pages again at once: they come back when touched.
		err = eachChain(q, &b.chains[q.Index()], func(*Chain) {})
	default:
		b.mu.Lock()
		isStats := q == b.statsQueue
		b.mu.Unlock()
		if isStats {
			err = b.takeStats(q)
		} else {
			err = eachChain(q, &b.chains[q.Index()], b.giveReported)
		}
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrBalloon, err)
	}
	return nil
}

// eachChain pops into c, calls f and returns the chain, until q is empty.
func eachChain(q *Queue, c *Chain, f func(*Chain)) error {
	for {
		ok, err := q.Pop(c)
		if err != nil || !ok {
			return err
		}
		f(c)
		if err := q.Push(c, 0); err != nil {
			return err
		}
	}
}

// giveFrames gives back the pages whose frame numbers c carries.
func (b *Balloon) giveFrames(c *Chain) {
	var number [4]byte
	have := 0
	b.frames = b.frames[:0]
	for i := range c.Read {
		for p := c.Read[i].Data; len(p) > 0; {
			n := copy(number[have:], p)
			p, have = p[n:], have+n
			if have < len(number) {
				continue
			}
			have = 0
			if b.frames = append(b.frames, le.Uint32(number[:])); len(b.frames) == balloonBatch {
				b.giveBatch()
			}
		}
	}
	b.giveBatch()
}

// giveBatch gives back the pages in frames, neighbours by one call.
func (b *Balloon) giveBatch() {
	slices.Sort(b.frames)
	for i := 0; i < len(b.frames); {
		j := i + 1
		for j < len(b.frames) && b.frames[j]-b.frames[j-1] <= 1 {
			j++
		}
		first, last := uint64(b.frames[i]), uint64(b.frames[j-1])
		b.give(first*balloonPage, (last-first+1)*balloonPage)
		i = j
	}
	b.frames = b.frames[:0]
}

// giveReported gives back the pages the driver reports free: c's writable
// buffers are they.
func (b *Balloon) giveReported(c *Chain) {
	for i := range c.Write {
		b.give(c.Write[i].GPA, uint64(len(c.Write[i].Data)))
	}
}

// give gives n bytes from gpa on back to the host. What is not RAM is no loss,
// and pages the host will not take back stay as they are.
func (b *Balloon) give(gpa, n uint64) {
	if b.config.Memory.Discard(gpa, n) != nil {
		return
	}
	b.mu.Lock()
	b.discarded += n
	b.mu.Unlock()
}

// takeStats goes one step towards fresh statistics.
func (b *Balloon) takeStats(q *Queue) error {
	c := &b.chains[q.Index()]
	for {
		b.mu.Lock()
		step := b.statsStep
		b.mu.Unlock()
		if step == statsRest {
			return nil
		}
		ok, err := q.Pop(c)
		if err != nil || !ok {
			return err
		}
		next := statsFresh
		if step == statsFresh {
			stats := parseBalloonStats(c)
			b.mu.Lock()
			b.stats = stats
			b.mu.Unlock()
			next = statsRest
		}
		b.mu.Lock()
		b.statsStep = next
		b.mu.Unlock()
		if err := q.Push(c, 0); err != nil {
			return err
		}
		if next == statsRest && b.config.OnStats != nil {
			b.config.OnStats()
		}
	}
}

// parseBalloonStats reads statistics of ten bytes each: a tag and a value.
func parseBalloonStats(c *Chain) BalloonStats {
	var raw [10 * balloonMaxStats]byte
	size := 0
	for i := range c.Read {
		size += copy(raw[size:], c.Read[i].Data)
	}
	stats := BalloonStats{}
	for p := raw[:size]; len(p) >= 10; p = p[10:] {
		stats[BalloonTag(le.Uint16(p))] = le.Uint64(p[2:])
	}
	return stats
}
