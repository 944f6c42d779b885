package device

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"

	"pgregory.net/rapid"
)

// uart is a guest's view of a Serial.
type uart struct {
	ports
	irq *wire
	dev *Serial
	out *bytes.Buffer
}

func newUART(t testing.TB) *uart {
	u := &uart{irq: &wire{}, out: &bytes.Buffer{}}
	u.dev = NewSerial(u.irq, u.out)
	u.ports = newPorts(t, func(b *Bus) error { return u.dev.Map(b, PortCOM1) })
	return u
}

func (u *uart) get(reg uint64) uint8    { return u.in(PortCOM1 + reg) }
func (u *uart) put(reg uint64, v uint8) { u.ports.out(PortCOM1+reg, v) }

// The steps by which Linux's 8250 driver (autoconfig, autoconfig_16550a) tells
// a 16550A from everything else.
func TestSerialLinuxAutoconfig(t *testing.T) {
	u := newUART(t)
	ier := u.get(uartIER)
	u.put(uartIER, 0)
	if v := u.get(uartIER) & 0x0F; v != 0 {
		t.Fatalf("IER is %#x after 0 was written", v)
	}
	u.put(uartIER, 0x0F)
	if v := u.get(uartIER) & 0x0F; v != 0x0F {
		t.Fatalf("IER is %#x after 0x0F was written", v)
	}
	u.put(uartIER, ier)

	mcr, lcr := u.get(uartMCR), u.get(uartLCR)
	u.put(uartMCR, mcrLoopback|0x0A)
	if v := u.get(uartMSR) & 0xF0; v != 0x90 {
		t.Fatalf("MSR is %#x in loopback with RTS and OUT2, want 0x90", v)
	}
	u.put(uartMCR, mcr)

	u.put(uartLCR, 0xBF)
	u.put(uartFCR, 0) // would be EFR
	u.put(uartLCR, 0)
	u.put(uartFCR, fcrEnable)
	if v := u.get(uartFCR) >> 6; v != 3 {
		t.Fatalf("IIR's top bits are %d, want 3: a 16550A", v)
	}

	// No EFR at offset 2, neither with DLAB nor with the magic LCR.
	for _, mode := range []uint8{lcrDLAB, 0xBF} {
		u.put(uartLCR, mode)
		if u.get(uartFCR) == 0 {
			t.Errorf("EFR found with LCR %#x", mode)
		}
	}
	// Not a National Semiconductor chip: bank 2 does not follow MCR's loopback bit.
	u.put(uartLCR, 0)
	status1 := u.get(uartMCR)
	u.put(uartLCR, 0xE0)
	before := u.get(2)
	u.put(uartLCR, 0)
	u.put(uartMCR, status1^mcrLoopback)
	u.put(uartLCR, 0xE0)
	after := u.get(2)
	u.put(uartLCR, 0)
	u.put(uartMCR, status1)
	if (before^status1)&mcrLoopback == 0 && (after^status1)&mcrLoopback != 0 {
		t.Error("taken for a NS16550A")
	}
	// Not a TI16750: bit 5 of IIR never shows.
	for _, mode := range []uint8{0, lcrDLAB} {
		u.put(uartLCR, mode)
		u.put(uartFCR, fcrEnable|1<<5)
		if v := u.get(uartFCR) >> 5; v != 6 {
			t.Errorf("64-byte FIFO found with LCR %#x: IIR>>5 is %d", mode, v)
		}
		u.put(uartFCR, fcrEnable)
	}
	u.put(uartLCR, 0)
	// Not an XScale UART: IER has no bit 6.
	u.put(uartIER, 1<<6)
	if u.get(uartIER)&(1<<6) != 0 {
		t.Error("IER keeps bit 6")
	}
	u.put(uartIER, 0)

	// The FIFO's size, by loopback.
	u.put(uartFCR, fcrEnable|fcrClearReceive|1<<2)
	u.put(uartMCR, mcrLoopback)
	for i := range 256 {
		u.put(uartData, uint8(i))
	}
	n := 0
	for ; u.get(uartLSR)&lsrReady != 0 && n < 256; n++ {
		if v := u.get(uartData); v != uint8(n) {
			t.Errorf("byte %d came back as %d", n, v)
		}
	}
	if n != 16 {
		t.Errorf("FIFO takes %d bytes, want 16", n)
	}
	u.put(uartMCR, mcr)
	u.put(uartLCR, lcr)
	if u.out.Len() != 0 {
		t.Errorf("loopback sent % x", u.out.Bytes())
	}
}

