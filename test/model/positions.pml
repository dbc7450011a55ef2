/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* Promise 1, the part of dovetail-queue-positions.c: what the queue's table says
   of a mailbox is believed by capture_records(), which then writes it into the
   header. So nothing before it may be missing in the stream, however changes
   of several processes overlap, and whichever of them Redis refuses.

   Processes send what is between the position they know and the log's end, and
   do not wait (dovetail_ack = local, or the timeout is over). A change is on its
   way until Redis took or refused it. Who had one refused begins again from the
   header, when all its answers are there (capture_settle()).

   check: safety
   large: -DN=5 -DREFUSED=2: safety
   fails: -DBUG_HOLE_ANY: safety
   fails: -DBUG_NO_HOLE: safety
   fails: -DBUG_POSITION_FIRST: safety */

#ifndef N
#define N 4		/* records */
#endif
#ifndef REFUSED
#define REFUSED 1
#endif
#define PROCS 2
#define WAY 3		/* changes on their way */
#define NOWHERE 15

#define BITS(lo, hi) (((1 << (hi)) - 1) & ~((1 << (lo)) - 1))

byte end, pos, stream, refused = REFUSED;
/* struct mailbox_position */
byte lo, hi, hole = NOWHERE, hole_end;
/* on their way; to 0: none. */
byte w_from[WAY], w_to[WAY], w_owner[WAY];
/* struct dovetail_mailbox */
byte sent[PROCS], view[PROCS], from[PROCS];
/* struct dovetail_queue_batch: one of its changes was refused */
bool bad[PROCS];
byte i, j, known;

/* The groups of a log go to Redis one after the other: their outcomes come in
   order, and the table counts on it. */
inline next()
{
	j = 0;
	do
	:: j < WAY - 1 ->
		w_from[j] = w_from[j + 1];
		w_to[j] = w_to[j + 1];
		w_owner[j] = w_owner[j + 1];
		j++
	:: else -> break
	od;
	w_from[j] = 0;
	w_to[j] = 0;
	w_owner[j] = 0;
	j = 0
}

/* dovetail_queue_positions_done() */
inline done(f, t, stored)
{
	if
	:: !(stored) ->
		hole_end = (hole == NOWHERE || t > hole_end -> t : hole_end);
		hole = (f < hole -> f : hole)
	:: else ->
		/* span_add() */
		if
		:: hi == 0 || f > hi -> lo = f; hi = t
		:: hi > 0 && f <= hi && t >= lo ->
			lo = (f < lo -> f : lo);
			hi = (t > hi -> t : hi)
		:: else
		fi;
#ifdef BUG_HOLE_ANY
		/* what begins before the hole, however short, and whatever
		   else is missing */
		if
		:: f <= hole -> hole = NOWHERE
		:: else
		fi
#else
		hole = (hole != NOWHERE && f <= hole && t > hole -> t : hole);
		hole = (hole != NOWHERE && hole >= hole_end -> NOWHERE : hole)
#endif
	fi;
#ifdef BUG_NO_HOLE
	hole = NOWHERE;
#endif
	hole_end = (hole == NOWHERE -> 0 : hole_end)
}

inline write_position(to)
{
	pos = to;
	assert((stream & BITS(0, pos)) == BITS(0, pos))
}

/* capture_run() of process i, first half: the view */
inline look()
{
	view[i] = end;
	from[i] = (sent[i] > pos -> sent[i] : pos)
}

/* ... second half; others may have looked later and be faster */
inline send()
{
	if
	:: true ->
		/* capture_records() asks */
		known = (hole == NOWHERE -> hi : 0);
		if
		:: known > from[i] -> from[i] = known; write_position(known)
		:: else
		fi
	:: true
	fi;
	if
	:: from[i] < view[i] && !(hi > 0 && lo <= from[i] && view[i] <= hi) ->
		j = 0;
		do
		:: w_to[j] > 0 -> j++
		:: else -> break
		od;
		w_from[j] = from[i];
		w_to[j] = view[i];
		w_owner[j] = i
	:: else
	fi;
	sent[i] = (from[i] > view[i] -> sent[i] : view[i]);
#ifdef BUG_POSITION_FIRST
	write_position(sent[i]);
#endif
	known = 0;
	view[i] = 0;
	from[i] = 0
}

#define FREE (w_to[0] == 0 || w_to[1] == 0 || w_to[2] == 0)
#define WAITS(n) ((w_to[0] > 0 && w_owner[0] == n) || \
	(w_to[1] > 0 && w_owner[1] == n) || (w_to[2] > 0 && w_owner[2] == n))
/* capture_settle() */
inline settle()
{
	if
	:: bad[i] -> sent[i] = 0; bad[i] = false
	:: else -> write_position(sent[i])
	fi
}

active proctype all()
{
end_idle:
	do
	:: end < N -> end++
	:: atomic { select(i : 0 .. PROCS - 1);
		    if
		    :: view[i] == 0 && sent[i] < end && !(bad[i] && !WAITS(i)) ->
			look()
		    :: view[i] > 0 && FREE -> send()
		    :: else
		    fi;
		    i = 0; j = 0 }
	:: atomic { select(i : 0 .. PROCS - 1);
		    if
		    :: view[i] == 0 && !WAITS(i) &&
		       (bad[i] || sent[i] > pos) -> settle()
		    :: else
		    fi;
		    i = 0 }
	:: d_step { w_to[0] > 0 ->
		stream = stream | BITS(w_from[0], w_to[0]);
		done(w_from[0], w_to[0], true);
		next() }
	:: d_step { w_to[0] > 0 && refused > 0 ->
		refused--;
		done(w_from[0], w_to[0], false);
		bad[0] = bad[0] || w_owner[0] == 0;
		bad[1] = bad[1] || w_owner[0] == 1;
		next() }
	od
}
