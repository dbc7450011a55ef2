/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* One change of a peer's log: whose mailboxes it is about, whether that peer may
   say so, and who does it. */

#include "lib.h"
#include "array.h"
#include "buffer.h"
#include "guid.h"
#include "ioloop.h"
#include "llist.h"
#include "module-dir.h"
#include "mail-storage-private.h"
#include "mail-storage-service.h"
#include "mail-namespace.h"
#include "mailbox-list-iter.h"
#include "dovetail-name.h"
#include "dovetail-plugin.h"
#include "dovetail-queue-client.h"
#include "dovetail-replay.h"
#include "dovetail-wire.h"

/* The plugin is loaded by Dovecot, as mail_plugins says, when the first user is
   opened. */
static struct {
	int (*snapshot)(struct mailbox *box, uint32_t uid_next,
			const char **error_r);
	int (*sweep)(struct mail_user *user, bool snapshots,
		     const char **error_r);
	int (*messages)(struct mailbox *box, const ARRAY_TYPE(seq_range) *uids,
			const char **error_r);
	int (*compare)(struct mailbox *box,
		       const struct dovetail_change_compare *compare,
		       const char **error_r);
	int (*tree)(struct mail_user *user, uint32_t *number,
		    enum dovetail_verify_flags flags, const char **error_r);
	int (*verify)(struct mailbox *box, uint32_t number,
		      enum dovetail_verify_flags flags, uint32_t *messages_r,
		      const char **error_r);
	uint64_t (*bodies_sent)(void);
	bool (*get_role)(struct mail_user *user, const char **primary_r,
			 bool *is_primary_r);
} plugin;

static int apply_find_plugin(const char **error_r)
{
	struct module *module;

	if (plugin.get_role != NULL)
		return 0;
	module = module_dir_find(mail_storage_service_modules, "dovetail");
	if (module == NULL) {
		*error_r = "The dovetail plugin is not loaded: add dovetail to "
			"mail_plugins";
		return -1;
	}
	plugin.snapshot = module_get_symbol(module,
		"dovetail_plugin_capture_snapshot");
	plugin.sweep = module_get_symbol(module, "dovetail_plugin_sweep");
	plugin.messages = module_get_symbol(module,
		"dovetail_plugin_capture_messages");
	plugin.compare = module_get_symbol(module, "dovetail_plugin_compare");
	plugin.tree = module_get_symbol(module,
		"dovetail_plugin_capture_tree");
	plugin.verify = module_get_symbol(module, "dovetail_plugin_verify");
	plugin.bodies_sent = module_get_symbol(module,
		"dovetail_plugin_bodies_sent");
	plugin.get_role = module_get_symbol(module,
		"dovetail_plugin_get_role");
	if (plugin.snapshot == NULL || plugin.sweep == NULL ||
	    plugin.messages == NULL || plugin.compare == NULL ||
	    plugin.tree == NULL || plugin.verify == NULL ||
	    plugin.bodies_sent == NULL ||
	    plugin.get_role == NULL) {
		plugin.get_role = NULL;
		*error_r = "The dovetail plugin and dovetail-replay are of "
			"different versions";
		return -1;
	}
	return 0;
}

int replay_get_role(struct replay_user *user, const char **primary_r,
		    bool *is_primary_r, const char **error_r)
{
	if (apply_find_plugin(error_r) < 0)
		return -1;
	if (!plugin.get_role(replay_user_mail_user(user), primary_r,
			     is_primary_r)) {
		*error_r = "dovetail is not set up for this user";
		return -1;
	}
	return 0;
}

/* ---- a peer's question ---- */

static int apply_request(struct replay_user *user,
			 const struct dovetail_change_request *request,
			 const char **error_r)
{
	struct mail_user *mail_user = replay_user_mail_user(user);
	struct mailbox *box;
	int ret;

	if (guid_128_is_empty(request->guid))
		return plugin.sweep(mail_user, TRUE, error_r);

	ret = replay_user_find_mailbox(user, request->guid, request->name, &box,
				       error_r);
	if (ret < 0)
		return -1;
	if (ret == 0) {
		/* gone: the asker learns that from the tree */
		return plugin.tree(mail_user, NULL, 0, error_r);
	}
	if (mailbox_sync(box, 0) < 0) {
		*error_r = t_strdup(mailbox_get_last_internal_error(box, NULL));
		ret = -1;
	} else if (array_count(&request->uids) > 0) {
		ret = plugin.messages(box, &request->uids, error_r);
	} else {
		ret = plugin.snapshot(box, I_MAX(request->uid_next, 1),
				      error_r);
	}
	replay_user_forget_mailboxes(user);
	return ret;
}

