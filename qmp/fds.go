package qmp

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// maxNamedFDs is how many descriptors a session may keep by name.
	maxNamedFDs = 64
	// maxSetFDs is how many descriptors the sets of a server may hold together.
	maxSetFDs = 1024
)

// ErrFDSet means that a descriptor set does not exist or has no descriptor of the access mode wanted.
var ErrFDSet = errors.New("no such file descriptor in set")

// parseRights returns the descriptors in a control message. On a malformed one there are none.
func parseRights(control []byte) (fds []int) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil
	}
	for i := range messages {
		if got, err := unix.ParseUnixRights(&messages[i]); err == nil {
			fds = append(fds, got...)
		}
	}
	return fds
}

func closeFDs(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// sessionFDs are the descriptors that a client has passed and not yet added to a set.
type sessionFDs struct {
	mu     sync.Mutex
	passed []int          // guarded by mu; came with the last message that had any
	named  map[string]int // guarded by mu; kept by getfd
	closed bool           // guarded by mu
}

// arrived makes fds those that the next command may take. What nobody took of earlier ones is closed.
func (f *sessionFDs) arrived(fds []int) {
	if len(fds) == 0 {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	closeFDs(f.passed)
	f.passed = fds
}

// take returns the first of the descriptors passed, and closes the others.
func (f *sessionFDs) take() (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.passed) == 0 {
		return -1, Errorf("No file descriptor supplied via SCM_RIGHTS")
	}
	fd := f.passed[0]
	closeFDs(f.passed[1:])
	f.passed = nil
	return fd, nil
}

func (f *sessionFDs) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	closeFDs(f.passed)
	for _, fd := range f.named {
		unix.Close(fd)
	}
	f.passed, f.named, f.closed = nil, nil, true
}

// keep files fd under name, in place of what was there.
func (f *sessionFDs) keep(name string, fd int) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	old, replaced := f.named[name]
	if f.closed || !replaced && len(f.named) >= maxNamedFDs {
		unix.Close(fd)
		return Errorf("Too many named file descriptors")
	}
	if replaced {
		unix.Close(old)
	}
	if f.named == nil {
		f.named = map[string]int{}
	}
	f.named[name] = fd
	return nil
}

func (f *sessionFDs) remove(name string) (int, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	fd, ok := f.named[name]
	delete(f.named, name)
	return fd, ok
}

// TakeFD returns the descriptor that the client named with getfd. The caller owns it; the name is free again.
func (s *Session) TakeFD(name string) (*os.File, error) {
	fd, ok := s.fds.remove(name)
	if !ok {
		return nil, Errorf("File descriptor named '%s' has not been found", name)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// FDSets are the numbered sets of descriptors that clients add with add-fd, to be opened as /dev/fdset/N. A set that has
// never been opened is dropped when the last client goes, since nobody could then name it. The zero value is ready.
type FDSets struct {
	mu   sync.Mutex
	sets []*fdSet // guarded by mu, as is what they hold; sorted by id
}

type fdSet struct {
	id   int64
	fds  []setFD
	open int // files that Open returned and nobody released yet
}

type setFD struct {
	fd      int
	opaque  *string
	removed bool // to be closed when the set is not open any more
}

// Open duplicates the descriptor in set id whose access mode is that of flags (os.O_RDONLY, O_WRONLY or O_RDWR). The set is
// kept until release is called, which does not close the file.
func (s *FDSets) Open(id int64, flags int) (file *os.File, release func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	set, _ := s.findLocked(id)
	if set == nil {
		return nil, nil, fmt.Errorf("%w: set %d", ErrFDSet, id)
	}
	for _, f := range set.fds {
		mode, err := unix.FcntlInt(uintptr(f.fd), unix.F_GETFL, 0)
		if err != nil || f.removed || mode&unix.O_ACCMODE != flags&unix.O_ACCMODE {
			continue
		}
		fd, err := unix.FcntlInt(uintptr(f.fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return nil, nil, fmt.Errorf("%w: set %d: %w", ErrFDSet, id, err)
		}
		set.open++
		release := sync.OnceFunc(func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			set.open--
			s.tidyLocked(set)
		})
		return os.NewFile(uintptr(fd), fmt.Sprintf("/dev/fdset/%d", id)), release, nil
	}
	return nil, nil, fmt.Errorf("%w: set %d has none for this access mode", ErrFDSet, id)
}

// findLocked returns the set with the id, and where in sets it is or belongs.
func (s *FDSets) findLocked(id int64) (*fdSet, int) {
	i, ok := slices.BinarySearchFunc(s.sets, id, func(set *fdSet, id int64) int {
		switch {
		case set.id < id:
			return -1
		case set.id > id:
			return 1
		}
		return 0
	})
	if ok {
		return s.sets[i], i
	}
	return nil, i
}

// tidyLocked closes what is removed from a set that is not open, and forgets a set that is empty.
func (s *FDSets) tidyLocked(set *fdSet) {
	if set.open == 0 {
		set.fds = slices.DeleteFunc(set.fds, func(f setFD) bool {
			if f.removed {
				unix.Close(f.fd)
			}
			return f.removed
		})
	}
	if len(set.fds) == 0 {
		if found, i := s.findLocked(set.id); found == set {
			s.sets = slices.Delete(s.sets, i, i+1)
		}
	}
}

// add puts fd, which is the set's from here on, into set id, or into a new set with the least free id.
func (s *FDSets) add(fd int, id *int64, opaque *string) (addFDInfo, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	total := 0
	for _, set := range s.sets {
		total += len(set.fds)
	}
	switch {
	case id != nil && *id < 0:
		unix.Close(fd)
		return addFDInfo{}, Errorf("Parameter 'fdset-id' expects a non-negative value")
	case total >= maxSetFDs:
		unix.Close(fd)
		return addFDInfo{}, Errorf("Too many file descriptors in sets")
	}
	var want int64
	if id != nil {
		want = *id
	} else {
		for want < int64(len(s.sets)) && s.sets[want].id == want {
			want++
		}
	}
	set, i := s.findLocked(want)
	if set == nil {
		set = &fdSet{id: want}
		s.sets = slices.Insert(s.sets, i, set)
	}
	set.fds = append(set.fds, setFD{fd: fd, opaque: opaque})
	return addFDInfo{FDSetID: want, FD: int64(fd)}, nil
}

// remove marks one descriptor of a set, or all, as removed. They are closed when the set is not open.
func (s *FDSets) remove(id int64, fd *int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	name := "fdset-id:" + strconv.FormatInt(id, 10)
	if fd != nil {
		name += ", fd:" + strconv.FormatInt(*fd, 10)
	}
	set, _ := s.findLocked(id)
	found := set != nil && fd == nil
	if set != nil {
		for i := range set.fds {
			if fd == nil || int64(set.fds[i].fd) == *fd {
				set.fds[i].removed, found = true, true
			}
		}
	}
	if !found {
		return Errorf("File descriptor named '%s' not found", name)
	}
	s.tidyLocked(set)
	return nil
}

// dropUnused forgets every set that is not open.
func (s *FDSets) dropUnused() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, set := range slices.Clone(s.sets) {
		if set.open == 0 {
			for i := range set.fds {
				set.fds[i].removed = true
			}
			s.tidyLocked(set)
		}
	}
}

func (s *FDSets) closeAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, set := range s.sets {
		for _, f := range set.fds {
			unix.Close(f.fd)
		}
		set.fds = nil
	}
	s.sets = nil
}

