/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* From a log position to changes. The trigger is a commit or a sync; the content
   is what the mailbox's transaction log has behind the queued position. */

#include "lib.h"
#include "array.h"
#include "buffer.h"
#include "guid.h"
#include "istream.h"
#include "randgen.h"
#include "seq-range-array.h"
#include "str.h"
#include "mail-storage-private.h"
#include "mail-index-private.h"
#include "mail-index-view-private.h"
#include "mail-cache.h"
#include "mail-index-modseq.h"
#include "mail-transaction-log-view-private.h"
#include "dovetail-compat.h"
#include "dovetail-attribute.h"
#include "dovetail-log.h"
#include "dovetail-mailbox-digest.h"
#include "dovetail-name.h"
#include "dovetail-plugin.h"
#include "dovetail-position.h"

/* The flags of an index record that are IMAP's; the others are Dovecot's own. */
#define DOVETAIL_FLAGS_MASK \
	(MAIL_ANSWERED | MAIL_FLAGGED | MAIL_DELETED | MAIL_SEEN | MAIL_DRAFT)

/* The replay service has nobody waiting for it, but does not wait for ever. */
#define CAPTURE_REPLAY_TIMEOUT_USECS (60 * 1000000ULL)
/* Records without a change (caches, our own position) are skipped again by each
   capture; after this many bytes of them an empty change moves the position
   past them, here and on the replicas. */
#define CAPTURE_SKIP_SIZE (16 * 1024)
/* An open mailbox' position is written after this many changes, and when it is
   closed. Who needs it meanwhile asks the queue. */
#define CAPTURE_UNWRITTEN_MAX 32
/* A snapshot brings along bodies up to this; one that nobody asked for the first
   ones. (None if the replay service makes it, for a sweep or a job: there it is an
   old mailbox, and a replica may have all that.) */
#define CAPTURE_SNAPSHOT_SIZE DOVETAIL_CHANGE_SPLIT_SIZE

#define CAPTURE_NOT_PRIMARY "This node is not the user's primary"

/* by this process */
static uint64_t bodies_sent;

struct capture {
	struct mailbox *box;
	struct dovetail_mailbox *dbox;
	struct dovetail_user *duser;
	struct mail_index_view *view;
	/* the mailbox's digest has it now */
	bool view_taken;
	uint64_t deadline;

	/* since the first message was read */
	struct mailbox_transaction_context *trans;
	struct mail *mail;

	/* the change being built: the ops are encoded as they come, the head
	   when it is sent */
	struct dovetail_change change;
	buffer_t *ops, *body, *encoded;
	unsigned int sent_count;

	/* the queue has everything before this; all zero: it was not asked */
	struct dovetail_log_pos known;
	/* a message is too large to wait for: leave the rest to a sweep */
	bool deferred;
	/* what is sent is a part of a record, and its answer is not the mail's */
	bool part;
	struct dovetail_queue_batch parts;
	/* why it failed; allocated */
	char *error;
};

int dovetail_mailbox_get_guid(struct mailbox *box, guid_128_t guid_r)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);
	struct mailbox_metadata metadata;

	if (!dbox->guid_known) {
		if (mailbox_get_metadata(box, MAILBOX_METADATA_GUID,
					 &metadata) < 0)
			return -1;
		guid_128_copy(dbox->guid, metadata.guid);
		dbox->guid_known = TRUE;
	}
	guid_128_copy(guid_r, dbox->guid);
	return 0;
}

uint64_t dovetail_capture_deadline(struct dovetail_user *duser)
{
	uint64_t timeout = duser->replaying ? CAPTURE_REPLAY_TIMEOUT_USECS :
		duser->set.ack_timeout_msecs * 1000ULL;

	return dovetail_monotonic_usecs() + timeout;
}

enum dovetail_ack_level dovetail_capture_level(struct dovetail_user *duser)
{
	/* a sweep has nobody waiting for a replica */
	return duser->replaying ? DOVETAIL_ACK_QUEUED : duser->set.ack;
}

int dovetail_capture_wait(struct dovetail_user *duser,
			  struct dovetail_queue_batch *batch, uint64_t deadline)
{
	const char *error;
	int ret;

	if (dovetail_capture_level(duser) == DOVETAIL_ACK_LOCAL)
		deadline = 0;
	ret = dovetail_queue_client_wait(duser->client, batch, deadline, &error);
	if (ret > 0)
		dovetail_queue_client_note(duser->client, duser->event, NULL);
	else if (ret == 0 && deadline > 0) {
		dovetail_queue_client_note(duser->client, duser->event,
			t_strdup_printf("No answer within %u ms "
					"(dovetail_ack_timeout)",
					duser->set.ack_timeout_msecs));
	} else if (ret < 0) {
		dovetail_queue_client_note(duser->client, duser->event, error);
	}
	return ret;
}

/* ---- a change ---- */

static void ATTR_FORMAT(2, 3)
capture_fail(struct capture *c, const char *fmt, ...)
{
	va_list args;

	va_start(args, fmt);
	i_free(c->error);
	c->error = i_strdup_vprintf(fmt, args);
	va_end(args);
}

static void capture_deinit(struct capture *c)
{
	if (c->mail != NULL) {
		mail_free(&c->mail);
		/* rolled back: reading must not write caches into the log we
		   read */
		mailbox_transaction_rollback(&c->trans);
	}
	if (c->view != NULL && !c->view_taken)
		mail_index_view_close(&c->view);
	buffer_free(&c->ops);
	buffer_free(&c->body);
	buffer_free(&c->encoded);
	i_free(c->error);
}

