package boot

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
	"github.com/gnomon-vmm/gnomon/vmm/device"
)

// MaxCPUs is how many processors the tables can describe.
const MaxCPUs = 64

// ErrACPI wraps what ACPITables refuses.
var ErrACPI = errors.New("ACPI tables")

// ACPIConfig is what the tables tell beyond the fixed address map in package
// device.
type ACPIConfig struct {
	CPUs int // 1 to MaxCPUs; processor n has local APIC id n
	// HotplugSlots has a bit for each PCI slot that devices can be plugged into:
	// device.PCIHotplug serves them.
	HotplugSlots uint32
}

// Table sizes and ids. ACPI specification 6.5, chapter 5.
const (
	sdtHeaderSize = 36
	rsdpSize      = 36
	facsSize      = 64
	facsAlign     = 64
	fadtSize      = 276 // revision 6
	oemID         = "GNOMON"
	oemTableID    = "GNOMON  "
	creatorID     = "GNMN"
)

// ACPITables writes the machine's ACPI tables to ACPIAddr and returns the GPA
// of the RSDP, for Config.RSDP. The generation id at GenerationIDAddr is left
// alone.
func ACPITables(mem *guestmem.Memory, cfg ACPIConfig) (rsdp uint64, err error) {
	if cfg.CPUs < 1 || cfg.CPUs > MaxCPUs {
		return 0, fmt.Errorf("%w: %d processors: must be 1 to %d", ErrACPI, cfg.CPUs, MaxCPUs)
	}
	a := tableArea{next: ACPIAddr}
	rsdp = a.reserve(rsdpSize)
	facsAddr := a.place(facs(), facsAlign)
	dsdtAddr := a.place(dsdt(cfg.HotplugSlots), 16)
	xsdtAddr := a.place(xsdt(
		a.place(fadt(facsAddr, dsdtAddr), 16),
		a.place(madt(cfg.CPUs), 16),
		a.place(mcfg(), 16),
	), 16)
	copy(a.bytes, rsdpTable(xsdtAddr))
	if len(a.bytes) > ACPISize {
		return 0, fmt.Errorf("%w: %d bytes, there is room for %d", ErrACPI, len(a.bytes), ACPISize)
	}
	if err := mem.Write(ACPIAddr, a.bytes); err != nil {
		return 0, fmt.Errorf("%w: %w", ErrACPI, err)
	}
	return rsdp, nil
}

// tableArea lays tables one behind the other.
type tableArea struct {
	bytes []byte
	next  uint64
}

func (a *tableArea) reserve(n int) uint64 {
	gpa := a.next
	a.bytes = append(a.bytes, make([]byte, n)...)
	a.next += uint64(n)
	return gpa
}

func (a *tableArea) place(table []byte, align uint64) uint64 {
	a.reserve(int(-a.next & (align - 1)))
	gpa := a.reserve(len(table))
	copy(a.bytes[len(a.bytes)-len(table):], table)
	return gpa
}

// sdt puts the common header before a table's body.
func sdt(signature string, revision byte, body []byte) []byte {
	t := make([]byte, sdtHeaderSize, sdtHeaderSize+len(body))
	copy(t, signature)
	binary.LittleEndian.PutUint32(t[4:], uint32(sdtHeaderSize+len(body)))
	t[8] = revision
	copy(t[10:], oemID)
	copy(t[16:], oemTableID)
	binary.LittleEndian.PutUint32(t[24:], 1)
	copy(t[28:], creatorID)
	binary.LittleEndian.PutUint32(t[32:], 1)
	t = append(t, body...)
	t[9] = checksum(t)
	return t
}

// checksum is the byte that makes the sum of all bytes zero.
func checksum(b []byte) byte {
	var sum byte
	for _, c := range b {
		sum += c
	}
	return -sum
}

// rsdpTable is section 5.2.5.3's structure, revision 2.
func rsdpTable(xsdtAddr uint64) []byte {
	t := make([]byte, rsdpSize)
	copy(t, "RSD PTR ")
	copy(t[9:], oemID)
	t[15] = 2
	binary.LittleEndian.PutUint32(t[20:], rsdpSize)
	binary.LittleEndian.PutUint64(t[24:], xsdtAddr)
	t[8] = checksum(t[:20])
	t[32] = checksum(t)
	return t
}

func xsdt(tables ...uint64) []byte {
	var body []byte
	for _, gpa := range tables {
		body = binary.LittleEndian.AppendUint64(body, gpa)
	}
	return sdt("XSDT", 1, body)
}

// facs is section 5.2.10's structure; nothing in it is used without S3.
func facs() []byte {
	t := make([]byte, facsSize)
	copy(t, "FACS")
	binary.LittleEndian.PutUint32(t[4:], facsSize)
	t[32] = 2
	return t
}

