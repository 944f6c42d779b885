package device

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// testFunction is a device with two BARs of memory and MSI-X in the second.
type testFunction struct {
	fn     *PCIFunction
	msix   *MSIX
	resets int
	ram    [0x1000]byte
	moves  []uint64 // where BAR 0 was, 0 for nowhere
}

func newTestFunction(t testing.TB) *testFunction {
	t.Helper()
	d := &testFunction{fn: NewPCIFunction(PCIIdentity{Vendor: 0x1AF4, Device: 0x1042, SubsystemVendor: 0x1AF4, Subsystem: 0x1100, Class: 0x010000, Revision: 1})}
	d.fn.EnableINTx()
	d.fn.OnMove = func(bar int, base uint64, mapped bool) {
		if bar == 0 && mapped {
			d.moves = append(d.moves, base)
		} else if bar == 0 {
			d.moves = append(d.moves, 0)
		}
	}
	if err := d.fn.AddBAR(0, 0x1000, d); err != nil {
		t.Fatal(err)
	}
	var err error
	if d.msix, err = d.fn.AddMSIX(3, 4, 0); err != nil {
		t.Fatal(err)
	}
	if err := d.fn.AddBAR(4, 0x4000, d.msix); err != nil {
		t.Fatal(err)
	}
	return d
}

func (d *testFunction) Function() *PCIFunction     { return d.fn }
func (d *testFunction) Reset()                     { d.resets++ }
func (d *testFunction) Read(off uint64, p []byte)  { copy(p, d.ram[off:]) }
func (d *testFunction) Write(off uint64, p []byte) { copy(d.ram[off:], p) }

// testMSI records messages.
type testMSI struct{ sent []uint32 }

func (m *testMSI) SignalMSI(addr uint64, data uint32) error {
	if addr != 0xFEE0_0000 {
		return errors.New("nobody there")
	}
	m.sent = append(m.sent, data)
	return nil
}

// testPCI is a machine's PCI.
type testPCI struct {
	host  *PCIHost
	mmio  *Bus
	ports *Bus
	msi   testMSI
	lines [GSIPCICount]bool
}

func newTestPCI(t testing.TB) *testPCI {
	t.Helper()
	m := &testPCI{mmio: NewBus("MMIO"), ports: NewBus("port")}
	var lines [GSIPCICount]Line
	for i := range lines {
		lines[i] = LineFunc(func(high bool) { m.lines[i] = high })
	}
	m.host = NewPCIHost(m.mmio, &m.msi, lines)
	if err := m.ports.Map(PortPCIAddress, PCIPortCount, m.host.Ports(nil)); err != nil {
		t.Fatal(err)
	}
	if err := m.mmio.Map(ECAMBase, ECAMSize, m.host.ECAM()); err != nil {
		t.Fatal(err)
	}
	return m
}

func (m *testPCI) add(t testing.TB, slot int) *testFunction {
	t.Helper()
	d := newTestFunction(t)
	if err := m.host.Add(slot, d); err != nil {
		t.Fatal(err)
	}
	return d
}

func (m *testPCI) read(slot, reg, n int) uint32 {
	var p [4]byte
	m.mmio.Read(ECAMBase+uint64(slot)<<15+uint64(reg), p[:n])
	return binary.LittleEndian.Uint32(p[:])
}

func (m *testPCI) write(slot, reg, n int, v uint32) {
	m.mmio.Write(ECAMBase+uint64(slot)<<15+uint64(reg), binary.LittleEndian.AppendUint32(nil, v)[:n])
}

// portRead is mechanism #1.
func (m *testPCI) portRead(slot, reg, n int) uint32 {
	m.ports.Write(PortPCIAddress, binary.LittleEndian.AppendUint32(nil, 1<<31|uint32(slot)<<11|uint32(reg&0xFC)))
	var p [4]byte
	m.ports.Read(PortPCIData+uint64(reg&3), p[:n])
	return binary.LittleEndian.Uint32(p[:])
}

