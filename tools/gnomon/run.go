package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/gnomon-vmm/gnomon/kvm"
	"github.com/gnomon-vmm/gnomon/vmm"
	"github.com/gnomon-vmm/gnomon/vmm/monitor"
	"github.com/gnomon-vmm/gnomon/vmm/snapshot"
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

	restoring  bool     // of gnomon restore: the kernel may be missing
	checkpoint []string // files that are restored from
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

A comma in a file's name is written twice. Sizes are as in 512M or 2G.

Exit status: 0 the guest powered off, or was told to quit (QMP, Ctrl-a x, a
signal); 1 an error; 2 wrong usage; 3 the guest's kernel panicked; 4 the guest
reset itself (--no-reboot).`,
		Example: `  gnomon run --kernel bzImage --initrd initrd.img --append console=ttyS0
  gnomon run --kernel vmlinuz --append "root=/dev/vda console=ttyS0" --memory 1G --cpus 2 \
      --disk file=disk.qcow2 --net user,forward=tcp:8080:80`,
		Args: usageArgs(cobra.NoArgs),
	}
	addRunFlags(cmd, &f)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if f.config != "" {
			if err := applyConfig(cmd.Flags(), f.config); err != nil {
				return err
			}
		}
		if cmd.Flags().Changed("vsock") && f.vsock == "" {
			return usageError(errors.New("--vsock is empty: write cid=N,path=P, or leave it out"))
		}
		p, err := f.plan()
		if err != nil {
			return err
		}
		if p.recipe, err = recipe(cmd.Flags()); err != nil {
			return err
		}
		return run(cmd.Context(), p, buildNew)
	}
	return cmd
}

// addRunFlags gives a command the flags that describe a machine.
func addRunFlags(cmd *cobra.Command, f *runFlags) {
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
	flags.StringArrayVar(&f.disks, "disk", nil, "virtio `disk`: file=F[,format=raw|qcow2][,readonly=on][,id=ID][,serial=S][,queues=N] and more (docs/cli.md)")
	flags.StringArrayVar(&f.nets, "net", []string{"user"}, "virtio `network`: user[,forward=tcp:8080:80][,restrict=on]|tap=NAME|none; [,mac=M]")
	flags.StringVar(&f.vsock, "vsock", "", "virtio `socket`: cid=N,path=P; the unix socket P leads to the guest, P_PORT is what it dials")
	flags.StringVar(&f.serial, "serial", "stdio", "serial `port`: stdio|file:P[,append=on]|unix:P|null")
	flags.StringVar(&f.console, "console", "", "virtio `console`, besides the serial port: file:P[,append=on]|unix:P|stdio|null")
	flags.StringArrayVar(&f.qmp, "qmp", nil, "another QMP socket's `address`: unix:P|tcp:HOST:PORT")
	flags.BoolVar(&f.paused, "paused", false, "do not start the vCPUs; the QMP command cont does")
	flags.BoolVar(&f.noReboot, "no-reboot", false, "end when the guest resets itself")
	flags.BoolVar(&f.noBalloon, "no-balloon", false, "leave the balloon out")
	flags.BoolVar(&f.noRNG, "no-rng", false, "leave the entropy device out")
	flags.BoolVar(&f.quiet, "quiet", false, "tell errors only")
	completeFlag(cmd, "net", "user", "tap=", "none")
	completeFlag(cmd, "serial", "stdio", "file:", "unix:", "null")
	completeFlag(cmd, "console", "stdio", "file:", "unix:")
}

// run runs the machine of a plan, which build makes.
func run(ctx context.Context, p *plan, build func(vmm.Config) (*built, error)) (err error) {
	ctx, quit := context.WithCancel(ctx)
	defer quit()
	// Before anything is made that a host without KVM has no use for.
	sys, err := kvm.Open()
	if err != nil {
		return err
	}
	sys.Close()

	info := machineInfo{
		Name: p.machine.Name, UUID: p.machine.UUID.String(), PID: os.Getpid(),
		CPUs: p.machine.CPUs, Memory: p.machine.Memory, Started: time.Now(),
	}
	entry, err := register(&info)
	if err != nil {
		return err
	}
	defer entry.remove()

	log := &startLog{quiet: p.flags.quiet}
	p.machine.Log = log.printf
	var undo opened
	defer func() { undo.close() }()
	if err := p.open(ctx, &undo, quit); err != nil {
		return err
	}
	// A vCPU in KVM_RUN keeps its processor slot in the Go scheduler for a
	// while; with one slot more for each, device work never waits for it.
	runtime.GOMAXPROCS(runtime.NumCPU() + p.machine.CPUs)
	b, err := build(p.machine)
	if err != nil {
		return err
	}
	m := b.machine
	p.running.Store(m)
	undo = nil // the machine closes it all now
	if p.machine.Kernel != nil && p.machine.Kernel.Linux() {
		// Decompressing it left tens of MiB that nobody needs any more.
		go debug.FreeOSMemory()
	}
	defer func() { err = errors.Join(err, b.close()) }()

	options := append(b.options, monitor.WithSaver(snapshot.NewSaver(m, p.recipe, b.pager)))
	server, err := monitor.Listen(m, append([]string{"unix:" + info.QMP}, p.flags.qmp...), options...)
	if err != nil {
		return adviseOnPath(err)
	}
	defer server.Close()

	m.Observe(reportDiskErrors())
	log.flush()
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

// report tells of an error that does not end the machine.
func report(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "gnomon: %s\n", oneLine(fmt.Errorf(format, args...)))
}

// reportDiskErrors returns an observer that reports each disk's first error.
func reportDiskErrors() func(vmm.Event) {
	var seen sync.Map
	return func(e vmm.Event) {
		failed, ok := e.(vmm.BlockIOError)
		if !ok {
			return
		}
		if _, again := seen.LoadOrStore(failed.Device, true); !again {
			report("disk %s: %s failed: %v: the guest is told and goes on; of later errors only QMP tells (BLOCK_IO_ERROR)",
				failed.Device, failed.Operation, failed.Err)
		}
	}
}

// startLog holds back what there is to tell of a machine until it starts: of
// one that does not start, only the error is worth reading.
type startLog struct {
	quiet bool

	mu      sync.Mutex
	started bool     // guarded by mu
	lines   []string // guarded by mu
}

func (l *startLog) printf(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch line := fmt.Sprintf("gnomon: "+format+"\n", args...); {
	case l.quiet:
	case l.started:
		fmt.Fprint(os.Stderr, line)
	default:
		l.lines = append(l.lines, line)
	}
}

func (l *startLog) flush() {
	l.mu.Lock()
	defer l.mu.Unlock()
	fmt.Fprint(os.Stderr, strings.Join(l.lines, ""))
	l.started, l.lines = true, nil
}
