/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "dovetail-node.h"

size_t dovetail_node_name_size(const char *text)
{
	size_t size = strspn(text, "abcdefghijklmnopqrstuvwxyz0123456789.-");

	return size <= DOVETAIL_NODE_NAME_MAX ? size : 0;
}

bool dovetail_node_name_is_valid(const char *name)
{
	size_t size = dovetail_node_name_size(name);

	return size > 0 && name[size] == '\0';
}
