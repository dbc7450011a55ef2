/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "array.h"
#include "hash.h"
#include "ioloop.h"
#include "str.h"
#include "str-sanitize.h"
#include "dovetail-health-private.h"
#include "dovetail-service.h"

#include <time.h>

struct health health;

#define MSG_MAX_LEN 400
#define SINCE_TOLERANCE_MSECS 2000

/* ---- changes ---- */

static void health_log(const struct dovetail_health *h, const char *about,
		       enum dovetail_health_state before)
{
	struct event_passthrough *e;
	const char *text;

	e = event_create_passthrough(health.event)->
		set_name("dovetail_health_changed")->
		add_str("about", about)->
		add_str("state", dovetail_health_state_name(h->state))->
		add_str("state_before", dovetail_health_state_name(before))->
		add_str("reason", h->reason)->
		add_str("remedy", h->remedy)->
		add_str("who", dovetail_health_who_name(h->who));
	text = t_strdup_printf("%s is %s (it was %s)%s%s%s%s", about,
		dovetail_health_state_name(h->state),
		dovetail_health_state_name(before),
		h->reason[0] == '\0' ? "" : ": ",
		str_sanitize(h->reason, MSG_MAX_LEN),
		h->remedy[0] == '\0' ? "" : ". ",
		str_sanitize(h->remedy, MSG_MAX_LEN));
	if (h->state > before && h->state > DOVETAIL_HEALTH_CATCHING_UP)
		e_warning(e->event(), "%s", text);
	else
		e_info(e->event(), "%s", text);
}

static void health_set(struct dovetail_health *h, const char *about,
		       const struct dovetail_health_finding *finding,
		       uint64_t now)
{
	enum dovetail_health_state before = h->state;

	if (dovetail_health_update(h, &health.set.health, finding, now) &&
	    about != NULL)
		health_log(h, about, before);
}

/* ---- the node and its peers ---- */

static uint64_t health_age(uint64_t now)
{
	return health.pool == NULL ? DOVETAIL_HEALTH_NEVER :
		now - health.report_msecs;
}

static bool health_is_old(void)
{
	return health_age(dovetail_monotonic_msecs()) >=
		health.set.health.max_age_msecs;
}

static uint64_t age_add(uint64_t age, uint64_t more)
{
	return age == DOVETAIL_HEALTH_NEVER || more == DOVETAIL_HEALTH_NEVER ?
		DOVETAIL_HEALTH_NEVER : age + more;
}

static const char *null_if_empty(const char *str)
{
	return str == NULL || *str == '\0' ? NULL : str;
}

static void health_judge_node(uint64_t now)
{
	const struct dovetail_health_report *report = &health.report;
	struct dovetail_health_finding finding;
	struct dovetail_health_node node;

	i_zero(&node);
	node.node = health.set.node;
	node.age_msecs = health_age(now);
	node.peers = str_array_length(health.set.peers);
	node.fenced = null_if_empty(report->fenced);
	node.unprotected = null_if_empty(report->unprotected);
	node.redis_failed = null_if_empty(report->redis_error) != NULL;
	node.refuses = report->refuses;
	node.queue_bytes = report->queue_bytes;
	node.queue_max_bytes = health.set.queue_max_size;
	dovetail_health_judge_node(&health.set.health, &node,
				   health.node.general.state, &finding);
	health_set(&health.node.general, health.set.node, &finding, now);

	node.dirty = report->dirty;
	node.dirty_failing = report->dirty_failing;
	node.dirty_msecs = report->dirty_msecs;
	dovetail_health_judge_node(&health.set.health, &node,
				   health.node.all.state, &finding);
	health_set(&health.node.all, NULL, &finding, now);
}

