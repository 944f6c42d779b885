package qcow2_test

import (
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/disk/stream"
)

func init() {
	qcow2.NewStream = func(top *qcow2.Node, depth int, backingFile string, pause func() error) (qcow2.Streaming, error) {
		f, err := stream.New(top, stream.Options{Depth: depth, BackingFile: backingFile, Pause: pause})
		if err != nil {
			return nil, err
		}
		return f, nil
	}
}