// FADT flags and boot architecture flags, section 5.2.9.
const (
	fadtWBINVD      = 1 << 0
	fadtProcC1      = 1 << 2
	fadtNoSleepBtn  = 1 << 5 // no fixed sleep button; the power button is fixed
	fadtNoFixedRTC  = 1 << 6
	fadtResetReg    = 1 << 10
	bootLegacy      = 1 << 0
	boot8042        = 1 << 1
	bootNoVGA       = 1 << 2
	bootNoASPM      = 1 << 4
	latencyNone     = 0xFFFF // C2 and C3 are not supported
	spaceIO         = 1
	accessByte      = 1
	accessWord      = 2
	accessDword     = 3
	pm1EventLength  = 4
	pm1ControlLen   = 2
	pmTimerLength   = 4
	gpe0Length      = 4
	rtcCenturyIndex = 0x32
)

// fadt describes the ACPI registers: the full hardware model, always in ACPI
// mode (no SMI command port).
func fadt(facsAddr, dsdtAddr uint64) []byte {
	le := binary.LittleEndian
	t := make([]byte, fadtSize-sdtHeaderSize)
	at := func(off int) []byte { return t[off-sdtHeaderSize:] }
	gas := func(off int, bits, access byte, port uint64) {
		b := at(off)
		b[0], b[1], b[3] = spaceIO, bits, access
		le.PutUint64(b[4:], port)
	}
	le.PutUint32(at(36), uint32(facsAddr))
	le.PutUint32(at(40), uint32(dsdtAddr))
	le.PutUint16(at(46), device.GSISCI)
	le.PutUint32(at(56), device.PortPM1Event)
	le.PutUint32(at(64), device.PortPM1Control)
	le.PutUint32(at(76), device.PortPMTimer)
	le.PutUint32(at(80), device.PortGPE0)
	at(88)[0], at(89)[0], at(91)[0], at(92)[0] = pm1EventLength, pm1ControlLen, pmTimerLength, gpe0Length
	le.PutUint16(at(96), latencyNone)
	le.PutUint16(at(98), latencyNone)
	at(108)[0] = rtcCenturyIndex
	le.PutUint16(at(109), bootLegacy|boot8042|bootNoVGA|bootNoASPM)
	le.PutUint32(at(112), fadtWBINVD|fadtProcC1|fadtNoSleepBtn|fadtNoFixedRTC|fadtResetReg)
	gas(116, 8, accessByte, device.PortReset)
	at(128)[0] = device.ResetValue
	at(131)[0] = 5 // minor version: 6.5
	le.PutUint64(at(140), dsdtAddr)
	gas(148, pm1EventLength*8, accessWord, device.PortPM1Event)
	gas(172, pm1ControlLen*8, accessWord, device.PortPM1Control)
	gas(208, pmTimerLength*8, accessDword, device.PortPMTimer)
	gas(220, gpe0Length*8, accessByte, device.PortGPE0)
	copy(at(268), oemTableID)
	return sdt("FACP", 6, t)
}

// MADT structure types and flags, section 5.2.12.
const (
	madtLocalAPIC = 0
	madtIOAPIC    = 1
	madtOverride  = 2
	madtLAPICNMI  = 4
	madtDualPIC   = 1
	madtEnabled   = 1
	madtAllCPUs   = 0xFF
	madtNMIPin    = 1

	intiConforming      = 0
	intiActiveHighLevel = 1 | 3<<2
	ioapicID            = 0
	pitGSI              = 2
)

func madt(cpus int) []byte {
	le := binary.LittleEndian
	b := le.AppendUint32(nil, device.LAPICBase)
	b = le.AppendUint32(b, madtDualPIC)
	for n := range cpus {
		b = append(b, madtLocalAPIC, 8, byte(n), byte(n), madtEnabled, 0, 0, 0)
	}
	b = append(b, madtIOAPIC, 12, ioapicID, 0)
	b = le.AppendUint32(b, device.IOAPICBase)
	b = le.AppendUint32(b, 0) // its first GSI
	override := func(irq byte, gsi uint32, flags uint16) {
		b = append(b, madtOverride, 10, 0, irq)
		b = le.AppendUint32(b, gsi)
		b = le.AppendUint16(b, flags)
	}
	override(0, pitGSI, intiConforming)
	override(device.GSISCI, device.GSISCI, intiActiveHighLevel)
	b = append(b, madtLAPICNMI, 6, madtAllCPUs, 0, 0, madtNMIPin)
	return sdt("APIC", 5, b)
}

// mcfg tells where ECAM is. PCI Firmware specification 3.3, section 4.1.2.
func mcfg() []byte {
	b := make([]byte, 8, 24)
	b = binary.LittleEndian.AppendUint64(b, device.ECAMBase)
	b = append(b, 0, 0, 0, device.ECAMBuses-1) // segment group, first and last bus
	return sdt("MCFG", 1, append(b, 0, 0, 0, 0))
}