static int capture_init(struct capture *c, struct mailbox *box)
{
	struct dovetail_change_mailbox *mailbox = &c->change.u.mailbox;

	i_zero(c);
	c->box = box;
	c->dbox = DOVETAIL_MAILBOX_CONTEXT(box);
	c->duser = c->dbox->duser;
	c->deadline = dovetail_capture_deadline(c->duser);
	c->view = mail_index_view_open(box->index);

	c->change.kind = DOVETAIL_CHANGE_MAILBOX;
	c->change.user = c->duser->user->username;
	if (dovetail_mailbox_get_guid(box, mailbox->guid) < 0) {
		capture_fail(c, "Cannot get mailbox GUID: %s",
			mailbox_get_last_internal_error(box, NULL));
		return -1;
	}
	mailbox->name = dovetail_name_to_path(mailbox_get_namespace(box),
					      box->vname);
	mailbox->uid_validity = mail_index_get_header(c->view)->uid_validity;
	mailbox->highest_modseq = mail_index_modseq_get_highest(c->view);
	return 0;
}

static void capture_init_buffers(struct capture *c)
{
	if (c->ops != NULL)
		return;
	c->ops = buffer_create_dynamic(default_pool, 8192);
	c->body = buffer_create_dynamic(default_pool, 8192);
	c->encoded = buffer_create_dynamic(default_pool, 8192);
}

static int capture_send_encoded(struct capture *c)
{
	const char *error;

	if (dovetail_queue_client_send(c->duser->client,
				       c->part ? &c->parts : &c->dbox->batch,
				       c->part ? DOVETAIL_ACK_QUEUED :
				       dovetail_capture_level(c->duser),
				       c->encoded,
				       c->deadline, &error) < 0) {
		capture_fail(c, "%s", error);
		return -1;
	}
	c->sent_count++;
	return 0;
}

/* Say what the mailbox is after the change, if that is known: the ops so far are all
   there is up to the end of the view. */
static void capture_add_digest(struct capture *c)
{
	struct dovetail_change_mailbox *mailbox = &c->change.u.mailbox;

	if (dovetail_mailbox_digest_follow(c->dbox->digest, c->view,
					   &mailbox->digest))
		mailbox->flags |= DOVETAIL_MAILBOX_DIGEST;
	c->view_taken = TRUE;
}

/* Send the ops so far as the change up to c->change's to. */
static int capture_flush(struct capture *c)
{
	struct dovetail_change_mailbox *mailbox = &c->change.u.mailbox;

	buffer_set_used_size(c->encoded, 0);
	dovetail_change_encode(c->encoded, &c->change);
	buffer_append_buf(c->encoded, c->ops, 0, SIZE_MAX);
	buffer_set_used_size(c->ops, 0);
	if (c->encoded->used > DOVETAIL_CHANGE_MAX_SIZE) {
		capture_fail(c, "Change has %zu bytes, "
			"more than %u", c->encoded->used,
			DOVETAIL_CHANGE_MAX_SIZE);
		return -1;
	}
	if (capture_send_encoded(c) < 0)
		return -1;
	mailbox->from = mailbox->to;
	return 0;
}

/* ---- a message ---- */

/* Read through the caller's mailbox, with its files and caches, but see what is in
   the index now. Opening the mailbox a second time would show the same, and in a
   Maildir cost as much as it has messages. */
static void capture_begin_reading(struct capture *c)
{
	struct mail_index_view *view = c->box->view;

	if (c->mail != NULL)
		return;
	c->box->view = c->view;
	c->trans = mailbox_transaction_begin(c->box, 0, __func__);
	c->box->view = view;
	/* our look says nothing about what clients will want cached */
	mail_cache_view_update_cache_decisions(c->trans->cache_view, FALSE);
	c->mail = mail_alloc(c->trans, 0, NULL);
}

static int capture_spool_chunk(struct capture *c, const uint8_t *spool_id,
			       uint64_t offset, const void *data, size_t size)
{
	struct dovetail_change change;

	i_zero(&change);
	change.kind = DOVETAIL_CHANGE_SPOOL;
	change.user = c->change.user;
	memcpy(change.u.spool.id, spool_id, DOVETAIL_SPOOL_ID_SIZE);
	change.u.spool.offset = offset;
	change.u.spool.data = data;
	change.u.spool.size = size;
	buffer_set_used_size(c->encoded, 0);
	dovetail_change_encode(c->encoded, &change);
	return capture_send_encoded(c);
}

/* Read the message's body into c->body, or, when it is large, send it ahead in
   chunks. Returns 1: done, and hash_r is the message's.  0: deferred.  -1: failed
   (c->error, or the mail is gone). */
static int capture_body(struct capture *c, struct dovetail_op_append *append,
			uint8_t hash_r[DOVETAIL_MESSAGE_HASH_SIZE])
{
	struct dovetail_body_hash hash;
	guid_128_t guid;
	struct istream *input;
	const unsigned char *data;
	size_t size, chunk;
	uint64_t offset = 0;
	int ret;

	if (mail_get_stream(c->mail, NULL, NULL, &input) < 0)
		return -1;
	dovetail_body_hash_init(&hash);
	buffer_set_used_size(c->body, 0);
	append->source = DOVETAIL_BODY_INLINE;
	while ((ret = i_stream_read_more(input, &data, &size)) > 0) {
		chunk = I_MIN(size, DOVETAIL_SPOOL_CHUNK_SIZE - c->body->used);
		buffer_append(c->body, data, chunk);
		dovetail_body_hash_more(&hash, data, chunk);
		i_stream_skip(input, chunk);
		if (c->body->used <= DOVETAIL_BODY_INLINE_MAX_SIZE)
			continue;
		if (append->source == DOVETAIL_BODY_INLINE) {
			if (dovetail_capture_level(c->duser) ==
			    DOVETAIL_ACK_LOCAL) {
				c->deferred = TRUE;
				return 0;
			}
			append->source = DOVETAIL_BODY_SPOOL;
			random_fill(append->spool_id, sizeof(append->spool_id));
		}
		if (c->body->used < DOVETAIL_SPOOL_CHUNK_SIZE)
			continue;
		if (capture_spool_chunk(c, append->spool_id, offset,
					c->body->data, c->body->used) < 0)
			return -1;
		offset += c->body->used;
		buffer_set_used_size(c->body, 0);
	}
	if (input->stream_errno != 0) {
		capture_fail(c, "read(%s) failed: %s",
					   i_stream_get_name(input),
					   i_stream_get_error(input));
		return -1;
	}
	append->size = offset + c->body->used;
	if (append->source == DOVETAIL_BODY_INLINE)
		append->body = c->body->data;
	else if (c->body->used > 0 &&
		 capture_spool_chunk(c, append->spool_id, offset,
				     c->body->data, c->body->used) < 0)
		return -1;
	dovetail_message_guid(append->guid, guid);
	dovetail_body_hash_final(&hash, guid, append->received_date, hash_r);
	bodies_sent += append->size;
	return 1;
}

