"""Boot a real systemd in a container, with a real DHCP server and the pretend Azure at the other end of its network.

Root, and mmdebstrap, systemd-nspawn, dnsmasq and util-linux, are needed. A container boots in a second, but on
the kernel of the machine that it runs on: tests/machine.py boots them with their own.
"""

import contextlib
import os
import signal
import subprocess

from tests.vm import BOOTED, VM, WORK, Azure, Lab, children_of, wait_for

TOOLS = ("mmdebstrap", "systemd-nspawn", "dnsmasq", "setpriv", "nsenter", "unshare", "ip")

# What asks for a lease where ifupdown has the network: what Debian's installer brings, dhclient until Debian 12.
MORE_PACKAGES = {
    "bullseye": "isc-dhcp-client",
    "bookworm": "isc-dhcp-client,dhcpcd-base",
    "trixie": "dhcpcd-base,netplan.io",
    "forky": "dhcpcd-base",
}

# Joins the control groups before "--" and becomes the command after it.
JOIN = 'while [ "$1" != -- ]; do echo 0 >"$1/cgroup.procs" || exit; shift; done; shift; exec "$@"'


def first_of_a_container(pid: int) -> bool:
    """Whether the process pid is the first one of a PID namespace."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8") as file:
            return any(line.startswith("NSpid:") and line.split()[-1] == "1" for line in file)
    except OSError:
        return False


class Container(VM):
    """A VM that is a container."""

    packages = "systemd,systemd-sysv,dbus,python3-minimal,libpython3-stdlib,iproute2,network-manager,ifupdown"
    pid = 0

    @classmethod
    def pristine(cls, lab: Lab, release: str) -> str:
        # With the package of the other agent, to be unpacked where a test wants it.
        hook = "--customize-hook=chroot $1 sh -c 'cd /var/cache && apt-get download cloud-init'"
        return lab.root(release, f"{cls.packages},{MORE_PACKAGES[release]}", hook)

    def boot(self, azure: Azure) -> "Container":
        """Switch it on, its network cable plugged into azure."""
        self.power.start(
            "env",
            "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1",  # systemd 258 and later know no other
            "SYSTEMD_NSPAWN_API_VFS_WRITABLE=network",  # /proc/sys/net, of its own network: for dhcpcd 10.5
            "systemd-nspawn",
            "--quiet",
            "--directory=" + self.root,
            "--register=no",
            "--keep-unit",
            "--machine=" + self.name,
            f"--network-namespace-path={WORK}/proc/{azure.near}/ns/net",
            "--capability=CAP_NET_ADMIN,CAP_NET_RAW",
            "--link-journal=no",
            "--resolv-conf=off",
            "--timezone=off",
            "--boot",
            "--console=read-only",
            output=self.console,
            wrap=[*self.lab.enter(), "sh", "-c", JOIN, "sh", *self.lab.groups, "--"],
        )
        nsenter = self.power.children[-1].pid
        nspawn = wait_for("systemd-nspawn", lambda: children_of(nsenter), 5)[0]
        # Its first child is not systemd: it makes the file system, forks systemd and ends.
        self.pid = wait_for("systemd", lambda: [*filter(first_of_a_container, children_of(nspawn))], 10)[0]
        wait_for("systemctl", lambda: self.state("initializing", "starting", *BOOTED), 30)
        return self

    def is_on(self) -> bool:
        return first_of_a_container(self.pid)

    def run(self, *command: str) -> str:
        if not self.is_on():
            raise AssertionError(f"{' '.join(command)}: the machine is off")
        done = subprocess.run(
            ["nsenter", f"--target={self.pid}", "--mount", "--uts", "--net", "--pid", "--ipc", "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
            check=False,
        )
        return done.stdout

    def cut_power(self) -> None:
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)  # all processes of a container end with its first
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.power.children[-1].wait(10)
            self.pid = 0
        self.power.stop()
