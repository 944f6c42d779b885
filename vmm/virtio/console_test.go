package virtio

import (
	"bytes"
	"errors"
	"strings"
	"sync"
	"testing"
)

// sink collects what a guest writes.
type sink struct {
	mu  sync.Mutex
	buf bytes.Buffer // guarded by mu
}

func (s *sink) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.Write(p)
}

func (s *sink) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.String()
}

func newConsole(t *testing.T, config ConsoleConfig) *Console {
	t.Helper()
	c, err := NewConsole(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func TestConsole(t *testing.T) {
	eachRingKind(t, func(t *testing.T, features uint64) {
		var out sink
		c := newConsole(t, ConsoleConfig{Output: &out, Cols: 80, Rows: 25})
		r := newRings(t, c, features|consoleFSize|consoleFEmergency)
		c.Input([]byte("early ")) // before there is a driver
		r.write(barDevice+8, 4, 'E')
		rx, tx := r.add(4, 4, 16), r.add(16, 1, 4096)
		r.up()
		if size := r.read(barDevice, 4); size != 80|25<<16 {
			t.Errorf("size %#x", size)
		}
		tx.send(0, []byte("hello, "), []byte("world"))
		if out.String() != "Ehello, world" {
			t.Errorf("output %q", out.String())
		}
		// More input than the driver has buffers for, and than a buffer holds.
		rx.postAll()
		text := strings.Repeat("all work and no play ", 50)
		go c.Input([]byte(text))
		var got []byte
		for len(got) < len("early ")+len(text) {
			got = append(got, rx.take()...)
		}
		if string(got) != "early "+text {
			t.Errorf("input %q", got)
		}
		c.Resize(132, 43)
		if size := r.read(barDevice, 4); size != 132|43<<16 {
			t.Errorf("size %#x", size)
		}
	})
}

// TestConsoleInputBounded: input waits for the guest, and Close ends that.
func TestConsoleInputBounded(t *testing.T) {
	c := newConsole(t, ConsoleConfig{})
	done := make(chan error)
	go func() { done <- c.InputTo(0, make([]byte, 2*consoleInput)) }()
	c.mu.Lock()
	for len(c.ports[0].state.Input) < consoleInput {
		c.mu.Unlock()
		select {
		case err := <-done:
			t.Fatalf("input did not wait: %v", err)
		default:
		}
		c.mu.Lock()
	}
	c.mu.Unlock()
	c.Close()
	if err := <-done; !errors.Is(err, ErrConsole) {
		t.Errorf("after Close: %v", err)
	}
	if n := len(c.State().Ports[0].Input); n != consoleInput {
		t.Errorf("%d bytes wait", n)
	}
	if err := c.InputTo(1, nil); !errors.Is(err, ErrConsole) {
		t.Errorf("input to a port that is not there: %v", err)
	}
}

// TestConsolePorts goes through the driver's part of multiport.
func TestConsolePorts(t *testing.T) {
	var out, agent sink
	c := newConsole(t, ConsoleConfig{Output: &out, Cols: 80, Rows: 25, Ports: []ConsolePort{{Name: "org.gnomon.agent", Output: &agent}}})
	r := newRings(t, c, consoleFSize|consoleFMultiport)
	r.add(16, 1, 4096)
	r.add(16, 1, 4096)
	ctrlRx, ctrlTx := r.add(16, 8, 256), r.add(16, 1, 4096)
	rx1, tx1 := r.add(16, 2, 256), r.add(16, 1, 4096)
	r.up()
	if n := r.read(barDevice+4, 4); n != 2 {
		t.Errorf("%d ports", n)
	}
	ctrlRx.postAll()
	message := func(port uint32, event, value uint16) []byte {
		return le.AppendUint16(le.AppendUint16(le.AppendUint32(nil, port), event), value)
	}
	expect := func(want []byte) {
		t.Helper()
		if got := ctrlRx.take(); !bytes.Equal(got, want) {
			t.Fatalf("control message %x, want %x", got, want)
		}
	}
	ctrlTx.send(0, message(0, consoleDeviceReady, 1))
	expect(message(0, consoleDeviceAdd, 1))
	expect(message(1, consoleDeviceAdd, 1))
	ctrlTx.send(0, message(0, consolePortReady, 1))
	expect(message(0, consoleConsolePort, 1))
	expect(append(message(0, consoleResize, 0), 80, 0, 25, 0))
	expect(message(0, consolePortOpen, 1))
	ctrlTx.send(0, message(1, consolePortReady, 1))
	expect(append(message(1, consoleName, 1), "org.gnomon.agent"...))
	expect(message(1, consolePortOpen, 1))
	if c.PortOpen(1) {
		t.Error("port 1 is open")
	}
	ctrlTx.send(0, message(1, consolePortOpen, 1))
	if !c.PortOpen(1) {
		t.Error("port 1 is not open")
	}
	tx1.send(0, []byte("pong"))
	if agent.String() != "pong" || out.String() != "" {
		t.Errorf("output %q and %q", agent.String(), out.String())
	}
	rx1.postAll()
	if err := c.InputTo(1, []byte("ping")); err != nil {
		t.Fatal(err)
	}
	if got := rx1.take(); string(got) != "ping" {
		t.Errorf("input %q", got)
	}
	// Messages cut short, for other ports, without meaning.
	for _, m := range [][]byte{message(0, consolePortReady, 1)[:7], message(7, consolePortReady, 1), message(1, 99, 1), {0}} {
		ctrlTx.send(0, m)
	}
	// A driver that asks and never reads.
	for range 1000 {
		ctrlTx.send(0, message(0, consoleDeviceReady, 1))
	}
	if n := len(c.State().Messages); n > c.maxMessages() {
		t.Errorf("%d messages wait", n)
	}
	// State moves to another device.
	if err := c.InputTo(0, []byte("typed ahead")); err != nil {
		t.Fatal(err)
	}
	other := newConsole(t, ConsoleConfig{Ports: []ConsolePort{{Name: "org.gnomon.agent"}}})
	if err := other.SetState(c.State()); err != nil {
		t.Fatal(err)
	}
	if s := other.State(); string(s.Ports[0].Input) != "typed ahead" || !s.Ports[1].Open || s.Rows != 25 {
		t.Errorf("state %+v", s)
	}
	if err := newConsole(t, ConsoleConfig{}).SetState(c.State()); !errors.Is(err, ErrConsole) {
		t.Errorf("state of another device: %v", err)
	}
}
