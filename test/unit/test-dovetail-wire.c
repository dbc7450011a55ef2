/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "array.h"
#include "buffer.h"
#include "str.h"
#include "mail-types.h"
#include "test-common.h"
#include "dovetail-wire.h"

static const guid_128_t guid_a = { 0xa, 1, 2, 3, 4, 5, 6, 7, 8 };
static const guid_128_t guid_b = { 0xb, 1, 2, 3, 4, 5, 6, 7, 8 };
static const char *const no_keywords[] = { NULL };
static const char *const two_keywords[] = { "$Forwarded", "work", NULL };

/* A copy in a block of exactly its size, so that the memory checkers see every
   byte that is read past its end. */
static unsigned char *exact_copy(const void *data, size_t size)
{
	return size == 0 ? i_malloc(1) : i_memdup(data, size);
}

/* ---- primitives ---- */

static void test_wire_num(void)
{
	static const struct {
		uint64_t num;
		const char *bytes;
		size_t size;
	} tests[] = {
		{ 0, "\x00", 1 },
		{ 1, "\x01", 1 },
		{ 127, "\x7f", 1 },
		{ 128, "\x80\x01", 2 },
		{ 300, "\xac\x02", 2 },
		{ 16383, "\xff\x7f", 2 },
		{ 16384, "\x80\x80\x01", 3 },
		{ UINT32_MAX, "\xff\xff\xff\xff\x0f", 5 },
		{ (uint64_t)UINT32_MAX + 1, "\x80\x80\x80\x80\x10", 5 },
		{ INT64_MAX, "\xff\xff\xff\xff\xff\xff\xff\xff\x7f", 9 },
		{ UINT64_MAX, "\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", 10 },
	};
	struct dovetail_wire_reader r;
	unsigned int i;

	test_begin("wire num");
	for (i = 0; i < N_ELEMENTS(tests); i++) {
		buffer_t *buf = t_buffer_create(16);

		dovetail_wire_put_num(buf, tests[i].num);
		test_assert_idx(buf->used == tests[i].size &&
				memcmp(buf->data, tests[i].bytes,
				       buf->used) == 0, i);
		dovetail_wire_reader_init(&r, buf->data, buf->used);
		test_assert_idx(dovetail_wire_get_num(&r) == tests[i].num, i);
		test_assert_idx(dovetail_wire_reader_done(&r), i);
		dovetail_wire_reader_init(&r, buf->data, buf->used);
		if (tests[i].num <= UINT32_MAX) {
			test_assert_idx(dovetail_wire_get_num32(&r) ==
					tests[i].num, i);
			test_assert_idx(dovetail_wire_reader_done(&r), i);
		} else {
			test_assert_idx(dovetail_wire_get_num32(&r) == 0, i);
			test_assert_idx(r.failed, i);
		}
	}
	test_end();
}

static void test_wire_num_refused(void)
{
	static const struct {
		const char *bytes;
		size_t size;
	} tests[] = {
		{ "", 0 },
		/* cut off */
		{ "\x80", 1 },
		{ "\xff\xff\xff", 3 },
		/* longer than needed */
		{ "\x80\x00", 2 },
		{ "\xac\x82\x00", 3 },
		{ "\x80\x80\x80\x80\x80\x80\x80\x80\x80\x00", 10 },
		/* more than 64 bits */
		{ "\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02", 10 },
		{ "\x80\x80\x80\x80\x80\x80\x80\x80\x80\x7f", 10 },
		{ "\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80", 10 },
		{ "\x80\x80\x80\x80\x80\x80\x80\x80\x80\x81\x00", 11 },
	};
	struct dovetail_wire_reader r;
	unsigned int i;

	test_begin("wire num refused");
	for (i = 0; i < N_ELEMENTS(tests); i++) {
		unsigned char *data = exact_copy(tests[i].bytes, tests[i].size);

		dovetail_wire_reader_init(&r, data, tests[i].size);
		test_assert_idx(dovetail_wire_get_num(&r) == 0, i);
		test_assert_idx(r.failed, i);
		test_assert_idx(!dovetail_wire_reader_done(&r), i);
		i_free(data);
	}
	test_end();
}

static void test_wire_snum(void)
{
	static const struct {
		int64_t num;
		size_t size;
		unsigned char first;
	} tests[] = {
		{ 0, 1, 0 }, { -1, 1, 1 }, { 1, 1, 2 }, { -2, 1, 3 },
		{ 63, 1, 126 }, { -64, 1, 127 }, { 64, 2, 0x80 },
		{ -65, 2, 0x81 }, { INT64_MAX, 10, 0xfe },
		{ INT64_MIN, 10, 0xff },
	};
	struct dovetail_wire_reader r;
	unsigned int i;

	test_begin("wire snum");
	for (i = 0; i < N_ELEMENTS(tests); i++) {
		buffer_t *buf = t_buffer_create(16);
		const unsigned char *data;

		dovetail_wire_put_snum(buf, tests[i].num);
		data = buf->data;
		test_assert_idx(buf->used == tests[i].size, i);
		test_assert_idx(data[0] == tests[i].first, i);
		dovetail_wire_reader_init(&r, buf->data, buf->used);
		test_assert_idx(dovetail_wire_get_snum(&r) == tests[i].num, i);
		test_assert_idx(dovetail_wire_reader_done(&r), i);
	}
	test_end();
}

static void test_wire_bytes(void)
{
	static const unsigned char data[] = "\x7f" "\x03" "a\0b" "\x00"
		"\x03" "abc" "0123456789abcdef" "xy";
	struct dovetail_wire_reader r;
	guid_128_t guid;
	const void *p;
	size_t size;

	test_begin("wire bytes");
	dovetail_wire_reader_init(&r, data, sizeof(data) - 1);
	test_assert(dovetail_wire_get_u8(&r) == 0x7f);
	p = dovetail_wire_get_bytes(&r, &size);
	test_assert(p != NULL && size == 3 && memcmp(p, "a\0b", 3) == 0);
	p = dovetail_wire_get_bytes(&r, &size);
	test_assert(p != NULL && size == 0);
	test_assert_strcmp(dovetail_wire_get_str(&r, pool_datastack_create()),
			   "abc");
	dovetail_wire_get_guid(&r, guid);
	test_assert(memcmp(guid, "0123456789abcdef", sizeof(guid)) == 0);
	test_assert(!dovetail_wire_reader_done(&r));
	p = dovetail_wire_get_raw(&r, 2);
	test_assert(p != NULL && memcmp(p, "xy", 2) == 0);
	test_assert(dovetail_wire_reader_done(&r));
	test_assert(dovetail_wire_get_raw(&r, 0) != NULL);
	test_assert(dovetail_wire_reader_done(&r));
	test_assert(dovetail_wire_get_raw(&r, 1) == NULL && r.failed);
	test_end();

	test_begin("wire failure lasts");
	dovetail_wire_reader_init(&r, "\x05""abcd", 5);
	test_assert(dovetail_wire_get_bytes(&r, &size) == NULL && size == 0);
	test_assert(r.failed);
	test_assert(dovetail_wire_get_u8(&r) == 0);
	test_assert(dovetail_wire_get_num(&r) == 0);
	test_assert(dovetail_wire_get_snum(&r) == 0);
	test_assert(dovetail_wire_get_raw(&r, 0) == NULL);
	test_assert_strcmp(dovetail_wire_get_str(&r, pool_datastack_create()),
			   "");
	memset(guid, 1, sizeof(guid));
	dovetail_wire_get_guid(&r, guid);
	test_assert(guid_128_is_empty(guid));
	test_assert(!dovetail_wire_reader_done(&r));
	test_end();

	test_begin("wire refused bytes");
	/* a size no machine has */
	dovetail_wire_reader_init(&r,
		"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", 10);
	test_assert(dovetail_wire_get_bytes(&r, &size) == NULL && r.failed);
	dovetail_wire_reader_init(&r, "\x03""a\0b", 4);
	test_assert_strcmp(dovetail_wire_get_str(&r, pool_datastack_create()),
			   "");
	test_assert(r.failed);
	dovetail_wire_reader_init(&r, "0123456789abcde", 15);
	dovetail_wire_get_guid(&r, guid);
	test_assert(guid_128_is_empty(guid) && r.failed);
	dovetail_wire_reader_init(&r, NULL, 0);
	test_assert(dovetail_wire_reader_done(&r));
	test_assert(dovetail_wire_get_raw(&r, 0) != NULL);
	test_assert(dovetail_wire_get_u8(&r) == 0 && r.failed);
	test_end();
}

