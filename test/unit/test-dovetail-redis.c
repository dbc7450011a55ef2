/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* Needs redis-server: from the environment's REDIS_SERVER, or in PATH. It runs
   in a directory of its own. Servers that misbehave are played by the test. */

#include "lib.h"
#include "array.h"
#include "buffer.h"
#include "ioloop.h"
#include "net.h"
#include "str.h"
#include "test-common.h"
#include "time-util.h"
#include "unlink-directory.h"
#include "dovetail-compat.h"
#include "dovetail-redis.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <hiredis/hiredis.h>

#define TEST_SKIP_STATUS 77
/* Nothing here takes that long unless it is broken. */
#define TEST_TIMEOUT_MSECS 10000

static struct ioloop *ioloop;
static const char *test_dir, *server_path, *socket_path;
static in_port_t server_port;
static pid_t server_pid = -1;

/* ---- redis-server ---- */

static in_port_t test_free_port(void)
{
	struct ip_addr ip;
	in_port_t port = 0;
	int fd;

	if (net_addr2ip("127.0.0.1", &ip) < 0)
		i_unreached();
	fd = net_listen(&ip, &port, 1);
	if (fd == -1)
		i_fatal("net_listen(127.0.0.1) failed: %m");
	i_close_fd(&fd);
	return port;
}

static bool server_is_up(void)
{
	int fd = net_connect_unix(socket_path);

	if (fd == -1)
		return FALSE;
	i_close_fd(&fd);
	return TRUE;
}

/* Start a server with these further arguments, NULL-terminated. */
static void server_start(const char *const *args)
{
	const char *base_args[] = {
		server_path, "--port", dec2str(server_port),
		"--bind", "127.0.0.1", "--unixsocket", socket_path,
		"--dir", test_dir, "--save", "", "--appendonly", "no",
		"--logfile", t_strconcat(test_dir, "/redis.log", NULL),
	};
	ARRAY_TYPE(const_string) argv;
	const char *const *argvp;
	unsigned int i;

	i_assert(server_pid == -1);
	t_array_init(&argv, 32);
	array_append(&argv, base_args, N_ELEMENTS(base_args));
	for (; *args != NULL; args++)
		array_push_back(&argv, args);
	array_append_zero(&argv);
	argvp = array_front(&argv);

	i_unlink_if_exists(socket_path);
	server_pid = fork();
	if (server_pid == -1)
		i_fatal("fork() failed: %m");
	if (server_pid == 0) {
		/* not to outlive a test that is killed */
		(void)prctl(PR_SET_PDEATHSIG, SIGKILL);
		execvp(server_path, (char *const *)argvp);
		_exit(127);
	}
	for (i = 0; i < 500 && !server_is_up(); i++)
		usleep(10000);
	if (i == 500)
		i_fatal("%s does not start, see %s", server_path, test_dir);
}

static void server_kill(void)
{
	int status;

	if (kill(server_pid, SIGKILL) < 0)
		i_fatal("kill(%d) failed: %m", (int)server_pid);
	(void)kill(server_pid, SIGCONT);
	if (waitpid(server_pid, &status, 0) < 0)
		i_fatal("waitpid(%d) failed: %m", (int)server_pid);
	server_pid = -1;
}

static const char *const no_args[] = { NULL };

/* ---- a client ---- */

struct client {
	struct dovetail_redis *redis;
	unsigned int ready_count, lost_count;
	/* replies since the last reset */
	unsigned int reply_count, null_count;
	/* of the last reply; type 0: none, or NULL */
	int type;
	long long integer;
	string_t *str;
	/* what client_wait() waits for */
	unsigned int want_ready, want_lost, want_replies;
	bool timed_out;

	enum {
		DEINIT_NEVER,
		DEINIT_IN_READY,
		DEINIT_IN_LOST,
		DEINIT_IN_REPLY,
		DEINIT_IN_NULL_REPLY
	} deinit;
	unsigned int replies_at_deinit;
};

static void client_check(struct client *client)
{
	if (client->ready_count >= client->want_ready &&
	    client->lost_count >= client->want_lost &&
	    client->reply_count >= client->want_replies)
		io_loop_stop(ioloop);
}

static void client_deinit_inside(struct client *client)
{
	client->deinit = DEINIT_NEVER;
	dovetail_redis_deinit(&client->redis);
	test_assert(client->redis == NULL);
	client->replies_at_deinit = client->reply_count;
	io_loop_stop(ioloop);
}

static void client_ready(void *context)
{
	struct client *client = context;

	client->ready_count++;
	test_assert(dovetail_redis_is_ready(client->redis));
	test_assert_strcmp(dovetail_redis_last_error(client->redis), NULL);
	if (client->deinit == DEINIT_IN_READY)
		client_deinit_inside(client);
	client_check(client);
}

