/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* Read the peers' logs: fetch, check chain and signature, decrypt, apply,
   acknowledge. One connection waits in XREAD for all of them, another one sends
   acknowledgements. While entries are applied the next ones are on their way.

   What becomes of an entry that is not right:
     - not an entry, unknown or wrong origin, wrong signature, not for us, of
       another stream, a repeat, of an old epoch: it is dropped, counted, logged
       (for each reason at most once in STREAM_LOG_SECS); the next entry is
       read.
     - of a newer format: the same, and the log has to wait, as status says,
       until dovetail is upgraded here: our position stays before the entry,
       and the origin keeps what comes after our position. But as the version
       is not worth more than the signature, which we cannot check, an entry
       of our format behind it ends the waiting: when it follows what we had,
       the newer one was not the origin's, otherwise there is a gap.
     - entries missing before it (the chain does not fit): it is applied, and
       the origin is asked for the state of all its users of this shard
       (SHARD_REQUEST); a mailbox that lacks something then asks for that.

   When the last entry is not there any more, the origin's next one shows it,
   which is a heartbeat at the latest. */

#include "lib.h"
#include "array.h"
#include "buffer.h"
#include "ioloop.h"
#include "str.h"
#include "str-sanitize.h"
#include "time-util.h"
#include "dovetail-clock.h"
#include "dovetail-compat.h"
#include "dovetail-queue-client.h"
#include "dovetail-redis.h"
#include "dovetail-replay.h"
#include "dovetail-seal.h"
#include "dovetail-wire.h"

#include <hiredis/hiredis.h>
#include <fcntl.h>
#include <unistd.h>

/* Entries fetched at once: a bound for the memory of an answer. */
#define STREAM_FETCH_COUNT 8
/* In a backlog not every entry is acknowledged by itself. */
#define STREAM_ACK_INTERVAL_USECS 5000
/* What failed is said for so long: nobody at the origin waits longer. */
#define STREAM_FAILED_SECS 60
/* How long an acknowledgement nobody waits for may take. */
#define STREAM_ACK_DELAY_MSECS 50
/* An idle replica says that it lives. */
#define STREAM_ACK_IDLE_MSECS 5000
/* Users in trouble are named in one of many acks. */
#define STREAM_ACK_TROUBLES_MSECS 1000
#define STREAM_CMD_TIMEOUT_MSECS 10000
#define STREAM_RETRY_MSECS 1000
/* An idle reader has another look at the streams' places. */
#define STREAM_BLOCK_MSECS "5000"
/* ... and answers in any case: a connection on which nothing comes is dead. */
#define STREAM_READ_TIMEOUT_MSECS 15000
#define STREAM_LOG_SECS 60
/* of an error that is reported: names in it are as long as a peer makes them */
#define STREAM_ERROR_MAX_LEN 500

/* The state file of a stream, host byte order: written over and over at one
   place, so a torn write shows in the check. */
struct stream_state {
	struct dovetail_chain chain;
	unsigned char check[16];
};

struct replay_stream {
	const char *origin;
	uint8_t shard;
	const char *key;

	int fd;
	const char *path;
	/* up to the last entry that was right */
	struct dovetail_chain chain;
	uint64_t chain_time_usecs;
	/* what XREAD read last, right or not */
	uint64_t read_generation, read_seq;
	/* an entry of a newer format was read, and none of ours since */
	bool newer;
	/* the key holds something that is not a stream */
	bool no_stream;
	/* dovetail_shards differs at the origin: it was logged */
	bool shards_logged;

	/* for the acknowledgement and the status */
	uint64_t entries, rejected;
	uint64_t rejected_by[DOVETAIL_OPEN_RET_COUNT];
	time_t rejected_logged[DOVETAIL_OPEN_RET_COUNT];
	uint64_t gaps;
	ARRAY(struct dovetail_ack_failed) failed;
	/* when the last one was added: dovetail_monotonic_secs() */
	time_t failed_secs;
	char *last_error;
	uint64_t lag_usecs;
	time_t last_applied;
	/* how far the log goes in Redis, as of the last report */
	uint64_t end_generation, end_seq;
	/* dovetail_monotonic_usecs() when an ack had users in trouble */
	uint64_t troubles_usecs;
	/* something was applied that no ack has said yet */
	bool ack_needed;
	/* ... and somebody at the origin waits for it */
	bool ack_waited;
};

static struct {
	struct dovetail_redis *reader, *writer;
	ARRAY(struct replay_stream) list;
	buffer_t *payload, *entry;
	uint64_t last_ack_usecs;
	struct timeout *to_idle, *to_read, *to_ack;
	bool reading;
	/* why the last XREAD failed, NULL: it did not */
	char *error;
} streams;

