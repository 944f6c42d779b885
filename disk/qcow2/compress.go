package qcow2

import (
	"bytes"
	"fmt"
	"io"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"
)

// zstdWindow is the largest window a zstd frame may ask for; it is what the
// format wants every decoder to have.
const zstdWindow = 8 << 20

// decompressor is the state of one decompression. It yields as many bytes as
// it is asked for and no more, so a stream that would blow up cannot.
type decompressor struct {
	input  []byte
	source bytes.Reader
	flate  io.ReadCloser // created when first needed
	zstd   *zstd.Decoder // created when first needed
}

// spares are some states that are used again: large ones, not to be made anew after
// each garbage collection.
type spares[T any] chan *T

func (s spares[T]) get() *T {
	select {
	case v := <-s:
		return v
	default:
		return new(T)
	}
}

func (s spares[T]) put(v *T) {
	select {
	case s <- v:
	default:
	}
}

var decompressors = make(spares[decompressor], 4)

// cluster returns the compressed cluster of e, whole.
func (im *image) cluster(e extent) ([]byte, error) {
	k := key{im.id, e.host}
	if c := im.clusters.get(k); c != nil {
		return c, nil
	}
	d := decompressors.get()
	defer decompressors.put(d)
	if int64(cap(d.input)) < e.csize {
		d.input = make([]byte, e.csize)
	}
	d.input = d.input[:e.csize]
	if err := im.file.Readv([][]byte{d.input}, e.host); err != nil {
		return nil, fmt.Errorf("read compressed cluster at %#x: %w", e.host, err)
	}
	out := make([]byte, im.header.ClusterSize())
	if err := d.fill(out, im.header.Compression); err != nil {
		return nil, fmt.Errorf("%w: compressed cluster at %#x: %w", ErrCorrupt, e.host, err)
	}
	im.clusters.put(k, out)
	return out, nil
}

// fill decompresses d.input until out is full. What follows is the rest of a
// sector and no matter.
func (d *decompressor) fill(out []byte, method Compression) error {
	d.source.Reset(d.input)
	var from io.Reader
	switch method {
	case Zstd:
		if d.zstd == nil {
			dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(zstdWindow))
			if err != nil {
				return err
			}
			d.zstd = dec
		}
		if err := d.zstd.Reset(&d.source); err != nil {
			return err
		}
		from = d.zstd
	default:
		if d.flate == nil {
			d.flate = flate.NewReader(&d.source)
		} else if err := d.flate.(flate.Resetter).Reset(&d.source, nil); err != nil {
			return err
		}
		from = d.flate
	}
	n, err := io.ReadFull(from, out)
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return fmt.Errorf("it has %d bytes of %d", n, len(out))
	}
	return err
}
