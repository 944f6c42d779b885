package model

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// launchers run QEMU's tools. A process that we begin has our files open until it
// runs its program, and so their locks: launchers began when there were none.
var launchers = make(chan *launcher, runtime.NumCPU())

type launcher struct {
	in  io.WriteCloser
	out *bufio.Reader
}

func TestMain(m *testing.M) {
	if job := os.Getenv(killedEnv); job != "" {
		fmt.Println("error:", writeAndWork(job))
		os.Exit(1)
	}
	for range cap(launchers) {
		cmd := exec.Command("sh", "-c", `while read -r dir; read -r args; do cd "$dir" && eval "$args" >.out 2>.err; echo $?; done`)
		in, err := cmd.StdinPipe()
		if err != nil {
			panic(err)
		}
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			panic(err)
		}
		launchers <- &launcher{in, bufio.NewReader(out)}
	}
	os.Exit(m.Run()) // which ends them
}

// run runs a command in a directory, and returns what it says.
func run(t *testing.T, dir string, args ...string) (stdout, stderr string, status int) {
	t.Helper()
	l := <-launchers
	defer func() { launchers <- l }()
	fmt.Fprintf(l.in, "%s\n'%s'\n", dir, strings.Join(args, "' '"))
	line, err := l.out.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscan(line, &status); err != nil {
		t.Fatal(err)
	}
	out, err := os.ReadFile(filepath.Join(dir, ".out"))
	if err != nil {
		t.Fatal(err)
	}
	says, err := os.ReadFile(filepath.Join(dir, ".err"))
	if err != nil {
		t.Fatal(err)
	}
	return string(out), string(says), status
}
