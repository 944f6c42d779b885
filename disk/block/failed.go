package block

// failed is a node that can do nothing any more.
type failed struct {
	info     Info
	readOnly bool
	err      error
}

// Failed is a node in the place of another, all of whose requests fail with err. It
// keeps what the other tells of itself, not the other, which the caller may close.
func Failed(like Node, err error) Node { return failed{like.Info(), like.ReadOnly(), err} }

func (f failed) Readv([][]byte, int64) error          { return f.err }
func (f failed) Writev([][]byte, int64) error         { return f.err }
func (f failed) Flush() error                         { return f.err }
func (f failed) Discard(int64, int64) error           { return f.err }
func (f failed) WriteZeroes(int64, int64, bool) error { return f.err }
func (f failed) Map(int64, int64) (Extent, error)     { return Extent{}, f.err }
func (f failed) Close() error                         { return nil }
func (f failed) Size() int64                          { return f.info.VirtualSize }
func (f failed) ReadOnly() bool                       { return f.readOnly }
func (f failed) Info() Info                           { return f.info }
