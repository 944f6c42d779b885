package virtio

// Context ids (section 5.10.4).
const vsockHostCID = 2

// vsockHeaderSize is the length of struct virtio_vsock_hdr (section 5.10.6).
const vsockHeaderSize = 44

const vsockTypeStream = 1

// Operations (section 5.10.6).
const (
	vsockRequest       = 1
	vsockResponse      = 2
	vsockReset         = 3
	vsockShutdown      = 4
	vsockData          = 5
	vsockCreditUpdate  = 6
	vsockCreditRequest = 7
)

// Flags of vsockShutdown: what the sender will not do any more.
const (
	vsockNoReceive = 1
	vsockNoSend    = 2
	vsockNeither   = vsockNoReceive | vsockNoSend
)

// vsockHeader is struct virtio_vsock_hdr.
type vsockHeader struct {
	srcCID, dstCID   uint64
	srcPort, dstPort uint32
	length           uint32
	kind, op         uint16
	flags            uint32
	bufAlloc, fwdCnt uint32
}

func parseVsockHeader(p *[vsockHeaderSize]byte) vsockHeader {
	return vsockHeader{
		srcCID: le.Uint64(p[0:]), dstCID: le.Uint64(p[8:]),
		srcPort: le.Uint32(p[16:]), dstPort: le.Uint32(p[20:]),
		length: le.Uint32(p[24:]), kind: le.Uint16(p[28:]), op: le.Uint16(p[30:]),
		flags: le.Uint32(p[32:]), bufAlloc: le.Uint32(p[36:]), fwdCnt: le.Uint32(p[40:]),
	}
}

func (h vsockHeader) put(p *[vsockHeaderSize]byte) {
	le.PutUint64(p[0:], h.srcCID)
	le.PutUint64(p[8:], h.dstCID)
	le.PutUint32(p[16:], h.srcPort)
	le.PutUint32(p[20:], h.dstPort)
	le.PutUint32(p[24:], h.length)
	le.PutUint16(p[28:], h.kind)
	le.PutUint16(p[30:], h.op)
	le.PutUint32(p[32:], h.flags)
	le.PutUint32(p[36:], h.bufAlloc)
	le.PutUint32(p[40:], h.fwdCnt)
}

// takeHead copies the first len(head) bytes of the pieces in bufs to head and
// appends what follows them to rest. It returns false when there are fewer.
func takeHead(bufs []Buffer, head []byte, rest [][]byte) ([][]byte, bool) {
	for i := range bufs {
		b := bufs[i].Data
		n := copy(head, b)
		head, b = head[n:], b[n:]
		if len(b) > 0 {
			rest = append(rest, b)
		}
	}
	return rest, len(head) == 0
}

// limitPieces cuts pieces to n bytes and returns how many they are.
func limitPieces(pieces [][]byte, n int) ([][]byte, int) {
	total := 0
	for i, b := range pieces {
		if total+len(b) >= n {
			pieces[i] = b[:n-total]
			return pieces[:i+1], n
		}
		total += len(b)
	}
	return pieces, total
}
