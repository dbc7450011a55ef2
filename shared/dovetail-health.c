/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "dovetail-health.h"

static const char *const state_names[DOVETAIL_HEALTH_STATE_COUNT] = {
	"ok", "catching-up", "lagging", "unknown", "diverged", "stalled",
	"unprotected", "fenced",
};

static const char *const who_names[] = {
	"nobody", "here", "peer", "redis",
};

static const char *const
trouble_names[DOVETAIL_HEALTH_TROUBLE_MAX + 1] = {
	"dirty", "dirty-failing", "lacking", "failing", "differing", "diverged",
};

const char *dovetail_health_state_name(enum dovetail_health_state state)
{
	i_assert(state < N_ELEMENTS(state_names));
	return state_names[state];
}

int dovetail_health_state_parse(const char *name,
				enum dovetail_health_state *state_r)
{
	unsigned int i;

	for (i = 0; i < N_ELEMENTS(state_names); i++) {
		if (strcmp(state_names[i], name) == 0) {
			*state_r = i;
			return 0;
		}
	}
	return -1;
}

const char *dovetail_health_who_name(enum dovetail_health_who who)
{
	i_assert(who < N_ELEMENTS(who_names));
	return who_names[who];
}

const char *dovetail_health_trouble_name(enum dovetail_health_trouble trouble)
{
	i_assert(trouble < N_ELEMENTS(trouble_names));
	return trouble_names[trouble];
}

const char *dovetail_health_duration(uint64_t msecs)
{
	uint64_t secs = msecs / 1000;

	if (secs < 1)
		return "less than a second";
	if (secs < 120)
		return t_strdup_printf("%"PRIu64" s", secs);
	if (secs < 120 * 60)
		return t_strdup_printf("%"PRIu64" min", secs / 60);
	if (secs < 48 * 3600)
		return t_strdup_printf("%"PRIu64" h", secs / 3600);
	return t_strdup_printf("%"PRIu64" days", secs / 86400);
}

/* ---- judge ---- */

static void
find(struct dovetail_health_finding *finding, enum dovetail_health_state state,
     const char *reason, const char *remedy, enum dovetail_health_who who)
{
	finding->state = state;
	finding->reason = reason;
	finding->remedy = remedy;
	finding->who = who;
}

static void find_ok(struct dovetail_health_finding *finding)
{
	find(finding, DOVETAIL_HEALTH_OK, "", "", DOVETAIL_HEALTH_WHO_NOBODY);
}

static const char *
count_of(uint64_t count, const char *one, const char *many)
{
	return t_strdup_printf("%"PRIu64" %s", count, count == 1 ? one : many);
}

/* Is the lag worth telling? On the way down, less of it is. */
static bool lag_is_large(const struct dovetail_health_settings *set,
			 uint64_t lag_msecs, enum dovetail_health_state before)
{
	bool was = before == DOVETAIL_HEALTH_CATCHING_UP ||
		before == DOVETAIL_HEALTH_LAGGING ||
		before == DOVETAIL_HEALTH_STALLED;

	return lag_msecs >= (was ? set->lag_msecs / 2 : set->lag_msecs);
}

static bool queue_is_large(const struct dovetail_health_settings *set,
			   const struct dovetail_health_node *node,
			   enum dovetail_health_state before)
{
	unsigned int percent = before == DOVETAIL_HEALTH_LAGGING ?
		set->queue_percent / 4 * 3 : set->queue_percent;

	return node->queue_max_bytes > 0 &&
		node->queue_bytes >= node->queue_max_bytes / 100 * percent;
}

