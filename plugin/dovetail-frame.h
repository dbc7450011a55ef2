#ifndef DOVETAIL_FRAME_H
#define DOVETAIL_FRAME_H

/* What mail processes, replay workers and doveadm say to dovetail-queue over
   its unix socket, and what it answers. And what it and doveadm say to
   dovetail-health over another.

   frame := u32 big-endian size of the rest  u8 type  payload
   payloads use the primitives of dovetail-wire.h.

   A connection starts with HELLO in both directions. Frames of one client are
   worked on in order; REPLYs come when they are ready, marked with the tag of
   the frame they answer. */

#include "dovetail-change.h"
#include "dovetail-wire.h"

#define DOVETAIL_FRAME_VERSION 1
#define DOVETAIL_FRAME_HEADER_SIZE 5
/* the largest change, and room for the fields before it */
#define DOVETAIL_FRAME_MAX_SIZE (DOVETAIL_CHANGE_MAX_SIZE + 1024)

enum dovetail_frame_type {
	/* --- from a client */
	/* num DOVETAIL_FRAME_VERSION, num pid, u8 enum dovetail_client_kind,
	   for a worker: num slot, num slots */
	DOVETAIL_FRAME_HELLO = 1,
	/* str user, and perhaps num tag: something of this user's is about to
	   be committed. Until CLEAN, the user counts as unqueued if the
	   connection ends. Answer, if there is a tag: REPLY, once the mark
	   outlives the service. */
	DOVETAIL_FRAME_MARK = 2,
	/* str user: all this process committed for the user was handed over.
	   What is not answered yet is the queue's to care for: if it cannot be
	   queued, the user is dirty. No answer. */
	DOVETAIL_FRAME_CLEAN = 3,
	/* str user: the process gave up (timeout, error, too large to wait
	   for): a worker shall read the user's mailboxes again. No answer. */
	DOVETAIL_FRAME_SWEEP = 4,
	/* num tag, u8 enum dovetail_ack_level (0: answer when queued,
	   1: the same, 2: answer when applied), change bytes to the end.
	   Answer: REPLY. */
	DOVETAIL_FRAME_CHANGE = 5,
	/* num tag, str user, guid mailbox, num index_id: how far is it queued?
	   Answer: POSITION. */
	DOVETAIL_FRAME_POSITION_GET = 6,
	/* num tag, u8 level: would a change reach that ack level now?
	   Answer: REPLY. */
	DOVETAIL_FRAME_CHECK = 7,
	/* num tag. Answer: STATUS. */
	DOVETAIL_FRAME_STATUS_GET = 8,
	/* worker: num rows as in DOVETAIL_FRAME_STATUS, one per peer and shard
	   it reads; they replace this worker's rows before. No answer. */
	DOVETAIL_FRAME_REPORT = 9,
	/* worker: str user, u8 ok: the sweep of the user that WORK asked for
	   is over; not ok: try again later */
	DOVETAIL_FRAME_SWEPT = 10,
	/* admin: num tag, job (dovetail-job.h). For those who may speak for all
	   users. Answers: JOB_RESULTs and JOB_PROGRESSes of each worker that
	   takes part, and its JOB_DONE; REPLY when all are done, or when
	   there will be no job. If the connection ends, so does the job. */
	DOVETAIL_FRAME_JOB = 11,
	/* From a worker, and from the queue to the admin. Worker: num id, admin:
	   num tag, num slot; then: result, progress, done. A worker sends
	   progress every second, and before done. */
	DOVETAIL_FRAME_JOB_RESULT = 12,
	DOVETAIL_FRAME_JOB_PROGRESS = 13,
	DOVETAIL_FRAME_JOB_DONE = 14,
	/* worker: troubles (dovetail-health-report.h) of single users: they
	   replace this worker's of before. No answer. */
	DOVETAIL_FRAME_TROUBLES = 15,
	/* From the queue to dovetail-health, every second: report
	   (dovetail-health-report.h). No answer. */
	DOVETAIL_FRAME_HEALTH = 16,
	/* From an admin to dovetail-health: num tag, str user ("": of the node
	   and its peers; "*": and of all users that are not ok).
	   Answer: STATUS. */
	DOVETAIL_FRAME_HEALTH_GET = 17,

