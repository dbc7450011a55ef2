/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* The order of commands and every callback are ours; the bytes go through
   Dovecot's streams, with or without TLS, and hiredis' redisReader parses the
   replies (dovetail-redis-reader.h).

   hiredis' own redisAsyncContext is not used: it asserts that no reply comes
   that nobody asked for, so a faulty or hostile Redis could abort the
   process; it frees itself inside some of its callbacks; it tries just one
   address of a name; and not every release of it has TLS. */

#include "lib.h"
#include "buffer.h"
#include "ioloop.h"
#include "istream.h"
#include "llist.h"
#include "net.h"
#include "ostream.h"
#include "iostream-ssl.h"
#include "safe-memset.h"
#include "str.h"
#include "str-sanitize.h"
#include "dovetail-compat.h"
#include "dovetail-redis.h"
#include "dovetail-redis-reader.h"

#include <time.h>
#include <unistd.h>
#include <sys/socket.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <hiredis/hiredis.h>

#define DOVETAIL_REDIS_RETRY_MIN_MSECS 50
#define DOVETAIL_REDIS_RETRY_MAX_MSECS 2000
/* The server is given up when in so many parts of the timeout, one after the
   other, and a bit of one more, nothing came of what it owes. The parts are
   counted by the ioloop: however long this process was busy or stopped, that
   is one part, and what came meanwhile is read before the next one. */
#define DOVETAIL_REDIS_TIMEOUT_PARTS 4
/* Another reason for an outage that was logged is worth a line when the outage
   is so old, and twice as old as with the line before. */
#define DOVETAIL_REDIS_OUTAGE_LOG_MSECS 10000
/* Who says that it is read-only is perhaps not who has our address by now: but
   for so long after a reconnect it is not asked about again. */
#define DOVETAIL_REDIS_READONLY_MSECS 5000

#define DOVETAIL_REDIS_READ_SIZE (64 * 1024)
/* Let others run after this many bytes of one connection. */
#define DOVETAIL_REDIS_READ_MAX_SIZE (1024 * 1024)
/* A peer that is gone without a word is noticed after about half a minute. */
#define DOVETAIL_REDIS_KEEPALIVE_IDLE_SECS 15
#define DOVETAIL_REDIS_KEEPALIVE_INTERVAL_SECS 5
#define DOVETAIL_REDIS_KEEPALIVE_COUNT 3

enum dovetail_redis_state {
	/* until the next attempt */
	DOVETAIL_REDIS_WAITING,
	/* connect() is on its way */
	DOVETAIL_REDIS_CONNECTING,
	/* AUTH, SELECT, PING */
	DOVETAIL_REDIS_GREETING,
	DOVETAIL_REDIS_READY,
};

/* A command whose reply is outstanding. */
struct dovetail_redis_cmd {
	struct dovetail_redis_cmd *prev, *next;
	dovetail_redis_callback_t *callback;
	void *context;
};

/* One socket and what belongs to it. */
struct dovetail_redis_conn {
	/* one of struct dovetail_redis, and one per function on the stack */
	int refcount;
	/* -1: disconnected, nothing else may be used */
	int fd;
	/* connecting: waits until it may be written to; then for input */
	struct io *io;
	/* once connected */
	struct istream *input;
	struct ostream *output;
	/* NULL: no TLS */
	struct ssl_iostream *ssl;

	struct dovetail_redis_reader *reader;
	/* the command that is being sent */
	buffer_t *out;
};

struct dovetail_redis {
	/* one of the owner, and one per function on the stack */
	int refcount;
	bool deinitialized;

	struct event *event;
	pool_t pool;
	struct dovetail_redis_url url;
	/* host:port or path, for messages */
	const char *name;
	char *password;
	struct dovetail_redis_tls *tls;
	unsigned int timeout_msecs;
	struct dovetail_redis_callbacks callbacks;
	void *context;

	enum dovetail_redis_state state;
	time_t state_since;
	char *last_error;
	/* counted in the outage */
	bool failed;

