/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "array.h"
#include "dovetail-queue-positions.h"
#include "test-common.h"

static struct dovetail_queue_positions *table;

/* groups are only compared */
#define GROUP(n) ((struct dovetail_queue_group *)POINTER_CAST((n) + 1))

static struct dovetail_queue_position_change
change(uint8_t mailbox, uint32_t index_id, uint32_t from, uint32_t to)
{
	struct dovetail_queue_position_change c;

	i_zero(&c);
	c.id[0] = mailbox;
	c.from.index_id = c.to.index_id = index_id;
	c.from.file_seq = c.to.file_seq = 3;
	c.from.file_offset = from;
	c.to.file_offset = to;
	return c;
}

static enum dovetail_queue_known
check(uint8_t mailbox, uint32_t index_id, uint32_t from, uint32_t to,
      struct dovetail_queue_group **group_r)
{
	struct dovetail_queue_position_change c =
		change(mailbox, index_id, from, to);

	*group_r = NULL;
	return dovetail_queue_positions_check(table, &c, group_r);
}

static bool is_new(uint32_t from, uint32_t to)
{
	struct dovetail_queue_group *group;

	return check(1, 9, from, to, &group) == DOVETAIL_QUEUE_KNOWN_NOT;
}

static bool is_stored(uint32_t from, uint32_t to)
{
	struct dovetail_queue_group *group;

	return check(1, 9, from, to, &group) == DOVETAIL_QUEUE_KNOWN_STORED;
}

static bool is_pending(uint32_t from, uint32_t to,
		       struct dovetail_queue_group *wanted)
{
	struct dovetail_queue_group *group;

	return check(1, 9, from, to, &group) == DOVETAIL_QUEUE_KNOWN_PENDING &&
		group == wanted;
}

static void pending(uint32_t from, uint32_t to,
		    struct dovetail_queue_group *group)
{
	struct dovetail_queue_position_change c = change(1, 9, from, to);

	dovetail_queue_positions_pending(table, &c, group);
}

static void done(uint32_t from, uint32_t to, struct dovetail_queue_group *group,
		 bool stored)
{
	struct dovetail_queue_position_change c = change(1, 9, from, to);

	dovetail_queue_positions_done(table, &c, group, stored);
}

static void store(uint32_t from, uint32_t to)
{
	pending(from, to, GROUP(0));
	done(from, to, GROUP(0), TRUE);
}

/* 0: not known */
static uint32_t position(uint32_t index_id)
{
	struct dovetail_log_pos pos;
	guid_128_t guid = { 1 };

	if (!dovetail_queue_positions_get(table, guid, index_id, &pos)) {
		test_assert(pos.index_id == 0 && pos.file_seq == 0 &&
			    pos.file_offset == 0);
		return 0;
	}
	test_assert(pos.index_id == index_id && pos.file_seq == 3);
	return pos.file_offset;
}

static void test_stored(void)
{
	test_begin("queue positions: stored");
	table = dovetail_queue_positions_init(10);
	test_assert(is_new(10, 20));
	test_assert(position(9) == 0);
	store(10, 20);
	test_assert(is_stored(10, 20) && is_stored(12, 18));
	test_assert(is_new(9, 20) && is_new(10, 21) && is_new(30, 40));
	test_assert(position(9) == 20);
	/* neighbours join */
	store(20, 30);
	test_assert(is_stored(10, 30));
	store(25, 40);
	store(5, 12);
	test_assert(is_stored(5, 40) && position(9) == 40);
	/* behind a hole: what is before is not known any more */
	store(50, 60);
	test_assert(is_new(5, 60) && is_new(5, 40) && is_stored(50, 60));
	/* far before */
	store(1, 4);
	test_assert(is_new(1, 4) && is_stored(50, 60));
	/* over all */
	store(1, 99);
	test_assert(is_stored(1, 99) && position(9) == 99);
	dovetail_queue_positions_deinit(&table);
	test_end();
}

static void test_pending(void)
{
	test_begin("queue positions: on their way");
	table = dovetail_queue_positions_init(10);
	store(10, 20);
	pending(20, 30, GROUP(1));
	test_assert(is_pending(20, 30, GROUP(1)));
	/* stored and pending together */
	test_assert(is_pending(10, 30, GROUP(1)));
	test_assert(is_new(9, 30));
	pending(30, 40, GROUP(1));
	test_assert(is_pending(15, 40, GROUP(1)));
	/* the next group: what is in both waits for neither */
	pending(40, 50, GROUP(2));
	test_assert(is_pending(40, 50, GROUP(2)));
	test_assert(is_pending(20, 40, GROUP(1)));
	test_assert(is_new(30, 50));
	/* the third takes the oldest one's place */
	pending(50, 60, GROUP(3));
	test_assert(is_new(20, 30) && is_pending(40, 50, GROUP(2)));
	done(20, 30, GROUP(1), TRUE);
	done(30, 40, GROUP(1), TRUE);
	test_assert(is_stored(10, 40) && is_pending(10, 50, GROUP(2)));
	done(40, 50, GROUP(2), TRUE);
	done(50, 60, GROUP(3), TRUE);
	test_assert(is_stored(10, 60));
	dovetail_queue_positions_deinit(&table);
	test_end();
}

