/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* Apply what happened to one mailbox. Applying it twice changes nothing: the place
   in the origin's log up to which a replica has come stands in its index, written
   in the same transaction as the change. */

#include "lib.h"
#include "array.h"
#include "guid.h"
#include "istream.h"
#include "seq-range-array.h"
#include "mail-storage-private.h"
#include "mail-index-private.h"
#include "mail-index-modseq.h"
#include "mail-index-transaction-private.h"
#include "index-mail.h"
#include "maildir-storage.h"
#include "maildir-uidlist.h"
#include "mdbox-storage.h"
#include "mailbox-log.h"
#include "mailbox-list-private.h"
#include "index-pop3-uidl.h"
#include "dovetail-compat.h"
#include "dovetail-attribute.h"
#include "dovetail-mailbox-digest.h"
#include "dovetail-name.h"
#include "dovetail-position.h"
#include "dovetail-replay.h"
#include "dovetail-wire.h"

/* How often Dovecot may rebuild the storage meanwhile. */
#define REPLAY_EXPUNGE_TRIES 3

#define REPLAY_FLAGS_MASK \
	(MAIL_ANSWERED | MAIL_FLAGGED | MAIL_DELETED | MAIL_SEEN | MAIL_DRAFT)

struct replay_mailbox_ctx {
	struct replay_user *user;
	const struct dovetail_change_mailbox *change;
	const char *origin;
	uint8_t origin_id[DOVETAIL_ORIGIN_ID_SIZE];
	struct mailbox *box;
	struct dovetail_mailbox_digest *digest;

	/* UIDNEXT here before the change */
	uint32_t uid_next;
	/* messages the change has as new, and which of them are saved by it */
	ARRAY_TYPE(seq_range) appended, saved;
	/* a message is missing here, or is another one than the primary's */
	bool differs;
	/* the change is a snapshot that came too late */
	bool old;
	/* all of the change is in the mailbox now */
	bool applied;
	/* the mailbox is origin's replica, or was when the change came */
	bool ours;
	const char *error;
};

static int replay_box_failed(struct replay_mailbox_ctx *ctx)
{
	ctx->error = t_strdup(mailbox_get_last_internal_error(ctx->box, NULL));
	return -1;
}

/* ---- find or make the mailbox ---- */

bool replay_mailbox_was_deleted(struct replay_user *user, const guid_128_t guid)
{
	struct mail_namespace *ns;
	struct mailbox_log *log;
	struct mailbox_log_iter *iter;
	const struct mailbox_log_record *rec;
	bool found = FALSE;

	ns = replay_user_mail_user(user)->namespaces;
	for (; ns != NULL && !found; ns = ns->next) {
		if (ns->type != MAIL_NAMESPACE_TYPE_PRIVATE)
			continue;
		mailbox_list_get_changelog(ns->list);
		log = ns->list->changelog;
		if (log == NULL)
			continue;
		iter = mailbox_log_iter_init(log);
		while (!found && (rec = mailbox_log_iter_next(iter)) != NULL) {
			found = rec->type == MAILBOX_LOG_RECORD_DELETE_MAILBOX &&
				guid_128_equals(rec->mailbox_guid, guid);
		}
		(void)mailbox_log_iter_deinit(&iter);
	}
	return found;
}

static bool replay_box_is_empty(struct mailbox *box)
{
	struct mailbox_status status;

	return mailbox_get_status(box, STATUS_MESSAGES, &status) == 0 &&
		status.messages == 0;
}

/* A mailbox that was not there before could not be made as it should be. What is
   left would be nobody's: the next to look into it would give it a GUID of its
   own. On a full disk mailbox_delete() fails, as it writes first. */
static void replay_mailbox_unmake(struct mailbox *box)
{
	mailbox_close(box);
	if (box->list->v.delete_mailbox(box->list, box->name) == 0)
		(void)box->list->v.delete_dir(box->list, box->name);
}

int replay_mailbox_create(struct replay_user *user, const char *origin,
			  const guid_128_t guid, const char *path,
			  uint32_t uid_validity, uint32_t uid_next,
			  const char **error_r)
{
	uint8_t origin_id[DOVETAIL_ORIGIN_ID_SIZE];
	struct mail_namespace *ns;
	struct mailbox_update update;
	enum mailbox_existence existence;
	struct mailbox *box;
	enum mail_error mail_error;
	const char *vname;
	bool is_new = FALSE;
	int ret;

	if (dovetail_name_from_path(replay_user_mail_user(user), path, &ns,
				    &vname, error_r) < 0)
		return -1;
	i_zero(&update);
	guid_128_copy(update.mailbox_guid, guid);
	update.uid_validity = uid_validity;
	update.min_next_uid = uid_next;

	box = mailbox_alloc(ns->list, vname, MAILBOX_FLAG_IGNORE_ACLS);
	/* Maildir says that it exists, but makes it ours before */
	ret = mailbox_exists(box, FALSE, &existence);
	if (ret == 0 && existence == MAILBOX_EXISTENCE_SELECT) {
		mail_error = MAIL_ERROR_EXISTS;
		ret = -1;
	} else {
		is_new = ret == 0;
		ret = mailbox_create(box, &update, FALSE) < 0 ? -1 : 1;
		if (ret < 0) {
			*error_r = t_strdup(mailbox_get_last_internal_error(
				box, &mail_error));
			if (mail_error == MAIL_ERROR_EXISTS)
				is_new = FALSE;
		}
	}
	if (ret < 0) {
		if (mail_error == MAIL_ERROR_EXISTS) {
			/* A mailbox that appeared by itself, at a login. */
			if (mailbox_open(box) < 0 ||
			    mailbox_sync(box, MAILBOX_SYNC_FLAG_FULL_READ) < 0)
				;
			else if (!replay_box_is_empty(box))
				ret = 0;
			else if (mailbox_update(box, &update) == 0)
				ret = 1;
			if (ret < 0) {
				*error_r = t_strdup(
					mailbox_get_last_internal_error(box,
									NULL));
			}
		}
	}
	if (ret > 0) {
		/* Before its first change comes, too: when the primary deletes
		   it and that gets lost, the next tree has to know whose it
		   is. */
		dovetail_origin_id(origin, origin_id);
		if (mailbox_open(box) < 0) {
			*error_r = t_strdup(
				mailbox_get_last_internal_error(box, NULL));
			ret = -1;
		} else if (dovetail_position_claim(box, origin_id,
						   error_r) < 0) {
			ret = -1;
		}
	}
	if (ret < 0 && is_new)
		replay_mailbox_unmake(box);
	mailbox_free(&box);
	replay_user_forget_mailboxes(user);
	return ret;
}

/* Returns DONE with ctx->box set, or NULL when the mailbox is gone for good. */
static enum replay_result
replay_mailbox_get(struct replay_mailbox_ctx *ctx, bool wanted)
{
	const struct dovetail_change_mailbox *change = ctx->change;
	int ret;

	ret = replay_user_find_mailbox(ctx->user, change->guid, change->name,
				       &ctx->box, &ctx->error);
	if (ret < 0)
		return REPLAY_FAILED;
	if (ret > 0)
		return REPLAY_DONE;
	/* a change that arrives late must not bring it back */
	if (!wanted && replay_mailbox_was_deleted(ctx->user, change->guid)) {
		ctx->box = NULL;
		return REPLAY_DONE;
	}
	ret = replay_mailbox_create(ctx->user, ctx->origin, change->guid,
				    change->name, change->uid_validity, 0,
				    &ctx->error);
	if (ret > 0) {
		ret = replay_user_find_mailbox(ctx->user, change->guid,
					       change->name, &ctx->box,
					       &ctx->error);
		if (ret == 0)
			ctx->error = "Mailbox is not there after creating it";
		return ret > 0 ? REPLAY_DONE : REPLAY_FAILED;
	}
	if (ret < 0)
		return REPLAY_FAILED;
	ctx->error = "Another mailbox has this name";
	return REPLAY_LACKING;
}