/* Hashes that are lacking are read first, some at a time. */
struct apply_later {
	struct apply_later *prev, *next;
	struct timeout *to;
	char *origin;
	buffer_t *data;
};
#define APPLY_LATER_MAX 64
static struct apply_later *laters;
static unsigned int laters_count;

static void apply_later_free(struct apply_later *later)
{
	DLLIST_REMOVE(&laters, later);
	laters_count--;
	timeout_remove(&later->to);
	i_free(later->origin);
	buffer_free(&later->data);
	i_free(later);
}

static void apply_later_now(struct apply_later *later)
{
	const char *error;

	timeout_remove(&later->to);
	T_BEGIN {
		if (replay_apply(later->origin, later->data->data,
				 later->data->used, &error) == REPLAY_FAILED)
			e_warning(replay.event, "%s", error);
	} T_END;
	apply_later_free(later);
}

/* Ask ourselves again. When there is too much of that, the peer will. */
static void
apply_later(const char *origin, const struct dovetail_change *change)
{
	struct apply_later *later;

	if (laters_count >= APPLY_LATER_MAX)
		return;
	later = i_new(struct apply_later, 1);
	later->origin = i_strdup(origin);
	later->data = buffer_create_dynamic(default_pool, 256);
	dovetail_change_encode(later->data, change);
	later->to = replay_timeout_add(0, apply_later_now, later);
	DLLIST_PREPEND(&laters, later);
	laters_count++;
}

void replay_apply_deinit(void)
{
	while (laters != NULL)
		apply_later_free(laters);
}

static int apply_compare(struct replay_user *user, const char *origin,
			 const struct dovetail_change *change,
			 const char **error_r)
{
	const struct dovetail_change_compare *compare = &change->u.compare;
	struct mailbox *box;
	int ret;

	ret = replay_user_find_mailbox(user, compare->guid, compare->name, &box,
				       error_r);
	if (ret < 0)
		return -1;
	if (ret == 0) {
		/* gone: the asker learns that from the tree */
		return plugin.tree(replay_user_mail_user(user), NULL, 0,
				   error_r);
	}
	if (mailbox_sync(box, 0) < 0) {
		*error_r = t_strdup(mailbox_get_last_internal_error(box, NULL));
		return -1;
	}
	ret = plugin.compare(box, compare, error_r);
	if (ret == 0)
		apply_later(origin, change);
	return ret;
}

/* ---- dispatch ---- */

static enum replay_result
apply_to_replica(struct replay_user *user, const char *origin,
		 const struct dovetail_change *change, const char **error_r)
{
	enum replay_result result;
	guid_128_t all;
	bool wanted;

	guid_128_empty(all);
	switch (change->kind) {
	case DOVETAIL_CHANGE_MAILBOX:
		wanted = replay_wanted_has(change->user,
					   change->u.mailbox.guid);
		return replay_mailbox(user, origin, &change->u.mailbox, wanted,
				      error_r);
	case DOVETAIL_CHANGE_VERIFY:
		replay_verify(user, origin, &change->u.verify);
		return REPLAY_DONE;
	case DOVETAIL_CHANGE_COMPARED:
		replay_compared(user, origin, &change->u.compared);
		return REPLAY_DONE;
	case DOVETAIL_CHANGE_LIST:
		result = replay_list(user, origin, &change->u.list, error_r);
		if (result == REPLAY_DONE &&
		    change->u.list.action == DOVETAIL_LIST_DELETE &&
		    !guid_128_is_empty(change->u.list.guid)) {
			/* what was asked for and is on its way must not make
			   it again */
			replay_wanted_gone(change->user, change->u.list.guid);
			replay_trouble_clear(change->user, change->u.list.guid);
		}
		break;
	case DOVETAIL_CHANGE_TREE:
		if (change->u.tree.number != 0) {
			result = replay_tree_verify(user, origin,
						    &change->u.tree, error_r);
			break;
		}
		result = replay_tree(user, origin, &change->u.tree, error_r);
		if (result == REPLAY_DONE)
			replay_wanted_tree_arrived(change->user,
						   &change->u.tree);
		break;
	default:
		return REPLAY_DONE;
	}
	if (result != REPLAY_DONE) {
		replay_user_forget_mailboxes(user);
		replay_wanted_add(change->user, origin, all, "", 0, *error_r);
	}
	return result;
}

static bool change_is_question(const struct dovetail_change *change)
{
	return change->kind == DOVETAIL_CHANGE_REQUEST ||
		change->kind == DOVETAIL_CHANGE_COMPARE;
}

static const char *change_mailbox(const struct dovetail_change *change)
{
	switch (change->kind) {
	case DOVETAIL_CHANGE_MAILBOX:
		return change->u.mailbox.name;
	case DOVETAIL_CHANGE_LIST:
		return change->u.list.name;
	default:
		return NULL;
	}
}

