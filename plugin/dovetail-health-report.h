#ifndef DOVETAIL_HEALTH_REPORT_H
#define DOVETAIL_HEALTH_REPORT_H

/* What dovetail-health is told, every second, and what it judges: what dovetail-queue
   knows itself, and what the workers of dovetail-replay have told it in REPORTs and
   TROUBLES. These are the payloads of the frames (dovetail-frame.h) HEALTH and
   TROUBLES.

     dovetail-replay ──REPORT, TROUBLES──> dovetail-queue ──HEALTH──> dovetail-health

   Ages and not times travel, so that no clocks are compared; but for sent_msecs, of
   the machine's clock that never jumps: what has waited to be read is older than it
   looks.

     report    num sent_msecs  u8 known  str node  u8 ack level  u8 refuses  str fenced
               str unprotected  str redis_error  num each: queue_entries,
               queue_bytes, dirty, dirty_failing, dirty_msecs, rejected,
               verified_time;
               num peers, each:
                 str peer
                 to:   u8 seen  num each: heard_msecs, lag_msecs, entries,
                       bytes, position, rejected; counts
                 from: num each: age_msecs, shards_missing, heard_msecs,
                       lag_msecs, entries, position, rejected; counts;
                       str redis_error  str stuck
               troubles
     counts    num each: lacking, failing, differing, diverged
     troubles  num more  num count, each: str user  str mailbox  str primary
               str replica  u8 enum dovetail_health_trouble  num msecs
               str text

   redis_error, fenced, unprotected, stuck: "" when there is none. Ages: 0 is
   "never", everything else is one more than it is. */

#include "dovetail-health.h"
#include "dovetail-wire.h"

/* What is kept, and sent, of all troubles; more are counted. */
#define DOVETAIL_HEALTH_TROUBLES_MAX 1000
#define DOVETAIL_HEALTH_TROUBLES_MAX_BYTES (256 * 1024)
#define DOVETAIL_HEALTH_TEXT_MAX_LEN 300
#define DOVETAIL_HEALTH_PEERS_MAX 64

struct dovetail_health_trouble_of {
	const char *user, *mailbox, *primary, *replica;
	enum dovetail_health_trouble trouble;
	uint64_t msecs;
	const char *text;
};
ARRAY_DEFINE_TYPE(dovetail_health_trouble_of, struct dovetail_health_trouble_of);

struct dovetail_health_report_peer {
	const char *peer;
	struct {
		bool seen;
		uint64_t heard_msecs, lag_msecs, entries, bytes, position;
		uint64_t rejected;
		struct dovetail_health_troubles troubles;
	} to;
	struct {
		uint64_t age_msecs, shards_missing, heard_msecs, lag_msecs;
		uint64_t entries, position, rejected;
		struct dovetail_health_troubles troubles;
		const char *redis_error, *stuck;
	} from;
};

struct dovetail_health_report {
	/* dovetail_monotonic_msecs() */
	uint64_t sent_msecs;
	/* FALSE: dovetail-queue has just been started, and what follows says
	   nothing yet */
	bool known;
	const char *node;
	uint8_t ack;
	bool refuses;
	const char *fenced, *unprotected, *redis_error;
	uint64_t queue_entries, queue_bytes;
	uint64_t dirty, dirty_failing, dirty_msecs, rejected;
	/* When all users were compared last, seconds since 1970; 0: not yet */
	uint64_t verified_time;
	ARRAY(struct dovetail_health_report_peer) peers;
	ARRAY_TYPE(dovetail_health_trouble_of) troubles;
	/* how many more there are */
	uint64_t troubles_more;
};

void dovetail_health_report_put(buffer_t *buf,
				const struct dovetail_health_report *report);
/* Strings are allocated from pool. FALSE: it makes no sense. */
bool dovetail_health_report_get(struct dovetail_wire_reader *r, pool_t pool,
				struct dovetail_health_report *report_r);

/* The same for the troubles alone. _put leaves out and counts what is too much:
   above _MAX, and above max_size bytes. */
void dovetail_health_troubles_put(buffer_t *buf,
	const ARRAY_TYPE(dovetail_health_trouble_of) *troubles, uint64_t more,
	size_t max_size);
bool dovetail_health_troubles_get(struct dovetail_wire_reader *r, pool_t pool,
				  ARRAY_TYPE(dovetail_health_trouble_of) *troubles_r,
				  uint64_t *more_r);

/* What a replica's report (struct dovetail_ack) says of a primary's users: counts,
   then troubles. Every few seconds, so few of them. */
#define DOVETAIL_HEALTH_ACK_MAX_BYTES (8 * 1024)
void dovetail_health_ack_put(buffer_t *buf,
	const struct dovetail_health_troubles *counts,
	const ARRAY_TYPE(dovetail_health_trouble_of) *troubles);
bool dovetail_health_ack_get(const void *data, size_t size, pool_t pool,
			     struct dovetail_health_troubles *counts_r,
			     ARRAY_TYPE(dovetail_health_trouble_of) *troubles_r);

#endif
