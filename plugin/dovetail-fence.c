/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* Writes that may not happen here: on a node that is not the user's primary, and,
   if the administrator wants that, while the ack level is out of reach. */

#include "lib.h"
#include "mail-storage-private.h"
#include "dovetail-compat.h"
#include "dovetail-plugin.h"

#define DOVETAIL_MAIL_CONTEXT(obj) \
	MODULE_CONTEXT(obj, dovetail_mail_module)

static MODULE_CONTEXT_DEFINE_INIT(dovetail_mail_module, &mail_module_register);

bool dovetail_fence_refuses(struct mailbox *box)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);
	struct dovetail_user *duser;

	if (dbox == NULL || dbox->internal)
		return FALSE;
	duser = dbox->duser;
	if (duser->primary || duser->replaying)
		return FALSE;
	mail_storage_set_error(box->storage, MAIL_ERROR_TEMP, t_strdup_printf(
		"[UNAVAILABLE] This server (%s) holds a replica of your "
		"mailboxes, changes are made on server %s",
		duser->set.node, duser->set.primary));
	return TRUE;
}

bool dovetail_fence_unprotected(struct mailbox *box)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);
	struct dovetail_user *duser;
	const char *error;

	if (dbox == NULL || dbox->internal)
		return FALSE;
	duser = dbox->duser;
	if (!duser->set.ack_refuse || !duser->primary ||
	    duser->set.ack == DOVETAIL_ACK_LOCAL || duser->replaying)
		return FALSE;
	if (dovetail_queue_client_check(duser->client, duser->set.ack,
					dovetail_capture_deadline(duser),
					&error) > 0)
		return FALSE;
	dovetail_queue_client_note(duser->client, duser->event,
		t_strdup_printf("New messages are refused "
				"(dovetail_ack_failure=refuse): %s", error));
	mail_storage_set_error(box->storage, MAIL_ERROR_TEMP,
		"[UNAVAILABLE] New messages cannot be replicated now, "
		"try again later");
	return TRUE;
}

/* IMAP's FETCH and POP3 set \Seen on the side, not because the user asked. */
static bool fence_is_reading(struct mail *mail)
{
	const char *service = mail->box->storage->user->service;
	const char *reason = mail->transaction->reason;

	if (strcmp(service, "pop3") == 0)
		return TRUE;
	return strcmp(service, "imap") == 0 && reason != NULL &&
		(str_begins_with(reason, "FETCH") || str_begins_with(reason, "UID FETCH"));
}

static void dovetail_mail_update_flags(struct mail *_mail,
				       enum modify_type modify_type,
				       enum mail_flags flags)
{
	struct mail_private *mail = (struct mail_private *)_mail;
	union mail_module_context *mmail = DOVETAIL_MAIL_CONTEXT(mail);

	if (modify_type == MODIFY_ADD && flags == MAIL_SEEN &&
	    fence_is_reading(_mail))
		return;
	mmail->super.update_flags(_mail, modify_type, flags);
}

void dovetail_fence_mail_allocated(struct mail *_mail)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(_mail->box);
	struct mail_private *mail = (struct mail_private *)_mail;
	struct mail_vfuncs *v = mail->vlast;
	union mail_module_context *mmail;

	if (dbox == NULL || dbox->duser->primary || dbox->duser->replaying)
		return;
	mmail = p_new(mail->pool, union mail_module_context, 1);
	mmail->super = *v;
	mail->vlast = &mmail->super;
	v->update_flags = dovetail_mail_update_flags;
	MODULE_CONTEXT_SET_SELF(mail, dovetail_mail_module, mmail);
}