uint64_t dovetail_plugin_bodies_sent(void)
{
	return bodies_sent;
}

static int copy_hint_cmp(const uint32_t *uid,
			 const struct dovetail_copy_hint *hint)
{
	return *uid < hint->uid ? -1 : *uid > hint->uid ? 1 : 0;
}

static const struct dovetail_copy_hint *
capture_find_hint(struct capture *c, uint32_t uid)
{
	if (!array_is_created(&c->dbox->hints))
		return NULL;
	return array_bsearch(&c->dbox->hints, &uid, copy_hint_cmp);
}

/* Flags and keywords as the view has them: what came later stands in the log behind
   the view's end. */
static void capture_flags_at(struct capture *c, uint32_t seq,
			     struct dovetail_op_append *append)
{
	const ARRAY_TYPE(keywords) *names =
		mail_index_get_keywords(c->box->index);
	ARRAY_TYPE(keyword_indexes) indexes;
	ARRAY_TYPE(const_string) keywords;
	enum mail_flags flags;
	const unsigned int *idx;
	const char *name;

	t_array_init(&indexes, 8);
	t_array_init(&keywords, 8);
	mail_index_lookup_view_flags(c->view, seq, &flags, &indexes);
	array_foreach(&indexes, idx) {
		name = array_idx_elem(names, *idx);
		array_push_back(&keywords, &name);
	}
	array_append_zero(&keywords);
	append->flags = flags & DOVETAIL_FLAGS_MASK;
	append->keywords = array_front(&keywords);
}

static int capture_metadata(struct capture *c, struct dovetail_op_append *append)
{
	struct mail *mail = c->mail;
	const char *value;
	uoff_t size;

	capture_flags_at(c, mail->seq, append);
	if (mail_get_special(mail, MAIL_FETCH_GUID, &append->guid) < 0 ||
	    mail_get_received_date(mail, &append->received_date) < 0 ||
	    mail_get_save_date(mail, &append->save_date) < 0 ||
	    mail_get_special(mail, MAIL_FETCH_UIDL_BACKEND,
			     &append->pop3_uidl) < 0 ||
	    mail_get_special(mail, MAIL_FETCH_POP3_ORDER, &value) < 0 ||
	    mail_get_physical_size(mail, &size) < 0)
		return -1;
	if (append->pop3_uidl == NULL)
		append->pop3_uidl = "";
	if (value == NULL || str_to_uint32(value, &append->pop3_order) < 0)
		append->pop3_order = 0;
	append->size = size;
	return 0;
}

/* Add the message to the change. Returns 1: done, or it is gone.  0: deferred.
   -1: failed. */
static int capture_message_real(struct capture *c, uint32_t uid)
{
	const struct dovetail_copy_hint *hint;
	uint8_t hash[DOVETAIL_MESSAGE_HASH_SIZE];
	struct dovetail_op op;
	bool have_hash = TRUE;
	int ret;

	capture_begin_reading(c);
	if (!mail_set_uid(c->mail, uid))
		return 1;

	i_zero(&op);
	op.type = DOVETAIL_OP_APPEND;
	op.append.uid = uid;
	if ((ret = capture_metadata(c, &op.append)) == 0) {
		hint = capture_find_hint(c, uid);
		if (hint != NULL && hint->src_uid != 0) {
			op.append.source = DOVETAIL_BODY_COPY;
			guid_128_copy(op.append.copy_mailbox_guid,
				      hint->src_mailbox_guid);
			op.append.copy_uid = hint->src_uid;
			/* came with the copy: dovetail_copy() */
			have_hash = FALSE;
			ret = 1;
		} else {
			ret = capture_body(c, &op.append, hash);
		}
	}
	if (ret > 0) {
		dovetail_op_encode(c->ops, &op);
		if (have_hash) {
			dovetail_mailbox_digest_set_new(c->dbox->digest, uid,
							op.append.flags,
							op.append.keywords,
							hash);
		}
	}
	if (ret < 0 && c->error == NULL) {
		if (c->mail->expunged)
			return 1;
		capture_fail(c, "Cannot read UID %u: %s", uid,
			mailbox_get_last_internal_error(c->box, NULL));
	}
	return ret;
}

static int capture_message(struct capture *c, uint32_t uid)
{
	int ret;

	T_BEGIN {
		ret = capture_message_real(c, uid);
	} T_END;
	return ret;
}

/* ---- the log ---- */

static void capture_op(struct capture *c, struct dovetail_op *op,
		       enum dovetail_op_type type)
{
	op->type = type;
	if (array_count(&op->uids) > 0)
		dovetail_op_encode(c->ops, op);
	array_clear(&op->uids);
}

/* One record can be many messages. A part of it goes out without claiming a
   place in the log (to is from): only the change with its end does. */
