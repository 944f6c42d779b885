// Package wire is what the Linux kit's init and the tests outside say to each
// other: one JSON request a line towards the guest, one JSON reply a line back.
//
// A reply line begins with the ASCII record separator (0x1E), as RFC 7464 has
// it, so that a reader can find replies among kernel messages on a console.
// Replies may come in another order than their requests; ID tells which is
// which.
package wire

import "encoding/json"

// RecordSeparator begins each reply line.
const RecordSeparator = 0x1e

// Ready is printed on the console once the guest answers requests.
const Ready = "gnomon-init: ready"

// Ports on which the guest listens.
const (
	VsockAgentPort = 1  // the agent: this protocol
	VsockEchoPort  = 7  // sends back what it receives
	TCPEchoPort    = 7  // sends back what it receives
	TCPHTTPPort    = 80 // GET /pattern?seed=S&size=N, anything else is a greeting
)

// Request asks the guest for one thing. Args is the Args type of the command.
type Request struct {
	ID      uint64          `json:"id"`
	Command Command         `json:"cmd"`
	Args    json.RawMessage `json:"args,omitempty"`
}

// Reply answers the request with the same ID: Error is empty on success, and
// Result is then the Result type of the command.
type Reply struct {
	ID     uint64          `json:"id"`
	Error  string          `json:"error,omitempty"`
	Result json.RawMessage `json:"result,omitempty"`
}

// Command names what is asked.
type Command string

// The commands. Each takes the type named after it in this package with the
// suffix Args, and answers with the one with the suffix Result, or nothing.
const (
	CommandFacts      Command = "facts"       // - -> FactsResult
	CommandCancel     Command = "cancel"      // CancelArgs
	CommandExec       Command = "exec"        // ExecArgs -> ExecResult
	CommandMount      Command = "mount"       // MountArgs
	CommandUnmount    Command = "unmount"     // PathArgs
	CommandWrite      Command = "write"       // WriteArgs -> SumResult
	CommandRead       Command = "read"        // ReadArgs -> SumResult
	CommandGetFile    Command = "get-file"    // PathArgs -> DataResult
	CommandPutFile    Command = "put-file"    // PutFileArgs
	CommandDropCaches Command = "drop-caches" // -
	CommandChurn      Command = "churn"       // ChurnArgs -> ChurnResult
	CommandDHCP       Command = "dhcp"        // LinkArgs -> DHCPResult
	CommandAddress    Command = "address"     // AddressArgs
	CommandLink       Command = "link"        // LinkArgs -> LinkResult
	CommandHTTPGet    Command = "http-get"    // HTTPGetArgs -> HTTPGetResult
	CommandEchoTest   Command = "echo-test"   // EchoTestArgs -> SumResult
	CommandConverse   Command = "converse"    // ConverseArgs -> ConverseResult
	CommandRandom     Command = "random"      // RandomArgs -> DataResult
	CommandMemInfo    Command = "meminfo"     // - -> MemInfoResult
	CommandFill       Command = "fill"        // FillArgs -> SumResult
	CommandVerify     Command = "verify"      // NameArgs -> SumResult
	CommandForget     Command = "forget"      // NameArgs
	CommandBurn       Command = "burn"        // BurnArgs -> BurnResult
	CommandClocks     Command = "clocks"      // - -> ClocksResult
	CommandWatchClock Command = "watch-clock" // WatchClockArgs -> WatchClockResult
	CommandSleep      Command = "sleep"       // SleepArgs
	CommandDmesg      Command = "dmesg"       // DmesgArgs -> TextResult
	CommandEvents     Command = "events"      // - -> EventsResult
	CommandPowerOff   Command = "poweroff"    // -; the reply comes before the machine goes
	CommandReboot     Command = "reboot"      // -; likewise
	CommandPanic      Command = "panic"       // -; likewise
)

