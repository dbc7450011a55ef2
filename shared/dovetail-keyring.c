/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "array.h"
#include "str.h"
#include "istream.h"
#include "eacces-error.h"
#include "mkdir-parents.h"
#include "write-full.h"
#include "dovetail-keyring.h"
#include "dovetail-seal.h"

#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>
#include <sys/file.h>
#include <sys/stat.h>

#define SECRET_MAGIC "dovetail-secret-1"
#define PUBLIC_MAGIC "dovetail-public-1"

/* Both the seed and the public key */
#define KEY_SIZE 32
/* With the NUL, as sodium_bin2base64() writes it */
#define KEY_BASE64_SIZE \
	sodium_base64_ENCODED_LEN(KEY_SIZE, sodium_base64_VARIANT_ORIGINAL)
#define LINE_MAX_SIZE \
	(sizeof(SECRET_MAGIC) + DOVETAIL_NODE_NAME_MAX + 1 + KEY_BASE64_SIZE)
#define PUBLIC_FILE_MAX_LINE 1024

_Static_assert(KEY_SIZE == crypto_sign_SEEDBYTES, "a seed is one key");
_Static_assert(KEY_SIZE == crypto_sign_PUBLICKEYBYTES, "so is a public key");
_Static_assert(sizeof(SECRET_MAGIC) == sizeof(PUBLIC_MAGIC), "for the sizes");

struct dovetail_keyring {
	pool_t pool;
	const char *node;
	/* crypto_sign_SECRETKEYBYTES, sodium_malloc() */
	unsigned char *sign_sk;
	/* Own keys first, of these the one that belongs to sign_sk first, then
	   the peers'. sodium_allocarray(), because of the shared secrets. */
	struct dovetail_public_key *keys;
	unsigned int own_count, count;
};

/* A line of a .pub file, not yet made into a dovetail_public_key */
struct public_line {
	const char *node;
	unsigned char sign_pk[crypto_sign_PUBLICKEYBYTES];
};
ARRAY_DEFINE_TYPE(public_line, struct public_line);

static int keyring_sodium_init(const char **error_r)
{
	if (sodium_init() < 0) {
		*error_r = "libsodium cannot be initialized on this machine";
		return -1;
	}
	return 0;
}

static int node_name_check(const char *name, const char **error_r)
{
	if (dovetail_node_name_is_valid(name))
		return 0;
	*error_r = t_strdup_printf(
		"'%s' is not a node name: choose 1..%u of a-z 0-9 . -",
		name, DOVETAIL_NODE_NAME_MAX);
	return -1;
}

static const char *key_path(const char *dir, const char *node)
{
	return t_strconcat(dir, "/", node, ".key", NULL);
}

static const char *pub_path(const char *dir, const char *node)
{
	return t_strconcat(dir, "/", node, ".pub", NULL);
}

/* ---- lines ---- */

static void
line_write(char line_r[LINE_MAX_SIZE], const char *magic, const char *node,
	   const unsigned char key[KEY_SIZE])
{
	char base64[KEY_BASE64_SIZE];

	sodium_bin2base64(base64, sizeof(base64), key, KEY_SIZE,
			  sodium_base64_VARIANT_ORIGINAL);
	if (i_snprintf(line_r, LINE_MAX_SIZE, "%s %s %s",
		       magic, node, base64) < 0)
		i_unreached();
	sodium_memzero(base64, sizeof(base64));
}

/* Parse "MAGIC NODE BASE64". Nothing of the line is copied to the data stack,
   and problem_r shows no key. */
