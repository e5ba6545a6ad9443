#!/bin/sh
# Install azure-provisioning into this system, or into an image mounted at DIR; nothing from the image is run.
set -eu
umask 022
unset CDPATH
export LC_ALL=C

usage='usage: install.sh [--root DIR] [--uninstall] [--force]

Copy the program to /usr/local/sbin/azure-provisioning and its unit to /etc/systemd/system, and enable the unit, so that
it runs at the next boot. Run it again to enable the unit again, or to replace an older version.

  --root DIR    the system to install into: an image mounted at DIR, instead of this one
  --uninstall   take all of it away again, but for what somebody else has changed since
  --force       install although another provisioning agent is enabled, and over what somebody else has put there;
                with --uninstall, take that away, too'

unit=azure-provisioning.service
program=/usr/local/sbin/azure-provisioning
units=/etc/systemd/system
wants=$units/multi-user.target.wants
presets=/etc/systemd/system-preset
preset=$presets/00-azure-provisioning.preset
# Where systemd looks for units, the first that has one wins.
unit_path="$units /usr/local/lib/systemd/system /usr/lib/systemd/system /lib/systemd/system"

# The actions, as the lists of their steps. All refusals come before the first change.

install() {
    check_sources
    check_systemd
    check_python
    check_agents
    check_place "$program"
    check_place "$units/$unit"
    check_place "$preset"
    check_link
    see_presets
    begin
    put 755 "$program" the_program
    put 644 "$units/$unit" the_unit
    put 644 "$preset" the_preset
    arm
    reload
    say "installed and enabled in ${root:-/}: it runs at the next boot"
}

uninstall() {
    for path in "$wants/$unit" "$preset" "$units/$unit" "$program"; do
        place "$path" || refuse "$path cannot be reached in ${root:-/}: $why"
    done
    see_presets
    begin
    for path in "$wants/$unit" "$preset" "$units/$unit" "$program"; do
        take_away "$path"
    done
    [ -z "$our_presets" ] || take_away_empty "$presets"
    reload
    say "uninstalled from ${root:-/}"
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

# unit_file NAME: set located to what the target system would read as the unit NAME, or fail: there is none, or it is
# masked, by an empty file or a link to /dev/null, and so to no regular file.
unit_file() {
    for directory in $unit_path; do
        place "$directory/$1" || continue
        if [ -L "$located" ] || [ -e "$located" ]; then
            has -s "$directory/$1" && [ -f "$located" ]
            return
        fi
    done
    return 1
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

# last_line: print the line that ends a file whose other lines are standard input.
last_line() {
    cksum | {
        read -r sum size
        echo "# Written by install.sh, which tells from this line whether somebody changed the others: $sum $size"
    }
}

# is_ours FILE: whether it is as an install.sh wrote it.
is_ours() {
    case $(cksum <"$1") in
        '2894346630 1722' | '3424230890 34') return 0 ;; # unit and preset of version 1.0.0, which had no last line
    esac
    case $(sed 1d "$1" | cksum) in
        '34648184 28179' | '2377438622 28169') return 0 ;; # its program, the first line of which names the Python
    esac
    [ "$(tail -n 1 "$1" | tr -d '\000')" = "$(sed '$d' "$1" | last_line)" ]
}

# put MODE PATH COMMAND: make what COMMAND prints, and our last line, the file PATH, at once, unless it is so already.
put() {
    place "$2"
    mkdir -p "${located%/*}"
    temporary=$(mktemp "$located.XXXXXX") # a name that nobody has, and a file that is no link
    "$3" >"$temporary"
    line=$(last_line <"$temporary")
    echo "$line" >>"$temporary"
    if [ ! -L "$located" ] && cmp -s "$temporary" "$located"; then
        rm "$temporary"
    else
        [ ! -L "$located" ] || rm "$located" # or mv moves it into a directory that it leads to
        mv -f "$temporary" "$located"
    fi
    temporary=''
    chown 0:0 "$located"
    chmod "$1" "$located"
}

# arm: enable the unit, by its link, as systemctl does it.
arm() {
    place "$wants/$unit"
    if [ ! -L "$located" ] || [ "$(readlink "$located")" != "$units/$unit" ]; then
        mkdir -p "${located%/*}"
        rm -f "$located"
        ln -s "$units/$unit" "$located"
    fi
}

# The file or link PATH is taken away, but for what others made of it.
take_away() {
    place "$1"
    if [ ! -L "$located" ] && [ ! -e "$located" ]; then
        return
    fi
    if is_our_link || { [ ! -L "$located" ] && [ -f "$located" ] && is_ours "$located"; }; then
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

# Whether located is a link that enables the unit.
is_our_link() {
    [ -L "$located" ] || return
    case $(readlink "$located") in "$unit" | */"$unit") return 0 ;; esac
    return 1
}

reload() {
    if [ -z "$root" ] && [ -d /run/systemd/system ]; then
        systemctl daemon-reload || warn 'systemd could not be told; it will know after a reboot'
    fi
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
    runs /usr/lib/systemd/systemd || runs /lib/systemd/systemd || refuse "no systemd in ${root:-/}"
}

# Sets python to the path that Python has in the target system.
check_python() {
    for python in /usr/bin/python3 /usr/libexec/platform-python; do # the latter is RHEL 8's
        ! python_is_whole || return 0
    done
    refuse "no Python 3.6 or later with its standard library in ${root:-/} (Debian: libpython3-stdlib)"
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

check_agents() {
    agent=$(find_agent)
    [ -z "$agent" ] || object "$agent is enabled in ${root:-/}, and two provisioning agents fight: disable it"
}

# Print the name of another provisioning agent that the target system would start.
find_agent() {
    for agent in cloud-init walinuxagent waagent azure-init; do
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

check_link() {
    if ! place "$wants/$unit"; then
        refuse "$wants/$unit cannot be made in ${root:-/}: $why"
    elif [ ! -L "$located" ] && [ -e "$located" ]; then
        refuse "$wants/$unit is there in ${root:-/} and is no link: remove it"
    elif [ -L "$located" ] && ! is_our_link; then
        object "$wants/$unit in ${root:-/} does not lead to the unit: remove it"
    fi
}

# The command line.

root='' action='' force=''
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
case $0 in
    /*) here=${0%/*} ;;
    */*) here=./${0%/*} ;;
    *) here=. ;;
esac
if [ "$(id -u)" != 0 ]; then
    refuse 'this needs root'
    exit 1
fi
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
