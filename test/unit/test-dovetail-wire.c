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

#define SAMPLES 18
static bool sample_fill(unsigned int idx, struct dovetail_change *change)
{
	switch (idx) {
	case 0:
		mailbox_fill(change);
		return TRUE;
	case 1:
		mailbox_fill(change);
		mailbox_fill_ops(change);
		return TRUE;
	case 2:
		snapshot_fill(change);
		return TRUE;
	case 3:
		tree_fill(change);
		return TRUE;
	case 4:
		request_fill(change);
		return TRUE;
	case 5:
		spool_fill(change);
		return TRUE;
	case 6:
		heartbeat_fill(change);
		return TRUE;
	case 7:
		shard_fill(change, DOVETAIL_CHANGE_SHARD_REQUEST);
		return TRUE;
	case 8:
		shard_fill(change, DOVETAIL_CHANGE_SHARD_SWEPT);
		return TRUE;
	default:
		list_fill(change, idx - 8);
		return idx - 8 <= DOVETAIL_LIST_UPDATE;
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
	test_end();
}

static void test_wire_change_samples(void)
{
	struct dovetail_change change;
	unsigned int i, bit, refused = 0;
	const char *error;
	size_t pos;

	test_begin("wire every sample, cut and flipped everywhere");
	for (i = 0; i < SAMPLES && sample_fill(i, &change); i++) T_BEGIN {
		buffer_t *buf = t_buffer_create(1024);
		unsigned char *data;

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
		if (i != 5)
			test_assert_idx(!decodes(buf->data, buf->used,
						 &error), i);
	} T_END;
	test_assert(i == 16);
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

		(void)sample_fill(i % 16, &change);
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
	REFUSED(mailbox_fill(&change), change.u.mailbox.flags = 0x10,
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
		test_wire_change_pieces,
		test_wire_change_internal_flags,
		test_wire_change_samples,
		test_wire_change_random,
		test_wire_change_head,
		test_wire_change_refused,
		test_wire_change_limits,
		test_wire_change_claims,
		NULL
	};
	return test_run(test_functions);
}
