package kvm

import (
	"sync/atomic"
	"unsafe"
)

// runPage is struct kvm_run.
type runPage struct {
	// request is four bytes that user space sets: request_interrupt_window,
	// immediate_exit and padding. One word, because there are no atomic bytes.
	request                    uint32
	_                          uint32
	exitReason                 uint32
	readyForInterruptInjection uint8
	ifFlag                     uint8
	flags                      uint16
	cr8                        uint64
	apicBase                   uint64
	exit                       [256]byte // a union: what it holds depends on exitReason
	validRegs                  uint64
	dirtyRegs                  uint64
	sync                       SyncRegs
	_                          [2048 - unsafe.Sizeof(SyncRegs{})]byte
}

const runPageSize = int(unsafe.Sizeof(runPage{}))

// immediateExit is kvm_run.immediate_exit = 1 seen in runPage.request.
const immediateExit = 1 << 8

func runPageOf(shared []byte) *runPage { return (*runPage)(unsafe.Pointer(&shared[0])) }

// exitAs looks at the exit union as one of its members.
func exitAs[T any](r *runPage) *T { return (*T)(unsafe.Pointer(&r.exit)) }

func (r *runPage) requestExit(on bool) {
	if on {
		atomic.OrUint32(&r.request, immediateExit)
	} else {
		atomic.AndUint32(&r.request, ^uint32(immediateExit))
	}
}

// address returns where a slice lies; 0 for an empty one.
func address(mem []byte) uint64 {
	if len(mem) == 0 {
		return 0
	}
	return uint64(uintptr(unsafe.Pointer(&mem[0])))
}
