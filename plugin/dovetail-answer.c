/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* What the primary says of a mailbox for others to compare with: its digest, and for
   a replica that differs the digests of ranges of UIDs, ever smaller ones, and its
   attributes. Said at the very place of the log it is true for. (An attribute is in
   the dict a moment before it is in the log. What is said too early of it comes
   again.) */

#include "lib.h"
#include "array.h"
#include "mail-storage-private.h"
#include "mail-index-private.h"
#include "dovetail-attribute.h"
#include "dovetail-mailbox-digest.h"
#include "dovetail-plugin.h"

/* Messages that are read at once, where hashes are lacking: others wait. */
#define ANSWER_FILL_MAX 100
/* Other processes bring messages while we look. */
#define ANSWER_FILL_TRIES 5
/* A range that differs is cut into so many, ... */
#define ANSWER_SPLIT 16
/* ... or its messages are listed, when there are no more than these. */
#define ANSWER_LIST_MAX 16

/* Returns 1: all hashes are known.  0: call again.  -1: some cannot be. */
static int answer_fill(struct mailbox *box, const char **error_r)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);
	struct dovetail_digest digest;
	unsigned int i, lacking;

	if (dbox == NULL || dbox->digest == NULL) {
		*error_r = "This node is not the user's primary";
		return -1;
	}
	if (dovetail_mailbox_digest_now(dbox->digest, &digest))
		return 1;
	for (i = 0; i < ANSWER_FILL_TRIES; i++) {
		lacking = dovetail_mailbox_digest_fill(dbox->digest,
						       ANSWER_FILL_MAX);
		if (dovetail_mailbox_digest_save(dbox->digest, error_r) < 0)
			return -1;
		if (lacking > 0)
			return 0;
		if (dovetail_mailbox_digest_now(dbox->digest, &digest))
			return 1;
		/* there are some that the box does not see yet */
		if (mailbox_sync(box, 0) < 0) {
			*error_r = t_strdup(
				mailbox_get_last_internal_error(box, NULL));
			return -1;
		}
	}
	*error_r = "Some of its messages cannot be read";
	return -1;
}

/* Returns 1: attributes has all of the mailbox.  0: nothing is said of them.
   -1: failed, error_r. */
static int answer_attributes(struct mailbox *box,
			     ARRAY_TYPE(dovetail_attribute) *attributes,
			     const char **error_r)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);
	const char *error;
	int ret;

	ret = dovetail_attributes_get(box, &dbox->module_ctx.super, attributes,
				      &error);
	if (ret < 0) {
		*error_r = t_strdup_printf("Its attributes cannot be read: %s",
					   error);
	}
	return ret;
}

/* ---- the digest ---- */

struct answer_verify {
	struct dovetail_change_verify verify;
	const char *error;
};

static int answer_verify(struct mailbox *box, struct mail_index_view *view,
			 const struct dovetail_change_mailbox *mailbox,
			 struct dovetail_change *change, void *context)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);
	struct answer_verify *ctx = context;
	struct dovetail_change_verify *verify = &ctx->verify;
	ARRAY_TYPE(dovetail_attribute) attributes;
	int ret;

	t_array_init(&attributes, 16);
	if ((ret = answer_attributes(box, &attributes, &ctx->error)) < 0)
		return 0;
	if (ret > 0)
		dovetail_attributes_hash(&attributes, verify->attributes);
	if (!dovetail_mailbox_digest_recompute(dbox->digest, view, NULL,
					       &verify->digest))
		return 0;
	guid_128_copy(verify->guid, mailbox->guid);
	verify->name = mailbox->name;
	verify->uid_validity = mailbox->uid_validity;
	verify->at = mailbox->to;
	change->kind = DOVETAIL_CHANGE_VERIFY;
	change->u.verify = *verify;
	return 1;
}

int dovetail_plugin_verify(struct mailbox *box, uint32_t number,
			   enum dovetail_verify_flags flags,
			   uint32_t *messages_r, const char **error_r)
{
	struct answer_verify ctx;
	int ret;

	*messages_r = 0;
	if ((ret = answer_fill(box, error_r)) <= 0)
		return ret;
	i_zero(&ctx);
	ctx.verify.number = number;
	ctx.verify.flags = flags;
	if (dovetail_capture_and_answer(box, answer_verify, &ctx, error_r) < 0)
		return -1;
	if (ctx.error != NULL) {
		*error_r = ctx.error;
		return -1;
	}
	*messages_r = ctx.verify.digest.count;
	/* not said: a message came whose hash is lacking */
	return guid_128_is_empty(ctx.verify.guid) ? 0 : 1;
}

/* ---- ranges ---- */

struct answer_compare {
	const struct dovetail_change_compare *compare;
	bool answered;
};

