/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "str.h"
#include "test-common.h"
#include "dovetail-compat.h"
#include "dovetail-settings.h"

/* key, value, ..., NULL; later ones win */
static const char *get_setting(void *context, const char *name)
{
	const char *const *pairs = context;
	const char *value = NULL;

	for (; *pairs != NULL; pairs += 2) {
		if (strcmp(pairs[0], name) == 0)
			value = pairs[1];
	}
	return value;
}

#define GOOD_SETTINGS \
	"dovetail_node", "a", \
	"dovetail_peers", "b  c-1.example.org ", \
	"dovetail_primary", "b", \
	"dovetail_redis", "redis://127.0.0.1"

static int
parse(const char **pairs, struct dovetail_settings *set_r, const char **error_r)
{
	*error_r = NULL;
	return dovetail_settings_parse(pool_datastack_create(), "/run/dovecot",
				       get_setting, pairs, set_r, error_r);
}

static void test_dovetail_settings_defaults(void)
{
	const char *pairs[] = { GOOD_SETTINGS, NULL };
	struct dovetail_settings set;
	const char *error;

	test_begin("dovetail settings: defaults");
	test_assert(dovetail_settings_are_set(get_setting, pairs));
	test_assert(parse(pairs, &set, &error) == 0);
	test_assert_strcmp(error, NULL);
	test_assert_strcmp(set.node, "a");
	test_assert_strcmp(t_strarray_join(set.peers, "|"),
			   "b|c-1.example.org");
	test_assert_strcmp(set.primary, "b");
	test_assert_strcmp(set.redis.host, "127.0.0.1");
	test_assert(set.redis.port == 6379);
	test_assert_strcmp(set.key_dir, "/etc/dovecot/dovetail");
	test_assert_strcmp(set.state_dir, "/var/lib/dovecot/dovetail");
	test_assert(set.ack == DOVETAIL_ACK_QUEUED);
	test_assert(set.ack_timeout_msecs == 2000);
	test_assert(!set.ack_refuse);
	test_assert(set.shards == 4);
	test_assert(set.queue_max_size == 1024*1024*1024);
	test_assert(set.verify_interval_secs == 24*60*60);
	test_assert(set.verify_rate == 10);
	test_assert_strcmp(set.queue_socket, "/run/dovecot/dovetail-queue");
	test_assert(set.health.lag_msecs == 5000);
	test_assert(set.health.stall_msecs == 60000);
	test_assert(set.health.max_age_msecs == 10000);
	test_assert(set.health.calm_msecs == 5000);
	test_assert(set.health.silence_msecs == 15000);
	test_assert(set.health.queue_percent == 80);
	test_assert(set.health_warn == 0 && set.health_defer == 0);
	test_assert(set.health_drain == 1U << DOVETAIL_HEALTH_FENCED);
	test_assert(set.health_down == 0);
	test_assert(set.health_transports[0] == NULL);
	test_assert(set.health_domains[0] == NULL);
	test_assert_strcmp(set.health_userdb,
			   "/run/dovecot/auth-dovetail-userdb");
	test_assert_strcmp(set.health_hook, "");
	test_assert_strcmp(set.health_webhook, "");
	test_end();
}

