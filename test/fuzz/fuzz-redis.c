/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* dovetail-redis: what a Redis server, or what stands in its place, may answer to
   a connection of ours.
   Input: u8 bits: 1 password, 2 user, 4 database, 8 our end is closed in a
   callback; u8 how many commands are sent when we may; then blocks of what the
   server sends at once; an empty one: it hangs up.
   Must hold: commands are answered in order, each once, and with a reply only
   while we are connected; no reply has more elements than are allowed. */

#include "fuzz-common.h"
#include "ioloop.h"
#include "net.h"
#include "dovetail-redis.h"
#include "dovetail-redis-reader.h"

#include <unistd.h>
#include <hiredis/hiredis.h>

struct server {
	struct dovetail_redis *redis;
	/* the server's end, and the one that we get when we connect */
	int fd, client_fd;
	unsigned int flags, commands;
	/* the next command to be answered */
	unsigned int sent, answered;
	unsigned int ready, lost;
};
static struct server *server;

void fuzz_init(void)
{
}

/* in place of Dovecot's */
int net_connect_unix(const char *path ATTR_UNUSED)
{
	int fd = server->client_fd;

	server->client_fd = -1;
	if (fd == -1)
		errno = ECONNREFUSED;
	return fd;
}

static uint64_t count_elements(const struct redisReply *reply)
{
	uint64_t count = reply->elements;
	size_t i;

	for (i = 0; i < reply->elements; i++)
		count += count_elements(reply->element[i]);
	return count;
}

static void command_answered(struct redisReply *reply, void *context)
{
	unsigned int idx = POINTER_CAST_TO(context, unsigned int);

	fuzz_assert(idx == server->answered);
	server->answered++;
	if (reply == NULL)
		return;
	fuzz_assert(count_elements(reply) <= DOVETAIL_REDIS_REPLY_MAX_ELEMENTS);
	fuzz_assert(server->ready > server->lost);
	if ((server->flags & 8) != 0 && server->redis != NULL)
		dovetail_redis_deinit(&server->redis);
}

static void send_commands(void)
{
	for (; server->commands > 0 && server->redis != NULL;
	     server->commands--) {
		dovetail_redis_commandl(server->redis, command_answered,
			POINTER_CAST(server->sent++), "XLEN", "key", NULL);
	}
}

static void redis_ready(void *context ATTR_UNUSED)
{
	server->ready++;
	send_commands();
}

static void redis_lost(void *context ATTR_UNUSED)
{
	server->lost++;
	fuzz_assert(server->answered == server->sent);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static const struct dovetail_redis_callbacks callbacks = {
		.ready = redis_ready,
		.lost = redis_lost,
	};
	struct fuzz_input in = { data, size };
	struct dovetail_redis_url url;
	struct server s;
	struct ioloop *ioloop;
	int fd[2];

	i_zero(&s);
	server = &s;
	fuzz_assert(socketpair(AF_UNIX, SOCK_STREAM, 0, fd) == 0);
	net_set_nonblock(fd[0], TRUE);
	net_set_nonblock(fd[1], TRUE);
	s.fd = fd[0];
	s.client_fd = fd[1];
	s.flags = fuzz_get_u8(&in);
	s.commands = fuzz_get_u8(&in) % 16;

	ioloop = io_loop_create();
	i_zero(&url);
	url.path = "/redis";
	url.prefix = "";
	url.username = (s.flags & 2) != 0 ? "user" : NULL;
	url.db = (s.flags & 4) != 0 ? 3 : 0;
	s.redis = dovetail_redis_init(NULL, &url,
		(s.flags & 1) != 0 ? "secret" : NULL, NULL, 60000,
		&callbacks, NULL);
	fuzz_run_ioloop();
	while (in.size > 0 && s.redis != NULL && s.fd != -1) {
		const uint8_t *bytes;
		size_t bytes_size;

		bytes = fuzz_get_block(&in, &bytes_size);
		if (bytes_size == 0)
			i_close_fd(&s.fd);
		else if (write(s.fd, bytes, bytes_size) < 0) {
			/* it was given up, or has enough to read */
		}
		T_BEGIN {
			fuzz_run_ioloop();
		} T_END;
	}
	dovetail_redis_deinit(&s.redis);
	fuzz_assert(s.answered == s.sent);
	fuzz_assert(s.ready <= 1 && s.lost <= s.ready);
	i_close_fd(&s.fd);
	i_close_fd(&s.client_fd);
	io_loop_destroy(&ioloop);
	return 0;
}
