// Package nbd serves virtual disks to others, and uses those that others serve, by
// the NBD protocol: fixed newstyle negotiation, structured replies, metadata
// contexts and TLS, as proto.md of the NetworkBlockDevice project has them
// (section names in comments are that document's).
package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// DefaultPort is the TCP port of NBD.
const DefaultPort = "10809"

// Errors, wrapped with what failed.
var (
	ErrProtocol = errors.New("NBD: the peer breaks the protocol")
	ErrRefused  = errors.New("NBD: the server refuses")
	ErrAddress  = errors.New("NBD address")
	ErrExport   = errors.New("NBD export")
	ErrInUse    = errors.New("has clients") // of an export that is to go
	ErrClosed   = errors.New("NBD: closed")
	ErrRemote   = errors.New("NBD: the server reports") // a request that failed there
	ErrLost     = errors.New("NBD: the connection is lost")
)

// Magic numbers of the messages.
const (
	magicServer     = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption     = 0x49484156454f5054 // "IHAVEOPT"
	magicReply      = 0x3e889045565a9    // to an option
	magicRequest    = 0x25609513
	magicSimple     = 0x67446698
	magicStructured = 0x668e33ef
)

// Handshake flags; the client's are the same bits of a wider field.
const (
	handshakeFixed    = 1 << 0
	handshakeNoZeroes = 1 << 1
)

// Option types.
const (
	optExportName = 1
	optAbort      = 2
	optList       = 3
	optStartTLS   = 5
	optInfo       = 6
	optGo         = 7
	optStructured = 8
	optListMeta   = 9
	optSetMeta    = 10
)

// Option reply types.
const (
	repAck         = 1
	repServer      = 2
	repInfo        = 3
	repMetaContext = 4

	repError            = 1 << 31
	repErrUnsupported   = repError | 1
	repErrPolicy        = repError | 2
	repErrInvalid       = repError | 3
	repErrPlatform      = repError | 4
	repErrTLSRequired   = repError | 5
	repErrUnknown       = repError | 6
	repErrShutdown      = repError | 7
	repErrBlockSizeReqd = repError | 8
	repErrTooBig        = repError | 9
)

var optionErrors = map[uint32]string{
	repErrUnsupported:   "it does not know the option",
	repErrPolicy:        "its policy forbids it",
	repErrInvalid:       "it finds the option invalid",
	repErrPlatform:      "its platform cannot do it",
	repErrTLSRequired:   "it wants TLS first",
	repErrUnknown:       "it has no such export",
	repErrShutdown:      "it is shutting down",
	repErrBlockSizeReqd: "it wants its block size to be kept",
	repErrTooBig:        "the option is too big for it",
}

// Kinds of repInfo.
const (
	infoExport      = 0
	infoName        = 1
	infoDescription = 2
	infoBlockSize   = 3
)

// Transmission flags, what an export can do.
const (
	flagHasFlags     = 1 << 0
	flagReadOnly     = 1 << 1
	flagFlush        = 1 << 2
	flagFUA          = 1 << 3
	flagTrim         = 1 << 5
	flagWriteZeroes  = 1 << 6
	flagDontFragment = 1 << 7
	flagMultiConn    = 1 << 8
	flagCache        = 1 << 10
	flagFastZero     = 1 << 11
)

// Request types.
const (
	cmdRead        = 0
	cmdWrite       = 1
	cmdDisconnect  = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdCache       = 5
	cmdWriteZeroes = 6
	cmdBlockStatus = 7
)

// Command flags.
const (
	cmdFUA          = 1 << 0
	cmdNoHole       = 1 << 1
	cmdDontFragment = 1 << 2
	cmdReqOne       = 1 << 3
	cmdFastZero     = 1 << 4
)

// Chunks of structured replies.
const (
	chunkDone = 1 << 0 // flag

	chunkNone        = 0
	chunkData        = 1
	chunkHole        = 2
	chunkBlockStatus = 5
	chunkError       = 1<<15 | 1
	chunkErrorOffset = 1<<15 | 2
	chunkIsError     = 1 << 15
)

// The metadata contexts of this package and what their flags say.
const (
	ContextAllocation  = "base:allocation"
	ContextDirtyBitmap = "qemu:dirty-bitmap:" // and the bitmap's name

	StateHole  = 1 << 0 // base:allocation: nothing is allocated
	StateZero  = 1 << 1 // base:allocation: reads as zeroes
	StateDirty = 1 << 0 // qemu:dirty-bitmap: the bitmap has it
)

