/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "mail-types.h"
#include "test-common.h"
#include "dovetail-digest.h"

/* The longest body that is tried cut at every place, of these bytes */
#define BODY_TRIED_SIZE 5
static const char body_alphabet[] = { 'a', '\r', '\n' };

struct message {
	uint32_t uid;
	uint8_t flags;
	/* NULL-terminated */
	const char *keywords[4];
	guid_128_t guid;
	int64_t received_date;
	const char *body;
};

static const uint8_t key_a[DOVETAIL_DIGEST_KEY_SIZE] = "0123456789abcdef";
static const uint8_t key_b[DOVETAIL_DIGEST_KEY_SIZE] = "0123456789abcdeg";

/* No two of them have anything in common but the key. */
static const struct message mailbox[] = {
	{ 1, MAIL_SEEN, { "$Label1", "work" }, { 1 }, 1700000000,
	  "Subject: one\r\n\r\nbody" },
	{ 2, MAIL_SEEN | MAIL_FLAGGED, { "$Label2" }, { 2 }, 1700000001,
	  "Subject: two\r\n\r\nbody" },
	{ 700, 0, { NULL }, { 3 }, -1, "" },
	{ UINT32_MAX, MAIL_DRAFT, { "a", "b", "c" }, { 4 }, 0, "\n" },
};
#define MESSAGES N_ELEMENTS(mailbox)

/* xorshift: the same numbers in every run */
static uint64_t test_random(void)
{
	static uint64_t x = 88172645463325252ULL;

	x ^= x << 13; x ^= x >> 7; x ^= x << 17;
	return x;
}

/* ---- the digest of messages ---- */

static void
message_hash(const struct message *m, uint8_t hash_r[DOVETAIL_MESSAGE_HASH_SIZE])
{
	struct dovetail_body_hash hash;

	dovetail_body_hash_init(&hash);
	dovetail_body_hash_more(&hash, m->body, strlen(m->body));
	dovetail_body_hash_final(&hash, m->guid, m->received_date, hash_r);
}

static void message_element(const struct message *m,
			    const uint8_t key[DOVETAIL_DIGEST_KEY_SIZE],
			    struct dovetail_sum *element_r)
{
	struct dovetail_sum keywords = { 0, 0 }, sum;
	uint8_t hash[DOVETAIL_MESSAGE_HASH_SIZE];
	unsigned int i;

	for (i = 0; m->keywords[i] != NULL; i++) {
		dovetail_keyword_sum(m->keywords[i], &sum);
		dovetail_sum_add(&keywords, &sum);
	}
	message_hash(m, hash);
	dovetail_element(key, m->uid, m->flags, &keywords, hash, element_r);
}

static void digest_make(const struct message *messages, unsigned int count,
			const uint8_t key[DOVETAIL_DIGEST_KEY_SIZE],
			struct dovetail_digest *digest_r)
{
	struct dovetail_sum element;
	unsigned int i;

	i_zero(digest_r);
	memcpy(digest_r->key, key, sizeof(digest_r->key));
	digest_r->count = count;
	for (i = 0; i < count; i++) {
		message_element(&messages[i], key, &element);
		dovetail_sum_add(&digest_r->sum, &element);
	}
}

static void test_digest_order(void)
{
	struct message shuffled[MESSAGES];
	struct dovetail_digest a, b;
	unsigned int i, j, round;

	test_begin("digest does not depend on the order");
	digest_make(mailbox, MESSAGES, key_a, &a);
	memcpy(shuffled, mailbox, sizeof(shuffled));
	for (round = 0; round < 20; round++) {
		for (i = MESSAGES - 1; i > 0; i--) {
			struct message tmp = shuffled[i];

			j = test_random() % (i + 1);
			shuffled[i] = shuffled[j];
			shuffled[j] = tmp;
		}
		digest_make(shuffled, MESSAGES, key_a, &b);
		test_assert_idx(dovetail_digest_equals(&a, &b), round);
	}
	test_end();

	test_begin("digest does not depend on the order of keywords");
	memcpy(shuffled, mailbox, sizeof(shuffled));
	shuffled[0].keywords[0] = "work";
	shuffled[0].keywords[1] = "$Label1";
	digest_make(shuffled, MESSAGES, key_a, &b);
	test_assert(dovetail_digest_equals(&a, &b));
	test_end();
}

