/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* Put messages into the middle of a mailbox. Dovecot gives a message a new UID when
   the wanted one is below UIDNEXT, and has no function that would not. So the
   messages wait in a mailbox of their own, the "parts", until all are there. Then
   the mailbox gets a new index: one transaction, under the index' lock, resets it
   and adds all messages in the order of their UIDs, as Dovecot itself does when it
   rebuilds an index. The messages that were there do not move, whatever their
   number and format; the mailbox stays what it is for its name, its children and
   its subscription. Whoever has it open finds the index reset and is disconnected.

   If the process dies,
   - while parts come, they are found again and not asked for again;
   - before the index is written, nothing is lost: a file of a message that is not in
     the index yet (sdbox) is overwritten by the next attempt, a reference too many
     (mdbox) costs space only;
   - between the reset and the write that follows at once, the mailbox is empty and
     has no position: its next comparison or change asks for everything
     again;
   - in a Maildir, before the files are in cur/, Dovecot drops the messages again;
   - later: parts are still there, and the next call finishes, or
     replay_rebuild_finish(); at last replay_rebuild_clean() removes them. */

#include "lib.h"
#include "array.h"
#include "fdatasync-path.h"
#include "guid.h"
#include "ioloop.h"
#include "seq-range-array.h"
#include "mail-storage-private.h"
#include "mail-index-private.h"
#include "mail-index-modseq.h"
#include "mail-index-transaction-private.h"
#include "mail-index-view-private.h"
#include "mailbox-list-iter.h"
#include "index-mail.h"
#include "index-pop3-uidl.h"
#include "maildir-storage.h"
#include "maildir-keywords.h"
#include "maildir-filename-flags.h"
#include "maildir-uidlist.h"
#include "mdbox-map.h"
#include "mdbox-storage.h"
#include "sdbox-storage.h"
#include "dovetail-compat.h"
#include "dovetail-mailbox-digest.h"
#include "dovetail-name.h"
#include "dovetail-replay.h"

#include <sys/stat.h>
#include <unistd.h>

/* The index extension that says which UID a part is for. */
#define REBUILD_EXT_NAME "dovetail-part"
/* Something else changes the mailbox between our sync and our lock. */
#define REBUILD_LOCK_TRIES 5
/* Parts of a mailbox that still exists are left alone for so long. */
#define REBUILD_PARTS_SECS (24 * 3600)

#define REBUILD_FLAGS_MASK \
	(MAIL_ANSWERED | MAIL_FLAGGED | MAIL_DELETED | MAIL_SEEN | MAIL_DRAFT)

/* A message of the parts. */
struct rebuild_part {
	/* that it is for */
	uint32_t uid;
	/* in the parts */
	uint32_t seq;
};

struct rebuild {
	struct mailbox *box;
	/* NULL, as all of it: nothing is to be put in */
	struct mailbox *parts;
	/* a mail of the parts, and the hashes there */
	struct mailbox_transaction_context *parts_trans;
	struct mail *mail;
	struct dovetail_mailbox_digest *digest;
	/* to be put in, by UID */
	ARRAY(struct rebuild_part) list;

	/* with the index locked: as it is, and as it will be */
	struct mail_index_view *view;
	struct mail_index_transaction *trans;
	const char *error;
};

static int rebuild_box_failed(struct rebuild *rb, struct mailbox *box)
{
	rb->error = t_strdup(mailbox_get_last_internal_error(box, NULL));
	return -1;
}

/* ---- the parts ---- */

static uint32_t parts_ext_register(struct mailbox *parts)
{
	return mail_index_ext_register(parts->index, REBUILD_EXT_NAME, 0,
				       sizeof(uint32_t), sizeof(uint32_t));
}

/* Returns 1, 0: there are none (never with create), -1. */
static int parts_try_open(struct mailbox *parts, bool create,
			  const char **error_r)
{
	enum mail_error mail_error;

	if (create && mailbox_create(parts, NULL, FALSE) < 0 &&
	    mailbox_get_last_mail_error(parts) != MAIL_ERROR_EXISTS) {
		*error_r = t_strdup(mailbox_get_last_internal_error(parts, NULL));
		return -1;
	}
	if (mailbox_open(parts) < 0 ||
	    mailbox_enable(parts, MAILBOX_FEATURE_CONDSTORE) < 0 ||
	    mailbox_sync(parts, MAILBOX_SYNC_FLAG_FULL_READ) < 0) {
		*error_r = t_strdup(mailbox_get_last_internal_error(parts,
								    &mail_error));
		return mail_error == MAIL_ERROR_NOTFOUND &&
			!parts->mailbox_deleted && !create ? 0 : -1;
	}
	return 1;
}

/* Open the mailbox' parts. Returns 1, 0: there are none (never with create), -1. */
static int parts_open(struct mailbox *box, bool create, struct mailbox **parts_r,
		      const char **error_r)
{
	struct mail_namespace *ns = mailbox_get_namespace(box);
	struct mailbox_metadata metadata;
	struct mailbox *parts;
	const char *vname;
	int ret;

	if (mailbox_get_metadata(box, MAILBOX_METADATA_GUID, &metadata) < 0) {
		*error_r = t_strdup(mailbox_get_last_internal_error(box, NULL));
		return -1;
	}
	vname = dovetail_name_of_parts(ns, metadata.guid);
	parts = mailbox_alloc(ns->list, vname, MAILBOX_FLAG_IGNORE_ACLS);
	ret = parts_try_open(parts, create, error_r);
	if (ret < 0 && parts->mailbox_deleted) {
		/* Somebody died while deleting them. They are needed no more, but
		   Dovecot deletes only what can be opened. */
		ret = mailbox_mark_index_deleted(parts, FALSE) < 0 ||
			mailbox_delete(parts) < 0 ? -1 : 0;
		if (ret < 0) {
			*error_r = t_strdup(
				mailbox_get_last_internal_error(parts, NULL));
		}
		mailbox_free(&parts);
		parts = mailbox_alloc(ns->list, vname,
				      MAILBOX_FLAG_IGNORE_ACLS);
		if (ret == 0)
			ret = parts_try_open(parts, create, error_r);
	}
	if (ret > 0)
		*parts_r = parts;
	else
		mailbox_free(&parts);
	return ret;
}

static uint32_t parts_lookup_uid(struct mailbox *parts, uint32_t seq)
{
	const void *data;
	uint32_t uid = 0;

	mail_index_lookup_ext(parts->view, seq, parts_ext_register(parts),
			      &data, NULL);
	if (data != NULL)
		memcpy(&uid, data, sizeof(uid));
	return uid;
}

