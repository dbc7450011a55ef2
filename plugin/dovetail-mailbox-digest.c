/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "array.h"
#include "bsearch-insert-pos.h"
#include "istream.h"
#include "randgen.h"
#include "mail-storage-private.h"
#include "mail-index-private.h"
#include "mail-index-view-private.h"
#include "dovetail-compat.h"
#include "dovetail-log.h"
#include "dovetail-mailbox-digest.h"

/* The flags of an index record that are IMAP's; the others are Dovecot's own. */
#define DIGEST_FLAGS_MASK \
	(MAIL_ANSWERED | MAIL_FLAGGED | MAIL_DELETED | MAIL_SEEN | MAIL_DRAFT)

/* The extension's header, in host byte order as the rest of an index. */
struct digest_ext_header {
	uint32_t index_id, file_seq, file_offset;
	uint32_t count;
	uint64_t sum_lo, sum_hi;
	uint8_t key[DOVETAIL_DIGEST_KEY_SIZE];
};

/* Flags and keywords of a message, as they are part of the digest: flags and
   STATE_KNOWN in the highest byte, below it the keywords' sum modulo 2^56. (An
   index does not keep what the flags were before a change: a view shows the new
   ones.) */
typedef uint64_t message_state_t;
#define STATE_FLAGS_SHIFT 56
#define STATE_KEYWORDS_MASK ((1ULL << STATE_FLAGS_SHIFT) - 1)
#define STATE_KNOWN (0x80ULL << STATE_FLAGS_SHIFT)

/* New messages that wait for being written. */
#define FRESH_MAX 4096

/* The extension's record; zeros: not known. state is what the digest of the header
   has. */
struct digest_ext_record {
	uint8_t hash[DOVETAIL_MESSAGE_HASH_SIZE];
	message_state_t state;
};

/* What is not in the index yet. */
struct fresh_message {
	uint32_t uid;
	bool have_hash;
	uint8_t hash[DOVETAIL_MESSAGE_HASH_SIZE];
	/* 0: as in the index */
	message_state_t state;
};

struct keyword_sum {
	bool known;
	struct dovetail_sum sum;
};

struct dovetail_mailbox_digest {
	struct mailbox *box;
	struct mail_index *index;
	uint32_t ext_id;

	bool have_key;
	/* digest is the mailbox's at pos: the states in the index, and on top of
	   them those in fresh */
	bool known;
	struct dovetail_digest digest;
	struct dovetail_log_pos pos;
	/* where the index's digest was when it was seen last: of then are the
	   states in the index that are not in fresh */
	struct dovetail_log_pos written;
	/* Has the records of messages that were expunged after it was opened. */
	struct mail_index_view *view;

	/* by UID */
	ARRAY(struct fresh_message) fresh;
	/* by Dovecot's index of the keyword */
	ARRAY(struct keyword_sum) keywords;
	ARRAY_TYPE(keyword_indexes) message_keywords;
	/* the message that stopped us last */
	uint32_t missing_uid;
	bool unwritten, urgent;
};

/* ---- messages ---- */

void dovetail_message_guid(const char *guid, guid_128_t guid_r)
{
	if (guid_128_from_string(guid, guid_r) < 0)
		mail_generate_guid_128_hash(guid, guid_r);
}

int dovetail_message_hash(struct mail *mail,
			  uint8_t hash_r[DOVETAIL_MESSAGE_HASH_SIZE])
{
	struct dovetail_body_hash body;
	struct istream *input;
	const unsigned char *data;
	const char *guid;
	guid_128_t guid_128;
	time_t received_date;
	size_t size;

	if (mail_get_special(mail, MAIL_FETCH_GUID, &guid) < 0 ||
	    mail_get_received_date(mail, &received_date) < 0 ||
	    mail_get_stream(mail, NULL, NULL, &input) < 0)
		return -1;
	dovetail_message_guid(guid, guid_128);
	dovetail_body_hash_init(&body);
	while (i_stream_read_more(input, &data, &size) > 0) {
		dovetail_body_hash_more(&body, data, size);
		i_stream_skip(input, size);
	}
	if (input->stream_errno != 0) {
		mail_storage_set_critical(mail->box->storage,
			"read(%s) failed: %s", i_stream_get_name(input),
			i_stream_get_error(input));
		return -1;
	}
	dovetail_body_hash_final(&body, guid_128, received_date, hash_r);
	return 0;
}

