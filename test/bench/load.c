/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* load SOCKET keep|once RATE SECONDS CONNECTIONS REQUEST END

   Asks a unix socket RATE times a second, whether it answers or not: question k is due
   at its time, and how long it took is counted from there, so that a service that
   stops for a moment is not spared the questions of that moment. At most
   CONNECTIONS are open at a time. keep: they stay open, and an answer ends with
   END; once: each question has a connection of its own, which the service closes.
   Prints: answers, failures, and in microseconds p50, p90, p99, p99.9, the longest.
   Failures are connections that broke, and answers that did not come at all. */

#define _GNU_SOURCE
#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>

#define ANSWER_MAX 65536
/* what has not come by then does not come */
#define LATE_NSECS (10 * 1000000000ULL)

struct conn {
	int fd;
	bool busy;
	uint64_t due;
	size_t size;
	char answer[ANSWER_MAX];
};

static const char *path, *request, *end;
static bool keep;
static struct conn *conns;
static unsigned int conns_count;
/* those that are not busy */
static struct conn **idle;
static unsigned int idle_count;
static uint64_t *times, times_count, failures;
static int epoll_fd;

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static uint64_t now_nsecs(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000000000ULL + ts.tv_nsec;
}

/* Returns false when the listener's queue is full. */
static bool conn_open(struct conn *conn)
{
	struct sockaddr_un sun = { .sun_family = AF_UNIX };
	struct epoll_event event = { .events = EPOLLIN, .data.ptr = conn };

	conn->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
	if (conn->fd == -1)
		fail("socket()");
	strncpy(sun.sun_path, path, sizeof(sun.sun_path) - 1);
	if (connect(conn->fd, (void *)&sun, sizeof(sun)) < 0) {
		if (errno != EAGAIN)
			fail(path);
		close(conn->fd);
		conn->fd = -1;
		return false;
	}
	if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, conn->fd, &event) < 0)
		fail("epoll_ctl()");
	return true;
}

static void conn_close(struct conn *conn)
{
	close(conn->fd);
	conn->fd = -1;
}

static void conn_done(struct conn *conn, bool ok)
{
	if (!conn->busy) {
		failures++;
		return;
	}
	if (ok)
		times[times_count++] = now_nsecs() - conn->due;
	else
		failures++;
	conn->busy = false;
	idle[idle_count++] = conn;
}

static bool conn_ask(uint64_t due)
{
	struct conn *conn;
	size_t size = strlen(request);

	if (idle_count == 0)
		return false;
	conn = idle[idle_count - 1];
	if (conn->fd == -1 && !conn_open(conn))
		return false;
	idle_count--;
	conn->busy = true;
	conn->due = due;
	conn->size = 0;
	if (size > 0 && send(conn->fd, request, size, MSG_NOSIGNAL) !=
	    (ssize_t)size && errno != EPIPE)
		fail("send()");
	return true;
}

static void conn_input(struct conn *conn)
{
	size_t end_size = strlen(end);
	ssize_t ret;

	ret = recv(conn->fd, conn->answer + conn->size,
		   ANSWER_MAX - conn->size, 0);
	if (ret < 0 && errno == EAGAIN)
		return;
	if (ret <= 0 || conn->size + ret == ANSWER_MAX) {
		conn_close(conn);
		conn_done(conn, ret == 0 && !keep && conn->size > 0);
		return;
	}
	conn->size += ret;
	if (keep && conn->size >= end_size &&
	    memcmp(conn->answer + conn->size - end_size, end, end_size) == 0)
		conn_done(conn, true);
}

static int time_cmp(const void *p1, const void *p2)
{
	const uint64_t *t1 = p1, *t2 = p2;

	return *t1 < *t2 ? -1 : *t1 > *t2;
}

static void print_times(void)
{
	static const double parts[] = { 0.5, 0.9, 0.99, 0.999, 1 };
	unsigned int i;

	printf("%ju %ju", (uintmax_t)times_count, (uintmax_t)failures);
	qsort(times, times_count, sizeof(*times), time_cmp);
	for (i = 0; i < sizeof(parts) / sizeof(parts[0]); i++) {
		uint64_t n = times_count * parts[i];

		printf(" %.0f", times_count == 0 ? -1 : times[
			n < times_count ? n : times_count - 1] / 1000.0);
	}
	putchar('\n');
}

int main(int argc, char *argv[])
{
	struct epoll_event events[256];
	uint64_t asked = 0, total, interval, start, now, due;
	unsigned int i;
	int count;

	if (argc != 8) {
		fprintf(stderr, "usage: load SOCKET keep|once RATE SECONDS "
			"CONNECTIONS REQUEST END\n");
		return 2;
	}
	path = argv[1];
	keep = strcmp(argv[2], "keep") == 0;
	interval = 1000000000ULL / strtoul(argv[3], NULL, 10);
	total = strtoul(argv[3], NULL, 10) * strtoul(argv[4], NULL, 10);
	conns_count = strtoul(argv[5], NULL, 10);
	request = argv[6];
	end = argv[7];

	epoll_fd = epoll_create1(0);
	times = calloc(total, sizeof(*times));
	conns = calloc(conns_count, sizeof(*conns));
	idle = calloc(conns_count, sizeof(*idle));
	if (epoll_fd == -1 || times == NULL || conns == NULL || idle == NULL)
		fail("start");
	for (i = 0; i < conns_count; i++) {
		conns[i].fd = -1;
		idle[idle_count++] = &conns[i];
	}

	start = now_nsecs();
	while (times_count + failures < total) {
		now = now_nsecs();
		due = start + asked * interval;
		while (asked < total && due <= now && conn_ask(due)) {
			asked++;
			due = start + asked * interval;
		}
		if (asked == total && now > due + LATE_NSECS) {
			failures = total - times_count;
			break;
		}
		/* until something comes, or the next question is due */
		struct timespec wait = { 0, asked < total && due > now ?
			(due - now) % 1000000000ULL : 200000 };
		count = epoll_pwait2(epoll_fd, events, 256, &wait, NULL);
		for (int n = 0; n < count; n++)
			conn_input(events[n].data.ptr);
	}
	print_times();
	return 0;
}
