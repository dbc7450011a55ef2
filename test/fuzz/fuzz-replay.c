/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* The service dovetail-replay: what Redis and the queue service tell it and what it
   kept in its files, up to where a change goes to a mailbox, or a job begins.
   Input: block the state file of b's shard 0, block the file of what is wanted;
   then pieces: u8 what happens, u8 with whom, and what that needs:
     0 a Redis connection is there (0 reader, 1 writer)
     1 it is lost                              2 block: Redis sends bytes
     3 u8: Redis answers so many commands as it should
     4 u8 bits, u64 epoch, generation, seq, time, block payload: an entry of b,
       properly sealed, comes in an answer to XREAD. Bits: 1, 2 shard; 4 it
       follows the one before; 8 it says so, and lies; 16 of another ID than it
       says; 32 somebody waits
     5 block: the queue service sends bytes    6 u8 type, block: ... a frame
     7 u8: so many times 50 ms pass
     8 the queue service takes changes from now on, or does not (odd)
     9 a report is made
   Must hold: what goes to the queue service is a change that it understands; what
   is wanted survives a restart. */

#include "fuzz-common.h"
#include "array.h"
#include "ioloop.h"
#include "net.h"
#include "str.h"
#include "dovetail-frame.h"
#include "dovetail-job.h"
#include "dovetail-queue-client.h"
#include "dovetail-replay.h"
#include "dovetail-seal.h"
#include "fake-redis.h"

#include <unistd.h>
#include <sys/stat.h>
#include <sys/time.h>

#define SHARDS 4
#define START_SECS 1700000000

enum {
	DO_REDIS_READY,
	DO_REDIS_LOST,
	DO_REDIS_SEND,
	DO_REDIS_ANSWER,
	DO_ENTRY,
	DO_QUEUE_SEND,
	DO_QUEUE_FRAME,
	DO_TIME,
	DO_QUEUE_TAKES,
	DO_REPORT,
	DO_COUNT
};

struct replay replay;

static const char *const peers[] = { "b", "c", NULL };
static struct dovetail_keyring *ring_a, *ring_b;
static uint64_t now_usecs;
/* the queue service's end of the control connection; -1: none */
static int queue_fd = -1;
static bool queue_takes;
/* b's entries of each shard: hash of the last one */
static unsigned char hashes[SHARDS][DOVETAIL_HASH_SIZE];

void fuzz_init(void)
{
	static const char *const peers_b[] = { "a", "c", NULL };

	fuzz_write_keys();
	ring_a = fuzz_keyring("a", peers);
	ring_b = fuzz_keyring("b", peers_b);
	fuzz_assert(mkdir(fuzz_path("replay"), 0700) == 0);
}

/* ---- in place of Dovecot's and libc's ---- */

int gettimeofday(struct timeval *tv, void *tz ATTR_UNUSED)
{
	tv->tv_sec = now_usecs / 1000000;
	tv->tv_usec = now_usecs % 1000000;
	return 0;
}

int net_connect_unix(const char *path ATTR_UNUSED)
{
	int fd[2];

	i_close_fd(&queue_fd);
	fuzz_assert(socketpair(AF_UNIX, SOCK_STREAM, 0, fd) == 0);
	net_set_nonblock(fd[0], TRUE);
	net_set_nonblock(fd[1], TRUE);
	queue_fd = fd[0];
	return fd[1];
}

/* ---- in place of dovetail-queue-client.c ---- */

uint64_t dovetail_monotonic_usecs(void)
{
	return now_usecs;
}

