/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "array.h"
#include "buffer.h"
#include "str.h"
#include "test-common.h"
#include "dovetail-compat.h"
#include "dovetail-job.h"

typedef bool test_get_t(struct dovetail_wire_reader *r, pool_t pool);

static bool get_job(struct dovetail_wire_reader *r, pool_t pool)
{
	struct dovetail_job job;

	return dovetail_job_get(r, pool, &job);
}

static bool get_result(struct dovetail_wire_reader *r, pool_t pool)
{
	struct dovetail_job_result result;

	return dovetail_job_result_get(r, pool, &result);
}

static bool get_progress(struct dovetail_wire_reader *r,
			 pool_t pool ATTR_UNUSED)
{
	struct dovetail_job_progress progress;

	return dovetail_job_progress_get(r, &progress);
}

static bool get_done(struct dovetail_wire_reader *r, pool_t pool)
{
	enum dovetail_job_end end;
	const char *text;

	return dovetail_job_done_get(r, pool, &end, &text);
}

static bool accepts(test_get_t *get, const void *data, size_t size)
{
	struct dovetail_wire_reader r;
	unsigned char *copy = i_malloc(I_MAX(size, 1));
	bool ok;

	/* exactly as large as it says: a read past its end is noticed */
	memcpy(copy, data, size);
	dovetail_wire_reader_init(&r, copy, size);
	ok = get(&r, pool_datastack_create());
	i_free(copy);
	return ok;
}

/* Neither a part of it nor more than it. */
static void test_cut(test_get_t *get, const buffer_t *buf)
{
	buffer_t *longer = t_buffer_create(256);
	size_t size;

	for (size = 0; size < buf->used; size++)
		test_assert_idx(!accepts(get, buf->data, size), size);
	test_assert(accepts(get, buf->data, size));
	buffer_append_buf(longer, buf, 0, SIZE_MAX);
	buffer_append_c(longer, 0);
	test_assert(!accepts(get, longer->data, longer->used));
}

static void test_dovetail_job(void)
{
	static const unsigned char expected[] =
		"\005" "\004u*?x" "\200\010" "\001";
	struct dovetail_job job = {
		.flags = DOVETAIL_VERIFY_DEEP | DOVETAIL_VERIFY_REPAIR,
		.users = "u*?x", .rate = 1024, .resume = TRUE,
	};
	struct dovetail_wire_reader r;
	struct dovetail_job got;
	buffer_t *buf = t_buffer_create(2048);
	string_t *users;

	test_begin("dovetail job");
	dovetail_job_put(buf, &job);
	test_assert_memcmp(buf->data, buf->used, expected,
			   sizeof(expected) - 1);
	dovetail_wire_reader_init(&r, buf->data, buf->used);
	test_assert(dovetail_job_get(&r, pool_datastack_create(), &got));
	test_assert(got.flags == job.flags && got.rate == 1024 && got.resume);
	test_assert_strcmp(got.users, "u*?x");
	test_cut(get_job, buf);

	test_assert(accepts(get_job, "\007\001x\000\000", 5));
	/* unknown flag; no user; neither true nor false; resume one user */
	test_assert(!accepts(get_job, "\010\001x\000\000", 5));
	test_assert(!accepts(get_job, "\000\000\000\000", 4));
	test_assert(!accepts(get_job, "\000\001*\000\002", 5));
	test_assert(accepts(get_job, "\000\001*\000\001", 5));
	test_assert(!accepts(get_job, "\000\001x\000\001", 5));
	/* the highest rate, and one more */
	test_assert(accepts(get_job, "\000\001x\377\377\377\377\017\000", 9));
	test_assert(!accepts(get_job, "\000\001x\200\200\200\200\020\000", 9));

	users = t_str_new(2048);
	while (str_len(users) < DOVETAIL_JOB_USERS_MAX_LEN)
		str_append_c(users, 'x');
	job.users = str_c(users);
	job.resume = FALSE;
	buffer_set_used_size(buf, 0);
	dovetail_job_put(buf, &job);
	test_assert(accepts(get_job, buf->data, buf->used));
	str_append_c(users, 'x');
	job.users = str_c(users);
	buffer_set_used_size(buf, 0);
	dovetail_job_put(buf, &job);
	test_assert(!accepts(get_job, buf->data, buf->used));

	job.users = "jane";
	test_assert(!dovetail_job_is_of_many(&job));
	job.users = "jane?";
	test_assert(dovetail_job_is_of_many(&job));
	job.users = "*";
	test_assert(dovetail_job_is_of_many(&job));
	test_end();
}

