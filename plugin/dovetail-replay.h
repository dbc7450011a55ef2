#ifndef DOVETAIL_REPLAY_H
#define DOVETAIL_REPLAY_H

/* The replay service's own parts. One process ("worker") handles the shards with
   shard % slots == slot, of every peer. It applies what the peers' logs say to
   the replicas here, answers the peers' requests from the mailboxes this node is
   primary for, and sweeps users the queue service names.

     dovetail-replay.c          start, wiring
     dovetail-replay-stream.c   read, check and acknowledge the peers' logs
     dovetail-replay-apply.c    one change: whose, allowed, what is lacking
     dovetail-replay-mailbox.c  ... of one mailbox
     dovetail-replay-fit.c      ... which may not fit to what is here
     dovetail-replay-list.c     ... of the list of mailboxes
     dovetail-replay-compare.c  a mailbox that differs: where, and repair
     dovetail-replay-rebuild.c  put messages into the middle of a mailbox
     dovetail-replay-keep.c     keep what only a replica has
     dovetail-replay-users.c    open users and mailboxes
     dovetail-replay-spool.c    bodies that came ahead of their change
     dovetail-replay-wanted.c   what is lacking here and was asked for
     dovetail-replay-file.c     what must survive a restart
     dovetail-replay-shard.c    answer a peer that lacks entries of our log
     dovetail-replay-job.c      verify, repair, seed: ask the peers
     dovetail-replay-round.c    ... from time to time, by itself
     dovetail-replay-control.c  the connection to dovetail-queue
     dovetail-replay-troubles.c mailboxes that differ, for dovetail-health */

#include "ioloop.h"
#include "dovetail-change.h"
#include "dovetail-health-report.h"
#include "dovetail-job.h"
#include "dovetail-settings.h"
#include "dovetail-keyring.h"

struct mail;
struct mail_user;
struct mail_namespace;
struct mailbox;
struct mailbox_transaction_context;
struct mail_save_context;
struct mailbox_list;
struct istream;
struct mail_storage_service_ctx;
struct mail;
struct replay_user;
struct dovetail_mailbox_digest;
struct dovetail_wire_reader;
struct dovetail_position;

struct replay {
	struct event *event;
	pool_t pool;
	struct dovetail_settings set;
	struct dovetail_keyring *keyring;
	/* NULL: none */
	const char *redis_password;
	/* NULL: no rediss:// */
	struct dovetail_redis_tls *redis_tls;
	unsigned int slot, slots;
	/* descriptor of this worker's lock on its slot */
	int lock_fd;
	/* STATE_DIR/replay */
	const char *dir;
	struct dovetail_queue_client *client;
};
/* The one worker this process is. */
extern struct replay replay;

/* ---- dovetail-replay-users.c ---- */

void replay_users_init(struct mail_storage_service_ctx *storage_service,
		       bool switch_uids);
void replay_users_deinit(void);
/* Open the user, or take the one that is open. The user stays open for the
   next change. Returns 0, or -1 and error_r (data stack); -2: the same, and the
   reason is that the userdb does not know the user. */
int replay_user_open(const char *username, struct replay_user **user_r,
		     const char **error_r);
/* Done for now: back to the service's own privileges and log prefix. */
void replay_user_release(struct replay_user **user);
/* Close the user for good, releasing first: its state is in doubt. */
void replay_user_close(struct replay_user **user);

/* A timeout for work that opens users itself: it is not run as the user that is open
   when it is added. */
struct timeout *replay_timeout_add(unsigned int msecs,
				   timeout_callback_t *callback, void *context);
#define replay_timeout_add(msecs, callback, context) \
	replay_timeout_add((msecs) - \
		CALLBACK_TYPECHECK(callback, void (*)(typeof(context))), \
		(io_callback_t *)callback, context)

struct mail_user *replay_user_mail_user(struct replay_user *user);
/* Find the replica of a mailbox: under the hinted path, under any name
   otherwise. The box is open and belongs to the user.
   Returns 1: found.  0: there is none.  -1: failed, error_r (data stack). */