static void streams_read(void);
static void streams_idle(void *context);

/* ---- state ---- */

static void stream_failed(struct replay_stream *stream, uint64_t generation,
			  uint64_t seq, uint32_t ordinal)
{
	struct dovetail_ack_failed *failed;

	if (array_count(&stream->failed) == DOVETAIL_ACK_FAILED_MAX) {
		/* the older half becomes one */
		array_delete(&stream->failed, 0,
			     DOVETAIL_ACK_FAILED_MAX / 2 - 1);
		failed = array_front_modifiable(&stream->failed);
		failed->ordinal = DOVETAIL_ACK_UP_TO;
	}
	failed = array_append_space(&stream->failed);
	failed->generation = generation;
	failed->seq = seq;
	failed->ordinal = ordinal;
	stream->failed_secs = dovetail_monotonic_secs();
}

static void stream_state_check(const struct dovetail_chain *chain,
			       unsigned char check_r[16])
{
	crypto_generichash(check_r, 16, (const unsigned char *)chain,
			   sizeof(*chain), NULL, 0);
}

static void stream_state_read(struct replay_stream *stream)
{
	struct stream_state state;
	unsigned char check[16];
	ssize_t ret;

	stream->fd = open(stream->path, O_RDWR | O_CREAT, 0600);
	if (stream->fd == -1)
		i_fatal("open(%s) failed: %m", stream->path);
	i_zero(&state);
	ret = pread(stream->fd, &state, sizeof(state), 0);
	if (ret < 0)
		i_fatal("read(%s) failed: %m", stream->path);
	if (ret == 0)
		return;
	stream_state_check(&state.chain, check);
	if (ret != sizeof(state) ||
	    memcmp(check, state.check, sizeof(check)) != 0) {
		e_error(replay.event, "%s is broken: reading the log of %s "
			"from its start", stream->path, stream->origin);
		return;
	}
	stream->chain = state.chain;
	stream->read_generation = state.chain.generation;
	stream->read_seq = state.chain.seq;
	/* whatever the process before us could not apply and did not say */
	stream_failed(stream, state.chain.generation, state.chain.seq,
		      DOVETAIL_ACK_UP_TO);
}

static void stream_state_write(struct replay_stream *stream)
{
	struct stream_state state;

	i_zero(&state);
	state.chain = stream->chain;
	stream_state_check(&stream->chain, state.check);
	if (pwrite(stream->fd, &state, sizeof(state), 0) != sizeof(state))
		e_error(replay.event, "write(%s) failed: %m", stream->path);
}

/* ---- acknowledge ---- */

static void stream_set_error(struct replay_stream *stream, const char *error)
{
	i_free(stream->last_error);
	stream->last_error = i_strndup(error, STREAM_ERROR_MAX_LEN);
	replay_control_changed();
}

/* The origin may be about to change its key: seal for all it has. */
static unsigned int
stream_peer_keys(const char *origin,
		 const struct dovetail_public_key **recipients_r)
{
	const struct dovetail_public_key *keys;
	unsigned int i, count, n = 0;

	keys = dovetail_keyring_peers(replay.keyring, &count);
	for (i = 0; i < count && n < DOVETAIL_RECIPIENTS_MAX; i++) {
		if (strcmp(keys[i].node, origin) == 0)
			recipients_r[n++] = &keys[i];
	}
	return n;
}

static void stream_ack_sent(struct redisReply *reply, void *context)
{
	struct replay_stream *stream = context;

	/* with no answer the connection is gone, and its return sends anew */
	if (reply == NULL || reply->type != REDIS_REPLY_ERROR)
		return;
	stream_set_error(stream, t_strdup_printf("Cannot acknowledge: %s",
						 str_sanitize(reply->str, 200)));
	if (strstr(reply->str, "last possible ID") != NULL) {
		/* Somebody else's doing: there is no room behind the stream's
		   end. We report again soon. */
		dovetail_redis_commandl(streams.writer, NULL, NULL, "DEL",
			t_strconcat(replay.set.redis.prefix, "ack:",
				    stream->origin, NULL), NULL);
	}
}

/* The worker's, told by its first shard, as set_aside is. */
static void stream_ack_troubles(struct replay_stream *stream, buffer_t *buf)
{
	uint64_t now = dovetail_monotonic_usecs();

	if (stream->shard != replay.slot ||
	    now - stream->troubles_usecs < STREAM_ACK_TROUBLES_MSECS * 1000)
		return;
	stream->troubles_usecs = now;
	replay_troubles_ack(buf, stream->origin);
}

