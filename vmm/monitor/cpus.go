package monitor

import (
	"context"
	"fmt"

	"github.com/gnomon-vmm/gnomon/kvm"
	"github.com/gnomon-vmm/gnomon/qmp"
)

// cpuTopology is CpuInstanceProperties of QEMU's qapi/machine.json.
type cpuTopology struct {
	SocketID *int64 `qmp:"socket-id"`
	CoreID   *int64 `qmp:"core-id"`
	ThreadID *int64 `qmp:"thread-id"`
}

type cpuFast struct {
	CPUIndex int64        `qmp:"cpu-index"`
	QOMPath  string       `qmp:"qom-path"`
	ThreadID int64        `qmp:"thread-id"`
	Props    *cpuTopology `qmp:"props"`
	Target   sysEmuTarget `qmp:"target"`
}

// cpuArch is CpuInfoArch of QEMU 5.2.
type cpuArch string

func (cpuArch) Values() []string { return []string{"x86"} }

// cpuSlow is CpuInfo of QEMU 5.2.
type cpuSlow struct {
	CPU      int64        `qmp:"CPU"`
	Current  bool         `qmp:"current"`
	Halted   bool         `qmp:"halted"`
	QOMPath  string       `qmp:"qom_path"`
	ThreadID int64        `qmp:"thread_id"`
	Props    *cpuTopology `qmp:"props"`
	Arch     cpuArch      `qmp:"arch"`
	PC       int64        `qmp:"pc"`
}

// hotpluggableCPU is HotpluggableCPU of QEMU's qapi/machine.json; there are none.
type hotpluggableCPU struct {
	Type       string      `qmp:"type"`
	VCPUsCount int64       `qmp:"vcpus-count"`
	Props      cpuTopology `qmp:"props"`
	QOMPath    *string     `qmp:"qom-path"`
}

// cpuPath names a vCPU where QEMU has a path in its object tree.
func cpuPath(index int) string { return fmt.Sprintf("/machine/unattached/cpu[%d]", index) }

func topology(index int) *cpuTopology {
	core := int64(index)
	return &cpuTopology{SocketID: new(int64), CoreID: &core, ThreadID: new(int64)}
}

func (mon *monitor) registerCPUs(reg *qmp.Registry) {
	query(reg, "query-cpus-fast", func() (all []cpuFast) {
		for _, c := range mon.m.CPUs() {
			all = append(all, cpuFast{
				CPUIndex: int64(c.Index), QOMPath: cpuPath(c.Index), ThreadID: int64(c.ThreadID),
				Props: topology(c.Index), Target: targetX86,
			})
		}
		return all
	})
	qmp.Register(reg, "query-cpus", mon.queryCPUs)
	query(reg, "query-hotpluggable-cpus", func() []hotpluggableCPU { return nil })
}

// queryCPUs stops the guest for a moment to read where the vCPUs are.
func (mon *monitor) queryCPUs(context.Context, *qmp.Session, qmp.Empty) (all []cpuSlow, err error) {
	err = mon.m.Stopped(func() error {
		for _, c := range mon.m.CPUs() {
			s, err := mon.m.CPUState(c.Index)
			if err != nil {
				return err
			}
			all = append(all, cpuSlow{
				CPU: int64(c.Index), Current: c.Index == 0, Halted: s.MPState != kvm.MPRunnable,
				QOMPath: cpuPath(c.Index), ThreadID: int64(c.ThreadID), Props: topology(c.Index),
				Arch: "x86", PC: int64(s.Sregs.CS.Base + s.Regs.RIP),
			})
		}
		return nil
	})
	return all, err
}
