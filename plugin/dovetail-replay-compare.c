/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* A mailbox whose digest is not the primary's: find out where it differs, and make
   it equal, moving nothing but what differs.

   The replica asks with the digests of a few ranges of UIDs (COMPARE), the primary
   answers for those that differ with smaller ranges, and at the end with the
   messages (COMPARED). An answer says which place of the mailbox's log it is about.
   All before that stands before it and has been applied here; if we are further
   already, because another process was quicker, we ask again: what differs then
   differs, whatever is written meanwhile. Flags and keywords are set; messages that
   are missing or others are fetched (REQUEST, answered by MESSAGES), and at last
   replay_rebuild() puts them where they belong and takes out what only we have.

   One repair per mailbox at a time, with a rest after it: what does not become equal
   is tried again now and then, not in a loop, and at last left to the next digest and
   the round. Which mailboxes wait for their repair is kept in a file (struct
   replay_file), so that a restart does not forget it. */

#include "lib.h"
#include "array.h"
#include "guid.h"
#include "ioloop.h"
#include "istream.h"
#include "randgen.h"
#include "seq-range-array.h"
#include "str.h"
#include "mail-storage-private.h"
#include "mail-index-private.h"
#include "dovetail-attribute.h"
#include "dovetail-clock.h"
#include "dovetail-mailbox-digest.h"
#include "dovetail-position.h"
#include "dovetail-replay.h"
#include "dovetail-seal.h"

/* The first question cuts the mailbox into so many ranges. */
#define COMPARE_SPLIT 16
/* Ranges in one question: the answer may have 16 times as many. */
#define COMPARE_ASK_MAX 64
/* Ask again when no answer came; doubling. */
#define COMPARE_RETRY_MIN_SECS 5
#define COMPARE_RETRY_MAX_SECS 300
/* Digests come faster than repairs: leave a mailbox alone after one. */
#define COMPARE_REST_SECS 60
/* ... and longer, doubling, after a repair that failed. So many tries in all. */
#define COMPARE_REST_MAX_SECS 480
#define COMPARE_TRIES_MAX 10
/* A mailbox is compared again after its repair, so many times. */
#define COMPARE_PASSES_MAX 3
/* Messages that are read in one go: others wait. */
#define COMPARE_READ_MAX 50
/* Mailboxes at once; the others' turn comes with their next digest. */
#define COMPARE_MAX 1000
/* Messages that are fetched only to say in which way they differ. */
#define COMPARE_EXPLAIN_FETCH_MAX 16

enum compare_state {
	/* something else has to happen before: look again soon */
	COMPARE_WAITING,
	/* reading messages whose hashes are not known, or all of them */
	COMPARE_READING,
	/* asked, for COMPARED */
	COMPARE_ASKED,
	/* asked, for MESSAGES */
	COMPARE_FETCHING,
	/* putting what was fetched into place */
	COMPARE_REBUILDING,
	/* done */
	COMPARE_RESTING,
};

struct compare {
	char *user, *origin, *path;
	guid_128_t guid;
	enum dovetail_verify_flags flags;
	/* of the primary's VERIFY; 0: nobody waits for an answer */
	uint32_t verify_number;

	enum compare_state state;
	/* of our question */
	uint32_t number;
	time_t asked, rest_until;
	unsigned int retry_secs, passes;
	/* where reading goes on; DEEP: all messages, once */
	uint32_t read_uid;
	bool deep_done;
	/* the attributes were compared in this pass */
	bool attributes_done;

	/* ranges to ask about, those in the open question first */
	ARRAY_TYPE(dovetail_range) todo;
	unsigned int asked_count;
	/* messages to fetch, those that are here already under such a UID, and
	   those that are only here */
	ARRAY_TYPE(seq_range) fetch, replace, extra;
	/* what was fetched and waits for a rebuild */
	ARRAY_TYPE(seq_range) rebuild;
	/* the primary's, as it said last */
	uint32_t uid_next;
	/* a difference was found while we rested, or is still there */
	bool again;
	/* repairs that failed, one after another */
	unsigned int failures;
	/* it is in the file */
	bool kept;
	/* it was in the file when this process began */
	bool resumed;
	/* changes came that could not be applied, and were not asked for */
	bool gap;

	/* differences, and what is known of them; kept while somebody waits */
	ARRAY(char *) texts;
	unsigned int differences;
	bool repaired;
	char *error;
	uint32_t messages;
};

static ARRAY(struct compare *) compares;
static struct replay_file compare_file;
static struct timeout *to_compare;
/* dovetail_monotonic_usecs() */
static uint64_t compare_due;

static void compare_run(void *context);
static void compare_begin(struct compare *c, struct replay_user *user);

/* ---- the list ---- */

static struct compare *compare_find(const char *user, const guid_128_t guid)
{
	struct compare *c;

	array_foreach_elem(&compares, c) {
		if (guid_128_equals(c->guid, guid) &&
		    strcmp(c->user, user) == 0)
			return c;
	}
	return NULL;
}

static void compare_clear(struct compare *c)
{
	char *text;

	array_clear(&c->todo);
	array_clear(&c->fetch);
	array_clear(&c->replace);
	array_clear(&c->extra);
	array_clear(&c->rebuild);
	array_foreach_elem(&c->texts, text)
		i_free(text);
	array_clear(&c->texts);
	i_free(c->error);
	c->asked_count = 0;
	c->differences = 0;
	c->uid_next = 0;
	c->attributes_done = FALSE;
	c->repaired = FALSE;
}

static void compare_free(struct compare *c)
{
	compare_clear(c);
	array_free(&c->todo);
	array_free(&c->fetch);
	array_free(&c->replace);
	array_free(&c->extra);
	array_free(&c->rebuild);
	array_free(&c->texts);
	i_free(c->user);
	i_free(c->origin);
	i_free(c->path);
	i_free(c);
}

void replay_compare_deinit(void)
{
	struct compare *c;

	timeout_remove(&to_compare);
	array_foreach_elem(&compares, c)
		compare_free(c);
	array_free(&compares);
	replay_file_close(&compare_file);
}

static bool compare_waits_for_repair(const struct compare *c)
{
	return c->state == COMPARE_RESTING ? c->again :
		(c->flags & DOVETAIL_VERIFY_REPAIR) != 0;
}

