/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "array.h"
#include "net.h"
#include "settings-parser.h"
#include "str-sanitize.h"
#include "dovetail-compat.h"
#include "dovetail-node.h"
#include "dovetail-settings.h"

#define DOVETAIL_DEFAULT_STATE_DIR "/var/lib/dovecot/dovetail"
#define DOVETAIL_DEFAULT_QUEUE_SOCKET "dovetail-queue"
#define DOVETAIL_DEFAULT_ACK_TIMEOUT "2s"
#define DOVETAIL_ACK_TIMEOUT_MAX_MSECS (60 * 1000)
#define DOVETAIL_DEFAULT_SHARDS "4"
#define DOVETAIL_SHARDS_MAX 64
#define DOVETAIL_DEFAULT_QUEUE_MAX_SIZE "1G"
#define DOVETAIL_QUEUE_MAX_SIZE_MIN (16 * 1024 * 1024)
#define DOVETAIL_DEFAULT_VERIFY_INTERVAL "1d"
#define DOVETAIL_DEFAULT_VERIFY_RATE "10"
#define DOVETAIL_VERIFY_RATE_MAX 10000
#define DOVETAIL_DEFAULT_HEALTH_LAG "5s"
#define DOVETAIL_DEFAULT_HEALTH_STALL "60s"
#define DOVETAIL_DEFAULT_HEALTH_MAX_AGE "10s"
#define DOVETAIL_DEFAULT_HEALTH_CALM "5s"
#define DOVETAIL_DEFAULT_HEALTH_QUEUE_PERCENT "80"
#define DOVETAIL_DEFAULT_HEALTH_DRAIN "fenced"
#define DOVETAIL_DEFAULT_HEALTH_USERDB "auth-dovetail-userdb"
#define DOVETAIL_HEALTH_TIME_MIN_MSECS 100
/* News comes every second. */
#define DOVETAIL_HEALTH_MAX_AGE_MIN_MSECS 2000
/* A peer says something every 5 seconds. */
#define DOVETAIL_HEALTH_SILENCE_MSECS (15 * 1000)

struct dovetail_settings_parser {
	pool_t pool;
	const char *base_dir;
	dovetail_settings_get_t *get;
	void *context;
	struct dovetail_settings *set;
};

/* Parses value into set. value is not "", and the default if the
   administrator gave none; NULL if there is no default. The error is appended
   to the setting's name and ": ". */
typedef int
dovetail_setting_parse_t(struct dovetail_settings_parser *parser,
			 const char *value, const char **error_r);

struct dovetail_setting {
	const char *name;
	const char *default_value;
	dovetail_setting_parse_t *parse;
};

static int
dovetail_settings_check_node_name(const char *name, const char **error_r)
{
	if (dovetail_node_name_is_valid(name))
		return 0;
	*error_r = t_strdup_printf(
		"'%s' is not a node name (1 to %u of a-z 0-9 . -)",
		str_sanitize(name, 128), DOVETAIL_NODE_NAME_MAX);
	return -1;
}

static int
dovetail_settings_parse_node(struct dovetail_settings_parser *parser,
			     const char *value, const char **error_r)
{
	if (value == NULL) {
		*error_r = "Not set: dovetail needs this node's name";
		return -1;
	}
	if (dovetail_settings_check_node_name(value, error_r) < 0)
		return -1;
	parser->set->node = p_strdup(parser->pool, value);
	return 0;
}

static int
dovetail_settings_parse_peers(struct dovetail_settings_parser *parser,
			      const char *value, const char **error_r)
{
	struct dovetail_settings *set = parser->set;
	const char *const *peers, *const *other;

	set->peers = (const char *const *)p_strsplit_spaces(
		parser->pool, value == NULL ? "" : value, " \t");
	for (peers = set->peers; *peers != NULL; peers++) {
		if (strchr(*peers, ',') != NULL) {
			*error_r = "Names are separated by spaces, not commas";
			return -1;
		}
		if (dovetail_settings_check_node_name(*peers, error_r) < 0)
			return -1;
		if (strcmp(*peers, set->node) == 0) {
			*error_r = t_strdup_printf(
				"'%s' is this node itself (dovetail_node); "
				"only the others belong here", *peers);
			return -1;
		}
		for (other = set->peers; other != peers; other++) {
			if (strcmp(*other, *peers) == 0) {
				*error_r = t_strdup_printf(
					"'%s' is there twice", *peers);
				return -1;
			}
		}
	}
	return 0;
}

