/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* Who is the primary of this user? The userdb knows, as it does for Dovecot's own
   services, and is asked through Dovecot's auth service:

     > VERSION 1 1                    (words are separated by tabs)
     > USER id name service=lmtp
     < USER id name field=value ...   or: NOTFOUND id, or: FAIL id ...

   Nothing waits in here: who asks is told to come again. What was answered is
   remembered for some seconds, so that a mail to many costs one question. */

#include "lib.h"
#include "array.h"
#include "hash.h"
#include "ioloop.h"
#include "istream.h"
#include "llist.h"
#include "net.h"
#include "ostream.h"
#include "str-sanitize.h"
#include "strescape.h"
#include "dovetail-compat.h"
#include "dovetail-health-private.h"
#include "dovetail-service.h"

#define USERDB_VERSION "1"
#define USERDB_USERS_MAX 10000
#define USERDB_REMEMBER_MSECS (10 * 1000)
/* It did not work: those who wait have to learn it, others may try again. */
#define USERDB_FAILED_MSECS 1000
#define USERDB_TIMEOUT_MSECS (5 * 1000)
#define USERDB_TICK_MSECS 500
#define USERDB_LINE_MAX_SIZE (64 * 1024)

struct userdb_user {
	/* of those being asked about, or of those known, the oldest first */
	struct userdb_user *prev, *next;
	char *name;
	unsigned int id;
	/* HEALTH_USERDB_WAIT: asked */
	enum health_userdb_ret ret;
	/* when found: of the settings */
	const char *primary;
	/* when it was asked, then when it was answered */
	uint64_t msecs;
};

static struct {
	HASH_TABLE(char *, struct userdb_user *) users;
	struct userdb_user *asked_head, *asked_tail;
	struct userdb_user *known_head, *known_tail;
	unsigned int last_id;

	int fd;
	struct io *io;
	struct istream *input;
	struct ostream *output;
	bool version_received;
	struct timeout *to_tick;
} userdb = { .fd = -1 };

/* ---- users ---- */

static void userdb_user_forget(struct userdb_user *user)
{
	DLLIST2_REMOVE(&userdb.known_head, &userdb.known_tail, user);
	hash_table_remove(userdb.users, user->name);
	i_free(user->name);
	i_free(user);
}

static void userdb_user_answered(struct userdb_user *user,
				 enum health_userdb_ret ret,
				 const char *primary)
{
	DLLIST2_REMOVE(&userdb.asked_head, &userdb.asked_tail, user);
	user->ret = ret;
	user->primary = primary;
	user->msecs = dovetail_monotonic_msecs();
	DLLIST2_APPEND(&userdb.known_head, &userdb.known_tail, user);
}

static bool userdb_user_is_old(const struct userdb_user *user)
{
	return dovetail_monotonic_msecs() - user->msecs >=
		(user->ret == HEALTH_USERDB_FAILED ? USERDB_FAILED_MSECS :
		 USERDB_REMEMBER_MSECS);
}

/* ---- the connection ---- */

static void userdb_disconnect(void)
{
	io_remove(&userdb.io);
	i_stream_destroy(&userdb.input);
	o_stream_destroy(&userdb.output);
	if (userdb.fd != -1)
		net_disconnect(userdb.fd);
	userdb.fd = -1;
}

/* All that was asked has failed. */
static void userdb_fail(const char *reason)
{
	userdb_disconnect();
	if (userdb.asked_head == NULL)
		return;
	if (health_may_log()) {
		e_warning(health.event, "userdb %s: %s",
			  health.set.health_userdb, reason);
	}
	while (userdb.asked_head != NULL) {
		userdb_user_answered(userdb.asked_head, HEALTH_USERDB_FAILED,
				     NULL);
	}
}

/* The node that the userdb names, or the default; NULL: it is no node of ours. */
static const char *userdb_primary(const char *const *fields)
{
	const char *name = health.set.primary;
	unsigned int i;

	for (; *fields != NULL; fields++) {
		if (str_begins_with(*fields, "dovetail_primary="))
			name = *fields + strlen("dovetail_primary=");
	}
	if (strcmp(name, health.set.node) == 0)
		return health.set.node;
	for (i = 0; health.set.peers[i] != NULL; i++) {
		if (strcmp(name, health.set.peers[i]) == 0)
			return health.set.peers[i];
	}
	if (health_may_log()) {
		e_warning(health.event, "userdb %s: dovetail_primary is %s, "
			  "which is neither this node nor one of "
			  "dovetail_peers", health.set.health_userdb,
			  str_sanitize(name, 128));
	}
	return NULL;
}

static int userdb_version(const char *const *args)
{
	/* before that, the service says other things about itself */
	if (strcmp(args[0], "VERSION") != 0)
		return 0;
	if (args[1] == NULL || strcmp(args[1], USERDB_VERSION) != 0)
		return -1;
	userdb.version_received = TRUE;
	return 0;
}

