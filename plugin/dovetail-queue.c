/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* The service dovetail-queue: from start to stop. See dovetail-queue-private.h
   for what is in between. */

#include "lib.h"
#include "array.h"
#include "buffer.h"
#include "hash.h"
#include "ioloop.h"
#include "master-service.h"
#include "master-service-settings.h"
#include "net.h"
#include "priorityq.h"
#include "restrict-access.h"
#include "safe-memset.h"
#include "settings-parser.h"
#include "dovetail-compat.h"
#include "dovetail-queue-private.h"
#include "dovetail-service.h"

#include <fcntl.h>
#include <pwd.h>
#include <unistd.h>
#include <sys/file.h>
#include <sys/stat.h>

#define QUEUE_SERVICE_NAME "dovetail-queue"
/* A command that takes longer is a lost connection. */
#define REDIS_TIMEOUT_MSECS 5000
/* how long the end waits for answers of Redis */
#define STOP_TIMEOUT_MSECS 1000
#define REPLAY_SERVICE_NAME "dovetail-replay"
#define HEALTH_SERVICE_NAME "dovetail-health"
#define REPLAY_KNOCK_MSECS (10 * 1000)
/* The queue may take more again when it is down to this part of its maximum. */
#define QUEUE_FULL_UNTIL(max) ((max) / 8 * 7)

static struct event_category event_category_dovetail = {
	.name = "dovetail",
};

static struct dovetail_queue *queue;
static int lock_fd = -1;
static char *replay_socket;
static struct timeout *to_knock;

/* ---- running ---- */

void dovetail_queue_check_full(struct dovetail_queue *q)
{
	struct dovetail_queue_backlog_sum sum;
	uint64_t bytes = 0;
	unsigned int i;

	for (i = 0; i < q->logs_count; i++) {
		dovetail_queue_backlog_total(q->logs[i].backlog, &sum);
		bytes += sum.bytes;
	}
	if (!q->full && bytes > q->set.queue_max_size) {
		q->full = TRUE;
		e_error(event_create_passthrough(q->event)->
			add_int("bytes", bytes)->event(),
			"The queue is full: replicas have not confirmed "
			"%"PRIu64" bytes (dovetail_queue_max_size). "
			"Changes are left to be read from the mailboxes later",
			bytes);
	} else if (q->full &&
		   bytes <= QUEUE_FULL_UNTIL(q->set.queue_max_size)) {
		q->full = FALSE;
		e_info(q->event, "The queue has room again");
	}
}

void dovetail_queue_log_synced(struct dovetail_queue *q)
{
	unsigned int i;

	for (i = 0; i < q->logs_count; i++) {
		if (!q->logs[i].synced_once)
			return;
	}
	/* not before: what is reported is compared with the logs */
	dovetail_queue_acks_start(q);
}

static void queue_redis_ready(void *context)
{
	struct dovetail_queue *q = context;
	unsigned int i;

	for (i = 0; i < q->logs_count; i++)
		dovetail_queue_log_redis_ready(&q->logs[i]);
}

static void queue_redis_lost(void *context)
{
	struct dovetail_queue *q = context;
	unsigned int i;

	for (i = 0; i < q->logs_count; i++)
		dovetail_queue_log_redis_lost(&q->logs[i]);
}

/* Start using Redis, when the process before us has ended. */
static void queue_try_start(struct dovetail_queue *q)
{
	static const struct dovetail_redis_callbacks callbacks = {
		.ready = queue_redis_ready,
		.lost = queue_redis_lost,
	};
	const char *error;
	unsigned int i;

	if (flock(lock_fd, LOCK_EX | LOCK_NB) < 0) {
		if (errno == EWOULDBLOCK || errno == EINTR)
			return;
		i_fatal("flock(%s/lock) failed: %m", q->set.state_dir);
	}
	for (i = 0; i < q->logs_count; i++) {
		if (dovetail_queue_log_init(q, &q->logs[i], i, &error) < 0)
			i_fatal("%s", error);
	}
	if (dovetail_queue_users_init(q, &error) < 0)
		i_fatal("%s", error);
	q->started = TRUE;
	q->started_msecs = dovetail_monotonic_msecs();
	if (q->peers_count > 0) {
		q->redis = dovetail_redis_init(q->event, &q->set.redis,
					       q->password, q->tls,
					       REDIS_TIMEOUT_MSECS,
					       &callbacks, q);
	}
	dovetail_queue_conns_start(q);
}

