package snapshot

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/gnomon-vmm/gnomon/mm/checkpoint"
	"github.com/gnomon-vmm/gnomon/mm/guestmem"
	"github.com/gnomon-vmm/gnomon/mm/pager"
	"github.com/gnomon-vmm/gnomon/vmm"
)

// Image is an opened checkpoint from which machines can be made.
type Image struct {
	path   string
	reader *checkpoint.Reader
	state  []vmm.Section
	recipe []byte
	disks  []SavedDisk
	left   []SavedDisk
}

// Open opens a checkpoint and its parents.
func Open(path string) (*Image, error) {
	r, err := checkpoint.Open(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRestore, err)
	}
	i := &Image{path: path, reader: r}
	if err := i.read(); err != nil {
		r.Close()
		return nil, fmt.Errorf("%w: %w", ErrRestore, err)
	}
	return i, nil
}

// read reads all sections. One that is not known is refused by its name: it
// holds something that the machine would lack.
func (i *Image) read() error {
	for _, s := range i.reader.Sections() {
		version, data, err := i.reader.Section(s.Name)
		if err != nil {
			return err
		}
		name, state := strings.CutPrefix(s.Name, statePrefix)
		switch {
		case state:
			i.state = append(i.state, vmm.Section{Name: name, Version: version, Data: data})
		case s.Name != sectionRecipe && s.Name != sectionDisks && s.Name != sectionLeft:
			return fmt.Errorf("%s: section %q is not known: it was made by a newer Gnomon", i.path, s.Name)
		case version > sectionVersion:
			return fmt.Errorf("%s: section %q has version %d, of a newer Gnomon", i.path, s.Name, version)
		case s.Name == sectionDisks:
			if i.disks, err = decodeDisks(s.Name, data); err != nil {
				return fmt.Errorf("%s: %w", i.path, err)
			}
		case s.Name == sectionLeft:
			if i.left, err = decodeDisks(s.Name, data); err != nil {
				return fmt.Errorf("%s: %w", i.path, err)
			}
		default:
			i.recipe = data
		}
	}
	return nil
}

// UUID is that of the machine that was saved; zero if its state does not tell.
func (i *Image) UUID() vmm.UUID { return vmm.SavedUUID(i.state) }

// Parents are the paths of the files that the checkpoint needs beside its own.
func (i *Image) Parents() []string { return i.reader.Parents() }

// Recipe is what NewSaver was given; nil: nothing.
func (i *Image) Recipe() []byte { return i.recipe }

// Disks are the machine's disks in their order, as the checkpoint keeps them; nil:
// it keeps none.
func (i *Image) Disks() []SavedDisk { return i.disks }

// LeftDisks are the machine's disks in their order where the checkpoint keeps none,
// as the machine had them when it was saved; nil: it is not known. Their files may
// have changed since. A File that is "" was none that can be named.
func (i *Image) LeftDisks() []SavedDisk { return i.left }

// Close closes the files, once all machines made from them have loaded their
// memory or are closed.
func (i *Image) Close() error { return i.reader.Close() }

// Options say how a machine's memory is loaded.
type Options struct {
	Policy pager.Policy
	// NoBackground leaves in the file what nobody asks for.
	NoBackground bool
	// Pager, where not nil, changes the pager's further options.
	Pager func(*pager.Options)
	// ClockGoesOn and KeepGenerationID are vmm.Restore's.
	ClockGoesOn, KeepGenerationID bool
}

// Machine is a machine whose memory is being loaded.
type Machine struct {
	*vmm.Machine
	Pager *pager.Pager

	image *Image
}

// Restore makes a machine of the checkpoint; Run has it go on. cfg describes the
// same devices as those of the machine that was saved. A machine whose memory
// cannot be loaded pauses.
func (i *Image) Restore(cfg vmm.Config, o Options) (*Machine, error) {
	m := &Machine{image: i}
	ready := make(chan struct{}) // closed when m.Machine is set, or is not going to be
	po := pager.Options{Policy: o.Policy}
	if o.Policy&pager.Recorded != 0 {
		var err error
		if po.Recorded, err = i.recorded(o.Policy, cfg.Log); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrRestore, err)
		}
	}
	if o.Pager != nil {
		o.Pager(&po)
	}
	log := cfg.Log
	po.OnError = func(err error) {
		<-ready
		if m.Machine != nil {
			m.Machine.Fail(fmt.Errorf("%w: %w", ErrRestore, err))
			m.Pager.Close() // which ends the wait of who wants that memory
		} else if log != nil {
			log("%v", err)
		}
	}
	cfg.Restore = &vmm.Restore{
		Sections: i.state, ClockGoesOn: o.ClockGoesOn, KeepGenerationID: o.KeepGenerationID,
		Prepare: func(mem *guestmem.Memory) (err error) {
			if m.Pager, err = pager.New(mem, i.reader, po); err == nil {
				m.Pager.Start()
			}
			return err
		},
	}
	machine, err := vmm.New(cfg)
	if err != nil {
		if m.Pager != nil {
			m.Pager.Close()
		}
		close(ready)
		return nil, fmt.Errorf("%w: %w", ErrRestore, err)
	}
	m.Machine = machine
	close(ready)
	if !o.NoBackground {
		// Not before: each page that comes into the memory of a machine whose parts
		// are being made has KVM's calls that make them wait.
		m.Pager.LoadInBackground()
	}
	return m, nil
}

// recorded loads what an earlier run wanted, if there is such a file. One that
// cannot be used is only told of where the policy has something else to go by.
func (i *Image) recorded(policy pager.Policy, log func(string, ...any)) ([]pager.Block, error) {
	blocks, err := pager.LoadRecorded(pager.RecordedPath(i.path), i.reader.ID())
	switch {
	case err == nil:
		return blocks, nil
	case errors.Is(err, fs.ErrNotExist):
		if policy == pager.Recorded && log != nil {
			log("nothing was recorded beside %s yet: pages come one by one; record with --record, or go by --prefetch locality too", i.path)
		}
		return nil, nil
	case policy == pager.Recorded:
		return nil, fmt.Errorf("%w: remove the file, or go by another policy", err)
	case log != nil:
		log("%v: it is not used; remove the file, or record anew", err)
	}
	return nil, nil
}

// Close closes the machine, and the pager.
func (m *Machine) Close() error {
	// A vCPU or a device that waits for a page must not be waited for; what a vCPU
	// does that loses its memory must not be taken for the guest's wish.
	m.Quit()
	return errors.Join(m.Pager.Close(), m.Machine.Close())
}

// CheckRecordable tells whether SaveRecorded can be expected to succeed.
func (i *Image) CheckRecordable() error { return pager.CheckRecordable(pager.RecordedPath(i.path)) }

// SaveRecorded keeps which blocks were wanted so far beside the checkpoint, for
// the policy pager.Recorded of later restores.
func (m *Machine) SaveRecorded() error {
	return pager.SaveRecorded(pager.RecordedPath(m.image.path), m.image.reader.ID(), m.Pager.RecordedSet())
}
