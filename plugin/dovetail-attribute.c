/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "array.h"
#include "buffer.h"
#include "mail-storage-private.h"
#include "dovetail-compat.h"
#include "dovetail-wire.h"
#include "dovetail-attribute.h"

#include <sodium.h>

#define ATTRIBUTE_PREFIX_SIEVE \
	MAILBOX_ATTRIBUTE_PREFIX_DOVECOT_PVT_SERVER"sieve/"
#define ATTRIBUTE_PREFIX_ACL \
	MAILBOX_ATTRIBUTE_PREFIX_DOVECOT_PVT"acl/"

static enum mail_attribute_type
attribute_type(const struct dovetail_attribute *attribute)
{
	return attribute->shared ? MAIL_ATTRIBUTE_TYPE_SHARED :
		MAIL_ATTRIBUTE_TYPE_PRIVATE;
}

bool dovetail_attribute_travels(const struct dovetail_attribute *attribute)
{
	const char *key = attribute->key;

	return key[0] != '\0' &&
		strlen(key) <= DOVETAIL_ATTRIBUTE_KEY_MAX_SIZE &&
		!str_begins_with(key, ATTRIBUTE_PREFIX_SIEVE) &&
		!str_begins_with(key, ATTRIBUTE_PREFIX_ACL);
}

bool dovetail_attribute_limit(struct dovetail_attribute *attribute)
{
	if (attribute->value == NULL ||
	    strlen(attribute->value) <= DOVETAIL_ATTRIBUTE_VALUE_MAX_SIZE)
		return TRUE;
	attribute->value = NULL;
	return FALSE;
}

/* What the storage's error says: as the functions that return it. */
static int attribute_failed(struct mailbox *box, const char **error_r)
{
	enum mail_error error;

	*error_r = t_strdup(mailbox_get_last_internal_error(box, &error));
	if (error != MAIL_ERROR_NOTPOSSIBLE)
		return -1;
	*error_r = "mail_attribute_dict is not set";
	return 0;
}

int dovetail_attribute_get(struct mailbox *box, const struct mailbox_vfuncs *v,
			   struct dovetail_attribute *attribute,
			   const char **error_r)
{
	struct mail_attribute_value value;
	int ret;

	ret = v->attribute_get(box, attribute_type(attribute), attribute->key,
			       &value);
	if (ret < 0)
		return attribute_failed(box, error_r);
	attribute->value = ret == 0 ? NULL : value.value;
	return 1;
}

static int attributes_list(struct mailbox *box, const struct mailbox_vfuncs *v,
			   bool shared,
			   ARRAY_TYPE(dovetail_attribute) *attributes,
			   const char **error_r)
{
	struct dovetail_attribute attribute = { .shared = shared };
	struct mailbox_attribute_iter *iter;
	const char *key;

	iter = v->attribute_iter_init(box, attribute_type(&attribute), "");
	while ((key = v->attribute_iter_next(iter)) != NULL) {
		attribute.key = key;
		if (!dovetail_attribute_travels(&attribute))
			continue;
		attribute.key = t_strdup(key);
		array_push_back(attributes, &attribute);
	}
	return v->attribute_iter_deinit(iter) < 0 ?
		attribute_failed(box, error_r) : 1;
}

int dovetail_attributes_get(struct mailbox *box, const struct mailbox_vfuncs *v,
			    ARRAY_TYPE(dovetail_attribute) *attributes,
			    const char **error_r)
{
	struct dovetail_attribute any = { .key = "comment" };
	ARRAY_TYPE(dovetail_attribute) all;
	struct dovetail_attribute *attribute;
	size_t size = 0;
	int ret;

	/* a list is simply empty where there is no dict */
	if ((ret = dovetail_attribute_get(box, v, &any, error_r)) <= 0)
		return ret;
	t_array_init(&all, 16);
	if ((ret = attributes_list(box, v, FALSE, &all, error_r)) <= 0 ||
	    (ret = attributes_list(box, v, TRUE, &all, error_r)) <= 0)
		return ret;
	array_sort(&all, dovetail_attribute_cmp);
	array_foreach_modifiable(&all, attribute) {
		ret = dovetail_attribute_get(box, v, attribute, error_r);
		if (ret <= 0)
			return ret;
		if (!dovetail_attribute_limit(attribute) ||
		    attribute->value == NULL)
			continue;
		size += strlen(attribute->key) + strlen(attribute->value);
		if (size > DOVETAIL_ATTRIBUTES_MAX_SIZE) {
			*error_r = t_strdup_printf("They have more than %u "
				"bytes", DOVETAIL_ATTRIBUTES_MAX_SIZE);
			return 0;
		}
		array_push_back(attributes, attribute);
	}
	return 1;
}

void dovetail_attributes_hash(const ARRAY_TYPE(dovetail_attribute) *attributes,
			      uint8_t hash_r[DOVETAIL_ATTRIBUTES_HASH_SIZE])
{
	const struct dovetail_attribute *attribute;
	buffer_t *buf = buffer_create_dynamic(default_pool, 1024);

	array_foreach(attributes, attribute)
		dovetail_attribute_encode(buf, attribute);
	crypto_generichash(hash_r, DOVETAIL_ATTRIBUTES_HASH_SIZE, buf->data,
			   buf->used, NULL, 0);
	buffer_free(&buf);
	/* that would mean something else */
	if (sodium_is_zero(hash_r, DOVETAIL_ATTRIBUTES_HASH_SIZE))
		hash_r[0] = 1;
}
