/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "dovetail-health.h"
#include "test-common.h"

#define OK DOVETAIL_HEALTH_OK
#define CATCHING_UP DOVETAIL_HEALTH_CATCHING_UP
#define LAGGING DOVETAIL_HEALTH_LAGGING
#define UNKNOWN DOVETAIL_HEALTH_UNKNOWN
#define DIVERGED DOVETAIL_HEALTH_DIVERGED
#define STALLED DOVETAIL_HEALTH_STALLED
#define UNPROTECTED DOVETAIL_HEALTH_UNPROTECTED
#define FENCED DOVETAIL_HEALTH_FENCED

#define NOBODY DOVETAIL_HEALTH_WHO_NOBODY
#define HERE DOVETAIL_HEALTH_WHO_HERE
#define PEER DOVETAIL_HEALTH_WHO_PEER
#define REDIS DOVETAIL_HEALTH_WHO_REDIS

#define NEVER DOVETAIL_HEALTH_NEVER

static const struct dovetail_health_settings set = {
	.lag_msecs = 5000,
	.stall_msecs = 60000,
	.max_age_msecs = 10000,
	.calm_msecs = 4000,
	.silence_msecs = 15000,
	.queue_percent = 80,
};

/* What is wrong is said, with who must act, and what is well is not. */
static void
check_finding(const struct dovetail_health_finding *finding,
	      enum dovetail_health_state state, enum dovetail_health_who who,
	      unsigned int i)
{
	test_assert_idx(finding->state == state, i);
	test_assert_idx(finding->who == who, i);
	test_assert_idx((finding->reason[0] == '\0') == (state == OK), i);
	/* somebody who must act is told what to do */
	test_assert_idx(finding->who == NOBODY || finding->remedy[0] != '\0',
			i);
}

static void test_node(void)
{
	static const struct {
		struct dovetail_health_node in;
		enum dovetail_health_state before, after;
		enum dovetail_health_who who;
	} tests[] = {
		{ { .peers = 1 }, UNKNOWN, OK, NOBODY },
		{ { .peers = 1 }, OK, OK, NOBODY },
		/* age goes before everything */
		{ { .peers = 1, .age_msecs = 9999 }, OK, OK, NOBODY },
		{ { .peers = 1, .age_msecs = 10000 }, OK, UNKNOWN, HERE },
		{ { .peers = 1, .age_msecs = NEVER }, OK, UNKNOWN, HERE },
		{ { .age_msecs = 10000, .fenced = "x", .unprotected = "x" },
		  OK, UNKNOWN, HERE },
		/* fenced goes before what follows */
		{ { .peers = 1, .fenced = "x" }, OK, FENCED, HERE },
		{ { .fenced = "x", .unprotected = "x" }, OK, FENCED, HERE },
		/* unprotected */
		{ { .peers = 0 }, OK, UNPROTECTED, HERE },
		{ { .peers = 1, .unprotected = "x" }, OK, UNPROTECTED, PEER },
		{ { .peers = 1, .unprotected = "x", .redis_failed = TRUE },
		  OK, UNPROTECTED, REDIS },
		{ { .peers = 1, .unprotected = "x", .refuses = TRUE,
		    .dirty = 1, .dirty_failing = 1, .dirty_msecs = 99999999 },
		  OK, UNPROTECTED, PEER },
		/* users that cannot be read */
		{ { .peers = 1, .dirty = 1, .dirty_failing = 1,
		    .dirty_msecs = 59999 }, OK, CATCHING_UP, NOBODY },
		{ { .peers = 1, .dirty = 1, .dirty_failing = 1,
		    .dirty_msecs = 60000 }, OK, STALLED, HERE },
		{ { .peers = 1, .dirty = 1, .dirty_msecs = 60000 },
		  OK, CATCHING_UP, NOBODY },
		/* the queue: on the way up, and down */
		{ { .peers = 1, .queue_bytes = 799, .queue_max_bytes = 1000 },
		  OK, OK, NOBODY },
		{ { .peers = 1, .queue_bytes = 800, .queue_max_bytes = 1000 },
		  OK, LAGGING, PEER },
		{ { .peers = 1, .queue_bytes = 2000, .queue_max_bytes = 1000 },
		  OK, LAGGING, PEER },
		{ { .peers = 1, .queue_bytes = 600, .queue_max_bytes = 1000 },
		  LAGGING, LAGGING, PEER },
		{ { .peers = 1, .queue_bytes = 599, .queue_max_bytes = 1000 },
		  LAGGING, OK, NOBODY },
		{ { .peers = 1, .queue_bytes = 2000 }, OK, OK, NOBODY },
		/* users that wait: on the way up, and down */
		{ { .peers = 1, .dirty = 1, .dirty_msecs = 4999 },
		  OK, OK, NOBODY },
		{ { .peers = 1, .dirty = 1, .dirty_msecs = 5000 },
		  OK, CATCHING_UP, NOBODY },
		{ { .peers = 1, .dirty = 2, .dirty_msecs = 2500 },
		  CATCHING_UP, CATCHING_UP, NOBODY },
		{ { .peers = 1, .dirty = 2, .dirty_msecs = 2499 },
		  CATCHING_UP, OK, NOBODY },
		{ { .peers = 1, .dirty_msecs = 5000 }, OK, OK, NOBODY },
	};
	struct dovetail_health_node in;
	struct dovetail_health_finding finding;
	unsigned int i;

	test_begin("health: the node");
	for (i = 0; i < N_ELEMENTS(tests); i++) T_BEGIN {
		in = tests[i].in;
		in.node = "a";
		dovetail_health_judge_node(&set, &in, tests[i].before,
					   &finding);
		check_finding(&finding, tests[i].after, tests[i].who, i);
	} T_END;
	test_end();
}

