/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* The service dovetail-queue: what clients send over its socket and what Redis
   answers, with all parts of the service but for main().
   Input: pieces: u8 what happens, u8 with whom, and what that needs:
     0 a client connects (odd: a stranger)     1 block: it sends bytes
     2 u8 type, block: it sends a frame        3 it hangs up
     4 a Redis connection is there (0 log, 1 acks)
     5 it is lost                              6 block: Redis sends bytes
     7 u8: Redis answers so many commands as it should
     8 u8 shard, u64 time, block payload: a replica's report, properly sealed,
       comes in an answer to XREAD
     9 u8 shard, u64 generation, seq: an entry of our own, properly sealed, comes
       in an answer to X[REV]RANGE
    10 the clock's tick, and u8 seconds have passed
   Must hold: the service answers in whole frames, WELCOME first, and each
   question once, if the client waits for it; nothing is left at the end. */

#include "fuzz-common.h"
#include "array.h"
#include "hash.h"
#include "ioloop.h"
#include "master-service.h"
#include "net.h"
#include "priorityq.h"
#include "str.h"
#include "dovetail-queue-private.h"
#include "fake-redis.h"

#include <pwd.h>
#include <unistd.h>
#include <sys/stat.h>

#define CONNS 4
#define SHARDS 3
#define STRANGER_UID 12345

enum {
	DO_CONNECT,
	DO_SEND,
	DO_FRAME,
	DO_HANG_UP,
	DO_REDIS_READY,
	DO_REDIS_LOST,
	DO_REDIS_SEND,
	DO_REDIS_ANSWER,
	DO_ACK,
	DO_OWN,
	DO_TICK,
	DO_COUNT
};

/* A client's end. */
struct client {
	/* -1: not connected */
	int fd;
	/* what was sent and is not a whole frame yet, or no frame at all; what
	   came */
	buffer_t *out, *in;
	bool rubbish;
	bool hello_sent, welcome;
	unsigned int questions, answers;
	/* it sent what may have an answer some time */
	bool unclear;
};

static struct dovetail_keyring *ring_a, *ring_b;
static const char *const peers[] = { "b", "c", NULL };
static uid_t next_uid;
static uint64_t now_usecs;
static struct client clients[CONNS];

void fuzz_init(void)
{
	static const char *const peers_b[] = { "a", "c", NULL };
	unsigned int i;

	fuzz_write_keys();
	ring_a = fuzz_keyring("a", peers);
	ring_b = fuzz_keyring("b", peers_b);
	fuzz_assert(mkdir(fuzz_path("queue"), 0700) == 0);
	fuzz_assert(mkdir(fuzz_path("queue/dirty"), 0700) == 0);
	for (i = 0; i < CONNS; i++) {
		clients[i].fd = -1;
		clients[i].in = buffer_create_dynamic(default_pool, 1024);
		clients[i].out = buffer_create_dynamic(default_pool, 1024);
	}
}

/* ---- in place of Dovecot's and of dovetail-queue.c's ---- */

uint64_t dovetail_monotonic_usecs(void)
{
	return now_usecs;
}

int net_getunixcred(int fd ATTR_UNUSED, struct net_unix_cred *cred_r)
{
	i_zero(cred_r);
	cred_r->uid = next_uid;
	return 0;
}

struct passwd *getpwnam(const char *name)
{
	static struct passwd pw = { .pw_uid = STRANGER_UID };

	return strcmp(name, "stranger") == 0 ? &pw : NULL;
}

void master_service_client_connection_destroyed(
	struct master_service *service ATTR_UNUSED)
{
}

void dovetail_queue_check_full(struct dovetail_queue *q)
{
	struct dovetail_queue_backlog_sum sum;
	uint64_t bytes = 0;
	unsigned int i;

	for (i = 0; i < q->logs_count; i++) {
		dovetail_queue_backlog_total(q->logs[i].backlog, &sum);
		bytes += sum.bytes;
	}
	q->full = bytes > q->set.queue_max_size;
}

void dovetail_queue_log_synced(struct dovetail_queue *q)
{
	unsigned int i;

	for (i = 0; i < q->logs_count; i++) {
		if (!q->logs[i].synced_once)
			return;
	}
	dovetail_queue_acks_start(q);
}

static void redis_ready(void *context)
{
	struct dovetail_queue *q = context;
	unsigned int i;

	for (i = 0; i < q->logs_count; i++)
		dovetail_queue_log_redis_ready(&q->logs[i]);
}

static void redis_lost(void *context)
{
	struct dovetail_queue *q = context;
	unsigned int i;

	for (i = 0; i < q->logs_count; i++)
		dovetail_queue_log_redis_lost(&q->logs[i]);
}

