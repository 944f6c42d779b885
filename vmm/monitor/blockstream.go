package monitor

import (
	"context"
	"errors"
	"slices"
	"syscall"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/disk/stream"
	"github.com/gnomon-vmm/gnomon/qmp"
	"github.com/gnomon-vmm/gnomon/vmm"
)

// onError is BlockdevOnError of QEMU's qapi/block-core.json, as far as jobs have it.
type onError string

const (
	onErrorReport onError = "report"
	onErrorIgnore onError = "ignore"
	onErrorStop   onError = "stop"
	onErrorNoRoom onError = "enospc"
)

func (onError) Values() []string {
	return []string{string(onErrorReport), string(onErrorIgnore), string(onErrorNoRoom), string(onErrorStop)}
}

type (
	streamArguments struct {
		jobArguments
		Device      string   `qmp:"device"`
		Base        *string  `qmp:"base"`
		BaseNode    *string  `qmp:"base-node"`
		BackingFile *string  `qmp:"backing-file"`
		OnError     *onError `qmp:"on-error"`
	}
	// blockJobError is the data of BLOCK_JOB_ERROR.
	blockJobError struct {
		Device    string      `qmp:"device"`
		Operation ioOperation `qmp:"operation"`
		Action    errorAction `qmp:"action"`
	}
)

func (mon *monitor) registerStream(reg *qmp.Registry) {
	qmp.RegisterEvent[blockJobError](reg, "BLOCK_JOB_ERROR")
	transactional(mon, reg, "block-stream", mon.blockStream)
}

// blockStream has a disk's newest image come to hold what those behind it hold, up
// to the base, and lie on that then.
func (mon *monitor) blockStream(s *qmp.Session, a streamArguments) (*change, error) {
	d, err := mon.findDisk(&a.Device, nil)
	if err != nil {
		return nil, err
	}
	o := stream.Options{}
	if a.Base != nil || a.BaseNode != nil {
		if o.Depth, err = mon.chainDepth(d, a.BaseNode, a.Base); err != nil {
			return nil, err
		}
		if o.Depth <= 1 {
			return nil, qmp.Errorf("nothing lies between the disk's newest image and the base")
		}
	}
	if a.BackingFile != nil {
		if o.Depth == 0 {
			return nil, qmp.Errorf("backing file specified, but streaming the entire chain")
		}
		o.BackingFile = *a.BackingFile
	}
	w, err := mon.newBlockWork(s, jobStream, d, a.options(), false)
	if err != nil {
		return nil, err
	}
	if a.OnError != nil {
		w.onError = *a.OnError
	}
	o.Progress, o.Pause, o.OnError = w.progress, w.pace, w.failed
	var f *stream.Filter
	w.install = func(current block.Node) (_ block.Node, err error) {
		top, ok := current.(*qcow2.Node)
		if !ok {
			return nil, qmp.Errorf("a disk of format %s has no backing file to stream from", current.Info().Format)
		}
		f, err = stream.New(top, o)
		return f, err
	}
	w.uninstall = func(block.Node) block.Node { return f.Node }
	w.work = func(ctx context.Context) error {
		err := f.Run(ctx)
		if err == nil && w.ignored != nil {
			err = w.ignored // so the images behind are needed still
		}
		if err == nil {
			err = f.Node.Flush() // most of it, while the disk is used
		}
		return err
	}
	w.finish = func() (err error) {
		mon.refresh()
		names := mon.namedChain(d)
		var gone block.Node
		d.Root.Drained(func(filter block.Node) block.Node {
			if gone, err = f.Finish(); err != nil {
				return filter
			}
			return f.Node
		})
		if err != nil {
			return err
		}
		mon.unlink(d, names, 1, o.Depth)
		_ = mon.letGo(gone) // which was only read: the disk does without, whatever closing it says
		return nil
	}
	return w.change(), nil
}

// unlink notes that the images of a disk's chain from depth top on have gone, and
// those above them lie on the one at depth base, or, with 0, on none.
func (mon *monitor) unlink(d vmm.AttachedDisk, names []*graphNode, top, base int) {
	at := func(depth int) *graphNode {
		if depth >= 0 && depth < len(names) {
			return names[depth]
		}
		return nil
	}
	mon.graph.mu.Lock()
	if last := at(base - 1); base > top && last != nil {
		last.under = nil
	}
	if above := at(top - 1); above != nil {
		above.under = nil
		if base > 0 {
			above.under = at(base)
		}
	}
	mon.graph.mu.Unlock()
	stay := slices.Clone(names[:min(top, len(names))])
	if base > 0 && base < len(names) {
		stay = append(stay, names[base:]...)
	}
	mon.rename(d, stay)
}

// failed decides by the job's policy what becomes of a step that failed: with nil it
// is made again, or left out.
func (w *blockWork) failed(err error, reading bool) error {
	policy := w.onError
	status := deviceIOStatus("failed")
	if errors.Is(err, syscall.ENOSPC) {
		status = "nospace"
	}
	if policy == onErrorNoRoom {
		policy = onErrorReport
		if status == "nospace" {
			policy = onErrorStop
		}
	}
	e := blockJobError{Device: w.id, Operation: "write", Action: "report"}
	if reading {
		e.Operation = "read"
	}
	switch policy {
	case onErrorStop:
		e.Action = "stop"
	case onErrorIgnore:
		e.Action = "ignore"
	}
	w.mon.emit("BLOCK_JOB_ERROR", e)
	switch policy {
	case onErrorStop:
		w.mu.Lock()
		w.status = status
		w.mu.Unlock()
		if err := w.job.Pause(); err != nil {
			return err
		}
		if err := w.pace(); err != nil { // until it is resumed
			return err
		}
		w.mu.Lock()
		w.status = "ok"
		w.mu.Unlock()
		return nil
	case onErrorIgnore:
		if w.ignored == nil {
			w.ignored = err
		}
		return stream.ErrSkip
	}
	return err
}