static void test_to(void)
{
	static const struct {
		struct dovetail_health_to in;
		enum dovetail_health_state before, after;
		enum dovetail_health_who who;
	} tests[] = {
		{ { .seen = TRUE }, UNKNOWN, OK, NOBODY },
		/* no news */
		{ { .seen = TRUE, .age_msecs = 9999 }, OK, OK, NOBODY },
		{ { .seen = TRUE, .age_msecs = 10000 }, OK, UNKNOWN, HERE },
		{ { .seen = TRUE, .age_msecs = NEVER,
		    .troubles = { .diverged = 1 } }, OK, UNKNOWN, HERE },
		{ { .seen = TRUE, .redis_failed = TRUE,
		    .heard_msecs = 60000 }, OK, UNKNOWN, REDIS },
		/* never heard of */
		{ { .heard_msecs = 59999 }, OK, UNKNOWN, NOBODY },
		{ { .heard_msecs = 60000 }, OK, STALLED, PEER },
		/* not heard of any more */
		{ { .seen = TRUE, .heard_msecs = 14999 }, OK, OK, NOBODY },
		{ { .seen = TRUE, .heard_msecs = 15000 }, OK, UNKNOWN,
		  NOBODY },
		{ { .seen = TRUE, .heard_msecs = 59999 }, OK, UNKNOWN,
		  NOBODY },
		{ { .seen = TRUE, .heard_msecs = 60000 }, OK, STALLED, PEER },
		{ { .seen = TRUE, .heard_msecs = 60000, .entries = 1 },
		  OK, STALLED, PEER },
		{ { .seen = TRUE, .heard_msecs = 60000,
		    .troubles = { .diverged = 1 } }, OK, STALLED, PEER },
		/* nothing moves */
		{ { .seen = TRUE, .entries = 1, .idle_msecs = 59999 },
		  OK, OK, NOBODY },
		{ { .seen = TRUE, .entries = 1, .idle_msecs = 60000 },
		  OK, STALLED, PEER },
		{ { .seen = TRUE, .entries = 1, .idle_msecs = 60000,
		    .lag_msecs = 60000, .shrinking = TRUE },
		  OK, STALLED, PEER },
		{ { .seen = TRUE, .idle_msecs = 60000 }, OK, OK, NOBODY },
		/* troubles */
		{ { .seen = TRUE, .troubles = { .failing = 1, .diverged = 1 } },
		  OK, STALLED, PEER },
		{ { .seen = TRUE, .troubles = { .diverged = 1, .lacking = 1,
						.differing = 1 } },
		  OK, DIVERGED, HERE },
		{ { .seen = TRUE, .heard_msecs = 15000,
		    .troubles = { .diverged = 2 } }, OK, DIVERGED, HERE },
		{ { .seen = TRUE, .troubles = { .differing = 1 } },
		  OK, CATCHING_UP, NOBODY },
		{ { .seen = TRUE, .troubles = { .lacking = 1 } },
		  OK, CATCHING_UP, NOBODY },
		{ { .seen = TRUE, .troubles = { .lacking = 1 },
		    .lag_msecs = 5000 }, OK, LAGGING, NOBODY },
		{ { .seen = TRUE, .troubles = { .lacking = 1 },
		    .heard_msecs = 15000 }, OK, UNKNOWN, NOBODY },
		/* lag: on the way up ... */
		{ { .seen = TRUE, .lag_msecs = 4999 }, OK, OK, NOBODY },
		{ { .seen = TRUE, .lag_msecs = 4999 }, UNKNOWN, OK, NOBODY },
		{ { .seen = TRUE, .lag_msecs = 4999 }, DIVERGED, OK, NOBODY },
		{ { .seen = TRUE, .lag_msecs = 5000 }, OK, LAGGING, NOBODY },
		{ { .seen = TRUE, .lag_msecs = 5000, .shrinking = TRUE },
		  OK, CATCHING_UP, NOBODY },
		/* ... and down */
		{ { .seen = TRUE, .lag_msecs = 2500 }, LAGGING, LAGGING,
		  NOBODY },
		{ { .seen = TRUE, .lag_msecs = 2500 }, STALLED, LAGGING,
		  NOBODY },
		{ { .seen = TRUE, .lag_msecs = 2500, .shrinking = TRUE },
		  CATCHING_UP, CATCHING_UP, NOBODY },
		{ { .seen = TRUE, .lag_msecs = 2499 }, LAGGING, OK, NOBODY },
		{ { .seen = TRUE, .lag_msecs = 2499 }, CATCHING_UP, OK,
		  NOBODY },
		{ { .seen = TRUE, .lag_msecs = 2499 }, STALLED, OK, NOBODY },
	};
	struct dovetail_health_to in;
	struct dovetail_health_finding finding;
	unsigned int i;

	test_begin("health: what is sent to a peer");
	for (i = 0; i < N_ELEMENTS(tests); i++) T_BEGIN {
		in = tests[i].in;
		in.peer = "b";
		dovetail_health_judge_to(&set, &in, tests[i].before, &finding);
		check_finding(&finding, tests[i].after, tests[i].who, i);
	} T_END;
	test_end();
}

