/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* Checks wire, digest, keyring and seal against vectors of another implementation.
   The vectors are read from the directory $DOVETAIL_VECTORS; when that is not
   set, from $srcdir/../vectors (srcdir as automake sets it, "." otherwise).
   Their format is told at the top of each file, and made by make-vectors.py
   in the same directory. */

#include "lib.h"
#include "array.h"
#include "buffer.h"
#include "hex-binary.h"
#include "istream.h"
#include "str.h"
#include "unlink-directory.h"
#include "write-full.h"
#include "test-common.h"
#include "dovetail-wire.h"
#include "dovetail-seal.h"

#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#define VECTOR_LINE_MAX_SIZE (1024 * 1024)
#define TEXT_INLINE_MAX_SIZE 32
#define TEXT_STR_MAX_SIZE 64

struct vector {
	const char *file;
	unsigned int line_num;
	/* the first line's words, the last of its WORD=VALUE */
	const char *what;
	const char *const *args;
	/* in a block of exactly its size */
	unsigned char *data;
	size_t size;
	/* ok: the text it means, else words of the error */
	bool ok;
	const char *outcome;
};

static char *key_dir;

static const char *vectors_path(const char *name)
{
	const char *dir = getenv("DOVETAIL_VECTORS");
	const char *srcdir = getenv("srcdir");

	if (dir != NULL)
		return t_strconcat(dir, "/", name, NULL);
	return t_strconcat(srcdir != NULL ? srcdir : ".", "/../vectors/", name,
			   NULL);
}

/* ---- texts, as in "the text that says what was decoded" of the generator */

static void text_data(string_t *str, const void *data, size_t size)
{
	unsigned char hash[32];

	if (size <= TEXT_INLINE_MAX_SIZE) {
		binary_to_hex_append(str, data, size);
		return;
	}
	crypto_generichash(hash, sizeof(hash), data, size, NULL, 0);
	str_printfa(str, "%zu bytes blake2b ", size);
	binary_to_hex_append(str, hash, sizeof(hash));
}

static void text_str(string_t *str, const char *label, const char *value)
{
	const char *p;

	str_append(str, label);
	if (strlen(value) > TEXT_STR_MAX_SIZE) {
		text_data(str, value, strlen(value));
		return;
	}
	str_append_c(str, '"');
	for (p = value; *p != '\0'; p++) {
		if (*p == DOVETAIL_NAME_SEP)
			str_append(str, "\\t");
		else
			str_append_c(str, *p);
	}
	str_append_c(str, '"');
}

static void text_hex(string_t *str, const char *label, const void *data,
		     size_t size)
{
	str_append(str, label);
	binary_to_hex_append(str, data, size);
}

static void text_uids(string_t *str, const ARRAY_TYPE(seq_range) *uids)
{
	const struct seq_range *range;
	const char *comma = "";

	array_foreach(uids, range) {
		str_printfa(str, "%s%u", comma, range->seq1);
		if (range->seq2 != range->seq1)
			str_printfa(str, ":%u", range->seq2);
		comma = ",";
	}
}

static void text_keywords(string_t *str, const char *const *keywords)
{
	unsigned int i;

	str_append(str, " keywords=");
	for (i = 0; keywords[i] != NULL; i++)
		text_str(str, i == 0 ? "" : ",", keywords[i]);
}

static void text_append(string_t *str, const struct dovetail_op_append *append)
{
	str_printfa(str, " | append uid=%u", append->uid);
	text_str(str, " guid=", append->guid);
	str_printfa(str, " flags=%u", append->flags);
	text_keywords(str, append->keywords);
	str_printfa(str, " received_date=%jd save_date=%jd",
		    (intmax_t)append->received_date,
		    (intmax_t)append->save_date);
	text_str(str, " pop3_uidl=", append->pop3_uidl);
	str_printfa(str, " pop3_order=%u size=%"PRIu64, append->pop3_order,
		    append->size);
	switch (append->source) {
	case DOVETAIL_BODY_INLINE:
		str_append(str, " inline=");
		text_data(str, append->body, append->size);
		break;
	case DOVETAIL_BODY_SPOOL:
		text_hex(str, " spool=", append->spool_id,
			 DOVETAIL_SPOOL_ID_SIZE);
		break;
	case DOVETAIL_BODY_COPY:
		text_hex(str, " copy=", append->copy_mailbox_guid,
			 GUID_128_SIZE);
		str_printfa(str, ":%u", append->copy_uid);
		break;
	}
}

