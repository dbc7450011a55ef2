/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "array.h"
#include "buffer.h"
#include "hash.h"
#include "ioloop.h"
#include "llist.h"
#include "master-service.h"
#include "net.h"
#include "ostream.h"
#include "priorityq.h"
#include "str-sanitize.h"
#include "dovetail-job.h"
#include "dovetail-queue-private.h"
#include "dovetail-service.h"

#include <pwd.h>
#include <unistd.h>

#define CONN_READ_SIZE (128 * 1024)
/* a larger input buffer is not kept by a connection that says nothing */
#define CONN_INPUT_KEEP_SIZE 4096
/* a client that does not read its answers */
#define CONN_OUTPUT_MAX_BYTES (4 * 1024 * 1024)
/* how many users a worker has at a time */
#define CONN_WORK_MAX 4
/* users of a connection; a mail process marks few at a time, and who may not
   speak for all has no business with many */
#define CONN_USERS_MAX 65536
#define CONN_USERS_MAX_UNTRUSTED 64
#define CONN_USERNAME_MAX_LEN 1024
#define REPORT_ROWS_MAX 8192
#define REPORT_FIELDS_MAX 64
/* all that is kept of a key or a value: errors have names in them */
#define REPORT_STR_MAX_LEN 500
/* a user that closes a connection is often about to open the next one */
#define CONN_END_SWEEP_MSECS 1000
/* so long others wait for one that has sent half a frame */
#define CONN_INPUT_FIRST_SECS 5

/* A user this connection spoke of. */
struct conn_user {
	struct conn_user *prev, *next;
	struct dovetail_queue_user *user;
	bool marked;
	/* the peer may not speak for the user */
	bool refused;
};

struct dovetail_queue_conn {
	struct dovetail_queue_conn *prev, *next;
	struct dovetail_queue *queue;
	struct event *event;

	int fd;
	struct io *io;
	struct ostream *output;
	/* NULL, or what was read and not worked on: part of a frame; whole
	   frames also, if halted */
	buffer_t *input;
	bool halted;
	/* in queue->flush, and output is corked */
	bool flushing;
	bool failed;

	/* of the peer process */
	uid_t uid;
	bool trusted;
	bool hello;
	enum dovetail_client_kind kind;
	uint64_t pid;

	struct dovetail_queue_waiter *waiters;
	size_t waiting_bytes;
	/* the last used first */
	struct conn_user *users;
	unsigned int users_count;

	/* worker: */
	struct dovetail_queue_conn *worker_prev, *worker_next;
	unsigned int slot, slots;
	ARRAY(struct dovetail_queue_user *) work;
	pool_t report_pool;
	ARRAY(const char *const *) report;
	/* dovetail_monotonic_msecs() when it came */
	uint64_t report_msecs;
	/* NULL: there are none */
	pool_t troubles_pool;
	ARRAY_TYPE(dovetail_health_trouble_of) troubles;
	uint64_t troubles_more, troubles_msecs;
};

/* ---- out ---- */

/* Start a frame to the client; ends with conn_send(). */
static size_t conn_frame(buffer_t **buf_r, enum dovetail_frame_type type)
{
	*buf_r = t_buffer_create(128);
	return dovetail_frame_begin(*buf_r, type);
}

static void conn_send(struct dovetail_queue_conn *conn, buffer_t *buf,
		      size_t offset)
{
	dovetail_frame_end(buf, offset);
	if (!conn->flushing) {
		conn->flushing = TRUE;
		o_stream_cork(conn->output);
		array_push_back(&conn->queue->flush, &conn);
	}
	o_stream_nsend(conn->output, buf->data, buf->used);
}

void dovetail_queue_conn_send(struct dovetail_queue_conn *conn,
			      enum dovetail_frame_type type,
			      const buffer_t *payload)
{
	T_BEGIN {
		buffer_t *buf;
		size_t offset = conn_frame(&buf, type);

		buffer_append_buf(buf, payload, 0, SIZE_MAX);
		conn_send(conn, buf, offset);
	} T_END;
}

static void conn_reply(struct dovetail_queue_conn *conn, uint64_t tag,
		       enum dovetail_reply reply, const char *text)
{
	T_BEGIN {
		buffer_t *buf;
		size_t offset = conn_frame(&buf, DOVETAIL_FRAME_REPLY);

		dovetail_wire_put_num(buf, tag);
		dovetail_wire_put_u8(buf, reply);
		dovetail_wire_put_str(buf, text);
		conn_send(conn, buf, offset);
	} T_END;
}

void dovetail_queue_waiter_answer(struct dovetail_queue_waiter **_waiter,
				  enum dovetail_reply reply, const char *text)
{
	struct dovetail_queue_waiter *waiter = *_waiter;
	struct dovetail_queue_conn *conn = waiter->conn;
	struct dovetail_queue_user *user = waiter->user;