static bool uids_decode(const void *data, size_t size, const char **text_r)
{
	unsigned char *copy = exact_copy(data, size);
	struct dovetail_wire_reader r;
	ARRAY_TYPE(seq_range) uids;
	const struct seq_range *range;
	string_t *str = t_str_new(64);
	bool ok;

	t_array_init(&uids, 4);
	dovetail_wire_reader_init(&r, copy, size);
	dovetail_wire_get_uids(&r, &uids);
	ok = dovetail_wire_reader_done(&r);
	array_foreach(&uids, range)
		str_printfa(str, "%u:%u ", range->seq1, range->seq2);
	*text_r = str_c(str);
	i_free(copy);
	if (ok) {
		buffer_t *again = t_buffer_create(64);

		dovetail_wire_put_uids(again, &uids);
		test_assert(again->used == size &&
			    memcmp(again->data, data, size) == 0);
	}
	return ok;
}

static void test_wire_uids(void)
{
	const char *text;

	test_begin("wire uids");
	test_assert(uids_decode("\x00", 1, &text));
	test_assert_strcmp(text, "");
	test_assert(uids_decode("\x01\x00\x00", 3, &text));
	test_assert_strcmp(text, "1:1 ");
	test_assert(uids_decode("\x02\x00\x00\x00\x00", 5, &text));
	test_assert_strcmp(text, "1:1 3:3 ");
	test_assert(uids_decode("\x03\x04\x05\x00\x01\x80\x01\x00", 8, &text));
	test_assert_strcmp(text, "5:10 12:13 143:143 ");
	/* the last uid there is, alone and as the end of all */
	test_assert(uids_decode("\x01\xfe\xff\xff\xff\x0f\x00", 7, &text));
	test_assert_strcmp(text, "4294967295:4294967295 ");
	test_assert(uids_decode("\x01\x00\xfe\xff\xff\xff\x0f", 7, &text));
	test_assert_strcmp(text, "1:4294967295 ");
	test_assert(uids_decode("\x02\x00\x00\xfc\xff\xff\xff\x0f\x00", 9,
				&text));
	test_assert_strcmp(text, "1:1 4294967295:4294967295 ");
	test_end();

	test_begin("wire uids refused");
	/* one past the last uid */
	test_assert(!uids_decode("\x01\xff\xff\xff\xff\x0f\x00", 7, &text));
	test_assert(!uids_decode("\x01\x00\xff\xff\xff\xff\x0f", 7, &text));
	test_assert(!uids_decode("\x01\x01\xfe\xff\xff\xff\x0f", 7, &text));
	/* nothing comes after the last uid */
	test_assert(!uids_decode("\x02\x00\xfe\xff\xff\xff\x0f\x00\x00", 9,
				 &text));
	/* more ranges than bytes */
	test_assert(!uids_decode("\x02\x00\x00\x00", 4, &text));
	test_assert(!uids_decode("\xff\xff\xff\xff\x0f\x00\x00", 7, &text));
	test_assert(!uids_decode(
		"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x00\x00", 12, &text));
	/* left over */
	test_assert(!uids_decode("\x01\x00\x00\x00", 4, &text));
	test_end();
}

static void test_wire_uids_added(void)
{
	struct dovetail_wire_reader r;
	ARRAY_TYPE(seq_range) uids;

	test_begin("wire uids are only added");
	t_array_init(&uids, 4);
	seq_range_array_add_range(&uids, 2, 6);
	dovetail_wire_reader_init(&r, "\x02\x00\x00\x05\x01", 5);
	dovetail_wire_get_uids(&r, &uids);
	test_assert(dovetail_wire_reader_done(&r));
	test_assert(array_count(&uids) == 2);
	test_assert(seq_range_count(&uids) == 8);
	test_end();
}

/* ---- changes ---- */

static struct dovetail_op *
op_add(struct dovetail_change *change, enum dovetail_op_type type,
       uint32_t uid1, uint32_t uid2)
{
	struct dovetail_op *op = array_append_space(&change->u.mailbox.ops);

	op->type = type;
	if (type != DOVETAIL_OP_APPEND) {
		t_array_init(&op->uids, 2);
		if (uid1 != 0)
			seq_range_array_add_range(&op->uids, uid1, uid2);
	}
	return op;
}

static struct dovetail_op_append *
append_add(struct dovetail_change *change, uint32_t uid,
	   enum dovetail_body_source source)
{
	struct dovetail_op_append *append =
		&op_add(change, DOVETAIL_OP_APPEND, 0, 0)->append;

	append->uid = uid;
	append->guid = "1234567890.M1P2.host";
	append->flags = MAIL_SEEN | MAIL_FLAGGED;
	append->keywords = two_keywords;
	append->received_date = 1700000000;
	append->save_date = -1700000000;
	append->pop3_uidl = "uidl";
	append->pop3_order = 9;
	append->source = source;
	append->size = 11;
	append->body = "From: a\r\n\r\n";
	append->copy_uid = 77;
	memcpy(append->copy_mailbox_guid, guid_b, sizeof(guid_b));
	memset(append->spool_id, 5, sizeof(append->spool_id));
	return append;
}

static void mailbox_fill(struct dovetail_change *change)
{
	struct dovetail_change_mailbox *m = &change->u.mailbox;

	i_zero(change);
	change->kind = DOVETAIL_CHANGE_MAILBOX;
	change->user = "alice@example.org";
	memcpy(m->guid, guid_a, sizeof(guid_a));
	m->name = "INBOX\tSent";
	m->uid_validity = 1700000000;
	m->uid_next = UINT32_MAX;
	m->highest_modseq = UINT64_MAX;
	m->from.index_id = 1;
	m->from.file_seq = 2;
	m->from.file_offset = 300;
	m->to.index_id = 1;
	m->to.file_seq = 3;
	m->to.file_offset = 40;
	t_array_init(&m->ops, 8);
}

static void mailbox_fill_ops(struct dovetail_change *change)
{
	struct dovetail_op_append *append;
	struct dovetail_op *op;

	append_add(change, 1, DOVETAIL_BODY_INLINE);
	append_add(change, 2, DOVETAIL_BODY_SPOOL)->size = UINT64_MAX;
	append_add(change, UINT32_MAX, DOVETAIL_BODY_COPY);
	append = append_add(change, 3, DOVETAIL_BODY_INLINE);
	append->size = 0;
	append->keywords = no_keywords;
	append->guid = append->pop3_uidl = "";
	op = op_add(change, DOVETAIL_OP_FLAGS, 1, 5);
	op->add_flags = MAIL_SEEN;
	op->remove_flags = MAIL_DRAFT;
	seq_range_array_add(&op->uids, 9);
	op_add(change, DOVETAIL_OP_KEYWORD_ADD, 1, 1)->keyword = "work";
	op_add(change, DOVETAIL_OP_KEYWORD_REMOVE, 2, 3)->keyword = "$Junk";
	(void)op_add(change, DOVETAIL_OP_KEYWORD_RESET, 4, 4);
	(void)op_add(change, DOVETAIL_OP_EXPUNGE, 1, UINT32_MAX);
}