static int
line_parse(const char *line, const char *magic, const char *node,
	   unsigned char key_r[KEY_SIZE], const char **problem_r)
{
	size_t name_len, key_len, magic_len = strlen(magic);
	const char *name;

	if (strncmp(line, magic, magic_len) != 0 || line[magic_len] != ' ') {
		if (strcmp(magic, PUBLIC_MAGIC) == 0 &&
		    strncmp(line, SECRET_MAGIC, strlen(SECRET_MAGIC)) == 0)
			*problem_r = "is a secret key, which must stay secret";
		else
			*problem_r = t_strdup_printf(
				"does not start with \"%s \"", magic);
		return -1;
	}
	name = line + magic_len + 1;
	name_len = strcspn(name, " ");
	if (name[name_len] == '\0') {
		*problem_r = "has no key";
		return -1;
	}
	if (name_len != strlen(node) || memcmp(name, node, name_len) != 0) {
		/* what is no node name may be a misplaced key */
		*problem_r = name_len == 0 ||
			dovetail_node_name_size(name) != name_len ?
			"names no node" :
			t_strdup_printf("names node %s, not %s",
					t_strndup(name, name_len), node);
		return -1;
	}
	if (sodium_base642bin(key_r, KEY_SIZE, name + name_len + 1,
			      strlen(name + name_len + 1), NULL, &key_len, NULL,
			      sodium_base64_VARIANT_ORIGINAL) < 0 ||
	    key_len != KEY_SIZE) {
		sodium_memzero(key_r, KEY_SIZE);
		*problem_r = "does not hold 32 bytes of base64";
		return -1;
	}
	return 0;
}

/* ---- making keys ---- */

static const char *temp_path(const char *path)
{
	return t_strconcat(path, ".tmp", NULL);
}

/* Write data to a new file beside path, on disk when this returns. What an
   earlier try left there is replaced. */
static int
temp_write(const char *path, mode_t mode, const void *data, size_t size,
	   const char **error_r)
{
	const char *temp = temp_path(path);
	int fd;

	i_unlink_if_exists(temp);
	fd = open(temp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
	if (fd == -1) {
		*error_r = errno == EACCES ?
			eacces_error_get_creating("open", path) :
			t_strdup_printf("Cannot create %s: %m", path);
		return -1;
	}
	/* whatever the umask is */
	if (write_full(fd, data, size) < 0 || fchmod(fd, mode) < 0 ||
	    fsync(fd) < 0) {
		*error_r = t_strdup_printf("write(%s) failed: %m", temp);
		i_close_fd(&fd);
		return -1;
	}
	if (close(fd) < 0) {
		*error_r = t_strdup_printf("close(%s) failed: %m", temp);
		return -1;
	}
	return 0;
}

static int temp_commit(const char *path, const char **error_r)
{
	if (rename(temp_path(path), path) == 0)
		return 0;
	*error_r = t_strdup_printf("rename(%s, %s) failed: %m",
				   temp_path(path), path);
	return -1;
}

static int
secret_write(const char *path, const char *node,
	     const unsigned char seed[KEY_SIZE], const char **error_r)
{
	char line[LINE_MAX_SIZE + 1];
	int ret;

	line_write(line, SECRET_MAGIC, node, seed);
	i_strocpy(line + strlen(line), "\n", 2);
	ret = temp_write(path, 0600, line, strlen(line), error_r);
	sodium_memzero(line, sizeof(line));
	return ret;
}

/* As buffer_append_full_file(), whose error is freed memory in Dovecot 2.3. */
static int file_append(buffer_t *dest, const char *path, const char **error_r)
{
	struct istream *input = i_stream_create_file(path, IO_BLOCK_SIZE);
	const char *error;
	int ret = 0;

	if (buffer_append_full_istream(dest, input, SIZE_MAX,
				       &error) != BUFFER_APPEND_OK) {
		*error_r = t_strdup_printf("read(%s) failed: %s", path, error);
		ret = -1;
	}
	i_stream_unref(&input);
	return ret;
}

/* The new line goes in front of what the file has. */
static int
public_write(const char *path, const char *line, const char **error_r)
{
	string_t *text = t_str_new(512);

	str_printfa(text, "%s\n", line);
	if (access(path, F_OK) == 0 &&
	    file_append(text, path, error_r) < 0)
		return -1;
	return temp_write(path, 0644, str_data(text), str_len(text), error_r);
}

/* The public file goes first: a crash in between leaves the old secret key,
   whose public line is still there. */
static int
keygen_commit(const char *key, const char *pub, bool exists,
	      const char **error_r)
{
	const char *old = t_strconcat(key, ".old", NULL);

	if (exists && ((unlink(old) < 0 && errno != ENOENT) ||
		       link(key, old) < 0)) {
		*error_r = t_strdup_printf("Cannot keep %s as %s: %m",
					   key, old);
		return -1;
	}
	if (temp_commit(pub, error_r) < 0)
		return -1;
	return temp_commit(key, error_r);
}

/* Nobody else makes keys in dir now. */
static int
keygen_locked(const char *dir, const char *node, bool replace,
	      char line[LINE_MAX_SIZE], const char **error_r)
{
	const char *key = key_path(dir, node), *pub = pub_path(dir, node);
	unsigned char seed[KEY_SIZE];
	unsigned char pk[crypto_sign_PUBLICKEYBYTES];
	unsigned char sk[crypto_sign_SECRETKEYBYTES];
	bool exists = access(key, F_OK) == 0;
	int ret;

	if (exists && !replace) {
		*error_r = t_strdup_printf(
			"%s exists already; to change the key of node %s, "
			"ask for its replacement", key, node);
		return -1;
	}
	randombytes_buf(seed, sizeof(seed));
	(void)crypto_sign_seed_keypair(pk, sk, seed);
	sodium_memzero(sk, sizeof(sk));
	line_write(line, PUBLIC_MAGIC, node, pk);
	ret = secret_write(key, node, seed, error_r);
	sodium_memzero(seed, sizeof(seed));
	if (ret == 0)
		ret = public_write(pub, line, error_r);
	if (ret == 0)
		ret = keygen_commit(key, pub, exists, error_r);
	if (ret < 0) {
		i_unlink_if_exists(temp_path(key));
		i_unlink_if_exists(temp_path(pub));
	}
	return ret;
}

int dovetail_keygen(const char *dir, const char *node, bool replace,
		    const char **line_r, const char **error_r)
{
	char line[LINE_MAX_SIZE];
	int fd, ret;

	if (keyring_sodium_init(error_r) < 0 ||
	    node_name_check(node, error_r) < 0)
		return -1;
	if (mkdir_parents(dir, 0700) < 0 && errno != EEXIST) {
		*error_r = t_strdup_printf("mkdir(%s) failed: %m", dir);
		return -1;
	}
	fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd == -1) {
		*error_r = t_strdup_printf("open(%s) failed: %m", dir);
		return -1;
	}
	/* Not every file system can, and two administrators at the same moment
	   are not worth an error. */
	(void)flock(fd, LOCK_EX);
	ret = keygen_locked(dir, node, replace, line, error_r);
	if (ret == 0 && fsync(fd) < 0) {
		*error_r = t_strdup_printf("fsync(%s) failed: %m", dir);
		ret = -1;
	}
	i_close_fd(&fd);
	if (ret == 0)
		*line_r = t_strdup(line);
	return ret;
}

