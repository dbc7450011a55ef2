/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "array.h"
#include "buffer.h"
#include "ioloop.h"
#include "llist.h"
#include "priorityq.h"
#include "str-sanitize.h"
#include "time-util.h"
#include "dovetail-compat.h"
#include "dovetail-queue-private.h"

#include <hiredis/hiredis.h>

/* Trimming frees memory in Redis and nobody waits for it. */
#define TRIM_INTERVAL_MSECS 200
#define TRIM_NOW_BYTES (1024 * 1024)
/* no mail process waits longer: see dovetail_ack_timeout */
#define APPLIED_WAIT_MAX_SECS 60
/* Somebody else's doing. Above this a generation could not grow for ever. */
#define GENERATION_MAX (1ULL << 62)
#define GROUP_ATTEMPTS_MAX 3
#define EPOCH_FIRST 1
/* a payload buffer or entry buffer that has grown beyond is not kept */
#define BUFFER_KEEP_SIZE (1024 * 1024)

static void log_sync(struct dovetail_queue_log *log);

static struct dovetail_queue_id chain_id(const struct dovetail_chain *chain)
{
	struct dovetail_queue_id id = {
		.generation = chain->generation,
		.seq = chain->seq,
	};
	return id;
}

static const char *id_str(const struct dovetail_queue_id *id)
{
	return t_strdup_printf("%"PRIu64"-%"PRIu64, id->generation, id->seq);
}

/* Log an error when it is a new one; NULL: it works. */
static void log_set_error(struct dovetail_queue_log *log, char **error,
			  const char *what, const char *text)
{
	if (text == NULL) {
		if (*error != NULL)
			e_info(log->event, "%s works again", what);
		i_free(*error);
		return;
	}
	text = str_sanitize(text, 200);
	if (null_strcmp(*error, text) == 0)
		return;
	i_free(*error);
	*error = i_strdup(text);
	e_error(event_create_passthrough(log->event)->
		add_str("error", text)->event(),
		"%s failed: %s", what, text);
}

static void log_set_state(struct dovetail_queue_log *log,
			  enum dovetail_queue_log_state state)
{
	/* since when it is READY, or not READY */
	if ((log->state == DOVETAIL_QUEUE_LOG_READY) !=
	    (state == DOVETAIL_QUEUE_LOG_READY))
		log->state_since = dovetail_monotonic_usecs();
	log->state = state;
}

/* ---- groups ---- */

static struct dovetail_queue_group *group_new(struct dovetail_queue_log *log)
{
	struct dovetail_queue_group *group;

	group = i_new(struct dovetail_queue_group, 1);
	group->log = log;
	group->payload = buffer_create_dynamic(default_pool, 1024);
	i_array_init(&group->positions, 4);
	return group;
}

static void group_free(struct dovetail_queue_group *group)
{
	struct dovetail_queue *queue = group->log->queue;

	i_assert(group->waiters_head == NULL);
	i_assert(queue->pending_bytes >= group->payload->used);

	queue->pending_bytes -= group->payload->used;
	buffer_free(&group->payload);
	array_free(&group->positions);
	i_free(group);
	dovetail_queue_conns_resume(queue);
}

static void
group_positions_done(struct dovetail_queue_group *group, bool stored)
{
	const struct dovetail_queue_position_change *change;

	array_foreach(&group->positions, change) {
		dovetail_queue_positions_done(group->log->queue->positions,
					      change, group, stored);
	}
}

static void group_fail_waiters(struct dovetail_queue_group *group,
			       const char *text)
{
	struct dovetail_queue_waiter *waiter;

	while ((waiter = group->waiters_head) != NULL) {
		DLLIST2_REMOVE(&group->waiters_head, &group->waiters_tail,
			       waiter);
		dovetail_queue_waiter_answer(&waiter,
			DOVETAIL_REPLY_UNAVAILABLE, text);
	}
}

/* It is certainly not in the stream, or will not be looked for. */
static void group_failed(struct dovetail_queue_group *group, const char *text)
{
	group_positions_done(group, FALSE);
	group_fail_waiters(group, text);
	group_free(group);
}

static void groups_fail(struct dovetail_queue_log *log, const char *text)
{
	struct dovetail_queue_group *group;

	if (log->inflight != NULL && !log->inflight->abandoned) {
		/* may yet turn out to be stored */
		log->inflight->abandoned = TRUE;
		group_fail_waiters(log->inflight, text);
	}
	while ((group = log->groups_head) != NULL) {
		DLLIST2_REMOVE(&log->groups_head, &log->groups_tail, group);
		group_failed(group, text);
	}
}

void dovetail_queue_log_append(struct dovetail_queue_log *log,
			       const void *change, size_t size,
			       const struct dovetail_queue_position_change *position,
			       struct dovetail_queue_waiter *waiter)
{
	struct dovetail_queue *queue = log->queue;
	struct dovetail_queue_group *group = log->groups_tail;
	size_t used;

