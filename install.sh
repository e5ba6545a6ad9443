#!/bin/sh
# Install azure-provisioning into this system, or into an image mounted at DIR; nothing from the image is run.
set -eu
umask 022
export LC_ALL=C # what is in an image may be in no encoding at all

usage='usage: install.sh [--user] [--root DIR] [--force]
       install.sh --generalize [--root DIR] [--force]
       install.sh --uninstall [--root DIR] [--force]

Copy the program to /usr/local/sbin/azure-provisioning and its unit to /etc/systemd/system, and enable the unit, so that
it runs at the next boot. Run it again to enable the unit again, or to replace an older version.

  --user        have it create the user that the VM is created with, too, who logs in with the SSH keys given and may
                sudo without a password; installed again without --user, it does not any more
  --generalize  the last command before the capture: make the system forget whose it was (machine ID, host name, SSH
                host keys, leases, logs, what other agents left), so that it can become many VMs, and enable the unit
  --uninstall   take away all that was installed, but for what somebody else has changed since
  --root DIR    the system to work on: an image mounted at DIR, instead of this one
  --force       go on where this would refuse: although another provisioning agent is enabled, over what somebody else
                has put there, or although no VM would come up; with --uninstall, take away what was changed, too'

unit=azure-provisioning.service
program=/usr/local/sbin/azure-provisioning
units=/etc/systemd/system
wants=$units/multi-user.target.wants
presets=/etc/systemd/system-preset
preset=$presets/00-azure-provisioning.preset
ssh_unit=azure-provisioning-ssh-keys.service
dropins=$units/$unit.d
user_dropin=$dropins/10-user.conf
again=/run/azure-provisioning/install.sh
# Where systemd looks for units, the first that has one wins.
unit_path="$units /usr/local/lib/systemd/system /usr/lib/systemd/system /lib/systemd/system"

# The actions, as the lists of their steps. All refusals come before the first change.

install() {
    check_sources
    check_systemd refuse
    check_python refuse
    check_agents
    check_place "$program"
    check_place "$units/$unit"
    check_place "$preset"
    check_place "$user_dropin"
    check_link "$unit"
    check_useradd
    see_presets
    begin
    put 755 "$program" the_program
    put 644 "$units/$unit" the_unit
    put 644 "$preset" the_preset
    add_or_drop_user
    enable_unit "$unit"
    relabel
    reload
    say "installed and enabled in ${root:-/}: it runs at the next boot${user:+, and creates the user}"
}

uninstall() {
    set -- "$wants/$unit" "$wants/$ssh_unit" "$preset" "$user_dropin" "$units/$unit" "$units/$ssh_unit" "$program"
    for path; do
        place "$path" || refuse "$path cannot be reached in ${root:-/}: $why"
    done
    see_presets
    begin
    for path; do
        take_away "$path"
    done
    take_away_empty "$dropins"
    [ -z "$our_presets" ] || take_away_empty "$presets"
    ! running || rm -f "$again" # or it would forget once more at shutdown
    reload
    tell_if_no_ssh_keys
    say "uninstalled from ${root:-/}"
}

generalize() {
    check_systemd object
    check_python object
    check_installed
    check_link "$unit"
    check_agents
    check_network_is_for_every_vm
    check_network_comes_up
    check_fstab
    check_ssh_keys
    check_machine_id
    confirm
    begin
    make_ssh_keys_come_back
    enable_unit "$unit"
    forget_again_at_shutdown
    forget
    relabel
    tell_what_is_left
    ! running || sync
    say "generalized ${root:-/}: capture it before it boots again"
}