static void test_digest_follows(void)
{
	struct dovetail_digest afresh, followed;
	struct dovetail_sum element;
	unsigned int i;

	test_begin("digest follows what is added and removed");
	digest_make(NULL, 0, key_a, &followed);
	test_assert(followed.sum.lo == 0 && followed.sum.hi == 0);
	for (i = 0; i < MESSAGES; i++) {
		message_element(&mailbox[i], key_a, &element);
		dovetail_sum_add(&followed.sum, &element);
		followed.count++;
		digest_make(mailbox, i + 1, key_a, &afresh);
		test_assert_idx(dovetail_digest_equals(&afresh, &followed), i);
	}
	/* the first ones go, so the last ones must be left */
	for (i = 0; i < MESSAGES; i++) {
		message_element(&mailbox[i], key_a, &element);
		dovetail_sum_sub(&followed.sum, &element);
		followed.count--;
		digest_make(mailbox + i + 1, MESSAGES - i - 1, key_a, &afresh);
		test_assert_idx(dovetail_digest_equals(&afresh, &followed), i);
	}
	test_assert(followed.sum.lo == 0 && followed.sum.hi == 0);
	test_end();
}

/* What the first two messages exchange with each other */
enum exchange {
	EXCHANGE_BODY,
	EXCHANGE_DATE,
	EXCHANGE_FLAGS,
	EXCHANGE_KEYWORDS,
	EXCHANGE_GUID,
	EXCHANGE_UID,
	EXCHANGE_COUNT
};

static void
exchange(enum exchange what, struct message *a, struct message *b)
{
	struct message old = *a;

	switch (what) {
	case EXCHANGE_BODY:
		a->body = b->body;
		b->body = old.body;
		break;
	case EXCHANGE_DATE:
		a->received_date = b->received_date;
		b->received_date = old.received_date;
		break;
	case EXCHANGE_FLAGS:
		a->flags = b->flags;
		b->flags = old.flags;
		break;
	case EXCHANGE_KEYWORDS:
		memcpy(a->keywords, b->keywords, sizeof(a->keywords));
		memcpy(b->keywords, old.keywords, sizeof(b->keywords));
		break;
	case EXCHANGE_GUID:
		memcpy(a->guid, b->guid, sizeof(a->guid));
		memcpy(b->guid, old.guid, sizeof(b->guid));
		break;
	case EXCHANGE_UID:
		a->uid = b->uid;
		b->uid = old.uid;
		break;
	case EXCHANGE_COUNT:
		i_unreached();
	}
}

static void test_digest_exchange(void)
{
	struct message messages[MESSAGES];
	struct dovetail_digest a, b;
	unsigned int what;

	test_begin("digest of two messages that exchanged something");
	digest_make(mailbox, MESSAGES, key_a, &a);
	for (what = 0; what < EXCHANGE_COUNT; what++) {
		memcpy(messages, mailbox, sizeof(messages));
		exchange(what, &messages[0], &messages[1]);
		digest_make(messages, MESSAGES, key_a, &b);
		test_assert_idx(!dovetail_digest_equals(&a, &b), what);
		test_assert_idx(!dovetail_sum_equals(&a.sum, &b.sum), what);
		/* and back */
		exchange(what, &messages[0], &messages[1]);
		digest_make(messages, MESSAGES, key_a, &b);
		test_assert_idx(dovetail_digest_equals(&a, &b), what);
	}
	test_end();
}

static void
assert_other_sum(const struct dovetail_digest *a,
		 const struct message *messages, unsigned int idx)
{
	struct dovetail_digest b;

	digest_make(messages, MESSAGES, key_a, &b);
	test_assert_idx(!dovetail_sum_equals(&a->sum, &b.sum), idx);
}

