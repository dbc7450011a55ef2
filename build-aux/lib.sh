# What build-aux/check and build-aux/demo have in common: install packages, copy
# the sources, build them, say how far it is. Sourced by bash; the caller sets
# "top", the directory of the sources, and calls start.
# shellcheck shell=bash disable=SC2034

# What a bare Debian lacks to build dovetail ...
packages_build=(autoconf automake gcc libc6-dev libtool make
	dovecot-dev libhiredis-dev libsodium-dev)
# ... and to run it
packages_run=(dovecot-core dovecot-imapd dovecot-lmtpd dovecot-managesieved
	dovecot-pop3d dovecot-sieve openssl python3 redis-server)
# ... and what integration tests start of others: unpacked, not installed
packages_unpacked=(exim4-daemon-light haproxy postfix prometheus promtool)

# Nothing in /usr/local, in a home directory or in the caller's environment
# shall decide what is tested.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
unset CC CFLAGS CPPFLAGS LDFLAGS MAKEFLAGS MAKELEVEL PYTHONPATH PYTHONHOME \
	DESTDIR CONFIG_SITE
export PYTHONDONTWRITEBYTECODE=1

tmp=
job=
ticker=
policy=

# start NAME: makes the temporary directory, $tmp; all is removed at the end.
# Functions named at_end and at_exit of the caller are called first/last.
start() {
	trap 'exit 129' HUP
	trap 'exit 130' INT
	trap 'exit 143' TERM
	trap 'end $?' EXIT
	tmp=$(mktemp -d "${TMPDIR:-/tmp}/dovetail-$1.XXXXXX") || exit 1
	# Dovecot's users must find their way
	chmod 755 "$tmp"
}

end() {
	trap '' HUP INT TERM
	trap - EXIT
	stop_ticker
	stop_job
	[ -z "$policy" ] || $as_root rm -f "$policy"
	if [ -n "$tmp" ]; then
		if [ -n "$keep_tmp" ]; then
			echo "Kept: $tmp"
		else
			chmod -R u+w "$tmp" 2>/dev/null
			rm -rf "$tmp"
		fi
	fi
	if [ "$(type -t at_end)" = function ]; then
		at_end "$1"
	fi
	exit "$1"
}

stop_ticker() {
	[ -z "$ticker" ] || kill -TERM -- "-$ticker" 2>/dev/null
	ticker=
}

# Ask first: tests end the servers they started.
stop_job() {
	local i

	[ -n "$job" ] || return
	kill -INT -- "-$job" 2>/dev/null
	for ((i = 0; i < 100; i++)); do
		kill -0 -- "-$job" 2>/dev/null || break
		sleep 0.1
	done
	kill -KILL -- "-$job" 2>/dev/null
	job=
}

# run LOG SECONDS COMMAND...: runs the command with its output in LOG, in a
# process group of its own, for at most so long. Returns its exit status, 124
# or 137 when it took too long. Never goes on for longer than $time_limit seconds
# after the start of all.
time_limit=86400
run() {
	local log=$1 secs=$2 ret left=$((time_limit - SECONDS))

	shift 2
	[ "$left" -gt 0 ] || left=1
	[ "$secs" -le "$left" ] || secs=$left
	set -m
	timeout --signal=INT --kill-after=30 "$secs" "$@" \
		>"$log" 2>&1 </dev/null &
	job=$!
	set +m
	wait "$job" 2>/dev/null
	ret=$?
	job=
	return $ret
}

# step TEXT SECONDS COMMAND...: the same with a line for the person who waits.
# The log is $log; what failed is shown.
log=
steps=0
step() {
	local text=$1 secs=$2 ret started=$SECONDS

	shift 2
	steps=$((steps + 1))
	log=$tmp/log/$steps.log
	mkdir -p "$tmp/log"
	printf '%s ' "$text"
	set -m
	(while sleep 3; do printf . >&3; done) 3>&1 >/dev/null 2>&1 &
	ticker=$!
	set +m
	run "$log" "$secs" "$@"
	ret=$?
	stop_ticker
	if [ $ret -eq 0 ]; then
		printf ' ok, %d s\n' $((SECONDS - started))
		return 0
	fi
	if [ $ret -eq 124 ] || [ $ret -eq 137 ]; then
		printf ' FAILED: not ready after %d s\n' $((SECONDS - started))
	else
		printf ' FAILED, exit status %d, %d s\n' $ret \
			$((SECONDS - started))
	fi
	show_log "$log" 60
	return $ret
}

