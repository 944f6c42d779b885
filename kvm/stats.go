package kvm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// ErrStats means that the kernel's statistics could not be read or understood.
var ErrStats = errors.New("KVM statistics")

// StatType tells how a statistic behaves.
type StatType uint8

// The types of statistics.
const (
	StatCumulative      StatType = iota // only grows
	StatInstant                         // a value that goes up and down
	StatPeak                            // the highest value so far
	StatLinearHistogram                 // Values are buckets of BucketSize each
	StatLogHistogram                    // Values are buckets [0,1), [1,2), [2,4), [4,8), ...
)

// String returns the name that QMP's query-stats-schemas uses.
func (t StatType) String() string {
	names := [...]string{"cumulative", "instant", "peak", "linear-histogram", "log2-histogram"}
	if int(t) < len(names) {
		return names[t]
	}
	return "unknown"
}

// StatUnit is what a statistic counts.
type StatUnit uint8

// The units of statistics.
const (
	StatNoUnit StatUnit = iota
	StatBytes
	StatSeconds
	StatCycles
	StatBoolean
)

// String returns the name that QMP's query-stats-schemas uses, empty for none.
func (u StatUnit) String() string {
	names := [...]string{"", "bytes", "seconds", "cycles", "boolean"}
	if int(u) < len(names) {
		return names[u]
	}
	return "unknown"
}

// A Stat is one statistic: each of Value counts in units of Base to the power
// of Exponent.
type Stat struct {
	Name       string
	Type       StatType
	Unit       StatUnit
	Base       uint8 // 10 or 2
	Exponent   int16
	BucketSize uint32 // of a linear histogram
	Value      []uint64
}

type (
	// statsHeader is struct kvm_stats_header.
	statsHeader struct {
		Flags, NameSize, Count, IDOffset, DescOffset, DataOffset uint32
	}
	// statsDesc is struct kvm_stats_desc without the name that follows it.
	statsDesc struct {
		Flags      uint32
		Exponent   int16
		Size       uint16
		Offset     uint32
		BucketSize uint32
	}
)

// readStats reads the statistics of a VM's or a VCPU's descriptor (api.rst
// 4.133, KVM_GET_STATS_FD).
func readStats(owner int) ([]Stat, error) {
	fd, errno := ioctl(owner, nrGetStatsFD, 0)
	if errno != 0 {
		return nil, fmt.Errorf("%w: KVM_GET_STATS_FD: %w", ErrStats, errno)
	}
	defer unix.Close(fd)
	// The kernel presents one sealed piece of some kilobytes.
	var all []byte
	for chunk := make([]byte, 16<<10); ; {
		n, err := unix.Pread(fd, chunk, int64(len(all)))
		switch {
		case err == unix.EINTR:
		case err != nil:
			return nil, fmt.Errorf("%w: read: %w", ErrStats, err)
		case n == 0 || len(all) > maxStatsSize:
			return parseStats(all)
		default:
			all = append(all, chunk[:n]...)
		}
	}
}

const maxStatsSize = 1 << 20

// parseStats understands what a statistics descriptor reads as.
func parseStats(all []byte) ([]Stat, error) {
	var header statsHeader
	if _, err := binary.Decode(all, binary.NativeEndian, &header); err != nil {
		return nil, fmt.Errorf("%w: header: %w", ErrStats, err)
	}
	var stats []Stat
	room := len(all) // for values: they do not overlap
	descSize := uint64(binary.Size(statsDesc{})) + uint64(header.NameSize)
	for i := uint64(0); i < uint64(header.Count); i++ {
		raw, ok := slice(all, uint64(header.DescOffset)+i*descSize, descSize)
		var desc statsDesc
		n, err := binary.Decode(raw, binary.NativeEndian, &desc)
		if !ok || err != nil {
			return nil, fmt.Errorf("%w: descriptor %d of %d lies outside", ErrStats, i, header.Count)
		}
		name, _, _ := bytes.Cut(raw[n:], []byte{0})
		values, ok := slice(all, uint64(header.DataOffset)+uint64(desc.Offset), 8*uint64(desc.Size))
		if room -= len(values); !ok || room < 0 {
			return nil, fmt.Errorf("%w: values of %q lie outside", ErrStats, name)
		}
		stat := Stat{
			Name:       string(name),
			Type:       StatType(desc.Flags & 0xf),
			Unit:       StatUnit(desc.Flags >> 4 & 0xf),
			Base:       10,
			Exponent:   desc.Exponent,
			BucketSize: desc.BucketSize,
			Value:      make([]uint64, desc.Size),
		}
		if desc.Flags>>8&0xf == 1 {
			stat.Base = 2
		}
		for j := range stat.Value {
			stat.Value[j] = binary.NativeEndian.Uint64(values[8*j:])
		}
		stats = append(stats, stat)
	}
	return stats, nil
}

// slice returns b[offset:offset+length] if it is there.
func slice(b []byte, offset, length uint64) ([]byte, bool) {
	if offset > uint64(len(b)) || length > uint64(len(b))-offset {
		return nil, false
	}
	return b[offset : offset+length], true
}
