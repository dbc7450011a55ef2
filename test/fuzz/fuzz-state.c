/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* What the queue service and a mailbox' index keep: the service may have died
   while it wrote, and a backup may bring back anything.
   Input: u8 which of them, then:
     0 log.SHARD   the file
     1 altered     u64 epoch, then what was sent and what is stored: u64
                   generation, seq, 32 bytes hash; u16 where, u8 with what
     2 marks       blocks: a file's name, its content
     3 users       blocks: names of users
     4 position    u8 size of what stands in the extension's header, those bytes,
                   then 6 numbers of 4 bytes
   Must hold: a log file that is accepted is the one that would be written for it,
   an altered one is refused; each user has a mark of its own, which leads back to
   it, and no mark leads to a user who would have another; a position is the
   bytes of the header, or none. */

#include "fuzz-common.h"
#include "ioloop.h"
#include "mail-index-private.h"
#include "mail-storage-private.h"
#include "dovetail-position.h"
#include "dovetail-queue-state.h"

#include <fcntl.h>
#include <unistd.h>
#include <sys/stat.h>

#define LOG_SIZE 128
#define FILES_MAX 16

void fuzz_init(void)
{
	fuzz_assert(mkdir(fuzz_path("marks"), 0700) == 0);
	/* an index in memory takes its id from it */
	ioloop_time = time(NULL);
}

/* ---- log.SHARD ---- */

static size_t file_read(const char *path, void *data, size_t size)
{
	int fd = open(path, O_RDONLY);
	ssize_t ret;

	fuzz_assert(fd != -1);
	ret = read(fd, data, size);
	fuzz_assert(ret >= 0);
	i_close_fd(&fd);
	return ret;
}

/* Returns TRUE when it was accepted. */
static bool log_file(const void *data, size_t size)
{
	const char *error, *path = fuzz_path("log.0");
	struct dovetail_queue_state_file file;
	unsigned char written[LOG_SIZE + 1];
	struct dovetail_queue_state state, zero;
	bool valid;

	fuzz_write_file(path, 0600, data, size);
	fuzz_assert(dovetail_queue_state_open(path, &file, &state, &valid,
					      &error) == 0);
	if (valid) {
		fuzz_assert(dovetail_queue_state_write(&file, &state,
						       &error) == 0);
		fuzz_assert(file_read(path, written, sizeof(written)) >=
			    LOG_SIZE && size >= LOG_SIZE);
		fuzz_assert(memcmp(written, data, LOG_SIZE) == 0);
	} else {
		i_zero(&zero);
		fuzz_assert(memcmp(&state, &zero, sizeof(state)) == 0);
	}
	dovetail_queue_state_close(&file);
	return valid;
}

static void get_chain(struct fuzz_input *in, struct dovetail_chain *chain_r)
{
	const uint8_t *hash;
	size_t size;

	chain_r->generation = fuzz_get_u64(in);
	chain_r->seq = fuzz_get_u64(in);
	hash = fuzz_get_bytes(in, sizeof(chain_r->hash), &size);
	if (size > 0)
		memcpy(chain_r->hash, hash, size);
}

static void log_altered(struct fuzz_input *in)
{
	const char *error, *path = fuzz_path("log.1");
	struct dovetail_queue_state_file file;
	struct dovetail_queue_state state, old;
	unsigned char data[LOG_SIZE];
	size_t where;
	uint8_t with;
	bool valid;

	i_zero(&state);
	state.sent.epoch = state.stored.epoch = fuzz_get_u64(in);
	get_chain(in, &state.sent);
	get_chain(in, &state.stored);
	where = fuzz_get_u16(in) % LOG_SIZE;
	with = fuzz_get_u8(in);

	fuzz_assert(dovetail_queue_state_open(path, &file, &old, &valid,
					      &error) == 0);
	fuzz_assert(dovetail_queue_state_write(&file, &state, &error) == 0);
	dovetail_queue_state_close(&file);
	fuzz_assert(dovetail_queue_state_open(path, &file, &old, &valid,
					      &error) == 0);
	fuzz_assert(valid && memcmp(&old, &state, sizeof(state)) == 0);
	dovetail_queue_state_close(&file);

	fuzz_assert(file_read(path, data, sizeof(data)) == LOG_SIZE);
	data[where] ^= with;
	fuzz_assert(log_file(data, sizeof(data)) == (with == 0));
}

/* ---- marks ---- */

static void mark_user(const char *user, void *context)
{
	unsigned int *count = context;

	fuzz_assert(*user != '\0');
	fuzz_assert(access(t_strconcat(fuzz_path("marks/"),
		dovetail_queue_mark_name(user), NULL), F_OK) == 0);
	*count += 1;
}