/* ---- bodies ---- */

/* Find the message a COPY refers to. Returns 1, 0 when it is not here, -1. */
static int replay_find_copy_source(struct replay_mailbox_ctx *ctx,
				   const struct dovetail_op_append *append,
				   struct mailbox **box_r, const char **error_r)
{
	struct mailbox_transaction_context *t;
	struct mail *mail;
	uoff_t size;
	int ret;

	ret = replay_user_find_mailbox(ctx->user, append->copy_mailbox_guid,
				       ctx->change->name, box_r, error_r);
	if (ret <= 0)
		return ret;
	if (*box_r != ctx->box && mailbox_sync(*box_r, 0) < 0) {
		*error_r = t_strdup(mailbox_get_last_internal_error(*box_r,
								    NULL));
		return -1;
	}
	t = mailbox_transaction_begin(*box_r, 0, __func__);
	mail = mail_alloc(t, MAIL_FETCH_PHYSICAL_SIZE, NULL);
	ret = mail_set_uid(mail, append->copy_uid) &&
		mail_get_physical_size(mail, &size) == 0 &&
		size == append->size ? 1 : 0;
	mail_free(&mail);
	mailbox_transaction_rollback(&t);
	return ret;
}

/* Is every body here that will have to be saved? */
static enum replay_result replay_check_bodies(struct replay_mailbox_ctx *ctx)
{
	const struct dovetail_op *op;
	struct mailbox *source;
	int ret;

	array_foreach(&ctx->change->ops, op) {
		if (op->type != DOVETAIL_OP_APPEND ||
		    op->append.uid < ctx->uid_next)
			continue;
		switch (op->append.source) {
		case DOVETAIL_BODY_INLINE:
			continue;
		case DOVETAIL_BODY_SPOOL:
			if (replay_spool_get(op->append.spool_id,
					     op->append.size) != NULL)
				continue;
			break;
		case DOVETAIL_BODY_COPY:
			ret = replay_find_copy_source(ctx, &op->append,
						      &source, &ctx->error);
			if (ret < 0)
				return REPLAY_FAILED;
			if (ret > 0)
				continue;
			break;
		}
		ctx->error = t_strdup_printf("The body of UID %u is not here",
					     op->append.uid);
		return REPLAY_LACKING;
	}
	return REPLAY_DONE;
}

/* ---- new messages ---- */

int replay_save_stream(struct mail_save_context *save_ctx,
		       struct istream *input)
{
	ssize_t ret;

	if (mailbox_save_begin(&save_ctx, input) < 0)
		return -1;
	do {
		if (mailbox_save_continue(save_ctx) < 0) {
			mailbox_save_cancel(&save_ctx);
			return -1;
		}
		ret = i_stream_read(input);
	} while (ret > 0 || ret == -2);
	if (input->stream_errno != 0) {
		mail_storage_set_critical(
			save_ctx->transaction->box->storage,
			"read(%s) failed: %s", i_stream_get_name(input),
			i_stream_get_error(input));
		mailbox_save_cancel(&save_ctx);
		return -1;
	}
	return mailbox_save_finish(&save_ctx);
}

/* Copying a message without copying its data ignores the save date. mdbox has it
   in the index, sdbox in the cache; Maildir gets a real copy instead, which keeps
   it. */
void
replay_copied_save_date(struct mailbox_transaction_context *t, time_t save_date)
{
	struct index_mailbox_context *ibox = INDEX_STORAGE_CONTEXT(t->box);
	struct mdbox_mail_index_record rec;
	uint32_t date = save_date, ext_id, seq = t->itrans->last_new_seq;
	const void *data;

	if (strcmp(t->box->storage->name, "mdbox") != 0) {
		mail_cache_add(t->cache_trans, seq,
			       ibox->cache_fields[MAIL_CACHE_SAVE_DATE].idx,
			       &date, sizeof(date));
		return;
	}
	if (!mail_index_ext_lookup(t->box->index, "mdbox", &ext_id))
		return;
	mail_index_lookup_ext(t->view, seq, ext_id, &data, NULL);
	if (data != NULL) {
		memcpy(&rec, data, sizeof(rec));
		rec.save_date = date;
		mail_index_update_ext(t->itrans, seq, ext_id, &rec, NULL);
	}
}

static int replay_save_copy(struct replay_mailbox_ctx *ctx,
			    struct mail_save_context *save_ctx,
			    const struct dovetail_op_append *append)
{
	struct mailbox_transaction_context *t, *dest_t;
	struct mailbox *source;
	struct istream *input;
	struct mail *mail;
	int ret;

	if (replay_find_copy_source(ctx, append, &source, &ctx->error) <= 0) {
		mailbox_save_cancel(&save_ctx);
		return -1;
	}
	t = mailbox_transaction_begin(source, 0, __func__);
	mail = mail_alloc(t, 0, NULL);
	if (!mail_set_uid(mail, append->copy_uid)) {
		mailbox_save_cancel(&save_ctx);
		ret = -1;
	} else if (strcmp(ctx->box->storage->name, "maildir") == 0) {
		if (mail_get_stream(mail, NULL, NULL, &input) == 0)
			ret = replay_save_stream(save_ctx, input);
		else {
			mailbox_save_cancel(&save_ctx);
			ret = -1;
		}
	} else {
		dest_t = save_ctx->transaction;
		ret = mailbox_copy(&save_ctx, mail);
		if (ret == 0)
			replay_copied_save_date(dest_t, append->save_date);
	}
	mail_free(&mail);
	mailbox_transaction_rollback(&t);
	return ret;
}

/* The hash of a message to be saved, whose body input is; input stands at its
   beginning again. Returns 0 or -1. */
static int replay_hash_body(const struct dovetail_op_append *append,
			    struct istream *input,
			    uint8_t hash_r[DOVETAIL_MESSAGE_HASH_SIZE])
{
	struct dovetail_body_hash hash;
	const unsigned char *data;
	guid_128_t guid;
	size_t size;

	dovetail_body_hash_init(&hash);
	while (i_stream_read_more(input, &data, &size) > 0) {
		dovetail_body_hash_more(&hash, data, size);
		i_stream_skip(input, size);
	}
	if (input->stream_errno != 0)
		return -1;
	i_stream_seek(input, 0);
	dovetail_message_guid(append->guid, guid);
	dovetail_body_hash_final(&hash, guid, append->received_date, hash_r);
	return 0;
}

/* The hash of the message a COPY refers to: it is the copy's as well. */
static bool
replay_hash_of_source(struct replay_mailbox_ctx *ctx,
		      const struct dovetail_op_append *append,
		      uint8_t hash_r[DOVETAIL_MESSAGE_HASH_SIZE])
{
	struct mailbox *source;
	const char *error;

	return replay_find_copy_source(ctx, append, &source, &error) > 0 &&
		dovetail_mailbox_digest_get(
			replay_user_mailbox_digest(ctx->user, source),
			append->copy_uid, hash_r);
}