static void compare_save(void)
{
	string_t *str = t_str_new(256);
	struct compare *c;

	array_foreach_elem(&compares, c) {
		c->kept = compare_waits_for_repair(c);
		if (c->kept) {
			replay_file_add(str, c->user, c->origin, c->guid,
					c->path);
		}
	}
	replay_file_write(&compare_file, str);
}

/* After each change of what compare_waits_for_repair() looks at. */
static void compare_keep(const struct compare *c)
{
	if (compare_waits_for_repair(c) != c->kept) T_BEGIN {
		compare_save();
	} T_END;
}

/* Look at all in msecs at the latest. */
static void compare_schedule(unsigned int msecs)
{
	uint64_t due = dovetail_monotonic_usecs() + msecs * 1000ULL;

	if (to_compare != NULL && due >= compare_due)
		return;
	timeout_remove(&to_compare);
	to_compare = replay_timeout_add(msecs, compare_run, NULL);
	compare_due = due;
}

static void ATTR_FORMAT(2, 3)
compare_note(struct compare *c, const char *fmt, ...)
{
	va_list args;
	char *text;

	if (c->differences++ == 0) {
		e_warning(replay.event, "User %s mailbox %s: Differs from %s's",
			  c->user, t_str_replace(c->path, '\t', '/'),
			  c->origin);
		replay_trouble_set(c->user, c->origin, c->guid, c->path,
			(c->flags & DOVETAIL_VERIFY_REPAIR) != 0 ?
			DOVETAIL_HEALTH_DIFFERING :
			DOVETAIL_HEALTH_DIVERGED_MAILBOX, "");
	}
	va_start(args, fmt);
	T_BEGIN {
		const char *what = t_strdup_vprintf(fmt, args);

		if (c->differences <= DOVETAIL_VERIFIED_TEXTS_MAX) {
			e_info(replay.event, "User %s mailbox %s: %s", c->user,
			       t_str_replace(c->path, '\t', '/'), what);
			text = i_strdup(what);
			array_push_back(&c->texts, &text);
		}
	} T_END;
	va_end(args);
}

static void compare_set_state(struct compare *c, enum compare_state state)
{
	c->state = state;
	c->asked = dovetail_monotonic_secs();
	c->retry_secs = COMPARE_RETRY_MIN_SECS;
}

/* ---- the end ---- */

static void compare_answer(struct compare *c)
{
	struct dovetail_change_verified verified;
	const char *text, *error;
	char *str;

	i_zero(&verified);
	verified.node = c->origin;
	verified.number = c->verify_number;
	guid_128_copy(verified.guid, c->guid);
	verified.messages = c->messages;
	verified.result = c->error != NULL ? DOVETAIL_VERIFIED_UNKNOWN :
		c->repaired && c->differences == 0 ?
		DOVETAIL_VERIFIED_REPAIRED :
		c->differences == 0 ? DOVETAIL_VERIFIED_EQUAL :
		DOVETAIL_VERIFIED_DIFFERENT;
	t_array_init(&verified.texts, 16);
	if (c->error != NULL) {
		text = c->error;
		array_push_back(&verified.texts, &text);
	}
	array_foreach_elem(&c->texts, str) {
		text = str;
		array_push_back(&verified.texts, &text);
	}
	c->verify_number = 0;
	if (replay_send_verified(c->user, &verified, &error) < 0) {
		e_warning(replay.event, "User %s: Cannot answer %s: %s",
			  c->user, c->origin, error);
	}
}

static void compare_tell_health(struct compare *c)
{
	if (c->differences > 0) {
		replay_trouble_set(c->user, c->origin, c->guid, c->path,
				   DOVETAIL_HEALTH_DIVERGED_MAILBOX,
				   c->error != NULL ? c->error :
				   array_idx_elem(&c->texts, 0));
	} else if (c->error != NULL) {
		replay_trouble_failed(c->user, c->guid, c->error);
	} else {
		replay_trouble_clear(c->user, c->guid);
	}
}

static void compare_finish(struct compare *c)
{
	unsigned int rest_secs = COMPARE_REST_SECS;

	compare_tell_health(c);
	if (c->verify_number != 0) T_BEGIN {
		compare_answer(c);
	} T_END;
	if (c->repaired) {
		e_info(replay.event, "User %s mailbox %s: Repaired", c->user,
		       t_str_replace(c->path, '\t', '/'));
	} else if (c->error == NULL && c->differences == 0) {
		e_debug(replay.event, "User %s mailbox %s: Is equal", c->user,
			c->path);
	}
	if (c->gap) {
		c->gap = FALSE;
		replay_wanted_add(c->user, c->origin, c->guid, c->path, 1,
				  "Changes came while it was repaired");
	}
	c->resumed = FALSE;
	c->failures = (c->flags & DOVETAIL_VERIFY_REPAIR) != 0 &&
		(c->error != NULL || c->differences > 0) ? c->failures + 1 : 0;
	if (c->failures > 0 && c->failures < COMPARE_TRIES_MAX) {
		c->again = TRUE;
		rest_secs = I_MIN(rest_secs << (c->failures - 1),
				  COMPARE_REST_MAX_SECS);
	}
	compare_clear(c);
	c->flags = 0;
	c->rest_until = dovetail_monotonic_secs() + rest_secs;
	compare_set_state(c, COMPARE_RESTING);
	compare_keep(c);
}

static void ATTR_FORMAT(2, 3)
compare_fail(struct compare *c, const char *fmt, ...)
{
	va_list args;

	i_free(c->error);
	va_start(args, fmt);
	c->error = i_strdup_vprintf(fmt, args);
	va_end(args);
	e_warning(replay.event, "User %s mailbox %s: Cannot be compared: %s",
		  c->user, t_str_replace(c->path, '\t', '/'), c->error);
	compare_finish(c);
}

/* Its mailbox is not here. It was deleted; or it lost its GUID with its index, when a
   process died in the middle of the repair. */
static void compare_gone(struct compare *c)
{
	guid_128_t all;

	if (c->resumed) {
		guid_128_empty(all);
		replay_wanted_add(c->user, c->origin, all, "", 0,
				  "A mailbox whose repair was interrupted is "
				  "not here");
	}
	c->differences = 0;
	replay_trouble_clear(c->user, c->guid);
	c->failures = COMPARE_TRIES_MAX;
	compare_fail(c, "It is not here");
}

