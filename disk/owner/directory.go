package owner

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrDirectory is a directory of owner files that cannot be used.
var ErrDirectory = errors.New("owner directory")

// errRaced is an owner file that somebody else has replaced first.
var errRaced = errors.New("somebody else was first")

// Suffix is what the directory of owner files is called behind the disk's name.
const Suffix = ".owner"

const (
	newSuffix   = ".new"   // a file that is to be linked as an owner file
	claimSuffix = ".claim" // a directory in which a claimant prepares to replace the disk
	// copyName is the copy of the disk in a claimant's directory.
	copyName = "disk"
)

// attempts bounds how often something is tried again because others changed
// the directory meanwhile.
const attempts = 1000

// directory holds the owner files of one disk. Nothing in it is ever changed or
// renamed, only made and removed, so that whoever acts late, having been
// frozen, can do no harm: an owner file is made by link(2), which fails if its
// generation is there, the highest generation counts, and whoever has made a
// higher one removes all that is lower.
type directory struct {
	path  string // of the directory
	image string // of the disk, absolute, without symbolic links
}

func directoryOf(disk string) (directory, error) {
	p, err := filepath.EvalSymlinks(disk)
	if err == nil {
		p, err = filepath.Abs(p)
	}
	if err != nil {
		return directory{}, fmt.Errorf("%w: %w", ErrDirectory, err)
	}
	return directory{path: p + Suffix, image: p}, nil
}

// entry is a name in the directory: GENERATION, GENERATION-NONCE.new or
// GENERATION-NONCE.claim.
type entry struct {
	name       string
	generation uint64
	nonce      string
	kind       string // "", newSuffix or claimSuffix
}

func parseEntry(name string) (entry, bool) {
	e := entry{name: name}
	number := name
	for _, s := range []string{newSuffix, claimSuffix} {
		if rest, ok := strings.CutSuffix(name, s); ok {
			e.kind = s
			if number, e.nonce, ok = strings.Cut(rest, "-"); !ok {
				return entry{}, false
			}
		}
	}
	g, err := strconv.ParseUint(number, 10, 63)
	if err != nil || g == 0 || number != strconv.FormatUint(g, 10) {
		return entry{}, false
	}
	e.generation = g
	return e, true
}

// list returns what is in the directory, which may not be there, and the highest
// generation of an owner file, or 0. The directory is small enough to be read
// by one system call, so it is one instant's content.
func (d directory) list() ([]entry, uint64, error) {
	f, err := os.Open(d.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, nil
	}
	if err != nil {
		return nil, 0, fmt.Errorf("%w: %w", ErrDirectory, err)
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return nil, 0, fmt.Errorf("%w: %w", ErrDirectory, err)
	}
	var entries []entry
	var highest uint64
	for _, name := range names {
		e, ok := parseEntry(name)
		if !ok {
			continue
		}
		entries = append(entries, e)
		if e.kind == "" {
			highest = max(highest, e.generation)
		}
	}
	return entries, highest, nil
}

func (d directory) recordPath(generation uint64) string {
	return filepath.Join(d.path, strconv.FormatUint(generation, 10))
}

func (d directory) readRaw(generation uint64) ([]byte, error) {
	// O_NONBLOCK: not to wait for a FIFO's other end.
	f, err := os.OpenFile(d.recordPath(generation), os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, recordSize+1))
}

// current returns the owner file that counts. Its state is Unowned if there is none.
func (d directory) current() (Record, error) {
	for range attempts {
		_, highest, err := d.list()
		if err != nil || highest == 0 {
			return Record{}, err
		}
		b, err := d.readRaw(highest)
		if errors.Is(err, fs.ErrNotExist) {
			continue // replaced meanwhile
		}
		if err != nil {
			return Record{}, fmt.Errorf("%w: %w", ErrDirectory, err)
		}
		r, err := decodeRecord(b)
		if err == nil && r.Generation != highest {
			err = fmt.Errorf("%w: has generation %d", ErrRecord, r.Generation)
		}
		if err != nil {
			return Record{}, fmt.Errorf("%w: %s: when no machine uses the disk, remove it", err, d.recordPath(highest))
		}
		return r, nil
	}
	return Record{}, fmt.Errorf("%w: %s changes all the time", ErrDirectory, d.path)
}

