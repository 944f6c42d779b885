package pager

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/kvm"
	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// Where things lie in the KVM guest's memory, which is mapped to itself.
const (
	guestTables = 0x1000 // PML4, page directory pointers, page directory
	guestGDT    = 0x4000
	guestCode   = 0x5000
	guestList   = 0x10000  // addresses to read, 8 bytes each
	guestPaging = 0x100000 // a page directory and page tables for guestHeap
	guestData   = 0x200000

	guestHeap = 1 << 30 // virtual: the data's pages in their virtual order
)

// The guest adds up the words at the addresses of the list. RSI is the list, RCX
// how many, and the sum goes to RAX.
var sumCode = []byte{
	0x31, 0xc0, // xor eax, eax
	0x48, 0x8b, 0x1e, // next: mov rbx, [rsi]
	0x48, 0x03, 0x03, // add rax, [rbx]
	0x48, 0x83, 0xc6, 0x08, // add rsi, 8
	0xff, 0xc9, // dec ecx
	0x75, 0xf2, // jnz next
	0xe6, 0x80, // out 0x80, al
}

// kvmGuest is a source with a program that reads pages of its heap in an order,
// and what they must come to. heap has, for each virtual page, the physical one.
// Its blocks have the virtual order, and lie behind those of the program.
func kvmGuest(heap, order []uint64) (f *fake, sum uint64) {
	pages := len(heap)
	f = newFake(guestmem.Range{GPA: 0, Size: guestData + uint64(pages)*pageSize})
	f.bytes = map[uint64][]byte{}
	put := func(at uint64, words ...uint64) {
		for i, w := range words {
			at := at + 8*uint64(i)
			p := f.bytes[at/pageSize]
			if p == nil {
				p = make([]byte, pageSize)
				f.bytes[at/pageSize] = p
			}
			binary.LittleEndian.PutUint64(p[at%pageSize:], w)
		}
	}
	const presentWritableUser, large = 0x67, 0x80
	put(guestTables, (guestTables+pageSize)|presentWritableUser)
	put(guestTables+pageSize, (guestTables+2*pageSize)|presentWritableUser)
	for i := range uint64(512) {
		put(guestTables+2*pageSize+8*i, i<<21|presentWritableUser|large)
	}
	put(guestTables+pageSize+8, guestPaging|presentWritableUser)
	for i, page := range heap {
		if i%512 == 0 {
			put(guestPaging+uint64(i)/512*8, (guestPaging+(1+uint64(i)/512)*pageSize)|presentWritableUser)
		}
		put(guestPaging+pageSize+8*uint64(i), (guestData+page*pageSize)|presentWritableUser)
	}
	put(guestGDT, 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cff3000000ffff, 0x00affb000000ffff)
	f.bytes[guestCode/pageSize] = sumCode
	for i, page := range order {
		put(guestList+8*uint64(i), guestHeap+page*pageSize)
		p := make([]byte, pageSize)
		fill(p, guestData/pageSize+heap[page])
		sum += binary.LittleEndian.Uint64(p)
	}
	var program []uint64
	for pfn := range uint64(guestData / pageSize) {
		if f.bytes[pfn] != nil {
			program = append(program, pfn)
		}
	}
	f.add(program, BlockPages)
	var blocks []uint64
	for _, page := range heap {
		blocks = append(blocks, guestData/pageSize+page)
	}
	f.add(blocks, BlockPages)
	return f, sum
}