static void
text_attribute(string_t *str, const struct dovetail_attribute *attribute)
{
	text_str(str, attribute->shared ? " | attribute shared " :
		 " | attribute private ", attribute->key);
	if (attribute->value != NULL)
		text_str(str, " value=", attribute->value);
}

static void text_op(string_t *str, const struct dovetail_op *op)
{
	switch (op->type) {
	case DOVETAIL_OP_APPEND:
		text_append(str, &op->append);
		return;
	case DOVETAIL_OP_FLAGS:
		str_printfa(str, " | flags add=%u remove=%u", op->add_flags,
			    op->remove_flags);
		break;
	case DOVETAIL_OP_KEYWORD_ADD:
		text_str(str, " | keyword_add ", op->keyword);
		break;
	case DOVETAIL_OP_KEYWORD_REMOVE:
		text_str(str, " | keyword_remove ", op->keyword);
		break;
	case DOVETAIL_OP_KEYWORD_RESET:
		str_append(str, " | keyword_reset");
		break;
	case DOVETAIL_OP_EXPUNGE:
		str_append(str, " | expunge");
		break;
	case DOVETAIL_OP_EXISTS:
		str_append(str, " | exists");
		break;
	case DOVETAIL_OP_ATTRIBUTE:
		text_attribute(str, &op->attribute);
		return;
	}
	str_append(str, " uids=");
	text_uids(str, &op->uids);
}

static void text_digest(string_t *str, const struct dovetail_digest *digest)
{
	uint8_t sum[DOVETAIL_DIGEST_SUM_SIZE];

	dovetail_sum_to_bytes(&digest->sum, sum);
	text_hex(str, " digest=", digest->key, sizeof(digest->key));
	text_hex(str, ":", sum, sizeof(sum));
	str_printfa(str, ":%u", digest->count);
}

static void
text_mailbox(string_t *str, const struct dovetail_change_mailbox *m)
{
	const struct dovetail_op *op;

	text_hex(str, " guid=", m->guid, GUID_128_SIZE);
	text_str(str, " name=", m->name);
	str_printfa(str, " uid_validity=%u uid_next=%u highest_modseq=%"PRIu64
		    " flags=%u from=%u:%u:%u to=%u:%u:%u", m->uid_validity,
		    m->uid_next, m->highest_modseq, m->flags,
		    m->from.index_id, m->from.file_seq, m->from.file_offset,
		    m->to.index_id, m->to.file_seq, m->to.file_offset);
	if ((m->flags & DOVETAIL_MAILBOX_DIGEST) != 0)
		text_digest(str, &m->digest);
	array_foreach(&m->ops, op)
		text_op(str, op);
}

static void text_tree(string_t *str, const struct dovetail_change_tree *tree)
{
	const struct dovetail_tree_mailbox *m;
	const char *const *name;
	const guid_128_t *deleted;

	str_printfa(str, " number=%u flags=%u", tree->number, tree->flags);
	array_foreach(&tree->mailboxes, m) {
		text_hex(str, " | mailbox guid=", m->guid, GUID_128_SIZE);
		text_str(str, " name=", m->name);
		str_printfa(str, " uid_validity=%u uid_next=%u",
			    m->uid_validity, m->uid_next);
	}
	array_foreach(&tree->subscriptions, name)
		text_str(str, " | subscription ", *name);
	array_foreach(&tree->deleted, deleted)
		text_hex(str, " | deleted ", *deleted, GUID_128_SIZE);
}

static void
text_request(string_t *str, const struct dovetail_change_request *request)
{
	text_hex(str, " guid=", request->guid, GUID_128_SIZE);
	text_str(str, " name=", request->name);
	str_printfa(str, " uid_next=%u uids=", request->uid_next);
	text_uids(str, &request->uids);
}

