#ifndef DOVETAIL_REDIS_H
#define DOVETAIL_REDIS_H

/* One connection to Redis on the Dovecot ioloop: connects, authenticates,
   selects the database, reconnects. hiredis parses the replies; the socket and
   the order of commands are our own. */

#include "net.h"

struct istream;
struct ostream;
struct redisReply;
struct ssl_iostream;
struct dovetail_redis;
struct dovetail_redis_tls;

struct dovetail_redis_url {
	/* path of a unix socket, or NULL */
	const char *path;
	const char *host;
	in_port_t port;
	/* rediss:// */
	bool tls;
	/* NULL: no ACL user */
	const char *username;
	unsigned int db;
	/* what every key starts with; "dovetail:" unless the URL says
	   otherwise */
	const char *prefix;
};

/* Parse dovetail_redis:
     redis[s]://[USER@]HOST[:PORT][/DB][?prefix=PREFIX]
     unix:PATH[?user=USER&db=DB&prefix=PREFIX]
   IPv6 addresses stand in []. A password in the URL is refused: every mail
   process can read the settings; it belongs into KEY_DIR/redis.password.
   Returns 0, or -1 and error_r (data stack). */
int dovetail_redis_url_parse(pool_t pool, const char *url,
			     struct dovetail_redis_url *url_r,
			     const char **error_r);

/* Read what TLS needs, for all connections of this process, while we are root.
   ca_file: certificates of those who may sign the server's; "": those the system
   trusts. cert_file, key_file: our own certificate (chain) and key, PEM; "": none.
   Returns 0, or -1 and error_r (data stack). */
int dovetail_redis_tls_init(const char *ca_file, const char *cert_file,
			    const char *key_file,
			    struct dovetail_redis_tls **tls_r,
			    const char **error_r);
/* After the last connection. */
void dovetail_redis_tls_deinit(struct dovetail_redis_tls **tls);
/* Put TLS on top of the streams: nothing is sent before the server has proved
   that it is host. event: parent for what is logged. Returns 0, or -1 and error_r
   (data stack). */
int dovetail_redis_tls_start(struct dovetail_redis_tls *tls,
			     struct event *event, const char *host,
			     struct istream **input, struct ostream **output,
			     struct ssl_iostream **ssl_r, const char **error_r);
/* What went wrong with TLS, for the administrator; NULL: nothing, the connection
   was just closed. */
const char *dovetail_redis_tls_error(struct ssl_iostream *ssl);

struct dovetail_redis_callbacks {
	/* Connected, authenticated, database selected: commands may be sent.
	   Called after every (re)connect. */
	void (*ready)(void *context);
	/* The connection is gone. Commands that had no answer got a NULL reply
	   just before. Not called for failed connection attempts. */
	void (*lost)(void *context);
};

/* The process ignores SIGPIPE. Starts connecting at once; retries after 50 ms, doubling to 2 s until a
   connection has lasted. No callback is called before the ioloop runs.
   An outage is logged with event: as error when it begins, once for all
   connections of the process, and again when its reason is another one and it
   lasts; as info when all of them work again.
   An address that does not let us connect, and a connection on which nothing
   comes while a command waits for its answer, are given up after timeout_msecs.
   Time in which the ioloop did not run does not count.
   A server that says that it is read-only has perhaps handed its role, and our
   address, to another one: we connect anew, every 5 s at most.
   password may be NULL; kept in memory of our own, wiped at the end.
   tls must be given for a rediss:// URL, and outlive the connection. */
struct dovetail_redis *
dovetail_redis_init(struct event *event, const struct dovetail_redis_url *url,
		    const char *password, struct dovetail_redis_tls *tls,
		    unsigned int timeout_msecs,
		    const struct dovetail_redis_callbacks *callbacks,
		    void *context);
/* Outstanding commands get their callback with reply NULL. Safe to call from
   inside a callback. */
void dovetail_redis_deinit(struct dovetail_redis **redis);

bool dovetail_redis_is_ready(const struct dovetail_redis *redis);
/* Last error, or NULL while connected. */
const char *dovetail_redis_last_error(const struct dovetail_redis *redis);
/* ioloop time of the last state change. */
time_t dovetail_redis_state_since(const struct dovetail_redis *redis);

/* reply: NULL when the connection was lost before the answer: the command may
   or may not have been executed. Otherwise valid during the call only; may be
   an error reply. */
typedef void dovetail_redis_callback_t(struct redisReply *reply, void *context);

/* Send one command, binary-safe. callback may be NULL. When not ready, the
   callback is called at once with a NULL reply. Written at once as far as the
   socket takes it; calls no callback then: an error shows when the ioloop
   runs. */
void dovetail_redis_command(struct dovetail_redis *redis, unsigned int argc,
			    const char *const *argv, const size_t *argv_len,
			    dovetail_redis_callback_t *callback, void *context);
/* The same from strings, NULL-terminated. */
void dovetail_redis_commandl(struct dovetail_redis *redis,
			     dovetail_redis_callback_t *callback, void *context,
			     const char *arg, ...) ATTR_SENTINEL;

#endif
