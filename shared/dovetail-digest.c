/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "dovetail-digest.h"

#define BODY_HASH_SIZE 32

static void put_le32(unsigned char *dest, uint32_t num)
{
	unsigned int i;

	for (i = 0; i < 4; i++)
		dest[i] = (num >> (8 * i)) & 0xff;
}

static void put_le64(unsigned char *dest, uint64_t num)
{
	put_le32(dest, num & 0xffffffff);
	put_le32(dest + 4, num >> 32);
}

static uint64_t get_le64(const unsigned char *src)
{
	uint64_t num = 0;
	unsigned int i;

	for (i = 0; i < 8; i++)
		num |= (uint64_t)src[i] << (8 * i);
	return num;
}

/* ---- a message's hash ---- */

void dovetail_body_hash_init(struct dovetail_body_hash *hash)
{
	(void)crypto_generichash_init(&hash->state, NULL, 0, BODY_HASH_SIZE);
	hash->size = 0;
	hash->cr = FALSE;
}

static void
body_hash_add(struct dovetail_body_hash *hash, const void *data, size_t size)
{
	(void)crypto_generichash_update(&hash->state, data, size);
	hash->size += size;
}

void dovetail_body_hash_more(struct dovetail_body_hash *hash,
			     const void *_data, size_t size)
{
	const unsigned char *data = _data, *end = data + size, *cr;

	if (size == 0)
		return;
	if (hash->cr && *data != '\n')
		body_hash_add(hash, "\r", 1);
	hash->cr = FALSE;
	while (data < end && (cr = memchr(data, '\r', end - data)) != NULL) {
		body_hash_add(hash, data, cr - data);
		data = cr + 1;
		if (data == end) {
			hash->cr = TRUE;
			return;
		}
		if (*data != '\n')
			body_hash_add(hash, "\r", 1);
	}
	body_hash_add(hash, data, end - data);
}

void dovetail_body_hash_final(struct dovetail_body_hash *hash,
			      const guid_128_t guid, int64_t received_date,
			      uint8_t message_r[DOVETAIL_MESSAGE_HASH_SIZE])
{
	unsigned char input[GUID_128_SIZE + 8 + 8 + BODY_HASH_SIZE];

	if (hash->cr)
		body_hash_add(hash, "\r", 1);
	memcpy(input, guid, GUID_128_SIZE);
	put_le64(input + GUID_128_SIZE, received_date);
	put_le64(input + GUID_128_SIZE + 8, hash->size);
	(void)crypto_generichash_final(&hash->state, input + GUID_128_SIZE + 16,
				       BODY_HASH_SIZE);
	(void)crypto_generichash(message_r, DOVETAIL_MESSAGE_HASH_SIZE,
				 input, sizeof(input), NULL, 0);
}

/* ---- sums ---- */

void dovetail_sum_add(struct dovetail_sum *sum, const struct dovetail_sum *num)
{
	sum->lo += num->lo;
	sum->hi += num->hi + (sum->lo < num->lo ? 1 : 0);
}

void dovetail_sum_sub(struct dovetail_sum *sum, const struct dovetail_sum *num)
{
	sum->hi -= num->hi + (sum->lo < num->lo ? 1 : 0);
	sum->lo -= num->lo;
}

void dovetail_sum_to_bytes(const struct dovetail_sum *sum,
			   uint8_t bytes_r[DOVETAIL_DIGEST_SUM_SIZE])
{
	put_le64(bytes_r, sum->lo);
	put_le64(bytes_r + 8, sum->hi);
}

void dovetail_sum_from_bytes(const uint8_t bytes[DOVETAIL_DIGEST_SUM_SIZE],
			     struct dovetail_sum *sum_r)
{
	sum_r->lo = get_le64(bytes);
	sum_r->hi = get_le64(bytes + 8);
}

void dovetail_keyword_sum(const char *name, struct dovetail_sum *sum_r)
{
	unsigned char hash[DOVETAIL_DIGEST_SUM_SIZE];

	T_BEGIN {
		const char *lower = t_str_lcase(name);

		(void)crypto_generichash(hash, sizeof(hash),
					 (const unsigned char *)lower,
					 strlen(lower), NULL, 0);
	} T_END;
	dovetail_sum_from_bytes(hash, sum_r);
}

void dovetail_element(const uint8_t key[DOVETAIL_DIGEST_KEY_SIZE], uint32_t uid,
		      uint8_t flags, const struct dovetail_sum *keywords,
		      const uint8_t message[DOVETAIL_MESSAGE_HASH_SIZE],
		      struct dovetail_sum *element_r)
{
	unsigned char input[5 + DOVETAIL_DIGEST_SUM_SIZE +
			    DOVETAIL_MESSAGE_HASH_SIZE];
	unsigned char hash[DOVETAIL_DIGEST_SUM_SIZE];

	put_le32(input, uid);
	input[4] = flags;
	dovetail_sum_to_bytes(keywords, input + 5);
	memcpy(input + 5 + DOVETAIL_DIGEST_SUM_SIZE, message,
	       DOVETAIL_MESSAGE_HASH_SIZE);
	(void)crypto_generichash(hash, sizeof(hash), input, sizeof(input),
				 key, DOVETAIL_DIGEST_KEY_SIZE);
	dovetail_sum_from_bytes(hash, element_r);
}

bool dovetail_digest_equals(const struct dovetail_digest *a,
			    const struct dovetail_digest *b)
{
	return memcmp(a->key, b->key, sizeof(a->key)) == 0 &&
		a->count == b->count && dovetail_sum_equals(&a->sum, &b->sum);
}
