// Package guest finds the guests that tests boot, building them when they are
// not cached, and talks to the one inside the Linux kit.
package guest

import (
	"bytes"
	"fmt"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// Kit is what to boot.
type Kit struct {
	Kernel string // path of an ELF kernel with a PVH note, or of a bzImage
	Initrd string // path of an uncompressed initramfs
	// Cmdline is what this guest needs on its kernel command line. A machine
	// adds what its host needs.
	Cmdline string
}

// linuxCmdline makes the kit's kernel quick where ring 0 is interpreted, and
// its console one for an Agent:
//
//   - quiet: a line of kernel messages costs 7 ms at the serial port; they can
//     be had with Agent.Dmesg;
//   - rootfstype=ramfs: unpacking the initramfs into tmpfs takes longer;
//   - rodata=off: splitting the kernel's mapping to protect it takes a second;
//   - tsc=reliable: no timer that compares clocks for as long as the guest runs;
//   - swiotlb=noforce: no 64 MiB to clear in guests of 4 GiB and more;
//   - noreplace-smp: a kernel with one processor otherwise patches away each of
//     its 4,400 lock prefixes, which takes two seconds;
//   - GODEBUG: for init's environment; where a kernel runs with noxsave it
//     would otherwise start itself again (linux/init/registers.go).
const linuxCmdline = "console=ttyS0 quiet rootfstype=ramfs rodata=off tsc=reliable swiotlb=noforce noreplace-smp " +
	"GODEBUG=cpu.avx=off,cpu.avx2=off,cpu.fma=off,cpu.avx512f=off,cpu.avx512cd=off,cpu.avx512bw=off,cpu.avx512dq=off,cpu.avx512vl=off " +
	"gnomon.console=agent"

// Linux returns the Linux kit: its kernel, and an initramfs whose init answers
// an Agent. The first call on a machine builds it, which takes minutes.
func Linux(tb testing.TB) Kit {
	tb.Helper()
	kit, err := FindLinux()
	if err != nil {
		tb.Fatal(err)
	}
	return kit
}

// FindLinux is Linux outside of tests.
func FindLinux() (Kit, error) {
	kernel, err := build("linux/kernel.sh")
	if err != nil {
		return Kit{}, err
	}
	initramfs, err := build("linux/initramfs.sh")
	if err != nil {
		return Kit{}, err
	}
	return Kit{
		Kernel:  filepath.Join(kernel, "vmlinux"),
		Initrd:  filepath.Join(initramfs, "initramfs.cpio"),
		Cmdline: linuxCmdline,
	}, nil
}

// CloudReady is what Cloud's init prints on the console, with the kernel's
// release after it, before it runs a shell there.
const CloudReady = "gnomon-cloud: ready"

// cloudCmdline keeps Debian's kernel from what takes long where ring 0 is
// interpreted and that no test looks at.
const cloudCmdline = "console=ttyS0 audit=0 apparmor=0 cryptomgr.notests raid=noautodetect"

// Cloud returns Debian's unmodified cloud kernel with an initramfs of busybox.
// The first call on a machine downloads its package.
func Cloud(tb testing.TB) Kit {
	tb.Helper()
	dir, err := build("linux/cloud.sh")
	if err != nil {
		tb.Fatal(err)
	}
	return Kit{
		Kernel:  filepath.Join(dir, "vmlinuz"),
		Initrd:  filepath.Join(dir, "initramfs.cpio"),
		Cmdline: cloudCmdline,
	}
}

// build runs a script beside this file that prints where it put its results.
func build(script string) (string, error) {
	_, here, _, ok := runtime.Caller(0)
	if !ok {
		return "", fmt.Errorf("%s: this program does not know where its source is", script)
	}
	cmd := exec.Command("sh", filepath.Join(filepath.Dir(here), script))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s", script, err, strings.TrimSpace(stderr.String()))
	}
	return strings.TrimSpace(string(out)), nil
}