/* ---- what is here ---- */

/* Returns 1, or 0: finished, it is not here or cannot be opened. */
static int compare_find_box(struct compare *c, struct replay_user *user,
			    struct mailbox **box_r)
{
	const char *error;
	int ret;

	ret = replay_user_find_mailbox(user, c->guid, c->path, box_r, &error);
	if (ret < 0)
		compare_fail(c, "%s", error);
	else if (ret == 0)
		compare_gone(c);
	return ret > 0 ? 1 : 0;
}

/* Returns 1: user and box are open.  0: finished, as above, and user released. */
static int compare_open(struct compare *c, struct replay_user **user_r,
			struct mailbox **box_r)
{
	const char *error;
	int ret;

	if (replay_user_open(c->user, user_r, &error) < 0) {
		compare_fail(c, "%s", error);
		return 0;
	}
	ret = compare_find_box(c, *user_r, box_r);
	if (ret > 0 && mailbox_sync(*box_r, 0) < 0) {
		compare_fail(c, "%s",
			     mailbox_get_last_internal_error(*box_r, NULL));
		ret = 0;
	}
	if (ret == 0)
		replay_user_release(user_r);
	return ret;
}

/* Cut all UIDs into ranges with about as many messages each. */
static void compare_split_all(struct compare *c, struct mail_index_view *view)
{
	uint32_t count = mail_index_view_get_messages_count(view);
	uint32_t step = (count + COMPARE_SPLIT - 1) / COMPARE_SPLIT;
	uint32_t seq, uid = 1;
	struct dovetail_range *range;

	array_clear(&c->todo);
	for (seq = 1; seq <= count; seq += step) {
		range = array_append_space(&c->todo);
		range->uid1 = uid;
		if (count - seq < step)
			mail_index_lookup_uid(view, count, &uid);
		else {
			mail_index_lookup_uid(view, seq + step, &uid);
			uid--;
		}
		range->uid2 = uid++;
	}
	if (uid != 0) {
		/* what comes behind our last: we have none of it */
		range = array_append_space(&c->todo);
		range->uid1 = uid;
		range->uid2 = (uint32_t)-1;
	}
}

static void compare_ask(struct compare *c, struct replay_user *user,
			struct mailbox *box)
{
	struct dovetail_mailbox_digest *md =
		replay_user_mailbox_digest(user, box);
	struct dovetail_change change;
	struct dovetail_digest digest;
	struct dovetail_range *range;
	const char *error;

	if (!dovetail_mailbox_digest_now(md, &digest)) {
		/* somebody brought messages whose hashes are not known */
		compare_set_state(c, COMPARE_READING);
		compare_schedule(0);
		return;
	}
	i_zero(&change);
	change.kind = DOVETAIL_CHANGE_COMPARE;
	change.user = c->user;
	guid_128_copy(change.u.compare.guid, c->guid);
	change.u.compare.name = c->path;
	c->number = i_rand_minmax(1, UINT32_MAX);
	change.u.compare.number = c->number;
	memcpy(change.u.compare.key, digest.key, sizeof(digest.key));
	t_array_init(&change.u.compare.ranges, COMPARE_ASK_MAX);
	c->asked_count = I_MIN(array_count(&c->todo), COMPARE_ASK_MAX);
	for (unsigned int i = 0; i < c->asked_count; i++) {
		range = array_idx_modifiable(&c->todo, i);
		if (!dovetail_mailbox_digest_range(md,
				dovetail_mailbox_digest_view(md), digest.key,
				range)) {
			compare_set_state(c, COMPARE_READING);
			compare_schedule(0);
			return;
		}
		array_push_back(&change.u.compare.ranges, range);
	}
	if (c->state != COMPARE_ASKED)
		compare_set_state(c, COMPARE_ASKED);
	c->asked = dovetail_monotonic_secs();
	if (replay_queue_change(&change, &error) < 0) {
		e_warning(replay.event, "User %s: Cannot ask %s: %s", c->user,
			  c->origin, error);
	}
}

static void compare_begin(struct compare *c, struct replay_user *user)
{
	struct dovetail_mailbox_digest *md;
	struct dovetail_digest digest;
	struct mailbox *box;

	if (compare_find_box(c, user, &box) == 0)
		return;
	md = replay_user_mailbox_digest(user, box);
	if (((c->flags & DOVETAIL_VERIFY_DEEP) != 0 && !c->deep_done) ||
	    !dovetail_mailbox_digest_now(md, &digest)) {
		c->read_uid = 1;
		compare_set_state(c, COMPARE_READING);
		compare_schedule(0);
		return;
	}
	compare_split_all(c, dovetail_mailbox_digest_view(md));
	compare_ask(c, user, box);
}

/* Read a few messages more. */
static void compare_read(struct compare *c)
{
	struct dovetail_mailbox_digest *md;
	struct dovetail_digest digest;
	struct replay_user *user;
	struct mailbox *box;
	ARRAY_TYPE(seq_range) changed;
	const char *error;
	unsigned int lacking = 1;
	bool unreadable = FALSE;

	if (compare_open(c, &user, &box) == 0)
		return;
	md = replay_user_mailbox_digest(user, box);
	t_array_init(&changed, 8);
	if ((c->flags & DOVETAIL_VERIFY_DEEP) != 0 && !c->deep_done) {
		unreadable = dovetail_mailbox_digest_scrub(md, &c->read_uid,
				COMPARE_READ_MAX, TRUE, &changed) < 0;
		/* then once more from here: Dovecot may have found out that
		   files are missing, and removes their messages now */
		c->deep_done = c->read_uid == 0;
	} else {
		lacking = dovetail_mailbox_digest_fill(md, COMPARE_READ_MAX);
	}
	if (dovetail_mailbox_digest_save(md, &error) < 0)
		compare_fail(c, "%s", error);
	else if (!unreadable && lacking > 0)
		compare_schedule(0);
	else if (unreadable || !dovetail_mailbox_digest_now(md, &digest))
		compare_fail(c, "Some of its messages cannot be read");
	else
		compare_begin(c, user);
	replay_user_release(&user);
}

