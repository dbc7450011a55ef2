/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* When mdbox finds that a process died half-way through a commit, Dovecot rebuilds
   the user's storage: it reads all files, and gives each mailbox a new index. On a
   replica that leaves

   - mailboxes with no position, which would look like nobody's replicas. What is
     remembered is whose they are, not how far they are: all messages are to be
     compared.
   - messages that were expunged, when that was not executed yet. See
     replay_expunge_anyway().
   - messages in mailboxes that were found in files only: a process died before the
     mailbox had them, perhaps long ago. The message came again then, and may have
     been expunged since. They are removed: what the mailbox should have the
     primary has, and what only a replica has was in its index.
   - Dovecot 2.3: a map that is not what the mailboxes are, or is marked to be
     rebuilt at each sync. */

#include "lib.h"
#include "array.h"
#include "mail-storage-private.h"
#include "mail-index-private.h"
#include "mdbox-map-private.h"
#include "mdbox-storage.h"
#include "mdbox-storage-rebuild.h"
#include "dovetail-compat.h"
#include "dovetail-plugin.h"
#include "dovetail-position.h"

static struct mdbox_storage *mdbox_storage_of(struct mailbox *box)
{
	return strcmp(box->storage->name, "mdbox") != 0 ? NULL :
		MDBOX_STORAGE(box->storage);
}

/* ---- Dovecot rebuilds the storage ---- */

static bool mdbox_is_replica(const struct dovetail_mailbox *dbox)
{
	static const uint8_t nobody[DOVETAIL_ORIGIN_ID_SIZE];

	return memcmp(dbox->rebuilt_origin, nobody, sizeof(nobody)) != 0;
}

static uint32_t mdbox_uid_next(struct mailbox *box)
{
	struct mail_index_view *view;
	uint32_t uid_next;

	(void)mail_index_refresh(box->index);
	view = mail_index_view_open(box->index);
	uid_next = mail_index_get_header(view)->next_uid;
	mail_index_view_close(&view);
	return uid_next;
}

void dovetail_mdbox_opened(struct mailbox *box)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);
	struct mdbox_storage *storage = mdbox_storage_of(box);
	struct dovetail_position pos;

	if (storage == NULL || !storage->rebuilding_storage)
		return;
	dbox->duser->mdbox_rebuilt = TRUE;
	if (!dovetail_position_get(box, &pos))
		return;
	memcpy(dbox->rebuilt_origin, pos.origin, sizeof(dbox->rebuilt_origin));
	dbox->rebuilt_uid_next = mdbox_uid_next(box);
}

static void mdbox_note_found(struct mailbox *box, uint32_t uid_next)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);
	struct dovetail_user *duser = dbox->duser;
	struct dovetail_mdbox_found *found;

	if (!duser->replaying || duser->primary ||
	    uid_next <= dbox->rebuilt_uid_next)
		return;
	if (!array_is_created(&duser->mdbox_found))
		p_array_init(&duser->mdbox_found, duser->user->pool, 4);
	found = array_append_space(&duser->mdbox_found);
	found->list = box->list;
	found->vname = p_strdup(duser->user->pool, box->vname);
	found->uids.seq1 = dbox->rebuilt_uid_next;
	found->uids.seq2 = uid_next - 1;
}

void dovetail_mdbox_closing(struct mailbox *box)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);
	const char *error;

	if (!mdbox_is_replica(dbox))
		return;
	if (!mail_index_is_deleted(box->index)) T_BEGIN {
		mdbox_note_found(box, mdbox_uid_next(box));
		if (dovetail_position_claim(box, dbox->rebuilt_origin,
					    &error) < 0) {
			e_error(dbox->duser->event, "Mailbox %s: Cannot note "
				"whose replica it is: %s", box->vname, error);
		}
	} T_END;
	i_zero(&dbox->rebuilt_origin);
}

/* ---- afterwards, in the replay service ---- */

static int mdbox_expunge_found(struct mailbox *box, struct seq_range uids)
{
	struct mailbox_transaction_context *t;
	struct mail *mail;
	uint32_t uid;

	if (mailbox_open(box) < 0 || mailbox_sync(box, 0) < 0)
		return -1;
	t = mailbox_transaction_begin(box, MAILBOX_TRANSACTION_FLAG_SYNC |
				      MAILBOX_TRANSACTION_FLAG_NO_NOTIFY,
				      __func__);
	mail = mail_alloc(t, 0, NULL);
	for (uid = uids.seq1; uid <= uids.seq2; uid++) {
		if (mail_set_uid(mail, uid))
			mail_expunge(mail);
	}
	mail_free(&mail);
	return mailbox_transaction_commit(&t) < 0 ||
		mailbox_sync(box, 0) < 0 ? -1 : 0;
}

static void mdbox_remove_found(struct dovetail_user *duser)
{
	struct dovetail_mdbox_found found;
	struct mailbox *box;

	while (array_is_created(&duser->mdbox_found) &&
	       array_count(&duser->mdbox_found) > 0) {
		/* more may come */
		found = *array_front(&duser->mdbox_found);
		array_pop_front(&duser->mdbox_found);
		box = mailbox_alloc(found.list, found.vname,
				    MAILBOX_FLAG_IGNORE_ACLS);
		if (mdbox_expunge_found(box, found.uids) < 0) {
			e_warning(duser->event, "Mailbox %s: Cannot remove what "
				"no mailbox had: %s", found.vname,
				mailbox_get_last_internal_error(box, NULL));
		} else {
			e_info(duser->event, "Mailbox %s: Removed UID %u..%u, "
			       "which Dovecot found in files and in no "
			       "mailbox", found.vname, found.uids.seq1,
			       found.uids.seq2);
		}
		mailbox_free(&box);
	}
}

void dovetail_mdbox_synced(struct mailbox *box)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);
	struct mdbox_storage *storage = mdbox_storage_of(box);

	if (storage == NULL || storage->rebuilding_storage)
		return;
	dovetail_compat_mdbox_end_rebuilds(storage, dbox->duser->mdbox_rebuilt);
	dbox->duser->mdbox_rebuilt = FALSE;
	mdbox_remove_found(dbox->duser);
}
