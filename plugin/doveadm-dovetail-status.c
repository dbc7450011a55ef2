/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* doveadm dovetail status: of this node, and of users' mailboxes. */

#include "lib.h"
#include "array.h"
#include "buffer.h"
#include "ioloop.h"
#include "str.h"
#include "str-sanitize.h"
#include "mail-index-private.h"
#include "mail-transaction-log.h"
#include "mail-namespace.h"
#include "mail-storage-private.h"
#include "mail-user.h"
#include "mailbox-list-iter.h"
#include "doveadm.h"
#include "doveadm-mail.h"
#include "doveadm-print.h"
#include "dovetail-compat.h"
#include "dovetail-frame.h"
#include "dovetail-position.h"
#include "dovetail-settings.h"
#include "doveadm-dovetail.h"

/* What stands where there is no value. */
#define NO_VALUE DOVEADM_DOVETAIL_NO_VALUE
#define RIGHT DOVEADM_PRINT_HEADER_FLAG_RIGHT_JUSTIFY

/* ---- status: of the node, as the queue service tells it ---- */

struct status_field {
	const char *key, *value;
};

struct status_row {
	const struct status_field *fields;
	unsigned int count;
};

struct status {
	struct doveadm_queue queue;
	ARRAY(struct status_row) rows;
};

enum status_column_show {
	/* whatever it is */
	STATUS_SHOW_ALWAYS,
	/* in the brief table: only if there is something but 0 in it */
	STATUS_SHOW_NONZERO,
	/* in the brief table: never */
	STATUS_SHOW_DETAIL,
};

/* Columns in the order in which they are printed. A key that the services
   report and that is not here comes before the last of these. */
static const struct status_column {
	const char *key;
	enum doveadm_print_header_flags flags;
	enum status_column_show show;
} status_columns[] = {
	{ "node", 0, STATUS_SHOW_ALWAYS },
	{ "peer", 0, STATUS_SHOW_ALWAYS },
	{ "direction", 0, STATUS_SHOW_DETAIL },
	{ "role", 0, STATUS_SHOW_ALWAYS },
	{ "connection", 0, STATUS_SHOW_ALWAYS },
	{ "entries", RIGHT, STATUS_SHOW_ALWAYS },
	{ "bytes", RIGHT, STATUS_SHOW_ALWAYS },
	{ "lag", RIGHT, STATUS_SHOW_ALWAYS },
	{ "lag_entries", RIGHT, STATUS_SHOW_DETAIL },
	{ "applied", 0, STATUS_SHOW_ALWAYS },
	{ "position", 0, STATUS_SHOW_DETAIL },
	{ "dirty_users", RIGHT, STATUS_SHOW_NONZERO },
	{ "verified", 0, STATUS_SHOW_DETAIL },
	{ "different", RIGHT, STATUS_SHOW_NONZERO },
	{ "repaired", RIGHT, STATUS_SHOW_NONZERO },
	{ "set_aside", RIGHT, STATUS_SHOW_NONZERO },
	{ "rejected", RIGHT, STATUS_SHOW_NONZERO },
	{ "rejected_reasons", 0, STATUS_SHOW_NONZERO },
	{ "redis_since", 0, STATUS_SHOW_DETAIL },
};
/* The longest text; a table that is too wide looks best with it at the end. */
static const struct status_column status_last_column = {
	"error", 0, STATUS_SHOW_ALWAYS
};

static bool status_rows(struct status *status, struct dovetail_wire_reader *r)
{
	struct status_row *row;
	struct status_field field;
	ARRAY(struct status_field) fields;
	uint64_t rows, count;

	t_array_init(&fields, 16);
	(void)dovetail_wire_get_num(r); /* tag */
	rows = dovetail_wire_get_num(r);
	for (; rows > 0 && !r->failed; rows--) {
		array_clear(&fields);
		count = dovetail_wire_get_num(r);
		for (; count > 0 && !r->failed; count--) {
			field.key = dovetail_wire_get_str(r,
							  status->queue.pool);
			field.value = dovetail_wire_get_str(r,
							    status->queue.pool);
			array_push_back(&fields, &field);
		}
		if (array_count(&fields) == 0)
			continue;
		row = array_append_space(&status->rows);
		row->count = array_count(&fields);
		row->fields = p_memdup(status->queue.pool, array_front(&fields),
				       sizeof(field) * row->count);
	}
	return dovetail_wire_reader_done(r);
}