static message_state_t
message_state(uint8_t flags, const struct dovetail_sum *keywords)
{
	return STATE_KNOWN |
		(uint64_t)(flags & DIGEST_FLAGS_MASK) << STATE_FLAGS_SHIFT |
		(keywords->lo & STATE_KEYWORDS_MASK);
}

static message_state_t
message_names_state(uint8_t flags, const char *const *keywords)
{
	struct dovetail_sum sum = { 0, 0 }, keyword;

	for (; *keywords != NULL; keywords++) {
		dovetail_keyword_sum(*keywords, &keyword);
		dovetail_sum_add(&sum, &keyword);
	}
	return message_state(flags, &sum);
}

static int fresh_cmp(const uint32_t *uid, const struct fresh_message *fresh)
{
	return *uid < fresh->uid ? -1 : *uid > fresh->uid ? 1 : 0;
}

static const struct fresh_message *
fresh_find(struct dovetail_mailbox_digest *md, uint32_t uid)
{
	return array_count(&md->fresh) == 0 ? NULL :
		array_bsearch(&md->fresh, &uid, fresh_cmp);
}

static struct fresh_message *
fresh_get(struct dovetail_mailbox_digest *md, uint32_t uid)
{
	struct fresh_message *fresh;
	unsigned int idx;

	if (array_bsearch_insert_pos(&md->fresh, &uid, fresh_cmp, &idx))
		return array_idx_modifiable(&md->fresh, idx);
	fresh = array_insert_space(&md->fresh, idx);
	fresh->uid = uid;
	return fresh;
}

/* What the index has by now of a message that view has. */
static void ext_lookup(struct dovetail_mailbox_digest *md,
		       struct mail_index_view *view, uint32_t seq,
		       struct digest_ext_record *rec_r)
{
	const void *data;

	mail_index_lookup_ext(view, seq, md->ext_id, &data, NULL);
	if (data == NULL)
		i_zero(rec_r);
	else
		memcpy(rec_r, data, sizeof(*rec_r));
}

static bool hash_is_known(const uint8_t hash[DOVETAIL_MESSAGE_HASH_SIZE])
{
	static const uint8_t unknown[DOVETAIL_MESSAGE_HASH_SIZE];

	return memcmp(hash, unknown, sizeof(unknown)) != 0;
}

/* The record as it would be if all were written. */
static void digest_lookup(struct dovetail_mailbox_digest *md,
			  struct mail_index_view *view, uint32_t seq,
			  uint32_t uid, struct digest_ext_record *rec_r)
{
	const struct fresh_message *fresh = fresh_find(md, uid);

	ext_lookup(md, view, seq, rec_r);
	if (fresh == NULL)
		return;
	if (fresh->have_hash)
		memcpy(rec_r->hash, fresh->hash, sizeof(rec_r->hash));
	if (fresh->state != 0)
		rec_r->state = fresh->state;
}

void dovetail_mailbox_digest_set(struct dovetail_mailbox_digest *md,
				 uint32_t uid,
				 const uint8_t hash[DOVETAIL_MESSAGE_HASH_SIZE])
{
	struct fresh_message *fresh = fresh_get(md, uid);

	memcpy(fresh->hash, hash, sizeof(fresh->hash));
	fresh->have_hash = TRUE;
	md->unwritten = md->urgent = TRUE;
}

void dovetail_mailbox_digest_set_new(struct dovetail_mailbox_digest *md,
				     uint32_t uid, uint8_t flags,
				     const char *const *keywords,
				     const uint8_t hash[DOVETAIL_MESSAGE_HASH_SIZE])
{
	uint8_t known[DOVETAIL_MESSAGE_HASH_SIZE];
	const char *error;

	/* sent again: not new any more */
	if (dovetail_mailbox_digest_get(md, uid, known))
		return;
	dovetail_mailbox_digest_set(md, uid, hash);
	fresh_get(md, uid)->state = message_names_state(flags, keywords);
	if (array_count(&md->fresh) >= FRESH_MAX) T_BEGIN {
		/* if it fails, what is lost is read again */
		(void)dovetail_mailbox_digest_save(md, &error);
	} T_END;
}

