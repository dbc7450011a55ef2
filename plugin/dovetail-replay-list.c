/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* Apply changes of the list of mailboxes. A mailbox is known by its GUID: a name
   can be taken by another one meanwhile. Each function finds the work done when
   it is called again. */

#include "lib.h"
#include "array.h"
#include "guid.h"
#include "mail-storage-private.h"
#include "mail-index.h"
#include "mailbox-guid-cache.h"
#include "mailbox-list-iter.h"
#include "maildir-storage.h"
#include "maildir-uidlist.h"
#include "dovetail-name.h"
#include "dovetail-position.h"
#include "dovetail-replay.h"

static struct mailbox *
list_alloc(struct replay_user *user, const char *path, const char **error_r)
{
	struct mail_namespace *ns;
	const char *vname;

	if (dovetail_name_from_path(replay_user_mail_user(user), path, &ns,
				    &vname, error_r) < 0)
		return NULL;
	return mailbox_alloc(ns->list, vname, MAILBOX_FLAG_IGNORE_ACLS);
}

/* Find the mailbox by GUID as an object that is not kept open. Returns 1, 0, -1. */
static int list_find(struct replay_user *user, const guid_128_t guid,
		     const char *path, struct mailbox **box_r,
		     const char **error_r)
{
	struct mailbox *box;
	int ret;

	ret = replay_user_find_mailbox(user, guid, path, &box, error_r);
	if (ret <= 0)
		return ret;
	*box_r = mailbox_alloc(box->list, box->vname,
			       MAILBOX_FLAG_IGNORE_ACLS);
	replay_user_forget_mailboxes(user);
	return 1;
}

/* Free the box; unless ret is 0 or its error is among the harmless ones, tell. */
static enum replay_result
list_finish(struct mailbox **box, int ret, enum mail_error harmless,
	    const char **error_r)
{
	enum mail_error mail_error;
	const char *error;

	if (ret < 0) {
		error = mailbox_get_last_internal_error(*box, &mail_error);
		if (mail_error == harmless)
			ret = 0;
		else
			*error_r = t_strdup_printf("Mailbox %s: %s",
						   (*box)->vname, error);
	}
	mailbox_free(box);
	return ret < 0 ? REPLAY_FAILED : REPLAY_DONE;
}

static enum replay_result
list_create(struct replay_user *user, const char *origin,
	    const guid_128_t guid, const char *path, uint32_t uid_validity,
	    uint32_t uid_next, const char **error_r)
{
	uint8_t origin_id[DOVETAIL_ORIGIN_ID_SIZE];
	struct mailbox *box;
	int ret;

	ret = replay_user_find_mailbox(user, guid, path, &box, error_r);
	if (ret < 0)
		return REPLAY_FAILED;
	if (ret > 0) {
		/* we may have died between making and claiming it */
		dovetail_origin_id(origin, origin_id);
		return dovetail_position_claim(box, origin_id, error_r) < 0 ?
			REPLAY_FAILED : REPLAY_DONE;
	}
	ret = replay_mailbox_create(user, origin, guid, path, uid_validity,
				    uid_next, error_r);
	if (ret == 0) {
		*error_r = t_strdup_printf("Another mailbox has the name %s",
					   path);
	}
	return ret < 0 ? REPLAY_FAILED : ret == 0 ? REPLAY_LACKING :
		REPLAY_DONE;
}

static enum replay_result
list_create_dir(struct replay_user *user, const char *path,
		const char **error_r)
{
	struct mailbox *box = list_alloc(user, path, error_r);
	enum mailbox_existence existence;

	if (box == NULL)
		return REPLAY_FAILED;
	/* Creating what is there because of its children would make it
	   selectable, where names that are not exist only that way (Maildir++,
	   and 2.4's mailbox_list_drop_noselect). */
	if (mailbox_exists(box, FALSE, &existence) == 0 &&
	    existence != MAILBOX_EXISTENCE_NONE) {
		mailbox_free(&box);
		return REPLAY_DONE;
	}
	return list_finish(&box, mailbox_create(box, NULL, TRUE),
			   MAIL_ERROR_EXISTS, error_r);
}

static enum replay_result
list_delete(struct replay_user *user, const struct dovetail_change_list *change,
	    const char **error_r)
{
	struct mailbox *box;
	int ret;

	if (guid_128_is_empty(change->guid)) {
		box = list_alloc(user, change->name, error_r);
		if (box == NULL)
			return REPLAY_FAILED;
	} else {
		ret = list_find(user, change->guid, change->name, &box,
				error_r);
		if (ret <= 0)
			return ret < 0 ? REPLAY_FAILED : REPLAY_DONE;
	}
	replay_user_forget_mailboxes(user);
	return list_finish(&box, mailbox_delete(box), MAIL_ERROR_NOTFOUND,
			   error_r);
}

/* Maildir keeps UIDNEXT in its UID list, and nothing but a new UIDVALIDITY makes
   its index forget the old one. */
static int list_reset_maildir(struct mailbox *box)
{
	struct maildir_mailbox *mbox = MAILDIR_MAILBOX(box);
	struct maildir_uidlist *uidlist = mbox->uidlist;

	if (maildir_uidlist_lock(uidlist) <= 0)
		return -1;
	maildir_uidlist_set_uid_validity(uidlist,
		maildir_uidlist_get_uid_validity(uidlist) + 1);
	maildir_uidlist_set_next_uid(uidlist, 1, TRUE);
	maildir_uidlist_unlock(uidlist);
	return maildir_uidlist_update(uidlist);
}