static void test_dovetail_settings_all(void)
{
	const char *pairs[] = {
		GOOD_SETTINGS,
		"dovetail_primary", "a",
		"dovetail_redis", "unix:/run/redis.sock?db=3&user=me",
		"dovetail_key_dir", "/k",
		"dovetail_state_dir", "/s",
		"dovetail_ack", "applied",
		"dovetail_ack_timeout", "500ms",
		"dovetail_ack_failure", "refuse",
		"dovetail_repair_extra", "report",
		"dovetail_shards", "64",
		"dovetail_queue_max_size", "16M",
		"dovetail_verify_interval", "1 week",
		"dovetail_verify_rate", "10000",
		"dovetail_queue_socket", "/q",
		"dovetail_health_lag", "500ms",
		"dovetail_health_stall", "2 min",
		"dovetail_health_max_age", "3s",
		"dovetail_health_calm", "0",
		"dovetail_health_queue_percent", "100",
		"dovetail_health_warn", "lagging  unknown",
		"dovetail_health_defer", "unprotected diverged",
		"dovetail_health_drain", "none",
		"dovetail_health_down", "fenced",
		"dovetail_health_transports",
			" a=lmtp:inet:10.77.0.1:24  b=lmtp:[x=y]:24",
		"dovetail_health_domains", "example.net  example.org",
		"dovetail_health_userdb", "none",
		"dovetail_health_hook", "/usr/local/bin/page-me",
		"dovetail_health_webhook", "https://chat.example.net/x?y=z",
		"acl", "vfile",
		NULL
	};
	struct dovetail_settings set;
	const char *error;
	unsigned int i;

	test_begin("dovetail settings: all");
	test_assert(parse(pairs, &set, &error) == 0);
	test_assert_strcmp(error, NULL);
	test_assert_strcmp(set.primary, "a");
	test_assert_strcmp(set.redis.path, "/run/redis.sock");
	test_assert_strcmp(set.redis.username, "me");
	test_assert(set.redis.db == 3);
	test_assert_strcmp(set.key_dir, "/k");
	test_assert_strcmp(set.state_dir, "/s");
	test_assert(set.ack == DOVETAIL_ACK_APPLIED);
	test_assert(set.ack_timeout_msecs == 500);
	test_assert(set.ack_refuse);
	test_assert(set.repair_extra == DOVETAIL_REPAIR_EXTRA_REPORT);
	test_assert(set.shards == 64);
	test_assert(set.queue_max_size == 16*1024*1024);
	test_assert(set.verify_interval_secs == 7*24*60*60);
	test_assert(set.verify_rate == 10000);
	test_assert_strcmp(set.queue_socket, "/q");
	test_assert(set.health.lag_msecs == 500);
	test_assert(set.health.stall_msecs == 120000);
	test_assert(set.health.max_age_msecs == 3000);
	test_assert(set.health.calm_msecs == 0);
	test_assert(set.health.queue_percent == 100);
	test_assert(set.health_warn == ((1U << DOVETAIL_HEALTH_LAGGING) |
					(1U << DOVETAIL_HEALTH_UNKNOWN)));
	test_assert(set.health_defer == ((1U << DOVETAIL_HEALTH_UNPROTECTED) |
					 (1U << DOVETAIL_HEALTH_DIVERGED)));
	test_assert(set.health_drain == 0);
	test_assert(set.health_down == 1U << DOVETAIL_HEALTH_FENCED);
	test_assert_strcmp(t_strarray_join(set.health_transports, "|"),
		"a|lmtp:inet:10.77.0.1:24|b|lmtp:[x=y]:24");
	test_assert_strcmp(t_strarray_join(set.health_domains, "|"),
			   "example.net|example.org");
	test_assert(set.health_userdb == NULL);
	test_assert_strcmp(set.health_hook, "/usr/local/bin/page-me");
	test_assert_strcmp(set.health_webhook,
			   "https://chat.example.net/x?y=z");

	for (i = 0; pairs[i] != NULL; i += 2) {
		test_assert_idx(dovetail_setting_name_is_known(pairs[i]) ==
				str_begins_with(pairs[i], "dovetail_"), i);
	}
	test_assert(!dovetail_setting_name_is_known("dovetail_"));
	test_assert(!dovetail_setting_name_is_known("dovetail_nodes"));
	test_assert(!dovetail_setting_name_is_known("DOVETAIL_NODE"));
	test_end();
}

