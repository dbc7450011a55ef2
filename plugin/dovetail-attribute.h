#ifndef DOVETAIL_ATTRIBUTE_H
#define DOVETAIL_ATTRIBUTE_H

/* A mailbox's attributes (METADATA): what is stored in the user's dict, not what
   Dovecot or another plugin makes up. Not those of Pigeonhole (Sieve scripts) and of
   the acl plugin, which are stored elsewhere.

   v is whom to ask: box->v, or what stands below other plugins.
   What is returned is on the data stack. */

#include "dovetail-change.h"

struct mailbox;
struct mailbox_vfuncs;

/* FALSE: attributes with this key stay here. */
bool dovetail_attribute_travels(const struct dovetail_attribute *attribute);
/* Fill in the value that the attribute with this key has; NULL: none.
   Returns 1: done.  0: this node keeps no attributes (mail_attribute_dict is not
   set).  -1: failed, error_r. */
int dovetail_attribute_get(struct mailbox *box, const struct mailbox_vfuncs *v,
			   struct dovetail_attribute *attribute,
			   const char **error_r);
/* A value that is too large to travel becomes NULL: FALSE. */
bool dovetail_attribute_limit(struct dovetail_attribute *attribute);
/* Add all that travel, in their order. Returns 1: done.  0: there is nothing to be
   said of them, error_r: why (no dict, or more than travel).  -1: failed,
   error_r. */
int dovetail_attributes_get(struct mailbox *box, const struct mailbox_vfuncs *v,
			    ARRAY_TYPE(dovetail_attribute) *attributes,
			    const char **error_r);
/* Of all of a mailbox, in their order. Never all zero. */
void dovetail_attributes_hash(const ARRAY_TYPE(dovetail_attribute) *attributes,
			      uint8_t hash_r[DOVETAIL_ATTRIBUTES_HASH_SIZE]);

#endif
