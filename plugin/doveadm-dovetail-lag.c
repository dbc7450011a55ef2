/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* doveadm dovetail lag: how far replicas are behind, once or (--follow) every second:
   a picture that changes on a terminal, else rows. */

#include "lib.h"
#include "array.h"
#include "lib-signals.h"
#include "ostream.h"
#include "str.h"
#include "str-sanitize.h"
#include "doveadm.h"
#include "doveadm-print.h"
#include "dovetail-compat.h"
#include "doveadm-dovetail.h"

#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#define LAG_INTERVAL_MSECS 1000
/* what the picture remembers of each direction */
#define LAG_SAMPLES 60

/* One direction of one peer; the picture keeps it. */
struct lag_line {
	char *peer, *direction;
	/* seconds; negative: not known */
	double samples[LAG_SAMPLES];
	bool seen;
};

struct lag_picture {
	ARRAY(struct lag_line) lines;
};

static volatile sig_atomic_t lag_stopped;

static void lag_signal(const siginfo_t *si ATTR_UNUSED,
		       void *context ATTR_UNUSED)
{
	lag_stopped = 1;
}

static bool row_is_direction(const struct doveadm_health_row *row)
{
	return strcmp(row->values[DOVEADM_HEALTH_DIRECTION], "to") == 0 ||
		strcmp(row->values[DOVEADM_HEALTH_DIRECTION], "from") == 0;
}

static const char *time_now(void)
{
	time_t now = time(NULL);
	struct tm *tm = gmtime(&now);

	return t_strdup_printf("%04d-%02d-%02dT%02d:%02d:%02dZ",
			       tm->tm_year + 1900, tm->tm_mon + 1, tm->tm_mday,
			       tm->tm_hour, tm->tm_min, tm->tm_sec);
}

/* ---- rows ---- */

static void lag_print_headers(void)
{
	/* Columns as wide as their values, of which those to come are not
	   known. Other formatters show the titles as they are. */
	bool table = !doveadm_print_is_initialized();

	doveadm_print_init(DOVEADM_PRINT_TYPE_TABLE);
	doveadm_print_header("time", table ? "time                " : "time",
			     0);
	doveadm_print_header_simple("node");
	doveadm_print_header_simple("peer");
	doveadm_print_header_simple("direction");
	doveadm_print_header("state", table ? "state      " : "state", 0);
	doveadm_print_header("lag", table ? "    lag" : "lag",
			     DOVEADM_PRINT_HEADER_FLAG_RIGHT_JUSTIFY);
	doveadm_print_header("entries", "entries",
			     DOVEADM_PRINT_HEADER_FLAG_RIGHT_JUSTIFY);
}

static void lag_print_value(const char *value)
{
	doveadm_print(*value == '\0' ? DOVEADM_DOVETAIL_NO_VALUE :
		      str_sanitize_utf8(value, SIZE_MAX));
}

static void lag_print(const struct doveadm_health *health)
{
	const struct doveadm_health_row *row;
	const char *now = time_now();

	array_foreach(&health->rows, row) {
		if (!row_is_direction(row))
			continue;
		doveadm_print(now);
		lag_print_value(row->values[DOVEADM_HEALTH_ABOUT]);
		lag_print_value(row->values[DOVEADM_HEALTH_PEER]);
		lag_print_value(row->values[DOVEADM_HEALTH_DIRECTION]);
		lag_print_value(row->values[DOVEADM_HEALTH_STATE]);
		lag_print_value(row->values[DOVEADM_HEALTH_LAG]);
		lag_print_value(row->values[DOVEADM_HEALTH_ENTRIES]);
	}
}

/* ---- the picture ---- */

static struct lag_line *
picture_line(struct lag_picture *picture, const struct doveadm_health_row *row)
{
	const char *peer = row->values[DOVEADM_HEALTH_PEER];
	const char *direction = row->values[DOVEADM_HEALTH_DIRECTION];
	struct lag_line *line;
	unsigned int i;

	array_foreach_modifiable(&picture->lines, line) {
		if (strcmp(line->peer, peer) == 0 &&
		    strcmp(line->direction, direction) == 0)
			return line;
	}
	line = array_append_space(&picture->lines);
	line->peer = i_strdup(peer);
	line->direction = i_strdup(direction);
	for (i = 0; i < LAG_SAMPLES; i++)
		line->samples[i] = -1;
	return line;
}

/* Steps of the picture: up to 10 ms, 30 ms, 100 ms, 300 ms, 1 s, 5 s, 30 s, more. */
static unsigned int picture_step(double secs)
{
	static const double steps[] = { 0.01, 0.03, 0.1, 0.3, 1, 5, 30 };
	unsigned int i;

	for (i = 0; i < N_ELEMENTS(steps) && secs > steps[i]; i++) ;
	return i;
}

static void picture_samples(string_t *str, const struct lag_line *line)
{
	/* doveadm has no locale, so it cannot know what else would be shown */
	static const char marks[] = "_.:-=+*#";
	unsigned int i;

	for (i = 0; i < LAG_SAMPLES; i++) {
		str_append_c(str, line->samples[i] < 0 ? ' ' :
			     marks[picture_step(line->samples[i])]);
	}
}

