/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "buffer.h"
#include "unlink-directory.h"
#include "test-common.h"
#include "dovetail-wire.h"
#include "dovetail-seal.h"

#include <stdlib.h>

/* The sizes and offsets once more, as dovetail-seal.h draws them */
#define OFFSET_VERSION 4
#define OFFSET_KIND 5
#define OFFSET_SHARD 6
#define OFFSET_SHARDS 7
#define OFFSET_SEQ 24
#define OFFSET_KEY_ID 40
#define OFFSET_PREV 48
#define OFFSET_COUNT 80
#define OFFSET_RECIPIENTS 81
#define RECIPIENT_SIZE 56
#define ENTRY_SIZE(recipients, payload) \
	(81 + (recipients) * 56 + 24 + 4 + ((payload) + 16) + 64)

/* Four nodes that know each other, but for d, whom nobody knows. */
static struct dovetail_keyring *a, *b, *c, *d;
static char *dir;
static unsigned char hash[DOVETAIL_HASH_SIZE];

static struct dovetail_keyring *
ring_open(const char *node, const char *peer1, const char *peer2)
{
	const char *peers[] = { peer1, peer2, NULL };
	struct dovetail_keyring *keyring;
	const char *error;

	if (dovetail_keyring_open(dir, node, peers, &keyring, &error) < 0)
		i_fatal("keyring of %s: %s", node, error);
	return keyring;
}

static void nodes_init(void)
{
	static const char *const nodes[] = { "a", "b", "c", "d" };
	char template[] = "/tmp/test-dovetail-seal.XXXXXX";
	const char *line, *error;
	unsigned int i;

	if (mkdtemp(template) == NULL)
		i_fatal("mkdtemp(%s) failed: %m", template);
	dir = i_strdup(template);
	for (i = 0; i < N_ELEMENTS(nodes); i++) {
		if (dovetail_keygen(dir, nodes[i], FALSE, &line, &error) < 0)
			i_fatal("keygen: %s", error);
	}
	a = ring_open("a", "b", "c");
	b = ring_open("b", "a", "c");
	c = ring_open("c", "a", "b");
	d = ring_open("d", "a", "b");
}

static void nodes_deinit(void)
{
	const char *error;

	dovetail_keyring_close(&a);
	dovetail_keyring_close(&b);
	dovetail_keyring_close(&c);
	dovetail_keyring_close(&d);
	if (unlink_directory(dir, UNLINK_DIRECTORY_FLAG_RMDIR, &error) < 0)
		i_fatal("unlink_directory(%s) failed: %s", dir, error);
	i_free(dir);
}

static const struct dovetail_public_key *
key_of(struct dovetail_keyring *keyring, const char *node)
{
	const struct dovetail_public_key *peers;
	unsigned int i, count;

	peers = dovetail_keyring_peers(keyring, &count);
	for (i = 0; i < count; i++) {
		if (strcmp(peers[i].node, node) == 0)
			return &peers[i];
	}
	i_unreached();
}

static void head_init(struct dovetail_entry_head *head_r)
{
	i_zero(head_r);
	head_r->kind = DOVETAIL_ENTRY_LOG;
	head_r->shard = 3;
	head_r->shards = 4;
	head_r->epoch = 7;
	head_r->generation = 0x0102030405060708;
	head_r->seq = 9;
	head_r->time_usecs = 1700000000000000;
	memset(head_r->prev, 0xee, sizeof(head_r->prev));
}

static void expect_init(struct dovetail_open_expect *expect_r)
{
	i_zero(expect_r);
	expect_r->kind = DOVETAIL_ENTRY_LOG;
	expect_r->origin = "a";
	expect_r->shard = 3;
}

/* Seal as a for b. */
static buffer_t *
seal_for_b(const struct dovetail_entry_head *head, const void *payload,
	   size_t size)
{
	const struct dovetail_public_key *recipient = key_of(a, "b");
	buffer_t *entry = t_buffer_create(512);

	dovetail_seal(a, &recipient, 1, head, payload, size, entry, hash);
	return entry;
}

