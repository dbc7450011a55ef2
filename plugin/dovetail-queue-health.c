/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* Tells dovetail-health how things are, every second, over its listener: whether it
   is there or not, listens or not, is all the same to us. */

#include "lib.h"
#include "array.h"
#include "buffer.h"
#include "ioloop.h"
#include "net.h"
#include "ostream.h"
#include "priorityq.h"
#include "dovetail-queue-private.h"
#include "dovetail-service.h"

#include <unistd.h>

#define HEALTH_TICK_MSECS 1000
/* A try to connect has Dovecot start the service, if it may. */
#define HEALTH_RECONNECT_MSECS (5 * 1000)

static struct {
	struct dovetail_queue *queue;
	char *path;
	int fd;
	struct io *io;
	struct ostream *output;
	struct timeout *to_tick;
	uint64_t tried_msecs;
} health = { .fd = -1 };

/* ---- the report ---- */

/* Unless it is so that nothing can be said. */
static bool health_is_known(struct dovetail_queue *queue)
{
	unsigned int i;

	if (!queue->started)
		return FALSE;
	for (i = 0; i < queue->logs_count && queue->peers_count > 0; i++) {
		if (queue->logs[i].state != DOVETAIL_QUEUE_LOG_READY &&
		    dovetail_queue_log_unavailable(&queue->logs[i]) == NULL)
			return FALSE;
	}
	return TRUE;
}

/* What the peer has told of users whose primary we are. */
static void
health_to_troubles(const struct dovetail_queue_peer_shard *ps,
		   struct dovetail_health_report *report,
		   struct dovetail_health_troubles *counts)
{
	const struct dovetail_health_trouble_of *of;
	struct dovetail_health_trouble_of *copy;
	uint64_t age = dovetail_monotonic_msecs() - ps->troubles_msecs;

	if (ps->troubles_pool == NULL ||
	    age >= DOVETAIL_QUEUE_TROUBLES_SECS * 1000)
		return;
	counts->lacking += ps->troubles_count.lacking;
	counts->failing += ps->troubles_count.failing;
	counts->differing += ps->troubles_count.differing;
	counts->diverged += ps->troubles_count.diverged;
	array_foreach(&ps->troubles, of) {
		copy = array_append_space(&report->troubles);
		*copy = *of;
		copy->msecs += age;
	}
}

static void
health_to(struct dovetail_queue *queue, const struct dovetail_queue_peer *peer,
	  struct dovetail_health_report *report,
	  struct dovetail_health_report_peer *rpeer)
{
	struct dovetail_queue_backlog_sum sum;
	uint64_t now = dovetail_queue_now_usecs(), since;
	unsigned int i;

	rpeer->to.seen = peer->received != 0;
	rpeer->to.heard_msecs = dovetail_monotonic_msecs() -
		(rpeer->to.seen ? peer->heard_msecs : queue->started_msecs);
	rpeer->to.rejected = peer->bad_reports;
	for (i = 0; i < queue->logs_count; i++) {
		const struct dovetail_queue_peer_shard *ps = &peer->shards[i];

		dovetail_queue_backlog_after(queue->logs[i].backlog,
					     &ps->applied, &sum);
		rpeer->to.entries += sum.entries;
		rpeer->to.bytes += sum.bytes;
		since = sum.entries == 0 ? 0 :
			I_MAX(sum.oldest_usecs, ps->applied_usecs);
		if (since != 0 && since < now) {
			rpeer->to.lag_msecs = I_MAX(rpeer->to.lag_msecs,
						    (now - since) / 1000);
		}
		rpeer->to.position += ps->applied.generation + ps->applied.seq;
		rpeer->to.rejected += ps->rejected;
		health_to_troubles(ps, report, &rpeer->to.troubles);
	}
}

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

/* The routine verification: of the worker that is furthest behind. */
static void health_verified(const char *const *fields,
			    struct dovetail_health_report *report)
{
	uint64_t secs = fields_get_num(fields, "verified_time");

	report->verified_time = report->verified_time == UINT64_MAX ? secs :
		I_MIN(report->verified_time, secs);
}