	*_waiter = NULL;
	if (conn != NULL) {
		DLLIST_REMOVE_FULL(&conn->waiters, waiter,
				   conn_prev, conn_next);
		i_assert(conn->waiting_bytes >= waiter->frame_size);
		conn->waiting_bytes -= waiter->frame_size;
		conn_reply(conn, waiter->tag, reply, text);
	}
	i_assert(user->waiters > 0);
	user->waiters--;
	if (!waiter->sweep) {
		/* nothing in the mailboxes */
	} else if (reply == DOVETAIL_REPLY_UNAVAILABLE) {
		dovetail_queue_user_set_dirty(user, 0,
			"a change could not be queued");
	}
	dovetail_queue_user_release(user);
	i_free(waiter);
}

/* ---- flow ---- */

/* Nothing more is to be taken from this client now. */
static bool conn_must_wait(const struct dovetail_queue_conn *conn)
{
	const struct dovetail_queue *queue = conn->queue;

	return conn->waiting_bytes +
		o_stream_get_buffer_used_size(conn->output) >
		DOVETAIL_QUEUE_CONN_MAX_BYTES ||
		queue->pending_bytes > DOVETAIL_QUEUE_PENDING_MAX_BYTES;
}

/* Half frames take too much memory: one after the other gets completed. */
static bool conn_input_must_wait(struct dovetail_queue_conn *conn)
{
	struct dovetail_queue *queue = conn->queue;

	if (conn->input == NULL) {
		if (queue->input_first == conn)
			queue->input_first = NULL;
		return FALSE;
	}
	if (queue->input_bytes <= DOVETAIL_QUEUE_INPUT_MAX_BYTES)
		return FALSE;
	if (queue->input_first == NULL) {
		queue->input_first = conn;
		queue->input_first_since = dovetail_monotonic_secs();
	}
	return queue->input_first != conn;
}

static void conn_halt(struct dovetail_queue_conn *conn)
{
	if (conn->halted)
		return;
	conn->halted = TRUE;
	conn->queue->halted_count++;
	io_remove(&conn->io);
}

static void conn_input(struct dovetail_queue_conn *conn);

static void conn_resume(struct dovetail_queue_conn *conn)
{
	if (!conn->halted)
		return;
	conn->halted = FALSE;
	conn->queue->halted_count--;
	conn->io = io_add(conn->fd, IO_READ, conn_input, conn);
	/* there may be whole frames in the buffer, and nothing to read */
	io_set_pending(conn->io);
}

void dovetail_queue_conns_resume(struct dovetail_queue *queue)
{
	queue->resume = TRUE;
}

static void conns_resume(struct dovetail_queue *queue)
{
	struct dovetail_queue_conn *conn;

	queue->resume = FALSE;
	/* in large steps, not for each byte */
	if (queue->halted_count == 0 ||
	    queue->pending_bytes > DOVETAIL_QUEUE_PENDING_MAX_BYTES / 2)
		return;
	for (conn = queue->conns; conn != NULL; conn = conn->next) {
		if (conn->halted && !conn_must_wait(conn) &&
		    !conn_input_must_wait(conn))
			conn_resume(conn);
	}
}

static void conn_input_set(struct dovetail_queue_conn *conn, const void *data,
			   size_t size)
{
	if (size == 0)
		return;
	if (conn->input == NULL)
		conn->input = buffer_create_dynamic(default_pool, size);
	buffer_append(conn->input, data, size);
	conn->queue->input_bytes += size;
}

static void conn_input_delete(struct dovetail_queue_conn *conn, size_t size)
{
	i_assert(conn->queue->input_bytes >= size);
	conn->queue->input_bytes -= size;
	buffer_delete(conn->input, 0, size);
	if (conn->input->used == 0)
		buffer_free(&conn->input);
}

/* ---- users ---- */

static struct conn_user *
conn_user_find(struct dovetail_queue_conn *conn, const char *name)
{
	struct conn_user *cu;

	for (cu = conn->users; cu != NULL; cu = cu->next) {
		if (strcmp(cu->user->name, name) == 0)
			break;
	}
	if (cu != NULL && cu != conn->users) {
		DLLIST_REMOVE(&conn->users, cu);
		DLLIST_PREPEND(&conn->users, cu);
	}
	return cu;
}

static void
conn_user_free(struct dovetail_queue_conn *conn, struct conn_user *cu)
{
	struct dovetail_queue_user *user = cu->user;

	DLLIST_REMOVE(&conn->users, cu);
	conn->users_count--;
	i_assert(user->conns > 0);
	user->conns--;
	if (cu->marked) {
		dovetail_queue_user_unmark(user);
		dovetail_queue_user_set_dirty(user, CONN_END_SWEEP_MSECS,
			"a client ended without saying that all is queued");
	}
	dovetail_queue_user_release(user);
	i_free(cu);
}

/* System users speak for themselves only. */
static bool conn_speaks_for(const struct dovetail_queue_conn *conn,
			    const char *name)
{
	const struct passwd *pw;

	if (conn->trusted)
		return TRUE;
	pw = getpwnam(name);
	return pw != NULL && pw->pw_uid == conn->uid;
}