// create makes the directory, for those who may use the disk.
func (d directory) create() error {
	st, err := os.Stat(d.image)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrDirectory, err)
	}
	perm := st.Mode().Perm()
	err = os.Mkdir(d.path, 0o700)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err == nil {
		err = likeDisk(d.path, st, perm|perm>>2&0o111)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrDirectory, err)
	}
	return nil
}

// likeDisk gives path the disk's user and group, where that is possible, and perm.
func likeDisk(path string, disk fs.FileInfo, perm fs.FileMode) error {
	if st, ok := sysStat(disk); ok && (int(st.Uid) != os.Geteuid() || int(st.Gid) != os.Getegid()) {
		if err := os.Lchown(path, int(st.Uid), int(st.Gid)); err != nil && !errors.Is(err, fs.ErrPermission) {
			return err
		}
	}
	return os.Chmod(path, perm)
}

func newNonce() string {
	var b [8]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// publish makes r the owner file that counts and removes those before it, so that
// their owners no longer find them. keep is the name of a claim directory
// that stays. errRaced: somebody else has made this generation or a higher one.
func (d directory) publish(r *Record, keep string) error {
	raw := r.encode()
	st, err := os.Stat(d.image)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrDirectory, err)
	}
	temp := filepath.Join(d.path, fmt.Sprintf("%d-%s%s", r.Generation, newNonce(), newSuffix))
	if err := writeRecord(temp, raw, st); err != nil {
		os.Remove(temp)
		return swept(err)
	}
	err = os.Link(temp, d.recordPath(r.Generation))
	os.Remove(temp)
	if errors.Is(err, fs.ErrExist) {
		// Over a network the link may have been made though the answer was lost.
		if b, readErr := d.readRaw(r.Generation); readErr == nil && bytes.Equal(b, raw) {
			err = nil
		}
	}
	if errors.Is(err, fs.ErrExist) {
		return errRaced
	}
	if err != nil {
		return swept(err)
	}
	// The generation may have been free because it is an old one, removed already.
	entries, highest, err := d.list()
	if err != nil {
		return err
	}
	if highest > r.Generation {
		os.Remove(d.recordPath(r.Generation))
		return errRaced
	}
	if err := d.sweep(entries, r.Generation, keep); err != nil {
		return err
	}
	if r.State != Owned {
		return nil // lost with the host's power, it leaves an owner that has ended with it
	}
	return syncDirectory(d.path) // no epoch is used twice
}

// swept makes an error of what somebody with a higher generation has removed errRaced.
func swept(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return errRaced
	}
	return fmt.Errorf("%w: %w", ErrDirectory, err)
}

func writeRecord(path string, raw []byte, disk fs.FileInfo) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(raw); err != nil {
		return err
	}
	// The token is for those who may read the disk.
	if err := likeDisk(path, disk, disk.Mode().Perm()&0o444|0o200); err != nil {
		return err
	}
	return f.Sync()
}

// sweep removes what is of no use once there is an owner file of the generation.
func (d directory) sweep(entries []entry, generation uint64, keep string) error {
	for _, e := range entries {
		path := filepath.Join(d.path, e.name)
		var err error
		switch {
		case e.name == keep || e.generation > generation:
		case e.kind == claimSuffix:
			err = removeClaim(path)
		case e.kind == newSuffix || e.generation < generation:
			err = os.Remove(path)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%w: %w", ErrDirectory, err)
		}
	}
	return nil
}

// removeClaim removes a claimant's directory. Once it is gone its maker, who never
// makes it again, can no longer rename what was in it over the disk.
func removeClaim(path string) error {
	var err error
	for range attempts {
		if err = os.Remove(filepath.Join(path, copyName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err = os.Remove(path); !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.EEXIST) {
			return err
		}
	}
	return err
}

// makeClaim makes the directory of a claimant and returns its name.
func (d directory) makeClaim(generation uint64) (string, error) {
	name := fmt.Sprintf("%d-%s%s", generation, newNonce(), claimSuffix)
	if err := os.Mkdir(filepath.Join(d.path, name), 0o700); err != nil {
		return "", fmt.Errorf("%w: %w", ErrDirectory, err)
	}
	return name, nil
}

func syncDirectory(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrDirectory, err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: such a file system has nothing to make durable
		return fmt.Errorf("%w: %w", ErrDirectory, err)
	}
	return nil
}