	struct dovetail_redis_conn *conn;
	/* addresses of url.host, tried one after the other */
	struct ip_addr *ips;
	unsigned int ips_count, ip_idx;
	unsigned int handshakes_left;

	/* one at a time: next attempt; part of a timeout */
	struct timeout *to;
	/* parts in which nothing came */
	unsigned int quiet;
	unsigned int retry_msecs;
	uint64_t ready_msecs;

	/* sent on conn, oldest first */
	struct dovetail_redis_cmd *cmds_head, *cmds_tail;
	/* their connection is gone; callbacks to be called */
	struct dovetail_redis_cmd *lost_head, *lost_tail;
};

/* A process has one Redis, and what happens to it happens to all connections:
   it is told once. */
static struct {
	/* connections that failed and have not worked since */
	unsigned int count;
	/* what was logged last; NULL: all is well */
	char *error;
	uint64_t start_msecs, logged_msecs;
} outage;

static void dovetail_redis_connect(struct dovetail_redis *redis);
static void dovetail_redis_connect_wait(struct dovetail_redis *redis, int fd);
static void dovetail_redis_connect_failed(struct dovetail_redis *redis);

static uint64_t dovetail_redis_now_msecs(void)
{
	struct timespec ts;

	/* not the ioloop's time: the clock may be set */
	if (clock_gettime(CLOCK_MONOTONIC, &ts) < 0)
		i_unreached();
	return (uint64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

/* ---- the connection ---- */

static void dovetail_redis_conn_unref(struct dovetail_redis_conn **_conn)
{
	struct dovetail_redis_conn *conn = *_conn;

	*_conn = NULL;
	i_assert(conn->refcount > 0);
	if (--conn->refcount > 0)
		return;
	i_assert(conn->fd == -1);
	dovetail_redis_reader_deinit(&conn->reader);
	buffer_free(&conn->out);
	i_free(conn);
}

static void dovetail_redis_conn_close(struct dovetail_redis_conn *conn)
{
	io_remove(&conn->io);
	ssl_iostream_destroy(&conn->ssl);
	i_stream_destroy(&conn->input);
	o_stream_destroy(&conn->output);
	i_close_fd(&conn->fd);
}

static void dovetail_redis_unref(struct dovetail_redis **_redis)
{
	struct dovetail_redis *redis = *_redis;

	*_redis = NULL;
	i_assert(redis->refcount > 0);
	if (--redis->refcount > 0)
		return;
	i_assert(redis->conn == NULL && redis->to == NULL);
	if (redis->password != NULL) {
		safe_memset(redis->password, 0, strlen(redis->password));
		i_free(redis->password);
	}
	i_free(redis->ips);
	i_free(redis->last_error);
	event_unref(&redis->event);
	pool_unref(&redis->pool);
}

static void
dovetail_redis_set_state(struct dovetail_redis *redis,
			 enum dovetail_redis_state state)
{
	/* a failed attempt does not make an outage younger */
	if ((state == DOVETAIL_REDIS_READY) !=
	    (redis->state == DOVETAIL_REDIS_READY))
		redis->state_since = ioloop_time;
	redis->state = state;
}

/* Tell all whose connection is gone. Afterwards redis may be deinitialized;
   the caller holds a reference. */
static void dovetail_redis_call_lost(struct dovetail_redis *redis)
{
	struct dovetail_redis_cmd *cmd;
	dovetail_redis_callback_t *callback;
	void *context;

	/* a callback may deinitialize, which empties the list before it
	   returns */
	while ((cmd = redis->lost_head) != NULL) {
		DLLIST2_REMOVE(&redis->lost_head, &redis->lost_tail, cmd);
		callback = cmd->callback;
		context = cmd->context;
		i_free(cmd);
		if (callback != NULL)
			callback(NULL, context);
	}
}

static void dovetail_redis_close(struct dovetail_redis *redis)
{
	struct dovetail_redis_cmd *cmd;

	timeout_remove(&redis->to);
	if (redis->conn != NULL) {
		dovetail_redis_conn_close(redis->conn);
		dovetail_redis_conn_unref(&redis->conn);
	}
	while ((cmd = redis->cmds_head) != NULL) {
		DLLIST2_REMOVE(&redis->cmds_head, &redis->cmds_tail, cmd);
		DLLIST2_APPEND(&redis->lost_head, &redis->lost_tail, cmd);
	}
}

/* ---- the outage ---- */

static void
outage_log(struct dovetail_redis *redis, const char *error, uint64_t now)
{
	i_free(outage.error);
	outage.error = i_strdup(error);
	outage.logged_msecs = now;
	e_error(redis->event, "%s", error);
}

static void outage_add(struct dovetail_redis *redis, const char *error)
{
	uint64_t age, now = dovetail_redis_now_msecs();

	if (!redis->failed)
		outage.count++;
	redis->failed = TRUE;
	if (outage.error == NULL) {
		outage.start_msecs = now;
		outage_log(redis, error, now);
		return;
	}
	age = now - outage.start_msecs;
	if (strcmp(outage.error, error) != 0 &&
	    age >= DOVETAIL_REDIS_OUTAGE_LOG_MSECS &&
	    age >= (outage.logged_msecs - outage.start_msecs) * 2)
		outage_log(redis, error, now);
}

/* Returns TRUE when it was the last connection that did not work. */
static bool outage_remove(struct dovetail_redis *redis)
{
	if (!redis->failed)
		return FALSE;
	redis->failed = FALSE;
	if (--outage.count > 0)
		return FALSE;
	i_free(outage.error);
	return TRUE;
}

static void dovetail_redis_retry(struct dovetail_redis *redis)
{
	timeout_remove(&redis->to);
	dovetail_redis_connect(redis);
}

/* The connection is gone, or could not be made: tell everybody and try again
   later. The caller may not touch redis afterwards. */
static void dovetail_redis_fail(struct dovetail_redis *redis,
				const char *error)
{
	bool was_ready = redis->state == DOVETAIL_REDIS_READY;

	redis->refcount++;
	i_free(redis->last_error);
	redis->last_error = i_strdup(error);
	outage_add(redis, error);
	if (was_ready && dovetail_redis_now_msecs() - redis->ready_msecs >=
	    DOVETAIL_REDIS_RETRY_MAX_MSECS) {
		/* it was not just a flicker between failures */
		redis->retry_msecs = DOVETAIL_REDIS_RETRY_MIN_MSECS;
	}
	dovetail_redis_close(redis);
	dovetail_redis_set_state(redis, DOVETAIL_REDIS_WAITING);
	redis->to = timeout_add(redis->retry_msecs, dovetail_redis_retry,
				redis);
	redis->retry_msecs = I_MIN(redis->retry_msecs * 2,
				   DOVETAIL_REDIS_RETRY_MAX_MSECS);

	dovetail_redis_call_lost(redis);
	if (was_ready && !redis->deinitialized &&
	    redis->callbacks.lost != NULL)
		redis->callbacks.lost(redis->context);
	dovetail_redis_unref(&redis);
}

/* ---- timeouts ---- */

static void dovetail_redis_timeout_part(struct dovetail_redis *redis)
{
	if (redis->state == DOVETAIL_REDIS_READY && redis->cmds_head == NULL) {
		/* it owes nothing */
		timeout_remove(&redis->to);
		return;
	}
	if (++redis->quiet <= DOVETAIL_REDIS_TIMEOUT_PARTS)
		return;
	if (redis->state == DOVETAIL_REDIS_CONNECTING) {
		errno = ETIMEDOUT;
		dovetail_redis_connect_failed(redis);
	} else if (redis->state == DOVETAIL_REDIS_GREETING) {
		dovetail_redis_fail(redis, "The server does not answer");
	} else {
		dovetail_redis_fail(redis, t_strdup_printf(
			"The server did not answer a command within "
			"%u.%03u secs", redis->timeout_msecs / 1000,
			redis->timeout_msecs % 1000));
	}
}

/* The server owes us something from now on. The timeout runs on when it has
   paid, so that it costs nothing per command. */
static void dovetail_redis_timeout_start(struct dovetail_redis *redis)
{
	redis->quiet = 0;
	if (redis->to == NULL) {
		redis->to = timeout_add_short(
			I_MAX(redis->timeout_msecs /
			      DOVETAIL_REDIS_TIMEOUT_PARTS, 1),
			dovetail_redis_timeout_part, redis);
	}
}

/* ---- writing ---- */

static void
dovetail_redis_conn_format(struct dovetail_redis_conn *conn,
			   unsigned int argc, const char *const *argv,
			   const size_t *argv_len)
{
	unsigned int i;

	buffer_set_used_size(conn->out, 0);
	str_printfa(conn->out, "*%u\r\n", argc);
	for (i = 0; i < argc; i++) {
		str_printfa(conn->out, "$%zu\r\n", argv_len[i]);
		buffer_append(conn->out, argv[i], argv_len[i]);
		buffer_append(conn->out, "\r\n", 2);
	}
}

static void
dovetail_redis_send(struct dovetail_redis *redis, unsigned int argc,
		    const char *const *argv, const size_t *argv_len,
		    dovetail_redis_callback_t *callback, void *context)
{
	struct dovetail_redis_conn *conn = redis->conn;
	struct dovetail_redis_cmd *cmd;

	i_assert(argc > 0);
	if (redis->cmds_head == NULL)
		dovetail_redis_timeout_start(redis);
	cmd = i_new(struct dovetail_redis_cmd, 1);
	cmd->callback = callback;
	cmd->context = context;
	DLLIST2_APPEND(&redis->cmds_head, &redis->cmds_tail, cmd);

	dovetail_redis_conn_format(conn, argc, argv, argv_len);
	/* Written at once as far as possible. An error shows again, and is
	   handled, when the answer is read: the caller does not expect its
	   callbacks here. */
	o_stream_nsend(conn->output, conn->out->data, conn->out->used);
}

/* ---- reading ---- */

/* After a failover a server that was ours may stay as a replica, which refuses
   writes and keeps our connection. */
static bool
dovetail_redis_reply_is_readonly(const struct dovetail_redis *redis,
				 const redisReply *reply)
{
	return redis->state == DOVETAIL_REDIS_READY &&
		reply->type == REDIS_REPLY_ERROR &&
		str_begins_with(reply->str, "READONLY ") &&
		dovetail_redis_now_msecs() - redis->ready_msecs >=
		DOVETAIL_REDIS_READONLY_MSECS;
}

/* Hand one reply to whom it belongs. Returns FALSE when the connection has
   failed; error_r is NULL when that is already known to everybody. */
static bool
dovetail_redis_handle_reply(struct dovetail_redis *redis, redisReply *reply,
			    const char **error_r)
{
	struct dovetail_redis_cmd *cmd = redis->cmds_head;
	dovetail_redis_callback_t *callback;
	void *context;
	bool readonly;

	*error_r = NULL;
	if (cmd == NULL) {
		if (reply->type == REDIS_REPLY_ERROR) {
			*error_r = t_strdup_printf(
				"The server says: %s",
				str_sanitize(reply->str, 200));
		} else {
			*error_r = "The server sent a reply that "
				"nobody asked for";
		}
		return FALSE;
	}
	DLLIST2_REMOVE(&redis->cmds_head, &redis->cmds_tail, cmd);
	callback = cmd->callback;
	context = cmd->context;
	i_free(cmd);
	readonly = dovetail_redis_reply_is_readonly(redis, reply);
	if (callback != NULL)
		callback(reply, context);
	if (readonly) {
		*error_r = "The server has become read-only";
		return FALSE;
	}
	return TRUE;
}

/* Returns FALSE when the connection has failed, error_r as above. */
static bool
dovetail_redis_handle_replies(struct dovetail_redis *redis,
			      struct dovetail_redis_conn *conn,
			      const char **error_r)
{
	redisReply *reply;
	bool ok;
	int ret;

	*error_r = NULL;
	for (;;) {
		if (conn->fd == -1) {
			/* by a callback */
			return FALSE;
		}
		ret = dovetail_redis_reader_next(conn->reader, &reply, error_r);
		if (ret <= 0)
			return ret == 0;
		T_BEGIN {
			ok = dovetail_redis_handle_reply(redis, reply, error_r);
		} T_END_PASS_STR_IF(!ok, error_r);
		freeReplyObject(reply);
		if (!ok)
			return FALSE;
	}
}

static const char *
dovetail_redis_read_error(const struct dovetail_redis *redis,
			  const struct dovetail_redis_conn *conn)
{
	bool hung_up = conn->input->stream_errno == EPIPE ||
		conn->input->stream_errno == ECONNRESET;
	const char *error;

	if (conn->ssl != NULL && hung_up &&
	    redis->state == DOVETAIL_REDIS_GREETING) {
		/* it may refuse us behind the end of our handshake */
		return "TLS failed: The server hung up (does it know our "
			"certificate, dovetail_redis_cert_file?)";
	}
	if (conn->ssl != NULL && !hung_up &&
	    (error = dovetail_redis_tls_error(conn->ssl)) != NULL)
		return error;
	if (conn->input->stream_errno == 0)
		return "The server closed the connection";
	return t_strdup_printf("read() failed: %s",
			       i_stream_get_error(conn->input));
}

/* Returns FALSE when the connection has failed, error_r as above. */
static bool
dovetail_redis_read(struct dovetail_redis *redis,
		    struct dovetail_redis_conn *conn, const char **error_r)
{
	const unsigned char *data;
	size_t size, total = 0;
	ssize_t ret;

	*error_r = NULL;
	do {
		ret = i_stream_read_more(conn->input, &data, &size);
		if (ret == 0)
			return TRUE;
		if (ret < 0) {
			*error_r = dovetail_redis_read_error(redis, conn);
			return FALSE;
		}
		if (dovetail_redis_reader_feed(conn->reader, data, size,
					       error_r) < 0)
			return FALSE;
		i_stream_skip(conn->input, size);
		redis->quiet = 0;
		total += size;
		if (!dovetail_redis_handle_replies(redis, conn, error_r))
			return FALSE;
		/* What a socket has besides calls us again; what TLS has
		   decrypted does not. */
	} while (conn->ssl != NULL && total < DOVETAIL_REDIS_READ_MAX_SIZE);
	if (conn->ssl != NULL)
		i_stream_set_input_pending(conn->input, TRUE);
	return TRUE;
}

static void dovetail_redis_input(struct dovetail_redis *redis)
{
	struct dovetail_redis_conn *conn = redis->conn;
	const char *error;

	conn->refcount++;
	if (!dovetail_redis_read(redis, conn, &error) && error != NULL) {
		/* if fd is -1, a callback was faster */
		if (conn->fd != -1)
			dovetail_redis_fail(redis, error);
	}
	dovetail_redis_conn_unref(&conn);
}

/* ---- connecting ---- */

static void dovetail_redis_set_ready(struct dovetail_redis *redis)
{
	dovetail_redis_set_state(redis, DOVETAIL_REDIS_READY);
	redis->ready_msecs = dovetail_redis_now_msecs();
	timeout_remove(&redis->to);
	/* it has had the password */
	safe_memset(buffer_get_space_unsafe(redis->conn->out, 0,
		buffer_get_writable_size(redis->conn->out)), 0,
		buffer_get_writable_size(redis->conn->out));
	i_free(redis->last_error);
	if (outage_remove(redis))
		e_info(redis->event, "Connected");
	if (redis->callbacks.ready != NULL)
		redis->callbacks.ready(redis->context);
}

static void
dovetail_redis_handshake_error(struct dovetail_redis *redis, const char *what,
			       const redisReply *reply)
{
	const char *text = t_strndup(reply->str, reply->len);
	const char *p;

	/* A server without AUTH repeats its arguments. */
	if ((p = strstr(text, ", with args")) != NULL)
		text = t_strdup_until(text, p);
	dovetail_redis_fail(redis, t_strdup_printf("%s failed: %s", what,
						   str_sanitize(text, 200)));
}

static void
dovetail_redis_handshake_reply(struct dovetail_redis *redis,
			       const redisReply *reply, const char *what)
{
	if (reply == NULL) {
		/* connection lost, being handled */
		return;
	}
	if (reply->type == REDIS_REPLY_ERROR) {
		dovetail_redis_handshake_error(redis, what, reply);
		return;
	}
	i_assert(redis->handshakes_left > 0);
	if (--redis->handshakes_left == 0)
		dovetail_redis_set_ready(redis);
}

static void dovetail_redis_auth_reply(struct redisReply *reply, void *context)
{
	dovetail_redis_handshake_reply(context, reply, "AUTH");
}

static void dovetail_redis_select_reply(struct redisReply *reply,
					void *context)
{
	struct dovetail_redis *redis = context;

	dovetail_redis_handshake_reply(redis, reply, t_strdup_printf(
		"SELECT %u", redis->url.db));
}

static void dovetail_redis_ping_reply(struct redisReply *reply, void *context)
{
	struct dovetail_redis *redis = context;

	if (reply != NULL && reply->type == REDIS_REPLY_ERROR &&
	    str_begins_with(reply->str, "NOPERM")) {
		/* the user may not say PING: the server is there and knows us,
		   that is all we want to know */
		i_assert(redis->handshakes_left == 1);
		redis->handshakes_left = 0;
		dovetail_redis_set_ready(redis);
		return;
	}
	dovetail_redis_handshake_reply(redis, reply, "PING");
}

static void
dovetail_redis_handshake_send(struct dovetail_redis *redis,
			      dovetail_redis_callback_t *callback,
			      const char *const *args)
{
	size_t lens[4];
	unsigned int i;

	for (i = 0; args[i] != NULL; i++) {
		i_assert(i < N_ELEMENTS(lens));
		lens[i] = strlen(args[i]);
	}
	dovetail_redis_send(redis, i, args, lens, callback, redis);
	redis->handshakes_left++;
}

static void dovetail_redis_handshake(struct dovetail_redis *redis)
{
	const struct dovetail_redis_url *url = &redis->url;
	const char *password = redis->password == NULL ? "" : redis->password;
	const char *const auth[] = { "AUTH", password, NULL };
	const char *const auth_user[] = {
		"AUTH", url->username, password, NULL
	};
	const char *const select_db[] = { "SELECT", dec2str(url->db), NULL };
	/* finds out about a missing password, and about a server that still
	   reads its data */
	const char *const ping[] = { "PING", NULL };

	dovetail_redis_set_state(redis, DOVETAIL_REDIS_GREETING);
	redis->handshakes_left = 0;
	if (url->username != NULL) {
		dovetail_redis_handshake_send(redis, dovetail_redis_auth_reply,
					      auth_user);
	} else if (redis->password != NULL) {
		dovetail_redis_handshake_send(redis, dovetail_redis_auth_reply,
					      auth);
	}
	if (url->db != 0) {
		dovetail_redis_handshake_send(redis,
					      dovetail_redis_select_reply,
					      select_db);
	}
	dovetail_redis_handshake_send(redis, dovetail_redis_ping_reply, ping);
}

static void dovetail_redis_set_sockopts(int fd)
{
	int on = 1;
	int idle = DOVETAIL_REDIS_KEEPALIVE_IDLE_SECS;
	int interval = DOVETAIL_REDIS_KEEPALIVE_INTERVAL_SECS;
	int count = DOVETAIL_REDIS_KEEPALIVE_COUNT;

	/* It works without them, only not as well. */
	(void)net_set_tcp_nodelay(fd, TRUE);
	(void)setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
#ifdef TCP_KEEPIDLE
	(void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof(idle));
	(void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL,
			 &interval, sizeof(interval));
	(void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof(count));
#endif
#ifdef TCP_USER_TIMEOUT
	/* keepalive does not work while written bytes are unconfirmed */
	unsigned int msecs = (idle + interval * count) * 1000;

	(void)setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT,
			 &msecs, sizeof(msecs));
#endif
}

/* Start connecting to the next address. Returns the socket, or -1 with errno
   when there is no address left. */
static int dovetail_redis_connect_next_ip(struct dovetail_redis *redis)
{
	int fd = -1;

	errno = EADDRNOTAVAIL;
	while (fd == -1 && redis->ip_idx < redis->ips_count) {
		fd = net_connect_ip(&redis->ips[redis->ip_idx++],
				    redis->url.port, NULL);
	}
	if (fd != -1)
		dovetail_redis_set_sockopts(fd);
	return fd;
}

/* As errno says. Perhaps it works with another address. */
static void dovetail_redis_connect_failed(struct dovetail_redis *redis)
{
	struct dovetail_redis_conn *conn = redis->conn;
	int fd;

	if (redis->ip_idx < redis->ips_count) {
		io_remove(&conn->io);
		i_close_fd(&conn->fd);
		fd = dovetail_redis_connect_next_ip(redis);
		if (fd != -1) {
			dovetail_redis_connect_wait(redis, fd);
			return;
		}
	}
	dovetail_redis_fail(redis, t_strdup_printf("connect() failed: %m"));
}

static void dovetail_redis_connected(struct dovetail_redis *redis)
{
	struct dovetail_redis_conn *conn = redis->conn;
	const char *error;

	errno = net_geterror(conn->fd);
	if (errno != 0) {
		dovetail_redis_connect_failed(redis);
		return;
	}
	io_remove(&conn->io);
	conn->input = i_stream_create_fd(conn->fd, DOVETAIL_REDIS_READ_SIZE);
	i_stream_set_init_buffer_size(conn->input, DOVETAIL_REDIS_READ_SIZE);
	/* the callers bound what they have under way */
	conn->output = o_stream_create_fd(conn->fd, SIZE_MAX);
	o_stream_set_no_error_handling(conn->output, TRUE);
	if (redis->url.tls &&
	    dovetail_redis_tls_start(redis->tls, redis->event, redis->url.host,
				     &conn->input, &conn->output, &conn->ssl,
				     &error) < 0) {
		dovetail_redis_fail(redis, error);
		return;
	}
	conn->io = io_add_istream(conn->input, dovetail_redis_input, redis);
	dovetail_redis_handshake(redis);
}

static void dovetail_redis_connect_wait(struct dovetail_redis *redis, int fd)
{
	redis->conn->fd = fd;
	redis->conn->io = io_add(fd, IO_WRITE, dovetail_redis_connected, redis);
	dovetail_redis_timeout_start(redis);
}

static void dovetail_redis_connect_start(struct dovetail_redis *redis, int fd)
{
	struct dovetail_redis_conn *conn;

	conn = i_new(struct dovetail_redis_conn, 1);
	conn->refcount = 1;
	conn->reader = dovetail_redis_reader_init();
	conn->out = buffer_create_dynamic(default_pool, 1024);
	redis->conn = conn;
	dovetail_redis_set_state(redis, DOVETAIL_REDIS_CONNECTING);
	dovetail_redis_connect_wait(redis, fd);
}

static void dovetail_redis_connect(struct dovetail_redis *redis)
{
	struct ip_addr *ips;
	int fd, ret;

	i_assert(redis->conn == NULL && redis->to == NULL);

	i_free(redis->ips);
	redis->ips_count = redis->ip_idx = 0;
	if (redis->url.path != NULL)
		fd = net_connect_unix(redis->url.path);
	else {
		/* every time anew: the name may have moved */
		ret = net_gethostbyname(redis->url.host, &ips,
					&redis->ips_count);
		if (ret != 0) {
			redis->ips_count = 0;
			dovetail_redis_fail(redis, t_strdup_printf(
				"Host lookup failed: %s",
				net_gethosterror(ret)));
			return;
		}
		redis->ips = i_new(struct ip_addr, redis->ips_count);
		memcpy(redis->ips, ips, sizeof(*ips) * redis->ips_count);
		fd = dovetail_redis_connect_next_ip(redis);
	}
	if (fd == -1) {
		dovetail_redis_fail(redis,
			t_strdup_printf("connect() failed: %m"));
		return;
	}
	dovetail_redis_connect_start(redis, fd);
}

/* ---- for everybody ---- */

struct dovetail_redis *
dovetail_redis_init(struct event *event, const struct dovetail_redis_url *url,
		    const char *password, struct dovetail_redis_tls *tls,
		    unsigned int timeout_msecs,
		    const struct dovetail_redis_callbacks *callbacks,
		    void *context)
{
	struct dovetail_redis *redis;
	pool_t pool;

	pool = pool_alloconly_create("dovetail redis", 1024);
	redis = p_new(pool, struct dovetail_redis, 1);
	redis->refcount = 1;
	redis->pool = pool;
	redis->url = *url;
	redis->url.path = p_strdup(pool, url->path);
	redis->url.host = p_strdup(pool, url->host);
	redis->url.username = p_strdup(pool, url->username);
	redis->url.prefix = p_strdup(pool, url->prefix);
	redis->name = url->path != NULL ? redis->url.path :
		p_strdup_printf(pool, strchr(url->host, ':') == NULL ?
				"%s:%u" : "[%s]:%u", url->host, url->port);
	i_assert(!url->tls || tls != NULL);
	redis->password = i_strdup(password);
	redis->tls = tls;
	redis->timeout_msecs = timeout_msecs;
	redis->callbacks = *callbacks;
	redis->context = context;
	redis->retry_msecs = DOVETAIL_REDIS_RETRY_MIN_MSECS;
	redis->state = DOVETAIL_REDIS_WAITING;
	redis->state_since = ioloop_time;

	redis->event = event_create(event);
	event_set_append_log_prefix(redis->event, t_strdup_printf(
		"redis(%s): ", redis->name));
	event_add_str(redis->event, "redis", redis->name);

	dovetail_redis_connect(redis);
	return redis;
}

void dovetail_redis_deinit(struct dovetail_redis **_redis)
{
	struct dovetail_redis *redis = *_redis;

	if (redis == NULL)
		return;
	*_redis = NULL;

	i_assert(!redis->deinitialized);
	redis->deinitialized = TRUE;
	(void)outage_remove(redis);
	dovetail_redis_close(redis);
	dovetail_redis_set_state(redis, DOVETAIL_REDIS_WAITING);
	dovetail_redis_call_lost(redis);
	dovetail_redis_unref(&redis);
}

bool dovetail_redis_is_ready(const struct dovetail_redis *redis)
{
	return redis->state == DOVETAIL_REDIS_READY;
}

const char *dovetail_redis_last_error(const struct dovetail_redis *redis)
{
	return redis->last_error;
}

time_t dovetail_redis_state_since(const struct dovetail_redis *redis)
{
	return redis->state_since;
}

void dovetail_redis_command(struct dovetail_redis *redis, unsigned int argc,
			    const char *const *argv, const size_t *argv_len,
			    dovetail_redis_callback_t *callback, void *context)
{
	if (redis->state != DOVETAIL_REDIS_READY) {
		if (callback != NULL)
			callback(NULL, context);
		return;
	}
	dovetail_redis_send(redis, argc, argv, argv_len, callback, context);
}

void dovetail_redis_commandl(struct dovetail_redis *redis,
			     dovetail_redis_callback_t *callback, void *context,
			     const char *arg, ...)
{
	const char *argv[32];
	size_t argv_len[N_ELEMENTS(argv)];
	unsigned int argc = 0;
	va_list args;

	va_start(args, arg);
	for (; arg != NULL; arg = va_arg(args, const char *)) {
		i_assert(argc < N_ELEMENTS(argv));
		argv[argc] = arg;
		argv_len[argc++] = strlen(arg);
	}
	va_end(args);
	dovetail_redis_command(redis, argc, argv, argv_len, callback, context);
}
