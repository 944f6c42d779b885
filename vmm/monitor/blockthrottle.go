package monitor

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/qmp"
	"github.com/gnomon-vmm/gnomon/vmm"
	"github.com/gnomon-vmm/gnomon/vmm/virtio"
)

type (
	// throttleArguments are BlockIOThrottle of QEMU's qapi/block-core.json, of a disk for
	// itself.
	throttleArguments struct {
		Device             *string `qmp:"device"`
		ID                 *string `qmp:"id"`
		BPS                int64   `qmp:"bps"`
		BPSRead            int64   `qmp:"bps_rd"`
		BPSWrite           int64   `qmp:"bps_wr"`
		IOPS               int64   `qmp:"iops"`
		IOPSRead           int64   `qmp:"iops_rd"`
		IOPSWrite          int64   `qmp:"iops_wr"`
		BPSMax             *int64  `qmp:"bps_max"`
		BPSReadMax         *int64  `qmp:"bps_rd_max"`
		BPSWriteMax        *int64  `qmp:"bps_wr_max"`
		IOPSMax            *int64  `qmp:"iops_max"`
		IOPSReadMax        *int64  `qmp:"iops_rd_max"`
		IOPSWriteMax       *int64  `qmp:"iops_wr_max"`
		BPSMaxLength       *int64  `qmp:"bps_max_length"`
		BPSReadMaxLength   *int64  `qmp:"bps_rd_max_length"`
		BPSWriteMaxLength  *int64  `qmp:"bps_wr_max_length"`
		IOPSMaxLength      *int64  `qmp:"iops_max_length"`
		IOPSReadMaxLength  *int64  `qmp:"iops_rd_max_length"`
		IOPSWriteMaxLength *int64  `qmp:"iops_wr_max_length"`
		IOPSSize           *int64  `qmp:"iops_size"`
	}
	histogramArguments struct {
		ID              string    `qmp:"id"`
		Boundaries      *[]uint64 `qmp:"boundaries"`
		BoundariesRead  *[]uint64 `qmp:"boundaries-read"`
		BoundariesWrite *[]uint64 `qmp:"boundaries-write"`
		BoundariesFlush *[]uint64 `qmp:"boundaries-flush"`
	}
	histogramInfo struct {
		Boundaries []uint64 `qmp:"boundaries"`
		Bins       []uint64 `qmp:"bins"`
	}
)

func (mon *monitor) registerThrottling(reg *qmp.Registry) {
	qmp.Register(reg, "block_set_io_throttle", mon.setThrottle)
	qmp.Register(reg, "block-latency-histogram-set", mon.setHistograms)
}

// deviceOf finds a disk by its id, or the path of its device.
func (mon *monitor) deviceOf(id string) (vmm.AttachedDisk, error) {
	for _, d := range mon.m.Disks() {
		if d.ID == id || devicePath(d.ID) == id {
			return d, nil
		}
	}
	return vmm.AttachedDisk{}, &qmp.Error{Class: qmp.DeviceNotFound, Desc: fmt.Sprintf("Device '%s' not found", id)}
}

