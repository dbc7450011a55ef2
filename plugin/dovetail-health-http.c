/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* HTTP: the status code is the answer, the body says more. Two protocols: "http" tells
   no user's name to anybody, "admin" is the same with names.

     GET /healthz         200: there is news that is not old; else 503
     GET /readyz          200: the state is none of dovetail_health_down and
                          dovetail_health_drain; else 503
     GET /primary         200: this node is dovetail_primary, and not fenced
     GET /replica[?lag=N] 200: it is a replica of it that is known to be no more
                          than N seconds (5, 0.5, 500ms) behind; without N: of which
                          it is known how far
     GET /                the page for people, which asks for the next two
     GET /health          200, JSON: everything
     GET /history         200, JSON: the last hour
     GET /metrics         OpenMetrics, if the client accepts that by name, or the
                          older text format of Prometheus */

#include "lib.h"
#include "array.h"
#include "str.h"
#include "http-server.h"
#include "http-url.h"
#include "settings-parser.h"
#include "dovetail-compat.h"
#include "dovetail-health-page.h"
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
	/* may see users' names */
	bool names;
};

static struct http_server *http_server;

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
	const char *path =
		t_strcut(http_server_request_get(req)->target_raw, '?');
	string_t *body = t_str_new(256);

	health_decided("http", path, yes ? "200" : "503", h->state);
	str_append_c(body, '{');
	health_json_str(body, "node", health.set.node);
	str_append_c(body, ',');
	health_json(body, h);
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

static void http_metrics(struct http_server_request *req)
{
	const char *accept = http_request_header_get(
		http_server_request_get(req), "Accept");
	bool openmetrics = accept != NULL &&
		strstr(accept, "application/openmetrics-text") != NULL;
	string_t *body = t_str_new(4096);

	health_metrics(body, openmetrics);
	http_respond(req, 200, openmetrics ? "application/openmetrics-text; "
		     "version=1.0.0; charset=utf-8" : "text/plain; "
		     "version=0.0.4; charset=utf-8", body);
}

/* The page is all in one; nothing may be loaded from anywhere else, or embed it. */
static void http_page(struct http_server_request *req)
{
	struct http_server_response *resp;

	resp = http_server_response_create(req, 200, "OK");
	http_server_response_add_header(resp, "Content-Type",
					"text/html; charset=utf-8");
	http_server_response_add_header(resp, "Cache-Control", "no-store");
	http_server_response_add_header(resp, "Content-Security-Policy",
		"default-src 'none'; script-src 'unsafe-inline'; "
		"style-src 'unsafe-inline'; img-src data:; "
		"connect-src 'self'; base-uri 'none'; form-action 'none'; "
		"frame-ancestors 'none'");
	http_server_response_add_header(resp, "X-Content-Type-Options",
					"nosniff");
	http_server_response_set_payload_data(resp, page_html,
					      sizeof(page_html) - 1);
	http_server_response_submit(resp);
}

/* A page of somebody else, whose host name suddenly means 127.0.0.1, would be allowed
   by the administrator's browser to ask us, in a name that is not ours. */
static bool http_host_is_local(struct http_server_request *req)
{
	const struct http_url *url =
		http_server_request_get(req)->target.url;

	return url != NULL && (url->host.ip.family != 0 ||
			       (url->host.name != NULL &&
				strcmp(url->host.name, "localhost") == 0));
}

static void http_handle(struct http_server_request *req, const char *path,
			const char *query, bool names)
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
		health_json_all(body, names);
		http_respond(req, 200, "application/json", body);
	} else if (strcmp(path, "/history") == 0) {
		body = t_str_new(8192);
		health_history_json(body);
		http_respond(req, 200, "application/json", body);
	} else if (strcmp(path, "/") == 0) {
		http_page(req);
	} else if (strcmp(path, "/metrics") == 0) {
		http_metrics(req);
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
	if (client->names && !http_host_is_local(req)) {
		http_server_request_fail_text(req, 403, "Forbidden",
			"Ask for localhost, or for an IP address\n");
		return;
	}
	T_BEGIN {
		path = t_strcut(hreq->target_raw, '?');
		query = strchr(hreq->target_raw, '?');
		http_handle(req, path, query == NULL ? NULL : query + 1,
			    client->names);
	} T_END;
}

static void http_closed(void *context, const char *reason ATTR_UNUSED)
{
	struct http_client *client = context;

	client->closed(client->context);
	i_free(client);
}

struct http_server_connection *
health_http_create(int fd, bool ssl, bool names, void (*active)(void *context),
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
	client->names = names;
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