static bool
answer_list(struct mailbox *box, struct mail_index_view *view, uint32_t seq1,
	    uint32_t seq2, struct dovetail_change_compared *compared)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);
	const ARRAY_TYPE(keywords) *names = mail_index_get_keywords(box->index);
	ARRAY_TYPE(keyword_indexes) indexes;
	ARRAY_TYPE(const_string) keywords;
	struct dovetail_compared_message *message;
	enum mail_flags flags;
	const unsigned int *idx;
	const char *name;
	uint32_t seq;

	t_array_init(&indexes, 8);
	for (seq = seq1; seq <= seq2; seq++) {
		message = array_append_space(&compared->messages);
		mail_index_lookup_uid(view, seq, &message->uid);
		mail_index_lookup_view_flags(view, seq, &flags, &indexes);
		message->flags = flags & MAIL_FLAGS_NONRECENT;
		t_array_init(&keywords, 4);
		array_foreach(&indexes, idx) {
			name = array_idx_elem(names, *idx);
			array_push_back(&keywords, &name);
		}
		array_append_zero(&keywords);
		message->keywords = array_front(&keywords);
		if (!dovetail_mailbox_digest_get(dbox->digest, message->uid,
						 message->hash))
			return FALSE;
	}
	return TRUE;
}

static bool
answer_range(struct mailbox *box, struct mail_index_view *view,
	     const uint8_t *key, const struct dovetail_range *there,
	     struct dovetail_change_compared *compared)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);
	struct dovetail_range here = *there, *part;
	uint32_t seq1, seq2, seq, uid, step;

	if (!dovetail_mailbox_digest_range(dbox->digest, view, key, &here))
		return FALSE;
	if (here.count == there->count &&
	    dovetail_sum_equals(&here.sum, &there->sum))
		return TRUE;
	if (there->count == 0) {
		/* the asker lacks all of it */
		array_push_back(&compared->ranges, &here);
		return TRUE;
	}
	if (!mail_index_lookup_seq_range(view, here.uid1, here.uid2, &seq1,
					 &seq2)) {
		/* and we have none of it */
		seq_range_array_add_range(&compared->uids, here.uid1,
					  here.uid2);
		return TRUE;
	}
	if (here.count <= ANSWER_LIST_MAX) {
		seq_range_array_add_range(&compared->uids, here.uid1,
					  here.uid2);
		return answer_list(box, view, seq1, seq2, compared);
	}
	step = (here.count + ANSWER_SPLIT - 1) / ANSWER_SPLIT;
	uid = here.uid1;
	for (seq = seq1; seq <= seq2; seq += step) {
		part = array_append_space(&compared->ranges);
		part->uid1 = uid;
		if (seq2 - seq < step)
			part->uid2 = here.uid2;
		else {
			mail_index_lookup_uid(view, seq + step, &uid);
			part->uid2 = uid - 1;
		}
		if (!dovetail_mailbox_digest_range(dbox->digest, view, key,
						   part))
			return FALSE;
	}
	return TRUE;
}

static int answer_compare(struct mailbox *box, struct mail_index_view *view,
			  const struct dovetail_change_mailbox *mailbox,
			  struct dovetail_change *change, void *context)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);
	struct dovetail_change_compared *compared = &change->u.compared;
	struct answer_compare *ctx = context;
	const struct dovetail_range *range;
	struct dovetail_digest digest;
	const char *error;
	bool first, known;

	change->kind = DOVETAIL_CHANGE_COMPARED;
	guid_128_copy(compared->guid, mailbox->guid);
	compared->number = ctx->compare->number;
	compared->uid_validity = mailbox->uid_validity;
	compared->uid_next = mail_index_get_header(view)->next_uid;
	compared->highest_modseq = mailbox->highest_modseq;
	compared->at = mailbox->to;
	t_array_init(&compared->ranges, 64);
	t_array_init(&compared->uids, 16);
	t_array_init(&compared->messages, 64);
	/* The first question is about all messages: computed afresh then, if
	   what was followed had been wrong, this is the time. */
	range = array_front(&ctx->compare->ranges);
	first = range->uid1 == 1 &&
		array_count(&ctx->compare->ranges) <= ANSWER_SPLIT + 1;
	known = first ?
		dovetail_mailbox_digest_recompute(dbox->digest, view, NULL,
						  &digest) :
		dovetail_mailbox_digest_follow(dbox->digest, view, &digest);
	if (!known)
		return 0;
	t_array_init(&compared->attributes, 16);
	compared->with_attributes = first &&
		answer_attributes(box, &compared->attributes, &error) > 0;
	array_foreach(&ctx->compare->ranges, range) {
		if (!answer_range(box, view, ctx->compare->key, range,
				  compared))
			return 0;
	}
	ctx->answered = TRUE;
	return 1;
}

int dovetail_plugin_compare(struct mailbox *box,
			    const struct dovetail_change_compare *compare,
			    const char **error_r)
{
	struct answer_compare ctx = { .compare = compare };
	int ret;

	if (array_count(&compare->ranges) == 0)
		return 1;

	if ((ret = answer_fill(box, error_r)) <= 0)
		return ret;
	if (dovetail_capture_and_answer(box, answer_compare, &ctx,
					error_r) < 0)
		return -1;
	return ctx.answered ? 1 : 0;
}
