/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* Jobs (dovetail-job.h): handed from an administrator's connection to the workers,
   and what they answer handed back. What is in the answers is none of the queue's
   business, but for how a part ended. */

#include "lib.h"
#include "array.h"
#include "buffer.h"
#include "ioloop.h"
#include "llist.h"
#include "priorityq.h"
#include "dovetail-job.h"
#include "dovetail-queue-private.h"

#define JOBS_MAX 64
/* An administrator (a terminal, a pager) that has so many bytes still to read:
   the workers are to send no more. */
#define JOB_PAUSE_BYTES (64 * 1024)

struct job_part {
	struct dovetail_queue_conn *worker;
	bool done;
};

struct dovetail_queue_job {
	struct dovetail_queue_job *prev, *next;

	uint64_t id;
	struct dovetail_queue_conn *admin;
	uint64_t tag;
	ARRAY(struct job_part) parts;
	bool paused;
	/* no part has ended in another way */
	bool complete;
};

/* Ids are not used again by the next process, of which a worker may hear while it
   still has jobs of this one's. */
static uint64_t job_new_id(struct dovetail_queue *queue)
{
	if (queue->last_job_id == 0)
		queue->last_job_id = dovetail_queue_now_usecs();
	return ++queue->last_job_id;
}

static void job_send_start(struct dovetail_queue_job *job,
			   struct dovetail_queue_conn *worker,
			   const struct dovetail_job *set)
{
	buffer_t *buf = t_buffer_create(128);

	dovetail_wire_put_num(buf, job->id);
	dovetail_job_put(buf, set);
	dovetail_queue_conn_send(worker, DOVETAIL_FRAME_JOB_START, buf);
}

static void job_send_bool(struct dovetail_queue_job *job,
			  struct dovetail_queue_conn *worker,
			  enum dovetail_frame_type type, bool value)
{
	buffer_t *buf = t_buffer_create(32);

	dovetail_wire_put_num(buf, job->id);
	dovetail_wire_put_u8(buf, value ? 1 : 0);
	dovetail_queue_conn_send(worker, type, buf);
}

static void job_send_reply(struct dovetail_queue_conn *admin, uint64_t tag,
			   enum dovetail_reply reply, const char *text)
{
	buffer_t *buf = t_buffer_create(128);

	dovetail_wire_put_num(buf, tag);
	dovetail_wire_put_u8(buf, reply);
	dovetail_wire_put_str(buf, text);
	dovetail_queue_conn_send(admin, DOVETAIL_FRAME_REPLY, buf);
}

static void job_free(struct dovetail_queue *queue,
		     struct dovetail_queue_job *job)
{
	struct job_part *part;

	array_foreach_modifiable(&job->parts, part) {
		if (part->worker != NULL) {
			job_send_bool(job, part->worker,
				      DOVETAIL_FRAME_JOB_END, job->complete);
		}
	}
	DLLIST_REMOVE(&queue->jobs, job);
	array_free(&job->parts);
	i_free(job);
}

static struct job_part *
job_find_part(struct dovetail_queue_job *job,
	      const struct dovetail_queue_conn *worker)
{
	struct job_part *part;

	array_foreach_modifiable(&job->parts, part) {
		if (part->worker == worker)
			return part;
	}
	return NULL;
}

/* ---- begin ---- */

/* Returns NULL, or why there is nobody to do it. */
static const char *
job_find_workers(struct dovetail_queue *queue, struct dovetail_queue_job *job,
		 const struct dovetail_job *set)
{
	struct dovetail_queue_conn *worker;
	struct job_part *part;
	unsigned int shard;
	bool many = dovetail_job_is_of_many(set);

	for (shard = 0; shard < queue->logs_count; shard++) {
		if (!many && shard != dovetail_user_shard(set->users,
							  queue->logs_count))
			continue;
		worker = dovetail_queue_conns_find_worker(queue, shard);
		if (worker == NULL) {
			return t_strdup_printf("No dovetail-replay process "
				"works for shard %u: it is just starting, or "
				"failed to; then Dovecot's log has the reason",
				shard);
		}
		if (job_find_part(job, worker) == NULL) {
			part = array_append_space(&job->parts);
			part->worker = worker;
		}
	}
	return NULL;
}

/* Returns NULL, or why there is no job now. */
static const char *job_hindrance(struct dovetail_queue *queue,
				 const struct dovetail_queue_conn *admin)
{
	const struct dovetail_queue_job *job;
	unsigned int count = 0;

	if (queue->peers_count == 0) {
		return "dovetail_peers is empty: there is no other node to "
			"compare with";
	}
	for (job = queue->jobs; job != NULL; job = job->next) {
		if (job->admin == admin)
			return "One at a time on a connection";
		count++;
	}
	if (count >= JOBS_MAX) {
		return t_strdup_printf("%u commands like this one are running "
				       "already: wait for one of them", count);
	}
	return NULL;
}