bool dovetail_mailbox_digest_get(struct dovetail_mailbox_digest *md,
				 uint32_t uid,
				 uint8_t hash_r[DOVETAIL_MESSAGE_HASH_SIZE])
{
	struct mail_index_view *view = mail_index_view_open(md->index);
	struct digest_ext_record rec;
	uint32_t seq;
	bool found;

	found = mail_index_lookup_seq(view, uid, &seq);
	if (found) {
		digest_lookup(md, view, seq, uid, &rec);
		found = hash_is_known(rec.hash);
		memcpy(hash_r, rec.hash, sizeof(rec.hash));
	}
	mail_index_view_close(&view);
	return found;
}

static uint32_t digest_ext_register(struct mail_index *index)
{
	return mail_index_ext_register(index, DOVETAIL_DIGEST_EXT_NAME,
				       sizeof(struct digest_ext_header),
				       sizeof(struct digest_ext_record), 1);
}

void dovetail_mailbox_digest_update(struct mailbox *box,
				    struct mail_index_transaction *trans,
				    uint32_t seq, uint8_t flags,
				    const char *const *keywords,
				    const uint8_t hash[DOVETAIL_MESSAGE_HASH_SIZE])
{
	struct digest_ext_record rec;

	memcpy(rec.hash, hash, sizeof(rec.hash));
	rec.state = message_names_state(flags, keywords);
	mail_index_update_ext(trans, seq, digest_ext_register(box->index), &rec,
			      NULL);
}

static const struct dovetail_sum *
digest_keyword_sum(struct dovetail_mailbox_digest *md, unsigned int idx)
{
	const ARRAY_TYPE(keywords) *names = mail_index_get_keywords(md->index);
	struct keyword_sum *ks = array_idx_get_space(&md->keywords, idx);

	if (!ks->known && idx < array_count(names)) {
		dovetail_keyword_sum(array_idx_elem(names, idx), &ks->sum);
		ks->known = TRUE;
	}
	return &ks->sum;
}

/* As the message is now. */
static message_state_t
digest_view_state(struct dovetail_mailbox_digest *md,
		  struct mail_index_view *view, uint32_t seq)
{
	struct dovetail_sum keywords = { 0, 0 };
	enum mail_flags flags;
	const unsigned int *idx;

	mail_index_lookup_view_flags(view, seq, &flags, &md->message_keywords);
	array_foreach(&md->message_keywords, idx)
		dovetail_sum_add(&keywords, digest_keyword_sum(md, *idx));
	return message_state(flags, &keywords);
}

static void
state_element(const uint8_t key[DOVETAIL_DIGEST_KEY_SIZE], uint32_t uid,
	      const struct digest_ext_record *rec,
	      struct dovetail_sum *element_r)
{
	struct dovetail_sum keywords = { rec->state & STATE_KEYWORDS_MASK, 0 };

	dovetail_element(key, uid, (rec->state >> STATE_FLAGS_SHIFT) &
			 DIGEST_FLAGS_MASK, &keywords, rec->hash, element_r);
}

bool dovetail_mailbox_digest_element(struct dovetail_mailbox_digest *md,
				     struct mail_index_view *view, uint32_t seq,
				     const uint8_t key[DOVETAIL_DIGEST_KEY_SIZE],
				     struct dovetail_sum *element_r)
{
	struct digest_ext_record rec;
	uint32_t uid;

	mail_index_lookup_uid(view, seq, &uid);
	digest_lookup(md, view, seq, uid, &rec);
	if (!hash_is_known(rec.hash)) {
		md->missing_uid = uid;
		return FALSE;
	}
	rec.state = digest_view_state(md, view, seq);
	state_element(key, uid, &rec, element_r);
	return TRUE;
}

