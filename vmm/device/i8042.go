package device

import "sync"

// Keyboard controller commands.
const (
	kbcReadRAM      = 0x20 // to 0x3F; 0x20 is the configuration byte
	kbcWriteRAM     = 0x60 // to 0x7F, likewise
	kbcDisableMouse = 0xA7
	kbcEnableMouse  = 0xA8
	kbcTestMouse    = 0xA9
	kbcSelfTest     = 0xAA
	kbcTestKeyboard = 0xAB
	kbcDisable      = 0xAD
	kbcEnable       = 0xAE
	kbcReadInput    = 0xC0
	kbcReadOutput   = 0xD0
	kbcWriteOutput  = 0xD1
	kbcEchoKeyboard = 0xD2
	kbcEchoMouse    = 0xD3
	kbcToMouse      = 0xD4
	kbcPulse        = 0xF0 // to 0xFF: pulses the output port's lines whose bit is 0
)

// Keyboard controller bits.
const (
	kbcFull       = 1 << 0 // status: a byte is to be read
	kbcPassedTest = 1 << 2 // status and configuration
	kbcCommand    = 1 << 3 // status: the last byte written was a command
	kbcUnlocked   = 1 << 4 // status

	kbcKeyboardOff = 1 << 4 // configuration
	kbcMouseOff    = 1 << 5

	kbcNotReset = 1 << 0 // output port: low resets
	kbcA20      = 1 << 1

	kbcTestPassed = 0x55
	kbcClockLow   = 0x01 // the answer of a port that nothing is connected to
)

// I8042 is a keyboard controller with neither keyboard nor mouse: what is left
// is the reset line (command 0xFE) that kernels pull, and an answer to
// everything a probe waits for, so that it ends without timeouts. It never
// interrupts. Where the FADT's 8042 flag is clear, Linux does not even look.
type I8042 struct {
	platform Platform
	mu       sync.Mutex
	s        I8042State // guarded by mu
}

// I8042State is what of an I8042 survives a checkpoint.
type I8042State struct {
	Config     uint8
	Pending    uint8 // command that waits for its parameter; 0: none
	Output     uint8 // byte to be read
	OutputFull bool
	Command    bool // the last byte written was a command
}

// NewI8042 returns the controller.
func NewI8042(platform Platform) *I8042 {
	c := &I8042{platform: platform}
	c.Reset()
	return c
}

// Map puts the controller at its two ports.
func (c *I8042) Map(ports *Bus) error {
	if err := ports.Map(PortI8042Data, 1, (*i8042Data)(c)); err != nil {
		return err
	}
	return ports.Map(PortI8042Cmd, 1, (*i8042Command)(c))
}

// Reset brings the controller to the state that firmware leaves it in.
func (c *I8042) Reset() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.s = I8042State{Config: kbcPassedTest | kbcKeyboardOff | kbcMouseOff}
}

// State returns what must survive a checkpoint.
func (c *I8042) State() I8042State {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.s
}

// Restore takes over saved state.
func (c *I8042) Restore(s I8042State) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.s = s
}

// answer makes v the byte to be read.
func (c *I8042) answer(v uint8) { c.s.Output, c.s.OutputFull = v, true }

// command starts a command; it tells whether it resets the machine.
func (c *I8042) command(v uint8) (reset bool) {
	c.s.Command, c.s.Pending = true, 0
	switch v {
	case kbcReadRAM:
		c.answer(c.s.Config)
	case kbcDisableMouse:
		c.s.Config |= kbcMouseOff
	case kbcEnableMouse:
		c.s.Config &^= kbcMouseOff
	case kbcTestMouse, kbcTestKeyboard:
		c.answer(kbcClockLow)
	case kbcSelfTest:
		c.s.Config = kbcPassedTest | kbcKeyboardOff | kbcMouseOff
		c.answer(kbcTestPassed)
	case kbcDisable:
		c.s.Config |= kbcKeyboardOff
	case kbcEnable:
		c.s.Config &^= kbcKeyboardOff
	case kbcReadInput:
		c.answer(1 << 7) // keyboard not locked
	case kbcReadOutput:
		c.answer(kbcNotReset | kbcA20)
	case kbcWriteOutput, kbcEchoKeyboard, kbcEchoMouse, kbcToMouse:
		c.s.Pending = v
	default:
		switch {
		case v >= kbcPulse:
			return v&kbcNotReset == 0
		case v >= kbcWriteRAM && v < kbcWriteRAM+0x20:
			c.s.Pending = v
		case v > kbcReadRAM && v < kbcReadRAM+0x20:
			c.answer(0)
		}
	}
	return false
}

// data takes a command's parameter, or a byte for the absent keyboard; it
// tells whether it resets the machine.
func (c *I8042) data(v uint8) (reset bool) {
	pending := c.s.Pending
	c.s.Command, c.s.Pending = false, 0
	switch pending {
	case kbcWriteRAM:
		c.s.Config = v
	case kbcWriteOutput:
		return v&kbcNotReset == 0
	case kbcEchoKeyboard:
		c.answer(v)
	case kbcEchoMouse:
		c.answer(^v) // wrong, which tells a probe at once that there is no mouse port
	}
	return false
}

// i8042Data is the data port.
type i8042Data I8042

func (d *i8042Data) Read(_ uint64, p []byte) {
	c := (*I8042)(d)
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range p {
		p[i] = c.s.Output
		c.s.OutputFull = false
	}
}

func (d *i8042Data) Write(_ uint64, p []byte) {
	c := (*I8042)(d)
	c.write(p, c.data, "keyboard controller output port")
}

// i8042Command is the command and status port.
type i8042Command I8042

func (d *i8042Command) Read(_ uint64, p []byte) {
	c := (*I8042)(d)
	c.mu.Lock()
	defer c.mu.Unlock()
	v := uint8(kbcUnlocked) | c.s.Config&kbcPassedTest
	if c.s.OutputFull {
		v |= kbcFull
	}
	if c.s.Command {
		v |= kbcCommand
	}
	for i := range p {
		p[i] = v
	}
}

func (d *i8042Command) Write(_ uint64, p []byte) {
	c := (*I8042)(d)
	c.write(p, c.command, "keyboard controller pulse")
}

// write gives each byte to f, and resets the machine where f says so.
func (c *I8042) write(p []byte, f func(uint8) bool, why string) {
	for _, v := range p {
		c.mu.Lock()
		reset := f(v)
		c.mu.Unlock()
		if reset {
			c.platform.Reset(why)
		}
	}
}
