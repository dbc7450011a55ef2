/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* Preloaded into all processes of a Dovecot by the program "crash". Counts the
   steps of our processes that somebody else can see, and kills at one of them.

   A step is a call that worked: of the write family on a file below the node's
   directory, or on a socket that is TCP, dovetail-queue's or Redis'; and what
   makes, links, names, cuts, syncs or removes such a file. Between two steps a
   process changes nothing but its own memory, so "killed after step k" for each k,
   and before the first one, are all the crashes there are.

   DOVETAIL_CRASH names a file with a struct control, shared with the program,
   DOVETAIL_CRASH_DIR the node's directory. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdbool.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

/* crash has the same numbers */
#define SERVICES 5
#define PIDS 32768
#define TRACE_SIZE (256 * 1024)
/* Dovecot's: what a process writes here makes the master take it for alive */
#define MASTER_STATUS_FD 5

enum mode {
	MODE_COUNT = 0,
	/* the process that does the step */
	MODE_SELF = 1,
	/* every process of its Dovecot */
	MODE_NODE = 2,
	/* write a half of what a file would get, then as SELF */
	MODE_TORN = 3,
};

struct control {
	/* written by the program */
	_Atomic uint32_t mode;
	_Atomic uint32_t service;
	_Atomic uint32_t k;
	/* dovetail-queue waits so long before it reads from a socket */
	_Atomic uint32_t queue_delay_msecs;
	/* and by the processes */
	_Atomic uint32_t hit;
	_Atomic uint32_t steps[SERVICES];
	/* of processes that Dovecot's master has heard of, by pid % PIDS */
	_Atomic uint32_t heard[PIDS];
	/* and which of the services all processes are, or SERVICES */
	_Atomic uint32_t service_of[PIDS];
	/* a line per step */
	_Atomic uint32_t trace_used;
	char trace[TRACE_SIZE];
};

static const char *const services[SERVICES] = {
	"imap", "lmtp", "doveadm", "dovetail-queue", "dovetail-replay"
};

static struct control *control;
static int service = -1;
static char dir[PATH_MAX];
static size_t dir_len;

static void *next(const char *name)
{
	return dlsym(RTLD_NEXT, name);
}

__attribute__((constructor)) static void steps_init(void)
{
	const char *path = getenv("DOVETAIL_CRASH"), *base, *p;
	char exe[PATH_MAX];
	ssize_t len;
	int fd, i;

	base = getenv("DOVETAIL_CRASH_DIR");
	if (path == NULL || base == NULL ||
	    (fd = open(path, O_RDWR | O_CLOEXEC)) == -1)
		return;
	control = mmap(NULL, sizeof(*control), PROT_READ | PROT_WRITE,
		       MAP_SHARED, fd, 0);
	close(fd);
	if (control == MAP_FAILED) {
		control = NULL;
		return;
	}
	dir_len = strlen(base);
	memcpy(dir, base, dir_len + 1);
	len = readlink("/proc/self/exe", exe, sizeof(exe) - 1);
	exe[len < 0 ? 0 : len] = '\0';
	p = strrchr(exe, '/');
	for (i = 0; i < SERVICES && p != NULL; i++) {
		if (strcmp(p + 1, services[i]) == 0)
			service = i;
	}
	control->heard[getpid() % PIDS] = 0;
	control->service_of[getpid() % PIDS] = service < 0 ? SERVICES : service;
}

static bool path_matters(const char *path)
{
	size_t len = strlen(path);

	/* A lock file that is left behind makes Dovecot wait for up to some
	   minutes, which says nothing about us. */
	if (len > 4 && strcmp(path + len - 4, "lock") == 0)
		return false;
	/* not the node's own log and sockets */
	return strncmp(path, dir, dir_len) == 0 && path[dir_len] == '/' &&
		(strncmp(path + dir_len, "/mail/", 6) == 0 ||
		 strncmp(path + dir_len, "/state/", 7) == 0);
}

/* A socket's other end or, where that has no name, its own. */
static bool socket_matters(int fd, char *name, size_t size)
{
	union {
		struct sockaddr sa;
		struct sockaddr_un un;
		struct sockaddr_storage storage;
	} addr;
	socklen_t len;
	unsigned int i;

	for (i = 0; i < 2; i++) {
		memset(&addr, 0, sizeof(addr));
		len = sizeof(addr);
		if ((i == 0 ? getpeername(fd, &addr.sa, &len) :
		     getsockname(fd, &addr.sa, &len)) < 0)
			return false;
		if (addr.sa.sa_family == AF_INET ||
		    addr.sa.sa_family == AF_INET6) {
			snprintf(name, size, "client");
			return true;
		}
		if (addr.sa.sa_family != AF_UNIX)
			return false;
		if (addr.un.sun_path[0] != '\0') {
			snprintf(name, size, "%s", addr.un.sun_path);
			return strstr(name, "/dovetail-queue") != NULL ||
				strstr(name, "/redis") != NULL;
		}
	}
	return false;
}