static void client_lost(void *context)
{
	struct client *client = context;

	client->lost_count++;
	test_assert(!dovetail_redis_is_ready(client->redis));
	test_assert(dovetail_redis_last_error(client->redis) != NULL);
	if (client->deinit == DEINIT_IN_LOST)
		client_deinit_inside(client);
	client_check(client);
}

static void client_reply(struct redisReply *reply, void *context)
{
	struct client *client = context;

	client->reply_count++;
	str_truncate(client->str, 0);
	client->type = 0;
	if (reply == NULL) {
		client->null_count++;
		if (client->deinit == DEINIT_IN_NULL_REPLY)
			client_deinit_inside(client);
	} else {
		client->type = reply->type;
		client->integer = reply->integer;
		if (reply->str != NULL)
			str_append_data(client->str, reply->str, reply->len);
		if (client->deinit == DEINIT_IN_REPLY)
			client_deinit_inside(client);
	}
	client_check(client);
}

static const struct dovetail_redis_callbacks client_callbacks = {
	.ready = client_ready,
	.lost = client_lost,
};

static void
client_init(struct client *client, const char *url, const char *password,
	    unsigned int timeout_msecs)
{
	struct dovetail_redis_url set;
	const char *error;
	string_t *str = client->str;

	if (dovetail_redis_url_parse(pool_datastack_create(), url, &set,
				     &error) < 0)
		i_panic("%s: %s", url, error);
	i_zero(client);
	client->str = str != NULL ? str : str_new(default_pool, 128);
	client->redis = dovetail_redis_init(NULL, &set, password, NULL,
					    timeout_msecs, &client_callbacks,
					    client);
}

static void client_deinit(struct client *client)
{
	dovetail_redis_deinit(&client->redis);
	str_free(&client->str);
}

static void client_timeout(struct client *client)
{
	client->timed_out = TRUE;
	io_loop_stop(ioloop);
}

static bool client_wait(struct client *client, unsigned int want_ready,
			unsigned int want_lost, unsigned int want_replies)
{
	struct timeout *to;

	client->want_ready = want_ready;
	client->want_lost = want_lost;
	client->want_replies = want_replies;
	client->timed_out = FALSE;
	if (client->ready_count >= want_ready &&
	    client->lost_count >= want_lost &&
	    client->reply_count >= want_replies)
		return TRUE;
	to = timeout_add(TEST_TIMEOUT_MSECS, client_timeout, client);
	io_loop_run(ioloop);
	timeout_remove(&to);
	return !client->timed_out;
}

static void run_timeout(bool *over)
{
	*over = TRUE;
	io_loop_stop(ioloop);
}

/* Run for that long, whatever a client waited for before. */
static void run_msecs(unsigned int msecs)
{
	bool over = FALSE;
	struct timeout *to = timeout_add(msecs, run_timeout, &over);

	while (!over)
		io_loop_run(ioloop);
	timeout_remove(&to);
}

static void busy_timeout(void *context ATTR_UNUSED)
{
	usleep(95000);
	io_loop_stop(ioloop);
}

/* A handler takes longer than the tests' shortest timeout, but not so long that
   the ioloop takes it for a change of the clock. */
static void run_busy(void)
{
	struct timeout *to = timeout_add_short(0, busy_timeout, NULL);

	io_loop_run(ioloop);
	timeout_remove(&to);
}

#define client_send(client, ...) \
	dovetail_redis_commandl((client)->redis, client_reply, client, \
				__VA_ARGS__, NULL)
/* Send one command and wait for its reply. */
#define client_ask(client, ...) STMT_START { \
	unsigned int _count = (client)->reply_count; \
	client_send(client, __VA_ARGS__); \
	test_assert(client_wait(client, 0, 0, _count + 1)); \
	} STMT_END

static const char *unix_url(void)
{
	return t_strconcat("unix:", socket_path, NULL);
}

static const char *tcp_url(void)
{
	return t_strdup_printf("redis://127.0.0.1:%u", server_port);
}

/* The server refuses us: once, with this reason, and it is logged once. */
static void
test_refused(const char *url, const char *password, const char *reason)
{
	struct client client = { .str = NULL };

	test_expect_error_string(reason);
	client_init(&client, url, password, 1000);
	/* three attempts or so */
	run_msecs(300);
	test_expect_no_more_errors();
	test_assert_strcmp(dovetail_redis_last_error(client.redis), reason);
	test_assert(!dovetail_redis_is_ready(client.redis));
	test_assert(client.ready_count == 0 && client.lost_count == 0);
	client_deinit(&client);
}

/* ---- with a real server ---- */

