/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* Promise 8: no mail is lost in a conflict. Two nodes, a change of the primary by
   "promote" on either side, with or without a connection, both taking writes:
   in the end both have every message, under the same UIDs, and no UID that the
   primary of the last epoch gave has ever changed.

   This is the design: the code has the epoch in each entry and refuses an older
   one (DOVETAIL_OPEN_STALE_EPOCH), a user's primary by configuration
   (apply_opened()), and the fence; promote and tentative writes are to come.

   An epoch is a number and the node that took it: two nodes which are promoted
   without hearing of each other must not get the same.

   check: safety converged
   large: -DPROMOTIONS=3: safety converged
   fails: -DBUG_OLD_EPOCH_ACCEPTED: safety
   fails: -DBUG_EPOCHS_ALIKE: converged
   fails: -DBUG_TAIL_DROPPED: converged
   fails: -DBUG_TENTATIVE_KEEPS_UID: safety
   fails: -DBUG_NOT_TENTATIVE: safety */

#define M 3		/* messages, 0.. */
#ifndef PROMOTIONS
#define PROMOTIONS 2
#endif
#define NONE 0
#define TENTATIVE 15	/* shown, with a UID above all others */

#define UID(n, m) uid[(n) * M + (m)]
#define OTHER(n) (1 - (n))

/* number * 2 + node */
byte epoch[2];
bool primary[2];
byte uid[2 * M], uid_next[2];
byte written, promotions = PROMOTIONS;
/* entries on their way to a node: epoch, message, UID. The stream keeps them
   while the node is away. */
chan stream0 = [2] of { byte, byte, byte };
chan stream1 = [2] of { byte, byte, byte };
/* of each message: it is in the other's stream, for this epoch */
byte sent[2 * M];
byte i;

inline give_uid(n, m)
{
	uid_next[n]++;
	UID(n, m) = uid_next[n];
	sent[(n) * M + (m)] = 0
}

/* The state of the new primary comes first, as a snapshot. */
inline follow(n, o)
{
	epoch[n] = epoch[o];
	primary[n] = false;
	i = 0;
	do
	:: i < M ->
		if
		:: UID(o, i) != NONE && UID(o, i) != TENTATIVE ->
			UID(n, i) = UID(o, i)
		:: UID(n, i) != NONE &&
		   (UID(o, i) == NONE || UID(o, i) == TENTATIVE) ->
#if defined(BUG_TAIL_DROPPED)
			UID(n, i) = NONE
#elif defined(BUG_TENTATIVE_KEEPS_UID)
			skip
#else
			UID(n, i) = TENTATIVE
#endif
		:: else
		fi;
		sent[(n) * M + i] = 0;
		i++
	:: else -> break
	od;
	i = 0;
	uid_next[n] = uid_next[o]
}

/* An entry of the other node's log */
inline apply(n, e, m, u)
{
	if
#ifdef BUG_OLD_EPOCH_ACCEPTED
	:: true ->
		/* the primary's UIDs stay */
		assert(!primary[n] || UID(n, m) == NONE || UID(n, m) == u);
#else
	:: e == epoch[n] ->
#endif
		UID(n, m) = u;
		uid_next[n] = (u > uid_next[n] -> u : uid_next[n]);
		unique(n)
	:: else	/* DOVETAIL_OPEN_STALE_EPOCH, or follow() comes first */
	fi
}

inline unique(n)
{
	assert(UID(n, 0) == NONE || UID(n, 0) == TENTATIVE ||
	       UID(n, 0) != UID(n, 1));
	assert(UID(n, 0) == NONE || UID(n, 0) == TENTATIVE ||
	       UID(n, 0) != UID(n, 2));
	assert(UID(n, 1) == NONE || UID(n, 1) == TENTATIVE ||
	       UID(n, 1) != UID(n, 2))
}

#define MINE(n, m) (UID(n, m) != NONE && UID(n, m) != TENTATIVE)

inline node_write(n)
{
	if
	:: primary[n] -> give_uid(n, written)
#ifdef BUG_NOT_TENTATIVE
	:: !primary[n] -> give_uid(n, written)
#else
	:: !primary[n] -> UID(n, written) = TENTATIVE
#endif
	fi;
	written++
}

inline node_promote(n)
{
	promotions--;
#ifdef BUG_EPOCHS_ALIKE
	epoch[n] = epoch[n] + 2;
#else
	epoch[n] = (epoch[n] / 2 + 1) * 2 + n;
#endif
	primary[n] = true;
	/* what was tentative here is now ordered here */
	i = 0;
	do
	:: i < M ->
		if
		:: UID(n, i) == TENTATIVE -> give_uid(n, i)
		:: else
		fi;
		sent[n * M + i] = 0;
		i++
	:: else -> break
	od;
	i = 0
}

#define MAY_SEND(m) (primary[n] && nfull(out) && MINE(n, m) && \
	sent[n * M + m] != epoch[n])
inline send(m)
{
	sent[n * M + m] = epoch[n];
	out!epoch[n], m, UID(n, m)
}

#define MAY_ORDER(m) (!primary[n] && primary[OTHER(n)] && \
	epoch[n] == epoch[OTHER(n)] && UID(n, m) == TENTATIVE && \
	UID(OTHER(n), m) == NONE)

proctype node(byte n; chan out; chan in)
{
	byte e, m, u;

end_idle:
	do
	:: atomic { written < M -> node_write(n); unique(n) }
	:: atomic { promotions > 0 && !primary[n] -> node_promote(n); unique(n) }
	/* capture, queue */
	:: atomic { MAY_SEND(0) -> send(0) }
	:: atomic { MAY_SEND(1) -> send(1) }
	:: atomic { MAY_SEND(2) -> send(2) }
	/* replay */
	:: atomic { in?e, m, u -> apply(n, e, m, u); e = 0; m = 0; u = 0 }
	/* it hears of a higher epoch, at last */
	:: atomic { epoch[OTHER(n)] > epoch[n] && primary[OTHER(n)] ->
		follow(n, OTHER(n)); unique(n) }
	/* a tentative write goes to the primary, is ordered there, and comes
	   back */
	:: atomic { MAY_ORDER(0) -> give_uid(OTHER(n), 0) }
	:: atomic { MAY_ORDER(1) -> give_uid(OTHER(n), 1) }
	:: atomic { MAY_ORDER(2) -> give_uid(OTHER(n), 2) }
	od
}

init
{
	atomic {
		if
		:: primary[0] = true
		:: true	/* a third node was, and is lost */
		fi;
		epoch[0] = 2;
		epoch[1] = 2;
		run node(0, stream1, stream0);
		run node(1, stream0, stream1)
	}
}

#define ALL(n) (MINE(n, 0) && MINE(n, 1) && MINE(n, 2))
#define SAME (UID(0, 0) == UID(1, 0) && UID(0, 1) == UID(1, 1) && \
	UID(0, 2) == UID(1, 2))
ltl converged { <>[](written == M && ((!primary[0] && !primary[1]) ||
	(ALL(0) && ALL(1) && SAME && primary[0] + primary[1] == 1))) }
