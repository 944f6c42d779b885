/*
 * virtio-net, with frames of an ethertype for local experiments so that
 * nobody else on the wire answers them.
 */
#include "devices.h"

#define F_MAC FEATURE(5)
#define F_STATUS FEATURE(16)
#define ETHERTYPE 0x88b5
#define NET_HEADER 12
#define SLOT 2048

static struct virtio dev;
static struct queue rx, tx;
static u8 *rx_buffers, *tx_buffers;
static u8 mac[6];
static int held; /* the buffer that net_received gave last, or -1 */

static void post(u16 id)
{
	queue_push(&rx, id, &(struct segment){(u64)rx_buffers + id * SLOT, SLOT, true}, 1);
}

bool net_open(const struct work *w, u64 qd)
{
	if (!virtio_find(&dev, VIRTIO_NET, number(w, "dev", 0)))
		return fail("net", "no-device"), false;
	u64 wanted = F_MAC | F_STATUS | (number(w, "packed", 0) ? F_PACKED : 0);
	if (!virtio_start(&dev, wanted) || !queue_init(&rx, &dev, 0, 1) || !queue_init(&tx, &dev, 1, 1))
		return fail("net", "start"), false;
	if (wanted & F_PACKED && !(dev.features & F_PACKED))
		return fail("net", "no-packed"), false;
	if (!qd || qd > rx.ids || qd > tx.ids)
		return fail("net", "qd"), false;
	rx_buffers = dma_alloc(qd * SLOT);
	tx_buffers = dma_alloc(qd * SLOT);
	if (!rx_buffers || !tx_buffers)
		return fail("net", "dma"), false;
	if (!virtio_ready(&dev))
		return fail("net", "ready"), false;
	for (int i = 0; i < 6; i++)
		mac[i] = dev.features & F_MAC ? mmio_read8(dev.config + i) : 2;
	__builtin_memset(tx_buffers, 0, qd * SLOT);
	held = -1;
	for (u16 i = 0; i < qd; i++)
		post(i);
	queue_kick(&rx);
	return true;
}

static void report(const char *op, u64 frames, u64 bytes, u64 cycles)
{
	line("net");
	kvs("op", op);
	kv("frames", frames);
	kv("bytes", bytes);
	kv("cycles", cycles);
	kv("khz", tsc_khz());
	kv("kicks", tx.kicks + rx.kicks);
	end();
}

static u8 *frame_of(u8 *buffers, u16 id) { return buffers + id * SLOT + NET_HEADER; }

static void send(u16 id, u64 length)
{
	queue_push(&tx, id, &(struct segment){(u64)tx_buffers + id * SLOT, NET_HEADER + length, false}, 1);
}

u8 *net_frame(u16 id) { return frame_of(tx_buffers, id); }

/* address has a frame go to everybody. */
static void address(u8 *frame)
{
	__builtin_memset(frame, 0xff, 6);
	__builtin_memcpy(frame + 6, mac, 6);
	frame[12] = ETHERTYPE >> 8;
	frame[13] = ETHERTYPE & 0xff;
}

void net_send(u16 id, u64 length)
{
	address(net_frame(id));
	send(id, length);
}

int net_sent(void)
{
	u32 len;
	return queue_pop(&tx, &len);
}

/* ours tells whether a received frame of len bytes, header included, has the ethertype. */
static bool ours(const u8 *frame, u32 len)
{
	return len >= NET_HEADER + FRAME_BODY && len <= NET_HEADER + FRAME_MAX &&
		frame[12] == ETHERTYPE >> 8 && frame[13] == (ETHERTYPE & 0xff);
}

const u8 *net_received(u64 *length)
{
	u32 len;
	int id;
	if (held >= 0)
		post(held);
	while ((id = held = queue_pop(&rx, &len)) >= 0) {
		if (ours(frame_of(rx_buffers, id), len)) {
			*length = len - NET_HEADER;
			return frame_of(rx_buffers, id);
		}
		post(id);
	}
	return NULL;
}

void net_kick(void)
{
	queue_kick(&tx);
	queue_kick(&rx);
}

void net_close(void) { virtio_reset(&dev); }

/* blast sends count broadcast frames of bs bytes, numbered from 0 at offset 14. */
static void blast(const struct work *w, u64 qd)
{
	u64 count = number(w, "count", 1000), length = number(w, "bs", FRAME_MAX);
	if (length < 60 || length > FRAME_MAX)
		return fail("net", "bs");
	u64 sent = 0, done = 0, start = rdtsc();
	struct wait wait;
	wait_begin(&wait);
	u32 len;
	while (done < count) {
		bool kick = false;
		int id;
		for (;;) {
			if (sent < qd && sent < count)
				id = sent;
			else if ((id = queue_pop(&tx, &len)) >= 0) {
				done++;
				wait_begin(&wait);
				if (sent == count)
					continue;
			} else
				break;
			u8 *f = net_frame(id);
			address(f);
			__builtin_memcpy(f + FRAME_BODY, &sent, 8);
			send(id, length);
			sent++;
			kick = true;
		}
		if (kick)
			queue_kick(&tx);
		relax();
		if (wait_over(&wait, 20000))
			return fail("net", "timeout");
	}
	report("blast", done, done * length, rdtsc() - start);
}

/* echo sends count frames of the ethertype back to where they came from. */
static void echo(const struct work *w, u64 qd)
{
	u64 count = number(w, "count", 1), limit = ms_to_cycles(number(w, "ms", 20000));
	u64 echoed = 0, bytes = 0, free = qd, start = rdtsc();
	u16 ids[256];
	for (u16 i = 0; i < qd; i++)
		ids[i] = i;
	line("net");
	kvs("op", "ready");
	end();
	while (echoed < count && rdtsc() - start < limit) {
		u32 len, ignored;
		int id;
		bool sent = false, posted = false;
		while ((id = queue_pop(&tx, &ignored)) >= 0)
			ids[free++] = id;
		while (free && echoed < count && (id = queue_pop(&rx, &len)) >= 0) {
			const u8 *in = frame_of(rx_buffers, id);
			u64 length = len - NET_HEADER;
			if (ours(in, len)) {
				u16 to = ids[--free];
				u8 *out = frame_of(tx_buffers, to);
				__builtin_memcpy(out, in + 6, 6);
				__builtin_memcpy(out + 6, mac, 6);
				__builtin_memcpy(out + 12, in + 12, length - 12);
				send(to, length);
				echoed++;
				bytes += length;
				sent = true;
			}
			post(id);
			posted = true;
		}
		if (sent)
			queue_kick(&tx);
		if (posted)
			queue_kick(&rx);
		relax();
	}
	u32 len;
	while (free < qd && queue_wait(&tx, &len, 1000) >= 0) /* the last are on the wire before the reset */
		free++;
	report("echo", echoed, bytes, rdtsc() - start);
}

void work_net(const struct work *w)
{
	u64 mark = dma_mark(), qd = number(w, "qd", 32);
	const char *op = word(w, "op", "blast");
	if (net_open(w, qd)) {
		if (same(op, "blast"))
			blast(w, qd);
		else if (same(op, "echo"))
			echo(w, qd);
		else
			fail("net", "op");
		net_close();
	}
	dma_release(mark);
}
