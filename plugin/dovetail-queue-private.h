#ifndef DOVETAIL_QUEUE_PRIVATE_H
#define DOVETAIL_QUEUE_PRIVATE_H

/* The service dovetail-queue from the inside. One process, one ioloop, nothing
   blocks. In the order of the way of a change:

     dovetail-queue.c            start, stop, settings, the clock's tick
     dovetail-queue-conns.c      connections and frames
     dovetail-queue-positions.c  what is queued already
     dovetail-queue-log.c        a shard's stream: group, seal, XADD, chain,
                                 generations, trimming
     dovetail-queue-backlog.c    how much of a stream is not confirmed
     dovetail-queue-acks.c       the replicas' reports
     dovetail-queue-users.c      dirty users and who sweeps them
     dovetail-queue-jobs.c       verify, repair, seed: from doveadm to workers
     dovetail-queue-status.c     rows for "doveadm dovetail status"
     dovetail-queue-health.c     the same for dovetail-health
     dovetail-queue-state.c      files in the state directory

   A change waits in a group. A group is sealed and sent when the one before it
   was answered; what comes in the meantime makes the next group. While Redis
   answers, a change waits for nothing but this. */

#include "dovetail-clock.h"
#include "dovetail-frame.h"
#include "dovetail-health-report.h"
#include "dovetail-keyring.h"
#include "dovetail-queue-backlog.h"
#include "dovetail-queue-positions.h"
#include "dovetail-queue-state.h"
#include "dovetail-redis.h"
#include "dovetail-seal.h"
#include "dovetail-settings.h"

/* No reading from a client while this many of its bytes have no answer, or
   answers to it have not been read ... */
#define DOVETAIL_QUEUE_CONN_MAX_BYTES (1024 * 1024)
/* ... and from none while so many wait for Redis ... */
#define DOVETAIL_QUEUE_PENDING_MAX_BYTES (8 * 1024 * 1024)
/* ... or stand in half frames. */
#define DOVETAIL_QUEUE_INPUT_MAX_BYTES (16 * 1024 * 1024)
/* so long a lost Redis may take to come back before those that wait are told
   that it is away */
#define DOVETAIL_QUEUE_GRACE_MSECS 1000
#define DOVETAIL_QUEUE_POSITIONS_MAX 100000
#define DOVETAIL_QUEUE_TICK_MSECS 250
#define DOVETAIL_QUEUE_HEARTBEAT_SECS 5
/* the same when no replica has been heard of for a minute */
#define DOVETAIL_QUEUE_HEARTBEAT_ALONE_SECS 60
/* replicas report several times in this time, if they live */
#define DOVETAIL_QUEUE_PEER_ALIVE_SECS 15
/* ... and name their users in trouble, if they are still so many processes */
#define DOVETAIL_QUEUE_TROUBLES_SECS 60

struct dovetail_queue;
struct dovetail_queue_log;
struct dovetail_queue_conn;
struct dovetail_queue_peer;
struct dovetail_queue_job;
struct dovetail_job;

/* A user is kept while something is known of it. */
struct dovetail_queue_user {
	/* of the shard's dirty users, by due_usecs; must be first */
	struct priorityq_item item;
	/* of those whose mark file may go, by idle_since */
	struct dovetail_queue_user *prev, *next;
	/* of the dirty ones, by dirty_msecs */
	struct dovetail_queue_user *dirty_prev, *dirty_next;

	struct dovetail_queue *queue;
	char *name;
	unsigned int shard;

	/* connections with a MARK and no CLEAN */
	unsigned int marks;
	/* connections that keep a pointer here */
	unsigned int conns;
	/* changes that have no answer yet */
	unsigned int waiters;

	/* something of the user's is in the mailboxes and not in the queue */
	bool dirty;
	/* dirty and in the shard's priority queue */
	bool due;
	bool mark_file;
	/* in the list of users whose mark file may go */
	bool idle;
	/* got dirty again while it was swept */
	bool again;
	/* who sweeps the user now, or NULL */
	struct dovetail_queue_conn *worker;
	/* when to sweep, if dirty: dovetail_monotonic_usecs() */
	uint64_t due_usecs;
	unsigned int retry_secs;
	/* dovetail_monotonic_msecs() */
	uint64_t dirty_msecs;
	/* dovetail_monotonic_secs() */
	time_t idle_since;
	/* a literal */
	const char *reason;
};

