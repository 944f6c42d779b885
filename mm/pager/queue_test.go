package pager

import (
	"testing"
	"time"

	"github.com/gnomon-vmm/gnomon/mm/checkpoint"
)

// gated holds up reads of a block; the first result is closed when there is one.
func (f *fake) gated(block Block) (reading, open chan struct{}) {
	reading, open = make(chan struct{}), make(chan struct{})
	f.gate = func(b Block) {
		if b == block {
			close(reading)
			<-open
		}
	}
	return reading, open
}

// TestEqualPageOfABlockOnItsWay: a guest that wants a page equal to one of a
// block that somebody is reading gets it when the block has come, and the block
// is read once.
func TestEqualPageOfABlockOnItsWay(t *testing.T) {
	for name, o := range map[string]Options{
		"demanded": {Policy: Locality},
		"batch":    {Policy: Locality | Recorded, Recorded: []Block{2}},
	} {
		f, order := scattered(BlockPages*4, 21)
		equal := order[3*BlockPages+7]
		f.at[equal] = Location{Kind: checkpoint.Data, Block: 2, Slot: 9}
		reading, open := f.gated(2)
		m := newMachine(t, f, o)
		m.p.Start()
		device := make(chan error)
		go func() { device <- m.p.Touch(order[2*BlockPages]*pageSize, 1) }()
		<-reading
		guest := m.stuck(equal)
		m.until(func() bool { return len(m.p.held) == 1 })
		close(open)
		if err := <-guest; err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := <-device; err != nil {
			t.Errorf("%s: %v", name, err)
		}
		f.readOnce(t)
	}
}

// TestLateFaultIsHeld: a fault that is told when its page has come already, but
// not all of what comes with it, is answered when that is there.
func TestLateFaultIsHeld(t *testing.T) {
	f, order := scattered(BlockPages*4, 22)
	reading, open := f.gated(3)
	m := newMachine(t, f, Options{Policy: Locality | Recorded, Recorded: []Block{1, 2, 3}, Workers: 1})
	m.p.Start()
	<-reading
	l := new(loader)
	m.p.guestFault(l, m.p.place(order[2*BlockPages]), time.Now())
	m.p.guestFault(l, m.p.place(order[2*BlockPages]), time.Now()) // a thread may be told twice
	m.until(func() bool { return len(m.p.held) == 1 })
	close(open)
	m.quiesce()
	// Late for good, it is answered at once.
	m.p.guestFault(l, m.p.place(order[2*BlockPages]), time.Now())
	m.until(func() bool { return len(m.p.held) == 0 })
	m.walk(order)
}

// TestDemandBeforeRecorded: what is demanded of a recorded set is loaded before
// the rest of it.
func TestDemandBeforeRecorded(t *testing.T) {
	const blocks = 64
	f, order := scattered(BlockPages*blocks, 23)
	var set []Block
	for b := range Block(blocks) {
		set = append(set, b)
	}
	reading, open := f.gated(0)
	m := newMachine(t, f, Options{Policy: Locality | Recorded, Recorded: set, Window: 4, Workers: 1})
	m.p.Start()
	<-reading
	guest := m.stuck(order[50*BlockPages])
	m.until(func() bool { return len(m.p.held) == 1 })
	m.p.mu.Lock()
	next := m.p.batches[m.p.ready[0]]
	m.p.mu.Unlock()
	if next.blocks[0] != 48 || next.n != 4 {
		t.Errorf("next come %d blocks from %d on", next.n, next.blocks[0])
	}
	close(open)
	if err := <-guest; err != nil {
		t.Error(err)
	}
}

// TestSweepWaitsForDemands: a page that somebody is loading is not there yet.
func TestSweepWaitsForDemands(t *testing.T) {
	f, order := scattered(BlockPages*4, 24)
	m := newMachine(t, f, Options{Policy: Locality})
	if err := m.p.Touch(0, uint64(len(order))*pageSize); err != nil {
		t.Fatal(err)
	}
	at := m.p.place(order[5])
	if !at.r.change(at.i, present, loading) {
		t.Fatal("the page is not there")
	}
	step := func() {
		m.p.mu.Lock()
		m.p.stepping++
		m.p.mu.Unlock()
		m.p.sweepStep(new(loader))
	}
	for range 10 {
		step()
	}
	if m.p.Stats().Complete {
		t.Error("complete while a page is being loaded")
	}
	at.r.change(at.i, loading, present)
	for range 4 {
		step()
	}
	if !m.p.Stats().Complete {
		t.Error("not complete")
	}
}
