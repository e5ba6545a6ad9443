"""First boots, and those after them, of whole machines: their own kernel, initrd and disk, on three Debian releases.

They take minutes each, and root, so they run only if the environment variable AZURE_PROVISIONING_MACHINE is set: to 1
for all releases, or to some, as in AZURE_PROVISIONING_MACHINE=bookworm,trixie.
"""

import re
import unittest
from typing import Any

from tests import machine
from tests.machine import Machine
from tests.vm import TAP, Azure, Case, cases, explained

VARIABLE = "AZURE_PROVISIONING_MACHINE"
POWER_CUTS = 2  # a release


class MachineCase(Case):
    """The boots of one release; a class of each is made below."""

    vm = Machine
    tools = machine.TOOLS

    def first_boot(self, client: str, how: str) -> None:
        """The first boot of a VM with this DHCP client, and the second."""
        test: Any = self
        with Azure(self.lab, cable=TAP) as azure, Machine(self.lab, self.release, client) as vm, explained(vm, azure):
            azure.start_network().start()
            vm.boot(azure)
            self.check_provisioned(vm, azure)
            test.assertEqual(self.check_published(vm, azure), how)
            self.check_confined_by_apparmor(vm)
            self.check_second_boot(vm, azure)

    def check_confined_by_apparmor(self, vm: Machine) -> None:
        """AppArmor is on, as Debian's kernel has it, and has denied nothing."""
        test: Any = self
        test.assertEqual(vm.run("cat", "/sys/module/apparmor/parameters/enabled").strip(), "Y")
        test.assertEqual(re.findall(".*apparmor.*DENIED.*", vm.journal()), [])

    def test_first_boot_with_networkd(self) -> None:
        self.first_boot("networkd", "networkctl reconfigure eth0")

    def test_power_cuts_in_the_first_boot(self) -> None:
        # More of them: python3 -m tests.machine
        test: Any = self
        with Machine(self.lab, self.release) as vm:
            test.assertEqual(machine.cut_power_at_random(vm, POWER_CUTS, seed=1), [])


class DhcpcdCase(MachineCase):
    """The boots of a release where ifupdown calls dhcpcd."""

    def test_first_boot_with_ifupdown_and_dhcpcd(self) -> None:
        self.first_boot("ifupdown", "dhcpcd -N eth0")

    def test_first_boot_with_ifupdown_as_the_installer_leaves_it(self) -> None:
        self.first_boot("ifupdown, allow-hotplug", "dhcpcd -N eth0")


class NamelessCase(MachineCase):
    """The boots of a release whose dhcpcd keeps the host name to itself, unless it is told otherwise."""

    def test_a_dhcpcd_that_sends_no_name(self) -> None:
        test: Any = self
        with Azure(self.lab, cable=TAP) as azure, Machine(self.lab, self.release, "ifupdown") as vm, explained(
            vm, azure
        ):
            azure.start_network().start()
            vm.boot(azure)
            self.check_provisioned(vm, azure)
            test.assertNotIn("published", vm.unit_journal())
            test.assertEqual([*azure.leases().values()], ["*"])

    def test_a_dhcpcd_that_is_told_to_send_the_name(self) -> None:
        test: Any = self
        with Azure(self.lab, cable=TAP) as azure, Machine(self.lab, self.release, "ifupdown") as vm, explained(
            vm, azure
        ):
            vm.write("etc/dhcpcd.conf", vm.read("etc/dhcpcd.conf").replace("#hostname\n", "hostname\n"))
            azure.start_network().start()
            vm.boot(azure)
            self.check_provisioned(vm, azure)
            test.assertEqual(self.check_published(vm, azure), "dhcpcd -N eth0")


globals().update(cases(MachineCase, "MachineTest", VARIABLE, "bullseye"))
globals().update(cases(NamelessCase, "MachineTest", VARIABLE, "bookworm"))
globals().update(cases(DhcpcdCase, "MachineTest", VARIABLE, "trixie"))

if __name__ == "__main__":
    unittest.main()
