/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* Promises 2 and 3 at the stream: whatever Redis loses, repeats, rolls back or
   is given by strangers, and whatever dies, the replica applies entries in order
   and none twice, and gets all that the origin was told is stored: as an entry,
   or as state it asks for when the chain shows that something is missing.

   An entry is known by its serial number, which stands for its hash. Its ID is
   GENERATION-SEQ (generation * 8 + seq here); prev is the hash of the one before.
   DATA says one thing; STATE is the state of all users, so everything that was
   sealed before it; SWEPT says that this was all. Heartbeats are DATA that come
   when nothing goes wrong any more.

   check: safety have
   check: -DPOWER_FAILURE -DSTATE_LOST -DDISTRUST: have
   large: -DDATAS=1 -DFAULTS=2: safety have
   large: -DDATAS=1 -DFAULTS=2 -DPOWER_FAILURE -DSTATE_LOST -DDISTRUST: have
   fails: -DBUG_NO_CHAIN: have
   fails: -DBUG_NO_REPEAT_CHECK: safety
   fails: -DBUG_NO_SIGNATURE: safety
   fails: -DDATAS=4 -DSTATE_LOST -DDISTRUST -DBUG_NO_GENERATION: have
   fails: -DDATAS=1 -DFAULTS=2 -DBUG_ANY_SWEPT: have
   fails: -DBUG_UNCERTAIN_IS_STORED: have
   fails: -DHEARTBEATS=1 -DDATAS=1 -DFAULTS=2 -DBUG_READ_PLACE_KEPT: have
   open: -DPOWER_FAILURE: have
   open: -DSTATE_LOST: have

   Open, as the code is: power fails where both the origin and Redis run, and both
   come back with the same older state, the one because its file was not synced,
   the other because its log was written once a second; or both are lost
   altogether. Then nothing shows that there were entries in between.
   DISTRUST would mend it: an origin that is not certain of its state file (it
   was written before this boot of the machine and not closed, or is gone)
   gives its first entry a random prev, which fits no chain, so that each replica
   asks for the state of all. */

#ifndef DATAS
#define DATAS 2		/* entries with changes */
#endif
#ifndef FAULTS
#define FAULTS 1
#endif
#ifndef SERIALS
#define SERIALS 20	/* enough for all the answers, which is asserted */
#endif
/* when nothing goes wrong any more. One does not do: it can get the very ID of
   somebody's rubbish that was read, and deleted since. */
#ifndef HEARTBEATS
#define HEARTBEATS 2
#endif

#define ID(generation, seq) ((generation) * 8 + (seq))
#define BIT(n) (1 << (n))
#define NO_HASH 0
#define STRANGER 31
#define LOST_HASH 30	/* random: it fits nothing */

mtype = { DATA, STATE, SWEPT };
mtype = { UNKNOWN, READY };

/* ---- the entries that ever were sealed, 1.. ---- */

byte serials;
mtype e_kind[SERIALS + 2];
byte e_id[SERIALS + 2], e_prev[SERIALS + 2], e_number[SERIALS + 2];
/* what the origin said is stored: waiters got OK */
int answered;

/* ---- Redis ---- */

/* which entries the stream has; the largest ID it ever had */
int stream;
byte stream_end;
/* a stranger's entry, at this ID; 0: none. It is rubbish, or a copy of this
   genuine one. */
byte stranger, copy;
/* what a snapshot on Redis' disk has */
int saved;
byte saved_end;

/* ---- the origin: its state file (what a power failure leaves), its memory ---- */

byte f_id, f_hash;
byte d_id, d_hash;
byte sent_id, sent_hash, stored_id, stored_hash;
byte clock;
byte inflight;		/* serial; 0: none */
bool arrived;		/* Redis has executed it */
bool late;		/* the connection broke; the command is still on its way */
byte late_serial;
mtype log_state = UNKNOWN;
#ifdef DISTRUST
bool booted;
#endif
/* DATA that was not stored, and is to be sealed anew */
bool requeued;

