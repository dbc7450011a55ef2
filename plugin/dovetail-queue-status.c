/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "array.h"
#include "buffer.h"
#include "hash.h"
#include "ioloop.h"
#include "priorityq.h"
#include "str.h"
#include "dovetail-queue-private.h"

#include <time.h>

/* The keys are listed in dovetail-frame.h. */

/* of a peer; there are fewer, and what a worker says has to fit into a frame */
#define STATUS_REASONS_MAX 64

struct row {
	buffer_t *buf;
	unsigned int fields;
};

static void row_init(struct row *row)
{
	row->buf = t_buffer_create(512);
	row->fields = 0;
}

static void row_add(struct row *row, const char *key, const char *value)
{
	dovetail_wire_put_str(row->buf, key);
	dovetail_wire_put_str(row->buf, value);
	row->fields++;
}

static void row_add_num(struct row *row, const char *key, uint64_t num)
{
	row_add(row, key, t_strdup_printf("%"PRIu64, num));
}

static void row_end(struct row *row, buffer_t *dest, unsigned int *rows)
{
	dovetail_wire_put_num(dest, row->fields);
	buffer_append_buf(dest, row->buf, 0, SIZE_MAX);
	*rows += 1;
}

static const char *time_str(uint64_t usecs)
{
	time_t t = usecs / 1000000;
	struct tm *tm;

	if (usecs == 0)
		return "";
	tm = gmtime(&t);
	return t_strdup_printf("%04d-%02d-%02dT%02d:%02d:%02d.%03uZ",
			       tm->tm_year + 1900, tm->tm_mon + 1, tm->tm_mday,
			       tm->tm_hour, tm->tm_min, tm->tm_sec,
			       (unsigned int)(usecs / 1000 % 1000));
}

static const char *lag_str(uint64_t msecs)
{
	return t_strdup_printf("%"PRIu64".%03u", msecs / 1000,
			       (unsigned int)(msecs % 1000));
}

const char *dovetail_queue_redis_error(struct dovetail_queue *queue)
{
	const char *error;
	unsigned int i;

	if (queue->redis == NULL)
		return NULL;
	if (!dovetail_redis_is_ready(queue->redis)) {
		error = dovetail_redis_last_error(queue->redis);
		return error == NULL ? "connecting to Redis" : error;
	}
	for (i = 0; i < queue->logs_count; i++) {
		if (queue->logs[i].error != NULL)
			return queue->logs[i].error;
		if (queue->logs[i].stalled)
			return "Redis does not answer";
	}
	return NULL;
}

/* ---- what we send ---- */

static const char *
status_peer_connection(struct dovetail_queue *queue,
		       const struct dovetail_queue_peer *peer)
{
	const char *error = dovetail_queue_redis_error(queue);
	time_t secs;

	if (error != NULL)
		return error;
	if (queue->full)
		return "the queue is full";
	if (peer->received == 0)
		return "never seen";
	secs = dovetail_monotonic_secs() - peer->received;
	if (secs > DOVETAIL_QUEUE_PEER_ALIVE_SECS) {
		return t_strdup_printf("no ack since %s s",
				       dec2str(secs));
	}
	return "ok";
}

static void status_to(struct dovetail_queue *queue,
		      const struct dovetail_queue_peer *peer,
		      buffer_t *dest, unsigned int *rows)
{
	struct dovetail_queue_backlog_sum sum;
	uint64_t entries = 0, bytes = 0, lag_msecs = 0, applied_usecs = 0;
	uint64_t now = dovetail_queue_now_usecs(), since;
	uint64_t rejected = peer->bad_reports, set_aside = 0;
	const char *error = NULL;
	string_t *applied = t_str_new(128);
	struct row row;
	unsigned int i;

	for (i = 0; i < queue->logs_count; i++) {
		const struct dovetail_queue_peer_shard *ps = &peer->shards[i];

		dovetail_queue_backlog_after(queue->logs[i].backlog,
					     &ps->applied, &sum);
		entries += sum.entries;
		bytes += sum.bytes;
		/* inside a run, what is confirmed is newer than the run */
		since = sum.entries == 0 ? 0 :
			I_MAX(sum.oldest_usecs, ps->applied_usecs);
		if (since != 0 && since < now)
			lag_msecs = I_MAX(lag_msecs, (now - since) / 1000);
		applied_usecs = I_MAX(applied_usecs, ps->applied_usecs);
		rejected += ps->rejected;
		set_aside += ps->set_aside;
		if (ps->error != NULL)
			error = ps->error;
		if (i > 0)
			str_append_c(applied, ' ');
		str_printfa(applied, "%"PRIu64"-%"PRIu64,
			    ps->applied.generation, ps->applied.seq);
	}

	row_init(&row);
	row_add(&row, "node", queue->set.node);
	row_add(&row, "peer", peer->node);
	row_add(&row, "direction", "to");
	row_add(&row, "role", "primary");
	row_add(&row, "connection", status_peer_connection(queue, peer));
	row_add_num(&row, "entries", entries);
	row_add_num(&row, "bytes", bytes);
	row_add(&row, "lag", lag_str(lag_msecs));
	row_add_num(&row, "lag_entries", entries);
	row_add(&row, "applied", time_str(applied_usecs));
	row_add(&row, "position", str_c(applied));
	row_add_num(&row, "rejected", rejected);
	row_add_num(&row, "set_aside", set_aside);
	row_add(&row, "error", error == NULL ? "" : error);
	row_end(&row, dest, rows);
}

