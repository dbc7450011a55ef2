#ifndef DOVETAIL_NODE_H
#define DOVETAIL_NODE_H

/* Node names are 1..64 of [a-z0-9.-]: safe in file names, Redis keys and log
   lines. */
#define DOVETAIL_NODE_NAME_MAX 64

/* Size of the node name at the start of text; 0 when there is none. */
size_t dovetail_node_name_size(const char *text);
/* TRUE when name is a node name and nothing else. */
bool dovetail_node_name_is_valid(const char *name);

#endif
