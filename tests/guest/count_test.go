package guest

import (
	"bufio"
	"cmp"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// maxBootInstructions is what the kit's kernel may run until it starts init.
// Where ring 0 is interpreted, at about 0.27 us an instruction, that is 12 s of
// the 20 s that init may take to start.
const maxBootInstructions = 45e6

// waitsForClocks are functions in which a kernel only waits for time to pass,
// on clocks that QEMU's emulation must calibrate and a KVM guest knows.
var waitsForClocks = []string{
	"calibrate_delay", "delay_loop", "setup_boot_APIC_clock", "pit_hpet_ptimer_calibrate_cpu", "timer_irq_works",
}

// TestKernelStartsInFewInstructions counts the instructions of the kit's kernel
// from its entry to the start of init, on an emulated processor: a number that
// does not depend on what else the host does.
func TestKernelStartsInFewInstructions(t *testing.T) {
	kit := Linux(t)
	dir := t.TempDir()
	plugin := filepath.Join(dir, "count.so")
	if out, err := exec.Command("gcc", "-O2", "-shared", "-fPIC", "-o", plugin, "linux/count/count.c").CombinedOutput(); err != nil {
		t.Fatalf("build the counter: %v: %s", err, out)
	}
	help, err := exec.Command("qemu-system-x86_64", "-help").Output()
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(help), "-plugin ") {
		t.Skip("this QEMU is built without TCG plugins")
	}
	counts, disk := filepath.Join(dir, "counts"), filepath.Join(dir, "disk")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	// An init that is not there makes the kernel panic, and reset, just where
	// it would have started one.
	cmd := exec.CommandContext(testContext(t), "qemu-system-x86_64",
		"-accel", "tcg", "-plugin", plugin+",out="+counts,
		"-machine", "q35,hpet=off", "-cpu", "qemu64,-cx16", "-m", "128",
		"-nodefaults", "-display", "none", "-no-reboot", "-serial", "none",
		"-kernel", kit.Kernel, "-initrd", kit.Initrd, "-append", kit.Cmdline+" nokaslr mitigations=off rdinit=/none panic=-1",
		"-drive", "if=none,id=d,format=raw,file="+disk, "-device", "virtio-blk-pci,drive=d,disable-legacy=on",
		"-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n,disable-legacy=on,romfile=",
		"-device", "virtio-rng-pci,disable-legacy=on", "-device", "virtio-balloon-pci,disable-legacy=on",
	)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	functions := readSymbols(t, filepath.Join(filepath.Dir(kit.Kernel), "System.map"))
	spent := readCounts(t, counts, functions)
	for _, f := range waitsForClocks {
		delete(spent, f)
	}
	total := 0
	for _, n := range spent {
		total += n
	}
	t.Logf("%.1f million kernel instructions", float64(total)/1e6)
	names := slices.SortedFunc(maps.Keys(spent), func(a, b string) int { return cmp.Compare(spent[b], spent[a]) })
	for _, name := range names[:min(25, len(names))] {
		t.Logf("%8.3f million in %s", float64(spent[name])/1e6, name)
	}
	if total > maxBootInstructions {
		t.Errorf("the kernel runs %d instructions until init starts; the bound is %d", total, int(maxBootInstructions))
	}
	if total < 5e6 {
		t.Errorf("%d instructions are not a boot of Linux", total)
	}
}

type symbol struct {
	address uint64
	name    string
}

// readSymbols reads the functions of a System.map, which is sorted.
func readSymbols(t *testing.T, path string) []symbol {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var symbols []symbol
	for s := bufio.NewScanner(f); s.Scan(); {
		fields := strings.Fields(s.Text())
		if len(fields) != 3 || !strings.Contains("tTwW", fields[1]) {
			continue
		}
		address, err := strconv.ParseUint(fields[0], 16, 64)
		if err != nil {
			t.Fatal(err)
		}
		symbols = append(symbols, symbol{address, fields[2]})
	}
	return symbols
}

// readCounts adds up the instructions of each function.
func readCounts(t *testing.T, path string, functions []symbol) map[string]int {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const kernelText = 0xffffffff_80000000
	spent := map[string]int{}
	for s := bufio.NewScanner(f); s.Scan(); {
		var address uint64
		var instructions, runs int
		if _, err := fmt.Sscanf(s.Text(), "%x %d %d", &address, &instructions, &runs); err != nil {
			t.Fatal(err)
		}
		if address < kernelText {
			continue // firmware
		}
		i, found := slices.BinarySearchFunc(functions, address, func(f symbol, a uint64) int { return cmp.Compare(f.address, a) })
		if !found {
			i--
		}
		if i >= 0 {
			spent[functions[i].name] += instructions * runs
		}
	}
	return spent
}