	if (group == NULL ||
	    (group->payload->used > 0 &&
	     group->payload->used + size > DOVETAIL_GROUP_SPLIT_SIZE)) {
		group = group_new(log);
		DLLIST2_APPEND(&log->groups_head, &log->groups_tail, group);
	}
	used = group->payload->used;
	dovetail_wire_put_bytes(group->payload, change, size);
	queue->pending_bytes += group->payload->used - used;

	waiter->ordinal = group->changes++;
	DLLIST2_APPEND(&group->waiters_head, &group->waiters_tail, waiter);
	if (position != NULL) {
		array_push_back(&group->positions, position);
		dovetail_queue_positions_pending(queue->positions, position,
						 group);
	}
}

/* ---- what replicas have ---- */

static bool
peer_has(const struct dovetail_queue_log *log,
	 const struct dovetail_queue_peer *peer,
	 const struct dovetail_queue_id *id)
{
	const struct dovetail_queue_peer_shard *ps = &peer->shards[log->shard];

	return ps->received != 0 && dovetail_queue_id_cmp(id, &ps->applied) <= 0;
}

/* What every peer has. */
static struct dovetail_queue_id
log_confirmed(const struct dovetail_queue_log *log)
{
	const struct dovetail_queue *queue = log->queue;
	struct dovetail_queue_id id = { 0, 0 };
	unsigned int i;

	for (i = 0; i < queue->peers_count; i++) {
		const struct dovetail_queue_id *applied =
			&queue->peers[i].shards[log->shard].applied;

		if (i == 0 || dovetail_queue_id_cmp(applied, &id) < 0)
			id = *applied;
	}
	return id;
}

/* The bits of the peers that have reported anything of this shard. */
static uint64_t log_known_peers(const struct dovetail_queue_log *log)
{
	const struct dovetail_queue *queue = log->queue;
	uint64_t mask = 0;
	unsigned int i;

	for (i = 0; i < queue->peers_count; i++) {
		if (queue->peers[i].shards[log->shard].received != 0)
			mask |= 1ULL << queue->peers[i].idx;
	}
	return mask;
}

static bool
waiter_is_applied(const struct dovetail_queue_log *log,
		  const struct dovetail_queue_waiter *waiter)
{
	const struct dovetail_queue *queue = log->queue;
	unsigned int i;

	for (i = 0; i < queue->peers_count; i++) {
		if ((waiter->failed_peers & (1ULL << queue->peers[i].idx)) == 0 &&
		    peer_has(log, &queue->peers[i], &waiter->id))
			return TRUE;
	}
	return FALSE;
}

static bool
ack_has_failed(const struct dovetail_ack *ack,
	       const struct dovetail_queue_waiter *waiter)
{
	unsigned int i;

	for (i = 0; i < ack->failed_count; i++) {
		const struct dovetail_ack_failed *failed = &ack->failed[i];
		struct dovetail_queue_id id = {
			.generation = failed->generation,
			.seq = failed->seq,
		};
		int ret = dovetail_queue_id_cmp(&waiter->id, &id);

		if (failed->ordinal == DOVETAIL_ACK_UP_TO ? ret <= 0 :
		    ret == 0 && (waiter->ordinal == UINT_MAX ||
				 waiter->ordinal == failed->ordinal))
			return TRUE;
	}
	return FALSE;
}

/* The waiter is in *head; ack has its entry. */
static void
waiter_reported(struct dovetail_queue_log *log,
		struct dovetail_queue_waiter **head,
		struct dovetail_queue_waiter **tail,
		struct dovetail_queue_waiter *waiter,
		const struct dovetail_queue_peer *peer,
		const struct dovetail_ack *ack)
{
	uint64_t bit = 1ULL << peer->idx;
	enum dovetail_reply reply = DOVETAIL_REPLY_OK;
	const char *text = "";

	if ((waiter->failed_peers & bit) != 0)
		return;
	if (ack_has_failed(ack, waiter)) {
		waiter->failed_peers |= bit;
		if ((log_known_peers(log) & ~waiter->failed_peers) != 0) {
			/* another one may be luckier */
			return;
		}
		reply = DOVETAIL_REPLY_NOT_APPLIED;
		text = ack->last_error[0] == '\0' ?
			"The replica could not apply it" :
			str_sanitize(ack->last_error, 200);
	}
	DLLIST2_REMOVE(head, tail, waiter);
	if (head == &log->applied_head)
		log->applied_count--;
	dovetail_queue_waiter_answer(&waiter, reply, text);
}

static void log_trim_reply(struct redisReply *reply, void *context)
{
	struct dovetail_queue_log *log = context;

	if (reply == NULL)
		return;
	log_set_error(log, &log->trim_error, "XTRIM",
		      reply->type != REDIS_REPLY_ERROR ? NULL :
		      t_strndup(reply->str, reply->len));
}

