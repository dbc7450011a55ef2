#ifndef DOVETAIL_POSITION_H
#define DOVETAIL_POSITION_H

/* How far a mailbox is queued (as primary) and applied (as replica). Both stand
   in the header of an index extension, so they go away with a rebuilt index and
   back with a restored one: a position never claims more than the index knows. */

#include "dovetail-change.h"

struct mailbox;
struct mail_index;
struct mail_index_view;
struct mail_index_transaction;
struct dovetail_mailbox_digest;

#define DOVETAIL_ORIGIN_ID_SIZE 8

struct dovetail_position {
	/* primary: everything before this was accepted by the queue */
	struct dovetail_log_pos queued;
	/* replica: everything before this place of the origin's log is in
	   this mailbox */
	struct dovetail_log_pos applied;
	/* first bytes of BLAKE2b of the origin's node name: whose log applied
	   belongs to, or who had the mailbox made, or whose replica it was
	   when its index was rebuilt (applied is zero then) */
	uint8_t origin[DOVETAIL_ORIGIN_ID_SIZE];
};

void dovetail_origin_id(const char *node, uint8_t id_r[DOVETAIL_ORIGIN_ID_SIZE]);

/* Read the position as view has it. FALSE and all zero when there is none. */
bool dovetail_position_get_view(struct mail_index *index,
				struct mail_index_view *view,
				struct dovetail_position *pos_r);
/* The same for an open mailbox, refreshing its index first. */
bool dovetail_position_get(struct mailbox *box,
			   struct dovetail_position *pos_r);
/* The end of an open mailbox's log, after the refresh of
   dovetail_position_get(). */
void dovetail_position_log_end(struct mailbox *box,
			       struct dovetail_log_pos *pos_r);

/* Write queued in a transaction of its own, and with it what md (or NULL) has to
   write. Returns 0, or -1 and error_r (data stack). */
int dovetail_position_set_queued(struct mailbox *box,
				 const struct dovetail_log_pos *queued,
				 struct dovetail_mailbox_digest *md,
				 const char **error_r);
/* Make applied (and origin) part of the transaction that applies a change. What
   this node has queued as the primary does not count any more: when it is the
   primary again it begins with a snapshot, so that nobody's MODSEQs are behind
   those that the replay has raised here. */
void dovetail_position_update_applied(struct mail_index *index,
				      struct mail_index_transaction *trans,
				      const struct dovetail_log_pos *applied,
				      const uint8_t origin[DOVETAIL_ORIGIN_ID_SIZE]);
/* This mailbox is a replica of the origin's: say so where it does not say it yet,
   without a place in its log. Returns 0, or -1 and error_r (data stack). */
int dovetail_position_claim(struct mailbox *box,
			    const uint8_t origin[DOVETAIL_ORIGIN_ID_SIZE],
			    const char **error_r);

#endif