static int
dovetail_settings_parse_primary(struct dovetail_settings_parser *parser,
				const char *value, const char **error_r)
{
	struct dovetail_settings *set = parser->set;

	if (value == NULL) {
		*error_r = "Not set: dovetail needs the name of the node "
			"whose mailboxes are the truth";
		return -1;
	}
	if (strcmp(value, set->node) != 0 &&
	    !str_array_find(set->peers, value)) {
		*error_r = t_strdup_printf(
			"'%s' is neither this node (dovetail_node) nor one of "
			"dovetail_peers", str_sanitize(value, 128));
		return -1;
	}
	set->primary = p_strdup(parser->pool, value);
	return 0;
}

static int
dovetail_settings_parse_redis(struct dovetail_settings_parser *parser,
			      const char *value, const char **error_r)
{
	if (value == NULL) {
		*error_r = "Not set: dovetail needs a Redis server, e.g. "
			"redis://127.0.0.1:6379/0";
		return -1;
	}
	return dovetail_redis_url_parse(parser->pool, value,
					&parser->set->redis, error_r);
}

static int
dovetail_settings_parse_path(struct dovetail_settings_parser *parser,
			     const char *value, const char **path_r,
			     const char **error_r)
{
	if (*value != '/') {
		*error_r = t_strdup_printf("'%s' does not begin with /",
					   str_sanitize(value, 128));
		return -1;
	}
	*path_r = p_strdup(parser->pool, value);
	return 0;
}

static int
dovetail_settings_parse_tls_file(struct dovetail_settings_parser *parser,
				 const char *value, const char **path_r,
				 const char **error_r)
{
	*path_r = "";
	if (value == NULL)
		return 0;
	if (!parser->set->redis.tls) {
		*error_r = "Only for a Redis with TLS: dovetail_redis does not "
			"begin with rediss://";
		return -1;
	}
	return dovetail_settings_parse_path(parser, value, path_r, error_r);
}

static int
dovetail_settings_parse_redis_ca_file(struct dovetail_settings_parser *parser,
				      const char *value, const char **error_r)
{
	return dovetail_settings_parse_tls_file(parser, value,
		&parser->set->redis_ca_file, error_r);
}

static int
dovetail_settings_parse_redis_cert_file(struct dovetail_settings_parser *parser,
					const char *value, const char **error_r)
{
	return dovetail_settings_parse_tls_file(parser, value,
		&parser->set->redis_cert_file, error_r);
}

static int
dovetail_settings_parse_redis_key_file(struct dovetail_settings_parser *parser,
				       const char *value, const char **error_r)
{
	struct dovetail_settings *set = parser->set;

	if (dovetail_settings_parse_tls_file(parser, value,
					     &set->redis_key_file, error_r) < 0)
		return -1;
	if ((*set->redis_cert_file == '\0') != (*set->redis_key_file == '\0')) {
		*error_r = "A certificate (dovetail_redis_cert_file) needs its "
			"key, and the other way round";
		return -1;
	}
	return 0;
}

static int
dovetail_settings_parse_key_dir(struct dovetail_settings_parser *parser,
				const char *value, const char **error_r)
{
	return dovetail_settings_parse_path(parser, value,
					    &parser->set->key_dir, error_r);
}

static int
dovetail_settings_parse_state_dir(struct dovetail_settings_parser *parser,
				  const char *value, const char **error_r)
{
	return dovetail_settings_parse_path(parser, value,
					    &parser->set->state_dir, error_r);
}

static int
dovetail_settings_parse_ack(struct dovetail_settings_parser *parser,
			    const char *value, const char **error_r)
{
	struct dovetail_settings *set = parser->set;

	if (strcmp(value, "local") == 0)
		set->ack = DOVETAIL_ACK_LOCAL;
	else if (strcmp(value, "queued") == 0)
		set->ack = DOVETAIL_ACK_QUEUED;
	else if (strcmp(value, "applied") == 0)
		set->ack = DOVETAIL_ACK_APPLIED;
	else {
		*error_r = t_strdup_printf(
			"'%s' is none of local, queued, applied",
			str_sanitize(value, 128));
		return -1;
	}
	if (set->ack == DOVETAIL_ACK_APPLIED && set->peers[0] == NULL) {
		*error_r = "applied needs at least one node in dovetail_peers";
		return -1;
	}
	return 0;
}

