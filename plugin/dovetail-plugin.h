#ifndef DOVETAIL_PLUGIN_H
#define DOVETAIL_PLUGIN_H

/* What the parts of the mail plugin share: its context in each Dovecot object.
   The plugin is capture (dovetail-capture.c), the list's part of it
   (dovetail-capture-list.c), the fence (dovetail-fence.c) and what a rebuilt
   storage needs (dovetail-mdbox.c); dovetail-plugin.c wires them to Dovecot's
   hooks. */

#include "module-context.h"
#include "seq-range-array.h"
#include "mail-storage-private.h"
#include "mail-storage-hooks.h"
#include "dovetail-position.h"
#include "dovetail-queue-client.h"
#include "dovetail-settings.h"

#define DOVETAIL_USER_CONTEXT(obj) \
	MODULE_CONTEXT(obj, dovetail_user_module)
#define DOVETAIL_MAILBOX_CONTEXT(obj) \
	MODULE_CONTEXT(obj, dovetail_mailbox_module)

/* The service that replays: it may write where nobody else may. */
#define DOVETAIL_REPLAY_SERVICE "dovetail-replay"

/* Messages that Dovecot put into a mailbox when it rebuilt the storage. */
struct dovetail_mdbox_found {
	struct mailbox_list *list;
	const char *vname;
	struct seq_range uids;
};

struct dovetail_user {
	union mail_user_module_context module_ctx;
	struct mail_user *user;
	struct event *event;

	struct dovetail_settings set;
	struct dovetail_queue_client *client;

	/* this node is the user's primary: changes are captured */
	bool primary;
	/* this is the replay service: never fenced, and a capture takes the
	   time it needs */
	bool replaying;
	/* something of this user's was not answered with OK: no CLEAN */
	bool unclean;

	/* a storage of the user's was rebuilt in the sync that is running */
	bool mdbox_rebuilt;
	/* only in the replay service */
	ARRAY(struct dovetail_mdbox_found) mdbox_found;
};

/* A message that was copied here, for whoever captures it. */
struct dovetail_copy_hint {
	uint32_t uid;
	guid_128_t src_mailbox_guid;
	/* 0: from a mailbox that does not travel */
	uint32_t src_uid;
};
ARRAY_DEFINE_TYPE(dovetail_copy_hint, struct dovetail_copy_hint);

struct dovetail_mailbox {
	union mailbox_module_context module_ctx;
	struct dovetail_user *duser;

	/* our own second object of a mailbox, or a mailbox that is ours (see
	   dovetail_name_is_parts()): no hook may act on it */
	bool internal;
	/* capture is running on this box: a nested hook must not start again */
	bool capturing;
	/* the current transaction's copies, in order, until it is committed */
	ARRAY_TYPE(dovetail_copy_hint) copied;
	/* then, by UID, until they are captured */
	ARRAY_TYPE(dovetail_copy_hint) hints;

	bool guid_known;
	guid_128_t guid;

	/* Records before this were there before our own commit: somebody else
	   may have queued them, so ask before sending them again. */
	struct dovetail_log_pos seen;
	/* everything before this was handed to the queue by this process ... */
	struct dovetail_log_pos sent;
	/* ... but not all of it answered; sent becomes the mailbox's position
	   when it is. */
	struct dovetail_queue_batch batch;
	bool unconfirmed;
	/* confirmed changes since the position was written */
	unsigned int unwritten;

	/* NULL when the mailbox is not open, or this node not the primary */
	struct dovetail_mailbox_digest *digest;

	/* Dovecot opened this box to rebuild it: whose replica it was before
	   (all zero: nobody's), and what its UIDNEXT was. */
	uint8_t rebuilt_origin[DOVETAIL_ORIGIN_ID_SIZE];
	uint32_t rebuilt_uid_next;
};

extern MODULE_CONTEXT_DEFINE(dovetail_user_module, &mail_user_module_register);
extern MODULE_CONTEXT_DEFINE(dovetail_mailbox_module,
			     &mail_storage_module_register);

/* ---- dovetail-capture.c ---- */

enum dovetail_capture_trigger {
	/* our own transaction was just committed */
	DOVETAIL_CAPTURE_COMMIT,
	/* the mailbox was synced: look what others did */
	DOVETAIL_CAPTURE_SYNC,
};

/* Queue what the mailbox's log has after the queued position. Never fails for
   the caller: what cannot be queued now is marked to be swept. Waits for the
   user's ack level, no longer than the ack timeout.
   One outcome per write: before the commit nothing was queued; after it the
   change is queued, or the queued position stays behind and the next capture of
   this mailbox, by whatever process, finds it. */
void dovetail_capture(struct mailbox *box, enum dovetail_capture_trigger trigger);
/* Fill in the change to be queued behind everything up to the end of view; mailbox has
   its name and so on, and that place as to. The view is the mailbox's
   digest's afterwards (dovetail_mailbox_digest_follow()).
   Returns 1, or 0: there is nothing to say. */
