/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "buffer.h"
#include "byteorder.h"
#include "dovetail-frame.h"

/* What the size field counts: the type byte and the payload. */
#define DOVETAIL_FRAME_BODY_MAX_SIZE (DOVETAIL_FRAME_MAX_SIZE - 4)

size_t dovetail_frame_begin(buffer_t *buf, enum dovetail_frame_type type)
{
	size_t offset = buf->used;

	/* the size is filled in at the end */
	buffer_append_zero(buf, 4);
	buffer_append_c(buf, (unsigned char)type);
	return offset;
}

void dovetail_frame_end(buffer_t *buf, size_t offset)
{
	uint8_t size_be[4];

	i_assert(buf->used >= offset + DOVETAIL_FRAME_HEADER_SIZE);
	i_assert(buf->used - offset <= DOVETAIL_FRAME_MAX_SIZE);

	cpu32_to_be_unaligned((uint32_t)(buf->used - offset - 4), size_be);
	buffer_write(buf, offset, size_be, sizeof(size_be));
}

static bool dovetail_frame_type_is_known(unsigned int type)
{
	return (type >= DOVETAIL_FRAME_HELLO &&
		type <= DOVETAIL_FRAME_HEALTH_GET) ||
		(type >= DOVETAIL_FRAME_WELCOME &&
		 type <= DOVETAIL_FRAME_JOB_PAUSE);
}

int dovetail_frame_parse(const unsigned char *data, size_t size,
			 enum dovetail_frame_type *type_r,
			 const unsigned char **payload_r,
			 size_t *payload_size_r, size_t *frame_size_r,
			 const char **error_r)
{
	uint32_t body_size;

	if (size < 4)
		return 0;
	body_size = be32_to_cpu_unaligned(data);
	if (body_size == 0) {
		*error_r = "Frame without a type";
		return -1;
	}
	if (body_size > DOVETAIL_FRAME_BODY_MAX_SIZE) {
		*error_r = t_strdup_printf("Frame of %u bytes is too large",
					   body_size);
		return -1;
	}
	if (size < DOVETAIL_FRAME_HEADER_SIZE)
		return 0;
	/* before the payload has come: a stranger is noticed at once */
	if (!dovetail_frame_type_is_known(data[4])) {
		*error_r = t_strdup_printf("Unknown frame type %u", data[4]);
		return -1;
	}
	if (size - 4 < body_size)
		return 0;

	*type_r = (enum dovetail_frame_type)data[4];
	*payload_r = data + DOVETAIL_FRAME_HEADER_SIZE;
	*payload_size_r = body_size - 1;
	*frame_size_r = (size_t)body_size + 4;
	return 1;
}
