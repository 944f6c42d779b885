// Package qmp is a server for the QEMU Machine Protocol (QEMU's docs/interop/qmp-spec).
//
// A command is a Go function with typed arguments and a typed result. Argument checking, query-commands and
// query-qmp-schema are all derived from those types, so what is advertised is what is enforced:
//
//	reg := qmp.NewRegistry()
//	qmp.Register(reg, "balloon", func(ctx context.Context, s *qmp.Session, a struct {
//		Value int64 `qmp:"value"`
//	}) (qmp.Empty, error) { ... })
//	srv := qmp.NewServer(reg, qmp.Version{Major: 7, Minor: 2, Package: "gnomon"})
//	err := srv.Listen("unix:/run/vm.sock")
//
// What a client can observe follows QEMU 7.2: the lenient input syntax and how it resynchronises after garbage, the texts
// and classes of errors, capability negotiation, out-of-band execution with a queue of eight, descriptors passed with
// commands, rate-limited events, and jobs. The differences are deliberate and few: any number of connections, each
// a session of its own; one message is limited to 4 MiB instead of 64; and a client that does not read its events is
// disconnected (see Server.Emit).
//
// Go types map to QAPI types as follows. A field's name is its `qmp` tag, or the Go name in lower case with hyphens.
//
//   - string, bool: str, bool; all integer types: int, checked against the Go type's range; float64: number
//   - a named string type with a method Values() []string: an enumeration of those values
//   - slices: arrays; structs: objects, with the fields of embedded structs as members of their own
//   - a pointer, or a field tagged `qmp:"name,omitempty"`: an optional member
//   - a struct with an enumeration field tagged `qmp:"name,tag"` and pointer fields tagged `qmp:"value,variant"`:
//     a flat union, whose chosen variant's members stand beside its own
//   - a struct whose fields are all pointers tagged `qmp:",alternate"`: an alternate, told apart by JSON type
//   - any: any value, as nil, bool, int64, uint64, float64, string, []any or map[string]any
package qmp

import "fmt"

// ErrorClass is the class of an error response. Clients may rely on it; they must not rely on the text.
type ErrorClass string

// The error classes of QMP. Everything that clients need not tell apart is a GenericError.
const (
	GenericError    ErrorClass = "GenericError"
	CommandNotFound ErrorClass = "CommandNotFound"
	DeviceNotActive ErrorClass = "DeviceNotActive"
	DeviceNotFound  ErrorClass = "DeviceNotFound"
	KVMMissingCap   ErrorClass = "KVMMissingCap"
)

// Error is an error with the class that the client is told. A command that returns any other error answers GenericError.
type Error struct {
	Class ErrorClass
	Desc  string
}

func (e *Error) Error() string { return e.Desc }

// Errorf returns an Error of class GenericError.
func Errorf(format string, args ...any) *Error {
	return &Error{Class: GenericError, Desc: fmt.Sprintf(format, args...)}
}

// Empty is the argument or result of a command that has none.
type Empty struct{}

// Version is what the greeting and query-version tell. Clients take Major, Minor and Micro for the version of QEMU whose
// commands are to be expected; Package names the implementation.
type Version struct {
	Major, Minor, Micro int
	Package             string
}

// versionInfo is VersionInfo of QEMU's qapi/control.json.
type versionInfo struct {
	QEMU    versionTriple `qmp:"qemu"`
	Package string        `qmp:"package"`
}

type versionTriple struct {
	Micro int64 `qmp:"micro"`
	Minor int64 `qmp:"minor"`
	Major int64 `qmp:"major"`
}

func (v Version) info() versionInfo {
	return versionInfo{
		QEMU:    versionTriple{Micro: int64(v.Micro), Minor: int64(v.Minor), Major: int64(v.Major)},
		Package: v.Package,
	}
}
