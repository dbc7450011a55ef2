/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "array.h"
#include "buffer.h"
#include "ioloop.h"
#include "priorityq.h"
#include "str-sanitize.h"
#include "dovetail-compat.h"
#include "dovetail-queue-private.h"
#include "dovetail-service.h"

#include <hiredis/hiredis.h>

/* Reading blocks in Redis, and returns empty after this time, so that a dead
   connection is noticed. */
#define ACKS_BLOCK_MSECS "10000"
#define ACKS_TIMEOUT_MSECS (30 * 1000)
/* Opening one costs about 0.1 ms; a batch must not hold up the changes. */
#define ACKS_BATCH "20"

/* Somebody else's doing: Redis makes these IDs from the time. With the largest one
   no report could be added any more. */
#define ACKS_ID_MAX_MSECS (1ULL << 62)

static void acks_read(struct dovetail_queue *queue);
static void acks_check_end(struct dovetail_queue *queue);

bool dovetail_queue_acks_alive(const struct dovetail_queue *queue)
{
	unsigned int i;

	for (i = 0; i < queue->peers_count; i++) {
		if (queue->peers[i].received != 0 &&
		    dovetail_monotonic_secs() - queue->peers[i].received <=
		    DOVETAIL_QUEUE_PEER_ALIVE_SECS)
			return TRUE;
	}
	return FALSE;
}

static struct dovetail_queue_peer *
acks_find_peer(struct dovetail_queue *queue, const char *node)
{
	unsigned int i;

	for (i = 0; i < queue->peers_count; i++) {
		if (strcmp(queue->peers[i].node, node) == 0)
			return &queue->peers[i];
	}
	return NULL;
}

/* Whose key an entry claims to be sealed with; offset as in
   dovetail-seal.h. */
static struct dovetail_queue_peer *
acks_claimed_peer(struct dovetail_queue *queue, const void *entry, size_t size)
{
	const struct dovetail_public_key *key;

	if (size < 40 + DOVETAIL_KEY_ID_SIZE)
		return NULL;
	key = dovetail_keyring_find(queue->keyring,
				    CONST_PTR_OFFSET(entry, 40));
	return key == NULL ? NULL : acks_find_peer(queue, key->node);
}

/* Count it; log each reason once for each peer. */
static void
acks_rejected(struct dovetail_queue *queue, struct dovetail_queue_peer *peer,
	      unsigned int reason_idx, const char *reason, const char *id,
	      const char *error)
{
	uint64_t *count = peer != NULL ? &peer->bad_reports : &queue->bad_acks;
	unsigned int *logged =
		peer != NULL ? &peer->bad_logged : &queue->bad_acks_logged;

	i_assert(reason_idx < 32);
	*count += 1;
	if ((*logged & (1U << reason_idx)) != 0)
		return;
	*logged |= 1U << reason_idx;
	e_error(event_create_passthrough(queue->event)->
		add_str("peer", peer == NULL ? "" : peer->node)->
		add_str("reason", reason)->event(),
		"Report %s in %s%s%s is refused (more of the kind are only "
		"counted): %s", str_sanitize(id, 50), queue->acks_key,
		peer == NULL ? "" : ", said to be of ",
		peer == NULL ? "" : peer->node, error);
}

/* reasons of ours, after those of enum dovetail_open_ret */
enum {
	ACK_BAD_SHARD = DOVETAIL_OPEN_RET_COUNT,
	ACK_BAD_CONTENT,
	ACK_BAD_POSITION,
	ACK_READ_FAILED,
	ACK_BAD_STREAM,
};

/* Not what we believe but what we tell: so what makes no sense is left out. */
static void acks_take_troubles(const struct dovetail_queue_peer *peer,
			       struct dovetail_queue_peer_shard *ps,
			       const struct dovetail_ack *ack)
{
	struct dovetail_health_trouble_of *of;

	if (ack->troubles_size == 0)
		return;
	pool_unref(&ps->troubles_pool);
	ps->troubles_pool = pool_alloconly_create("dovetail ack troubles",
						  1024);
	ps->troubles_msecs = dovetail_monotonic_msecs();
	if (!dovetail_health_ack_get(ack->troubles, ack->troubles_size,
				     ps->troubles_pool, &ps->troubles_count,
				     &ps->troubles)) {
		pool_unref(&ps->troubles_pool);
		return;
	}
	array_foreach_modifiable(&ps->troubles, of)
		of->replica = peer->node;
}

