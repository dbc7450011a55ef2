/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "byteorder.h"
#include "hex-binary.h"
#include "str.h"
#include "dovetail-compat.h"
#include "dovetail-queue-state.h"

#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <unistd.h>

#define STATE_MAGIC "DVTLLOG2"
#define STATE_MAGIC_SIZE 8
#define STATE_ID_SIZE (2 * 8 + DOVETAIL_HASH_SIZE)
#define STATE_SUM_SIZE 16
#define STATE_SIZE (STATE_MAGIC_SIZE + 8 + 2 * STATE_ID_SIZE + STATE_SUM_SIZE)

/* file systems allow 255 bytes */
#define MARK_NAME_MAX_LEN 200
#define MARK_HASH_SIZE 16
#define MARK_USER_MAX_LEN 4096

/* ---- the chain ---- */

static void state_put_chain(const struct dovetail_chain *chain,
			    unsigned char data[STATE_ID_SIZE])
{
	cpu64_to_be_unaligned(chain->generation, data);
	cpu64_to_be_unaligned(chain->seq, data + 8);
	memcpy(data + 16, chain->hash, DOVETAIL_HASH_SIZE);
}

static void state_get_chain(const unsigned char data[STATE_ID_SIZE],
			    uint64_t epoch, struct dovetail_chain *chain_r)
{
	chain_r->epoch = epoch;
	chain_r->generation = be64_to_cpu_unaligned(data);
	chain_r->seq = be64_to_cpu_unaligned(data + 8);
	memcpy(chain_r->hash, data + 16, DOVETAIL_HASH_SIZE);
}

static void state_encode(const struct dovetail_queue_state *state,
			 unsigned char data[STATE_SIZE])
{
	unsigned char *p = data;

	memcpy(p, STATE_MAGIC, STATE_MAGIC_SIZE);
	p += STATE_MAGIC_SIZE;
	cpu64_to_be_unaligned(state->sent.epoch, p);
	p += 8;
	state_put_chain(&state->sent, p);
	p += STATE_ID_SIZE;
	state_put_chain(&state->stored, p);
	p += STATE_ID_SIZE;
	crypto_generichash(p, STATE_SUM_SIZE, data, p - data, NULL, 0);
}

static bool state_decode(const unsigned char data[STATE_SIZE],
			 struct dovetail_queue_state *state_r)
{
	unsigned char check[STATE_SIZE];
	const unsigned char *p = data + STATE_MAGIC_SIZE;
	uint64_t epoch = be64_to_cpu_unaligned(p);

	p += 8;
	state_get_chain(p, epoch, &state_r->sent);
	state_get_chain(p + STATE_ID_SIZE, epoch, &state_r->stored);
	state_encode(state_r, check);
	return memcmp(check, data, STATE_SIZE) == 0;
}

int dovetail_queue_state_open(const char *path,
			      struct dovetail_queue_state_file *file_r,
			      struct dovetail_queue_state *state_r,
			      bool *valid_r, const char **error_r)
{
	unsigned char data[STATE_SIZE];
	ssize_t ret;
	int fd;

	*valid_r = FALSE;
	fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (fd == -1) {
		*error_r = t_strdup_printf("open(%s) failed: %m", path);
		return -1;
	}
	ret = pread(fd, data, sizeof(data), 0);
	if (ret < 0) {
		*error_r = t_strdup_printf("pread(%s) failed: %m", path);
		i_close_fd(&fd);
		return -1;
	}
	if (ret == (ssize_t)sizeof(data) && state_decode(data, state_r))
		*valid_r = TRUE;
	else
		i_zero(state_r);
	file_r->path = i_strdup(path);
	file_r->fd = fd;
	return 0;
}

int dovetail_queue_state_write(struct dovetail_queue_state_file *file,
			       const struct dovetail_queue_state *state,
			       const char **error_r)
{
	unsigned char data[STATE_SIZE];
	ssize_t ret;

	state_encode(state, data);
	ret = pwrite(file->fd, data, sizeof(data), 0);
	if (ret == (ssize_t)sizeof(data))
		return 0;
	if (ret >= 0)
		errno = ENOSPC;
	*error_r = t_strdup_printf("pwrite(%s) failed: %m", file->path);
	return -1;
}

void dovetail_queue_state_close(struct dovetail_queue_state_file *file)
{
	if (file->path == NULL)
		return;
	i_close_fd(&file->fd);
	i_free(file->path);
}

