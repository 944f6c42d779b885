package device

import (
	"bytes"
	"fmt"
	"io"
	"sync"
)

// SerialPorts is how many ports a Serial serves.
const SerialPorts = 8

// Registers by port offset. Those at 0 and 1 are the divisor latch while
// LCR.DLAB is set.
const (
	uartData = 0 // RBR, THR
	uartIER  = 1
	uartFCR  = 2 // reads as IIR
	uartLCR  = 3
	uartMCR  = 4
	uartLSR  = 5
	uartMSR  = 6
	uartSCR  = 7
)

// Register bits.
const (
	ierReceive     = 1 << 0
	ierTransmit    = 1 << 1
	ierLineStatus  = 1 << 2
	ierModemStatus = 1 << 3

	iirNone        = 0x01
	iirModemStatus = 0x00
	iirTransmit    = 0x02
	iirReceive     = 0x04
	iirLineStatus  = 0x06
	iirTimeout     = 0x0C
	iirFIFO        = 0xC0

	fcrEnable       = 1 << 0
	fcrClearReceive = 1 << 1
	fcrTrigger      = 0xC0

	lcrDLAB = 1 << 7

	mcrDTR      = 1 << 0
	mcrRTS      = 1 << 1
	mcrOUT1     = 1 << 2
	mcrOUT2     = 1 << 3
	mcrLoopback = 1 << 4

	lsrReady   = 1 << 0
	lsrOverrun = 1 << 1
	lsrBreak   = 1 << 4
	lsrTHRE    = 1 << 5
	lsrIdle    = 1 << 6

	msrDeltaCTS    = 1 << 0
	msrDeltaDSR    = 1 << 1
	msrTrailingRI  = 1 << 2
	msrDeltaDCD    = 1 << 3
	msrCTS         = 1 << 4
	msrDSR         = 1 << 5
	msrRI          = 1 << 6
	msrDCD         = 1 << 7
	msrLines       = msrCTS | msrDSR | msrRI | msrDCD
	msrPeerPresent = msrCTS | msrDSR | msrDCD
)

const (
	serialFIFO = 16
	// serialBacklog is how much input waits behind the FIFO. It is more than
	// Linux takes in one interrupt, so a paste costs few of them.
	serialBacklog = 1024
)

// Serial is a 16550A UART (National Semiconductor PC16550D). The line has no
// speed: a byte is out as soon as it is written, so the transmitter is always
// empty, and input is there as soon as it comes. For the same reason input
// below the FIFO's trigger level interrupts at once, as a timeout does. As in
// QEMU, the interrupt does not depend on OUT2.
//
// Output goes to the writer on the vCPU's thread: how long a stalled peer may
// hold it up, and what is lost then, is the writer's business (package chardev
// bounds it).
type Serial struct {
	irq Line
	out io.Writer

	mu     sync.Mutex
	room   *sync.Cond  // input may be taken, or none ever will
	s      SerialState // guarded by mu
	line   bool        // guarded by mu: level of irq
	paused bool        // guarded by mu
	closed bool        // guarded by mu
}

// SerialState is what of a Serial survives a checkpoint.
type SerialState struct {
	IER, LCR, MCR, SCR uint8
	FCR                uint8 // enable and trigger level
	LSR                uint8 // overrun and break; the rest follows from FIFO
	MSR                uint8
	Divisor            uint16
	TransmitPending    bool   // the transmitter's interrupt was not yet seen
	FIFO               []byte // received, at most 16 bytes
	Backlog            []byte // input behind the FIFO, at most 1024 bytes
}

// NewSerial returns a UART that interrupts by irq and writes what the guest
// sends to out.
func NewSerial(irq Line, out io.Writer) *Serial {
	s := &Serial{irq: irq, out: out}
	s.room = sync.NewCond(&s.mu)
	s.s = SerialState{FIFO: make([]byte, 0, serialFIFO), Backlog: make([]byte, 0, serialBacklog)}
	s.Reset()
	return s
}

// Map puts the UART on a port bus, at base.
func (s *Serial) Map(ports *Bus, base uint64) error { return ports.Map(base, SerialPorts, s) }

// Reset brings the UART to power-on state. Input that the guest has not seen
// yet stays for the next boot.
func (s *Serial) Reset() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.s = SerialState{
		MSR:     msrPeerPresent,
		Divisor: 12, // 9600 baud
		FIFO:    s.s.FIFO[:0],
		Backlog: s.s.Backlog,
	}
	s.refill()
	s.update()
}

// Input hands bytes from the host to the guest, as many as there is room for,
// and returns how many it took: none while paused or after Close.
func (s *Serial) Input(p []byte) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.take(p)
}