// serial8250_do_startup's tests of the transmitter's interrupt.
func TestSerialLinuxStartup(t *testing.T) {
	u := newUART(t)
	for i := range 3 {
		u.put(uartIER, ierTransmit)
		if iir := u.get(uartFCR); iir&iirNone != 0 {
			t.Fatalf("round %d: THRE interrupt is not raised when it is enabled: IIR %#x", i, iir)
		}
		if u.irq.level() || u.get(uartFCR)&iirNone == 0 {
			t.Fatalf("round %d: reading IIR did not clear the THRE interrupt", i)
		}
		u.put(uartIER, 0)
	}
	u.put(uartIER, ierTransmit)
	if lsr, iir := u.get(uartLSR), u.get(uartFCR); lsr&lsrIdle != 0 && iir&iirNone != 0 {
		t.Error("taken for a UART with UART_BUG_TXEN")
	}
	u.put(uartIER, 0)
	if u.get(uartLSR) == 0xFF {
		t.Error("LSR reads as if nobody were there")
	}
}

// A driver as Linux's: interrupts are edges, and the handler runs until IIR
// tells of none.
func TestSerialDriver(t *testing.T) {
	u := newUART(t)
	u.put(uartFCR, fcrEnable|0x80)
	u.put(uartMCR, mcrOUT2|mcrDTR|mcrRTS)
	u.put(uartIER, ierReceive|ierLineStatus|ierModemStatus)
	u.get(uartMSR)

	send := []byte(strings.Repeat("0123456789abcdef-", 200))
	want := bytes.Clone(send)
	var received []byte
	handled := 0
	interrupt := func() {
		for handled < u.irq.rose() {
			handled = u.irq.rose()
			for u.get(uartFCR)&iirNone == 0 {
				lsr := u.get(uartLSR)
				for n := 0; lsr&lsrReady != 0 && n < 256; n++ {
					received = append(received, u.get(uartData))
					lsr = u.get(uartLSR)
				}
				u.get(uartMSR)
				if lsr&lsrTHRE != 0 && u.get(uartIER)&ierTransmit != 0 {
					n := min(16, len(send))
					for _, c := range send[:n] {
						u.put(uartData, c)
					}
					if send = send[n:]; len(send) == 0 {
						u.put(uartIER, u.get(uartIER)&^ierTransmit)
					}
				}
			}
		}
	}
	u.put(uartIER, u.get(uartIER)|ierTransmit) // start_tx
	interrupt()
	if !bytes.Equal(u.out.Bytes(), want) {
		t.Errorf("sent %d bytes, want %d", u.out.Len(), len(want))
	}

	var fed []byte
	for n := range 600 {
		p := bytes.Repeat([]byte{byte(n)}, n%40)
		if got := u.dev.Input(p); got != len(p) {
			t.Fatalf("took %d of %d bytes", got, len(p))
		}
		fed = append(fed, p...)
		if n%3 == 0 {
			interrupt()
		}
	}
	interrupt()
	if !bytes.Equal(received, fed) {
		t.Errorf("received %d bytes, want %d", len(received), len(fed))
	}
	if u.irq.level() {
		t.Error("interrupt is still raised")
	}
}

// A UART as simple as can be, to compare with: one endless queue, registers in
// an array, no batches.
type modelUART struct {
	reg              [8]uint8
	divisor          [2]uint8
	queue            []byte // visible first, then what waits
	visible          int
	overrun, broken  bool
	thre             bool
	sent             []byte
	lines, lineDelta uint8
}

func (m *modelUART) depth() int {
	if m.reg[uartFCR]&1 != 0 {
		return 16
	}
	return 1
}