static void snapshot_fill(struct dovetail_change *change)
{
	struct dovetail_change_mailbox *m = &change->u.mailbox;

	mailbox_fill(change);
	m->flags = DOVETAIL_MAILBOX_SNAPSHOT | DOVETAIL_MAILBOX_MORE;
	i_zero(&m->from);
	(void)op_add(change, DOVETAIL_OP_EXISTS, 0, 0);
	append_add(change, 6, DOVETAIL_BODY_COPY);
}

static void
list_fill(struct dovetail_change *change, enum dovetail_list_action action)
{
	struct dovetail_change_list *list = &change->u.list;

	i_zero(change);
	change->kind = DOVETAIL_CHANGE_LIST;
	change->user = "bob";
	list->action = action;
	list->name = "Archive\t2026";
	list->new_name = action == DOVETAIL_LIST_RENAME ? "Old" : "";
	if (action != DOVETAIL_LIST_CREATE_DIR &&
	    action != DOVETAIL_LIST_SUBSCRIBE &&
	    action != DOVETAIL_LIST_UNSUBSCRIBE)
		memcpy(list->guid, guid_a, sizeof(guid_a));
	if (action == DOVETAIL_LIST_CREATE || action == DOVETAIL_LIST_UPDATE) {
		list->uid_validity = 17;
		list->uid_next = 18;
	}
}

static void tree_fill(struct dovetail_change *change)
{
	struct dovetail_tree_mailbox *m;
	const char *name = "INBOX";
	guid_128_t *deleted;

	i_zero(change);
	change->kind = DOVETAIL_CHANGE_TREE;
	change->user = "bob";
	t_array_init(&change->u.tree.mailboxes, 2);
	m = array_append_space(&change->u.tree.mailboxes);
	memcpy(m->guid, guid_a, sizeof(guid_a));
	m->name = name;
	m->uid_validity = 1;
	m->uid_next = 2;
	m = array_append_space(&change->u.tree.mailboxes);
	m->name = "Archive";
	t_array_init(&change->u.tree.subscriptions, 2);
	array_push_back(&change->u.tree.subscriptions, &name);
	name = "Shared\tx";
	array_push_back(&change->u.tree.subscriptions, &name);
	t_array_init(&change->u.tree.deleted, 1);
	deleted = array_append_space(&change->u.tree.deleted);
	memcpy(*deleted, guid_a, sizeof(guid_a));
}

static void request_fill(struct dovetail_change *change)
{
	i_zero(change);
	change->kind = DOVETAIL_CHANGE_REQUEST;
	change->user = "bob";
	memcpy(change->u.request.guid, guid_b, sizeof(guid_b));
	change->u.request.name = "INBOX";
	change->u.request.uid_next = 5;
}

static void spool_fill(struct dovetail_change *change)
{
	i_zero(change);
	change->kind = DOVETAIL_CHANGE_SPOOL;
	change->user = "bob";
	memset(change->u.spool.id, 9, sizeof(change->u.spool.id));
	change->u.spool.offset = 1 << 20;
	change->u.spool.data = "piece";
	change->u.spool.size = 5;
}

static void heartbeat_fill(struct dovetail_change *change)
{
	i_zero(change);
	change->kind = DOVETAIL_CHANGE_HEARTBEAT;
	change->user = "";
}

static void shard_fill(struct dovetail_change *change,
		       enum dovetail_change_kind kind)
{
	i_zero(change);
	change->kind = kind;
	change->user = "";
	change->u.shard.shard = 3;
	change->u.shard.node = "node-1.b";
	change->u.shard.number = 0xffffffff;
}

static void digest_fill(struct dovetail_digest *digest)
{
	memset(digest->key, 6, sizeof(digest->key));
	digest->sum.lo = 0x0102030405060708ULL;
	digest->sum.hi = UINT64_MAX;
	digest->count = 3;
}

static void mailbox_digest_fill(struct dovetail_change *change)
{
	mailbox_fill(change);
	change->u.mailbox.flags = DOVETAIL_MAILBOX_DIGEST;
	digest_fill(&change->u.mailbox.digest);
	(void)op_add(change, DOVETAIL_OP_EXPUNGE, 1, 3);
}

static void messages_fill(struct dovetail_change *change)
{
	struct dovetail_change_mailbox *m = &change->u.mailbox;

	mailbox_fill(change);
	m->flags = DOVETAIL_MAILBOX_MESSAGES | DOVETAIL_MAILBOX_MORE;
	i_zero(&m->from);
	i_zero(&m->to);
	append_add(change, 1, DOVETAIL_BODY_INLINE);
	append_add(change, 9, DOVETAIL_BODY_COPY);
}

static void tree_numbered_fill(struct dovetail_change *change)
{
	tree_fill(change);
	change->u.tree.number = 300;
	change->u.tree.flags = DOVETAIL_VERIFY_DEEP | DOVETAIL_VERIFY_EXPLAIN |
		DOVETAIL_VERIFY_REPAIR;
}

static void request_uids_fill(struct dovetail_change *change)
{
	ARRAY_TYPE(seq_range) *uids = &change->u.request.uids;

	request_fill(change);
	change->u.request.uid_next = 0;
	t_array_init(uids, 2);
	seq_range_array_add_range(uids, 2, 5);
	seq_range_array_add(uids, UINT32_MAX);
}

static void verify_fill(struct dovetail_change *change)
{
	struct dovetail_change_verify *verify = &change->u.verify;

	i_zero(change);
	change->kind = DOVETAIL_CHANGE_VERIFY;
	change->user = "bob";
	verify->number = UINT32_MAX;
	verify->flags = DOVETAIL_VERIFY_DEEP | DOVETAIL_VERIFY_REPAIR;
	memcpy(verify->guid, guid_a, sizeof(guid_a));
	verify->name = "Archive\t2026";
	verify->uid_validity = 17;
	digest_fill(&verify->digest);
}

static void text_add(struct dovetail_change *change, const char *text)
{
	array_push_back(&change->u.verified.texts, &text);
}

static void verified_fill(struct dovetail_change *change)
{
	struct dovetail_change_verified *verified = &change->u.verified;

	i_zero(change);
	change->kind = DOVETAIL_CHANGE_VERIFIED;
	change->user = "bob";
	verified->node = "node-1.b";
	verified->number = 300;
	memcpy(verified->guid, guid_a, sizeof(guid_a));
	verified->result = DOVETAIL_VERIFIED_DIFFERENT;
	verified->messages = 12;
	t_array_init(&verified->texts, 4);
	text_add(change, "uid 5: flags");
	text_add(change, "uid 7: \xc3\xbc");
}

static void range_add(ARRAY_TYPE(dovetail_range) *ranges, uint32_t uid1,
		      uint32_t uid2, uint32_t count)
{
	struct dovetail_range *range = array_append_space(ranges);

	range->uid1 = uid1;
	range->uid2 = uid2;
	range->count = count;
	range->sum.lo = uid1;
	range->sum.hi = UINT64_MAX - uid2;
}

static struct dovetail_range *
range_at(ARRAY_TYPE(dovetail_range) *ranges, unsigned int idx)
{
	return array_idx_modifiable(ranges, idx);
}

