/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "array.h"
#include "str.h"
#include "unlink-directory.h"
#include "write-full.h"
#include "test-common.h"
#include "dovetail-keyring.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include <sys/stat.h>

static const char *const no_peers[] = { NULL };
static const char *const peer_a[] = { "a", NULL };
static const char *const peer_upper[] = { "B", NULL };
static const char *const peer_b[] = { "b", NULL };
static const char *const peers_bc[] = { "b", "c", NULL };

/* The key directory of the test that runs, and its working directory */
static char *dir, *base_dir;

static void dir_begin(void)
{
	char template[] = "/tmp/test-dovetail-keyring.XXXXXX";

	if (mkdtemp(template) == NULL)
		i_fatal("mkdtemp(%s) failed: %m", template);
	base_dir = i_strdup(template);
	dir = i_strconcat(base_dir, "/keys", NULL);
}

static void dir_end(void)
{
	const char *error;

	if (unlink_directory(base_dir, UNLINK_DIRECTORY_FLAG_RMDIR,
			     &error) < 0)
		i_fatal("unlink_directory(%s) failed: %s", base_dir, error);
	i_free(base_dir);
	i_free(dir);
}

static const char *file_path(const char *name)
{
	return t_strconcat(dir, "/", name, NULL);
}

static const char *file_text(const char *name)
{
	string_t *text = t_str_new(256);
	const char *error;

	if (buffer_append_full_file(text, file_path(name), SIZE_MAX,
				    &error) != BUFFER_APPEND_OK)
		return "";
	return str_c(text);
}

static void file_write(const char *name, mode_t mode, const char *text)
{
	const char *path = file_path(name);
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, mode);

	if (fd == -1 || write_full(fd, text, strlen(text)) < 0 ||
	    fchmod(fd, mode) < 0)
		i_fatal("Cannot write %s: %m", path);
	i_close_fd(&fd);
}

static mode_t file_mode(const char *name)
{
	struct stat st;

	if (stat(file_path(name), &st) < 0)
		return 0;
	return st.st_mode & 07777;
}

static unsigned int files_count(void)
{
	DIR *d = opendir(dir);
	unsigned int count = 0;

	if (d == NULL)
		return 0;
	while (readdir(d) != NULL)
		count++;
	(void)closedir(d);
	return count - 2;
}

static const char *keygen(const char *node)
{
	const char *line, *error;

	if (dovetail_keygen(dir, node, FALSE, &line, &error) < 0)
		i_fatal("keygen: %s", error);
	return line;
}

static struct dovetail_keyring *
ring_open(const char *node, const char *const *peers)
{
	struct dovetail_keyring *keyring;
	const char *error;

	if (dovetail_keyring_open(dir, node, peers, &keyring, &error) < 0) {
		test_assert_strcmp(error, NULL);
		return NULL;
	}
	return keyring;
}

/* The keyring must not open, and the error must name all of words. */
static void
assert_refused(const char *node, const char *const *peers,
	       const char *const *words)
{
	struct dovetail_keyring *keyring = POINTER_CAST(1);
	const char *error = NULL;

	test_assert(dovetail_keyring_open(dir, node, peers, &keyring,
					  &error) < 0);
	test_assert(keyring == NULL);
	test_assert(error != NULL);
	for (; error != NULL && *words != NULL; words++) {
		if (strstr(error, *words) == NULL) {
			/* show both */
			test_assert_strcmp(error, *words);
		}
	}
}
#define assert_refused(node, peers, ...) \
	assert_refused(node, peers, \
		       (const char *const []) { __VA_ARGS__, NULL })

static void test_keyring_names(void)
{
	static const char *const valid[] = {
		"a", "0", "-", ".", "mail-1.example.org",
		"a123456789012345678901234567890123456789012345678901234567890123",
	};
	static const char *const invalid[] = {
		"", "A", "a b", "a/b", "../a", "a_b", "a\n", "\xc3\xa4", "a:b",
		"a1234567890123456789012345678901234567890123456789012345678901234",
	};
	struct dovetail_keyring *keyring;
	const char *line, *error;
	unsigned int i;

	test_begin("keyring node names");
	for (i = 0; i < N_ELEMENTS(valid); i++)
		test_assert_idx(dovetail_node_name_is_valid(valid[i]), i);
	for (i = 0; i < N_ELEMENTS(invalid); i++) {
		test_assert_idx(!dovetail_node_name_is_valid(invalid[i]), i);
		test_assert_idx(dovetail_keygen("/nonexistent", invalid[i],
						FALSE, &line, &error) < 0, i);
		test_assert_idx(strstr(error, "not a node name") != NULL, i);
		test_assert_idx(dovetail_keyring_open("/nonexistent",
			invalid[i], no_peers, &keyring, &error) < 0, i);
		test_assert_idx(strstr(error, "not a node name") != NULL, i);
	}
	test_end();
}

