"""First boots, and those after them, of real systemds on four Debian releases.

They take minutes, and root, so they run only if the environment variable AZURE_PROVISIONING_BOOT is set: to 1 for all
releases, or to some, as in AZURE_PROVISIONING_BOOT=bookworm,trixie.
"""

import json
import os
import re
import subprocess
import sys
import time
import unittest
from typing import Any, List, Optional

from tests import container, sandbox
from tests.container import Container
from tests.vm import IMAGE_NAME, ROUTER, UNIT, WORK, Azure, Case, cases, explained, wait_for

VARIABLE = "AZURE_PROVISIONING_BOOT"
WANTED = os.environ.get(VARIABLE, "")

SHORT_TIMEOUT = f"""[Service]
ExecStart=
ExecStart=/usr/local/sbin/azure-provisioning --timeout 6
ExecStart=+/bin/systemctl disable --no-reload {UNIT}
"""

# A dhclient that hangs in its second start, which is by us. Debian 11's does that by itself, now and then.
HANGING_DHCLIENT = """#!/bin/sh
case " $* " in *" -r "*) exec /opt/dhclient "$@" ;; esac
echo >>/run/starts
[ "$(wc -l </run/starts)" != 2 ] || exec sleep 1000
exec /opt/dhclient "$@"
"""


class Boots(Case):
    """What the boots of all releases have in common."""

    vm = Container
    tools = container.TOOLS

    def first_boot(self, client: str) -> None:
        """Everything about the first boot of a VM with this DHCP client, and about the second."""
        test: Any = self
        with Azure(self.lab) as azure, Container(self.lab, self.release, client) as vm, explained(vm, azure):
            azure.start_network().start()
            vm.boot(azure)
            self.check_provisioned(vm, azure)
            self.check_published(vm, azure)
            test.assertLessEqual([name for name, _ in vm.processes()].count("dhclient"), 1)
            self.check_second_boot(vm, azure)

    def check_armed(self, vm: Container) -> None:
        """The unit is enabled, on the disk."""
        test: Any = self
        test.assertEqual(vm.systemctl("is-enabled", UNIT).strip(), "enabled")


class BullseyeCase(Boots):
    """Debian 11: its systemd is the oldest that is booted."""

    def test_first_boot_where_usr_is_not_merged(self) -> None:
        test: Any = self
        with Container(self.lab, self.release, install=False) as vm:
            test.assertFalse(os.path.islink(vm.path("bin")))
        self.first_boot("networkd")