static void
health_judge_to(struct health_peer *peer,
		const struct dovetail_health_report_peer *rpeer, uint64_t now)
{
	struct dovetail_health_finding finding;
	struct dovetail_health_to to;
	uint64_t age = health_age(now);

	i_zero(&to);
	to.peer = peer->name;
	to.age_msecs = rpeer == NULL ? DOVETAIL_HEALTH_NEVER : age;
	if (rpeer != NULL) {
		to.redis_failed =
			null_if_empty(health.report.redis_error) != NULL;
		to.seen = rpeer->to.seen;
		to.heard_msecs = age_add(rpeer->to.heard_msecs, age);
		to.entries = rpeer->to.entries;
		to.lag_msecs = rpeer->to.lag_msecs;
		peer->to.idle_msecs = dovetail_health_progress_update(
			&peer->to.progress, &health.set.health,
			rpeer->to.position, to.entries > 0, to.lag_msecs, now);
		to.idle_msecs = peer->to.idle_msecs;
		to.shrinking = peer->to.progress.shrinking;
	}
	dovetail_health_judge_to(&health.set.health, &to,
				 peer->to.pair.general.state, &finding);
	health_set(&peer->to.pair.general, NULL, &finding, now);

	if (rpeer != NULL)
		to.troubles = rpeer->to.troubles;
	dovetail_health_judge_to(&health.set.health, &to,
				 peer->to.pair.all.state, &finding);
	health_set(&peer->to.pair.all, t_strdup_printf("%s to %s",
			health.set.node, peer->name), &finding, now);
}

static void
health_judge_from(struct health_peer *peer,
		  const struct dovetail_health_report_peer *rpeer, uint64_t now)
{
	struct dovetail_health_finding finding;
	struct dovetail_health_from from;
	uint64_t age = health_age(now);

	i_zero(&from);
	from.peer = peer->name;
	from.age_msecs = DOVETAIL_HEALTH_NEVER;
	if (rpeer != NULL) {
		from.age_msecs = age_add(rpeer->from.age_msecs, age);
		from.shards_missing = rpeer->from.shards_missing;
		if (from.shards_missing == 0)
			peer->from_missing_since = 0;
		else if (peer->from_missing_since == 0)
			peer->from_missing_since = now;
		from.missing_msecs = from.shards_missing == 0 ? 0 :
			now - peer->from_missing_since;
		from.redis_error = null_if_empty(rpeer->from.redis_error);
		from.stuck = null_if_empty(rpeer->from.stuck);
		from.heard_msecs = age_add(rpeer->from.heard_msecs, age);
		from.entries = rpeer->from.entries;
		from.lag_msecs = rpeer->from.lag_msecs;
		peer->from.idle_msecs = dovetail_health_progress_update(
			&peer->from.progress, &health.set.health,
			rpeer->from.position, from.entries > 0, from.lag_msecs,
			now);
		from.idle_msecs = peer->from.idle_msecs;
		from.shrinking = peer->from.progress.shrinking;
	}
	dovetail_health_judge_from(&health.set.health, &from,
				   peer->from.pair.general.state, &finding);
	health_set(&peer->from.pair.general, NULL, &finding, now);

	if (rpeer != NULL)
		from.troubles = rpeer->from.troubles;
	dovetail_health_judge_from(&health.set.health, &from,
				   peer->from.pair.all.state, &finding);
	health_set(&peer->from.pair.all, t_strdup_printf("%s from %s",
			health.set.node, peer->name), &finding, now);
}

const struct dovetail_health_report_peer *
health_state_report_peer(const char *name)
{
	const struct dovetail_health_report_peer *rpeer;

	if (health.pool == NULL)
		return NULL;
	array_foreach(&health.report.peers, rpeer) {
		if (strcmp(rpeer->peer, name) == 0)
			return rpeer;
	}
	return NULL;
}

/* ---- users ---- */

static void health_user_free(struct health_user *user)
{
	dovetail_health_deinit(&user->health);
	i_free(user->mailbox);
	i_free(user->name);
	i_free(user);
}

static struct health_user *health_user_get(const char *name, uint64_t now)
{
	struct health_user *user = hash_table_lookup(health.users, name);

	if (user != NULL)
		return user;
	user = i_new(struct health_user, 1);
	user->name = i_strdup(name);
	user->mailbox = i_strdup("");
	dovetail_health_init(&user->health, now);
	hash_table_insert(health.users, user->name, user);
	return user;
}

/* A user who is named several times has the worst of it all. */
static void health_judge_trouble(const struct dovetail_health_trouble_of *of,
				 uint64_t now)
{
	struct dovetail_health_finding finding;
	struct dovetail_health_user in;
	struct health_user *user = health_user_get(of->user, now);

	i_zero(&in);
	in.user = of->user;
	in.mailbox = of->mailbox;
	in.primary = of->primary;
	in.replica = of->replica;
	in.trouble = of->trouble;
	in.trouble_msecs = of->msecs;
	in.text = of->text;
	dovetail_health_judge_user(&health.set.health, &in, &finding);
	user->troubles++;
	if (user->present && finding.state <= user->worst.state)
		return;
	user->present = TRUE;
	user->worst = finding;
	user->trouble = of->trouble;
	if (strcmp(user->mailbox, of->mailbox) != 0) {
		i_free(user->mailbox);
		user->mailbox = i_strdup(of->mailbox);
	}
}