static void test_keygen(void)
{
	const char *line, *key;
	struct stat st;

	test_begin("keygen");
	dir_begin();
	line = keygen("a");
	test_assert(strncmp(line, "dovetail-public-1 a ", 20) == 0);
	test_assert(strlen(line) == 20 + 44);
	test_assert_strcmp(file_text("a.pub"), t_strconcat(line, "\n", NULL));
	key = file_text("a.key");
	test_assert(strncmp(key, "dovetail-secret-1 a ", 20) == 0);
	test_assert(strlen(key) == 20 + 44 + 1);
	test_assert(strstr(key, line + 20) == NULL);
	test_assert(file_mode("a.key") == 0600);
	test_assert(file_mode("a.pub") == 0644);
	test_assert(stat(dir, &st) == 0 && (st.st_mode & 07777) == 0700);
	/* nothing temporary stays */
	test_assert(files_count() == 2);
	dir_end();

	/* ... also not of one that died in between */
	dir_begin();
	if (mkdir(dir, 0700) < 0)
		i_fatal("mkdir(%s) failed: %m", dir);
	file_write("a.key.tmp", 0644, "half a secret");
	file_write("a.pub.tmp", 0600, "half");
	line = keygen("a");
	test_assert_strcmp(file_text("a.pub"), t_strconcat(line, "\n", NULL));
	test_assert(file_mode("a.key") == 0600);
	test_assert(file_mode("a.pub") == 0644);
	test_assert(files_count() == 2);
	dir_end();
	test_end();
}

static void test_keygen_umask(void)
{
	mode_t old = umask(0);

	test_begin("keygen with an unusual umask");
	dir_begin();
	(void)keygen("a");
	umask(0777);
	(void)keygen("b");
	umask(old);
	test_assert(file_mode("a.key") == 0600);
	test_assert(file_mode("a.pub") == 0644);
	test_assert(file_mode("b.key") == 0600);
	test_assert(file_mode("b.pub") == 0644);
	dir_end();
	test_end();
}

static void test_keygen_refused(void)
{
	const char *line, *error, *key;

	test_begin("keygen refused");
	dir_begin();
	(void)keygen("a");
	key = file_text("a.key");
	test_assert(dovetail_keygen(dir, "a", FALSE, &line, &error) < 0);
	test_assert(strstr(error, "a.key exists") != NULL);
	test_assert_strcmp(file_text("a.key"), key);
	test_assert(files_count() == 2);

	/* the public file cannot be put in its place */
	if (mkdir(file_path("b.pub"), 0700) < 0)
		i_fatal("mkdir() failed: %m");
	test_assert(dovetail_keygen(dir, "b", FALSE, &line, &error) < 0);
	test_assert(strstr(error, "b.pub") != NULL);
	test_assert(file_mode("b.key") == 0);
	test_assert(files_count() == 3);

	/* the directory cannot be made */
	test_assert(dovetail_keygen(file_path("a.key/sub"), "a", FALSE,
				    &line, &error) < 0);
	test_assert(strstr(error, "a.key/sub") != NULL);
	dir_end();
	test_end();
}

static void test_keygen_keeps_comments(void)
{
	const char *line;

	test_begin("keygen keeps a public file it finds");
	dir_begin();
	if (mkdir(dir, 0700) < 0)
		i_fatal("mkdir(%s) failed: %m", dir);
	file_write("a.pub", 0644, "# a comment\n");
	line = keygen("a");
	test_assert_strcmp(file_text("a.pub"),
			   t_strconcat(line, "\n# a comment\n", NULL));
	dir_end();
	test_end();
}