static void queue_tick(struct dovetail_queue *q)
{
	unsigned int i;

	if (!q->started) {
		queue_try_start(q);
		return;
	}
	for (i = 0; i < q->logs_count; i++) T_BEGIN {
		dovetail_queue_log_tick(&q->logs[i]);
	} T_END;
	dovetail_queue_acks_tick(q);
	dovetail_queue_users_tick(q);
	dovetail_queue_conns_tick(q);
	dovetail_queue_conns_flush(q);
}

/* After a failed start Dovecot's master waits a while ("throttling"), and then
   until somebody connects to the service; it does not go back to
   process_min_avail by itself. Nobody else connects to dovetail-replay. Where
   processes run one of them takes the connection, which has the master look,
   too, whether there are enough. (Errors: it is not configured here, or not for
   us, or there are many connections already.) */
static void queue_knock(void *context ATTR_UNUSED)
{
	int fd = net_connect_unix(replay_socket);

	i_close_fd(&fd);
}

/* ---- start ---- */

/* Make the directories for the user we will be. dovetail_state_dir itself is
   root's; each service has a directory of its own in it. */
static void queue_make_state_dir(pool_t pool, struct dovetail_settings *set,
				 uid_t uid, gid_t gid)
{
	dovetail_service_make_dir(set->state_dir, 0711, geteuid(), getegid());
	set->state_dir = p_strconcat(pool, set->state_dir, "/queue", NULL);
	dovetail_service_make_dir(set->state_dir, 0700, uid, gid);
	dovetail_service_make_dir(t_strconcat(set->state_dir, "/dirty", NULL), 0700,
		       uid, gid);
}

static void queue_open_lock(const struct dovetail_settings *set)
{
	const char *path = t_strconcat(set->state_dir, "/lock", NULL);

	lock_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (lock_fd == -1) {
		i_fatal("open(%s) failed: %m (the files in %s must belong to "
			"the user of service "QUEUE_SERVICE_NAME": uid %s)",
			path, set->state_dir, dec2str(geteuid()));
	}
}

/* The service's user, as the master tells it; with user = root that is
   default_internal_user: nothing we do later needs root. */
static void queue_get_user(const struct dovetail_compat_service *service,
			   struct restrict_access_settings *rset)
{
	const struct passwd *pw;

	restrict_access_get_env(rset);
	if (geteuid() != 0)
		rset->uid = geteuid();
	else if (rset->uid == 0 || rset->uid == (uid_t)-1) {
		pw = getpwnam(service->default_internal_user);
		if (pw == NULL) {
			i_fatal("default_internal_user: User %s does not exist",
				service->default_internal_user);
		}
		rset->uid = pw->pw_uid;
		if (rset->gid == 0 || rset->gid == (gid_t)-1)
			rset->gid = pw->pw_gid;
	}
	if (rset->gid == (gid_t)-1)
		rset->gid = getegid();
}

static void queue_init_peers(struct dovetail_queue *q)
{
	const struct dovetail_public_key *keys;
	unsigned int i;

	q->peers_count = str_array_length(q->set.peers);
	if (q->peers_count > DOVETAIL_RECIPIENTS_MAX) {
		i_fatal("dovetail_peers: More than %u nodes",
			DOVETAIL_RECIPIENTS_MAX);
	}
	q->peers = i_new(struct dovetail_queue_peer, q->peers_count + 1);
	for (i = 0; i < q->peers_count; i++) {
		q->peers[i].node = q->set.peers[i];
		q->peers[i].idx = i;
		q->peers[i].shards = i_new(struct dovetail_queue_peer_shard,
					   q->logs_count);
	}

	keys = dovetail_keyring_peers(q->keyring, &q->recipients_count);
	if (q->recipients_count > DOVETAIL_RECIPIENTS_MAX) {
		i_fatal("dovetail_peers: More than %u public keys together",
			DOVETAIL_RECIPIENTS_MAX);
	}
	q->recipients = i_new(const struct dovetail_public_key *,
			      q->recipients_count + 1);
	for (i = 0; i < q->recipients_count; i++)
		q->recipients[i] = &keys[i];
}

