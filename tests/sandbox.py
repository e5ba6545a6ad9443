"""Run the unmodified program where the pretend Azure is at Azure's real addresses, and nothing else can be reached.

`python3 -m tests.sandbox [COMMAND ...]` runs COMMAND, by default the program without arguments, in network, UTS and
mount namespaces of its own: there a host name, an /etc and a /run of a VM stand in place of the machine's, whose D-Bus
is thus out of reach. It ends by showing what Azure saw and what the VM is called now; its exit status is COMMAND's.
With --admin-username the program makes that user, too, in a /home that is the VM's own; that takes root.

The namespaces belong to this process and go with it, however it ends. Needs unshare, mount and ip, which every
distribution brings, and either root or a kernel that allows user namespaces to everybody.
"""

import argparse
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
from typing import Any, Dict, List, Optional, TextIO

from tests.fake_azure import IMDS, WIRESERVER, FakeAzure, add_vm_arguments, describe, from_arguments

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAM = os.path.join(REPOSITORY, "azure_provisioning.py")
ADDRESSES = {WIRESERVER: "168.63.129.16", IMDS: "169.254.169.254"}

IMAGE_NAME = "image"  # what the VM is called before it is provisioned
HOSTS = f"127.0.0.1\tlocalhost\n127.0.1.1\t{IMAGE_NAME}.example.com {IMAGE_NAME}\n"
# What programs need to know users by name and to find libraries; everything else in /etc stays out.
ETC = ("passwd", "group", "nsswitch.conf", "ld.so.cache", "ld.so.conf", "login.defs", "alternatives", "localtime")
TOOLS = ("unshare", "mount", "ip")
MARK = "AZURE_SANDBOX"  # names the machine's namespaces to the process inside, which checks that it left them

DENIED = (
    "user namespaces are not allowed to this user here: run it as root, or allow them "
    "(sysctl kernel.unprivileged_userns_clone=1 or, on Ubuntu, kernel.apparmor_restrict_unprivileged_userns=0)"
)


# How root runs a command as somebody who may not do what root may, but read what root may: a checkout may be in /root.
READING = "-all,+dac_read_search"
ORDINARY_USER = ("setpriv", "--reuid=65534", "--clear-groups", "--inh-caps=" + READING, "--ambient-caps=" + READING)


class SandboxError(Exception):
    """The sandbox cannot be made, with what to do about it."""


def namespaces() -> str:
    """Return the identities of the namespaces that this process must not share with the machine."""
    return " ".join(os.readlink("/proc/self/ns/" + kind) for kind in ("net", "uts", "mnt"))


