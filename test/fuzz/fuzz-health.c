/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* What the listeners of dovetail-health read, and what they tell then.
   Input: steps: u8 whom to ask, u8 how, block: what is said:
     0 health   frames, as dovetail-queue and doveadm send them
     1 policy   2 exim   3 agent
     4 http     the target of a GET
     5 http     a whole request
     6 socketmap
   how: to the others in pieces of so many bytes (0: all at once); http: an odd number:
   users' names may be told.
   Must hold: it makes no difference in which pieces something comes; an answer has
   the form of its protocol; no answer but those of health and admin has a user's
   name in it. */

#include "fuzz-common.h"
#include "array.h"
#include "hash.h"
#include "ioloop.h"
#include "net.h"
#include "str.h"
#include "dovetail-compat.h"
#include "dovetail-frame.h"
#include "dovetail-health-private.h"

#include <ctype.h>
#include <sys/socket.h>
#include <unistd.h>

/* in the names of all users */
#define SECRET "s3cr3t"
#define STEPS_MAX 16

/* A report has it elsewhere, too: that may be told. */
static bool secret_is_out;

struct health_conn {
	string_t *answer;
	bool finished;
};

static const struct health_protocol *const protocols[] = {
	&health_protocol_frames,
	&health_protocol_policy,
	&health_protocol_exim,
	&health_protocol_agent,
	NULL,
	NULL,
	&health_protocol_socketmap,
};

/* some socket, whose other end is ours */
static int conn_fds[2];
static pool_t settings_pool;

/* ---- instead of dovetail-health-conns.c ---- */

void health_conn_send(struct health_conn *conn, const void *data, size_t size)
{
	fuzz_assert(!conn->finished);
	str_append_data(conn->answer, data, size);
}

void health_conn_finish(struct health_conn *conn)
{
	conn->finished = TRUE;
}

void health_conn_keep(struct health_conn *conn ATTR_UNUSED)
{
}

/* nobody waits here, see health_userdb_lookup() */
void health_conn_wait(struct health_conn *conn ATTR_UNUSED)
{
	i_unreached();
}

bool health_conn_is_waiting(const struct health_conn *conn ATTR_UNUSED)
{
	return FALSE;
}

int health_conn_fd(const struct health_conn *conn ATTR_UNUSED)
{
	return conn_fds[0];
}

/* ---- instead of dovetail-health-userdb.c ---- */

enum health_userdb_ret
health_userdb_lookup(const char *name, const char **primary_r)
{
	switch (str_hash(name) % 4) {
	case 0:
		return HEALTH_USERDB_NO_USER;
	case 1:
		return HEALTH_USERDB_FAILED;
	case 2:
		*primary_r = "c";
		return HEALTH_USERDB_FOUND;
	default:
		*primary_r = "a";
		return HEALTH_USERDB_FOUND;
	}
}

/* ---- */

static const char *get_setting(void *context ATTR_UNUSED, const char *name)
{
	static const char *const pairs[] = {
		"dovetail_node", "a", "dovetail_peers", "b c",
		"dovetail_primary", "b",
		"dovetail_redis", "redis://127.0.0.1/",
		"dovetail_health_warn", "lagging diverged",
		"dovetail_health_defer", "unprotected stalled",
		"dovetail_health_down", "fenced",
		"dovetail_health_transports", "a=lmtp:inet:10.77.0.1:24",
		"dovetail_health_domains", "example.net *",
	};
	unsigned int i;

	for (i = 0; i < N_ELEMENTS(pairs); i += 2) {
		if (strcmp(pairs[i], name) == 0)
			return pairs[i + 1];
	}
	return NULL;
}

void fuzz_init(void)
{
	const char *error;

	io_loop_create();
	fuzz_assert(socketpair(AF_UNIX, SOCK_STREAM, 0, conn_fds) == 0);
	settings_pool = pool_alloconly_create("fuzz settings", 1024);
	fuzz_assert(dovetail_settings_parse(settings_pool, "/run", get_setting,
					    NULL, &health.set, &error) == 0);
	health.event = event_create(NULL);
	health_http_init();
}

/* ---- what must hold of answers ---- */

static void check_line(const char *line)
{
	for (; *line != '\0'; line++)
		fuzz_assert((unsigned char)*line >= ' ' && *line != 127);
}

