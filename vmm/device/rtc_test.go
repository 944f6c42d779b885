package device

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// cmos is a guest's view of an RTC.
type cmos struct {
	ports
	irq *wire
	dev *RTC
}

func newCMOS(t testing.TB) *cmos {
	c := &cmos{irq: &wire{}}
	c.dev = NewRTC(c.irq)
	c.ports = newPorts(t, c.dev.Map)
	t.Cleanup(c.dev.Close)
	return c
}

func (c *cmos) get(index uint8) uint8 {
	c.out(PortRTC, index)
	return c.in(PortRTC + 1)
}

func (c *cmos) put(index, v uint8) {
	c.out(PortRTC, index)
	c.out(PortRTC+1, v)
}

// time reads the clock as a driver does that knows all its modes.
func (c *cmos) time() time.Time {
	mode := c.get(rtcRegB)
	num := func(v uint8) int {
		if mode&rtcBinary != 0 {
			return int(v)
		}
		return int(v&0x0F) + 10*int(v>>4)
	}
	h := c.get(rtcHour)
	hour := num(h)
	if mode&rtc24Hour == 0 {
		hour = num(h &^ 0x80)
		if hour == 0 {
			hour = 99 // there is no hour 0
		}
		if hour == 12 {
			hour = 0
		}
		if h&0x80 != 0 {
			hour += 12
		}
	}
	return time.Date(num(c.get(RTCCentury))*100+num(c.get(rtcYear)), time.Month(num(c.get(rtcMonth))), num(c.get(rtcDay)),
		hour, num(c.get(rtcMinute)), num(c.get(rtcSecond)), 0, time.UTC)
}

// set sets the clock as Linux's mc146818_set_time does.
func (c *cmos) set(at time.Time) {
	mode := c.get(rtcRegB)
	num := func(v int) uint8 {
		if mode&rtcBinary != 0 {
			return uint8(v)
		}
		return uint8(v%10 + v/10*16)
	}
	a := c.get(rtcRegA)
	c.put(rtcRegB, mode|rtcSet)
	c.put(rtcRegA, a|0x70)
	hour, pm := at.Hour(), uint8(0)
	if mode&rtc24Hour == 0 {
		if hour >= 12 {
			pm = 0x80
		}
		if hour %= 12; hour == 0 {
			hour = 12
		}
	}
	c.put(rtcYear, num(at.Year()%100))
	c.put(RTCCentury, num(at.Year()/100))
	c.put(rtcMonth, num(int(at.Month())))
	c.put(rtcDay, num(at.Day()))
	c.put(rtcHour, num(hour)|pm)
	c.put(rtcMinute, num(at.Minute()))
	c.put(rtcSecond, num(at.Second()))
	c.put(rtcRegB, mode)
	c.put(rtcRegA, a)
}

func modes(t *testing.T, f func(t *testing.T, mode uint8)) {
	for _, mode := range []uint8{0, rtcBinary, rtc24Hour, rtcBinary | rtc24Hour} {
		t.Run(fmt.Sprintf("B=%#x", mode), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { f(t, mode) })
		})
	}
}

func TestRTCShowsTheHostsTime(t *testing.T) {
	modes(t, func(t *testing.T, mode uint8) {
		c := newCMOS(t)
		c.put(rtcRegB, mode)
		for range 60 {
			if got, want := c.time(), time.Now().UTC().Truncate(time.Second); !got.Equal(want) {
				t.Errorf("clock shows %v, want %v", got, want)
			}
			if got, want := int(c.get(rtcWeekday)), int(time.Now().UTC().Weekday())+1; got != want {
				t.Errorf("weekday is %d, want %d", got, want)
			}
			time.Sleep(3*time.Hour + 59*time.Minute + 1333*time.Millisecond)
		}
	})
}

