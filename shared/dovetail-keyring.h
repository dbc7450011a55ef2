#ifndef DOVETAIL_KEYRING_H
#define DOVETAIL_KEYRING_H

/* A node's key pair and its peers' public keys, as files in dovetail_key_dir:

     NAME.key   this node's secret key, mode 0600, one line:
                "dovetail-secret-1 NAME BASE64(32-byte Ed25519 seed)"
     NAME.pub   a node's public keys, one line each:
                "dovetail-public-1 NAME BASE64(32-byte Ed25519 public key)"
                Empty lines and lines starting with # are skipped. While a
                node changes its key, its file holds the old and the new one.

   Both signing (Ed25519) and key agreement (X25519, converted from the same
   key by libsodium) use this pair. */

#include "dovetail-node.h"

#include <sodium.h>

#define DOVETAIL_KEY_ID_SIZE 8

struct dovetail_public_key {
	/* the node it belongs to; lives as long as the keyring */
	const char *node;
	/* the first bytes of BLAKE2b-256 of the Ed25519 public key */
	unsigned char id[DOVETAIL_KEY_ID_SIZE];
	unsigned char sign_pk[crypto_sign_PUBLICKEYBYTES];
	unsigned char box_pk[crypto_box_PUBLICKEYBYTES];
	/* crypto_box_beforenm() of box_pk and our secret key */
	unsigned char shared[crypto_box_BEFORENMBYTES];
};

struct dovetail_keyring;

/* Make a key pair for node: DIR/NAME.key (0600) and DIR/NAME.pub (0644), both
   written completely or not at all; dir is made (0700) when it is missing.
   Refuses when NAME.key exists, unless replace: then the old secret key is kept
   as NAME.key.old and the new public line is added to NAME.pub in front.
   Returns 0 and the public line without newline in line_r (data stack), or -1
   and error_r (data stack). */
int dovetail_keygen(const char *dir, const char *node, bool replace,
		    const char **line_r, const char **error_r);

/* Read the key of node and the public keys of peers (NULL-terminated names)
   from dir. Checks: the secret key is a regular file, readable and writable
   by its owner only, names node, and belongs to a line of NODE.pub; each peer
   has a file whose lines name that peer; no two nodes share a key. Each error
   names the file and what to do about it.
   Returns 0, or -1 and error_r (data stack). Secret parts stand in
   sodium_malloc() memory. */
int dovetail_keyring_open(const char *dir, const char *node,
			  const char *const *peers,
			  struct dovetail_keyring **keyring_r,
			  const char **error_r);
/* Wipes the secret parts. */
void dovetail_keyring_close(struct dovetail_keyring **keyring);

const char *dovetail_keyring_node(const struct dovetail_keyring *keyring);
/* Our own public key. */
const struct dovetail_public_key *
dovetail_keyring_self(const struct dovetail_keyring *keyring);
/* Our secret Ed25519 key, crypto_sign_SECRETKEYBYTES. */
const unsigned char *
dovetail_keyring_sign_sk(const struct dovetail_keyring *keyring);
/* All keys of all peers. */
const struct dovetail_public_key *
dovetail_keyring_peers(const struct dovetail_keyring *keyring,
		       unsigned int *count_r);
/* A peer's key (or our own) by key id; NULL when there is none. */
const struct dovetail_public_key *
dovetail_keyring_find(const struct dovetail_keyring *keyring,
		      const unsigned char id[DOVETAIL_KEY_ID_SIZE]);

#endif