int replay_user_find_mailbox(struct replay_user *user, const guid_128_t guid,
			     const char *path, struct mailbox **box_r,
			     const char **error_r);
/* The digest of a mailbox that replay_user_find_mailbox() gave. Belongs to the user,
   as long as the mailbox is open. */
struct dovetail_mailbox_digest *
replay_user_mailbox_digest(struct replay_user *user, struct mailbox *box);
/* Close the mailboxes that are kept open: names are about to change. */
void replay_user_forget_mailboxes(struct replay_user *user);

/* All users of the userdb whose names match mask (wildcards * and ?) and whose
   changes go to one of the shards (bits), allocated from pool.
   Returns 0, or -1 and error_r (data stack). */
int replay_users_list(const char *mask, uint64_t shards, pool_t pool,
		      ARRAY_TYPE(const_string) *users_r, const char **error_r);

/* ---- dovetail-replay-apply.c ---- */

/* This node's role for the user. Returns 0, or -1 and error_r (data stack): there
   is no plugin, or dovetail is not set up for the user. */
int replay_get_role(struct replay_user *user, const char **primary_r,
		    bool *is_primary_r, const char **error_r);
/* After that: have the replicas answer with VERIFIED: dovetail_plugin_capture_tree()
   and dovetail_plugin_verify() of dovetail-plugin.h. */
int replay_ask_tree(struct replay_user *user, uint32_t *number,
		    enum dovetail_verify_flags flags, const char **error_r);
int replay_ask_mailbox(struct mailbox *box, uint32_t number,
		       enum dovetail_verify_flags flags, uint32_t *messages_r,
		       const char **error_r);
/* Bytes of all bodies that this worker queued: what peers lacked. */
uint64_t replay_bodies_sent(void);
/* The queue takes changes: what failed is the mailbox's fault. */
bool replay_queue_works(void);

enum replay_result {
	/* applied, or had been before */
	REPLAY_DONE,
	/* something the change builds upon is not here: it was asked for */
	REPLAY_LACKING,
	/* could not be applied: set aside, reported, asked for later */
	REPLAY_FAILED,
};

/* Apply one encoded change from a peer's log. Never fails for the stream.
   error_r (data stack) says what is wrong unless _DONE. */
enum replay_result
replay_apply(const char *origin, const void *data, size_t size,
	     const char **error_r);
void replay_apply_deinit(void);
/* Queue the user's tree and what its mailboxes have unqueued. TRUE: all is
   queued. */
bool replay_sweep(const char *username);
/* Queue the user's tree and the state of each mailbox, without bodies, if this
   node is the user's primary. FALSE: the queue did not take all. */
bool replay_send_state(const char *username);

/* ---- dovetail-replay-shard.c ---- */

void replay_shards_deinit(void);
/* asker wants the state of all our users of the shard. number comes back with
   the answer. */
void replay_shard_requested(const char *asker, uint8_t shard, uint32_t number);

/* ---- dovetail-replay-job.c ---- */

/* What dovetail-queue says: DOVETAIL_FRAME_JOB_START, _END, _PAUSE, and STATUS. */
void replay_job_start(uint64_t id, const struct dovetail_job *set);
void replay_job_end(uint64_t id, bool complete);
void replay_job_pause(uint64_t id, bool paused);
void replay_job_status(struct dovetail_wire_reader *r);
/* A peer answers us. */
void replay_job_verified(const char *origin,
			 const struct dovetail_change_verified *verified);
/* dovetail-queue has gone, and who wanted the jobs with it. */
void replay_jobs_deinit(void);
/* A round over all users, of whom those up to behind ("": none) are done. It waits
   for other jobs of many users, and has one user in work at a time, begun usecs
   after the one before. What is found, and the end, is told to
   dovetail-replay-round.c. */
void replay_job_start_round(const char *behind, uint64_t usecs);

/* ---- dovetail-replay-round.c ---- */

void replay_round_init(void);
void replay_round_deinit(void);
/* The round's job tells: of a mailbox that is not equal, ... */
void replay_round_result(const struct dovetail_job_result *result);
/* ... all users up to this one are finished, ... */
void replay_round_finished(const char *user,
			   const struct dovetail_job_progress *progress);