static int capture_append(struct capture *c,
			  const struct dovetail_log_record *record)
{
	struct dovetail_change_mailbox *mailbox = &c->change.u.mailbox;
	const struct mail_index_record *rec = record->data, *end;
	const char *error;
	int ret = 1;

	end = CONST_PTR_OFFSET(record->data, record->size);
	for (; rec < end; rec++) {
		if (c->ops->used > DOVETAIL_CHANGE_SPLIT_SIZE) {
			mailbox->to = mailbox->from;
			c->part = TRUE;
			if (capture_flush(c) < 0) {
				ret = -1;
				break;
			}
		}
		if ((ret = capture_message(c, rec->uid)) <= 0)
			break;
	}
	if (c->part && ret > 0) {
		/* what comes next says that all before it is queued */
		ret = dovetail_queue_client_wait(c->duser->client, &c->parts,
						 c->deadline, &error);
		if (ret <= 0) {
			capture_fail(c, "Part of a change was not queued: %s",
				     ret == 0 ? "No answer in time" : error);
			ret = -1;
		}
	}
	if (c->part) {
		dovetail_queue_client_cancel(c->duser->client, &c->parts);
		c->part = FALSE;
	}
	return ret;
}

static void capture_flags(struct capture *c,
			  const struct dovetail_log_record *record,
			  struct dovetail_op *op)
{
	const struct mail_transaction_flag_update *rec = record->data, *end;
	uint8_t add, remove;

	end = CONST_PTR_OFFSET(record->data, record->size);
	for (; rec < end; rec++) {
		add = rec->add_flags & DOVETAIL_FLAGS_MASK;
		remove = rec->remove_flags & DOVETAIL_FLAGS_MASK;
		if (add == 0 && remove == 0)
			continue;
		if (add != op->add_flags || remove != op->remove_flags)
			capture_op(c, op, DOVETAIL_OP_FLAGS);
		op->add_flags = add;
		op->remove_flags = remove;
		seq_range_array_add_range(&op->uids, rec->uid1, rec->uid2);
	}
	capture_op(c, op, DOVETAIL_OP_FLAGS);
}

/* The log has the keys, the values are those of now: if they changed again, that
   stands behind. What cannot be read does not hold up mail; verify finds it. */
static void capture_attributes(struct capture *c,
			       const struct dovetail_log_record *record)
{
	ARRAY_TYPE(dovetail_attribute) attributes;
	struct dovetail_attribute *attribute;
	struct dovetail_op op = { .type = DOVETAIL_OP_ATTRIBUTE };
	const char *error, *problem;
	size_t size = 0;
	int ret;

	t_array_init(&attributes, 4);
	dovetail_log_record_attributes(record, &attributes);
	array_foreach_modifiable(&attributes, attribute) {
		if (!dovetail_attribute_travels(attribute))
			continue;
		ret = dovetail_attribute_get(c->box, &c->dbox->module_ctx.super,
					     attribute, &error);
		if (ret == 0)
			return;
		problem = ret < 0 ? error : NULL;
		if (ret > 0 && !dovetail_attribute_limit(attribute)) {
			problem = t_strdup_printf("Its value has more than %u "
				"bytes", DOVETAIL_ATTRIBUTE_VALUE_MAX_SIZE);
		}
		if (ret > 0 && attribute->value != NULL)
			size += strlen(attribute->value);
		if (ret > 0 && size > DOVETAIL_ATTRIBUTES_MAX_SIZE) {
			problem = "Too many changed at once";
			ret = -1;
		}
		if (problem != NULL) {
			e_warning(c->duser->event, "Mailbox %s: Attribute "
				"/%s/%s is not replicated: %s", c->box->vname,
				attribute->shared ? "shared" : "private",
				attribute->key, problem);
		}
		if (ret > 0) {
			op.attribute = *attribute;
			dovetail_op_encode(c->ops, &op);
		}
	}
}

/* Returns 1, 0 when deferred, -1 when failed. */
static int capture_record(struct capture *c,
			  const struct dovetail_log_record *record)
{
	const struct mail_transaction_keyword_update *keyword = record->data;
	enum dovetail_op_type type;
	struct dovetail_op op;

	i_zero(&op);
	t_array_init(&op.uids, 32);
	switch (record->type) {
	case MAIL_TRANSACTION_APPEND:
		return capture_append(c, record);
	case MAIL_TRANSACTION_FLAG_UPDATE:
		capture_flags(c, record, &op);
		return 1;
	case MAIL_TRANSACTION_ATTRIBUTE_UPDATE:
		capture_attributes(c, record);
		return 1;
	case MAIL_TRANSACTION_KEYWORD_UPDATE:
		op.keyword = t_strndup(keyword + 1, keyword->name_size);
		type = keyword->modify_type == MODIFY_ADD ?
			DOVETAIL_OP_KEYWORD_ADD : DOVETAIL_OP_KEYWORD_REMOVE;
		break;
	case MAIL_TRANSACTION_KEYWORD_RESET:
		type = DOVETAIL_OP_KEYWORD_RESET;
		break;
	default:
		type = DOVETAIL_OP_EXPUNGE;
		break;
	}
	dovetail_log_record_uids(record, &op.uids);
	capture_op(c, &op, type);
	return 1;
}

