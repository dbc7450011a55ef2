/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "fuzz-common.h"
#include "ioloop.h"
#include "llist.h"
#include "str.h"
#include "fake-redis.h"
#include "dovetail-redis-reader.h"

#include <hiredis/hiredis.h>

#define STREAMS_MAX 8

struct fake_cmd {
	struct fake_cmd *prev, *next;
	char *name, *key;
	/* of XADD */
	char *id;
	buffer_t *value;
	dovetail_redis_callback_t *callback;
	void *context;
};

struct dovetail_redis {
	struct dovetail_redis_callbacks callbacks;
	void *context;
	struct dovetail_redis_reader *reader;
	struct fake_cmd *cmds_head, *cmds_tail;
	bool ready;
	/* each end of a connection is another one */
	unsigned int connection;
	time_t since;
};

/* what a stream has */
struct fake_stream {
	char *key, *id;
	buffer_t *value;
};

static struct dovetail_redis *fakes[FAKE_REDIS_MAX];
static unsigned int fakes_count;
static struct fake_stream fake_streams[STREAMS_MAX];

/* ---- dovetail-redis.h ---- */

static void cmd_free(struct fake_cmd *cmd)
{
	i_free(cmd->name);
	i_free(cmd->key);
	i_free(cmd->id);
	buffer_free(&cmd->value);
	i_free(cmd);
}

static struct fake_cmd *cmd_shift(struct dovetail_redis *redis)
{
	struct fake_cmd *cmd = redis->cmds_head;

	if (cmd != NULL)
		DLLIST2_REMOVE(&redis->cmds_head, &redis->cmds_tail, cmd);
	return cmd;
}

/* Frees cmd. */
static void cmd_answered(struct fake_cmd *cmd, struct redisReply *reply)
{
	if (cmd->callback != NULL)
		cmd->callback(reply, cmd->context);
	cmd_free(cmd);
}

struct dovetail_redis *
dovetail_redis_init(struct event *event ATTR_UNUSED,
		    const struct dovetail_redis_url *url ATTR_UNUSED,
		    const char *password ATTR_UNUSED,
		    struct dovetail_redis_tls *tls ATTR_UNUSED,
		    unsigned int timeout_msecs ATTR_UNUSED,
		    const struct dovetail_redis_callbacks *callbacks,
		    void *context)
{
	struct dovetail_redis *redis = i_new(struct dovetail_redis, 1);

	fuzz_assert(fakes_count < FAKE_REDIS_MAX);
	fakes[fakes_count++] = redis;
	redis->callbacks = *callbacks;
	redis->context = context;
	redis->reader = dovetail_redis_reader_init();
	redis->since = ioloop_time;
	return redis;
}

void dovetail_redis_deinit(struct dovetail_redis **_redis)
{
	struct dovetail_redis *redis = *_redis;
	struct fake_cmd *cmd;
	unsigned int i;

	if (redis == NULL)
		return;
	*_redis = NULL;
	redis->ready = FALSE;
	while ((cmd = cmd_shift(redis)) != NULL)
		cmd_answered(cmd, NULL);
	for (i = 0; i < fakes_count; i++) {
		if (fakes[i] == redis)
			fakes[i] = NULL;
	}
	dovetail_redis_reader_deinit(&redis->reader);
	i_free(redis);
}

bool dovetail_redis_is_ready(const struct dovetail_redis *redis)
{
	return redis->ready;
}

const char *dovetail_redis_last_error(const struct dovetail_redis *redis)
{
	return redis->ready ? NULL : "connect() failed";
}

time_t dovetail_redis_state_since(const struct dovetail_redis *redis)
{
	return redis->since;
}

void dovetail_redis_command(struct dovetail_redis *redis, unsigned int argc,
			    const char *const *argv, const size_t *argv_len,
			    dovetail_redis_callback_t *callback, void *context)
{
	struct fake_cmd *cmd;

	if (!redis->ready) {
		if (callback != NULL)
			callback(NULL, context);
		return;
	}
	cmd = i_new(struct fake_cmd, 1);
	cmd->callback = callback;
	cmd->context = context;
	cmd->name = i_strndup(argv[0], argv_len[0]);
	if (argc > 1)
		cmd->key = i_strndup(argv[1], argv_len[1]);
	if (argc == 5 && strcmp(cmd->name, "XADD") == 0) {
		cmd->id = i_strndup(argv[2], argv_len[2]);
		cmd->value = buffer_create_dynamic(default_pool, argv_len[4]);
		buffer_append(cmd->value, argv[4], argv_len[4]);
	}
	if (argc > 2 && (strcmp(cmd->name, "XINFO") == 0 ||
			 strcmp(cmd->name, "MEMORY") == 0)) {
		i_free(cmd->key);
		cmd->key = i_strndup(argv[2], argv_len[2]);
	}
	DLLIST2_APPEND(&redis->cmds_head, &redis->cmds_tail, cmd);
}

void dovetail_redis_commandl(struct dovetail_redis *redis,
			     dovetail_redis_callback_t *callback, void *context,
			     const char *arg, ...)
{
	const char *argv[32];
	size_t argv_len[N_ELEMENTS(argv)];
	unsigned int argc = 0;
	va_list args;

	va_start(args, arg);
	for (; arg != NULL; arg = va_arg(args, const char *)) {
		fuzz_assert(argc < N_ELEMENTS(argv));
		argv[argc] = arg;
		argv_len[argc++] = strlen(arg);
	}
	va_end(args);
	dovetail_redis_command(redis, argc, argv, argv_len, callback, context);
}

