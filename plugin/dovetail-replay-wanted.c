/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* What is lacking here and was asked for. Each thing lacking is one entry, kept
   in a file too (struct replay_file), so that a restart does not forget it. For a
   whole shard of the origin's users, user is empty and path the shard's number. */

#include "lib.h"
#include "array.h"
#include "buffer.h"
#include "guid.h"
#include "ioloop.h"
#include "randgen.h"
#include "str.h"
#include "dovetail-queue-client.h"
#include "dovetail-replay.h"
#include "dovetail-service.h"

/* Ask again when nothing came; doubling. */
#define WANTED_RETRY_MIN_SECS 5
#define WANTED_RETRY_MAX_SECS 300
/* It is asked for in vain, three times at least. */
#define WANTED_FAILING_SECS (WANTED_RETRY_MIN_SECS * 4)
/* How many questions may be open at once: a replica that lacks a lot fetches it
   piece by piece, and live changes go on in between. */
#define WANTED_OPEN_MAX 8
/* So many answers may be older than what is here. */
#define WANTED_PAST_MAX 3
/* Where one entry is missing others may be. */
#define WANTED_SHARD_DELAY_MSECS 100

struct wanted {
	char *user, *origin, *path;
	guid_128_t guid;
	uint32_t uid_next;
	/* of a shard: */
	uint8_t shard;
	uint32_t number;

	/* dovetail_monotonic_msecs() */
	uint64_t since_msecs;
	/* dovetail_monotonic_secs(); 0: not asked yet */
	time_t asked;
	unsigned int retry_secs;
	/* how many answers were older than what is here */
	unsigned int past_count;
	/* of a mailbox: how far its changes went that came since it was asked for.
	   A snapshot that does not reach so far was made before, and they came
	   out of the queue before it. index_id 0: there were none. */
	struct dovetail_log_pos passed;
	/* an answer that comes may be to a former process */
	bool ask_again;
};

static ARRAY(struct wanted) wanted_list;
static struct timeout *to_wanted;
static struct replay_file wanted_file;

static void wanted_ask(void *context);

static struct wanted *wanted_find(const char *user, const guid_128_t guid)
{
	struct wanted *w;

	array_foreach_modifiable(&wanted_list, w) {
		if (guid_128_equals(w->guid, guid) &&
		    strcmp(w->user, user) == 0)
			return w;
	}
	return NULL;
}

static bool wanted_is_shard(const struct wanted *w)
{
	return w->user[0] == '\0';
}

static struct wanted *wanted_find_shard(const char *origin, uint8_t shard)
{
	struct wanted *w;

	array_foreach_modifiable(&wanted_list, w) {
		if (wanted_is_shard(w) && w->shard == shard &&
		    strcmp(w->origin, origin) == 0)
			return w;
	}
	return NULL;
}

static void wanted_free(struct wanted *w)
{
	i_free(w->user);
	i_free(w->origin);
	i_free(w->path);
}

static void wanted_save(void)
{
	const struct wanted *w;
	string_t *str = t_str_new(256);

	array_foreach(&wanted_list, w)
		replay_file_add(str, w->user, w->origin, w->guid, w->path);
	replay_file_write(&wanted_file, str);
}

/* What is not a question that can be asked was not written by us. */
static void wanted_load(const char *user, const char *origin,
			const guid_128_t guid, const char *path)
{
	struct wanted *w;
	unsigned int shard = 0;

	if (user[0] == '\0') {
		if (str_to_uint(path, &shard) < 0 || shard > UINT8_MAX)
			return;
	} else if (guid_128_is_empty(guid) && path[0] != '\0') {
		return;
	}
	w = array_append_space(&wanted_list);
	w->user = i_strdup(user);
	w->origin = i_strdup(origin);
	w->path = i_strdup(path);
	guid_128_copy(w->guid, guid);
	/* asked with no knowledge of what is here: from the first UID */
	w->uid_next = 1;
	w->shard = shard;
	w->number = i_rand();
	w->retry_secs = WANTED_RETRY_MIN_SECS;
	w->since_msecs = dovetail_monotonic_msecs();
	w->ask_again = TRUE;
}

void replay_wanted_init(void)
{
	i_array_init(&wanted_list, 16);
	replay_file_open(&wanted_file, "wanted", wanted_load);
	to_wanted = timeout_add_short(100, wanted_ask, NULL);
}

void replay_wanted_deinit(void)
{
	struct wanted *w;

	timeout_remove(&to_wanted);
	array_foreach_modifiable(&wanted_list, w)
		wanted_free(w);
	array_free(&wanted_list);
	replay_file_close(&wanted_file);
}