static enum dovetail_open_ret
open_by(struct dovetail_keyring *keyring,
	const struct dovetail_open_expect *expect, const buffer_t *entry,
	const char **error_r)
{
	buffer_t *payload = t_buffer_create(64);
	struct dovetail_opened opened;
	enum dovetail_open_ret ret;

	buffer_append(payload, "old", 3);
	*error_r = NULL;
	ret = dovetail_open(keyring, expect, entry->data, entry->used, payload,
			    &opened, error_r);
	test_assert((ret == DOVETAIL_OPEN_OK) == (*error_r == NULL));
	if (ret != DOVETAIL_OPEN_OK)
		test_assert(payload->used == 0);
	if (opened.origin != NULL) {
		if (expect->origin != NULL)
			test_assert_strcmp(opened.origin->node, expect->origin);
	} else {
		test_assert(opened.head.seq == 0 && !opened.gap);
	}
	return ret;
}

/* What a changed header needs to be properly signed: as sign_sk would. */
static void sign_again(struct dovetail_keyring *keyring, buffer_t *entry)
{
	unsigned char *data = buffer_get_modifiable_data(entry, NULL);
	size_t size = entry->used - crypto_sign_BYTES;
	unsigned char again[DOVETAIL_HASH_SIZE];

	crypto_generichash(again, sizeof(again), data, size, NULL, 0);
	crypto_sign_detached(data + size, NULL, again, sizeof(again),
			     dovetail_keyring_sign_sk(keyring));
}

static void test_seal_open(void)
{
	static const size_t sizes[] = { 0, 1, 15, 16, 17, 4096, 256 * 1024 };
	struct dovetail_entry_head head;
	struct dovetail_open_expect expect;
	struct dovetail_opened opened;
	buffer_t *payload = t_buffer_create(64);
	unsigned int i;
	const char *error;

	test_begin("seal and open");
	head_init(&head);
	expect_init(&expect);
	for (i = 0; i < N_ELEMENTS(sizes); i++) {
		unsigned char *text = i_malloc(sizes[i] + 1);
		buffer_t *entry;

		randombytes_buf(text, sizes[i]);
		entry = seal_for_b(&head, text, sizes[i]);
		test_assert_idx(entry->used == ENTRY_SIZE(1, sizes[i]), i);
		test_assert_idx(dovetail_open(b, &expect, entry->data,
					      entry->used, payload, &opened,
					      &error) == DOVETAIL_OPEN_OK, i);
		test_assert_idx(payload->used == sizes[i] &&
				memcmp(payload->data, text, sizes[i]) == 0, i);
		test_assert_idx(memcmp(&opened.head, &head,
				       sizeof(head)) == 0, i);
		test_assert_idx(memcmp(opened.hash, hash,
				       sizeof(hash)) == 0, i);
		test_assert_idx(opened.origin == key_of(b, "a"), i);
		test_assert_idx(!opened.gap, i);
		i_free(text);
	}
	test_end();
}

