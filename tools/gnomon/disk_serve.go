package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/gnomon-vmm/gnomon/disk"
	"github.com/gnomon-vmm/gnomon/disk/nbd"
)

func newDiskServeCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "serve FILE [--listen ADDRESS] [--read-only]",
		Short: "Serve an image by NBD until interrupted",
		Long: `Serve an image by NBD until interrupted. ADDRESS is unix:PATH or HOST:PORT. Whoever can connect can read the disk, and
write it without --read-only: on an address that others reach, use --tls-creds.`,
		Example: `  gnomon disk serve disk.qcow2 --listen unix:/tmp/disk.sock
  qemu-img info nbd+unix:///?socket=/tmp/disk.sock`,
		Args: usageArgs(cobra.ExactArgs(1)),
	}
	flags := cmd.Flags()
	format := addFormatFlag(cmd, "format", "f", "`format`: raw|qcow2 (default: what the name says)")
	listen := flags.String("listen", "localhost:10809", "`address`: unix:PATH or HOST:PORT")
	name := flags.String("export-name", "", "`name` by which clients ask for the disk")
	readOnly := flags.Bool("read-only", false, "do not let clients write")
	cache := addCacheFlag(cmd, "cache", "", "`cache` mode")
	engine := addAIOFlag(cmd)
	creds := flags.String("tls-creds", "", "`directory` with server-cert.pem, server-key.pem and, to verify clients, ca-cert.pem, as for QEMU")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		options, err := diskOptions(disk.Options{Format: *format, ReadOnly: *readOnly}, *cache, *engine)
		if err != nil {
			return err
		}
		if err := nbd.CheckAddress(*listen); err != nil {
			return usageError(err)
		}
		n, err := disk.Open(args[0], options)
		if err != nil {
			return err
		}
		defer func() {
			if err := n.Close(); err != nil {
				report("%s: %v", args[0], err)
			}
		}()
		o := nbd.ServerOptions{Report: func(err error) { report("%v", err) }}
		if *creds != "" {
			_, statErr := os.Stat(*creds + "/ca-cert.pem")
			if o.TLS, err = nbd.ServerTLS(*creds, statErr == nil); err != nil {
				return err
			}
		}
		server := nbd.NewServer(o)
		defer server.Close()
		if err := server.Add(nbd.Export{Name: *name, Node: n, ReadOnly: *readOnly}); err != nil {
			return usageError(err)
		}
		l, err := nbd.Listen(*listen)
		if err != nil {
			return err
		}
		where := l.Addr().String()
		if path, ok := strings.CutPrefix(*listen, "unix:"); ok {
			where = "unix:" + path
		}
		fmt.Fprintf(cmd.OutOrStdout(), "%s: served at %s\n", printable(args[0]), printable(where))
		ended := make(chan error, 1)
		go func() { ended <- server.Serve(l) }()
		select {
		case err := <-ended:
			return err
		case <-cmd.Context().Done():
			err := server.Close()
			<-ended
			return err
		}
	}
	return cmd
}
