/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* Promises 2 and 3 at a mailbox: the changes of its log, as they come out of the
   stream, make of the replica what the primary has, each once and in order,
   though they overlap, come twice or not at all, and though dovetail-replay is
   killed between any two of its transactions. Promise 3's repair: who lacks
   something asks, and a snapshot answers.

   Record r of the primary's log stands in [r, r + 1). An even record adds a
   message, which is bit r of "has"; each record sets the flags, which are the
   last record's: applying an old one once more would turn them back. A replica at
   applied position p is right when it has the messages of the records before
   p, and p as flags.

   The stream is a queue here. It may lose an entry, which the chain shows with
   the next one (chain.pml); then the origin is asked for the state of all
   (SHARD_REQUEST). Heartbeats follow everything.

   check: safety equal
   large: -DN=3 -DCHANGES=1: safety equal
   fails: -DBUG_POSITION_FIRST: equal
   fails: -DBUG_CHAIN_FIRST: equal
   fails: -DBUG_NO_SKIP: safety
   fails: -DBUG_NO_GAP: safety
   fails: -DBUG_WANTED_FORGOTTEN: equal
   fails: -DBUG_ANY_ANSWER: equal
   fails: -DBUG_NO_SHARD_REQUEST: equal */

#ifndef N
#define N 2		/* records */
#endif
#ifndef CHANGES
#define CHANGES 1	/* that are captured once more */
#endif
#ifndef LOST
#define LOST 1		/* entries that Redis loses */
#endif
#ifndef CRASHES
#define CRASHES 1	/* of the replica's dovetail-replay */
#endif
#ifndef FAILED
#define FAILED 1	/* changes that cannot be applied: a full disk, say */
#endif

#define MESSAGES(p) (((1 << (p)) - 1) & 5)

mtype = { DELTA, SNAPSHOT, HEARTBEAT };

/* ---- the primary ---- */

byte end;
/* everything before it was accepted by the queue */
byte queued;
byte changes = CHANGES;
/* the entries that Redis has and the replica has not read: kind, from, to. A
   gap in the chain before an entry: lost. */
chan stream = [3] of { mtype, byte, byte, bool };
bool gap_next;
/* entries that were sent since the last heartbeat */
bool quiet_since = true;
byte lost = LOST, crashes = CRASHES, failed = FAILED;

/* ---- the replica: what a crash leaves ---- */

byte has, flags, applied;
/* STATE_DIR/replay/wanted: the mailbox, the shard */
bool wanted, wanted_shard;

/* the questions on their way to the primary */
bool request, shard_request;
/* struct wanted, in memory: asked; the answer has to reach so far; it has to
   be asked once more */
bool asked, again, shard_asked;
byte need;

inline send(kind, from, to)
{
	if
	:: lost > 0 && kind != HEARTBEAT -> lost--; gap_next = true
	:: true -> stream!kind(from, to, gap_next); gap_next = false
	fi;
	quiet_since = (kind == HEARTBEAT)
}

active proctype primary()
{
end_idle:
	do
	:: end < N -> end++
	/* capture_log(). Several processes send what is not queued, and perhaps
	   the queue forgot: from any place that is queued. A snapshot that was
	   begun before may be queued behind it. */
	:: atomic { end > queued && nfull(stream) ->
		send(DELTA, queued, end); queued = end }
	:: atomic { changes > 0 && queued > 0 && nfull(stream) ->
		changes--;
		if
		:: send(DELTA, 0, queued)
		:: send(DELTA, 0, 1)
		:: queued > 1 -> send(DELTA, queued - 1, queued)
		fi }
	/* log_heartbeat() */
	:: atomic { nfull(stream) && !quiet_since && end == N && queued == N ->
		send(HEARTBEAT, 0, 0) }
	od
}

/* The primary's dovetail-replay: apply_request(), shard_sweep_step(). Messages are
   read for a while before the snapshot is queued. */
active proctype answering()
{
	byte to;

end_idle:
	do
	:: atomic { request -> request = false; to = end }
		atomic { nfull(stream) ->
			 send(SNAPSHOT, 0, to); to = 0 }
	:: atomic { shard_request -> shard_request = false; to = end }
		atomic { nfull(stream) ->
			 send(SNAPSHOT, 1, to); to = 0 }
	od
}

/* ---- dovetail-replay ---- */

/* Replicas are right at their position, always; between the two transactions
   of a change messages may be there already. */
inline check_replica()
{
	assert((has & MESSAGES(applied)) == MESSAGES(applied));
	assert(flags == applied)
}

