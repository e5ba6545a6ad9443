"""First boots, and those after them, of real systemds on three Debian releases.

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

from tests import boot, sandbox
from tests.boot import Container
from tests.vm import IMAGE_NAME, ROUTER, UNIT, Azure, Case, cases, explained, wait_for

VARIABLE = "AZURE_PROVISIONING_BOOT"
WANTED = os.environ.get(VARIABLE, "")

SHORT_TIMEOUT = f"""[Service]
ExecStart=
ExecStart=/usr/local/sbin/azure-provisioning --timeout 6
ExecStart=+/bin/systemctl disable --no-reload {UNIT}
"""

# A dhclient that hangs when it is started for the second time, by us. Debian 11's does that by itself, now and then.
HANGING_DHCLIENT = """#!/bin/sh
case " $* " in *" -r "*) exec /sbin/dhclient.real "$@" ;; esac
echo >>/run/starts
[ "$(wc -l </run/starts)" != 2 ] || exec sleep 1000
exec /sbin/dhclient.real "$@"
"""


class BootCase(Case):
    """The boots of one release; a class of each is made below."""

    vm = Container
    tools = boot.TOOLS

    def first_boot(self, client: str) -> None:
        """Everything about the first boot of a VM with this DHCP client, and about the second."""
        test: Any = self
        with Azure(self.lab) as azure, Container(self.lab, self.release, client) as machine, explained(machine, azure):
            azure.start_network().start()
            machine.boot(azure)
            self.check_provisioned(machine, azure)
            self.check_published(machine, azure)
            test.assertEqual([name for name, _ in machine.processes()].count("dhclient"), int(client == "ifupdown"))
            self.check_second_boot(machine, azure)

    def test_first_boot_with_networkd(self) -> None:
        self.first_boot("networkd")

    def test_first_boot_with_network_manager(self) -> None:
        self.first_boot("NetworkManager")

    def test_first_boot_with_ifupdown(self) -> None:
        self.first_boot("ifupdown")

    def late(self, network: bool) -> None:
        """The network, or WireServer alone, comes 15 s late."""
        test: Any = self
        with Azure(self.lab) as azure, Container(self.lab, self.release) as machine, explained(machine, azure):
            if network:
                azure.start()
            else:
                azure.start_network().start("wireserver")
            machine.boot(azure)
            time.sleep(15)
            # Nothing else in the boot waits.
            test.assertEqual(machine.run("systemctl", "is-active", "multi-user.target").strip(), "active")
            test.assertEqual(
                machine.run("systemctl", "is-active", UNIT).strip(), "inactive" if network else "activating"
            )
            if network:
                azure.start_network()
            else:
                azure.start("imds")
            there = time.monotonic()
            wait_for("Ready", azure.reports, 30)
            seconds = azure.reports()[0]["time"] - there
            print(f"{self.release}: Ready {seconds:.1f} s after {'DHCP' if network else 'WireServer'} was there")
            self.check_provisioned(machine, azure)

    def test_wireserver_that_comes_late(self) -> None:
        self.late(network=False)

    def test_a_network_that_comes_late(self) -> None:
        self.late(network=True)

    def test_a_power_cut_while_it_waits(self) -> None:
        with Azure(self.lab) as azure, Container(self.lab, self.release) as machine, explained(machine, azure):
            azure.start_network()
            machine.boot(azure)
            wait_for("its first try", lambda: "trying again" in machine.unit_journal(), 30)
            machine.cut_power()
            self.check_armed(machine)
            azure.start()
            machine.boot(azure)
            self.check_provisioned(machine, azure)

    def check_armed(self, machine: Container) -> None:
        """The unit is enabled, on the disk."""
        test: Any = self
        test.assertEqual(machine.systemctl("is-enabled", UNIT).strip(), "enabled")

    def test_wireserver_that_never_answers(self) -> None:
        test: Any = self
        with Azure(self.lab) as azure, Container(self.lab, self.release) as machine, explained(machine, azure):
            machine.write(f"etc/systemd/system/{UNIT}.d/timeout.conf", SHORT_TIMEOUT)
            azure.start_network().start("wireserver")
            machine.boot(azure)
            # One can log in while it waits.
            wait_for("its first try", lambda: "trying again" in machine.unit_journal(), 30)
            test.assertEqual(machine.show("ActiveState", "multi-user.target"), "active")
            test.assertEqual(machine.show("ActiveState"), "activating")
            test.assertEqual(machine.show("ActiveState", "console-getty.service"), "active")
            test.assertFalse(os.path.exists(f"/proc/{machine.pid}/root/run/nologin"))
            self.check(machine, system="degraded", unit="enabled", result="exit-code", host_name="web-01")
            line = "ready failed: GET http://168.63.129.16/machine?comp=goalstate: "
            test.assertEqual(machine.unit_journal().count(line), 1)
            test.assertEqual(machine.console_text().count(line), 1)
            test.assertRegex(machine.unit_journal(), re.escape(line) + ".*Connection refused; gave up after 6 s\n")
            errors = machine.run("journalctl", "--no-pager", "--unit=" + UNIT, "--priority=3", "--output=cat")
            test.assertIn(line, errors)
            test.assertNotIn("trying again", errors)

    def test_imds_that_never_answers(self) -> None:
        test: Any = self
        with Azure(self.lab) as azure, Container(self.lab, self.release) as machine, explained(machine, azure):
            drop_in = f"etc/systemd/system/{UNIT}.d/timeout.conf"
            machine.write(drop_in, SHORT_TIMEOUT)
            azure.start_network().start("imds")
            machine.boot(azure)
            self.check(machine, system="degraded", unit="enabled", result="exit-code", host_name=IMAGE_NAME)
            test.assertEqual([report["state"] for report in azure.reports()], ["Ready"])
            machine.power_off()
            self.check_armed(machine)
            azure.start("wireserver")
            machine.boot(azure)
            self.check_provisioned(machine, azure, reports=2)

    def image_of_an_image(self, vendor_preset: Optional[str] = None) -> None:
        """A VM is provisioned, captured by those who reset its identity their own way, and another is made from it."""
        with Container(self.lab, self.release) as machine:
            if vendor_preset:
                machine.write("usr/lib/systemd/system-preset/99-default-disable.preset", vendor_preset)
            machine.write("etc/machine-id", "uninitialized\n")
            for name in ("web-01", "web-02"):
                with Azure(self.lab, name) as azure, explained(machine, azure):
                    azure.start_network().start()
                    machine.boot(azure)
                    self.check_provisioned(machine, azure, name)
                    machine.power_off()
                machine.write("etc/machine-id", "uninitialized\n")

    def test_an_image_of_an_image(self) -> None:
        self.image_of_an_image()

    def test_an_image_of_an_image_whose_vendor_disables_all(self) -> None:
        self.image_of_an_image("disable *\n")

    def test_another_agent_is_refused(self) -> None:
        test: Any = self
        with Container(self.lab, self.release, install=False) as machine:
            self.lab.run(
                "chroot", machine.root, "sh", "-c", "dpkg --unpack --force-depends /var/cache/cloud-init_*.deb"
            )
            names = os.listdir(machine.path("lib/systemd/system"))
            machine.systemctl("enable", *[name for name in names if re.match(r"cloud-.*\.service", name)])
            command = ["sh", os.path.join(sandbox.REPOSITORY, "install.sh"), "--root", machine.root]
            before = machine.tree()
            refused = self.lab.run(*command, check=False)
            test.assertEqual(refused.returncode, 1, refused.stdout)
            test.assertRegex(refused.stdout, r"\Ainstall\.sh: cloud-init is enabled in .*; nothing was changed\n\Z")
            test.assertEqual(machine.tree(), before)
            self.lab.run(*command, "--force")
            self.check_armed(machine)

    def test_uninstall_leaves_nothing(self) -> None:
        test: Any = self
        with Container(self.lab, self.release, install=False) as machine:
            before = machine.tree()
            for more in ([], ["--uninstall"]):
                self.lab.run("sh", os.path.join(sandbox.REPOSITORY, "install.sh"), "--root", machine.root, *more)
                if not more:
                    test.assertNotEqual(machine.tree(), before)
            test.assertEqual(machine.tree(), before)

    def test_usr_is_merged_or_not(self) -> None:
        # bullseye stands for the systems where /usr is not merged: let it not become merged unnoticed.
        test: Any = self
        with Container(self.lab, self.release) as machine:
            test.assertEqual(os.path.islink(machine.path("bin")), self.release != "bullseye")

    def test_the_sandbox_of_the_unit(self) -> None:
        test: Any = self
        with Azure(self.lab) as azure, Container(self.lab, self.release) as machine, explained(machine, azure):
            azure.start_network().start()
            machine.boot(azure)
            self.check_provisioned(machine, azure)
            test.assertEqual(os.stat(machine.path("etc/hostname")).st_mode & 0o777, 0o644)
            score = re.search(r"exposure level for \S+: ([0-9.]+)", machine.run("systemd-analyze", "security", UNIT))
            assert score
            test.assertEqual(score.group(1), "3.0")  # as the README says
            test.assertEqual(machine.run("systemd-analyze", "verify", "/etc/systemd/system/" + UNIT), "")

    # The lease, in the cases that are not the usual one.

    def test_an_address_that_is_not_from_dhcp_is_left_alone(self) -> None:
        test: Any = self
        with Azure(self.lab) as azure, Container(self.lab, self.release) as machine, explained(machine, azure):
            machine.give_address("eth0", "10.0.0.7/24", f"Gateway={ROUTER}\n")
            azure.start_network().start()
            machine.boot(azure)
            self.check_provisioned(machine, azure)
            test.assertIn("found no DHCP lease to renew on eth0; for other machines", machine.unit_journal())
            test.assertEqual(machine.addresses(), ["10.0.0.7"])

    def test_a_dhcp_client_that_hangs_without_a_network_is_asked_again(self) -> None:
        test: Any = self
        with Azure(self.lab) as azure, Container(self.lab, self.release, "ifupdown") as machine, explained(
            machine, azure
        ):
            os.rename(machine.path("sbin/dhclient"), machine.path("sbin/dhclient.real"))
            machine.write("sbin/dhclient", HANGING_DHCLIENT)
            os.chmod(machine.path("sbin/dhclient"), 0o755)
            azure.start_network().start()
            machine.boot(azure)
            self.check_provisioned(machine, azure)
            self.check_published(machine, azure)
            lost = "eth0 has no address or no default route since systemctl restart networking.service; "
            test.assertEqual(machine.unit_journal().count(lost), 1)
            test.assertIn("timed out after 15.0 seconds; trying again\n", machine.unit_journal())

    def test_no_default_route(self) -> None:
        test: Any = self
        with Azure(self.lab) as azure, Container(self.lab, self.release) as machine, explained(machine, azure):
            routes = "".join(f"[Route]\nDestination={a}\nScope=link\n" for a in sandbox.ADDRESSES.values())
            machine.give_address("eth0", "10.0.0.7/24", routes)
            azure.start_network().start()
            machine.boot(azure)
            self.check_provisioned(machine, azure)
            test.assertIn("found no DHCP lease to renew on a default route; for other", machine.unit_journal())

    def test_the_interface_with_the_default_route_is_the_one(self) -> None:
        test: Any = self
        with Azure(self.lab) as azure, Container(self.lab, self.release) as machine, explained(machine, azure):
            # A second interface that comes first by name and by number, and one that has a worse default route.
            azure.ip("link", "set", "eth0", "name", "eth7", near=True)
            azure.ip("link", "add", "eth0", "type", "veth", "peer", "name", "eth1", near=True)
            machine.give_address("eth0", "10.9.0.1/24")
            machine.give_address("eth1", "10.9.1.1/24", "[Route]\nGateway=10.9.1.2\nMetric=5000\n")
            azure.start_network().start()
            machine.boot(azure)
            self.check_provisioned(machine, azure)
            test.assertIn("published web-01 by networkctl reconfigure eth7", machine.unit_journal())
            test.assertEqual(list(azure.leases().values()), ["web-01"])


class CleanlinessTest(unittest.TestCase):
    """Boots leave nothing behind, also when they are killed."""

    @unittest.skipUnless(WANTED, f"boots a machine: set {VARIABLE}=1")
    def test_nothing_outlives_a_lab_that_is_killed(self) -> None:
        def state() -> List[Any]:
            with open("/proc/self/mountinfo", encoding="utf-8") as file:
                mounts = file.read()
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


globals().update(cases(BootCase, "BootTest", VARIABLE))

if __name__ == "__main__":
    unittest.main()
