package boot

import (
	"bytes"
	"testing"
)

// TestAMLSized decodes the length as section 20.2.4 says, around each size at
// which the encoding gets longer.
func TestAMLSized(t *testing.T) {
	for _, n := range []int{0, 1, 62, 63, 64, 4093, 4094, 0xFFFFC, 0xFFFFD, 0x10_0000} {
		body := make([]byte, n)
		b := amlSized(body)
		extra := int(b[0] >> 6)
		length := int(b[0] & 0x3F)
		if extra > 0 {
			length &= 0xF
			for i := range extra {
				length |= int(b[1+i]) << (4 + 8*i)
			}
			if b[0]&0x30 != 0 {
				t.Errorf("%d bytes: reserved bits in %#x", n, b[0])
			}
		}
		if length != len(b) || len(b) != n+1+extra {
			t.Errorf("%d bytes: length %d, encoded in %d", n, length, len(b))
		}
	}
}

func TestAMLTerms(t *testing.T) {
	for _, x := range []struct {
		name      string
		got, want []byte
	}{
		{"root path", amlPath(`\_SB`), []byte(`\_SB_`)},
		{"short name", amlPath("RTC"), []byte("RTC_")},
		{"path of two", amlPath(`\_SB.PCI0`), []byte("\\\x2E_SB_PCI0")},
		{"path of three", amlPath("_SB.PCI0.ISA"), []byte("\x2F\x03_SB_PCI0ISA_")},
		{"0", amlInt(0), []byte{0}},
		{"1", amlInt(1), []byte{1}},
		{"byte", amlInt(0xFF), []byte{0x0A, 0xFF}},
		{"word", amlInt(0x100), []byte{0x0B, 0, 1}},
		{"dword", amlInt(0x1_0000), []byte{0x0C, 0, 0, 1, 0}},
		{"qword", amlInt(0x1_0000_0000), []byte{0x0E, 0, 0, 0, 0, 1, 0, 0, 0}},
		{"EISA id", amlEISAID("PNP0A03"), []byte{0x0C, 0x41, 0xD0, 0x0A, 0x03}},
		{"text", amlText("ab"), []byte("\x0Dab\x00")},
		{"name", amlNamed("_UID", amlInt(1)), []byte("\x08_UID\x01")},
		{"package", amlList(amlInt(0), amlInt(1)), []byte{0x12, 4, 2, 0, 1}},
		{"notify", amlNotification("DEV", 0x80), []byte("\x86DEV_\x0A\x80")},
		{"method", amlProcedure("_E00"), []byte("\x14\x06_E00\x08")},
		{"device", amlDevice("DEV"), []byte("\x5B\x82\x05DEV_")},
		{"I/O ports", resourceIO(0x3F8, 8), []byte{0x47, 1, 0xF8, 3, 0xF8, 3, 1, 8}},
		{"IRQ", resourceIRQ(4), []byte{0x22, 0x10, 0}},
	} {
		if !bytes.Equal(x.got, x.want) {
			t.Errorf("%s: % x, want % x", x.name, x.got, x.want)
		}
	}
}
