/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* The mail plugin: wiring only. It sits near the storage (lib95), so it sees what
   other plugins let through and what is really stored. */

#include "lib.h"
#include "array.h"
#include "ioloop.h"
#include "mail-cache.h"
#include "master-service.h"
#include "mail-storage-private.h"
#include "mail-index-transaction-private.h"
#include "mail-index-modseq.h"
#include "mailbox-list-index.h"
#include "dovetail-compat.h"
#include "dovetail-name.h"
#include "dovetail-plugin.h"
#include "dovetail-plugin-init.h"
#include "dovetail-mailbox-digest.h"
#include "dovetail-position.h"

struct dovetail_user_module dovetail_user_module =
	MODULE_CONTEXT_INIT(&mail_user_module_register);
struct dovetail_mailbox_module dovetail_mailbox_module =
	MODULE_CONTEXT_INIT(&mail_storage_module_register);

const char *dovetail_plugin_version = DOVECOT_ABI_VERSION;

/* ---- user ---- */

static void dovetail_user_deinit(struct mail_user *user)
{
	struct dovetail_user *duser = DOVETAIL_USER_CONTEXT(user);

	if (duser->primary && !duser->unclean)
		dovetail_queue_client_clean(duser->client, user->username);
	if (duser->client != NULL)
		dovetail_queue_client_unref(&duser->client);
	event_unref(&duser->event);
	duser->module_ctx.super.deinit(user);
}

static void dovetail_mail_user_created(struct mail_user *user)
{
	struct mail_user_vfuncs *v = user->vlast;
	struct dovetail_user *duser;
	const char *error;
	int ret;

	duser = p_new(user->pool, struct dovetail_user, 1);
	ret = dovetail_compat_user_settings_read(user, &duser->set, &error);
	if (ret == 0) {
		e_debug(user->event, "dovetail: dovetail_node is not set");
		return;
	}
	if (ret < 0) {
		/* Reading mail must go on; what is written meanwhile is found
		   in the mailboxes once the setting is right. */
		e_error(user->event, "dovetail: Not replicating: %s", error);
		return;
	}
	duser->user = user;
	duser->event = event_create(user->event);
	event_set_append_log_prefix(duser->event, "dovetail: ");
	event_add_str(duser->event, "dovetail_node", duser->set.node);
	duser->primary = strcmp(duser->set.primary, duser->set.node) == 0;
	duser->replaying = null_strcmp(user->service,
				       DOVETAIL_REPLAY_SERVICE) == 0;
	duser->client = dovetail_queue_client_get(duser->set.queue_socket,
						  NULL);

	duser->module_ctx.super = *v;
	user->vlast = &duser->module_ctx.super;
	v->deinit = dovetail_user_deinit;
	MODULE_CONTEXT_SET(user, dovetail_user_module, duser);
}

bool dovetail_plugin_get_role(struct mail_user *user, const char **primary_r,
			      bool *is_primary_r)
{
	struct dovetail_user *duser = DOVETAIL_USER_CONTEXT(user);

	if (duser == NULL)
		return FALSE;
	*primary_r = duser->set.primary;
	*is_primary_r = duser->primary;
	return TRUE;
}

/* ---- mailbox ---- */

/* Does the transaction change anything that is replicated? Caches are not. */
static bool transaction_changes(struct mailbox_transaction_context *t)
{
	struct mail_index_transaction *itrans = t->itrans;

	return t->save_count > 0 || itrans->log_updates ||
		(array_is_created(&itrans->updates) &&
		 array_count(&itrans->updates) > 0) ||
		itrans->attribute_updates != NULL;
}

/* A Maildir whose UID list is locked takes new files without UIDs, which stand in no
   transaction log until somebody syncs: the client would get its OK before
   there is anything to send. As mail_log does, have it wait for the lock. */
static struct mailbox_transaction_context *
dovetail_transaction_begin(struct mailbox *box,
			   enum mailbox_transaction_flags flags,
			   const char *reason)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);
	struct dovetail_user *duser = dbox->duser;

	if (duser->primary && duser->set.ack != DOVETAIL_ACK_LOCAL)
		flags |= MAILBOX_TRANSACTION_FLAG_ASSIGN_UIDS;
	return dbox->module_ctx.super.transaction_begin(box, flags, reason);
}

