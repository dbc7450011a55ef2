#ifndef DOVETAIL_NAME_H
#define DOVETAIL_NAME_H

/* Between a mailbox' virtual name and the path that travels (see
   dovetail-change.h): both nodes may use other hierarchy separators. */

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

#endif
