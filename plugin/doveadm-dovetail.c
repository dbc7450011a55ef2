/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* doveadm dovetail VERB: what the administrator sees and does by hand. Each verb
   reports a failure with i_error() and doveadm_exit_code, never with
   i_fatal(), so that doveadm's server and HTTP API survive it. */

#include "lib.h"
#include "array.h"
#include "hex-binary.h"
#include "ioloop.h"
#include "master-service.h"
#include "str.h"
#include "str-sanitize.h"
#include "doveadm.h"
#include "doveadm-mail.h"
#include "doveadm-print.h"
#include "dovetail-compat.h"
#include "dovetail-keyring.h"
#include "dovetail-settings.h"
#include "doveadm-dovetail.h"

#include <unistd.h>

extern const char *doveadm_dovetail_plugin_version;
void doveadm_dovetail_plugin_init(struct module *module);
void doveadm_dovetail_plugin_deinit(void);

void doveadm_dovetail_help(const struct doveadm_cmd_context *cctx)
{
	if (cctx->conn_type == DOVEADM_CONNECTION_TYPE_CLI)
		help_ver2(cctx->cmd); /* does not return */
	i_error("Usage: doveadm %s %s", cctx->cmd->name, cctx->cmd->usage);
	doveadm_exit_code = EX_USAGE;
}

bool doveadm_dovetail_has_args(const struct doveadm_cmd_context *cctx)
{
	const char *const *args;

	return doveadm_cmd_param_array(cctx, "args", &args);
}

static void settings_error(const char *error)
{
	i_error("%s%s", error, dovetail_compat_doveadm_settings_hint());
	doveadm_exit_code = EX_CONFIG;
}

int doveadm_dovetail_settings_read(struct dovetail_settings *set_r)
{
	const char *error;

	if (dovetail_compat_doveadm_settings_read(set_r, &error) < 0) {
		settings_error(error);
		return -1;
	}
	return 0;
}

/* ---- keygen ---- */

static void cmd_dovetail_keygen(struct doveadm_cmd_context *cctx)
{
	const char *node, *key_dir, *key, *peers, *line, *error;
	bool replace = FALSE;

	if (doveadm_dovetail_has_args(cctx)) {
		doveadm_dovetail_help(cctx);
		return;
	}
	(void)doveadm_cmd_param_bool(cctx, "rotate", &replace);

	/* The key is the first thing a new node needs: only the settings that
	   it depends on must be there already. */
	node = dovetail_compat_doveadm_setting(NULL, "dovetail_node");
	if (node == NULL || !dovetail_node_name_is_valid(node)) {
		settings_error(t_strdup_printf(
			"dovetail_node: %s: it must be this node's name, "
			"1 to %d of a-z 0-9 . -",
			node == NULL || *node == '\0' ? "Not set" :
			t_strdup_printf("'%s'", str_sanitize(node, 128)),
			DOVETAIL_NODE_NAME_MAX));
		return;
	}
	key_dir = dovetail_compat_doveadm_setting(NULL, "dovetail_key_dir");
	if (key_dir == NULL || *key_dir == '\0')
		key_dir = DOVETAIL_KEY_DIR_DEFAULT;
	else if (*key_dir != '/') {
		settings_error(t_strdup_printf(
			"dovetail_key_dir: '%s' does not begin with /",
			str_sanitize(key_dir, 128)));
		return;
	}
	key = t_strdup_printf("%s/%s.key", key_dir, node);
	if (!replace && access(key, F_OK) == 0) {
		i_error("%s exists already; to replace it, use -r and do what "
			"doveadm-dovetail(1) says about it", key);
		doveadm_exit_code = EX_CANTCREAT;
		return;
	}

	if (dovetail_keygen(key_dir, node, replace, &line, &error) < 0) {
		i_error("%s", error);
		doveadm_exit_code = EX_CANTCREAT;
		return;
	}

	doveadm_print_init(DOVEADM_PRINT_TYPE_FLOW);
	doveadm_print_header("public_key", "public_key",
			     DOVEADM_PRINT_HEADER_FLAG_HIDE_TITLE);
	doveadm_print(line);
	doveadm_print_flush();

	peers = dovetail_compat_doveadm_setting(NULL, "dovetail_peers");
	i_info("The public key is in %s/%s.pub: copy that file into "
	       "dovetail_key_dir of %s%s", key_dir, node,
	       peers == NULL || *peers == '\0' ? "every peer" : "the peers: ",
	       peers == NULL ? "" : peers);
	if (replace) {
		i_info("Then run doveadm reload on the peers first and here "
		       "last. The old key's line can be removed from %s.pub "
		       "everywhere when nothing sealed with it is waiting any "
		       "more", node);
	}
}

/* ---- peers ---- */

static void
peers_print(const char *node, const char *key_id, const char *path,
	    const char *status)
{
	doveadm_print(node);
	doveadm_print(key_id);
	doveadm_print(path);
	doveadm_print(status);
}

static const char *key_id_to_string(const struct dovetail_public_key *key)
{
	return binary_to_hex(key->id, sizeof(key->id));
}

