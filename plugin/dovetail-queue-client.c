/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "array.h"
#include "buffer.h"
#include "hash.h"
#include "llist.h"
#include "net.h"
#include "str.h"
#include "dovetail-frame.h"
#include "dovetail-queue-client.h"

#include <poll.h>
#include <unistd.h>

struct queue_answer {
	enum dovetail_frame_type type;
	const unsigned char *data;
	size_t size;
};

/* Somebody waits for an answer with this tag: either a batch, or one call that
   wants the answer itself. */
struct queue_waiter {
	struct dovetail_queue_batch *batch;
	void (*answered)(const struct queue_answer *answer, void *context);
	void *context;
};

struct dovetail_queue_client {
	struct dovetail_queue_client *prev, *next;
	int refcount;

	char *path;
	struct event *event;

	int fd;
	/* The queue checks who we are when we connect: a process that changes
	   its user has to connect again. */
	uid_t uid;
	buffer_t *in, *out;
	uint32_t last_tag;
	HASH_TABLE(void *, struct queue_waiter *) waiters;
	/* users with a MARK and no CLEAN on this connection */
	HASH_TABLE(char *, char *) marked;
	/* the MARKs that are not answered yet */
	struct dovetail_queue_batch marks;
	/* An answer did not come in time. Until the queue has caught up
	   nobody waits again, so a stuck service costs one timeout, not one
	   per command. */
	bool late;
	/* the last change did not get through, and the log says so */
	bool trouble;
};

static struct dovetail_queue_client *queue_clients = NULL;

static void
queue_batch_answered(struct dovetail_queue_batch *batch,
		     enum dovetail_reply reply, const char *error)
{
	i_assert(batch->outstanding > 0);
	batch->outstanding--;
	if (reply == DOVETAIL_REPLY_OK || batch->reply != DOVETAIL_REPLY_OK)
		return;
	batch->reply = reply;
	(void)i_snprintf(batch->error, sizeof(batch->error), "%s", error);
}

static void queue_client_disconnect(struct dovetail_queue_client *client,
				    const char *reason)
{
	struct hash_iterate_context *iter;
	struct queue_waiter *waiter;
	char *user, *value;
	void *key;

	if (client->fd == -1)
		return;
	net_disconnect(client->fd);
	client->fd = -1;
	client->late = FALSE;
	buffer_set_used_size(client->in, 0);
	buffer_set_used_size(client->out, 0);

	iter = hash_table_iterate_init(client->waiters);
	while (hash_table_iterate(iter, client->waiters, &key, &waiter)) {
		if (waiter->batch != NULL) {
			queue_batch_answered(waiter->batch,
				DOVETAIL_REPLY_UNAVAILABLE, reason);
		} else if (waiter->answered != NULL) {
			waiter->answered(NULL, waiter->context);
		}
		i_free(waiter);
	}
	hash_table_iterate_deinit(&iter);
	hash_table_clear(client->waiters, TRUE);

	iter = hash_table_iterate_init(client->marked);
	while (hash_table_iterate(iter, client->marked, &user, &value))
		i_free(user);
	hash_table_iterate_deinit(&iter);
	hash_table_clear(client->marked, TRUE);
}

static int queue_client_poll(struct dovetail_queue_client *client, bool out,
			     uint64_t deadline);
static int queue_client_input(struct dovetail_queue_client *client);

static int queue_client_connect(struct dovetail_queue_client *client,
				const char **error_r)
{
	size_t offset;

	/* Has the queue caught up meanwhile? Once the next frame is sent,
	   there is always something it has not answered. */
	if (client->late && queue_client_poll(client, FALSE, 0) > 0)
		(void)queue_client_input(client);
	if (client->fd != -1) {
		if (client->uid == geteuid())
			return 0;
		queue_client_disconnect(client, "Process changed its user");
	}
	client->fd = net_connect_unix(client->path);
	if (client->fd == -1) {
		*error_r = t_strdup_printf(
			"connect(%s) failed: %m%s", client->path,
			errno == EACCES ? " (the mode and user of service "
			"dovetail-queue's unix_listener must let mail "
			"processes connect)" :
			errno == ENOENT || errno == ECONNREFUSED ?
			" (is service dovetail-queue configured?)" : "");
		return -1;
	}
	client->uid = geteuid();

	offset = dovetail_frame_begin(client->out, DOVETAIL_FRAME_HELLO);
	dovetail_wire_put_num(client->out, DOVETAIL_FRAME_VERSION);
	dovetail_wire_put_num(client->out, getpid());
	dovetail_wire_put_u8(client->out, DOVETAIL_CLIENT_MAIL);
	dovetail_frame_end(client->out, offset);
	return 0;
}