static void test_dovetail_redis_connect(void)
{
	struct client client = { .str = NULL };
	const char *urls[] = {
		unix_url(), tcp_url(),
		/* both of its addresses may have to be tried */
		t_strdup_printf("redis://localhost:%u", server_port),
	};
	unsigned int i;

	test_begin("dovetail redis: connect");
	server_start(no_args);
	for (i = 0; i < N_ELEMENTS(urls); i++) {
		client_init(&client, urls[i], NULL, 2000);
		test_assert_idx(!dovetail_redis_is_ready(client.redis), i);
		/* too early */
		client_send(&client, "PING");
		test_assert_idx(client.reply_count == 1, i);
		test_assert_idx(client.null_count == 1, i);

		test_assert_idx(client_wait(&client, 1, 0, 0), i);
		test_assert_idx(dovetail_redis_is_ready(client.redis), i);
		test_assert_idx(dovetail_redis_state_since(client.redis) ==
				ioloop_time, i);
		client_ask(&client, "SET", "key", dec2str(i));
		test_assert_strcmp_idx(str_c(client.str), "OK", i);
		client_ask(&client, "GET", "key");
		test_assert_idx(client.type == REDIS_REPLY_STRING, i);
		test_assert_strcmp_idx(str_c(client.str), dec2str(i), i);
		/* an error reply is a reply */
		client_ask(&client, "NONSENSE");
		test_assert_idx(client.type == REDIS_REPLY_ERROR, i);
		/* nobody listens */
		dovetail_redis_commandl(client.redis, NULL, NULL,
					"INCR", "key", NULL);
		client_ask(&client, "GET", "key");
		test_assert_strcmp_idx(str_c(client.str), dec2str(i + 1), i);
		test_assert_idx(client.null_count == 1, i);
		client_deinit(&client);
	}
	server_kill();
	test_end();
}

static void test_dovetail_redis_auth(void)
{
	static const char *const args[] = {
		"--requirepass", "se cret",
		"--user", "bob", "on", ">bobspw", "~dovetail:*", "+@all",
		/* may not even say PING */
		"--user", "min", "on", ">minpw", "~*", "-@all", "+set", NULL
	};
	struct client client = { .str = NULL };
	const char *bob = t_strconcat(unix_url(), "?user=bob", NULL);

	test_begin("dovetail redis: password and user");
	server_start(args);
	client_init(&client, unix_url(), "se cret", 2000);
	test_assert(client_wait(&client, 1, 0, 0));
	client_ask(&client, "ACL", "WHOAMI");
	test_assert_strcmp(str_c(client.str), "default");
	client_deinit(&client);

	client_init(&client, t_strdup_printf(
		"redis://bob@127.0.0.1:%u", server_port), "bobspw", 2000);
	test_assert(client_wait(&client, 1, 0, 0));
	client_ask(&client, "ACL", "WHOAMI");
	test_assert_strcmp(str_c(client.str), "bob");
	client_ask(&client, "GET", "other:x");
	test_assert(str_begins_with(str_c(client.str), "NOPERM"));
	client_deinit(&client);

	client_init(&client, t_strconcat(unix_url(), "?user=min", NULL),
		    "minpw", 2000);
	test_assert(client_wait(&client, 1, 0, 0));
	client_ask(&client, "SET", "a", "b");
	test_assert_strcmp(str_c(client.str), "OK");
	client_deinit(&client);

	test_refused(unix_url(), "wrong", "AUTH failed: WRONGPASS invalid "
		     "username-password pair or user is disabled.");
	test_refused(bob, "se cret", "AUTH failed: WRONGPASS invalid "
		     "username-password pair or user is disabled.");
	test_refused(bob, NULL, "AUTH failed: WRONGPASS invalid "
		     "username-password pair or user is disabled.");
	test_refused(unix_url(), NULL,
		     "PING failed: NOAUTH Authentication required.");
	server_kill();
	test_end();
}

static void test_dovetail_redis_db(void)
{
	struct client client = { .str = NULL };
	const char *db3 = t_strconcat(unix_url(), "?db=3", NULL);

	test_begin("dovetail redis: database");
	server_start(no_args);
	client_init(&client, db3, NULL, 2000);
	test_assert(client_wait(&client, 1, 0, 0));
	client_ask(&client, "SET", "key", "three");
	client_deinit(&client);

	client_init(&client, unix_url(), NULL, 2000);
	test_assert(client_wait(&client, 1, 0, 0));
	client_ask(&client, "GET", "key");
	test_assert(client.type == REDIS_REPLY_NIL);
	client_deinit(&client);

	client_init(&client, t_strconcat(tcp_url(), "/3", NULL), NULL, 2000);
	test_assert(client_wait(&client, 1, 0, 0));
	client_ask(&client, "GET", "key");
	test_assert_strcmp(str_c(client.str), "three");
	client_deinit(&client);

	test_refused(t_strconcat(tcp_url(), "/99", NULL), NULL,
		     "SELECT 99 failed: ERR DB index is out of range");
	test_refused(unix_url(), "unwanted", "AUTH failed: ERR AUTH <password> "
		     "called without any password configured for the default "
		     "user. Are you sure your configuration is correct?");
	server_kill();
	test_end();
}

