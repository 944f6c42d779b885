/* The command line names workloads; this runs them one after another. */
#include "probe.h"

extern u64 boot_tsc, start_info, fault_vector, fault_error, fault_rip, fault_rsp, fault_cr2;

static u64 ring3_tsc;

static void work_boot(const struct work *w)
{
	(void)w;
	line("boot");
	kv("tsc", boot_tsc);
	kv("ring3", ring3_tsc - boot_tsc);
	kv("ram", ram_bytes());
	kv("heap", heap_pages() * PAGE);
	end();
}

static void work_tsc(const struct work *w)
{
	(void)w;
	line("tsc");
	kv("khz", tsc_khz());
	kv("now", rdtsc());
	end();
}

static const struct {
	const char *name;
	void (*run)(const struct work *);
} workloads[] = {
	{"boot", work_boot}, {"tsc", work_tsc},
	{"map", work_map}, {"touch", work_touch}, {"chase", work_chase}, {"dirty", work_dirty},
	{"fill", work_fill}, {"verify", work_verify},
	{"out", work_out}, {"mmio", work_mmio}, {"cpuid", work_cpuid},
	{"tick", work_tick}, {"time", work_time}, {"spin", work_spin}, {"wait", work_wait},
	{"fault", work_fault}, {"blk", work_blk}, {"rng", work_rng}, {"net", work_net},
	{"mix", work_mix},
};

static void run(const struct work *w)
{
	for (size_t i = 0; i < sizeof workloads / sizeof *workloads; i++) {
		if (same(workloads[i].name, w->name)) {
			workloads[i].run(w);
			return;
		}
	}
	line("unknown");
	kvs("word", w->name);
	end();
}

void probe_main(void)
{
	static char command_line[32768];
	ring3_tsc = rdtsc();
	mailbox->magic = MAILBOX_MAGIC;
	mailbox->counter = 0;
	mailbox->stop = 0;
	const u8 *info = (const u8 *)start_info;
	const char *given = (const char *)*(u64 *)(info + 24);
	for (size_t i = 0; given && given[i] && i < sizeof command_line - 1; i++)
		command_line[i] = given[i];
	memory_init();
	char *rest = command_line;
	struct work w;
	while (next_work(&rest, &w))
		run(&w);
	line("done");
	end();
	power_off();
}

/* fault_main runs in ring 3 after an exception. */
void fault_main(void)
{
	line("fault");
	kv("vector", fault_vector);
	kvx("error", fault_error);
	kvx("rip", fault_rip);
	kvx("rsp", fault_rsp);
	kvx("cr2", fault_cr2);
	end();
	power_off();
}