/* Which of the change's messages are among the parts already? */
static int parts_find_known(struct mailbox *parts,
			    const struct dovetail_change_mailbox *change,
			    ARRAY_TYPE(seq_range) *known)
{
	const struct dovetail_op *op;
	struct mailbox_transaction_context *t;
	struct mail *mail;
	guid_128_t here, there;
	const char *guid;
	uint32_t seq, count;
	int ret = 0;

	t = mailbox_transaction_begin(parts, 0, __func__);
	mail = mail_alloc(t, 0, NULL);
	count = mail_index_view_get_messages_count(parts->view);
	for (seq = 1; seq <= count && ret == 0; seq++) {
		uint32_t uid = parts_lookup_uid(parts, seq);

		array_foreach(&change->ops, op) {
			if (op->type != DOVETAIL_OP_APPEND ||
			    op->append.uid != uid)
				continue;
			mail_set_seq(mail, seq);
			ret = mail_get_special(mail, MAIL_FETCH_GUID, &guid);
			if (ret < 0)
				break;
			dovetail_message_guid(guid, here);
			dovetail_message_guid(op->append.guid, there);
			if (guid_128_equals(here, there))
				seq_range_array_add(known, uid);
		}
	}
	mail_free(&mail);
	mailbox_transaction_rollback(&t);
	return ret;
}

static int
parts_save(struct replay_user *user, struct mailbox *box, struct mailbox *parts,
	   const struct dovetail_change_mailbox *change,
	   const ARRAY_TYPE(seq_range) *known, const char **error_r)
{
	struct mailbox_transaction_context *t;
	const struct dovetail_op *op;
	const char *name = parts->name;
	int ret = 0;

	t = mailbox_transaction_begin(parts, REPLAY_SAVE_FLAGS, __func__);
	/* what the message says about where it belongs, to be read if all
	   indexes are lost */
	parts->name = box->name;
	array_foreach(&change->ops, op) {
		if (op->type != DOVETAIL_OP_APPEND ||
		    seq_range_exists(known, op->append.uid))
			continue;
		ret = replay_mailbox_save(user, t, change, &op->append, 0,
					  error_r);
		if (ret < 0)
			break;
		mail_index_update_ext(t->itrans, t->itrans->last_new_seq,
				      parts_ext_register(parts),
				      &op->append.uid, NULL);
	}
	parts->name = name;
	if (ret < 0) {
		mailbox_transaction_rollback(&t);
		return -1;
	}
	/* sdbox compares UIDs with sequences and would hide some */
	index_pop3_uidl_set_max_uid(parts, t->itrans, (uint32_t)-1);
	if (mailbox_transaction_commit(&t) < 0) {
		*error_r = t_strdup(mailbox_get_last_internal_error(parts, NULL));
		return -1;
	}
	return 0;
}

int replay_rebuild_add(struct replay_user *user, struct mailbox *box,
		       const struct dovetail_change_mailbox *change,
		       const char **error_r)
{
	ARRAY_TYPE(seq_range) known;
	const struct dovetail_op *op;
	struct mailbox *parts;
	int ret;

	if (parts_open(box, TRUE, &parts, error_r) < 0)
		return -1;
	t_array_init(&known, 16);
	ret = parts_find_known(parts, change, &known);
	if (ret < 0) {
		*error_r = t_strdup(mailbox_get_last_internal_error(parts, NULL));
	} else {
		ret = parts_save(user, box, parts, change, &known, error_r);
	}
	mailbox_free(&parts);
	if (ret < 0)
		return -1;
	array_foreach(&change->ops, op) {
		if (op->type == DOVETAIL_OP_APPEND &&
		    op->append.source == DOVETAIL_BODY_SPOOL)
			replay_spool_drop(op->append.spool_id);
	}
	return 0;
}

static int parts_delete(struct mailbox **_parts, const char **error_r)
{
	struct mailbox *parts = *_parts;
	enum mail_error mail_error;
	int ret;

	*_parts = NULL;
	ret = mailbox_delete(parts);
	if (ret < 0) {
		*error_r = t_strdup(mailbox_get_last_internal_error(parts,
								    &mail_error));
		if (mail_error == MAIL_ERROR_NOTFOUND)
			ret = 0;
	}
	mailbox_free(&parts);
	return ret;
}

/* When did something come last? 0: cannot tell. */
static time_t parts_last_change(struct mailbox *parts)
{
	struct stat st;
	const char *dir;

	if (mailbox_open(parts) < 0 ||
	    mailbox_get_path_to(parts, MAILBOX_LIST_PATH_TYPE_INDEX, &dir) <= 0 ||
	    stat(t_strconcat(dir, "/", parts->index_prefix, ".log", NULL),
		 &st) < 0)
		return 0;
	return st.st_mtime;
}

void replay_rebuild_clean(struct mail_namespace *ns, const char *vname,
			  bool exists)
{
	struct mailbox *parts;
	const char *error;

	parts = mailbox_alloc(ns->list, vname, MAILBOX_FLAG_IGNORE_ACLS);
	if (exists && parts_last_change(parts) + REBUILD_PARTS_SECS >
	    ioloop_time) {
		mailbox_free(&parts);
		return;
	}
	if (parts_delete(&parts, &error) < 0) {
		e_error(replay.event, "User %s: Cannot remove %s, which a "
			"repair left behind: %s", ns->owner->username, vname,
			error);
	}
}

/* ---- what is to be put in ---- */

static int rebuild_part_cmp(const struct rebuild_part *p1,
			    const struct rebuild_part *p2)
{
	if (p1->uid != p2->uid)
		return p1->uid < p2->uid ? -1 : 1;
	return p1->seq < p2->seq ? -1 : p1->seq > p2->seq ? 1 : 0;
}

/* Find the parts for uids. For one that came twice, the last counts. */
static void rebuild_read_parts(struct rebuild *rb,
			       const ARRAY_TYPE(seq_range) *uids)
{
	struct rebuild_part part, *parts;
	unsigned int i, n, count;

	count = mail_index_view_get_messages_count(rb->parts->view);
	for (part.seq = 1; part.seq <= count; part.seq++) {
		part.uid = parts_lookup_uid(rb->parts, part.seq);
		if (part.uid != 0 && seq_range_exists(uids, part.uid))
			array_push_back(&rb->list, &part);
	}
	array_sort(&rb->list, rebuild_part_cmp);
	parts = array_get_modifiable(&rb->list, &count);
	for (i = n = 0; i < count; i++) {
		if (i + 1 < count && parts[i + 1].uid == parts[i].uid)
			continue;
		parts[n++] = parts[i];
	}
	array_delete(&rb->list, n, count - n);
}

static int rebuild_get_guid(struct rebuild *rb, struct mail *mail,
			    guid_128_t guid_r)
{
	const char *guid;

	if (mail_get_special(mail, MAIL_FETCH_GUID, &guid) < 0)
		return rebuild_box_failed(rb, mail->box);
	dovetail_message_guid(guid, guid_r);
	return 0;
}

