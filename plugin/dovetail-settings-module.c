/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* Lets Dovecot check the dovetail_* settings when it starts, and doveconf when
   it is asked. Dovecot's config process loads this module from
   modules/settings. */

#include "lib.h"
#include "array.h"
#include "settings-parser.h"
#include "str-sanitize.h"
#include "dovetail-compat.h"
#include "dovetail-settings.h"

extern const char *dovetail_settings_version;

const char *dovetail_settings_version = DOVECOT_ABI_VERSION;

#if DOVETAIL_DOVECOT_24
/* On 2.4 the settings are Dovecot's, once they are made known to it. */

extern const struct setting_parser_info *dovetail_settings_set_infos[];

const struct setting_parser_info *dovetail_settings_set_infos[] = {
	&dovetail_setting_parser_info,
	NULL
};
#else
/* On 2.3 they are strings in plugin { }, which Dovecot does not look into:
   without this module a wrong setting would show only when the first user logs
   in. The module adds a settings root of its own that sees plugin { } as well;
   it owns no setting. Our services ask for it, to learn default_internal_user
   without the module "master" (dovetail_compat_service_settings_read() says why
   not that). */

struct dovetail_module_settings {
	const char *default_internal_user;
	/* key, value, key, value, ... */
	ARRAY(const char *) plugin_envs;
};

extern const struct setting_parser_info *dovetail_settings_set_roots[];

static const char *dovetail_module_settings_get(void *context, const char *name)
{
	const struct dovetail_module_settings *set = context;
	const char *const *envs;
	unsigned int i, count;

	envs = array_get(&set->plugin_envs, &count);
	for (i = 0; i + 1 < count; i += 2) {
		if (strcmp(envs[i], name) == 0)
			return envs[i + 1];
	}
	return NULL;
}

static bool
dovetail_module_settings_check(void *_set, pool_t pool ATTR_UNUSED,
			       const char **error_r)
{
	struct dovetail_module_settings *set = _set;
	struct dovetail_settings parsed;
	const char *const *envs;
	unsigned int i, count;
	bool any = FALSE;
	pool_t parse_pool;
	int ret;

	if (!array_is_created(&set->plugin_envs))
		return TRUE;

	envs = array_get(&set->plugin_envs, &count);
	for (i = 0; i + 1 < count; i += 2) {
		if (!str_begins_with(envs[i], "dovetail_"))
			continue;
		if (!dovetail_setting_name_is_known(envs[i])) {
			*error_r = t_strdup_printf(
				"%s: dovetail has no such setting",
				str_sanitize(envs[i], 128));
			return FALSE;
		}
		if (envs[i + 1][0] != '\0')
			any = TRUE;
	}
	if (!any)
		return TRUE;

	/* base_dir is not known here, and nothing depends on it */
	parse_pool = pool_alloconly_create("dovetail settings check", 1024);
	ret = dovetail_settings_parse(parse_pool, "",
				      dovetail_module_settings_get, set,
				      &parsed, error_r);
	pool_unref(&parse_pool);
	return ret == 0;
}

static const struct setting_define dovetail_module_setting_defines[] = {
	{ .type = SET_STRLIST, .key = "plugin",
	  .offset = offsetof(struct dovetail_module_settings, plugin_envs) },
	{ .type = SET_STR, .key = "default_internal_user",
	  .offset = offsetof(struct dovetail_module_settings,
			     default_internal_user) },
	SETTING_DEFINE_LIST_END
};

static const struct dovetail_module_settings dovetail_module_default_settings = {
	.default_internal_user = DOVETAIL_COMPAT_INTERNAL_USER,
	.plugin_envs = ARRAY_INIT
};

static const struct setting_parser_info dovetail_module_setting_parser_info = {
	.module_name = DOVETAIL_COMPAT_SETTINGS_MODULE,
	.defines = dovetail_module_setting_defines,
	.defaults = &dovetail_module_default_settings,

	.type_offset = SIZE_MAX,
	.struct_size = sizeof(struct dovetail_module_settings),

	.parent_offset = SIZE_MAX,

	.check_func = dovetail_module_settings_check,
};

const struct setting_parser_info *dovetail_settings_set_roots[] = {
	&dovetail_module_setting_parser_info,
	NULL
};
#endif