static int
dovetail_settings_parse_ack_timeout(struct dovetail_settings_parser *parser,
				    const char *value, const char **error_r)
{
	unsigned int msecs;

	if (settings_get_time_msecs(value, &msecs, error_r) < 0)
		return -1;
	if (msecs == 0 || msecs > DOVETAIL_ACK_TIMEOUT_MAX_MSECS) {
		*error_r = t_strdup_printf("'%s' is not within 1ms and %us",
			str_sanitize(value, 128),
			DOVETAIL_ACK_TIMEOUT_MAX_MSECS / 1000);
		return -1;
	}
	parser->set->ack_timeout_msecs = msecs;
	return 0;
}

static int
dovetail_settings_parse_ack_failure(struct dovetail_settings_parser *parser,
				    const char *value, const char **error_r)
{
	if (strcmp(value, "proceed") == 0)
		parser->set->ack_refuse = FALSE;
	else if (strcmp(value, "refuse") == 0)
		parser->set->ack_refuse = TRUE;
	else {
		*error_r = t_strdup_printf("'%s' is none of proceed, refuse",
					   str_sanitize(value, 128));
		return -1;
	}
	return 0;
}

static int
dovetail_settings_parse_repair_extra(struct dovetail_settings_parser *parser,
				     const char *value, const char **error_r)
{
	if (strcmp(value, "keep") == 0)
		parser->set->repair_extra = DOVETAIL_REPAIR_EXTRA_KEEP;
	else if (strcmp(value, "report") == 0)
		parser->set->repair_extra = DOVETAIL_REPAIR_EXTRA_REPORT;
	else {
		*error_r = t_strdup_printf("'%s' is none of keep, report",
					   str_sanitize(value, 128));
		return -1;
	}
	return 0;
}

static int
dovetail_settings_parse_shards(struct dovetail_settings_parser *parser,
			       const char *value, const char **error_r)
{
	unsigned int shards;

	if (str_to_uint(value, &shards) < 0 ||
	    shards == 0 || shards > DOVETAIL_SHARDS_MAX) {
		*error_r = t_strdup_printf(
			"'%s' is not a number within 1 and %u",
			str_sanitize(value, 128), DOVETAIL_SHARDS_MAX);
		return -1;
	}
	parser->set->shards = shards;
	return 0;
}

static int
dovetail_settings_parse_queue_max_size(struct dovetail_settings_parser *parser,
				       const char *value, const char **error_r)
{
	uoff_t size;

	if (settings_get_size(value, &size, error_r) < 0)
		return -1;
	if (size < DOVETAIL_QUEUE_MAX_SIZE_MIN) {
		*error_r = t_strdup_printf(
			"'%s' is less than %uM (sizes are given as e.g. 1G)",
			str_sanitize(value, 128),
			DOVETAIL_QUEUE_MAX_SIZE_MIN / 1024 / 1024);
		return -1;
	}
	parser->set->queue_max_size = size;
	return 0;
}

static int
dovetail_settings_parse_verify_interval(struct dovetail_settings_parser *parser,
					const char *value, const char **error_r)
{
	return settings_get_time(value, &parser->set->verify_interval_secs,
				 error_r);
}

static int
dovetail_settings_parse_verify_rate(struct dovetail_settings_parser *parser,
				    const char *value, const char **error_r)
{
	unsigned int rate;

	if (str_to_uint(value, &rate) < 0 ||
	    rate == 0 || rate > DOVETAIL_VERIFY_RATE_MAX) {
		*error_r = t_strdup_printf(
			"'%s' is not a number of users per second within 1 and "
			"%u", str_sanitize(value, 128),
			DOVETAIL_VERIFY_RATE_MAX);
		return -1;
	}
	parser->set->verify_rate = rate;
	return 0;
}