void dovetail_health_judge_node(const struct dovetail_health_settings *set,
				const struct dovetail_health_node *node,
				enum dovetail_health_state before,
				struct dovetail_health_finding *finding_r)
{
	if (node->age_msecs >= set->max_age_msecs) {
		find(finding_r, DOVETAIL_HEALTH_UNKNOWN,
		     node->age_msecs == DOVETAIL_HEALTH_NEVER ?
		     "The service dovetail-queue has not answered yet" :
		     t_strdup_printf("The service dovetail-queue has not "
				     "answered for %s",
				     dovetail_health_duration(node->age_msecs)),
		     "See Dovecot's log for why dovetail-queue does not run",
		     DOVETAIL_HEALTH_WHO_HERE);
	} else if (node->fenced != NULL) {
		find(finding_r, DOVETAIL_HEALTH_FENCED,
		     t_strdup_printf("%s may not take writes: %s", node->node,
				     node->fenced),
		     "Mail waits at the MTA and is not lost. Send it to the "
		     "primary, or make this node the primary",
		     DOVETAIL_HEALTH_WHO_HERE);
	} else if (node->peers == 0) {
		find(finding_r, DOVETAIL_HEALTH_UNPROTECTED,
		     "There is no replica: dovetail_peers is empty",
		     "Name the other nodes in dovetail_peers",
		     DOVETAIL_HEALTH_WHO_HERE);
	} else if (node->unprotected != NULL) {
		find(finding_r, DOVETAIL_HEALTH_UNPROTECTED,
		     t_strdup_printf("What is written now is on %s only%s: %s",
				     node->node, node->refuses ?
				     ", and new mail is refused" : "",
				     node->unprotected),
		     node->redis_failed ? "Bring Redis back" :
		     "Bring a replica back; \"doveadm dovetail status\" shows "
		     "them",
		     node->redis_failed ? DOVETAIL_HEALTH_WHO_REDIS :
		     DOVETAIL_HEALTH_WHO_PEER);
	} else if (node->dirty_failing > 0 &&
		   node->dirty_msecs >= set->stall_msecs) {
		find(finding_r, DOVETAIL_HEALTH_STALLED,
		     t_strdup_printf("The mailboxes of %s cannot be read for "
				     "queueing, the first since %s",
				     count_of(node->dirty_failing, "user",
					      "users"),
				     dovetail_health_duration(
						node->dirty_msecs)),
		     "See dovetail-replay in Dovecot's log",
		     DOVETAIL_HEALTH_WHO_HERE);
	} else if (queue_is_large(set, node, before)) {
		find(finding_r, DOVETAIL_HEALTH_LAGGING,
		     t_strdup_printf("The queue has %"PRIu64" %% of "
				     "dovetail_queue_max_size: a replica does "
				     "not confirm", node->queue_bytes /
				     I_MAX(node->queue_max_bytes / 100, 1)),
		     "Bring the replica back, or take it out of dovetail_peers",
		     DOVETAIL_HEALTH_WHO_PEER);
	} else if (node->dirty > 0 &&
		   lag_is_large(set, node->dirty_msecs, before)) {
		find(finding_r, DOVETAIL_HEALTH_CATCHING_UP,
		     t_strdup_printf("The mailboxes of %s are being read for "
				     "what is not queued yet",
				     count_of(node->dirty, "user", "users")), "",
		     DOVETAIL_HEALTH_WHO_NOBODY);
	} else {
		find_ok(finding_r);
	}
}

/* TRUE: some are worse than what follows from a lag that shrinks. */
static bool
judge_diverged(const struct dovetail_health_troubles *troubles,
	       const char *where, struct dovetail_health_finding *finding_r)
{
	if (troubles->diverged == 0)
		return FALSE;
	find(finding_r, DOVETAIL_HEALTH_DIVERGED,
	     t_strdup_printf("%s %s%s from the primary's",
			     count_of(troubles->diverged, "mailbox", "mailboxes"),
			     troubles->diverged == 1 ? "differs" : "differ",
			     where),
	     "Look with \"doveadm dovetail verify --explain\", mend with "
	     "\"doveadm dovetail repair\", on the primary",
	     DOVETAIL_HEALTH_WHO_HERE);
	return TRUE;
}

static bool
judge_failing(const struct dovetail_health_troubles *troubles,
	      const char *where, enum dovetail_health_who who,
	      struct dovetail_health_finding *finding_r)
{
	if (troubles->failing == 0)
		return FALSE;
	find(finding_r, DOVETAIL_HEALTH_STALLED,
	     t_strdup_printf("%s cannot be brought up to date%s",
			     count_of(troubles->failing, "mailbox",
				      "mailboxes"), where),
	     "See dovetail-replay in the log there", who);
	return TRUE;
}

static bool
judge_mending(const struct dovetail_health_troubles *troubles,
	      const char *where, struct dovetail_health_finding *finding_r)
{
	if (troubles->lacking == 0 && troubles->differing == 0)
		return FALSE;
	find(finding_r, DOVETAIL_HEALTH_CATCHING_UP,
	     t_strdup_printf("%s asked for, %u being repaired%s",
			     count_of(troubles->lacking, "mailbox",
				      "mailboxes"),
			     troubles->differing, where),
	     "", DOVETAIL_HEALTH_WHO_NOBODY);
	return TRUE;
}

