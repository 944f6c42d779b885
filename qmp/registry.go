package qmp

import (
	"context"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"sync"
	"time"
)

// Registry holds the commands and events that a server offers. Register everything before the server listens: what comes
// later works, but a client may have read the schema already.
type Registry struct {
	mu       sync.RWMutex
	commands map[string]*command // guarded by mu
	events   map[string]*event   // guarded by mu
}

// command is a registered command.
type command struct {
	name     string
	args     *qtype
	result   *qtype
	allowOOB bool
	// run checks args, calls the function with lock held, and appends its result to out.
	run func(ctx context.Context, s *Session, args *object, lock sync.Locker, out []byte) ([]byte, error)
}

// event is a registered event.
type event struct {
	name     string
	data     *qtype
	interval time.Duration // least time between two of one key; zero for no limit
	key      func(data any) (key string, limited bool)
}

// NewRegistry returns a registry with the commands and events of the protocol itself: negotiation, introspection,
// descriptors and jobs.
func NewRegistry() *Registry {
	r := &Registry{commands: map[string]*command{}, events: map[string]*event{}}
	registerProtocol(r)
	registerDescriptors(r)
	registerJobs(r)
	return r
}

// CommandOption changes how a command is registered.
type CommandOption func(*command)

// AllowOOB lets clients run the command out of band: at once, while another command is running. Such a command must not
// wait for anything, and must be safe to run beside any other.
func AllowOOB() CommandOption { return func(c *command) { c.allowOOB = true } }

// Register adds a command. A is a struct whose fields are the arguments; R is the result, Empty for none. Both follow the
// mapping in the package documentation, and Register panics where they do not, or when name is taken.
//
// In-band commands run one at a time across all sessions, as in QEMU, so that they need no locks against each other; work
// that takes long belongs in a job. fn is called only with arguments that have been checked. ctx ends when the session
// does, but since a connection that is not in out-of-band mode is not read while its command runs, a client's hanging up is
// noticed only afterwards there.
func Register[A, R any](r *Registry, name string, fn func(context.Context, *Session, A) (R, error), opts ...CommandOption) {
	c := &command{name: name, args: compileType(reflect.TypeFor[A]()), result: compileType(reflect.TypeFor[R]())}
	if c.args.kind != kindObject {
		panic(fmt.Sprintf("qmp: arguments of command %q are no struct", name))
	}
	c.run = func(ctx context.Context, s *Session, args *object, lock sync.Locker, out []byte) ([]byte, error) {
		var a A
		if err := decodeArguments(c.args, args, reflect.ValueOf(&a).Elem()); err != nil {
			return out, err
		}
		result, err := callLocked(lock, func() (R, error) { return fn(ctx, s, a) })
		if err != nil {
			return out, err
		}
		return appendTyped(out, c.result, reflect.ValueOf(&result).Elem()), nil
	}
	for _, o := range opts {
		o(c)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.commands[name] != nil {
		panic(fmt.Sprintf("qmp: command %q is registered twice", name))
	}
	r.commands[name] = c
}

func callLocked[R any](lock sync.Locker, fn func() (R, error)) (R, error) {
	if lock != nil {
		lock.Lock()
		defer lock.Unlock()
	}
	return fn()
}

// EventOption changes how an event is registered.
type EventOption func(*event)

// RateLimit lets the event be sent at most once in each interval. Of those emitted meanwhile the last one is sent when the
// interval is over.
func RateLimit(interval time.Duration) EventOption {
	return RateLimitBy(interval, func(any) (string, bool) { return "", true })
}

// RateLimitBy is RateLimit for each of the things that the event tells of, by a key of its data, of which there must be few.
// Some may be sent at any rate.
func RateLimitBy(interval time.Duration, key func(data any) (key string, limited bool)) EventOption {
	return func(e *event) { e.interval, e.key = interval, key }
}

// RegisterEvent adds an event whose data is the struct T, Empty for none.
func RegisterEvent[T any](r *Registry, name string, opts ...EventOption) {
	e := &event{name: name, data: compileType(reflect.TypeFor[T]())}
	if e.data.kind != kindObject {
		panic(fmt.Sprintf("qmp: data of event %q is no struct", name))
	}
	for _, o := range opts {
		o(e)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.events[name] != nil {
		panic(fmt.Sprintf("qmp: event %q is registered twice", name))
	}
	r.events[name] = e
}

func (r *Registry) command(name string) *command {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.commands[name]
}

func (r *Registry) event(name string) *event {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.events[name]
}

// sortedCommands returns all commands by name.
func (r *Registry) sortedCommands() []*command {
	r.mu.RLock()
	defer r.mu.RUnlock()
	var out []*command
	for _, name := range sortedKeys(r.commands) {
		out = append(out, r.commands[name])
	}
	return out
}

// sortedEvents returns all events by name.
func (r *Registry) sortedEvents() []*event {
	r.mu.RLock()
	defer r.mu.RUnlock()
	var out []*event
	for _, name := range sortedKeys(r.events) {
		out = append(out, r.events[name])
	}
	return out
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
