package changes

import (
	"crypto/sha256"
	"fmt"
	"io"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// clockTick is more than the time stamps of files are apart (CONFIG_HZ=100).
const clockTick = 10 * time.Millisecond

// diskIdentity is what tells a disk from others, and whether it was written by others.
type diskIdentity struct {
	identity [32]byte // zeros: it cannot be told from others
	stamp    [32]byte // zeros: its files do not tell when they changed
	changed  time.Time
}

// identify looks at the files of a disk, which need not be open.
func identify(n block.Node) diskIdentity {
	var d diskIdentity
	info := n.Info()
	identity, stamps := sha256.New(), sha256.New()
	for i := &info; i != nil; i = i.Backing {
		var st unix.Statx_t
		err := unix.Statx(unix.AT_FDCWD, i.Filename, 0, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &st)
		if err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
			return diskIdentity{} // a device's time stamps do not tell of writes
		}
		// Not the file system's device: its number may be another after the host's
		// next start.
		fmt.Fprintf(identity, "%d %d.%d\n", st.Ino, st.Btime.Sec, st.Btime.Nsec)
		// The change time moves with any write and cannot be set back.
		fmt.Fprintf(stamps, "%d %d.%d %d.%d\n", st.Size, st.Mtime.Sec, st.Mtime.Nsec, st.Ctime.Sec, st.Ctime.Nsec)
		if t := time.Unix(st.Ctime.Sec, int64(st.Ctime.Nsec)); t.After(d.changed) {
			d.changed = t
		}
	}
	d.identity, d.stamp = [32]byte(identity.Sum(nil)), [32]byte(stamps.Sum(nil))
	return d
}

// settle waits until a write to the disk by anybody would change its stamp.
func (d diskIdentity) settle() {
	if since := time.Since(d.changed); since >= 0 && since < clockTick {
		time.Sleep(clockTick - since)
	}
}

// readAll reads up to len(b) bytes; what is missing stays as it is.
func readAll(r io.ReaderAt, b []byte, off int64) (int, error) {
	n, err := r.ReadAt(b, off)
	if err == io.EOF {
		err = nil
	}
	return n, err
}
