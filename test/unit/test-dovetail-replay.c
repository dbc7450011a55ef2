/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* What the replay service says to the queue service, keeps in its files and makes
   of an entry. Redis is played by the test, and where mailboxes begin it ends. */

#include "lib.h"
#include "array.h"
#include "buffer.h"
#include "ioloop.h"
#include "net.h"
#include "str.h"
#include "unlink-directory.h"
#include "write-full.h"
#include "test-common.h"
#include "dovetail-compat.h"
#include "dovetail-frame.h"
#include "dovetail-queue-client.h"
#include "dovetail-redis.h"
#include "dovetail-replay.h"
#include "dovetail-seal.h"

#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>
#include <hiredis/hiredis.h>

#define GUID_STR "0123456789abcdef0123456789abcdef"
#define ZERO_STR "00000000000000000000000000000000"

struct replay replay;

static char dir[] = ".test-replay.XXXXXX";
static const char *const peers[] = { "b", "c", NULL };

/* ---- Redis: both connections are there, XREAD waits ---- */

struct dovetail_redis {
	struct dovetail_redis_callbacks callbacks;
	void *context;
};

/* the one that was made first since it was set to NULL */
static struct dovetail_redis *reader;
static dovetail_redis_callback_t *xread_callback;
static void *xread_context;

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

	redis->callbacks = *callbacks;
	redis->context = context;
	if (reader == NULL)
		reader = redis;
	return redis;
}

void dovetail_redis_deinit(struct dovetail_redis **redis)
{
	i_free(*redis);
}

bool dovetail_redis_is_ready(const struct dovetail_redis *redis)
{
	return redis != NULL;
}

const char *
dovetail_redis_last_error(const struct dovetail_redis *redis ATTR_UNUSED)
{
	return NULL;
}

void dovetail_redis_command(struct dovetail_redis *redis ATTR_UNUSED,
			    unsigned int argc ATTR_UNUSED,
			    const char *const *argv,
			    const size_t *argv_len ATTR_UNUSED,
			    dovetail_redis_callback_t *callback, void *context)
{
	if (strcmp(argv[0], "XREAD") == 0) {
		xread_callback = callback;
		xread_context = context;
	}
}

void dovetail_redis_commandl(struct dovetail_redis *redis ATTR_UNUSED,
			     dovetail_redis_callback_t *callback ATTR_UNUSED,
			     void *context ATTR_UNUSED,
			     const char *arg ATTR_UNUSED, ...)
{
}

/* ---- the queue service's socket for changes ---- */

/* changes it was sent, and those of them that it would refuse */
static unsigned int changes_sent, changes_bad;

uint64_t dovetail_monotonic_usecs(void)
{
	return 0;
}

int dovetail_queue_client_send(
	struct dovetail_queue_client *client ATTR_UNUSED,
	struct dovetail_queue_batch *batch ATTR_UNUSED,
	unsigned int ack_level ATTR_UNUSED, const buffer_t *change,
	uint64_t deadline ATTR_UNUSED, const char **error_r)
{
	struct dovetail_change decoded;

	changes_sent++;
	if (dovetail_change_decode_head(pool_datastack_create(), change->data,
					change->used, &decoded, error_r) < 0)
		changes_bad++;
	return 0;
}

int dovetail_queue_client_wait(
	struct dovetail_queue_client *client ATTR_UNUSED,
	struct dovetail_queue_batch *batch ATTR_UNUSED,
	uint64_t deadline ATTR_UNUSED, const char **error_r ATTR_UNUSED)
{
	return 1;
}

void dovetail_queue_client_cancel(
	struct dovetail_queue_client *client ATTR_UNUSED,
	struct dovetail_queue_batch *batch ATTR_UNUSED)
{
}

/* ---- the rest of the service ---- */

static const char *apply_error;

enum replay_result
replay_apply(const char *origin ATTR_UNUSED, const void *data ATTR_UNUSED,
	     size_t size ATTR_UNUSED, const char **error_r)
{
	*error_r = apply_error;
	return apply_error == NULL ? REPLAY_DONE : REPLAY_FAILED;
}

bool replay_sweep(const char *username ATTR_UNUSED)
{
	return TRUE;
}

void replay_job_start(uint64_t id ATTR_UNUSED,
		      const struct dovetail_job *set ATTR_UNUSED)
{
}

void replay_job_end(uint64_t id ATTR_UNUSED, bool complete ATTR_UNUSED)
{
}

void replay_job_pause(uint64_t id ATTR_UNUSED, bool paused ATTR_UNUSED)
{
}