# What a captured image must not carry, each line with what is done and why. Paths in ~ are those of every home.
# /etc/machine-id comes last: an image that has one is an image that is not done.
forgotten() {
    cat <<'end'
remove      /etc/ssh/ssh_host_*                     SSH host keys, by which every VM could pose as every other
clear       /var/lib/dhcp                           leases and identifiers of dhclient
clear       /var/lib/dhclient                       leases and identifiers of dhclient
clear       /var/lib/dhcpcd                         leases and identifiers of dhcpcd
clear       /var/lib/dhcpcd5                        leases and identifiers of dhcpcd
remove      /etc/dhcpcd.duid                        identifier of dhcpcd
remove      /etc/dhcpcd.secret                      secret of dhcpcd
clear       /var/lib/wicked                         leases and identifiers of wicked
clear       /var/lib/systemd/network                leases and identifiers of systemd-networkd
remove      /var/lib/NetworkManager/*.lease*        leases of NetworkManager
remove      /var/lib/NetworkManager/secret_key      secret of NetworkManager, from which it makes identifiers
remove      /var/lib/NetworkManager/seen-bssids     networks that were seen
remove      /var/lib/NetworkManager/timestamps      connections that were used
remove_file /etc/resolv.conf                        name servers of the network that it was in
remove      /var/lib/systemd/random-seed            secret seed of the random numbers of every VM
remove      /var/lib/urandom/random-seed            secret seed of the random numbers of every VM
remove      /efi/loader/random-seed                 secret seed of the random numbers of every VM
remove      /boot/loader/random-seed                secret seed of the random numbers of every VM
remove      /boot/efi/loader/random-seed            secret seed of the random numbers of every VM
remove      /var/lib/systemd/credential.secret      secret of systemd-creds
clear       /var/lib/waagent                        state of the Azure Linux Agent, with a password in it
clear       /var/lib/cloud                          state of cloud-init, with the user data in it
clear       /var/lib/azure-init                     state of azure-init
remove      /etc/azure-provisioning.unfinished      mark of a user half made, who would be unmade in every VM
remove      ~/.*_history                            histories of shells and other programs
remove      ~/.history                              history of a shell
remove      ~/.histfile                             history of zsh
remove      ~/.local/share/fish/fish_history        history of fish
clear       /var/log/journal                        journal, filed under the old machine ID
clear_logs  /var/log                                logs
remove      /var/lib/lastlog/*                      times of logins
remove      /var/lib/wtmpdb/*                       times of logins and boots
name        /etc/hostname                           host name, under which every VM would first ask for a lease
remove_file /var/lib/dbus/machine-id                machine ID, which systemd would put back from here
blank       /etc/machine-id                         machine ID
end
}

# What is said. What comes from an image cannot command the terminal.

say() {
    printf '%s' "$1" | tr '\000-\037\177' '?'
    echo
}

warn() {
    say "install.sh: $1" >&2
}

misused() {
    echo "$usage" >&2
    exit 2
}

# refuse REASON: tell it, and change nothing. All reasons are told before begin() ends the program.
refused=''
refuse() {
    warn "$1; nothing was changed"
    refused=yes
}

# object REASON: refuse, but for --force.
object() {
    if [ -n "$force" ]; then
        warn "$1; going on all the same"
    else
        refuse "$1, or use --force"
    fi
}

# confirm: ask whoever sits at a terminal whether it is this machine that is to forget; a script knows.
confirm() {
    if [ -n "$root" ] || [ -n "$refused" ] || [ ! -t 0 ]; then
        return
    fi
    printf 'This machine will forget its SSH host keys, machine ID, host name, leases, logs and histories, for good.\n' >&2
    printf 'Nobody can log in before it has booted again. Go on? [y/N] ' >&2
    read -r answer || answer=''
    case $answer in [yY] | [yY][eE][sS]) ;; *) refuse 'this was not confirmed' ;; esac
}

changing='' temporary=''
begin() {
    [ -z "$refused" ] || exit 1
    changing=yes
}

end() {
    status=$?
    [ -z "$temporary" ] || rm -f "$temporary"
    if [ -n "$changing" ] && [ "$status" != 0 ]; then
        warn "this failed half-way, and ${root:-/} is not what it should be: mend the cause and run it again"
    fi
}

# Paths in the target system. Nothing that an image holds is opened, made or removed but by way of locate() or place().

# locate PATH: set located to where PATH of the target system is for us, or fail and say why in that variable. Symbolic
# links are followed as that system would, and to the end, so that there is none left for this machine's kernel to
# follow: an absolute one in a mounted image must not lead into this machine.
locate() {
    rest=$1 resolved='' links=0 located='' why=''
    while [ -n "$rest" ]; do
        part=${rest%%/*}
        case $rest in
            */*) rest=${rest#*/} ;;
            *) rest='' ;;
        esac
        case $part in
            '' | .) continue ;;
            ..) resolved=${resolved%/*} ;;
            *)
                if [ -L "$root$resolved/$part" ]; then
                    links=$((links + 1))
                    if [ "$links" -gt 40 ]; then # as the kernel counts
                        why='more than 40 symbolic links, or a loop of them'
                        return 1
                    fi
                    target=$(readlink "$root$resolved/$part" && echo .) # keeps newlines at the end of its name
                    case $target in /*) resolved='' ;; esac
                    rest=${target%??}/$rest
                else
                    resolved=$resolved/$part
                    if [ -n "$rest" ] && [ -e "$root$resolved" ] && [ ! -d "$root$resolved" ]; then
                        why="$resolved is no directory"
                        return 1
                    fi
                fi
                ;;
        esac
    done
    located=$root$resolved
}

# place PATH: locate the directory of PATH; its last component is ours to judge, and is not followed.
place() {
    locate "${1%/*}/." || return
    located=$located/${1##*/}
}