show_log() {
	echo "--- the last lines of its output:"
	tail -n "$2" "$1" | sed 's/^/    /'
	echo "---"
}

as_root=
need_root() {
	[ "$(id -u)" -ne 0 ] || return 0
	if command -v sudo >/dev/null; then
		as_root=sudo
		sudo -v && return 0
	fi
	echo "This must be run as root, or by somebody who may use sudo."
	return 1
}

# install PACKAGE...: installs what is missing; does nothing when all is there.
install() {
	local package missing=() ret

	for package; do
		[ "$(dpkg-query -W -f='${db:Status-Status}' "$package" \
			2>/dev/null)" = installed ] || missing+=("$package")
	done
	[ ${#missing[@]} -gt 0 ] || return 0
	if ! command -v apt-get >/dev/null; then
		echo "Missing: ${missing[*]}. This is not Debian: install them" \
			"by hand."
		return 1
	fi
	need_root || return 1

	# Dovecot and Redis come with services; they are not to run here just
	# because somebody tried something. This is how Debian is told.
	if [ ! -e /usr/sbin/policy-rc.d ] && [ ! -L /usr/sbin/policy-rc.d ]; then
		policy=/usr/sbin/policy-rc.d
		printf '#!/bin/sh\n# temporary, of %s\nexit 101\n' "$0" |
			$as_root tee $policy >/dev/null &&
			$as_root chmod 755 $policy || return 1
	fi
	echo "Packages to install: ${missing[*]}"
	apt-get -s install "${missing[@]}" >/dev/null 2>&1 ||
		step "  getting Debian's list of packages" 600 \
			$as_root apt-get -q -o DPkg::Lock::Timeout=120 update
	install_packages "${missing[@]}" "  installing"
	ret=$?
	# the list may be older than what the mirror still has
	if [ $ret -ne 0 ]; then
		step "  getting Debian's list of packages" 600 \
			$as_root apt-get -q -o DPkg::Lock::Timeout=120 update &&
			install_packages "${missing[@]}" "  installing, again"
		ret=$?
	fi
	if [ -n "$policy" ]; then
		$as_root rm -f "$policy"
		policy=
	fi
	[ $ret -eq 0 ] || return 1

	for package in "${missing[@]}"; do
		case $package in
		dovecot-core) disable_service dovecot ;;
		redis-server) disable_service redis-server ;;
		esac
	done
}

# install_packages PACKAGE... TEXT
install_packages() {
	local text=${*: -1}

	set -- "${@:1:$#-1}"
	step "$text" 1500 $as_root env DEBIAN_FRONTEND=noninteractive \
		apt-get -q -y --no-install-recommends \
		-o DPkg::Lock::Timeout=120 -o Dpkg::Use-Pty=0 install "$@"
}