static void test_seal_structure(void)
{
	const struct dovetail_public_key *recipients[] = {
		key_of(a, "c"), key_of(a, "b"),
	};
	struct dovetail_entry_head head;
	buffer_t *dest = t_buffer_create(512), *other = t_buffer_create(512);
	unsigned char again[DOVETAIL_HASH_SIZE];
	unsigned char other_hash[DOVETAIL_HASH_SIZE];
	const unsigned char *e;
	size_t size = ENTRY_SIZE(2, 7);

	test_begin("seal structure");
	head_init(&head);
	/* is appended */
	buffer_append(dest, "before", 6);
	dovetail_seal(a, recipients, 2, &head, "payload", 7, dest, hash);
	test_assert(dest->used == 6 + size);
	test_assert(memcmp(dest->data, "before", 6) == 0);
	e = CONST_PTR_OFFSET(dest->data, 6);
	test_assert(memcmp(e, "DVTL\x01\x01\x03\x04", 8) == 0);
	test_assert(memcmp(e + 8, "\0\0\0\0\0\0\0\x07", 8) == 0);
	test_assert(memcmp(e + 16, "\x01\x02\x03\x04\x05\x06\x07\x08", 8) == 0);
	test_assert(memcmp(e + 24, "\0\0\0\0\0\0\0\x09", 8) == 0);
	test_assert(be64_to_cpu_unaligned(e + 32) == 1700000000000000);
	test_assert(memcmp(e + OFFSET_KEY_ID, dovetail_keyring_self(a)->id,
			   8) == 0);
	test_assert(memcmp(e + OFFSET_PREV, head.prev, 32) == 0);
	test_assert(e[OFFSET_COUNT] == 2);
	test_assert(memcmp(e + 81, recipients[0]->id, 8) == 0);
	test_assert(memcmp(e + 81 + 56, recipients[1]->id, 8) == 0);
	test_assert(be32_to_cpu_unaligned(e + 81 + 2 * 56 + 24) == 7 + 16);
	crypto_generichash(again, sizeof(again), e, size - 64, NULL, 0);
	test_assert(memcmp(again, hash, sizeof(hash)) == 0);
	test_assert(crypto_sign_verify_detached(e + size - 64, again,
		sizeof(again), dovetail_keyring_self(a)->sign_pk) == 0);

	/* a message key and a nonce of its own for each entry */
	dovetail_seal(a, recipients, 2, &head, "payload", 7, other,
		      other_hash);
	test_assert(memcmp(e + 81 + 2 * 56,
			   CONST_PTR_OFFSET(other->data, 81 + 2 * 56),
			   24) != 0);
	test_assert(memcmp(hash, other_hash, sizeof(hash)) != 0);
	test_end();
}

static void test_seal_recipients(void)
{
	const struct dovetail_public_key *recipients[] = {
		key_of(a, "c"), key_of(a, "b"),
	};
	struct dovetail_entry_head head;
	struct dovetail_open_expect expect;
	buffer_t *entry = t_buffer_create(512);
	const char *error;

	test_begin("seal recipients");
	head_init(&head);
	expect_init(&expect);
	dovetail_seal(a, recipients, 2, &head, "payload", 7, entry, hash);
	test_assert(open_by(b, &expect, entry, &error) == DOVETAIL_OPEN_OK);
	test_assert(open_by(c, &expect, entry, &error) == DOVETAIL_OPEN_OK);
	test_assert(open_by(d, &expect, entry, &error) ==
		    DOVETAIL_OPEN_NOT_FOR_US);

	entry = seal_for_b(&head, "payload", 7);
	test_assert(open_by(c, &expect, entry, &error) ==
		    DOVETAIL_OPEN_NOT_FOR_US);
	test_assert_strcmp(error, "Entry 72623859790382856-9 of a is refused "
			   "(not-for-us): our key is not among its "
			   "recipients; does the origin have our current "
			   "public key?");
	test_end();
}

static void test_seal_size_limit(void)
{
	size_t max = DOVETAIL_ENTRY_MAX_SIZE - ENTRY_SIZE(1, 0);
	struct dovetail_entry_head head;
	struct dovetail_open_expect expect;
	struct dovetail_opened opened;
	buffer_t *payload = buffer_create_dynamic(default_pool, 1024);
	buffer_t *entry = buffer_create_dynamic(default_pool, 1024);
	const struct dovetail_public_key *recipient = key_of(a, "b");
	void *text = i_malloc(max);
	const char *error;

	test_begin("seal size limit");
	head_init(&head);
	expect_init(&expect);
	dovetail_seal(a, &recipient, 1, &head, text, max, entry, hash);
	test_assert(entry->used == DOVETAIL_ENTRY_MAX_SIZE);
	test_assert(dovetail_open(b, &expect, entry->data, entry->used, payload,
				  &opened, &error) == DOVETAIL_OPEN_OK);
	test_assert(payload->used == max);
	buffer_append_c(entry, 0);
	test_assert(dovetail_open(b, &expect, entry->data, entry->used, payload,
				  &opened, &error) == DOVETAIL_OPEN_OVERSIZED);
	test_assert_strcmp(error, "Entry is refused (oversized): "
			   "it is larger than any entry");
	test_assert(payload->used == 0);
	i_free(text);
	buffer_free(&entry);
	buffer_free(&payload);
	test_end();
}

