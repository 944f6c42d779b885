package device

import (
	"encoding/json"
	"fmt"
	"reflect"
	"sync"
	"testing"
	"time"
)

// wire is a Line that remembers its level and counts its rising edges.
type wire struct {
	mu    sync.Mutex
	high  bool
	edges int
}

func (w *wire) Set(high bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if high && !w.high {
		w.edges++
	}
	w.high = high
}

func (w *wire) level() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.high
}

func (w *wire) rose() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.edges
}

// requests is a Platform that notes what guests ask for.
type requests struct {
	mu  sync.Mutex
	log []string
}

func (r *requests) note(what string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.log = append(r.log, what)
}

func (r *requests) PowerOff()            { r.note("power off") }
func (r *requests) Reset(why string)     { r.note("reset: " + why) }
func (r *requests) Panicked(k PanicKind) { r.note(fmt.Sprintf("panicked: %d", k)) }

func (r *requests) take() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	taken := r.log
	r.log = nil
	return taken
}

// handClock is a Clock that tests move by hand.
type handClock struct {
	mu  sync.Mutex
	now time.Duration
}

func (c *handClock) Now() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *handClock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now += d
}

// ports is a guest's view of a port bus.
type ports struct{ *Bus }

func (p ports) in(port uint64) uint8 {
	var b [1]byte
	p.Read(port, b[:])
	return b[0]
}

func (p ports) out(port uint64, v uint8) { p.Write(port, []byte{v}) }

func (p ports) in16(port uint64) uint16 {
	var b [2]byte
	p.Read(port, b[:])
	return uint16(b[0]) | uint16(b[1])<<8
}

func (p ports) out16(port uint64, v uint16) { p.Write(port, []byte{byte(v), byte(v >> 8)}) }

func (p ports) in32(port uint64) uint32 {
	var b [4]byte
	p.Read(port, b[:])
	return uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16 | uint32(b[3])<<24
}

// newPorts maps devices on a fresh bus.
func newPorts(t testing.TB, maps ...func(*Bus) error) ports {
	t.Helper()
	b := NewBus("port")
	for _, m := range maps {
		if err := m(b); err != nil {
			t.Fatal(err)
		}
	}
	return ports{b}
}

// throughJSON returns what is left of a state after it was saved and loaded.
func throughJSON[T any](t *testing.T, state T) T {
	t.Helper()
	b, err := json.Marshal(state)
	if err != nil {
		t.Fatal(err)
	}
	var back T
	if err := json.Unmarshal(b, &back); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(state, back) {
		t.Fatalf("state changed by saving:\n%+v\n%+v", state, back)
	}
	return back
}
