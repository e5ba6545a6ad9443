"""Boot a whole machine under QEMU: its own kernel and initrd, a disk, and a network cable to the pretend Azure.

Root, and mmdebstrap, qemu-system-x86_64, mkfs.ext4, dnsmasq and util-linux, are needed. The processor is emulated, so a
boot takes half a minute: /dev/kvm may exist and still boot nothing.

Nothing of the tests is on the disk. The machine is asked over a second serial port, where systemd's debug shell is, as
the kernel's command line says. One that has nothing but a disk, of anybody's, is asked over SSH: `python3 -m
tests.machine --boot FILE` does that.
"""

import argparse
import base64
import contextlib
import glob
import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from typing import Any, Dict, Iterator, List, Match, Optional, Sequence, Tuple

from tests.fake_azure import MAC_ADDRESS, VM_ID, describe
from tests.vm import (
    BOOTED,
    RELEASES,
    TAP,
    UNIT,
    VM,
    WORK,
    Azure,
    Lab,
    Processes,
    explained,
    missing_tools,
    ssh_command,
    wait_for,
)

TOOLS = (
    "mmdebstrap",
    "qemu-system-x86_64",
    "mkfs.ext4",
    "dnsmasq",
    "setpriv",
    "nsenter",
    "unshare",
    "ip",
)

DISK_TOOLS = ("qemu-img", "dnsmasq", "setpriv", "nsenter", "unshare", "ip", "ssh", "ssh-keygen")

ASSET_TAG = "7783-7084-3265-9085-8269-3286-77"  # of all VMs on Azure, by which guests recognise it
DISK_SIZE = "2G"  # sparse
# What newer processors can do costs a fifth of the time to emulate, and pointer authentication half of it.
MACHINES = {
    "amd64": ("qemu-system-x86_64", "-machine", "q35", "-cpu", "Nehalem"),
    "arm64": ("qemu-system-aarch64", "-machine", "virt", "-cpu", "cortex-a57"),
}
# UEFI with Secure Boot and Microsoft's keys, as Azure's Trusted Launch has it, and without.
FIRMWARE = {
    ("amd64", True): ("/usr/share/OVMF/OVMF_CODE_4M.secboot.fd", "/usr/share/OVMF/OVMF_VARS_4M.ms.fd"),
    ("amd64", False): ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("arm64", True): ("/usr/share/AAVMF/AAVMF_CODE.ms.fd", "/usr/share/AAVMF/AAVMF_VARS.ms.fd"),
    ("arm64", False): ("/usr/share/AAVMF/AAVMF_CODE.fd", "/usr/share/AAVMF/AAVMF_VARS.fd"),
}
CONTROLLERS = {
    "scsi": ("-device", "virtio-scsi-pci", "-device", "scsi-hd,drive=disk"),
    "nvme": ("-device", "nvme,drive=disk,serial=disk"),
}
# Azure's interfaces are called ethN, for nothing gives them another name; QEMU's have a place on a bus.
# Hyper-V's guests do not check their timer. An emulated processor on a busy host fails that check now and then, and the
# kernel panics: https://bugs.launchpad.net/nova/+bug/1939108
KERNEL = "root=/dev/vda rw console=ttyS0 panic=-1 quiet net.ifnames=0 no_timer_check systemd.debug_shell=ttyS1"
# Panics that are the emulated processor's. A disk of a user's own has its kernel's arguments; and rarely the processor
# meets the breakpoint of a kernel that is changing its own code: https://bugzilla.redhat.com/show_bug.cgi?id=2216496
EMULATORS_PANIC = re.compile(r"(?s)not syncing: IO-APIC \+ timer doesn't work!|int3: 0000 .*not syncing")

# What the shell becomes: it answers "Q NUMBER COMMAND" with "A NUMBER OUTPUT", both as base64.
ANSWER = (
    'stty raw -echo; printf "\\nA %s\\n" 0; while read -r q number command; do [ "$q" = Q ] || continue; '
    'output=$(sh -c "$(printf %s "$command" | base64 -d)" 2>&1 </dev/null | base64 -w 0); '
    'printf "A %s %s\\n" "$number" "$output"; done'
)


