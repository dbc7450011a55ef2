#ifndef FUZZ_COMMON_H
#define FUZZ_COMMON_H

/* What the fuzz targets have in common. A target is one fuzz-NAME.c with
   LLVMFuzzerTestOneInput() in it; "fuzz" builds and runs them, and says how.

   Besides what the sanitizers see, a target says with fuzz_assert() what must
   hold for each input. Memory that is to be watched comes from malloc(): the
   address sanitizer does not see inside Dovecot's pools and data stack, so
   decoders get fuzz_pool(). */

#include "lib.h"
#include "buffer.h"

#define fuzz_assert(expr) \
	((expr) ? (void)0 : fuzz_failed(#expr, __FILE__, __LINE__))
void fuzz_failed(const char *what, const char *file, int line) ATTR_NORETURN;

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Each target has one: called once, before the first input. Dovecot's library
   and libsodium are initialized, and nothing is logged. */
void fuzz_init(void);

/* Each allocation is one of malloc(). */
pool_t fuzz_pool(void);

/* ---- a cursor over the input; at its end it gives zeros ---- */

struct fuzz_input {
	const uint8_t *data;
	size_t size;
};

uint8_t fuzz_get_u8(struct fuzz_input *in);
uint16_t fuzz_get_u16(struct fuzz_input *in);
uint64_t fuzz_get_u64(struct fuzz_input *in);
/* At most size bytes. */
const uint8_t *fuzz_get_bytes(struct fuzz_input *in, size_t size,
			      size_t *size_r);
/* u16 size, and so many bytes. */
const uint8_t *fuzz_get_block(struct fuzz_input *in, size_t *size_r);
/* The same as a string (data stack): up to the first NUL. */
const char *fuzz_get_str(struct fuzz_input *in);

/* ---- files ---- */

/* An empty directory, below $TMPDIR; removed at the end. */
extern const char *fuzz_dir;
/* FUZZ_DIR/NAME, on the data stack. */
const char *fuzz_path(const char *name);
void fuzz_write_file(const char *path, int mode, const void *data, size_t size);
/* All files of the directory path; no directories. */
void fuzz_remove_files(const char *path);
/* The keys of test/vectors/keys.txt, as files in the directory "keys". */
void fuzz_write_keys(void);
/* The keyring of node in it; peers is NULL-terminated. */
struct dovetail_keyring *
fuzz_keyring(const char *node, const char *const *peers);

/* ---- the ioloop ---- */

/* What is ready now gets its turn, once. */
void fuzz_run_ioloop(void);

/* ---- changes ---- */

/* Decode data as a change, both ways, and say what must hold: what is accepted
   encodes to the same bytes, what is refused has a reason. Returns TRUE when it
   was accepted. */
bool fuzz_change(const void *data, size_t size);

#endif