static void log_trim(struct dovetail_queue_log *log)
{
	struct dovetail_queue_id minid = log_confirmed(log);
	struct dovetail_queue_id last = chain_id(&log->stored);

	if (log->state != DOVETAIL_QUEUE_LOG_READY ||
	    log->trimmable_bytes == 0 ||
	    (log->trimmable_bytes < TRIM_NOW_BYTES &&
	     dovetail_monotonic_usecs() - log->last_trim <
	     TRIM_INTERVAL_MSECS * 1000ULL))
		return;

	minid.seq++;
	/* The last entry stays: it shows where the stream ends. */
	if (dovetail_queue_id_cmp(&minid, &last) > 0)
		minid = last;
	log->trimmable_bytes = 0;
	log->last_trim = dovetail_monotonic_usecs();
	if (dovetail_queue_id_cmp(&minid, &log->trimmed) <= 0)
		return;
	log->trimmed = minid;
	dovetail_redis_commandl(log->queue->redis, log_trim_reply, log,
				"XTRIM", log->key, "MINID", id_str(&minid),
				NULL);
}

static void log_confirm(struct dovetail_queue_log *log)
{
	struct dovetail_queue_id id = log_confirmed(log);

	log->trimmable_bytes +=
		dovetail_queue_backlog_confirm(log->backlog, &id);
	dovetail_queue_check_full(log->queue);
	log_trim(log);
}

void dovetail_queue_log_applied(struct dovetail_queue_log *log,
				struct dovetail_queue_peer *peer,
				const struct dovetail_ack *ack)
{
	struct dovetail_queue_id id = {
		.generation = ack->generation,
		.seq = ack->seq,
	};
	struct dovetail_queue_waiter *waiter, *next;
	struct dovetail_queue_group *group = log->inflight;

	for (waiter = log->applied_head; waiter != NULL; waiter = next) {
		next = waiter->next;
		if (dovetail_queue_id_cmp(&waiter->id, &id) > 0)
			break;
		waiter_reported(log, &log->applied_head, &log->applied_tail,
				waiter, peer, ack);
	}
	if (group != NULL) {
		/* The replica may be faster than Redis' answer to us. */
		for (waiter = group->waiters_head; waiter != NULL;
		     waiter = next) {
			next = waiter->next;
			waiter->id = chain_id(&group->chain);
			if (waiter->level != DOVETAIL_ACK_APPLIED ||
			    dovetail_queue_id_cmp(&waiter->id, &id) > 0)
				continue;
			waiter_reported(log, &group->waiters_head,
					&group->waiters_tail, waiter, peer, ack);
		}
	}
	log_confirm(log);
}

static void applied_add(struct dovetail_queue_log *log,
			struct dovetail_queue_waiter *waiter,
			const struct dovetail_queue_id *id)
{
	waiter->id = *id;
	waiter->stored_secs = dovetail_monotonic_secs();
	if (waiter_is_applied(log, waiter)) {
		dovetail_queue_waiter_answer(&waiter, DOVETAIL_REPLY_OK, "");
		return;
	}
	DLLIST2_APPEND(&log->applied_head, &log->applied_tail, waiter);
	log->applied_count++;
}

/* ---- sending ---- */

static int log_write_state(struct dovetail_queue_log *log)
{
	struct dovetail_queue_state state = {
		.sent = log->sent,
		.stored = log->stored,
	};
	const char *error;

	if (dovetail_queue_state_write(&log->state_file, &state, &error) < 0) {
		log_set_error(log, &log->error, "Writing the log's state",
			      error);
		return -1;
	}
	return 0;
}

static void group_stored(struct dovetail_queue_group *group)
{
	struct dovetail_queue_log *log = group->log;
	struct dovetail_queue_id id = chain_id(&group->chain);
	struct dovetail_queue_waiter *waiter;

	log->stored = group->chain;
	/* Before anybody relies on it: if Redis loses the entry then, the next
	   service must notice. */
	(void)log_write_state(log);
	dovetail_queue_backlog_add(log->backlog, &id, &id, 1,
				   group->entry_size, group->time_usecs);
	group_positions_done(group, TRUE);

	while ((waiter = group->waiters_head) != NULL) {
		DLLIST2_REMOVE(&group->waiters_head, &group->waiters_tail,
			       waiter);
		if (waiter->level == DOVETAIL_ACK_APPLIED)
			applied_add(log, waiter, &id);
		else {
			dovetail_queue_waiter_answer(&waiter,
						     DOVETAIL_REPLY_OK, "");
		}
	}
	group_free(group);
	/* a replica may have it already */
	log_confirm(log);
}

static void group_requeue(struct dovetail_queue_group *group)
{
	struct dovetail_queue_log *log = group->log;

	if (group->abandoned || group->heartbeat ||
	    ++group->attempts >= GROUP_ATTEMPTS_MAX) {
		group_failed(group, "Redis did not take it");
		return;
	}
	DLLIST2_PREPEND(&log->groups_head, &log->groups_tail, group);
}

