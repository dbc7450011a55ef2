/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* Connections of all protocols. Nobody can hold up the others: a request has a
   maximum size and some seconds to come, answers that are not read are not
   kept, who says nothing is closed after a while, and when there are too many,
   the one that has been silent for longest goes. */

#include "lib.h"
#include "array.h"
#include "hash.h"
#include "ioloop.h"
#include "istream.h"
#include "llist.h"
#include "master-service.h"
#include "net.h"
#include "ostream.h"
#include "dovetail-compat.h"
#include "dovetail-health-private.h"

/* for the rest of a request, and for the client to take its answers */
#define CONN_REQUEST_MSECS (10 * 1000)
#define CONN_OUTPUT_MAX_BYTES (64 * 1024)
/* Dovecot accepts no more than client_limit. */
#define CONN_SPARE 2

struct health_conn {
	/* the one that was active last is the last */
	struct health_conn *prev, *next;
	/* NULL: HTTP */
	const struct health_protocol *protocol;
	struct http_server_connection *http;

	int fd;
	struct io *io;
	struct istream *input;
	struct ostream *output;
	struct timeout *to;
	/* which timeout to is */
	bool hurried;
	/* to be closed when all is sent */
	bool finished;
	/* its request will be answered later; nothing is read meanwhile */
	bool waiting;
	/* reports: stays when there are too many */
	bool keep;
	/* being worked on: not to be freed */
	bool busy, dead;
};

static const struct health_protocol *const protocols[] = {
	&health_protocol_frames,
	&health_protocol_policy,
	&health_protocol_socketmap,
	&health_protocol_exim,
	&health_protocol_agent,
};

static struct health_conn *conns_head, *conns_tail;
static unsigned int conns_count, conns_max;

static void conn_input(struct health_conn *conn);

static void conn_free(struct health_conn *conn)
{
	DLLIST2_REMOVE(&conns_head, &conns_tail, conn);
	conns_count--;
	i_free(conn);
	master_service_client_connection_destroyed(master_service);
}

static void conn_destroy(struct health_conn *conn)
{
	if (conn->http != NULL) {
		/* conn_http_closed() frees it */
		health_http_close(&conn->http);
		return;
	}
	if (conn->protocol == NULL) {
		/* about to be */
		return;
	}
	if (conn->busy) {
		conn->dead = TRUE;
		return;
	}
	if (conn->finished) {
		/* what is not read would take the answer with it */
		(void)i_stream_read(conn->input);
	}
	if (conn->keep)
		health_state_report_ended();
	timeout_remove(&conn->to);
	io_remove(&conn->io);
	i_stream_destroy(&conn->input);
	o_stream_destroy(&conn->output);
	net_disconnect(conn->fd);
	conn_free(conn);
}

static void conn_timeout(struct health_conn *conn)
{
	health.connections_closed++;
	conn_destroy(conn);
}

/* hurried: something is under way, that has to come to its end. */
static void conn_set_timeout(struct health_conn *conn, bool hurried)
{
	if (conn->to != NULL && hurried && conn->hurried)
		return;
	timeout_remove(&conn->to);
	conn->hurried = hurried;
	conn->to = timeout_add(hurried ? CONN_REQUEST_MSECS :
			       conn->protocol->idle_msecs, conn_timeout, conn);
}

static void conn_active(struct health_conn *conn)
{
	if (conn->next == NULL)
		return;
	DLLIST2_REMOVE(&conns_head, &conns_tail, conn);
	DLLIST2_APPEND(&conns_head, &conns_tail, conn);
}

/* ---- out ---- */

void health_conn_send(struct health_conn *conn, const void *data, size_t size)
{
	o_stream_nsend(conn->output, data, size);
}

void health_conn_finish(struct health_conn *conn)
{
	conn->finished = TRUE;
}

void health_conn_wait(struct health_conn *conn)
{
	conn->waiting = TRUE;
}

bool health_conn_is_waiting(const struct health_conn *conn)
{
	return conn->waiting;
}

void health_conn_keep(struct health_conn *conn)
{
	conn->keep = TRUE;
}

int health_conn_fd(const struct health_conn *conn)
{
	return conn->fd;
}

static size_t conn_unsent(struct health_conn *conn)
{
	return o_stream_get_buffer_used_size(conn->output);
}

static int conn_output(struct health_conn *conn)
{
	int ret = o_stream_flush(conn->output);

	if (ret == 0)
		return 0;
	if (ret < 0 || conn->finished) {
		conn_destroy(conn);
		return 1;
	}
	if (conn->io == NULL && !conn->waiting) {
		conn->io = io_add(conn->fd, IO_READ, conn_input, conn);
		/* what is in the buffer already */
		io_set_pending(conn->io);
	}
	return 1;
}

/* ---- in ---- */

static void conn_refuse(struct health_conn *conn, const char *error)
{
	health.refused++;
	if (!health_may_log())
		return;
	e_warning(event_create_passthrough(health.event)->
		  add_str("protocol", conn->protocol->type)->event(),
		  "%s: Refused a request: %s", conn->protocol->type, error);
}

/* Work on requests until there is none, or an answer is not taken. Returns 0, or -1
   to disconnect. */