static void test_keyring(void)
{
	struct dovetail_keyring *a, *b;
	const struct dovetail_public_key *peers, *self;
	unsigned char hash[32];
	unsigned int count;

	test_begin("keyring");
	dir_begin();
	(void)keygen("a");
	(void)keygen("b");
	(void)keygen("c");
	a = ring_open("a", peers_bc);
	b = ring_open("b", (const char *const []) { "a", "a", NULL });
	if (a == NULL || b == NULL)
		i_fatal("no keyrings");

	test_assert_strcmp(dovetail_keyring_node(a), "a");
	self = dovetail_keyring_self(a);
	test_assert_strcmp(self->node, "a");
	test_assert(memcmp(dovetail_keyring_sign_sk(a) + 32, self->sign_pk,
			   sizeof(self->sign_pk)) == 0);
	crypto_generichash(hash, sizeof(hash), self->sign_pk,
			   sizeof(self->sign_pk), NULL, 0);
	test_assert(memcmp(self->id, hash, sizeof(self->id)) == 0);

	peers = dovetail_keyring_peers(a, &count);
	test_assert(count == 2);
	test_assert_strcmp(peers[0].node, "b");
	test_assert_strcmp(peers[1].node, "c");
	test_assert(memcmp(peers[0].shared, peers[1].shared,
			   sizeof(peers[0].shared)) != 0);
	test_assert(dovetail_keyring_find(a, peers[1].id) == &peers[1]);
	test_assert(dovetail_keyring_find(a, self->id) == self);
	test_assert(dovetail_keyring_find(b, peers[1].id) == NULL);

	/* both ends have the same secret; a peer listed twice is one */
	self = dovetail_keyring_peers(b, &count);
	test_assert(count == 1);
	test_assert(memcmp(self->shared, peers[0].shared,
			   sizeof(self->shared)) == 0);
	test_assert(memcmp(self->sign_pk, dovetail_keyring_self(a)->sign_pk,
			   sizeof(self->sign_pk)) == 0);
	dovetail_keyring_close(&a);
	dovetail_keyring_close(&b);
	test_assert(a == NULL && b == NULL);
	dovetail_keyring_close(&a);
	dir_end();
	test_end();
}

static void test_keyring_public_lines(void)
{
	struct dovetail_keyring *a;
	const char *b;
	unsigned int count;

	test_begin("keyring comments, empty lines, line ends");
	dir_begin();
	(void)keygen("a");
	b = keygen("b");
	file_write("b.pub", 0644, t_strdup_printf(
		"# of node b\n\n%s\r\n%s\n#\n%s", b, b, b));
	a = ring_open("a", peer_b);
	if (a != NULL) {
		(void)dovetail_keyring_peers(a, &count);
		test_assert(count == 1);
	}
	dovetail_keyring_close(&a);

	file_write("a.key", 0600,
		   t_strcut(file_text("a.key"), '\n'));
	a = ring_open("a", peer_b);
	test_assert(a != NULL);
	dovetail_keyring_close(&a);
	file_write("a.key", 0400,
		   t_strconcat(file_text("a.key"), "\r\n", NULL));
	a = ring_open("a", no_peers);
	test_assert(a != NULL);
	dovetail_keyring_close(&a);
	dir_end();
	test_end();
}

static void test_keyring_rotation(void)
{
	struct dovetail_keyring *a, *b;
	const struct dovetail_public_key *peers, *self;
	const char *old_line, *old_key, *line, *error;
	unsigned char old_id[DOVETAIL_KEY_ID_SIZE];
	unsigned int count;

	test_begin("keyring rotation");
	dir_begin();
	old_line = keygen("a");
	(void)keygen("b");
	old_key = file_text("a.key");
	a = ring_open("a", no_peers);
	memcpy(old_id, dovetail_keyring_self(a)->id, sizeof(old_id));
	dovetail_keyring_close(&a);

	test_assert(dovetail_keygen(dir, "a", TRUE, &line, &error) == 0);
	test_assert(strcmp(line, old_line) != 0);
	test_assert_strcmp(file_text("a.key.old"), old_key);
	test_assert(file_mode("a.key.old") == 0600);
	test_assert(file_mode("a.key") == 0600);
	test_assert(strcmp(file_text("a.key"), old_key) != 0);
	test_assert_strcmp(file_text("a.pub"),
			   t_strconcat(line, "\n", old_line, "\n", NULL));
	test_assert(files_count() == 5);

	/* the peer knows both keys, the new one first */
	b = ring_open("b", peer_a);
	peers = dovetail_keyring_peers(b, &count);
	test_assert(count == 2);
	test_assert_strcmp(peers[0].node, "a");
	test_assert_strcmp(peers[1].node, "a");
	test_assert(memcmp(peers[1].id, old_id, sizeof(old_id)) == 0);
	test_assert(dovetail_keyring_find(b, old_id) == &peers[1]);

	/* the node itself uses the new key, but knows what it once signed */
	a = ring_open("a", peer_b);
	self = dovetail_keyring_self(a);
	test_assert(memcmp(self->id, peers[0].id, sizeof(old_id)) == 0);
	test_assert(dovetail_keyring_find(a, old_id) != NULL);
	test_assert_strcmp(dovetail_keyring_find(a, old_id)->node, "a");
	(void)dovetail_keyring_peers(a, &count);
	test_assert(count == 1);
	dovetail_keyring_close(&a);
	dovetail_keyring_close(&b);

	/* until the public file has reached the peer, the old key can be put
	   back */
	if (rename(file_path("a.key.old"), file_path("a.key")) < 0)
		i_fatal("rename() failed: %m");
	a = ring_open("a", peer_b);
	test_assert(memcmp(dovetail_keyring_self(a)->id, old_id,
			   sizeof(old_id)) == 0);
	dovetail_keyring_close(&a);

	/* twice in a row: the older secret key is gone, its line stays */
	test_assert(dovetail_keygen(dir, "a", TRUE, &line, &error) == 0);
	test_assert(dovetail_keygen(dir, "a", TRUE, &line, &error) == 0);
	b = ring_open("b", peer_a);
	(void)dovetail_keyring_peers(b, &count);
	test_assert(count == 4);
	dovetail_keyring_close(&b);

	/* replace also makes a first key */
	test_assert(dovetail_keygen(dir, "c", TRUE, &line, &error) == 0);
	test_assert(file_mode("c.key") == 0600);
	test_assert(file_mode("c.key.old") == 0);
	dir_end();
	test_end();
}

