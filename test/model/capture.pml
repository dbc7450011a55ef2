/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* Promise 1: nothing committed is missed. From a mailbox's transaction log to
   the stream: mail processes that capture, their marks, the queue's table of
   positions (more of which is in positions.pml), its groups, the sweep of dirty
   users. Promise 6, so far as mail
   processes go: none of them ever waits for ever (there is no end state in
   which one stands).

   One mailbox; record r of its log stands in [r, r + 1), and 0 is "no
   position". Redis is a set of records here: that it loses none is chain.pml's
   matter, and order is replay.pml's.

   Processes may be killed between any two steps. A step is what is visible to
   others at once: a commit, a write of the header, a frame.

   ANSWERED: mail processes wait for their answers (dovetail_ack is not local,
   and no timeout passes). When then one process dies, the queue or a mail
   process, marks suffice. When both die, or all with the machine, or the queue
   with what it had not read from a process that is gone, then nobody has seen a
   mark, and only the sweep of idle mailboxes finds what was committed
   (IDLE_SWEEP); without it, the property is open.

   check: -DANSWERED: safety queued
   check: -DN=1 -DKILLS=2 -DMASTER_DIES -DIDLE_SWEEP: queued
   large: -DIDLE_SWEEP -DSTALLS=1: safety queued
   large: -DPROCS=2 -DANSWERED: safety queued
   large: -DKILLS=2 -DMASTER_DIES -DIDLE_SWEEP: safety queued
   fails: -DBUG_POSITION_FIRST: safety
   fails: -DN=1 -DANSWERED -DBUG_NO_MARK: queued
   fails: -DN=1 -DANSWERED -DBUG_MARK_AFTER_COMMIT: queued
   open: -DN=1: queued
   open: -DN=1 -DANSWERED -DKILLS=2 -DMASTER_DIES: queued */

#ifndef N
#define N 2		/* records */
#endif
#ifndef KILLS
#define KILLS 1		/* processes that get killed */
#endif
#ifndef REFUSED
#define REFUSED 1	/* XADDs that Redis refuses, or times it is away */
#endif
#ifndef PROCS
#define PROCS 1		/* mail processes, at most 2; the worker captures, too */
#endif
#ifndef STALLS
#define STALLS 0	/* times that Redis does not answer in time */
#endif

#define WORKER 2
#define NOBODY 3
#define GROUP_MAX 3
#define INFLIGHT 0
#define OPEN 1
#define NOWHERE 15

#define BITS(lo, hi) (((1 << (hi)) - 1) & ~((1 << (lo)) - 1))
#define QUEUED ((stream & BITS(0, end)) == BITS(0, end))

mtype = { MARK, CHANGE, CLEAN, SWEEP, END };
/* enum dovetail_queue_known */
mtype = { NOT, PENDING, STORED };

/* The mailbox: how many records its log has, the queued position in its index
   header. */
byte end, pos;
/* Redis: bit r is record r */
byte stream;
/* STATE_DIR/queue/dirty/USER */
bool mark_file;

byte kills = KILLS, refused = REFUSED, stalls = STALLS;
bool kill[2];

/* the sockets, from the client to the queue; answers are counted at once */
chan to_queue[3] = [8] of { mtype, byte, byte, byte };
/* the other end of the socket is there */
bool connected[3];
/* struct dovetail_queue_batch. Answers to one that was cancelled go to
   nobody. */
byte outstanding[4], batch[3];
bool bad[4];

/* ---- dovetail-queue ---- */

bool q_up = true;
/* which process it is, for a worker that outlives it */
byte q_life;
bool marked[3], dirty, again, working;
/* struct mailbox_position: stored, hole, pending */
byte lo, hi, hole = NOWHERE, hole_end;
byte p_lo[2], p_hi[2];
/* struct dovetail_queue_group */
byte g_count[2], g_from[2 * GROUP_MAX], g_to[2 * GROUP_MAX];
byte g_waiters[2 * 4];
bool abandoned;
/* Redis has executed the XADD that is on its way */
bool executed;
byte q_i, q_f, q_t, q_g, q_w;
mtype q_known;

/* dovetail_queue_waiter_answer() */
inline answer(i, ok)
{
	if
	:: outstanding[i] > 0 ->
		outstanding[i]--;
		if
		:: !(ok) -> bad[i] = true
		:: else
		fi
	:: else	/* it has hung up, or cancelled the batch */
	fi;
	if
	:: !(ok) -> set_dirty()
	:: else
	fi
}

