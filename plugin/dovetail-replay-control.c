/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* The connection to dovetail-queue on which it names users to sweep and jobs, and
   hears how this worker is doing. Changes and questions go over a connection of their own,
   as a mail process' do. */

#include "lib.h"
#include "array.h"
#include "buffer.h"
#include "ioloop.h"
#include "istream.h"
#include "net.h"
#include "ostream.h"
#include "dovetail-frame.h"
#include "dovetail-job.h"
#include "dovetail-replay.h"

#include <unistd.h>

#define CONTROL_RECONNECT_MSECS 500
/* Status is for people: not more often than this ... */
#define CONTROL_REPORT_MSECS 500
/* ... and, since old news is no news, not less often. */
#define CONTROL_REPORT_IDLE_MSECS 2000

static struct {
	int fd;
	struct io *io;
	struct istream *input;
	struct ostream *output;
	struct timeout *to_connect, *to_report, *to_work;
	/* nothing has changed since the last report */
	bool reported;
	/* users to sweep, in order */
	ARRAY(char *) work;
} control = { .fd = -1 };

static void control_connect(void *context);

void replay_control_send(const buffer_t *frames)
{
	if (control.output != NULL)
		o_stream_nsend(control.output, frames->data, frames->used);
}

static void control_disconnect(void)
{
	char *user;

	timeout_remove(&control.to_report);
	io_remove(&control.io);
	i_stream_destroy(&control.input);
	o_stream_destroy(&control.output);
	if (control.fd != -1)
		net_disconnect(control.fd);
	control.fd = -1;
	/* the queue gives them to somebody again */
	array_foreach_elem(&control.work, user)
		i_free(user);
	array_clear(&control.work);
	replay_jobs_deinit();
	if (control.to_connect == NULL) {
		control.to_connect = timeout_add_short(CONTROL_RECONNECT_MSECS,
						 control_connect, NULL);
	}
}

static void control_swept(const char *user, bool ok)
{
	buffer_t *buf = t_buffer_create(128);
	size_t offset = dovetail_frame_begin(buf, DOVETAIL_FRAME_SWEPT);

	dovetail_wire_put_str(buf, user);
	dovetail_wire_put_u8(buf, ok ? 1 : 0);
	dovetail_frame_end(buf, offset);
	replay_control_send(buf);
}

/* One user at a time, so that entries of the peers are applied in between. */
static void control_work(void *context ATTR_UNUSED)
{
	char *user;

	timeout_remove(&control.to_work);
	if (array_count(&control.work) == 0)
		return;
	user = array_idx_elem(&control.work, 0);
	array_pop_front(&control.work);
	T_BEGIN {
		bool ok = replay_sweep(user);

		control_swept(user, ok);
	} T_END;
	i_free(user);
	if (array_count(&control.work) > 0)
		control.to_work = timeout_add_short(0, control_work, NULL);
}

static void control_add_work(struct dovetail_wire_reader *r)
{
	char *user = i_strdup(dovetail_wire_get_str(r,
						    pool_datastack_create()));

	if (!dovetail_wire_reader_done(r)) {
		i_free(user);
		return;
	}
	array_push_back(&control.work, &user);
	if (control.to_work == NULL)
		control.to_work = timeout_add_short(0, control_work, NULL);
}

static void control_frame(enum dovetail_frame_type type,
			  const unsigned char *data, size_t size)
{
	struct dovetail_wire_reader r;
	struct dovetail_job job;
	uint64_t id;
	bool yes;

	dovetail_wire_reader_init(&r, data, size);
	switch (type) {
	case DOVETAIL_FRAME_WORK:
		control_add_work(&r);
		break;
	case DOVETAIL_FRAME_STATUS:
		replay_job_status(&r);
		break;
	case DOVETAIL_FRAME_JOB_START:
		id = dovetail_wire_get_num(&r);
		if (dovetail_job_get(&r, pool_datastack_create(), &job))
			replay_job_start(id, &job);
		break;
	case DOVETAIL_FRAME_JOB_END:
	case DOVETAIL_FRAME_JOB_PAUSE:
		id = dovetail_wire_get_num(&r);
		yes = dovetail_wire_get_u8(&r) != 0;
		if (!dovetail_wire_reader_done(&r))
			break;
		if (type == DOVETAIL_FRAME_JOB_END)
			replay_job_end(id, yes);
		else
			replay_job_pause(id, yes);
		break;
	default:
		break;
	}
}