void replay_job_status(struct dovetail_wire_reader *r ATTR_UNUSED)
{
}

void replay_jobs_deinit(void)
{
}

unsigned int replay_round_report(buffer_t *buf ATTR_UNUSED)
{
	return 0;
}

/* ---- reports ---- */

/* A field of the first row of a report of rows_r rows. */
static const char *
report_field(const buffer_t *buf, const char *key, unsigned int *rows_r)
{
	struct dovetail_wire_reader r;
	const char *name, *value, *found = NULL;
	uint64_t fields;
	unsigned int i;

	dovetail_wire_reader_init(&r, buf->data, buf->used);
	*rows_r = dovetail_wire_get_num(&r);
	for (i = 0; i < *rows_r; i++) {
		fields = dovetail_wire_get_num(&r);
		for (; fields > 0 && !r.failed; fields--) {
			name = dovetail_wire_get_str(&r,
						     pool_datastack_create());
			value = dovetail_wire_get_str(&r,
						      pool_datastack_create());
			if (i == 0 && strcmp(name, key) == 0)
				found = value;
		}
	}
	test_assert(dovetail_wire_reader_done(&r));
	return found;
}

static void streams_report(buffer_t *buf)
{
	buffer_t *rows = buffer_create_dynamic(default_pool, 1024);

	dovetail_wire_put_num(buf, replay_streams_report(rows));
	buffer_append_buf(buf, rows, 0, SIZE_MAX);
	buffer_free(&rows);
}

/* What the service says of itself when it connects. */
static void test_report_of_many(void)
{
	const unsigned char *payload;
	enum dovetail_frame_type type;
	size_t payload_size, size, used = 0;
	buffer_t *in, buf;
	unsigned int frames = 0, rows = 0;
	int fd_listen, fd, ret;
	const char *error;

	test_begin("replay: a worker of many shards reports");
	fd_listen = net_listen_unix(replay.set.queue_socket, 1);
	test_assert(fd_listen != -1);
	replay.set.shards = 64;
	replay_wanted_init();
	replay_streams_init();
	replay_control_init();
	fd = net_accept(fd_listen, NULL, NULL);
	test_assert(fd >= 0);
	net_set_nonblock(fd, FALSE);
	in = buffer_create_dynamic(default_pool, 65536);
	while (frames < 2) {
		ret = dovetail_frame_parse(CONST_PTR_OFFSET(in->data, used),
					   in->used - used, &type, &payload,
					   &payload_size, &size, &error);
		if (ret > 0) {
			frames++;
			used += size;
			if (type != DOVETAIL_FRAME_REPORT)
				continue;
			buffer_create_from_const_data(&buf, payload,
						      payload_size);
			test_assert_strcmp(report_field(&buf, "peer", &rows),
					   "b");
			continue;
		}
		size = in->used;
		ret = read(fd, buffer_append_space_unsafe(in, 65536), 65536);
		buffer_set_used_size(in, size + I_MAX(ret, 0));
		if (ret <= 0)
			break;
	}
	test_assert(rows == 2 * 64);
	buffer_free(&in);
	i_close_fd(&fd);
	i_close_fd(&fd_listen);
	replay_control_deinit();
	replay_streams_deinit();
	replay_wanted_deinit();
	test_end();
}

/* ---- an entry ---- */

static struct dovetail_keyring *ring_b;
/* of b's last entry */
static unsigned char last_hash[DOVETAIL_HASH_SIZE];

static void reply_str(struct redisReply *reply, const void *data, size_t size)
{
	reply->type = REDIS_REPLY_STRING;
	reply->str = (char *)data;
	reply->len = size;
}

static void reply_array(struct redisReply *reply, struct redisReply **elements,
			unsigned int count)
{
	reply->type = REDIS_REPLY_ARRAY;
	reply->element = elements;
	reply->elements = count;
}

/* An entry of b with one change comes. */
static void entry_comes(uint64_t seq, uint64_t time_usecs)
{
	const struct dovetail_public_key *recipient;
	struct redisReply r[9], *p[9];
	struct dovetail_entry_head head;
	buffer_t *entry = t_buffer_create(512);
	const char *id = t_strdup_printf("1-%"PRIu64, seq);
	unsigned int i, count;

	i_zero(&head);
	head.kind = DOVETAIL_ENTRY_LOG;
	head.shards = replay.set.shards;
	head.generation = 1;
	head.seq = seq;
	head.time_usecs = time_usecs;
	memcpy(head.prev, last_hash, sizeof(head.prev));
	recipient = dovetail_keyring_peers(ring_b, &count);
	dovetail_seal(ring_b, &recipient, 1, &head, "\001x", 2, entry,
		      last_hash);

	/* [[key, [[id, [field, entry]]]]] */
	i_zero(&r);
	for (i = 0; i < N_ELEMENTS(r); i++)
		p[i] = &r[i];
	reply_array(&r[0], &p[1], 1);
	reply_array(&r[1], &p[2], 2);
	reply_str(&r[2], "log:b:0", 7);
	reply_array(&r[3], &p[4], 1);
	reply_array(&r[4], &p[5], 2);
	reply_str(&r[5], id, strlen(id));
	reply_array(&r[6], &p[7], 2);
	reply_str(&r[7], "e", 1);
	reply_str(&r[8], entry->data, entry->used);
	xread_callback(&r[0], xread_context);
}