# unpack PACKAGE...: puts the files of these packages into $programs, but installs
# only libraries that they need: an MTA that the machine has stays, and no service of
# theirs is ever known to it. Tests bring their own configurations. Root only.
programs=${DOVETAIL_TEST_PROGRAMS:-/var/cache/dovetail/programs}
unpack() {
	local package version stale=() libs=()

	export DOVETAIL_TEST_PROGRAMS=$programs
	for package; do
		version=$(unpack_candidate "$package")
		# Debian 12 has that in prometheus
		[ -n "$version" ] || [ "$package" != promtool ] || continue
		if [ -z "$version" ]; then
			step "  getting Debian's list of packages" 600 apt-get -q \
				-o DPkg::Lock::Timeout=120 update || return 1
			version=$(unpack_candidate "$package")
		fi
		[ "$(cat "$programs/$package.version" 2>/dev/null)" = \
			"$version" ] && [ -n "$version" ] || stale+=("$package")
	done
	if [ ${#stale[@]} -gt 0 ]; then
		mkdir -p "$programs" || return 1
		step "Unpacking ${stale[*]} in $programs" 900 \
			bash -c "$unpack_script" unpack "$programs" \
			"$tmp/unpack" "${stale[@]}" || return 1
	fi
	mapfile -t libs < <(cd "$programs" && cat "${@/%/.libraries}" \
		2>/dev/null)
	install "${libs[@]}"
}

unpack_candidate() {
	apt-cache --no-all-versions show "$1" 2>/dev/null |
		sed -n 's/^Version: //p'
}

# shellcheck disable=SC2016
unpack_script='
	set -e
	programs=$1 dir=$2
	shift 2
	for package; do
		rm -rf "$dir"
		mkdir "$dir"
		cd "$dir"
		apt-get -q download "$package" || {
			# the list may be older than what the mirror still has
			apt-get -q -o DPkg::Lock::Timeout=120 update
			apt-get -q download "$package"
		}
		dpkg-deb --extract ./*.deb "$programs"
		# JavaScript is for pages that nobody looks at
		dpkg-deb --field ./*.deb Pre-Depends Depends |
			sed "s/^[A-Za-z-]*: //" | tr , "\n" |
			sed -n "s/^ *\(lib[^ (|]*\).*/\1/p" |
			grep -v ^libjs- >"$programs/$package.libraries" || :
		dpkg-deb --field ./*.deb Version >"$programs/$package.version"
	done
'

# The package is new, so nobody has asked for its service on this machine.
disable_service() {
	if $as_root update-rc.d "$1" disable >/dev/null 2>&1; then
		echo "  The machine's own $1 service stays off" \
			"(on: systemctl enable --now $1)."
	fi
}

# copy_source: a copy of the checkout in $tmp/src: what git knows and what it
# does not ignore, as it is now. The checkout itself is only read.
copy_source() {
	local file clean='' files=$tmp/files git=(git -c safe.directory='*' -C "$top")

	mkdir "$tmp/src" || return 1
	if [ "$("${git[@]}" rev-parse --show-toplevel 2>/dev/null)" = "$top" ]; then
		"${git[@]}" ls-files -z --cached --others --exclude-standard |
			while IFS= read -r -d '' file; do
				if [ -e "$top/$file" ] || [ -L "$top/$file" ]; then
					printf '%s\0' "$file"
				fi
			done >"$files"
		tar -C "$top" -cf "$tmp/src.tar" --null --no-recursion -T "$files"
	else
		# an unpacked tarball, or there is no git
		clean=yes
		tar -C "$top" -cf "$tmp/src.tar" --exclude=./.git \
			--exclude=./test/fuzz/work .
	fi || return 1
	tar -C "$tmp/src" --no-same-owner -xf "$tmp/src.tar" || return 1
	rm -f "$tmp/src.tar" "$files"
	chmod -R u+w,a+rX "$tmp/src"
	[ -z "$clean" ] || clean_source "$tmp/src"
}

# clean_source DIR: removes what a build in the source directory left there,
# so that it is not taken for this build's
clean_source() {
	(cd "$1" && rm -f config.status libtool run-test.sh stamp-h* \
		dummy-config.h dovetail-config.h &&
	find . \( -name '*.o' -o -name '*.l[ao]' -o -name '*.trs' -o \
		-name '*.log' -o -name .libs -o -name .deps -o \
		-name Makefile -o -name __pycache__ -o \
		-path './test/unit/test-dovetail-*' ! -name '*.[ch]' -o \
		-path './test/fuzz/fuzz-*' ! -name '*.[ch]' -o \
		-path './plugin/dovetail-*' ! -name '*.[ch]' ! -name '*.html' \) \
		-prune -exec rm -rf {} +)
}

# shellcheck disable=SC2016
build_script='
	set -e
	dir=$1
	shift
	mkdir "$dir"
	cd "$dir"
	../src/configure --prefix=/usr --sysconfdir=/etc --localstatedir=/var \
		--with-dovecot=/usr/lib/dovecot "$@"
	make -j"$(nproc)" all
'

# build TEXT DIR CONFIGURE-OPTION...: configures and builds in $tmp/DIR
build() {
	local text=$1 dir=$2

	shift 2
	step "$text" 900 bash -c "$build_script" build "$tmp/$dir" "$@"
}

# A Debian 13 for Dovecot 2.4 on a machine that has 2.3; made once and kept.
tree=${DOVETAIL_TREE:-/var/cache/dovetail/trixie}

make_tree() {
	step "Debian 13 with Dovecot 2.4 in $tree" 1800 \
		"$top/build-aux/debian-tree" trixie "$tree" \
		"${packages_build[@]}" "${packages_run[@]}" binutils valgrind
}

# before a command that is to run there; $tmp is the same if it is below /tmp
in_tree=("$top/build-aux/debian-tree" --run "$tree")