static void control_input(void *context ATTR_UNUSED)
{
	const unsigned char *data, *payload;
	enum dovetail_frame_type type;
	size_t size, payload_size, frame_size;
	const char *error;
	ssize_t ret;
	int parsed;

	ret = i_stream_read(control.input);
	if (ret == -1) {
		control_disconnect();
		return;
	}
	for (;;) {
		data = i_stream_get_data(control.input, &size);
		parsed = dovetail_frame_parse(data, size, &type, &payload,
					      &payload_size, &frame_size,
					      &error);
		if (parsed <= 0)
			break;
		T_BEGIN {
			control_frame(type, payload, payload_size);
		} T_END;
		i_stream_skip(control.input, frame_size);
	}
	if (parsed < 0) {
		e_error(replay.event, "dovetail-queue sent rubbish: %s", error);
		control_disconnect();
	}
}

static void control_report(void *context ATTR_UNUSED)
{
	buffer_t *buf = buffer_create_dynamic(default_pool, 1024);
	buffer_t *rows = buffer_create_dynamic(default_pool, 1024);
	size_t offset = dovetail_frame_begin(buf, DOVETAIL_FRAME_REPORT);
	unsigned int count;

	timeout_remove(&control.to_report);
	count = replay_streams_report(rows);
	T_BEGIN {
		count += replay_round_report(rows);
	} T_END;
	dovetail_wire_put_num(buf, count);
	buffer_append_buf(buf, rows, 0, SIZE_MAX);
	dovetail_frame_end(buf, offset);
	replay_control_send(buf);
	buffer_free(&rows);

	buffer_set_used_size(buf, 0);
	offset = dovetail_frame_begin(buf, DOVETAIL_FRAME_TROUBLES);
	if (replay_troubles_put(buf)) {
		dovetail_frame_end(buf, offset);
		replay_control_send(buf);
	}
	buffer_free(&buf);
	control.reported = TRUE;
	control.to_report = timeout_add(CONTROL_REPORT_IDLE_MSECS,
					control_report, NULL);
}

void replay_control_changed(void)
{
	if (control.fd != -1 && control.reported) {
		control.reported = FALSE;
		timeout_remove(&control.to_report);
		control.to_report = timeout_add_short(CONTROL_REPORT_MSECS,
						control_report, NULL);
	}
}

static void control_connect(void *context ATTR_UNUSED)
{
	buffer_t *buf;
	size_t offset;

	timeout_remove(&control.to_connect);
	control.fd = net_connect_unix(replay.set.queue_socket);
	if (control.fd == -1) {
		e_error(replay.event, "connect(%s) failed: %m",
			replay.set.queue_socket);
		control.to_connect = timeout_add(CONTROL_RECONNECT_MSECS * 10,
						 control_connect, NULL);
		return;
	}
	control.input = i_stream_create_fd(control.fd,
					   DOVETAIL_FRAME_MAX_SIZE);
	control.output = o_stream_create_fd(control.fd, SIZE_MAX);
	o_stream_set_no_error_handling(control.output, TRUE);
	control.io = io_add(control.fd, IO_READ, control_input, NULL);

	buf = t_buffer_create(64);
	offset = dovetail_frame_begin(buf, DOVETAIL_FRAME_HELLO);
	dovetail_wire_put_num(buf, DOVETAIL_FRAME_VERSION);
	dovetail_wire_put_num(buf, getpid());
	dovetail_wire_put_u8(buf, DOVETAIL_CLIENT_WORKER);
	dovetail_wire_put_num(buf, replay.slot);
	dovetail_wire_put_num(buf, replay.slots);
	dovetail_frame_end(buf, offset);
	replay_control_send(buf);
	replay_troubles_connected();
	control_report(NULL);
}

void replay_control_init(void)
{
	i_array_init(&control.work, 8);
	control_connect(NULL);
}

void replay_control_deinit(void)
{
	control_disconnect();
	timeout_remove(&control.to_connect);
	timeout_remove(&control.to_work);
	array_free(&control.work);
}
