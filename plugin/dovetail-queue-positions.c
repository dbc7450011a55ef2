/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "array.h"
#include "hash.h"
#include "llist.h"
#include "dovetail-queue-positions.h"

#include <sodium.h>

/* index_id is the mailbox's */
struct place {
	uint32_t file_seq, file_offset;
};

struct span {
	struct place lo, hi;
};

/* A mailbox has changes in the group that Redis is working on and in the one
   that is being filled; more are not kept. */
#define PENDING_COUNT 2
struct pending {
	struct {
		const struct dovetail_queue_group *group;
		struct span span;
	} slots[PENDING_COUNT];
};

struct mailbox_position {
	/* in the order of use */
	struct mailbox_position *prev, *next;

	guid_128_t id;
	uint32_t index_id;
	/* empty when nothing is known */
	struct span stored;
	/* Changes in here failed, and what was stored since does not cover it;
	   empty when there are none. hole.hi is the end of the last of them. */
	struct span hole;
	/* NULL when nothing is on its way */
	struct pending *pending;
};

struct dovetail_queue_positions {
	HASH_TABLE(uint8_t *, struct mailbox_position *) mailboxes;
	/* used longest ago first */
	struct mailbox_position *head, *tail;
	unsigned int max_count;
};

void dovetail_queue_positions_id(const char *user, const guid_128_t guid,
				 guid_128_t id_r)
{
	_Static_assert(GUID_128_SIZE >= crypto_generichash_KEYBYTES_MIN,
		       "a GUID can be the key of a hash");

	(void)crypto_generichash(id_r, GUID_128_SIZE,
				 (const unsigned char *)user, strlen(user),
				 guid, GUID_128_SIZE);
}

static struct place place_of(const struct dovetail_log_pos *pos)
{
	struct place place = {
		.file_seq = pos->file_seq,
		.file_offset = pos->file_offset,
	};
	return place;
}

static int place_cmp(struct place a, struct place b)
{
	if (a.file_seq != b.file_seq)
		return a.file_seq < b.file_seq ? -1 : 1;
	if (a.file_offset != b.file_offset)
		return a.file_offset < b.file_offset ? -1 : 1;
	return 0;
}

static bool span_is_empty(const struct span *span)
{
	return span->hi.file_seq == 0;
}

static bool span_has(const struct span *span, const struct span *part)
{
	return !span_is_empty(span) && place_cmp(span->lo, part->lo) <= 0 &&
		place_cmp(part->hi, span->hi) <= 0;
}

/* Make span the union with more when they touch; otherwise keep the one that
   is further. */
static void span_add(struct span *span, const struct span *more)
{
	if (span_is_empty(span) || place_cmp(more->lo, span->hi) > 0) {
		*span = *more;
		return;
	}
	if (place_cmp(more->hi, span->lo) < 0)
		return;
	if (place_cmp(more->lo, span->lo) < 0)
		span->lo = more->lo;
	if (place_cmp(more->hi, span->hi) > 0)
		span->hi = more->hi;
}

static void hole_add(struct span *hole, const struct span *failed)
{
	if (span_is_empty(hole)) {
		*hole = *failed;
		return;
	}
	if (place_cmp(failed->lo, hole->lo) < 0)
		hole->lo = failed->lo;
	if (place_cmp(failed->hi, hole->hi) > 0)
		hole->hi = failed->hi;
}

/* The outcomes come in the order of the log, so a hole is filled from its start;
   what begins before it need not reach over all of it. */
static void hole_fill(struct span *hole, const struct span *stored)
{
	if (span_is_empty(hole) || place_cmp(stored->lo, hole->lo) > 0)
		return;
	if (place_cmp(stored->hi, hole->hi) >= 0)
		i_zero(hole);
	else if (place_cmp(stored->hi, hole->lo) > 0)
		hole->lo = stored->hi;
}

static struct span
change_span(const struct dovetail_queue_position_change *change)
{
	struct span span = {
		.lo = place_of(&change->from),
		.hi = place_of(&change->to),
	};
	return span;
}