static struct dovetail_queue *queue_init(void)
{
	static const struct dovetail_redis_callbacks callbacks = {
		.ready = redis_ready,
		.lost = redis_lost,
	};
	const struct dovetail_public_key *keys;
	struct dovetail_queue *q;
	const char *error;
	unsigned int i;

	q = i_new(struct dovetail_queue, 1);
	q->event = event_create(NULL);
	q->set.node = "a";
	q->set.peers = peers;
	q->set.redis.prefix = "";
	q->set.state_dir = fuzz_path("queue");
	q->set.ack_timeout_msecs = 2000;
	q->set.shards = SHARDS;
	/* so that it gets full */
	q->set.queue_max_size = 16384;
	q->keyring = ring_a;
	q->dirty_dir = i_strconcat(q->set.state_dir, "/dirty", NULL);
	q->uid = geteuid();
	q->logs_count = SHARDS;
	q->logs = i_new(struct dovetail_queue_log, SHARDS);
	q->peers_count = str_array_length(peers);
	q->peers = i_new(struct dovetail_queue_peer, q->peers_count);
	for (i = 0; i < q->peers_count; i++) {
		q->peers[i].node = peers[i];
		q->peers[i].idx = i;
		q->peers[i].shards =
			i_new(struct dovetail_queue_peer_shard, SHARDS);
	}
	keys = dovetail_keyring_peers(ring_a, &q->recipients_count);
	q->recipients = i_new(const struct dovetail_public_key *,
			      q->recipients_count);
	for (i = 0; i < q->recipients_count; i++)
		q->recipients[i] = &keys[i];
	q->positions = dovetail_queue_positions_init(16);
	q->entry_buf = buffer_create_dynamic(default_pool, 4096);
	i_array_init(&q->flush, 16);
	for (i = 0; i < SHARDS; i++) {
		fuzz_assert(dovetail_queue_log_init(q, &q->logs[i], i,
						    &error) == 0);
	}
	fuzz_assert(dovetail_queue_users_init(q, &error) == 0);
	q->started = TRUE;
	q->redis = dovetail_redis_init(q->event, &q->set.redis, NULL, NULL,
				       5000, &callbacks, q);
	return q;
}

static void queue_deinit(struct dovetail_queue *q)
{
	unsigned int i, j;

	q->stopping = TRUE;
	dovetail_queue_acks_stop(q);
	dovetail_redis_deinit(&q->redis);
	for (i = 0; i < SHARDS; i++)
		dovetail_queue_log_deinit(&q->logs[i]);
	dovetail_queue_conns_deinit(q);
	dovetail_queue_users_deinit(q);
	dovetail_queue_positions_deinit(&q->positions);
	fuzz_assert(q->pending_bytes == 0 && q->input_bytes == 0);
	fuzz_assert(q->halted_count == 0 && q->input_first == NULL);
	fuzz_assert(q->conns == NULL && q->workers == NULL);
	fuzz_assert(q->jobs == NULL);

	for (i = 0; i < q->peers_count; i++) {
		for (j = 0; j < SHARDS; j++) {
			i_free(q->peers[i].shards[j].error);
			pool_unref(&q->peers[i].shards[j].troubles_pool);
		}
		i_free(q->peers[i].shards);
	}
	i_free(q->peers);
	i_free(q->recipients);
	i_free(q->logs);
	i_free(q->dirty_dir);
	buffer_free(&q->entry_buf);
	array_free(&q->flush);
	event_unref(&q->event);
	i_free(q);
	fuzz_remove_files(fuzz_path("queue/dirty"));
	fuzz_remove_files(fuzz_path("queue"));
}

/* ---- clients ---- */

static void client_close(struct client *client)
{
	i_close_fd(&client->fd);
	buffer_set_used_size(client->in, 0);
	buffer_set_used_size(client->out, 0);
	client->rubbish = client->hello_sent = client->welcome = FALSE;
	client->unclear = FALSE;
	client->questions = client->answers = 0;
}

static void client_connect(struct dovetail_queue *q, struct client *client,
			   bool stranger)
{
	int fd[2];

	client_close(client);
	fuzz_assert(socketpair(AF_UNIX, SOCK_STREAM, 0, fd) == 0);
	net_set_nonblock(fd[0], TRUE);
	client->fd = fd[0];
	next_uid = stranger ? STRANGER_UID : geteuid();
	dovetail_queue_conn_create(q, fd[1], (uid_t)-1);
}

