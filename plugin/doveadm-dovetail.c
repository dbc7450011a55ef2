/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* doveadm dovetail VERB: what the administrator sees and does by hand. Each verb
   reports a failure with i_error() and doveadm_exit_code, never with
   i_fatal(), so that doveadm's server and HTTP API survive it. */

#include "lib.h"
#include "array.h"
#include "buffer.h"
#include "eacces-error.h"
#include "hex-binary.h"
#include "ioloop.h"
#include "istream.h"
#include "master-service.h"
#include "net.h"
#include "str.h"
#include "str-sanitize.h"
#include "write-full.h"
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
#include "dovetail-keyring.h"
#include "dovetail-position.h"
#include "dovetail-settings.h"

#include <unistd.h>

/* From connecting to the last byte of the answer. */
#define QUEUE_TIMEOUT_MSECS (5 * 1000)
#define QUEUE_CONNECT_RETRY_MSECS 1000

/* What stands where there is no value. */
#define NO_VALUE "-"

#define RIGHT DOVEADM_PRINT_HEADER_FLAG_RIGHT_JUSTIFY

extern const char *doveadm_dovetail_plugin_version;
void doveadm_dovetail_plugin_init(struct module *module);
void doveadm_dovetail_plugin_deinit(void);

/* Arguments that make no sense: tell which ones do. */
static void help(const struct doveadm_cmd_context *cctx)
{
	if (cctx->conn_type == DOVEADM_CONNECTION_TYPE_CLI)
		help_ver2(cctx->cmd); /* does not return */
	i_error("Usage: doveadm %s %s", cctx->cmd->name, cctx->cmd->usage);
	doveadm_exit_code = EX_USAGE;
}

static bool has_args(const struct doveadm_cmd_context *cctx)
{
	const char *const *args;

	return doveadm_cmd_param_array(cctx, "args", &args);
}

static void settings_error(const char *error)
{
	i_error("%s%s", error, dovetail_compat_doveadm_settings_hint());
	doveadm_exit_code = EX_CONFIG;
}

/* Says what is wrong when it returns -1. */
static int
doveadm_settings_read(struct dovetail_settings *set_r)
{
	const char *error;

	if (dovetail_compat_doveadm_settings_read(set_r, &error) < 0) {
		settings_error(error);
		return -1;
	}
	return 0;
}

/* ---- keygen ---- */

static void cmd_dovetail_keygen(struct doveadm_cmd_context *cctx)
{
	const char *node, *key_dir, *key, *peers, *line, *error;
	bool replace = FALSE;

	if (has_args(cctx)) {
		help(cctx);
		return;
	}
	(void)doveadm_cmd_param_bool(cctx, "rotate", &replace);

	/* The key is the first thing a new node needs: only the settings that
	   it depends on must be there already. */
	node = dovetail_compat_doveadm_setting(NULL, "dovetail_node");
	if (node == NULL || !dovetail_node_name_is_valid(node)) {
		settings_error(t_strdup_printf(
			"dovetail_node: %s: it must be this node's name, "
			"1 to %d of a-z 0-9 . -",
			node == NULL || *node == '\0' ? "Not set" :
			t_strdup_printf("'%s'", str_sanitize(node, 128)),
			DOVETAIL_NODE_NAME_MAX));
		return;
	}
	key_dir = dovetail_compat_doveadm_setting(NULL, "dovetail_key_dir");
	if (key_dir == NULL || *key_dir == '\0')
		key_dir = DOVETAIL_KEY_DIR_DEFAULT;
	else if (*key_dir != '/') {
		settings_error(t_strdup_printf(
			"dovetail_key_dir: '%s' does not begin with /",
			str_sanitize(key_dir, 128)));
		return;
	}
	key = t_strdup_printf("%s/%s.key", key_dir, node);
	if (!replace && access(key, F_OK) == 0) {
		i_error("%s exists already; to replace it, use -r and do what "
			"doveadm-dovetail(1) says about it", key);
		doveadm_exit_code = EX_CANTCREAT;
		return;
	}

	if (dovetail_keygen(key_dir, node, replace, &line, &error) < 0) {
		i_error("%s", error);
		doveadm_exit_code = EX_CANTCREAT;
		return;
	}

	doveadm_print_init(DOVEADM_PRINT_TYPE_FLOW);
	doveadm_print_header("public_key", "public_key",
			     DOVEADM_PRINT_HEADER_FLAG_HIDE_TITLE);
	doveadm_print(line);
	doveadm_print_flush();

	peers = dovetail_compat_doveadm_setting(NULL, "dovetail_peers");
	i_info("The public key is in %s/%s.pub: copy that file into "
	       "dovetail_key_dir of %s%s", key_dir, node,
	       peers == NULL || *peers == '\0' ? "every peer" : "the peers: ",
	       peers == NULL ? "" : peers);
	if (replace) {
		i_info("Then run doveadm reload on the peers first and here "
		       "last. The old key's line can be removed from %s.pub "
		       "everywhere when nothing sealed with it is waiting any "
		       "more", node);
	}
}

