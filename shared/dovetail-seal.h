#ifndef DOVETAIL_SEAL_H
#define DOVETAIL_SEAL_H

/* seal(): number, chain, encrypt, sign.  open(): verify first, then reveal.

   An entry is what one XADD appends. All numbers are big-endian.

     offset size
          0    4  "DVTL"
          4    1  format version, 1
          5    1  kind: 1 log, 2 ack
          6    1  shard, 0..
          7    1  shards of the origin, 1..
          8    8  epoch
         16    8  generation
         24    8  seq, 1..
         32    8  time of sealing, microseconds since 1970
         40    8  key id of the origin
         48   32  hash of the entry before (see below); zero when the origin
                  does not know it
         80    1  number of recipients, 1..
         81   56  per recipient: key id (8), message key wrapped for it (48) =
                  crypto_box_easy_afternm(message key, nonce, shared secret of
                  origin and recipient)
          .   24  nonce, random
          .    4  size of the ciphertext
          .    .  ciphertext: XChaCha20-Poly1305-IETF of the payload under the
                  message key, with the nonce; additional data: all bytes
                  before the ciphertext
          .    .  log: Ed25519 signature of the hash (64);
                  ack: per recipient (32): BLAKE2b-256 of the hash, keyed with
                  the shared secret of origin and recipient

   The hash of an entry is BLAKE2b-256 of all its bytes before the signature.
   An ack has one reader, the node whose keys the recipients are, and nobody
   else has to be convinced of it: what takes its signature's place costs a
   hundredth of one. Only the reader could have made it, too, and it refuses
   what names its own key as the origin.
   The same nonce serves the payload and every wrap: their keys all differ.

   The payload of a log entry is one group of changes: per change, num size and
   that many bytes (dovetail-wire.h). The payload of an ack is a struct
   dovetail_ack.

   generation and seq are the Redis stream ID ("GENERATION-SEQ"): they only ever
   grow, so Redis itself refuses a repeat. A generation starts when the origin
   is not certain what the stream holds; seq then starts at 1, and the chain
   goes on over the border.
   In the stream an entry is the only field of its ID. The field's name is not
   signed: it is a hint, and a wrong one costs or saves a few milliseconds.
   History: version 1 is the first. */

#include "dovetail-keyring.h"

#define DOVETAIL_ENTRY_FIELD "e"
/* somebody waits for the entry to be applied: acknowledge it at once */
#define DOVETAIL_ENTRY_FIELD_WAITED "a"

#define DOVETAIL_FORMAT_VERSION 1
#define DOVETAIL_HASH_SIZE 32
#define DOVETAIL_RECIPIENTS_MAX 64
/* A group is closed when it has grown past this ... */
#define DOVETAIL_GROUP_SPLIT_SIZE (256 * 1024)
/* ... and an entry larger than this is refused unread. */
#define DOVETAIL_ENTRY_MAX_SIZE (5 * 1024 * 1024)

enum dovetail_entry_kind {
	DOVETAIL_ENTRY_LOG = 1,
	DOVETAIL_ENTRY_ACK = 2,
};

struct dovetail_entry_head {
	enum dovetail_entry_kind kind;
	uint8_t shard, shards;
	uint64_t epoch;
	uint64_t generation, seq;
	uint64_t time_usecs;
	unsigned char prev[DOVETAIL_HASH_SIZE];
};

/* Where a chain stands: the last entry sealed (origin) or accepted (replica). */
struct dovetail_chain {
	uint64_t epoch;
	/* 0-0: nothing yet */
	uint64_t generation, seq;
	unsigned char hash[DOVETAIL_HASH_SIZE];
};

enum dovetail_open_ret {
	DOVETAIL_OPEN_OK = 0,
	/* not an entry: wrong magic, size or structure */
	DOVETAIL_OPEN_MALFORMED,
	/* more than DOVETAIL_ENTRY_MAX_SIZE */
	DOVETAIL_OPEN_OVERSIZED,
	/* made by a newer dovetail */
	DOVETAIL_OPEN_VERSION,
	/* the origin's key is not among our peers' */
	DOVETAIL_OPEN_UNKNOWN_KEY,
	/* a known peer's, but not of the node whose stream this is */
	DOVETAIL_OPEN_WRONG_ORIGIN,
	DOVETAIL_OPEN_BAD_SIGNATURE,
	/* properly signed, but for other nodes */
	DOVETAIL_OPEN_NOT_FOR_US,
	/* signature right, ciphertext wrong: the origin's fault */
	DOVETAIL_OPEN_UNDECRYPTABLE,
	/* from another kind of stream or another shard */
	DOVETAIL_OPEN_WRONG_STREAM,
	/* not newer than what the chain has: an old entry again */
	DOVETAIL_OPEN_REPEATED,
	/* of an epoch that is over */
	DOVETAIL_OPEN_STALE_EPOCH,