/* INBOX can be deleted or renamed in no storage, or not in this one. It becomes
   another mailbox instead: empty, with a GUID of its own. What it was comes
   again under its new name. */
static enum replay_result
list_reset_inbox(struct replay_user *user, const char **error_r)
{
	struct mailbox_transaction_context *t;
	struct mailbox_update update;
	struct mailbox *box;
	struct mail *mail;
	uint32_t seq, count;
	int ret;

	replay_user_forget_mailboxes(user);
	box = list_alloc(user, "INBOX", error_r);
	if (box == NULL)
		return REPLAY_FAILED;
	ret = mailbox_sync(box, MAILBOX_SYNC_FLAG_FULL_READ);
	if (ret == 0) {
		t = mailbox_transaction_begin(box, MAILBOX_TRANSACTION_FLAG_SYNC,
					      __func__);
		mail = mail_alloc(t, 0, NULL);
		count = mail_index_view_get_messages_count(t->view);
		for (seq = 1; seq <= count; seq++) {
			mail_set_seq(mail, seq);
			mail_expunge(mail);
		}
		mail_free(&mail);
		ret = mailbox_transaction_commit(&t);
	}
	if (ret == 0)
		ret = mailbox_sync(box, 0);
	if (ret == 0 && strcmp(box->storage->name, "maildir") == 0) {
		ret = list_reset_maildir(box);
		if (ret == 0) {
			/* this one remembers too much */
			mailbox_free(&box);
			box = list_alloc(user, "INBOX", error_r);
			if (box == NULL)
				return REPLAY_FAILED;
			ret = mailbox_sync(box, MAILBOX_SYNC_FLAG_FULL_READ);
		}
	}
	if (ret == 0) {
		i_zero(&update);
		guid_128_generate(update.mailbox_guid);
		ret = mailbox_update(box, &update);
	}
	return list_finish(&box, ret, MAIL_ERROR_NONE, error_r);
}

static bool list_exists(struct mailbox *box)
{
	enum mailbox_existence existence;

	return mailbox_exists(box, FALSE, &existence) < 0 ||
		existence != MAILBOX_EXISTENCE_NONE;
}

/* Give box the name. */
static enum replay_result
list_rename_to(struct replay_user *user, struct mailbox **box,
	       const char *new_path, enum mail_error harmless,
	       const char **error_r)
{
	struct mailbox *dest = list_alloc(user, new_path, error_r);
	enum replay_result result;
	bool inbox;
	int ret;

	if (dest == NULL) {
		mailbox_free(box);
		return REPLAY_FAILED;
	}
	if (dest->list == (*box)->list &&
	    strcmp(dest->vname, (*box)->vname) == 0) {
		mailbox_free(&dest);
		mailbox_free(box);
		return REPLAY_DONE;
	}
	inbox = (*box)->inbox_user;
	ret = mailbox_rename(*box, dest);
	mailbox_free(&dest);
	if (ret < 0 && inbox &&
	    mailbox_get_last_mail_error(*box) == MAIL_ERROR_NOTPOSSIBLE) {
		mailbox_free(box);
		result = list_reset_inbox(user, error_r);
		if (result == REPLAY_DONE) {
			*error_r = "INBOX cannot be renamed here";
			result = REPLAY_LACKING;
		}
		return result;
	}
	if (ret < 0 && harmless == MAIL_ERROR_NOTFOUND &&
	    mailbox_get_last_mail_error(*box) == MAIL_ERROR_EXISTS &&
	    !list_exists(*box)) {
		/* it has the name already: the change is repeated */
		ret = 0;
	}
	return list_finish(box, ret, harmless, error_r);
}

static enum replay_result
list_rename(struct replay_user *user, const struct dovetail_change_list *change,
	    const char **error_r)
{
	enum mail_error harmless = MAIL_ERROR_NONE;
	struct mailbox *box;
	int ret;

	if (guid_128_is_empty(change->guid)) {
		box = list_alloc(user, change->name, error_r);
		if (box == NULL)
			return REPLAY_FAILED;
		harmless = MAIL_ERROR_NOTFOUND;
	} else {
		ret = list_find(user, change->guid, change->name, &box,
				error_r);
		if (ret < 0)
			return REPLAY_FAILED;
		if (ret == 0) {
			*error_r = t_strdup_printf(
				"The mailbox %s to rename is not here",
				change->name);
			return REPLAY_LACKING;
		}
	}
	replay_user_forget_mailboxes(user);
	return list_rename_to(user, &box, change->new_name, harmless, error_r);
}

static enum replay_result
list_subscribe(struct replay_user *user, const char *path, bool set,
	       const char **error_r)
{
	struct mailbox *box = list_alloc(user, path, error_r);

	if (box == NULL)
		return REPLAY_FAILED;
	return list_finish(&box, mailbox_set_subscribed(box, set),
			   MAIL_ERROR_NONE, error_r);
}

