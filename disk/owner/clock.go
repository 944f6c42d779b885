package owner

import (
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Leases are measured by CLOCK_BOOTTIME, which goes on while the host sleeps: the
// other hosts do not. Go's own clocks do without a system call, but only give
// the time of day and CLOCK_MONOTONIC, which stops. Their difference changes
// when the host has slept (and when the time of day is set), so only then does
// the boot time have to be asked for.

// clockSlack is how far the two clocks may have come apart unnoticed.
const clockSlack = int64(time.Millisecond)

// reading is one instant by all three clocks.
type reading struct {
	at   time.Time // time of day and monotonic
	boot int64     // ns
}

var lastReading atomic.Pointer[reading]

// now is the time by CLOCK_BOOTTIME in ns.
func now() int64 {
	if r := lastReading.Load(); r != nil {
		if boot, ok := r.extrapolate(time.Now()); ok {
			return boot
		}
	}
	return readClocks()
}

func (r *reading) extrapolate(t time.Time) (boot int64, ok bool) {
	passed := int64(t.Sub(r.at)) // by the monotonic clock
	return r.boot + passed, distance(t.UnixNano()-r.at.UnixNano(), passed) <= clockSlack
}

func distance(a, b int64) int64 { return max(a-b, b-a) }

// readClocks asks all clocks. Of a few attempts it takes the one that was
// interrupted least.
func readClocks() int64 {
	var best reading
	least := time.Duration(-1)
	for range 5 {
		before := time.Now()
		boot := bootTime()
		if took := time.Since(before); least < 0 || took < least {
			best, least = reading{before, boot}, took
		}
	}
	lastReading.Store(&best)
	boot, _ := best.extrapolate(time.Now())
	return boot
}

func bootTime() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(err) // Linux has had it since 2.6.39
	}
	return ts.Nano()
}
