#!/bin/sh
# Install azure-provisioning into this system, or into an image mounted at DIR; nothing from the image is run.
set -eu
umask 022
export LC_ALL=C # what is in an image may be in no encoding at all

usage='usage: install.sh [--user] [--root DIR] [--force]
       install.sh --generalize [--remove-user NAME]... [--check] [--yes] [--root DIR] [--force]
       install.sh --uninstall [--root DIR] [--force]

Copy the program to /usr/local/sbin/azure-provisioning and its unit to /etc/systemd/system, and enable the unit, so that
it runs at the next boot. Run it again to enable the unit again, or to replace an older version.

  --user        have it create the user that the VM is created with, too, who logs in with the SSH keys given and may
                sudo without a password; installed again without --user, it does not any more
  --generalize  the last command before the capture: make the system forget whose it was (machine ID, host name, SSH
                host keys, leases, logs, what other agents left), so that it can become many VMs, and enable the unit
  --remove-user NAME
                with --generalize, take away the account of who built the image, with its home, groups and rules of sudo
  --check       with --generalize, tell all that it would refuse and forget, and change nothing
  --yes         go on without a question
  --uninstall   take away all that was installed, but for what somebody else has changed since
  --root DIR    the system to work on: an image mounted at DIR, instead of this one
  --force       go on where this would refuse: although another provisioning agent is enabled, over what somebody else
                has put there, or although no VM would come up; with --uninstall, take away what was changed, too'

unit=azure-provisioning.service
ssh_unit=azure-provisioning-ssh-keys.service
program=/usr/local/sbin/azure-provisioning
units=/etc/systemd/system
wants=$units/multi-user.target.wants
preset=/etc/systemd/system-preset/00-azure-provisioning.preset
user_dropin=$units/$unit.d/10-user.conf
roots_keys=/root/.ssh/authorized_keys
# What userdel changes. An account is what passwd has, so that comes last.
lists='/etc/shadow /etc/group /etc/gshadow /etc/subuid /etc/subgid /etc/passwd'
again=/run/azure-provisioning/install.sh
# Where systemd looks for units, the first that has one wins.
unit_path="$units /usr/local/lib/systemd/system /usr/lib/systemd/system /lib/systemd/system"

# The actions, as the lists of their steps. All refusals come before the first change.

install() {
    check_sources
    check_system refuse
    check_agents
    [ -z "$user" ] || runs /usr/sbin/useradd || object "no useradd in ${root:-/}, and nothing else creates a user"
    check_ours "$program" "$units/$unit" "$preset" "$user_dropin" "$wants/$unit"
    begin
    put 755 "$program" signed sed "1s|.*|#!$python -IS|" "$here/azure_provisioning.py"
    put 644 "$units/$unit" signed cat "$here/$unit"
    # At a first boot systemd applies the presets before it starts units, and a vendor's may be to disable all.
    put 644 "$preset" signed echo "enable $unit"
    add_or_drop_user
    enable_unit "$unit"
    relabel
    reload
    say "installed and enabled in ${root:-/}: it runs at the next boot${user:+, and creates the user}"
}

uninstall() {
    set -- "$wants/$unit" "$wants/$ssh_unit" "$preset" "$user_dropin" "$units/$unit" "$units/$ssh_unit" "$program"
    check_reach "$@"
    begin
    ! running || rm -f "$again" # or it would forget once more at shutdown
    found=''
    for path; do
        ! there "$path" || { found=yes; take_away "$path"; }
    done
    if [ -z "$found" ]; then
        say "nothing of it is installed in ${root:-/}"
        return
    fi
    for path in "$preset" "$user_dropin"; do
        ! enter "${path%/*}" || rmdir "$PWD" 2>/dev/null || : # something else is in it
    done
    reload
    if runs /usr/sbin/sshd && [ -z "$(having '/etc/ssh/ssh_host_*_key' .)" ]; then
        say "left ${root:-/} without SSH host keys, which sshd does not start without: run ssh-keygen -A there"
    fi
    say "uninstalled from ${root:-/}"
}

generalize() {
    check_system object
    check_installed
    check_agents
    check_ours "$wants/$unit" "$wants/$ssh_unit" "$units/$ssh_unit"
    check_files /etc/machine-id /etc/hostname
    check_network_is_for_every_vm
    check_network_comes_up
    check_netplan
    check_fstab
    [ -r /proc/self/mountinfo ] || refuse '/proc is not mounted here, which tells what is mounted in what will be emptied'
    check_removal
    if [ -n "$check" ]; then
        [ -z "$removed" ] || say "would remove the accounts$removed, and their keys from root's"
        forget # nothing before begin()
        tell_what_is_left
        stop_if_refused
        return
    fi
    forget >/dev/null # nothing yet, but object where that will not be possible
    confirm
    begin
    unbind_netplan
    put 644 "$units/$ssh_unit" signed the_ssh_unit
    enable_unit "$ssh_unit"
    enable_unit "$unit"
    forget_again_at_shutdown
    for account in $removed; do
        remove_user "$account"
    done
    forget
    relabel
    tell_what_is_left
    ! running || sync
    say "generalized ${root:-/}: capture it before it boots again"
}

