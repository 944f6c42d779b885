package kvm

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrBitmap means that a dirty bitmap does not fit the memory slot.
var ErrBitmap = errors.New("dirty bitmap does not fit the slot")

// A VM is one virtual machine: memory slots, interrupt controllers, clock.
// Its methods may be called from any goroutine, but not after Close.
type VM struct {
	fd           int
	vcpuMmapSize int
	xsaveSize    int

	unreset atomic.Int64 // ring entries harvested and not given back yet

	mu       sync.Mutex
	slots    map[uint32]uint64 // guarded by mu; pages in each slot
	ringSize uint64            // guarded by mu; bytes of each VCPU's dirty ring; 0 without
}

func newVM(s *System, fd int) *VM {
	vm := &VM{fd: fd, vcpuMmapSize: s.VCPUMmapSize, slots: make(map[uint32]uint64)}
	vm.xsaveSize = max(vm.Check(CapXSave2), legacyXSaveSize)
	return vm
}

// FD returns the VM's descriptor, which stays owned by the VM.
func (vm *VM) FD() int { return vm.fd }

// Close closes the VM's descriptor. The kernel frees the machine when its
// VCPUs are closed too. A second Close does nothing.
func (vm *VM) Close() error { return closeFD(&vm.fd) }

func closeFD(fd *int) error {
	if *fd < 0 {
		return nil
	}
	err := unix.Close(*fd)
	*fd = -1
	return err
}

// Check is System.Check for this VM.
func (vm *VM) Check(c Cap) int {
	n, errno := ioctl(vm.fd, nrCheckExtension, uintptr(c))
	if errno != 0 {
		return 0
	}
	return n
}

// EnableCap turns on a capability of the VM (KVM_ENABLE_CAP); api.rst,
// sections 7 and 8, tells what the up to four arguments mean.
func (vm *VM) EnableCap(c Cap, args ...uint64) error {
	if err := enableCapOn(vm.fd, c, args); err != nil {
		return err
	}
	if (c == CapDirtyLogRing || c == CapDirtyLogRingAcqRel) && len(args) > 0 {
		vm.mu.Lock()
		vm.ringSize = args[0]
		vm.mu.Unlock()
	}
	return nil
}

func enableCapOn(fd int, c Cap, args []uint64) error {
	request := enableCap{cap: uint32(c)}
	if copy(request.args[:], args) != len(args) {
		return fmt.Errorf("KVM_ENABLE_CAP %v: %w: more than %d arguments", c, unix.E2BIG, len(request.args))
	}
	if _, errno := ioctlPtr(fd, nrEnableCap, &request); errno != 0 {
		return fmt.Errorf("KVM_ENABLE_CAP %v: %w", c, errno)
	}
	return nil
}

const pageSize = 4096

// SetMemory makes, changes or (with len(mem) == 0) deletes a memory slot: mem
// appears to the guest at gpa. flags are Mem* bits. gpa and mem must be
// page-aligned, and mem must be memory that the garbage collector does not
// manage, mapped for as long as the slot exists. Slots cost far less before
// CreateIRQChip than after it.
func (vm *VM) SetMemory(slot, flags uint32, gpa uint64, mem []byte) error {
	region := userspaceMemoryRegion{
		Slot:          slot,
		Flags:         flags,
		GuestPhysAddr: gpa,
		MemorySize:    uint64(len(mem)),
		UserspaceAddr: address(mem),
	}
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if _, errno := ioctlPtr(vm.fd, nrSetUserMemoryRegion, &region); errno != 0 {
		return fmt.Errorf("KVM_SET_USER_MEMORY_REGION: slot %d, %#x bytes at %#x: %w", slot, len(mem), gpa, errno)
	}
	if len(mem) == 0 {
		delete(vm.slots, slot)
	} else {
		vm.slots[slot] = uint64(len(mem)) / pageSize
	}
	return nil
}

