/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* Does a mailbox's change fit to what is here, and what is to be asked for when it
   does not? */

#include "lib.h"
#include "dovetail-position.h"
#include "dovetail-replay.h"

enum replay_fit
replay_fits(const char *username, const struct dovetail_position *pos,
	    const uint8_t *origin_id,
	    const struct dovetail_change_mailbox *change, bool wanted)
{
	bool snapshot = (change->flags & DOVETAIL_MAILBOX_SNAPSHOT) != 0;
	int end;

	if (pos == NULL ||
	    memcmp(pos->origin, origin_id, sizeof(pos->origin)) != 0 ||
	    pos->applied.index_id != change->to.index_id)
		return snapshot ? REPLAY_FIT_APPLY : REPLAY_FIT_GAP;

	end = dovetail_log_pos_cmp(&change->to, &pos->applied);
	if (snapshot && end >= 0)
		return end > 0 || wanted ? REPLAY_FIT_APPLY : REPLAY_FIT_SKIP;
	if (snapshot) {
		return wanted && replay_wanted_is_past(username, change->guid) ?
			REPLAY_FIT_APPLY : REPLAY_FIT_OLD;
	}
	if (dovetail_log_pos_cmp(&change->from, &pos->applied) > 0)
		return REPLAY_FIT_GAP;
	if (end > 0)
		return REPLAY_FIT_APPLY;
	/* a part that claims no place is applied while we stand there */
	return end == 0 &&
		dovetail_log_pos_cmp(&change->from, &change->to) == 0 ?
		REPLAY_FIT_APPLY : REPLAY_FIT_SKIP;
}

static void replay_lacking(const char *username, const char *origin,
			   const struct dovetail_change_mailbox *change,
			   bool answer, const struct replay_outcome *outcome)
{
	guid_128_t all;

	if (outcome->uid_next == 0) {
		/* the tree here is not the primary's */
		guid_128_empty(all);
		replay_wanted_add(username, origin, all, "", 0,
				  outcome->error);
	} else if (answer) {
		replay_wanted_came_so_far(username, change->guid,
					  outcome->uid_next);
	} else if (!replay_compare_takes_gap(username, change->guid)) {
		replay_wanted_add(username, origin, change->guid, change->name,
				  outcome->uid_next, outcome->error);
	}
}

void replay_mailbox_done(const char *username, const char *origin,
			 const struct dovetail_change_mailbox *change,
			 bool wanted, const struct replay_outcome *outcome)
{
	bool snapshot = (change->flags & DOVETAIL_MAILBOX_SNAPSHOT) != 0;
	/* only a snapshot is the answer; what happened meanwhile comes as well,
	   or came before it */
	bool answer = wanted && snapshot && !outcome->old;

	switch (outcome->result) {
	case REPLAY_DONE:
		if (answer) {
			replay_wanted_arrived(username, change->guid,
					      &change->to);
		}
		break;
	case REPLAY_LACKING:
		replay_lacking(username, origin, change, answer, outcome);
		break;
	case REPLAY_FAILED:
		replay_wanted_add(username, origin, change->guid, change->name,
				  1, outcome->error);
		break;
	}
	if (!snapshot)
		replay_wanted_passed(username, change->guid, &change->to);
}