/* ---- peers ---- */

static void
peers_print(const char *node, const char *key_id, const char *path,
	    const char *status)
{
	doveadm_print(node);
	doveadm_print(key_id);
	doveadm_print(path);
	doveadm_print(status);
}

static const char *key_id_to_string(const struct dovetail_public_key *key)
{
	return binary_to_hex(key->id, sizeof(key->id));
}

/* Ids of the keys of the keyring's only peer. */
static const char *peer_key_ids(const struct dovetail_keyring *keyring)
{
	const struct dovetail_public_key *keys;
	unsigned int i, count;
	string_t *str = t_str_new(64);

	keys = dovetail_keyring_peers(keyring, &count);
	for (i = 0; i < count; i++) {
		if (i > 0)
			str_append_c(str, ',');
		str_append(str, key_id_to_string(&keys[i]));
	}
	return str_c(str);
}

/* This node's own key, without which no peer's can be used. */
static bool peers_print_self(const struct dovetail_settings *set)
{
	static const char *const no_peers[] = { NULL };
	struct dovetail_keyring *keyring;
	const char *path, *error;

	path = t_strdup_printf("%s/%s.key", set->key_dir, set->node);
	if (dovetail_keyring_open(set->key_dir, set->node, no_peers,
				  &keyring, &error) < 0) {
		peers_print(set->node, NO_VALUE, path, error);
		return FALSE;
	}
	peers_print(set->node,
		    key_id_to_string(dovetail_keyring_self(keyring)),
		    path, "ok");
	dovetail_keyring_close(&keyring);
	return TRUE;
}

static bool
peers_print_peer(const struct dovetail_settings *set, const char *peer,
		 bool self_ok)
{
	const char *peers[] = { peer, NULL };
	struct dovetail_keyring *keyring;
	const char *path, *error;

	path = t_strdup_printf("%s/%s.pub", set->key_dir, peer);
	if (!self_ok) {
		peers_print(peer, NO_VALUE, path,
			    "not checked: this node's own key comes first");
		return FALSE;
	}
	if (dovetail_keyring_open(set->key_dir, set->node, peers,
				  &keyring, &error) < 0) {
		peers_print(peer, NO_VALUE, path, error);
		return FALSE;
	}
	peers_print(peer, peer_key_ids(keyring), path, "ok");
	dovetail_keyring_close(&keyring);
	return TRUE;
}

static void cmd_dovetail_peers(struct doveadm_cmd_context *cctx)
{
	struct dovetail_settings set;
	struct dovetail_keyring *keyring;
	const char *const *peer, *error;
	bool self_ok, all_ok;

	if (has_args(cctx)) {
		help(cctx);
		return;
	}
	if (doveadm_settings_read(&set) < 0)
		return;

	doveadm_print_init(DOVEADM_PRINT_TYPE_TABLE);
	doveadm_print_header_simple("node");
	doveadm_print_header_simple("key_id");
	doveadm_print_header_simple("key_file");
	doveadm_print_header("status", "status",
			     DOVEADM_PRINT_HEADER_FLAG_EXPAND);

	all_ok = self_ok = peers_print_self(&set);
	for (peer = set.peers; *peer != NULL; peer++) T_BEGIN {
		if (!peers_print_peer(&set, *peer, self_ok))
			all_ok = FALSE;
	} T_END;

	if (!all_ok) {
		doveadm_exit_code = EX_CONFIG;
		return;
	}
	/* what only shows when all of them are looked at together */
	if (dovetail_keyring_open(set.key_dir, set.node, set.peers,
				  &keyring, &error) < 0) {
		i_error("%s", error);
		doveadm_exit_code = EX_CONFIG;
		return;
	}
	dovetail_keyring_close(&keyring);
}