/* uid: 0: whatever the mailbox gives it */
static int replay_save(struct replay_mailbox_ctx *ctx,
		       struct mailbox_transaction_context *t,
		       const struct dovetail_op_append *append, uint32_t uid)
{
	struct mail_save_context *save_ctx;
	struct mail_keywords *keywords;
	struct istream *input;
	uint8_t hash[DOVETAIL_MESSAGE_HASH_SIZE];
	bool have_hash = FALSE;
	int ret;

	save_ctx = mailbox_save_alloc(t);
	keywords = append->keywords[0] == NULL ? NULL :
		mailbox_keywords_create_valid(ctx->box, append->keywords);
	mailbox_save_set_flags(save_ctx, append->flags & REPLAY_FLAGS_MASK,
			       keywords);
	if (keywords != NULL)
		mailbox_keywords_unref(&keywords);
	mailbox_save_set_uid(save_ctx, uid);
	mailbox_save_set_guid(save_ctx, append->guid);
	mailbox_save_set_received_date(save_ctx, append->received_date, 0);
	mailbox_save_set_save_date(save_ctx, append->save_date);
	mailbox_save_set_min_modseq(save_ctx, ctx->change->highest_modseq);
	if (append->pop3_uidl[0] != '\0') {
		mailbox_save_set_pop3_uidl(save_ctx, append->pop3_uidl);
		/* sdbox compares the UID with a sequence and would hide it */
		index_pop3_uidl_set_max_uid(ctx->box, t->itrans, uid);
	}
	if (append->pop3_order > 0)
		mailbox_save_set_pop3_order(save_ctx, append->pop3_order);

	switch (append->source) {
	case DOVETAIL_BODY_COPY:
		have_hash = replay_hash_of_source(ctx, append, hash);
		ret = replay_save_copy(ctx, save_ctx, append);
		break;
	case DOVETAIL_BODY_SPOOL:
		input = replay_spool_get(append->spool_id, append->size);
		if (input == NULL) {
			mailbox_save_cancel(&save_ctx);
			ctx->error = "A body went away while it was saved";
			return -1;
		}
		have_hash = replay_hash_body(append, input, hash) == 0;
		ret = replay_save_stream(save_ctx, input);
		break;
	default:
		input = i_stream_create_from_data(append->body, append->size);
		have_hash = replay_hash_body(append, input, hash) == 0;
		ret = replay_save_stream(save_ctx, input);
		i_stream_unref(&input);
	}
	if (ret == 0 && have_hash) {
		dovetail_mailbox_digest_update(ctx->box, t->itrans,
					       t->itrans->last_new_seq,
					       append->flags, append->keywords,
					       hash);
	}
	if (ret < 0 && ctx->error == NULL) {
		ctx->error = t_strdup_printf("Cannot save UID %u: %s",
			append->uid,
			mailbox_get_last_internal_error(ctx->box, NULL));
	}
	return ret;
}

int replay_mailbox_save(struct replay_user *user,
			struct mailbox_transaction_context *t,
			const struct dovetail_change_mailbox *change,
			const struct dovetail_op_append *append, uint32_t uid,
			const char **error_r)
{
	struct replay_mailbox_ctx ctx = {
		.user = user,
		.change = change,
		.box = t->box,
	};

	if (replay_save(&ctx, t, append, uid) < 0) {
		*error_r = ctx.error;
		return -1;
	}
	return 0;
}

/* Save the messages that are new here. with_position: nothing else follows. */
static int replay_save_all(struct replay_mailbox_ctx *ctx, bool with_position)
{
	struct mailbox_transaction_context *t;
	struct mail_transaction_commit_changes changes;
	const struct dovetail_op *op;
	int ret = 0;

	t = mailbox_transaction_begin(ctx->box, REPLAY_SAVE_FLAGS, __func__);
	array_foreach(&ctx->change->ops, op) {
		if (op->type != DOVETAIL_OP_APPEND ||
		    op->append.uid < ctx->uid_next)
			continue;
		T_BEGIN {
			ret = replay_save(ctx, t, &op->append, op->append.uid);
			ctx->error = ret < 0 ? i_strdup(ctx->error) : NULL;
		} T_END;
		if (ret < 0) {
			char *error = (char *)ctx->error;

			ctx->error = t_strdup(error);
			i_free(error);
			break;
		}
		seq_range_array_add(&ctx->saved, op->append.uid);
	}
	if (ret < 0) {
		mailbox_transaction_rollback(&t);
		return -1;
	}
	if (with_position) {
		dovetail_position_update_applied(ctx->box->index, t->itrans,
						 &ctx->change->to,
						 ctx->origin_id);
	}
	if (mailbox_transaction_commit_get_changes(&t, &changes) < 0) {
		ctx->error = t_strdup(mailbox_get_last_internal_error(ctx->box,
								      NULL));
		return -1;
	}
	/* Dovecot gives another UID, without an error, when the wanted one was
	   taken meanwhile. */
	if (!array_cmp(&changes.saved_uids, &ctx->saved)) {
		ctx->error = "Saved messages got other UIDs than the primary's";
		ret = -1;
	}
	pool_unref(&changes.pool);

	array_foreach(&ctx->change->ops, op) {
		if (op->type == DOVETAIL_OP_APPEND &&
		    op->append.source == DOVETAIL_BODY_SPOOL)
			replay_spool_drop(op->append.spool_id);
	}
	return ret;
}

/* ---- flags, keywords, expunges ---- */

/* Call func for each message of uids that is here. skip: uids that carry their
   final state already. */
static void
replay_foreach(struct mail *mail, const ARRAY_TYPE(seq_range) *uids,
	       const ARRAY_TYPE(seq_range) *skip,
	       void (*func)(struct mail *mail, void *context), void *context)
{
	struct mail_index_view *view = mail->transaction->view;
	const struct seq_range *range;
	uint32_t seq, seq1, seq2;

	array_foreach(uids, range) {
		if (!mail_index_lookup_seq_range(view, range->seq1,
						 range->seq2, &seq1, &seq2))
			continue;
		for (seq = seq1; seq <= seq2; seq++) {
			mail_set_seq(mail, seq);
			if (skip == NULL || !seq_range_exists(skip, mail->uid))
				func(mail, context);
		}
	}
}

static void replay_op_flags(struct mail *mail, void *context)
{
	const struct dovetail_op *op = context;

	if ((op->remove_flags & REPLAY_FLAGS_MASK) != 0) {
		mail_update_flags(mail, MODIFY_REMOVE,
				  op->remove_flags & REPLAY_FLAGS_MASK);
	}
	if ((op->add_flags & REPLAY_FLAGS_MASK) != 0) {
		mail_update_flags(mail, MODIFY_ADD,
				  op->add_flags & REPLAY_FLAGS_MASK);
	}
}

/* What all ops of a change together do to one keyword. Dovecot compares an update of
   keywords with the index, not with what the same transaction did before, and
   drops it when it changes nothing there: so each message gets the last word
   only. */
struct replay_keyword {
	const char *name;
	ARRAY_TYPE(seq_range) add, remove;
};
ARRAY_DEFINE_TYPE(replay_keyword, struct replay_keyword);

struct replay_keyword_update {
	enum modify_type type;
	struct mail_keywords *keywords;
};

static void replay_op_keyword(struct mail *mail, void *context)
{
	struct replay_keyword_update *update = context;

	mail_update_keywords(mail, update->type, update->keywords);
}

static void replay_op_expunge(struct mail *mail, void *context ATTR_UNUSED)
{
	mail_expunge(mail);
}

