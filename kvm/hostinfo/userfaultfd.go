package hostinfo

import (
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// Of linux/userfaultfd.h.
const (
	uffdDevice    = "/dev/userfaultfd"
	uffdDeviceNew = 0xaa00     // USERFAULTFD_IOC_NEW
	uffdioAPI     = 0xc018aa3f // UFFDIO_API
	uffdAPI       = 0xaa       // UFFD_API
)

// uffdioAPIArg is struct uffdio_api.
type uffdioAPIArg struct {
	api      uint64
	features uint64
	ioctls   uint64
}

// uffdFeatures are the names of UFFD_FEATURE_*, by bit.
var uffdFeatures = []string{
	"pagefault-flag-wp", "event-fork", "event-remap", "event-remove", "missing-hugetlbfs", "missing-shmem",
	"event-unmap", "sigbus", "thread-id", "minor-hugetlbfs", "minor-shmem", "exact-address",
	"wp-hugetlbfs-shmem", "wp-unpopulated", "poison", "wp-async", "move",
}

// featureNames names the bits of a mask that UFFDIO_API returned.
func featureNames(mask uint64) []string {
	names := []string{}
	for bit := range 64 {
		switch {
		case mask>>bit&1 == 0:
		case bit < len(uffdFeatures):
			names = append(names, uffdFeatures[bit])
		default:
			names = append(names, fmt.Sprintf("bit-%d", bit))
		}
	}
	return names
}

// probeUserfaultfd tries the device, then the system call, for a descriptor
// that serves faults raised in the kernel: KVM's are.
func probeUserfaultfd(host fs.FS) Userfaultfd {
	report := Userfaultfd{
		Features:     []string{},
		Unprivileged: readLine(host, "proc/sys/vm/unprivileged_userfaultfd") == "1",
	}
	by := "device"
	fd, deviceErr := uffdFromDevice()
	if deviceErr != nil {
		by = "syscall"
		n, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0)
		if errno != 0 {
			report.Error = fmt.Sprintf("%s: %s; system call: %s", uffdDevice, reason(deviceErr), errno)
			return report
		}
		fd = int(n)
	}
	defer unix.Close(fd)
	api := uffdioAPIArg{api: uffdAPI}
	if err := uffdHandshake(fd, &api); err != nil {
		report.Error = fmt.Sprintf("UFFDIO_API: %v", err)
		return report
	}
	report.By, report.Mask, report.Features = by, api.features, featureNames(api.features)
	return report
}

func uffdFromDevice() (int, error) {
	device, err := os.OpenFile(uffdDevice, os.O_RDWR, 0)
	if err != nil {
		return -1, err
	}
	defer device.Close()
	n, _, errno := unix.Syscall(unix.SYS_IOCTL, device.Fd(), uffdDeviceNew, unix.O_CLOEXEC|unix.O_NONBLOCK)
	if errno != 0 {
		return -1, errno
	}
	return int(n), nil
}