/* ---- status: of the node, as the queue service tells it ---- */

struct status_field {
	const char *key, *value;
};

struct status_row {
	const struct status_field *fields;
	unsigned int count;
};

struct status_conn {
	pool_t pool;
	const char *path;
	struct istream *input;

	ARRAY(struct status_row) rows;
	/* set at the end, when it failed */
	const char *error;
	int exit_code;

	bool welcomed;
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
	{ "set_aside", RIGHT, STATUS_SHOW_NONZERO },
	{ "rejected", RIGHT, STATUS_SHOW_NONZERO },
	{ "rejected_reasons", 0, STATUS_SHOW_NONZERO },
	{ "redis_since", 0, STATUS_SHOW_DETAIL },
};
/* The longest text; a table that is too wide looks best with it at the end. */
static const struct status_column status_last_column = {
	"error", 0, STATUS_SHOW_ALWAYS
};

static void
status_conn_failed(struct status_conn *conn, int exit_code, const char *error)
{
	conn->error = p_strdup(conn->pool, error);
	conn->exit_code = exit_code;
	io_loop_stop(current_ioloop);
}

static void
status_conn_welcome(struct status_conn *conn, struct dovetail_wire_reader *r)
{
	uint64_t version = dovetail_wire_get_num(r);

	if (r->failed || version == 0) {
		status_conn_failed(conn, EX_PROTOCOL,
				   "not a dovetail-queue service");
	} else if (version != DOVETAIL_FRAME_VERSION) {
		status_conn_failed(conn, EX_PROTOCOL, t_strdup_printf(
			"the dovetail-queue service speaks protocol version "
			"%"PRIu64", this doveadm version %d: restart Dovecot",
			version, DOVETAIL_FRAME_VERSION));
	} else {
		conn->welcomed = TRUE;
	}
}

static void
status_conn_reply(struct status_conn *conn, struct dovetail_wire_reader *r)
{
	const char *text;

	(void)dovetail_wire_get_num(r); /* tag */
	(void)dovetail_wire_get_u8(r);
	text = dovetail_wire_get_str(r, pool_datastack_create());
	status_conn_failed(conn, EX_NOPERM, t_strdup_printf(
		"the dovetail-queue service refused: %s", text));
}

static void
status_conn_status(struct status_conn *conn, struct dovetail_wire_reader *r)
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
			field.key = dovetail_wire_get_str(r, conn->pool);
			field.value = dovetail_wire_get_str(r, conn->pool);
			array_push_back(&fields, &field);
		}
		if (array_count(&fields) == 0)
			continue;
		row = array_append_space(&conn->rows);
		row->count = array_count(&fields);
		row->fields = p_memdup(conn->pool, array_front(&fields),
				       sizeof(field) * row->count);
	}
	if (!dovetail_wire_reader_done(r)) {
		status_conn_failed(conn, EX_PROTOCOL,
				   "the dovetail-queue service sent a status "
				   "that cannot be read");
		return;
	}
	io_loop_stop(current_ioloop);
}

/* Returns FALSE when nothing more is to be read. */
static bool
status_conn_frame(struct status_conn *conn, enum dovetail_frame_type type,
		  const unsigned char *payload, size_t size)
{
	struct dovetail_wire_reader r;

	dovetail_wire_reader_init(&r, payload, size);
	if (!conn->welcomed) {
		if (type != DOVETAIL_FRAME_WELCOME) {
			status_conn_failed(conn, EX_PROTOCOL,
					   "not a dovetail-queue service");
		} else {
			status_conn_welcome(conn, &r);
		}
		return conn->welcomed;
	}
	switch (type) {
	case DOVETAIL_FRAME_STATUS:
		status_conn_status(conn, &r);
		return FALSE;
	case DOVETAIL_FRAME_REPLY:
		status_conn_reply(conn, &r);
		return FALSE;
	default:
		/* not for us */
		return TRUE;
	}
}

