package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/gnomon-vmm/gnomon/tests/guest/probe"
)

// bench is what all experiments need.
type bench struct {
	gnomon string // the binary
	qemu   string
	kernel string // the probe guest
	dir    string // scratch, removed at the end
	quick  bool
	files  int // how many scratch files were named
}

// newBench builds gnomon, unless a binary is given, and the probe guest.
func newBench(o options) (*bench, error) {
	b := &bench{gnomon: o.gnomon, quick: o.quick}
	var err error
	if b.qemu, err = exec.LookPath("qemu-system-x86_64"); err != nil {
		return nil, fmt.Errorf("the peer: %w: install Debian's qemu-system-x86", err)
	}
	if b.kernel, err = probe.Path(); err != nil {
		return nil, err
	}
	if b.dir, err = os.MkdirTemp(o.dir, "gnomon-bench-"); err != nil {
		return nil, err
	}
	if b.gnomon == "" {
		b.gnomon = filepath.Join(b.dir, "gnomon")
		build := exec.Command("go", "build", "-trimpath", "-o", b.gnomon, "github.com/gnomon-vmm/gnomon/tools/gnomon")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			b.close()
			return nil, fmt.Errorf("build gnomon: %w\n%s", err, out)
		}
	}
	return b, nil
}

func (b *bench) close() { os.RemoveAll(b.dir) }

// pick is a count or a size that is smaller with -quick.
func (b *bench) pick(full, quick int) int {
	if b.quick {
		return quick
	}
	return full
}

// ours is gnomon with the given memory in MiB and more flags.
func (b *bench) ours(memory int, flags ...string) vmm {
	return vmm{
		binary: b.gnomon,
		ram:    "gnomon-ram",
		env:    []string{"GNOMON_RUNTIME_DIR=" + filepath.Join(b.dir, "run")},
		args: func(words string) []string {
			return append([]string{
				"run", "--quiet", "--no-reboot", "--kernel", b.kernel, "--append", words,
				"--memory", fmt.Sprintf("%dM", memory), "--serial", "stdio",
			}, flags...)
		},
	}
}

// restore is gnomon that goes on with a checkpoint.
func (b *bench) restore(file string, flags ...string) vmm {
	v := b.ours(0)
	v.args = func(string) []string {
		return append([]string{"restore", file, "--quiet", "--no-reboot", "--net", "none", "--serial", "stdio"}, flags...)
	}
	return v
}

// peer is QEMU. Its RAM is a shared memfd, as ours is, so that it can be told
// from the rest and looked into.
func (b *bench) peer(machine string, memory int, args ...string) vmm {
	if strings.HasPrefix(machine, "q35") {
		// Where ring 0 is interpreted SeaBIOS takes seconds.
		args = append([]string{"-bios", "qboot.rom"}, args...)
	}
	return vmm{
		binary: b.qemu,
		ram:    "memory-backend-memfd",
		args: func(words string) []string {
			return append([]string{
				"-machine", machine + ",memory-backend=ram",
				"-object", fmt.Sprintf("memory-backend-memfd,id=ram,size=%dM,share=on", memory), "-m", fmt.Sprint(memory),
				"-name", "bench,debug-threads=on", "-nodefaults", "-no-user-config", "-display", "none", "-accel", "kvm", "-cpu", "host", "-no-reboot",
				"-serial", "stdio", "-kernel", b.kernel, "-append", words,
			}, args...)
		},
	}
}

// microvm is QEMU's smallest machine without what the probe guest can do without.
const microvm = "microvm,x-option-roms=off,rtc=off,pit=off,pic=off,auto-kernel-cmdline=off"