static void test_open_damaged(void)
{
	struct dovetail_entry_head head;
	struct dovetail_open_expect expect;
	struct dovetail_opened opened;
	buffer_t *entry, *payload = t_buffer_create(64);
	const char *error;
	size_t pos;

	test_begin("open damaged entries");
	head_init(&head);
	expect_init(&expect);
	entry = seal_for_b(&head, "payload", 7);

	/* every bit */
	for (pos = 0; pos < entry->used * 8; pos++) T_BEGIN {
		unsigned char *data =
			i_memdup(entry->data, entry->used);
		enum dovetail_open_ret ret;

		data[pos / 8] ^= 1 << (pos % 8);
		ret = dovetail_open(b, &expect, data, entry->used, payload,
				    &opened, &error);
		test_assert_idx(ret == DOVETAIL_OPEN_MALFORMED ||
				ret == DOVETAIL_OPEN_VERSION ||
				ret == DOVETAIL_OPEN_UNKNOWN_KEY ||
				ret == DOVETAIL_OPEN_BAD_SIGNATURE, pos);
		test_assert_idx(opened.origin == NULL, pos);
		test_assert_idx(payload->used == 0, pos);
		test_assert_idx(dovetail_open_own(a, data, entry->used,
						  &opened, &error) < 0, pos);
		i_free(data);
	} T_END;

	/* every end, and one byte more */
	for (pos = 0; pos <= entry->used + 1; pos++) T_BEGIN {
		unsigned char *data = i_malloc(pos + 1);
		enum dovetail_open_ret ret;

		memcpy(data, entry->data, I_MIN(pos, entry->used));
		ret = dovetail_open(b, &expect, data, pos, payload, &opened,
				    &error);
		if (pos == entry->used)
			test_assert(ret == DOVETAIL_OPEN_OK);
		else
			test_assert_idx(ret == DOVETAIL_OPEN_MALFORMED, pos);
		i_free(data);
	} T_END;
	test_assert(dovetail_open(b, &expect, NULL, 0, payload, &opened,
				  &error) == DOVETAIL_OPEN_MALFORMED);
	test_end();
}

static void test_open_header(void)
{
	/* headers that are properly signed but contradict themselves */
	static const struct {
		unsigned int offset;
		unsigned char value;
		enum dovetail_open_ret ret;
	} tests[] = {
		{ OFFSET_VERSION, 0, DOVETAIL_OPEN_MALFORMED },
		{ OFFSET_VERSION, 2, DOVETAIL_OPEN_VERSION },
		{ OFFSET_VERSION, 255, DOVETAIL_OPEN_VERSION },
		{ OFFSET_KIND, 0, DOVETAIL_OPEN_MALFORMED },
		/* an ack, with the signature of a log entry */
		{ OFFSET_KIND, 2, DOVETAIL_OPEN_MALFORMED },
		{ OFFSET_KIND, 3, DOVETAIL_OPEN_MALFORMED },
		{ OFFSET_SHARD, 2, DOVETAIL_OPEN_WRONG_STREAM },
		{ OFFSET_SHARD, 4, DOVETAIL_OPEN_MALFORMED },
		{ OFFSET_SHARDS, 0, DOVETAIL_OPEN_MALFORMED },
		{ OFFSET_SHARDS, 3, DOVETAIL_OPEN_MALFORMED },
		{ OFFSET_SEQ + 7, 0, DOVETAIL_OPEN_MALFORMED },
		{ OFFSET_COUNT, 0, DOVETAIL_OPEN_MALFORMED },
		{ OFFSET_COUNT, 2, DOVETAIL_OPEN_MALFORMED },
		{ OFFSET_COUNT, 255, DOVETAIL_OPEN_MALFORMED },
		/* the message key was not wrapped for us */
		{ OFFSET_RECIPIENTS + 8, 0, DOVETAIL_OPEN_UNDECRYPTABLE },
		/* the ciphertext goes with another epoch */
		{ 8, 1, DOVETAIL_OPEN_UNDECRYPTABLE },
		/* the size of the ciphertext */
		{ 81 + 56 + 24, 1, DOVETAIL_OPEN_MALFORMED },
		{ 81 + 56 + 24 + 3, 7 + 15, DOVETAIL_OPEN_MALFORMED },
		{ 81 + 56 + 24 + 3, 7 + 17, DOVETAIL_OPEN_MALFORMED },
		{ 81 + 56 + 24 + 4, 0, DOVETAIL_OPEN_UNDECRYPTABLE },
	};
	struct dovetail_entry_head head;
	struct dovetail_open_expect expect;
	unsigned int i;
	const char *error;

	test_begin("open contradicting headers");
	head_init(&head);
	expect_init(&expect);
	for (i = 0; i < N_ELEMENTS(tests); i++) {
		buffer_t *entry = seal_for_b(&head, "payload", 7);
		unsigned char *data = buffer_get_modifiable_data(entry, NULL);

		if (data[tests[i].offset] == tests[i].value)
			data[tests[i].offset] ^= 1;
		else
			data[tests[i].offset] = tests[i].value;
		sign_again(a, entry);
		test_assert_idx(open_by(b, &expect, entry, &error) ==
				tests[i].ret, i);
	}
	test_end();

	test_begin("open more recipients than allowed");
	{
		buffer_t *entry = seal_for_b(&head, "payload", 7);
		unsigned char *data;

		buffer_insert_zero(entry, OFFSET_RECIPIENTS,
				   RECIPIENT_SIZE * DOVETAIL_RECIPIENTS_MAX);
		data = buffer_get_modifiable_data(entry, NULL);
		data[OFFSET_COUNT] = DOVETAIL_RECIPIENTS_MAX + 1;
		sign_again(a, entry);
		test_assert(open_by(b, &expect, entry, &error) ==
			    DOVETAIL_OPEN_MALFORMED);
	}
	test_end();
}

