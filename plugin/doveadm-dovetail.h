#ifndef DOVEADM_DOVETAIL_H
#define DOVEADM_DOVETAIL_H

/* What the verbs of "doveadm dovetail" share:

     doveadm-dovetail.c         registration; keygen, peers
     doveadm-dovetail-status.c  status
     doveadm-dovetail-health.c  health
     doveadm-dovetail-lag.c     lag
     doveadm-dovetail-job.c     verify, repair, seed
     doveadm-dovetail-queue.c   the connection to dovetail-queue, or -health

   Each verb reports a failure with i_error() and doveadm_exit_code, never with
   i_fatal(), so that doveadm's server and HTTP API survive it. */

#include "doveadm-cmd.h"
#include "dovetail-frame.h"
#include "dovetail-health.h"

struct dovetail_settings;
struct istream;
struct ioloop;
struct io;

/* What stands where there is no value. */
#define DOVEADM_DOVETAIL_NO_VALUE "-"

/* ---- doveadm-dovetail.c ---- */

/* for _has_args() */
#define DOVEADM_DOVETAIL_NO_ARGS_PARAM \
	DOVEADM_CMD_PARAM('\0', "args", CMD_PARAM_ARRAY, \
		CMD_PARAM_FLAG_POSITIONAL | CMD_PARAM_FLAG_DO_NOT_EXPOSE)

/* Arguments that make no sense: tell which ones do. */
void doveadm_dovetail_help(const struct doveadm_cmd_context *cctx);
bool doveadm_dovetail_has_args(const struct doveadm_cmd_context *cctx);
/* Says what is wrong when it returns -1. */
int doveadm_dovetail_settings_read(struct dovetail_settings *set_r);

/* ---- the verbs ---- */

extern struct doveadm_cmd_ver2 doveadm_dovetail_cmd_health;
extern struct doveadm_cmd_ver2 doveadm_dovetail_cmd_lag;
extern struct doveadm_cmd_ver2 doveadm_dovetail_cmd_status;
extern struct doveadm_cmd_ver2 doveadm_dovetail_cmds_job[];
extern const unsigned int doveadm_dovetail_cmds_job_count;

/* ---- doveadm-dovetail-queue.c ---- */

/* How long an answer that comes from the service's memory may take. */
#define DOVEADM_QUEUE_TIMEOUT_MSECS (5 * 1000)

struct doveadm_queue {
	/* set before _open(); path: of the service's socket */
	pool_t pool;
	const char *path;
	/* NULL: dovetail-queue */
	const char *service;
	/* A frame came. FALSE: the conversation is over. */
	bool (*frame)(enum dovetail_frame_type type,
		      struct dovetail_wire_reader *r, void *context);
	void *context;

	/* NULL, or what went wrong, and the exit status */
	const char *error;
	int exit_code;

	bool welcomed;
	struct ioloop *ioloop;
	struct istream *input;
	struct io *io;
};

/* Connect, and send the frames in question. Makes the current ioloop. Returns 0, or
   -1: failed, nothing is to be closed. */
int doveadm_queue_open(struct doveadm_queue *queue, const buffer_t *question);
/* Until the conversation is over or failed. */
void doveadm_queue_run(struct doveadm_queue *queue);
void doveadm_queue_close(struct doveadm_queue *queue);
/* Tell the error, if there is one. */
void doveadm_queue_report(const struct doveadm_queue *queue);

/* It failed: _run() ends. */
void doveadm_queue_fail(struct doveadm_queue *queue, int exit_code,
			const char *error);
/* A REPLY that is not OK. */
void doveadm_queue_refused(struct doveadm_queue *queue,
			   struct dovetail_wire_reader *r);
/* For timeout_add(). */
void doveadm_queue_timeout(struct doveadm_queue *queue);

/* ---- doveadm-dovetail-health.c ---- */

enum doveadm_health_column {
	DOVEADM_HEALTH_ABOUT,
	DOVEADM_HEALTH_PEER,
	DOVEADM_HEALTH_DIRECTION,
	DOVEADM_HEALTH_STATE,
	DOVEADM_HEALTH_SINCE,
	DOVEADM_HEALTH_LAG,
	DOVEADM_HEALTH_WHO,
	DOVEADM_HEALTH_REASON,
	DOVEADM_HEALTH_REMEDY,
	DOVEADM_HEALTH_ENTRIES,

	DOVEADM_HEALTH_COLUMN_COUNT
};

struct doveadm_health_row {
	/* "": there is none */
	const char *values[DOVEADM_HEALTH_COLUMN_COUNT];
	enum dovetail_health_state state;
};

/* What dovetail-health knows: all is in queue.pool, to be unreferenced by the caller,
   also if queue.error is set. */
struct doveadm_health {
	struct doveadm_queue queue;
	ARRAY(struct doveadm_health_row) rows;
};

/* user: "": of none, "*": of all that are not ok. */
void doveadm_health_ask(struct doveadm_health *health,
			struct doveadm_cmd_context *cctx, const char *user);

#endif
