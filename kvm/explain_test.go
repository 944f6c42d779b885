package kvm

import (
	"errors"
	"io/fs"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Tests run as root, whom no file mode stops.
func TestPermissionDenied(t *testing.T) {
	err := explainOpen(DevicePath, &fs.PathError{Op: "open", Path: DevicePath, Err: unix.EACCES})
	if !errors.Is(err, ErrPermission) || !errors.Is(err, unix.EACCES) || errors.Is(err, ErrNoKVM) {
		t.Errorf("%v", err)
	}
	if !strings.Contains(err.Error(), "group") {
		t.Errorf("%q does not say what to do", err)
	}
}
