#ifndef DOVETAIL_QUEUE_POSITIONS_H
#define DOVETAIL_QUEUE_POSITIONS_H

/* How far each mailbox is queued, as far as this process knows: several mail
   processes may capture the same records of a mailbox's log, and the queue
   drops what it already has.

   A mailbox's id is its GUID and its user together: a mail store that was copied
   for another user has the same GUIDs.

   Per mailbox the table has the interval [lo, hi) of the log that Redis has
   accepted, and up to two more that are on their way (a group each). A change
   is known only if its whole [from, to) lies inside: after a failure, what
   came behind the failed change does not hide it. Positions of another
   index_id replace what was known: the mailbox's index is a new one.

   The table is a help, not a truth: forgetting costs a repeated change, which
   the replica drops. It has at most max_count mailboxes; the one used longest
   ago is forgotten first. */

#include "dovetail-change.h"

struct dovetail_queue_positions;
/* Whatever the changes travel in; only compared. */
struct dovetail_queue_group;

void dovetail_queue_positions_id(const char *user, const guid_128_t guid,
				 guid_128_t id_r);

/* What the table keeps of a MAILBOX change while it is on its way. */
struct dovetail_queue_position_change {
	guid_128_t id;
	struct dovetail_log_pos from, to;
	bool snapshot;
};
ARRAY_DEFINE_TYPE(dovetail_queue_position_change,
		  struct dovetail_queue_position_change);

enum dovetail_queue_known {
	/* to be queued */
	DOVETAIL_QUEUE_KNOWN_NOT,
	/* all of it travels in one group */
	DOVETAIL_QUEUE_KNOWN_PENDING,
	/* Redis has all of it */
	DOVETAIL_QUEUE_KNOWN_STORED,
};

struct dovetail_queue_positions *
dovetail_queue_positions_init(unsigned int max_count);
void dovetail_queue_positions_deinit(struct dovetail_queue_positions **table);

/* group_r is set for _PENDING. Snapshots are never known. */
enum dovetail_queue_known
dovetail_queue_positions_check(struct dovetail_queue_positions *table,
			       const struct dovetail_queue_position_change *change,
			       struct dovetail_queue_group **group_r);
/* The change was put into group. */
void dovetail_queue_positions_pending(struct dovetail_queue_positions *table,
				      const struct dovetail_queue_position_change *change,
				      struct dovetail_queue_group *group);
/* What became of the change that was put into group; group need not exist any
   more, nor does the mailbox's entry. */
void dovetail_queue_positions_done(struct dovetail_queue_positions *table,
				   const struct dovetail_queue_position_change *change,
				   const struct dovetail_queue_group *group,
				   bool stored);

/* Everything before pos_r is queued, as far as changes went through here.
   Returns FALSE when nothing is known, or when a change before failed. */
bool dovetail_queue_positions_get(struct dovetail_queue_positions *table,
				  const guid_128_t id, uint32_t index_id,
				  struct dovetail_log_pos *pos_r);

unsigned int
dovetail_queue_positions_count(const struct dovetail_queue_positions *table);

#endif
