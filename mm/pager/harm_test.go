package pager

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

var errDamaged = errors.New("checksum mismatch")

// stuck is a guest's access in a thread of its own. Without an error, it saw
// what it should.
func (m *machine) stuck(pfn uint64) <-chan error {
	done := make(chan error, 1)
	go func() { done <- m.vcpu().see(pfn) }()
	return done
}

func stillStuck(t *testing.T, done <-chan error) {
	t.Helper()
	select {
	case err := <-done:
		t.Fatalf("the access to a page that cannot be had came back with %v", err)
	default:
	}
}

// TestDamagedBlock: whoever wants a page of a block that cannot be read does not
// get it; everybody else goes on.
func TestDamagedBlock(t *testing.T) {
	for _, policy := range everyPolicy {
		for name, harm := range map[string]func(f *fake, b Block){
			"error": func(f *fake, b Block) { f.fail[b] = errDamaged },
			"index": func(f *fake, b Block) { f.index = map[Block]error{b: errDamaged} },
			// These are found where a block is loaded whole.
			"short": func(f *fake, b Block) {
				f.short[b] = true
				if policy&Locality == 0 {
					f.fail[b] = errDamaged
				}
			},
			"not RAM": func(f *fake, b Block) {
				f.blocks[b] = append([]uint64{1 << 40}, f.blocks[b][1:]...)
				if policy&Locality == 0 {
					f.fail[b] = errDamaged
				}
			},
		} {
			t.Run(policy.String()+", "+name, func(t *testing.T) {
				f, order := scattered(BlockPages*8, 5)
				const bad = 3
				harm(f, bad)
				reported := make(chan error, 10)
				o := Options{Policy: policy, OnError: func(err error) { reported <- err }, Pages: 1}
				for b := range f.blocks {
					if b != bad {
						o.Recorded = append(o.Recorded, Block(b))
					}
				}
				m := newMachine(t, f, o)
				m.p.Start()
				access := m.stuck(order[bad*BlockPages+5])
				err := <-reported
				if !errors.Is(err, ErrLoad) || !strings.Contains(err.Error(), "block 3") || name == "error" && !errors.Is(err, errDamaged) {
					t.Errorf("reported %v", err)
				}
				stillStuck(t, access)
				// As a device gets on with it.
				gpa := order[bad*BlockPages+6] * pageSize
				for _, err := range []error{m.mem.Read(gpa, make([]byte, 8)), m.mem.Write(gpa, make([]byte, 8)), m.p.Touch(gpa, 1)} {
					if !errors.Is(err, ErrLoad) {
						t.Errorf("a device gets %v", err)
					}
				}
				if err := m.p.Wait(context.Background()); !errors.Is(err, ErrLoad) {
					t.Errorf("Wait says %v", err)
				}
				for b := range f.blocks {
					if b != bad {
						m.walk(order[b*BlockPages:][:BlockPages])
					}
				}
				m.p.LoadAll()
				stillStuck(t, access)
				if err := m.p.Close(); err != nil {
					t.Error(err)
				}
				if err := <-access; !errors.Is(err, unix.EFAULT) {
					t.Errorf("the guest's access ended with %v, want EFAULT", err)
				}
				if len(reported) > 0 {
					t.Errorf("reported again: %v", <-reported)
				}
			})
		}
	}
}

// TestDamagedAhead: the block that cannot be read is one that nobody demands
// yet, but that is loaded with others, which come.
func TestDamagedAhead(t *testing.T) {
	f, order := scattered(BlockPages*40, 6)
	const bad = 9
	f.fail[bad] = errDamaged
	reported := make(chan error, 10)
	o := Options{Policy: Locality | Recorded, OnError: func(err error) { reported <- err }}
	for b := range f.blocks {
		o.Recorded = append(o.Recorded, Block(b))
	}
	m := newMachine(t, f, o)
	m.p.Start()
	m.walk(order[:bad*BlockPages])
	<-reported
	m.walk(order[(bad+1)*BlockPages:])
	access := m.stuck(order[bad*BlockPages])
	m.walk(order[:bad*BlockPages])
	stillStuck(t, access)
	if err := m.p.Close(); err != nil {
		t.Error(err)
	}
	if err := <-access; !errors.Is(err, unix.EFAULT) {
		t.Errorf("the guest's access ended with %v", err)
	}
}

// TestDamagedInTheBackground: the machine hears of it before it wants the page.
func TestDamagedInTheBackground(t *testing.T) {
	f := mixed(8)
	bad := Block(len(f.blocks) / 2)
	f.fail[bad] = errDamaged
	reported := make(chan error, 10)
	m := newMachine(t, f, Options{Policy: Locality, Background: true, OnError: func(err error) { reported <- err }})
	m.p.Start()
	if err := <-reported; !errors.Is(err, errDamaged) {
		t.Error(err)
	}
	if err := m.p.Wait(context.Background()); !errors.Is(err, errDamaged) {
		t.Error(err)
	}
	if m.p.Stats().Complete {
		t.Error("complete without one block")
	}
}

