/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "array.h"
#include "buffer.h"
#include "str.h"
#include "test-common.h"
#include "dovetail-compat.h"
#include "dovetail-health-report.h"

static bool get(const void *data, size_t size,
		struct dovetail_health_report *report_r)
{
	struct dovetail_wire_reader r;
	unsigned char *copy = i_malloc(I_MAX(size, 1));
	bool ok;

	/* exactly as large as it says: a read past its end is noticed */
	memcpy(copy, data, size);
	dovetail_wire_reader_init(&r, copy, size);
	ok = dovetail_health_report_get(&r, pool_datastack_create(), report_r);
	i_free(copy);
	return ok;
}

static void report_init(struct dovetail_health_report *report_r)
{
	i_zero(report_r);
	report_r->known = TRUE;
	report_r->node = "a";
	report_r->fenced = report_r->unprotected = report_r->redis_error = "";
	t_array_init(&report_r->peers, 4);
	t_array_init(&report_r->troubles, 4);
}

static struct dovetail_health_trouble_of *
trouble_add(struct dovetail_health_report *report, const char *user)
{
	struct dovetail_health_trouble_of *of =
		array_append_space(&report->troubles);

	of->user = user;
	of->mailbox = "INBOX";
	of->primary = "a";
	of->replica = "b";
	of->trouble = DOVETAIL_HEALTH_DIVERGED_MAILBOX;
	of->msecs = 1234;
	of->text = "UID 5";
	return of;
}

static void test_report(void)
{
	struct dovetail_health_report report, got;
	struct dovetail_health_report_peer *peer;
	const struct dovetail_health_report_peer *got_peer;
	const struct dovetail_health_trouble_of *of;
	buffer_t *buf = t_buffer_create(1024);
	size_t size;

	test_begin("health report: there and back");
	report_init(&report);
	report.sent_msecs = 123456789;
	report.ack = 2;
	report.refuses = TRUE;
	report.fenced = "f";
	report.unprotected = "u";
	report.redis_error = "r";
	report.queue_entries = 1;
	report.queue_bytes = 2;
	report.dirty = 3;
	report.dirty_failing = 4;
	report.dirty_msecs = 5;
	report.rejected = 6;
	report.verified_time = 1764000000;
	report.troubles_more = 7;
	peer = array_append_space(&report.peers);
	peer->peer = "b";
	peer->to.seen = TRUE;
	peer->to.heard_msecs = 0;
	peer->to.lag_msecs = 11;
	peer->to.entries = 12;
	peer->to.bytes = 13;
	peer->to.position = 14;
	peer->to.rejected = 15;
	peer->to.troubles.lacking = 16;
	peer->to.troubles.diverged = 17;
	peer->from.age_msecs = 21;
	peer->from.shards_missing = 22;
	peer->from.heard_msecs = DOVETAIL_HEALTH_NEVER;
	peer->from.lag_msecs = 23;
	peer->from.entries = 24;
	peer->from.position = 25;
	peer->from.rejected = 26;
	peer->from.troubles.failing = 27;
	peer->from.troubles.differing = 28;
	peer->from.redis_error = "fr";
	peer->from.stuck = "fs";
	trouble_add(&report, "jane");
	dovetail_health_report_put(buf, &report);

	test_assert(get(buf->data, buf->used, &got));
	test_assert(got.sent_msecs == 123456789);
	test_assert(got.known && got.ack == 2 && got.refuses);
	test_assert_strcmp(got.node, "a");
	test_assert_strcmp(got.fenced, "f");
	test_assert_strcmp(got.unprotected, "u");
	test_assert_strcmp(got.redis_error, "r");
	test_assert(got.queue_entries == 1 && got.queue_bytes == 2 &&
		    got.dirty == 3 && got.dirty_failing == 4 &&
		    got.dirty_msecs == 5 && got.rejected == 6 &&
		    got.verified_time == 1764000000 &&
		    got.troubles_more == 7);
	test_assert(array_count(&got.peers) == 1);
	got_peer = array_front(&got.peers);
	test_assert_strcmp(got_peer->peer, "b");
	test_assert(got_peer->to.seen && got_peer->to.heard_msecs == 0 &&
		    got_peer->to.lag_msecs == 11 &&
		    got_peer->to.entries == 12 && got_peer->to.bytes == 13 &&
		    got_peer->to.position == 14 &&
		    got_peer->to.rejected == 15 &&
		    got_peer->to.troubles.lacking == 16 &&
		    got_peer->to.troubles.diverged == 17);
	test_assert(got_peer->from.age_msecs == 21 &&
		    got_peer->from.shards_missing == 22 &&
		    got_peer->from.heard_msecs == DOVETAIL_HEALTH_NEVER &&
		    got_peer->from.lag_msecs == 23 &&
		    got_peer->from.entries == 24 &&
		    got_peer->from.position == 25 &&
		    got_peer->from.rejected == 26 &&
		    got_peer->from.troubles.failing == 27 &&
		    got_peer->from.troubles.differing == 28);
	test_assert_strcmp(got_peer->from.redis_error, "fr");
	test_assert_strcmp(got_peer->from.stuck, "fs");
	test_assert(array_count(&got.troubles) == 1);
	of = array_front(&got.troubles);
	test_assert_strcmp(of->user, "jane");
	test_assert_strcmp(of->mailbox, "INBOX");
	test_assert_strcmp(of->primary, "a");
	test_assert_strcmp(of->replica, "b");
	test_assert(of->trouble == DOVETAIL_HEALTH_DIVERGED_MAILBOX &&
		    of->msecs == 1234);
	test_assert_strcmp(of->text, "UID 5");

	/* neither a part of it nor more than it */
	for (size = 0; size < buf->used; size++)
		test_assert_idx(!get(buf->data, size, &got), size);
	buffer_append_c(buf, 0);
	test_assert(!get(buf->data, buf->used, &got));
	test_end();
}

