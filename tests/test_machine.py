"""First boots, and those after them, of whole machines: their own kernel, initrd and disk, on three Debian releases.

They take minutes each, and root, so they run only if the environment variable AZURE_PROVISIONING_MACHINE is set: to 1
for all releases, or to some, as in AZURE_PROVISIONING_MACHINE=bookworm,trixie.
"""

import contextlib
import glob
import json
import os
import re
import subprocess
import sys
import time
import unittest
from contextlib import ExitStack
from typing import Any, Iterator, Sequence, Tuple, Type

from tests import machine, sandbox
from tests.machine import WITH_USER, Machine
from tests.test_journey import BUILDER, USER, JourneyCase
from tests.vm import TAP, UNIT, VM, Azure, Lab, cases, explained, readme_block, ssh_options, wait_for

VARIABLE = "AZURE_PROVISIONING_MACHINE"
MARKETPLACE_VARIABLE = "AZURE_PROVISIONING_MARKETPLACE"
MARKETPLACE_RELEASE = "trixie"  # as in the README
MARKETPLACE_USER = "azureuser"
NETPLAN = "/etc/netplan/50-cloud-init.yaml"
POWER_CUTS = 2
# What SELinux says of the unit's processes, by the domains that they are in, and of what they write.
OURS = ":(initrc|useradd|groupadd|passwd|setfiles|ssh_keygen|systemd_passwd_agent)_t:|azure|hostname|sudoers|alice"


class SelinuxMachine(Machine):
    """A whole machine with Debian's SELinux policy."""

    packages = Machine.packages + ",selinux-policy-default,policycoreutils,selinux-utils"

    def make_disk(self) -> None:
        # As on an installed system: its own tool labels the root, and mkfs.ext4 takes the labels along.
        policy = "/etc/selinux/default/contexts/files/file_contexts"
        self.write("etc/selinux/config", "SELINUX=enforcing\nSELINUXTYPE=default\n")
        label = 'mount --bind /proc "$0/proc"; chroot "$0" setfiles -F -e /proc "$1" /; umount "$0/proc"'
        self.lab.run("sh", "-euc", label, self.root, policy)
        super().make_disk()


class MachineImage(Machine):
    """A whole machine as one would make an image of it."""

    others = "disable"


class MarketplaceMachine(MachineImage):
    """A whole machine with what Debian's images in the Marketplace have: cloud-init, the Azure Linux Agent, netplan."""

    packages = (
        "systemd,systemd-sysv,systemd-resolved,libnss-resolve,libnss-myhostname,dbus,udev,python3-minimal,"
        "libpython3-stdlib,iproute2,initramfs-tools,kmod,openssh-server,sudo,apparmor,netplan.io,cloud-init,waagent"
    )

    @classmethod
    def pristine(cls, lab: Lab, release: str) -> str:
        # By which cloud-init asks for a lease of its own.
        client = "isc-dhcp-client" if release == "bookworm" else "dhcpcd-base"
        return lab.root(release, f"{cls.packages},{client},linux-image-cloud-amd64/{release}")


class MachineCase(JourneyCase):
    """The boots of one release; a class of each is made below."""

    vm: Type[VM] = MachineImage
    tools: Sequence[str] = (*machine.TOOLS, "ssh", "ssh-keygen")

    def make_image(self, client: str, *options: str) -> VM:
        test: Any = self
        image = self.vm(self.lab, self.release, client, install=False)
        self.use(image)
        for name in ("install.sh", "azure_provisioning.py", UNIT):
            with open(os.path.join(sandbox.REPOSITORY, name), encoding="utf-8") as file:
                image.write("opt/azure-provisioning/" + name, file.read())
        with Azure(self.lab, BUILDER, cable=TAP) as azure, explained(image, azure):
            azure.start_network()
            image.boot(azure)
            image.wait_until_booted()
            wait_for("the builder's lease", lambda: BUILDER in azure.leases().values(), 30 * image.patience)
            test.assertIn("installed and enabled", image.run("sh", "/opt/azure-provisioning/install.sh", *options))
            self.look_at_image(image)
            said = image.run("sh", "/opt/azure-provisioning/install.sh", "--generalize")
            test.assertIn("forgot /etc/machine-id", said)
            image.power_off()
        return image

    def journey(self, client: str, *options: str) -> None:
        """An image becomes two VMs."""
        with self.make_image(client, *options) as image:
            for name in ("web-01", "web-02"):
                with self.new_vm(image, name) as (vm, _):
                    self.check_confined_by_apparmor(vm)

    @contextlib.contextmanager
    def new_vm(
        self, image: VM, name: str, user: str = USER, key: str = "key", other: str = "other"
    ) -> Iterator[Tuple[VM, Azure]]:
        """A VM of image, and its far end: it is ready, and user has logged in with the key, and not with the other."""
        with ExitStack() as stack:
            vm = stack.enter_context(self.vm(self.lab, self.release, image.client, image=image))
            azure = stack.enter_context(self.azure(name, user, key))
            stack.enter_context(explained(vm, azure))
            azure.start_network().start()
            started = time.monotonic()
            vm.boot(azure)
            self.check_vm(vm, azure, name, started)
            self.check_login(vm, azure, user, key, other)
            yield vm, azure

    def first_boot(self, client: str) -> None:
        """The first boot of a VM with this DHCP client, and the second."""
        with Azure(self.lab, cable=TAP) as azure, Machine(self.lab, self.release, client) as vm, explained(vm, azure):
            azure.start_network().start()
            vm.boot(azure)
            self.check_provisioned(vm, azure)
            self.check_published(vm, azure)
            self.check_confined_by_apparmor(vm)
            self.check_second_boot(vm, azure)

    def check_confined_by_apparmor(self, vm: VM) -> None:
        """AppArmor is on, as Debian's kernel has it, and has denied nothing."""
        test: Any = self
        test.assertEqual(vm.run("cat", "/sys/module/apparmor/parameters/enabled").strip(), "Y")
        test.assertEqual(re.findall(".*apparmor.*DENIED.*", vm.journal()), [])


