package main

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/tests/guest/probe"
)

// mailbox is the page of guest memory through which the probe guest talks.
type mailbox struct{ page []byte }

func openMailbox(g *guest) (*mailbox, error) {
	f, err := g.ramFile()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	page, err := unix.Mmap(int(f.Fd()), probe.MailboxAddr, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	return &mailbox{page}, nil
}

// tsc is the guest's TSC at its last count.
func (m *mailbox) tsc() uint64 { return binary.NativeEndian.Uint64(m.page[probe.MailboxTSC:]) }

// stop ends spin and wait.
func (m *mailbox) stop() { m.page[probe.MailboxStop] = 1 }

func (m *mailbox) close() { _ = unix.Munmap(m.page) }
