#ifndef FAKE_REDIS_H
#define FAKE_REDIS_H

/* dovetail-redis.h without a server and without a socket, for targets whose input
   has Redis' answers. The Nth connection that was made is named by N. */

#include "dovetail-redis.h"

#define FAKE_REDIS_MAX 2

/* Forget the connections of the run before, which are all closed. */
void fake_redis_reset(void);
/* N is connected, or its connection is lost. */
void fake_redis_connect(unsigned int n);
void fake_redis_lose(unsigned int n);
/* Bytes came. A reply that nobody waits for, or that is none, is the end of the
   connection. */
void fake_redis_feed(unsigned int n, const void *data, size_t size);
/* Answer the command that waits longest as a Redis does that has of each stream
   what was added last. Returns FALSE when none waits. */
bool fake_redis_answer(unsigned int n);
/* The command that waits longest; NULL: none does. */
const char *fake_redis_waits(unsigned int n);

#endif
