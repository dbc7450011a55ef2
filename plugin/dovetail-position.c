/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "mail-storage-private.h"
#include "mail-index-private.h"
#include "mail-index-view-private.h"
#include "dovetail-compat.h"
#include "dovetail-mailbox-digest.h"
#include "dovetail-log.h"
#include "dovetail-position.h"

#include <sodium.h>

#define DOVETAIL_EXT_NAME "dovetail"

/* The extension header, in host byte order as the rest of an index. Version 1. */
struct dovetail_ext_header {
	uint32_t queued_index_id, queued_file_seq, queued_file_offset;
	uint32_t applied_index_id, applied_file_seq, applied_file_offset;
	uint8_t origin[DOVETAIL_ORIGIN_ID_SIZE];
};
#define DOVETAIL_EXT_QUEUED_OFFSET \
	offsetof(struct dovetail_ext_header, queued_index_id)

void dovetail_origin_id(const char *node, uint8_t id_r[DOVETAIL_ORIGIN_ID_SIZE])
{
	unsigned char hash[crypto_generichash_BYTES];

	crypto_generichash(hash, sizeof(hash), (const unsigned char *)node,
			   strlen(node), NULL, 0);
	memcpy(id_r, hash, DOVETAIL_ORIGIN_ID_SIZE);
}

static uint32_t dovetail_ext_register(struct mail_index *index)
{
	return mail_index_ext_register(index, DOVETAIL_EXT_NAME,
				       sizeof(struct dovetail_ext_header), 0, 0);
}

bool dovetail_position_get_view(struct mail_index *index,
				struct mail_index_view *view,
				struct dovetail_position *pos_r)
{
	struct dovetail_ext_header hdr;
	const void *data;
	size_t size;

	i_zero(pos_r);
	mail_index_get_header_ext(view, dovetail_ext_register(index),
				  &data, &size);
	if (size < sizeof(hdr))
		return FALSE;
	memcpy(&hdr, data, sizeof(hdr));
	pos_r->queued.index_id = hdr.queued_index_id;
	pos_r->queued.file_seq = hdr.queued_file_seq;
	pos_r->queued.file_offset = hdr.queued_file_offset;
	pos_r->applied.index_id = hdr.applied_index_id;
	pos_r->applied.file_seq = hdr.applied_file_seq;
	pos_r->applied.file_offset = hdr.applied_file_offset;
	memcpy(pos_r->origin, hdr.origin, sizeof(pos_r->origin));
	return TRUE;
}

bool dovetail_position_get(struct mailbox *box, struct dovetail_position *pos_r)
{
	struct mail_index_view *view;
	bool found;

	(void)mail_index_refresh(box->index);
	view = mail_index_view_open(box->index);
	found = dovetail_position_get_view(box->index, view, pos_r);
	mail_index_view_close(&view);
	return found;
}

void dovetail_position_log_end(struct mailbox *box,
			       struct dovetail_log_pos *pos_r)
{
	struct mail_index_view *view = mail_index_view_open(box->index);

	pos_r->index_id = box->index->indexid;
	pos_r->file_seq = view->log_file_head_seq;
	pos_r->file_offset = view->log_file_head_offset;
	mail_index_view_close(&view);
}

int dovetail_position_set_queued(struct mailbox *box,
				 const struct dovetail_log_pos *queued,
				 struct dovetail_mailbox_digest *md,
				 const char **error_r)
{
	struct mail_index *index = box->index;
	struct mail_index_view *view;
	struct mail_index_transaction *trans;
	uint32_t data[3];
	int ret;

	data[0] = queued->index_id;
	data[1] = queued->file_seq;
	data[2] = queued->file_offset;

	if (dovetail_log_lock(index) < 0) {
		*error_r = dovetail_index_error(index);
		return -1;
	}
	view = mail_index_view_open(index);
	trans = mail_index_transaction_begin(view,
		MAIL_INDEX_TRANSACTION_FLAG_EXTERNAL);
	mail_index_update_header_ext(trans, dovetail_ext_register(index),
				     DOVETAIL_EXT_QUEUED_OFFSET,
				     data, sizeof(data));
	if (md != NULL)
		dovetail_mailbox_digest_write(md, trans);
	ret = mail_index_transaction_commit(&trans);
	if (ret < 0)
		*error_r = dovetail_index_error(index);
	mail_index_view_close(&view);
	dovetail_log_unlock(index);
	if (md != NULL)
		dovetail_mailbox_digest_written(md);
	return ret;
}

void dovetail_position_update_applied(struct mail_index *index,
				      struct mail_index_transaction *trans,
				      const struct dovetail_log_pos *applied,
				      const uint8_t origin[DOVETAIL_ORIGIN_ID_SIZE])
{
	struct dovetail_ext_header hdr;

	i_zero(&hdr);
	hdr.applied_index_id = applied->index_id;
	hdr.applied_file_seq = applied->file_seq;
	hdr.applied_file_offset = applied->file_offset;
	memcpy(hdr.origin, origin, sizeof(hdr.origin));
	mail_index_update_header_ext(trans, dovetail_ext_register(index),
				     0, &hdr, sizeof(hdr));
}

int dovetail_position_claim(struct mailbox *box,
			    const uint8_t origin[DOVETAIL_ORIGIN_ID_SIZE],
			    const char **error_r)
{
	struct mail_index *index = box->index;
	struct mail_index_view *view;
	struct mail_index_transaction *trans;
	struct dovetail_position pos;
	int ret;

	if (dovetail_position_get(box, &pos) &&
	    memcmp(pos.origin, origin, sizeof(pos.origin)) == 0)
		return 0;
	i_zero(&pos);
	view = mail_index_view_open(index);
	trans = mail_index_transaction_begin(view,
		MAIL_INDEX_TRANSACTION_FLAG_EXTERNAL);
	dovetail_position_update_applied(index, trans, &pos.applied, origin);
	ret = mail_index_transaction_commit(&trans);
	if (ret < 0)
		*error_r = dovetail_index_error(index);
	mail_index_view_close(&view);
	return ret;
}
