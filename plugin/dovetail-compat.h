#ifndef DOVETAIL_COMPAT_H
#define DOVETAIL_COMPAT_H

/* What differs between Dovecot releases: resolved here, once, and nowhere
   else (but for the settings: dovetail-settings.c, dovetail-settings-module.c).
   Each section needs the Dovecot headers it names, included before. lib.h is
   enough for the first, which shared/ uses, too. */

#define DOVETAIL_DOVECOT_24 DOVECOT_PREREQ(2, 4, 0)

#if !DOVETAIL_DOVECOT_24
#  define str_begins_with(haystack, needle) str_begins(haystack, needle)
#endif

#ifdef TEST_COMMON_H
/* ---- unit tests: test-common.h ---- */

/* Debian has them since a security update of 2.3, not in 2.4. */
#ifndef test_assert_memcmp
#  define test_assert_memcmp_idx(m1, len1, m2, len2, i) \
	test_assert_idx((len1) == (len2) && memcmp(m1, m2, len1) == 0, i)
#  define test_assert_memcmp(m1, len1, m2, len2) \
	test_assert((len1) == (len2) && memcmp(m1, m2, len1) == 0)
#endif
#endif

#ifdef SETTINGS_PARSER_H
/* ---- settings: settings-parser.h ---- */

#if DOVETAIL_DOVECOT_24
#  define settings_get_time(str, secs_r, error_r) \
	str_parse_get_interval(str, secs_r, error_r)
#  define settings_get_time_msecs(str, msecs_r, error_r) \
	str_parse_get_interval_msecs(str, msecs_r, error_r)
#  define settings_get_size(str, bytes_r, error_r) \
	str_parse_get_size(str, bytes_r, error_r)
#endif
#endif

/* libdovetail_settings.so and its settings root in Dovecot's config process, and
   Dovecot's own default of a setting that it hands on. */
#define DOVETAIL_COMPAT_SETTINGS_MODULE "dovetail"
#define DOVETAIL_COMPAT_INTERNAL_USER "dovecot"

#ifdef MASTER_SERVICE_H
/* ---- the release at run time: master-service.h ---- */

/* Dovecot refuses modules of another ABI, but its private structs, which we use,
   may differ between two releases of the same ABI. Returns FALSE and error_r
   (data stack) when this is not the release we were built for. */
static inline bool
dovetail_compat_version_is_ours(struct master_service *service,
				const char **error_r)
{
	const char *version = master_service_get_version_string(service);

	/* NULL: the administrator set version_ignore */
	if (version == NULL || strcmp(version, PACKAGE_VERSION) == 0)
		return TRUE;
	*error_r = t_strdup_printf(
		"dovetail was built for Dovecot "PACKAGE_VERSION", but this is "
		"%s: it must be built again", version);
	return FALSE;
}
#endif

#ifdef MASTER_SERVICE_H
/* ---- listeners: master-service.h ---- */

/* The protocol that somebody who connects to this listener speaks: the word behind the
   last "-" of its name (2.4: or its type). Data stack or borrowed. */
static inline const char *
dovetail_compat_listener_type(const struct master_service_connection *conn)
{
#if DOVETAIL_DOVECOT_24
	return master_service_connection_get_type(conn);
#else
	const char *name = strrchr(conn->name, '/'), *word;

	name = name == NULL ? conn->name : name + 1;
	word = strrchr(name, '-');
	return word == NULL ? name : word + 1;
#endif
}
#endif

/* What the auth service's protocol calls the service for which a user is looked
   up. */
#if DOVETAIL_DOVECOT_24
#  define DOVETAIL_COMPAT_AUTH_SERVICE "protocol"
#else
#  define DOVETAIL_COMPAT_AUTH_SERVICE "service"
#endif

#ifdef HTTP_SERVER_H
/* ---- HTTP: http-server.h ---- */

struct dovetail_compat_http_settings {
	unsigned int idle_msecs;
	uoff_t target_max_len, headers_max_size, payload_max_size;
};

