"""An image from nothing: what the README's recipe makes boots as a generation 2 VM of Azure's does, to a login.

Like the other whole machines these run only if the environment variable AZURE_PROVISIONING_MACHINE is set.
"""

import os
import re
import shlex
import struct
import subprocess
import tempfile
import time
import unittest
from typing import Any, List, Sequence, Type

from tests import machine, sandbox
from tests.test_journey import USER, JourneyCase, ssh_command
from tests.test_machine import VARIABLE
from tests.vm import TAP, VM, WORK, Azure, Lab, Processes, cases, explained, wait_for

TOOLS = ("mmdebstrap", "sfdisk", "mkfs.ext4", "mformat", "mcopy", "qemu-img")
RELEASE = "trixie"  # of Debian, as the recipe stands in the README
LINES = 12
MEBIBYTE = 1 << 20

# UEFI with Secure Boot, as Azure's Trusted Launch has it, and Microsoft's keys; what it writes is not kept.
FIRMWARE = ("/usr/share/OVMF/OVMF_CODE_4M.secboot.fd", "/usr/share/OVMF/OVMF_VARS_4M.ms.fd")

KERNEL_STARTED = re.compile(r"Run /init as init process|Kernel panic.*\n")


def recipe() -> str:
    """Return the commands of the README's section."""
    with open(os.path.join(sandbox.REPOSITORY, "README.md"), encoding="utf-8") as file:
        section = re.search(r"(?ms)^## An image from nothing$(.*?)^## ", file.read())
    assert section
    blocks: Sequence[str] = re.findall(r"(?ms)^```sh\n(.*?)^```$", section.group(1))
    if len(blocks) != 1:
        raise AssertionError(f"{len(blocks)} blocks of commands in the section")
    return blocks[0]


class Disk(VM):
    """A whole machine with nothing but the disk that the recipe made. It is asked over SSH, by its user."""

    patience = 20.0
    cable = TAP

    @classmethod
    def pristine(cls, lab: Lab, release: str) -> str:
        checkout = f"{WORK}/{release}"
        if (release,) not in lab.roots:
            files = [os.path.join(sandbox.REPOSITORY, name) for name in os.listdir(sandbox.REPOSITORY)]
            lab.run("mkdir", checkout)
            lab.run("cp", *filter(os.path.isfile, files), checkout)
            commands = recipe() if release == RELEASE else recipe().replace(RELEASE, release)
            started = time.monotonic()
            lab.run("sh", "-euc", f"cd {checkout}\n{commands}")
            print(f"{release}: the recipe took {time.monotonic() - started:.0f} s")
            lab.roots[(release,)] = checkout + "/build"
        return lab.roots[(release,)]

    def __init__(self, lab: Lab, release: str) -> None:
        # There is nothing to prepare: what is on the disk is the recipe's.
        self.lab = lab
        self.release = release
        self.client = "the recipe"
        self.root = self.pristine(lab, release)
        self.image = lab.path(os.path.relpath(self.root, WORK), "azure.vhd")
        self.power = Processes()
        self.console = tempfile.TemporaryFile()  # noqa: SIM115

    def __exit__(self, *_: object) -> None:
        self.cut_power()
        self.console.close()

    def boot(self, azure: Azure) -> "Disk":
        self.azure = azure
        code, variables = (f"if=pflash,format=raw,file={name}" for name in FIRMWARE)
        command = (
            *machine.hardware(),
            *("-machine", "smm=on", "-global", "driver=cfi.pflash01,property=secure,value=on"),
            *("-drive", code + ",unit=0,readonly=on", "-drive", variables + ",unit=1,snapshot=on"),
            *("-drive", f"if=none,id=disk,format=vpc,file={self.image},snapshot=on"),
            *("-device", "virtio-scsi-pci", "-device", "scsi-hd,drive=disk"),
        )
        for _ in range(5):
            self.power.start(*command, output=self.console, wrap=azure.enter())
            said = wait_for("the kernel", lambda: KERNEL_STARTED.search(self.console_text()), 30 * self.patience)
            # The disk is the product, and its kernel has the arguments that it has: see machine.KERNEL.
            if machine.TIMER_PANIC not in said.group():
                return self
            self.cut_power()
            os.ftruncate(self.console.fileno(), 0)
            os.lseek(self.console.fileno(), 0, os.SEEK_SET)
        raise AssertionError(machine.TIMER_PANIC)

    def is_on(self) -> bool:
        # Before that there is nobody to ask.
        return bool(self.azure.reports()) and self.power.children[-1].poll() is None

    def run(self, *command: str) -> str:
        if not self.is_on():
            raise AssertionError(f"{' '.join(command)}: the machine is off, or not ready")
        asked = ["sudo", "-n", "env", "LC_ALL=C", *map(shlex.quote, command)]
        return subprocess.run(
            ssh_command(self, self.azure, USER, "key", *asked),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=30 * self.patience,
        ).stdout

    def read(self, name: str) -> str:
        return self.run("cat", "/" + name)

    def addresses(self) -> List[str]:
        return [*self.azure.leases()]

    def cut_power(self) -> None:
        self.power.stop()


