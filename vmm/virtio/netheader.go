package virtio

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Feature bits of the network device (section 5.1.3).
const (
	netFCSum          = 1 << 0
	netFGuestCSum     = 1 << 1
	netFMTU           = 1 << 3
	netFMAC           = 1 << 5
	netFGuestTSO4     = 1 << 7
	netFGuestTSO6     = 1 << 8
	netFGuestECN      = 1 << 9
	netFHostTSO4      = 1 << 11
	netFHostTSO6      = 1 << 12
	netFHostECN       = 1 << 13
	netFMergeRxBuf    = 1 << 15
	netFStatus        = 1 << 16
	netFCtrlVQ        = 1 << 17
	netFCtrlRx        = 1 << 18
	netFCtrlRxExtra   = 1 << 20
	netFGuestAnnounce = 1 << 21
	netFCtrlMACAddr   = 1 << 23
)

// Offloads a NetBackend may carry, by their feature bits (section 5.1.3). Host
// ones are about frames the guest sends, Guest ones about frames it receives.
const (
	NetOffloadHostCSum  = netFCSum
	NetOffloadHostTSO4  = netFHostTSO4
	NetOffloadHostTSO6  = netFHostTSO6
	NetOffloadHostECN   = netFHostECN
	NetOffloadGuestCSum = netFGuestCSum
	NetOffloadGuestTSO4 = netFGuestTSO4
	NetOffloadGuestTSO6 = netFGuestTSO6
	NetOffloadGuestECN  = netFGuestECN

	netOffloads = NetOffloadHostCSum | NetOffloadHostTSO4 | NetOffloadHostTSO6 | NetOffloadHostECN |
		NetOffloadGuestCSum | NetOffloadGuestTSO4 | NetOffloadGuestTSO6 | NetOffloadGuestECN
)

// Bits of NetHeader.Flags and values of NetHeader.GSOType (section 5.1.6).
const (
	NetNeedsChecksum = 1
	NetDataValid     = 2

	NetGSONone  = 0
	NetGSOTCPv4 = 1
	NetGSOTCPv6 = 4
	NetGSOECN   = 0x80 // a flag beside the TCP types
)

// NetHeader is struct virtio_net_hdr (section 5.1.6).
type NetHeader struct {
	Flags          uint8
	GSOType        uint8
	HeaderLength   uint16 // of the headers to repeat in each segment; a hint
	GSOSize        uint16 // payload of one segment
	ChecksumStart  uint16 // in the frame
	ChecksumOffset uint16 // behind ChecksumStart
	Buffers        uint16 // buffers the frame was put in
}

// errNetHeader is what a frame with an impossible header is dropped for.
var errNetHeader = errors.New("bad virtio-net header")

// ParseNetHeader reads the header at p, which has at least NetHeaderSize bytes.
func ParseNetHeader(p []byte) NetHeader {
	_ = p[NetHeaderSize-1]
	return NetHeader{
		Flags:          p[0],
		GSOType:        p[1],
		HeaderLength:   binary.LittleEndian.Uint16(p[2:]),
		GSOSize:        binary.LittleEndian.Uint16(p[4:]),
		ChecksumStart:  binary.LittleEndian.Uint16(p[6:]),
		ChecksumOffset: binary.LittleEndian.Uint16(p[8:]),
		Buffers:        binary.LittleEndian.Uint16(p[10:]),
	}
}

// Put writes h to p, which has at least NetHeaderSize bytes.
func (h NetHeader) Put(p []byte) {
	_ = p[NetHeaderSize-1]
	p[0], p[1] = h.Flags, h.GSOType
	binary.LittleEndian.PutUint16(p[2:], h.HeaderLength)
	binary.LittleEndian.PutUint16(p[4:], h.GSOSize)
	binary.LittleEndian.PutUint16(p[6:], h.ChecksumStart)
	binary.LittleEndian.PutUint16(p[8:], h.ChecksumOffset)
	binary.LittleEndian.PutUint16(p[10:], h.Buffers)
}

// CheckSent tells whether a driver that negotiated features may send a frame
// of size bytes (without the header) under h (section 5.1.6.2).
func (h NetHeader) CheckSent(features uint64, size int) error {
	if h.Flags&NetNeedsChecksum != 0 {
		if features&netFCSum == 0 {
			return fmt.Errorf("%w: checksum offload was not negotiated", errNetHeader)
		}
		if int(h.ChecksumStart)+int(h.ChecksumOffset)+2 > size {
			return fmt.Errorf("%w: checksum at %d+%d in a frame of %d bytes", errNetHeader, h.ChecksumStart, h.ChecksumOffset, size)
		}
	}
	var needs uint64
	switch h.GSOType &^ NetGSOECN {
	case NetGSONone:
		if h.GSOType == NetGSONone {
			return nil
		}
		return fmt.Errorf("%w: ECN without segmentation", errNetHeader)
	case NetGSOTCPv4:
		needs = netFHostTSO4
	case NetGSOTCPv6:
		needs = netFHostTSO6
	default:
		return fmt.Errorf("%w: segmentation type %#x", errNetHeader, h.GSOType)
	}
	if h.GSOType&NetGSOECN != 0 {
		needs |= netFHostECN
	}
	if features&needs != needs {
		return fmt.Errorf("%w: segmentation type %#x was not negotiated", errNetHeader, h.GSOType)
	}
	if h.GSOSize == 0 || h.Flags&NetNeedsChecksum == 0 {
		return fmt.Errorf("%w: segments of %d bytes, flags %#x", errNetHeader, h.GSOSize, h.Flags)
	}
	return nil
}