static void compare_fill(struct dovetail_change *change)
{
	struct dovetail_change_compare *compare = &change->u.compare;

	i_zero(change);
	change->kind = DOVETAIL_CHANGE_COMPARE;
	change->user = "bob";
	memcpy(compare->guid, guid_a, sizeof(guid_a));
	compare->name = "INBOX";
	compare->number = 300;
	memset(compare->key, 7, sizeof(compare->key));
	t_array_init(&compare->ranges, 4);
	range_add(&compare->ranges, 1, 1, 1);
	range_add(&compare->ranges, 2, 200, 199);
	range_add(&compare->ranges, 300, UINT32_MAX, 0);
}

static void message_add(struct dovetail_change *change, uint32_t uid,
			const char *const *keywords)
{
	struct dovetail_compared_message *message =
		array_append_space(&change->u.compared.messages);

	message->uid = uid;
	message->flags = MAIL_SEEN | MAIL_DRAFT;
	message->keywords = keywords;
	memset(message->hash, uid & 0xff, sizeof(message->hash));
}

static void compared_fill(struct dovetail_change *change)
{
	struct dovetail_change_compared *compared = &change->u.compared;

	i_zero(change);
	change->kind = DOVETAIL_CHANGE_COMPARED;
	change->user = "bob";
	memcpy(compared->guid, guid_a, sizeof(guid_a));
	compared->number = 300;
	compared->uid_validity = 17;
	compared->uid_next = 1000;
	compared->highest_modseq = UINT64_MAX;
	t_array_init(&compared->ranges, 4);
	range_add(&compared->ranges, 1, 100, 50);
	range_add(&compared->ranges, 101, 200, 0);
	t_array_init(&compared->uids, 4);
	seq_range_array_add_range(&compared->uids, 201, 300);
	seq_range_array_add(&compared->uids, 999);
	t_array_init(&compared->messages, 4);
	message_add(change, 201, two_keywords);
	message_add(change, 300, no_keywords);
	message_add(change, 999, two_keywords);
}

/* One of each kind, and of each action of a list */
#define SAMPLES 24
#define SAMPLE_SPOOL 5
#define SAMPLE_LISTS (SAMPLES - DOVETAIL_LIST_UPDATE)
static void sample_fill(unsigned int idx, struct dovetail_change *change)
{
	switch (idx) {
	case 0:
		mailbox_fill(change);
		return;
	case 1:
		mailbox_fill(change);
		mailbox_fill_ops(change);
		return;
	case 2:
		snapshot_fill(change);
		return;
	case 3:
		tree_fill(change);
		return;
	case 4:
		request_fill(change);
		return;
	case SAMPLE_SPOOL:
		spool_fill(change);
		return;
	case 6:
		heartbeat_fill(change);
		return;
	case 7:
		shard_fill(change, DOVETAIL_CHANGE_SHARD_REQUEST);
		return;
	case 8:
		shard_fill(change, DOVETAIL_CHANGE_SHARD_SWEPT);
		return;
	case 9:
		mailbox_digest_fill(change);
		return;
	case 10:
		messages_fill(change);
		return;
	case 11:
		tree_numbered_fill(change);
		return;
	case 12:
		request_uids_fill(change);
		return;
	case 13:
		verify_fill(change);
		return;
	case 14:
		verified_fill(change);
		return;
	case 15:
		compare_fill(change);
		return;
	case 16:
		compared_fill(change);
		return;
	default:
		list_fill(change, idx - SAMPLE_LISTS + DOVETAIL_LIST_CREATE);
		return;
	}
}

/* Decode; what is accepted must encode to the same bytes. */
static bool decodes(const void *data, size_t size, const char **error_r)
{
	unsigned char *copy = exact_copy(data, size);
	pool_t pool = pool_alloconly_create("test wire", 1024);
	struct dovetail_change change;
	bool ok = FALSE;

	*error_r = NULL;
	if (dovetail_change_decode(pool, copy, size, &change, error_r) == 0) {
		buffer_t *again = buffer_create_dynamic(default_pool, size + 1);

		dovetail_change_encode(again, &change);
		test_assert(again->used == size &&
			    memcmp(again->data, copy, size) == 0);
		buffer_free(&again);
		ok = TRUE;
	} else {
		test_assert(*error_r != NULL);
	}
	pool_unref(&pool);
	i_free(copy);
	return ok;
}

static void assert_error(const buffer_t *buf, const char *expected)
{
	const char *error;

	test_assert(!decodes(buf->data, buf->used, &error));
	test_assert_strcmp(error, expected);
}

static void test_wire_change_fields(void)
{
	struct dovetail_change in, out;
	const struct dovetail_change_mailbox *m = &out.u.mailbox;
	const struct dovetail_op *ops;
	unsigned int count;
	const char *error;
	buffer_t *buf = t_buffer_create(1024);

	test_begin("wire change fields");
	mailbox_fill(&in);
	mailbox_fill_ops(&in);
	dovetail_change_encode(buf, &in);
	test_assert(dovetail_change_decode(pool_datastack_create(), buf->data,
					   buf->used, &out, &error) == 0);
	test_assert(out.kind == DOVETAIL_CHANGE_MAILBOX);
	test_assert_strcmp(out.user, in.user);
	test_assert(guid_128_equals(m->guid, guid_a));
	test_assert_strcmp(m->name, "INBOX\tSent");
	test_assert(m->uid_validity == 1700000000);
	test_assert(m->uid_next == UINT32_MAX);
	test_assert(m->highest_modseq == UINT64_MAX);
	test_assert(m->flags == 0);
	test_assert(m->from.index_id == 1 && m->from.file_seq == 2 &&
		    m->from.file_offset == 300);
	test_assert(dovetail_log_pos_cmp(&m->from, &m->to) < 0);
	test_assert(dovetail_log_pos_cmp(&m->to, &in.u.mailbox.to) == 0);

	ops = array_get(&m->ops, &count);
	test_assert(count == 9);
	test_assert(ops[0].type == DOVETAIL_OP_APPEND);
	test_assert(ops[0].append.uid == 1);
	test_assert_strcmp(ops[0].append.guid, "1234567890.M1P2.host");
	test_assert(ops[0].append.flags == (MAIL_SEEN | MAIL_FLAGGED));
	test_assert_strcmp(ops[0].append.keywords[0], "$Forwarded");
	test_assert_strcmp(ops[0].append.keywords[1], "work");
	test_assert(ops[0].append.keywords[2] == NULL);
	test_assert(ops[0].append.received_date == 1700000000);
	test_assert(ops[0].append.save_date == -1700000000);
	test_assert_strcmp(ops[0].append.pop3_uidl, "uidl");
	test_assert(ops[0].append.pop3_order == 9);
	test_assert(ops[0].append.size == 11);
	test_assert(memcmp(ops[0].append.body, "From: a\r\n\r\n", 11) == 0);
	/* not copied */
	test_assert((const char *)ops[0].append.body >
		    (const char *)buf->data);
	test_assert((const char *)ops[0].append.body <
		    (const char *)buf->data + buf->used);
	test_assert(ops[1].append.source == DOVETAIL_BODY_SPOOL);
	test_assert(ops[1].append.size == UINT64_MAX);
	test_assert(ops[1].append.spool_id[15] == 5);
	test_assert(ops[2].append.source == DOVETAIL_BODY_COPY);
	test_assert(guid_128_equals(ops[2].append.copy_mailbox_guid, guid_b));
	test_assert(ops[2].append.copy_uid == 77);
	test_assert(ops[3].append.keywords[0] == NULL);
	test_assert(ops[4].add_flags == MAIL_SEEN);
	test_assert(ops[4].remove_flags == MAIL_DRAFT);
	test_assert(seq_range_count(&ops[4].uids) == 6);
	test_assert(ops[5].type == DOVETAIL_OP_KEYWORD_ADD);
	test_assert_strcmp(ops[5].keyword, "work");
	test_assert(ops[6].type == DOVETAIL_OP_KEYWORD_REMOVE);
	test_assert(ops[7].type == DOVETAIL_OP_KEYWORD_RESET);
	test_assert(ops[8].type == DOVETAIL_OP_EXPUNGE);
	test_assert(seq_range_count(&ops[8].uids) == UINT32_MAX);
	test_end();
}

