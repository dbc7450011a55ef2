#!/bin/sh
# What the built modules and services show and need, read from their symbol
# tables: that Dovecot will load them, that they do not get into each other's
# way, and that mail processes do not load what they have no use for.

lib=$top_builddir/plugin
dovecot=${DOVECOT_LIBDIR:-/usr/lib/dovecot}
total=0
failed=0

# check NAME COMMAND...: COMMAND prints what is wrong, or nothing
check() {
	name=$1
	shift
	total=$((total + 1))
	wrong=$("$@" 2>&1)
	if [ -z "$wrong" ]; then
		echo "$name : ok"
	else
		failed=$((failed + 1))
		echo "$name : FAILED"
		echo "$wrong" | sed 's/^/	/'
	fi
}

defined() { nm -D --defined-only "$@" | sed -n 's/^[0-9a-f]* [A-Za-z] //p' |
	sed 's/@.*//'; }
needed() { readelf -d "$1" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p'; }

# module-dir.c of Dovecot looks for NAME_version, and goes on without it
shows() {
	file=$1
	shift
	[ -r "$file" ] || { echo "$file is missing"; return; }
	for symbol in "$@"; do
		defined "$file" | grep -qx "$symbol" ||
			echo "$symbol is not there"
	done
}

shows_only() {
	defined "$1" | grep -Evx "$2" | sed 's/^/also shows /'
}

loads_only() {
	needed "$1" | grep -Ev "$2" | sed 's/^/also loads /'
}

# Undefined symbols must be in the program that loads the module, or in one of
# the libraries of either.
finds_all() {
	module=$1
	program=$2
	shift 2
	for file in "$program" "$module" "$@"; do
		ldd "$file" | sed -n 's/.*=> \(\/[^ ]*\) .*/\1/p; s/^[ 	]*\(\/[^ ]*\) (.*/\1/p'
	done | sort -u >modules-libs.tmp
	# shellcheck disable=SC2046
	defined "$program" "$@" $(cat modules-libs.tmp) | sort -u >modules-have.tmp
	nm -D --undefined-only "$module" | sed -n 's/^ *U //p' |
		sed 's/@.*//' | sort -u |
		comm -23 - modules-have.tmp | sed 's/^/not found: /'
	rm -f modules-libs.tmp modules-have.tmp
}

libs='^(libc|libsodium|libasan|libubsan|libm|libgcc_s|ld-linux.*)\.'
storage=$(ls "$dovecot"/libdovecot-storage.so "$dovecot"/libdovecot.so)

plugin=$lib/.libs/lib95_dovetail_plugin.so
check "plugin has the loader's symbols" shows "$plugin" dovetail_plugin_version \
	dovetail_plugin_init dovetail_plugin_deinit
check "plugin shows nothing else" shows_only "$plugin" \
	'dovetail_plugin_.*'
check "plugin loads nothing of Redis" loads_only "$plugin" "$libs"
# shellcheck disable=SC2086
check "plugin finds all symbols" finds_all "$plugin" "$dovecot/lmtp" $storage

doveadm=$lib/.libs/lib95_doveadm_dovetail_plugin.so
check "doveadm module has the loader's symbols" shows "$doveadm" \
	doveadm_dovetail_plugin_version \
	doveadm_dovetail_plugin_init doveadm_dovetail_plugin_deinit
check "doveadm module shows nothing else" shows_only "$doveadm" \
	'doveadm_dovetail_plugin_.*'
check "doveadm module loads nothing of Redis" loads_only "$doveadm" "$libs"
program=$dovecot/doveadm-server
check "doveadm module finds all symbols in doveadm-server" \
	finds_all "$doveadm" "$program"

settings=$lib/.libs/libdovetail_settings.so
check "settings module has the loader's symbol" shows "$settings" \
	dovetail_settings_version
check "settings module shows nothing else" shows_only "$settings" \
	'dovetail_settings_(version|set_roots|set_infos)'
check "settings module loads only the C library" loads_only "$settings" "$libs"
check "settings module finds all symbols in config" \
	finds_all "$settings" "$dovecot/config"

for service in dovetail-queue dovetail-replay; do
	file=$lib/.libs/$service
	[ -r "$file" ] || file=$lib/$service
	check "$service finds its libraries" \
		sh -c 'ldd "$1" | grep "not found"' sh "$file"
done

echo "$failed / $total tests failed"
[ "$failed" -eq 0 ]