/* ---- what we replay: the workers' reports ---- */

struct status_reason {
	const char *name;
	uint64_t count;
};

struct status_from {
	const char *peer;
	const char *connection, *error;
	uint64_t entries, rejected, set_aside, lag_msecs, applied_secs;
	ARRAY(struct status_reason) reasons;
	unsigned int shards;
};

struct status_from_context {
	struct status_from *froms;
	unsigned int count;
};

static const char *fields_get(const char *const *fields, const char *key)
{
	for (; fields[0] != NULL; fields += 2) {
		if (strcmp(fields[0], key) == 0)
			return fields[1];
	}
	return "";
}

static uint64_t fields_get_num(const char *const *fields, const char *key)
{
	uint64_t num;

	return str_to_uint64(fields_get(fields, key), &num) < 0 ? 0 : num;
}

/* "SECONDS.MILLISECONDS" */
static uint64_t fields_get_msecs(const char *const *fields, const char *key)
{
	const char *const *parts = t_strsplit(fields_get(fields, key), ".");
	uint64_t secs, msecs = 0;
	unsigned int i;

	if (parts[0] == NULL || str_to_uint64(parts[0], &secs) < 0)
		return 0;
	for (i = 0; i < 3; i++) {
		msecs *= 10;
		if (parts[1] != NULL && strlen(parts[1]) > i &&
		    parts[1][i] >= '0' && parts[1][i] <= '9')
			msecs += parts[1][i] - '0';
	}
	return secs * 1000 + msecs;
}

/* reasons: "NAME=COUNT NAME=COUNT" */
static void status_from_add_reasons(struct status_from *from,
				    const char *reasons)
{
	const char *const *words = t_strsplit_spaces(reasons, " ");
	struct status_reason *reason, *found;
	const char *name, *value;
	uint64_t count;

	for (; *words != NULL; words++) {
		value = strchr(*words, '=');
		if (value == NULL || str_to_uint64(value + 1, &count) < 0)
			continue;
		name = t_strdup_until(*words, value);
		found = NULL;
		array_foreach_modifiable(&from->reasons, reason) {
			if (strcmp(reason->name, name) == 0)
				found = reason;
		}
		if (found == NULL) {
			if (array_count(&from->reasons) == STATUS_REASONS_MAX)
				continue;
			found = array_append_space(&from->reasons);
			found->name = name;
		}
		found->count += count;
	}
}

static const char *status_from_reasons(const struct status_from *from)
{
	const struct status_reason *reason;
	string_t *str = t_str_new(64);

	array_foreach(&from->reasons, reason) {
		str_printfa(str, "%s%s=%"PRIu64, str_len(str) == 0 ? "" : " ",
			    reason->name, reason->count);
	}
	return str_c(str);
}

static void status_from_add(const char *const *fields,
			    uint64_t age_msecs ATTR_UNUSED, void *context)
{
	struct status_from_context *ctx = context;
	struct status_from *from = NULL;
	const char *value;
	unsigned int i;

	value = fields_get(fields, "peer");
	for (i = 0; i < ctx->count; i++) {
		if (strcmp(ctx->froms[i].peer, value) == 0)
			from = &ctx->froms[i];
	}
	if (from == NULL)
		return;
	from->shards++;
	from->entries += fields_get_num(fields, "entries");
	from->rejected += fields_get_num(fields, "rejected");
	from->set_aside += fields_get_num(fields, "set_aside");
	from->lag_msecs = I_MAX(from->lag_msecs,
				fields_get_msecs(fields, "lag"));
	value = fields_get(fields, "connection");
	if (strcmp(from->connection, "ok") == 0 && *value != '\0')
		from->connection = value;
	value = fields_get(fields, "error");
	if (*value != '\0')
		from->error = value;
	from->applied_secs = I_MAX(from->applied_secs,
				   fields_get_num(fields, "applied_time"));
	status_from_add_reasons(from, fields_get(fields, "rejected_reasons"));
}

