/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* What only this replica has goes into a folder of its own before it is removed
   from where the primary does not have it. The folder is the replica's: the primary
   knows nothing of it, until this node becomes the primary. */

#include "lib.h"
#include "array.h"
#include "bsearch-insert-pos.h"
#include "guid.h"
#include "istream.h"
#include "seq-range-array.h"
#include "mail-storage-private.h"
#include "mail-index-private.h"
#include "maildir-storage.h"
#include "dovetail-mailbox-digest.h"
#include "dovetail-name.h"
#include "dovetail-position.h"
#include "dovetail-replay.h"

/* The primary may have folders of that name as well, but hardly so many. */
#define KEEP_FOLDERS_MAX 100

struct keep_message {
	guid_128_t guid;
	uint32_t uid;
	/* a copy is in the folder already */
	bool kept;
};

struct keep {
	struct mailbox *box, *dest;
	ARRAY(struct keep_message) messages;
	const char *error;
};

static int keep_failed(struct keep *keep, struct mailbox *box)
{
	keep->error = t_strdup(mailbox_get_last_internal_error(box, NULL));
	return -1;
}

/* ---- which folder ---- */

/* Returns 1: the folder is ours, or was made.  0: it is the primary's.  -1. */
static int keep_open_folder(struct keep *keep, struct mailbox_list *list,
			    const char *vname)
{
	uint8_t none[DOVETAIL_ORIGIN_ID_SIZE];
	struct dovetail_position pos;
	bool ours;

	keep->dest = mailbox_alloc(list, vname, MAILBOX_FLAG_IGNORE_ACLS);
	if (mailbox_create(keep->dest, NULL, FALSE) < 0 &&
	    mailbox_get_last_mail_error(keep->dest) != MAIL_ERROR_EXISTS) {
		keep_failed(keep, keep->dest);
	} else if (mailbox_open(keep->dest) < 0 ||
		   mailbox_sync(keep->dest, MAILBOX_SYNC_FLAG_FULL_READ) < 0) {
		keep_failed(keep, keep->dest);
	} else {
		i_zero(&none);
		ours = !dovetail_position_get(keep->dest, &pos) ||
			memcmp(pos.origin, none, sizeof(none)) == 0;
		if (ours)
			return 1;
		mailbox_free(&keep->dest);
		return 0;
	}
	mailbox_free(&keep->dest);
	return -1;
}

/* below: the name of a folder below the one to keep in, or NULL. */
static int keep_find_folder(struct keep *keep, const char *below)
{
	struct mail_namespace *ns = mailbox_get_namespace(keep->box);
	const char sep[] = { mail_namespace_get_sep(ns), '\0' };
	const char *vname;
	unsigned int n;
	int ret;

	for (n = 1; n <= KEEP_FOLDERS_MAX; n++) {
		vname = dovetail_name_of_kept(ns, n);
		if (below != NULL)
			vname = t_strconcat(vname, sep, below, NULL);
		/* not into itself */
		if (strcmp(vname, keep->box->vname) == 0)
			continue;
		ret = keep_open_folder(keep, ns->list, vname);
		if (ret != 0)
			return ret < 0 ? -1 : 0;
	}
	keep->error = "All names for a folder to keep messages in are taken";
	return -1;
}

/* ---- which messages ---- */

static int keep_message_cmp(const struct keep_message *m1,
			    const struct keep_message *m2)
{
	return memcmp(m1->guid, m2->guid, sizeof(m1->guid));
}

static int keep_find_messages(struct keep *keep,
			      const ARRAY_TYPE(seq_range) *uids)
{
	struct mailbox_transaction_context *t;
	struct keep_message *message;
	struct mail *mail;
	const char *guid;
	uint32_t seq, count;
	int ret = 0;

	t = mailbox_transaction_begin(keep->box, 0, __func__);
	mail = mail_alloc(t, 0, NULL);
	count = mail_index_view_get_messages_count(t->view);
	for (seq = 1; seq <= count; seq++) {
		mail_set_seq(mail, seq);
		if (!seq_range_exists(uids, mail->uid))
			continue;
		if (mail_get_special(mail, MAIL_FETCH_GUID, &guid) < 0) {
			if (mail->expunged)
				continue;
			ret = keep_failed(keep, keep->box);
			break;
		}
		message = array_append_space(&keep->messages);
		message->uid = mail->uid;
		dovetail_message_guid(guid, message->guid);
	}
	mail_free(&mail);
	mailbox_transaction_rollback(&t);
	array_sort(&keep->messages, keep_message_cmp);
	return ret;
}

static int keep_guid_cmp(const uint8_t *guid, const struct keep_message *message)
{
	return memcmp(guid, message->guid, sizeof(message->guid));
}

static void keep_mark_kept(struct keep *keep, const guid_128_t guid)
{
	struct keep_message *messages;
	unsigned int i, count;

	messages = array_get_modifiable(&keep->messages, &count);
	(void)array_bsearch_insert_pos(&keep->messages, guid, keep_guid_cmp,
				       &i);
	for (; i < count && guid_128_equals(messages[i].guid, guid); i++)
		messages[i].kept = TRUE;
}