// Feed hands all of p to the guest. It waits for the guest to make room, and
// returns early only after Close.
func (s *Serial) Feed(p []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		p = p[s.take(p):]
		if len(p) == 0 || s.closed {
			return
		}
		s.room.Wait()
	}
}

// take is Input; the caller holds mu.
func (s *Serial) take(p []byte) int {
	if s.paused || s.closed || len(p) == 0 {
		return 0
	}
	n := min(len(p), serialBacklog-len(s.s.Backlog))
	s.s.Backlog = append(s.s.Backlog, p[:n]...)
	s.refill()
	s.update()
	return n
}

// Break sends the guest a break, which Linux takes for the SysRq key.
func (s *Serial) Break() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.paused || s.closed || s.loopback() {
		return
	}
	if len(s.s.FIFO) < s.depth() {
		s.s.FIFO = append(s.s.FIFO, 0)
	}
	s.s.LSR |= lsrBreak
	s.update()
}

// Pause stops input until Resume; a Feed under way waits. What the guest does
// is not affected: its vCPUs stand still.
func (s *Serial) Pause() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.paused = true
}

// Resume ends Pause.
func (s *Serial) Resume() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.paused = false
	s.room.Broadcast()
}

// Close ends input for good: every Feed returns. It does not close the writer.
func (s *Serial) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.room.Broadcast()
}

// State returns what must survive a checkpoint.
func (s *Serial) State() SerialState {
	s.mu.Lock()
	defer s.mu.Unlock()
	state := s.s
	state.FIFO, state.Backlog = bytes.Clone(state.FIFO), bytes.Clone(state.Backlog)
	return state
}

