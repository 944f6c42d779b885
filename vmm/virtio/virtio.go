// Package virtio implements virtio 1.2 devices over PCI: split and packed
// virtqueues, the PCI transport, and the device types blk, net, console,
// vsock, rng and balloon.
//
// Section numbers refer to "Virtual I/O Device (VIRTIO) Version 1.2".
package virtio

import "github.com/gnomon-vmm/gnomon/mm/guestmem"

// DeviceID is a virtio device type (section 5).
type DeviceID uint16

// Device types.
const (
	IDNet     DeviceID = 1
	IDBlock   DeviceID = 2
	IDConsole DeviceID = 3
	IDRNG     DeviceID = 4
	IDBalloon DeviceID = 5
	IDVsock   DeviceID = 19
)

// Device is what a device type implements; the PCI transport drives it and
// owns everything the types share: feature negotiation, queue set-up, one
// worker goroutine for each queue, pause, reset, interrupts.
//
// A queue is touched only by its worker goroutine, inside Handle, or by what
// has joined that for a request that takes longer. What
// arrives from the host (a network frame, a vsock connection) is put in the
// device's own bounded buffer, and Queue.Wake makes the worker call Handle.
// So pausing the workers pauses the device.
type Device interface {
	// ID is the device type.
	ID() DeviceID
	// Features are the device-specific feature bits offered. The transport
	// adds VERSION_1, RING_EVENT_IDX, RING_INDIRECT_DESC and RING_PACKED.
	Features() uint64
	// QueueSizes are the largest sizes of the device's queues, in order.
	QueueSizes() []uint16
	// ReadConfig and WriteConfig access device configuration space. off+len(p)
	// may pass its end: such bytes read as zero and writes to them are ignored.
	ReadConfig(off int, p []byte)
	WriteConfig(off int, p []byte)
	// Start is called when the driver sets DRIVER_OK. features is what was
	// negotiated, all bits; queues[i] is nil where the driver enabled none. host reaches
	// the transport until Stop.
	Start(features uint64, queues []*Queue, host Host) error
	// Handle does the work of one queue: it pops until the queue is empty.
	// It is called on the queue's worker goroutine after a guest kick or
	// Queue.Wake. An error marks the device broken (DEVICE_NEEDS_RESET).
	Handle(q *Queue) error
	// Stop ends the device's use of its queues, on reset and on close. The
	// workers have stopped already.
	Stop()
}

// Host is what the transport offers a started device.
type Host interface {
	// ConfigChanged raises the configuration interrupt.
	ConfigChanged()
	// Fail marks the device broken, as an error from Handle does.
	Fail(err error)
}

// Feature bits that the transport offers for every device (section 6).
const (
	FeatureIndirectDesc uint64 = 1 << 28
	FeatureEventIdx     uint64 = 1 << 29
	FeatureVersion1     uint64 = 1 << 32
	FeatureRingPacked   uint64 = 1 << 34
)

// EventFDs turns a guest's writes into signals of eventfds, without a return
// to user space; kvm.VM is one. A length of 0 matches a write of any length.
type EventFDs interface {
	AssignIOEventFD(fd int, addr uint64, length uint32, datamatch *uint64, pio bool) error
	DeassignIOEventFD(fd int, addr uint64, length uint32, datamatch *uint64, pio bool) error
}

// Env is what a transport needs of its machine.
type Env struct {
	Mem *guestmem.Memory
	// EventFDs, where not nil, delivers notifications; otherwise all of them
	// arrive as MMIO writes.
	EventFDs EventFDs
	// OnBroken, where not nil, is told that a driver broke a device, which
	// then waits for its reset. It must not block or call the transport.
	OnBroken func(name string, err error)
}
