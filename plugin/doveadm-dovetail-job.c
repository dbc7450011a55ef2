/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* doveadm dovetail verify, repair, seed: have dovetail-queue start a job
   (dovetail-job.h), print what comes, and tell how far it is. */

#include "lib.h"
#include "array.h"
#include "buffer.h"
#include "ioloop.h"
#include "lib-signals.h"
#include "str.h"
#include "str-sanitize.h"
#include "doveadm.h"
#include "doveadm-print.h"
#include "dovetail-compat.h"
#include "dovetail-frame.h"
#include "dovetail-job.h"
#include "dovetail-settings.h"
#include "doveadm-dovetail.h"

#include <stdio.h>
#include <time.h>
#include <unistd.h>

#define RIGHT DOVEADM_PRINT_HEADER_FLAG_RIGHT_JUSTIFY

#define PROGRESS_MSECS 1000
/* where it does not go to a terminal */
#define PROGRESS_SLOW_MSECS (10 * 1000)
/* more workers than this do not exist */
#define JOB_SLOTS_MAX 1024

struct job_run {
	struct doveadm_queue queue;
	const struct doveadm_cmd_context *cctx;
	/* "verify", "repair", "seed" */
	const char *verb;
	struct dovetail_job job;
	bool summary;

	/* by the workers' slots */
	ARRAY(struct dovetail_job_progress) parts;
	uint64_t start_usecs;
	bool waiting_told, resume_told;
	/* how a worker's part ended, other than complete; the reasons, each
	   once */
	enum dovetail_job_end end;
	ARRAY_TYPE(const_string) reasons;
	bool interrupted;

	/* there is a terminal, and a line of progress on it */
	bool terminal, line_shown;
};

static const char *const job_results[] = {
	[DOVETAIL_VERIFIED_EQUAL] = "equal",
	[DOVETAIL_VERIFIED_DIFFERENT] = "different",
	[DOVETAIL_VERIFIED_REPAIRED] = "repaired",
	[DOVETAIL_VERIFIED_UNKNOWN] = "unknown",
};