def hardware(vm_id: str = VM_ID, mac_address: str = MAC_ADDRESS, architecture: str = "amd64") -> Tuple[str, ...]:
    """Return the start of QEMU's command line, for a VM as Azure's are: all but what it boots from."""
    return (
        *(*MACHINES[architecture], "-nodefaults", "-no-user-config", "-display", "none"),
        *("-accel", "tcg,thread=multi", "-smp", "2", "-m", "1024"),
        *("-device", "virtio-rng-pci"),
        *("-uuid", vm_id, "-smbios", "type=3,asset=" + ASSET_TAG),
        *("-netdev", "tap,id=cable,ifname=azure0,script=no,downscript=no"),
        *("-device", "virtio-net-pci,netdev=cable,mac=" + ":".join(re.findall("..", mac_address))),
        *("-serial", "stdio"),
    )


class Machine(VM):
    """A VM that is a whole machine. What is written to its root is on its disk from its first boot on."""

    packages = (
        "systemd,systemd-sysv,dbus,udev,python3-minimal,libpython3-stdlib,iproute2,ifupdown,dhcpcd-base,initramfs-tools,"
        "kmod,openssh-server,sudo,apparmor"
    )
    patience = 5.0
    cable = TAP
    disk = kernel = initrd = ""  # until it is switched on for the first time

    @classmethod
    def pristine(cls, lab: Lab, release: str) -> str:
        # The release's own kernel: that of its security updates comes and goes.
        more = "network-manager" if release == "forky" else "ifupdown"
        return lab.root(release, f"{cls.packages},{more},linux-image-cloud-amd64/{release}")

    def __init__(
        self,
        lab: Lab,
        release: str,
        client: str = "networkd",
        install: bool = True,
        image: Optional["Machine"] = None,
    ) -> None:
        super().__init__(lab, release, client, install, image)
        self.questions = 0
        self.shell: Optional[socket.socket] = None
        self.heard = b""
        self.switched_on = 0.0  # by time.monotonic()
        self.vm_id, self.mac_address = VM_ID, MAC_ADDRESS
        if image:
            self.vm_id = str(uuid.uuid4())  # of which systemd makes the machine ID
            self.mac_address = MAC_ADDRESS[:6] + self.vm_id[:6].upper()
            self.kernel, self.initrd = image.kernel, image.initrd
            lab.run("cp", "--sparse=always", f"{WORK}/{image.name}/disk", f"{WORK}/{self.name}/disk")
            self.disk = lab.path(self.name, "disk")

    def path(self, name: str) -> str:
        if self.disk:
            raise AssertionError(f"{name} is on the disk now")
        return super().path(name)

    def read(self, name: str) -> str:
        return self.run("cat", "/" + name) if self.disk else super().read(name)

    def systemctl(self, *arguments: str) -> str:
        return self.run("systemctl", "--root=/", *arguments) if self.disk else super().systemctl(*arguments)

    def make_disk(self) -> None:
        """Make the disk of what is in the root by now."""
        self.kernel, self.initrd = (glob.glob(self.path(f"boot/{name}*"))[0] for name in ("vmlinuz", "initrd.img"))
        self.lab.run("mkfs.ext4", "-q", "-F", "-d", self.root, f"{WORK}/{self.name}/disk", DISK_SIZE)
        self.disk = self.lab.path(self.name, "disk")

    def new_disk(self) -> None:
        """Replace the disk by one as it was before the first boot."""
        self.lab.run("rm", "-f", f"{WORK}/{self.name}/disk")
        self.disk = ""

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop it for the body of the with statement. Its clocks then jump, but it has done nothing meanwhile."""
        hypervisor = self.power.children[-1]
        began = time.monotonic()
        hypervisor.send_signal(signal.SIGSTOP)
        os.waitpid(hypervisor.pid, os.WUNTRACED)
        try:
            yield
        finally:
            hypervisor.send_signal(signal.SIGCONT)
            self.switched_on += time.monotonic() - began

    def copy_disk(self, copy: str) -> None:
        """Make copy, the name of a file, what the disk is now: QEMU keeps nothing back that the guest has written."""
        self.lab.run("cp", "--sparse=always", f"{WORK}/{self.name}/disk", f"{WORK}/{self.name}/{copy}")

    def use_disk(self, copy: str) -> None:
        """Make a copy of the disk the disk."""
        self.lab.run("mv", f"{WORK}/{self.name}/{copy}", f"{WORK}/{self.name}/disk")

    def switch_on(self, azure: Azure, *kernel: str) -> None:
        """Switch it on, its network cable plugged into azure, with kernel beside its kernel's arguments."""
        if not self.disk:
            self.make_disk()
        self.shell, far_end = socket.socketpair()
        self.heard = b""
        command = (
            *(*hardware(self.vm_id, self.mac_address), "-no-reboot"),
            *("-kernel", self.kernel, "-initrd", self.initrd, "-append", " ".join([KERNEL, *kernel])),
            *("-drive", f"file={self.disk},format=raw,if=virtio"),
            *("-chardev", f"socket,id=shell,fd={far_end.fileno()}", "-serial", "chardev:shell"),
        )
        self.switched_on = time.monotonic()
        self.power.start(*command, output=self.console, wrap=azure.enter(), keep=[far_end.fileno()])
        far_end.close()

    def boot(self, azure: Azure, *kernel: str) -> "Machine":
        self.switch_on(azure, *kernel)
        if not self.meet_shell():
            text = self.console_text()
            if not EMULATORS_PANIC.search(text):
                seconds = time.monotonic() - self.switched_on
                told = f"no shell {seconds:.0f} s after power on: {self.heard!r}\nthe console's end: {text[-2000:]}"
                raise AssertionError(told)
            self.cut_power()
            self.forget_console()
            return self.boot(azure, *kernel)
        wait_for("systemctl", lambda: self.state("initializing", "starting", *BOOTED), 30 * self.patience)
        return self

    def is_on(self) -> bool:
        return self.shell is not None and self.power.children[-1].poll() is None

    def meet_shell(self) -> bool:
        """Wait for the shell's prompt, and tell it to answer questions. Return whether it does."""
        assert self.shell
        if not self.hear(rb"# \Z", 30 * self.patience):
            return False
        self.shell.sendall(f"exec sh -c {shlex.quote(ANSWER)}\n".encode())
        return self.hear(rb"\nA 0\n", 10 * self.patience) is not None

    def hear(self, pattern: bytes, seconds: float) -> Optional[Match[bytes]]:
        """Return where the shell says pattern, or None if it does not within seconds. What it said before is lost."""
        assert self.shell
        deadline = time.monotonic() + seconds
        while True:
            found = re.search(pattern, self.heard)
            if found:
                self.heard = self.heard[found.end() :]
                return found
            self.shell.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                received = self.shell.recv(1 << 16)
            except OSError:
                received = b""
            if not received:
                return None
            self.heard += received

    def run(self, *command: str) -> str:
        if not self.is_on():
            raise AssertionError(f"{' '.join(command)}: the machine is off")
        assert self.shell
        self.questions += 1
        text = "LC_ALL=C " + " ".join(map(shlex.quote, command))
        with contextlib.suppress(OSError):  # it is just going off: there will be no answer
            self.shell.sendall(b"Q %d %s\n" % (self.questions, base64.b64encode(text.encode())))
        answer = self.hear(rb"A %d (\S*)\n" % self.questions, 30 * self.patience)
        if not answer:
            raise AssertionError(f"{' '.join(command)}: no answer")
        return base64.b64decode(answer.group(1)).decode("utf-8", "replace")

    def cut_power(self) -> None:
        self.power.stop()
        if self.shell:
            self.shell.close()
            self.shell = None