static void test_from(void)
{
	static const struct {
		struct dovetail_health_from in;
		enum dovetail_health_state before, after;
		enum dovetail_health_who who;
	} tests[] = {
		{ { .heard_msecs = 0 }, UNKNOWN, OK, NOBODY },
		/* workers that are missing, or say nothing */
		{ { .shards_missing = 1, .missing_msecs = 4999 },
		  OK, UNKNOWN, HERE },
		{ { .shards_missing = 4, .missing_msecs = 5000 },
		  OK, STALLED, HERE },
		{ { .shards_missing = 4, .missing_msecs = 5000,
		    .age_msecs = NEVER }, OK, STALLED, HERE },
		{ { .age_msecs = 9999 }, OK, OK, NOBODY },
		{ { .age_msecs = 10000 }, OK, UNKNOWN, HERE },
		{ { .age_msecs = NEVER, .troubles = { .diverged = 1 } },
		  OK, UNKNOWN, HERE },
		/* what comes cannot be read, or not be applied */
		{ { .redis_error = "x", .stuck = "x" }, OK, UNKNOWN, REDIS },
		{ { .redis_error = "x", .troubles = { .diverged = 1 } },
		  OK, UNKNOWN, REDIS },
		{ { .stuck = "x", .troubles = { .diverged = 1 } },
		  OK, STALLED, HERE },
		{ { .entries = 1, .idle_msecs = 59999 }, OK, OK, NOBODY },
		{ { .entries = 1, .idle_msecs = 60000 }, OK, STALLED, HERE },
		{ { .idle_msecs = 60000 }, OK, OK, NOBODY },
		/* troubles */
		{ { .troubles = { .failing = 1, .diverged = 1 } },
		  OK, STALLED, HERE },
		{ { .troubles = { .diverged = 1 }, .heard_msecs = NEVER },
		  OK, DIVERGED, HERE },
		{ { .troubles = { .differing = 1 } }, OK, CATCHING_UP,
		  NOBODY },
		{ { .troubles = { .lacking = 1 } }, OK, CATCHING_UP, NOBODY },
		/* the peer is silent */
		{ { .heard_msecs = 14999 }, OK, OK, NOBODY },
		{ { .heard_msecs = 15000 }, OK, UNKNOWN, PEER },
		{ { .heard_msecs = NEVER }, OK, UNKNOWN, PEER },
		{ { .heard_msecs = 15000, .troubles = { .lacking = 1 } },
		  OK, UNKNOWN, PEER },
		/* it is not: what it wrote waits here */
		{ { .heard_msecs = 15000, .entries = 1, .lag_msecs = 15000 },
		  OK, LAGGING, NOBODY },
		/* lag */
		{ { .entries = 1, .lag_msecs = 4999 }, OK, OK, NOBODY },
		{ { .entries = 1, .lag_msecs = 5000 }, OK, LAGGING, NOBODY },
		{ { .entries = 1, .lag_msecs = 5000, .shrinking = TRUE },
		  OK, CATCHING_UP, NOBODY },
		{ { .entries = 1, .lag_msecs = 2500 }, LAGGING, LAGGING,
		  NOBODY },
		{ { .entries = 1, .lag_msecs = 2499 }, LAGGING, OK, NOBODY },
	};
	struct dovetail_health_from in;
	struct dovetail_health_finding finding;
	unsigned int i;

	test_begin("health: what comes from a peer");
	for (i = 0; i < N_ELEMENTS(tests); i++) T_BEGIN {
		in = tests[i].in;
		in.peer = "b";
		dovetail_health_judge_from(&set, &in, tests[i].before,
					   &finding);
		check_finding(&finding, tests[i].after, tests[i].who, i);
	} T_END;
	test_end();
}