// TestClose: what is missing when the pager goes away is not read as zeros by
// anybody, and nobody hangs.
func TestClose(t *testing.T) {
	f, order := scattered(BlockPages*8, 7)
	hold := make(chan struct{})
	var reading atomic.Int32
	f.gate = func(b Block) {
		if b == 2 {
			reading.Add(1)
			<-hold
		}
	}
	m := newMachine(t, f, Options{Policy: Locality})
	m.p.Start()
	m.walk(order[:BlockPages])
	accesses := []<-chan error{m.stuck(order[2*BlockPages]), m.stuck(order[2*BlockPages+1]), m.stuck(order[5*BlockPages])}
	device := make(chan error)
	go func() { device <- m.mem.Read(order[2*BlockPages+2]*pageSize, make([]byte, 8)) }()
	for reading.Load() == 0 {
		if _, err := m.vcpu().read(order[0], 8); err != nil {
			t.Fatal(err)
		}
	}
	closed := make(chan error)
	go func() { closed <- m.p.Close() }()
	for isClosed := false; !isClosed; {
		m.p.mu.Lock()
		isClosed = m.p.closed
		m.p.mu.Unlock()
	}
	close(hold)
	if err := <-closed; err != nil {
		t.Error(err)
	}
	// What was under way may have come to its end.
	for i, a := range accesses {
		if err := <-a; err != nil && !errors.Is(err, unix.EFAULT) {
			t.Errorf("access %d ended with %v", i, err)
		}
	}
	if err := <-device; err != nil && !errors.Is(err, ErrClosed) {
		t.Errorf("a device's access ended with %v", err)
	}
	if err := <-m.stuck(order[7*BlockPages]); !errors.Is(err, unix.EFAULT) {
		t.Errorf("an access to what was never loaded ended with %v", err)
	}
	if err := m.mem.Read(order[6*BlockPages]*pageSize, make([]byte, 8)); !errors.Is(err, ErrClosed) {
		t.Errorf("a device's access later: %v", err)
	}
	// What was there is there, for whoever wants to know what happened.
	got := make([]byte, pageSize)
	if err := m.mem.Read(order[3]*pageSize, got); err != nil || !bytes.Equal(got, f.want(order[3])) {
		t.Errorf("a page that was loaded: %v", err)
	}
	if _, err := m.vcpu().read(order[3], 8); !errors.Is(err, unix.EFAULT) {
		t.Errorf("the guest still has its memory: %v", err)
	}
	if err := m.p.Wait(context.Background()); !errors.Is(err, ErrClosed) {
		t.Errorf("Wait says %v", err)
	}
	if err := m.p.Close(); err != nil {
		t.Errorf("closed again: %v", err)
	}
	m.p.Start()
	m.p.LoadAll()
}

// TestTouchBeforeStart: devices are restored before the guest runs.
func TestTouchBeforeStart(t *testing.T) {
	for _, policy := range everyPolicy {
		f := mixed(9)
		o := Options{Policy: policy}
		for b := range f.blocks {
			o.Recorded = append(o.Recorded, Block(b))
		}
		m := newMachine(t, f, o)
		for _, pfn := range f.pfns() {
			got := make([]byte, pageSize)
			if err := m.mem.Read(pfn*pageSize, got); err != nil || !bytes.Equal(got, f.want(pfn)) {
				t.Fatalf("page %#x: %v", pfn, err)
			}
		}
		s := m.p.Stats()
		if s.GuestFaults != 0 || s.ZeroPages != 0 || s.Installed() != uint64(len(f.at)) {
			t.Errorf("%v: %+v", policy, s)
		}
	}
}

func TestRefusals(t *testing.T) {
	f, _ := scattered(64, 1)
	for _, ranges := range [][]guestmem.Range{
		{{GPA: 0, Size: 63 * pageSize}},
		{{GPA: 0, Size: 65 * pageSize}},
		{{GPA: pageSize, Size: 64 * pageSize}},
		{{GPA: 0, Size: 32 * pageSize}, {GPA: 40 * pageSize, Size: 32 * pageSize}},
	} {
		mem, err := guestmem.New(ranges)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := New(mem, f, Options{}); !errors.Is(err, ErrStart) {
			t.Errorf("%v: %v", ranges, err)
		}
		mem.Close()
	}
	mem, err := guestmem.New([]guestmem.Range{{GPA: 0, Size: 32 * pageSize}, {GPA: 32 * pageSize, Size: 32 * pageSize}})
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	p, err := New(mem, f, Options{})
	if err != nil {
		t.Fatalf("the same RAM in two regions: %v", err)
	}
	if _, err := New(mem, f, Options{}); !errors.Is(err, ErrStart) || !errors.Is(err, unix.EBUSY) {
		t.Errorf("a second pager: %v", err)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}

// TestWaitIsCancelled leaves the pager as it is.
func TestWaitIsCancelled(t *testing.T) {
	f, order := scattered(64, 1)
	m := newMachine(t, f, Options{})
	m.p.Start()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- m.p.Wait(ctx) }()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	m.walk(order)
}

// TestBackgroundYields: while a demand is under way the background begins nothing.
func TestBackgroundYields(t *testing.T) {
	f, order := scattered(BlockPages*64, 11)
	m := newMachine(t, f, Options{Policy: Locality, Workers: 3})
	demanded, hold := make(chan struct{}), make(chan struct{})
	var background atomic.Int32
	f.gate = func(b Block) {
		switch {
		case b == 50:
			close(demanded)
			<-hold
		case b > 6: // and not asked for ahead
			m.p.mu.Lock()
			defer m.p.mu.Unlock()
			if m.p.demands > 0 && m.p.blocks[b] == blockLoading {
				background.Add(1)
			}
		}
	}
	m.p.Start()
	device := make(chan error)
	go func() { device <- m.p.Touch(order[50*BlockPages]*pageSize, 1) }()
	<-demanded
	m.p.LoadAll()
	// A guest that walks keeps the workers busy, who look for work time and again.
	m.walk(order[:6*BlockPages])
	m.quiesceBatches()
	if n := background.Load(); n != 0 {
		t.Errorf("the background read %d blocks while a device waited", n)
	}
	close(hold)
	if err := <-device; err != nil {
		t.Error(err)
	}
	if err := m.p.Wait(context.Background()); err != nil {
		t.Error(err)
	}
}