/* The lag of a direction that moves. */
static bool
judge_lag(const struct dovetail_health_settings *set, uint64_t lag_msecs,
	  bool shrinking, const char *where, enum dovetail_health_state before,
	  struct dovetail_health_finding *finding_r)
{
	if (!lag_is_large(set, lag_msecs, before))
		return FALSE;
	if (shrinking) {
		find(finding_r, DOVETAIL_HEALTH_CATCHING_UP,
		     t_strdup_printf("%s is %s behind, and gains", where,
				     dovetail_health_duration(lag_msecs)), "",
		     DOVETAIL_HEALTH_WHO_NOBODY);
	} else {
		find(finding_r, DOVETAIL_HEALTH_LAGGING,
		     t_strdup_printf("%s is %s behind", where,
				     dovetail_health_duration(lag_msecs)),
		     "If it lasts: more workers (dovetail-replay's "
		     "process_limit) or a faster disk there",
		     DOVETAIL_HEALTH_WHO_NOBODY);
	}
	return TRUE;
}

void dovetail_health_judge_to(const struct dovetail_health_settings *set,
			      const struct dovetail_health_to *to,
			      enum dovetail_health_state before,
			      struct dovetail_health_finding *finding_r)
{
	const char *where = t_strconcat(" on ", to->peer, NULL);

	if (to->age_msecs >= set->max_age_msecs) {
		find(finding_r, DOVETAIL_HEALTH_UNKNOWN,
		     "The service dovetail-queue does not answer",
		     "See Dovecot's log for why dovetail-queue does not run",
		     DOVETAIL_HEALTH_WHO_HERE);
	} else if (to->redis_failed) {
		find(finding_r, DOVETAIL_HEALTH_UNKNOWN,
		     t_strdup_printf("Redis is away, by which %s would report",
				     to->peer), "Bring Redis back",
		     DOVETAIL_HEALTH_WHO_REDIS);
	} else if (!to->seen && to->heard_msecs < set->stall_msecs) {
		find(finding_r, DOVETAIL_HEALTH_UNKNOWN,
		     t_strdup_printf("%s has not been heard of yet", to->peer),
		     "", DOVETAIL_HEALTH_WHO_NOBODY);
	} else if (!to->seen) {
		find(finding_r, DOVETAIL_HEALTH_STALLED,
		     t_strdup_printf("%s has never been heard of", to->peer),
		     "Look there: its Dovecot or dovetail-replay does not run, "
		     "it uses another Redis, or it lacks this node's key",
		     DOVETAIL_HEALTH_WHO_PEER);
	} else if (to->heard_msecs >= set->stall_msecs) {
		find(finding_r, DOVETAIL_HEALTH_STALLED,
		     t_strdup_printf("%s has not been heard of for %s; %s "
				     "wait%s for it", to->peer,
				     dovetail_health_duration(to->heard_msecs),
				     count_of(to->entries, "entry", "entries"),
				     to->entries == 1 ? "s" : ""),
		     "Start its Dovecot and its Redis connection. If it does "
		     "not come back, take it out of dovetail_peers",
		     DOVETAIL_HEALTH_WHO_PEER);
	} else if (to->entries > 0 && to->idle_msecs >= set->stall_msecs) {
		find(finding_r, DOVETAIL_HEALTH_STALLED,
		     t_strdup_printf("%s lives, but has not confirmed anything "
				     "for %s", to->peer,
				     dovetail_health_duration(to->idle_msecs)),
		     "See \"doveadm dovetail status\" and Dovecot's log there",
		     DOVETAIL_HEALTH_WHO_PEER);
	} else if (judge_failing(&to->troubles, where,
				 DOVETAIL_HEALTH_WHO_PEER, finding_r) ||
		   judge_diverged(&to->troubles, where, finding_r)) {
		/* told */
	} else if (to->heard_msecs >= set->silence_msecs) {
		find(finding_r, DOVETAIL_HEALTH_UNKNOWN,
		     t_strdup_printf("%s has not been heard of for %s",
				     to->peer,
				     dovetail_health_duration(to->heard_msecs)),
		     "", DOVETAIL_HEALTH_WHO_NOBODY);
	} else if (judge_lag(set, to->lag_msecs, to->shrinking, to->peer,
			     before, finding_r) ||
		   judge_mending(&to->troubles, where, finding_r)) {
		/* told */
	} else {
		find_ok(finding_r);
	}
}

void dovetail_health_judge_from(const struct dovetail_health_settings *set,
				const struct dovetail_health_from *from,
				enum dovetail_health_state before,
				struct dovetail_health_finding *finding_r)
{
	static const char *const see_log =
		"See dovetail-replay in Dovecot's log";

