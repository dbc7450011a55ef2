#ifndef DOVETAIL_JOB_H
#define DOVETAIL_JOB_H

/* A job looks at users one after the other, and has each replica compare each of
   their mailboxes with the primary's (DOVETAIL_CHANGE_VERIFY): to verify them, to
   repair them, or to seed a replica, of which everything differs.

     doveadm ──JOB──> dovetail-queue ──JOB_START──> the workers of the users
             <─RESULT, PROGRESS, DONE─    <─RESULT, PROGRESS, DONE─

   These are the payloads of those frames (dovetail-frame.h), behind their first
   fields:

     job       u8 enum dovetail_verify_flags  str users  num rate  u8 resume
     result    str user  str mailbox  str peer
               u8 enum dovetail_verified_result  num messages
               num texts, each: str
     progress  u8 waiting, then num each: users, users_all, users_before,
               users_elsewhere, mailboxes, messages, equal, different, repaired,
               unknown, bytes
     done      u8 enum dovetail_job_end  str text */

#include "dovetail-change.h"
#include "dovetail-wire.h"

#define DOVETAIL_JOB_USERS_MAX_LEN 1024

struct dovetail_job {
	enum dovetail_verify_flags flags;
	/* one user; or with the wildcards * and ?, all users of that name */
	const char *users;
	/* messages per second, at most; 0: no limit */
	uint32_t rate;
	/* wildcards only: go on behind the last user that the same job had
	   finished when it was interrupted */
	bool resume;
};

/* What a peer said of a mailbox, or why it did not. */
struct dovetail_job_result {
	const char *user;
	/* virtual name; "": the list of mailboxes and subscriptions, or all of
	   the user */
	const char *mailbox;
	/* "": it is not of a peer */
	const char *peer;
	enum dovetail_verified_result result;
	/* in the primary's mailbox */
	uint32_t messages;
	/* differences or reasons, for people */
	ARRAY_TYPE(const_string) texts;
};

/* Of one worker's part. */
struct dovetail_job_progress {
	/* not begun: the worker is busy with another job of many users */
	bool waiting;
	/* finished; in all; of the finished ones those of before the job was
	   interrupted, and those whose primary is another node */
	uint64_t users, users_all, users_before, users_elsewhere;
	/* asked about and answered; the messages in them */
	uint64_t mailboxes, messages;
	/* of the mailboxes. A list of mailboxes, or a user that could not be
	   opened, counts in the last three only. */
	uint64_t equal, different, repaired, unknown;
	/* of the bodies that the peers asked the worker for meanwhile */
	uint64_t bytes;
};

enum dovetail_job_end {
	/* all was asked and answered */
	DOVETAIL_JOB_COMPLETE = 0,
	/* it stopped on its way; text says why */
	DOVETAIL_JOB_FAILED = 1,
	/* the only user: is not in the userdb */
	DOVETAIL_JOB_NO_USER = 2,
	/* the only user: another node is the primary */
	DOVETAIL_JOB_ELSEWHERE = 3,
};

/* users has wildcards. */
bool dovetail_job_is_of_many(const struct dovetail_job *job);

void dovetail_job_put(buffer_t *buf, const struct dovetail_job *job);
void dovetail_job_result_put(buffer_t *buf,
			     const struct dovetail_job_result *result);
void dovetail_job_progress_put(buffer_t *buf,
			       const struct dovetail_job_progress *progress);
void dovetail_job_done_put(buffer_t *buf, enum dovetail_job_end end,
			   const char *text);

/* Read to the end. FALSE: it makes no sense. Strings are allocated from pool. */
bool dovetail_job_get(struct dovetail_wire_reader *r, pool_t pool,
		      struct dovetail_job *job_r);
bool dovetail_job_result_get(struct dovetail_wire_reader *r, pool_t pool,
			     struct dovetail_job_result *result_r);
bool dovetail_job_progress_get(struct dovetail_wire_reader *r,
			       struct dovetail_job_progress *progress_r);
bool dovetail_job_done_get(struct dovetail_wire_reader *r, pool_t pool,
			   enum dovetail_job_end *end_r, const char **text_r);

#endif
