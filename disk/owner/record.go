package owner

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"time"
)

// The format of an owner file: docs/owner-format.md.
const (
	recordMagic   = "GNOMONOW"
	recordVersion = 1
	recordSize    = 512

	addressLimit = 127
	nameLimit    = 63

	atGeneration = 40
	atEpoch      = 48
	atLease      = 56
	atWait       = 64
	atState      = 72
	atPID        = 76
	atOwner      = 80
	atBoot       = 96
	atToken      = 112
	atAddress    = 144
	atName       = 272
	atZeros      = 336
	atChecksum   = recordSize - 4
)

// LeaseLimit is the longest lease.
const LeaseLimit = time.Hour

// ErrRecord is an owner file that cannot be what this package wrote.
var ErrRecord = errors.New("owner file")

// State is what an owner file says of its disk.
type State uint32

// States of a disk.
const (
	// Unowned: there is no owner file.
	Unowned State = iota
	// Released: the last owner has let go in order.
	Released
	// Claimed: somebody waits until an owner that does not answer can no longer
	// write. He may not write himself yet.
	Claimed
	// Owned: the owner may write.
	Owned
)

func (s State) String() string {
	switch s {
	case Unowned:
		return "unowned"
	case Released:
		return "released"
	case Claimed:
		return "claimed"
	case Owned:
		return "owned"
	}
	return fmt.Sprintf("state %d", uint32(s))
}

// ID tells owners apart: each Open makes a random one.
type ID [16]byte

func (id ID) String() string { return fmt.Sprintf("%x", id[:]) }

// Record is the content of an owner file.
type Record struct {
	// Generation is one higher in each owner file of a disk than in the one before.
	Generation uint64
	// Epoch is one higher for each owner.
	Epoch uint64
	State State
	Owner ID
	// Address is where the owner is asked to release: unix:PATH, unix:@NAME
	// (abstract) or tcp:HOST:PORT.
	Address string
	// Name says for people who the owner is.
	Name string
	// PID is the owner's process, in its own PID name space.
	PID uint32
	// Boot is the boot id of the owner's host.
	Boot [16]byte
	// Lease is how long the owner may go on writing after it last saw its file.
	Lease time.Duration
	// Wait is how long a successor that gets no answer waits: the longest lease
	// among the owner and those before him who have not been seen to end.
	Wait time.Duration
	// token proves to the owner that who asks over TCP could read the file.
	token [32]byte
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func (r *Record) encode() []byte {
	b := make([]byte, recordSize)
	copy(b, recordMagic)
	le := binary.LittleEndian
	le.PutUint32(b[8:], recordVersion)
	le.PutUint32(b[12:], recordSize)
	le.PutUint64(b[atGeneration:], r.Generation)
	le.PutUint64(b[atEpoch:], r.Epoch)
	le.PutUint64(b[atLease:], uint64(r.Lease))
	le.PutUint64(b[atWait:], uint64(r.Wait))
	le.PutUint32(b[atState:], uint32(r.State))
	le.PutUint32(b[atPID:], r.PID)
	copy(b[atOwner:], r.Owner[:])
	copy(b[atBoot:], r.Boot[:])
	copy(b[atToken:], r.token[:])
	putText(b[atAddress:atName], r.Address)
	putText(b[atName:atZeros], r.Name)
	le.PutUint32(b[atChecksum:], crc32.Checksum(b[:atChecksum], castagnoli))
	return b
}

func putText(field []byte, s string) { field[0] = byte(copy(field[1:], s)) }

func text(field []byte) (string, bool) {
	n := int(field[0])
	if n >= len(field) || len(bytes.Trim(field[1+n:], "\x00")) != 0 {
		return "", false
	}
	for _, c := range field[1 : 1+n] {
		if c < ' ' || c > '~' { // it ends up on terminals and in socket calls
			return "", false
		}
	}
	return string(field[1 : 1+n]), true
}

func decodeRecord(b []byte) (Record, error) {
	le := binary.LittleEndian
	switch {
	case len(b) != recordSize:
		return Record{}, fmt.Errorf("%w: %d bytes, want %d", ErrRecord, len(b), recordSize)
	case string(b[:8]) != recordMagic:
		return Record{}, fmt.Errorf("%w: does not begin with %s", ErrRecord, recordMagic)
	case le.Uint32(b[atChecksum:]) != crc32.Checksum(b[:atChecksum], castagnoli):
		return Record{}, fmt.Errorf("%w: wrong checksum", ErrRecord)
	case le.Uint32(b[8:]) != recordVersion:
		return Record{}, fmt.Errorf("%w: version %d; %d is known", ErrRecord, le.Uint32(b[8:]), recordVersion)
	case le.Uint32(b[12:]) != recordSize:
		return Record{}, fmt.Errorf("%w: says it has %d bytes", ErrRecord, le.Uint32(b[12:]))
	case le.Uint64(b[16:]) != 0:
		return Record{}, fmt.Errorf("%w: needs features %#x, which are not known here", ErrRecord, le.Uint64(b[16:]))
	}
	r := Record{
		Generation: le.Uint64(b[atGeneration:]),
		Epoch:      le.Uint64(b[atEpoch:]),
		State:      State(le.Uint32(b[atState:])),
		PID:        le.Uint32(b[atPID:]),
		Owner:      ID(b[atOwner:]),
		Boot:       [16]byte(b[atBoot:]),
		token:      [32]byte(b[atToken:]),
	}
	lease, wait := le.Uint64(b[atLease:]), le.Uint64(b[atWait:])
	var okAddress, okName bool
	r.Address, okAddress = text(b[atAddress:atName])
	r.Name, okName = text(b[atName:atZeros])
	switch {
	case r.Generation == 0 || r.Generation >= math.MaxInt64 || r.Epoch >= math.MaxInt64:
		return Record{}, fmt.Errorf("%w: generation %d, epoch %d", ErrRecord, r.Generation, r.Epoch)
	case r.State < Released || r.State > Owned:
		return Record{}, fmt.Errorf("%w: %v", ErrRecord, r.State)
	case lease > uint64(LeaseLimit) || wait > uint64(LeaseLimit):
		return Record{}, fmt.Errorf("%w: lease of %d ns, to be waited for %d ns; the limit is %v", ErrRecord, lease, wait, LeaseLimit)
	case !okAddress || !okName:
		return Record{}, fmt.Errorf("%w: address or name is not plain text", ErrRecord)
	case len(bytes.Trim(b[atZeros:atChecksum], "\x00")) != 0:
		return Record{}, fmt.Errorf("%w: bytes without a meaning", ErrRecord)
	}
	r.Lease, r.Wait = time.Duration(lease), time.Duration(wait)
	return r, nil
}