/* How many of the parts are not in the mailbox? Returns -1 when another message has
   the UID of one, and is not in drop. */
static int rebuild_count_missing(struct rebuild *rb,
				 const ARRAY_TYPE(seq_range) *drop)
{
	const struct rebuild_part *part;
	struct mailbox_transaction_context *t;
	struct mail *mail;
	guid_128_t here, there;
	int missing = 0;

	t = mailbox_transaction_begin(rb->box, 0, __func__);
	mail = mail_alloc(t, 0, NULL);
	array_foreach(&rb->list, part) {
		if (seq_range_exists(drop, part->uid) ||
		    !mail_set_uid(mail, part->uid)) {
			missing++;
			continue;
		}
		mail_set_seq(rb->mail, part->seq);
		if (rebuild_get_guid(rb, mail, here) < 0 ||
		    rebuild_get_guid(rb, rb->mail, there) < 0) {
			missing = -1;
			break;
		}
		if (!guid_128_equals(here, there)) {
			rb->error = t_strdup_printf(
				"UID %u is another message here", part->uid);
			missing = -1;
			break;
		}
	}
	mail_free(&mail);
	mailbox_transaction_rollback(&t);
	return missing;
}

/* ---- what is to be taken out ---- */

static int guid_cmp(const void *g1, const void *g2)
{
	return memcmp(g1, g2, GUID_128_SIZE);
}

static int hash_cmp(const void *h1, const void *h2)
{
	return memcmp(h1, h2, DOVETAIL_MESSAGE_HASH_SIZE);
}

static bool buffer_has(const buffer_t *buf, const void *key, size_t size,
		       int (*cmp)(const void *, const void *))
{
	return buf->used > 0 &&
		bsearch(key, buf->data, buf->used / size, size, cmp) != NULL;
}

static void buffer_sort(buffer_t *buf, size_t size,
			int (*cmp)(const void *, const void *))
{
	if (buf->used > 0) {
		qsort(buffer_get_modifiable_data(buf, NULL), buf->used / size,
		      size, cmp);
	}
}

/* GUIDs of the messages that come. */
static int rebuild_coming(struct rebuild *rb, buffer_t *guids)
{
	const struct rebuild_part *part;
	guid_128_t guid;

	array_foreach(&rb->list, part) {
		mail_set_seq(rb->mail, part->seq);
		if (rebuild_get_guid(rb, rb->mail, guid) < 0)
			return -1;
		buffer_append(guids, guid, sizeof(guid));
	}
	buffer_sort(guids, GUID_128_SIZE, guid_cmp);
	return 0;
}

/* Hashes of the messages that stay. */
static void rebuild_staying(struct rebuild *rb,
			    struct dovetail_mailbox_digest *md,
			    const ARRAY_TYPE(seq_range) *drop, buffer_t *hashes)
{
	uint8_t hash[DOVETAIL_MESSAGE_HASH_SIZE];
	uint32_t seq, uid, count;

	count = mail_index_view_get_messages_count(rb->box->view);
	for (seq = 1; seq <= count; seq++) {
		mail_index_lookup_uid(rb->box->view, seq, &uid);
		if (!seq_range_exists(drop, uid) &&
		    dovetail_mailbox_digest_get(md, uid, hash))
			buffer_append(hashes, hash, sizeof(hash));
	}
	buffer_sort(hashes, sizeof(hash), hash_cmp);
}

/* Those of drop that are nowhere else. */
static int rebuild_find_only_here(struct rebuild *rb,
				  const ARRAY_TYPE(seq_range) *drop,
				  ARRAY_TYPE(seq_range) *only)
{
	struct mailbox_transaction_context *t;
	struct dovetail_mailbox_digest *md;
	uint8_t hash[DOVETAIL_MESSAGE_HASH_SIZE];
	buffer_t *guids = buffer_create_dynamic(default_pool, 1024);
	buffer_t *hashes = buffer_create_dynamic(default_pool, 1024);
	struct mail *mail;
	guid_128_t guid;
	uint32_t seq, count;
	int ret;

	md = dovetail_mailbox_digest_open(rb->box);
	rebuild_staying(rb, md, drop, hashes);
	ret = rebuild_coming(rb, guids);

	t = mailbox_transaction_begin(rb->box, 0, __func__);
	mail = mail_alloc(t, 0, NULL);
	count = mail_index_view_get_messages_count(t->view);
	for (seq = 1; seq <= count && ret == 0; seq++) {
		mail_set_seq(mail, seq);
		if (!seq_range_exists(drop, mail->uid))
			continue;
		ret = rebuild_get_guid(rb, mail, guid);
		if (ret < 0 ||
		    buffer_has(guids, guid, sizeof(guid), guid_cmp) ||
		    (dovetail_mailbox_digest_get(md, mail->uid, hash) &&
		     buffer_has(hashes, hash, sizeof(hash), hash_cmp)))
			continue;
		seq_range_array_add(only, mail->uid);
	}
	mail_free(&mail);
	mailbox_transaction_rollback(&t);
	dovetail_mailbox_digest_close(&md);
	buffer_free(&guids);
	buffer_free(&hashes);
	return ret;
}

static void rebuild_remove_parts(struct rebuild *rb,
				 const ARRAY_TYPE(seq_range) *uids)
{
	const struct rebuild_part *part;
	unsigned int i = array_count(&rb->list);

	while (i-- > 0) {
		part = array_idx(&rb->list, i);
		if (seq_range_exists(uids, part->uid))
			array_delete(&rb->list, i, 1);
	}
}

/* See to it that nothing is lost with the messages drop. Returns how many have to
   stay, and are no longer in drop, or -1. */
static int rebuild_keep(struct rebuild *rb, ARRAY_TYPE(seq_range) *drop)
{
	ARRAY_TYPE(seq_range) only;
	struct seq_range_iter iter;
	unsigned int n = 0;
	uint32_t uid;

	if (array_count(drop) == 0)
		return 0;
	t_array_init(&only, 8);
	if (rebuild_find_only_here(rb, drop, &only) < 0)
		return -1;
	if (array_count(&only) == 0)
		return 0;
	if (replay.set.repair_extra == DOVETAIL_REPAIR_EXTRA_KEEP)
		return replay_keep(rb->box, &only, &rb->error);

	seq_range_array_iter_init(&iter, &only);
	while (seq_range_array_iter_nth(&iter, n++, &uid)) {
		e_warning(replay.event, "User %s mailbox %s: UID %u is a "
			"message that the primary has not: it stays "
			"(dovetail_repair_extra=report)",
			mailbox_get_namespace(rb->box)->owner->username,
			rb->box->vname, uid);
	}
	seq_range_array_remove_seq_range(drop, &only);
	rebuild_remove_parts(rb, &only);
	return seq_range_count(&only);
}

