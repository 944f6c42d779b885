// Package probe holds the probe guest: a freestanding ELF that QEMU's -kernel
// and Gnomon both boot through its PVH note. It drops to ring 3, runs the
// workloads named on its command line, and reports on COM1; see README.md for
// the workloads.
package probe

import (
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
)

// The guest-physical address of the mailbox and the offsets in it, each an
// 8-byte little-endian word. Magic is there from the guest's first steps on;
// spin counts up Counter and leaves the TSC of the last count in TSC; a host
// that writes non-zero to Stop ends spin and wait.
const (
	MailboxAddr    = 0x100000
	MailboxMagic   = 0
	MailboxCounter = 8
	MailboxTSC     = 16
	MailboxStop    = 24

	// Magic is what stands at MailboxMagic.
	Magic = 0x4542_4f52_504e_4d47
)

// ErrBuild is wrapped by what Path returns when the guest cannot be built.
var ErrBuild = errors.New("probe guest: build")

//go:embed Makefile src
var sources embed.FS

// Path returns the guest's ELF file, building it with make and gcc if the
// cache has none for these sources.
func Path() (string, error) {
	names, err := fs.Glob(sources, "src/*")
	if err != nil {
		return "", fmt.Errorf("%w: sources: %w", ErrBuild, err)
	}
	names = append([]string{"Makefile"}, names...)
	hash := sha256.New()
	for _, name := range names {
		text, err := sources.ReadFile(name)
		if err != nil {
			return "", fmt.Errorf("%w: sources: %w", ErrBuild, err)
		}
		hash.Write(text)
	}
	cache, err := cacheDir()
	if err != nil {
		return "", fmt.Errorf("%w: cache: %w", ErrBuild, err)
	}
	key := hex.EncodeToString(hash.Sum(nil))[:16]
	elf := filepath.Join(cache, "guest", "probe-"+key, "probe.elf")
	if _, err := os.Stat(elf); err == nil {
		return elf, nil
	}
	if err := build(cache); err != nil {
		return "", fmt.Errorf("%w: %w", ErrBuild, err)
	}
	if _, err := os.Stat(elf); err != nil {
		return "", fmt.Errorf("%w: %w", ErrBuild, err)
	}
	return elf, nil
}

// build runs the makefile over a copy of the embedded sources, so that it
// works wherever the caller's checkout is.
func build(cache string) error {
	dir, err := os.MkdirTemp("", "gnomon-probe-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.CopyFS(dir, sources); err != nil {
		return err
	}
	if out, err := exec.Command("make", "-C", dir, "CACHE="+cache).CombinedOutput(); err != nil {
		return fmt.Errorf("make (it needs Debian's build-essential): %w\n%s", err, out)
	}
	return nil
}

func cacheDir() (string, error) {
	if dir := os.Getenv("GNOMON_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	if dir := os.Getenv("XDG_CACHE_HOME"); dir != "" {
		return filepath.Join(dir, "gnomon"), nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(home, ".cache", "gnomon"), nil
}