static void log_xadd_error(struct dovetail_queue_log *log,
			   struct dovetail_queue_group *group,
			   const char *error)
{
	/* It is not in the stream: the chain goes on from the one before. Its
	   number is used up, so a late repetition of it cannot get in. */
	memcpy(log->sent.hash, log->stored.hash, sizeof(log->sent.hash));

	if (strstr(error, "equal or smaller") != NULL ||
	    strstr(error, "last possible ID") != NULL ||
	    str_begins_with(error, "WRONGTYPE")) {
		/* The stream's end is not where we left it. */
		group_requeue(group);
		log_set_state(log, DOVETAIL_QUEUE_LOG_UNKNOWN);
		log_sync(log);
		return;
	}
	log_set_error(log, &log->error, "XADD", error);
	group_failed(group, t_strdup_printf("Redis refused it: %s",
					    str_sanitize(error, 200)));
}

static void log_xadd_reply(struct redisReply *reply, void *context)
{
	struct dovetail_queue_log *log = context;
	struct dovetail_queue_group *group = log->inflight;

	if (reply == NULL) {
		/* Stored or not? The stream says, when Redis is back. */
		return;
	}
	i_assert(group != NULL);
	log->inflight = NULL;
	if (log->stalled) {
		log->stalled = FALSE;
		e_info(log->event, "Redis answers again");
	}
	if (reply->type == REDIS_REPLY_ERROR) {
		log_xadd_error(log, group, t_strndup(reply->str, reply->len));
	} else {
		log_set_error(log, &log->error, "XADD", NULL);
		group_stored(group);
	}
	dovetail_queue_log_kick(log);
	dovetail_queue_users_work(log->queue);
	dovetail_queue_conns_flush(log->queue);
}

static bool group_wants_applied(const struct dovetail_queue_group *group)
{
	const struct dovetail_queue_waiter *waiter;

	for (waiter = group->waiters_head; waiter != NULL;
	     waiter = waiter->next) {
		if (waiter->level == DOVETAIL_ACK_APPLIED)
			return TRUE;
	}
	return FALSE;
}

static void group_send(struct dovetail_queue_group *group)
{
	struct dovetail_queue_log *log = group->log;
	struct dovetail_queue *queue = log->queue;
	struct dovetail_entry_head head;
	struct dovetail_queue_id id;
	struct timeval now;
	const char *argv[5];
	size_t argv_len[5];
	unsigned int i;

	i_gettimeofday(&now);
	i_zero(&head);
	head.kind = DOVETAIL_ENTRY_LOG;
	head.shard = log->shard;
	head.shards = queue->set.shards;
	head.epoch = log->sent.epoch;
	head.generation = log->sent.generation;
	head.seq = log->sent.seq + 1;
	head.time_usecs = timeval_to_usecs(&now);
	memcpy(head.prev, log->sent.hash, sizeof(head.prev));

	buffer_set_used_size(queue->entry_buf, 0);
	dovetail_seal(queue->keyring, queue->recipients,
		      queue->recipients_count, &head, group->payload->data,
		      group->payload->used, queue->entry_buf, log->sent.hash);
	log->sent.seq++;
	group->chain = log->sent;
	group->time_usecs = head.time_usecs;
	group->entry_size = queue->entry_buf->used;
	group->ticks = 0;
	log->last_append = dovetail_monotonic_secs();

	if (log_write_state(log) < 0) {
		/* Without it a restart could use this number twice. */
		memcpy(log->sent.hash, log->stored.hash,
		       sizeof(log->sent.hash));
		group_failed(group, "The queue cannot write its state");
		return;
	}

	id = chain_id(&group->chain);
	argv[0] = "XADD";
	argv[1] = log->key;
	argv[2] = id_str(&id);
	argv[3] = group_wants_applied(group) ? DOVETAIL_ENTRY_FIELD_WAITED :
		DOVETAIL_ENTRY_FIELD;
	for (i = 0; i < 4; i++)
		argv_len[i] = strlen(argv[i]);
	argv[4] = queue->entry_buf->data;
	argv_len[4] = queue->entry_buf->used;

	log->inflight = group;
	dovetail_redis_command(queue->redis, N_ELEMENTS(argv), argv, argv_len,
			       log_xadd_reply, log);

	if (queue->entry_buf->used > BUFFER_KEEP_SIZE) {
		buffer_free(&queue->entry_buf);
		queue->entry_buf = buffer_create_dynamic(default_pool, 4096);
	}
}

void dovetail_queue_log_kick(struct dovetail_queue_log *log)
{
	struct dovetail_queue_group *group;

	while (log->state == DOVETAIL_QUEUE_LOG_READY &&
	       log->inflight == NULL && log->groups_head != NULL &&
	       dovetail_redis_is_ready(log->queue->redis)) {
		group = log->groups_head;
		DLLIST2_REMOVE(&log->groups_head, &log->groups_tail, group);
		T_BEGIN {
			group_send(group);
		} T_END;
	}
}

/* ---- where the stream ends ---- */

/* The backlog is what the stream has; with little asking, it is one run whose
   size is Redis' estimate. Replicas' reports take from it as usual. */
static void log_backlog_rebuild(struct dovetail_queue_log *log)
{
	uint64_t bytes = log->sync.memory;

	dovetail_queue_backlog_clear(log->backlog);
	i_zero(&log->trimmed);
	if (log->sync.length == 0 || !log->sync.have_last)
		return;
	if (bytes == 0)
		bytes = log->sync.length * log->sync.last_size;
	dovetail_queue_backlog_add(log->backlog, &log->sync.first_id,
				   &log->sync.last_id, log->sync.length, bytes,
				   log->sync.first_usecs != 0 ?
				   log->sync.first_usecs :
				   dovetail_queue_now_usecs());
}

