package monitor

import "github.com/gnomon-vmm/gnomon/qmp"

type (
	pciBus struct {
		Bus     int64       `qmp:"bus"`
		Devices []pciDevice `qmp:"devices"`
	}
	pciDevice struct {
		Bus      int64       `qmp:"bus"`
		Slot     int64       `qmp:"slot"`
		Function int64       `qmp:"function"`
		Class    pciClass    `qmp:"class_info"`
		ID       pciID       `qmp:"id"`
		IRQ      *int64      `qmp:"irq"`
		IRQPin   int64       `qmp:"irq_pin"`
		QdevID   string      `qmp:"qdev_id"`
		Regions  []pciRegion `qmp:"regions"`
	}
	pciClass struct {
		Desc  *string `qmp:"desc"`
		Class int64   `qmp:"class"`
	}
	pciID struct {
		Device          int64  `qmp:"device"`
		Vendor          int64  `qmp:"vendor"`
		Subsystem       *int64 `qmp:"subsystem"`
		SubsystemVendor *int64 `qmp:"subsystem-vendor"`
	}
	pciRegion struct {
		BAR       int64  `qmp:"bar"`
		Type      string `qmp:"type"`
		Address   int64  `qmp:"address"` // -1: the guest has not mapped it
		Size      int64  `qmp:"size"`
		Prefetch  *bool  `qmp:"prefetch"`
		MemType64 *bool  `qmp:"mem_type_64"`
	}
)

// pciClasses are QEMU's words for the classes that the machine has: class and
// subclass, as the PCI code and ID assignment specification numbers them.
var pciClasses = map[int64]string{
	0x0100: "SCSI controller",
	0x0200: "Ethernet controller",
	0x0600: "Host bridge",
	0x0780: "Communication controller",
}

func (mon *monitor) registerPCI(reg *qmp.Registry) {
	query(reg, "query-pci", func() []pciBus { return []pciBus{{Devices: mon.pciDevices()}} })
}

func (mon *monitor) pciDevices() (all []pciDevice) {
	names := map[int]string{}
	for _, p := range mon.m.Virtio() {
		names[p.Function().Slot()] = p.Name()
	}
	for _, f := range mon.m.PCI() {
		d := pciDevice{
			Bus: int64(f.Bus), Slot: int64(f.Slot), Function: int64(f.Function),
			Class: pciClass{Class: int64(f.Class >> 8)},
			ID: pciID{
				Device: int64(f.Device), Vendor: int64(f.Vendor),
				Subsystem: integer(f.Subsystem), SubsystemVendor: integer(f.SubsystemVendor),
			},
			IRQPin: int64(f.InterruptPin), QdevID: names[f.Slot],
		}
		if desc, ok := pciClasses[d.Class.Class]; ok {
			d.Class.Desc = &desc
		}
		if f.InterruptPin != 0 {
			d.IRQ = integer(f.GSI)
		}
		for _, b := range f.BARs {
			r := pciRegion{
				BAR: int64(b.BAR), Type: "memory", Address: -1, Size: int64(b.Size),
				Prefetch: new(bool), MemType64: new(bool), // the machine's BARs are neither
			}
			if b.Mapped {
				r.Address = int64(b.Address)
			}
			d.Regions = append(d.Regions, r)
		}
		all = append(all, d)
	}
	return all
}

// integer is an optional integer that is there.
func integer[T ~int | ~uint16 | ~uint64](v T) *int64 {
	i := int64(v)
	return &i
}
