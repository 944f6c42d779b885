package qcow2

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/raw"
)

// Bytes that all images of a chain together keep in memory, apart from their
// L1 tables.
const (
	tableCacheBytes   = 8 << 20 // L2 tables: those of 64 GiB at 64 KiB a cluster
	clusterCacheBytes = 8 << 20 // decompressed clusters
)

// chain is what the images of one backing chain have in common.
type chain struct {
	tables   *cache // slices of L2 tables, by their offset in the file
	clusters *cache // decompressed clusters, by the offset of their stream
	opened   []fs.FileInfo
	through  bool // each change of an image is durable when it ends
	openFile func(path string, readOnly bool) (block.Node, fs.FileInfo, error)
}

func newChain() *chain { return newChainWith(raw.Options{}) }

// newChainWith is newChain for files that are opened with options.
func newChainWith(o raw.Options) *chain {
	through := o.WriteThrough
	o.WriteThrough = false // of each of the files' writes; the images' need more than that
	open := func(path string, readOnly bool) (block.Node, fs.FileInfo, error) { return openFile(path, readOnly, o) }
	return &chain{tables: newCache(tableCacheBytes), clusters: newCache(clusterCacheBytes), openFile: open, through: through}
}

// openFile opens an image's file, and locks it.
func openFile(path string, readOnly bool, o raw.Options) (block.Node, fs.FileInfo, error) {
	file, err := raw.OpenWith(path, readOnly, o)
	if err != nil {
		return nil, nil, err
	}
	info, err := os.Stat(path)
	if err != nil {
		file.Close()
		return nil, nil, err
	}
	return file, info, nil
}

// open opens the file at path as the next image of the chain, and refuses one
// that it already has.
func (c *chain) open(path string, readOnly bool) (block.Node, error) {
	if len(c.opened) == maxChain {
		return nil, fmt.Errorf("%w: %s: more than %d images lie one on another", ErrBacking, path, maxChain)
	}
	// Before it is opened: its locks would be taken for another machine's.
	if info, err := os.Stat(path); err == nil {
		if err := c.has(path, info); err != nil {
			return nil, err
		}
	}
	file, info, err := c.openFile(path, readOnly)
	if err != nil {
		return nil, err
	}
	if err := c.has(path, info); err != nil {
		file.Close()
		return nil, err
	}
	c.opened = append(c.opened, info)
	return file, nil
}

// has tells of a file that the chain has already.
func (c *chain) has(path string, info fs.FileInfo) error {
	if slices.ContainsFunc(c.opened, func(other fs.FileInfo) bool { return os.SameFile(info, other) }) {
		return fmt.Errorf("%w: %s is its own backing file: the chain is a loop", ErrBacking, path)
	}
	return nil
}

// openBacking opens the backing file that the header of the image at path
// names; it returns nil where there is none.
func (c *chain) openBacking(path string, h *Header) (block.Node, error) {
	if h.BackingFile == "" {
		return nil, nil
	}
	name, err := backingPath(path, h.BackingFile)
	if err != nil {
		return nil, err
	}
	switch h.BackingFormat {
	case "raw", "qcow2":
	case "":
		// To look at its content would let who wrote the disk choose which
		// files the host opens.
		return nil, fmt.Errorf("%w: %s does not say which format %s has: say it with qemu-img rebase -u -F raw|qcow2 -b %s %s",
			ErrBacking, path, h.BackingFile, h.BackingFile, path)
	default:
		return nil, fmt.Errorf("%w: %s has the format %q: raw and qcow2 can be read", ErrBacking, name, h.BackingFormat)
	}
	file, err := c.open(name, true)
	switch {
	case errors.Is(err, ErrBacking):
		return nil, err
	case errors.Is(err, fs.ErrNotExist):
		return nil, missingBacking(path, name)
	case err != nil:
		return nil, fmt.Errorf("%w of %s: %w", ErrBacking, path, err)
	case h.BackingFormat == "raw":
		if f, ok := file.(raw.Opened); ok && c.through { // for who opens it to be written later
			o := f.Options()
			o.WriteThrough = true
			return file, f.SetOptions(o)
		}
		return file, nil
	}
	n, err := c.openImage(file, name)
	if err != nil {
		return nil, err // says which image is at fault itself
	}
	return n, nil
}

// missingBacking tells of a backing file that is not there. Whoever made an empty one of
// its name would lose what the image lies on for good.
func missingBacking(path, name string) error {
	return fmt.Errorf("%w: %s does not exist, and %s lies on it and is of no use without it: bring it back, or tell where it is now (gnomon disk rebase -u): %w",
		ErrBacking, name, path, fs.ErrNotExist)
}

// backingPath finds the backing file: what is not absolute is relative to the
// directory of the image that names it.
func backingPath(image, name string) (string, error) {
	if strings.HasPrefix(name, "json:") {
		return "", fmt.Errorf("%w: %s names its backing file as %q: only the path of a file can be followed (qemu-img rebase -u sets it)", ErrBacking, image, name)
	}
	if before, _, ok := strings.Cut(name, ":"); ok && !strings.Contains(before, "/") {
		return "", fmt.Errorf("%w: %s names %q, by the protocol %q: only the path of a file can be followed (qemu-img rebase -u sets it; ./ before a name that has a colon)",
			ErrBacking, image, name, before)
	}
	if filepath.IsAbs(name) {
		return name, nil
	}
	// Not cleaned: a ".." behind a symbolic link is the kernel's to resolve.
	dir := image[:strings.LastIndexByte(image, '/')+1]
	return dir + name, nil
}

// BackingPath is where the backing file is that the image names, or "" where it names none
// or none that could be followed.
func (n *Node) BackingPath() string {
	if n.header.BackingFile == "" {
		return ""
	}
	path, err := backingPath(n.path, n.header.BackingFile)
	if err != nil {
		return ""
	}
	return path
}

// openDataFile opens the file that has the data of the image at path. As that of a
// backing file, its name is relative to the image's directory.
func (c *chain) openDataFile(path string, h *Header) (block.Node, error) {
	if h.DataFile == "" {
		return nil, fmt.Errorf("%w: disk %s does not name its data file", ErrHeader, path)
	}
	name, err := backingPath(path, h.DataFile)
	if err != nil {
		return nil, err
	}
	file, err := c.open(name, true)
	if err != nil {
		return nil, fmt.Errorf("%w of %s: data file: %w", ErrBacking, path, err)
	}
	return file, nil
}
