#ifndef DOVETAIL_NAME_H
#define DOVETAIL_NAME_H

/* Between a mailbox' virtual name and the path that travels (see
   dovetail-change.h): both nodes may use other hierarchy separators. */

#include "guid.h"

struct mail_user;
struct mail_namespace;

/* TRUE: the namespace's mailboxes are the user's own and replicated. An alias
   shows mailboxes of another namespace. */
bool dovetail_namespace_is_own(const struct mail_namespace *ns,
			       const struct mail_user *user);

/* vname of a mailbox of ns as a path. Data stack. */
const char *dovetail_name_to_path(struct mail_namespace *ns, const char *vname);

/* The namespace of user and the virtual name in it for a path. Returns 0, or -1
   and error_r: no namespace takes such a name, or a component contains the
   separator used here. All data stack. */
int dovetail_name_from_path(struct mail_user *user, const char *path,
			    struct mail_namespace **ns_r, const char **vname_r,
			    const char **error_r);

/* Where a replica gathers messages for a mailbox that lacks them: the virtual name
   in ns (data stack). Such a mailbox is nobody's but the replay service's: it is
   neither queued nor compared. */
const char *dovetail_name_of_parts(struct mail_namespace *ns,
				   const guid_128_t guid);
/* TRUE: it is one, for the mailbox with this GUID. */
bool dovetail_name_is_parts(struct mail_namespace *ns, const char *vname,
			    guid_128_t guid_r);

/* Where a replica keeps what it alone has: the virtual name in ns of the n-th such
   folder (data stack). n counts from 1; there are more when the primary has one. */
const char *dovetail_name_of_kept(struct mail_namespace *ns, unsigned int n);
/* TRUE: it is one, or a mailbox below one. To a replica it is its own, unless it
   came from the primary; to a primary it is a mailbox as others are. */
bool dovetail_name_is_kept(struct mail_namespace *ns, const char *vname);

#endif
