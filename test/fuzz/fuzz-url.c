/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* dovetail_redis_url_parse(): where Redis is, as the administrator writes it.
   Input: the URL.
   Must hold: what is accepted has a server and a prefix, shows no password, and
   what it means can be written as a URL that means the same. */

#include "fuzz-common.h"
#include "net.h"
#include "str.h"
#include "dovetail-redis.h"

#include <ctype.h>

void fuzz_init(void)
{
}

static const char *url_write(const struct dovetail_redis_url *url)
{
	string_t *str = t_str_new(128);

	if (url->path != NULL) {
		str_printfa(str, "unix:%s?db=%u", url->path, url->db);
		if (url->username != NULL)
			str_printfa(str, "&user=%s", url->username);
		str_printfa(str, "&prefix=%s", url->prefix);
		return str_c(str);
	}
	str_append(str, url->tls ? "rediss://" : "redis://");
	if (url->username != NULL)
		str_printfa(str, "%s@", url->username);
	str_printfa(str, strchr(url->host, ':') != NULL ? "[%s]" : "%s",
		    url->host);
	str_printfa(str, ":%u/%u?prefix=%s", url->port, url->db, url->prefix);
	return str_c(str);
}

static void check_word(const char *word)
{
	for (; *word != '\0'; word++)
		fuzz_assert((unsigned char)*word > ' ' && *word != 127);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct dovetail_redis_url url, again;
	const char *error = NULL;
	char *str;
	pool_t pool;

	str = i_malloc(size + 1);
	memcpy(str, data, size);
	pool = fuzz_pool();
	T_BEGIN {
		if (dovetail_redis_url_parse(pool, str, &url, &error) < 0)
			fuzz_assert(error != NULL && *error != '\0');
		else {
			fuzz_assert((url.path != NULL) != (url.host != NULL));
			fuzz_assert(url.prefix != NULL);
			fuzz_assert(url.path == NULL || !url.tls);
			check_word(url.prefix);
			if (url.host != NULL) {
				fuzz_assert(url.port != 0);
				check_word(url.host);
			}
			if (url.username != NULL) {
				fuzz_assert(strchr(url.username, ':') == NULL);
				check_word(url.username);
			}
			if (dovetail_redis_url_parse(pool, url_write(&url),
						     &again, &error) < 0)
				i_panic("%s: %s", url_write(&url), error);
			fuzz_assert(null_strcmp(url.path, again.path) == 0);
			fuzz_assert(null_strcmp(url.host, again.host) == 0);
			fuzz_assert(url.port == again.port);
			fuzz_assert(url.tls == again.tls);
			fuzz_assert(null_strcmp(url.username,
						again.username) == 0);
			fuzz_assert(url.db == again.db);
			fuzz_assert(strcmp(url.prefix, again.prefix) == 0);
		}
	} T_END;
	pool_unref(&pool);
	i_free(str);
	return 0;
}