static void stream_ack(struct replay_stream *stream)
{
	const struct dovetail_public_key *recipients[DOVETAIL_RECIPIENTS_MAX];
	unsigned int recipients_count;
	struct dovetail_entry_head head;
	struct dovetail_ack ack;
	unsigned char hash[DOVETAIL_HASH_SIZE];
	struct timeval now;

	if (!dovetail_redis_is_ready(streams.writer))
		return;

	i_zero(&ack);
	ack.generation = stream->chain.generation;
	ack.seq = stream->chain.seq;
	ack.applied_time_usecs = stream->chain_time_usecs;
	ack.entries = stream->entries;
	ack.rejected = stream->rejected;
	/* the worker's, told by its first shard */
	ack.set_aside = stream->shard != replay.slot ? 0 :
		replay_wanted_count(stream->origin);
	if (dovetail_monotonic_secs() - stream->failed_secs >
	    STREAM_FAILED_SECS)
		array_clear(&stream->failed);
	ack.failed = array_get(&stream->failed, &ack.failed_count);
	ack.last_error = stream->last_error == NULL ? "" : stream->last_error;

	i_gettimeofday(&now);
	i_zero(&head);
	head.kind = DOVETAIL_ENTRY_ACK;
	head.shard = stream->shard;
	head.shards = replay.set.shards;
	head.epoch = stream->chain.epoch;
	head.seq = 1;
	head.time_usecs = now.tv_sec * 1000000ULL + now.tv_usec;

	T_BEGIN {
		buffer_t *payload = t_buffer_create(256);
		buffer_t *troubles = t_buffer_create(64);
		const char *argv[] = { "XADD", t_strconcat(
			replay.set.redis.prefix, "ack:", stream->origin, NULL),
			"MAXLEN", "~", "1000", "*", "e", NULL };
		size_t lens[N_ELEMENTS(argv)];
		unsigned int i;

		stream_ack_troubles(stream, troubles);
		ack.troubles = troubles->data;
		ack.troubles_size = troubles->used;
		dovetail_ack_encode(payload, &ack);
		buffer_set_used_size(streams.entry, 0);
		recipients_count = stream_peer_keys(stream->origin,
						    recipients);
		dovetail_seal(replay.keyring, recipients,
			      recipients_count, &head, payload->data,
			      payload->used, streams.entry, hash);
		for (i = 0; i < N_ELEMENTS(argv) - 1; i++)
			lens[i] = strlen(argv[i]);
		argv[i] = streams.entry->data;
		lens[i] = streams.entry->used;
		dovetail_redis_command(streams.writer, N_ELEMENTS(argv), argv,
				       lens, stream_ack_sent, stream);
	} T_END;
	stream->ack_needed = FALSE;
	stream->ack_waited = FALSE;
	streams.last_ack_usecs = dovetail_monotonic_usecs();
}

/* What somebody waits for is said at once ... */
static void streams_ack_waited(void)
{
	struct replay_stream *stream;

	array_foreach_modifiable(&streams.list, stream) {
		if (stream->ack_waited)
			stream_ack(stream);
	}
}

/* ... and all else soon: one for many. */
static void streams_ack_needed(void *context ATTR_UNUSED)
{
	struct replay_stream *stream;

	timeout_remove(&streams.to_ack);
	array_foreach_modifiable(&streams.list, stream) {
		if (stream->ack_needed)
			stream_ack(stream);
	}
}

/* ---- an entry ---- */

static void stream_reject(struct replay_stream *stream,
			  enum dovetail_open_ret ret, const char *id,
			  const char *error)
{
	stream->rejected++;
	stream->rejected_by[ret]++;
	stream->ack_needed = TRUE;
	stream_set_error(stream, t_strdup_printf("At %s: %s",
						 str_sanitize(id, 50), error));
	if (stream->rejected_logged[ret] == 0 ||
	    ioloop_time - stream->rejected_logged[ret] >= STREAM_LOG_SECS) {
		stream->rejected_logged[ret] = ioloop_time;
		e_error(event_create_passthrough(replay.event)->
			add_str("reason", dovetail_open_ret_name(ret))->
			event(), "%s: %s", stream->key, stream->last_error);
	}
	if (ret == DOVETAIL_OPEN_VERSION)
		stream->newer = TRUE;
}

