/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "array.h"
#include "buffer.h"
#include "numpack.h"
#include "mail-types.h"
#include "dovetail-node.h"
#include "dovetail-wire.h"

/* The flags that travel: \Recent and Dovecot's internal bits do not. */
#define WIRE_MAIL_FLAGS ((uint8_t)MAIL_FLAGS_NONRECENT)
#define WIRE_MAILBOX_FLAGS \
	(DOVETAIL_MAILBOX_SNAPSHOT | DOVETAIL_MAILBOX_MORE | \
	 DOVETAIL_MAILBOX_DIGEST | DOVETAIL_MAILBOX_MESSAGES | \
	 DOVETAIL_MAILBOX_ATTRIBUTES)
#define WIRE_VERIFY_FLAGS \
	(DOVETAIL_VERIFY_DEEP | DOVETAIL_VERIFY_EXPLAIN | \
	 DOVETAIL_VERIFY_REPAIR)

/* The smallest encodings, which bound what a claimed count may allocate */
#define WIRE_KEYWORD_MIN_SIZE 2
#define WIRE_RANGE_MIN_SIZE 2
#define WIRE_TREE_MAILBOX_MIN_SIZE (GUID_128_SIZE + 3)
#define WIRE_SUBSCRIPTION_MIN_SIZE 1
#define WIRE_TEXT_MIN_SIZE 2
#define WIRE_RANGE_DIGEST_MIN_SIZE (3 + DOVETAIL_DIGEST_SUM_SIZE)
#define WIRE_COMPARED_MESSAGE_MIN_SIZE (3 + DOVETAIL_MESSAGE_HASH_SIZE)
#define WIRE_ATTRIBUTE_MIN_SIZE 4

#define WIRE_ATTRIBUTE_SHARED 0x01
#define WIRE_ATTRIBUTE_VALUE 0x02

/* ---- primitives ---- */

void dovetail_wire_put_num(buffer_t *buf, uint64_t num)
{
	numpack_encode(buf, num);
}

void dovetail_wire_put_snum(buffer_t *buf, int64_t num)
{
	uint64_t twice = (uint64_t)(num < 0 ? -(num + 1) : num) * 2;

	dovetail_wire_put_num(buf, num < 0 ? twice + 1 : twice);
}

void dovetail_wire_put_u8(buffer_t *buf, uint8_t num)
{
	buffer_append_c(buf, num);
}

void dovetail_wire_put_bytes(buffer_t *buf, const void *data, size_t size)
{
	dovetail_wire_put_num(buf, size);
	buffer_append(buf, data, size);
}

void dovetail_wire_put_str(buffer_t *buf, const char *str)
{
	dovetail_wire_put_bytes(buf, str, strlen(str));
}

void dovetail_wire_put_guid(buffer_t *buf, const guid_128_t guid)
{
	buffer_append(buf, guid, GUID_128_SIZE);
}

void dovetail_wire_put_uids(buffer_t *buf, const ARRAY_TYPE(seq_range) *uids)
{
	const struct seq_range *range;
	/* the lowest uid that the next range may start with */
	uint64_t lowest = 1;

	dovetail_wire_put_num(buf, array_count(uids));
	array_foreach(uids, range) {
		i_assert(range->seq1 >= lowest && range->seq2 >= range->seq1);
		dovetail_wire_put_num(buf, range->seq1 - lowest);
		dovetail_wire_put_num(buf, range->seq2 - range->seq1);
		lowest = (uint64_t)range->seq2 + 2;
	}
}

void dovetail_wire_reader_init(struct dovetail_wire_reader *r,
			       const void *data, size_t size)
{
	i_zero(r);
	/* a failing get is the only one to return NULL */
	r->pos = data != NULL ? data : &uchar_nul;
	r->end = r->pos + size;
}

static size_t reader_left(const struct dovetail_wire_reader *r)
{
	return r->end - r->pos;
}

static void reader_fail(struct dovetail_wire_reader *r)
{
	r->failed = TRUE;
	r->pos = r->end;
}

uint64_t dovetail_wire_get_num(struct dovetail_wire_reader *r)
{
	const unsigned char *p;
	uint64_t num = 0;
	unsigned int shift = 0;

	/* Not numpack_decode(): it takes longer forms also, and reads a byte
	   past the end of ten bytes that all say there is more. */
	for (p = r->pos; p != r->end && shift < 64; p++, shift += 7) {
		if (shift == 63 && *p > 1)
			break;
		num |= (uint64_t)(*p & 0x7f) << shift;
		if ((*p & 0x80) == 0) {
			if (*p == 0 && shift > 0)
				break;
			r->pos = p + 1;
			return num;
		}
	}
	reader_fail(r);
	return 0;
}

uint32_t dovetail_wire_get_num32(struct dovetail_wire_reader *r)
{
	uint64_t num = dovetail_wire_get_num(r);

	if (num > UINT32_MAX) {
		reader_fail(r);
		return 0;
	}
	return num;
}

int64_t dovetail_wire_get_snum(struct dovetail_wire_reader *r)
{
	uint64_t num = dovetail_wire_get_num(r);
	int64_t half = num >> 1;

	return (num & 1) != 0 ? -half - 1 : half;
}

uint8_t dovetail_wire_get_u8(struct dovetail_wire_reader *r)
{
	if (r->pos == r->end) {
		reader_fail(r);
		return 0;
	}
	return *r->pos++;
}

const void *dovetail_wire_get_raw(struct dovetail_wire_reader *r, size_t size)
{
	const unsigned char *data = r->pos;

	if (r->failed || size > reader_left(r)) {
		reader_fail(r);
		return NULL;
	}
	r->pos += size;
	return data;
}

const void *dovetail_wire_get_bytes(struct dovetail_wire_reader *r,
				    size_t *size_r)
{
	uint64_t size = dovetail_wire_get_num(r);

	*size_r = 0;
	if (r->failed || size > reader_left(r)) {
		reader_fail(r);
		return NULL;
	}
	*size_r = size;
	return dovetail_wire_get_raw(r, size);
}

