package vmm

import "sync"

// hold is a reason for the vCPUs to stand still; they run when there is none.
type hold uint8

const (
	holdUser    hold = 1 << iota // paused: Pause, or Config.Paused
	holdRequest                  // the guest asked for reset or power-off, or a vCPU failed
	holdControl                  // a reset, or another operation that needs the vCPUs still
	holdClosed                   // for ever
)

// gate is where vCPU threads stand while the machine is held.
type gate struct {
	mu     sync.Mutex
	change sync.Cond // on mu: held or parked changed
	held   hold      // guarded by mu
	parked int       // vCPUs that stand still: at the gate, not started or ended; guarded by mu
	cpus   []*vcpu
}

// newGate makes a closed gate, behind which the vCPUs will start.
func newGate(cpus []*vcpu) *gate {
	g := &gate{held: holdUser, parked: len(cpus), cpus: cpus}
	g.change.L = &g.mu
	return g
}

// hold adds a reason and kicks the vCPUs. It does not wait for them, so it may
// be called on a vCPU's own thread, which then stops before its next instruction.
func (g *gate) hold(h hold) {
	g.mu.Lock()
	g.held |= h
	g.change.Broadcast() // holdClosed ends the wait of those that stand here
	g.mu.Unlock()
	for _, c := range g.cpus {
		c.kick()
	}
}

// wait returns when every vCPU stands at the gate.
func (g *gate) wait() {
	g.mu.Lock()
	for g.parked < len(g.cpus) {
		g.change.Wait()
	}
	g.mu.Unlock()
}

// release takes a reason away; the vCPUs run when it was the last.
func (g *gate) release(h hold) {
	g.mu.Lock()
	g.held &^= h
	g.change.Broadcast()
	g.mu.Unlock()
}

// holds tells which of the reasons in mask hold.
func (g *gate) holds(mask hold) hold {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.held & mask
}

// park is called by a vCPU's thread; it returns when nothing holds the
// machine, and false when the machine is closed.
func (g *gate) park() bool {
	g.mu.Lock()
	g.parked++
	g.change.Broadcast()
	g.mu.Unlock()
	return g.enter()
}

// enter is park for a vCPU that is counted as parked already, as a new one is.
func (g *gate) enter() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.held != 0 && g.held&holdClosed == 0 {
		g.change.Wait()
	}
	if g.held&holdClosed != 0 {
		return false // stays counted as parked
	}
	g.parked--
	return true
}

// leave counts a vCPU whose thread ends as parked.
func (g *gate) leave() {
	g.mu.Lock()
	g.parked++
	g.change.Broadcast()
	g.mu.Unlock()
}