/* The mailbox is the origin's, or nothing would be lost if it became that. */
static bool list_may_update(struct mailbox *box, const char *origin)
{
	uint8_t origin_id[DOVETAIL_ORIGIN_ID_SIZE];
	struct dovetail_position pos;
	struct mailbox_status status;

	dovetail_origin_id(origin, origin_id);
	return (dovetail_position_get(box, &pos) &&
		memcmp(pos.origin, origin_id, sizeof(origin_id)) == 0) ||
		(mailbox_get_status(box, STATUS_MESSAGES, &status) == 0 &&
		 status.messages == 0);
}

static enum replay_result
list_update(struct replay_user *user, const char *origin,
	    const struct dovetail_change_list *change, const char **error_r)
{
	struct mailbox_update update;
	struct mailbox *box;
	int ret;

	box = list_alloc(user, change->name, error_r);
	if (box == NULL)
		return REPLAY_FAILED;
	replay_user_forget_mailboxes(user);
	i_zero(&update);
	guid_128_copy(update.mailbox_guid, change->guid);
	update.uid_validity = change->uid_validity;
	update.min_next_uid = change->uid_next;
	ret = mailbox_open(box);
	if (ret == 0 && !list_may_update(box, origin)) {
		*error_r = t_strdup_printf("Another mailbox has the name %s",
					   change->name);
		mailbox_free(&box);
		return REPLAY_LACKING;
	}
	if (ret == 0)
		ret = mailbox_update(box, &update);
	return list_finish(&box, ret, MAIL_ERROR_NONE, error_r);
}

enum replay_result
replay_list(struct replay_user *user, const char *origin,
	    const struct dovetail_change_list *change, const char **error_r)
{
	switch (change->action) {
	case DOVETAIL_LIST_CREATE:
		return list_create(user, origin, change->guid, change->name,
				   change->uid_validity, change->uid_next,
				   error_r);
	case DOVETAIL_LIST_CREATE_DIR:
		return list_create_dir(user, change->name, error_r);
	case DOVETAIL_LIST_DELETE:
		return list_delete(user, change, error_r);
	case DOVETAIL_LIST_RENAME:
		return list_rename(user, change, error_r);
	case DOVETAIL_LIST_SUBSCRIBE:
		return list_subscribe(user, change->name, TRUE, error_r);
	case DOVETAIL_LIST_UNSUBSCRIBE:
		return list_subscribe(user, change->name, FALSE, error_r);
	case DOVETAIL_LIST_UPDATE:
		return list_update(user, origin, change, error_r);
	}
	*error_r = "Unknown list action";
	return REPLAY_FAILED;
}

/* ---- the whole tree ---- */

struct tree_local {
	guid_128_t guid;
	const char *path;
	struct mail_namespace *ns;
	const char *vname;
	/* it came here by replication from this origin */
	bool replicated;
	unsigned int messages;
};

/* Mailboxes that were missing in one tree. */
struct tree_doubt {
	char *user;
	guid_128_t guid;
};
static ARRAY(struct tree_doubt) tree_doubts;
#define TREE_DOUBTS_MAX 1000
/* The primary may have folders with our names, but hardly so many. */
#define TREE_KEPT_MAX 100

struct tree_parts {
	struct mail_namespace *ns;
	const char *vname;
	/* whose messages */
	guid_128_t guid;
};

struct tree {
	struct replay_user *user;
	const char *origin;
	uint8_t origin_id[DOVETAIL_ORIGIN_ID_SIZE];
	const struct dovetail_change_tree *change;
	ARRAY(struct tree_local) locals;
	ARRAY_TYPE(const_string) subscriptions;
	/* something was */
	bool deleted;
	/* what repairs gather messages in */
	ARRAY(struct tree_parts) parts;
};

/* It is not the primary's, and no difference. */
static bool tree_is_kept(const struct tree_local *local)
{
	return !local->replicated &&
		dovetail_name_is_kept(local->ns, local->vname);
}

static int tree_read_local(struct tree *tree, struct mail_namespace *ns,
			   const struct mailbox_info *info,
			   const char **error_r)
{
	struct dovetail_position pos;
	struct mailbox_metadata metadata;
	struct mailbox_status status;
	struct tree_local *local;
	struct tree_parts *parts;
	struct mailbox *box;
	enum mail_error mail_error;
	guid_128_t guid;

	if ((info->flags & (MAILBOX_NOSELECT | MAILBOX_NONEXISTENT)) != 0)
		return 0;
	if (dovetail_name_is_parts(ns, info->vname, guid)) {
		parts = array_append_space(&tree->parts);
		parts->ns = ns;
		parts->vname = t_strdup(info->vname);
		guid_128_copy(parts->guid, guid);
		return 0;
	}
	box = mailbox_alloc(ns->list, info->vname, MAILBOX_FLAG_IGNORE_ACLS);
	if (mailbox_open(box) < 0 ||
	    mailbox_get_metadata(box, MAILBOX_METADATA_GUID, &metadata) < 0 ||
	    mailbox_get_status(box, STATUS_MESSAGES, &status) < 0) {
		*error_r = t_strdup_printf("Mailbox %s: %s", info->vname,
			mailbox_get_last_internal_error(box, &mail_error));
		mailbox_free(&box);
		return mail_error == MAIL_ERROR_NOTFOUND ? 0 : -1;
	}
	local = array_append_space(&tree->locals);
	guid_128_copy(local->guid, metadata.guid);
	local->ns = ns;
	local->vname = t_strdup(info->vname);
	local->path = dovetail_name_to_path(ns, info->vname);
	local->messages = status.messages;
	local->replicated = dovetail_position_get(box, &pos) &&
		memcmp(pos.origin, tree->origin_id, sizeof(pos.origin)) == 0;
	mailbox_free(&box);
	return 0;
}