static void check_policy(const char *answers)
{
	while (*answers != '\0') {
		const char *end = strstr(answers, "\n\n");

		fuzz_assert(end != NULL);
		fuzz_assert(str_begins_with(answers, "action="));
		check_line(t_strdup_until(answers, end));
		answers = end + 2;
	}
}

static void check_exim(const char *answer)
{
	const char *text;

	if (*answer == '\0')
		return;
	fuzz_assert(str_begins_with(answer, "action="));
	fuzz_assert(strchr(answer, '\n') == answer + strlen(answer) - 1);
	check_line(t_strcut(answer, '\n'));
	text = strstr(answer, " text=\"");
	fuzz_assert(text != NULL);
	text = strchr(text + strlen(" text=\""), '"');
	fuzz_assert(text != NULL && strcmp(text, "\"\n") == 0);
}

static void check_agent(const char *answer)
{
	fuzz_assert(str_begins_with(answer, "up ready 100%\n") ||
		    str_begins_with(answer, "up drain\n") ||
		    str_begins_with(answer, "down #"));
	check_line(t_strcut(answer, '\n'));
}

static void check_socketmap(const char *answers)
{
	const char *p, *text;
	unsigned int len;

	while (*answers != '\0') {
		for (p = answers; i_isdigit(*p); p++) ;
		fuzz_assert(*p == ':');
		fuzz_assert(str_to_uint(t_strdup_until(answers, p), &len) == 0);
		fuzz_assert(len < strlen(p) && p[1 + len] == ',');
		text = t_strndup(p + 1, len);
		fuzz_assert(str_begins_with(text, "OK lmtp:") ||
			    str_begins_with(text, "TEMP ") ||
			    strcmp(text, "NOTFOUND ") == 0);
		check_line(text);
		answers = p + 1 + len + 1;
	}
}

static void check_frames(const string_t *answers)
{
	const unsigned char *data = str_data(answers), *payload;
	size_t size = str_len(answers), payload_size, frame_size;
	enum dovetail_frame_type type;
	const char *error;

	while (size > 0) {
		fuzz_assert(dovetail_frame_parse(data, size, &type, &payload,
						 &payload_size, &frame_size,
						 &error) == 1);
		data += frame_size;
		size -= frame_size;
	}
}

static void check_http(const char *answer, bool names)
{
	fuzz_assert(*answer == '\0' || str_begins_with(answer, "HTTP/1.1 "));
	fuzz_assert(names || secret_is_out || strstr(answer, SECRET) == NULL);
	if (strstr(answer, "Content-Type: application/json") != NULL) {
		answer = strstr(answer, "\r\n\r\n");
		fuzz_assert(answer != NULL);
		answer += 4;
		if (*answer != '\0') {
			fuzz_assert(strchr(answer, '\n') ==
				    answer + strlen(answer) - 1);
			check_line(t_strcut(answer, '\n'));
		}
	}
}

/* ---- the protocols ---- */

/* As dovetail-health-conns.c does it. */
static void talk(const struct health_protocol *protocol, const uint8_t *data,
		 size_t size, size_t piece, struct health_conn *conn)
{
	const char *error = NULL;
	unsigned char *copy;
	size_t begin = 0, end = 0;
	ssize_t ret;
	bool eof;

	if (protocol->connected != NULL)
		protocol->connected(conn);
	do {
		end = piece == 0 ? size : I_MIN(end + piece, size);
		eof = end == size;
		while (!conn->finished &&
		       (end > begin || (eof && protocol->may_be_empty))) {
			/* the sanitizer sees who reads too far */
			copy = i_malloc(I_MAX(end - begin, 1));
			memcpy(copy, data + begin, end - begin);
			ret = protocol->input(conn, copy, end - begin, eof,
					      &error);
			i_free(copy);
			if (ret < 0) {
				fuzz_assert(error != NULL && *error != '\0');
				return;
			}
			if (ret == 0)
				break;
			fuzz_assert((size_t)ret <= end - begin);
			begin += ret;
		}
		if (end - begin >= protocol->max_request_size)
			return;
	} while (!eof && !conn->finished);
}

