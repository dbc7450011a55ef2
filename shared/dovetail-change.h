#ifndef DOVETAIL_CHANGE_H
#define DOVETAIL_CHANGE_H

/* The vocabulary: every kind of change that travels from a primary to its
   replicas, as structs. A change is what happened to one mailbox, or to one
   user's list of mailboxes. dovetail-wire.h turns changes into bytes,
   dovetail-seal.h turns those into an entry of a Redis stream.

   Mailbox names are "paths": the components of the virtual name, namespace
   prefix included, joined with DOVETAIL_NAME_SEP. Dovecot allows no control
   character in a name, so a path is unambiguous, and both nodes may use
   other hierarchy separators. */

#include "guid.h"
#include "seq-range-array.h"
#include "dovetail-digest.h"

#define DOVETAIL_NAME_SEP '\t'

/* Bodies up to this many bytes travel inside the change, larger ones ahead of
   it in DOVETAIL_CHANGE_SPOOL chunks. */
#define DOVETAIL_BODY_INLINE_MAX_SIZE (64 * 1024)
#define DOVETAIL_SPOOL_CHUNK_SIZE (128 * 1024)
/* A sender starts a new change when one has grown past this. One log record is
   never split, so a single record can make a larger change, ... */
#define DOVETAIL_CHANGE_SPLIT_SIZE (256 * 1024)
/* ... but never one larger than this: the sender then sends a snapshot, and a
   receiver refuses it. */
#define DOVETAIL_CHANGE_MAX_SIZE (4 * 1024 * 1024)

/* Attributes (METADATA) with a longer key or value do not travel, and are to both
   sides as if they were not there; nor does any of a mailbox when all of them
   together are more than the last, in bytes of keys and values. */
#define DOVETAIL_ATTRIBUTE_KEY_MAX_SIZE 1000
#define DOVETAIL_ATTRIBUTE_VALUE_MAX_SIZE (64 * 1024)
#define DOVETAIL_ATTRIBUTES_MAX_SIZE (1024 * 1024)

#define DOVETAIL_SPOOL_ID_SIZE 16
#define DOVETAIL_ATTRIBUTES_HASH_SIZE 16

enum dovetail_change_kind {
	/* one mailbox changed */
	DOVETAIL_CHANGE_MAILBOX = 1,
	/* the list of mailboxes or of subscriptions changed */
	DOVETAIL_CHANGE_LIST = 2,
	/* the whole list of mailboxes and subscriptions, to be made equal */
	DOVETAIL_CHANGE_TREE = 3,
	/* a replica asks the primary for the state of a mailbox or a user */
	DOVETAIL_CHANGE_REQUEST = 4,
	/* a piece of a message body that a later change refers to */
	DOVETAIL_CHANGE_SPOOL = 5,
	/* nothing happened; shows that the origin is alive */
	DOVETAIL_CHANGE_HEARTBEAT = 6,
	/* a replica missed entries of a node's log: it asks that node for the
	   state of all users of the shard whose primary the node is */
	DOVETAIL_CHANGE_SHARD_REQUEST = 7,
	/* everything a SHARD_REQUEST asked for stands before this */
	DOVETAIL_CHANGE_SHARD_SWEPT = 8,
	/* a mailbox's digest at this place of the stream: replicas compare
	   theirs and answer with VERIFIED */
	DOVETAIL_CHANGE_VERIFY = 9,
	/* a replica's answer to VERIFY, or to a TREE with a number */
	DOVETAIL_CHANGE_VERIFIED = 10,
	/* a replica whose digest differs asks the primary where: its digests
	   of ranges of UIDs */
	DOVETAIL_CHANGE_COMPARE = 11,
	/* the primary's answer: finer ranges, and the messages of small ones */
	DOVETAIL_CHANGE_COMPARED = 12,
};

/* A place in a mailbox's transaction log. Places are comparable only with
   equal index_id. All zero: no position. */
struct dovetail_log_pos {
	uint32_t index_id;
	uint32_t file_seq;
	uint32_t file_offset;
};