void dovetail_redis_tls_deinit(struct dovetail_redis_tls **tls ATTR_UNUSED)
{
}

/* ---- fake-redis.h ---- */

static void stream_forget(struct fake_stream *stream)
{
	i_free(stream->key);
	i_free(stream->id);
	buffer_free(&stream->value);
}

void fake_redis_reset(void)
{
	unsigned int i;

	for (i = 0; i < fakes_count; i++)
		fuzz_assert(fakes[i] == NULL);
	fakes_count = 0;
	for (i = 0; i < STREAMS_MAX; i++)
		stream_forget(&fake_streams[i]);
}

static struct dovetail_redis *fake_get(unsigned int n)
{
	return n < fakes_count ? fakes[n] : NULL;
}

void fake_redis_connect(unsigned int n)
{
	struct dovetail_redis *redis = fake_get(n);

	if (redis == NULL || redis->ready)
		return;
	dovetail_redis_reader_deinit(&redis->reader);
	redis->reader = dovetail_redis_reader_init();
	redis->ready = TRUE;
	redis->since = ioloop_time;
	if (redis->callbacks.ready != NULL)
		redis->callbacks.ready(redis->context);
}

void fake_redis_lose(unsigned int n)
{
	struct dovetail_redis *redis = fake_get(n);
	struct fake_cmd *cmd;

	if (redis == NULL || !redis->ready)
		return;
	redis->ready = FALSE;
	redis->connection++;
	redis->since = ioloop_time;
	while ((cmd = cmd_shift(redis)) != NULL)
		cmd_answered(cmd, NULL);
	if (redis->callbacks.lost != NULL)
		redis->callbacks.lost(redis->context);
}

void fake_redis_feed(unsigned int n, const void *data, size_t size)
{
	struct dovetail_redis *redis = fake_get(n);
	struct redisReply *reply;
	struct fake_cmd *cmd;
	unsigned int connection;
	const char *error;
	int ret;

	if (redis == NULL || !redis->ready)
		return;
	connection = redis->connection;
	ret = dovetail_redis_reader_feed(redis->reader, data, size, &error);
	while (ret >= 0) {
		ret = dovetail_redis_reader_next(redis->reader, &reply,
						 &error);
		if (ret <= 0)
			break;
		cmd = cmd_shift(redis);
		if (cmd == NULL)
			ret = -1;
		else
			cmd_answered(cmd, reply);
		freeReplyObject(reply);
		/* a callback may have closed it */
		if (fake_get(n) != redis || redis->connection != connection)
			return;
	}
	if (ret < 0)
		fake_redis_lose(n);
}

const char *fake_redis_waits(unsigned int n)
{
	struct dovetail_redis *redis = fake_get(n);

	return redis == NULL || redis->cmds_head == NULL ? NULL :
		redis->cmds_head->name;
}

static struct fake_stream *stream_find(const char *key)
{
	unsigned int i;

	for (i = 0; i < STREAMS_MAX; i++) {
		if (null_strcmp(fake_streams[i].key, key) == 0)
			return &fake_streams[i];
	}
	return NULL;
}

static void stream_add(struct fake_cmd *cmd)
{
	struct fake_stream *stream = stream_find(cmd->key);

	if (stream == NULL)
		stream = stream_find(NULL);
	if (stream == NULL || cmd->id == NULL)
		return;
	stream_forget(stream);
	stream->key = i_strdup(cmd->key);
	stream->id = i_strdup(cmd->id);
	stream->value = buffer_create_dynamic(default_pool, 64);
	buffer_append_buf(stream->value, cmd->value, 0, SIZE_MAX);
}

static void put_bulk(string_t *str, const void *data, size_t size)
{
	str_printfa(str, "$%zu\r\n", size);
	str_append_data(str, data, size);
	str_append(str, "\r\n");
}

bool fake_redis_answer(unsigned int n)
{
	struct dovetail_redis *redis = fake_get(n);
	struct fake_stream *stream;
	struct fake_cmd *cmd;
	const char *name;
	string_t *str;

	if (redis == NULL || redis->cmds_head == NULL)
		return FALSE;
	cmd = redis->cmds_head;
	name = cmd->name;
	str = t_str_new(256);
	if (strcmp(name, "XADD") == 0)
		stream_add(cmd);
	stream = cmd->key == NULL ? NULL : stream_find(cmd->key);
	if (strcmp(name, "XADD") == 0 && cmd->id != NULL)
		put_bulk(str, cmd->id, strlen(cmd->id));
	else if (strcmp(name, "XRANGE") == 0 ||
		 strcmp(name, "XREVRANGE") == 0) {
		if (stream == NULL)
			str_append(str, "*0\r\n");
		else {
			str_append(str, "*1\r\n*2\r\n");
			put_bulk(str, stream->id, strlen(stream->id));
			str_append(str, "*2\r\n$1\r\ne\r\n");
			put_bulk(str, stream->value->data,
				 stream->value->used);
		}
	} else if (strcmp(name, "XINFO") == 0) {
		if (stream == NULL)
			str_append(str, "-ERR no such key\r\n");
		else {
			str_append(str, "*2\r\n");
			put_bulk(str, "last-generated-id", 17);
			put_bulk(str, stream->id, strlen(stream->id));
		}
	} else if (strcmp(name, "XREAD") == 0)
		str_append(str, "*-1\r\n");
	else if (strcmp(name, "TYPE") == 0)
		str_append(str, "+stream\r\n");
	else
		str_append(str, ":1\r\n");
	fake_redis_feed(n, str_data(str), str_len(str));
	return TRUE;
}