# has TEST PATH, as in has -f /etc/fstab
has() {
    locate "$2" && test "$1" "$located"
}

# runs PATH: whether it is a program.
runs() {
    has -f "$1" && [ -x "$located" ]
}

# Units in the target system.

# unit_file NAME: set located to what the target system would read as the unit NAME, be it the template of an instance,
# or fail: there is none, or it is masked, by an empty file or a link to /dev/null, and so to no regular file.
unit_file() {
    for directory in $unit_path; do
        place "$directory/$1" || continue
        if [ -L "$located" ] || [ -e "$located" ]; then
            has -s "$directory/$1" && [ -f "$located" ]
            return
        fi
    done
    case $1 in
        *@?*.service) unit_file "${1%%@*}@.service" ;;
        *) return 1 ;;
    esac
}

# enabled PATTERN: set enabled to the name of a unit that is enabled and fits, or fail.
enabled() {
    for in_path in $unit_path; do
        locate "$in_path" || continue
        for dependencies in "$located"/*.wants "$located"/*.requires; do
            locate "$in_path/${dependencies##*/}" || continue
            # shellcheck disable=SC2231 # it is a pattern
            for link in "$located"/$1; do
                enabled=${link##*/}
                if [ -L "$link" ] && unit_file "$enabled"; then
                    return 0
                fi
            done
        done
    done
    return 1
}

# each DIR PATTERN COMMAND: run COMMAND for each file of DIR that fits, whose name is in path and, for us, in located.
each() {
    locate "$1" || return 0
    # shellcheck disable=SC2231 # it is a pattern
    for entry in "$located"/$2; do
        path=$1/${entry##*/}
        if has -f "$path"; then
            "$3"
        fi
    done
}

# What install.sh puts into the target system. The last line of each file lets it be told from one that somebody changed:
# what is as we left it may be replaced and taken away in silence, whichever version it is of.

the_program() {
    sed "1s|.*|#!$python -IS|" "$here/azure_provisioning.py"
}

the_unit() {
    cat "$here/$unit"
}

the_preset() {
    # At a first boot systemd applies the presets before it starts units, and a vendor's may be to disable all.
    echo "enable $unit"
    [ -z "$our_presets" ] || echo "$presets_mark"
}

presets_mark='# Its directory is of install.sh, too.'

# Set our_presets where the directory of the preset is there for it alone.
see_presets() {
    our_presets=''
    if ! has -e "$presets" || { has -f "$preset" && grep -qxF "$presets_mark" "$located"; }; then
        our_presets=yes
    fi
}

the_ssh_unit() {
    cat <<'end'
[Unit]
Description=Make the SSH host keys that this machine lacks
Documentation=man:ssh-keygen(1)
# Before any unit that starts sshd, and before Azure is told that one can log in. A socket is part of basic.target, which
# everything comes after by default.
DefaultDependencies=no
Requires=local-fs.target
After=local-fs.target
Before=ssh.service sshd.service ssh.socket sshd.socket azure-provisioning.service
Conflicts=shutdown.target
Before=shutdown.target
# A file that a power cut left empty is no key.
ConditionFileNotEmpty=|!/etc/ssh/ssh_host_rsa_key
ConditionFileNotEmpty=|!/etc/ssh/ssh_host_ecdsa_key
ConditionFileNotEmpty=|!/etc/ssh/ssh_host_ed25519_key

[Service]
Type=oneshot
# Or sshd and Ready would wait for as long as it hangs.
TimeoutStartSec=300
ExecStart=/usr/bin/ssh-keygen -A
# On the disk before anybody has seen them: a client that knows a key refuses another.
ExecStart=/bin/sh -c 'exec sync /etc/ssh/ssh_host_*'

[Install]
WantedBy=multi-user.target
end
}

# Sorted before what an administrator calls budget.conf, or the like, so that that is heard last.
the_user_dropin() {
    cat <<'end'
[Service]
ExecStart=
ExecStart=/usr/local/sbin/azure-provisioning hostname user ready
# As in the unit: only after success.
ExecStart=+/bin/systemctl disable --no-reload azure-provisioning.service

# For useradd, to make a home and give it away, and to read /etc/shadow where nobody else may (RHEL); and for the step
# itself, to become the user before it writes there.
CapabilityBoundingSet=CAP_CHOWN CAP_DAC_OVERRIDE CAP_FOWNER CAP_SETGID CAP_SETUID
# The users' homes, and root's no more than before.
ProtectHome=no
ReadWritePaths=-/home
InaccessiblePaths=-/root -/run/user
end
}

# last_line: print the line that ends a file whose other lines are standard input.
last_line() {
    sum=$(cksum) && echo "# Written by install.sh, which tells from this line whether somebody changed the others: $sum"
}

# is_ours FILE: whether it is as an install.sh wrote it.
is_ours() {
    case $(cksum <"$1") in
        '2894346630 1722' | '3424230890 34') return 0 ;; # unit and preset of version 1.0.0, which had no last line
    esac
    case $(sed 1d "$1" | cksum) in
        '34648184 28179' | '2377438622 28169') return 0 ;; # its program, the first line of which names the Python
    esac
    [ "$(tail -n 1 "$1" | cksum)" = "$(sed '$d' "$1" | last_line | cksum)" ]
}