static int
dovetail_settings_parse_queue_socket(struct dovetail_settings_parser *parser,
				     const char *value,
				     const char **error_r ATTR_UNUSED)
{
	parser->set->queue_socket = *value == '/' ?
		p_strdup(parser->pool, value) :
		p_strdup_printf(parser->pool, "%s/%s", parser->base_dir, value);
	return 0;
}

static int
dovetail_settings_parse_health_time(const char *value, unsigned int min_msecs,
				    unsigned int *msecs_r, const char **error_r)
{
	if (settings_get_time_msecs(value, msecs_r, error_r) < 0)
		return -1;
	if (*msecs_r < min_msecs) {
		*error_r = t_strdup_printf("'%s' is less than %ums",
					   str_sanitize(value, 128), min_msecs);
		return -1;
	}
	return 0;
}

static int
dovetail_settings_parse_health_lag(struct dovetail_settings_parser *parser,
				   const char *value, const char **error_r)
{
	return dovetail_settings_parse_health_time(value,
		DOVETAIL_HEALTH_TIME_MIN_MSECS,
		&parser->set->health.lag_msecs, error_r);
}

static int
dovetail_settings_parse_health_stall(struct dovetail_settings_parser *parser,
				     const char *value, const char **error_r)
{
	struct dovetail_health_settings *health = &parser->set->health;

	if (dovetail_settings_parse_health_time(value,
			DOVETAIL_HEALTH_TIME_MIN_MSECS, &health->stall_msecs,
			error_r) < 0)
		return -1;
	if (health->stall_msecs < health->lag_msecs) {
		*error_r = t_strdup_printf(
			"'%s' is less than dovetail_health_lag",
			str_sanitize(value, 128));
		return -1;
	}
	health->silence_msecs = DOVETAIL_HEALTH_SILENCE_MSECS;
	return 0;
}

static int
dovetail_settings_parse_health_max_age(struct dovetail_settings_parser *parser,
				       const char *value, const char **error_r)
{
	return dovetail_settings_parse_health_time(value,
		DOVETAIL_HEALTH_MAX_AGE_MIN_MSECS,
		&parser->set->health.max_age_msecs, error_r);
}

static int
dovetail_settings_parse_health_calm(struct dovetail_settings_parser *parser,
				    const char *value, const char **error_r)
{
	return dovetail_settings_parse_health_time(value, 0,
		&parser->set->health.calm_msecs, error_r);
}

static int
dovetail_settings_parse_health_percent(struct dovetail_settings_parser *parser,
				       const char *value, const char **error_r)
{
	unsigned int percent;

	if (str_to_uint(value, &percent) < 0 || percent == 0 || percent > 100) {
		*error_r = t_strdup_printf(
			"'%s' is not a number within 1 and 100",
			str_sanitize(value, 128));
		return -1;
	}
	parser->set->health.queue_percent = percent;
	return 0;
}

static int
dovetail_settings_parse_states(const char *value, unsigned int *states_r,
			       const char **error_r)
{
	enum dovetail_health_state state;
	const char *const *names;

	*states_r = 0;
	if (value == NULL || strcmp(value, "none") == 0)
		return 0;
	for (names = t_strsplit_spaces(value, " \t"); *names != NULL; names++) {
		if (dovetail_health_state_parse(*names, &state) < 0 ||
		    state == DOVETAIL_HEALTH_OK) {
			*error_r = t_strdup_printf(
				"'%s' is none of catching-up, lagging, unknown, "
				"diverged, stalled, unprotected, fenced, none",
				str_sanitize(*names, 128));
			return -1;
		}
		*states_r |= 1U << state;
	}
	return 0;
}

static int
dovetail_settings_parse_health_warn(struct dovetail_settings_parser *parser,
				    const char *value, const char **error_r)
{
	return dovetail_settings_parse_states(value,
		&parser->set->health_warn, error_r);
}

static int
dovetail_settings_parse_health_defer(struct dovetail_settings_parser *parser,
				     const char *value, const char **error_r)
{
	return dovetail_settings_parse_states(value,
		&parser->set->health_defer, error_r);
}

static int
dovetail_settings_parse_health_drain(struct dovetail_settings_parser *parser,
				     const char *value, const char **error_r)
{
	return dovetail_settings_parse_states(value,
		&parser->set->health_drain, error_r);
}