static int tree_read_namespace(struct tree *tree, struct mail_namespace *ns,
			       const char **error_r)
{
	struct mailbox_list_iterate_context *iter;
	const struct mailbox_info *info;
	const char *path;
	int ret = 0;

	iter = mailbox_list_iter_init(ns->list, "*",
		MAILBOX_LIST_ITER_RAW_LIST | MAILBOX_LIST_ITER_NO_AUTO_BOXES);
	while (ret == 0 && (info = mailbox_list_iter_next(iter)) != NULL)
		ret = tree_read_local(tree, ns, info, error_r);
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
		path = dovetail_name_to_path(ns, info->vname);
		array_push_back(&tree->subscriptions, &path);
	}
	if (mailbox_list_iter_deinit(&iter) < 0) {
		*error_r = t_strdup(mailbox_list_get_last_internal_error(
			ns->list, NULL));
		return -1;
	}
	return 0;
}

static int tree_read(struct tree *tree, const char **error_r)
{
	struct mail_namespace *ns;

	array_clear(&tree->locals);
	array_clear(&tree->parts);
	array_clear(&tree->subscriptions);
	ns = replay_user_mail_user(tree->user)->namespaces;
	for (; ns != NULL; ns = ns->next) {
		if (dovetail_namespace_is_own(ns,
				replay_user_mail_user(tree->user)) &&
		    tree_read_namespace(tree, ns, error_r) < 0)
			return -1;
	}
	return 0;
}

static const struct dovetail_tree_mailbox *
tree_find_guid(const struct tree *tree, const guid_128_t guid)
{
	const struct dovetail_tree_mailbox *tm;

	array_foreach(&tree->change->mailboxes, tm) {
		if (guid_128_equals(tm->guid, guid))
			return tm;
	}
	return NULL;
}

static const struct tree_local *
tree_find_local(const struct tree *tree, const guid_128_t guid)
{
	const struct tree_local *local;

	array_foreach(&tree->locals, local) {
		if (guid_128_equals(local->guid, guid))
			return local;
	}
	return NULL;
}

/* A mailbox that is here under another name has to get a place above path. While
   something is below it, the place is a name that cannot be selected, and
   nothing can be renamed to it. */
static bool tree_parent_comes(const struct tree *tree, const char *path)
{
	const struct dovetail_tree_mailbox *tm;
	const struct tree_local *local;
	size_t len;

	array_foreach(&tree->change->mailboxes, tm) {
		len = strlen(tm->name);
		if (guid_128_is_empty(tm->guid) ||
		    strncmp(path, tm->name, len) != 0 ||
		    path[len] != DOVETAIL_NAME_SEP)
			continue;
		local = tree_find_local(tree, tm->guid);
		if (local != NULL && strcmp(local->path, tm->name) != 0)
			return TRUE;
	}
	return FALSE;
}

/* Mailboxes whose name the primary gave to something else step aside, so that
   names can be exchanged. */
static enum replay_result
tree_move_aside(struct tree *tree, const char **error_r)
{
	const struct dovetail_tree_mailbox *tm;
	const struct tree_local *local;
	struct mailbox *box;
	const char *path;
	enum replay_result result;

	array_foreach(&tree->locals, local) {
		tm = tree_find_guid(tree, local->guid);
		if (tm == NULL ||
		    (strcmp(tm->name, local->path) == 0 &&
		     !tree_parent_comes(tree, local->path)))
			continue;
		if (strcmp(local->path, "INBOX") == 0) {
			result = list_reset_inbox(tree->user, error_r);
			if (result != REPLAY_DONE)
				return result;
			continue;
		}
		box = mailbox_alloc(local->ns->list, local->vname,
				    MAILBOX_FLAG_IGNORE_ACLS);
		path = t_strconcat("dovetail-moving-",
				   guid_128_to_string(local->guid), NULL);
		path = dovetail_name_to_path(local->ns,
			t_strconcat(local->ns->prefix, path, NULL));
		result = list_rename_to(tree->user, &box, path,
					MAIL_ERROR_NONE, error_r);
		if (result != REPLAY_DONE)
			return result;
	}
	return REPLAY_DONE;
}

/* Another mailbox of the primary has the name. */
static bool tree_has_path(const struct tree *tree, const char *path)
{
	const struct dovetail_tree_mailbox *tm;

	array_foreach(&tree->change->mailboxes, tm) {
		if (!guid_128_is_empty(tm->guid) && strcmp(tm->name, path) == 0)
			return TRUE;
	}
	return FALSE;
}

static bool tree_was_deleted(const struct tree *tree, const guid_128_t guid)
{
	const guid_128_t *deleted;

	array_foreach(&tree->change->deleted, deleted) {
		if (guid_128_equals(*deleted, guid))
			return TRUE;
	}
	return FALSE;
}