/* ... it has ended. text: why it is not COMPLETE; NULL: dovetail-queue has gone. */
void replay_round_done(enum dovetail_job_end end, const char *text,
		       const struct dovetail_job_progress *progress);
/* As replay_streams_report(). */
unsigned int replay_round_report(buffer_t *buf);

/* ---- dovetail-replay-fit.c ---- */

enum replay_fit {
	REPLAY_FIT_APPLY,
	/* it is here already */
	REPLAY_FIT_SKIP,
	/* a snapshot from before what is here */
	REPLAY_FIT_OLD,
	/* something before it is missing */
	REPLAY_FIT_GAP,
};
/* A mailbox that stands at pos (NULL: it has none), and a change of the origin's
   (dovetail_origin_id()). wanted: its state was asked for. */
enum replay_fit
replay_fits(const char *username, const struct dovetail_position *pos,
	    const uint8_t *origin_id,
	    const struct dovetail_change_mailbox *change, bool wanted);

/* What became of a change. */
struct replay_outcome {
	enum replay_result result;
	/* it was FIT_OLD */
	bool old;
	/* LACKING: UIDNEXT of the mailbox here; 0: there is none */
	uint32_t uid_next;
	/* NULL: DONE */
	const char *error;
};
/* Note it, and ask for what is lacking. */
void replay_mailbox_done(const char *username, const char *origin,
			 const struct dovetail_change_mailbox *change,
			 bool wanted, const struct replay_outcome *outcome);

/* ---- dovetail-replay-mailbox.c, dovetail-replay-list.c ---- */

/* Apply a MAILBOX change. wanted: this state was asked for. */
enum replay_result
replay_mailbox(struct replay_user *user, const char *origin,
	       const struct dovetail_change_mailbox *change, bool wanted,
	       const char **error_r);
/* Is the mailbox' digest, here_r, the one that is there? afresh: computed from the
   index, whatever was known. Returns 1: yes.  0: no.  -1: it is not known. */
int replay_digest_compare(struct dovetail_mailbox_digest *md, bool afresh,
			  const struct dovetail_digest *there,
			  struct dovetail_digest *here_r);
/* Give the message exactly these flags and keywords, and at least this MODSEQ. */
void replay_mail_set_state(struct mailbox *box, struct mail *mail,
			   uint8_t flags, const char *const *keywords,
			   uint64_t modseq);
/* Save the messages of a MESSAGES change. Those that have to wait for
   replay_rebuild() are added to waiting. Returns 0, or -1 and error_r (data
   stack). */
int replay_mailbox_add_messages(struct replay_user *user, const char *origin,
				struct mailbox *box,
				const struct dovetail_change_mailbox *change,
				ARRAY_TYPE(seq_range) *waiting,
				const char **error_r);
/* What would have to be set to give the mailbox the attributes that are there, which
   are all it shall have: ascending, each with a value. A difference without a value
   is one to be removed.
   Returns 1: that is known.  0: this node keeps no attributes, or so many that they
   do not travel, error_r.  -1: failed, error_r. All on the data stack. */
int replay_attributes_compare(struct mailbox *box,
			      const ARRAY_TYPE(dovetail_attribute) *there,
			      ARRAY_TYPE(dovetail_attribute) *differences,
			      const char **error_r);
/* Set or remove these attributes, in their order. Returns 1: done.  0: this node keeps
   none, error_r.  -1: failed, error_r (both data stack). */
int replay_attributes_set(struct mailbox *box,
			  const ARRAY_TYPE(dovetail_attribute) *attributes,
			  const char **error_r);
/* Was a mailbox with this GUID deleted here before? */
bool replay_mailbox_was_deleted(struct replay_user *user,
				const guid_128_t guid);
/* Make the replica of origin's mailbox, or let an empty one of this name become
   it. Returns 1: done.  0: another mailbox stands there.  -1: error_r. */
int replay_mailbox_create(struct replay_user *user, const char *origin,
			  const guid_128_t guid, const char *path,
			  uint32_t uid_validity, uint32_t uid_next,
			  const char **error_r);