const char *dovetail_wire_get_str(struct dovetail_wire_reader *r, pool_t pool)
{
	size_t size;
	const void *data = dovetail_wire_get_bytes(r, &size);

	if (data == NULL)
		return "";
	if (memchr(data, '\0', size) != NULL) {
		reader_fail(r);
		return "";
	}
	return p_strndup(pool, data, size);
}

void dovetail_wire_get_guid(struct dovetail_wire_reader *r, guid_128_t guid_r)
{
	const void *data = dovetail_wire_get_raw(r, GUID_128_SIZE);

	if (data == NULL)
		guid_128_empty(guid_r);
	else
		memcpy(guid_r, data, GUID_128_SIZE);
}

void dovetail_wire_get_uids(struct dovetail_wire_reader *r,
			    ARRAY_TYPE(seq_range) *uids)
{
	uint64_t count = dovetail_wire_get_num(r);
	uint64_t lowest = 1;

	if (count > reader_left(r) / WIRE_RANGE_MIN_SIZE) {
		reader_fail(r);
		return;
	}
	for (; count > 0; count--) {
		uint64_t first = lowest + dovetail_wire_get_num32(r);
		uint64_t last = first + dovetail_wire_get_num32(r);

		if (r->failed || last > UINT32_MAX) {
			reader_fail(r);
			return;
		}
		seq_range_array_add_range(uids, first, last);
		lowest = last + 2;
	}
}

bool dovetail_wire_reader_done(const struct dovetail_wire_reader *r)
{
	return !r->failed && r->pos == r->end;
}

/* ---- encoding ---- */

static bool is_control(char c)
{
	return (unsigned char)c < 0x20 || c == 0x7f;
}

static void put_pos(buffer_t *buf, const struct dovetail_log_pos *pos)
{
	dovetail_wire_put_num(buf, pos->index_id);
	dovetail_wire_put_num(buf, pos->file_seq);
	dovetail_wire_put_num(buf, pos->file_offset);
}

static void put_sum(buffer_t *buf, const struct dovetail_sum *sum)
{
	uint8_t bytes[DOVETAIL_DIGEST_SUM_SIZE];

	dovetail_sum_to_bytes(sum, bytes);
	buffer_append(buf, bytes, sizeof(bytes));
}

static void put_digest(buffer_t *buf, const struct dovetail_digest *digest)
{
	buffer_append(buf, digest->key, sizeof(digest->key));
	put_sum(buf, &digest->sum);
	dovetail_wire_put_num(buf, digest->count);
}

static void put_keywords(buffer_t *buf, const char *const *keywords)
{
	unsigned int i, count = str_array_length(keywords);

	dovetail_wire_put_num(buf, count);
	for (i = 0; i < count; i++)
		dovetail_wire_put_str(buf, keywords[i]);
}

static void put_append(buffer_t *buf, const struct dovetail_op_append *append)
{
	dovetail_wire_put_num(buf, append->uid);
	dovetail_wire_put_str(buf, append->guid);
	dovetail_wire_put_u8(buf, append->flags & WIRE_MAIL_FLAGS);
	put_keywords(buf, append->keywords);
	dovetail_wire_put_snum(buf, append->received_date);
	dovetail_wire_put_snum(buf, append->save_date);
	dovetail_wire_put_str(buf, append->pop3_uidl);
	dovetail_wire_put_num(buf, append->pop3_order);
	dovetail_wire_put_num(buf, append->size);
	dovetail_wire_put_u8(buf, append->source);

	switch (append->source) {
	case DOVETAIL_BODY_INLINE:
		buffer_append(buf, append->body, append->size);
		return;
	case DOVETAIL_BODY_SPOOL:
		buffer_append(buf, append->spool_id, DOVETAIL_SPOOL_ID_SIZE);
		return;
	case DOVETAIL_BODY_COPY:
		dovetail_wire_put_guid(buf, append->copy_mailbox_guid);
		dovetail_wire_put_num(buf, append->copy_uid);
		return;
	}
	i_unreached();
}

void dovetail_attribute_encode(buffer_t *buf,
			       const struct dovetail_attribute *attribute)
{
	dovetail_wire_put_u8(buf,
		(attribute->shared ? WIRE_ATTRIBUTE_SHARED : 0) |
		(attribute->value != NULL ? WIRE_ATTRIBUTE_VALUE : 0));
	dovetail_wire_put_str(buf, attribute->key);
	if (attribute->value != NULL)
		dovetail_wire_put_str(buf, attribute->value);
}

int dovetail_attribute_cmp(const struct dovetail_attribute *a,
			   const struct dovetail_attribute *b)
{
	int ret;

	if (a->shared != b->shared)
		return a->shared ? 1 : -1;
	ret = strcmp(a->key, b->key);
	return ret < 0 ? -1 : ret > 0 ? 1 : 0;
}

void dovetail_op_encode(buffer_t *buf, const struct dovetail_op *op)
{
	dovetail_wire_put_u8(buf, op->type);

	switch (op->type) {
	case DOVETAIL_OP_APPEND:
		put_append(buf, &op->append);
		return;
	case DOVETAIL_OP_FLAGS:
		dovetail_wire_put_u8(buf, op->add_flags & WIRE_MAIL_FLAGS);
		dovetail_wire_put_u8(buf, op->remove_flags & WIRE_MAIL_FLAGS);
		dovetail_wire_put_uids(buf, &op->uids);
		return;
	case DOVETAIL_OP_KEYWORD_ADD:
	case DOVETAIL_OP_KEYWORD_REMOVE:
		dovetail_wire_put_str(buf, op->keyword);
		dovetail_wire_put_uids(buf, &op->uids);
		return;
	case DOVETAIL_OP_KEYWORD_RESET:
	case DOVETAIL_OP_EXPUNGE:
	case DOVETAIL_OP_EXISTS:
		dovetail_wire_put_uids(buf, &op->uids);
		return;
	case DOVETAIL_OP_ATTRIBUTE:
		dovetail_attribute_encode(buf, &op->attribute);
		return;
	}
	i_unreached();
}

