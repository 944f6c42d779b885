package nbd

import (
	"encoding/binary"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// eventually waits for what others do.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for range 10_000 {
		if is() {
			return
		}
		<-time.After(time.Millisecond)
	}
	t.Fatal("never: ", what)
}

// Clients that read nothing hold no more than all may. Others are served meanwhile, the
// room is given back when they go, and the memory soon after.
func TestRoomOfAll(t *testing.T) {
	var dropped atomic.Int32
	s, address := serve(t, ServerOptions{Report: func(err error) {
		if strings.Contains(err.Error(), "others wait") {
			dropped.Add(1)
		}
	}}, Export{Node: newMemory(64 << 20)})
	free := func() int64 {
		s.room.mu.Lock()
		defer s.room.mu.Unlock()
		return s.room.free
	}
	waiting := func() int {
		s.room.mu.Lock()
		defer s.room.mu.Unlock()
		return len(s.room.queue)
	}
	all := free()
	var greedy []wire
	for range 8 {
		w := newWire(t, address)
		w.enter("", false)
		for i := range 4 {
			w.request(header{command: cmdRead, cookie: uint64(i), length: maxPayload})
		}
		greedy = append(greedy, w)
	}
	eventually(t, "clients wait for room", func() bool { return waiting() > 0 && free() < maxPayload })
	// A client with small requests does not wait.
	small := newWire(t, address)
	small.enter("", false)
	small.request(header{command: cmdRead, cookie: 7, length: 256 << 10})
	if code, cookie := small.simple(); code != 0 || cookie != 7 {
		t.Errorf("error %d of request %d", code, cookie)
	}
	small.read(256 << 10)
	if dropped.Load() > 0 || free() < 0 {
		t.Errorf("%d were disconnected, %d bytes are free", dropped.Load(), free())
	}
	for _, w := range greedy {
		w.conn.Close()
	}
	eventually(t, "room is given back", func() bool { return free() == all && waiting() == 0 })
	eventually(t, "memory is given back", func() bool {
		large.mu.Lock()
		defer large.mu.Unlock()
		return large.spare == 0
	})
}

// A client that does not read is disconnected when others wait for its room.
func TestWhoDoesNotReadGoes(t *testing.T) {
	var dropped atomic.Int32
	s, address := serve(t, ServerOptions{Report: func(err error) {
		dropped.Add(1)
		if !strings.Contains(err.Error(), "others wait") {
			t.Error(err)
		}
	}}, Export{Node: newMemory(64 << 20)})
	s.room.mu.Lock()
	s.room.free = maxPayload
	s.room.mu.Unlock()
	s.stall = 200 * time.Millisecond // nobody is connected yet
	for i, begin := range []func(w wire){
		func(w wire) { w.request(header{command: cmdRead, length: maxPayload}) },
		func(w wire) { w.request(header{command: cmdWrite, length: maxPayload}, 1, 2, 3) }, // and no more
	} {
		idle := newWire(t, address)
		idle.enter("", false)
		begin(idle)
		eventually(t, "the room is taken", func() bool {
			s.room.mu.Lock()
			defer s.room.mu.Unlock()
			return s.room.free == 0
		})
		w := newWire(t, address)
		w.enter("", false)
		w.request(header{command: cmdRead, cookie: 1, length: maxPayload})
		if b := w.read(simpleSize); binary.BigEndian.Uint32(b[4:]) != 0 || dropped.Load() != int32(i+1) {
			t.Errorf("%x; %d were disconnected", b, dropped.Load())
		}
		w.read(maxPayload)
		w.conn.Close()
		eventually(t, "the room is free", func() bool {
			s.room.mu.Lock()
			defer s.room.mu.Unlock()
			return s.room.free == maxPayload
		})
	}
}

// Clients that do not read hold nobody up, as long as they are few.
func TestRoomIsLeft(t *testing.T) {
	_, address := serve(t, ServerOptions{}, Export{Node: newMemory(64 << 20)})
	for range 3 {
		w := newWire(t, address)
		w.enter("", false)
		for i := range 60 {
			w.request(header{command: cmdRead, cookie: uint64(i), length: 1 << 20})
		}
	}
	w := newWire(t, address)
	w.enter("", false)
	for range 100 {
		start := time.Now()
		w.request(header{command: cmdRead, length: maxPayload / 2})
		w.read(simpleSize + maxPayload/2)
		if took := time.Since(start); took > stallTime/2 {
			t.Fatalf("a request took %v", took)
		}
	}
}

// Room goes to clients as the rules say.
func TestRoomIsShared(t *testing.T) {
	r := room{free: 100}
	got := func(w *waiter) bool {
		if w == nil {
			return true
		}
		select {
		case <-w.ready:
			return true
		default:
			return false
		}
	}
	var a, b, c, d share
	if w := r.take(&a, 100); !got(w) {
		t.Error("the first client does not get all that there is")
	}
	r.give(&a, 100)
	for a < 50 {
		if w := r.take(&a, 10); !got(w) {
			t.Fatalf("a client that has %d does not get more", a)
		}
	}
	more := r.take(&a, 10)
	if got(more) {
		t.Error("a client has more than is left")
	}
	if w := r.take(&b, 30); !got(w) {
		t.Error("who has nothing yet waits for who has too much")
	}
	first, second := r.take(&c, 30), r.take(&d, 5)
	if got(first) || got(second) {
		t.Errorf("%d are free, and others got 30, 5", r.free)
	}
	r.give(&a, 50)
	if !got(first) || !got(second) || a != 10 || !got(more) || r.free != 25 {
		t.Errorf("there was enough for all; now %d, %d, %d, %d, and %d are free", a, b, c, d, r.free)
	}
	greedy := r.take(&b, 10)
	r.leave(greedy)
	if got(greedy) || len(r.queue) != 0 {
		t.Error("who has gone waits")
	}
	r.give(&a, 10)
	r.give(&b, 30)
	r.give(&c, 30)
	r.give(&d, 5)
	if r.free != 100 || a+b+c+d != 0 {
		t.Errorf("%d are free", r.free)
	}
}

// A wait for room ends with the connection.
func TestWaitForRoomEnds(t *testing.T) {
	s, address := serve(t, ServerOptions{}, Export{Node: newMemory(64 << 20)})
	s.room.mu.Lock()
	s.room.free = 0
	s.room.mu.Unlock()
	w := newWire(t, address)
	w.enter("", false)
	w.request(header{command: cmdRead, length: maxPayload})
	eventually(t, "it waits", func() bool {
		s.room.mu.Lock()
		defer s.room.mu.Unlock()
		return len(s.room.queue) == 1
	})
	s.Close()
	if len(s.room.queue) != 0 || s.room.free != 0 {
		t.Errorf("%d wait, %d bytes are free", len(s.room.queue), s.room.free)
	}
}