# What a captured image must not carry, or what is told of it, each line with what is done and why. Paths in ~ are those
# of every home. What is done is one of the functions behind forget():
#   remove       files, and links             clear        all that is in a directory
#   remove_file  a file, but not a link       clear_files  the files in it and below
#   remove_made  what is made anew, else told keep         nothing: it is told
#   unname       the name becomes localhost   blank        an empty file
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
remove_made /etc/resolv.conf                        name servers of the network that it was in
remove      /etc/lvm/devices/system.devices         the only disks that LVM would look at
remove      /etc/*shadow-                           passwords before their last change
remove      /etc/passwd-                            accounts before their last change
remove      /etc/group-                             groups before their last change
remove      /etc/sub[ug]id-                         subordinate IDs before their last change
remove      /var/lib/systemd/random-seed            secret seed of the random numbers of every VM
remove      /var/lib/urandom/random-seed            secret seed of the random numbers of every VM
remove      /efi/loader/random-seed                 secret seed of the random numbers of every VM
remove      /boot/loader/random-seed                secret seed of the random numbers of every VM
remove      /boot/efi/loader/random-seed            secret seed of the random numbers of every VM
remove      /var/lib/systemd/credential.secret      secret of systemd-creds
clear       /var/lib/waagent                        state of the Azure Linux Agent, with a password in it
clear       /var/lib/cloud                          state of cloud-init, with the user data in it
clear       /var/lib/azure-init                     state of azure-init
remove      ~/.*_history                            histories of shells and other programs
remove      ~/.history                              history of a shell
remove      ~/.histfile                             history of zsh
remove      ~/.local/share/fish/fish_history        history of fish
clear       /var/log/journal                        journal, filed under the old machine ID
clear_files /var/log/audit                          logs of auditd, often a file system of its own
clear_files /var/log                                logs
remove      /var/lib/lastlog/*                      times of logins
remove      /var/lib/wtmpdb/*                       times of logins and boots
keep        /etc/krb5.keytab                        keys of Kerberos, which every VM will have
keep        /etc/pki/consumer/*.pem                 identity in Red Hat's subscriptions, which every VM will have
keep        /var/lib/ubuntu-advantage/private/*     tokens of Ubuntu Pro, which every VM will have
keep        ~/.ssh/id_*                             private keys, which every VM will have
keep        ~/.azure                                credentials, which every VM will have
keep        ~/.aws                                  credentials, which every VM will have
keep        ~/.netrc                                passwords, which every VM will have
keep        ~/.git-credentials                      passwords, which every VM will have
unname      /etc/hostname                           host name, under which every VM would first ask for a lease
remove_file /var/lib/dbus/machine-id                machine ID, which systemd would put back from here
blank       /etc/machine-id                         machine ID
end
}

# What of a network's configuration is not for every VM: why, in which files, by which line, and what to do about it.
# A mac is the address of this machine, a name is sent instead of the VM's, and a port has a name that none has on Azure.
bound() {
    hex='[0-9A-Fa-f][0-9A-Fa-f]' is='[[:space:]]*=[[:space:]]*' port='en[opsx][0-9]'
    networkd="^[[:space:]]*(Permanent)?MACAddress$is$hex"
    nm="^[[:space:]]*(ipv4\.)?dhcp-(hostname${is}[^[:space:]]|send-hostname$is(false|no|0))"
    address='ATTRS?[{]address[}]==' named='NAME:?="'
    cat <<end
mac   /etc/netplan/*.yaml                         ^[^#]*macaddress["']?[[:space:]]*:      remove the line, and match 'driver: hv_netvsc', for one interface
mac   /etc/systemd/network/*.network              $networkd                               match 'Driver=hv_netvsc'
mac   /etc/systemd/network/*.link                 $networkd                               match 'Driver=hv_netvsc', or remove it
mac   /etc/systemd/network/*.network.d/*.conf     $networkd                               remove the line
mac   /etc/systemd/network/*.link.d/*.conf        $networkd                               remove the line
mac   /etc/NetworkManager/system-connections/*    ^[[:space:]]*(cloned-)?mac-address$is(${hex}[:-]|[0-9]+;) remove the line
mac   /etc/sysconfig/network-scripts/ifcfg-*      ^[[:space:]]*(HWADDR|MACADDR)=["']?$hex remove the line
mac   /etc/sysconfig/network/ifcfg-*              ^[[:space:]]*(HWADDR|LLADDR)=["']?$hex  remove the line
mac   /etc/network/interfaces                     ^[[:space:]]*hwaddress[[:space:]].*${hex}[:-] remove the line
mac   /etc/network/interfaces.d/*                 ^[[:space:]]*hwaddress[[:space:]].*${hex}[:-] remove the line
mac   /etc/udev/rules.d/*.rules                   ^[^#]*($address.*$named|$named.*$address) remove the line
name  /etc/netplan/*.yaml                         ^[^#]*([^-#a-z]hostname["']?:[[:space:]]*[^[:space:]]|send-hostname["']?:[[:space:]]*(false|no|off)) remove the line
name  /etc/systemd/network/*.network              ^[[:space:]]*(Hostname${is}[^[:space:]]|SendHostname$is(no|false|off|0)) remove the line
name  /etc/NetworkManager/system-connections/*    $nm                                     remove the line
name  /etc/NetworkManager/NetworkManager.conf     $nm                                     remove the line
name  /etc/NetworkManager/conf.d/*.conf           $nm                                     remove the line
name  /etc/sysconfig/network-scripts/ifcfg-*      ^[[:space:]]*DHCP_HOSTNAME=["']?[^"'[:space:]] remove the line
name  /etc/dhcp/dhclient*.conf                    ^[[:space:]]*(send|supersede)[[:space:]]+host-name[[:space:]=]+" say 'send host-name = gethostname();'
name  /etc/dhcpcd.conf                            ^[[:space:]]*hostname[[:space:]]+[^#[:space:]] say 'hostname' alone
port  /etc/netplan/*.yaml                         (^|[[:space:]{"'])${port}[a-z0-9]*["']?:|name:[[:space:]]*["']?$port match 'driver: hv_netvsc'
port  /etc/NetworkManager/system-connections/*    ^[[:space:]]*interface-name$is$port     remove the line
port  /etc/systemd/network/*.network              ^[[:space:]]*Name$is$port               match 'Driver=hv_netvsc'
port  /etc/sysconfig/network-scripts/ifcfg-*      ^[[:space:]]*DEVICE=["']?$port          it is eth0
port  /etc/network/interfaces                     ^[[:space:]]*(auto|allow-hotplug)([[:space:]].*)?[[:space:]]$port it is eth0
port  /etc/network/interfaces.d/*                 ^[[:space:]]*(auto|allow-hotplug)([[:space:]].*)?[[:space:]]$port it is eth0
end
}

# The other provisioning agents: their units, and the command that is enough against them. check_agents() knows how one
# is told not to provision, forgotten() what it leaves behind.
agents() {
    shown=$(printf %s "$root" | tr '\n' '?') # or one with a newline would make two rows of one
    disable="systemctl ${shown:+--root=$shown }disable"
    cat <<end
cloud-init   cloud-[cfi]*.service       touch $shown/etc/cloud/cloud-init.disabled
waagent      wa*agent.service           $disable walinuxagent waagent; or let it bring extensions alone, by Provisioning.Agent=disabled in /etc/waagent.conf
azure-init   azure-init*.service        $disable azure-init
afterburn    afterburn-checkin.service  $disable afterburn-checkin
end
}

# What configures the network: a unit that is enabled, or a program, and where that alone will not do, files that have a
# line. [!8]*: of systemd's own files, 80 and something are for containers and the like. /run/network: Debian's images for
# Azure have a file made there for each interface that is found. S10network: RHEL's scripts are no unit.
networks() {
    networkd='^[[:space:]]*DHCP[[:space:]]*=[[:space:]]*(yes|true|ipv4|both|on|1)'
    interface='iface[[:space:]]+([^l]|l[^o]|lo[^[:space:]])[^[:space:]]*[[:space:]]+inet[[:space:]]+dhcp'
    cat <<end
systemd-networkd.service  /etc/systemd/network/*.network              $networkd
systemd-networkd.service  /usr/local/lib/systemd/network/*.network    $networkd
systemd-networkd.service  /usr/lib/systemd/network/[!8]*.network      $networkd
networking.service        /etc/network/interfaces                     ^[[:space:]]*($interface|source.*/run/network)
networking.service        /etc/network/interfaces.d/*                 ^[[:space:]]*$interface
/usr/sbin/netplan         /etc/netplan/*.yaml                         dhcp4["']?[[:space:]]*:[[:space:]]*(true|yes|on|y)
NetworkManager.service
dhcpcd*.service
wicked*.service
connman.service
network.service
/etc/rc3.d/S10network
end
}

# What is said. What comes from an image cannot command the terminal: it sees printable ASCII alone.

say() {
    printf '%s' "$1" | tr '\n\000-\011\013-\037\177-\377' ' ?' # whatever is left over is the last, ?
    echo
}

warn() {
    say "install.sh: $1" >&2
}

# refuse REASON: tell it, and change nothing. All reasons are told before stop_if_refused() ends the program.
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
    if [ -n "$root$refused$yes" ] || [ ! -t 0 ]; then
        return
    fi
    keys=$(with_keys) password=$(with_password)
    say "Accounts that stay and open every VM, by authorized keys: ${keys:-none}; by a password: ${password:-none}." >&2
    printf 'This machine will forget its SSH host keys, machine ID, host name, leases, logs and histories, for good.\n' >&2
    printf 'Nobody can log in before it has booted again. Go on? [y/N] ' >&2
    read -r answer || answer=''
    case $answer in [yY] | [yY][eE][sS]) ;; *) refuse 'this was not confirmed' ;; esac
}

changing='' temporary='' copies=''
begin() {
    stop_if_refused
    changing=yes
}

stop_if_refused() {
    [ -z "$refused" ] || exit 1
}

end() {
    status=$?
    [ -z "$temporary" ] || rm -f "$temporary"
    [ -z "$copies" ] || rm -rf "$copies"
    if [ -n "$changing" ] && [ "$status" != 0 ]; then
        warn "this failed half-way, and ${root:-/} is not what it should be: mend the cause and run it again"
    fi
}

# Paths in the target system. A link in a mounted image may lead anywhere in this machine. So we go to the directory of
# what we want, look where we are, and use a name without a slash; what has it is not followed if it is a link.

# enter DIR: go there, or fail: it is not there, or not in the target system.
enter() {
    cd -P "$root$1/." 2>/dev/null || return
    case $PWD/ in "$root"/*) ;; *) return 1 ;; esac
}

# at PATH: go to its directory, and set name to what it is called there, or fail.
at() {
    enter "${1%/*}" && name=./${1##*/}
}

