package monitor

import (
	"context"
	"maps"
	"os"
	"slices"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/qmp"
	"github.com/gnomon-vmm/gnomon/vmm"
	"github.com/gnomon-vmm/gnomon/vmm/virtio"
)

// The types of QEMU's qapi/block-core.json. What is optional there and never
// present here is left out.
type (
	blockInfo struct {
		Device    string          `qmp:"device"`
		Qdev      *string         `qmp:"qdev"`
		Type      string          `qmp:"type"`
		Removable bool            `qmp:"removable"`
		Locked    bool            `qmp:"locked"`
		Inserted  *blockNode      `qmp:"inserted"`
		IOStatus  *deviceIOStatus `qmp:"io-status"`
	}
	blockNode struct {
		File             string       `qmp:"file"`
		NodeName         *string      `qmp:"node-name"`
		ReadOnly         bool         `qmp:"ro"`
		Driver           string       `qmp:"drv"`
		BackingFile      *string      `qmp:"backing_file"`
		BackingFileDepth int64        `qmp:"backing_file_depth"`
		Encrypted        bool         `qmp:"encrypted"`
		DetectZeroes     detectZeroes `qmp:"detect_zeroes"`
		BPS              int64        `qmp:"bps"`
		BPSRead          int64        `qmp:"bps_rd"`
		BPSWrite         int64        `qmp:"bps_wr"`
		IOPS             int64        `qmp:"iops"`
		IOPSRead         int64        `qmp:"iops_rd"`
		IOPSWrite        int64        `qmp:"iops_wr"`
		BPSMax           int64        `qmp:"bps_max,omitempty"`
		BPSReadMax       int64        `qmp:"bps_rd_max,omitempty"`
		BPSWriteMax      int64        `qmp:"bps_wr_max,omitempty"`
		IOPSMax          int64        `qmp:"iops_max,omitempty"`
		IOPSReadMax      int64        `qmp:"iops_rd_max,omitempty"`
		IOPSWriteMax     int64        `qmp:"iops_wr_max,omitempty"`
		IOPSSize         int64        `qmp:"iops_size,omitempty"`
		Image            imageInfo    `qmp:"image"`
		DirtyBitmaps     []dirtyInfo  `qmp:"dirty-bitmaps,omitempty"`
		Cache            cacheInfo    `qmp:"cache"`
		WriteThreshold   int64        `qmp:"write_threshold"`
	}
	imageInfo struct {
		Filename              string     `qmp:"filename"`
		Format                string     `qmp:"format"`
		ActualSize            *int64     `qmp:"actual-size"`
		VirtualSize           int64      `qmp:"virtual-size"`
		ClusterSize           *int64     `qmp:"cluster-size"`
		BackingFilename       *string    `qmp:"backing-filename"`
		BackingFilenameFormat *string    `qmp:"backing-filename-format"`
		BackingImage          *imageInfo `qmp:"backing-image"`
	}
	cacheInfo struct {
		Writeback bool `qmp:"writeback"`
		Direct    bool `qmp:"direct"`
		NoFlush   bool `qmp:"no-flush"`
	}
	blockStats struct {
		Device   *string          `qmp:"device"`
		Qdev     *string          `qmp:"qdev"`
		NodeName *string          `qmp:"node-name"`
		Stats    blockDeviceStats `qmp:"stats"`
	}
	blockDeviceStats struct {
		ReadBytes       int64        `qmp:"rd_bytes"`
		WriteBytes      int64        `qmp:"wr_bytes"`
		UnmapBytes      int64        `qmp:"unmap_bytes"`
		ReadOperations  int64        `qmp:"rd_operations"`
		WriteOperations int64        `qmp:"wr_operations"`
		FlushOperations int64        `qmp:"flush_operations"`
		UnmapOperations int64        `qmp:"unmap_operations"`
		ReadTime        int64        `qmp:"rd_total_time_ns"`
		WriteTime       int64        `qmp:"wr_total_time_ns"`
		FlushTime       int64        `qmp:"flush_total_time_ns"`
		UnmapTime       int64        `qmp:"unmap_total_time_ns"`
		WriteHighest    int64        `qmp:"wr_highest_offset"` // not kept: always 0
		ReadMerged      int64        `qmp:"rd_merged"`
		WriteMerged     int64        `qmp:"wr_merged"`
		UnmapMerged     int64        `qmp:"unmap_merged"`
		FailedReads     int64        `qmp:"failed_rd_operations"`
		FailedWrites    int64        `qmp:"failed_wr_operations"`
		FailedFlushes   int64        `qmp:"failed_flush_operations"`
		FailedUnmaps    int64        `qmp:"failed_unmap_operations"`
		InvalidReads    int64        `qmp:"invalid_rd_operations"`
		InvalidWrites   int64        `qmp:"invalid_wr_operations"`
		InvalidFlushes  int64        `qmp:"invalid_flush_operations"`
		InvalidUnmaps   int64        `qmp:"invalid_unmap_operations"`
		AccountInvalid  bool         `qmp:"account_invalid"`
		AccountFailed   bool         `qmp:"account_failed"`
		TimedStats      []timedStats `qmp:"timed_stats"`

		ReadLatency  *histogramInfo `qmp:"rd_latency_histogram"`
		WriteLatency *histogramInfo `qmp:"wr_latency_histogram"`
		FlushLatency *histogramInfo `qmp:"flush_latency_histogram"`
	}
	// timedStats is BlockDeviceTimedStats, of intervals that nobody can set here.
	timedStats struct {
		IntervalLength     int64   `qmp:"interval_length"`
		MinReadLatency     int64   `qmp:"min_rd_latency_ns"`
		MaxReadLatency     int64   `qmp:"max_rd_latency_ns"`
		AvgReadLatency     int64   `qmp:"avg_rd_latency_ns"`
		MinWriteLatency    int64   `qmp:"min_wr_latency_ns"`
		MaxWriteLatency    int64   `qmp:"max_wr_latency_ns"`
		AvgWriteLatency    int64   `qmp:"avg_wr_latency_ns"`
		MinFlushLatency    int64   `qmp:"min_flush_latency_ns"`
		MaxFlushLatency    int64   `qmp:"max_flush_latency_ns"`
		AvgFlushLatency    int64   `qmp:"avg_flush_latency_ns"`
		AvgReadQueueDepth  float64 `qmp:"avg_rd_queue_depth"`
		AvgWriteQueueDepth float64 `qmp:"avg_wr_queue_depth"`
	}
	// blockJob is BlockJobInfo.
	blockJob struct {
		Type         string         `qmp:"type"`
		Device       string         `qmp:"device"`
		Len          int64          `qmp:"len"`
		Offset       int64          `qmp:"offset"`
		Busy         bool           `qmp:"busy"`
		Paused       bool           `qmp:"paused"`
		Speed        int64          `qmp:"speed"`
		IOStatus     deviceIOStatus `qmp:"io-status"`
		Ready        bool           `qmp:"ready"`
		Status       qmp.JobStatus  `qmp:"status"`
		AutoFinalize bool           `qmp:"auto-finalize"`
		AutoDismiss  bool           `qmp:"auto-dismiss"`
		Error        *string        `qmp:"error"`
	}
	namedNodesArguments struct {
		Flat *bool `qmp:"flat"`
	}
	blockStatsArguments struct {
		QueryNodes *bool `qmp:"query-nodes"`
	}
)

