/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "array.h"
#include "buffer.h"
#include "dovetail-health-report.h"

static void put_age(buffer_t *buf, uint64_t msecs)
{
	dovetail_wire_put_num(buf, msecs == DOVETAIL_HEALTH_NEVER ? 0 :
			      msecs + 1);
}

static uint64_t get_age(struct dovetail_wire_reader *r)
{
	uint64_t num = dovetail_wire_get_num(r);

	return num == 0 ? DOVETAIL_HEALTH_NEVER : num - 1;
}

static void put_bool(buffer_t *buf, bool value)
{
	dovetail_wire_put_u8(buf, value ? 1 : 0);
}

static bool get_bool(struct dovetail_wire_reader *r)
{
	uint8_t num = dovetail_wire_get_u8(r);

	if (num > 1)
		r->failed = TRUE;
	return num == 1;
}

static void
put_counts(buffer_t *buf, const struct dovetail_health_troubles *counts)
{
	dovetail_wire_put_num(buf, counts->lacking);
	dovetail_wire_put_num(buf, counts->failing);
	dovetail_wire_put_num(buf, counts->differing);
	dovetail_wire_put_num(buf, counts->diverged);
}

static void get_counts(struct dovetail_wire_reader *r,
		       struct dovetail_health_troubles *counts_r)
{
	counts_r->lacking = dovetail_wire_get_num32(r);
	counts_r->failing = dovetail_wire_get_num32(r);
	counts_r->differing = dovetail_wire_get_num32(r);
	counts_r->diverged = dovetail_wire_get_num32(r);
}

static void put_text(buffer_t *buf, const char *text)
{
	dovetail_wire_put_bytes(buf, text, I_MIN(strlen(text),
					DOVETAIL_HEALTH_TEXT_MAX_LEN));
}

/* ---- troubles ---- */

void dovetail_health_troubles_put(buffer_t *buf,
	const ARRAY_TYPE(dovetail_health_trouble_of) *troubles, uint64_t more,
	size_t max_size)
{
	const struct dovetail_health_trouble_of *trouble;
	buffer_t *list = t_buffer_create(1024);
	unsigned int count = 0;

	array_foreach(troubles, trouble) {
		if (count >= DOVETAIL_HEALTH_TROUBLES_MAX ||
		    list->used > max_size) {
			more++;
			continue;
		}
		count++;
		dovetail_wire_put_str(list, trouble->user);
		dovetail_wire_put_str(list, trouble->mailbox);
		dovetail_wire_put_str(list, trouble->primary);
		dovetail_wire_put_str(list, trouble->replica);
		dovetail_wire_put_u8(list, trouble->trouble);
		dovetail_wire_put_num(list, trouble->msecs);
		put_text(list, trouble->text);
	}
	dovetail_wire_put_num(buf, more);
	dovetail_wire_put_num(buf, count);
	buffer_append_buf(buf, list, 0, SIZE_MAX);
}

static void troubles_get(struct dovetail_wire_reader *r, pool_t pool,
			 ARRAY_TYPE(dovetail_health_trouble_of) *troubles_r,
			 uint64_t *more_r)
{
	struct dovetail_health_trouble_of *trouble;
	uint64_t count;

	*more_r = dovetail_wire_get_num(r);
	count = dovetail_wire_get_num(r);
	if (count > DOVETAIL_HEALTH_TROUBLES_MAX)
		r->failed = TRUE;
	p_array_init(troubles_r, pool, 8);
	for (; count > 0 && !r->failed; count--) {
		trouble = array_append_space(troubles_r);
		trouble->user = dovetail_wire_get_str(r, pool);
		trouble->mailbox = dovetail_wire_get_str(r, pool);
		trouble->primary = dovetail_wire_get_str(r, pool);
		trouble->replica = dovetail_wire_get_str(r, pool);
		trouble->trouble = dovetail_wire_get_u8(r);
		trouble->msecs = dovetail_wire_get_num(r);
		trouble->text = dovetail_wire_get_str(r, pool);
		if (trouble->trouble > DOVETAIL_HEALTH_TROUBLE_MAX)
			r->failed = TRUE;
	}
}

bool dovetail_health_troubles_get(struct dovetail_wire_reader *r, pool_t pool,
				  ARRAY_TYPE(dovetail_health_trouble_of) *troubles_r,
				  uint64_t *more_r)
{
	troubles_get(r, pool, troubles_r, more_r);
	return dovetail_wire_reader_done(r);
}

void dovetail_health_ack_put(buffer_t *buf,
	const struct dovetail_health_troubles *counts,
	const ARRAY_TYPE(dovetail_health_trouble_of) *troubles)
{
	put_counts(buf, counts);
	dovetail_health_troubles_put(buf, troubles, 0,
				     DOVETAIL_HEALTH_ACK_MAX_BYTES);
}

bool dovetail_health_ack_get(const void *data, size_t size, pool_t pool,
			     struct dovetail_health_troubles *counts_r,
			     ARRAY_TYPE(dovetail_health_trouble_of) *troubles_r)
{
	struct dovetail_wire_reader r;
	uint64_t more;

	dovetail_wire_reader_init(&r, data, size);
	get_counts(&r, counts_r);
	return dovetail_health_troubles_get(&r, pool, troubles_r, &more);
}

/* ---- all ---- */