func TestPCIConfigByPortsAndECAM(t *testing.T) {
	m := newTestPCI(t)
	m.add(t, 5)
	for _, get := range []func(slot, reg, n int) uint32{m.read, m.portRead} {
		for _, c := range []struct {
			slot, reg, n int
			want         uint32
		}{
			{0, 0, 4, 0x29C0_8086},
			{0, 0x0A, 2, 0x0600},
			{5, 0, 4, 0x1042_1AF4},
			{5, 2, 2, 0x1042},
			{5, 3, 1, 0x10},
			{5, 8, 4, 0x0100_0001},
			{5, 0x2C, 4, 0x1100_1AF4},
			{5, 0x3C, 2, 0x0100 | GSIPCIFirst + 5},
			{6, 0, 4, 0xFFFF_FFFF},
			{31, 0, 2, 0xFFFF},
		} {
			if got := get(c.slot, c.reg, c.n); got != c.want {
				t.Errorf("slot %d register %#x: %#x, want %#x", c.slot, c.reg, got, c.want)
			}
		}
	}
	// Read-only registers stay, writable ones change only where they may.
	m.write(5, 0, 4, 0)
	m.write(5, 0x3C, 4, 0xFFFF_FFFF)
	m.write(5, 4, 4, 0xFFFF_FFFF)
	if got := m.read(5, 0, 4); got != 0x1042_1AF4 {
		t.Errorf("ids became %#x", got)
	}
	if got := m.read(5, 0x3C, 4); got != 0x1FF {
		t.Errorf("interrupt registers became %#x", got)
	}
	if got := m.read(5, 4, 4); got != pciStatusCapList<<16|pciCommandMask {
		t.Errorf("command and status became %#x", got)
	}
	// The address register reads back, and is no byte register.
	m.ports.Write(PortPCIAddress, []byte{1, 2, 3, 4})
	m.ports.Write(PortPCIAddress+2, []byte{0xFF})
	var p [4]byte
	m.ports.Read(PortPCIAddress, p[:])
	if !bytes.Equal(p[:], []byte{0, 2, 3, 0}) {
		t.Errorf("address register: % x", p)
	}
}

func TestPCIResetRegisterAmongPorts(t *testing.T) {
	m := newTestPCI(t)
	reset := &testFunction{}
	ports := m.host.Ports(reset)
	ports.Write(PortReset-PortPCIAddress, []byte{ResetValue})
	if reset.ram[0] != ResetValue {
		t.Error("a byte write to the reset register did not reach it")
	}
	ports.Write(0, []byte{0, 0x77, 0, 0x80})
	if reset.ram[0] != ResetValue {
		t.Error("a write of the address register reached the reset register")
	}
}

func TestPCIBARSizingAndMoving(t *testing.T) {
	m := newTestPCI(t)
	d := m.add(t, 1)
	e := m.add(t, 2)
	first := uint64(m.read(1, 0x10, 4))
	if first%0x1000 != 0 || first < PCIMMIOBase {
		t.Fatalf("BAR 0 at %#x", first)
	}
	reach := func(at uint64) bool {
		d.ram[8] = 0x5A
		var p [1]byte
		return m.mmio.Read(at+8, p[:]) && p[0] == 0x5A
	}
	if !reach(first) {
		t.Fatal("BAR is not reachable where reset put it")
	}

	m.write(1, 0x10, 4, 0xFFFF_FFFF)
	m.write(1, 0x20, 4, 0xFFFF_FFFF)
	if got := m.read(1, 0x10, 4); got != 0xFFFF_F000 {
		t.Errorf("sizing of BAR 0: %#x", got)
	}
	if got := m.read(1, 0x20, 4); got != 0xFFFF_C000 {
		t.Errorf("sizing of BAR 4: %#x", got)
	}
	if reach(first) {
		t.Error("BAR is still where it was while being sized")
	}
	m.write(1, 0x10, 4, uint32(first)+0x10_0000)
	if !reach(first + 0x10_0000) {
		t.Error("BAR is not where it was moved")
	}

	// Over another device's BAR, RAM, ECAM, interrupt controllers: nowhere.
	other := m.read(2, 0x10, 4)
	for _, at := range []uint32{other, 0, 0x10_0000, LowRAMEnd - 0x1000, ECAMBase, IOAPICBase, LAPICBase, 0xFFFF_F000} {
		m.write(1, 0x10, 4, at)
		d.ram[0], e.ram[0] = 0xD0, 0xE0
		var p [1]byte
		if m.mmio.Read(uint64(at), p[:]); p[0] == 0xD0 {
			t.Errorf("BAR can be moved to %#x", at)
		}
		if i := m.host.Info()[1]; i.BARs[0].Mapped || i.BARs[0].Address != uint64(at) {
			t.Errorf("BAR at %#x: info %+v", at, i.BARs[0])
		}
	}
	// When the other leaves, the one that waits for its place gets it.
	m.write(1, 0x10, 4, other)
	m.write(2, 4, 2, 0)
	if !reach(uint64(other)) {
		t.Error("BAR did not get the place that became free")
	}
	m.write(2, 4, 2, pciCommandMemory)
	if !reach(uint64(other)) {
		t.Error("BAR lost its place to one that came later")
	}

	m.write(1, 4, 2, 0)
	if reach(uint64(other)) {
		t.Error("BAR is reachable without memory decoding")
	}
	m.host.Reset()
	if got := uint64(m.read(1, 0x10, 4)); got != first || !reach(first) || d.resets != 1 {
		t.Errorf("after reset: BAR at %#x, was %#x; %d resets", got, first, d.resets)
	}
	want := []uint64{first, 0, first + 0x10_0000, 0, uint64(other), 0, first}
	if diff := cmp.Diff(want, d.moves); diff != "" {
		t.Errorf("moves of BAR 0 (-want +got):\n%s", diff)
	}
}