def environment() -> Dict[str, str]:
    """Return the environment without what leads to a D-Bus, a journal or another Python."""
    dropped = ("DBUS_", "PYTHON", "JOURNAL_STREAM", "NOTIFY_SOCKET", "XDG_RUNTIME_DIR")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return dict(kept, PATH=os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin")


def unshare_command(*kinds: str) -> List[str]:
    """Return the start of a command line that runs the rest of it as root in new namespaces, of kinds and of mounts.

    Raises SandboxError where that is not possible.
    """
    path = environment()["PATH"]
    missing = [tool for tool in TOOLS if not shutil.which(tool, path=path)]
    if missing:
        raise SandboxError(f"cannot find {' and '.join(missing)}: install util-linux and iproute2")
    command = ["unshare", "--mount", *kinds]
    if os.geteuid() != 0:
        command += ["--user", "--map-root-user"]
    # A mount is what Ubuntu's AppArmor takes away from a user namespace, after it has allowed the namespace itself.
    probe = subprocess.run(
        [*command, "mount", "-t", "tmpfs", "tmpfs", "/run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(),
        check=False,
    )
    if probe.returncode != 0:
        output = " ".join(probe.stdout.decode("utf-8", "replace").split())
        advice = DENIED if os.geteuid() != 0 else "this root may not make namespaces: is it one inside a container?"
        raise SandboxError(f"{advice} ({output})")
    return command


@functools.lru_cache(maxsize=None)
def impossible() -> str:
    """Return why no sandbox can be made here, or nothing."""
    try:
        unshare_command("--net", "--uts")
    except SandboxError as error:
        return str(error)
    return ""


def mounts(*points: str) -> List[str]:
    """Return what is mounted at points, as the kernel lists it."""
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        return [line for line in file if line.split()[4] in points]


def call(*command: str) -> None:
    """Run command, which must succeed."""
    subprocess.run(command, check=True, env=environment())


def furnish(host_name: str, hosts: Optional[str], own_home: bool) -> None:
    """Make the namespaces that this process is in those of a VM called host_name, whose /etc/hosts is hosts.

    Its users are made in a /home that is the VM's own; without own_home the machine's can be read.
    """
    if set(namespaces().split()) & set(os.environ.pop(MARK, namespaces()).split()):
        raise SandboxError("refusing to furnish the machine itself")  # a bug here would rename it
    files = {}
    for name in ETC:
        source = os.path.join("/etc", name)
        if os.path.isfile(source):
            with open(source, "rb") as file:
                files[name] = file.read()
    links = {}
    if os.path.isdir("/etc/alternatives"):
        links = {name: os.path.realpath("/etc/alternatives/" + name) for name in os.listdir("/etc/alternatives")}
    for directory in ("/var", "/home", "/dev"):
        if os.access(directory, os.W_OK):
            call("mount", "-n", "--rbind", directory, directory)
            call("mount", "-n", "-o", "remount,bind,ro", directory)
    for directory in ("/etc", "/run", "/var/run"):
        if os.path.isdir(directory) and not os.path.islink(directory):
            call("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", directory)
    if own_home and os.path.isdir("/home"):
        # What this runs may be in the /home that is covered.
        os.mkdir("/run/home")
        call("mount", "-n", "--rbind", "/home", "/run/home")
        call("mount", "-n", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/home")
        for directory in (REPOSITORY, sys.prefix, sys.base_prefix):
            if directory.startswith("/home/"):
                os.makedirs(directory, exist_ok=True)
                call("mount", "-n", "--rbind", "/run" + directory, directory)
    files["shadow"] = b""  # without it useradd locks accounts where it must not
    files["hostname"] = host_name.encode() + b"\n"
    if hosts is not None:
        files["hosts"] = hosts.encode()
    for name, content in files.items():
        with open(os.path.join("/etc", name), "wb") as file:
            file.write(content)
    os.mkdir("/etc/alternatives")
    for name, target in links.items():
        os.symlink(target, "/etc/alternatives/" + name)
    socket.sethostname(host_name)
    call("ip", "link", "set", "lo", "up")
    for address in ADDRESSES.values():
        call("ip", "address", "add", address + "/32", "dev", "lo")


def report(azure: FakeAzure) -> Dict[str, Any]:
    """Return what Azure saw, and what the VM is called now."""

    def read(path: str) -> Optional[str]:
        if not os.path.isfile(path):
            return None
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()

    return {
        "requests": [
            {key: request[key] for key in ("service", "method", "path", "outcome")} for request in azure.requests
        ],
        "reports": azure.reports,
        "host_name": os.uname().nodename,
        "etc_hostname": read("/etc/hostname"),
        "etc_hosts": read("/etc/hosts"),
        "etc": sorted(os.listdir("/etc")),
    }


def show(seen: Dict[str, Any]) -> None:
    """Print what report() returned, for a person."""
    print("\nWhat Azure saw:")
    for request in seen["requests"]:
        print("  {service:10} {method:4} {path}  ->  {outcome}".format(**request))
    for health in seen["reports"]:
        verdict = "accepted" if health["accepted"] else "refused"
        about = "for container {container_id}, incarnation {incarnation}".format(**health)
        print(f"  {describe(health)} {about}: {verdict}")
    if not seen["reports"]:
        print("  no health report: Azure would declare this VM failed")
    print("What the VM is called now:")
    print(f"  {seen['host_name']}  (/etc/hostname: {(seen['etc_hostname'] or 'missing').strip()})")


def inside(options: argparse.Namespace, result: TextIO) -> int:
    """Furnish the VM, run the command in it, and show what came of it, or write it to result."""
    own_home = bool(options.admin_username) and os.access("/home", os.W_OK)
    furnish(options.host_name, None if options.no_hosts else options.hosts, own_home)
    with from_arguments(options) as azure:
        for service, address in ADDRESSES.items():
            if service not in options.absent:
                azure.listen(service, address, 80)
        steps = ["hostname", "user", "ready"] if options.admin_username else []
        command = options.command or [sys.executable, "-IS", PROGRAM, *steps]
        try:
            status = subprocess.run(command, env=environment(), cwd=REPOSITORY, check=False).returncode
        except OSError as error:
            raise SandboxError(str(error)) from error
        seen = report(azure)
    if options.json:
        json.dump(seen, result)
    else:
        show(seen)
    return status if status >= 0 else 128 - status


def parse_arguments(arguments: List[str]) -> argparse.Namespace:
    """Return arguments as a namespace."""
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.sandbox", description="Run a command in a VM on a pretend Azure, made of namespaces."
    )
    add_vm_arguments(parser)
    parser.add_argument(
        "--absent", action="append", default=[], choices=sorted(ADDRESSES), help="a service to leave out"
    )
    parser.add_argument("--host-name", default=IMAGE_NAME, help="the VM's name at first (default: %(default)s)")
    parser.add_argument("--hosts", default=HOSTS, help="the VM's /etc/hosts")
    parser.add_argument("--no-hosts", action="store_true", help="no /etc/hosts at all")
    parser.add_argument(
        "--json", metavar="FILE", type=os.path.abspath, help="write what Azure saw to FILE, instead of showing it"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="default: the program")
    return parser.parse_args(arguments)


def main(arguments: Optional[List[str]] = None) -> int:
    """Enter new namespaces, or be in them, and return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    try:
        if MARK in os.environ:
            # Opened first: its directory may be read-only afterwards.
            with open(options.json or os.devnull, "w", encoding="utf-8") as result:
                return inside(options, result)
        if options.admin_username and not options.command and os.geteuid() != 0:
            raise SandboxError("making a user takes more user IDs than one: run this as root")
        # This process becomes the one inside, so nothing is left behind to look after it.
        command = [*unshare_command("--net", "--uts"), sys.executable, "-m", "tests.sandbox", *arguments]
        os.chdir(REPOSITORY)
        os.execvpe(command[0], command, dict(environment(), **{MARK: namespaces()}))
    except (SandboxError, subprocess.CalledProcessError, OSError) as error:
        print(f"sandbox: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