static struct dovetail_queue *
queue_init(const struct dovetail_settings *set,
	   struct dovetail_keyring *keyring, char *password,
	   struct dovetail_redis_tls *tls)
{
	struct dovetail_queue *q;

	q = i_new(struct dovetail_queue, 1);
	q->event = event_create(NULL);
	event_add_category(q->event, &event_category_dovetail);
	event_add_str(q->event, "node", set->node);
	q->set = *set;
	q->keyring = keyring;
	q->password = password;
	q->tls = tls;
	q->dirty_dir = i_strconcat(set->state_dir, "/dirty", NULL);
	q->uid = geteuid();
	q->logs_count = set->shards;
	q->logs = i_new(struct dovetail_queue_log, q->logs_count);
	queue_init_peers(q);
	q->positions =
		dovetail_queue_positions_init(DOVETAIL_QUEUE_POSITIONS_MAX);
	q->entry_buf = buffer_create_dynamic(default_pool, 4096);
	i_array_init(&q->flush, 16);
	q->to_tick = timeout_add_short(DOVETAIL_QUEUE_TICK_MSECS, queue_tick, q);
	queue_try_start(q);
	return q;
}

/* ---- stop ---- */

static bool queue_is_idle(const struct dovetail_queue *q)
{
	unsigned int i;

	if (!q->started)
		return TRUE;
	for (i = 0; i < q->logs_count; i++) {
		if (!dovetail_queue_log_is_idle(&q->logs[i]))
			return FALSE;
	}
	return TRUE;
}

static void queue_stop_tick(struct dovetail_queue *q)
{
	if (queue_is_idle(q))
		io_loop_stop(current_ioloop);
}

static void queue_stop_timeout(bool *timed_out)
{
	*timed_out = TRUE;
	io_loop_stop(current_ioloop);
}

/* Let Redis answer what is on its way, but not for long. */
static void queue_finish(struct dovetail_queue *q)
{
	struct timeout *to, *to_tick;
	bool timed_out = FALSE;

	q->stopping = TRUE;
	master_service_stop_new_connections(master_service);
	if (queue_is_idle(q))
		return;
	to = timeout_add(STOP_TIMEOUT_MSECS, queue_stop_timeout, &timed_out);
	to_tick = timeout_add_short(2, queue_stop_tick, q);
	/* the end of the last connection stops the loop, too */
	while (!timed_out && !queue_is_idle(q))
		io_loop_run(current_ioloop);
	timeout_remove(&to);
	timeout_remove(&to_tick);
}

static void queue_deinit(struct dovetail_queue **_queue)
{
	struct dovetail_queue *q = *_queue;
	unsigned int i, j;

	*_queue = NULL;
	queue_finish(q);
	timeout_remove(&q->to_tick);
	dovetail_queue_acks_stop(q);
	dovetail_redis_deinit(&q->redis);
	for (i = 0; i < q->logs_count; i++)
		dovetail_queue_log_deinit(&q->logs[i]);
	dovetail_queue_conns_deinit(q);
	dovetail_queue_users_deinit(q);
	dovetail_queue_positions_deinit(&q->positions);
	dovetail_keyring_close(&q->keyring);
	if (q->password != NULL)
		safe_memset(q->password, 0, strlen(q->password));
	i_free(q->password);
	dovetail_redis_tls_deinit(&q->tls);

	for (i = 0; i < q->peers_count; i++) {
		for (j = 0; j < q->logs_count; j++) {
			i_free(q->peers[i].shards[j].error);
			pool_unref(&q->peers[i].shards[j].troubles_pool);
		}
		i_free(q->peers[i].shards);
	}
	i_free(q->peers);
	i_free(q->recipients);
	i_free(q->logs);
	i_free(q->dirty_dir);
	buffer_free(&q->entry_buf);
	array_free(&q->flush);
	event_unref(&q->event);
	i_free(q);
	/* the next process may start */
	i_close_fd(&lock_fd);
}

