/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* /metrics in OpenMetrics' text format 1.0, or in Prometheus' older one, 0.0.4. No
   users' names. What is not known is left out: a sample says something that was
   measured. */

#include "lib.h"
#include "array.h"
#include "hash.h"
#include "ioloop.h"
#include "str.h"
#include "dovetail-config.h"
#include "dovetail-health-private.h"
#include "dovetail-service.h"

enum metric_type {
	METRIC_GAUGE,
	METRIC_COUNTER,
	METRIC_INFO,
	METRIC_STATESET,
};

/* The format of what is being written. */
static bool openmetrics;

static void metric(string_t *dest, const char *name, enum metric_type type,
		   const char *unit, const char *help)
{
	/* what the older format calls it, by the name that its samples have */
	static const struct {
		const char *type, *old_type, *suffix;
	} types[] = {
		{ "gauge", "gauge", "" },
		{ "counter", "counter", "_total" },
		{ "info", "gauge", "_info" },
		{ "stateset", "gauge", "" },
	};

	if (!openmetrics)
		name = t_strconcat(name, types[type].suffix, NULL);
	str_printfa(dest, "# TYPE %s %s\n", name, openmetrics ?
		    types[type].type : types[type].old_type);
	if (unit != NULL && openmetrics)
		str_printfa(dest, "# UNIT %s %s\n", name, unit);
	str_printfa(dest, "# HELP %s %s\n", name, help);
}

static void seconds(string_t *dest, const char *name, const char *labels,
		    uint64_t msecs)
{
	if (msecs == DOVETAIL_HEALTH_NEVER)
		return;
	str_printfa(dest, "%s%s %"PRIu64".%03u\n", name, labels, msecs / 1000,
		    (unsigned int)(msecs % 1000));
}

static void number(string_t *dest, const char *name, const char *labels,
		   uint64_t value)
{
	str_printfa(dest, "%s%s %"PRIu64"\n", name, labels, value);
}

/* Names of nodes and directions have nothing in them that is to be escaped. */
static const char *labels_of(const char *peer, const char *direction)
{
	return t_strdup_printf("{peer=\"%s\",direction=\"%s\"}", peer,
			       direction);
}

/* ---- of states ---- */

static void state_samples(string_t *dest, const char *peer,
			  const char *direction, const struct dovetail_health *h)
{
	unsigned int i;

	for (i = 0; i < DOVETAIL_HEALTH_STATE_COUNT; i++) {
		str_printfa(dest, "dovetail_health_state{peer=\"%s\","
			    "direction=\"%s\",dovetail_health_state=\"%s\"} "
			    "%d\n", peer, direction,
			    dovetail_health_state_name(i),
			    h->state == i ? 1 : 0);
	}
}

static void since_sample(string_t *dest, const char *peer,
			 const char *direction, const struct dovetail_health *h)
{
	str_printfa(dest, "dovetail_health_state_since_timestamp_seconds%s %s\n",
		    labels_of(peer, direction),
		    dec2str(health_state_since(h)));
}

static void metrics_states(string_t *dest)
{
	static void (*const samples[])(string_t *dest, const char *peer,
				       const char *direction,
				       const struct dovetail_health *h) = {
		state_samples, since_sample,
	};
	struct health_peer *peer;
	const struct dovetail_health *worst;
	const char *about;
	unsigned int i;

	worst = health_state_worst(FALSE, &about);
	for (i = 0; i < N_ELEMENTS(samples); i++) {
		if (i == 0) {
			metric(dest, "dovetail_health_state", METRIC_STATESET,
			       NULL, "Of the node with all its peers "
			       "(direction all), of itself (self), of what it "
			       "sends to (to) and gets from (from) a peer.");
		} else {
			metric(dest, "dovetail_health_state_since_timestamp_"
			       "seconds", METRIC_GAUGE, "seconds",
			       "Since when that has been the state.");
		}
		samples[i](dest, "", "all", worst);
		samples[i](dest, "", "self", &health.node.all);
		array_foreach_elem(&health.peers, peer) {
			samples[i](dest, peer->name, "to", &peer->to.pair.all);
			samples[i](dest, peer->name, "from",
				   &peer->from.pair.all);
		}
	}
}

/* ---- of peers ---- */