static int
dovetail_settings_parse_health_down(struct dovetail_settings_parser *parser,
				    const char *value, const char **error_r)
{
	return dovetail_settings_parse_states(value,
		&parser->set->health_down, error_r);
}

static int
dovetail_settings_parse_health_transports(
	struct dovetail_settings_parser *parser, const char *value,
	const char **error_r)
{
	struct dovetail_settings *set = parser->set;
	const char *const *words, *node, *eq, *transport;
	ARRAY_TYPE(const_string) transports;
	unsigned int i;

	p_array_init(&transports, parser->pool, 8);
	words = t_strsplit_spaces(value == NULL ? "" : value, " \t");
	for (; *words != NULL; words++) {
		eq = strchr(*words, '=');
		if (eq == NULL || eq == *words || eq[1] == '\0' ||
		    strchr(*words, ',') != NULL) {
			*error_r = t_strdup_printf(
				"'%s' is not NODE=TRANSPORT, such as "
				"a=lmtp:inet:10.77.0.1:24 (separated by spaces)",
				str_sanitize(*words, 128));
			return -1;
		}
		node = p_strdup_until(parser->pool, *words, eq);
		if (strcmp(node, set->node) != 0 &&
		    !str_array_find(set->peers, node)) {
			*error_r = t_strdup_printf(
				"'%s' is neither this node (dovetail_node) nor "
				"one of dovetail_peers",
				str_sanitize(node, 128));
			return -1;
		}
		for (i = 0; i < array_count(&transports); i += 2) {
			if (strcmp(array_idx_elem(&transports, i), node) == 0) {
				*error_r = t_strdup_printf(
					"'%s' is there twice", node);
				return -1;
			}
		}
		transport = p_strdup(parser->pool, eq + 1);
		array_push_back(&transports, &node);
		array_push_back(&transports, &transport);
	}
	array_append_zero(&transports);
	set->health_transports = array_front(&transports);
	return 0;
}

static int
dovetail_settings_parse_health_domains(struct dovetail_settings_parser *parser,
				       const char *value, const char **error_r)
{
	const char *const *domains;

	domains = (const char *const *)p_strsplit_spaces(
		parser->pool, value == NULL ? "" : value, " \t");
	parser->set->health_domains = domains;
	for (; *domains != NULL; domains++) {
		if (strpbrk(*domains, "@,=") != NULL) {
			*error_r = t_strdup_printf(
				"'%s' is not a domain (they are separated by "
				"spaces; *: all)", str_sanitize(*domains, 128));
			return -1;
		}
	}
	return 0;
}

static int
dovetail_settings_parse_health_userdb(struct dovetail_settings_parser *parser,
				      const char *value, const char **error_r)
{
	struct dovetail_settings *set = parser->set;

	if (strcmp(value, "none") == 0) {
		set->health_userdb = NULL;
		if (str_array_find(set->health_domains, "*")) {
			*error_r = "With dovetail_health_domains = * only the "
				"userdb knows whose mail is for us";
			return -1;
		}
		return 0;
	}
	set->health_userdb = *value == '/' ? p_strdup(parser->pool, value) :
		p_strdup_printf(parser->pool, "%s/%s", parser->base_dir, value);
	return 0;
}

static int
dovetail_settings_parse_health_hook(struct dovetail_settings_parser *parser,
				    const char *value, const char **error_r)
{
	parser->set->health_hook = "";
	if (value == NULL)
		return 0;
	return dovetail_settings_parse_path(parser, value,
		&parser->set->health_hook, error_r);
}

static int
dovetail_settings_parse_health_webhook(struct dovetail_settings_parser *parser,
				       const char *value, const char **error_r)
{
	const char *p;

	parser->set->health_webhook = "";
	if (value == NULL)
		return 0;
	for (p = value; (unsigned char)*p > ' ' && *p != '\x7f'; p++) ;
	if (*p != '\0' || (!str_begins_with(value, "http://") &&
			   !str_begins_with(value, "https://"))) {
		*error_r = t_strdup_printf(
			"'%s' is not a URL: http://HOST[:PORT]/PATH or "
			"https://HOST[:PORT]/PATH", str_sanitize(value, 128));
		return -1;
	}
	parser->set->health_webhook = p_strdup(parser->pool, value);
	return 0;
}

