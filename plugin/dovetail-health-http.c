/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* HTTP: the status code is the answer, the body says more, without users' names.

     GET /healthz         200: there is news that is not old; else 503
     GET /readyz          200: the state is none of dovetail_health_down and
                          dovetail_health_drain; else 503
     GET /primary         200: this node is dovetail_primary, and not fenced
     GET /replica[?lag=N] 200: it is a replica of it that is known to be no more
                          than N seconds (5, 0.5, 500ms) behind; without N: of which
                          it is known how far
     GET /health          200, JSON: everything
     GET /metrics         OpenMetrics */

#include "lib.h"
#include "array.h"
#include "hash.h"
#include "ioloop.h"
#include "str.h"
#include "http-server.h"
#include "http-url.h"
#include "settings-parser.h"
#include "str-sanitize.h"
#include "dovetail-compat.h"
#include "dovetail-health-private.h"

#include <ctype.h>

#define HTTP_IDLE_MSECS (60 * 1000)
#define HTTP_TARGET_MAX_LEN 2048
#define HTTP_HEADERS_MAX_SIZE (16 * 1024)

struct http_client {
	struct http_server_connection *conn;
	void (*active)(void *context);
	void (*closed)(void *context);
	void *context;
};

static struct http_server *http_server;

/* ---- JSON ---- */

static void json_str(string_t *dest, const char *key, const char *value)
{
	const char *p;

	str_printfa(dest, "\"%s\":\"", key);
	for (p = str_sanitize_utf8(value, SIZE_MAX); *p != '\0'; p++) {
		if (*p == '"' || *p == '\\')
			str_append_c(dest, '\\');
		if ((unsigned char)*p < 0x20)
			str_printfa(dest, "\\u%04x", *p);
		else
			str_append_c(dest, *p);
	}
	str_append_c(dest, '"');
}

static void json_health(string_t *dest, const struct dovetail_health *h)
{
	json_str(dest, "state", dovetail_health_state_name(h->state));
	str_printfa(dest, ",\"since\":%s,", dec2str(health_state_since(h)));
	json_str(dest, "reason", h->reason);
	str_append_c(dest, ',');
	json_str(dest, "remedy", h->remedy);
	str_append_c(dest, ',');
	json_str(dest, "who", dovetail_health_who_name(h->who));
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
	json_str(dest, "peer", peer->name);
	str_append(dest, ",\"to\":{");
	json_health(dest, &peer->to.pair.all);
	if (rpeer != NULL) {
		json_lag(dest, rpeer->to.lag_msecs);
		str_printfa(dest, ",\"entries\":%"PRIu64",\"bytes\":%"PRIu64,
			    rpeer->to.entries, rpeer->to.bytes);
		json_troubles(dest, &rpeer->to.troubles);
	}
	str_append(dest, "},\"from\":{");
	json_health(dest, &peer->from.pair.all);
	if (rpeer != NULL) {
		json_lag(dest, health_state_replica_lag(peer->name));
		str_printfa(dest, ",\"entries\":%"PRIu64, rpeer->from.entries);
		json_troubles(dest, &rpeer->from.troubles);
	}
	str_append(dest, "}}");
}

static void json_all(string_t *dest)
{
	const struct dovetail_health *worst;
	struct health_peer *peer;
	const char *about;
	bool first = TRUE;

	worst = health_state_worst(FALSE, &about);
	str_append_c(dest, '{');
	json_str(dest, "node", health.set.node);
	str_append_c(dest, ',');
	json_str(dest, "primary", health.set.primary);
	str_append_c(dest, ',');
	json_str(dest, "about", about);
	str_append_c(dest, ',');
	json_health(dest, worst);
	str_append(dest, ",\"self\":{");
	json_health(dest, &health.node.all);
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
	str_append(dest, "]}\n");
}

/* ---- requests ---- */

static void
http_respond(struct http_server_request *req, unsigned int status,
	     const char *type, const string_t *body)
{
	struct http_server_response *resp;

	resp = http_server_response_create(req, status, status == 200 ? "OK" :
					   "Service Unavailable");
	http_server_response_add_header(resp, "Content-Type", type);
	http_server_response_add_header(resp, "Cache-Control", "no-store");
	http_server_response_set_payload_data(resp, str_data(body),
					      str_len(body));
	http_server_response_submit(resp);
}

/* The answer is the status; the body is for people. */
static void http_respond_yes(struct http_server_request *req, bool yes,
			     const struct dovetail_health *h)
{
	string_t *body = t_str_new(256);

	str_append_c(body, '{');
	json_str(body, "node", health.set.node);
	str_append_c(body, ',');
	json_health(body, h);
	str_append(body, "}\n");
	http_respond(req, yes ? 200 : 503, "application/json", body);
}

static bool node_is_fenced(void)
{
	return health.node.general.state == DOVETAIL_HEALTH_FENCED;
}

static bool node_is_primary(void)
{
	return strcmp(health.set.primary, health.set.node) == 0;
}

/* "lag=5" in the query. Returns 1: max_msecs_r is set.  0: it is not there.
   -1: it makes no sense. */
