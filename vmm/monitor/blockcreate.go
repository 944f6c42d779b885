package monitor

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/disk/raw"
	"github.com/gnomon-vmm/gnomon/qmp"
)

// createDriver, qcow2Version and compressionType are BlockdevDriver, as far as
// images can be made, BlockdevQcow2Version and Qcow2CompressionType of QEMU's
// qapi/block-core.json.
type (
	createDriver    string
	qcow2Version    string
	compressionType string
)

func (createDriver) Values() []string    { return []string{"file", "qcow2"} }
func (qcow2Version) Values() []string    { return []string{"v2", "v3"} }
func (compressionType) Values() []string { return []string{"zlib", "zstd"} }

type (
	createArguments struct {
		JobID   string        `qmp:"job-id"`
		Options createOptions `qmp:"options"`
	}
	createOptions struct {
		Driver createDriver  `qmp:"driver,tag"`
		File   *createFile   `qmp:"file,variant"`
		Qcow2  *createFormat `qmp:"qcow2,variant"`
	}
	createFile struct {
		Filename string `qmp:"filename"`
		Size     uint64 `qmp:"size"`
	}
	createFormat struct {
		File          blockdevRef      `qmp:"file"`
		Size          uint64           `qmp:"size"`
		Version       *qcow2Version    `qmp:"version"`
		BackingFile   *string          `qmp:"backing-file"`
		BackingFormat *blockdevDriver  `qmp:"backing-fmt"`
		ClusterSize   *uint64          `qmp:"cluster-size"`
		LazyRefcounts *bool            `qmp:"lazy-refcounts"`
		RefcountBits  *int64           `qmp:"refcount-bits"`
		Compression   *compressionType `qmp:"compression-type"`
	}
)

func (mon *monitor) registerCreate(reg *qmp.Registry) {
	qmp.Register(reg, "blockdev-create", mon.blockdevCreate)
}

// blockdevCreate makes a file, or an empty image in a file that is a node, by a job
// that stays until it is dismissed.
func (mon *monitor) blockdevCreate(_ context.Context, s *qmp.Session, a createArguments) (e qmp.Empty, err error) {
	work := func() error { return nil }
	drop := func() {}
	switch {
	case a.Options.File != nil:
		o := a.Options.File
		if o.Size > 1<<62 {
			return e, qmp.Errorf("Image size is too large")
		}
		work = func() error { return createRaw(o.Filename, int64(o.Size)) }
	default:
		o := a.Options.Qcow2
		format, err := o.options()
		if err != nil {
			return e, err
		}
		if o.File.Reference == nil {
			return e, qmp.Errorf("'file' must name a node that was added")
		}
		by := "job: create " + a.JobID
		node, err := mon.take(*o.File.Reference, by)
		if err != nil {
			return e, err
		}
		drop = func() { mon.drop(node, by) }
		file, ok := node.node.(*raw.Node)
		if !ok || node.readOnly {
			drop()
			return e, qmp.Errorf("an image can be made in a file that can be written, and '%s' is none", node.name)
		}
		work = func() error { return formatFile(file, format) }
	}
	_, err = s.Server().Jobs().Start(a.JobID, "create", qmp.JobOptions{ManualDismiss: true, Commit: drop, Abort: drop},
		func(_ context.Context, j *qmp.Job) error {
			j.SetProgress(0, 1)
			if err := work(); err != nil {
				return err
			}
			j.SetProgress(1, 1)
			return nil
		})
	if err != nil {
		drop()
	}
	return e, err
}

func (f *createFormat) options() (o qcow2.CreateOptions, err error) {
	if f.Size == 0 || f.Size%512 != 0 || f.Size > 1<<62 {
		return o, qmp.Errorf("Image size must be a multiple of 512 bytes")
	}
	o.Size = int64(f.Size)
	if f.Version != nil && *f.Version == "v2" {
		o.Version = 2
	}
	if f.BackingFile != nil {
		if f.BackingFormat == nil {
			return o, qmp.Errorf("'backing-fmt' is missing: the image must say which format its backing file has")
		}
		o.Backing, o.BackingFormat = *f.BackingFile, string(*f.BackingFormat)
	}
	if f.ClusterSize != nil {
		if *f.ClusterSize < 512 || *f.ClusterSize > 2<<20 {
			return o, qmp.Errorf("Cluster size must be a power of two between 512 and 2048k")
		}
		o.ClusterSize = int64(*f.ClusterSize)
	}
	if f.RefcountBits != nil {
		if *f.RefcountBits < 1 || *f.RefcountBits > 64 {
			return o, qmp.Errorf("Refcount width must be a power of two and may not exceed 64 bits")
		}
		o.RefcountBits = int(*f.RefcountBits)
	}
	o.LazyRefcounts = f.LazyRefcounts != nil && *f.LazyRefcounts
	if f.Compression != nil && *f.Compression == "zstd" {
		o.Compression = qcow2.Zstd
	}
	return o, nil
}

// createRaw makes a file of zeroes, as QEMU does also in the place of another.
func createRaw(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	f.Close()
	n, err := raw.Open(path, false) // which nobody else has open then
	if err != nil {
		return err
	}
	return errors.Join(n.Resize(0), n.Resize(size), n.Close())
}

// formatFile puts an empty image in a file.
func formatFile(file *raw.Node, o qcow2.CreateOptions) error {
	// The name is relative to where the image is to be, not to where it is made.
	if err := qcow2.RoomBelow(file.Info().Filename, o.Backing, o.BackingFormat); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "gnomon-create-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	path := dir + "/image"
	if err := qcow2.Create(path, o); err != nil {
		return err
	}
	image, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := errors.Join(file.Resize(0), file.Resize(int64(len(image)))); err != nil {
		return fmt.Errorf("make room for the image: %w", err)
	}
	if err := file.Writev([][]byte{image}, 0); err != nil {
		return err
	}
	return file.Flush()
}
