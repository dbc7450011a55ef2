/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* Messages to people: dovetail_health_hook and dovetail_health_webhook are told when a
   state changes.

   Nothing is queued. For each subject (the node, each direction of each peer, each
   user) and each channel it is known which state was told last, and what differs
   from it now is to be told: all of that in one message, so that an outage is
   one message and not fifty. A channel has one message on its way at a time, and a
   limited number of them; what cannot be told now is told later, as it is then,
   or not at all, if all is as before. */

#include "lib.h"
#include "array.h"
#include "hash.h"
#include "ioloop.h"
#include "str.h"
#include "str-sanitize.h"
#include "dovetail-health-private.h"
#include "dovetail-service.h"

/* What happens at the same time is one message. */
#define MESSAGE_GATHER_MSECS 2000
/* So many at once, and then one in that time. */
#define MESSAGE_BURST 6
#define MESSAGE_INTERVAL_MSECS (20 * 1000)
/* after a failure, twice as long each time */
#define MESSAGE_RETRY_MIN_MSECS (5 * 1000)
#define MESSAGE_RETRY_MAX_MSECS (300 * 1000)
/* More users are not told of while so many are. */
#define SUBJECTS_MAX 5000
#define TEXT_CHANGES_MAX 20
#define TEXT_MAX_LEN 400

struct subject {
	char *name;
	enum health_subject_kind kind;
	/* borrowed: name, or the user's or the peer's */
	const char *peer;
	/* during an update: NULL: it is ok */
	const struct dovetail_health *h;
	/* for each channel: what was told last, and what is just being told */
	enum dovetail_health_state told[HEALTH_CHANNEL_COUNT];
	enum dovetail_health_state telling[HEALTH_CHANNEL_COUNT];
};

struct channel {
	const struct health_channel *v;
	/* a message is on its way */
	bool busy;
	/* the last one has failed; told in the log once */
	bool failed;
	unsigned int tokens;
	uint64_t token_msecs;
	/* since there is something to tell; 0: there is not */
	uint64_t pending_msecs;
	uint64_t retry_msecs, retry_wait_msecs;
};

static HASH_TABLE(char *, struct subject *) subjects;
static struct channel channels[HEALTH_CHANNEL_COUNT] = {
	[HEALTH_CHANNEL_HOOK] = { .v = &health_channel_hook },
	[HEALTH_CHANNEL_WEBHOOK] = { .v = &health_channel_webhook },
};
static bool enabled;

static enum dovetail_health_state subject_state(const struct subject *subject)
{
	return subject->h == NULL ? DOVETAIL_HEALTH_OK : subject->h->state;
}

/* Small things come and go all the time, and what is catching up after something
   that was told is not over. */
static bool
state_is_news(enum dovetail_health_state state, enum dovetail_health_state told)
{
	return state != told && state != DOVETAIL_HEALTH_CATCHING_UP;
}

/* ---- subjects ---- */

static struct subject *
subject_get(const char *name, enum health_subject_kind kind, bool create)
{
	/* names of users do not begin like that */
	const char *key = kind == HEALTH_SUBJECT_USER ? name :
		t_strconcat("\n", name, NULL);
	struct subject *subject = hash_table_lookup(subjects, key);

	if (subject != NULL || !create ||
	    hash_table_count(subjects) >= SUBJECTS_MAX)
		return subject;
	subject = i_new(struct subject, 1);
	subject->name = i_strdup(key);
	subject->kind = kind;
	hash_table_insert(subjects, subject->name, subject);
	return subject;
}

static void subject_free(struct subject *subject)
{
	i_free(subject->name);
	i_free(subject);
}

static void subject_see(const char *name, enum health_subject_kind kind,
			const char *peer, const struct dovetail_health *h,
			uint64_t now)
{
	struct subject *subject;

	/* at the start it is not known for a while */
	if (!h->known && now - h->since_msecs < health.set.health.stall_msecs)
		return;
	subject = subject_get(name, kind, h->state > DOVETAIL_HEALTH_CATCHING_UP);
	if (subject != NULL) {
		subject->h = h;
		subject->peer = peer;
	}
}