func (m *modelUART) cause() uint8 {
	ier := m.reg[uartIER]
	if ier&4 != 0 && (m.overrun || m.broken) {
		return 6
	}
	if ier&1 != 0 && m.visible > 0 {
		level := map[uint8]int{0: 1, 1: 4, 2: 8, 3: 14}[m.reg[uartFCR]>>6]
		if m.reg[uartFCR]&1 != 0 && m.visible < level {
			return 0xC
		}
		return 4
	}
	if ier&2 != 0 && m.thre {
		return 2
	}
	if ier&8 != 0 && m.lineDelta != 0 {
		return 0
	}
	return 1
}

func (m *modelUART) fill() {
	if m.reg[uartMCR]&0x10 != 0 {
		return
	}
	if m.visible == 0 || len(m.queue) <= m.depth() {
		m.visible = min(len(m.queue), m.depth())
	}
}

func (m *modelUART) modem() {
	old := m.lines
	m.lines = 0xB0
	if mcr := m.reg[uartMCR]; mcr&0x10 != 0 {
		m.lines = mcr&1<<5 | mcr&2<<3 | mcr&4<<4 | mcr&8<<4
	}
	m.lineDelta |= (old^m.lines)>>4&0xB | old&^m.lines>>4&4
}

func (m *modelUART) read(reg uint64) uint8 {
	dlab := m.reg[uartLCR]&0x80 != 0
	switch {
	case reg < 2 && dlab:
		return m.divisor[reg]
	case reg == uartData:
		if m.visible == 0 {
			return 0
		}
		v := m.queue[0]
		m.queue, m.visible = m.queue[1:], m.visible-1
		m.fill()
		return v
	case reg == uartFCR:
		v := m.cause()
		if v == 2 {
			m.thre = false
		}
		if m.reg[uartFCR]&1 != 0 {
			v |= 0xC0
		}
		return v
	case reg == uartLSR:
		v := uint8(0x60)
		if m.visible > 0 {
			v |= 1
		}
		if m.overrun {
			v |= 2
		}
		if m.broken {
			v |= 0x10
		}
		m.overrun, m.broken = false, false
		return v
	case reg == uartMSR:
		v := m.lines | m.lineDelta
		m.lineDelta = 0
		return v
	}
	return m.reg[reg]
}

func (m *modelUART) write(reg uint64, v uint8) {
	dlab := m.reg[uartLCR]&0x80 != 0
	switch {
	case reg < 2 && dlab:
		m.divisor[reg] = v
	case reg == uartData:
		m.thre = true
		if m.reg[uartMCR]&0x10 == 0 {
			m.sent = append(m.sent, v)
		} else if m.visible >= m.depth() {
			m.overrun = true
		} else {
			rest := bytes.Clone(m.queue[m.visible:])
			m.queue = append(append(m.queue[:m.visible:m.visible], v), rest...)
			m.visible++
		}
	case reg == uartIER:
		m.thre = m.thre || v&2 != 0 && m.reg[uartIER]&2 == 0
		m.reg[reg] = v & 0xF
	case reg == uartFCR:
		if v&2 != 0 || (v^m.reg[uartFCR])&1 != 0 {
			m.queue, m.visible = m.queue[m.visible:], 0
		}
		m.reg[reg] = v & 0xC1
		m.fill()
	case reg == uartMCR:
		m.reg[reg] = v & 0x1F
		m.modem()
		m.fill()
	case reg == uartLCR || reg == uartSCR:
		m.reg[reg] = v
	}
}

func TestSerialAgainstModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		u := newUART(t)
		m := &modelUART{lines: 0xB0, divisor: [2]uint8{12, 0}}
		// Mostly out of DLAB, mostly interesting values.
		value := rapid.OneOf(rapid.Uint8(), rapid.SampledFrom([]uint8{0, 1, 2, 3, 0x0F, 0x10, 0xC1, 0x41}))
		rt.Repeat(map[string]func(*rapid.T){
			"read": func(rt *rapid.T) {
				reg := rapid.Uint64Range(0, 7).Draw(rt, "reg")
				if got, want := u.get(reg), m.read(reg); got != want {
					rt.Fatalf("register %d is %#x, want %#x", reg, got, want)
				}
			},
			"write": func(rt *rapid.T) {
				reg, v := rapid.Uint64Range(0, 7).Draw(rt, "reg"), value.Draw(rt, "value")
				u.put(reg, v)
				m.write(reg, v)
			},
			"leave DLAB": func(*rapid.T) {
				u.put(uartLCR, 3)
				m.write(uartLCR, 3)
			},
			"input": func(rt *rapid.T) {
				p := rapid.SliceOfN(rapid.Byte(), 0, 40).Draw(rt, "input")
				n := u.dev.Input(p)
				if n != len(p) && len(m.queue) < serialBacklog-len(p) {
					rt.Fatalf("took %d of %d bytes with %d waiting", n, len(p), len(m.queue))
				}
				m.queue = append(m.queue, p[:n]...)
				m.fill()
			},
			"break": func(*rapid.T) {
				u.dev.Break()
				if m.reg[uartMCR]&0x10 != 0 {
					return
				}
				m.broken = true
				if m.visible < m.depth() {
					rest := bytes.Clone(m.queue[m.visible:])
					m.queue = append(append(m.queue[:m.visible:m.visible], 0), rest...)
					m.visible++
				}
			},
			"save and restore": func(rt *rapid.T) {
				state := throughJSON(t, u.dev.State())
				fresh := newUART(t)
				if err := fresh.dev.Restore(state); err != nil {
					rt.Fatal(err)
				}
				fresh.out.Write(u.out.Bytes())
				u = fresh
			},
			"": func(rt *rapid.T) {
				if got, want := u.irq.level(), m.cause() != 1; got != want {
					rt.Fatalf("interrupt line is %v, want %v", got, want)
				}
				if !bytes.Equal(u.out.Bytes(), m.sent) {
					rt.Fatalf("sent % x, want % x", u.out.Bytes(), m.sent)
				}
			},
		})
	})
}

func TestSerialFeedWaitsForRoom(t *testing.T) {
	u := newUART(t)
	u.put(uartFCR, fcrEnable)
	want := make([]byte, 10*serialBacklog)
	for i := range want {
		want[i] = byte(i * 7)
	}
	var feeder sync.WaitGroup
	feeder.Go(func() { u.dev.Feed(want) })
	var got []byte
	for len(got) < len(want) {
		if u.get(uartLSR)&lsrReady != 0 {
			got = append(got, u.get(uartData))
		}
	}
	feeder.Wait()
	if !bytes.Equal(got, want) {
		t.Error("input came out different")
	}
}

func TestSerialPauseAndClose(t *testing.T) {
	u := newUART(t)
	u.dev.Pause()
	if n := u.dev.Input([]byte("x")); n != 0 {
		t.Errorf("took %d bytes while paused", n)
	}
	u.dev.Break()
	if s := u.dev.State(); len(s.FIFO) != 0 || s.LSR != 0 {
		t.Errorf("paused UART changed: %+v", s)
	}
	var feeder sync.WaitGroup
	feeder.Go(func() { u.dev.Feed([]byte("later")) })
	u.dev.Resume()
	feeder.Wait()
	if s := u.dev.State(); string(s.FIFO)+string(s.Backlog) != "later" {
		t.Errorf("after Resume the UART holds %q and %q", s.FIFO, s.Backlog)
	}
	feeder.Go(func() { u.dev.Feed(make([]byte, 2*serialBacklog)) })
	u.dev.Close()
	feeder.Wait() // or the test never ends
	if n := u.dev.Input([]byte("x")); n != 0 {
		t.Errorf("took %d bytes after Close", n)
	}
}

func TestSerialInputIsBounded(t *testing.T) {
	u := newUART(t)
	total := 0
	for range 1000 {
		total += u.dev.Input(make([]byte, 100))
	}
	if total > serialBacklog+serialFIFO {
		t.Errorf("took %d bytes from a host while the guest read none", total)
	}
}