static void status_conn_input(struct status_conn *conn)
{
	enum dovetail_frame_type type;
	const unsigned char *data, *payload;
	size_t size, payload_size, frame_size;
	const char *error;
	bool more = TRUE;
	int ret;

	if (i_stream_read(conn->input) == -1) {
		/* reset: it had not even read the question */
		status_conn_failed(conn, EX_TEMPFAIL,
			conn->input->stream_errno != 0 &&
			conn->input->stream_errno != ECONNRESET ?
			t_strdup_printf("read() failed: %s",
				i_stream_get_error(conn->input)) :
			"the dovetail-queue service hung up without an "
			"answer; its reason is in Dovecot's log");
		return;
	}
	while (more) {
		data = i_stream_get_data(conn->input, &size);
		ret = dovetail_frame_parse(data, size, &type, &payload,
					   &payload_size, &frame_size, &error);
		if (ret == 0)
			break;
		if (ret < 0) {
			status_conn_failed(conn, EX_PROTOCOL, t_strdup_printf(
				"not a dovetail-queue service: %s", error));
			break;
		}
		T_BEGIN {
			more = status_conn_frame(conn, type, payload,
						 payload_size);
		} T_END;
		i_stream_skip(conn->input, frame_size);
	}
}

static void status_conn_timeout(struct status_conn *conn)
{
	status_conn_failed(conn, EX_TEMPFAIL, t_strdup_printf(
		"the dovetail-queue service did not answer within %d s",
		QUEUE_TIMEOUT_MSECS / 1000));
}

static int status_conn_ask(struct status_conn *conn, int fd)
{
	buffer_t *buf = t_buffer_create(64);
	size_t offset;

	offset = dovetail_frame_begin(buf, DOVETAIL_FRAME_HELLO);
	dovetail_wire_put_num(buf, DOVETAIL_FRAME_VERSION);
	dovetail_wire_put_num(buf, getpid());
	dovetail_wire_put_u8(buf, DOVETAIL_CLIENT_ADMIN);
	dovetail_frame_end(buf, offset);

	offset = dovetail_frame_begin(buf, DOVETAIL_FRAME_STATUS_GET);
	dovetail_wire_put_num(buf, 1);
	dovetail_frame_end(buf, offset);

	/* Far less than what the socket of a new connection takes at once. If
	   the other side is gone already, reading tells. */
	if (write_full(fd, buf->data, buf->used) < 0 &&
	    errno != EPIPE && errno != ECONNRESET) {
		conn->error = p_strdup_printf(conn->pool,
					      "write() failed: %m");
		conn->exit_code = EX_TEMPFAIL;
		return -1;
	}
	return 0;
}

/* Returns the connection's descriptor, or -1 and sets error and exit_code. */
static int status_conn_connect(struct status_conn *conn)
{
	int fd;

	fd = net_connect_unix_with_retries(conn->path,
					   QUEUE_CONNECT_RETRY_MSECS);
	if (fd != -1) {
		net_set_nonblock(fd, TRUE);
		return fd;
	}
	if (errno == EACCES) {
		conn->error = p_strdup(conn->pool,
			eacces_error_get("net_connect_unix", conn->path));
		conn->exit_code = EX_NOPERM;
	} else {
		conn->error = p_strdup_printf(conn->pool,
			"the dovetail-queue service is not reachable: "
			"connect() failed: %m (is Dovecot running, with "
			"service dovetail-queue in its configuration?)");
		conn->exit_code = EX_TEMPFAIL;
	}
	return -1;
}

