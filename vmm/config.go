package vmm

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/changes"
	"github.com/gnomon-vmm/gnomon/vmm/boot"
	"github.com/gnomon-vmm/gnomon/vmm/chardev"
	"github.com/gnomon-vmm/gnomon/vmm/virtio"
	"github.com/gnomon-vmm/gnomon/vmm/vsockhost"
)

// Limits of a machine.
const (
	MaxCPUs   = 64
	MinMemory = 1 << 20
	MaxMemory = 1 << 40
	maxSerial = 20 // bytes
)

// Errors by stage; each is wrapped around its cause.
var (
	ErrConfig = errors.New("machine configuration")
	ErrSetup  = errors.New("set up machine")
	ErrLoad   = errors.New("load guest")
	ErrRun    = errors.New("run machine")
	ErrState  = errors.New("machine state")
	ErrClosed = errors.New("machine is closed")
)

// Config describes a machine. The machine owns what it is given (disks,
// backends, the kernel's file) once New returns without an error, and closes it.
type Config struct {
	Name string
	UUID UUID // zero: a random one

	CPUs   int    // 0: 1
	Memory uint64 // bytes; 0: 128 MiB

	Kernel     *boot.Kernel
	Initrd     io.ReaderAt // nil: none; read again at each reset
	InitrdSize int64       // bytes of Initrd
	Cmdline    string      // kernel command line

	Disks   []Disk
	Nets    []Net
	Vsock   *Vsock
	Serial  chardev.Backend // COM1; nil: none connected
	Console chardev.Backend // virtio console; nil: no such device

	NoBalloon bool
	NoRNG     bool

	// Restore, where not nil, makes a machine that goes on where a saved one
	// stood. Kernel may then be nil: the guest cannot reset itself.
	Restore *Restore

	// DirtyRing is the size of each vCPU's dirty ring, in pages; 0: dirty pages
	// are found by KVM's log.
	DirtyRing int

	// NoAssist keeps vmm/assist out even where ring 0 does not run natively.
	NoAssist bool
	// Paused: Run starts with the vCPUs stopped, until Resume.
	Paused bool
	// NoReboot makes a guest's reset end Run.
	NoReboot bool
	// KVM is the device to open; "": /dev/kvm.
	KVM string
	// Log gets one line for each thing worth telling; nil: nobody.
	Log func(format string, args ...any)
}

// Disk is a virtio block device.
type Disk struct {
	ID     string     // as QMP shows it; "": disk0, disk1, ...
	Node   block.Node // a Root is used as it is
	Serial string     // up to 20 bytes, seen by the guest; "": the ID
	Queues int        // 0: one for each vCPU, at most 4
	// ReadError and WriteError say what becomes of requests that fail on the host;
	// "": OnErrorReport.
	ReadError, WriteError OnError
	// Changes records what changes on the disk; nil: nobody does. It is closed after
	// the disk.
	Changes *changes.Recorder

	slot int // of a disk that was plugged into the machine that was saved; 0: the next
}

// OnError is what becomes of a request that failed, in the words of QEMU's rerror and
// werror.
type OnError string

// Policies for errors.
const (
	OnErrorReport  OnError = "report" // the guest is told
	OnErrorIgnore  OnError = "ignore" // the guest is told that it has worked
	OnErrorStop    OnError = "stop"   // the machine is paused; Resume has it tried again
	OnErrorNoSpace OnError = "enospc" // OnErrorStop for want of space, OnErrorReport for the rest
)

// sideBySide is how many requests of a queue are under way at most on a disk whose
// requests wait for a device.
const sideBySide = 64

// depth is how many requests of a queue are served side by side: one by one where a
// request that fails may have the machine stop.
func (d *Disk) depth() int {
	for _, policy := range []OnError{d.ReadError, d.WriteError} {
		if policy == OnErrorStop || policy == OnErrorNoSpace {
			return 1
		}
	}
	return sideBySide
}

// onIOError decides by the disk's policies.
func (d *Disk) onIOError(op virtio.BlkOp, err error) virtio.BlkAction {
	policy := d.WriteError
	if op == virtio.BlkRead {
		policy = d.ReadError
	}
	switch {
	case policy == OnErrorIgnore:
		return virtio.BlkIgnore
	case policy == OnErrorStop, policy == OnErrorNoSpace && errors.Is(err, syscall.ENOSPC):
		return virtio.BlkStop
	}
	return virtio.BlkReport
}

// known tells whether there is such a policy.
func (p OnError) known() bool {
	return p == "" || p == OnErrorReport || p == OnErrorIgnore || p == OnErrorStop || p == OnErrorNoSpace
}

// Net is a virtio network device.
type Net struct {
	ID      string // "": net0, net1, ...
	Backend virtio.NetBackend
	MAC     net.HardwareAddr // nil: 52:54:00 and three bytes made of the machine's UUID
}

// Vsock is a virtio socket device.
type Vsock struct {
	CID  uint32          // the guest's context id, at least 3
	Host *vsockhost.Host // the host's side, as unix sockets
}