struct dovetail_queue_client *
dovetail_queue_client_get(const char *path, struct event *event_parent)
{
	struct dovetail_queue_client *client;

	for (client = queue_clients; client != NULL; client = client->next) {
		if (strcmp(client->path, path) == 0) {
			client->refcount++;
			return client;
		}
	}
	client = i_new(struct dovetail_queue_client, 1);
	client->refcount = 1;
	client->path = i_strdup(path);
	client->fd = -1;
	client->event = event_create(event_parent);
	event_set_append_log_prefix(client->event, "dovetail: ");
	client->in = buffer_create_dynamic(default_pool, 256);
	client->out = buffer_create_dynamic(default_pool, 8192);
	hash_table_create_direct(&client->waiters, default_pool, 0);
	hash_table_create(&client->marked, default_pool, 0, str_hash, strcmp);
	DLLIST_PREPEND(&queue_clients, client);
	return client;
}

void dovetail_queue_client_unref(struct dovetail_queue_client **_client)
{
	struct dovetail_queue_client *client = *_client;

	*_client = NULL;
	if (--client->refcount > 0)
		return;
	DLLIST_REMOVE(&queue_clients, client);
	queue_client_disconnect(client, "Closing");
	hash_table_destroy(&client->waiters);
	hash_table_destroy(&client->marked);
	buffer_free(&client->in);
	buffer_free(&client->out);
	event_unref(&client->event);
	i_free(client->path);
	i_free(client);
}

/* ---- bytes ---- */

/* Returns 1: something can be read or written.  0: deadline passed. */
static int queue_client_poll(struct dovetail_queue_client *client, bool out,
			     uint64_t deadline)
{
	struct pollfd pfd = {
		.fd = client->fd,
		.events = POLLIN | (out ? POLLOUT : 0),
	};
	uint64_t now = dovetail_monotonic_usecs();
	int msecs, ret;

	/* rounded up: never a busy loop in the last millisecond */
	msecs = deadline <= now ? 0 : (int)((deadline - now + 999) / 1000);
	do {
		ret = poll(&pfd, 1, msecs);
	} while (ret < 0 && errno == EINTR && dovetail_monotonic_usecs() < deadline);
	return ret > 0 ? 1 : 0;
}

static void queue_client_input_frame(struct dovetail_queue_client *client,
				     const struct queue_answer *answer)
{
	struct dovetail_wire_reader r;
	struct queue_waiter *waiter;
	uint32_t tag;

	if (answer->type == DOVETAIL_FRAME_WELCOME)
		return;

	dovetail_wire_reader_init(&r, answer->data, answer->size);
	tag = dovetail_wire_get_num32(&r);
	waiter = r.failed ? NULL :
		hash_table_lookup(client->waiters, POINTER_CAST(tag));
	if (waiter == NULL)
		return;
	hash_table_remove(client->waiters, POINTER_CAST(tag));

	if (waiter->batch != NULL) {
		enum dovetail_reply reply = dovetail_wire_get_u8(&r);
		const char *text =
			dovetail_wire_get_str(&r, pool_datastack_create());

		queue_batch_answered(waiter->batch,
			answer->type != DOVETAIL_FRAME_REPLY || r.failed ?
			DOVETAIL_REPLY_UNAVAILABLE : reply, text);
	} else if (waiter->answered != NULL) {
		waiter->answered(answer, waiter->context);
	}
	i_free(waiter);
}

/* However the queue hung up, with something unread or without: one text. */
static const char *
queue_client_io_error(struct dovetail_queue_client *client, const char *call)
{
	if (errno == EPIPE || errno == ECONNRESET)
		return "dovetail-queue closed the connection";
	return t_strdup_printf("%s(%s) failed: %m", call, client->path);
}

/* Read what is there and handle its frames. Returns 0, or -1 when the
   connection is gone. */