typedef int dovetail_capture_answer_t(struct mailbox *box,
				      struct mail_index_view *view,
				      const struct dovetail_change_mailbox *mailbox,
				      struct dovetail_change *change,
				      void *context);
/* Capture, and queue what answer says at the very same place of the log. Returns 0,
   or -1 and error_r (data stack). */
int dovetail_capture_and_answer(struct mailbox *box,
				dovetail_capture_answer_t *answer,
				void *context, const char **error_r);
/* The box is about to close: settle what is outstanding. */
void dovetail_capture_close(struct mailbox *box);
/* mail was copied to the box of ctx's transaction. */
void dovetail_capture_copied(struct mailbox_transaction_context *t,
			     struct mail *src);
/* The transaction that copied is committed: match the copies with their UIDs. */
void dovetail_capture_copies_saved(struct dovetail_mailbox *dbox,
				   const struct mail_transaction_commit_changes *changes);

/* The mailbox' GUID, read once. Returns 0 or -1. */
int dovetail_mailbox_get_guid(struct mailbox *box, guid_128_t guid_r);
/* Wait for a batch at the user's ack level and note how it went. Returns 1: OK.
   0: outstanding still.  -1: failed. */
int dovetail_capture_wait(struct dovetail_user *duser,
			  struct dovetail_queue_batch *batch,
			  uint64_t deadline);
uint64_t dovetail_capture_deadline(struct dovetail_user *duser);
enum dovetail_ack_level dovetail_capture_level(struct dovetail_user *duser);

/* Looked up by the replay service with module_get_symbol(): answer a replica's
   request. Queue a snapshot of an open mailbox with the messages from uid_next
   on. Returns 0, or -1 and error_r (data stack). */
int dovetail_plugin_capture_snapshot(struct mailbox *box, uint32_t uid_next,
				     const char **error_r);
/* The same: queue these messages, as they are now. */
int dovetail_plugin_capture_messages(struct mailbox *box,
				     const ARRAY_TYPE(seq_range) *uids,
				     const char **error_r);
/* The same: queue the mailbox's digest, computed from its index, for replicas to
   compare. Returns 1: queued; messages_r.  0: messages had to be read first, which
   was begun: call again.  -1: failed, error_r (data stack). */
int dovetail_plugin_verify(struct mailbox *box, uint32_t number,
			   enum dovetail_verify_flags flags,
			   uint32_t *messages_r, const char **error_r);
/* The same: answer a replica that compares. Returns as dovetail_plugin_verify(). */
int dovetail_plugin_compare(struct mailbox *box,
			    const struct dovetail_change_compare *compare,
			    const char **error_r);
/* The same: queue the user's tree, to be made equal. number: NULL, or the replicas
   shall answer, and do what flags say. Each tree that is sent has a number one
   higher than the one before; that of the last, whose answer counts, is left in
   *number. */
int dovetail_plugin_capture_tree(struct mail_user *user, uint32_t *number,
				 enum dovetail_verify_flags flags,
				 const char **error_r);
/* The same: queue the tree and whatever the user's mailboxes have unqueued;
   snapshots: each mailbox whole, for a replica that knows nothing. Returns 0:
   all is queued, or -1 and error_r. */
int dovetail_plugin_sweep(struct mail_user *user, bool snapshots,
			  const char **error_r);
/* The same: bytes of all bodies that this process queued. */
uint64_t dovetail_plugin_bodies_sent(void);
/* The same: the user's role here. Returns FALSE when dovetail is not set up for
   this user. */
bool dovetail_plugin_get_role(struct mail_user *user, const char **primary_r,
			      bool *is_primary_r);

/* ---- dovetail-capture-list.c ---- */

void dovetail_capture_list_mailbox_allocated(struct mailbox *box,
					     struct mailbox_vfuncs *v);

/* ---- dovetail-mdbox.c ---- */

/* The box was opened, and is about to be closed: perhaps Dovecot rebuilds the
   storage. */
void dovetail_mdbox_opened(struct mailbox *box);
void dovetail_mdbox_closing(struct mailbox *box);
/* The replay service synced the box: put right what a rebuild left behind. The
   index may be another one afterwards, as after the rebuild itself: then the box
   has to be closed. */
void dovetail_mdbox_synced(struct mailbox *box);

/* ---- dovetail-fence.c ---- */

/* TRUE: writes by this process to the user's mailboxes are refused here; sets the
   storage's error. */
bool dovetail_fence_refuses(struct mailbox *box);
/* TRUE: the ack level is not reachable and the administrator wants refusal. */
bool dovetail_fence_unprotected(struct mailbox *box);
/* The mail user reads, and the protocol wants to note that with \Seen: on a
   fenced node that is dropped, not refused. */
void dovetail_fence_mail_allocated(struct mail *mail);

#endif
