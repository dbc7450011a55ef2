#ifndef DOVETAIL_LOG_H
#define DOVETAIL_LOG_H

/* What a mailbox's transaction log says happened to its messages and attributes. */

#include "dovetail-change.h"

struct mail_index;
struct mail_transaction_header;

/* A record of the log that changes messages, copied: a message was added or is
   gone, or its flags or keywords changed; or one that changes attributes. */
struct dovetail_log_record {
	struct dovetail_log_pos pos;
	/* enum mail_transaction_type without protection and other flags */
	uint32_t type;
	/* size bytes, as mail-transaction-log.h has them for the type */
	const void *data;
	size_t size;
};
ARRAY_DEFINE_TYPE(dovetail_log_record, struct dovetail_log_record);

/* Copy the records in [from, end), both places where a record begins or the log
   ends, to pool. (What is copied stays: reading mailboxes meanwhile may map the
   log anew.)
   Returns 1: done.  0: the log does not reach back to from, or the index was
   reset since.  -1: failed, error_r (data stack). */
int dovetail_log_read(struct mail_index *index,
		      const struct dovetail_log_pos *from,
		      const struct dovetail_log_pos *end, pool_t pool,
		      ARRAY_TYPE(dovetail_log_record) *records,
		      const char **error_r);

/* Let nobody else write to the index until it is unlocked, and read it as it is now.
   Returns 0, or -1: dovetail_index_error(). */
int dovetail_log_lock(struct mail_index *index);
void dovetail_log_unlock(struct mail_index *index);

/* Add the UIDs of a record to uids; one that changes attributes has none. */
void dovetail_log_record_uids(const struct dovetail_log_record *record,
			      ARRAY_TYPE(seq_range) *uids);
/* Add the attributes of a record that changes attributes, without their values,
   which are not in the log. The keys are the record's. */
void dovetail_log_record_attributes(const struct dovetail_log_record *record,
				    ARRAY_TYPE(dovetail_attribute) *attributes);

#endif
