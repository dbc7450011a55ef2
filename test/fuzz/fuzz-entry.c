/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* dovetail-seal: entries and acks, as they stand in Redis.
   Input: u8 what is done, then by it:
     0 raw     an entry as somebody else made it, opened in all places
     1 altered u64 epoch, generation, seq; block payload; u8 shard, ack; then
               pieces to alter the entry that is sealed of it: u8 what, u16
               where, u8 with what
     2 inside  u8 ack, then the payload: it is sealed and opened, so that what
               is behind the signature sees rubbish, too
   Must hold: of raw entries only those of the vectors are accepted, by whom
   they are for; an altered entry is never accepted, an unaltered one always; what
   was sealed comes out. Changes and acks inside: fuzz_change(), and an accepted
   ack encodes to the same bytes. */

#include "fuzz-common.h"
#include "hash.h"
#include "hex-binary.h"
#include "istream.h"
#include "dovetail-compat.h"
#include "dovetail-seal.h"
#include "dovetail-wire.h"

#define VECTOR_LINE_MAX_SIZE (1024 * 1024)

/* a seals; b and c read */
static struct dovetail_keyring *ring_a, *ring_b, *ring_c;
static const struct dovetail_public_key *for_b[1], *for_both[2];
/* the entries of the vectors: entry_name() */
static HASH_TABLE(char *, char *) genuine;

static const struct dovetail_public_key *
peer_key(const struct dovetail_keyring *keyring, const char *node)
{
	const struct dovetail_public_key *keys;
	unsigned int i, count;

	keys = dovetail_keyring_peers(keyring, &count);
	for (i = 0; i < count; i++) {
		if (strcmp(keys[i].node, node) == 0)
			return &keys[i];
	}
	i_unreached();
}

/* An ack has for each of its readers what shows that it is genuine, and who reads
   it does not see what the others have. Two acks that differ in no more are the
   same here, as are two log entries that do not differ. Returns hex. */
static const char *entry_name(const unsigned char *entry, size_t size)
{
	size_t left = 0;

	if (size > 80 && entry[5] == DOVETAIL_ENTRY_ACK)
		left = I_MIN(entry[80] * 32U, size);
	return binary_to_hex(entry, size - left);
}

/* WHAT [WORD=VALUE ...] BYTES; BYTES are HEX or HEX*COUNT, in pieces. */
static void read_vector(const char *line)
{
	const char *const *words = t_strsplit_spaces(line, " ");
	buffer_t *entry = t_buffer_create(1024), *piece;
	unsigned int count;
	const char *p;
	char *key;

	for (words++; *words != NULL; words++) {
		if (strchr(*words, '=') != NULL)
			continue;
		p = strchr(*words, '*');
		count = 1;
		fuzz_assert(p == NULL || str_to_uint(p + 1, &count) == 0);
		piece = t_buffer_create(1024);
		fuzz_assert(hex_to_binary(t_strcut(*words, '*'), piece) == 0);
		for (; count > 0; count--)
			buffer_append_buf(entry, piece, 0, SIZE_MAX);
	}
	key = i_strdup(entry_name(entry->data, entry->used));
	if (hash_table_lookup(genuine, key) == NULL)
		hash_table_insert(genuine, key, key);
	else
		i_free(key);
}

/* Entries that are refused in one place may be right in another. */
static void read_vectors(const char *path)
{
	struct istream *input;
	const char *line;

	input = i_stream_create_file(path, VECTOR_LINE_MAX_SIZE);
	while ((line = i_stream_read_next_line(input)) != NULL) T_BEGIN {
		if (str_begins_with(line, "open ") ||
		    str_begins_with(line, "own "))
			read_vector(line);
	} T_END;
	fuzz_assert(input->stream_errno == 0);
	i_stream_unref(&input);
}

void fuzz_init(void)
{
	static const char *const peers_a[] = { "b", "c", NULL };
	static const char *const peers_b[] = { "a", "c", NULL };
	static const char *const peers_c[] = { "a", "b", NULL };

	fuzz_write_keys();
	ring_a = fuzz_keyring("a", peers_a);
	ring_b = fuzz_keyring("b", peers_b);
	ring_c = fuzz_keyring("c", peers_c);
	for_b[0] = for_both[0] = peer_key(ring_a, "b");
	for_both[1] = peer_key(ring_a, "c");
	hash_table_create(&genuine, default_pool, 0, str_hash, strcmp);
	read_vectors(FUZZ_VECTORS"/entries.txt");
	read_vectors(FUZZ_VECTORS"/entries-refused.txt");
	fuzz_assert(hash_table_count(genuine) > 20);
}

