package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/vmm/chardev"
)

// configLimit is the size of the largest configuration file, in bytes.
const configLimit = 1 << 20

// openRegular opens a file that a flag names for reading. What is not a regular
// file is refused at once, a FIFO included.
func openRegular(flag, path, want string) (*os.File, fs.FileInfo, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, explainMissing(flag, path, err)
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("not a regular file: " + want)
	}
	if err != nil {
		f.Close()
		return nil, nil, fmt.Errorf("%s %s: %w", flag, path, err)
	}
	return f, info, nil
}

func readConfig(path string) ([]byte, error) {
	f, _, err := openRegular("--config", path, "write the flags into a JSON file")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, configLimit+1))
	if err != nil {
		return nil, fmt.Errorf("--config: %w", err)
	}
	if len(text) > configLimit {
		return nil, fmt.Errorf("--config %s: larger than %d KiB: is it a configuration?", path, configLimit>>10)
	}
	return text, nil
}

// checkDiskFile refuses what cannot be a disk.
func checkDiskFile(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return nil // who opens it says more
	}
	mode := info.Mode()
	if mode.IsRegular() || mode&fs.ModeDevice != 0 && mode&fs.ModeCharDevice == 0 {
		return nil
	}
	return fmt.Errorf("--disk file=%s: neither a regular file nor a block device: name an image (truncate -s 1G disk.img makes one)", path)
}

// namedFile is a file that a flag names, as it was when the flags were read.
type namedFile struct {
	flag     string // what the user wrote
	path     string
	info     fs.FileInfo // nil: there is none
	readOnly bool        // used as a disk that is not written
}

func nameFile(flag, path string) namedFile {
	info, err := os.Stat(path)
	if err != nil {
		info = nil
	}
	return namedFile{flag: flag, path: path, info: info}
}

// same tells whether both are one file, by whatever names.
func (f namedFile) same(other namedFile) bool {
	if f.info != nil && other.info != nil {
		return os.SameFile(f.info, other.info)
	}
	a, errA := filepath.Abs(f.path)
	b, errB := filepath.Abs(other.path)
	return f.info == nil && other.info == nil && errA == nil && errB == nil && a == b
}

// readFiles refuses a file that is named twice where that would spoil it: as a
// disk that is written, or for output, which empties it.
func (p *plan) readFiles() error {
	var inputs []namedFile
	for _, file := range []struct{ flag, path string }{
		{"--kernel", p.flags.kernel}, {"--initrd", p.flags.initrd}, {"--config", p.flags.config},
	} {
		if file.path != "" {
			inputs = append(inputs, nameFile(file.flag+" "+file.path, file.path))
		}
	}
	for _, path := range p.flags.checkpoint {
		inputs = append(inputs, nameFile("the checkpoint "+path, path))
	}
	var disks []namedFile
	for _, d := range p.disks {
		disk := nameFile("--disk file="+d.path, d.path)
		disk.readOnly = d.options.ReadOnly
		for _, other := range disks {
			if disk.same(other) && !(disk.readOnly && other.readOnly) {
				return fmt.Errorf("%s: the disk is given twice: leave one out, make it a copy, or have both readonly=on", disk.flag)
			}
		}
		disks = append(disks, disk)
	}
	inputs = append(inputs, disks...)
	for _, c := range []struct{ flag, text string }{{"--serial", p.flags.serial}, {"--console", p.flags.console}} {
		spec, err := chardev.Parse(c.text)
		if err != nil || spec.Kind != "file" {
			continue
		}
		output := nameFile(c.flag+" "+c.text, spec.Path)
		if output.info != nil && !output.info.Mode().IsRegular() {
			continue // a device, which both may use
		}
		for _, other := range inputs {
			if output.same(other) {
				return fmt.Errorf("%s: that is the file of %s, too: name another one for output", output.flag, other.flag)
			}
		}
		inputs = append(inputs, output)
	}
	return nil
}