class BootCase(Boots):
    """What depends on the release: on its systemd, on its DHCP clients."""

    def test_first_boot_with_networkd(self) -> None:
        self.first_boot("networkd")

    def test_first_boot_with_network_manager(self) -> None:
        self.first_boot("NetworkManager")

    def test_first_boot_with_ifupdown(self) -> None:
        self.first_boot("ifupdown")

    def test_a_second_interface_does_not_lead_the_services_away(self) -> None:
        with Azure(self.lab) as azure, Container(self.lab, self.release) as vm, explained(vm, azure):
            azure.start_network().add_second_interface()
            vm.boot(azure)
            wait_for("the second lease", lambda: "10.1.0." in vm.run("ip", "-4", "address"), 30)
            azure.start()
            self.check_provisioned(vm, azure)

    def image_of_an_image(self, vendor_preset: Optional[str] = None) -> None:
        """A VM is provisioned, captured by those who reset its identity their own way, and another is made from it."""
        with Container(self.lab, self.release) as vm:
            if vendor_preset:
                vm.write("usr/lib/systemd/system-preset/99-default-disable.preset", vendor_preset)
            vm.write("etc/machine-id", "uninitialized\n")
            for name in ("web-01", "web-02"):
                with Azure(self.lab, name) as azure, explained(vm, azure):
                    azure.start_network().start()
                    vm.boot(azure)
                    self.check_provisioned(vm, azure, name)
                    vm.power_off()
                vm.write("etc/machine-id", "uninitialized\n")

    def test_an_image_of_an_image(self) -> None:
        self.image_of_an_image()

    def test_an_image_of_an_image_whose_vendor_disables_all(self) -> None:
        self.image_of_an_image("disable *\n")

    def test_another_agent_is_refused(self) -> None:
        test: Any = self
        with Container(self.lab, self.release, install=False) as vm:
            self.lab.run("chroot", vm.root, "sh", "-c", "dpkg --unpack --force-depends /var/cache/cloud-init_*.deb")
            names = os.listdir(vm.path("lib/systemd/system"))
            vm.systemctl("enable", *[name for name in names if re.match(r"cloud-.*\.service", name)])
            command = ["sh", os.path.join(sandbox.REPOSITORY, "install.sh"), "--root", vm.root]
            before = vm.tree()
            refused = self.lab.run(*command, check=False)
            test.assertEqual(refused.returncode, 1, refused.stdout)
            test.assertRegex(refused.stdout, r"\Ainstall\.sh: cloud-init is enabled in .*; nothing was changed\n\Z")
            test.assertEqual(vm.tree(), before)
            self.lab.run(*command, "--force")
            self.check_armed(vm)

    def test_the_sandbox_of_the_unit(self) -> None:
        test: Any = self
        with Azure(self.lab) as azure, Container(self.lab, self.release) as vm, explained(vm, azure):
            azure.start_network().start()
            vm.boot(azure)
            self.check_provisioned(vm, azure)
            test.assertEqual(os.stat(vm.path("etc/hostname")).st_mode & 0o777, 0o644)
            score = re.search(r"exposure level for \S+: ([0-9.]+)", vm.run("systemd-analyze", "security", UNIT))
            assert score
            test.assertEqual(score.group(1), "3.1")  # as the README says
            test.assertEqual(vm.run("systemd-analyze", "verify", "/etc/systemd/system/" + UNIT), "")

    # The lease, in the cases that are not the usual one.

    def test_an_address_that_is_not_from_dhcp_is_left_alone(self) -> None:
        test: Any = self
        with Azure(self.lab) as azure, Container(self.lab, self.release) as vm, explained(vm, azure):
            vm.give_address("eth0", "10.0.0.7/24", f"Gateway={ROUTER}\n")
            azure.start_network().start()
            vm.boot(azure)
            self.check_provisioned(vm, azure)
            test.assertIn("found no DHCP lease to renew on eth0; for other machines", vm.unit_journal())
            test.assertEqual(vm.addresses(), ["10.0.0.7"])


class BookwormCase(BootCase):
    """Debian 12: its installer brings dhclient, and its dhcpcd keeps the host name to itself unless told otherwise."""

    def test_a_dhcp_client_that_hangs_without_a_network_is_asked_again(self) -> None:
        test: Any = self
        with Azure(self.lab) as azure, Container(self.lab, self.release, "ifupdown") as vm, explained(vm, azure):
            os.rename(vm.path("sbin/dhclient"), vm.path("opt/dhclient"))
            vm.write("sbin/dhclient", HANGING_DHCLIENT)
            os.chmod(vm.path("sbin/dhclient"), 0o755)
            azure.start_network().start()
            vm.boot(azure)
            self.check_provisioned(vm, azure)
            self.check_published(vm, azure)
            lost = "eth0 has no default route after systemctl restart networking.service: "
            test.assertEqual(vm.unit_journal().count(lost), 1)
            test.assertIn("no end within 8 s; trying again\n", vm.unit_journal())

    def test_a_dhcpcd_that_sends_no_name(self) -> None:
        test: Any = self
        with Azure(self.lab) as azure, self.with_dhcpcd() as vm, explained(vm, azure):
            azure.start_network().start()
            vm.boot(azure)
            self.check_provisioned(vm, azure)
            test.assertEqual([*azure.leases().values()], ["*"])

    def test_a_dhcpcd_that_is_told_to_send_the_name(self) -> None:
        with Azure(self.lab) as azure, self.with_dhcpcd() as vm, explained(vm, azure):
            vm.write("etc/dhcpcd.conf", vm.read("etc/dhcpcd.conf").replace("#hostname\n", "hostname\n"))
            azure.start_network().start()
            vm.boot(azure)
            self.check_provisioned(vm, azure)
            self.check_published(vm, azure)

    def with_dhcpcd(self) -> Container:
        """Return a VM where ifupdown finds no dhclient, and takes dhcpcd."""
        vm = Container(self.lab, self.release, "ifupdown")
        os.remove(vm.path("sbin/dhclient"))
        return vm


