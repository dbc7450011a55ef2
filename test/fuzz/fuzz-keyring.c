/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* dovetail-keyring: the files of dovetail_key_dir, which were copied by hand.
   Input: blocks: a.key, a.pub, b.pub, c.pub. In them, \1..\4 stand for the right
   line of each file (without newline), \5 for an old line of a's.
   Must hold: what is accepted has a's key, keys of the right nodes and each key
   once; what is refused is told without showing the secret key. */

#include "fuzz-common.h"
#include "str.h"
#include "dovetail-keyring.h"

#include <stdio.h>
#include <sys/stat.h>

static const char *const names[] = { "a.key", "a.pub", "b.pub", "c.pub" };
static const char *const peers[] = { "b", "c", NULL };
/* lines[5]: the old one of a; the secret key alone */
static char lines[N_ELEMENTS(names) + 1][128], secret[64];
static char *dir;

void fuzz_init(void)
{
	unsigned int i;
	FILE *in;

	fuzz_write_keys();
	for (i = 0; i < N_ELEMENTS(names); i++) {
		in = fopen(t_strconcat(fuzz_path("keys/"), names[i], NULL),
			   "r");
		fuzz_assert(in != NULL &&
			    fgets(lines[i], sizeof(lines[i]), in) != NULL);
		if (i == 1) {
			fuzz_assert(fgets(lines[4], sizeof(lines[4]),
					  in) != NULL);
			lines[4][strcspn(lines[4], "\n")] = '\0';
		}
		lines[i][strcspn(lines[i], "\n")] = '\0';
		fclose(in);
	}
	i_strocpy(secret, strrchr(lines[0], ' ') + 1, sizeof(secret));
	dir = i_strdup(fuzz_path("fuzzed"));
	fuzz_assert(mkdir(dir, 0700) == 0);
}

static void write_file(const char *name, const uint8_t *data, size_t size)
{
	string_t *str = t_str_new(256);
	size_t i;

	for (i = 0; i < size; i++) {
		if (data[i] >= 1 && data[i] <= N_ELEMENTS(lines))
			str_append(str, lines[data[i] - 1]);
		else
			str_append_c(str, data[i]);
	}
	fuzz_write_file(t_strconcat(dir, "/", name, NULL), 0600,
			str_data(str), str_len(str));
}

static void check_key(const struct dovetail_keyring *keyring,
		      const struct dovetail_public_key *key)
{
	/* found by its id: no other one has it */
	fuzz_assert(dovetail_keyring_find(keyring, key->id) == key);
	fuzz_assert(sodium_is_zero(key->shared, sizeof(key->shared)) == 0);
}

static void check_keyring(const struct dovetail_keyring *keyring)
{
	const struct dovetail_public_key *keys, *self;
	unsigned int i, count;

	self = dovetail_keyring_self(keyring);
	fuzz_assert(strcmp(dovetail_keyring_node(keyring), "a") == 0);
	fuzz_assert(strcmp(self->node, "a") == 0);
	fuzz_assert(memcmp(dovetail_keyring_sign_sk(keyring) + 32,
			   self->sign_pk, sizeof(self->sign_pk)) == 0);
	check_key(keyring, self);
	keys = dovetail_keyring_peers(keyring, &count);
	fuzz_assert(count >= 2 && count <= 64);
	for (i = 0; i < count; i++) {
		fuzz_assert(strcmp(keys[i].node, "b") == 0 ||
			    strcmp(keys[i].node, "c") == 0);
		check_key(keyring, &keys[i]);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct fuzz_input in = { data, size };
	struct dovetail_keyring *keyring;
	const char *error = NULL;
	const uint8_t *bytes;
	size_t bytes_size;
	unsigned int i;

	T_BEGIN {
		for (i = 0; i < N_ELEMENTS(names); i++) {
			bytes = fuzz_get_block(&in, &bytes_size);
			write_file(names[i], bytes, bytes_size);
		}
		if (dovetail_keyring_open(dir, "a", peers, &keyring,
					  &error) == 0) {
			check_keyring(keyring);
			dovetail_keyring_close(&keyring);
		} else {
			fuzz_assert(error != NULL && *error != '\0');
			fuzz_assert(strstr(error, secret) == NULL);
		}
		fuzz_assert(keyring == NULL);
	} T_END;
	return 0;
}
