/* A block and a network device as mix drives them, both at once. */
#ifndef DEVICES_H
#define DEVICES_H

#include "virtio.h"

enum { BLK_IN = 0, BLK_OUT = 1, BLK_FLUSH = 4, BLK_GET_ID = 8, BLK_DISCARD = 11, BLK_WRITE_ZEROES = 13 };

/* blk.c: requests are known by an id below the depth that the caller keeps. */
bool blk_open(const struct work *w, u16 segments);
u64 blk_capacity(void); /* bytes */
u16 blk_depth(void);    /* requests that fit */
void blk_submit(u16 id, u32 type, u64 offset, void *data, u64 bytes, int segments);
void blk_kick(void);
int blk_done(u8 *status); /* an id, or -1 */
void blk_close(void);

/* net.c: frames lie in buffers, known by an id below the depth net_open is given. */
#define FRAME_MAX 1514
#define FRAME_BODY 14 /* where what follows the Ethernet header begins */
bool net_open(const struct work *w, u64 depth);
u8 *net_frame(u16 id);              /* to be sent: addresses and ethertype are for net_send */
void net_send(u16 id, u64 length);  /* to everybody; kick when all are queued */
int net_sent(void);                 /* an id that can be used again, or -1 */
const u8 *net_received(u64 *length); /* the next frame of our ethertype, or NULL; take it before the next call */
void net_kick(void);
void net_close(void);

#endif
