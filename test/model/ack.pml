/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* Promises 6 and 7: acknowledgements, trimming, the limit of the log. Whoever
   waits gets an answer or runs into his timeout, whatever Redis and the replicas
   do; what was answered at the level "applied" a replica has committed; what was
   trimmed all replicas have; no more than MAX entries stand unconfirmed.

   One change per entry, and entry n is the n-th; Redis has it when it is sent
   and answered. Redis may stop answering and replicas may stop, for ever.
   Reports
   may be lost, and a peer may report more than there is (its state is of
   another log, or somebody has its key).

   check: safety goes_on
   large: -DN=4: safety goes_on
   fails: -DBUG_ACK_BEFORE_COMMIT: safety
   fails: -DBUG_FAILED_IS_APPLIED: safety
   fails: -DBUG_TRIM_BEHIND_FASTEST: safety
   fails: -DBUG_BELIEVE_BEYOND: safety
   fails: -DBUG_NO_LIMIT: safety
   fails: -DBUG_NO_STALL_CHECK -DBUG_NO_TIMEOUT: goes_on
   fails: -DBUG_NO_EXPIRY -DBUG_NO_TIMEOUT: goes_on */

#ifndef N
#define N 3
#endif
#define MAX 2
#define NODES 2

mtype = { LOCAL, AT_QUEUED, AT_APPLIED };	/* enum dovetail_ack_level */
mtype = { OPEN, OK, UNAVAILABLE, NOT_APPLIED };	/* enum dovetail_reply */

/* the mail process: one command after the other */
byte written;
mtype level = LOCAL;
mtype reply = OPEN;
byte mine;		/* the entry the change is in; 0: none yet */
bool waiting;

/* dovetail-queue */
byte sent, stored, trimmed;
bool inflight, stalled;
/* struct dovetail_queue_peer_shard; failed: struct dovetail_ack_failed */
byte reported[NODES], failed[NODES];

/* Redis */
bool redis_up = true;
byte stream;
/* the reports that are in the ack stream */
byte report[NODES], report_failed[NODES];
bool forged;
byte beyond;

/* the replicas */
bool node_up[NODES] = true;
byte read[NODES], committed[NODES], not_applied[NODES];
byte stops = 1, forgeries = 1, failures = 1;

#define LEAST (reported[0] < reported[1] -> reported[0] : reported[1])
#define MOST (reported[0] > reported[1] -> reported[0] : reported[1])

inline answer(r)
{
	reply = r;
	waiting = false;
	/* OK at "applied": a replica has committed it, and not set it aside */
	assert(!(r == OK && level == AT_APPLIED) ||
	       (committed[0] >= mine && not_applied[0] != mine) ||
	       (committed[1] >= mine && not_applied[1] != mine))
}

active proctype mail()
{
end_done:
	do
	:: atomic { written < N && !waiting ->
		written++;
		reply = OPEN;
		mine = 0;
		if
		:: level = AT_QUEUED
		:: level = AT_APPLIED
		fi;
		/* dovetail_queue_log_unavailable() */
		if
		:: stalled -> reply = UNAVAILABLE
#ifndef BUG_NO_LIMIT
		:: !stalled && sent - LEAST >= MAX -> reply = UNAVAILABLE
		:: !stalled && sent - LEAST < MAX -> waiting = true
#else
		:: !stalled -> waiting = true
#endif
		fi }
#ifndef BUG_NO_TIMEOUT
	/* dovetail_capture_wait(): the deadline */
	:: atomic { waiting && (sent >= mine) -> waiting = false }
#endif
	od
}

/* dovetail_queue_log_applied(), waiter_is_applied() */
inline look()
{
	if
	:: waiting && mine > 0 && mine <= stored && level == AT_APPLIED ->
		if
#ifdef BUG_FAILED_IS_APPLIED
		:: MOST >= mine -> answer(OK)
#else
		:: (reported[0] >= mine && failed[0] != mine) ||
		   (reported[1] >= mine && failed[1] != mine) -> answer(OK)
		:: (reported[0] >= mine && failed[0] == mine) &&
		   (reported[1] >= mine && failed[1] == mine) ->
			answer(NOT_APPLIED)
#endif
		:: else
		fi
	:: else
	fi
}