static void
decode_again(const struct dovetail_change *in, struct dovetail_change *out_r)
{
	buffer_t *buf = t_buffer_create(1024);
	const char *error;

	dovetail_change_encode(buf, in);
	test_assert(dovetail_change_decode(pool_datastack_create(), buf->data,
					   buf->used, out_r, &error) == 0);
	test_assert(out_r->kind == in->kind);
	test_assert_strcmp(out_r->user, in->user);
}

static void assert_digest(const struct dovetail_digest *digest)
{
	struct dovetail_digest expected;

	i_zero(&expected);
	digest_fill(&expected);
	test_assert(dovetail_digest_equals(digest, &expected));
}

static void test_wire_change_fields_verify(void)
{
	struct dovetail_change in, out;
	const struct dovetail_change_verify *verify = &out.u.verify;
	const struct dovetail_change_verified *verified = &out.u.verified;

	test_begin("wire change fields: verify");
	mailbox_digest_fill(&in);
	decode_again(&in, &out);
	test_assert(out.u.mailbox.flags == DOVETAIL_MAILBOX_DIGEST);
	assert_digest(&out.u.mailbox.digest);
	test_assert(array_count(&out.u.mailbox.ops) == 1);

	tree_numbered_fill(&in);
	decode_again(&in, &out);
	test_assert(out.u.tree.number == 300);
	test_assert(out.u.tree.flags == 7);
	test_assert(array_count(&out.u.tree.mailboxes) == 2);
	test_assert(array_count(&out.u.tree.subscriptions) == 2);
	test_assert(array_count(&out.u.tree.deleted) == 1);
	test_assert(memcmp(array_front(&out.u.tree.deleted), guid_a,
			   sizeof(guid_a)) == 0);

	verify_fill(&in);
	decode_again(&in, &out);
	test_assert(verify->number == UINT32_MAX);
	test_assert(verify->flags ==
		    (DOVETAIL_VERIFY_DEEP | DOVETAIL_VERIFY_REPAIR));
	test_assert(guid_128_equals(verify->guid, guid_a));
	test_assert_strcmp(verify->name, "Archive\t2026");
	test_assert(verify->uid_validity == 17);
	assert_digest(&verify->digest);

	verified_fill(&in);
	decode_again(&in, &out);
	test_assert_strcmp(verified->node, "node-1.b");
	test_assert(verified->number == 300);
	test_assert(guid_128_equals(verified->guid, guid_a));
	test_assert(verified->result == DOVETAIL_VERIFIED_DIFFERENT);
	test_assert(verified->messages == 12);
	test_assert(array_count(&verified->texts) == 2);
	test_assert_strcmp(array_idx_elem(&verified->texts, 0),
			   "uid 5: flags");
	test_assert_strcmp(array_idx_elem(&verified->texts, 1),
			   "uid 7: \xc3\xbc");
	test_end();
}

static void test_wire_change_fields_compare(void)
{
	struct dovetail_change in, out;
	const struct dovetail_change_compare *compare = &out.u.compare;
	const struct dovetail_change_compared *compared = &out.u.compared;
	const struct dovetail_compared_message *message;
	const struct dovetail_range *range;

	test_begin("wire change fields: compare");
	compare_fill(&in);
	decode_again(&in, &out);
	test_assert(guid_128_equals(compare->guid, guid_a));
	test_assert_strcmp(compare->name, "INBOX");
	test_assert(compare->number == 300);
	test_assert(compare->key[0] == 7);
	test_assert(memcmp(compare->key, in.u.compare.key,
			   sizeof(compare->key)) == 0);
	test_assert(array_count(&compare->ranges) == 3);
	range = array_idx(&compare->ranges, 1);
	test_assert(range->uid1 == 2 && range->uid2 == 200);
	test_assert(range->count == 199);
	test_assert(range->sum.lo == 2 && range->sum.hi == UINT64_MAX - 200);
	range = array_idx(&compare->ranges, 2);
	test_assert(range->uid1 == 300 && range->uid2 == UINT32_MAX);

	compared_fill(&in);
	decode_again(&in, &out);
	test_assert(guid_128_equals(compared->guid, guid_a));
	test_assert(compared->number == 300);
	test_assert(compared->uid_validity == 17);
	test_assert(compared->uid_next == 1000);
	test_assert(compared->highest_modseq == UINT64_MAX);
	test_assert(array_count(&compared->ranges) == 2);
	range = array_idx(&compared->ranges, 0);
	test_assert(range->uid1 == 1 && range->uid2 == 100);
	test_assert(range->count == 50);
	test_assert(seq_range_count(&compared->uids) == 101);
	test_assert(array_count(&compared->messages) == 3);
	message = array_front(&compared->messages);
	test_assert(message->uid == 201);
	test_assert(message->flags == (MAIL_SEEN | MAIL_DRAFT));
	test_assert_strcmp(message->keywords[0], "$Forwarded");
	test_assert_strcmp(message->keywords[1], "work");
	test_assert(message->keywords[2] == NULL);
	test_assert(message->hash[0] == 201 && message->hash[15] == 201);
	message = array_idx(&compared->messages, 1);
	test_assert(message->uid == 300 && message->keywords[0] == NULL);

	request_uids_fill(&in);
	decode_again(&in, &out);
	test_assert(seq_range_count(&out.u.request.uids) == 5);
	test_assert(seq_range_exists(&out.u.request.uids, UINT32_MAX));
	request_fill(&in);
	decode_again(&in, &out);
	test_assert(array_count(&out.u.request.uids) == 0);
	messages_fill(&in);
	decode_again(&in, &out);
	test_assert(out.u.mailbox.flags == (DOVETAIL_MAILBOX_MESSAGES |
					    DOVETAIL_MAILBOX_MORE));
	test_assert(array_count(&out.u.mailbox.ops) == 2);
	test_end();
}

static void test_wire_change_texts(void)
{
	struct dovetail_change in, out;
	const struct dovetail_change_verified *verified = &out.u.verified;
	char text[DOVETAIL_VERIFIED_TEXT_MAX_SIZE + 2], controls[34];
	unsigned int i;

	test_begin("wire texts are lines");
	verified_fill(&in);
	for (i = 0; i < 31; i++)
		controls[i] = i + 1;
	controls[31] = 0x7f;
	controls[32] = ' ';
	controls[33] = '\0';
	text_add(&in, controls);
	text_add(&in, "no \xff UTF-8, \t and \x80");
	memset(text, 'a', sizeof(text) - 1);
	text[sizeof(text) - 1] = '\0';
	text_add(&in, text);
	decode_again(&in, &out);
	test_assert(array_count(&verified->texts) == 5);
	test_assert_strcmp(array_idx_elem(&verified->texts, 2),
			   "???????????????????????????????? ");
	test_assert_strcmp(array_idx_elem(&verified->texts, 3),
			   "no \xff UTF-8, ? and \x80");
	test_assert(strlen(array_idx_elem(&verified->texts, 4)) ==
		    DOVETAIL_VERIFIED_TEXT_MAX_SIZE);
	test_end();
}