static void test_user(void)
{
	static const struct {
		enum dovetail_health_trouble trouble;
		uint64_t age_msecs, trouble_msecs;
		enum dovetail_health_state state;
		enum dovetail_health_who who;
	} tests[] = {
		{ DOVETAIL_HEALTH_DIRTY, 0, 0, CATCHING_UP, NOBODY },
		{ DOVETAIL_HEALTH_DIRTY, 0, 60000, CATCHING_UP, NOBODY },
		{ DOVETAIL_HEALTH_DIRTY_FAILING, 0, 59999, CATCHING_UP, HERE },
		{ DOVETAIL_HEALTH_DIRTY_FAILING, 0, 60000, STALLED, HERE },
		{ DOVETAIL_HEALTH_LACKING, 0, 60000, CATCHING_UP, NOBODY },
		{ DOVETAIL_HEALTH_FAILING, 0, 0, STALLED, HERE },
		{ DOVETAIL_HEALTH_DIFFERING, 0, 59999, CATCHING_UP, NOBODY },
		{ DOVETAIL_HEALTH_DIFFERING, 0, 60000, DIVERGED, NOBODY },
		{ DOVETAIL_HEALTH_DIVERGED_MAILBOX, 0, 0, DIVERGED, HERE },
		{ DOVETAIL_HEALTH_DIVERGED_MAILBOX, 9999, 0, DIVERGED, HERE },
		{ DOVETAIL_HEALTH_DIVERGED_MAILBOX, 10000, 0, UNKNOWN,
		  NOBODY },
		{ DOVETAIL_HEALTH_DIRTY, NEVER, 0, UNKNOWN, NOBODY },
	};
	static const char *const mailboxes[] = { "", "INBOX" };
	static const char *const texts[] = { "", "UID 3" };
	struct dovetail_health_finding finding;
	unsigned int i, j;

	test_begin("health: a user");
	for (i = 0; i < N_ELEMENTS(tests); i++) {
		for (j = 0; j < 4; j++) T_BEGIN {
			struct dovetail_health_user in = {
				.user = "jane", .primary = "a", .replica = "b",
				.mailbox = mailboxes[j % 2],
				.text = texts[j / 2],
				.age_msecs = tests[i].age_msecs,
				.trouble = tests[i].trouble,
				.trouble_msecs = tests[i].trouble_msecs,
			};

			dovetail_health_judge_user(&set, &in, &finding);
			check_finding(&finding, tests[i].state, tests[i].who,
				      i);
		} T_END;
	}
	test_end();
}