/* Which of them are in the folder? Two with the same GUID are the same message. */
static int keep_find_kept(struct keep *keep)
{
	struct mailbox_transaction_context *t;
	struct keep_message *messages;
	struct mail *mail;
	guid_128_t guid_128;
	const char *guid;
	uint32_t seq, seqs;
	unsigned int i, count;
	int ret = 0;

	t = mailbox_transaction_begin(keep->dest, 0, __func__);
	mail = mail_alloc(t, 0, NULL);
	seqs = mail_index_view_get_messages_count(keep->dest->view);
	for (seq = 1; seq <= seqs; seq++) {
		mail_set_seq(mail, seq);
		if (mail_get_special(mail, MAIL_FETCH_GUID, &guid) < 0) {
			if (mail->expunged)
				continue;
			ret = keep_failed(keep, keep->dest);
			break;
		}
		dovetail_message_guid(guid, guid_128);
		keep_mark_kept(keep, guid_128);
	}
	mail_free(&mail);
	mailbox_transaction_rollback(&t);

	messages = array_get_modifiable(&keep->messages, &count);
	for (i = 1; i < count; i++) {
		if (guid_128_equals(messages[i - 1].guid, messages[i].guid))
			messages[i].kept = TRUE;
	}
	return ret;
}

/* ---- the copies ---- */

static int keep_copy_data(struct mail_save_context *save_ctx, struct mail *mail)
{
	struct istream *input;

	if (mail_get_stream(mail, NULL, NULL, &input) == 0)
		return replay_save_stream(save_ctx, input);
	mailbox_save_cancel(&save_ctx);
	return -1;
}

static int keep_copy(struct keep *keep, struct mailbox_transaction_context *t,
		     struct mail *mail)
{
	struct mail_save_context *save_ctx;
	time_t received_date, save_date;
	const char *guid;
	int ret;

	if (mail_get_received_date(mail, &received_date) < 0 ||
	    mail_get_save_date(mail, &save_date) < 0 ||
	    mail_get_special(mail, MAIL_FETCH_GUID, &guid) < 0)
		return mail->expunged ? 0 : keep_failed(keep, keep->box);
	save_ctx = mailbox_save_alloc(t);
	mailbox_save_copy_flags(save_ctx, mail);
	mailbox_save_set_guid(save_ctx, guid);
	mailbox_save_set_received_date(save_ctx, received_date, 0);
	mailbox_save_set_save_date(save_ctx, save_date);
	/* as in replay_copied_save_date() */
	if (strcmp(t->box->storage->name, MAILDIR_STORAGE_NAME) == 0) {
		ret = keep_copy_data(save_ctx, mail);
	} else {
		ret = mailbox_copy(&save_ctx, mail);
		if (ret == 0)
			replay_copied_save_date(t, save_date);
	}
	if (ret < 0) {
		keep->error = t_strdup_printf("Cannot keep UID %u: %s",
			mail->uid,
			mailbox_get_last_internal_error(keep->dest, NULL));
	}
	return ret;
}

static int keep_uid_cmp(const struct keep_message *m1,
			const struct keep_message *m2)
{
	return m1->uid < m2->uid ? -1 : m1->uid > m2->uid ? 1 : 0;
}

static int keep_copy_all(struct keep *keep)
{
	struct mailbox_transaction_context *t, *dest_t;
	const struct keep_message *message;
	struct mail *mail;
	int ret = 0;

	array_sort(&keep->messages, keep_uid_cmp);
	t = mailbox_transaction_begin(keep->box, 0, __func__);
	dest_t = mailbox_transaction_begin(keep->dest, REPLAY_SAVE_FLAGS,
					   __func__);
	mail = mail_alloc(t, MAIL_FETCH_FLAGS, NULL);
	array_foreach(&keep->messages, message) {
		if (message->kept || !mail_set_uid(mail, message->uid))
			continue;
		T_BEGIN {
			ret = keep_copy(keep, dest_t, mail);
		} T_END_PASS_STR_IF(ret < 0, &keep->error);
		if (ret < 0)
			break;
	}
	mail_free(&mail);
	if (ret < 0)
		mailbox_transaction_rollback(&dest_t);
	else if (mailbox_transaction_commit(&dest_t) < 0)
		ret = keep_failed(keep, keep->dest);
	mailbox_transaction_rollback(&t);
	return ret;
}

static int keep_uids(struct mailbox *box, const ARRAY_TYPE(seq_range) *uids,
		     const char *below, const char **error_r)
{
	struct keep keep;
	int ret;

	i_zero(&keep);
	keep.box = box;
	i_array_init(&keep.messages, 16);
	ret = keep_find_messages(&keep, uids);
	if (ret == 0 && array_count(&keep.messages) > 0) {
		ret = keep_find_folder(&keep, below);
		if (ret == 0)
			ret = keep_find_kept(&keep);
		if (ret == 0)
			ret = keep_copy_all(&keep);
		if (ret == 0) {
			e_warning(replay.event, "User %s: Mailbox %s: %u "
				"messages that the primary has not are kept in "
				"%s", mailbox_get_namespace(box)->owner->username,
				box->vname, array_count(&keep.messages),
				keep.dest->vname);
		}
		if (keep.dest != NULL)
			mailbox_free(&keep.dest);
	}
	array_free(&keep.messages);
	if (ret < 0)
		*error_r = keep.error;
	return ret;
}

int replay_keep(struct mailbox *box, const ARRAY_TYPE(seq_range) *uids,
		const char **error_r)
{
	return keep_uids(box, uids, NULL, error_r);
}

int replay_keep_mailbox(struct mailbox *box, const char **error_r)
{
	const char *prefix = mailbox_get_namespace(box)->prefix;
	const char *below = box->vname;
	ARRAY_TYPE(seq_range) all;

	if (mailbox_sync(box, MAILBOX_SYNC_FLAG_FULL_READ) < 0) {
		*error_r = t_strdup(mailbox_get_last_internal_error(box, NULL));
		return -1;
	}
	if (strncmp(below, prefix, strlen(prefix)) == 0)
		below += strlen(prefix);
	t_array_init(&all, 1);
	seq_range_array_add_range(&all, 1, (uint32_t)-1);
	return keep_uids(box, &all, below, error_r);
}