static int queue_client_input(struct dovetail_queue_client *client)
{
	struct queue_answer answer;
	const char *error;
	unsigned char *space;
	size_t used, frame_size, pos;
	ssize_t ret;
	int parsed;

	for (;;) {
		used = client->in->used;
		space = buffer_append_space_unsafe(client->in, 4096);
		ret = read(client->fd, space, 4096);
		buffer_set_used_size(client->in, used + (ret > 0 ? ret : 0));
		if (ret < 0 && (errno == EAGAIN || errno == EINTR))
			break;
		if (ret <= 0) {
			queue_client_disconnect(client, ret == 0 ?
				"dovetail-queue closed the connection" :
				queue_client_io_error(client, "read"));
			return -1;
		}
		if (ret < 4096)
			break;
	}

	pos = 0;
	while ((parsed = dovetail_frame_parse(
			CONST_PTR_OFFSET(client->in->data, pos),
			client->in->used - pos, &answer.type, &answer.data,
			&answer.size, &frame_size, &error)) > 0) {
		T_BEGIN {
			queue_client_input_frame(client, &answer);
		} T_END;
		pos += frame_size;
	}
	if (parsed < 0) {
		queue_client_disconnect(client, t_strdup_printf(
			"dovetail-queue sent rubbish: %s", error));
		return -1;
	}
	buffer_delete(client->in, 0, pos);
	if (hash_table_count(client->waiters) == 0)
		client->late = FALSE;
	return 0;
}

/* Write what waits in out. Returns 1: all written.  0: deadline passed.
   -1: the connection is gone. */
static int queue_client_output(struct dovetail_queue_client *client,
			       uint64_t deadline, const char **error_r)
{
	ssize_t ret;
	size_t pos = 0;
	int result = 1;

	while (pos < client->out->used) {
		ret = write(client->fd, CONST_PTR_OFFSET(client->out->data, pos),
			    client->out->used - pos);
		if (ret > 0) {
			pos += ret;
			continue;
		}
		if (ret < 0 && errno != EAGAIN && errno != EINTR) {
			*error_r = queue_client_io_error(client, "write");
			queue_client_disconnect(client, *error_r);
			return -1;
		}
		if (queue_client_poll(client, TRUE, deadline) == 0) {
			result = 0;
			break;
		}
		/* The queue may be waiting for us to read. */
		if (queue_client_input(client) < 0) {
			*error_r = "dovetail-queue closed the connection";
			return -1;
		}
	}
	buffer_delete(client->out, 0, pos);
	return result;
}

/* Run until *done, the deadline, or the connection's end. */
static void queue_client_run(struct dovetail_queue_client *client,
			     const bool *done, uint64_t deadline)
{
	while (!*done && client->fd != -1) {
		if (queue_client_poll(client, FALSE, deadline) == 0)
			break;
		if (queue_client_input(client) < 0)
			break;
	}
}

static struct queue_waiter *
queue_client_add_waiter(struct dovetail_queue_client *client, uint32_t *tag_r)
{
	struct queue_waiter *waiter = i_new(struct queue_waiter, 1);

	/* 0 cannot be a key of a direct hash table */
	if (++client->last_tag == 0)
		client->last_tag++;
	*tag_r = client->last_tag;
	hash_table_insert(client->waiters, POINTER_CAST(*tag_r), waiter);
	return waiter;
}

/* ---- frames ---- */

static void queue_client_send_user(struct dovetail_queue_client *client,
				   enum dovetail_frame_type type,
				   const char *user)
{
	const char *error;
	size_t offset = dovetail_frame_begin(client->out, type);

	dovetail_wire_put_str(client->out, user);
	dovetail_frame_end(client->out, offset);
	/* what does not fit now goes out with the next frame */
	(void)queue_client_output(client, 0, &error);
}

void dovetail_queue_client_mark(struct dovetail_queue_client *client,
				const char *user)
{
	struct queue_waiter *waiter;
	const char *error;
	uint32_t tag;
	size_t offset;
	char *key;

	if (queue_client_connect(client, &error) < 0) {
		/* the commit that follows will say so */
		return;
	}
	if (hash_table_lookup(client->marked, user) != NULL)
		return;
	key = i_strdup(user);
	hash_table_insert(client->marked, key, key);

	waiter = queue_client_add_waiter(client, &tag);
	waiter->batch = &client->marks;
	client->marks.outstanding++;
	offset = dovetail_frame_begin(client->out, DOVETAIL_FRAME_MARK);
	dovetail_wire_put_str(client->out, user);
	dovetail_wire_put_num(client->out, tag);
	dovetail_frame_end(client->out, offset);
	/* what does not fit now goes out with the next frame */
	(void)queue_client_output(client, 0, &error);
}

