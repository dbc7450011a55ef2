/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* Exim's ${readsocket}: one line with a recipient, or an empty one, ended by a line
   feed or by closing that direction. The answer is one line that ${extract} can take
   apart:

     action=accept state=lagging lag=6.120 since=1764000000 text="lagging: b ..."

   lag: seconds, or "unknown". Then we close. */

#include "lib.h"
#include "array.h"
#include "hash.h"
#include "str.h"
#include "dovetail-health-private.h"

#define EXIM_REQUEST_MAX_SIZE 2048
#define EXIM_IDLE_MSECS (10 * 1000)

static const char *lag_str(void)
{
	uint64_t msecs = health_state_lag();

	return msecs == DOVETAIL_HEALTH_NEVER ? "unknown" :
		t_strdup_printf("%"PRIu64".%03u", msecs / 1000,
				(unsigned int)(msecs % 1000));
}

static ssize_t
exim_input(struct health_conn *conn, const unsigned char *data, size_t size,
	   bool eof, const char **error_r)
{
	const unsigned char *lf = memchr(data, '\n', size);
	struct health_answer answer;
	const char *line, *str;

	if (lf == NULL && !eof)
		return 0;
	line = t_strdup_until(data, lf != NULL ? lf : data + size);
	if (strlen(line) != (size_t)((lf != NULL ? lf : data + size) - data)) {
		*error_r = "There is a NUL in it";
		return -1;
	}
	line = t_str_rtrim(line, "\r ");
	health_answer(line, &answer);
	str = t_strdup_printf("action=%s state=%s lag=%s since=%s text=\"%s\"\n",
		health_action_name(answer.action),
		dovetail_health_state_name(answer.state), lag_str(),
		dec2str(health_state_since(answer.health)),
		t_str_replace(t_str_replace(health_answer_text(&answer),
					    '"', '\''), '\\', '/'));
	health_conn_send(conn, str, strlen(str));
	health_conn_finish(conn);
	return size;
}

const struct health_protocol health_protocol_exim = {
	.type = "exim",
	.max_request_size = EXIM_REQUEST_MAX_SIZE,
	.idle_msecs = EXIM_IDLE_MSECS,
	.may_be_empty = TRUE,
	.input = exim_input,
};
