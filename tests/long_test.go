//go:build long

package tests

import (
	"bufio"
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/gnomon-vmm/gnomon/tests/guest"
)

// Debian's unmodified cloud kernel boots to a busybox init, whose shell then
// powers the machine off.
func TestDebianCloudKernel(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 4*limit)
	defer cancel()
	kit := guest.Cloud(t)
	start := time.Now()
	m, rw := launch(t, "--memory", "512M", "--net", "none",
		"--kernel", kit.Kernel, "--initrd", kit.Initrd, "--append", kit.Cmdline)
	lines := bufio.NewScanner(rw)
	for lines.Scan() {
		fmt.Fprintln(&m.log, lines.Text())
		if strings.Contains(lines.Text(), guest.CloudReady) {
			t.Logf("%s after %v", lines.Text(), time.Since(start).Round(time.Second))
			fmt.Fprintln(rw, "poweroff -f")
		}
	}
	if status := m.status(ctx, t); status != 0 {
		t.Errorf("exit status %d", status)
	}
	if !strings.Contains(m.log.String(), guest.CloudReady) {
		t.Errorf("init never started:\n%s", &m.log)
	}
}