/* ---- what is told ---- */

static bool
update(struct dovetail_health *health, enum dovetail_health_state state,
       const char *reason, uint64_t now)
{
	struct dovetail_health_finding finding = {
		.state = state,
		.reason = reason,
		.remedy = "do",
		.who = PEER,
	};

	return dovetail_health_update(health, &set, &finding, now);
}

static bool is(const struct dovetail_health *health,
	       enum dovetail_health_state state, uint64_t since,
	       const char *reason)
{
	return health->state == state && health->since_msecs == since &&
		strcmp(health->reason, reason) == 0;
}

static void test_hysteresis(void)
{
	struct dovetail_health h;
	unsigned int worse, better;

	test_begin("health: worse at once, better after a while");
	dovetail_health_init(&h, 100);
	test_assert(h.state == UNKNOWN && h.since_msecs == 100);
	/* still nothing is known */
	test_assert(!update(&h, UNKNOWN, "u", 200));
	test_assert(is(&h, UNKNOWN, 100, "u"));
	/* the first news counts at once */
	test_assert(update(&h, OK, "", 300));
	test_assert(is(&h, OK, 300, ""));
	/* worse and worse */
	test_assert(update(&h, LAGGING, "l", 1000));
	test_assert(update(&h, STALLED, "s", 2000));
	test_assert(is(&h, STALLED, 2000, "s"));
	test_assert(!update(&h, STALLED, "s2", 2500));
	test_assert(is(&h, STALLED, 2000, "s2") &&
		    strcmp(h.remedy, "do") == 0 && h.who == PEER);
	/* better, but not for long enough */
	test_assert(!update(&h, OK, "", 3000));
	test_assert(!update(&h, LAGGING, "l", 6999));
	test_assert(is(&h, STALLED, 2000, "s2"));
	/* the bad state again: it begins anew */
	test_assert(!update(&h, STALLED, "s", 7000));
	test_assert(!update(&h, OK, "", 8000));
	test_assert(!update(&h, OK, "", 11999));
	test_assert(is(&h, STALLED, 2000, "s"));
	test_assert(update(&h, OK, "", 12000));
	test_assert(is(&h, OK, 12000, ""));
	/* lost news is worse than well, and does not flap either */
	test_assert(update(&h, UNKNOWN, "u", 13000));
	test_assert(!update(&h, OK, "", 14000));
	test_assert(!update(&h, UNKNOWN, "u", 15000));
	test_assert(!update(&h, OK, "", 16000));
	test_assert(!update(&h, OK, "", 19999));
	test_assert(update(&h, OK, "", 20000));
	dovetail_health_deinit(&h);
	test_end();

	test_begin("health: each state to each other");
	for (worse = 0; worse < DOVETAIL_HEALTH_STATE_COUNT; worse++) {
		for (better = 0; better < worse; better++) {
			dovetail_health_init(&h, 0);
			test_assert(better == UNKNOWN ||
				    update(&h, better, "b", 1));
			test_assert(update(&h, worse, "w", 2));
			/* 1 ms too early, and then */
			test_assert(!update(&h, better, "b", 3));
			test_assert(!update(&h, better, "b", 4002));
			test_assert(is(&h, worse, 2, "w"));
			test_assert(update(&h, better, "b", 4003));
			test_assert(is(&h, better, 4003, "b"));
			dovetail_health_deinit(&h);
		}
	}
	test_end();
}