static inline struct http_server *
dovetail_compat_http_server_init(const struct dovetail_compat_http_settings *set,
				 struct event *event)
{
#if DOVETAIL_DOVECOT_24
	/* the server and its connections keep references to the pool */
	pool_t pool = pool_alloconly_create("dovetail http settings", 512);
	struct http_server_settings *http_set =
		p_new(pool, struct http_server_settings, 1);
	struct http_server *server;

	http_server_settings_init(pool, http_set);
	http_set->request_max_target_length = set->target_max_len;
	http_set->request_max_payload_size = set->payload_max_size;
	http_set->request_hdr_max_size = set->headers_max_size;
	http_set->request_hdr_max_field_size = set->headers_max_size;
	http_set->max_client_idle_time_msecs = set->idle_msecs;
	http_set->max_pipelined_requests = 1;
	server = http_server_init(http_set, event);
	pool_unref(&pool);
	return server;
#else
	struct http_server_settings http_set;

	i_zero(&http_set);
	http_set.event = event;
	http_set.request_limits.max_target_length = set->target_max_len;
	http_set.request_limits.max_payload_size = set->payload_max_size;
	http_set.request_limits.header.max_size = set->headers_max_size;
	http_set.request_limits.header.max_field_size = set->headers_max_size;
	http_set.max_client_idle_time_msecs = set->idle_msecs;
	http_set.max_pipelined_requests = 1;
	return http_server_init(&http_set);
#endif
}
#endif

#ifdef MAIL_INDEX_H
/* ---- an index: mail-index.h ---- */

/* What went wrong with the index last. */
static inline const char *dovetail_index_error(struct mail_index *index)
{
#if DOVETAIL_DOVECOT_24
	enum mail_index_error_code code;
	const char *error = mail_index_get_last_error(index, &code);
#else
	const char *error = mail_index_get_error_message(index);
#endif

	return error == NULL ? "unknown error" : error;
}
#endif

#ifdef IOSTREAM_SSL_H
/* ---- TLS: iostream-ssl.h ---- */

/* Settings of a client that insists on a valid certificate. The contents of PEM
   files; NULL: none. The pool must outlive what is made with the settings. */
static inline void
dovetail_compat_ssl_settings(struct ssl_iostream_settings *set_r, pool_t pool,
			     const char *ca, const char *cert, const char *key)
{
	i_zero(set_r);
#if DOVETAIL_DOVECOT_24
	set_r->pool = pool;
	set_r->ca.path = set_r->cert.cert.path = set_r->cert.key.path = "";
	set_r->ca.content = ca;
	set_r->cert.cert.content = cert;
	set_r->cert.key.content = key;
#else
	(void)pool;
	set_r->ca = ca;
	set_r->cert.cert = cert;
	set_r->cert.key = key;
#endif
	set_r->min_protocol = "TLSv1.2";
	set_r->skip_crl_check = TRUE;
	set_r->verify_remote_cert = TRUE;
	set_r->tickets = TRUE;
}

static inline int
dovetail_compat_ssl_client(struct ssl_iostream_context *ctx,
			   const struct ssl_iostream_settings *set,
			   struct event *event, const char *host,
			   struct istream **input, struct ostream **output,
			   struct ssl_iostream **ssl_r, const char **error_r)
{
#if DOVETAIL_DOVECOT_24
	(void)set;
	return io_stream_create_ssl_client(ctx, host, event, 0, input, output,
					   ssl_r, error_r);
#else
	(void)event;
	return io_stream_create_ssl_client(ctx, host, set, input, output,
					   ssl_r, error_r);
#endif
}

#ifdef HTTP_CLIENT_H
/* ---- HTTP, as a client: http-client.h ---- */

/* One attempt for each request, and no redirects; names are looked up by Dovecot's
   service dns-client, certificates checked against what the system trusts. */
static inline struct http_client *
dovetail_compat_http_client_init(const char *base_dir,
				 unsigned int timeout_msecs,
				 struct event *event)
{
	pool_t pool = pool_alloconly_create("dovetail http client", 1024);
	const char *dns = p_strconcat(pool, base_dir, "/dns-client", NULL);
	struct ssl_iostream_settings *ssl =
		p_new(pool, struct ssl_iostream_settings, 1);
	struct http_client *client;
#if DOVETAIL_DOVECOT_24
	/* the client keeps references to the pool */
	struct http_client_settings *set =
		p_new(pool, struct http_client_settings, 1);