/* -1, 0, 1 as a is before, at, after b. Call only with equal index_id. */
static inline int
dovetail_log_pos_cmp(const struct dovetail_log_pos *a,
		     const struct dovetail_log_pos *b)
{
	if (a->file_seq != b->file_seq)
		return a->file_seq < b->file_seq ? -1 : 1;
	if (a->file_offset != b->file_offset)
		return a->file_offset < b->file_offset ? -1 : 1;
	return 0;
}

enum dovetail_op_type {
	/* a message that did not exist before; final flags and keywords */
	DOVETAIL_OP_APPEND = 1,
	/* add and remove system flags of uids */
	DOVETAIL_OP_FLAGS = 2,
	/* add or remove one keyword of uids */
	DOVETAIL_OP_KEYWORD_ADD = 3,
	DOVETAIL_OP_KEYWORD_REMOVE = 4,
	/* remove all keywords of uids */
	DOVETAIL_OP_KEYWORD_RESET = 5,
	/* uids are gone for good */
	DOVETAIL_OP_EXPUNGE = 6,
	/* snapshots only: all uids below the first APPEND that exist */
	DOVETAIL_OP_EXISTS = 7,
	/* an attribute of the mailbox is now this, or is gone */
	DOVETAIL_OP_ATTRIBUTE = 8,
};

enum dovetail_body_source {
	/* in the op itself */
	DOVETAIL_BODY_INLINE = 0,
	/* sent before in DOVETAIL_CHANGE_SPOOL chunks of this spool_id */
	DOVETAIL_BODY_SPOOL = 1,
	/* the same message stands in another place of the same user */
	DOVETAIL_BODY_COPY = 2,
};

struct dovetail_op_append {
	uint32_t uid;
	/* as the storage gives it: 32 hex digits, or a Maildir base name */
	const char *guid;
	/* enum mail_flags, only the bits that are IMAP system flags */
	uint8_t flags;
	/* NULL-terminated, never NULL */
	const char *const *keywords;
	time_t received_date, save_date;
	/* "" when the storage has none */
	const char *pop3_uidl;
	/* 0 when the storage has none */
	uint32_t pop3_order;
	/* bytes of the body as it is stored */
	uint64_t size;

	enum dovetail_body_source source;
	/* INLINE: size bytes */
	const void *body;
	/* SPOOL */
	uint8_t spool_id[DOVETAIL_SPOOL_ID_SIZE];
	/* COPY: mailbox and uid the message was copied from; guid above is
	   the copy's own. */
	guid_128_t copy_mailbox_guid;
	uint32_t copy_uid;
};

/* An annotation of the mailbox (METADATA), with Dovecot's key: those of the server
   are INBOX's, with a prefix. */
struct dovetail_attribute {
	/* for all who see the mailbox, not for its owner alone */
	bool shared;
	/* 1..DOVETAIL_ATTRIBUTE_KEY_MAX_SIZE bytes */
	const char *key;
	/* up to DOVETAIL_ATTRIBUTE_VALUE_MAX_SIZE bytes; NULL: there is none */
	const char *value;
};
ARRAY_DEFINE_TYPE(dovetail_attribute, struct dovetail_attribute);

struct dovetail_op {
	enum dovetail_op_type type;
	/* FLAGS: enum mail_flags bits */
	uint8_t add_flags, remove_flags;
	/* KEYWORD_ADD, KEYWORD_REMOVE */
	const char *keyword;
	/* all but APPEND and ATTRIBUTE */
	ARRAY_TYPE(seq_range) uids;
	/* APPEND */
	struct dovetail_op_append append;
	/* ATTRIBUTE */
	struct dovetail_attribute attribute;
};
ARRAY_DEFINE_TYPE(dovetail_op, struct dovetail_op);

enum dovetail_mailbox_change_flags {
	/* The ops give the whole state, not what happened since from:
	   EXISTS, then FLAGS and KEYWORD_ADD for those uids (a uid without a
	   FLAGS op has none), then APPENDs. from is all zero. */
	DOVETAIL_MAILBOX_SNAPSHOT = 0x01,
	/* SNAPSHOT only: more APPENDs would follow, but the change is full.
	   The replica asks again with its new UIDNEXT. */
	DOVETAIL_MAILBOX_MORE = 0x02,
	/* digest is the mailbox's at to */
	DOVETAIL_MAILBOX_DIGEST = 0x04,
	/* APPENDs of the messages a REQUEST named, as they are at this place
	   of the stream; from and to are all zero. With MORE, the change is
	   full: the asker asks for the rest again. */
	DOVETAIL_MAILBOX_MESSAGES = 0x08,
	/* SNAPSHOT without MORE only: the ATTRIBUTE ops, which come last, are
	   all the mailbox has. Without it nothing is said of others. */
	DOVETAIL_MAILBOX_ATTRIBUTES = 0x10,
};