/* Somebody wants to know what became of a change. */
struct dovetail_queue_waiter {
	/* of its group, later of the log's applied list */
	struct dovetail_queue_waiter *prev, *next;
	/* of its connection */
	struct dovetail_queue_waiter *conn_prev, *conn_next;

	/* NULL when it went away */
	struct dovetail_queue_conn *conn;
	/* never NULL; holds a waiters count */
	struct dovetail_queue_user *user;
	uint64_t tag;
	enum dovetail_ack_level level;
	size_t frame_size;

	/* the change's number in its group; UINT_MAX: one of them */
	unsigned int ordinal;
	/* Applied list: the entry it is in, and the peers (bits) that reported
	   they could not apply it. */
	struct dovetail_queue_id id;
	uint64_t failed_peers;
	/* dovetail_monotonic_secs() */
	time_t stored_secs;
	/* the mailboxes have what the change says: if it does not get through,
	   they are to be read again */
	bool sweep;
};

struct dovetail_queue_group {
	struct dovetail_queue_group *prev, *next;
	struct dovetail_queue_log *log;

	/* as the entry's payload has it; kept until the outcome is known */
	buffer_t *payload;
	unsigned int changes;
	ARRAY_TYPE(dovetail_queue_position_change) positions;
	struct dovetail_queue_waiter *waiters_head, *waiters_tail;

	/* sent: */
	unsigned int ticks;
	struct dovetail_chain chain;
	uint64_t time_usecs;
	size_t entry_size;
	unsigned int attempts;
	/* nobody waits for it any more */
	bool abandoned;
	bool heartbeat;
};

enum dovetail_queue_log_state {
	/* Redis is away, or the stream's end is not known */
	DOVETAIL_QUEUE_LOG_UNKNOWN,
	/* asking for the stream's end */
	DOVETAIL_QUEUE_LOG_SYNCING,
	DOVETAIL_QUEUE_LOG_READY,
};

/* One shard's stream. */
struct dovetail_queue_log {
	struct dovetail_queue *queue;
	struct event *event;
	unsigned int shard;
	char *key;
	enum dovetail_queue_log_state state;
	/* dovetail_monotonic_usecs() */
	uint64_t state_since;

	struct dovetail_queue_state_file state_file;
	/* the last entry sealed */
	struct dovetail_chain sent;
	/* the last entry that is known to be in the stream; the next one's
	   prev. The state file has both. */
	struct dovetail_chain stored;
	bool state_valid, synced_once;

	/* what Redis works on; at most one */
	struct dovetail_queue_group *inflight;
	/* to be sent, in order; the last one still grows */
	struct dovetail_queue_group *groups_head, *groups_tail;
	/* stored, and waiting for replicas; ordered by id */
	struct dovetail_queue_waiter *applied_head, *applied_tail;
	unsigned int applied_count;
	/* Redis does not answer: told to those who waited */
	bool stalled;
	/* why the last XADD or sync failed, NULL: it did not */
	char *error;
	char *trim_error;

	struct dovetail_queue_backlog *backlog;
	/* dovetail_monotonic_secs() */
	time_t last_append;
	/* entries before this are gone from the stream, or being so */
	struct dovetail_queue_id trimmed;
	uint64_t trimmable_bytes;
	/* dovetail_monotonic_usecs() */
	uint64_t last_trim;

	/* dirty users who are not being swept, those due first in front */
	struct priorityq *dirty;

	/* answers of the running sync */
	struct {
		bool have_last, ours, failed;
		/* the key holds something that is not a stream */
		bool no_stream;
		/* we deleted the stream: its end was no use */
		bool deleted;
		struct dovetail_queue_id last_id, first_id;
		/* what a new entry's ID has to be above: more than last_id
		   when entries were deleted. 0-0: Redis did not say */
		struct dovetail_queue_id end_id;
		unsigned char last_hash[DOVETAIL_HASH_SIZE];
		size_t last_size;
		uint64_t first_usecs, length, memory;
	} sync;
};