/* Note the questions among what was sent. */
static void client_sent(struct client *client, const void *data, size_t size)
{
	const unsigned char *payload;
	enum dovetail_frame_type type;
	size_t payload_size, frame_size;
	const char *error;
	int ret = 0;

	buffer_append(client->out, data, size);
	while (!client->rubbish &&
	       (ret = dovetail_frame_parse(client->out->data, client->out->used,
					   &type, &payload, &payload_size,
					   &frame_size, &error)) > 0) {
		if (client->hello_sent &&
		    (type == DOVETAIL_FRAME_CHANGE ||
		     type == DOVETAIL_FRAME_POSITION_GET ||
		     type == DOVETAIL_FRAME_CHECK ||
		     type == DOVETAIL_FRAME_STATUS_GET ||
		     type == DOVETAIL_FRAME_MARK ||
		     type == DOVETAIL_FRAME_JOB))
			client->questions++;
		if (type == DOVETAIL_FRAME_MARK || type == DOVETAIL_FRAME_JOB)
			client->unclear = TRUE;
		client->hello_sent = TRUE;
		buffer_delete(client->out, 0, frame_size);
	}
	if (ret < 0)
		client->rubbish = TRUE;
}

static void client_send(struct client *client, const void *data, size_t size)
{
	if (client->fd == -1 || size == 0)
		return;
	if (write(client->fd, data, size) == (ssize_t)size)
		client_sent(client, data, size);
	else {
		/* it was disconnected, or the socket is full */
		client_close(client);
	}
}

/* Returns FALSE when the service has hung up. */
static bool client_read(struct client *client)
{
	const unsigned char *payload;
	enum dovetail_frame_type type;
	size_t payload_size, frame_size, used;
	const char *error;
	unsigned char *space;
	ssize_t ret;
	int parsed;

	if (client->fd == -1)
		return FALSE;
	do {
		used = client->in->used;
		space = buffer_append_space_unsafe(client->in, 65536);
		ret = read(client->fd, space, 65536);
		buffer_set_used_size(client->in, used + I_MAX(ret, 0));
	} while (ret > 0);

	while ((parsed = dovetail_frame_parse(
			client->in->data, client->in->used, &type, &payload,
			&payload_size, &frame_size, &error)) > 0) {
		fuzz_assert(type >= DOVETAIL_FRAME_WELCOME ||
			    (type >= DOVETAIL_FRAME_JOB_RESULT &&
			     type <= DOVETAIL_FRAME_JOB_DONE));
		fuzz_assert((type == DOVETAIL_FRAME_WELCOME) ==
			    !client->welcome);
		client->welcome = TRUE;
		if (type == DOVETAIL_FRAME_REPLY ||
		    type == DOVETAIL_FRAME_POSITION ||
		    type == DOVETAIL_FRAME_STATUS)
			client->answers++;
		buffer_delete(client->in, 0, frame_size);
	}
	fuzz_assert(parsed == 0);
	fuzz_assert(client->answers <= client->questions);
	return ret < 0 && errno == EAGAIN;
}

static void clients_read(void)
{
	unsigned int i;

	for (i = 0; i < CONNS; i++) {
		if (clients[i].fd != -1 && !client_read(&clients[i]))
			client_close(&clients[i]);
	}
}

/* ---- what Redis has ---- */

static void put_bulk(string_t *str, const void *data, size_t size)
{
	str_printfa(str, "$%zu\r\n", size);
	str_append_data(str, data, size);
	str_append(str, "\r\n");
}

/* An entry as XRANGE has it, with a fuzzed ID or that of the header. */
static void put_entry(string_t *str, struct dovetail_keyring *keyring,
		      const struct dovetail_entry_head *head, const char *id,
		      const void *payload, size_t size)
{
	const struct dovetail_public_key *keys, *recipients[8];
	unsigned char hash[DOVETAIL_HASH_SIZE];
	buffer_t *entry = t_buffer_create(512);
	unsigned int i, count, n = 0;

	keys = dovetail_keyring_peers(keyring, &count);
	for (i = 0; i < count && n < N_ELEMENTS(recipients); i++)
		recipients[n++] = &keys[i];
	dovetail_seal(keyring, recipients, n, head, payload, size, entry, hash);
	str_append(str, "*2\r\n");
	put_bulk(str, id, strlen(id));
	str_append(str, "*2\r\n$1\r\ne\r\n");
	put_bulk(str, entry->data, entry->used);
}

