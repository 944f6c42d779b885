package kvm

import "fmt"

// CreateIRQChip makes the in-kernel PICs, IOAPIC and local APICs. VCPUs are
// created after it.
func (vm *VM) CreateIRQChip() error {
	_, errno := ioctl(vm.fd, nrCreateIRQChip, 0)
	return result("KVM_CREATE_IRQCHIP", errno)
}

// IRQChip reads the state of one in-kernel interrupt controller.
func (vm *VM) IRQChip(id uint32) (IRQChip, error) {
	chip := IRQChip{ID: id}
	if _, errno := ioctlPtr(vm.fd, nrGetIRQChip, &chip); errno != 0 {
		return IRQChip{}, fmt.Errorf("KVM_GET_IRQCHIP %d: %w", id, errno)
	}
	return chip, nil
}

// SetIRQChip writes the state of the in-kernel interrupt controller chip.ID.
func (vm *VM) SetIRQChip(chip IRQChip) error {
	if _, errno := ioctlPtr(vm.fd, nrSetIRQChip, &chip); errno != 0 {
		return fmt.Errorf("KVM_SET_IRQCHIP %d: %w", chip.ID, errno)
	}
	return nil
}

// CreatePIT makes the in-kernel 8254, which answers port 0x61 too. It needs
// CreateIRQChip first.
func (vm *VM) CreatePIT() error {
	config := PITConfig{Flags: PITSpeakerDummy}
	_, errno := ioctlPtr(vm.fd, nrCreatePIT2, &config)
	return result("KVM_CREATE_PIT2", errno)
}

// PIT reads the state of the in-kernel 8254.
func (vm *VM) PIT() (PITState, error) {
	var state PITState
	_, errno := ioctlPtr(vm.fd, nrGetPIT2, &state)
	return state, result("KVM_GET_PIT2", errno)
}

// SetPIT writes the state of the in-kernel 8254.
func (vm *VM) SetPIT(state PITState) error {
	_, errno := ioctlPtr(vm.fd, nrSetPIT2, &state)
	return result("KVM_SET_PIT2", errno)
}

// IRQLine drives an interrupt line of the in-kernel interrupt controllers.
func (vm *VM) IRQLine(gsi uint32, level bool) error {
	line := irqLevel{irq: gsi}
	if level {
		line.level = 1
	}
	_, errno := ioctlPtr(vm.fd, nrIRQLine, &line)
	return errnoOrNil(errno)
}

// SignalMSI delivers a message-signalled interrupt at once. A message that the
// guest blocks is no error.
func (vm *VM) SignalMSI(addr uint64, data uint32) error {
	message := msi{addressLo: uint32(addr), addressHi: uint32(addr >> 32), data: data}
	_, errno := ioctlPtr(vm.fd, nrSignalMSI, &message)
	return errnoOrNil(errno)
}

// An IRQRoute says what a GSI does: drive a pin of an interrupt controller, or
// send a message. RouteToPin and RouteToMSI make one.
type IRQRoute struct {
	GSI  uint32
	MSI  bool   // whether it is a message, so that Addr and Data count, or Chip and Pin
	Chip uint32 // IRQChip*
	Pin  uint32
	Addr uint64
	Data uint32
}

// RouteToPin routes a GSI to an interrupt controller's pin.
func RouteToPin(gsi, chip, pin uint32) IRQRoute { return IRQRoute{GSI: gsi, Chip: chip, Pin: pin} }

// RouteToMSI routes a GSI to a message.
func RouteToMSI(gsi uint32, addr uint64, data uint32) IRQRoute {
	return IRQRoute{GSI: gsi, MSI: true, Addr: addr, Data: data}
}

// IOAPICPins is how many inputs the in-kernel IOAPIC has.
const IOAPICPins = 24

