#ifndef DOVETAIL_MAILBOX_DIGEST_H
#define DOVETAIL_MAILBOX_DIGEST_H

/* The digest of an open mailbox, on the primary and on a replica alike. It stands in
   the header of an index extension, with the place in the mailbox's own log it is
   of, and follows that log from there: work is proportional to what changed. Each
   message's hash stands in the extension's record, so no message is read again.

   Where it cannot follow (the index was rebuilt; another process changed what we
   never saw) it is computed afresh from the index. What it cannot do without is
   each message's hash: messages that were there before dovetail lack them until
   somebody reads them (dovetail_mailbox_digest_fill()). Until then the digest is
   not known, and that is not an error. */

#include "dovetail-change.h"

struct mailbox;
struct mail;
struct mail_index_view;
struct mail_index_transaction;
struct dovetail_mailbox_digest;

/* The extension. */
#define DOVETAIL_DIGEST_EXT_NAME "dovetail-digest"

/* Of an open mailbox, until it is closed. */
struct dovetail_mailbox_digest *
dovetail_mailbox_digest_open(struct mailbox *box);
/* NULL is fine. What was not written is forgotten. */
void dovetail_mailbox_digest_close(struct dovetail_mailbox_digest **md);

/* A message's hash, from who has just read it. Written with the next _write(). */
void dovetail_mailbox_digest_set(struct dovetail_mailbox_digest *md,
				 uint32_t uid,
				 const uint8_t hash[DOVETAIL_MESSAGE_HASH_SIZE]);
/* The same for a message that no digest has yet: what it was when it came. */
void dovetail_mailbox_digest_set_new(struct dovetail_mailbox_digest *md,
				     uint32_t uid, uint8_t flags,
				     const char *const *keywords,
				     const uint8_t hash[DOVETAIL_MESSAGE_HASH_SIZE]);
/* FALSE: it is not known. */
bool dovetail_mailbox_digest_get(struct dovetail_mailbox_digest *md,
				 uint32_t uid,
				 uint8_t hash_r[DOVETAIL_MESSAGE_HASH_SIZE]);
/* Make the hash part of the transaction that adds the message as seq. */
void dovetail_mailbox_digest_update(struct mailbox *box,
				    struct mail_index_transaction *trans,
				    uint32_t seq, uint8_t flags,
				    const char *const *keywords,
				    const uint8_t hash[DOVETAIL_MESSAGE_HASH_SIZE]);

/* Go on to where view stands. TRUE: digest_r is the mailbox's as view shows it. FALSE:
   it is not known (also when the index has been read on since the view was opened
   and messages have changed: what a view shows of flags is as new as the index). The view belongs to md
   afterwards. */
bool dovetail_mailbox_digest_follow(struct dovetail_mailbox_digest *md,
				    struct mail_index_view *view,
				    struct dovetail_digest *digest_r);
/* The same, from the index as it is now. */
bool dovetail_mailbox_digest_now(struct dovetail_mailbox_digest *md,
				 struct dovetail_digest *digest_r);
/* The same, computed afresh instead of followed. view: NULL for the index as it is
   now. key: the one to use from now on, or NULL to keep it. */
bool dovetail_mailbox_digest_recompute(struct dovetail_mailbox_digest *md,
				       struct mail_index_view *view,
				       const uint8_t *key,
				       struct dovetail_digest *digest_r);
/* Write soon: other processes lack something that costs them a lot, as long as it is
   not written. (Hashes; what was expunged, which nobody can look at any more.) */
bool dovetail_mailbox_digest_is_urgent(const struct dovetail_mailbox_digest *md);
/* There is nothing to write. */
bool dovetail_mailbox_digest_is_clean(const struct dovetail_mailbox_digest *md);

/* Make what is not in the index yet part of a transaction on a view of the index as
   it is now. Between dovetail_log_lock() and _unlock(): others write theirs. */
void dovetail_mailbox_digest_write(struct dovetail_mailbox_digest *md,
				   struct mail_index_transaction *trans);
/* That transaction was committed. */
void dovetail_mailbox_digest_written(struct dovetail_mailbox_digest *md);
/* The same in a transaction of its own. Returns 0, or -1 and error_r (data
   stack). */
int dovetail_mailbox_digest_save(struct dovetail_mailbox_digest *md,
				 const char **error_r);

/* The view md stands at, NULL: none. For looking at messages one by one. */
struct mail_index_view *
dovetail_mailbox_digest_view(struct dovetail_mailbox_digest *md);
/* What the message with this sequence of the view adds to a digest with this key.
   FALSE: its hash is not known. */
bool dovetail_mailbox_digest_element(struct dovetail_mailbox_digest *md,
				     struct mail_index_view *view, uint32_t seq,
				     const uint8_t key[DOVETAIL_DIGEST_KEY_SIZE],
				     struct dovetail_sum *element_r);
/* The digest of the messages with range's uid1..uid2, with this key. FALSE: the hash
   of one is not known. */
bool dovetail_mailbox_digest_range(struct dovetail_mailbox_digest *md,
				   struct mail_index_view *view,
				   const uint8_t key[DOVETAIL_DIGEST_KEY_SIZE],
				   struct dovetail_range *range);

/* Read messages that lack a hash, at most max of them. Returns how many still lack
   one; those that cannot be read are left out. */
unsigned int dovetail_mailbox_digest_fill(struct dovetail_mailbox_digest *md,
					  unsigned int max);

/* Read up to max messages from *uid on, and add to changed those that are not (any
   more) what their hash says, or cannot be read. correct: their hash becomes what
   they are. *uid is where to go on, 0 at the end. Returns 0, or -1: some could not
   be read. */
int dovetail_mailbox_digest_scrub(struct dovetail_mailbox_digest *md,
				  uint32_t *uid, unsigned int max, bool correct,
				  ARRAY_TYPE(seq_range) *changed);

/* GUID as a storage with 128-bit GUIDs has it. */
void dovetail_message_guid(const char *guid, guid_128_t guid_r);
/* The hash of a message as the store has it now, GUID, date and body.
   Returns 0, or -1: it cannot be read (mail->expunged: it is gone). */
int dovetail_message_hash(struct mail *mail,
			  uint8_t hash_r[DOVETAIL_MESSAGE_HASH_SIZE]);

#endif