/* Returns NULL when there are too many. */
static struct conn_user *
conn_user_get(struct dovetail_queue_conn *conn, const char *name)
{
	struct conn_user *cu;

	cu = conn_user_find(conn, name);
	if (cu != NULL)
		return cu;
	if (conn->users_count >= (conn->trusted ? CONN_USERS_MAX :
				  CONN_USERS_MAX_UNTRUSTED))
		return NULL;
	cu = i_new(struct conn_user, 1);
	cu->user = dovetail_queue_user_get(conn->queue, name);
	cu->user->conns++;
	cu->refused = !conn_speaks_for(conn, name);
	if (cu->refused) {
		e_error(event_create_passthrough(conn->event)->
			add_str("user", name)->event(),
			"uid %s may not speak for user %s: Refused "
			"(it is neither root, nor the user of the service or "
			"of its unix_listener, nor the user's own)",
			dec2str(conn->uid), str_sanitize(name, 100));
	}
	DLLIST_PREPEND(&conn->users, cu);
	conn->users_count++;
	return cu;
}

/* Keep those that a mark or a check hangs on. */
static void
conn_user_put(struct dovetail_queue_conn *conn, struct conn_user *cu)
{
	if (conn->trusted && !cu->marked)
		conn_user_free(conn, cu);
}

static int get_user(struct dovetail_wire_reader *r, const char **name_r)
{
	*name_r = dovetail_wire_get_str(r, pool_datastack_create());
	return r->failed || **name_r == '\0' ||
		strlen(*name_r) > CONN_USERNAME_MAX_LEN ? -1 : 0;
}

static int conn_handle_mark(struct dovetail_queue_conn *conn,
			    struct dovetail_wire_reader *r)
{
	struct conn_user *cu;
	const char *name;
	uint64_t tag = 0;
	bool wants_reply;

	if (get_user(r, &name) < 0)
		return -1;
	wants_reply = r->pos < r->end;
	if (wants_reply) {
		tag = dovetail_wire_get_num(r);
		if (!dovetail_wire_reader_done(r))
			return -1;
	}
	cu = conn_user_get(conn, name);
	if (cu == NULL) {
		e_error(conn->event, "Client marked more than %u users",
			conn->users_count);
		return -1;
	}
	if (!cu->refused && !cu->marked) {
		cu->marked = TRUE;
		dovetail_queue_user_mark(cu->user);
	}
	if (!wants_reply)
		;
	else if (cu->refused) {
		conn_reply(conn, tag, DOVETAIL_REPLY_REFUSED,
			   "You may not speak for this user");
	} else if (!cu->user->mark_file) {
		conn_reply(conn, tag, DOVETAIL_REPLY_UNAVAILABLE,
			   "The mark cannot be written");
	} else
		conn_reply(conn, tag, DOVETAIL_REPLY_OK, "");
	return 0;
}

static int conn_handle_clean(struct dovetail_queue_conn *conn,
			     struct dovetail_wire_reader *r)
{
	struct conn_user *cu;
	const char *name;

	if (get_user(r, &name) < 0)
		return -1;
	cu = conn_user_find(conn, name);
	if (cu != NULL && cu->marked) {
		cu->marked = FALSE;
		dovetail_queue_user_unmark(cu->user);
		dovetail_queue_user_release(cu->user);
		conn_user_put(conn, cu);
	}
	return 0;
}

static int conn_handle_sweep(struct dovetail_queue_conn *conn,
			     struct dovetail_wire_reader *r)
{
	struct conn_user *cu;
	const char *name;

	if (get_user(r, &name) < 0)
		return -1;
	cu = conn_user_get(conn, name);
	if (cu == NULL)
		return -1;
	if (!cu->refused) {
		dovetail_queue_user_set_dirty(cu->user, 0,
			"a client gave up waiting");
	}
	conn_user_put(conn, cu);
	return 0;
}

/* ---- changes ---- */

/* What it says stands in the mailboxes; all else is questions and answers. */
static bool change_is_of_mailboxes(const struct dovetail_change *change)
{
	switch (change->kind) {
	case DOVETAIL_CHANGE_MAILBOX:
	case DOVETAIL_CHANGE_LIST:
	case DOVETAIL_CHANGE_TREE:
	case DOVETAIL_CHANGE_SPOOL:
		return TRUE;
	default:
		return FALSE;
	}
}

static bool
change_get_position(const struct dovetail_change *change,
		    struct dovetail_queue_position_change *position_r)
{
	const struct dovetail_change_mailbox *mbox = &change->u.mailbox;

	if (change->kind != DOVETAIL_CHANGE_MAILBOX ||
	    mbox->to.index_id == 0 || mbox->to.file_seq == 0)
		return FALSE;
	i_zero(position_r);
	dovetail_queue_positions_id(change->user, mbox->guid, position_r->id);
	position_r->from = mbox->from;
	position_r->to = mbox->to;
	position_r->snapshot = (mbox->flags & DOVETAIL_MAILBOX_SNAPSHOT) != 0;
	return TRUE;
}

