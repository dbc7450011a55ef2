/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* Changes of the list of mailboxes: create, delete, rename, subscribe. No log has
   them, so each is queued when it happened; one that could not be queued makes
   the user be swept, and the sweep queues the whole tree. */

#include "lib.h"
#include "array.h"
#include "buffer.h"
#include "guid.h"
#include "mail-storage-private.h"
#include "mailbox-list-iter.h"
#include "mailbox-list-private.h"
#include "mailbox-log.h"
#include "dovetail-name.h"
#include "dovetail-plugin.h"

/* How often a tree is sent anew because it changed meanwhile. */
#define TREE_TRIES 5

/* Send the change and wait as the ack level says. Returns 0, or -1: it could not be
   queued, and the user is to be swept. */
static int list_send(struct dovetail_user *duser,
		      const struct dovetail_change *change)
{
	struct dovetail_queue_batch batch;
	buffer_t *buf = t_buffer_create(1024);
	uint64_t deadline = dovetail_capture_deadline(duser);
	const char *error;
	int ret;

	i_zero(&batch);
	dovetail_change_encode(buf, change);
	ret = dovetail_queue_client_send(duser->client, &batch,
					 dovetail_capture_level(duser), buf,
					 deadline, &error);
	if (ret < 0)
		dovetail_queue_client_note(duser->client, duser->event, error);
	else
		ret = dovetail_capture_wait(duser, &batch, deadline);
	/* not answered yet: if the queue fails, it has the user swept */
	dovetail_queue_client_cancel(duser->client, &batch);
	if (ret < 0) {
		duser->unclean = TRUE;
		dovetail_queue_client_sweep(duser->client,
					    duser->user->username);
	}
	return ret < 0 ? -1 : 0;
}

static void list_change(struct mailbox *box, enum dovetail_list_action action,
			const guid_128_t guid, const char *new_vname,
			uint32_t uid_validity, uint32_t uid_next)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);
	struct mail_namespace *ns = mailbox_get_namespace(box);
	struct dovetail_change change;

	i_zero(&change);
	change.kind = DOVETAIL_CHANGE_LIST;
	change.user = dbox->duser->user->username;
	change.u.list.action = action;
	guid_128_copy(change.u.list.guid, guid);
	change.u.list.name = dovetail_name_to_path(ns, box->vname);
	change.u.list.new_name = new_vname == NULL ? "" :
		dovetail_name_to_path(ns, new_vname);
	change.u.list.uid_validity = uid_validity;
	change.u.list.uid_next = uid_next;
	(void)list_send(dbox->duser, &change);
}

static bool list_wanted(struct mailbox *box)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);

	return !dbox->internal && dbox->duser->primary;
}

/* Another object of the mailbox, of which nothing is captured; NULL when it cannot
   be opened. */
static struct mailbox *list_open_internal(struct mailbox *box)
{
	struct mailbox *internal;
	struct dovetail_mailbox *dbox;

	internal = mailbox_alloc(box->list, box->vname,
				 MAILBOX_FLAG_IGNORE_ACLS);
	dbox = DOVETAIL_MAILBOX_CONTEXT(internal);
	if (dbox != NULL)
		dbox->internal = TRUE;
	if (mailbox_open(internal) < 0)
		mailbox_free(&internal);
	return internal;
}

/* The state of a mailbox as another object sees it. Returns FALSE when it
   cannot be selected. */
static bool list_lookup(struct mailbox *box, guid_128_t guid_r,
			struct mailbox_status *status_r)
{
	struct mailbox *internal;
	struct mailbox_metadata metadata;
	bool ok;

	guid_128_empty(guid_r);
	i_zero(status_r);
	mail_storage_last_error_push(box->storage);
	internal = list_open_internal(box);
	ok = internal != NULL &&
		mailbox_get_metadata(internal, MAILBOX_METADATA_GUID,
				     &metadata) == 0 &&
		mailbox_get_status(internal, STATUS_UIDVALIDITY |
				   STATUS_UIDNEXT, status_r) == 0;
	if (ok)
		guid_128_copy(guid_r, metadata.guid);
	if (internal != NULL)
		mailbox_free(&internal);
	mail_storage_last_error_pop(box->storage);
	return ok;
}

static void list_mark(struct mailbox *box)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);

	if (list_wanted(box)) {
		dovetail_queue_client_mark_wait(dbox->duser->client,
			dbox->duser->user->username,
			dovetail_capture_deadline(dbox->duser));
	}
}