struct dovetail_change_mailbox {
	guid_128_t guid;
	const char *name;
	uint32_t uid_validity;
	uint32_t uid_next;
	/* HIGHESTMODSEQ at to; every message the change touches gets at least
	   this MODSEQ on the replica */
	uint64_t highest_modseq;
	enum dovetail_mailbox_change_flags flags;
	/* What the mailbox's log says in [from, to) is in ops. A replica that
	   is not at least at from misses something. */
	struct dovetail_log_pos from, to;
	/* with flag DIGEST */
	struct dovetail_digest digest;
	ARRAY_TYPE(dovetail_op) ops;
};

enum dovetail_list_action {
	DOVETAIL_LIST_CREATE = 1,
	/* a name that cannot be selected */
	DOVETAIL_LIST_CREATE_DIR = 2,
	DOVETAIL_LIST_DELETE = 3,
	/* children go with their parent */
	DOVETAIL_LIST_RENAME = 4,
	DOVETAIL_LIST_SUBSCRIBE = 5,
	DOVETAIL_LIST_UNSUBSCRIBE = 6,
	/* UIDVALIDITY, UIDNEXT or GUID was set by the administrator */
	DOVETAIL_LIST_UPDATE = 7,
};

struct dovetail_change_list {
	enum dovetail_list_action action;
	/* all zero for CREATE_DIR, SUBSCRIBE, UNSUBSCRIBE, and when a name
	   that cannot be selected is deleted or renamed */
	guid_128_t guid;
	const char *name;
	/* RENAME */
	const char *new_name;
	/* CREATE, UPDATE */
	uint32_t uid_validity, uid_next;
};

struct dovetail_tree_mailbox {
	/* all zero: a name that cannot be selected */
	guid_128_t guid;
	const char *name;
	uint32_t uid_validity, uid_next;
};
ARRAY_DEFINE_TYPE(dovetail_tree_mailbox, struct dovetail_tree_mailbox);

/* Who asks what, of a VERIFY or of a TREE to be compared. */
enum dovetail_verify_flags {
	/* read the messages from the store, not only what the index says */
	DOVETAIL_VERIFY_DEEP = 0x01,
	/* say which messages differ, and how */
	DOVETAIL_VERIFY_EXPLAIN = 0x02,
	/* make it equal */
	DOVETAIL_VERIFY_REPAIR = 0x04,
};

struct dovetail_change_tree {
	ARRAY_TYPE(dovetail_tree_mailbox) mailboxes;
	ARRAY_TYPE(const_string) subscriptions;
	/* mailboxes that were deleted, as far back as Dovecot remembers; what is
	   neither here nor in mailboxes disappeared in another way */
	ARRAY_TYPE(guid_128_t) deleted;
	/* not 0: answer with VERIFIED; without REPAIR, only compare */
	uint32_t number;
	enum dovetail_verify_flags flags;
};

/* Asks for a snapshot, of which an answer can be larger than a change: MORE. */
struct dovetail_change_request {
	/* all zero: the user's tree and every mailbox */
	guid_128_t guid;
	/* the name the asker knows, a hint; "" with a zero guid */
	const char *name;
	/* the asker has everything it can have below this UID */
	uint32_t uid_next;
	/* not empty: only these messages, as they are now; uid_next is 0 */
	ARRAY_TYPE(seq_range) uids;
};

struct dovetail_change_verify {
	/* of the question, chosen by the asker; the answer repeats it */
	uint32_t number;
	enum dovetail_verify_flags flags;
	guid_128_t guid;
	const char *name;
	uint32_t uid_validity;
	/* where the mailbox's log stands: a replica that is further has had
	   changes since from another process */
	struct dovetail_log_pos at;
	struct dovetail_digest digest;
	/* of all attributes; all zero: nothing is said of them */
	uint8_t attributes[DOVETAIL_ATTRIBUTES_HASH_SIZE];
};

