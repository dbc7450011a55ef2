/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "buffer.h"
#include "test-common.h"
#include "dovetail-compat.h"
#include "dovetail-frame.h"

struct frame {
	enum dovetail_frame_type type;
	const unsigned char *payload;
	size_t payload_size, size;
};

static int parse(const void *data, size_t size, struct frame *frame_r,
		 const char **error_r)
{
	unsigned char *copy;
	int ret;

	/* exactly as large as it says: a read past its end is noticed */
	*error_r = NULL;
	copy = i_malloc(I_MAX(size, 1));
	memcpy(copy, data, size);
	ret = dovetail_frame_parse(copy, size, &frame_r->type,
				   &frame_r->payload, &frame_r->payload_size,
				   &frame_r->size, error_r);
	if (ret > 0) {
		frame_r->payload = (const unsigned char *)data +
			(frame_r->payload - copy);
	}
	i_free(copy);
	return ret;
}

static void test_dovetail_frame_bytes(void)
{
	static const unsigned char expected[] = {
		'x',
		0, 0, 0, 4, DOVETAIL_FRAME_MARK, 2, 'm', 'e',
		0, 0, 0, 1, DOVETAIL_FRAME_WORK,
	};
	struct frame frame;
	const unsigned char *data;
	const char *error;
	buffer_t *buf = t_buffer_create(64);
	size_t offset, i;

	test_begin("dovetail frame: bytes");
	buffer_append_c(buf, 'x');
	offset = dovetail_frame_begin(buf, DOVETAIL_FRAME_MARK);
	test_assert(offset == 1);
	buffer_append(buf, "\002me", 3);
	dovetail_frame_end(buf, offset);
	/* no payload at all */
	offset = dovetail_frame_begin(buf, DOVETAIL_FRAME_WORK);
	dovetail_frame_end(buf, offset);
	test_assert_memcmp(buf->data, buf->used, expected, sizeof(expected));

	data = CONST_PTR_OFFSET(buf->data, 1);
	for (i = 0; i < 8; i++)
		test_assert_idx(parse(data, i, &frame, &error) == 0, i);
	/* what follows is none of its business */
	for (; i < buf->used; i++) {
		test_assert_idx(parse(data, i, &frame, &error) == 1, i);
		test_assert_idx(frame.type == DOVETAIL_FRAME_MARK, i);
		test_assert_memcmp_idx(frame.payload, frame.payload_size,
				       "\002me", 3, i);
		test_assert_idx(frame.payload == data + 5, i);
		test_assert_idx(frame.size == 8, i);
	}
	test_assert(parse(data + 8, 5, &frame, &error) == 1);
	test_assert(frame.type == DOVETAIL_FRAME_WORK);
	test_assert(frame.payload_size == 0 && frame.size == 5);
	test_end();
}

static void test_dovetail_frame_limits(void)
{
	struct frame frame;
	const char *error;
	buffer_t *buf = buffer_create_dynamic(default_pool, 1024);
	size_t offset;

	test_begin("dovetail frame: limits");
	offset = dovetail_frame_begin(buf, DOVETAIL_FRAME_CHANGE);
	buffer_append_zero(buf, DOVETAIL_FRAME_MAX_SIZE -
			   DOVETAIL_FRAME_HEADER_SIZE);
	dovetail_frame_end(buf, offset);
	test_assert(buf->used == DOVETAIL_FRAME_MAX_SIZE);
	test_assert(parse(buf->data, buf->used, &frame, &error) == 1);
	test_assert(frame.payload_size == DOVETAIL_FRAME_MAX_SIZE -
		    DOVETAIL_FRAME_HEADER_SIZE);
	test_assert(frame.size == DOVETAIL_FRAME_MAX_SIZE);
	test_assert(parse(buf->data, buf->used - 1, &frame, &error) == 0);
	buffer_free(&buf);

	test_assert(parse("\x00\x40\x03\xfc\x05", 5, &frame, &error) == 0);
	/* one more, before any more bytes come */
	test_assert(parse("\x00\x40\x03\xfd", 4, &frame, &error) == -1);
	test_assert_strcmp(error, "Frame of 4195325 bytes is too large");
	test_assert(parse("\xff\xff\xff\xff\x01", 5, &frame, &error) == -1);
	test_assert_strcmp(error, "Frame of 4294967295 bytes is too large");
	test_assert(parse("\x00\x00\x00\x00", 4, &frame, &error) == -1);
	test_assert_strcmp(error, "Frame without a type");
	test_end();
}

static void test_dovetail_frame_types(void)
{
	unsigned char data[5] = { 0, 0, 0, 1, 0 };
	struct frame frame;
	const char *error;
	unsigned int i;
	bool known;

	test_begin("dovetail frame: types");
	for (i = 0; i < 256; i++) {
		data[4] = i;
		known = (i >= 1 && i <= 17) || (i >= 65 && i <= 72);
		test_assert_idx(parse(data, 5, &frame, &error) ==
				(known ? 1 : -1), i);
		if (known)
			test_assert_idx(frame.type == i, i);
	}
	test_assert_strcmp(error, "Unknown frame type 255");
	/* known to be wrong before the payload is there */
	test_assert(parse("\x00\x00\x10\x00" "z", 5, &frame, &error) == -1);
	test_assert(parse("GET / HTTP/1.1\r\n", 16, &frame, &error) == -1);
	test_end();
}

int main(void)
{
	static void (*const test_functions[])(void) = {
		test_dovetail_frame_bytes,
		test_dovetail_frame_limits,
		test_dovetail_frame_types,
		NULL
	};
	return test_run(test_functions);
}
