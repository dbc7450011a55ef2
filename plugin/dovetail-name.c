/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "mail-user.h"
#include "mail-namespace.h"
#include "mail-storage-settings.h"
#include "settings-parser.h"
#include "dovetail-change.h"
#include "dovetail-compat.h"
#include "dovetail-name.h"

#define NAME_OF_PARTS "dovetail-repair-"
#define NAME_OF_KEPT "dovetail-kept"

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

const char *dovetail_name_of_parts(struct mail_namespace *ns,
				   const guid_128_t guid)
{
	return t_strconcat(ns->prefix, NAME_OF_PARTS, guid_128_to_string(guid),
			   NULL);
}

/* The name without the namespace's prefix and without begin; NULL when it does not
   begin like that. */
static const char *name_skip(struct mail_namespace *ns, const char *vname,
			     const char *begin)
{
	if (!str_begins_with(vname, ns->prefix))
		return NULL;
	vname += strlen(ns->prefix);
	return str_begins_with(vname, begin) ? vname + strlen(begin) : NULL;
}

bool dovetail_name_is_parts(struct mail_namespace *ns, const char *vname,
			    guid_128_t guid_r)
{
	const char *guid = name_skip(ns, vname, NAME_OF_PARTS);

	return guid != NULL && strlen(guid) == GUID_128_SIZE * 2 &&
		guid_128_from_string(guid, guid_r) == 0;
}

const char *dovetail_name_of_kept(struct mail_namespace *ns, unsigned int n)
{
	return n == 1 ? t_strconcat(ns->prefix, NAME_OF_KEPT, NULL) :
		t_strdup_printf("%s"NAME_OF_KEPT"-%u", ns->prefix, n);
}

bool dovetail_name_is_kept(struct mail_namespace *ns, const char *vname)
{
	const char *rest = name_skip(ns, vname, NAME_OF_KEPT);
	unsigned int n;

	if (rest == NULL)
		return FALSE;
	rest = t_strcut(rest, mail_namespace_get_sep(ns));
	return *rest == '\0' ||
		(*rest == '-' && str_to_uint(rest + 1, &n) == 0);
}