static void test_dovetail_job_result(void)
{
	struct dovetail_job_result result = {
		.user = "jane", .mailbox = "Work/\xc3\xbc", .peer = "b",
		.result = DOVETAIL_VERIFIED_DIFFERENT, .messages = 4294967295,
	};
	struct dovetail_job_result got;
	struct dovetail_wire_reader r;
	buffer_t *buf = t_buffer_create(1024);
	const char *const *texts, *text = "UID 3: \\Seen";
	unsigned int i, count;

	test_begin("dovetail job result");
	t_array_init(&result.texts, 4);
	dovetail_job_result_put(buf, &result);
	test_cut(get_result, buf);

	array_push_back(&result.texts, &text);
	text = "";
	array_push_back(&result.texts, &text);
	buffer_set_used_size(buf, 0);
	dovetail_job_result_put(buf, &result);
	test_cut(get_result, buf);
	dovetail_wire_reader_init(&r, buf->data, buf->used);
	test_assert(dovetail_job_result_get(&r, pool_datastack_create(), &got));
	test_assert_strcmp(got.user, "jane");
	test_assert_strcmp(got.mailbox, "Work/\xc3\xbc");
	test_assert_strcmp(got.peer, "b");
	test_assert(got.result == DOVETAIL_VERIFIED_DIFFERENT);
	test_assert(got.messages == 4294967295);
	texts = array_get(&got.texts, &count);
	test_assert(count == 2);
	test_assert_strcmp(texts[0], "UID 3: \\Seen");
	test_assert_strcmp(texts[1], "");

	/* no such result */
	test_assert(accepts(get_result, "\001x\000\000\004\000\000", 7));
	test_assert(!accepts(get_result, "\001x\000\000\005\000\000", 7));
	test_assert(!accepts(get_result, "\001x\000\000\000\000\000", 7));
	/* as many texts as an answer has, one of the worker's own, and one
	   more */
	for (i = count; i < DOVETAIL_VERIFIED_TEXTS_MAX + 1; i++)
		array_push_back(&result.texts, &text);
	buffer_set_used_size(buf, 0);
	dovetail_job_result_put(buf, &result);
	test_assert(accepts(get_result, buf->data, buf->used));
	array_push_back(&result.texts, &text);
	buffer_set_used_size(buf, 0);
	dovetail_job_result_put(buf, &result);
	test_assert(!accepts(get_result, buf->data, buf->used));
	test_assert(!accepts(get_result, "\001x\000\000\001\000"
			  "\377\377\377\377\377\377\377\377\377\001", 16));
	test_end();
}

static void test_dovetail_job_progress(void)
{
	const struct dovetail_job_progress progress = {
		.waiting = TRUE, .users = 1, .users_all = 200,
		.users_before = 3, .users_elsewhere = 4, .mailboxes = 5,
		.messages = 1ULL << 40, .equal = 6, .different = 7,
		.repaired = 8, .unknown = 9, .bytes = 300,
	};
	static const unsigned char expected[] =
		"\001\001\310\001\003\004\005\200\200\200\200\200\040"
		"\006\007\010\011\254\002";
	struct dovetail_job_progress got;
	struct dovetail_wire_reader r;
	buffer_t *buf = t_buffer_create(64);

	test_begin("dovetail job progress");
	dovetail_job_progress_put(buf, &progress);
	test_assert_memcmp(buf->data, buf->used, expected,
			   sizeof(expected) - 1);
	test_cut(get_progress, buf);
	dovetail_wire_reader_init(&r, buf->data, buf->used);
	test_assert(dovetail_job_progress_get(&r, &got));
	test_assert(got.waiting && got.users == 1 && got.users_all == 200 &&
		    got.users_before == 3 && got.users_elsewhere == 4 &&
		    got.mailboxes == 5 && got.messages == 1ULL << 40 &&
		    got.equal == 6 && got.different == 7 &&
		    got.repaired == 8 && got.unknown == 9 &&
		    got.bytes == 300);
	test_end();
}

static void test_dovetail_job_done(void)
{
	struct dovetail_wire_reader r;
	enum dovetail_job_end end;
	const char *text;
	buffer_t *buf = t_buffer_create(64);

	test_begin("dovetail job done");
	dovetail_job_done_put(buf, DOVETAIL_JOB_ELSEWHERE, "on b");
	test_cut(get_done, buf);
	dovetail_wire_reader_init(&r, buf->data, buf->used);
	test_assert(dovetail_job_done_get(&r, pool_datastack_create(), &end,
					  &text));
	test_assert(end == DOVETAIL_JOB_ELSEWHERE);
	test_assert_strcmp(text, "on b");
	test_assert(accepts(get_done, "\000\000", 2));
	test_assert(!accepts(get_done, "\004\000", 2));
	test_end();
}

int main(void)
{
	static void (*const test_functions[])(void) = {
		test_dovetail_job,
		test_dovetail_job_result,
		test_dovetail_job_progress,
		test_dovetail_job_done,
		NULL
	};
	return test_run(test_functions);
}