struct dovetail_queue_positions *
dovetail_queue_positions_init(unsigned int max_count)
{
	struct dovetail_queue_positions *table;

	i_assert(max_count > 0);

	table = i_new(struct dovetail_queue_positions, 1);
	table->max_count = max_count;
	hash_table_create(&table->mailboxes, default_pool, 0,
			  guid_128_hash, guid_128_cmp);
	return table;
}

static void position_free(struct dovetail_queue_positions *table,
			  struct mailbox_position *mp)
{
	const uint8_t *key = mp->id;

	hash_table_remove(table->mailboxes, key);
	DLLIST2_REMOVE(&table->head, &table->tail, mp);
	i_free(mp->pending);
	i_free(mp);
}

void dovetail_queue_positions_deinit(struct dovetail_queue_positions **_table)
{
	struct dovetail_queue_positions *table = *_table;

	if (table == NULL)
		return;
	*_table = NULL;
	while (table->head != NULL)
		position_free(table, table->head);
	hash_table_destroy(&table->mailboxes);
	i_free(table);
}

unsigned int
dovetail_queue_positions_count(const struct dovetail_queue_positions *table)
{
	return hash_table_count(table->mailboxes);
}

static struct mailbox_position *
position_lookup(struct dovetail_queue_positions *table,
		const guid_128_t id)
{
	struct mailbox_position *mp;

	mp = hash_table_lookup(table->mailboxes, id);
	if (mp != NULL && mp != table->tail) {
		DLLIST2_REMOVE(&table->head, &table->tail, mp);
		DLLIST2_APPEND(&table->head, &table->tail, mp);
	}
	return mp;
}

static struct mailbox_position *
position_get(struct dovetail_queue_positions *table, const guid_128_t id,
	     uint32_t index_id)
{
	struct mailbox_position *mp, *next;
	uint8_t *key;

	mp = position_lookup(table, id);
	if (mp == NULL) {
		mp = i_new(struct mailbox_position, 1);
		guid_128_copy(mp->id, id);
		mp->index_id = index_id;
		key = mp->id;
		hash_table_insert(table->mailboxes, key, mp);
		DLLIST2_APPEND(&table->head, &table->tail, mp);

		/* what is on its way is few and soon over */
		for (mp = table->head; mp != table->tail &&
		     hash_table_count(table->mailboxes) > table->max_count;
		     mp = next) {
			next = mp->next;
			if (mp->pending == NULL)
				position_free(table, mp);
		}
		mp = table->tail;
	} else if (mp->index_id != index_id) {
		mp->index_id = index_id;
		i_zero(&mp->stored);
		i_zero(&mp->hole);
		i_free(mp->pending);
	}
	return mp;
}

enum dovetail_queue_known
dovetail_queue_positions_check(struct dovetail_queue_positions *table,
			       const struct dovetail_queue_position_change *change,
			       struct dovetail_queue_group **group_r)
{
	struct mailbox_position *mp;
	struct span span = change_span(change), way;
	unsigned int i;

	/* a part of a record claims no place, so no place tells about it */
	if (change->snapshot || place_cmp(span.lo, span.hi) == 0)
		return DOVETAIL_QUEUE_KNOWN_NOT;
	mp = position_lookup(table, change->id);
	if (mp == NULL || mp->index_id != change->to.index_id ||
	    change->from.index_id != change->to.index_id)
		return DOVETAIL_QUEUE_KNOWN_NOT;
	if (span_has(&mp->stored, &span))
		return DOVETAIL_QUEUE_KNOWN_STORED;
	if (mp->pending == NULL)
		return DOVETAIL_QUEUE_KNOWN_NOT;