static struct replay_keyword *
replay_keyword_get(ARRAY_TYPE(replay_keyword) *keywords, const char *name)
{
	struct replay_keyword *keyword;

	array_foreach_modifiable(keywords, keyword) {
		if (strcasecmp(keyword->name, name) == 0)
			return keyword;
	}
	keyword = array_append_space(keywords);
	keyword->name = name;
	t_array_init(&keyword->add, 8);
	t_array_init(&keyword->remove, 8);
	return keyword;
}

static void replay_keyword_collect(struct replay_mailbox_ctx *ctx,
				   ARRAY_TYPE(replay_keyword) *keywords,
				   const struct dovetail_op *op)
{
	struct replay_keyword *keyword;
	const char *name;

	switch (op->type) {
	case DOVETAIL_OP_KEYWORD_ADD:
		keyword = replay_keyword_get(keywords, op->keyword);
		seq_range_array_merge(&keyword->add, &op->uids);
		seq_range_array_remove_seq_range(&keyword->remove, &op->uids);
		break;
	case DOVETAIL_OP_KEYWORD_REMOVE:
		keyword = replay_keyword_get(keywords, op->keyword);
		seq_range_array_merge(&keyword->remove, &op->uids);
		seq_range_array_remove_seq_range(&keyword->add, &op->uids);
		break;
	case DOVETAIL_OP_KEYWORD_RESET:
		array_foreach_elem(mail_index_get_keywords(ctx->box->index),
				   name)
			(void)replay_keyword_get(keywords, name);
		array_foreach_modifiable(keywords, keyword) {
			seq_range_array_merge(&keyword->remove, &op->uids);
			seq_range_array_remove_seq_range(&keyword->add,
							 &op->uids);
		}
		break;
	default:
		break;
	}
}

static void replay_keyword_update(struct replay_mailbox_ctx *ctx,
				  struct mail *mail,
				  const struct replay_keyword *keyword,
				  enum modify_type type,
				  const ARRAY_TYPE(seq_range) *uids)
{
	const char *names[] = { keyword->name, NULL };
	struct replay_keyword_update update = { .type = type };

	update.keywords = mailbox_keywords_create_valid(ctx->box, names);
	replay_foreach(mail, uids, &ctx->appended, replay_op_keyword, &update);
	mailbox_keywords_unref(&update.keywords);
}

static void replay_set_state(struct mailbox *box, struct mail *mail,
			     enum mail_flags flags, const char *const *names)
{
	struct mail_keywords *keywords;
	const char *const *have = mail_get_keywords(mail);
	unsigned int i;
	bool equal;

	flags &= REPLAY_FLAGS_MASK;
	if ((mail_get_flags(mail) & REPLAY_FLAGS_MASK) != flags)
		mail_update_flags(mail, MODIFY_REPLACE, flags);

	equal = str_array_length(have) == str_array_length(names);
	for (i = 0; equal && names[i] != NULL; i++)
		equal = str_array_find(have, names[i]);
	if (!equal) {
		keywords = mailbox_keywords_create_valid(box, names);
		mail_update_keywords(mail, MODIFY_REPLACE, keywords);
		mailbox_keywords_unref(&keywords);
	}
}

void replay_mail_set_state(struct mailbox *box, struct mail *mail,
			   uint8_t flags, const char *const *keywords,
			   uint64_t modseq)
{
	replay_set_state(box, mail, flags, keywords);
	if (mail_get_modseq(mail) < modseq)
		mail_update_modseq(mail, modseq);
}

/* What MODSEQ the primary shows for a message is not in its state, but it is not
   more than HIGHESTMODSEQ. */
static void replay_raise_mail_modseq(struct replay_mailbox_ctx *ctx,
				     struct mail *mail)
{
	if (mail_get_modseq(mail) < ctx->change->highest_modseq)
		mail_update_modseq(mail, ctx->change->highest_modseq);
}

/* Is the message here the one the primary has under this UID? */
static bool replay_is_same(struct replay_mailbox_ctx *ctx, struct mail *mail,
			   const struct dovetail_op_append *append)
{
	guid_128_t here, there;
	const char *guid;

	if (mail_get_special(mail, MAIL_FETCH_GUID, &guid) < 0 ||
	    guid[0] == '\0')
		return TRUE;
	dovetail_message_guid(guid, here);
	dovetail_message_guid(append->guid, there);
	if (guid_128_equals(here, there))
		return TRUE;
	e_warning(replay.event, "User %s mailbox %s: UID %u is another message "
		"here than on %s",
		replay_user_mail_user(ctx->user)->username, ctx->box->vname,
		append->uid, ctx->origin);
	ctx->differs = TRUE;
	return FALSE;
}

/* Messages that were here already, but come as new: a repeated change. */
static void replay_appended_again(struct replay_mailbox_ctx *ctx,
				  struct mail *mail)
{
	const struct dovetail_op *op;

	array_foreach(&ctx->change->ops, op) {
		if (op->type == DOVETAIL_OP_APPEND &&
		    !seq_range_exists(&ctx->saved, op->append.uid) &&
		    mail_set_uid(mail, op->append.uid)) {
			if (!replay_is_same(ctx, mail, &op->append))
				continue;
			replay_set_state(ctx->box, mail, op->append.flags,
					 op->append.keywords);
			if (ctx->change->flags != 0)
				replay_raise_mail_modseq(ctx, mail);
		}
	}
}

static void replay_op_modseq(struct mail *mail, void *context)
{
	replay_raise_mail_modseq(context, mail);
}

static void replay_update_delta(struct replay_mailbox_ctx *ctx,
				struct mail *mail)
{
	ARRAY_TYPE(replay_keyword) keywords;
	ARRAY_TYPE(seq_range) touched;
	const struct replay_keyword *keyword;
	const struct dovetail_op *op;
	unsigned int updates = 0;

	t_array_init(&keywords, 8);
	t_array_init(&touched, 32);
	array_foreach(&ctx->change->ops, op) {
		switch (op->type) {
		case DOVETAIL_OP_FLAGS:
			replay_foreach(mail, &op->uids, &ctx->appended,
				       replay_op_flags, (void *)op);
			break;
		case DOVETAIL_OP_KEYWORD_ADD:
		case DOVETAIL_OP_KEYWORD_REMOVE:
		case DOVETAIL_OP_KEYWORD_RESET:
			replay_keyword_collect(ctx, &keywords, op);
			break;
		case DOVETAIL_OP_EXPUNGE:
			replay_foreach(mail, &op->uids, NULL,
				       replay_op_expunge, NULL);
			replay_compare_expunged(
				replay_user_mail_user(ctx->user)->username,
				ctx->change->guid, &op->uids);
			continue;
		default:
			/* attributes are set already */
			continue;
		}
		updates++;
		seq_range_array_merge(&touched, &op->uids);
	}
	array_foreach(&keywords, keyword) {
		replay_keyword_update(ctx, mail, keyword, MODIFY_ADD,
				      &keyword->add);
		replay_keyword_update(ctx, mail, keyword, MODIFY_REMOVE,
				      &keyword->remove);
	}
	/* Updates that undo each other leave nothing here, but raised the
	   message's MODSEQ at the primary. */
	if (updates > 1) {
		replay_foreach(mail, &touched, &ctx->appended,
			       replay_op_modseq, ctx);
	}
}

struct replay_snapshot {
	struct replay_mailbox_ctx *ctx;
	ARRAY_TYPE(seq_range) exists;
};

static void replay_snapshot_message(struct replay_snapshot *snapshot,
				    struct mail *mail)
{
	const struct dovetail_op *op;
	enum mail_flags flags = 0;
	ARRAY_TYPE(const_string) keywords;