/* In the order in which they are parsed: some need those before them. */
static const struct dovetail_setting dovetail_setting_list[] = {
	{ "dovetail_node", NULL, dovetail_settings_parse_node },
	{ "dovetail_peers", NULL, dovetail_settings_parse_peers },
	{ "dovetail_primary", NULL, dovetail_settings_parse_primary },
	{ "dovetail_redis", NULL, dovetail_settings_parse_redis },
	{ "dovetail_redis_ca_file", NULL,
	  dovetail_settings_parse_redis_ca_file },
	{ "dovetail_redis_cert_file", NULL,
	  dovetail_settings_parse_redis_cert_file },
	{ "dovetail_redis_key_file", NULL,
	  dovetail_settings_parse_redis_key_file },
	{ "dovetail_key_dir", DOVETAIL_KEY_DIR_DEFAULT,
	  dovetail_settings_parse_key_dir },
	{ "dovetail_state_dir", DOVETAIL_DEFAULT_STATE_DIR,
	  dovetail_settings_parse_state_dir },
	{ "dovetail_ack", "queued", dovetail_settings_parse_ack },
	{ "dovetail_ack_timeout", DOVETAIL_DEFAULT_ACK_TIMEOUT,
	  dovetail_settings_parse_ack_timeout },
	{ "dovetail_ack_failure", "proceed",
	  dovetail_settings_parse_ack_failure },
	{ "dovetail_repair_extra", "keep",
	  dovetail_settings_parse_repair_extra },
	{ "dovetail_shards", DOVETAIL_DEFAULT_SHARDS,
	  dovetail_settings_parse_shards },
	{ "dovetail_queue_max_size", DOVETAIL_DEFAULT_QUEUE_MAX_SIZE,
	  dovetail_settings_parse_queue_max_size },
	{ "dovetail_verify_interval", DOVETAIL_DEFAULT_VERIFY_INTERVAL,
	  dovetail_settings_parse_verify_interval },
	{ "dovetail_verify_rate", DOVETAIL_DEFAULT_VERIFY_RATE,
	  dovetail_settings_parse_verify_rate },
	{ "dovetail_queue_socket", DOVETAIL_DEFAULT_QUEUE_SOCKET,
	  dovetail_settings_parse_queue_socket },
	{ "dovetail_health_lag", DOVETAIL_DEFAULT_HEALTH_LAG,
	  dovetail_settings_parse_health_lag },
	{ "dovetail_health_stall", DOVETAIL_DEFAULT_HEALTH_STALL,
	  dovetail_settings_parse_health_stall },
	{ "dovetail_health_max_age", DOVETAIL_DEFAULT_HEALTH_MAX_AGE,
	  dovetail_settings_parse_health_max_age },
	{ "dovetail_health_calm", DOVETAIL_DEFAULT_HEALTH_CALM,
	  dovetail_settings_parse_health_calm },
	{ "dovetail_health_queue_percent",
	  DOVETAIL_DEFAULT_HEALTH_QUEUE_PERCENT,
	  dovetail_settings_parse_health_percent },
	{ "dovetail_health_warn", NULL, dovetail_settings_parse_health_warn },
	{ "dovetail_health_defer", NULL,
	  dovetail_settings_parse_health_defer },
	{ "dovetail_health_drain", DOVETAIL_DEFAULT_HEALTH_DRAIN,
	  dovetail_settings_parse_health_drain },
	{ "dovetail_health_down", NULL, dovetail_settings_parse_health_down },
	{ "dovetail_health_transports", NULL,
	  dovetail_settings_parse_health_transports },
	{ "dovetail_health_domains", NULL,
	  dovetail_settings_parse_health_domains },
	{ "dovetail_health_userdb", DOVETAIL_DEFAULT_HEALTH_USERDB,
	  dovetail_settings_parse_health_userdb },
	{ "dovetail_health_hook", NULL, dovetail_settings_parse_health_hook },
	{ "dovetail_health_webhook", NULL,
	  dovetail_settings_parse_health_webhook },
};

bool dovetail_setting_name_is_known(const char *name)
{
	unsigned int i;

	for (i = 0; i < N_ELEMENTS(dovetail_setting_list); i++) {
		if (strcmp(dovetail_setting_list[i].name, name) == 0)
			return TRUE;
	}
	return FALSE;
}

