package monitor

import (
	"github.com/gnomon-vmm/gnomon/qmp"
	"github.com/gnomon-vmm/gnomon/vmm"
)

type (
	nameInfo struct {
		Name *string `qmp:"name"`
	}
	uuidInfo struct {
		UUID string `qmp:"UUID"`
	}
	kvmInfo struct {
		Enabled bool `qmp:"enabled"`
		Present bool `qmp:"present"`
	}
	memoryInfo struct {
		BaseMemory    uint64  `qmp:"base-memory"`
		PluggedMemory *uint64 `qmp:"plugged-memory"`
	}
	chardevInfo struct {
		Label        string `qmp:"label"`
		Filename     string `qmp:"filename"`
		FrontendOpen bool   `qmp:"frontend-open"`
	}
	// ioThreadInfo describes an I/O thread. There are none: each queue of a
	// device has a goroutine.
	ioThreadInfo struct {
		ID          string `qmp:"id"`
		ThreadID    int64  `qmp:"thread-id"`
		PollMaxNS   int64  `qmp:"poll-max-ns"`
		PollGrow    int64  `qmp:"poll-grow"`
		PollShrink  int64  `qmp:"poll-shrink"`
		AIOMaxBatch int64  `qmp:"aio-max-batch"`
	}
	machineInfo struct {
		Name             string  `qmp:"name"`
		Alias            *string `qmp:"alias"`
		IsDefault        *bool   `qmp:"is-default"`
		CPUMax           int64   `qmp:"cpu-max"`
		HotpluggableCPUs bool    `qmp:"hotpluggable-cpus"`
		NUMAMemSupported bool    `qmp:"numa-mem-supported"`
		Deprecated       bool    `qmp:"deprecated"`
	}
	currentMachine struct {
		WakeupSuspendSupport bool `qmp:"wakeup-suspend-support"`
	}
	targetInfo struct {
		Arch sysEmuTarget `qmp:"arch"`
	}
)

// sysEmuTarget is SysEmuTarget of QEMU's qapi/machine.json.
type sysEmuTarget string

const targetX86 sysEmuTarget = "x86_64"

func (sysEmuTarget) Values() []string { return []string{string(targetX86)} }

// registerInfo adds what tells about the machine as a whole.
func (mon *monitor) registerInfo(reg *qmp.Registry) {
	query(reg, "query-name", func() (i nameInfo) {
		if name := mon.m.Name(); name != "" {
			i.Name = &name
		}
		return i
	})
	query(reg, "query-uuid", func() uuidInfo { return uuidInfo{mon.m.UUID().String()} })
	query(reg, "query-kvm", func() kvmInfo { return kvmInfo{Enabled: true, Present: true} })
	query(reg, "query-memory-size-summary", func() memoryInfo {
		return memoryInfo{BaseMemory: mon.m.Memory().Size(), PluggedMemory: new(uint64)}
	})
	query(reg, "query-chardev", func() (infos []chardevInfo) {
		for _, c := range mon.m.Chardevs() {
			infos = append(infos, chardevInfo{Label: c.Label, Filename: c.Filename, FrontendOpen: c.FrontendOpen})
		}
		return infos
	})
	query(reg, "query-iothreads", func() []ioThreadInfo { return nil })
	query(reg, "query-machines", func() []machineInfo {
		yes := true
		return []machineInfo{{Name: "gnomon", IsDefault: &yes, CPUMax: vmm.MaxCPUs}}
	})
	query(reg, "query-current-machine", func() currentMachine { return currentMachine{} })
	query(reg, "query-target", func() targetInfo { return targetInfo{targetX86} })
}
