// Package archive keeps the backups of a disk in a directory: qcow2 images or raw files,
// each of which lies on the one before it or on none. A catalog names them with their
// checksums; what it does not name is not there. So whatever is killed in between
// leaves all backups as they were.
//
// docs/backup-format.md describes the files.
package archive

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/disk"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/changes"
)

// Errors of archives.
var (
	ErrArchive = errors.New("backup directory")
	// ErrDamaged is a backup that is not what it was when it was made.
	ErrDamaged = errors.New("damaged backup")
	// ErrNoStep is a backup that is not there.
	ErrNoStep = errors.New("no such backup")
	// ErrFormat is a format that there is none of, or that the directory does not have.
	ErrFormat = errors.New("format of backups")
)

// Formats of backups: qcow2 images, or raw files that need no program to be read.
const (
	FormatQcow2 = disk.FormatQcow2
	FormatRaw   = disk.FormatRaw
)

const (
	catalogName = "backups.json"
	maxCatalog  = 64 << 20
	maxNumber   = 999999
	part        = ".part" // a file that is not a backup's yet
)

// versions of the catalog: a program that knows one format only refuses the other.
var versions = map[string]int{FormatQcow2: 1, FormatRaw: 2}

// Step is one backup.
type Step struct {
	Number int       `json:"number"`
	Time   time.Time `json:"time"` // the instant of which it is
	Full   bool      `json:"full"` // it lies on no other
	Size   int64     `json:"size"` // of the disk, bytes
	Bytes  int64     `json:"bytes"`
	SHA256 string    `json:"sha256"` // of its image or, of raw files, of its manifest
	// Point is the instant in the recording of the disk's changes, if there is one.
	Point *changes.Point `json:"point,omitempty"`
	// Bitmap is the name of the machine's dirty bitmap with what changed since, or "".
	Bitmap string `json:"bitmap,omitempty"`
	// Merged is the checksum of the whole image that is about to take its file's
	// place, or "".
	Merged string `json:"merged,omitempty"`
}

// catalog is what is in backups.json.
type catalog struct {
	Version int    `json:"version"`
	ID      string `json:"id"`
	Format  string `json:"format,omitempty"` // "": FormatQcow2
	Steps   []Step `json:"steps"`            // ascending
}

// files are how the backups of a directory are kept.
type files interface {
	// names are those of a step's files; the first has its data.
	names(s *Step) []string
	// owns tells of a name whether a file of a backup, or of one that is being made, may
	// have it.
	owns(name string) bool
	// begin makes the empty image that a step's disk is to be copied to, at part of it.
	begin(s *Step) error
	// part is that image, and its format.
	part(s *Step) (name, format string)
	// target opens that image to be written; byName tells that whoever opens it by its
	// name writes it as well.
	target(s *Step) (n block.Node, err error)
	byName(s *Step) bool
	// finish makes the step's files of it, durable, and notes their size and checksum.
	// to is what target returned, which has been closed, if it was called.
	finish(s *Step, to block.Node) error
	// abandon removes what there is of a step that is not finished.
	abandon(s *Step)
	// verify reads all of the files of the step with an index.
	verify(ctx context.Context, i int) error
	// open opens what the disk was at the step with an index.
	open(i int) (block.Node, error)
	// merge has the step with an index lie on no other, and the catalog say so.
	merge(ctx context.Context, i int, progress func(done, total int64)) error
	// recover completes or undoes a merge that was interrupted.
	recover() error
}

// Archive is a directory that is in use. Nobody else uses it meanwhile. Its methods
// are called one at a time.
type Archive struct {
	dir     string
	lock    *os.File
	catalog catalog
	files   files
}

// Open opens the archive in a directory.
func Open(dir string) (*Archive, error) {
	a, err := open(dir, "", false)
	if err != nil {
		return nil, fmt.Errorf("%w %s: %w", ErrArchive, dir, err)
	}
	return a, nil
}

// Create opens the archive in a directory, which may not be there yet, or be empty. Its
// format is the given one; with "" it is the one that it has, or FormatQcow2.
func Create(dir, format string) (*Archive, error) {
	a, err := open(dir, format, true)
	if err != nil {
		return nil, fmt.Errorf("%w %s: %w", ErrArchive, dir, err)
	}
	return a, nil
}

func open(dir, format string, create bool) (_ *Archive, err error) {
	if _, ok := versions[format]; !ok && format != "" {
		return nil, fmt.Errorf("%w: %q: %s and %s are possible", ErrFormat, format, FormatQcow2, FormatRaw)
	}
	if create {
		if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
	}
	a := &Archive{dir: dir}
	if a.lock, err = os.Open(dir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			a.lock.Close()
		}
	}()
	if err := unix.Flock(int(a.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == unix.EWOULDBLOCK {
		return nil, errors.New("another command is using it: wait until that has ended")
	} else if err != nil {
		return nil, err
	}
	names, err := a.lock.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	b, err := readCatalog(a.path(catalogName))
	switch {
	case errors.Is(err, fs.ErrNotExist) && create && len(names) == 0:
		var id [8]byte
		if _, err := rand.Read(id[:]); err != nil {
			return nil, err
		}
		if a.catalog = (catalog{ID: hex.EncodeToString(id[:])}); format == FormatRaw {
			a.catalog.Format = format
		}
		a.use()
		return a, a.save()
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("it has no %s: it is not one", catalogName)
	case err != nil:
		return nil, err
	}
	if err := a.catalog.decode(b); err != nil {
		return nil, err
	}
	a.use()
	if have := a.Format(); format != "" && format != have {
		return nil, fmt.Errorf("%w: its backups are kept as %s: leave the format out, or choose another directory", ErrFormat, have)
	}
	return a, a.recover(names)
}

// use has the archive keep its files in the format of its catalog.
func (a *Archive) use() {
	a.catalog.Version = versions[a.Format()]
	a.files = images{a}
	if a.Format() == FormatRaw {
		a.files = plain{a}
	}
}

func readCatalog(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxCatalog+1))
	if err == nil && len(b) > maxCatalog {
		err = errors.New("the catalog is too large")
	}
	return b, err
}

