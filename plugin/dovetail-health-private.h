#ifndef DOVETAIL_HEALTH_PRIVATE_H
#define DOVETAIL_HEALTH_PRIVATE_H

/* The service dovetail-health from the inside. One process, one ioloop, nothing
   blocks, and nobody is asked: every answer comes from what is in memory. (But for
   who a user's primary is, which only the userdb knows.)

     dovetail-health-service.c   start, stop, the clock's tick
     dovetail-health-report.c    what dovetail-queue says (its payload)
     dovetail-health-state.c     what is known, judged (shared/dovetail-health.h)
     dovetail-health-answer.c    what that means for one recipient
     dovetail-health-conns.c     connections: bounded in number, size and time
     dovetail-health-userdb.c    who is the user's primary
     dovetail-health-messages.c  who is told of what has changed, and when
     dovetail-health-hook.c      ... by a program
     dovetail-health-webhook.c   ... by HTTP

   and one file for each protocol, which a listener's name ends with (or, on
   Dovecot 2.4, its type is):

     dovetail-health-frames.c    health: dovetail-queue, and doveadm
     dovetail-health-policy.c    policy: Postfix' check_policy_service
     dovetail-health-socketmap.c socketmap: Postfix' transport_maps
     dovetail-health-exim.c      exim: Exim's readsocket
     dovetail-health-agent.c     agent: HAProxy's agent-check
     dovetail-health-http.c      http, admin: for all that speak HTTP
     dovetail-health-metrics.c   ... /metrics
     dovetail-health-json.c      ... /health
     dovetail-health-history.c   ... /history
     dovetail-health-page.html   ... / */

#include "dovetail-health-report.h"
#include "dovetail-settings.h"

struct master_service_connection;
struct http_server_connection;

/* ---- dovetail-health-state.c ---- */

/* What concerns everybody, and the same with the troubles of single users. */
struct health_pair {
	struct dovetail_health general, all;
};

struct health_direction {
	struct health_pair pair;
	struct dovetail_health_progress progress;
	uint64_t idle_msecs;
};

struct health_peer {
	char *name;
	struct health_direction to, from;
	/* since when shards have no worker; 0: all have one */
	uint64_t from_missing_since;
};

struct health_user {
	char *name;
	struct dovetail_health health;
	/* of the worst trouble */
	char *mailbox;
	/* while a report is judged: it names the user, and the worst */
	bool present;
	struct dovetail_health_finding worst;
	enum dovetail_health_trouble trouble;
	unsigned int troubles;
};

struct health {
	struct event *event;
	struct dovetail_settings set;
	/* the newest report, and when it was made; pool NULL: there was none */
	pool_t pool;
	struct dovetail_health_report report;
	uint64_t report_msecs;
	/* who made it has gone */
	bool report_ended;

	struct health_pair node;
	ARRAY(struct health_peer *) peers;
	HASH_TABLE(char *, struct health_user *) users;

	/* answers given, for /metrics */
	uint64_t answers, deferred, warned, refused;
	uint64_t connections, connections_closed;
};
extern struct health health;

void health_state_init(void);
void health_state_deinit(void);
/* A report came. Takes the pool in which it is. */
void health_state_report(pool_t pool,
			 const struct dovetail_health_report *report);
/* Whoever reported has gone: what it said last may be wrong by now. */
void health_state_report_ended(void);
/* Time has passed. */
void health_state_tick(void);
/* Does what is written now reach the ack level? At once, unlike the state
   "unprotected", which is kept for a while; FALSE also when that is not known. */
bool health_state_is_protected(void);

/* Call for all: what concerns everybody, of the node and each direction. */
void health_state_foreach(void (*callback)(const struct dovetail_health *h,
					   void *context), void *context);
/* The worst of all. general: of what concerns everybody. about_r: "", or the name
   of the peer. */
const struct dovetail_health *
health_state_worst(bool general, const char **about_r);
/* NULL: nothing is wrong with the user that is not wrong with everybody. */
const struct health_user *health_state_user(const char *name);
/* The report of a peer, or NULL. */
const struct dovetail_health_report_peer *
health_state_report_peer(const char *name);
/* How far this node is behind as a replica of the peer, in ms; _NEVER: it is not
   known. */
uint64_t health_state_replica_lag(const char *peer);
/* How far the peer is behind this node, in ms; _NEVER: it is not known. */
uint64_t health_state_primary_lag(const char *peer);
/* How far the replica that is furthest behind is, in ms; _NEVER: it is not
   known. */
uint64_t health_state_lag(void);
/* Seconds since 1970 */
time_t health_state_since(const struct dovetail_health *h);
/* UTC: 2026-01-31T13:00:00Z, or for people; data stack. */
const char *health_time_str(time_t t, bool iso);

/* ---- dovetail-health-answer.c ---- */

enum health_action {
	HEALTH_ACTION_ACCEPT,
	HEALTH_ACTION_WARN,
	HEALTH_ACTION_DEFER,
};

struct health_answer {
	enum health_action action;
	enum dovetail_health_state state;
	/* borrowed */
	const struct dovetail_health *health;
	/* the user whose trouble it is, or NULL: it is everybody's */
	const char *user;
};

/* How is it for mail to this recipient (address or user name; NULL or "": of
   nobody in particular)? Counted and logged, if it is not to be accepted. */
void health_answer(const char *recipient, struct health_answer *answer_r);
const char *health_action_name(enum health_action action);
/* One line without control characters. */
const char *health_answer_text(const struct health_answer *answer);
/* An event for what was answered elsewhere: to a load balancer, or over HTTP. */
void health_decided(const char *protocol, const char *question,
		    const char *answer, enum dovetail_health_state state);