class TrixieCase(BootCase):
    """Debian 13: all that is our own doing and the same on each release."""

    def test_first_boot_with_netplan(self) -> None:
        self.first_boot("netplan")

    def late(self, network: bool) -> None:
        """The network, or WireServer alone, comes 15 s late."""
        test: Any = self
        with Azure(self.lab) as azure, Container(self.lab, self.release) as vm, explained(vm, azure):
            if network:
                azure.start()
            else:
                azure.start_network().start("wireserver")
            vm.boot(azure)
            time.sleep(15)
            # Nothing else in the boot waits.
            test.assertEqual(vm.run("systemctl", "is-active", "multi-user.target").strip(), "active")
            test.assertEqual(vm.run("systemctl", "is-active", UNIT).strip(), "inactive" if network else "activating")
            if network:
                azure.start_network()
            else:
                azure.start("imds")
            there = time.monotonic()
            wait_for("Ready", azure.reports, 30)
            seconds = azure.reports()[0]["time"] - there
            print(f"{self.release}: Ready {seconds:.1f} s after {'DHCP' if network else 'WireServer'} was there")
            self.check_provisioned(vm, azure)

    def test_wireserver_that_comes_late(self) -> None:
        self.late(network=False)

    def test_a_network_that_comes_late(self) -> None:
        self.late(network=True)

    def test_a_power_cut_while_it_waits(self) -> None:
        with Azure(self.lab) as azure, Container(self.lab, self.release) as vm, explained(vm, azure):
            azure.start_network()
            vm.boot(azure)
            wait_for("its first try", lambda: "trying again" in vm.unit_journal(), 30)
            vm.cut_power()
            self.check_armed(vm)
            azure.start()
            vm.boot(azure)
            self.check_provisioned(vm, azure)

    def test_wireserver_that_never_answers(self) -> None:
        test: Any = self
        with Azure(self.lab) as azure, Container(self.lab, self.release) as vm, explained(vm, azure):
            vm.write(f"etc/systemd/system/{UNIT}.d/timeout.conf", SHORT_TIMEOUT)
            azure.start_network().start("wireserver")
            vm.boot(azure)
            # One can log in while it waits.
            wait_for("its first try", lambda: "trying again" in vm.unit_journal(), 30)
            test.assertEqual(vm.show("ActiveState", "multi-user.target"), "active")
            test.assertEqual(vm.show("ActiveState"), "activating")
            test.assertEqual(vm.show("ActiveState", "console-getty.service"), "active")
            test.assertFalse(os.path.exists(f"/proc/{vm.pid}/root/run/nologin"))
            self.check(vm, system="degraded", unit="enabled", result="exit-code", host_name="web-01")
            line = "ready failed: GET http://168.63.129.16/machine?comp=goalstate: "
            test.assertEqual(vm.unit_journal().count(line), 1)
            test.assertEqual(vm.console_text().count(line), 1)
            test.assertRegex(vm.unit_journal(), re.escape(line) + ".*Connection refused; gave up after 6 s\n")
            errors = vm.run("journalctl", "--no-pager", "--unit=" + UNIT, "--priority=3", "--output=cat")
            test.assertIn(line, errors)
            test.assertNotIn("trying again", errors)

    def test_imds_that_never_answers(self) -> None:
        test: Any = self
        with Azure(self.lab) as azure, Container(self.lab, self.release) as vm, explained(vm, azure):
            drop_in = f"etc/systemd/system/{UNIT}.d/timeout.conf"
            vm.write(drop_in, SHORT_TIMEOUT)
            azure.start_network().start("imds")
            vm.boot(azure)
            self.check(vm, system="degraded", unit="enabled", result="exit-code", host_name=IMAGE_NAME)
            test.assertEqual(azure.states(), ["Ready"])
            vm.power_off()
            self.check_armed(vm)
            azure.start("wireserver")
            vm.boot(azure)
            self.check_provisioned(vm, azure, reports=2)

    def test_uninstall_leaves_nothing(self) -> None:
        test: Any = self
        with Container(self.lab, self.release, install=False) as vm:
            before = vm.tree()
            for more in ([], ["--uninstall"]):
                self.lab.run("sh", os.path.join(sandbox.REPOSITORY, "install.sh"), "--root", vm.root, *more)
                if not more:
                    test.assertNotEqual(vm.tree(), before)
            test.assertEqual(vm.tree(), before)

    def test_no_default_route(self) -> None:
        test: Any = self
        with Azure(self.lab) as azure, Container(self.lab, self.release) as vm, explained(vm, azure):
            routes = "".join(f"[Route]\nDestination={a}\nScope=link\n" for a in sandbox.ADDRESSES.values())
            vm.give_address("eth0", "10.0.0.7/24", routes)
            azure.start_network().start()
            vm.boot(azure)
            self.check_provisioned(vm, azure)
            test.assertIn("found no DHCP lease to renew on a default route; for other", vm.unit_journal())

    def test_the_interface_with_the_default_route_is_the_one(self) -> None:
        test: Any = self
        with Azure(self.lab) as azure, Container(self.lab, self.release) as vm, explained(vm, azure):
            # A second interface that comes first by name and by number, and one that has a worse default route.
            azure.ip("link", "set", "eth0", "name", "eth7", near=True)
            azure.ip("link", "add", "eth0", "type", "veth", "peer", "name", "eth1", near=True)
            vm.give_address("eth0", "10.9.0.1/24")
            vm.give_address("eth1", "10.9.1.1/24", "[Route]\nGateway=10.9.1.2\nMetric=5000\n")
            azure.start_network().start()
            vm.boot(azure)
            self.check_provisioned(vm, azure)
            test.assertIn("published web-01 by networkctl reconfigure eth7", vm.unit_journal())
            test.assertEqual(list(azure.leases().values()), ["web-01"])


