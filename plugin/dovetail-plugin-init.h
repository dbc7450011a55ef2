#ifndef DOVETAIL_PLUGIN_INIT_H
#define DOVETAIL_PLUGIN_INIT_H

/* What Dovecot's module loader looks up by name. */

struct module;

extern const char *dovetail_plugin_version;

void dovetail_plugin_init(struct module *module);
void dovetail_plugin_deinit(void);

#endif
