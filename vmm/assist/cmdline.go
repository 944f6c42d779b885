package assist

import "strings"

// kernelParameters keep a Linux guest away from what the emulator lacks, and
// from work that only hardware with the flaws needs.
//
// clearcpuid is needed because CPUID leaves 1 and 7 show the host's own bits,
// whatever KVM_SET_CPUID2 said. Linux 6.1 reads the first 127 characters of the
// list, so what a kernel would use comes first. erms and fsrm are there for
// time: REP STOSB and REP MOVSB are interpreted byte by byte.
var kernelParameters = []string{
	"nokaslr", "nopti", "mitigations=off", "noxsave", "8250.nr_uarts=1",
	"clearcpuid=smap,smep,cx16,popcnt,erms,fsrm,avx,avx2,avx512f,aes,pclmulqdq,sha_ni,ssse3,sse4_1,sse4_2,movbe,bmi1,bmi2,rdrand,rdseed,pcid,invpcid,fsgsbase,umip",
}

// Cmdline adds to a Linux command line what this host needs, each parameter
// only where the user has not set it.
func Cmdline(user string) string {
	have := map[string]bool{}
	for _, word := range strings.Fields(user) {
		key, _, _ := strings.Cut(word, "=")
		have[key] = true
	}
	words := strings.Fields(user)
	var added []string
	for _, word := range kernelParameters {
		if key, _, _ := strings.Cut(word, "="); !have[key] {
			added = append(added, word)
		}
	}
	// In front, so that what the user gave comes last and wins.
	return strings.Join(append(added, words...), " ")
}