static void stream_apply_group(struct replay_stream *stream,
			       const struct dovetail_chain *chain)
{
	struct dovetail_wire_reader r;
	enum replay_result result;
	const void *change;
	const char *error;
	uint32_t ordinal = 0;
	size_t size;

	dovetail_wire_reader_init(&r, streams.payload->data,
				  streams.payload->used);
	while (r.pos < r.end && !r.failed) {
		change = dovetail_wire_get_bytes(&r, &size);
		if (r.failed)
			break;
		T_BEGIN {
			result = replay_apply(stream->origin, change, size,
					      &error);
			if (result != REPLAY_DONE)
				stream_failed(stream, chain->generation,
					      chain->seq, ordinal);
			if (result == REPLAY_FAILED) {
				error = t_strndup(error, STREAM_ERROR_MAX_LEN);
				if (null_strcmp(stream->last_error, error) != 0)
					e_error(replay.event, "%s", error);
				stream_set_error(stream, error);
			}
		} T_END;
		ordinal++;
	}
	if (r.failed) {
		stream_set_error(stream, "A group of changes is cut off");
		e_error(replay.event, "%s: %s", stream->key,
			stream->last_error);
	}
}

/* The hash in the first entry we ever read says whether there were others. */
static bool stream_misses_start(const struct replay_stream *stream,
				const struct dovetail_entry_head *head)
{
	return stream->chain.generation == 0 && stream->chain.seq == 0 &&
		sodium_is_zero(head->prev, sizeof(head->prev)) == 0;
}

static void stream_check_shards(struct replay_stream *stream,
				const struct dovetail_entry_head *head)
{
	if (head->shards == replay.set.shards) {
		stream->shards_logged = FALSE;
		return;
	}
	stream_set_error(stream, t_strdup_printf(
		"dovetail_shards is %u at %s and %u here; it must be the same "
		"on all nodes", head->shards, stream->origin,
		replay.set.shards));
	if (!stream->shards_logged) {
		e_error(replay.event, "%s: %s", stream->key,
			stream->last_error);
	}
	stream->shards_logged = TRUE;
}

static void stream_entry(struct replay_stream *stream, const char *id,
			 const void *data, size_t size)
{
	struct dovetail_open_expect expect;
	struct dovetail_opened opened;
	struct dovetail_chain chain;
	enum dovetail_open_ret ret;
	struct timeval now;
	uint64_t now_usecs;
	const char *error;

	i_zero(&expect);
	expect.kind = DOVETAIL_ENTRY_LOG;
	expect.origin = stream->origin;
	expect.shard = stream->shard;
	expect.chain = &stream->chain;
	ret = dovetail_open(replay.keyring, &expect, data, size,
			    streams.payload, &opened, &error);
	if (ret != DOVETAIL_OPEN_OK) {
		stream_reject(stream, ret, id, error);
		return;
	}
	stream->newer = FALSE;
	stream_check_shards(stream, &opened.head);
	if (opened.gap) {
		stream->gaps++;
		stream_set_error(stream, t_strdup_printf(
			"Entries before %s are missing in Redis",
			str_sanitize(id, 50)));
		e_warning(replay.event, "%s: %s", stream->key,
			  stream->last_error);
	}
	if (opened.gap || stream_misses_start(stream, &opened.head)) {
		stream_failed(stream, opened.head.generation,
			      opened.head.seq - 1, DOVETAIL_ACK_UP_TO);
		replay_wanted_add_shard(stream->origin, stream->shard,
			opened.gap ? stream->last_error :
			"Its log begins before what Redis has");
	}

	chain.epoch = opened.head.epoch;
	chain.generation = opened.head.generation;
	chain.seq = opened.head.seq;
	memcpy(chain.hash, opened.hash, sizeof(chain.hash));
	stream_apply_group(stream, &chain);

	/* behind what it describes: after a crash the entry is applied again,
	   which changes nothing */
	stream->chain = chain;
	stream->chain_time_usecs = opened.head.time_usecs;
	stream_state_write(stream);
	stream->entries++;
	stream->ack_needed = TRUE;
	i_gettimeofday(&now);
	/* the origin's clock may say anything */
	now_usecs = timeval_to_usecs(&now);
	stream->lag_usecs = now_usecs <= opened.head.time_usecs ? 0 :
		now_usecs - opened.head.time_usecs;
	stream->last_applied = now.tv_sec;
	replay_control_changed();
}

/* ---- reading ---- */

struct stream_id {
	uint64_t generation, seq;
};

static int stream_id_parse(const struct redisReply *reply,
			   struct stream_id *id_r)
{
	const char *p;

	if (reply->type != REDIS_REPLY_STRING)
		return -1;
	p = strchr(reply->str, '-');
	return p != NULL &&
		str_to_uint64(t_strdup_until(reply->str, p),
			      &id_r->generation) == 0 &&
		str_to_uint64(p + 1, &id_r->seq) == 0 ? 0 : -1;
}

