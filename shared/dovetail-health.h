#ifndef DOVETAIL_HEALTH_H
#define DOVETAIL_HEALTH_H

/* How is it? From what was measured (lag, queue, digests, roles, errors, and how
   old all that is) to one state of a closed list, with the reason, what to do, and
   who must do it. For the node itself, for each peer in each direction, and for
   single users.

     measured ──judge──> finding ──update──> health      (what is told)

   Nothing here asks for the time or does I/O: ages come in, and now is an argument.
   All times are milliseconds, of a clock that never jumps. */

#define DOVETAIL_HEALTH_NEVER UINT64_MAX

/* The worst of several counts: it is the last of them in this list. */
enum dovetail_health_state {
	/* all is queued, and the replicas have it */
	DOVETAIL_HEALTH_OK,
	/* something is behind, and is getting better */
	DOVETAIL_HEALTH_CATCHING_UP,
	/* something is behind, and is not getting better */
	DOVETAIL_HEALTH_LAGGING,
	/* nobody can tell: there is no news, or it is old */
	DOVETAIL_HEALTH_UNKNOWN,
	/* a replica differs from its primary */
	DOVETAIL_HEALTH_DIVERGED,
	/* something is behind, and nothing moves */
	DOVETAIL_HEALTH_STALLED,
	/* what is written now is on this node only */
	DOVETAIL_HEALTH_UNPROTECTED,
	/* this node may not take writes that it should take */
	DOVETAIL_HEALTH_FENCED,

	DOVETAIL_HEALTH_STATE_COUNT
};

enum dovetail_health_who {
	/* it gets well by itself */
	DOVETAIL_HEALTH_WHO_NOBODY,
	DOVETAIL_HEALTH_WHO_HERE,
	DOVETAIL_HEALTH_WHO_PEER,
	DOVETAIL_HEALTH_WHO_REDIS,
};

struct dovetail_health_settings {
	/* dovetail_health_lag: what is so far behind is not ok; it is again
	   when it is less than half */
	unsigned int lag_msecs;
	/* dovetail_health_stall: so long nothing moves before that is said */
	unsigned int stall_msecs;
	/* dovetail_health_max_age: what is older than this is not known */
	unsigned int max_age_msecs;
	/* dovetail_health_calm: so long it has to be better before that is
	   told; what is worse is told at once */
	unsigned int calm_msecs;
	/* so long a peer may say nothing; it says something every 5 seconds */
	unsigned int silence_msecs;
	/* dovetail_health_queue_percent of dovetail_queue_max_size; well again
	   below three quarters of it */
	unsigned int queue_percent;
};

/* ---- what was measured ---- */

/* Each finding's state before is needed for thresholds that differ on the way up
   and down. Strings are borrowed. */

struct dovetail_health_node {
	const char *node;
	/* of all that follows, and of what is known of peers: _NEVER when the
	   queue service has not answered yet */
	uint64_t age_msecs;
	/* NULL, or why this node may not take writes */
	const char *fenced;
	unsigned int peers;
	/* NULL, or why dovetail_ack cannot be reached now (for "local": why
	   nothing can be queued); and if that is Redis' fault */
	const char *unprotected;
	bool redis_failed;
	/* dovetail_ack_failure = refuse */
	bool refuses;
	/* of this node's log; max 0: not known */
	uint64_t queue_bytes, queue_max_bytes;
	/* users with something that is not queued, those of them whose sweep
	   has failed, and the longest of both */
	unsigned int dirty, dirty_failing;
	uint64_t dirty_msecs;
};

/* What a replica has trouble with, in numbers of users and mailboxes. */
struct dovetail_health_troubles {
	/* asked for, and did not come yet; those asked for several times */
	unsigned int lacking, failing;
	/* differ, and are being repaired; those that were not repaired */
	unsigned int differing, diverged;
};

/* What this node sends to a peer. */
struct dovetail_health_to {
	const char *peer;
	uint64_t age_msecs;
	/* what happens to reports cannot be seen: Redis is away */
	bool redis_failed;
	/* since the peer's last report; since this node's start, if the peer
	   was never heard */
	uint64_t heard_msecs;
	bool seen;
	/* age of the oldest entry that the peer has not confirmed; 0: it has
	   all */
	uint64_t lag_msecs, entries;
	/* since entries wait and none of them was confirmed */
	uint64_t idle_msecs;
	/* lag gets less */
	bool shrinking;
	struct dovetail_health_troubles troubles;
};

/* What this node gets from a peer. */
struct dovetail_health_from {
	const char *peer;
	/* of the report of the worker that has been silent for longest */
	uint64_t age_msecs;
	/* how many shards nobody reads, and since when that is so */
	unsigned int shards_missing;
	uint64_t missing_msecs;
	/* NULL, or why entries cannot be read: Redis is away */
	const char *redis_error;
	/* NULL, or why entries that are there are not applied */
	const char *stuck;
	/* since the peer made the last entry that came */
	uint64_t heard_msecs;
	/* as above: entries that came and are not applied */
	uint64_t lag_msecs, entries, idle_msecs;
	bool shrinking;
	struct dovetail_health_troubles troubles;
};

