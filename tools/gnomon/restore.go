package main

import (
	"fmt"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/gnomon-vmm/gnomon/mm/pager"
	"github.com/gnomon-vmm/gnomon/vmm"
	"github.com/gnomon-vmm/gnomon/vmm/monitor"
	"github.com/gnomon-vmm/gnomon/vmm/snapshot"
)

// ownOfARun are the flags of a machine's run that a checkpoint does not keep:
// whoever restores it says them anew.
var ownOfARun = []string{"config", "help", "name", "uuid", "serial", "qmp", "paused", "quiet", "no-reboot", "kernel", "initrd", "append"}

// fixedByCheckpoint are flags of gnomon run that gnomon restore has not.
var fixedByCheckpoint = []string{"config", "uuid", "cpus", "memory", "no-balloon", "no-rng"}

// recipe is what restores a machine that runs by these flags.
func recipe(flags *pflag.FlagSet) ([]byte, error) { return valuesOf(flags, ownOfARun...) }

func newRestoreCommand() *cobra.Command {
	var f runFlags
	var r restoreFlags
	cmd := &cobra.Command{
		Use:   "restore FILE [flags]",
		Short: "Go on with a machine from a checkpoint",
		Long: `Go on with the machine that a checkpoint holds, in the foreground, at once: its memory is read as the guest wants it,
with what it is likely to want next, and the rest in the background.

The machine has the devices of the one that was saved, by the same flags; those given here win over them. The clock
stands where it stood, or with --clock host goes on by the time that has passed. It runs at once, also if it was paused
when it was saved, unless --paused is given. The file must stay as it is until all of it has been read. A guest that
resets itself ends, unless --kernel tells what it then starts.

Disks that can be written stay as the checkpoint needs them: the machine writes to new overlays beside the checkpoint,
FILE.NAME.DISK.qcow2, which stay unless --snapshot removes them. --disk says where their images lie now, of all disks in
their order or each by its id=; an image that was written to since is refused unless --accept-changed-disks. Disks that
the checkpoint leaves to you (--disks none) are those the machine had when it was saved, or those of --disk; they are
written to, unless --snapshot gives them overlays that go at the end.

What the guest says is added to the files of --serial and --console; append=off empties them.

The exit status is that of gnomon run.`,
		Example: `  gnomon restore vm1.ckpt --name vm1-again
  gnomon restore vm1.ckpt --prefetch locality,recorded --record --net none`,
		Args: usageArgs(cobra.ExactArgs(1)),
	}
	addRunFlags(cmd, &f)
	for _, name := range fixedByCheckpoint {
		_ = cmd.Flags().MarkHidden(name)
	}
	flags := cmd.Flags()
	flags.StringVar(&r.prefetch, "prefetch", "locality", "`what` comes along with the page the guest wants: none|physical|locality|recorded, several with commas")
	flags.BoolVar(&r.record, "record", false, "at the end, keep beside the checkpoint what the guest wanted, for --prefetch recorded")
	flags.BoolVar(&r.noBackground, "no-background", false, "leave in the file what the guest does not want")
	flags.BoolVar(&r.snapshot, "snapshot", false, "have the machine write to its disks in overlays only, and remove them at the end")
	flags.BoolVar(&r.changedDisks, "accept-changed-disks", false, "go on although files of disks were written to since the checkpoint was taken")
	flags.StringVar(&r.clock, "clock", "guest", "`whose` clock the guest goes on by: guest (it stands where it stood)|host (it goes on by the time that has passed)")
	completeFlag(cmd, "prefetch", "none", "physical", "locality", "locality,recorded")
	completeFlag(cmd, "clock", "guest", "host")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		for _, name := range fixedByCheckpoint {
			if flags.Changed(name) {
				return usageError(fmt.Errorf("--%s: the checkpoint says that", name))
			}
		}
		o, err := r.options()
		if err != nil {
			return usageError(err)
		}
		image, err := snapshot.Open(args[0])
		if err != nil {
			return explainNoCheckpoint(args[0], err)
		}
		defer image.Close()
		f.checkpoint = append([]string{args[0]}, image.Parents()...)
		if len(image.Recipe()) == 0 {
			return fmt.Errorf("checkpoint %s does not say how to make its machine: it was not made by gnomon run; restore it by the library that made it", args[0])
		}
		named := flags.Changed("disk")
		if err := applyValues(flags, image.Recipe()); err != nil {
			return fmt.Errorf("checkpoint %s: %w", args[0], err)
		}
		f.restoring = true
		var made overlays
		defer func() {
			if r.snapshot || !made.inUse {
				made.remove()
			}
		}()
		if err := made.prepare(image, args[0], &f, named, &r); err != nil {
			return err
		}
		p, err := f.plan()
		if err != nil {
			return err
		}
		if p.recipe, err = recipe(flags); err != nil {
			return err
		}
		return run(cmd.Context(), p, func(cfg vmm.Config) (*built, error) {
			b, err := r.build(image, cfg, o)
			made.inUse = err == nil
			return b, err
		})
	}
	return cmd
}

type restoreFlags struct {
	prefetch, clock                string
	record, noBackground, snapshot bool
	changedDisks                   bool
}

func (r *restoreFlags) options() (o snapshot.Options, err error) {
	if o.Policy, err = pager.ParsePolicy(r.prefetch); err != nil {
		return o, fmt.Errorf("--prefetch: %w", err)
	}
	o.NoBackground = r.noBackground
	switch r.clock {
	case "guest":
	case "host":
		o.ClockGoesOn = true
	default:
		return o, fmt.Errorf("--clock %q: guest and host are possible", r.clock)
	}
	return o, nil
}

// build makes the machine of a checkpoint.
func (r *restoreFlags) build(image *snapshot.Image, cfg vmm.Config, o snapshot.Options) (*built, error) {
	m, err := image.Restore(cfg, o)
	if err != nil {
		return nil, err
	}
	b := &built{machine: m.Machine, pager: m.Pager, close: m.Close, options: []monitor.Option{monitor.WithPager(m.Pager)}}
	if r.record {
		if err := image.CheckRecordable(); err != nil {
			report("--record: what the guest wants will not be kept: %v: make room, or choose a directory that you may write", err)
			return b, nil
		}
		b.close = func() error {
			// The recorded set is known while the pager is there. The guest has
			// ended well, whatever becomes of it.
			if err := m.SaveRecorded(); err != nil {
				report("--record: what the guest wanted is not kept: %v", err)
			}
			return m.Close()
		}
	}
	return b, nil
}

// built is a machine ready to run, and how it is closed.
type built struct {
	machine *vmm.Machine
	pager   *pager.Pager // nil: the machine begins
	close   func() error
	options []monitor.Option
}

// buildNew makes a machine that begins.
func buildNew(cfg vmm.Config) (*built, error) {
	m, err := vmm.New(cfg)
	if err != nil {
		return nil, err
	}
	return &built{machine: m, close: m.Close}, nil
}