/* Is the id behind what was read? */
static bool stream_id_is_new(const struct replay_stream *stream,
			     const struct stream_id *id)
{
	return id->generation > stream->read_generation ||
		(id->generation == stream->read_generation &&
		 id->seq > stream->read_seq);
}

static bool stream_entry_id(const struct redisReply *entry,
			    struct stream_id *id_r)
{
	return entry->type == REDIS_REPLY_ARRAY && entry->elements == 2 &&
		stream_id_parse(entry->element[0], id_r) == 0;
}

/* Find the stream a part of the answer is about. */
static struct replay_stream *
streams_find(const struct redisReply *part)
{
	struct replay_stream *stream;

	if (part->type != REDIS_REPLY_ARRAY || part->elements != 2 ||
	    part->element[0]->type != REDIS_REPLY_STRING ||
	    part->element[1]->type != REDIS_REPLY_ARRAY)
		return NULL;
	array_foreach_modifiable(&streams.list, stream) {
		if (strcmp(stream->key, part->element[0]->str) == 0)
			return stream;
	}
	return NULL;
}

/* Note how far the answer goes. FALSE: not beyond what was read before. */
static bool stream_note_read(struct replay_stream *stream,
			     const struct redisReply *entries)
{
	struct stream_id id;

	if (entries->elements == 0 ||
	    !stream_entry_id(entries->element[entries->elements - 1], &id) ||
	    !stream_id_is_new(stream, &id))
		return FALSE;
	stream->read_generation = id.generation;
	stream->read_seq = id.seq;
	return TRUE;
}

static bool reply_is(const struct redisReply *reply, const char *word)
{
	return reply->len == strlen(word) &&
		memcmp(reply->str, word, reply->len) == 0;
}

/* The only field of an entry; NULL: it is something else. */
static const struct redisReply *
stream_entry_field(const struct redisReply *entry, bool *waited_r)
{
	const struct redisReply *fields;
	struct stream_id id;

	*waited_r = FALSE;
	if (!stream_entry_id(entry, &id))
		return NULL;
	fields = entry->element[1];
	if (fields->type != REDIS_REPLY_ARRAY || fields->elements != 2 ||
	    fields->element[0]->type != REDIS_REPLY_STRING ||
	    fields->element[1]->type != REDIS_REPLY_STRING)
		return NULL;
	if (reply_is(fields->element[0], DOVETAIL_ENTRY_FIELD_WAITED))
		*waited_r = TRUE;
	else if (!reply_is(fields->element[0], DOVETAIL_ENTRY_FIELD))
		return NULL;
	return fields->element[1];
}

static void stream_entries(struct replay_stream *stream,
			   const struct redisReply *entries)
{
	const struct redisReply *entry, *field;
	struct stream_id id;
	unsigned int i;
	bool waited;

	for (i = 0; i < entries->elements; i++) T_BEGIN {
		entry = entries->element[i];
		field = stream_entry_field(entry, &waited);
		if (field == NULL) {
			stream_reject(stream, DOVETAIL_OPEN_MALFORMED,
				stream_entry_id(entry, &id) ?
				entry->element[0]->str : "?",
				"It is refused (malformed): not one field e "
				"with an entry");
		} else {
			stream_entry(stream, entry->element[0]->str,
				     field->str, field->len);
		}
		if (waited)
			stream->ack_waited = TRUE;
		/* In a backlog, not each by itself. */
		if (dovetail_monotonic_usecs() - streams.last_ack_usecs >
		    STREAM_ACK_INTERVAL_USECS)
			streams_ack_waited();
	} T_END;
}

static void streams_read_again(void *context ATTR_UNUSED)
{
	timeout_remove(&streams.to_read);
	streams_read();
}

static void streams_read_later(void)
{
	if (streams.to_read == NULL) {
		streams.to_read = timeout_add(STREAM_RETRY_MSECS,
					      streams_read_again, NULL);
	}
}

/* Redis refuses to read any of several keys when one of them is no stream. */
static void stream_type_reply(struct redisReply *reply, void *context)
{
	struct replay_stream *stream = context;
	bool is_stream;

	if (reply == NULL || reply->type != REDIS_REPLY_STATUS)
		return;
	is_stream = strcmp(reply->str, "stream") == 0 ||
		strcmp(reply->str, "none") == 0;
	if (!is_stream && !stream->no_stream) {
		stream_set_error(stream, t_strdup_printf("Redis has a %s in "
			"the place of the stream", str_sanitize(reply->str,
								20)));
		e_error(replay.event, "%s: %s", stream->key,
			stream->last_error);
	}
	if (is_stream && stream->no_stream)
		e_info(replay.event, "%s: It is a stream again", stream->key);
	if (stream->no_stream == is_stream)
		replay_control_changed();
	stream->no_stream = !is_stream;
}