func TestSerialRestoreRefuses(t *testing.T) {
	for name, s := range map[string]SerialState{
		"FIFO too long":             {FCR: fcrEnable, FIFO: make([]byte, 17)},
		"FIFO while it is disabled": {FIFO: make([]byte, 2)},
		"backlog too long":          {FCR: fcrEnable, Backlog: make([]byte, serialBacklog+1)},
	} {
		if err := newUART(t).dev.Restore(s); !errors.Is(err, ErrState) {
			t.Errorf("%s: %v, want ErrState", name, err)
		}
	}
}

func TestSerialRestoreDrivesTheLine(t *testing.T) {
	u := newUART(t)
	u.irq.high = true // another life's
	if err := u.dev.Restore(SerialState{}); err != nil || u.irq.level() {
		t.Errorf("line is %v, err %v", u.irq.level(), err)
	}
	if err := u.dev.Restore(SerialState{IER: ierReceive, FIFO: []byte("a")}); err != nil || !u.irq.level() {
		t.Errorf("line is %v, err %v", u.irq.level(), err)
	}
}

func TestSerialAllocatesNothing(t *testing.T) {
	dev := NewSerial(&wire{}, io.Discard)
	bus := NewBus("port")
	if err := dev.Map(bus, PortCOM1); err != nil {
		t.Fatal(err)
	}
	bus.Write(PortCOM1+uartFCR, []byte{fcrEnable})
	p, in := make([]byte, 1), []byte("input that is longer than the FIFO is")
	if n := testing.AllocsPerRun(1000, func() {
		bus.Write(PortCOM1, p)
		bus.Read(PortCOM1+uartLSR, p)
		dev.Input(in)
		for range in {
			bus.Read(PortCOM1, p)
		}
	}); n != 0 {
		t.Errorf("%v allocations a run", n)
	}
}

func TestSerialTriggerLevels(t *testing.T) {
	for fcr, level := range map[uint8]int{0x00: 1, 0x40: 4, 0x80: 8, 0xC0: 14} {
		u := newUART(t)
		u.put(uartFCR, fcr|fcrEnable)
		u.put(uartIER, ierReceive)
		for n := 1; n <= serialFIFO; n++ {
			u.dev.Input([]byte{byte(n)})
			want := uint8(iirFIFO | iirTimeout)
			if n >= level {
				want = iirFIFO | iirReceive
			}
			if iir := u.get(uartFCR); iir != want || !u.irq.level() {
				t.Errorf("FCR %#x: IIR is %#x with %d bytes received, want %#x", fcr, iir, n, want)
			}
		}
	}
}

// In loopback the modem's lines follow MCR, and MSR tells of changes; of the
// ring indicator only that it ended.
func TestSerialModemLines(t *testing.T) {
	u := newUART(t)
	u.put(uartIER, ierModemStatus)
	for i, step := range []struct{ mcr, msr uint8 }{
		{mcrLoopback, msrDeltaCTS | msrDeltaDSR | msrDeltaDCD},
		{mcrLoopback | mcrDTR, msrDSR | msrDeltaDSR},
		{mcrLoopback | mcrDTR, msrDSR},
		{mcrLoopback | mcrRTS, msrCTS | msrDeltaCTS | msrDeltaDSR},
		{mcrLoopback | mcrRTS | mcrOUT1, msrCTS | msrRI},
		{mcrLoopback | mcrRTS, msrCTS | msrTrailingRI},
		{mcrLoopback | mcrRTS | mcrOUT2, msrCTS | msrDCD | msrDeltaDCD},
		{0, msrCTS | msrDSR | msrDCD | msrDeltaDSR},
	} {
		u.put(uartMCR, step.mcr)
		if changed := step.msr&^uint8(msrLines) != 0; u.irq.level() != changed {
			t.Errorf("step %d: interrupt line is %v, want %v", i, u.irq.level(), changed)
		}
		if v := u.get(uartMSR); v != step.msr {
			t.Errorf("step %d: MSR is %#x, want %#x", i, v, step.msr)
		}
	}
}