// DirtyLog reads which of a slot's pages were written, a bit each, lowest
// first. It needs MemLogDirtyPages, and a bitmap of a word for each 64 pages
// begun. It clears the log as it reads, unless CapManualDirtyLogProtect2 is
// enabled; then ClearDirtyLog does.
func (vm *VM) DirtyLog(slot uint32, bitmap []uint64) error {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	// The kernel writes as many words as the slot has, whatever we pass.
	if pages, ok := vm.slots[slot]; !ok || uint64(len(bitmap)) < (pages+63)/64 {
		return fmt.Errorf("KVM_GET_DIRTY_LOG: %w: slot %d has %d pages, bitmap %d words", ErrBitmap, slot, pages, len(bitmap))
	}
	request := dirtyLog{slot: slot, bitmap: &bitmap[0]}
	if _, errno := ioctlPtr(vm.fd, nrGetDirtyLog, &request); errno != 0 {
		return fmt.Errorf("KVM_GET_DIRTY_LOG: slot %d: %w", slot, errno)
	}
	return nil
}

// ClearDirtyLog write-protects again the pages whose bits are set; bit 0 is
// firstPage. firstPage must be a multiple of 64, and numPages too unless it
// reaches the end of the slot. It needs CapManualDirtyLogProtect2 enabled.
func (vm *VM) ClearDirtyLog(slot uint32, firstPage uint64, numPages uint32, bitmap []uint64) error {
	if numPages == 0 || uint64(len(bitmap)) < (uint64(numPages)+63)/64 {
		return fmt.Errorf("KVM_CLEAR_DIRTY_LOG: %w: slot %d, %d pages, bitmap %d words", ErrBitmap, slot, numPages, len(bitmap))
	}
	request := clearDirtyLog{slot: slot, numPages: numPages, firstPage: firstPage, bitmap: &bitmap[0]}
	if _, errno := ioctlPtr(vm.fd, nrClearDirtyLog, &request); errno != 0 {
		return fmt.Errorf("KVM_CLEAR_DIRTY_LOG: slot %d, %d pages from %d: %w", slot, numPages, firstPage, errno)
	}
	return nil
}

// Clock reads kvmclock.
func (vm *VM) Clock() (ClockData, error) {
	var clock ClockData
	_, errno := ioctlPtr(vm.fd, nrGetClock, &clock)
	return clock, result("KVM_GET_CLOCK", errno)
}

// SetClock sets kvmclock. Of the flags it passes on ClockRealtime only, so
// that what Clock returned may be given back.
func (vm *VM) SetClock(clock ClockData) error {
	clock.Flags &= ClockRealtime
	_, errno := ioctlPtr(vm.fd, nrSetClock, &clock)
	return result("KVM_SET_CLOCK", errno)
}

// SetTSSAddr gives KVM three pages of guest physical address space below
// 4 GiB, which it needs on Intel hosts.
func (vm *VM) SetTSSAddr(gpa uint64) error {
	_, errno := ioctl(vm.fd, nrSetTSSAddr, uintptr(gpa))
	return result("KVM_SET_TSS_ADDR", errno)
}

// SetIdentityMapAddr gives KVM one page of guest physical address space below
// 4 GiB, which it needs on Intel hosts; before the first CreateVCPU.
func (vm *VM) SetIdentityMapAddr(gpa uint64) error {
	_, errno := ioctlPtr(vm.fd, nrSetIdentityMapAddr, &gpa)
	return result("KVM_SET_IDENTITY_MAP_ADDR", errno)
}

// Stats reads the VM's statistics.
func (vm *VM) Stats() ([]Stat, error) { return readStats(vm.fd) }

// CreateVCPU adds a virtual CPU; id is its APIC id.
func (vm *VM) CreateVCPU(id int) (*VCPU, error) {
	fd, errno := ioctl(vm.fd, nrCreateVCPU, uintptr(id))
	if errno != 0 {
		return nil, fmt.Errorf("KVM_CREATE_VCPU %d: %w", id, errno)
	}
	shared, err := unix.Mmap(fd, 0, vm.vcpuMmapSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("vCPU %d: map run page: %w", id, err)
	}
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return &VCPU{
		ID: id, fd: fd, shared: shared, run: runPageOf(shared), xsaveSize: vm.xsaveSize,
		ring: dirtyRing{size: vm.ringSize, unreset: &vm.unreset},
	}, nil
}

// errnoOrNil makes an errno an error without allocating.
func errnoOrNil(errno syscall.Errno) error {
	if errno == 0 {
		return nil
	}
	return errno
}
