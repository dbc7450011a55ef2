/* Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING */

/* dovetail_health_hook: a program that is run for each message, one at a time. It reads
   the text from its standard input and finds the rest in its environment:

     DOVETAIL_NODE           this node
     DOVETAIL_SUBJECT        one line
     DOVETAIL_CHANGES        how many changes the text has; what follows is the worst
     DOVETAIL_KIND           node, to, from, user
     DOVETAIL_ABOUT          the node, "a to b", "a from b", or the user
     DOVETAIL_PEER           the other node, or ""
     DOVETAIL_STATE, _STATE_BEFORE, _SINCE (UTC), _REASON, _REMEDY, _WHO

   It runs as the service's user, with PATH and TZ of the service. What it says on
   standard output or error is in Dovecot's log. After HOOK_TIMEOUT_SECS it is
   ended, with all that it has started. Once it was run the message is told,
   whatever its exit status is; that is only logged. */

#include "lib.h"
#include "array.h"
#include "child-wait.h"
#include "env-util.h"
#include "hash.h"
#include "ioloop.h"
#include "str.h"
#include "str-sanitize.h"
#include "dovetail-health-private.h"

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>
#include <sys/wait.h>

#define HOOK_TIMEOUT_SECS 30
#define HOOK_KILL_SECS 3
/* A pipe takes so much at once (pipe(7)), so nobody waits for the program. */
#define HOOK_TEXT_MAX_SIZE (60 * 1024)
#define HOOK_DEFAULT_PATH "/usr/local/bin:/usr/bin:/bin"

static struct {
	pid_t pid;
	struct child_wait *wait;
	struct timeout *to;
	bool terminated;
} hook = { .pid = -1 };

static bool hook_enabled(void)
{
	return health.set.health_hook[0] != '\0';
}

static void hook_timeout(void *context ATTR_UNUSED)
{
	/* It is a group of its own. */
	(void)kill(-hook.pid, hook.terminated ? SIGKILL : SIGTERM);
	timeout_remove(&hook.to);
	if (hook.terminated)
		return;
	e_warning(health.event, "dovetail_health_hook: %s has not ended after "
		  "%u s, ending it", health.set.health_hook, HOOK_TIMEOUT_SECS);
	hook.terminated = TRUE;
	hook.to = timeout_add(HOOK_KILL_SECS * 1000, hook_timeout,
			      (void *)NULL);
}

static void hook_ended(const struct child_wait_status *status,
		       void *context ATTR_UNUSED)
{
	child_wait_free(&hook.wait);
	timeout_remove(&hook.to);
	/* what it has left behind when it was ended */
	if (hook.terminated)
		(void)kill(-hook.pid, SIGKILL);
	hook.pid = -1;
	if (WIFSIGNALED(status->status)) {
		e_warning(health.event, "dovetail_health_hook: %s was ended by "
			  "signal %d", health.set.health_hook,
			  WTERMSIG(status->status));
	} else if (WEXITSTATUS(status->status) != 0) {
		e_warning(health.event, "dovetail_health_hook: %s ended with "
			  "exit status %d", health.set.health_hook,
			  WEXITSTATUS(status->status));
	}
	health_channel_done(HEALTH_CHANNEL_HOOK, NULL);
}

/* ---- the child ---- */

static void hook_env(const struct health_message *message)
{
	const struct health_change *worst = array_front(&message->changes);
	const char *path = getenv("PATH"), *tz = getenv("TZ");
	const char *const vars[] = {
		"DOVETAIL_NODE", health.set.node,
		"DOVETAIL_SUBJECT", message->subject,
		"DOVETAIL_CHANGES", dec2str(array_count(&message->changes)),
		"DOVETAIL_KIND", health_subject_kind_name(worst->kind),
		"DOVETAIL_ABOUT", worst->about,
		"DOVETAIL_PEER", worst->peer,
		"DOVETAIL_STATE", dovetail_health_state_name(worst->state),
		"DOVETAIL_STATE_BEFORE",
		dovetail_health_state_name(worst->before),
		"DOVETAIL_SINCE", health_time_str(worst->since, TRUE),
		"DOVETAIL_REASON", worst->reason,
		"DOVETAIL_REMEDY", worst->remedy,
		"DOVETAIL_WHO", dovetail_health_who_name(worst->who),
		"PATH", path == NULL ? HOOK_DEFAULT_PATH : t_strdup(path),
		"TZ", t_strdup(tz),
	};
	unsigned int i;

	env_clean();
	for (i = 0; i < N_ELEMENTS(vars); i += 2) {
		if (vars[i + 1] != NULL)
			env_put(vars[i], vars[i + 1]);
	}
}

static void ATTR_NORETURN
hook_exec(const struct health_message *message, int fd_text)
{
	const char *program = health.set.health_hook;
	char *const argv[] = { t_strdup_noconst(program), NULL };
	int fd, fd_max = getdtablesize();

	/* from now on nothing is ours but standard error, the log */
	if (setsid() < 0 || dup2(fd_text, STDIN_FILENO) < 0 ||
	    dup2(STDERR_FILENO, STDOUT_FILENO) < 0)
		_exit(126);
	for (fd = STDERR_FILENO + 1; fd < fd_max; fd++)
		(void)close(fd);
	/* what is ignored stays so */
	(void)signal(SIGPIPE, SIG_DFL);
	hook_env(message);
	execv(program, argv);
	_exit(errno == ENOENT ? 127 : 126);
}

/* ---- */

static void hook_tell(const struct health_message *message)
{
	size_t size = I_MIN(strlen(message->text), HOOK_TEXT_MAX_SIZE);
	int fds[2];

	if (pipe(fds) < 0) {
		health_channel_done(HEALTH_CHANNEL_HOOK,
				    t_strdup_printf("pipe() failed: %m"));
		return;
	}
	if (write(fds[1], message->text, size) != (ssize_t)size ||
	    (hook.pid = fork()) == -1) {
		health_channel_done(HEALTH_CHANNEL_HOOK, t_strdup_printf(
			"write() or fork() failed: %m"));
	} else if (hook.pid == 0) {
		hook_exec(message, fds[0]);
	} else {
		hook.terminated = FALSE;
		hook.wait = child_wait_new_with_pid(hook.pid, hook_ended,
						    (void *)NULL);
		hook.to = timeout_add(HOOK_TIMEOUT_SECS * 1000, hook_timeout,
				      (void *)NULL);
	}
	i_close_fd(&fds[0]);
	i_close_fd(&fds[1]);
}

static void hook_init(const char *base_dir ATTR_UNUSED)
{
	child_wait_init();
}

static void hook_deinit(void)
{
	timeout_remove(&hook.to);
	if (hook.wait != NULL)
		child_wait_free(&hook.wait);
	/* The one that is running may come to its end. */
	child_wait_deinit();
}

const struct health_channel health_channel_hook = {
	.name = "dovetail_health_hook",
	.enabled = hook_enabled,
	.init = hook_init,
	.deinit = hook_deinit,
	.tell = hook_tell,
};