static void subjects_see(uint64_t now)
{
	struct hash_iterate_context *iter;
	struct health_peer *peer;
	struct health_user *user;
	struct subject *subject;
	char *name;

	iter = hash_table_iterate_init(subjects);
	while (hash_table_iterate(iter, subjects, &name, &subject)) {
		subject->h = NULL;
		subject->peer = "";
	}
	hash_table_iterate_deinit(&iter);

	/* Single users have messages of their own. */
	subject_see(health.set.node, HEALTH_SUBJECT_NODE, "",
		    &health.node.general, now);
	array_foreach_elem(&health.peers, peer) {
		subject_see(t_strdup_printf("%s to %s", health.set.node,
					    peer->name),
			    HEALTH_SUBJECT_TO, peer->name,
			    &peer->to.pair.general, now);
		subject_see(t_strdup_printf("%s from %s", health.set.node,
					    peer->name),
			    HEALTH_SUBJECT_FROM, peer->name,
			    &peer->from.pair.general, now);
	}
	iter = hash_table_iterate_init(health.users);
	while (hash_table_iterate(iter, health.users, &name, &user)) {
		subject_see(user->name, HEALTH_SUBJECT_USER, "", &user->health,
			    now);
	}
	hash_table_iterate_deinit(&iter);
}

/* What is ok, and known to be so everywhere. */
static void subjects_forget(void)
{
	struct hash_iterate_context *iter;
	struct subject *subject;
	unsigned int i;
	char *name;

	hash_table_freeze(subjects);
	iter = hash_table_iterate_init(subjects);
	while (hash_table_iterate(iter, subjects, &name, &subject)) {
		if (subject_state(subject) != DOVETAIL_HEALTH_OK)
			continue;
		for (i = 0; i < HEALTH_CHANNEL_COUNT; i++) {
			if (channels[i].v->enabled() &&
			    (subject->told[i] != DOVETAIL_HEALTH_OK ||
			     channels[i].busy))
				break;
		}
		if (i == HEALTH_CHANNEL_COUNT) {
			hash_table_remove(subjects, name);
			subject_free(subject);
		}
	}
	hash_table_iterate_deinit(&iter);
	hash_table_thaw(subjects);
}

/* ---- the message ---- */

static int
change_cmp(const struct health_change *c1, const struct health_change *c2)
{
	if (c1->state != c2->state)
		return c1->state > c2->state ? -1 : 1;
	if (c1->kind != c2->kind)
		return c1->kind < c2->kind ? -1 : 1;
	return strcmp(c1->about, c2->about);
}

static void change_add(struct health_message *message,
		       const struct subject *subject,
		       enum dovetail_health_state before)
{
	struct health_change *change = array_append_space(&message->changes);
	const struct dovetail_health *h = subject->h;

	change->kind = subject->kind;
	change->about = subject->name[0] == '\n' ? subject->name + 1 :
		subject->name;
	change->peer = subject->peer;
	change->state = subject_state(subject);
	change->before = before;
	change->since = h == NULL ? ioloop_time : health_state_since(h);
	change->reason = h == NULL ? "" : h->reason;
	change->remedy = h == NULL ? "" : h->remedy;
	change->who = h == NULL ? DOVETAIL_HEALTH_WHO_NOBODY : h->who;
}

const char *health_subject_kind_name(enum health_subject_kind kind)
{
	switch (kind) {
	case HEALTH_SUBJECT_NODE:
		return "node";
	case HEALTH_SUBJECT_TO:
		return "to";
	case HEALTH_SUBJECT_FROM:
		return "from";
	case HEALTH_SUBJECT_USER:
		return "user";
	}
	i_unreached();
}

static const char *change_title(const struct health_change *change)
{
	return t_strdup_printf("%s%s is %s",
			       change->kind == HEALTH_SUBJECT_USER ? "user " : "",
			       str_sanitize_utf8(change->about, TEXT_MAX_LEN),
			       dovetail_health_state_name(change->state));
}