static void stream_check_type(struct replay_stream *stream)
{
	dovetail_redis_commandl(streams.writer, stream_type_reply, stream,
				"TYPE", stream->key, NULL);
}

static void streams_read_failed(const char *error)
{
	struct replay_stream *stream;
	bool wrong_type = str_begins_with(error, "WRONGTYPE");

	error = t_strdup_printf("Cannot read from Redis: %s",
				str_sanitize(error, 200));
	if (!wrong_type && null_strcmp(error, streams.error) != 0)
		e_error(replay.event, "%s", error);
	i_free(streams.error);
	streams.error = i_strdup(error);
	array_foreach_modifiable(&streams.list, stream) {
		if (wrong_type)
			stream_check_type(stream);
		else
			stream_set_error(stream, error);
	}
	streams_read_later();
}

static void streams_received(struct redisReply *reply, void *context ATTR_UNUSED)
{
	struct replay_stream *stream;
	unsigned int i;
	bool progress = FALSE;

	streams.reading = FALSE;
	if (reply == NULL)
		return;
	if (reply->type == REDIS_REPLY_ERROR) {
		streams_read_failed(reply->str);
		return;
	}
	i_free(streams.error);
	if (reply->type == REDIS_REPLY_NIL) {
		streams_read();
		return;
	}
	/* only an array has elements */
	for (i = 0; i < reply->elements; i++) {
		stream = streams_find(reply->element[i]);
		if (stream != NULL && stream_note_read(stream,
					reply->element[i]->element[1]))
			progress = TRUE;
	}
	if (progress)
		streams_read();
	else {
		/* Redis would not do this: let it not keep us busy */
		streams_read_later();
	}
	for (i = 0; i < reply->elements; i++) {
		stream = streams_find(reply->element[i]);
		if (stream != NULL)
			stream_entries(stream, reply->element[i]->element[1]);
	}
	streams_ack_waited();
	if (streams.to_ack == NULL) {
		streams.to_ack = timeout_add_short(STREAM_ACK_DELAY_MSECS,
						   streams_ack_needed, NULL);
	}
}

static void streams_read(void)
{
	struct replay_stream *stream;
	ARRAY_TYPE(const_string) argv;
	const char *arg;
	unsigned int count = 0;
	size_t *lens;
	unsigned int i, argc;

	if (streams.reading || !dovetail_redis_is_ready(streams.reader))
		return;
	T_BEGIN {
		t_array_init(&argv, 16);
		arg = "XREAD"; array_push_back(&argv, &arg);
		arg = "COUNT"; array_push_back(&argv, &arg);
		arg = t_strdup_printf("%u", STREAM_FETCH_COUNT);
		array_push_back(&argv, &arg);
		arg = "BLOCK"; array_push_back(&argv, &arg);
		arg = STREAM_BLOCK_MSECS; array_push_back(&argv, &arg);
		arg = "STREAMS"; array_push_back(&argv, &arg);
		array_foreach_modifiable(&streams.list, stream) {
			if (stream->no_stream)
				continue;
			array_push_back(&argv, &stream->key);
			count++;
		}
		array_foreach_modifiable(&streams.list, stream) {
			if (stream->no_stream)
				continue;
			arg = t_strdup_printf("%"PRIu64"-%"PRIu64,
					      stream->read_generation,
					      stream->read_seq);
			array_push_back(&argv, &arg);
		}
		argc = array_count(&argv);
		lens = t_new(size_t, argc);
		for (i = 0; i < argc; i++)
			lens[i] = strlen(array_idx_elem(&argv, i));
		if (count > 0) {
			streams.reading = TRUE;
			dovetail_redis_command(streams.reader, argc,
					       array_front(&argv), lens,
					       streams_received, NULL);
		}
	} T_END;
	if (count == 0)
		streams_read_later();
}

/* ---- streams that are not what they were ---- */

static void stream_read_from_chain(struct replay_stream *stream)
{
	stream->read_generation = stream->chain.generation;
	stream->read_seq = stream->chain.seq;
}

/* What we read at the end was nothing of the origin's. If that is gone, what the
   origin writes now may stand before it. */