static void put_mailbox(buffer_t *buf, const struct dovetail_change_mailbox *m)
{
	const struct dovetail_op *op;

	dovetail_wire_put_guid(buf, m->guid);
	dovetail_wire_put_str(buf, m->name);
	dovetail_wire_put_num(buf, m->uid_validity);
	dovetail_wire_put_num(buf, m->uid_next);
	dovetail_wire_put_num(buf, m->highest_modseq);
	dovetail_wire_put_u8(buf, m->flags);
	put_pos(buf, &m->from);
	put_pos(buf, &m->to);
	if ((m->flags & DOVETAIL_MAILBOX_DIGEST) != 0)
		put_digest(buf, &m->digest);
	if (!array_is_created(&m->ops))
		return;
	array_foreach(&m->ops, op)
		dovetail_op_encode(buf, op);
}

static void put_list(buffer_t *buf, const struct dovetail_change_list *list)
{
	bool renamed = list->action == DOVETAIL_LIST_RENAME;
	bool has_uids = list->action == DOVETAIL_LIST_CREATE ||
		list->action == DOVETAIL_LIST_UPDATE;

	dovetail_wire_put_u8(buf, list->action);
	dovetail_wire_put_guid(buf, list->guid);
	dovetail_wire_put_str(buf, list->name);
	dovetail_wire_put_str(buf, renamed ? list->new_name : "");
	dovetail_wire_put_num(buf, has_uids ? list->uid_validity : 0);
	dovetail_wire_put_num(buf, has_uids ? list->uid_next : 0);
}

static void put_tree(buffer_t *buf, const struct dovetail_change_tree *tree)
{
	const struct dovetail_tree_mailbox *m;
	const char *const *name;
	const guid_128_t *deleted;

	dovetail_wire_put_num(buf, array_count(&tree->mailboxes));
	array_foreach(&tree->mailboxes, m) {
		dovetail_wire_put_guid(buf, m->guid);
		dovetail_wire_put_str(buf, m->name);
		dovetail_wire_put_num(buf, m->uid_validity);
		dovetail_wire_put_num(buf, m->uid_next);
	}
	dovetail_wire_put_num(buf, array_count(&tree->subscriptions));
	array_foreach(&tree->subscriptions, name)
		dovetail_wire_put_str(buf, *name);
	dovetail_wire_put_num(buf, array_count(&tree->deleted));
	array_foreach(&tree->deleted, deleted)
		dovetail_wire_put_guid(buf, *deleted);
	dovetail_wire_put_num(buf, tree->number);
	dovetail_wire_put_u8(buf, tree->flags);
}

static void
put_request(buffer_t *buf, const struct dovetail_change_request *request)
{
	dovetail_wire_put_guid(buf, request->guid);
	dovetail_wire_put_str(buf, request->name);
	dovetail_wire_put_num(buf, request->uid_next);
	if (array_is_created(&request->uids))
		dovetail_wire_put_uids(buf, &request->uids);
	else
		dovetail_wire_put_num(buf, 0);
}

static void
put_verify(buffer_t *buf, const struct dovetail_change_verify *verify)
{
	dovetail_wire_put_num(buf, verify->number);
	dovetail_wire_put_u8(buf, verify->flags);
	dovetail_wire_put_guid(buf, verify->guid);
	dovetail_wire_put_str(buf, verify->name);
	dovetail_wire_put_num(buf, verify->uid_validity);
	put_pos(buf, &verify->at);
	put_digest(buf, &verify->digest);
	buffer_append(buf, verify->attributes, sizeof(verify->attributes));
}

/* A line for people. Names and errors of others may stand in it. */
static void put_text(buffer_t *buf, const char *text)
{
	size_t i, size = strlen(text);

	size = I_MIN(size, DOVETAIL_VERIFIED_TEXT_MAX_SIZE);
	dovetail_wire_put_num(buf, size);
	for (i = 0; i < size; i++)
		buffer_append_c(buf, is_control(text[i]) ? '?' : text[i]);
}

static void
put_verified(buffer_t *buf, const struct dovetail_change_verified *verified)
{
	const char *const *text;

	dovetail_wire_put_str(buf, verified->node);
	dovetail_wire_put_num(buf, verified->number);
	dovetail_wire_put_guid(buf, verified->guid);
	dovetail_wire_put_u8(buf, verified->result);
	dovetail_wire_put_num(buf, verified->messages);
	dovetail_wire_put_num(buf, array_count(&verified->texts));
	array_foreach(&verified->texts, text)
		put_text(buf, *text);
}

static void put_ranges(buffer_t *buf, const ARRAY_TYPE(dovetail_range) *ranges)
{
	const struct dovetail_range *range;

	dovetail_wire_put_num(buf, array_count(ranges));
	array_foreach(ranges, range) {
		dovetail_wire_put_num(buf, range->uid1);
		dovetail_wire_put_num(buf, range->uid2 - range->uid1);
		dovetail_wire_put_num(buf, range->count);
		put_sum(buf, &range->sum);
	}
}

static void
put_compare(buffer_t *buf, const struct dovetail_change_compare *compare)
{
	dovetail_wire_put_guid(buf, compare->guid);
	dovetail_wire_put_str(buf, compare->name);
	dovetail_wire_put_num(buf, compare->number);
	buffer_append(buf, compare->key, sizeof(compare->key));
	put_ranges(buf, &compare->ranges);
}