# there PATH: go to what is there, whatever it is, or fail.
there() {
    at "$1" && { [ -L "$name" ] || [ -e "$name" ]; }
}

# blocked DIR: whether something else is in its place, or of a directory above: then obstacle is that, and we are there.
blocked() {
    ! enter "$1" || return
    obstacle=$1
    until at "$obstacle"; do obstacle=${obstacle%/*}; done
    there "$obstacle"
}

# file PATH: go to a file, or fail.
file() {
    at "$1" && [ ! -L "$name" ] && [ -f "$name" ]
}

# runs PATH: whether it is a program; a link is taken for one.
runs() {
    at "$1" && { [ -L "$name" ] || { [ -f "$name" ] && [ -x "$name" ]; }; }
}

# having FILES LINE: print those files that have such a line. FILES is a pattern; what it finds out of the target system,
# behind a link, is no file(). Nor need be what somebody reads here, for a name with a newline is two.
having() {
    cd "$root/"
    for path in .$1; do
        if file "${path#.}" && grep -Eq -e "$2" "$name"; then printf '%s\n' "${path#.}"; fi
    done
}

# lines_of FILE: print them, each with its end, if it is there.
lines_of() {
    ! file "$1" || grep -a '' "$name" || : # it is empty
}

# starts UNIT: whether it, or the template of which it is an instance, is there and not masked, by an empty file or a link.
starts() {
    for candidate in "$1" "${1%@*}@.service"; do
        for directory in $unit_path; do
            there "$directory/$candidate" || continue
            if [ -L "$name" ]; then [ "$(readlink "$name")" != /dev/null ]; else [ -s "$name" ]; fi
            return
        done
    done
    return 1
}

# enabled UNITS: print those that fit and would be started at a boot.
enabled() {
    for directory in $unit_path; do
        ! enter "$directory" || find . -xdev -type l \( -path "./*.wants/$1" -o -path "./*.requires/$1" \)
    done | sed 's|.*/||' | sort -u | while read -r link; do
        ! starts "$link" || echo "$link"
    done
}

# What install.sh puts into the target system.

the_ssh_unit() {
    cat <<'end'
[Unit]
Description=Make the SSH host keys that this machine lacks
Documentation=man:ssh-keygen(1)
# Before any unit that starts sshd or makes keys, too, and before Azure is told that one can log in. A socket is part of
# basic.target, which everything comes after by default.
DefaultDependencies=no
Requires=local-fs.target
After=local-fs.target
Before=ssh.service sshd.service ssh.socket sshd.socket azure-provisioning.service
Before=sshd-keygen.service sshd-keygen@rsa.service sshd-keygen@ecdsa.service sshd-keygen@ed25519.service sshdgenkeys.service
Conflicts=shutdown.target
Before=shutdown.target
ConditionFileIsExecutable=/usr/bin/ssh-keygen
# A file that a power cut left empty is no key.
ConditionFileNotEmpty=|!/etc/ssh/ssh_host_rsa_key
ConditionFileNotEmpty=|!/etc/ssh/ssh_host_ecdsa_key
ConditionFileNotEmpty=|!/etc/ssh/ssh_host_ed25519_key

[Service]
Type=oneshot
# Or sshd and Ready would wait for as long as it hangs.
TimeoutStartSec=300
# It makes what is missing. In FIPS mode it cannot make the last, and fails.
ExecStart=-/usr/bin/ssh-keygen -A
# On the disk before anybody has seen them: a client that knows a key refuses another.
ExecStart=/bin/sh -c 'exec sync /etc/ssh/ssh_host_*'

[Install]
WantedBy=multi-user.target
end
}

# Sorted before what an administrator calls budget.conf, or the like, so that that is heard last.
the_user_dropin() {
    cat <<'end'
[Unit]
# It may be a file system of its own.
RequiresMountsFor=/home

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
# sshd is asked whom it lets in, and tells only where there is this directory, which its own unit makes later in the boot.
RuntimeDirectory=sshd
RuntimeDirectoryPreserve=yes
end
}

# put MODE PATH COMMAND...: make what COMMAND prints the content of PATH, at once.
put() {
    mode=$1 target=$2
    shift 2
    mkdir -p "$root${target%/*}"
    at "$target"
    temporary=$(mktemp "$name.XXXXXX") # a name that nobody has, and a file that is no link
    "$@" >"$temporary"
    chown 0:0 "$temporary"
    chmod "$mode" "$temporary"
    [ ! -L "$name" ] || rm "$name" # or mv moves it into a directory that it leads to
    mv -f "$temporary" "$name"
    temporary=''
}

# signed COMMAND...: what it prints, and a last line which lets it be told from what somebody changed. What is as we left
# it may be replaced and taken away in silence, whichever version it is of.
signed() {
    text=$("$@")
    printf '%s\n' "$text"
    printf '%s\n' "$text" | last_line
}

last_line() {
    sum=$(cksum) && echo "# Written by install.sh, which tells from this line whether somebody changed the others: $sum"
}

# is_ours NAME: whether it is as an install.sh left it, a link that enables the unit or a file with our last line.
is_ours() {
    if [ -L "$1" ]; then
        [ "${PWD##*/}" = "${wants##*/}" ] && [ "$(readlink "$1" | sed 's|.*/|./|')" = "$1" ]
    else
        [ -f "$1" ] && [ "$(tail -n 1 "$1" | cksum)" = "$(sed '$d' "$1" | last_line | cksum)" ]
    fi
}

# enable_unit UNIT: by its link, as systemctl does.
enable_unit() {
    mkdir -p "$root$wants"
    at "$wants/$1"
    rm -f "$name"
    ln -s "$units/$1" "$name"
}

# take_away PATH: what there() or file() went to, but for what others made of it.
take_away() {
    if is_ours "$name"; then
        rm "$name"
    elif [ -n "$force" ] && { [ -L "$name" ] || [ ! -d "$name" ]; }; then
        rm -f "$name"
        warn "took away $1, which somebody had changed or put there"
    else
        warn "left $1, which somebody changed or put there"
    fi
}

add_or_drop_user() {
    if [ -n "$user" ]; then
        put 644 "$user_dropin" signed the_user_dropin
        having "${user_dropin%/*}/*.conf" '^ExecStart=.*/azure-provisioning' | while IFS= read -r dropin; do
            if file "$dropin" && ! grep -q '^ExecStart=.* user' "$name"; then
                warn "$dropin says what the unit runs, without the step user: nobody is created until it is hostname user ready"
            fi
        done
    elif file "$user_dropin"; then
        take_away "$user_dropin"
        rmdir "$PWD" 2>/dev/null || :
        say "removed $user_dropin, which was installed with --user: no user is created any more"
    fi
}

# Give what was written the labels that it should have, or tell who runs this to do it.
relabel() {
    file /etc/selinux/config && grep -Eq '^SELINUX=(enforcing|permissive)' "$name" || return 0
    if running && command -v restorecon >/dev/null; then
        # shellcheck disable=SC2086
        restorecon -R -i "$units" /usr/local/sbin /etc/hostname /etc/machine-id /etc/netplan /etc/sudoers.d "$roots_keys" $lists
    else
        warn "SELinux is on in ${root:-/}, and what was written has no labels of its policy: run restorecon -R /etc /usr/local /root there, or make /.autorelabel"
    fi
}

# running: whether the target system is the one that we run in.
running() {
    [ -z "$root" ] && [ -d /run/systemd/system ]
}

reload() {
    ! running || systemctl daemon-reload || warn 'systemd could not be told; it will know after a reboot'
}

# Forgetting. Before begin() it only looks.

forget() {
    if [ -n "$changing" ] && running && [ -d /var/log/journal ]; then
        # Or journald writes into the old directory again as soon as it finds its file removed.
        journalctl --relinquish-var || warn 'journald keeps writing to /var/log/journal: generalize a mounted image'
    fi
    while read -r how what whose <&3; do
        changed='' kept=''
        case $what in
            '~'/*) in_homes "$how" "${what#?}" ;;
            *) "$how" "$what" ;;
        esac
        [ -z "$changed" ] || say "$forgot $what: $whose"
        [ -z "$kept" ] || say "left$kept: $whose"
    done 3<<end
$(forgotten)
end
}

# in_homes HOW FILES: do it in the home of everybody.
in_homes() {
    while IFS= read -r home; do
        case $leaving in *":$home:"*) ;; *) "$1" "$home$2" ;; esac
    done <<end
$(homes)
end
}

homes() {
    {
        echo /root
        ! enter /home || find . -mindepth 1 -maxdepth 1 | sed 's|^\.|/home|'
        lines_of /etc/passwd | cut -d: -f6
    } | sed -n 's|^\(/.*[^/]\)/*$|\1|p' | sort -u
}

# look_in DIR: enter it, to forget what is there, or fail.
told=''
look_in() {
    if blocked "$1" && [ -n "$root" ] && [ -L "$name" ]; then
        case $told/ in *"/$obstacle/"*) return 1 ;; esac
        told=$told/$obstacle
        object "$obstacle in $root is a link that leads nowhere in it: what it is to lead to would not be forgotten"
    fi
    enter "$1"
}

# mounts: print where something is mounted.
mounts() {
    [ -r /proc/self/mountinfo ] || return 0 # generalize() refuses then
    cut -d ' ' -f 5 /proc/self/mountinfo | sed 's/\\/\\0/g' | while IFS= read -r point; do
        case $point in *\\*) point=$(printf %b "$point") ;; esac # a space is \040 there, and \0040 to printf
        printf '%s\n' "$point"
    done
}

# check_mounts DIR TEST: before DIR is emptied, nothing may be mounted in it that fits TEST.
check_mounts() {
    [ -z "$changing" ] && enter "$1" || return 0
    while IFS= read -r point; do
        case $point in "$PWD"/*) ;; *) continue ;; esac
        ! "$2" "$point" || refuse "$point is mounted in $1, which is to be emptied: unmount it"
    done <<end
$(mounts)
end
}

# find -xdev goes where the same file system is mounted once more. What cannot be seen may be that.
is_bound() { [ "$(stat -c %d "$1" 2>/dev/null || stat -c %d .)" = "$(stat -c %d .)" ]; }

# delete DIR [TEST...]: what find finds in it.
delete() {
    look_in "$1" || return 0
    shift
    if [ -n "$(find . -xdev -mindepth 1 "$@")" ]; then
        changed=yes
        [ -z "$changing" ] || find . -xdev -mindepth 1 "$@" -delete
    fi
}

# The directory is kept; not all daemons make theirs.
clear() {
    check_mounts "$1" true
    delete "$1"
}
clear_files() {
    check_mounts "$1" is_bound
    delete "$1" -type f
}
remove() { delete "${1%/*}" -maxdepth 1 -name "${1##*/}" ! -type d; }
# Where it is a link, that leads to what is made anew in each boot.
remove_file() { delete "${1%/*}" -maxdepth 1 -name "${1##*/}" -type f; }

# remove_made PATH: a file that what is enabled makes anew, as networkd alone does not, or keep it, but say so.
remove_made() {
    check_writable "$1"
    if [ -n "$(enabled systemd-resolved.service)" ] || configuring | grep -Eqv '^(systemd-networkd\.service|/.*/netplan)$'; then
        remove_file "$1"
    elif file "$1" && grep '^[[:space:]]*nameserver' "$name" | grep -Fqv 168.63.129.16; then
        kept=" $1"
    fi
}

# keep FILES: but say so, unless it is the public half of a key.
keep() {
    look_in "${1%/*}" || return 0
    found=$(find . -xdev -mindepth 1 -maxdepth 1 -name "${1##*/}" ! -name '*.pub' | sed "s|^\.|${1%/*}|")
    kept=$kept${found:+ $found}
}

# rewrite MODE PATH TEXT: a file that says this alone, even where there was none.
rewrite() {
    file "$2" && [ "$(cat "$name")" = "$(printf %b "$3")" ] || changed=yes
    [ -z "$changing" ] || put "$1" "$2" printf %b "$3"
}
# The name that DHCP clients do not send, whatever systemd's name for the nameless is.
unname() { rewrite 644 "$1" 'localhost\n'; }
# A boot without /etc/machine-id is the first one to systemd.
blank() { rewrite 444 "$1" ''; }

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
ExecStop=/bin/sh $again --at-shutdown
end
    systemctl daemon-reload
    systemctl start azure-provisioning-forget.service
}