static enum dovetail_open_ret
open_entry(struct dovetail_keyring *keyring,
	   const struct dovetail_open_expect *expect, const void *data,
	   size_t size, buffer_t *payload, struct dovetail_opened *opened_r)
{
	enum dovetail_open_ret ret;
	const char *error = NULL;

	ret = dovetail_open(keyring, expect, data, size, payload, opened_r,
			    &error);
	if (ret == DOVETAIL_OPEN_OK) {
		fuzz_assert(opened_r->origin != NULL);
		fuzz_assert(opened_r->head.kind == expect->kind);
		return ret;
	}
	fuzz_assert(error != NULL && *error != '\0' && payload->used == 0);
	/* nothing is told of what nobody signed */
	if (ret <= DOVETAIL_OPEN_BAD_SIGNATURE)
		fuzz_assert(opened_r->origin == NULL);
	return ret;
}

/* ---- raw ---- */

static bool is_genuine(const void *data, size_t size)
{
	return hash_table_lookup(genuine, entry_name(data, size)) != NULL;
}

static void raw(const uint8_t *data, size_t size)
{
	struct dovetail_keyring *rings[] = { ring_b, ring_c, ring_a };
	struct dovetail_open_expect expect;
	struct dovetail_opened opened;
	struct dovetail_chain chain;
	buffer_t *payload = buffer_create_dynamic(default_pool, size);
	const char *error = NULL;
	unsigned int i, kind;

	for (i = 0; i < N_ELEMENTS(rings); i++) {
		for (kind = 1; kind <= 2; kind++) {
			i_zero(&expect);
			i_zero(&chain);
			expect.kind = kind;
			/* so that the right shard is not a matter of luck */
			expect.shard = size > 6 ? data[6] : 0;
			expect.chain = &chain;
			if (open_entry(rings[i], &expect, data, size, payload,
				       &opened) == DOVETAIL_OPEN_OK)
				fuzz_assert(is_genuine(data, size));
		}
		if (dovetail_open_own(rings[i], data, size, &opened,
				      &error) == 0)
			fuzz_assert(is_genuine(data, size));
		else
			fuzz_assert(error != NULL && *error != '\0');
	}
	buffer_free(&payload);
}

/* ---- altered ---- */

static void
seal_entry(const struct dovetail_entry_head *head, bool both,
	   const void *data, size_t size, buffer_t *entry)
{
	unsigned char hash[DOVETAIL_HASH_SIZE];

	dovetail_seal(ring_a, both ? for_both : for_b, both ? 2 : 1, head,
		      data, size, entry, hash);
}

static void alter(struct fuzz_input *in, buffer_t *entry)
{
	uint8_t what = fuzz_get_u8(in);
	size_t size, where = fuzz_get_u16(in);
	uint8_t with = fuzz_get_u8(in);
	const uint8_t *bytes;
	unsigned char *data;

	data = buffer_get_modifiable_data(entry, &size);
	if (size == 0)
		return;
	where %= size;
	switch (what % 6) {
	case 0:
		data[where] ^= with;
		break;
	case 1:
		data[where] = with;
		break;
	case 2:
		buffer_set_used_size(entry, where);
		break;
	case 3:
		buffer_delete(entry, where, with);
		break;
	case 4:
		bytes = fuzz_get_bytes(in, with, &size);
		buffer_insert(entry, where, bytes, size);
		break;
	case 5:
		bytes = fuzz_get_bytes(in, with, &size);
		buffer_write(entry, where, bytes,
			     I_MIN(size, entry->used - where));
		break;
	}
}