static void test_entry(void)
{
	static const char *const only_b[] = { "b", NULL };
	static const uint64_t times[] = {
		0, 1, 1ULL << 62, 1ULL << 63, (1ULL << 63) + 1, UINT64_MAX
	};
	buffer_t *buf = buffer_create_dynamic(default_pool, 64);
	const char *value;
	unsigned int i, rows;
	string_t *str;

	test_begin("replay: the clock of an origin says anything");
	replay.set.peers = only_b;
	replay.set.shards = 1;
	reader = NULL;
	replay_wanted_init();
	replay_streams_init();
	reader->callbacks.ready(reader->context);
	test_assert(xread_callback != NULL);
	for (i = 0; i < N_ELEMENTS(times); i++) {
		T_BEGIN {
			entry_comes(i + 1, times[i]);
		} T_END;
		buffer_set_used_size(buf, 0);
		streams_report(buf);
		value = report_field(buf, "lag", &rows);
		test_assert_idx(value != NULL &&
				(strcmp(value, "0.000") == 0) == (i > 1), i);
	}
	test_end();

	test_begin("replay: an error without an end");
	str = str_new(default_pool, 1024);
	while (str_len(str) < DOVETAIL_FRAME_MAX_SIZE)
		str_append(str, "a user's name that a peer has sent, ");
	apply_error = str_c(str);
	test_expect_error_string("a user's name");
	entry_comes(i + 1, 1);
	test_expect_no_more_errors();
	buffer_set_used_size(buf, 0);
	streams_report(buf);
	value = report_field(buf, "error", &rows);
	test_assert(value != NULL && str_begins_with(value, "a user's name"));
	test_assert(buf->used < 4096);
	apply_error = NULL;
	str_free(&str);
	replay_streams_deinit();
	replay_wanted_deinit();
	replay.set.peers = peers;
	buffer_free(&buf);
	test_end();
}

/* ---- what is wanted ---- */

static void wanted_write(const char *text)
{
	const char *path = t_strconcat(replay.dir, "/wanted.0", NULL);
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);

	test_assert(fd != -1 && write_full(fd, text, strlen(text)) == 0);
	i_close_fd(&fd);
}

static void test_wanted(void)
{
	static const char *const bad[] = {
		"",
		"jane\n",
		"jane\tb\t" GUID_STR "\n",
		"jane\tb\t" GUID_STR "x\tINBOX\n",
		/* no node */
		"jane\tB b\t" GUID_STR "\tINBOX\n",
		"jane\t\t" GUID_STR "\tINBOX\n",
		"\tB b\t" ZERO_STR "\t2\n",
		/* a name, but not whose */
		"jane\tb\t" ZERO_STR "\tINBOX\n",
		/* no shard */
		"\tb\t" ZERO_STR "\t\n",
		"\tb\t" ZERO_STR "\t256\n",
		/* cut off */
		"jane\tb\t" GUID_STR "\tINB",
	};
	guid_128_t guid;
	unsigned int i;

	test_begin("replay: what is wanted, in its file");
	for (i = 0; i < N_ELEMENTS(bad); i++) {
		wanted_write(bad[i]);
		replay_wanted_init();
		test_assert_idx(replay_wanted_count("b") == 0 &&
				replay_wanted_count("") == 0 &&
				replay_wanted_count("B b") == 0, i);
		replay_wanted_deinit();
	}
	wanted_write("jane\tb\t" GUID_STR "\tINBOX\n"
		     "joe\tc\t" ZERO_STR "\t\n"
		     "\tb\t" ZERO_STR "\t255\n");
	replay_wanted_init();
	test_assert(replay_wanted_count("b") == 2);
	test_assert(replay_wanted_count("c") == 1);
	/* asks for all of them, again after a restart, and is understood */
	guid_128_generate(guid);
	changes_sent = changes_bad = 0;
	replay_wanted_add("a\tb\nc\001", "b", guid, "x\ty", 3, "test");
	test_assert(changes_sent == 4);
	replay_wanted_deinit();
	replay_wanted_init();
	test_assert(replay_wanted_has("a\tb\nc\001", guid));
	test_assert(replay_wanted_count("b") == 3);
	replay_wanted_came_so_far("jane", guid, 3);
	replay_wanted_gone("a\tb\nc\001", guid);
	test_assert(replay_wanted_count("b") == 2);
	test_assert(changes_bad == 0);
	replay_wanted_deinit();
	test_end();
}

