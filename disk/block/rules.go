package block

// ZeroDetection is what a node makes of writes all of whose bytes are zero.
type ZeroDetection string

// Zero detections, in QEMU's words.
const (
	ZeroesOff   ZeroDetection = ""      // they are writes like others
	ZeroesOn    ZeroDetection = "on"    // they become WriteZeroes
	ZeroesUnmap ZeroDetection = "unmap" // which may give space back
)

// WriteRules say what a node does with what need not be kept. Without any, as their
// zero value is, space goes back to the host as it is asked for.
type WriteRules struct {
	// KeepDiscarded has Discard do nothing, and WriteZeroes keep the space.
	KeepDiscarded bool
	Zeroes        ZeroDetection
}

// Ruled is a Node that has rules.
type Ruled interface {
	Node
	Rules() WriteRules
	// SetRules changes them. There are no requests meanwhile.
	SetRules(WriteRules)
}

// RulesOf are the rules of a node; one that has none is as the zero value says.
func RulesOf(n Node) WriteRules {
	if r, ok := n.(Ruled); ok {
		return r.Rules()
	}
	return WriteRules{}
}

// Detects tells that a write of bufs is to become WriteZeroes.
func (r WriteRules) Detects(bufs [][]byte) bool {
	if r.Zeroes == ZeroesOff {
		return false
	}
	for _, b := range bufs {
		if !IsZero(b) {
			return false
		}
	}
	return true
}

// Unmaps tells whether WriteZeroes may give space back that was asked to.
func (r WriteRules) Unmaps(unmap bool) bool { return unmap && !r.KeepDiscarded }