at_shutdown() {
    begin
    forget
}

# What opens every VM is told: it may be what the image is for.
with_keys() {
    lines_of /etc/passwd | while IFS=: read -r account _ _ _ _ home _; do
        ! stays "$account" || ! has_keys "$home/.ssh" || printf '%s\n' "$account"
    done
}

with_password() {
    { lines_of /etc/passwd; lines_of /etc/shadow; } | while IFS=: read -r account hash _; do
        case $hash in x | '!'* | '*'*) continue ;; esac
        ! stays "$account" || printf '%s\n' "$account"
    done
}

tell_what_is_left() {
    keys=$(with_keys) password=$(with_password)
    rules=$(with_keys | while read -r account; do rules_for "$account"; done | sort -u)
    [ -z "$keys" ] || say "left what opens every VM, authorized keys of: $keys"
    [ -z "$rules" ] || say "left rules of sudo for them: $rules"
    [ -z "$password" ] || say "left what opens every VM, a password of: $password"
    [ -z "$(having /etc/iscsi/initiatorname.iscsi '^InitiatorName=')" ] ||
        say 'left /etc/iscsi/initiatorname.iscsi: name at iSCSI targets, which every VM will have'
    { having /etc/ssh/sshd_config .; having '/etc/ssh/sshd_config.d/*.conf' .; } | while IFS= read -r config; do
        if lines_of "$config" | grep -i '^[[:space:]]*HostKey[[:space:]=]' | grep -qv /etc/ssh/ssh_host_; then
            say "left SSH host keys that every VM will have: $config names others than /etc/ssh/ssh_host_*"
        fi
    done
}

