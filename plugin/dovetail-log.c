/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "array.h"
#include "mail-index-private.h"
#include "mail-transaction-log-view-private.h"
#include "dovetail-compat.h"
#include "dovetail-log.h"

/* The type without its flags, or 0 when it changes nothing that travels. */
static uint32_t log_change_type(const struct mail_transaction_header *hdr)
{
	uint32_t type = hdr->type & MAIL_TRANSACTION_TYPE_MASK;

	switch (type) {
	case MAIL_TRANSACTION_APPEND:
	case MAIL_TRANSACTION_FLAG_UPDATE:
	case MAIL_TRANSACTION_KEYWORD_UPDATE:
	case MAIL_TRANSACTION_KEYWORD_RESET:
	case MAIL_TRANSACTION_ATTRIBUTE_UPDATE:
		return type;
	case MAIL_TRANSACTION_EXPUNGE:
	case MAIL_TRANSACTION_EXPUNGE | MAIL_TRANSACTION_EXPUNGE_PROT:
		type = MAIL_TRANSACTION_EXPUNGE;
		break;
	case MAIL_TRANSACTION_EXPUNGE_GUID:
	case MAIL_TRANSACTION_EXPUNGE_GUID | MAIL_TRANSACTION_EXPUNGE_PROT:
		type = MAIL_TRANSACTION_EXPUNGE_GUID;
		break;
	default:
		return 0;
	}
	/* without EXTERNAL it is a wish, not a fact */
	return (hdr->type & MAIL_TRANSACTION_EXTERNAL) != 0 ? type : 0;
}

int dovetail_log_read(struct mail_index *index,
		      const struct dovetail_log_pos *from,
		      const struct dovetail_log_pos *end, pool_t pool,
		      ARRAY_TYPE(dovetail_log_record) *records,
		      const char **error_r)
{
	struct mail_transaction_log_view *lv;
	const struct mail_transaction_header *hdr;
	struct dovetail_log_record *record;
	const char *reason;
	const void *data;
	uoff_t offset;
	uint32_t type;
	bool reset;
	int ret;

	lv = mail_transaction_log_view_open(index->log);
	ret = mail_transaction_log_view_set(lv, from->file_seq,
					    from->file_offset, end->file_seq,
					    end->file_offset, &reset, &reason);
	if (ret > 0 && reset)
		ret = 0;
	else if (ret < 0)
		*error_r = t_strdup(reason);
	if (ret <= 0) {
		mail_transaction_log_view_close(&lv);
		return ret;
	}
	while ((ret = mail_transaction_log_view_next(lv, &hdr, &data)) > 0) {
		type = log_change_type(hdr);
		if (type == 0)
			continue;
		record = array_append_space(records);
		record->pos.index_id = from->index_id;
		mail_transaction_log_view_get_prev_pos(lv,
			&record->pos.file_seq, &offset);
		record->pos.file_offset = offset;
		record->type = type;
		record->data = p_memdup(pool, data, hdr->size);
		record->size = hdr->size;
	}
	mail_transaction_log_view_close(&lv);
	if (ret < 0) {
		*error_r = t_strdup_printf(
			"Cannot read the log of the index: %s",
			dovetail_index_error(index));
		return -1;
	}
	return 1;
}

void dovetail_log_record_uids(const struct dovetail_log_record *record,
			      ARRAY_TYPE(seq_range) *uids)
{
	const void *end = CONST_PTR_OFFSET(record->data, record->size);
	const struct mail_transaction_keyword_update *keyword;
	const struct mail_transaction_keyword_reset *reset;
	const struct mail_transaction_flag_update *flags;
	const struct mail_transaction_expunge *expunge;
	const struct mail_transaction_expunge_guid *expunge_guid;
	const struct mail_index_record *rec;
	unsigned int offset;
	const uint32_t *uid;

	switch (record->type) {
	case MAIL_TRANSACTION_APPEND:
		for (rec = record->data; (const void *)rec < end; rec++)
			seq_range_array_add(uids, rec->uid);
		break;
	case MAIL_TRANSACTION_FLAG_UPDATE:
		for (flags = record->data; (const void *)flags < end; flags++) {
			seq_range_array_add_range(uids, flags->uid1,
						  flags->uid2);
		}
		break;
	case MAIL_TRANSACTION_KEYWORD_UPDATE:
		keyword = record->data;
		offset = sizeof(*keyword) + keyword->name_size;
		if ((offset % 4) != 0)
			offset += 4 - (offset % 4);
		uid = CONST_PTR_OFFSET(record->data, offset);
		for (; (const void *)(uid + 1) < end; uid += 2)
			seq_range_array_add_range(uids, uid[0], uid[1]);
		break;
	case MAIL_TRANSACTION_KEYWORD_RESET:
		for (reset = record->data; (const void *)reset < end; reset++) {
			seq_range_array_add_range(uids, reset->uid1,
						  reset->uid2);
		}
		break;
	case MAIL_TRANSACTION_EXPUNGE:
		for (expunge = record->data; (const void *)expunge < end;
		     expunge++) {
			seq_range_array_add_range(uids, expunge->uid1,
						  expunge->uid2);
		}
		break;
	case MAIL_TRANSACTION_EXPUNGE_GUID:
		for (expunge_guid = record->data;
		     (const void *)expunge_guid < end; expunge_guid++)
			seq_range_array_add(uids, expunge_guid->uid);
		break;
	}
}

void dovetail_log_record_attributes(const struct dovetail_log_record *record,
				    ARRAY_TYPE(dovetail_attribute) *attributes)
{
	/* "+pKEY" or "-sKEY", each ended by a NUL, and one more at the end;
	   then times */
	const char *pos = record->data, *end = pos + record->size;
	struct dovetail_attribute attribute;
	size_t len;

	i_zero(&attribute);
	for (; pos < end && *pos != '\0'; pos += len + 1) {
		len = strnlen(pos, end - pos);
		if (len < 3 || pos + len == end)
			break;
		attribute.shared = pos[1] == 's';
		attribute.key = pos + 2;
		array_push_back(attributes, &attribute);
	}
}

int dovetail_log_lock(struct mail_index *index)
{
	uint32_t file_seq;
	uoff_t file_offset;

	if (mail_transaction_log_sync_lock(index->log, "dovetail", &file_seq,
					   &file_offset) < 0)
		return -1;
	if (mail_index_refresh(index) < 0) {
		dovetail_log_unlock(index);
		return -1;
	}
	return 0;
}

void dovetail_log_unlock(struct mail_index *index)
{
	mail_transaction_log_sync_unlock(index->log, "dovetail");
}