# put MODE PATH COMMAND: make what COMMAND prints, and our last line, the file PATH, unless it is so already.
put() {
    place "$2"
    mkdir -p "${located%/*}"
    content=$("$3" && echo .)
    content=${content%.}
    content=$content$(printf %s "$content" | last_line)
    if [ -L "$located" ] || [ ! -f "$located" ] || [ "$(cksum <"$located")" != "$(printf '%s\n' "$content" | cksum)" ]; then
        replace "$1" "$located" <<end
$content
end
    fi
    chown 0:0 "$located"
    chmod "$1" "$located"
}

# replace MODE FILE: make standard input the content of FILE, at once. FILE is for us, and comes from place().
replace() {
    temporary=$(mktemp "$2.XXXXXX") # a name that nobody has, and a file that is no link
    if [ ! -L "$2" ] && [ -f "$2" ]; then # its SELinux label may be one of its own; not every cp can do that
        cp --attributes-only --preserve=xattr "$2" "$temporary" 2>/dev/null || :
    fi
    cat >"$temporary"
    chmod "$1" "$temporary"
    [ ! -L "$2" ] || rm "$2" # or mv moves it into a directory that it leads to
    mv -f "$temporary" "$2"
    temporary=''
}

# enable_unit UNIT: by its link, as systemctl does.
enable_unit() {
    place "$wants/$1"
    if [ ! -L "$located" ] || [ "$(readlink "$located")" != "$units/$1" ]; then
        mkdir -p "${located%/*}"
        rm -f "$located"
        ln -s "$units/$1" "$located"
    fi
}

# The file or link PATH is taken away, but for what others made of it.
take_away() {
    place "$1"
    if [ ! -L "$located" ] && [ ! -e "$located" ]; then
        return
    fi
    if { [ "${1%/*}" = "$wants" ] && is_our_link; } || { [ ! -L "$located" ] && [ -f "$located" ] && is_ours "$located"; }; then
        rm "$located"
    elif [ -n "$force" ] && { [ -L "$located" ] || [ ! -d "$located" ]; }; then
        rm -f "$located"
        warn "took away $1, which somebody had changed or put there"
    else
        warn "left $1, which somebody changed or put there"
    fi
}

# The directory PATH is taken away if nothing is left in it.
take_away_empty() {
    if locate "$1"; then
        rmdir "$located" 2>/dev/null || :
    fi
}

