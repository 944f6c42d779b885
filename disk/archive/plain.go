package archive

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/convert"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/disk/raw"
)

// plain keeps backups as sparse raw files, as long as the disk, with manifests that tell
// what they hold. The file of a full backup is the disk.
type plain struct{ *Archive }

// maxPlain is how many backups may lie one on another.
const maxPlain = 1000

var plainName = regexp.MustCompile(`^\.?[0-9]{6}-(full|changes)\.(raw|json)(\.part.*)?$`)

func (plain) owns(name string) bool { return plainName.MatchString(name) }

// stem begins the names of a step's files. A merged step has other files than before,
// so that the catalog alone tells which count.
func stem(s *Step) string {
	if s.Full {
		return fmt.Sprintf("%06d-full", s.Number)
	}
	return fmt.Sprintf("%06d-changes", s.Number)
}

func dataOf(s *Step) string     { return stem(s) + ".raw" }
func manifestOf(s *Step) string { return stem(s) + ".json" }

func (plain) names(s *Step) []string { return []string{dataOf(s), manifestOf(s)} }

// part is the data file itself.
func (plain) part(s *Step) (name, format string) { return dataOf(s) + part, FormatRaw }

func (a plain) begin(s *Step) error {
	if s.Size < 0 {
		return fmt.Errorf("a disk of %d bytes", s.Size)
	}
	if !s.Full && len(a.chain(len(a.catalog.Steps)-1)) >= maxPlain {
		return fmt.Errorf("%w: %d lie on one another", qcow2.ErrBacking, maxPlain)
	}
	name, _ := a.part(s)
	f, err := a.create(name, s.Size)
	if err != nil {
		return err
	}
	return f.Close()
}

// byName: a raw file does not tell zeroes that were written from what was not.
func (plain) byName(s *Step) bool { return s.Full }

func (a plain) target(s *Step) (block.Node, error) {
	name, _ := a.part(s)
	file, err := raw.Open(a.path(name), false)
	if err != nil {
		return nil, err
	}
	if s.Full {
		return file, nil
	}
	c, err := newChanged(file, s.Size)
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return c, nil
}

func (a plain) abandon(s *Step) {
	for _, name := range []string{dataOf(s) + part, manifestOf(s) + part} {
		os.Remove(a.path(name))
	}
}