void dovetail_queue_client_mark_wait(struct dovetail_queue_client *client,
				     const char *user, uint64_t deadline)
{
	const char *error;
	unsigned int tries;
	int ret;

	/* twice: the queue may have gone away since we used it last */
	for (tries = 0; tries < 2; tries++) {
		dovetail_queue_client_mark(client, user);
		ret = dovetail_queue_client_wait(client, &client->marks,
						 deadline, &error);
		dovetail_queue_client_cancel(client, &client->marks);
		i_zero(&client->marks);
		if (client->fd != -1 || ret == 0)
			break;
	}
}

void dovetail_queue_client_clean(struct dovetail_queue_client *client,
				 const char *user)
{
	char *key, *value;

	if (client->fd == -1 ||
	    !hash_table_lookup_full(client->marked, user, &key, &value))
		return;
	hash_table_remove(client->marked, user);
	i_free(key);
	queue_client_send_user(client, DOVETAIL_FRAME_CLEAN, user);
}

void dovetail_queue_client_sweep(struct dovetail_queue_client *client,
				 const char *user)
{
	const char *error;

	/* Not there: the caller has said so. A queue that starts sweeps whom
	   it had marked before. */
	if (queue_client_connect(client, &error) == 0)
		queue_client_send_user(client, DOVETAIL_FRAME_SWEEP, user);
}

void dovetail_queue_client_note(struct dovetail_queue_client *client,
				struct event *event, const char *error)
{
	if (error == NULL && client->trouble) {
		client->trouble = FALSE;
		e_info(event, "Changes are queued again");
	} else if (error != NULL && !client->trouble) {
		client->trouble = TRUE;
		e_warning(event, "Changes cannot be queued now and are "
			  "left to be read from the mailboxes later: %s", error);
	}
}

int dovetail_queue_client_send(struct dovetail_queue_client *client,
			       struct dovetail_queue_batch *batch,
			       unsigned int ack_level, const buffer_t *change,
			       uint64_t deadline, const char **error_r)
{
	struct queue_waiter *waiter;
	uint32_t tag;
	size_t offset;
	int ret;

	if (queue_client_connect(client, error_r) < 0)
		return -1;
	waiter = queue_client_add_waiter(client, &tag);
	waiter->batch = batch;
	batch->outstanding++;

	offset = dovetail_frame_begin(client->out, DOVETAIL_FRAME_CHANGE);
	dovetail_wire_put_num(client->out, tag);
	dovetail_wire_put_u8(client->out, ack_level);
	buffer_append_buf(client->out, change, 0, SIZE_MAX);
	dovetail_frame_end(client->out, offset);

	if (client->late)
		deadline = 0;
	ret = queue_client_output(client, deadline, error_r);
	if (ret == 0 && client->out->used > DOVETAIL_FRAME_MAX_SIZE) {
		/* The queue takes nothing. Do not collect here what the
		   mailbox has anyway. */
		*error_r = "dovetail-queue does not read its socket";
		queue_client_disconnect(client, *error_r);
		return -1;
	}
	return ret < 0 ? -1 : 0;
}

int dovetail_queue_client_wait(struct dovetail_queue_client *client,
			       struct dovetail_queue_batch *batch,
			       uint64_t deadline, const char **error_r)
{
	const char *error;

	if (client->late)
		deadline = 0;
	if (client->fd != -1 && client->out->used > 0)
		(void)queue_client_output(client, deadline, &error);
	while (batch->outstanding > 0 && client->fd != -1) {
		if (queue_client_poll(client, FALSE, deadline) == 0)
			break;
		if (queue_client_input(client) < 0)
			break;
	}
	if (batch->outstanding > 0) {
		if (deadline > 0)
			client->late = TRUE;
		return 0;
	}
	if (batch->reply == DOVETAIL_REPLY_OK)
		return 1;
	*error_r = t_strdup(batch->error);
	return -1;
}

void dovetail_queue_client_cancel(struct dovetail_queue_client *client,
				  struct dovetail_queue_batch *batch)
{
	struct hash_iterate_context *iter;
	struct queue_waiter *waiter;
	void *key;

	if (batch->outstanding == 0)
		return;
	iter = hash_table_iterate_init(client->waiters);
	while (hash_table_iterate(iter, client->waiters, &key, &waiter)) {
		if (waiter->batch == batch)
			waiter->batch = NULL;
	}
	hash_table_iterate_deinit(&iter);
	batch->outstanding = 0;
}

struct queue_question {
	bool done;
	enum dovetail_frame_type type;
	/* not of the data stack: it grows in frames of its own */
	buffer_t *answer;
};