# Whether located is a link that enables the unit which it is named after.
is_our_link() {
    [ -L "$located" ] || return
    case ${located##*/} in "$unit" | "$ssh_unit") ;; *) return 1 ;; esac
    [ "/${located##*/}" = "/$(readlink "$located" | sed 's|.*/||')" ]
}

add_or_drop_user() {
    if [ -n "$user" ]; then
        put 644 "$user_dropin" the_user_dropin
        each "$dropins" '*.conf' warn_if_it_drops_user
    elif has -f "$user_dropin"; then
        take_away "$user_dropin"
        take_away_empty "$dropins"
        say "removed $user_dropin, which was installed with --user: no user is created any more"
    fi
}

warn_if_it_drops_user() {
    if grep -q '^ExecStart=.*/azure-provisioning' "$located" && ! grep -q '^ExecStart=.* user' "$located"; then
        warn "$path says what the unit runs, without the step user: nobody is created until it is hostname user ready"
    fi
}

make_ssh_keys_come_back() {
    if ssh_keys_are_ours_to_make; then
        put 644 "$units/$ssh_unit" the_ssh_unit
        enable_unit "$ssh_unit"
    fi
}

# What was written has the labels of this machine's SELinux, or none.
relabel() {
    has -f /etc/selinux/config && grep -Eq '^SELINUX=(enforcing|permissive)' "$located" || return 0
    if running && command -v restorecon >/dev/null; then
        restorecon -R "$units" /usr/local/sbin /etc/hostname /etc/machine-id
    else
        warn "SELinux is on in ${root:-/}, and what was written has no labels of its policy: run restorecon -R /etc /usr/local there, or make /.autorelabel"
    fi
}

reload() {
    if running; then
        systemctl daemon-reload || warn 'systemd could not be told; it will know after a reboot'
    fi
}

# Forgetting.

forget() {
    if running && has -d /var/log/journal; then
        # Or journald writes into the old directory again as soon as it finds its file removed.
        journalctl --relinquish-var || warn 'journald keeps writing to /var/log/journal: generalize a mounted image'
    fi
    while read -r how what whose <&3; do
        forgot=''
        case $what in
            '~'/*) in_homes "$how" "${what#?}" ;;
            *) "$how" "$what" ;;
        esac
        [ -z "$forgot" ] || say "forgot $what: $whose"
    done 3<<end
$(forgotten)
end
}

# in_homes HOW PATTERN: do it in the home of everybody.
in_homes() {
    "$1" "/root$2"
    if locate /home; then
        for home in "$located"/*; do
            "$1" "/home/${home##*/}$2"
        done
    fi
    has -f /etc/passwd || return 0
    # The last line may lack its end, as with all who read these files.
    while IFS=: read -r _ _ _ _ _ home _ || [ -n "$home" ]; do
        case $home in /*) "$1" "$home$2" ;; esac
    done <"$located"
}

# remove PATTERN: the files and links that fit.
remove() {
    locate "${1%/*}/." || return 0
    # shellcheck disable=SC2231 # it is a pattern
    for entry in "$located"/${1##*/}; do
        if [ -L "$entry" ] || [ -f "$entry" ]; then
            rm -f "$entry"
            forgot=yes
        fi
    done
}

# remove_file PATH: where it is a file; a link leads to what is made anew in each boot.
remove_file() {
    place "$1" || return 0
    [ -L "$located" ] || remove "$1"
}

# clear DIR: all that is in it, and keep it.
clear() {
    has -d "$1" || return 0
    found=$(find "$located" -xdev -mindepth 1)
    if [ -n "$found" ]; then
        find "$located" -xdev -mindepth 1 -delete
        forgot=yes
    fi
}

# clear_logs DIR: cut the logs to nothing, for daemons have them open or expect them there. Removed are those that have
# been rotated, those in a directory of somebody else than root, who could make a link of them meanwhile, and those that
# have another name, for that may be outside.
clear_logs() {
    has -d "$1" || return 0
    found=$(find "$located" -xdev -type f -size +0c)
    [ -n "$found" ] || return 0
    find "$located" -xdev -type d ! -user 0 -prune -o -type f -links 1 -size +0c \
        ! -name '*[._-][0-9]' ! -name '*[._-][0-9][0-9]' ! -name '*-[0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9]*' \
        ! -name '*.old' ! -name '*.gz' ! -name '*.bz2' ! -name '*.xz' ! -name '*.zst' -exec truncate -s 0 {} +
    find "$located" -xdev -type f -size +0c -delete
    forgot=yes
}

# blank PATH: an empty file, even where there was none: a boot without /etc/machine-id is the first one to systemd.
blank() {
    place "$1"
    if [ -L "$located" ] || [ ! -f "$located" ] || [ -s "$located" ]; then
        replace 444 "$located" </dev/null
        forgot=yes
    fi
    chmod 444 "$located"
}

# name PATH: the name that DHCP clients do not send, whatever systemd's name for the nameless is.
name() {
    has -s "$1" && [ -f "$located" ] || return 0
    if [ "$(cat "$located")" != localhost ]; then
        replace 644 "$located" <<end
localhost
end
        forgot=yes
    fi
}

# What opens every VM is told: it may be what the image is for.
tell_what_is_left() {
    with_keys='' with_password=''
    if has -f /etc/passwd; then
        while IFS=: read -r account password _ _ _ home _ || [ -n "$account" ]; do
            ! has_keys "$home" || with_keys="$with_keys $account"
            ! opens "$account" "$password" || with_password="$with_password $account"
        done <"$located"
    fi
    [ -z "$with_keys" ] || say "left what opens every VM, authorized keys of:$with_keys"
    [ -z "$with_password" ] || say "left what opens every VM, a password of:$with_password"
    each /etc/ssh sshd_config tell_if_host_key
    each /etc/ssh/sshd_config.d '*.conf' tell_if_host_key
}