/* Fills conn->rows. Returns 0, or -1 with conn->error and exit_code set. */
static int status_conn_run(struct status_conn *conn)
{
	struct ioloop *ioloop;
	struct io *io;
	struct timeout *to;
	int fd;

	if ((fd = status_conn_connect(conn)) == -1)
		return -1;
	if (status_conn_ask(conn, fd) < 0) {
		i_close_fd(&fd);
		return -1;
	}

	ioloop = io_loop_create();
	conn->input = i_stream_create_fd_autoclose(&fd,
		DOVETAIL_FRAME_HEADER_SIZE + DOVETAIL_FRAME_MAX_SIZE);
	io = io_add_istream(conn->input, status_conn_input, conn);
	to = timeout_add(QUEUE_TIMEOUT_MSECS, status_conn_timeout, conn);
	io_loop_run(ioloop);
	timeout_remove(&to);
	io_remove(&io);
	i_stream_destroy(&conn->input);
	io_loop_destroy(&ioloop);
	return conn->error == NULL ? 0 : -1;
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
status_shows(const struct status_conn *conn, const struct status_column *column,
	     bool brief)
{
	const struct status_row *row;
	const char *value;
	bool found = FALSE, nonzero = FALSE;

	array_foreach(&conn->rows, row) {
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
status_add_column(const struct status_conn *conn,
		  const struct status_column *column, bool brief,
		  ARRAY_TYPE(const_string) *keys)
{
	if (status_shows(conn, column, brief)) {
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
status_print_headers(const struct status_conn *conn, bool brief,
		     ARRAY_TYPE(const_string) *keys)
{
	const struct status_row *row;
	unsigned int i;

	for (i = 0; i < N_ELEMENTS(status_columns); i++)
		status_add_column(conn, &status_columns[i], brief, keys);
	array_foreach(&conn->rows, row) {
		for (i = 0; i < row->count; i++) {
			const struct status_column column = {
				row->fields[i].key, 0, STATUS_SHOW_NONZERO
			};

			if (!status_column_is_known(column.key) &&
			    array_lsearch(keys, &column.key,
					  i_strcmp_p) == NULL)
				status_add_column(conn, &column, brief, keys);
		}
	}
	status_add_column(conn, &status_last_column, brief, keys);
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

static void status_print(const struct status_conn *conn)
{
	const struct status_row *row;
	ARRAY_TYPE(const_string) keys;
	const char *key, *value;
	/* who asks for a formatter, or for more, gets everything */
	bool brief = !doveadm_print_is_initialized() && !doveadm_verbose;

	t_array_init(&keys, 16);
	doveadm_print_init(DOVEADM_PRINT_TYPE_TABLE);
	status_print_headers(conn, brief, &keys);
	array_foreach(&conn->rows, row) {
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
	struct status_conn conn;

	i_zero(&conn);
	if (!doveadm_cmd_param_str(cctx, "queue-socket", &conn.path)) {
		if (doveadm_settings_read(&set) < 0)
			return;
		conn.path = set.queue_socket;
	}

	conn.pool = pool_alloconly_create("dovetail status", 4096);
	p_array_init(&conn.rows, conn.pool, 16);
	if (status_conn_run(&conn) == 0)
		status_print(&conn);
	else {
		i_error("%s: %s", conn.path, conn.error);
		doveadm_exit_code = conn.exit_code;
	}
	pool_unref(&conn.pool);
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
		help(cctx);
	} else {
		cmd_dovetail_status_node(cctx);
	}
}

/* ---- registration ---- */

/* for has_args() */
#define NO_ARGS_PARAM \
	DOVEADM_CMD_PARAM('\0', "args", CMD_PARAM_ARRAY, \
		CMD_PARAM_FLAG_POSITIONAL | CMD_PARAM_FLAG_DO_NOT_EXPOSE)

static struct doveadm_cmd_ver2 doveadm_dovetail_cmds[] = {
{
	.name = "dovetail keygen",
	.cmd = cmd_dovetail_keygen,
	.usage = "[-r]",
DOVEADM_CMD_PARAMS_START
DOVEADM_CMD_PARAM('r', "rotate", CMD_PARAM_BOOL, 0)
NO_ARGS_PARAM
DOVEADM_CMD_PARAMS_END
},
{
	.name = "dovetail peers",
	.cmd = cmd_dovetail_peers,
	.usage = "",
DOVEADM_CMD_PARAMS_START
NO_ARGS_PARAM
DOVEADM_CMD_PARAMS_END
},
{
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
},
};

const char *doveadm_dovetail_plugin_version = DOVECOT_ABI_VERSION;

void doveadm_dovetail_plugin_init(struct module *module ATTR_UNUSED)
{
	const char *error;
	unsigned int i;

	if (!dovetail_compat_version_is_ours(master_service, &error)) {
		i_error("%s", error);
		return;
	}
	for (i = 0; i < N_ELEMENTS(doveadm_dovetail_cmds); i++)
		doveadm_cmd_register_ver2(&doveadm_dovetail_cmds[i]);
}

void doveadm_dovetail_plugin_deinit(void)
{
}
