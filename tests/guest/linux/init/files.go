//go:build linux

package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/tests/guest/wire"
)

const blockSize = 4096

func mount(_ context.Context, args wire.MountArgs) (any, error) {
	if err := os.MkdirAll(args.Target, 0o755); err != nil {
		return nil, err
	}
	var flags uintptr
	var rest []string
	for _, o := range strings.Split(args.Options, ",") {
		switch o {
		case "ro":
			flags |= unix.MS_RDONLY
		case "noatime":
			flags |= unix.MS_NOATIME
		case "sync":
			flags |= unix.MS_SYNCHRONOUS
		case "remount":
			flags |= unix.MS_REMOUNT
		case "", "rw":
		default:
			rest = append(rest, o)
		}
	}
	return nil, unix.Mount(args.Source, args.Target, args.Type, flags, strings.Join(rest, ","))
}

func unmount(_ context.Context, args wire.PathArgs) (any, error) {
	return nil, unix.Unmount(args.Path, 0)
}

func dropCaches(*agent) (any, error) {
	unix.Sync()
	return nil, os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
}

// openFor opens a file, directly if asked.
func openFor(path string, flags int, direct bool) (*os.File, error) {
	if direct {
		flags |= unix.O_DIRECT
	}
	return os.OpenFile(path, flags, 0o644)
}

// transferSize is the most that one read or write moves: few system calls, and
// little memory to touch for the first time.
const transferSize = 64 << 10

// buffer returns memory that O_DIRECT accepts.
func buffer(size int) ([]byte, error) {
	return unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
}

func writePattern(ctx context.Context, args wire.WriteArgs) (any, error) {
	f, err := openFor(args.Path, os.O_WRONLY|os.O_CREATE, args.Direct)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	buf, err := buffer(int(min(max(args.Size, 1), transferSize)))
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Munmap(buf) }()
	h := sha256.New()
	for done := int64(0); done < args.Size; {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		p := buf[:min(int64(len(buf)), args.Size-done)]
		wire.Pattern(p, args.Seed, done)
		h.Write(p)
		if _, err := f.WriteAt(p, args.Offset+done); err != nil {
			return nil, err
		}
		done += int64(len(p))
	}
	if args.Sync {
		if err := f.Sync(); err != nil {
			return nil, err
		}
	}
	return wire.SumResult{Size: args.Size, SHA256: hex.EncodeToString(h.Sum(nil))}, f.Close()
}

func readSum(ctx context.Context, args wire.ReadArgs) (any, error) {
	f, err := openFor(args.Path, os.O_RDONLY, args.Direct)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	buf, err := buffer(transferSize)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Munmap(buf) }()
	h := sha256.New()
	done := int64(0)
	for args.Size == 0 || done < args.Size {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		p := buf
		if args.Size > 0 {
			p = buf[:min(int64(len(buf)), args.Size-done)]
		}
		n, err := f.ReadAt(p, args.Offset+done)
		h.Write(p[:n])
		done += int64(n)
		if errors.Is(err, io.EOF) {
			if args.Size > 0 && done < args.Size {
				return nil, fmt.Errorf("%s ends after %d bytes", args.Path, done)
			}
			break
		}
		if err != nil {
			return nil, err
		}
	}
	return wire.SumResult{Size: done, SHA256: hex.EncodeToString(h.Sum(nil))}, nil
}

func getFile(_ context.Context, args wire.PathArgs) (any, error) {
	f, err := os.Open(args.Path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, wire.MaxOutput))
	if err != nil {
		return nil, err
	}
	return wire.DataResult{Data: data}, nil
}

func putFile(_ context.Context, args wire.PutFileArgs) (any, error) {
	mode := os.FileMode(args.Mode)
	if mode == 0 {
		mode = 0o644
	}
	return nil, os.WriteFile(args.Path, args.Data, mode)
}

// churn writes blocks of changing content in a scattered order and reads
// others back, until it is told to stop.
func churn(ctx context.Context, args wire.ChurnArgs) (any, error) {
	if args.Blocks < 1 || args.Blocks > 1<<20 {
		return nil, fmt.Errorf("blocks: %d is not between 1 and 2^20", args.Blocks)
	}
	if args.MS > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(args.MS)*time.Millisecond)
		defer cancel()
	}
	f, err := openFor(args.Path, os.O_RDWR|os.O_CREATE, args.Direct)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	buf, err := buffer(2 * blockSize)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Munmap(buf) }()
	block, want := buf[:blockSize], buf[blockSize:]
	var result wire.ChurnResult
	written := make([]uint64, args.Blocks) // the seed of each block's content; 0: not written yet
	for turn := uint64(1); ctx.Err() == nil; turn++ {
		i := int(args.Seed+turn*0x9e3779b1) % args.Blocks
		if i < 0 {
			i = -i
		}
		wire.Pattern(block, args.Seed+turn, 0)
		if _, err := f.WriteAt(block, int64(i)*blockSize); err != nil {
			return nil, fmt.Errorf("block %d: %w", i, err)
		}
		written[i] = args.Seed + turn
		result.Writes++
		if args.Sync {
			if err := f.Sync(); err != nil {
				return nil, err
			}
		}
		j := int(turn*7919) % args.Blocks
		if j < 0 || written[j] == 0 {
			continue
		}
		if _, err := f.ReadAt(block, int64(j)*blockSize); err != nil {
			return nil, fmt.Errorf("block %d: %w", j, err)
		}
		wire.Pattern(want, written[j], 0)
		result.Reads++
		if string(block) != string(want) {
			result.Wrong++
		}
	}
	return result, f.Sync()
}
