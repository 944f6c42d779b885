package block

import (
	"errors"
	"slices"
	"testing"
)

// order notes who hears of a request's end.
type order struct{ tags []int64 }

func (o *order) Ended(_ *Request, tag int64, err error) {
	if err != nil {
		tag = -tag
	}
	o.tags = append(o.tags, tag)
}

func TestRequestEnds(t *testing.T) {
	var o order
	var r Request
	for round := range 3 {
		for tag := range int64(5) {
			r.Enter(&o, tag+1)
		}
		r.Leave()
		r.End([]error{nil, errors.New("no")}[round%2])
	}
	if want := []int64{4, 3, 2, 1, -4, -3, -2, -1, 4, 3, 2, 1}; !slices.Equal(o.tags, want) {
		t.Errorf("heard %v, want %v", o.tags, want)
	}
	n := 0
	for r.Enter(&o, 0) {
		n++
	}
	if n != len(r.layers) {
		t.Errorf("room for %d", n)
	}
}

// starter is a Node that begins requests, or does not.
type starter struct {
	Node
	begins bool
	begun  []*Request
}

func (s *starter) Start(r *Request, as Node) bool {
	if as != Node(s) {
		return false
	}
	if s.begins {
		s.begun = append(s.begun, r)
	}
	return s.begins
}

// recorded is what a Recorder heard.
type recorded struct{ all [][2]int64 }

func (r *recorded) Record(off, n int64) { r.all = append(r.all, [2]int64{off, n}) }

func TestRootStarts(t *testing.T) {
	node, other := &starter{begins: true}, &starter{begins: true}
	root := NewRoot(node)
	var heard recorded
	root.SetRecorders([]Recorder{&heard})
	var o order
	r := Request{Write: true, Bufs: [][]byte{make([]byte, 10)}, Off: 5}
	r.Enter(&o, 1)
	if !Start(root, &r) || len(node.begun) != 1 || !slices.Equal(heard.all, [][2]int64{{5, 10}}) {
		t.Fatalf("begun %v, recorded %v", node.begun, heard.all)
	}
	// Who changes nodes waits for it, and nothing is begun meanwhile.
	swapped := make(chan struct{})
	go func() {
		defer close(swapped)
		root.Swap(other)
	}()
	late := Request{}
	for root.requests.TryRLock() { // until Swap waits
		root.requests.RUnlock()
	}
	if Start(root, &late) || late.count != 0 {
		t.Error("a request was begun while there must be none")
	}
	r.End(nil)
	<-swapped
	if !Start(root, &late) || len(other.begun) != 1 || !slices.Equal(o.tags, []int64{1}) {
		t.Errorf("begun %v, heard %v", other.begun, o.tags)
	}
	late.End(nil)
	// What is not begun leaves nothing behind.
	other.begins = false
	if Start(root, &late) || late.count != 0 || !root.requests.TryLock() {
		t.Error("a request that was not begun has not left")
	}
	root.requests.Unlock()
	other.begins = true
	if err := root.SetLimits(Limits{Ops: Limit{Rate: 1}}); err != nil {
		t.Fatal(err)
	}
	if Start(root, &late) {
		t.Error("a request was begun in spite of limits")
	}
	if Start(struct{ *starter }{other}, &late) || Start(struct{ *Root }{NewRoot(other)}, &late) {
		t.Error("a request was begun by what another node has embedded")
	}
	if Waits(root) || Start(other.Node, &late) {
		t.Error("a node that tells nothing waits, or begins requests")
	}
}