func TestRTCSetByGuest(t *testing.T) {
	modes(t, func(t *testing.T, mode uint8) {
		c := newCMOS(t)
		c.put(rtcRegB, mode)
		for _, at := range []time.Time{
			time.Date(2026, 2, 28, 23, 59, 59, 0, time.UTC),
			time.Date(1999, 12, 31, 0, 0, 0, 0, time.UTC),
			time.Date(2024, 2, 29, 12, 30, 1, 0, time.UTC),
			time.Date(9999, 12, 31, 11, 59, 58, 0, time.UTC),
		} {
			c.set(at)
			if got := c.time(); !got.Equal(at) {
				t.Errorf("set to %v, shows %v", at, got)
			}
			// The divider was reset: the first second ends after half of one.
			time.Sleep(500*time.Millisecond - time.Nanosecond)
			if got := c.time(); !got.Equal(at) {
				t.Errorf("just before half a second after %v it shows %v", at, got)
			}
			time.Sleep(time.Nanosecond)
			if got := c.time(); !got.Equal(at.Add(time.Second)) && at.Year() < 9999 {
				t.Errorf("half a second after %v it shows %v", at, got)
			}
			time.Sleep(24 * time.Hour)
			if got := c.time(); !got.Equal(at.Add(24*time.Hour+time.Second)) && at.Year() < 9999 {
				t.Errorf("a day after %v it shows %v", at, got)
			}
		}
	})
}

// SET alone keeps the time still for as long as it lasts, and the second's
// phase after it.
func TestRTCHeldBySet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCMOS(t)
		time.Sleep(300 * time.Millisecond)
		before := c.time()
		c.put(rtcRegB, rtc24Hour|rtcSet)
		time.Sleep(10 * time.Second)
		if got := c.time(); !got.Equal(before) {
			t.Errorf("held clock went from %v to %v", before, got)
		}
		if c.get(rtcRegA)&rtcUpdating != 0 || c.get(rtcRegC)&rtcUpdateEnded != 0 {
			t.Error("a held clock updates")
		}
		c.put(rtcMinute, 0x30)
		c.put(rtcRegB, rtc24Hour)
		want := time.Date(before.Year(), before.Month(), before.Day(), before.Hour(), 30, before.Second(), 0, time.UTC)
		if got := c.time(); !got.Equal(want) {
			t.Errorf("after SET it shows %v, want %v", got, want)
		}
		time.Sleep(700*time.Millisecond - time.Nanosecond)
		if got := c.time(); !got.Equal(want) {
			t.Errorf("the second ended early: %v", got)
		}
		time.Sleep(time.Nanosecond)
		if got := c.time(); !got.Equal(want.Add(time.Second)) {
			t.Errorf("the second did not end: %v", got)
		}
		c.put(rtcHour, 0x07) // while it runs
		if got := c.time(); got.Hour() != 7 || got.Minute() != 30 {
			t.Errorf("hour written while running: %v", got)
		}
	})
}

func TestRTCUpdateInProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCMOS(t)
		for range 3 {
			for _, step := range []struct {
				wait time.Duration
				uip  bool
			}{
				{time.Second - 245*time.Microsecond, false},
				{time.Microsecond, true},
				{244*time.Microsecond - time.Nanosecond, true},
				{time.Nanosecond, false},
			} {
				time.Sleep(step.wait)
				if got := c.get(rtcRegA)&rtcUpdating != 0; got != step.uip {
					t.Errorf("at %v UIP is %v", time.Now().UTC(), got)
				}
			}
		}
	})
}

func TestRTCPeriodicInterrupt(t *testing.T) {
	for rate, hz := range map[uint8]int{1: 256, 2: 128, 3: 8192, 6: 1024, 10: 64, 15: 2} {
		synctest.Test(t, func(t *testing.T) {
			c := newCMOS(t)
			c.put(rtcRegA, rtcDividerNormal|rate)
			c.get(rtcRegC)
			c.put(rtcRegB, rtc24Hour|rtcPeriodic)
			ticks := 0
			period := time.Second / time.Duration(hz)
			start := time.Now()
			for n := range hz {
				// +1: a period may end in a fraction of a nanosecond
				time.Sleep(time.Until(start.Add(time.Duration(n+1)*period + time.Duration(n+1))))
				synctest.Wait()
				if c.irq.level() {
					ticks++
					if v := c.get(rtcRegC); v&(rtcRaised|rtcPeriodic) != rtcRaised|rtcPeriodic {
						t.Fatalf("register C is %#x", v)
					}
					time.Sleep(period / 2)
					synctest.Wait()
					if c.irq.level() {
						t.Fatal("line is raised half a period after C was read")
					}
				}
			}
			if ticks != hz {
				t.Errorf("rate %d: %d interrupts in a second, want %d", rate, ticks, hz)
			}
			c.put(rtcRegB, rtc24Hour)
			edges := c.irq.rose()
			time.Sleep(time.Second)
			synctest.Wait()
			if c.irq.rose() != edges {
				t.Error("disabled interrupts go on")
			}
			if c.get(rtcRegC)&rtcPeriodic == 0 {
				t.Error("the flag does not show while the interrupt is disabled")
			}
		})
	}
}