bool dovetail_settings_are_set(dovetail_settings_get_t *get, void *context)
{
	const char *node = get(context, "dovetail_node");

	return node != NULL && *node != '\0';
}

static int
dovetail_settings_parse_one(struct dovetail_settings_parser *parser,
			    const struct dovetail_setting *setting,
			    const char **error_r)
{
	const char *value = parser->get(parser->context, setting->name);
	const char *error;

	if (value == NULL || *value == '\0')
		value = setting->default_value;
	if (value != NULL && strchr(value, '%') != NULL) {
		/* Some readers would expand variables and some would not. */
		error = "Variables (%) cannot be used here";
	} else if (setting->parse(parser, value, &error) == 0)
		return 0;
	*error_r = t_strdup_printf("%s: %s", setting->name, error);
	return -1;
}

int dovetail_settings_parse(pool_t pool, const char *base_dir,
			    dovetail_settings_get_t *get, void *context,
			    struct dovetail_settings *set_r,
			    const char **error_r)
{
	struct dovetail_settings_parser parser = {
		.pool = pool,
		.base_dir = base_dir,
		.get = get,
		.context = context,
		.set = set_r,
	};
	unsigned int i;

	i_zero(set_r);
	for (i = 0; i < N_ELEMENTS(dovetail_setting_list); i++) {
		if (dovetail_settings_parse_one(&parser,
						&dovetail_setting_list[i],
						error_r) < 0)
			return -1;
	}
	return 0;
}

#if DOVETAIL_DOVECOT_24
/* ---- Dovecot 2.4 ---- */

static bool
dovetail_setting_values_check(struct event *event, void *set, pool_t pool,
			      const char **error_r);

#define DEF(type, name) \
	SETTING_DEFINE_STRUCT_##type(#name, name, \
				     struct dovetail_setting_values)

static const struct setting_define dovetail_setting_defines[] = {
	DEF(STR_NOVARS, dovetail_node),
	DEF(STR_NOVARS, dovetail_peers),
	DEF(STR_NOVARS, dovetail_primary),
	DEF(STR_NOVARS, dovetail_redis),
	DEF(STR_NOVARS, dovetail_redis_ca_file),
	DEF(STR_NOVARS, dovetail_redis_cert_file),
	DEF(STR_NOVARS, dovetail_redis_key_file),
	DEF(STR_NOVARS, dovetail_key_dir),
	DEF(STR_NOVARS, dovetail_state_dir),
	DEF(ENUM, dovetail_ack),
	DEF(TIME_MSECS, dovetail_ack_timeout),
	DEF(ENUM, dovetail_ack_failure),
	DEF(ENUM, dovetail_repair_extra),
	DEF(UINT, dovetail_shards),
	DEF(SIZE, dovetail_queue_max_size),
	DEF(TIME, dovetail_verify_interval),
	DEF(UINT, dovetail_verify_rate),
	DEF(STR_NOVARS, dovetail_queue_socket),
	DEF(TIME_MSECS, dovetail_health_lag),
	DEF(TIME_MSECS, dovetail_health_stall),
	DEF(TIME_MSECS, dovetail_health_max_age),
	DEF(TIME_MSECS, dovetail_health_calm),
	DEF(UINT, dovetail_health_queue_percent),
	DEF(STR_NOVARS, dovetail_health_warn),
	DEF(STR_NOVARS, dovetail_health_defer),
	DEF(STR_NOVARS, dovetail_health_drain),
	DEF(STR_NOVARS, dovetail_health_down),
	DEF(STR_NOVARS, dovetail_health_transports),
	DEF(STR_NOVARS, dovetail_health_domains),
	DEF(STR_NOVARS, dovetail_health_userdb),
	DEF(STR_NOVARS, dovetail_health_hook),
	DEF(STR_NOVARS, dovetail_health_webhook),

	DEF(STR, default_internal_user),

	SETTING_DEFINE_LIST_END
};