static void do_ack(struct fuzz_input *in)
{
	static unsigned int number;
	struct dovetail_entry_head head;
	string_t *str = t_str_new(1024);
	const uint8_t *payload;
	size_t size;

	i_zero(&head);
	head.kind = DOVETAIL_ENTRY_ACK;
	head.shard = fuzz_get_u8(in) % (SHARDS + 1);
	head.shards = SHARDS + 1;
	head.time_usecs = fuzz_get_u64(in);
	payload = fuzz_get_block(in, &size);
	if (fake_redis_waits(1) == NULL ||
	    strcmp(fake_redis_waits(1), "XREAD") != 0)
		return;
	str_append(str, "*1\r\n*2\r\n$5\r\nack:a\r\n*1\r\n");
	put_entry(str, ring_b, &head, t_strdup_printf("1-%u", ++number),
		  payload, size);
	fake_redis_feed(1, str_data(str), str_len(str));
}

static void do_own(struct fuzz_input *in)
{
	struct dovetail_entry_head head;
	string_t *str = t_str_new(1024);

	i_zero(&head);
	head.kind = DOVETAIL_ENTRY_LOG;
	head.shard = fuzz_get_u8(in) % SHARDS;
	head.shards = SHARDS;
	head.generation = fuzz_get_u64(in);
	head.seq = fuzz_get_u64(in);
	if (fake_redis_waits(0) == NULL ||
	    strstr(fake_redis_waits(0), "RANGE") == NULL)
		return;
	str_append(str, "*1\r\n");
	put_entry(str, ring_a, &head, t_strdup_printf("%"PRIu64"-%"PRIu64,
		  head.generation, head.seq), "", 0);
	fake_redis_feed(0, str_data(str), str_len(str));
}

static void do_tick(struct dovetail_queue *q, unsigned int secs)
{
	struct timeval now = ioloop_timeval;
	unsigned int i;

	now_usecs += secs * 1000000ULL;
	/* the clock is right again with the next turn of the ioloop, which is
	   what happens to clocks */
	ioloop_timeval.tv_sec += secs;
	ioloop_time = ioloop_timeval.tv_sec;
	for (i = 0; i < q->logs_count; i++)
		dovetail_queue_log_tick(&q->logs[i]);
	dovetail_queue_acks_tick(q);
	dovetail_queue_users_tick(q);
	dovetail_queue_conns_tick(q);
	dovetail_queue_conns_flush(q);
	ioloop_timeval = now;
	ioloop_time = now.tv_sec;
}

/* ---- a run ---- */

static void do_something(struct dovetail_queue *q, struct fuzz_input *in)
{
	uint8_t what = fuzz_get_u8(in) % DO_COUNT, whom = fuzz_get_u8(in);
	struct client *client = &clients[whom / 2 % CONNS];
	const uint8_t *data;
	buffer_t *buf;
	size_t size, offset;
	unsigned int i;

	switch (what) {
	case DO_CONNECT:
		client_connect(q, client, whom % 2 != 0);
		break;
	case DO_SEND:
		data = fuzz_get_block(in, &size);
		client_send(client, data, size);
		break;
	case DO_FRAME:
		buf = t_buffer_create(256);
		offset = dovetail_frame_begin(buf, fuzz_get_u8(in));
		data = fuzz_get_block(in, &size);
		buffer_append(buf, data, size);
		dovetail_frame_end(buf, offset);
		client_send(client, buf->data, buf->used);
		break;
	case DO_HANG_UP:
		client_close(client);
		break;
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
		for (i = fuzz_get_u8(in); i > 0; i--) {
			if (!fake_redis_answer(whom % 2))
				break;
		}
		break;
	case DO_ACK:
		do_ack(in);
		break;
	case DO_OWN:
		do_own(in);
		break;
	case DO_TICK:
		do_tick(q, fuzz_get_u8(in));
		break;
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct fuzz_input in = { data, size };
	struct ioloop *ioloop = io_loop_create();
	struct dovetail_queue *q;
	unsigned int i;

	now_usecs = 1000000;
	T_BEGIN {
		q = queue_init();
		while (in.size > 0) T_BEGIN {
			do_something(q, &in);
			fuzz_run_ioloop();
			clients_read();
			fuzz_assert(q->pending_bytes <=
				    DOVETAIL_QUEUE_PENDING_MAX_BYTES +
				    DOVETAIL_FRAME_MAX_SIZE);
			fuzz_assert(q->halted_count == 0 ||
				    q->pending_bytes > 0);
		} T_END;
		/* those that are still connected were read to the end */
		fuzz_run_ioloop();
		clients_read();
		queue_deinit(q);
		for (i = 0; i < CONNS; i++) {
			if (clients[i].fd != -1 && !clients[i].rubbish) {
				(void)client_read(&clients[i]);
				fuzz_assert(clients[i].unclear ||
					    clients[i].answers ==
					    clients[i].questions);
			}
			client_close(&clients[i]);
		}
	} T_END;
	fake_redis_reset();
	io_loop_destroy(&ioloop);
	return 0;
}
