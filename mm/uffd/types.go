package uffd

// The request numbers, _IO*(0xaa, nr, type) of linux/userfaultfd.h.
const (
	nrNew          = 0x0000aa00
	nrAPI          = 0xc018aa3f
	nrRegister     = 0xc020aa00
	nrUnregister   = 0x8010aa01
	nrWake         = 0x8010aa02
	nrCopy         = 0xc028aa03
	nrZeroPage     = 0xc020aa04
	nrWriteProtect = 0xc018aa06
	nrContinue     = 0xc020aa07
)

// struct uffdio_api
type apiArg struct {
	api, features uint64
	_             uint64 // ioctls
}

// struct uffdio_range
type rangeArg struct{ addr, n uint64 }

// struct uffdio_register
type registerArg struct {
	addr, n, mode uint64
	_             uint64 // ioctls
}

// struct uffdio_copy
type copyArg struct {
	dst, src, n, mode uint64
	copied            int64 // or -errno
}

// struct uffdio_zeropage
type zeroArg struct {
	addr, n, mode uint64
	zeroed        int64 // or -errno
}

// struct uffdio_continue
type continueArg struct {
	addr, n, mode uint64
	mapped        int64 // or -errno
}

// struct uffdio_writeprotect
type protectArg struct{ addr, n, mode uint64 }

// struct uffd_msg of a fault
type message struct {
	event  uint8
	_      [7]uint8
	flags  uint64
	addr   uint64
	thread uint32
	_      uint32
}