static void test_wire_change_pieces(void)
{
	struct dovetail_change change;
	const struct dovetail_op *op;
	buffer_t *whole = t_buffer_create(1024);
	buffer_t *pieces = t_buffer_create(1024);

	test_begin("wire change in pieces");
	mailbox_fill(&change);
	dovetail_change_encode(pieces, &change);
	mailbox_fill_ops(&change);
	array_foreach(&change.u.mailbox.ops, op)
		dovetail_op_encode(pieces, op);
	dovetail_change_encode(whole, &change);
	test_assert(buffer_cmp(whole, pieces));
	test_end();
}

static void test_wire_change_internal_flags(void)
{
	struct dovetail_change change;
	struct dovetail_compared_message *message;
	struct dovetail_op *op;
	buffer_t *buf = t_buffer_create(1024);
	const char *error;

	test_begin("wire internal mail flags do not travel");
	mailbox_fill(&change);
	append_add(&change, 1, DOVETAIL_BODY_COPY)->flags = 0xff;
	op = op_add(&change, DOVETAIL_OP_FLAGS, 1, 1);
	op->add_flags = 0x80 | MAIL_SEEN;
	op->remove_flags = 0xff & ~MAIL_SEEN;
	dovetail_change_encode(buf, &change);
	test_assert(decodes(buf->data, buf->used, &error));
	compared_fill(&change);
	message = array_idx_modifiable(&change.u.compared.messages, 0);
	message->flags = 0xff;
	buffer_set_used_size(buf, 0);
	dovetail_change_encode(buf, &change);
	test_assert(decodes(buf->data, buf->used, &error));
	test_end();
}

static void test_wire_change_samples(void)
{
	struct dovetail_change change;
	unsigned int i, bit, refused = 0;
	const char *error;
	size_t pos;

	test_begin("wire every sample, cut and flipped everywhere");
	for (i = 0; i < SAMPLES; i++) T_BEGIN {
		buffer_t *buf = t_buffer_create(1024);
		unsigned char *data;

		sample_fill(i, &change);
		dovetail_change_encode(buf, &change);
		test_assert_idx(decodes(buf->data, buf->used, &error), i);
		for (pos = 0; pos < buf->used; pos++) T_BEGIN {
			(void)decodes(buf->data, pos, &error);
		} T_END;
		/* whatever is accepted is canonical: decodes() looks */
		data = buffer_get_modifiable_data(buf, NULL);
		for (pos = 0; pos < buf->used * 8; pos++) T_BEGIN {
			bit = 1 << (pos % 8);
			data[pos / 8] ^= bit;
			if (!decodes(data, buf->used, &error))
				refused++;
			data[pos / 8] ^= bit;
		} T_END;
		/* ops follow each other, spool data is what is there */
		buffer_append_c(buf, 0);
		if (i != SAMPLE_SPOOL)
			test_assert_idx(!decodes(buf->data, buf->used,
						 &error), i);
	} T_END;
	test_assert(refused > 0);
	test_end();
}

static void test_wire_change_random(void)
{
	struct dovetail_change change;
	const char *error;
	unsigned int i, j;
	/* xorshift: the same bytes in every run */
	uint32_t x = 2463534242U;

	test_begin("wire random damage");
	for (i = 0; i < 20000; i++) T_BEGIN {
		buffer_t *buf = t_buffer_create(1024);
		unsigned char *data;

		sample_fill(i % SAMPLES, &change);
		dovetail_change_encode(buf, &change);
		data = buffer_get_modifiable_data(buf, NULL);
		for (j = 0; j < 3; j++) {
			x ^= x << 13; x ^= x >> 17; x ^= x << 5;
			data[x % buf->used] = x >> 24;
		}
		(void)decodes(buf->data, buf->used, &error);
	} T_END;
	test_end();
}

static void test_wire_change_head(void)
{
	struct dovetail_change in, out;
	buffer_t *buf = t_buffer_create(1024);
	pool_t pool = pool_datastack_create();
	const char *error;
	size_t head_size;

	test_begin("wire change head");
	mailbox_fill(&in);
	dovetail_change_encode(buf, &in);
	head_size = buf->used;
	buffer_append(buf, "\xff nothing that is an op", 24);
	test_assert(dovetail_change_decode(pool, buf->data, buf->used,
					   &out, &error) < 0);
	test_assert_strcmp(error, "mailbox change: op 1: type is unknown");
	test_assert(dovetail_change_decode_head(pool, buf->data, buf->used,
						&out, &error) == 0);
	test_assert_strcmp(out.user, in.user);
	test_assert(out.u.mailbox.to.file_offset == 40);
	test_assert(array_count(&out.u.mailbox.ops) == 0);
	test_assert(dovetail_change_decode_head(pool, buf->data, head_size - 1,
						&out, &error) < 0);
	test_assert_strcmp(error,
			   "mailbox change: to is cut off or malformed");

	/* the digest stands in front of the ops */
	buffer_set_used_size(buf, 0);
	mailbox_digest_fill(&in);
	array_clear(&in.u.mailbox.ops);
	dovetail_change_encode(buf, &in);
	head_size = buf->used;
	buffer_append(buf, "\xff", 1);
	test_assert(dovetail_change_decode_head(pool, buf->data, buf->used,
						&out, &error) == 0);
	assert_digest(&out.u.mailbox.digest);
	test_assert(dovetail_change_decode_head(pool, buf->data, head_size - 1,
						&out, &error) < 0);
	test_assert_strcmp(error,
			   "mailbox change: count is cut off or malformed");

	/* the others have no ops and are checked to the end */
	buffer_set_used_size(buf, 0);
	request_fill(&in);
	dovetail_change_encode(buf, &in);
	test_assert(dovetail_change_decode_head(pool, buf->data, buf->used,
						&out, &error) == 0);
	buffer_append_c(buf, 0);
	test_assert(dovetail_change_decode_head(pool, buf->data, buf->used,
						&out, &error) < 0);
	test_assert_strcmp(error, "request: end is followed by more bytes");
	test_end();
}

