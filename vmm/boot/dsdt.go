package boot

import (
	"fmt"
	"slices"

	"github.com/gnomon-vmm/gnomon/vmm/device"
)

const (
	irqKeyboard = 1
	pciSlots    = 32
)

// dsdt describes the devices that cannot be found by looking. All of it is
// static data but for the methods of events and slots, since a guest whose ring 0
// is interpreted takes its time over AML.
func dsdt(hotplugSlots uint32) []byte {
	hid := func(id string) []byte { return amlNamed("_HID", amlEISAID(id)) }
	crs := func(resources ...[]byte) []byte { return amlNamed("_CRS", amlResources(resources...)) }

	system := amlInScope("_SB",
		amlDevice("PCI0",
			hid("PNP0A08"), // PCI Express host bridge
			amlNamed("_CID", amlEISAID("PNP0A03")),
			amlNamed("_UID", amlInt(0)),
			crs(
				resourceBuses(0, device.ECAMBuses-1),
				resourceIO(device.PortPCIAddress, 8),
				resourceWindow(device.PCIMMIOBase, device.PCIMMIOSize),
			),
			amlNamed("_PRT", pciRouting()),
			pciHotplug(hotplugSlots),
		),
		amlDevice("ECAM", // the specification wants ECAM to be a motherboard resource
			hid("PNP0C02"),
			crs(resourceMemory(device.ECAMBase, device.ECAMSize)),
		),
		amlDevice("COM1",
			hid("PNP0501"),
			amlNamed("_UID", amlInt(0)),
			crs(resourceIO(device.PortCOM1, 8), resourceIRQ(device.GSICOM1)),
		),
		amlDevice("RTC",
			hid("PNP0B00"),
			crs(resourceIO(device.PortRTC, 2), resourceIRQ(device.GSIRTC)),
		),
		amlDevice("KBD",
			hid("PNP0303"),
			crs(resourceIO(device.PortI8042Data, 1), resourceIO(device.PortI8042Cmd, 1), resourceIRQ(irqKeyboard)),
		),
		amlDevice("PVPN",
			amlNamed("_HID", amlText("QEMU0001")),
			crs(resourceIO(device.PortPVPanic, 1)),
		),
		// Virtual Machine Generation ID (Microsoft, 2012).
		amlDevice("VGEN",
			amlNamed("_HID", amlText("GNOM0001")),
			amlNamed("_CID", amlText("VM_Gen_Counter")),
			amlNamed("_DDN", amlText("VM_Gen_Counter")),
			amlNamed("ADDR", amlList(amlInt(GenerationIDAddr&0xFFFF_FFFF), amlInt(GenerationIDAddr>>32))),
		),
	)
	generationChanged := amlInScope("_GPE",
		amlProcedure(fmt.Sprintf("_E%02X", device.GPEGenerationID), amlNotification(`\_SB.VGEN`, 0x80)),
	)
	devicesChanged := pciHotplugEvent(hotplugSlots)
	powerOff := amlNamed("_S5", amlList(amlInt(device.SleepTypeS5), amlInt(0), amlInt(0), amlInt(0)))

	var body []byte
	for _, term := range [][]byte{system, generationChanged, devicesChanged, powerOff} {
		body = append(body, term...)
	}
	return sdt("DSDT", 2, body)
}

// pciRouting is a _PRT (ACPI section 6.2.13): INTA of each slot goes to a fixed GSI.
func pciRouting() []byte {
	var routes [][]byte
	for slot := uint64(1); slot < pciSlots; slot++ {
		const anyFunction, pinA, fixed = 0xFFFF, 0, 0
		routes = append(routes, amlList(
			amlInt(slot<<16|anyFunction), amlInt(pinA), amlInt(fixed), amlInt(device.GSIPCIFirst+slot%device.GSIPCICount)))
	}
	return amlList(routes...)
}

// The registers of device.PCIHotplug, as AML calls them.
const (
	hotplugUp, hotplugDown, hotplugEject = "PCIU", "PCID", "B0EJ"

	deviceCheck  = 1 // notifications of ACPI section 5.6.6
	ejectRequest = 3
)

func hotplugSlotName(slot int) string { return fmt.Sprintf("S%02X", slot) }

func eachSlot(slots uint32, f func(slot int) []byte) (terms []byte) {
	for slot := range pciSlots {
		if slots&(1<<slot) != 0 {
			terms = append(terms, f(slot)...)
		}
	}
	return terms
}

// pciHotplug are the objects of the slots that devices can be plugged into, below
// the host bridge. A guest lets go of a device by the slot's _EJ0.
func pciHotplug(slots uint32) []byte {
	if slots == 0 {
		return nil
	}
	registers := slices.Concat(
		amlPortRegion("PCST", device.PortPCIHotplug, device.PCIHotplugRemovable),
		amlDwords("PCST", hotplugUp, hotplugDown, hotplugEject),
	)
	return append(registers, eachSlot(slots, func(slot int) []byte {
		return amlDevice(hotplugSlotName(slot),
			amlNamed("_ADR", amlInt(uint64(slot)<<16)),
			amlNamed("_SUN", amlInt(uint64(slot))),
			amlMethodOf("_EJ0", 1, amlAssign(amlInt(1<<slot), hotplugEject)),
		)
	})...)
}

// pciHotplugEvent tells the guest's kernel of the slots that the registers name.
func pciHotplugEvent(slots uint32) []byte {
	if slots == 0 {
		return nil
	}
	const bridge = `\_SB.PCI0.`
	changed := func(register string, what uint64) []byte {
		return append(amlToLocal0(bridge+register), eachSlot(slots, func(slot int) []byte {
			return amlIfLocal0(1<<slot, amlNotification(bridge+hotplugSlotName(slot), what))
		})...)
	}
	return amlInScope("_GPE", amlProcedure(fmt.Sprintf("_E%02X", device.GPEPCIHotplug),
		changed(hotplugDown, ejectRequest), changed(hotplugUp, deviceCheck)))
}