static void
conn_queue_change(struct dovetail_queue_conn *conn,
		  unsigned int shard,
		  struct dovetail_queue_waiter *waiter,
		  const struct dovetail_change *change,
		  const void *data, size_t size)
{
	struct dovetail_queue *queue = conn->queue;
	struct dovetail_queue_log *log = &queue->logs[shard];
	struct dovetail_queue_position_change position;
	enum dovetail_queue_known known = DOVETAIL_QUEUE_KNOWN_NOT;
	struct dovetail_queue_group *group = NULL;
	const char *reason;
	bool have_position;

	if (queue->peers_count == 0) {
		/* there is nobody to tell */
		dovetail_queue_waiter_answer(&waiter, DOVETAIL_REPLY_OK, "");
		return;
	}
	have_position = change_get_position(change, &position);
	if (have_position) {
		known = dovetail_queue_positions_check(queue->positions,
						       &position, &group);
	}
	if (known == DOVETAIL_QUEUE_KNOWN_STORED) {
		if (waiter->level != DOVETAIL_ACK_APPLIED) {
			dovetail_queue_waiter_answer(&waiter,
						     DOVETAIL_REPLY_OK, "");
			return;
		}
		/* whether it could be applied is not known any more: ask, with
		   the same change again */
		have_position = FALSE;
	}
	reason = dovetail_queue_log_unavailable(log);
	if (reason != NULL) {
		if (have_position) {
			dovetail_queue_positions_done(queue->positions,
						      &position, NULL, FALSE);
		}
		dovetail_queue_waiter_answer(&waiter,
			DOVETAIL_REPLY_UNAVAILABLE, reason);
		return;
	}
	if (known == DOVETAIL_QUEUE_KNOWN_PENDING && !group->abandoned) {
		waiter->ordinal = UINT_MAX;
		DLLIST2_APPEND(&group->waiters_head, &group->waiters_tail,
			       waiter);
		return;
	}
	dovetail_queue_log_append(log, data, size,
				  have_position ? &position : NULL, waiter);
	queue->kick |= 1ULL << shard;
}

static int conn_handle_change(struct dovetail_queue_conn *conn,
			      struct dovetail_wire_reader *r)
{
	struct dovetail_queue_waiter *waiter;
	struct dovetail_change change;
	struct conn_user *cu;
	const char *error;
	uint64_t tag;
	uint8_t level;
	size_t size;
	bool of_shard;

	tag = dovetail_wire_get_num(r);
	level = dovetail_wire_get_u8(r);
	if (r->failed)
		return -1;
	size = r->end - r->pos;
	if (level > DOVETAIL_ACK_APPLIED) {
		conn_reply(conn, tag, DOVETAIL_REPLY_REFUSED,
			   "Unknown ack level");
		return 0;
	}
	if (size > DOVETAIL_CHANGE_MAX_SIZE) {
		conn_reply(conn, tag, DOVETAIL_REPLY_REFUSED,
			   "The change is too large");
		return 0;
	}
	if (dovetail_change_decode_head(pool_datastack_create(), r->pos, size,
					&change, &error) < 0) {
		conn_reply(conn, tag, DOVETAIL_REPLY_REFUSED, error);
		e_error(conn->event, "Client sent a change that makes no "
			"sense: %s", error);
		return 0;
	}
	of_shard = change.kind == DOVETAIL_CHANGE_SHARD_REQUEST ||
		change.kind == DOVETAIL_CHANGE_SHARD_SWEPT;
	if (change.user[0] == '\0' && !of_shard) {
		conn_reply(conn, tag, DOVETAIL_REPLY_REFUSED,
			   "The change is of no user");
		return 0;
	}
	if (strlen(change.user) > CONN_USERNAME_MAX_LEN) {
		conn_reply(conn, tag, DOVETAIL_REPLY_REFUSED,
			   "The user's name is too long");
		return 0;
	}
	if (of_shard && change.u.shard.shard >= conn->queue->logs_count) {
		conn_reply(conn, tag, DOVETAIL_REPLY_REFUSED,
			   "There is no such shard");
		return 0;
	}
	/* what is of a shard has the user "", for whom only those may speak
	   who may for all */
	cu = conn_user_get(conn, change.user);
	if (cu == NULL || cu->refused) {
		conn_reply(conn, tag, DOVETAIL_REPLY_REFUSED,
			   "Not allowed to speak for this user");
		return 0;
	}

	waiter = i_new(struct dovetail_queue_waiter, 1);
	waiter->conn = conn;
	waiter->user = cu->user;
	waiter->user->waiters++;
	waiter->tag = tag;
	waiter->level = level;
	waiter->frame_size = sizeof(*waiter) + size;
	waiter->sweep = change_is_of_mailboxes(&change);
	conn->waiting_bytes += waiter->frame_size;
	DLLIST_PREPEND_FULL(&conn->waiters, waiter, conn_prev, conn_next);

	conn_queue_change(conn, of_shard ? change.u.shard.shard :
			  cu->user->shard, waiter, &change, r->pos, size);
	conn_user_put(conn, cu);
	return 0;
}

/* ---- questions ---- */

static int conn_handle_position_get(struct dovetail_queue_conn *conn,
				    struct dovetail_wire_reader *r)
{
	struct dovetail_log_pos pos;
	guid_128_t guid, id;
	const char *user;
	uint64_t tag;
	uint32_t index_id;
	buffer_t *buf;
	size_t offset;

	tag = dovetail_wire_get_num(r);
	user = dovetail_wire_get_str(r, pool_datastack_create());
	dovetail_wire_get_guid(r, guid);
	index_id = dovetail_wire_get_num32(r);
	if (!dovetail_wire_reader_done(r))
		return -1;
	dovetail_queue_positions_id(user, guid, id);
	if (!dovetail_queue_positions_get(conn->queue->positions, id,
					  index_id, &pos))
		i_zero(&pos);
	offset = conn_frame(&buf, DOVETAIL_FRAME_POSITION);
	dovetail_wire_put_num(buf, tag);
	dovetail_wire_put_num(buf, pos.file_seq);
	dovetail_wire_put_num(buf, pos.file_offset);
	conn_send(conn, buf, offset);
	return 0;
}