static void health_judge_users(uint64_t now)
{
	static const struct dovetail_health_finding ok = {
		.state = DOVETAIL_HEALTH_OK, .reason = "", .remedy = "",
	};
	const struct dovetail_health_trouble_of *of;
	struct hash_iterate_context *iter;
	struct health_user *user;
	char *name;

	iter = hash_table_iterate_init(health.users);
	while (hash_table_iterate(iter, health.users, &name, &user)) {
		user->present = FALSE;
		user->troubles = 0;
	}
	hash_table_iterate_deinit(&iter);

	array_foreach(&health.report.troubles, of)
		health_judge_trouble(of, now);

	hash_table_freeze(health.users);
	iter = hash_table_iterate_init(health.users);
	while (hash_table_iterate(iter, health.users, &name, &user)) {
		health_set(&user->health, NULL,
			   user->present ? &user->worst : &ok, now);
		if (user->health.state == DOVETAIL_HEALTH_OK) {
			hash_table_remove(health.users, name);
			health_user_free(user);
		}
	}
	hash_table_iterate_deinit(&iter);
	hash_table_thaw(health.users);
}

/* ---- in ---- */

void health_state_tick(void)
{
	struct health_peer *peer;
	uint64_t now = dovetail_monotonic_msecs();

	T_BEGIN {
		health_judge_node(now);
	} T_END;
	array_foreach_elem(&health.peers, peer) T_BEGIN {
		const struct dovetail_health_report_peer *rpeer =
			health_state_report_peer(peer->name);

		health_judge_to(peer, rpeer, now);
		health_judge_from(peer, rpeer, now);
	} T_END;
	if (health.pool != NULL) T_BEGIN {
		health_judge_users(now);
	} T_END;
}

void health_state_report(pool_t pool,
			 const struct dovetail_health_report *report)
{
	if (!report->known) {
		/* the one before counts until it is old */
		pool_unref(&pool);
		return;
	}
	pool_unref(&health.pool);
	health.pool = pool;
	health.report = *report;
	health.report_ended = FALSE;
	health.report_msecs = I_MIN(report->sent_msecs,
				    dovetail_monotonic_msecs());
	health_state_tick();
}

void health_state_report_ended(void)
{
	health.report_ended = TRUE;
}

/* ---- out ---- */

bool health_state_is_protected(void)
{
	return !health.report_ended && !health_is_old() &&
		health.report.unprotected[0] == '\0' &&
		health.set.peers[0] != NULL;
}

void health_state_foreach(void (*callback)(const struct dovetail_health *h,
					   void *context), void *context)
{
	struct health_peer *peer;

	callback(&health.node.general, context);
	array_foreach_elem(&health.peers, peer) {
		callback(&peer->to.pair.general, context);
		callback(&peer->from.pair.general, context);
	}
}

static void
worst_of(const struct dovetail_health **worst, const char **about,
	 const struct dovetail_health *h, const char *name)
{
	/* Since when is all well? Since the last became so. Since when is
	   something wrong? Since the first was so. */
	if (*worst == NULL || h->state > (*worst)->state ||
	    (h->state == (*worst)->state &&
	     (h->state == DOVETAIL_HEALTH_OK) ==
	     (h->since_msecs > (*worst)->since_msecs))) {
		*worst = h;
		*about = name;
	}
}

const struct dovetail_health *
health_state_worst(bool general, const char **about_r)
{
	const struct dovetail_health *worst = NULL;
	struct health_peer *peer;

	worst_of(&worst, about_r, general ? &health.node.general :
		 &health.node.all, "");
	array_foreach_elem(&health.peers, peer) {
		worst_of(&worst, about_r, general ? &peer->to.pair.general :
			 &peer->to.pair.all, peer->name);
		worst_of(&worst, about_r, general ? &peer->from.pair.general :
			 &peer->from.pair.all, peer->name);
	}
	return worst;
}

const struct health_user *health_state_user(const char *name)
{
	return hash_table_lookup(health.users, name);
}