static void test_wanted_answer(void)
{
	const struct dovetail_log_pos old = { 7, 2, 100 }, new = { 7, 2, 200 };
	const struct dovetail_log_pos other = { 8, 2, 300 };
	guid_128_t guid;

	test_begin("replay: which answer is one");
	wanted_write("");
	replay_wanted_init();
	guid_128_generate(guid);
	replay_wanted_passed("jane", guid, &new);
	test_assert(!replay_wanted_has("jane", guid));
	changes_sent = 0;
	replay_wanted_add("jane", "b", guid, "x", 3, "test");
	test_assert(changes_sent == 1);
	/* a change came, and then what was made before it: ask again */
	replay_wanted_passed("jane", guid, &new);
	replay_wanted_passed("jane", guid, &old);
	replay_wanted_arrived("jane", guid, &old);
	test_assert(replay_wanted_has("jane", guid) && changes_sent == 2);
	/* what comes now was made behind it, wherever the log begins again */
	replay_wanted_arrived("jane", guid, &old);
	test_assert(!replay_wanted_has("jane", guid) && changes_sent == 2);

	replay_wanted_add("jane", "b", guid, "x", 3, "test");
	replay_wanted_passed("jane", guid, &new);
	replay_wanted_arrived("jane", guid, &new);
	test_assert(!replay_wanted_has("jane", guid));
	replay_wanted_add("jane", "b", guid, "x", 3, "test");
	replay_wanted_passed("jane", guid, &other);
	replay_wanted_arrived("jane", guid, &new);
	test_assert(!replay_wanted_has("jane", guid));

	/* what passed is not known after a restart */
	replay_wanted_add("jane", "b", guid, "x", 3, "test");
	replay_wanted_deinit();
	replay_wanted_init();
	changes_sent = 0;
	replay_wanted_arrived("jane", guid, &new);
	test_assert(replay_wanted_has("jane", guid) && changes_sent == 1);
	replay_wanted_arrived("jane", guid, &new);
	test_assert(!replay_wanted_has("jane", guid) && changes_sent == 1);
	replay_wanted_deinit();
	test_end();
}

/* ---- begin ---- */

static void test_init(void)
{
	static const char *const of_b[] = { "a", NULL };
	static const char *const nodes[] = { "a", "b", "c" };
	const char *line, *error;
	unsigned int i;

	for (i = 0; i < N_ELEMENTS(nodes); i++) {
		if (dovetail_keygen(dir, nodes[i], FALSE, &line, &error) < 0)
			i_fatal("%s", error);
	}
	replay.event = event_create(NULL);
	replay.pool = pool_alloconly_create("replay", 16384);
	replay.set.node = "a";
	replay.set.peers = peers;
	replay.set.shards = 4;
	replay.set.redis.prefix = "";
	replay.set.ack_timeout_msecs = 1000;
	replay.set.queue_socket = p_strconcat(replay.pool, dir, "/queue", NULL);
	replay.slots = 1;
	replay.dir = dir;
	if (dovetail_keyring_open(dir, "a", peers, &replay.keyring,
				  &error) < 0 ||
	    dovetail_keyring_open(dir, "b", of_b, &ring_b, &error) < 0)
		i_fatal("%s", error);
}

int main(void)
{
	static void (*const test_functions[])(void) = {
		test_report_of_many,
		test_entry,
		test_wanted,
		test_wanted_answer,
		NULL
	};
	struct ioloop *ioloop;
	const char *error;
	int ret;

	if (mkdtemp(dir) == NULL)
		return 1;
	lib_init();
	ioloop = io_loop_create();
	test_init();
	ret = test_run(test_functions);
	dovetail_keyring_close(&ring_b);
	dovetail_keyring_close(&replay.keyring);
	event_unref(&replay.event);
	pool_unref(&replay.pool);
	if (unlink_directory(dir, UNLINK_DIRECTORY_FLAG_RMDIR, &error) < 0)
		i_fatal("%s", error);
	io_loop_destroy(&ioloop);
	lib_deinit();
	return ret;
}
