package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/disk"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/changes"
	"github.com/gnomon-vmm/gnomon/disk/owner"
	"github.com/gnomon-vmm/gnomon/internal/unixsock"
	"github.com/gnomon-vmm/gnomon/qmp"
	"github.com/gnomon-vmm/gnomon/vmm"
	"github.com/gnomon-vmm/gnomon/vmm/boot"
	"github.com/gnomon-vmm/gnomon/vmm/chardev"
	"github.com/gnomon-vmm/gnomon/vmm/netdev"
	"github.com/gnomon-vmm/gnomon/vmm/vsockhost"
)

// plan is what the flags of gnomon run ask for, read and checked, with nothing
// opened yet. open adds to machine what had to be opened.
type plan struct {
	flags   *runFlags
	machine vmm.Config
	disks   []diskPlan
	nets    []netPlan
	vsock   string // path; "": no device
	cid     uint32
	recipe  []byte // what restores such a machine

	running atomic.Pointer[vmm.Machine]
}

type diskPlan struct {
	path    string
	options disk.Options
	owned   bool     // opened as its owner
	tracked bool     // its changes are recorded
	attach  vmm.Disk // without its node
}

type netPlan struct {
	text string
	spec netdev.Spec
}

// plan reads the flags. Each error is one of usage.
func (f *runFlags) plan() (*plan, error) {
	p := &plan{flags: f, machine: vmm.Config{
		Name: f.name, UUID: vmm.NewUUID(), CPUs: f.cpus, Cmdline: f.append,
		Paused: f.paused, NoReboot: f.noReboot, NoBalloon: f.noBalloon, NoRNG: f.noRNG,
	}}
	for _, read := range []func() error{p.readMachine, p.readDisks, p.readNets, p.readVsock, p.readChardevs, p.readQMP, p.countDevices, p.readFiles} {
		if err := read(); err != nil {
			return nil, usageError(err)
		}
	}
	return p, nil
}

func (p *plan) readMachine() (err error) {
	f, m := p.flags, &p.machine
	if m.Name == "" {
		m.Name = fmt.Sprintf("gnomon-%d", os.Getpid())
	}
	if err := checkMachineName(m.Name); err != nil {
		return fmt.Errorf("--name: %w", err)
	}
	if f.uuid != "" {
		if m.UUID, err = vmm.ParseUUID(f.uuid); err != nil {
			return fmt.Errorf("--uuid: %w", err)
		}
	}
	if f.cpus < 1 || f.cpus > vmm.MaxCPUs {
		return fmt.Errorf("--cpus %d: 1 to %d are possible", f.cpus, vmm.MaxCPUs)
	}
	if m.Memory, err = parseSize(f.memory, 1<<20); err != nil {
		return fmt.Errorf("--memory: %w", err)
	}
	if m.Memory < vmm.MinMemory || m.Memory > vmm.MaxMemory || m.Memory%(1<<20) != 0 {
		return fmt.Errorf("--memory %s: 1M to 1T in whole MiB are possible", f.memory)
	}
	if f.kernel == "" && !f.restoring {
		return errors.New("no --kernel: name a bzImage or an ELF vmlinux")
	}
	return nil
}

// readDiskOptions reads what --disk says.
func readDiskOptions(text string) (*options, error) {
	return parseOptions("disk", text, "file", "format", "readonly", "id", "serial", "queues", "owner", "changes", "cache", "aio", "rerror", "werror")
}

