package block

import (
	"errors"
	"testing"
)

// nested is a node whose info tells of another's.
type nested struct {
	Node
	below Node
}

func (n *nested) Info() Info {
	i := n.below.Info()
	return Info{Filename: "top", VirtualSize: 512, Backing: &i}
}
func (n *nested) Size() int64    { return 512 }
func (n *nested) ReadOnly() bool { return true }

// A failed node tells of what it stands for without asking it again: that may have
// come to lie on the failed node itself.
func TestFailed(t *testing.T) {
	lost := errors.New("lost")
	bottom := Failed(&nested{below: Failed(leaf{}, lost)}, lost)
	top := &nested{below: bottom}
	top.below = Failed(top, lost)
	info := top.Info()
	if info.Backing == nil || info.Backing.Filename != "top" || top.below.Size() != 512 || !top.below.ReadOnly() {
		t.Errorf("%+v", info)
	}
	if err := top.below.Readv(nil, 0); err != lost {
		t.Error(err)
	}
}

type leaf struct{ Node }

func (leaf) Info() Info     { return Info{Filename: "leaf"} }
func (leaf) ReadOnly() bool { return true }