/* ---- what differs ---- */

static const char *compare_flags_text(enum mail_flags flags,
				      const char *const *keywords)
{
	string_t *str = t_str_new(64);
	static const struct {
		enum mail_flags flag;
		const char *name;
	} names[] = {
		{ MAIL_ANSWERED, "\\Answered " }, { MAIL_FLAGGED, "\\Flagged " },
		{ MAIL_DELETED, "\\Deleted " }, { MAIL_SEEN, "\\Seen " },
		{ MAIL_DRAFT, "\\Draft " },
	};

	for (unsigned int i = 0; i < N_ELEMENTS(names); i++) {
		if ((flags & names[i].flag) != 0)
			str_append(str, names[i].name);
	}
	for (; *keywords != NULL; keywords++)
		str_printfa(str, "%s ", *keywords);
	if (str_len(str) == 0)
		return "none";
	str_truncate(str, str_len(str) - 1);
	return str_c(str);
}

static bool keywords_equal(const char *const *a, const char *const *b)
{
	if (str_array_length(a) != str_array_length(b))
		return FALSE;
	for (; *a != NULL; a++) {
		if (!str_array_icase_find(b, *a))
			return FALSE;
	}
	return TRUE;
}

/* One message that both have. */
static void compare_message(struct compare *c, struct replay_user *user,
			    struct mailbox *box, struct mail *mail,
			    const struct dovetail_compared_message *there,
			    uint64_t modseq)
{
	struct dovetail_mailbox_digest *md =
		replay_user_mailbox_digest(user, box);
	const char *const *keywords = mail_get_keywords(mail);
	enum mail_flags flags = mail_get_flags(mail) & MAIL_FLAGS_NONRECENT;
	uint8_t hash[DOVETAIL_MESSAGE_HASH_SIZE];

	if (!dovetail_mailbox_digest_get(md, there->uid, hash) ||
	    memcmp(hash, there->hash, sizeof(hash)) != 0) {
		seq_range_array_add(&c->replace, there->uid);
		seq_range_array_add(&c->fetch, there->uid);
		if ((c->flags & DOVETAIL_VERIFY_EXPLAIN) == 0) {
			compare_note(c, "UID %u: another message than on %s",
				     there->uid, c->origin);
		}
	}
	if (flags == there->flags && keywords_equal(keywords, there->keywords))
		return;
	compare_note(c, "UID %u: flags %s on %s, %s on %s", there->uid,
		     compare_flags_text(there->flags, there->keywords),
		     c->origin, compare_flags_text(flags, keywords),
		     replay.set.node);
	if ((c->flags & DOVETAIL_VERIFY_REPAIR) != 0) {
		replay_mail_set_state(box, mail, there->flags, there->keywords,
				      modseq);
		c->repaired = TRUE;
	}
}

static int compared_message_cmp(const uint32_t *uid,
				const struct dovetail_compared_message *message)
{
	return *uid < message->uid ? -1 : *uid > message->uid ? 1 : 0;
}

/* All messages with these UIDs: those here, and those there. */
static int compare_list(struct compare *c, struct replay_user *user,
			struct mailbox *box,
			const struct dovetail_change_compared *compared,
			const char **error_r)
{
	struct mailbox_transaction_context *t;
	const struct dovetail_compared_message *there;
	const struct seq_range *range;
	ARRAY_TYPE(seq_range) extra, missing;
	struct seq_range_iter iter;
	struct mail *mail;
	uint32_t uid, seq, seq1, seq2;
	unsigned int n = 0;

	t_array_init(&extra, 8);
	t_array_init(&missing, 8);
	array_foreach(&compared->messages, there)
		seq_range_array_add(&missing, there->uid);
	t = mailbox_transaction_begin(box, MAILBOX_TRANSACTION_FLAG_SYNC |
				      MAILBOX_TRANSACTION_FLAG_NO_NOTIFY, __func__);
	mail = mail_alloc(t, MAIL_FETCH_FLAGS, NULL);
	array_foreach(&compared->uids, range) {
		if (!mail_index_lookup_seq_range(t->view, range->seq1,
						 range->seq2, &seq1, &seq2))
			continue;
		for (seq = seq1; seq <= seq2; seq++) T_BEGIN {
			mail_set_seq(mail, seq);
			uid = mail->uid;
			there = array_bsearch(
				(ARRAY_TYPE(dovetail_compared_message) *)
				&compared->messages, &uid,
				compared_message_cmp);
			if (there == NULL)
				seq_range_array_add(&extra, uid);
			else {
				seq_range_array_remove(&missing, uid);
				compare_message(c, user, box, mail, there,
						compared->highest_modseq);
			}
		} T_END;
	}
	mail_free(&mail);
	if (mailbox_transaction_commit(&t) < 0) {
		*error_r = t_strdup(mailbox_get_last_internal_error(box, NULL));
		return -1;
	}
	seq_range_array_iter_init(&iter, &missing);
	while (seq_range_array_iter_nth(&iter, n++, &uid)) {
		compare_note(c, "UID %u: not on %s", uid, replay.set.node);
		seq_range_array_add(&c->fetch, uid);
	}
	n = 0;
	seq_range_array_iter_init(&iter, &extra);
	while (seq_range_array_iter_nth(&iter, n++, &uid))
		compare_note(c, "UID %u: only on %s", uid, replay.set.node);
	seq_range_array_merge(&c->extra, &extra);
	return 0;
}

static void compare_ranges(struct compare *c, struct replay_user *user,
			   struct mailbox *box,
			   const struct dovetail_change_compared *compared)
{
	struct dovetail_mailbox_digest *md =
		replay_user_mailbox_digest(user, box);
	struct mail_index_view *view = dovetail_mailbox_digest_view(md);
	const struct dovetail_range *there;
	struct dovetail_digest digest;
	struct dovetail_range here;
	unsigned int count = 0;

	(void)dovetail_mailbox_digest_now(md, &digest);
	view = dovetail_mailbox_digest_view(md);
	array_foreach(&compared->ranges, there) {
		here = *there;
		if (dovetail_mailbox_digest_range(md, view, digest.key,
						  &here) &&
		    here.count == there->count &&
		    dovetail_sum_equals(&here.sum, &there->sum))
			continue;
		if (here.count > 0) {
			/* before the ranges that were not asked about yet */
			array_insert(&c->todo, count++, &here, 1);
		} else {
			compare_note(c, there->count == 1 ?
				     "UID %u..%u: %u message not on %s" :
				     "UID %u..%u: %u messages not on %s",
				     there->uid1, there->uid2 == (uint32_t)-1 ?
				     compared->uid_next - 1 : there->uid2,
				     there->count, replay.set.node);
			seq_range_array_add_range(&c->fetch, there->uid1,
						  there->uid2);
		}
	}
}