	http_client_settings_init(pool, set);
	set->auto_redirect = FALSE;
	set->auto_retry = FALSE;
	set->request_max_attempts = 1;
	set->base_dir = base_dir;
#else
	/* it is copied */
	struct http_client_settings http_set, *set = &http_set;

	i_zero(set);
	set->no_auto_redirect = TRUE;
	set->no_auto_retry = TRUE;
	set->max_attempts = 1;
	set->event_parent = event;
	set->ssl = ssl;
#endif
	set->dns_client_socket_path = dns;
	set->max_connect_attempts = 1;
	set->connect_timeout_msecs = timeout_msecs;
	set->request_timeout_msecs = timeout_msecs;
	set->request_absolute_timeout_msecs = timeout_msecs;
	set->user_agent = "dovetail";
	dovetail_compat_ssl_settings(ssl, pool, NULL, NULL, NULL);
#if DOVETAIL_DOVECOT_24
	client = http_client_init(set, event);
	http_client_set_ssl_settings(client, ssl);
#else
	client = http_client_init(set);
#endif
	pool_unref(&pool);
	return client;
}
#endif
#endif

#ifdef MDBOX_STORAGE_REBUILD_H
/* ---- mdbox: mdbox-map-private.h, mdbox-storage.h, mdbox-storage-rebuild.h ---- */

/* Dovecot 2.3 rebuilds in the middle of a sync. If that fails at its end, the
   mailboxes are written and the map is not. If it does not, the map stays marked as
   just checked, in the file and in memory, and so the next sync rebuilds everything
   again, and the next. This rebuilds once more, if rebuilt is true or the map is
   marked, and takes the marks away. (Only where nobody looks at the mailbox:
   rebuilding throws clients out. They do not stay as long as dovetail-replay,
   either.) */
static inline void
dovetail_compat_mdbox_end_rebuilds(struct mdbox_storage *storage ATTR_UNUSED,
				   bool rebuilt ATTR_UNUSED)
{
#if !DOVETAIL_DOVECOT_24
	if (storage->map == NULL ||
	    (!rebuilt && !mdbox_map_is_fscked(storage->map)))
		return;
	if (mdbox_storage_rebuild(storage) == 0) {
		(void)mail_index_reset_fscked(storage->map->index);
		/* what the map's view shows is asked the next time */
		(void)mdbox_map_refresh(storage->map);
	}
#endif
}
#endif

#ifdef MAIL_CACHE_H
/* ---- an index' cache: mail-cache.h ---- */

static inline void
dovetail_compat_cache_register(struct mail_cache *cache,
			       struct mail_cache_field *field)
{
#if DOVETAIL_DOVECOT_24
	mail_cache_register_fields(cache, field, 1,
				   MAIL_CACHE_TRUNCATE_NAME_FAIL);
#else
	mail_cache_register_fields(cache, field, 1);
#endif
}
#endif

#ifdef MAIL_USER_H
/* ---- a user: mail-user.h ---- */

#include "dovetail-settings.h"

#if !DOVETAIL_DOVECOT_24
static inline const char *
dovetail_compat_user_setting(void *context, const char *name)
{
	return mail_user_plugin_getenv(context, name);
}
#endif

/* The settings with what the userdb said about this user; strings live as long
   as the user. Returns 1, 0: dovetail_node is not set, or -1 and error_r (data
   stack). */
static inline int
dovetail_compat_user_settings_read(struct mail_user *user,
				   struct dovetail_settings *set_r,
				   const char **error_r)
{
#if DOVETAIL_DOVECOT_24
	const struct dovetail_setting_values *values;
	int ret = 0;

	if (dovetail_setting_values_get(user->event, &values, error_r) < 0)
		return -1;
	if (dovetail_settings_are_set(dovetail_setting_values_find,
				      (void *)values)) {
		ret = dovetail_settings_parse(user->pool, user->set->base_dir,
					      dovetail_setting_values_find,
					      (void *)values, set_r,
					      error_r) < 0 ? -1 : 1;
	}
	settings_free(values);
	return ret;
#else
	if (!dovetail_settings_are_set(dovetail_compat_user_setting, user))
		return 0;
	return dovetail_settings_parse(user->pool, user->set->base_dir,
				       dovetail_compat_user_setting, user,
				       set_r, error_r) < 0 ? -1 : 1;
#endif
}
#endif

