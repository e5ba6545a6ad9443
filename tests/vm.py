"""What all VMs of the tests have in common: where they live, the far end of their network, what they are asked.

A container (tests/container.py) and a whole machine (tests/machine.py) are VMs. Nothing is left behind, however this
process ends: files and containers live in mount and process namespaces that a process of ours holds (Lab), networks in
namespaces that others hold (Azure), and the kernel kills all of these with us (PR_SET_PDEATHSIG, by way of setpriv).
Control groups are no process's: a process that outlives us by a moment removes them (JANITOR).
"""

import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import unittest
from typing import IO, Any, ClassVar, Dict, Iterator, List, Optional, Sequence, Tuple, Type

from tests import sandbox

RELEASES = ("bookworm", "trixie", "forky")  # and bullseye, in one boot
UNIT = "azure-provisioning.service"

# Where the lab keeps its files: a directory that every machine has, under a mount that only the lab sees.
WORK = "/dev/shm"
ROUTER = "10.0.0.1"
ADDRESSES = (ROUTER + "/24", "168.63.129.16/32", "169.254.169.254/32")
IMAGE_NAME = "image"
BOOTED = ("running", "degraded")

# How a VM hangs on its network: a container has one end of a pair of interfaces, QEMU brings a machine's.
PAIR = "pair"
TAP = "tap"

DIE_WITH_PARENT = ["setpriv", "--pdeathsig", "KILL"]

# Removes the control groups once its standard input ends, as it does when we end, and all their processes have ended.
JANITOR = """
cat
for _ in $(seq 100); do
    left=
    for group; do
        find "$group" -depth -type d -exec rmdir {} + 2>/dev/null
        [ ! -d "$group" ] || left=$group
    done
    [ -n "$left" ] || exit 0
    sleep 0.1
done
exit 1
"""


def readme_blocks() -> List[str]:
    """Return the README's blocks of commands, which the tests run."""
    with open(os.path.join(sandbox.REPOSITORY, "README.md"), encoding="utf-8") as file:
        return [textwrap.dedent(text) for _, text in re.findall(r"(?ms)^( *)```sh\n(.*?)^\1```$", file.read())]


def readme_block(*commands: str) -> str:
    """Return the README's only block in which all of commands are."""
    (found,) = (text for text in readme_blocks() if all(command in text for command in commands))
    return found


def missing_tools(tools: Sequence[str]) -> List[str]:
    """Return which of tools have to be installed before anything can be booted."""
    return [tool for tool in tools if not shutil.which(tool, path=sandbox.environment()["PATH"])]


def children_of(pid: int) -> List[int]:
    """Return the child processes of pid."""
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [int(child) for child in file.read().split()]


