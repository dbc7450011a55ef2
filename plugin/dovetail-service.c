/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "mkdir-parents.h"
#include "safe-memset.h"
#include "dovetail-settings.h"
#include "dovetail-service.h"

#include <fcntl.h>
#include <unistd.h>
#include <sys/stat.h>

#define PASSWORD_MAX_LEN 1024

char *dovetail_service_read_password(const char *key_dir)
{
	const char *path = t_strconcat(key_dir, "/redis.password", NULL);
	char line[PASSWORD_MAX_LEN + 1], *password;
	struct stat st;
	ssize_t ret;
	int fd;

	fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	if (fd == -1) {
		if (errno == ENOENT)
			return NULL;
		i_fatal("open(%s) failed: %m", path);
	}
	if (fstat(fd, &st) < 0)
		i_fatal("fstat(%s) failed: %m", path);
	if (!S_ISREG(st.st_mode) || (st.st_mode & 077) != 0) {
		i_fatal("%s must be a file that only its owner can read "
			"(chmod 600 %s)", path, path);
	}
	ret = read(fd, line, sizeof(line));
	if (ret < 0)
		i_fatal("read(%s) failed: %m", path);
	i_close_fd(&fd);
	if (ret == (ssize_t)sizeof(line))
		i_fatal("%s: The first line is too long", path);
	line[ret] = '\0';
	line[strcspn(line, "\r\n")] = '\0';
	if (line[0] == '\0')
		i_fatal("%s: The first line is empty, it should be the "
			"password for Redis", path);
	password = i_strdup(line);
	safe_memset(line, 0, sizeof(line));
	return password;
}

struct dovetail_redis_tls *
dovetail_service_tls_init(const struct dovetail_settings *set)
{
	struct dovetail_redis_tls *tls = NULL;
	const char *error;

	if (set->redis.tls &&
	    dovetail_redis_tls_init(set->redis_ca_file, set->redis_cert_file,
				    set->redis_key_file, &tls, &error) < 0)
		i_fatal("%s", error);
	return tls;
}

void dovetail_service_make_dir(const char *path, mode_t mode, uid_t uid,
			       gid_t gid)
{
	struct stat st;
	int fd;

	if (mkdir_parents(path, mode) < 0 && errno != EEXIST)
		i_fatal("mkdir(%s) failed: %m", path);
	fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	if (fd == -1)
		i_fatal("open(%s) failed: %m", path);
	if (fstat(fd, &st) < 0)
		i_fatal("fstat(%s) failed: %m", path);
	if (geteuid() == 0 && st.st_uid != uid && fchown(fd, uid, gid) < 0)
		i_fatal("fchown(%s) failed: %m", path);
	if ((st.st_mode & 07777) != mode && fchmod(fd, mode) < 0)
		i_fatal("fchmod(%s) failed: %m", path);
	i_close_fd(&fd);
}
