/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "buffer.h"
#include "hex-binary.h"
#include "dovetail-wire.h"
#include "dovetail-seal.h"

#define SEAL_MAGIC "DVTL"
#define SEAL_MAGIC_SIZE 4
#define SEAL_FIXED_SIZE 81

#define MESSAGE_KEY_SIZE crypto_aead_xchacha20poly1305_ietf_KEYBYTES
#define WRAPPED_KEY_SIZE (MESSAGE_KEY_SIZE + crypto_box_MACBYTES)
#define RECIPIENT_SIZE (DOVETAIL_KEY_ID_SIZE + WRAPPED_KEY_SIZE)
#define NONCE_SIZE crypto_aead_xchacha20poly1305_ietf_NPUBBYTES
#define TAG_SIZE crypto_aead_xchacha20poly1305_ietf_ABYTES
#define CIPHERTEXT_SIZE_SIZE 4
#define ACK_MAC_SIZE 32

_Static_assert(RECIPIENT_SIZE == 56, "as dovetail-seal.h draws it");
_Static_assert(NONCE_SIZE == 24, "as dovetail-seal.h draws it");
_Static_assert(NONCE_SIZE == crypto_box_NONCEBYTES, "one nonce serves both");
_Static_assert(crypto_sign_BYTES == 64, "as dovetail-seal.h draws it");
_Static_assert(crypto_box_BEFORENMBYTES >= crypto_generichash_KEYBYTES_MIN &&
	       crypto_box_BEFORENMBYTES <= crypto_generichash_KEYBYTES_MAX,
	       "a shared secret can be the key of a hash");
_Static_assert(SEAL_MAGIC_SIZE + 4 + 4 * 8 + DOVETAIL_KEY_ID_SIZE +
	      DOVETAIL_HASH_SIZE + 1 == SEAL_FIXED_SIZE,
	      "as dovetail-seal.h draws it");

/* An entry taken apart. Everything points into it and is only what it claims
   until the signature is checked. */
struct sealed {
	struct dovetail_entry_head head;
	const unsigned char *key_id;
	unsigned int recipient_count;
	const unsigned char *recipients, *nonce, *ciphertext, *signature;
	size_t ciphertext_size;
	/* bytes before ciphertext, bytes before signature */
	size_t ad_size, signed_size;
};

unsigned int dovetail_user_shard(const char *user, unsigned int shards)
{
	unsigned char hash[DOVETAIL_HASH_SIZE];

	crypto_generichash(hash, sizeof(hash), (const unsigned char *)user,
			   strlen(user), NULL, 0);
	return be64_to_cpu_unaligned(hash) % shards;
}

const char *dovetail_open_ret_name(enum dovetail_open_ret ret)
{
	static const char *const names[DOVETAIL_OPEN_RET_COUNT] = {
		[DOVETAIL_OPEN_OK] = "ok",
		[DOVETAIL_OPEN_MALFORMED] = "malformed",
		[DOVETAIL_OPEN_OVERSIZED] = "oversized",
		[DOVETAIL_OPEN_VERSION] = "version",
		[DOVETAIL_OPEN_UNKNOWN_KEY] = "unknown-key",
		[DOVETAIL_OPEN_WRONG_ORIGIN] = "wrong-origin",
		[DOVETAIL_OPEN_BAD_SIGNATURE] = "bad-signature",
		[DOVETAIL_OPEN_NOT_FOR_US] = "not-for-us",
		[DOVETAIL_OPEN_UNDECRYPTABLE] = "undecryptable",
		[DOVETAIL_OPEN_WRONG_STREAM] = "wrong-stream",
		[DOVETAIL_OPEN_REPEATED] = "repeated",
		[DOVETAIL_OPEN_STALE_EPOCH] = "stale-epoch",
	};

	i_assert((unsigned int)ret < DOVETAIL_OPEN_RET_COUNT);
	return names[ret];
}

static void
entry_hash(unsigned char hash_r[DOVETAIL_HASH_SIZE], const void *entry,
	   size_t signed_size)
{
	(void)crypto_generichash(hash_r, DOVETAIL_HASH_SIZE, entry,
				 signed_size, NULL, 0);
}