def control_groups() -> List[str]:
    """Return the directories of the control groups that we are in, of those hierarchies that systemd works with."""
    mounts = {"": ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"), "name=systemd": ("/sys/fs/cgroup/systemd",)}
    with open("/proc/self/cgroup", encoding="ascii") as file:
        groups = [line.rstrip("\n").split(":", 2)[1:] for line in file]
    found = [mount + path.rstrip("/") for kind, path in groups for mount in mounts.get(kind, ())]
    return [group for group in found if os.path.exists(group + "/cgroup.procs")]


def is_elsewhere(pid: int, kind: str) -> bool:
    """Whether the process pid has left our namespace of kind."""
    return os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")


def wait_for(what: str, condition: Any, seconds: float) -> Any:
    """Return what condition() returns once it is true. Raises AssertionError after seconds."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.05)


class Processes:
    """Processes that end with this object, and with this process."""

    def __init__(self) -> None:
        self.children: List[subprocess.Popen] = []  # type: ignore[type-arg]  # not to be subscripted before Python 3.9

    def start(
        self,
        *command: str,
        output: Optional[IO[bytes]] = None,
        wrap: Optional[List[str]] = None,
        keep: Sequence[int] = (),
    ) -> int:
        """Start command, under the command wrap and with the files keep, and return its process identifier."""
        child = subprocess.Popen(
            [*DIE_WITH_PARENT, *(wrap or []), *DIE_WITH_PARENT, *command],
            stdin=subprocess.DEVNULL,
            stdout=output or subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            env=sandbox.environment(),
            cwd=sandbox.REPOSITORY,
            pass_fds=keep,
        )
        self.children.append(child)
        return child.pid

    def stop(self) -> None:
        """Kill them all, the last first."""
        while self.children:
            child = self.children.pop()
            child.kill()
            child.wait()


class Lab:
    """A mount namespace with the roots of the releases in it, made when they are first asked for."""

    def __init__(self) -> None:
        self.processes = Processes()
        unshare = self.processes.start(
            "sleep", "infinity", wrap=["unshare", "--mount", "--pid", "--fork", "--kill-child"]
        )
        # Two systemds in one control group would each take the other's processes for its own.
        self.groups = [f"{group}/azure-provisioning-{unshare}" for group in control_groups()]
        self.janitor = subprocess.Popen(
            ["sh", "-c", JANITOR, "sh", *self.groups], stdin=subprocess.PIPE, start_new_session=True
        )
        for group in self.groups:
            os.makedirs(group, exist_ok=True)
        self.roots: Dict[Tuple[str, ...], str] = {}
        self.pid = wait_for("the lab", lambda: children_of(unshare), 5)[0]
        wait_for("the lab", lambda: is_elsewhere(self.pid, "mnt"), 5)
        self.run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", WORK)
        self.run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
        # The lab's own /proc, for systemd-nspawn, and the machine's beside it, in which the networks are found.
        self.run("mkdir", WORK + "/proc")
        self.run("mount", "--rbind", "/proc", WORK + "/proc")
        self.run("mount", "-t", "proc", "proc", "/proc")

    def enter(self) -> List[str]:
        """Return the start of a command line that runs the rest of it in the lab."""
        namespaces = f"/proc/{self.pid}/ns"
        return ["nsenter", f"--mount={namespaces}/mnt", f"--pid={namespaces}/pid", f"--wd={sandbox.REPOSITORY}"]

    def run(self, *command: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """Run command in the lab, to its end. Raises AssertionError with all it printed if it fails."""
        done = subprocess.run(
            [*self.enter(), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env=dict(sandbox.environment(), TMPDIR=WORK),
            check=False,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(command)}: status {done.returncode}\n{done.stdout}")
        return done

    def path(self, *names: str) -> str:
        """Return how a file in the lab is reached from outside."""
        return "/".join([f"/proc/{self.pid}/root{WORK}", *names])

    def root(self, release: str, packages: str, *hooks: str) -> str:
        """Return the directory, in the lab, of a pristine root of release with packages. hooks are mmdebstrap's."""
        key = (release, packages, *hooks)
        if key not in self.roots:
            root = f"{WORK}/{release}{len(self.roots)}"
            hooks = (*hooks, "--customize-hook=[ -L $1/etc/resolv.conf ] || : >$1/etc/resolv.conf")
            # A mirror may lag behind a release that is not out yet.
            options = ("--variant=minbase", '--aptopt=Acquire::Check-Valid-Until "false"', "--include=" + packages)
            self.run("mmdebstrap", *options, *hooks, release, root)
            self.roots[key] = root
        return self.roots[key]

    def close(self) -> None:
        """End everything in the lab, and with it the lab and its control groups."""
        self.processes.stop()
        self.janitor.communicate()
        if self.janitor.returncode != 0:
            raise AssertionError("a process of a container does not end")


class Azure:
    """The far end of a VM's network: the pretend Azure at its real addresses, and a DHCP and DNS server."""

    def __init__(
        self, lab: Lab, computer_name: str = "web-01", vm_arguments: Sequence[str] = (), cable: str = PAIR
    ) -> None:
        """vm_arguments tell more about the VM: see `python3 -m tests.fake_azure --help`."""
        self.lab = lab
        self.computer_name = computer_name
        self.vm_arguments = vm_arguments
        self.processes = Processes()
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        self.dhcp_log = tempfile.TemporaryFile()  # noqa: SIM115
        self.far = self.new_network()
        if cable == PAIR:
            self.near = self.new_network()
            self.ip("link", "add", "azure0", "type", "veth", "peer", "name", "eth0", "netns", str(self.near))
        else:
            self.ip("tuntap", "add", "azure0", "mode", "tap")
        self.ip("link", "set", "lo", "up")
        self.ip("link", "set", "azure0", "up")
        for address in ADDRESSES:
            self.ip("address", "add", address, "dev", "azure0")

    def __enter__(self) -> "Azure":
        return self

    def __exit__(self, *_: object) -> None:
        self.processes.stop()
        self.log.close()
        self.dhcp_log.close()

    def new_network(self) -> int:
        """Return the identifier of a process that holds a network of its own."""
        pid = self.processes.start("sleep", "infinity", wrap=["unshare", "--net"])
        wait_for("a network", functools.partial(is_elsewhere, pid, "net"), 5)
        return pid

    def enter(self) -> List[str]:
        """Return the start of a command line that runs the rest of it at the far end."""
        return ["nsenter", f"--net=/proc/{self.far}/ns/net"]

    def ip(self, *arguments: str, near: bool = False) -> None:
        """Run ip at the far end, or at the near one, the VM's."""
        network = f"/proc/{self.near if near else self.far}/ns/net"
        subprocess.run(["nsenter", "--net=" + network, "ip", *arguments], check=True, env=sandbox.environment())

    def start(self, *absent: str) -> "Azure":
        """Start WireServer and IMDS, but for those that are absent."""
        name = self.computer_name
        arguments = ["--json", "--computer-name", name, "--name", name.replace("-", "_"), *self.vm_arguments]
        for service in absent:
            arguments += ["--absent", service]
        for service, address in sandbox.ADDRESSES.items():
            arguments += ["--" + service, address + ":80"]
        self.processes.start(sys.executable, "-m", "tests.fake_azure", *arguments, output=self.log, wrap=self.enter())
        return self

    def start_network(self, delay: int = 1) -> "Azure":
        """Start the DHCP server, whose leases never end, and the DNS server that learns names from it.

        The former takes delay seconds for an offer: who goes by a lease that is not the new one must be seen to.
        """
        self.leases_file = self.lab.path(f"leases-{self.far}")
        self.start_dhcp(
            self.far,
            "azure0",
            self.leases_file,
            "--dhcp-range=10.0.0.100,10.0.0.200,infinite",
            f"--dhcp-reply-delay={delay}",
            # As Azure's: the routes to its services beside the default one. Agents look for them.
            "--dhcp-option=121," + ",".join(f"{network},{ROUTER}" for network in ("0.0.0.0/0", *ADDRESSES[1:])),
        )
        return self

    def start_dhcp(self, network: int, interface: str, leases_file: str, *options: str) -> None:
        """Start a DHCP server on interface of the network that the process network holds."""
        self.processes.start(
            "dnsmasq",
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--user=root",
            "--group=root",  # a process that changes its group no longer dies with its parent
            "--pid-file=",
            "--log-facility=-",
            "--log-dhcp",
            "--no-resolv",
            "--no-hosts",
            "--interface=" + interface,
            "--bind-interfaces",
            "--dhcp-authoritative",
            "--no-ping",  # as Azure's, which knows whose an address is
            "--dhcp-leasefile=" + leases_file,
            *options,
            output=self.dhcp_log,
            wrap=["nsenter", f"--net=/proc/{network}/ns/net"],
        )

    def add_second_interface(self) -> None:
        """Give the VM an eth1, as Azure's are: without a router, and with WireServer's address for a DNS server.

        Nobody has that address there, and the lease comes later than the first.
        """
        network = self.new_network()
        self.ip(
            "link",
            "add",
            "azure1",
            "netns",
            str(network),
            "type",
            "veth",
            "peer",
            "name",
            "eth1",
            "netns",
            str(self.near),
        )
        for command in ("link set azure1 up", "address add 10.1.0.1/24 dev azure1"):
            subprocess.run(
                ["nsenter", f"--net=/proc/{network}/ns/net", "ip", *command.split()],
                check=True,
                env=sandbox.environment(),
            )
        self.start_dhcp(
            network,
            "azure1",
            self.lab.path(f"leases-{network}"),
            "--port=0",
            "--dhcp-range=10.1.0.100,10.1.0.200,infinite",
            "--dhcp-reply-delay=3",
            "--dhcp-option=option:router",
            "--dhcp-option=option:dns-server," + sandbox.ADDRESSES["wireserver"],
        )

    def text(self, log: IO[bytes]) -> str:
        """Return what is in log by now."""
        return os.pread(log.fileno(), 1 << 24, 0).decode("utf-8", "replace")

    def requests(self) -> List[Dict[str, Any]]:
        """Return what the services were asked, in order."""
        lines = self.text(self.log).splitlines()
        other = [line for line in lines if not line.startswith("{")]
        if other:
            raise AssertionError("the pretend Azure failed:\n" + "\n".join(lines))
        return [json.loads(line) for line in lines]

    def reports(self) -> List[Dict[str, Any]]:
        """Return the health reports that were accepted, each with the time at which it came."""
        reports = [dict(request["report"], time=request["time"]) for request in self.requests() if "report" in request]
        return [report for report in reports if report["accepted"]]

    def states(self) -> List[str]:
        """Return what the reports that were accepted say: Ready or NotReady."""
        return [report["state"] for report in self.reports()]

    def leases(self) -> Dict[str, str]:
        """Return the name that the DHCP client of each leased address sent last, '*' for none."""
        if not os.path.exists(self.leases_file):
            return {}
        with open(self.leases_file, encoding="utf-8") as file:
            return {line.split()[2]: line.split()[3] for line in file if line[0].isdigit()}

    def resolve(self, name: str) -> str:
        """Return the address that the DNS server at the far end has for name, '' if it has none."""
        code = (
            "import socket, struct, sys; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(2); "
            "labels = b''.join(bytes([len(l)]) + l for l in sys.argv[2].encode().split(b'.')); "
            "s.sendto(struct.pack('>6H', 7, 256, 1, 0, 0, 0) + labels + bytes([0, 0, 1, 0, 1]), (sys.argv[1], 53)); "
            "answer = s.recv(512); print(socket.inet_ntoa(answer[-4:]) if answer[6:8] > bytes(2) else '')"
        )
        done = subprocess.run(
            [*self.enter(), sys.executable, "-IS", "-c", code, ROUTER, name], stdout=subprocess.PIPE, check=True
        )
        return done.stdout.decode().strip()


# What each DHCP client needs to own eth0. The others are masked, for presets would start them at the first boot.
INTERFACES = "auto lo\niface lo inet loopback\n{} eth0\niface eth0 inet dhcp\n"
NETWORK = {
    "networkd": {"etc/systemd/network/10-eth0.network": "[Match]\nName=eth*\n[Network]\nDHCP=ipv4\n"},
    "NetworkManager": {},
    "ifupdown": {"etc/network/interfaces": INTERFACES.format("auto")},
    # As cloud-init writes it; behind it is networkd.
    "netplan": {"etc/netplan/50-cloud-init.yaml": "network: {version: 2, ethernets: {eth0: {dhcp4: true}}}\n"},
    "netplan, by cloud-init": {},
    # As Debian's installer writes it.
    "ifupdown, allow-hotplug": {"etc/network/interfaces": INTERFACES.format("allow-hotplug")},
}
NETWORKD = ["systemd-networkd.service", "systemd-networkd.socket", "systemd-networkd-wait-online.service"]
UNITS = {
    "networkd": NETWORKD,
    "netplan": NETWORKD,
    "netplan, by cloud-init": NETWORKD,
    "NetworkManager": [
        "NetworkManager.service",
        "NetworkManager-wait-online.service",
        "NetworkManager-dispatcher.service",
    ],
    "ifupdown": ["networking.service"],
    "ifupdown, allow-hotplug": ["networking.service"],
}
# Not what is booted for: timers that would reach for the Internet.
MASKED = ["apt-daily.timer", "apt-daily-upgrade.timer", "e2scrub_all.timer", "e2scrub_reap.service"]


class VM:
    """One VM: a copy on write of a release's root with the product installed, to be booted as often as one likes.

    Or one of an image, which is a VM that is off, as it is.
    What it is made of, and how it is switched on, off and spoken to, is for containers and machines to say.
    """

    packages = ""
    patience = 1.0  # how much longer than a container it takes
    cable = PAIR
    count = 0

    others = "mask"  # what is done to the DHCP clients that a VM does not use

    def __init__(
        self, lab: Lab, release: str, client: str = "networkd", install: bool = True, image: Optional["VM"] = None
    ) -> None:
        VM.count += 1
        self.lab = lab
        self.release = release
        self.client = client
        self.name = f"vm{VM.count}"
        self.power = Processes()
        self.console = tempfile.TemporaryFile()  # noqa: SIM115
        lower = image.root if image else self.pristine(lab, release)
        base = f"{WORK}/{self.name}"
        self.root: str = base + "/root"
        lab.run("mkdir", "-p", base + "/upper", base + "/work", self.root)
        options = f"lowerdir={lower},upperdir={base}/upper,workdir={base}/work"
        lab.run("mount", "-t", "overlay", "-o", options, "overlay", self.root)
        if image:
            return
        self.write("etc/hostname", IMAGE_NAME + "\n")
        self.write("etc/hosts", f"127.0.0.1 localhost\n127.0.1.1 {IMAGE_NAME}\n")
        self.write("etc/machine-id", "")
        for name, text in NETWORK[client].items():
            self.write(name, text)
        for other in UNITS:
            self.systemctl(self.others, *UNITS[other])
        self.systemctl("unmask", *UNITS[client])
        self.systemctl("enable", *UNITS[client])
        self.systemctl("mask", *MASKED)
        if install:
            self.install()

    @classmethod
    def pristine(cls, lab: Lab, release: str) -> str:
        """Return the directory, in the lab, of the root that VMs of release begin with."""
        return lab.root(release, cls.packages)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.cut_power()
        self.console.close()
        self.lab.run("umount", self.root)
        self.lab.run("rm", "-rf", os.path.dirname(self.root))

    # Its disk.

    def install(self, *arguments: str) -> str:
        """Run install.sh on the disk, while the machine is off, and return what it says."""
        return self.lab.run(
            "sh", os.path.join(sandbox.REPOSITORY, "install.sh"), "--root", self.root, *arguments
        ).stdout

    def path(self, name: str) -> str:
        """Return how the file name on the disk is reached from here."""
        return self.lab.path(self.name, "root", name)

    def write(self, name: str, text: str) -> None:
        """Make text the content of the file name on the disk."""
        os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
        with open(self.path(name), "w", encoding="utf-8") as file:
            file.write(text)

    def read(self, name: str) -> str:
        """Return the content of the file name on the disk."""
        with open(self.path(name), encoding="utf-8") as file:
            return file.read()

    def tree(self) -> Dict[str, Tuple[Any, ...]]:
        """Return all that is on the disk: type and mode, target of a link, and the time of its last change."""
        found: Dict[str, Tuple[Any, ...]] = {}
        top = self.path("")
        for directory, directories, files in os.walk(top):
            for name in directories + files:
                path = os.path.join(directory, name)
                status = os.lstat(path)
                target = os.readlink(path) if os.path.islink(path) else ""
                changed = 0 if os.path.isdir(path) else status.st_mtime_ns
                found[os.path.relpath(path, top)] = (status.st_mode, target, changed)
        return found

    def give_address(self, interface: str, address: str, more: str = "") -> None:
        """Have networkd give interface a static address; more is the rest of its file."""
        # networkd calls the link configured only once it has waited 12 s for IPv6 routers, unless told not to.
        network = f"[Match]\nName={interface}\n[Network]\nIPv6AcceptRA=no\nAddress={address}\n{more}"
        self.write(f"etc/systemd/network/00-{interface}.network", network)

    def systemctl(self, *arguments: str) -> str:
        """Run systemctl on the files of the disk, without systemd."""
        return self.lab.run("systemctl", "--root=" + self.root, *arguments, check=False).stdout

    # Its life.

    def boot(self, azure: Azure) -> "VM":
        """Switch it on, its network cable plugged into azure."""
        raise NotImplementedError

    def is_on(self) -> bool:
        """Whether it can be asked something."""
        raise NotImplementedError

    def run(self, *command: str) -> str:
        """Run command in it and return what it prints. Raises AssertionError if it is off."""
        raise NotImplementedError

    def cut_power(self) -> None:
        """Switch it off at once."""
        raise NotImplementedError

    def power_off(self) -> None:
        """Shut it down as its owner would."""
        hypervisor = self.power.children[-1]
        self.run("systemctl", "--no-block", "poweroff")
        try:
            hypervisor.wait(30 * self.patience)
        except subprocess.TimeoutExpired:
            raise AssertionError("it does not shut down") from None
        finally:
            self.cut_power()

    def show(self, name: str, unit: str = "azure-provisioning.service") -> str:
        """Return a property of a unit."""
        return self.run("systemctl", "show", "--value", "--property=" + name, unit).strip()

    def state(self, *wanted: str) -> str:
        """Return how far the boot is, as systemctl says it, or '' if that is not one of those wanted."""
        answer = self.run("systemctl", "is-system-running").strip()
        return answer if answer in wanted else ""

    def wait_until_booted(self) -> str:
        """Wait until nothing is left to be started, and return the state of the system."""
        try:
            return str(wait_for("the end of the boot", lambda: self.state(*BOOTED), 60 * self.patience))
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.run('systemctl', 'list-jobs')}\n{self.unit_journal()}") from None

    def addresses(self) -> List[str]:
        """Return the IPv4 addresses of the interface with the default route."""
        listing = self.run("ip", "-4", "-oneline", "address", "show", "scope", "global")
        return re.findall(r"inet ([0-9.]+)/", listing)

    def processes(self) -> List[Tuple[str, str]]:
        """Return the name and the control groups of each process."""
        files = self.run("sh", "-c", "grep -H . /proc/[0-9]*/comm /proc/[0-9]*/cgroup 2>/dev/null")
        found: Dict[str, Dict[str, str]] = {}
        for pid, kind, text in re.findall(r"(?m)^/proc/([0-9]+)/(comm|cgroup):(.*)$", files):
            about = found.setdefault(pid, {"comm": "", "cgroup": ""})
            about[kind] += text
        return [(about["comm"], about["cgroup"]) for about in found.values()]

    def unit_journal(self) -> str:
        """Return what the unit said in the boot that is running."""
        return self.run(
            "journalctl", "--no-pager", "--boot", "--unit=azure-provisioning.service", "--output=short-monotonic"
        )

    def journal(self) -> str:
        """Return the journal of the boot that is running."""
        if not self.is_on():
            return "(it is off)"
        return self.run("journalctl", "--no-pager", "--output=short-monotonic")

    def forget_console(self) -> None:
        """Forget what was on the console."""
        os.ftruncate(self.console.fileno(), 0)
        os.lseek(self.console.fileno(), 0, os.SEEK_SET)

    def console_text(self) -> str:
        """Return all that was ever on the console, without its colours."""
        text = os.pread(self.console.fileno(), 1 << 24, 0).decode("utf-8", "replace")
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "")


