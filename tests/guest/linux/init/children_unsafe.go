//go:build linux

package main

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// endedChild looks at, but does not take, a child that has ended. It returns
// its process number, or 0 if there is none.
func endedChild() int {
	// siginfo_t of SIGCHLD on x86-64: si_pid stands at byte 12 + 4 of padding
	// less the union's alignment, that is at 16 (sigaction(2)).
	var info [128]byte
	err := unix.Waitid(unix.P_ALL, 0, (*unix.Siginfo)(unsafe.Pointer(&info)), unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	if err != nil {
		return 0
	}
	return int(*(*int32)(unsafe.Pointer(&info[16])))
}