# has_keys DIR: whether somebody may log in by a key in DIR; a link is taken for one.
has_keys() {
    for keys in "$1/authorized_keys" "$1/authorized_keys2"; do
        at "$keys" || continue
        if [ -L "$name" ] || { [ -f "$name" ] && grep -q '^[[:space:]]*[^#[:space:]]' "$name"; }; then
            return
        fi
    done
    return 1
}

# The accounts that --remove-user names.

stays() {
    case " $removed " in *" $1 "*) return 1 ;; esac
}

# rule_of ACCOUNT: print what a line with a rule of sudo for it begins with.
rule_of() {
    printf '^[[:space:]]*"?%s"?[[:space:]]' "$(printf %s "$1" | sed 's/\./[.]/g')"
}

# rules_for ACCOUNT: print the files that have such lines.
rules_for() {
    having '/etc/sudoers.d/*' "$(rule_of "$1")"
}

# find_account NAME: set uid and home to those of the account, or fail.
find_account() {
    while IFS=: read -r listed _ uid _ _ home _; do
        [ "$listed" != "$1" ] || return 0
    done <<end
$(lines_of /etc/passwd)
end
    return 1
}

leaving=''
check_removal() {
    for account in $removed; do
        if ! find_account "$account" || [ "$uid" = 0 ]; then
            refuse "no account $account in ${root:-/} that could be removed"
        else
            if is_home_alone "$account"; then
                clear "$home" # nothing yet, as in forget()
                leaving="$leaving:${home%/}:"
            fi
            forget_spools "$account"
        fi
    done
    if [ -n "$removed" ]; then
        for list in "$roots_keys" $lists; do
            check_writable "$list"
        done
        command -v userdel >/dev/null || refuse 'this machine has no userdel'
    fi
}