	if (from->shards_missing > 0) {
		find(finding_r, from->missing_msecs >= set->lag_msecs ?
		     DOVETAIL_HEALTH_STALLED : DOVETAIL_HEALTH_UNKNOWN,
		     t_strdup_printf("Nobody applies what comes from %s in %s "
				     "(service dovetail-replay)", from->peer,
				     count_of(from->shards_missing, "shard",
					      "shards")),
		     see_log, DOVETAIL_HEALTH_WHO_HERE);
	} else if (from->age_msecs >= set->max_age_msecs) {
		find(finding_r, DOVETAIL_HEALTH_UNKNOWN,
		     t_strdup_printf("A worker of dovetail-replay has said "
				     "nothing for %s",
				     from->age_msecs == DOVETAIL_HEALTH_NEVER ?
				     "ever" :
				     dovetail_health_duration(from->age_msecs)),
		     see_log, DOVETAIL_HEALTH_WHO_HERE);
	} else if (from->redis_error != NULL) {
		find(finding_r, DOVETAIL_HEALTH_UNKNOWN,
		     t_strdup_printf("What %s has written cannot be read: %s",
				     from->peer, from->redis_error),
		     "Bring Redis back", DOVETAIL_HEALTH_WHO_REDIS);
	} else if (from->stuck != NULL) {
		find(finding_r, DOVETAIL_HEALTH_STALLED,
		     t_strdup_printf("What comes from %s is not applied: %s",
				     from->peer, from->stuck),
		     "See \"doveadm dovetail status\"",
		     DOVETAIL_HEALTH_WHO_HERE);
	} else if (from->entries > 0 && from->idle_msecs >= set->stall_msecs) {
		find(finding_r, DOVETAIL_HEALTH_STALLED,
		     t_strdup_printf("Nothing of %s was applied for %s",
				     from->peer, dovetail_health_duration(
						from->idle_msecs)),
		     see_log, DOVETAIL_HEALTH_WHO_HERE);
	} else if (judge_failing(&from->troubles, "",
				 DOVETAIL_HEALTH_WHO_HERE, finding_r) ||
		   judge_diverged(&from->troubles, "", finding_r)) {
		/* told */
	} else if (from->entries == 0 &&
		   from->heard_msecs >= set->silence_msecs) {
		find(finding_r, DOVETAIL_HEALTH_UNKNOWN,
		     from->heard_msecs == DOVETAIL_HEALTH_NEVER ?
		     t_strdup_printf("Nothing has come from %s yet",
				     from->peer) :
		     t_strdup_printf("%s has not written for %s: whether "
				     "everything is here is not known",
				     from->peer, dovetail_health_duration(
						from->heard_msecs)),
		     "Look at that node", DOVETAIL_HEALTH_WHO_PEER);
	} else if (judge_lag(set, from->lag_msecs, from->shrinking,
			     "This node", before, finding_r) ||
		   judge_mending(&from->troubles, "", finding_r)) {
		/* told */
	} else {
		find_ok(finding_r);
	}
}

void dovetail_health_judge_user(const struct dovetail_health_settings *set,
				const struct dovetail_health_user *user,
				struct dovetail_health_finding *finding_r)
{
	const char *what = user->mailbox[0] == '\0' ? "All mailboxes" :
		t_strdup_printf("Mailbox %s", user->mailbox);
	const char *text = user->text[0] == '\0' ? "" :
		t_strconcat(": ", user->text, NULL);