int replay_queue_change(const struct dovetail_change *change,
			const char **error_r)
{
	struct dovetail_queue_batch batch;
	buffer_t *buf = t_buffer_create(256);
	uint64_t deadline = dovetail_monotonic_usecs() +
		replay.set.ack_timeout_msecs * 1000ULL;

	dovetail_change_encode(buf, change);
	i_zero(&batch);
	if (dovetail_queue_client_send(replay.client, &batch,
				       DOVETAIL_ACK_QUEUED, buf, deadline,
				       error_r) < 0)
		return -1;
	switch (dovetail_queue_client_wait(replay.client, &batch, deadline,
					   error_r)) {
	case 0:
		*error_r = "dovetail-queue did not answer in time";
		break;
	case 1:
		return 0;
	}
	dovetail_queue_client_cancel(replay.client, &batch);
	return -1;
}

/* Put the question into our own log. Returns 0, or -1 and error_r. */
static int wanted_send(const struct wanted *w, const char **error_r)
{
	struct dovetail_change change;

	i_zero(&change);
	change.user = w->user;
	if (wanted_is_shard(w)) {
		change.kind = DOVETAIL_CHANGE_SHARD_REQUEST;
		change.u.shard.shard = w->shard;
		change.u.shard.node = w->origin;
		change.u.shard.number = w->number;
	} else {
		change.kind = DOVETAIL_CHANGE_REQUEST;
		guid_128_copy(change.u.request.guid, w->guid);
		change.u.request.name = w->path;
		change.u.request.uid_next = w->uid_next;
	}
	return replay_queue_change(&change, error_r);
}

static void wanted_ask(void *context ATTR_UNUSED)
{
	struct wanted *w;
	unsigned int open = 0;
	time_t now = dovetail_monotonic_secs();
	time_t next = now + WANTED_RETRY_MAX_SECS;
	const char *error;

	timeout_remove(&to_wanted);
	if (wanted_file.unsaved) T_BEGIN {
		wanted_save();
	} T_END;
	array_foreach_modifiable(&wanted_list, w) {
		if (w->asked != 0 && w->asked + (time_t)w->retry_secs > now &&
		    !wanted_is_shard(w))
			open++;
	}
	array_foreach_modifiable(&wanted_list, w) {
		if (w->asked != 0 && w->asked + (time_t)w->retry_secs > now) {
			next = I_MIN(next, w->asked + (time_t)w->retry_secs);
			continue;
		}
		if (open >= WANTED_OPEN_MAX && !wanted_is_shard(w)) {
			next = I_MIN(next, now + 1);
			continue;
		}
		if (w->asked != 0) {
			w->retry_secs = I_MIN(w->retry_secs * 2,
					      WANTED_RETRY_MAX_SECS);
		}
		T_BEGIN {
			if (wanted_send(w, &error) < 0) {
				e_warning(replay.event, "%s: Cannot ask "
					  "%s for what is lacking: %s",
					  wanted_is_shard(w) ?
					  t_strdup_printf("Shard %u", w->shard) :
					  t_strdup_printf("User %s", w->user),
					  w->origin, error);
			} else if (!wanted_is_shard(w)) {
				open++;
			}
		} T_END;
		w->asked = now;
		next = I_MIN(next, w->asked + (time_t)w->retry_secs);
	}
	if (array_count(&wanted_list) > 0) {
		to_wanted = timeout_add(
			I_MAX(next - now, 1) * 1000, wanted_ask, NULL);
	}
}

void replay_wanted_add(const char *user, const char *origin,
		       const guid_128_t guid, const char *path,
		       uint32_t uid_next, const char *reason)
{
	struct wanted *w = wanted_find(user, guid);

	if (w != NULL) {
		/* the question is open; a later one knows more */
		w->uid_next = uid_next;
		return;
	}
	e_info(replay.event, "User %s: Asking %s for %s: %s", user, origin,
	       path[0] == '\0' ? "everything" :
	       t_strdup_printf("mailbox %s", t_str_replace(path, '\t', '/')),
	       reason);
	w = array_append_space(&wanted_list);
	w->user = i_strdup(user);
	w->origin = i_strdup(origin);
	w->path = i_strdup(path);
	guid_128_copy(w->guid, guid);
	w->uid_next = uid_next;
	w->since_msecs = dovetail_monotonic_msecs();
	w->retry_secs = WANTED_RETRY_MIN_SECS;
	T_BEGIN {
		wanted_save();
	} T_END;
	replay_control_changed();
	wanted_ask(NULL);
}

void replay_wanted_add_shard(const char *origin, uint8_t shard,
			     const char *reason)
{
	struct wanted *w = wanted_find_shard(origin, shard);

	if (w != NULL) {
		/* An answer to what was asked before may not have it. It is
		   asked again in time, not for each gap. */
		w->number = i_rand();
		w->retry_secs = WANTED_RETRY_MIN_SECS;
		return;
	}
	e_info(replay.event, "Shard %u: Asking %s for the state of all users: "
	       "%s", shard, origin, reason);
	w = array_append_space(&wanted_list);
	w->user = i_strdup("");
	w->origin = i_strdup(origin);
	w->path = i_strdup_printf("%u", shard);
	w->shard = shard;
	w->number = i_rand();
	w->since_msecs = dovetail_monotonic_msecs();
	w->retry_secs = WANTED_RETRY_MIN_SECS;
	T_BEGIN {
		wanted_save();
	} T_END;
	replay_control_changed();
	/* what else is missing shows first */
	timeout_remove(&to_wanted);
	to_wanted = timeout_add_short(WANTED_SHARD_DELAY_MSECS, wanted_ask,
				      NULL);
}