static void
acks_handle_ack(struct dovetail_queue *queue, struct dovetail_queue_peer *peer,
		const struct dovetail_entry_head *head,
		const struct dovetail_ack *ack, const char *id)
{
	struct dovetail_queue_log *log = &queue->logs[head->shard];
	struct dovetail_queue_peer_shard *ps = &peer->shards[head->shard];
	struct dovetail_queue_id applied = {
		.generation = ack->generation,
		.seq = ack->seq,
	};
	struct dovetail_queue_id sent = {
		.generation = log->sent.generation,
		.seq = log->sent.seq,
	};

	if (head->time_usecs <= ps->report_usecs &&
	    dovetail_queue_id_cmp(&applied, &ps->applied) <= 0) {
		/* Read before, or Redis shows us an old one. With a new
		   position, the replica's clock was set back. */
		return;
	}
	if (dovetail_queue_id_cmp(&applied, &sent) > 0) {
		/* Believing it would let entries go that nobody has. */
		acks_rejected(queue, peer, ACK_BAD_POSITION, "beyond-the-log",
			      id, t_strdup_printf(
			"It confirms entry %"PRIu64"-%"PRIu64" of shard %u, "
			"but the last one is %"PRIu64"-%"PRIu64,
			applied.generation, applied.seq, log->shard,
			sent.generation, sent.seq));
		dovetail_queue_log_behind(log, applied.generation);
		return;
	}
	/* A clock that was ahead and is right again must not silence the
	   replica until the time has come. */
	ps->report_usecs = I_MIN(head->time_usecs, dovetail_queue_now_usecs());
	ps->received = peer->received = dovetail_monotonic_secs();
	peer->heard_msecs = dovetail_monotonic_msecs();
	ps->entries = ack->entries;
	ps->rejected = ack->rejected;
	ps->set_aside = ack->set_aside;
	i_free(ps->error);
	if (ack->last_error[0] != '\0')
		ps->error = i_strdup(str_sanitize(ack->last_error, 200));
	acks_take_troubles(peer, ps, ack);
	if (dovetail_queue_id_cmp(&applied, &ps->applied) < 0) {
		/* A replica that lost its state. It will catch up. */
		return;
	}
	ps->applied = applied;
	ps->applied_usecs = ack->applied_time_usecs;
	dovetail_queue_log_applied(log, peer, ack);
}

static void acks_handle_entry(struct dovetail_queue *queue, const char *id,
			      const void *entry, size_t size)
{
	struct dovetail_open_expect expect;
	struct dovetail_opened opened;
	struct dovetail_queue_peer *peer;
	struct dovetail_ack ack;
	enum dovetail_open_ret ret;
	buffer_t *payload = t_buffer_create(256);
	const char *error;

	i_zero(&expect);
	expect.kind = DOVETAIL_ENTRY_ACK;
	ret = dovetail_open(queue->keyring, &expect, entry, size, payload,
			    &opened, &error);
	if (ret != DOVETAIL_OPEN_OK) {
		acks_rejected(queue, acks_claimed_peer(queue, entry, size),
			      ret, dovetail_open_ret_name(ret), id, error);
		return;
	}
	peer = acks_find_peer(queue, opened.origin->node);
	if (peer == NULL) {
		/* our own key */
		acks_rejected(queue, NULL, DOVETAIL_OPEN_WRONG_ORIGIN,
			      dovetail_open_ret_name(DOVETAIL_OPEN_WRONG_ORIGIN),
			      id, "It is not sealed by a peer");
		return;
	}
	if (opened.head.shard >= queue->logs_count) {
		acks_rejected(queue, peer, ACK_BAD_SHARD, "wrong-shard", id,
			      t_strdup_printf("It is about shard %u of %u, but "
				"dovetail_shards is %u here (it must be the "
				"same on all nodes)", opened.head.shard,
				opened.head.shards, queue->logs_count));
		return;
	}
	if (dovetail_ack_decode(pool_datastack_create(), payload->data,
				payload->used, &ack, &error) < 0) {
		acks_rejected(queue, peer, ACK_BAD_CONTENT, "malformed-report",
			      id, error);
		return;
	}
	acks_handle_ack(queue, peer, &opened.head, &ack, id);
}

