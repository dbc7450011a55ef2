/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "mail-user.h"
#include "mail-namespace.h"
#include "mail-storage-settings.h"
#include "settings-parser.h"
#include "dovetail-change.h"
#include "dovetail-compat.h"
#include "dovetail-name.h"

static const char *name_replace(const char *name, char from, char to)
{
	char *p, *copy = t_strdup_noconst(name);

	for (p = copy; *p != '\0'; p++) {
		if (*p == from)
			*p = to;
	}
	return copy;
}

bool dovetail_namespace_is_own(const struct mail_namespace *ns,
			       const struct mail_user *user)
{
	return ns->type == MAIL_NAMESPACE_TYPE_PRIVATE && ns->owner == user &&
		ns->alias_for == NULL && !dovetail_compat_namespace_is_foreign(ns);
}

const char *dovetail_name_to_path(struct mail_namespace *ns, const char *vname)
{
	return name_replace(vname, mail_namespace_get_sep(ns),
			    DOVETAIL_NAME_SEP);
}

int dovetail_name_from_path(struct mail_user *user, const char *path,
			    struct mail_namespace **ns_r, const char **vname_r,
			    const char **error_r)
{
	struct mail_namespace *ns;
	const char *vname;

	for (ns = user->namespaces; ns != NULL; ns = ns->next) {
		if (!dovetail_namespace_is_own(ns, user))
			continue;
		vname = name_replace(path, DOVETAIL_NAME_SEP,
				     mail_namespace_get_sep(ns));
		if (mail_namespace_find(user->namespaces, vname) != ns)
			continue;
		if (strcmp(dovetail_name_to_path(ns, vname), path) != 0) {
			*error_r = t_strdup_printf(
				"A part of mailbox name '%s' contains the "
				"hierarchy separator '%c' used here",
				name_replace(path, DOVETAIL_NAME_SEP, '/'),
				mail_namespace_get_sep(ns));
			return -1;
		}
		*ns_r = ns;
		*vname_r = vname;
		return 0;
	}
	*error_r = t_strdup_printf("No private namespace for mailbox '%s'",
				   name_replace(path, DOVETAIL_NAME_SEP, '/'));
	return -1;
}
