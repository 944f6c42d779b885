package boot

import (
	"encoding/binary"
	"slices"
	"strings"
)

// A small builder of ACPI Machine Language (ACPI specification 6.5, chapter
// 20): each function returns one encoded term, and takes those inside it.

// AML opcodes.
const (
	amlZero         = 0x00
	amlOne          = 0x01
	amlName         = 0x08
	amlByte         = 0x0A
	amlWord         = 0x0B
	amlDword        = 0x0C
	amlString       = 0x0D
	amlQword        = 0x0E
	amlScope        = 0x10
	amlBuffer       = 0x11
	amlPackage      = 0x12
	amlMethod       = 0x14
	amlDualName     = 0x2E
	amlLocal0       = 0x60
	amlStore        = 0x70
	amlAnd          = 0x7B
	amlIf           = 0xA0
	amlExtRegion    = 0x80
	amlExtField     = 0x81
	amlMultiName    = 0x2F
	amlExt          = 0x5B
	amlExtDevice    = 0x82
	amlNotify       = 0x86
	amlMethodSerial = 1 << 3
)

// amlPath encodes a path such as `\_SB.PCI0` or `COM1`; segments are padded to
// four characters.
func amlPath(path string) []byte {
	var out []byte
	if rest, rooted := strings.CutPrefix(path, `\`); rooted {
		out, path = append(out, '\\'), rest
	}
	segments := strings.Split(path, ".")
	switch len(segments) {
	case 1:
	case 2:
		out = append(out, amlDualName)
	default:
		out = append(out, amlMultiName, byte(len(segments)))
	}
	for _, s := range segments {
		out = append(out, (s + "____")[:4]...)
	}
	return out
}

// amlSized puts the package length before body; the length counts itself.
// (section 20.2.4)
func amlSized(body []byte) []byte {
	n := len(body)
	if n+1 < 1<<6 {
		return append([]byte{byte(n + 1)}, body...)
	}
	more := 1
	for n+1+more >= 1<<(4+8*more) {
		more++
	}
	n += 1 + more
	out := []byte{byte(more<<6 | n&0xF)}
	for n >>= 4; more > 0; more-- {
		out = append(out, byte(n))
		n >>= 8
	}
	return append(out, body...)
}

// amlInt encodes v as shortly as possible.
func amlInt(v uint64) []byte {
	le := binary.LittleEndian
	switch {
	case v == 0:
		return []byte{amlZero}
	case v == 1:
		return []byte{amlOne}
	case v < 1<<8:
		return []byte{amlByte, byte(v)}
	case v < 1<<16:
		return le.AppendUint16([]byte{amlWord}, uint16(v))
	case v < 1<<32:
		return le.AppendUint32([]byte{amlDword}, uint32(v))
	}
	return le.AppendUint64([]byte{amlQword}, v)
}

// amlText encodes an ASCII string.
func amlText(s string) []byte {
	return append(append([]byte{amlString}, s...), 0)
}

// amlEISAID encodes an id such as "PNP0501": three letters and four hex digits.
// (section 19.3.4)
func amlEISAID(id string) []byte {
	letter := func(i int) uint32 { return uint32(id[i]-'@') & 0x1F }
	digit := func(i int) uint32 { return uint32(strings.IndexByte("0123456789ABCDEF", id[i])) }
	v := letter(0)<<26 | letter(1)<<21 | letter(2)<<16 | digit(3)<<12 | digit(4)<<8 | digit(5)<<4 | digit(6)
	return binary.BigEndian.AppendUint32([]byte{amlDword}, v)
}

// amlNamed declares name as value.
func amlNamed(name string, value []byte) []byte {
	return slices.Concat([]byte{amlName}, amlPath(name), value)
}

func amlInScope(path string, terms ...[]byte) []byte {
	return slices.Concat([]byte{amlScope}, amlSized(slices.Concat(amlPath(path), slices.Concat(terms...))))
}

func amlDevice(name string, terms ...[]byte) []byte {
	return slices.Concat([]byte{amlExt, amlExtDevice}, amlSized(slices.Concat(amlPath(name), slices.Concat(terms...))))
}

// amlProcedure is a serialized method without arguments.
func amlProcedure(name string, terms ...[]byte) []byte { return amlMethodOf(name, 0, terms...) }

// amlMethodOf is a serialized method.
func amlMethodOf(name string, arguments byte, terms ...[]byte) []byte {
	return slices.Concat([]byte{amlMethod}, amlSized(slices.Concat(amlPath(name), []byte{amlMethodSerial | arguments}, slices.Concat(terms...))))
}

// amlPortRegion declares n I/O ports. (section 19.6.100)
func amlPortRegion(name string, port, n uint64) []byte {
	const systemIO = 1
	return slices.Concat([]byte{amlExt, amlExtRegion}, amlPath(name), []byte{systemIO}, amlInt(port), amlInt(n))
}

// amlDwords names a region's 32-bit registers, in their order; what is not written
// of one is zero. (section 20.2.5.2)
func amlDwords(region string, names ...string) []byte {
	const dwordAccess, writeAsZeros, bits = 3, 2 << 5, 32
	body := append(amlPath(region), dwordAccess|writeAsZeros)
	for _, n := range names {
		body = append(append(body, amlPath(n)...), bits)
	}
	return slices.Concat([]byte{amlExt, amlExtField}, amlSized(body))
}

// amlAssign stores a value in what has a name, amlToLocal0 the other way.
func amlAssign(value []byte, to string) []byte {
	return slices.Concat([]byte{amlStore}, value, amlPath(to))
}

func amlToLocal0(from string) []byte {
	return slices.Concat([]byte{amlStore}, amlPath(from), []byte{amlLocal0})
}

// amlIfLocal0 does the terms if one of the bits is set in Local0.
func amlIfLocal0(bits uint64, terms ...[]byte) []byte {
	const nowhere = amlZero
	return slices.Concat([]byte{amlIf}, amlSized(slices.Concat([]byte{amlAnd, amlLocal0}, amlInt(bits), []byte{nowhere}, slices.Concat(terms...))))
}

func amlNotification(object string, value uint64) []byte {
	return slices.Concat([]byte{amlNotify}, amlPath(object), amlInt(value))
}

// amlList is a package; it has at most 255 elements.
func amlList(elements ...[]byte) []byte {
	return slices.Concat([]byte{amlPackage}, amlSized(slices.Concat([]byte{byte(len(elements))}, slices.Concat(elements...))))
}

// amlResources is a buffer of resource descriptors with its end tag, as _CRS
// wants. (section 6.4)
func amlResources(descriptors ...[]byte) []byte {
	const endTag, noChecksum = 0x79, 0
	data := append(slices.Concat(descriptors...), endTag, noChecksum)
	return slices.Concat([]byte{amlBuffer}, amlSized(slices.Concat(amlInt(uint64(len(data))), data)))
}

// resourceIO is n fixed I/O ports, decoded with 16 bits. (section 6.4.2.5)
func resourceIO(port uint16, n byte) []byte {
	b := []byte{0x47, 1}
	b = binary.LittleEndian.AppendUint16(b, port)
	b = binary.LittleEndian.AppendUint16(b, port)
	return append(b, 1, n)
}

// resourceIRQ is an edge-triggered ISA interrupt. (section 6.4.2.1)
func resourceIRQ(irq int) []byte {
	return binary.LittleEndian.AppendUint16([]byte{0x22}, 1<<irq)
}

// resourceMemory is n bytes of writable memory space. (section 6.4.3.4)
func resourceMemory(base, n uint32) []byte {
	b := []byte{0x86, 9, 0, 1}
	b = binary.LittleEndian.AppendUint32(b, base)
	return binary.LittleEndian.AppendUint32(b, n)
}

// General flags of an address space descriptor: both ends fixed, the device
// passes the range on to its children. (section 6.4.3.5)
const windowFixed = 1<<2 | 1<<3

// resourceBuses is the PCI bus numbers first to last.
func resourceBuses(first, last uint16) []byte {
	b := []byte{0x88, 13, 0, 2, windowFixed, 0}
	for _, v := range []uint16{0, first, last, 0, last - first + 1} {
		b = binary.LittleEndian.AppendUint16(b, v)
	}
	return b
}

// resourceWindow is n bytes of memory space that a bridge passes on.
func resourceWindow(base, n uint32) []byte {
	const writable = 1
	b := []byte{0x87, 23, 0, 0, windowFixed, writable}
	for _, v := range []uint32{0, base, base + n - 1, 0, n} {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	return b
}