/* What a peer reported of one shard. */
struct dovetail_queue_peer_shard {
	/* 0-0: nothing yet */
	struct dovetail_queue_id applied;
	uint64_t applied_usecs;
	/* of the report that is the newest by the peer's clock */
	uint64_t report_usecs;
	time_t received;
	uint64_t entries, rejected;
	unsigned int set_aside;
	char *error;
	/* Users in trouble, and when that was said
	   (dovetail_monotonic_msecs()). NULL: it was not. */
	pool_t troubles_pool;
	struct dovetail_health_troubles troubles_count;
	ARRAY_TYPE(dovetail_health_trouble_of) troubles;
	uint64_t troubles_msecs;
};

struct dovetail_queue_peer {
	const char *node;
	/* its bit in failed_peers */
	unsigned int idx;
	struct dovetail_queue_peer_shard *shards;
	/* any report: dovetail_monotonic_secs(); 0: never */
	time_t received;
	/* the same, dovetail_monotonic_msecs() */
	uint64_t heard_msecs;
	/* reports of this peer that were not accepted, and the reasons (bits
	   of enum dovetail_open_ret) that were logged */
	uint64_t bad_reports;
	unsigned int bad_logged;
};

struct dovetail_queue {
	struct event *event;
	struct dovetail_settings set;
	struct dovetail_keyring *keyring;
	char *password;
	/* NULL: no rediss:// */
	struct dovetail_redis_tls *tls;
	char *dirty_dir;
	/* who may speak for every user, beside root */
	uid_t uid;

	/* all keys of all peers: whom entries are sealed for */
	const struct dovetail_public_key **recipients;
	unsigned int recipients_count;

	struct dovetail_queue_peer *peers;
	unsigned int peers_count;
	/* entries of the ack stream that no peer signed */
	uint64_t bad_acks;
	unsigned int bad_acks_logged;

	/* not before the process before us has released its lock: logs and
	   users do not exist yet, and no client is read */
	bool started;
	/* dovetail_monotonic_msecs() */
	uint64_t started_msecs;
	/* NULL before start, and without peers */
	struct dovetail_redis *redis;
	struct dovetail_queue_log *logs;
	unsigned int logs_count;

	struct dovetail_redis *acks_redis;
	char *acks_key;
	/* what XREAD goes on from */
	char *acks_last_id;
	/* XREAD failed: the tick tries again */
	bool acks_retry;

	struct dovetail_queue_positions *positions;
	HASH_TABLE(char *, struct dovetail_queue_user *) users;
	struct dovetail_queue_user *idle_head, *idle_tail;
	struct dovetail_queue_user *dirty_head, *dirty_tail;
	/* failing: of which a sweep has failed */
	unsigned int dirty_count, dirty_failing_count;
	char *marks_error;

	struct dovetail_queue_conn *conns, *workers;
	struct dovetail_queue_job *jobs;
	uint64_t last_job_id;
	/* connections with something to send: flushed at the end of each
	   callback */
	ARRAY(struct dovetail_queue_conn *) flush;
	/* payloads of all groups; half frames */
	size_t pending_bytes, input_bytes;
	/* too many half frames: the one that may go on */
	struct dovetail_queue_conn *input_first;
	/* dovetail_monotonic_secs() */
	time_t input_first_since;
	/* connections that are not read now */
	unsigned int halted_count;
	/* they may be read again perhaps */
	bool resume;
	/* shards (bits) with something new to send */
	uint64_t kick;

	/* unconfirmed bytes of all logs reached the maximum */
	bool full;
	/* for the payload of one entry at a time */
	buffer_t *entry_buf;

	struct timeout *to_tick;
	bool stopping;
};

static inline uint64_t dovetail_queue_now_usecs(void)
{
	return (uint64_t)ioloop_timeval.tv_sec * 1000000 +
		ioloop_timeval.tv_usec;
}