has_keys() {
    for keys in "$1/.ssh/authorized_keys" "$1/.ssh/authorized_keys2"; do
        if has -f "$keys" && grep -q '^[[:space:]]*[^#[:space:]]' "$located"; then
            return 0
        fi
    done
    return 1
}

# opens ACCOUNT PASSWORD: whether a password, or none at all, lets one in; PASSWORD is what /etc/passwd says.
opens() {
    hash=$2
    if [ "$2" = x ]; then
        hash='*'
        if has -f /etc/shadow; then
            while IFS=: read -r shadow_account shadow_hash _ || [ -n "$shadow_account" ]; do
                [ "$shadow_account" != "$1" ] || hash=$shadow_hash
            done <"$located"
        fi
    fi
    case $hash in '!'* | '*'*) return 1 ;; esac
}

tell_if_host_key() {
    if grep -Ei '^[[:space:]]*HostKey[[:space:]=]' "$located" | grep -qv '/etc/ssh/ssh_host_'; then
        say "left SSH host keys that every VM will have: $path names others than /etc/ssh/ssh_host_*"
    fi
}

# Of a system that is to live on.
tell_if_no_ssh_keys() {
    ssh_keys_are_ours_to_make || return 0
    found=''
    each /etc/ssh 'ssh_host_*_key' note_found
    [ -n "$found" ] || say "left ${root:-/} without SSH host keys, which sshd does not start without: run ssh-keygen -A there"
}

note_found() {
    found=yes
}

# running: whether the target system is the one that we run in.
running() {
    [ -z "$root" ] && [ -d /run/systemd/system ]
}

# What ends while the system is shut down may write once more what was forgotten: DHCP clients their leases, shells
# their histories, systemd its random seed. So it is forgotten again after them.
forget_again_at_shutdown() {
    running || return 0
    mkdir -p "${again%/*}"
    cat "$here/${0##*/}" >"$again"
    cat >/run/systemd/system/azure-provisioning-forget.service <<end
[Unit]
Description=Forget once more what the end of this boot has written
DefaultDependencies=no
RequiresMountsFor=/etc /home /root /var/lib /var/log
Before=sysinit.target networking.service systemd-random-seed.service systemd-update-utmp.service wtmpdb-update-boot.service
Conflicts=shutdown.target
Before=shutdown.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/true
ExecStop=/bin/sh $again --forget
end
    systemctl daemon-reload
    systemctl start azure-provisioning-forget.service
}

# What has to hold before anything is changed.

check_sources() {
    for source in azure_provisioning.py "$unit"; do
        if [ ! -f "$here/$source" ] || [ ! -s "$here/$source" ]; then
            refuse "no $source beside install.sh, which comes with it"
        fi
    done
}

check_systemd() {
    runs /usr/lib/systemd/systemd || runs /lib/systemd/systemd || "$1" "no systemd in ${root:-/}"
}

# Sets python to the path that Python has in the target system.
check_python() {
    for python in /usr/bin/python3 /usr/libexec/platform-python; do # the latter is RHEL 8's
        ! python_is_whole || return 0
    done
    "$1" "no Python 3.6 or later with its standard library in ${root:-/} (Debian: libpython3-stdlib)"
}

# Whether python is 3.6 or later and has its standard library.
python_is_whole() {
    runs "$python" || return
    minor=${located##*python3.}
    case $minor in [6-9] | [1-9][0-9]) ;; *) return 1 ;; esac
    for library in "/usr/lib/python3.$minor" "/usr/lib64/python3.$minor"; do
        # Debian's python3-minimal has neither; .pyc is for systems without the sources.
        for suffix in py pyc; do
            if has -f "$library/json/__init__.$suffix" && has -f "$library/xml/etree/ElementTree.$suffix"; then
                return 0
            fi
        done
    done
    return 1
}

check_useradd() {
    [ -z "$user" ] || runs /usr/sbin/useradd || object "no useradd in ${root:-/}, and nothing else creates a user"
}

check_agents() {
    agent=$(find_agent)
    [ -z "$agent" ] || object "$agent is enabled in ${root:-/}, and two provisioning agents fight: disable it"
}

# Print the name of another provisioning agent that the target system would start.
find_agent() {
    for agent in cloud-init walinuxagent waagent azure-init afterburn-checkin; do
        if [ "$agent" = cloud-init ] && has -e /etc/cloud/cloud-init.disabled; then
            continue
        fi
        if enabled "$agent*.service"; then
            echo "$agent"
            return
        fi
    done
}