const char *dovetail_queue_unreachable(struct dovetail_queue *queue,
				       enum dovetail_ack_level level)
{
	const char *reason = NULL;
	unsigned int i;

	if (queue->peers_count == 0)
		return NULL;
	/* the user is not named: every shard has to work */
	for (i = 0; i < queue->logs_count && reason == NULL; i++) {
		struct dovetail_queue_log *log = &queue->logs[i];

		reason = dovetail_queue_log_unavailable(log);
		if (reason == NULL && log->state != DOVETAIL_QUEUE_LOG_READY)
			reason = "Redis is not available";
		if (reason == NULL && log->error != NULL)
			reason = log->error;
	}
	if (reason == NULL && level >= DOVETAIL_ACK_APPLIED &&
	    !dovetail_queue_acks_alive(queue))
		reason = "No replica has reported lately";
	return reason;
}

static int conn_handle_check(struct dovetail_queue_conn *conn,
			     struct dovetail_wire_reader *r)
{
	const char *reason;
	uint64_t tag;
	uint8_t level;

	tag = dovetail_wire_get_num(r);
	level = dovetail_wire_get_u8(r);
	if (!dovetail_wire_reader_done(r))
		return -1;
	reason = dovetail_queue_unreachable(conn->queue, level);
	conn_reply(conn, tag, reason == NULL ? DOVETAIL_REPLY_OK :
		   DOVETAIL_REPLY_UNAVAILABLE, reason == NULL ? "" : reason);
	return 0;
}

static int conn_handle_status_get(struct dovetail_queue_conn *conn,
				  struct dovetail_wire_reader *r)
{
	buffer_t *buf;
	size_t offset;
	uint64_t tag;

	tag = dovetail_wire_get_num(r);
	if (!dovetail_wire_reader_done(r))
		return -1;
	offset = conn_frame(&buf, DOVETAIL_FRAME_STATUS);
	dovetail_wire_put_num(buf, tag);
	dovetail_queue_status(conn->queue, buf);
	conn_send(conn, buf, offset);
	return 0;
}

static int conn_handle_job(struct dovetail_queue_conn *conn,
			   struct dovetail_wire_reader *r)
{
	struct dovetail_job job;
	uint64_t tag;

	tag = dovetail_wire_get_num(r);
	if (!dovetail_job_get(r, pool_datastack_create(), &job))
		return -1;
	dovetail_queue_job_start(conn->queue, conn, conn->trusted, tag, &job);
	return 0;
}

/* ---- workers ---- */

static int conn_handle_report(struct dovetail_queue_conn *conn,
			      struct dovetail_wire_reader *r)
{
	uint64_t rows, fields, i, j;
	const char **row;
	pool_t pool;

	rows = dovetail_wire_get_num(r);
	if (r->failed || rows > REPORT_ROWS_MAX)
		return -1;
	if (conn->report_pool == NULL) {
		conn->report_pool =
			pool_alloconly_create("dovetail report", 4096);
	}
	pool = conn->report_pool;
	p_clear(pool);
	conn->report_msecs = dovetail_monotonic_msecs();
	p_array_init(&conn->report, pool, rows);
	for (i = 0; i < rows && !r->failed; i++) {
		fields = dovetail_wire_get_num(r);
		if (fields > REPORT_FIELDS_MAX)
			return -1;
		row = p_new(pool, const char *, fields * 2 + 1);
		for (j = 0; j < fields * 2; j++) {
			row[j] = p_strndup(pool, dovetail_wire_get_str(r,
				pool_datastack_create()), REPORT_STR_MAX_LEN);
		}
		if (!r->failed) {
			const char *const *const_row = row;

			array_push_back(&conn->report, &const_row);
		}
	}
	return dovetail_wire_reader_done(r) ? 0 : -1;
}

static int conn_handle_troubles(struct dovetail_queue_conn *conn,
				struct dovetail_wire_reader *r)
{
	pool_unref(&conn->troubles_pool);
	conn->troubles_pool = pool_alloconly_create("dovetail troubles", 1024);
	conn->troubles_msecs = dovetail_monotonic_msecs();
	if (!dovetail_health_troubles_get(r, conn->troubles_pool,
					  &conn->troubles,
					  &conn->troubles_more))
		return -1;
	if (array_count(&conn->troubles) == 0)
		pool_unref(&conn->troubles_pool);
	return 0;
}

static int conn_handle_swept(struct dovetail_queue_conn *conn,
			     struct dovetail_wire_reader *r)
{
	struct dovetail_queue_user *user;
	const char *name;
	unsigned int i;
	bool ok;

	if (get_user(r, &name) < 0)
		return -1;
	ok = dovetail_wire_get_u8(r) != 0;
	if (!dovetail_wire_reader_done(r))
		return -1;
	for (i = 0; i < array_count(&conn->work); i++) {
		user = array_idx_elem(&conn->work, i);
		if (strcmp(user->name, name) == 0) {
			array_delete(&conn->work, i, 1);
			dovetail_queue_user_swept(user, ok);
			break;
		}
	}
	return 0;
}