static enum replay_result
apply_opened(struct replay_user *user, const char *origin,
	     const struct dovetail_change *change, const char **error_r)
{
	const char *primary, *mailbox = change_mailbox(change);
	enum replay_result result;
	bool is_primary;
	int ret;

	if (replay_get_role(user, &primary, &is_primary, error_r) < 0)
		return REPLAY_FAILED;
	if (change_is_question(change)) {
		/* With several peers, the question is for the primary. */
		if (!is_primary)
			ret = 0;
		else if (change->kind == DOVETAIL_CHANGE_REQUEST)
			ret = apply_request(user, &change->u.request, error_r);
		else
			ret = apply_compare(user, origin, change, error_r);
		return ret < 0 ? REPLAY_FAILED : REPLAY_DONE;
	}
	if (strcmp(primary, origin) != 0) {
		*error_r = t_strdup_printf("Node %s is not the primary of user "
			"%s, %s is", origin, change->user, primary);
		return REPLAY_FAILED;
	}
	result = apply_to_replica(user, origin, change, error_r);
	if (result == REPLAY_FAILED) {
		*error_r = t_strdup_printf("User %s%s%s: %s", change->user,
					   mailbox == NULL ? "" : " mailbox ",
					   mailbox == NULL ? "" : mailbox,
					   *error_r);
	}
	return result;
}

enum replay_result
replay_apply(const char *origin, const void *data, size_t size,
	     const char **error_r)
{
	struct dovetail_change change;
	struct replay_user *user;
	enum replay_result result;
	guid_128_t all;

	if (dovetail_change_decode(pool_datastack_create(), data, size,
				   &change, error_r) < 0)
		return REPLAY_FAILED;
	switch (change.kind) {
	case DOVETAIL_CHANGE_HEARTBEAT:
		return REPLAY_DONE;
	case DOVETAIL_CHANGE_SPOOL:
		replay_spool_add(&change.u.spool);
		return REPLAY_DONE;
	case DOVETAIL_CHANGE_SHARD_REQUEST:
		if (strcmp(change.u.shard.node, replay.set.node) == 0) {
			replay_shard_requested(origin, change.u.shard.shard,
					       change.u.shard.number);
		}
		return REPLAY_DONE;
	case DOVETAIL_CHANGE_VERIFIED:
		if (strcmp(change.u.verified.node, replay.set.node) == 0)
			replay_job_verified(origin, &change.u.verified);
		return REPLAY_DONE;
	case DOVETAIL_CHANGE_SHARD_SWEPT:
		if (strcmp(change.u.shard.node, replay.set.node) == 0) {
			replay_wanted_shard_arrived(origin,
						    change.u.shard.shard,
						    change.u.shard.number);
		}
		return REPLAY_DONE;
	default:
		break;
	}

	if (replay_user_open(change.user, &user, error_r) < 0) {
		if (!change_is_question(&change)) {
			guid_128_empty(all);
			replay_wanted_add(change.user, origin, all, "", 0,
					  *error_r);
		}
		return REPLAY_FAILED;
	}
	result = apply_opened(user, origin, &change, error_r);
	replay_user_release(&user);
	return result;
}

bool replay_sweep(const char *username)
{
	struct replay_user *user;
	const char *primary, *error;
	bool is_primary;
	int ret;

	if (replay_user_open(username, &user, &error) < 0) {
		e_error(replay.event, "Cannot sweep: %s", error);
		return FALSE;
	}
	ret = replay_get_role(user, &primary, &is_primary, &error);
	/* Somebody else's user by now: nothing of ours to queue. */
	if (ret == 0 && is_primary) {
		ret = plugin.sweep(replay_user_mail_user(user), FALSE,
				   &error);
	}
	if (ret < 0) {
		e_warning(replay.event, "User %s: Sweep is not complete: %s",
			  username, error);
	}
	/* not kept open: its settings may have become old meanwhile */
	replay_user_close(&user);
	return ret == 0;
}

/* ---- our questions ---- */

int replay_ask_tree(struct replay_user *user, uint32_t *number,
		    enum dovetail_verify_flags flags, const char **error_r)
{
	return plugin.tree(replay_user_mail_user(user), number, flags, error_r);
}

int replay_ask_mailbox(struct mailbox *box, uint32_t number,
		       enum dovetail_verify_flags flags, uint32_t *messages_r,
		       const char **error_r)
{
	return plugin.verify(box, number, flags, messages_r, error_r);
}

uint64_t replay_bodies_sent(void)
{
	/* looked up with the first user */
	return plugin.get_role == NULL ? 0 : plugin.bodies_sent();
}

