/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* This worker's part of jobs (dovetail-job.h): for each user it goes over, the tree
   and each mailbox are put into our log with a number, as VERIFY or TREE, and each
   peer answers with that number in its own log (VERIFIED). One mailbox at a time,
   and other things in between, while the questions before it are still open.

   A mailbox that differs is asked about again before that is told: another process
   may have been between changing it and queueing that.

   Of jobs that go over many users one runs at a time; those of one user do not
   wait for it. The round, which nobody asked for (dovetail-replay-round.c), waits
   for all others, and goes on when the peers have answered for a user, so that it
   is never ahead of them. What it finds different is repaired. How far a job came stands in a file, for the next job like it that is
   to resume: one line "FLAGS TAB USERS TAB SLOTS TAB SHARDS TAB LAST-USER". */

#include "lib.h"
#include "array.h"
#include "buffer.h"
#include "ioloop.h"
#include "istream.h"
#include "llist.h"
#include "sort.h"
#include "str.h"
#include "strescape.h"
#include "write-full.h"
#include "mail-storage-private.h"
#include "mail-namespace.h"
#include "mail-user.h"
#include "mailbox-list-iter.h"
#include "dovetail-compat.h"
#include "dovetail-frame.h"
#include "dovetail-job.h"
#include "dovetail-name.h"
#include "dovetail-queue-client.h"
#include "dovetail-replay.h"

#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

/* Questions of a job that are open at once. */
#define JOB_QUESTIONS_MAX 64
/* How often a mailbox is asked about before it counts as different, or as not
   answered. */
#define JOB_TRIES 3
#define JOB_TRY_AGAIN_USECS 500000
/* How long an answer may take when a peer has come to the question. Then it is lost,
   and asked for again. A peer that reads messages for it, or asks us for some, takes
   longer. */
#define JOB_ANSWER_SECS 20
#define JOB_SLOW_ANSWER_SECS 600
#define JOB_SLOW_MESSAGES_PER_SEC 100
/* Meanwhile it is asked again, doubling: a peer that is at it takes the new question
   for the old one, and one that was restarted has forgotten that. */
#define JOB_REPEAT_SECS 20
#define JOB_REPEATS_MAX 8
/* A peer that has confirmed nothing at all for so long is away. */
#define JOB_PEER_AWAY_SECS 60
/* Questions that are older have us look how far the peers are. */
#define JOB_LOOK_SECS 5
/* How long nothing can be queued before the job gives up, and how often it
   tries. */
#define JOB_QUEUE_AWAY_SECS 60
#define JOB_QUEUE_RETRY_USECS 1000000
#define JOB_TICK_MSECS 1000

#define USECS_PER_SEC ((uint64_t)1000000)

struct job_answer {
	/* 0: none yet */
	enum dovetail_verified_result result;
	ARRAY_TYPE(const_string) texts;
};

/* A mailbox or a tree that the peers are asked about. */
struct job_question {
	/* of the job, in the order of its users */
	struct job_question *prev, *next;
	pool_t pool;

	unsigned int user_idx;
	/* virtual name; "" for the tree */
	const char *mailbox;

	enum dovetail_verify_flags flags;
	uint32_t number;
	/* when it was asked; or, if again, when it is to be asked */
	uint64_t usecs;
	bool again;
	unsigned int tries;
	/* of this try: how often it was repeated, and when it began */
	unsigned int repeats;
	uint64_t try_usecs;
	uint32_t messages;
	/* one for each of dovetail_peers */
	struct job_answer *answers;
};

struct replay_job {
	struct replay_job *prev, *next;
	pool_t pool;
	uint64_t id;
	struct dovetail_job set;
	bool many;
	/* not of an administrator: the round, over users behind this one, each begun
	   so long after the one before */
	bool round;
	const char *round_behind;
	uint64_t round_usecs, next_user_usecs;

	/* its users are known */
	bool begun;
	ARRAY_TYPE(const_string) users;
	/* those before were begun */
	unsigned int next_user;
	/* mailboxes of the last one begun, to be asked about */
	pool_t mailboxes_pool;
	ARRAY_TYPE(const_string) mailboxes;
	unsigned int next_mailbox;

	struct job_question *questions_head, *questions_tail;
	unsigned int questions_count;
	/* for each of dovetail_peers, when it answered something */
	uint64_t *answered_usecs;

	/* not before this: the rate, or the queue is away */
	uint64_t next_usecs;
	/* 0: the last question could be queued */
	uint64_t failing_since;

	/* the administrator does not read: rows are kept here meanwhile */
	bool paused;
	buffer_t *held;

	/* why nothing more is asked */
	enum dovetail_job_end end;
	const char *end_text;
	/* how many users were finished then */
	unsigned int end_users;

	struct dovetail_job_progress progress;
	/* replay_bodies_sent() when it began */
	uint64_t bodies_before;
	/* finished users, as the state file has it */
	unsigned int saved_users;
};

/* What dovetail-queue knows of a peer. */
struct job_peer {
	/* up to where it has confirmed our log, and when that last changed */
	char *position;
	uint64_t moved_usecs;
	/* how old the oldest of our entries is that it has not confirmed */
	uint64_t lag_usecs;
};

