package pager

import (
	"errors"
	"fmt"
	"strings"
)

// ErrPolicy is a prefetch policy that there is not.
var ErrPolicy = errors.New("not a prefetch policy")

// Policy says what is loaded beside the page that is demanded. Policies can be
// combined; without any, it is that page alone.
type Policy uint

// The policies.
const (
	// Physical brings the page's neighbours by guest-physical address.
	Physical Policy = 1 << iota
	// Locality brings the page's block, its neighbours by guest-virtual address,
	// and, while the guest walks from block to block, more and more of what is
	// next.
	Locality
	// Recorded brings, before anything is demanded, the blocks of an earlier run.
	Recorded
)

var policyNames = []struct {
	policy Policy
	name   string
}{{Physical, "physical"}, {Locality, "locality"}, {Recorded, "recorded"}}

// String is what ParsePolicy takes.
func (p Policy) String() string {
	var names []string
	for _, n := range policyNames {
		if p&n.policy != 0 {
			names = append(names, n.name)
		}
	}
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ",")
}

// ParsePolicy reads "none", or any of "physical", "locality" and "recorded"
// with commas between.
func ParsePolicy(s string) (Policy, error) {
	if s == "none" {
		return 0, nil
	}
	var p Policy
next:
	for _, name := range strings.Split(s, ",") {
		for _, n := range policyNames {
			if n.name == name {
				p |= n.policy
				continue next
			}
		}
		if name == "none" {
			return 0, fmt.Errorf("%w: %q: none goes with no other: leave out none, or the rest", ErrPolicy, s)
		}
		return 0, fmt.Errorf("%w: %q: none is possible, or physical, locality and recorded, also together with commas between", ErrPolicy, name)
	}
	return p, nil
}