/* ---- reading keys ---- */

/* Open a file that must be a regular one; a FIFO does not block. */
static int
regular_open(const char *path, const char *missing_remedy, struct stat *st_r,
	     const char **error_r)
{
	int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);

	if (fd == -1) {
		if (errno == ENOENT)
			*error_r = t_strdup_printf("%s does not exist; %s",
						   path, missing_remedy);
		else if (errno == EACCES)
			*error_r = eacces_error_get("open", path);
		else
			*error_r = t_strdup_printf("open(%s) failed: %m", path);
		return -1;
	}
	if (fstat(fd, st_r) < 0) {
		*error_r = t_strdup_printf("fstat(%s) failed: %m", path);
		i_close_fd(&fd);
		return -1;
	}
	if (!S_ISREG(st_r->st_mode)) {
		*error_r = t_strdup_printf("%s is not a regular file; "
			"put the key there as a file", path);
		i_close_fd(&fd);
		return -1;
	}
	return fd;
}

static int
secret_check_mode(const char *path, const struct stat *st,
		  const char **error_r)
{
	if ((st->st_mode & 0077) == 0)
		return 0;
	*error_r = t_strdup_printf(
		"%s is %s by others (mode %04o); run chmod 600 %s, "
		"and make a new key if somebody may have read it", path,
		(st->st_mode & 0044) != 0 ? "readable" : "accessible",
		(unsigned int)(st->st_mode & 07777), path);
	return -1;
}