static int
dovetail_transaction_commit(struct mailbox_transaction_context *t,
			    struct mail_transaction_commit_changes *changes_r)
{
	struct mailbox *box = t->box;
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);
	struct dovetail_user *duser = dbox->duser;
	int ret;

	if (dbox->internal || !transaction_changes(t)) {
		return dbox->module_ctx.super.transaction_commit(t, changes_r);
	}
	if (dovetail_fence_refuses(box)) {
		dbox->module_ctx.super.transaction_rollback(t);
		return -1;
	}
	if (duser->primary) {
		dovetail_queue_client_mark_wait(duser->client,
			duser->user->username,
			dovetail_capture_deadline(duser));
		dovetail_position_log_end(box, &dbox->seen);
	}
	/* t is gone when this returns */
	ret = dbox->module_ctx.super.transaction_commit(t, changes_r);
	dovetail_capture_copies_saved(dbox, ret < 0 ? NULL : changes_r);
	if (ret == 0)
		dovetail_capture(box, DOVETAIL_CAPTURE_COMMIT);
	return ret;
}

static void
dovetail_transaction_rollback(struct mailbox_transaction_context *t)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(t->box);

	dovetail_capture_copies_saved(dbox, NULL);
	dbox->module_ctx.super.transaction_rollback(t);
}

static int dovetail_save_begin(struct mail_save_context *ctx,
			       struct istream *input)
{
	struct mailbox *box = ctx->transaction->box;
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);

	if (dovetail_fence_refuses(box) || dovetail_fence_unprotected(box))
		return -1;
	/* the answer comes while the message is written */
	if (dbox->duser->primary && !dbox->internal) {
		dovetail_queue_client_mark(dbox->duser->client,
					   dbox->duser->user->username);
	}
	/* Maildir takes a file's ctime for the save date, and each renaming
	   changes that; a date that was set is remembered. */
	if (dbox->duser->primary && ctx->data.save_date == (time_t)-1 &&
	    strcmp(box->storage->name, "maildir") == 0)
		ctx->data.save_date = ioloop_time;
	return dbox->module_ctx.super.save_begin(ctx, input);
}

static const char *const *
copy_keywords(struct mailbox *box, const struct mail_keywords *keywords)
{
	const ARRAY_TYPE(keywords) *names = mail_index_get_keywords(box->index);
	unsigned int i, count = keywords == NULL ? 0 : keywords->count;
	const char **list = t_new(const char *, count + 1);

	for (i = 0; i < count; i++)
		list[i] = array_idx_elem(names, keywords->idx[i]);
	return list;
}

/* A copy has the hash of its source: nobody reads it. */
static int dovetail_copy(struct mail_save_context *ctx, struct mail *mail)
{
	struct mailbox_transaction_context *t = ctx->transaction;
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(t->box);
	struct dovetail_mailbox *src_dbox = DOVETAIL_MAILBOX_CONTEXT(mail->box);
	uint8_t hash[DOVETAIL_MESSAGE_HASH_SIZE];
	const char *const *keywords;
	enum mail_flags flags;
	bool have_hash;

	if (dovetail_fence_refuses(t->box) ||
	    dovetail_fence_unprotected(t->box)) {
		mailbox_save_cancel(&ctx);
		return -1;
	}
	have_hash = dbox->duser->primary && src_dbox != NULL &&
		src_dbox->digest != NULL &&
		dovetail_mailbox_digest_get(src_dbox->digest, mail->uid, hash);
	flags = ctx->data.flags;
	keywords = copy_keywords(t->box, ctx->data.keywords);
	if (dbox->module_ctx.super.copy(ctx, mail) < 0)
		return -1;
	if (have_hash) {
		dovetail_mailbox_digest_update(t->box, t->itrans,
					       t->itrans->last_new_seq, flags,
					       keywords, hash);
	}
	dovetail_capture_copied(t, mail);
	return 0;
}

static int dovetail_sync_deinit(struct mailbox_sync_context *ctx,
				struct mailbox_sync_status *status_r)
{
	struct mailbox *box = ctx->box;
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);
	int ret;

	ret = dbox->module_ctx.super.sync_deinit(ctx, status_r);
	if (dbox->duser->replaying)
		dovetail_mdbox_synced(box);
	dovetail_capture(box, DOVETAIL_CAPTURE_SYNC);
	return ret;
}

static void dovetail_mailbox_close(struct mailbox *box)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);

	if (box->opened)
		dovetail_mdbox_closing(box);
	dovetail_capture_close(box);
	dovetail_mailbox_digest_close(&dbox->digest);
	array_free(&dbox->hints);
	dbox->module_ctx.super.close(box);
}

/* The user whose mailboxes these are, when they are replicated. */
static struct dovetail_user *mailbox_get_duser(struct mailbox *box)
{
	struct mail_namespace *ns = mailbox_list_get_namespace(box->list);

	if (ns->owner == NULL || !dovetail_namespace_is_own(ns, ns->owner))
		return NULL;
	if (strcmp(box->storage->name, "virtual") == 0 ||
	    strcmp(box->storage->name, "raw") == 0 ||
	    (box->storage->class_flags & MAIL_STORAGE_CLASS_FLAG_NOQUOTA) != 0)
		return NULL;
	return DOVETAIL_USER_CONTEXT(ns->owner);
}

