#ifndef DOVETAIL_WIRE_H
#define DOVETAIL_WIRE_H

/* Changes to bytes and back.

   Primitives
     num      unsigned LEB128, shortest form only, at most 64 bits
     snum     num of the zigzag-coded signed number
     u8       one byte
     bytes    num size, then that many bytes
     str      bytes without a NUL
     guid     16 bytes
     uids     num count (1..), then per range, ascending, not touching:
              num first uid minus (end of the range before + 2; for the first
              range: minus 1), num last uid minus first uid.
              All uids are 1..4294967295.

   change := u8 kind  str user  by kind:
     MAILBOX   guid  str name  num uid_validity  num uid_next
               num highest_modseq  u8 flags
               num from.index_id  num from.file_seq  num from.file_offset
               num to.index_id  num to.file_seq  num to.file_offset
               digest (only with flag DIGEST)  op ... to the end
     LIST      u8 action  guid  str name  str new_name ("" unless RENAME)
               num uid_validity  num uid_next (0 unless CREATE, UPDATE)
     TREE      num mailboxes, each: guid  str name  num uid_validity
               num uid_next;  num subscriptions, each: str name;
               num deleted, each: guid;
               num number  u8 flags (0 unless number)
     REQUEST   guid  str name  num uid_next  uids (may have count 0)
     SPOOL     16 bytes id  num offset  data to the end (1..128 KiB)
     HEARTBEAT nothing more; user is ""
     SHARD_REQUEST, SHARD_SWEPT   u8 shard  str node  num number; user is ""
     VERIFY    num number  u8 flags  guid  str name  num uid_validity
               num at.index_id  num at.file_seq  num at.file_offset
               digest  16 bytes attributes
     VERIFIED  str node  num number  guid  u8 result  num messages
               num texts (0..100), each: str of 1..1000 bytes, none of them
               0x00..0x1f or 0x7f
     COMPARE   guid  str name  num number  16 bytes key  ranges
     COMPARED  guid  num number  num uid_validity  num uid_next
               num highest_modseq
               num at.index_id  num at.file_seq  num at.file_offset
               ranges  uids (may have count 0)
               num messages, ascending, each: num uid (one of uids)  u8 flags
               num keywords, each str; 16 bytes hash;
               u8 with_attributes (0 or 1), if 1: num attributes, ascending,
               each: attribute (with a value)

   digest := 16 bytes key  16 bytes sum  num count
   ranges := num ranges (0..4096), ascending, each: num uid1
             num uid2 minus uid1  num count  16 bytes sum

   op := u8 type, by type:
     APPEND    num uid  str guid  u8 flags
               num keywords, each str  snum received_date  snum save_date
               str pop3_uidl  num pop3_order  num size  u8 source, by source:
                 INLINE  size bytes  |  SPOOL  16 bytes spool id
                 COPY    guid mailbox  num uid
     FLAGS     u8 add  u8 remove  uids
     KEYWORD_ADD, KEYWORD_REMOVE   str keyword  uids
     KEYWORD_RESET, EXPUNGE, EXISTS  uids  (EXISTS may have count 0)
     ATTRIBUTE attribute

   attribute := u8 (0x01: shared, 0x02: has a value)  str key (1..1000 bytes)
                str value (0..64 KiB; only with 0x02)

   The encoding is canonical: what decodes, encodes to the same bytes again.
   History: version 1 is the first; the version stands in the entry header. */

#include "dovetail-change.h"

/* ---- primitives ---- */

void dovetail_wire_put_num(buffer_t *buf, uint64_t num);
void dovetail_wire_put_snum(buffer_t *buf, int64_t num);
void dovetail_wire_put_u8(buffer_t *buf, uint8_t num);
void dovetail_wire_put_bytes(buffer_t *buf, const void *data, size_t size);
void dovetail_wire_put_str(buffer_t *buf, const char *str);
void dovetail_wire_put_guid(buffer_t *buf, const guid_128_t guid);
void dovetail_wire_put_uids(buffer_t *buf, const ARRAY_TYPE(seq_range) *uids);

/* A cursor over bytes of somebody else's making. The first thing that does not
   fit sets failed and every later get gives zero or empty, so callers may check
   once at the end. */
struct dovetail_wire_reader {
	const unsigned char *pos, *end;
	bool failed;
};

void dovetail_wire_reader_init(struct dovetail_wire_reader *r,
			       const void *data, size_t size);
uint64_t dovetail_wire_get_num(struct dovetail_wire_reader *r);
/* Fails also above UINT32_MAX. */
uint32_t dovetail_wire_get_num32(struct dovetail_wire_reader *r);
int64_t dovetail_wire_get_snum(struct dovetail_wire_reader *r);
uint8_t dovetail_wire_get_u8(struct dovetail_wire_reader *r);
/* Returns a pointer into the reader's data; NULL only when failed. */
const void *dovetail_wire_get_raw(struct dovetail_wire_reader *r, size_t size);
const void *dovetail_wire_get_bytes(struct dovetail_wire_reader *r,
				    size_t *size_r);
/* Copied to pool, NUL-terminated; "" when failed. */
const char *dovetail_wire_get_str(struct dovetail_wire_reader *r, pool_t pool);
void dovetail_wire_get_guid(struct dovetail_wire_reader *r, guid_128_t guid_r);
/* uids is initialized by the caller and only added to. */
void dovetail_wire_get_uids(struct dovetail_wire_reader *r,
			    ARRAY_TYPE(seq_range) *uids);
/* TRUE: nothing failed and nothing is left over. */
bool dovetail_wire_reader_done(const struct dovetail_wire_reader *r);

/* ---- changes ---- */

/* Append the change to buf. The caller guarantees what the structs promise. */
void dovetail_change_encode(buffer_t *buf, const struct dovetail_change *change);
/* Append one attribute, which dovetail_attributes_hash() takes for what it is. */
void dovetail_attribute_encode(buffer_t *buf,
			       const struct dovetail_attribute *attribute);
/* -1, 0, 1 as a comes before, with, behind b in a list. */
int dovetail_attribute_cmp(const struct dovetail_attribute *a,
			   const struct dovetail_attribute *b);
/* Append one op: senders build a MAILBOX change piece by piece. The change is
   encoded first, with an empty ops array. */
void dovetail_op_encode(buffer_t *buf, const struct dovetail_op *op);

/* Decode data into change_r. Strings and arrays are allocated from pool;
   message bodies and spool data point into data, which must stay.
   Returns 0, or -1 and error_r (data stack) naming the kind and field. */
int dovetail_change_decode(pool_t pool, const void *data, size_t size,
			   struct dovetail_change *change_r,
			   const char **error_r);
/* Decode everything but the ops, which are neither read nor checked: what the
   queue needs to route a change and to drop what it already has. */
int dovetail_change_decode_head(pool_t pool, const void *data, size_t size,
				struct dovetail_change *change_r,
				const char **error_r);

#endif