/* Transactions that are not queued again. */
#define REPLAY_SAVE_FLAGS \
	(MAILBOX_TRANSACTION_FLAG_EXTERNAL | \
	 MAILBOX_TRANSACTION_FLAG_ASSIGN_UIDS | \
	 MAILBOX_TRANSACTION_FLAG_SYNC | MAILBOX_TRANSACTION_FLAG_NO_NOTIFY)
#define REPLAY_UPDATE_FLAGS \
	(MAILBOX_TRANSACTION_FLAG_SYNC | MAILBOX_TRANSACTION_FLAG_NO_NOTIFY)

/* Save a message of the change as the transaction's next; uid 0: with whatever UID
   the mailbox gives it. Returns 0, or -1 and error_r (data stack). */
int replay_mailbox_save(struct replay_user *user,
			struct mailbox_transaction_context *t,
			const struct dovetail_change_mailbox *change,
			const struct dovetail_op_append *append, uint32_t uid,
			const char **error_r);
/* Save the message whose body input is. save_ctx is freed. */
int replay_save_stream(struct mail_save_context *save_ctx,
		       struct istream *input);
/* The transaction's last message was copied without its data: set its save date,
   which such a copy ignores. */
void replay_copied_save_date(struct mailbox_transaction_context *t,
			     time_t save_date);

enum replay_result
replay_list(struct replay_user *user, const char *origin,
	    const struct dovetail_change_list *change, const char **error_r);
void replay_list_deinit(void);
enum replay_result
replay_tree(struct replay_user *user, const char *origin,
	    const struct dovetail_change_tree *change, const char **error_r);
/* A tree with a number: compare it, make it equal only if the flags say so, and
   answer. What is not _DONE is a repair that failed. */
enum replay_result
replay_tree_verify(struct replay_user *user, const char *origin,
		   const struct dovetail_change_tree *change,
		   const char **error_r);

/* ---- dovetail-replay-compare.c ---- */

/* Goes on with the repairs that a former process did not come to the end of. */
void replay_compare_init(void);
/* A VERIFY of the primary's: answer it, now or when it was found out. */
void replay_verify(struct replay_user *user, const char *origin,
		   const struct dovetail_change_verify *verify);
/* The mailbox may differ from the origin's: find out where, and, with REPAIR, make it
   equal. number: of the VERIFY that is to be answered then, or 0. A mailbox that was
   compared just now is left alone for a while, unless somebody waits. */
void replay_compare_start(const char *user, const char *origin,
			  const guid_128_t guid, const char *path,
			  enum dovetail_verify_flags flags, uint32_t number);
/* An answer to COMPARE, and one to the REQUEST of single messages. */
void replay_compared(struct replay_user *user, const char *origin,
		     const struct dovetail_change_compared *compared);
enum replay_result
replay_compare_messages(struct replay_user *user, const char *origin,
			const struct dovetail_change_mailbox *change,
			const char **error_r);
bool replay_compare_is_running(const char *user, const guid_128_t guid);
/* A change of the mailbox does not fit. TRUE: it is being compared, and cares for
   that. */
bool replay_compare_takes_gap(const char *user, const guid_128_t guid);
/* uids were expunged at the primary: do not put them into the mailbox. */
void replay_compare_expunged(const char *user, const guid_128_t guid,
			     const ARRAY_TYPE(seq_range) *uids);
int replay_send_verified(const char *user,
			 const struct dovetail_change_verified *verified,
			 const char **error_r);
void replay_compare_deinit(void);

/* ---- dovetail-replay-rebuild.c ---- */

/* Save the APPENDs of a MESSAGES change where they wait for replay_rebuild(). Those
   that wait already are skipped. They outlive this process. Returns 0, or -1 and
   error_r (data stack): a body is not here, or cannot be saved. */
int replay_rebuild_add(struct replay_user *user, struct mailbox *box,
		       const struct dovetail_change_mailbox *change,
		       const char **error_r);
