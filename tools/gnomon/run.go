package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"time"

	"github.com/spf13/cobra"

	"github.com/gnomon-vmm/gnomon/disk"
	"github.com/gnomon-vmm/gnomon/vmm"
	"github.com/gnomon-vmm/gnomon/vmm/boot"
	"github.com/gnomon-vmm/gnomon/vmm/chardev"
	"github.com/gnomon-vmm/gnomon/vmm/monitor"
	"github.com/gnomon-vmm/gnomon/vmm/netdev"
	"github.com/gnomon-vmm/gnomon/vmm/vsockhost"
)

// runFlags are the flags of gnomon run as the user wrote them.
type runFlags struct {
	config  string
	name    string
	uuid    string
	kernel  string
	initrd  string
	append  string
	cpus    int
	memory  string
	disks   []string
	nets    []string
	vsock   string
	serial  string
	console string
	qmp     []string

	paused    bool
	noReboot  bool
	noBalloon bool
	noRNG     bool
	quiet     bool
}

func newRunCommand() *cobra.Command {
	var f runFlags
	cmd := &cobra.Command{
		Use:   "run --kernel FILE [flags]",
		Short: "Run a virtual machine in the foreground",
		Long: `Run a virtual machine in the foreground until it powers off.

The kernel is a bzImage or an ELF file (vmlinux, or any with a PVH note). The
serial port is at this terminal: Ctrl-a x ends the machine, Ctrl-a h tells the
other keys. Other commands reach the machine by its name; gnomon ps lists names.

Exit status: 0 the guest powered off, or was told to quit; 1 an error; 2 wrong
usage; 3 the guest's kernel panicked; 4 the guest reset itself (--no-reboot).`,
		Example: `  gnomon run --kernel bzImage --initrd initrd.img --append console=ttyS0
  gnomon run --kernel vmlinuz --append "root=/dev/vda console=ttyS0" --memory 1G --cpus 2 \
      --disk file=disk.qcow2 --net user,forward=tcp:8080:80`,
		Args: usageArgs(cobra.NoArgs),
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.StringVar(&f.config, "config", "", "JSON `file` whose keys are the names of these flags; flags win over it")
	flags.StringVar(&f.name, "name", "", "machine name (default gnomon-PID)")
	flags.StringVar(&f.uuid, "uuid", "", "machine `UUID` (default: a random one)")
	flags.StringVar(&f.kernel, "kernel", "", "kernel `file`: bzImage or ELF")
	flags.StringVar(&f.initrd, "initrd", "", "initial RAM disk `file`")
	flags.StringVar(&f.append, "append", "", "kernel command `line`")
	flags.IntVar(&f.cpus, "cpus", 1, "`number` of vCPUs")
	flags.StringVar(&f.memory, "memory", "128M", "`size` of RAM; MiB without a suffix")
	flags.StringArrayVar(&f.disks, "disk", nil, "virtio disk: `file=F[,format=raw|qcow2][,readonly=on][,id=ID][,serial=S][,queues=N]`")
	flags.StringArrayVar(&f.nets, "net", []string{"user"}, "network: `user[,forward=tcp:8080:80]|tap=NAME|none`[,mac=M]")
	flags.StringVar(&f.vsock, "vsock", "", "virtio socket: `cid=N,path=P`; P is a unix socket, P_PORT what the guest dials")
	flags.StringVar(&f.serial, "serial", "stdio", "serial port: `stdio|file:P|unix:P|null`")
	flags.StringVar(&f.console, "console", "", "virtio console, besides the serial port: `file:P|unix:P|stdio`")
	flags.StringArrayVar(&f.qmp, "qmp", nil, "another QMP socket: `unix:P|tcp:HOST:PORT`")
	flags.BoolVar(&f.paused, "paused", false, "do not start the vCPUs; the QMP command cont does")
	flags.BoolVar(&f.noReboot, "no-reboot", false, "end when the guest resets itself")
	flags.BoolVar(&f.noBalloon, "no-balloon", false, "leave the balloon out")
	flags.BoolVar(&f.noRNG, "no-rng", false, "leave the entropy device out")
	flags.BoolVar(&f.quiet, "quiet", false, "tell errors only")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if f.config != "" {
			if err := applyConfig(cmd.Flags(), f.config); err != nil {
				return err
			}
		}
		return run(cmd, &f)
	}
	return cmd
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

func run(cmd *cobra.Command, f *runFlags) (err error) {
	ctx, quit := context.WithCancel(cmd.Context())
	defer quit()
	var undo opened
	defer func() { undo.close() }()

	cfg, err := f.machine(&undo, quit)
	if err != nil {
		return err
	}
	if !f.quiet {
		cfg.Log = func(format string, args ...any) { fmt.Fprintf(os.Stderr, "gnomon: "+format+"\n", args...) }
	}
	// A vCPU in KVM_RUN keeps its processor slot in the Go scheduler for a
	// while; with one slot more for each, device work never waits for it.
	runtime.GOMAXPROCS(runtime.NumCPU() + cfg.CPUs)

	info := machineInfo{
		Name: cfg.Name, UUID: cfg.UUID.String(), PID: os.Getpid(),
		CPUs: cfg.CPUs, Memory: cfg.Memory, Started: time.Now(),
	}
	entry, err := register(&info)
	if err != nil {
		return err
	}
	defer entry.remove()

	m, err := vmm.New(*cfg)
	if err != nil {
		return err
	}
	undo = nil // the machine closes it all now
	if cfg.Kernel.Linux() {
		// Decompressing it left tens of MiB that nobody needs any more.
		go debug.FreeOSMemory()
	}
	defer func() { err = errors.Join(err, m.Close()) }()

	server, err := monitor.Listen(m, append([]string{"unix:" + info.QMP}, f.qmp...)...)
	if err != nil {
		return err
	}
	defer server.Close()

	exit, err := m.Run(ctx)
	if err != nil {
		return err
	}
	switch exit {
	case vmm.ExitPanic:
		return &exitStatus{statusPanic, errors.New("the guest's kernel panicked")}
	case vmm.ExitReset:
		return &exitStatus{status: statusReset}
	}
	return nil
}

// machine opens what the flags name. What must be closed if the machine is
// not built is added to undo; quit is what Ctrl-a x does.
func (f *runFlags) machine(undo *opened, quit func()) (*vmm.Config, error) {
	cfg := &vmm.Config{
		Name: f.name, CPUs: f.cpus, Cmdline: f.append,
		Paused: f.paused, NoReboot: f.noReboot, NoBalloon: f.noBalloon, NoRNG: f.noRNG,
	}
	if cfg.Name == "" {
		cfg.Name = fmt.Sprintf("gnomon-%d", os.Getpid())
	}
	cfg.UUID = vmm.NewUUID()
	var err error
	if f.uuid != "" {
		if cfg.UUID, err = vmm.ParseUUID(f.uuid); err != nil {
			return nil, usageError(err)
		}
	}
	if cfg.Memory, err = parseSize(f.memory, 1<<20); err != nil {
		return nil, usageError(fmt.Errorf("--memory: %w", err))
	}
	if f.kernel == "" {
		return nil, usageError(errors.New("no --kernel: name a bzImage or an ELF vmlinux"))
	}
	if cfg.Kernel, err = boot.OpenKernel(f.kernel); err != nil {
		return nil, err
	}
	undo.add(cfg.Kernel.Close)
	if f.initrd != "" {
		file, err := os.Open(f.initrd)
		if err != nil {
			return nil, fmt.Errorf("initial RAM disk: %w", err)
		}
		undo.add(file.Close)
		st, err := file.Stat()
		if err != nil {
			return nil, fmt.Errorf("initial RAM disk: %w", err)
		}
		cfg.Initrd, cfg.InitrdSize = file, st.Size()
	}
	for _, text := range f.disks {
		d, err := openDisk(text)
		if err != nil {
			return nil, err
		}
		undo.add(d.Node.Close)
		cfg.Disks = append(cfg.Disks, d)
	}
	for _, text := range f.nets {
		if err := openNet(cfg, text, undo); err != nil {
			return nil, err
		}
	}
	if f.vsock != "" {
		if cfg.Vsock, err = openVsock(f.vsock); err != nil {
			return nil, err
		}
		undo.add(cfg.Vsock.Host.Close)
	}
	if cfg.Serial, err = chardev.Open(f.serial, chardev.Options{Label: "serial0", Exit: quit}); err != nil {
		return nil, fmt.Errorf("--serial: %w", err)
	}
	undo.add(cfg.Serial.Close)
	if f.console != "" {
		if cfg.Console, err = chardev.Open(f.console, chardev.Options{Label: "console0", Exit: quit}); err != nil {
			return nil, fmt.Errorf("--console: %w", err)
		}
		undo.add(cfg.Console.Close)
	}
	return cfg, nil
}

func openDisk(text string) (vmm.Disk, error) {
	o, err := parseOptions("disk", text, "file", "format", "readonly", "id", "serial", "queues")
	if err != nil {
		return vmm.Disk{}, err
	}
	path, err := o.need("file")
	if err != nil {
		return vmm.Disk{}, err
	}
	format, err := o.oneOf("format", "", disk.FormatRaw, disk.FormatQcow2)
	if err != nil {
		return vmm.Disk{}, err
	}
	readOnly, err := o.onOff("readonly")
	if err != nil {
		return vmm.Disk{}, err
	}
	queues, err := o.number("queues", 0, 1, vmm.MaxCPUs)
	if err != nil {
		return vmm.Disk{}, err
	}
	node, err := disk.Open(path, disk.Options{Format: format, ReadOnly: readOnly})
	if err != nil {
		return vmm.Disk{}, err
	}
	return vmm.Disk{ID: o.values["id"], Node: node, Serial: o.values["serial"], Queues: int(queues)}, nil
}

func openNet(cfg *vmm.Config, text string, undo *opened) error {
	spec, err := netdev.Parse(text)
	if err != nil {
		return usageError(fmt.Errorf("--net: %w", err))
	}
	if spec.Kind == netdev.KindNone {
		return nil
	}
	backend, err := spec.Open()
	if err != nil {
		return fmt.Errorf("--net %s: %w", text, err)
	}
	undo.add(backend.Close)
	cfg.Nets = append(cfg.Nets, vmm.Net{Backend: backend, MAC: spec.MAC})
	return nil
}

func openVsock(text string) (*vmm.Vsock, error) {
	o, err := parseOptions("vsock", text, "cid", "path")
	if err != nil {
		return nil, err
	}
	if _, err := o.need("cid"); err != nil {
		return nil, err
	}
	path, err := o.need("path")
	if err != nil {
		return nil, err
	}
	cid, err := o.number("cid", 0, 3, 0xFFFF_FFFE)
	if err != nil {
		return nil, err
	}
	host, err := vsockhost.Listen(path)
	if err != nil {
		return nil, fmt.Errorf("--vsock %s: %w", text, err)
	}
	return &vmm.Vsock{CID: uint32(cid), Host: host}, nil
}
