package device

import (
	"fmt"
	"sync"
	"time"
)

// RTCPorts is how many ports an RTC serves: index and data.
const RTCPorts = 2

// RTCCentury is the CMOS byte that holds the century, as the FADT says.
const RTCCentury = 0x32

// CMOS bytes. Those below rtcRegA are the time and the alarm.
const (
	rtcSecond      = 0x00
	rtcSecondAlarm = 0x01
	rtcMinute      = 0x02
	rtcMinuteAlarm = 0x03
	rtcHour        = 0x04
	rtcHourAlarm   = 0x05
	rtcWeekday     = 0x06
	rtcDay         = 0x07
	rtcMonth       = 0x08
	rtcYear        = 0x09
	rtcRegA        = 0x0A
	rtcRegB        = 0x0B
	rtcRegC        = 0x0C
	rtcRegD        = 0x0D

	cmosBaseMemory    = 0x15 // KiB below 1 MiB, 2 bytes
	cmosExtMemory     = 0x17 // KiB above 1 MiB, 2 bytes, at most 0xFFFF
	cmosExtMemoryCopy = 0x30 // the same again
	cmosMemory16M     = 0x34 // 64 KiB units above 16 MiB, 2 bytes
	cmosMemory4G      = 0x5B // 64 KiB units above 4 GiB, 3 bytes
	cmosCPUs          = 0x5F // vCPUs but one
	cmosSize          = 128
)

// Register bits (Motorola MC146818A data sheet).
const (
	rtcUpdating      = 1 << 7 // A
	rtcDividerBits   = 7 << 4
	rtcDividerReset  = 6 << 4 // with or without the lowest bit
	rtcDividerNormal = 2 << 4 // 32768 Hz
	rtcRateBits      = 0x0F

	rtcSet       = 1 << 7 // B
	rtcBinary    = 1 << 2
	rtc24Hour    = 1 << 1
	rtcDSTEnable = 1 << 0

	rtcPeriodic    = 1 << 6 // B enables, C tells
	rtcAlarm       = 1 << 5
	rtcUpdateEnded = 1 << 4
	rtcInterrupts  = rtcPeriodic | rtcAlarm | rtcUpdateEnded
	rtcRaised      = 1 << 7 // C

	rtcValid = 1 << 7 // D

	rtcPM       = 1 << 7 // hours in 12-hour mode
	rtcAnyValue = 0xC0   // alarm bytes from here on match everything
)

const (
	rtcCrystalHz = 32768
	// rtcUpdateLead is how long before an update the registers are announced
	// to be about to change; the update itself takes no time here.
	rtcUpdateLead = 244 * time.Microsecond
)

// RTC is an MC146818 real-time clock with 128 bytes of CMOS memory. Its time is
// the host's, in UTC, plus what the guest changed about it. Everything follows
// from the time when the guest looks; a timer runs only while the guest has
// enabled an interrupt that is not raised yet.
//
// A paused RTC does not interrupt; its time goes on, as a wall clock does.
type RTC struct {
	irq Line

	mu     sync.Mutex
	s      RTCState    // guarded by mu
	line   bool        // guarded by mu: level of irq
	paused bool        // guarded by mu
	timer  *time.Timer // guarded by mu: the next enabled interrupt
}

// RTCState is what of an RTC survives a checkpoint.
type RTCState struct {
	Index     uint8 // CMOS byte that the data port reaches
	NMIMasked bool  // bit 7 of the index port; nothing here raises NMIs
	// CMOS is the memory. The time bytes hold only while the time stands still
	// (SET, or the divider held in reset).
	CMOS [cmosSize]uint8
	// The clock's time is the host's plus these.
	OffsetSeconds     int64
	OffsetNanoseconds int64 // 0 to 1e9-1
	// Seen is the clock's time up to which register C is right.
	Seen RTCTime
}

// RTCTime is a time of the clock, seconds since 1970 and nanoseconds.
type RTCTime struct{ Seconds, Nanoseconds int64 }

// NewRTC returns a clock that interrupts by irq and shows UTC.
func NewRTC(irq Line) *RTC {
	r := &RTC{irq: irq}
	r.s.CMOS[rtcRegA] = rtcDividerNormal | 6 // 1024 Hz
	r.s.CMOS[rtcRegB] = rtc24Hour
	r.s.Seen = r.now()
	return r
}