// Sizes in bytes of messages, and their limits.
const (
	requestSize    = 28
	simpleSize     = 16
	structuredSize = 20
	optionSize     = 16
	replySize      = 20

	maxString     = 4096     // of names, contexts and messages: "Values", String
	maxOptionData = 64 << 10 // of an option and of a reply to one
	maxPayload    = 32 << 20 // of a read or write: "Block sizes", what clients may assume
	maxExtents    = 8192     // of one context in one reply
)

// contextID tells the context that a block status chunk is about: its number
// in the order in which the contexts were named.
type contextID = uint32

// Error values.
const (
	codePerm      = 1
	codeIO        = 5
	codeNoMem     = 12
	codeInvalid   = 22
	codeNoSpace   = 28
	codeOverflow  = 75
	codeNotSup    = 95
	codeShutdown  = 108
	codeUndefined = math.MaxUint32
)

// errorCode finds the protocol's value for what a node returned.
func errorCode(err error) uint32 {
	switch {
	case errors.Is(err, block.ErrReadOnly), errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return codePerm
	case errors.Is(err, block.ErrOutOfRange):
		return codeInvalid
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT), errors.Is(err, unix.EFBIG):
		return codeNoSpace
	case errors.Is(err, unix.ENOMEM):
		return codeNoMem
	case errors.Is(err, unix.EOPNOTSUPP):
		return codeNotSup
	case errors.Is(err, ErrClosed):
		return codeShutdown
	}
	return codeIO
}

// remoteError is what a server reported; message is what it said, or "".
func remoteError(code uint32, message string) error {
	cause := map[uint32]error{
		codePerm:    block.ErrReadOnly,
		codeNoMem:   unix.ENOMEM,
		codeInvalid: unix.EINVAL,
		codeNoSpace: unix.ENOSPC,
		codeNotSup:  unix.EOPNOTSUPP,
	}[code]
	switch {
	case code == codeShutdown:
		cause = errors.New("it is shutting down")
	case code == codeOverflow:
		cause = unix.EOVERFLOW
	case cause == nil:
		cause = unix.EIO
	}
	if message == "" {
		return fmt.Errorf("%w: %w", ErrRemote, cause)
	}
	return fmt.Errorf("%w: %q: %w", ErrRemote, message, cause)
}

// header is a request as it is sent: "Request message".
type header struct {
	flags, command uint16
	cookie         uint64
	offset         uint64
	length         uint32
}

func (h header) put(b []byte) {
	binary.BigEndian.PutUint32(b, magicRequest)
	binary.BigEndian.PutUint16(b[4:], h.flags)
	binary.BigEndian.PutUint16(b[6:], h.command)
	binary.BigEndian.PutUint64(b[8:], h.cookie)
	binary.BigEndian.PutUint64(b[16:], h.offset)
	binary.BigEndian.PutUint32(b[24:], h.length)
}

// parseHeader reads the requestSize bytes at b; false: the magic is wrong.
func parseHeader(b []byte) (header, bool) {
	return header{
		flags:   binary.BigEndian.Uint16(b[4:]),
		command: binary.BigEndian.Uint16(b[6:]),
		cookie:  binary.BigEndian.Uint64(b[8:]),
		offset:  binary.BigEndian.Uint64(b[16:]),
		length:  binary.BigEndian.Uint32(b[24:]),
	}, binary.BigEndian.Uint32(b) == magicRequest
}

// putSimple writes the simpleSize bytes of a simple reply.
func putSimple(b []byte, code uint32, cookie uint64) {
	binary.BigEndian.PutUint32(b, magicSimple)
	binary.BigEndian.PutUint32(b[4:], code)
	binary.BigEndian.PutUint64(b[8:], cookie)
}

// putChunk writes the structuredSize bytes that begin a chunk.
func putChunk(b []byte, flags, kind uint16, cookie uint64, length uint32) {
	binary.BigEndian.PutUint32(b, magicStructured)
	binary.BigEndian.PutUint16(b[4:], flags)
	binary.BigEndian.PutUint16(b[6:], kind)
	binary.BigEndian.PutUint64(b[8:], cookie)
	binary.BigEndian.PutUint32(b[16:], length)
}
