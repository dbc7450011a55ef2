/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "dovetail-queue-backlog.h"
#include "test-common.h"

static struct dovetail_queue_backlog *backlog;

static struct dovetail_queue_id id(uint64_t generation, uint64_t seq)
{
	struct dovetail_queue_id id = { .generation = generation, .seq = seq };

	return id;
}

static void add(uint64_t generation, uint64_t seq, uint64_t bytes)
{
	struct dovetail_queue_id i = id(generation, seq);

	dovetail_queue_backlog_add(backlog, &i, &i, 1, bytes,
				   generation * 1000 + seq);
}

static uint64_t confirm(uint64_t generation, uint64_t seq)
{
	struct dovetail_queue_id i = id(generation, seq);

	return dovetail_queue_backlog_confirm(backlog, &i);
}

static bool total_is(uint64_t entries, uint64_t bytes, uint64_t oldest)
{
	struct dovetail_queue_backlog_sum sum;

	dovetail_queue_backlog_total(backlog, &sum);
	return sum.entries == entries && sum.bytes == bytes &&
		sum.oldest_usecs == oldest;
}

static bool after_is(uint64_t generation, uint64_t seq, uint64_t entries,
		     uint64_t bytes, uint64_t oldest)
{
	struct dovetail_queue_backlog_sum sum;
	struct dovetail_queue_id i = id(generation, seq);

	dovetail_queue_backlog_after(backlog, &i, &sum);
	return sum.entries == entries && sum.bytes == bytes &&
		sum.oldest_usecs == oldest;
}

static void test_exact(void)
{
	unsigned int i;

	test_begin("queue backlog: exact");
	backlog = dovetail_queue_backlog_init(64);
	test_assert(total_is(0, 0, 0) && after_is(0, 0, 0, 0, 0));
	test_assert(confirm(9, 9) == 0);
	for (i = 1; i <= 40; i++)
		add(5, i, 10);
	add(7, 1, 100);
	test_assert(total_is(41, 500, 5001));
	test_assert(after_is(0, 0, 41, 500, 5001));
	test_assert(after_is(5, 38, 3, 120, 5039));
	test_assert(after_is(6, 1, 1, 100, 7001));
	test_assert(after_is(7, 1, 0, 0, 0));
	test_assert(confirm(5, 30) == 300);
	test_assert(total_is(11, 200, 5031));
	test_assert(confirm(5, 30) == 0);
	/* around the end of the ring */
	for (i = 2; i <= 50; i++)
		add(7, i, 1);
	test_assert(total_is(60, 249, 5031));
	test_assert(confirm(7, 49) == 248);
	test_assert(total_is(1, 1, 7050));
	dovetail_queue_backlog_clear(backlog);
	test_assert(total_is(0, 0, 0));
	add(8, 1, 1);
	test_assert(total_is(1, 1, 8001));
	dovetail_queue_backlog_deinit(&backlog);
	test_end();
}

static void test_joined(void)
{
	struct dovetail_queue_backlog_sum sum;
	struct dovetail_queue_id first = id(5, 1), last = id(5, 100);
	unsigned int i;

	test_begin("queue backlog: joined runs");
	backlog = dovetail_queue_backlog_init(16);
	for (i = 1; i <= 10000; i++)
		add(5, i, 10);
	test_assert(total_is(10000, 100000, 5001));
	/* the number is exact in spite of it */
	for (i = 0; i <= 10000; i += 777) {
		first = id(5, i);
		dovetail_queue_backlog_after(backlog, &first, &sum);
		test_assert_idx(sum.entries == 10000 - i, i);
		test_assert_idx(sum.bytes == (10000 - i) * 10, i);
	}
	test_assert(confirm(5, 4321) == 43210);
	dovetail_queue_backlog_total(backlog, &sum);
	test_assert(sum.entries == 10000 - 4321 && sum.bytes == 56790);
	test_assert(confirm(5, 10000) == 56790);
	test_assert(total_is(0, 0, 0));

	/* a run as it is after a restart, over two generations */
	first = id(5, 1);
	last = id(6, 10);
	dovetail_queue_backlog_add(backlog, &first, &last, 100, 1000, 77);
	test_assert(after_is(5, 50, 100, 1000, 77));
	test_assert(after_is(6, 5, 5, 50, 77));
	test_assert(confirm(5, 50) == 0);
	test_assert(confirm(6, 9) == 990);
	test_assert(total_is(1, 10, 77));
	test_assert(confirm(6, 10) == 10);
	dovetail_queue_backlog_deinit(&backlog);
	test_end();
}

static void test_id_parse(void)
{
	static const struct {
		const char *str;
		int ret;
		uint64_t generation, seq;
	} tests[] = {
		{ "0-0", 0, 0, 0 },
		{ "12-345", 0, 12, 345 },
		{ "18446744073709551615-18446744073709551615", 0,
		  UINT64_MAX, UINT64_MAX },
		{ "18446744073709551616-1", -1, 0, 0 },
		{ "", -1, 0, 0 },
		{ "1", -1, 0, 0 },
		{ "-1", -1, 0, 0 },
		{ "1-", -1, 0, 0 },
		{ "1-2-3", -1, 0, 0 },
		{ "1-2x", -1, 0, 0 },
		{ "00000000000000000000000000000000000000001-1", -1, 0, 0 },
	};
	struct dovetail_queue_id id;
	unsigned int i;

	test_begin("queue backlog: stream IDs");
	for (i = 0; i < N_ELEMENTS(tests); i++) {
		test_assert_idx(dovetail_queue_id_parse(tests[i].str,
			strlen(tests[i].str), &id) == tests[i].ret, i);
		if (tests[i].ret == 0) {
			test_assert_idx(id.generation == tests[i].generation &&
					id.seq == tests[i].seq, i);
		}
	}
	/* not beyond len */
	test_assert(dovetail_queue_id_parse("1-23", 3, &id) == 0 &&
		    id.seq == 2);
	test_end();
}

int main(void)
{
	static void (*const test_functions[])(void) = {
		test_exact,
		test_joined,
		test_id_parse,
		NULL
	};
	return test_run(test_functions);
}