static void stream_end_reply(struct redisReply *reply, void *context)
{
	struct replay_stream *stream = context;
	struct stream_id end = { 0, 0 };

	if (reply == NULL || reply->type != REDIS_REPLY_ARRAY ||
	    (reply->elements > 0 &&
	     !stream_entry_id(reply->element[0], &end)))
		return;
	if (end.generation < stream->read_generation ||
	    (end.generation == stream->read_generation &&
	     end.seq < stream->read_seq))
		stream_read_from_chain(stream);
}

static void stream_check_end(struct replay_stream *stream)
{
	if (stream->read_generation == stream->chain.generation &&
	    stream->read_seq == stream->chain.seq)
		return;
	dovetail_redis_commandl(streams.writer, stream_end_reply, stream,
				"XREVRANGE", stream->key, "+", "-",
				"COUNT", "1", NULL);
}

static void streams_idle(void *context ATTR_UNUSED)
{
	struct replay_stream *stream;

	array_foreach_modifiable(&streams.list, stream) {
		stream_ack(stream);
		if (stream->no_stream)
			stream_check_type(stream);
		else
			stream_check_end(stream);
	}
}

static void streams_reader_ready(void *context ATTR_UNUSED)
{
	struct replay_stream *stream;

	/* From the last entry that was right: what was read behind it and not
	   applied is read again. */
	array_foreach_modifiable(&streams.list, stream)
		stream_read_from_chain(stream);
	streams_read();
	replay_control_changed();
}

static void streams_lost(void *context ATTR_UNUSED)
{
	streams.reading = FALSE;
	replay_control_changed();
}

static void streams_writer_ready(void *context ATTR_UNUSED)
{
	streams_idle(NULL);
}

static void streams_writer_lost(void *context ATTR_UNUSED)
{
}

/* ---- life ---- */

static void stream_init(const char *origin, unsigned int shard)
{
	struct replay_stream *stream = array_append_space(&streams.list);

	stream->origin = origin;
	stream->shard = shard;
	stream->key = p_strdup_printf(replay.pool, "%slog:%s:%u",
				      replay.set.redis.prefix, origin, shard);
	stream->path = p_strdup_printf(replay.pool, "%s/%s.%u", replay.dir,
				       origin, shard);
	i_array_init(&stream->failed, 8);
	stream_state_read(stream);
}

void replay_streams_init(void)
{
	static const struct dovetail_redis_callbacks reader_callbacks = {
		.ready = streams_reader_ready,
		.lost = streams_lost,
	};
	static const struct dovetail_redis_callbacks writer_callbacks = {
		.ready = streams_writer_ready,
		.lost = streams_writer_lost,
	};
	unsigned int i, shard;

	i_zero(&streams);
	i_array_init(&streams.list, 8);
	streams.payload = buffer_create_dynamic(default_pool, 16384);
	streams.entry = buffer_create_dynamic(default_pool, 1024);
	for (i = 0; replay.set.peers[i] != NULL; i++) {
		for (shard = replay.slot; shard < replay.set.shards;
		     shard += replay.slots)
			stream_init(replay.set.peers[i], shard);
	}
	if (array_count(&streams.list) == 0)
		return;
	streams.reader = dovetail_redis_init(replay.event, &replay.set.redis,
		replay.redis_password, replay.redis_tls,
		STREAM_READ_TIMEOUT_MSECS,
		&reader_callbacks, NULL);
	streams.writer = dovetail_redis_init(replay.event, &replay.set.redis,
		replay.redis_password, replay.redis_tls,
		STREAM_CMD_TIMEOUT_MSECS,
		&writer_callbacks, NULL);
	streams.to_idle = timeout_add(STREAM_ACK_IDLE_MSECS, streams_idle,
				      NULL);
}

void replay_streams_deinit(void)
{
	struct replay_stream *stream;

	timeout_remove(&streams.to_idle);
	timeout_remove(&streams.to_read);
	timeout_remove(&streams.to_ack);
	if (streams.reader != NULL)
		dovetail_redis_deinit(&streams.reader);
	if (streams.writer != NULL)
		dovetail_redis_deinit(&streams.writer);
	array_foreach_modifiable(&streams.list, stream) {
		i_close_fd(&stream->fd);
		array_free(&stream->failed);
		i_free(stream->last_error);
	}
	array_free(&streams.list);
	i_free(streams.error);
	buffer_free(&streams.payload);
	buffer_free(&streams.entry);
}

/* ---- status ---- */

