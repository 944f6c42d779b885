package uffd

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"
)

// TestAgainstHeaders has the C compiler print what linux/userfaultfd.h says of
// numbers, sizes and places, and compares.
func TestAgainstHeaders(t *testing.T) {
	compiler, err := exec.LookPath("gcc")
	if err != nil {
		t.Skip("needs gcc and the kernel headers")
	}
	want := map[string]uint64{}
	var source strings.Builder
	source.WriteString("#include <stdio.h>\n#include <stddef.h>\n#include <sys/ioctl.h>\n#include <linux/userfaultfd.h>\nint main(void) {\n")
	fact := func(expression string, value uint64) {
		want[expression] = value
		fmt.Fprintf(&source, "printf(\"%%s\\t%%llu\\n\", %q, (unsigned long long)(%s));\n", expression, expression)
	}
	for name, value := range map[string]uint64{
		"USERFAULTFD_IOC_NEW": nrNew, "UFFDIO_API": nrAPI, "UFFDIO_REGISTER": nrRegister, "UFFDIO_UNREGISTER": nrUnregister,
		"UFFDIO_WAKE": nrWake, "UFFDIO_COPY": nrCopy, "UFFDIO_ZEROPAGE": nrZeroPage, "UFFDIO_WRITEPROTECT": nrWriteProtect,
		"UFFDIO_CONTINUE": nrContinue, "UFFD_API": userfaultfdAPI, "UFFD_EVENT_PAGEFAULT": faultEvent,
		"UFFD_PAGEFAULT_FLAG_WRITE": faultFlagWrite, "UFFD_PAGEFAULT_FLAG_WP": faultFlagWP, "UFFD_PAGEFAULT_FLAG_MINOR": faultFlagMinor,
		"UFFDIO_COPY_MODE_DONTWAKE": copyDontWake, "UFFDIO_COPY_MODE_WP": copyWP, "UFFDIO_ZEROPAGE_MODE_DONTWAKE": zeroDontWake,
		"UFFDIO_CONTINUE_MODE_DONTWAKE": continueDontWake, "UFFDIO_WRITEPROTECT_MODE_WP": protectWP,
		"UFFDIO_WRITEPROTECT_MODE_DONTWAKE": protectDontWake, "UFFDIO_REGISTER_MODE_MISSING": uint64(Missing),
		"UFFDIO_REGISTER_MODE_WP": uint64(WP), "UFFDIO_REGISTER_MODE_MINOR": uint64(Minor),
	} {
		fact(name, value)
	}
	for _, n := range featureNames {
		name := "UFFD_FEATURE_" + n.name
		fmt.Fprintf(&source, "#ifdef %s\n", name) // what an older header does not know goes unchecked
		fact(name, uint64(n.feature))
		source.WriteString("#endif\n")
	}
	for _, l := range []struct {
		goType any
		cName  string
		fields map[string]string
	}{
		{apiArg{}, "uffdio_api", map[string]string{"api": "api", "features": "features"}},
		{rangeArg{}, "uffdio_range", map[string]string{"addr": "start", "n": "len"}},
		{registerArg{}, "uffdio_register", map[string]string{"addr": "range.start", "n": "range.len", "mode": "mode"}},
		{copyArg{}, "uffdio_copy", map[string]string{"dst": "dst", "src": "src", "n": "len", "mode": "mode", "copied": "copy"}},
		{zeroArg{}, "uffdio_zeropage", map[string]string{"addr": "range.start", "n": "range.len", "mode": "mode", "zeroed": "zeropage"}},
		{continueArg{}, "uffdio_continue", map[string]string{"addr": "range.start", "n": "range.len", "mode": "mode", "mapped": "mapped"}},
		{protectArg{}, "uffdio_writeprotect", map[string]string{"addr": "range.start", "n": "range.len", "mode": "mode"}},
		{message{}, "uffd_msg", map[string]string{
			"event": "event", "flags": "arg.pagefault.flags", "addr": "arg.pagefault.address", "thread": "arg.pagefault.feat.ptid",
		}},
	} {
		goType := reflect.TypeOf(l.goType)
		fact(fmt.Sprintf("sizeof(struct %s)", l.cName), uint64(goType.Size()))
		for i := range goType.NumField() {
			f := goType.Field(i)
			cField, ok := l.fields[f.Name]
			if !ok {
				if f.Name != "_" {
					t.Errorf("%v.%s is compared with nothing", goType, f.Name)
				}
				continue
			}
			fact(fmt.Sprintf("offsetof(struct %s, %s)", l.cName, cField), uint64(f.Offset))
		}
	}
	source.WriteString("return 0;\n}\n")

	dir := t.TempDir()
	file, program := filepath.Join(dir, "facts.c"), filepath.Join(dir, "facts")
	if err := os.WriteFile(file, []byte(source.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(compiler, "-o", program, file).CombinedOutput(); err != nil {
		if bytes.Contains(out, []byte("linux/userfaultfd.h: No such file")) {
			t.Skip("needs the kernel headers (linux-libc-dev)")
		}
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	out, err := exec.Command(program).Output()
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if len(lines) < 50 {
		t.Fatalf("the C program told only %d facts", len(lines))
	}
	for _, line := range lines {
		expression, text, _ := strings.Cut(line, "\t")
		if got, err := strconv.ParseUint(text, 10, 64); err != nil || got != want[expression] {
			t.Errorf("%s is %s in C, %#x here", expression, text, want[expression])
		}
	}
}