static void
text_verify(string_t *str, const struct dovetail_change_verify *verify)
{
	str_printfa(str, " number=%u flags=%u", verify->number, verify->flags);
	text_hex(str, " guid=", verify->guid, GUID_128_SIZE);
	text_str(str, " name=", verify->name);
	str_printfa(str, " uid_validity=%u at=%u:%u:%u", verify->uid_validity,
		    verify->at.index_id, verify->at.file_seq,
		    verify->at.file_offset);
	text_digest(str, &verify->digest);
	text_hex(str, " attributes=", verify->attributes,
		 sizeof(verify->attributes));
}

static void
text_verified(string_t *str, const struct dovetail_change_verified *verified)
{
	const char *const *text;

	text_str(str, " node=", verified->node);
	str_printfa(str, " number=%u", verified->number);
	text_hex(str, " guid=", verified->guid, GUID_128_SIZE);
	str_printfa(str, " result=%d messages=%u", verified->result,
		    verified->messages);
	array_foreach(&verified->texts, text)
		text_str(str, " | text ", *text);
}

static void
text_ranges(string_t *str, const ARRAY_TYPE(dovetail_range) *ranges)
{
	const struct dovetail_range *range;
	uint8_t sum[DOVETAIL_DIGEST_SUM_SIZE];

	array_foreach(ranges, range) {
		dovetail_sum_to_bytes(&range->sum, sum);
		str_printfa(str, " | range %u:%u count=%u", range->uid1,
			    range->uid2, range->count);
		text_hex(str, " sum=", sum, sizeof(sum));
	}
}

static void
text_compare(string_t *str, const struct dovetail_change_compare *compare)
{
	text_hex(str, " guid=", compare->guid, GUID_128_SIZE);
	text_str(str, " name=", compare->name);
	str_printfa(str, " number=%u", compare->number);
	text_hex(str, " key=", compare->key, sizeof(compare->key));
	text_ranges(str, &compare->ranges);
}

static void
text_compared(string_t *str, const struct dovetail_change_compared *compared)
{
	const struct dovetail_compared_message *message;
	const struct dovetail_attribute *attribute;

	text_hex(str, " guid=", compared->guid, GUID_128_SIZE);
	str_printfa(str, " number=%u uid_validity=%u uid_next=%u "
		    "highest_modseq=%"PRIu64" at=%u:%u:%u", compared->number,
		    compared->uid_validity, compared->uid_next,
		    compared->highest_modseq, compared->at.index_id,
		    compared->at.file_seq, compared->at.file_offset);
	text_ranges(str, &compared->ranges);
	str_append(str, " | uids=");
	text_uids(str, &compared->uids);
	array_foreach(&compared->messages, message) {
		str_printfa(str, " | message uid=%u flags=%u", message->uid,
			    message->flags);
		text_keywords(str, message->keywords);
		text_hex(str, " hash=", message->hash, sizeof(message->hash));
	}
	str_printfa(str, " | with_attributes=%d", compared->with_attributes);
	array_foreach(&compared->attributes, attribute)
		text_attribute(str, attribute);
}

static void text_change(string_t *str, const struct dovetail_change *change)
{
	switch (change->kind) {
	case DOVETAIL_CHANGE_MAILBOX:
		text_str(str, "mailbox user=", change->user);
		text_mailbox(str, &change->u.mailbox);
		return;
	case DOVETAIL_CHANGE_LIST:
		text_str(str, "list user=", change->user);
		str_printfa(str, " action=%d", change->u.list.action);
		text_hex(str, " guid=", change->u.list.guid, GUID_128_SIZE);
		text_str(str, " name=", change->u.list.name);
		text_str(str, " new_name=", change->u.list.new_name);
		str_printfa(str, " uid_validity=%u uid_next=%u",
			    change->u.list.uid_validity,
			    change->u.list.uid_next);
		return;
	case DOVETAIL_CHANGE_TREE:
		text_str(str, "tree user=", change->user);
		text_tree(str, &change->u.tree);
		return;
	case DOVETAIL_CHANGE_REQUEST:
		text_str(str, "request user=", change->user);
		text_request(str, &change->u.request);
		return;
	case DOVETAIL_CHANGE_SPOOL:
		text_str(str, "spool user=", change->user);
		text_hex(str, " id=", change->u.spool.id,
			 DOVETAIL_SPOOL_ID_SIZE);
		str_printfa(str, " offset=%"PRIu64" data=",
			    change->u.spool.offset);
		text_data(str, change->u.spool.data, change->u.spool.size);
		return;
	case DOVETAIL_CHANGE_HEARTBEAT:
		str_append(str, "heartbeat");
		return;
	case DOVETAIL_CHANGE_SHARD_REQUEST:
	case DOVETAIL_CHANGE_SHARD_SWEPT:
		str_append(str, change->kind == DOVETAIL_CHANGE_SHARD_REQUEST ?
			   "shard_request" : "shard_swept");
		str_printfa(str, " shard=%u", change->u.shard.shard);
		text_str(str, " node=", change->u.shard.node);
		str_printfa(str, " number=%u", change->u.shard.number);
		return;
	case DOVETAIL_CHANGE_VERIFY:
		text_str(str, "verify user=", change->user);
		text_verify(str, &change->u.verify);
		return;
	case DOVETAIL_CHANGE_VERIFIED:
		text_str(str, "verified user=", change->user);
		text_verified(str, &change->u.verified);
		return;
	case DOVETAIL_CHANGE_COMPARE:
		text_str(str, "compare user=", change->user);
		text_compare(str, &change->u.compare);
		return;
	case DOVETAIL_CHANGE_COMPARED:
		text_str(str, "compared user=", change->user);
		text_compared(str, &change->u.compared);
		return;
	}
}