static void test_wire_change_refused(void)
{
	struct dovetail_change change;
	buffer_t *buf = t_buffer_create(1024);

#define REFUSED(fill, damage, expected) STMT_START { \
		buffer_set_used_size(buf, 0); \
		fill; \
		damage; \
		dovetail_change_encode(buf, &change); \
		assert_error(buf, expected); \
	} STMT_END

	test_begin("wire change refused");
	REFUSED(heartbeat_fill(&change), change.user = "x",
		"heartbeat: user does not go with the kind");
	REFUSED(request_fill(&change), change.user = "",
		"request: user does not go with the kind");
	REFUSED(request_fill(&change), i_zero(&change.u.request.guid),
		"request: name is given without guid");
	REFUSED(shard_fill(&change, DOVETAIL_CHANGE_SHARD_REQUEST),
		change.user = "x",
		"shard change: user does not go with the kind");
	REFUSED(shard_fill(&change, DOVETAIL_CHANGE_SHARD_SWEPT),
		change.u.shard.node = "",
		"shard change: node is not a node name");
	REFUSED(shard_fill(&change, DOVETAIL_CHANGE_SHARD_SWEPT),
		change.u.shard.node = "A",
		"shard change: node is not a node name");
	REFUSED(mailbox_fill(&change), i_zero(&change.u.mailbox.guid),
		"mailbox change: guid is zero");
	REFUSED(mailbox_fill(&change), change.u.mailbox.flags = 0x20,
		"mailbox change: flags has unknown bits");
	REFUSED(mailbox_fill(&change),
		change.u.mailbox.flags = DOVETAIL_MAILBOX_MORE,
		"mailbox change: flags have more without snapshot");
	REFUSED(snapshot_fill(&change), change.u.mailbox.from.file_seq = 1,
		"mailbox change: from is not zero in a snapshot");
	REFUSED(snapshot_fill(&change),
		(void)op_add(&change, DOVETAIL_OP_EXISTS, 1, 1),
		"mailbox change: exists 3: type is out of place");
	REFUSED(mailbox_fill(&change),
		(void)op_add(&change, DOVETAIL_OP_EXISTS, 1, 1),
		"mailbox change: exists 1: type is out of place");
	REFUSED(snapshot_fill(&change),
		array_pop_front(&change.u.mailbox.ops),
		"mailbox change: append 1: type is out of place");
	REFUSED(mailbox_fill(&change),
		(void)op_add(&change, DOVETAIL_OP_EXPUNGE, 0, 0),
		"mailbox change: expunge 1: uids are none");
	REFUSED(mailbox_fill(&change),
		op_add(&change, DOVETAIL_OP_KEYWORD_ADD, 1, 1)->keyword = "",
		"mailbox change: keyword_add 1: keyword is empty");
	REFUSED(mailbox_fill(&change),
		append_add(&change, 0, DOVETAIL_BODY_COPY),
		"mailbox change: append 1: uid is zero");
	REFUSED(mailbox_fill(&change),
		append_add(&change, 1, DOVETAIL_BODY_COPY)->copy_uid = 0,
		"mailbox change: append 1: copy_uid is zero");
	REFUSED(list_fill(&change, DOVETAIL_LIST_SUBSCRIBE),
		change.u.list.guid[0] = 1,
		"list change: guid does not go with the action");
	REFUSED(list_fill(&change, DOVETAIL_LIST_CREATE),
		i_zero(&change.u.list.guid),
		"list change: guid does not go with the action");
	REFUSED(list_fill(&change, DOVETAIL_LIST_RENAME),
		change.u.list.new_name = "",
		"list change: new_name does not go with the action");
	REFUSED(list_fill(&change, DOVETAIL_LIST_DELETE),
		change.u.list.name = "",
		"list change: name is empty");
	REFUSED(messages_fill(&change),
		change.u.mailbox.flags |= DOVETAIL_MAILBOX_SNAPSHOT,
		"mailbox change: flags do not go with each other");
	REFUSED(messages_fill(&change),
		change.u.mailbox.flags |= DOVETAIL_MAILBOX_DIGEST,
		"mailbox change: flags do not go with each other");
	REFUSED(messages_fill(&change), change.u.mailbox.to.file_offset = 1,
		"mailbox change: to is not zero with single messages");
	REFUSED(messages_fill(&change), change.u.mailbox.from.index_id = 1,
		"mailbox change: to is not zero with single messages");
	REFUSED(messages_fill(&change),
		(void)op_add(&change, DOVETAIL_OP_EXPUNGE, 1, 1),
		"mailbox change: expunge 3: type is out of place");
	REFUSED(messages_fill(&change),
		(void)op_add(&change, DOVETAIL_OP_EXISTS, 1, 1),
		"mailbox change: exists 3: type is out of place");
	REFUSED(mailbox_digest_fill(&change),
		change.u.mailbox.flags |= DOVETAIL_MAILBOX_MORE,
		"mailbox change: flags have more without snapshot");
	REFUSED(tree_numbered_fill(&change), change.u.tree.number = 0,
		"tree change: flags are given without number");
	REFUSED(tree_numbered_fill(&change), change.u.tree.flags = 0x08,
		"tree change: flags has unknown bits");
	REFUSED(request_uids_fill(&change), change.u.request.uid_next = 1,
		"request: uids do not go with the rest");
	REFUSED(request_uids_fill(&change),
		i_zero(&change.u.request.guid); change.u.request.name = "",
		"request: uids do not go with the rest");
	REFUSED(verify_fill(&change), change.user = "",
		"verify: user does not go with the kind");
	REFUSED(verify_fill(&change), i_zero(&change.u.verify.guid),
		"verify: guid is zero");
	REFUSED(verify_fill(&change), change.u.verify.flags = 0x80,
		"verify: flags has unknown bits");
	REFUSED(verified_fill(&change), change.user = "",
		"verified: user does not go with the kind");
	REFUSED(verified_fill(&change), change.u.verified.node = "a_b",
		"verified: node is not a node name");
	REFUSED(verified_fill(&change), change.u.verified.result = 0,
		"verified: result is unknown");
	REFUSED(verified_fill(&change), change.u.verified.result = 5,
		"verified: result is unknown");
	REFUSED(verified_fill(&change), text_add(&change, ""),
		"verified: text is empty");
	REFUSED(compare_fill(&change), change.user = "",
		"compare: user does not go with the kind");
	REFUSED(compare_fill(&change), i_zero(&change.u.compare.guid),
		"compare: guid is zero");
	REFUSED(compare_fill(&change),
		range_at(&change.u.compare.ranges, 0)->uid2 = 2,
		"compare: ranges are not in order");
	REFUSED(compare_fill(&change),
		range_at(&change.u.compare.ranges, 0)->uid1 = 0,
		"compare: uid1 is zero");
	REFUSED(compare_fill(&change),
		range_at(&change.u.compare.ranges, 0)->count = 2,
		"compare: count is more than there are UIDs");
	REFUSED(compared_fill(&change), change.user = "",
		"compared: user does not go with the kind");
	REFUSED(compared_fill(&change), i_zero(&change.u.compared.guid),
		"compared: guid is zero");
	REFUSED(compared_fill(&change),
		range_at(&change.u.compared.ranges, 0)->count = 101,
		"compared: count is more than there are UIDs");
	REFUSED(compared_fill(&change),
		message_add(&change, 999, no_keywords),
		"compared: uid is out of place");
	REFUSED(compared_fill(&change),
		message_add(&change, 1000, no_keywords),
		"compared: uid is out of place");
	REFUSED(compared_fill(&change),
		seq_range_array_remove(&change.u.compared.uids, 201),
		"compared: uid is out of place");
	REFUSED(spool_fill(&change), change.u.spool.size = 0,
		"spool chunk: data is missing");
	REFUSED(spool_fill(&change), change.u.spool.offset = UINT64_MAX - 4,
		"spool chunk: offset is out of range");
	test_end();
}