static void test_dovetail_settings_unset(void)
{
	const char *none[] = { "acl", "vfile", NULL };
	const char *empty[] = { GOOD_SETTINGS, "dovetail_node", "", NULL };
	/* an empty value means the default */
	const char *defaults[] = {
		GOOD_SETTINGS, "dovetail_ack", "", "dovetail_shards", "",
		"dovetail_peers", "", "dovetail_primary", "a", NULL
	};
	struct dovetail_settings set;
	const char *error;

	test_begin("dovetail settings: unset");
	test_assert(!dovetail_settings_are_set(get_setting, none));
	test_assert(parse(none, &set, &error) < 0);
	test_assert(!dovetail_settings_are_set(get_setting, empty));
	test_assert(parse(empty, &set, &error) < 0);
	test_assert_strcmp(error, "dovetail_node: Not set: dovetail needs "
			   "this node's name");
	test_assert(parse(defaults, &set, &error) == 0);
	test_assert(set.shards == 4 && set.ack == DOVETAIL_ACK_QUEUED);
	test_assert(set.repair_extra == DOVETAIL_REPAIR_EXTRA_KEEP);
	test_assert(set.peers != NULL && set.peers[0] == NULL);
	test_end();
}

#define MUST_BEGIN \
	"It must begin with redis://, rediss:// or unix:"

#define NOT_URL(value) "'" value "' is not a URL: http://HOST[:PORT]/PATH or https://HOST[:PORT]/PATH"