static void
put_compared(buffer_t *buf, const struct dovetail_change_compared *compared)
{
	const struct dovetail_compared_message *message;
	const struct dovetail_attribute *attribute;

	dovetail_wire_put_guid(buf, compared->guid);
	dovetail_wire_put_num(buf, compared->number);
	dovetail_wire_put_num(buf, compared->uid_validity);
	dovetail_wire_put_num(buf, compared->uid_next);
	dovetail_wire_put_num(buf, compared->highest_modseq);
	put_pos(buf, &compared->at);
	put_ranges(buf, &compared->ranges);
	dovetail_wire_put_uids(buf, &compared->uids);
	dovetail_wire_put_num(buf, array_count(&compared->messages));
	array_foreach(&compared->messages, message) {
		dovetail_wire_put_num(buf, message->uid);
		dovetail_wire_put_u8(buf, message->flags & WIRE_MAIL_FLAGS);
		put_keywords(buf, message->keywords);
		buffer_append(buf, message->hash, sizeof(message->hash));
	}
	dovetail_wire_put_u8(buf, compared->with_attributes ? 1 : 0);
	if (!compared->with_attributes)
		return;
	dovetail_wire_put_num(buf, array_count(&compared->attributes));
	array_foreach(&compared->attributes, attribute)
		dovetail_attribute_encode(buf, attribute);
}

void dovetail_change_encode(buffer_t *buf, const struct dovetail_change *change)
{
	dovetail_wire_put_u8(buf, change->kind);
	dovetail_wire_put_str(buf, change->user);

	switch (change->kind) {
	case DOVETAIL_CHANGE_MAILBOX:
		put_mailbox(buf, &change->u.mailbox);
		return;
	case DOVETAIL_CHANGE_LIST:
		put_list(buf, &change->u.list);
		return;
	case DOVETAIL_CHANGE_TREE:
		put_tree(buf, &change->u.tree);
		return;
	case DOVETAIL_CHANGE_REQUEST:
		put_request(buf, &change->u.request);
		return;
	case DOVETAIL_CHANGE_SPOOL:
		buffer_append(buf, change->u.spool.id, DOVETAIL_SPOOL_ID_SIZE);
		dovetail_wire_put_num(buf, change->u.spool.offset);
		buffer_append(buf, change->u.spool.data, change->u.spool.size);
		return;
	case DOVETAIL_CHANGE_HEARTBEAT:
		return;
	case DOVETAIL_CHANGE_SHARD_REQUEST:
	case DOVETAIL_CHANGE_SHARD_SWEPT:
		dovetail_wire_put_u8(buf, change->u.shard.shard);
		dovetail_wire_put_str(buf, change->u.shard.node);
		dovetail_wire_put_num(buf, change->u.shard.number);
		return;
	case DOVETAIL_CHANGE_VERIFY:
		put_verify(buf, &change->u.verify);
		return;
	case DOVETAIL_CHANGE_VERIFIED:
		put_verified(buf, &change->u.verified);
		return;
	case DOVETAIL_CHANGE_COMPARE:
		put_compare(buf, &change->u.compare);
		return;
	case DOVETAIL_CHANGE_COMPARED:
		put_compared(buf, &change->u.compared);
		return;
	}
	i_unreached();
}

/* ---- decoding ---- */

/* A reader that remembers the first field it could not make sense of. The
   first failure empties the reader, so what follows ends quickly. */
struct decoder {
	struct dovetail_wire_reader r;
	pool_t pool;
	/* constant strings */
	const char *kind, *op, *field, *problem;
	unsigned int op_idx;
};

static void invalid(struct decoder *d, const char *field, const char *problem)
{
	if (d->field == NULL) {
		d->field = field;
		d->problem = problem;
	}
	reader_fail(&d->r);
}

static void check(struct decoder *d, const char *field)
{
	if (d->r.failed)
		invalid(d, field, "is cut off or malformed");
}

static uint64_t get_num(struct decoder *d, const char *field)
{
	uint64_t num = dovetail_wire_get_num(&d->r);

	check(d, field);
	return num;
}

static uint32_t get_num32(struct decoder *d, const char *field)
{
	uint32_t num = dovetail_wire_get_num32(&d->r);

	check(d, field);
	return num;
}

static uint32_t get_uid(struct decoder *d, const char *field)
{
	uint32_t uid = get_num32(d, field);

	if (uid == 0)
		invalid(d, field, "is zero");
	return uid;
}

static time_t get_time(struct decoder *d, const char *field)
{
	int64_t num = dovetail_wire_get_snum(&d->r);
	time_t value = num;

	check(d, field);
	if (value != num)
		invalid(d, field, "is out of range");
	return value;
}

static uint8_t get_u8(struct decoder *d, const char *field)
{
	uint8_t num = dovetail_wire_get_u8(&d->r);

	check(d, field);
	return num;
}

static uint8_t get_flags(struct decoder *d, const char *field, uint8_t known)
{
	uint8_t flags = get_u8(d, field);

	if ((flags & ~known) != 0)
		invalid(d, field, "has unknown bits");
	return flags & known;
}

static const void *get_raw(struct decoder *d, const char *field, size_t size)
{
	const void *data = dovetail_wire_get_raw(&d->r, size);

	check(d, field);
	return data;
}

static const char *get_str(struct decoder *d, const char *field)
{
	const char *str = dovetail_wire_get_str(&d->r, d->pool);

	check(d, field);
	return str;
}

static const char *get_filled_str(struct decoder *d, const char *field)
{
	const char *str = get_str(d, field);

	if (*str == '\0')
		invalid(d, field, "is empty");
	return str;
}

static void get_guid(struct decoder *d, const char *field, guid_128_t guid_r)
{
	dovetail_wire_get_guid(&d->r, guid_r);
	check(d, field);
}

static void get_mailbox_guid(struct decoder *d, guid_128_t guid_r)
{
	get_guid(d, "guid", guid_r);
	if (guid_128_is_empty(guid_r))
		invalid(d, "guid", "is zero");
}

static void get_node(struct decoder *d, const char **node_r)
{
	*node_r = get_str(d, "node");
	if (!dovetail_node_name_is_valid(*node_r))
		invalid(d, "node", "is not a node name");
}

/* A count of things of at least min_size bytes each */
static unsigned int
get_count(struct decoder *d, const char *field, size_t min_size)
{
	uint64_t count = get_num(d, field);

	if (count > reader_left(&d->r) / min_size) {
		invalid(d, field, "is more than the bytes left can hold");
		return 0;
	}
	return count;
}

