/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "array.h"
#include "guid.h"
#include "llist.h"
#include "ioloop.h"
#include "master-service.h"
#include "wildcard-match.h"
#include "mail-storage-private.h"
#include "mail-storage-service.h"
#include "mail-namespace.h"
#include "mail-user.h"
#include "dovetail-compat.h"
#include "dovetail-mailbox-digest.h"
#include "dovetail-name.h"
#include "dovetail-plugin.h"
#include "dovetail-replay.h"
#include "dovetail-seal.h"

#include <unistd.h>

/* Users that are kept open for their next change, and mailboxes of each. */
#define REPLAY_USERS_MAX 64
#define REPLAY_MAILBOXES_MAX 4
/* After this the userdb is asked again. */
#define REPLAY_USER_MAX_AGE_SECS 60

struct replay_user_mailbox {
	guid_128_t guid;
	struct mailbox *box;
	/* NULL: nobody asked for it yet */
	struct dovetail_mailbox_digest *digest;
};

struct replay_user {
	/* the most recently used first */
	struct replay_user *prev, *next;

	char *username;
	struct mail_storage_service_user *service_user;
	struct mail_user *mail_user;
	/* the most recently used last */
	ARRAY(struct replay_user_mailbox) mailboxes;
	time_t opened;
	bool active;
};

static struct {
	struct mail_storage_service_ctx *storage_service;
	/* running as root for users with uids of their own */
	bool switch_uids;

	struct replay_user *head, *tail;
	unsigned int count;
} users;

static void replay_user_free(struct replay_user *user);

void replay_users_init(struct mail_storage_service_ctx *storage_service,
		       bool switch_uids)
{
	i_zero(&users);
	users.storage_service = storage_service;
	users.switch_uids = switch_uids;
}

void replay_users_deinit(void)
{
	while (users.head != NULL)
		replay_user_free(users.head);
}

static void replay_restore_uid(void)
{
	if (users.switch_uids && geteuid() != 0 && seteuid(0) < 0)
		i_fatal("seteuid(0) failed: %m");
}

#undef replay_timeout_add
struct timeout *replay_timeout_add(unsigned int msecs,
				   timeout_callback_t *callback, void *context)
{
	struct ioloop_context *user =
		io_loop_get_current_context(current_ioloop);
	struct timeout *to;

	if (user != NULL)
		io_loop_context_deactivate(user);
	to = timeout_add_short(msecs, *callback, context);
	if (user != NULL)
		io_loop_context_activate(user);
	return to;
}

static struct replay_user *replay_user_find(const char *username)
{
	struct replay_user *user;

	for (user = users.head; user != NULL; user = user->next) {
		if (strcmp(user->username, username) == 0)
			return user;
	}
	return NULL;
}

static void replay_user_activate(struct replay_user *user)
{
	if (user->active)
		return;
	mail_storage_service_io_activate_user(user->service_user);
	user->active = TRUE;
}

int replay_user_open(const char *username, struct replay_user **user_r,
		     const char **error_r)
{
	struct mail_storage_service_input input;
	struct mail_storage_service_user *service_user;
	struct replay_user *user;
	struct mail_user *mail_user;
	int ret;

	user = replay_user_find(username);
	if (user != NULL &&
	    user->opened + REPLAY_USER_MAX_AGE_SECS < ioloop_time) {
		replay_user_free(user);
		user = NULL;
	}
	if (user != NULL) {
		DLLIST2_REMOVE(&users.head, &users.tail, user);
		DLLIST2_PREPEND(&users.head, &users.tail, user);
		replay_user_activate(user);
		*user_r = user;
		return 0;
	}
	/* A user with a uid of its own must not stay open while another's is
	   in effect. */
	while (users.count > 0 &&
	       (users.switch_uids || users.count >= REPLAY_USERS_MAX))
		replay_user_free(users.tail);

	i_zero(&input);
	input.service = DOVETAIL_REPLAY_SERVICE;
	input.username = username;
	input.event_parent = replay.event;
	ret = dovetail_compat_user_open(users.storage_service, &input,
					&service_user, &mail_user, error_r);
	if (ret <= 0) {
		replay_restore_uid();
		*error_r = ret == 0 ?
			t_strdup_printf("User %s is not known here (userdb)",
					username) :
			t_strdup_printf("Cannot open user %s: %s", username,
					*error_r);
		return ret == 0 ? -2 : -1;
	}
	/* for quota, ACL and everybody who asks: this is replication */
	mail_user->dsyncing = TRUE;

	user = i_new(struct replay_user, 1);
	user->username = i_strdup(username);
	user->service_user = service_user;
	user->mail_user = mail_user;
	user->active = TRUE;
	user->opened = ioloop_time;
	i_array_init(&user->mailboxes, REPLAY_MAILBOXES_MAX);
	DLLIST2_PREPEND(&users.head, &users.tail, user);
	users.count++;
	*user_r = user;
	return 0;
}