# The account itself is the last, so that what was interrupted can be done again.
remove_user() {
    find_account "$1"
    take_keys_from_root "$1"
    remove_home "$1"
    forget_spools "$1"
    rules_for "$1" | while IFS= read -r rules; do
        file "$rules" || continue
        # A rule goes on in the next line after a backslash.
        put 440 "$rules" sed -E -e "/$(rule_of "$1")/{" -e ':a;/\\$/{N;ba;};d;}' -e "/^# User rules for $1\$/d" "./${rules##*/}"
        grep -q '^[[:space:]]*[^#[:space:]]' "$name" || rm "$name"
    done
    remove_from_lists "$1"
    named="(^|[^A-Za-z0-9._-])$(printf %s "$1" | sed 's/\./[.]/g')([^A-Za-z0-9._-]|\$)"
    found=$(having /etc/sudoers "$named"; having '/etc/sudoers.d/*' "$named")
    say "removed the account $1${found:+, but not from rules of sudo: $found}"
}

# cloud-init gives the user's keys to root, too, with a command that tells as whom to log in instead.
take_keys_from_root() {
    hint="login as the user \\\"$1\\\" rather"
    if file "$roots_keys" && grep -aqF "$hint" "$name"; then
        put 600 "$roots_keys" lines_without "$hint" "$name"
        say "took the keys of $1 out of $roots_keys"
    fi
}

lines_without() {
    grep -avF "$1" "$2" || [ $? = 1 ] # none is left
}

forget_spools() {
    for spool in /var/mail /var/spool/mail /var/spool/cron /var/spool/cron/crontabs /var/lib/systemd/linger; do
        remove "$spool/$1"
    done
}

# Where it is below /home, where it says, and neither somebody's who stays nor above theirs.
remove_home() {
    if is_home_alone "$1"; then
        clear "$home"
        rmdir "$PWD"
    elif there "$home"; then
        say "left the home $home"
    fi
}