static uint64_t now_usecs(void)
{
	struct timespec ts;

	if (clock_gettime(CLOCK_MONOTONIC, &ts) < 0)
		return 0;
	return (uint64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

/* ---- progress ---- */

static void job_sum(const struct job_run *run,
		    struct dovetail_job_progress *sum_r)
{
	const struct dovetail_job_progress *part;

	i_zero(sum_r);
	array_foreach(&run->parts, part) {
		sum_r->waiting = sum_r->waiting || part->waiting;
		sum_r->users += part->users;
		sum_r->users_all += part->users_all;
		sum_r->users_before += part->users_before;
		sum_r->users_elsewhere += part->users_elsewhere;
		sum_r->mailboxes += part->mailboxes;
		sum_r->messages += part->messages;
		sum_r->equal += part->equal;
		sum_r->different += part->different;
		sum_r->repaired += part->repaired;
		sum_r->unknown += part->unknown;
		sum_r->bytes += part->bytes;
	}
}

static double job_seconds(const struct job_run *run)
{
	return (now_usecs() - run->start_usecs) / 1000000.0;
}

static uint64_t
job_messages_per_second(const struct job_run *run,
			const struct dovetail_job_progress *sum)
{
	double seconds = job_seconds(run);

	return seconds <= 0 ? 0 : (uint64_t)(sum->messages / seconds);
}

static void job_clear_line(struct job_run *run)
{
	if (run->line_shown)
		fprintf(stderr, "\r\033[K");
	run->line_shown = FALSE;
}

static void job_append_found(string_t *str,
			     const struct dovetail_job_progress *sum)
{
	if (sum->different > 0)
		str_printfa(str, ", %"PRIu64" different", sum->different);
	if (sum->repaired > 0)
		str_printfa(str, ", %"PRIu64" repaired", sum->repaired);
	if (sum->unknown > 0)
		str_printfa(str, ", %"PRIu64" unknown", sum->unknown);
	if (sum->bytes > 0)
		str_printfa(str, ", %.1f MB sent", sum->bytes / 1000000.0);
}

static void job_show_progress(struct job_run *run)
{
	struct dovetail_job_progress sum;
	uint64_t finished, left, secs;
	string_t *str = t_str_new(128);

	job_sum(run, &sum);
	str_printfa(str, "%s: ", run->verb);
	if (dovetail_job_is_of_many(&run->job)) {
		str_printfa(str, "%"PRIu64" of %"PRIu64" users, ",
			    sum.users, sum.users_all);
	}
	str_printfa(str, "%"PRIu64" mailboxes, %"PRIu64" messages, %"PRIu64"/s",
		    sum.mailboxes, sum.messages,
		    job_messages_per_second(run, &sum));
	job_append_found(str, &sum);
	finished = sum.users - sum.users_before;
	if (finished > 0 && dovetail_job_is_of_many(&run->job)) {
		left = sum.users_all - sum.users;
		secs = (uint64_t)(job_seconds(run) / finished * left);
		str_printfa(str, ", %"PRIu64":%02u:%02u left", secs / 3600,
			    (unsigned int)(secs / 60 % 60),
			    (unsigned int)(secs % 60));
	}
	if (run->terminal)
		fprintf(stderr, "\r\033[K%s", str_c(str));
	else
		fprintf(stderr, "%s\n", str_c(str));
	run->line_shown = run->terminal;
}

/* What is worth a sentence. */
static void job_tell_state(struct job_run *run)
{
	struct dovetail_job_progress sum;

	job_sum(run, &sum);
	if (sum.waiting && !run->waiting_told) {
		job_clear_line(run);
		i_info("Another command like this one is running for many "
		       "users: waiting for its end");
		run->waiting_told = TRUE;
	}
	if (sum.users_before > 0 && !run->resume_told) {
		job_clear_line(run);
		i_info("Going on behind users that were finished before");
		run->resume_told = TRUE;
	}
}

/* ---- frames ---- */

static void
job_print_row(struct job_run *run, const struct dovetail_job_result *result,
	      const char *text)
{
	static const char *const none = DOVEADM_DOVETAIL_NO_VALUE;

	if (run->line_shown && isatty(STDOUT_FILENO) > 0)
		job_clear_line(run);
	doveadm_print(str_sanitize_utf8(result->user, SIZE_MAX));
	doveadm_print(result->mailbox[0] == '\0' ? none :
		      str_sanitize_utf8(result->mailbox, SIZE_MAX));
	doveadm_print(result->peer[0] == '\0' ? none : result->peer);
	doveadm_print(job_results[result->result]);
	doveadm_print_num(result->messages);
	doveadm_print(text[0] == '\0' ? none :
		      str_sanitize_utf8(text, SIZE_MAX));
}

static bool job_result(struct job_run *run, struct dovetail_wire_reader *r)
{
	struct dovetail_job_result result;
	const char *text;

	if (!dovetail_job_result_get(r, pool_datastack_create(), &result))
		return FALSE;
	if (run->summary)
		return TRUE;
	array_foreach_elem(&result.texts, text)
		job_print_row(run, &result, text);
	if (array_count(&result.texts) == 0)
		job_print_row(run, &result, "");
	return TRUE;
}

static bool job_progress(struct job_run *run, unsigned int slot,
			 struct dovetail_wire_reader *r)
{
	struct dovetail_job_progress progress;

	if (!dovetail_job_progress_get(r, &progress))
		return FALSE;
	array_idx_set(&run->parts, slot, &progress);
	job_tell_state(run);
	return TRUE;
}

static bool job_done(struct job_run *run, struct dovetail_wire_reader *r)
{
	enum dovetail_job_end end;
	const char *text;

	if (!dovetail_job_done_get(r, run->queue.pool, &end, &text))
		return FALSE;
	if (end == DOVETAIL_JOB_COMPLETE)
		return TRUE;
	run->end = end;
	if (array_lsearch(&run->reasons, &text, i_strcmp_p) == NULL)
		array_push_back(&run->reasons, &text);
	return TRUE;
}

static bool job_part_frame(struct job_run *run, enum dovetail_frame_type type,
			   struct dovetail_wire_reader *r)
{
	uint64_t slot;

	(void)dovetail_wire_get_num(r); /* tag */
	slot = dovetail_wire_get_num(r);
	if (r->failed || slot >= JOB_SLOTS_MAX)
		return FALSE;
	switch (type) {
	case DOVETAIL_FRAME_JOB_RESULT:
		return job_result(run, r);
	case DOVETAIL_FRAME_JOB_PROGRESS:
		return job_progress(run, slot, r);
	default:
		return job_done(run, r);
	}
}

static bool job_frame(enum dovetail_frame_type type,
		      struct dovetail_wire_reader *r, void *context)
{
	struct job_run *run = context;
	struct dovetail_wire_reader reply = *r;

	switch (type) {
	case DOVETAIL_FRAME_JOB_RESULT:
	case DOVETAIL_FRAME_JOB_PROGRESS:
	case DOVETAIL_FRAME_JOB_DONE:
		if (job_part_frame(run, type, r))
			return TRUE;
		doveadm_queue_fail(&run->queue, EX_PROTOCOL,
			"the dovetail-queue service sent what cannot be read");
		return FALSE;
	case DOVETAIL_FRAME_REPLY:
		(void)dovetail_wire_get_num(&reply); /* tag */
		if (dovetail_wire_get_u8(&reply) != DOVETAIL_REPLY_OK)
			doveadm_queue_refused(&run->queue, r);
		return FALSE;
	default:
		/* not for us */
		return TRUE;
	}
}

/* ---- the end ---- */

static void job_print_headers(const struct job_run *run)
{
	static const char *const counters[] = {
		"users", "mailboxes", "messages", "equal", "different",
		"repaired", "unknown", "elsewhere", "seconds", "rate", "bytes"
	};
	unsigned int i;

	doveadm_print_init(DOVEADM_PRINT_TYPE_TABLE);
	if (run->summary) {
		for (i = 0; i < N_ELEMENTS(counters); i++)
			doveadm_print_header(counters[i], counters[i], RIGHT);
		return;
	}
	doveadm_print_header_simple("user");
	doveadm_print_header_simple("mailbox");
	doveadm_print_header_simple("peer");
	doveadm_print_header_simple("result");
	doveadm_print_header("messages", "messages", RIGHT);
	doveadm_print_header("difference", "difference",
			     DOVEADM_PRINT_HEADER_FLAG_EXPAND);
}

static void job_print_summary(const struct job_run *run,
			      const struct dovetail_job_progress *sum)
{
	string_t *str = t_str_new(256);

	if (run->summary) {
		doveadm_print_num(sum->users - sum->users_before -
				  sum->users_elsewhere);
		doveadm_print_num(sum->mailboxes);
		doveadm_print_num(sum->messages);
		doveadm_print_num(sum->equal);
		doveadm_print_num(sum->different);
		doveadm_print_num(sum->repaired);
		doveadm_print_num(sum->unknown);
		doveadm_print_num(sum->users_elsewhere);
		doveadm_print(t_strdup_printf("%.3f", job_seconds(run)));
		doveadm_print_num(job_messages_per_second(run, sum));
		doveadm_print_num(sum->bytes);
		return;
	}
	str_printfa(str, "%s: %"PRIu64" users, %"PRIu64" mailboxes, "
		    "%"PRIu64" messages: %"PRIu64" equal", run->verb,
		    sum->users - sum->users_before - sum->users_elsewhere,
		    sum->mailboxes, sum->messages, sum->equal);
	job_append_found(str, sum);
	str_printfa(str, "; %.3f s, %"PRIu64" messages/s", job_seconds(run),
		    job_messages_per_second(run, sum));
	if (sum->users_elsewhere > 0) {
		str_printfa(str, ". Of %"PRIu64" users other nodes are the "
			    "primary: run it there, too", sum->users_elsewhere);
	}
	i_info("%s", str_c(str));
}

/* The command that goes on. */
static const char *job_resume_command(const struct job_run *run)
{
	string_t *str = t_str_new(128);

	str_printfa(str, "doveadm dovetail %s ", run->verb);
	if (strcmp(run->job.users, "*") == 0)
		str_append(str, "-A");
	else
		str_printfa(str, "-u '%s'", run->job.users);
	if ((run->job.flags & DOVETAIL_VERIFY_DEEP) != 0)
		str_append(str, " --deep");
	if ((run->job.flags & DOVETAIL_VERIFY_EXPLAIN) != 0)
		str_append(str, " --explain");
	str_append(str, " --resume");
	return str_c(str);
}

static int job_exit_code(const struct job_run *run,
			 const struct dovetail_job_progress *sum)
{
	if (run->queue.error != NULL && run->end == DOVETAIL_JOB_COMPLETE &&
	    sum->different == 0)
		return run->queue.exit_code;
	if (run->end == DOVETAIL_JOB_NO_USER)
		return EX_NOUSER;
	if (run->end == DOVETAIL_JOB_ELSEWHERE)
		return EX_UNAVAILABLE;
	if (run->cctx->conn_type == DOVEADM_CONNECTION_TYPE_HTTP &&
	    run->end == DOVETAIL_JOB_COMPLETE) {
		/* with any other status the answer would have no rows */
		return EX_OK;
	}
	if (sum->different > 0)
		return EX_DATAERR;
	return run->interrupted || sum->unknown > 0 ||
		run->end != DOVETAIL_JOB_COMPLETE ? EX_TEMPFAIL : EX_OK;
}

static void job_report(struct job_run *run)
{
	struct dovetail_job_progress sum;
	const char *reason;
	bool ended_early;

	job_clear_line(run);
	job_sum(run, &sum);
	doveadm_queue_report(&run->queue);
	array_foreach_elem(&run->reasons, reason)
		i_error("%s", reason);
	ended_early = run->interrupted || run->queue.error != NULL ||
		run->end != DOVETAIL_JOB_COMPLETE;
	/* one that never began has no numbers */
	if (!ended_early || sum.users > sum.users_elsewhere)
		job_print_summary(run, &sum);
	if (ended_early && sum.users_all > 0 &&
	    dovetail_job_is_of_many(&run->job)) {
		i_info("To go on where this ended: %s",
		       job_resume_command(run));
	}
	doveadm_exit_code = job_exit_code(run, &sum);
}

/* ---- run ---- */

static void job_killed(const siginfo_t *si ATTR_UNUSED, void *context)
{
	struct job_run *run = context;

	run->interrupted = TRUE;
	io_loop_stop(run->queue.ioloop);
}

/* The connection's end is the job's. */
static void job_run_opened(struct job_run *run)
{
	bool cli = run->cctx->conn_type == DOVEADM_CONNECTION_TYPE_CLI;
	struct timeout *to = NULL;

	run->terminal = cli && isatty(STDERR_FILENO) > 0;
	if (run->terminal || (cli && doveadm_verbose)) {
		to = timeout_add(run->terminal ? PROGRESS_MSECS :
				 PROGRESS_SLOW_MSECS, job_show_progress, run);
	}
	if (cli) {
		lib_signals_set_handler(SIGINT, LIBSIG_FLAG_DELAYED |
			LIBSIG_FLAG_IOLOOP_AUTOMOVE, job_killed, run);
		lib_signals_set_handler(SIGTERM, LIBSIG_FLAG_DELAYED |
			LIBSIG_FLAG_IOLOOP_AUTOMOVE, job_killed, run);
	}
	doveadm_queue_run(&run->queue);
	if (cli) {
		lib_signals_unset_handler(SIGINT, job_killed, run);
		lib_signals_unset_handler(SIGTERM, job_killed, run);
	}
	timeout_remove(&to);
}

static void job_run(struct job_run *run)
{
	buffer_t *question = t_buffer_create(256);
	size_t offset;

	run->queue.pool = pool_alloconly_create("dovetail job", 4096);
	run->queue.frame = job_frame;
	run->queue.context = run;
	i_array_init(&run->parts, 16);
	p_array_init(&run->reasons, run->queue.pool, 4);
	run->start_usecs = now_usecs();

	offset = dovetail_frame_begin(question, DOVETAIL_FRAME_JOB);
	dovetail_wire_put_num(question, 1);
	dovetail_job_put(question, &run->job);
	dovetail_frame_end(question, offset);
	job_print_headers(run);
	if (doveadm_queue_open(&run->queue, question) == 0) {
		job_run_opened(run);
		doveadm_queue_close(&run->queue);
	}
	job_report(run);
	array_free(&run->parts);
	pool_unref(&run->queue.pool);
}

static bool param_is_set(const struct doveadm_cmd_context *cctx,
			 const char *name)
{
	bool set;

	return doveadm_cmd_param_bool(cctx, name, &set) && set;
}

/* Says what is wrong when it returns -1. */
static int job_get_users(struct job_run *run, bool all_is_default)
{
	const struct doveadm_cmd_context *cctx = run->cctx;
	bool all = param_is_set(cctx, "all-users");

	if (!doveadm_cmd_param_str(cctx, "user", &run->job.users)) {
		if (!all && !all_is_default) {
			doveadm_dovetail_help(cctx);
			return -1;
		}
		run->job.users = "*";
		return 0;
	}
	if (all) {
		doveadm_dovetail_help(cctx);
		return -1;
	}
	if (run->job.users[0] == '\0' ||
	    strlen(run->job.users) > DOVETAIL_JOB_USERS_MAX_LEN) {
		i_error("-u: No user has such a name");
		doveadm_exit_code = EX_NOUSER;
		return -1;
	}
	return 0;
}

static int job_get_params(struct job_run *run, bool all_is_default)
{
	const struct doveadm_cmd_context *cctx = run->cctx;
	const char *rate;

	if (doveadm_dovetail_has_args(cctx)) {
		doveadm_dovetail_help(cctx);
		return -1;
	}
	if (job_get_users(run, all_is_default) < 0)
		return -1;
	if (param_is_set(cctx, "deep"))
		run->job.flags |= DOVETAIL_VERIFY_DEEP;
	if (param_is_set(cctx, "explain"))
		run->job.flags |= DOVETAIL_VERIFY_EXPLAIN;
	run->summary = param_is_set(cctx, "summary");
	run->job.resume = param_is_set(cctx, "resume");
	if (run->job.resume && !dovetail_job_is_of_many(&run->job)) {
		i_error("--resume: Only for many users, -A or -u with "
			"wildcards; one is done from its beginning");
		doveadm_exit_code = EX_USAGE;
		return -1;
	}
	if (doveadm_cmd_param_str(cctx, "rate", &rate) &&
	    (str_to_uint32(rate, &run->job.rate) < 0 || run->job.rate == 0)) {
		i_error("--rate: '%s' is not a number of messages per second, "
			"1 or higher", str_sanitize(rate, 128));
		doveadm_exit_code = EX_USAGE;
		return -1;
	}
	return 0;
}

static int job_get_socket(struct job_run *run)
{
	struct dovetail_settings set;

	if (doveadm_cmd_param_str(run->cctx, "queue-socket", &run->queue.path))
		return 0;
	if (doveadm_dovetail_settings_read(&set) < 0)
		return -1;
	if (set.peers[0] == NULL) {
		i_error("dovetail_peers: Not set: there is no other node to "
			"compare with");
		doveadm_exit_code = EX_CONFIG;
		return -1;
	}
	run->queue.path = set.queue_socket;
	return 0;
}

static void cmd_dovetail_job(struct doveadm_cmd_context *cctx, const char *verb,
			     enum dovetail_verify_flags flags,
			     bool all_is_default)
{
	struct job_run run;

	i_zero(&run);
	run.cctx = cctx;
	run.verb = verb;
	run.job.flags = flags;
	if (job_get_params(&run, all_is_default) == 0 &&
	    job_get_socket(&run) == 0)
		job_run(&run);
}

static void cmd_dovetail_verify(struct doveadm_cmd_context *cctx)
{
	cmd_dovetail_job(cctx, "verify", 0, FALSE);
}

static void cmd_dovetail_repair(struct doveadm_cmd_context *cctx)
{
	/* what would be repaired is what differs */
	if (param_is_set(cctx, "dry-run")) {
		cmd_dovetail_job(cctx, "verify", DOVETAIL_VERIFY_EXPLAIN,
				 FALSE);
	} else {
		cmd_dovetail_job(cctx, "repair", DOVETAIL_VERIFY_REPAIR,
				 FALSE);
	}
}

static void cmd_dovetail_seed(struct doveadm_cmd_context *cctx)
{
	cmd_dovetail_job(cctx, "seed", DOVETAIL_VERIFY_REPAIR, TRUE);
}

/* ---- registration ---- */

#define JOB_USAGE \
	"[--rate <messages per second>] [--resume] [--summary] " \
	"[-a <queue socket path>]"
#define JOB_PARAMS \
	DOVEADM_CMD_PARAM('u', "user", CMD_PARAM_STR, 0) \
	DOVEADM_CMD_PARAM('A', "all-users", CMD_PARAM_BOOL, 0) \
	DOVEADM_CMD_PARAM('a', "queue-socket", CMD_PARAM_STR, 0) \
	DOVEADM_CMD_PARAM('\0', "rate", CMD_PARAM_STR, 0) \
	DOVEADM_CMD_PARAM('\0', "resume", CMD_PARAM_BOOL, 0) \
	DOVEADM_CMD_PARAM('\0', "summary", CMD_PARAM_BOOL, 0) \
	DOVEADM_DOVETAIL_NO_ARGS_PARAM

struct doveadm_cmd_ver2 doveadm_dovetail_cmds_job[] = {
{
	.name = "dovetail verify",
	.cmd = cmd_dovetail_verify,
	.usage = "-u <user>|-A [--deep] [--explain] "JOB_USAGE,
DOVEADM_CMD_PARAMS_START
DOVEADM_CMD_PARAM('\0', "deep", CMD_PARAM_BOOL, 0)
DOVEADM_CMD_PARAM('\0', "explain", CMD_PARAM_BOOL, 0)
JOB_PARAMS
DOVEADM_CMD_PARAMS_END
},
{
	.name = "dovetail repair",
	.cmd = cmd_dovetail_repair,
	.usage = "-u <user>|-A [--dry-run] [--deep] [--explain] "JOB_USAGE,
DOVEADM_CMD_PARAMS_START
DOVEADM_CMD_PARAM('\0', "dry-run", CMD_PARAM_BOOL, 0)
DOVEADM_CMD_PARAM('\0', "deep", CMD_PARAM_BOOL, 0)
DOVEADM_CMD_PARAM('\0', "explain", CMD_PARAM_BOOL, 0)
JOB_PARAMS
DOVEADM_CMD_PARAMS_END
},
{
	.name = "dovetail seed",
	.cmd = cmd_dovetail_seed,
	.usage = "[-u <user>|-A] "JOB_USAGE,
DOVEADM_CMD_PARAMS_START
JOB_PARAMS
DOVEADM_CMD_PARAMS_END
},
};
const unsigned int doveadm_dovetail_cmds_job_count =
	N_ELEMENTS(doveadm_dovetail_cmds_job);