static void test_open_origin(void)
{
	const struct dovetail_public_key *recipient = key_of(d, "b");
	struct dovetail_entry_head head;
	struct dovetail_open_expect expect;
	buffer_t *entry = t_buffer_create(512), *own;
	unsigned char *data;
	const char *error;

	test_begin("open by origin");
	head_init(&head);
	expect_init(&expect);
	/* a stranger */
	dovetail_seal(d, &recipient, 1, &head, "payload", 7, entry, hash);
	test_assert(open_by(b, &expect, entry, &error) ==
		    DOVETAIL_OPEN_UNKNOWN_KEY);
	test_assert(strstr(error, "Entry 72623859790382856-9 of key ") != NULL);
	expect.origin = NULL;
	test_assert(open_by(b, &expect, entry, &error) ==
		    DOVETAIL_OPEN_UNKNOWN_KEY);
	/* a stranger who says he is a */
	data = buffer_get_modifiable_data(entry, NULL);
	memcpy(data + OFFSET_KEY_ID, dovetail_keyring_self(a)->id, 8);
	sign_again(d, entry);
	test_assert(open_by(b, &expect, entry, &error) ==
		    DOVETAIL_OPEN_BAD_SIGNATURE);

	/* a peer in another peer's stream */
	entry = t_buffer_create(512);
	recipient = key_of(c, "b");
	dovetail_seal(c, &recipient, 1, &head, "payload", 7, entry, hash);
	expect.origin = "a";
	test_assert(open_by(b, &expect, entry, &error) ==
		    DOVETAIL_OPEN_WRONG_ORIGIN);
	test_assert_strcmp(error, "Entry 72623859790382856-9 of c is refused "
			   "(wrong-origin): it stands where a writes");
	expect.origin = NULL;
	test_assert(open_by(b, &expect, entry, &error) == DOVETAIL_OPEN_OK);
	expect.origin = "c";
	test_assert(open_by(b, &expect, entry, &error) == DOVETAIL_OPEN_OK);

	/* our own entry sent back to us */
	own = seal_for_b(&head, "payload", 7);
	expect.origin = NULL;
	test_assert(open_by(a, &expect, own, &error) ==
		    DOVETAIL_OPEN_WRONG_ORIGIN);
	expect.origin = "b";
	test_assert(open_by(a, &expect, own, &error) ==
		    DOVETAIL_OPEN_WRONG_ORIGIN);
	test_end();
}