#if defined(MAIL_NAMESPACE_H) && defined(SETTINGS_PARSER_H)
/* ---- a namespace: mail-namespace.h, mail-storage-settings.h,
   settings-parser.h ---- */

#include "mail-storage-service.h"

/* TRUE: it was made for a location somebody named on the way ("doveadm import"),
   not by the configuration: its mailboxes are not the user's. */
static inline bool
dovetail_compat_namespace_is_foreign(const struct mail_namespace *ns)
{
#if DOVETAIL_DOVECOT_24
	const struct mail_storage_service_user *user = ns->user->service_user;

	return user != NULL && (user->input.flags_override_add &
				MAIL_STORAGE_SERVICE_FLAG_NO_NAMESPACES) != 0;
#else
	return str_begins(ns->unexpanded_set->location,
			  SETTING_STRVAR_EXPANDED);
#endif
}
#endif

#ifdef DOVEADM_H
/* ---- doveadm: doveadm.h ---- */

#include "master-service-private.h"
#include "dovetail-settings.h"

#include <sys/stat.h>

/* What to say behind an error in settings, "" if nothing: doveadm as root gets
   them from the Dovecot that runs, if there is one, and so does not see what has
   changed in the files since, unless -c names them. */
static inline const char *dovetail_compat_doveadm_settings_hint(void)
{
	struct stat st;

	if (master_service->config_path_changed_with_param ||
	    stat(t_strconcat(doveadm_settings->base_dir, "/config", NULL),
		 &st) < 0 || !S_ISSOCK(st.st_mode))
		return "";
	return t_strdup_printf(
		" (so in the running Dovecot: \"doveadm -c %s ...\" reads"
		" what has changed since, \"doveadm reload\" lets Dovecot"
		" read it, too)",
		master_service_get_config_path(master_service));
}

/* A setting for commands that are not about a user; NULL when it is not set, or
   is so wrong that Dovecot says so. */
static inline const char *
dovetail_compat_doveadm_setting(void *context ATTR_UNUSED, const char *name)
{
#if DOVETAIL_DOVECOT_24
	const struct dovetail_setting_values *values;
	const char *value, *error;

	if (dovetail_setting_values_get(
			master_service_get_event(master_service),
			&values, &error) < 0) {
		i_error("%s", error);
		return NULL;
	}
	value = t_strdup(dovetail_setting_values_find((void *)values, name));
	settings_free(values);
	return value;
#else
	return doveadm_plugin_getenv(name);
#endif
}

/* All of them; strings live on the data stack. Returns 0, or -1 and error_r. */
static inline int
dovetail_compat_doveadm_settings_read(struct dovetail_settings *set_r,
				      const char **error_r)
{
	pool_t pool = pool_datastack_create();
#if DOVETAIL_DOVECOT_24
	const struct dovetail_setting_values *values;
	int ret;

	if (dovetail_setting_values_get(
			master_service_get_event(master_service),
			&values, error_r) < 0)
		return -1;
	ret = dovetail_settings_parse(pool, doveadm_settings->base_dir,
				      dovetail_setting_values_find,
				      (void *)values, set_r, error_r);
	settings_free(values);
	return ret;
#else
	return dovetail_settings_parse(pool, doveadm_settings->base_dir,
				       dovetail_compat_doveadm_setting, NULL,
				       set_r, error_r);
#endif
}

#ifdef DOVEADM_MAIL_H
/* The parameters of a per-user command's v.init. */
#if DOVETAIL_DOVECOT_24
#  define DOVETAIL_COMPAT_MAIL_CMD_INIT_ARGS \
	struct doveadm_mail_cmd_context *ctx ATTR_UNUSED
#else
#  define DOVETAIL_COMPAT_MAIL_CMD_INIT_ARGS \
	struct doveadm_mail_cmd_context *ctx ATTR_UNUSED, \
	const char *const args[] ATTR_UNUSED
#endif