static struct {
	struct replay_job *head, *tail;
	/* for each of dovetail_peers; NULL before the first job */
	struct job_peer *peers;
	struct timeout *to_step, *to_tick;
	/* of the last question */
	uint32_t number;
	/* whose state is in the file */
	uint64_t file_id;
} jobs;

static void jobs_schedule(void);

static const char *job_user(const struct replay_job *job, unsigned int idx)
{
	return array_idx_elem(&job->users, idx);
}

/* ---- what is told ---- */

static size_t job_frame(struct replay_job *job, buffer_t **buf_r,
			enum dovetail_frame_type type)
{
	size_t offset;

	*buf_r = t_buffer_create(256);
	offset = dovetail_frame_begin(*buf_r, type);
	dovetail_wire_put_num(*buf_r, job->id);
	return offset;
}

static void job_row(struct replay_job *job,
		    const struct dovetail_job_result *result)
{
	buffer_t *buf;
	size_t offset;

	if (job->round) {
		replay_round_result(result);
		return;
	}
	offset = job_frame(job, &buf, DOVETAIL_FRAME_JOB_RESULT);
	dovetail_job_result_put(buf, result);
	dovetail_frame_end(buf, offset);
	if (!job->paused)
		replay_control_send(buf);
	else
		buffer_append_buf(job->held, buf, 0, SIZE_MAX);
}

/* Nobody could be asked. */
static void job_row_failed(struct replay_job *job, const char *user,
			   const char *mailbox, const char *text)
{
	struct dovetail_job_result result = {
		.user = user, .mailbox = mailbox, .peer = "",
		.result = DOVETAIL_VERIFIED_UNKNOWN,
	};

	t_array_init(&result.texts, 1);
	array_push_back(&result.texts, &text);
	job_row(job, &result);
	job->progress.unknown++;
}

/* Users that are finished: all before the first one with something open. */
static unsigned int job_finished_users(const struct replay_job *job)
{
	if (job->end != DOVETAIL_JOB_COMPLETE)
		return job->end_users;
	if (job->questions_head != NULL)
		return job->questions_head->user_idx;
	return job->next_mailbox < array_count(&job->mailboxes) ?
		job->next_user - 1 : job->next_user;
}

static void job_send_progress(struct replay_job *job)
{
	buffer_t *buf;
	size_t offset;

	if (job->begun)
		job->progress.users = job_finished_users(job);
	if (job->round)
		return;
	job->progress.bytes = replay_bodies_sent() - job->bodies_before;
	offset = job_frame(job, &buf, DOVETAIL_FRAME_JOB_PROGRESS);
	dovetail_job_progress_put(buf, &job->progress);
	dovetail_frame_end(buf, offset);
	replay_control_send(buf);
}

static void job_send_done(struct replay_job *job)
{
	buffer_t *buf;
	size_t offset;

	if (job->round) {
		replay_round_done(job->end, job->end_text, &job->progress);
		return;
	}
	offset = job_frame(job, &buf, DOVETAIL_FRAME_JOB_DONE);
	dovetail_job_done_put(buf, job->end, job->end_text == NULL ? "" :
			      job->end_text);
	dovetail_frame_end(buf, offset);
	replay_control_send(buf);
}

/* Nothing more is asked; what is open may still be answered. */
static void job_stop(struct replay_job *job, enum dovetail_job_end end,
		     const char *text)
{
	if (job->end != DOVETAIL_JOB_COMPLETE)
		return;
	/* without the user that it stops at */
	if (job->next_user > 0) {
		job->end_users = I_MIN(job_finished_users(job),
				       job->next_user - 1);
	}
	job->end = end;
	job->end_text = p_strdup(job->pool, text);
}

/* ---- the state file ---- */

static const char *job_state_path(void)
{
	return t_strdup_printf("%s/job.%u", replay.dir, replay.slot);
}

/* What the line begins with: only the same job of the same workers resumes. */
static void job_state_append_key(const struct replay_job *job, string_t *str)
{
	str_printfa(str, "%u\t", job->set.flags);
	str_append_tabescaped(str, job->set.users);
	str_printfa(str, "\t%u\t%u\t", replay.slots, replay.set.shards);
}