func TestPCISlots(t *testing.T) {
	m := newTestPCI(t)
	for slot := 1; slot < PCISlots; slot++ {
		m.add(t, slot)
	}
	for _, slot := range []int{-1, 0, 1, 31, 32} {
		if err := m.host.Add(slot, newTestFunction(t)); !errors.Is(err, ErrPCI) {
			t.Errorf("slot %d: error %v", slot, err)
		}
	}
	infos := m.host.Info()
	if len(infos) != PCISlots {
		t.Fatalf("%d functions", len(infos))
	}
	seen := map[uint64]bool{}
	for _, i := range infos[1:] {
		if i.GSI != GSIPCIFirst+i.Slot%GSIPCICount || i.Class != 0x010000 || i.Vendor != 0x1AF4 {
			t.Errorf("%+v", i)
		}
		for _, b := range i.BARs {
			if seen[b.Address] || !b.Mapped || b.Address%b.Size != 0 {
				t.Errorf("slot %d: %+v", i.Slot, b)
			}
			seen[b.Address] = true
		}
	}
}

func TestPCIWindowIsBounded(t *testing.T) {
	m := newTestPCI(t)
	add := func(slot int) error {
		f := newTestFunction(t)
		if err := f.fn.AddBAR(1, PCIMMIOSize/4, f); err != nil {
			t.Fatal(err)
		}
		return m.host.Add(slot, f)
	}
	n := 0
	for slot := 1; slot <= 5; slot++ {
		if err := add(slot); err != nil {
			if !errors.Is(err, ErrPCI) {
				t.Fatal(err)
			}
			break
		}
		n++
	}
	if n == 0 || n > 3 {
		t.Errorf("%d quarters of the window were given away beside smaller BARs", n)
	}
}

func TestPCIInterruptLinesAreShared(t *testing.T) {
	m := newTestPCI(t)
	a, b := m.add(t, 3), m.add(t, 3+GSIPCICount)
	a.fn.SetINTx(true)
	b.fn.SetINTx(true)
	a.fn.SetINTx(false)
	if !m.lines[3] {
		t.Error("line fell while a second device holds it")
	}
	if m.read(3, 6, 2)&pciStatusINTx != 0 || m.read(3+GSIPCICount, 6, 2)&pciStatusINTx == 0 {
		t.Error("status registers do not tell which device interrupts")
	}
	m.write(3+GSIPCICount, 4, 2, pciCommandMemory|pciCommandNoINTx)
	if m.lines[3] {
		t.Error("line is up although the command register disables it")
	}
	m.write(3+GSIPCICount, 4, 2, pciCommandMemory)
	if !m.lines[3] {
		t.Error("line stayed down after it was enabled again")
	}
	b.fn.SetINTx(false)
	if m.lines[3] {
		t.Error("line is up and nobody holds it")
	}
}