/* What goes wrong with them is one more difference, and does not keep messages from
   being repaired. */
static void compare_attributes(struct compare *c, struct mailbox *box,
			       const struct dovetail_change_compared *compared)
{
	ARRAY_TYPE(dovetail_attribute) differences;
	const struct dovetail_attribute *attribute;
	struct dovetail_attribute here;
	const char *error, *ignored;
	int ret;

	if (!compared->with_attributes || c->attributes_done)
		return;
	c->attributes_done = TRUE;
	t_array_init(&differences, 8);
	ret = replay_attributes_compare(box, &compared->attributes,
					&differences, &error);
	array_foreach(&differences, attribute) {
		here = *attribute;
		if (dovetail_attribute_get(box, &box->v, &here, &ignored) <= 0)
			here.value = NULL;
		compare_note(c, "Attribute /%s/%s: %s %s",
			     attribute->shared ? "shared" : "private",
			     attribute->key,
			     attribute->value == NULL ? "only on" :
			     here.value == NULL ? "not on" :
			     "another value than on",
			     attribute->value != NULL && here.value != NULL ?
			     c->origin : replay.set.node);
	}
	if (ret > 0 && array_count(&differences) > 0 &&
	    (c->flags & DOVETAIL_VERIFY_REPAIR) != 0) {
		ret = replay_attributes_set(box, &differences, &error);
		c->repaired = c->repaired || ret > 0;
	}
	if (ret <= 0) {
		compare_note(c, "Attributes (METADATA) of %s: %s",
			     replay.set.node, error);
	}
}

static void compare_fetch(struct compare *c)
{
	struct dovetail_change change;
	const char *error;

	i_zero(&change);
	change.kind = DOVETAIL_CHANGE_REQUEST;
	change.user = c->user;
	guid_128_copy(change.u.request.guid, c->guid);
	change.u.request.name = c->path;
	t_array_init(&change.u.request.uids, 64);
	array_append_array(&change.u.request.uids, &c->fetch);
	if (c->state != COMPARE_FETCHING)
		compare_set_state(c, COMPARE_FETCHING);
	c->asked = dovetail_monotonic_secs();
	if (replay_queue_change(&change, &error) < 0) {
		e_warning(replay.event, "User %s: Cannot ask %s: %s", c->user,
			  c->origin, error);
	}
}

/* Nothing is left to do in this pass. */
static void compare_pass_done(struct compare *c, struct replay_user *user)
{
	struct dovetail_position pos;
	struct mailbox *box;
	uint8_t origin_id[DOVETAIL_ORIGIN_ID_SIZE];
	struct mailbox_status status;
	const char *error;
	bool valid;

	if (!c->repaired || ++c->passes >= COMPARE_PASSES_MAX) {
		if ((c->flags & DOVETAIL_VERIFY_REPAIR) != 0 &&
		    replay_user_find_mailbox(user, c->guid, c->path, &box,
					     &error) > 0)
			replay_rebuild_finish(user, box);
		compare_finish(c);
		return;
	}
	/* A mailbox that was no replica, or whose index was rebuilt, has no
	   place in the primary's log. */
	dovetail_origin_id(c->origin, origin_id);
	if (replay_user_find_mailbox(user, c->guid, c->path, &box,
				     &error) > 0) {
		valid = dovetail_position_get(box, &pos) &&
			memcmp(pos.origin, origin_id, sizeof(origin_id)) == 0 &&
			pos.applied.index_id != 0;
		mailbox_get_open_status(box, STATUS_UIDNEXT, &status);
		if (!valid && !replay_wanted_has(c->user, c->guid)) {
			replay_wanted_add(c->user, c->origin, c->guid, c->path,
				status.uidnext, "It has all messages now");
		}
	}
	/* once more: equal now? */
	array_clear(&c->todo);
	array_clear(&c->fetch);
	array_clear(&c->replace);
	array_clear(&c->extra);
	array_clear(&c->rebuild);
	c->differences = 0;
	c->attributes_done = FALSE;
	compare_set_state(c, COMPARE_WAITING);
	compare_schedule(0);
}

/* A look at some of those that differ. */
static void compare_pick_some(struct compare *c)
{
	struct seq_range_iter iter;
	unsigned int n = 0;
	uint32_t uid;

	seq_range_array_iter_init(&iter, &c->replace);
	while (n < COMPARE_EXPLAIN_FETCH_MAX &&
	       seq_range_array_iter_nth(&iter, n, &uid)) {
		seq_range_array_add(&c->fetch, uid);
		n++;
	}
}

/* UIDs were given away here that the primary did not give away yet: its next message
   could not be saved. */
static bool compare_uid_next_differs(const struct compare *c,
				     struct mailbox *box)
{
	struct mailbox_status status;
	uint32_t count = mail_index_view_get_messages_count(box->view);
	uint32_t last = 0;

	if (c->uid_next == 0)
		return FALSE;
	if (count > 0)
		mail_index_lookup_uid(box->view, count, &last);
	mailbox_get_open_status(box, STATUS_UIDNEXT, &status);
	return status.uidnext > I_MAX(c->uid_next, last + 1);
}

static void compare_next(struct compare *c, struct replay_user *user,
			 struct mailbox *box)
{
	bool repair = (c->flags & DOVETAIL_VERIFY_REPAIR) != 0;
	bool explain = (c->flags & DOVETAIL_VERIFY_EXPLAIN) != 0;

	if (array_count(&c->todo) > 0) {
		compare_ask(c, user, box);
		return;
	}
	if (!repair) {
		array_clear(&c->fetch);
		if (explain)
			compare_pick_some(c);
	}
	if (array_count(&c->fetch) > 0)
		compare_fetch(c);
	else if (repair && (array_count(&c->rebuild) > 0 ||
			    array_count(&c->extra) > 0 ||
			    compare_uid_next_differs(c, box))) {
		compare_set_state(c, COMPARE_REBUILDING);
		compare_schedule(0);
	} else
		compare_pass_done(c, user);
}