/* Whole or not at all: a part of it might name another user. */
static void job_state_write(struct replay_job *job)
{
	const char *path = job_state_path();
	const char *temp_path = t_strconcat(path, ".new", NULL);
	unsigned int finished = job_finished_users(job);
	string_t *str = t_str_new(256);
	int fd;

	if (!job->many || !job->begun ||
	    (jobs.file_id == job->id && finished == job->saved_users))
		return;
	if (job->round) {
		if (finished > job->saved_users) {
			job->progress.users = finished;
			replay_round_finished(job_user(job, finished - 1),
					      &job->progress);
		}
		job->saved_users = finished;
		return;
	}
	job_state_append_key(job, str);
	if (finished > 0)
		str_append_tabescaped(str, job_user(job, finished - 1));
	str_append_c(str, '\n');

	fd = open(temp_path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
	if (fd == -1) {
		e_error(replay.event, "open(%s) failed: %m", temp_path);
		return;
	}
	if (write_full(fd, str_data(str), str_len(str)) < 0)
		e_error(replay.event, "write(%s) failed: %m", temp_path);
	else if (rename(temp_path, path) < 0)
		e_error(replay.event, "rename(%s) failed: %m", temp_path);
	i_close_fd(&fd);
	jobs.file_id = job->id;
	job->saved_users = finished;
}

/* The last user that the same job had finished, "" when there is none. */
static const char *job_state_read(const struct replay_job *job)
{
	const char *path = job_state_path(), *line, *user = "";
	string_t *key = t_str_new(256);
	struct istream *input;
	int fd;

	fd = open(path, O_RDONLY);
	if (fd == -1) {
		if (errno != ENOENT)
			e_error(replay.event, "open(%s) failed: %m", path);
		return "";
	}
	job_state_append_key(job, key);
	input = i_stream_create_fd_autoclose(&fd, 8192);
	line = i_stream_read_next_line(input);
	if (line != NULL && str_begins_with(line, str_c(key))) {
		/* nothing unescaped is no copy */
		user = t_strdup(t_str_tabunescape(line + str_len(key)));
	}
	i_stream_unref(&input);
	return user;
}

static void job_state_remove(uint64_t id)
{
	if (jobs.file_id != id)
		return;
	jobs.file_id = 0;
	if (unlink(job_state_path()) < 0 && errno != ENOENT) {
		e_error(replay.event, "unlink(%s) failed: %m",
			job_state_path());
	}
}

/* ---- answers ---- */

static struct job_question *
job_question_new(struct replay_job *job, const char *mailbox)
{
	pool_t pool = pool_alloconly_create("dovetail job question", 512);
	struct job_question *q;

	q = p_new(pool, struct job_question, 1);
	q->pool = pool;
	q->user_idx = job->next_user - 1;
	q->mailbox = p_strdup(pool, mailbox);
	q->flags = job->set.flags;
	q->answers = p_new(pool, struct job_answer,
			   str_array_length(replay.set.peers));
	return q;
}

static void job_question_free(struct job_question **_q)
{
	struct job_question *q = *_q;

	*_q = NULL;
	pool_unref(&q->pool);
}

static void job_question_remove(struct replay_job *job, struct job_question *q)
{
	DLLIST2_REMOVE(&job->questions_head, &job->questions_tail, q);
	job->questions_count--;
	job_question_free(&q);
}

/* Where the peers disagree, what needs a look. */
static enum dovetail_verified_result
job_question_result(const struct job_question *q)
{
	static const enum dovetail_verified_result order[] = {
		DOVETAIL_VERIFIED_DIFFERENT, DOVETAIL_VERIFIED_UNKNOWN,
		DOVETAIL_VERIFIED_REPAIRED,
	};
	unsigned int i, j;

	for (i = 0; i < N_ELEMENTS(order); i++) {
		for (j = 0; replay.set.peers[j] != NULL; j++) {
			if (q->answers[j].result == order[i])
				return order[i];
		}
	}
	return DOVETAIL_VERIFIED_EQUAL;
}

static void job_question_count(struct replay_job *job,
			       const struct job_question *q)
{
	bool is_mailbox = q->mailbox[0] != '\0';

	if (is_mailbox) {
		job->progress.mailboxes++;
		job->progress.messages += q->messages;
	}
	switch (job_question_result(q)) {
	case DOVETAIL_VERIFIED_EQUAL:
		if (is_mailbox)
			job->progress.equal++;
		break;
	case DOVETAIL_VERIFIED_DIFFERENT:
		job->progress.different++;
		break;
	case DOVETAIL_VERIFIED_REPAIRED:
		job->progress.repaired++;
		break;
	case DOVETAIL_VERIFIED_UNKNOWN:
		job->progress.unknown++;
		break;
	}
}

/* Of one user everything is told, of many what is not equal. */
static void job_question_tell(struct replay_job *job,
			      const struct job_question *q)
{
	struct dovetail_job_result result;
	const struct job_answer *answer;
	unsigned int i;

	for (i = 0; replay.set.peers[i] != NULL; i++) {
		answer = &q->answers[i];
		if (answer->result == DOVETAIL_VERIFIED_EQUAL && job->many)
			continue;
		i_zero(&result);
		result.user = job_user(job, q->user_idx);
		result.mailbox = q->mailbox;
		result.peer = replay.set.peers[i];
		result.result = answer->result;
		result.messages = q->messages;
		result.texts = answer->texts;
		job_row(job, &result);
	}
}

static bool job_tries_again(const struct replay_job *job,
			    const struct job_question *q)
{
	/* to repair, they look themselves where it differs */
	return job_question_result(q) == DOVETAIL_VERIFIED_DIFFERENT &&
		(q->flags & DOVETAIL_VERIFY_REPAIR) == 0 &&
		(q->tries < JOB_TRIES || job->round) &&
		job->end == DOVETAIL_JOB_COMPLETE;
}

/* If all peers have answered, it is over, or to be asked again. */
static void job_question_answered(struct replay_job *job,
				  struct job_question *q)
{
	unsigned int i;

	for (i = 0; replay.set.peers[i] != NULL; i++) {
		if (q->answers[i].result == 0)
			return;
	}
	if (job_tries_again(job, q)) {
		/* the round's last */
		if (q->tries >= JOB_TRIES)
			q->flags |= DOVETAIL_VERIFY_REPAIR;
		q->repeats = 0;
		q->again = TRUE;
		q->usecs = dovetail_monotonic_usecs() +
			(uint64_t)q->tries * q->tries * JOB_TRY_AGAIN_USECS;
		return;
	}
	/* of a round that ends here, all of the user comes again */
	if (!job->round || job->end == DOVETAIL_JOB_COMPLETE) {
		job_question_count(job, q);
		job_question_tell(job, q);
	}
	job_question_remove(job, q);
}

static void job_answer_set(struct job_question *q, unsigned int peer_idx,
			   enum dovetail_verified_result result)
{
	struct job_answer *answer = &q->answers[peer_idx];

	i_zero(answer);
	answer->result = result;
	p_array_init(&answer->texts, q->pool, 1);
}

static void job_answer_add_text(struct job_question *q, unsigned int peer_idx,
				const char *text)
{
	text = p_strdup(q->pool, text);
	array_push_back(&q->answers[peer_idx].texts, &text);
}

static struct job_question *
jobs_find_question(uint32_t number, struct replay_job **job_r)
{
	struct replay_job *job;
	struct job_question *q;

	for (job = jobs.head; job != NULL; job = job->next) {
		for (q = job->questions_head; q != NULL; q = q->next) {
			if (q->number == number && !q->again) {
				*job_r = job;
				return q;
			}
		}
	}
	return NULL;
}

void replay_job_verified(const char *origin,
			 const struct dovetail_change_verified *verified)
{
	struct replay_job *job;
	struct job_question *q;
	const char *text;
	unsigned int i;

	q = jobs_find_question(verified->number, &job);
	if (q == NULL)
		return;
	for (i = 0; replay.set.peers[i] != NULL; i++) {
		if (strcmp(replay.set.peers[i], origin) == 0)
			break;
	}
	if (replay.set.peers[i] == NULL || q->answers[i].result != 0)
		return;
	job->answered_usecs[i] = dovetail_monotonic_usecs();
	job_answer_set(q, i, verified->result);
	array_foreach_elem(&verified->texts, text)
		job_answer_add_text(q, i, text);
	T_BEGIN {
		job_question_answered(job, q);
	} T_END;
	jobs_schedule();
}

/* ---- answers that do not come ---- */

/* While no question is old, nobody looks at what the peer confirms. */
static bool
job_peer_is_away(const struct job_question *q, unsigned int peer_idx)
{
	return dovetail_monotonic_usecs() >= JOB_PEER_AWAY_SECS * USECS_PER_SEC +
		I_MAX(jobs.peers[peer_idx].moved_usecs, q->try_usecs);
}

/* Has the peer had the time to answer? What stands before a question in our log
   comes first: while it is not confirmed, that can be long. */
static bool job_is_late(const struct replay_job *job,
			const struct job_question *q, unsigned int peer_idx)
{
	uint64_t since = q->try_usecs, secs = JOB_ANSWER_SECS;

	if (job_peer_is_away(q, peer_idx))
		return TRUE;
	if (q->flags != 0) {
		/* one after the other */
		since = I_MAX(since, job->answered_usecs[peer_idx]);
		secs = JOB_SLOW_ANSWER_SECS +
			q->messages / JOB_SLOW_MESSAGES_PER_SEC;
	}
	return dovetail_monotonic_usecs() >= since +
		jobs.peers[peer_idx].lag_usecs + secs * USECS_PER_SEC;
}

/* The answer was lost, or the peer is away. Returns TRUE when it is to be asked
   again. */
static bool job_answer_late(struct replay_job *job, struct job_question *q,
			    unsigned int peer_idx)
{
	const char *peer = replay.set.peers[peer_idx];
	bool away = job_peer_is_away(q, peer_idx);

	if (!away && q->tries < JOB_TRIES &&
	    job->end == DOVETAIL_JOB_COMPLETE) {
		q->repeats = 0;
		q->again = TRUE;
		q->usecs = dovetail_monotonic_usecs();
		return TRUE;
	}
	job_answer_set(q, peer_idx, DOVETAIL_VERIFIED_UNKNOWN);
	job_answer_add_text(q, peer_idx, t_strdup_printf("No answer from %s%s",
		peer, away ? ", which confirms nothing" : ""));
	if (job->answered_usecs[peer_idx] < q->usecs) {
		job_stop(job, DOVETAIL_JOB_FAILED, t_strdup_printf(
			"Node %s answers nothing (see \"doveadm dovetail "
			"status\", here and there)", peer));
	}
	return FALSE;
}

static void job_repeat_slow(struct replay_job *job, struct job_question *q)
{
	uint64_t secs = (uint64_t)JOB_REPEAT_SECS << q->repeats;

	if (q->again || q->flags == 0 || q->repeats >= JOB_REPEATS_MAX ||
	    job->end != DOVETAIL_JOB_COMPLETE ||
	    dovetail_monotonic_usecs() < q->usecs + secs * USECS_PER_SEC)
		return;
	q->repeats++;
	q->again = TRUE;
	q->usecs = dovetail_monotonic_usecs();
}

static void job_check_late(struct replay_job *job)
{
	struct job_question *q, *next;
	unsigned int i;
	bool late;

	for (q = job->questions_head; q != NULL; q = next) {
		next = q->next;
		late = FALSE;
		for (i = 0; !q->again && replay.set.peers[i] != NULL; i++) {
			if (q->answers[i].result != 0 || !job_is_late(job, q, i))
				continue;
			late = TRUE;
			if (job_answer_late(job, q, i))
				break;
		}
		if (late && !q->again)
			job_question_answered(job, q);
		else
			job_repeat_slow(job, q);
	}
}

static bool jobs_have_old_question(void)
{
	const struct replay_job *job;
	const struct job_question *q;
	uint64_t now = dovetail_monotonic_usecs();

	for (job = jobs.head; job != NULL; job = job->next) {
		for (q = job->questions_head; q != NULL; q = q->next) {
			if (!q->again &&
			    now >= q->usecs + JOB_LOOK_SECS * USECS_PER_SEC)
				return TRUE;
		}
	}
	return FALSE;
}

static void jobs_look_at_peers(void)
{
	buffer_t *buf = t_buffer_create(32);
	size_t offset = dovetail_frame_begin(buf, DOVETAIL_FRAME_STATUS_GET);

	dovetail_wire_put_num(buf, 1);
	dovetail_frame_end(buf, offset);
	replay_control_send(buf);
}

static void jobs_peer_status(const char *node, const char *position,
			     const char *lag)
{
	struct job_peer *peer;
	unsigned int i;

	for (i = 0; replay.set.peers[i] != NULL; i++) {
		if (strcmp(replay.set.peers[i], node) == 0)
			break;
	}
	if (replay.set.peers[i] == NULL)
		return;
	peer = &jobs.peers[i];
	peer->lag_usecs = (uint64_t)(strtod(lag, NULL) * USECS_PER_SEC);
	if (null_strcmp(position, peer->position) == 0)
		return;
	i_free(peer->position);
	peer->position = i_strdup(position);
	peer->moved_usecs = dovetail_monotonic_usecs();
}

void replay_job_status(struct dovetail_wire_reader *r)
{
	const char *peer, *direction, *position, *lag, *key, *value;
	uint64_t rows, fields;

	if (jobs.peers == NULL)
		return;
	(void)dovetail_wire_get_num(r); /* tag */
	rows = dovetail_wire_get_num(r);
	for (; rows > 0 && !r->failed; rows--) T_BEGIN {
		peer = direction = position = lag = "";
		fields = dovetail_wire_get_num(r);
		for (; fields > 0 && !r->failed; fields--) {
			key = dovetail_wire_get_str(r, pool_datastack_create());
			value = dovetail_wire_get_str(r,
						      pool_datastack_create());
			if (strcmp(key, "peer") == 0)
				peer = value;
			else if (strcmp(key, "direction") == 0)
				direction = value;
			else if (strcmp(key, "position") == 0)
				position = value;
			else if (strcmp(key, "lag") == 0)
				lag = value;
		}
		if (strcmp(direction, "to") == 0)
			jobs_peer_status(peer, position, lag);
	} T_END;
}

/* ---- questions ---- */

enum job_asked {
	JOB_ASKED,
	/* it was not ready: to be asked once more */
	JOB_ASKED_LATER,
	/* it is not there any more */
	JOB_ASKED_GONE,
	JOB_ASKED_FAILED,
};

static enum job_asked
job_ask_mailbox(struct job_question *q, struct replay_user *user,
		const char **error_r)
{
	struct mail_namespace *ns = mail_namespace_find(
		replay_user_mail_user(user)->namespaces, q->mailbox);
	enum job_asked asked = JOB_ASKED_FAILED;
	enum mailbox_existence existence;
	enum mail_error mail_error;
	struct mailbox *box;
	int ret;

	box = mailbox_alloc(ns->list, q->mailbox, MAILBOX_FLAG_IGNORE_ACLS);
	/* the sync has it queued what was changed behind our back */
	if (mailbox_sync(box, MAILBOX_SYNC_FLAG_FULL_READ) < 0) {
		*error_r = t_strdup(mailbox_get_last_internal_error(box,
								    &mail_error));
		if (mail_error == MAIL_ERROR_NOTFOUND)
			asked = JOB_ASKED_GONE;
	} else if (strcmp(mailbox_get_storage(box)->name, "virtual") == 0) {
		asked = JOB_ASKED_GONE;
	} else {
		if (++jobs.number == 0)
			jobs.number++;
		ret = replay_ask_mailbox(box, jobs.number, q->flags,
					 &q->messages, error_r);
		if (ret >= 0)
			asked = ret > 0 ? JOB_ASKED : JOB_ASKED_LATER;
		else if (mailbox_exists(box, FALSE, &existence) == 0 &&
			 existence == MAILBOX_EXISTENCE_NONE)
			asked = JOB_ASKED_GONE;
	}
	mailbox_free(&box);
	return asked;
}

/* error_r (data stack) is set for _FAILED. */
static enum job_asked
job_question_ask_opened(struct job_question *q, struct replay_user *user,
			const char **error_r)
{
	enum job_asked ret = JOB_ASKED;

	if (q->mailbox[0] != '\0')
		ret = job_ask_mailbox(q, user, error_r);
	else if (replay_ask_tree(user, &jobs.number, q->flags, error_r) < 0)
		ret = JOB_ASKED_FAILED;
	if (ret != JOB_ASKED)
		return ret;
	q->number = jobs.number;
	q->usecs = dovetail_monotonic_usecs();
	if (q->repeats == 0 || q->try_usecs == 0) {
		q->try_usecs = q->usecs;
		q->tries++;
	}
	q->again = FALSE;
	memset(q->answers, 0, sizeof(*q->answers) *
	       str_array_length(replay.set.peers));
	return JOB_ASKED;
}

/* A question could not be queued. Returns FALSE when it is to be tried once more. */
static bool job_wait_for_queue(struct replay_job *job, const char *error)
{
	uint64_t now = dovetail_monotonic_usecs();
	bool works = replay_queue_works();

	if (job->failing_since == 0) {
		/* perhaps our connection was of a queue that has ended */
		job->failing_since = now;
	} else if (works) {
		/* the mailbox's fault */
		job->failing_since = 0;
		return TRUE;
	}
	if (now - job->failing_since >= JOB_QUEUE_AWAY_SECS * USECS_PER_SEC) {
		job_stop(job, DOVETAIL_JOB_FAILED, t_strdup_printf(
			"Nothing can be queued (see \"doveadm dovetail "
			"status\"): %s", error));
		return TRUE;
	}
	job->next_usecs = works ? now : now + JOB_QUEUE_RETRY_USECS;
	return FALSE;
}

/* Returns FALSE when it is to be tried once more. */
static bool job_question_ask(struct replay_job *job, struct job_question *q,
			     struct replay_user *user, enum job_asked *asked_r)
{
	const char *error;

	*asked_r = job_question_ask_opened(q, user, &error);
	if (*asked_r != JOB_ASKED_FAILED) {
		job->failing_since = 0;
		job->next_usecs = dovetail_monotonic_usecs();
		if (job->set.rate > 0) {
			job->next_usecs += q->messages * USECS_PER_SEC /
				job->set.rate;
		}
		return *asked_r != JOB_ASKED_LATER;
	}
	if (!job_wait_for_queue(job, error))
		return FALSE;
	job_row_failed(job, job_user(job, q->user_idx), q->mailbox, error);
	return TRUE;
}

/* Ask for the first time. Returns FALSE when it is to be tried once more. */
static bool job_ask_new(struct replay_job *job, struct replay_user *user,
			const char *mailbox)
{
	struct job_question *q = job_question_new(job, mailbox);
	enum job_asked asked;
	bool ret = job_question_ask(job, q, user, &asked);

	if (!ret || asked != JOB_ASKED) {
		job_question_free(&q);
		return ret;
	}
	DLLIST2_APPEND(&job->questions_head, &job->questions_tail, q);
	job->questions_count++;
	return TRUE;
}

static void job_ask_again(struct replay_job *job, struct job_question *q)
{
	struct replay_user *user;
	enum job_asked asked;
	const char *error;

	if (replay_user_open(job_user(job, q->user_idx), &user, &error) < 0) {
		job_row_failed(job, job_user(job, q->user_idx), q->mailbox,
			       error);
		job_question_remove(job, q);
		return;
	}
	if (!job_question_ask(job, q, user, &asked))
		q->usecs = job->next_usecs;
	else if (asked != JOB_ASKED)
		job_question_remove(job, q);
	replay_user_release(&user);
}

/* ---- users ---- */

static int job_list_namespace(struct replay_job *job, struct mail_namespace *ns,
			      const char **error_r)
{
	struct mailbox_list_iterate_context *iter;
	const struct mailbox_info *info;
	const char *name;

	iter = mailbox_list_iter_init(ns->list, "*",
		MAILBOX_LIST_ITER_RAW_LIST | MAILBOX_LIST_ITER_NO_AUTO_BOXES);
	while ((info = mailbox_list_iter_next(iter)) != NULL) {
		if ((info->flags & (MAILBOX_NOSELECT |
				    MAILBOX_NONEXISTENT)) != 0)
			continue;
		name = p_strdup(job->mailboxes_pool, info->vname);
		array_push_back(&job->mailboxes, &name);
	}
	if (mailbox_list_iter_deinit(&iter) < 0) {
		*error_r = t_strdup(mailbox_list_get_last_internal_error(
			ns->list, NULL));
		return -1;
	}
	return 0;
}

static void job_clear_mailboxes(struct replay_job *job)
{
	p_clear(job->mailboxes_pool);
	p_array_init(&job->mailboxes, job->mailboxes_pool, 16);
	job->next_mailbox = 0;
}

/* The tree now, mailboxes later. Returns FALSE when it is to be tried once more. */
static bool job_begin_opened(struct replay_job *job, struct replay_user *user,
			     const char *username)
{
	struct mail_user *mail_user = replay_user_mail_user(user);
	struct mail_namespace *ns;
	const char *primary, *error;
	bool is_primary;

	if (replay_get_role(user, &primary, &is_primary, &error) < 0) {
		job_row_failed(job, username, "", error);
		return TRUE;
	}
	if (!is_primary) {
		job->progress.users_elsewhere++;
		if (!job->many) {
			job_stop(job, DOVETAIL_JOB_ELSEWHERE, t_strdup_printf(
				"The primary of user %s is node %s: run this "
				"there", username, primary));
		}
		return TRUE;
	}
	if (strcmp(mail_user->username, username) != 0) {
		/* answers go to the worker of that name's shard */
		job_row_failed(job, username, "", t_strdup_printf(
			"The userdb has this user as %s: use that name",
			mail_user->username));
		return TRUE;
	}
	if (!job_ask_new(job, user, ""))
		return FALSE;
	for (ns = mail_user->namespaces; ns != NULL; ns = ns->next) {
		if (dovetail_namespace_is_own(ns, mail_user) &&
		    job_list_namespace(job, ns, &error) < 0) {
			job_row_failed(job, username, "", t_strdup_printf(
				"Cannot list mailboxes: %s", error));
		}
	}
	return TRUE;
}

static void job_begin_user(struct replay_job *job)
{
	const char *username = job_user(job, job->next_user), *error;
	struct replay_user *user;
	int ret;

	job_clear_mailboxes(job);
	job->next_user++;
	job->next_user_usecs = dovetail_monotonic_usecs() + job->round_usecs;
	ret = replay_user_open(username, &user, &error);
	if (ret < 0) {
		if (ret == -2 && !job->many)
			job_stop(job, DOVETAIL_JOB_NO_USER, error);
		else
			job_row_failed(job, username, "", error);
		return;
	}
	if (!job_begin_opened(job, user, username))
		job->next_user--;
	replay_user_release(&user);
}

static void job_next_mailbox(struct replay_job *job)
{
	const char *mailbox = array_idx_elem(&job->mailboxes, job->next_mailbox);
	const char *username = job_user(job, job->next_user - 1), *error;
	struct replay_user *user;

	if (replay_user_open(username, &user, &error) < 0) {
		job_row_failed(job, username, "", error);
		job_clear_mailboxes(job);
		return;
	}
	if (job_ask_new(job, user, mailbox))
		job->next_mailbox++;
	replay_user_release(&user);
}

/* ---- a job ---- */

/* Of many users: another one like it came first. */
static bool job_is_waiting(const struct replay_job *job)
{
	const struct replay_job *other;

	for (other = jobs.head; other != NULL; other = other->next) {
		if (job->many && other->many && other->id < job->id)
			return TRUE;
	}
	return FALSE;
}

static void job_skip_finished(struct replay_job *job)
{
	const char *last = job->round ? job->round_behind :
		job_state_read(job);

	while (job->next_user < array_count(&job->users) &&
	       strcmp(job_user(job, job->next_user), last) <= 0)
		job->next_user++;
	job->progress.users_before = job->next_user;
}

static void job_begin(struct replay_job *job)
{
	const char *error;
	uint64_t shards = 0;
	unsigned int shard;

	if (!job->many) {
		p_array_init(&job->users, job->pool, 1);
		array_push_back(&job->users, &job->set.users);
	} else {
		for (shard = replay.slot; shard < replay.set.shards;
		     shard += replay.slots)
			shards |= 1ULL << shard;
		if (replay_users_list(job->set.users, shards, job->pool,
				      &job->users, &error) < 0) {
			job_stop(job, DOVETAIL_JOB_FAILED, error);
			return;
		}
		array_sort(&job->users, i_strcmp_p);
		if (job->set.resume)
			job_skip_finished(job);
	}
	job->progress.users_all = array_count(&job->users);
	job->saved_users = job->next_user;
	job->begun = TRUE;
	job_state_write(job);
}

static bool job_has_more(const struct replay_job *job)
{
	return job->end == DOVETAIL_JOB_COMPLETE &&
		(!job->begun ||
		 job->next_mailbox < array_count(&job->mailboxes) ||
		 job->next_user < array_count(&job->users));
}

static struct job_question *job_find_again(const struct replay_job *job)
{
	struct job_question *q, *first = NULL;

	for (q = job->questions_head; q != NULL; q = q->next) {
		if (q->again && (first == NULL || q->usecs < first->usecs))
			first = q;
	}
	return first;
}

/* When job_step() has something to do. UINT64_MAX: when an answer comes. */
static uint64_t job_step_usecs(const struct replay_job *job)
{
	const struct job_question *again = job_find_again(job);
	uint64_t usecs = again == NULL ? UINT64_MAX : again->usecs;

	if (job->paused || job_is_waiting(job))
		return UINT64_MAX;
	if (!job_has_more(job))
		return job->questions_head == NULL ? 0 : usecs;
	if (job->round &&
	    job->next_mailbox == array_count(&job->mailboxes)) {
		return job->questions_head != NULL ? usecs :
			I_MAX(job->next_usecs, job->next_user_usecs);
	}
	return job->questions_count >= JOB_QUESTIONS_MAX ? usecs :
		I_MIN(usecs, job->next_usecs);
}

static void job_free(struct replay_job **_job)
{
	struct replay_job *job = *_job;
	struct job_question *q;

	*_job = NULL;
	T_BEGIN {
		job_state_write(job);
	} T_END;
	while ((q = job->questions_head) != NULL)
		job_question_remove(job, q);
	DLLIST2_REMOVE(&jobs.head, &jobs.tail, job);
	buffer_free(&job->held);
	pool_unref(&job->mailboxes_pool);
	pool_unref(&job->pool);
	if (jobs.head == NULL) {
		timeout_remove(&jobs.to_step);
		timeout_remove(&jobs.to_tick);
	}
}

static void job_step(struct replay_job *job)
{
	struct job_question *again = job_find_again(job);
	uint64_t now = dovetail_monotonic_usecs();

	if (again != NULL && again->usecs <= now) {
		job_ask_again(job, again);
	} else if (!job_has_more(job)) {
		job_send_progress(job);
		job_state_write(job);
		job_send_done(job);
		job_free(&job);
	} else if (!job->begun) {
		job_begin(job);
	} else if (job->next_mailbox < array_count(&job->mailboxes)) {
		job_next_mailbox(job);
	} else {
		job_begin_user(job);
	}
}

/* ---- all jobs ---- */

static void jobs_step(void *context ATTR_UNUSED)
{
	struct replay_job *job;
	uint64_t now = dovetail_monotonic_usecs();

	timeout_remove(&jobs.to_step);
	for (job = jobs.head; job != NULL; job = job->next) {
		if (job_step_usecs(job) <= now)
			break;
	}
	if (job != NULL) T_BEGIN {
		/* each in its turn */
		DLLIST2_REMOVE(&jobs.head, &jobs.tail, job);
		DLLIST2_APPEND(&jobs.head, &jobs.tail, job);
		job_step(job);
	} T_END;
	jobs_schedule();
}

static void jobs_schedule(void)
{
	const struct replay_job *job;
	uint64_t now = dovetail_monotonic_usecs(), first = UINT64_MAX;

	for (job = jobs.head; job != NULL; job = job->next)
		first = I_MIN(first, job_step_usecs(job));
	timeout_remove(&jobs.to_step);
	if (first != UINT64_MAX) {
		jobs.to_step = replay_timeout_add(first <= now ? 0 :
			I_MIN((first - now + 999) / 1000, 3600 * 1000),
			jobs_step, NULL);
	}
}

static void jobs_tick(void *context ATTR_UNUSED)
{
	struct replay_job *job;

	for (job = jobs.head; job != NULL; job = job->next) T_BEGIN {
		job->progress.waiting = job_is_waiting(job);
		job_check_late(job);
		job_send_progress(job);
		job_state_write(job);
	} T_END;
	if (jobs_have_old_question()) T_BEGIN {
		jobs_look_at_peers();
	} T_END;
	jobs_schedule();
}

/* Nobody counts as away before we had a look. */
static void jobs_init_peers(void)
{
	unsigned int i, count = str_array_length(replay.set.peers);

	if (jobs.peers == NULL)
		jobs.peers = p_new(replay.pool, struct job_peer, count + 1);
	for (i = 0; i < count; i++)
		jobs.peers[i].moved_usecs = dovetail_monotonic_usecs();
}

static struct replay_job *
job_new(uint64_t id, const struct dovetail_job *set)
{
	struct replay_job *job;
	pool_t pool = pool_alloconly_create("dovetail job", 1024);

	job = p_new(pool, struct replay_job, 1);
	job->pool = pool;
	job->id = id;
	job->set = *set;
	job->set.users = p_strdup(pool, set->users);
	job->bodies_before = replay_bodies_sent();
	job->many = dovetail_job_is_of_many(set);
	job->answered_usecs = p_new(pool, uint64_t,
				    str_array_length(replay.set.peers));
	job->held = buffer_create_dynamic(default_pool, 64);
	job->mailboxes_pool = pool_alloconly_create("dovetail job mailboxes",
						    1024);
	job_clear_mailboxes(job);
	DLLIST2_APPEND(&jobs.head, &jobs.tail, job);
	if (jobs.number == 0) {
		/* nobody takes an answer to an earlier process for ours */
		jobs.number = i_rand();
	}
	if (jobs.to_tick == NULL) {
		jobs_init_peers();
		jobs.to_tick = replay_timeout_add(JOB_TICK_MSECS, jobs_tick,
						  NULL);
	}
	return job;
}

void replay_job_start(uint64_t id, const struct dovetail_job *set)
{
	struct replay_job *job = job_new(id, set);

	job->progress.waiting = job_is_waiting(job);
	job_send_progress(job);
	jobs_schedule();
}

void replay_job_start_round(const char *behind, uint64_t usecs)
{
	static const struct dovetail_job set = {
		.users = "*", .resume = TRUE,
	};
	/* behind all others */
	struct replay_job *job = job_new(UINT64_MAX, &set);

	job->round = TRUE;
	job->round_behind = p_strdup(job->pool, behind);
	job->round_usecs = usecs;
	jobs_schedule();
}

static struct replay_job *jobs_find(uint64_t id)
{
	struct replay_job *job;

	for (job = jobs.head; job != NULL; job = job->next) {
		if (job->id == id)
			break;
	}
	return job;
}

void replay_job_end(uint64_t id, bool complete)
{
	struct replay_job *job = jobs_find(id);

	if (job != NULL)
		job_free(&job);
	if (complete)
		job_state_remove(id);
	jobs_schedule();
}

void replay_job_pause(uint64_t id, bool paused)
{
	struct replay_job *job = jobs_find(id);

	if (job == NULL)
		return;
	job->paused = paused;
	if (!paused) {
		replay_control_send(job->held);
		buffer_set_used_size(job->held, 0);
	}
	jobs_schedule();
}

void replay_jobs_deinit(void)
{
	struct replay_job *job;
	unsigned int i;

	while ((job = jobs.head) != NULL) {
		if (job->round) {
			job_stop(job, DOVETAIL_JOB_FAILED, NULL);
			job_state_write(job);
			job_send_done(job);
		}
		job_free(&job);
	}
	for (i = 0; jobs.peers != NULL && replay.set.peers[i] != NULL; i++)
		i_free(jobs.peers[i].position);
}