func TestMSIXPendsWhileMasked(t *testing.T) {
	m := newTestPCI(t)
	d := m.add(t, 1)
	bar := uint64(m.read(1, 0x20, 4))
	cap0 := int(m.read(1, pciCapabilities, 1))
	if m.read(1, cap0, 4) != pciCapMSIX|2<<16 || m.read(1, cap0+4, 4) != 4 || m.read(1, cap0+8, 4) != MSIXPBAOffset|4 {
		t.Fatalf("capability %#x %#x %#x", m.read(1, cap0, 4), m.read(1, cap0+4, 4), m.read(1, cap0+8, 4))
	}
	put := func(off, n int, v uint64) {
		m.mmio.Write(bar+uint64(off), binary.LittleEndian.AppendUint64(nil, v)[:n])
	}
	pending := func() byte {
		var p [8]byte
		m.mmio.Read(bar+MSIXPBAOffset, p[:])
		return p[0]
	}
	expect := func(what string, want ...uint32) {
		t.Helper()
		if diff := cmp.Diff(want, m.msi.sent); diff != "" {
			t.Errorf("%s: messages (-want +got):\n%s", what, diff)
		}
		m.msi.sent = nil
	}
	for v := range 3 {
		put(16*v, 8, 0xFEE0_0000)
		put(16*v+8, 4, uint64(0x20+v))
	}
	d.msix.Notify(0)
	expect("disabled")
	m.write(1, cap0+2, 2, msixControlEnable)
	d.msix.Notify(0)
	expect("masked vector")
	if pending() != 1 {
		t.Errorf("pending bits %#x", pending())
	}
	put(12, 4, 0)
	expect("unmasked", 0x20)
	if pending() != 0 {
		t.Errorf("pending bits %#x after delivery", pending())
	}
	put(16+12, 4, 0)
	m.write(1, cap0+2, 2, msixControlEnable|msixControlMask)
	d.msix.Notify(0)
	d.msix.Notify(1)
	d.msix.Notify(1)
	d.msix.Notify(2)
	expect("function mask")
	m.write(1, cap0+2, 2, msixControlEnable)
	expect("function unmasked", 0x20, 0x21)
	put(16+8, 4, 0x99)
	d.msix.Notify(1)
	d.msix.Notify(3)
	d.msix.Notify(-1)
	expect("changed vector", 0x99)
	put(16, 8, 0x1000)
	d.msix.Notify(1)
	expect("address of nobody")
	// Accesses that the specification leaves undefined change nothing.
	before := d.msix.save()
	put(3, 1, 0xFF)
	put(8, 2, 0xFF)
	put(MSIXPBAOffset, 8, ^uint64(0))
	put(MSIXSize-8, 8, ^uint64(0))
	if diff := cmp.Diff(before, d.msix.save()); diff != "" {
		t.Errorf("table changed:\n%s", diff)
	}
	// What pends, and BARs and lines, survive a checkpoint.
	d.fn.SetINTx(true)
	m.write(1, 0x10, 4, 0xD000_0000)
	encoded, err := json.Marshal(m.host.State())
	if err != nil {
		t.Fatal(err)
	}
	var state PCIState
	if err := json.Unmarshal(encoded, &state); err != nil {
		t.Fatal(err)
	}
	m2 := newTestPCI(t)
	d2 := m2.add(t, 1)
	if err := m2.host.Restore(state); err != nil {
		t.Fatal(err)
	}
	if !m2.lines[1] || m2.read(1, 0x10, 4) != 0xD000_0000 || !m2.host.Info()[1].BARs[0].Mapped {
		t.Error("line or BAR lost")
	}
	m2.mmio.Write(bar+2*16+12, []byte{0, 0, 0, 0})
	if diff := cmp.Diff([]uint32{0x22}, m2.msi.sent); diff != "" || !d2.msix.Enabled() {
		t.Errorf("messages after restore (-want +got):\n%s", diff)
	}
	// State of another machine is refused.
	m3 := newTestPCI(t)
	if err := m3.host.Restore(state); !errors.Is(err, ErrPCI) {
		t.Errorf("restore without the device: %v", err)
	}
	m3.add(t, 1)
	state.Functions[1].Config[2]++
	if err := m3.host.Restore(state); !errors.Is(err, ErrPCI) {
		t.Errorf("restore of another device: %v", err)
	}
}

