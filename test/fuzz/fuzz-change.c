/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* dovetail-wire: changes, as a replica finds them in an entry and the queue
   service in a frame.
   Input: one change.
   Must hold: fuzz_change(); the primitives give what they are put, whatever
   was read before. */

#include "fuzz-common.h"
#include "array.h"
#include "dovetail-wire.h"

void fuzz_init(void)
{
}

/* Read the input as any sequence of primitives, as its bytes say, and write
   what came out: that must be the same bytes. */
static void primitives(const uint8_t *data, size_t size)
{
	ARRAY_TYPE(seq_range) uids;
	struct dovetail_wire_reader r;
	const unsigned char *start;
	const void *bytes;
	guid_128_t guid;
	size_t bytes_size;
	buffer_t *buf;
	pool_t pool;

	pool = fuzz_pool();
	buf = buffer_create_dynamic(pool, 64);
	dovetail_wire_reader_init(&r, data, size);
	while (r.pos < r.end) {
		buffer_set_used_size(buf, 0);
		switch (dovetail_wire_get_u8(&r) % 7) {
		case 0:
			start = r.pos;
			dovetail_wire_put_num(buf, dovetail_wire_get_num(&r));
			break;
		case 1:
			start = r.pos;
			dovetail_wire_put_snum(buf, dovetail_wire_get_snum(&r));
			break;
		case 2:
			start = r.pos;
			dovetail_wire_put_num(buf, dovetail_wire_get_num32(&r));
			break;
		case 3:
			start = r.pos;
			bytes = dovetail_wire_get_bytes(&r, &bytes_size);
			fuzz_assert((bytes == NULL) == r.failed);
			if (bytes != NULL) {
				dovetail_wire_put_bytes(buf, bytes,
							bytes_size);
			}
			break;
		case 4:
			start = r.pos;
			dovetail_wire_put_str(buf,
				dovetail_wire_get_str(&r, pool));
			break;
		case 5:
			start = r.pos;
			dovetail_wire_get_guid(&r, guid);
			dovetail_wire_put_guid(buf, guid);
			break;
		default:
			start = r.pos;
			p_array_init(&uids, pool, 1);
			dovetail_wire_get_uids(&r, &uids);
			if (!r.failed)
				dovetail_wire_put_uids(buf, &uids);
			break;
		}
		if (r.failed) {
			fuzz_assert(!dovetail_wire_reader_done(&r));
			break;
		}
		fuzz_assert(buf->used == (size_t)(r.pos - start) &&
			    memcmp(buf->data, start, buf->used) == 0);
	}
	/* once failed, for ever */
	if (r.failed) {
		fuzz_assert(dovetail_wire_get_num(&r) == 0);
		fuzz_assert(dovetail_wire_get_u8(&r) == 0);
		fuzz_assert(dovetail_wire_get_raw(&r, 0) == NULL);
		fuzz_assert(*dovetail_wire_get_str(&r, pool) == '\0');
	} else
		fuzz_assert(dovetail_wire_reader_done(&r));
	pool_unref(&pool);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	T_BEGIN {
		(void)fuzz_change(data, size);
		primitives(data, size);
	} T_END;
	return 0;
}