static void
get_spool_id(struct decoder *d, const char *field,
	     uint8_t id_r[DOVETAIL_SPOOL_ID_SIZE])
{
	const void *data = get_raw(d, field, DOVETAIL_SPOOL_ID_SIZE);

	if (data != NULL)
		memcpy(id_r, data, DOVETAIL_SPOOL_ID_SIZE);
}

static void get_pos(struct decoder *d, const char *field,
		    struct dovetail_log_pos *pos_r)
{
	pos_r->index_id = get_num32(d, field);
	pos_r->file_seq = get_num32(d, field);
	pos_r->file_offset = get_num32(d, field);
}

static bool pos_is_zero(const struct dovetail_log_pos *pos)
{
	return pos->index_id == 0 && pos->file_seq == 0 &&
		pos->file_offset == 0;
}

static void get_sum(struct decoder *d, const char *field,
		    struct dovetail_sum *sum_r)
{
	const void *data = get_raw(d, field, DOVETAIL_DIGEST_SUM_SIZE);

	if (data != NULL)
		dovetail_sum_from_bytes(data, sum_r);
}

static void
get_key(struct decoder *d, uint8_t key_r[DOVETAIL_DIGEST_KEY_SIZE])
{
	const void *data = get_raw(d, "key", DOVETAIL_DIGEST_KEY_SIZE);

	if (data != NULL)
		memcpy(key_r, data, DOVETAIL_DIGEST_KEY_SIZE);
}

static void get_digest(struct decoder *d, struct dovetail_digest *digest_r)
{
	get_key(d, digest_r->key);
	get_sum(d, "digest", &digest_r->sum);
	digest_r->count = get_num32(d, "count");
}

static void get_keywords(struct decoder *d, const char *const **keywords_r)
{
	unsigned int i, count =
		get_count(d, "keywords", WIRE_KEYWORD_MIN_SIZE);
	const char **keywords = p_new(d->pool, const char *, count + 1);

	for (i = 0; i < count && !d->r.failed; i++)
		keywords[i] = get_filled_str(d, "keywords");
	*keywords_r = keywords;
}

static void get_body(struct decoder *d, struct dovetail_op_append *append)
{
	uint8_t source = get_u8(d, "source");

	append->source = source;
	switch (source) {
	case DOVETAIL_BODY_INLINE:
		if (append->size > DOVETAIL_BODY_INLINE_MAX_SIZE)
			invalid(d, "body", "is too large to stand here");
		else
			append->body = get_raw(d, "body", append->size);
		return;
	case DOVETAIL_BODY_SPOOL:
		get_spool_id(d, "spool_id", append->spool_id);
		return;
	case DOVETAIL_BODY_COPY:
		get_guid(d, "copy_mailbox_guid", append->copy_mailbox_guid);
		append->copy_uid = get_uid(d, "copy_uid");
		return;
	}
	invalid(d, "source", "is unknown");
}

static void get_append(struct decoder *d, struct dovetail_op_append *append)
{
	append->uid = get_uid(d, "uid");
	append->guid = get_str(d, "guid");
	append->flags = get_flags(d, "flags", WIRE_MAIL_FLAGS);
	get_keywords(d, &append->keywords);
	append->received_date = get_time(d, "received_date");
	append->save_date = get_time(d, "save_date");
	append->pop3_uidl = get_str(d, "pop3_uidl");
	append->pop3_order = get_num32(d, "pop3_order");
	append->size = get_num(d, "size");
	get_body(d, append);
}

static void get_uids(struct decoder *d, struct dovetail_op *op)
{
	p_array_init(&op->uids, d->pool, 1);
	dovetail_wire_get_uids(&d->r, &op->uids);
	check(d, "uids");
	if (op->type != DOVETAIL_OP_EXISTS && array_count(&op->uids) == 0)
		invalid(d, "uids", "are none");
}

static void
get_attribute(struct decoder *d, struct dovetail_attribute *attribute)
{
	uint8_t flags;

	flags = get_flags(d, "attribute flags",
			  WIRE_ATTRIBUTE_SHARED | WIRE_ATTRIBUTE_VALUE);
	attribute->shared = (flags & WIRE_ATTRIBUTE_SHARED) != 0;
	attribute->key = get_filled_str(d, "attribute key");
	if (strlen(attribute->key) > DOVETAIL_ATTRIBUTE_KEY_MAX_SIZE)
		invalid(d, "attribute key", "is too long");
	if ((flags & WIRE_ATTRIBUTE_VALUE) == 0)
		return;
	attribute->value = get_str(d, "attribute value");
	if (strlen(attribute->value) > DOVETAIL_ATTRIBUTE_VALUE_MAX_SIZE)
		invalid(d, "attribute value", "is too long");
}

static void get_op(struct decoder *d, struct dovetail_op *op)
{
	uint8_t type;

	d->op = "op";
	type = get_u8(d, "type");
	op->type = type;
	switch (type) {
	case DOVETAIL_OP_APPEND:
		d->op = "append";
		get_append(d, &op->append);
		return;
	case DOVETAIL_OP_FLAGS:
		d->op = "flags";
		op->add_flags = get_flags(d, "add_flags", WIRE_MAIL_FLAGS);
		op->remove_flags =
			get_flags(d, "remove_flags", WIRE_MAIL_FLAGS);
		get_uids(d, op);
		return;
	case DOVETAIL_OP_KEYWORD_ADD:
	case DOVETAIL_OP_KEYWORD_REMOVE:
		d->op = type == DOVETAIL_OP_KEYWORD_ADD ?
			"keyword_add" : "keyword_remove";
		op->keyword = get_filled_str(d, "keyword");
		get_uids(d, op);
		return;
	case DOVETAIL_OP_KEYWORD_RESET:
		d->op = "keyword_reset";
		get_uids(d, op);
		return;
	case DOVETAIL_OP_EXPUNGE:
		d->op = "expunge";
		get_uids(d, op);
		return;
	case DOVETAIL_OP_EXISTS:
		d->op = "exists";
		get_uids(d, op);
		return;
	case DOVETAIL_OP_ATTRIBUTE:
		d->op = "attribute";
		get_attribute(d, &op->attribute);
		return;
	}
	invalid(d, "type", "is unknown");
}

