/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "array.h"
#include "str.h"
#include "unlink-directory.h"
#include "dovetail-compat.h"
#include "dovetail-queue-state.h"
#include "test-common.h"

#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

static char dir[] = "/tmp/dovetail-test-XXXXXX";

static void test_chain(void)
{
	struct dovetail_queue_state_file file;
	struct dovetail_queue_state state, read;
	struct dovetail_chain *chain = &state.sent;
	const char *error, *path = t_strconcat(dir, "/log.0", NULL);
	unsigned char byte;
	bool valid;
	off_t pos;
	int fd;

	test_begin("queue state: chain");
	test_assert(dovetail_queue_state_open(path, &file, &read, &valid,
					      &error) == 0);
	test_assert(!valid && read.sent.generation == 0 && read.sent.seq == 0 &&
		    read.stored.generation == 0 && read.stored.seq == 0);
	i_zero(&state);
	chain->epoch = 1;
	chain->generation = 1700000000;
	chain->seq = 0x123456789abcULL;
	memset(chain->hash, 0xab, sizeof(chain->hash));
	test_assert(dovetail_queue_state_write(&file, &state, &error) == 0);
	state.stored = state.sent;
	chain->seq++;
	memset(chain->hash, 0xcd, sizeof(chain->hash));
	test_assert(dovetail_queue_state_write(&file, &state, &error) == 0);
	dovetail_queue_state_close(&file);

	test_assert(dovetail_queue_state_open(path, &file, &read, &valid,
					      &error) == 0);
	test_assert(valid && memcmp(&read, &state, sizeof(read)) == 0);
	dovetail_queue_state_close(&file);

	/* any byte that is wrong makes it invalid */
	fd = open(path, O_RDWR);
	test_assert(fd != -1);
	for (pos = 0; pread(fd, &byte, 1, pos) == 1; pos++) {
		byte ^= 1;
		test_assert_idx(pwrite(fd, &byte, 1, pos) == 1, pos);
		test_assert_idx(dovetail_queue_state_open(path, &file, &read,
			&valid, &error) == 0 && !valid && read.sent.seq == 0, pos);
		dovetail_queue_state_close(&file);
		byte ^= 1;
		test_assert_idx(pwrite(fd, &byte, 1, pos) == 1, pos);
	}
	test_assert(pos == 128);
	/* so does a missing one */
	test_assert(ftruncate(fd, pos - 1) == 0);
	test_assert(dovetail_queue_state_open(path, &file, &read, &valid,
					      &error) == 0 && !valid);
	dovetail_queue_state_close(&file);
	i_close_fd(&fd);

	test_assert(dovetail_queue_state_open("/nonexistent/log.0", &file,
					      &read, &valid, &error) < 0);
	test_assert(strstr(error, "/nonexistent/log.0") != NULL);
	test_end();
}

static void test_mark_names(void)
{
	static const struct {
		const char *user, *name;
	} tests[] = {
		{ "alice", "alice" },
		{ "Al_ice-1@example.org", "Al_ice-1@example.org" },
		{ ".", "%2E" },
		{ "..", "%2E." },
		{ "a/b", "a%2Fb" },
		{ "%41", "%2541" },
		{ "%-x", "%25-x" },
		{ "\xc3\xbc\t", "%C3%BC%09" },
	};
	static const char *const bad[] = {
		".", "..", "", "%", "%2", "%00", "%41", "%2f", "a b", "%zz", "%-", "x/y"
	};
	const char *user, *name;
	unsigned int i;

	test_begin("queue state: names of marks");
	for (i = 0; i < N_ELEMENTS(tests); i++) {
		name = dovetail_queue_mark_name(tests[i].user);
		test_assert_strcmp_idx(name, tests[i].name, i);
		user = dovetail_queue_mark_user(name, "");
		test_assert_strcmp_idx(user, tests[i].user, i);
	}
	for (i = 0; i < N_ELEMENTS(bad); i++) {
		test_assert_idx(dovetail_queue_mark_user(bad[i], "") == NULL,
				i);
	}
	/* as long as it goes, and one more */
	for (i = 199; i <= 202; i++) {
		string_t *str = t_str_new(256);

		while (str_len(str) < i)
			str_append_c(str, 'x');
		name = dovetail_queue_mark_name(str_c(str));
		if (i <= 200)
			test_assert_strcmp_idx(name, str_c(str), i);
		else {
			test_assert_idx(str_begins_with(name, "%-") &&
					strlen(name) == 34, i);
			test_assert_idx(dovetail_queue_mark_user(name,
				"somebody else") == NULL, i);
		}
		user = dovetail_queue_mark_user(name, str_c(str));
		test_assert_strcmp_idx(user, str_c(str), i);
	}
	test_end();
}

static void count_mark(const char *user, void *context)
{
	string_t *users = context;

	str_printfa(users, "%u,", (unsigned int)strlen(user));
}

static void test_marks(void)
{
	string_t *users = t_str_new(64);
	char long_name[300];
	const char *error;
	int fd;

	test_begin("queue state: marks");
	memset(long_name, 'y', sizeof(long_name));
	long_name[sizeof(long_name) - 1] = '\0';
	test_assert(dovetail_queue_mark_write(dir, long_name, &error) == 0);
	test_assert(dovetail_queue_mark_write(dir, long_name, &error) == 0);
	/* what is no mark is left alone */
	fd = creat(t_strconcat(dir, "/some file", NULL), 0600);
	test_assert(fd != -1);
	i_close_fd(&fd);
	i_unlink(t_strconcat(dir, "/log.0", NULL));
	test_assert(dovetail_queue_marks_read(dir, count_mark, users,
					      &error) == 0);
	test_assert_strcmp(str_c(users), "299,");
	test_assert(dovetail_queue_mark_remove(dir, long_name, &error) == 0);
	test_assert(dovetail_queue_mark_remove(dir, long_name, &error) == 0);
	str_truncate(users, 0);
	test_assert(dovetail_queue_mark_write(dir, "al/ice", &error) == 0);
	test_assert(dovetail_queue_marks_read(dir, count_mark, users,
					      &error) == 0);
	test_assert_strcmp(str_c(users), "6,");

	test_assert(dovetail_queue_mark_write("/nonexistent", "u", &error) < 0);
	test_assert(strstr(error, "/nonexistent/u") != NULL);
	test_assert(dovetail_queue_marks_read("/nonexistent", count_mark,
					      users, &error) < 0);
	test_assert(unlink_directory(dir, UNLINK_DIRECTORY_FLAG_RMDIR,
				     &error) >= 0);
	test_end();
}

int main(void)
{
	static void (*const test_functions[])(void) = {
		test_chain,
		test_mark_names,
		test_marks,
		NULL
	};

	if (sodium_init() < 0 || mkdtemp(dir) == NULL)
		return 1;
	return test_run(test_functions);
}