class Disk(VM):
    """A whole machine with nothing but the disk in the file image, to which nothing is written.

    It is asked over SSH, by user with the key in the file key. size is that of the disk, where it is not the image's.
    """

    patience = 20.0
    cable = TAP

    def __init__(
        self,
        lab: Lab,
        image: str,
        user: str,
        key: str,
        size: str = "",
        controller: str = "scsi",
        architecture: str = "amd64",
        secure_boot: bool = True,
    ) -> None:
        # There is nothing to prepare: what is on the disk is the image's.
        VM.count += 1
        self.lab = lab
        self.release = os.path.basename(image)
        self.client = f"{architecture}, {controller}"
        self.user, self.key = user, key
        self.architecture = architecture
        self.power = Processes()
        self.console = tempfile.TemporaryFile()  # noqa: SIM115
        self.overlay = lab.path(f"overlay{VM.count}")
        with open(image, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 512))
            is_vhd = file.read(8) == b"conectix"
        # The footer's size is what Azure goes by, and not its geometry.
        form = {"driver": "vpc", "force_size_calc": "current_size"} if is_vhd else {"driver": "raw"}
        backing = json.dumps(dict(form, file={"driver": "file", "filename": os.path.abspath(image)}))
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "json:" + backing, "-F", form["driver"], self.overlay]
            + [size] * bool(size),
            check=True,
        )
        code, variables = (f"if=pflash,format=raw,file={name}" for name in FIRMWARE[architecture, secure_boot])
        self.command = (
            *hardware(architecture=architecture),
            *("-drive", code + ",unit=0,readonly=on", "-drive", variables + ",unit=1,snapshot=on"),
            *("-drive", f"if=none,id=disk,format=qcow2,file={self.overlay}"),
            *CONTROLLERS[controller],
        )
        if architecture == "amd64" and secure_boot:
            self.command += ("-machine", "smm=on", "-global", "driver=cfi.pflash01,property=secure,value=on")

    def __exit__(self, *_: object) -> None:
        self.cut_power()
        self.console.close()
        os.remove(self.overlay)

    def boot(self, azure: Azure) -> "Disk":
        self.azure = azure
        self.switched_on = time.monotonic()
        self.power.start(*self.command, output=self.console, wrap=azure.enter())
        return self

    def wait_for_report(self, seconds: float) -> Dict[str, Any]:
        """Return the first health report. Raises AssertionError if none comes."""

        def report() -> List[Dict[str, Any]]:
            if EMULATORS_PANIC.search(self.console_text()):
                self.cut_power()
                self.forget_console()
                self.boot(self.azure)
            if self.power.children[-1].poll() is not None:
                raise AssertionError("it went off")
            return self.azure.reports()

        first: Dict[str, Any] = wait_for("a health report", report, seconds)[0]
        return first

    def is_on(self) -> bool:
        # Before that there is nobody to ask.
        return bool(self.azure.reports()) and self.power.children[-1].poll() is None

    def run(self, *command: str) -> str:
        return self.log_in("sudo", "-n", "env", "LC_ALL=C", *command).stdout

    def log_in(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """Run command as the user."""
        if not self.is_on():
            raise AssertionError(f"{' '.join(command)}: the machine is off, or not ready")
        return subprocess.run(
            ssh_command(self, self.azure, self.user, self.key, *map(shlex.quote, command)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=30 * self.patience,
        )

    def log_in_at_last(self) -> "subprocess.CompletedProcess[str]":
        """Try to log in until sshd has an answer, or for long enough. It punishes who tries again after a refusal."""
        deadline = time.monotonic() + 5 * self.patience
        while True:
            came = self.log_in("true")
            if came.returncode == 0 or "Permission denied" in came.stdout or time.monotonic() > deadline:
                return came
            time.sleep(0.5)

    def read(self, name: str) -> str:
        return self.run("cat", "/" + name)

    def addresses(self) -> List[str]:
        return [*self.azure.leases()]

    def cut_power(self) -> None:
        self.power.stop()


def make_key(path: str) -> str:
    """Make a pair of SSH keys, and return the file of the private one."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", path], check=True)
    return path


def boot_disk(lab: Lab, options: argparse.Namespace) -> List[str]:
    """Boot the disk that options describe, print what comes of it, and return what is not as it should be."""
    user = options.admin_username
    key = options.key or make_key(lab.path("key"))
    with open(key + ".pub", encoding="utf-8") as file:
        created_with = ["--admin-username", user, "--public-key", file.read()]
    created_with += ["--disable-password-authentication", "true"]
    secure_boot = not options.no_secure_boot
    faults = []
    with Disk(
        lab, options.boot, user, key, options.size, options.controller, options.architecture, secure_boot
    ) as vm, Azure(lab, options.computer_name, created_with, cable=TAP) as azure:
        azure.start_network().start()
        vm.boot(azure)
        try:
            report = vm.wait_for_report(options.timeout)
        except AssertionError as error:
            asked = ["{service}: {method} {path}: {outcome}".format(**request) for request in azure.requests()]
            print(f"===== the console's end\n{vm.console_text()[-4000:]}")
            print("\n".join(["===== asked of Azure", *(asked or ["nothing"])]))
            return [str(error)]
        print(f"reported {describe(report)}, {report['time'] - vm.switched_on:.0f} s after power on", flush=True)
        if report["state"] != "Ready":
            faults.append("it is not ready")
        names = [name.replace("*", "no name") for name in azure.leases().values()]
        print(f"has its lease as {', '.join(names)}", flush=True)
        if names != [options.computer_name]:
            faults.append(f"its lease is not that of {options.computer_name}")
        if user:
            came = vm.log_in_at_last()
            if came.returncode == 0:
                print(f"{user} logged in, {time.monotonic() - vm.switched_on:.0f} s after power on", flush=True)
            else:
                faults.append(f"{user} cannot log in: {came.stdout.strip()}")
    return faults


# Power cuts in the first boot.

# Loading its profiles takes seconds of each emulated boot, and has no part in this.
WITHOUT_APPARMOR = "apparmor=0"
CUTS_IN_A_BOOT = 10  # more disks would take more memory


# What the VM is created with.
PUBLIC_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl alice"
WITH_USER = ("--admin-username", "alice", "--public-key", PUBLIC_KEY, "--disable-password-authentication", "true")


def files_of(vm: VM) -> Dict[str, str]:
    """Return a digest of each file in /etc and /home, its mode, its owner and where it leads.

    But for the machine's identity, the backups of passwd(5), and what systemd remembers of /usr without an fsync(2).
    """
    digests = "find /etc /home -type f -exec sha256sum {} +; find /etc /home -printf '%M %U:%G %l  mode of %p\\n'"
    found = {
        path: digest for digest, path in (line.rsplit("  ", 1) for line in vm.run("sh", "-c", digests).splitlines())
    }
    for name in ("/etc/machine-id", "/etc/.updated"):
        found.pop(name, None)
    return {path: digest for path, digest in found.items() if not path.endswith("-")}


class Outcome:
    """What a boot of vm, from the disk that it has, leads to."""

    def __init__(self, vm: Machine) -> None:
        with Azure(vm.lab, vm_arguments=WITH_USER, cable=TAP) as azure, explained(vm, azure):
            azure.start_network().start()
            vm.boot(azure, WITHOUT_APPARMOR)
            vm.wait_until_booted()
            self.seconds = time.monotonic() - vm.switched_on
            self.asked = min([self.seconds, *(request["time"] - vm.switched_on for request in azure.requests())])
            self.states = azure.states()
            # Where the unit is done there is nothing in the boot that waits for the lease.
            wait_for("the lease", vm.addresses, 10 * vm.patience)
            self.first_name = re.findall("client provides name: (.*)", azure.text(azure.dhcp_log))[0]
            self.found = {
                "host name": vm.run("uname", "-n").strip(),
                "unit": vm.run("systemctl", "is-enabled", UNIT).strip(),
                "result": vm.show("Result"),
                "is resolved": [azure.resolve("web-01")] == vm.addresses(),
            }
            self.files = files_of(vm)
            vm.cut_power()


class PowerCut:
    """A moment of a first boot of vm: what Azure has heard by then, and copy, the disk if the power were cut then."""

    def __init__(self, vm: Machine, azure: Azure, copy: str) -> None:
        self.copy = copy
        self.after = time.monotonic() - vm.switched_on
        with vm.stopped():
            vm.copy_disk(copy)
            self.states = azure.states()
            self.asked = bool(azure.requests())

    def __str__(self) -> str:
        reached = "Ready reported" if self.states else "Azure asked" if self.asked else "Azure not asked yet"
        return f"power cut {self.after:.1f} s after power on, {reached}"

    def faults(self, after: Outcome, undisturbed: Outcome) -> List[str]:
        """Return what is not as it should be after the boot that follows, beside a boot that was not disturbed."""
        wanted = {"host name": "web-01", "unit": "disabled", "result": "success", "is resolved": True}
        found = [f"{key}: {after.found[key]}" for key in wanted if after.found[key] != wanted[key]]
        names = {*after.files, *undisturbed.files}
        found += [name for name in sorted(names) if after.files.get(name) != undisturbed.files.get(name)]
        if {*self.states, *after.states} != {"Ready"}:
            found.append(f"reported before: {self.states}, then: {after.states}")
        if self.states and after.first_name != "web-01":
            found.append(f"Ready had been reported, and then it was called {after.first_name}")
        return found


def cut_power_in_a_boot(vm: Machine, moments: Sequence[float]) -> List[PowerCut]:
    """Boot vm for the first time, and return what a power cut at each of these moments, in seconds, would leave."""
    vm.new_disk()
    cuts = []
    with Azure(vm.lab, vm_arguments=WITH_USER, cable=TAP) as azure, explained(vm, azure):
        azure.start_network().start()
        vm.switch_on(azure, WITHOUT_APPARMOR)
        for number, moment in enumerate(sorted(moments)):
            time.sleep(max(0.0, vm.switched_on + moment - time.monotonic()))
            cuts.append(PowerCut(vm, azure, f"cut{number}"))
        vm.cut_power()
    return cuts


def cut_power_at_random(vm: Machine, cuts: int, seed: int) -> List[str]:
    """Cut the power so often in first boots of vm, print what came of each, and return what was wrong.

    Every second time it is cut once Azure is asked: most of a boot is none of ours.
    """
    chance = random.Random(seed)
    vm.new_disk()
    undisturbed = Outcome(vm)
    print(f"{vm.release}: first request after {undisturbed.asked:.1f} s, booted after {undisturbed.seconds:.1f} s")
    faults: List[str] = []
    for done in range(0, cuts, CUTS_IN_A_BOOT):
        numbers = range(done, min(done + CUTS_IN_A_BOOT, cuts))
        moments = [chance.uniform(undisturbed.asked if number % 2 else 0, undisturbed.seconds) for number in numbers]
        for number, cut in zip(numbers, cut_power_in_a_boot(vm, moments)):
            vm.use_disk(cut.copy)
            after = Outcome(vm)
            found = cut.faults(after, undisturbed)
            result = "; ".join(found) or "all is well"
            print(f"{vm.release}, {number + 1}: {cut}, then called {after.first_name}: {result}", flush=True)
            faults += found
    return faults


def main(arguments: Optional[List[str]] = None) -> int:
    """Cut the power at random moments, or boot a disk, and return 1 if something is not as it should be."""
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.machine",
        description="Boot a disk in QEMU on a pretend Azure, and tell whether Ready came, under which name it has its "
        "lease, and whether one can log in. Or cut the power in first boots.",
    )
    parser.add_argument("--power-cuts", type=int, default=100, metavar="N", help="how often (default: %(default)s)")
    parser.add_argument("--release", default="bookworm", choices=RELEASES, help="of Debian (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="of the moments")
    boot = parser.add_argument_group("to boot a disk")
    boot.add_argument("--boot", metavar="FILE", help="a raw disk or a VHD, to which nothing is written")
    boot.add_argument("--computer-name", default="web-01", metavar="NAME", help="the VM's (default: %(default)s)")
    boot.add_argument("--admin-username", default="alice", metavar="NAME", help="its user (default: %(default)s)")
    boot.add_argument("--key", metavar="FILE", help="the user's SSH key, FILE.pub beside it (default: a new one)")
    boot.add_argument("--size", default="", help="of the VM's disk, as 8G (default: the file's)")
    boot.add_argument("--controller", default="scsi", choices=sorted(CONTROLLERS), help="default: %(default)s")
    boot.add_argument("--architecture", default="amd64", choices=sorted(MACHINES), help="default: %(default)s")
    boot.add_argument("--no-secure-boot", action="store_true", help="of UEFI, for what nobody has signed")
    boot.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="for the report (%(default)s)")
    options = parser.parse_args(arguments)
    tools = (MACHINES[options.architecture][0], *DISK_TOOLS) if options.boot else TOOLS
    missing = missing_tools(tools)
    if options.boot:
        files = [options.boot, *FIRMWARE[options.architecture, not options.no_secure_boot]]
        files += [options.key, options.key + ".pub"] if options.key else []
        missing += [name for name in files if not os.path.exists(name)]
    if missing or os.geteuid() != 0:
        print(f"this takes root and {', '.join(missing) or 'no more'}", file=sys.stderr)
        return 1
    lab = Lab()
    try:
        if options.boot:
            faults = boot_disk(lab, options)
            print("\n".join(faults) or "all is well")
        else:
            print(f"--seed {options.seed}", flush=True)
            with Machine(lab, options.release, install=False) as vm:
                vm.install("--user")
                faults = cut_power_at_random(vm, options.power_cuts, options.seed)
            print(f"{options.power_cuts} power cuts, {len(faults)} faults")
    except subprocess.CalledProcessError as error:  # which has said why
        print(f"{error.cmd[0]}: exit status {error.returncode}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        lab.close()
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