static void test_keyring_secret_refused(void)
{
	static const mode_t modes[] = { 0640, 0604, 0620, 0610, 0602, 0601 };
	const char *good, *old, *line, *error;
	unsigned int i;

	test_begin("keyring secret key refused");
	dir_begin();
	assert_refused("a", no_peers, "a.key does not exist",
		       "doveadm dovetail keygen");
	(void)keygen("a");
	(void)keygen("b");
	good = file_text("a.key");

	for (i = 0; i < N_ELEMENTS(modes); i++) {
		file_write("a.key", modes[i], good);
		assert_refused("a", no_peers, "a.key is ", "le by others",
			       t_strconcat("run chmod 600 ",
					   file_path("a.key"), NULL),
			       t_strdup_printf("%04o", modes[i]));
	}
	file_write("a.key", 0600, "");
	assert_refused("a", no_peers, "a.key", "does not start");
	file_write("a.key", 0600, "hello\n");
	assert_refused("a", no_peers, "a.key", "does not start");
	file_write("a.key", 0600, "dovetail-secret-2 a AAAA\n");
	assert_refused("a", no_peers, "a.key", "does not start");
	file_write("a.key", 0600, "dovetail-secret-1\n");
	assert_refused("a", no_peers, "a.key", "does not start");
	file_write("a.key", 0600, "dovetail-secret-1 a\n");
	assert_refused("a", no_peers, "a.key", "has no key");
	file_write("a.key", 0600, "dovetail-secret-1 a \n");
	assert_refused("a", no_peers, "a.key", "32 bytes of base64");
	file_write("a.key", 0600, "dovetail-secret-1 a &&&&\n");
	assert_refused("a", no_peers, "a.key", "32 bytes of base64");
	file_write("a.key", 0600, t_strconcat(good, good, NULL));
	assert_refused("a", no_peers, "a.key", "more than one line");
	/* one byte of key less, one more */
	file_write("a.key", 0600, "dovetail-secret-1 a "
		   "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA==\n");
	assert_refused("a", no_peers, "a.key", "32 bytes of base64");
	file_write("a.key", 0600, "dovetail-secret-1 a "
		   "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\n");
	assert_refused("a", no_peers, "a.key", "32 bytes of base64");
	file_write("a.key", 0600, file_text("b.key"));
	assert_refused("a", no_peers, "a.key", "names node b, not a");
	/* the other node's key under our name */
	file_write("a.key", 0600, t_strconcat("dovetail-secret-1 a ",
					      file_text("b.key") + 20, NULL));
	assert_refused("a", no_peers, "a.pub", "does not hold the public key");

	/* no error shows a key, wherever it stands in the line */
	file_write("a.key", 0600, t_strconcat("dovetail-secret-1 ",
		t_strcut(good + 20, '\n'), " a\n", NULL));
	assert_refused("a", no_peers, "names no node");
	{
		struct dovetail_keyring *keyring;

		test_assert(dovetail_keyring_open(dir, "a", no_peers, &keyring,
						  &error) < 0);
		test_assert(strstr(error, t_strndup(good + 20, 20)) == NULL);
	}

	file_write("a.key", 0600, good);
	old = file_text("a.pub");
	i_unlink(file_path("a.pub"));
	assert_refused("a", no_peers, "a.pub does not exist");
	/* as after an interrupted keygen: replacing heals it */
	test_assert(dovetail_keygen(dir, "a", TRUE, &line, &error) == 0);
	assert_refused("a", peer_a,
		       "is its own peer");
	file_write("a.pub", 0644, old);
	assert_refused("a", no_peers, "a.pub", "does not hold the public key");

	i_unlink(file_path("a.key"));
	if (mkdir(file_path("a.key"), 0700) < 0)
		i_fatal("mkdir() failed: %m");
	assert_refused("a", no_peers, "a.key is not a regular file");
	if (rmdir(file_path("a.key")) < 0 ||
	    mkfifo(file_path("a.key"), 0600) < 0)
		i_fatal("mkfifo() failed: %m");
	assert_refused("a", no_peers, "a.key is not a regular file");
	dir_end();
	test_end();
}