func (p *plan) readDisks() error {
	for _, text := range p.flags.disks {
		o, err := readDiskOptions(text)
		if err != nil {
			return err
		}
		path, err := o.need("file")
		if err != nil {
			return err
		}
		format, err := o.oneOf("format", "", disk.FormatRaw, disk.FormatQcow2)
		if err != nil {
			return err
		}
		readOnly, err := o.onOff("readonly")
		if err != nil {
			return err
		}
		owned, err := o.onOff("owner")
		if err != nil {
			return err
		}
		if owned && readOnly {
			return fmt.Errorf("--disk %s: only a disk that is written has an owner: leave out owner=on or readonly=on", text)
		}
		tracked, err := o.onOff("changes")
		if err != nil {
			return err
		}
		if tracked && readOnly {
			return fmt.Errorf("--disk %s: a disk that is not written does not change: leave out changes=on or readonly=on", text)
		}
		queues, err := o.number("queues", 0, 1, vmm.MaxCPUs)
		if err != nil {
			return err
		}
		cache, engine, err := o.cacheAndEngine()
		if err != nil {
			return err
		}
		const report, ignore, stop, noSpace = string(vmm.OnErrorReport), string(vmm.OnErrorIgnore), string(vmm.OnErrorStop), string(vmm.OnErrorNoSpace)
		readError, err := o.oneOf("rerror", report, report, ignore, stop)
		if err != nil {
			return err
		}
		writeError, err := o.oneOf("werror", report, report, ignore, stop, noSpace)
		if err != nil {
			return err
		}
		p.disks = append(p.disks, diskPlan{
			path:    path,
			options: disk.Options{Format: format, ReadOnly: readOnly, Cache: cache, Engine: engine},
			owned:   owned,
			tracked: tracked,
			attach: vmm.Disk{
				ID: o.values["id"], Serial: o.values["serial"], Queues: int(queues),
				ReadError: vmm.OnError(readError), WriteError: vmm.OnError(writeError),
			},
		})
	}
	return nil
}

func (p *plan) readNets() error {
	for _, text := range p.flags.nets {
		spec, err := netdev.Parse(text)
		if err != nil {
			return fmt.Errorf("--net: %w", err)
		}
		if spec.Kind == netdev.KindNone {
			if len(p.flags.nets) > 1 {
				return errors.New("--net none is given with another --net: leave one of them out")
			}
			continue
		}
		for _, f := range spec.Forwards {
			if f.Host.Port() == 0 {
				return fmt.Errorf("--net %s: host port 0: 1 to 65535 are possible", text)
			}
		}
		p.nets = append(p.nets, netPlan{text, spec})
	}
	return nil
}

func (p *plan) readVsock() error {
	if p.flags.vsock == "" {
		return nil
	}
	o, err := parseOptions("vsock", p.flags.vsock, "cid", "path")
	if err != nil {
		return err
	}
	if _, err := o.need("cid"); err != nil {
		return err
	}
	cid, err := o.number("cid", 0, 3, 0xFFFF_FFFE)
	if err != nil {
		return err
	}
	p.cid = uint32(cid)
	if p.vsock, err = o.need("path"); err != nil {
		return err
	}
	return checkSocketPath("--vsock", p.vsock)
}

func checkSocketPath(flag, path string) error {
	if len(path) > unixsock.MaxPath {
		return fmt.Errorf("%s: the path of a socket, %s, has %d bytes: up to %d are possible", flag, path, len(path), unixsock.MaxPath)
	}
	return nil
}

func (p *plan) readChardevs() error {
	stdio := 0
	for _, c := range []struct{ flag, spec string }{{"serial", p.flags.serial}, {"console", p.flags.console}} {
		if c.flag == "console" && c.spec == "" {
			continue
		}
		spec, err := chardev.Parse(c.spec)
		if err != nil {
			return fmt.Errorf("--%s %w", c.flag, err)
		}
		if spec.Kind == "stdio" {
			stdio++
		}
	}
	if stdio == 2 {
		return errors.New("--serial and --console are both stdio: give one of them a file or a socket")
	}
	return nil
}