// deviceIOStatus is BlockDeviceIoStatus, detectZeroes BlockdevDetectZeroesOptions.
type (
	deviceIOStatus string
	detectZeroes   string
)

func (deviceIOStatus) Values() []string { return []string{"ok", "failed", "nospace"} }
func (detectZeroes) Values() []string {
	return []string{string(detectOff), string(detectOn), string(detectUnmap)}
}

// devicePath names a device where QEMU has a path in its object tree.
func devicePath(id string) string { return "/machine/peripheral/" + id }

func (mon *monitor) registerBlock(reg *qmp.Registry) {
	query(reg, "query-block", func() (all []blockInfo) {
		for _, d := range mon.m.Disks() {
			path, status := devicePath(d.ID), ioStatus(d)
			node := mon.nodeInfo(d, d.Node.Info(), mon.chainNames(d), 0, true)
			node.DirtyBitmaps = mon.bitmaps.info(d.ID)
			all = append(all, blockInfo{Device: d.ID, Qdev: &path, Type: "unknown", Inserted: &node, IOStatus: &status})
		}
		return all
	})
	qmp.Register(reg, "query-blockstats", mon.queryBlockStats)
	qmp.Register(reg, "query-named-block-nodes", mon.queryNodes)
}

// queryNodes lists every node, those of backing files too. flat leaves out the
// images behind each.
func (mon *monitor) queryNodes(_ context.Context, _ *qmp.Session, a namedNodesArguments) (all []blockNode, _ error) {
	flat := a.Flat != nil && *a.Flat
	for _, d := range mon.m.Disks() {
		info, names := d.Node.Info(), mon.chainNames(d)
		for depth, i := 0, &info; i != nil; depth, i = depth+1, i.Backing {
			node := mon.nodeInfo(d, *i, names, depth, !flat)
			if depth == 0 {
				node.DirtyBitmaps = mon.bitmaps.info(d.ID)
			}
			all = append(all, node)
		}
	}
	return append(all, mon.addedNodes(!flat)...), nil
}