static void
text_opened(string_t *str, const struct dovetail_opened *opened,
	    const buffer_t *payload)
{
	const struct dovetail_entry_head *head = &opened->head;

	str_printfa(str, "kind=%d shard=%u shards=%u epoch=%"PRIu64
		    " generation=%"PRIu64" seq=%"PRIu64" time=%"PRIu64,
		    head->kind, head->shard, head->shards, head->epoch,
		    head->generation, head->seq, head->time_usecs);
	text_hex(str, " prev=", head->prev, sizeof(head->prev));
	str_printfa(str, " origin=%s", opened->origin->node);
	text_hex(str, " hash=", opened->hash, sizeof(opened->hash));
	str_printfa(str, " gap=%d payload=", opened->gap ? 1 : 0);
	if (payload == NULL)
		str_append_c(str, '-');
	else
		text_data(str, payload->data, payload->used);
}

static void text_ack(string_t *str, const struct dovetail_ack *ack)
{
	unsigned int i;

	str_printfa(str, "generation=%"PRIu64" seq=%"PRIu64
		    " applied_time=%"PRIu64" entries=%"PRIu64
		    " rejected=%"PRIu64" set_aside=%u failed=",
		    ack->generation, ack->seq, ack->applied_time_usecs,
		    ack->entries, ack->rejected, ack->set_aside);
	for (i = 0; i < ack->failed_count; i++) {
		str_printfa(str, "%s%"PRIu64"-%"PRIu64"/%u", i == 0 ? "" : ",",
			    ack->failed[i].generation, ack->failed[i].seq,
			    ack->failed[i].ordinal);
	}
	text_str(str, " last_error=", ack->last_error);
	if (ack->troubles_size > 0) {
		str_append(str, " troubles=");
		binary_to_hex_append(str, ack->troubles, ack->troubles_size);
	}
}

/* ---- what a vector asks for; each returns TRUE when it is accepted ---- */

static const char *vector_arg(const struct vector *v, const char *name)
{
	size_t len = strlen(name);
	const char *const *arg;

	for (arg = v->args; *arg != NULL; arg++) {
		if (strncmp(*arg, name, len) == 0 && (*arg)[len] == '=')
			return *arg + len + 1;
	}
	i_fatal("%s line %u: no %s", v->file, v->line_num, name);
}

static unsigned int vector_arg_uint(const struct vector *v, const char *name)
{
	unsigned int num;

	if (str_to_uint(vector_arg(v, name), &num) < 0)
		i_fatal("%s line %u: bad %s", v->file, v->line_num, name);
	return num;
}

static void assert_same(const struct vector *v, const buffer_t *again)
{
	test_assert_idx(again->used == v->size &&
			memcmp(again->data, v->data, v->size) == 0,
			v->line_num);
}

static bool run_num(const struct vector *v, string_t *text)
{
	struct dovetail_wire_reader r;
	buffer_t *again = t_buffer_create(16);
	uint64_t num;

	dovetail_wire_reader_init(&r, v->data, v->size);
	num = dovetail_wire_get_num(&r);
	if (!dovetail_wire_reader_done(&r))
		return FALSE;
	dovetail_wire_put_num(again, num);
	assert_same(v, again);
	str_printfa(text, "%"PRIu64, num);
	return TRUE;
}

