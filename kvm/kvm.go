// Package kvm is typed access to /dev/kvm and nothing else: the three kinds of
// descriptor (System, VM, VCPU), their ioctls, the shared run page and the
// dirty ring. It follows Documentation/virt/kvm/api.rst of Linux for x86-64
// and stands on github.com/c35s/hype/kvm, whose types it shares.
//
// Methods on the exit path (Run, the exit accessors, register access, SyncRegs,
// HarvestDirty, IRQLine, SignalMSI) do not allocate. Descriptors are plain
// integers owned by their VM or VCPU until Close: nothing is closed by a
// finalizer behind the caller's back.
package kvm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"sync"
	"syscall"

	hype "github.com/c35s/hype/kvm"
	"golang.org/x/sys/unix"
)

// DevicePath is where Linux puts the KVM device.
const DevicePath = "/dev/kvm"

// APIVersion is the only KVM API version there has been since Linux 2.6.22.
const APIVersion = hype.StableAPIVersion

// What can be wrong with the device, told apart by errors.Is on what Open
// returns.
var (
	ErrNoKVM      = errors.New("KVM is not available")
	ErrPermission = errors.New("no permission to use KVM")
	ErrAPIVersion = errors.New("unsupported KVM API version")
)

// System is an open /dev/kvm. Its methods may be called from any goroutine.
type System struct {
	file *os.File
	// VCPUMmapSize is the size in bytes of the region each VCPU shares with
	// the kernel.
	VCPUMmapSize int
}

// Open opens /dev/kvm and checks its API version. The error is one line that
// says what is wrong and what to do, and is one of ErrNoKVM, ErrPermission and
// ErrAPIVersion where those apply.
func Open() (*System, error) { return OpenPath(DevicePath) }

// OpenPath is Open for a KVM device at another path.
func OpenPath(path string) (*System, error) {
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, explainOpen(path, err)
	}
	s := &System{file: file}
	if err := s.init(path); err != nil {
		file.Close()
		return nil, err
	}
	return s, nil
}

func explainOpen(path string, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		return fmt.Errorf("%w: %w: load the module (modprobe kvm_intel or kvm_amd), enable virtualisation "+
			"in the firmware, or pass %s into the container", ErrNoKVM, err, path)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: %w: add yourself to the group that owns %s (usually kvm), or run as root",
			ErrPermission, err, path)
	}
	return fmt.Errorf("%w: %w", ErrNoKVM, err)
}

func (s *System) init(path string) error {
	version, err := hype.GetAPIVersion(s.file)
	if err != nil {
		return fmt.Errorf("%w: %s is not a KVM device (KVM_GET_API_VERSION: %w)", ErrNoKVM, path, err)
	}
	if version != APIVersion {
		return fmt.Errorf("%w: %s speaks version %d, not %d: use Linux 2.6.22 or later", ErrAPIVersion, path, version, APIVersion)
	}
	if s.VCPUMmapSize, err = hype.GetVCPUMmapSize(s.file); err != nil {
		return opError("KVM_GET_VCPU_MMAP_SIZE", err)
	}
	if s.VCPUMmapSize < runPageSize {
		return fmt.Errorf("%w: vCPU region of %d bytes is too small", ErrAPIVersion, s.VCPUMmapSize)
	}
	return nil
}

// Close closes the device. VMs made from it stay usable.
func (s *System) Close() error { return s.file.Close() }

// Check returns what KVM_CHECK_EXTENSION says of a capability: 0 when it is
// absent, otherwise 1 or a figure whose meaning depends on the capability.
// Ask VM.Check where the answer may depend on the VM.
func (s *System) Check(c Cap) int {
	defer runtime.KeepAlive(s.file) // which closes itself when it is garbage
	n, err := hype.CheckExtension(s.file, hype.Cap(c))
	if err != nil {
		return 0
	}
	return n
}

// The table costs 0.6 ms to ask for and cannot change while the host runs.
var supportedCPUID struct {
	sync.Mutex
	entries []CPUIDEntry // guarded by Mutex; nil until asked for
}

// SupportedCPUID returns the CPUID leaves that the host and KVM can offer a
// guest. The caller may change the returned slice.
func (s *System) SupportedCPUID() ([]CPUIDEntry, error) {
	defer runtime.KeepAlive(s.file)
	supportedCPUID.Lock()
	defer supportedCPUID.Unlock()
	if supportedCPUID.entries == nil {
		entries, err := hype.GetSupportedCPUID(s.file)
		if err != nil {
			return nil, opError("KVM_GET_SUPPORTED_CPUID", err)
		}
		supportedCPUID.entries = entries
	}
	return append([]CPUIDEntry(nil), supportedCPUID.entries...), nil
}

// MSRIndexList returns the indices of the MSRs that a VCPU's state consists
// of: those to save and restore.
func (s *System) MSRIndexList() ([]uint32, error) {
	defer runtime.KeepAlive(s.file)
	for size := 256; ; size *= 2 {
		list := make([]uint32, 1+size)
		list[0] = uint32(size)
		_, errno := ioctlPtr(int(s.file.Fd()), nrGetMSRIndexList, &list[0])
		switch {
		case errno == unix.E2BIG && size < 1<<16:
			continue
		case errno != 0:
			return nil, opError("KVM_GET_MSR_INDEX_LIST", errno)
		}
		return list[1 : 1+min(list[0], uint32(size))], nil
	}
}

// CreateVM makes an empty virtual machine.
func (s *System) CreateVM() (*VM, error) {
	defer runtime.KeepAlive(s.file)
	for {
		fd, errno := ioctl(int(s.file.Fd()), nrCreateVM, 0)
		switch errno {
		case 0:
			return newVM(s, fd), nil
		case unix.EINTR: // a signal, such as the Go scheduler's, arrived meanwhile
		default:
			return nil, opError("KVM_CREATE_VM", errno)
		}
	}
}

// opError names the ioctl that failed.
func opError(op string, err error) error { return fmt.Errorf("%s: %w", op, err) }

// result turns what an ioctl returned into an error that names it.
func result(op string, errno syscall.Errno) error {
	if errno == 0 {
		return nil
	}
	return opError(op, errno)
}
