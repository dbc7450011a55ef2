#ifndef DOVETAIL_HEALTH_PRIVATE_H
#define DOVETAIL_HEALTH_PRIVATE_H

/* The service dovetail-health from the inside. One process, one ioloop, nothing
   blocks, and nobody is asked: every answer comes from what is in memory.

     dovetail-health-service.c   start, stop, the clock's tick
     dovetail-health-report.c    what dovetail-queue says (its payload)
     dovetail-health-state.c     what is known, judged (shared/dovetail-health.h)
     dovetail-health-answer.c    what that means for one recipient
     dovetail-health-conns.c     connections: bounded in number, size and time

   and one file for each protocol, which a listener's name ends with (or, on
   Dovecot 2.4, its type is):

     dovetail-health-frames.c    health: dovetail-queue, and doveadm
     dovetail-health-policy.c    policy: Postfix' check_policy_service
     dovetail-health-exim.c      exim: Exim's readsocket
     dovetail-health-agent.c     agent: HAProxy's agent-check
     dovetail-health-http.c      http: for all that speak HTTP
     dovetail-health-metrics.c   ... /metrics */

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
/* Time has passed. */
void health_state_tick(void);

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
/* How far the replica that is furthest behind is, in ms; _NEVER: it is not
   known. */
uint64_t health_state_lag(void);
/* Seconds since 1970 */
time_t health_state_since(const struct dovetail_health *h);

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
/* It is not to be closed for others to get in. */
void health_conn_keep(struct health_conn *conn);
int health_conn_fd(const struct health_conn *conn);

extern const struct health_protocol health_protocol_frames;
extern const struct health_protocol health_protocol_policy;
extern const struct health_protocol health_protocol_exim;
extern const struct health_protocol health_protocol_agent;

/* ---- dovetail-health-http.c ---- */

void health_http_init(void);
void health_http_deinit(void);
/* closed is called when the connection has gone, however it went. */
struct http_server_connection *
health_http_create(int fd, bool ssl, void (*active)(void *context),
		   void (*closed)(void *context), void *context);
void health_http_close(struct http_server_connection **conn);

/* ---- dovetail-health-metrics.c ---- */

/* OpenMetrics text. */
void health_metrics(string_t *dest);

#endif