uint64_t health_state_replica_lag(const char *peer)
{
	const struct dovetail_health_report_peer *rpeer =
		health_state_report_peer(peer);
	uint64_t age = health_age(dovetail_monotonic_msecs());

	if (rpeer == NULL || health_is_old() ||
	    rpeer->from.shards_missing > 0 ||
	    rpeer->from.redis_error[0] != '\0' ||
	    age_add(rpeer->from.age_msecs, age) >=
	    health.set.health.max_age_msecs)
		return DOVETAIL_HEALTH_NEVER;
	if (rpeer->from.entries > 0)
		return rpeer->from.lag_msecs + age;
	/* It has all that the peer has told it: is that all there is? */
	return age_add(rpeer->from.heard_msecs, age) >=
		health.set.health.silence_msecs ? DOVETAIL_HEALTH_NEVER : 0;
}

uint64_t health_state_primary_lag(const char *peer)
{
	const struct dovetail_health_report_peer *rpeer =
		health_state_report_peer(peer);

	return rpeer == NULL || health_is_old() || !rpeer->to.seen ||
		health.report.redis_error[0] != '\0' ?
		DOVETAIL_HEALTH_NEVER : rpeer->to.lag_msecs;
}

uint64_t health_state_lag(void)
{
	const struct dovetail_health_report_peer *rpeer;
	uint64_t lag = 0;

	if (health.pool == NULL || health_is_old() ||
	    health.report.redis_error[0] != '\0')
		return DOVETAIL_HEALTH_NEVER;
	array_foreach(&health.report.peers, rpeer) {
		if (!rpeer->to.seen)
			return DOVETAIL_HEALTH_NEVER;
		lag = I_MAX(lag, rpeer->to.lag_msecs);
	}
	return lag;
}

/* Always the same, unless the clock was set meanwhile. */
time_t health_state_since(const struct dovetail_health *h)
{
	static int64_t offset;
	int64_t now = (int64_t)ioloop_timeval.tv_sec * 1000 +
		ioloop_timeval.tv_usec / 1000;
	int64_t diff = now - (int64_t)dovetail_monotonic_msecs();

	if (diff - offset > SINCE_TOLERANCE_MSECS ||
	    offset - diff > SINCE_TOLERANCE_MSECS)
		offset = diff;
	return (offset + (int64_t)h->since_msecs) / 1000;
}

const char *health_time_str(time_t t, bool iso)
{
	struct tm *tm = gmtime(&t);

	return t_strdup_printf("%04d-%02d-%02d%c%02d:%02d:%02d%s",
			       tm->tm_year + 1900, tm->tm_mon + 1, tm->tm_mday,
			       iso ? 'T' : ' ', tm->tm_hour, tm->tm_min,
			       tm->tm_sec, iso ? "Z" : " UTC");
}

/* ---- begin and end ---- */

static void health_pair_init(struct health_pair *pair, uint64_t now)
{
	dovetail_health_init(&pair->general, now);
	dovetail_health_init(&pair->all, now);
}

static void health_pair_deinit(struct health_pair *pair)
{
	dovetail_health_deinit(&pair->general);
	dovetail_health_deinit(&pair->all);
}

void health_state_init(void)
{
	uint64_t now = dovetail_monotonic_msecs();
	struct health_peer *peer;
	unsigned int i;

	health_pair_init(&health.node, now);
	i_array_init(&health.peers, 4);
	for (i = 0; health.set.peers[i] != NULL; i++) {
		peer = i_new(struct health_peer, 1);
		peer->name = i_strdup(health.set.peers[i]);
		health_pair_init(&peer->to.pair, now);
		health_pair_init(&peer->from.pair, now);
		array_push_back(&health.peers, &peer);
	}
	hash_table_create(&health.users, default_pool, 0, str_hash, strcmp);
	/* what nobody has told is empty, not missing */
	health.report.fenced = health.report.unprotected =
		health.report.redis_error = "";
}

void health_state_deinit(void)
{
	struct hash_iterate_context *iter;
	struct health_user *user;
	struct health_peer *peer;
	char *name;

	iter = hash_table_iterate_init(health.users);
	while (hash_table_iterate(iter, health.users, &name, &user))
		health_user_free(user);
	hash_table_iterate_deinit(&iter);
	hash_table_destroy(&health.users);
	array_foreach_elem(&health.peers, peer) {
		health_pair_deinit(&peer->to.pair);
		health_pair_deinit(&peer->from.pair);
		i_free(peer->name);
		i_free(peer);
	}
	array_free(&health.peers);
	health_pair_deinit(&health.node);
	pool_unref(&health.pool);
}