static void get_ops(struct decoder *d, struct dovetail_change_mailbox *m)
{
	bool snapshot = (m->flags & DOVETAIL_MAILBOX_SNAPSHOT) != 0;
	struct dovetail_op *op;

	while (reader_left(&d->r) > 0) {
		d->op_idx++;
		op = array_append_space(&m->ops);
		get_op(d, op);
		/* A replica expunges what EXISTS does not name, so it stands
		   once, in front of a snapshot, or nowhere. */
		if ((op->type == DOVETAIL_OP_EXISTS) !=
		    (snapshot && d->op_idx == 1))
			invalid(d, "type", "is out of place");
		if (op->type != DOVETAIL_OP_APPEND &&
		    (m->flags & DOVETAIL_MAILBOX_MESSAGES) != 0)
			invalid(d, "type", "is out of place");
	}
}

static void get_mailbox(struct decoder *d, struct dovetail_change_mailbox *m)
{
	d->kind = "mailbox change";
	get_mailbox_guid(d, m->guid);
	m->name = get_str(d, "name");
	m->uid_validity = get_num32(d, "uid_validity");
	m->uid_next = get_num32(d, "uid_next");
	m->highest_modseq = get_num(d, "highest_modseq");
	m->flags = get_flags(d, "flags", WIRE_MAILBOX_FLAGS);
	get_pos(d, "from", &m->from);
	get_pos(d, "to", &m->to);
	if ((m->flags & DOVETAIL_MAILBOX_MORE) != 0 &&
	    (m->flags & (DOVETAIL_MAILBOX_SNAPSHOT |
			 DOVETAIL_MAILBOX_MESSAGES)) == 0)
		invalid(d, "flags", "have more without snapshot");
	if ((m->flags & DOVETAIL_MAILBOX_MESSAGES) != 0) {
		if ((m->flags & (DOVETAIL_MAILBOX_SNAPSHOT |
				 DOVETAIL_MAILBOX_DIGEST)) != 0)
			invalid(d, "flags", "do not go with each other");
		if (!pos_is_zero(&m->from) || !pos_is_zero(&m->to))
			invalid(d, "to", "is not zero with single messages");
	}
	if ((m->flags & DOVETAIL_MAILBOX_ATTRIBUTES) != 0 &&
	    (m->flags & (DOVETAIL_MAILBOX_SNAPSHOT | DOVETAIL_MAILBOX_MORE)) !=
	    DOVETAIL_MAILBOX_SNAPSHOT)
		invalid(d, "flags", "have attributes without snapshot");
	if ((m->flags & DOVETAIL_MAILBOX_SNAPSHOT) != 0 &&
	    !pos_is_zero(&m->from))
		invalid(d, "from", "is not zero in a snapshot");
	if ((m->flags & DOVETAIL_MAILBOX_DIGEST) != 0)
		get_digest(d, &m->digest);
	p_array_init(&m->ops, d->pool, 4);
}

static void get_list(struct decoder *d, struct dovetail_change_list *list)
{
	bool guid_given, guid_wanted = FALSE, guid_refused = FALSE;
	bool renamed = FALSE, has_uids = FALSE;
	uint8_t action;

	d->kind = "list change";
	action = get_u8(d, "action");
	list->action = action;
	switch (action) {
	case DOVETAIL_LIST_CREATE:
	case DOVETAIL_LIST_UPDATE:
		guid_wanted = has_uids = TRUE;
		break;
	case DOVETAIL_LIST_CREATE_DIR:
	case DOVETAIL_LIST_SUBSCRIBE:
	case DOVETAIL_LIST_UNSUBSCRIBE:
		guid_refused = TRUE;
		break;
	case DOVETAIL_LIST_DELETE:
		break;
	case DOVETAIL_LIST_RENAME:
		renamed = TRUE;
		break;
	default:
		invalid(d, "action", "is unknown");
	}

	get_guid(d, "guid", list->guid);
	guid_given = !guid_128_is_empty(list->guid);
	if (guid_given ? guid_refused : guid_wanted)
		invalid(d, "guid", "does not go with the action");
	list->name = get_filled_str(d, "name");
	list->new_name = get_str(d, "new_name");
	if ((*list->new_name != '\0') != renamed)
		invalid(d, "new_name", "does not go with the action");
	list->uid_validity = get_num32(d, "uid_validity");
	list->uid_next = get_num32(d, "uid_next");
	if (!has_uids && (list->uid_validity != 0 || list->uid_next != 0))
		invalid(d, "uid_validity", "does not go with the action");
}

static void get_tree(struct decoder *d, struct dovetail_change_tree *tree)
{
	struct dovetail_tree_mailbox *m;
	const char *name;
	guid_128_t *deleted;
	unsigned int i, count;

	d->kind = "tree change";
	count = get_count(d, "mailboxes", WIRE_TREE_MAILBOX_MIN_SIZE);
	p_array_init(&tree->mailboxes, d->pool, I_MAX(count, 1));
	for (i = 0; i < count && !d->r.failed; i++) {
		m = array_append_space(&tree->mailboxes);
		get_guid(d, "mailbox guid", m->guid);
		m->name = get_filled_str(d, "mailbox name");
		m->uid_validity = get_num32(d, "mailbox uid_validity");
		m->uid_next = get_num32(d, "mailbox uid_next");
	}
	count = get_count(d, "subscriptions", WIRE_SUBSCRIPTION_MIN_SIZE);
	p_array_init(&tree->subscriptions, d->pool, I_MAX(count, 1));
	for (i = 0; i < count && !d->r.failed; i++) {
		name = get_str(d, "subscription");
		array_push_back(&tree->subscriptions, &name);
	}
	count = get_count(d, "deleted", GUID_128_SIZE);
	p_array_init(&tree->deleted, d->pool, I_MAX(count, 1));
	for (i = 0; i < count && !d->r.failed; i++) {
		deleted = array_append_space(&tree->deleted);
		get_guid(d, "deleted guid", *deleted);
	}
	tree->number = get_num32(d, "number");
	tree->flags = get_flags(d, "flags", WIRE_VERIFY_FLAGS);
	if (tree->number == 0 && tree->flags != 0)
		invalid(d, "flags", "are given without number");
}