/* What others cause to be logged is limited. */
bool health_may_log(void);
/* Is the state in the list? */
bool health_states_have(unsigned int states, enum dovetail_health_state state);

/* ---- dovetail-health-conns.c ---- */

struct health_conn;

struct health_protocol {
	/* the last word of the listener's name, or its type */
	const char *type;
	/* of a request, which has to come within some seconds */
	size_t max_request_size;
	/* between requests */
	unsigned int idle_msecs;
	/* closing without a word is a request, too */
	bool may_be_empty;
	/* Says something at once; may be NULL. */
	void (*connected)(struct health_conn *conn);
	/* Work on the first request in data. eof: there will be no more data.
	   Returns how many bytes it was, 0: it is not there as a whole, -1: it
	   makes no sense, for error_r (data stack): the connection is
	   closed without an answer. */
	ssize_t (*input)(struct health_conn *conn, const unsigned char *data,
			 size_t size, bool eof, const char **error_r);
};

void health_conns_init(void);
void health_conns_deinit(void);
/* Somebody has connected to one of the listeners. */
void health_conn_create(struct master_service_connection *mconn);
/* Answer. A client that does not read its answers is dropped. */
void health_conn_send(struct health_conn *conn, const void *data, size_t size);
/* Close when the answer is sent. */
void health_conn_finish(struct health_conn *conn);
/* The answer is not known yet: input is called for the same request again, after
   health_conns_resume(). */
void health_conn_wait(struct health_conn *conn);
bool health_conn_is_waiting(const struct health_conn *conn);
/* Those that wait try again. */
void health_conns_resume(void);
/* It reports: it is not to be closed for others to get in. */
void health_conn_keep(struct health_conn *conn);
int health_conn_fd(const struct health_conn *conn);

extern const struct health_protocol health_protocol_frames;
extern const struct health_protocol health_protocol_policy;
extern const struct health_protocol health_protocol_socketmap;
extern const struct health_protocol health_protocol_exim;
extern const struct health_protocol health_protocol_agent;

/* ---- dovetail-health-userdb.c ---- */

enum health_userdb_ret {
	/* it is being asked; health_conns_resume() is called when that ends */
	HEALTH_USERDB_WAIT,
	HEALTH_USERDB_FOUND,
	HEALTH_USERDB_NO_USER,
	/* it does not answer, or not with the name of a node */
	HEALTH_USERDB_FAILED,
};

void health_userdb_init(void);
void health_userdb_deinit(void);
/* primary_r: when _FOUND; of the settings. */
enum health_userdb_ret
health_userdb_lookup(const char *name, const char **primary_r);

/* ---- dovetail-health-http.c ---- */

void health_http_init(void);
void health_http_deinit(void);
/* names: users' names may be told. closed is called when the connection has gone,
   however it went. */
struct http_server_connection *
health_http_create(int fd, bool ssl, bool names, void (*active)(void *context),
		   void (*closed)(void *context), void *context);
void health_http_close(struct http_server_connection **conn);

/* ---- dovetail-health-json.c ---- */

/* "key":"value" */
void health_json_str(string_t *dest, const char *key, const char *value);
/* "state":...,"who":... */
void health_json(string_t *dest, const struct dovetail_health *h);
/* names: with users and their names */
void health_json_all(string_t *dest, bool names);

/* ---- dovetail-health-history.c ---- */

void health_history_init(void);
void health_history_deinit(void);
/* Time has passed. */
void health_history_update(void);
void health_history_json(string_t *dest);

/* ---- dovetail-health-messages.c ---- */

enum health_subject_kind {
	HEALTH_SUBJECT_NODE,
	/* what this node sends to a peer, and gets from it */
	HEALTH_SUBJECT_TO,
	HEALTH_SUBJECT_FROM,
	HEALTH_SUBJECT_USER,
};
const char *health_subject_kind_name(enum health_subject_kind kind);

/* Strings are borrowed. */
struct health_change {
	enum health_subject_kind kind;
	/* the node, "a to b", "a from b", or the user; the peer, or "" */
	const char *about, *peer;
	enum dovetail_health_state state, before;
	time_t since;
	/* sentences without the full stop, or "" */
	const char *reason, *remedy;
	enum dovetail_health_who who;
};

struct health_message {
	pool_t pool;
	/* at least one, the worst first */
	ARRAY(struct health_change) changes;
	/* one line, and all for people */
	const char *subject, *text;
};

enum health_channel_id {
	HEALTH_CHANNEL_HOOK,
	HEALTH_CHANNEL_WEBHOOK,

	HEALTH_CHANNEL_COUNT
};

/* A way on which messages go. */
struct health_channel {
	/* the setting */
	const char *name;
	bool (*enabled)(void);
	void (*init)(const char *base_dir);
	void (*deinit)(void);
	/* Sends, or starts to; keeps nothing of the message.
	   health_channel_done() says how that has ended, now or later. */
	void (*tell)(const struct health_message *message);
};
extern const struct health_channel health_channel_hook;
extern const struct health_channel health_channel_webhook;

void health_messages_init(const char *base_dir);
void health_messages_deinit(void);
/* Time has passed, or states have changed. */
void health_messages_update(void);
/* error: NULL: the message was taken; else it is told again later. */
void health_channel_done(enum health_channel_id id, const char *error);

/* ---- dovetail-health-metrics.c ---- */

/* as_openmetrics: else Prometheus' older format. */
void health_metrics(string_t *dest, bool as_openmetrics);

#endif