static int
secret_parse(const char *path, const char *node, char *text,
	     unsigned char seed_r[KEY_SIZE], const char **error_r)
{
	const char *problem;
	size_t len = strcspn(text, "\r\n");

	if (text[len + strspn(text + len, "\r\n")] != '\0') {
		*error_r = t_strdup_printf(
			"%s holds more than one line; "
			"keep only the line of the key in use", path);
		return -1;
	}
	text[len] = '\0';
	if (line_parse(text, SECRET_MAGIC, node, seed_r, &problem) < 0) {
		*error_r = t_strdup_printf(
			"%s is not the secret key of node %s: the line %s; "
			"put the right file there, "
			"or run: doveadm dovetail keygen",
			path, node, problem);
		return -1;
	}
	return 0;
}

static int
secret_read(const char *path, const char *node, unsigned char seed_r[KEY_SIZE],
	    const char **error_r)
{
	/* room to see that a line is too long, and for the NUL */
	char text[LINE_MAX_SIZE + 8];
	struct stat st;
	ssize_t size;
	int fd, ret;

	fd = regular_open(path, "run: doveadm dovetail keygen", &st, error_r);
	if (fd == -1)
		return -1;
	if (secret_check_mode(path, &st, error_r) < 0) {
		i_close_fd(&fd);
		return -1;
	}
	size = read(fd, text, sizeof(text) - 1);
	if (size < 0) {
		*error_r = t_strdup_printf("read(%s) failed: %m", path);
		i_close_fd(&fd);
		return -1;
	}
	i_close_fd(&fd);
	text[size] = '\0';
	ret = secret_parse(path, node, text, seed_r, error_r);
	sodium_memzero(text, sizeof(text));
	return ret;
}

static bool
lines_have(const ARRAY_TYPE(public_line) *lines, const char *node,
	   const unsigned char sign_pk[crypto_sign_PUBLICKEYBYTES])
{
	const struct public_line *line;

	array_foreach(lines, line) {
		if (strcmp(line->node, node) == 0 &&
		    memcmp(line->sign_pk, sign_pk, sizeof(line->sign_pk)) == 0)
			return TRUE;
	}
	return FALSE;
}

static const char *
lines_other_owner(const ARRAY_TYPE(public_line) *lines, const char *node,
		  const unsigned char sign_pk[crypto_sign_PUBLICKEYBYTES])
{
	const struct public_line *line;

	array_foreach(lines, line) {
		if (strcmp(line->node, node) != 0 &&
		    memcmp(line->sign_pk, sign_pk, sizeof(line->sign_pk)) == 0)
			return line->node;
	}
	return NULL;
}

static int
public_read_line(const char *path, const char *node, unsigned int line_num,
		 const char *text, ARRAY_TYPE(public_line) *lines,
		 const char **error_r)
{
	struct public_line line;
	const char *problem, *other;

	line.node = node;
	if (line_parse(text, PUBLIC_MAGIC, node, line.sign_pk, &problem) < 0) {
		*error_r = t_strdup_printf(
			"%s line %u %s; copy %s.pub from node %s again",
			path, line_num, problem, node, node);
		return -1;
	}
	other = lines_other_owner(lines, node, line.sign_pk);
	if (other != NULL) {
		*error_r = t_strdup_printf(
			"%s line %u is the key of node %s also; each node "
			"needs its own: run doveadm dovetail keygen on one "
			"of them and exchange the public lines again",
			path, line_num, other);
		return -1;
	}
	if (!lines_have(lines, node, line.sign_pk))
		array_push_back(lines, &line);
	return 0;
}

/* Add the keys of NODE.pub to lines. */
static int
public_read(const char *dir, const char *node, bool own,
	    ARRAY_TYPE(public_line) *lines, const char **error_r)
{
	const char *text, *path = pub_path(dir, node);
	unsigned int line_num = 0, old_count = array_count(lines);
	struct istream *input;
	struct stat st;
	int fd, ret = 0;

	fd = regular_open(path, own ?
		"put the public line that belongs to the secret key there, "
		"or run: doveadm dovetail keygen" :
		t_strdup_printf("copy %s.pub from node %s there", node, node),
		&st, error_r);
	if (fd == -1)
		return -1;
	input = i_stream_create_fd_autoclose(&fd, PUBLIC_FILE_MAX_LINE);
	/* the last line counts also when its newline got lost */
	i_stream_set_return_partial_line(input, TRUE);
	while (ret == 0 &&
	       (text = i_stream_read_next_line(input)) != NULL) {
		line_num++;
		if (*text != '\0' && *text != '#')
			ret = public_read_line(path, node, line_num, text,
					       lines, error_r);
	}
	if (ret == 0 && input->stream_errno != 0) {
		/* also a line that is too long */
		*error_r = t_strdup_printf(
			"read(%s) failed: %s; copy %s.pub from node %s again",
			path, i_stream_get_error(input), node, node);
		ret = -1;
	} else if (ret == 0 && array_count(lines) == old_count) {
		*error_r = t_strdup_printf(
			"%s holds no key; copy %s.pub from node %s again",
			path, node, node);
		ret = -1;
	}
	i_stream_unref(&input);
	return ret;
}