static bool log_sync_last_is(const struct dovetail_queue_log *log,
			     const struct dovetail_chain *chain)
{
	struct dovetail_queue_id id = chain_id(chain);

	return log->sync.have_last && log->sync.ours &&
		dovetail_queue_id_cmp(&log->sync.last_id, &id) == 0 &&
		dovetail_queue_id_cmp(&log->sync.end_id, &id) <= 0 &&
		memcmp(log->sync.last_hash, chain->hash,
		       DOVETAIL_HASH_SIZE) == 0;
}

/* Redis has what we know that it has. */
static bool log_sync_is_known(const struct dovetail_queue_log *log)
{
	struct dovetail_queue_id id = chain_id(&log->stored);

	if (id.generation == 0 || id.seq != 0)
		return log_sync_last_is(log, &log->stored);
	/* nothing of the generation was sent: all there may be is older */
	return dovetail_queue_id_cmp(&log->sync.end_id, &id) < 0 &&
		(!log->sync.have_last ||
		 dovetail_queue_id_cmp(&log->sync.last_id, &id) < 0);
}

static void log_new_generation(struct dovetail_queue_log *log)
{
	uint64_t generation = ioloop_time;

	if (generation <= log->sent.generation)
		generation = log->sent.generation + 1;
	if (log->sync.have_last &&
	    generation <= log->sync.last_id.generation)
		generation = log->sync.last_id.generation + 1;
	if (generation <= log->sync.end_id.generation)
		generation = log->sync.end_id.generation + 1;
	log->sent.generation = generation;
	log->sent.seq = 0;
	memcpy(log->sent.hash, log->stored.hash, sizeof(log->sent.hash));
	log->stored = log->sent;
}

/* Our state, what Redis had, and the time that a generation is made of are lost: a
   machine without power. The peer waits for entries behind the one it has, and
   would not see ours. If something is on its way, its next report comes soon. */
void dovetail_queue_log_behind(struct dovetail_queue_log *log,
			       uint64_t generation)
{
	if (generation >= GENERATION_MAX ||
	    generation < log->sent.generation || log->inflight != NULL ||
	    log->state != DOVETAIL_QUEUE_LOG_READY)
		return;
	e_warning(log->event, "A replica has entries of generation "
		  "%"PRIu64", which is not known here: Starting a new one",
		  generation);
	log->sent.generation = generation;
	log_new_generation(log);
}

static void log_sync_surprise(struct dovetail_queue_log *log)
{
	struct dovetail_queue_id had = chain_id(&log->stored);
	struct dovetail_queue_id confirmed = log_confirmed(log);

	if (!log->state_valid && !log->synced_once) {
		if (!log->sync.have_last && !log->sync.deleted) {
			/* the first start */
			return;
		}
		e_warning(log->event, "The state of the log is lost, Redis has "
			  "entries up to %s: Starting a new generation",
			  id_str(&log->sync.last_id));
	} else if (dovetail_queue_id_cmp(&had, &confirmed) > 0 ||
		   !log->synced_once) {
		e_warning(event_create_passthrough(log->event)->
			  add_str("last_sent", id_str(&had))->event(),
			  "The last entry sent was %s, but Redis has %s: "
			  "Starting a new generation. What is missing the "
			  "replicas will ask for",
			  id_str(&had), !log->sync.have_last ? "none" :
			  id_str(&log->sync.last_id));
	} else {
		e_info(log->event, "Redis has lost or changed entries that all "
		       "replicas had: Starting a new generation");
	}
}

static void log_sync_delete_reply(struct redisReply *reply, void *context)
{
	struct dovetail_queue_log *log = context;

	if (reply == NULL)
		return;
	if (reply->type == REDIS_REPLY_ERROR) {
		log_set_error(log, &log->error, "DEL",
			      t_strndup(reply->str, reply->len));
		log_set_state(log, DOVETAIL_QUEUE_LOG_UNKNOWN);
		return;
	}
	log_sync(log);
	log->sync.deleted = TRUE;
}

static void log_sync_delete(struct dovetail_queue_log *log)
{
	dovetail_redis_commandl(log->queue->redis, log_sync_delete_reply, log,
				"DEL", log->key, NULL);
}

/* What the process before us sent last may have arrived without its noticing, or
   never, in which case nobody was told that it had. */
static void log_sync_unsure(struct dovetail_queue_log *log)
{
	if (log_sync_last_is(log, &log->sent)) {
		log->stored = log->sent;
		return;
	}
	if (log_sync_is_known(log)) {
		e_info(log->event, "The last entry sealed before the service "
		       "ended is not in Redis: The users it was about are "
		       "swept");
		/* its number is used up: it may come still */
		log_new_generation(log);
		return;
	}
	/* what is missing shows in the next entry */
	log->stored = log->sent;
}

