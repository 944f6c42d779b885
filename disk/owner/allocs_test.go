//go:build !race

// The race detector makes pools forget what they hold.

package owner

import "testing"

func TestNoAllocations(t *testing.T) {
	d := open(t, newImage(t), Options{})
	for name, f := range map[string]func(){
		"read":  func() { d.Readv(someBytes, 0) },
		"write": func() { d.Writev(someBytes, 0) },
		"check": func() { d.check() },
	} {
		if a := testing.AllocsPerRun(1000, f); a >= 1 {
			t.Errorf("%s allocates %v times", name, a)
		}
	}
}

func BenchmarkCheck(b *testing.B) {
	path := newImage(b)
	d, err := Open(b.Context(), path, openRaw(path), Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer d.Close()
	for b.Loop() {
		if _, err := d.enter(); d.leave(err) != nil {
			b.Fatal("not owned")
		}
	}
}