static void test_dovetail_redis_restart(void)
{
	static const char *const args[] = { "--requirepass", "pw", NULL };
	struct client client = { .str = NULL };
	const char *urls[] = {
		t_strconcat(unix_url(), "?db=2", NULL),
		t_strconcat(tcp_url(), "/2", NULL)
	};
	unsigned int i, j;

	test_begin("dovetail redis: restart");
	for (i = 0; i < N_ELEMENTS(urls); i++) {
		server_start(args);
		client_init(&client, urls[i], "pw", 2000);
		test_assert(client_wait(&client, 1, 0, 0));
		client_ask(&client, "CLIENT", "ID");
		test_assert(client.type == REDIS_REPLY_INTEGER);

		client_send(&client, "BLPOP", "nokey", "0");
		for (j = 0; j < 9; j++)
			client_send(&client, "SET", "key", dec2str(j));
		run_msecs(20);
		test_assert_idx(client.reply_count == 1, i);
		/* the connection is gone, and that none can be made is no
		   other news */
		test_expect_errors(1);
		server_kill();
		test_assert(client_wait(&client, 0, 1, 0));
		test_assert_idx(client.reply_count == 11, i);
		test_assert_idx(client.null_count == 10, i);
		run_msecs(200);
		test_expect_no_more_errors();
		test_assert_idx(client.ready_count == 1, i);
		test_assert_idx(client.lost_count == 1, i);
		test_assert_idx(!dovetail_redis_is_ready(client.redis), i);
		client_send(&client, "GET", "key");
		test_assert_idx(client.null_count == 11, i);

		server_start(args);
		test_assert(client_wait(&client, 2, 0, 0));
		test_assert_idx(client.lost_count == 1, i);
		client_ask(&client, "GET", "key");
		test_assert_idx(client.type == REDIS_REPLY_NIL, i);
		client_ask(&client, "SET", "key", "again");
		test_assert_strcmp_idx(str_c(client.str), "OK", i);
		client_deinit(&client);
		server_kill();
	}
	test_end();
}

static void test_dovetail_redis_timeout(void)
{
	struct client client = { .str = NULL };
	unsigned int i;

	test_begin("dovetail redis: command timeout");
	server_start(no_args);
	client_init(&client, tcp_url(), NULL, 300);
	test_assert(client_wait(&client, 1, 0, 0));

	/* a connection without a question does not time out, and neither does
	   one that is answered all the time */
	run_msecs(500);
	for (i = 0; i < 20; i++) {
		client_ask(&client, "PING");
		run_msecs(25);
	}
	test_assert(client.null_count == 0 && client.lost_count == 0);

	if (kill(server_pid, SIGSTOP) < 0)
		i_fatal("kill() failed: %m");
	test_expect_error_string("The server did not answer a command "
				 "within 0.300 secs");
	client_send(&client, "PING");
	client_send(&client, "PING");
	test_assert(client_wait(&client, 0, 1, 0));
	test_assert(client.null_count == 2);
	/* it accepts, but says nothing */
	run_msecs(800);
	test_expect_no_more_errors();
	test_assert_strcmp(dovetail_redis_last_error(client.redis),
			   "The server does not answer");
	if (kill(server_pid, SIGCONT) < 0)
		i_fatal("kill() failed: %m");
	test_assert(client_wait(&client, 2, 0, 0));
	client_deinit(&client);

	/* It is us who were slow: the answer is there ... */
	client_init(&client, tcp_url(), NULL, 80);
	test_assert(client_wait(&client, 1, 0, 0));
	client_send(&client, "PING");
	run_busy();
	test_assert(client_wait(&client, 0, 0, 1));
	test_assert_strcmp(str_c(client.str), "PONG");
	test_assert(client.lost_count == 0);
	client_deinit(&client);
	/* ... and so is the connection */
	client_init(&client, tcp_url(), NULL, 80);
	run_busy();
	test_assert(client_wait(&client, 1, 0, 0));
	client_deinit(&client);
	server_kill();
	test_end();
}

