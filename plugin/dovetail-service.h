#ifndef DOVETAIL_SERVICE_H
#define DOVETAIL_SERVICE_H

#include <time.h>

struct dovetail_settings;
struct dovetail_redis_tls;

/* What the services have in common. */

/* A clock that never jumps. */
static inline uint64_t dovetail_monotonic_msecs(void)
{
	struct timespec ts;

	if (clock_gettime(CLOCK_MONOTONIC, &ts) < 0)
		return 0;
	return (uint64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

/* At their start, as root. A failure ends the process: it has served nobody yet,
   and Dovecot's master starts it again, slower each time. */

/* The first line of KEY_DIR/redis.password, or NULL when there is no such file.
   The caller wipes and frees it. */
char *dovetail_service_read_password(const char *key_dir);

/* What TLS to Redis needs; NULL when dovetail_redis is not rediss://. */
struct dovetail_redis_tls *
dovetail_service_tls_init(const struct dovetail_settings *set);

/* Make sure that the directory exists, with this mode and owner. */
void dovetail_service_make_dir(const char *path, mode_t mode, uid_t uid,
			       gid_t gid);

#endif