static void peer_put(buffer_t *buf,
		     const struct dovetail_health_report_peer *peer)
{
	dovetail_wire_put_str(buf, peer->peer);

	put_bool(buf, peer->to.seen);
	put_age(buf, peer->to.heard_msecs);
	dovetail_wire_put_num(buf, peer->to.lag_msecs);
	dovetail_wire_put_num(buf, peer->to.entries);
	dovetail_wire_put_num(buf, peer->to.bytes);
	dovetail_wire_put_num(buf, peer->to.position);
	dovetail_wire_put_num(buf, peer->to.rejected);
	put_counts(buf, &peer->to.troubles);

	put_age(buf, peer->from.age_msecs);
	dovetail_wire_put_num(buf, peer->from.shards_missing);
	put_age(buf, peer->from.heard_msecs);
	dovetail_wire_put_num(buf, peer->from.lag_msecs);
	dovetail_wire_put_num(buf, peer->from.entries);
	dovetail_wire_put_num(buf, peer->from.position);
	dovetail_wire_put_num(buf, peer->from.rejected);
	put_counts(buf, &peer->from.troubles);
	put_text(buf, peer->from.redis_error);
	put_text(buf, peer->from.stuck);
}

static void peer_get(struct dovetail_wire_reader *r, pool_t pool,
		     struct dovetail_health_report_peer *peer_r)
{
	peer_r->peer = dovetail_wire_get_str(r, pool);

	peer_r->to.seen = get_bool(r);
	peer_r->to.heard_msecs = get_age(r);
	peer_r->to.lag_msecs = dovetail_wire_get_num(r);
	peer_r->to.entries = dovetail_wire_get_num(r);
	peer_r->to.bytes = dovetail_wire_get_num(r);
	peer_r->to.position = dovetail_wire_get_num(r);
	peer_r->to.rejected = dovetail_wire_get_num(r);
	get_counts(r, &peer_r->to.troubles);

	peer_r->from.age_msecs = get_age(r);
	peer_r->from.shards_missing = dovetail_wire_get_num(r);
	peer_r->from.heard_msecs = get_age(r);
	peer_r->from.lag_msecs = dovetail_wire_get_num(r);
	peer_r->from.entries = dovetail_wire_get_num(r);
	peer_r->from.position = dovetail_wire_get_num(r);
	peer_r->from.rejected = dovetail_wire_get_num(r);
	get_counts(r, &peer_r->from.troubles);
	peer_r->from.redis_error = dovetail_wire_get_str(r, pool);
	peer_r->from.stuck = dovetail_wire_get_str(r, pool);
}

void dovetail_health_report_put(buffer_t *buf,
				const struct dovetail_health_report *report)
{
	const struct dovetail_health_report_peer *peer;

	dovetail_wire_put_num(buf, report->sent_msecs);
	put_bool(buf, report->known);
	dovetail_wire_put_str(buf, report->node);
	dovetail_wire_put_u8(buf, report->ack);
	put_bool(buf, report->refuses);
	put_text(buf, report->fenced);
	put_text(buf, report->unprotected);
	put_text(buf, report->redis_error);
	dovetail_wire_put_num(buf, report->queue_entries);
	dovetail_wire_put_num(buf, report->queue_bytes);
	dovetail_wire_put_num(buf, report->dirty);
	dovetail_wire_put_num(buf, report->dirty_failing);
	dovetail_wire_put_num(buf, report->dirty_msecs);
	dovetail_wire_put_num(buf, report->rejected);
	dovetail_wire_put_num(buf, report->verified_time);
	dovetail_wire_put_num(buf, array_count(&report->peers));
	array_foreach(&report->peers, peer)
		peer_put(buf, peer);
	dovetail_health_troubles_put(buf, &report->troubles,
				     report->troubles_more,
				     DOVETAIL_HEALTH_TROUBLES_MAX_BYTES);
}

bool dovetail_health_report_get(struct dovetail_wire_reader *r, pool_t pool,
				struct dovetail_health_report *report_r)
{
	uint64_t count;

	i_zero(report_r);
	report_r->sent_msecs = dovetail_wire_get_num(r);
	report_r->known = get_bool(r);
	report_r->node = dovetail_wire_get_str(r, pool);
	report_r->ack = dovetail_wire_get_u8(r);
	report_r->refuses = get_bool(r);
	report_r->fenced = dovetail_wire_get_str(r, pool);
	report_r->unprotected = dovetail_wire_get_str(r, pool);
	report_r->redis_error = dovetail_wire_get_str(r, pool);
	report_r->queue_entries = dovetail_wire_get_num(r);
	report_r->queue_bytes = dovetail_wire_get_num(r);
	report_r->dirty = dovetail_wire_get_num(r);
	report_r->dirty_failing = dovetail_wire_get_num(r);
	report_r->dirty_msecs = dovetail_wire_get_num(r);
	report_r->rejected = dovetail_wire_get_num(r);
	report_r->verified_time = dovetail_wire_get_num(r);
	count = dovetail_wire_get_num(r);
	if (count > DOVETAIL_HEALTH_PEERS_MAX)
		r->failed = TRUE;
	p_array_init(&report_r->peers, pool, 4);
	for (; count > 0 && !r->failed; count--)
		peer_get(r, pool, array_append_space(&report_r->peers));
	troubles_get(r, pool, &report_r->troubles, &report_r->troubles_more);
	return dovetail_wire_reader_done(r);
}