static void test_digest_fields(void)
{
	struct message messages[MESSAGES];
	struct dovetail_digest a;
	unsigned int i, bit;

	test_begin("digest sees each bit of what is small");
	digest_make(mailbox, MESSAGES, key_a, &a);
	for (bit = 0; bit < 64; bit++) {
		memcpy(messages, mailbox, sizeof(messages));
		messages[0].received_date ^= (int64_t)((uint64_t)1 << bit);
		assert_other_sum(&a, messages, bit);
	}
	for (bit = 0; bit < 32; bit++) {
		memcpy(messages, mailbox, sizeof(messages));
		messages[0].uid ^= (uint32_t)1 << bit;
		assert_other_sum(&a, messages, bit);
	}
	for (bit = 0; bit < 8; bit++) {
		memcpy(messages, mailbox, sizeof(messages));
		messages[0].flags ^= 1 << bit;
		assert_other_sum(&a, messages, bit);
	}
	for (bit = 0; bit < GUID_128_SIZE * 8; bit++) {
		memcpy(messages, mailbox, sizeof(messages));
		messages[0].guid[bit / 8] ^= 1 << (bit % 8);
		assert_other_sum(&a, messages, bit);
	}
	test_end();

	test_begin("digest sees a keyword that is missing");
	for (i = 0; i < MESSAGES; i++) {
		memcpy(messages, mailbox, sizeof(messages));
		if (messages[i].keywords[0] == NULL)
			messages[i].keywords[0] = "more";
		else
			messages[i].keywords[str_array_length(
				messages[i].keywords) - 1] = NULL;
		assert_other_sum(&a, messages, i);
	}
	/* one message's keyword stands at another one */
	memcpy(messages, mailbox, sizeof(messages));
	messages[0].keywords[1] = NULL;
	messages[1].keywords[1] = "work";
	assert_other_sum(&a, messages, 0);
	test_end();
}

static void test_digest_messages(void)
{
	struct message messages[MESSAGES + 1];
	struct dovetail_digest a, b;
	unsigned int i;

	test_begin("digest sees a message too many or too few");
	digest_make(mailbox, MESSAGES, key_a, &a);
	digest_make(mailbox, MESSAGES - 1, key_a, &b);
	test_assert(!dovetail_digest_equals(&a, &b));
	test_assert(!dovetail_sum_equals(&a.sum, &b.sum));
	for (i = 0; i < MESSAGES; i++) {
		/* the same one twice, with its own uid and with another */
		memcpy(messages, mailbox, sizeof(mailbox));
		messages[MESSAGES] = mailbox[i];
		digest_make(messages, MESSAGES + 1, key_a, &b);
		test_assert_idx(!dovetail_sum_equals(&a.sum, &b.sum), i);
		messages[MESSAGES].uid = 9;
		digest_make(messages, MESSAGES + 1, key_a, &b);
		test_assert_idx(!dovetail_sum_equals(&a.sum, &b.sum), i);
	}
	test_end();
}

static void test_digest_key(void)
{
	struct dovetail_digest a, b;
	unsigned int i;

	test_begin("digest of another key is another");
	digest_make(mailbox, MESSAGES, key_a, &a);
	digest_make(mailbox, MESSAGES, key_b, &b);
	test_assert(!dovetail_digest_equals(&a, &b));
	test_assert(!dovetail_sum_equals(&a.sum, &b.sum));
	/* every bit of the key counts */
	for (i = 0; i < DOVETAIL_DIGEST_KEY_SIZE * 8; i++) {
		uint8_t key[DOVETAIL_DIGEST_KEY_SIZE];

		memcpy(key, key_a, sizeof(key));
		key[i / 8] ^= 1 << (i % 8);
		digest_make(mailbox, MESSAGES, key, &b);
		test_assert_idx(!dovetail_sum_equals(&a.sum, &b.sum), i);
	}
	test_end();

	test_begin("digests are equal in key, count and sum");
	b = a;
	test_assert(dovetail_digest_equals(&a, &b));
	b.key[DOVETAIL_DIGEST_KEY_SIZE - 1] ^= 1;
	test_assert(!dovetail_digest_equals(&a, &b));
	b = a;
	b.count++;
	test_assert(!dovetail_digest_equals(&a, &b));
	b = a;
	b.sum.lo ^= (uint64_t)1 << 63;
	test_assert(!dovetail_digest_equals(&a, &b));
	b = a;
	b.sum.hi ^= (uint64_t)1 << 63;
	test_assert(!dovetail_digest_equals(&a, &b));
	test_end();
}

/* ---- bodies ---- */

/* A message's hash by the book: the header of dovetail-digest.h */
static void
book_hash(const char *body, size_t size, const guid_128_t guid, int64_t date,
	  uint8_t hash_r[DOVETAIL_MESSAGE_HASH_SIZE])
{
	unsigned char lf[64], input[GUID_128_SIZE + 8 + 8 + 32];
	size_t i, lf_size = 0;

	i_assert(size <= sizeof(lf));
	for (i = 0; i < size; i++) {
		if (body[i] != '\r' || i + 1 == size || body[i + 1] != '\n')
			lf[lf_size++] = body[i];
	}
	memcpy(input, guid, GUID_128_SIZE);
	for (i = 0; i < 8; i++) {
		input[16 + i] = (uint64_t)date >> (8 * i);
		input[24 + i] = (uint64_t)lf_size >> (8 * i);
	}
	crypto_generichash(input + 32, 32, lf, lf_size, NULL, 0);
	crypto_generichash(hash_r, DOVETAIL_MESSAGE_HASH_SIZE, input,
			   sizeof(input), NULL, 0);
}

