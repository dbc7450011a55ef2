/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* The round: every dovetail_verify_interval this worker has the replicas compare all
   mailboxes of its users, also those that nobody uses, and repair what differs. It
   finds what no hook saw: files that were changed by hand, on either side, writers
   without the plugin, a disk that forgets. It is a job like those of doveadm
   (dovetail-replay-job.c), begun by ourselves.

   How far it came stands in a file, STATE_DIR/replay/round.SLOT, and the next process
   goes on there. One line with tabs: slots, shards (with others these are other
   users), when the last round began and ended (seconds since 1970), the differences
   and repairs of the one that ended last; then of the one that is running: users,
   mailboxes, messages, differences, repairs, and the last user that is finished. */

#include "lib.h"
#include "array.h"
#include "ioloop.h"
#include "istream.h"
#include "str.h"
#include "strescape.h"
#include "write-full.h"
#include "dovetail-frame.h"
#include "dovetail-replay.h"

#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

/* After a restart everybody has other things to do first. */
#define ROUND_RESUME_SECS 5
/* It could not go on: a peer or the queue is away. */
#define ROUND_RETRY_SECS 600
/* Longer than that we do not sleep: the clock may be set. */
#define ROUND_SLEEP_MAX_SECS 60
/* Texts of one difference that are logged. */
#define ROUND_TEXTS_MAX 5

struct round_counts {
	uint64_t users, mailboxes, messages;
	/* mailboxes, lists of mailboxes, users; different: or could not tell */
	uint64_t different, repaired;
};

static struct {
	/* 0: never */
	uint64_t began, ended;
	/* of the round that ended last */
	struct round_counts last;
	/* of the one that is not finished, until the job that runs for it began; all
	   zero when there is none */
	struct round_counts before;
	/* ... and with what the job found */
	struct round_counts now;
	/* finished in it, "" when none is */
	char *user;

	struct timeout *to;
	time_t due;
	/* why it cannot go on, as logged */
	char *error;
} state;

static void round_schedule(unsigned int min_secs);

static bool round_is_unfinished(void)
{
	return state.began > state.ended;
}

/* ---- the file ---- */

static const char *round_path(void)
{
	return t_strdup_printf("%s/round.%u", replay.dir, replay.slot);
}