// startKVM makes a machine's VCPU that will run the program.
func (m *machine) startKVM(count int) *kvm.VCPU {
	m.t.Helper()
	check := func(err error) {
		m.t.Helper()
		if err != nil {
			m.t.Fatal(err)
		}
	}
	sys, err := kvm.Open()
	if err != nil {
		m.t.Skipf("needs /dev/kvm: %v", err)
	}
	m.t.Cleanup(func() { sys.Close() })
	vm, err := sys.CreateVM()
	check(err)
	m.t.Cleanup(func() { vm.Close() })
	if vm.Check(kvm.CapSetTSSAddr) != 0 {
		check(vm.SetTSSAddr(0xfffbd000))
	}
	for i, r := range m.mem.Regions() {
		check(vm.SetMemory(uint32(i), 0, r.GPA, r.GuestBytes()))
	}
	vcpu, err := vm.CreateVCPU(0)
	check(err)
	m.t.Cleanup(func() { vcpu.Close() })
	cpuid, err := sys.SupportedCPUID()
	check(err)
	check(vcpu.SetCPUID(cpuid))
	var sregs kvm.Sregs
	check(vcpu.GetSregs(&sregs))
	segment := func(selector uint16, kind, long uint8) kvm.Segment {
		return kvm.Segment{Limit: 0xffffffff, Selector: selector, Type: kind, Present: 1, DPL: 3, DB: 1 - long, S: 1, L: long, G: 1}
	}
	sregs.CS, sregs.SS = segment(0x23, 0xb, 1), segment(0x1b, 3, 0)
	sregs.DS, sregs.ES, sregs.FS, sregs.GS = sregs.SS, sregs.SS, sregs.SS, sregs.SS
	sregs.TR = kvm.Segment{Limit: 0x67, Type: 0xb, Present: 1}
	sregs.GDT.Base, sregs.GDT.Limit = guestGDT, 0x27
	sregs.CR0, sregs.CR3, sregs.CR4, sregs.EFER = 0x80010033, guestTables, 0x620, 0x500
	check(vcpu.SetSregs(&sregs))
	check(vcpu.SetRegs(&kvm.Regs{RIP: guestCode, RSP: guestList, RFlags: 0x3002, RSI: guestList, RCX: uint64(count)}))
	return vcpu
}

var errShutdown = errors.New("the guest's processor shut down")

// sum runs the program.
func (m *machine) sum(vcpu *kvm.VCPU) (uint64, error) {
	for {
		err := vcpu.Run()
		if err == unix.EINTR || err == unix.EAGAIN {
			continue
		}
		var regs kvm.Regs
		if err == nil {
			err = vcpu.GetRegs(&regs)
		}
		if err == nil && vcpu.ExitReason() != kvm.ExitIO {
			err = fmt.Errorf("the guest ended by %v at %#x", vcpu.ExitReason(), regs.RIP)
		}
		if vcpu.ExitReason() == kvm.ExitShutdown {
			err = errShutdown
		}
		return regs.RAX, err
	}
}

func shuffled(pages int) []uint64 {
	var s []uint64
	for _, i := range rand.New(rand.NewPCG(uint64(pages), 1)).Perm(pages) {
		s = append(s, uint64(i))
	}
	return s
}

// TestKVM: a guest runs on memory that comes as it goes.
func TestKVM(t *testing.T) {
	const pages = 4096
	order := ascending(0, pages)
	for _, policy := range []Policy{0, Physical, Locality} {
		f, want := kvmGuest(shuffled(pages), order)
		m := newMachine(t, f, Options{Policy: policy, Background: policy == Physical})
		m.p.Start()
		got, err := m.sum(m.startKVM(len(order)))
		if err != nil || got != want {
			t.Errorf("%v: the guest's sum is %#x, %v; want %#x", policy, got, err, want)
		}
		t.Logf("%v: %+v", policy, m.p.Stats())
	}
}

