package tests

import (
	"context"
	"fmt"
	"log"

	"github.com/gnomon-vmm/gnomon/disk"
	"github.com/gnomon-vmm/gnomon/tests/guest/probe"
	"github.com/gnomon-vmm/gnomon/vmm"
	"github.com/gnomon-vmm/gnomon/vmm/boot"
	"github.com/gnomon-vmm/gnomon/vmm/chardev"
	"github.com/gnomon-vmm/gnomon/vmm/monitor"
	"github.com/gnomon-vmm/gnomon/vmm/netdev"
)

// A machine from Go: the README's and docs/library.md's first example.
func Example() {
	path, err := probe.Path() // any bzImage or vmlinux
	if err != nil {
		log.Fatal(err)
	}
	kernel, err := boot.OpenKernel(path)
	if err != nil {
		log.Fatal(err)
	}
	m, err := vmm.New(vmm.Config{CPUs: 1, Memory: 64 << 20, Kernel: kernel, Cmdline: "boot"})
	if err != nil {
		log.Fatal(err)
	}
	defer m.Close()
	m.Observe(func(e vmm.Event) {
		if s, ok := e.(vmm.Shutdown); ok {
			fmt.Println("shutdown:", s.Reason)
		}
	})
	exit, err := m.Run(context.Background())
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("exit:", exit)
	// Output:
	// shutdown: guest-shutdown
	// exit: power-off
}

// Linux with a disk, a network, the serial port at this terminal and a QMP
// socket: docs/library.md's second example.
func Example_devices() {
	ctx, quit := context.WithCancel(context.Background())
	defer quit()
	kernel, err := boot.OpenKernel("vmlinuz")
	if err != nil {
		log.Fatal(err)
	}
	node, err := disk.Open("disk.img", disk.Options{})
	if err != nil {
		log.Fatal(err)
	}
	network, err := netdev.NewUser(netdev.UserConfig{})
	if err != nil {
		log.Fatal(err)
	}
	serial, err := chardev.Open("stdio", chardev.Options{Label: "serial0", Exit: quit})
	if err != nil {
		log.Fatal(err)
	}
	m, err := vmm.New(vmm.Config{
		CPUs: 2, Memory: 1 << 30,
		Kernel: kernel, Cmdline: "console=ttyS0 root=/dev/vda",
		Disks:  []vmm.Disk{{Node: node}},
		Nets:   []vmm.Net{{Backend: network}},
		Serial: serial,
	})
	if err != nil {
		log.Fatal(err)
	}
	defer m.Close() // kernel, disk, network and terminal included
	server, err := monitor.Listen(m, []string{"unix:/run/user/1000/vm.sock"})
	if err != nil {
		log.Fatal(err)
	}
	defer server.Close()
	exit, err := m.Run(ctx)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("exit:", exit)
}