is_home_alone() {
    enter /home && homes=$PWD && enter "$home" && mine=$PWD || return
    below=${home#/home/}
    [ "$mine" = "$homes/${below%/}" ] && [ "$mine" != "$homes/" ] || return
    lines_of /etc/passwd | while IFS=: read -r listed _ _ _ _ theirs _; do
        if stays "$listed" && enter "$theirs"; then
            case $PWD/ in "$mine"/*) return 1 ;; esac
        fi
    done
}

# By this machine's userdel, but on copies: in an image it would follow links, and do what login.defs says.
remove_from_lists() {
    copies=$(mktemp -d)
    mkdir "$copies/etc"
    echo 'USERGROUPS_ENAB yes' >"$copies/etc/login.defs"
    for list in $lists; do
        ! file "$list" || cp -p "$name" "$copies$list"
    done
    userdel --prefix "$copies" --force "$1"
    for list in $lists; do
        file "$list" || continue
        temporary=$(mktemp "$name.XXXXXX")
        cp -p "$copies$list" "$temporary"
        mv -f "$temporary" "$name"
    done
    temporary=''
    rm -r "$copies"
}

# What has to hold before anything is changed.

check_sources() {
    for source in azure_provisioning.py "$unit"; do
        [ -s "$here/$source" ] || refuse "no $source beside install.sh, which comes with it"
    done
}

# Sets python to the path that Python has in the target system.
check_system() {
    runs /usr/lib/systemd/systemd || runs /lib/systemd/systemd || "$1" "no systemd in ${root:-/}"
    python=/usr/bin/python3
    runs "$python" || python=/usr/libexec/platform-python # RHEL 8's
    if ! runs "$python" || ! has_library; then
        "$1" "no Python 3.6 or later with its standard library in ${root:-/} (Debian: libpython3-stdlib)"
    fi
}

# Debian's python3-minimal has no such module; .pyc is for systems without the sources.
has_library() {
    module=xml/parsers/expat.py
    [ -n "$(having "/usr/lib*/python3.[6-9]/$module*" .)$(having "/usr/lib*/python3.[1-9][0-9]/$module*" .)" ]
}

check_agents() {
    while read -r agent pattern command; do
        case $agent in # one that is told not to provision does not fight
            cloud-init) ! file /etc/cloud/cloud-init.disabled || continue ;;
            waagent) ! file /etc/waagent.conf || ! grep -q '^Provisioning\.Agent *= *disabled' "$name" || continue ;;
        esac
        found=$(enabled "$pattern")
        [ -z "$found" ] || object "$agent is enabled in ${root:-/} by $found, and two provisioning agents fight: $command"
    done <<end
$(agents)
end
}

# check_reach PATH...: their directories must be there, or possible to make, and what is in their place possible to replace.
check_reach() {
    for path; do
        if blocked "${path%/*}"; then
            refuse "$path is out of reach in ${root:-/}: $obstacle is no directory in it"
        elif ! writable .; then # we are in it, or in the nearest that there is
            refuse "$path cannot be written in ${root:-/}: $PWD is read-only"
        else
            check_writable "$path"
        fi
    done
}

# writable NAME: ask the kernel, by giving nobody a permission more: to busybox, root can write whatever it is.
writable() {
    chmod u+ "$1" 2>/dev/null
}

# check_writable PATH: a file must not be immutable, nor mounted there, or this would end half-way.
check_writable() {
    file "$1" || return 0
    if ! writable "$name"; then
        refuse "$1 cannot be written in ${root:-/}: run chattr -i for it"
    elif mounts | grep -Fqx "$PWD/${name#./}"; then
        refuse "$1 is mounted in ${root:-/}, from elsewhere: unmount it"
    fi
}

# check_files PATH...: they must be files or links, if they are there.
check_files() {
    check_reach "$@"
    for path; do
        if there "$path" && [ ! -L "$name" ] && [ ! -f "$name" ]; then
            refuse "$path is there in ${root:-/} and is no file: remove it"
        fi
    done
}

# check_ours PATH...: what is there must be ours to replace.
check_ours() {
    check_files "$@"
    for path; do
        at "$path" || continue
        if [ "$(readlink "$name")" = /dev/null ]; then
            object "$path is masked in ${root:-/}: unmask it"
        elif { [ -L "$name" ] || [ -f "$name" ]; } && ! is_ours "$name"; then
            object "somebody changed $path in ${root:-/}, or put it there: keep what is needed of it elsewhere (of a unit in a drop-in), and remove it"
        fi
    done
}

# Whether a VM made from this image would come up.

check_installed() {
    if ! starts "$unit" || ! runs "$program" || [ ! -s "$name" ]; then
        object "azure-provisioning is not installed in ${root:-/}, or masked: run install.sh first"
    fi
}

check_network_is_for_every_vm() {
    while read -r why files line remedy; do
        found=$(having "$files" "$line" | while IFS= read -r config; do
            ! file "$config" || ! without_mac "$name" | grep -Eq -e "$line" || printf '%s\n' "$config"
        done)
        case $why in
            mac) why='is bound to a MAC address, and every VM has another' ;;
            name) why="has its own name sent, so that Azure's DNS would not know the VM's" ;;
            port) why='is for an interface that no VM on Azure has' ;;
        esac
        [ -z "$found" ] || object "$found in ${root:-/} $why: $remedy"
    done <<end
$(bound)
end
    if asks_by_dhcpcd && file /etc/dhcpcd.conf && ! grep -Eq '^[[:space:]]*hostname[[:space:]]*(#|$)' "$name"; then
        object "/etc/dhcpcd.conf in ${root:-/} has no name sent, so that Azure's DNS would not know the VM's: add a line 'hostname'"
    fi
}

# Whether dhcpcd is what asks for leases: ifupdown takes it where it finds no dhclient.
asks_by_dhcpcd() {
    runs /usr/sbin/dhcpcd || runs /sbin/dhcpcd || return
    [ -z "$(enabled 'dhcpcd*.service')" ] || return 0
    [ -n "$(enabled networking.service)" ] && ! runs /usr/sbin/dhclient && ! runs /sbin/dhclient
}

# without_mac NAME: print a file of netplan as it is after the line of a MAC address beside that of the driver, which
# cloud-init writes on Azure, is taken out: the driver is what each VM's interface has. Others are printed as they are.
without_mac() {
    if [ "$(grep -c macaddress "$1")" -gt 1 ]; then # one driver would then stand for several interfaces
        cat "$1"
        return
    fi
    mac="macaddress: *[\"']?[0-9A-Fa-f:]*[\"']? *" # N, P and D: look at each two lines that follow each other
    sed -E -e '$!N' -e "s/^( *)(driver:.*)\n\1$mac\$/\1\2/" -e "s/^( *)$mac\n\1driver:/\1driver:/" -e 'P;D' "$1"
}