static void test_dovetail_settings_invalid(void)
{
	static const struct {
		const char *name, *value, *error;
	} tests[] = {
		{ "dovetail_node", "A", "'A' is not a node name (1 to 64 of a-z 0-9 . -)" },
		{ "dovetail_node", "a b", "'a b' is not a node name (1 to 64 of a-z 0-9 . -)" },
		{ "dovetail_node", "%n", "Variables (%) cannot be used here" },
		{ "dovetail_peers", "b, c", "Names are separated by spaces, not commas" },
		{ "dovetail_peers", "b C", "'C' is not a node name (1 to 64 of a-z 0-9 . -)" },
		{ "dovetail_peers", "b/c", "'b/c' is not a node name (1 to 64 of a-z 0-9 . -)" },
		{ "dovetail_peers", "b a", "'a' is this node itself (dovetail_node); only the others belong here" },
		{ "dovetail_peers", "b c b", "'b' is there twice" },
		{ "dovetail_primary", "", "Not set: dovetail needs the name of the node whose mailboxes are the truth" },
		{ "dovetail_primary", "d", "'d' is neither this node (dovetail_node) nor one of dovetail_peers" },
		{ "dovetail_primary", "a b", "'a b' is neither this node (dovetail_node) nor one of dovetail_peers" },
		{ "dovetail_redis", "", "Not set: dovetail needs a Redis server, e.g. redis://127.0.0.1:6379/0" },
		{ "dovetail_redis", "localhost", MUST_BEGIN },
		{ "dovetail_redis_ca_file", "/ca.pem", "Only for a Redis with TLS: dovetail_redis does not begin with rediss://" },
		{ "dovetail_redis", "unix:/%d", "Variables (%) cannot be used here" },
		{ "dovetail_key_dir", "keys", "'keys' does not begin with /" },
		{ "dovetail_state_dir", "./x", "'./x' does not begin with /" },
		{ "dovetail_ack", "foo", "'foo' is none of local, queued, applied" },
		{ "dovetail_ack", "Queued", "'Queued' is none of local, queued, applied" },
		{ "dovetail_ack_timeout", "2", "Time interval '2' is missing units (add e.g. 's' for seconds)" },
		{ "dovetail_ack_timeout", "0", "'0' is not within 1ms and 60s" },
		{ "dovetail_ack_timeout", "61s", "'61s' is not within 1ms and 60s" },
		{ "dovetail_ack_timeout", "60001ms", "'60001ms' is not within 1ms and 60s" },
		{ "dovetail_ack_timeout", "-1s", "Invalid time interval: -1s" },
		{ "dovetail_ack_failure", "yes", "'yes' is none of proceed, refuse" },
		{ "dovetail_repair_extra", "delete", "'delete' is none of keep, report" },
		{ "dovetail_shards", "0", "'0' is not a number within 1 and 64" },
		{ "dovetail_shards", "65", "'65' is not a number within 1 and 64" },
		{ "dovetail_shards", "4x", "'4x' is not a number within 1 and 64" },
		{ "dovetail_shards", "-1", "'-1' is not a number within 1 and 64" },
		{ "dovetail_queue_max_size", "15M", "'15M' is less than 16M (sizes are given as e.g. 1G)" },
		{ "dovetail_queue_max_size", "1", "'1' is less than 16M (sizes are given as e.g. 1G)" },
		{ "dovetail_queue_max_size", "lots", "Invalid size: lots" },
		{ "dovetail_verify_interval", "daily", "Invalid time interval: daily" },
		{ "dovetail_verify_rate", "0", "'0' is not a number of users per second within 1 and 10000" },
		{ "dovetail_verify_rate", "10001", "'10001' is not a number of users per second within 1 and 10000" },
		{ "dovetail_health_lag", "99ms", "'99ms' is less than 100ms" },
		{ "dovetail_health_stall", "4s", "'4s' is less than dovetail_health_lag" },
		{ "dovetail_health_max_age", "1999ms", "'1999ms' is less than 2000ms" },
		{ "dovetail_health_queue_percent", "0", "'0' is not a number within 1 and 100" },
		{ "dovetail_health_queue_percent", "101", "'101' is not a number within 1 and 100" },
		{ "dovetail_health_warn", "ok", "'ok' is none of catching-up, lagging, unknown, diverged, stalled, unprotected, fenced, none" },
		{ "dovetail_health_transports", "lmtp:inet:10.77.0.1:24", "'lmtp:inet:10.77.0.1:24' is not NODE=TRANSPORT, such as a=lmtp:inet:10.77.0.1:24 (separated by spaces)" },
		{ "dovetail_health_transports", "a=", "'a=' is not NODE=TRANSPORT, such as a=lmtp:inet:10.77.0.1:24 (separated by spaces)" },
		{ "dovetail_health_transports", "a=x,b=y", "'a=x,b=y' is not NODE=TRANSPORT, such as a=lmtp:inet:10.77.0.1:24 (separated by spaces)" },
		{ "dovetail_health_transports", "a=x d=y", "'d' is neither this node (dovetail_node) nor one of dovetail_peers" },
		{ "dovetail_health_transports", "a=x b=y a=z", "'a' is there twice" },
		{ "dovetail_health_domains", "x@y", "'x@y' is not a domain (they are separated by spaces; *: all)" },
		{ "dovetail_health_defer", "lagging,stalled", "'lagging,stalled' is none of catching-up, lagging, unknown, diverged, stalled, unprotected, fenced, none" },
		{ "dovetail_health_hook", "page-me", "'page-me' does not begin with /" },
		{ "dovetail_health_webhook", "ftp://x/", NOT_URL("ftp://x/") },
		{ "dovetail_health_webhook", "http://x/ y", NOT_URL("http://x/ y") },
	};
	struct dovetail_settings set;
	const char *error;
	unsigned int i;

	test_begin("dovetail settings: invalid");
	for (i = 0; i < N_ELEMENTS(tests); i++) {
		const char *pairs[] = {
			GOOD_SETTINGS, tests[i].name, tests[i].value, NULL
		};
		test_assert_idx(parse(pairs, &set, &error) < 0, i);
		test_assert_strcmp_idx(error, t_strdup_printf(
			"%s: %s", tests[i].name, tests[i].error), i);
	}

	const char *alone[] = {
		GOOD_SETTINGS, "dovetail_primary", "a", "dovetail_peers", "",
		"dovetail_ack", "applied", NULL
	};
	test_assert(parse(alone, &set, &error) < 0);
	test_assert_strcmp(error, "dovetail_ack: applied needs at least one "
			   "node in dovetail_peers");
	test_end();
}