/* The mailbox is missing in the tree, and was not deleted. TRUE: so it was in a tree
   before. A single tree may have been read before the mailbox was made; then it is
   in the next one, which is asked for here. */
static bool tree_lacks_for_sure(struct tree *tree, const struct tree_local *local)
{
	const char *username = replay_user_mail_user(tree->user)->username;
	struct tree_doubt *doubt;

	if ((tree->change->flags & DOVETAIL_VERIFY_REPAIR) != 0 ||
	    tree_has_path(tree, local->path))
		return TRUE;
	if (!array_is_created(&tree_doubts))
		i_array_init(&tree_doubts, 8);
	array_foreach_modifiable(&tree_doubts, doubt) {
		if (guid_128_equals(doubt->guid, local->guid) &&
		    strcmp(doubt->user, username) == 0)
			return TRUE;
	}
	if (array_count(&tree_doubts) >= TREE_DOUBTS_MAX)
		return FALSE;
	doubt = array_append_space(&tree_doubts);
	doubt->user = i_strdup(username);
	guid_128_copy(doubt->guid, local->guid);
	/* it answers with the tree */
	replay_wanted_add(username, tree->origin, local->guid, local->path, 1,
			  "It is not in the primary's tree");
	return FALSE;
}

/* The user's doubts about mailboxes that are in the tree, or no longer here. */
static void tree_end_doubts(struct tree *tree)
{
	const char *username = replay_user_mail_user(tree->user)->username;
	const struct tree_local *local;
	struct tree_doubt *doubt;
	unsigned int i;
	bool here;

	if (!array_is_created(&tree_doubts))
		return;
	for (i = array_count(&tree_doubts); i > 0; i--) {
		doubt = array_idx_modifiable(&tree_doubts, i - 1);
		if (strcmp(doubt->user, username) != 0)
			continue;
		here = FALSE;
		array_foreach(&tree->locals, local) {
			if (guid_128_equals(local->guid, doubt->guid))
				here = TRUE;
		}
		if (!here || tree_find_guid(tree, doubt->guid) != NULL) {
			i_free(doubt->user);
			array_delete(&tree_doubts, i - 1, 1);
		}
	}
}

void replay_list_deinit(void)
{
	struct tree_doubt *doubt;

	if (!array_is_created(&tree_doubts))
		return;
	array_foreach_modifiable(&tree_doubts, doubt)
		i_free(doubt->user);
	array_free(&tree_doubts);
}

/* The folder where we keep what only we have makes room for the primary's of that
   name. */
static enum replay_result
tree_rename_kept(struct tree *tree, const struct tree_local *local,
		 const char **error_r)
{
	const char *below = strchr(local->path, DOVETAIL_NAME_SEP);
	const char *path, *vname;
	struct mailbox *box;
	enum mailbox_existence existence;
	unsigned int n;

	if (below == NULL)
		below = "";
	for (n = 1; n <= TREE_KEPT_MAX; n++) {
		vname = dovetail_name_of_kept(local->ns, n);
		path = t_strconcat(dovetail_name_to_path(local->ns, vname),
				   below, NULL);
		if (tree_has_path(tree, path))
			continue;
		box = list_alloc(tree->user, path, error_r);
		if (box == NULL)
			return REPLAY_FAILED;
		if (mailbox_exists(box, FALSE, &existence) < 0)
			existence = MAILBOX_EXISTENCE_SELECT;
		mailbox_free(&box);
		if (existence != MAILBOX_EXISTENCE_NONE)
			continue;
		box = mailbox_alloc(local->ns->list, local->vname,
				    MAILBOX_FLAG_IGNORE_ACLS);
		return list_rename_to(tree->user, &box, path,
				      MAIL_ERROR_NOTFOUND, error_r);
	}
	*error_r = "All names for a folder to keep messages in are taken";
	return REPLAY_FAILED;
}

static enum replay_result
tree_keep_messages(const struct tree_local *local, const char **error_r)
{
	struct mailbox *box;
	int ret;

	box = mailbox_alloc(local->ns->list, local->vname,
			    MAILBOX_FLAG_IGNORE_ACLS);
	ret = replay_keep_mailbox(box, error_r);
	mailbox_free(&box);
	return ret < 0 ? REPLAY_FAILED : REPLAY_DONE;
}

static enum replay_result
tree_delete(struct tree *tree, const struct tree_local *local,
	    const char **error_r)
{
	struct mailbox *box;

	tree->deleted = TRUE;
	if (strcmp(local->path, "INBOX") == 0)
		return list_reset_inbox(tree->user, error_r);
	box = mailbox_alloc(local->ns->list, local->vname,
			    MAILBOX_FLAG_IGNORE_ACLS);
	return list_finish(&box, mailbox_delete(box), MAIL_ERROR_NOTFOUND,
			   error_r);
}

