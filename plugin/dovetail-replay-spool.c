/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* Large bodies come in chunks ahead of the change that needs them, mixed with
   other users' changes. They wait in temporary files that have no name. One that
   its change never follows (its sender died) makes room after a while. */

#include "lib.h"
#include "array.h"
#include "ioloop.h"
#include "istream.h"
#include "ostream.h"
#include "iostream-temp.h"
#include "dovetail-replay.h"

#define SPOOL_MAX_COUNT 64
#define SPOOL_MAX_AGE_SECS (10 * 60)
#define SPOOL_MEMORY_SIZE (32 * 1024)

struct replay_spool {
	uint8_t id[DOVETAIL_SPOOL_ID_SIZE];
	time_t last_used;
	uint64_t size;
	/* one or the other; both NULL: a chunk was missing */
	struct ostream *output;
	struct istream *input;
};

static ARRAY(struct replay_spool) spools;

static struct replay_spool *
spool_find(const uint8_t id[DOVETAIL_SPOOL_ID_SIZE], unsigned int *idx_r)
{
	struct replay_spool *spool;

	if (!array_is_created(&spools))
		return NULL;
	array_foreach_modifiable(&spools, spool) {
		if (memcmp(spool->id, id, sizeof(spool->id)) == 0) {
			*idx_r = array_foreach_idx(&spools, spool);
			return spool;
		}
	}
	return NULL;
}

static void spool_delete(unsigned int idx)
{
	struct replay_spool *spool = array_idx_modifiable(&spools, idx);

	o_stream_destroy(&spool->output);
	i_stream_destroy(&spool->input);
	array_delete(&spools, idx, 1);
}

static void spool_make_room(void)
{
	const struct replay_spool *spool, *oldest;
	unsigned int i;

	for (i = array_count(&spools); i > 0; i--) {
		spool = array_idx(&spools, i - 1);
		if (spool->last_used + SPOOL_MAX_AGE_SECS < ioloop_time)
			spool_delete(i - 1);
	}
	while (array_count(&spools) >= SPOOL_MAX_COUNT) {
		oldest = array_front(&spools);
		array_foreach(&spools, spool) {
			if (spool->last_used < oldest->last_used)
				oldest = spool;
		}
		spool_delete(array_ptr_to_idx(&spools, oldest));
	}
}

void replay_spool_add(const struct dovetail_change_spool *chunk)
{
	struct replay_spool *spool;
	unsigned int idx;

	if (!array_is_created(&spools))
		i_array_init(&spools, 8);
	spool = spool_find(chunk->id, &idx);
	if (spool == NULL) {
		if (chunk->offset != 0)
			return;
		spool_make_room();
		spool = array_append_space(&spools);
		memcpy(spool->id, chunk->id, sizeof(spool->id));
		spool->output = iostream_temp_create_sized(
			t_strconcat(replay.dir, "/spool.", NULL), 0,
			"dovetail body", SPOOL_MEMORY_SIZE);
	}
	spool->last_used = ioloop_time;
	if (spool->output == NULL)
		return;
	if (chunk->offset + chunk->size <= spool->size) {
		/* read again after a restart */
		return;
	}
	if (chunk->offset != spool->size ||
	    o_stream_send(spool->output, chunk->data, chunk->size) !=
	    (ssize_t)chunk->size) {
		if (spool->output->stream_errno != 0) {
			e_error(replay.event, "write(%s) failed: %s",
				o_stream_get_name(spool->output),
				o_stream_get_error(spool->output));
		}
		/* the change will lack it and ask for it */
		o_stream_destroy(&spool->output);
		return;
	}
	spool->size += chunk->size;
}

struct istream *
replay_spool_get(const uint8_t id[DOVETAIL_SPOOL_ID_SIZE], uint64_t size)
{
	struct replay_spool *spool;
	unsigned int idx;

	spool = spool_find(id, &idx);
	if (spool == NULL || spool->size != size)
		return NULL;
	if (spool->output != NULL) {
		spool->input = iostream_temp_finish(&spool->output,
						    IO_BLOCK_SIZE);
	}
	if (spool->input != NULL)
		i_stream_seek(spool->input, 0);
	return spool->input;
}

void replay_spool_drop(const uint8_t id[DOVETAIL_SPOOL_ID_SIZE])
{
	unsigned int idx;

	if (spool_find(id, &idx) != NULL)
		spool_delete(idx);
}

void replay_spool_deinit(void)
{
	if (!array_is_created(&spools))
		return;
	while (array_count(&spools) > 0)
		spool_delete(0);
	array_free(&spools);
}
