/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* Mailboxes that are known to differ from the primary's: from the moment when that is
   noticed until they are known to be equal, for dovetail-health. Nothing is kept in
   files: after a restart what waits for its repair is compared again. */

#include "lib.h"
#include "array.h"
#include "buffer.h"
#include "guid.h"
#include "str.h"
#include "dovetail-frame.h"
#include "dovetail-health-report.h"
#include "dovetail-replay.h"
#include "dovetail-service.h"

struct trouble {
	char *user, *origin, *mailbox, *text;
	guid_128_t guid;
	enum dovetail_health_trouble trouble;
	uint64_t since_msecs;
};

static ARRAY(struct trouble) troubles;
/* the last TROUBLES frame was empty */
static bool sent_none = TRUE;

static struct trouble *
trouble_find(const char *user, const guid_128_t guid)
{
	struct trouble *t;

	if (!array_is_created(&troubles))
		return NULL;
	array_foreach_modifiable(&troubles, t) {
		if (guid_128_equals(t->guid, guid) &&
		    strcmp(t->user, user) == 0)
			return t;
	}
	return NULL;
}

static void trouble_free(struct trouble *t)
{
	i_free(t->user);
	i_free(t->origin);
	i_free(t->mailbox);
	i_free(t->text);
}

void replay_trouble_set(const char *user, const char *origin,
			const guid_128_t guid, const char *path,
			enum dovetail_health_trouble trouble, const char *text)
{
	struct trouble *t = trouble_find(user, guid);

	if (!array_is_created(&troubles))
		i_array_init(&troubles, 8);
	if (t == NULL) {
		/* Very many: the others show when these are repaired. */
		if (array_count(&troubles) >= DOVETAIL_HEALTH_TROUBLES_MAX)
			return;
		t = array_append_space(&troubles);
		t->user = i_strdup(user);
		t->since_msecs = dovetail_monotonic_msecs();
		guid_128_copy(t->guid, guid);
	} else if (t->trouble == trouble && strcmp(t->text, text) == 0) {
		return;
	} else if (t->trouble == DOVETAIL_HEALTH_DIVERGED_MAILBOX &&
		   trouble == DOVETAIL_HEALTH_DIFFERING) {
		/* another try, which may fail as the one before */
		return;
	}
	i_free(t->origin);
	i_free(t->mailbox);
	i_free(t->text);
	t->origin = i_strdup(origin);
	t->mailbox = i_strdup(t_str_replace(path, '\t', '/'));
	t->text = i_strndup(text, DOVETAIL_HEALTH_TEXT_MAX_LEN);
	t->trouble = trouble;
	replay_control_changed();
}

void replay_trouble_failed(const char *user, const guid_128_t guid,
			   const char *error)
{
	struct trouble *t = trouble_find(user, guid);

	if (t == NULL)
		return;
	t->trouble = DOVETAIL_HEALTH_DIVERGED_MAILBOX;
	i_free(t->text);
	t->text = i_strndup(error, DOVETAIL_HEALTH_TEXT_MAX_LEN);
	replay_control_changed();
}

void replay_trouble_clear(const char *user, const guid_128_t guid)
{
	struct trouble *t = trouble_find(user, guid);

	if (t == NULL)
		return;
	trouble_free(t);
	array_delete(&troubles, array_ptr_to_idx(&troubles, t), 1);
	replay_control_changed();
}

void replay_troubles_count(const char *origin,
			   struct dovetail_health_troubles *counts_r)
{
	const struct trouble *t;

	i_zero(counts_r);
	replay_wanted_troubles(origin, counts_r, NULL);
	if (!array_is_created(&troubles))
		return;
	array_foreach(&troubles, t) {
		if (strcmp(t->origin, origin) != 0)
			continue;
		if (t->trouble == DOVETAIL_HEALTH_DIVERGED_MAILBOX)
			counts_r->diverged++;
		else
			counts_r->differing++;
	}
}

/* origin: of this peer, NULL: of all. */
static void troubles_list(const char *origin,
			  ARRAY_TYPE(dovetail_health_trouble_of) *list_r)
{
	struct dovetail_health_trouble_of *of;
	const struct trouble *t;
	uint64_t now = dovetail_monotonic_msecs();

	t_array_init(list_r, 16);
	if (array_is_created(&troubles)) {
		array_foreach(&troubles, t) {
			if (origin != NULL && strcmp(t->origin, origin) != 0)
				continue;
			of = array_append_space(list_r);
			of->user = t->user;
			of->mailbox = t->mailbox;
			of->primary = t->origin;
			of->replica = replay.set.node;
			of->trouble = t->trouble;
			of->msecs = now - t->since_msecs;
			of->text = t->text;
		}
	}
	replay_wanted_troubles(origin, NULL, list_r);
}

bool replay_troubles_put(buffer_t *buf)
{
	ARRAY_TYPE(dovetail_health_trouble_of) list;

	troubles_list(NULL, &list);
	if (array_count(&list) == 0 && sent_none)
		return FALSE;
	sent_none = array_count(&list) == 0;
	dovetail_health_troubles_put(buf, &list, 0,
				     DOVETAIL_HEALTH_TROUBLES_MAX_BYTES);
	return TRUE;
}

void replay_troubles_ack(buffer_t *buf, const char *origin)
{
	struct dovetail_health_troubles counts;
	ARRAY_TYPE(dovetail_health_trouble_of) list;

	replay_troubles_count(origin, &counts);
	troubles_list(origin, &list);
	dovetail_health_ack_put(buf, &counts, &list);
}

void replay_troubles_connected(void)
{
	sent_none = TRUE;
}

void replay_troubles_deinit(void)
{
	struct trouble *t;

	if (!array_is_created(&troubles))
		return;
	array_foreach_modifiable(&troubles, t)
		trouble_free(t);
	array_free(&troubles);
}