bool dovetail_mailbox_digest_range(struct dovetail_mailbox_digest *md,
				   struct mail_index_view *view,
				   const uint8_t key[DOVETAIL_DIGEST_KEY_SIZE],
				   struct dovetail_range *range)
{
	struct dovetail_sum element;
	uint32_t seq, seq1, seq2;

	i_zero(&range->sum);
	range->count = 0;
	if (!mail_index_lookup_seq_range(view, range->uid1, range->uid2,
					 &seq1, &seq2))
		return TRUE;
	for (seq = seq1; seq <= seq2; seq++) {
		if (!dovetail_mailbox_digest_element(md, view, seq, key,
						     &element))
			return FALSE;
		dovetail_sum_add(&range->sum, &element);
		range->count++;
	}
	return TRUE;
}

/* ---- the mailbox ---- */

static void view_get_pos(struct mail_index_view *view,
			 struct dovetail_log_pos *pos_r)
{
	pos_r->index_id = view->indexid;
	pos_r->file_seq = view->log_file_head_seq;
	pos_r->file_offset = view->log_file_head_offset;
}

/* The header that goes with the states that ext_lookup() finds (an older view has the
   newest records, but not the newest header), and the place it is of; zeros: none. */
static void ext_get_header(struct dovetail_mailbox_digest *md,
			   struct digest_ext_header *hdr_r,
			   struct dovetail_log_pos *pos_r)
{
	struct mail_index_view *view = mail_index_view_open(md->index);
	const void *data;
	size_t size;

	mail_index_get_header_ext(view, md->ext_id, &data, &size);
	if (size < sizeof(*hdr_r))
		i_zero(hdr_r);
	else
		memcpy(hdr_r, data, sizeof(*hdr_r));
	mail_index_view_close(&view);
	pos_r->index_id = hdr_r->index_id;
	pos_r->file_seq = hdr_r->file_seq;
	pos_r->file_offset = hdr_r->file_offset;
}

static bool
log_pos_equals(const struct dovetail_log_pos *a, const struct dovetail_log_pos *b)
{
	return a->index_id == b->index_id && dovetail_log_pos_cmp(a, b) == 0;
}

/* Start from what the index says. */
static void digest_adopt(struct dovetail_mailbox_digest *md,
			 const struct digest_ext_header *hdr,
			 const struct dovetail_log_pos *pos)
{
	struct fresh_message *fresh;

	array_foreach_modifiable(&md->fresh, fresh)
		fresh->state = 0;
	memcpy(md->digest.key, hdr->key, sizeof(hdr->key));
	md->digest.sum.lo = hdr->sum_lo;
	md->digest.sum.hi = hdr->sum_hi;
	md->digest.count = hdr->count;
	md->pos = *pos;
	md->written = *pos;
	md->have_key = md->known = TRUE;
}

struct dovetail_mailbox_digest *
dovetail_mailbox_digest_open(struct mailbox *box)
{
	struct dovetail_mailbox_digest *md;
	struct digest_ext_header hdr;
	struct dovetail_log_pos pos;

	md = i_new(struct dovetail_mailbox_digest, 1);
	md->box = box;
	md->index = box->index;
	md->ext_id = digest_ext_register(box->index);
	i_array_init(&md->fresh, 8);
	i_array_init(&md->keywords, 8);
	i_array_init(&md->message_keywords, 8);
	md->view = mail_index_view_open(md->index);
	ext_get_header(md, &hdr, &pos);
	if (pos.index_id != 0)
		digest_adopt(md, &hdr, &pos);
	return md;
}

void dovetail_mailbox_digest_close(struct dovetail_mailbox_digest **_md)
{
	struct dovetail_mailbox_digest *md = *_md;

	if (md == NULL)
		return;
	*_md = NULL;
	mail_index_view_close(&md->view);
	array_free(&md->fresh);
	array_free(&md->keywords);
	array_free(&md->message_keywords);
	i_free(md);
}

/* The message is part of the digest, as it is now. Returns FALSE when its hash is
   not known. */