/* A row of a worker: about one shard of a peer, or (peer "") itself. */
static void health_from(const char *const *fields, uint64_t age_msecs,
			void *context)
{
	struct dovetail_health_report *report = context;
	struct dovetail_health_report_peer *rpeer = NULL, *p;
	struct dovetail_queue_id id;
	const char *value = fields_get(fields, "peer");
	uint64_t now = dovetail_queue_now_usecs(), sealed, msecs, entries;

	if (*value == '\0') {
		health_verified(fields, report);
		return;
	}
	array_foreach_modifiable(&report->peers, p) {
		if (strcmp(p->peer, value) == 0)
			rpeer = p;
	}
	if (rpeer == NULL)
		return;
	if (rpeer->from.shards_missing > 0)
		rpeer->from.shards_missing--;
	rpeer->from.age_msecs = I_MAX(rpeer->from.age_msecs, age_msecs);
	entries = fields_get_num(fields, "entries");
	rpeer->from.entries += entries;
	rpeer->from.rejected += fields_get_num(fields, "rejected");
	sealed = fields_get_num(fields, "sealed");
	msecs = sealed == 0 ? DOVETAIL_HEALTH_NEVER :
		sealed >= now ? 0 : (now - sealed) / 1000;
	rpeer->from.heard_msecs = I_MAX(rpeer->from.heard_msecs, msecs);
	if (entries > 0 && sealed != 0)
		rpeer->from.lag_msecs = I_MAX(rpeer->from.lag_msecs, msecs);
	value = fields_get(fields, "position");
	if (dovetail_queue_id_parse(value, strlen(value), &id) == 0)
		rpeer->from.position += id.generation + id.seq;
	value = fields_get(fields, "redis_error");
	if (*value != '\0')
		rpeer->from.redis_error = value;
	value = fields_get(fields, "stuck");
	if (*value != '\0')
		rpeer->from.stuck = value;
	rpeer->from.troubles.lacking += fields_get_num(fields, "lacking");
	rpeer->from.troubles.failing += fields_get_num(fields, "failing");
	rpeer->from.troubles.differing += fields_get_num(fields, "differing");
	rpeer->from.troubles.diverged += fields_get_num(fields, "diverged");
}

static void health_dirty(struct dovetail_queue *queue,
			 struct dovetail_health_report *report)
{
	struct dovetail_health_trouble_of *trouble;
	const struct dovetail_queue_user *user;
	uint64_t now = dovetail_monotonic_msecs();
	unsigned int count = 0;

	report->dirty = queue->dirty_count;
	report->dirty_failing = queue->dirty_failing_count;
	if (queue->dirty_head != NULL)
		report->dirty_msecs = now - queue->dirty_head->dirty_msecs;
	/* the oldest first, and not all of very many */
	for (user = queue->dirty_head;
	     user != NULL && count < DOVETAIL_HEALTH_TROUBLES_MAX;
	     user = user->dirty_next, count++) {
		trouble = array_append_space(&report->troubles);
		trouble->user = user->name;
		trouble->mailbox = trouble->replica = "";
		trouble->primary = queue->set.node;
		trouble->trouble = user->retry_secs == 0 ?
			DOVETAIL_HEALTH_DIRTY : DOVETAIL_HEALTH_DIRTY_FAILING;
		trouble->msecs = now - user->dirty_msecs;
		trouble->text = user->reason == NULL ? "" : user->reason;
	}
	report->troubles_more += queue->dirty_count - count;
}

static void health_report(struct dovetail_queue *queue,
			  struct dovetail_health_report *report_r)
{
	struct dovetail_queue_backlog_sum sum;
	struct dovetail_health_report_peer *rpeer;
	const char *error;
	unsigned int i;