static int userdb_line(const char *line)
{
	const char *const *args = t_strsplit_tabescaped(line);
	const char *primary = NULL;
	struct userdb_user *user;
	enum health_userdb_ret ret;
	unsigned int id;

	if (args[0] == NULL)
		return -1;
	if (!userdb.version_received)
		return userdb_version(args);
	if (strcmp(args[0], "USER") == 0)
		ret = HEALTH_USERDB_FOUND;
	else if (strcmp(args[0], "NOTFOUND") == 0)
		ret = HEALTH_USERDB_NO_USER;
	else if (strcmp(args[0], "FAIL") == 0)
		ret = HEALTH_USERDB_FAILED;
	else
		return 0;
	if (args[1] == NULL || str_to_uint(args[1], &id) < 0)
		return -1;
	/* mostly it is the first */
	for (user = userdb.asked_head; user != NULL; user = user->next) {
		if (user->id == id)
			break;
	}
	if (user == NULL)
		return -1;
	if (ret == HEALTH_USERDB_FOUND) {
		if (args[2] == NULL)
			return -1;
		primary = userdb_primary(args + 3);
		if (primary == NULL)
			ret = HEALTH_USERDB_FAILED;
	}
	userdb_user_answered(user, ret, primary);
	return 0;
}

static void userdb_input(void *context ATTR_UNUSED)
{
	const char *line;
	int ret = 0;

	switch (i_stream_read(userdb.input)) {
	case -1:
		/* Dovecot has been reloaded perhaps: the tick asks again */
		userdb_disconnect();
		break;
	case -2:
		userdb_fail("It has sent too long a line");
		break;
	default:
		while (ret == 0 &&
		       (line = i_stream_next_line(userdb.input)) != NULL) {
			T_BEGIN {
				ret = userdb_line(line);
			} T_END;
		}
		if (ret < 0)
			userdb_fail("It has sent what makes no sense");
		break;
	}
	health_conns_resume();
}

/* Returns 0, or -1 and errno. */
static int userdb_connect(void)
{
	if (userdb.fd != -1)
		return 0;
	userdb.fd = net_connect_unix(health.set.health_userdb);
	if (userdb.fd == -1)
		return -1;
	net_set_nonblock(userdb.fd, TRUE);
	userdb.version_received = FALSE;
	userdb.input = i_stream_create_fd(userdb.fd, USERDB_LINE_MAX_SIZE);
	userdb.output = o_stream_create_fd(userdb.fd, SIZE_MAX);
	o_stream_set_no_error_handling(userdb.output, TRUE);
	userdb.io = io_add(userdb.fd, IO_READ, userdb_input, NULL);
	o_stream_nsend_str(userdb.output, "VERSION\t"USERDB_VERSION"\t1\n");
	return 0;
}

static void userdb_ask(const struct userdb_user *user)
{
	o_stream_nsend_str(userdb.output, t_strdup_printf(
		"USER\t%u\t%s\t"DOVETAIL_COMPAT_AUTH_SERVICE"=lmtp\n",
		user->id, str_tabescape(user->name)));
}

static void userdb_tick(void *context ATTR_UNUSED)
{
	struct userdb_user *user;

	if (userdb.asked_head == NULL) {
		timeout_remove(&userdb.to_tick);
	} else if (dovetail_monotonic_msecs() - userdb.asked_head->msecs >=
		   USERDB_TIMEOUT_MSECS) {
		userdb_fail("It does not answer");
		health_conns_resume();
	} else if (userdb.fd == -1 && userdb_connect() == 0) {
		for (user = userdb.asked_head; user != NULL; user = user->next)
			T_BEGIN { userdb_ask(user); } T_END;
	}
}

/* ---- in ---- */

enum health_userdb_ret
health_userdb_lookup(const char *name, const char **primary_r)
{
	struct userdb_user *user = hash_table_lookup(userdb.users, name);

	*primary_r = NULL;
	if (user != NULL && user->ret != HEALTH_USERDB_WAIT &&
	    userdb_user_is_old(user)) {
		userdb_user_forget(user);
		user = NULL;
	}
	if (user != NULL) {
		*primary_r = user->primary;
		return user->ret;
	}
	while (hash_table_count(userdb.users) >= USERDB_USERS_MAX &&
	       userdb.known_head != NULL)
		userdb_user_forget(userdb.known_head);
	if (hash_table_count(userdb.users) >= USERDB_USERS_MAX)
		return HEALTH_USERDB_FAILED;
	if (userdb_connect() < 0 && errno != ECONNREFUSED && errno != EAGAIN) {
		/* it is not there, and will not be in a moment */
		if (health_may_log()) {
			e_warning(health.event, "userdb: connect(%s) failed: "
				  "%m", health.set.health_userdb);
		}
		return HEALTH_USERDB_FAILED;
	}

	user = i_new(struct userdb_user, 1);
	user->name = i_strdup(name);
	user->id = ++userdb.last_id;
	user->ret = HEALTH_USERDB_WAIT;
	user->msecs = dovetail_monotonic_msecs();
	hash_table_insert(userdb.users, user->name, user);
	DLLIST2_APPEND(&userdb.asked_head, &userdb.asked_tail, user);
	if (userdb.fd != -1)
		userdb_ask(user);
	if (userdb.to_tick == NULL) {
		userdb.to_tick = timeout_add_short(USERDB_TICK_MSECS,
						   userdb_tick, NULL);
	}
	return HEALTH_USERDB_WAIT;
}

void health_userdb_init(void)
{
	hash_table_create(&userdb.users, default_pool, 0, str_hash, strcmp);
}

void health_userdb_deinit(void)
{
	/* those who wait have gone */
	while (userdb.asked_head != NULL) {
		userdb_user_answered(userdb.asked_head, HEALTH_USERDB_FAILED,
				     NULL);
	}
	userdb_disconnect();
	timeout_remove(&userdb.to_tick);
	while (userdb.known_head != NULL)
		userdb_user_forget(userdb.known_head);
	hash_table_destroy(&userdb.users);
}
