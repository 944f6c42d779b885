package iovec

import (
	"math"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

func TestAppend(t *testing.T) {
	p := []byte("abcdefghij")
	bufs := [][]byte{p[:3], nil, p[3:5], p[5:]}
	text := func(list []unix.Iovec) (s []string) {
		for _, v := range list {
			s = append(s, string(unsafe.Slice(v.Base, v.Len)))
		}
		return s
	}
	for _, tt := range []struct {
		skip, limit int
		want        []string
	}{
		{0, math.MaxInt, []string{"abc", "de", "fghij"}},
		{2, math.MaxInt, []string{"c", "de", "fghij"}},
		{3, math.MaxInt, []string{"de", "fghij"}},
		{1, 5, []string{"bc", "de", "f"}},
		{0, 3, []string{"abc"}},
		{0, 0, nil},
	} {
		got := text(Append(nil, bufs, tt.skip, tt.limit))
		if len(got) != len(tt.want) {
			t.Errorf("behind %d, %d bytes: %q", tt.skip, tt.limit, got)
			continue
		}
		for i := range got {
			if got[i] != tt.want[i] {
				t.Errorf("behind %d, %d bytes: %q", tt.skip, tt.limit, got)
			}
		}
	}
	many := make([][]byte, 2*Max)
	for i := range many {
		many[i] = p[:i%2] // every other is empty
	}
	if n := len(Append(make([]unix.Iovec, 1), many, 0, math.MaxInt)); n != Max {
		t.Errorf("a list of %d", n)
	}
}

func TestRest(t *testing.T) {
	bufs := [][]byte{make([]byte, 3), nil, make([]byte, 2)}
	for n, want := range [][2]int{{3, 0}, {3, 1}, {3, 2}, {1, 0}, {1, 1}, {0, 0}} {
		if rest, skip := Rest(bufs, n); len(rest) != want[0] || skip != want[1] {
			t.Errorf("%d bytes done: %d buffers are left, of the first %d bytes", n, len(rest), skip)
		}
	}
}