/* Bit N of cuts: a piece ends behind byte N. */
static void
cut_hash(const char *body, size_t size, unsigned int cuts,
	 uint8_t hash_r[DOVETAIL_MESSAGE_HASH_SIZE])
{
	struct dovetail_body_hash hash;
	size_t i, start = 0;

	dovetail_body_hash_init(&hash);
	for (i = 0; i < size; i++) {
		if (i >= 32 || (cuts & (1U << i)) == 0)
			continue;
		dovetail_body_hash_more(&hash, body + start, i + 1 - start);
		/* nothing between the pieces */
		dovetail_body_hash_more(&hash, body, 0);
		start = i + 1;
	}
	dovetail_body_hash_more(&hash, body + start, size - start);
	dovetail_body_hash_final(&hash, mailbox[0].guid, 1, hash_r);
}

static void assert_cuts(const char *body, size_t size)
{
	uint8_t book[DOVETAIL_MESSAGE_HASH_SIZE];
	uint8_t hash[DOVETAIL_MESSAGE_HASH_SIZE];
	unsigned int cuts;

	book_hash(body, size, mailbox[0].guid, 1, book);
	for (cuts = 0; cuts < 1U << size; cuts++) {
		cut_hash(body, size, cuts, hash);
		test_assert_idx(memcmp(hash, book, sizeof(book)) == 0, cuts);
	}
}

static void test_body_cuts(void)
{
	char body[BODY_TRIED_SIZE];
	unsigned int i, num, left, count = 1;
	size_t size;

	test_begin("body hash of all short bodies, cut everywhere");
	for (size = 0; size <= BODY_TRIED_SIZE; size++) {
		for (num = 0; num < count; num++) {
			left = num;
			for (i = 0; i < size; i++) {
				body[i] = body_alphabet[left % 3];
				left /= 3;
			}
			assert_cuts(body, size);
		}
		count *= 3;
	}
	test_end();
}

static void test_body_line_ends(void)
{
	/* bodies in a line are equal, and those of other lines are not */
	static const struct {
		const char *bodies[3];
	} tests[] = {
		{ { "", "" } },
		{ { "\n", "\r\n" } },
		{ { "\r", "\r" } },
		{ { "\n\n", "\r\n\r\n", "\n\r\n" } },
		{ { "\r\r", "\r\r" } },
		/* only the CR at the LF goes */
		{ { "\r\r\n", "\r\r\n" } },
		{ { "\r\r\r\n", "\r\r\r\n" } },
		{ { "\n\r", "\r\n\r" } },
		{ { "a", "a" } },
		{ { "a\n", "a\r\n" } },
		{ { "a\r", "a\r" } },
		{ { "a\nb\n", "a\r\nb\r\n", "a\nb\r\n" } },
		{ { "a\rb\n", "a\rb\r\n" } },
		{ { "ab\n", "ab\r\n" } },
	};
	uint8_t hashes[N_ELEMENTS(tests)][DOVETAIL_MESSAGE_HASH_SIZE];
	uint8_t hash[DOVETAIL_MESSAGE_HASH_SIZE];
	unsigned int i, j;

	test_begin("body hash: CRLF is LF, a lone CR is a CR");
	for (i = 0; i < N_ELEMENTS(tests); i++) {
		const char *const *body = tests[i].bodies;

		cut_hash(*body, strlen(*body), 0, hashes[i]);
		for (j = 1; j < 3 && body[j] != NULL; j++) {
			cut_hash(body[j], strlen(body[j]), 0, hash);
			test_assert_idx(memcmp(hash, hashes[i],
					       sizeof(hash)) == 0, i);
		}
		for (j = 0; j < i; j++) {
			test_assert_idx(memcmp(hashes[i], hashes[j],
					       sizeof(hash)) != 0, i);
		}
	}
	test_end();
}

