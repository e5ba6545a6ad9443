"""An image from nothing: what the README's recipe makes boots as a generation 2 VM of Azure's does, to a login.

Like the other whole machines these run only if the environment variable AZURE_PROVISIONING_MACHINE is set.
"""

import os
import re
import struct
import subprocess
import sys
import tempfile
import time
import unittest
from typing import Any, ClassVar, Optional, Sequence, Type

from tests import machine, sandbox
from tests.machine import Disk
from tests.test_journey import USER, JourneyCase
from tests.test_machine import VARIABLE
from tests.vm import VM, WORK, Lab, cases, explained, readme_block

TOOLS = ("mmdebstrap", "sfdisk", "mkfs.ext4", "mformat", "mcopy", "qemu-img")
RELEASE = "trixie"  # of Debian, as the recipe stands in the README
AMD64 = "arch=amd64 efi=x64 tty=ttyS0"
ARM64 = "arch=arm64 efi=aa64 tty=ttyAMA0"
LINES = 24
MEBIBYTE = 1 << 20
SIZE = "8G"  # of the VM's disk, larger than the image's

ARM64_VARIABLE = "AZURE_PROVISIONING_ARM64"
# Has the kernel run programs for Arm64 until its standard input ends, as it does when we end. Where it does already
# there is nothing to be put back.
EMULATION = """
[ ! -e /proc/sys/fs/binfmt_misc/qemu-aarch64 ] || { echo on; exec cat; }
update-binfmts --enable qemu-aarch64
echo on
cat
update-binfmts --disable qemu-aarch64
"""


def section() -> str:
    """Return the section of the README."""
    with open(os.path.join(sandbox.REPOSITORY, "README.md"), encoding="utf-8") as file:
        found = re.search(r"(?ms)^## An image from nothing$(.*?)^## ", file.read())
    assert found
    return found.group(1)


def recipe() -> str:
    """Return the commands that make an image."""
    return readme_block("mmdebstrap --")


class RecipeDisk(Disk):
    """A machine with nothing but the disk that the recipe made."""

    made_for = "amd64"

    @classmethod
    def pristine(cls, lab: Lab, release: str) -> str:
        """Return the file that the recipe makes, in lab."""
        checkout = f"{WORK}/{release}"
        if (release,) not in lab.roots:
            files = [os.path.join(sandbox.REPOSITORY, name) for name in os.listdir(sandbox.REPOSITORY)]
            lab.run("mkdir", checkout)
            lab.run("cp", *filter(os.path.isfile, files), checkout)
            commands = recipe().replace(RELEASE, release)
            if cls.made_for == "arm64":
                commands = "export QEMU_CPU=cortex-a57\n" + commands.replace(AMD64, ARM64)
            started = time.monotonic()
            lab.run("sh", "-euc", f"cd {checkout}\n{commands}")
            print(f"{release}, {cls.made_for}: the recipe took {time.monotonic() - started:.0f} s")
            lab.roots[(release,)] = lab.path(os.path.relpath(checkout, WORK), "build", "azure.vhd")
        return lab.roots[(release,)]


class Arm64RecipeDisk(RecipeDisk):
    """One for Arm64."""

    made_for = "arm64"


class RecipeCase(JourneyCase):
    """The recipe for one release; a class of each is made below."""

    vm: Type[VM] = RecipeDisk
    tools: Sequence[str] = (*machine.TOOLS, *machine.DISK_TOOLS, *TOOLS)
    made_for = "amd64"

    def image(self) -> str:
        return self.vm.pristine(self.lab, self.release)

    def test_azure_takes_the_vhd(self) -> None:
        # https://learn.microsoft.com/azure/virtual-machines/linux/create-upload-generic
        test: Any = self
        with open(self.image(), "rb") as file:
            size = file.seek(-512, os.SEEK_END)
            footer = file.read()
        test.assertEqual(size % MEBIBYTE, 0)
        test.assertEqual(footer[:8], b"conectix")
        current_size, disk_type = struct.unpack(">Q4xI", footer[48:64])
        test.assertEqual((current_size, disk_type), (size, 2))  # fixed
        blocks = os.stat(self.image()).st_blocks
        print(f"{self.release}: a VHD of {size // MEBIBYTE} MiB, of which {blocks >> 11} on disk")

    def boot_to_a_login(self, controller: str) -> None:
        test: Any = self
        key = self.lab.path("key")
        disk = Disk(self.lab, self.image(), USER, key, SIZE, controller, self.made_for)
        with disk as vm, self.azure("web-01") as azure, explained(vm, azure):
            azure.start_network().start()
            vm.boot(azure)
            report = vm.wait_for_report(30 * vm.patience)
            seconds = report["time"] - vm.switched_on
            print(f"{self.release}, the recipe, {vm.client}: Ready {seconds:.1f} s after power on")
            test.assertEqual(vm.log_in_at_last().returncode, 0)
            self.check(
                vm, system="running", unit="disabled", result="success", host_name="web-01", etc_hostname="web-01"
            )
            test.assertEqual(azure.states(), ["Ready"])
            self.check_login(vm, azure)
            test.assertEqual([azure.resolve("web-01")], vm.addresses())
            test.assertEqual(vm.run("getent", "ahostsv4", "web-01").split()[:1], vm.addresses())
            test.assertIn("reported Ready to ", vm.console_text())
            tty = "ttyAMA0" if self.made_for == "arm64" else "ttyS0"
            test.assertRegex(vm.console_text(), rf"(?m)^Debian GNU/Linux \d+ \S+ {tty}$")
            test.assertEqual(vm.run("mokutil", "--sb-state"), "SecureBoot enabled\n")
            modules = vm.run("sh", "-c", "lsinitramfs /initrd.img; cat /lib/modules/*/modules.builtin")
            for driver in ("hv_vmbus", "hv_storvsc", "hv_netvsc", "nvme"):
                test.assertRegex(modules, rf"/{driver}\.ko")
            gibibytes = int(vm.run("df", "--output=size", "--block-size=M", "/").split()[1].rstrip("M")) / 1024
            test.assertGreater(gibibytes, int(SIZE[:-1]) - 0.5, "the root file system takes the disk")
            # There is no Hyper-V here: what it would start is asked whether it understands what it is told.
            test.assertEqual(vm.run("systemctl", "is-active", "chrony").strip(), "inactive")
            test.assertIn("refclock PHC /dev/ptp_hyperv", vm.run("chronyd", "-p"))