/* Make changes of the records. Returns 1, 0 when deferred, -1 when failed. */
static int capture_records(struct capture *c,
			   const ARRAY_TYPE(dovetail_log_record) *records)
{
	struct dovetail_change_mailbox *mailbox = &c->change.u.mailbox;
	const struct dovetail_log_record *record;
	struct dovetail_log_pos known;
	const char *error;
	bool asked = FALSE;
	int ret = 1;

	array_foreach(records, record) {
		if (!asked && dovetail_log_pos_cmp(&record->pos,
						   &c->dbox->seen) < 0) {
			/* Somebody else's record: they may have queued it. */
			asked = TRUE;
			if (dovetail_queue_client_position(c->duser->client,
					c->duser->user->username,
					mailbox->guid, record->pos.index_id,
					c->deadline, &known, &error) > 0 &&
			    dovetail_log_pos_cmp(&known, &mailbox->from) > 0) {
				mailbox->from = known;
				c->known = known;
			}
		}
		if (dovetail_log_pos_cmp(&record->pos, &mailbox->from) < 0)
			continue;
		capture_init_buffers(c);
		if (c->ops->used > DOVETAIL_CHANGE_SPLIT_SIZE) {
			mailbox->to = record->pos;
			if (capture_flush(c) < 0)
				return -1;
		}
		T_BEGIN {
			ret = capture_record(c, record);
		} T_END;
		if (ret <= 0)
			break;
	}
	return ret;
}

/* Queue the log from position to end. Returns 1: all sent (or nothing was to
   send); *sent_r: everything before it.  0: the log does not reach back to the
   position.  -1: failed. */
static int capture_log(struct capture *c, const struct dovetail_log_pos *from,
		       const struct dovetail_log_pos *end,
		       struct dovetail_log_pos *sent_r)
{
	struct dovetail_change_mailbox *mailbox = &c->change.u.mailbox;
	ARRAY_TYPE(dovetail_log_record) records;
	const char *error;
	pool_t pool;
	int ret;

	mailbox->from = *from;
	pool = pool_alloconly_create("dovetail capture", 1024);
	i_array_init(&records, 8);
	ret = dovetail_log_read(c->box->index, from, end, pool, &records,
				&error);
	if (ret < 0)
		capture_fail(c, "%s", error);
	else if (ret > 0 && capture_records(c, &records) < 0)
		ret = -1;
	array_free(&records);
	pool_unref(&pool);
	if (ret <= 0)
		return ret;

	/* what is not worth a change belongs to the next one */
	*sent_r = mailbox->from;
	if ((c->ops != NULL && c->ops->used > 0) ||
	    from->file_seq != end->file_seq ||
	    end->file_offset - from->file_offset > CAPTURE_SKIP_SIZE) {
		capture_init_buffers(c);
		if (c->deferred)
			mailbox->to = mailbox->from;
		else {
			mailbox->to = *end;
			mailbox->uid_next =
				mail_index_get_header(c->view)->next_uid;
			capture_add_digest(c);
		}
		*sent_r = mailbox->to;
		if (capture_flush(c) < 0)
			return -1;
	}
	return 1;
}

/* ---- snapshots ---- */

/* The ops for the messages 1..seq2: which exist, and their flags. */
static void capture_snapshot_state(struct capture *c, uint32_t seq2)
{
	const ARRAY_TYPE(keywords) *names =
		mail_index_get_keywords(c->box->index);
	unsigned int i, name_count = array_count(names);
	ARRAY_TYPE(seq_range) by_flags[DOVETAIL_FLAGS_MASK + 1];
	ARRAY_TYPE(seq_range) *by_keyword;
	ARRAY_TYPE(keyword_indexes) kw_indexes;
	enum mail_flags flags;
	struct dovetail_op op;
	const unsigned int *idx;
	uint32_t seq, uid;

	i_zero(&op);
	t_array_init(&op.uids, 128);
	for (i = 0; i < N_ELEMENTS(by_flags); i++)
		t_array_init(&by_flags[i], 8);
	by_keyword = t_new(ARRAY_TYPE(seq_range), I_MAX(name_count, 1));
	for (i = 0; i < name_count; i++)
		t_array_init(&by_keyword[i], 8);
	t_array_init(&kw_indexes, 32);

	for (seq = 1; seq <= seq2; seq++) {
		mail_index_lookup_uid(c->view, seq, &uid);
		mail_index_lookup_view_flags(c->view, seq, &flags, &kw_indexes);
		seq_range_array_add(&op.uids, uid);
		flags &= DOVETAIL_FLAGS_MASK;
		if (flags != 0)
			seq_range_array_add(&by_flags[flags], uid);
		array_foreach(&kw_indexes, idx) {
			if (*idx < name_count)
				seq_range_array_add(&by_keyword[*idx], uid);
		}
	}
	op.type = DOVETAIL_OP_EXISTS;
	dovetail_op_encode(c->ops, &op);
	for (i = 1; i < N_ELEMENTS(by_flags); i++) {
		op.add_flags = i;
		op.remove_flags = (DOVETAIL_FLAGS_MASK & ~i);
		op.uids = by_flags[i];
		capture_op(c, &op, DOVETAIL_OP_FLAGS);
	}
	for (i = 0; i < name_count; i++) {
		op.keyword = array_idx_elem(names, i);
		op.uids = by_keyword[i];
		capture_op(c, &op, DOVETAIL_OP_KEYWORD_ADD);
	}
}

static void capture_snapshot_attributes(struct capture *c)
{
	struct dovetail_change_mailbox *mailbox = &c->change.u.mailbox;
	struct dovetail_op op = { .type = DOVETAIL_OP_ATTRIBUTE };
	ARRAY_TYPE(dovetail_attribute) attributes;
	const struct dovetail_attribute *attribute;
	const char *error;
	int ret;

	t_array_init(&attributes, 16);
	ret = dovetail_attributes_get(c->box, &c->dbox->module_ctx.super,
				      &attributes, &error);
	if (ret < 0) {
		e_warning(c->duser->event, "Mailbox %s: Attributes are not "
			"replicated: %s", c->box->vname, error);
	}
	if (ret <= 0)
		return;
	mailbox->flags |= DOVETAIL_MAILBOX_ATTRIBUTES;
	array_foreach(&attributes, attribute) {
		op.attribute = *attribute;
		dovetail_op_encode(c->ops, &op);
	}
}