// DefaultIRQRoutes returns the routes that CreateIRQChip sets up: GSIs 0 to 15
// to both the PICs and the IOAPIC, 16 to 23 to the IOAPIC alone.
func DefaultIRQRoutes() []IRQRoute {
	var routes []IRQRoute
	for gsi := uint32(0); gsi < IOAPICPins; gsi++ {
		routes = append(routes, RouteToPin(gsi, IRQChipIOAPIC, gsi))
		if gsi < 16 {
			routes = append(routes, RouteToPin(gsi, IRQChipPICMaster+gsi/8, gsi%8))
		}
	}
	return routes
}

// SetGSIRouting replaces all routes.
func (vm *VM) SetGSIRouting(routes []IRQRoute) error {
	table := routingTable(routes)
	if _, errno := ioctlPtr(vm.fd, nrSetGSIRouting, &table[0]); errno != 0 {
		return fmt.Errorf("KVM_SET_GSI_ROUTING: %d routes: %w", len(routes), errno)
	}
	return nil
}

// routingTable lays out struct kvm_irq_routing: its header, then an entry for
// each route, in 32-bit words.
func routingTable(routes []IRQRoute) []uint32 {
	const headerWords, entryWords = 2, 12
	table := make([]uint32, 0, headerWords+entryWords*len(routes))
	table = append(table, uint32(len(routes)), 0)
	for _, r := range routes {
		entry := [entryWords]uint32{r.GSI, routeIRQChip, 0, 0, r.Chip, r.Pin}
		if r.MSI {
			entry = [entryWords]uint32{r.GSI, routeMSI, 0, 0, uint32(r.Addr), uint32(r.Addr >> 32), r.Data}
		}
		table = append(table, entry[:]...)
	}
	return table
}

// AssignIRQFD makes writes to an eventfd raise a GSI: an edge, or with a
// resampleFD a level that stays until the guest acknowledges it, which the
// kernel tells by writing to resampleFD. resampleFD is -1 for none.
func (vm *VM) AssignIRQFD(fd int, gsi uint32, resampleFD int) error {
	config := irqfdConfig{Fd: uint32(fd), GSI: gsi}
	if resampleFD >= 0 {
		config.Flags, config.ResampleFD = irqfdResample, uint32(resampleFD)
	}
	return vm.irqfd(&config)
}

// DeassignIRQFD undoes AssignIRQFD.
func (vm *VM) DeassignIRQFD(fd int, gsi uint32) error {
	return vm.irqfd(&irqfdConfig{Fd: uint32(fd), GSI: gsi, Flags: irqfdDeassign})
}

func (vm *VM) irqfd(config *irqfdConfig) error {
	if _, errno := ioctlPtr(vm.fd, nrIRQFD, config); errno != 0 {
		return fmt.Errorf("KVM_IRQFD: GSI %d: %w", config.GSI, errno)
	}
	return nil
}

// AssignIOEventFD makes a guest's write signal an eventfd in place of an exit:
// a write of length bytes (1, 2, 4 or 8; 0 for any) to addr, a port if pio and
// otherwise a guest physical address, and of the value *datamatch unless that
// is nil.
func (vm *VM) AssignIOEventFD(fd int, addr uint64, length uint32, datamatch *uint64, pio bool) error {
	return vm.ioEventFD(fd, addr, length, datamatch, pio, 0)
}

// DeassignIOEventFD undoes AssignIOEventFD, given the same arguments.
func (vm *VM) DeassignIOEventFD(fd int, addr uint64, length uint32, datamatch *uint64, pio bool) error {
	return vm.ioEventFD(fd, addr, length, datamatch, pio, ioEventFDDeassign)
}

func (vm *VM) ioEventFD(fd int, addr uint64, length uint32, datamatch *uint64, pio bool, flags uint32) error {
	request := ioEventFD{addr: addr, length: length, fd: int32(fd), flags: flags}
	if datamatch != nil {
		request.datamatch = *datamatch
		request.flags |= ioEventFDDatamatch
	}
	if pio {
		request.flags |= ioEventFDPIO
	}
	if _, errno := ioctlPtr(vm.fd, nrIOEventFD, &request); errno != 0 {
		return fmt.Errorf("KVM_IOEVENTFD: %d bytes at %#x: %w", length, addr, errno)
	}
	return nil
}