// setThrottle bounds how much, and how often, a disk's device reads and writes.
func (mon *monitor) setThrottle(_ context.Context, _ *qmp.Session, a throttleArguments) (e qmp.Empty, err error) {
	if (a.Device == nil) == (a.ID == nil) {
		return e, qmp.Errorf("Need exactly one of 'device' and 'id'")
	}
	id := a.Device
	if id == nil {
		id = a.ID
	}
	d, err := mon.deviceOf(*id)
	if err != nil {
		return e, err
	}
	for _, length := range []*int64{a.BPSMaxLength, a.BPSReadMaxLength, a.BPSWriteMaxLength, a.IOPSMaxLength, a.IOPSReadMaxLength, a.IOPSWriteMaxLength} {
		if length != nil && *length == 0 {
			return e, qmp.Errorf("the burst length cannot be 0")
		}
	}
	limit := func(rate int64, burst, length *int64) block.Limit {
		return block.Limit{Rate: rate, Max: orZero(burst), BurstSeconds: orZero(length)}
	}
	return e, d.Root.SetLimits(block.Limits{
		Bytes: limit(a.BPS, a.BPSMax, a.BPSMaxLength), Ops: limit(a.IOPS, a.IOPSMax, a.IOPSMaxLength),
		ReadBytes: limit(a.BPSRead, a.BPSReadMax, a.BPSReadMaxLength), ReadOps: limit(a.IOPSRead, a.IOPSReadMax, a.IOPSReadMaxLength),
		WriteBytes: limit(a.BPSWrite, a.BPSWriteMax, a.BPSWriteMaxLength), WriteOps: limit(a.IOPSWrite, a.IOPSWriteMax, a.IOPSWriteMaxLength),
		OpBytes: orZero(a.IOPSSize),
	})
}

func orZero(n *int64) int64 {
	if n == nil {
		return 0
	}
	return *n
}

// tellLimits fills in what query-block tells of a disk's limits.
func (n *blockNode) tellLimits(l block.Limits) {
	n.BPS, n.BPSRead, n.BPSWrite = l.Bytes.Rate, l.ReadBytes.Rate, l.WriteBytes.Rate
	n.IOPS, n.IOPSRead, n.IOPSWrite = l.Ops.Rate, l.ReadOps.Rate, l.WriteOps.Rate
	n.BPSMax, n.BPSReadMax, n.BPSWriteMax = l.Bytes.Max, l.ReadBytes.Max, l.WriteBytes.Max
	n.IOPSMax, n.IOPSReadMax, n.IOPSWriteMax = l.Ops.Max, l.ReadOps.Max, l.WriteOps.Max
	n.IOPSSize = l.OpBytes
}

// setHistograms has requests of a device counted by how long they take.
func (mon *monitor) setHistograms(_ context.Context, _ *qmp.Session, a histogramArguments) (e qmp.Empty, err error) {
	d, err := mon.deviceOf(a.ID)
	if err != nil {
		return e, err
	}
	if a.Boundaries == nil && a.BoundariesRead == nil && a.BoundariesWrite == nil && a.BoundariesFlush == nil {
		for kind := virtio.LatencyRead; kind <= virtio.LatencyFlush; kind++ {
			d.Device.SetLatency(kind, nil)
		}
		return e, nil
	}
	set := map[virtio.Latency]*virtio.Histogram{}
	for _, x := range []struct {
		kind     virtio.Latency
		name     string
		boundary *[]uint64
	}{{virtio.LatencyRead, "read", a.BoundariesRead}, {virtio.LatencyWrite, "write", a.BoundariesWrite}, {virtio.LatencyFlush, "flush", a.BoundariesFlush}} {
		if x.boundary == nil {
			x.boundary = a.Boundaries
		}
		if x.boundary == nil {
			continue
		}
		h, err := virtio.NewHistogram(*x.boundary)
		if err != nil {
			return e, qmp.Errorf("Device '%s' set %s boundaries fail: %v", a.ID, x.name, err)
		}
		set[x.kind] = h
	}
	for kind, h := range set {
		d.Device.SetLatency(kind, h)
	}
	return e, nil
}

func histogram(d *virtio.Blk, kind virtio.Latency) *histogramInfo {
	h := d.Latency(kind)
	if h == nil {
		return nil
	}
	return &histogramInfo{Boundaries: h.Boundaries, Bins: h.Bins()}
}

// ioStatus is that of a disk's device: an error that its requests wait after.
func ioStatus(d vmm.AttachedDisk) deviceIOStatus {
	switch err := d.Device.Stopped(); {
	case err == nil:
		return "ok"
	case errors.Is(err, syscall.ENOSPC):
		return "nospace"
	}
	return "failed"
}