/* Listing mailboxes brings the list index up to date: locked, it opens new ones for
   their GUID, and Dovecot would create INBOX and other autocreated ones there. Who
   creates has locked the list of mailboxes and then wants the list index: a dead-
   lock, and file_wait_lock() panics in one of the two. They are created later. */
static int dovetail_mailbox_open(struct mailbox *box)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);
	struct mailbox_list_index *ilist = INDEX_LIST_CONTEXT(box->list);

	if (dbox->module_ctx.super.open(box) == 0)
		return 0;
	if (ilist != NULL && ilist->syncing &&
	    mailbox_get_last_mail_error(box) == MAIL_ERROR_NOTFOUND) {
		mail_storage_set_error(box->storage, MAIL_ERROR_INUSE,
				       "The list of mailboxes is being read");
	}
	return -1;
}

static void dovetail_mailbox_allocated(struct mailbox *box)
{
	struct mailbox_vfuncs *v = box->vlast;
	struct dovetail_user *duser = mailbox_get_duser(box);
	struct dovetail_mailbox *dbox;
	guid_128_t guid;

	if (duser == NULL)
		return;
	dbox = p_new(box->pool, struct dovetail_mailbox, 1);
	dbox->duser = duser;
	dbox->internal = dovetail_name_is_parts(
		mailbox_list_get_namespace(box->list), box->vname, guid);
	dbox->module_ctx.super = *v;
	box->vlast = &dbox->module_ctx.super;
	v->transaction_begin = dovetail_transaction_begin;
	v->transaction_commit = dovetail_transaction_commit;
	v->transaction_rollback = dovetail_transaction_rollback;
	v->save_begin = dovetail_save_begin;
	v->copy = dovetail_copy;
	v->sync_deinit = dovetail_sync_deinit;
	v->open = dovetail_mailbox_open;
	v->close = dovetail_mailbox_close;
	dovetail_capture_list_mailbox_allocated(box, v);
	MODULE_CONTEXT_SET(box, dovetail_mailbox_module, dbox);
}

/* sdbox and Maildir keep a message's save date in dovecot.index.cache only; where
   it is not, they take the file's ctime, which they change themselves with each
   copy and renaming. A cache forgets what clients do not ask for: not this. (As
   with mail_always_cache_fields = date.save, but nobody needs to know.) */
static void dovetail_keep_save_dates(struct mailbox *box)
{
	struct mail_cache_field field = {
		.name = "date.save",
		.type = MAIL_CACHE_FIELD_FIXED_SIZE,
		.field_size = sizeof(uint32_t),
		.decision = MAIL_CACHE_DECISION_YES |
			MAIL_CACHE_DECISION_FORCED,
	};
	unsigned int idx;

	if (box->cache == NULL || strcmp(box->storage->name, "mdbox") == 0)
		return;
	idx = mail_cache_register_lookup(box->cache, field.name);
	if (idx != UINT_MAX &&
	    mail_cache_register_get_field(box->cache, idx)->decision ==
	    field.decision)
		return;
	dovetail_compat_cache_register(box->cache, &field);
}

static void dovetail_mailbox_opened(struct mailbox *box)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);

	if (dbox == NULL || box->index == NULL)
		return;
	dovetail_keep_save_dates(box);
	dovetail_mdbox_opened(box);
	if (!dbox->duser->primary || dbox->internal)
		return;
	/* Without tracking, a message shows whatever HIGHESTMODSEQ was when a
	   client asked first: no replica could promise to show as much. */
	mail_index_modseq_enable(box->index);
	dovetail_position_log_end(box, &dbox->seen);
	dbox->digest = dovetail_mailbox_digest_open(box);
}

static struct mail_storage_hooks dovetail_hooks = {
	.mail_user_created = dovetail_mail_user_created,
	.mailbox_allocated = dovetail_mailbox_allocated,
	.mailbox_opened = dovetail_mailbox_opened,
	.mail_allocated = dovetail_fence_mail_allocated,
};

static bool hooked = FALSE;

void dovetail_plugin_init(struct module *module)
{
	const char *error;

	if (!dovetail_compat_version_is_ours(master_service, &error)) {
		/* Mail keeps flowing; what is written meanwhile is found in the
		   mailboxes later. */
		i_error("dovetail: Not replicating: %s", error);
		return;
	}
	mail_storage_hooks_add(module, &dovetail_hooks);
	hooked = TRUE;
}

void dovetail_plugin_deinit(void)
{
	if (hooked)
		mail_storage_hooks_remove(&dovetail_hooks);
	hooked = FALSE;
}