int dovetail_queue_client_send(
	struct dovetail_queue_client *client ATTR_UNUSED,
	struct dovetail_queue_batch *batch ATTR_UNUSED,
	unsigned int ack_level ATTR_UNUSED, const buffer_t *change,
	uint64_t deadline ATTR_UNUSED, const char **error_r)
{
	fuzz_assert(fuzz_change(change->data, change->used));
	*error_r = "Gone";
	return queue_takes ? 0 : -1;
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

int dovetail_queue_client_check(
	struct dovetail_queue_client *client ATTR_UNUSED,
	unsigned int ack_level ATTR_UNUSED, uint64_t deadline ATTR_UNUSED,
	const char **error_r)
{
	*error_r = "Gone";
	return queue_takes ? 1 : 0;
}

/* ---- in place of the parts that know mailboxes: every user is unknown ---- */

int replay_user_open(const char *username, struct replay_user **user_r,
		     const char **error_r)
{
	*user_r = NULL;
	*error_r = t_strdup_printf("User %s is not known here", username);
	return -1;
}

void replay_user_release(struct replay_user **user ATTR_UNUSED)
{
	i_unreached();
}

void replay_user_close(struct replay_user **user ATTR_UNUSED)
{
	i_unreached();
}

struct mail_user *
replay_user_mail_user(struct replay_user *user ATTR_UNUSED)
{
	i_unreached();
}

int replay_user_find_mailbox(struct replay_user *user ATTR_UNUSED,
			     const guid_128_t guid ATTR_UNUSED,
			     const char *path ATTR_UNUSED,
			     struct mailbox **box_r ATTR_UNUSED,
			     const char **error_r ATTR_UNUSED)
{
	i_unreached();
}

void replay_user_forget_mailboxes(struct replay_user *user ATTR_UNUSED)
{
	i_unreached();
}

#undef replay_timeout_add
struct timeout *replay_timeout_add(unsigned int msecs,
				   timeout_callback_t *callback, void *context)
{
	return timeout_add_short(msecs, *callback, context);
}

int replay_users_list(const char *mask ATTR_UNUSED, uint64_t shards,
		      pool_t pool, ARRAY_TYPE(const_string) *users_r,
		      const char **error_r)
{
	const char *user = "jane";

	*error_r = "The userdb cannot list its users";
	if ((shards & (1 << 3)) != 0)
		return -1;
	p_array_init(users_r, pool, 2);
	array_push_back(users_r, &user);
	return 0;
}

enum replay_result
replay_mailbox(struct replay_user *user ATTR_UNUSED,
	       const char *origin ATTR_UNUSED,
	       const struct dovetail_change_mailbox *change ATTR_UNUSED,
	       bool wanted ATTR_UNUSED, const char **error_r ATTR_UNUSED)
{
	i_unreached();
}

enum replay_result
replay_list(struct replay_user *user ATTR_UNUSED,
	    const char *origin ATTR_UNUSED,
	    const struct dovetail_change_list *change ATTR_UNUSED,
	    const char **error_r ATTR_UNUSED)
{
	i_unreached();
}

enum replay_result
replay_tree(struct replay_user *user ATTR_UNUSED,
	    const char *origin ATTR_UNUSED,
	    const struct dovetail_change_tree *change ATTR_UNUSED,
	    const char **error_r ATTR_UNUSED)
{
	i_unreached();
}

enum replay_result
replay_tree_verify(struct replay_user *user ATTR_UNUSED,
		   const char *origin ATTR_UNUSED,
		   const struct dovetail_change_tree *change ATTR_UNUSED,
		   const char **error_r ATTR_UNUSED)
{
	i_unreached();
}

void replay_verify(struct replay_user *user ATTR_UNUSED,
		   const char *origin ATTR_UNUSED,
		   const struct dovetail_change_verify *verify ATTR_UNUSED)
{
	i_unreached();
}

void replay_compared(struct replay_user *user ATTR_UNUSED,
		     const char *origin ATTR_UNUSED,
		     const struct dovetail_change_compared *compared ATTR_UNUSED)
{
	i_unreached();
}

/* ---- in place of dovetail-replay-job.c ---- */

void replay_job_start(uint64_t id ATTR_UNUSED, const struct dovetail_job *set)
{
	fuzz_assert(*set->users != '\0');
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

void replay_job_verified(const char *origin ATTR_UNUSED,
			 const struct dovetail_change_verified *verified)
{
	const char *text;

	array_foreach_elem(&verified->texts, text)
		fuzz_assert(*text != '\0');
}

void replay_jobs_deinit(void)
{
}

unsigned int replay_round_report(buffer_t *buf ATTR_UNUSED)
{
	return 0;
}

/* ---- a run ---- */

static void replay_start(void)
{
	replay_wanted_init();
	replay_streams_init();
	replay_control_init();
}

static void replay_stop(void)
{
	replay_control_deinit();
	replay_streams_deinit();
	replay_shards_deinit();
	replay_spool_deinit();
	replay_wanted_deinit();
	fake_redis_reset();
}

static void put_bulk(string_t *str, const void *data, size_t size)
{
	str_printfa(str, "$%zu\r\n", size);
	str_append_data(str, data, size);
	str_append(str, "\r\n");
}

static void do_entry(struct fuzz_input *in)
{
	const struct dovetail_public_key *keys, *recipients[8];
	struct dovetail_entry_head head;
	unsigned int i, count, n = 0;
	buffer_t *entry = t_buffer_create(512);
	string_t *str = t_str_new(1024);
	const char *id, *key;
	const uint8_t *payload;
	size_t size;
	uint8_t bits = fuzz_get_u8(in);

	i_zero(&head);
	head.kind = DOVETAIL_ENTRY_LOG;
	head.shard = bits & 3;
	head.shards = (bits & 64) != 0 ? SHARDS + 1 : SHARDS;
	head.epoch = fuzz_get_u64(in);
	head.generation = fuzz_get_u64(in);
	head.seq = fuzz_get_u64(in);
	head.time_usecs = fuzz_get_u64(in);
	payload = fuzz_get_block(in, &size);
	if (fake_redis_waits(0) == NULL ||
	    strcmp(fake_redis_waits(0), "XREAD") != 0)
		return;

	if ((bits & 4) != 0)
		memcpy(head.prev, hashes[head.shard], sizeof(head.prev));
	else if ((bits & 8) != 0)
		memset(head.prev, 1, sizeof(head.prev));
	keys = dovetail_keyring_peers(ring_b, &count);
	for (i = 0; i < count && n < N_ELEMENTS(recipients); i++)
		recipients[n++] = &keys[i];
	dovetail_seal(ring_b, recipients, n, &head, payload, size, entry,
		      hashes[head.shard]);
	id = t_strdup_printf("%"PRIu64"-%"PRIu64, head.generation,
			     head.seq + ((bits & 16) != 0 ? 1 : 0));
	key = t_strdup_printf("log:b:%u", head.shard);

	str_append(str, "*1\r\n*2\r\n");
	put_bulk(str, key, strlen(key));
	str_append(str, "*1\r\n*2\r\n");
	put_bulk(str, id, strlen(id));
	str_append(str, "*2\r\n");
	put_bulk(str, (bits & 32) != 0 ? "a" : "e", 1);
	put_bulk(str, entry->data, entry->used);
	fake_redis_feed(0, str_data(str), str_len(str));
}

static void queue_send(const void *data, size_t size)
{
	unsigned char answers[65536];

	if (queue_fd == -1)
		return;
	if (size > 0 && write(queue_fd, data, size) < 0) {
		/* it was disconnected */
	}
	while (read(queue_fd, answers, sizeof(answers)) > 0) ;
}

static void do_something(struct fuzz_input *in)
{
	uint8_t what = fuzz_get_u8(in) % DO_COUNT, whom = fuzz_get_u8(in);
	const uint8_t *data;
	buffer_t *buf;
	size_t size, offset;
	unsigned int i;

	switch (what) {
	case DO_REDIS_READY:
		fake_redis_connect(whom % 2);
		break;
	case DO_REDIS_LOST:
		fake_redis_lose(whom % 2);
		break;
	case DO_REDIS_SEND:
		data = fuzz_get_block(in, &size);
		fake_redis_feed(whom % 2, data, size);
		break;
	case DO_REDIS_ANSWER:
		for (i = fuzz_get_u8(in) % 32; i > 0; i--) {
			if (!fake_redis_answer(whom % 2))
				break;
		}
		break;
	case DO_ENTRY:
		do_entry(in);
		break;
	case DO_QUEUE_SEND:
		data = fuzz_get_block(in, &size);
		queue_send(data, size);
		break;
	case DO_QUEUE_FRAME:
		buf = t_buffer_create(256);
		offset = dovetail_frame_begin(buf, fuzz_get_u8(in));
		data = fuzz_get_block(in, &size);
		buffer_append(buf, data, size);
		dovetail_frame_end(buf, offset);
		queue_send(buf->data, buf->used);
		break;
	case DO_TIME:
		now_usecs += fuzz_get_u8(in) * 50000ULL;
		break;
	case DO_QUEUE_TAKES:
		queue_takes = whom % 2 == 0;
		break;
	case DO_REPORT:
		buf = buffer_create_dynamic(default_pool, 64);
		(void)replay_streams_report(buf);
		buffer_free(&buf);
		break;
	}
}

static void write_block(struct fuzz_input *in, const char *name)
{
	const uint8_t *data;
	size_t size;

	data = fuzz_get_block(in, &size);
	if (size > 0) {
		fuzz_write_file(t_strconcat(fuzz_path("replay/"), name, NULL),
				0600, data, size);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct fuzz_input in = { data, size };
	struct ioloop *ioloop;
	unsigned int b, c;

	now_usecs = START_SECS * 1000000ULL;
	queue_takes = TRUE;
	memset(hashes, 0, sizeof(hashes));
	ioloop = io_loop_create();
	replay.event = event_create(NULL);
	replay.pool = pool_alloconly_create("replay", 1024);
	replay.set.node = "a";
	replay.set.peers = peers;
	replay.set.shards = SHARDS;
	replay.set.redis.prefix = "";
	replay.set.queue_socket = "/queue";
	replay.keyring = ring_a;
	replay.slots = 1;
	replay.dir = p_strdup(replay.pool, fuzz_path("replay"));

	T_BEGIN {
		write_block(&in, "b.0");
		write_block(&in, "wanted.0");
		replay_start();
		while (in.size > 0) T_BEGIN {
			do_something(&in);
			fuzz_run_ioloop();
		} T_END;
		b = replay_wanted_count("b");
		c = replay_wanted_count("c");
		replay_stop();

		replay_start();
		fuzz_assert(replay_wanted_count("b") == b);
		fuzz_assert(replay_wanted_count("c") == c);
		replay_stop();
		fuzz_remove_files(replay.dir);
	} T_END;
	i_close_fd(&queue_fd);
	event_unref(&replay.event);
	pool_unref(&replay.pool);
	io_loop_destroy(&ioloop);
	return 0;
}