static int conn_requests(struct health_conn *conn, bool eof)
{
	const unsigned char *data;
	const char *error;
	size_t size;
	ssize_t ret;

	for (;;) {
		if (conn->finished || conn_unsent(conn) > 0)
			return 0;
		data = i_stream_get_data(conn->input, &size);
		if (size == 0 && !(eof && conn->protocol->may_be_empty))
			return eof ? -1 : 0;
		ret = 0;
		error = "The end of the request is missing";
		T_BEGIN {
			ret = conn->protocol->input(conn, data, size, eof,
						    &error);
			if (ret < 0 || (ret == 0 && eof && !conn->finished &&
					!conn->waiting))
				conn_refuse(conn, error);
		} T_END;
		if (ret < 0)
			return -1;
		if (ret == 0 && conn->waiting)
			return 0;
		if (ret == 0 && !conn->finished)
			return eof ? -1 : 0;
		i_stream_skip(conn->input, ret);
		if (o_stream_flush(conn->output) < 0)
			return -1;
	}
}

/* full: there is no room for more of the request */
static void conn_work(struct health_conn *conn, bool eof, bool full)
{
	int ret;

	conn->busy = TRUE;
	ret = conn_requests(conn, eof);
	conn->busy = FALSE;
	if (ret < 0 || conn->dead) {
		conn->dead = FALSE;
		conn_destroy(conn);
	} else if (conn_unsent(conn) > 0) {
		/* no more from this client until it has read */
		io_remove(&conn->io);
		if (conn_unsent(conn) > CONN_OUTPUT_MAX_BYTES)
			conn_destroy(conn);
		else
			conn_set_timeout(conn, TRUE);
	} else if (conn->finished) {
		conn_destroy(conn);
	} else if (conn->waiting) {
		io_remove(&conn->io);
		conn_set_timeout(conn, TRUE);
	} else if (full && i_stream_get_data_size(conn->input) >=
		   conn->protocol->max_request_size) {
		conn_refuse(conn, t_strdup_printf("More than %zu bytes",
					conn->protocol->max_request_size));
		conn_destroy(conn);
	} else {
		if (conn->io == NULL)
			conn->io = io_add(conn->fd, IO_READ, conn_input, conn);
		conn_set_timeout(conn,
				 i_stream_get_data_size(conn->input) > 0);
	}
}

static void conn_input(struct health_conn *conn)
{
	bool eof = FALSE, full = FALSE;

	switch (i_stream_read(conn->input)) {
	case -1:
		eof = TRUE;
		break;
	case -2:
		full = TRUE;
		break;
	}
	conn_active(conn);
	conn_work(conn, eof, full);
}

void health_conns_resume(void)
{
	struct health_conn *conn, *next;

	for (conn = conns_head; conn != NULL; conn = next) {
		next = conn->next;
		if (!conn->waiting)
			continue;
		conn->waiting = FALSE;
		conn_work(conn, conn->input->eof, FALSE);
	}
}

/* ---- begin ---- */

/* Too many: those go that nobody misses. */
static void conns_make_room(void)
{
	struct health_conn *conn, *next;

	for (conn = conns_head; conn != NULL && conns_count >= conns_max;
	     conn = next) {
		next = conn->next;
		if (!conn->keep) {
			health.connections_closed++;
			conn_destroy(conn);
		}
	}
}

static void conn_http_active(void *context)
{
	conn_active(context);
}

static void conn_http_closed(void *context)
{
	conn_free(context);
}

static const struct health_protocol *protocol_find(const char *type)
{
	unsigned int i;

	for (i = 0; i < N_ELEMENTS(protocols); i++) {
		if (strcmp(protocols[i]->type, type) == 0)
			return protocols[i];
	}
	return NULL;
}

void health_conn_create(struct master_service_connection *mconn)
{
	const char *type = dovetail_compat_listener_type(mconn);
	const struct health_protocol *protocol = protocol_find(type);
	struct health_conn *conn;
	bool names = strcmp(type, "admin") == 0;

	if (protocol == NULL && !names && strcmp(type, "http") != 0) {
		e_error(health.event, "Listener %s: Its name must end with the "
			"name of a protocol: -health, -policy, -socketmap, "
			"-exim, -agent, -http, -admin", mconn->name);
		return;
	}
	master_service_client_connection_accept(mconn);
	conns_make_room();
	health.connections++;
	conn = i_new(struct health_conn, 1);
	conn->fd = mconn->fd;
	conn->protocol = protocol;
	conns_count++;
	DLLIST2_APPEND(&conns_head, &conns_tail, conn);
	net_set_nonblock(conn->fd, TRUE);
	if (protocol == NULL) {
		conn->http = health_http_create(conn->fd, mconn->ssl, names,
						conn_http_active,
						conn_http_closed, conn);
		return;
	}
	conn->input = i_stream_create_fd(conn->fd, protocol->max_request_size);
	conn->output = o_stream_create_fd(conn->fd, CONN_OUTPUT_MAX_BYTES * 2);
	o_stream_set_no_error_handling(conn->output, TRUE);
	o_stream_set_flush_callback(conn->output, conn_output, conn);
	conn->io = io_add(conn->fd, IO_READ, conn_input, conn);
	conn_set_timeout(conn, FALSE);
	if (protocol->connected == NULL)
		return;
	T_BEGIN {
		protocol->connected(conn);
	} T_END;
	if (o_stream_flush(conn->output) < 0 ||
	    (conn->finished && conn_unsent(conn) == 0))
		conn_destroy(conn);
}

void health_conns_init(void)
{
	unsigned int limit = master_service_get_client_limit(master_service);

	conns_max = limit > CONN_SPARE + 1 ? limit - CONN_SPARE : 1;
}

void health_conns_deinit(void)
{
	struct health_conn *conn, *next;

	for (conn = conns_head; conn != NULL; conn = next) {
		next = conn->next;
		conn_destroy(conn);
	}
}