func (p *plan) readQMP() error {
	for _, address := range p.flags.qmp {
		network, hostPort, err := qmp.ParseAddress(address)
		if err != nil {
			return fmt.Errorf("--qmp: %w", err)
		}
		if network != "tcp" {
			if err := checkSocketPath("--qmp", hostPort); err != nil {
				return err
			}
			continue
		}
		// What is not an address may be a name that resolves to a loopback
		// address; the server sees to that.
		host, port, err := net.SplitHostPort(hostPort)
		if err != nil {
			return fmt.Errorf("--qmp %s: %w", address, err)
		}
		if ip := net.ParseIP(host); host == "" || ip != nil && !ip.IsLoopback() {
			return fmt.Errorf("--qmp %s: QMP has no password: 127.0.0.1, ::1 and localhost are possible", address)
		}
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return fmt.Errorf("--qmp %s: port %s: 1 to 65535 are possible", address, port)
		}
	}
	return nil
}

// maxDevices is how many virtio devices a machine has at most: one in each slot
// of its PCI bus but the first, which is the bus's own.
const maxDevices = 31

func (p *plan) countDevices() error {
	n := len(p.disks) + len(p.nets)
	for _, there := range []bool{p.vsock != "", p.flags.console != "", !p.flags.noRNG, !p.flags.noBalloon} {
		if there {
			n++
		}
	}
	if n > maxDevices {
		return fmt.Errorf("%d devices (disks, networks, vsock, console, entropy, balloon): a machine has at most %d: leave out some --disk or --net", n, maxDevices)
	}
	return nil
}

// opened is what has been opened for a machine that is not built yet: on an
// error all of it is closed again.
type opened []func() error

func (o *opened) add(f func() error) { *o = append(*o, f) }

func (o *opened) close() {
	for i := len(*o) - 1; i >= 0; i-- {
		(*o)[i]()
	}
	*o = nil
}

// open opens what the plan names. What must be closed if the machine is not
// built is added to undo; quit is what Ctrl-a x does. The serial port comes
// last: a file that takes its output is emptied.
func (p *plan) open(ctx context.Context, undo *opened, quit func()) (err error) {
	m := &p.machine
	if p.flags.kernel != "" {
		if m.Kernel, err = boot.OpenKernel(p.flags.kernel); err != nil {
			return explainMissing("--kernel", p.flags.kernel, err)
		}
		undo.add(m.Kernel.Close)
	}
	if err := p.openInitrd(undo); err != nil {
		return err
	}
	for _, d := range p.disks {
		if err := checkDiskFile(d.path); err != nil {
			return err
		}
		node, recorder, err := p.openDisk(ctx, d)
		if err != nil {
			return p.explainMissingDisk(d, err)
		}
		if recorder != nil {
			undo.add(recorder.Close)
		}
		undo.add(node.Close)
		if node.Size() == 0 {
			return fmt.Errorf("--disk file=%s: it has no size: name another file, or give it one (truncate -s 1G %s)", d.path, d.path)
		}
		d.attach.Node, d.attach.Changes = node, recorder
		m.Disks = append(m.Disks, d.attach)
	}
	for _, n := range p.nets {
		backend, err := n.spec.Open()
		if err != nil {
			return fmt.Errorf("--net %s: %w", n.text, err)
		}
		undo.add(backend.Close)
		m.Nets = append(m.Nets, vmm.Net{Backend: backend, MAC: n.spec.MAC})
	}
	if p.vsock != "" {
		host, err := vsockhost.Listen(p.vsock)
		if err != nil {
			return adviseOnPath(fmt.Errorf("--vsock: %w", err))
		}
		undo.add(host.Close)
		m.Vsock = &vmm.Vsock{CID: p.cid, Host: host}
	}
	if p.flags.console != "" {
		if m.Console, err = chardev.Open(p.outputSpec(p.flags.console), chardevOptions("console0", quit)); err != nil {
			return adviseOnPath(fmt.Errorf("--console: %w", err))
		}
		undo.add(m.Console.Close)
	}
	if m.Serial, err = chardev.Open(p.outputSpec(p.flags.serial), chardevOptions("serial0", quit)); err != nil {
		return adviseOnPath(fmt.Errorf("--serial: %w", err))
	}
	undo.add(m.Serial.Close)
	return nil
}

