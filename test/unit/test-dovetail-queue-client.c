/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* What a mail process makes of the queue service's answers. The service is played
   by the test: its answers wait on the connection when it is made. */

#include "lib.h"
#include "buffer.h"
#include "net.h"
#include "str.h"
#include "test-common.h"
#include "dovetail-compat.h"
#include "dovetail-queue-client.h"

#include <unistd.h>

static int service_fd = -1;
static buffer_t *answers;

static void service_send(void)
{
	if (write(service_fd, answers->data, answers->used) !=
	    (ssize_t)answers->used)
		i_fatal("write() failed: %m");
	buffer_set_used_size(answers, 0);
}

/* in place of Dovecot's */
int net_connect_unix(const char *path ATTR_UNUSED)
{
	int fd[2];

	i_close_fd(&service_fd);
	if (socketpair(AF_UNIX, SOCK_STREAM, 0, fd) < 0)
		i_fatal("socketpair() failed: %m");
	net_set_nonblock(fd[1], TRUE);
	service_fd = fd[0];
	service_send();
	return fd[1];
}

static void answer_welcome(void)
{
	size_t offset;

	buffer_set_used_size(answers, 0);
	offset = dovetail_frame_begin(answers, DOVETAIL_FRAME_WELCOME);
	dovetail_wire_put_num(answers, DOVETAIL_FRAME_VERSION);
	dovetail_wire_put_str(answers, "a");
	dovetail_frame_end(answers, offset);
}

static void answer_reply(uint64_t tag, uint8_t reply, const char *text)
{
	size_t offset = dovetail_frame_begin(answers, DOVETAIL_FRAME_REPLY);

	dovetail_wire_put_num(answers, tag);
	dovetail_wire_put_u8(answers, reply);
	dovetail_wire_put_str(answers, text);
	dovetail_frame_end(answers, offset);
}

static const char *long_text(unsigned int len)
{
	string_t *str = t_str_new(len);

	while (str_len(str) < len)
		str_append_c(str, 'a' + str_len(str) % 26);
	return str_c(str);
}

static void test_check(void)
{
	static const unsigned int lengths[] = { 0, 61, 62, 200, 100000 };
	struct dovetail_queue_client *client;
	const char *error, *text;
	unsigned int i;

	test_begin("queue client: check, answers of all lengths");
	for (i = 0; i < N_ELEMENTS(lengths); i++) {
		text = long_text(lengths[i]);
		answer_welcome();
		answer_reply(1, DOVETAIL_REPLY_UNAVAILABLE, text);
		client = dovetail_queue_client_get("/queue", NULL);
		error = NULL;
		test_assert_idx(dovetail_queue_client_check(client, 0, 0,
							    &error) == 0, i);
		test_assert_strcmp_idx(error, text, i);
		answer_reply(2, DOVETAIL_REPLY_OK, "");
		service_send();
		test_assert_idx(dovetail_queue_client_check(client, 0, 0,
							    &error) == 1, i);
		test_assert_idx(dovetail_queue_client_check(client, 0, 0,
							    &error) < 0, i);
		dovetail_queue_client_unref(&client);
	}
	test_end();
}

static void test_batch(void)
{
	struct dovetail_queue_client *client;
	struct dovetail_queue_batch batch;
	buffer_t *change = t_buffer_create(16);
	const char *error, *text = long_text(1000);
	unsigned int i;

	test_begin("queue client: a batch, a text that is cut off");
	buffer_append(change, "\006", 2);
	answer_welcome();
	answer_reply(2, DOVETAIL_REPLY_OK, "");
	answer_reply(1, DOVETAIL_REPLY_NOT_APPLIED, text);
	/* an answer to nothing, and one for the second time */
	answer_reply(77, DOVETAIL_REPLY_OK, "");
	answer_reply(1, DOVETAIL_REPLY_OK, "");
	answer_reply(3, DOVETAIL_REPLY_UNAVAILABLE, "not the first one");
	client = dovetail_queue_client_get("/queue", NULL);
	i_zero(&batch);
	for (i = 0; i < 3; i++) {
		test_assert_idx(dovetail_queue_client_send(client, &batch, 1,
			change, 0, &error) == 0, i);
	}
	test_assert(batch.outstanding == 3);
	test_assert(dovetail_queue_client_wait(client, &batch, 0, &error) < 0);
	test_assert(batch.reply == DOVETAIL_REPLY_NOT_APPLIED);
	test_assert(strlen(error) == sizeof(batch.error) - 1 &&
		    str_begins_with(text, error));
	dovetail_queue_client_unref(&client);
	test_end();
}

int main(void)
{
	static void (*const test_functions[])(void) = {
		test_check,
		test_batch,
		NULL
	};
	int ret;

	answers = buffer_create_dynamic(default_pool, 1024);
	ret = test_run(test_functions);
	buffer_free(&answers);
	i_close_fd(&service_fd);
	return ret;
}
