//go:build linux

package main

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// A kernel started with noxsave saves a program's SSE registers only. On hosts
// without hardware virtualisation programs see the host's CPUID all the same,
// use AVX, and would find the upper halves of their registers changed after the
// kernel has run another program. So neither Go nor glibc may use AVX then.
const (
	goWithoutAVX    = "cpu.avx=off,cpu.avx2=off,cpu.fma=off,cpu.avx512f=off,cpu.avx512cd=off,cpu.avx512bw=off,cpu.avx512dq=off,cpu.avx512vl=off"
	glibcWithoutAVX = "glibc.cpu.hwcaps=-AVX,-AVX2,-AVX512F,-AVX512VL,-AVX512BW,-AVX512CD,-AVX512DQ,-XSAVE,-XSAVEC"
)

// avoidUnsavedRegisters sets the environment of every program that we start,
// and starts this program again if Go did not find its part there at the
// beginning. The kernel puts GODEBUG there if it is on its command line, which
// saves that second start.
func avoidUnsavedRegisters(cmdline map[string]string) {
	if _, ok := cmdline["noxsave"]; !ok {
		return
	}
	_ = os.Setenv("GLIBC_TUNABLES", glibcWithoutAVX)
	if os.Getenv("GODEBUG") != "" {
		return
	}
	_ = os.Setenv("GODEBUG", goWithoutAVX)
	err := unix.Exec("/init", os.Args, os.Environ())
	fmt.Fprintln(os.Stderr, "init: start again without AVX:", err)
}
