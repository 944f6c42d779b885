package qmp_test

import (
	"math/rand/v2"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// malformed are the inputs of QEMU's qmp-test, and more of what its parser tells apart. Each is asked of QEMU and of us.
var malformed = []string{
	`{]`, "{\xff", "{\x01", "{'bad \xff", "{\"a\nb\": 1}", "%%p", `null`, `{}`, `{"execute": 1}`, `{"execute": null, "id": 3}`,
	`{"execute": "query-status", "arguments": []}`, `{"execute": "query-status", "extra": 1}`,
	`{"execute": "query-status", "exec-oob": "query-status"}`, `{"exec-oob": "query-status"}`, `{"control": {}}`,
	"\xff", "\xfe", "\x00", "{\x00", "'\x00", "A", "A{}", "ab{}", "@#\t$ {}", "@ , 1", "{\"a\": @ }",
	`123 `, `-1 `, `-0 `, `01 `, `-01 `, `- `, `1. `, `1.5 `, `1.e `, `1e5 `, `1E+5 `, `1e-x `, `0e1 `, `0.0 `, `+1 `, `.5 `, "1\xff",
	`1e400 `, `123456789012345678901234567890 `, `-123456789012345678901234567890 `, `18446744073709551615 `,
	`"abc"`, `'it"s'`, `'it\'s'`, `"it's"`, `"it\"s"`, `[]`, `[1,2]`, `[1 2]`, `[1,]`, `[,]`, `true `, `tru `, `trueish `, `nullnull `,
	`true]`, `true}`, `{"a" 1}`, `{1: 2}`, `{"a": 1,}`, `{"a": 1 "b": 2}`, `{"a":}`, `{"a"}`, `{,}`, `{:}`, `{"a": 1, "a": 2}`,
	`{"a": 1, "a":}`, `}`, `]`, `,`, `:`, `[}`, `{[}]`, `{"a": [}`, `["a"}`, `{"a"]`, `[[]`, `[{]}`,
	`"\q"`, `"\u12g4"`, `"\u"`, `"\u1"`, `"\u12345"`, `"\ud800"`, `"\udc00"`, `"\ud800\ud800"`, `"\ud83d\ude00"`, `"\ud83d\u12"`,
	`"\ud83d\q"`, `"\ufffe"`, `"\ufdd0"`, `"\uffff"`, `"\u0000"`, `"\u0001\b\f\n\r\t\/\\"`, `"\`, "\"\\\n\"", "\"\\\xff\"",
	"\"\xc0\x80\"", "\"\xc1\xbf\"", "\"\xe0\x80\x80\"", "\"\xf4\x90\x80\x80\"", "\"\xed\xa0\x80\"", "\"\xf0\x9f\x98\x80\"", "\"\xc3\"",
	"\"\xe2(\xa1\"", "\"\x80\"", "\"\xf8\x88\x80\x80\x80\"", "\"\xfd\xbf\xbf\xbf\xbf\xbf\"", "\"\xef\xbf\xbe\"", "\"\x7f\"", "\"\t\"",
	"\xef\xbb\xbf{}", `{'execute': 'query-status'}`, `{"execute":"query-status"}{"execute":"query-status","id":{}}`,
	`{"execute": "query-status", "id": [1, -2, 1.5, 0.1, 1e300, 1e16, 1e17, 1e-7, true, null, "\u00e9\ud83d\ude00\u0007", {"x": {}}]}`,
	`{"execute": "query-status", "id": 18446744073709551615}`, `{"execute": "query-status", "id": -0}`,
	`{"execute": "query-status", "id": "` + "\xc0\x80\xc3\xa9" + `"}`, `{"execute": "query-status", "id": null}`,
	`{"execute": "nonsense"}`, `{"execute": ""}`, `{"execute": "a\u0000b\u00e9"}`, `{"execute": "qmp_capabilities"}`,
	`{"execute": "qmp_capabilities", "arguments": {"enable": "oob"}}`,
	`{"execute": "qmp_capabilities", "arguments": {"enable": ["x"]}}`, `{"execute": "qmp_capabilities", "arguments": {"enable": [1]}}`,
	`{"execute": "balloon"}`, `{"execute": "balloon", "arguments": {}}`, `{"execute": "balloon", "arguments": {"value": "1"}}`,
	`{"execute": "balloon", "arguments": {"value": 1.0}}`, `{"execute": "balloon", "arguments": {"value": null}}`,
	`{"execute": "balloon", "arguments": {"value": 18446744073709551615}}`, `{"execute": "balloon", "arguments": {"value": 1, "x": 2}}`,
	`{"execute": "balloon", "arguments": {"valu": 1}}`, `{"execute": "set_link", "arguments": {"name": "x", "up": 1}}`,
	`{"execute": "set_link", "arguments": {"name": "x", "up": true}}`, `{"execute": "set_link", "arguments": {"name": ["x"], "up": true}}`,
	`{"execute": "blockdev-add", "arguments": {}}`, `{"execute": "blockdev-add", "arguments": {"driver": "zzz"}}`,
	`{"execute": "blockdev-add", "arguments": {"driver": 1}}`,
	`{"execute": "blockdev-add", "arguments": {"driver": "raw"}}`,
	`{"execute": "blockdev-add", "arguments": {"driver": "raw", "file": {"driver": "null-co", "zz": 1}}}`,
	`{"execute": "blockdev-add", "arguments": {"driver": "raw", "file": {"driver": "null-co", "size": "a"}}}`,
	`{"execute": "blockdev-add", "arguments": {"driver": "raw", "file": {"size": 1}}}`,
	`{"execute": "blockdev-add", "arguments": {"driver": "null-co", "size": 1, "nope": 1}}`,
	`{"execute": "job-cancel", "arguments": {"id": "none"}}`, `{"execute": "job-dismiss", "arguments": {"id": 1}}`,
	`{"execute": "query-jobs"}`, `{"execute": "query-fdsets"}`, `{"execute": "add-fd"}`, `{"execute": "add-fd", "arguments": {"fdset-id": "x"}}`,
	`{"execute": "getfd", "arguments": {"fdname": "a"}}`, `{"execute": "closefd", "arguments": {"fdname": "a"}}`,
	`{"execute": "remove-fd", "arguments": {"fdset-id": 7}}`, `{"execute": "remove-fd", "arguments": {"fdset-id": 7, "fd": 8}}`,
	strings.Repeat("[", 1024) + strings.Repeat("]", 1024), strings.Repeat("[", 1025) + strings.Repeat("]", 3),
	strings.Repeat(`{"a":`, 1025) + "{}", `{"` + strings.Repeat("x", 3000) + `": tru}`, strings.Repeat("q", 3000) + " ",
	strings.Repeat("x", 100) + "\"" + strings.Repeat("y", 3000) + "\xff",
}

// endsInLexicalError are inputs that a line end recovers from, too.
var endsInLexicalError = map[string]bool{
	"{\xff": true, "{\x01": true, "{'bad \xff": true, "%%p": true, "\xff": true, "\x00": true, "{\x00": true, "A": true, "@ , 1": true,
}

// TestLikeQEMU compares every answer with QEMU's, byte for byte, and that each input is recovered from.
func TestLikeQEMU(t *testing.T) {
	qemu := negotiated(t, startQEMU(t))
	ours := negotiated(t, newMachine(t).path)
	for _, input := range malformed {
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
		input := []byte(malformed[rnd.IntN(len(malformed))])
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
				other := malformed[rnd.IntN(len(malformed))]
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