static void test_keyring_peers_refused(void)
{
	/* (0, 1), of order 1: anybody could know secrets made with it */
	static const char weak[] = "dovetail-public-1 b "
		"AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n";
	const char *a, *b, *c;
	string_t *many = t_str_new(8192);
	unsigned int i;

	test_begin("keyring peers refused");
	dir_begin();
	a = keygen("a");
	assert_refused("a", peer_b, "b.pub does not exist",
		       "copy b.pub from node b");
	b = keygen("b");
	c = keygen("c");
	assert_refused("a", peer_upper,
		       "'B' is not a node name");

	file_write("b.pub", 0644, "");
	assert_refused("a", peer_b, "b.pub holds no key", "from node b");
	file_write("b.pub", 0644, "# nothing\n");
	assert_refused("a", peer_b, "b.pub holds no key");
	file_write("b.pub", 0644, t_strconcat(c, "\n", NULL));
	assert_refused("a", peer_b, "b.pub line 1", "names node c, not b");
	file_write("b.pub", 0644, t_strconcat("#\n", b, "\n", c, "\n", NULL));
	assert_refused("a", peer_b, "b.pub line 3", "names node c, not b");
	file_write("b.pub", 0644, "dovetail-public-1 b AAAA*AAA\n");
	assert_refused("a", peer_b, "b.pub line 1", "32 bytes of base64");
	file_write("b.pub", 0644, t_strconcat(b, " trailing\n", NULL));
	assert_refused("a", peer_b, "b.pub line 1", "32 bytes of base64");
	file_write("b.pub", 0644, file_text("b.key"));
	assert_refused("a", peer_b, "b.pub line 1", "is a secret key");
	file_write("b.pub", 0644, weak);
	assert_refused("a", peer_b, "b.pub", "not an Ed25519 key");
	for (i = 0; i < 3000; i++)
		str_append_c(many, 'x');
	file_write("b.pub", 0644, str_c(many));
	assert_refused("a", peer_b, "b.pub) failed: Line is too long",
		       "copy b.pub from node b");

	/* two nodes, one key */
	file_write("b.pub", 0644, t_strconcat("dovetail-public-1 b ",
					      c + 20, "\n", NULL));
	assert_refused("a", peers_bc, "c.pub line 1",
		       "is the key of node b also");
	file_write("b.pub", 0644, t_strconcat("dovetail-public-1 b ",
					      a + 20, "\n", NULL));
	assert_refused("a", peer_b, "b.pub line 1",
		       "is the key of node a also");

	/* more keys than an entry can have recipients */
	str_truncate(many, 0);
	for (i = 0; i < 65; i++) {
		unsigned char pk[32], sk[64];
		char base64[64];

		crypto_sign_keypair(pk, sk);
		sodium_bin2base64(base64, sizeof(base64), pk, sizeof(pk),
				  sodium_base64_VARIANT_ORIGINAL);
		str_printfa(many, "dovetail-public-1 b %s\n", base64);
	}
	file_write("b.pub", 0644, str_c(many));
	assert_refused("a", peer_b, "more than 64 keys");
	dir_end();
	test_end();
}

int main(void)
{
	static void (*const test_functions[])(void) = {
		test_keyring_names,
		test_keygen,
		test_keygen_umask,
		test_keygen_refused,
		test_keygen_keeps_comments,
		test_keyring,
		test_keyring_public_lines,
		test_keyring_rotation,
		test_keyring_secret_refused,
		test_keyring_peers_refused,
		NULL
	};
	return test_run(test_functions);
}
