/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* The frames of dovetail-frame.h: dovetail-queue pushes its reports, and doveadm
   asks. This is the only protocol that says users' names. */

#include "lib.h"
#include "array.h"
#include "buffer.h"
#include "hash.h"
#include "ioloop.h"
#include "net.h"
#include "str.h"
#include "dovetail-frame.h"
#include "dovetail-health-private.h"

#include <unistd.h>

#define FRAMES_REQUEST_MAX_SIZE \
	(DOVETAIL_HEALTH_TROUBLES_MAX_BYTES + 256 * 1024)
/* dovetail-queue speaks every second */
#define FRAMES_IDLE_MSECS (60 * 1000)

/* ---- rows ---- */

struct rows {
	buffer_t *buf;
	unsigned int count;
};

static const char *lag_str(uint64_t msecs)
{
	return msecs == DOVETAIL_HEALTH_NEVER ? "" : t_strdup_printf("%"PRIu64".%03u", msecs / 1000,
			       (unsigned int)(msecs % 1000));
}

static void row_add(struct rows *rows, const char *about, const char *peer,
		    const char *direction, const char *lag,
		    const char *entries, const struct dovetail_health *h)
{
	const char *const fields[] = {
		"about", about,
		"peer", peer,
		"direction", direction,
		"state", dovetail_health_state_name(h->state),
		"since", health_time_str(health_state_since(h), TRUE),
		"lag", lag,
		"who", dovetail_health_who_name(h->who),
		"reason", h->reason,
		"remedy", h->remedy,
		"entries", entries,
	};
	unsigned int i;

	dovetail_wire_put_num(rows->buf, N_ELEMENTS(fields) / 2);
	for (i = 0; i < N_ELEMENTS(fields); i++)
		dovetail_wire_put_str(rows->buf, fields[i]);
	rows->count++;
}

static void rows_peers(struct rows *rows)
{
	const struct dovetail_health_report_peer *rpeer;
	struct health_peer *peer;

	array_foreach_elem(&health.peers, peer) {
		rpeer = health_state_report_peer(peer->name);
		row_add(rows, health.set.node, peer->name, "to",
			lag_str(health_state_primary_lag(peer->name)),
			rpeer == NULL ? "" : dec2str(rpeer->to.entries),
			&peer->to.pair.all);
		row_add(rows, health.set.node, peer->name, "from",
			lag_str(health_state_replica_lag(peer->name)),
			rpeer == NULL ? "" : dec2str(rpeer->from.entries),
			&peer->from.pair.all);
	}
}

static void row_user(struct rows *rows, const struct health_user *user)
{
	row_add(rows, user->name, user->mailbox, "user", "", "",
		&user->health);
}

static void rows_users(struct rows *rows)
{
	struct hash_iterate_context *iter;
	struct health_user *user;
	char *name;

	iter = hash_table_iterate_init(health.users);
	while (hash_table_iterate(iter, health.users, &name, &user)) {
		if (rows->buf->used > FRAMES_REQUEST_MAX_SIZE)
			break;
		row_user(rows, user);
	}
	hash_table_iterate_deinit(&iter);
}

/* ---- frames ---- */

static void
frame_send(struct health_conn *conn, buffer_t *buf, size_t offset)
{
	dovetail_frame_end(buf, offset);
	health_conn_send(conn, buf->data, buf->used);
}

static int frame_hello(struct health_conn *conn, struct dovetail_wire_reader *r)
{
	buffer_t *buf = t_buffer_create(64);
	size_t offset;

	if (dovetail_wire_get_num(r) != DOVETAIL_FRAME_VERSION)
		return -1;
	offset = dovetail_frame_begin(buf, DOVETAIL_FRAME_WELCOME);
	dovetail_wire_put_num(buf, DOVETAIL_FRAME_VERSION);
	dovetail_wire_put_str(buf, health.set.node);
	frame_send(conn, buf, offset);
	return 0;
}

static int
frame_health_get(struct health_conn *conn, struct dovetail_wire_reader *r)
{
	const struct health_user *user;
	buffer_t *buf = t_buffer_create(1024);
	struct rows rows = { .buf = t_buffer_create(1024) };
	const char *name;
	uint64_t tag;
	size_t offset;

	tag = dovetail_wire_get_num(r);
	name = dovetail_wire_get_str(r, pool_datastack_create());
	if (!dovetail_wire_reader_done(r))
		return -1;
	row_add(&rows, health.set.node, "", "self", "", "", &health.node.all);
	rows_peers(&rows);
	if (strcmp(name, "*") == 0)
		rows_users(&rows);
	else if (name[0] != '\0' &&
		 (user = health_state_user(name)) != NULL)
		row_user(&rows, user);
	health.answers++;
	offset = dovetail_frame_begin(buf, DOVETAIL_FRAME_STATUS);
	dovetail_wire_put_num(buf, tag);
	dovetail_wire_put_num(buf, rows.count);
	buffer_append_buf(buf, rows.buf, 0, SIZE_MAX);
	frame_send(conn, buf, offset);
	return 0;
}

/* Who says how it is must be who we are, or root. */
static bool frame_is_trusted(struct health_conn *conn)
{
	struct net_unix_cred cred;

	return net_getunixcred(health_conn_fd(conn), &cred) == 0 &&
		(cred.uid == 0 || cred.uid == geteuid());
}

static int
frame_health(struct health_conn *conn, struct dovetail_wire_reader *r,
	     const char **error_r)
{
	struct dovetail_health_report report;
	pool_t pool;

	if (!frame_is_trusted(conn)) {
		*error_r = "Only dovetail-queue may report";
		return -1;
	}
	pool = pool_alloconly_create("dovetail health report", 4096);
	if (!dovetail_health_report_get(r, pool, &report)) {
		pool_unref(&pool);
		return -1;
	}
	health_conn_keep(conn);
	health_state_report(pool, &report);
	return 0;
}

static ssize_t
frames_input(struct health_conn *conn, const unsigned char *data, size_t size,
	     bool eof ATTR_UNUSED, const char **error_r)
{
	struct dovetail_wire_reader r;
	enum dovetail_frame_type type;
	const unsigned char *payload;
	size_t payload_size, frame_size;
	int ret;

	ret = dovetail_frame_parse(data, size, &type, &payload, &payload_size,
				   &frame_size, error_r);
	if (ret <= 0)
		return ret;
	*error_r = "A frame makes no sense";
	dovetail_wire_reader_init(&r, payload, payload_size);
	switch (type) {
	case DOVETAIL_FRAME_HELLO:
		ret = frame_hello(conn, &r);
		break;
	case DOVETAIL_FRAME_HEALTH:
		ret = frame_health(conn, &r, error_r);
		break;
	case DOVETAIL_FRAME_HEALTH_GET:
		ret = frame_health_get(conn, &r);
		break;
	default:
		ret = -1;
		break;
	}
	return ret < 0 ? -1 : (ssize_t)frame_size;
}

const struct health_protocol health_protocol_frames = {
	.type = "health",
	.max_request_size = FRAMES_REQUEST_MAX_SIZE,
	.idle_msecs = FRAMES_IDLE_MSECS,
	.input = frames_input,
};