/* Of the signature, or what an ack has in its place. */
static size_t
signature_size(enum dovetail_entry_kind kind, unsigned int recipient_count)
{
	return kind == DOVETAIL_ENTRY_ACK ? recipient_count * ACK_MAC_SIZE :
		crypto_sign_BYTES;
}

static void
ack_mac(unsigned char mac_r[ACK_MAC_SIZE],
	const unsigned char hash[DOVETAIL_HASH_SIZE],
	const struct dovetail_public_key *other)
{
	(void)crypto_generichash(mac_r, ACK_MAC_SIZE, hash, DOVETAIL_HASH_SIZE,
				 other->shared, sizeof(other->shared));
}

/* ---- seal ---- */

static void put_be64(buffer_t *dest, uint64_t num)
{
	cpu64_to_be_unaligned(num, buffer_append_space_unsafe(dest, 8));
}

static void
put_head(const struct dovetail_keyring *keyring,
	 const struct dovetail_entry_head *head, buffer_t *dest)
{
	buffer_append(dest, SEAL_MAGIC, SEAL_MAGIC_SIZE);
	buffer_append_c(dest, DOVETAIL_FORMAT_VERSION);
	buffer_append_c(dest, head->kind);
	buffer_append_c(dest, head->shard);
	buffer_append_c(dest, head->shards);
	put_be64(dest, head->epoch);
	put_be64(dest, head->generation);
	put_be64(dest, head->seq);
	put_be64(dest, head->time_usecs);
	buffer_append(dest, dovetail_keyring_self(keyring)->id,
		      DOVETAIL_KEY_ID_SIZE);
	buffer_append(dest, head->prev, DOVETAIL_HASH_SIZE);
}

static void
put_recipient(const struct dovetail_public_key *recipient,
	      const unsigned char nonce[NONCE_SIZE],
	      const unsigned char key[MESSAGE_KEY_SIZE], buffer_t *dest)
{
	buffer_append(dest, recipient->id, DOVETAIL_KEY_ID_SIZE);
	(void)crypto_box_easy_afternm(
		buffer_append_space_unsafe(dest, WRAPPED_KEY_SIZE),
		key, MESSAGE_KEY_SIZE, nonce, recipient->shared);
}

void dovetail_seal(const struct dovetail_keyring *keyring,
		   const struct dovetail_public_key *const *recipients,
		   unsigned int count, const struct dovetail_entry_head *head,
		   const void *payload, size_t size, buffer_t *dest,
		   unsigned char hash_r[DOVETAIL_HASH_SIZE])
{
	/* one system call for both */
	unsigned char random[MESSAGE_KEY_SIZE + NONCE_SIZE];
	const unsigned char *key = random, *nonce = random + MESSAGE_KEY_SIZE;
	size_t ad_size, start = dest->used;
	unsigned char *entry, *space;
	unsigned int i;

	i_assert(count > 0 && count <= DOVETAIL_RECIPIENTS_MAX);
	i_assert(size <= DOVETAIL_ENTRY_MAX_SIZE - SEAL_FIXED_SIZE -
		 count * RECIPIENT_SIZE - NONCE_SIZE - CIPHERTEXT_SIZE_SIZE -
		 TAG_SIZE - signature_size(head->kind, count));

	randombytes_buf(random, sizeof(random));

	put_head(keyring, head, dest);
	buffer_append_c(dest, count);
	for (i = 0; i < count; i++)
		put_recipient(recipients[i], nonce, key, dest);
	buffer_append(dest, nonce, NONCE_SIZE);
	cpu32_to_be_unaligned(size + TAG_SIZE,
		buffer_append_space_unsafe(dest, CIPHERTEXT_SIZE_SIZE));
	ad_size = dest->used - start;

	space = buffer_append_space_unsafe(dest, size + TAG_SIZE);
	entry = buffer_get_modifiable_data(dest, NULL);
	entry += start;
	(void)crypto_aead_xchacha20poly1305_ietf_encrypt(
		space, NULL, payload, size, entry, ad_size, NULL, nonce, key);
	sodium_memzero(random, sizeof(random));

	entry_hash(hash_r, entry, dest->used - start);
	space = buffer_append_space_unsafe(dest,
					   signature_size(head->kind, count));
	if (head->kind != DOVETAIL_ENTRY_ACK) {
		(void)crypto_sign_detached(space, NULL, hash_r,
			DOVETAIL_HASH_SIZE, dovetail_keyring_sign_sk(keyring));
		return;
	}
	for (i = 0; i < count; i++)
		ack_mac(space + i * ACK_MAC_SIZE, hash_r, recipients[i]);
}