# check_place PATH: what is there must be ours to replace.
check_place() {
    if ! place "$1"; then
        refuse "$1 cannot be made in ${root:-/}: $why"
    elif [ -L "$located" ] && [ "$(readlink "$located")" = /dev/null ]; then
        object "${1##*/} is masked in ${root:-/}: unmask it"
    elif [ -L "$located" ]; then
        object "$1 is a symbolic link in ${root:-/}: remove it"
    elif [ -e "$located" ] && [ ! -f "$located" ]; then
        refuse "$1 is there in ${root:-/} and is no file: remove it"
    elif [ -e "$located" ] && ! is_ours "$located"; then
        object "somebody changed $1 in ${root:-/}, or put it there: keep what is needed of it elsewhere (of a unit in a drop-in), and remove it"
    fi
}

# check_link UNIT: what is in the place of the link that enables it must be ours to replace.
check_link() {
    if ! place "$wants/$1"; then
        refuse "$wants/$1 cannot be made in ${root:-/}: $why"
    elif [ ! -L "$located" ] && [ -e "$located" ]; then
        refuse "$wants/$1 is there in ${root:-/} and is no link: remove it"
    elif [ -L "$located" ] && ! is_our_link; then
        object "$wants/$1 in ${root:-/} does not lead to the unit: remove it"
    fi
}

# Whether a VM made from this image would come up.

check_installed() {
    if ! unit_file "$unit" || ! runs "$program" || ! has -s "$program"; then
        object "azure-provisioning is not installed in ${root:-/}, or masked: run install.sh first"
    fi
}

check_network_is_for_every_vm() {
    hex='[0-9A-Fa-f][0-9A-Fa-f]'
    bound /etc/netplan '*.yaml' "^[^#]*macaddress[\"']?[[:space:]]*:" "match 'driver: hv_netvsc'"
    networkds="^[[:space:]]*(Permanent)?MACAddress[[:space:]]*=[[:space:]]*$hex"
    bound /etc/systemd/network '*.network' "$networkds" "match 'Driver=hv_netvsc'"
    bound /etc/systemd/network '*.link' "$networkds" "match 'Driver=hv_netvsc', or remove it"
    locate /etc/systemd/network && for directory in "$located"/*.network.d "$located"/*.link.d; do
        bound "/etc/systemd/network/${directory##*/}" '*.conf' "$networkds" 'remove the line'
    done
    # Either hexadecimal or, in older files, decimal.
    bound /etc/NetworkManager/system-connections '*' \
        "^[[:space:]]*(cloned-)?mac-address[[:space:]]*=[[:space:]]*(${hex}[:-]|[0-9]+;)" 'remove the line'
    bound /etc/sysconfig/network-scripts 'ifcfg-*' "^[[:space:]]*(HWADDR|MACADDR)=[\"']?$hex" 'remove the line'
    bound /etc/sysconfig/network 'ifcfg-*' "^[[:space:]]*(HWADDR|LLADDR)=[\"']?$hex" 'remove the line'
    bound /etc/network interfaces "^[[:space:]]*hwaddress[[:space:]].*${hex}[:-]" 'remove the line'
    bound /etc/network/interfaces.d '*' "^[[:space:]]*hwaddress[[:space:]].*${hex}[:-]" 'remove the line'
    address='ATTRS?[{]address[}]==' name='NAME:?="'
    bound /etc/udev/rules.d '*.rules' "^[^#]*($address.*$name|$name.*$address)" 'remove the line'
}

# bound DIR PATTERN REGEX REMEDY: object to each file of DIR that has a line like REGEX.
bound() {
    regex=$3 remedy=$4
    each "$1" "$2" object_if_bound
}

object_if_bound() {
    if grep -Eq "$regex" "$located"; then
        object "$path in ${root:-/} is bound to a MAC address, and every VM has another: $remedy"
    fi
}

check_network_comes_up() {
    configured=''
    if enabled systemd-networkd.service; then
        configures /etc/systemd/network '*.network' '^[[:space:]]*(DHCP|Address)[[:space:]]*='
        configures /usr/local/lib/systemd/network '*.network' '^[[:space:]]*(DHCP|Address)[[:space:]]*='
        # What systemd itself brings, 80 and something, is for containers and the like.
        configures /usr/lib/systemd/network '[!8]*.network' '^[[:space:]]*(DHCP|Address)[[:space:]]*='
    fi
    if enabled networking.service; then
        interface='iface[[:space:]]+([^l]|l[^o]|lo[^[:space:]])[^[:space:]]*[[:space:]]+inet6?[[:space:]]+(dhcp|static|auto)'
        # Debian's own images for Azure write a file for each interface that they find.
        configures /etc/network interfaces "^[[:space:]]*($interface|source.*/run/network)"
        configures /etc/network/interfaces.d '*' "^[[:space:]]*$interface"
    fi
    if runs /usr/sbin/netplan; then
        configures /etc/netplan '*.yaml' .
    fi
    for manager in NetworkManager.service 'dhcpcd*.service' 'wicked*.service' connman.service network.service; do
        ! enabled "$manager" || configured=yes
    done
    if [ -z "$configured" ] && ! has -e /etc/rc3.d/S10network; then # RHEL's scripts are no unit
        object "nothing that is enabled in ${root:-/} would configure the network: enable systemd-networkd, with a .network file that matches 'Driver=hv_netvsc', or NetworkManager, or networking, with eth0 in /etc/network/interfaces"
    fi
}