unbind_netplan() {
    having '/etc/netplan/*.yaml' macaddress | while IFS= read -r config; do
        file "$config" || continue
        if [ "$(without_mac "$name")" != "$(cat "$name")" ]; then
            put 600 "$config" without_mac "$name"
            say "took out of $config the line of the MAC address, beside that of the driver"
        fi
    done
}

# By this machine's netplan, on copies.
check_netplan() {
    found=$(having '/etc/netplan/*.yaml' .)
    if ! runs /usr/sbin/netplan || [ -z "$found" ]; then
        return
    elif ! command -v netplan >/dev/null; then
        warn "whether /etc/netplan is right is not known, for this machine has no netplan: run netplan generate there"
        return
    fi
    copies=$(mktemp -d)
    mkdir -p "$copies/etc/netplan"
    printf '%s\n' "$found" | while IFS= read -r config; do
        ! file "$config" || without_mac "$name" >"$copies$config"
    done
    if ! said=$(netplan generate --root-dir "$copies" 2>&1); then
        object "netplan refuses what /etc/netplan says in ${root:-/}: $said"
    elif [ "$(configuring)" = /usr/sbin/netplan ] &&
        ! find "$copies" -type f -exec grep -Eq '^(DHCP=(yes|ipv4)|method=auto)' {} \; \
            -exec grep -Eq '^(Name|OriginalName|Driver|Path|[Tt]ype)=' {} \; -print | grep -q .; then
        object "of what /etc/netplan says in ${root:-/} netplan makes no network with DHCP: give an interface 'dhcp4: true'"
    fi
    rm -r "$copies"
}

# configuring: print what would configure the network.
configuring() {
    while read -r what files line; do
        case $what in
            /*) runs "$what" || continue ;;
            *) [ -n "$(enabled "$what")" ] || continue ;;
        esac
        if [ -z "$files" ] || [ -n "$(having "$files" "$line")" ]; then
            echo "$what"
        fi
    done <<end
$(networks)
end
}

check_network_comes_up() {
    [ -n "$(configuring)" ] || object "nothing that is enabled in ${root:-/} would configure the network: enable systemd-networkd, with a .network file that matches 'Driver=hv_netvsc', or NetworkManager, or networking, with eth0 in /etc/network/interfaces"
}

# A disk that is not there means emergency mode, without a network, unless its line has nofail.
check_fstab() {
    os=$(lines_of /etc/fstab | sed -n 's|^[[:space:]]*\([^#[:space:]][^[:space:]]*\)[[:space:]][[:space:]]*/[[:space:]].*|\1|p' | tail -n 1)
    while read -r device where type options _; do
        case "$device $where $type ,$options," in
            *,nofail,* | *,noauto,* | /dev/disk/azure/root* | /dev/disk/azure/os*) continue ;; # each VM has the last two
            /dev/disk/azure/* | /dev/disk/cloud/* | /dev/vd* | /dev/xvd*) ;;
            "$os "*) continue ;; # a subvolume of the root's
            *' / '* | *' /boot'* | *' /efi '* | *' /usr '* | *' /var '* | *' /var/'* | *' /home '* | *' /opt '* | *' /tmp '* | *' swap '*)
                continue # where systems have their own file systems
                ;;
            /dev/* | UUID=* | LABEL=* | PARTUUID=* | PARTLABEL=*) ;;
            *) continue ;;
        esac
        object "/etc/fstab in ${root:-/} wants $device for $where, which not every VM has: add nofail to its options, or remove the line"
    done <<end
$(lines_of /etc/fstab)
end
}

# The command line.

# misused WHY
misused() {
    warn "$1; install.sh --help shows the usage"
    exit 2
}

root='' action=install user='' removed='' check='' forgot=forgot yes='' force=''
while [ $# -gt 0 ]; do
    case $1 in
        --root=?*) root=${1#--root=} ;;
        --root) # an empty DIR is a variable that was not set, and does not mean this system
            root=${2:-}
            [ -n "$root" ] || misused '--root wants a directory'
            shift
            ;;
        --uninstall | --generalize)
            [ "$action" = install ] || misused "--$action and $1 at once"
            action=${1#--}
            ;;
        --at-shutdown) # for forget_again_at_shutdown() alone
            [ "$0" = "$again" ] || misused "$1 is for the shutdown alone"
            action=at_shutdown
            ;;
        --remove-user)
            case ${2:-} in '' | -* | *[!A-Za-z0-9._-]*) misused '--remove-user wants the name of an account' ;; esac
            ! stays "$2" || removed="$removed $2"
            shift
            ;;
        --check) check=yes forgot='would forget' ;;
        --yes) yes=yes ;;
        --user) user=yes ;;
        --force) force=yes ;;
        -h | --help)
            echo "$usage"
            exit
            ;;
        *) misused "what is $1" ;;
    esac
    shift
done
[ -z "$user" ] || [ "$action" = install ] || misused '--user is for installing'
[ -z "$removed$check$yes" ] || [ "$action" = generalize ] || misused '--remove-user, --check and --yes are for --generalize'
case $0 in /*) here=$0 ;; *) here=$PWD/$0 ;; esac
here=${here%/*}
[ "$(id -u)" = 0 ] || refuse 'this needs root'
for tool in cksum cut find grep mktemp readlink sed stat tail; do
    command -v "$tool" >/dev/null || refuse "this machine has no $tool"
done
stop_if_refused
if [ -n "$root" ]; then
    case $root in /*) ;; *) root=./$root ;; esac # for cd, - and -P are no directories
    cd -P "$root" 2>/dev/null || refuse "no directory $root"
    stop_if_refused
    root=$PWD
    while [ "$root" != "${root%/}" ]; do root=${root%/}; done # / is this system
fi
trap end EXIT
trap 'exit 1' HUP INT TERM
"$action"
