#!/bin/sh
# Install azure-provisioning into this system, or into an image mounted at DIR; nothing from the image is run.
set -eu

usage='usage: install.sh [--root DIR] [--uninstall] [--force]

Copy the program to /usr/local/sbin/azure-provisioning and its unit to /etc/systemd/system, and enable the unit, so that
it runs at the next boot. Run it again to enable the unit again.

  --root DIR    the system to install into: an image mounted at DIR, instead of this one
  --uninstall   take all of it away again
  --force       install although another provisioning agent is enabled'

unit=azure-provisioning.service
program=/usr/local/sbin/azure-provisioning
units=/etc/systemd/system
wants=$units/multi-user.target.wants
presets=/etc/systemd/system-preset
preset=$presets/00-azure-provisioning.preset

misused() {
    echo "$usage" >&2
    exit 2
}

refuse() {
    echo "install.sh: $1; nothing was changed" >&2
    exit 1
}

# Print where PATH of the target system is for us. Its symbolic links are followed as that system would: an absolute one
# in a mounted image must not lead into this machine.
in_root() {
    rest=$1 resolved='' links=0
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
                if [ -L "$root$resolved/$part" ] && [ "$links" -lt 40 ]; then
                    links=$((links + 1))
                    target=$(readlink "$root$resolved/$part")
                    case $target in /*) resolved='' ;; esac
                    rest=$target/$rest
                else
                    resolved=$resolved/$part
                fi
                ;;
        esac
    done
    printf '%s\n' "$root$resolved"
}

# Print the path that Python has in the target system, if it is 3.6 or later and has its standard library.
find_python() {
    for python in /usr/bin/python3 /usr/libexec/platform-python; do # the latter is RHEL 8's
        file=$(in_root "$python")
        [ -x "$file" ] || continue
        minor=${file##*python3.}
        case $minor in [6-9] | [1-9][0-9]) ;; *) continue ;; esac
        for library in "/usr/lib/python3.$minor" "/usr/lib64/python3.$minor"; do
            library=$(in_root "$library")
            # Debian's python3-minimal has neither; .pyc is for systems without the sources.
            for suffix in py pyc; do
                if [ -e "$library/http/client.$suffix" ] && [ -e "$library/xml/etree/ElementTree.$suffix" ]; then
                    printf '%s\n' "$python"
                    return
                fi
            done
        done
    done
}

# Print the name of a provisioning agent that the target system would start.
find_agent() {
    for agent in cloud-init walinuxagent waagent azure-init; do
        if [ "$agent" = cloud-init ] && [ -e "$(in_root /etc/cloud/cloud-init.disabled)" ]; then
            continue
        fi
        for link in "$(in_root "$units")"/*.wants/"$agent"*.service "$(in_root /usr/lib/systemd/system)"/*.wants/"$agent"*.service; do
            [ -L "$link" ] || continue
            [ "$(readlink "$(in_root "$units")/${link##*/}")" = /dev/null ] && continue # masked
            printf '%s\n' "$agent"
            return
        done
    done
}

# put MODE FILE: make standard input the content of FILE in the target system, at once, unless it is so already.
put() {
    directory=$(in_root "${2%/*}")
    mkdir -p "$directory"
    file=$directory/${2##*/}
    cat >"$file.new"
    chmod "$1" "$file.new"
    if [ ! -L "$file" ] && cmp -s "$file.new" "$file"; then
        chmod "$1" "$file"
        rm "$file.new"
    else
        mv "$file.new" "$file"
    fi
}

install() {
    [ -x "$(in_root /usr/lib/systemd/systemd)" ] || [ -x "$(in_root /lib/systemd/systemd)" ] || refuse "no systemd in ${root:-/}"
    python=$(find_python)
    [ -n "$python" ] || refuse "no Python 3.6 or later with its standard library in ${root:-/} (Debian: libpython3-stdlib)"
    agent=$(find_agent)
    if [ -n "$agent" ] && [ -z "$force" ]; then
        refuse "$agent is enabled in ${root:-/}, and two provisioning agents fight: disable it, or use --force"
    fi
    sed "1s|.*|#!$python -IS|" "$here/azure_provisioning.py" | put 755 "$program"
    put 644 "$units/$unit" <"$here/$unit"
    # At a first boot systemd applies the presets before it starts units, and a vendor's may be to disable all.
    echo "enable $unit" | put 644 "$preset"
    mkdir -p "$(in_root "$wants")"
    link=$(in_root "$wants")/$unit
    [ "$(readlink "$link")" = "$units/$unit" ] || ln -sf "$units/$unit" "$link"
    echo "installed and enabled in ${root:-/}: it runs at the next boot"
}

uninstall() {
    for file in "$wants/$unit" "$preset" "$units/$unit" "$program"; do
        rm -f "$(in_root "${file%/*}")/${file##*/}"
    done
    rmdir "$(in_root "$presets")" 2>/dev/null || : # which exists only where somebody, likely we, made it
    echo "uninstalled from ${root:-/}"
}

root='' action=install force=''
while [ $# -gt 0 ]; do
    case $1 in
        --root=?*) root=${1#--root=} ;;
        --root) # an empty DIR is a variable that was not set, and does not mean this system
            root=${2:-}
            [ -n "$root" ] || misused
            shift
            ;;
        --uninstall) action=uninstall ;;
        --force) force=yes ;;
        -h | --help)
            echo "$usage"
            exit
            ;;
        *) misused ;;
    esac
    shift
done
here=$(cd "$(dirname "$0")" && pwd)
[ "$(id -u)" = 0 ] || refuse 'this needs root'
if [ -n "$root" ]; then
    [ -d "$root" ] || refuse "no directory $root"
    root=$(cd "$root" && pwd -P)
    root=${root%/} # / is this system
fi
$action
if [ -z "$root" ] && [ -d /run/systemd/system ]; then
    systemctl daemon-reload
fi