static void test_dovetail_redis_deinit(void)
{
	struct client client = { .str = NULL };
	unsigned int i;

	test_begin("dovetail redis: deinit");
	/* while connecting, and in greeting */
	server_start(no_args);
	client_init(&client, tcp_url(), "pw", 2000);
	client_deinit(&client);

	client_init(&client, tcp_url(), NULL, 2000);
	client.deinit = DEINIT_IN_READY;
	test_assert(client_wait(&client, 2, 0, 0));
	test_assert(client.redis == NULL);
	client_deinit(&client);

	/* outside, with commands */
	client_init(&client, tcp_url(), NULL, 2000);
	test_assert(client_wait(&client, 1, 0, 0));
	for (i = 0; i < 5; i++)
		client_send(&client, "PING");
	dovetail_redis_deinit(&client.redis);
	test_assert(client.null_count == 5);
	test_assert(client.lost_count == 0);
	client_deinit(&client);

	/* in the first of five replies, which are all there */
	client_init(&client, tcp_url(), NULL, 2000);
	test_assert(client_wait(&client, 1, 0, 0));
	client.deinit = DEINIT_IN_REPLY;
	for (i = 0; i < 5; i++)
		client_send(&client, "PING");
	usleep(50000);
	test_assert(client_wait(&client, 2, 0, 0));
	test_assert(client.redis == NULL);
	test_assert(client.replies_at_deinit == 5);
	test_assert(client.reply_count == 5 && client.null_count == 4);
	test_assert(client.lost_count == 0);
	client_deinit(&client);

	/* in the first NULL reply: the others come before it returns */
	client_init(&client, tcp_url(), NULL, 2000);
	test_assert(client_wait(&client, 1, 0, 0));
	client.deinit = DEINIT_IN_NULL_REPLY;
	client_send(&client, "BLPOP", "nokey", "0");
	for (i = 0; i < 4; i++)
		client_send(&client, "PING");
	run_msecs(20);
	test_expect_errors(1);
	server_kill();
	test_assert(client_wait(&client, 2, 0, 0));
	test_assert(client.redis == NULL);
	test_assert(client.replies_at_deinit == 5);
	test_assert(client.reply_count == 5 && client.null_count == 5);
	test_assert(client.lost_count == 0);
	test_expect_no_more_errors();
	client_deinit(&client);

	/* in lost */
	server_start(no_args);
	client_init(&client, tcp_url(), NULL, 2000);
	test_assert(client_wait(&client, 1, 0, 0));
	client.deinit = DEINIT_IN_LOST;
	client_send(&client, "BLPOP", "nokey", "0");
	run_msecs(20);
	test_expect_errors(1);
	server_kill();
	test_assert(client_wait(&client, 2, 0, 0));
	test_assert(client.redis == NULL);
	test_assert(client.lost_count == 1 && client.null_count == 1);
	test_expect_no_more_errors();
	client_deinit(&client);

	/* while it waits for the next attempt */
	test_expect_errors(1);
	client_init(&client, tcp_url(), NULL, 2000);
	run_msecs(20);
	client_deinit(&client);
	test_expect_no_more_errors();
	/* a timeout or an io that was forgotten would show now */
	run_msecs(150);
	test_end();
}

static void test_dovetail_redis_binary(void)
{
	struct client client = { .str = NULL };
	const char *argv[3] = { "SET", "a\0b\r\n", NULL };
	size_t lens[3] = { 3, 5, 0 };
	buffer_t *value = buffer_create_dynamic(default_pool, 1024);
	unsigned int i, size = 5 * 1024 * 1024 + 1;
	unsigned int count;

	test_begin("dovetail redis: binary values");
	for (i = 0; i < size; i++) {
		buffer_append_c(value, i % 7 == 0 ?
				(unsigned char)"\0\r\n$*"[i % 5] :
				(unsigned char)((i * 2654435761u) >> 24));
	}
	server_start(no_args);
	client_init(&client, tcp_url(), NULL, 5000);
	test_assert(client_wait(&client, 1, 0, 0));

	for (i = 0; i < 2; i++) {
		argv[0] = "SET";
		argv[2] = value->data;
		lens[2] = i == 0 ? value->used : 0;
		count = client.reply_count;
		dovetail_redis_command(client.redis, 3, argv, lens,
				       client_reply, &client);
		test_assert(client_wait(&client, 0, 0, count + 1));
		test_assert_strcmp(str_c(client.str), "OK");
		argv[0] = "GET";
		dovetail_redis_command(client.redis, 2, argv, lens,
				       client_reply, &client);
		test_assert(client_wait(&client, 0, 0, count + 2));
		test_assert_memcmp_idx(str_data(client.str),
				       str_len(client.str),
				       value->data, lens[2], i);
	}

	/* more than the socket takes, in both directions at once; in order */
	count = client.reply_count;
	argv[0] = "ECHO";
	argv[1] = value->data;
	for (i = 0; i < 200; i++) {
		lens[0] = 4;
		lens[1] = 100000 + i;
		dovetail_redis_command(client.redis, 2, argv, lens,
				       client_reply, &client);
	}
	for (i = 0; i < 200; i++) {
		test_assert_idx(client_wait(&client, 0, 0, count + i + 1), i);
		if (client.reply_count == count + i + 1) {
			test_assert_idx(str_len(client.str) == 100000 + i, i);
		}
	}
	test_assert(client.reply_count == count + 200);
	test_assert(str_len(client.str) == 100199);
	test_assert(client.null_count == 0);
	client_deinit(&client);
	server_kill();
	buffer_free(&value);
	test_end();
}

