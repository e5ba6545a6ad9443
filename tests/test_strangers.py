"""Others judge the pretend Azure: the agents that Debian ships provision against it, as they would on Azure.

Like the boots of tests/test_boot.py they run only if the environment variable AZURE_PROVISIONING_BOOT is set. What a
container lacks of a VM on Azure is told to them, and what they wait for in vain; nothing else about them is changed.
"""

import json
import unittest
from contextlib import ExitStack
from typing import Any, Dict, List, Tuple

from tests import container
from tests.container import Container
from tests.fake_azure import VM_ID
from tests.test_boot import VARIABLE
from tests.vm import Azure, Case, cases, explained, wait_for

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl alice at home"

# cloud-init, in a VM whose firmware says that it is on Azure: it looks for a container, and asks one for nothing.
CLOUD_INIT = f"""
import sys
from cloudinit import dmi
dmi.read_dmi_data = {{"chassis-asset-tag": "7783-7084-3265-9085-8269-3286-77", "system-uuid": "{VM_ID}"}}.get
from cloudinit.cmd import main
sys.exit(main.main(["cloud-init", "init", "--local"]))
"""
WAAGENT_UNIT = "walinuxagent.service"


class Stranger(Container):
    """A container with the agents of others. Debian's waagent conflicts with NetworkManager."""

    packages = "systemd,systemd-sysv,dbus,python3-minimal,libpython3-stdlib,iproute2,cloud-init,waagent"


class StrangersCase(Case):
    """The agents of one release; a class of each is made below."""

    vm = Stranger
    tools = container.TOOLS

    # cloud-init: network, IMDS and WireServer are all its own doing.

    def cloud_init(self, *vm_arguments: str) -> "Tuple[str, List[str], List[Dict[str, Any]]]":
        """Return what cloud-init knows of the VM in the end, in JSON, and the requests and reports that it made."""
        with ExitStack() as stack:
            azure = stack.enter_context(Azure(self.lab, vm_arguments=vm_arguments))
            machine = stack.enter_context(Stranger(self.lab, self.release, install=False))
            stack.enter_context(explained(machine, azure))
            azure.start_network().start()
            machine.write(
                "etc/cloud/cloud.cfg.d/99_test.cfg", "datasource_list: [Azure]\nnetwork: {config: disabled}\n"
            )
            machine.write("etc/systemd/network/10-eth0.network", "[Match]\nName=eth0\n[Link]\nUnmanaged=yes\n")
            machine.write("etc/cloud/cloud-init.disabled", "")
            machine.systemctl("mask", WAAGENT_UNIT)
            machine.boot(azure)
            machine.wait_until_booted()
            output = machine.run("python3", "-c", CLOUD_INIT)
            wait_for("a report; cloud-init said:\n" + output, azure.reports, 0)
            found = machine.run("cat", "/run/cloud-init/instance-data-sensitive.json")
            asked = ["{service}: {path}: {outcome}".format(**request) for request in azure.requests()]
            return found, asked, azure.reports()

    def test_cloud_init_reads_imds_and_reports_ready(self) -> None:
        test: Any = self
        found, asked, reports = self.cloud_init(
            *("--admin-username", "alice", "--public-key", KEY, "--disable-password-authentication", "true")
        )
        test.assertEqual([report["state"] for report in reports], ["Ready"])
        test.assertEqual(asked[0], "imds: /metadata/instance?api-version=2021-08-01&extended=true: 200")
        vm, imds = json.loads(found)["v1"], json.loads(found)["ds"]["meta_data"]["imds"]
        test.assertEqual(
            [vm["cloud_name"], vm["local_hostname"], vm["instance_id"], vm["public_ssh_keys"]],
            ["azure", "web-01", VM_ID, [KEY]],
        )
        test.assertEqual(imds["compute"]["osProfile"]["adminUsername"], "alice")

    def test_cloud_init_reports_a_failure(self) -> None:
        test: Any = self
        # An IMDS that does not know the document is one that cloud-init cannot do without.
        script = json.dumps({"imds": [{"status": 400}] * 2})
        _, asked, reports = self.cloud_init("--script", script)
        test.assertEqual([line[-5:] for line in asked[:2]], [": 400"] * 2)
        test.assertEqual(
            {(report["state"], report["substatus"]) for report in reports}, {("NotReady", "ProvisioningFailed")}
        )
        test.assertIn("https://aka.ms/linuxprovisioningerror", reports[0]["description"])

    # waagent: as its package starts it.

    def waagent(self, agent: str) -> "List[Dict[str, Any]]":
        """Return the health reports of waagent with this setting of Provisioning.Agent."""
        test: Any = self
        with Azure(self.lab) as azure, self.with_waagent(agent) as machine, explained(machine, azure):
            azure.start_network().start()
            machine.systemctl("mask", "cloud-init-local.service")
            machine.boot(azure)
            reports: List[Dict[str, Any]] = wait_for("a report", azure.reports, 60)
            test.assertEqual(azure.requests()[0]["path"], "/?comp=versions")
            return reports

    def with_waagent(self, agent: str) -> Stranger:
        """Return a machine with this setting of Provisioning.Agent for waagent."""
        test: Any = self
        machine = Stranger(self.lab, self.release, install=False)
        settings = machine.read("etc/waagent.conf")
        test.assertIn("\nProvisioning.Agent=cloud-init\n", settings)
        machine.write("etc/waagent.conf", settings.replace("Agent=cloud-init\n", f"Agent={agent}\n"))
        machine.write(
            f"etc/systemd/system/{WAAGENT_UNIT}.d/test.conf",
            "[Unit]\nConditionVirtualization=\nWants=network-online.target\nAfter=network-online.target\n",
        )
        return machine

    def test_waagent_reports_ready(self) -> None:
        test: Any = self
        (report,) = self.waagent("disabled")
        test.assertEqual(report["state"], "Ready")

    def test_waagent_reports_a_failure(self) -> None:
        test: Any = self
        # It looks for a DVD with the VM's description.
        (report,) = self.waagent("waagent")
        test.assertEqual((report["state"], report["substatus"]), ("NotReady", "ProvisioningFailed"))
        test.assertIn("Error mounting dvd", report["description"])

    def test_waagent_that_is_told_not_to_provision_starts_after_us_and_stays(self) -> None:
        test: Any = self
        with Azure(self.lab) as azure, self.with_waagent("disabled") as machine, explained(machine, azure):
            azure.start_network().start()
            machine.write("etc/cloud/cloud-init.disabled", "")
            machine.install()
            machine.boot(azure)
            wait_for("waagent's report", lambda: len(azure.reports()) == 2, 60)
            self.check_provisioned(machine, azure, reports=2)
            asked = [request["path"] for request in azure.requests()]
            ours, waagents = asked.index("/machine?comp=health"), asked.index("/?comp=versions")
            test.assertLess(ours, waagents)
            test.assertEqual(machine.run("systemctl", "is-active", WAAGENT_UNIT).strip(), "active")
            test.assertEqual(azure.leases(), {machine.addresses()[0]: "web-01"})


globals().update(cases(StrangersCase, "StrangersTest", VARIABLE))

if __name__ == "__main__":
    unittest.main()
