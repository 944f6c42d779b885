package main

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func registered(t *testing.T, name string) (*registration, machineInfo) {
	t.Helper()
	info := machineInfo{Name: name, PID: os.Getpid()}
	r, err := register(&info)
	if err != nil {
		t.Fatal(err)
	}
	return r, info
}

func TestMachineNames(t *testing.T) {
	for name, good := range map[string]bool{
		"vm1": true, "a.b-c_d": true, "0": true, strings.Repeat("a", 64): true,
		"": false, ".": false, "..": false, "-a": false, "a/b": false, "a b": false, "a\n": false, "info": false, "commit": false, "informed": true, strings.Repeat("a", 65): false,
	} {
		if err := checkMachineName(name); (err == nil) != good {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestRegister(t *testing.T) {
	t.Setenv("GNOMON_RUNTIME_DIR", filepath.Join(t.TempDir(), "run"))
	r, info := registered(t, "vm")
	if _, err := register(&machineInfo{Name: "vm"}); err == nil || !strings.Contains(err.Error(), "--name") {
		t.Errorf("a taken name: %v", err)
	}
	// Looking does not change who has what.
	for range 2 {
		machines, err := runningMachines()
		if err != nil || len(machines) != 1 || machines[0].QMP != info.QMP {
			t.Errorf("%+v, %v", machines, err)
		}
	}
	r.remove()
	if machines, err := runningMachines(); err != nil || len(machines) != 0 {
		t.Errorf("after the end: %+v, %v", machines, err)
	}
	again, _ := registered(t, "vm")
	again.remove()
}

// Who has opened the file of a machine that then ends does not get its name:
// nobody would find the machine.
func TestLockOfRemovedFile(t *testing.T) {
	t.Setenv("GNOMON_RUNTIME_DIR", t.TempDir())
	r, info := registered(t, "vm")
	f, err := os.OpenFile(filepath.Join(filepath.Dir(info.QMP), machineFile), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r.remove()
	if err := lockMachine(f); err == nil {
		t.Error("a file that is gone was locked")
	}
}

func TestRuntimeDirectoryOfAnother(t *testing.T) {
	dir := t.TempDir()
	link := filepath.Join(dir, "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	t.Setenv("GNOMON_RUNTIME_DIR", link)
	if _, err := register(&machineInfo{Name: "vm"}); err == nil || !strings.Contains(err.Error(), "GNOMON_RUNTIME_DIR") {
		t.Errorf("a link: %v", err)
	}
	if os.Geteuid() != 0 {
		return // only root can give the directory away
	}
	if err := os.Chown(dir, 65534, -1); err != nil {
		t.Fatal(err)
	}
	t.Setenv("GNOMON_RUNTIME_DIR", dir)
	if _, err := register(&machineInfo{Name: "vm"}); err == nil || !strings.Contains(err.Error(), "GNOMON_RUNTIME_DIR") {
		t.Errorf("somebody else's: %v", err)
	}
}

func TestRuntimeDirectoryRefused(t *testing.T) {
	t.Setenv("GNOMON_RUNTIME_DIR", filepath.Join(t.TempDir(), strings.Repeat("x", 100)))
	if _, err := register(&machineInfo{Name: "vm"}); err == nil || !strings.Contains(err.Error(), "shorter") {
		t.Errorf("a long path: %v", err)
	}
	dir := t.TempDir()
	t.Setenv("GNOMON_RUNTIME_DIR", dir)
	r, _ := registered(t, "vm")
	defer r.remove()
	for _, mode := range []os.FileMode{0o720, 0o702, 0o1777} {
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		_, byRun := register(&machineInfo{Name: "vm2"})
		_, byPs := runningMachines()
		_, byName := qmpAddress("vm")
		for _, err := range []error{byRun, byPs, byName} {
			if err == nil || !strings.Contains(err.Error(), "chmod go-w") {
				t.Errorf("mode %o: %v", mode, err)
			}
		}
	}
}

// Who registers clears up after machines that were killed, and after nobody else.
func TestRemoveStale(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("GNOMON_RUNTIME_DIR", dir)
	running, _ := registered(t, "running")
	defer running.remove()
	for _, name := range []string{"killed", "killed-with-more"} {
		r, info := registered(t, name)
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: info.QMP, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		l.Close()
		r.lock.Close() // as the kernel does
	}
	if err := os.WriteFile(filepath.Join(dir, "killed-with-more", "notes"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "mine", "empty"), 0o700); err != nil {
		t.Fatal(err)
	}
	again, _ := registered(t, "again")
	defer again.remove()
	left, err := filepath.Glob(filepath.Join(dir, "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, path := range left {
		name, err := filepath.Rel(dir, path)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, name)
	}
	if want := "again/machine.json killed-with-more/notes mine/empty running/machine.json"; strings.Join(got, " ") != want {
		t.Errorf("left: %s\nwant: %s", got, want)
	}
	if _, err := os.Lstat(filepath.Join(dir, "killed")); err == nil {
		t.Error("a killed machine's directory is still there")
	}
}

func TestQMPAddress(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	t.Setenv("GNOMON_RUNTIME_DIR", filepath.Join(dir, "run"))
	r, info := registered(t, "vm")
	defer r.remove()
	l, err := net.Listen("unix", "here.sock")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for machine, want := range map[string]string{
		"vm":              "unix:" + info.QMP,
		"here.sock":       "unix:here.sock",
		"./here.sock":     "./here.sock",
		"/run/vm.sock":    "/run/vm.sock",
		"unix:vm":         "unix:vm",
		"tcp:localhost:1": "tcp:localhost:1",
	} {
		if got, err := qmpAddress(machine); err != nil || got != want {
			t.Errorf("%s: %s, %v", machine, got, err)
		}
	}
	if got, err := qmpAddress("vm2"); err == nil || !strings.Contains(err.Error(), "gnomon ps") {
		t.Errorf("nobody's name: %s, %v", got, err)
	}
}
