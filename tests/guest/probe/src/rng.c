/* virtio-rng: bytes=N of entropy, in one buffer or several. */
#include "virtio.h"

void work_rng(const struct work *w)
{
	struct virtio dev;
	struct queue q;
	u64 mark = dma_mark(), bytes = number(w, "bytes", 256), got = 0, seen[4] = {0}, sum = 0;
	if (!virtio_find(&dev, VIRTIO_RNG, number(w, "dev", 0)))
		return fail("rng", "no-device");
	u8 *buffer = dma_alloc(PAGE);
	if (!buffer || !virtio_start(&dev, 0) || !queue_init(&q, &dev, 0, 1) || !virtio_ready(&dev)) {
		dma_release(mark);
		return fail("rng", "start");
	}
	u64 start = rdtsc();
	while (got < bytes) {
		u32 len, want = bytes - got < PAGE ? bytes - got : PAGE;
		__builtin_memset(buffer, 0, PAGE);
		queue_push(&q, 0, &(struct segment){(u64)buffer, want, true}, 1);
		queue_kick(&q);
		if (queue_wait(&q, &len, 5000) < 0 || !len || len > want)
			break;
		for (u32 i = 0; i < len; i++)
			seen[buffer[i] / 64] |= 1ull << buffer[i] % 64;
		sum = checksum(sum, (u64 *)buffer, len & ~7u);
		got += len;
	}
	u64 cycles = rdtsc() - start, distinct = 0;
	for (int i = 0; i < 256; i++)
		distinct += seen[i / 64] >> i % 64 & 1;
	virtio_reset(&dev);
	dma_release(mark);
	if (got < bytes)
		return fail("rng", "short");
	line("rng");
	kv("bytes", got);
	kv("distinct", distinct);
	kvx("sum", sum);
	kv("cycles", cycles);
	kv("khz", tsc_khz());
	end();
}