/* ---- open ---- */

/* Check everything that can be checked without a key. problem_r is constant. */
static enum dovetail_open_ret
entry_parse(const unsigned char *entry, size_t size, struct sealed *s,
	    const char **problem_r)
{
	struct dovetail_entry_head *head = &s->head;
	size_t pos, left, sig_size;

	i_zero(s);
	if (size > DOVETAIL_ENTRY_MAX_SIZE) {
		*problem_r = "it is larger than any entry";
		return DOVETAIL_OPEN_OVERSIZED;
	}
	if (size <= SEAL_MAGIC_SIZE ||
	    memcmp(entry, SEAL_MAGIC, SEAL_MAGIC_SIZE) != 0) {
		*problem_r = "it does not start as an entry does";
		return DOVETAIL_OPEN_MALFORMED;
	}
	if (entry[4] > DOVETAIL_FORMAT_VERSION) {
		*problem_r = "it has the format of a newer dovetail; "
			"update this node";
		return DOVETAIL_OPEN_VERSION;
	}
	*problem_r = "it is cut off";
	if (size < SEAL_FIXED_SIZE)
		return DOVETAIL_OPEN_MALFORMED;

	head->kind = entry[5];
	head->shard = entry[6];
	head->shards = entry[7];
	head->epoch = be64_to_cpu_unaligned(entry + 8);
	head->generation = be64_to_cpu_unaligned(entry + 16);
	head->seq = be64_to_cpu_unaligned(entry + 24);
	head->time_usecs = be64_to_cpu_unaligned(entry + 32);
	s->key_id = entry + 40;
	memcpy(head->prev, entry + 48, DOVETAIL_HASH_SIZE);
	s->recipient_count = entry[80];

	pos = SEAL_FIXED_SIZE + s->recipient_count * RECIPIENT_SIZE +
		NONCE_SIZE + CIPHERTEXT_SIZE_SIZE;
	sig_size = signature_size(head->kind, s->recipient_count);
	if (size < pos + TAG_SIZE + sig_size)
		return DOVETAIL_OPEN_MALFORMED;
	left = size - pos - sig_size;
	s->ciphertext_size =
		be32_to_cpu_unaligned(entry + pos - CIPHERTEXT_SIZE_SIZE);
	if (s->ciphertext_size > left)
		return DOVETAIL_OPEN_MALFORMED;
	if (s->ciphertext_size < left) {
		*problem_r = "it is longer than it says";
		return DOVETAIL_OPEN_MALFORMED;
	}
	s->recipients = entry + SEAL_FIXED_SIZE;
	s->nonce = entry + pos - CIPHERTEXT_SIZE_SIZE - NONCE_SIZE;
	s->ciphertext = entry + pos;
	s->ad_size = pos;
	s->signed_size = pos + s->ciphertext_size;
	s->signature = entry + s->signed_size;

	*problem_r = "its header contradicts itself";
	if (entry[4] == 0 ||
	    (head->kind != DOVETAIL_ENTRY_LOG &&
	     head->kind != DOVETAIL_ENTRY_ACK) ||
	    head->shard >= head->shards ||
	    (head->kind == DOVETAIL_ENTRY_LOG && head->seq == 0) ||
	    s->recipient_count == 0 ||
	    s->recipient_count > DOVETAIL_RECIPIENTS_MAX ||
	    s->ciphertext_size < TAG_SIZE)
		return DOVETAIL_OPEN_MALFORMED;
	*problem_r = NULL;
	return DOVETAIL_OPEN_OK;
}