class BookwormCase(MachineCase):
    """Debian 12, with networkd."""

    def test_from_a_used_machine_to_a_login(self) -> None:
        self.journey("networkd", "--user")

    def test_power_cuts_in_the_first_boot(self) -> None:
        # More of them: python3 -m tests.machine
        test: Any = self
        with Machine(self.lab, self.release, install=False) as vm:
            vm.install("--user")
            test.assertEqual(machine.cut_power_at_random(vm, POWER_CUTS, seed=1), [])

    def test_a_machine_that_enforces_selinux_is_provisioned_with_the_right_labels(self) -> None:
        test: Any = self
        with ExitStack() as stack:
            vm = stack.enter_context(SelinuxMachine(self.lab, self.release, install=False))
            azure = stack.enter_context(Azure(self.lab, vm_arguments=WITH_USER, cable=TAP))
            stack.enter_context(explained(vm, azure))
            vm.install("--user")
            azure.start_network().start()
            enforcing = ("security=selinux", "selinux=1", "enforcing=1")
            vm.boot(azure, *enforcing)
            vm.wait_until_booted()
            test.assertEqual(vm.run("getenforce").strip(), "Enforcing")
            self.check(vm, unit="disabled", result="success", host_name="web-01", etc_hostname="web-01")
            test.assertEqual(azure.states(), ["Ready"])
            written = [
                *("/etc/hostname", "/etc/hosts", "/etc/passwd", "/etc/sudoers.d/zz-azure-provisioning-alice"),
                *("/etc/ssh/sshd_config.d/10-azure-provisioning.conf", "/home/alice/.ssh/authorized_keys"),
            ]
            for path in written:
                test.assertNotIn("No such file", vm.run("ls", "-Z", path))
            test.assertEqual(vm.run("restorecon", "-nv", *written), "")
            # The policy keeps networkd's answers from the unit's domain, and so from networkctl.
            test.assertIn("found no DHCP lease to renew on eth0; for other machines to", vm.unit_journal())
            answer = "send_msg .*msgtype=method_return .*:systemd_networkd_t:.*:initrc_t:"
            denied = [line for line in re.findall(".*avc: +denied.*", vm.journal()) if re.search(OURS, line)]
            test.assertEqual([line for line in denied if not re.search(answer, line)], [])
            test.assertEqual(azure.resolve("web-01"), "")
            vm.power_off()
            vm.boot(azure, *enforcing)
            wait_for("the name in the DNS", lambda: azure.resolve("web-01"), 10 * vm.patience)

    def test_nothing_outlives_a_machine_whose_test_is_killed(self) -> None:
        code = (
            "import json, sys, time; from tests.machine import *\n"
            "lab = Lab(); lab.root = lambda *_: lab.run('mkdir', WORK + '/root') and WORK + '/root'\n"
            "vm = Machine(lab, '', install=False); lab.run('truncate', '--size=1M', vm.root + '/disk')\n"
            "azure = Azure(lab, cable=TAP); vm.disk, vm.kernel, vm.initrd = vm.path('disk'), *sys.argv[1:]\n"
            "vm.switch_on(azure, 'panic=60')  # without a root it would soon switch itself off\n"
            "print(json.dumps([lab.pid, azure.far, vm.power.children[0].pid]), flush=True); time.sleep(60)"
        )
        root = self.lab.path(os.path.basename(Machine.pristine(self.lab, self.release)))
        files = [glob.glob(f"{root}/boot/{name}*")[0] for name in ("vmlinuz", "initrd.img")]
        with subprocess.Popen(
            [sys.executable, "-c", code, *files],
            stdout=subprocess.PIPE,
            cwd=sandbox.REPOSITORY,
            env=sandbox.environment(),
        ) as process:
            assert process.stdout
            left = [f"/proc/{pid}/exe" for pid in json.loads(process.stdout.readline())]
            wait_for("QEMU", lambda: os.readlink(left[-1]).endswith("/qemu-system-x86_64"), 10)
            process.kill()
        wait_for("the end of the machine", lambda: not any(map(os.path.exists, left)), 10)


