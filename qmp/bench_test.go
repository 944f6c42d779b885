package qmp_test

import (
	"bytes"
	"testing"
	"time"
)

// BenchmarkCommands runs query-status on QEMU and on us, one command after the other and in batches of 64, with the same client.
// The ratio is of commands a second, ours to QEMU's.
func BenchmarkCommands(b *testing.B) {
	for name, batch := range map[string]int{"one-by-one": 1, "batches": 64} {
		b.Run(name, func(b *testing.B) {
			peers := map[string]*wire{"qemu": negotiated(b, startQEMU(b)), "gnomon": negotiated(b, newMachine(b).path)}
			command := bytes.Repeat([]byte("{\"execute\": \"query-status\"}\n"), batch)
			took := map[string]time.Duration{}
			// Alternate, so that both see the same disturbances.
			for range b.N {
				for name, w := range peers {
					w.SetDeadline(time.Now().Add(guard))
					start := time.Now()
					for range 64 / batch {
						w.Write(command)
						for range batch {
							if _, err := w.r.ReadSlice('\n'); err != nil {
								b.Fatal(err)
							}
						}
					}
					took[name] += time.Since(start)
				}
			}
			rate := func(name string) float64 { return float64(64*b.N) / took[name].Seconds() }
			b.ReportMetric(rate("gnomon"), "gnomon-commands/s")
			b.ReportMetric(rate("qemu"), "qemu-commands/s")
			b.ReportMetric(rate("gnomon")/rate("qemu"), "ratio")
			b.ReportMetric(0, "ns/op")
		})
	}
}
