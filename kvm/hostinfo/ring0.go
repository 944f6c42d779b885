package hostinfo

import (
	"errors"
	"fmt"

	"github.com/gnomon-vmm/gnomon/kvm"
	"github.com/gnomon-vmm/gnomon/kvm/internal/tinyguest"
)

// ErrRing0 means that the ring 0 probe had an outcome it does not know.
var ErrRing0 = errors.New("ring 0 probe")

// NativeRing0 reports whether the processor runs guest ring 0 by itself, as
// with VT-x and AMD-V. Where it does not (PVM), KVM interprets kernels
// instruction by instruction, and lacks some: INT3 is one, so a guest of one
// INT3 tells. It takes about a millisecond.
func NativeRing0(sys *kvm.System) (bool, error) {
	const (
		breakpoint = 3
		port       = 0x80
		handler    = tinyguest.Code + 1
	)
	guest, err := tinyguest.New(sys, tinyguest.Config{
		Mode: tinyguest.Ring0,
		Code: []byte{
			0xcc,       // int3
			0xe6, port, // handler: out port, al
		},
		Gates: map[uint8]uint64{breakpoint: handler},
	})
	if err != nil {
		return false, fmt.Errorf("%w: %w", ErrRing0, err)
	}
	defer guest.Close()
	exit, err := guest.Run()
	if err != nil {
		return false, fmt.Errorf("%w: KVM_RUN: %w", ErrRing0, err)
	}
	switch exit {
	case kvm.ExitIO:
		if guest.VCPU.IO().Port == port {
			return true, nil
		}
	case kvm.ExitInternalError:
		if suberror, _ := guest.VCPU.InternalError(); suberror == kvm.InternalErrorEmulation {
			return false, nil
		}
	}
	return false, fmt.Errorf("%w: unexpected %v", ErrRing0, exit)
}