	for (i = 0; i < PENDING_COUNT; i++) {
		if (mp->pending->slots[i].group == NULL)
			continue;
		/* what is stored is certain, what is in another group is not */
		way = mp->pending->slots[i].span;
		if (!span_is_empty(&mp->stored) &&
		    place_cmp(way.lo, mp->stored.hi) <= 0 &&
		    place_cmp(mp->stored.lo, way.lo) < 0)
			way.lo = mp->stored.lo;
		if (span_has(&way, &span)) {
			*group_r = (struct dovetail_queue_group *)
				mp->pending->slots[i].group;
			return DOVETAIL_QUEUE_KNOWN_PENDING;
		}
	}
	return DOVETAIL_QUEUE_KNOWN_NOT;
}

void dovetail_queue_positions_pending(struct dovetail_queue_positions *table,
				      const struct dovetail_queue_position_change *change,
				      struct dovetail_queue_group *group)
{
	struct mailbox_position *mp;
	struct span span = change_span(change);
	struct pending *pending;
	unsigned int i;

	mp = position_get(table, change->id, change->to.index_id);
	if (mp->pending == NULL)
		mp->pending = i_new(struct pending, 1);
	pending = mp->pending;

	for (i = 0; i < PENDING_COUNT; i++) {
		if (pending->slots[i].group == group) {
			if (change->snapshot)
				pending->slots[i].span = span;
			else
				span_add(&pending->slots[i].span, &span);
			return;
		}
	}
	for (i = 0; i < PENDING_COUNT; i++) {
		if (pending->slots[i].group == NULL)
			break;
	}
	if (i == PENDING_COUNT) {
		/* forget the oldest */
		memmove(&pending->slots[0], &pending->slots[1],
			sizeof(pending->slots[0]) * (PENDING_COUNT - 1));
		i = PENDING_COUNT - 1;
	}
	pending->slots[i].group = group;
	pending->slots[i].span = span;
}

static void pending_drop(struct mailbox_position *mp,
			 const struct dovetail_queue_group *group)
{
	bool used = FALSE;
	unsigned int i;

	if (mp->pending == NULL)
		return;
	for (i = 0; i < PENDING_COUNT; i++) {
		if (mp->pending->slots[i].group == group)
			i_zero(&mp->pending->slots[i]);
		if (mp->pending->slots[i].group != NULL)
			used = TRUE;
	}
	if (!used)
		i_free(mp->pending);
	else if (mp->pending->slots[0].group == NULL) {
		/* the older one stands first */
		mp->pending->slots[0] = mp->pending->slots[1];
		i_zero(&mp->pending->slots[1]);
	}
}

void dovetail_queue_positions_done(struct dovetail_queue_positions *table,
				   const struct dovetail_queue_position_change *change,
				   const struct dovetail_queue_group *group,
				   bool stored)
{
	struct mailbox_position *mp;
	struct span span = change_span(change);

	mp = position_lookup(table, change->id);
	if (mp == NULL) {
		/* the failure of what we know nothing of must be known */
		mp = position_get(table, change->id, change->to.index_id);
	}
	if (mp->index_id != change->to.index_id) {
		/* overtaken by a new index */
		return;
	}
	pending_drop(mp, group);

	if (!stored && change->snapshot) {
		/* what was known is as true as before */
	} else if (!stored) {
		hole_add(&mp->hole, &span);
	} else if (change->snapshot) {
		/* says all there is up to hi */
		mp->stored = span;
		i_zero(&mp->hole);
	} else {
		span_add(&mp->stored, &span);
		hole_fill(&mp->hole, &span);
	}
}

bool dovetail_queue_positions_get(struct dovetail_queue_positions *table,
				  const guid_128_t id, uint32_t index_id,
				  struct dovetail_log_pos *pos_r)
{
	struct mailbox_position *mp;

	i_zero(pos_r);
	mp = position_lookup(table, id);
	if (mp == NULL || mp->index_id != index_id || !span_is_empty(&mp->hole) ||
	    span_is_empty(&mp->stored))
		return FALSE;
	pos_r->index_id = index_id;
	pos_r->file_seq = mp->stored.hi.file_seq;
	pos_r->file_offset = mp->stored.hi.file_offset;
	return TRUE;
}