static void
get_request(struct decoder *d, struct dovetail_change_request *request)
{
	d->kind = "request";
	get_guid(d, "guid", request->guid);
	request->name = get_str(d, "name");
	if (guid_128_is_empty(request->guid) && *request->name != '\0')
		invalid(d, "name", "is given without guid");
	request->uid_next = get_num32(d, "uid_next");
	p_array_init(&request->uids, d->pool, 1);
	dovetail_wire_get_uids(&d->r, &request->uids);
	check(d, "uids");
	if (array_count(&request->uids) > 0 &&
	    (request->uid_next != 0 || guid_128_is_empty(request->guid)))
		invalid(d, "uids", "do not go with the rest");
}

static void
get_verify(struct decoder *d, struct dovetail_change_verify *verify)
{
	const void *data;

	d->kind = "verify";
	verify->number = get_num32(d, "number");
	verify->flags = get_flags(d, "flags", WIRE_VERIFY_FLAGS);
	get_mailbox_guid(d, verify->guid);
	verify->name = get_str(d, "name");
	verify->uid_validity = get_num32(d, "uid_validity");
	get_pos(d, "at", &verify->at);
	get_digest(d, &verify->digest);
	data = get_raw(d, "attributes", sizeof(verify->attributes));
	if (data != NULL)
		memcpy(verify->attributes, data, sizeof(verify->attributes));
}

static const char *get_text(struct decoder *d)
{
	const char *p, *text = get_filled_str(d, "text");

	for (p = text; *p != '\0'; p++) {
		if (is_control(*p))
			invalid(d, "text", "has control characters");
	}
	if (p - text > DOVETAIL_VERIFIED_TEXT_MAX_SIZE)
		invalid(d, "text", "is too long");
	return text;
}

static void
get_verified(struct decoder *d, struct dovetail_change_verified *verified)
{
	unsigned int i, count;
	const char *text;
	uint8_t result;

	d->kind = "verified";
	get_node(d, &verified->node);
	verified->number = get_num32(d, "number");
	get_guid(d, "guid", verified->guid);
	result = get_u8(d, "result");
	verified->result = result;
	if (result < DOVETAIL_VERIFIED_EQUAL ||
	    result > DOVETAIL_VERIFIED_UNKNOWN)
		invalid(d, "result", "is unknown");
	verified->messages = get_num32(d, "messages");
	count = get_count(d, "texts", WIRE_TEXT_MIN_SIZE);
	if (count > DOVETAIL_VERIFIED_TEXTS_MAX)
		invalid(d, "texts", "are too many");
	p_array_init(&verified->texts, d->pool, 1);
	for (i = 0; i < count && !d->r.failed; i++) {
		text = get_text(d);
		array_push_back(&verified->texts, &text);
	}
}

static void
get_ranges(struct decoder *d, ARRAY_TYPE(dovetail_range) *ranges)
{
	struct dovetail_range *range;
	unsigned int i, count;
	uint64_t uid2;
	uint32_t last = 0;

	count = get_count(d, "ranges", WIRE_RANGE_DIGEST_MIN_SIZE);
	if (count > DOVETAIL_RANGES_MAX)
		invalid(d, "ranges", "are too many");
	p_array_init(ranges, d->pool, 1);
	for (i = 0; i < count && !d->r.failed; i++) {
		range = array_append_space(ranges);
		range->uid1 = get_uid(d, "uid1");
		uid2 = (uint64_t)range->uid1 + get_num32(d, "uid2");
		range->uid2 = uid2;
		if (range->uid1 <= last || uid2 > UINT32_MAX)
			invalid(d, "ranges", "are not in order");
		last = range->uid2;
		range->count = get_num32(d, "count");
		if (range->count > uid2 - range->uid1 + 1)
			invalid(d, "count", "is more than there are UIDs");
		get_sum(d, "sum", &range->sum);
	}
}

static void
get_compare(struct decoder *d, struct dovetail_change_compare *compare)
{
	d->kind = "compare";
	get_mailbox_guid(d, compare->guid);
	compare->name = get_str(d, "name");
	compare->number = get_num32(d, "number");
	get_key(d, compare->key);
	get_ranges(d, &compare->ranges);
}

static void
get_compared_attributes(struct decoder *d,
			struct dovetail_change_compared *compared)
{
	struct dovetail_attribute *attribute, *last = NULL;
	unsigned int i, count = 0;
	uint8_t with;

	with = get_u8(d, "with_attributes");
	if (with > 1)
		invalid(d, "with_attributes", "is neither 0 nor 1");
	compared->with_attributes = with != 0;
	if (compared->with_attributes)
		count = get_count(d, "attributes", WIRE_ATTRIBUTE_MIN_SIZE);
	p_array_init(&compared->attributes, d->pool, I_MAX(count, 1));
	for (i = 0; i < count && !d->r.failed; i++) {
		attribute = array_append_space(&compared->attributes);
		get_attribute(d, attribute);
		if (d->r.failed)
			break;
		if (attribute->value == NULL)
			invalid(d, "attribute value", "is missing");
		if (last != NULL && dovetail_attribute_cmp(last, attribute) >= 0)
			invalid(d, "attributes", "are not in order");
		last = attribute;
	}
}