static void replay_user_deactivate(struct replay_user *user)
{
	if (!user->active)
		return;
	mail_storage_service_io_deactivate_user(user->service_user);
	user->active = FALSE;
}

void replay_user_release(struct replay_user **_user)
{
	struct replay_user *user = *_user;

	*_user = NULL;
	if (users.switch_uids)
		replay_user_free(user);
	else
		replay_user_deactivate(user);
}

void replay_user_close(struct replay_user **_user)
{
	struct replay_user *user = *_user;

	*_user = NULL;
	replay_user_free(user);
}

static void replay_user_free(struct replay_user *user)
{
	replay_user_activate(user);
	DLLIST2_REMOVE(&users.head, &users.tail, user);
	users.count--;

	replay_user_forget_mailboxes(user);
	array_free(&user->mailboxes);
	replay_user_deactivate(user);
	mail_user_deinit(&user->mail_user);
	mail_storage_service_user_unref(&user->service_user);
	replay_restore_uid();
	i_free(user->username);
	i_free(user);
}

int replay_users_list(const char *mask, uint64_t shards, pool_t pool,
		      ARRAY_TYPE(const_string) *users_r, const char **error_r)
{
	const char *name;
	unsigned int shard;
	int ret;

	p_array_init(users_r, pool, 128);
	mail_storage_service_all_init_mask(users.storage_service,
					   DOVETAIL_COMPAT_ALL_USERS);
	while ((ret = mail_storage_service_all_next(users.storage_service,
						    &name)) > 0) {
		shard = dovetail_user_shard(name, replay.set.shards);
		if ((shards & (1ULL << shard)) == 0 ||
		    !wildcard_match(name, mask))
			continue;
		name = p_strdup(pool, name);
		array_push_back(users_r, &name);
	}
	if (ret < 0) {
		*error_r = "The userdb did not list its users (the listing "
			"needs a userdb that can do it, with SQL and LDAP an "
			"iterate_query or iterate_filter, and a unix_listener "
			"auth-userdb that belongs to the user of service "
			DOVETAIL_REPLAY_SERVICE")";
		return -1;
	}
	return 0;
}

struct mail_user *replay_user_mail_user(struct replay_user *user)
{
	return user->mail_user;
}

/* ---- mailboxes ---- */

static void replay_user_close_mailbox(struct replay_user_mailbox *um)
{
	const char *error;

	if (um->digest != NULL && um->box->opened &&
	    !mail_index_is_deleted(um->box->index) &&
	    !dovetail_mailbox_digest_is_clean(um->digest)) T_BEGIN {
		/* Else it is computed afresh. */
		if (dovetail_mailbox_digest_save(um->digest, &error) < 0) {
			e_debug(replay.event, "Mailbox %s: Cannot write the "
				"digest: %s", um->box->vname, error);
		}
	} T_END;
	dovetail_mailbox_digest_close(&um->digest);
	mailbox_free(&um->box);
}

