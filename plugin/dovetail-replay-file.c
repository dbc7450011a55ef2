/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "guid.h"
#include "istream.h"
#include "str.h"
#include "strescape.h"
#include "dovetail-node.h"
#include "dovetail-replay.h"

#include <fcntl.h>
#include <unistd.h>

static void file_read_line(const char *line, replay_file_callback_t *callback)
{
	const char *const *fields = t_strsplit_tabescaped(line);
	guid_128_t guid;

	if (str_array_length(fields) == 4 &&
	    dovetail_node_name_is_valid(fields[1]) &&
	    guid_128_from_string(fields[2], guid) == 0)
		callback(fields[0], fields[1], guid, fields[3]);
}

void replay_file_open(struct replay_file *file, const char *name,
		      replay_file_callback_t *callback)
{
	struct istream *input;
	const char *line;

	file->path = i_strdup_printf("%s/%s.%u", replay.dir, name, replay.slot);
	file->unsaved = FALSE;
	file->fd = open(file->path, O_RDWR | O_CREAT, 0600);
	if (file->fd == -1)
		i_fatal("open(%s) failed: %m", file->path);
	input = i_stream_create_fd(file->fd, SIZE_MAX);
	while ((line = i_stream_read_next_line(input)) != NULL) T_BEGIN {
		file_read_line(line, callback);
	} T_END;
	i_stream_unref(&input);
}

void replay_file_add(string_t *str, const char *user, const char *origin,
		     const guid_128_t guid, const char *path)
{
	str_append_tabescaped(str, user);
	str_append_c(str, '\t');
	str_append_tabescaped(str, origin);
	str_printfa(str, "\t%s\t", guid_128_to_string(guid));
	str_append_tabescaped(str, path);
	str_append_c(str, '\n');
}

void replay_file_write(struct replay_file *file, const string_t *str)
{
	/* in this order: when the disk is full, what was there stays */
	errno = ENOSPC;
	if (pwrite(file->fd, str_data(str), str_len(str), 0) ==
	    (ssize_t)str_len(str) &&
	    ftruncate(file->fd, str_len(str)) == 0) {
		file->unsaved = FALSE;
		return;
	}
	if (!file->unsaved) {
		e_error(replay.event, "Cannot write %s: %m (trying again)",
			file->path);
	}
	file->unsaved = TRUE;
}

void replay_file_close(struct replay_file *file)
{
	i_free(file->path);
	i_close_fd(&file->fd);
}