// SetMemory fills the CMOS bytes by which firmware tells memory sizes: low is
// RAM below 4 GiB, high above, both in bytes.
func (r *RTC) SetMemory(low, high uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	put := func(at, bytes int, v uint64) {
		v = min(v, 1<<(8*bytes)-1)
		for i := range bytes {
			r.s.CMOS[at+i] = uint8(v >> (8 * i))
		}
	}
	above := func(n, start uint64) uint64 { return max(n, start) - start }
	put(cmosBaseMemory, 2, min(low>>10, 640))
	put(cmosExtMemory, 2, above(low, 1<<20)>>10)
	put(cmosExtMemoryCopy, 2, above(low, 1<<20)>>10)
	put(cmosMemory16M, 2, above(low, 16<<20)>>16)
	put(cmosMemory4G, 3, high>>16)
}

// SetCPUs fills the CMOS byte by which firmware tells the number of vCPUs.
func (r *RTC) SetCPUs(n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.s.CMOS[cmosCPUs] = uint8(n - 1)
}

// Map puts the clock at its ports.
func (r *RTC) Map(ports *Bus) error { return ports.Map(PortRTC, RTCPorts, r) }

// Reset does what the chip's RESET pin does: interrupts are off; time, alarm
// and memory stay.
func (r *RTC) Reset() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.s.CMOS[rtcRegB] &^= rtcInterrupts
	r.s.CMOS[rtcRegC] = 0
	r.s.Index, r.s.NMIMasked = 0, false
	r.update()
}

// Pause stops interrupts until Resume.
func (r *RTC) Pause() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.update()
	r.paused = true
	r.arm(RTCTime{})
}

// Resume ends Pause; what came due meanwhile interrupts now, once.
func (r *RTC) Resume() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.paused = false
	r.update()
}

// Close stops the clock's timer for good.
func (r *RTC) Close() { r.Pause() }

// State returns what must survive a checkpoint.
func (r *RTC) State() RTCState {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.s
}

// Restore takes over saved state and drives the interrupt line accordingly.
// The time is the host's, plus the saved offset, so that it has gone on.
func (r *RTC) Restore(s RTCState) error {
	const ages = 1 << 40 // seconds, 34,865 years: what time.Time holds easily
	if s.OffsetSeconds < -ages || s.OffsetSeconds > ages || s.OffsetNanoseconds < 0 || s.OffsetNanoseconds >= 1e9 ||
		s.Seen.Seconds < -2*ages || s.Seen.Seconds > 2*ages || s.Seen.Nanoseconds < 0 || s.Seen.Nanoseconds >= 1e9 {
		return fmt.Errorf("%w: real-time clock: offset of %d s and %d ns is out of range", ErrState, s.OffsetSeconds, s.OffsetNanoseconds)
	}
	s.Index %= cmosSize
	r.mu.Lock()
	defer r.mu.Unlock()
	r.s = s
	r.update()
	r.irq.Set(r.line) // whatever it was before
	return nil
}

// Read reads the ports. The index port cannot be read.
func (r *RTC) Read(off uint64, p []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range p {
		p[i] = 0xFF
		if off+uint64(i) == 1 {
			p[i] = r.read(r.s.Index)
		}
	}
}

// Write writes the ports.
func (r *RTC) Write(off uint64, p []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, v := range p {
		switch off + uint64(i) {
		case 0:
			r.s.Index, r.s.NMIMasked = v%cmosSize, v&0x80 != 0
		case 1:
			r.write(r.s.Index, v)
		}
	}
}

func (r *RTC) read(index uint8) uint8 {
	switch {
	case isTimeByte(index) && !r.held():
		t := r.now()
		return r.encode(t)[index]
	case index == rtcRegA:
		v := r.s.CMOS[rtcRegA]
		if !r.held() && r.now().Nanoseconds >= int64(time.Second-rtcUpdateLead) {
			v |= rtcUpdating
		}
		return v
	case index == rtcRegC:
		r.update()
		v := r.s.CMOS[rtcRegC]
		r.s.CMOS[rtcRegC] = 0
		r.update()
		return v
	case index == rtcRegD:
		return rtcValid
	}
	return r.s.CMOS[index]
}

func (r *RTC) write(index, v uint8) {
	r.update()
	switch index {
	case rtcRegA, rtcRegB:
		r.control(index, v)
	case rtcRegC, rtcRegD:
		return
	default:
		if isTimeByte(index) && !r.held() {
			// Not how the data sheet wants it, but meant all the same.
			t := r.now()
			r.hold(t)
			r.s.CMOS[index] = v
			r.setTime(RTCTime{r.decode(), t.Nanoseconds})
		} else {
			r.s.CMOS[index] = v
		}
	}
	r.update()
}

