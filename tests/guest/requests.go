package guest

import (
	"context"
	"fmt"
	"strings"

	"github.com/gnomon-vmm/gnomon/tests/guest/wire"
)

// ask is Do for a command with a result.
func ask[R any](ctx context.Context, a *Agent, command wire.Command, args any) (R, error) {
	var result R
	err := a.Do(ctx, command, args, &result)
	return result, err
}

// Facts says what the guest is and how long it took to start.
func (a *Agent) Facts(ctx context.Context) (wire.FactsResult, error) {
	return ask[wire.FactsResult](ctx, a, wire.CommandFacts, nil)
}

// Exec runs a program or busybox applet and waits for it.
func (a *Agent) Exec(ctx context.Context, argv ...string) (wire.ExecResult, error) {
	return ask[wire.ExecResult](ctx, a, wire.CommandExec, wire.ExecArgs{Argv: argv})
}

// Run is Exec for a program that must succeed; it returns its output.
func (a *Agent) Run(ctx context.Context, argv ...string) (string, error) {
	r, err := a.Exec(ctx, argv...)
	if err != nil {
		return "", err
	}
	if r.Status != 0 {
		return r.Stdout, fmt.Errorf("%w: %s: status %d: %s", ErrAgent, strings.Join(argv, " "), r.Status, strings.TrimSpace(r.Stderr+r.Stdout))
	}
	return r.Stdout, nil
}

// MakeExt4 makes an ext4 file system, small enough in its metadata for a guest
// whose kernel is interpreted.
func (a *Agent) MakeExt4(ctx context.Context, device string) error {
	_, err := a.Run(ctx, "/sbin/mkfs.ext4", "-F", "-q", "-N", "256", "-J", "size=4", device)
	return err
}

// CheckExt4 checks an ext4 file system that is not mounted; it is an error if
// anything is wrong.
func (a *Agent) CheckExt4(ctx context.Context, device string) error {
	_, err := a.Run(ctx, "/sbin/fsck.ext4", "-f", "-n", device)
	return err
}

// Mount mounts a file system; options are those of mount(8), separated by
// commas.
func (a *Agent) Mount(ctx context.Context, source, target, fstype, options string) error {
	return a.Do(ctx, wire.CommandMount, wire.MountArgs{Source: source, Target: target, Type: fstype, Options: options}, nil)
}

// Unmount unmounts it.
func (a *Agent) Unmount(ctx context.Context, target string) error {
	return a.Do(ctx, wire.CommandUnmount, wire.PathArgs{Path: target}, nil)
}

// Write writes a pattern to a file or device of the guest.
func (a *Agent) Write(ctx context.Context, args wire.WriteArgs) (wire.SumResult, error) {
	return ask[wire.SumResult](ctx, a, wire.CommandWrite, args)
}

// Read hashes a file or device of the guest.
func (a *Agent) Read(ctx context.Context, args wire.ReadArgs) (wire.SumResult, error) {
	return ask[wire.SumResult](ctx, a, wire.CommandRead, args)
}

// GetFile returns up to wire.MaxOutput bytes of a file.
func (a *Agent) GetFile(ctx context.Context, path string) ([]byte, error) {
	r, err := ask[wire.DataResult](ctx, a, wire.CommandGetFile, wire.PathArgs{Path: path})
	return r.Data, err
}

// PutFile replaces a file.
func (a *Agent) PutFile(ctx context.Context, path string, data []byte, mode uint32) error {
	return a.Do(ctx, wire.CommandPutFile, wire.PutFileArgs{Path: path, Data: data, Mode: mode}, nil)
}

// DropCaches writes everything to disk and empties the guest's page cache.
func (a *Agent) DropCaches(ctx context.Context) error {
	return a.Do(ctx, wire.CommandDropCaches, nil, nil)
}

// Churn writes, reads and checks blocks until its time is over.
func (a *Agent) Churn(ctx context.Context, args wire.ChurnArgs) (wire.ChurnResult, error) {
	return ask[wire.ChurnResult](ctx, a, wire.CommandChurn, args)
}

// DHCP gives a network interface (eth0 if empty) an address by DHCP.
func (a *Agent) DHCP(ctx context.Context, iface string) (wire.DHCPResult, error) {
	return ask[wire.DHCPResult](ctx, a, wire.CommandDHCP, wire.LinkArgs{Interface: iface})
}

