/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* HAProxy's agent-check: who connects gets one line, and the connection is closed.
   It is always the full state: only the agent's own "up" and "ready" undo its "down"
   and "drain". */

#include "lib.h"
#include "array.h"
#include "hash.h"
#include "str.h"
#include "dovetail-health-private.h"

#define AGENT_REQUEST_MAX_SIZE 1024
#define AGENT_IDLE_MSECS (10 * 1000)

static void agent_connected(struct health_conn *conn)
{
	const struct dovetail_health *worst;
	const char *about, *name, *str;

	worst = health_state_worst(TRUE, &about);
	name = dovetail_health_state_name(worst->state);
	if (health_states_have(health.set.health_down, worst->state))
		str = t_strdup_printf("down #%s\n", name);
	else if (health_states_have(health.set.health_drain, worst->state))
		str = "up drain\n";
	else
		str = "up ready 100%\n";
	health.answers++;
	health_decided("agent", "", t_strcut(str, '\n'), worst->state);
	health_conn_send(conn, str, strlen(str));
	health_conn_finish(conn);
}

/* what agent-send says is all the same */
static ssize_t
agent_input(struct health_conn *conn ATTR_UNUSED,
	    const unsigned char *data ATTR_UNUSED, size_t size,
	    bool eof ATTR_UNUSED, const char **error_r ATTR_UNUSED)
{
	return size;
}

const struct health_protocol health_protocol_agent = {
	.type = "agent",
	.max_request_size = AGENT_REQUEST_MAX_SIZE,
	.idle_msecs = AGENT_IDLE_MSECS,
	.connected = agent_connected,
	.input = agent_input,
};