/* What the entry claims to be, as far as that was read. */
static const char *
entry_claim(const struct dovetail_keyring *keyring, const struct sealed *s)
{
	const struct dovetail_public_key *key;

	if (s->key_id == NULL)
		return "Entry";
	key = dovetail_keyring_find(keyring, s->key_id);
	return t_strdup_printf("%s %"PRIu64"-%"PRIu64" of %s",
		s->head.kind == DOVETAIL_ENTRY_ACK ? "Ack entry" : "Entry",
		s->head.generation, s->head.seq, key != NULL ? key->node :
		t_strconcat("key ", binary_to_hex(s->key_id,
						  DOVETAIL_KEY_ID_SIZE), NULL));
}

static bool
signature_is_right(const struct sealed *s,
		   const unsigned char hash[DOVETAIL_HASH_SIZE],
		   const struct dovetail_public_key *key, unsigned int idx)
{
	unsigned char mac[ACK_MAC_SIZE];

	if (s->head.kind != DOVETAIL_ENTRY_ACK) {
		return crypto_sign_verify_detached(s->signature, hash,
			DOVETAIL_HASH_SIZE, key->sign_pk) == 0;
	}
	ack_mac(mac, hash, key);
	return sodium_memcmp(mac, s->signature + idx * ACK_MAC_SIZE,
			     sizeof(mac)) == 0;
}

/* idx: which recipient we are, for an ack */
static bool
entry_verify(const unsigned char *entry, const struct sealed *s,
	     const struct dovetail_public_key *key, unsigned int idx,
	     struct dovetail_opened *opened_r)
{
	unsigned char hash[DOVETAIL_HASH_SIZE];

	entry_hash(hash, entry, s->signed_size);
	if (!signature_is_right(s, hash, key, idx))
		return FALSE;
	opened_r->head = s->head;
	opened_r->origin = key;
	memcpy(opened_r->hash, hash, sizeof(hash));
	return TRUE;
}

static bool
origin_is_expected(const struct dovetail_keyring *keyring,
		   const struct dovetail_public_key *key, const char *origin)
{
	/* our own words, sent back to us, are no peer's */
	if (strcmp(key->node, dovetail_keyring_node(keyring)) == 0)
		return FALSE;
	return origin == NULL || strcmp(key->node, origin) == 0;
}

static enum dovetail_open_ret
check_place(const struct dovetail_open_expect *expect,
	    const struct dovetail_entry_head *head, const char **problem_r)
{
	const struct dovetail_chain *chain = expect->chain;

	if (head->kind != expect->kind) {
		*problem_r = "it is of another kind than this stream";
		return DOVETAIL_OPEN_WRONG_STREAM;
	}
	if (head->kind != DOVETAIL_ENTRY_LOG)
		return DOVETAIL_OPEN_OK;
	if (head->shard != expect->shard) {
		*problem_r = t_strdup_printf("it is of shard %u, not %u",
					     head->shard, expect->shard);
		return DOVETAIL_OPEN_WRONG_STREAM;
	}
	if (chain == NULL)
		return DOVETAIL_OPEN_OK;
	if (head->generation < chain->generation ||
	    (head->generation == chain->generation &&
	     head->seq <= chain->seq)) {
		*problem_r = t_strdup_printf(
			"it is not newer than %"PRIu64"-%"PRIu64,
			chain->generation, chain->seq);
		return DOVETAIL_OPEN_REPEATED;
	}
	if (head->epoch < chain->epoch) {
		*problem_r = t_strdup_printf(
			"its epoch %"PRIu64" is over, now is %"PRIu64,
			head->epoch, chain->epoch);
		return DOVETAIL_OPEN_STALE_EPOCH;
	}
	return DOVETAIL_OPEN_OK;
}

static bool
chain_has_gap(const struct dovetail_chain *chain,
	      const struct dovetail_entry_head *head)
{
	if (chain == NULL || (chain->generation == 0 && chain->seq == 0))
		return FALSE;
	/* A zero prev never matches, whatever the chain holds. */
	return sodium_is_zero(head->prev, DOVETAIL_HASH_SIZE) != 0 ||
		memcmp(head->prev, chain->hash, DOVETAIL_HASH_SIZE) != 0;
}