/* Send the mailbox as it is, with the messages from uid_next on. */
static int capture_snapshot(struct capture *c, uint32_t uid_next,
			    struct dovetail_log_pos *sent_r)
{
	struct dovetail_change_mailbox *mailbox = &c->change.u.mailbox;
	uint32_t uid, seq, seq1, seq2, count;
	int ret = 1;

	capture_init_buffers(c);
	buffer_set_used_size(c->ops, 0);
	mailbox->flags = DOVETAIL_MAILBOX_SNAPSHOT;
	mailbox->uid_next = mail_index_get_header(c->view)->next_uid;
	i_zero(&mailbox->from);
	mailbox->to.index_id = c->box->index->indexid;
	mailbox->to.file_seq = c->view->log_file_head_seq;
	mailbox->to.file_offset = c->view->log_file_head_offset;

	count = mail_index_view_get_messages_count(c->view);
	if (!mail_index_lookup_seq_range(c->view, uid_next, (uint32_t)-1,
					 &seq1, &seq2))
		seq1 = count + 1;
	T_BEGIN {
		capture_snapshot_state(c, seq1 - 1);
	} T_END;
	for (seq = seq1; seq <= count && ret > 0; seq++) {
		if (seq > seq1 && c->ops->used > CAPTURE_SNAPSHOT_SIZE) {
			mailbox->flags |= DOVETAIL_MAILBOX_MORE;
			break;
		}
		mail_index_lookup_uid(c->view, seq, &uid);
		ret = capture_message(c, uid);
	}
	if (ret < 0)
		return -1;
	if (ret == 0)
		mailbox->flags |= DOVETAIL_MAILBOX_MORE;
	if ((mailbox->flags & DOVETAIL_MAILBOX_MORE) == 0) {
		T_BEGIN {
			capture_snapshot_attributes(c);
		} T_END;
		capture_add_digest(c);
	}
	*sent_r = mailbox->to;
	return capture_flush(c) < 0 ? -1 : 1;
}

/* ---- the trigger ---- */

/* Write how far everything is confirmed. */
static void capture_write_position(struct mailbox *box,
				   const struct dovetail_log_pos *pos)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);
	const char *error;

	dbox->unwritten = 0;
	if (box->deleting || mail_index_is_deleted(box->index))
		return;
	if (dovetail_position_set_queued(box, pos, dbox->digest, &error) < 0) {
		/* Renamed or deleted meanwhile, or Dovecot's index code has
		   logged what is wrong. The queue and the replica drop what
		   comes again. */
		e_debug(dbox->duser->event, "Mailbox %s: Cannot write the "
			"queued position: %s", box->vname, error);
	}
}

/* The answers are in: note the position, or have the user swept. */
static void capture_settle(struct mailbox *box, int ret)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);
	struct dovetail_user *duser = dbox->duser;

	if (ret > 0 && (++dbox->unwritten >= CAPTURE_UNWRITTEN_MAX ||
			dovetail_mailbox_digest_is_urgent(dbox->digest)))
		capture_write_position(box, &dbox->sent);
	if (ret < 0) {
		/* what was confirmed and not written is found again: sent does
		   not say it any more */
		i_zero(&dbox->sent);
		dbox->unwritten = 0;
		duser->unclean = TRUE;
		dovetail_queue_client_sweep(duser->client,
					    duser->user->username);
	}
	dbox->unconfirmed = FALSE;
	i_zero(&dbox->batch);
}

static void capture_settle_earlier(struct mailbox *box)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);
	const char *error;
	int ret;

	if (!dbox->unconfirmed)
		return;
	ret = dovetail_queue_client_wait(dbox->duser->client, &dbox->batch, 0,
					 &error);
	if (ret != 0)
		capture_settle(box, ret);
}

static void capture_finish(struct capture *c, int ret,
			   const struct dovetail_log_pos *sent)
{
	struct dovetail_mailbox *dbox = c->dbox;
	struct dovetail_user *duser = c->duser;

	if (ret < 0) {
		dovetail_queue_client_note(duser->client, duser->event,
			t_strdup_printf("Mailbox %s: %s", c->box->vname,
					c->error));
		dovetail_queue_client_cancel(duser->client, &dbox->batch);
		capture_settle(c->box, -1);
		return;
	}
	if (c->known.index_id != 0)
		capture_write_position(c->box, &c->known);
	if (c->sent_count > 0) {
		dbox->sent = *sent;
		dbox->unconfirmed = TRUE;
		ret = dovetail_capture_wait(duser, &dbox->batch, c->deadline);
		if (ret != 0)
			capture_settle(c->box, ret);
	}
	if (c->deferred) {
		duser->unclean = TRUE;
		dovetail_queue_client_sweep(duser->client,
					    duser->user->username);
	}
}

static bool capture_wanted(struct mailbox *box)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);

	return dbox != NULL && !dbox->internal && !dbox->capturing &&
		dbox->duser->primary && box->opened && box->index != NULL &&
		dbox->digest != NULL && !box->deleting &&
		!mail_index_is_deleted(box->index) &&
		!MAIL_INDEX_IS_IN_MEMORY(box->index);
}

/* Everything up to the end of c's view was handed to the queue: so does what answer
   makes of the mailbox as it is there. Returns like capture_log(). */