class Amd64RecipeCase(RecipeCase):
    """The recipe as it stands, and that for the release before."""

    def test_its_disk_boots_to_ready_and_a_login(self) -> None:
        self.boot_to_a_login("scsi" if self.release == RELEASE else "nvme")

    def test_a_disk_from_which_nothing_boots_is_told(self) -> None:
        test: Any = self
        zeros = self.lab.path("zeros")
        with open(zeros, "wb") as file:
            file.truncate(64 * MEBIBYTE)
        done = subprocess.run(
            [sys.executable, "-m", "tests.machine", "--boot", zeros, "--timeout", "20"],
            stdout=subprocess.PIPE,
            encoding="utf-8",
            cwd=sandbox.REPOSITORY,
            check=False,
        )
        told = "===== asked of Azure\nnothing\nnot within 20 s: a health report\n"
        test.assertEqual((done.returncode, done.stdout[-len(told) :]), (1, told))


class Arm64RecipeCase(RecipeCase):
    """The recipe with the README's variables for Arm64, on a machine of another architecture."""

    vm = Arm64RecipeDisk
    made_for = "arm64"
    tools = (*RecipeCase.tools, machine.MACHINES["arm64"][0], "update-binfmts", "arch-test")
    emulation: "ClassVar[Optional[subprocess.Popen[bytes]]]" = None

    @classmethod
    def setUpClass(cls) -> None:
        cls.emulation = subprocess.Popen(
            ["unshare", "--mount", "sh", "-euc", EMULATION],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=sandbox.environment(),
            start_new_session=True,
        )
        assert cls.emulation.stdout
        if not cls.emulation.stdout.readline():
            raise AssertionError("the kernel does not run programs for Arm64")
        try:
            super().setUpClass()
        except BaseException:
            cls.emulation.communicate()
            raise

    @classmethod
    def tearDownClass(cls) -> None:
        super().tearDownClass()
        assert cls.emulation
        cls.emulation.communicate()

    def test_its_disk_boots_to_ready_and_a_login(self) -> None:
        self.boot_to_a_login("nvme")


class ReadmeTest(unittest.TestCase):
    """What can be seen of the recipe without running it."""

    def test_it_has_no_more_lines_than_it_may(self) -> None:
        self.assertLessEqual(len(recipe().splitlines()), LINES)

    def test_the_readme_has_the_line_for_arm64(self) -> None:
        self.assertIn(AMD64, recipe())
        self.assertIn(f"`{ARM64}`", section())

    def test_it_stops_at_its_first_error_and_the_shell_that_it_is_pasted_into_goes_on(self) -> None:
        stand_in = "mmdebstrap() { return 25; }; chroot() { echo on; }\n"
        with tempfile.TemporaryDirectory() as directory:
            done = subprocess.run(
                ["sh", "-c", stand_in + recipe() + "echo $?"],
                stdout=subprocess.PIPE,
                encoding="ascii",
                cwd=directory,
                check=True,
            )
        self.assertEqual(done.stdout, "25\n")


globals().update(cases(Amd64RecipeCase, "RecipeTest", VARIABLE, "bookworm", RELEASE))
globals().update(cases(Arm64RecipeCase, "Arm64RecipeTest", ARM64_VARIABLE, RELEASE))

if __name__ == "__main__":
    unittest.main()
