/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "fuzz-common.h"
#include "array.h"
#include "failures.h"
#include "ioloop.h"
#include "str.h"
#include "unlink-directory.h"
#include "write-full.h"
#include "dovetail-keyring.h"
#include "dovetail-wire.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include <sys/stat.h>

const char *fuzz_dir;

void fuzz_failed(const char *what, const char *file, int line)
{
	fprintf(stderr, "%s:%d: does not hold: %s\n", file, line, what);
	abort();
}

/* ---- life ---- */

static void ATTR_FORMAT(2, 0)
no_log(const struct failure_context *ctx ATTR_UNUSED, const char *format,
       va_list args)
{
	/* what is logged is formatted, as it would be */
	T_BEGIN {
		(void)t_strdup_vprintf(format, args);
	} T_END;
}

static void remove_dir(void)
{
	const char *error;

	(void)unlink_directory(fuzz_dir, UNLINK_DIRECTORY_FLAG_RMDIR, &error);
}

int LLVMFuzzerInitialize(int *argc ATTR_UNUSED, char ***argv ATTR_UNUSED)
{
	const char *tmp = getenv("TMPDIR");
	static char *dir;

	lib_init();
	fuzz_assert(sodium_init() >= 0);
	i_set_info_handler(no_log);
	i_set_debug_handler(no_log);
	i_set_error_handler(no_log);
	/* as Dovecot does in all its processes */
	(void)signal(SIGPIPE, SIG_IGN);

	dir = i_strdup_printf("%s/dovetail-fuzz.XXXXXX",
			      tmp == NULL ? "/tmp" : tmp);
	fuzz_assert(mkdtemp(dir) != NULL);
	fuzz_dir = dir;
	atexit(remove_dir);
	T_BEGIN {
		fuzz_init();
	} T_END;
	return 0;
}

pool_t fuzz_pool(void)
{
	return pool_allocfree_create("fuzz");
}

/* ---- the input ---- */

const uint8_t *fuzz_get_bytes(struct fuzz_input *in, size_t size,
			      size_t *size_r)
{
	const uint8_t *data = in->data;

	*size_r = I_MIN(size, in->size);
	in->data += *size_r;
	in->size -= *size_r;
	return data;
}

static uint64_t get_num(struct fuzz_input *in, size_t bytes)
{
	uint64_t num = 0;
	const uint8_t *data;
	size_t i, size;

	data = fuzz_get_bytes(in, bytes, &size);
	for (i = 0; i < size; i++)
		num = num << 8 | data[i];
	return num;
}

uint8_t fuzz_get_u8(struct fuzz_input *in)
{
	return get_num(in, 1);
}

uint16_t fuzz_get_u16(struct fuzz_input *in)
{
	return get_num(in, 2);
}

uint64_t fuzz_get_u64(struct fuzz_input *in)
{
	return get_num(in, 8);
}

const uint8_t *fuzz_get_block(struct fuzz_input *in, size_t *size_r)
{
	size_t size = fuzz_get_u16(in);

	return fuzz_get_bytes(in, size, size_r);
}

const char *fuzz_get_str(struct fuzz_input *in)
{
	const uint8_t *data;
	size_t size;

	data = fuzz_get_block(in, &size);
	return size == 0 ? "" : t_strndup(data, size);
}

/* ---- files ---- */

const char *fuzz_path(const char *name)
{
	return t_strconcat(fuzz_dir, "/", name, NULL);
}

void fuzz_write_file(const char *path, int mode, const void *data, size_t size)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, mode);

	fuzz_assert(fd != -1);
	fuzz_assert(size == 0 || write_full(fd, data, size) == 0);
	i_close_fd(&fd);
}

void fuzz_remove_files(const char *path)
{
	const struct dirent *d;
	DIR *dir = opendir(path);

	fuzz_assert(dir != NULL);
	while ((d = readdir(dir)) != NULL) {
		if (d->d_type != DT_DIR)
			(void)unlinkat(dirfd(dir), d->d_name, 0);
	}
	(void)closedir(dir);
}

/* Lines are "FILE: LINE". */
void fuzz_write_keys(void)
{
	FILE *in, *out;
	char line[256], *text;

	fuzz_assert(mkdir(fuzz_path("keys"), 0700) == 0);
	in = fopen(FUZZ_VECTORS"/keys.txt", "r");
	fuzz_assert(in != NULL);
	while (fgets(line, sizeof(line), in) != NULL) {
		if (line[0] == '#' || (text = strstr(line, ": ")) == NULL)
			continue;
		*text = '\0';
		out = fopen(t_strconcat(fuzz_path("keys/"), line, NULL), "a");
		fuzz_assert(out != NULL && fputs(text + 2, out) >= 0 &&
			    fchmod(fileno(out), 0600) == 0);
		fclose(out);
	}
	fclose(in);
}

struct dovetail_keyring *
fuzz_keyring(const char *node, const char *const *peers)
{
	struct dovetail_keyring *keyring;
	const char *error;

	if (dovetail_keyring_open(fuzz_path("keys"), node, peers, &keyring,
				  &error) < 0)
		i_panic("%s", error);
	return keyring;
}

/* ---- the ioloop ---- */

void fuzz_run_ioloop(void)
{
	/* due now: the loop does not wait */
	struct timeout *to = timeout_add_short(0, io_loop_stop_delayed,
					       current_ioloop);

	io_loop_run(current_ioloop);
	timeout_remove(&to);
}

/* ---- changes ---- */

bool fuzz_change(const void *data, size_t size)
{
	struct dovetail_change change, head;
	const char *error = NULL;
	buffer_t *buf;
	pool_t pool;
	bool ok, head_ok;

	pool = fuzz_pool();
	ok = dovetail_change_decode(pool, data, size, &change, &error) == 0;
	fuzz_assert(ok || (error != NULL && *error != '\0'));
	if (ok) {
		buf = buffer_create_dynamic(pool, size + 1);
		dovetail_change_encode(buf, &change);
		fuzz_assert(buf->used == size &&
			    memcmp(buf->data, data, size) == 0);
	}

	error = NULL;
	head_ok = dovetail_change_decode_head(pool, data, size, &head,
					      &error) == 0;
	fuzz_assert(head_ok || (error != NULL && *error != '\0'));
	if (ok) {
		/* the queue takes what the replica will understand */
		fuzz_assert(head_ok && head.kind == change.kind &&
			    strcmp(head.user, change.user) == 0);
	} else if (head_ok)
		fuzz_assert(head.kind == DOVETAIL_CHANGE_MAILBOX);
	pool_unref(&pool);
	return ok;
}