/* Ask the server without the code that is tested, and without the ioloop. */
static const char *raw_ask(const char *query)
{
	char buf[128];
	ssize_t ret;
	int fd = net_connect_unix(socket_path);

	if (fd == -1)
		i_fatal("connect(%s) failed: %m", socket_path);
	net_set_nonblock(fd, FALSE);
	if (write(fd, query, strlen(query)) != (ssize_t)strlen(query))
		i_fatal("write() failed: %m");
	ret = read(fd, buf, sizeof(buf));
	i_close_fd(&fd);
	return t_strndup(buf, I_MAX(ret, 0));
}

static void send_in_reply(struct redisReply *reply, void *context)
{
	struct client *client = context;

	client_send(client, "SET", "key", "two");
	client_reply(reply, context);
}

/* Commands leave at once, without the ioloop. */
static void test_dovetail_redis_write(void)
{
	struct client client = { .str = NULL };
	unsigned int i;

	test_begin("dovetail redis: write");
	server_start(no_args);
	client_init(&client, unix_url(), NULL, 1000);
	test_assert(client_wait(&client, 1, 0, 0));

	client_send(&client, "SET", "key", "one");
	for (i = 0; i < 100; i++) {
		if (strcmp(raw_ask("GET key\r\n"), "$3\r\none\r\n") == 0)
			break;
		usleep(10000);
	}
	test_assert(i < 100);
	test_assert(client.reply_count == 0);
	test_assert(client_wait(&client, 0, 0, 1));

	/* inside a callback */
	dovetail_redis_commandl(client.redis, send_in_reply, &client,
				"PING", NULL);
	test_assert(client_wait(&client, 0, 0, 3));
	test_assert_strcmp(raw_ask("GET key\r\n"), "$3\r\ntwo\r\n");

	/* the server is away: no callback inside */
	test_expect_errors(1);
	server_kill();
	client_send(&client, "PING");
	client_send(&client, "PING");
	test_assert(client.null_count == 0 && client.lost_count == 0);
	test_assert(client_wait(&client, 0, 1, 0));
	test_assert(client.null_count == 2);
	run_msecs(100);
	test_expect_no_more_errors();
	client_deinit(&client);
	test_end();
}

/* All have been ready, and lost, so often; one may stop the other's loop. */
static void clients_wait(struct client *clients, unsigned int count,
			 unsigned int ready, unsigned int lost)
{
	unsigned int i;

	for (i = 0; i < count; i++) {
		while (clients[i].ready_count < ready ||
		       clients[i].lost_count < lost) {
			if (!client_wait(&clients[i], ready, lost, 0)) {
				test_assert_idx(FALSE, i);
				return;
			}
		}
	}
}

/* One outage, however many connections have it. */
static void test_dovetail_redis_outage(void)
{
	struct client clients[3];
	unsigned int i;

	test_begin("dovetail redis: one outage");
	server_start(no_args);
	i_zero(&clients);
	for (i = 0; i < N_ELEMENTS(clients); i++) {
		client_init(&clients[i], i == 0 ? tcp_url() : unix_url(), NULL,
			    2000);
	}
	clients_wait(clients, 3, 1, 0);
	test_expect_errors(1);
	server_kill();
	clients_wait(clients, 3, 1, 1);
	run_msecs(200);
	test_expect_no_more_errors();
	/* one of them is given up */
	client_deinit(&clients[0]);
	server_start(no_args);
	clients_wait(clients + 1, 2, 2, 1);
	/* the next one is news */
	test_expect_errors(1);
	server_kill();
	clients_wait(clients + 1, 2, 2, 2);
	run_msecs(100);
	test_expect_no_more_errors();
	for (i = 1; i < N_ELEMENTS(clients); i++)
		client_deinit(&clients[i]);
	test_end();
}

/* ---- with servers that misbehave ---- */

struct fake {
	int fd, client_fd;
	struct io *io, *client_io;
	const char *answer;
	unsigned int accept_count;
	bool close_after;
};

