package assist

import (
	"fmt"
	"strings"
)

// kernelParameters keep a Linux guest away from what the emulator lacks, and
// from work that only hardware with the flaws needs.
//
// clearcpuid comes with the features a kernel would use first in front: Linux
// cuts the list after about 150 characters. It is needed because CPUID leaves
// 1 and 7 show the host's own bits, whatever KVM_SET_CPUID2 said.
var kernelParameters = []string{
	"nokaslr", "nopti", "mitigations=off", "noxsave", "8250.nr_uarts=1",
	"clearcpuid=smap,smep,cx16,popcnt,avx,avx2,avx512f,aes,pclmulqdq,sha_ni,ssse3,sse4_1,sse4_2,movbe,bmi1,bmi2,rdrand,rdseed,pcid,invpcid,fsgsbase,umip",
}

// lpjHZ is the tick rate that lpj is given for: that of Debian's kernels and
// most others. At another rate udelay is off by the ratio.
const lpjHZ = 250

// Cmdline adds to a Linux command line what this host needs, each parameter
// only where the user has not set it.
func Cmdline(user string, tscKHz int) string {
	have := map[string]bool{}
	for _, word := range strings.Fields(user) {
		key, _, _ := strings.Cut(word, "=")
		have[key] = true
	}
	words := strings.Fields(user)
	add := kernelParameters
	if tscKHz > 0 {
		add = append(add[:len(add):len(add)], fmt.Sprintf("lpj=%d", tscKHz*1000/lpjHZ))
	}
	var added []string
	for _, word := range add {
		if key, _, _ := strings.Cut(word, "="); !have[key] {
			added = append(added, word)
		}
	}
	// In front, so that what the user gave comes last and wins.
	return strings.Join(append(added, words...), " ")
}