static void test_body_large(void)
{
	enum { LINES = 3000, LINE_SIZE = 10 };
	char *lf = i_malloc(LINES * (LINE_SIZE + 1));
	char *crlf = i_malloc(LINES * (LINE_SIZE + 2));
	uint8_t hash_lf[DOVETAIL_MESSAGE_HASH_SIZE];
	uint8_t hash_crlf[DOVETAIL_MESSAGE_HASH_SIZE];
	struct dovetail_body_hash hash;
	size_t lf_size = 0, crlf_size = 0, pos, piece;
	unsigned int i, round;

	test_begin("body hash of many blocks, cut at random");
	for (i = 0; i < LINES; i++) {
		memset(lf + lf_size, 'a' + i % 26, LINE_SIZE);
		memcpy(crlf + crlf_size, lf + lf_size, LINE_SIZE);
		lf_size += LINE_SIZE;
		crlf_size += LINE_SIZE;
		lf[lf_size++] = '\n';
		crlf[crlf_size++] = '\r';
		crlf[crlf_size++] = '\n';
	}
	dovetail_body_hash_init(&hash);
	dovetail_body_hash_more(&hash, lf, lf_size);
	test_assert(hash.size == lf_size);
	dovetail_body_hash_final(&hash, mailbox[0].guid, 1, hash_lf);
	for (round = 0; round < 5; round++) {
		dovetail_body_hash_init(&hash);
		for (pos = 0; pos < crlf_size; pos += piece) {
			piece = test_random() % 300;
			piece = I_MIN(piece, crlf_size - pos);
			dovetail_body_hash_more(&hash, crlf + pos, piece);
		}
		test_assert_idx(hash.size == lf_size, round);
		dovetail_body_hash_final(&hash, mailbox[0].guid, 1, hash_crlf);
		test_assert_idx(memcmp(hash_lf, hash_crlf,
				       sizeof(hash_lf)) == 0, round);
	}
	i_free(crlf);
	i_free(lf);
	test_end();
}

static void test_body_bits(void)
{
	unsigned char body[] = "From: a\n\nNo line of this has a CR\n";
	const char *text = (const char *)body;
	const size_t size = sizeof(body) - 1;
	uint8_t hash[DOVETAIL_MESSAGE_HASH_SIZE];
	uint8_t other[DOVETAIL_MESSAGE_HASH_SIZE];
	unsigned int bit;

	test_begin("body hash sees each bit");
	cut_hash(text, size, 0, hash);
	for (bit = 0; bit < size * 8; bit++) {
		body[bit / 8] ^= 1 << (bit % 8);
		cut_hash(text, size, 0, other);
		test_assert_idx(memcmp(hash, other, sizeof(hash)) != 0, bit);
		body[bit / 8] ^= 1 << (bit % 8);
	}
	/* no byte more or less */
	cut_hash(text, size - 1, 0, other);
	test_assert(memcmp(hash, other, sizeof(hash)) != 0);
	cut_hash(text, size + 1, 0, other);
	test_assert(memcmp(hash, other, sizeof(hash)) != 0);
	cut_hash(text, size, 0, other);
	test_assert(memcmp(hash, other, sizeof(hash)) == 0);
	test_end();
}

/* ---- sums ---- */

static void test_keyword_sum(void)
{
	static const struct {
		const char *a, *b;
		bool equal;
	} tests[] = {
		{ "$Label1", "$Label1", TRUE },
		{ "$Label1", "$LABEL1", TRUE },
		{ "$label1", "$LaBeL1", TRUE },
		{ "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz",
		  TRUE },
		{ "$Label1", "$Label2", FALSE },
		{ "$Label1", "$Label", FALSE },
		{ "a", "", FALSE },
		/* neighbours of the letters */
		{ "@", "`", FALSE },
		{ "[", "{", FALSE },
		/* only ASCII has a case, as for Dovecot */
		{ "\xc3\x84", "\xc3\xa4", FALSE },
		{ "\xc3\x84x", "\xc3\x84X", TRUE },
	};
	struct dovetail_sum a, b;
	unsigned int i;

	test_begin("keyword's case does not count");
	for (i = 0; i < N_ELEMENTS(tests); i++) {
		dovetail_keyword_sum(tests[i].a, &a);
		dovetail_keyword_sum(tests[i].b, &b);
		test_assert_idx(dovetail_sum_equals(&a, &b) == tests[i].equal,
				i);
	}
	test_end();
}