/* Whole or not at all: a part of it might name another user. */
static void round_write(void)
{
	const char *path = round_path();
	const char *temp_path = t_strconcat(path, ".new", NULL);
	string_t *str = t_str_new(256);
	int fd;

	str_printfa(str, "%u\t%u", replay.slots, replay.set.shards);
	str_printfa(str, "\t%"PRIu64"\t%"PRIu64"\t%"PRIu64"\t%"PRIu64,
		    state.began, state.ended, state.last.different,
		    state.last.repaired);
	str_printfa(str, "\t%"PRIu64"\t%"PRIu64"\t%"PRIu64"\t%"PRIu64
		    "\t%"PRIu64"\t", state.now.users, state.now.mailboxes,
		    state.now.messages, state.now.different,
		    state.now.repaired);
	str_append_tabescaped(str, state.user);
	str_append_c(str, '\n');

	fd = open(temp_path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
	if (fd == -1) {
		e_error(replay.event, "open(%s) failed: %m", temp_path);
		return;
	}
	if (write_full(fd, str_data(str), str_len(str)) < 0)
		e_error(replay.event, "write(%s) failed: %m", temp_path);
	else if (rename(temp_path, path) < 0)
		e_error(replay.event, "rename(%s) failed: %m", temp_path);
	i_close_fd(&fd);
}

static bool round_parse(const char *line)
{
	const char *const *fields = t_strsplit_tabescaped(line);
	uint64_t *const nums[] = {
		&state.began, &state.ended, &state.last.different,
		&state.last.repaired, &state.before.users,
		&state.before.mailboxes, &state.before.messages,
		&state.before.different, &state.before.repaired,
	};
	unsigned int slots, shards, i;

	if (str_array_length(fields) != 3 + N_ELEMENTS(nums) ||
	    str_to_uint(fields[0], &slots) < 0 || slots != replay.slots ||
	    str_to_uint(fields[1], &shards) < 0 ||
	    shards != replay.set.shards)
		return FALSE;
	for (i = 0; i < N_ELEMENTS(nums); i++) {
		if (str_to_uint64(fields[2 + i], nums[i]) < 0)
			return FALSE;
	}
	i_free(state.user);
	state.user = i_strdup(fields[2 + i]);
	state.now = state.before;
	return TRUE;
}

/* TRUE: there was one, and it is of the same workers. */
static bool round_read(void)
{
	const char *path = round_path(), *line;
	struct istream *input;
	bool ret = FALSE;
	int fd;

	fd = open(path, O_RDONLY);
	if (fd == -1) {
		if (errno != ENOENT)
			e_error(replay.event, "open(%s) failed: %m", path);
		return FALSE;
	}
	input = i_stream_create_fd_autoclose(&fd, 8192);
	line = i_stream_read_next_line(input);
	if (line != NULL)
		ret = round_parse(line);
	i_stream_unref(&input);
	return ret;
}

/* ---- what the job tells ---- */

static void round_count(const struct dovetail_job_progress *progress)
{
	state.now = state.before;
	if (progress->users > progress->users_before +
	    progress->users_elsewhere) {
		state.now.users += progress->users - progress->users_before -
			progress->users_elsewhere;
	}
	state.now.mailboxes += progress->mailboxes;
	state.now.messages += progress->messages;
	state.now.different += progress->different + progress->unknown;
	state.now.repaired += progress->repaired;
}

void replay_round_result(const struct dovetail_job_result *result)
{
	string_t *str = t_str_new(128);
	unsigned int i, count = array_count(&result->texts);

	str_printfa(str, "User %s", result->user);
	if (result->mailbox[0] != '\0')
		str_printfa(str, " mailbox %s", result->mailbox);
	str_append(str, ": Verification: ");
	switch (result->result) {
	case DOVETAIL_VERIFIED_EQUAL:
		return;
	case DOVETAIL_VERIFIED_DIFFERENT:
		str_printfa(str, "Different on %s", result->peer);
		break;
	case DOVETAIL_VERIFIED_REPAIRED:
		str_printfa(str, "Was different on %s, repaired", result->peer);
		break;
	case DOVETAIL_VERIFIED_UNKNOWN:
		str_append(str, "Cannot tell");
		break;
	}
	for (i = 0; i < I_MIN(count, ROUND_TEXTS_MAX); i++) {
		str_append(str, i == 0 ? ": " : "; ");
		str_append(str, array_idx_elem(&result->texts, i));
	}
	if (i < count)
		str_printfa(str, "; and %u more", count - i);
	e_warning(replay.event, "%s", str_c(str));
}

void replay_round_finished(const char *user,
			   const struct dovetail_job_progress *progress)
{
	i_free(state.user);
	state.user = i_strdup(user);
	round_count(progress);
	round_write();
	replay_control_changed();
}

static void round_set_error(const char *error)
{
	if (error != NULL && null_strcmp(error, state.error) != 0) {
		e_warning(replay.event, "Verification: Cannot go on: %s",
			  error);
	}
	i_free(state.error);
	state.error = i_strdup(error);
}

void replay_round_done(enum dovetail_job_end end, const char *text,
		       const struct dovetail_job_progress *progress)
{
	round_count(progress);
	if (end != DOVETAIL_JOB_COMPLETE) {
		round_set_error(text);
		round_schedule(ROUND_RETRY_SECS);
		return;
	}
	round_set_error(NULL);
	if (state.now.users > 0) {
		e_info(replay.event, "Verification: %"PRIu64" users, %"PRIu64
		       " mailboxes, %"PRIu64" messages: %"PRIu64" different, "
		       "%"PRIu64" repaired", state.now.users,
		       state.now.mailboxes, state.now.messages,
		       state.now.different, state.now.repaired);
	}
	state.ended = I_MAX((uint64_t)ioloop_time, state.began);
	state.last = state.now;
	i_zero(&state.before);
	i_zero(&state.now);
	i_free(state.user);
	state.user = i_strdup("");
	round_write();
	replay_control_changed();
	round_schedule(0);
}

/* ---- time ---- */

static void round_begin(void)
{
	if (!round_is_unfinished()) {
		/* two in one second: the file tells them apart */
		state.began = I_MAX((uint64_t)ioloop_time, state.ended + 1);
		round_write();
	}
	state.before = state.now;
	replay_job_start_round(state.user, (uint64_t)replay.slots * 1000000 /
			       replay.set.verify_rate);
}

static void round_timeout(void *context ATTR_UNUSED)
{
	time_t now = ioloop_time;

	timeout_remove(&state.to);
	/* the clock may have been set */
	state.due = I_MIN(state.due,
			  now + (time_t)replay.set.verify_interval_secs);
	if (state.due > now) {
		state.to = replay_timeout_add(I_MIN(state.due - now,
			ROUND_SLEEP_MAX_SECS) * 1000, round_timeout, NULL);
	} else T_BEGIN {
		round_begin();
	} T_END;
}

/* Begin when it is time, but not before min_secs. */
static void round_schedule(unsigned int min_secs)
{
	unsigned int interval = replay.set.verify_interval_secs;

	state.due = ioloop_time + I_MIN(min_secs, interval);
	if (!round_is_unfinished())
		state.due = I_MAX(state.due, (time_t)state.began + interval);
	timeout_remove(&state.to);
	state.to = replay_timeout_add(0, round_timeout, NULL);
}

unsigned int replay_round_report(buffer_t *buf)
{
	const char *const fields[] = {
		"peer", "",
		"verified_time", t_strdup_printf("%"PRIu64, state.ended),
		"different", t_strdup_printf("%"PRIu64,
			I_MAX(state.last.different, state.now.different)),
		"repaired", t_strdup_printf("%"PRIu64,
			I_MAX(state.last.repaired, state.now.repaired)),
	};
	unsigned int i;

	dovetail_wire_put_num(buf, N_ELEMENTS(fields) / 2);
	for (i = 0; i < N_ELEMENTS(fields); i++)
		dovetail_wire_put_str(buf, fields[i]);
	return 1;
}

void replay_round_init(void)
{
	state.user = i_strdup("");
	if (replay.set.verify_interval_secs == 0 ||
	    replay.set.peers[0] == NULL)
		return;
	T_BEGIN {
		if (!round_read()) {
			/* whatever a part of it says */
			i_free(state.user);
			i_zero(&state);
			state.user = i_strdup("");
			state.began = state.ended = ioloop_time;
			round_write();
		}
	} T_END;
	round_schedule(ROUND_RESUME_SECS);
}

void replay_round_deinit(void)
{
	timeout_remove(&state.to);
	i_free(state.user);
	i_free(state.error);
}