// UUID identifies a machine.
type UUID [16]byte

// NewUUID makes a random (version 4) UUID.
func NewUUID() UUID {
	var u UUID
	rand.Read(u[:]) // never fails
	u[6] = u[6]&0x0F | 0x40
	u[8] = u[8]&0x3F | 0x80
	return u
}

// ParseUUID reads the 8-4-4-4-12 form.
func ParseUUID(s string) (UUID, error) {
	var u UUID
	bad := fmt.Errorf("%w: UUID %q: must look like 123e4567-e89b-42d3-a456-426614174000", ErrConfig, s)
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return u, bad
	}
	if _, err := hex.Decode(u[:], []byte(s[:8]+s[9:13]+s[14:18]+s[19:23]+s[24:])); err != nil {
		return UUID{}, bad
	}
	return u, nil
}

func (u UUID) String() string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[0:4], u[4:6], u[6:8], u[8:10], u[10:16])
}

func (c *Config) setDefaults() {
	if c.CPUs == 0 {
		c.CPUs = 1
	}
	if c.Memory == 0 {
		c.Memory = 128 << 20
	}
	if c.UUID == (UUID{}) {
		c.UUID = NewUUID()
	}
	if c.Log == nil {
		c.Log = func(string, ...any) {}
	}
	for i := range c.Disks {
		d := &c.Disks[i]
		if d.ID == "" {
			d.ID = fmt.Sprintf("disk%d", i)
		}
		d.setDefaults(c.CPUs)
	}
	for i := range c.Nets {
		n := &c.Nets[i]
		if n.ID == "" {
			n.ID = fmt.Sprintf("net%d", i)
		}
		if n.MAC == nil {
			n.MAC = net.HardwareAddr{0x52, 0x54, 0x00, c.UUID[13], c.UUID[14], c.UUID[15] + byte(i)}
		}
	}
}

func (d *Disk) setDefaults(cpus int) {
	if d.Serial == "" {
		d.Serial = d.ID[:min(len(d.ID), maxSerial)]
	}
	if d.Queues == 0 {
		d.Queues = min(cpus, 4)
	}
}

func (d *Disk) validate() error {
	switch {
	case d.Node == nil:
		return fmt.Errorf("%w: disk %s has no node", ErrConfig, d.ID)
	case len(d.Serial) > maxSerial:
		return fmt.Errorf("%w: disk %s: serial %q is longer than %d bytes", ErrConfig, d.ID, d.Serial, maxSerial)
	case d.Queues < 1 || d.Queues > MaxCPUs:
		return fmt.Errorf("%w: disk %s: %d queues: 1 to %d are possible", ErrConfig, d.ID, d.Queues, MaxCPUs)
	case !d.ReadError.known() || !d.WriteError.known():
		return fmt.Errorf("%w: disk %s: errors are handled by %q and %q: report, ignore, stop and enospc are possible", ErrConfig, d.ID, d.ReadError, d.WriteError)
	}
	return nil
}

func (c *Config) validate() error {
	switch {
	case c.CPUs < 1 || c.CPUs > MaxCPUs:
		return fmt.Errorf("%w: %d vCPUs: 1 to %d are possible", ErrConfig, c.CPUs, MaxCPUs)
	case c.Memory < MinMemory || c.Memory > MaxMemory:
		return fmt.Errorf("%w: %d bytes of memory: 1 MiB to 1 TiB are possible", ErrConfig, c.Memory)
	case c.Memory%(1<<20) != 0:
		return fmt.Errorf("%w: %d bytes of memory: must be whole MiB", ErrConfig, c.Memory)
	case c.Kernel == nil && c.Restore == nil:
		return fmt.Errorf("%w: no kernel: name a bzImage or an ELF vmlinux", ErrConfig)
	case c.Vsock != nil && c.Vsock.Host == nil:
		return fmt.Errorf("%w: the vsock device has no host side", ErrConfig)
	case c.Vsock != nil && (c.Vsock.CID < 3 || c.Vsock.CID == 0xFFFF_FFFF):
		return fmt.Errorf("%w: vsock CID %d: 3 to 4294967294 are possible", ErrConfig, c.Vsock.CID)
	}
	seen := map[string]bool{}
	for _, d := range c.Disks {
		if err := d.validate(); err != nil {
			return err
		}
		if seen[d.ID] {
			return fmt.Errorf("%w: two devices are named %s", ErrConfig, d.ID)
		}
		seen[d.ID] = true
	}
	for _, n := range c.Nets {
		switch {
		case n.Backend == nil:
			return fmt.Errorf("%w: network device %s has no backend", ErrConfig, n.ID)
		case len(n.MAC) != 6 || n.MAC[0]&1 != 0:
			return fmt.Errorf("%w: network device %s: MAC %s is not a unicast Ethernet address", ErrConfig, n.ID, n.MAC)
		case seen[n.ID]:
			return fmt.Errorf("%w: two devices are named %s", ErrConfig, n.ID)
		}
		seen[n.ID] = true
	}
	return nil
}