/* Remove what is in the list and in the mailbox. */
static void rebuild_drop_present(struct rebuild *rb)
{
	const struct rebuild_part *part;
	unsigned int i = array_count(&rb->list);
	uint32_t seq;

	while (i-- > 0) {
		part = array_idx(&rb->list, i);
		if (mail_index_lookup_seq(rb->view, part->uid, &seq))
			array_delete(&rb->list, i, 1);
	}
}

static int rebuild_expunge(struct rebuild *rb, const ARRAY_TYPE(seq_range) *uids)
{
	struct mailbox_transaction_context *t;
	struct mail *mail;
	uint32_t seq, count;

	if (array_count(uids) == 0)
		return 0;
	t = mailbox_transaction_begin(rb->box, REPLAY_UPDATE_FLAGS, __func__);
	mail = mail_alloc(t, 0, NULL);
	count = mail_index_view_get_messages_count(t->view);
	for (seq = 1; seq <= count; seq++) {
		mail_set_seq(mail, seq);
		if (seq_range_exists(uids, mail->uid))
			mail_expunge(mail);
	}
	mail_free(&mail);
	if (mailbox_transaction_commit(&t) < 0 || mailbox_sync(rb->box, 0) < 0)
		return rebuild_box_failed(rb, rb->box);
	return 0;
}

/* ---- the index ---- */

/* Extensions that are not taken along: what changes by itself, what is set
   otherwise, and what would not be true any more. */
static bool rebuild_skips_ext(struct rebuild *rb, const struct mail_index_ext *ext)
{
	struct mail_index *index = rb->box->index;

	return ext->index_idx == index->keywords_ext_id ||
		ext->index_idx == index->modseq_ext_id ||
		ext->index_idx == rb->box->vsize_hdr_ext_id;
}

/* The header of an extension, but for these. */
static bool rebuild_skips_ext_header(const struct mail_index_ext *ext)
{
	/* the digest is computed afresh; Maildir's is about its directories */
	return strcmp(ext->name, DOVETAIL_DIGEST_EXT_NAME) == 0 ||
		strcmp(ext->name, "maildir") == 0;
}

static void rebuild_ext_headers(struct rebuild *rb)
{
	const struct mail_index_ext *ext;
	const void *data;
	size_t size;

	if (!array_is_created(&rb->view->map->extensions))
		return;
	array_foreach(&rb->view->map->extensions, ext) {
		if (rebuild_skips_ext(rb, ext))
			continue;
		if (ext->reset_id != 0) {
			mail_index_ext_reset(rb->trans, ext->index_idx,
					     ext->reset_id, TRUE);
		}
		mail_index_get_header_ext(rb->view, ext->index_idx,
					  &data, &size);
		if (size > 0 && !rebuild_skips_ext_header(ext)) {
			mail_index_update_header_ext(rb->trans, ext->index_idx,
						     0, data, size);
		}
	}
}

/* A message that is there. */
static void rebuild_append_old(struct rebuild *rb, uint32_t old_seq)
{
	const struct mail_index_registered_ext *rext;
	const struct mail_index_record *rec;
	const struct mail_index_ext *ext;
	ARRAY_TYPE(keyword_indexes) indexes;
	struct mail_keywords *keywords;
	const void *data;
	uint32_t seq;

	rec = mail_index_lookup(rb->view, old_seq);
	mail_index_append(rb->trans, rec->uid, &seq);
	mail_index_update_flags(rb->trans, seq, MODIFY_REPLACE, rec->flags);

	t_array_init(&indexes, 32);
	mail_index_lookup_keywords(rb->view, old_seq, &indexes);
	if (array_count(&indexes) > 0) {
		keywords = mail_index_keywords_create_from_indexes(
			rb->box->index, &indexes);
		mail_index_update_keywords(rb->trans, seq, MODIFY_REPLACE,
					   keywords);
		mail_index_keywords_unref(&keywords);
	}
	mail_index_update_modseq(rb->trans, seq,
				 mail_index_modseq_lookup(rb->view, old_seq));
	array_foreach(&rb->view->map->extensions, ext) {
		rext = array_idx(&rb->box->index->extensions, ext->index_idx);
		if (rebuild_skips_ext(rb, ext) || ext->record_size == 0 ||
		    ext->record_size != rext->record_size)
			continue;
		mail_index_lookup_ext(rb->view, old_seq, ext->index_idx,
				      &data, NULL);
		if (data != NULL) {
			mail_index_update_ext(rb->trans, seq, ext->index_idx,
					      data, NULL);
		}
	}
}

/* What mdbox knows of a message is in the index only. */
static void rebuild_append_mdbox(struct rebuild *rb, uint32_t parts_seq,
				 uint32_t seq)
{
	struct mdbox_mailbox *from = MDBOX_MAILBOX(rb->parts);
	struct mdbox_mailbox *to = MDBOX_MAILBOX(rb->box);
	const void *data;

	mail_index_lookup_ext(rb->parts->view, parts_seq, from->ext_id,
			      &data, NULL);
	if (data != NULL)
		mail_index_update_ext(rb->trans, seq, to->ext_id, data, NULL);
	mail_index_lookup_ext(rb->parts->view, parts_seq, from->guid_ext_id,
			      &data, NULL);
	if (data != NULL) {
		mail_index_update_ext(rb->trans, seq, to->guid_ext_id, data,
				      NULL);
	}
}

static void rebuild_append_part(struct rebuild *rb,
				const struct rebuild_part *part)
{
	uint8_t hash[DOVETAIL_MESSAGE_HASH_SIZE];
	const char *const *names;
	struct mail_keywords *keywords;
	enum mail_flags flags;
	uint32_t seq;

	mail_set_seq(rb->mail, part->seq);
	flags = mail_get_flags(rb->mail) & REBUILD_FLAGS_MASK;
	names = mail_get_keywords(rb->mail);

	mail_index_append(rb->trans, part->uid, &seq);
	mail_index_update_flags(rb->trans, seq, MODIFY_REPLACE, flags);
	if (names[0] != NULL) {
		keywords = mail_index_keywords_create(rb->box->index, names);
		mail_index_update_keywords(rb->trans, seq, MODIFY_REPLACE,
					   keywords);
		mail_index_keywords_unref(&keywords);
	}
	mail_index_update_modseq(rb->trans, seq, mail_get_modseq(rb->mail));
	if (strcmp(rb->box->storage->name, MDBOX_STORAGE_NAME) == 0)
		rebuild_append_mdbox(rb, part->seq, seq);
	if (dovetail_mailbox_digest_get(rb->digest, rb->mail->uid, hash)) {
		dovetail_mailbox_digest_update(rb->box, rb->trans, seq, flags,
					       names, hash);
	}
}