static void
get_compared(struct decoder *d, struct dovetail_change_compared *compared)
{
	struct dovetail_compared_message *message;
	unsigned int i, count;
	uint32_t last = 0;
	const void *data;

	d->kind = "compared";
	get_mailbox_guid(d, compared->guid);
	compared->number = get_num32(d, "number");
	compared->uid_validity = get_num32(d, "uid_validity");
	compared->uid_next = get_num32(d, "uid_next");
	compared->highest_modseq = get_num(d, "highest_modseq");
	get_pos(d, "at", &compared->at);
	get_ranges(d, &compared->ranges);
	p_array_init(&compared->uids, d->pool, 1);
	dovetail_wire_get_uids(&d->r, &compared->uids);
	check(d, "uids");
	count = get_count(d, "messages", WIRE_COMPARED_MESSAGE_MIN_SIZE);
	p_array_init(&compared->messages, d->pool, I_MAX(count, 1));
	for (i = 0; i < count && !d->r.failed; i++) {
		message = array_append_space(&compared->messages);
		message->uid = get_uid(d, "uid");
		if (message->uid <= last ||
		    !seq_range_exists(&compared->uids, message->uid))
			invalid(d, "uid", "is out of place");
		last = message->uid;
		message->flags = get_flags(d, "flags", WIRE_MAIL_FLAGS);
		get_keywords(d, &message->keywords);
		data = get_raw(d, "hash", DOVETAIL_MESSAGE_HASH_SIZE);
		if (data != NULL)
			memcpy(message->hash, data, sizeof(message->hash));
	}
	get_compared_attributes(d, compared);
}

static void get_spool(struct decoder *d, struct dovetail_change_spool *spool)
{
	d->kind = "spool chunk";
	get_spool_id(d, "id", spool->id);
	spool->offset = get_num(d, "offset");
	spool->size = reader_left(&d->r);
	if (spool->size == 0)
		invalid(d, "data", "is missing");
	else if (spool->size > DOVETAIL_SPOOL_CHUNK_SIZE)
		invalid(d, "data", "is too large");
	else if (spool->offset > UINT64_MAX - spool->size)
		invalid(d, "offset", "is out of range");
	else
		spool->data = get_raw(d, "data", spool->size);
}

static void get_shard(struct decoder *d, struct dovetail_change_shard *shard)
{
	d->kind = "shard change";
	shard->shard = get_u8(d, "shard");
	get_node(d, &shard->node);
	shard->number = get_num32(d, "number");
}

/* Changes that are not about one user */
static bool kind_has_no_user(uint8_t kind)
{
	return kind == DOVETAIL_CHANGE_HEARTBEAT ||
		kind == DOVETAIL_CHANGE_SHARD_REQUEST ||
		kind == DOVETAIL_CHANGE_SHARD_SWEPT;
}

static const char *decoder_error(const struct decoder *d)
{
	if (d->op == NULL) {
		return t_strdup_printf("%s: %s %s", d->kind, d->field,
				       d->problem);
	}
	return t_strdup_printf("%s: %s %u: %s %s", d->kind, d->op,
			       d->op_idx, d->field, d->problem);
}

static int
change_decode(pool_t pool, const void *data, size_t size, bool head_only,
	      struct dovetail_change *change_r, const char **error_r)
{
	struct decoder d;
	uint8_t kind;

	i_zero(change_r);
	i_zero(&d);
	d.pool = pool;
	d.kind = "change";
	dovetail_wire_reader_init(&d.r, data, size);

	if (size > DOVETAIL_CHANGE_MAX_SIZE)
		invalid(&d, "size", "is more than allowed");
	kind = get_u8(&d, "kind");
	change_r->kind = kind;
	change_r->user = get_str(&d, "user");
	if ((*change_r->user == '\0') != kind_has_no_user(kind))
		invalid(&d, "user", "does not go with the kind");

	switch (kind) {
	case DOVETAIL_CHANGE_MAILBOX:
		get_mailbox(&d, &change_r->u.mailbox);
		if (head_only) {
			/* the ops are somebody else's business */
			d.r.pos = d.r.end;
		}
		get_ops(&d, &change_r->u.mailbox);
		break;
	case DOVETAIL_CHANGE_LIST:
		get_list(&d, &change_r->u.list);
		break;
	case DOVETAIL_CHANGE_TREE:
		get_tree(&d, &change_r->u.tree);
		break;
	case DOVETAIL_CHANGE_REQUEST:
		get_request(&d, &change_r->u.request);
		break;
	case DOVETAIL_CHANGE_SPOOL:
		get_spool(&d, &change_r->u.spool);
		break;
	case DOVETAIL_CHANGE_HEARTBEAT:
		d.kind = "heartbeat";
		break;
	case DOVETAIL_CHANGE_SHARD_REQUEST:
	case DOVETAIL_CHANGE_SHARD_SWEPT:
		get_shard(&d, &change_r->u.shard);
		break;
	case DOVETAIL_CHANGE_VERIFY:
		get_verify(&d, &change_r->u.verify);
		break;
	case DOVETAIL_CHANGE_VERIFIED:
		get_verified(&d, &change_r->u.verified);
		break;
	case DOVETAIL_CHANGE_COMPARE:
		get_compare(&d, &change_r->u.compare);
		break;
	case DOVETAIL_CHANGE_COMPARED:
		get_compared(&d, &change_r->u.compared);
		break;
	default:
		invalid(&d, "kind", "is unknown");
	}
	if (!d.r.failed && reader_left(&d.r) > 0)
		invalid(&d, "end", "is followed by more bytes");
	if (d.r.failed) {
		*error_r = decoder_error(&d);
		return -1;
	}
	return 0;
}

int dovetail_change_decode(pool_t pool, const void *data, size_t size,
			   struct dovetail_change *change_r,
			   const char **error_r)
{
	return change_decode(pool, data, size, FALSE, change_r, error_r);
}

int dovetail_change_decode_head(pool_t pool, const void *data, size_t size,
				struct dovetail_change *change_r,
				const char **error_r)
{
	return change_decode(pool, data, size, TRUE, change_r, error_r);
}