class TrixieCase(MachineCase):
    """Debian 13, as its installer leaves it: ifupdown with dhcpcd."""

    def test_from_a_used_machine_to_a_login(self) -> None:
        self.journey("ifupdown, allow-hotplug", "--user")


class ForkyCase(MachineCase):
    """Debian testing."""

    def test_first_boot_with_ifupdown_and_dhcpcd(self) -> None:
        self.first_boot("ifupdown")

    def test_first_boot_with_network_manager(self) -> None:
        self.first_boot("NetworkManager")


class MarketplaceCase(MachineCase):
    """From a VM that cloud-init has provisioned to VMs without cloud-init, by the README's commands."""

    vm = MarketplaceMachine
    tools = (*MachineCase.tools, "scp")

    def make_image(self, client: str, *options: str) -> VM:
        test: Any = self
        image = self.vm(self.lab, self.release, client, install=False)
        self.use(image)
        os.remove(image.path("var/lib/waagent/ovf-env.xml"))  # or cloud-init would read it
        image.write("etc/hostname", "debian\n")
        with self.azure(BUILDER, MARKETPLACE_USER, "builder") as azure, explained(image, azure):
            azure.start_network().start()
            image.boot(azure)
            image.wait_until_booted()
            test.assertEqual(azure.states(), ["Ready"])
            test.assertEqual(image.run("uname", "-n").strip(), BUILDER)
            # cloud-init writes that line where the interface is Hyper-V's.
            image.run("sed", "-i", r"s/^\( *\)macaddress:/\1driver: virtio_net\n&/", NETPLAN)
            test.assertRegex(image.read(NETPLAN), "driver: .*\n *macaddress: ")
            self.look_at_image(image)
            self.enabled.remove("walinuxagent.service")
            files = re.findall(r"(?m)^scp (.*) azureuser@\$ip:$", readme_block("scp"))
            key = self.lab.path("builder")
            with open(key + ".pub", encoding="utf-8") as file:
                self.traces |= {file.read().split()[1], MARKETPLACE_USER}
            scp = [*azure.enter(), "scp", *ssh_options(key), *files[0].split()]
            home = f"{MARKETPLACE_USER}@{image.addresses()[0]}:"
            subprocess.run([*scp, home], cwd=sandbox.REPOSITORY, check=True)
            done = self.ssh(image, azure, MARKETPLACE_USER, "builder", readme_block("--remove-user azureuser"))
            for said in (f"took out of {NETPLAN} the line", f"removed the account {MARKETPLACE_USER}", "generalized /"):
                test.assertIn(said, done.stdout)
            wait_for("the end of the machine", lambda: not image.is_on(), 30 * image.patience)
            image.cut_power()
        return image

    def test_from_a_marketplace_vm_to_logins(self) -> None:
        test: Any = self
        with self.make_image("netplan, by cloud-init") as image:
            for name, user, key in (("web-01", USER, "key"), ("web-02", MARKETPLACE_USER, "other")):
                self.traces -= {user}
                with self.new_vm(image, name, user, key, "builder") as (vm, azure):
                    test.assertEqual([azure.resolve(name)], vm.addresses())
                    refused = self.ssh(vm, azure, MARKETPLACE_USER, "builder", "true")
                    test.assertIn("Permission denied (publickey)", refused.stdout)
                    test.assertEqual(vm.run("ls", "/home").split(), [user])
                    test.assertNotIn("macaddress", vm.read(NETPLAN))


globals().update(cases(BookwormCase, "MachineTest", VARIABLE, "bookworm"))
globals().update(cases(TrixieCase, "MachineTest", VARIABLE, "trixie"))
globals().update(cases(ForkyCase, "MachineTest", VARIABLE, "forky"))
globals().update(cases(MarketplaceCase, "MarketplaceTest", VARIABLE, MARKETPLACE_RELEASE))
globals().update(cases(MarketplaceCase, "MarketplaceTest", MARKETPLACE_VARIABLE, "bookworm", "forky"))

if __name__ == "__main__":
    unittest.main()
