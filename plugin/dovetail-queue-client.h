#ifndef DOVETAIL_QUEUE_CLIENT_H
#define DOVETAIL_QUEUE_CLIENT_H

/* A mail process' side of the socket to dovetail-queue. One connection per
   process and socket path, made when it is first needed and again after it
   broke; no ioloop is involved, so no client command runs while we wait, and no
   wait is longer than the caller's deadline.

   A deadline is a time as dovetail_monotonic_usecs() gives it; 0: do not wait
   at all. */

#include "dovetail-clock.h"
#include "dovetail-frame.h"

struct dovetail_queue_client;

/* Changes whose answers are waited for together. Zero it before the first
   use; it must stay until outstanding is 0 or the batch was cancelled. */
struct dovetail_queue_batch {
	unsigned int outstanding;
	/* the first answer that was not OK; the connection's loss counts as
	   UNAVAILABLE */
	enum dovetail_reply reply;
	/* its text, cut off if need be */
	char error[256];
};

/* Returns the process' client for path, made now if there is none. Each get
   needs an unref. */
struct dovetail_queue_client *
dovetail_queue_client_get(const char *path, struct event *event_parent);
void dovetail_queue_client_unref(struct dovetail_queue_client **client);

/* The user will commit something soon: see DOVETAIL_FRAME_MARK. Does nothing
   when the user is marked already. Never waits. */
void dovetail_queue_client_mark(struct dovetail_queue_client *client,
				const char *user);
/* The same, and wait for the mark: what is committed after this is found again
   whatever dies. It may fail silently: the changes then will, too. */
void dovetail_queue_client_mark_wait(struct dovetail_queue_client *client,
				     const char *user, uint64_t deadline);
/* All that the user committed is queued and positions are written. */
void dovetail_queue_client_clean(struct dovetail_queue_client *client,
				 const char *user);
/* Something of the user's could not be queued: a worker is to look later. */
void dovetail_queue_client_sweep(struct dovetail_queue_client *client,
				 const char *user);

/* Tell the log how it goes: error NULL when a change got through. Logs the first
   failure as warning and the first success after failures, for the whole
   process, not once per mail. */
void dovetail_queue_client_note(struct dovetail_queue_client *client,
				struct event *event, const char *error);

/* Send an encoded change. Waits only while the socket takes no more bytes.
   Returns 0 when the change is on its way and counted in batch, or -1 and
   error_r (data stack): nothing of it was sent, or the connection was closed. */
int dovetail_queue_client_send(struct dovetail_queue_client *client,
			       struct dovetail_queue_batch *batch,
			       unsigned int ack_level, const buffer_t *change,
			       uint64_t deadline, const char **error_r);
/* Wait for the answers to all changes of batch.
   Returns 1: all OK.  0: the deadline passed, some are outstanding.
   -1: all answered, batch->reply and error_r (data stack) say what failed. */
int dovetail_queue_client_wait(struct dovetail_queue_client *client,
			       struct dovetail_queue_batch *batch,
			       uint64_t deadline, const char **error_r);
/* Forget the batch: answers still to come are dropped. */
void dovetail_queue_client_cancel(struct dovetail_queue_client *client,
				  struct dovetail_queue_batch *batch);

/* How far the queue has the mailbox. pos_r->index_id is as given.
   Returns 1: pos_r is set.  0: the queue does not know.  -1: error_r. */
int dovetail_queue_client_position(struct dovetail_queue_client *client,
				   const char *user,
				   const guid_128_t mailbox_guid,
				   uint32_t index_id, uint64_t deadline,
				   struct dovetail_log_pos *pos_r,
				   const char **error_r);
/* Would a change reach the ack level now? Returns 1 yes, 0 no (error_r says
   why), -1 the queue did not answer (error_r). */
int dovetail_queue_client_check(struct dovetail_queue_client *client,
				unsigned int ack_level, uint64_t deadline,
				const char **error_r);

#endif