/* Ids of the keys of the keyring's only peer. */
static const char *peer_key_ids(const struct dovetail_keyring *keyring)
{
	const struct dovetail_public_key *keys;
	unsigned int i, count;
	string_t *str = t_str_new(64);

	keys = dovetail_keyring_peers(keyring, &count);
	for (i = 0; i < count; i++) {
		if (i > 0)
			str_append_c(str, ',');
		str_append(str, key_id_to_string(&keys[i]));
	}
	return str_c(str);
}

/* This node's own key, without which no peer's can be used. */
static bool peers_print_self(const struct dovetail_settings *set)
{
	static const char *const no_peers[] = { NULL };
	struct dovetail_keyring *keyring;
	const char *path, *error;

	path = t_strdup_printf("%s/%s.key", set->key_dir, set->node);
	if (dovetail_keyring_open(set->key_dir, set->node, no_peers,
				  &keyring, &error) < 0) {
		peers_print(set->node, DOVEADM_DOVETAIL_NO_VALUE, path, error);
		return FALSE;
	}
	peers_print(set->node,
		    key_id_to_string(dovetail_keyring_self(keyring)),
		    path, "ok");
	dovetail_keyring_close(&keyring);
	return TRUE;
}

static bool
peers_print_peer(const struct dovetail_settings *set, const char *peer,
		 bool self_ok)
{
	const char *peers[] = { peer, NULL };
	struct dovetail_keyring *keyring;
	const char *path, *error;

	path = t_strdup_printf("%s/%s.pub", set->key_dir, peer);
	if (!self_ok) {
		peers_print(peer, DOVEADM_DOVETAIL_NO_VALUE, path,
			    "not checked: this node's own key comes first");
		return FALSE;
	}
	if (dovetail_keyring_open(set->key_dir, set->node, peers,
				  &keyring, &error) < 0) {
		peers_print(peer, DOVEADM_DOVETAIL_NO_VALUE, path, error);
		return FALSE;
	}
	peers_print(peer, peer_key_ids(keyring), path, "ok");
	dovetail_keyring_close(&keyring);
	return TRUE;
}

static void cmd_dovetail_peers(struct doveadm_cmd_context *cctx)
{
	struct dovetail_settings set;
	struct dovetail_keyring *keyring;
	const char *const *peer, *error;
	bool self_ok, all_ok;

	if (doveadm_dovetail_has_args(cctx)) {
		doveadm_dovetail_help(cctx);
		return;
	}
	if (doveadm_dovetail_settings_read(&set) < 0)
		return;

	doveadm_print_init(DOVEADM_PRINT_TYPE_TABLE);
	doveadm_print_header_simple("node");
	doveadm_print_header_simple("key_id");
	doveadm_print_header_simple("key_file");
	doveadm_print_header("status", "status",
			     DOVEADM_PRINT_HEADER_FLAG_EXPAND);

	all_ok = self_ok = peers_print_self(&set);
	for (peer = set.peers; *peer != NULL; peer++) T_BEGIN {
		if (!peers_print_peer(&set, *peer, self_ok))
			all_ok = FALSE;
	} T_END;

	if (!all_ok) {
		doveadm_exit_code = EX_CONFIG;
		return;
	}
	/* what only shows when all of them are looked at together */
	if (dovetail_keyring_open(set.key_dir, set.node, set.peers,
				  &keyring, &error) < 0) {
		i_error("%s", error);
		doveadm_exit_code = EX_CONFIG;
		return;
	}
	dovetail_keyring_close(&keyring);
}

/* ---- registration ---- */

static struct doveadm_cmd_ver2 doveadm_dovetail_cmds[] = {
{
	.name = "dovetail keygen",
	.cmd = cmd_dovetail_keygen,
	.usage = "[-r]",
DOVEADM_CMD_PARAMS_START
DOVEADM_CMD_PARAM('r', "rotate", CMD_PARAM_BOOL, 0)
DOVEADM_DOVETAIL_NO_ARGS_PARAM
DOVEADM_CMD_PARAMS_END
},
{
	.name = "dovetail peers",
	.cmd = cmd_dovetail_peers,
	.usage = "",
DOVEADM_CMD_PARAMS_START
DOVEADM_DOVETAIL_NO_ARGS_PARAM
DOVEADM_CMD_PARAMS_END
},
};

const char *doveadm_dovetail_plugin_version = DOVECOT_ABI_VERSION;

void doveadm_dovetail_plugin_init(struct module *module ATTR_UNUSED)
{
	const char *error;
	unsigned int i;

	if (!dovetail_compat_version_is_ours(master_service, &error)) {
		i_error("%s", error);
		return;
	}
	for (i = 0; i < N_ELEMENTS(doveadm_dovetail_cmds); i++)
		doveadm_cmd_register_ver2(&doveadm_dovetail_cmds[i]);
	doveadm_cmd_register_ver2(&doveadm_dovetail_cmd_health);
	doveadm_cmd_register_ver2(&doveadm_dovetail_cmd_lag);
	doveadm_cmd_register_ver2(&doveadm_dovetail_cmd_status);
	for (i = 0; i < doveadm_dovetail_cmds_job_count; i++)
		doveadm_cmd_register_ver2(&doveadm_dovetail_cmds_job[i]);
}

void doveadm_dovetail_plugin_deinit(void)
{
}