	t_array_init(&keywords, 8);
	array_foreach(&snapshot->ctx->change->ops, op) {
		if (op->type == DOVETAIL_OP_APPEND ||
		    op->type == DOVETAIL_OP_ATTRIBUTE ||
		    !seq_range_exists(&op->uids, mail->uid))
			continue;
		if (op->type == DOVETAIL_OP_FLAGS)
			flags = op->add_flags;
		else if (op->type == DOVETAIL_OP_KEYWORD_ADD)
			array_push_back(&keywords, &op->keyword);
	}
	array_append_zero(&keywords);
	replay_set_state(snapshot->ctx->box, mail, flags,
			 array_front(&keywords));
	replay_raise_mail_modseq(snapshot->ctx, mail);
}

/* Expunge messages that are not in the snapshot. Those that came from the primary
   were expunged there; others, which it never had, are kept. */
static void replay_snapshot_expunge(struct replay_mailbox_ctx *ctx,
				    const ARRAY_TYPE(seq_range) *uids,
				    const ARRAY_TYPE(seq_range) *strange,
				    struct mail *mail)
{
	const char *username = replay_user_mail_user(ctx->user)->username;
	struct seq_range_iter iter;
	const char *error;
	unsigned int n = 0;
	uint32_t uid;

	if (array_count(strange) > 0) {
		if (replay.set.repair_extra == DOVETAIL_REPAIR_EXTRA_REPORT) {
			/* the comparison reports them */
			ctx->differs = TRUE;
		} else if (replay_keep(ctx->box, strange, &error) < 0) {
			e_error(replay.event, "User %s mailbox %s: Messages "
				"that only this node has stay: %s", username,
				ctx->box->vname, error);
			ctx->differs = TRUE;
		} else {
			replay_foreach(mail, strange, NULL, replay_op_expunge,
				       NULL);
		}
	}
	seq_range_array_iter_init(&iter, uids);
	while (seq_range_array_iter_nth(&iter, n++, &uid)) {
		e_info(replay.event, "User %s mailbox %s: UID %u is no longer "
		       "at the primary, expunging it", username,
		       ctx->box->vname, uid);
		if (mail_set_uid(mail, uid))
			mail_expunge(mail);
	}
}

/* Make the messages below the snapshot's end what the primary's are. */
static void replay_update_snapshot(struct replay_mailbox_ctx *ctx,
				   const ARRAY_TYPE(seq_range) *exists,
				   struct mail *mail)
{
	struct replay_snapshot snapshot = { .ctx = ctx };
	ARRAY_TYPE(seq_range) gone, strange;
	uint8_t hash[DOVETAIL_MESSAGE_HASH_SIZE];
	uint32_t seq, count, end, missing = seq_range_count(exists);
	bool comparing;

	/* with MORE, nothing is known of what comes behind the last UID */
	end = ctx->change->uid_next;
	if ((ctx->change->flags & DOVETAIL_MAILBOX_MORE) != 0) {
		const struct seq_range *last;

		end = 1;
		if (array_count(exists) > 0) {
			last = array_back(exists);
			end = last->seq2 + 1;
		}
		if (array_count(&ctx->appended) > 0) {
			last = array_back(&ctx->appended);
			end = I_MAX(end, last->seq2 + 1);
		}
	}
	t_array_init(&gone, 16);
	t_array_init(&strange, 16);
	/* it gives every message a hash */
	comparing = replay_compare_is_running(
		replay_user_mail_user(ctx->user)->username, ctx->change->guid);
	count = mail_index_view_get_messages_count(mail->transaction->view);
	for (seq = 1; seq <= count; seq++) {
		mail_set_seq(mail, seq);
		if (mail->uid >= end)
			break;
		if (seq_range_exists(&ctx->appended, mail->uid))
			continue;
		if (!seq_range_exists(exists, mail->uid)) {
			/* what came from the primary has got a hash */
			seq_range_array_add(comparing ||
				!dovetail_mailbox_digest_get(ctx->digest,
							     mail->uid, hash) ?
				&strange : &gone, mail->uid);
		} else T_BEGIN {
			missing--;
			replay_snapshot_message(&snapshot, mail);
		} T_END;
	}
	replay_snapshot_expunge(ctx, &gone, &strange, mail);
	if (missing > 0) {
		e_warning(replay.event, "User %s mailbox %s: %u of the "
			"messages on %s are missing here",
			replay_user_mail_user(ctx->user)->username,
			ctx->box->vname, missing, ctx->origin);
		ctx->differs = TRUE;
	}
}

/* ---- attributes ---- */

static int
replay_attribute_set(struct mailbox_transaction_context *t,
		     const struct dovetail_attribute *attribute)
{
	struct mail_attribute_value value = { .value = attribute->value };

	return t->box->v.attribute_set(t, attribute->shared ?
				       MAIL_ATTRIBUTE_TYPE_SHARED :
				       MAIL_ATTRIBUTE_TYPE_PRIVATE,
				       attribute->key, &value);
}

/* What has to be set to make here what is in there: both ascending. */
static void
replay_attributes_differences(const ARRAY_TYPE(dovetail_attribute) *here,
			      const ARRAY_TYPE(dovetail_attribute) *there,
			      ARRAY_TYPE(dovetail_attribute) *differences)
{
	const struct dovetail_attribute *h, *t;
	struct dovetail_attribute gone;
	unsigned int i = 0, j = 0;
	int cmp;

	while (i < array_count(here) || j < array_count(there)) {
		h = i < array_count(here) ? array_idx(here, i) : NULL;
		t = j < array_count(there) ? array_idx(there, j) : NULL;
		cmp = h == NULL ? 1 : t == NULL ? -1 :
			dovetail_attribute_cmp(h, t);
		if (cmp < 0) {
			gone = *h;
			gone.value = NULL;
			array_push_back(differences, &gone);
		} else if (cmp > 0 || strcmp(h->value, t->value) != 0) {
			array_push_back(differences, t);
		}
		if (cmp <= 0)
			i++;
		if (cmp >= 0)
			j++;
	}
}

int replay_attributes_compare(struct mailbox *box,
			      const ARRAY_TYPE(dovetail_attribute) *there,
			      ARRAY_TYPE(dovetail_attribute) *differences,
			      const char **error_r)
{
	ARRAY_TYPE(dovetail_attribute) here;
	int ret;

	t_array_init(&here, 16);
	ret = dovetail_attributes_get(box, &box->v, &here, error_r);
	if (ret == 0 && array_count(there) == 0)
		return 1;
	if (ret > 0)
		replay_attributes_differences(&here, there, differences);
	return ret;
}

int replay_attributes_set(struct mailbox *box,
			  const ARRAY_TYPE(dovetail_attribute) *attributes,
			  const char **error_r)
{
	struct mailbox_transaction_context *t;
	const struct dovetail_attribute *attribute;
	struct dovetail_attribute any = { .key = "comment" };
	int ret;

	if ((ret = dovetail_attribute_get(box, &box->v, &any, error_r)) <= 0)
		return ret;
	t = mailbox_transaction_begin(box, REPLAY_UPDATE_FLAGS, __func__);
	ret = 0;
	array_foreach(attributes, attribute) {
		if (dovetail_attribute_travels(attribute) &&
		    (ret = replay_attribute_set(t, attribute)) < 0)
			break;
	}
	if (ret < 0) {
		*error_r = t_strdup(mailbox_get_last_internal_error(box, NULL));
		mailbox_transaction_rollback(&t);
		return -1;
	}
	if (mailbox_transaction_commit(&t) < 0) {
		*error_r = t_strdup(mailbox_get_last_internal_error(box, NULL));
		return -1;
	}
	return 1;
}

