/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "str-sanitize.h"
#include "dovetail-redis-reader.h"

#include <hiredis/hiredis.h>

struct dovetail_redis_reader {
	redisReader *reader;
	/* hiredis', but for arrays */
	redisReplyObjectFunctions functions;
	const redisReplyObjectFunctions *orig_functions;
	/* of the reply that has begun: bytes fed (and perhaps some of the
	   reply before), elements announced */
	uint64_t size, elements;
	bool too_many;
};

/* int in hiredis 0.14, size_t later */
#if HIREDIS_MAJOR == 0
typedef int array_count_t;
#else
typedef size_t array_count_t;
#endif

static void *create_array(const redisReadTask *task, array_count_t count)
{
	struct dovetail_redis_reader *reader = task->privdata;

	/* hiredis has checked that it is not negative */
	reader->elements += count;
	if (reader->elements > DOVETAIL_REDIS_REPLY_MAX_ELEMENTS) {
		reader->too_many = TRUE;
		return NULL;
	}
	return reader->orig_functions->createArray(task, count);
}

struct dovetail_redis_reader *dovetail_redis_reader_init(void)
{
	struct dovetail_redis_reader *reader;

	reader = i_new(struct dovetail_redis_reader, 1);
	reader->reader = redisReaderCreate();
	if (reader->reader == NULL)
		i_fatal_status(FATAL_OUTOFMEM, "redisReaderCreate() failed");
	reader->orig_functions = reader->reader->fn;
	reader->functions = *reader->orig_functions;
	reader->functions.createArray = create_array;
	reader->reader->fn = &reader->functions;
	reader->reader->privdata = reader;
	return reader;
}

void dovetail_redis_reader_deinit(struct dovetail_redis_reader **_reader)
{
	struct dovetail_redis_reader *reader = *_reader;

	*_reader = NULL;
	redisReaderFree(reader->reader);
	i_free(reader);
}

int dovetail_redis_reader_feed(struct dovetail_redis_reader *reader,
			       const void *data, size_t size,
			       const char **error_r)
{
	if (redisReaderFeed(reader->reader, data, size) != REDIS_OK) {
		*error_r = t_strdup_printf(
			"Cannot parse the server's answer: %s",
			reader->reader->errstr);
		return -1;
	}
	reader->size += size;
	return 0;
}

int dovetail_redis_reader_next(struct dovetail_redis_reader *reader,
			       struct redisReply **reply_r,
			       const char **error_r)
{
	void *reply;

	if (redisReaderGetReply(reader->reader, &reply) != REDIS_OK) {
		*error_r = reader->too_many ?
			"The server sent a reply that is too large" :
			t_strdup_printf(
			"The server does not speak Redis' protocol: %s",
			str_sanitize(reader->reader->errstr, 200));
		return -1;
	}
	if (reply == NULL) {
		if (reader->size <= DOVETAIL_REDIS_REPLY_MAX_SIZE)
			return 0;
		*error_r = "The server sent a reply that is too large";
		return -1;
	}
	reader->size = reader->elements = 0;
	*reply_r = reply;
	return 1;
}
