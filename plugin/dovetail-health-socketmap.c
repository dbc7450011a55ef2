/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* Postfix' socketmap_table(5), for transport_maps: where does this recipient's mail
   go? Requests and answers are netstrings, LENGTH:TEXT, and the connection stays open:

     15:dovetail jane@x,    the name of the map, which is all the same; the key
     25:OK lmtp:inet:10.77.0.1:24,     to the node that is the user's primary
     9:NOTFOUND ,                      it is not for us to say
     14:TEMP not known,                nobody can say now: Postfix waits

   Postfix asks about each recipient there is, also about those of others: only a
   user of dovetail_health_domains has an answer. */

#include "lib.h"
#include "array.h"
#include "hash.h"
#include "str.h"
#include "dovetail-health-private.h"

#define SOCKETMAP_REQUEST_MAX_SIZE 2048
/* Postfix closes by itself before that (ipc_idle = 5s ... 100s). */
#define SOCKETMAP_IDLE_MSECS (600 * 1000)
/* more than any address that a userdb knows */
#define SOCKETMAP_KEY_MAX_LEN 512

/* Returns the size of the first netstring in data, 0: it is not there as a whole, -1:
   it is none. */
static ssize_t
netstring_parse(const unsigned char *data, size_t size,
		const unsigned char **text_r, size_t *len_r)
{
	size_t i, len = 0;

	for (i = 0; i < size && data[i] >= '0' && data[i] <= '9'; i++) {
		len = len * 10 + (data[i] - '0');
		if (len > SOCKETMAP_REQUEST_MAX_SIZE)
			return -1;
	}
	if (i == size)
		return 0;
	if (i == 0 || data[i] != ':')
		return -1;
	i++;
	/* the whole of it must fit into the connection's buffer */
	if (i + len + 1 > SOCKETMAP_REQUEST_MAX_SIZE)
		return -1;
	if (size - i < len + 1)
		return 0;
	if (data[i + len] != ',')
		return -1;
	*text_r = data + i;
	*len_r = len;
	return i + len + 1;
}

static void socketmap_send(struct health_conn *conn, const char *text)
{
	text = t_strdup_printf("%zu:%s,", strlen(text), text);
	health_conn_send(conn, text, strlen(text));
	health.answers++;
}

static const char *transport_find(const char *node)
{
	const char *const *p;

	for (p = health.set.health_transports; *p != NULL; p += 2) {
		if (strcmp(p[0], node) == 0)
			return p[1];
	}
	return NULL;
}

/* The user's primary, as far as we have to say something about this address. */
static enum health_userdb_ret
recipient_primary(const char *address, const char **primary_r)
{
	const char *domain = strrchr(address, '@');
	const char *const *p;

	if (health.set.health_transports[0] == NULL || domain == NULL ||
	    domain == address || strlen(address) > SOCKETMAP_KEY_MAX_LEN)
		return HEALTH_USERDB_NO_USER;
	domain++;
	for (p = health.set.health_domains; *p != NULL; p++) {
		if (strcasecmp(*p, domain) == 0 || strcmp(*p, "*") == 0)
			break;
	}
	if (*p == NULL)
		return HEALTH_USERDB_NO_USER;
	if (health.set.health_userdb == NULL) {
		*primary_r = health.set.primary;
		return HEALTH_USERDB_FOUND;
	}
	return health_userdb_lookup(address, primary_r);
}

static void socketmap_answer(struct health_conn *conn, const char *address)
{
	const char *primary = NULL, *transport;

	switch (recipient_primary(address, &primary)) {
	case HEALTH_USERDB_WAIT:
		health_conn_wait(conn);
		break;
	case HEALTH_USERDB_NO_USER:
		socketmap_send(conn, "NOTFOUND ");
		break;
	case HEALTH_USERDB_FAILED:
		socketmap_send(conn, "TEMP dovetail: the userdb does not "
			       "answer");
		break;
	case HEALTH_USERDB_FOUND:
		transport = transport_find(primary);
		if (transport != NULL) {
			socketmap_send(conn, t_strconcat("OK ", transport,
							 NULL));
			break;
		}
		if (health_may_log()) {
			e_warning(health.event, "dovetail_health_transports "
				  "does not say where %s is", primary);
		}
		socketmap_send(conn, "TEMP dovetail: the way to the primary is "
			       "not known");
		break;
	}
}

static ssize_t
socketmap_input(struct health_conn *conn, const unsigned char *data,
		size_t size, bool eof ATTR_UNUSED, const char **error_r)
{
	const unsigned char *text, *space;
	size_t len;
	ssize_t ret = netstring_parse(data, size, &text, &len);

	if (ret == 0)
		return 0;
	if (ret < 0) {
		*error_r = "It is not a netstring";
		return -1;
	}
	space = memchr(text, ' ', len);
	if (space == NULL || memchr(text, '\0', len) != NULL) {
		*error_r = "It is not the name of a map and a key";
		return -1;
	}
	socketmap_answer(conn, t_strdup_until(space + 1, text + len));
	/* what is waited for is asked again */
	return health_conn_is_waiting(conn) ? 0 : ret;
}

const struct health_protocol health_protocol_socketmap = {
	.type = "socketmap",
	.max_request_size = SOCKETMAP_REQUEST_MAX_SIZE,
	.idle_msecs = SOCKETMAP_IDLE_MSECS,
	.input = socketmap_input,
};