	DOVETAIL_OPEN_RET_COUNT
};

/* Which log the changes of a user go to: the first 8 bytes, big-endian, of
   BLAKE2b-256 of the name, modulo the number of shards. */
unsigned int dovetail_user_shard(const char *user, unsigned int shards);

/* A short lower-case word for status and log fields ("bad-signature"). */
const char *dovetail_open_ret_name(enum dovetail_open_ret ret);

/* Seal payload for recipients, as the origin whose key the keyring holds, and
   append the entry to dest. head says what the header says. hash_r is the
   entry's hash, the prev of the next one.
   recipients: count (1..DOVETAIL_RECIPIENTS_MAX) keys of the keyring. */
void dovetail_seal(const struct dovetail_keyring *keyring,
		   const struct dovetail_public_key *const *recipients,
		   unsigned int count, const struct dovetail_entry_head *head,
		   const void *payload, size_t size, buffer_t *dest,
		   unsigned char hash_r[DOVETAIL_HASH_SIZE]);

/* What the reader of a stream expects of each entry. */
struct dovetail_open_expect {
	enum dovetail_entry_kind kind;
	/* node whose entries the stream holds; NULL: any peer's */
	const char *origin;
	/* LOG only: the shard this stream is of */
	uint8_t shard;
	/* LOG only, not NULL: refuse what is not newer, or of an older epoch */
	const struct dovetail_chain *chain;
};

struct dovetail_opened {
	struct dovetail_entry_head head;
	/* the key that signed it; belongs to the keyring */
	const struct dovetail_public_key *origin;
	unsigned char hash[DOVETAIL_HASH_SIZE];
	/* head.prev is not expect->chain's hash: entries are missing between.
	   Also TRUE when the chain is not 0-0 and prev is zero. Always FALSE
	   with a 0-0 chain. */
	bool gap;
};

/* Check an entry and decrypt it. The signature is checked before anything of
   the content is used; payload (emptied first) is filled only for _OK. On _OK the caller
   updates its chain from opened_r. opened_r is all zero until the signature was
   found to be right; after that it is filled for all returns.
   For all other returns error_r (data stack) says what is wrong, with the
   origin and number the entry claims where they can be read. */
enum dovetail_open_ret
dovetail_open(const struct dovetail_keyring *keyring,
	      const struct dovetail_open_expect *expect, const void *entry,
	      size_t size, buffer_t *payload, struct dovetail_opened *opened_r,
	      const char **error_r);

/* The same for a log entry of our own, which we cannot decrypt: the signature is
   ours. Used by the queue to find where its stream ends.
   Returns 0, or -1 and error_r. */
int dovetail_open_own(const struct dovetail_keyring *keyring,
		      const void *entry, size_t size,
		      struct dovetail_opened *opened_r, const char **error_r);

/* A replica's report, sealed for the origin of the log alone. Encoded with the
   primitives of dovetail-wire.h in this order:
     num generation  num seq  num applied_time_usecs  num entries
     num rejected  num set_aside  num failed count, each: num generation
     num seq  num ordinal;  str last_error;  perhaps: bytes troubles (not 0) */
struct dovetail_ack_failed {
	uint64_t generation, seq;
	/* of the change in its entry, 0.. */
	uint32_t ordinal;
};
/* Instead of an ordinal: this entry and those before it may not have come here, as far
   as they were not confirmed before. */
#define DOVETAIL_ACK_UP_TO UINT32_MAX
#define DOVETAIL_ACK_FAILED_MAX 256
struct dovetail_ack {
	/* every entry up to this one is applied, set aside or refused */
	uint64_t generation, seq;
	/* when that entry had been sealed; 0: nothing yet */
	uint64_t applied_time_usecs;
	/* since the replica's process started */
	uint64_t entries, rejected;
	/* users whose changes could not be applied and who wait for repair */
	uint32_t set_aside;
	/* changes that could not be applied, of the last minute or more: an ack
	   may get lost; at most DOVETAIL_ACK_FAILED_MAX */
	unsigned int failed_count;
	const struct dovetail_ack_failed *failed;
	/* "" when there was none */
	const char *last_error;
	/* Users in trouble, as dovetail-health-report.h has them: they replace those
	   that this shard's ack had before. Size 0: nothing is said of them.
	   _decode: points into data. */
	const void *troubles;
	size_t troubles_size;
};
void dovetail_ack_encode(buffer_t *buf, const struct dovetail_ack *ack);
int dovetail_ack_decode(pool_t pool, const void *data, size_t size,
			struct dovetail_ack *ack_r, const char **error_r);

#endif