/* Is it one of those that count? name gets what it is. */
static bool fd_matters(int fd, char *name, size_t size, bool *is_file)
{
	char link[64];
	struct stat st;
	ssize_t len;
	int saved_errno = errno;
	bool matters = false;

	*is_file = false;
	if (fstat(fd, &st) == 0 && S_ISSOCK(st.st_mode))
		matters = socket_matters(fd, name, size);
	else if (fd > 2) {
		snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
		len = readlink(link, name, size - 1);
		if (len > 0) {
			name[len] = '\0';
			matters = *is_file = path_matters(name);
		}
	}
	errno = saved_errno;
	return matters;
}

static void trace(const char *call, const char *what)
{
	char line[PATH_MAX + 100];
	uint32_t used;
	int len;

	if (strncmp(what, dir, dir_len) == 0)
		what += dir_len;
	len = snprintf(line, sizeof(line), "%s[%d] %s %s\n", services[service],
		       (int)getpid(), call, what);
	used = atomic_fetch_add(&control->trace_used, (uint32_t)len);
	if (used + len < TRACE_SIZE)
		memcpy(control->trace + used, line, len);
}

static void stand_still(void)
{
	for (;;)
		pause();
}

static void die(void)
{
	control->hit = getpid();
	/* the program kills all, also those that this process may not kill */
	if (control->mode == MODE_NODE)
		stand_still();
	kill(getpid(), SIGKILL);
	stand_still();
}

static bool is_target(void)
{
	return service >= 0 && control->mode != MODE_COUNT &&
		control->hit == 0 && (uint32_t)service == control->service;
}

/* Before a step that matters. */
static void step_begin(void)
{
	/* nobody does anything more */
	if (control->mode == MODE_NODE && control->hit != 0)
		stand_still();
	if (is_target() && control->k == 0)
		die();
}

static bool step_is_torn(size_t size)
{
	return is_target() && control->mode == MODE_TORN && size > 1 &&
		control->steps[service] + 1 == control->k;
}

/* Behind it. */
static void step_end(const char *call, const char *what)
{
	int saved_errno = errno;
	uint32_t n;

	trace(call, what);
	n = atomic_fetch_add(&control->steps[service], 1) + 1;
	if (is_target() && n == control->k)
		die();
	errno = saved_errno;
}