struct dovetail_queue_conn *
dovetail_queue_conns_find_worker(struct dovetail_queue *queue,
				 unsigned int shard)
{
	struct dovetail_queue_conn *conn;

	/* the newest first: an old process may be about to end */
	for (conn = queue->workers; conn != NULL; conn = conn->worker_next) {
		if (!conn->failed && shard % conn->slots == conn->slot)
			return conn;
	}
	return NULL;
}

struct dovetail_queue_conn *
dovetail_queue_conns_worker(struct dovetail_queue *queue, unsigned int shard)
{
	struct dovetail_queue_conn *conn =
		dovetail_queue_conns_find_worker(queue, shard);

	return conn != NULL && array_count(&conn->work) < CONN_WORK_MAX ?
		conn : NULL;
}

unsigned int
dovetail_queue_conn_get_slot(const struct dovetail_queue_conn *conn)
{
	return conn->slot;
}

void dovetail_queue_conn_work(struct dovetail_queue_conn *conn,
			      struct dovetail_queue_user *user)
{
	array_push_back(&conn->work, &user);
	T_BEGIN {
		buffer_t *buf;
		size_t offset = conn_frame(&buf, DOVETAIL_FRAME_WORK);

		dovetail_wire_put_str(buf, user->name);
		conn_send(conn, buf, offset);
	} T_END;
}

void dovetail_queue_conns_reports(struct dovetail_queue *queue,
				  void (*callback)(const char *const *fields,
						   uint64_t age_msecs,
						   void *context),
				  void *context)
{
	struct dovetail_queue_conn *conn;
	const char *const *const *rowp;
	uint64_t now = dovetail_monotonic_msecs();

	for (conn = queue->workers; conn != NULL; conn = conn->worker_next) {
		if (conn->report_pool == NULL)
			continue;
		array_foreach(&conn->report, rowp)
			callback(*rowp, now - conn->report_msecs, context);
	}
}

void dovetail_queue_conns_troubles(struct dovetail_queue *queue,
				   ARRAY_TYPE(dovetail_health_trouble_of) *dest,
				   uint64_t *more)
{
	struct dovetail_queue_conn *conn;
	const struct dovetail_health_trouble_of *trouble;
	struct dovetail_health_trouble_of *copy;
	uint64_t now = dovetail_monotonic_msecs();

	for (conn = queue->workers; conn != NULL; conn = conn->worker_next) {
		if (conn->troubles_pool == NULL)
			continue;
		*more += conn->troubles_more;
		array_foreach(&conn->troubles, trouble) {
			copy = array_append_space(dest);
			*copy = *trouble;
			copy->msecs += now - conn->troubles_msecs;
		}
	}
}

/* ---- in ---- */

static int conn_handle_hello(struct dovetail_queue_conn *conn,
			     struct dovetail_wire_reader *r)
{
	uint64_t version, pid, slot = 0, slots = 1;
	buffer_t *buf;
	size_t offset;
	uint8_t kind;

	version = dovetail_wire_get_num(r);
	pid = dovetail_wire_get_num(r);
	kind = dovetail_wire_get_u8(r);
	if (kind == DOVETAIL_CLIENT_WORKER) {
		slot = dovetail_wire_get_num(r);
		slots = dovetail_wire_get_num(r);
	}
	if (version != DOVETAIL_FRAME_VERSION) {
		e_error(conn->event, "Client speaks version %"PRIu64" of the "
			"protocol, we speak %u (are all processes of the same "
			"installation?)", version, DOVETAIL_FRAME_VERSION);
		return -1;
	}
	if (!dovetail_wire_reader_done(r) || slots == 0 || slot >= slots ||
	    slots > UINT_MAX || kind > DOVETAIL_CLIENT_ADMIN)
		return -1;
	if (kind == DOVETAIL_CLIENT_WORKER && !conn->trusted) {
		e_error(conn->event, "uid %s may not be a replay worker",
			dec2str(conn->uid));
		return -1;
	}
	conn->hello = TRUE;
	conn->pid = pid;
	conn->kind = kind;
	conn->slot = slot;
	conn->slots = slots;
	if (kind == DOVETAIL_CLIENT_WORKER) {
		DLLIST_PREPEND_FULL(&conn->queue->workers, conn,
				    worker_prev, worker_next);
	}
	event_add_int(conn->event, "client_pid", pid);

	offset = conn_frame(&buf, DOVETAIL_FRAME_WELCOME);
	dovetail_wire_put_num(buf, DOVETAIL_FRAME_VERSION);
	dovetail_wire_put_str(buf, conn->queue->set.node);
	conn_send(conn, buf, offset);
	return 0;
}

static int
conn_handle_frame(struct dovetail_queue_conn *conn,
		  enum dovetail_frame_type type, const void *data, size_t size)
{
	struct dovetail_wire_reader r;
	bool worker = conn->kind == DOVETAIL_CLIENT_WORKER;

