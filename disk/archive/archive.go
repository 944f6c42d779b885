// Package archive keeps the backups of a disk in a directory: qcow2 images, each of
// which lies on the one before it or on none. A catalog names them with their
// checksums; what it does not name is not there. So whatever is killed in between
// leaves all backups as they were.
package archive

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/changes"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
)

// Errors of archives.
var (
	ErrArchive = errors.New("backup directory")
	// ErrDamaged is a backup that is not what it was when it was made.
	ErrDamaged = errors.New("damaged backup")
	// ErrNoStep is a backup that is not there.
	ErrNoStep = errors.New("no such backup")
)

const (
	catalogName = "backups.json"
	version     = 1
	maxCatalog  = 64 << 20
	part        = ".part" // an image that is not a backup yet
)

// Step is one backup.
type Step struct {
	Number int       `json:"number"`
	Time   time.Time `json:"time"` // the instant of which it is
	Full   bool      `json:"full"` // it lies on no other
	Size   int64     `json:"size"` // of the disk, bytes
	Bytes  int64     `json:"bytes"`
	SHA256 string    `json:"sha256"` // of its file
	// Point is the instant in the recording of the disk's changes, if there is one.
	Point *changes.Point `json:"point,omitempty"`
	// Bitmap is the name of the machine's dirty bitmap with what changed since, or "".
	Bitmap string `json:"bitmap,omitempty"`
	// Merged is the checksum of the whole image that is about to take its file's
	// place, or "".
	Merged string `json:"merged,omitempty"`
}

// File is the name of the step's image in the directory.
func (s *Step) File() string { return fmt.Sprintf("%06d.qcow2", s.Number) }

// catalog is what is in backups.json.
type catalog struct {
	Version int    `json:"version"`
	ID      string `json:"id"`
	Steps   []Step `json:"steps"` // ascending
}

// Archive is a directory that is in use. Nobody else uses it meanwhile. Its methods
// are called one at a time.
type Archive struct {
	dir     string
	lock    *os.File
	catalog catalog
}

var imageName = regexp.MustCompile(`^\.?[0-9]{6}\.qcow2(\.part.*)?$`)

// Open opens the archive in a directory; with create it may not be there yet, or
// be empty.
func Open(dir string, create bool) (_ *Archive, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w %s: %w", ErrArchive, dir, err)
		}
	}()
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
		a.catalog = catalog{Version: version, ID: hex.EncodeToString(id[:])}
		return a, a.save()
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("it has no %s: it is not one", catalogName)
	case err != nil:
		return nil, err
	}
	if err := a.catalog.decode(b); err != nil {
		return nil, err
	}
	return a, a.recover(names)
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
	if c.Version != version {
		return fmt.Errorf("%s: version %d: this program knows version %d", catalogName, c.Version, version)
	}
	if len(c.ID) != 16 {
		return fmt.Errorf("%s: id %q", catalogName, c.ID)
	}
	last := 0
	for i, s := range c.Steps {
		if s.Number <= last || s.Number > 999999 || s.Size < 0 || i == 0 && !s.Full {
			return fmt.Errorf("%s: backup %d of %d bytes after backup %d", catalogName, s.Number, s.Size, last)
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
	f, err := os.Create(next)
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
	for i := range a.catalog.Steps {
		if s := &a.catalog.Steps[i]; s.Merged != "" {
			sum, err := fileSum(a.path(s.File()))
			if err != nil {
				continue // Verify tells
			}
			if sum == s.Merged {
				s.SHA256, s.Full = sum, true
			}
			s.Merged = ""
			if err := a.save(); err != nil {
				return err
			}
		}
	}
	return a.sweep(names)
}

// sweep removes the images that are not backups.
func (a *Archive) sweep(names []string) error {
	for _, name := range names {
		known := slices.ContainsFunc(a.catalog.Steps, func(s Step) bool { return s.File() == name })
		if !known && imageName.MatchString(name) {
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
	if i < 0 {
		return 0, fmt.Errorf("%w: %s has %d", ErrNoStep, a.dir, len(a.catalog.Steps))
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

// backing is what the image of a step lies on, or "".
func (a *Archive) backing(i int) string {
	if a.catalog.Steps[i].Full {
		return ""
	}
	return a.catalog.Steps[i-1].File()
}

// OpenStep opens what the disk was at a backup, 0 the newest, to be read.
func (a *Archive) OpenStep(number int) (block.Node, error) {
	i, err := a.index(number)
	if err != nil {
		return nil, err
	}
	n, err := qcow2.Open(a.path(a.catalog.Steps[i].File()), true)
	if err != nil {
		return nil, fmt.Errorf("%w %d: %w", ErrDamaged, a.catalog.Steps[i].Number, err)
	}
	return n, nil
}

func fileSum(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// syncFile makes a file durable, whoever wrote it.
func syncFile(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