static const char *change_who(const struct health_change *change)
{
	switch (change->who) {
	case DOVETAIL_HEALTH_WHO_NOBODY:
		return "nobody, it should get well by itself";
	case DOVETAIL_HEALTH_WHO_HERE:
		return t_strdup_printf("the administrator of %s",
				       health.set.node);
	case DOVETAIL_HEALTH_WHO_PEER:
		return change->peer[0] != '\0' ?
			t_strdup_printf("the administrator of %s",
					change->peer) :
			"the administrator of the other node";
	case DOVETAIL_HEALTH_WHO_REDIS:
		return "whoever runs Redis";
	}
	i_unreached();
}

static void text_change(string_t *str, const struct health_change *change)
{
	str_printfa(str, "%s (it was %s), since %s.\n", change_title(change),
		    dovetail_health_state_name(change->before),
		    health_time_str(change->since, FALSE));
	if (change->reason[0] != '\0') {
		str_printfa(str, "  Why:  %s.\n",
			    str_sanitize_utf8(change->reason, TEXT_MAX_LEN));
	}
	if (change->remedy[0] != '\0') {
		str_printfa(str, "  Do:   %s.\n",
			    str_sanitize_utf8(change->remedy, TEXT_MAX_LEN));
	}
	if (change->state > DOVETAIL_HEALTH_CATCHING_UP)
		str_printfa(str, "  Who:  %s.\n", change_who(change));
}

/* For somebody who was asleep a minute ago. */
static void message_text(struct health_message *message)
{
	const struct health_change *change;
	const struct dovetail_health *worst;
	string_t *str = str_new(message->pool, 512);
	unsigned int i, count = array_count(&message->changes);
	const char *about, *title;

	change = array_front(&message->changes);
	title = change_title(change);
	message->subject = count == 1 ?
		p_strdup_printf(message->pool, "dovetail on %s: %s",
				health.set.node, title) :
		p_strdup_printf(message->pool, "dovetail on %s: %s, and %u "
				"more", health.set.node, title, count - 1);
	str_printfa(str, "%s\n\n", message->subject);
	for (i = 0; i < count && i < TEXT_CHANGES_MAX; i++) {
		text_change(str, &change[i]);
		str_append_c(str, '\n');
	}
	if (i < count)
		str_printfa(str, "%u more have changed.\n\n", count - i);
	worst = health_state_worst(FALSE, &about);
	if (worst->state == DOVETAIL_HEALTH_OK) {
		str_printfa(str, "All is well on %s now.\n", health.set.node);
	} else {
		str_printfa(str, "All there is to know: \"doveadm -v dovetail "
			    "health -A\" on %s.\n", health.set.node);
	}
	message->text = str_c(str);
}

/* ---- channels ---- */

static bool channel_may_tell(struct channel *channel, uint64_t now)
{
	uint64_t tokens = (now - channel->token_msecs) / MESSAGE_INTERVAL_MSECS;

	if (channel->tokens + tokens >= MESSAGE_BURST) {
		channel->tokens = MESSAGE_BURST;
		channel->token_msecs = now;
	} else {
		channel->tokens += tokens;
		channel->token_msecs += tokens * MESSAGE_INTERVAL_MSECS;
	}
	return channel->tokens > 0 && now >= channel->retry_msecs &&
		now - channel->pending_msecs >= MESSAGE_GATHER_MSECS;
}

static struct event_passthrough *
channel_event(const struct channel *channel, const char *name)
{
	return event_create_passthrough(health.event)->set_name(name)->
		add_str("channel", channel->v->name);
}

static void channel_tell(struct channel *channel, enum health_channel_id id)
{
	struct health_message message;
	const struct health_change *worst;
	struct hash_iterate_context *iter;
	struct subject *subject;
	char *name;

	i_zero(&message);
	message.pool = pool_alloconly_create("dovetail health message", 1024);
	p_array_init(&message.changes, message.pool, 8);
	iter = hash_table_iterate_init(subjects);
	while (hash_table_iterate(iter, subjects, &name, &subject)) {
		subject->telling[id] = subject->told[id];
		if (state_is_news(subject_state(subject), subject->told[id])) {
			subject->telling[id] = subject_state(subject);
			change_add(&message, subject, subject->told[id]);
		}
	}
	hash_table_iterate_deinit(&iter);
	array_sort(&message.changes, change_cmp);
	message_text(&message);

	channel->tokens--;
	channel->pending_msecs = 0;
	channel->busy = TRUE;
	worst = array_front(&message.changes);
	e_info(channel_event(channel, "dovetail_health_message")->
	       add_str("about", worst->about)->
	       add_str("state", dovetail_health_state_name(worst->state))->
	       add_str("state_before",
		       dovetail_health_state_name(worst->before))->
	       add_int("changes", array_count(&message.changes))->event(),
	       "%s: %s", channel->v->name, message.subject);
	channel->v->tell(&message);
	pool_unref(&message.pool);
}