/* ---- main ---- */

/* Who owns the listener may speak for every user. */
static uid_t listener_owner(int listen_fd)
{
	const char *path;
	struct stat st;

	if (net_getunixname(listen_fd, &path) < 0 || stat(path, &st) < 0)
		return 0;
	return st.st_uid;
}

static void client_connected(struct master_service_connection *conn)
{
	master_service_client_connection_accept(conn);
	dovetail_queue_conn_create(queue, conn->fd,
				   listener_owner(conn->listen_fd));
}

int main(int argc, char *argv[])
{
	struct dovetail_compat_service service;
	struct dovetail_settings set;
	struct dovetail_keyring *keyring;
	struct restrict_access_settings rset;
	const char *error;
	struct dovetail_redis_tls *tls;
	char *password;
	pool_t pool;

	master_service = master_service_init(QUEUE_SERVICE_NAME,
					     DOVETAIL_COMPAT_SERVICE_FLAGS,
					     &argc, &argv, "");
	if (master_getopt(master_service) > 0)
		return FATAL_DEFAULT;
	master_service_init_log(master_service);
	if (!dovetail_compat_version_is_ours(master_service, &error))
		i_fatal("%s", error);

	/* As root: settings, keys, passwords, directories. */
	if (dovetail_compat_service_settings_read(master_service,
						  QUEUE_SERVICE_NAME,
						  &service, &error) < 0)
		i_fatal("Error reading configuration: %s", error);
	master_service_init_log(master_service);

	pool = pool_alloconly_create("dovetail settings", 1024);
	if (!dovetail_settings_are_set(dovetail_compat_service_setting,
				       &service))
		i_fatal("dovetail_node is not set");
	if (dovetail_settings_parse(pool, service.base_dir,
				    dovetail_compat_service_setting, &service,
				    &set, &error) < 0)
		i_fatal("%s", error);
	if (sodium_init() < 0)
		i_fatal("sodium_init() failed");
	if (dovetail_keyring_open(set.key_dir, set.node, set.peers, &keyring,
				  &error) < 0)
		i_fatal("%s", error);
	password = dovetail_service_read_password(set.key_dir);
	tls = dovetail_service_tls_init(&set);
	queue_get_user(&service, &rset);
	dovetail_compat_service_settings_free(&service);
	queue_make_state_dir(pool, &set, rset.uid, rset.gid);

	restrict_access(&rset, RESTRICT_ACCESS_FLAG_ALLOW_ROOT, NULL);
	/* core files would have the key in them */
	restrict_access_allow_coredumps(FALSE);
	queue_open_lock(&set);
	queue = queue_init(&set, keyring, password, tls);
	replay_socket = i_strconcat(service.base_dir, "/"REPLAY_SERVICE_NAME,
				    NULL);
	if (set.peers[0] != NULL)
		to_knock = timeout_add(REPLAY_KNOCK_MSECS, queue_knock, NULL);

	dovetail_queue_health_init(queue, t_strconcat(service.base_dir,
						"/"HEALTH_SERVICE_NAME, NULL));

	/* After a reload or at the end, when the master closes its pipe: do not
	   wait for the clients to go, they come back by themselves. */
	master_service_set_die_with_master(master_service, TRUE);
	master_service_init_finish(master_service);
	master_service_run(master_service, client_connected);

	timeout_remove(&to_knock);
	dovetail_queue_health_deinit();
	i_free(replay_socket);
	queue_deinit(&queue);
	pool_unref(&pool);
	master_service_deinit(&master_service);
	return 0;
}