	dovetail_wire_reader_init(&r, data, size);
	if (!conn->hello) {
		return type != DOVETAIL_FRAME_HELLO ? -1 :
			conn_handle_hello(conn, &r);
	}
	switch (type) {
	case DOVETAIL_FRAME_CHANGE:
		return conn_handle_change(conn, &r);
	case DOVETAIL_FRAME_MARK:
		return conn_handle_mark(conn, &r);
	case DOVETAIL_FRAME_CLEAN:
		return conn_handle_clean(conn, &r);
	case DOVETAIL_FRAME_SWEEP:
		return conn_handle_sweep(conn, &r);
	case DOVETAIL_FRAME_POSITION_GET:
		return conn_handle_position_get(conn, &r);
	case DOVETAIL_FRAME_CHECK:
		return conn_handle_check(conn, &r);
	case DOVETAIL_FRAME_STATUS_GET:
		return conn_handle_status_get(conn, &r);
	case DOVETAIL_FRAME_REPORT:
		return worker ? conn_handle_report(conn, &r) : -1;
	case DOVETAIL_FRAME_TROUBLES:
		return worker ? conn_handle_troubles(conn, &r) : -1;
	case DOVETAIL_FRAME_SWEPT:
		return worker ? conn_handle_swept(conn, &r) : -1;
	case DOVETAIL_FRAME_JOB:
		return conn->kind == DOVETAIL_CLIENT_ADMIN ?
			conn_handle_job(conn, &r) : -1;
	case DOVETAIL_FRAME_JOB_RESULT:
	case DOVETAIL_FRAME_JOB_PROGRESS:
	case DOVETAIL_FRAME_JOB_DONE:
		return worker ? dovetail_queue_job_answer(conn->queue, conn,
							  type, &r) : -1;
	default:
		return -1;
	}
}

/* Work on the whole frames at the start of data. used_r: their size.
   Returns 0, or -1 to disconnect. */
static int
conn_handle_frames(struct dovetail_queue_conn *conn, const unsigned char *data,
		   size_t size, size_t *used_r)
{
	enum dovetail_frame_type type;
	const unsigned char *payload;
	size_t payload_size, frame_size;
	const char *error;
	int ret;

	*used_r = 0;
	while (*used_r < size) {
		if (conn_must_wait(conn)) {
			conn_halt(conn);
			return 0;
		}
		ret = dovetail_frame_parse(data + *used_r, size - *used_r,
					   &type, &payload, &payload_size,
					   &frame_size, &error);
		if (ret == 0)
			return 0;
		if (ret < 0) {
			e_error(conn->event, "Client sent rubbish: %s", error);
			return -1;
		}
		T_BEGIN {
			ret = conn_handle_frame(conn, type, payload,
						payload_size);
		} T_END;
		if (ret < 0) {
			e_error(conn->event, "Client sent a frame of type %u "
				"that makes no sense: Disconnecting", type);
			return -1;
		}
		*used_r += frame_size;
	}
	return 0;
}

static int conn_handle_input(struct dovetail_queue_conn *conn)
{
	size_t used;
	int ret;

	if (conn->input == NULL)
		return 0;
	ret = conn_handle_frames(conn, conn->input->data, conn->input->used,
				 &used);
	conn_input_delete(conn, used);
	return ret;
}

/* Returns 0, or -1 to disconnect. */
static int conn_read(struct dovetail_queue_conn *conn)
{
	static unsigned char data[CONN_READ_SIZE];
	size_t used;
	ssize_t ret;

	/* what is left from the time when it was halted */
	if (conn_handle_input(conn) < 0)
		return -1;
	if (conn->halted)
		return 0;

	ret = read(conn->fd, data, sizeof(data));
	if (ret < 0) {
		if (errno == EAGAIN || errno == EINTR)
			return 0;
		if (errno != ECONNRESET && errno != EPIPE)
			e_error(conn->event, "read(client) failed: %m");
		return -1;
	}
	if (ret == 0)
		return -1;

	if (conn->input != NULL) {
		conn_input_set(conn, data, ret);
		if (conn_handle_input(conn) < 0)
			return -1;
	} else {
		/* mostly whole frames: no copy of them */
		if (conn_handle_frames(conn, data, ret, &used) < 0)
			return -1;
		conn_input_set(conn, data + used, ret - used);
	}
	if (conn_input_must_wait(conn))
		conn_halt(conn);
	return 0;
}