static void rebuild_messages(struct rebuild *rb)
{
	const struct rebuild_part *part;
	uint32_t seq = 1, uid, count;

	count = mail_index_view_get_messages_count(rb->view);
	array_foreach(&rb->list, part) {
		for (; seq <= count; seq++) {
			mail_index_lookup_uid(rb->view, seq, &uid);
			if (uid > part->uid)
				break;
			T_BEGIN {
				rebuild_append_old(rb, seq);
			} T_END;
		}
		T_BEGIN {
			rebuild_append_part(rb, part);
		} T_END;
	}
	for (; seq <= count; seq++) T_BEGIN {
		rebuild_append_old(rb, seq);
	} T_END;
}

/* Is there a message in the parts that has a POP3 UIDL or order? The formats that
   keep a note of that in the mailbox' header have to know. */
static void rebuild_pop3_header(struct rebuild *rb)
{
	const struct rebuild_part *last = array_back(&rb->list);
	struct mailbox_index_pop3_uidl uidl;
	const struct mdbox_mailbox *mdbox, *mdbox_parts;
	const struct sdbox_mailbox *sdbox, *sdbox_parts;
	uint32_t ext_id, parts_ext_id;
	const void *data, *parts_data;
	size_t offset, size, parts_size;
	uint8_t flags, parts_flags;

	mail_index_get_header_ext(rb->view, rb->box->pop3_uidl_hdr_ext_id,
				  &data, &size);
	if (size >= sizeof(uidl)) {
		memcpy(&uidl, data, sizeof(uidl));
		index_pop3_uidl_set_max_uid(rb->box, rb->trans,
			I_MAX(uidl.max_uid_with_pop3_uidl, last->uid));
	}

	if (strcmp(rb->box->storage->name, MDBOX_STORAGE_NAME) == 0) {
		mdbox = MDBOX_MAILBOX(rb->box);
		mdbox_parts = MDBOX_MAILBOX(rb->parts);
		ext_id = mdbox->hdr_ext_id;
		parts_ext_id = mdbox_parts->hdr_ext_id;
		offset = offsetof(struct mdbox_index_header, flags);
	} else if (strcmp(rb->box->storage->name, SDBOX_STORAGE_NAME) == 0) {
		sdbox = SDBOX_MAILBOX(rb->box);
		sdbox_parts = SDBOX_MAILBOX(rb->parts);
		ext_id = sdbox->hdr_ext_id;
		parts_ext_id = sdbox_parts->hdr_ext_id;
		offset = offsetof(struct sdbox_index_header, flags);
	} else {
		return;
	}
	mail_index_get_header_ext(rb->view, ext_id, &data, &size);
	mail_index_get_header_ext(rb->parts->view, parts_ext_id, &parts_data,
				  &parts_size);
	if (size > offset && parts_size > offset) {
		flags = *((const uint8_t *)data + offset);
		parts_flags = *((const uint8_t *)parts_data + offset);
		flags |= parts_flags;
		mail_index_update_header_ext(rb->trans, ext_id, offset,
					     &flags, sizeof(flags));
	}
}

#define REBUILD_SET_HEADER(trans, field, value, prepend) \
	mail_index_update_header(trans, \
		offsetof(struct mail_index_header, field), \
		&(value), sizeof(value), prepend)

static void rebuild_header(struct rebuild *rb, uint32_t uid_next)
{
	const struct mail_index_header *hdr = mail_index_get_header(rb->view);
	struct mail_index *index = rb->box->index;
	struct mail_index_modseq_header modseq;
	const struct rebuild_part *last;
	uint32_t uid_validity = hdr->uid_validity;
	uint32_t first_recent_uid, count;

	/* dovecot-uidlist's must not go down: who has read it would take the
	   file for broken, and delete it */
	if (uid_next == 0 ||
	    strcmp(rb->box->storage->name, MAILDIR_STORAGE_NAME) == 0)
		uid_next = I_MAX(uid_next, hdr->next_uid);
	count = hdr->messages_count;
	if (count > 0) {
		uid_next = I_MAX(uid_next,
				 mail_index_lookup(rb->view, count)->uid + 1);
	}
	if (array_count(&rb->list) > 0) {
		last = array_back(&rb->list);
		uid_next = I_MAX(uid_next, last->uid + 1);
	}
	first_recent_uid = I_MIN(hdr->first_recent_uid, uid_next);

	REBUILD_SET_HEADER(rb->trans, uid_validity, uid_validity, TRUE);
	REBUILD_SET_HEADER(rb->trans, next_uid, uid_next, FALSE);
	REBUILD_SET_HEADER(rb->trans, first_recent_uid, first_recent_uid,
			   FALSE);
	i_zero(&modseq);
	modseq.highest_modseq = mail_index_modseq_get_highest(rb->view);
	mail_index_update_header_ext(rb->trans, index->modseq_ext_id, 0,
				     &modseq, sizeof(modseq));
}

static int rebuild_write_index(struct rebuild *rb, uint32_t uid_next)
{
	rb->trans = mail_index_transaction_begin(rb->view,
		MAIL_INDEX_TRANSACTION_FLAG_EXTERNAL |
		MAIL_INDEX_TRANSACTION_FLAG_FSYNC);
	mail_index_reset(rb->trans);
	rebuild_ext_headers(rb);
	rebuild_messages(rb);
	if (array_count(&rb->list) > 0)
		rebuild_pop3_header(rb);
	rebuild_header(rb, uid_next);
	if (mail_index_transaction_commit(&rb->trans) < 0) {
		rb->error = dovetail_index_error(rb->box->index);
		return -1;
	}
	return 0;
}

/* ---- the formats ---- */

/* Give the part's file a second name. One that exists is of an attempt that did not
   come to its end: no message in the index has it. */
static int rebuild_link(struct rebuild *rb, const char *from, const char *to)
{
	i_unlink_if_exists(to);
	if (link(from, to) < 0) {
		rb->error = t_strdup_printf("link(%s, %s) failed: %m", from, to);
		return -1;
	}
	return 0;
}

static int rebuild_sync_dir(struct rebuild *rb, const char *dir)
{
	if (rb->box->storage->set->parsed_fsync_mode != FSYNC_MODE_NEVER &&
	    fdatasync_path(dir) < 0) {
		rb->error = t_strdup_printf("fdatasync_path(%s) failed: %m",
					    dir);
		return -1;
	}
	return 0;
}