/* Byte by byte, as on paper */
static void
paper_add(uint8_t sum[DOVETAIL_DIGEST_SUM_SIZE],
	  const uint8_t num[DOVETAIL_DIGEST_SUM_SIZE])
{
	unsigned int i, carry = 0;

	for (i = 0; i < DOVETAIL_DIGEST_SUM_SIZE; i++) {
		carry += sum[i] + num[i];
		sum[i] = carry & 0xff;
		carry >>= 8;
	}
}

static void assert_sum(const struct dovetail_sum *a,
		       const struct dovetail_sum *b, unsigned int idx)
{
	uint8_t paper[DOVETAIL_DIGEST_SUM_SIZE], num[DOVETAIL_DIGEST_SUM_SIZE];
	struct dovetail_sum sum = *a, back;

	dovetail_sum_to_bytes(a, paper);
	dovetail_sum_to_bytes(b, num);
	paper_add(paper, num);
	dovetail_sum_add(&sum, b);
	dovetail_sum_to_bytes(&sum, num);
	test_assert_idx(memcmp(paper, num, sizeof(num)) == 0, idx);
	dovetail_sum_from_bytes(paper, &back);
	test_assert_idx(dovetail_sum_equals(&back, &sum), idx);
	dovetail_sum_sub(&sum, b);
	test_assert_idx(dovetail_sum_equals(&sum, a), idx);
}

static void test_sum_carry(void)
{
	static const uint64_t edges[] = {
		0, 1, 2, (uint64_t)1 << 63, ((uint64_t)1 << 63) - 1,
		UINT64_MAX - 1, UINT64_MAX
	};
	const unsigned int count = N_ELEMENTS(edges);
	struct dovetail_sum a, b;
	unsigned int i, idx;

	test_begin("sums of 128 bits carry");
	for (i = 0; i < count * count * count * count; i++) {
		idx = i;
		a.lo = edges[idx % count];
		idx /= count;
		a.hi = edges[idx % count];
		idx /= count;
		b.lo = edges[idx % count];
		b.hi = edges[idx / count];
		assert_sum(&a, &b, i);
	}
	for (i = 0; i < 1000; i++) {
		a.lo = test_random();
		a.hi = test_random();
		b.lo = test_random();
		b.hi = test_random();
		assert_sum(&a, &b, i);
	}
	test_end();

	test_begin("sums of 128 bits, the two halves");
	a.lo = UINT64_MAX;
	a.hi = 0;
	b.lo = 1;
	b.hi = 0;
	dovetail_sum_add(&a, &b);
	test_assert(a.lo == 0 && a.hi == 1);
	dovetail_sum_sub(&a, &b);
	test_assert(a.lo == UINT64_MAX && a.hi == 0);
	a.hi = UINT64_MAX;
	dovetail_sum_add(&a, &b);
	test_assert(a.lo == 0 && a.hi == 0);
	dovetail_sum_sub(&a, &b);
	test_assert(a.lo == UINT64_MAX && a.hi == UINT64_MAX);
	test_assert(!dovetail_sum_equals(&a, &b));
	b.lo = UINT64_MAX;
	test_assert(!dovetail_sum_equals(&a, &b));
	b.hi = UINT64_MAX;
	test_assert(dovetail_sum_equals(&a, &b));
	test_end();
}

static void test_sum_bytes(void)
{
	static const uint8_t bytes[DOVETAIL_DIGEST_SUM_SIZE] = {
		1, 2, 3, 4, 5, 6, 7, 8, 0xf9, 10, 11, 12, 13, 14, 15, 0xf0
	};
	uint8_t again[DOVETAIL_DIGEST_SUM_SIZE];
	struct dovetail_sum sum;

	test_begin("sum's bytes are little-endian");
	dovetail_sum_from_bytes(bytes, &sum);
	test_assert(sum.lo == 0x0807060504030201ULL);
	test_assert(sum.hi == 0xf00f0e0d0c0b0af9ULL);
	dovetail_sum_to_bytes(&sum, again);
	test_assert(memcmp(bytes, again, sizeof(bytes)) == 0);
	test_end();
}

int main(void)
{
	static void (*const test_functions[])(void) = {
		test_digest_order,
		test_digest_follows,
		test_digest_exchange,
		test_digest_fields,
		test_digest_messages,
		test_digest_key,
		test_body_cuts,
		test_body_line_ends,
		test_body_large,
		test_body_bits,
		test_keyword_sum,
		test_sum_carry,
		test_sum_bytes,
		NULL
	};
	return test_run(test_functions);
}
