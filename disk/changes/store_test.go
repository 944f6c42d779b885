package changes

import (
	"errors"
	"io"
	"math/rand/v2"
	"sync"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// memoryStore is a sidecar in memory that knows which writes are not durable yet.
type memoryStore struct {
	mu      sync.Mutex
	b       []byte // as reads see it
	durable []byte
	pending []pendingWrite
	syncs   int
	fail    error // what writes, syncs and replacements end with
	gone    bool  // invalidated
	// each, where not nil, is called before each write and sync, with mu not held.
	each func()
}

type pendingWrite struct {
	at   int64
	data []byte
}

func put(b []byte, at int64, data []byte) []byte {
	if end := int(at) + len(data); end > len(b) {
		b = append(b, make([]byte, end-len(b))...)
	}
	copy(b[at:], data)
	return b
}

func (m *memoryStore) ReadAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if off >= int64(len(m.b)) {
		return 0, io.EOF
	}
	n := copy(p, m.b[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (m *memoryStore) WriteAt(p []byte, off int64) (int, error) {
	if m.each != nil {
		m.each()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail != nil {
		return 0, m.fail
	}
	m.b = put(m.b, off, p)
	m.pending = append(m.pending, pendingWrite{off, append([]byte(nil), p...)})
	return len(p), nil
}

func (m *memoryStore) Sync() error {
	if m.each != nil {
		m.each()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail != nil {
		return m.fail
	}
	m.syncs++
	for _, w := range m.pending {
		m.durable = put(m.durable, w.at, w.data)
	}
	m.pending = nil
	return nil
}

func (m *memoryStore) Replace(content []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail != nil {
		return m.fail
	}
	m.b, m.durable, m.pending, m.gone = append([]byte(nil), content...), append([]byte(nil), content...), nil, false
	return nil
}

func (m *memoryStore) Invalidate() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.gone = true
	m.b, m.durable, m.pending = nil, nil, nil
	return nil
}

func (m *memoryStore) Close() error { return nil }

// crash is what the store holds after a power failure: of the sectors written since
// the last sync some are there and others are not.
func (m *memoryStore) crash(r *rand.Rand) *memoryStore {
	m.mu.Lock()
	defer m.mu.Unlock()
	left := append([]byte(nil), m.durable...)
	for _, w := range m.pending {
		for at := 0; at < len(w.data); {
			n := min(512-int(w.at+int64(at))%512, len(w.data)-at)
			if r.IntN(2) == 0 {
				left = put(left, w.at+int64(at), w.data[at:at+n])
			}
			at += n
		}
	}
	return &memoryStore{b: left, durable: append([]byte(nil), left...)}
}

var errBroken = errors.New("the sidecar's disk is broken")

// disk is a disk of that many bytes, in a file of that name.
type disk struct {
	block.Node
	size int64
	name string
}

func (d disk) Size() int64 { return d.size }
func (d disk) Info() block.Info {
	return block.Info{Format: "raw", Filename: d.name, VirtualSize: d.size}
}
func (d disk) ReadOnly() bool { return false }