static bool run_snum(const struct vector *v, string_t *text)
{
	struct dovetail_wire_reader r;
	buffer_t *again = t_buffer_create(16);
	int64_t num;

	dovetail_wire_reader_init(&r, v->data, v->size);
	num = dovetail_wire_get_snum(&r);
	if (!dovetail_wire_reader_done(&r))
		return FALSE;
	dovetail_wire_put_snum(again, num);
	assert_same(v, again);
	str_printfa(text, "%"PRId64, num);
	return TRUE;
}

static bool run_uids(const struct vector *v, string_t *text)
{
	struct dovetail_wire_reader r;
	buffer_t *again = t_buffer_create(16);
	ARRAY_TYPE(seq_range) uids;

	t_array_init(&uids, 4);
	dovetail_wire_reader_init(&r, v->data, v->size);
	dovetail_wire_get_uids(&r, &uids);
	if (!dovetail_wire_reader_done(&r))
		return FALSE;
	dovetail_wire_put_uids(again, &uids);
	assert_same(v, again);
	text_uids(text, &uids);
	return TRUE;
}

static bool run_change(const struct vector *v, string_t *text)
{
	struct dovetail_change change;
	pool_t pool = pool_alloconly_create("test vector", 1024);
	buffer_t *again = buffer_create_dynamic(default_pool, v->size + 1);
	const char *error;
	bool ok = FALSE;

	if (dovetail_change_decode(pool, v->data, v->size, &change,
				   &error) < 0)
		str_append(text, error);
	else {
		dovetail_change_encode(again, &change);
		assert_same(v, again);
		text_change(text, &change);
		ok = TRUE;
	}
	buffer_free(&again);
	pool_unref(&pool);
	return ok;
}

static bool run_ack(const struct vector *v, string_t *text)
{
	struct dovetail_ack ack;
	buffer_t *again = t_buffer_create(128);
	const char *error;

	if (dovetail_ack_decode(pool_datastack_create(), v->data, v->size,
				&ack, &error) < 0) {
		str_append(text, error);
		return FALSE;
	}
	dovetail_ack_encode(again, &ack);
	assert_same(v, again);
	text_ack(text, &ack);
	return TRUE;
}

/* All nodes know each other but for x, whom nobody knows. */
static struct dovetail_keyring *ring_open(const char *node)
{
	static const char *const nodes[] = { "a", "b", "c" };
	const char *peers[N_ELEMENTS(nodes) + 1];
	struct dovetail_keyring *keyring;
	unsigned int i, count = 0;
	const char *error;

	for (i = 0; i < N_ELEMENTS(nodes); i++) {
		if (strcmp(nodes[i], node) != 0)
			peers[count++] = nodes[i];
	}
	peers[count] = NULL;
	if (dovetail_keyring_open(key_dir, node, peers, &keyring, &error) < 0)
		i_fatal("%s", error);
	return keyring;
}

/* EPOCH/GENERATION-SEQ/HASH */
static bool chain_parse(const struct vector *v, struct dovetail_chain *chain_r)
{
	const char *const *parts = t_strsplit(vector_arg(v, "chain"), "/-");
	buffer_t hash;

	i_zero(chain_r);
	if (parts[0][0] == '\0')
		return FALSE;
	buffer_create_from_data(&hash, chain_r->hash, sizeof(chain_r->hash));
	if (str_array_length(parts) != 4 ||
	    str_to_uint64(parts[0], &chain_r->epoch) < 0 ||
	    str_to_uint64(parts[1], &chain_r->generation) < 0 ||
	    str_to_uint64(parts[2], &chain_r->seq) < 0 ||
	    strlen(parts[3]) != sizeof(chain_r->hash) * 2 ||
	    hex_to_binary(parts[3], &hash) < 0)
		i_fatal("%s line %u: bad chain", v->file, v->line_num);
	return TRUE;
}