/* A per-user command's positional arguments, NULL-terminated. They are an array
   parameter called name, or on 2.3 anything at all inside "doveadm batch". */
static inline const char *const *
dovetail_compat_mail_cmd_args(struct doveadm_mail_cmd_context *ctx,
			      const char *name ATTR_UNUSED)
{
#if DOVETAIL_DOVECOT_24
	static const char *const none[] = { NULL };
	const char *const *args;

	return doveadm_cmd_param_array(ctx->cctx, name, &args) ? args : none;
#else
	return ctx->args;
#endif
}
#endif
#endif

#ifdef MAIL_STORAGE_SERVICE_H
/* ---- a service that opens users: mail-storage-service.h ---- */

#include "mail-user.h"

static inline struct mail_storage_service_ctx *
dovetail_compat_storage_service_init(struct master_service *service,
				     enum mail_storage_service_flags flags)
{
#if DOVETAIL_DOVECOT_24
	return mail_storage_service_init(service, flags);
#else
	return mail_storage_service_init(service, NULL, flags);
#endif
}

/* For mail_storage_service_all_init_mask(). */
#if DOVETAIL_DOVECOT_24
#  define DOVETAIL_COMPAT_ALL_USERS "*"
#else
#  define DOVETAIL_COMPAT_ALL_USERS ""
#endif

/* mail_storage_service_lookup_next(): the caller unreferences *service_user_r
   after mail_user_deinit(). */
static inline int
dovetail_compat_user_open(struct mail_storage_service_ctx *ctx,
			  struct mail_storage_service_input *input,
			  struct mail_storage_service_user **service_user_r,
			  struct mail_user **user_r, const char **error_r)
{
#if DOVETAIL_DOVECOT_24
	int ret = mail_storage_service_lookup_next(ctx, input, user_r, error_r);

	if (ret > 0) {
		*service_user_r = (*user_r)->service_user;
		mail_storage_service_user_ref(*service_user_r);
	}
	return ret;
#else
	input->module = "mail";
	return mail_storage_service_lookup_next(ctx, input, service_user_r,
						user_r, error_r);
#endif
}
#endif

#ifdef MASTER_SERVICE_SETTINGS_H
/* ---- a service of ours: master-service.h, master-service-settings.h,
   settings-parser.h ---- */

#include "dovetail-settings.h"

/* Flags for a permanent service: the master does not end it for being idle. */
#if DOVETAIL_DOVECOT_24
#  define DOVETAIL_COMPAT_SERVICE_FLAGS \
	(MASTER_SERVICE_FLAG_NO_IDLE_DIE | \
	 MASTER_SERVICE_FLAG_NO_SSL_INIT)
#else
#  define DOVETAIL_COMPAT_SERVICE_FLAGS \
	(MASTER_SERVICE_FLAG_NO_IDLE_DIE | \
	 MASTER_SERVICE_FLAG_KEEP_CONFIG_OPEN | \
	 MASTER_SERVICE_FLAG_DISABLE_SSL_SET)
#endif

#ifdef SETTINGS_PARSER_H
#if !DOVETAIL_DOVECOT_24
struct dovetail_compat_service_settings {
	/* plugin { }: name, value, name, value, ... */
	ARRAY(const char *) plugin_envs;
};
/* What libdovetail_settings.so (dovetail-settings-module.c) hands on. */
struct dovetail_compat_module_settings {
	const char *default_internal_user;
};
#endif

struct dovetail_compat_service {
	const char *base_dir;
	/* whom to become when the administrator says user = root */
	const char *default_internal_user;
#if DOVETAIL_DOVECOT_24
	const struct dovetail_setting_values *set;
#else
	const struct dovetail_compat_service_settings *set;
#endif
};

/* Read Dovecot's configuration as the service name sees it. Call as root, once,
   after master_service_init(). Strings live as long as the service's settings.
   Returns 0, or -1 and error_r (data stack).

   On 2.3, never ask for the module "master": Dovecot's config process would
   read the files anew, as for a reload, and this service and all later ones
   would get what an administrator, or a program, is just writing there. */