static void test_dovetail_settings_limits(void)
{
	static const char *const good[][2] = {
		{ "dovetail_ack_timeout", "1ms" },
		{ "dovetail_ack_timeout", "60s" },
		{ "dovetail_ack_timeout", "1 min" },
		{ "dovetail_shards", "1" },
		{ "dovetail_queue_max_size", "16777216" },
		{ "dovetail_queue_max_size", "2T" },
		{ "dovetail_verify_interval", "0" },
		{ "dovetail_verify_interval", "1s" },
		{ "dovetail_verify_rate", "1" },
		{ "dovetail_queue_socket", "other" },
	};
	struct dovetail_settings set;
	const char *error;
	unsigned int i;

	test_begin("dovetail settings: limits");
	for (i = 0; i < N_ELEMENTS(good); i++) {
		const char *pairs[] = {
			GOOD_SETTINGS, good[i][0], good[i][1], NULL
		};
		test_assert_idx(parse(pairs, &set, &error) == 0, i);
		test_assert_strcmp_idx(error, NULL, i);
	}
	test_assert_strcmp(set.queue_socket, "/run/dovecot/other");
	test_end();
}

static void test_dovetail_settings_redis_tls(void)
{
	static const char *const tests[][4] = {
		/* ca_file, cert_file, key_file, error */
		{ "", "", "", NULL },
		{ "/ca", "", "", NULL },
		{ "/ca", "/cert", "/key", NULL },
		{ "ca", "", "", "dovetail_redis_ca_file: 'ca' does not begin with /" },
		{ "", "/cert", "", "dovetail_redis_key_file: A certificate (dovetail_redis_cert_file) needs its key, and the other way round" },
		{ "", "", "/key", "dovetail_redis_key_file: A certificate (dovetail_redis_cert_file) needs its key, and the other way round" },
	};
	struct dovetail_settings set;
	const char *error;
	unsigned int i;

	test_begin("dovetail settings: tls");
	for (i = 0; i < N_ELEMENTS(tests); i++) {
		const char *pairs[] = {
			"dovetail_node", "a", "dovetail_primary", "a",
			"dovetail_redis", "rediss://host",
			"dovetail_redis_ca_file", tests[i][0],
			"dovetail_redis_cert_file", tests[i][1],
			"dovetail_redis_key_file", tests[i][2],
			NULL
		};

		error = NULL;
		test_assert_idx(parse(pairs, &set, &error) ==
				(tests[i][3] == NULL ? 0 : -1), i);
		test_assert_strcmp_idx(error, tests[i][3], i);
		if (error == NULL) {
			test_assert_strcmp_idx(set.redis_ca_file, tests[i][0], i);
			test_assert_strcmp_idx(set.redis_cert_file, tests[i][1], i);
			test_assert_strcmp_idx(set.redis_key_file, tests[i][2], i);
		}
	}
	test_end();
}

#if DOVETAIL_DOVECOT_24
/* What is not set is what Dovecot takes for the default. */
static const char *get_dovecot_setting(void *context, const char *name)
{
	const char *pairs[] = { GOOD_SETTINGS, NULL };
	const char *value = get_setting(pairs, name);

	return value != NULL ? value :
		dovetail_setting_values_find(context, name);
}