static bool run_open(const struct vector *v, string_t *text)
{
	struct dovetail_keyring *keyring = ring_open(vector_arg(v, "by"));
	buffer_t *payload = buffer_create_dynamic(default_pool, 1024);
	struct dovetail_open_expect expect;
	struct dovetail_chain chain;
	struct dovetail_opened opened;
	enum dovetail_open_ret ret;
	const char *error;

	i_zero(&expect);
	expect.kind = vector_arg_uint(v, "kind");
	expect.shard = vector_arg_uint(v, "shard");
	expect.origin = vector_arg(v, "origin");
	if (strcmp(expect.origin, "-") == 0)
		expect.origin = NULL;
	if (chain_parse(v, &chain))
		expect.chain = &chain;

	ret = dovetail_open(keyring, &expect, v->data, v->size, payload,
			    &opened, &error);
	if (ret == DOVETAIL_OPEN_OK)
		text_opened(text, &opened, payload);
	else {
		str_append(text, dovetail_open_ret_name(ret));
		test_assert_idx(strstr(error, str_c(text)) != NULL,
				v->line_num);
		test_assert_idx(payload->used == 0, v->line_num);
	}
	buffer_free(&payload);
	dovetail_keyring_close(&keyring);
	return ret == DOVETAIL_OPEN_OK;
}

static bool run_own(const struct vector *v, string_t *text)
{
	struct dovetail_keyring *keyring = ring_open(vector_arg(v, "by"));
	struct dovetail_opened opened;
	const char *error;
	bool ok = FALSE;

	if (dovetail_open_own(keyring, v->data, v->size, &opened, &error) < 0)
		str_append(text, error);
	else {
		text_opened(text, &opened, NULL);
		ok = TRUE;
	}
	dovetail_keyring_close(&keyring);
	return ok;
}

static void vector_arg_hex(const struct vector *v, const char *name,
			   void *data_r, size_t size)
{
	const char *value = vector_arg(v, name);
	buffer_t buf;

	buffer_create_from_data(&buf, data_r, size);
	if (strlen(value) != size * 2 || hex_to_binary(value, &buf) < 0)
		i_fatal("%s line %u: bad %s", v->file, v->line_num, name);
}

static void text_sum(string_t *str, const struct dovetail_sum *sum)
{
	uint8_t bytes[DOVETAIL_DIGEST_SUM_SIZE];

	dovetail_sum_to_bytes(sum, bytes);
	binary_to_hex_append(str, bytes, sizeof(bytes));
}

static bool run_message(const struct vector *v, string_t *text)
{
	struct dovetail_body_hash whole, pieces;
	uint8_t hash[DOVETAIL_MESSAGE_HASH_SIZE];
	uint8_t other[DOVETAIL_MESSAGE_HASH_SIZE];
	guid_128_t guid;
	int64_t received_date;
	size_t i;

	vector_arg_hex(v, "guid", guid, sizeof(guid));
	if (str_to_int64(vector_arg(v, "received_date"), &received_date) < 0)
		i_fatal("%s line %u: bad received_date", v->file, v->line_num);
	dovetail_body_hash_init(&whole);
	dovetail_body_hash_more(&whole, v->data, v->size);
	dovetail_body_hash_final(&whole, guid, received_date, hash);
	dovetail_body_hash_init(&pieces);
	for (i = 0; i < v->size; i++)
		dovetail_body_hash_more(&pieces, v->data + i, 1);
	dovetail_body_hash_final(&pieces, guid, received_date, other);
	test_assert_idx(memcmp(hash, other, sizeof(hash)) == 0, v->line_num);
	binary_to_hex_append(text, hash, sizeof(hash));
	return TRUE;
}

static bool run_keywords(const struct vector *v, string_t *text)
{
	const char *name = (const char *)v->data;
	const char *end = name + v->size;
	struct dovetail_sum sum = { 0, 0 }, num;

	if (v->size > 0 && end[-1] != '\0')
		i_fatal("%s line %u: no 00", v->file, v->line_num);
	for (; name < end; name += strlen(name) + 1) {
		dovetail_keyword_sum(name, &num);
		dovetail_sum_add(&sum, &num);
	}
	text_sum(text, &sum);
	return TRUE;
}

