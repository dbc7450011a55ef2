/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "array.h"
#include "buffer.h"
#include "dovetail-job.h"

#define JOB_FLAGS \
	(DOVETAIL_VERIFY_DEEP | DOVETAIL_VERIFY_EXPLAIN | \
	 DOVETAIL_VERIFY_REPAIR)

bool dovetail_job_is_of_many(const struct dovetail_job *job)
{
	return strpbrk(job->users, "*?") != NULL;
}

static bool get_bool(struct dovetail_wire_reader *r)
{
	uint8_t num = dovetail_wire_get_u8(r);

	if (num > 1)
		r->failed = TRUE;
	return num == 1;
}

void dovetail_job_put(buffer_t *buf, const struct dovetail_job *job)
{
	dovetail_wire_put_u8(buf, job->flags);
	dovetail_wire_put_str(buf, job->users);
	dovetail_wire_put_num(buf, job->rate);
	dovetail_wire_put_u8(buf, job->resume ? 1 : 0);
}

bool dovetail_job_get(struct dovetail_wire_reader *r, pool_t pool,
		      struct dovetail_job *job_r)
{
	i_zero(job_r);
	job_r->flags = dovetail_wire_get_u8(r);
	job_r->users = dovetail_wire_get_str(r, pool);
	job_r->rate = dovetail_wire_get_num32(r);
	job_r->resume = get_bool(r);
	return dovetail_wire_reader_done(r) &&
		(job_r->flags & ~JOB_FLAGS) == 0 && job_r->users[0] != '\0' &&
		strlen(job_r->users) <= DOVETAIL_JOB_USERS_MAX_LEN &&
		(!job_r->resume || dovetail_job_is_of_many(job_r));
}

void dovetail_job_result_put(buffer_t *buf,
			     const struct dovetail_job_result *result)
{
	const char *text;

	dovetail_wire_put_str(buf, result->user);
	dovetail_wire_put_str(buf, result->mailbox);
	dovetail_wire_put_str(buf, result->peer);
	dovetail_wire_put_u8(buf, result->result);
	dovetail_wire_put_num(buf, result->messages);
	dovetail_wire_put_num(buf, array_count(&result->texts));
	array_foreach_elem(&result->texts, text)
		dovetail_wire_put_str(buf, text);
}

bool dovetail_job_result_get(struct dovetail_wire_reader *r, pool_t pool,
			     struct dovetail_job_result *result_r)
{
	const char *text;
	uint64_t count;

	i_zero(result_r);
	result_r->user = dovetail_wire_get_str(r, pool);
	result_r->mailbox = dovetail_wire_get_str(r, pool);
	result_r->peer = dovetail_wire_get_str(r, pool);
	result_r->result = dovetail_wire_get_u8(r);
	result_r->messages = dovetail_wire_get_num32(r);
	count = dovetail_wire_get_num(r);
	if (count > DOVETAIL_VERIFIED_TEXTS_MAX + 1)
		r->failed = TRUE;
	p_array_init(&result_r->texts, pool, 4);
	for (; count > 0 && !r->failed; count--) {
		text = dovetail_wire_get_str(r, pool);
		array_push_back(&result_r->texts, &text);
	}
	return dovetail_wire_reader_done(r) &&
		result_r->result >= DOVETAIL_VERIFIED_EQUAL &&
		result_r->result <= DOVETAIL_VERIFIED_UNKNOWN;
}

void dovetail_job_progress_put(buffer_t *buf,
			       const struct dovetail_job_progress *progress)
{
	dovetail_wire_put_u8(buf, progress->waiting ? 1 : 0);
	dovetail_wire_put_num(buf, progress->users);
	dovetail_wire_put_num(buf, progress->users_all);
	dovetail_wire_put_num(buf, progress->users_before);
	dovetail_wire_put_num(buf, progress->users_elsewhere);
	dovetail_wire_put_num(buf, progress->mailboxes);
	dovetail_wire_put_num(buf, progress->messages);
	dovetail_wire_put_num(buf, progress->equal);
	dovetail_wire_put_num(buf, progress->different);
	dovetail_wire_put_num(buf, progress->repaired);
	dovetail_wire_put_num(buf, progress->unknown);
	dovetail_wire_put_num(buf, progress->bytes);
}

bool dovetail_job_progress_get(struct dovetail_wire_reader *r,
			       struct dovetail_job_progress *progress_r)
{
	i_zero(progress_r);
	progress_r->waiting = get_bool(r);
	progress_r->users = dovetail_wire_get_num(r);
	progress_r->users_all = dovetail_wire_get_num(r);
	progress_r->users_before = dovetail_wire_get_num(r);
	progress_r->users_elsewhere = dovetail_wire_get_num(r);
	progress_r->mailboxes = dovetail_wire_get_num(r);
	progress_r->messages = dovetail_wire_get_num(r);
	progress_r->equal = dovetail_wire_get_num(r);
	progress_r->different = dovetail_wire_get_num(r);
	progress_r->repaired = dovetail_wire_get_num(r);
	progress_r->unknown = dovetail_wire_get_num(r);
	progress_r->bytes = dovetail_wire_get_num(r);
	return dovetail_wire_reader_done(r);
}

void dovetail_job_done_put(buffer_t *buf, enum dovetail_job_end end,
			   const char *text)
{
	dovetail_wire_put_u8(buf, end);
	dovetail_wire_put_str(buf, text);
}

bool dovetail_job_done_get(struct dovetail_wire_reader *r, pool_t pool,
			   enum dovetail_job_end *end_r, const char **text_r)
{
	*end_r = dovetail_wire_get_u8(r);
	*text_r = dovetail_wire_get_str(r, pool);
	return dovetail_wire_reader_done(r) && *end_r <= DOVETAIL_JOB_ELSEWHERE;
}