static void test_flapping(void)
{
	struct dovetail_health h;
	struct dovetail_health_finding finding;
	struct dovetail_health_to to;
	unsigned int i, changes = 0;

	test_begin("health: a lag around the threshold does not flap");
	dovetail_health_init(&h, 0);
	for (i = 0; i < 1000; i++) T_BEGIN {
		i_zero(&to);
		to.peer = "b";
		to.seen = TRUE;
		to.entries = 1;
		to.lag_msecs = i % 2 == 0 ? 5200 : 2600;
		dovetail_health_judge_to(&set, &to, h.state, &finding);
		if (dovetail_health_update(&h, &set, &finding, i * 1000))
			changes++;
	} T_END;
	test_assert(changes == 1 && h.state == LAGGING);
	/* around the lower one neither */
	for (changes = 0; i < 2000; i++) T_BEGIN {
		to.lag_msecs = i % 2 == 0 ? 2600 : 2400;
		dovetail_health_judge_to(&set, &to, h.state, &finding);
		if (dovetail_health_update(&h, &set, &finding, i * 1000))
			changes++;
	} T_END;
	test_assert(changes == 0 && h.state == LAGGING);
	dovetail_health_deinit(&h);
	test_end();
}

static void test_progress(void)
{
	struct dovetail_health_progress p;

	test_begin("health: progress");
	i_zero(&p);
	/* nothing waits, nothing moves: not idle */
	test_assert(dovetail_health_progress_update(&p, &set, 7, FALSE, 0,
						    1000) == 0);
	test_assert(dovetail_health_progress_update(&p, &set, 7, FALSE, 0,
						    9000) == 0);
	/* something waits */
	test_assert(dovetail_health_progress_update(&p, &set, 7, TRUE, 10,
						    10000) == 1000);
	test_assert(dovetail_health_progress_update(&p, &set, 7, TRUE, 5010,
						    15000) == 6000);
	test_assert(!p.shrinking);
	/* it moves, and is a bit further behind all the same */
	test_assert(dovetail_health_progress_update(&p, &set, 8, TRUE, 6000,
						    16000) == 0);
	test_assert(dovetail_health_progress_update(&p, &set, 8, TRUE, 6000,
						    18999) == 2999);
	test_assert(!p.shrinking);
	/* a window's end: further behind than at its beginning */
	test_assert(dovetail_health_progress_update(&p, &set, 9, TRUE, 6000,
						    19000) == 0);
	test_assert(!p.shrinking);
	test_assert(dovetail_health_progress_update(&p, &set, 10, TRUE, 3000,
						    22999) == 0);
	test_assert(!p.shrinking);
	test_assert(dovetail_health_progress_update(&p, &set, 10, TRUE, 5999,
						    23000) == 1);
	test_assert(p.shrinking);
	/* not less than before */
	(void)dovetail_health_progress_update(&p, &set, 11, TRUE, 5999, 27000);
	test_assert(!p.shrinking);
	test_end();
}

static void test_names(void)
{
	enum dovetail_health_state state, parsed;

	test_begin("health: names");
	for (state = 0; state < DOVETAIL_HEALTH_STATE_COUNT; state++) {
		test_assert_idx(dovetail_health_state_parse(
			dovetail_health_state_name(state), &parsed) == 0 &&
			parsed == state, state);
	}
	test_assert(dovetail_health_state_parse("", &parsed) < 0);
	test_assert(dovetail_health_state_parse("OK", &parsed) < 0);
	test_assert_strcmp(dovetail_health_who_name(REDIS), "redis");
	test_assert_strcmp(dovetail_health_trouble_name(
		DOVETAIL_HEALTH_DIVERGED_MAILBOX), "diverged");
	test_assert_strcmp(dovetail_health_duration(999),
			   "less than a second");
	test_assert_strcmp(dovetail_health_duration(119999), "119 s");
	test_assert_strcmp(dovetail_health_duration(120000), "2 min");
	test_assert_strcmp(dovetail_health_duration(7200000), "2 h");
	test_assert_strcmp(dovetail_health_duration(2 * 86400000ULL),
			   "2 days");
	test_end();
}

int main(void)
{
	static void (*const test_functions[])(void) = {
		test_node,
		test_to,
		test_from,
		test_user,
		test_hysteresis,
		test_flapping,
		test_progress,
		test_names,
		NULL
	};

	return test_run(test_functions);
}