// control writes register A or B. The time stands still from when one of
// them says so until neither does.
func (r *RTC) control(index, v uint8) {
	wasHeld, wasReset := r.held(), r.dividerReset()
	t := r.now()
	if index == rtcRegA {
		r.s.CMOS[rtcRegA] = v &^ rtcUpdating
	} else {
		if v&rtcSet != 0 {
			v &^= rtcUpdateEnded // as on the chip
		}
		if !wasHeld && v&rtcSet != 0 {
			r.hold(t) // in the old format, as it was read
		}
		r.s.CMOS[rtcRegB] = v
	}
	switch {
	case !wasHeld && r.held():
		if index == rtcRegA {
			r.hold(t)
		}
	case wasReset && !r.dividerReset():
		// The first update comes half a second after the divider starts.
		r.setTime(RTCTime{r.decode(), int64(time.Second / 2)})
	case wasHeld && !r.held():
		r.setTime(RTCTime{r.decode(), t.Nanoseconds})
	}
}

func isTimeByte(index uint8) bool {
	switch index {
	case rtcSecond, rtcMinute, rtcHour, rtcWeekday, rtcDay, rtcMonth, rtcYear, RTCCentury:
		return true
	}
	return false
}

// held tells whether the time stands still.
func (r *RTC) held() bool { return r.s.CMOS[rtcRegB]&rtcSet != 0 || r.dividerReset() }

func (r *RTC) dividerReset() bool {
	return r.s.CMOS[rtcRegA]&rtcDividerReset == rtcDividerReset
}

// now is the clock's time.
func (r *RTC) now() RTCTime {
	host := time.Now()
	t := RTCTime{host.Unix() + r.s.OffsetSeconds, int64(host.Nanosecond()) + r.s.OffsetNanoseconds}
	if t.Nanoseconds >= int64(time.Second) {
		t.Seconds++
		t.Nanoseconds -= int64(time.Second)
	}
	return t
}

// setTime makes t the clock's time.
func (r *RTC) setTime(t RTCTime) {
	host := time.Now()
	r.s.OffsetSeconds = t.Seconds - host.Unix()
	r.s.OffsetNanoseconds = t.Nanoseconds - int64(host.Nanosecond())
	if r.s.OffsetNanoseconds < 0 {
		r.s.OffsetSeconds--
		r.s.OffsetNanoseconds += int64(time.Second)
	}
	r.s.Seen = t
}

// hold keeps t in the time bytes.
func (r *RTC) hold(t RTCTime) {
	for index, v := range r.encode(t) {
		if isTimeByte(uint8(index)) {
			r.s.CMOS[index] = v
		}
	}
}

// encode returns t as the time bytes show it, at their places.
func (r *RTC) encode(t RTCTime) (bytes [RTCCentury + 1]uint8) {
	u := time.Unix(t.Seconds, 0).UTC()
	hour := u.Hour()
	pm := uint8(0)
	if r.s.CMOS[rtcRegB]&rtc24Hour == 0 {
		if hour >= 12 {
			pm = rtcPM
		}
		hour = (hour+11)%12 + 1
	}
	year := ((u.Year() % 10000) + 10000) % 10000
	bytes[rtcSecond] = r.toRegister(u.Second())
	bytes[rtcMinute] = r.toRegister(u.Minute())
	bytes[rtcHour] = r.toRegister(hour) | pm
	bytes[rtcWeekday] = r.toRegister(int(u.Weekday()) + 1)
	bytes[rtcDay] = r.toRegister(u.Day())
	bytes[rtcMonth] = r.toRegister(int(u.Month()))
	bytes[rtcYear] = r.toRegister(year % 100)
	bytes[RTCCentury] = r.toRegister(year / 100)
	return bytes
}

// decode reads the time bytes; what lies outside the calendar carries over.
func (r *RTC) decode() (seconds int64) {
	c := &r.s.CMOS
	year := r.fromRegister(c[RTCCentury])*100 + r.fromRegister(c[rtcYear])
	return time.Date(year, time.Month(r.fromRegister(c[rtcMonth])), r.fromRegister(c[rtcDay]),
		r.hour(c[rtcHour]), r.fromRegister(c[rtcMinute]), r.fromRegister(c[rtcSecond]), 0, time.UTC).Unix()
}

// hour decodes an hour byte.
func (r *RTC) hour(v uint8) int {
	if r.s.CMOS[rtcRegB]&rtc24Hour != 0 {
		return r.fromRegister(v)
	}
	h := r.fromRegister(v&^rtcPM) % 12
	if v&rtcPM != 0 {
		h += 12
	}
	return h
}

