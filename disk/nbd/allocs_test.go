//go:build !race

// The race detector makes pools forget what they hold.

package nbd

import "testing"

func TestNothingIsAllocated(t *testing.T) {
	n, _ := openRaw(t, 1<<20)
	_, address := serve(t, ServerOptions{}, Export{Name: "a", Node: n})
	c := use(t, address, "a", ClientOptions{})
	bufs := [][]byte{make([]byte, 4096)}
	for name, f := range map[string]func() error{
		"read":  func() error { return c.Readv(bufs, 8192) },
		"write": func() error { return c.Writev(bufs, 8192) },
		"flush": c.Flush,
	} {
		allocs := testing.AllocsPerRun(500, func() { // in client and server
			if err := f(); err != nil {
				t.Fatal(err)
			}
		})
		if allocs != 0 {
			t.Errorf("%s: %v allocations", name, allocs)
		}
	}
}