static void test_limits(void)
{
	struct dovetail_health_report report, got;
	struct dovetail_health_trouble_of *of;
	buffer_t *buf = buffer_create_dynamic(default_pool, 1024);
	const struct dovetail_health_trouble_of *got_of;
	char *text;
	unsigned int i, max = DOVETAIL_HEALTH_TROUBLES_MAX;

	test_begin("health report: no more than so much");
	report_init(&report);
	for (i = 0; i < max + 5; i++)
		trouble_add(&report, "jane");
	report.troubles_more = 1;
	dovetail_health_report_put(buf, &report);
	test_assert(get(buf->data, buf->used, &got));
	test_assert(array_count(&got.troubles) == max &&
		    got.troubles_more == 6);

	/* of long ones fewer */
	text = i_malloc(10000);
	memset(text, 'x', 9999);
	report_init(&report);
	for (i = 0; i < max; i++) {
		of = trouble_add(&report, "jane");
		of->text = of->mailbox = text;
	}
	buffer_set_used_size(buf, 0);
	dovetail_health_report_put(buf, &report);
	test_assert(buf->used < DOVETAIL_HEALTH_TROUBLES_MAX_BYTES + 20000);
	test_assert(get(buf->data, buf->used, &got));
	test_assert(array_count(&got.troubles) > 20 &&
		    array_count(&got.troubles) + got.troubles_more == max);
	got_of = array_front(&got.troubles);
	test_assert(strlen(got_of->text) == DOVETAIL_HEALTH_TEXT_MAX_LEN);
	i_free(text);

	/* what is no trouble */
	report_init(&report);
	of = trouble_add(&report, "jane");
	of->trouble = DOVETAIL_HEALTH_TROUBLE_MAX + 1;
	buffer_set_used_size(buf, 0);
	dovetail_health_report_put(buf, &report);
	test_assert(!get(buf->data, buf->used, &got));
	buffer_free(&buf);
	test_end();
}

static void test_ack(void)
{
	const struct dovetail_health_troubles in = { 1, 2, 3, 4 };
	struct dovetail_health_troubles out;
	struct dovetail_health_report report;
	ARRAY_TYPE(dovetail_health_trouble_of) got;
	pool_t pool = pool_datastack_create();
	buffer_t *buf = t_buffer_create(1024);
	unsigned int i;

	test_begin("health report: in an ack");
	report_init(&report);
	dovetail_health_ack_put(buf, &in, &report.troubles);
	test_assert(dovetail_health_ack_get(buf->data, buf->used, pool, &out,
					    &got));
	test_assert(memcmp(&in, &out, sizeof(in)) == 0 &&
		    array_count(&got) == 0);
	test_assert(!dovetail_health_ack_get(buf->data, buf->used - 1, pool,
					     &out, &got));
	for (i = 0; i < DOVETAIL_HEALTH_TROUBLES_MAX; i++)
		trouble_add(&report, "jane");
	buffer_set_used_size(buf, 0);
	dovetail_health_ack_put(buf, &in, &report.troubles);
	test_assert(buf->used < DOVETAIL_HEALTH_ACK_MAX_BYTES + 100);
	test_assert(dovetail_health_ack_get(buf->data, buf->used, pool, &out,
					    &got));
	test_assert(array_count(&got) > 100);
	test_end();
}

int main(void)
{
	static void (*const test_functions[])(void) = {
		test_report,
		test_limits,
		test_ack,
		NULL
	};

	return test_run(test_functions);
}