static void test_open_place(void)
{
	static const struct {
		uint64_t epoch, generation, seq;
		enum dovetail_open_ret ret;
	} tests[] = {
		{ 7, 5, 10, DOVETAIL_OPEN_REPEATED },
		{ 7, 5, 9, DOVETAIL_OPEN_REPEATED },
		{ 7, 4, 11, DOVETAIL_OPEN_REPEATED },
		{ 8, 4, 99, DOVETAIL_OPEN_REPEATED },
		{ 6, 4, 99, DOVETAIL_OPEN_REPEATED },
		{ 6, 5, 11, DOVETAIL_OPEN_STALE_EPOCH },
		{ 0, 6, 1, DOVETAIL_OPEN_STALE_EPOCH },
		{ 7, 5, 11, DOVETAIL_OPEN_OK },
		{ 7, 5, UINT64_MAX, DOVETAIL_OPEN_OK },
		{ 7, 6, 1, DOVETAIL_OPEN_OK },
		{ 8, 5, 11, DOVETAIL_OPEN_OK },
	};
	struct dovetail_entry_head head;
	struct dovetail_open_expect expect;
	struct dovetail_chain chain;
	unsigned int i;
	const char *error;

	test_begin("open repeated and stale entries");
	head_init(&head);
	expect_init(&expect);
	i_zero(&chain);
	chain.epoch = 7;
	chain.generation = 5;
	chain.seq = 10;
	for (i = 0; i < N_ELEMENTS(tests); i++) {
		buffer_t *entry;

		head.epoch = tests[i].epoch;
		head.generation = tests[i].generation;
		head.seq = tests[i].seq;
		entry = seal_for_b(&head, "payload", 7);
		expect.chain = &chain;
		test_assert_idx(open_by(b, &expect, entry, &error) ==
				tests[i].ret, i);
		expect.chain = NULL;
		test_assert_idx(open_by(b, &expect, entry, &error) ==
				DOVETAIL_OPEN_OK, i);
	}
	/* nothing yet: only the epoch counts */
	chain.generation = chain.seq = 0;
	expect.chain = &chain;
	head.generation = 0;
	head.seq = 1;
	head.epoch = 7;
	test_assert(open_by(b, &expect, seal_for_b(&head, "", 0), &error) ==
		    DOVETAIL_OPEN_OK);
	head.epoch = 6;
	test_assert(open_by(b, &expect, seal_for_b(&head, "", 0), &error) ==
		    DOVETAIL_OPEN_STALE_EPOCH);
	test_assert_strcmp(error, "Entry 0-1 of a is refused (stale-epoch): "
			   "its epoch 6 is over, now is 7");
	test_end();
}

static void test_open_chain(void)
{
	struct dovetail_entry_head head;
	struct dovetail_open_expect expect;
	struct dovetail_chain chain;
	struct dovetail_opened opened;
	buffer_t *payload = t_buffer_create(64), *entries[5];
	unsigned int i;
	const char *error;

	test_begin("open a chain");
	head_init(&head);
	expect_init(&expect);
	memset(head.prev, 0, sizeof(head.prev));
	for (i = 0; i < N_ELEMENTS(entries); i++) {
		/* the fourth starts a generation */
		head.generation = i < 3 ? 5 : 6;
		head.seq = i < 3 ? i + 1 : i - 2;
		entries[i] = seal_for_b(&head, "payload", i);
		memcpy(head.prev, hash, sizeof(hash));
	}

#define OPEN(i, expected_gap) STMT_START { \
		test_assert_idx(dovetail_open(b, &expect, entries[i]->data, \
			entries[i]->used, payload, &opened, &error) == \
			DOVETAIL_OPEN_OK, i); \
		test_assert_idx(opened.gap == (expected_gap), i); \
		test_assert_idx(payload->used == i, i); \
		chain.epoch = opened.head.epoch; \
		chain.generation = opened.head.generation; \
		chain.seq = opened.head.seq; \
		memcpy(chain.hash, opened.hash, sizeof(chain.hash)); \
	} STMT_END

	/* in order, over the border of the generation */
	i_zero(&chain);
	expect.chain = &chain;
	for (i = 0; i < N_ELEMENTS(entries); i++)
		OPEN(i, FALSE);

	/* from the middle; one is missing; the whole generation's start too */
	i_zero(&chain);
	OPEN(1, FALSE);
	OPEN(2, FALSE);
	OPEN(4, TRUE);
	i_zero(&chain);
	OPEN(0, FALSE);
	OPEN(2, TRUE);
	OPEN(3, FALSE);

	/* the origin has forgotten what was before */
	memset(head.prev, 0, sizeof(head.prev));
	head.generation = 7;
	head.seq = 1;
	entries[1] = seal_for_b(&head, "payload", 1);
	OPEN(1, TRUE);
	/* even when the chain's hash was never known either */
	head.seq = 2;
	entries[1] = seal_for_b(&head, "payload", 1);
	memset(chain.hash, 0, sizeof(chain.hash));
	OPEN(1, TRUE);

	/* without a chain there is no gap */
	expect.chain = NULL;
	OPEN(4, FALSE);
	test_end();
}

