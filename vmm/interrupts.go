package vmm

import "github.com/gnomon-vmm/gnomon/kvm"

// interruptState is the state of the in-kernel controllers that all vCPUs share.
type interruptState struct {
	Chips [3]kvm.IRQChip // PIC master and slave, IOAPIC
	PIT   kvm.PITState
}

func readInterrupts(vm *kvm.VM) (s interruptState, err error) {
	for i := range s.Chips {
		if s.Chips[i], err = vm.IRQChip(uint32(i)); err != nil {
			return s, err
		}
	}
	s.PIT, err = vm.PIT()
	return s, err
}

func (s *interruptState) write(vm *kvm.VM) error {
	for _, chip := range s.Chips {
		if err := vm.SetIRQChip(chip); err != nil {
			return err
		}
	}
	return vm.SetPIT(s.PIT)
}

// gsiLine is a wire to the in-kernel irqchip.
type gsiLine struct {
	vm  *kvm.VM
	gsi uint32
}

// Set implements device.Line. The ioctl fails only for a GSI that does not
// exist, and those are ours.
func (l gsiLine) Set(high bool) { _ = l.vm.IRQLine(l.gsi, high) }
