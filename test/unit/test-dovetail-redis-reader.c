/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "str.h"
#include "test-common.h"
#include "dovetail-compat.h"
#include "dovetail-redis-reader.h"

#include <hiredis/hiredis.h>

static struct dovetail_redis_reader *reader;

/* What dovetail_redis_reader_next() says when this has been fed, too. */
static int feed(const char *data, struct redisReply **reply_r,
		const char **error_r)
{
	test_assert(dovetail_redis_reader_feed(reader, data, strlen(data),
					       error_r) == 0);
	return dovetail_redis_reader_next(reader, reply_r, error_r);
}

static void test_replies(void)
{
	struct redisReply *reply;
	const char *error;

	test_begin("redis reader: replies");
	reader = dovetail_redis_reader_init();
	test_assert(feed("", &reply, &error) == 0);
	test_assert(feed("*2\r\n:1\r\n$3\r\na", &reply, &error) == 0);
	test_assert(feed("bc\r\n+O", &reply, &error) == 1);
	test_assert(reply->type == REDIS_REPLY_ARRAY && reply->elements == 2);
	test_assert_strcmp(reply->element[1]->str, "abc");
	freeReplyObject(reply);
	test_assert(feed("K\r\n", &reply, &error) == 1);
	test_assert(reply->type == REDIS_REPLY_STATUS);
	freeReplyObject(reply);
	test_assert(feed("GET / HTTP/1.0\r\n", &reply, &error) < 0);
	test_assert(strstr(error, "does not speak Redis' protocol") != NULL);
	dovetail_redis_reader_deinit(&reader);
	test_end();
}

/* announced and never sent: they must cost nothing */
static void test_elements(void)
{
	static const char *const too_many[] = {
		"*1048577\r\n",
		"*10000000\r\n",
		"*1048576\r\n*1\r\n",
		"*1000000\r\n:1\r\n*1000000\r\n",
		"*9\r\n*9\r\n*9\r\n*9\r\n*9\r\n*1048576\r\n",
	};
	struct redisReply *reply;
	const char *error;
	unsigned int i;

	test_begin("redis reader: too many elements");
	for (i = 0; i < N_ELEMENTS(too_many); i++) {
		reader = dovetail_redis_reader_init();
		error = "";
		test_assert_idx(feed(too_many[i], &reply, &error) < 0, i);
		test_assert_idx(strstr(error, "too large") != NULL, i);
		dovetail_redis_reader_deinit(&reader);
	}
	test_end();
}

static void test_limit(void)
{
	string_t *str = str_new(default_pool, 8 * 1024 * 1024);
	struct redisReply *reply = NULL;
	const char *error;
	unsigned int i, j;

	test_begin("redis reader: as many elements as are allowed");
	str_append(str, "*1048576\r\n");
	for (i = 0; i < DOVETAIL_REDIS_REPLY_MAX_ELEMENTS; i++)
		str_append(str, ":1\r\n");
	reader = dovetail_redis_reader_init();
	/* each reply counts by itself */
	for (j = 0; j < 2; j++) {
		test_assert_idx(feed(str_c(str), &reply, &error) == 1, j);
		test_assert_idx(reply != NULL && reply->elements ==
				DOVETAIL_REDIS_REPLY_MAX_ELEMENTS, j);
		freeReplyObject(reply);
		reply = NULL;
	}
	dovetail_redis_reader_deinit(&reader);
	str_free(&str);
	test_end();
}

int main(void)
{
	static void (*const test_functions[])(void) = {
		test_replies,
		test_elements,
		test_limit,
		NULL
	};

	return test_run(test_functions);
}