/* ---- marks ---- */

static bool mark_char_is_plain(char c)
{
	return i_isalnum(c) || c == '@' || c == '_' || c == '-' || c == '.';
}

const char *dovetail_queue_mark_name(const char *user)
{
	unsigned char hash[MARK_HASH_SIZE];
	string_t *name = t_str_new(64);
	const char *p;

	for (p = user; *p != '\0' && str_len(name) <= MARK_NAME_MAX_LEN; p++) {
		if (mark_char_is_plain(*p) && (*p != '.' || p != user))
			str_append_c(name, *p);
		else
			str_printfa(name, "%%%02X", (unsigned char)*p);
	}
	if (str_len(name) <= MARK_NAME_MAX_LEN)
		return str_c(name);

	crypto_generichash(hash, sizeof(hash), (const unsigned char *)user,
			   strlen(user), NULL, 0);
	return t_strconcat("%-", binary_to_hex(hash, sizeof(hash)), NULL);
}

static const char *mark_name_decode(const char *name)
{
	string_t *user = t_str_new(64);
	unsigned char c;

	for (; *name != '\0'; name++) {
		if (*name != '%') {
			str_append_c(user, *name);
			continue;
		}
		buffer_t buf;
		buffer_create_from_data(&buf, &c, 1);
		if (name[1] == '\0' || name[2] == '\0' ||
		    hex_to_binary(t_strndup(name + 1, 2), &buf) < 0 ||
		    c == '\0')
			return NULL;
		str_append_c(user, c);
		name += 2;
	}
	return str_c(user);
}

const char *dovetail_queue_mark_user(const char *name, const char *content)
{
	const char *user;

	user = str_begins_with(name, "%-") ? content : mark_name_decode(name);
	/* nothing but the very name that we would give */
	if (user == NULL || *user == '\0' ||
	    strcmp(dovetail_queue_mark_name(user), name) != 0)
		return NULL;
	return user;
}

int dovetail_queue_mark_write(const char *dir, const char *user,
			      const char **error_r)
{
	const char *name = dovetail_queue_mark_name(user);
	const char *path = t_strconcat(dir, "/", name, NULL);
	size_t len = str_begins_with(name, "%-") ? strlen(user) : 0;
	int fd;

	fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (fd == -1) {
		*error_r = t_strdup_printf("open(%s) failed: %m", path);
		return -1;
	}
	if (len > 0 && write(fd, user, len) != (ssize_t)len) {
		*error_r = t_strdup_printf("write(%s) failed: %m", path);
		i_close_fd(&fd);
		return -1;
	}
	i_close_fd(&fd);
	return 0;
}

int dovetail_queue_mark_remove(const char *dir, const char *user,
			       const char **error_r)
{
	const char *path =
		t_strconcat(dir, "/", dovetail_queue_mark_name(user), NULL);

	if (unlink(path) < 0 && errno != ENOENT) {
		*error_r = t_strdup_printf("unlink(%s) failed: %m", path);
		return -1;
	}
	return 0;
}

/* "" when there is none */
static const char *mark_read_content(const char *dir, const char *name)
{
	char content[MARK_USER_MAX_LEN];
	ssize_t ret;
	int fd;

	fd = open(t_strconcat(dir, "/", name, NULL),
		  O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
	if (fd == -1)
		return "";
	ret = read(fd, content, sizeof(content));
	i_close_fd(&fd);
	return ret <= 0 ? "" : t_strndup(content, ret);
}

int dovetail_queue_marks_read(const char *dir,
			      void (*callback)(const char *user, void *context),
			      void *context, const char **error_r)
{
	const struct dirent *d;
	DIR *dirp;
	int ret = 0;

	dirp = opendir(dir);
	if (dirp == NULL) {
		*error_r = t_strdup_printf("opendir(%s) failed: %m", dir);
		return -1;
	}
	while (errno = 0, (d = readdir(dirp)) != NULL) T_BEGIN {
		const char *user, *content = "";

		if (str_begins_with(d->d_name, "%-"))
			content = mark_read_content(dir, d->d_name);
		user = dovetail_queue_mark_user(d->d_name, content);
		if (user != NULL)
			callback(user, context);
	} T_END;
	if (errno != 0) {
		*error_r = t_strdup_printf("readdir(%s) failed: %m", dir);
		ret = -1;
	}
	(void)closedir(dirp);
	return ret;
}