// Arguments and results. Sizes are in bytes, durations in milliseconds and
// hashes are SHA-256 in lower-case hexadecimal unless a name says otherwise.
type (
	// FactsResult says what the guest is.
	FactsResult struct {
		Release string `json:"release"` // as uname -r
		CPUs    int    `json:"cpus"`    // online
		Cmdline string `json:"cmdline"` // /proc/cmdline
		// BootMS is the guest's time since boot when init started.
		BootMS int64 `json:"boot_ms"`
		// ReadyMS is the same when init was ready.
		ReadyMS int64 `json:"ready_ms"`
	}

	// CancelArgs names a request of the same connection to end early.
	CancelArgs struct {
		ID uint64 `json:"id"`
	}

	// ExecArgs is a program to run. A first argument without a slash that is
	// not found in PATH is a busybox applet.
	ExecArgs struct {
		Argv      []string `json:"argv"`
		Stdin     string   `json:"stdin,omitempty"`
		TimeoutMS int64    `json:"timeout_ms,omitempty"` // 0: none
	}
	// ExecResult is what it did. At most MaxOutput bytes of each stream.
	ExecResult struct {
		Status int    `json:"status"` // exit status; 128 + signal if killed
		Stdout string `json:"stdout"`
		Stderr string `json:"stderr"`
	}

	// MountArgs is as mount(2). Options may hold ro, noatime and sync; the
	// rest is the file system's.
	MountArgs struct {
		Source  string `json:"source"`
		Target  string `json:"target"` // made if missing
		Type    string `json:"type"`
		Options string `json:"options,omitempty"`
	}
	// PathArgs names a file.
	PathArgs struct {
		Path string `json:"path"`
	}
	// NameArgs names a filled stretch of memory.
	NameArgs struct {
		Name string `json:"name"`
	}

	// WriteArgs writes the pattern of a seed (Pattern) to a file or device.
	WriteArgs struct {
		Path   string `json:"path"`
		Seed   uint64 `json:"seed"`
		Offset int64  `json:"offset,omitempty"`
		Size   int64  `json:"size"`
		Sync   bool   `json:"sync,omitempty"`   // fsync before the reply
		Direct bool   `json:"direct,omitempty"` // O_DIRECT: multiples of 4096
	}
	// ReadArgs hashes a file or device.
	ReadArgs struct {
		Path   string `json:"path"`
		Offset int64  `json:"offset,omitempty"`
		Size   int64  `json:"size,omitempty"` // 0: to the end
		Direct bool   `json:"direct,omitempty"`
	}
	// SumResult is a length and its hash.
	SumResult struct {
		Size   int64  `json:"size"`
		SHA256 string `json:"sha256"`
	}
	// DataResult is bytes, base64 on the wire.
	DataResult struct {
		Data []byte `json:"data"`
	}
	// TextResult is text.
	TextResult struct {
		Text string `json:"text"`
	}
	// PutFileArgs replaces a file.
	PutFileArgs struct {
		Path string `json:"path"`
		Data []byte `json:"data"`
		Mode uint32 `json:"mode,omitempty"` // 0: 0644
	}

	// ChurnArgs asks for writes and reads that go on until the time is over
	// or the request is cancelled. Every block read is checked against what
	// was last written there.
	ChurnArgs struct {
		Path   string `json:"path"`
		Seed   uint64 `json:"seed"`
		Blocks int    `json:"blocks"` // of 4096 bytes
		MS     int64  `json:"ms,omitempty"`
		Sync   bool   `json:"sync,omitempty"`   // fsync after each write
		Direct bool   `json:"direct,omitempty"` // O_DIRECT
	}
	// ChurnResult counts them. Wrong is the number of blocks that did not
	// hold what they should.
	ChurnResult struct {
		Writes uint64 `json:"writes"`
		Reads  uint64 `json:"reads"`
		Wrong  uint64 `json:"wrong"`
	}

	// LinkArgs names a network interface; empty means eth0.
	LinkArgs struct {
		Interface string `json:"interface,omitempty"`
	}
	// LinkResult is the state of a network interface.
	LinkResult struct {
		MAC     string `json:"mac"`
		MTU     int    `json:"mtu"`
		Up      bool   `json:"up"`      // administratively
		Carrier bool   `json:"carrier"` // the cable is in
		Address string `json:"address,omitempty"`
	}
	// DHCPResult is the lease.
	DHCPResult struct {
		Address string   `json:"address"` // with prefix length
		Router  string   `json:"router,omitempty"`
		DNS     []string `json:"dns,omitempty"`
		Server  string   `json:"server"`
		LeaseS  uint32   `json:"lease_s"`
	}
	// AddressArgs sets an address by hand.
	AddressArgs struct {
		Interface string   `json:"interface,omitempty"`
		Address   string   `json:"address"` // with prefix length
		Router    string   `json:"router,omitempty"`
		DNS       []string `json:"dns,omitempty"`
	}

	// HTTPGetArgs is an http:// URL.
	HTTPGetArgs struct {
		URL       string `json:"url"`
		TimeoutMS int64  `json:"timeout_ms,omitempty"` // 0: 60 s
	}
	// HTTPGetResult is the answer to it, body hashed.
	HTTPGetResult struct {
		Status int `json:"status"`
		SumResult
	}

	// EchoTestArgs sends the pattern of Seed to an echo server and checks what
	// comes back. Network is tcp with Address host:port, or vsock with Address
	// cid:port.
	EchoTestArgs struct {
		Network string `json:"network"`
		Address string `json:"address"`
		Seed    uint64 `json:"seed"`
		Size    int64  `json:"size"`
	}

	// ConverseArgs is as EchoTestArgs for a connection that stays until the
	// request is cancelled: ConversePiece bytes go to and fro, then nothing for
	// MS milliseconds.
	ConverseArgs struct {
		Network string `json:"network"`
		Address string `json:"address"`
		Seed    uint64 `json:"seed"`
		MS      int64  `json:"ms"`
	}
	// ConverseResult counts the pieces, and those that came back changed.
	ConverseResult struct {
		Rounds int64 `json:"rounds"`
		Wrong  int64 `json:"wrong"`
	}

	// RandomArgs reads a source of random bytes, at most MaxOutput of them.
	RandomArgs struct {
		Source string `json:"source"` // a device, /dev/hwrng or /dev/random
		Size   int    `json:"size"`
	}

	// MemInfoResult is /proc/meminfo in bytes.
	MemInfoResult struct {
		Total     uint64 `json:"total"`
		Free      uint64 `json:"free"`
		Available uint64 `json:"available"`
	}
	// FillArgs allocates memory, fills it with the pattern of Seed and keeps
	// it under Name.
	FillArgs struct {
		Name string `json:"name"`
		Seed uint64 `json:"seed"`
		Size int64  `json:"size"`
	}

	// BurnArgs keeps processors busy.
	BurnArgs struct {
		CPUs int   `json:"cpus"`
		MS   int64 `json:"ms"`
	}
	// BurnResult is how many turns of the same loop each did.
	BurnResult struct {
		Turns []uint64 `json:"turns"`
	}
	// ClocksResult is the guest's clocks, in nanoseconds, read together.
	ClocksResult struct {
		Realtime  int64  `json:"realtime_ns"`
		Monotonic int64  `json:"monotonic_ns"`
		Boottime  int64  `json:"boottime_ns"`
		Source    string `json:"source"` // current clock source
	}
	// WatchClockArgs has the monotonic clock read on all processors, with naps
	// of MS milliseconds between, until the request is cancelled.
	WatchClockArgs struct {
		MS int64 `json:"ms"`
	}
	// WatchClockResult counts readings, those that were before an earlier one
	// of any processor, naps, and those that were too short.
	WatchClockResult struct {
		Samples int64 `json:"samples"`
		Back    int64 `json:"back"`
		Naps    int64 `json:"naps"`
		Early   int64 `json:"early"`
	}
	// SleepArgs is how long to do nothing.
	SleepArgs struct {
		MS int64 `json:"ms"`
	}
	// DmesgArgs asks for the end of the kernel's log.
	DmesgArgs struct {
		Lines int `json:"lines,omitempty"` // 0: all there is
	}
	// EventsResult counts what happened to the guest.
	EventsResult struct {
		PowerButton uint64 `json:"power_button"`
	}
)

// ConversePiece is how many bytes go to and fro at a time in a conversation.
const ConversePiece = 4096

// MaxOutput is the most bytes of output, file or randomness one reply carries.
const MaxOutput = 256 << 10