	if (user->age_msecs >= set->max_age_msecs) {
		find(finding_r, DOVETAIL_HEALTH_UNKNOWN,
		     "What was known of this user is old", "",
		     DOVETAIL_HEALTH_WHO_NOBODY);
		return;
	}
	switch (user->trouble) {
	case DOVETAIL_HEALTH_DIRTY:
		find(finding_r, DOVETAIL_HEALTH_CATCHING_UP,
		     t_strdup_printf("Not all is queued%s", text), "",
		     DOVETAIL_HEALTH_WHO_NOBODY);
		break;
	case DOVETAIL_HEALTH_DIRTY_FAILING:
		find(finding_r, user->trouble_msecs >= set->stall_msecs ?
		     DOVETAIL_HEALTH_STALLED : DOVETAIL_HEALTH_CATCHING_UP,
		     t_strdup_printf("Not all is queued, and the mailboxes "
				     "cannot be read%s", text),
		     "See dovetail-replay in Dovecot's log",
		     DOVETAIL_HEALTH_WHO_HERE);
		break;
	case DOVETAIL_HEALTH_LACKING:
		find(finding_r, DOVETAIL_HEALTH_CATCHING_UP,
		     t_strdup_printf("%s: %s has asked %s for what it lacks%s",
				     what, user->replica, user->primary, text),
		     "", DOVETAIL_HEALTH_WHO_NOBODY);
		break;
	case DOVETAIL_HEALTH_FAILING:
		find(finding_r, DOVETAIL_HEALTH_STALLED,
		     t_strdup_printf("%s: %s asks %s in vain for what it "
				     "lacks%s", what, user->replica,
				     user->primary, text),
		     t_strdup_printf("See dovetail-replay in Dovecot's log on "
				     "%s and %s", user->replica,
				     user->primary),
		     DOVETAIL_HEALTH_WHO_HERE);
		break;
	case DOVETAIL_HEALTH_DIFFERING:
		find(finding_r, user->trouble_msecs >= set->stall_msecs ?
		     DOVETAIL_HEALTH_DIVERGED : DOVETAIL_HEALTH_CATCHING_UP,
		     t_strdup_printf("%s differs on %s from %s's, and is being "
				     "repaired%s", what, user->replica,
				     user->primary, text), "",
		     DOVETAIL_HEALTH_WHO_NOBODY);
		break;
	case DOVETAIL_HEALTH_DIVERGED_MAILBOX:
		find(finding_r, DOVETAIL_HEALTH_DIVERGED,
		     t_strdup_printf("%s differs on %s from %s's%s", what,
				     user->replica, user->primary, text),
		     t_strdup_printf("On %s: \"doveadm dovetail verify -u %s "
				     "--explain\", then \"repair\"",
				     user->primary, user->user),
		     DOVETAIL_HEALTH_WHO_HERE);
		break;
	}
}

/* ---- what is told ---- */

void dovetail_health_init(struct dovetail_health *health, uint64_t now_msecs)
{
	i_zero(health);
	health->state = DOVETAIL_HEALTH_UNKNOWN;
	health->since_msecs = now_msecs;
	health->reason = i_strdup("It has just been started");
	health->remedy = i_strdup("");
}

void dovetail_health_deinit(struct dovetail_health *health)
{
	i_free(health->reason);
	i_free(health->remedy);
}

static void
health_set_text(struct dovetail_health *health,
		const struct dovetail_health_finding *finding)
{
	/* it is asked every second, and says mostly the same */
	if (strcmp(health->reason, finding->reason) != 0) {
		i_free(health->reason);
		health->reason = i_strdup(finding->reason);
	}
	if (strcmp(health->remedy, finding->remedy) != 0) {
		i_free(health->remedy);
		health->remedy = i_strdup(finding->remedy);
	}
	health->who = finding->who;
}

bool dovetail_health_update(struct dovetail_health *health,
			    const struct dovetail_health_settings *set,
			    const struct dovetail_health_finding *finding,
			    uint64_t now_msecs)
{
	if (finding->state == health->state) {
		health->better = FALSE;
		health->known = health->known ||
			finding->state != DOVETAIL_HEALTH_UNKNOWN;
		health_set_text(health, finding);
		return FALSE;
	}
	if (finding->state < health->state && health->known) {
		if (!health->better) {
			health->better = TRUE;
			health->better_since_msecs = now_msecs;
		}
		if (now_msecs - health->better_since_msecs < set->calm_msecs)
			return FALSE;
	}
	health->state = finding->state;
	health->since_msecs = now_msecs;
	health->better = FALSE;
	health->known = TRUE;
	health_set_text(health, finding);
	return TRUE;
}

uint64_t
dovetail_health_progress_update(struct dovetail_health_progress *progress,
				const struct dovetail_health_settings *set,
				uint64_t position, bool waiting,
				uint64_t lag_msecs, uint64_t now_msecs)
{
	if (!progress->started || !waiting || position != progress->position) {
		progress->position = position;
		progress->moved_msecs = now_msecs;
	}
	if (!progress->started) {
		progress->started = TRUE;
		progress->window_lag_msecs = lag_msecs;
		progress->window_msecs = now_msecs;
	} else if (now_msecs - progress->window_msecs >= set->calm_msecs) {
		progress->shrinking = lag_msecs < progress->window_lag_msecs;
		progress->window_lag_msecs = lag_msecs;
		progress->window_msecs = now_msecs;
	}
	return now_msecs - progress->moved_msecs;
}
