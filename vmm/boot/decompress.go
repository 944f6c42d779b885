package boot

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
)

// compression is how an image is packed.
type compression int

const (
	uncompressed compression = iota
	gzipped
	lz4ed
	zstded
	xzed
	bzip2ed
	lzmaed
	lzoed
)

// compressions has each one's name and the bytes it begins with.
var compressions = []struct{ name, magic string }{
	uncompressed: {"uncompressed", ""},
	gzipped:      {"gzip", "\x1F\x8B\x08"},
	lz4ed:        {"LZ4", "\x02\x21\x4C\x18"}, // the legacy frame, which Linux uses
	zstded:       {"zstd", "\x28\xB5\x2F\xFD"},
	xzed:         {"xz", "\xFD7zXZ\x00"},
	bzip2ed:      {"bzip2", "BZh"},
	lzmaed:       {"LZMA", "\x5D\x00\x00"},
	lzoed:        {"LZO", "\x89LZO\x00\r\n\x1A\n"},
}

func (c compression) String() string { return compressions[c].name }

func detectCompression(head []byte) compression {
	for c, x := range compressions {
		if x.magic != "" && bytes.HasPrefix(head, []byte(x.magic)) {
			return compression(c)
		}
	}
	return uncompressed
}

// maxZstdWindow is what zstd -22 --ultra, which Linux uses, asks for.
const maxZstdWindow = 128 << 20

// decompress returns the stream of size bytes that packed expands
// to. Errors of the stream are ErrCompression, or ErrTruncated.
func decompress(c compression, packed *io.SectionReader, size uint64) (io.ReadCloser, error) {
	var r io.ReadCloser
	var err error
	switch c {
	case uncompressed:
		return plainStream{packed}, nil
	case gzipped:
		var z *gzip.Reader
		if z, err = gzip.NewReader(packed); err == nil {
			z.Multistream(false) // what follows is not ours to judge
			r = z
		}
	case zstded:
		var z *zstd.Decoder
		z, err = zstd.NewReader(packed, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxZstdWindow))
		if err == nil {
			r = z.IOReadCloser()
		}
	case lz4ed:
		r = io.NopCloser(newLZ4Reader(packed, packed.Size(), size))
	case xzed:
		r = io.NopCloser(newXZReader(packed, packed.Size(), size))
	default:
		err = fmt.Errorf("%s is not supported", c)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrCompression, c, eofIsTruncated(err))
	}
	return &explainedStream{r, c}, nil
}

// plainStream is an uncompressed image. Unlike io.NopCloser it can be sought in.
type plainStream struct{ *io.SectionReader }

func (plainStream) Close() error { return nil }

// explainedStream says which compression its errors come from.
type explainedStream struct {
	io.ReadCloser
	compression compression
}

func (s *explainedStream) Read(p []byte) (int, error) {
	n, err := s.ReadCloser.Read(p)
	if err != nil && err != io.EOF {
		err = fmt.Errorf("%w: %s: %w", ErrCompression, s.compression, eofIsTruncated(err))
	}
	return n, err
}