static int dovetail_create_box(struct mailbox *box,
			       const struct mailbox_update *update,
			       bool directory)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);
	struct mailbox_status status;
	guid_128_t guid;

	/* INBOX and autocreated folders appear on a replica by themselves;
	   they are empty and take the primary's GUID when its mailbox comes. */
	if (!box->inbox_user && !mailbox_is_autocreated(box) &&
	    dovetail_fence_refuses(box))
		return -1;
	list_mark(box);
	if (dbox->module_ctx.super.create_box(box, update, directory) < 0)
		return -1;
	if (list_wanted(box)) T_BEGIN {
		if (directory) {
			guid_128_empty(guid);
			list_change(box, DOVETAIL_LIST_CREATE_DIR, guid,
				    NULL, 0, 0);
		} else if (list_lookup(box, guid, &status)) {
			list_change(box, DOVETAIL_LIST_CREATE, guid, NULL,
				    status.uidvalidity, status.uidnext);
		}
	} T_END;
	return 0;
}

static int dovetail_update_box(struct mailbox *box,
			       const struct mailbox_update *update)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);
	struct mailbox_status status;
	guid_128_t guid;

	if (dovetail_fence_refuses(box))
		return -1;
	list_mark(box);
	if (dbox->module_ctx.super.update_box(box, update) < 0)
		return -1;
	dbox->guid_known = FALSE;
	if (list_wanted(box)) T_BEGIN {
		if (list_lookup(box, guid, &status)) {
			list_change(box, DOVETAIL_LIST_UPDATE, guid, NULL,
				    status.uidvalidity, status.uidnext);
		}
	} T_END;
	return 0;
}

static int dovetail_delete_box(struct mailbox *box)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);
	struct mailbox_metadata metadata;
	guid_128_t guid;

	if (dovetail_fence_refuses(box))
		return -1;
	list_mark(box);
	guid_128_empty(guid);
	if (list_wanted(box) && box->opened &&
	    mailbox_get_metadata(box, MAILBOX_METADATA_GUID, &metadata) == 0)
		guid_128_copy(guid, metadata.guid);
	if (dbox->module_ctx.super.delete_box(box) < 0)
		return -1;
	if (list_wanted(box)) T_BEGIN {
		list_change(box, DOVETAIL_LIST_DELETE, guid, NULL, 0, 0);
	} T_END;
	return 0;
}

static int dovetail_rename_box(struct mailbox *src, struct mailbox *dest)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(src);
	struct mailbox_status status;
	guid_128_t guid;

	if (dovetail_fence_refuses(src))
		return -1;
	list_mark(src);
	guid_128_empty(guid);
	if (list_wanted(src))
		(void)list_lookup(src, guid, &status);
	if (dbox->module_ctx.super.rename_box(src, dest) < 0)
		return -1;
	if (list_wanted(src)) T_BEGIN {
		list_change(src, DOVETAIL_LIST_RENAME, guid, dest->vname,
			    0, 0);
	} T_END;
	return 0;
}

static int dovetail_set_subscribed(struct mailbox *box, bool set)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);
	guid_128_t guid;

	if (!mailbox_is_autosubscribed(box) && dovetail_fence_refuses(box))
		return -1;
	list_mark(box);
	if (dbox->module_ctx.super.set_subscribed(box, set) < 0)
		return -1;
	guid_128_empty(guid);
	if (list_wanted(box)) T_BEGIN {
		list_change(box, set ? DOVETAIL_LIST_SUBSCRIBE :
			    DOVETAIL_LIST_UNSUBSCRIBE, guid, NULL, 0, 0);
	} T_END;
	return 0;
}

void dovetail_capture_list_mailbox_allocated(struct mailbox *box ATTR_UNUSED,
					     struct mailbox_vfuncs *v)
{
	v->create_box = dovetail_create_box;
	v->update_box = dovetail_update_box;
	v->delete_box = dovetail_delete_box;
	v->rename_box = dovetail_rename_box;
	v->set_subscribed = dovetail_set_subscribed;
}

/* ---- the whole tree ---- */

/* Looking at the box failed: because it does not exist? One whose deletion has
   begun says so, too, but if the process died with it Dovecot brings it back to
   life two minutes later. */
static bool list_is_gone(struct mailbox *box, enum mail_error mail_error)
{
	return mail_error == MAIL_ERROR_NOTFOUND && !box->mailbox_deleted;
}

/* Returns 0, or -1: a mailbox that cannot be opened must not look like one that
   was deleted. */