static int rebuild_locked_sdbox(struct rebuild *rb, uint32_t uid_next)
{
	const char *to = mailbox_get_path(rb->box);
	const struct rebuild_part *part;
	uint32_t uid;
	int ret = 0;

	array_foreach(&rb->list, part) {
		mail_index_lookup_uid(rb->parts->view, part->seq, &uid);
		T_BEGIN {
			ret = rebuild_link(rb,
				t_strdup_printf("%s/"SDBOX_MAIL_FILE_FORMAT,
					mailbox_get_path(rb->parts), uid),
				t_strdup_printf("%s/"SDBOX_MAIL_FILE_FORMAT,
						to, part->uid));
		} T_END_PASS_STR_IF(ret < 0, &rb->error);
		if (ret < 0)
			return -1;
	}
	return rebuild_sync_dir(rb, to) < 0 ||
		rebuild_write_index(rb, uid_next) < 0 ? -1 : 0;
}

static int
rebuild_locked_mdbox(struct rebuild *rb, uint32_t uid_next,
		     struct mdbox_map_transaction_context *map_trans)
{
	const struct rebuild_part *part;
	uint32_t map_uid;

	array_foreach(&rb->list, part) {
		if (mdbox_mail_lookup(MDBOX_MAILBOX(rb->parts),
				      rb->parts->view, part->seq,
				      &map_uid) < 0 ||
		    mdbox_map_update_refcount(map_trans, map_uid, 1) < 0)
			return rebuild_box_failed(rb, rb->parts);
	}
	if (mdbox_map_transaction_commit(map_trans, "repairing") < 0)
		return rebuild_box_failed(rb, rb->parts);
	return rebuild_write_index(rb, uid_next);
}

struct rebuild_maildir_file {
	struct rebuild *rb;
	pool_t pool;
	enum mail_flags flags;
	/* from the pool */
	const char *fname;
};

static int rebuild_maildir_link(struct maildir_mailbox *mbox ATTR_UNUSED,
				const char *path,
				struct rebuild_maildir_file *file)
{
	const char *fname = strrchr(path, '/') + 1;

	if (access(path, F_OK) < 0 && errno == ENOENT)
		return 0;
	/* keywords have other letters in each Maildir */
	fname = t_strcut(fname, *MAILDIR_INFO_SEP_S);
	file->fname = p_strdup(file->pool,
			       maildir_filename_flags_set(fname, file->flags));
	return rebuild_link(file->rb, path,
		t_strdup_printf("%s/tmp/%s", mailbox_get_path(file->rb->box),
				file->fname)) < 0 ? -1 : 1;
}

/* Link the part's file into tmp/, add it to the UID list and to fnames, whose
   memory is the pool's. */
static int
rebuild_maildir_part(struct rebuild *rb, const struct rebuild_part *part,
		     struct maildir_uidlist_sync_ctx *sync, pool_t pool,
		     ARRAY_TYPE(const_string) *fnames)
{
	struct maildir_mailbox *from = MAILDIR_MAILBOX(rb->parts);
	struct maildir_uidlist_rec *rec;
	struct rebuild_maildir_file file;
	const char *value;
	char key;

	i_zero(&file);
	file.rb = rb;
	file.pool = pool;
	mail_set_seq(rb->mail, part->seq);
	file.flags = mail_get_flags(rb->mail) & REBUILD_FLAGS_MASK;
	if (maildir_file_do(from, rb->mail->uid, rebuild_maildir_link,
			    &file) <= 0) {
		if (rb->error == NULL)
			(void)rebuild_box_failed(rb, rb->parts);
		return -1;
	}
	if (maildir_uidlist_sync_next_uid(sync, file.fname, part->uid, 0,
					  &rec) < 0 || rec == NULL) {
		rb->error = "Cannot add to the UID list";
		return -1;
	}
	for (key = 'A'; key <= 'Z'; key++) {
		value = maildir_uidlist_lookup_ext(from->uidlist,
						   rb->mail->uid, key);
		if (value != NULL)
			maildir_uidlist_sync_set_ext(sync, rec, key, value);
	}
	array_push_back(fnames, &file.fname);
	return 0;
}

static int
rebuild_maildir_list(struct rebuild *rb, struct maildir_uidlist_sync_ctx *sync,
		     pool_t pool, ARRAY_TYPE(const_string) *fnames)
{
	struct maildir_mailbox *mbox = MAILDIR_MAILBOX(rb->box);
	struct maildir_uidlist_iter_ctx *iter;
	struct maildir_uidlist_rec *rec;
	enum maildir_uidlist_rec_flag flags;
	const struct rebuild_part *part;
	const char *fname;
	uint32_t uid;
	int ret = 0;

	iter = maildir_uidlist_iter_init(mbox->uidlist);
	while (ret >= 0 &&
	       maildir_uidlist_iter_next(iter, &uid, &flags, &fname)) {
		ret = maildir_uidlist_sync_next_uid(sync, fname, uid, flags,
						    &rec);
	}
	maildir_uidlist_iter_deinit(&iter);
	if (ret < 0) {
		rb->error = "Cannot read the UID list";
		return -1;
	}
	array_foreach(&rb->list, part) {
		T_BEGIN {
			ret = rebuild_maildir_part(rb, part, sync, pool,
						   fnames);
		} T_END_PASS_STR_IF(ret < 0, &rb->error);
		if (ret < 0)
			return -1;
	}
	return 0;
}

static int rebuild_maildir_show(struct rebuild *rb,
				const ARRAY_TYPE(const_string) *fnames)
{
	const char *path = mailbox_get_path(rb->box);
	const char *fname;
	int ret = 0;

	array_foreach_elem(fnames, fname) {
		T_BEGIN {
			const char *from, *to;

			from = t_strdup_printf("%s/tmp/%s", path, fname);
			to = t_strdup_printf("%s/cur/%s", path, fname);
			ret = rename(from, to);
			if (ret < 0) {
				rb->error = t_strdup_printf(
					"rename(%s, %s) failed: %m", from, to);
			}
		} T_END_PASS_STR_IF(ret < 0, &rb->error);
		if (ret < 0)
			return -1;
	}
	return rebuild_sync_dir(rb, t_strconcat(path, "/cur", NULL));
}

static int rebuild_locked_maildir(struct rebuild *rb, uint32_t uid_next)
{
	struct maildir_mailbox *mbox = MAILDIR_MAILBOX(rb->box);
	struct maildir_uidlist_sync_ctx *sync;
	ARRAY_TYPE(const_string) fnames;
	pool_t pool;
	int ret;

	if (maildir_uidlist_sync_init(mbox->uidlist, 0, &sync) <= 0)
		return rebuild_box_failed(rb, rb->box);
	pool = pool_alloconly_create("rebuild maildir", 4096);
	p_array_init(&fnames, pool, array_count(&rb->list) + 1);
	ret = rebuild_maildir_list(rb, sync, pool, &fnames);
	/* The index first: the list is written without those that are not in
	   it. The files last: one that no list knows would get another UID. */
	if (ret == 0)
		ret = rebuild_write_index(rb, uid_next);
	maildir_uidlist_sync_recreate(sync);
	if (maildir_uidlist_sync_deinit(&sync, ret == 0) < 0 && ret == 0)
		ret = rebuild_box_failed(rb, rb->box);
	if (ret == 0)
		ret = rebuild_maildir_show(rb, &fnames);
	pool_unref(&pool);
	return ret;
}

