/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* Apart from dovetail-redis.c, because every process reads the settings, and
   only the services talk to Redis. */

#include "lib.h"
#include "net.h"
#include "str-sanitize.h"
#include "dovetail-compat.h"
#include "dovetail-redis.h"

#define DOVETAIL_REDIS_DEFAULT_PORT 6379
#define DOVETAIL_REDIS_DEFAULT_PREFIX "dovetail:"
#define DOVETAIL_REDIS_PREFIX_MAX_LEN 64
#define DOVETAIL_REDIS_USERNAME_MAX_LEN 128
#define DOVETAIL_REDIS_DB_MAX 65535

static bool dovetail_redis_word_is_valid(const char *str, size_t max_len,
					 const char *refused)
{
	size_t i;

	for (i = 0; str[i] != '\0'; i++) {
		if (str[i] <= ' ' || (unsigned char)str[i] >= 0x7f ||
		    strchr(refused, str[i]) != NULL)
			return FALSE;
	}
	return i > 0 && i <= max_len;
}

static int
dovetail_redis_url_set_username(pool_t pool, const char *value,
				struct dovetail_redis_url *url,
				const char **error_r)
{
	if (strchr(value, ':') != NULL) {
		*error_r = "A password does not belong into the URL, which "
			"every mail process can read; write it into the file "
			"redis.password in dovetail_key_dir";
		return -1;
	}
	if (!dovetail_redis_word_is_valid(value,
					  DOVETAIL_REDIS_USERNAME_MAX_LEN,
					  "@/?&%")) {
		*error_r = t_strdup_printf("Invalid user name '%s'",
					   str_sanitize(value, 128));
		return -1;
	}
	url->username = p_strdup(pool, value);
	return 0;
}

static int
dovetail_redis_url_set_db(const char *value, struct dovetail_redis_url *url,
			  const char **error_r)
{
	if (str_to_uint(value, &url->db) < 0 ||
	    url->db > DOVETAIL_REDIS_DB_MAX) {
		*error_r = t_strdup_printf("Invalid database number '%s'",
					   str_sanitize(value, 128));
		return -1;
	}
	return 0;
}

static int
dovetail_redis_url_parse_query(pool_t pool, const char *query, bool tcp,
			       struct dovetail_redis_url *url,
			       const char **error_r)
{
	const char *const *params = t_strsplit(query, "&");
	const char *value;
	bool seen_user = FALSE, seen_db = FALSE, seen_prefix = FALSE, *seen;

	for (; *params != NULL; params++) {
		if (str_begins_with(*params, "prefix=")) {
			seen = &seen_prefix;
			value = *params + 7;
			/* [*?\ would be patterns for SCAN */
			if (!dovetail_redis_word_is_valid(
				value, DOVETAIL_REDIS_PREFIX_MAX_LEN,
				"*?[]\\%/@")) {
				*error_r = t_strdup_printf(
					"Invalid prefix '%s'",
					str_sanitize(value, 128));
				return -1;
			}
			url->prefix = p_strdup(pool, value);
		} else if (!tcp && str_begins_with(*params, "user=")) {
			seen = &seen_user;
			if (dovetail_redis_url_set_username(
				pool, *params + 5, url, error_r) < 0)
				return -1;
		} else if (!tcp && str_begins_with(*params, "db=")) {
			seen = &seen_db;
			if (dovetail_redis_url_set_db(*params + 3, url,
						      error_r) < 0)
				return -1;
		} else if (str_begins_with(*params, "password=") ||
			   str_begins_with(*params, "pass=")) {
			return dovetail_redis_url_set_username(
				pool, ":", url, error_r);
		} else {
			*error_r = t_strdup_printf(
				"Unknown parameter '%s' (known: %s)",
				str_sanitize(t_strcut(*params, '='), 128),
				tcp ? "prefix" : "user, db, prefix");
			return -1;
		}
		if (*seen) {
			*error_r = t_strdup_printf(
				"Parameter '%s' is given twice",
				t_strcut(*params, '='));
			return -1;
		}
		*seen = TRUE;
	}
	return 0;
}