/* What is wrong with one user, beside all that is wrong with everybody. */
enum dovetail_health_trouble {
	/* at the primary: something of the user's is not queued; the same, and
	   reading the mailboxes again fails */
	DOVETAIL_HEALTH_DIRTY = 0,
	DOVETAIL_HEALTH_DIRTY_FAILING = 1,
	/* at a replica: as in dovetail_health_troubles */
	DOVETAIL_HEALTH_LACKING = 2,
	DOVETAIL_HEALTH_FAILING = 3,
	DOVETAIL_HEALTH_DIFFERING = 4,
	DOVETAIL_HEALTH_DIVERGED_MAILBOX = 5,
};
#define DOVETAIL_HEALTH_TROUBLE_MAX DOVETAIL_HEALTH_DIVERGED_MAILBOX

struct dovetail_health_user {
	const char *user;
	/* "": all of the user */
	const char *mailbox;
	/* the primary, and the replica that has the trouble; of a dirty user:
	   this node, and "" */
	const char *primary, *replica;
	uint64_t age_msecs;
	enum dovetail_health_trouble trouble;
	uint64_t trouble_msecs;
	/* "", or what is known of it */
	const char *text;
};

/* ---- what that means ---- */

/* Strings are allocated from the data stack. */
struct dovetail_health_finding {
	enum dovetail_health_state state;
	/* a sentence; "" when ok */
	const char *reason;
	/* a sentence; "" when there is nothing to do */
	const char *remedy;
	enum dovetail_health_who who;
};

void dovetail_health_judge_node(const struct dovetail_health_settings *set,
				const struct dovetail_health_node *node,
				enum dovetail_health_state before,
				struct dovetail_health_finding *finding_r);
void dovetail_health_judge_to(const struct dovetail_health_settings *set,
			      const struct dovetail_health_to *to,
			      enum dovetail_health_state before,
			      struct dovetail_health_finding *finding_r);
void dovetail_health_judge_from(const struct dovetail_health_settings *set,
				const struct dovetail_health_from *from,
				enum dovetail_health_state before,
				struct dovetail_health_finding *finding_r);
/* Never OK: who has no trouble is not asked about. */
void dovetail_health_judge_user(const struct dovetail_health_settings *set,
				const struct dovetail_health_user *user,
				struct dovetail_health_finding *finding_r);

/* ---- what is told ---- */

/* A finding that lasts. */
struct dovetail_health {
	enum dovetail_health_state state;
	uint64_t since_msecs;
	/* there was a finding other than UNKNOWN */
	bool known;
	/* findings are better than state since then */
	bool better;
	uint64_t better_since_msecs;

	/* of the last finding that was not better */
	char *reason, *remedy;
	enum dovetail_health_who who;
};

/* It begins as UNKNOWN, and becomes at once what the first finding says that is
   not. */
void dovetail_health_init(struct dovetail_health *health, uint64_t now_msecs);
void dovetail_health_deinit(struct dovetail_health *health);
/* Worse is taken at once, better when it was so for calm_msecs. Returns TRUE when
   the state has changed. */
bool dovetail_health_update(struct dovetail_health *health,
			    const struct dovetail_health_settings *set,
			    const struct dovetail_health_finding *finding,
			    uint64_t now_msecs);

/* Does something that waits move? Zeroed at first. */
struct dovetail_health_progress {
	uint64_t position;
	/* the position is this since then, and something has waited all the
	   time */
	uint64_t moved_msecs;
	/* the lag at the beginning of the present window */
	uint64_t window_lag_msecs, window_msecs;
	bool shrinking, started;
};

/* position: anything that differs when something was done; waiting: there is
   something to do. Sets shrinking in windows of calm_msecs. Returns idle_msecs. */
uint64_t
dovetail_health_progress_update(struct dovetail_health_progress *progress,
				const struct dovetail_health_settings *set,
				uint64_t position, bool waiting,
				uint64_t lag_msecs, uint64_t now_msecs);

/* "ok", "catching-up", ... */
const char *dovetail_health_state_name(enum dovetail_health_state state);
/* Returns 0, or -1: there is no such state. */
int dovetail_health_state_parse(const char *name,
				enum dovetail_health_state *state_r);
/* "nobody", "here", "peer", "redis" */
const char *dovetail_health_who_name(enum dovetail_health_who who);
const char *dovetail_health_trouble_name(enum dovetail_health_trouble trouble);
/* For people: "12 s", "5 min", ...; data stack or literal. */
const char *dovetail_health_duration(uint64_t msecs);

#endif
