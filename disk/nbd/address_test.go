package nbd

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"
)

func TestParseURI(t *testing.T) {
	for _, c := range []struct{ uri, address, export string }{
		{"nbd://host", "host:10809", ""},
		{"nbd://host/", "host:10809", ""},
		{"nbd://host:1234/a%20b", "host:1234", "a b"},
		{"nbd+tcp://127.0.0.1:9/x/y", "127.0.0.1:9", "x/y"},
		{"nbd://[::1]/x", "[::1]:10809", "x"},
		{"nbd+unix:///disk0?socket=/run/a.sock", "unix:/run/a.sock", "disk0"},
		{"nbd+unix://?socket=/run/a.sock", "unix:/run/a.sock", ""},
		{"nbd+unix:///?socket=/run/a%20b", "unix:/run/a b", ""},
		{"nbd+unix:////x?socket=s", "unix:s", "x"},
		{"nbd://", "", ""},
		{"nbd:///x", "", ""},
		{"nbd://host/x?socket=/s", "", ""},
		{"nbd://host:port/x", "", ""},
		{"nbd+unix:///x", "", ""},
		{"nbd+unix:///x?path=/s", "", ""},
		{"nbd+unix:///x?socket=/s&y=1", "", ""},
		{"nbd+unix://host/x?socket=/s", "", ""},
		{"http://host/x", "", ""},
		{"host:1", "", ""},
	} {
		address, export, err := ParseURI(c.uri)
		switch {
		case c.address == "" && !errors.Is(err, ErrAddress):
			t.Errorf("%s: %q, %q, %v", c.uri, address, export, err)
		case c.address != "" && (err != nil || address != c.address || export != c.export):
			t.Errorf("%s: %q, %q, %v", c.uri, address, export, err)
		case c.address != "":
			if a, x, err := ParseURI(uri(address, export)); err != nil || a != address || x != export {
				t.Errorf("%s comes back as %s", c.uri, uri(address, export))
			}
		}
	}
}

func TestListenReplacesWhatADeadServerLeft(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Listen("unix:" + path); !errors.Is(err, ErrAddress) {
		t.Errorf("a socket in use: %v", err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	again, err := Listen("unix:" + path)
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(path); !errors.Is(err, ErrAddress) {
		t.Errorf("a file that is no socket: %v", err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Errorf("the file is gone: %v", err)
	}
	for _, address := range []string{"", "unix:", "host", "a:b:c"} {
		if _, err := Listen(address); !errors.Is(err, ErrAddress) {
			t.Errorf("%q: %v", address, err)
		}
	}
}
