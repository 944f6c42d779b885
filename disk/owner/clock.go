package owner

import (
	"math"
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

// reading is one instant by all three clocks, in ns.
type reading struct {
	wall, monotonic, boot int64
}

var lastReading atomic.Pointer[reading]

// start is where the monotonic clock begins here.
var start = time.Now()

func goClocks() (wall, monotonic int64) {
	t := time.Now()
	return t.UnixNano(), int64(t.Sub(start))
}

// now is the time by CLOCK_BOOTTIME in ns.
func now() int64 {
	if r := lastReading.Load(); r != nil {
		if boot, ok := r.extrapolate(goClocks()); ok {
			return boot
		}
	}
	return readClocks()
}

// extrapolate tells the boot time when the other clocks say wall and monotonic,
// unless they have come apart since the reading.
func (r *reading) extrapolate(wall, monotonic int64) (boot int64, ok bool) {
	passed := monotonic - r.monotonic
	return r.boot + passed, distance(wall-r.wall, passed) <= clockSlack
}

func distance(a, b int64) int64 { return max(a-b, b-a) }

// readClocks asks all clocks. Of a few attempts it takes the one that was
// interrupted least.
func readClocks() int64 {
	var best reading
	least := int64(math.MaxInt64)
	for range 5 {
		wall, before := goClocks()
		boot := bootTime()
		if _, after := goClocks(); after-before < least {
			best, least = reading{wall, before, boot}, after-before
		}
	}
	lastReading.Store(&best)
	_, monotonic := goClocks()
	return best.boot + monotonic - best.monotonic
}

func bootTime() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(err) // Linux has had it since 2.6.39
	}
	return ts.Nano()
}
