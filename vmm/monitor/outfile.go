package monitor

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/gnomon-vmm/gnomon/qmp"
)

// zeroes is what is written for a hole where none can be left.
var zeroes [64 << 10]byte

// outFile is a file that a command fills. Whoever opens one calls end.
type outFile struct {
	f      *os.File
	name   string      // of what is removed if it does not get complete; "": nothing
	info   fs.FileInfo // of name
	sparse bool        // holes may be left
	done   func()      // gives up what f was opened by
}

// create makes a file, readable for its owner only, or empties what there is.
// A pipe must have its reader already.
func create(path string) (*outFile, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|syscall.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, qmp.Errorf("Could not open '%s': %s", path, strerror(err))
	}
	o := &outFile{f: f}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, qmp.Errorf("Could not open '%s': %s", path, strerror(err))
	}
	if info.Mode().IsRegular() {
		o.name, o.info, o.sparse = path, info, true
	}
	return o, nil
}

// strerror is what C's strerror says of the error at the bottom of err.
func strerror(err error) string {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return err.Error()
	}
	text := errno.Error()
	return strings.ToUpper(text[:1]) + text[1:]
}

// interruptible makes a write to a pipe end when ctx does, until the returned
// function is called.
func (o *outFile) interruptible(ctx context.Context) (stop func() bool) {
	return context.AfterFunc(ctx, func() {
		// Refused for regular files, where no write takes long.
		_ = o.f.SetWriteDeadline(time.Unix(1, 0))
	})
}

func (o *outFile) write(p []byte) error {
	_, err := o.f.Write(p)
	return saveError(err)
}

// skip lets n zero bytes follow.
func (o *outFile) skip(n int64) error {
	if o.sparse {
		_, err := o.f.Seek(n, io.SeekCurrent)
		return saveError(err)
	}
	for n > 0 {
		step := min(n, int64(len(zeroes)))
		if err := o.write(zeroes[:step]); err != nil {
			return err
		}
		n -= step
	}
	return nil
}

// complete writes what is left and closes the file.
func (o *outFile) complete() error {
	var err error
	if o.sparse {
		var size int64
		if size, err = o.f.Seek(0, io.SeekCurrent); err == nil {
			err = o.f.Truncate(size)
		}
	}
	return saveError(errors.Join(err, o.close()))
}

// abandon closes the file, if complete has not, and removes it.
func (o *outFile) abandon() {
	// What can go wrong with a file that nobody wants is of no interest.
	_ = o.close()
	if o.name == "" {
		return
	}
	// Not a link to it, nor what somebody has put in its place.
	if now, err := os.Lstat(o.name); err == nil && os.SameFile(now, o.info) {
		os.Remove(o.name)
	}
}

func (o *outFile) close() error {
	err := o.f.Close()
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	if o.done != nil {
		o.done()
	}
	return err
}

// end completes the file, or abandons it when err tells that it cannot be.
func (o *outFile) end(err error) error {
	if err == nil {
		err = o.complete()
	}
	if err != nil {
		o.abandon()
	}
	return err
}

func saveError(err error) error {
	if err == nil {
		return nil
	}
	return qmp.Errorf("An IO error has occurred: %s", strerror(err))
}