static void test_dovetail_settings_dovecot(void)
{
	const char *pairs[] = { GOOD_SETTINGS, NULL };
	const struct setting_define *def;
	struct setting_parser_context *parser;
	struct dovetail_settings set, set2;
	unsigned int count = 0;
	const char *error;
	void *values;

	test_begin("dovetail settings: Dovecot's own");
	parser = settings_parser_init(pool_datastack_create(),
				      &dovetail_setting_parser_info, 0);
	values = settings_parser_get_set(parser);
	for (def = dovetail_setting_parser_info.defines; def->key != NULL;
	     def++) {
		if (!str_begins_with(def->key, "dovetail_"))
			continue;
		test_assert_idx(dovetail_setting_name_is_known(def->key),
				count);
		count++;
	}
	/* each of them is asked for, so there is no other */
	test_assert(dovetail_settings_parse(pool_datastack_create(),
					    "/run/dovecot", get_dovecot_setting,
					    values, &set2, &error) == 0);
	test_assert(parse(pairs, &set, &error) == 0);
	test_assert_strcmp(set.key_dir, set2.key_dir);
	test_assert_strcmp(set.state_dir, set2.state_dir);
	test_assert(set.ack == set2.ack);
	test_assert(set.ack_timeout_msecs == set2.ack_timeout_msecs);
	test_assert(set.ack_refuse == set2.ack_refuse);
	test_assert(set.shards == set2.shards);
	test_assert(set.queue_max_size == set2.queue_max_size);
	test_assert(set.verify_interval_secs == set2.verify_interval_secs);
	test_assert(set.verify_rate == set2.verify_rate);
	test_assert_strcmp(set.queue_socket, set2.queue_socket);
	test_assert(memcmp(&set.health, &set2.health,
			   sizeof(set.health)) == 0);
	test_assert(set.health_warn == set2.health_warn);
	test_assert(set.health_defer == set2.health_defer);
	test_assert(set.health_drain == set2.health_drain);
	test_assert(set.health_down == set2.health_down);
	test_assert(set2.health_transports[0] == NULL &&
		    set2.health_domains[0] == NULL);
	test_assert_strcmp(set.health_userdb, set2.health_userdb);

	test_assert(settings_parse_keyvalue(parser, "dovetail_ack_timeout",
					    "1500ms") > 0);
	test_assert(settings_parse_keyvalue(parser, "dovetail_queue_max_size",
					    "17M") > 0);
	test_assert(settings_parse_keyvalue(parser, "dovetail_ack",
					    "foo") < 0);
	test_assert(dovetail_settings_parse(pool_datastack_create(),
					    "/run/dovecot", get_dovecot_setting,
					    values, &set2, &error) == 0);
	test_assert(set2.ack_timeout_msecs == 1500);
	test_assert(set2.queue_max_size == 17 * 1024 * 1024);
	settings_parser_unref(&parser);
	test_end();
}
#endif

static void test_dovetail_redis_url(void)
{
	static const struct {
		const char *url;
		struct dovetail_redis_url result;
	} tests[] = {
		{ "redis://localhost",
		  { NULL, "localhost", 6379, FALSE, NULL, 0, "dovetail:" } },
		{ "redis://redis.example.org:6380/",
		  { NULL, "redis.example.org", 6380, FALSE, NULL, 0, "dovetail:" } },
		{ "redis://me@10.0.0.1:1/15?prefix=x:",
		  { NULL, "10.0.0.1", 1, FALSE, "me", 15, "x:" } },
		{ "redis://[::1]",
		  { NULL, "::1", 6379, FALSE, NULL, 0, "dovetail:" } },
		{ "redis://me@[fe80::1]:65535/1",
		  { NULL, "fe80::1", 65535, FALSE, "me", 1, "dovetail:" } },
		{ "redis://host?prefix={mail}",
		  { NULL, "host", 6379, FALSE, NULL, 0, "{mail}" } },
		{ "rediss://me@host/2",
		  { NULL, "host", 6379, TRUE, "me", 2, "dovetail:" } },
		{ "unix:/run/redis.sock",
		  { "/run/redis.sock", NULL, 0, FALSE, NULL, 0, "dovetail:" } },
		{ "unix:/a@b:c?user=me&db=2&prefix=p",
		  { "/a@b:c", NULL, 0, FALSE, "me", 2, "p" } },
	};
	const struct dovetail_redis_url *result;
	struct dovetail_redis_url url;
	const char *error;
	unsigned int i;

	test_begin("dovetail redis url");
	for (i = 0; i < N_ELEMENTS(tests); i++) {
		result = &tests[i].result;
		error = NULL;
		test_assert_idx(dovetail_redis_url_parse(
			pool_datastack_create(), tests[i].url, &url,
			&error) == 0, i);
		test_assert_strcmp_idx(error, NULL, i);
		test_assert_strcmp_idx(url.path, result->path, i);
		test_assert_strcmp_idx(url.host, result->host, i);
		test_assert_idx(url.port == result->port, i);
		test_assert_idx(url.tls == result->tls, i);
		test_assert_strcmp_idx(url.username, result->username, i);
		test_assert_idx(url.db == result->db, i);
		test_assert_strcmp_idx(url.prefix, result->prefix, i);
	}
	test_end();
}