// Restore takes over saved state and drives the interrupt line accordingly.
func (s *Serial) Restore(state SerialState) error {
	if depth := fifoDepth(state.FCR); len(state.FIFO) > depth || len(state.Backlog) > serialBacklog {
		return fmt.Errorf("%w: serial port: %d bytes received and %d waiting, at most %d and %d fit",
			ErrState, len(state.FIFO), len(state.Backlog), depth, serialBacklog)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	state.FIFO = append(s.s.FIFO[:0], state.FIFO...)
	state.Backlog = append(s.s.Backlog[:0], state.Backlog...)
	state.IER &= 0x0F
	state.FCR &= fcrEnable | fcrTrigger
	state.LSR &= lsrOverrun | lsrBreak
	s.s = state
	s.refill()
	s.update()
	s.irq.Set(s.line) // whatever it was before
	return nil
}

// Read reads registers, byte by byte.
func (s *Serial) Read(off uint64, p []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range p {
		p[i] = s.read((off + uint64(i)) % SerialPorts)
	}
}

func (s *Serial) read(reg uint64) uint8 {
	switch reg {
	case uartData:
		if s.s.LCR&lcrDLAB != 0 {
			return uint8(s.s.Divisor)
		}
		return s.receive()
	case uartIER:
		if s.s.LCR&lcrDLAB != 0 {
			return uint8(s.s.Divisor >> 8)
		}
		return s.s.IER
	case uartFCR:
		iir := s.cause()
		if iir == iirTransmit {
			s.s.TransmitPending = false
			s.update()
		}
		if s.s.FCR&fcrEnable != 0 {
			iir |= iirFIFO
		}
		return iir
	case uartLCR:
		return s.s.LCR
	case uartMCR:
		return s.s.MCR
	case uartLSR:
		v := s.s.LSR | lsrTHRE | lsrIdle
		if len(s.s.FIFO) > 0 {
			v |= lsrReady
		}
		s.s.LSR = 0
		s.update()
		return v
	case uartMSR:
		v := s.s.MSR
		s.s.MSR &= msrLines
		s.update()
		return v
	}
	return s.s.SCR
}

// receive takes the next byte out of the FIFO; 0 when there is none.
func (s *Serial) receive() uint8 {
	if len(s.s.FIFO) == 0 {
		return 0
	}
	v := s.s.FIFO[0]
	s.s.FIFO = s.s.FIFO[:copy(s.s.FIFO, s.s.FIFO[1:])]
	s.refill()
	s.update()
	return v
}

// Write writes registers, byte by byte.
func (s *Serial) Write(off uint64, p []byte) {
	for i := range p {
		s.mu.Lock()
		send := s.write((off+uint64(i))%SerialPorts, p[i])
		s.mu.Unlock()
		// Without the lock, so that a slow peer holds up the sender alone.
		if send {
			s.out.Write(p[i : i+1]) // a byte that cannot be sent is lost, as on a wire
		}
	}
}

// write writes one register; it tells whether v is to be sent.
func (s *Serial) write(reg uint64, v uint8) (send bool) {
	defer s.update()
	switch reg {
	case uartData:
		if s.s.LCR&lcrDLAB != 0 {
			s.s.Divisor = s.s.Divisor&0xFF00 | uint16(v)
			return false
		}
		s.s.TransmitPending = true // empty again at once
		if !s.loopback() {
			return true
		}
		if len(s.s.FIFO) >= s.depth() {
			s.s.LSR |= lsrOverrun
		} else {
			s.s.FIFO = append(s.s.FIFO, v)
		}
	case uartIER:
		if s.s.LCR&lcrDLAB != 0 {
			s.s.Divisor = s.s.Divisor&0x00FF | uint16(v)<<8
			return false
		}
		// Enabling the interrupt while the transmitter is empty raises it
		// again, even if IIR has told of it before.
		if v&^s.s.IER&ierTransmit != 0 {
			s.s.TransmitPending = true
		}
		s.s.IER = v & 0x0F
	case uartFCR:
		if (v^s.s.FCR)&fcrEnable != 0 || v&fcrClearReceive != 0 {
			s.s.FIFO = s.s.FIFO[:0]
		}
		s.s.FCR = v & (fcrEnable | fcrTrigger)
		s.refill()
	case uartLCR:
		s.s.LCR = v
	case uartMCR:
		s.s.MCR = v & 0x1F
		s.followModem()
		s.refill()
	case uartSCR:
		s.s.SCR = v
	}
	return false
}

func (s *Serial) loopback() bool { return s.s.MCR&mcrLoopback != 0 }

// depth is how many received bytes fit.
func (s *Serial) depth() int { return fifoDepth(s.s.FCR) }

func fifoDepth(fcr uint8) int {
	if fcr&fcrEnable != 0 {
		return serialFIFO
	}
	return 1
}

// refill moves input into the FIFO when all of it fits or the FIFO is empty: in
// batches, so that neither interrupts nor copying come byte by byte. In
// loopback the line is not connected.
func (s *Serial) refill() {
	free := s.depth() - len(s.s.FIFO)
	if s.loopback() || len(s.s.Backlog) == 0 || len(s.s.FIFO) > 0 && len(s.s.Backlog) > free {
		return
	}
	n := min(len(s.s.Backlog), free)
	s.s.FIFO = append(s.s.FIFO, s.s.Backlog[:n]...)
	s.s.Backlog = s.s.Backlog[:copy(s.s.Backlog, s.s.Backlog[n:])]
	s.room.Broadcast()
}

// followModem sets the modem lines: the peer's, or our own in loopback.
func (s *Serial) followModem() {
	lines := uint8(msrPeerPresent)
	if s.loopback() {
		lines = 0
		for _, wire := range [...]struct{ from, to uint8 }{{mcrDTR, msrDSR}, {mcrRTS, msrCTS}, {mcrOUT1, msrRI}, {mcrOUT2, msrDCD}} {
			if s.s.MCR&wire.from != 0 {
				lines |= wire.to
			}
		}
	}
	changed := (lines ^ s.s.MSR) & msrLines
	for _, wire := range [...]struct{ line, delta uint8 }{{msrCTS, msrDeltaCTS}, {msrDSR, msrDeltaDSR}, {msrDCD, msrDeltaDCD}} {
		if changed&wire.line != 0 {
			s.s.MSR |= wire.delta
		}
	}
	if changed&msrRI != 0 && lines&msrRI == 0 {
		s.s.MSR |= msrTrailingRI
	}
	s.s.MSR = s.s.MSR&^msrLines | lines
}

// cause is the most urgent enabled interrupt, as IIR encodes it.
func (s *Serial) cause() uint8 {
	switch {
	case s.s.IER&ierLineStatus != 0 && s.s.LSR != 0:
		return iirLineStatus
	case s.s.IER&ierReceive != 0 && len(s.s.FIFO) > 0:
		if s.s.FCR&fcrEnable != 0 && len(s.s.FIFO) < s.trigger() {
			return iirTimeout
		}
		return iirReceive
	case s.s.IER&ierTransmit != 0 && s.s.TransmitPending:
		return iirTransmit
	case s.s.IER&ierModemStatus != 0 && s.s.MSR&^msrLines != 0:
		return iirModemStatus
	}
	return iirNone
}

// trigger is the FIFO's trigger level in bytes.
func (s *Serial) trigger() int {
	return [...]int{1, 4, 8, 14}[s.s.FCR>>6]
}

// update drives the interrupt line.
func (s *Serial) update() {
	if level := s.cause() != iirNone; level != s.line {
		s.line = level
		s.irq.Set(level)
	}
}
