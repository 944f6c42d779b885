package vmm

import (
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/kvm"
)

// kickSignal interrupts KVM_RUN. It is a real-time signal that nothing else in
// a Go program uses; the runtime's handler for it does nothing.
const kickSignal = syscall.Signal(40)

// vcpu is one virtual CPU and the thread that runs it.
type vcpu struct {
	*kvm.VCPU
	m  *Machine
	id int

	tid       atomic.Int32 // of the thread in run; 0 before it starts
	attention atomic.Bool  // something waits at the gate
	exits     atomic.Uint64
	assist    assistant // nil where ring 0 runs natively
	pristine  *CPUState // as KVM made it: what a reset goes back to
}

// assistant does for a vCPU what its host's KVM leaves undone (vmm/assist).
type assistant interface {
	// EmulationFailed handles KVM_EXIT_INTERNAL_ERROR, suberror 1.
	EmulationFailed() error
	// Debug handles KVM_EXIT_DEBUG.
	Debug() error
	// WroteMSR handles KVM_EXIT_X86_WRMSR.
	WroteMSR(index uint32, value uint64) error
	// Reset forgets what was learnt of the guest.
	Reset() error
	// Restore learns it again of a vCPU whose state was loaded.
	Restore() error
	// Entered says that the guest has run.
	Entered()
	// INT3Again tells whether a vCPU that stands at rip, behind an INT3, must
	// perform that again where its state is loaded.
	INT3Again(rip uint64) bool
}

// kick makes the vCPU look at the gate soon, wherever its thread is.
func (c *vcpu) kick() {
	c.attention.Store(true)
	c.RequestExit(true)
	if tid := c.tid.Load(); tid != 0 {
		// An error means that the thread has ended, which is what we want.
		_ = unix.Tgkill(c.m.pid, int(tid), kickSignal)
	}
}

// run is the vCPU's thread. It returns when the machine is closed, or with the
// error that ends the vCPU.
func (c *vcpu) run() error {
	// The thread is never unlocked: it ends with the goroutine, and with it
	// whatever KVM tied to it.
	runtime.LockOSThread()
	c.tid.Store(int32(unix.Gettid()))
	c.nameThread()
	if !c.m.gate.enter() {
		return nil
	}
	for {
		// kick sets attention before it asks for the exit: either we see the
		// one here, or KVM_RUN sees the other.
		c.RequestExit(false)
		if c.attention.Load() {
			if err := c.finishIO(); err != nil {
				return err
			}
			c.attention.Store(false)
			if c.m.gate.holds(^hold(0)) != 0 && !c.m.gate.park() {
				return nil
			}
			continue
		}
		if err := c.step(); err != nil {
			return err
		}
	}
}

// nameThread gives the thread the name that QEMU gives a vCPU's, by which operators find
// and pin it. Preconditions: the thread is the vCPU's.
func (c *vcpu) nameThread() {
	_ = os.WriteFile("/proc/thread-self/comm", fmt.Appendf(nil, "CPU %d/KVM", c.id), 0) // only a name would be missing
}

// finishIO lets KVM complete the instruction whose I/O we served last, so that
// the registers are those of an instruction boundary. Preconditions: the
// thread is the vCPU's.
func (c *vcpu) finishIO() error {
	for {
		c.RequestExit(true)
		err := c.Run()
		if err == syscall.EINTR {
			return nil
		}
		// The rest of an instruction with several accesses, or an event
		// that came first: serve it and try again.
		if err := c.handle(err); err != nil {
			return err
		}
	}
}

// step runs guest code until the next exit and serves it.
func (c *vcpu) step() error { return c.handle(c.Run()) }

// handle serves one return from KVM_RUN.
func (c *vcpu) handle(err error) error {
	if err != nil {
		if err == syscall.EINTR || err == syscall.EAGAIN {
			return nil
		}
		return c.failed("KVM_RUN", err)
	}
	c.exits.Add(1)
	if c.assist != nil {
		c.assist.Entered()
	}
	switch c.ExitReason() {
	case kvm.ExitIO:
		c.portIO()
	case kvm.ExitMMIO:
		x := c.MMIO()
		n := min(int(x.Len), len(x.Data))
		if x.IsWrite {
			c.m.mmio.Write(x.Addr, x.Data[:n])
		} else {
			c.m.mmio.Read(x.Addr, x.Data[:n])
		}
	case kvm.ExitIntr, kvm.ExitIRQWindowOpen, kvm.ExitHLT:
	case kvm.ExitShutdown:
		c.m.Reset("triple fault")
	case kvm.ExitSystemEvent:
		c.m.systemEvent(c.SystemEvent())
	case kvm.ExitDirtyRingFull:
		return c.m.dirty.RingFull()
	case kvm.ExitDebug:
		if c.assist == nil {
			return c.failed("unexpected debug exit", nil)
		}
		return c.assist.Debug()
	case kvm.ExitX86WRMSR:
		if c.assist == nil {
			return c.failed("unexpected MSR exit", nil)
		}
		x := c.MSR()
		return c.assist.WroteMSR(x.Index, x.Data)
	case kvm.ExitInternalError:
		sub, data := c.InternalError()
		if sub == kvm.InternalErrorEmulation && c.assist != nil {
			return c.assist.EmulationFailed()
		}
		return c.failed(fmt.Sprintf("KVM internal error %d %x, instruction bytes % x", sub, data, c.EmulationBytes()), nil)
	case kvm.ExitFailEntry:
		return c.failed(fmt.Sprintf("KVM could not enter the guest: hardware reason %#x", c.FailEntry().Reason), nil)
	default:
		return c.failed("unexpected exit "+c.ExitReason().String(), nil)
	}
	return nil
}

// portIO serves an IN or OUT, or a run of REP INS/OUTS.
func (c *vcpu) portIO() {
	x := c.IO()
	size := int(x.Size)
	for data := x.Data; len(data) >= size && size > 0; data = data[size:] {
		if x.Write {
			c.m.pio.Write(uint64(x.Port), data[:size:size])
		} else {
			c.m.pio.Read(uint64(x.Port), data[:size:size])
		}
	}
}

// failed describes what ended the vCPU, with where the guest was.
func (c *vcpu) failed(what string, cause error) error {
	var r kvm.Regs
	var s kvm.Sregs
	where := ""
	if c.GetRegs(&r) == nil && c.GetSregs(&s) == nil {
		where = fmt.Sprintf(" (RIP %#x, RSP %#x, CR3 %#x, ring %d)", r.RIP, r.RSP, s.CR3, s.CS.Selector&3)
	}
	if cause != nil {
		return fmt.Errorf("%w: vCPU %d: %s%s: %w", ErrRun, c.id, what, where, cause)
	}
	return fmt.Errorf("%w: vCPU %d: %s%s", ErrRun, c.id, what, where)
}