static void fake_disconnect(struct fake *fake)
{
	io_remove(&fake->client_io);
	i_close_fd(&fake->client_fd);
}

static void fake_input(struct fake *fake)
{
	char buf[1024];

	if (read(fake->client_fd, buf, sizeof(buf)) <= 0) {
		fake_disconnect(fake);
		return;
	}
	if (fake->answer != NULL &&
	    write(fake->client_fd, fake->answer, strlen(fake->answer)) < 0)
		i_fatal("write() failed: %m");
	if (fake->close_after)
		fake_disconnect(fake);
}

static void fake_accept(struct fake *fake)
{
	if (fake->client_fd != -1)
		fake_disconnect(fake);
	fake->client_fd = net_accept(fake->fd, NULL, NULL);
	if (fake->client_fd < 0)
		i_fatal("accept() failed: %m");
	fake->accept_count++;
	fake->client_io = io_add(fake->client_fd, IO_READ, fake_input, fake);
}

static void fake_start(struct fake *fake, const char *answer)
{
	i_zero(fake);
	fake->client_fd = -1;
	fake->answer = answer;
	i_unlink_if_exists(socket_path);
	fake->fd = net_listen_unix(socket_path, 8);
	if (fake->fd == -1)
		i_fatal("listen(%s) failed: %m", socket_path);
	fake->io = io_add(fake->fd, IO_READ, fake_accept, fake);
}

static void fake_stop(struct fake *fake)
{
	if (fake->client_fd != -1)
		fake_disconnect(fake);
	io_remove(&fake->io);
	i_close_fd(&fake->fd);
	i_unlink_if_exists(socket_path);
}

static void test_dovetail_redis_misbehaving(void)
{
	static const struct {
		const char *answer, *password, *error;
	} tests[] = {
		{ "HTTP/1.1 400 Bad Request\r\n\r\n", NULL,
		  "The server does not speak Redis' protocol: "
		  "Protocol error, got \"H\" as reply type byte" },
		{ "-LOADING Redis is loading the dataset in memory\r\n", NULL,
		  "PING failed: LOADING Redis is loading the dataset in "
		  "memory" },
		{ "-ERR max number of clients reached\r\n", "pw",
		  "AUTH failed: ERR max number of clients reached" },
		/* do not log what it repeats */
		{ "-ERR unknown command 'AUTH', with args beginning with: "
		  "'pw'\r\n", "pw",
		  "AUTH failed: ERR unknown command 'AUTH'" },
		{ "-ERR \x1b[2J\x01\r\n", NULL, "PING failed: ERR ?[2J?" },
	};
	struct fake fake;
	unsigned int i;

	test_begin("dovetail redis: misbehaving servers");
	for (i = 0; i < N_ELEMENTS(tests); i++) {
		fake_start(&fake, tests[i].answer);
		test_refused(unix_url(), tests[i].password, tests[i].error);
		test_assert_idx(fake.accept_count >= 2, i);
		fake_stop(&fake);
	}
	fake_start(&fake, NULL);
	fake.close_after = TRUE;
	test_refused(unix_url(), NULL, "The server closed the connection");
	fake_stop(&fake);
	test_end();
}

static void test_dovetail_redis_unasked(void)
{
	static const struct {
		const char *answer, *error;
	} tests[] = {
		{ "+PONG\r\n+PONG\r\n",
		  "The server sent a reply that nobody asked for" },
		{ "+PONG\r\n-ERR going down\r\n",
		  "The server says: ERR going down" },
		{ "+PONG\r\n*2\r\n*0\r\n*-1\r\n$-1\r\n",
		  "The server sent a reply that nobody asked for" },
	};
	struct client client = { .str = NULL };
	struct fake fake;
	unsigned int i;

	test_begin("dovetail redis: replies nobody asked for");
	for (i = 0; i < N_ELEMENTS(tests); i++) {
		fake_start(&fake, tests[i].answer);
		test_expect_error_string(tests[i].error);
		client_init(&client, unix_url(), NULL, 1000);
		test_assert_idx(client_wait(&client, 1, 1, 0), i);
		test_assert_strcmp_idx(dovetail_redis_last_error(client.redis),
				       tests[i].error, i);
		client_deinit(&client);
		test_expect_no_more_errors();
		fake_stop(&fake);
	}
	test_end();
}