static int
dovetail_redis_url_parse_host(pool_t pool, const char *hostport,
			      struct dovetail_redis_url *url,
			      const char **error_r)
{
	const char *host;
	struct ip_addr ip;

	/* net_str2hostport() would take "::1:6379" as a host */
	if (hostport[0] != '[' && strchr(hostport, ':') != strrchr(hostport, ':')) {
		*error_r = "An IPv6 address must stand in []";
		return -1;
	}
	if (net_str2hostport(hostport, DOVETAIL_REDIS_DEFAULT_PORT,
			     &host, &url->port) < 0 || *host == '\0') {
		*error_r = t_strdup_printf("Invalid host or port '%s'",
					   str_sanitize(hostport, 128));
		return -1;
	}
	if (hostport[0] == '[') {
		if (net_addr2ip(host, &ip) < 0 || ip.family != AF_INET6) {
			*error_r = t_strdup_printf("Invalid IPv6 address '%s'",
						   str_sanitize(host, 128));
			return -1;
		}
	} else if (!dovetail_redis_word_is_valid(host, 255,
						 "@/?#[]%\\:\"'<>*,;=()|")) {
		*error_r = t_strdup_printf("Invalid host '%s'",
					   str_sanitize(host, 128));
		return -1;
	}
	url->host = p_strdup(pool, host);
	return 0;
}

static int
dovetail_redis_url_parse_tcp(pool_t pool, const char *str,
			     struct dovetail_redis_url *url,
			     const char **error_r)
{
	const char *p;

	/* the last @: a password may hold one, and must be noticed */
	p = strrchr(t_strcut(str, '?'), '@');
	if (p != NULL) {
		const char *user = t_strcut(str, '?');

		user = t_strdup_until(user, strrchr(user, '@'));
		if (dovetail_redis_url_set_username(pool, user, url,
						    error_r) < 0)
			return -1;
		str += strlen(user) + 1;
	}
	if ((p = strchr(str, '?')) != NULL) {
		if (dovetail_redis_url_parse_query(pool, p + 1, TRUE, url,
						   error_r) < 0)
			return -1;
		str = t_strdup_until(str, p);
	}
	if ((p = strchr(str, '/')) != NULL) {
		if (p[1] != '\0' &&
		    dovetail_redis_url_set_db(p + 1, url, error_r) < 0)
			return -1;
		str = t_strdup_until(str, p);
	}
	return dovetail_redis_url_parse_host(pool, str, url, error_r);
}

static int
dovetail_redis_url_parse_unix(pool_t pool, const char *str,
			      struct dovetail_redis_url *url,
			      const char **error_r)
{
	const char *p;

	if ((p = strchr(str, '?')) != NULL) {
		if (dovetail_redis_url_parse_query(pool, p + 1, FALSE, url,
						   error_r) < 0)
			return -1;
		str = t_strdup_until(str, p);
	}
	if (*str != '/') {
		*error_r = "The path after unix: must begin with /";
		return -1;
	}
	url->path = p_strdup(pool, str);
	return 0;
}

int dovetail_redis_url_parse(pool_t pool, const char *url,
			     struct dovetail_redis_url *url_r,
			     const char **error_r)
{
	i_zero(url_r);
	url_r->prefix = DOVETAIL_REDIS_DEFAULT_PREFIX;

	if (str_begins_with(url, "redis://")) {
		return dovetail_redis_url_parse_tcp(pool, url + 8, url_r,
						    error_r);
	}
	if (str_begins_with(url, "unix:")) {
		return dovetail_redis_url_parse_unix(pool, url + 5, url_r,
						     error_r);
	}
	if (str_begins_with(url, "rediss://")) {
		url_r->tls = TRUE;
		return dovetail_redis_url_parse_tcp(pool, url + 9, url_r,
						    error_r);
	}
	*error_r = "It must begin with redis://, rediss:// or unix:";
	return -1;
}
