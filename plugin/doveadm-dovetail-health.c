/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* doveadm dovetail health: what dovetail-health knows. */

#include "lib.h"
#include "array.h"
#include "buffer.h"
#include "ioloop.h"
#include "str.h"
#include "str-sanitize.h"
#include "doveadm.h"
#include "doveadm-print.h"
#include "dovetail-frame.h"
#include "dovetail-health.h"
#include "doveadm-dovetail.h"

/* as monitoring plugins have it */
enum {
	CHECK_OK = 0,
	CHECK_WARNING = 1,
	CHECK_CRITICAL = 2,
	CHECK_UNKNOWN = 3,
};

static const struct {
	const char *key;
	enum doveadm_print_header_flags flags;
	/* not in the brief table */
	bool detail;
	/* not shown here */
	bool hidden;
} columns[DOVEADM_HEALTH_COLUMN_COUNT] = {
	[DOVEADM_HEALTH_ABOUT] = { .key = "about" },
	[DOVEADM_HEALTH_PEER] = { .key = "peer" },
	[DOVEADM_HEALTH_DIRECTION] = { .key = "direction" },
	[DOVEADM_HEALTH_STATE] = { .key = "state" },
	[DOVEADM_HEALTH_SINCE] = { .key = "since" },
	[DOVEADM_HEALTH_LAG] = {
		.key = "lag", .flags = DOVEADM_PRINT_HEADER_FLAG_RIGHT_JUSTIFY },
	[DOVEADM_HEALTH_WHO] = { .key = "who" },
	[DOVEADM_HEALTH_REASON] = { .key = "reason" },
	[DOVEADM_HEALTH_REMEDY] = { .key = "remedy", .detail = TRUE },
	[DOVEADM_HEALTH_ENTRIES] = { .key = "entries", .hidden = TRUE },
};

static void health_row_field(struct doveadm_health_row *row, const char *key,
			     const char *value)
{
	unsigned int i;

	for (i = 0; i < N_ELEMENTS(columns); i++) {
		if (strcmp(columns[i].key, key) == 0)
			row->values[i] = value;
	}
}

static bool
health_rows(struct doveadm_health *health, struct dovetail_wire_reader *r)
{
	struct doveadm_health_row *row;
	const char *key, *value;
	uint64_t rows, count;
	unsigned int i;

	(void)dovetail_wire_get_num(r); /* tag */
	rows = dovetail_wire_get_num(r);
	for (; rows > 0 && !r->failed; rows--) {
		row = array_append_space(&health->rows);
		for (i = 0; i < N_ELEMENTS(columns); i++)
			row->values[i] = "";
		count = dovetail_wire_get_num(r);
		for (; count > 0 && !r->failed; count--) {
			key = dovetail_wire_get_str(r, health->queue.pool);
			value = dovetail_wire_get_str(r, health->queue.pool);
			health_row_field(row, key, value);
		}
		if (dovetail_health_state_parse(
				row->values[DOVEADM_HEALTH_STATE],
				&row->state) < 0)
			return FALSE;
	}
	return dovetail_wire_reader_done(r) && array_count(&health->rows) > 0;
}

static bool health_frame(enum dovetail_frame_type type,
			 struct dovetail_wire_reader *r, void *context)
{
	struct doveadm_health *health = context;

	if (type != DOVETAIL_FRAME_STATUS || !health_rows(health, r)) {
		doveadm_queue_fail(&health->queue, EX_PROTOCOL,
			"the dovetail-health service sent what cannot be read");
	}
	return FALSE;
}

static void health_print(const struct doveadm_health *health)
{
	const struct doveadm_health_row *row;
	unsigned int i;
	/* who asks for a formatter, or for more, gets everything */
	bool brief = !doveadm_print_is_initialized() && !doveadm_verbose;

	doveadm_print_init(DOVEADM_PRINT_TYPE_TABLE);
	for (i = 0; i < N_ELEMENTS(columns); i++) {
		if (!columns[i].hidden && (!brief || !columns[i].detail)) {
			doveadm_print_header(columns[i].key, columns[i].key,
					     columns[i].flags);
		}
	}
	array_foreach(&health->rows, row) {
		for (i = 0; i < N_ELEMENTS(columns); i++) {
			if (columns[i].hidden || (brief && columns[i].detail))
				continue;
			doveadm_print(row->values[i][0] == '\0' ?
				DOVEADM_DOVETAIL_NO_VALUE :
				str_sanitize_utf8(row->values[i], SIZE_MAX));
		}
	}
}

/* ---- --check ---- */

static int check_status(enum dovetail_health_state state)
{
	switch (state) {
	case DOVETAIL_HEALTH_OK:
	case DOVETAIL_HEALTH_CATCHING_UP:
		return CHECK_OK;
	case DOVETAIL_HEALTH_LAGGING:
		return CHECK_WARNING;
	case DOVETAIL_HEALTH_UNKNOWN:
		return CHECK_UNKNOWN;
	default:
		return CHECK_CRITICAL;
	}
}