/* Everything of key that follows from line and our secret X25519 key. */
static int
public_key_fill(struct dovetail_public_key *key, const struct public_line *line,
		const unsigned char box_sk[crypto_box_SECRETKEYBYTES])
{
	unsigned char hash[32];

	key->node = line->node;
	memcpy(key->sign_pk, line->sign_pk, sizeof(key->sign_pk));
	(void)crypto_generichash(hash, sizeof(hash), key->sign_pk,
				 sizeof(key->sign_pk), NULL, 0);
	memcpy(key->id, hash, sizeof(key->id));
	/* both fail for the few points that would make no secret */
	if (crypto_sign_ed25519_pk_to_curve25519(key->box_pk,
						 key->sign_pk) < 0)
		return -1;
	return crypto_box_beforenm(key->shared, key->box_pk, box_sk);
}

static int
keyring_fill(struct dovetail_keyring *keyring, const char *dir,
	     const ARRAY_TYPE(public_line) *lines, const char **error_r)
{
	unsigned char box_sk[crypto_box_SECRETKEYBYTES];
	const struct public_line *line;
	unsigned int i = 0;
	int ret = 0;

	(void)crypto_sign_ed25519_sk_to_curve25519(box_sk, keyring->sign_sk);
	array_foreach(lines, line) {
		if (public_key_fill(&keyring->keys[i++], line, box_sk) < 0) {
			*error_r = t_strdup_printf(
				"%s holds a key that is not an Ed25519 key; "
				"copy %s.pub from node %s again",
				pub_path(dir, line->node), line->node,
				line->node);
			ret = -1;
			break;
		}
	}
	sodium_memzero(box_sk, sizeof(box_sk));
	return ret;
}

/* Read the public keys: our own lines, of these the one that belongs to sign_pk
   first, and the peers'. */
static int
public_read_all(pool_t pool, const char *dir, const char *node,
		const char *const *peers,
		const unsigned char sign_pk[crypto_sign_PUBLICKEYBYTES],
		ARRAY_TYPE(public_line) *lines, unsigned int *own_count_r,
		const char **error_r)
{
	ARRAY_TYPE(public_line) own;
	struct public_line *self;
	unsigned int i;

	t_array_init(&own, 2);
	if (public_read(dir, node, TRUE, &own, error_r) < 0)
		return -1;
	if (!lines_have(&own, node, sign_pk)) {
		*error_r = t_strdup_printf(
			"%s does not hold the public key of %s; put back the "
			"file that belongs to it, or run: "
			"doveadm dovetail keygen",
			pub_path(dir, node), key_path(dir, node));
		return -1;
	}
	self = array_append_space(lines);
	self->node = node;
	memcpy(self->sign_pk, sign_pk, sizeof(self->sign_pk));
	array_foreach_modifiable(&own, self) {
		if (!lines_have(lines, node, self->sign_pk))
			array_push_back(lines, self);
	}
	*own_count_r = array_count(lines);

	for (i = 0; peers[i] != NULL; i++) {
		if (node_name_check(peers[i], error_r) < 0)
			return -1;
		if (strcmp(peers[i], node) == 0) {
			*error_r = t_strdup_printf(
				"Node %s is its own peer; remove it from the "
				"list of peers", node);
			return -1;
		}
		if (str_array_find(peers + i + 1, peers[i]))
			continue; /* listed twice, read once */
		if (public_read(dir, p_strdup(pool, peers[i]), FALSE,
				lines, error_r) < 0)
			return -1;
	}
	if (array_count(lines) - *own_count_r > DOVETAIL_RECIPIENTS_MAX) {
		*error_r = t_strdup_printf(
			"The peers have more than %u keys; remove old lines "
			"from the .pub files in %s",
			DOVETAIL_RECIPIENTS_MAX, dir);
		return -1;
	}
	return 0;
}