/* replay_wanted_add(), replay_wanted_passed() */
inline wanted_add(to)
{
	need = (!snapshot && to > need -> to : need);
	wanted = true
}

/* replay_wanted_arrived() */
inline wanted_arrived(to)
{
#ifndef BUG_ANY_ANSWER
	if
	:: again || to < need -> asked = false; again = false; need = 0
	:: else ->
#endif
		wanted = false;
		asked = false;
		again = false;
		need = 0
#ifndef BUG_ANY_ANSWER
	fi
#endif
}

active proctype replica()
{
	mtype kind;
	byte from, to;
	bool gap, snapshot;

end_idle:
	do
	/* stream_entry(): the entry stays until the chain's file is written */
	:: atomic { stream?<kind, from, to, gap> ->
#ifdef BUG_CHAIN_FIRST
		stream?kind, from, to, gap;
#endif
#ifndef BUG_NO_SHARD_REQUEST
		/* replay_wanted_add_shard(). A question that is open already
		   gets a new number: the answer on its way is none. */
		if
		:: gap -> wanted_shard = true; shard_asked = false
		:: else
		fi;
#endif
		snapshot = kind == SNAPSHOT }
		/* crash here: the entry comes again */
		if
		:: atomic { crashes > 0 -> crashes--; goto crashed }
		:: kind == HEARTBEAT -> goto next
		:: kind != HEARTBEAT
		fi;
		/* replay_wanted_passed() */
		need = (!snapshot && wanted && to > need -> to : need);
		/* replay_fits() */
		if
		:: failed > 0 -> atomic {
			/* REPLAY_FAILED */
			failed--; wanted_add(to); goto next }
		:: atomic { snapshot && (to > applied ||
			    (to == applied && wanted)) -> skip }
		/* REPLAY_FIT_OLD is no answer: that follows, or is asked for
		   again in time */
		:: atomic { snapshot && (to < applied ||
			    (to == applied && !wanted)) -> goto next }
#ifndef BUG_NO_GAP
		:: atomic { !snapshot && from > applied ->
			/* REPLAY_LACKING */
			wanted_add(to); goto next }
#endif
#ifndef BUG_NO_SKIP
		:: atomic { !snapshot && from <= applied && to <= applied ->
			goto next }
		:: !snapshot && from <= applied && to > applied
#else
		:: !snapshot && from <= applied
#endif
#ifdef BUG_NO_GAP
		:: !snapshot && from > applied && to > applied
#endif
		fi;
		/* replay_save_all() */
#ifdef BUG_POSITION_FIRST
		atomic { applied = to };
		if
		:: atomic { crashes > 0 -> crashes--; goto crashed }
		:: true
		fi;
#endif
		has = has | (MESSAGES(to) &
			     (snapshot -> 255 : ~MESSAGES(from)));
		if
		:: atomic { crashes > 0 -> crashes--; goto crashed }
		:: true
		fi;
		/* replay_update_all() */
		atomic {
			assert(to >= applied);
			flags = to; applied = to;
			 check_replica();
			 if
			 :: snapshot && wanted -> wanted_arrived(to)
			 :: else
			 fi }
		/* stream_state_write() */
next:
		atomic {
			if
			:: crashes > 0 -> crashes--; goto crashed
			:: true
			fi;
			if
			:: snapshot && from == 1 && shard_asked ->
				/* SHARD_SWEPT comes behind */
				wanted_shard = false; shard_asked = false
			:: else
			fi;
#ifndef BUG_CHAIN_FIRST
			stream?kind, from, to, gap;
#endif
			from = 0; to = 0; gap = false; snapshot = false }
	/* wanted_ask() */
	:: atomic { wanted && !asked -> asked = true; request = true }
	:: atomic { wanted_shard && !shard_asked ->
		shard_asked = true; shard_request = true }
	/* ... again, when nothing comes */
	:: atomic { wanted && asked && !request && empty(stream) &&
		    answering@end_idle -> asked = false }
	:: atomic { wanted_shard && shard_asked && !shard_request &&
		    empty(stream) && answering@end_idle ->
		shard_asked = false }
	od;

crashed:
	/* replay_wanted_init(): what an answer on its way is worth is not known
	   any more */
	atomic {
		asked = false;
		shard_asked = false;
		again = wanted;
		need = 0;
		from = 0; to = 0; gap = false; snapshot = false;
#ifdef BUG_WANTED_FORGOTTEN
		wanted = false;
		again = false;
		wanted_shard = false;
#endif
		goto end_idle
	}
}

ltl equal { <>[](end == N && applied == N && flags == N &&
	has == MESSAGES(N)) }