static void log_synced(struct dovetail_queue_log *log)
{
	struct dovetail_queue_group *group = log->inflight;
	bool as_known;

	if (log->sync.have_last &&
	    log->sync.last_id.generation >= GENERATION_MAX) {
		e_error(log->event, "Somebody added entry %s to stream %s, "
			"after which there is no room: Deleting the stream",
			id_str(&log->sync.last_id), log->key);
		log_sync_delete(log);
		return;
	}
	if (log->sync.end_id.generation >= GENERATION_MAX) {
		e_error(log->event, "Somebody set the end of stream %s to %s, "
			"after which there is no room: Deleting the stream",
			log->key, id_str(&log->sync.end_id));
		log_sync_delete(log);
		return;
	}

	if (group != NULL && log_sync_last_is(log, &group->chain)) {
		log->inflight = NULL;
		group_stored(group);
		group = NULL;
	}
	if (!log->synced_once && log->state_valid)
		log_sync_unsure(log);
	as_known = log_sync_is_known(log);
	if (group != NULL) {
		/* Sent, and it did not arrive, or not yet. Its ID must stay
		   behind, so that it cannot arrive later. */
		log->inflight = NULL;
		group_requeue(group);
		if (!as_known)
			log_sync_surprise(log);
		log_new_generation(log);
	} else if (!as_known) {
		log_sync_surprise(log);
		log_new_generation(log);
	}
	if (!as_known || !log->synced_once || log->stored.seq == 0)
		log_backlog_rebuild(log);

	log->synced_once = TRUE;
	log->stalled = FALSE;
	log_set_error(log, &log->error, "Reading the log's end", NULL);
	log_set_state(log, DOVETAIL_QUEUE_LOG_READY);
	log_confirm(log);
	dovetail_queue_log_synced(log->queue);
	dovetail_queue_log_kick(log);
	dovetail_queue_users_work(log->queue);
	dovetail_queue_conns_flush(log->queue);
}

/* The only entry in an answer of X[REV]RANGE ... COUNT 1. Returns 1, 0 when
   there is none, -1 when the answer is something else. */
static int
reply_get_entry(const struct redisReply *reply, struct dovetail_queue_id *id_r,
		const void **data_r, size_t *size_r)
{
	const struct redisReply *entry, *fields;

	*data_r = "";
	*size_r = 0;
	if (reply->type != REDIS_REPLY_ARRAY)
		return -1;
	if (reply->elements == 0)
		return 0;
	entry = reply->element[0];
	if (entry->type != REDIS_REPLY_ARRAY || entry->elements != 2 ||
	    entry->element[0]->type != REDIS_REPLY_STRING ||
	    entry->element[1]->type != REDIS_REPLY_ARRAY ||
	    dovetail_queue_id_parse(entry->element[0]->str,
				    entry->element[0]->len, id_r) < 0)
		return -1;
	fields = entry->element[1];
	if (fields->elements == 2 &&
	    fields->element[0]->type == REDIS_REPLY_STRING &&
	    fields->element[1]->type == REDIS_REPLY_STRING) {
		*data_r = fields->element[1]->str;
		*size_r = fields->element[1]->len;
	}
	return 1;
}

/* Returns TRUE when it is an entry of this log, with the ID it stands at. */
static bool
log_entry_is_ours(struct dovetail_queue_log *log, const void *data, size_t size,
		  const struct dovetail_queue_id *id,
		  struct dovetail_opened *opened_r)
{
	const char *error;

	return dovetail_open_own(log->queue->keyring, data, size, opened_r,
				 &error) == 0 &&
		opened_r->head.kind == DOVETAIL_ENTRY_LOG &&
		opened_r->head.shard == log->shard &&
		opened_r->head.generation == id->generation &&
		opened_r->head.seq == id->seq;
}

static void log_sync_failed(struct dovetail_queue_log *log,
			    const struct redisReply *reply)
{
	log->sync.failed = TRUE;
	log_set_error(log, &log->error, "Reading the log's end",
		      reply->type == REDIS_REPLY_ERROR ?
		      t_strndup(reply->str, reply->len) :
		      "Unexpected answer");
}

static void log_sync_last_reply(struct redisReply *reply, void *context)
{
	struct dovetail_queue_log *log = context;
	struct dovetail_opened opened;
	const void *data;
	size_t size;
	int ret;

	if (reply == NULL)
		return;
	if (reply->type == REDIS_REPLY_ERROR &&
	    str_begins_with(reply->str, "WRONGTYPE")) {
		log->sync.no_stream = TRUE;
		return;
	}
	ret = reply_get_entry(reply, &log->sync.last_id, &data, &size);
	if (ret < 0) {
		log_sync_failed(log, reply);
		return;
	}
	if (ret == 0)
		return;
	log->sync.have_last = TRUE;
	log->sync.last_size = size;
	if (log_entry_is_ours(log, data, size, &log->sync.last_id, &opened)) {
		log->sync.ours = TRUE;
		memcpy(log->sync.last_hash, opened.hash, DOVETAIL_HASH_SIZE);
	}
}

