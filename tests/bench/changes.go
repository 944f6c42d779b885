package main

import (
	"fmt"
	"path/filepath"
)

// recording measures writes of a disk whose changes are recorded beside those of one
// whose are not.
func (b *bench) recording() experiment {
	loads := []load{
		{"recording1", "4 KiB random write, 1 in flight", "1/s", "op=randwrite bs=4k qd=1 data=same"},
		{"recording32", "4 KiB random write, 32 in flight", "1/s", "op=randwrite bs=4k qd=32 data=same"},
	}
	side := func(flags string) opener {
		return diskSide(func(img image) vmm {
			return b.ours(64, "--disk", "file="+img.path+flags, "--net", "none")
		}, b.awhile, func(place int) (image, error) {
			img := image{filepath.Join(b.dir, fmt.Sprintf("recorded%d.img", place)), "raw", 256 * mib}
			return img, img.make()
		})
	}
	e := experiment{
		name: "recording of changes",
		schedule: &turns{count: b.pick(8, 4), loads: loads, sides: []contestant{
			{"gnomon changes=on", side(",changes=on")},
			{"gnomon", side("")},
		}},
	}
	e.promise(loads, 0.98)
	return e
}