/* ---- dovetail-queue-log.c ---- */

/* Read the chain. Returns 0, or -1 and error_r (data stack). */
int dovetail_queue_log_init(struct dovetail_queue *queue,
			    struct dovetail_queue_log *log, unsigned int shard,
			    const char **error_r);
void dovetail_queue_log_deinit(struct dovetail_queue_log *log);
/* Redis is there, is gone. */
void dovetail_queue_log_redis_ready(struct dovetail_queue_log *log);
void dovetail_queue_log_redis_lost(struct dovetail_queue_log *log);
void dovetail_queue_log_tick(struct dovetail_queue_log *log);

/* Why a change would not be queued now: a text (data stack or literal), or NULL
   when it would, or when it is worth waiting to see. */
const char *dovetail_queue_log_unavailable(struct dovetail_queue_log *log);
/* Put a change into the shard's open group. change is the encoded change;
   position is NULL for what has none. waiter gets its ordinal. */
void dovetail_queue_log_append(struct dovetail_queue_log *log,
			       const void *change, size_t size,
			       const struct dovetail_queue_position_change *position,
			       struct dovetail_queue_waiter *waiter);
/* Send the next group, if it may go. Call after the last append of a read. */
void dovetail_queue_log_kick(struct dovetail_queue_log *log);
/* A peer reported. failed are the changes it could not apply. */
void dovetail_queue_log_applied(struct dovetail_queue_log *log,
				struct dovetail_queue_peer *peer,
				const struct dovetail_ack *ack);
/* A peer has an entry of this generation that we know nothing of. */
void dovetail_queue_log_behind(struct dovetail_queue_log *log,
			       uint64_t generation);
/* Nothing of the log is on its way. */
bool dovetail_queue_log_is_idle(const struct dovetail_queue_log *log);

/* ---- dovetail-queue-acks.c ---- */

void dovetail_queue_acks_start(struct dovetail_queue *queue);
void dovetail_queue_acks_tick(struct dovetail_queue *queue);
void dovetail_queue_acks_stop(struct dovetail_queue *queue);
/* A peer reported in the last DOVETAIL_QUEUE_PEER_ALIVE_SECS. */
bool dovetail_queue_acks_alive(const struct dovetail_queue *queue);

/* ---- dovetail-queue-users.c ---- */

/* The user, made if need be. It stays until the end of the callback, and as
   long as something is known of it. */
struct dovetail_queue_user *
dovetail_queue_user_get(struct dovetail_queue *queue, const char *name);
/* Something was taken from the user: free it if nothing is left. */
void dovetail_queue_user_release(struct dovetail_queue_user *user);
/* The user is about to commit: the file says so from now on. */
void dovetail_queue_user_mark(struct dovetail_queue_user *user);
void dovetail_queue_user_unmark(struct dovetail_queue_user *user);
/* Sweep the user, in delay_msecs at the earliest. reason is a literal. */
void dovetail_queue_user_set_dirty(struct dovetail_queue_user *user,
				   unsigned int delay_msecs,
				   const char *reason);
/* The worker is done with the user. */
void dovetail_queue_user_swept(struct dovetail_queue_user *user, bool ok);
/* Hand users to workers that have nothing better to do. */
void dovetail_queue_users_work(struct dovetail_queue *queue);
void dovetail_queue_users_tick(struct dovetail_queue *queue);
/* Read the marks of a former process. */
int dovetail_queue_users_init(struct dovetail_queue *queue,
			      const char **error_r);
/* Frees all; the marks of those who are clean go. */
void dovetail_queue_users_deinit(struct dovetail_queue *queue);

/* ---- dovetail-queue-conns.c ---- */

/* Takes fd. trusted_uid is the owner of the listener. */
void dovetail_queue_conn_create(struct dovetail_queue *queue, int fd,
				uid_t trusted_uid);