// outputSpec has a machine that goes on add to a file what its guest says, behind
// what was said before it was saved, unless the user says append=off.
func (p *plan) outputSpec(text string) string {
	spec, err := chardev.Parse(text)
	off := strings.HasSuffix(text, ",append=off") && !strings.HasSuffix(text, ",,append=off")
	if err != nil || !p.flags.restoring || spec.Kind != "file" || off {
		return text
	}
	return text + ",append=on"
}

func chardevOptions(label string, quit func()) chardev.Options {
	return chardev.Options{Label: label, Exit: quit, Failed: func(err error) {
		report("%s: output could not be written and is lost: %v", label, err)
	}}
}

func (p *plan) openInitrd(undo *opened) error {
	path := p.flags.initrd
	if path == "" {
		return nil
	}
	file, info, err := openRegular("--initrd", path, "name a cpio archive")
	if err != nil {
		return err
	}
	undo.add(file.Close)
	if info.Size() == 0 {
		return fmt.Errorf("--initrd %s: the file is empty: name a cpio archive, or leave --initrd out", path)
	}
	p.machine.Initrd, p.machine.InitrdSize = file, info.Size()
	return nil
}

// explainMissing says what to do about a file that cannot be opened.
func explainMissing(flag, path string, err error) error {
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("%s %s: there is no such file: check the path", flag, path)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("%s %s: no permission to read it: change its mode or owner, or run as its owner", flag, path)
	}
	return err
}

// explainMissingDisk says that a disk may be made, where that is what may be wanted: not
// in place of one that has been used.
func (p *plan) explainMissingDisk(d diskPlan, err error) error {
	_, statErr := os.Stat(d.path)
	if !errors.Is(statErr, os.ErrNotExist) || formatOf(d.options.Format, d.path) != disk.FormatRaw || len(p.flags.checkpoint) > 0 {
		return err
	}
	return fmt.Errorf("--disk file=%s: it does not exist: check the path, or create it (truncate -s 1G %s)", d.path, d.path)
}

// adviseOnPath says what to do where a socket or file cannot be made.
func adviseOnPath(err error) error {
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("%w: make its directory first", err)
	case errors.Is(err, os.ErrPermission), errors.Is(err, unix.EROFS):
		return fmt.Errorf("%w: choose a path that you may write", err)
	case errors.Is(err, unix.EADDRINUSE):
		return fmt.Errorf("%w: choose another one, or end who listens there", err)
	}
	return err
}

// openDisk opens a disk, as its owner if that is asked for, and with it what records
// its changes, or nil. A machine whose disk another wants stands still from then on.
func (p *plan) openDisk(ctx context.Context, d diskPlan) (block.Node, *changes.Recorder, error) {
	var recorder *changes.Recorder
	open := func() (block.Node, error) {
		n, err := disk.Open(d.path, d.options)
		if err != nil || !d.tracked {
			return n, err
		}
		recorder, err = changes.Open(changes.Path(d.path), n, changes.Options{Report: func(err error) {
			report("disk %s: its changes cannot be recorded any more, the next backup is of all of it: %v", d.path, err)
		}})
		if err != nil {
			n.Close()
			return nil, err
		}
		if d.owned { // the next owner finds both closed
			return changes.CloseWith(n, recorder), nil
		}
		return n, nil
	}
	if !d.owned {
		n, err := open()
		return n, recorder, err
	}
	n, err := owner.Open(ctx, d.path, open, owner.Options{
		Name: fmt.Sprintf("%s (process %d)", p.machine.Name, os.Getpid()),
		OnRelease: func(context.Context) error {
			m := p.running.Load()
			if m == nil {
				return errors.New("the machine is being started")
			}
			report("disk %s is released to another owner: the machine is paused; quit it, or restore it when the disk is free again", d.path)
			return m.PauseFor(fmt.Errorf("disk %s has been released to another owner", d.path))
		},
	})
	return n, recorder, err
}