/* dovetail_queue_user_set_dirty() */
inline set_dirty()
{
	dirty = true;
	mark_file = true;
	again = (working -> true : again)
}

/* dovetail_queue_positions_check() */
inline positions_check(f, t)
{
	q_known = NOT;
	if
	:: hi > 0 && lo <= f && t <= hi -> q_known = STORED
	:: else ->
		q_g = 0;
		do
		:: q_g < 2 && q_known == NOT ->
			if
			:: p_hi[q_g] > 0 && t <= p_hi[q_g] &&
			   (p_lo[q_g] <= f ||
			    (hi > 0 && p_lo[q_g] <= hi && lo <= f)) ->
				q_known = PENDING
			:: else -> q_g++
			fi
		:: else -> break
		od
	fi
}

/* span_add() */
inline span_add(s_lo, s_hi, f, t)
{
	if
	:: s_hi == 0 || f > s_hi -> s_lo = f; s_hi = t
	:: s_hi > 0 && f <= s_hi && t >= s_lo ->
		s_lo = (f < s_lo -> f : s_lo);
		s_hi = (t > s_hi -> t : s_hi)
	:: else
	fi
}

/* dovetail_queue_positions_done() */
inline positions_done(f, t, is_stored)
{
	if
	:: !(is_stored) ->
		hole_end = (hole == NOWHERE || t > hole_end -> t : hole_end);
		hole = (f < hole -> f : hole)
	:: else ->
		span_add(lo, hi, f, t);
		if
		:: hole != NOWHERE && f <= hole && t > hole -> hole = t
		:: else
		fi;
		if
		:: hole != NOWHERE && hole >= hole_end -> hole = NOWHERE
		:: else
		fi
	fi;
	if
	:: hole == NOWHERE -> hole_end = 0
	:: else
	fi
}

/* group_stored(), group_failed() */
inline group_end(g, is_stored)
{
	q_i = 0;
	do
	:: q_i < g_count[g] ->
		positions_done(g_from[g * GROUP_MAX + q_i],
			       g_to[g * GROUP_MAX + q_i], is_stored);
		g_from[g * GROUP_MAX + q_i] = 0;
		g_to[g * GROUP_MAX + q_i] = 0;
		q_i++
	:: else -> break
	od;
	group_answer(g, is_stored);
	g_count[g] = 0;
	p_lo[g] = 0;
	p_hi[g] = 0;
	if
	:: g == INFLIGHT -> abandoned = false; executed = false
	:: else
	fi;
	q_i = 0
}

inline group_answer(g, ok)
{
	q_i = 0;
	do
	:: q_i < 4 ->
		do
		:: g_waiters[g * 4 + q_i] > 0 ->
			g_waiters[g * 4 + q_i]--;
			answer(q_i, ok)
		:: else -> break
		od;
		q_i++
	:: else -> break
	od;
	q_i = 0
}

/* conn_queue_change() */
inline queue_change(f, t)
{
	positions_check(f, t);
	if
	:: q_known == STORED -> answer(q_w, true)
	:: else ->
		if
		:: refused > 0 ->
			/* dovetail_queue_log_unavailable() */
			refused--;
			positions_done(f, t, false);
			answer(q_w, false)
		:: q_known == PENDING && !(q_g == INFLIGHT && abandoned) ->
			g_waiters[q_g * 4 + q_w]++
		:: !(q_known == PENDING && !(q_g == INFLIGHT && abandoned)) ->
			/* dovetail_queue_log_append() */
			g_from[OPEN * GROUP_MAX + g_count[OPEN]] = f;
			g_to[OPEN * GROUP_MAX + g_count[OPEN]] = t;
			g_count[OPEN]++;
			g_waiters[OPEN * 4 + q_w]++;
			span_add(p_lo[OPEN], p_hi[OPEN], f, t)
		fi
	fi;
	q_g = 0;
	q_known = NOT
}

