package archive

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"

	"github.com/gnomon-vmm/gnomon/disk"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/convert"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
)

// images keeps backups as qcow2 images, which name what they lie on.
type images struct{ *Archive }

var imageName = regexp.MustCompile(`^\.?[0-9]{6}\.qcow2(\.part.*)?$`)

func imageOf(s *Step) string { return fmt.Sprintf("%06d.qcow2", s.Number) }

func (images) names(s *Step) []string { return []string{imageOf(s)} }

func (images) owns(name string) bool { return imageName.MatchString(name) }

func (images) part(s *Step) (name, format string) { return imageOf(s) + part, FormatQcow2 }

func (a images) begin(s *Step) error {
	o := qcow2.CreateOptions{Size: s.Size}
	if !s.Full {
		o.Backing, o.BackingFormat = imageOf(a.Last()), FormatQcow2
	}
	return qcow2.Create(a.path(imageOf(s)+part), o)
}

func (a images) target(s *Step) (block.Node, error) {
	return disk.Open(a.path(imageOf(s)+part), disk.Options{Format: FormatQcow2})
}

func (images) byName(*Step) bool { return true }

func (a images) abandon(s *Step) { os.Remove(a.path(imageOf(s) + part)) }

func (a images) finish(s *Step, _ block.Node) error {
	from, to := a.path(imageOf(s)+part), a.path(imageOf(s))
	if err := syncFile(from); err != nil {
		return err
	}
	var err error
	if s.SHA256, s.Bytes, err = fileSum(from); err != nil {
		return err
	}
	return a.rename(from, to)
}

// backing is what the image of a step lies on, or "".
func (a images) backing(i int) string {
	if a.catalog.Steps[i].Full {
		return ""
	}
	return imageOf(&a.catalog.Steps[i-1])
}

func (a images) open(i int) (block.Node, error) {
	n, err := qcow2.Open(a.path(imageOf(&a.catalog.Steps[i])), true)
	if err != nil {
		return nil, err
	}
	return n, nil
}

func (a images) verify(ctx context.Context, i int) error {
	s := &a.catalog.Steps[i]
	name := imageOf(s)
	sum, _, err := fileSum(a.path(name))
	if err != nil {
		return err
	}
	if sum != s.SHA256 {
		return fmt.Errorf("%s is not as it was when it was made: its checksum is another", name)
	}
	report, err := qcow2.Check(ctx, a.path(name), qcow2.CheckOptions{})
	if err != nil {
		return err
	}
	if report.Corruptions > 0 || report.CheckErrors > 0 {
		return fmt.Errorf("%s: the image has %d errors", name, report.Corruptions+report.CheckErrors)
	}
	n, err := qcow2.Open(a.path(name), true)
	if err != nil {
		return err
	}
	defer n.Close()
	if got, want := n.Header().BackingFile, a.backing(i); got != want {
		return fmt.Errorf("%s lies on %q, not on %q", name, got, want)
	}
	if n.Size() != s.Size {
		return fmt.Errorf("%s is of a disk of %d bytes, not %d", name, n.Size(), s.Size)
	}
	return nil
}

func (a images) merge(ctx context.Context, i int, progress func(done, total int64)) (err error) {
	s := &a.catalog.Steps[i]
	src, err := a.OpenStep(s.Number)
	if err != nil {
		return err
	}
	defer src.Close()
	path := a.path(imageOf(s) + part)
	if err := qcow2.Create(path, qcow2.CreateOptions{Size: s.Size}); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(path)
		}
	}()
	dst, err := qcow2.Open(path, false)
	if err != nil {
		return err
	}
	err = convert.Copy(ctx, dst, src, convert.Options{TargetIsZero: true, Progress: progress})
	if err = errors.Join(err, dst.Close()); err != nil {
		return err
	}
	if err := syncFile(path); err != nil {
		return err
	}
	sum, size, err := fileSum(path)
	if err != nil {
		return err
	}
	// Until it is renamed either checksum is right: see recover.
	s.Merged = sum
	if err := a.save(); err != nil {
		return err
	}
	if err := a.rename(path, a.path(imageOf(s))); err != nil {
		return err
	}
	s.SHA256, s.Bytes, s.Full, s.Merged = sum, size, true, ""
	return a.save()
}

// recover tells of merged images whether they have taken their places.
func (a images) recover() error {
	for i := range a.catalog.Steps {
		if s := &a.catalog.Steps[i]; s.Merged != "" {
			sum, size, err := fileSum(a.path(imageOf(s)))
			if err != nil {
				continue // Verify tells
			}
			if sum == s.Merged {
				s.SHA256, s.Bytes, s.Full = sum, size, true
			}
			s.Merged = ""
			if err := a.save(); err != nil {
				return err
			}
		}
	}
	return nil
}

// fileSum is the checksum and the size of a file.
func fileSum(path string) (sum string, size int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	h := sha256.New()
	if size, err = io.Copy(h, f); err != nil {
		return "", 0, err
	}
	return hex.EncodeToString(h.Sum(nil)), size, nil
}

// syncFile makes a file durable, whoever wrote it.
func syncFile(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