/* Has this replica come further than at? */
static bool compare_is_past(struct mailbox *box, const char *origin,
			    const struct dovetail_log_pos *at)
{
	uint8_t origin_id[DOVETAIL_ORIGIN_ID_SIZE];
	struct dovetail_position pos;

	dovetail_origin_id(origin, origin_id);
	return dovetail_position_get(box, &pos) &&
		memcmp(pos.origin, origin_id, sizeof(origin_id)) == 0 &&
		pos.applied.index_id == at->index_id &&
		dovetail_log_pos_cmp(&pos.applied, at) > 0;
}

void replay_compared(struct replay_user *user, const char *origin,
		     const struct dovetail_change_compared *compared)
{
	const char *username = replay_user_mail_user(user)->username;
	struct compare *c = compare_find(username, compared->guid);
	struct mailbox *box;
	const char *error;

	if (c == NULL || c->state != COMPARE_ASKED ||
	    c->number != compared->number || strcmp(c->origin, origin) != 0)
		return;
	if (replay_wanted_has(username, c->guid)) {
		/* we are not at the place the answer is about */
		compare_set_state(c, COMPARE_WAITING);
		compare_schedule(1000);
		return;
	}
	if (compare_find_box(c, user, &box) == 0)
		return;
	if (mailbox_sync(box, 0) < 0) {
		compare_fail(c, "%s",
			     mailbox_get_last_internal_error(box, NULL));
		return;
	}
	if (compare_is_past(box, origin, &compared->at)) {
		compare_ask(c, user, box);
		return;
	}
	array_delete(&c->todo, 0, c->asked_count);
	c->asked_count = 0;
	c->uid_next = compared->uid_next;
	compare_ranges(c, user, box, compared);
	compare_attributes(c, box, compared);
	if (array_count(&compared->uids) > 0 &&
	    compare_list(c, user, box, compared, &error) < 0) {
		compare_fail(c, "%s", error);
		return;
	}
	if (mailbox_sync(box, 0) < 0) {
		compare_fail(c, "%s",
			     mailbox_get_last_internal_error(box, NULL));
		return;
	}
	compare_next(c, user, box);
}

/* ---- what was fetched ---- */

static void
compare_explain_message(struct compare *c, struct mail *mail,
			const struct dovetail_op_append *append)
{
	guid_128_t here, there;
	const char *guid;
	time_t received_date;
	string_t *what = t_str_new(64);

	if (mail_get_special(mail, MAIL_FETCH_GUID, &guid) == 0) {
		dovetail_message_guid(guid, here);
		dovetail_message_guid(append->guid, there);
		if (!guid_128_equals(here, there))
			str_append(what, "GUID, ");
	}
	if (mail_get_received_date(mail, &received_date) == 0 &&
	    received_date != append->received_date)
		str_append(what, "received date, ");
	if (str_len(what) == 0)
		str_append(what, "body, ");
	str_truncate(what, str_len(what) - 2);
	compare_note(c, "UID %u: %s not as on %s", append->uid, str_c(what),
		     c->origin);
}

static void compare_explain(struct compare *c, struct mailbox *box,
			    const struct dovetail_change_mailbox *change,
			    ARRAY_TYPE(seq_range) *explained)
{
	struct mailbox_transaction_context *t;
	const struct dovetail_op *op;
	struct mail *mail;

	t = mailbox_transaction_begin(box, 0, __func__);
	mail = mail_alloc(t, 0, NULL);
	array_foreach(&change->ops, op) T_BEGIN {
		if (seq_range_exists(&c->replace, op->append.uid) &&
		    mail_set_uid(mail, op->append.uid)) {
			compare_explain_message(c, mail, &op->append);
			seq_range_array_add(explained, op->append.uid);
		}
	} T_END;
	mail_free(&mail);
	mailbox_transaction_rollback(&t);
}

/* Those that were not looked at. */
static void compare_name_others(struct compare *c,
				const ARRAY_TYPE(seq_range) *explained)
{
	struct seq_range_iter iter;
	unsigned int n = 0;
	uint32_t uid;

	seq_range_array_remove_seq_range(&c->replace, explained);
	seq_range_array_iter_init(&iter, &c->replace);
	while (seq_range_array_iter_nth(&iter, n++, &uid)) {
		compare_note(c, "UID %u: another message than on %s", uid,
			     c->origin);
	}
	array_clear(&c->replace);
}

/* The UIDs up to the last one that came were answered, those that did not come do
   not exist any more. */
static void compare_fetched(struct compare *c,
			    const struct dovetail_change_mailbox *change)
{
	const struct dovetail_op *op;

	if ((change->flags & DOVETAIL_MAILBOX_MORE) == 0)
		array_clear(&c->fetch);
	else if (array_count(&change->ops) > 0) {
		op = array_back(&change->ops);
		seq_range_array_remove_range(&c->fetch, 1, op->append.uid);
	}
	/* progress: ask again at once */
	c->retry_secs = COMPARE_RETRY_MIN_SECS;
}

enum replay_result
replay_compare_messages(struct replay_user *user, const char *origin,
			const struct dovetail_change_mailbox *change,
			const char **error_r)
{
	const char *username = replay_user_mail_user(user)->username;
	struct compare *c = compare_find(username, change->guid);
	ARRAY_TYPE(seq_range) explained;
	struct mailbox *box;
	int ret;

	if (c == NULL || c->state != COMPARE_FETCHING ||
	    strcmp(c->origin, origin) != 0)
		return REPLAY_DONE;
	if (compare_find_box(c, user, &box) == 0)
		return REPLAY_DONE;
	t_array_init(&explained, 16);
	if ((c->flags & DOVETAIL_VERIFY_EXPLAIN) != 0)
		compare_explain(c, box, change, &explained);
	if ((c->flags & DOVETAIL_VERIFY_REPAIR) != 0) {
		ret = replay_mailbox_add_messages(user, origin, box, change,
						  &c->rebuild, error_r);
		if (ret < 0) {
			compare_fail(c, "%s", *error_r);
			return REPLAY_FAILED;
		}
		c->repaired = TRUE;
	} else {
		/* enough to see what is meant */
		array_clear(&c->fetch);
		compare_name_others(c, &explained);
	}
	compare_fetched(c, change);
	compare_next(c, user, box);
	return REPLAY_DONE;
}

