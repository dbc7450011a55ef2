/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* The service dovetail-replay: start, privileges, and which worker this is. */

#include "lib.h"
#include "array.h"
#include "ioloop.h"
#include "master-service.h"
#include "master-service-settings.h"
#include "restrict-access.h"
#include "safe-memset.h"
#include "settings-parser.h"
#include "mail-storage-service.h"
#include "dovetail-compat.h"
#include "dovetail-plugin.h"
#include "dovetail-queue-client.h"
#include "dovetail-replay.h"
#include "dovetail-service.h"

#include <fcntl.h>
#include <unistd.h>
#include <sys/file.h>

/* While a worker of before a reload ends, its slot is taken. */
#define SLOT_RETRY_MSECS 100

static struct event_category event_category_dovetail = {
	.name = "dovetail",
};

struct replay replay;
static struct timeout *to_slot;
static bool running = FALSE;

/* Each worker takes a slot no other one has. When its file cannot be opened,
   because the disk is read-only or full, it waits: Dovecot's master would start
   it again only when dovetail-queue knocks, which may have ended of the same. */
static bool replay_take_slot(void)
{
	static bool logged = FALSE;
	const char *path;
	unsigned int slot;
	int fd;

	for (slot = 0; slot < replay.slots; slot++) {
		path = t_strdup_printf("%s/slot.%u", replay.dir, slot);
		fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
		if (fd == -1) {
			if (!logged) {
				e_error(replay.event, "open(%s) failed: %m "
					"(trying again)", path);
			}
			logged = TRUE;
			return FALSE;
		}
		if (flock(fd, LOCK_EX | LOCK_NB) == 0) {
			replay.slot = slot;
			replay.lock_fd = fd;
			return TRUE;
		}
		i_close_fd(&fd);
	}
	return FALSE;
}

static void replay_try_start(void *context ATTR_UNUSED)
{
	if (!replay_take_slot())
		return;
	timeout_remove(&to_slot);
	replay_wanted_init();
	replay_compare_init();
	replay_streams_init();
	replay_round_init();
	replay_control_init();
	running = TRUE;
}

static void client_connected(struct master_service_connection *conn ATTR_UNUSED)
{
	/* dovetail-queue knocks, see queue_knock() there */
}

/* Returns TRUE when this process stays root and becomes each user in turn. */
static bool replay_drop_privileges(void)
{
	struct restrict_access_settings rset;
	bool root;

	restrict_access_get_env(&rset);
	root = geteuid() == 0 && (rset.uid == 0 || rset.uid == (uid_t)-1);
	dovetail_service_make_dir(replay.set.state_dir, 0711, geteuid(),
				  getegid());
	dovetail_service_make_dir(replay.dir, 0700,
				  root || geteuid() != 0 ? geteuid() : rset.uid,
				  rset.gid == (gid_t)-1 ? getegid() : rset.gid);
	restrict_access_by_env(RESTRICT_ACCESS_FLAG_ALLOW_ROOT, NULL);
	return root;
}

int main(int argc, char *argv[])
{
	enum mail_storage_service_flags storage_flags =
		MAIL_STORAGE_SERVICE_FLAG_USERDB_LOOKUP |
		MAIL_STORAGE_SERVICE_FLAG_NO_LOG_INIT |
		MAIL_STORAGE_SERVICE_FLAG_NO_IDLE_TIMEOUT |
		MAIL_STORAGE_SERVICE_FLAG_NO_CHDIR;
	struct mail_storage_service_ctx *storage_service;
	struct dovetail_compat_service service;
	const char *error;
	char *password;
	bool root;

	master_service = master_service_init(DOVETAIL_REPLAY_SERVICE,
					     DOVETAIL_COMPAT_SERVICE_FLAGS,
					     &argc, &argv, "");
	if (master_getopt(master_service) > 0)
		return FATAL_DEFAULT;
	master_service_init_log(master_service);
	if (!dovetail_compat_version_is_ours(master_service, &error))
		i_fatal("%s", error);

	/* As root: settings, keys, passwords, directories. */
	if (dovetail_compat_service_settings_read(master_service,
						  DOVETAIL_REPLAY_SERVICE,
						  &service, &error) < 0)
		i_fatal("Error reading configuration: %s", error);
	master_service_init_log(master_service);

	replay.pool = pool_alloconly_create("dovetail replay", 1024);
	replay.event = event_create(NULL);
	event_add_category(replay.event, &event_category_dovetail);
	if (!dovetail_settings_are_set(dovetail_compat_service_setting,
				       &service))
		i_fatal("dovetail_node is not set");
	if (dovetail_settings_parse(replay.pool, service.base_dir,
				    dovetail_compat_service_setting, &service,
				    &replay.set, &error) < 0)
		i_fatal("%s", error);
	dovetail_compat_service_settings_free(&service);
	if (sodium_init() < 0)
		i_fatal("sodium_init() failed");
	if (dovetail_keyring_open(replay.set.key_dir, replay.set.node,
				  replay.set.peers, &replay.keyring,
				  &error) < 0)
		i_fatal("%s", error);
	password = dovetail_service_read_password(replay.set.key_dir);
	replay.redis_password = password;
	replay.redis_tls = dovetail_service_tls_init(&replay.set);
	replay.dir = p_strconcat(replay.pool, replay.set.state_dir, "/replay",
				 NULL);
	replay.slots = master_service_get_process_limit(master_service);
	replay.client = dovetail_queue_client_get(replay.set.queue_socket,
						  replay.event);
	root = replay_drop_privileges();
	/* core files would have the key in them */
	restrict_access_allow_coredumps(FALSE);

	storage_service = dovetail_compat_storage_service_init(master_service,
		storage_flags | (root ?
			MAIL_STORAGE_SERVICE_FLAG_TEMP_PRIV_DROP :
			MAIL_STORAGE_SERVICE_FLAG_NO_RESTRICT_ACCESS));
	replay_users_init(storage_service, root);
	to_slot = timeout_add_short(SLOT_RETRY_MSECS, replay_try_start, NULL);
	replay_try_start(NULL);

	master_service_set_die_with_master(master_service, TRUE);
	master_service_init_finish(master_service);
	master_service_run(master_service, client_connected);

	timeout_remove(&to_slot);
	if (running) {
		replay_control_deinit();
		replay_round_deinit();
		replay_streams_deinit();
		replay_shards_deinit();
		replay_compare_deinit();
		replay_apply_deinit();
		replay_wanted_deinit();
		replay_troubles_deinit();
		i_close_fd(&replay.lock_fd);
	}
	replay_users_deinit();
	replay_spool_deinit();
	replay_list_deinit();
	dovetail_queue_client_unref(&replay.client);
	mail_storage_service_deinit(&storage_service);
	dovetail_keyring_close(&replay.keyring);
	if (password != NULL)
		safe_memset(password, 0, strlen(password));
	i_free(password);
	dovetail_redis_tls_deinit(&replay.redis_tls);
	event_unref(&replay.event);
	pool_unref(&replay.pool);
	master_service_deinit(&master_service);
	return 0;
}