class CleanlinessTest(unittest.TestCase):
    """Boots leave nothing behind, also when they are killed."""

    @unittest.skipUnless(WANTED, f"boots a machine: set {VARIABLE}=1")
    def test_nothing_outlives_a_lab_that_is_killed(self) -> None:
        def state() -> List[Any]:
            mounts = sandbox.mounts("/", "/proc", "/run", WORK, WORK + "/proc")
            listing = subprocess.run(["ip", "netns"], stdout=subprocess.PIPE, check=True).stdout
            return [mounts, listing, sorted(os.listdir("/dev/shm")), sorted(os.listdir("/run"))]

        before = state()
        code = (
            "import json; from tests.vm import *; lab = Lab()\n"
            "azure = Azure(lab); azure.start_network().start()\n"
            "wait_for('DHCP', lambda: 'IP range' in azure.text(azure.dhcp_log), 5)\n"
            "pids = [lab.pid, *(child.pid for child in azure.processes.children)]\n"
            "print(json.dumps([pids, lab.groups]), flush=True); time.sleep(60)"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=sandbox.REPOSITORY, env=sandbox.environment()
        ) as process:
            assert process.stdout
            pids, groups = json.loads(process.stdout.readline())
            left = [f"/proc/{pid}/exe" for pid in pids] + groups
            self.assertEqual([path for path in left if not os.path.exists(path)], [])
            process.kill()
        wait_for("the end of the lab", lambda: not any(map(os.path.exists, left)), 5)
        self.assertEqual(state(), before)


globals().update(cases(BullseyeCase, "BootTest", VARIABLE, "bullseye"))
globals().update(cases(BookwormCase, "BootTest", VARIABLE, "bookworm"))
globals().update(cases(TrixieCase, "BootTest", VARIABLE, "trixie"))
globals().update(cases(BootCase, "BootTest", VARIABLE, "forky"))

if __name__ == "__main__":
    unittest.main()