static const struct dovetail_setting_values dovetail_setting_defaults = {
	.dovetail_node = "",
	.dovetail_peers = "",
	.dovetail_primary = "",
	.dovetail_redis = "",
	.dovetail_redis_ca_file = "",
	.dovetail_redis_cert_file = "",
	.dovetail_redis_key_file = "",
	.dovetail_key_dir = DOVETAIL_KEY_DIR_DEFAULT,
	.dovetail_state_dir = DOVETAIL_DEFAULT_STATE_DIR,
	.dovetail_ack = "queued:local:applied",
	.dovetail_ack_timeout = 2 * 1000,
	.dovetail_ack_failure = "proceed:refuse",
	.dovetail_repair_extra = "keep:report",
	.dovetail_shards = 4,
	.dovetail_queue_max_size = 1024ULL * 1024 * 1024,
	.dovetail_verify_interval = 24 * 3600,
	.dovetail_verify_rate = 10,
	.dovetail_queue_socket = DOVETAIL_DEFAULT_QUEUE_SOCKET,
	.dovetail_health_lag = 5 * 1000,
	.dovetail_health_stall = 60 * 1000,
	.dovetail_health_max_age = 10 * 1000,
	.dovetail_health_calm = 5 * 1000,
	.dovetail_health_queue_percent = 80,
	.dovetail_health_warn = "",
	.dovetail_health_defer = "",
	.dovetail_health_drain = DOVETAIL_DEFAULT_HEALTH_DRAIN,
	.dovetail_health_down = "",
	.dovetail_health_transports = "",
	.dovetail_health_domains = "",
	.dovetail_health_userdb = DOVETAIL_DEFAULT_HEALTH_USERDB,
	.dovetail_health_hook = "",
	.dovetail_health_webhook = "",

	.default_internal_user = "dovecot",
};

const struct setting_parser_info dovetail_setting_parser_info = {
	.name = "dovetail",

	.defines = dovetail_setting_defines,
	.defaults = &dovetail_setting_defaults,

	.struct_size = sizeof(struct dovetail_setting_values),
	.pool_offset1 = 1 + offsetof(struct dovetail_setting_values, pool),
	.ext_check_func = dovetail_setting_values_check,
};

int dovetail_setting_values_get(struct event *event,
				const struct dovetail_setting_values **values_r,
				const char **error_r)
{
	return settings_get(event, &dovetail_setting_parser_info,
			    SETTINGS_GET_FLAG_NO_CHECK, values_r, error_r);
}

const char *dovetail_setting_values_find(void *context, const char *name)
{
	const struct setting_define *def;
	const void *value;

	for (def = dovetail_setting_defines; def->key != NULL; def++) {
		if (strcmp(def->key, name) == 0)
			break;
	}
	value = CONST_PTR_OFFSET(context, def->offset);
	switch (def->type) {
	case SET_STR_NOVARS:
	case SET_ENUM:
		return *(const char *const *)value;
	case SET_UINT:
		return t_strdup_printf("%u", *(const unsigned int *)value);
	case SET_TIME:
		return t_strdup_printf("%us", *(const unsigned int *)value);
	case SET_TIME_MSECS:
		return t_strdup_printf("%ums", *(const unsigned int *)value);
	case SET_SIZE:
		return t_strdup_printf("%"PRIuUOFF_T, *(const uoff_t *)value);
	default:
		i_unreached();
	}
}

/* Called when Dovecot starts, and by doveconf: for the configuration, and for
   each protocol and so on that has settings of its own. set has only what stands
   there, so look at what a process will see. */
static bool
dovetail_setting_values_check(struct event *event, void *set ATTR_UNUSED,
			      pool_t pool ATTR_UNUSED, const char **error_r)
{
	const struct dovetail_setting_values *values;
	struct dovetail_settings parsed;
	pool_t parse_pool;
	int ret = 0;

	if (dovetail_setting_values_get(event, &values, error_r) < 0)
		return FALSE;
	if (*values->dovetail_node != '\0' || *values->dovetail_peers != '\0' ||
	    *values->dovetail_primary != '\0' ||
	    *values->dovetail_redis != '\0') {
		/* nothing depends on base_dir */
		parse_pool = pool_alloconly_create("dovetail settings check",
						   1024);
		ret = dovetail_settings_parse(parse_pool, "",
					      dovetail_setting_values_find,
					      (void *)values, &parsed, error_r);
		pool_unref(&parse_pool);
	}
	settings_free(values);
	return ret == 0;
}
#endif