static int query_lag(const char *query, uint64_t *max_msecs_r)
{
	const char *const *args, *value, *error, *p;
	unsigned int msecs;
	double secs = 0, unit = 1;

	if (query == NULL)
		return 0;
	for (args = t_strsplit(query, "&"); *args != NULL; args++) {
		if (!str_begins_with(*args, "lag="))
			continue;
		value = *args + strlen("lag=");
		if (settings_get_time_msecs(value, &msecs, &error) == 0 &&
		    !i_isdigit(value[strlen(value) - 1])) {
			*max_msecs_r = msecs;
			return 1;
		}
		/* seconds, perhaps with a fraction */
		for (p = value; i_isdigit(*p) && p - value < 9; p++)
			secs = secs * 10 + (*p - '0');
		if (*p == '.') {
			for (p++; i_isdigit(*p) && unit > 0.0005; p++)
				secs += (*p - '0') * (unit /= 10);
		}
		if (p == value || *p != '\0')
			return -1;
		*max_msecs_r = secs * 1000 + 0.5;
		return 1;
	}
	return 0;
}

static void http_replica(struct http_server_request *req, const char *query)
{
	const struct dovetail_health *h = &health.node.general;
	struct health_peer *peer;
	uint64_t max_msecs = DOVETAIL_HEALTH_NEVER - 1, lag;

	if (query_lag(query, &max_msecs) < 0) {
		http_server_request_fail(req, 400, "Bad Request");
		return;
	}
	if (node_is_primary()) {
		http_respond_yes(req, FALSE, h);
		return;
	}
	array_foreach_elem(&health.peers, peer) {
		if (strcmp(peer->name, health.set.primary) == 0)
			h = &peer->from.pair.general;
	}
	lag = health_state_replica_lag(health.set.primary);
	http_respond_yes(req, lag <= max_msecs, h);
}

static void http_readyz(struct http_server_request *req)
{
	const struct dovetail_health *h;
	const char *about;

	h = health_state_worst(TRUE, &about);
	http_respond_yes(req, !health_states_have(health.set.health_down |
						  health.set.health_drain,
						  h->state), h);
}

static void http_handle(struct http_server_request *req, const char *path,
			const char *query)
{
	string_t *body;

	if (strcmp(path, "/healthz") == 0) {
		http_respond_yes(req, health.node.general.state !=
				 DOVETAIL_HEALTH_UNKNOWN, &health.node.general);
	} else if (strcmp(path, "/readyz") == 0) {
		http_readyz(req);
	} else if (strcmp(path, "/primary") == 0) {
		http_respond_yes(req, node_is_primary() && !node_is_fenced(),
				 &health.node.general);
	} else if (strcmp(path, "/replica") == 0) {
		http_replica(req, query);
	} else if (strcmp(path, "/health") == 0) {
		body = t_str_new(1024);
		json_all(body);
		http_respond(req, 200, "application/json", body);
	} else if (strcmp(path, "/metrics") == 0) {
		body = t_str_new(4096);
		health_metrics(body);
		http_respond(req, 200, "application/openmetrics-text; "
			     "version=1.0.0; charset=utf-8", body);
	} else {
		http_server_request_fail(req, 404, "Not Found");
	}
}

static void http_request(void *context, struct http_server_request *req)
{
	const struct http_request *hreq = http_server_request_get(req);
	struct http_client *client = context;
	const char *path, *query;

	client->active(client->context);
	health.answers++;
	if (strcmp(hreq->method, "GET") != 0 &&
	    strcmp(hreq->method, "HEAD") != 0) {
		http_server_request_fail_bad_method(req, "GET, HEAD");
		return;
	}
	T_BEGIN {
		path = t_strcut(hreq->target_raw, '?');
		query = strchr(hreq->target_raw, '?');
		http_handle(req, path, query == NULL ? NULL : query + 1);
	} T_END;
}

static void http_closed(void *context, const char *reason ATTR_UNUSED)
{
	struct http_client *client = context;

	client->closed(client->context);
	i_free(client);
}

struct http_server_connection *
health_http_create(int fd, bool ssl, void (*active)(void *context),
		   void (*closed)(void *context), void *context)
{
	static const struct http_server_callbacks callbacks = {
		.handle_request = http_request,
		.connection_destroy = http_closed,
	};
	struct http_client *client = i_new(struct http_client, 1);

	client->active = active;
	client->closed = closed;
	client->context = context;
	client->conn = http_server_connection_create(http_server, fd, fd, ssl,
						     &callbacks, client);
	return client->conn;
}

void health_http_close(struct http_server_connection **conn)
{
	http_server_connection_close(conn, "too many connections, or the end");
}

void health_http_init(void)
{
	struct dovetail_compat_http_settings set = {
		.idle_msecs = HTTP_IDLE_MSECS,
		.target_max_len = HTTP_TARGET_MAX_LEN,
		.headers_max_size = HTTP_HEADERS_MAX_SIZE,
		.payload_max_size = 1,
	};

	http_server = dovetail_compat_http_server_init(&set, health.event);
}

void health_http_deinit(void)
{
	http_server_deinit(&http_server);
}