func TestMSIXNotifyDoesNotAllocate(t *testing.T) {
	m := newTestPCI(t)
	d := m.add(t, 1)
	m.msi.sent = make([]uint32, 0, 1<<16)
	bar := uint64(m.read(1, 0x20, 4))
	m.mmio.Write(bar, binary.LittleEndian.AppendUint64(nil, 0xFEE0_0000))
	m.mmio.Write(bar+12, []byte{0, 0, 0, 0})
	m.write(1, int(m.read(1, pciCapabilities, 1))+2, 2, msixControlEnable)
	if n := testing.AllocsPerRun(1000, func() { d.msix.Notify(0) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
	if len(m.msi.sent) == 0 {
		t.Error("nothing was sent")
	}
}

// FuzzPCIConfig lets a guest write and read anything, at ports, in ECAM and
// in the PCI window. Each 8 bytes of input are one access.
func FuzzPCIConfig(f *testing.F) {
	seed := func(accesses ...[]byte) { f.Add(bytes.Join(accesses, nil)) }
	ecam := func(slot, reg int, v uint32) []byte {
		return binary.LittleEndian.AppendUint32([]byte{2, byte(slot), byte(reg), 4}, v)
	}
	port := func(off byte, n byte, v uint32) []byte {
		return binary.LittleEndian.AppendUint32([]byte{1, off, 0, n}, v)
	}
	bar := func(off uint16, n byte, v uint32) []byte {
		return binary.LittleEndian.AppendUint32([]byte{3, byte(off), byte(off >> 8), n}, v)
	}
	// What Linux does: size the BARs, enable MSI-X, program a vector.
	seed(ecam(1, 4, 0), ecam(1, 0x10, ^uint32(0)), ecam(1, 0x10, PCIMMIOBase), ecam(1, 0x20, ^uint32(0)),
		ecam(1, 0x20, PCIMMIOBase+0x4000), ecam(1, 4, 6), ecam(1, 0x40, msixControlEnable<<16),
		bar(0x4000, 4, 0xFEE0_0000), bar(0x4008, 4, 0x20), bar(0x400C, 4, 0))
	seed(port(0, 4, 0x8000_0810), port(4, 4, ^uint32(0)), port(4, 4, ECAMBase), port(5, 2, 7), port(1, 1, 6))
	seed(ecam(1, 0x10, 0xC000_8000), ecam(2, 0x10, 0xC000_8000), ecam(1, 4, 0), ecam(1, 4, 2), ecam(0, 4, 0xFFFF), ecam(31, 0xFD, 1))
	f.Fuzz(func(t *testing.T, in []byte) {
		m := newTestPCI(t)
		m.add(t, 1)
		d := m.add(t, 2)
		for n := 0; len(in) >= 8 && n < 1000; n, in = n+1, in[8:] {
			size := int(in[3]%8) + 1
			at := uint64(in[1]) | uint64(in[2])<<8
			data := append(append([]byte(nil), in[4:8]...), in[4:8]...)[:size]
			switch in[0] % 5 {
			case 0:
				d.msix.Notify(int(in[1]))
				d.fn.SetINTx(in[2]&1 != 0)
			case 1:
				m.ports.Write(PortPCIAddress+at%PCIPortCount, data)
				m.ports.Read(PortPCIAddress+at%PCIPortCount, data)
			case 2:
				m.mmio.Write(ECAMBase+uint64(in[1])<<15+uint64(in[2]), data)
				m.mmio.Read(ECAMBase+uint64(in[1])<<15+uint64(in[2]), data)
			case 3:
				m.mmio.Write(PCIMMIOBase+at, data)
				m.mmio.Read(PCIMMIOBase+at, data)
			case 4:
				m.host.Reset()
			}
			m.msi.sent = m.msi.sent[:0]
		}
		// Whatever it did, what the host says holds together.
		mapped := 0
		for _, i := range m.host.Info() {
			for _, b := range i.BARs {
				if b.Mapped {
					mapped++
					if b.Address < PCIMMIOBase || b.Address+b.Size > PCIMMIOBase+PCIMMIOSize {
						t.Errorf("BAR at %#x", b.Address)
					}
				}
			}
		}
		if got := len(*m.mmio.ranges.Load()); got != mapped+1 {
			t.Errorf("%d ranges on the bus for %d BARs and ECAM", got, mapped)
		}
		m2 := newTestPCI(t)
		m2.add(t, 1)
		m2.add(t, 2)
		if err := m2.host.Restore(m.host.State()); err != nil {
			t.Errorf("restore: %v", err)
		}
		m.host.Reset()
		for _, i := range m.host.Info() {
			for _, b := range i.BARs {
				if !b.Mapped {
					t.Errorf("slot %d: BAR %d has no place after reset", i.Slot, b.BAR)
				}
			}
		}
	})
}