static bool digest_add_message(struct dovetail_mailbox_digest *md,
			       struct mail_index_view *view, uint32_t seq,
			       uint32_t uid)
{
	struct digest_ext_record rec;
	struct dovetail_sum element;
	message_state_t state;

	digest_lookup(md, view, seq, uid, &rec);
	if (!hash_is_known(rec.hash)) {
		md->missing_uid = uid;
		return FALSE;
	}
	state = digest_view_state(md, view, seq);
	if (state != rec.state) {
		fresh_get(md, uid)->state = state;
		rec.state = state;
	}
	state_element(md->digest.key, uid, &rec, &element);
	dovetail_sum_add(&md->digest.sum, &element);
	md->digest.count++;
	return TRUE;
}

/* Take the message out of the digest again, as it went in. Returns FALSE when that
   is not known. */
static bool digest_remove_message(struct dovetail_mailbox_digest *md,
				  struct mail_index_view *view, uint32_t seq,
				  uint32_t uid)
{
	struct digest_ext_record rec;
	struct dovetail_sum element;

	digest_lookup(md, view, seq, uid, &rec);
	if (rec.state == 0 || !hash_is_known(rec.hash))
		return FALSE;
	state_element(md->digest.key, uid, &rec, &element);
	dovetail_sum_sub(&md->digest.sum, &element);
	md->digest.count--;
	return TRUE;
}

static bool digest_sum_all(struct dovetail_mailbox_digest *md,
			   struct mail_index_view *view)
{
	struct digest_ext_record rec;
	uint32_t seq, uid, count = mail_index_view_get_messages_count(view);

	/* what lacked a hash last time most likely lacks it still */
	if (md->missing_uid != 0 &&
	    mail_index_lookup_seq(view, md->missing_uid, &seq)) {
		digest_lookup(md, view, seq, md->missing_uid, &rec);
		if (!hash_is_known(rec.hash))
			return FALSE;
	}
	md->missing_uid = 0;
	i_zero(&md->digest.sum);
	md->digest.count = 0;
	for (seq = 1; seq <= count; seq++) {
		mail_index_lookup_uid(view, seq, &uid);
		if (!digest_add_message(md, view, seq, uid))
			return FALSE;
	}
	return TRUE;
}

/* Take the messages that view has out of the digest, or in. */
static bool digest_count_uids(struct dovetail_mailbox_digest *md,
			      struct mail_index_view *view,
			      const ARRAY_TYPE(seq_range) *uids,
			      bool (*count)(struct dovetail_mailbox_digest *md,
					    struct mail_index_view *view,
					    uint32_t seq, uint32_t uid))
{
	const struct seq_range *range;
	uint32_t seq, seq1, seq2, uid;

	array_foreach(uids, range) {
		if (!mail_index_lookup_seq_range(view, range->seq1, range->seq2,
						 &seq1, &seq2))
			continue;
		for (seq = seq1; seq <= seq2; seq++) {
			mail_index_lookup_uid(view, seq, &uid);
			if (!count(md, view, seq, uid))
				return FALSE;
		}
	}
	return TRUE;
}

/* Apply the records to the digest. Returns FALSE when it has to be computed
   afresh. */
static bool
digest_apply(struct dovetail_mailbox_digest *md, struct mail_index_view *view,
	     const ARRAY_TYPE(dovetail_log_record) *records)
{
	const struct dovetail_log_record *record;
	ARRAY_TYPE(seq_range) appended, changed;

	t_array_init(&appended, 8);
	t_array_init(&changed, 8);
	array_foreach(records, record) {
		if (record->type == MAIL_TRANSACTION_EXPUNGE ||
		    record->type == MAIL_TRANSACTION_EXPUNGE_GUID)
			md->urgent = TRUE;
		dovetail_log_record_uids(record,
			record->type == MAIL_TRANSACTION_APPEND ?
			&appended : &changed);
	}
	/* what is new was not part of it, whatever happened to it since */
	seq_range_array_remove_seq_range(&changed, &appended);
	/* A message that md's view does not have was expunged before we came:
	   then the count will not be right. */
	return digest_count_uids(md, md->view, &changed,
				 digest_remove_message) &&
		digest_count_uids(md, view, &changed, digest_add_message) &&
		digest_count_uids(md, view, &appended, digest_add_message) &&
		md->digest.count == mail_index_view_get_messages_count(view);
}