static bool status_frame(enum dovetail_frame_type type,
			 struct dovetail_wire_reader *r, void *context)
{
	struct status *status = context;

	switch (type) {
	case DOVETAIL_FRAME_STATUS:
		if (!status_rows(status, r)) {
			doveadm_queue_fail(&status->queue, EX_PROTOCOL,
				"the dovetail-queue service sent a status "
				"that cannot be read");
		}
		return FALSE;
	case DOVETAIL_FRAME_REPLY:
		doveadm_queue_refused(&status->queue, r);
		return FALSE;
	default:
		/* not for us */
		return TRUE;
	}
}

static const char *
status_row_get(const struct status_row *row, const char *key)
{
	unsigned int i;

	for (i = 0; i < row->count; i++) {
		if (strcmp(row->fields[i].key, key) == 0)
			return row->fields[i].value;
	}
	return NULL;
}

/* TRUE when the column is worth printing. brief: for a person's eyes. */
static bool
status_shows(const struct status *status, const struct status_column *column,
	     bool brief)
{
	const struct status_row *row;
	const char *value;
	bool found = FALSE, nonzero = FALSE;

	array_foreach(&status->rows, row) {
		value = status_row_get(row, column->key);
		if (value != NULL) {
			found = TRUE;
			if (*value != '\0' && strcmp(value, "0") != 0)
				nonzero = TRUE;
		}
	}
	if (!brief)
		return found;
	return found && (column->show == STATUS_SHOW_ALWAYS ||
			 (column->show == STATUS_SHOW_NONZERO && nonzero));
}

static void
status_add_column(const struct status *status,
		  const struct status_column *column, bool brief,
		  ARRAY_TYPE(const_string) *keys)
{
	if (status_shows(status, column, brief)) {
		array_push_back(keys, &column->key);
		doveadm_print_header(column->key, column->key, column->flags);
	}
}

static bool status_column_is_known(const char *key)
{
	unsigned int i;

	for (i = 0; i < N_ELEMENTS(status_columns); i++) {
		if (strcmp(status_columns[i].key, key) == 0)
			return TRUE;
	}
	return strcmp(status_last_column.key, key) == 0;
}

/* Print the headers of the columns that the rows have; keys gets their keys. */
static void
status_print_headers(const struct status *status, bool brief,
		     ARRAY_TYPE(const_string) *keys)
{
	const struct status_row *row;
	unsigned int i;

	for (i = 0; i < N_ELEMENTS(status_columns); i++)
		status_add_column(status, &status_columns[i], brief, keys);
	array_foreach(&status->rows, row) {
		for (i = 0; i < row->count; i++) {
			const struct status_column column = {
				row->fields[i].key, 0, STATUS_SHOW_NONZERO
			};

			if (!status_column_is_known(column.key) &&
			    array_lsearch(keys, &column.key,
					  i_strcmp_p) == NULL)
				status_add_column(status, &column, brief, keys);
		}
	}
	status_add_column(status, &status_last_column, brief, keys);
}

/* A long text in the middle would put the columns of the brief table out of
   line: what is wrong with the connection goes to the error at the end. */
static const char *
status_brief_value(const struct status_row *row, const char *key)
{
	const char *connection = status_row_get(row, "connection");
	const char *error = status_row_get(row, "error");

	if (connection == NULL || *connection == '\0' ||
	    strcmp(connection, "ok") == 0)
		return status_row_get(row, key);
	if (strcmp(key, "connection") == 0)
		return "failed";
	if (strcmp(key, "error") != 0)
		return status_row_get(row, key);
	if (error == NULL || *error == '\0' || strcmp(error, connection) == 0)
		return connection;
	return t_strdup_printf("%s; %s", connection, error);
}

static void status_print(const struct status *status)
{
	const struct status_row *row;
	ARRAY_TYPE(const_string) keys;
	const char *key, *value;
	/* who asks for a formatter, or for more, gets everything */
	bool brief = !doveadm_print_is_initialized() && !doveadm_verbose;

	t_array_init(&keys, 16);
	doveadm_print_init(DOVEADM_PRINT_TYPE_TABLE);
	status_print_headers(status, brief, &keys);
	array_foreach(&status->rows, row) {
		array_foreach_elem(&keys, key) {
			value = brief ? status_brief_value(row, key) :
				status_row_get(row, key);
			doveadm_print(value == NULL || *value == '\0' ?
				      NO_VALUE :
				      str_sanitize_utf8(value, SIZE_MAX));
		}
	}
}