static void stream_got_info(struct redisReply *reply, void *context)
{
	struct replay_stream *stream = context;
	struct stream_id id;
	unsigned int i;

	if (reply == NULL || reply->type != REDIS_REPLY_ARRAY)
		return;
	for (i = 0; i + 1 < reply->elements; i += 2) {
		if (reply->element[i]->type == REDIS_REPLY_STRING &&
		    strcmp(reply->element[i]->str, "last-generated-id") == 0 &&
		    stream_id_parse(reply->element[i + 1], &id) == 0) {
			stream->end_generation = id.generation;
			stream->end_seq = id.seq;
		}
	}
}

/* Entries in Redis that are not applied here. Over the border of a generation
   nobody can count: then only the new one's. */
static uint64_t stream_waiting(const struct replay_stream *stream)
{
	if (stream->end_generation == stream->chain.generation) {
		return stream->end_seq > stream->chain.seq ?
			stream->end_seq - stream->chain.seq : 0;
	}
	return stream->end_generation > stream->chain.generation ?
		stream->end_seq : 0;
}

static void report_field(buffer_t *buf, const char *key, const char *value)
{
	dovetail_wire_put_str(buf, key);
	dovetail_wire_put_str(buf, value);
}

static void stream_report(buffer_t *buf, const struct replay_stream *stream)
{
	const char *error = dovetail_redis_is_ready(streams.reader) ? NULL :
		dovetail_redis_last_error(streams.reader), *stuck;
	struct dovetail_health_troubles troubles;
	string_t *reasons = t_str_new(64);
	unsigned int i;

	for (i = 0; i < DOVETAIL_OPEN_RET_COUNT; i++) {
		if (stream->rejected_by[i] == 0)
			continue;
		str_printfa(reasons, "%s%s=%"PRIu64,
			    str_len(reasons) == 0 ? "" : " ",
			    dovetail_open_ret_name(i), stream->rejected_by[i]);
	}
	if (stream->gaps > 0) {
		str_printfa(reasons, "%sgap=%"PRIu64,
			    str_len(reasons) == 0 ? "" : " ", stream->gaps);
	}

	if (!dovetail_redis_is_ready(streams.reader) && error == NULL)
		error = "connecting to Redis";
	stuck = stream->no_stream ? "not a stream in Redis" :
		stream->newer ? "waiting at an entry of a newer format" : NULL;
	i_zero(&troubles);
	if (stream->shard == replay.slot)
		replay_troubles_count(stream->origin, &troubles);

	dovetail_wire_put_num(buf, 18);
	report_field(buf, "peer", stream->origin);
	report_field(buf, "shard", t_strdup_printf("%u", stream->shard));
	report_field(buf, "connection", error != NULL ? error :
		     stuck != NULL ? stuck : "ok");
	report_field(buf, "redis_error", error != NULL ? error :
		     streams.error != NULL ? streams.error : "");
	report_field(buf, "stuck", stuck != NULL ? stuck : "");
	report_field(buf, "sealed", t_strdup_printf("%"PRIu64,
		stream->chain_time_usecs));
	report_field(buf, "lacking", t_strdup_printf("%u", troubles.lacking));
	report_field(buf, "failing", t_strdup_printf("%u", troubles.failing));
	report_field(buf, "differing",
		     t_strdup_printf("%u", troubles.differing));
	report_field(buf, "diverged", t_strdup_printf("%u", troubles.diverged));
	report_field(buf, "position", t_strdup_printf("%"PRIu64"-%"PRIu64,
		stream->chain.generation, stream->chain.seq));
	report_field(buf, "lag", t_strdup_printf("%"PRIu64".%03u",
		stream->lag_usecs / 1000000,
		(unsigned int)(stream->lag_usecs / 1000 % 1000)));
	report_field(buf, "entries", t_strdup_printf("%"PRIu64,
		stream_waiting(stream)));
	report_field(buf, "rejected", t_strdup_printf("%"PRIu64,
		stream->rejected));
	report_field(buf, "rejected_reasons", str_c(reasons));
	report_field(buf, "set_aside", t_strdup_printf("%u",
		stream->shard == replay.slot ?
		replay_wanted_count(stream->origin) : 0));
	report_field(buf, "error", stream->last_error == NULL ? "" :
		     stream->last_error);
	report_field(buf, "applied_time", t_strdup_printf("%"PRIdTIME_T,
		stream->last_applied));
}

unsigned int replay_streams_report(buffer_t *buf)
{
	struct replay_stream *stream;

	array_foreach_modifiable(&streams.list, stream) T_BEGIN {
		stream_report(buf, stream);
		dovetail_redis_commandl(streams.writer, stream_got_info, stream,
					"XINFO", "STREAM", stream->key, NULL);
	} T_END;
	return array_count(&streams.list);
}