/* Before the position moves. What cannot be set does not hold up mail: it is
   compared, and set then. */
static void replay_update_attributes(struct replay_mailbox_ctx *ctx)
{
	static bool warned = FALSE;
	bool all = (ctx->change->flags & DOVETAIL_MAILBOX_ATTRIBUTES) != 0;
	ARRAY_TYPE(dovetail_attribute) attributes, differences;
	const struct dovetail_op *op;
	const char *error;
	int ret = 1;

	t_array_init(&attributes, 8);
	t_array_init(&differences, 8);
	array_foreach(&ctx->change->ops, op) {
		if (op->type == DOVETAIL_OP_ATTRIBUTE &&
		    (!all || op->attribute.value != NULL))
			array_push_back(&attributes, &op->attribute);
	}
	if (all) {
		ret = replay_attributes_compare(ctx->box, &attributes,
						&differences, &error);
	}
	if (ret > 0 && array_count(all ? &differences : &attributes) > 0) {
		ret = replay_attributes_set(ctx->box, all ? &differences :
					    &attributes, &error);
	}
	if (ret > 0)
		return;
	if (ret < 0) {
		e_warning(replay.event, "User %s mailbox %s: Cannot set "
			"attributes: %s",
			replay_user_mail_user(ctx->user)->username,
			ctx->box->vname, error);
		ctx->differs = TRUE;
	} else if (!warned) {
		warned = TRUE;
		e_warning(replay.event, "User %s mailbox %s: Attributes "
			"(METADATA) of %s are not kept here: %s",
			replay_user_mail_user(ctx->user)->username,
			ctx->box->vname, ctx->origin, error);
	}
}

/* ---- the update ---- */

static int replay_update_all(struct replay_mailbox_ctx *ctx,
			     const ARRAY_TYPE(seq_range) *exists)
{
	struct mailbox_transaction_context *t;
	struct mail *mail;

	T_BEGIN {
		replay_update_attributes(ctx);
	} T_END;
	t = mailbox_transaction_begin(ctx->box, REPLAY_UPDATE_FLAGS, __func__);
	mail = mail_alloc(t, MAIL_FETCH_FLAGS, NULL);
	replay_appended_again(ctx, mail);
	if (exists != NULL)
		replay_update_snapshot(ctx, exists, mail);
	else {
		/* A change may add a keyword and take it away again. With this
		   flag Dovecot leaves out the second, comparing with the
		   index, which does not have the first yet. */
		t->itrans->flags &=
			~MAIL_INDEX_TRANSACTION_FLAG_AVOID_FLAG_UPDATES;
		replay_update_delta(ctx, mail);
	}
	mail_free(&mail);
	if ((ctx->change->flags & DOVETAIL_MAILBOX_MORE) == 0) {
		dovetail_position_update_applied(ctx->box->index, t->itrans,
						 &ctx->change->to,
						 ctx->origin_id);
	}
	if (mailbox_transaction_commit(&t) < 0) {
		ctx->error = t_strdup(mailbox_get_last_internal_error(ctx->box,
								      NULL));
		return -1;
	}
	return 0;
}

static int replay_raise_uid_next(struct replay_mailbox_ctx *ctx)
{
	struct mailbox_update update;
	struct mailbox_status status;

	if (ctx->change->uid_next == 0 ||
	    (ctx->change->flags & DOVETAIL_MAILBOX_MORE) != 0)
		return 0;
	mailbox_get_open_status(ctx->box, STATUS_UIDNEXT, &status);
	if (status.uidnext >= ctx->change->uid_next)
		return 0;
	i_zero(&update);
	update.min_next_uid = ctx->change->uid_next;
	if (mailbox_update(ctx->box, &update) < 0) {
		ctx->error = t_strdup(mailbox_get_last_internal_error(ctx->box,
								      NULL));
		return -1;
	}
	return 0;
}

/* ---- all together ---- */

/* Have MODSEQs tracked per message. An index that was reset while it was open, for
   another UIDVALIDITY, has forgotten that they were, and only it. */
static int replay_enable_modseqs(struct replay_mailbox_ctx *ctx)
{
	struct mail_index *index = ctx->box->index;
	struct mail_index_modseq_header hdr;
	struct mail_index_view *view;
	struct mail_index_transaction *trans;
	int ret;

	if (mailbox_enable(ctx->box, MAILBOX_FEATURE_CONDSTORE) < 0) {
		ctx->error = t_strdup(mailbox_get_last_internal_error(ctx->box,
								      NULL));
		return -1;
	}
	if (mail_index_have_modseq_tracking(index))
		return 0;
	view = mail_index_view_open(index);
	trans = mail_index_transaction_begin(view, 0);
	i_zero(&hdr);
	hdr.highest_modseq = mail_index_modseq_get_highest(view);
	mail_index_update_header_ext(trans, index->modseq_ext_id, 0,
				     &hdr, sizeof(hdr));
	ret = mail_index_transaction_commit(&trans);
	mail_index_view_close(&view);
	if (ret < 0) {
		ctx->error = dovetail_index_error(index);
		return -1;
	}
	(void)mail_index_refresh(index);
	return 0;
}

/* Raise HIGHESTMODSEQ to the origin's: what follows gets more than that. */
static int replay_raise_modseq(struct replay_mailbox_ctx *ctx)
{
	struct mail_index_view *view = mail_index_view_open(ctx->box->index);
	struct mail_index_transaction *trans;
	int ret = 0;

	if (mail_index_modseq_get_highest(view) < ctx->change->highest_modseq) {
		trans = mail_index_transaction_begin(view,
			MAIL_INDEX_TRANSACTION_FLAG_EXTERNAL);
		mail_index_update_highest_modseq(trans,
			ctx->change->highest_modseq);
		ret = mail_index_transaction_commit(&trans);
		if (ret < 0)
			ctx->error = dovetail_index_error(ctx->box->index);
	}
	mail_index_view_close(&view);
	return ret;
}

/* Somebody died between writing dovecot-uidlist and the index. Dovecot takes the
   directory for synced, and its next message would get another UID. */
static bool replay_maildir_lacks(struct mailbox *box)
{
	struct maildir_mailbox *maildir;
	struct mailbox_status status;

	if (strcmp(box->storage->name, MAILDIR_STORAGE_NAME) != 0)
		return FALSE;
	maildir = MAILDIR_MAILBOX(box);
	mailbox_get_open_status(box, STATUS_UIDNEXT, &status);
	return maildir_uidlist_refresh(maildir->uidlist) >= 0 &&
		maildir_uidlist_get_next_uid(maildir->uidlist) > status.uidnext;
}

static int replay_mailbox_open(struct replay_mailbox_ctx *ctx)
{
	struct mailbox_status status;
	struct mailbox_update update;

	if (mailbox_sync(ctx->box, 0) < 0 ||
	    (replay_maildir_lacks(ctx->box) &&
	     mailbox_sync(ctx->box, MAILBOX_SYNC_FLAG_FULL_READ |
			  MAILBOX_SYNC_FLAG_FORCE_RESYNC) < 0)) {
		ctx->error = t_strdup(mailbox_get_last_internal_error(ctx->box,
								      NULL));
		return -1;
	}
	mailbox_get_open_status(ctx->box, STATUS_UIDVALIDITY | STATUS_UIDNEXT |
				STATUS_MESSAGES, &status);
	if (status.uidvalidity != ctx->change->uid_validity) {
		if (status.messages > 0) {
			ctx->error = t_strdup_printf("UIDVALIDITY is %u here "
				"and %u at the primary", status.uidvalidity,
				ctx->change->uid_validity);
			return -1;
		}
		i_zero(&update);
		update.uid_validity = ctx->change->uid_validity;
		if (mailbox_update(ctx->box, &update) < 0 ||
		    mailbox_sync(ctx->box, 0) < 0) {
			ctx->error = t_strdup(
				mailbox_get_last_internal_error(ctx->box,
								NULL));
			return -1;
		}
		mailbox_get_open_status(ctx->box, STATUS_UIDNEXT, &status);
	}
	ctx->uid_next = status.uidnext;
	return replay_enable_modseqs(ctx) < 0 ||
		replay_raise_modseq(ctx) < 0 ? -1 : 0;
}

