package owner

import (
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// host is what can be known of other owners from here.
type host struct {
	boot [16]byte // changes with each start of the kernel; containers share it
	// shared tells whether other hosts may have the directory too.
	shared func(path string) bool
}

var thisHost = host{boot: bootID(), shared: sharedFileSystem}

func bootID() (id [16]byte) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err == nil {
		hex.Decode(id[:], []byte(strings.ReplaceAll(strings.TrimSpace(string(b)), "-", "")))
	}
	return id // zeros, without /proc: then nobody is taken to be of this host
}

// reaches tells whether a lock of the owner of r, if it still ran, would be seen
// here. On a file system that only one kernel can have, an owner of
// another boot ended when the kernel did.
func (h host) reaches(r *Record, disk string) bool {
	return !h.shared(disk) || h.boot != [16]byte{} && r.Boot == h.boot
}

// sharedFileSystem tells whether a file may be in use by other kernels. All
// file systems that are not known to belong to one are taken to be shared.
func sharedFileSystem(path string) bool {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return true
	}
	switch uint32(st.Type) {
	case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, unix.F2FS_SUPER_MAGIC, unix.TMPFS_MAGIC:
		return false
	}
	return true
}

func sysStat(i fs.FileInfo) (*syscall.Stat_t, bool) {
	st, ok := i.Sys().(*syscall.Stat_t)
	return st, ok
}

func describeHost() string {
	name, err := os.Hostname()
	if err != nil {
		name = "unknown host"
	}
	return fmt.Sprintf("pid %d on %s", os.Getpid(), name)
}