#if DOVETAIL_DOVECOT_24
static inline int
dovetail_compat_service_settings_read(struct master_service *service,
				      const char *name,
				      struct dovetail_compat_service *service_r,
				      const char **error_r)
{
	struct event *event;
	int ret;

	if (master_service_settings_read_simple(service, error_r) < 0)
		return -1;
	event = event_create(master_service_get_event(service));
	event_add_str(event, "protocol", name);
	ret = dovetail_setting_values_get(event, &service_r->set, error_r);
	event_unref(&event);
	if (ret < 0)
		return -1;
	service_r->base_dir =
		master_service_get_service_settings(service)->base_dir;
	service_r->default_internal_user =
		service_r->set->default_internal_user;
	return 0;
}

/* Once they are parsed. */
static inline void
dovetail_compat_service_settings_free(struct dovetail_compat_service *service)
{
	settings_free(service->set);
}

/* dovetail_settings_get_t with a struct dovetail_compat_service as context. */
static inline const char *
dovetail_compat_service_setting(void *context, const char *name)
{
	const struct dovetail_compat_service *service = context;

	return dovetail_setting_values_find((void *)service->set, name);
}
#else
static inline int
dovetail_compat_service_settings_read(struct master_service *service,
				      const char *name,
				      struct dovetail_compat_service *service_r,
				      const char **error_r)
{
	static const struct setting_define defines[] = {
		{ .type = SET_STRLIST, .key = "plugin",
		  .offset = offsetof(struct dovetail_compat_service_settings,
				     plugin_envs) },
		SETTING_DEFINE_LIST_END
	};
	static const struct dovetail_compat_service_settings defaults = {
		.plugin_envs = ARRAY_INIT
	};
	static const struct setting_parser_info info = {
		.module_name = "mail",
		.defines = defines,
		.defaults = &defaults,
		.type_offset = SIZE_MAX,
		.struct_size = sizeof(struct dovetail_compat_service_settings),
		.parent_offset = SIZE_MAX,
	};
	static const struct setting_define module_defines[] = {
		{ .type = SET_STR, .key = "default_internal_user",
		  .offset = offsetof(struct dovetail_compat_module_settings,
				     default_internal_user) },
		SETTING_DEFINE_LIST_END
	};
	static const struct dovetail_compat_module_settings module_defaults = {
		.default_internal_user = DOVETAIL_COMPAT_INTERNAL_USER
	};
	static const struct setting_parser_info module_info = {
		.module_name = DOVETAIL_COMPAT_SETTINGS_MODULE,
		.defines = module_defines,
		.defaults = &module_defaults,
		.type_offset = SIZE_MAX,
		.struct_size = sizeof(struct dovetail_compat_module_settings),
		.parent_offset = SIZE_MAX,
	};
	static const struct setting_parser_info *const roots[] = {
		&info, &module_info, NULL
	};
	static const char *const modules[] = {
		DOVETAIL_COMPAT_SETTINGS_MODULE, NULL
	};
	struct master_service_settings_input input;
	struct master_service_settings_output output;
	const struct dovetail_compat_module_settings *module_set;
	void **sets;

	i_zero(&input);
	input.roots = roots;
	input.module = "mail";
	input.extra_modules = modules;
	input.service = name;
	if (master_service_settings_read(service, &input, &output,
					 error_r) < 0)
		return -1;
	sets = master_service_settings_get_others(service);
	service_r->set = sets[0];
	module_set = sets[1];
	service_r->default_internal_user = module_set->default_internal_user;
	service_r->base_dir = master_service_settings_get(service)->base_dir;
	return 0;
}

static inline void
dovetail_compat_service_settings_free(struct dovetail_compat_service *service)
{
	service->set = NULL;
}

/* dovetail_settings_get_t with a struct dovetail_compat_service as context. */
static inline const char *
dovetail_compat_service_setting(void *context, const char *name)
{
	const struct dovetail_compat_service *service = context;
	const char *const *envs;
	unsigned int i, count;

	if (!array_is_created(&service->set->plugin_envs))
		return NULL;
	envs = array_get(&service->set->plugin_envs, &count);
	for (i = 0; i + 1 < count; i += 2) {
		if (strcmp(envs[i], name) == 0)
			return envs[i + 1];
	}
	return NULL;
}
#endif
#endif
#endif

#endif