bool replay_queue_works(void)
{
	const char *error;

	return dovetail_queue_client_check(replay.client, DOVETAIL_ACK_QUEUED,
		dovetail_monotonic_usecs() +
		replay.set.ack_timeout_msecs * 1000ULL, &error) > 0;
}

/* ---- the state of a user ---- */

/* A snapshot from UIDNEXT on has no message's body in it. */
static int send_mailbox_state(struct mailbox *box, const char **error_r)
{
	struct mailbox_status status;
	enum mail_error mail_error;

	if (mailbox_sync(box, MAILBOX_SYNC_FLAG_FULL_READ) < 0) {
		*error_r = t_strdup(mailbox_get_last_internal_error(box,
								    &mail_error));
		return mail_error == MAIL_ERROR_NOTFOUND &&
			!box->mailbox_deleted ? 0 : -1;
	}
	mailbox_get_open_status(box, STATUS_UIDNEXT, &status);
	return plugin.snapshot(box, status.uidnext, error_r);
}

/* Returns 0, or -1: the queue does not work. */
static int send_namespace_state(struct mail_namespace *ns)
{
	struct mailbox_list_iterate_context *iter;
	const struct mailbox_info *info;
	struct mailbox *box;
	const char *error;
	guid_128_t guid;
	int ret = 0;

	iter = mailbox_list_iter_init(ns->list, "*",
		MAILBOX_LIST_ITER_RAW_LIST | MAILBOX_LIST_ITER_NO_AUTO_BOXES);
	while (ret == 0 && (info = mailbox_list_iter_next(iter)) != NULL) {
		if ((info->flags & (MAILBOX_NOSELECT |
				    MAILBOX_NONEXISTENT)) != 0 ||
		    dovetail_name_is_parts(ns, info->vname, guid))
			continue;
		box = mailbox_alloc(ns->list, info->vname,
				    MAILBOX_FLAG_IGNORE_ACLS);
		T_BEGIN {
			if (send_mailbox_state(box, &error) < 0) {
				e_warning(replay.event, "User %s: Mailbox %s: "
					"Cannot queue its state: %s",
					ns->user->username, info->vname, error);
				ret = replay_queue_works() ? 0 : -1;
			}
		} T_END;
		mailbox_free(&box);
	}
	if (mailbox_list_iter_deinit(&iter) < 0) {
		e_warning(replay.event, "User %s: Cannot list mailboxes: %s",
			ns->user->username,
			mailbox_list_get_last_internal_error(ns->list, NULL));
	}
	return ret;
}

static bool namespace_is_ours(const struct mail_user *mail_user,
			      const struct mail_namespace *ns)
{
	return ns->type == MAIL_NAMESPACE_TYPE_PRIVATE &&
		ns->owner == mail_user && ns->alias_for == NULL;
}

/* A user who never logged in and never got mail has nothing to tell. */
static bool user_has_mailboxes(struct mail_user *mail_user)
{
	struct mailbox_list_iterate_context *iter;
	struct mail_namespace *ns;
	bool found = FALSE;

	for (ns = mail_user->namespaces; ns != NULL && !found; ns = ns->next) {
		if (!namespace_is_ours(mail_user, ns))
			continue;
		iter = mailbox_list_iter_init(ns->list, "*",
			MAILBOX_LIST_ITER_RAW_LIST |
			MAILBOX_LIST_ITER_NO_AUTO_BOXES |
			MAILBOX_LIST_ITER_RETURN_NO_FLAGS);
		found = mailbox_list_iter_next(iter) != NULL;
		if (mailbox_list_iter_deinit(&iter) < 0) {
			/* said again when they are listed for good */
			found = TRUE;
		}
	}
	return found;
}

static int send_user_state(struct mail_user *mail_user)
{
	struct mail_namespace *ns;
	const char *error;

	if (!user_has_mailboxes(mail_user))
		return 0;
	if (plugin.tree(mail_user, NULL, 0, &error) < 0) {
		e_warning(replay.event, "User %s: Cannot queue the tree: %s",
			  mail_user->username, error);
	}
	for (ns = mail_user->namespaces; ns != NULL; ns = ns->next) {
		if (namespace_is_ours(mail_user, ns) &&
		    send_namespace_state(ns) < 0)
			return -1;
	}
	return replay_queue_works() ? 0 : -1;
}

bool replay_send_state(const char *username)
{
	struct replay_user *user;
	const char *primary, *error;
	bool is_primary;
	int ret = 0;

	if (replay_user_open(username, &user, &error) < 0) {
		e_warning(replay.event, "Cannot queue the state of a user: %s",
			  error);
		return TRUE;
	}
	if (replay_get_role(user, &primary, &is_primary, &error) == 0 &&
	    is_primary)
		ret = send_user_state(replay_user_mail_user(user));
	replay_user_close(&user);
	return ret == 0;
}