static struct dovetail_queue_id acks_last_id(struct dovetail_queue *queue)
{
	struct dovetail_queue_id id;

	if (dovetail_queue_id_parse(queue->acks_last_id,
				    strlen(queue->acks_last_id), &id) < 0)
		i_zero(&id);
	return id;
}

/* Entries of one stream: [[id, [field, value, ...]], ...]
   Returns FALSE when Redis gave what we had read, as it would never do. */
static bool acks_handle_entries(struct dovetail_queue *queue,
				const struct redisReply *entries)
{
	const struct redisReply *entry, *fields;
	struct dovetail_queue_id before = acks_last_id(queue), last;
	size_t i, j;

	if (entries->type != REDIS_REPLY_ARRAY)
		return FALSE;
	for (i = 0; i < entries->elements; i++) {
		entry = entries->element[i];
		if (entry->type != REDIS_REPLY_ARRAY || entry->elements != 2 ||
		    entry->element[0]->type != REDIS_REPLY_STRING ||
		    dovetail_queue_id_parse(entry->element[0]->str,
					    entry->element[0]->len, &last) < 0)
			continue;
		i_free(queue->acks_last_id);
		queue->acks_last_id = i_strdup(entry->element[0]->str);
		fields = entry->element[1];
		if (fields->type != REDIS_REPLY_ARRAY)
			continue;
		for (j = 0; j + 1 < fields->elements; j += 2) T_BEGIN {
			if (fields->element[j]->type == REDIS_REPLY_STRING &&
			    fields->element[j + 1]->type == REDIS_REPLY_STRING &&
			    strcmp(fields->element[j]->str, "e") == 0) {
				acks_handle_entry(queue, queue->acks_last_id,
						  fields->element[j + 1]->str,
						  fields->element[j + 1]->len);
			}
		} T_END;
	}
	last = acks_last_id(queue);
	return dovetail_queue_id_cmp(&last, &before) > 0;
}

/* It is of no use any more; the replicas report again soon. */
static void acks_delete_stream(struct dovetail_queue *queue, const char *error)
{
	acks_rejected(queue, NULL, ACK_BAD_STREAM, "bad-stream", "-",
		      t_strdup_printf("%s: Deleting the stream", error));
	dovetail_redis_commandl(queue->acks_redis, NULL, NULL, "DEL",
				queue->acks_key, NULL);
	i_free(queue->acks_last_id);
	queue->acks_last_id = i_strdup("0-0");
	/* not at once, for the case that it cannot be deleted */
	queue->acks_retry = TRUE;
}

static bool acks_id_is_too_large(const char *id_str)
{
	struct dovetail_queue_id id;

	return dovetail_queue_id_parse(id_str, strlen(id_str), &id) == 0 &&
		id.generation >= ACKS_ID_MAX_MSECS;
}