def ssh_options(key: str) -> Sequence[str]:
    """Return what a real SSH client is told, whatever it is to do. key is a file's path."""
    options = ["-F", "none", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", "-o", "IdentitiesOnly=yes"]
    return [*options, "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "-i", key]


def ssh_command(vm: VM, azure: Azure, user: str, key: str, *command: str) -> Sequence[str]:
    """Return the command line of a real SSH client at the far end, which runs command in vm. key is a file's path."""
    return [*azure.enter(), "ssh", *ssh_options(key), f"{user}@{vm.addresses()[0]}", *command]


@contextlib.contextmanager
def explained(vm: VM, azure: Azure) -> Iterator[None]:
    """Print all there is to know about vm if the body of the with statement fails."""
    try:
        yield
    except BaseException:
        for title, tell in (
            ("console", vm.console_text),
            ("journal", vm.journal),
            ("Azure", lambda: azure.text(azure.log)),
            ("DHCP server", lambda: azure.text(azure.dhcp_log)),
        ):
            try:
                text = tell()
            except AssertionError as error:
                text = f"({error})"
            print(f"\n===== {vm.release}, {vm.client}: {title}\n{text}", flush=True)
        raise


class Case:
    """What the test cases of VMs have in common: for each release there is a class of its own, see cases()."""

    vm: Type[VM] = VM
    tools: Sequence[str] = ()
    release = ""
    lab: ClassVar[Lab]

    @classmethod
    def setUpClass(cls) -> None:
        missing = missing_tools(cls.tools)
        if missing or os.geteuid() != 0:
            raise AssertionError(f"booting takes root and {', '.join(cls.tools)}; missing: {missing}")
        cls.lab = Lab()
        try:
            cls.vm.pristine(cls.lab, cls.release)
        except BaseException:
            cls.lab.close()
            raise

    @classmethod
    def tearDownClass(cls) -> None:
        cls.lab.close()

    def check(self, vm: VM, **wanted: Any) -> None:
        """Compare what the VM is, once it has booted, with what it should be, all at once."""
        found: Dict[str, Any] = {
            "system": vm.wait_until_booted(),
            "unit": vm.run("systemctl", "is-enabled", UNIT).strip(),
            "result": vm.show("Result"),
            "host_name": vm.run("uname", "-n").strip(),
            "etc_hostname": vm.read("etc/hostname").strip(),
            "left_in_cgroup": [name for name, groups in vm.processes() if "/" + UNIT in groups],
        }
        expected = dict({"left_in_cgroup": []}, **wanted)
        test: Any = self
        test.assertEqual({key: found[key] for key in expected}, expected)

    def check_provisioned(self, vm: VM, azure: Azure, name: str = "web-01", reports: int = 1) -> None:
        """Ready was accepted once, and the VM is named, disarmed and well."""
        self.check(vm, system="running", unit="disabled", result="success", host_name=name, etc_hostname=name)
        test: Any = self
        test.assertEqual(azure.states(), ["Ready"] * reports)
        test.assertIn(f"127.0.1.1 {name}\n", vm.read("etc/hosts"))

    def check_published(self, vm: VM, azure: Azure, name: str = "web-01", first: str = IMAGE_NAME) -> str:
        """The network knows the name: one lease, at the same address as under the name first. Return how that came."""
        test: Any = self
        given = [line.split() for line in azure.text(azure.dhcp_log).splitlines() if " DHCPACK(azure0) " in line]
        # Address, hardware address and, where the client sent one, its name.
        answers = [line[line.index("DHCPACK(azure0)") + 1 :] for line in given]
        test.assertEqual([answers[0][2:], answers[-1][2:]], [[first] if first else [], [name]], given)
        address = answers[0][0]
        test.assertEqual({answer[0] for answer in answers}, {address}, given)
        test.assertEqual(azure.leases(), {address: name})
        test.assertEqual(azure.resolve(name), address)
        test.assertEqual(azure.resolve(IMAGE_NAME), "")
        test.assertEqual(vm.addresses(), [address])
        # The steps came in their order, on the console too.
        journal = vm.unit_journal()
        said = [f"set the host name to {name}, it was {IMAGE_NAME}", f"published {name} by ", "reported Ready to "]
        test.assertRegex(journal, "(?s)" + ".*".join(map(re.escape, said)))
        for line in said:
            test.assertIn(line, vm.console_text())
        published = re.search(r"published \S+ by (.*), after ([0-9.]+) s", journal)
        assert published
        how, seconds = published.groups()
        print(f"{vm.release}, {vm.client}: the lease has the name {seconds} s after the rename, by {how}")
        return str(how)

    def check_second_boot(self, vm: VM, azure: Azure, name: str = "web-01") -> None:
        """The unit stays out of the boot that follows, and Azure is asked nothing."""
        test: Any = self
        vm.power_off()
        known = len(azure.requests())
        vm.boot(azure)
        self.check(vm, system="running", unit="disabled", host_name=name, etc_hostname=name)
        test.assertEqual(azure.requests()[known:], [])
        test.assertEqual(vm.unit_journal().count("Starting"), 0)


def cases(case: Any, suffix: str, variable: str, *releases: str) -> "Dict[str, Type[unittest.TestCase]]":
    """Return a test case a release (of all, if none is named), skipped unless the environment variable asks for it."""
    wanted = os.environ.get(variable, "")
    found: Dict[str, Type[unittest.TestCase]] = {}
    for release in releases or RELEASES:
        name = release.capitalize() + suffix
        made: Any = type(name, (case, unittest.TestCase), {"release": release, "__module__": case.__module__})
        if wanted != "1" and release not in wanted.split(","):
            made = unittest.skip(f"boots take minutes and root: sudo {variable}=1 python3 -m unittest")(made)
        found[name] = made
    return found