/* One line and the exit status. */
static void health_check(const struct doveadm_health *health)
{
	static const char *const words[] = {
		"OK", "WARNING", "CRITICAL", "UNKNOWN",
	};
	const struct doveadm_health_row *row, *worst = NULL;
	const char *about, *reason, *remedy;
	int status;

	array_foreach(&health->rows, row) {
		if (worst == NULL || row->state > worst->state)
			worst = row;
	}
	status = check_status(worst->state);
	about = worst->values[DOVEADM_HEALTH_PEER][0] == '\0' ?
		worst->values[DOVEADM_HEALTH_ABOUT] :
		t_strdup_printf("%s %s %s", worst->values[DOVEADM_HEALTH_ABOUT],
				worst->values[DOVEADM_HEALTH_DIRECTION],
				worst->values[DOVEADM_HEALTH_PEER]);
	reason = worst->values[DOVEADM_HEALTH_REASON];
	remedy = worst->values[DOVEADM_HEALTH_REMEDY];
	doveadm_print_init(DOVEADM_PRINT_TYPE_FLOW);
	doveadm_print_header("check", "check",
			     DOVEADM_PRINT_HEADER_FLAG_HIDE_TITLE);
	doveadm_print(str_sanitize_utf8(t_strdup_printf(
		"DOVETAIL %s: %s is %s%s%s%s%s", words[status], about,
		dovetail_health_state_name(worst->state),
		*reason == '\0' ? "" : ": ", reason,
		*remedy == '\0' ? "" : ". ", remedy), SIZE_MAX));
	doveadm_exit_code = status;
}

void doveadm_health_ask(struct doveadm_health *health,
			struct doveadm_cmd_context *cctx, const char *user)
{
	buffer_t *question = t_buffer_create(64);
	struct timeout *to;
	size_t offset;

	i_zero(health);
	if (!doveadm_cmd_param_str(cctx, "health-socket", &health->queue.path)) {
		health->queue.path = t_strconcat(doveadm_settings->base_dir,
						 "/dovetail-health", NULL);
	}
	health->queue.pool = pool_alloconly_create("dovetail health", 4096);
	health->queue.service = "dovetail-health";
	health->queue.frame = health_frame;
	health->queue.context = health;
	p_array_init(&health->rows, health->queue.pool, 16);

	offset = dovetail_frame_begin(question, DOVETAIL_FRAME_HEALTH_GET);
	dovetail_wire_put_num(question, 1);
	dovetail_wire_put_str(question, user);
	dovetail_frame_end(question, offset);
	if (doveadm_queue_open(&health->queue, question) < 0)
		return;
	to = timeout_add(DOVEADM_QUEUE_TIMEOUT_MSECS, doveadm_queue_timeout,
			 &health->queue);
	doveadm_queue_run(&health->queue);
	timeout_remove(&to);
	doveadm_queue_close(&health->queue);
}

static void cmd_dovetail_health(struct doveadm_cmd_context *cctx)
{
	struct doveadm_health health;
	const char *user = "";
	bool all = FALSE, check = FALSE;

	if (doveadm_dovetail_has_args(cctx)) {
		doveadm_dovetail_help(cctx);
		return;
	}
	(void)doveadm_cmd_param_str(cctx, "user", &user);
	(void)doveadm_cmd_param_bool(cctx, "all-users", &all);
	(void)doveadm_cmd_param_bool(cctx, "check", &check);

	doveadm_health_ask(&health, cctx, all ? "*" : user);
	if (health.queue.error == NULL && check)
		health_check(&health);
	else if (health.queue.error == NULL)
		health_print(&health);
	else {
		doveadm_queue_report(&health.queue);
		if (check)
			doveadm_exit_code = CHECK_UNKNOWN;
	}
	pool_unref(&health.queue.pool);
}

struct doveadm_cmd_ver2 doveadm_dovetail_cmd_health = {
	.name = "dovetail health",
	.cmd = cmd_dovetail_health,
	.usage = "[-u <user>|-A] [--check] [-a <health socket path>]",
DOVEADM_CMD_PARAMS_START
DOVEADM_CMD_PARAM('u', "user", CMD_PARAM_STR, 0)
DOVEADM_CMD_PARAM('A', "all-users", CMD_PARAM_BOOL, 0)
DOVEADM_CMD_PARAM('\0', "check", CMD_PARAM_BOOL, 0)
DOVEADM_CMD_PARAM('a', "health-socket", CMD_PARAM_STR, 0)
DOVEADM_DOVETAIL_NO_ARGS_PARAM
DOVEADM_CMD_PARAMS_END
};
