package monitor

import (
	"context"
	"slices"

	"github.com/gnomon-vmm/gnomon/kvm"
	"github.com/gnomon-vmm/gnomon/qmp"
)

// The types of QEMU's qapi/stats.json.
type (
	statsTarget   string
	statsProvider string
	statsType     string
	statsUnit     string
)

const (
	statsVM   statsTarget = "vm"
	statsVCPU statsTarget = "vcpu"

	providerKVM statsProvider = "kvm"
)

func (statsTarget) Values() []string   { return []string{string(statsVM), string(statsVCPU)} }
func (statsProvider) Values() []string { return []string{string(providerKVM)} }
func (statsType) Values() []string {
	return []string{"cumulative", "instant", "peak", "linear-histogram", "log2-histogram"}
}
func (statsUnit) Values() []string { return []string{"bytes", "seconds", "cycles", "boolean"} }

type (
	statsFilter struct {
		Target    statsTarget     `qmp:"target,tag"`
		Providers *[]statsRequest `qmp:"providers"`
		VCPU      *vcpuFilter     `qmp:"vcpu,variant"`
	}
	statsRequest struct {
		Provider statsProvider `qmp:"provider"`
		Names    *[]string     `qmp:"names"`
	}
	vcpuFilter struct {
		VCPUs *[]string `qmp:"vcpus"`
	}
	statsResult struct {
		Provider statsProvider `qmp:"provider"`
		QOMPath  *string       `qmp:"qom-path"`
		Stats    []statValue   `qmp:"stats"`
	}
	statValue struct {
		Name  string    `qmp:"name"`
		Value statDatum `qmp:"value"`
	}
	statDatum struct {
		Scalar  *uint64   `qmp:",alternate"`
		Boolean *bool     `qmp:",alternate"`
		List    *[]uint64 `qmp:",alternate"`
	}
	statsSchemaArguments struct {
		Provider *statsProvider `qmp:"provider"`
	}
	statsSchema struct {
		Provider statsProvider     `qmp:"provider"`
		Target   statsTarget       `qmp:"target"`
		Stats    []statsSchemaItem `qmp:"stats"`
	}
	statsSchemaItem struct {
		Name       string     `qmp:"name"`
		Type       statsType  `qmp:"type"`
		Unit       *statsUnit `qmp:"unit"`
		Base       *int8      `qmp:"base"`
		Exponent   int16      `qmp:"exponent"`
		BucketSize *uint32    `qmp:"bucket-size"`
	}
)

func (mon *monitor) registerStats(reg *qmp.Registry) {
	qmp.Register(reg, "query-stats", mon.queryStats)
	qmp.Register(reg, "query-stats-schemas", mon.queryStatsSchemas)
}

func (mon *monitor) queryStats(_ context.Context, _ *qmp.Session, a statsFilter) ([]statsResult, error) {
	wanted := func(string) bool { return true }
	if a.Providers != nil {
		// There is one provider: a statistic is wanted when any request wants it.
		if len(*a.Providers) == 0 {
			return nil, nil
		}
		wanted = func(name string) bool {
			return slices.ContainsFunc(*a.Providers, func(r statsRequest) bool {
				return r.Names == nil || slices.Contains(*r.Names, name)
			})
		}
	}
	if a.Target == statsVM {
		r, err := mon.stats(-1, wanted)
		if err != nil || len(r.Stats) == 0 {
			return nil, err
		}
		return []statsResult{r}, nil
	}
	var results []statsResult
	for _, c := range mon.m.CPUs() {
		path := cpuPath(c.Index)
		if a.VCPU != nil && a.VCPU.VCPUs != nil && !slices.Contains(*a.VCPU.VCPUs, path) {
			continue
		}
		r, err := mon.stats(c.Index, wanted)
		if err != nil {
			return nil, err
		}
		if len(r.Stats) != 0 {
			r.QOMPath = &path
			results = append(results, r)
		}
	}
	return results, nil
}

// stats reads the wanted statistics of a vCPU, or of the VM when cpu < 0.
func (mon *monitor) stats(cpu int, wanted func(name string) bool) (statsResult, error) {
	r := statsResult{Provider: providerKVM}
	all, err := mon.m.Stats(cpu)
	if err != nil {
		return r, err
	}
	for _, s := range all {
		if known(s) && wanted(s.Name) {
			r.Stats = append(r.Stats, statValue{Name: s.Name, Value: datum(s)})
		}
	}
	return r, nil
}

// known tells whether QMP has words for the statistic's type and unit; newer
// kernels may have more.
func known(s kvm.Stat) bool {
	unit := s.Unit.String()
	return slices.Contains(statsType("").Values(), s.Type.String()) &&
		(unit == "" || slices.Contains(statsUnit("").Values(), unit)) && len(s.Value) > 0
}

func datum(s kvm.Stat) statDatum {
	switch {
	case s.Type == kvm.StatLinearHistogram || s.Type == kvm.StatLogHistogram:
		return statDatum{List: &s.Value}
	case s.Unit == kvm.StatBoolean:
		on := s.Value[0] != 0
		return statDatum{Boolean: &on}
	}
	return statDatum{Scalar: &s.Value[0]}
}

// queryStatsSchemas takes no notice of the provider asked for: there is one.
func (mon *monitor) queryStatsSchemas(_ context.Context, _ *qmp.Session, _ statsSchemaArguments) ([]statsSchema, error) {
	var schemas []statsSchema
	for _, target := range []struct {
		statsTarget
		cpu int
	}{{statsVM, -1}, {statsVCPU, 0}} {
		all, err := mon.m.Stats(target.cpu)
		if err != nil {
			return nil, err
		}
		schema := statsSchema{Provider: providerKVM, Target: target.statsTarget}
		for _, s := range all {
			if known(s) {
				schema.Stats = append(schema.Stats, schemaItem(s))
			}
		}
		schemas = append(schemas, schema)
	}
	return schemas, nil
}

func schemaItem(s kvm.Stat) statsSchemaItem {
	i := statsSchemaItem{Name: s.Name, Type: statsType(s.Type.String()), Exponent: s.Exponent}
	if unit := statsUnit(s.Unit.String()); unit != "" {
		i.Unit = &unit
	}
	if base := int8(s.Base); s.Exponent != 0 {
		i.Base = &base
	}
	if s.Type == kvm.StatLinearHistogram {
		i.BucketSize = &s.BucketSize
	}
	return i
}
