/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* Promises 3 and 4: that replicas are equal is noticed, and where they are not,
   it is repaired, from the primary to the replica; what only the replica has is
   kept. Without a difference there is no alarm.

   A mailbox is a set of messages (bits) and its flags (a number), at a position
   of the primary's log. Each change carries the digest of the mailbox after it,
   which is the whole state here. Changes, questions and answers are in the order
   of the stream. A digest says something of the same position only.

   Somebody edits the replica by hand: a message more, one less, other flags. Or
   the primary is restored from a backup, or loses with power what its log had
   not on the disk: its position goes back, and its next changes stand at places
   that the replica has passed (ROLLBACK).

   check: safety equal
   check: -DROLLBACK: safety equal
   large: -DN=4 -DEDITS=2 -DROLLBACK: safety equal
   fails: -DBUG_NO_DIGEST: equal
   fails: -DBUG_NO_VERIFY: equal
   fails: -DBUG_COMPARE_ANYWHERE: safety
   fails: -DBUG_POSITION_NOT_READ_AGAIN: safety
   fails: -DBUG_EXTRA_DESTROYED: equal
   fails: -DROLLBACK -DBUG_BACK_IS_A_REPEAT: equal */

#ifndef N
#define N 3		/* changes */
#endif
#ifndef EDITS
#define EDITS 1
#endif

mtype = { DELTA, DIGEST, STATE };

/* The primary: change n adds message n - 1 and sets the flags to n, plus 8 when it
   is of the time after the restore. */
byte end, p_flags, era;
int p_has, saved_has;
byte saved, saved_flags;
bool idle;
bool restored;

/* the replica */
byte applied, flags;
int has;
/* what only the replica had: a folder of the user's */
int kept;
/* what was put here by hand */
int extra;
bool diverged, asked, digest_asked;
/* how far changes came since the question */
byte need, digest_need;

/* kind, from, to, the primary's messages and flags at "to" */
chan stream = [3] of { mtype, byte, byte, int, byte };
bool request_digest, request_state, verified;
byte edits = EDITS;
#define EXTRA (1 << 12)
/* the message that a change adds, as its flags say */
#define MESSAGE(n, f) (1 << ((n) - 1 + ((f) > 8 -> 6 : 0)))

#define TOUCHED (edits < EDITS || restored)
#define EQUAL (applied == end && has == p_has && flags == p_flags)

active proctype primary()
{
end_idle:
	do
	/* the digest of the mailbox goes with each change */
	:: atomic { end < N && nfull(stream) && !idle ->
		end++;
		p_flags = end + era;
		p_has = p_has | MESSAGE(end, p_flags);
		stream!DELTA(end - 1, end, p_has, p_flags) }
	:: atomic { !idle -> idle = true }
	od
}

/* Messages are read for a while before an answer is queued: changes may overtake
   it. */
active proctype answering()
{
	byte to, a_flags;
	int a_has;

end_idle:
	do
	:: atomic { request_state -> request_state = false;
		to = end; a_has = p_has; a_flags = p_flags }
		atomic { nfull(stream) ->
			stream!STATE(to, to, a_has, a_flags);
			to = 0; a_has = 0; a_flags = 0 }
	:: atomic { request_digest -> request_digest = false;
		to = end; a_has = p_has; a_flags = p_flags }
		atomic { nfull(stream) ->
			stream!DIGEST(to, to, a_has, a_flags);
			to = 0; a_has = 0; a_flags = 0 }
	od
}

inline difference()
{
	/* no alarm without a cause */
	assert(TOUCHED);
	diverged = true
}

active proctype replica()
{
	mtype kind;
	byte from, to, d_flags;
	int d_has;

end_idle:
	do
	:: atomic { stream?kind, from, to, d_has, d_flags ->
		need = (kind == DELTA && asked && to > need -> to : need);
		digest_need = (kind == DELTA && digest_asked &&
			       to > digest_need -> to : digest_need);
		digest_asked = (kind == DIGEST -> false : digest_asked);
		if
		:: kind == DELTA && from == applied && to > applied ->
			/* replay_mailbox_apply(), then the comparison */
			has = has | MESSAGE(to, d_flags);
			flags = d_flags;
			applied = to;
#ifndef BUG_NO_DIGEST
			if
			:: has != d_has || flags != d_flags -> difference()
			:: else
			fi
#endif
		:: kind == DELTA && from != applied && to > applied ->
			/* REPLAY_LACKING */
			difference()
		:: kind == DELTA && to <= applied ->
			/* REPLAY_FIT_SKIP: a repeat, or the primary went back.
			   That shows when one asks where it is. */
#ifndef BUG_BACK_IS_A_REPEAT
			verified = false
#else
			skip
#endif
#ifndef BUG_NO_DIGEST
		:: kind == DIGEST && to == applied ->
			if
			:: has != d_has || flags != d_flags -> difference()
			:: else
			fi
#ifdef BUG_COMPARE_ANYWHERE
		:: kind == DIGEST && to != applied -> difference()
#else
		/* it was overtaken, and says nothing */
		:: kind == DIGEST && to < applied && digest_need > to ->
			verified = false
		/* the primary is not where it was */
#ifndef BUG_BACK_IS_A_REPEAT
		:: kind == DIGEST && to < applied && digest_need <= to ->
			difference()
#else
		:: kind == DIGEST && to < applied && digest_need <= to
#endif
		:: kind == DIGEST && to > applied -> difference()
#endif
#else
		:: kind == DIGEST
#endif
#ifndef BUG_POSITION_NOT_READ_AGAIN
		:: kind == STATE && to < need ->
			/* older than what came before it: ask again */
			need = 0; asked = false
		:: kind == STATE && to >= need ->
#else
		:: kind == STATE ->
#endif
			/* back only when the primary went back */
			assert(to >= applied || restored);
			/* the primary's messages, flags and position; what is
			   here only, elsewhere */
#ifndef BUG_EXTRA_DESTROYED
			kept = kept | (has & ~d_has);
#endif
			has = d_has;
			flags = d_flags;
			applied = to;
			diverged = false;
			asked = false;
			need = 0
		fi;
		kind = 0; from = 0; to = 0; d_has = 0; d_flags = 0;
		digest_need = (digest_asked -> digest_need : 0) }
	:: atomic { diverged && !asked -> asked = true; request_state = true }
#ifndef BUG_NO_VERIFY
	/* "verify", from time to time; at the end once more */
	:: atomic { !verified && !digest_asked -> verified = true;
		digest_asked = true; digest_need = 0; request_digest = true }
#endif
	od
}

active proctype hands()
{
end_idle:
	do
	:: atomic { edits > 0 -> edits--; verified = false;
		if
		:: has = has | EXTRA; extra = EXTRA
		:: (has & 1) -> has = has & ~1
		:: flags > 0 -> flags = 7
		:: true
		fi }
#ifdef ROLLBACK
	:: atomic { !restored && saved == 0 && end > 0 -> saved = end;
		saved_has = p_has; saved_flags = p_flags }
	:: atomic { !restored && saved > 0 && end > saved ->
		restored = true; verified = false; era = 8;
		end = saved; p_has = saved_has; p_flags = saved_flags }
#endif
	od
}

ltl equal { <>[](EQUAL && ((has | kept) & extra) == extra) }