enum rebuild_format {
	REBUILD_SDBOX,
	REBUILD_MDBOX,
	REBUILD_MAILDIR,
};

static int rebuild_get_format(struct rebuild *rb, enum rebuild_format *format_r)
{
	const char *name = rb->box->storage->name;
	const struct dbox_storage *dbox;

	if (strcmp(name, SDBOX_STORAGE_NAME) == 0) {
		/* an attachment's name has the mailbox' GUID in it */
		dbox = DBOX_STORAGE(rb->box->storage);
		if (dbox->attachment_dir != NULL) {
			rb->error = "Messages with attachments in files of "
				"their own cannot be put into the middle of a "
				"mailbox: delete the mailbox here to get it anew";
			return -1;
		}
		*format_r = REBUILD_SDBOX;
	} else if (strcmp(name, MDBOX_STORAGE_NAME) == 0)
		*format_r = REBUILD_MDBOX;
	else if (strcmp(name, MAILDIR_STORAGE_NAME) == 0)
		*format_r = REBUILD_MAILDIR;
	else {
		rb->error = t_strdup_printf(
			"Messages cannot be put into the middle of a mailbox of "
			"format %s: delete the mailbox here to get it anew",
			name);
		return -1;
	}
	return 0;
}

/* Returns 1: done.  0: something waits in the index to be done in the store, and
   would be forgotten: sync first.  -1: failed. */
static int
rebuild_with_lock(struct rebuild *rb, enum rebuild_format format,
		  uint32_t uid_next,
		  struct mdbox_map_transaction_context *map_trans)
{
	struct mail_index_sync_ctx *sync;
	struct mail_index_view *sync_view;
	struct mail_index_transaction *sync_trans;
	struct mail_index_sync_rec rec;
	int ret = -1;

	if (mail_index_sync_begin(rb->box->index, &sync, &sync_view,
				  &sync_trans, 0) < 0) {
		rb->error = dovetail_index_error(rb->box->index);
		return -1;
	}
	if (mail_index_sync_next(sync, &rec)) {
		mail_index_sync_rollback(&sync);
		return 0;
	}
	rb->view = mail_index_view_open(rb->box->index);
	rebuild_drop_present(rb);
	switch (format) {
	case REBUILD_SDBOX:
		ret = rebuild_locked_sdbox(rb, uid_next);
		break;
	case REBUILD_MDBOX:
		ret = rebuild_locked_mdbox(rb, uid_next, map_trans);
		break;
	case REBUILD_MAILDIR:
		ret = rebuild_locked_maildir(rb, uid_next);
		break;
	}
	mail_index_view_close(&rb->view);
	mail_index_sync_rollback(&sync);
	return ret < 0 ? -1 : 1;
}

/* Other processes lock the map before a mailbox ... */
static int rebuild_try_mdbox(struct rebuild *rb, uint32_t uid_next)
{
	struct mdbox_storage *storage = MDBOX_STORAGE(rb->box->storage);
	struct mdbox_map_atomic_context *atomic;
	struct mdbox_map_transaction_context *map_trans;
	int ret;

	atomic = mdbox_map_atomic_begin(storage->map);
	if (mdbox_map_atomic_lock(atomic, "repairing") < 0) {
		(void)mdbox_map_atomic_finish(&atomic);
		return rebuild_box_failed(rb, rb->box);
	}
	map_trans = mdbox_map_transaction_begin(atomic, FALSE);
	ret = rebuild_with_lock(rb, REBUILD_MDBOX, uid_next, map_trans);
	mdbox_map_transaction_free(&map_trans);
	if (mdbox_map_atomic_finish(&atomic) < 0 && ret >= 0)
		ret = rebuild_box_failed(rb, rb->box);
	return ret;
}

/* ... and the UID list before the index. */
static int rebuild_try_maildir(struct rebuild *rb, uint32_t uid_next)
{
	struct maildir_mailbox *maildir = MAILDIR_MAILBOX(rb->box);
	int ret;

	if (maildir_uidlist_lock(maildir->uidlist) <= 0)
		return rebuild_box_failed(rb, rb->box);
	ret = rebuild_with_lock(rb, REBUILD_MAILDIR, uid_next, NULL);
	maildir_uidlist_unlock(maildir->uidlist);
	return ret;
}

static int rebuild_run(struct rebuild *rb, uint32_t uid_next)
{
	enum rebuild_format format;
	unsigned int i;
	int ret = -1;

	if (rebuild_get_format(rb, &format) < 0)
		return -1;
	for (i = 0; i < REBUILD_LOCK_TRIES; i++) {
		if (mailbox_sync(rb->box, MAILBOX_SYNC_FLAG_FULL_READ) < 0)
			return rebuild_box_failed(rb, rb->box);
		switch (format) {
		case REBUILD_SDBOX:
			ret = rebuild_with_lock(rb, format, uid_next, NULL);
			break;
		case REBUILD_MDBOX:
			ret = rebuild_try_mdbox(rb, uid_next);
			break;
		case REBUILD_MAILDIR:
			ret = rebuild_try_maildir(rb, uid_next);
			break;
		}
		if (ret != 0)
			return ret < 0 ? -1 : 0;
	}
	rb->error = "Something else keeps changing the mailbox";
	return -1;
}

/* ---- all together ---- */

/* What neither the index nor the file has: a Maildir's keywords, and the save date
   of formats that keep it in the cache. */
static int rebuild_finish(struct rebuild *rb)
{
	struct index_mailbox_context *ibox = INDEX_STORAGE_CONTEXT(rb->box);
	struct mailbox_transaction_context *t;
	const struct rebuild_part *part;
	struct mail *mail;
	time_t date;
	uint32_t date32;
	bool cached;
	int ret = 0;

	cached = strcmp(rb->box->storage->name, MDBOX_STORAGE_NAME) != 0;
	t = mailbox_transaction_begin(rb->box, REPLAY_UPDATE_FLAGS, __func__);
	mail = mail_alloc(t, MAIL_FETCH_FLAGS, NULL);
	array_foreach(&rb->list, part) {
		if (!mail_set_uid(mail, part->uid))
			continue;
		mail_set_seq(rb->mail, part->seq);
		T_BEGIN {
			replay_mail_set_state(rb->box, mail,
				mail_get_flags(rb->mail) & REBUILD_FLAGS_MASK,
				mail_get_keywords(rb->mail),
				mail_get_modseq(rb->mail));
		} T_END;
		if (mail_get_save_date(rb->mail, &date) < 0) {
			ret = rebuild_box_failed(rb, rb->parts);
			break;
		}
		date32 = date;
		if (cached) {
			mail_cache_add(t->cache_trans, mail->seq,
				ibox->cache_fields[MAIL_CACHE_SAVE_DATE].idx,
				&date32, sizeof(date32));
		}
	}
	mail_free(&mail);
	if (mailbox_transaction_commit(&t) < 0 ||
	    mailbox_sync(rb->box, 0) < 0)
		ret = rebuild_box_failed(rb, rb->box);
	return ret;
}