static void ask(const struct health_protocol *protocol, const uint8_t *data,
		size_t size, size_t piece)
{
	struct health_conn whole = { .answer = t_str_new(256) };
	struct health_conn pieces = { .answer = t_str_new(256) };

	talk(protocol, data, size, 0, &whole);
	if (piece > 0) {
		talk(protocol, data, size, piece, &pieces);
		/* frames change what is answered to others */
		fuzz_assert(str_equals(whole.answer, pieces.answer) ||
			    protocol == &health_protocol_frames);
	}
	if (protocol == &health_protocol_frames)
		check_frames(whole.answer);
	else {
		fuzz_assert(strlen(str_c(whole.answer)) ==
			    str_len(whole.answer));
		fuzz_assert(secret_is_out ||
			    strstr(str_c(whole.answer), SECRET) == NULL);
	}
	if (protocol == &health_protocol_policy)
		check_policy(str_c(whole.answer));
	else if (protocol == &health_protocol_exim)
		check_exim(str_c(whole.answer));
	else if (protocol == &health_protocol_agent)
		check_agent(str_c(whole.answer));
	else if (protocol == &health_protocol_socketmap)
		check_socketmap(str_c(whole.answer));
}

static void http_active(void *context ATTR_UNUSED)
{
}

static void http_closed(void *context)
{
	bool *closed = context;

	*closed = TRUE;
}

static void http(const string_t *request, bool names)
{
	struct http_server_connection *conn;
	string_t *answer = t_str_new(4096);
	char buf[4096];
	bool closed = FALSE;
	ssize_t ret;
	unsigned int i;
	int fds[2];

	fuzz_assert(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0);
	net_set_nonblock(fds[0], TRUE);
	net_set_nonblock(fds[1], TRUE);
	conn = health_http_create(fds[0], FALSE, names, http_active,
				  http_closed, &closed);
	(void)write(fds[1], str_data(request), str_len(request));
	(void)shutdown(fds[1], SHUT_WR);
	for (i = 0; i < 20 && !closed; i++) {
		fuzz_run_ioloop();
		while ((ret = read(fds[1], buf, sizeof(buf))) > 0)
			str_append_data(answer, buf, ret);
	}
	if (!closed)
		health_http_close(&conn);
	fuzz_assert(closed);
	i_close_fd(&fds[1]);
	fuzz_run_ioloop();
	check_http(str_c(answer), names);
}

static void look_for_secret(void)
{
	const struct dovetail_health_report *report = &health.report;
	const struct dovetail_health_report_peer *peer;
	string_t *str = t_str_new(256);

	str_printfa(str, "%s %s %s", report->fenced, report->unprotected,
		    report->redis_error);
	if (health.pool != NULL) {
		array_foreach(&report->peers, peer) {
			str_printfa(str, " %s %s %s", peer->peer,
				    peer->from.redis_error, peer->from.stuck);
		}
	}
	if (strstr(str_c(str), SECRET) != NULL)
		secret_is_out = TRUE;
}

static bool has_secret(const uint8_t *data, size_t size)
{
	size_t i, len = strlen(SECRET);

	for (i = 0; i + len <= size; i++) {
		if (memcmp(data + i, SECRET, len) == 0)
			return TRUE;
	}
	return FALSE;
}

static void step(struct fuzz_input *in)
{
	uint8_t whom = fuzz_get_u8(in) % N_ELEMENTS(protocols);
	uint8_t how = fuzz_get_u8(in);
	string_t *request = t_str_new(256);
	const uint8_t *data;
	size_t size;

	data = fuzz_get_block(in, &size);
	if (protocols[whom] == NULL && has_secret(data, size))
		secret_is_out = TRUE;
	if (protocols[whom] != NULL) {
		ask(protocols[whom], data, size, how);
		look_for_secret();
		return;
	}
	if (whom == 4)
		str_append(request, "GET ");
	str_append_data(request, data, size);
	if (whom == 4) {
		str_append(request, " HTTP/1.1\r\nHost: localhost\r\n"
			   "Connection: close\r\n\r\n");
	}
	http(request, (how & 1) != 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct fuzz_input in = { data, size };
	unsigned int steps;

	secret_is_out = FALSE;
	health_state_init();
	health_history_init();
	for (steps = 0; in.size > 0 && steps < STEPS_MAX; steps++) T_BEGIN {
		step(&in);
		health_state_tick();
		health_history_update();
	} T_END;
	health_history_deinit();
	health_state_deinit();
	i_zero(&health.report);
	return 0;
}