static void test_open_own(void)
{
	struct dovetail_entry_head head;
	struct dovetail_opened opened;
	struct dovetail_keyring *rotated;
	buffer_t *entry;
	const char *line, *error;

	test_begin("open our own entry");
	head_init(&head);
	entry = seal_for_b(&head, "payload", 7);
	test_assert(dovetail_open_own(a, entry->data, entry->used, &opened,
				      &error) == 0);
	test_assert(memcmp(&opened.head, &head, sizeof(head)) == 0);
	test_assert(memcmp(opened.hash, hash, sizeof(hash)) == 0);
	test_assert(opened.origin == dovetail_keyring_self(a));
	test_assert(!opened.gap);
	test_assert(dovetail_open_own(b, entry->data, entry->used, &opened,
				      &error) < 0);
	test_assert_strcmp(error, "Entry 72623859790382856-9 of a is refused: "
			   "it is not ours");
	test_assert(opened.origin == NULL);
	test_assert(dovetail_open_own(a, "DVTL", 4, &opened, &error) < 0);
	test_assert(dovetail_open_own(a, entry->data, entry->used - 1, &opened,
				      &error) < 0);

	/* what we signed before we changed our key is still ours */
	test_assert(dovetail_keygen(dir, "a", TRUE, &line, &error) == 0);
	rotated = ring_open("a", "b", "c");
	test_assert(dovetail_open_own(rotated, entry->data, entry->used,
				      &opened, &error) == 0);
	test_assert(opened.origin != dovetail_keyring_self(rotated));
	dovetail_keyring_close(&rotated);
	test_end();
}

static void test_open_names(void)
{
	unsigned int i, j;

	test_begin("open return names");
	for (i = 0; i < DOVETAIL_OPEN_RET_COUNT; i++) {
		const char *name = dovetail_open_ret_name(i);

		test_assert_idx(name != NULL && *name != '\0', i);
		test_assert_idx(strspn(name, "abcdefghijklmnopqrstuvwxyz-") ==
				strlen(name), i);
		for (j = 0; j < i; j++) {
			test_assert_idx(strcmp(name,
				dovetail_open_ret_name(j)) != 0, i);
		}
	}
	test_assert_strcmp(dovetail_open_ret_name(DOVETAIL_OPEN_BAD_SIGNATURE),
			   "bad-signature");
	test_end();
}

