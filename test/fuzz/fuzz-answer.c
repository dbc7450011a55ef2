/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* dovetail-queue-client: what a mail process reads from the queue service.
   Input: pieces: u8 what the process does, then a block that the service has sent
   before it is waited for. The tags of its answers count from 1.
   Must hold: what we send is whole frames, HELLO first; a batch has no more
   answers than were asked for, and all of them when the connection has ended; each
   failure has a reason. */

#include "fuzz-common.h"
#include "net.h"
#include "dovetail-queue-client.h"

#include <unistd.h>

#define BATCHES 4

enum {
	DO_NOTHING,
	DO_MARK,
	DO_CLEAN,
	DO_SWEEP,
	DO_SEND,
	DO_WAIT,
	DO_CANCEL,
	DO_POSITION,
	DO_CHECK,
	/* the service ends */
	DO_END,
	DO_COUNT
};

static struct {
	/* the service's end; -1: not connected */
	int fd;
	/* what it got on this connection */
	buffer_t *in;
	bool greeted;
	/* from now on nobody listens */
	bool gone;
} service;

void fuzz_init(void)
{
	service.fd = -1;
	service.in = buffer_create_dynamic(default_pool, 4096);
}

/* in place of Dovecot's */
int net_connect_unix(const char *path ATTR_UNUSED)
{
	int fd[2];

	if (service.gone) {
		errno = ECONNREFUSED;
		return -1;
	}
	i_close_fd(&service.fd);
	fuzz_assert(socketpair(AF_UNIX, SOCK_STREAM, 0, fd) == 0);
	net_set_nonblock(fd[0], TRUE);
	net_set_nonblock(fd[1], TRUE);
	service.fd = fd[0];
	service.greeted = FALSE;
	buffer_set_used_size(service.in, 0);
	return fd[1];
}

/* What the process sent since the last time. */
static void service_read(void)
{
	const unsigned char *payload;
	enum dovetail_frame_type type;
	size_t payload_size, frame_size;
	const char *error;
	unsigned char *space;
	ssize_t ret;

	while (service.fd != -1) {
		size_t used = service.in->used;

		space = buffer_append_space_unsafe(service.in, 65536);
		ret = read(service.fd, space, 65536);
		buffer_set_used_size(service.in, used + I_MAX(ret, 0));
		if (ret <= 0)
			break;
	}
	while ((ret = dovetail_frame_parse(service.in->data, service.in->used,
					   &type, &payload, &payload_size,
					   &frame_size, &error)) > 0) {
		fuzz_assert((type == DOVETAIL_FRAME_HELLO) == !service.greeted);
		service.greeted = TRUE;
		buffer_delete(service.in, 0, frame_size);
	}
	fuzz_assert(ret == 0);
}

struct run {
	struct dovetail_queue_client *client;
	struct dovetail_queue_batch batches[BATCHES];
	unsigned int sent[BATCHES];
};

static void do_send(struct run *run, uint8_t arg)
{
	struct dovetail_queue_batch *batch = &run->batches[arg % BATCHES];
	unsigned int before = batch->outstanding;
	buffer_t *change = t_buffer_create(64);
	const char *error = NULL;

	buffer_append_zero(change, arg);
	if (dovetail_queue_client_send(run->client, batch, arg % 3, change, 0,
				       &error) < 0) {
		fuzz_assert(error != NULL);
		/* the connection is gone, with all that was asked */
		fuzz_assert(batch->outstanding == 0 || before == 0);
	} else
		fuzz_assert(batch->outstanding <= before + 1);
	run->sent[arg % BATCHES]++;
}

static void do_wait(struct run *run, uint8_t arg)
{
	struct dovetail_queue_batch *batch = &run->batches[arg % BATCHES];
	const char *error = NULL;
	int ret;

	ret = dovetail_queue_client_wait(run->client, batch, 0, &error);
	switch (ret) {
	case 1:
		fuzz_assert(batch->outstanding == 0 &&
			    batch->reply == DOVETAIL_REPLY_OK);
		break;
	case 0:
		fuzz_assert(batch->outstanding > 0);
		return;
	default:
		fuzz_assert(batch->outstanding == 0 && error != NULL &&
			    batch->reply != DOVETAIL_REPLY_OK);
	}
	i_zero(batch);
	run->sent[arg % BATCHES] = 0;
}

static void do_position(struct run *run)
{
	struct dovetail_log_pos pos;
	const char *error = NULL;
	guid_128_t guid;
	int ret;

	guid_128_empty(guid);
	ret = dovetail_queue_client_position(run->client, "user", guid, 7, 0,
					     &pos, &error);
	fuzz_assert(ret >= 0 || error != NULL);
	if (ret > 0)
		fuzz_assert(pos.index_id == 7 && pos.file_seq != 0);
}

static void do_something(struct run *run, uint8_t what, uint8_t arg)
{
	const char *user = arg % 2 == 0 ? "user" : "another@example.com";
	const char *error = NULL;
	struct dovetail_queue_batch *batch;
	int ret;

	switch (what % DO_COUNT) {
	case DO_MARK:
		dovetail_queue_client_mark(run->client, user);
		break;
	case DO_CLEAN:
		dovetail_queue_client_clean(run->client, user);
		break;
	case DO_SWEEP:
		dovetail_queue_client_sweep(run->client, user);
		break;
	case DO_SEND:
		do_send(run, arg);
		break;
	case DO_WAIT:
		do_wait(run, arg);
		break;
	case DO_CANCEL:
		batch = &run->batches[arg % BATCHES];
		dovetail_queue_client_cancel(run->client, batch);
		fuzz_assert(batch->outstanding == 0);
		i_zero(batch);
		run->sent[arg % BATCHES] = 0;
		break;
	case DO_POSITION:
		do_position(run);
		break;
	case DO_CHECK:
		ret = dovetail_queue_client_check(run->client, arg % 3, 0,
						  &error);
		fuzz_assert(ret == 1 || error != NULL);
		break;
	case DO_END:
		i_close_fd(&service.fd);
		service.gone = arg % 2 != 0;
		break;
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct fuzz_input in = { data, size };
	struct run run;
	const uint8_t *bytes;
	size_t bytes_size;
	unsigned int i;
	uint8_t what, arg;

	i_zero(&run);
	service.gone = FALSE;
	run.client = dovetail_queue_client_get("/queue", NULL);
	while (in.size > 0) T_BEGIN {
		what = fuzz_get_u8(&in);
		arg = fuzz_get_u8(&in);
		bytes = fuzz_get_block(&in, &bytes_size);
		if (service.fd != -1 && bytes_size > 0 &&
		    write(service.fd, bytes, bytes_size) < 0) {
			/* the process has hung up */
		}
		do_something(&run, what, arg);
		service_read();
		for (i = 0; i < BATCHES; i++) {
			fuzz_assert(run.batches[i].outstanding <= run.sent[i]);
			fuzz_assert(memchr(run.batches[i].error, '\0',
				sizeof(run.batches[i].error)) != NULL);
		}
	} T_END;
	for (i = 0; i < BATCHES; i++) {
		if (i % 2 == 0) {
			dovetail_queue_client_cancel(run.client,
						     &run.batches[i]);
		}
	}
	dovetail_queue_client_unref(&run.client);
	for (i = 0; i < BATCHES; i++)
		fuzz_assert(run.batches[i].outstanding == 0);
	i_close_fd(&service.fd);
	return 0;
}
