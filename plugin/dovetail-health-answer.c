/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

#include "lib.h"
#include "array.h"
#include "hash.h"
#include "ioloop.h"
#include "str.h"
#include "str-sanitize.h"
#include "dovetail-health-private.h"

/* An outage is not to fill the log with a line for each mail. */
#define ANSWER_LOGS_PER_SEC 5
#define ANSWER_TEXT_MAX_LEN 200
/* addresses are longer than user names */
#define RECIPIENT_MAX_LEN 1024

static time_t logged_sec;
static unsigned int logged, unlogged;

bool health_may_log(void)
{
	if (ioloop_time != logged_sec) {
		if (unlogged > 0) {
			e_info(health.event, "%u more lines like that",
			       unlogged);
		}
		logged_sec = ioloop_time;
		logged = unlogged = 0;
	}
	if (logged == ANSWER_LOGS_PER_SEC) {
		unlogged++;
		return FALSE;
	}
	logged++;
	return TRUE;
}

bool health_states_have(unsigned int states, enum dovetail_health_state state)
{
	return (states & (1U << state)) != 0;
}

const char *health_action_name(enum health_action action)
{
	switch (action) {
	case HEALTH_ACTION_ACCEPT:
		return "accept";
	case HEALTH_ACTION_WARN:
		return "warn";
	case HEALTH_ACTION_DEFER:
		return "defer";
	}
	i_unreached();
}

/* What the administrator wants in this state. */
static enum health_action action_for(enum dovetail_health_state state)
{
	if (health_states_have(health.set.health_defer, state))
		return HEALTH_ACTION_DEFER;
	if (health_states_have(health.set.health_warn, state))
		return HEALTH_ACTION_WARN;
	return HEALTH_ACTION_ACCEPT;
}

/* The user as the userdb may call it: the address, without an extension, in lower
   case, or what stands before the @. Only users in trouble are known here, so
   whoever is not found is well. */
static const struct health_user *user_find(const char *recipient)
{
	const struct health_user *user;
	const char *at, *plus, *local, *domain;

	user = health_state_user(recipient);
	if (user != NULL)
		return user;
	recipient = t_str_lcase(recipient);
	at = strrchr(recipient, '@');
	domain = at == NULL ? "" : at;
	local = at == NULL ? recipient : t_strdup_until(recipient, at);
	plus = strchr(local, '+');
	if ((user = health_state_user(recipient)) != NULL ||
	    (user = health_state_user(local)) != NULL || plus == NULL)
		return user;
	local = t_strdup_until(local, plus);
	user = health_state_user(t_strconcat(local, domain, NULL));
	return user != NULL ? user : health_state_user(local);
}

static void answer_log(const struct health_answer *answer,
		       const char *recipient)
{
	struct event_passthrough *e =
		event_create_passthrough(health.event)->
		set_name("dovetail_health_answered")->
		add_str("recipient", recipient)->
		add_str("state", dovetail_health_state_name(answer->state))->
		add_str("action", health_action_name(answer->action))->
		add_str("reason", answer->health->reason);
	const char *text = t_strdup_printf("Mail for %s: %s: %s",
		recipient[0] == '\0' ? "somebody" :
		str_sanitize(recipient, 128),
		health_action_name(answer->action), health_answer_text(answer));

	if ((answer->state > DOVETAIL_HEALTH_CATCHING_UP ||
	     answer->action != HEALTH_ACTION_ACCEPT) && health_may_log())
		e_info(e->event(), "%s", text);
	else
		e_debug(e->event(), "%s", text);
}

void health_decided(const char *protocol, const char *question,
		    const char *answer, enum dovetail_health_state state)
{
	e_debug(event_create_passthrough(health.event)->
		set_name("dovetail_health_asked")->
		add_str("protocol", protocol)->
		add_str("question", question)->
		add_str("answer", answer)->
		add_str("state", dovetail_health_state_name(state))->event(),
		"%s: %s: %s (%s)", protocol, question, answer,
		dovetail_health_state_name(state));
}

/* The one that has more of a consequence; then the worse. */
static void answer_take(struct health_answer *answer,
			const struct dovetail_health *h,
			enum health_action action, const char *user)
{
	if (action < answer->action ||
	    (action == answer->action && h->state <= answer->state))
		return;
	answer->health = h;
	answer->state = h->state;
	answer->action = action;
	answer->user = user;
}

static void answer_general(const struct dovetail_health *h, void *context)
{
	struct health_answer *answer = context;

	/* Mail that would not be protected is to be kept away from the very
	   first to the very last, and not a moment longer. */
	if (h->state != DOVETAIL_HEALTH_UNPROTECTED ||
	    !health_state_is_protected())
		answer_take(answer, h, action_for(h->state), NULL);
}

void health_answer(const char *recipient, struct health_answer *answer_r)
{
	const struct health_user *user = NULL;
	const char *about;

	i_zero(answer_r);
	answer_r->health = health_state_worst(TRUE, &about);
	answer_r->state = answer_r->health->state;
	health_state_foreach(answer_general, answer_r);
	if (!health_state_is_protected()) {
		answer_take(answer_r, &health.node.general,
			    action_for(DOVETAIL_HEALTH_UNPROTECTED), NULL);
	}
	if (recipient == NULL || strlen(recipient) > RECIPIENT_MAX_LEN)
		recipient = "";
	if (recipient[0] != '\0')
		user = user_find(recipient);
	if (user != NULL) {
		answer_take(answer_r, &user->health,
			    action_for(user->health.state), user->name);
	}
	health.answers++;
	if (answer_r->action == HEALTH_ACTION_DEFER)
		health.deferred++;
	else if (answer_r->action == HEALTH_ACTION_WARN)
		health.warned++;
	answer_log(answer_r, recipient);
}

const char *health_answer_text(const struct health_answer *answer)
{
	if (answer->health->reason[0] == '\0')
		return dovetail_health_state_name(answer->state);
	/* it leaves DEL in */
	return t_strdup_printf("%s: %s",
		dovetail_health_state_name(answer->state),
		t_str_replace(str_sanitize_utf8(answer->health->reason,
						ANSWER_TEXT_MAX_LEN),
			      0x7f, '?'));
}