static void metrics_lag(string_t *dest)
{
	const struct dovetail_health_report_peer *p;

	metric(dest, "dovetail_replication_lag_seconds", METRIC_GAUGE,
	       "seconds", "Age of the oldest entry that is not applied.");
	array_foreach(&health.report.peers, p) {
		seconds(dest, "dovetail_replication_lag_seconds",
			labels_of(p->peer, "to"),
			p->to.seen ? p->to.lag_msecs : DOVETAIL_HEALTH_NEVER);
		seconds(dest, "dovetail_replication_lag_seconds",
			labels_of(p->peer, "from"),
			health_state_replica_lag(p->peer));
	}
	metric(dest, "dovetail_peer_heard_seconds", METRIC_GAUGE, "seconds",
	       "Time since anything was heard of the peer.");
	array_foreach(&health.report.peers, p) {
		seconds(dest, "dovetail_peer_heard_seconds",
			labels_of(p->peer, "to"), p->to.seen ?
			p->to.heard_msecs : DOVETAIL_HEALTH_NEVER);
		seconds(dest, "dovetail_peer_heard_seconds",
			labels_of(p->peer, "from"), p->from.heard_msecs);
	}
}

static void metrics_peers(string_t *dest)
{
	const struct dovetail_health_report_peer *p;

	metric(dest, "dovetail_replication_entries", METRIC_GAUGE, NULL,
	       "Entries in Redis that are not applied.");
	array_foreach(&health.report.peers, p) {
		number(dest, "dovetail_replication_entries",
		       labels_of(p->peer, "to"), p->to.entries);
		number(dest, "dovetail_replication_entries",
		       labels_of(p->peer, "from"), p->from.entries);
	}
	metric(dest, "dovetail_rejected_entries", METRIC_COUNTER, NULL,
	       "Entries and reports that were refused.");
	array_foreach(&health.report.peers, p) {
		number(dest, "dovetail_rejected_entries_total",
		       labels_of(p->peer, "to"), p->to.rejected);
		number(dest, "dovetail_rejected_entries_total",
		       labels_of(p->peer, "from"), p->from.rejected);
	}
}

/* Of one kind of troubles: for this node's replicas, and in them. */
static void
metric_troubles(string_t *dest, const char *name, const char *help,
		unsigned int (*get)(const struct dovetail_health_troubles *t))
{
	const struct dovetail_health_report_peer *p;

	metric(dest, name, METRIC_GAUGE, NULL, help);
	array_foreach(&health.report.peers, p) {
		number(dest, name, labels_of(p->peer, "to"),
		       get(&p->to.troubles));
		number(dest, name, labels_of(p->peer, "from"),
		       get(&p->from.troubles));
	}
}

static unsigned int get_lacking(const struct dovetail_health_troubles *t)
{
	return t->lacking;
}

static unsigned int get_failing(const struct dovetail_health_troubles *t)
{
	return t->failing;
}

static unsigned int get_differing(const struct dovetail_health_troubles *t)
{
	return t->differing;
}

static unsigned int get_diverged(const struct dovetail_health_troubles *t)
{
	return t->diverged;
}

static void metrics_troubles(string_t *dest)
{
	metric_troubles(dest, "dovetail_lacking_mailboxes",
			"Asked for, because something of them is lacking.",
			get_lacking);
	metric_troubles(dest, "dovetail_failing_mailboxes",
			"Asked for several times in vain.", get_failing);
	metric_troubles(dest, "dovetail_differing_mailboxes",
			"Differ from the primary's, and are being repaired.",
			get_differing);
	metric_troubles(dest, "dovetail_diverged_mailboxes",
			"Differ from the primary's, and were not repaired.",
			get_diverged);
}

/* ---- of the node ---- */

