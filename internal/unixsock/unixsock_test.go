package unixsock

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestClear(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "socket")
	if err := Clear(path); err != nil {
		t.Errorf("nothing there: %v", err)
	}

	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if err := Clear(path); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("a socket that is listened on: %v", err)
	}
	l.Close()
	if err := Clear(path); err != nil {
		t.Errorf("a stale socket: %v", err)
	}
	if _, err := os.Lstat(path); err == nil {
		t.Error("the stale socket is still there")
	}

	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Clear(path); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("a file: %v", err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "precious" {
		t.Errorf("the file is now %q, %v", b, err)
	}
	for _, bad := range []string{"", strings.Repeat("x", MaxPath+1)} {
		if err := Clear(bad); err == nil {
			t.Errorf("path of %d bytes: no error", len(bad))
		}
	}
}