/* ---- the replica: its state files, its memory ---- */

byte c_id, c_hash;
bool wanted;
byte number;
bool asked;
int have;
byte read_id;
/* the question, and the answer that is being made */
byte question, answering;
bool state_sent;

byte faults = FAULTS, datas = DATAS, heartbeats = HEARTBEATS;
byte s, best, last, last_id;

/* group_send() */
inline seal(kind, num)
{
	serials++;
	assert(serials <= SERIALS);
	sent_id++;
	e_kind[serials] = kind;
	e_id[serials] = sent_id;
	e_prev[serials] = sent_hash;
	e_number[serials] = num;
	sent_hash = serials;
	/* dovetail_queue_state_write() */
	f_id = sent_id;
	f_hash = sent_hash;
	inflight = serials;
	arrived = false
}

/* XADD */
inline xadd(serial)
{
	if
	:: e_id[serial] > stream_end ->
		stream = stream | BIT(serial);
		stream_end = e_id[serial]
	:: else
	fi
}

inline group_stored(serial)
{
	stored_id = e_id[serial];
	stored_hash = serial;
	answered = answered | BIT(serial)
}

/* log_new_generation() */
inline new_generation()
{
	/* the clock; it grows, so not even with all state lost an ID comes
	   again */
	clock++;
	sent_id = ID((sent_id / 8 >= clock -> sent_id / 8 + 1 : clock), 0);
	if
	:: sent_id <= stream_end -> sent_id = ID(stream_end / 8 + 1, 0)
	:: else
	fi;
	sent_hash = stored_hash;
	stored_id = sent_id
}

/* What XREVRANGE shows */
inline last_entry()
{
	last = 0;
	last_id = 0;
	s = 1;
	do
	:: s <= serials ->
		if
		:: (stream & BIT(s)) && e_id[s] >= last_id ->
			last = s;
			last_id = e_id[s]
		:: else
		fi;
		s++
	:: else -> break
	od;
	if
	:: stranger > last_id -> last = STRANGER; last_id = stranger
	:: else
	fi;
	s = 0
}

/* log_sync(), log_synced() */
inline sync()
{
	last_entry();
	if
	:: inflight > 0 && last == inflight && stream_end == last_id ->
		group_stored(inflight);
		inflight = 0
	:: else
	fi;
	/* log_sync_is_known() */
	if
	:: inflight == 0 &&
	   ((stored_id % 8 != 0 && last == stored_hash &&
	     last_id == stored_id && stream_end == last_id) ||
	    (stored_id % 8 == 0 && stored_id > 0 && stream_end < stored_id)) ->
		/* as known */
#ifdef DISTRUST
		if
		:: booted -> stored_hash = LOST_HASH; new_generation()
		:: else
		fi
#else
		skip
#endif
	:: else ->
		if
		:: inflight > 0 ->
			/* group_requeue() */
			requeued = e_kind[inflight] == DATA;
#ifdef BUG_UNCERTAIN_IS_STORED
			answered = answered | BIT(inflight);
			requeued = false;
#endif
			state_sent = (e_kind[inflight] == STATE -> false :
				      state_sent);
			inflight = 0
		:: else
		fi;
#ifdef DISTRUST
		stored_hash = (booted -> LOST_HASH : stored_hash);
#endif
#ifndef BUG_NO_GENERATION
		new_generation()
#else
		sent_hash = stored_hash;
		sent_id = (sent_id == 0 -> ID(1, 0) : sent_id);
		stored_id = sent_id
#endif
	fi;
#ifdef DISTRUST
	booted = false;
#endif
	log_state = READY;
	last = 0;
	last_id = 0
}

inline origin_dies()
{
	late = inflight > 0 && !arrived;
	late_serial = (late -> inflight : 0);
	inflight = 0;
	arrived = false;
	requeued = false;
	answering = 0;
	state_sent = false;
	sent_id = f_id;
	sent_hash = f_hash;
	stored_id = f_id;
	stored_hash = f_hash;
	log_state = UNKNOWN
}

