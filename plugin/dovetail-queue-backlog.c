/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "dovetail-queue-backlog.h"

struct run {
	struct dovetail_queue_id first, last;
	uint64_t count, bytes, time_usecs;
};

struct dovetail_queue_backlog {
	/* a ring: runs[(start + 0..used-1) % size] */
	struct run *runs;
	unsigned int size, start, used, max_runs;
	uint64_t entries, bytes;
};

int dovetail_queue_id_parse(const char *str, size_t len,
			    struct dovetail_queue_id *id_r)
{
	const char *p = memchr(str, '-', len);

	if (p == NULL || len > 41)
		return -1;
	if (str_to_uint64(t_strdup_until(str, p), &id_r->generation) < 0 ||
	    str_to_uint64(t_strdup_until(p + 1, str + len), &id_r->seq) < 0)
		return -1;
	return 0;
}

struct dovetail_queue_backlog *
dovetail_queue_backlog_init(unsigned int max_runs)
{
	struct dovetail_queue_backlog *backlog;

	i_assert(max_runs >= 4);

	backlog = i_new(struct dovetail_queue_backlog, 1);
	backlog->max_runs = max_runs;
	return backlog;
}

void dovetail_queue_backlog_deinit(struct dovetail_queue_backlog **_backlog)
{
	struct dovetail_queue_backlog *backlog = *_backlog;

	if (backlog == NULL)
		return;
	*_backlog = NULL;
	i_free(backlog->runs);
	i_free(backlog);
}

void dovetail_queue_backlog_clear(struct dovetail_queue_backlog *backlog)
{
	i_free(backlog->runs);
	backlog->size = backlog->start = backlog->used = 0;
	backlog->entries = backlog->bytes = 0;
}

static struct run *
run_idx(const struct dovetail_queue_backlog *backlog, unsigned int i)
{
	return &backlog->runs[(backlog->start + i) % backlog->size];
}

/* Make runs half as many by joining neighbours. */
static void backlog_join(struct dovetail_queue_backlog *backlog)
{
	const struct run *src;
	struct run *dest;
	unsigned int i;

	for (i = 0; i < backlog->used; i++) {
		src = run_idx(backlog, i);
		dest = run_idx(backlog, i / 2);
		if (i % 2 == 0) {
			*dest = *src;
			continue;
		}
		dest->last = src->last;
		dest->count += src->count;
		dest->bytes += src->bytes;
	}
	backlog->used = (backlog->used + 1) / 2;
}

static void backlog_grow(struct dovetail_queue_backlog *backlog)
{
	struct run *runs;
	unsigned int i, size;

	size = backlog->size == 0 ? 16 : backlog->size * 2;
	if (size > backlog->max_runs)
		size = backlog->max_runs;
	runs = i_new(struct run, size);
	for (i = 0; i < backlog->used; i++)
		runs[i] = *run_idx(backlog, i);
	i_free(backlog->runs);
	backlog->runs = runs;
	backlog->start = 0;
	backlog->size = size;
}

void dovetail_queue_backlog_add(struct dovetail_queue_backlog *backlog,
				const struct dovetail_queue_id *first,
				const struct dovetail_queue_id *last,
				uint64_t count, uint64_t bytes,
				uint64_t time_usecs)
{
	struct run *run;

	if (backlog->used == backlog->size) {
		if (backlog->size < backlog->max_runs)
			backlog_grow(backlog);
		else
			backlog_join(backlog);
	}
	run = run_idx(backlog, backlog->used++);
	run->first = *first;
	run->last = *last;
	run->count = count;
	run->bytes = bytes;
	run->time_usecs = time_usecs;
	backlog->entries += count;
	backlog->bytes += bytes;
}

/* How many entries of run come after id. Exact when the run is one entry, or
   of one generation without holes; otherwise as if id were before the run. */
static uint64_t run_after(const struct run *run,
			  const struct dovetail_queue_id *id)
{
	uint64_t left;

	if (dovetail_queue_id_cmp(&run->last, id) <= 0)
		return 0;
	if (dovetail_queue_id_cmp(id, &run->first) < 0 ||
	    run->last.generation != id->generation)
		return run->count;
	left = run->last.seq - id->seq;
	return left < run->count ? left : run->count;
}

static uint64_t run_bytes(const struct run *run, uint64_t count)
{
	return count == run->count ? run->bytes :
		(uint64_t)((double)run->bytes * count / run->count);
}

uint64_t dovetail_queue_backlog_confirm(struct dovetail_queue_backlog *backlog,
					const struct dovetail_queue_id *id)
{
	uint64_t left, bytes, freed = 0;
	struct run *run;

	while (backlog->used > 0) {
		run = run_idx(backlog, 0);
		left = run_after(run, id);
		bytes = run_bytes(run, left);
		freed += run->bytes - bytes;
		backlog->bytes -= run->bytes - bytes;
		backlog->entries -= run->count - left;
		if (left > 0) {
			if (left < run->count) {
				run->first = *id;
				run->first.seq++;
				run->count = left;
				run->bytes = bytes;
			}
			break;
		}
		backlog->start = (backlog->start + 1) % backlog->size;
		backlog->used--;
	}
	return freed;
}

void dovetail_queue_backlog_total(const struct dovetail_queue_backlog *backlog,
				  struct dovetail_queue_backlog_sum *sum_r)
{
	i_zero(sum_r);
	sum_r->entries = backlog->entries;
	sum_r->bytes = backlog->bytes;
	if (backlog->used > 0)
		sum_r->oldest_usecs = run_idx(backlog, 0)->time_usecs;
}

void dovetail_queue_backlog_after(const struct dovetail_queue_backlog *backlog,
				  const struct dovetail_queue_id *id,
				  struct dovetail_queue_backlog_sum *sum_r)
{
	const struct run *run;
	uint64_t left;
	unsigned int i;

	i_zero(sum_r);
	/* from the end: replicas are near it */
	for (i = backlog->used; i > 0; i--) {
		run = run_idx(backlog, i - 1);
		left = run_after(run, id);
		if (left == 0)
			break;
		sum_r->entries += left;
		sum_r->bytes += run_bytes(run, left);
		sum_r->oldest_usecs = run->time_usecs;
	}
}
