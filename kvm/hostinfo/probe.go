package hostinfo

import (
	"bufio"
	"bytes"
	"io/fs"
	"os"
	"path"
	"runtime"
	"slices"
	"strconv"
	"strings"
)

// Probe looks at this host, as this user. It runs two small virtual machines,
// takes some milliseconds, and changes nothing.
func Probe() Report {
	host := os.DirFS("/")
	report := Report{
		UID:         os.Geteuid(),
		Kernel:      readLine(host, "proc/sys/kernel/osrelease"),
		CPU:         probeCPU(host),
		Memory:      probeMemory(host),
		Userfaultfd: probeUserfaultfd(host),
		Devices: []Device{
			probeDevice("/dev/net/tun", "tap networking; user-mode networking needs no device"),
			probeDevice("/dev/vhost-net", "networking in the host's kernel, for other monitors; Gnomon does without"),
			probeDevice("/dev/vhost-vsock", "vsock in the host's kernel, for other monitors; Gnomon does without"),
		},
	}
	report.KVM = probeKVM(host, report.CPU)
	report.judge()
	return report
}

// readLine reads a file of one line; empty when it cannot be read.
func readLine(host fs.FS, name string) string {
	data, err := fs.ReadFile(host, name)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(data))
}

// readFields reads a file of lines "name: value", the first of each name.
func readFields(host fs.FS, name string) map[string]string {
	data, err := fs.ReadFile(host, name)
	if err != nil {
		return nil
	}
	fields := make(map[string]string)
	lines := bufio.NewScanner(bytes.NewReader(data))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		key, value, ok := strings.Cut(lines.Text(), ":")
		key = strings.TrimSpace(key)
		if _, seen := fields[key]; ok && !seen {
			fields[key] = strings.TrimSpace(value)
		}
	}
	return fields
}

func probeCPU(host fs.FS) CPU {
	info := readFields(host, "proc/cpuinfo")
	flags := strings.Fields(info["flags"])
	return CPU{
		Model:       info["model name"],
		Count:       runtime.NumCPU(),
		VTx:         slices.Contains(flags, "vmx"),
		AMDV:        slices.Contains(flags, "svm"),
		Hypervisor:  slices.Contains(flags, "hypervisor"),
		ConstantTSC: slices.Contains(flags, "constant_tsc") && slices.Contains(flags, "nonstop_tsc"),
		Clocksource: readLine(host, "sys/devices/system/clocksource/clocksource0/current_clocksource"),
	}
}

func probeMemory(host fs.FS) Memory {
	const thp = "sys/kernel/mm/transparent_hugepage/"
	info := readFields(host, "proc/meminfo")
	memory := Memory{
		Total:       parseKB(info["MemTotal"]),
		Available:   parseKB(info["MemAvailable"]),
		HugePages:   []HugePages{},
		THP:         chosen(readLine(host, thp+"enabled")),
		THPOnShared: chosen(readLine(host, thp+"shmem_enabled")),
	}
	const pools = "sys/kernel/mm/hugepages"
	dirs, err := fs.ReadDir(host, pools)
	if err != nil {
		return memory // a kernel without huge pages
	}
	for _, dir := range dirs {
		size, ok := strings.CutPrefix(dir.Name(), "hugepages-")
		if !ok {
			continue
		}
		count := func(name string) uint64 {
			n, _ := strconv.ParseUint(readLine(host, path.Join(pools, dir.Name(), name)), 10, 64)
			return n
		}
		memory.HugePages = append(memory.HugePages, HugePages{
			Size: parseKB(size), Total: count("nr_hugepages"), Free: count("free_hugepages"),
		})
	}
	slices.SortFunc(memory.HugePages, func(a, b HugePages) int {
		if a.Size < b.Size {
			return -1
		}
		return 1
	})
	return memory
}

// parseKB reads "123 kB" as bytes; 0 when it is none.
func parseKB(text string) uint64 {
	digits := strings.TrimSpace(strings.TrimSuffix(text, "kB"))
	n, err := strconv.ParseUint(digits, 10, 54)
	if err != nil {
		return 0
	}
	return n << 10
}

// chosen returns the word that stands in brackets: "always [madvise] never".
func chosen(choices string) string {
	_, rest, _ := strings.Cut(choices, "[")
	word, _, _ := strings.Cut(rest, "]")
	return word
}

func probeDevice(name, use string) Device {
	device := Device{Path: name, Use: use}
	file, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		device.Error = reason(err)
		return device
	}
	file.Close()
	device.Usable = true
	return device
}