static int tree_add_mailbox(struct mail_namespace *ns,
			    const struct mailbox_info *info,
			    struct dovetail_change_tree *tree,
			    const char **error_r)
{
	struct dovetail_tree_mailbox *tm;
	struct dovetail_mailbox *dbox;
	struct mailbox_status status;
	struct mailbox_metadata metadata;
	struct mailbox *box;
	enum mail_error mail_error;
	guid_128_t guid;
	bool gone;

	if ((info->flags & MAILBOX_NONEXISTENT) != 0 ||
	    dovetail_name_is_parts(ns, info->vname, guid))
		return 0;
	i_zero(&status);
	i_zero(&metadata);
	if ((info->flags & MAILBOX_NOSELECT) == 0) {
		box = mailbox_alloc(ns->list, info->vname,
				    MAILBOX_FLAG_IGNORE_ACLS);
		dbox = DOVETAIL_MAILBOX_CONTEXT(box);
		if (dbox != NULL)
			dbox->internal = TRUE;
		if (mailbox_get_metadata(box, MAILBOX_METADATA_GUID,
					 &metadata) < 0 ||
		    mailbox_get_status(box, STATUS_UIDVALIDITY | STATUS_UIDNEXT,
				       &status) < 0) {
			*error_r = t_strdup_printf("Mailbox %s: %s", info->vname,
				mailbox_get_last_internal_error(box,
								&mail_error));
			gone = list_is_gone(box, mail_error);
			mailbox_free(&box);
			return gone ? 0 : -1;
		}
		mailbox_free(&box);
	}
	tm = array_append_space(&tree->mailboxes);
	guid_128_copy(tm->guid, metadata.guid);
	tm->name = dovetail_name_to_path(ns, info->vname);
	tm->uid_validity = status.uidvalidity;
	tm->uid_next = status.uidnext;
	return 0;
}

static int tree_add_namespace(struct mail_namespace *ns,
			      struct dovetail_change_tree *tree,
			      const char **error_r)
{
	struct mailbox_list_iterate_context *iter;
	const struct mailbox_info *info;
	const char *name;
	int ret = 0;

	iter = mailbox_list_iter_init(ns->list, "*",
		MAILBOX_LIST_ITER_RAW_LIST | MAILBOX_LIST_ITER_NO_AUTO_BOXES);
	while (ret == 0 && (info = mailbox_list_iter_next(iter)) != NULL)
		ret = tree_add_mailbox(ns, info, tree, error_r);
	if (mailbox_list_iter_deinit(&iter) < 0 && ret == 0) {
		*error_r = t_strdup(mailbox_list_get_last_internal_error(
			ns->list, NULL));
		ret = -1;
	}
	if (ret < 0)
		return -1;

	iter = mailbox_list_iter_init(ns->list, "*",
		MAILBOX_LIST_ITER_SELECT_SUBSCRIBED |
		MAILBOX_LIST_ITER_RETURN_NO_FLAGS);
	while ((info = mailbox_list_iter_next(iter)) != NULL) {
		name = dovetail_name_to_path(ns, info->vname);
		array_push_back(&tree->subscriptions, &name);
	}
	if (mailbox_list_iter_deinit(&iter) < 0) {
		*error_r = t_strdup(mailbox_list_get_last_internal_error(
			ns->list, NULL));
		return -1;
	}
	return 0;
}

/* What was deleted here, so that a replica can tell it from what got lost. */
static void tree_add_deleted(struct mail_namespace *ns,
			     struct dovetail_change_tree *tree)
{
	const struct mailbox_log_record *rec;
	struct mailbox_log_iter *iter;
	guid_128_t *guid;

	mailbox_list_get_changelog(ns->list);
	if (ns->list->changelog == NULL)
		return;
	iter = mailbox_log_iter_init(ns->list->changelog);
	while ((rec = mailbox_log_iter_next(iter)) != NULL) {
		if (rec->type != MAILBOX_LOG_RECORD_DELETE_MAILBOX)
			continue;
		guid = array_append_space(&tree->deleted);
		guid_128_copy(*guid, rec->mailbox_guid);
	}
	(void)mailbox_log_iter_deinit(&iter);
}

static int tree_read(struct mail_user *user, struct dovetail_change_tree *tree,
		     const char **error_r)
{
	struct mail_namespace *ns;

	t_array_init(&tree->mailboxes, 64);
	t_array_init(&tree->subscriptions, 64);
	t_array_init(&tree->deleted, 64);
	for (ns = user->namespaces; ns != NULL; ns = ns->next) {
		if (!dovetail_namespace_is_own(ns, user))
			continue;
		if (tree_add_namespace(ns, tree, error_r) < 0)
			return -1;
		/* after the mailboxes: it has all that were gone by then */
		tree_add_deleted(ns, tree);
	}
	return 0;
}

static bool tree_has_same_mailboxes(const struct dovetail_change_tree *tree1,
				    const struct dovetail_change_tree *tree2)
{
	const struct dovetail_tree_mailbox *m1, *m2;
	unsigned int i, count1, count2;

	m1 = array_get(&tree1->mailboxes, &count1);
	m2 = array_get(&tree2->mailboxes, &count2);
	if (count1 != count2)
		return FALSE;
	for (i = 0; i < count1; i++) {
		if (!guid_128_equals(m1[i].guid, m2[i].guid) ||
		    strcmp(m1[i].name, m2[i].name) != 0)
			return FALSE;
	}
	return TRUE;
}

