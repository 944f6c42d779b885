package virtio

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
)

// ballast is memory that records what is given back.
type ballast struct {
	mu   sync.Mutex
	size uint64
	log  []string // guarded by mu
}

func (b *ballast) Size() uint64 { return b.size }

func (b *ballast) Discard(gpa, n uint64) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if gpa+n > b.size {
		b.log = append(b.log, "refused")
		return errors.New("not RAM")
	}
	b.log = append(b.log, fmt.Sprintf("%x+%x", gpa/4096, n/4096))
	return nil
}

func (b *ballast) take() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := strings.Join(b.log, " ")
	b.log = nil
	return s
}

func frames(numbers ...uint32) []byte {
	var p []byte
	for _, n := range numbers {
		p = le.AppendUint32(p, n)
	}
	return p
}

func TestBalloon(t *testing.T) {
	eachRingKind(t, func(t *testing.T, features uint64) {
		mem := &ballast{size: 64 << 20}
		var changes []uint64
		stats := make(chan struct{}, 1)
		dev := NewBalloon(BalloonConfig{
			Memory:   mem,
			OnChange: func(actual uint64) { changes = append(changes, actual) },
			OnStats:  func() { stats <- struct{}{} },
		})
		r := newRings(t, dev, features|balloonFStatsVQ|balloonFDeflateOnOOM|balloonFReporting)
		inflate, deflate := r.add(16, 1, 8192), r.add(16, 1, 8192)
		statsq, report := r.add(16, 1, 4096), r.add(16, 3, 8192)
		r.up()

		// Neighbours go in one call whatever their order; what is not RAM is no
		// harm, nor is a number cut short.
		inflate.send(0, frames(9, 8, 7, 100, 6, 7, 102, 101)[:30], append(frames(101)[2:], 1, 2, 3))
		if got := mem.take(); got != "6+4 64+3" {
			t.Errorf("gave back %q", got)
		}
		inflate.send(0, frames(0xFFFF_FFFF, 0xFFFF_FFFE, 3, 0x4000))
		if got := mem.take(); got != "3+1 refused refused" {
			t.Errorf("gave back %q", got)
		}
		deflate.send(0, frames(6, 7))
		if got := mem.take(); got != "" {
			t.Errorf("gave back %q on deflating", got)
		}
		if dev.Discarded() != 8*4096 {
			t.Errorf("counted %d bytes", dev.Discarded())
		}

		// Targets and what the driver makes of them.
		if err := dev.SetTarget(16 << 20); err != nil {
			t.Fatal(err)
		}
		if pages := r.read(barDevice, 4); pages != 48<<20/4096 {
			t.Errorf("driver sees a target of %d pages", pages)
		}
		r.write(barDevice+4, 4, 1000)
		r.write(barDevice+4, 4, 1000)
		r.write(barDevice, 4, 5) // not the driver's to write
		if want := uint64(64<<20 - 1000*4096); dev.Actual() != want || !slices.Equal(changes, []uint64{want}) {
			t.Errorf("actual %d, changes %v", dev.Actual(), changes)
		}
		if err := dev.SetTarget(65 << 20); !errors.Is(err, ErrBalloon) {
			t.Errorf("target beyond memory: %v", err)
		}
		r.write(barDevice+4, 4, 0xFFFF_FFFF)
		if dev.Actual() != 0 {
			t.Errorf("a balloon larger than memory leaves %d", dev.Actual())
		}

		// Reported pages: the buffers are the pages. Later ones are not RAM.
		if !report.d.add([]segment{{report.base, 8192, true}, {report.base + 16384, 4096, true}}, true, 0) {
			t.Fatal("full")
		}
		report.kick()
		r.reap(report.d, report.index)
		if got, want := mem.take(), fmt.Sprintf("%x+2 %x+1", report.base/4096, report.base/4096+4); got != want {
			t.Errorf("gave back %q of reported pages, want %q", got, want)
		}

		// Statistics: the first buffer holds old values and is returned only
		// when they are asked for.
		stat := func(tag uint16, v uint64) []byte { return le.AppendUint64(le.AppendUint16(nil, tag), v) }
		statsq.put(0, stat(4, 111))
		if dev.Stats() != nil {
			t.Error("statistics nobody asked for")
		}
		if !dev.RequestStats() {
			t.Fatal("no statistics")
		}
		r.reap(statsq.d, statsq.index)
		statsq.put(0, stat(uint16(BalloonFreeMemory), 222), stat(uint16(BalloonTotalMemory), 333)[:9])
		<-stats
		if got := dev.Stats(); len(got) != 1 || got[BalloonFreeMemory] != 222 {
			t.Errorf("statistics %v", got)
		}
	})
}

// TestBalloonGivesBack: with real memory, pages in the balloon are not the
// process's any more, and read as zero.
func TestBalloonGivesBack(t *testing.T) {
	var r *rings
	dev := NewBalloon(BalloonConfig{Memory: memoryOf{&r}})
	r = newRings(t, dev, 0)
	inflate := r.add(16, 1, 4096)
	r.add(16, 1, 4096)
	r.up()
	page := must(r.mem.Slice(0x400000, 3*4096))
	for i := range page {
		page[i] = 7
	}
	inflate.send(0, frames(0x402, 0x400))
	if page[0] != 0 || page[4096] != 7 || page[8192] != 0 {
		t.Errorf("pages hold %d %d %d", page[0], page[4096], page[8192])
	}
}

// memoryOf is the memory of a guest that is made after the balloon.
type memoryOf struct{ r **rings }

func (m memoryOf) Size() uint64                { return (*m.r).mem.Size() }
func (m memoryOf) Discard(gpa, n uint64) error { return (*m.r).mem.Discard(gpa, n) }