static void channel_update(enum health_channel_id id, uint64_t now)
{
	struct channel *channel = &channels[id];
	struct hash_iterate_context *iter;
	struct subject *subject;
	bool news = FALSE;
	char *name;

	if (channel->busy)
		return;
	iter = hash_table_iterate_init(subjects);
	while (!news && hash_table_iterate(iter, subjects, &name, &subject))
		news = state_is_news(subject_state(subject), subject->told[id]);
	hash_table_iterate_deinit(&iter);
	if (!news)
		channel->pending_msecs = 0;
	else if (channel->pending_msecs == 0)
		channel->pending_msecs = now;
	else if (channel_may_tell(channel, now)) T_BEGIN {
		channel_tell(channel, id);
	} T_END;
}

void health_channel_done(enum health_channel_id id, const char *error)
{
	struct channel *channel = &channels[id];
	struct hash_iterate_context *iter;
	struct subject *subject;
	char *name;

	i_assert(channel->busy);
	channel->busy = FALSE;
	if (error != NULL) {
		channel->retry_wait_msecs = channel->retry_wait_msecs == 0 ?
			MESSAGE_RETRY_MIN_MSECS :
			I_MIN(channel->retry_wait_msecs * 2,
			      MESSAGE_RETRY_MAX_MSECS);
		channel->retry_msecs = dovetail_monotonic_msecs() +
			channel->retry_wait_msecs;
		if (!channel->failed) {
			e_warning(channel_event(channel,
					"dovetail_health_message_failed")->
				  add_str("error", error)->event(),
				  "%s: The message was not taken, trying "
				  "again: %s", channel->v->name, error);
		}
		channel->failed = TRUE;
		return;
	}
	if (channel->failed) {
		e_info(channel_event(channel,
				     "dovetail_health_message_sent")->event(),
		       "%s: The message was taken", channel->v->name);
	}
	channel->failed = FALSE;
	channel->retry_wait_msecs = channel->retry_msecs = 0;
	iter = hash_table_iterate_init(subjects);
	while (hash_table_iterate(iter, subjects, &name, &subject))
		subject->told[id] = subject->telling[id];
	hash_table_iterate_deinit(&iter);
}

void health_messages_update(void)
{
	uint64_t now = dovetail_monotonic_msecs();
	unsigned int i;

	if (!enabled)
		return;
	T_BEGIN {
		subjects_see(now);
	} T_END;
	for (i = 0; i < HEALTH_CHANNEL_COUNT; i++) {
		if (channels[i].v->enabled())
			channel_update(i, now);
	}
	subjects_forget();
}

void health_messages_init(const char *base_dir)
{
	unsigned int i;

	hash_table_create(&subjects, default_pool, 0, str_hash, strcmp);
	for (i = 0; i < HEALTH_CHANNEL_COUNT; i++) {
		channels[i].tokens = MESSAGE_BURST;
		channels[i].token_msecs = dovetail_monotonic_msecs();
		if (channels[i].v->enabled()) {
			channels[i].v->init(base_dir);
			enabled = TRUE;
		}
	}
}

void health_messages_deinit(void)
{
	struct hash_iterate_context *iter;
	struct subject *subject;
	unsigned int i;
	char *name;

	for (i = 0; i < HEALTH_CHANNEL_COUNT; i++) {
		if (channels[i].v->enabled())
			channels[i].v->deinit();
	}
	iter = hash_table_iterate_init(subjects);
	while (hash_table_iterate(iter, subjects, &name, &subject))
		subject_free(subject);
	hash_table_iterate_deinit(&iter);
	hash_table_destroy(&subjects);
}