static void compare_rebuild(struct compare *c)
{
	ARRAY_TYPE(seq_range) drop;
	struct replay_user *user;
	struct mailbox *box;
	const char *error;
	int ret;

	if (compare_open(c, &user, &box) == 0)
		return;
	/* what did not come any more is not there any more */
	t_array_init(&drop, 16);
	array_append_array(&drop, &c->replace);
	seq_range_array_intersect(&drop, &c->rebuild);
	seq_range_array_merge(&drop, &c->extra);
	ret = replay_rebuild(user, box, &drop, &c->rebuild, c->uid_next,
			     &error);
	if (ret < 0)
		compare_fail(c, "%s", error);
	else {
		c->repaired = c->repaired || array_count(&c->rebuild) > 0 ||
			(unsigned int)ret < seq_range_count(&c->extra);
		compare_pass_done(c, user);
	}
	replay_user_release(&user);
}

/* ---- start ---- */

/* Returns NULL: there are too many. */
static struct compare *
compare_start(const char *user, const char *origin, const guid_128_t guid,
	      const char *path, enum dovetail_verify_flags flags,
	      uint32_t number)
{
	struct compare *c = compare_find(user, guid);

	if (c == NULL) {
		if (array_count(&compares) >= COMPARE_MAX)
			return NULL;
		c = i_new(struct compare, 1);
		c->user = i_strdup(user);
		c->origin = i_strdup(origin);
		c->path = i_strdup(path);
		guid_128_copy(c->guid, guid);
		i_array_init(&c->todo, 16);
		i_array_init(&c->fetch, 4);
		i_array_init(&c->replace, 4);
		i_array_init(&c->extra, 4);
		i_array_init(&c->rebuild, 4);
		i_array_init(&c->texts, 4);
		array_push_back(&compares, &c);
	} else if (c->state == COMPARE_RESTING) {
		if (number == 0 && c->rest_until > dovetail_monotonic_secs()) {
			c->again = TRUE;
			return c;
		}
	} else if (number == 0) {
		c->flags |= flags;
		return c;
	} else if (c->verify_number != 0) {
		/* the question before is overtaken by this one */
		c->verify_number = number;
		c->flags |= flags;
		return c;
	}
	if (strcmp(c->origin, origin) != 0) {
		i_free(c->origin);
		c->origin = i_strdup(origin);
	}
	c->flags |= flags;
	c->verify_number = number;
	c->deep_done = FALSE;
	c->again = FALSE;
	c->passes = 0;
	compare_clear(c);
	compare_set_state(c, COMPARE_WAITING);
	compare_schedule(0);
	return c;
}

void replay_compare_start(const char *user, const char *origin,
			  const guid_128_t guid, const char *path,
			  enum dovetail_verify_flags flags, uint32_t number)
{
	struct compare *c = compare_start(user, origin, guid, path, flags,
					  number);

	if (c != NULL)
		compare_keep(c);
}

static void compare_load(const char *user, const char *origin,
			 const guid_128_t guid, const char *path)
{
	struct compare *c;

	/* with another number of shards or workers it may be another's user */
	if (user[0] != '\0' &&
	    dovetail_user_shard(user, replay.set.shards) % replay.slots ==
	    replay.slot) {
		c = compare_start(user, origin, guid, path,
				  DOVETAIL_VERIFY_REPAIR, 0);
		if (c == NULL)
			return;
		c->resumed = TRUE;
		replay_trouble_set(user, origin, guid, path,
				   DOVETAIL_HEALTH_DIFFERING, "");
	}
}

void replay_compare_init(void)
{
	i_array_init(&compares, 16);
	replay_file_open(&compare_file, "repair", compare_load);
	compare_save();
}

bool replay_compare_is_running(const char *user, const guid_128_t guid)
{
	const struct compare *c = compare_find(user, guid);

	return c != NULL && c->state != COMPARE_RESTING;
}

bool replay_compare_takes_gap(const char *user, const guid_128_t guid)
{
	if (!replay_compare_is_running(user, guid))
		return FALSE;
	compare_find(user, guid)->gap = TRUE;
	return TRUE;
}

void replay_compare_expunged(const char *user, const guid_128_t guid,
			     const ARRAY_TYPE(seq_range) *uids)
{
	struct compare *c = compare_find(user, guid);

	if (c != NULL) {
		seq_range_array_remove_seq_range(&c->fetch, uids);
		seq_range_array_remove_seq_range(&c->rebuild, uids);
	}
}

/* ---- time ---- */

static void compare_wait(struct compare *c)
{
	struct replay_user *user;
	struct mailbox *box;

	/* what is being fetched in another way comes first */
	if (replay_wanted_has(c->user, c->guid)) {
		compare_schedule(200);
		return;
	}
	if (compare_open(c, &user, &box) == 0)
		return;
	compare_begin(c, user);
	replay_user_release(&user);
}

static void compare_ask_again(struct compare *c)
{
	struct replay_user *user;
	struct mailbox *box;

	if (c->asked + (time_t)c->retry_secs > dovetail_monotonic_secs())
		return;
	c->retry_secs = I_MIN(c->retry_secs * 2, COMPARE_RETRY_MAX_SECS);
	if (compare_open(c, &user, &box) == 0)
		return;
	if (c->state == COMPARE_ASKED)
		compare_ask(c, user, box);
	else
		compare_fetch(c);
	replay_user_release(&user);
}

/* Returns FALSE when it can be forgotten. */
static bool compare_rest(struct compare *c)
{
	if (c->rest_until > dovetail_monotonic_secs())
		return TRUE;
	if (!c->again)
		return FALSE;
	c->again = FALSE;
	c->passes = 0;
	c->flags = DOVETAIL_VERIFY_REPAIR;
	compare_set_state(c, COMPARE_WAITING);
	compare_schedule(0);
	return TRUE;
}