// create makes a file, not what a link of its name leads to, that reads as zero.
func (a plain) create(name string, size int64) (*os.File, error) {
	f, err := os.OpenFile(a.path(name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	if err := f.Truncate(size); err != nil {
		return nil, errors.Join(err, f.Close(), os.Remove(a.path(name)))
	}
	return f, nil
}

// openFile opens a regular file of the directory to be read. No name leads out of it.
func (a *Archive) openFile(name string) (*os.File, error) {
	fd, err := unix.Openat(int(a.lock.Fd()), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), a.path(name))
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", name)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// finish writes the manifest: the data is where it is to be.
func (a plain) finish(s *Step, to block.Node) error {
	name, _ := a.part(s)
	src, err := raw.Open(a.path(name), true)
	if err != nil {
		return err
	}
	defer src.Close()
	f, err := os.OpenFile(a.path(name), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Size() != s.Size {
		return fmt.Errorf("%s is of a disk of %d bytes, not %d", name, info.Size(), s.Size)
	}
	c := collector{src: src, granule: granuleOf(s.Size, s.Full)}
	if !s.Full {
		given, err := newChanged(src, s.Size)
		if err != nil {
			return err
		}
		if was, ok := to.(*changed); ok { // else nothing has changed
			given.held = was.held
		}
		c.src, c.own = given, true
	}
	if err := c.collect(); err != nil {
		return err
	}
	return a.publish(s, f, c.extents)
}

// publish gives a step's files their names when they are durable. They count when the
// catalog names them.
func (a plain) publish(s *Step, data *os.File, extents []extent) error {
	m := &manifest{directory: a.ID(), number: s.Number, time: s.Time, completed: time.Now(), size: s.Size, data: dataOf(s), extents: extents}
	if !s.Full {
		m.base = a.Last().Number
	}
	for i := range extents {
		if !extents[i].zero {
			m.bytes += extents[i].length
		}
	}
	f, err := a.create(manifestOf(s)+part, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	sum := sha256.New()
	if err := m.write(io.MultiWriter(f, sum)); err != nil {
		return err
	}
	for _, f := range []*os.File{data, f} {
		if err := errors.Join(f.Chmod(0o400), f.Sync()); err != nil { // nobody writes to them any more
			return err
		}
	}
	if err := os.Rename(a.path(dataOf(s)+part), a.path(dataOf(s))); err != nil {
		return err
	}
	s.SHA256, s.Bytes = hex.EncodeToString(sum.Sum(nil)), m.bytes
	return a.rename(a.path(manifestOf(s)+part), a.path(manifestOf(s)))
}

// manifest reads that of the step with an index, and tells whether it is the one that was
// made for it.
func (a plain) manifest(i int) (*manifest, error) {
	s := &a.catalog.Steps[i]
	f, err := a.openFile(manifestOf(s))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	sum := sha256.New()
	m, err := readManifest(io.TeeReader(f, sum))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", manifestOf(s), err)
	}
	base := 0
	if !s.Full {
		base = a.catalog.Steps[i-1].Number
	}
	switch {
	case hex.EncodeToString(sum.Sum(nil)) != s.SHA256:
		return nil, fmt.Errorf("%s is not as it was when it was made: its checksum is another", manifestOf(s))
	case m.directory != a.ID() || m.number != s.Number || m.size != s.Size || m.data != dataOf(s):
		return nil, fmt.Errorf("%s is that of another backup", manifestOf(s))
	case m.base != base:
		return nil, fmt.Errorf("%s: the backup lies on backup %d, not on %d", manifestOf(s), m.base, base)
	}
	return m, nil
}

// openData opens the data file of a step, which must be as long as the disk.
func (a plain) openData(s *Step) (*os.File, error) {
	f, err := a.openFile(dataOf(s))
	if err != nil {
		return nil, err
	}
	if info, err := f.Stat(); err != nil || info.Size() != s.Size {
		return nil, errors.Join(fmt.Errorf("%s does not have the disk's %d bytes", dataOf(s), s.Size), err, f.Close())
	}
	return f, nil
}

func (a plain) verify(ctx context.Context, i int) error {
	m, err := a.manifest(i)
	if err != nil {
		return err
	}
	s := &a.catalog.Steps[i]
	f, err := a.openData(s)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := m.verify(ctx, f); err != nil {
		return fmt.Errorf("%s is not as it was when it was made: %w", dataOf(s), err)
	}
	return nil
}

func (a plain) open(i int) (block.Node, error) {
	n, err := a.openChain(i)
	if err != nil {
		return nil, err
	}
	return n, nil
}

func (a plain) merge(ctx context.Context, i int, progress func(done, total int64)) (err error) {
	src, err := a.openChain(i)
	if err != nil {
		return err
	}
	defer src.Close()
	old := a.catalog.Steps[i]
	full := old
	full.Full = true
	defer func() {
		if err != nil {
			a.abandon(&full)
		}
	}()
	f, err := a.create(dataOf(&full)+part, full.Size)
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	dst, err := raw.Open(a.path(dataOf(&full)+part), false)
	if err != nil {
		return err
	}
	err = convert.Copy(ctx, dst, src, convert.Options{TargetIsZero: true, Progress: progress})
	if err = errors.Join(err, dst.Close()); err != nil {
		return err
	}
	if err := a.finish(&full, nil); err != nil {
		return err
	}
	a.catalog.Steps[i] = full
	if err := a.save(); err != nil {
		a.catalog.Steps[i] = old
		return err
	}
	for _, name := range a.names(&old) {
		err = errors.Join(err, os.Remove(a.path(name)))
	}
	return err
}

func (plain) recover() error { return nil } // the catalog tells which of a step's files count