int dovetail_plugin_capture_tree(struct mail_user *user, uint32_t *number,
				 enum dovetail_verify_flags flags,
				 const char **error_r)
{
	struct dovetail_user *duser = DOVETAIL_USER_CONTEXT(user);
	struct dovetail_change_tree next;
	struct dovetail_change change;
	unsigned int tries = 0;
	int ret;

	if (duser == NULL || !duser->primary) {
		*error_r = "This node is not the user's primary";
		return -1;
	}
	i_zero(&next);
	i_zero(&change);
	change.kind = DOVETAIL_CHANGE_TREE;
	change.user = user->username;
	if (tree_read(user, &change.u.tree, error_r) < 0)
		return -1;
	/* What another process made and queued between our look and our place
	   in the queue would look deleted: look again, and say so. */
	do {
		if (tries++ > 0)
			change.u.tree = next;
		if (number != NULL) {
			/* the answer to what was wrong is not to be believed */
			if (++*number == 0)
				++*number;
			change.u.tree.number = *number;
			change.u.tree.flags = flags;
		}
		ret = list_send(duser, &change);
		if (tree_read(user, &next, error_r) < 0)
			return -1;
	} while (!tree_has_same_mailboxes(&change.u.tree, &next) &&
		 tries < TREE_TRIES);
	if (ret < 0 && number != NULL) {
		*error_r = "The list of mailboxes could not be queued";
		return -1;
	}
	return 0;
}

/* ---- everything ---- */

/* Look at one mailbox: the sync makes the capture run. Snapshot: send it whole. */
static int sweep_mailbox(struct mailbox *box, bool snapshot,
			 const char **error_r)
{
	enum mail_error mail_error;

	if (mailbox_sync(box, MAILBOX_SYNC_FLAG_FULL_READ) == 0) {
		return !snapshot ? 0 :
			dovetail_plugin_capture_snapshot(box, 1, error_r);
	}
	*error_r = t_strdup_printf("Mailbox %s: %s", box->vname,
		mailbox_get_last_internal_error(box, &mail_error));
	return list_is_gone(box, mail_error) ? 0 : -1;
}

int dovetail_plugin_sweep(struct mail_user *user, bool snapshots,
			  const char **error_r)
{
	struct dovetail_user *duser = DOVETAIL_USER_CONTEXT(user);
	struct mailbox_list_iterate_context *iter;
	struct mail_namespace *const *namespaces;
	const struct mailbox_info *info;
	ARRAY(struct mail_namespace *) own;
	struct mail_namespace *ns;
	struct mailbox *box;
	guid_128_t guid;
	const char *error;
	unsigned int i, count;
	int ret;

	if (duser == NULL || !duser->primary) {
		*error_r = "This node is not the user's primary";
		return -1;
	}
	duser->unclean = FALSE;
	ret = dovetail_plugin_capture_tree(user, NULL, 0, error_r);

	t_array_init(&own, 4);
	for (ns = user->namespaces; ns != NULL; ns = ns->next) {
		if (dovetail_namespace_is_own(ns, user))
			array_push_back(&own, &ns);
	}
	namespaces = array_get(&own, &count);
	/* what fails does not keep the rest from being sent, while the queue
	   takes it */
	for (i = 0; i < count && !duser->unclean; i++) {
		iter = mailbox_list_iter_init(namespaces[i]->list, "*",
			MAILBOX_LIST_ITER_RAW_LIST |
			MAILBOX_LIST_ITER_NO_AUTO_BOXES);
		while (!duser->unclean &&
		       (info = mailbox_list_iter_next(iter)) != NULL) {
			if ((info->flags & (MAILBOX_NOSELECT |
					    MAILBOX_NONEXISTENT)) != 0 ||
			    dovetail_name_is_parts(namespaces[i],
						   info->vname, guid))
				continue;
			box = mailbox_alloc(namespaces[i]->list, info->vname,
					    MAILBOX_FLAG_IGNORE_ACLS);
			if (sweep_mailbox(box, snapshots, &error) < 0 &&
			    ret == 0) {
				*error_r = error;
				ret = -1;
			}
			mailbox_free(&box);
		}
		if (mailbox_list_iter_deinit(&iter) < 0 && ret == 0) {
			*error_r = t_strdup(
				mailbox_list_get_last_internal_error(
					namespaces[i]->list, NULL));
			ret = -1;
		}
	}
	if (ret == 0 && duser->unclean) {
		*error_r = "Not everything could be queued";
		ret = -1;
	}
	return ret;
}