	/* --- from the queue */
	/* num DOVETAIL_FRAME_VERSION, str node */
	DOVETAIL_FRAME_WELCOME = 65,
	/* num tag, u8 enum dovetail_reply, str text ("" for OK) */
	DOVETAIL_FRAME_REPLY = 66,
	/* num tag, num file_seq, num file_offset (0 0: not known) */
	DOVETAIL_FRAME_POSITION = 67,
	/* num tag, num rows, each: num fields, each: str key, str value.
	   The keys are below. */
	DOVETAIL_FRAME_STATUS = 68,
	/* to a worker: str user: sweep this user, then send SWEPT */
	DOVETAIL_FRAME_WORK = 69,
	/* to a worker: num id, job */
	DOVETAIL_FRAME_JOB_START = 70,
	/* to a worker: num id, u8: 1: every worker's part was complete, nothing
	   of the job is to be remembered; 0: nobody waits for it any more */
	DOVETAIL_FRAME_JOB_END = 71,
	/* to a worker: num id, u8: 1: the admin does not read its results,
	   send no more; 0: go on */
	DOVETAIL_FRAME_JOB_PAUSE = 72,
};

/* The keys of STATUS rows, which are those of "doveadm dovetail status". There
   is one row of the node itself (direction "self"), and for each peer one of what
   we send to it ("to") and one of what we replay of it ("from"):

     node          this node
     peer          the other one; "" in "self"
     direction     "self", "to", "from"
     role          of this node: "primary" in "to", "replica" in "from"
     connection    "ok", or what is wrong
     entries       "self": in Redis, and not confirmed by every peer;
                   "to": not confirmed by this peer;
                   "from": applied since the workers started
     bytes         the same in bytes ("self", "to")
     lag           age of the oldest such entry ("to"), or how long the last
                   applied one took ("from"), seconds with three decimals
     lag_entries   "to": as entries
     applied       when the entry applied last was sealed ("to") or applied
                   ("from"), UTC: 2026-01-31T13:00:00.123Z, or ""
     position      "to": per shard GENERATION-SEQ of that entry
     rejected      "to": entries of ours that the peer refused, and reports of
                   the peer that we refused; "from": entries of the peer that
                   we refused; "self": entries of the ack stream that no peer
                   had signed
     rejected_reasons  "from": "REASON=COUNT REASON=COUNT"
     set_aside     users whose changes could not be applied
     dirty_users   "self": users who wait for a sweep
     verified      "self": when the last routine verification of all users
                   ended here (as applied), or ""
     different     "self": mailboxes, lists of mailboxes and users in which the
                   last one, or the one that is running, found a difference
                   that is not repaired, or could not tell
     repaired      "self": ... that it found and that are repaired
     redis_since   "self": since when Redis is connected, or is not
     error         the last one, or ""

   The keys of REPORT rows: peer, shard, connection, position, lag, entries,
   rejected, rejected_reasons, set_aside, error, applied_time (seconds since
   1970); for dovetail-health: sealed (when the peer made the last entry that was
   applied, microseconds since 1970), redis_error, stuck, and of all that the worker
   has of the peer, in the row of its first shard: lacking, failing, differing,
   diverged (dovetail-health.h). One row of each worker has the peer
   "", and: verified_time (seconds since 1970), different, repaired. */

enum dovetail_client_kind {
	DOVETAIL_CLIENT_MAIL = 0,
	DOVETAIL_CLIENT_WORKER = 1,
	DOVETAIL_CLIENT_ADMIN = 2,
};

enum dovetail_reply {
	/* the asked ack level is reached */
	DOVETAIL_REPLY_OK = 0,
	/* not queued, and will not be by itself: Redis is away or the queue is
	   full. The mailbox has it; the user is swept later. */
	DOVETAIL_REPLY_UNAVAILABLE = 1,
	/* queued, but the replica could not apply it */
	DOVETAIL_REPLY_NOT_APPLIED = 2,
	/* the request makes no sense or is not allowed */
	DOVETAIL_REPLY_REFUSED = 3,
};

/* Start a frame at the end of buf; returns the offset to hand to _end(), which
   fills in the size. */
size_t dovetail_frame_begin(buffer_t *buf, enum dovetail_frame_type type);
void dovetail_frame_end(buffer_t *buf, size_t offset);

/* Look for a whole frame at the start of data. Returns 1 and its type and
   payload (pointing into data) and total size; 0: more bytes are needed;
   -1: not a frame (error_r, data stack). */
int dovetail_frame_parse(const unsigned char *data, size_t size,
			 enum dovetail_frame_type *type_r,
			 const unsigned char **payload_r, size_t *payload_size_r,
			 size_t *frame_size_r, const char **error_r);

#endif