static bool run_element(const struct vector *v, string_t *text)
{
	uint8_t key[DOVETAIL_DIGEST_KEY_SIZE];
	struct dovetail_sum keywords, element;

	vector_arg_hex(v, "key", key, sizeof(key));
	if (v->size != DOVETAIL_DIGEST_SUM_SIZE + DOVETAIL_MESSAGE_HASH_SIZE)
		i_fatal("%s line %u: bad size", v->file, v->line_num);
	dovetail_sum_from_bytes(v->data, &keywords);
	dovetail_element(key, vector_arg_uint(v, "uid"),
			 vector_arg_uint(v, "flags"), &keywords,
			 v->data + DOVETAIL_DIGEST_SUM_SIZE, &element);
	text_sum(text, &element);
	return TRUE;
}

static bool run_sum(const struct vector *v, string_t *text)
{
	struct dovetail_sum sum = { 0, 0 }, left, num;
	size_t pos;

	if (v->size % DOVETAIL_DIGEST_SUM_SIZE != 0)
		i_fatal("%s line %u: bad size", v->file, v->line_num);
	for (pos = 0; pos < v->size; pos += DOVETAIL_DIGEST_SUM_SIZE) {
		dovetail_sum_from_bytes(v->data + pos, &num);
		dovetail_sum_add(&sum, &num);
	}
	text_sum(text, &sum);
	/* and all taken away again */
	left = sum;
	for (pos = 0; pos < v->size; pos += DOVETAIL_DIGEST_SUM_SIZE) {
		dovetail_sum_from_bytes(v->data + pos, &num);
		dovetail_sum_sub(&left, &num);
	}
	test_assert_idx(left.lo == 0 && left.hi == 0, v->line_num);
	return TRUE;
}

static const struct {
	const char *what;
	bool (*run)(const struct vector *v, string_t *text);
	/* ! names the one outcome exactly */
	bool exact;
} runners[] = {
	{ "num", run_num, FALSE },
	{ "snum", run_snum, FALSE },
	{ "uids", run_uids, FALSE },
	{ "change", run_change, FALSE },
	{ "ack", run_ack, FALSE },
	{ "open", run_open, TRUE },
	{ "own", run_own, FALSE },
	{ "message", run_message, FALSE },
	{ "keywords", run_keywords, FALSE },
	{ "element", run_element, FALSE },
	{ "sum", run_sum, FALSE },
};

static void vector_run(const struct vector *v)
{
	string_t *text = t_str_new(256);
	unsigned int i;
	bool ok;

	for (i = 0; i < N_ELEMENTS(runners); i++) {
		if (strcmp(runners[i].what, v->what) == 0)
			break;
	}
	if (i == N_ELEMENTS(runners))
		i_fatal("%s line %u: unknown %s", v->file, v->line_num,
			v->what);

	ok = runners[i].run(v, text);
	test_assert_idx(ok == v->ok, v->line_num);
	if (v->ok || runners[i].exact) {
		test_assert_strcmp_idx(str_c(text), v->outcome, v->line_num);
	} else if (strstr(str_c(text), v->outcome) == NULL) {
		/* shows both */
		test_assert_strcmp_idx(str_c(text), v->outcome, v->line_num);
	}
}

/* ---- files ---- */

/* HEX, or HEX*COUNT */
static int piece_append(const char *piece, buffer_t *dest)
{
	const char *star = strchr(piece, '*');
	buffer_t *bytes = t_buffer_create(64);
	unsigned int count = 1;

	if (star != NULL && str_to_uint(star + 1, &count) < 0)
		return -1;
	if (hex_to_binary(t_strdup_until(piece, star != NULL ? star :
					 piece + strlen(piece)), bytes) < 0)
		return -1;
	for (; count > 0; count--)
		buffer_append_buf(dest, bytes, 0, SIZE_MAX);
	return 0;
}

static void vector_parse(struct vector *v, const char *line)
{
	const char *const *words = t_strsplit_spaces(line, " ");
	const char **args = t_new(const char *, str_array_length(words) + 1);
	buffer_t *data = buffer_create_dynamic(default_pool, 1024);
	unsigned int count = 0;

	v->what = *words++;
	v->args = args;
	for (; *words != NULL; words++) {
		if (strchr(*words, '=') != NULL)
			args[count++] = *words;
		else if (piece_append(*words, data) < 0) {
			i_fatal("%s line %u: bad bytes", v->file,
				v->line_num);
		}
	}
	v->size = data->used;
	v->data = v->size > 0 ? i_memdup(data->data, v->size) : i_malloc(1);
	buffer_free(&data);
}