// Rate 0 stands for no interrupt; so does a guest that never acknowledges one.
func TestRTCNoMoreInterruptsThanAskedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCMOS(t)
		c.put(rtcRegA, rtcDividerNormal)
		c.put(rtcRegB, rtc24Hour|rtcPeriodic)
		time.Sleep(10 * time.Second)
		if c.irq.rose() != 0 {
			t.Error("rate 0 interrupts")
		}
		c.put(rtcRegA, rtcDividerNormal|3)
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if n := c.irq.rose(); n != 1 {
			t.Errorf("%d interrupts, none acknowledged", n)
		}
		if c.dev.timer.Stop() {
			t.Error("a timer runs though the interrupt is raised")
		}
	})
}

func TestRTCUpdateEndedInterrupt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCMOS(t)
		c.put(rtcRegB, rtc24Hour|rtcUpdateEnded)
		for range 10 {
			time.Sleep(time.Second)
			synctest.Wait()
			if !c.irq.level() || c.get(rtcRegC) != rtcRaised|rtcUpdateEnded|rtcPeriodic {
				t.Fatal("no update-ended interrupt at the end of a second")
			}
		}
		c.put(rtcRegB, rtc24Hour|rtcUpdateEnded|rtcSet)
		if c.get(rtcRegB)&rtcUpdateEnded != 0 {
			t.Error("SET leaves the update-ended interrupt enabled")
		}
	})
}

func TestRTCAlarm(t *testing.T) {
	modes(t, func(t *testing.T, mode uint8) {
		c := newCMOS(t)
		num := func(v uint8) uint8 {
			if mode&rtcBinary != 0 {
				return v
			}
			return v%10 + v/10*16
		}
		hour := num(15)
		if mode&rtc24Hour == 0 {
			hour = num(3) | 0x80
		}
		c.put(rtcRegB, mode)
		c.put(rtcHourAlarm, hour)
		c.put(rtcMinuteAlarm, num(45))
		c.put(rtcSecondAlarm, num(10))
		c.put(rtcRegB, mode|rtcAlarm)
		for day := range 3 {
			for !c.irq.level() {
				time.Sleep(10 * time.Second)
				synctest.Wait()
			}
			if got := time.Now().UTC(); got.Hour() != 15 || got.Minute() != 45 || got.Second() != 10 || got.Nanosecond() != 0 {
				t.Fatalf("day %d: alarm at %v", day, got)
			}
			if v := c.get(rtcRegC); v&(rtcRaised|rtcAlarm) != rtcRaised|rtcAlarm {
				t.Fatalf("register C is %#x", v)
			}
		}
		if n := c.irq.rose(); n != 3 {
			t.Errorf("%d alarms in 3 days", n)
		}
		if now := time.Now().UTC(); now.Day() != 3 {
			t.Errorf("third alarm came on %v", now)
		}
	})
}

// Against trying second by second.
func TestRTCNextAlarmAgainstModel(t *testing.T) {
	field := func(most uint8) *rapid.Generator[uint8] {
		return rapid.OneOf(rapid.Uint8Range(0, most), rapid.Just[uint8](0xFF), rapid.Just[uint8](0xC0), rapid.Uint8())
	}
	rapid.Check(t, func(t *rapid.T) {
		r := &RTC{}
		r.s.CMOS[rtcRegB] = rtcBinary | rtc24Hour
		h, m, s := field(23).Draw(t, "hour"), field(59).Draw(t, "minute"), field(59).Draw(t, "second")
		r.s.CMOS[rtcHourAlarm], r.s.CMOS[rtcMinuteAlarm], r.s.CMOS[rtcSecondAlarm] = h, m, s
		from := rapid.Int64Range(-1e10, 1e10).Draw(t, "from")
		want, found := int64(0), false
		for at := from; at < from+86400 && !found; at++ {
			u := time.Unix(at, 0).UTC()
			if (h >= 0xC0 || u.Hour() == int(h)) && (m >= 0xC0 || u.Minute() == int(m)) && (s >= 0xC0 || u.Second() == int(s)) {
				want, found = at, true
			}
		}
		if got, ok := r.nextAlarm(from); ok != found || got.Seconds != want {
			t.Errorf("next alarm is %v, %v; want %d, %v", got, ok, want, found)
		}
	})
}

func TestRTCPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCMOS(t)
		c.put(rtcRegB, rtc24Hour|rtcUpdateEnded|rtcPeriodic)
		c.get(rtcRegC)
		c.dev.Pause()
		time.Sleep(time.Hour)
		c.put(rtcMinuteAlarm, 0) // nor does an access in the pause let it
		time.Sleep(time.Hour)
		synctest.Wait()
		if c.irq.rose() != 0 {
			t.Error("a paused clock interrupts")
		}
		c.dev.Resume()
		if !c.irq.level() || c.irq.rose() != 1 {
			t.Error("what came due in the pause did not interrupt once")
		}
		if got, want := c.time(), time.Now().UTC().Truncate(time.Second); !got.Equal(want) {
			t.Errorf("after a pause it shows %v, want %v", got, want)
		}
	})
}

func TestRTCSaveAndRestore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCMOS(t)
		at := time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC)
		c.set(at)
		c.put(0x40, 0xA5)
		c.put(rtcRegB, rtc24Hour|rtcUpdateEnded)
		time.Sleep(500 * time.Millisecond)
		synctest.Wait()
		state := throughJSON(t, c.dev.State())
		c.dev.Pause()
		time.Sleep(10 * time.Second)

		back := newCMOS(t)
		if err := back.dev.Restore(state); err != nil {
			t.Fatal(err)
		}
		if got := back.time(); !got.Equal(at.Add(11 * time.Second)) {
			t.Errorf("restored clock shows %v", got)
		}
		if back.get(0x40) != 0xA5 || !back.irq.level() {
			t.Error("memory or interrupt line was not restored")
		}
	})
	for name, s := range map[string]RTCState{
		"offset":      {OffsetSeconds: 1 << 60},
		"nanoseconds": {OffsetNanoseconds: 1e9},
		"negative":    {OffsetNanoseconds: -1},
		"seen":        {Seen: RTCTime{-1 << 62, 0}},
	} {
		if err := newCMOS(t).dev.Restore(s); !errors.Is(err, ErrState) {
			t.Errorf("%s: %v, want ErrState", name, err)
		}
	}
}

func TestRTCMemory(t *testing.T) {
	c := newCMOS(t)
	c.dev.SetMemory(3<<30, 5<<30)
	c.dev.SetCPUs(4)
	word := func(at uint8) int { return int(c.get(at)) | int(c.get(at+1))<<8 }
	for name, v := range map[string][2]int{
		"base memory":   {word(0x15), 640},
		"extended":      {word(0x17), 0xFFFF},
		"extended copy": {word(0x30), 0xFFFF},
		"above 16 MiB":  {word(0x34), (3<<30 - 16<<20) >> 16},
		"above 4 GiB":   {word(0x5B) | int(c.get(0x5D))<<16, 5 << 30 >> 16},
		"vCPUs":         {int(c.get(0x5F)), 3},
		"valid":         {int(c.get(rtcRegD)), 0x80},
		"index port":    {int(c.in(PortRTC)), 0xFF},
	} {
		if v[0] != v[1] {
			t.Errorf("%s: %#x, want %#x", name, v[0], v[1])
		}
	}
	c.dev.SetMemory(8<<20, 0)
	if got := word(0x17); got != 7<<10 {
		t.Errorf("extended memory of an 8 MiB machine: %d KiB", got)
	}
	c.put(0x80|0x40, 7) // with the NMI bit
	if s := c.dev.State(); !s.NMIMasked || s.CMOS[0x40] != 7 {
		t.Error("NMI bit and index are not told apart")
	}
	c.put(rtcRegB, rtcBinary|rtcAlarm|rtcPeriodic)
	c.dev.Reset()
	if got := c.get(rtcRegB); got != rtcBinary || c.get(0x40) != 7 {
		t.Errorf("after reset B is %#x and memory %d", got, c.get(0x40))
	}
}