/* Returns 1: done.  0: it has to be computed afresh.  -1: it cannot be known. */
static int digest_follow_log(struct dovetail_mailbox_digest *md,
			     const struct dovetail_log_pos *end,
			     struct mail_index_view *view)
{
	ARRAY_TYPE(dovetail_log_record) records;
	struct digest_ext_header hdr;
	struct dovetail_log_pos pos;
	const char *error;
	pool_t pool;
	bool ok = FALSE;

	ext_get_header(md, &hdr, &pos);
	if (pos.index_id == end->index_id) {
		if (dovetail_log_pos_cmp(&pos, end) > 0) {
			/* somebody was quicker, and the states in the index
			   are of then */
			return -1;
		}
		if (!md->known || md->pos.index_id != end->index_id ||
		    !log_pos_equals(&pos, &md->written))
			digest_adopt(md, &hdr, &pos);
	}
	if (!md->known || md->pos.index_id != end->index_id ||
	    dovetail_log_pos_cmp(&md->pos, end) > 0)
		return 0;
	if (dovetail_log_pos_cmp(&md->pos, end) == 0)
		return 1;
	pool = pool_alloconly_create("dovetail digest", 1024);
	i_array_init(&records, 8);
	if (dovetail_log_read(md->index, &md->pos, end, pool, &records,
			      &error) > 0) T_BEGIN {
		ok = digest_apply(md, view, &records);
	} T_END;
	if (array_count(&records) > 0)
		md->unwritten = TRUE;
	array_free(&records);
	pool_unref(&pool);
	return ok ? 1 : 0;
}

static void digest_start(struct dovetail_mailbox_digest *md,
			 struct mail_index_view *view)
{
	struct fresh_message *fresh;
	struct digest_ext_header hdr;

	ext_get_header(md, &hdr, &md->written);
	if (!md->have_key) {
		random_fill(md->digest.key, sizeof(md->digest.key));
		md->have_key = TRUE;
	}
	md->known = digest_sum_all(md, view);
	if (md->known) {
		/* another process need not do it as well */
		md->unwritten = md->urgent = TRUE;
	} else {
		/* the index has another digest's */
		array_foreach_modifiable(&md->fresh, fresh)
			fresh->state = 0;
	}
}

static void digest_end_at(struct dovetail_mailbox_digest *md,
			  struct mail_index_view *view)
{
	if (md->view != view)
		mail_index_view_close(&md->view);
	md->view = view;
	view_get_pos(view, &md->pos);
}

/* The index was read on since the view was opened, and messages have changed. The view
   shows flags that are newer than it is, then. */
static bool digest_view_is_old(struct dovetail_mailbox_digest *md,
			       struct mail_index_view *view)
{
	ARRAY_TYPE(dovetail_log_record) records;
	struct mail_index_view *head;
	struct dovetail_log_pos pos, head_pos;
	const char *error;
	pool_t pool;
	bool old;

	head = mail_index_view_open(md->index);
	view_get_pos(view, &pos);
	view_get_pos(head, &head_pos);
	mail_index_view_close(&head);
	if (log_pos_equals(&pos, &head_pos))
		return FALSE;
	pool = pool_alloconly_create("dovetail digest", 1024);
	i_array_init(&records, 8);
	old = dovetail_log_read(md->index, &pos, &head_pos, pool, &records,
				&error) <= 0 || array_count(&records) > 0;
	array_free(&records);
	pool_unref(&pool);
	return old;
}

bool dovetail_mailbox_digest_follow(struct dovetail_mailbox_digest *md,
				    struct mail_index_view *view,
				    struct dovetail_digest *digest_r)
{
	struct dovetail_log_pos end;
	int ret;

	if (digest_view_is_old(md, view)) {
		if (view != md->view)
			mail_index_view_close(&view);
		return FALSE;
	}
	view_get_pos(view, &end);
	ret = digest_follow_log(md, &end, view);
	if (ret == 0)
		digest_start(md, view);
	else if (ret < 0)
		md->known = FALSE;
	digest_end_at(md, view);
	*digest_r = md->digest;
	return md->known;
}