func (c *catalog) decode(b []byte) error {
	if err := json.Unmarshal(b, c); err != nil {
		return fmt.Errorf("%s: %w", catalogName, err)
	}
	switch {
	case c.Version != 1 && c.Version != 2:
		return fmt.Errorf("%s: version %d: this program knows versions 1 and 2", catalogName, c.Version)
	case c.Version == 1 && c.Format != "" || c.Version == 2 && c.Format != FormatRaw:
		return fmt.Errorf("%s: version %d: %w %q", catalogName, c.Version, ErrFormat, c.Format)
	}
	if len(c.ID) != 16 {
		return fmt.Errorf("%s: id %q", catalogName, c.ID)
	}
	last := 0
	for i, s := range c.Steps {
		if s.Number <= last || s.Number > maxNumber || s.Size < 0 || i == 0 && !s.Full {
			return fmt.Errorf("%s: backup %d of %d bytes after backup %d", catalogName, s.Number, s.Size, last)
		}
		if c.Format == FormatRaw && (s.Merged != "" || !s.Full && s.Size != c.Steps[i-1].Size) {
			return fmt.Errorf("%s: backup %d of %d bytes cannot lie on backup %d", catalogName, s.Number, s.Size, last)
		}
		last = s.Number
	}
	return nil
}

// save makes the catalog durable.
func (a *Archive) save() error {
	b, err := json.MarshalIndent(a.catalog, "", "  ")
	if err != nil {
		return err
	}
	next := a.path(catalogName + ".new")
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600) // never what a link of that name leads to
	if err != nil {
		return err
	}
	_, err = f.Write(append(b, '\n'))
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return a.rename(next, a.path(catalogName))
}

// rename is durable when it returns.
func (a *Archive) rename(from, to string) error {
	if err := os.Rename(from, to); err != nil {
		return err
	}
	return a.lock.Sync()
}

// recover completes or undoes what was interrupted.
func (a *Archive) recover(names []string) error {
	if err := a.files.recover(); err != nil {
		return err
	}
	return a.sweep(names)
}

// sweep removes the files that are of no backup.
func (a *Archive) sweep(names []string) error {
	known := map[string]bool{}
	for i := range a.catalog.Steps {
		for _, name := range a.files.names(&a.catalog.Steps[i]) {
			known[name] = true
		}
	}
	for _, name := range names {
		if !known[name] && a.files.owns(name) {
			if err := os.Remove(a.path(name)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (a *Archive) path(name string) string { return filepath.Join(a.dir, name) }

// Close ends the use of the directory.
func (a *Archive) Close() error { return a.lock.Close() }

// ID is the archive's own, 16 hexadecimal digits.
func (a *Archive) ID() string { return a.catalog.ID }

// Format is that of its backups.
func (a *Archive) Format() string {
	if a.catalog.Format == "" {
		return FormatQcow2
	}
	return a.catalog.Format
}

// File is the name of the file with a backup's data in the directory.
func (a *Archive) File(s Step) string { return a.files.names(&s)[0] }

// Steps are the backups, the oldest first.
func (a *Archive) Steps() []Step { return slices.Clone(a.catalog.Steps) }

// Last is the newest backup, or nil.
func (a *Archive) Last() *Step {
	if len(a.catalog.Steps) == 0 {
		return nil
	}
	s := a.catalog.Steps[len(a.catalog.Steps)-1]
	return &s
}

// index finds a backup; 0 is the newest.
func (a *Archive) index(number int) (int, error) {
	if number == 0 && len(a.catalog.Steps) > 0 {
		return len(a.catalog.Steps) - 1, nil
	}
	i := slices.IndexFunc(a.catalog.Steps, func(s Step) bool { return s.Number == number })
	switch steps := a.catalog.Steps; {
	case len(steps) == 0:
		return 0, fmt.Errorf("%w: %s has none", ErrNoStep, a.dir)
	case i < 0:
		return 0, fmt.Errorf("%w: %s has those from %d to %d", ErrNoStep, a.dir, steps[0].Number, steps[len(steps)-1].Number)
	}
	return i, nil
}

// chain is the backup of an index and those it lies on, the oldest first.
func (a *Archive) chain(i int) []Step {
	first := i
	for !a.catalog.Steps[first].Full {
		first--
	}
	return a.catalog.Steps[first : i+1]
}

// OpenStep opens what the disk was at a backup, 0 the newest, to be read.
func (a *Archive) OpenStep(number int) (block.Node, error) {
	i, err := a.index(number)
	if err != nil {
		return nil, err
	}
	n, err := a.files.open(i)
	if err != nil {
		return nil, fmt.Errorf("%w %d: %w", ErrDamaged, a.catalog.Steps[i].Number, err)
	}
	return n, nil
}
