/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* Postfix' check_policy_service (SMTPD_POLICY_README): lines NAME=VALUE, the end is
   an empty line; the answer is "action=...", and an empty line. The connection stays
   open. Whoever makes no sense gets no answer: what Postfix does then is what its
   configuration says (default_action). */

#include "lib.h"
#include "array.h"
#include "hash.h"
#include "str.h"
#include "dovetail-health-private.h"

/* Postfix sends about 30 attributes, most of them short. */
#define POLICY_REQUEST_MAX_SIZE (16 * 1024)
/* It closes by itself before that (smtpd_policy_service_max_idle = 300s). */
#define POLICY_IDLE_MSECS (600 * 1000)

struct policy_request {
	const char *request, *recipient;
};

/* Returns FALSE when the line is no attribute. */
static bool policy_attribute(struct policy_request *request,
			     const unsigned char *line, size_t len)
{
	const unsigned char *value = memchr(line, '=', len);
	const char *name;

	if (value == NULL || value == line ||
	    memchr(line, '\0', len) != NULL)
		return FALSE;
	name = t_strdup_until(line, value);
	value++;
	if (strcmp(name, "request") == 0)
		request->request = t_strdup_until(value, line + len);
	else if (strcmp(name, "recipient") == 0)
		request->recipient = t_strdup_until(value, line + len);
	return TRUE;
}

static void policy_answer(struct health_conn *conn, const char *recipient)
{
	struct health_answer answer;
	const char *str;

	health_answer(recipient, &answer);
	switch (answer.action) {
	case HEALTH_ACTION_DEFER:
		str = t_strdup_printf("action=DEFER_IF_PERMIT 4.3.2 Try again "
				      "later (%s)\n\n",
				      dovetail_health_state_name(answer.state));
		break;
	case HEALTH_ACTION_WARN:
		str = t_strdup_printf("action=WARN dovetail: %s\n\n",
				      health_answer_text(&answer));
		break;
	default:
		str = "action=DUNNO\n\n";
		break;
	}
	health_conn_send(conn, str, strlen(str));
}

static ssize_t
policy_input(struct health_conn *conn, const unsigned char *data, size_t size,
	     bool eof ATTR_UNUSED, const char **error_r)
{
	struct policy_request request = { NULL, NULL };
	const unsigned char *line = data, *end = data + size, *lf;

	while ((lf = memchr(line, '\n', end - line)) != NULL) {
		if (lf == line || (lf == line + 1 && *line == '\r')) {
			if (request.request == NULL ||
			    strcmp(request.request, "smtpd_access_policy") != 0) {
				*error_r = "It is not smtpd_access_policy";
				return -1;
			}
			policy_answer(conn, request.recipient);
			return lf + 1 - data;
		}
		if (!policy_attribute(&request, line,
				      lf - line - (lf[-1] == '\r' ? 1 : 0))) {
			*error_r = "A line is not NAME=VALUE";
			return -1;
		}
		line = lf + 1;
	}
	return 0;
}

const struct health_protocol health_protocol_policy = {
	.type = "policy",
	.max_request_size = POLICY_REQUEST_MAX_SIZE,
	.idle_msecs = POLICY_IDLE_MSECS,
	.input = policy_input,
};