/* Which recipient we are. */
static bool
recipient_find(const struct sealed *s, const struct dovetail_public_key *self,
	       unsigned int *idx_r)
{
	const unsigned char *recipient = s->recipients;

	for (*idx_r = 0; *idx_r < s->recipient_count; *idx_r += 1) {
		if (memcmp(recipient, self->id, DOVETAIL_KEY_ID_SIZE) == 0)
			return TRUE;
		recipient += RECIPIENT_SIZE;
	}
	return FALSE;
}

static enum dovetail_open_ret
entry_decrypt(const unsigned char *entry, const struct sealed *s,
	      const struct dovetail_public_key *origin, unsigned int idx,
	      buffer_t *payload, const char **problem_r)
{
	const unsigned char *wrapped = s->recipients + idx * RECIPIENT_SIZE +
		DOVETAIL_KEY_ID_SIZE;
	unsigned char key[MESSAGE_KEY_SIZE];
	int ret;

	ret = crypto_box_open_easy_afternm(key, wrapped, WRAPPED_KEY_SIZE,
					   s->nonce, origin->shared);
	if (ret == 0) {
		ret = crypto_aead_xchacha20poly1305_ietf_decrypt(
			buffer_append_space_unsafe(payload,
				s->ciphertext_size - TAG_SIZE),
			NULL, NULL, s->ciphertext, s->ciphertext_size,
			entry, s->ad_size, s->nonce, key);
		sodium_memzero(key, sizeof(key));
	}
	if (ret < 0) {
		buffer_set_used_size(payload, 0);
		*problem_r = "it is signed, but cannot be decrypted";
		return DOVETAIL_OPEN_UNDECRYPTABLE;
	}
	return DOVETAIL_OPEN_OK;
}

static enum dovetail_open_ret
entry_open(const struct dovetail_keyring *keyring,
	   const struct dovetail_open_expect *expect,
	   const unsigned char *entry, const struct sealed *s,
	   buffer_t *payload, struct dovetail_opened *opened_r,
	   const char **problem_r)
{
	const struct dovetail_public_key *key;
	enum dovetail_open_ret ret;
	unsigned int idx;
	bool for_us;

	key = dovetail_keyring_find(keyring, s->key_id);
	if (key == NULL) {
		*problem_r = "no peer has this key";
		return DOVETAIL_OPEN_UNKNOWN_KEY;
	}
	if (!origin_is_expected(keyring, key, expect->origin)) {
		*problem_r = t_strdup_printf("it stands where %s writes",
			expect->origin != NULL ? expect->origin : "a peer");
		return DOVETAIL_OPEN_WRONG_ORIGIN;
	}
	for_us = recipient_find(s, dovetail_keyring_self(keyring), &idx);
	/* nobody but a recipient can check an ack */
	if ((for_us || s->head.kind != DOVETAIL_ENTRY_ACK) &&
	    !entry_verify(entry, s, key, idx, opened_r)) {
		*problem_r = "its signature is wrong";
		return DOVETAIL_OPEN_BAD_SIGNATURE;
	}
	ret = check_place(expect, &s->head, problem_r);
	if (ret != DOVETAIL_OPEN_OK)
		return ret;
	opened_r->gap = s->head.kind == DOVETAIL_ENTRY_LOG &&
		chain_has_gap(expect->chain, &s->head);
	if (!for_us) {
		*problem_r = "our key is not among its recipients; "
			"does the origin have our current public key?";
		return DOVETAIL_OPEN_NOT_FOR_US;
	}
	return entry_decrypt(entry, s, key, idx, payload, problem_r);
}

enum dovetail_open_ret
dovetail_open(const struct dovetail_keyring *keyring,
	      const struct dovetail_open_expect *expect, const void *entry,
	      size_t size, buffer_t *payload, struct dovetail_opened *opened_r,
	      const char **error_r)
{
	enum dovetail_open_ret ret;
	const char *problem;
	struct sealed s;

	i_zero(opened_r);
	buffer_set_used_size(payload, 0);
	ret = entry_parse(entry, size, &s, &problem);
	if (ret == DOVETAIL_OPEN_OK) {
		ret = entry_open(keyring, expect, entry, &s, payload,
				 opened_r, &problem);
	}
	if (ret != DOVETAIL_OPEN_OK) {
		*error_r = t_strdup_printf("%s is refused (%s): %s",
			entry_claim(keyring, &s), dovetail_open_ret_name(ret),
			problem);
	}
	return ret;
}

