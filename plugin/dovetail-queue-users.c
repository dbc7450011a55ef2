/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "buffer.h"
#include "hash.h"
#include "ioloop.h"
#include "llist.h"
#include "priorityq.h"
#include "dovetail-queue-private.h"
#include "dovetail-service.h"

/* Busy users do not make and remove a file for each mail. */
#define MARK_FILE_KEEP_SECS 30
#define RETRY_MIN_SECS 5
#define RETRY_MAX_SECS 300
/* what comes together is swept together */
#define SWEEP_AGAIN_DELAY_MSECS 1000

static int user_due_cmp(const void *p1, const void *p2)
{
	const struct dovetail_queue_user *u1 = p1, *u2 = p2;

	return u1->due_usecs < u2->due_usecs ? -1 :
		u1->due_usecs > u2->due_usecs ? 1 : 0;
}

static struct dovetail_queue_log *user_log(struct dovetail_queue_user *user)
{
	return &user->queue->logs[user->shard];
}

struct dovetail_queue_user *
dovetail_queue_user_get(struct dovetail_queue *queue, const char *name)
{
	struct dovetail_queue_user *user;

	user = hash_table_lookup(queue->users, name);
	if (user != NULL)
		return user;
	user = i_new(struct dovetail_queue_user, 1);
	user->queue = queue;
	user->name = i_strdup(name);
	user->shard = dovetail_user_shard(name, queue->logs_count);
	hash_table_insert(queue->users, user->name, user);
	return user;
}

static void user_free(struct dovetail_queue_user *user)
{
	hash_table_remove(user->queue->users, user->name);
	i_free(user->name);
	i_free(user);
}

static bool user_is_quiet(const struct dovetail_queue_user *user)
{
	return user->marks == 0 && user->waiters == 0 && !user->dirty;
}

static void user_set_idle(struct dovetail_queue_user *user, bool idle)
{
	struct dovetail_queue *queue = user->queue;

	if (user->idle == idle)
		return;
	user->idle = idle;
	if (!idle) {
		DLLIST2_REMOVE(&queue->idle_head, &queue->idle_tail, user);
		return;
	}
	user->idle_since = dovetail_monotonic_secs();
	DLLIST2_APPEND(&queue->idle_head, &queue->idle_tail, user);
}

void dovetail_queue_user_release(struct dovetail_queue_user *user)
{
	if (!user_is_quiet(user))
		return;
	if (user->mark_file) {
		/* goes later, unless the user comes back */
		user_set_idle(user, TRUE);
	} else if (user->conns == 0) {
		i_assert(user->worker == NULL && !user->due && !user->idle);
		user_free(user);
	}
}

/* ---- the file ---- */

static void marks_set_error(struct dovetail_queue *queue, const char *error)
{
	if (error == NULL) {
		i_free(queue->marks_error);
		return;
	}
	if (null_strcmp(error, queue->marks_error) == 0)
		return;
	/* names differ, reasons seldom do */
	if (queue->marks_error == NULL)
		e_error(queue->event, "Marking users: %s", error);
	i_free(queue->marks_error);
	queue->marks_error = i_strdup(error);
}

static void user_write_mark(struct dovetail_queue_user *user)
{
	struct dovetail_queue *queue = user->queue;
	const char *error;

	if (user->mark_file)
		return;
	T_BEGIN {
		if (dovetail_queue_mark_write(queue->dirty_dir, user->name,
					      &error) < 0)
			marks_set_error(queue, error);
		else {
			marks_set_error(queue, NULL);
			user->mark_file = TRUE;
		}
	} T_END;
}

static void user_remove_mark(struct dovetail_queue_user *user)
{
	struct dovetail_queue *queue = user->queue;
	const char *error;

	T_BEGIN {
		if (dovetail_queue_mark_remove(queue->dirty_dir, user->name,
					       &error) < 0)
			marks_set_error(queue, error);
	} T_END;
	user->mark_file = FALSE;
}

void dovetail_queue_user_mark(struct dovetail_queue_user *user)
{
	user->marks++;
	user_set_idle(user, FALSE);
	user_write_mark(user);
}

void dovetail_queue_user_unmark(struct dovetail_queue_user *user)
{
	i_assert(user->marks > 0);
	user->marks--;
}

/* ---- dirty ---- */

static void user_set_due(struct dovetail_queue_user *user,
			 unsigned int delay_msecs)
{
	struct priorityq *dirty = user_log(user)->dirty;

	if (user->due)
		priorityq_remove(dirty, &user->item);
	user->due = TRUE;
	user->due_usecs = dovetail_monotonic_usecs() +
		(uint64_t)delay_msecs * 1000;
	priorityq_add(dirty, &user->item);
}