bool dovetail_mailbox_digest_now(struct dovetail_mailbox_digest *md,
				 struct dovetail_digest *digest_r)
{
	(void)mail_index_refresh(md->index);
	return dovetail_mailbox_digest_follow(md,
		mail_index_view_open(md->index), digest_r);
}

bool dovetail_mailbox_digest_recompute(struct dovetail_mailbox_digest *md,
				       struct mail_index_view *view,
				       const uint8_t *key,
				       struct dovetail_digest *digest_r)
{
	if (view != NULL && digest_view_is_old(md, view)) {
		if (view != md->view)
			mail_index_view_close(&view);
		return FALSE;
	}
	if (key != NULL) {
		memcpy(md->digest.key, key, sizeof(md->digest.key));
		md->have_key = TRUE;
	}
	if (view == NULL) {
		(void)mail_index_refresh(md->index);
		view = mail_index_view_open(md->index);
	}
	digest_start(md, view);
	digest_end_at(md, view);
	*digest_r = md->digest;
	return md->known;
}

bool dovetail_mailbox_digest_is_urgent(const struct dovetail_mailbox_digest *md)
{
	return md->urgent;
}

bool dovetail_mailbox_digest_is_clean(const struct dovetail_mailbox_digest *md)
{
	return !md->unwritten;
}

struct mail_index_view *
dovetail_mailbox_digest_view(struct dovetail_mailbox_digest *md)
{
	return md->view;
}

/* ---- writing ---- */

static void digest_write_header(struct dovetail_mailbox_digest *md,
				struct mail_index_transaction *trans)
{
	struct digest_ext_header hdr;

	i_zero(&hdr);
	hdr.index_id = md->pos.index_id;
	hdr.file_seq = md->pos.file_seq;
	hdr.file_offset = md->pos.file_offset;
	hdr.count = md->digest.count;
	hdr.sum_lo = md->digest.sum.lo;
	hdr.sum_hi = md->digest.sum.hi;
	memcpy(hdr.key, md->digest.key, sizeof(hdr.key));
	mail_index_update_header_ext(trans, md->ext_id, 0, &hdr, sizeof(hdr));
}

void dovetail_mailbox_digest_write(struct dovetail_mailbox_digest *md,
				   struct mail_index_transaction *trans)
{
	struct mail_index_view *view =
		mail_index_transaction_get_view(trans);
	const struct fresh_message *fresh;
	struct digest_ext_header hdr;
	struct digest_ext_record old, rec;
	struct dovetail_log_pos pos;
	bool states;
	uint32_t seq;

	/* header and states belong together: with another's header go his states */
	ext_get_header(md, &hdr, &pos);
	states = md->known && log_pos_equals(&pos, &md->written);
	array_foreach(&md->fresh, fresh) {
		if (!mail_index_lookup_seq(view, fresh->uid, &seq))
			continue;
		ext_lookup(md, view, seq, &old);
		digest_lookup(md, view, seq, fresh->uid, &rec);
		if (!states)
			rec.state = old.state;
		if (memcmp(&rec, &old, sizeof(rec)) != 0) {
			mail_index_update_ext(trans, seq, md->ext_id, &rec,
					      NULL);
		}
	}
	array_clear(&md->fresh);
	if (states) {
		digest_write_header(md, trans);
		md->written = md->pos;
	} else {
		/* the next one to follow starts from what is there */
		md->known = FALSE;
	}
	md->unwritten = md->urgent = FALSE;
}

void dovetail_mailbox_digest_written(struct dovetail_mailbox_digest *md)
{
	/* What was written changes the index's records, which a view that stays
	   would have twice in memory. What another process expunged in between
	   the new one lacks, and then the digest is computed afresh. */
	(void)mail_index_refresh(md->index);
	mail_index_view_close(&md->view);
	md->view = mail_index_view_open(md->index);
}