static void picture_row(struct lag_picture *picture, string_t *str,
			const struct doveadm_health_row *row)
{
	struct lag_line *line = picture_line(picture, row);
	const char *lag = row->values[DOVEADM_HEALTH_LAG];
	const char *name = t_strdup_printf("%s %s %s",
		row->values[DOVEADM_HEALTH_ABOUT], line->direction, line->peer);

	memmove(line->samples, line->samples + 1,
		sizeof(line->samples) - sizeof(line->samples[0]));
	line->samples[LAG_SAMPLES - 1] = *lag == '\0' ? -1 : strtod(lag, NULL);
	str_printfa(str, "%-18s %-12s %9s s %8s  ",
		    str_sanitize_utf8(name, 64),
		    row->values[DOVEADM_HEALTH_STATE],
		    *lag == '\0' ? "?" : lag,
		    row->values[DOVEADM_HEALTH_ENTRIES]);
	picture_samples(str, line);
	str_append(str, "\033[K\n");
	if (row->state > DOVETAIL_HEALTH_CATCHING_UP &&
	    row->values[DOVEADM_HEALTH_REASON][0] != '\0') {
		str_printfa(str, "  %s\033[K\n", str_sanitize_utf8(
			row->values[DOVEADM_HEALTH_REASON], 300));
	}
}

/* From the top of the screen; each line ends with clearing what was there. */
static void
picture_draw(struct lag_picture *picture, const struct doveadm_health *health)
{
	const struct doveadm_health_row *row;
	string_t *str = t_str_new(1024);

	str_printfa(str, "\033[H%s   Ctrl-C ends\033[K\n\033[K\n",
		    time_now());
	if (health->queue.error != NULL) {
		str_printfa(str, "%s: %s\033[K\n", health->queue.path,
			    str_sanitize_utf8(health->queue.error, 300));
	} else {
		str_printfa(str, "%-18s %-12s %11s %8s  %s\033[K\n", "",
			    "state", "lag", "entries", "last minute");
		array_foreach(&health->rows, row) T_BEGIN {
			if (row_is_direction(row))
				picture_row(picture, str, row);
		} T_END;
	}
	str_append(str, "\033[J");
	(void)fwrite(str_data(str), 1, str_len(str), stdout);
	(void)fflush(stdout);
}

static void picture_init(struct lag_picture *picture)
{
	i_array_init(&picture->lines, 4);
	/* a screen of its own, without a cursor: what was there comes back */
	fputs("\033[?1049h\033[?25l\033[2J", stdout);
}

static void picture_deinit(struct lag_picture *picture)
{
	struct lag_line *line;

	fputs("\033[?25h\033[?1049l", stdout);
	(void)fflush(stdout);
	array_foreach_modifiable(&picture->lines, line) {
		i_free(line->peer);
		i_free(line->direction);
	}
	array_free(&picture->lines);
}

/* ---- follow ---- */

/* Until a signal, or until nobody reads. */
static void lag_follow(struct doveadm_cmd_context *cctx)
{
	/* who asks for a formatter wants rows */
	bool table = !doveadm_print_is_initialized();
	bool terminal = table && isatty(STDOUT_FILENO) > 0;
	struct doveadm_health health;
	struct lag_picture picture;
	bool go_on = TRUE;

	if (terminal)
		picture_init(&picture);
	else
		lag_print_headers();
	lib_signals_set_handler(SIGINT, 0, lag_signal, NULL);
	lib_signals_set_handler(SIGTERM, 0, lag_signal, NULL);
	while (go_on && lag_stopped == 0) T_BEGIN {
		doveadm_health_ask(&health, cctx, "");
		if (terminal)
			picture_draw(&picture, &health);
		else if (health.queue.error == NULL) {
			lag_print(&health);
			/* It begins to show rows then. To JSON it would be
			   the end. */
			if (table)
				doveadm_print_flush();
			/* formatters use either */
			go_on = o_stream_flush(doveadm_print_ostream) >= 0 &&
				fflush(stdout) == 0 && ferror(stdout) == 0;
		} else {
			/* it may come back */
			doveadm_queue_report(&health.queue);
		}
		pool_unref(&health.queue.pool);
		if (go_on && lag_stopped == 0)
			(void)poll(NULL, 0, LAG_INTERVAL_MSECS);
	} T_END;
	lib_signals_unset_handler(SIGINT, lag_signal, NULL);
	lib_signals_unset_handler(SIGTERM, lag_signal, NULL);
	lag_stopped = 0;
	if (terminal)
		picture_deinit(&picture);
	/* that it has to be ended is no failure */
	doveadm_exit_code = EX_OK;
}

static void cmd_dovetail_lag(struct doveadm_cmd_context *cctx)
{
	struct doveadm_health health;
	bool follow = FALSE;

	if (doveadm_dovetail_has_args(cctx)) {
		doveadm_dovetail_help(cctx);
		return;
	}
	(void)doveadm_cmd_param_bool(cctx, "follow", &follow);
	if (follow && cctx->conn_type != DOVEADM_CONNECTION_TYPE_CLI) {
		i_error("--follow is for the command line: ask again instead");
		doveadm_exit_code = EX_USAGE;
	} else if (follow) {
		lag_follow(cctx);
	} else {
		doveadm_health_ask(&health, cctx, "");
		if (health.queue.error == NULL) {
			lag_print_headers();
			lag_print(&health);
		} else {
			doveadm_queue_report(&health.queue);
		}
		pool_unref(&health.queue.pool);
	}
}

struct doveadm_cmd_ver2 doveadm_dovetail_cmd_lag = {
	.name = "dovetail lag",
	.cmd = cmd_dovetail_lag,
	.usage = "[--follow] [-a <health socket path>]",
DOVEADM_CMD_PARAMS_START
DOVEADM_CMD_PARAM('\0', "follow", CMD_PARAM_BOOL, 0)
DOVEADM_CMD_PARAM('a', "health-socket", CMD_PARAM_STR, 0)
DOVEADM_DOVETAIL_NO_ARGS_PARAM
DOVEADM_CMD_PARAMS_END
};