static void status_from(struct dovetail_queue *queue, buffer_t *dest,
			unsigned int *rows)
{
	struct status_from_context ctx;
	struct status_from *from;
	struct row row;
	unsigned int i;

	ctx.count = queue->peers_count;
	ctx.froms = t_new(struct status_from, ctx.count + 1);
	for (i = 0; i < ctx.count; i++) {
		from = &ctx.froms[i];
		from->peer = queue->peers[i].node;
		from->connection = "ok";
		from->error = "";
		t_array_init(&from->reasons, 4);
	}
	dovetail_queue_conns_reports(queue, status_from_add, &ctx);

	for (i = 0; i < ctx.count; i++) {
		from = &ctx.froms[i];
		if (from->shards == 0)
			from->connection = "no replay worker";
		else if (from->shards < queue->logs_count &&
			 strcmp(from->connection, "ok") == 0) {
			from->connection = t_strdup_printf(
				"workers for %u of %u shards", from->shards,
				queue->logs_count);
		}
		row_init(&row);
		row_add(&row, "node", queue->set.node);
		row_add(&row, "peer", from->peer);
		row_add(&row, "direction", "from");
		row_add(&row, "role", "replica");
		row_add(&row, "connection", from->connection);
		row_add_num(&row, "entries", from->entries);
		row_add(&row, "lag", lag_str(from->lag_msecs));
		row_add(&row, "applied",
			time_str(from->applied_secs * 1000000));
		row_add_num(&row, "rejected", from->rejected);
		row_add(&row, "rejected_reasons",
			status_from_reasons(from));
		row_add_num(&row, "set_aside", from->set_aside);
		row_add(&row, "error", from->error);
		row_end(&row, dest, rows);
	}
}

/* ---- ourselves ---- */

/* The routine verification, of all workers. */
struct status_verified {
	/* the oldest; 0: not one of each worker has ended */
	uint64_t secs;
	uint64_t different, repaired;
	unsigned int workers;
};

static void status_verified_add(const char *const *fields,
				uint64_t age_msecs ATTR_UNUSED, void *context)
{
	struct status_verified *sum = context;
	uint64_t secs;

	if (*fields_get(fields, "peer") != '\0')
		return;
	secs = fields_get_num(fields, "verified_time");
	sum->secs = sum->workers++ == 0 ? secs : I_MIN(sum->secs, secs);
	sum->different += fields_get_num(fields, "different");
	sum->repaired += fields_get_num(fields, "repaired");
}

static void status_self(struct dovetail_queue *queue, buffer_t *dest,
			unsigned int *rows)
{
	struct dovetail_queue_backlog_sum sum;
	struct status_verified verified;
	const char *error = dovetail_queue_redis_error(queue), *connection;
	uint64_t entries = 0, bytes = 0;
	struct row row;
	unsigned int i;

	for (i = 0; i < queue->logs_count; i++) {
		dovetail_queue_backlog_total(queue->logs[i].backlog, &sum);
		entries += sum.entries;
		bytes += sum.bytes;
	}
	if (queue->peers_count == 0)
		connection = "no peers: nothing is queued (dovetail_peers)";
	else if (error != NULL)
		connection = error;
	else
		connection = queue->full ? "the queue is full" : "ok";

	i_zero(&verified);
	dovetail_queue_conns_reports(queue, status_verified_add, &verified);

	row_init(&row);
	row_add(&row, "node", queue->set.node);
	row_add(&row, "peer", "");
	row_add(&row, "direction", "self");
	row_add(&row, "connection", connection);
	row_add_num(&row, "entries", entries);
	row_add_num(&row, "bytes", bytes);
	row_add_num(&row, "dirty_users", queue->dirty_count);
	row_add(&row, "verified", time_str(verified.secs * 1000000));
	row_add_num(&row, "different", verified.different);
	row_add_num(&row, "repaired", verified.repaired);
	row_add(&row, "redis_since", queue->redis == NULL ? "" : time_str(
		(uint64_t)dovetail_redis_state_since(queue->redis) * 1000000));
	row_add_num(&row, "rejected", queue->bad_acks);
	row_add(&row, "error", queue->marks_error != NULL ?
		queue->marks_error : error != NULL ? error : "");
	row_end(&row, dest, rows);
}

void dovetail_queue_status(struct dovetail_queue *queue, buffer_t *dest)
{
	buffer_t *buf = t_buffer_create(2048);
	unsigned int i, rows = 0;

	status_self(queue, buf, &rows);
	for (i = 0; i < queue->peers_count; i++)
		status_to(queue, &queue->peers[i], buf, &rows);
	status_from(queue, buf, &rows);
	dovetail_wire_put_num(dest, rows);
	buffer_append_buf(dest, buf, 0, SIZE_MAX);
}
