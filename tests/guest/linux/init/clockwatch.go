//go:build linux

package main

import (
	"context"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/tests/guest/wire"
)

// watchClock reads the monotonic clock on every processor, in bursts between
// which it sleeps, until it is told to stop. A reading is compared with
// the last one of any processor.
func watchClock(ctx context.Context, args wire.WatchClockArgs) (any, error) {
	const burst = 256
	nap := time.Duration(args.MS) * time.Millisecond
	if nap <= 0 {
		return nil, fmt.Errorf("naps of %d ms", args.MS)
	}
	start := time.Now()
	var last, samples, back, naps, early atomic.Int64
	read := func() time.Duration {
		seen := last.Load()
		now := int64(time.Since(start)) // by the vDSO, without the kernel
		samples.Add(1)
		if now < seen {
			back.Add(1)
		}
		for ; now > seen && !last.CompareAndSwap(seen, now); seen = last.Load() {
		}
		return time.Duration(now)
	}
	var readers sync.WaitGroup
	errs := make(chan error, runtime.NumCPU())
	for cpu := range runtime.NumCPU() {
		readers.Go(func() {
			runtime.LockOSThread() // and never unlocked: the thread ends with its affinity
			var set unix.CPUSet
			set.Set(cpu)
			if err := unix.SchedSetaffinity(0, &set); err != nil {
				errs <- fmt.Errorf("processor %d: %w", cpu, err)
				return
			}
			for ctx.Err() == nil {
				for range burst {
					read()
				}
				before := read()
				time.Sleep(nap)
				naps.Add(1)
				if read()-before < nap {
					early.Add(1)
				}
			}
		})
	}
	readers.Wait()
	select {
	case err := <-errs:
		return nil, err
	default:
	}
	return wire.WatchClockResult{Samples: samples.Load(), Back: back.Load(), Naps: naps.Load(), Early: early.Load()}, nil
}
