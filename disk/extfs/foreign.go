package extfs

import (
	"bytes"
	"errors"
	"fmt"
)

// ErrAmbiguous: there is an ext superblock, which something else that is there
// may have left standing.
var ErrAmbiguous = errors.New("more than an ext file system")

// foreign are the marks of what does not overwrite an ext superblock that was
// there before.
var foreign = []struct {
	name  string
	at    int64
	magic string
}{
	{"LUKS volume", 0, "LUKS\xba\xbe"},
	{"BitLocker volume", 3, "-FVE-FS-"},
	{"XFS", 0, "XFSB"},
	{"NTFS", 3, "NTFS    "},
	{"exFAT", 3, "EXFAT   "},
	{"FAT", 82, "FAT32   "},
	{"FAT", 54, "FAT1"},
	{"LVM volume", 0, "LABELONE"},
	{"LVM volume", 512, "LABELONE"},
	{"LVM volume", 1024, "LABELONE"},
	{"LVM volume", 1536, "LABELONE"},
	{"RAID member", 0, "\xfc\x4e\x2b\xa9"},
	{"RAID member", 4096, "\xfc\x4e\x2b\xa9"},
	{"bcache", 4096 + 24, "\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"},
	{"swap", 4096 - 10, "SWAPSPACE2"},
	{"swap", 65536 - 10, "SWAPSPACE2"},
	{"F2FS", 1024, "\x10\x20\xf5\xf2"},
	{"Btrfs", 65536 + 64, "_BHRfS_M"},
}

// checkForeign refuses an area that has such a mark. Where files of an ext file
// system look like one, their disk counts as used without need.
func checkForeign(a *area) error {
	buf := make([]byte, min(a.size, 65536+64+8))
	if err := a.read(buf, 0); err != nil {
		return err
	}
	for _, f := range foreign {
		if f.at < int64(len(buf)) && bytes.HasPrefix(buf[f.at:], []byte(f.magic)) {
			return fmt.Errorf("%w: the mark of %s at %d", ErrAmbiguous, f.name, a.base+f.at)
		}
	}
	return nil
}