static void conn_destroy(struct dovetail_queue_conn *conn)
{
	struct dovetail_queue *queue = conn->queue;
	struct dovetail_queue_waiter *waiter;
	struct dovetail_queue_user *user;
	struct dovetail_queue_conn *const *connp;

	while ((waiter = conn->waiters) != NULL) {
		DLLIST_REMOVE_FULL(&conn->waiters, waiter,
				   conn_prev, conn_next);
		waiter->conn = NULL;
	}
	array_foreach_elem(&conn->work, user)
		dovetail_queue_user_swept(user, FALSE);
	while (conn->users != NULL)
		conn_user_free(conn, conn->users);
	dovetail_queue_jobs_conn_closed(queue, conn);
	array_free(&conn->work);
	pool_unref(&conn->report_pool);
	pool_unref(&conn->troubles_pool);

	if (conn->flushing) {
		array_foreach(&queue->flush, connp) {
			if (*connp == conn) {
				array_delete(&queue->flush, array_foreach_idx(
					&queue->flush, connp), 1);
				break;
			}
		}
	}
	if (conn->halted)
		queue->halted_count--;
	if (queue->input_first == conn)
		queue->input_first = NULL;
	if (conn->input != NULL)
		conn_input_delete(conn, conn->input->used);
	DLLIST_REMOVE(&queue->conns, conn);
	if (conn->hello && conn->kind == DOVETAIL_CLIENT_WORKER) {
		DLLIST_REMOVE_FULL(&queue->workers, conn,
				   worker_prev, worker_next);
	}
	io_remove(&conn->io);
	o_stream_destroy(&conn->output);
	if (close(conn->fd) < 0)
		e_error(conn->event, "close(client) failed: %m");
	event_unref(&conn->event);
	i_free(conn);
	queue->resume = TRUE;
	master_service_client_connection_destroyed(master_service);
}

static void conn_input(struct dovetail_queue_conn *conn)
{
	struct dovetail_queue *queue = conn->queue;
	unsigned int i;
	int ret;

	ret = conn_read(conn);
	/* all that came in one read travels together */
	for (i = 0; queue->kick != 0; i++) {
		if ((queue->kick & (1ULL << i)) != 0) {
			queue->kick &= ~(1ULL << i);
			dovetail_queue_log_kick(&queue->logs[i]);
		}
	}
	if (ret < 0)
		conn_destroy(conn);
	dovetail_queue_conns_flush(queue);
}

static int conn_output(struct dovetail_queue_conn *conn)
{
	int ret;

	ret = o_stream_flush(conn->output);
	if (ret < 0) {
		/* reading would not tell, if the client is halted */
		conn_destroy(conn);
		return 1;
	}
	if (ret > 0)
		dovetail_queue_jobs_flow(conn->queue, conn, 0);
	if (ret > 0 && conn->halted) {
		conn->queue->resume = TRUE;
		conns_resume(conn->queue);
	}
	return ret;
}

void dovetail_queue_conns_tick(struct dovetail_queue *queue)
{
	struct dovetail_queue_conn *conn = queue->input_first;

	if (conn == NULL || conn->halted ||
	    dovetail_monotonic_secs() - queue->input_first_since <
	    CONN_INPUT_FIRST_SECS)
		return;
	e_error(conn->event, "Client does not send the rest of what it began, "
		"and others wait for that: Disconnecting");
	conn_destroy(conn);
}

void dovetail_queue_conns_flush(struct dovetail_queue *queue)
{
	struct dovetail_queue_conn *conn;
	unsigned int i;
	size_t size;
	int ret;

	dovetail_queue_users_work(queue);
	while ((i = array_count(&queue->flush)) > 0) {
		conn = array_idx_elem(&queue->flush, i - 1);
		array_delete(&queue->flush, i - 1, 1);
		conn->flushing = FALSE;
		o_stream_uncork(conn->output);
		ret = o_stream_flush(conn->output);
		size = o_stream_get_buffer_used_size(conn->output);
		if (ret < 0 || size >= CONN_OUTPUT_MAX_BYTES) {
			conn->failed = TRUE;
			conn_destroy(conn);
		} else {
			dovetail_queue_jobs_flow(queue, conn, size);
		}
	}
	if (queue->resume)
		conns_resume(queue);
}

/* ---- begin and end ---- */

void dovetail_queue_conn_create(struct dovetail_queue *queue, int fd,
				uid_t trusted_uid)
{
	struct dovetail_queue_conn *conn;
	struct net_unix_cred cred;

	net_set_nonblock(fd, TRUE);
	conn = i_new(struct dovetail_queue_conn, 1);
	conn->queue = queue;
	conn->fd = fd;
	conn->uid = (uid_t)-1;
	if (net_getunixcred(fd, &cred) == 0) {
		conn->uid = cred.uid;
		conn->trusted = cred.uid == 0 || cred.uid == queue->uid ||
			cred.uid == trusted_uid;
	}
	conn->event = event_create(queue->event);
	event_add_int(conn->event, "client_uid", conn->uid);
	if (queue->started)
		conn->io = io_add(fd, IO_READ, conn_input, conn);
	conn->output = o_stream_create_fd(fd, CONN_OUTPUT_MAX_BYTES * 2);
	o_stream_set_no_error_handling(conn->output, TRUE);
	o_stream_set_flush_callback(conn->output, conn_output, conn);
	i_array_init(&conn->work, CONN_WORK_MAX);
	DLLIST_PREPEND(&queue->conns, conn);
}

void dovetail_queue_conns_start(struct dovetail_queue *queue)
{
	struct dovetail_queue_conn *conn;

	for (conn = queue->conns; conn != NULL; conn = conn->next)
		conn->io = io_add(conn->fd, IO_READ, conn_input, conn);
}

void dovetail_queue_conns_deinit(struct dovetail_queue *queue)
{
	struct dovetail_queue_conn *conn;

	/* answers that the end of the logs gave */
	if (array_is_created(&queue->flush))
		dovetail_queue_conns_flush(queue);
	while ((conn = queue->conns) != NULL)
		conn_destroy(conn);
}