static void
queue_question_answered(const struct queue_answer *answer, void *context)
{
	struct queue_question *question = context;

	question->done = TRUE;
	if (answer == NULL)
		return;
	question->type = answer->type;
	buffer_append(question->answer, answer->data, answer->size);
}

static int queue_client_wait_question(struct dovetail_queue_client *client,
				      struct queue_waiter *waiter,
				      uint64_t deadline,
				      enum dovetail_frame_type expect,
				      const char **error_r)
{
	struct queue_question *question = waiter->context;

	if (client->late)
		deadline = 0;
	if (queue_client_output(client, deadline, error_r) < 0)
		return -1;
	queue_client_run(client, &question->done, deadline);
	if (!question->done) {
		waiter->answered = NULL;
		if (deadline > 0)
			client->late = TRUE;
		*error_r = "dovetail-queue did not answer in time";
		return -1;
	}
	if (question->type != expect) {
		*error_r = "dovetail-queue closed the connection";
		return -1;
	}
	return 0;
}

/* Send the question that stands in client->out after offset and wait for its
   answer. Returns 0 and a reader (data stack) of what follows the tag, or -1. */
static int queue_client_ask(struct dovetail_queue_client *client,
			    struct queue_waiter *waiter, uint64_t deadline,
			    enum dovetail_frame_type expect,
			    struct dovetail_wire_reader *r,
			    const char **error_r)
{
	struct queue_question question;
	size_t size;
	int ret;

	i_zero(&question);
	question.answer = buffer_create_dynamic(default_pool, 256);
	waiter->answered = queue_question_answered;
	waiter->context = &question;
	ret = queue_client_wait_question(client, waiter, deadline, expect,
					 error_r);
	if (ret == 0) {
		size = question.answer->used;
		dovetail_wire_reader_init(r,
			p_memdup(pool_datastack_create(),
				 question.answer->data, size), size);
		(void)dovetail_wire_get_num32(r);
	}
	buffer_free(&question.answer);
	return ret;
}

int dovetail_queue_client_position(struct dovetail_queue_client *client,
				   const char *user,
				   const guid_128_t mailbox_guid,
				   uint32_t index_id, uint64_t deadline,
				   struct dovetail_log_pos *pos_r,
				   const char **error_r)
{
	struct dovetail_wire_reader r;
	struct queue_waiter *waiter;
	uint32_t tag;
	size_t offset;

	i_zero(pos_r);
	if (queue_client_connect(client, error_r) < 0)
		return -1;
	waiter = queue_client_add_waiter(client, &tag);
	offset = dovetail_frame_begin(client->out, DOVETAIL_FRAME_POSITION_GET);
	dovetail_wire_put_num(client->out, tag);
	dovetail_wire_put_str(client->out, user);
	dovetail_wire_put_guid(client->out, mailbox_guid);
	dovetail_wire_put_num(client->out, index_id);
	dovetail_frame_end(client->out, offset);
	if (queue_client_ask(client, waiter, deadline, DOVETAIL_FRAME_POSITION,
			     &r, error_r) < 0)
		return -1;

	pos_r->index_id = index_id;
	pos_r->file_seq = dovetail_wire_get_num32(&r);
	pos_r->file_offset = dovetail_wire_get_num32(&r);
	if (r.failed) {
		*error_r = "dovetail-queue sent rubbish";
		return -1;
	}
	return pos_r->file_seq == 0 ? 0 : 1;
}

int dovetail_queue_client_check(struct dovetail_queue_client *client,
				unsigned int ack_level, uint64_t deadline,
				const char **error_r)
{
	struct dovetail_wire_reader r;
	struct queue_waiter *waiter;
	enum dovetail_reply reply;
	uint32_t tag;
	size_t offset;

	if (queue_client_connect(client, error_r) < 0)
		return -1;
	waiter = queue_client_add_waiter(client, &tag);
	offset = dovetail_frame_begin(client->out, DOVETAIL_FRAME_CHECK);
	dovetail_wire_put_num(client->out, tag);
	dovetail_wire_put_u8(client->out, ack_level);
	dovetail_frame_end(client->out, offset);
	if (queue_client_ask(client, waiter, deadline, DOVETAIL_FRAME_REPLY,
			     &r, error_r) < 0)
		return -1;
	reply = dovetail_wire_get_u8(&r);
	*error_r = dovetail_wire_get_str(&r, pool_datastack_create());
	return reply == DOVETAIL_REPLY_OK ? 1 : 0;
}