/* A mailbox that the primary does not have. */
static enum replay_result
tree_delete_gone_one(struct tree *tree, const struct tree_local *local,
		     const char **error_r)
{
	const char *username = replay_user_mail_user(tree->user)->username;
	enum replay_result result;

	if (tree_is_kept(local)) {
		return tree_has_path(tree, local->path) ?
			tree_rename_kept(tree, local, error_r) : REPLAY_DONE;
	}
	if (local->messages == 0) {
		/* One that was deleted here before was made again by a tree
		   that came late, perhaps into an index that did not live to
		   say whose it is. Others come into being by themselves. */
		if (!local->replicated &&
		    !replay_mailbox_was_deleted(tree->user, local->guid))
			return REPLAY_DONE;
	} else if (!local->replicated ||
		   !tree_was_deleted(tree, local->guid)) {
		if (replay.set.repair_extra == DOVETAIL_REPAIR_EXTRA_REPORT) {
			e_warning(replay.event, "User %s: Mailbox %s is only "
				"here, not at the primary: it stays "
				"(dovetail_repair_extra=report)", username,
				local->vname);
			return REPLAY_DONE;
		}
		if (!tree_lacks_for_sure(tree, local))
			return REPLAY_DONE;
		result = tree_keep_messages(local, error_r);
		if (result != REPLAY_DONE)
			return result;
		e_info(replay.event, "User %s: Mailbox %s is only here, "
		       "deleting it, its messages are kept", username,
		       local->vname);
		return tree_delete(tree, local, error_r);
	}
	e_info(replay.event, "User %s: Mailbox %s is no longer at the primary, "
	       "deleting it", username, local->vname);
	return tree_delete(tree, local, error_r);
}

static enum replay_result
tree_delete_gone(struct tree *tree, const char **error_r)
{
	const struct tree_local *local;
	enum replay_result result;

	array_foreach(&tree->locals, local) {
		if (tree_find_guid(tree, local->guid) != NULL)
			continue;
		result = tree_delete_gone_one(tree, local, error_r);
		if (result != REPLAY_DONE)
			return result;
	}
	tree_end_doubts(tree);
	return REPLAY_DONE;
}

/* Interrupted repairs left these behind. */
static void tree_clean_parts(struct tree *tree)
{
	const struct tree_parts *parts;

	array_foreach(&tree->parts, parts) {
		replay_rebuild_clean(parts->ns, parts->vname,
			tree_find_guid(tree, parts->guid) != NULL);
	}
}

static enum replay_result
tree_place(struct tree *tree, const struct dovetail_tree_mailbox *tm,
	   const char **error_r)
{
	enum replay_result result;
	struct mailbox *box;
	int ret;

	ret = replay_user_find_mailbox(tree->user, tm->guid, tm->name, &box,
				       error_r);
	if (ret > 0 &&
	    dovetail_position_claim(box, tree->origin_id, error_r) < 0)
		ret = -1;
	if (ret > 0)
		ret = list_find(tree->user, tm->guid, tm->name, &box, error_r);
	if (ret < 0)
		return REPLAY_FAILED;
	if (ret > 0)
		return list_rename_to(tree->user, &box, tm->name,
				      MAIL_ERROR_NONE, error_r);
	result = list_create(tree->user, tree->origin, tm->guid, tm->name,
			     tm->uid_validity, 0, error_r);
	if (result == REPLAY_FAILED) {
		*error_r = t_strdup_printf("Mailbox %s: %s", tm->name,
					   *error_r);
	}
	if (result == REPLAY_DONE && tm->uid_next > 1) {
		replay_wanted_add(replay_user_mail_user(tree->user)->username,
				  tree->origin, tm->guid, tm->name, 1,
				  "The mailbox was not here");
	}
	return result;
}

static bool tree_has_dir(const struct tree *tree, const char *path)
{
	const struct dovetail_tree_mailbox *tm;

	array_foreach(&tree->change->mailboxes, tm) {
		if (guid_128_is_empty(tm->guid) && strcmp(tm->name, path) == 0)
			return TRUE;
	}
	return FALSE;
}

/* Names that cannot be selected, have nothing below them, and are not the
   primary's: what was below has moved. Returns 1: some were deleted.  0: there
   are none.  -1: failed. */
static int tree_delete_dirs(struct tree *tree, struct mail_namespace *ns,
			    const char **error_r)
{
	struct mailbox_list_iterate_context *iter;
	const struct mailbox_info *info;
	ARRAY_TYPE(const_string) gone;
	struct mailbox *box;
	const char *vname;

	t_array_init(&gone, 8);
	iter = mailbox_list_iter_init(ns->list, "*",
		MAILBOX_LIST_ITER_RAW_LIST | MAILBOX_LIST_ITER_NO_AUTO_BOXES |
		MAILBOX_LIST_ITER_RETURN_CHILDREN);
	while ((info = mailbox_list_iter_next(iter)) != NULL) {
		if ((info->flags & MAILBOX_NOSELECT) == 0 ||
		    (info->flags & (MAILBOX_CHILDREN |
				    MAILBOX_NONEXISTENT)) != 0 ||
		    dovetail_name_is_kept(ns, info->vname) ||
		    tree_has_dir(tree, dovetail_name_to_path(ns, info->vname)))
			continue;
		vname = t_strdup(info->vname);
		array_push_back(&gone, &vname);
	}
	if (mailbox_list_iter_deinit(&iter) < 0) {
		*error_r = t_strdup(mailbox_list_get_last_internal_error(
			ns->list, NULL));
		return -1;
	}
	array_foreach_elem(&gone, vname) {
		box = mailbox_alloc(ns->list, vname, MAILBOX_FLAG_IGNORE_ACLS);
		if (list_finish(&box, mailbox_delete(box), MAIL_ERROR_NOTFOUND,
				error_r) != REPLAY_DONE)
			return -1;
	}
	return array_count(&gone) > 0 ? 1 : 0;
}

