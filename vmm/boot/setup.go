package boot

import (
	"encoding/binary"
	"fmt"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// Offsets of the setup header's fields: the same in a bzImage and in
// boot_params. Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header".
const (
	setupHeaderStart = 0x1F1
	setupHeaderEnd   = 0x290 // where boot_params goes on with something else

	hdrSetupSects     = 0x1F1
	hdrBootFlag       = 0x1FE
	hdrJumpDistance   = 0x201 // the header ends at 0x202 plus this
	hdrMagic          = 0x202
	hdrVersion        = 0x206
	hdrLoaderType     = 0x210
	hdrLoadFlags      = 0x211
	hdrRamdiskImage   = 0x218
	hdrRamdiskSize    = 0x21C
	hdrCommandLine    = 0x228
	hdrInitrdMax      = 0x22C
	hdrAlignment      = 0x230
	hdrCommandLineMax = 0x238
	hdrPayloadOffset  = 0x248
	hdrPayloadLength  = 0x24C
	hdrSetupData      = 0x250
	hdrInitSize       = 0x260

	bootFlag           = 0xAA55
	headerMagic        = "HdrS"
	loaderUndefined    = 0xFF
	loadedHigh         = 1 << 0
	defaultSetupSects  = 4
	versionPayload     = 0x208 // first with payload_offset
	versionInitSize    = 0x20A
	versionWeSpeak     = 0x20F
	sectorSize         = 512
	linuxCommandLine   = 2047 // bytes that x86 Linux takes, without the NUL
	linuxInitrdMax     = 0x7FFF_FFFF
	linuxKernelAligned = 1 << 21
)

// Offsets of the other fields of boot_params that are set. (arch/x86/include/uapi/asm/bootparam.h)
const (
	zeroPageSize  = 4096
	bpRSDP        = 0x070
	bpE820Entries = 0x1E8
	bpE820Table   = 0x2D0
	bpE820Max     = 128
	e820EntrySize = 20
)

// setupHeader is what a bzImage says of itself.
type setupHeader struct {
	raw                 []byte // setupHeaderStart up to the header's own end
	version             uint16
	commandLineMax      uint32
	initrdMax           uint32
	initSize            uint32 // 0 before protocol 2.10
	protectedModeOffset int64  // in the file
	payloadOffset       uint32 // from there
	payloadLength       uint32
}

func isBzImage(head []byte) bool {
	return len(head) >= hdrVersion+2 &&
		binary.LittleEndian.Uint16(head[hdrBootFlag:]) == bootFlag &&
		string(head[hdrMagic:hdrMagic+4]) == headerMagic
}

// parseSetup reads the header from the file's first setupHeaderEnd bytes.
func parseSetup(head []byte) (*setupHeader, error) {
	le := binary.LittleEndian
	s := &setupHeader{version: le.Uint16(head[hdrVersion:])}
	if s.version < versionPayload {
		return nil, fmt.Errorf("%w: boot protocol %d.%02d is too old, 2.08 (Linux 2.6.26) is the first that is supported",
			ErrNotKernel, s.version>>8, s.version&0xFF)
	}
	if len(head) < setupHeaderEnd {
		return nil, fmt.Errorf("%w: a bzImage of %d bytes", ErrTruncated, len(head))
	}
	if head[hdrLoadFlags]&loadedHigh == 0 {
		return nil, fmt.Errorf("%w: a zImage, which loads below 1 MiB: build a bzImage", ErrNotKernel)
	}
	sects := int64(head[hdrSetupSects])
	if sects == 0 {
		sects = defaultSetupSects
	}
	s.protectedModeOffset = (sects + 1) * sectorSize
	end := min(hdrMagic+int(head[hdrJumpDistance]), setupHeaderEnd)
	if end < hdrSetupData {
		return nil, fmt.Errorf("%w: setup header ends at %#x, before its payload_length field", ErrNotKernel, end)
	}
	s.raw = append([]byte(nil), head[setupHeaderStart:end]...)
	s.commandLineMax = le.Uint32(head[hdrCommandLineMax:])
	s.initrdMax = le.Uint32(head[hdrInitrdMax:])
	s.payloadOffset = le.Uint32(head[hdrPayloadOffset:])
	s.payloadLength = le.Uint32(head[hdrPayloadLength:])
	if s.version >= versionInitSize && end >= hdrInitSize+4 {
		s.initSize = le.Uint32(head[hdrInitSize:])
	}
	return s, nil
}

// zeroPage builds boot_params: the image's own setup header, or one that suits
// a vmlinux, with what a boot loader fills in.
func (k *Kernel) zeroPage(mem *guestmem.Memory, cfg Config, initrd guestmem.Range) []byte {
	le := binary.LittleEndian
	p := make([]byte, zeroPageSize)
	if k.setup != nil {
		copy(p[setupHeaderStart:], k.setup.raw)
	} else {
		le.PutUint16(p[hdrBootFlag:], bootFlag)
		copy(p[hdrMagic:], headerMagic)
		le.PutUint16(p[hdrVersion:], versionWeSpeak)
		p[hdrLoadFlags] = loadedHigh
		le.PutUint32(p[hdrInitrdMax:], linuxInitrdMax)
		le.PutUint32(p[hdrAlignment:], linuxKernelAligned)
		le.PutUint32(p[hdrCommandLineMax:], linuxCommandLine)
	}
	p[hdrLoaderType] = loaderUndefined
	le.PutUint32(p[hdrCommandLine:], CommandLineAddr)
	le.PutUint32(p[hdrRamdiskImage:], uint32(initrd.GPA)) // placeInitrd keeps it below 4 GiB
	le.PutUint32(p[hdrRamdiskSize:], uint32(initrd.Size))
	le.PutUint64(p[bpRSDP:], cfg.RSDP)

	entries := memoryMap(mem)
	p[bpE820Entries] = byte(len(entries))
	for i, m := range entries {
		b := p[bpE820Table+i*e820EntrySize:]
		le.PutUint64(b, m.gpa)
		le.PutUint64(b[8:], m.size)
		le.PutUint32(b[16:], m.kind)
	}
	return p
}