static void replay_collect(struct replay_mailbox_ctx *ctx, bool *updates_r,
			   const ARRAY_TYPE(seq_range) **exists_r)
{
	const struct dovetail_op *op;

	*updates_r = FALSE;
	*exists_r = NULL;
	array_foreach(&ctx->change->ops, op) {
		if (op->type == DOVETAIL_OP_APPEND) {
			seq_range_array_add(&ctx->appended, op->append.uid);
			if (op->append.uid < ctx->uid_next)
				*updates_r = TRUE;
			continue;
		}
		if (op->type == DOVETAIL_OP_EXISTS)
			*exists_r = &op->uids;
		if (op->type == DOVETAIL_OP_EXPUNGE ||
		    op->type == DOVETAIL_OP_EXISTS ||
		    op->type == DOVETAIL_OP_ATTRIBUTE)
			*updates_r = TRUE;
		else {
			/* flags of messages that come with theirs */
			ARRAY_TYPE(seq_range) uids;

			t_array_init(&uids, 8);
			array_append_array(&uids, &op->uids);
			seq_range_array_remove_seq_range(&uids, &ctx->appended);
			if (array_count(&uids) > 0)
				*updates_r = TRUE;
		}
	}
}

/* A snapshot counts on messages being here that are not: find the first. */
static bool replay_snapshot_lacks(struct replay_mailbox_ctx *ctx,
				  const ARRAY_TYPE(seq_range) *exists)
{
	const struct seq_range *last;

	if (exists == NULL || array_count(exists) == 0)
		return FALSE;
	last = array_back(exists);
	return last->seq2 >= ctx->uid_next;
}

int replay_digest_compare(struct dovetail_mailbox_digest *md, bool afresh,
			  const struct dovetail_digest *there,
			  struct dovetail_digest *here_r)
{
	if (!afresh) {
		if (!dovetail_mailbox_digest_now(md, here_r))
			return -1;
		if (dovetail_digest_equals(here_r, there))
			return 1;
	}
	/* before we say so: not what was followed, but what there is */
	if (!dovetail_mailbox_digest_recompute(md, NULL, there->key, here_r))
		return -1;
	return dovetail_digest_equals(here_r, there) ? 1 : 0;
}

/* Is the mailbox now what it is at the primary? */
static void replay_compare_digest(struct replay_mailbox_ctx *ctx)
{
	const struct dovetail_change_mailbox *change = ctx->change;
	const char *username = replay_user_mail_user(ctx->user)->username;
	struct dovetail_digest here;
	int ret;

	if (ctx->differs) {
		replay_compare_start(username, ctx->origin, change->guid,
				     change->name, DOVETAIL_VERIFY_REPAIR, 0);
		return;
	}
	if ((change->flags & DOVETAIL_MAILBOX_DIGEST) == 0)
		return;
	ret = replay_digest_compare(ctx->digest, FALSE, &change->digest, &here);
	if (ret > 0) {
		replay_trouble_clear(username, change->guid);
		return;
	}
	if (ret == 0) {
		replay_trouble_set(username, ctx->origin, change->guid,
				   change->name, DOVETAIL_HEALTH_DIFFERING,
				   "");
		/* or the digest does: the comparison tells */
		e_debug(replay.event, "User %s mailbox %s: Digest differs from "
			"%s's (%u messages here, %u there)", username,
			ctx->box->vname, ctx->origin, here.count,
			change->digest.count);
	}
	replay_compare_start(username, ctx->origin, change->guid, change->name,
			     DOVETAIL_VERIFY_REPAIR, 0);
}

static void replay_find_expunged(const struct dovetail_change_mailbox *change,
				 ARRAY_TYPE(seq_range) *uids)
{
	const struct dovetail_op *op;

	if ((change->flags & DOVETAIL_MAILBOX_SNAPSHOT) != 0)
		return;
	array_foreach(&change->ops, op) {
		if (op->type == DOVETAIL_OP_EXPUNGE)
			seq_range_array_merge(uids, &op->uids);
	}
}

static bool replay_has_any(struct mailbox *box,
			   const ARRAY_TYPE(seq_range) *uids)
{
	const struct seq_range *range;
	uint32_t seq1, seq2;

	array_foreach(uids, range) {
		if (mail_index_lookup_seq_range(box->view, range->seq1,
						range->seq2, &seq1, &seq2))
			return TRUE;
	}
	return FALSE;
}

static bool replay_is_ours(struct replay_mailbox_ctx *ctx)
{
	struct dovetail_position pos;

	if (dovetail_position_get(ctx->box, &pos) &&
	    memcmp(pos.origin, ctx->origin_id, sizeof(pos.origin)) == 0)
		ctx->ours = TRUE;
	return ctx->ours;
}

/* Returns 1: done.  0: the mailbox is not here, or not ctx->origin's replica, or
   another one than the change is about.  -1: failed, ctx->error. */
static int replay_expunge_uids(struct replay_mailbox_ctx *ctx,
			       const ARRAY_TYPE(seq_range) *uids)
{
	const struct dovetail_change_mailbox *change = ctx->change;
	struct mailbox_transaction_context *t;
	struct mailbox_status status;
	struct mail *mail;
	int ret;

	ctx->box = NULL;
	ret = replay_user_find_mailbox(ctx->user, change->guid, change->name,
				       &ctx->box, &ctx->error);
	if (ret <= 0)
		return ret;
	if (!replay_is_ours(ctx))
		return 0;
	if (mailbox_sync(ctx->box, 0) < 0)
		return replay_box_failed(ctx);
	mailbox_get_open_status(ctx->box, STATUS_UIDVALIDITY, &status);
	if (status.uidvalidity != change->uid_validity)
		return 0;
	if (!replay_has_any(ctx->box, uids))
		return 1;
	t = mailbox_transaction_begin(ctx->box, REPLAY_UPDATE_FLAGS, __func__);
	mail = mail_alloc(t, 0, NULL);
	replay_foreach(mail, uids, NULL, replay_op_expunge, NULL);
	mail_free(&mail);
	if (mailbox_transaction_commit(&t) < 0 ||
	    mailbox_sync(ctx->box, 0) < 0)
		return replay_box_failed(ctx);
	if (replay_has_any(ctx->box, uids)) {
		ctx->error = "Expunged messages came back";
		return -1;
	}
	return 1;
}

/* A change was not applied: because it was already, because changes before it are
   missing, or because that failed. What the primary has expunged goes nevertheless,
   if the mailbox is the primary's replica: nothing else tells later that the
   messages came from there. When a process dies while mdbox expunges, Dovecot
   brings the message back, and forgets that it was to be expunged; that happens
   in a sync, which then fails, as the index is another one. (The change comes again
   as long as this was not done.) Returns 0 or -1. */