static enum replay_result
tree_delete_all_dirs(struct tree *tree, const char **error_r)
{
	struct mail_user *mail_user = replay_user_mail_user(tree->user);
	struct mail_namespace *ns;
	unsigned int depth;
	int ret;

	for (ns = mail_user->namespaces; ns != NULL; ns = ns->next) {
		if (!dovetail_namespace_is_own(ns, mail_user))
			continue;
		/* each time the parents of those before */
		for (ret = 1, depth = 0;
		     ret > 0 && depth < MAILBOX_LIST_NAME_MAX_LENGTH; depth++)
			ret = tree_delete_dirs(tree, ns, error_r);
		if (ret < 0)
			return REPLAY_FAILED;
	}
	return REPLAY_DONE;
}

static bool paths_have(const ARRAY_TYPE(const_string) *paths, const char *path)
{
	const char *p;

	array_foreach_elem(paths, p) {
		if (strcmp(p, path) == 0)
			return TRUE;
	}
	return FALSE;
}

static enum replay_result
tree_subscriptions(struct tree *tree, const char **error_r)
{
	enum replay_result result = REPLAY_DONE;
	const char *path;

	array_foreach_elem(&tree->subscriptions, path) {
		if (result == REPLAY_DONE &&
		    !paths_have(&tree->change->subscriptions, path))
			result = list_subscribe(tree->user, path, FALSE,
						error_r);
	}
	array_foreach_elem(&tree->change->subscriptions, path) {
		if (result == REPLAY_DONE &&
		    !paths_have(&tree->subscriptions, path))
			result = list_subscribe(tree->user, path, TRUE,
						error_r);
	}
	return result;
}

/* There is a mailbox below this name. Then the name is there, too; making it
   would turn it into a mailbox in Maildir++. */
static bool
tree_has_child(const struct dovetail_change_tree *change, const char *name)
{
	const struct dovetail_tree_mailbox *tm;
	size_t len = strlen(name);

	array_foreach(&change->mailboxes, tm) {
		if (!guid_128_is_empty(tm->guid) &&
		    strncmp(tm->name, name, len) == 0 &&
		    tm->name[len] == DOVETAIL_NAME_SEP)
			return TRUE;
	}
	return FALSE;
}

/* What Dovecot remembers of GUIDs is not looked at again while a user is open, and
   a name that is another mailbox' by now would be an error. */
static void tree_forget_guids(struct tree *tree)
{
	struct mail_user *mail_user = replay_user_mail_user(tree->user);
	struct mail_namespace *ns;

	for (ns = mail_user->namespaces; ns != NULL; ns = ns->next) {
		if (dovetail_namespace_is_own(ns, mail_user))
			mailbox_guid_cache_refresh(ns->list);
	}
}

static int tree_init(struct tree *tree, struct replay_user *user,
		     const char *origin,
		     const struct dovetail_change_tree *change,
		     const char **error_r)
{
	i_zero(tree);
	tree->user = user;
	tree->origin = origin;
	tree->change = change;
	dovetail_origin_id(origin, tree->origin_id);
	t_array_init(&tree->locals, 64);
	t_array_init(&tree->parts, 4);
	t_array_init(&tree->subscriptions, 64);

	replay_user_forget_mailboxes(user);
	return tree_read(tree, error_r);
}

enum replay_result
replay_tree(struct replay_user *user, const char *origin,
	    const struct dovetail_change_tree *change, const char **error_r)
{
	const struct dovetail_tree_mailbox *tm;
	enum replay_result result;
	struct tree tree;

	if (tree_init(&tree, user, origin, change, error_r) < 0)
		return REPLAY_FAILED;
	if (array_count(&change->mailboxes) == 0) {
		/* A user who was never there. If there are mailboxes here,
		   something is wrong, and deleting them would not mend it. */
		return REPLAY_DONE;
	}
	tree_clean_parts(&tree);
	result = tree_delete_gone(&tree, error_r);
	if (tree.deleted)
		tree_forget_guids(&tree);
	if (result == REPLAY_DONE)
		result = tree_move_aside(&tree, error_r);
	if (result == REPLAY_DONE)
		result = tree_delete_all_dirs(&tree, error_r);
	array_foreach(&change->mailboxes, tm) {
		if (result == REPLAY_DONE && !guid_128_is_empty(tm->guid))
			result = tree_place(&tree, tm, error_r);
	}
	array_foreach(&change->mailboxes, tm) {
		if (result == REPLAY_DONE && guid_128_is_empty(tm->guid) &&
		    !tree_has_child(change, tm->name))
			result = list_create_dir(tree.user, tm->name, error_r);
	}
	if (result == REPLAY_DONE)
		result = tree_delete_all_dirs(&tree, error_r);
	if (result == REPLAY_DONE)
		result = tree_subscriptions(&tree, error_r);
	return result;
}

/* ---- what differs ---- */

static const char *path_for_people(const char *path)
{
	return t_str_replace(path, DOVETAIL_NAME_SEP, '/');
}

