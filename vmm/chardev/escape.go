package chardev

// ctrlA begins an escape, as in QEMU with -nographic.
const ctrlA = 0x01

const escapeHelp = "\r\n" +
	"Ctrl-a h       print this help\r\n" +
	"Ctrl-a x       end the machine\r\n" +
	"Ctrl-a b       send a break (Linux: the SysRq key)\r\n" +
	"Ctrl-a Ctrl-a  send Ctrl-a; Ctrl-a a does, too\r\n"

// escape takes escapes out of what the user types. It applies to piped input,
// too, as in QEMU: a script leaves the same way as a user.
type escape struct {
	begun bool // Ctrl-a came last

	exit, sendBreak func()
	help            func(text string)
}

// filter removes escapes from p, in place, and acts on them. An unknown one
// does nothing.
func (e *escape) filter(p []byte) []byte {
	kept := p[:0]
	for _, c := range p {
		if !e.begun {
			if e.begun = c == ctrlA; !e.begun {
				kept = append(kept, c)
			}
			continue
		}
		e.begun = false
		switch c {
		case ctrlA, 'a':
			kept = append(kept, ctrlA)
		case 'x':
			e.exit()
		case 'b':
			e.sendBreak()
		case 'h', '?':
			e.help(escapeHelp)
		}
	}
	return kept
}