// addedNodes are those with names that no disk has.
func (mon *monitor) addedNodes(deep bool) (all []blockNode) {
	mon.refresh()
	g := &mon.graph
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(g.byName)) {
		e := g.byName[name]
		switch {
		case e.disk != "" || e.gone:
			continue
		case e.node == nil: // open as the file of a format
			o := e.manner.options()
			i := block.Info{Format: string(e.driver), Filename: e.path(), Rules: o.Rules, Cache: block.CacheInfo{Direct: o.Direct, NoFlush: o.NoFlush}}
			if st, err := os.Stat(i.Filename); err == nil {
				i.VirtualSize = st.Size()
			}
			all = append(all, describe(name, i, e.readOnly, true, deep))
		default:
			i := e.node.Info()
			i.Format = string(e.driver)
			all = append(all, describe(name, i, e.readOnly, true, deep))
		}
	}
	return all
}

// nodeInfo tells of the depth-th image of a disk. names are those that are known.
func (mon *monitor) nodeInfo(d vmm.AttachedDisk, i block.Info, names []string, depth int, deep bool) blockNode {
	writeback := depth > 0 || d.Device.State().Writeback && !i.Cache.WriteThrough
	n := describe(nameAt(d, names, depth), i, depth > 0 || d.Node.ReadOnly(), writeback, deep)
	if depth == 0 {
		n.tellLimits(d.Root.Limits())
	}
	return n
}

func describe(name string, i block.Info, readOnly, writeback, deep bool) blockNode {
	n := blockNode{
		File: i.Filename, NodeName: &name, ReadOnly: readOnly, Driver: i.Format,
		DetectZeroes: detectOff, Image: image(i, deep),
		Cache: cacheInfo{Writeback: writeback, Direct: i.Cache.Direct, NoFlush: i.Cache.NoFlush},
	}
	if z := i.Rules.Zeroes; z != block.ZeroesOff {
		n.DetectZeroes = detectZeroes(z)
	}
	for b := i.Backing; b != nil; b = b.Backing {
		n.BackingFileDepth++
	}
	if i.Backing != nil {
		n.BackingFile = &i.Backing.Filename
	}
	return n
}

func image(i block.Info, deep bool) imageInfo {
	info := imageInfo{Filename: i.Filename, Format: i.Format, ActualSize: &i.ActualSize, VirtualSize: i.VirtualSize}
	if i.ClusterSize != 0 {
		info.ClusterSize = &i.ClusterSize
	}
	if b := i.Backing; b != nil {
		info.BackingFilename, info.BackingFilenameFormat = &b.Filename, &b.Format
		if deep {
			behind := image(*b, true)
			info.BackingImage = &behind
		}
	}
	return info
}

// queryBlockStats tells what the devices did, or with query-nodes what the
// nodes did: a disk's own node did the same.
func (mon *monitor) queryBlockStats(_ context.Context, _ *qmp.Session, a blockStatsArguments) (all []blockStats, _ error) {
	for _, d := range mon.m.Disks() {
		node, path := mon.topName(d), devicePath(d.ID)
		s := blockStats{NodeName: &node, Stats: deviceStats(d.Device)}
		if a.QueryNodes == nil || !*a.QueryNodes {
			s.Device, s.Qdev = &d.ID, &path
		}
		all = append(all, s)
	}
	return all, nil
}

// deviceStats counts as QEMU does: requests to write zeroes are writes,
// discards are unmaps.
func deviceStats(d *virtio.Blk) blockDeviceStats {
	s := d.Stats()
	return blockDeviceStats{
		ReadBytes: s.Read.Bytes, ReadOperations: s.Read.Ops, ReadTime: int64(s.Read.Time),
		FailedReads: s.Read.Failed, InvalidReads: s.Read.Invalid,
		WriteBytes:      s.Write.Bytes + s.WriteZeroes.Bytes,
		WriteOperations: s.Write.Ops + s.WriteZeroes.Ops,
		WriteTime:       int64(s.Write.Time + s.WriteZeroes.Time),
		FailedWrites:    s.Write.Failed + s.WriteZeroes.Failed,
		InvalidWrites:   s.Write.Invalid + s.WriteZeroes.Invalid,
		FlushOperations: s.Flush.Ops, FlushTime: int64(s.Flush.Time),
		FailedFlushes: s.Flush.Failed, InvalidFlushes: s.Flush.Invalid,
		UnmapBytes: s.Discard.Bytes, UnmapOperations: s.Discard.Ops, UnmapTime: int64(s.Discard.Time),
		FailedUnmaps: s.Discard.Failed, InvalidUnmaps: s.Discard.Invalid,
		AccountInvalid: true, AccountFailed: true,
		ReadLatency: histogram(d, virtio.LatencyRead), WriteLatency: histogram(d, virtio.LatencyWrite), FlushLatency: histogram(d, virtio.LatencyFlush),
	}
}
