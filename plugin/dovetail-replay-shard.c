/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* A peer lacks entries of our log. Which changes were in them nobody knows, so it
   gets the state of all users of the shard: small when nothing is missing, and what
   a mailbox lacks the peer then asks for. One user after the other, and other
   things in between. At the end SHARD_SWEPT says that this was all; when we cannot
   get there, the peer asks again. */

#include "lib.h"
#include "array.h"
#include "ioloop.h"
#include "dovetail-replay.h"

struct shard_asker {
	const char *node;
	uint32_t number;
};

struct shard_sweep {
	struct shard_sweep *next;
	pool_t pool;
	uint8_t shard;
	ARRAY(struct shard_asker) askers;
	/* created when the sweep begins */
	ARRAY_TYPE(const_string) users;
	unsigned int next_idx;
};

/* The first one is running. */
static struct shard_sweep *sweeps;
static struct timeout *to_sweep;

static void shard_sweep_next(void *context);

static void shard_sweep_free(struct shard_sweep *sweep)
{
	pool_unref(&sweep->pool);
}

static struct shard_asker *
shard_sweep_find_asker(struct shard_sweep *sweep, const char *node)
{
	struct shard_asker *asker;

	array_foreach_modifiable(&sweep->askers, asker) {
		if (strcmp(asker->node, node) == 0)
			return asker;
	}
	return NULL;
}

static const char *shard_sweep_first_asker(struct shard_sweep *sweep)
{
	const struct shard_asker *asker = array_idx(&sweep->askers, 0);

	return asker->node;
}

static struct shard_sweep *shard_sweep_new(uint8_t shard)
{
	struct shard_sweep *sweep, **p;
	pool_t pool = pool_alloconly_create("dovetail shard sweep", 4096);

	sweep = p_new(pool, struct shard_sweep, 1);
	sweep->pool = pool;
	sweep->shard = shard;
	p_array_init(&sweep->askers, pool, 4);
	for (p = &sweeps; *p != NULL; p = &(*p)->next) ;
	*p = sweep;
	return sweep;
}

void replay_shard_requested(const char *asker_node, uint8_t shard,
			    uint32_t number)
{
	struct shard_sweep *sweep, *waiting = NULL;
	struct shard_asker *asker;

	if (shard >= replay.set.shards)
		return;
	for (sweep = sweeps; sweep != NULL; sweep = sweep->next) {
		if (sweep->shard != shard)
			continue;
		asker = shard_sweep_find_asker(sweep, asker_node);
		if (asker != NULL && asker->number == number) {
			/* asked again before the answer came */
			return;
		}
		if (!array_is_created(&sweep->users))
			waiting = sweep;
	}
	/* One that runs may be past what this question is about. */
	if (waiting == NULL)
		waiting = shard_sweep_new(shard);
	asker = shard_sweep_find_asker(waiting, asker_node);
	if (asker == NULL) {
		asker = array_append_space(&waiting->askers);
		asker->node = p_strdup(waiting->pool, asker_node);
	}
	asker->number = number;
	if (to_sweep == NULL)
		to_sweep = timeout_add_short(0, shard_sweep_next, NULL);
}

static void shard_sweep_finished(struct shard_sweep *sweep)
{
	const struct shard_asker *asker;
	struct dovetail_change change;
	const char *error;

	array_foreach(&sweep->askers, asker) T_BEGIN {
		i_zero(&change);
		change.kind = DOVETAIL_CHANGE_SHARD_SWEPT;
		change.user = "";
		change.u.shard.shard = sweep->shard;
		change.u.shard.node = asker->node;
		change.u.shard.number = asker->number;
		if (replay_queue_change(&change, &error) < 0) {
			e_warning(replay.event, "Shard %u: Cannot tell %s that "
				"this was all: %s", sweep->shard, asker->node,
				error);
		}
	} T_END;
	e_info(replay.event, "Shard %u: The state of %u users was queued, which "
	       "%s had asked for", sweep->shard, array_count(&sweep->users),
	       shard_sweep_first_asker(sweep));
}

/* Returns FALSE when there is nothing more to do. */
static bool shard_sweep_step(struct shard_sweep *sweep)
{
	const char *error;

	if (!array_is_created(&sweep->users)) {
		if (replay_users_list("*", 1ULL << sweep->shard, sweep->pool,
				      &sweep->users, &error) < 0) {
			e_error(replay.event, "Shard %u: Cannot tell %s the "
				"state of all users: %s", sweep->shard,
				shard_sweep_first_asker(sweep), error);
			return FALSE;
		}
	} else if (sweep->next_idx < array_count(&sweep->users)) {
		if (!replay_send_state(array_idx_elem(&sweep->users,
						      sweep->next_idx)))
			return FALSE;
		sweep->next_idx++;
	}
	if (sweep->next_idx < array_count(&sweep->users))
		return TRUE;
	shard_sweep_finished(sweep);
	return FALSE;
}

static void shard_sweep_next(void *context ATTR_UNUSED)
{
	struct shard_sweep *sweep = sweeps;

	timeout_remove(&to_sweep);
	T_BEGIN {
		if (!shard_sweep_step(sweep)) {
			sweeps = sweep->next;
			shard_sweep_free(sweep);
		}
	} T_END;
	if (sweeps != NULL)
		to_sweep = timeout_add_short(0, shard_sweep_next, NULL);
}

void replay_shards_deinit(void)
{
	struct shard_sweep *sweep;

	timeout_remove(&to_sweep);
	while ((sweep = sweeps) != NULL) {
		sweeps = sweep->next;
		shard_sweep_free(sweep);
	}
}