static int capture_answer(struct capture *c, dovetail_capture_answer_t *answer,
			  void *context)
{
	struct dovetail_change_mailbox *mailbox = &c->change.u.mailbox;
	struct dovetail_change change;
	int ret;

	if (c->deferred) {
		capture_fail(c, "A message is too large to wait for");
		return -1;
	}
	i_zero(&change);
	change.user = c->change.user;
	c->view_taken = TRUE;
	mailbox->to.index_id = c->box->index->indexid;
	mailbox->to.file_seq = c->view->log_file_head_seq;
	mailbox->to.file_offset = c->view->log_file_head_offset;
	ret = answer(c->box, c->view, mailbox, &change, context);
	if (ret <= 0)
		return 1;
	capture_init_buffers(c);
	buffer_set_used_size(c->encoded, 0);
	dovetail_change_encode(c->encoded, &change);
	return capture_send_encoded(c) < 0 ? -1 : 1;
}

/* We are new to a user as primary: nobody has been told of the subscriptions and
   of mailboxes without messages. In this process, because Dovecot may refuse to
   create a mailbox while another process looks at it. */
static void capture_new_user(struct dovetail_user *duser)
{
	const char *error;

	/* the sweep has the tree, too */
	if (duser->replaying || duser->unclean)
		return;
	if (dovetail_plugin_capture_tree(duser->user, NULL, 0, &error) < 0) {
		dovetail_queue_client_note(duser->client, duser->event, error);
		duser->unclean = TRUE;
		dovetail_queue_client_sweep(duser->client,
					    duser->user->username);
	}
}

/* A snapshot was queued that shows the mailbox at from. What happened since, other
   processes may have queued before it, and a replica that waited for the snapshot
   has dropped that: so it comes once more. What happens from here on is queued
   behind the snapshot. */
static void capture_since_snapshot(struct mailbox *box,
				   const struct dovetail_log_pos *from)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);
	struct dovetail_log_pos end, sent;
	struct capture c;
	int ret;

	(void)mail_index_refresh(box->index);
	if (capture_init(&c, box) < 0) {
		capture_finish(&c, -1, NULL);
		capture_deinit(&c);
		return;
	}
	end.index_id = box->index->indexid;
	end.file_seq = c.view->log_file_head_seq;
	end.file_offset = c.view->log_file_head_offset;
	/* and the queue is not asked */
	dbox->seen = *from;
	if (end.index_id == from->index_id &&
	    dovetail_log_pos_cmp(from, &end) < 0) {
		ret = capture_log(&c, from, &end, &sent);
		if (ret == 0) {
			capture_fail(&c, "Its log was reset meanwhile");
			ret = -1;
		}
		capture_finish(&c, ret, &sent);
		dbox->seen = end;
	}
	capture_deinit(&c);
}

/* Returns 0, or -1 and error_r (data stack): what could not be queued is noted. */
static int capture_run(struct mailbox *box, enum dovetail_capture_trigger trigger,
		       dovetail_capture_answer_t *answer, void *context,
		       const char **error_r)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);
	struct dovetail_position pos;
	struct dovetail_log_pos end, sent;
	struct capture c;
	bool have_pos, snapshot;
	int ret;

	capture_settle_earlier(box);

	(void)mail_index_refresh(box->index);
	if (capture_init(&c, box) < 0) {
		*error_r = t_strdup(c.error);
		capture_finish(&c, -1, NULL);
		capture_deinit(&c);
		return -1;
	}
	end.index_id = box->index->indexid;
	end.file_seq = c.view->log_file_head_seq;
	end.file_offset = c.view->log_file_head_offset;
	if (trigger == DOVETAIL_CAPTURE_SYNC ||
	    dbox->seen.index_id != end.index_id)
		dbox->seen = end;

	have_pos = dovetail_position_get_view(box->index, c.view, &pos) &&
		pos.queued.index_id == end.index_id &&
		dovetail_log_pos_cmp(&pos.queued, &end) <= 0;
	if (have_pos && dbox->sent.index_id == end.index_id &&
	    dovetail_log_pos_cmp(&pos.queued, &dbox->sent) < 0 &&
	    dovetail_log_pos_cmp(&dbox->sent, &end) <= 0)
		pos.queued = dbox->sent;

	if (!have_pos)
		ret = 0;
	else if (dovetail_log_pos_cmp(&pos.queued, &end) == 0) {
		ret = 1;
		sent = end;
	} else
		ret = capture_log(&c, &pos.queued, &end, &sent);
	snapshot = ret == 0;
	if (snapshot)
		ret = capture_snapshot(&c, !c.duser->replaying ? 1 :
			mail_index_get_header(c.view)->next_uid, &sent);
	if (ret > 0 && answer != NULL)
		ret = capture_answer(&c, answer, context);
	if (ret < 0)
		*error_r = t_strdup(c.error);
	capture_finish(&c, ret, &sent);

	dbox->seen = end;
	capture_deinit(&c);
	if (snapshot && ret > 0)
		capture_since_snapshot(box, &sent);
	array_free(&dbox->hints);
	if (!have_pos && box->inbox_user)
		capture_new_user(dbox->duser);
	return ret < 0 ? -1 : 0;
}

void dovetail_capture(struct mailbox *box, enum dovetail_capture_trigger trigger)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);
	const char *error;

	if (!capture_wanted(box))
		return;
	/* Whatever goes wrong in here, the caller's error stays the caller's. */
	mail_storage_last_error_push(box->storage);
	dbox->capturing = TRUE;
	T_BEGIN {
		(void)capture_run(box, trigger, NULL, NULL, &error);
	} T_END;
	dbox->capturing = FALSE;
	mail_storage_last_error_pop(box->storage);
}

int dovetail_capture_and_answer(struct mailbox *box,
				dovetail_capture_answer_t *answer,
				void *context, const char **error_r)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);
	int ret;

	if (!capture_wanted(box)) {
		*error_r = CAPTURE_NOT_PRIMARY;
		return -1;
	}
	dbox->capturing = TRUE;
	ret = capture_run(box, DOVETAIL_CAPTURE_SYNC, answer, context, error_r);
	dbox->capturing = FALSE;
	return ret;
}

