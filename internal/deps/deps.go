//go:build deps

// Package deps pins modules while the packages that use them are being written.
package deps
import (
 _ "github.com/c35s/hype/kvm"
 _ "github.com/digitalocean/go-qemu/qmp"
 _ "github.com/digitalocean/go-qemu/qemu"
 _ "github.com/digitalocean/go-qemu/hypervisor"
 _ "golang.org/x/sys/unix"
 _ "golang.org/x/term"
 _ "golang.org/x/sync/errgroup"
 _ "golang.org/x/arch/x86/x86asm"
 _ "github.com/klauspost/compress/zstd"
 _ "github.com/klauspost/compress/s2"
 _ "github.com/pierrec/lz4/v4"
 _ "github.com/ulikunitz/xz"
 _ "github.com/cavaliergopher/cpio"
 _ "github.com/containers/gvisor-tap-vsock/pkg/virtualnetwork"
 _ "github.com/containers/gvisor-tap-vsock/pkg/types"
 _ "github.com/vishvananda/netlink"
 _ "github.com/lima-vm/go-qcow2reader"
 _ "github.com/spf13/cobra"
 _ "github.com/schollz/progressbar/v3"
 _ "pgregory.net/rapid"
 _ "github.com/google/go-cmp/cmp"
)
