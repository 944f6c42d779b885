package main

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
)

// parseSize reads a size as QEMU does: a number, which may have a fraction or be
// hexadecimal, with a suffix B, K, M, G, T, P or E; without one it counts units.
func parseSize(text string, unit uint64) (uint64, error) {
	wrong := fmt.Errorf("size %q: write it as 512M or 2G", text)
	base, digits := 10, "0123456789"
	rest := text
	if hex, ok := strings.CutPrefix(strings.ToLower(text), "0x"); ok {
		base, digits, rest = 16, digits+"abcdef", hex
	}
	suffix := strings.TrimLeft(rest, digits)
	n, err := strconv.ParseUint(rest[:len(rest)-len(suffix)], base, 64)
	large := fmt.Errorf("size %q: at most 4E is possible", text)
	switch {
	case errors.Is(err, strconv.ErrRange):
		return 0, large
	case err != nil:
		return 0, wrong
	}
	fraction := ""
	if behind, ok := strings.CutPrefix(suffix, "."); ok && base == 10 {
		suffix = strings.TrimLeft(behind, digits)
		fraction = behind[:len(behind)-len(suffix)]
	}
	if suffix != "" {
		if unit, err = unitOf(suffix); err != nil {
			return 0, wrong
		}
	}
	if n > 1<<62/unit {
		return 0, large
	}
	size := n * unit
	if strings.Trim(fraction, "0") != "" {
		part, err := strconv.ParseFloat("0."+fraction, 64)
		if err != nil || unit == 1 { // there are no parts of bytes
			return 0, wrong
		}
		size += uint64(part * float64(unit))
	}
	return size, nil
}

// unitOf is how many bytes a suffix of sizes counts.
func unitOf(suffix string) (uint64, error) {
	upper := strings.ToUpper(suffix)
	if upper == "B" {
		return 1, nil
	}
	power := strings.IndexByte("KMGTPE", upper[0])
	if power < 0 || upper[1:] != "" && upper[1:] != "B" && upper[1:] != "IB" {
		return 0, strconv.ErrSyntax
	}
	return 1 << (10 * (power + 1)), nil
}

// humanSize writes a size as qemu-img does: three digits of the unit that fits.
func humanSize(n int64) string {
	_, exponent := math.Frexp(float64(n) * 1024 / 1000)
	power := max(0, (exponent-1)/10)
	return fmt.Sprintf("%.3g %sB", float64(n)/float64(int64(1)<<(10*power)), []string{"", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"}[power])
}