static void test_ack(void)
{
	struct dovetail_ack_failed failed[DOVETAIL_ACK_FAILED_MAX];
	struct dovetail_ack in, out;
	buffer_t *buf = t_buffer_create(1024), *again = t_buffer_create(1024);
	pool_t pool = pool_datastack_create();
	const char *error;
	size_t pos;

	test_begin("ack");
	i_zero(&failed);
	failed[0].generation = UINT64_MAX;
	failed[0].seq = 2;
	failed[0].ordinal = UINT32_MAX;
	failed[1].seq = 300;
	i_zero(&in);
	in.generation = 1;
	in.seq = 2;
	in.applied_time_usecs = 1700000000000000;
	in.entries = 4;
	in.rejected = 5;
	in.set_aside = 6;
	in.failed_count = 2;
	in.failed = failed;
	in.last_error = "Mailbox is locked";
	dovetail_ack_encode(buf, &in);
	test_assert(dovetail_ack_decode(pool, buf->data, buf->used, &out,
					&error) == 0);
	test_assert(out.generation == 1 && out.seq == 2 &&
		    out.applied_time_usecs == in.applied_time_usecs &&
		    out.entries == 4 && out.rejected == 5 &&
		    out.set_aside == 6 && out.failed_count == 2);
	test_assert(out.failed[0].generation == UINT64_MAX);
	test_assert(out.failed[0].ordinal == UINT32_MAX);
	test_assert(out.failed[1].seq == 300);
	test_assert_strcmp(out.last_error, "Mailbox is locked");
	dovetail_ack_encode(again, &out);
	test_assert(buffer_cmp(buf, again));

	for (pos = 0; pos < buf->used; pos++) {
		unsigned char *data = i_memdup(buf->data, pos + 1);

		test_assert_idx(dovetail_ack_decode(pool, data, pos, &out,
						    &error) < 0, pos);
		i_free(data);
	}
	buffer_append_c(buf, 0);
	test_assert(dovetail_ack_decode(pool, buf->data, buf->used, &out,
					&error) < 0);
	test_assert_strcmp(error, "ack: is followed by more bytes");
	test_end();

	test_begin("ack limits");
	buffer_set_used_size(buf, 0);
	in.failed_count = DOVETAIL_ACK_FAILED_MAX;
	dovetail_ack_encode(buf, &in);
	test_assert(dovetail_ack_decode(pool, buf->data, buf->used, &out,
					&error) == 0);
	test_assert(out.failed_count == DOVETAIL_ACK_FAILED_MAX);
	test_assert(dovetail_ack_decode(pool, "\x01\x02\x03\x04\x05\x06"
		"\x81\x02", 8, &out, &error) < 0);
	test_assert_strcmp(error, "ack: 257 failed are too many");
	test_assert(dovetail_ack_decode(pool, "\x01\x02\x03\x04\x05\x06"
		"\x80\x02", 8, &out, &error) < 0);
	test_assert_strcmp(error, "ack: is cut off or malformed");
	test_end();

	test_begin("ack to the origin");
	{
		const struct dovetail_public_key *recipient = key_of(b, "a");
		struct dovetail_entry_head head;
		struct dovetail_open_expect expect;
		struct dovetail_opened opened;
		buffer_t *entry = t_buffer_create(512);
		buffer_t *payload = t_buffer_create(512);

		head_init(&head);
		head.kind = DOVETAIL_ENTRY_ACK;
		/* the shard is told, not expected; and there is no chain */
		head.generation = head.seq = 0;
		buffer_set_used_size(buf, 0);
		in.failed_count = 0;
		dovetail_ack_encode(buf, &in);
		dovetail_seal(b, &recipient, 1, &head, buf->data, buf->used,
			      entry, hash);
		i_zero(&expect);
		expect.kind = DOVETAIL_ENTRY_ACK;
		test_assert(dovetail_open(a, &expect, entry->data, entry->used,
					  payload, &opened,
					  &error) == DOVETAIL_OPEN_OK);
		test_assert(buffer_cmp(payload, buf));
		test_assert(opened.head.shard == 3);
		test_assert_strcmp(opened.origin->node, "b");
		expect.kind = DOVETAIL_ENTRY_LOG;
		test_assert(dovetail_open(a, &expect, entry->data, entry->used,
					  payload, &opened, &error) ==
			    DOVETAIL_OPEN_WRONG_STREAM);
		test_assert(strstr(error, "Ack entry 0-0 of b") != NULL);
	}
	test_end();
}

int main(void)
{
	static void (*const test_functions[])(void) = {
		nodes_init,
		test_seal_open,
		test_seal_structure,
		test_seal_recipients,
		test_seal_size_limit,
		test_open_damaged,
		test_open_header,
		test_open_origin,
		test_open_place,
		test_open_chain,
		test_open_names,
		test_ack,
		test_open_own,
		nodes_deinit,
		NULL
	};
	return test_run(test_functions);
}
