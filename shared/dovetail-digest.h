#ifndef DOVETAIL_DIGEST_H
#define DOVETAIL_DIGEST_H

/* The fingerprint of a mailbox: equal digests mean equal messages.

   A message's hash stands for what never changes about it: GUID, received date,
   size and body. An element is a keyed hash of UID, flags, keywords and the
   message's hash. The digest is the sum of the elements, so it follows a change
   without looking at what did not change, and the order does not matter.

   The key is random, one for each mailbox, and secret: who does not know it cannot
   make two mailboxes with the same digest, but for keywords: their sum is without
   key and short, so who chooses keywords can find two sets with the same sum, as
   alike as equal sets to the digest. Nobody hits upon them by chance. Digests are
   comparable only with equal keys.

     body hash  BLAKE2b-256 of the body with LF line ends (a storage may keep CRLF)
     message    BLAKE2b-128 of: GUID (16 bytes), received date (i64 le), size of
                the body with LF line ends (u64 le), body hash (32)
     keywords   sum modulo 2^128 of BLAKE2b-128 of each name, A-Z in lower case;
                of it the low 56 bits count, as that is what the index keeps
     element    BLAKE2b-128, with key, of: UID (u32 le), flags (u8),
                keywords (16, le, the upper 9 are 0), message (16)
     digest     sum modulo 2^128 of the elements as little-endian numbers */

#include "guid.h"

#include <sodium.h>

#define DOVETAIL_DIGEST_KEY_SIZE 16
#define DOVETAIL_DIGEST_SUM_SIZE 16
#define DOVETAIL_MESSAGE_HASH_SIZE 16

/* A number modulo 2^128. */
struct dovetail_sum {
	uint64_t lo, hi;
};

struct dovetail_digest {
	uint8_t key[DOVETAIL_DIGEST_KEY_SIZE];
	struct dovetail_sum sum;
	/* messages */
	uint32_t count;
};

/* ---- a message's hash ---- */

/* Stands on the stack: a pool does not align it as libsodium wants it. */
struct dovetail_body_hash {
	crypto_generichash_state state;
	uint64_t size;
	/* the last byte was a CR: it counts only if no LF follows */
	bool cr;
};

void dovetail_body_hash_init(struct dovetail_body_hash *hash);
/* The next piece of the body. */
void dovetail_body_hash_more(struct dovetail_body_hash *hash,
			     const void *data, size_t size);
/* The body is complete. hash cannot be used any more. */
void dovetail_body_hash_final(struct dovetail_body_hash *hash,
			      const guid_128_t guid, int64_t received_date,
			      uint8_t message_r[DOVETAIL_MESSAGE_HASH_SIZE]);

/* ---- sums ---- */

void dovetail_sum_add(struct dovetail_sum *sum, const struct dovetail_sum *num);
void dovetail_sum_sub(struct dovetail_sum *sum, const struct dovetail_sum *num);
static inline bool dovetail_sum_equals(const struct dovetail_sum *a,
				       const struct dovetail_sum *b)
{
	return a->lo == b->lo && a->hi == b->hi;
}
/* Little-endian. */
void dovetail_sum_to_bytes(const struct dovetail_sum *sum,
			   uint8_t bytes_r[DOVETAIL_DIGEST_SUM_SIZE]);
void dovetail_sum_from_bytes(const uint8_t bytes[DOVETAIL_DIGEST_SUM_SIZE],
			     struct dovetail_sum *sum_r);

/* What one keyword adds to a message's keywords. */
void dovetail_keyword_sum(const char *name, struct dovetail_sum *sum_r);
/* What one message adds to the digest. flags: enum mail_flags, only the bits that
   are IMAP system flags. */
void dovetail_element(const uint8_t key[DOVETAIL_DIGEST_KEY_SIZE], uint32_t uid,
		      uint8_t flags, const struct dovetail_sum *keywords,
		      const uint8_t message[DOVETAIL_MESSAGE_HASH_SIZE],
		      struct dovetail_sum *element_r);

/* Digests of the same messages, with the same key. */
bool dovetail_digest_equals(const struct dovetail_digest *a,
			    const struct dovetail_digest *b);

#endif