static void test_failures(void)
{
	test_begin("queue positions: failures");
	table = dovetail_queue_positions_init(10);
	store(10, 20);
	pending(20, 30, GROUP(1));
	pending(30, 40, GROUP(2));
	done(20, 30, GROUP(1), FALSE);
	test_assert(is_new(20, 30) && is_stored(10, 20));
	test_assert(position(9) == 0);
	/* what came behind does not hide it */
	done(30, 40, GROUP(2), TRUE);
	test_assert(is_new(20, 40) && is_new(10, 40) && position(9) == 0);
	store(15, 40);
	test_assert(position(9) == 40);
	/* of a mailbox that was not known */
	dovetail_queue_positions_deinit(&table);
	table = dovetail_queue_positions_init(10);
	done(10, 20, GROUP(1), FALSE);
	store(20, 30);
	test_assert(position(9) == 0 && is_new(10, 30));
	store(10, 30);
	test_assert(position(9) == 30);
	/* what begins before a failed change and does not reach over it */
	done(30, 50, GROUP(1), FALSE);
	store(20, 30);
	test_assert(position(9) == 0);
	store(30, 40);
	store(50, 60);
	test_assert(position(9) == 0 && is_new(30, 60) && is_stored(50, 60));
	store(25, 45);
	test_assert(position(9) == 0);
	store(45, 60);
	test_assert(position(9) == 60);
	/* two failed */
	done(60, 70, GROUP(1), FALSE);
	done(80, 90, GROUP(2), FALSE);
	store(60, 80);
	test_assert(position(9) == 0);
	store(60, 90);
	test_assert(position(9) == 90);
	dovetail_queue_positions_deinit(&table);
	test_end();
}

static void test_snapshot_and_index(void)
{
	struct dovetail_queue_position_change c;
	struct dovetail_queue_group *group;

	test_begin("queue positions: snapshots and new indexes");
	table = dovetail_queue_positions_init(10);
	store(10, 50);
	/* a snapshot is never known, and says all */
	c = change(1, 9, 0, 40);
	i_zero(&c.from);
	c.snapshot = TRUE;
	test_assert(dovetail_queue_positions_check(table, &c, &group) ==
		    DOVETAIL_QUEUE_KNOWN_NOT);
	dovetail_queue_positions_pending(table, &c, GROUP(1));
	test_assert(is_pending(10, 40, GROUP(1)) || is_stored(10, 40));
	dovetail_queue_positions_done(table, &c, GROUP(1), TRUE);
	test_assert(position(9) == 40 && is_stored(1, 40) && is_new(30, 50));
	/* one that failed changes nothing */
	dovetail_queue_positions_pending(table, &c, GROUP(1));
	dovetail_queue_positions_done(table, &c, GROUP(1), FALSE);
	test_assert(position(9) == 40 && is_stored(1, 40));
	/* another index */
	pending(40, 50, GROUP(2));
	test_assert(check(1, 10, 1, 40, &group) == DOVETAIL_QUEUE_KNOWN_NOT);
	test_assert(position(10) == 0 && position(9) == 40);
	c = change(1, 10, 1, 5);
	dovetail_queue_positions_pending(table, &c, GROUP(3));
	dovetail_queue_positions_done(table, &c, GROUP(3), TRUE);
	test_assert(position(10) == 5 && position(9) == 0);
	/* what was on its way for the old one */
	done(40, 50, GROUP(2), TRUE);
	test_assert(position(10) == 5 && is_new(40, 50));
	dovetail_queue_positions_deinit(&table);
	test_end();
}

static void test_bounded(void)
{
	struct dovetail_queue_position_change c;
	struct dovetail_queue_group *group;
	unsigned int i;

	test_begin("queue positions: bounded");
	table = dovetail_queue_positions_init(10);
	/* what is on its way is not forgotten */
	pending(1, 2, GROUP(1));
	for (i = 2; i < 100; i++) {
		c = change(i, 9, 1, 2);
		dovetail_queue_positions_pending(table, &c, GROUP(2));
		dovetail_queue_positions_done(table, &c, GROUP(2), TRUE);
		/* used often */
		test_assert_idx(check(2, 9, 1, 2, &group) ==
				DOVETAIL_QUEUE_KNOWN_STORED, i);
		test_assert_idx(dovetail_queue_positions_count(table) <= 11, i);
	}
	test_assert(is_pending(1, 2, GROUP(1)));
	test_assert(check(50, 9, 1, 2, &group) == DOVETAIL_QUEUE_KNOWN_NOT);
	test_assert(check(99, 9, 1, 2, &group) == DOVETAIL_QUEUE_KNOWN_STORED);
	dovetail_queue_positions_deinit(&table);
	test_assert(table == NULL);
	test_end();
}

int main(void)
{
	static void (*const test_functions[])(void) = {
		test_stored,
		test_pending,
		test_failures,
		test_snapshot_and_index,
		test_bounded,
		NULL
	};
	return test_run(test_functions);
}