	i_zero(report_r);
	report_r->sent_msecs = dovetail_monotonic_msecs();
	report_r->known = health_is_known(queue);
	report_r->node = queue->set.node;
	report_r->ack = queue->set.ack;
	report_r->refuses = queue->set.ack_refuse;
	report_r->fenced = "";
	t_array_init(&report_r->peers, queue->peers_count + 1);
	t_array_init(&report_r->troubles, 16);
	report_r->unprotected = report_r->redis_error = "";
	if (!report_r->known)
		return;
	error = dovetail_queue_redis_error(queue);
	if (error != NULL)
		report_r->redis_error = error;
	error = dovetail_queue_unreachable(queue, queue->set.ack);
	if (error != NULL)
		report_r->unprotected = error;
	for (i = 0; i < queue->logs_count; i++) {
		dovetail_queue_backlog_total(queue->logs[i].backlog, &sum);
		report_r->queue_entries += sum.entries;
		report_r->queue_bytes += sum.bytes;
	}
	report_r->rejected = queue->bad_acks;

	for (i = 0; i < queue->peers_count; i++) {
		rpeer = array_append_space(&report_r->peers);
		rpeer->peer = queue->peers[i].node;
		health_to(queue, &queue->peers[i], report_r, rpeer);
		rpeer->from.shards_missing = queue->logs_count;
		rpeer->from.redis_error = rpeer->from.stuck = "";
	}
	report_r->verified_time = UINT64_MAX;
	dovetail_queue_conns_reports(queue, health_from, report_r);
	if (report_r->verified_time == UINT64_MAX)
		report_r->verified_time = 0;
	dovetail_queue_conns_troubles(queue, &report_r->troubles,
				      &report_r->troubles_more);
	/* the last, because in an outage there are more than are told */
	health_dirty(queue, report_r);
}

/* ---- the connection ---- */

static void health_disconnect(void)
{
	io_remove(&health.io);
	o_stream_destroy(&health.output);
	if (health.fd != -1)
		net_disconnect(health.fd);
	health.fd = -1;
	health.tried_msecs = 0;
}

/* It says nothing: it has gone. */
static void health_input(void *context ATTR_UNUSED)
{
	char buf[128];
	ssize_t ret = read(health.fd, buf, sizeof(buf));

	if (ret == 0 || (ret < 0 && errno != EAGAIN && errno != EINTR))
		health_disconnect();
}

static bool health_connect(void)
{
	uint64_t now = dovetail_monotonic_msecs();

	if (health.fd != -1)
		return TRUE;
	if (health.tried_msecs != 0 &&
	    now - health.tried_msecs < HEALTH_RECONNECT_MSECS)
		return FALSE;
	health.tried_msecs = now;
	/* Errors: it is not configured here, or does not take connections. */
	health.fd = net_connect_unix(health.path);
	if (health.fd == -1)
		return FALSE;
	health.output = o_stream_create_fd(health.fd, SIZE_MAX);
	o_stream_set_no_error_handling(health.output, TRUE);
	health.io = io_add(health.fd, IO_READ, health_input, NULL);
	return TRUE;
}

static void health_tick(void *context ATTR_UNUSED)
{
	struct dovetail_health_report report;
	buffer_t *buf;
	size_t offset;

	/* It has not taken the last one: this one would only be older when it
	   does. */
	if (!health_connect() ||
	    o_stream_get_buffer_used_size(health.output) > 0)
		return;
	buf = buffer_create_dynamic(default_pool, 4096);
	offset = dovetail_frame_begin(buf, DOVETAIL_FRAME_HEALTH);
	health_report(health.queue, &report);
	dovetail_health_report_put(buf, &report);
	dovetail_frame_end(buf, offset);
	o_stream_nsend(health.output, buf->data, buf->used);
	if (o_stream_flush(health.output) < 0)
		health_disconnect();
	buffer_free(&buf);
}

void dovetail_queue_health_init(struct dovetail_queue *queue,
				const char *socket_path)
{
	health.queue = queue;
	health.path = i_strdup(socket_path);
	health.to_tick = timeout_add(HEALTH_TICK_MSECS, health_tick, NULL);
}

void dovetail_queue_health_deinit(void)
{
	timeout_remove(&health.to_tick);
	health_disconnect();
	i_free(health.path);
}