void dovetail_queue_job_start(struct dovetail_queue *queue,
			      struct dovetail_queue_conn *admin, bool trusted,
			      uint64_t tag, const struct dovetail_job *_set)
{
	struct dovetail_job set = *_set;
	struct dovetail_queue_job *job;
	struct job_part *part;
	const char *error;

	if (!trusted) {
		job_send_reply(admin, tag, DOVETAIL_REPLY_REFUSED,
			"Only root, and who owns the socket, may do this: run "
			"it as root");
		return;
	}
	error = job_hindrance(queue, admin);
	if (error != NULL) {
		job_send_reply(admin, tag, DOVETAIL_REPLY_UNAVAILABLE, error);
		return;
	}
	job = i_new(struct dovetail_queue_job, 1);
	job->admin = admin;
	job->tag = tag;
	i_array_init(&job->parts, 8);
	error = job_find_workers(queue, job, &set);
	if (error != NULL) {
		job_send_reply(admin, tag, DOVETAIL_REPLY_UNAVAILABLE, error);
		array_free(&job->parts);
		i_free(job);
		return;
	}
	job->id = job_new_id(queue);
	job->complete = TRUE;
	DLLIST_PREPEND(&queue->jobs, job);
	if (set.rate > 0)
		set.rate = I_MAX(set.rate / array_count(&job->parts), 1);
	array_foreach_modifiable(&job->parts, part)
		job_send_start(job, part->worker, &set);
}

/* ---- answers ---- */

/* size bytes at data follow the id. */
static void job_forward(struct dovetail_queue_job *job,
			struct dovetail_queue_conn *worker,
			enum dovetail_frame_type type,
			const void *data, size_t size)
{
	buffer_t *buf = t_buffer_create(size + 32);

	dovetail_wire_put_num(buf, job->tag);
	dovetail_wire_put_num(buf, dovetail_queue_conn_get_slot(worker));
	buffer_append(buf, data, size);
	dovetail_queue_conn_send(job->admin, type, buf);
}

static void job_part_done(struct dovetail_queue *queue,
			  struct dovetail_queue_job *job, struct job_part *part,
			  bool complete)
{
	const struct job_part *p;

	part->done = TRUE;
	if (!complete)
		job->complete = FALSE;
	array_foreach(&job->parts, p) {
		if (!p->done)
			return;
	}
	job_send_reply(job->admin, job->tag, DOVETAIL_REPLY_OK, "");
	job_free(queue, job);
}

int dovetail_queue_job_answer(struct dovetail_queue *queue,
			      struct dovetail_queue_conn *worker,
			      enum dovetail_frame_type type,
			      struct dovetail_wire_reader *r)
{
	struct dovetail_queue_job *job;
	struct job_part *part;
	enum dovetail_job_end end;
	const char *text;
	const void *data;
	uint64_t id;
	size_t size;

	id = dovetail_wire_get_num(r);
	if (r->failed)
		return -1;
	data = r->pos;
	size = r->end - r->pos;
	if (type == DOVETAIL_FRAME_JOB_DONE &&
	    !dovetail_job_done_get(r, pool_datastack_create(), &end, &text))
		return -1;

	for (job = queue->jobs; job != NULL; job = job->next) {
		if (job->id == id)
			break;
	}
	part = job == NULL ? NULL : job_find_part(job, worker);
	if (part == NULL || part->done) {
		/* the administrator has gone, the worker does not know yet */
		return 0;
	}
	job_forward(job, worker, type, data, size);
	if (type == DOVETAIL_FRAME_JOB_DONE) {
		job_part_done(queue, job, part,
			      end == DOVETAIL_JOB_COMPLETE);
	}
	return 0;
}

/* ---- connections ---- */

static void job_worker_lost(struct dovetail_queue *queue,
			    struct dovetail_queue_job *job,
			    struct job_part *part)
{
	struct dovetail_queue_conn *worker = part->worker;
	buffer_t *buf = t_buffer_create(128);

	part->worker = NULL;
	if (part->done)
		return;
	dovetail_job_done_put(buf, DOVETAIL_JOB_FAILED,
		"A dovetail-replay process ended; Dovecot's log may have the "
		"reason");
	job_forward(job, worker, DOVETAIL_FRAME_JOB_DONE, buf->data, buf->used);
	job_part_done(queue, job, part, FALSE);
}

void dovetail_queue_jobs_conn_closed(struct dovetail_queue *queue,
				     struct dovetail_queue_conn *conn)
{
	struct dovetail_queue_job *job, *next;
	struct job_part *part;

	for (job = queue->jobs; job != NULL; job = next) T_BEGIN {
		next = job->next;
		if (job->admin == conn) {
			job->complete = FALSE;
			job_free(queue, job);
		} else if ((part = job_find_part(job, conn)) != NULL) {
			job_worker_lost(queue, job, part);
		}
	} T_END;
}

void dovetail_queue_jobs_flow(struct dovetail_queue *queue,
			      struct dovetail_queue_conn *admin,
			      size_t unread_size)
{
	struct dovetail_queue_job *job;
	const struct job_part *part;

	for (job = queue->jobs; job != NULL; job = job->next) {
		if (job->admin != admin ||
		    (job->paused ? unread_size > 0 :
		     unread_size <= JOB_PAUSE_BYTES))
			continue;
		job->paused = !job->paused;
		array_foreach(&job->parts, part) {
			if (part->worker != NULL) T_BEGIN {
				job_send_bool(job, part->worker,
					      DOVETAIL_FRAME_JOB_PAUSE,
					      job->paused);
			} T_END;
		}
	}
}