static void altered(struct fuzz_input *in)
{
	struct dovetail_entry_head head;
	struct dovetail_open_expect expect;
	struct dovetail_opened opened;
	buffer_t *entry, *original, *payload;
	enum dovetail_open_ret ret;
	const uint8_t *data;
	size_t size;
	uint8_t u8;
	bool same;

	i_zero(&head);
	head.epoch = fuzz_get_u64(in);
	head.generation = fuzz_get_u64(in);
	head.seq = fuzz_get_u64(in);
	if (head.seq == 0)
		head.seq = 1;
	head.time_usecs = head.epoch ^ head.seq;
	data = fuzz_get_block(in, &size);
	u8 = fuzz_get_u8(in);
	head.shard = u8 & 63;
	head.shards = 64;
	head.kind = (fuzz_get_u8(in) & 1) != 0 ? DOVETAIL_ENTRY_ACK :
		DOVETAIL_ENTRY_LOG;

	entry = buffer_create_dynamic(default_pool, size + 512);
	original = buffer_create_dynamic(default_pool, size + 512);
	payload = buffer_create_dynamic(default_pool, size + 16);
	seal_entry(&head, (u8 & 64) != 0, data, size, original);
	buffer_append_buf(entry, original, 0, SIZE_MAX);
	while (in->size > 0)
		alter(in, entry);

	i_zero(&expect);
	expect.kind = head.kind;
	expect.origin = "a";
	expect.shard = head.shard;
	/* in a block of exactly its size */
	void *exact = i_malloc(entry->used + 1);
	memcpy(exact, entry->data, entry->used);
	ret = open_entry(ring_b, &expect, exact, entry->used, payload,
			 &opened);
	i_free(exact);
	same = entry->used == original->used &&
		memcmp(entry->data, original->data, entry->used) == 0;
	/* b does not see what was done to what c would see */
	if (head.kind == DOVETAIL_ENTRY_ACK && (u8 & 64) != 0 &&
	    entry->used == original->used &&
	    memcmp(entry->data, original->data, entry->used - 32) == 0)
		same = TRUE;
	fuzz_assert((ret == DOVETAIL_OPEN_OK) == same);
	if (same) {
		fuzz_assert(payload->used == size &&
			    memcmp(payload->data, data, size) == 0);
		fuzz_assert(memcmp(&opened.head, &head, sizeof(head)) == 0);
	}
	buffer_free(&entry);
	buffer_free(&original);
	buffer_free(&payload);
}

/* ---- inside ---- */

/* as a replica reads it */
static void inside_log(const buffer_t *payload)
{
	struct dovetail_wire_reader r;
	const void *change;
	size_t size;

	dovetail_wire_reader_init(&r, payload->data, payload->used);
	while (r.pos < r.end && !r.failed) {
		change = dovetail_wire_get_bytes(&r, &size);
		if (change != NULL)
			(void)fuzz_change(change, size);
	}
}

static void inside_ack(const buffer_t *payload)
{
	struct dovetail_ack ack;
	const char *error = NULL;
	buffer_t *buf;
	pool_t pool = fuzz_pool();

	if (dovetail_ack_decode(pool, payload->data, payload->used, &ack,
				&error) < 0)
		fuzz_assert(error != NULL && *error != '\0');
	else {
		buf = buffer_create_dynamic(pool, 64);
		dovetail_ack_encode(buf, &ack);
		fuzz_assert(buf->used == payload->used &&
			    memcmp(buf->data, payload->data, buf->used) == 0);
	}
	pool_unref(&pool);
}

static void inside(struct fuzz_input *in)
{
	struct dovetail_entry_head head;
	struct dovetail_open_expect expect;
	struct dovetail_opened opened;
	buffer_t *entry, *payload;
	bool ack = (fuzz_get_u8(in) & 1) != 0;

	i_zero(&head);
	head.kind = ack ? DOVETAIL_ENTRY_ACK : DOVETAIL_ENTRY_LOG;
	head.shards = 1;
	head.seq = 1;
	entry = buffer_create_dynamic(default_pool, in->size + 512);
	payload = buffer_create_dynamic(default_pool, in->size + 16);
	seal_entry(&head, FALSE, in->data, in->size, entry);
	i_zero(&expect);
	expect.kind = head.kind;
	fuzz_assert(open_entry(ring_b, &expect, entry->data, entry->used,
			       payload, &opened) == DOVETAIL_OPEN_OK);
	fuzz_assert(payload->used == in->size && (in->size == 0 ||
		    memcmp(payload->data, in->data, in->size) == 0));
	if (ack)
		inside_ack(payload);
	else
		inside_log(payload);
	buffer_free(&entry);
	buffer_free(&payload);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct fuzz_input in = { data, size };

	if (size == 0)
		return 0;
	T_BEGIN {
		switch (fuzz_get_u8(&in) % 3) {
		case 0:
			raw(in.data, in.size);
			break;
		case 1:
			altered(&in);
			break;
		case 2:
			inside(&in);
			break;
		}
	} T_END;
	return 0;
}