static void cmd_dovetail_status_node(struct doveadm_cmd_context *cctx)
{
	struct dovetail_settings set;
	struct status status;
	struct timeout *to;
	buffer_t *question = t_buffer_create(16);
	size_t offset;

	i_zero(&status);
	if (!doveadm_cmd_param_str(cctx, "queue-socket", &status.queue.path)) {
		if (doveadm_dovetail_settings_read(&set) < 0)
			return;
		status.queue.path = set.queue_socket;
	}
	status.queue.pool = pool_alloconly_create("dovetail status", 4096);
	status.queue.frame = status_frame;
	status.queue.context = &status;
	p_array_init(&status.rows, status.queue.pool, 16);

	offset = dovetail_frame_begin(question, DOVETAIL_FRAME_STATUS_GET);
	dovetail_wire_put_num(question, 1);
	dovetail_frame_end(question, offset);
	if (doveadm_queue_open(&status.queue, question) == 0) {
		to = timeout_add(DOVEADM_QUEUE_TIMEOUT_MSECS,
				 doveadm_queue_timeout, &status.queue);
		doveadm_queue_run(&status.queue);
		timeout_remove(&to);
		doveadm_queue_close(&status.queue);
	}
	if (status.queue.error == NULL)
		status_print(&status);
	else
		doveadm_queue_report(&status.queue);
	pool_unref(&status.queue.pool);
}

/* ---- status -u: of a user's mailboxes, as their indexes tell it ---- */

/* What this node is for the user. */
struct status_user {
	const char *primary;
	bool is_primary;
	uint8_t primary_id[DOVETAIL_ORIGIN_ID_SIZE];
};

/* TRUE when a record of this type tells of something a replica must get:
   dovetail's own position and caches change nothing, and what carries the SYNC
   flag came from another node. */
static bool log_record_is_change(uint32_t type)
{
	if ((type & MAIL_TRANSACTION_SYNC) != 0)
		return FALSE;
	switch (type & MAIL_TRANSACTION_TYPE_MASK) {
	case MAIL_TRANSACTION_EXT_INTRO:
	case MAIL_TRANSACTION_EXT_RESET:
	case MAIL_TRANSACTION_EXT_HDR_UPDATE:
	case MAIL_TRANSACTION_EXT_HDR_UPDATE32:
	case MAIL_TRANSACTION_EXT_REC_UPDATE:
	case MAIL_TRANSACTION_EXT_ATOMIC_INC:
	case MAIL_TRANSACTION_HEADER_UPDATE:
	case MAIL_TRANSACTION_BOUNDARY:
		return FALSE;
	default:
		return TRUE;
	}
}

/* Count the bytes of the log's changes in [from, end). Returns 1 and
   size_r; 0 when the log does not go back as far as from; -1: I/O error, which
   Dovecot has logged. */
static int
log_changes_size(struct mailbox *box, const struct dovetail_log_pos *from,
		 const struct dovetail_log_pos *end, uoff_t *size_r)
{
	struct mail_transaction_log_view *view;
	const struct mail_transaction_header *hdr;
	const void *data;
	const char *reason;
	bool reset;
	int ret;

	*size_r = 0;
	/* An offset beyond the end would make Dovecot mark the log as
	   corrupted, so a position that cannot be right stops here. */
	if (from->index_id == 0 || from->index_id != end->index_id ||
	    dovetail_log_pos_cmp(from, end) > 0)
		return 0;

	view = mail_transaction_log_view_open(box->index->log);
	ret = mail_transaction_log_view_set(view,
					    from->file_seq, from->file_offset,
					    end->file_seq, end->file_offset,
					    &reset, &reason);
	if (ret > 0 && reset)
		ret = 0;
	if (ret > 0) {
		while ((ret = mail_transaction_log_view_next(view, &hdr,
							     &data)) > 0) {
			if (log_record_is_change(hdr->type))
				*size_r += sizeof(*hdr) + hdr->size;
		}
		ret = ret < 0 ? -1 : 1;
	}
	mail_transaction_log_view_close(&view);
	return ret;
}

static const char *log_pos_to_string(const struct dovetail_log_pos *pos)
{
	if (pos->index_id == 0)
		return NO_VALUE;
	return t_strdup_printf("%u:%u", pos->file_seq, pos->file_offset);
}

