package qmp

import (
	"context"
	"reflect"
)

var emptyType = reflect.TypeFor[Empty]()

// capability is QMPCapability of QEMU's qapi/control.json.
type capability string

const capabilityOOB capability = "oob"

func (capability) Values() []string { return []string{string(capabilityOOB)} }

type nameInfo struct {
	Name string `qmp:"name"`
}

// negotiationCommand is the only command there is before a session has negotiated.
const negotiationCommand = "qmp_capabilities"

// registerProtocol adds what QEMU has in qapi/control.json and qapi/introspect.json, and query-events, which older
// releases of QEMU had.
func registerProtocol(r *Registry) {
	Register(r, negotiationCommand, negotiate)
	Register(r, "query-qmp-schema", querySchema)
	Register(r, "query-version", func(_ context.Context, s *Session, _ Empty) (versionInfo, error) {
		return s.srv.version.info(), nil
	})
	Register(r, "query-commands", func(_ context.Context, s *Session, _ Empty) (out []nameInfo, _ error) {
		for _, c := range s.srv.reg.sortedCommands() {
			out = append(out, nameInfo{c.name})
		}
		return out, nil
	})
	Register(r, "query-events", func(_ context.Context, s *Session, _ Empty) (out []nameInfo, _ error) {
		for _, e := range s.srv.reg.sortedEvents() {
			out = append(out, nameInfo{e.name})
		}
		return out, nil
	})
}

type negotiateArguments struct {
	Enable []capability `qmp:"enable,omitempty"`
}

func negotiate(_ context.Context, s *Session, a negotiateArguments) (Empty, error) {
	if s.negotiated.Load() {
		return Empty{}, &Error{CommandNotFound, "Capabilities negotiation is already complete, command ignored"}
	}
	if len(a.Enable) > 0 {
		s.enableOOB()
	}
	s.negotiated.Store(true)
	return Empty{}, nil
}