enum dovetail_verified_result {
	DOVETAIL_VERIFIED_EQUAL = 1,
	DOVETAIL_VERIFIED_DIFFERENT = 2,
	/* it was different, and what was different was replaced */
	DOVETAIL_VERIFIED_REPAIRED = 3,
	/* could not tell; texts say why */
	DOVETAIL_VERIFIED_UNKNOWN = 4,
};

/* More differences than these are counted, not named. */
#define DOVETAIL_VERIFIED_TEXTS_MAX 100
/* bytes; what is longer is cut off */
#define DOVETAIL_VERIFIED_TEXT_MAX_SIZE 1000
struct dovetail_change_verified {
	/* who had asked; it is for nobody else */
	const char *node;
	uint32_t number;
	/* all zero: of the tree */
	guid_128_t guid;
	enum dovetail_verified_result result;
	/* messages of the replica */
	uint32_t messages;
	/* Differences, for people: a line each, not "". Control characters
	   travel as '?', but a text may be no UTF-8. */
	ARRAY_TYPE(const_string) texts;
};

/* Messages with uid1..uid2, their sum with the key of a COMPARE. count: not more
   than there are UIDs. */
struct dovetail_range {
	uint32_t uid1, uid2, count;
	struct dovetail_sum sum;
};
ARRAY_DEFINE_TYPE(dovetail_range, struct dovetail_range);

/* Ranges in one COMPARE or COMPARED */
#define DOVETAIL_RANGES_MAX 4096

struct dovetail_change_compare {
	guid_128_t guid;
	/* the name the asker knows, a hint */
	const char *name;
	uint32_t number;
	uint8_t key[DOVETAIL_DIGEST_KEY_SIZE];
	/* ascending, no UID in two of them */
	ARRAY_TYPE(dovetail_range) ranges;
};

struct dovetail_compared_message {
	uint32_t uid;
	/* enum mail_flags, only the bits that are IMAP system flags */
	uint8_t flags;
	/* NULL-terminated, never NULL */
	const char *const *keywords;
	uint8_t hash[DOVETAIL_MESSAGE_HASH_SIZE];
};
ARRAY_DEFINE_TYPE(dovetail_compared_message, struct dovetail_compared_message);

/* What the primary has at this place of the stream, of those ranges of the COMPARE
   that differ: parts of a range, or all messages of it. A range that is in neither
   was equal. */
struct dovetail_change_compared {
	guid_128_t guid;
	uint32_t number;
	uint32_t uid_validity, uid_next;
	uint64_t highest_modseq;
	/* as in VERIFY */
	struct dovetail_log_pos at;
	ARRAY_TYPE(dovetail_range) ranges;
	/* messages has all messages with these UIDs, ascending, no others */
	ARRAY_TYPE(seq_range) uids;
	ARRAY_TYPE(dovetail_compared_message) messages;
	/* attributes has all of the mailbox: ascending, private ones first, each
	   with a value. FALSE: nothing is said of them */
	bool with_attributes;
	ARRAY_TYPE(dovetail_attribute) attributes;
};

struct dovetail_change_spool {
	uint8_t id[DOVETAIL_SPOOL_ID_SIZE];
	/* of data in the whole body; chunks come in order, without holes */
	uint64_t offset;
	const void *data;
	size_t size;
};

struct dovetail_change_shard {
	uint8_t shard;
	/* who is asked; for SHARD_SWEPT: who had asked. The other nodes read it
	   too, and it is not for them. */
	const char *node;
	/* of the question, chosen by the asker; the answer repeats it */
	uint32_t number;
};

struct dovetail_change {
	enum dovetail_change_kind kind;
	/* "" for HEARTBEAT and SHARD_*, and only for those */
	const char *user;
	union {
		struct dovetail_change_mailbox mailbox;
		struct dovetail_change_list list;
		struct dovetail_change_tree tree;
		struct dovetail_change_request request;
		struct dovetail_change_spool spool;
		struct dovetail_change_shard shard;
		struct dovetail_change_verify verify;
		struct dovetail_change_verified verified;
		struct dovetail_change_compare compare;
		struct dovetail_change_compared compared;
	} u;
};

#endif
