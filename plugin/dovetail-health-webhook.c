/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* dovetail_health_webhook: each message is POSTed as JSON, one at a time; any status of
   2xx means that it was taken, and with another one, or none, it is tried again
   later.

     {"node": "a", "subject": "...", "text": "...", "kind": "to",
      "about": "a to b", "peer": "b", "state": "stalled", "state_before": "ok",
      "since": 1764000000, "reason": "...", "remedy": "...", "who": "peer",
      "changes": [{"kind": ... "who"}, ...]}

   What stands outside of changes is the worst of them. Chats that take messages
   want "text". Host names are resolved by Dovecot's dns-client; certificates are
   checked against the authorities that the system trusts. */

#include "lib.h"
#include "array.h"
#include "hash.h"
#include "ioloop.h"
#include "str.h"
#include "str-sanitize.h"
#include "iostream-ssl.h"
#include "http-client.h"
#include "http-response.h"
#include "dovetail-compat.h"
#include "dovetail-health-private.h"

#define WEBHOOK_TIMEOUT_MSECS (15 * 1000)
#define WEBHOOK_CHANGES_MAX 200

static struct {
	struct http_client *client;
	struct http_client_request *request;
} webhook;

static bool webhook_enabled(void)
{
	return health.set.health_webhook[0] != '\0';
}

static void webhook_json_change(string_t *dest,
				const struct health_change *change)
{
	health_json_str(dest, "kind", health_subject_kind_name(change->kind));
	str_append_c(dest, ',');
	health_json_str(dest, "about", change->about);
	str_append_c(dest, ',');
	health_json_str(dest, "peer", change->peer);
	str_append_c(dest, ',');
	health_json_str(dest, "state",
			dovetail_health_state_name(change->state));
	str_append_c(dest, ',');
	health_json_str(dest, "state_before",
			dovetail_health_state_name(change->before));
	str_printfa(dest, ",\"since\":%s,", dec2str(change->since));
	health_json_str(dest, "reason", change->reason);
	str_append_c(dest, ',');
	health_json_str(dest, "remedy", change->remedy);
	str_append_c(dest, ',');
	health_json_str(dest, "who", dovetail_health_who_name(change->who));
}

static void
webhook_json(string_t *dest, const struct health_message *message)
{
	const struct health_change *changes;
	unsigned int i, count;

	changes = array_get(&message->changes, &count);
	str_append_c(dest, '{');
	health_json_str(dest, "node", health.set.node);
	str_append_c(dest, ',');
	health_json_str(dest, "subject", message->subject);
	str_append_c(dest, ',');
	health_json_str(dest, "text", message->text);
	str_append_c(dest, ',');
	webhook_json_change(dest, &changes[0]);
	str_append(dest, ",\"changes\":[");
	for (i = 0; i < count && i < WEBHOOK_CHANGES_MAX; i++) {
		str_append(dest, i == 0 ? "{" : ",{");
		webhook_json_change(dest, &changes[i]);
		str_append_c(dest, '}');
	}
	str_append(dest, "]}\n");
}

static void webhook_response(const struct http_response *response,
			     void *context ATTR_UNUSED)
{
	const char *error = NULL;

	webhook.request = NULL;
	if (response->status / 100 != 2) {
		/* no more of the URL than the administrator knows */
		error = response->status >= HTTP_CLIENT_REQUEST_ERROR_ABORTED ?
			response->reason :
			t_strdup_printf("The answer was %u %s",
					response->status,
					str_sanitize(response->reason, 100));
	}
	health_channel_done(HEALTH_CHANNEL_WEBHOOK, error);
}

static void webhook_tell(const struct health_message *message)
{
	struct http_client_request *request;
	string_t *body = t_str_new(1024);

	webhook_json(body, message);
	request = http_client_request_url_str(webhook.client, "POST",
					      health.set.health_webhook,
					      webhook_response, (void *)NULL);
	http_client_request_add_header(request, "Content-Type",
				       "application/json");
	http_client_request_set_payload_data(request, str_data(body),
					     str_len(body));
	http_client_request_set_timeout_msecs(request, WEBHOOK_TIMEOUT_MSECS);
	http_client_request_set_max_attempts(request, 1);
	webhook.request = request;
	http_client_request_submit(request);
}

static void webhook_init(const char *base_dir)
{
	webhook.client = dovetail_compat_http_client_init(base_dir,
				WEBHOOK_TIMEOUT_MSECS, health.event);
}

static void webhook_deinit(void)
{
	if (webhook.request != NULL)
		http_client_request_abort(&webhook.request);
	http_client_deinit(&webhook.client);
}

const struct health_channel health_channel_webhook = {
	.name = "dovetail_health_webhook",
	.enabled = webhook_enabled,
	.init = webhook_init,
	.deinit = webhook_deinit,
	.tell = webhook_tell,
};