int dovetail_mailbox_digest_save(struct dovetail_mailbox_digest *md,
				 const char **error_r)
{
	struct mail_index_transaction *trans;
	struct mail_index_view *view;
	int ret;

	if (dovetail_log_lock(md->index) < 0) {
		*error_r = dovetail_index_error(md->index);
		return -1;
	}
	view = mail_index_view_open(md->index);
	trans = mail_index_transaction_begin(view,
		MAIL_INDEX_TRANSACTION_FLAG_EXTERNAL);
	dovetail_mailbox_digest_write(md, trans);
	ret = mail_index_transaction_commit(&trans);
	if (ret < 0)
		*error_r = dovetail_index_error(md->index);
	mail_index_view_close(&view);
	dovetail_log_unlock(md->index);
	dovetail_mailbox_digest_written(md);
	return ret;
}

/* ---- reading ---- */

static bool digest_fill_message(struct dovetail_mailbox_digest *md,
				struct mail *mail, uint32_t uid)
{
	uint8_t hash[DOVETAIL_MESSAGE_HASH_SIZE];

	if (!mail_set_uid(mail, uid) || dovetail_message_hash(mail, hash) < 0)
		return FALSE;
	dovetail_mailbox_digest_set(md, uid, hash);
	return TRUE;
}

unsigned int dovetail_mailbox_digest_fill(struct dovetail_mailbox_digest *md,
					  unsigned int max)
{
	struct mailbox_transaction_context *t = NULL;
	struct mail_index_view *view;
	struct mail *mail = NULL;
	struct digest_ext_record rec;
	uint32_t seq, uid, count;
	unsigned int lacking = 0;

	view = mail_index_view_open(md->index);
	count = mail_index_view_get_messages_count(view);
	for (seq = 1; seq <= count; seq++) {
		mail_index_lookup_uid(view, seq, &uid);
		digest_lookup(md, view, seq, uid, &rec);
		if (hash_is_known(rec.hash))
			continue;
		if (mail == NULL) {
			t = mailbox_transaction_begin(md->box, 0, __func__);
			mail = mail_alloc(t, 0, NULL);
		}
		T_BEGIN {
			if (max == 0)
				lacking++;
			else if (digest_fill_message(md, mail, uid))
				max--;
		} T_END;
	}
	if (mail != NULL) {
		mail_free(&mail);
		mailbox_transaction_rollback(&t);
	}
	mail_index_view_close(&view);
	return lacking;
}

int dovetail_mailbox_digest_scrub(struct dovetail_mailbox_digest *md,
				  uint32_t *uid, unsigned int max, bool correct,
				  ARRAY_TYPE(seq_range) *changed)
{
	struct mailbox_transaction_context *t;
	struct mail_index_view *view;
	struct mail *mail;
	struct digest_ext_record rec;
	uint8_t hash[DOVETAIL_MESSAGE_HASH_SIZE];
	uint32_t seq, seq1, seq2;
	int ret = 0;

	view = mail_index_view_open(md->index);
	if (*uid == 0 ||
	    !mail_index_lookup_seq_range(view, *uid, (uint32_t)-1, &seq1,
					 &seq2)) {
		*uid = 0;
		mail_index_view_close(&view);
		return 0;
	}
	t = mailbox_transaction_begin(md->box, 0, __func__);
	mail = mail_alloc(t, 0, NULL);
	for (seq = seq1; seq <= seq2 && max > 0; seq++, max--) T_BEGIN {
		mail_index_lookup_uid(view, seq, uid);
		digest_lookup(md, view, seq, *uid, &rec);
		if (!mail_set_uid(mail, *uid))
			;
		else if (dovetail_message_hash(mail, hash) < 0) {
			/* gone meanwhile, or not readable any more */
			if (!mail->expunged) {
				seq_range_array_add(changed, *uid);
				ret = -1;
			}
		} else if (memcmp(hash, rec.hash, sizeof(hash)) != 0) {
			if (hash_is_known(rec.hash))
				seq_range_array_add(changed, *uid);
			if (correct || !hash_is_known(rec.hash))
				dovetail_mailbox_digest_set(md, *uid, hash);
		}
	} T_END;
	*uid = seq > seq2 ? 0 : *uid + 1;
	mail_free(&mail);
	mailbox_transaction_rollback(&t);
	mail_index_view_close(&view);
	return ret;
}