func (r *RTC) toRegister(v int) uint8 {
	if r.s.CMOS[rtcRegB]&rtcBinary != 0 {
		return uint8(v)
	}
	return uint8(v/10<<4 | v%10)
}

func (r *RTC) fromRegister(v uint8) int {
	if r.s.CMOS[rtcRegB]&rtcBinary != 0 {
		return int(v)
	}
	return int(v>>4)*10 + int(v&0x0F)
}

// update brings register C up to now, drives the interrupt line, and arms the
// timer for what comes next.
func (r *RTC) update() {
	if r.paused {
		return
	}
	t := r.now()
	if t.before(r.s.Seen) { // the host's clock was set back
		r.s.Seen = t
	}
	c := &r.s.CMOS[rtcRegC]
	for _, flag := range [...]uint8{rtcPeriodic, rtcAlarm, rtcUpdateEnded} {
		if *c&flag != 0 {
			continue
		}
		if due, ok := r.next(flag); ok && !t.before(due) {
			*c |= flag
		}
	}
	r.s.Seen = t
	*c &= rtcInterrupts
	if *c&r.s.CMOS[rtcRegB] != 0 {
		*c |= rtcRaised
	}
	if level := *c&rtcRaised != 0; level != r.line {
		r.line = level
		r.irq.Set(level)
	}
	r.arm(t)
}

// arm starts the timer for the first enabled interrupt after now; there is
// nothing to wait for while the line is raised.
func (r *RTC) arm(now RTCTime) {
	wait, found := time.Duration(0), false
	if !r.paused && !r.line {
		for _, flag := range [...]uint8{rtcPeriodic, rtcAlarm, rtcUpdateEnded} {
			if r.s.CMOS[rtcRegB]&flag == 0 {
				continue
			}
			if due, ok := r.next(flag); ok && (!found || due.since(now) < wait) {
				wait, found = due.since(now), true
			}
		}
	}
	switch {
	case !found && r.timer != nil:
		r.timer.Stop()
	case found && r.timer != nil:
		r.timer.Reset(wait)
	case found:
		r.timer = time.AfterFunc(wait, func() {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.update()
		})
	}
}

// next is the first time after Seen that sets a flag of register C.
func (r *RTC) next(flag uint8) (RTCTime, bool) {
	seen := r.s.Seen
	switch flag {
	case rtcPeriodic:
		rate := r.s.CMOS[rtcRegA] & rtcRateBits
		if rate == 0 || r.dividerReset() {
			return RTCTime{}, false
		}
		if rate < 3 { // 256 and 128 Hz
			rate += 7
		}
		period := int64(1) << (rate - 1) // of the crystal; it divides a second
		cycles := seen.Nanoseconds * rtcCrystalHz / int64(time.Second)
		cycles = (cycles/period + 1) * period
		// Rounded up, so that the cycle has come by then.
		due := (cycles*int64(time.Second) + rtcCrystalHz - 1) / rtcCrystalHz
		return RTCTime{seen.Seconds + due/int64(time.Second), due % int64(time.Second)}, true
	case rtcUpdateEnded:
		return RTCTime{seen.Seconds + 1, 0}, !r.held()
	}
	if r.held() {
		return RTCTime{}, false
	}
	return r.nextAlarm(seen.Seconds + 1)
}

// nextAlarm is the first second from t on that the alarm bytes match, within
// a day.
func (r *RTC) nextAlarm(t int64) (RTCTime, bool) {
	const day = 24 * 60 * 60
	matches := func(index int, value int64) bool {
		v := r.s.CMOS[index]
		if v >= rtcAnyValue {
			return true
		}
		if index == rtcHourAlarm {
			return int64(r.hour(v)) == value
		}
		return int64(r.fromRegister(v)) == value
	}
	for end := t + day; t < end; {
		s := ((t % day) + day) % day
		switch {
		case !matches(rtcHourAlarm, s/3600):
			t += 3600 - s%3600
		case !matches(rtcMinuteAlarm, s/60%60):
			t += 60 - s%60
		case !matches(rtcSecondAlarm, s%60):
			t++
		default:
			return RTCTime{t, 0}, true
		}
	}
	return RTCTime{}, false
}

func (t RTCTime) before(u RTCTime) bool {
	return t.Seconds < u.Seconds || t.Seconds == u.Seconds && t.Nanoseconds < u.Nanoseconds
}

// since is t-u, for times less than centuries apart.
func (t RTCTime) since(u RTCTime) time.Duration {
	return time.Duration(t.Seconds-u.Seconds)*time.Second + time.Duration(t.Nanoseconds-u.Nanoseconds)
}
