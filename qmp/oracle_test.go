package qmp_test

import (
	"math/rand/v2"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/gnomon-vmm/gnomon/qmp"
)

// endsInLexicalError are inputs that a line end recovers from, too.
var endsInLexicalError = map[string]bool{
	"{\xff": true, "{\x01": true, "{'bad \xff": true, "%%p": true, "\xff": true, "\x00": true, "{\x00": true, "A": true, "@ , 1": true,
}

// TestLikeQEMU compares every answer with QEMU's, byte for byte, and that each input is recovered from.
func TestLikeQEMU(t *testing.T) {
	qemu := negotiated(t, startQEMU(t))
	ours := negotiated(t, newMachine(t).path)
	for _, input := range qmp.Malformed {
		if endsInLexicalError[input] {
			input += "\n"
		} else {
			input += "\xff" // closes what is left open
		}
		want := qemu.ask(input)
		got := ours.ask(input)
		if d := cmp.Diff(normal(want), normal(got)); d != "" {
			t.Errorf("%.200q: -QEMU +us\n%s", input, d)
		}
	}
}

// unexpected is what QEMU says of that one of several bad members which its hash table has first.
var unexpected = regexp.MustCompile(`(QMP input member|Parameter) '.*' (is unexpected|must be a string|must be an object)`)

// normal makes up for the order of QEMU's hash tables.
func normal(lines []string) []string {
	for i := range lines {
		lines[i] = unexpected.ReplaceAllString(lines[i], "UNEXPECTED")
		lines[i] = strings.Replace(lines[i], `{"status": "running", "singlestep": false, "running": true}`, "STATUS", 1)
	}
	return lines
}

// TestRandomLikeQEMU sends both the same random distortions of the inputs above.
func TestRandomLikeQEMU(t *testing.T) {
	qemu := negotiated(t, startQEMU(t))
	ours := negotiated(t, newMachine(t).path)
	const alphabet = "{}[]:,\"'\\ \t\n\r%eE.+-019azAu\x00\x01\x1f\x7f\x80\xc0\xe9\xed\xf0\xfd\xfe\xff"
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 3000 {
		input := []byte(qmp.Malformed[rnd.IntN(len(qmp.Malformed))])
		if len(input) > 300 {
			continue
		}
		for range 1 + rnd.IntN(4) {
			at := rnd.IntN(len(input) + 1)
			switch rnd.IntN(4) {
			case 0:
				input = append(input[:at:at], append([]byte{alphabet[rnd.IntN(len(alphabet))]}, input[at:]...)...)
			case 1:
				if at < len(input) {
					input[at] = alphabet[rnd.IntN(len(alphabet))]
				}
			case 2:
				input = append(input[:at:at], input[min(at+1+rnd.IntN(3), len(input)):]...)
			case 3:
				other := qmp.Malformed[rnd.IntN(len(qmp.Malformed))]
				if len(other) < 100 {
					input = append(input, other[rnd.IntN(len(other)):]...)
				}
			}
		}
		// Whatever is left open is closed by 0xFF.
		input = append(input, 0xff)
		if d := cmp.Diff(normal(qemu.ask(string(input))), normal(ours.ask(string(input)))); d != "" {
			t.Errorf("%q: -QEMU +us\n%s", input, d)
		}
	}
}