/* dovetail_queue_log_kick(), group_send() */
inline kick()
{
	q_i = 0;
	do
	:: q_i < GROUP_MAX ->
		g_from[q_i] = g_from[GROUP_MAX + q_i];
		g_to[q_i] = g_to[GROUP_MAX + q_i];
		g_from[GROUP_MAX + q_i] = 0;
		g_to[GROUP_MAX + q_i] = 0;
		q_i++
	:: else -> break
	od;
	q_i = 0;
	do
	:: q_i < 4 ->
		g_waiters[q_i] = g_waiters[4 + q_i];
		g_waiters[4 + q_i] = 0;
		q_i++
	:: else -> break
	od;
	q_i = 0;
	g_count[INFLIGHT] = g_count[OPEN];
	g_count[OPEN] = 0;
	p_lo[INFLIGHT] = p_lo[OPEN];
	p_hi[INFLIGHT] = p_hi[OPEN];
	p_lo[OPEN] = 0;
	p_hi[OPEN] = 0
}

inline redis_executes()
{
	q_i = 0;
	do
	:: q_i < g_count[INFLIGHT] ->
		stream = stream | BITS(g_from[q_i], g_to[q_i]);
		q_i++
	:: else -> break
	od;
	q_i = 0;
	executed = true
}

#define QUIET (!dirty && !marked[0] && !marked[1] && \
	g_count[INFLIGHT] == 0 && g_count[OPEN] == 0)

inline receive(i)
{
	if
	:: to_queue[i]?[MARK] ->
		to_queue[i]?MARK(_, _, _);
		marked[i] = true;
		mark_file = true
	:: to_queue[i]?[CHANGE] ->
		to_queue[i]?CHANGE(q_f, q_t, q_w);
		q_w = (q_w == batch[i] -> i : NOBODY);
		queue_change(q_f, q_t)
	:: to_queue[i]?[CLEAN] ->
		to_queue[i]?CLEAN(_, _, _);
		marked[i] = false
	:: to_queue[i]?[SWEEP] ->
		to_queue[i]?SWEEP(_, _, _);
		set_dirty()
	:: to_queue[i]?[END] ->
		/* conn_destroy(), conn_user_free() */
		to_queue[i]?END(_, _, _);
		if
		:: marked[i] -> set_dirty()
		:: else
		fi;
		marked[i] = false
	fi;
	q_f = 0;
	q_t = 0;
	q_w = 0
}

active proctype queue()
{
end_idle:
	do
	:: atomic { q_up && nempty(to_queue[0]) && g_count[OPEN] < GROUP_MAX ->
		receive(0) }
	:: atomic { PROCS > 1 && q_up && nempty(to_queue[1]) && g_count[OPEN] < GROUP_MAX ->
		receive(1) }
	:: atomic { q_up && nempty(to_queue[2]) && g_count[OPEN] < GROUP_MAX ->
		receive(2) }
	:: d_step { q_up && g_count[INFLIGHT] == 0 && g_count[OPEN] > 0 ->
		kick() }
	:: d_step { q_up && g_count[INFLIGHT] > 0 && !executed ->
		redis_executes() }
	:: d_step { q_up && executed -> group_end(INFLIGHT, true) }
	:: d_step { q_up && g_count[INFLIGHT] > 0 && !executed && refused > 0 ->
		/* log_xadd_error() */
		refused--;
		group_end(INFLIGHT, false) }
	:: d_step { q_up && g_count[INFLIGHT] > 0 && stalls > 0 ->
		/* log_check_stalled(), groups_fail() */
		stalls--;
		abandoned = true;
		group_answer(INFLIGHT, false);
		group_end(OPEN, false) }
	/* dovetail_queue_users_work() */
	:: d_step { q_up && dirty && !working -> working = true }
	/* dovetail_queue_users_tick() */
	:: d_step { q_up && mark_file && QUIET -> mark_file = false }
	/* dovetail_queue_users_init() */
	:: d_step { !q_up -> q_up = true; dirty = mark_file }
	od
}

