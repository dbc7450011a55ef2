#ifndef DOVETAIL_QUEUE_STATE_H
#define DOVETAIL_QUEUE_STATE_H

/* What dovetail-queue keeps in the directory queue of dovetail_state_dir:

     lock           held while the service runs: after a reload the old process
                    finishes before the new one starts
     log.SHARD      the last entry that was (or was about to be) sent to Redis,
                    and the last one that Redis has said to have
     dirty/NAME     this user may have something that is not queued

   log.SHARD is one record, big-endian, written in place before each XADD and
   before anybody is told that it is done:

     offset size
          0    8  "DVTLLOG2"
          8    8  epoch
         16    8  sent: generation
         24    8        seq
         32   32        hash of the entry
         64    8  stored: generation
         72    8          seq
         80   32          hash of the entry
        112   16  BLAKE2b-128 of the bytes before

   Nothing here is synced to disk. If the machine dies, a lost or stale
   record makes the log start a new generation, and a lost mark leaves the
   user to the next open of the mailbox. */

#include "dovetail-seal.h"

struct dovetail_queue_state_file {
	char *path;
	int fd;
};

/* Both are of one epoch. */
struct dovetail_queue_state {
	struct dovetail_chain sent, stored;
};

/* Open or create the file and read its record. A file that is empty or does not
   have a record of ours gives 0-0 twice, and valid_r FALSE.
   Returns 0, or -1 and error_r (data stack). */
int dovetail_queue_state_open(const char *path,
			      struct dovetail_queue_state_file *file_r,
			      struct dovetail_queue_state *state_r,
			      bool *valid_r, const char **error_r);
int dovetail_queue_state_write(struct dovetail_queue_state_file *file,
			       const struct dovetail_queue_state *state,
			       const char **error_r);
void dovetail_queue_state_close(struct dovetail_queue_state_file *file);

/* The file name of a user's mark: bytes other than letters, digits, and @ _ -
   and . inside the name become %XX; a name that gets too long is replaced with
   "%-" and its hash. */
const char *dovetail_queue_mark_name(const char *user);
/* The user of a mark; content is what stands in the file. NULL when it is not
   the mark of any user. */
const char *dovetail_queue_mark_user(const char *name, const char *content);

/* Make, remove a user's mark in dir. Return 0, or -1 and error_r (data stack).
   It is no error if it exists, or does not. */
int dovetail_queue_mark_write(const char *dir, const char *user,
			      const char **error_r);
int dovetail_queue_mark_remove(const char *dir, const char *user,
			       const char **error_r);
/* Call for each user with a mark. Returns 0, or -1 and error_r. */
int dovetail_queue_marks_read(const char *dir,
			      void (*callback)(const char *user, void *context),
			      void *context, const char **error_r);

#endif
