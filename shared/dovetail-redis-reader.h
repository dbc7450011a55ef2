#ifndef DOVETAIL_REDIS_READER_H
#define DOVETAIL_REDIS_READER_H

/* Redis' replies out of bytes: hiredis' parser, no socket. Redis is not trusted:
   what a reply may cost is bounded, whatever it claims to be. */

/* A single reply may not be larger. It is far above what Redis is asked for, and
   keeps a faulty server from filling the memory. */
#define DOVETAIL_REDIS_REPLY_MAX_SIZE (512 * 1024 * 1024)
/* ... nor have more elements, with those of the arrays inside: each takes 70
   bytes, and the space for all of them is taken as soon as they are announced.
   An answer to XREAD of 4096 streams, 20 entries from each, has half as many. */
#define DOVETAIL_REDIS_REPLY_MAX_ELEMENTS (1024 * 1024)

struct redisReply;
struct dovetail_redis_reader;

struct dovetail_redis_reader *dovetail_redis_reader_init(void);
void dovetail_redis_reader_deinit(struct dovetail_redis_reader **reader);

/* Bytes came. Returns 0, or -1 and error_r: the reader is of no use any more. */
int dovetail_redis_reader_feed(struct dovetail_redis_reader *reader,
			       const void *data, size_t size,
			       const char **error_r);
/* The next whole reply. Returns 1 and reply_r, for freeReplyObject(); 0: more
   bytes are needed; -1 and error_r (data stack): the bytes are none of Redis, and
   the reader is of no use any more. */
int dovetail_redis_reader_next(struct dovetail_redis_reader *reader,
			       struct redisReply **reply_r,
			       const char **error_r);

#endif