static void rebuild_close_parts(struct rebuild *rb)
{
	dovetail_mailbox_digest_close(&rb->digest);
	if (rb->mail != NULL) {
		mail_free(&rb->mail);
		mailbox_transaction_rollback(&rb->parts_trans);
	}
}

/* Is UIDNEXT higher than it has to be, and can it be mended? */
static bool rebuild_wants_uid_next(struct rebuild *rb, uint32_t uid_next)
{
	struct mailbox_status status;
	uint32_t count = mail_index_view_get_messages_count(rb->box->view);
	uint32_t last = 0;

	if (uid_next == 0 ||
	    strcmp(rb->box->storage->name, MAILDIR_STORAGE_NAME) == 0)
		return FALSE;
	if (count > 0)
		mail_index_lookup_uid(rb->box->view, count, &last);
	mailbox_get_open_status(rb->box, STATUS_UIDNEXT, &status);
	return status.uidnext > I_MAX(uid_next, last + 1);
}

static int rebuild_open_box(struct rebuild *rb, struct mailbox_list *list,
			    const char *vname)
{
	rb->box = mailbox_alloc(list, vname, MAILBOX_FLAG_IGNORE_ACLS);
	if (mailbox_sync(rb->box, MAILBOX_SYNC_FLAG_FULL_READ) < 0)
		return rebuild_box_failed(rb, rb->box);
	return 0;
}

static int rebuild_mailbox(struct rebuild *rb, ARRAY_TYPE(seq_range) *drop,
			   uint32_t uid_next)
{
	struct mailbox_list *list = rb->box->list;
	const char *vname = t_strdup(rb->box->vname);
	int missing, left;

	left = rebuild_keep(rb, drop);
	if (left < 0)
		return -1;
	missing = rebuild_count_missing(rb, drop);
	if (missing < 0 || rebuild_expunge(rb, drop) < 0)
		return -1;
	if (missing > 0 || rebuild_wants_uid_next(rb, uid_next)) {
		if (rebuild_run(rb, uid_next) < 0)
			return -1;
		/* its view is of an index that is no more */
		mailbox_free(&rb->box);
		if (rebuild_open_box(rb, list, vname) < 0)
			return -1;
	}
	if (array_count(&rb->list) > 0 && rebuild_finish(rb) < 0)
		return -1;
	return left;
}

int replay_rebuild(struct replay_user *user, struct mailbox *box,
		   const ARRAY_TYPE(seq_range) *drop,
		   const ARRAY_TYPE(seq_range) *add, uint32_t uid_next,
		   const char **error_r)
{
	struct mailbox_list *list = box->list;
	const char *vname = t_strdup(box->vname);
	ARRAY_TYPE(seq_range) out;
	struct rebuild rb;
	int ret;

	t_array_init(&out, 16);
	if (drop != NULL)
		array_append_array(&out, drop);
	i_zero(&rb);
	/* Nothing that knows the old index may write to the new one. */
	replay_user_forget_mailboxes(user);
	i_array_init(&rb.list, 64);
	ret = rebuild_open_box(&rb, list, vname);
	if (ret == 0)
		ret = parts_open(rb.box, FALSE, &rb.parts, &rb.error);
	if (ret > 0) {
		rb.parts_trans = mailbox_transaction_begin(rb.parts, 0,
							   __func__);
		rb.mail = mail_alloc(rb.parts_trans, MAIL_FETCH_FLAGS, NULL);
		rb.digest = dovetail_mailbox_digest_open(rb.parts);
		if (add != NULL)
			rebuild_read_parts(&rb, add);
	}
	if (ret >= 0)
		ret = rebuild_mailbox(&rb, &out, uid_next);
	rebuild_close_parts(&rb);
	array_free(&rb.list);
	mailbox_free(&rb.box);
	if (rb.parts != NULL) {
		if (ret < 0)
			mailbox_free(&rb.parts);
		else if (parts_delete(&rb.parts, &rb.error) < 0)
			ret = -1;
	}
	if (ret < 0)
		*error_r = rb.error;
	return ret;
}

/* Returns 1: there are parts, 0: not, -1. Of a directory left over nothing remains. */
static int parts_exist(struct mailbox *box, const char **error_r)
{
	struct mail_namespace *ns = mailbox_get_namespace(box);
	struct mailbox_metadata metadata;
	enum mailbox_existence existence;
	struct mailbox *parts;
	int ret;

	if (mailbox_get_metadata(box, MAILBOX_METADATA_GUID, &metadata) < 0) {
		*error_r = t_strdup(mailbox_get_last_internal_error(box, NULL));
		return -1;
	}
	parts = mailbox_alloc(ns->list,
			      dovetail_name_of_parts(ns, metadata.guid),
			      MAILBOX_FLAG_IGNORE_ACLS);
	ret = mailbox_exists(parts, FALSE, &existence);
	if (ret < 0) {
		*error_r = t_strdup(mailbox_get_last_internal_error(parts,
								    NULL));
	} else if (existence == MAILBOX_EXISTENCE_NOSELECT) {
		return parts_delete(&parts, error_r);
	}
	mailbox_free(&parts);
	return ret < 0 ? -1 : existence == MAILBOX_EXISTENCE_SELECT ? 1 : 0;
}

void replay_rebuild_finish(struct replay_user *user, struct mailbox *box)
{
	ARRAY_TYPE(seq_range) present;
	const char *error, *vname = t_strdup(box->vname);
	uint32_t seq, count, uid;
	int ret;

	ret = parts_exist(box, &error);
	if (ret > 0) {
		t_array_init(&present, 16);
		count = mail_index_view_get_messages_count(box->view);
		for (seq = 1; seq <= count; seq++) {
			mail_index_lookup_uid(box->view, seq, &uid);
			seq_range_array_add(&present, uid);
		}
		ret = replay_rebuild(user, box, NULL, &present, 0, &error);
	}
	if (ret < 0) {
		e_error(replay.event, "User %s mailbox %s: Cannot remove what a "
			"repair left behind: %s",
			replay_user_mail_user(user)->username, vname, error);
	}
}