inline believe(n, upto, not_done)
{
	if
	/* "beyond the log": nobody can have what was not sent */
#ifdef BUG_BELIEVE_BEYOND
	:: upto > reported[n] ->
#else
	:: upto > reported[n] && upto <= sent ->
#endif
		reported[n] = upto;
		failed[n] = (not_done > 0 -> not_done : failed[n]);
		look()
	:: else
	fi
}

active proctype queue()
{
end_idle:
	do
	/* dovetail_queue_log_append(), group_send() */
	:: atomic { waiting && mine == 0 && !inflight && !stalled ->
		sent++; mine = sent; inflight = true;
		/* promise 7 */
		assert(sent - LEAST <= MAX) }
	:: atomic { inflight && redis_up -> stream = sent; inflight = false;
		stored = sent; stalled = false;
		if
		:: waiting && mine == sent && level == AT_QUEUED -> answer(OK)
		:: else -> look()
		fi }
#ifndef BUG_NO_STALL_CHECK
	/* log_check_stalled() */
	:: atomic { inflight && !stalled -> stalled = true;
		if
		:: waiting -> answer(UNAVAILABLE)
		:: else
		fi }
#endif
#ifndef BUG_NO_EXPIRY
	/* log_applied_expire() */
	:: atomic { waiting && mine > 0 && mine <= stored &&
		    level == AT_APPLIED -> answer(NOT_APPLIED) }
#endif
	/* acks_handle_ack() */
	:: atomic { redis_up && report[0] > reported[0] ->
		believe(0, report[0], report_failed[0]) }
	:: atomic { redis_up && report[1] > reported[1] ->
		believe(1, report[1], report_failed[1]) }
	:: atomic { redis_up && forged ->
		forged = false;
		beyond = sent + 1;
#ifdef BUG_BELIEVE_BEYOND
		/* it has more than was ever sent */
		believe(0, beyond, 0);
#endif
		beyond = 0
		}
	/* log_trim() */
#ifdef BUG_TRIM_BEHIND_FASTEST
	:: atomic { redis_up && MOST > trimmed -> trimmed = MOST;
#else
	:: atomic { redis_up && LEAST > trimmed -> trimmed = LEAST;
#endif
		assert(committed[0] >= trimmed && committed[1] >= trimmed) }
	od
}

proctype replica(byte n)
{
end_idle:
	do
	/* stream_apply_group(), stream_entry(), stream_ack() */
	:: atomic { node_up[n] && redis_up && read[n] < stream &&
		    read[n] == committed[n] -> read[n]++;
#ifdef BUG_ACK_BEFORE_COMMIT
		report[n] = read[n]
#endif
		}
	:: atomic { node_up[n] && committed[n] < read[n] ->
		if
		:: true
		:: failures > 0 && not_applied[n] == 0 ->
			/* REPLAY_FAILED: set aside, and asked for later */
			failures--; not_applied[n] = read[n]
		fi;
		committed[n] = read[n] }
	:: atomic { node_up[n] && redis_up && report[n] < committed[n] ->
		report[n] = committed[n]; report_failed[n] = not_applied[n] }
	od
}

active proctype faults()
{
end_idle:
	do
	:: atomic { stops > 0 -> stops--;
		if
		:: redis_up = false
		:: node_up[0] = false
		:: node_up[1] = false
		:: node_up[0] = false; node_up[1] = false
		fi }
	:: atomic { forgeries > 0 && !forged -> forgeries--; forged = true }
	od
}

init { atomic { run replica(0); run replica(1) } }

ltl goes_on { <>[](written == N && !waiting) }
