package virtio

import "github.com/gnomon-vmm/gnomon/vmm/nbio"

// ErrAgain is what a backend's non-blocking call returns when it would have to
// wait. The backend's callback tells when it is worth trying again.
var ErrAgain = nbio.ErrAgain

// NetHeaderSize is the length of struct virtio_net_hdr as version 1 devices
// use it, num_buffers included (section 5.1.6). Every frame that passes between
// a Net and its backend starts with one.
const NetHeaderSize = 12

// MaxFrameSize is the longest frame that passes between a Net and its backend:
// header, Ethernet header with a VLAN tag, and the largest IP packet.
const MaxFrameSize = NetHeaderSize + 18 + 65535

// NetBackend is the host's end of a network device's cable. Frames are passed
// as the pieces of memory they lie in, so that a backend can move them without
// a copy of its own. Send is called on one worker and Receive on another;
// frames wait in the backend's own bounded buffer while neither is called, which
// is what pauses it.
type NetBackend interface {
	// Offloads are those of the NetOffload feature bits that the backend can
	// carry.
	Offloads() uint64
	// Start begins to pass frames. features are the negotiated ones. readable
	// is called when Receive may find a frame after it returned ErrAgain, and
	// writable when Send may go on after it did. Both may be called from any
	// goroutine, and too often; they do not block.
	Start(features uint64, readable, writable func()) error
	// Stop ends what Start began and forgets the callbacks. Frames that still
	// wait may be lost.
	Stop()
	// Send takes one frame. It copies what it needs: the pieces are the caller's
	// again when Send returns. Only ErrAgain means that the frame should be
	// offered again; on any other error the frame is lost.
	Send(frame [][]byte) error
	// Receive puts one frame into the pieces of p, in order, and returns its
	// length. p has room for MaxFrameSize bytes.
	Receive(p [][]byte) (int, error)
	// Describe is the backend in a few words, for listings.
	Describe() string
	// Close releases all that the backend holds on the host.
	Close() error
}