/* Remove the messages drop from the mailbox, put those of the waiting messages into
   it whose UIDs are in add, and forget the others that wait. Both may be NULL. What
   changed in the mailbox meanwhile does not matter; but a UID that was added and
   was expunged at the primary since belongs no longer into add.
   Of drop, messages that only this replica has (not those that come with add, with
   their GUID, nor copies of such that stay) are kept, see replay_keep(); with
   dovetail_repair_extra = report they stay where they are, and what should have
   taken their UID does not come.
   uid_next: the primary's, or 0. UIDNEXT goes down to it where messages (and the
   format: not Maildir) allow it.
   The box is not valid afterwards. It costs about as much as Dovecot's own rebuild
   of an index, and who has the mailbox open is disconnected; nothing of that when
   there is nothing to put in.
   Returns how many stay that should not, or -1 and error_r (data stack): the
   mailbox is as it was, but for what was kept and removed of drop; or all is in it
   and only a keyword or a save date of the new messages is not. Call it again
   then. */
int replay_rebuild(struct replay_user *user, struct mailbox *box,
		   const ARRAY_TYPE(seq_range) *drop,
		   const ARRAY_TYPE(seq_range) *add, uint32_t uid_next,
		   const char **error_r);
/* All messages are in the mailbox: do what another process' replay_rebuild() did not
   come to. The box is not valid afterwards. */
void replay_rebuild_finish(struct replay_user *user, struct mailbox *box);
/* Remove a mailbox of waiting messages (see dovetail_name_is_parts()) that an
   interrupted repair left behind. exists: the mailbox they are for is there; a
   repair may be on its way then, and only old ones are removed. */
void replay_rebuild_clean(struct mail_namespace *ns, const char *vname,
			  bool exists);

/* ---- dovetail-replay-keep.c ---- */

/* Copy the messages to the folder where this replica keeps what only it has (see
   dovetail_name_of_kept()), with flags, dates and GUID. The folder is made when
   there is none. What is in it already is not copied again. The caller expunges
   them afterwards.
   Returns 0, or -1 and error_r (data stack): not all are kept. */
int replay_keep(struct mailbox *box, const ARRAY_TYPE(seq_range) *uids,
		const char **error_r);
/* The same with all messages of a mailbox that the caller deletes afterwards, to a
   folder of its name below that one. */
int replay_keep_mailbox(struct mailbox *box, const char **error_r);

/* ---- dovetail-replay-spool.c ---- */

void replay_spool_add(const struct dovetail_change_spool *chunk);
/* The whole body, or NULL when it is not (wholly) here. The stream belongs to
   the spool. */
struct istream *
replay_spool_get(const uint8_t id[DOVETAIL_SPOOL_ID_SIZE], uint64_t size);
void replay_spool_drop(const uint8_t id[DOVETAIL_SPOOL_ID_SIZE]);
void replay_spool_deinit(void);

/* ---- dovetail-replay-file.c ---- */

/* A list of mailboxes that a restart must not forget: STATE_DIR/replay/NAME.SLOT, a
   line "USER TAB ORIGIN TAB GUID TAB PATH" for each (with escapes for tabs in them). */
struct replay_file {
	char *path;
	int fd;
	/* The last write failed, and is logged: the disk is full, for example. */
	bool unsaved;
};

typedef void replay_file_callback_t(const char *user, const char *origin,
				    const guid_128_t guid, const char *path);

/* Opens or creates the file and calls callback for each line; those that were not
   written by us are left out. */
void replay_file_open(struct replay_file *file, const char *name,
		      replay_file_callback_t *callback);
/* Appends a line to str, which will be all of the next replay_file_write(). */
void replay_file_add(string_t *str, const char *user, const char *origin,
		     const guid_128_t guid, const char *path);
void replay_file_write(struct replay_file *file, const string_t *str);
void replay_file_close(struct replay_file *file);

/* ---- dovetail-replay-wanted.c ---- */

void replay_wanted_init(void);
void replay_wanted_deinit(void);
/* The mailbox (all zero: the user's tree and all mailboxes) has to come again
   from origin. Asked for at once if it was not asked for already, and again
   until replay_wanted_arrived(). */
