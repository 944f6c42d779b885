package device

import (
	"encoding/binary"
	"testing"
	"testing/synctest"
	"time"
)

// platform is every plain device on one port bus, as a machine has them.
type platform struct {
	ports
	serial *Serial
	rtc    *RTC
	kbd    *I8042
	power  *Power
	clock  *handClock
	asked  requests
	sent   countingWriter
}

type countingWriter struct{ n int }

func (w *countingWriter) Write(p []byte) (int, error) {
	w.n += len(p)
	return len(p), nil
}

func newPlatform(t testing.TB) *platform {
	p := &platform{clock: &handClock{}}
	p.serial = NewSerial(&wire{}, &p.sent)
	p.rtc = NewRTC(&wire{})
	p.kbd = NewI8042(&p.asked)
	p.power = NewPower(&wire{}, p.clock, &p.asked)
	p.ports = newPorts(t,
		func(b *Bus) error { return p.serial.Map(b, PortCOM1) },
		p.rtc.Map, p.kbd.Map, p.power.Map, NewPVPanic(&p.asked).Map,
		func(b *Bus) error { return b.Map(PortReset, 1, NewResetPort(&p.asked)) },
		func(b *Bus) error { return b.Map(PortBIOSDebug, 1, Ignore{}) })
	return p
}

func (p *platform) close() {
	p.serial.Close()
	p.rtc.Close()
	p.power.Close()
}

// Steps of FuzzPlatformIO: one byte of what, then its operands.
const (
	fuzzRead   = 0 // device, offset
	fuzzWrite  = 1 // device, offset, value
	fuzzInput  = 2 // length
	fuzzBreak  = 3
	fuzzTime   = 4 // seconds
	fuzzPause  = 5
	fuzzResume = 6
	fuzzSave   = 7
	fuzzReset  = 8
	fuzzSteps  = 9
)

// fuzzDevices are the first ports of all devices.
var fuzzDevices = [...]uint64{
	PortCOM1, PortRTC, PortI8042Data, PortI8042Cmd, PortPM1Event, PortPM1Control, PortPMTimer, PortGPE0, PortPVPanic, PortReset, PortBIOSDebug,
}

func FuzzPlatformIO(f *testing.F) {
	// Linux's probe of the UART, its start, and a little traffic.
	f.Add([]byte{
		fuzzRead, 0, 1, fuzzWrite, 0, 1, 0, fuzzWrite, 0, 1, 0x0F, fuzzWrite, 0, 4, 0x1A, fuzzRead, 0, 6,
		fuzzWrite, 0, 3, 0xBF, fuzzWrite, 0, 2, 0, fuzzWrite, 0, 3, 0, fuzzWrite, 0, 2, 1, fuzzRead, 0, 2,
		fuzzWrite, 0, 0, 'a', fuzzInput, 200, fuzzBreak, fuzzRead, 0, 5, fuzzRead, 0, 0, fuzzSave,
	})
	// Setting the clock, an alarm, periodic interrupts.
	f.Add([]byte{
		fuzzWrite, 1, 0, 0x0B, fuzzWrite, 1, 1, 0x82, fuzzWrite, 1, 0, 0x0A, fuzzWrite, 1, 1, 0x76,
		fuzzWrite, 1, 0, 0x09, fuzzWrite, 1, 1, 0x99, fuzzWrite, 1, 0, 0x0B, fuzzWrite, 1, 1, 0x72,
		fuzzWrite, 1, 0, 0x0A, fuzzWrite, 1, 1, 0x23, fuzzTime, 9, fuzzRead, 1, 1, fuzzPause, fuzzResume, fuzzSave,
	})
	// The keyboard controller's probe, power-off, panic and reset.
	f.Add([]byte{
		fuzzWrite, 3, 0, 0xAA, fuzzRead, 2, 0, fuzzWrite, 3, 0, 0x60, fuzzWrite, 2, 0, 0x55, fuzzWrite, 4, 3, 1, fuzzTime, 200,
		fuzzWrite, 5, 1, 0x34, fuzzRead, 6, 0, fuzzWrite, 7, 2, 0xFF, fuzzWrite, 8, 0, 1, fuzzWrite, 9, 0, 6, fuzzReset,
	})
	f.Add([]byte{fuzzWrite, 0, 0xC7, 0xFF}) // 8 bytes at the last register
	f.Fuzz(func(t *testing.T, ops []byte) {
		synctest.Test(t, func(t *testing.T) { fuzzPlatform(t, ops) })
	})
}

// fuzzPlatform does what ops say, in fake time.
func fuzzPlatform(t *testing.T, ops []byte) {
	p := newPlatform(t)
	defer func() { p.close() }()
	next := func() byte {
		if len(ops) == 0 {
			return 0
		}
		b := ops[0]
		ops = ops[1:]
		return b
	}
	var buf [8]byte
	access := func() (port uint64, data []byte) {
		port = fuzzDevices[int(next())%len(fuzzDevices)]
		off := next() // two bits of it are the width
		return port + uint64(off&0x3F), buf[:1<<(off>>6)]
	}
	written := 0
	for len(ops) > 0 {
		switch next() % fuzzSteps {
		case fuzzRead:
			port, data := access()
			p.Read(port, data)
		case fuzzWrite:
			port, data := access()
			v := uint64(next())
			binary.LittleEndian.PutUint64(buf[:], v*0x0101_0101_0101_0101)
			p.Write(port, data)
			written += len(data)
		case fuzzInput:
			p.serial.Input(make([]byte, next()))
		case fuzzBreak:
			p.serial.Break()
		case fuzzTime:
			d := time.Duration(next()) * time.Second
			p.clock.advance(d)
			time.Sleep(d) // the RTC's
		case fuzzPause:
			p.serial.Pause()
			p.rtc.Pause()
		case fuzzResume:
			p.serial.Resume()
			p.rtc.Resume()
		case fuzzSave: // whatever a guest brings about can be restored
			q := newPlatform(t)
			q.clock.now = p.clock.now
			if err := q.serial.Restore(p.serial.State()); err != nil {
				t.Fatal(err)
			}
			if err := q.rtc.Restore(p.rtc.State()); err != nil {
				t.Fatal(err)
			}
			if err := q.power.Restore(p.power.State()); err != nil {
				t.Fatal(err)
			}
			q.kbd.Restore(p.kbd.State())
			q.sent = p.sent
			p.close()
			p = q
		case fuzzReset:
			p.serial.Reset()
			p.rtc.Reset()
			p.kbd.Reset()
			p.power.Reset()
		}
	}
	if s := p.serial.State(); len(s.FIFO) > serialFIFO || len(s.Backlog) > serialBacklog {
		t.Errorf("UART holds %d and %d bytes", len(s.FIFO), len(s.Backlog))
	}
	if p.sent.n > written {
		t.Errorf("%d bytes sent, %d written", p.sent.n, written)
	}
}