int dovetail_open_own(const struct dovetail_keyring *keyring,
		      const void *entry, size_t size,
		      struct dovetail_opened *opened_r, const char **error_r)
{
	const struct dovetail_public_key *key = NULL;
	const char *problem;
	struct sealed s;

	i_zero(opened_r);
	if (entry_parse(entry, size, &s, &problem) == DOVETAIL_OPEN_OK) {
		key = dovetail_keyring_find(keyring, s.key_id);
		if (key == NULL || s.head.kind != DOVETAIL_ENTRY_LOG ||
		    strcmp(key->node, dovetail_keyring_node(keyring)) != 0)
			problem = "it is not ours";
		else if (!entry_verify(entry, &s, key, 0, opened_r))
			problem = "its signature is wrong";
	}
	if (problem != NULL) {
		*error_r = t_strdup_printf("%s is refused: %s",
					   entry_claim(keyring, &s), problem);
		return -1;
	}
	return 0;
}

/* ---- acks ---- */

void dovetail_ack_encode(buffer_t *buf, const struct dovetail_ack *ack)
{
	unsigned int i;

	i_assert(ack->failed_count <= DOVETAIL_ACK_FAILED_MAX);

	dovetail_wire_put_num(buf, ack->generation);
	dovetail_wire_put_num(buf, ack->seq);
	dovetail_wire_put_num(buf, ack->applied_time_usecs);
	dovetail_wire_put_num(buf, ack->entries);
	dovetail_wire_put_num(buf, ack->rejected);
	dovetail_wire_put_num(buf, ack->set_aside);
	dovetail_wire_put_num(buf, ack->failed_count);
	for (i = 0; i < ack->failed_count; i++) {
		dovetail_wire_put_num(buf, ack->failed[i].generation);
		dovetail_wire_put_num(buf, ack->failed[i].seq);
		dovetail_wire_put_num(buf, ack->failed[i].ordinal);
	}
	dovetail_wire_put_str(buf, ack->last_error);
	if (ack->troubles_size > 0) {
		dovetail_wire_put_bytes(buf, ack->troubles,
					ack->troubles_size);
	}
}

int dovetail_ack_decode(pool_t pool, const void *data, size_t size,
			struct dovetail_ack *ack_r, const char **error_r)
{
	struct dovetail_wire_reader r;
	struct dovetail_ack_failed *failed;
	unsigned int i;

	i_zero(ack_r);
	dovetail_wire_reader_init(&r, data, size);
	ack_r->generation = dovetail_wire_get_num(&r);
	ack_r->seq = dovetail_wire_get_num(&r);
	ack_r->applied_time_usecs = dovetail_wire_get_num(&r);
	ack_r->entries = dovetail_wire_get_num(&r);
	ack_r->rejected = dovetail_wire_get_num(&r);
	ack_r->set_aside = dovetail_wire_get_num32(&r);
	ack_r->failed_count = dovetail_wire_get_num32(&r);
	if (ack_r->failed_count > DOVETAIL_ACK_FAILED_MAX) {
		*error_r = t_strdup_printf("ack: %u failed are too many",
					   ack_r->failed_count);
		return -1;
	}
	ack_r->failed = failed = p_new(pool, struct dovetail_ack_failed,
				       I_MAX(ack_r->failed_count, 1));
	for (i = 0; i < ack_r->failed_count; i++) {
		failed[i].generation = dovetail_wire_get_num(&r);
		failed[i].seq = dovetail_wire_get_num(&r);
		failed[i].ordinal = dovetail_wire_get_num32(&r);
	}
	ack_r->last_error = dovetail_wire_get_str(&r, pool);
	if (!r.failed && r.pos < r.end && *r.pos != 0) {
		ack_r->troubles = dovetail_wire_get_bytes(&r,
						&ack_r->troubles_size);
	}
	if (!dovetail_wire_reader_done(&r)) {
		*error_r = r.failed ? "ack: is cut off or malformed" :
			"ack: is followed by more bytes";
		return -1;
	}
	return 0;
}