/* The columns of a mailbox that depend on the role. */
struct status_mailbox {
	const char *state, *queued, *unqueued, *applied;
};

static int
status_mailbox_get_queued(struct mailbox *box,
			  const struct dovetail_position *pos,
			  struct status_mailbox *smbox_r)
{
	struct dovetail_log_pos end;
	uoff_t size;
	int ret;

	dovetail_position_log_end(box, &end);
	ret = log_changes_size(box, &pos->queued, &end, &size);
	if (ret < 0) {
		mailbox_set_index_error(box);
		return -1;
	}
	smbox_r->queued = log_pos_to_string(&pos->queued);
	smbox_r->applied = NO_VALUE;
	if (ret == 0) {
		/* nothing is queued from this log: the whole mailbox will be */
		smbox_r->state = "snapshot";
		smbox_r->unqueued = NO_VALUE;
	} else {
		smbox_r->state = size == 0 ? "ok" : "pending";
		smbox_r->unqueued = dec2str(size);
	}
	return 0;
}

static void
status_mailbox_get_applied(const struct status_user *suser,
			   const struct dovetail_position *pos,
			   struct status_mailbox *smbox_r)
{
	if (pos->applied.index_id == 0)
		smbox_r->state = "waiting";
	else if (memcmp(pos->origin, suser->primary_id,
			sizeof(pos->origin)) != 0)
		smbox_r->state = "other-primary";
	else
		smbox_r->state = "ok";
	smbox_r->queued = smbox_r->unqueued = NO_VALUE;
	smbox_r->applied = log_pos_to_string(&pos->applied);
}

static int
status_mailbox_print(const struct status_user *suser, struct mailbox *box)
{
	struct mailbox_status status;
	struct dovetail_position pos;
	struct status_mailbox smbox;

	if (mailbox_open(box) < 0 ||
	    mailbox_get_status(box, STATUS_MESSAGES | STATUS_UIDNEXT,
			       &status) < 0)
		return -1;
	/* its changes are those of the mailboxes it shows */
	if (strcmp(mailbox_get_storage(box)->name, "virtual") == 0)
		return 0;

	(void)dovetail_position_get(box, &pos);
	if (!suser->is_primary)
		status_mailbox_get_applied(suser, &pos, &smbox);
	else if (status_mailbox_get_queued(box, &pos, &smbox) < 0)
		return -1;

	doveadm_print(mailbox_get_vname(box));
	doveadm_print(suser->is_primary ? "primary" : "replica");
	doveadm_print(suser->primary);
	doveadm_print(smbox.state);
	doveadm_print(smbox.queued);
	doveadm_print(smbox.unqueued);
	doveadm_print(smbox.applied);
	doveadm_print_num(status.messages);
	doveadm_print_num(status.uidnext);
	return 0;
}

static int
status_mailbox(struct doveadm_mail_cmd_context *ctx,
	       const struct status_user *suser,
	       const struct mailbox_info *info)
{
	struct mailbox *box;
	int ret;

	box = mailbox_alloc(info->ns->list, info->vname,
			    MAILBOX_FLAG_READONLY | MAILBOX_FLAG_IGNORE_ACLS);
	ret = status_mailbox_print(suser, box);
	if (ret < 0) {
		i_error("Mailbox %s: %s", info->vname,
			mailbox_get_last_internal_error(box, NULL));
		doveadm_mail_failed_mailbox(ctx, box);
	}
	mailbox_free(&box);
	return ret;
}

static int
status_user_init(struct mail_user *user, struct status_user *suser_r)
{
	struct dovetail_settings set;
	const char *error = "dovetail_node: Not set: dovetail needs this "
		"node's name";

	i_zero(suser_r);
	if (dovetail_compat_user_settings_read(user, &set, &error) <= 0) {
		i_error("%s", error);
		return -1;
	}
	suser_r->primary = set.primary;
	suser_r->is_primary = strcmp(set.primary, set.node) == 0;
	dovetail_origin_id(set.primary, suser_r->primary_id);
	return 0;
}