static int replay_expunge_anyway(struct replay_mailbox_ctx *ctx)
{
	const char *error = ctx->error;
	ARRAY_TYPE(seq_range) uids;
	unsigned int i;
	int ret = -1;

	t_array_init(&uids, 8);
	replay_find_expunged(ctx->change, &uids);
	if (array_count(&uids) == 0)
		return 0;
	replay_compare_expunged(replay_user_mail_user(ctx->user)->username,
				ctx->change->guid, &uids);
	for (i = 0; i < REPLAY_EXPUNGE_TRIES && ret < 0; i++) {
		if (i > 0)
			replay_user_forget_mailboxes(ctx->user);
		ret = replay_expunge_uids(ctx, &uids);
	}
	if (ret < 0)
		return -1;
	ctx->error = error;
	return 0;
}

/* A rebuild while the change was looked at may have taken the mailbox' place in the
   origin's log, and more. */
static enum replay_result replay_check_place(struct replay_mailbox_ctx *ctx)
{
	struct dovetail_position pos;

	if (ctx->box == NULL || !ctx->ours ||
	    (dovetail_position_get(ctx->box, &pos) &&
	     pos.applied.index_id != 0))
		return REPLAY_DONE;
	ctx->error = "Its index was rebuilt";
	return REPLAY_LACKING;
}

static enum replay_result
replay_mailbox_apply(struct replay_mailbox_ctx *ctx, bool wanted)
{
	const ARRAY_TYPE(seq_range) *exists;
	struct dovetail_position pos;
	enum replay_result result;
	bool updates, saves;

	result = replay_mailbox_get(ctx, wanted);
	if (result != REPLAY_DONE || ctx->box == NULL)
		return result;
	switch (replay_fits(replay_user_mail_user(ctx->user)->username,
			    dovetail_position_get(ctx->box, &pos) ? &pos : NULL,
			    ctx->origin_id, ctx->change, wanted)) {
	case REPLAY_FIT_OLD:
		ctx->old = TRUE;
		return REPLAY_DONE;
	case REPLAY_FIT_SKIP:
		ctx->ours = TRUE;
		/* whoever applied it may have died before it compared */
		if (dovetail_log_pos_cmp(&ctx->change->to, &pos.applied) == 0 &&
		    mailbox_sync(ctx->box, 0) == 0) {
			ctx->digest = replay_user_mailbox_digest(ctx->user,
								 ctx->box);
			replay_compare_digest(ctx);
		}
		return REPLAY_DONE;
	case REPLAY_FIT_GAP:
		ctx->error = "Changes before this one are missing";
		return REPLAY_LACKING;
	case REPLAY_FIT_APPLY:
		break;
	}
	ctx->digest = replay_user_mailbox_digest(ctx->user, ctx->box);
	if (replay_mailbox_open(ctx) < 0)
		return REPLAY_FAILED;
	replay_collect(ctx, &updates, &exists);
	if (replay_snapshot_lacks(ctx, exists)) {
		ctx->error = "Messages before the snapshot's are missing";
		return REPLAY_LACKING;
	}
	result = replay_check_bodies(ctx);
	if (result != REPLAY_DONE)
		return result;

	saves = array_count(&ctx->appended) > 0;
	if (saves && replay_save_all(ctx, !updates && exists == NULL) < 0)
		return REPLAY_FAILED;
	if (updates || !saves || exists != NULL) {
		/* what was just saved has to be visible */
		if (saves && mailbox_sync(ctx->box, 0) < 0) {
			ctx->error = t_strdup(
				mailbox_get_last_internal_error(ctx->box,
								NULL));
			return REPLAY_FAILED;
		}
		if (replay_update_all(ctx, exists) < 0)
			return REPLAY_FAILED;
	}
	/* executes expunges, here and now */
	if (mailbox_sync(ctx->box, 0) < 0) {
		ctx->error = t_strdup(mailbox_get_last_internal_error(ctx->box,
								      NULL));
		return REPLAY_FAILED;
	}
	if (replay_raise_uid_next(ctx) < 0)
		return REPLAY_FAILED;
	if ((ctx->change->flags & DOVETAIL_MAILBOX_MORE) != 0) {
		ctx->error = "More messages are to come";
		return REPLAY_LACKING;
	}
	ctx->applied = TRUE;
	replay_compare_digest(ctx);
	return REPLAY_DONE;
}

int replay_mailbox_add_messages(struct replay_user *user, const char *origin,
				struct mailbox *box,
				const struct dovetail_change_mailbox *change,
				ARRAY_TYPE(seq_range) *waiting,
				const char **error_r)
{
	struct dovetail_change_mailbox part = *change;
	struct replay_mailbox_ctx ctx;
	const struct dovetail_op *op;

	i_zero(&ctx);
	ctx.user = user;
	ctx.change = change;
	ctx.origin = origin;
	dovetail_origin_id(origin, ctx.origin_id);
	ctx.box = box;
	ctx.digest = replay_user_mailbox_digest(user, box);
	t_array_init(&ctx.appended, 16);
	t_array_init(&ctx.saved, 16);
	if (replay_mailbox_open(&ctx) < 0) {
		*error_r = ctx.error;
		return -1;
	}
	/* those that cannot be saved here any more */
	t_array_init(&part.ops, 16);
	array_foreach(&change->ops, op) {
		if (op->append.uid < ctx.uid_next)
			array_push_back(&part.ops, op);
	}
	if (array_count(&part.ops) > 0) {
		if (replay_rebuild_add(user, box, &part, error_r) < 0)
			return -1;
		array_foreach(&part.ops, op)
			seq_range_array_add(waiting, op->append.uid);
	}
	if (array_count(&part.ops) < array_count(&change->ops) &&
	    (replay_check_bodies(&ctx) != REPLAY_DONE ||
	     replay_save_all(&ctx, FALSE) < 0)) {
		*error_r = ctx.error;
		return -1;
	}
	return 0;
}

enum replay_result
replay_mailbox(struct replay_user *user, const char *origin,
	       const struct dovetail_change_mailbox *change, bool wanted,
	       const char **error_r)
{
	struct replay_outcome outcome;
	struct replay_mailbox_ctx ctx;
	struct mailbox_status status;

	i_zero(&ctx);
	ctx.user = user;
	ctx.change = change;
	ctx.origin = origin;
	dovetail_origin_id(origin, ctx.origin_id);
	t_array_init(&ctx.appended, 16);
	t_array_init(&ctx.saved, 16);

	if ((change->flags & DOVETAIL_MAILBOX_MESSAGES) != 0)
		return replay_compare_messages(user, origin, change, error_r);
	i_zero(&outcome);
	outcome.result = replay_mailbox_apply(&ctx, wanted);
	if (outcome.result == REPLAY_FAILED)
		replay_user_forget_mailboxes(user);
	if (!ctx.applied) {
		if (replay_expunge_anyway(&ctx) < 0)
			outcome.result = REPLAY_FAILED;
		else if (outcome.result == REPLAY_DONE)
			outcome.result = replay_check_place(&ctx);
	}
	outcome.old = ctx.old;
	outcome.error = *error_r = ctx.error;
	if (outcome.result == REPLAY_LACKING && ctx.box != NULL) {
		mailbox_get_open_status(ctx.box, STATUS_UIDNEXT, &status);
		outcome.uid_next = status.uidnext;
	}
	if (outcome.result == REPLAY_FAILED)
		replay_user_forget_mailboxes(user);
	replay_mailbox_done(replay_user_mail_user(user)->username, origin,
			    change, wanted, &outcome);
	return outcome.result;
}