void dovetail_capture_close(struct mailbox *box)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);

	if (dbox == NULL || (!dbox->unconfirmed && dbox->unwritten == 0))
		return;
	dbox->capturing = TRUE;
	T_BEGIN {
		capture_settle_earlier(box);
		if (dbox->unconfirmed) {
			/* Not answered yet. If the queue fails, it has the
			   user swept; else the next capture learns from it
			   how far it is. */
			dovetail_queue_client_cancel(dbox->duser->client,
						     &dbox->batch);
			dbox->unconfirmed = FALSE;
		} else if (dbox->unwritten > 0) {
			capture_write_position(box, &dbox->sent);
		}
	} T_END;
	dbox->capturing = FALSE;
}

void dovetail_capture_copied(struct mailbox_transaction_context *t,
			     struct mail *src)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(t->box);
	struct dovetail_mailbox *src_dbox = DOVETAIL_MAILBOX_CONTEXT(src->box);
	struct dovetail_copy_hint *hint;

	if (dbox == NULL || dbox->internal || !dbox->duser->primary)
		return;
	if (!array_is_created(&dbox->copied))
		i_array_init(&dbox->copied, 16);
	hint = array_append_space(&dbox->copied);
	if (src_dbox != NULL && src_dbox->duser == dbox->duser &&
	    dovetail_mailbox_get_guid(src->box, hint->src_mailbox_guid) == 0)
		hint->src_uid = src->uid;
}

void dovetail_capture_copies_saved(struct dovetail_mailbox *dbox,
				   const struct mail_transaction_commit_changes *changes)
{
	struct dovetail_copy_hint *hint;
	struct seq_range_iter iter;
	unsigned int n = 0;
	uint32_t uid;

	if (!array_is_created(&dbox->copied))
		return;
	/* Copies and saves are never mixed in one transaction by Dovecot; if
	   a plugin does, there are no hints and bodies are sent. */
	if (changes != NULL &&
	    seq_range_count(&changes->saved_uids) == array_count(&dbox->copied)) {
		seq_range_array_iter_init(&iter, &changes->saved_uids);
		array_foreach_modifiable(&dbox->copied, hint) {
			if (!seq_range_array_iter_nth(&iter, n++, &uid))
				break;
			hint->uid = uid;
		}
		/* the same, not a copy: there may be very many */
		array_free(&dbox->hints);
		dbox->hints = dbox->copied;
		i_zero(&dbox->copied);
		return;
	}
	array_free(&dbox->copied);
}

int dovetail_plugin_capture_snapshot(struct mailbox *box, uint32_t uid_next,
				     const char **error_r)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);
	struct dovetail_log_pos sent;
	struct capture c;
	int ret;

	if (!capture_wanted(box)) {
		*error_r = CAPTURE_NOT_PRIMARY;
		return -1;
	}
	dbox->capturing = TRUE;
	(void)mail_index_refresh(box->index);
	if (capture_init(&c, box) < 0)
		ret = -1;
	else
		ret = capture_snapshot(&c, uid_next, &sent);
	if (ret < 0)
		*error_r = t_strdup(c.error);
	capture_finish(&c, ret, &sent);
	capture_deinit(&c);
	if (ret >= 0)
		capture_since_snapshot(box, &sent);
	dbox->capturing = FALSE;
	return ret < 0 ? -1 : 0;
}

/* Send the messages themselves, as they are at the end of the view. */
static int capture_messages(struct capture *c,
			    const ARRAY_TYPE(seq_range) *uids)
{
	struct dovetail_change_mailbox *mailbox = &c->change.u.mailbox;
	const struct seq_range *range;
	uint32_t uid, seq, seq1, seq2;
	int ret = 1;

	capture_init_buffers(c);
	buffer_set_used_size(c->ops, 0);
	mailbox->flags = DOVETAIL_MAILBOX_MESSAGES;
	mailbox->uid_next = mail_index_get_header(c->view)->next_uid;
	array_foreach(uids, range) {
		if (!mail_index_lookup_seq_range(c->view, range->seq1,
						 range->seq2, &seq1, &seq2))
			continue;
		for (seq = seq1; seq <= seq2 && ret > 0; seq++) {
			if (c->ops->used > CAPTURE_SNAPSHOT_SIZE) {
				mailbox->flags |= DOVETAIL_MAILBOX_MORE;
				break;
			}
			mail_index_lookup_uid(c->view, seq, &uid);
			ret = capture_message(c, uid);
		}
		if (ret <= 0 || (mailbox->flags & DOVETAIL_MAILBOX_MORE) != 0)
			break;
	}
	if (ret < 0)
		return -1;
	return capture_flush(c) < 0 ? -1 : 1;
}

int dovetail_plugin_capture_messages(struct mailbox *box,
				     const ARRAY_TYPE(seq_range) *uids,
				     const char **error_r)
{
	struct dovetail_mailbox *dbox = DOVETAIL_MAILBOX_CONTEXT(box);
	struct dovetail_log_pos sent;
	struct capture c;
	int ret;

	/* what the messages are is said behind all that made them so */
	dovetail_capture(box, DOVETAIL_CAPTURE_SYNC);
	if (!capture_wanted(box)) {
		*error_r = CAPTURE_NOT_PRIMARY;
		return -1;
	}
	dbox->capturing = TRUE;
	sent = dbox->sent;
	if (capture_init(&c, box) < 0)
		ret = -1;
	else
		ret = capture_messages(&c, uids);
	if (ret < 0)
		*error_r = t_strdup(c.error);
	capture_finish(&c, ret, &sent);
	capture_deinit(&c);
	dbox->capturing = FALSE;
	return ret < 0 ? -1 : 0;
}