static void test_dovetail_redis_silent(void)
{
	struct client client = { .str = NULL };
	struct fake fake;

	test_begin("dovetail redis: silent server");
	fake_start(&fake, NULL);
	test_expect_error_string("The server does not answer");
	client_init(&client, unix_url(), NULL, 100);
	run_msecs(750);
	test_expect_no_more_errors();
	/* at 0, 175, 400, 725 */
	test_assert(fake.accept_count >= 2 && fake.accept_count <= 4);
	test_assert(client.ready_count == 0 && client.lost_count == 0);

	/* it comes back to life, and is lost without a command */
	fake.answer = "+PONG\r\n";
	test_assert(client_wait(&client, 1, 0, 0));
	run_msecs(200);
	test_assert(dovetail_redis_is_ready(client.redis));
	test_expect_error_string("The server closed the connection");
	fake_disconnect(&fake);
	test_assert(client_wait(&client, 1, 1, 0));
	test_expect_no_more_errors();
	test_assert(client_wait(&client, 2, 1, 0));
	client_deinit(&client);
	fake_stop(&fake);
	test_end();
}

/* A long answer over a slow line: the server is alive. */
static void test_dovetail_redis_slow(void)
{
	struct client client = { .str = NULL };
	struct fake fake;
	unsigned int i;

	test_begin("dovetail redis: slow answer");
	fake_start(&fake, "+PONG\r\n");
	client_init(&client, unix_url(), NULL, 200);
	test_assert(client_wait(&client, 1, 0, 0));
	fake.answer = "$50\r\n";
	client_send(&client, "GET", "key");
	for (i = 0; i < 5; i++) {
		run_msecs(100);
		if (write(fake.client_fd, "0123456789", 10) < 0)
			i_fatal("write() failed: %m");
	}
	test_assert(client.reply_count == 0);
	if (write(fake.client_fd, "\r\n", 2) < 0)
		i_fatal("write() failed: %m");
	test_assert(client_wait(&client, 0, 0, 1));
	test_assert(str_len(client.str) == 50 && client.lost_count == 0);
	client_deinit(&client);
	fake_stop(&fake);
	test_end();
}

static void test_dovetail_redis_backoff(void)
{
	struct client client = { .str = NULL };
	struct fake fake;
	struct timeval start;

	test_begin("dovetail redis: backoff");
	/* A server that takes every connection and drops it: not more than a
	   few attempts, though each is a success for a moment. */
	fake_start(&fake, "+PONG\r\n");
	fake.close_after = TRUE;
	test_expect_errors(4);
	start = ioloop_timeval;
	client_init(&client, unix_url(), NULL, 1000);
	test_assert(client_wait(&client, 0, 4, 0));
	/* 50, 100, 200 */
	test_assert(timeval_diff_msecs(&ioloop_timeval, &start) >= 340);
	test_assert(fake.accept_count == 4 && client.ready_count == 4);
	client_deinit(&client);
	fake_stop(&fake);
	test_end();
}

/* ---- main ---- */

static void test_setup(void)
{
	char *dir = i_strdup_printf("%s/dovetail-test-XXXXXX",
		getenv("TMPDIR") == NULL ? "/tmp" : getenv("TMPDIR"));

	if (mkdtemp(dir) == NULL)
		i_fatal("mkdtemp(%s) failed: %m", dir);
	test_dir = dir;
	socket_path = i_strconcat(dir, "/redis.sock", NULL);
	server_port = test_free_port();
	ioloop = io_loop_create();
	test_begin("setup");
	test_end();
}

static void test_cleanup(void)
{
	const char *error;

	test_begin("cleanup");
	if (server_pid != -1)
		server_kill();
	io_loop_destroy(&ioloop);
	test_assert(unlink_directory(test_dir, UNLINK_DIRECTORY_FLAG_RMDIR,
				     &error) >= 0);
	test_end();
}

int main(void)
{
	static void (*const test_functions[])(void) = {
		test_setup,
		test_dovetail_redis_connect,
		test_dovetail_redis_auth,
		test_dovetail_redis_db,
		test_dovetail_redis_restart,
		test_dovetail_redis_timeout,
		test_dovetail_redis_deinit,
		test_dovetail_redis_binary,
		test_dovetail_redis_write,
		test_dovetail_redis_outage,
		test_dovetail_redis_misbehaving,
		test_dovetail_redis_unasked,
		test_dovetail_redis_silent,
		test_dovetail_redis_slow,
		test_dovetail_redis_backoff,
		test_cleanup,
		NULL
	};

	/* as in every service */
	(void)signal(SIGPIPE, SIG_IGN);
	server_path = getenv("REDIS_SERVER");
	if (server_path == NULL || *server_path == '\0')
		server_path = "redis-server";
	if (system(t_strdup_printf("\"%s\" --version >/dev/null 2>&1",
				   server_path)) != 0) {
		fprintf(stderr, "%s cannot be run: skipped\n", server_path);
		return TEST_SKIP_STATUS;
	}
	return test_run(test_functions);
}