# configures DIR PATTERN REGEX: set configured if a file of DIR has a line like REGEX.
configures() {
    regex=$3
    each "$1" "$2" note_if_configured
}

note_if_configured() {
    ! grep -Eq "$regex" "$located" || configured=yes
}

# A disk that is not there means emergency mode, without a network, unless its line has nofail.
check_fstab() {
    has -f /etc/fstab || return 0
    while read -r device _ _ options _ || [ -n "$device" ]; do
        case $device in
            /dev/disk/azure/root* | /dev/disk/azure/os*) continue ;; # every VM has this one
            /dev/disk/azure/* | /dev/disk/cloud/*) ;;
            *) continue ;;
        esac
        case ,$options, in
            *,nofail,* | *,noauto,*) ;;
            *) object "/etc/fstab in ${root:-/} wants $device, which not every VM has: add nofail to its options, or remove the line" ;;
        esac
    done <"$located"
}

check_ssh_keys() {
    if ssh_keys_are_ours_to_make; then
        check_place "$units/$ssh_unit"
        check_link "$ssh_unit"
    fi
}

check_machine_id() {
    if ! place /etc/machine-id || [ ! -d "${located%/*}" ]; then
        refuse "/etc/machine-id cannot be made in ${root:-/}: ${why:-there is no /etc}"
    elif [ ! -L "$located" ] && [ -d "$located" ]; then
        refuse "/etc/machine-id is a directory in ${root:-/}: remove it"
    fi
}

# Whether there is an sshd, and no unit of the distribution's that makes its host keys wherever they are missing. Debian
# 13 has one that makes them at a first boot only, and a boot with an empty /etc/machine-id is none.
ssh_keys_are_ours_to_make() {
    runs /usr/sbin/sshd && runs /usr/bin/ssh-keygen || return
    for maker in ssh.service sshd.service sshd-keygen.service sshd-keygen@.service; do
        if unit_file "$maker" && grep -Eq '^[^#;]*(keygen|gen-?keys)' "$located" &&
            ! grep -q '^ConditionFirstBoot=' "$located"; then
            return 1
        fi
    done
}

# The command line.

root='' action='' user='' force=''
while [ $# -gt 0 ]; do
    case $1 in
        --root=?*) root=${1#--root=} ;;
        --root) # an empty DIR is a variable that was not set, and does not mean this system
            root=${2:-}
            [ -n "$root" ] || misused
            shift
            ;;
        --uninstall | --generalize | --forget)
            [ -z "$action" ] || misused
            # The last is for forget_again_at_shutdown() alone.
            [ "$1" != --forget ] || [ "$0" = "$again" ] || misused
            action=${1#--}
            ;;
        --user) user=yes ;;
        --force) force=yes ;;
        -h | --help)
            echo "$usage"
            exit
            ;;
        *) misused ;;
    esac
    shift
done
[ -z "$user" ] || [ -z "$action" ] || misused
case $0 in
    /*) here=${0%/*} ;;
    */*) here=./${0%/*} ;;
    *) here=. ;;
esac
if [ "$(id -u)" != 0 ]; then
    refuse 'this needs root'
    exit 1
fi
for tool in cksum find grep mktemp readlink sed tail truncate; do
    command -v "$tool" >/dev/null || refuse "this machine has no $tool"
done
[ -z "$refused" ] || exit 1
if [ -n "$root" ]; then
    case $root in /*) ;; *) root=./$root ;; esac # for cd, - and -P are no directories
    if [ ! -d "$root" ]; then
        refuse "no directory $root"
        exit 1
    fi
    root=$(cd "$root" && pwd -P && echo .) # keeps newlines at the end of its name
    root=${root%??}
    while [ "$root" != "${root%/}" ]; do root=${root%/}; done # / is this system
fi
trap end EXIT
trap 'exit 1' HUP INT TERM
${action:-install}