static void test_wire_change_limits(void)
{
	struct dovetail_change change;
	struct dovetail_op_append *append;
	buffer_t *buf = buffer_create_dynamic(default_pool, 1024);
	buffer_t *zeros = buffer_create_dynamic(default_pool, 1024);
	unsigned int i;
	const char *error;

	test_begin("wire change limits");
	buffer_append_zero(zeros, DOVETAIL_CHANGE_MAX_SIZE);

	mailbox_fill(&change);
	append = append_add(&change, 1, DOVETAIL_BODY_INLINE);
	append->body = zeros->data;
	append->size = DOVETAIL_BODY_INLINE_MAX_SIZE;
	dovetail_change_encode(buf, &change);
	test_assert(decodes(buf->data, buf->used, &error));
	append->size++;
	buffer_set_used_size(buf, 0);
	dovetail_change_encode(buf, &change);
	assert_error(buf, "mailbox change: append 1: "
		     "body is too large to stand here");

	spool_fill(&change);
	change.u.spool.data = zeros->data;
	change.u.spool.size = DOVETAIL_SPOOL_CHUNK_SIZE;
	buffer_set_used_size(buf, 0);
	dovetail_change_encode(buf, &change);
	test_assert(decodes(buf->data, buf->used, &error));
	buffer_append_c(buf, 0);
	assert_error(buf, "spool chunk: data is too large");

	verified_fill(&change);
	while (array_count(&change.u.verified.texts) <
	       DOVETAIL_VERIFIED_TEXTS_MAX)
		text_add(&change, "text");
	buffer_set_used_size(buf, 0);
	dovetail_change_encode(buf, &change);
	test_assert(decodes(buf->data, buf->used, &error));
	text_add(&change, "text");
	buffer_set_used_size(buf, 0);
	dovetail_change_encode(buf, &change);
	assert_error(buf, "verified: texts are too many");

	compare_fill(&change);
	array_clear(&change.u.compare.ranges);
	for (i = 1; i <= DOVETAIL_RANGES_MAX; i++)
		range_add(&change.u.compare.ranges, i, i, 1);
	buffer_set_used_size(buf, 0);
	dovetail_change_encode(buf, &change);
	test_assert(decodes(buf->data, buf->used, &error));
	range_add(&change.u.compare.ranges, i, i, 1);
	buffer_set_used_size(buf, 0);
	dovetail_change_encode(buf, &change);
	assert_error(buf, "compare: ranges are too many");

	/* A change of exactly the allowed size */
	request_fill(&change);
	buffer_set_used_size(buf, 0);
	dovetail_change_encode(buf, &change);
	/* the name's size takes 4 bytes instead of 1 */
	change.u.request.name = t_strdup_printf("%0*d",
		(int)(DOVETAIL_CHANGE_MAX_SIZE - (buf->used - 5) - 3), 1);
	buffer_set_used_size(buf, 0);
	dovetail_change_encode(buf, &change);
	test_assert(buf->used == DOVETAIL_CHANGE_MAX_SIZE);
	test_assert(decodes(buf->data, buf->used, &error));
	change.u.request.name = t_strconcat(change.u.request.name, "1", NULL);
	buffer_set_used_size(buf, 0);
	dovetail_change_encode(buf, &change);
	assert_error(buf, "change: size is more than allowed");
	buffer_free(&zeros);
	buffer_free(&buf);
	test_end();
}

static void test_wire_change_claims(void)
{
	/* counts that the bytes left cannot hold */
	static const unsigned char tree[] = "\x03\x01u\xff\xff\xff\xff\x0f";
	static const unsigned char subscriptions[] =
		"\x03\x01u\x00\xff\xff\xff\xff\x0f";
	struct dovetail_change change;
	buffer_t *buf = t_buffer_create(1024);
	const char *error;

	test_begin("wire claimed counts");
	test_assert(!decodes(tree, sizeof(tree) - 1, &error));
	test_assert_strcmp(error, "tree change: mailboxes "
			   "is more than the bytes left can hold");
	test_assert(!decodes(subscriptions, sizeof(subscriptions) - 1, &error));
	test_assert_strcmp(error, "tree change: subscriptions "
			   "is more than the bytes left can hold");
	mailbox_fill(&change);
	dovetail_change_encode(buf, &change);
	buffer_append(buf, "\x01\x01\x00\x00\xff\xff\xff\xff\x0f", 9);
	assert_error(buf, "mailbox change: append 1: keywords "
		     "is more than the bytes left can hold");
	test_assert(!decodes("", 0, &error));
	test_assert_strcmp(error, "change: kind is cut off or malformed");
	test_end();
}

/* Bytes that decoding takes */
static size_t decode_memory(const buffer_t *buf, const char **error_r)
{
	pool_t pool = pool_alloconly_create("test wire memory", 1024);
	struct dovetail_change change;
	size_t memory;

	if (dovetail_change_decode(pool, buf->data, buf->used, &change,
				   error_r) == 0)
		*error_r = NULL;
	memory = pool_alloconly_get_total_alloc_size(pool);
	pool_unref(&pool);
	return memory;
}

static void test_wire_change_memory(void)
{
	/* the change up to a count, and what one of those has at least */
	static const struct {
		const char *head;
		size_t head_size, min_size;
		const char *field;
		/* there is a limit besides, far below */
		bool limited;
	} tests[] = {
#define HEAD(str) str, sizeof(str) - 1
#define GUID "aaaabbbbccccdddd"
		{ HEAD("\x03\x01u"), 19, "tree change: mailboxes", FALSE },
		{ HEAD("\x03\x01u\0"), 1,
		  "tree change: subscriptions", FALSE },
		{ HEAD("\x03\x01u\0\0"), 16, "tree change: deleted", FALSE },
		{ HEAD("\x04\x01u" GUID "\0\0"), 2, "request: uids", FALSE },
		{ HEAD("\x0a\x01u\x01" "a\x07" GUID "\x01\x07"), 2,
		  "verified: texts", TRUE },
		{ HEAD("\x0b\x01u" GUID "\0\x07" GUID), 19,
		  "compare: ranges", TRUE },
		{ HEAD("\x0c\x01u" GUID "\x07\0\0\0\0\0\0"), 19,
		  "compared: ranges", TRUE },
		{ HEAD("\x0c\x01u" GUID "\x07\0\0\0\0\0\0\0"), 2,
		  "compared: uids", FALSE },
		{ HEAD("\x0c\x01u" GUID "\x07\0\0\0\0\0\0\0\x01\0\0"), 19,
		  "compared: messages", FALSE },
		{ HEAD("\x0c\x01u" GUID "\x07\0\0\0\0\0\0\0\x01\0\0\x01"
		       "\x01\0"), 2, "compared: keywords", FALSE },
#undef GUID
#undef HEAD
	};
	const size_t rest_size = 256 * 1024;
	static const uint64_t claims[] = {
		UINT32_MAX, (uint64_t)UINT32_MAX + 1, UINT64_MAX
	};
	buffer_t *buf = buffer_create_dynamic(default_pool, 1024);
	const char *error;
	unsigned int i, j;
	size_t memory_max;

	test_begin("wire memory for claimed counts");
	for (i = 0; i < N_ELEMENTS(tests); i++) {
		/* more than the bytes left can hold: nothing is allocated */
		for (j = 0; j <= N_ELEMENTS(claims); j++) {
			buffer_set_used_size(buf, 0);
			buffer_append(buf, tests[i].head, tests[i].head_size);
			dovetail_wire_put_num(buf, j < N_ELEMENTS(claims) ?
				claims[j] : rest_size / tests[i].min_size + 1);
			buffer_append_zero(buf, rest_size);
			test_assert_idx(decode_memory(buf, &error) <= 2048, i);
			test_assert_idx(error != NULL &&
					strncmp(error, tests[i].field,
						strlen(tests[i].field)) == 0,
					i);
		}
		/* As many as they might hold, or as are allowed. An empty
		   subscription of one byte is the worst: a pointer, a string
		   of 8 bytes, and a pool that grows by doubling. */
		buffer_set_used_size(buf, 0);
		buffer_append(buf, tests[i].head, tests[i].head_size);
		dovetail_wire_put_num(buf, rest_size / tests[i].min_size);
		buffer_append_zero(buf, rest_size);
		memory_max = tests[i].limited ? 2048 : rest_size * 64;
		test_assert_idx(decode_memory(buf, &error) <= memory_max, i);
	}
	buffer_free(&buf);
	test_end();
}

int main(void)
{
	static void (*const test_functions[])(void) = {
		test_wire_num,
		test_wire_num_refused,
		test_wire_snum,
		test_wire_bytes,
		test_wire_uids,
		test_wire_uids_added,
		test_wire_change_fields,
		test_wire_change_fields_verify,
		test_wire_change_fields_compare,
		test_wire_change_texts,
		test_wire_change_pieces,
		test_wire_change_internal_flags,
		test_wire_change_samples,
		test_wire_change_random,
		test_wire_change_head,
		test_wire_change_refused,
		test_wire_change_limits,
		test_wire_change_claims,
		test_wire_change_memory,
		NULL
	};
	return test_run(test_functions);
}