static void log_sync_first_reply(struct redisReply *reply, void *context)
{
	struct dovetail_queue_log *log = context;
	struct dovetail_opened opened;
	const void *data;
	size_t size;

	if (reply == NULL ||
	    reply_get_entry(reply, &log->sync.first_id, &data, &size) <= 0)
		return;
	if (log_entry_is_ours(log, data, size, &log->sync.first_id, &opened))
		log->sync.first_usecs = opened.head.time_usecs;
}

static void log_sync_info_reply(struct redisReply *reply, void *context)
{
	struct dovetail_queue_log *log = context;
	const struct redisReply *key, *value;
	size_t i;

	/* there may be no stream */
	if (reply == NULL || reply->type != REDIS_REPLY_ARRAY)
		return;
	for (i = 0; i + 1 < reply->elements; i += 2) {
		key = reply->element[i];
		value = reply->element[i + 1];
		if (key->type == REDIS_REPLY_STRING &&
		    strcmp(key->str, "last-generated-id") == 0 &&
		    (value->type != REDIS_REPLY_STRING ||
		     dovetail_queue_id_parse(value->str, value->len,
					     &log->sync.end_id) < 0))
			i_zero(&log->sync.end_id);
	}
}

static void log_sync_length_reply(struct redisReply *reply, void *context)
{
	struct dovetail_queue_log *log = context;

	if (reply != NULL && reply->type == REDIS_REPLY_INTEGER &&
	    reply->integer > 0)
		log->sync.length = reply->integer;
}

static void log_sync_memory_reply(struct redisReply *reply, void *context)
{
	struct dovetail_queue_log *log = context;

	if (reply == NULL)
		return;
	/* the command may be forbidden, the stream may not exist */
	if (reply->type == REDIS_REPLY_INTEGER && reply->integer > 0)
		log->sync.memory = reply->integer;
	if (log->sync.no_stream) {
		e_error(log->event, "Somebody put something else in the place "
			"of stream %s: Deleting it", log->key);
		log_sync_delete(log);
		return;
	}
	if (log->sync.failed) {
		/* tried again with the next tick */
		log_set_state(log, DOVETAIL_QUEUE_LOG_UNKNOWN);
		return;
	}
	log_synced(log);
}

/* Ask for the stream's end. The answers come in order, the last one decides. */
static void log_sync(struct dovetail_queue_log *log)
{
	struct dovetail_redis *redis = log->queue->redis;

	if (!dovetail_redis_is_ready(redis))
		return;
	i_zero(&log->sync);
	log_set_state(log, DOVETAIL_QUEUE_LOG_SYNCING);
	dovetail_redis_commandl(redis, log_sync_last_reply, log, "XREVRANGE",
				log->key, "+", "-", "COUNT", "1", NULL);
	dovetail_redis_commandl(redis, log_sync_first_reply, log, "XRANGE",
				log->key, "-", "+", "COUNT", "1", NULL);
	dovetail_redis_commandl(redis, log_sync_info_reply, log, "XINFO",
				"STREAM", log->key, NULL);
	dovetail_redis_commandl(redis, log_sync_length_reply, log, "XLEN",
				log->key, NULL);
	dovetail_redis_commandl(redis, log_sync_memory_reply, log, "MEMORY",
				"USAGE", log->key, "SAMPLES", "16", NULL);
}

void dovetail_queue_log_redis_ready(struct dovetail_queue_log *log)
{
	log_sync(log);
}

void dovetail_queue_log_redis_lost(struct dovetail_queue_log *log)
{
	log_set_state(log, DOVETAIL_QUEUE_LOG_UNKNOWN);
}

/* ---- the clock ---- */

const char *dovetail_queue_log_unavailable(struct dovetail_queue_log *log)
{
	struct dovetail_queue *queue = log->queue;
	const char *error;

	if (log->state != DOVETAIL_QUEUE_LOG_READY) {
		if (dovetail_monotonic_usecs() - log->state_since <
		    DOVETAIL_QUEUE_GRACE_MSECS * 1000ULL)
			return NULL;
		error = queue->redis == NULL ? NULL :
			dovetail_redis_last_error(queue->redis);
		if (error == NULL)
			error = log->error;
		return t_strconcat("Redis is not available",
				   error == NULL ? NULL : ": ", error, NULL);
	}
	if (log->stalled)
		return "Redis does not answer";
	if (queue->full)
		return "The queue is full: too much is not confirmed by a replica";
	return NULL;
}

static void log_check_stalled(struct dovetail_queue_log *log)
{
	unsigned int msecs = I_MAX(log->queue->set.ack_timeout_msecs,
				   DOVETAIL_QUEUE_GRACE_MSECS);

	/* not the clock: if we were busy or stopped, the answer is there */
	if (log->stalled || log->inflight == NULL ||
	    ++log->inflight->ticks <= msecs / DOVETAIL_QUEUE_TICK_MSECS)
		return;
	log->stalled = TRUE;
	e_error(log->event, "Redis has not answered for %u ms: "
		"Changes are left to be read from the mailboxes later", msecs);
	groups_fail(log, "Redis does not answer");
}