class RecipeCase(JourneyCase):
    """The recipe for one release; a class of each is made below."""

    vm: Type[VM] = Disk
    tools: Sequence[str] = (*machine.TOOLS, *TOOLS, "ssh", "ssh-keygen")

    def test_it_has_no_more_lines_than_it_says(self) -> None:
        test: Any = self
        test.assertLessEqual(len(recipe().splitlines()), LINES)

    def test_azure_takes_the_vhd(self) -> None:
        # https://learn.microsoft.com/azure/virtual-machines/linux/create-upload-generic
        test: Any = self
        with Disk(self.lab, self.release) as vm, open(vm.image, "rb") as file:
            size = file.seek(-512, os.SEEK_END)
            footer = file.read()
        test.assertEqual(size % MEBIBYTE, 0)
        test.assertEqual(footer[:8], b"conectix")
        current_size, disk_type = struct.unpack(">Q4xI", footer[48:64])
        test.assertEqual((current_size, disk_type), (size, 2))  # fixed
        print(f"{self.release}: a VHD of {size // MEBIBYTE} MiB, of which {os.stat(vm.image).st_blocks >> 11} on disk")

    def test_its_disk_boots_to_ready_and_a_login(self) -> None:
        test: Any = self
        with Disk(self.lab, self.release) as vm, self.azure("web-01") as azure, explained(vm, azure):
            azure.start_network().start()
            started = time.monotonic()
            vm.boot(azure)
            wait_for("Ready", azure.reports, 30 * vm.patience)
            print(f"{self.release}, the recipe: Ready {azure.reports()[0]['time'] - started:.1f} s after power on")
            wait_for("a login", lambda: vm.run("echo", "in") == "in\n", 10 * vm.patience)
            self.check(
                vm, system="running", unit="disabled", result="success", host_name="web-01", etc_hostname="web-01"
            )
            test.assertEqual(azure.states(), ["Ready"])
            self.check_login(vm, azure)
            test.assertEqual([azure.resolve("web-01")], vm.addresses())
            test.assertEqual(vm.run("getent", "ahostsv4", "web-01").split()[:1], vm.addresses())
            test.assertIn("reported Ready to ", vm.console_text())
            test.assertRegex(vm.console_text(), r"(?m)^Debian GNU/Linux \d+ \S+ ttyS0$")
            test.assertEqual(vm.run("mokutil", "--sb-state"), "SecureBoot enabled\n")
            modules = vm.run("lsinitramfs", "/initrd.img")
            for driver in ("hv_vmbus", "hv_storvsc", "hv_netvsc"):
                test.assertRegex(modules, rf"/{driver}\.ko")


globals().update(cases(RecipeCase, "RecipeTest", VARIABLE, "bookworm", "trixie"))

if __name__ == "__main__":
    unittest.main()