func (s *FDSets) query() []fdSetInfo {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []fdSetInfo
	for _, set := range s.sets {
		info := fdSetInfo{FDSetID: set.id}
		for _, f := range set.fds {
			info.FDs = append(info.FDs, fdSetFDInfo{FD: int64(f.fd), Opaque: f.opaque})
		}
		out = append(out, info)
	}
	return out
}

type addFDInfo struct {
	FDSetID int64 `qmp:"fdset-id"`
	FD      int64 `qmp:"fd"`
}

type fdSetInfo struct {
	FDSetID int64         `qmp:"fdset-id"`
	FDs     []fdSetFDInfo `qmp:"fds"`
}

type fdSetFDInfo struct {
	FD     int64   `qmp:"fd"`
	Opaque *string `qmp:"opaque"`
}

// registerDescriptors adds the commands of QEMU's qapi/misc.json that deal in descriptors.
func registerDescriptors(r *Registry) {
	Register(r, "getfd", func(_ context.Context, s *Session, a struct {
		FDName string `qmp:"fdname"`
	},
	) (Empty, error) {
		fd, err := s.fds.take()
		if err != nil {
			return Empty{}, err
		}
		if a.FDName != "" && a.FDName[0] >= '0' && a.FDName[0] <= '9' {
			unix.Close(fd)
			return Empty{}, Errorf("Parameter 'fdname' expects a name not starting with a digit")
		}
		return Empty{}, s.fds.keep(a.FDName, fd)
	})
	Register(r, "closefd", func(_ context.Context, s *Session, a struct {
		FDName string `qmp:"fdname"`
	},
	) (Empty, error) {
		fd, ok := s.fds.remove(a.FDName)
		if !ok {
			return Empty{}, Errorf("File descriptor named '%s' not found", a.FDName)
		}
		unix.Close(fd)
		return Empty{}, nil
	})
	Register(r, "add-fd", func(_ context.Context, s *Session, a struct {
		FDSetID *int64  `qmp:"fdset-id"`
		Opaque  *string `qmp:"opaque"`
	},
	) (addFDInfo, error) {
		fd, err := s.fds.take()
		if err != nil {
			return addFDInfo{}, err
		}
		return s.srv.fds.add(fd, a.FDSetID, a.Opaque)
	})
	Register(r, "remove-fd", func(_ context.Context, s *Session, a struct {
		FDSetID int64  `qmp:"fdset-id"`
		FD      *int64 `qmp:"fd"`
	},
	) (Empty, error) {
		return Empty{}, s.srv.fds.remove(a.FDSetID, a.FD)
	})
	Register(r, "query-fdsets", func(_ context.Context, s *Session, _ Empty) ([]fdSetInfo, error) {
		return s.srv.fds.query(), nil
	})
}