void replay_wanted_add(const char *user, const char *origin,
		       const guid_128_t guid, const char *path,
		       uint32_t uid_next, const char *reason);
/* Entries of origin's log of the shard are missing: the state of all its users
   there has to come. The same until replay_wanted_shard_arrived() with the number
   of the last question. */
void replay_wanted_add_shard(const char *origin, uint8_t shard,
			     const char *reason);
void replay_wanted_shard_arrived(const char *origin, uint8_t shard,
				 uint32_t number);
/* Queue a change of our own. Returns 0, or -1 and error_r (data stack). */
int replay_queue_change(const struct dovetail_change *change,
			const char **error_r);
bool replay_wanted_has(const char *user, const guid_128_t guid);
/* A change up to here came out of the queue while the mailbox was asked for,
   whether it could be applied or not. */
void replay_wanted_passed(const char *user, const guid_128_t guid,
			  const struct dovetail_log_pos *to);
/* A snapshot up to here was applied. If changes had passed that it cannot have,
   the mailbox is asked for once more. */
void replay_wanted_arrived(const char *user, const guid_128_t guid,
			   const struct dovetail_log_pos *to);
/* The mailbox was deleted: it will not come any more. */
void replay_wanted_gone(const char *user, const guid_128_t guid);
/* A snapshot came that is older than what is here. It was on its way already when
   it was asked for, and a newer one follows. TRUE: none did, again and again: so
   the primary's mailbox itself is older, restored from a backup. */
bool replay_wanted_is_past(const char *user, const guid_128_t guid);
/* Mailboxes that are not in the tree will not come any more. */
void replay_wanted_tree_arrived(const char *user,
				const struct dovetail_change_tree *tree);
/* A part of it came: ask for the rest, which begins at uid_next. What brought
   nothing new is asked for again only in time. */
void replay_wanted_came_so_far(const char *user, const guid_128_t guid,
			       uint32_t uid_next);
/* Of the peer origin. */
unsigned int replay_wanted_count(const char *origin);
/* What waits for an answer. origin: of this peer, NULL: of all. Added to counts, and
   appended to list (only what is of a user), unless they are NULL. */
void replay_wanted_troubles(const char *origin,
			    struct dovetail_health_troubles *counts,
			    ARRAY_TYPE(dovetail_health_trouble_of) *list);

/* ---- dovetail-replay-troubles.c ---- */

/* The mailbox differs from the origin's: _DIFFERING when it is about to be repaired,
   _DIVERGED_MAILBOX when that is not done or has failed. text: what is known of it,
   or "". */
void replay_trouble_set(const char *user, const char *origin,
			const guid_128_t guid, const char *path,
			enum dovetail_health_trouble trouble,
			const char *text);
/* It could not be repaired, if it was known to differ. */
void replay_trouble_failed(const char *user, const guid_128_t guid,
			   const char *error);
/* It is equal, or has gone. */
void replay_trouble_clear(const char *user, const guid_128_t guid);
/* Of the peer origin, with what waits for an answer. */
void replay_troubles_count(const char *origin,
			   struct dovetail_health_troubles *counts_r);
/* Append all as DOVETAIL_FRAME_TROUBLES has them. FALSE: there are none, as
   before. buf is not of the data stack. */
bool replay_troubles_put(buffer_t *buf);
/* Append those of origin's users, as dovetail_health_ack_put() does. */
void replay_troubles_ack(buffer_t *buf, const char *origin);
/* To a dovetail-queue that knows nothing yet. */
void replay_troubles_connected(void);
void replay_troubles_deinit(void);

/* ---- dovetail-replay-stream.c ---- */

void replay_streams_init(void);
void replay_streams_deinit(void);
/* Append this worker's status rows, as DOVETAIL_FRAME_REPORT has them; returns how
   many. buf is not of the data stack: it grows in frames of its own. */
unsigned int replay_streams_report(buffer_t *buf);

/* ---- dovetail-replay-control.c ---- */

void replay_control_init(void);
void replay_control_deinit(void);
/* Send frames. */
void replay_control_send(const buffer_t *frames);
/* Something of the status changed: report it soon. */
void replay_control_changed(void);

#endif
