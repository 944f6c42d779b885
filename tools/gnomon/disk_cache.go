package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/gnomon-vmm/gnomon/disk"
	"github.com/gnomon-vmm/gnomon/disk/aio"
)

// What disks' cache= and aio= can be, in QEMU's words.
var (
	cacheModes = []string{
		string(disk.CacheNone), string(disk.CacheDirectSync), string(disk.CacheWriteThrough), string(disk.CacheWriteback), string(disk.CacheUnsafe),
	}
	aioModes = []string{string(aio.Threads), string(aio.IOUring), aioNative}
)

// aioNative is the kernel's own asynchronous I/O, which as in QEMU is for direct I/O
// only. QEMU's is Linux AIO, ours is what has taken its place: io_uring.
const aioNative = "native"

// cacheAndEngine reads cache= and aio=.
func (o *options) cacheAndEngine() (disk.Cache, aio.Engine, error) {
	mode, err := o.oneOf("cache", string(disk.CacheWriteback), cacheModes...)
	if err != nil {
		return "", "", err
	}
	engine, err := o.oneOf("aio", "", aioModes...)
	if err != nil {
		return "", "", err
	}
	if engine, err = engineOf(engine, disk.Cache(mode)); err != nil {
		return "", "", o.errorf("%v", err)
	}
	return disk.Cache(mode), aio.Engine(engine), nil
}

// engineOf turns QEMU's word into ours.
func engineOf(word string, cache disk.Cache) (string, error) {
	if word != aioNative {
		return word, nil
	}
	if !cache.Direct() {
		return "", fmt.Errorf("aio=native needs cache=none or cache=directsync, not cache=%s", cache)
	}
	return string(aio.IOUring), nil
}

// addCacheFlag adds a flag for a cache mode.
func addCacheFlag(cmd *cobra.Command, long, short, usage string) *string {
	mode := cmd.Flags().StringP(long, short, string(disk.CacheWriteback), usage+": "+strings.Join(cacheModes, "|"))
	completeFlag(cmd, long, cacheModes...)
	return mode
}

// addAIOFlag adds a flag for an engine.
func addAIOFlag(cmd *cobra.Command) *string {
	engine := cmd.Flags().String("aio", "", "how requests get to the kernel: "+strings.Join(aioModes, "|")+" (default: io_uring past the page cache, else threads)")
	completeFlag(cmd, "aio", aioModes...)
	return engine
}

// checkMode refuses what a flag cannot be; "" is left to others.
func checkMode(flag, value string, choices []string) error {
	if value == "" || slices.Contains(choices, value) {
		return nil
	}
	last := len(choices) - 1
	return usageError(fmt.Errorf("--%s %s: %s and %s are possible", flag, value, strings.Join(choices[:last], ", "), choices[last]))
}

// diskOptions checks cache and aio flags and adds them to options.
func diskOptions(o disk.Options, cache, engine string) (disk.Options, error) {
	if err := checkMode("cache", cache, cacheModes); err != nil {
		return o, err
	}
	if err := checkMode("aio", engine, aioModes); err != nil {
		return o, err
	}
	o.Cache = disk.Cache(cache)
	word, err := engineOf(engine, o.Cache)
	if err != nil {
		return o, usageError(err)
	}
	o.Engine = aio.Engine(word)
	return o, nil
}