static void ATTR_FORMAT(2, 3)
tree_differs(ARRAY_TYPE(const_string) *texts, const char *fmt, ...)
{
	const char *text;
	va_list args;

	va_start(args, fmt);
	text = t_strdup_vprintf(fmt, args);
	va_end(args);
	array_push_back(texts, &text);
}

static void tree_compare_mailboxes(const struct tree *tree,
				   ARRAY_TYPE(const_string) *texts)
{
	const struct dovetail_tree_mailbox *tm;
	const struct tree_local *local, *found;

	array_foreach(&tree->change->mailboxes, tm) {
		if (guid_128_is_empty(tm->guid))
			continue;
		found = NULL;
		array_foreach(&tree->locals, local) {
			if (guid_128_equals(local->guid, tm->guid))
				found = local;
		}
		if (found == NULL) {
			tree_differs(texts, "Mailbox %s is not on %s",
				     path_for_people(tm->name),
				     replay.set.node);
		} else if (strcmp(found->path, tm->name) != 0) {
			tree_differs(texts, "Mailbox %s is %s on %s",
				     path_for_people(tm->name),
				     path_for_people(found->path),
				     replay.set.node);
		}
	}
	array_foreach(&tree->locals, local) {
		if (tree_find_guid(tree, local->guid) != NULL ||
		    tree_is_kept(local))
			continue;
		/* INBOX and the like come into being by themselves */
		if (local->replicated || local->messages > 0) {
			tree_differs(texts, "Mailbox %s (%u messages) is only "
				     "on %s", path_for_people(local->path),
				     local->messages, replay.set.node);
		}
	}
}

static void tree_compare_subscriptions(const struct tree *tree,
				       ARRAY_TYPE(const_string) *texts)
{
	const char *path;

	array_foreach_elem(&tree->change->subscriptions, path) {
		if (!paths_have(&tree->subscriptions, path)) {
			tree_differs(texts, "%s is not subscribed on %s",
				     path_for_people(path), replay.set.node);
		}
	}
	array_foreach_elem(&tree->subscriptions, path) {
		if (!paths_have(&tree->change->subscriptions, path)) {
			tree_differs(texts, "%s is subscribed only on %s",
				     path_for_people(path), replay.set.node);
		}
	}
}

/* Of names that cannot be selected nothing is said: formats disagree about which
   of them there are. */
static int tree_compare(struct replay_user *user, const char *origin,
			const struct dovetail_change_tree *change,
			ARRAY_TYPE(const_string) *texts, const char **error_r)
{
	struct tree tree;

	array_clear(texts);
	if (tree_init(&tree, user, origin, change, error_r) < 0)
		return -1;
	tree_compare_mailboxes(&tree, texts);
	tree_compare_subscriptions(&tree, texts);
	return 0;
}

static void tree_answer(struct replay_user *user, const char *origin,
			uint32_t number, enum dovetail_verified_result result,
			ARRAY_TYPE(const_string) *texts)
{
	const char *username = replay_user_mail_user(user)->username;
	struct dovetail_change_verified verified;
	unsigned int count = array_count(texts);
	const char *text, *error;

	if (count > DOVETAIL_VERIFIED_TEXTS_MAX) {
		array_delete(texts, DOVETAIL_VERIFIED_TEXTS_MAX - 1,
			     count - (DOVETAIL_VERIFIED_TEXTS_MAX - 1));
		text = t_strdup_printf("... and %u more", count -
				       (DOVETAIL_VERIFIED_TEXTS_MAX - 1));
		array_push_back(texts, &text);
	}
	i_zero(&verified);
	verified.node = origin;
	verified.number = number;
	verified.result = result;
	verified.texts = *texts;
	if (replay_send_verified(username, &verified, &error) < 0) {
		e_warning(replay.event, "User %s: Cannot answer %s: %s",
			  username, origin, error);
	}
}

enum replay_result
replay_tree_verify(struct replay_user *user, const char *origin,
		   const struct dovetail_change_tree *change,
		   const char **error_r)
{
	enum dovetail_verified_result verified = DOVETAIL_VERIFIED_EQUAL;
	enum replay_result result = REPLAY_DONE;
	ARRAY_TYPE(const_string) texts, after;
	int ret;

	t_array_init(&texts, 8);
	t_array_init(&after, 8);
	ret = tree_compare(user, origin, change, &texts, error_r);
	if (ret == 0 && array_count(&texts) > 0)
		verified = DOVETAIL_VERIFIED_DIFFERENT;
	if (verified == DOVETAIL_VERIFIED_DIFFERENT &&
	    (change->flags & DOVETAIL_VERIFY_REPAIR) != 0) {
		result = replay_tree(user, origin, change, error_r);
		ret = result != REPLAY_DONE ? -1 :
			tree_compare(user, origin, change, &after, error_r);
		if (ret == 0 && array_count(&after) == 0)
			verified = DOVETAIL_VERIFIED_REPAIRED;
		else
			texts = after;
	}
	if (ret < 0) {
		verified = DOVETAIL_VERIFIED_UNKNOWN;
		array_clear(&texts);
		array_push_back(&texts, error_r);
	}
	tree_answer(user, origin, change->number, verified, &texts);
	replay_user_forget_mailboxes(user);
	return result;
}