// SetAddress gives a network interface an address by hand.
func (a *Agent) SetAddress(ctx context.Context, args wire.AddressArgs) error {
	return a.Do(ctx, wire.CommandAddress, args, nil)
}

// Link returns the state of a network interface (eth0 if empty), switching it
// on first: an interface that is off shows no carrier.
func (a *Agent) Link(ctx context.Context, iface string) (wire.LinkResult, error) {
	return ask[wire.LinkResult](ctx, a, wire.CommandLink, wire.LinkArgs{Interface: iface})
}

// HTTPGet fetches an http URL from inside the guest.
func (a *Agent) HTTPGet(ctx context.Context, url string) (wire.HTTPGetResult, error) {
	return ask[wire.HTTPGetResult](ctx, a, wire.CommandHTTPGet, wire.HTTPGetArgs{URL: url})
}

// EchoTest sends a pattern from the guest to an echo server and checks what
// comes back.
func (a *Agent) EchoTest(ctx context.Context, args wire.EchoTestArgs) (wire.SumResult, error) {
	return ask[wire.SumResult](ctx, a, wire.CommandEchoTest, args)
}

// Random reads random bytes from a device of the guest, such as /dev/hwrng.
func (a *Agent) Random(ctx context.Context, source string, size int) ([]byte, error) {
	r, err := ask[wire.DataResult](ctx, a, wire.CommandRandom, wire.RandomArgs{Source: source, Size: size})
	return r.Data, err
}

// MemInfo returns how much memory the guest has.
func (a *Agent) MemInfo(ctx context.Context) (wire.MemInfoResult, error) {
	return ask[wire.MemInfoResult](ctx, a, wire.CommandMemInfo, nil)
}

// Fill allocates size bytes of the guest's memory under a name and fills them
// with a pattern; Verify hashes them again, Forget gives them back.
func (a *Agent) Fill(ctx context.Context, name string, seed uint64, size int64) (wire.SumResult, error) {
	return ask[wire.SumResult](ctx, a, wire.CommandFill, wire.FillArgs{Name: name, Seed: seed, Size: size})
}

// Verify hashes what Fill keeps; compare with wire.PatternSum.
func (a *Agent) Verify(ctx context.Context, name string) (wire.SumResult, error) {
	return ask[wire.SumResult](ctx, a, wire.CommandVerify, wire.NameArgs{Name: name})
}

// Forget gives back what Fill keeps.
func (a *Agent) Forget(ctx context.Context, name string) error {
	return a.Do(ctx, wire.CommandForget, wire.NameArgs{Name: name}, nil)
}

// Burn keeps so many of the guest's processors busy for ms milliseconds of its
// time.
func (a *Agent) Burn(ctx context.Context, cpus int, ms int64) (wire.BurnResult, error) {
	return ask[wire.BurnResult](ctx, a, wire.CommandBurn, wire.BurnArgs{CPUs: cpus, MS: ms})
}

// Clocks reads the guest's clocks.
func (a *Agent) Clocks(ctx context.Context) (wire.ClocksResult, error) {
	return ask[wire.ClocksResult](ctx, a, wire.CommandClocks, nil)
}

// Dmesg returns the end of the kernel's log, all of it if lines is 0.
func (a *Agent) Dmesg(ctx context.Context, lines int) (string, error) {
	r, err := ask[wire.TextResult](ctx, a, wire.CommandDmesg, wire.DmesgArgs{Lines: lines})
	return r.Text, err
}

// Events counts what has happened to the guest.
func (a *Agent) Events(ctx context.Context) (wire.EventsResult, error) {
	return ask[wire.EventsResult](ctx, a, wire.CommandEvents, nil)
}

// PowerOff, Reboot and Panic end the guest in their several ways. They return
// once the guest has agreed; the stream ends later.
func (a *Agent) PowerOff(ctx context.Context) error {
	return a.Do(ctx, wire.CommandPowerOff, nil, nil)
}

// Reboot is described at PowerOff.
func (a *Agent) Reboot(ctx context.Context) error { return a.Do(ctx, wire.CommandReboot, nil, nil) }

// Panic is described at PowerOff.
func (a *Agent) Panic(ctx context.Context) error { return a.Do(ctx, wire.CommandPanic, nil, nil) }