/* The queue has started: read from those who connected before. */
void dovetail_queue_conns_start(struct dovetail_queue *queue);
void dovetail_queue_conns_tick(struct dovetail_queue *queue);
void dovetail_queue_conns_deinit(struct dovetail_queue *queue);
/* Answer a waiter and free it. The caller has taken it out of its list. */
void dovetail_queue_waiter_answer(struct dovetail_queue_waiter **waiter,
				  enum dovetail_reply reply, const char *text);
/* Send what was answered. At the end of each callback from outside. */
void dovetail_queue_conns_flush(struct dovetail_queue *queue);
/* Pending bytes became fewer: read again from those who had to wait. */
void dovetail_queue_conns_resume(struct dovetail_queue *queue);
/* Send a frame. */
void dovetail_queue_conn_send(struct dovetail_queue_conn *conn,
			      enum dovetail_frame_type type,
			      const buffer_t *payload);
/* The worker for the shard, or NULL. */
struct dovetail_queue_conn *
dovetail_queue_conns_find_worker(struct dovetail_queue *queue,
				 unsigned int shard);
unsigned int
dovetail_queue_conn_get_slot(const struct dovetail_queue_conn *conn);
/* The same, if it may be given another user. */
struct dovetail_queue_conn *
dovetail_queue_conns_worker(struct dovetail_queue *queue, unsigned int shard);
void dovetail_queue_conn_work(struct dovetail_queue_conn *conn,
			      struct dovetail_queue_user *user);
/* Call for each row of the workers' reports. fields: key, value, ..., NULL;
   age_msecs: of the report. */
void dovetail_queue_conns_reports(struct dovetail_queue *queue,
				  void (*callback)(const char *const *fields,
						   uint64_t age_msecs,
						   void *context),
				  void *context);
/* Append the workers' troubles, with their ages of now, and add how many more they
   have. */
void dovetail_queue_conns_troubles(struct dovetail_queue *queue,
				   ARRAY_TYPE(dovetail_health_trouble_of) *dest,
				   uint64_t *more);
/* Why a change would not reach this ack level now, or NULL. */
const char *dovetail_queue_unreachable(struct dovetail_queue *queue,
				       enum dovetail_ack_level level);

/* ---- dovetail-queue-jobs.c ---- */

/* An administrator wants a job. trusted: admin may speak for all users. */
void dovetail_queue_job_start(struct dovetail_queue *queue,
			      struct dovetail_queue_conn *admin, bool trusted,
			      uint64_t tag, const struct dovetail_job *set);
/* A worker's JOB_RESULT, JOB_PROGRESS or JOB_DONE. Returns 0, or -1: it makes no
   sense. */
int dovetail_queue_job_answer(struct dovetail_queue *queue,
			      struct dovetail_queue_conn *worker,
			      enum dovetail_frame_type type,
			      struct dovetail_wire_reader *r);
/* An administrator or a worker has gone. */
void dovetail_queue_jobs_conn_closed(struct dovetail_queue *queue,
				     struct dovetail_queue_conn *conn);
/* unread_size bytes for this client have not been taken by the socket yet. */
void dovetail_queue_jobs_flow(struct dovetail_queue *queue,
			      struct dovetail_queue_conn *admin,
			      size_t unread_size);

/* ---- dovetail-queue-status.c ---- */

/* Append the rows as DOVETAIL_FRAME_STATUS has them, their number first. */
void dovetail_queue_status(struct dovetail_queue *queue, buffer_t *dest);
/* What is wrong with Redis, or NULL. */
const char *dovetail_queue_redis_error(struct dovetail_queue *queue);

/* ---- dovetail-queue-health.c ---- */

/* Tell dovetail-health, if it is there, how things are, from now on. */
void dovetail_queue_health_init(struct dovetail_queue *queue,
				const char *socket_path);
void dovetail_queue_health_deinit(void);

/* ---- dovetail-queue.c ---- */

/* Unconfirmed bytes changed: see if the queue is full now. */
void dovetail_queue_check_full(struct dovetail_queue *queue);
/* All logs know where they stand: start reading acks. */
void dovetail_queue_log_synced(struct dovetail_queue *queue);

#endif
