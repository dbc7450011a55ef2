/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* The service dovetail-health: from start to stop. See dovetail-health-private.h for
   what is in between. */

#include "lib.h"
#include "array.h"
#include "hash.h"
#include "ioloop.h"
#include "master-service.h"
#include "master-service-settings.h"
#include "restrict-access.h"
#include "settings-parser.h"
#include "dovetail-compat.h"
#include "dovetail-health-private.h"

#define HEALTH_SERVICE_NAME "dovetail-health"
/* News gets old by itself. */
#define HEALTH_TICK_MSECS 500

static struct event_category event_category_dovetail = {
	.name = "dovetail",
};

static void health_tick(void *context ATTR_UNUSED)
{
	health_state_tick();
	health_history_update();
	health_messages_update();
}

int main(int argc, char *argv[])
{
	struct dovetail_compat_service service;
	struct timeout *to_tick;
	const char *base_dir, *error;
	pool_t pool;

	master_service = master_service_init(HEALTH_SERVICE_NAME,
					     DOVETAIL_COMPAT_SERVICE_FLAGS,
					     &argc, &argv, "");
	if (master_getopt(master_service) > 0)
		return FATAL_DEFAULT;
	master_service_init_log(master_service);
	if (!dovetail_compat_version_is_ours(master_service, &error))
		i_fatal("%s", error);
	if (dovetail_compat_service_settings_read(master_service,
						  HEALTH_SERVICE_NAME,
						  &service, &error) < 0)
		i_fatal("Error reading configuration: %s", error);
	master_service_init_log(master_service);

	pool = pool_alloconly_create("dovetail settings", 1024);
	base_dir = p_strdup(pool, service.base_dir);
	if (!dovetail_settings_are_set(dovetail_compat_service_setting,
				       &service))
		i_fatal("dovetail_node is not set");
	if (dovetail_settings_parse(pool, service.base_dir,
				    dovetail_compat_service_setting, &service,
				    &health.set, &error) < 0)
		i_fatal("%s", error);
	dovetail_compat_service_settings_free(&service);
	restrict_access_by_env(RESTRICT_ACCESS_FLAG_ALLOW_ROOT, NULL);
	restrict_access_allow_coredumps(TRUE);

	health.event = event_create(NULL);
	event_add_category(health.event, &event_category_dovetail);
	event_add_str(health.event, "node", health.set.node);
	health_state_init();
	health_userdb_init();
	health_conns_init();
	health_http_init();
	health_history_init();
	health_messages_init(base_dir);
	to_tick = timeout_add_short(HEALTH_TICK_MSECS, health_tick, NULL);

	/* After a reload or at the end, when the master closes its pipe: do not
	   wait for the clients to go, they come back by themselves. */
	master_service_set_die_with_master(master_service, TRUE);
	master_service_init_finish(master_service);
	master_service_run(master_service, health_conn_create);

	timeout_remove(&to_tick);
	health_messages_deinit();
	health_conns_deinit();
	health_http_deinit();
	health_userdb_deinit();
	health_history_deinit();
	health_state_deinit();
	event_unref(&health.event);
	pool_unref(&pool);
	master_service_deinit(&master_service);
	return 0;
}