static void wanted_remove(struct wanted *w)
{
	wanted_free(w);
	array_delete(&wanted_list, array_ptr_to_idx(&wanted_list, w), 1);
	T_BEGIN {
		wanted_save();
	} T_END;
	replay_control_changed();
}

void replay_wanted_shard_arrived(const char *origin, uint8_t shard,
				 uint32_t number)
{
	struct wanted *w = wanted_find_shard(origin, shard);

	if (w == NULL || w->number != number)
		return;
	e_info(replay.event, "Shard %u: The state of all users came from %s",
	       shard, origin);
	wanted_remove(w);
}

bool replay_wanted_has(const char *user, const guid_128_t guid)
{
	return wanted_find(user, guid) != NULL;
}

void replay_wanted_passed(const char *user, const guid_128_t guid,
			  const struct dovetail_log_pos *to)
{
	struct wanted *w = wanted_find(user, guid);

	if (w != NULL && (w->passed.index_id != to->index_id ||
			  dovetail_log_pos_cmp(to, &w->passed) > 0))
		w->passed = *to;
}

void replay_wanted_arrived(const char *user, const guid_128_t guid,
			   const struct dovetail_log_pos *to)
{
	struct wanted *w = wanted_find(user, guid);

	if (w == NULL)
		return;
	if (!w->ask_again && (w->passed.index_id != to->index_id ||
			      dovetail_log_pos_cmp(to, &w->passed) >= 0)) {
		wanted_remove(w);
		return;
	}
	/* whatever it lacks the primary had before it reads this question */
	w->ask_again = FALSE;
	i_zero(&w->passed);
	w->asked = 0;
	w->retry_secs = WANTED_RETRY_MIN_SECS;
	wanted_ask(NULL);
}

void replay_wanted_gone(const char *user, const guid_128_t guid)
{
	struct wanted *w = wanted_find(user, guid);

	if (w != NULL)
		wanted_remove(w);
}

bool replay_wanted_is_past(const char *user, const guid_128_t guid)
{
	struct wanted *w = wanted_find(user, guid);

	return w != NULL && ++w->past_count > WANTED_PAST_MAX;
}

static bool tree_has(const struct dovetail_change_tree *tree,
		     const guid_128_t guid)
{
	const struct dovetail_tree_mailbox *tm;

	array_foreach(&tree->mailboxes, tm) {
		if (guid_128_equals(tm->guid, guid))
			return TRUE;
	}
	return FALSE;
}

void replay_wanted_tree_arrived(const char *user,
				const struct dovetail_change_tree *tree)
{
	unsigned int i;
	struct wanted *w;

	for (i = array_count(&wanted_list); i > 0; i--) {
		w = array_idx_modifiable(&wanted_list, i - 1);
		if (strcmp(w->user, user) == 0 &&
		    (guid_128_is_empty(w->guid) || !tree_has(tree, w->guid)))
			wanted_remove(w);
	}
}

void replay_wanted_came_so_far(const char *user, const guid_128_t guid,
			       uint32_t uid_next)
{
	struct wanted *w = wanted_find(user, guid);

	if (w == NULL)
		return;
	if (uid_next > w->uid_next) {
		w->asked = 0;
		w->retry_secs = WANTED_RETRY_MIN_SECS;
		w->ask_again = FALSE;
		i_zero(&w->passed);
	}
	w->uid_next = uid_next;
	wanted_ask(NULL);
}

unsigned int replay_wanted_count(const char *origin)
{
	const struct wanted *w;
	unsigned int count = 0;

	array_foreach(&wanted_list, w) {
		if (strcmp(w->origin, origin) == 0)
			count++;
	}
	return count;
}

void replay_wanted_troubles(const char *origin,
			    struct dovetail_health_troubles *counts,
			    ARRAY_TYPE(dovetail_health_trouble_of) *list)
{
	struct dovetail_health_trouble_of *of;
	const struct wanted *w;
	uint64_t now = dovetail_monotonic_msecs();
	bool failing;

	array_foreach(&wanted_list, w) {
		if (origin != NULL && strcmp(w->origin, origin) != 0)
			continue;
		failing = w->retry_secs >= WANTED_FAILING_SECS;
		if (counts != NULL) {
			if (failing)
				counts->failing++;
			else
				counts->lacking++;
		}
		if (list == NULL || wanted_is_shard(w))
			continue;
		of = array_append_space(list);
		of->user = w->user;
		of->mailbox = t_str_replace(w->path, '\t', '/');
		of->primary = w->origin;
		of->replica = replay.set.node;
		of->trouble = failing ? DOVETAIL_HEALTH_FAILING :
			DOVETAIL_HEALTH_LACKING;
		of->msecs = now - w->since_msecs;
		of->text = "";
	}
}
