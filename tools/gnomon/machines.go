package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"sort"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/internal/unixsock"
)

// A running machine has a directory of its name in the user's runtime
// directory, with its QMP socket and machine.json. The process holds a lock on
// machine.json: a directory whose file is not locked was left by a process that
// was killed, and may be removed.
const (
	machineFile   = "machine.json"
	machineSocket = "qmp.sock"
)

// machineInfo is what machine.json and gnomon ps --output json hold.
type machineInfo struct {
	Name    string    `json:"name"`
	UUID    string    `json:"uuid"`
	PID     int       `json:"pid"`
	QMP     string    `json:"qmp"` // path of the unix socket
	CPUs    int       `json:"cpus"`
	Memory  uint64    `json:"memory"` // bytes
	Started time.Time `json:"started"`
}

var machineName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

// machinesDir is the user's runtime directory.
func machinesDir() string {
	if dir := os.Getenv("GNOMON_RUNTIME_DIR"); dir != "" {
		return dir
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		return filepath.Join(dir, "gnomon")
	}
	if os.Geteuid() == 0 {
		return "/run/gnomon"
	}
	return filepath.Join(os.TempDir(), "gnomon-"+strconv.Itoa(os.Geteuid()))
}

func checkMachineName(name string) error {
	if !machineName.MatchString(name) {
		return fmt.Errorf("machine name %q: use up to 64 letters, digits, dots, dashes and underscores, a letter or digit first", name)
	}
	// gnomon checkpoint NAME and gnomon backup NAME must mean the machine.
	for _, parent := range []*cobra.Command{newCheckpointCommand(), newBackupCommand()} {
		for _, cmd := range parent.Commands() {
			if cmd.Name() == name {
				return fmt.Errorf("machine name %q: gnomon %s %s is a command: choose another name", name, parent.Name(), name)
			}
		}
	}
	return nil
}

// registration is this process's entry among the running machines.
type registration struct {
	dir  string
	lock *os.File
}

// register claims a name that checkMachineName found good, and sets info.QMP,
// the path of the socket.
func register(info *machineInfo) (*registration, error) {
	parent := machinesDir()
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return nil, fmt.Errorf("make the runtime directory: %w; set GNOMON_RUNTIME_DIR to one you may write", err)
	}
	if err := checkDirectory(parent); err != nil {
		return nil, err
	}
	dir := filepath.Join(parent, info.Name)
	info.QMP = filepath.Join(dir, machineSocket)
	if len(info.QMP) > unixsock.MaxPath {
		return nil, fmt.Errorf("runtime directory %s: the path of the machine's socket, %s, has %d bytes, and %d are possible: set GNOMON_RUNTIME_DIR to a shorter one",
			parent, info.QMP, len(info.QMP), unixsock.MaxPath)
	}
	// One at a time: who clears up does not meet who has just made a directory.
	lock, err := lockDirectory(parent)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	removeStale(parent)
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("register machine: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, machineFile), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("register machine: %w", err)
	}
	if err := lockMachine(f); err != nil {
		f.Close()
		return nil, fmt.Errorf("name %s: %w: choose another --name, or end that machine (gnomon qmp %s quit)", info.Name, err, info.Name)
	}
	r := &registration{dir: dir, lock: f}
	err = f.Truncate(0)
	if err == nil {
		err = json.NewEncoder(f).Encode(info)
	}
	if err != nil {
		r.remove()
		return nil, fmt.Errorf("register machine: %w", err)
	}
	return r, nil
}

// lockMachine takes the lock of a machine's file. A machine that ends removes
// the file before it lets go of the lock, so one that is locked and still there
// is ours.
func lockMachine(f *os.File) error {
	lock := unix.Flock_t{Type: unix.F_WRLCK}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lock); err != nil {
		return errors.New("a machine of that name is running")
	}
	var ours, there unix.Stat_t
	if unix.Fstat(int(f.Fd()), &ours) != nil || unix.Stat(f.Name(), &there) != nil || ours.Dev != there.Dev || ours.Ino != there.Ino {
		return errors.New("a machine of that name is just ending")
	}
	return nil
}

// checkDirectory refuses a runtime directory that somebody else prepared, or can
// change.
func checkDirectory(dir string) error {
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return fmt.Errorf("runtime directory %s: %w", dir, err)
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != os.Geteuid():
		return fmt.Errorf("runtime directory %s belongs to somebody else: set GNOMON_RUNTIME_DIR to one of your own", dir)
	case st.Mode&0o022 != 0:
		return fmt.Errorf("runtime directory %s can be written by others: take that from them (chmod go-w %s), or set GNOMON_RUNTIME_DIR to another one", dir, dir)
	}
	return nil
}

// lockDirectory waits for the runtime directory's lock, which who registers
// holds meanwhile; closing the file gives it back.
func lockDirectory(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("runtime directory: %w", err)
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock runtime directory %s: %w", dir, err)
	}
	return f, nil
}

// removeStale removes what killed machines left. Preconditions: the caller holds
// the directory's lock.
func removeStale(parent string) {
	entries, err := os.ReadDir(parent)
	if err != nil {
		return // whoever registers hears of it
	}
	for _, e := range entries {
		dir := filepath.Join(parent, e.Name())
		f, err := os.OpenFile(filepath.Join(dir, machineFile), os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if err != nil {
			continue // not a machine's
		}
		if lockMachine(f) == nil {
			// What else may be there is not ours, and keeps the directory.
			os.Remove(filepath.Join(dir, machineSocket))
			os.Remove(filepath.Join(dir, machineFile))
			os.Remove(dir)
		}
		f.Close()
	}
}

// remove takes the machine out of the runtime directory.
func (r *registration) remove() {
	// The lock goes last, so that nobody sees a half-removed machine as dead.
	os.RemoveAll(r.dir)
	r.lock.Close()
}

// runningMachines lists the user's running machines by name.
func runningMachines() ([]machineInfo, error) {
	entries, err := os.ReadDir(machinesDir())
	if err == nil {
		err = checkDirectory(machinesDir())
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list machines: %w", err)
	}
	machines := []machineInfo{}
	for _, e := range entries {
		if info, ok := readMachine(filepath.Join(machinesDir(), e.Name())); ok {
			machines = append(machines, info)
		}
	}
	sort.Slice(machines, func(i, j int) bool { return machines[i].Name < machines[j].Name })
	return machines, nil
}

// readMachine reads the entry of a machine, if its process lives.
func readMachine(dir string) (info machineInfo, ok bool) {
	f, err := os.Open(filepath.Join(dir, machineFile))
	if err != nil {
		return info, false
	}
	defer f.Close()
	// To ask is not to lock: nobody who registers is held up by who looks.
	lock := unix.Flock_t{Type: unix.F_RDLCK}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &lock); err != nil || lock.Type == unix.F_UNLCK {
		return info, false // nobody holds it
	}
	return info, json.NewDecoder(f).Decode(&info) == nil
}

// qmpAddress turns what a user calls a machine, its name or its QMP socket,
// into the address of its QMP socket.
func qmpAddress(machine string) (string, error) {
	if !machineName.MatchString(machine) {
		return machine, nil
	}
	if info, ok := readMachine(filepath.Join(machinesDir(), machine)); ok {
		if err := checkDirectory(machinesDir()); err != nil {
			return "", err
		}
		return "unix:" + info.QMP, nil
	}
	if st, err := os.Lstat(machine); err == nil && st.Mode().Type() == fs.ModeSocket {
		return "unix:" + machine, nil
	}
	return "", fmt.Errorf("no machine named %s is running, and there is no socket of that name: gnomon ps lists the machines that are running", machine)
}