static void metrics_node(string_t *dest)
{
	static const char *const acks[] = { "local", "queued", "applied" };
	bool primary = strcmp(health.set.primary, health.set.node) == 0;

	metric(dest, "dovetail_build", METRIC_INFO, NULL, "Of this node.");
	str_printfa(dest, "dovetail_build_info{version=\"%s\"} 1\n",
		    DOVETAIL_VERSION);
	metric(dest, "dovetail_role", METRIC_INFO, NULL,
	       "By default, where the userdb does not say another.");
	str_printfa(dest, "dovetail_role_info{node=\"%s\",role=\"%s\","
		    "ack=\"%s\"} 1\n", health.set.node,
		    primary ? "primary" : "replica", acks[health.set.ack]);
	metric(dest, "dovetail_report_age_seconds", METRIC_GAUGE, "seconds",
	       "Age of what follows: dovetail-queue reports every second.");
	if (health.pool != NULL) {
		seconds(dest, "dovetail_report_age_seconds", "",
			dovetail_monotonic_msecs() - health.report_msecs);
	}
	metric(dest, "dovetail_protected", METRIC_GAUGE, NULL,
	       "1: what is written now reaches dovetail_ack.");
	if (health.pool != NULL) {
		number(dest, "dovetail_protected", "",
		       health.report.unprotected[0] == '\0' ? 1 : 0);
	}
	metric(dest, "dovetail_redis_up", METRIC_GAUGE, NULL,
	       "1: Redis is connected and answers.");
	if (health.pool != NULL) {
		number(dest, "dovetail_redis_up", "",
		       health.report.redis_error[0] == '\0' ? 1 : 0);
	}
}

static void metrics_queue(string_t *dest)
{
	metric(dest, "dovetail_queue_entries", METRIC_GAUGE, NULL,
	       "Entries of this node that not every peer has confirmed.");
	number(dest, "dovetail_queue_entries", "",
	       health.report.queue_entries);
	metric(dest, "dovetail_queue_bytes", METRIC_GAUGE, "bytes",
	       "The same in bytes.");
	number(dest, "dovetail_queue_bytes", "", health.report.queue_bytes);
	metric(dest, "dovetail_queue_max_bytes", METRIC_GAUGE, "bytes",
	       "dovetail_queue_max_size.");
	number(dest, "dovetail_queue_max_bytes", "",
	       health.set.queue_max_size);
	metric(dest, "dovetail_last_verify_timestamp_seconds", METRIC_GAUGE,
	       "seconds", "When the last routine verification of all users "
	       "ended.");
	if (health.report.verified_time != 0) {
		number(dest, "dovetail_last_verify_timestamp_seconds", "",
		       health.report.verified_time);
	}
	metric(dest, "dovetail_dirty_users", METRIC_GAUGE, NULL,
	       "Users with something that is not queued.");
	number(dest, "dovetail_dirty_users", "", health.report.dirty);
	metric(dest, "dovetail_dirty_failing_users", METRIC_GAUGE, NULL,
	       "Those of them whose mailboxes could not be read.");
	number(dest, "dovetail_dirty_failing_users", "",
	       health.report.dirty_failing);
}

static void metrics_service(string_t *dest)
{
	metric(dest, "dovetail_health_users", METRIC_GAUGE, NULL,
	       "Users that are not ok.");
	number(dest, "dovetail_health_users", "",
	       hash_table_count(health.users));
	metric(dest, "dovetail_health_answers", METRIC_COUNTER, NULL,
	       "Questions that were answered.");
	number(dest, "dovetail_health_answers_total", "", health.answers);
	metric(dest, "dovetail_health_actions", METRIC_COUNTER, NULL,
	       "Mails that the MTA was told to defer, or to warn of.");
	number(dest, "dovetail_health_actions_total", "{action=\"defer\"}",
	       health.deferred);
	number(dest, "dovetail_health_actions_total", "{action=\"warn\"}",
	       health.warned);
	metric(dest, "dovetail_health_refused", METRIC_COUNTER, NULL,
	       "Questions that made no sense.");
	number(dest, "dovetail_health_refused_total", "", health.refused);
	metric(dest, "dovetail_health_connections", METRIC_COUNTER, NULL,
	       "Connections.");
	number(dest, "dovetail_health_connections_total", "",
	       health.connections);
	metric(dest, "dovetail_health_connections_closed", METRIC_COUNTER,
	       NULL, "Those of them that were closed for being slow, silent, "
	       "or too many.");
	number(dest, "dovetail_health_connections_closed_total", "",
	       health.connections_closed);
}

void health_metrics(string_t *dest, bool as_openmetrics)
{
	openmetrics = as_openmetrics;
	metrics_node(dest);
	metrics_states(dest);
	if (health.pool != NULL) {
		metrics_lag(dest);
		metrics_peers(dest);
		metrics_troubles(dest);
		metrics_queue(dest);
	}
	metrics_service(dest);
	if (openmetrics)
		str_append(dest, "# EOF\n");
}