static void test_dovetail_redis_url_invalid(void)
{
#define NO_PASSWORD \
	"A password does not belong into the URL, which every mail process " \
	"can read; write it into the file redis.password in dovetail_key_dir"
	static const char *const tests[][2] = {
		{ "", MUST_BEGIN },
		{ "REDIS://host", MUST_BEGIN },
		{ "/run/redis.sock", MUST_BEGIN },
		{ "rediss://", "Invalid host or port ''" },
		{ "rediss://me:secret@host", NO_PASSWORD },
		{ "redis://", "Invalid host or port ''" },
		{ "redis:///1", "Invalid host or port ''" },
		{ "redis://:6379", "Invalid host or port ':6379'" },
		{ "redis://host:", "Invalid host or port 'host:'" },
		{ "redis://host:0", "Invalid host or port 'host:0'" },
		{ "redis://host:65536", "Invalid host or port 'host:65536'" },
		{ "redis://ho st", "Invalid host 'ho st'" },
		{ "redis://ho,st", "Invalid host 'ho,st'" },
		{ "redis://::1", "An IPv6 address must stand in []" },
		{ "redis://[::1", "Invalid host or port '[::1'" },
		{ "redis://[10.0.0.1]", "Invalid IPv6 address '10.0.0.1'" },
		{ "redis://host/x", "Invalid database number 'x'" },
		{ "redis://host/-1", "Invalid database number '-1'" },
		{ "redis://host/65536", "Invalid database number '65536'" },
		{ "redis://host/1/2", "Invalid database number '1/2'" },
		{ "redis://host?db=1", "Unknown parameter 'db' (known: prefix)" },
		{ "redis://host?prefix=", "Invalid prefix ''" },
		{ "redis://host?prefix=a*", "Invalid prefix 'a*'" },
		{ "redis://host?prefix=a b", "Invalid prefix 'a b'" },
		{ "redis://host?prefix=a&prefix=b", "Parameter 'prefix' is given twice" },
		{ "redis://@host", "Invalid user name ''" },
		{ "redis://a b@host", "Invalid user name 'a b'" },
		{ "redis://:secret@host", NO_PASSWORD },
		{ "redis://me:secret@host", NO_PASSWORD },
		{ "redis://me:se@ret/?x@host", NO_PASSWORD },
		{ "redis://me:se@ret@host", NO_PASSWORD },
		{ "redis://host?password=secret", NO_PASSWORD },
		{ "unix:/s?password=secret", NO_PASSWORD },
		{ "unix:/s?user=me:secret", NO_PASSWORD },
		{ "unix:", "The path after unix: must begin with /" },
		{ "unix:redis.sock", "The path after unix: must begin with /" },
		{ "unix:/s?db=", "Invalid database number ''" },
		{ "unix:/s?user=", "Invalid user name ''" },
		{ "unix:/s?port=1", "Unknown parameter 'port' (known: user, db, prefix)" },
	};
	struct dovetail_redis_url url;
	const char *error;
	unsigned int i;

	test_begin("dovetail redis url: invalid");
	for (i = 0; i < N_ELEMENTS(tests); i++) {
		error = NULL;
		test_assert_idx(dovetail_redis_url_parse(
			pool_datastack_create(), tests[i][0], &url,
			&error) < 0, i);
		test_assert_strcmp_idx(error, tests[i][1], i);
	}
	test_end();
}

int main(void)
{
	static void (*const test_functions[])(void) = {
		test_dovetail_settings_defaults,
		test_dovetail_settings_all,
		test_dovetail_settings_unset,
		test_dovetail_settings_invalid,
		test_dovetail_settings_limits,
		test_dovetail_settings_redis_tls,
#if DOVETAIL_DOVECOT_24
		test_dovetail_settings_dovecot,
#endif
		test_dovetail_redis_url,
		test_dovetail_redis_url_invalid,
		NULL
	};
	return test_run(test_functions);
}