void dovetail_queue_user_set_dirty(struct dovetail_queue_user *user,
				   unsigned int delay_msecs,
				   const char *reason)
{
	uint64_t due_usecs = dovetail_monotonic_usecs() +
		(uint64_t)delay_msecs * 1000;

	if (!user->dirty) {
		user->dirty = TRUE;
		user->dirty_msecs = dovetail_monotonic_msecs();
		user->reason = reason;
		user->queue->dirty_count++;
		DLLIST2_APPEND_FULL(&user->queue->dirty_head,
				    &user->queue->dirty_tail, user,
				    dirty_prev, dirty_next);
		user_set_idle(user, FALSE);
		user_write_mark(user);
		e_debug(event_create_passthrough(user->queue->event)->
			add_str("user", user->name)->
			add_str("reason", reason)->event(),
			"User %s is to be swept: %s", user->name, reason);
	}
	if (user->worker != NULL) {
		user->again = TRUE;
		return;
	}
	/* a user that could not be swept waits its time */
	if (!user->due ||
	    (user->retry_secs == 0 && due_usecs < user->due_usecs))
		user_set_due(user, delay_msecs);
}

void dovetail_queue_user_swept(struct dovetail_queue_user *user, bool ok)
{
	struct dovetail_queue *queue = user->queue;
	bool again = user->again;

	i_assert(user->dirty && user->worker != NULL && !user->due);

	user->worker = NULL;
	user->again = FALSE;
	if (!ok) {
		if (user->retry_secs == 0)
			queue->dirty_failing_count++;
		user->retry_secs = user->retry_secs == 0 ? RETRY_MIN_SECS :
			I_MIN(user->retry_secs * 2, RETRY_MAX_SECS);
		user_set_due(user, user->retry_secs * 1000);
		return;
	}
	if (user->retry_secs != 0) {
		user->retry_secs = 0;
		i_assert(queue->dirty_failing_count > 0);
		queue->dirty_failing_count--;
	}
	if (again) {
		user_set_due(user, SWEEP_AGAIN_DELAY_MSECS);
		return;
	}
	user->dirty = FALSE;
	user->reason = NULL;
	i_assert(queue->dirty_count > 0);
	queue->dirty_count--;
	DLLIST2_REMOVE_FULL(&queue->dirty_head, &queue->dirty_tail, user,
			    dirty_prev, dirty_next);
	dovetail_queue_user_release(user);
}

void dovetail_queue_users_work(struct dovetail_queue *queue)
{
	struct dovetail_queue_conn *worker;
	struct dovetail_queue_user *user;
	struct dovetail_queue_log *log;
	uint64_t now = dovetail_monotonic_usecs();
	unsigned int i;

	if (queue->dirty_count == 0 || queue->stopping)
		return;
	for (i = 0; i < queue->logs_count; i++) {
		log = &queue->logs[i];
		if (log->state != DOVETAIL_QUEUE_LOG_READY ||
		    log->stalled || queue->full)
			continue;
		while (priorityq_count(log->dirty) > 0) {
			user = (struct dovetail_queue_user *)
				priorityq_peek(log->dirty);
			if (user->due_usecs > now)
				break;
			worker = dovetail_queue_conns_worker(queue, i);
			if (worker == NULL)
				break;
			(void)priorityq_pop(log->dirty);
			user->due = FALSE;
			user->worker = worker;
			dovetail_queue_conn_work(worker, user);
		}
	}
}

void dovetail_queue_users_tick(struct dovetail_queue *queue)
{
	struct dovetail_queue_user *user;
	time_t now = dovetail_monotonic_secs();

	while ((user = queue->idle_head) != NULL &&
	       now - user->idle_since >= MARK_FILE_KEEP_SECS) {
		user_set_idle(user, FALSE);
		user_remove_mark(user);
		dovetail_queue_user_release(user);
	}
	dovetail_queue_users_work(queue);
}

/* ---- begin and end ---- */

static void users_read_mark(const char *name, void *context)
{
	struct dovetail_queue *queue = context;
	struct dovetail_queue_user *user = dovetail_queue_user_get(queue, name);

	user->mark_file = TRUE;
	dovetail_queue_user_set_dirty(user, 0,
		"it was marked when the service before ended");
}

int dovetail_queue_users_init(struct dovetail_queue *queue,
			      const char **error_r)
{
	unsigned int i;

	hash_table_create(&queue->users, default_pool, 0, str_hash, strcmp);
	for (i = 0; i < queue->logs_count; i++)
		queue->logs[i].dirty = priorityq_init(user_due_cmp, 16);
	if (dovetail_queue_marks_read(queue->dirty_dir, users_read_mark, queue,
				      error_r) < 0)
		return -1;
	if (queue->dirty_count > 0) {
		e_info(event_create_passthrough(queue->event)->
		       add_int("users", queue->dirty_count)->event(),
		       "%u users were marked when the service ended: their "
		       "mailboxes will be read", queue->dirty_count);
	}
	return 0;
}

void dovetail_queue_users_deinit(struct dovetail_queue *queue)
{
	struct hash_iterate_context *iter;
	struct dovetail_queue_user *user;
	char *name;
	unsigned int i;

	if (!hash_table_is_created(queue->users))
		return;
	iter = hash_table_iterate_init(queue->users);
	while (hash_table_iterate(iter, queue->users, &name, &user)) {
		if (user->mark_file && user_is_quiet(user))
			user_remove_mark(user);
		i_free(user->name);
		i_free(user);
	}
	hash_table_iterate_deinit(&iter);
	hash_table_destroy(&queue->users);
	for (i = 0; i < queue->logs_count; i++) {
		if (queue->logs[i].dirty != NULL)
			priorityq_deinit(&queue->logs[i].dirty);
	}
	i_free(queue->marks_error);
}