static void compare_run(void *context ATTR_UNUSED)
{
	struct compare *c;
	unsigned int i;
	bool keep;

	timeout_remove(&to_compare);
	if (compare_file.unsaved) T_BEGIN {
		compare_save();
	} T_END;
	for (i = array_count(&compares); i > 0; i--) {
		c = array_idx_elem(&compares, i - 1);
		keep = TRUE;
		T_BEGIN {
			switch (c->state) {
			case COMPARE_WAITING:
				compare_wait(c);
				break;
			case COMPARE_READING:
				compare_read(c);
				break;
			case COMPARE_ASKED:
			case COMPARE_FETCHING:
				compare_ask_again(c);
				break;
			case COMPARE_REBUILDING:
				compare_rebuild(c);
				break;
			case COMPARE_RESTING:
				keep = compare_rest(c);
				break;
			}
		} T_END;
		if (!keep) {
			array_delete(&compares, i - 1, 1);
			compare_free(c);
		}
	}
	if (array_count(&compares) > 0)
		compare_schedule(1000);
}

/* ---- a question of the primary ---- */

int replay_send_verified(const char *user,
			 const struct dovetail_change_verified *verified,
			 const char **error_r)
{
	struct dovetail_change change;

	i_zero(&change);
	change.kind = DOVETAIL_CHANGE_VERIFIED;
	change.user = user;
	change.u.verified = *verified;
	return replay_queue_change(&change, error_r);
}

static void
verify_answer(const char *user, const char *origin,
	      const struct dovetail_change_verify *verify,
	      enum dovetail_verified_result result, uint32_t messages,
	      const char *text)
{
	struct dovetail_change_verified verified;
	const char *error;

	if (result == DOVETAIL_VERIFIED_EQUAL)
		replay_trouble_clear(user, verify->guid);
	else if (result == DOVETAIL_VERIFIED_DIFFERENT) {
		replay_trouble_set(user, origin, verify->guid, verify->name,
				   DOVETAIL_HEALTH_DIVERGED_MAILBOX, text);
	}
	if (verify->number == 0)
		return;
	i_zero(&verified);
	verified.node = origin;
	verified.number = verify->number;
	guid_128_copy(verified.guid, verify->guid);
	verified.result = result;
	verified.messages = messages;
	t_array_init(&verified.texts, 1);
	if (text != NULL)
		array_push_back(&verified.texts, &text);
	if (replay_send_verified(user, &verified, &error) < 0) {
		e_warning(replay.event, "User %s: Cannot answer %s: %s", user,
			  origin, error);
	}
}

/* Are the attributes what the primary says? Those that are not are found by comparing
   them. */
static bool verify_attributes(struct mailbox *box,
			      const struct dovetail_change_verify *verify)
{
	ARRAY_TYPE(dovetail_attribute) attributes;
	uint8_t hash[DOVETAIL_ATTRIBUTES_HASH_SIZE], none[sizeof(hash)];
	const char *error;

	memset(hash, 0, sizeof(hash));
	if (memcmp(verify->attributes, hash, sizeof(hash)) == 0)
		return TRUE;
	t_array_init(&attributes, 16);
	dovetail_attributes_hash(&attributes, none);
	switch (dovetail_attributes_get(box, &box->v, &attributes, &error)) {
	case 0:
		return memcmp(verify->attributes, none, sizeof(none)) == 0;
	case 1:
		dovetail_attributes_hash(&attributes, hash);
		return memcmp(verify->attributes, hash, sizeof(hash)) == 0;
	}
	return FALSE;
}

void replay_verify(struct replay_user *user, const char *origin,
		   const struct dovetail_change_verify *verify)
{
	const char *username = replay_user_mail_user(user)->username;
	bool repair = (verify->flags & DOVETAIL_VERIFY_REPAIR) != 0;
	struct mailbox_status status;
	struct dovetail_digest here;
	struct mailbox *box;
	const char *error;
	int ret;

	ret = replay_user_find_mailbox(user, verify->guid, verify->name, &box,
				       &error);
	if (ret > 0 && mailbox_sync(box, 0) < 0) {
		error = t_strdup(mailbox_get_last_internal_error(box, NULL));
		ret = -1;
	}
	if (ret < 0) {
		verify_answer(username, origin, verify,
			      DOVETAIL_VERIFIED_UNKNOWN, 0, error);
		return;
	}
	if (ret == 0) {
		if (repair && replay_mailbox_create(user, origin,
				verify->guid, verify->name,
				verify->uid_validity, 0, &error) > 0) {
			replay_compare_start(username, origin, verify->guid,
					     verify->name, verify->flags,
					     verify->number);
			return;
		}
		verify_answer(username, origin, verify,
			      DOVETAIL_VERIFIED_DIFFERENT, 0,
			      t_strdup_printf("The mailbox is not on %s",
					      replay.set.node));
		return;
	}
	mailbox_get_open_status(box, STATUS_UIDVALIDITY | STATUS_MESSAGES,
				&status);
	if (status.uidvalidity != verify->uid_validity) {
		verify_answer(username, origin, verify,
			DOVETAIL_VERIFIED_DIFFERENT, status.messages,
			t_strdup_printf("UIDVALIDITY is %u on %s, %u on %s",
					verify->uid_validity, origin,
					status.uidvalidity, replay.set.node));
		return;
	}
	if ((verify->flags & DOVETAIL_VERIFY_DEEP) == 0) {
		ret = replay_digest_compare(
			replay_user_mailbox_digest(user, box), TRUE,
			&verify->digest, &here);
		if (ret == 0 && compare_is_past(box, origin, &verify->at)) {
			/* not the same place: COMPARED will tell */
			ret = -1;
		}
		if (ret > 0 && verify_attributes(box, verify)) {
			verify_answer(username, origin, verify,
				      DOVETAIL_VERIFIED_EQUAL, here.count,
				      NULL);
			return;
		}
		if (ret == 0 && verify->flags == 0) {
			verify_answer(username, origin, verify,
				DOVETAIL_VERIFIED_DIFFERENT, here.count,
				t_strdup_printf("%u messages on %s, %u on %s",
					verify->digest.count, origin,
					here.count, replay.set.node));
			return;
		}
	}
	replay_compare_start(username, origin, verify->guid, verify->name,
			     verify->flags, verify->number);
}