active proctype origin()
{
end_idle:
	do
	:: d_step { log_state == UNKNOWN -> sync() }
	/* dovetail_queue_log_kick(): changes, or a heartbeat */
	:: d_step { log_state == READY && inflight == 0 &&
		    (requeued || datas > 0 || (faults == 0 && heartbeats > 0)) ->
		if
		:: requeued -> requeued = false
		:: !requeued && datas > 0 -> datas--
		:: !requeued && datas == 0 -> heartbeats--
		fi;
		seal(DATA, 0) }
	/* replay_shard_requested(), shard_sweep_step() */
	:: d_step { question > 0 && answering == 0 ->
		answering = question; question = 0; state_sent = false }
	:: d_step { log_state == READY && inflight == 0 && answering > 0 ->
		if
		:: !state_sent -> seal(STATE, 0); state_sent = true
		:: state_sent -> seal(SWEPT, answering); answering = 0
		fi }
	:: d_step { inflight > 0 && !arrived && log_state == READY ->
		arrived = true; xadd(inflight) }
	/* log_xadd_reply() */
	:: d_step { inflight > 0 && arrived && log_state == READY ->
		if
		:: (stream & BIT(inflight)) -> group_stored(inflight);
			inflight = 0; arrived = false
		:: !(stream & BIT(inflight)) && stream_end >= e_id[inflight] ->
			/* log_xadd_error(): "equal or smaller" */
			requeued = e_kind[inflight] == DATA;
			sent_hash = stored_hash;
			inflight = 0; arrived = false;
			log_state = UNKNOWN
		:: else -> group_stored(inflight);
			inflight = 0; arrived = false
		fi }
	od
}

/* stream_entry() */
inline entry(serial)
{
	if
#ifndef BUG_NO_REPEAT_CHECK
	:: e_id[serial] <= c_id -> skip	/* DOVETAIL_OPEN_REPEATED */
	:: e_id[serial] > c_id ->
#else
	:: true ->
#endif
#ifndef BUG_NO_CHAIN
		if
		:: (c_id > 0 || c_hash > 0 || e_prev[serial] != NO_HASH) &&
		   e_prev[serial] != c_hash ->
			/* replay_wanted_add_shard() */
			wanted = true;
			number++;
			asked = false
		:: else
		fi;
#endif
		/* in the order of their IDs, and none twice */
		assert(e_id[serial] > c_id);
		if
		:: e_kind[serial] == DATA -> have = have | BIT(serial)
		:: e_kind[serial] == STATE ->
			have = have | (BIT(serial + 1) - 1)
		:: e_kind[serial] == SWEPT ->
			/* replay_wanted_shard_arrived() */
			have = have | BIT(serial);
#ifndef BUG_ANY_SWEPT
			if
			:: wanted && e_number[serial] == number ->
#else
			if
			:: wanted ->
#endif
				wanted = false
			:: else
			fi
		fi;
		c_id = e_id[serial];
		c_hash = serial
	fi
}

/* The next one that XREAD gives */
inline next_entry()
{
	best = 0;
	s = 1;
	do
	:: s <= serials ->
		if
		:: (stream & BIT(s)) && e_id[s] > read_id &&
		   (best == 0 || e_id[s] < e_id[best]) -> best = s
		:: else
		fi;
		s++
	:: else -> break
	od;
	s = 0;
	if
	:: stranger > read_id && (best == 0 || stranger < e_id[best]) ->
		best = STRANGER
	:: else
	fi
}