static void log_heartbeat(struct dovetail_queue_log *log)
{
	struct dovetail_queue *queue = log->queue;
	struct dovetail_queue_group *group;
	struct dovetail_change change;
	time_t now = dovetail_monotonic_secs();
	buffer_t *buf;
	unsigned int i, secs = DOVETAIL_QUEUE_HEARTBEAT_ALONE_SECS;

	if (log->inflight != NULL || log->groups_head != NULL || queue->full ||
	    queue->stopping)
		return;
	for (i = 0; i < queue->peers_count; i++) {
		if (queue->peers[i].received != 0 &&
		    now - queue->peers[i].received < (time_t)secs) {
			secs = DOVETAIL_QUEUE_HEARTBEAT_SECS;
			break;
		}
	}
	if (now - log->last_append < (time_t)secs)
		return;

	i_zero(&change);
	change.kind = DOVETAIL_CHANGE_HEARTBEAT;
	change.user = "";
	buf = t_buffer_create(16);
	dovetail_change_encode(buf, &change);

	group = group_new(log);
	group->heartbeat = TRUE;
	group->changes = 1;
	dovetail_wire_put_bytes(group->payload, buf->data, buf->used);
	queue->pending_bytes += group->payload->used;
	DLLIST2_APPEND(&log->groups_head, &log->groups_tail, group);
	dovetail_queue_log_kick(log);
}

static void log_applied_expire(struct dovetail_queue_log *log)
{
	struct dovetail_queue_waiter *waiter;
	time_t now = dovetail_monotonic_secs();

	while ((waiter = log->applied_head) != NULL &&
	       now - waiter->stored_secs > APPLIED_WAIT_MAX_SECS) {
		DLLIST2_REMOVE(&log->applied_head, &log->applied_tail, waiter);
		log->applied_count--;
		dovetail_queue_waiter_answer(&waiter,
			DOVETAIL_REPLY_NOT_APPLIED,
			"No replica has applied it in time");
	}
}

void dovetail_queue_log_tick(struct dovetail_queue_log *log)
{
	const char *reason;

	switch (log->state) {
	case DOVETAIL_QUEUE_LOG_UNKNOWN:
		if (log->queue->redis != NULL)
			log_sync(log);
		/* fall through */
	case DOVETAIL_QUEUE_LOG_SYNCING:
		reason = dovetail_queue_log_unavailable(log);
		if (reason != NULL)
			groups_fail(log, reason);
		break;
	case DOVETAIL_QUEUE_LOG_READY:
		log_check_stalled(log);
		log_heartbeat(log);
		log_trim(log);
		break;
	}
	log_applied_expire(log);
}

bool dovetail_queue_log_is_idle(const struct dovetail_queue_log *log)
{
	return log->groups_head == NULL &&
		(log->inflight == NULL || log->inflight->abandoned);
}

/* ---- begin and end ---- */

int dovetail_queue_log_init(struct dovetail_queue *queue,
			    struct dovetail_queue_log *log, unsigned int shard,
			    const char **error_r)
{
	struct dovetail_queue_state state;
	const char *path;

	log->queue = queue;
	log->shard = shard;
	log->event = event_create(queue->event);
	event_add_int(log->event, "shard", shard);
	event_set_append_log_prefix(log->event,
				    t_strdup_printf("log %u: ", shard));
	log->key = i_strdup_printf("%slog:%s:%u", queue->set.redis.prefix,
				   queue->set.node, shard);
	log->backlog =
		dovetail_queue_backlog_init(DOVETAIL_QUEUE_BACKLOG_RUNS);
	log->state_since = dovetail_monotonic_usecs();
	log->last_append = dovetail_monotonic_secs();

	path = t_strdup_printf("%s/log.%u", queue->set.state_dir, shard);
	if (dovetail_queue_state_open(path, &log->state_file, &state,
				      &log->state_valid, error_r) < 0)
		return -1;
	log->sent = state.sent;
	log->stored = state.stored;
	if (log->sent.epoch < EPOCH_FIRST)
		log->sent.epoch = log->stored.epoch = EPOCH_FIRST;
	return 0;
}

void dovetail_queue_log_deinit(struct dovetail_queue_log *log)
{
	struct dovetail_queue_waiter *waiter;

	if (log->queue == NULL)
		return;
	groups_fail(log, "The queue is shutting down");
	if (log->inflight != NULL) {
		group_positions_done(log->inflight, FALSE);
		group_free(log->inflight);
		log->inflight = NULL;
	}
	while ((waiter = log->applied_head) != NULL) {
		DLLIST2_REMOVE(&log->applied_head, &log->applied_tail, waiter);
		dovetail_queue_waiter_answer(&waiter,
			DOVETAIL_REPLY_NOT_APPLIED,
			"The queue is shutting down");
	}
	dovetail_queue_backlog_deinit(&log->backlog);
	dovetail_queue_state_close(&log->state_file);
	i_free(log->error);
	i_free(log->trim_error);
	i_free(log->key);
	event_unref(&log->event);
}
