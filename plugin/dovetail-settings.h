#ifndef DOVETAIL_SETTINGS_H
#define DOVETAIL_SETTINGS_H

/* Every dovetail_* setting, parsed and checked. On Dovecot 2.3 they stand in
   plugin { } as strings, on 2.4 they are settings like Dovecot's own; where they
   come from is decided by the callers (dovetail-compat.h); what they mean is
   decided here, once, for the plugin, the services, doveadm and the check at
   Dovecot's start. */

#include "dovetail-health.h"
#include "dovetail-redis.h"

/* keygen needs it before the other settings are complete */
#define DOVETAIL_KEY_DIR_DEFAULT "/etc/dovecot/dovetail"

enum dovetail_ack_level {
	DOVETAIL_ACK_LOCAL,
	DOVETAIL_ACK_QUEUED,
	DOVETAIL_ACK_APPLIED,
};

/* What happens to messages and mailboxes that a replica has and the primary has
   not. */
enum dovetail_repair_extra {
	/* moved into the folder dovetail-kept of the replica */
	DOVETAIL_REPAIR_EXTRA_KEEP,
	/* left where they are, and logged: the replica stays different */
	DOVETAIL_REPAIR_EXTRA_REPORT,
};

struct dovetail_settings {
	/* dovetail_node: this node's name */
	const char *node;
	/* dovetail_peers: the other nodes' names, NULL-terminated */
	const char *const *peers;
	/* dovetail_primary: the node whose mailboxes are the truth; may come
	   per user from the userdb. Default: none, it must be set. */
	const char *primary;
	/* dovetail_redis */
	struct dovetail_redis_url redis;
	/* dovetail_redis_ca_file, _cert_file, _key_file, default "" */
	const char *redis_ca_file, *redis_cert_file, *redis_key_file;
	/* dovetail_key_dir, default DOVETAIL_KEY_DIR_DEFAULT */
	const char *key_dir;
	/* dovetail_state_dir, default /var/lib/dovecot/dovetail */
	const char *state_dir;
	/* dovetail_ack = local | queued | applied, default queued */
	enum dovetail_ack_level ack;
	/* dovetail_ack_timeout, default 2 s, at most 60 s */
	unsigned int ack_timeout_msecs;
	/* dovetail_ack_failure = proceed | refuse, default proceed */
	bool ack_refuse;
	/* dovetail_repair_extra = keep | report, default keep */
	enum dovetail_repair_extra repair_extra;
	/* dovetail_shards, 1..64, default 4; the same on all nodes */
	unsigned int shards;
	/* dovetail_queue_max_size, bytes of one node's streams in Redis that
	   no replica has confirmed, default 1G, at least 16M */
	uoff_t queue_max_size;
	/* dovetail_verify_interval, default 1 day: how often all users are
	   compared with the replicas; 0: never */
	unsigned int verify_interval_secs;
	/* dovetail_verify_rate, users per second, at most, when they are;
	   1..10000, default 10 */
	unsigned int verify_rate;
	/* dovetail_queue_socket, default "dovetail-queue" in base_dir */
	const char *queue_socket;

	/* dovetail_health_lag (5 s), _stall (60 s), _max_age (10 s), _calm
	   (5 s), _queue_percent (80) */
	struct dovetail_health_settings health;
	/* dovetail_health_warn, _defer: states (bits) in which an MTA is told
	   to warn of a mail, or to defer it; default: none. "unprotected" is
	   also when it is not known whether mail would be protected. */
	unsigned int health_warn, health_defer;
	/* dovetail_health_drain ("fenced"), _down (none): states (bits) in which
	   load balancers are to send nobody new, or nobody at all */
	unsigned int health_drain, health_down;
	/* dovetail_health_transports: node, Postfix transport, node, ...,
	   NULL-terminated; default: none */
	const char *const *health_transports;
	/* dovetail_health_domains: whose recipients are users here; "*": all that
	   the userdb knows. NULL-terminated, default: none */
	const char *const *health_domains;
	/* dovetail_health_userdb: the auth service's listener, default
	   "auth-dovetail-userdb" in base_dir; NULL: all users have the same
	   primary */
	const char *health_userdb;
	/* dovetail_health_hook: the path of a program, dovetail_health_webhook: a
	   URL, which are told of changes; default "" */
	const char *health_hook, *health_webhook;
};

/* Returns the value of a setting, or NULL when it is not set. */
typedef const char *dovetail_settings_get_t(void *context, const char *name);

/* TRUE when dovetail is configured at all: dovetail_node is set and not "". */
bool dovetail_settings_are_set(dovetail_settings_get_t *get, void *context);

/* Parse all settings. Strings are allocated from pool. base_dir is Dovecot's, for
   the default of queue_socket. Returns 0, or -1 and
   error_r (data stack): a sentence that starts with the setting's name. */
int dovetail_settings_parse(pool_t pool, const char *base_dir,
			    dovetail_settings_get_t *get, void *context,
			    struct dovetail_settings *set_r,
			    const char **error_r);

/* name is not a dovetail_* setting we know: for the check at start. */
bool dovetail_setting_name_is_known(const char *name);

#if DOVECOT_PREREQ(2, 4, 0)
/* ---- Dovecot 2.4 ---- */

#include "settings.h"

/* The settings as Dovecot knows them, by their types. A new one is added here, to
   the two tables in dovetail-settings.c, and to their parsed form above. */
struct dovetail_setting_values {
	pool_t pool;
	const char *dovetail_node;
	const char *dovetail_peers;
	const char *dovetail_primary;
	const char *dovetail_redis;
	const char *dovetail_redis_ca_file;
	const char *dovetail_redis_cert_file;
	const char *dovetail_redis_key_file;
	const char *dovetail_key_dir;
	const char *dovetail_state_dir;
	const char *dovetail_ack;
	unsigned int dovetail_ack_timeout;
	const char *dovetail_ack_failure;
	const char *dovetail_repair_extra;
	unsigned int dovetail_shards;
	uoff_t dovetail_queue_max_size;
	unsigned int dovetail_verify_interval;
	unsigned int dovetail_verify_rate;
	const char *dovetail_queue_socket;
	unsigned int dovetail_health_lag;
	unsigned int dovetail_health_stall;
	unsigned int dovetail_health_max_age;
	unsigned int dovetail_health_calm;
	unsigned int dovetail_health_queue_percent;
	const char *dovetail_health_warn;
	const char *dovetail_health_defer;
	const char *dovetail_health_drain;
	const char *dovetail_health_down;
	const char *dovetail_health_transports;
	const char *dovetail_health_domains;
	const char *dovetail_health_userdb;
	const char *dovetail_health_hook;
	const char *dovetail_health_webhook;

	/* Dovecot's own; the queue service needs it */
	const char *default_internal_user;
};

extern const struct setting_parser_info dovetail_setting_parser_info;

/* What the configuration says for an event, unchecked; freed with settings_free().
   Returns 0, or -1 and error_r. */
int dovetail_setting_values_get(struct event *event,
				const struct dovetail_setting_values **values_r,
				const char **error_r);
/* dovetail_settings_get_t with a struct dovetail_setting_values as context: a
   value as it would stand in the configuration, on the data stack. */
const char *dovetail_setting_values_find(void *context, const char *name);
#endif

#endif