static void acks_read_reply(struct redisReply *reply, void *context)
{
	struct dovetail_queue *queue = context;
	bool progress = FALSE;

	if (reply == NULL)
		return;
	if (reply->type == REDIS_REPLY_ERROR &&
	    str_begins_with(reply->str, "WRONGTYPE")) {
		acks_delete_stream(queue, "Something else stands in its place");
		return;
	}
	if (reply->type == REDIS_REPLY_ERROR) {
		acks_rejected(queue, NULL, ACK_READ_FAILED, "xread-failed", "-",
			      t_strdup_printf("XREAD failed: %s", str_sanitize(
				t_strndup(reply->str, reply->len), 200)));
		/* The tick tries again. */
		queue->acks_retry = TRUE;
		return;
	}
	if (reply->type == REDIS_REPLY_NIL) {
		/* nothing came in time, which is long for replicas that live:
		   is it still the stream we know? */
		acks_check_end(queue);
		return;
	}
	if (reply->type == REDIS_REPLY_ARRAY && reply->elements == 1 &&
	    reply->element[0]->type == REDIS_REPLY_ARRAY &&
	    reply->element[0]->elements == 2 &&
	    acks_handle_entries(queue, reply->element[0]->element[1]))
		progress = TRUE;
	if (acks_id_is_too_large(queue->acks_last_id)) {
		acks_delete_stream(queue, t_strdup_printf(
			"After entry %s there is no room",
			str_sanitize(queue->acks_last_id, 50)));
	} else if (progress)
		acks_read(queue);
	else
		queue->acks_retry = TRUE;
	dovetail_queue_conns_flush(queue);
}

static void acks_read(struct dovetail_queue *queue)
{
	queue->acks_retry = FALSE;
	dovetail_redis_commandl(queue->acks_redis, acks_read_reply, queue,
				"XREAD", "COUNT", ACKS_BATCH,
				"BLOCK", ACKS_BLOCK_MSECS,
				"STREAMS", queue->acks_key, queue->acks_last_id,
				NULL);
}

/* If the stream now ends before what we have read, it is another one. */
static void acks_last_reply(struct redisReply *reply, void *context)
{
	struct dovetail_queue *queue = context;
	struct dovetail_queue_id last = { 0, 0 }, ours;
	const struct redisReply *entry;

	if (reply == NULL)
		return;
	if (reply->type == REDIS_REPLY_ARRAY && reply->elements == 1) {
		entry = reply->element[0];
		if (entry->type != REDIS_REPLY_ARRAY ||
		    entry->elements == 0 ||
		    entry->element[0]->type != REDIS_REPLY_STRING ||
		    dovetail_queue_id_parse(entry->element[0]->str,
					    entry->element[0]->len, &last) < 0)
			i_zero(&last);
	}
	if (dovetail_queue_id_parse(queue->acks_last_id,
				    strlen(queue->acks_last_id), &ours) < 0 ||
	    dovetail_queue_id_cmp(&last, &ours) < 0) {
		i_free(queue->acks_last_id);
		queue->acks_last_id = i_strdup("0-0");
	}
	acks_read(queue);
}

static void acks_check_end(struct dovetail_queue *queue)
{
	/* its answer makes us read, and two readers are one too many */
	queue->acks_retry = FALSE;
	dovetail_redis_commandl(queue->acks_redis, acks_last_reply, queue,
				"XREVRANGE", queue->acks_key, "+", "-",
				"COUNT", "1", NULL);
}

static void acks_redis_ready(void *context)
{
	acks_check_end(context);
}

void dovetail_queue_acks_tick(struct dovetail_queue *queue)
{
	if (queue->acks_redis != NULL && queue->acks_retry &&
	    dovetail_redis_is_ready(queue->acks_redis))
		acks_read(queue);
}

void dovetail_queue_acks_start(struct dovetail_queue *queue)
{
	static const struct dovetail_redis_callbacks callbacks = {
		.ready = acks_redis_ready,
	};

	if (queue->acks_redis != NULL)
		return;
	queue->acks_key = i_strdup_printf("%sack:%s", queue->set.redis.prefix,
					  queue->set.node);
	queue->acks_last_id = i_strdup("0-0");
	queue->acks_redis =
		dovetail_redis_init(queue->event, &queue->set.redis,
				    queue->password, queue->tls,
				    ACKS_TIMEOUT_MSECS,
				    &callbacks, queue);
}

void dovetail_queue_acks_stop(struct dovetail_queue *queue)
{
	dovetail_redis_deinit(&queue->acks_redis);
	i_free(queue->acks_key);
	i_free(queue->acks_last_id);
}
