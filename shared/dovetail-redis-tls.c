/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* TLS to Redis, by Dovecot's SSL streams: hiredis 0.14 has none of its own. */

#include "lib.h"
#include "istream.h"
#include "safe-memset.h"
#include "str.h"
#include "iostream-ssl.h"
#include "dovetail-compat.h"
#include "dovetail-redis.h"

#include <sys/stat.h>

/* More than any list of certificates has. */
#define TLS_FILE_MAX_SIZE (16 * 1024 * 1024)

struct dovetail_redis_tls {
	pool_t pool;
	struct ssl_iostream_settings set;
	struct ssl_iostream_context *ctx;
};

/* Returns 0 and the file's content in content_r, NULL when path is "". */
static int
tls_read_file(pool_t pool, const char *name, const char *path,
	      const char **content_r, const char **error_r)
{
	struct istream *input;
	string_t *str;
	const unsigned char *data;
	size_t size;
	int ret = 0;

	*content_r = NULL;
	if (*path == '\0')
		return 0;
	str = str_new(default_pool, 8192);
	input = i_stream_create_file(path, IO_BLOCK_SIZE);
	while (i_stream_read_more(input, &data, &size) > 0 &&
	       str_len(str) <= TLS_FILE_MAX_SIZE) {
		str_append_data(str, data, size);
		i_stream_skip(input, size);
	}
	if (input->stream_errno != 0) {
		*error_r = t_strdup_printf("%s: %s", name,
					   i_stream_get_error(input));
		ret = -1;
	} else if (strstr(str_c(str), "-----BEGIN") == NULL ||
		   str_len(str) > TLS_FILE_MAX_SIZE) {
		*error_r = t_strdup_printf("%s: %s is not a PEM file", name,
					   path);
		ret = -1;
	} else {
		*content_r = p_strdup(pool, str_c(str));
	}
	i_stream_destroy(&input);
	safe_memset(str_c_modifiable(str), 0, str_len(str));
	str_free(&str);
	return ret;
}

static int tls_check_key_mode(const char *path, const char **error_r)
{
	struct stat st;

	if (*path == '\0' || stat(path, &st) < 0 || (st.st_mode & 07) == 0)
		return 0;
	*error_r = t_strdup_printf("dovetail_redis_key_file: %s can be read by "
				   "everybody (chmod 600 %s)", path, path);
	return -1;
}

int dovetail_redis_tls_init(const char *ca_file, const char *cert_file,
			    const char *key_file,
			    struct dovetail_redis_tls **tls_r,
			    const char **error_r)
{
	struct dovetail_redis_tls *tls;
	const char *ca, *cert, *key, *error;
	pool_t pool;

	pool = pool_alloconly_create("dovetail redis tls", 8192);
	tls = p_new(pool, struct dovetail_redis_tls, 1);
	tls->pool = pool;
	if (tls_check_key_mode(key_file, error_r) < 0 ||
	    tls_read_file(pool, "dovetail_redis_ca_file", ca_file, &ca,
			  error_r) < 0 ||
	    tls_read_file(pool, "dovetail_redis_cert_file", cert_file, &cert,
			  error_r) < 0 ||
	    tls_read_file(pool, "dovetail_redis_key_file", key_file, &key,
			  error_r) < 0) {
		pool_unref(&pool);
		return -1;
	}
	dovetail_compat_ssl_settings(&tls->set, pool, ca, cert, key);
	if (ssl_iostream_context_init_client(&tls->set, &tls->ctx,
					     &error) < 0) {
		*error_r = t_strdup_printf("TLS for dovetail_redis, with "
			"dovetail_redis_ca_file '%s', _cert_file '%s', "
			"_key_file '%s': %s", ca_file, cert_file, key_file,
			error);
		pool_unref(&pool);
		return -1;
	}
	*tls_r = tls;
	return 0;
}

void dovetail_redis_tls_deinit(struct dovetail_redis_tls **_tls)
{
	struct dovetail_redis_tls *tls = *_tls;

	if (tls == NULL)
		return;
	*_tls = NULL;
	ssl_iostream_context_unref(&tls->ctx);
	pool_unref(&tls->pool);
}

int dovetail_redis_tls_start(struct dovetail_redis_tls *tls,
			     struct event *event, const char *host,
			     struct istream **input, struct ostream **output,
			     struct ssl_iostream **ssl_r, const char **error_r)
{
	const char *error;

	if (dovetail_compat_ssl_client(tls->ctx, &tls->set, event, host, input,
				       output, ssl_r, &error) < 0) {
		*error_r = t_strdup_printf("TLS failed: %s", error);
		return -1;
	}
	if (ssl_iostream_handshake(*ssl_r) < 0) {
		*error_r = dovetail_redis_tls_error(*ssl_r);
		if (*error_r == NULL)
			*error_r = "TLS failed: The server hung up";
		return -1;
	}
	return 0;
}

const char *dovetail_redis_tls_error(struct ssl_iostream *ssl)
{
	const char *p, *error = ssl_iostream_get_last_error(ssl);

	if (error == NULL || strcmp(error, "Connection closed") == 0)
		return NULL;
	/* Dovecot's advice is about its own settings */
	p = strstr(error, " (check ");
	return p == NULL ? t_strdup_printf("TLS failed: %s", error) :
		t_strdup_printf("TLS failed: %s (check dovetail_redis_ca_file)",
				t_strdup_until(error, p));
}