static int
cmd_dovetail_status_run(struct doveadm_mail_cmd_context *ctx,
			struct mail_user *user)
{
	static const char *const all_mailboxes[] = { "*", NULL };
	const enum mailbox_list_iter_flags iter_flags =
		MAILBOX_LIST_ITER_NO_AUTO_BOXES |
		MAILBOX_LIST_ITER_SKIP_ALIASES |
		MAILBOX_LIST_ITER_STAR_WITHIN_NS |
		MAILBOX_LIST_ITER_RETURN_NO_FLAGS;
	struct mailbox_list_iterate_context *iter;
	const struct mailbox_info *info;
	const char *const *patterns;
	struct status_user suser;
	int ret = 0;

	if (status_user_init(user, &suser) < 0) {
		ctx->exit_code = EX_CONFIG;
		return -1;
	}
	patterns = dovetail_compat_mail_cmd_args(ctx, "mailbox-mask");
	if (patterns[0] == NULL)
		patterns = all_mailboxes;

	iter = mailbox_list_iter_init_namespaces(user->namespaces, patterns,
						 MAIL_NAMESPACE_TYPE_PRIVATE,
						 iter_flags);
	while ((info = mailbox_list_iter_next(iter)) != NULL) {
		if ((info->flags & (MAILBOX_NOSELECT |
				    MAILBOX_NONEXISTENT)) != 0)
			continue;
		T_BEGIN {
			if (status_mailbox(ctx, &suser, info) < 0)
				ret = -1;
		} T_END;
	}
	if (mailbox_list_iter_deinit(&iter) < 0) {
		i_error("Listing mailboxes failed: %s",
			mailbox_list_get_last_internal_error(
				user->namespaces->list, NULL));
		doveadm_mail_failed_list(ctx, user->namespaces->list);
		ret = -1;
	}
	return ret;
}

static void cmd_dovetail_status_init(DOVETAIL_COMPAT_MAIL_CMD_INIT_ARGS)
{
	doveadm_print_header("mailbox", "mailbox",
			     DOVEADM_PRINT_HEADER_FLAG_EXPAND);
	doveadm_print_header_simple("role");
	doveadm_print_header_simple("primary");
	doveadm_print_header_simple("state");
	doveadm_print_header_simple("queued");
	doveadm_print_header("unqueued", "unqueued",
			     RIGHT);
	doveadm_print_header_simple("applied");
	doveadm_print_header("messages", "messages",
			     RIGHT);
	doveadm_print_header("uidnext", "uidnext",
			     RIGHT);
}

static struct doveadm_mail_cmd_context *cmd_dovetail_status_alloc(void)
{
	struct doveadm_mail_cmd_context *ctx;

	ctx = doveadm_mail_cmd_alloc(struct doveadm_mail_cmd_context);
	ctx->v.init = cmd_dovetail_status_init;
	ctx->v.run = cmd_dovetail_status_run;
	doveadm_print_init(DOVEADM_PRINT_TYPE_TABLE);
	return ctx;
}

static void cmd_dovetail_status(struct doveadm_cmd_context *cctx)
{
	const char *const *masks, *str;
	struct istream *input;
	bool flag;

	if (doveadm_cmd_param_str(cctx, "user", &str) ||
	    doveadm_cmd_param_bool(cctx, "all-users", &flag) ||
	    doveadm_cmd_param_istream(cctx, "user-file", &input)) {
		doveadm_cmd_ver2_to_mail_cmd_wrapper(cctx);
	} else if (doveadm_cmd_param_array(cctx, "mailbox-mask", &masks) ||
		   doveadm_cmd_param_str(cctx, "socket-path", &str)) {
		/* mailboxes of nobody */
		doveadm_dovetail_help(cctx);
	} else {
		cmd_dovetail_status_node(cctx);
	}
}

struct doveadm_cmd_ver2 doveadm_dovetail_cmd_status = {
	.name = "dovetail status",
	/* both: without a user it is about the node */
	.cmd = cmd_dovetail_status,
	.mail_cmd = cmd_dovetail_status_alloc,
	.usage = "[-a <queue socket path>] | "
		"-u <user>|-A|-F <file> [-S <socket path>] [<mailbox mask> ...]",
DOVEADM_CMD_PARAMS_START
DOVEADM_CMD_MAIL_COMMON
DOVEADM_CMD_PARAM('a', "queue-socket", CMD_PARAM_STR, 0)
DOVEADM_CMD_PARAM('\0', "mailbox-mask", CMD_PARAM_ARRAY, CMD_PARAM_FLAG_POSITIONAL)
DOVEADM_CMD_PARAMS_END
};