inline queue_dies()
{
	if
	:: executed || g_count[INFLIGHT] == 0
	:: g_count[INFLIGHT] > 0 && !executed -> redis_executes()
	:: g_count[INFLIGHT] > 0 && !executed
	fi;
	q_up = false;
	q_life++;
	dirty = false;
	again = false;
	working = false;
	lo = 0;
	hi = 0;
	hole = NOWHERE;
	hole_end = 0;
	abandoned = false;
	executed = false;
	q_g = 0;
	do
	:: q_g < 2 ->
		g_count[q_g] = 0;
		p_lo[q_g] = 0;
		p_hi[q_g] = 0;
		q_i = 0;
		do
		:: q_i < GROUP_MAX ->
			g_from[q_g * GROUP_MAX + q_i] = 0;
			g_to[q_g * GROUP_MAX + q_i] = 0;
			q_i++
		:: else -> break
		od;
		q_i = 0;
		do
		:: q_i < 4 ->
			g_waiters[q_g * 4 + q_i] = 0;
			q_i++
		:: else -> break
		od;
		q_g++
	:: else -> break
	od;
	q_g = 0;
	q_i = 0;
	do
	:: q_i < 3 ->
		marked[q_i] = false;
		connected[q_i] = false;
		bad[q_i] = (outstanding[q_i] > 0 -> true : bad[q_i]);
		outstanding[q_i] = 0;
		do
		:: nempty(to_queue[q_i]) -> to_queue[q_i]?_(_, _, _)
		:: empty(to_queue[q_i]) -> break
		od;
		q_i++
	:: else -> break
	od;
	q_i = 0
}

/* ---- dovetail-capture.c ---- */

/* queue_client_connect(). What is written before the service runs waits in the
   listener's backlog. */
inline connect(i)
{
	if
	:: !connected[i] -> connected[i] = true; c_marked = false
	:: else
	fi
}

/* dovetail_queue_client_mark(): nobody waits for its effect */
inline mark(i)
{
#ifdef BUG_NO_MARK
	skip
#else
	atomic {
		/* a connection that broke since shows with the next writing */
		if
		:: !c_marked ->
			connect(i);
			to_queue[i]!MARK(0, 0, 0);
			c_marked = true
		:: else
		fi
	}
#endif
}

/* capture_write_position() */
inline write_position(to)
{
	pos = to;
	/* all before the position was accepted */
	assert((stream & BITS(0, pos)) == BITS(0, pos))
}

/* dovetail_queue_client_cancel() */
inline cancel(i)
{
	batch[i] = (batch[i] + 1) % 4;
	outstanding[i] = 0;
	bad[i] = false;
	q_i = 0;
	do
	:: q_i < 2 ->
		g_waiters[q_i * 4 + NOBODY] = g_waiters[q_i * 4 + NOBODY] +
			g_waiters[q_i * 4 + i];
		g_waiters[q_i * 4 + i] = 0;
		q_i++
	:: else -> break
	od;
	q_i = 0
}

/* capture_settle(); failed */
inline settle_failed(i)
{
	sent = 0;
	unwritten = false;
	unclean = true;
	unconfirmed = false;
	cancel(i);
	/* dovetail_queue_client_sweep() */
	connect(i);
	to_queue[i]!SWEEP(0, 0, 0)
}

/* capture_settle_earlier() */
inline settle(i)
{
	if
	:: unconfirmed && outstanding[i] == 0 ->
		if
		:: bad[i] -> settle_failed(i)
		:: !bad[i] -> unconfirmed = false; unwritten = true
		/* CAPTURE_UNWRITTEN_MAX */
		:: !bad[i] ->
			unconfirmed = false;
			unwritten = false;
			write_position(sent)
		fi
	:: !(unconfirmed && outstanding[i] == 0)
	fi
}

/* capture_run() */
inline capture(i)
{
	atomic {
		settle(i);
		view = end;
		from = (sent > pos && sent <= view -> sent : pos);
		known = 0
	}
	if
	:: from < view ->
		/* capture_records(): somebody else's record */
		if
		:: from < seen ->
			atomic {
				if
				:: q_up && connected[i] &&
				   empty(to_queue[i]) ->
					/* dovetail_queue_positions_get() */
					known = (hole == NOWHERE -> hi : 0)
				:: true	/* no answer in time */
				fi;
				if
				:: known > from -> from = known
				:: else -> known = 0
				fi
			}
		:: else
		fi
	:: else
	fi;
	/* capture_flush(), dovetail_queue_client_send() */
	atomic {
		seen = view;
		sending = from < view;
		if
		:: sending && connected[i] ->
			to_queue[i]!CHANGE(from, view, batch[i]);
			outstanding[i]++
		:: sending && !connected[i] && c_had ->
			/* write(): EPIPE */
			sending = false;
			settle_failed(i);
			known = 0
		:: sending && !connected[i] && !c_had ->
			connect(i);
			to_queue[i]!CHANGE(from, view, batch[i]);
			outstanding[i]++
		:: !sending
		fi;
		c_had = true
	}
	/* capture_finish() */
	if
	:: known > 0 -> atomic { write_position(known); known = 0 }
	:: else
	fi;
	if
	:: sending ->
		atomic { sent = view; unconfirmed = true; sending = false;
			 view = 0; from = 0 }
#ifdef BUG_POSITION_FIRST
		atomic { write_position(sent) }
#endif
		/* dovetail_capture_wait(): until the answers are there, or until
		   the deadline. What was not answered is settled by the next
		   capture or by the closing. */
#ifdef ANSWERED
		outstanding[i] == 0
#endif
	:: else
	fi
}

