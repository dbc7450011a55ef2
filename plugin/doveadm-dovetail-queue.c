/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* The connection to dovetail-queue, as an administrator's. */

#include "lib.h"
#include "buffer.h"
#include "eacces-error.h"
#include "ioloop.h"
#include "istream.h"
#include "net.h"
#include "write-full.h"
#include "doveadm.h"
#include "dovetail-frame.h"
#include "doveadm-dovetail.h"

#include <unistd.h>

#define QUEUE_CONNECT_RETRY_MSECS 1000

static const char *service_name(const struct doveadm_queue *queue)
{
	return queue->service == NULL ? "dovetail-queue" : queue->service;
}

void doveadm_queue_fail(struct doveadm_queue *queue, int exit_code,
			const char *error)
{
	queue->error = p_strdup(queue->pool, error);
	queue->exit_code = exit_code;
	if (queue->ioloop != NULL)
		io_loop_stop(queue->ioloop);
}

void doveadm_queue_refused(struct doveadm_queue *queue,
			   struct dovetail_wire_reader *r)
{
	enum dovetail_reply reply;
	const char *text;

	(void)dovetail_wire_get_num(r); /* tag */
	reply = dovetail_wire_get_u8(r);
	text = dovetail_wire_get_str(r, pool_datastack_create());
	doveadm_queue_fail(queue, reply == DOVETAIL_REPLY_REFUSED ?
			   EX_NOPERM : EX_TEMPFAIL, t_strdup_printf(
		"the %s service refused: %s", service_name(queue), text));
}

void doveadm_queue_report(const struct doveadm_queue *queue)
{
	if (queue->error == NULL)
		return;
	i_error("%s: %s", queue->path, queue->error);
	doveadm_exit_code = queue->exit_code;
}

void doveadm_queue_timeout(struct doveadm_queue *queue)
{
	doveadm_queue_fail(queue, EX_TEMPFAIL, t_strdup_printf(
		"the %s service did not answer within %d s",
		service_name(queue), DOVEADM_QUEUE_TIMEOUT_MSECS / 1000));
}

static void
queue_welcome(struct doveadm_queue *queue, struct dovetail_wire_reader *r)
{
	uint64_t version = dovetail_wire_get_num(r);

	if (r->failed || version == 0) {
		doveadm_queue_fail(queue, EX_PROTOCOL,
				   t_strdup_printf("not a %s service",
						   service_name(queue)));
	} else if (version != DOVETAIL_FRAME_VERSION) {
		doveadm_queue_fail(queue, EX_PROTOCOL, t_strdup_printf(
			"the %s service speaks protocol version "
			"%"PRIu64", this doveadm version %d: restart Dovecot",
			service_name(queue), version, DOVETAIL_FRAME_VERSION));
	} else {
		queue->welcomed = TRUE;
	}
}

/* Returns FALSE when nothing more is to be read. */
static bool
queue_frame(struct doveadm_queue *queue, enum dovetail_frame_type type,
	    const unsigned char *payload, size_t size)
{
	struct dovetail_wire_reader r;

	dovetail_wire_reader_init(&r, payload, size);
	if (queue->welcomed)
		return queue->frame(type, &r, queue->context);
	if (type != DOVETAIL_FRAME_WELCOME) {
		doveadm_queue_fail(queue, EX_PROTOCOL,
				   t_strdup_printf("not a %s service",
						   service_name(queue)));
	} else {
		queue_welcome(queue, &r);
	}
	return queue->welcomed;
}

static void queue_input(struct doveadm_queue *queue)
{
	enum dovetail_frame_type type;
	const unsigned char *data, *payload;
	size_t size, payload_size, frame_size;
	const char *error;
	bool more = TRUE;
	int ret;

	if (i_stream_read(queue->input) == -1) {
		/* reset: it had not even read the question */
		doveadm_queue_fail(queue, EX_TEMPFAIL,
			queue->input->stream_errno != 0 &&
			queue->input->stream_errno != ECONNRESET ?
			t_strdup_printf("read() failed: %s",
				i_stream_get_error(queue->input)) :
			t_strdup_printf("the %s service hung up without an "
				"answer; its reason is in Dovecot's log",
				service_name(queue)));
		return;
	}
	while (more) {
		data = i_stream_get_data(queue->input, &size);
		ret = dovetail_frame_parse(data, size, &type, &payload,
					   &payload_size, &frame_size, &error);
		if (ret == 0)
			return;
		if (ret < 0) {
			doveadm_queue_fail(queue, EX_PROTOCOL, t_strdup_printf(
				"not a %s service: %s", service_name(queue),
				error));
			return;
		}
		T_BEGIN {
			more = queue_frame(queue, type, payload, payload_size);
		} T_END;
		i_stream_skip(queue->input, frame_size);
	}
	io_loop_stop(queue->ioloop);
}

static int
queue_send(struct doveadm_queue *queue, int fd, const buffer_t *question)
{
	buffer_t *buf = t_buffer_create(256);
	size_t offset;

	offset = dovetail_frame_begin(buf, DOVETAIL_FRAME_HELLO);
	dovetail_wire_put_num(buf, DOVETAIL_FRAME_VERSION);
	dovetail_wire_put_num(buf, getpid());
	dovetail_wire_put_u8(buf, DOVETAIL_CLIENT_ADMIN);
	dovetail_frame_end(buf, offset);
	buffer_append_buf(buf, question, 0, SIZE_MAX);

	/* Far less than what the socket of a new connection takes at once. If
	   the other side is gone already, reading tells. */
	if (write_full(fd, buf->data, buf->used) < 0 &&
	    errno != EPIPE && errno != ECONNRESET) {
		doveadm_queue_fail(queue, EX_TEMPFAIL,
				   t_strdup_printf("write() failed: %m"));
		return -1;
	}
	return 0;
}

/* Returns the connection's descriptor, or -1. */
static int queue_connect(struct doveadm_queue *queue)
{
	int fd;

	fd = net_connect_unix_with_retries(queue->path,
					   QUEUE_CONNECT_RETRY_MSECS);
	if (fd != -1) {
		net_set_nonblock(fd, TRUE);
		return fd;
	}
	if (errno == EACCES) {
		doveadm_queue_fail(queue, EX_NOPERM,
			eacces_error_get("net_connect_unix", queue->path));
	} else {
		doveadm_queue_fail(queue, EX_TEMPFAIL, t_strdup_printf(
			"the %s service is not reachable: "
			"connect() failed: %m (is Dovecot running, with "
			"service %s in its configuration?)",
			service_name(queue), service_name(queue)));
	}
	return -1;
}

int doveadm_queue_open(struct doveadm_queue *queue, const buffer_t *question)
{
	int fd;

	if ((fd = queue_connect(queue)) == -1)
		return -1;
	if (queue_send(queue, fd, question) < 0) {
		i_close_fd(&fd);
		return -1;
	}
	queue->ioloop = io_loop_create();
	queue->input = i_stream_create_fd_autoclose(&fd,
		DOVETAIL_FRAME_HEADER_SIZE + DOVETAIL_FRAME_MAX_SIZE);
	queue->io = io_add_istream(queue->input, queue_input, queue);
	return 0;
}

void doveadm_queue_run(struct doveadm_queue *queue)
{
	io_loop_run(queue->ioloop);
}

void doveadm_queue_close(struct doveadm_queue *queue)
{
	io_remove(&queue->io);
	i_stream_destroy(&queue->input);
	io_loop_destroy(&queue->ioloop);
}