static void marks(struct fuzz_input *in)
{
	const char *error, *paths[FILES_MAX], *name;
	unsigned int i, n = 0, count = 0;
	const uint8_t *content;
	size_t size;

	while (in->size > 0 && n < FILES_MAX) {
		name = fuzz_get_str(in);
		content = fuzz_get_block(in, &size);
		if (*name == '\0' || strchr(name, '/') != NULL ||
		    strlen(name) > 255 || strcmp(name, ".") == 0 ||
		    strcmp(name, "..") == 0)
			continue;
		paths[n] = t_strconcat(fuzz_path("marks/"), name, NULL);
		fuzz_write_file(paths[n++], 0600, content, size);
	}
	fuzz_assert(dovetail_queue_marks_read(fuzz_path("marks"), mark_user,
					      &count, &error) == 0);
	fuzz_assert(count <= n);
	for (i = 0; i < n; i++)
		(void)unlink(paths[i]);
}

static void users(struct fuzz_input *in)
{
	const char *error, *user, *name, *back, *last = NULL;
	unsigned int count;

	while (in->size > 0) {
		user = fuzz_get_str(in);
		if (*user == '\0')
			continue;
		name = dovetail_queue_mark_name(user);
		fuzz_assert(strlen(name) <= 255 && *name != '.' &&
			    strchr(name, '/') == NULL);
		back = dovetail_queue_mark_user(name, user);
		fuzz_assert(back != NULL && strcmp(back, user) == 0);
		if (last != NULL && strcmp(last, user) != 0) {
			fuzz_assert(strcmp(dovetail_queue_mark_name(last),
					   name) != 0);
		}
		last = user;

		count = 0;
		fuzz_assert(dovetail_queue_mark_write(fuzz_path("marks"), user,
						      &error) == 0);
		fuzz_assert(dovetail_queue_marks_read(fuzz_path("marks"),
			mark_user, &count, &error) == 0);
		/* of a name that the service does not take, it need not find
		   the whole */
		fuzz_assert(count == 1 || strlen(user) > 1024);
		fuzz_assert(dovetail_queue_mark_remove(fuzz_path("marks"),
						       user, &error) == 0);
	}
}

/* ---- a position ---- */

static void position(struct fuzz_input *in)
{
	struct mail_index_transaction *trans;
	struct dovetail_position pos, zero;
	struct dovetail_log_pos applied;
	struct mail_index_view *view;
	struct mail_index *index;
	const uint8_t *data;
	uint8_t origin[DOVETAIL_ORIGIN_ID_SIZE];
	size_t size;
	uint32_t ext_id, nums[8];
	bool found;

	/* in memory */
	index = mail_index_alloc(NULL, NULL, "fuzz");
	fuzz_assert(mail_index_open_or_create(index, 0) >= 0);
	data = fuzz_get_bytes(in, fuzz_get_u8(in), &size);

	/* as an earlier or a later version may have written it */
	ext_id = mail_index_ext_register(index, "dovetail", size, 0, 0);
	view = mail_index_view_open(index);
	trans = mail_index_transaction_begin(view,
		MAIL_INDEX_TRANSACTION_FLAG_EXTERNAL);
	if (size > 0)
		mail_index_update_header_ext(trans, ext_id, 0, data, size);
	fuzz_assert(mail_index_transaction_commit(&trans) == 0);
	mail_index_view_close(&view);

	fuzz_assert(mail_index_refresh(index) == 0);
	view = mail_index_view_open(index);
	found = dovetail_position_get_view(index, view, &pos);
	fuzz_assert(found == (size >= sizeof(nums)));
	if (found) {
		memcpy(nums, data, sizeof(nums));
		fuzz_assert(memcmp(&pos, nums, sizeof(nums)) == 0);
	} else {
		i_zero(&zero);
		fuzz_assert(memcmp(&pos, &zero, sizeof(pos)) == 0);
	}

	/* what we write is what we read, and what was queued does not count
	   any more */
	applied.index_id = fuzz_get_u64(in);
	applied.file_seq = fuzz_get_u64(in);
	applied.file_offset = fuzz_get_u64(in);
	dovetail_origin_id("a", origin);
	trans = mail_index_transaction_begin(view,
		MAIL_INDEX_TRANSACTION_FLAG_EXTERNAL);
	dovetail_position_update_applied(index, trans, &applied, origin);
	fuzz_assert(mail_index_transaction_commit(&trans) == 0);
	mail_index_view_close(&view);
	fuzz_assert(mail_index_refresh(index) == 0);
	view = mail_index_view_open(index);
	i_zero(&zero);
	fuzz_assert(dovetail_position_get_view(index, view, &pos));
	fuzz_assert(memcmp(&pos.applied, &applied, sizeof(applied)) == 0);
	fuzz_assert(memcmp(pos.origin, origin, sizeof(origin)) == 0);
	fuzz_assert(memcmp(&pos.queued, &zero.queued,
			   sizeof(pos.queued)) == 0);
	mail_index_view_close(&view);
	mail_index_close(index);
	mail_index_free(&index);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct fuzz_input in = { data, size };

	if (size == 0)
		return 0;
	T_BEGIN {
		switch (fuzz_get_u8(&in) % 5) {
		case 0:
			(void)log_file(in.data, in.size);
			break;
		case 1:
			log_altered(&in);
			break;
		case 2:
			marks(&in);
			break;
		case 3:
			users(&in);
			break;
		case 4:
			position(&in);
			break;
		}
	} T_END;
	return 0;
}