// TestUsage compares what the kernel knows of used pages with what the guest did.
func TestUsage(t *testing.T) {
	const pages = 8192
	var order []uint64
	touched := map[uint64]bool{}
	for block := uint64(0); block < pages/BlockPages; block += 4 {
		for i := range uint64(BlockPages / 2) {
			order = append(order, block*BlockPages+i)
			touched[guestData/pageSize+block*BlockPages+i] = true
		}
	}
	f, want := kvmGuest(ascending(0, pages), order)
	m := newMachine(t, f, Options{Policy: Locality})
	m.p.Start()
	if used, unused, err := m.p.Usage(); err != nil || used+unused != 0 {
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
			t.Skipf("needs root: %v", err)
		}
		t.Fatalf("before: %d used, %d not, %v", used, unused, err)
	}
	if got, err := m.sum(m.startKVM(len(order))); err != nil || got != want {
		t.Fatalf("the guest's sum is %#x, %v; want %#x", got, err, want)
	}
	m.quiesce()
	used, unused, err := m.p.Usage()
	if err != nil {
		t.Fatal(err)
	}
	exactUsed, exactUnused := m.p.UsageOf(func(pfn uint64) bool { return touched[pfn] || pfn < guestData/pageSize })
	t.Logf("%d used, %d not; exactly: %d used, %d not; %+v", used, unused, exactUsed, exactUnused, m.p.Stats())
	if used+unused != exactUsed+exactUnused {
		t.Errorf("%d pages, not %d", used+unused, exactUsed+exactUnused)
	}
	// KVM maps at most 7 more for each page at the end of a stretch of used ones.
	// What the program's tables and KVM's emulator make of a few pages is theirs.
	stretches := pages / BlockPages / 4
	if used < len(order) || used > exactUsed+7*stretches {
		t.Errorf("%d used, want from %d to %d", used, len(order), exactUsed+7*stretches)
	}
}

// TestKVMDamaged: the guest waits for a page that cannot be had until the pager
// is closed, and then cannot go on.
func TestKVMDamaged(t *testing.T) {
	const pages = 1024
	order := ascending(0, pages)
	f, _ := kvmGuest(ascending(0, pages), order)
	bad := f.at[guestData/pageSize+700].Block
	f.fail[bad] = errDamaged
	reported := make(chan error, 1)
	m := newMachine(t, f, Options{Policy: Locality, OnError: func(err error) { reported <- err }})
	m.p.Start()
	vcpu := m.startKVM(len(order))
	ended := make(chan error)
	go func() {
		_, err := m.sum(vcpu)
		ended <- err
	}()
	if err := <-reported; !errors.Is(err, errDamaged) {
		t.Error(err)
	}
	if err := m.p.Close(); err != nil {
		t.Error(err)
	}
	// Where KVM interprets page tables, it finds none any more.
	if err := <-ended; !errors.Is(err, unix.EFAULT) && !errors.Is(err, errShutdown) {
		t.Errorf("the VCPU ended with %v", err)
	}
	got := make([]byte, pageSize)
	if err := m.mem.Read(guestData, got); err != nil || !bytes.Equal(got, f.want(guestData/pageSize)) {
		t.Errorf("what was loaded: %v", err)
	}
}

// BenchmarkKVMWalk is what a guest's walk by virtual addresses takes, a page, with
// its memory resident but not yet mapped by KVM, and by policy.
func BenchmarkKVMWalk(b *testing.B) {
	const pages = 16384
	order := ascending(0, pages)
	f, want := kvmGuest(shuffled(pages), order)
	f.quiet = true
	for name, o := range map[string]Options{
		"resident": {Policy: Locality, Background: true}, "none": {}, "locality": {Policy: Locality}, "locality, background": {Policy: Locality, Background: true},
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				m := newMachine(b, f, o)
				m.p.Start()
				if name == "resident" {
					m.p.LoadAll()
					<-m.p.Done()
				}
				vcpu := m.startKVM(len(order))
				b.StartTimer()
				if got, err := m.sum(vcpu); err != nil || got != want {
					b.Fatal(got, err)
				}
				b.StopTimer()
				b.ReportMetric(float64(m.p.Stats().GuestFaults), "faults")
				m.p.Close()
				vcpu.Close()
				m.mem.Close()
				b.StartTimer()
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*pages), "ns/page")
		})
	}
}