#define WRITE_CALL(name, params, args, fd, size, torn) \
ssize_t name params \
{ \
	static ssize_t (*real) params; \
	char what[PATH_MAX]; \
	ssize_t ret; \
	bool is_file; \
	if (real == NULL) \
		real = next(#name); \
	if (fd == MASTER_STATUS_FD && control != NULL) \
		return name##_status args; \
	if (control == NULL || service < 0 || \
	    !fd_matters(fd, what, sizeof(what), &is_file)) \
		return real args; \
	step_begin(); \
	if (is_file && step_is_torn(size)) { \
		(void)!torn; \
		die(); \
	} \
	ret = real args; \
	if (ret > 0) \
		step_end(#name, what); \
	return ret; \
}

/* What a process says to the master is noted once it is said. */
static void status_said(void)
{
	control->heard[getpid() % PIDS] = getpid();
}

static ssize_t write_status(int fd, const void *data, size_t size)
{
	ssize_t (*real)(int, const void *, size_t) = next("write");
	ssize_t ret = real(fd, data, size);

	status_said();
	return ret;
}

/* nobody does it in these ways */
#define pwrite_status(...) -1
#define pwrite64_status(...) -1
#define writev_status(...) -1
#define pwritev_status(...) -1
#define pwritev64_status(...) -1
#define send_status(...) -1
#define sendmsg_status(...) -1

WRITE_CALL(write, (int fd, const void *data, size_t size),
	   (fd, data, size), fd, size, real(fd, data, size / 2))
WRITE_CALL(pwrite, (int fd, const void *data, size_t size, off_t offset),
	   (fd, data, size, offset), fd, size,
	   real(fd, data, size / 2, offset))
WRITE_CALL(pwrite64, (int fd, const void *data, size_t size, off64_t offset),
	   (fd, data, size, offset), fd, size,
	   real(fd, data, size / 2, offset))
WRITE_CALL(writev, (int fd, const struct iovec *iov, int count),
	   (fd, iov, count), fd, (size_t)count, real(fd, iov, count / 2))
WRITE_CALL(pwritev, (int fd, const struct iovec *iov, int count, off_t offset),
	   (fd, iov, count, offset), fd, (size_t)count,
	   real(fd, iov, count / 2, offset))
WRITE_CALL(pwritev64, (int fd, const struct iovec *iov, int count,
		       off64_t offset),
	   (fd, iov, count, offset), fd, (size_t)count,
	   real(fd, iov, count / 2, offset))
WRITE_CALL(send, (int fd, const void *data, size_t size, int flags),
	   (fd, data, size, flags), fd, size, 0)
WRITE_CALL(sendmsg, (int fd, const struct msghdr *msg, int flags),
	   (fd, msg, flags), fd, (size_t)1, 0)

ssize_t sendfile64(int out, int in, off64_t *offset, size_t size)
{
	static ssize_t (*real)(int, int, off64_t *, size_t);
	char what[PATH_MAX];
	ssize_t ret;
	bool is_file;

	if (real == NULL)
		real = next("sendfile64");
	if (control == NULL || service < 0 ||
	    !fd_matters(out, what, sizeof(what), &is_file))
		return real(out, in, offset, size);
	step_begin();
	ret = real(out, in, offset, size);
	if (ret > 0)
		step_end("sendfile", what);
	return ret;
}

#define FD_CALL(name, params, args, fd) \
int name params \
{ \
	static int (*real) params; \
	char what[PATH_MAX]; \
	bool is_file; \
	int ret; \
	if (real == NULL) \
		real = next(#name); \
	if (control == NULL || service < 0 || \
	    !fd_matters(fd, what, sizeof(what), &is_file) || !is_file) \
		return real args; \
	step_begin(); \
	ret = real args; \
	if (ret == 0) \
		step_end(#name, what); \
	return ret; \
}

FD_CALL(ftruncate, (int fd, off_t size), (fd, size), fd)
FD_CALL(ftruncate64, (int fd, off64_t size), (fd, size), fd)
FD_CALL(fsync, (int fd), (fd), fd)
FD_CALL(fdatasync, (int fd), (fd), fd)

#define PATH_CALL(name, params, args, path) \
int name params \
{ \
	static int (*real) params; \
	int ret; \
	if (real == NULL) \
		real = next(#name); \
	if (control == NULL || service < 0 || !path_matters(path)) \
		return real args; \
	step_begin(); \
	ret = real args; \
	if (ret == 0) \
		step_end(#name, path); \
	return ret; \
}

PATH_CALL(rename, (const char *from, const char *to), (from, to), to)
PATH_CALL(link, (const char *from, const char *to), (from, to), to)
PATH_CALL(symlink, (const char *from, const char *to), (from, to), to)
PATH_CALL(unlink, (const char *path), (path), path)
PATH_CALL(rmdir, (const char *path), (path), path)
PATH_CALL(mkdir, (const char *path, mode_t mode), (path, mode), path)

/* Making a file is a step, opening one is none. */
#define OPEN_CALL(name) \
int name(const char *path, int flags, ...) \
{ \
	static int (*real)(const char *, int, ...); \
	struct stat st; \
	va_list args; \
	mode_t mode; \
	bool makes; \
	int ret; \
	va_start(args, flags); \
	mode = (flags & O_CREAT) != 0 ? va_arg(args, mode_t) : 0; \
	va_end(args); \
	if (real == NULL) \
		real = next(#name); \
	makes = control != NULL && service >= 0 && (flags & O_CREAT) != 0 && \
		path_matters(path) && lstat(path, &st) < 0; \
	if (makes) \
		step_begin(); \
	ret = real(path, flags, mode); \
	if (ret != -1 && makes) \
		step_end(#name, path); \
	return ret; \
}

OPEN_CALL(open)
OPEN_CALL(open64)

/* ---- the slow queue ---- */

static void queue_delay(int fd)
{
	char what[PATH_MAX];
	bool is_file;
	unsigned int msecs;

	if (control == NULL || service < 0 ||
	    (msecs = control->queue_delay_msecs) == 0 ||
	    strcmp(services[service], "dovetail-queue") != 0 ||
	    !fd_matters(fd, what, sizeof(what), &is_file) || is_file ||
	    strstr(what, "/dovetail-queue") == NULL)
		return;
	usleep(msecs * 1000);
}

ssize_t read(int fd, void *data, size_t size)
{
	static ssize_t (*real)(int, void *, size_t);

	if (real == NULL)
		real = next("read");
	queue_delay(fd);
	return real(fd, data, size);
}

ssize_t recv(int fd, void *data, size_t size, int flags)
{
	static ssize_t (*real)(int, void *, size_t, int);

	if (real == NULL)
		real = next("recv");
	queue_delay(fd);
	return real(fd, data, size, flags);
}
