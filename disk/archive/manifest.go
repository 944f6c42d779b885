package archive

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"
)

// errManifest is a manifest that cannot be one.
var errManifest = errors.New("manifest")

const (
	manifestVersion = 1
	maxExtents      = 4 << 20
	maxManifest     = 1 << 30
	maxLine         = 4 << 10 // of a manifest, bytes: what its reader keeps at once
	maxName         = 255     // bytes, as of a file; six times that fits in a line, which escapes may take
)

// extent is a part of a disk that a backup holds.
type extent struct {
	start, length int64
	zero          bool              // it reads as zero; its checksum is of no use
	sum           [sha256.Size]byte // of its bytes
}

func (e *extent) end() int64 { return e.start + e.length }

// manifest tells what the data file of a backup holds. A manifest that was read is a
// disk's: its extents ascend, do not overlap, and end where the disk ends or before.
type manifest struct {
	directory string // the archive's ID
	number    int
	base      int       // the backup that it lies on; 0: none
	time      time.Time // the instant of which it is
	completed time.Time
	size      int64  // of the disk, bytes
	data      string // the data file's name
	bytes     int64  // of all extents but those that are zero
	extents   []extent
}

// writtenExtent is an extent in JSON.
type writtenExtent struct {
	Start  int64  `json:"start"`
	Length int64  `json:"length"`
	Zero   bool   `json:"zero,omitempty"`
	SHA256 string `json:"sha256,omitempty"`
}

// write writes the manifest, an extent a line.
func (m *manifest) write(to io.Writer) error {
	w := bufio.NewWriter(to)
	field := func(name string, value any) {
		b, _ := json.Marshal(value) // of plain values, which cannot fail
		fmt.Fprintf(w, "  %q: %s,\n", name, b)
	}
	io.WriteString(w, "{\n")
	field("version", manifestVersion)
	field("directory", m.directory)
	field("number", m.number)
	if m.base != 0 {
		field("base", m.base)
	}
	field("time", m.time)
	field("completed", m.completed)
	field("size", m.size)
	field("data", m.data)
	field("bytes", m.bytes)
	io.WriteString(w, "  \"extents\": [")
	for i := range m.extents {
		if i > 0 {
			io.WriteString(w, ",")
		}
		e := &m.extents[i]
		fmt.Fprintf(w, "\n    {\"start\": %d, \"length\": %d, ", e.start, e.length)
		if e.zero {
			io.WriteString(w, `"zero": true}`)
		} else {
			fmt.Fprintf(w, "\"sha256\": \"%x\"}", e.sum)
		}
	}
	io.WriteString(w, "\n  ]\n}\n")
	return w.Flush() // with the first error
}

// readManifest reads a manifest, in memory that grows with its extents alone.
func readManifest(from io.Reader) (*manifest, error) {
	m := &manifest{}
	limited := &limitedReader{r: from, left: maxManifest}
	if err := m.decode(json.NewDecoder(limited)); err != nil {
		return nil, fmt.Errorf("%w: %w", errManifest, err)
	}
	if err := m.check(); err != nil {
		return nil, fmt.Errorf("%w: %w", errManifest, err)
	}
	return m, nil
}

// limitedReader refuses files that are too large, and lines that are too long.
type limitedReader struct {
	r    io.Reader
	left int64
	line int
}

func (l *limitedReader) Read(p []byte) (int, error) {
	n, err := l.r.Read(p)
	if l.left -= int64(n); l.left < 0 {
		return 0, errors.New("it is too large")
	}
	for _, c := range p[:n] {
		if l.line++; c == '\n' {
			l.line = 0
		}
		if l.line > maxLine {
			return 0, errors.New("a line of it is too long")
		}
	}
	return n, err
}

func (m *manifest) decode(d *json.Decoder) error {
	if err := expect(d, json.Delim('{')); err != nil {
		return err
	}
	version, seen := 0, map[string]bool{}
	values := map[string]any{
		"version": &version, "directory": &m.directory, "number": &m.number, "base": &m.base, "time": &m.time,
		"completed": &m.completed, "size": &m.size, "data": &m.data, "bytes": &m.bytes, "extents": nil,
	}
	for d.More() {
		token, err := d.Token()
		if err != nil {
			return err
		}
		name, _ := token.(string)
		value, known := values[name]
		switch {
		case !known || seen[name]:
			return fmt.Errorf("%q: it is not known, or there twice", name)
		case name == "extents":
			err = m.decodeExtents(d)
		default:
			err = d.Decode(value)
		}
		if err != nil {
			return fmt.Errorf("%q: %w", name, err)
		}
		seen[name] = true
		if name == "version" && version != manifestVersion {
			return fmt.Errorf("version %d: this program knows version %d", version, manifestVersion)
		}
	}
	if err := expect(d, json.Delim('}')); err != nil {
		return err
	}
	for name := range values {
		if !seen[name] && name != "base" {
			return fmt.Errorf("it has no %q", name)
		}
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("there is something behind its end")
	}
	return nil
}

func expect(d *json.Decoder, want json.Delim) error {
	got, err := d.Token()
	if err == nil && got != want {
		err = fmt.Errorf("there is %v where %v must be", got, want)
	}
	return err
}

func (m *manifest) decodeExtents(d *json.Decoder) error {
	if err := expect(d, json.Delim('[')); err != nil {
		return err
	}
	for d.More() {
		if len(m.extents) == maxExtents {
			return fmt.Errorf("there are more than %d", maxExtents)
		}
		var w writtenExtent
		if err := d.Decode(&w); err != nil {
			return err
		}
		e := extent{start: w.Start, length: w.Length, zero: w.Zero}
		if sum, err := hex.DecodeString(w.SHA256); err != nil || !w.Zero && len(sum) != len(e.sum) || w.Zero && len(sum) != 0 {
			return fmt.Errorf("checksum %q of %d bytes at %d", w.SHA256, w.Length, w.Start)
		} else if !w.Zero {
			e.sum = [sha256.Size]byte(sum)
		}
		m.extents = append(m.extents, e)
	}
	return expect(d, json.Delim(']'))
}

// check tells whether it can be a disk's.
func (m *manifest) check() error {
	if n := max(len(m.directory), len(m.data)); n > maxName {
		return fmt.Errorf("a name of %d bytes", n)
	}
	if m.size < 0 || m.number <= 0 || m.base < 0 || m.base >= m.number {
		return fmt.Errorf("backup %d, on %d, of a disk of %d bytes", m.number, m.base, m.size)
	}
	var end, bytes int64
	for i := range m.extents {
		e := &m.extents[i]
		if e.length <= 0 || e.start < end || e.start > m.size || e.length > m.size-e.start {
			return fmt.Errorf("%d bytes at %d, where the extent before ends at %d and the disk at %d", e.length, e.start, end, m.size)
		}
		if end = e.end(); !e.zero {
			bytes += e.length
		}
	}
	if bytes != m.bytes {
		return fmt.Errorf("its extents have %d bytes, and not the %d that it tells", bytes, m.bytes)
	}
	return nil
}