/* dovetail_capture_close() */
inline close(i)
{
	atomic {
		settle(i);
		if
		:: unconfirmed -> cancel(i); unconfirmed = false
		:: !unconfirmed && unwritten -> write_position(sent)
		:: !unconfirmed && !unwritten
		fi;
		unwritten = false; sent = 0; seen = 0; view = 0; from = 0
	}
}

/* ---- a mail process ---- */

proctype mail(byte i)
{
	byte sent, seen, view, from, known;
	bool unconfirmed, unwritten, unclean, sending, c_marked, c_had, synced;

	{
		/* dovetail_mailbox_opened() */
		seen = end;
		do
		:: end < N ->
			/* dovetail_transaction_commit() */
#ifndef BUG_MARK_AFTER_COMMIT
			mark(i);
#endif
			seen = end;
			if
			:: atomic { end < N -> end++ }
			:: else
			fi;
#ifdef BUG_MARK_AFTER_COMMIT
			mark(i);
#endif
			capture(i)
		:: i == PROCS - 1 && !synced ->
			/* dovetail_sync_deinit() */
			synced = true;
			seen = end;
			capture(i)
		:: break
		od;
		close(i);
		/* dovetail_user_deinit() */
		atomic {
			if
			:: !unclean && c_marked && connected[i] ->
				to_queue[i]!CLEAN(0, 0, 0)
			:: else
			fi
		}
	} unless { kill[i] };
	atomic {
		if
		:: connected[i] -> to_queue[i]!END(0, 0, 0)
		:: else
		fi;
		cancel(i);
		sent = 0; seen = 0; view = 0; from = 0; known = 0;
		unconfirmed = false; unwritten = false; unclean = false;
		sending = false; c_marked = false; c_had = false; synced = false
	}
}

/* ---- dovetail-replay: replay_sweep() ---- */

active proctype worker()
{
	byte sent, seen, view, from, known, life;
	bool unconfirmed, unwritten, unclean, sending, c_marked, c_had;

end_idle:
	do
	:: atomic { working -> life = q_life; connected[WORKER] = true;
		    unclean = false }
		seen = end;
		capture(WORKER);
		/* CAPTURE_REPLAY_TIMEOUT_USECS is longer than anything the
		   queue waits for */
		outstanding[WORKER] == 0;
		close(WORKER);
		/* conn_handle_swept(), dovetail_queue_user_swept() */
		atomic {
			if
			:: life == q_life && working ->
				working = false;
				dirty = unclean || again;
				again = false
			:: else
			fi;
			unclean = false;
			life = 0
		}
	od
}

/* ---- what goes wrong ---- */

active proctype faults()
{
end_idle:
	do
	:: atomic { kills > 0 && !kill[0] -> kills--; kill[0] = true }
	/* they are alike */
	:: atomic { PROCS > 1 && kills > 0 && kill[0] && !kill[1] -> kills--; kill[1] = true }
	:: atomic { kills > 0 && q_up -> kills--; queue_dies() }
#ifdef MASTER_DIES
	/* the machine: everybody at once. What a process killed earlier had
	   written, and nobody had read, is lost. */
	:: atomic { kills > 0 -> kills = 0; queue_dies();
		    kill[0] = true; kill[1] = true }
#endif
	od
}

#ifdef IDLE_SWEEP
/* Over the mailboxes of all users, slowly, whether they are marked or not: here,
   when all else has come to rest. */
active proctype idle_sweep()
{
	timeout -> d_step { set_dirty() }
}
#endif

init
{
	atomic {
		run mail(0);
		if
		:: PROCS > 1 -> run mail(1)
		:: else
		fi
	}
}

ltl queued { <>[] QUEUED }