static struct istream *vectors_open(const char *name)
{
	struct istream *input =
		i_stream_create_file(vectors_path(name), VECTOR_LINE_MAX_SIZE);

	i_stream_set_return_partial_line(input, TRUE);
	return input;
}

static void vectors_close(struct istream **input)
{
	if ((*input)->stream_errno != 0) {
		i_fatal("read(%s) failed: %s", i_stream_get_name(*input),
			i_stream_get_error(*input));
	}
	i_stream_unref(input);
}

/* Run the vectors of a file, which must have ok accepted and bad refused
   ones at least: a file that is cut off does not pass. */
static void
vectors_run(const char *name, unsigned int ok_min, unsigned int bad_min)
{
	struct istream *input = vectors_open(name);
	unsigned int line_num = 0, ok = 0, bad = 0;
	const char *line;

	test_begin(t_strconcat("vectors of ", name, NULL));
	while ((line = i_stream_read_next_line(input)) != NULL) T_BEGIN {
		line_num++;
		if (*line != '\0' && *line != '#') {
			struct vector v;

			i_zero(&v);
			v.file = name;
			v.line_num = line_num++;
			vector_parse(&v, line);
			line = i_stream_read_next_line(input);
			if (line == NULL || (*line != '=' && *line != '!'))
				i_fatal("%s line %u: no outcome", name,
					line_num);
			v.ok = *line == '=';
			v.outcome = t_strdup(line + (line[1] == ' ' ? 2 : 1));
			vector_run(&v);
			i_free(v.data);
			if (v.ok)
				ok++;
			else
				bad++;
		}
	} T_END;
	vectors_close(&input);
	test_assert_ucmp(ok, >=, ok_min);
	test_assert_ucmp(bad, >=, bad_min);
	test_end();
}

/* keys.txt has lines "FILE: LINE", which make the key directory. */
static void keys_init(void)
{
	char template[] = "/tmp/test-dovetail-vectors.XXXXXX";
	struct istream *input;
	const char *line, *text, *path;

	if (mkdtemp(template) == NULL)
		i_fatal("mkdtemp(%s) failed: %m", template);
	key_dir = i_strdup(template);
	input = vectors_open("keys.txt");
	while ((line = i_stream_read_next_line(input)) != NULL) T_BEGIN {
		text = strstr(line, ": ");
		if (*line != '#' && text != NULL) {
			int fd;

			path = t_strconcat(key_dir, "/",
				t_strdup_until(line, text), NULL);
			text = t_strconcat(text + 2, "\n", NULL);
			fd = open(path, O_WRONLY | O_CREAT | O_APPEND, 0600);
			if (fd == -1 ||
			    write_full(fd, text, strlen(text)) < 0)
				i_fatal("Cannot write %s: %m", path);
			i_close_fd(&fd);
		}
	} T_END;
	vectors_close(&input);
}

static void keys_deinit(void)
{
	const char *error;

	if (unlink_directory(key_dir, UNLINK_DIRECTORY_FLAG_RMDIR, &error) < 0)
		i_fatal("unlink_directory(%s) failed: %s", key_dir, error);
	i_free(key_dir);
}

static void test_vectors_primitives(void)
{
	vectors_run("primitives.txt", 25, 17);
}

static void test_vectors_changes(void)
{
	vectors_run("changes.txt", 69, 0);
}

static void test_vectors_changes_refused(void)
{
	vectors_run("changes-refused.txt", 0, 254);
}

static void test_vectors_entries(void)
{
	vectors_run("entries.txt", 33, 0);
}

static void test_vectors_entries_refused(void)
{
	vectors_run("entries-refused.txt", 0, 84);
}

static void test_vectors_acks(void)
{
	vectors_run("acks.txt", 6, 11);
}

static void test_vectors_digests(void)
{
	vectors_run("digests.txt", 49, 0);
}

int main(void)
{
	static void (*const test_functions[])(void) = {
		test_vectors_primitives,
		test_vectors_changes,
		test_vectors_changes_refused,
		keys_init,
		test_vectors_entries,
		test_vectors_entries_refused,
		keys_deinit,
		test_vectors_acks,
		test_vectors_digests,
		NULL
	};
	return test_run(test_functions);
}