active proctype replica()
{


end_idle:
	do
	:: d_step { read_id < stream_end ->
		next_entry();
		if
		:: best == 0 -> read_id = stream_end
		:: best == STRANGER ->
			read_id = stranger;
			if
			:: copy > 0 -> best = copy; entry(best)
			:: else
			fi;
#ifdef BUG_NO_SIGNATURE
			c_id = stranger;
			assert(false);
#endif
		:: best > 0 && best != STRANGER ->
			read_id = e_id[best];
			entry(best)
		fi;
		best = 0 }
#ifndef BUG_READ_PLACE_KEPT
	/* stream_check_end(), streams_reader_ready() */
	:: d_step { read_id > stream_end && read_id != c_id -> read_id = c_id }
#endif
	/* wanted_ask() */
	:: d_step { wanted && !asked -> asked = true; question = number }
	:: d_step { wanted && asked && question == 0 && answering == 0 &&
		    read_id >= stream_end && inflight == 0 && faults == 0 ->
		question = number }
	/* it dies and starts: between an entry and its file is replay.pml's
	   matter */
	:: d_step { faults > 0 -> faults--; read_id = c_id; asked = false;
		    number++ }
	od
}

active proctype redis()
{
end_idle:
	do
	/* a command that was on its way when its sender died */
	:: d_step { late -> xadd(late_serial); late = false; late_serial = 0 }
	:: d_step { late -> late = false; late_serial = 0 }
	/* Redis writes a snapshot, or the kernel the origin's state file */
	:: d_step { faults > 0 && saved != stream -> saved = stream;
		    saved_end = stream_end }
	:: d_step { faults > 0 && d_hash != f_hash -> d_id = f_id;
		    d_hash = f_hash }
	/* FLUSHALL, by somebody */
	:: d_step { faults > 0 && stream != 0 -> faults--; stream = 0;
		    stream_end = 0; stranger = 0; copy = 0 }
	/* killed, and starts from its snapshot; the connection breaks */
	:: d_step { faults > 0 -> faults--;
		    late = inflight > 0 && !arrived;
		    late_serial = (late -> inflight : 0);
		    arrived = inflight > 0;
		    stream = saved; stream_end = saved_end; stranger = 0; copy = 0;
		    log_state = UNKNOWN; read_id = c_id }
	/* only the connection */
	:: d_step { faults > 0 && inflight > 0 -> faults--;
		    late = !arrived;
		    late_serial = (late -> inflight : 0);
		    arrived = true;
		    log_state = UNKNOWN }
	/* the first or the last entry is deleted */
	:: d_step { faults > 0 && stream != 0 -> faults--;
		    last_entry();
		    stream = (last == STRANGER -> stream :
			      stream & ~BIT(last));
		    last = 0; last_id = 0 }
	/* somebody adds what is no entry, or an old one again */
	:: atomic { faults > 0 && stranger == 0 -> faults--;
		    if
		    :: true
		    :: serials > 0 -> copy = 1
		    fi;
		    stranger = ID(stream_end / 8, stream_end % 8 + 1);
		    stream_end = stranger }
	/* the origin's queue service is killed */
	:: d_step { faults > 0 -> faults--; origin_dies() }
#ifdef STATE_LOST
	/* its state directory is gone */
	:: d_step { faults > 0 -> faults--; f_id = 0; f_hash = 0;
#ifdef DISTRUST
		    booted = true;
#endif
		    origin_dies() }
	/* ... and all in Redis */
	:: d_step { faults > 0 -> faults--; f_id = 0; f_hash = 0;
#ifdef DISTRUST
		    booted = true;
#endif
		    origin_dies(); late = false; late_serial = 0;
		    stream = 0; stream_end = 0; stranger = 0; copy = 0 }
#endif
#ifdef POWER_FAILURE
	/* Power fails: what was not on the disk is not in the state file ... */
	:: d_step { faults > 0 -> faults--; f_id = d_id; f_hash = d_hash;
#ifdef DISTRUST
		    booted = true;
#endif
		    origin_dies() }
	/* ... and Redis is on the same machine */
	:: d_step { faults > 0 -> faults--; f_id = d_id; f_hash = d_hash;
		    origin_dies(); late = false; late_serial = 0;
#ifdef DISTRUST
		    booted = true;
#endif
		    stream = saved; stream_end = saved_end; stranger = 0; copy = 0 }
#endif
	/* nothing more */
	:: d_step { faults > 0 -> faults = 0 }
	od
}

ltl have { <>[]((have & answered) == answered && !wanted) }