static int
keyring_read(struct dovetail_keyring *keyring, const char *dir,
	     const char *const *peers, const char **error_r)
{
	unsigned char seed[KEY_SIZE], sign_pk[crypto_sign_PUBLICKEYBYTES];
	ARRAY_TYPE(public_line) lines;

	if (secret_read(key_path(dir, keyring->node), keyring->node, seed,
			error_r) < 0)
		return -1;
	keyring->sign_sk = sodium_malloc(crypto_sign_SECRETKEYBYTES);
	if (keyring->sign_sk == NULL) {
		sodium_memzero(seed, sizeof(seed));
		*error_r = t_strdup_printf("sodium_malloc() failed: %m");
		return -1;
	}
	(void)crypto_sign_seed_keypair(sign_pk, keyring->sign_sk, seed);
	sodium_memzero(seed, sizeof(seed));

	t_array_init(&lines, 8);
	if (public_read_all(keyring->pool, dir, keyring->node, peers, sign_pk,
			    &lines, &keyring->own_count, error_r) < 0)
		return -1;
	keyring->count = array_count(&lines);
	keyring->keys = sodium_allocarray(keyring->count,
					  sizeof(keyring->keys[0]));
	if (keyring->keys == NULL) {
		*error_r = t_strdup_printf("sodium_allocarray() failed: %m");
		return -1;
	}
	if (keyring_fill(keyring, dir, &lines, error_r) < 0)
		return -1;
	(void)sodium_mprotect_readonly(keyring->sign_sk);
	(void)sodium_mprotect_readonly(keyring->keys);
	return 0;
}

int dovetail_keyring_open(const char *dir, const char *node,
			  const char *const *peers,
			  struct dovetail_keyring **keyring_r,
			  const char **error_r)
{
	struct dovetail_keyring *keyring;
	pool_t pool;

	*keyring_r = NULL;
	if (keyring_sodium_init(error_r) < 0 ||
	    node_name_check(node, error_r) < 0)
		return -1;
	pool = pool_alloconly_create("dovetail keyring", 512);
	keyring = p_new(pool, struct dovetail_keyring, 1);
	keyring->pool = pool;
	keyring->node = p_strdup(pool, node);
	if (keyring_read(keyring, dir, peers, error_r) < 0) {
		dovetail_keyring_close(&keyring);
		return -1;
	}
	*keyring_r = keyring;
	return 0;
}

void dovetail_keyring_close(struct dovetail_keyring **_keyring)
{
	struct dovetail_keyring *keyring = *_keyring;

	if (keyring == NULL)
		return;
	*_keyring = NULL;
	sodium_free(keyring->sign_sk);
	sodium_free(keyring->keys);
	pool_unref(&keyring->pool);
}

/* ---- using keys ---- */

const char *dovetail_keyring_node(const struct dovetail_keyring *keyring)
{
	return keyring->node;
}

const struct dovetail_public_key *
dovetail_keyring_self(const struct dovetail_keyring *keyring)
{
	return &keyring->keys[0];
}

const unsigned char *
dovetail_keyring_sign_sk(const struct dovetail_keyring *keyring)
{
	return keyring->sign_sk;
}

const struct dovetail_public_key *
dovetail_keyring_peers(const struct dovetail_keyring *keyring,
		       unsigned int *count_r)
{
	*count_r = keyring->count - keyring->own_count;
	return keyring->keys + keyring->own_count;
}

const struct dovetail_public_key *
dovetail_keyring_find(const struct dovetail_keyring *keyring,
		      const unsigned char id[DOVETAIL_KEY_ID_SIZE])
{
	unsigned int i;

	for (i = 0; i < keyring->count; i++) {
		if (memcmp(keyring->keys[i].id, id,
			   DOVETAIL_KEY_ID_SIZE) == 0)
			return &keyring->keys[i];
	}
	return NULL;
}
