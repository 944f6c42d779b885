package extfs

type overlay struct{}

func (o overlay) apply(f *fileSystem, p []byte, off int64) error { return nil }
func (f *fileSystem) readJournal() error                         { return nil }