void replay_user_forget_mailboxes(struct replay_user *user)
{
	struct replay_user_mailbox *um;

	array_foreach_modifiable(&user->mailboxes, um)
		replay_user_close_mailbox(um);
	array_clear(&user->mailboxes);
}

struct dovetail_mailbox_digest *
replay_user_mailbox_digest(struct replay_user *user, struct mailbox *box)
{
	struct replay_user_mailbox *um;

	array_foreach_modifiable(&user->mailboxes, um) {
		if (um->box != box)
			continue;
		if (um->digest == NULL)
			um->digest = dovetail_mailbox_digest_open(box);
		return um->digest;
	}
	i_unreached();
}

static void replay_user_keep_mailbox(struct replay_user *user,
				     const guid_128_t guid, struct mailbox *box)
{
	struct replay_user_mailbox *um;

	if (array_count(&user->mailboxes) == REPLAY_MAILBOXES_MAX) {
		um = array_front_modifiable(&user->mailboxes);
		replay_user_close_mailbox(um);
		array_pop_front(&user->mailboxes);
	}
	um = array_append_space(&user->mailboxes);
	guid_128_copy(um->guid, guid);
	um->box = box;
	um->digest = NULL;
}

/* Returns 1: the box is open and has this GUID.  0: it is not, or does not
   exist; *box is freed.  -1: failed. */
static int replay_mailbox_try(struct mailbox **box, const guid_128_t guid,
			      const char **error_r)
{
	struct mailbox_metadata metadata;
	enum mail_error mail_error;
	int ret = 0;

	if (mailbox_open(*box) < 0 ||
	    mailbox_get_metadata(*box, MAILBOX_METADATA_GUID, &metadata) < 0) {
		*error_r = t_strdup(mailbox_get_last_internal_error(*box,
								    &mail_error));
		ret = mail_error == MAIL_ERROR_NOTFOUND ? 0 : -1;
	} else if (guid_128_equals(metadata.guid, guid)) {
		return 1;
	}
	mailbox_free(box);
	return ret;
}

int replay_user_find_mailbox(struct replay_user *user, const guid_128_t guid,
			     const char *path, struct mailbox **box_r,
			     const char **error_r)
{
	const struct replay_user_mailbox *um;
	struct replay_user_mailbox found;
	struct mail_namespace *ns;
	enum mailbox_existence existence;
	struct mailbox *box;
	const char *vname;
	int ret;

	array_foreach(&user->mailboxes, um) {
		if (!guid_128_equals(um->guid, guid))
			continue;
		found = *um;
		array_delete(&user->mailboxes,
			array_foreach_idx(&user->mailboxes, um), 1);
		array_push_back(&user->mailboxes, &found);
		*box_r = found.box;
		return 1;
	}

	if (dovetail_name_from_path(user->mail_user, path, &ns, &vname,
				    error_r) == 0) {
		box = mailbox_alloc(ns->list, vname, MAILBOX_FLAG_IGNORE_ACLS);
		/* opening would create INBOX */
		if (mailbox_exists(box, FALSE, &existence) == 0 &&
		    existence != MAILBOX_EXISTENCE_SELECT) {
			mailbox_free(&box);
		} else if ((ret = replay_mailbox_try(&box, guid,
						     error_r)) < 0) {
			return -1;
		} else if (ret > 0) {
			replay_user_keep_mailbox(user, guid, box);
			*box_r = box;
			return 1;
		}
	}
	for (ns = user->mail_user->namespaces; ns != NULL; ns = ns->next) {
		if (ns->type != MAIL_NAMESPACE_TYPE_PRIVATE ||
		    ns->alias_for != NULL)
			continue;
		box = mailbox_alloc_guid(ns->list, guid,
					 MAILBOX_FLAG_IGNORE_ACLS);
		ret = replay_mailbox_try(&box, guid, error_r);
		if (ret < 0)
			return -1;
		if (ret > 0) {
			replay_user_keep_mailbox(user, guid, box);
			*box_r = box;
			return 1;
		}
	}
	return 0;
}
