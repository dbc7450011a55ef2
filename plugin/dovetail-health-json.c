/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* What is known, as JSON: /health. Times are seconds since 1970, lags seconds, or null:
   not known. */

#include "lib.h"
#include "array.h"
#include "hash.h"
#include "ioloop.h"
#include "str.h"
#include "unichar.h"
#include "dovetail-config.h"
#include "dovetail-health-private.h"

#define JSON_USERS_MAX 500

void health_json_str(string_t *dest, const char *key, const char *value)
{
	buffer_t *valid = t_buffer_create(128);
	const char *p;

	if (!uni_utf8_get_valid_data((const void *)value, strlen(value), valid))
		value = str_c(valid);
	str_printfa(dest, "\"%s\":\"", key);
	for (p = value; *p != '\0'; p++) {
		if (*p == '"' || *p == '\\')
			str_append_c(dest, '\\');
		if (*p == '\n')
			str_append(dest, "\\n");
		else if ((unsigned char)*p < 0x20 || *p == 0x7f)
			str_printfa(dest, "\\u%04x", *p);
		else
			str_append_c(dest, *p);
	}
	str_append_c(dest, '"');
}

void health_json(string_t *dest, const struct dovetail_health *h)
{
	health_json_str(dest, "state", dovetail_health_state_name(h->state));
	str_printfa(dest, ",\"since\":%s,", dec2str(health_state_since(h)));
	health_json_str(dest, "reason", h->reason);
	str_append_c(dest, ',');
	health_json_str(dest, "remedy", h->remedy);
	str_append_c(dest, ',');
	health_json_str(dest, "who", dovetail_health_who_name(h->who));
}

static void json_lag(string_t *dest, uint64_t msecs)
{
	if (msecs == DOVETAIL_HEALTH_NEVER)
		str_append(dest, ",\"lag\":null");
	else {
		str_printfa(dest, ",\"lag\":%"PRIu64".%03u", msecs / 1000,
			    (unsigned int)(msecs % 1000));
	}
}

static void json_troubles(string_t *dest,
			  const struct dovetail_health_troubles *t)
{
	str_printfa(dest, ",\"lacking\":%u,\"failing\":%u,\"differing\":%u,"
		    "\"diverged\":%u", t->lacking, t->failing, t->differing,
		    t->diverged);
}

static void json_peer(string_t *dest, const struct health_peer *peer)
{
	const struct dovetail_health_report_peer *rpeer =
		health_state_report_peer(peer->name);

	str_append_c(dest, '{');
	health_json_str(dest, "peer", peer->name);
	str_append(dest, ",\"to\":{");
	health_json(dest, &peer->to.pair.all);
	if (rpeer != NULL) {
		json_lag(dest, rpeer->to.lag_msecs);
		str_printfa(dest, ",\"entries\":%"PRIu64",\"bytes\":%"PRIu64,
			    rpeer->to.entries, rpeer->to.bytes);
		json_troubles(dest, &rpeer->to.troubles);
	}
	str_append(dest, "},\"from\":{");
	health_json(dest, &peer->from.pair.all);
	if (rpeer != NULL) {
		json_lag(dest, health_state_replica_lag(peer->name));
		str_printfa(dest, ",\"entries\":%"PRIu64, rpeer->from.entries);
		json_troubles(dest, &rpeer->from.troubles);
	}
	str_append(dest, "}}");
}

static int user_cmp(struct health_user *const *u1, struct health_user *const *u2)
{
	if ((*u1)->health.state != (*u2)->health.state)
		return (*u1)->health.state > (*u2)->health.state ? -1 : 1;
	return strcmp((*u1)->name, (*u2)->name);
}

/* The worst first, and not all of very many. */
static void json_users(string_t *dest)
{
	ARRAY(struct health_user *) users;
	struct hash_iterate_context *iter;
	struct health_user *user;
	unsigned int i = 0;
	char *name;

	t_array_init(&users, hash_table_count(health.users) + 1);
	iter = hash_table_iterate_init(health.users);
	while (hash_table_iterate(iter, health.users, &name, &user))
		array_push_back(&users, &user);
	hash_table_iterate_deinit(&iter);
	array_sort(&users, user_cmp);

	str_append(dest, ",\"users\":[");
	array_foreach_elem(&users, user) {
		if (i == JSON_USERS_MAX)
			break;
		str_append(dest, i++ == 0 ? "{" : ",{");
		health_json_str(dest, "user", user->name);
		str_append_c(dest, ',');
		health_json_str(dest, "mailbox", user->mailbox);
		str_append_c(dest, ',');
		health_json(dest, &user->health);
		str_append_c(dest, '}');
	}
	str_append_c(dest, ']');
}

void health_json_all(string_t *dest, bool names)
{
	const struct dovetail_health *worst;
	struct health_peer *peer;
	const char *about;
	bool first = TRUE;

	worst = health_state_worst(FALSE, &about);
	str_append_c(dest, '{');
	health_json_str(dest, "node", health.set.node);
	str_append_c(dest, ',');
	health_json_str(dest, "primary", health.set.primary);
	str_append_c(dest, ',');
	health_json_str(dest, "about", about);
	str_append_c(dest, ',');
	health_json_str(dest, "version", DOVETAIL_VERSION);
	str_printfa(dest, ",\"now\":%s,", dec2str(ioloop_time));
	health_json(dest, worst);
	str_append(dest, ",\"self\":{");
	health_json(dest, &health.node.all);
	str_append(dest, "},\"queue\":{");
	str_printfa(dest, "\"entries\":%"PRIu64",\"bytes\":%"PRIu64","
		    "\"max_bytes\":%"PRIuUOFF_T",\"dirty_users\":%"PRIu64"}",
		    health.report.queue_entries, health.report.queue_bytes,
		    health.set.queue_max_size, health.report.dirty);
	if (health.report.verified_time == 0)
		str_append(dest, ",\"verified\":null");
	else {
		str_printfa(dest, ",\"verified\":%"PRIu64,
			    health.report.verified_time);
	}
	str_printfa(dest, ",\"users_not_ok\":%u,\"peers\":[",
		    hash_table_count(health.users));
	array_foreach_elem(&health.peers, peer) {
		if (!first)
			str_append_c(dest, ',');
		first = FALSE;
		json_peer(dest, peer);
	}
	str_append_c(dest, ']');
	if (names)
		json_users(dest);
	str_append(dest, "}\n");
}
