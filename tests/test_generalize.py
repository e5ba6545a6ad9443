"""install.sh --generalize on made-up roots: what an image forgets, what it keeps, and what is no image yet."""

import os
import pty
import re
import shutil
import stat
import subprocess
from typing import List, Tuple

from tests import sandbox
from tests.test_install import PROGRAM, UNIT, WANTS, InstallCase

SSH_UNIT = "etc/systemd/system/azure-provisioning-ssh-keys.service"
SSH_WANTS = "etc/systemd/system/multi-user.target.wants/azure-provisioning-ssh-keys.service"
NETWORK = "etc/systemd/network/10-eth0.network"

# What a machine that was used has of its own. None of it may be in an image.
OWN = (
    "etc/ssh/ssh_host_rsa_key",
    "etc/ssh/ssh_host_ed25519_key.pub",
    "etc/ssh/ssh_host_ed25519_key-cert.pub",
    "var/lib/dhcp/dhclient.eth0.leases",
    "var/lib/dhclient/dhclient.leases",
    "var/lib/dhcpcd/eth0.lease",
    "var/lib/dhcpcd/duid",
    "var/lib/dhcpcd5/dhcpcd-eth0.lease",
    "etc/dhcpcd.duid",
    "etc/dhcpcd.secret",
    "var/lib/wicked/lease-eth0-dhcp-ipv4.xml",
    "var/lib/systemd/network/persistent-storage",
    "var/lib/NetworkManager/internal-0-eth0.lease",
    "var/lib/NetworkManager/secret_key",
    "var/lib/NetworkManager/seen-bssids",
    "var/lib/NetworkManager/timestamps",
    "etc/resolv.conf",
    "etc/lvm/devices/system.devices",
    "etc/shadow-",
    "etc/gshadow-",
    "etc/passwd-",
    "etc/group-",
    "etc/subuid-",
    "etc/subgid-",
    "var/lib/systemd/random-seed",
    "var/lib/urandom/random-seed",
    "efi/loader/random-seed",
    "boot/loader/random-seed",
    "boot/efi/loader/random-seed",
    "var/lib/systemd/credential.secret",
    "var/lib/waagent/ovf-env.xml",
    "var/lib/waagent/Microsoft.Extension-1.0/config/0.settings",
    "var/lib/cloud/instances/1/user-data.txt",
    "var/lib/cloud/.hidden",
    "var/lib/azure-init/1.provisioned",
    "root/.bash_history",
    "home/alice/.bash_history",
    "home/alice/.python_history",
    "home/alice/.history",
    "home/alice/.histfile",
    "home/alice/.local/share/fish/fish_history",
    "srv/bob/.bash_history",
    "var/log/journal/0123456789abcdef0123456789abcdef/system.journal",
    "var/log/syslog",
    "var/log/wtmp",
    "var/log/btmp",
    "var/log/lastlog",
    "var/log/apt/history.log",
    "var/log/syslog.1",
    "var/log/syslog.2.gz",
    "var/log/messages-20260101",
    "var/log/apt/history.log.1.xz",
    "var/log/Xorg.0.log.old",
    "var/lib/lastlog/lastlog2.db",
    "var/lib/wtmpdb/wtmp.db",
    "var/lib/dbus/machine-id",
)
# What may look like it, and belongs to the image.
KEPT = (
    "etc/ssh/sshd_config",
    "etc/udev/rules.d/66-azure-storage.rules",
    "etc/waagent.conf",
    "etc/cloud/cloud.cfg",
    "etc/dhcp/dhclient.conf",
    "etc/dhcpcd.conf",
    "etc/NetworkManager/system-connections/eth0.nmconnection",
    "var/lib/NetworkManager/NetworkManager.state",
    "home/alice/.bashrc",
    "home/alice/notes",
    "root/.profile",
)


class GeneralizeCase(InstallCase):
    """A root of a machine that was used, with the program installed."""

    def setUp(self) -> None:
        super().setUp()
        for name in (*OWN, *KEPT):
            self.write(name, "the builder's\n")
        self.write("etc/machine-id", "0123456789abcdef0123456789abcdef\n")
        self.write("etc/hostname", "builder\n")
        self.write("etc/passwd", "root:x:0:0::/root:\nalice:x:1000:1000::/home/alice:/bin/sh\nbob:x:1:1::/srv/bob:\n")
        self.write("etc/shadow", "root:*:1::::::\nalice:!:1::::::\nbob:!$6$salt$hash:1::::::\n")
        self.unit("systemd-networkd.service")
        self.unit("systemd-resolved.service")
        self.write(NETWORK, "[Match]\nDriver=hv_netvsc\n[Network]\nDHCP=yes\n")
        self.program("usr/sbin/sshd")
        self.program("usr/bin/ssh-keygen")
        self.write("usr/lib/systemd/system/ssh.service", "[Service]\nExecStart=/usr/sbin/sshd -D\n")
        done = self.install()
        self.assertEqual(done.returncode, 0, done)

    def use(self) -> None:
        """Have it be a machine that was booted and used again."""
        os.unlink(self.path("etc/machine-id"))
        self.write("etc/machine-id", "0123456789abcdef0123456789abcdef\n")
        self.write("etc/hostname", "web-01\n")

    def check_generalized(self, *arguments: str, warnings: str = "", first: str = ":") -> str:
        done = self.install("--generalize", *arguments, first=first)
        self.assertEqual(done.returncode, 0, done)
        self.assertRegex(done.stderr, rf"\A{warnings}\Z")
        self.assertRegex(done.stdout, r"(\A|\n)generalized .*: capture it before it boots again\n\Z")
        tree = self.tree()
        self.assertEqual(tree["etc/machine-id"][:2], (0o100444, ""))
        self.assertEqual(tree[WANTS][1], "/" + UNIT)
        return done.stdout

    def check_is_no_image(self, reason: str) -> None:
        """Check that it is refused for reason and this alone, and done all the same with --force."""
        self.check_refused(reason + ".*, or use --force", "--generalize")
        self.check_generalized("--force", warnings=rf"install\.sh: .*{reason}.*; going on all the same\n")


class ForgetTest(GeneralizeCase):
    """The image forgets whose it was, and nothing else."""

    def test_nothing_of_the_builder_is_left(self) -> None:
        for shell in (("sh",), ("dash",), ("busybox", "sh"), ("bash", "--posix")):
            if not shutil.which(shell[0]):
                continue
            with self.subTest(shell):
                self.setUp()
                before = self.tree()
                done = self.install("--generalize", shell=shell)
                self.assertEqual((done.returncode, done.stderr), (0, ""), done)
                after = self.tree()
                self.assertEqual(set(OWN) & set(after), set())
                self.assertEqual({name: after[name] for name in KEPT}, {name: before[name] for name in KEPT})
                self.assertEqual(after["etc/machine-id"][:2], (0o100444, ""))
                self.assertEqual(after["etc/hostname"][:2], (0o100644, "localhost\n"))
                self.assertEqual(set(after) - set(before), {SSH_UNIT, SSH_WANTS})
                left = {name for name, entry in after.items() if entry[1] == "the builder's\n"}
                self.assertEqual(left, set(KEPT))

    def test_a_home_is_found_wherever_passwd_has_it_and_in_a_last_line_without_an_end(self) -> None:
        self.write("etc/passwd", "a:x:1:1::/home/people/a:\nb:x:1:1::/home/.b:\nc:x:1:1::/srv/c")
        # The last is of somebody whom a directory service knows.
        histories = {name + "/.bash_history" for name in ("home/people/a", "home/.b", "srv/c", "home/d")}
        for name in histories:
            self.write(name, "the builder's")
        self.check_generalized()
        self.assertEqual(histories & set(self.tree()), set())

    def test_directories_that_are_emptied_stay(self) -> None:
        self.check_generalized()
        for name in ("dhcp", "dhclient", "dhcpcd", "waagent", "cloud", "NetworkManager"):
            self.assertEqual(os.path.isdir(self.path("var/lib/" + name)), True, name)
        self.assertEqual(os.listdir(self.path("var/log/journal")), [])
        self.assertEqual(os.listdir(self.path("var/log/apt")), [])

    def test_each_thing_that_it_forgot_is_one_line(self) -> None:
        said = self.check_generalized()
        for name in ("/etc/ssh/ssh_host_*", "/etc/machine-id", "/etc/hostname", "/var/lib/waagent", "~/.*_history"):
            self.assertRegex(said, rf"(?m)^forgot {re.escape(name)}: .")
        self.assertEqual(len(said.splitlines()), len(set(said.splitlines())))

    def test_a_second_time_changes_nothing_and_says_so(self) -> None:
        self.check_generalized()
        before = self.tree()
        self.assertNotIn("forgot", self.check_generalized())
        self.assertEqual(self.entries(), self.entries(before))

    def test_an_image_of_an_image_is_armed_again(self) -> None:
        self.check_generalized()
        os.unlink(self.path(WANTS))
        self.use()
        self.assertIn("forgot /etc/hostname", self.check_generalized())

    def test_a_host_name_beside_localhost_is_forgotten(self) -> None:
        self.write("etc/hostname", "builder\nlocalhost\n")
        self.check_generalized()
        self.assertEqual(self.tree()["etc/hostname"][1], "localhost\n")

    def test_a_host_name_that_is_missing_is_the_one_that_is_not_sent(self) -> None:
        for first in ("rm '{}'", ">'{}'"):
            self.check_generalized(first=first.format(self.path("etc/hostname")))
            self.assertEqual(self.tree()["etc/hostname"][1], "localhost\n")

    def test_an_empty_machine_id_can_be_read_by_all(self) -> None:
        self.write("etc/machine-id")
        os.chmod(self.path("etc/machine-id"), 0o600)
        self.check_generalized()
        self.assertEqual(self.tree()["etc/machine-id"][0], 0o100444)

    def test_a_machine_id_that_means_first_boot_is_emptied(self) -> None:
        for text in ("uninitialized\n", None):
            with self.subTest(text):
                self.setUp()
                if text is None:
                    os.unlink(self.path("etc/machine-id"))
                else:
                    self.write("etc/machine-id", text)
                self.check_generalized()

    def test_a_link_to_what_each_boot_makes_is_kept(self) -> None:
        for name, target in {
            "etc/resolv.conf": "../run/systemd/resolve/stub-resolv.conf",
            "var/lib/dbus/machine-id": "/etc/machine-id",
        }.items():
            os.unlink(self.path(name))
            self.link(target, name)
        self.check_generalized()
        self.assertLessEqual({"etc/resolv.conf", "var/lib/dbus/machine-id"}, set(self.tree()))

    def test_a_machine_id_that_is_a_link_becomes_a_file(self) -> None:
        os.unlink(self.path("etc/machine-id"))
        self.link("/var/lib/dbus/machine-id", "etc/machine-id")
        self.check_generalized()

    def test_an_interruption_leaves_no_image_that_looks_done(self) -> None:
        # Whatever command fails, or is the last: the machine ID is still there, and a second run does the rest.
        for command in ("chmod", "rm", "mv", "find", "mktemp", "ln", "grep", "cksum"):
            with self.subTest(command):
                self.setUp()
                failing = f'mkdir /run/bin; printf "#!/bin/sh\\nkill -9 \\$PPID\\n" >/run/bin/{command}; '
                failing += f"chmod 755 /run/bin/{command}; PATH=/run/bin:$PATH"
                done = self.install("--generalize", first=failing)
                self.assertNotEqual(done.returncode, 0, done)
                self.assertNotIn("generalized", done.stdout)
                self.assertNotEqual(self.tree()["etc/machine-id"][1], "")
                self.check_generalized()
                self.assertEqual(set(OWN) & set(self.tree()), set())

    def test_a_step_that_fails_ends_it_before_it_looks_done(self) -> None:
        done = self.install("--generalize", first=self.bind("etc/passwd-", read_only=False))
        self.assertNotEqual(done.returncode, 0, done)
        self.assertIn("half-way", done.stderr)
        self.assertNotIn("generalized", done.stdout)
        self.assertNotEqual(self.tree()["etc/machine-id"][1], "")

    def test_the_preset_stays(self) -> None:
        before = self.tree()["etc/systemd/system-preset/00-azure-provisioning.preset"]
        self.check_generalized()
        self.assertEqual(self.tree()["etc/systemd/system-preset/00-azure-provisioning.preset"], before)

    def running(self, code: str, stdin: int = subprocess.DEVNULL) -> "subprocess.CompletedProcess[str]":
        """Run code where the running system is one of file systems in memory, and of the machine's /usr."""
        mount = """
            for d in /etc /usr/local /run /var /home /root /boot /efi; do
                [ ! -d $d ] || mount -t tmpfs tmpfs $d || exit
            done
            mkdir /var/log /var/log/journal
            echo 0123 >/etc/machine-id
            echo secret >/root/.bash_history
        """
        for name in ("install.sh", "azure_provisioning.py", "azure-provisioning.service"):
            shutil.copy(os.path.join(sandbox.REPOSITORY, name), self.directory)
        return subprocess.run(
            [*sandbox.unshare_command(), "sh", "-c", mount + code, "./install.sh"],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            cwd=self.directory,  # the checkout may be below what is covered
            timeout=60,
            check=False,
        )

    def test_who_sits_at_a_terminal_is_asked(self) -> None:
        code = 'sh "$0" --generalize --force; status=$?; cat /etc/machine-id; exit $status'
        code = "echo alice::1:1::/home/alice: >>/etc/passwd; " + code
        for answer, status in (("y\n", 0), ("YES\n", 0), ("n\n", 1), ("\n", 1), ("\x04", 1), (None, 0)):
            with self.subTest(answer):
                ours, theirs = pty.openpty()
                if answer:
                    os.write(ours, answer.encode())
                done = self.running(code, theirs if answer else subprocess.DEVNULL)
                os.close(ours)
                os.close(theirs)
                self.assertEqual(done.returncode, status, done)
                self.assertEqual("Go on? [y/N]" in done.stderr, answer is not None)
                self.assertEqual("by a password: alice." in done.stderr, answer is not None)
                self.assertEqual(done.stdout.endswith("0123\n"), status == 1)

    def test_the_running_system_forgets_once_more_when_it_is_shut_down(self) -> None:
        done = self.running(
            """
            mkdir -p /run/systemd/system /run/bin
            for tool in systemctl journalctl; do
                printf '#!/bin/sh\\necho "$(basename $0) $*" >>/run/calls\\n' >/run/bin/$tool
                chmod 755 /run/bin/$tool
            done
            PATH=/run/bin:$PATH
            sh "$0" --generalize --force >/dev/null 2>&1 || exit
            [ ! -e /root/.bash_history ] || exit
            echo again >/root/.bash_history
            at_shutdown=$(sed -n 's/^ExecStop=//p' /run/systemd/system/azure-provisioning-forget.service)
            eval "$at_shutdown"
            cat /run/calls
            sh "$0" --uninstall >/dev/null
            echo kept >/root/.bash_history
            eval "$at_shutdown" 2>/dev/null
            cat /root/.bash_history
            """
        )
        self.assertEqual((done.returncode, done.stderr), (0, ""), done)
        self.assertEqual(
            done.stdout.splitlines(),
            [
                "forgot ~/.*_history: histories of shells and other programs",
                "systemctl daemon-reload",
                "systemctl start azure-provisioning-forget.service",
                "journalctl --relinquish-var",
                "journalctl --relinquish-var",
                "kept",
            ],
        )

    def test_the_running_systemd_is_told(self) -> None:
        done = self.running(
            """
            mkdir -p /run/systemd/system /run/bin
            printf '#!/bin/sh\\necho "systemctl $*"\\n' >/run/bin/systemctl
            chmod 755 /run/bin/systemctl
            PATH=/run/bin:$PATH
            mkdir -p /etc/systemd/system/multi-user.target.wants
            ln -s /azure-provisioning.service /etc/systemd/system/multi-user.target.wants
            sh "$0" --uninstall
            """
        )
        self.assertEqual((done.stdout, done.stderr), ("systemctl daemon-reload\nuninstalled from /\n", ""), done)

    def test_what_is_done_at_shutdown_cannot_be_asked_for(self) -> None:
        before = self.tree()
        self.assertEqual(self.install("--at-shutdown").returncode, 2)
        self.assertEqual(self.tree(), before)


class OutsideTest(GeneralizeCase):
    """Links in the image lead nowhere else."""

    def test_links_in_a_directory_that_is_emptied_are_removed_and_not_followed(self) -> None:
        for name in ("var/lib/cloud/link", "var/log/journal/link", "var/lib/waagent/a/b"):
            self.link(self.outside, name)
            self.link(self.outside + "/victim", name + "-to-a-file")
        self.check_generalized()
        self.assertEqual(os.listdir(self.path("var/lib/cloud")), [])

    def test_links_among_the_logs_are_not_followed(self) -> None:
        self.link(self.outside, "var/log/directory")
        self.link(self.outside + "/victim", "var/log/file.log")
        self.check_generalized()
        self.assertLessEqual({"var/log/directory", "var/log/file.log"}, set(self.tree()))

    def test_a_directory_that_is_reached_through_a_link_in_the_image_is_the_image_s(self) -> None:
        for name in ("var/lib/waagent", "var/log", "etc/ssh", "home", "var/lib/NetworkManager"):
            with self.subTest(name):
                self.setUp()
                os.rename(self.path(name), self.path("elsewhere"))
                self.link("../" * name.count("/") + "elsewhere", name)
                self.check_generalized()
                left = {file for file, entry in self.tree().items() if entry[1] == "the builder's\n"}
                self.assertEqual(len(left), len(KEPT), left)

    def test_a_directory_that_is_reached_through_a_link_out_of_the_image_is_told_and_left(self) -> None:
        names = "var/lib/waagent", "var/log", "etc/ssh", "home", "home/alice", "var/lib/NetworkManager", "var/lib"
        for name in names:
            for exists in (True, False):
                with self.subTest(name, exists=exists):
                    self.setUp()
                    beside = os.path.join(os.path.dirname(name), "precious")
                    self.write(beside, "theirs\n")
                    os.rename(self.path(name), self.path("elsewhere"))
                    self.link(self.outside + "/elsewhere" if exists else "/elsewhere", name)
                    if exists:
                        shutil.copytree(self.path("elsewhere"), self.outside + "/elsewhere")
                    self.check_is_no_image(f"/{name} in .* is a link that leads nowhere in it")
                    self.assertIn(beside, self.tree())

    def test_homes_that_are_links_out_of_the_image_are_each_told_once(self) -> None:
        for name in ("carol", "dave"):
            self.link("/elsewhere/" + name, "home/" + name)
        self.assertEqual(len(self.install("--generalize").stderr.splitlines()), 2)

    def test_logs_on_a_file_system_of_their_own_are_forgotten(self) -> None:
        os.mkdir(self.path("var/log/audit"))
        log = f"'{self.root}/var/log/audit/audit.log'"
        code = f"mount -t tmpfs tmpfs '{self.root}/var/log/audit'; echo secret >{log}"
        done = self.install("--generalize", first=code, shell=("sh", "-c", f'sh "$@" && [ ! -e {log} ]', "sh"))
        self.assertEqual(done.returncode, 0, done)

    def test_a_file_that_is_a_link_is_removed_and_not_its_target(self) -> None:
        for name in ("etc/ssh/ssh_host_rsa_key", "root/.bash_history", "var/lib/systemd/random-seed"):
            os.unlink(self.path(name))
            self.link(self.outside + "/victim", name)
        for name in ("etc/machine-id", "etc/hostname"):
            os.unlink(self.path(name))
            self.link(self.outside + "/victim", name)
        self.check_generalized()
        self.assertNotIn("etc/ssh/ssh_host_rsa_key", self.tree())

    def test_a_file_that_has_another_name_outside_is_not_cut(self) -> None:
        os.link(self.outside + "/victim", self.path("var/log/linked.log"))
        os.link(self.outside + "/victim", self.path("root/.bash_history2_history"))
        self.check_generalized()
        self.assertNotIn("var/log/linked.log", self.tree())

    def test_a_link_in_place_of_a_file_is_not_read(self) -> None:
        with open(self.outside + "/fstab", "w", encoding="utf-8") as file:
            file.write("/dev/disk/azure/resource-part1 /mnt auto defaults 0 2\n")
        self.link(self.outside + "/fstab", "etc/fstab")
        self.check_generalized()

    def test_what_is_no_file_is_not_read(self) -> None:
        fifos = ("etc/fstab", "etc/shadow", "etc/netplan/x.yaml", "home/alice/.ssh/authorized_keys", "var/log/x.log")
        for name in fifos:
            if os.path.exists(self.path(name)):
                os.unlink(self.path(name))
            os.mkfifo(self.path(name))
        self.check_generalized()
        self.assertEqual([name for name in fifos if not stat.S_ISFIFO(os.lstat(self.path(name)).st_mode)], [])

    def test_another_file_system_in_a_directory_that_is_emptied_is_refused(self) -> None:
        os.makedirs(self.path("var/lib/cloud/mounted"))
        self.check_refused(
            "/var/lib/cloud/mounted is mounted in /var/lib/cloud, which is to be emptied: unmount it",
            "--generalize",
            first=f"mount -t tmpfs tmpfs '{self.root}/var/lib/cloud/mounted'",
        )

    def test_another_file_system_in_a_log_directory_is_not_entered(self) -> None:
        os.mkdir(self.path("var/log/mounted"))
        check = "grep -q secret" + f" '{self.root}/var/log/mounted/file'"
        code = f"mount -t tmpfs tmpfs '{self.root}/var/log/mounted'; echo secret >'{self.root}/var/log/mounted/file'"
        done = self.install("--generalize", first=code, shell=("sh", "-c", f'sh "$@" && {check}', "sh"))
        self.assertEqual(done.returncode, 0, done)

    def test_what_is_bound_into_a_directory_that_is_emptied_is_refused(self) -> None:
        self.write("srv/data/precious", "theirs\n")
        for name in ("app", "app 1", "app\\1", "app\\ 1", "app "):
            os.mkdir(self.path("var/log/" + name))
            self.check_refused(
                f"/var/log/{re.escape(name)} is mounted in /var/log, which is to be emptied: unmount it",
                "--generalize",
                first=f"mount --bind '{self.root}/srv/data' '{self.root}/var/log/{name}'",
            )

    def test_a_directory_in_place_of_the_machine_id_is_refused(self) -> None:
        os.unlink(self.path("etc/machine-id"))
        os.mkdir(self.path("etc/machine-id"))
        before = self.tree()
        done = self.install("--generalize", "--force")
        self.assertEqual((done.returncode, done.stdout), (1, ""), done)
        self.assertRegex(done.stderr, "/etc/machine-id is there in .* and is no file")
        self.assertEqual(self.tree(), before)


class HostKeysTest(GeneralizeCase):
    """A unit makes the host keys that nothing else has made."""

    def test_it_makes_only_what_is_missing_and_is_skipped_where_nothing_is(self) -> None:
        self.check_generalized()
        text = str(self.tree()[SSH_UNIT][1])
        for kind in ("rsa", "ecdsa", "ed25519"):
            self.assertIn(f"\nConditionFileNotEmpty=|!/etc/ssh/ssh_host_{kind}_key\n", text)
        self.assertIn("\nExecStart=-/usr/bin/ssh-keygen -A\n", text)
        self.assertIn("\nBefore=ssh.service sshd.service ssh.socket sshd.socket azure-provisioning.service\n", text)
        self.assertIn("\nTimeoutStartSec=300\n", text)

    def test_somebody_elses_unit_of_that_name_is_kept(self) -> None:
        self.write(SSH_UNIT, "[Service]\nExecStart=/bin/true\n")
        self.check_is_no_image("somebody changed /" + SSH_UNIT)

    def test_uninstall_takes_it_away(self) -> None:
        self.check_generalized()
        done = self.install("--uninstall")
        self.assertEqual(done.returncode, 0, done)
        self.assertEqual({SSH_UNIT, SSH_WANTS, PROGRAM, UNIT} & set(self.tree()), set())
        self.assertRegex(done.stdout, "(?m)^left .* without SSH host keys, .*: run ssh-keygen -A there$")
        self.write("etc/ssh/ssh_host_ed25519_key", "made again\n")
        self.check_installed()
        self.assertNotIn("left", self.install("--uninstall").stdout)


class NoImageTest(GeneralizeCase):
    """What no VM would come up from is refused, with what to do."""

    def test_a_network_that_is_bound_to_a_mac_address(self) -> None:
        mac = "00:0d:3a:12:34:56"
        for name, text in (
            ("etc/netplan/50-cloud-init.yaml", f"ethernets:\n  eth0:\n    match:\n      macaddress: {mac}\n"),
            ("etc/netplan/a.yaml", f"ethernets: {{eth0: {{match: {{\"macaddress\": '{mac}'}}}}}}\n"),
            (NETWORK, f"[Match]\nMACAddress={mac}\n[Network]\nDHCP=yes\n"),
            ("etc/systemd/network/b.network", f"[Match]\n  PermanentMACAddress = {mac}\n"),
            ("etc/systemd/network/c.link", f"[Match]\nMACAddress={mac}\n[Link]\nName=lan\n"),
            ("etc/NetworkManager/system-connections/x.nmconnection", f"[ethernet]\nmac-address={mac}\n"),
            ("etc/NetworkManager/system-connections/x", f"[ethernet]\ncloned-mac-address={mac}\n"),
            ("etc/sysconfig/network-scripts/ifcfg-eth0", f'DEVICE=eth0\nHWADDR="{mac}"\n'),
            ("etc/sysconfig/network-scripts/ifcfg-eth1", f"MACADDR={mac}\n"),
            ("etc/sysconfig/network/ifcfg-eth0", f"LLADDR='{mac}'\n"),
            ("etc/network/interfaces", f"iface eth0 inet dhcp\n  hwaddress ether {mac}\n"),
            ("etc/network/interfaces.d/eth0", f"iface eth0 inet dhcp\n  hwaddress {mac}\n"),
            ("etc/udev/rules.d/70-persistent-net.rules", f'SUBSYSTEM=="net", ATTR{{address}}=="{mac}", NAME="eth0"\n'),
            ("etc/systemd/network/10-a.network.d/mac.conf", f"[Match]\nMACAddress={mac}\n"),
            ("etc/systemd/network/10-a.link.d/mac.conf", f"[Match]\nPermanentMACAddress={mac}\n"),
            ("etc/NetworkManager/system-connections/y", f"[ethernet]\nmac-address = {mac}\n"),
            ("etc/NetworkManager/system-connections/z", "[802-3-ethernet]\nmac-address=0;13;58;18;52;86;\n"),
            ("etc/network/interfaces", f"iface eth0 inet dhcp\n  hwaddress ether {mac.replace(':', '-')}\n"),
            ("etc/network/interfaces.d/eth1", f"iface eth0 inet dhcp\n  hwaddress {mac.replace(':', '-')}\n"),
            ("etc/udev/rules.d/71.rules", f'SUBSYSTEM=="net", NAME:="eth0", ATTR{{address}}=="{mac}"\n'),
            ("etc/udev/rules.d/72.rules", f'SUBSYSTEM=="net", ATTRS{{address}}=="{mac}", NAME:="eth0"\n'),
        ):
            with self.subTest(name):
                self.write(name, text)
                self.check_refused(f"/{name} in .* is bound to a MAC address.*--force", "--generalize")
                os.unlink(self.path(name))
                self.write(NETWORK, "[Match]\nDriver=hv_netvsc\n[Network]\nDHCP=yes\n")
        self.write(NETWORK, f"[Match]\nMACAddress={mac}\n[Network]\nDHCP=yes\n")
        self.check_is_no_image("is bound to a MAC address")

    def test_a_link_out_of_the_image_binds_no_network(self) -> None:
        with open(self.outside + "/bound.network", "w", encoding="utf-8") as file:
            file.write("[Match]\nMACAddress=00:0d:3a:00:00:01\n")
        self.link(self.outside + "/bound.network", "etc/systemd/network/bound.network")
        self.check_generalized()

    def test_a_name_with_backslashes_is_one(self) -> None:
        for name in ("50\\cx.network", "50\\nx.network"):
            self.write("etc/systemd/network/" + name, "[Match]\nMACAddress=00:0d:3a:00:00:01\n[Network]\nDHCP=yes\n")
            self.check_refused("is bound to a MAC address", "--generalize")
            os.unlink(self.path("etc/systemd/network/" + name))

    def test_a_file_in_no_encoding_is_read_all_the_same(self) -> None:
        with open(self.path("etc/netplan/x.yaml"), "wb") as file:
            file.write(b"{caf\xe9: {macaddress: '00:0d:3a:12:34:56'}}\n")
        done = self.install("--generalize", LC_ALL="C.UTF-8")
        self.assertIn("is bound to a MAC address", done.stderr)

    def test_a_client_that_has_another_name_sent(self) -> None:
        for name, text in (
            ("etc/netplan/a.yaml", "ethernets: {eth0: {dhcp4-overrides: {hostname: builder}}}\n"),
            ("etc/netplan/b.yaml", "      dhcp4-overrides:\n        send-hostname: false\n"),
            (NETWORK, "[Network]\nDHCP=yes\n[DHCPv4]\nHostname=builder\n"),
            (NETWORK, "[Network]\nDHCP=yes\n[DHCPv4]\n SendHostname = no\n"),
            ("etc/NetworkManager/system-connections/x", "[ipv4]\ndhcp-hostname=builder\n"),
            ("etc/NetworkManager/system-connections/y", "[ipv4]\ndhcp-send-hostname=false\n"),
            ("etc/NetworkManager/conf.d/z.conf", "[connection]\nipv4.dhcp-send-hostname=0\n"),
            ("etc/NetworkManager/NetworkManager.conf", "[connection]\nipv4.dhcp-send-hostname=0\n"),
            ("etc/sysconfig/network-scripts/ifcfg-eth0", "DHCP_HOSTNAME=builder\n"),
            ("etc/dhcp/dhclient.conf", 'send host-name "builder";\n'),
            ("etc/dhcp/dhclient.conf", 'send host-name = "builder";\n'),
            ("etc/dhcp/dhclient-eth0.conf", ' supersede host-name "builder";\n'),
            ("etc/dhcpcd.conf", "hostname builder\n"),
        ):
            with self.subTest(name, text=text):
                self.write(name, text)
                self.check_refused(
                    f"/{name} in .* has its own name sent, so that Azure's DNS .*--force", "--generalize"
                )
                os.unlink(self.path(name))
                self.write(NETWORK, "[Network]\nDHCP=yes\n")
        for name, text in (
            (
                "etc/netplan/a.yaml",
                "      # hostname: x\n      dhcp4-overrides: {use-hostname: true, send-hostname: true}\n",
            ),
            (NETWORK, "[Network]\nDHCP=yes\n[DHCPv4]\nSendHostname=yes\nUseHostname=no\n"),
            ("etc/NetworkManager/system-connections/x", "[ipv4]\ndhcp-send-hostname=true\ndhcp-hostname=\n"),
            ("etc/sysconfig/network-scripts/ifcfg-eth0", 'DHCP_HOSTNAME=""\n'),
            ("etc/dhcp/dhclient.conf", "send host-name = gethostname();\n"),
        ):
            self.write(name, text)
        self.check_generalized()

    def test_a_dhcpcd_that_sends_no_name(self) -> None:
        self.program("usr/sbin/dhcpcd")
        message = "/etc/dhcpcd.conf in .* has no name sent, .*: add a line 'hostname'.*--force"
        for units, text, refused in (
            (["dhcpcd.service"], "#hostname\nclientid\n", True),
            (["networking.service"], "option host_name\n", True),
            (["networking.service"], "hostname\n", False),
            (["networking.service"], "  hostname # the VM's\n", False),
            ([], "#hostname\n", False),
        ):
            with self.subTest(units, text=text):
                self.setUp()
                self.program("usr/sbin/dhcpcd")
                for unit in units:
                    self.unit(unit)
                self.write("etc/dhcpcd.conf", text)
                if refused:
                    self.check_refused(message, "--generalize")
                    if units == ["networking.service"]:
                        self.program("usr/sbin/dhclient")
                        self.check_generalized()
                else:
                    self.check_generalized()

    def test_an_interface_that_no_vm_has(self) -> None:
        for name, text in (
            (NETWORK, "[Match]\nName=ens3\n[Network]\nDHCP=yes\n"),
            ("etc/systemd/network/a.network", "[Match]\n Name = enp0s3\n[Network]\nDHCP=yes\n"),
            ("etc/network/interfaces", "auto ens3\niface ens3 inet dhcp\n"),
            ("etc/network/interfaces", "auto lo ens3\niface ens3 inet dhcp\n"),
            ("etc/netplan/a.yaml", "network:\n  ethernets:\n    enp1s0:\n      dhcp4: true\n"),
            ("etc/netplan/a.yaml", "network: {ethernets: {a: {match: {name: ens3}, dhcp4: true}}}\n"),
            ("etc/NetworkManager/system-connections/a", "[connection]\ninterface-name=enp1s0\n"),
            ("etc/network/interfaces.d/x", "allow-hotplug eno1\niface eno1 inet dhcp\n"),
            ("etc/sysconfig/network-scripts/ifcfg-ens3", 'BOOTPROTO=dhcp\nDEVICE="ens3"\n'),
        ):
            with self.subTest(name):
                self.write(name, text)
                self.check_refused(f"/{name} in .* is for an interface that no VM on Azure has: ", "--generalize")
                os.unlink(self.path(name))
                self.write(NETWORK, "[Match]\nName=en* eth*\n[Network]\nDHCP=yes\n")
        self.check_generalized()

    def test_a_network_that_is_not_bound(self) -> None:
        for name, text in (
            ("etc/netplan/50.yaml", "ethernets:\n  eth0:\n    match: {driver: hv_netvsc}\n    # macaddress: 00:0d\n"),
            ("etc/systemd/network/b.network", "[Match]\nName=eth0\n#MACAddress=00:0d:3a:12:34:56\n"),
            ("etc/systemd/network/c.link", "[Match]\nDriver=hv_netvsc\n[Link]\nMACAddressPolicy=persistent\n"),
            ("etc/systemd/network/d.netdev.d/x.conf", "[NetDev]\nMACAddress=00:0d:3a:12:34:56\n"),
            ("etc/systemd/network/d.netdev", "[NetDev]\nName=br0\nMACAddress=00:0d:3a:12:34:56\n"),
            ("etc/NetworkManager/system-connections/x", "[ethernet]\ncloned-mac-address=preserve\n"),
            ("etc/network/interfaces", "iface eth0 inet dhcp\n  hwaddress random\n"),
            ("etc/udev/rules.d/80-x.rules", 'SUBSYSTEM=="net", DRIVERS=="hv_netvsc", NAME="eth0"\n'),
        ):
            self.write(name, text)
        self.check_generalized()

    def no_network(self) -> None:
        self.setUp()
        os.unlink(self.path("etc/systemd/system/multi-user.target.wants/systemd-networkd.service"))

    def test_nothing_that_would_configure_the_network(self) -> None:
        self.no_network()
        self.check_is_no_image("nothing that is enabled in .* would configure the network: enable")
        for unit, name, text in (
            ("NetworkManager.service", "", ""),
            ("networking.service", "etc/network/interfaces", "auto lo eth0\niface eth0 inet dhcp\n"),
            ("networking.service", "etc/network/interfaces", "source-directory /run/network/interfaces.d\n"),
            ("networking.service", "etc/network/interfaces.d/x", "auto eth0\niface eth0 inet dhcp\n"),
            ("dhcpcd.service", "", ""),
            ("wicked.service", "", ""),
            ("connman.service", "", ""),
            ("network.service", "", ""),
            ("dhcpcd@.service", "", ""),
            ("systemd-networkd.service", "usr/local/lib/systemd/network/x.network", "[Network]\nDHCP=yes\n"),
            ("systemd-networkd.service", "usr/lib/systemd/network/zz.network", "[Network]\nDHCP=ipv4\n"),
        ):
            with self.subTest(unit, name=name):
                self.no_network()
                os.unlink(self.path(NETWORK))
                self.unit(unit)
                if "@" in unit:
                    wants = self.path("etc/systemd/system/multi-user.target.wants/")
                    os.rename(wants + unit, wants + unit.replace("@", "@eth0"))
                if name:
                    self.check_refused("nothing that is enabled in", "--generalize")
                    self.write(name, text)
                self.check_generalized()

    def netplan(self, code: str) -> str:
        """Make the machine's netplan, and return what has it found. It gets code's variable $into."""
        self.no_network()
        self.program("usr/sbin/netplan")  # the image's own is not run
        os.mkdir(self.directory + "/bin")
        with open(self.directory + "/bin/netplan", "w", encoding="utf-8") as file:
            file.write(f'#!/bin/sh\n[ "$1 $2" = "generate --root-dir" ] || exit 2\ninto=$3/run\n{code}\n')
        os.chmod(self.directory + "/bin/netplan", 0o755)
        return f"PATH='{self.directory}/bin':$PATH"

    def test_what_netplan_makes_of_its_configuration(self) -> None:
        networkd, manager = "systemd/network/x.network", "NetworkManager/system-connections/x"
        nothing = "of what /etc/netplan says in .* netplan makes no network with DHCP: .*--force"
        for name, text, reason in (
            (networkd, "[Match]\nName=eth0\n[Network]\nDHCP=ipv4\n", ""),
            (networkd, "[Match]\nDriver=hv_netvsc\n[Network]\nDHCP=yes\n", ""),
            (manager, "[connection]\ntype=ethernet\n[ipv4]\nmethod=auto\n", ""),
            (networkd, "[Match]\n[Network]\nDHCP=ipv4\n", nothing),
            (networkd, "[Match]\nName=eth0\n[Network]\nAddress=10.0.0.4/24\n", nothing),
            (networkd.replace(".network", ".link"), "[Match]\nDriver=hv_netvsc\n", nothing),
            (manager, "[connection]\ntype=ethernet\n[ipv4]\nmethod=manual\n", nothing),
        ):
            with self.subTest(text):
                self.setUp()
                made = os.path.join("$into", name)
                first = self.netplan(f"mkdir -p {os.path.dirname(made)}; printf '{text}' >{made}".replace("\n", "\\n"))
                self.write("etc/netplan/01.yaml", "network: {ethernets: {eth0: {dhcp4: true}}}\n")
                if reason:
                    self.check_refused(reason, "--generalize", first=first)
                    self.unit("NetworkManager.service")  # which finds a network without netplan, as on a desktop
                self.check_generalized(first=first)

    def test_what_netplan_refuses(self) -> None:
        first = self.netplan("echo 'Invalid YAML:'; echo '  indentation' >&2; exit 1")
        self.write("etc/netplan/01.yaml", "network: {ethernets: {eth0: {dhcp4: true}}}\n")
        self.check_refused(
            "netplan refuses what /etc/netplan says in .*: Invalid YAML:   indentation, or use --force",
            "--generalize",
            first=first,
        )

    def test_a_machine_without_netplan_says_that_it_was_not_asked(self) -> None:
        self.no_network()
        self.program("usr/sbin/netplan")
        self.write("etc/netplan/01.yaml", "network: {ethernets: {eth0: {dhcp4: true}}}\n")
        hidden = "for f in /usr/sbin/netplan /usr/bin/netplan; do [ ! -e $f ] || mount --bind /dev/null $f; done"
        warning = "install.sh: whether /etc/netplan is right is not known, .*: run netplan generate there\n"
        self.check_generalized(warnings=warning, first=hidden)

    def test_a_netplan_without_dhcp_does_not_count(self) -> None:
        self.no_network()
        self.program("usr/sbin/netplan")
        for text in ("network: {}\n", "network: {ethernets: {eth0: {addresses: [10.0.0.4/24], dhcp4: false}}}\n"):
            self.write("etc/netplan/01.yaml", text)
            done = self.install("--generalize")
            self.assertIn("install.sh: nothing that is enabled in", done.stderr)

    def test_the_mac_address_beside_the_driver_is_taken_out_of_a_netplan(self) -> None:
        mac, driver = 'macaddress: "00:0d:3a:12:34:56"\n', "driver: hv_netvsc\n"
        for text, left in (
            ("a:\n  match:\n    {driver}    {mac}  dhcp4: true\n", "a:\n  match:\n    {driver}  dhcp4: true\n"),
            ("a:\n  match:\n    {mac}    {driver}  dhcp4: true\n", "a:\n  match:\n    {driver}  dhcp4: true\n"),
            ("# none\n\n{driver}{mac}", "# none\n\n{driver}"),
            # Two interfaces, the address that one is to have, and what only looks like it.
            ("a:\n  {driver}  {mac}b:\n  {driver}  {mac}", ""),
            ("match:\n  {driver}{mac}", ""),
            ("match:\n  {driver}  x: y\n  {mac}", ""),
            ("match:\n  {driver}  {mac}other:\n  {mac}", ""),
        ):
            with self.subTest(text):
                self.setUp()
                self.write("etc/netplan/50-cloud-init.yaml", text.format(mac=mac, driver=driver))
                if left:
                    said = "took out of /etc/netplan/50-cloud-init.yaml the line of the MAC address, beside"
                    self.assertIn(said, self.check_generalized())
                    entry = self.tree()["etc/netplan/50-cloud-init.yaml"]
                    self.assertEqual(entry[:2], (0o100600, left.format(driver=driver)))
                    self.assertNotIn("took out", self.check_generalized())
                else:
                    self.check_refused(
                        "/etc/netplan/50-cloud-init.yaml in .* is bound to a MAC address", "--generalize"
                    )

    def test_what_cannot_be_written(self) -> None:
        program = f"/{PROGRAM} cannot be written in .*: {re.escape(self.root)}/usr/local/sbin is read-only"
        cases: List[Tuple[str, str, List[str]]] = [("usr/local", program, [])]
        for name in ("etc/hostname", "etc/resolv.conf", "etc/machine-id"):
            cases.append((name, f"/{name} cannot be written in .*: run chattr -i for it", ["--generalize"]))
        mounted = "/etc/resolv.conf is mounted in .*, from elsewhere: unmount it"
        self.check_refused(mounted, "--generalize", first=self.bind("etc/resolv.conf", read_only=False))
        self.check_refused("/proc is not mounted here, ", "--generalize", first="mount -t tmpfs tmpfs /proc")
        for shell in (("sh",), ("busybox", "sh")):  # to busybox's [, root can write whatever it is
            for name, reason, arguments in cases:
                self.check_refused(reason, *arguments, first=self.bind(name), shell=shell)

    def test_a_check_tells_all_and_changes_nothing(self) -> None:
        self.write("home/alice/.ssh/authorized_keys", "ssh-ed25519 AAAA alice\n")
        before = self.tree()
        done = self.install("--generalize", "--check")
        self.assertEqual((done.returncode, done.stderr), (0, ""), done)
        self.assertEqual(self.tree(), before)
        told = [line for line in done.stdout.splitlines() if not line.startswith("would forget ")]
        self.assertEqual(told, ["left what opens every VM, authorized keys of: alice"])
        forgot = self.check_generalized().splitlines()
        self.assertEqual(
            [line.replace("would forget", "forgot") for line in done.stdout.splitlines()],
            [line for line in forgot if line.startswith(("forgot", "left"))],
        )
        self.use()
        self.unit("waagent.service")
        done = self.install("--generalize", "--check")
        self.assertEqual(done.returncode, 1, done)
        self.assertIn("would forget /etc/hostname: ", done.stdout)
        self.assertRegex(done.stderr, "waagent is enabled in .*; nothing was changed\n")

    def test_what_configures_other_interfaces_does_not_count(self) -> None:
        for unit, name, text in (
            ("networking.service", "etc/network/interfaces", "auto lo\niface lo inet loopback\n"),
            ("networking.service", "etc/network/interfaces", "# iface eth0 inet dhcp\n"),
            ("systemd-networkd.service", "usr/lib/systemd/network/80-container-host0.network", "[Network]\nDHCP=yes\n"),
            ("systemd-networkd.service", "etc/systemd/network/x.network", "[Match]\nName=eth0\n"),
            # No VM has the address that another was given.
            ("networking.service", "etc/network/interfaces.d/x", "auto eth0\niface eth0 inet static\n"),
            ("systemd-networkd.service", "etc/systemd/network/x.network", "[Network]\nAddress=10.0.0.4/24\n"),
            ("systemd-networkd.service", "etc/systemd/network/x.network", "[Network]\nDHCP=no\n"),
        ):
            with self.subTest(name):
                self.no_network()
                os.unlink(self.path(NETWORK))
                self.unit(unit)
                self.write(name, text)
                self.check_refused("nothing that is enabled in", "--generalize")

    def test_a_manager_that_is_masked_or_removed_does_not_count(self) -> None:
        self.link("/dev/null", "etc/systemd/system/systemd-networkd.service")
        self.check_is_no_image("nothing that is enabled in")
        self.setUp()
        os.unlink(self.path("usr/lib/systemd/system/systemd-networkd.service"))
        self.check_is_no_image("nothing that is enabled in")
        self.no_network()
        self.write("usr/lib/systemd/system/dhcpcd@.service", "[Service]\nExecStart=/bin/true\n")
        self.link("/usr/lib/systemd/system/dhcpcd@.service", os.path.dirname(WANTS) + "/dhcpcd@eth0.service")
        self.link("/dev/null", "etc/systemd/system/dhcpcd@eth0.service")
        self.check_is_no_image("nothing that is enabled in")

    def test_another_agent(self) -> None:
        self.unit("waagent.service")
        self.check_is_no_image("waagent is enabled in")

    def test_no_python(self) -> None:
        os.unlink(self.path("usr/bin/python3"))
        self.check_is_no_image("no Python 3.6 or later")

    def test_no_systemd(self) -> None:
        os.unlink(self.path("usr/lib/systemd/systemd"))
        self.check_is_no_image("no systemd in")

    def test_a_unit_that_is_masked(self) -> None:
        os.unlink(self.path(UNIT))
        self.link("/dev/null", UNIT)
        self.check_is_no_image("azure-provisioning is not installed in .*, or masked: run install.sh first")

    def test_not_installed(self) -> None:
        for name in (UNIT, PROGRAM):
            for left in (os.unlink, lambda path: os.truncate(path, 0)):
                with self.subTest(name):
                    self.setUp()
                    left(self.path(name))
                    self.check_is_no_image("azure-provisioning is not installed in")

    def test_a_disk_that_not_every_vm_has(self) -> None:
        cases = (
            ("/dev/disk/cloud/azure_resource-part1 /mnt auto defaults,comment=cloudconfig 0 2", True),
            ("/dev/disk/azure/scsi1/lun0-part1\t/data\text4\tdefaults\t0\t2", True),
            ("/dev/disk/azure/resource-part1 /mnt auto defaults", True),
            ("/dev/disk/azure/resource-part1 none swap sw,xnofail", True),
            ("/dev/disk/cloud/azure_resource-part1 /mnt auto defaults,nofail 0 2", False),
            ("/dev/disk/cloud/azure_resource-part1 /mnt auto noauto 0 2", False),
            ("/dev/disk/azure/root-part1 / ext4 defaults 0 1", False),
            ("# /dev/disk/cloud/azure_resource-part1 /mnt auto defaults 0 2", False),
            ("UUID=1-2-3 / ext4 defaults 0 1", False),
            ("UUID=1-2-3 /data xfs defaults 0 0", True),
            ("UUID=1-2-3 /data xfs defaults,swap 0 0", True),
            ("UUID=1-2-3 /data nofail", True),
            ("/dev/vda1 / ext4 defaults 0 1", True),
            ("/dev/vda2 /boot/efi vfat defaults 0 1", True),
            ("UUID=a / btrfs defaults 0 0\nUUID=a /srv btrfs subvol=@/srv 0 0", False),
            ("UUID=a /srv btrfs subvol=@/srv 0 0\n UUID=a\t/ btrfs defaults 0 0", False),
            ("UUID=a /srv btrfs subvol=@/srv 0 0\n#UUID=a / btrfs defaults 0 0", True),
            ("UUID=b / ext4 defaults 0 0\nUUID=a / btrfs defaults 0 0\nUUID=a /srv btrfs subvol=@/srv 0 0", False),
            ("UUID=a \t / btrfs defaults 0 0\n# / was on /dev/sda1\nUUID=a /srv btrfs subvol=@/srv 0 0", False),
            ("LABEL=a#1 / btrfs defaults 0 0\nLABEL=a#1 / btrfs defaults 0 0\nLABEL=a#1 /srv btrfs subvol=s", False),
            ("/dev/sdc1 /srv ext4 defaults 0 2", True),
            ("LABEL=data /mnt/data ext4 defaults,nofail 0 2", False),
            ("PARTUUID=1-2 /boot/efi vfat umask=0077 0 1", False),
            *(
                (f"LABEL=x {where} ext4 defaults 0 2", False)
                for where in ("/home", "/usr", "/opt", "/tmp", "/efi", "/var")
            ),
            ("LABEL=x /home2 ext4 defaults 0 2", True),
            ("PARTLABEL=x /data ext4 defaults 0 2", True),
            ("/dev/mapper/vg-log /var/log xfs defaults 0 0", False),
            ("UUID=4-5 none swap sw 0 0", False),
            ("tmpfs /scratch tmpfs size=1G 0 0", False),
            ("files.example.com:/data /data nfs4 _netdev 0 0", False),
        )
        for number, (line, refused) in enumerate(cases):
            with self.subTest(line):
                self.write("etc/fstab", "# fstab\n" + line + "\n" * (number % 2))  # the last line may have no end
                if refused:
                    self.check_refused("/etc/fstab in .* wants \\S+ for \\S+, .*: add nofail.*--force", "--generalize")
                else:
                    self.check_generalized()

    def test_all_reasons_are_told_at_once_and_nothing_is_changed(self) -> None:
        self.no_network()
        os.unlink(self.path("usr/bin/python3"))
        self.unit("cloud-init.service")
        self.write("etc/fstab", "/dev/disk/cloud/azure_resource-part1 /mnt auto defaults 0 2\n")
        self.write("etc/netplan/x.yaml", "macaddress: 1\n")
        before = self.tree()
        done = self.install("--generalize")
        self.assertEqual(len(done.stderr.splitlines()), 5, done)
        self.assertEqual(self.tree(), before)


class RemoveUserTest(GeneralizeCase):
    """The builder's account goes, and nobody else's."""

    def setUp(self) -> None:
        super().setUp()
        for name, text in {
            "passwd": "{}{}:x:1002:1002:the builder:/home/{}:/bin/sh\n",
            "shadow": "{}{}:$6$hash:1::::::\n",
            "group": "root:x:0:\nsudo:x:27:{1},alice\nadm:x:4:alice,{1}\n{1}:x:1002:\nalice:x:1000:\n",
            "gshadow": "sudo:*:{1}:{1},alice\n{1}:!::\nalice:!::\n",
            "subuid": "{1}:100000:65536\nalice:165536:65536\n",
            "subgid": "{1}:100000:65536\nalice:165536:65536\n",
        }.items():
            before = str(self.tree()["etc/" + name][1]) if os.path.exists(self.path("etc/" + name)) else ""
            self.write("etc/" + name, text.format(before, "azureuser", "azureuser"))
        os.chmod(self.path("etc/shadow"), 0o640)
        for name in (".bashrc", "work/of/his"):
            self.write("home/azureuser/" + name, "his\n")
        self.write("home/azureuser/.ssh/authorized_keys", "ssh-ed25519 AAAAC3x azureuser\n")
        for name in ("var/mail/azureuser", "var/spool/cron/crontabs/azureuser", "var/lib/systemd/linger/azureuser"):
            self.write(name, "his\n")
        rule = "azureuser ALL=(ALL) NOPASSWD:ALL\n"
        self.write(
            "etc/sudoers.d/90-cloud-init-users", f"# Created by cloud-init\n\n# User rules for azureuser\n{rule}"
        )
        self.write("etc/sudoers.d/waagent", rule)
        self.write("etc/sudoers.d/zz-azure-provisioning-azureuser", '"azureuser" ALL=(ALL:ALL) NOPASSWD:ALL\n')
        self.write("etc/sudoers.d/both", rule + "alice ALL=(ALL) ALL\n")
        self.write("etc/sudoers.d/azureuser2", "azureuser2 ALL=(ALL) ALL\n")

    def test_nothing_of_the_account_is_left(self) -> None:
        for shell in (("sh",), ("busybox", "sh")):
            with self.subTest(shell):
                self.setUp()
                before = self.tree()
                done = self.install("--generalize", "--remove-user", "azureuser", shell=shell)
                self.assertEqual((done.returncode, done.stderr), (0, ""), done)
                self.assertIn("\nremoved the account azureuser\n", "\n" + done.stdout)
                after = self.tree()
                kept = "etc/sudoers.d/azureuser2"
                self.assertEqual([name for name in after if "azureuser" in name and name != kept], [])
                self.assertEqual([name for name in after if "azureuser" in str(after[name][1]) and name != kept], [])
                self.assertEqual([name for name in after if after[name][1] == "his\n"], [])
                self.assertEqual(after["etc/sudoers.d/both"][:2], (0o100440, "alice ALL=(ALL) ALL\n"))
                self.assertEqual(after[kept], before[kept])
                self.assertEqual(after["etc/group"][1], "root:x:0:\nsudo:x:27:alice\nadm:x:4:alice\nalice:x:1000:\n")
                self.assertEqual(after["etc/shadow"][0], 0o100640)
                for name in ("etc/passwd", "etc/shadow"):
                    lines = str(before[name][1]).splitlines(keepends=True)
                    self.assertEqual(after[name][1], "".join(line for line in lines if "azureuser" not in line))

    def test_root_does_not_keep_its_keys(self) -> None:
        # As cloud-init writes it.
        key = 'command="echo \'Please login as the user \\"{}\\" rather than the user \\"root\\".\';echo;sleep 10;'
        key += 'exit 142" ssh-ed25519 AAAAC3x {}\n'
        others = "ssh-ed25519 AAAAC3z admin\n# ours\n\0\n" + key.replace("{}", "azureuser2")
        for text, left in (
            (key.replace("{}", "azureuser") + others, others),
            (key.replace("{}", "azureuser") * 2, ""),
            (others, others),
        ):
            with self.subTest(text):
                self.setUp()
                self.write("root/.ssh/authorized_keys", text)
                os.chmod(self.path("root/.ssh/authorized_keys"), 0o600)
                said = self.check_generalized("--remove-user", "azureuser")
                took = "took the keys of azureuser out of /root/.ssh/authorized_keys\n" in said
                opens = "authorized keys of: root" in said
                self.assertEqual((took, opens), (text != left, left != ""), said)
                self.assertEqual(self.tree()["root/.ssh/authorized_keys"][:2], (0o100600, left))

    def test_what_is_no_file_in_place_of_roots_keys_is_left_alone(self) -> None:
        told = 'command="echo \'Please login as the user \\"azureuser\\" rather than\'" ssh-ed25519 AAAAC3x\n'
        self.write("srv/keys", told)
        self.write("root/.ssh/x")
        self.link(self.path("srv/keys"), "root/.ssh/authorized_keys")
        self.assertNotIn("took the keys", self.check_generalized("--remove-user", "azureuser"))
        self.assertEqual(self.tree()["srv/keys"][1], told)
        self.setUp()
        self.write("root/.ssh/x")
        os.mkfifo(self.path("root/.ssh/authorized_keys"))
        self.assertNotIn("took the keys", self.check_generalized("--remove-user", "azureuser"))

    def test_a_check_names_the_accounts(self) -> None:
        done = self.install("--generalize", "--check", "--remove-user", "azureuser", "--remove-user", "alice")
        self.assertIn("would remove the accounts azureuser alice, and their keys from root's\n", done.stdout)

    def test_what_it_changes_and_cannot_write_is_refused_before_anything_is_changed(self) -> None:
        self.write("root/.ssh/authorized_keys", "ssh-ed25519 AAAAC3z admin\n")
        for name in ("root/.ssh/authorized_keys", "etc/shadow", "etc/passwd", "etc/subgid"):
            self.check_refused(
                f"/{name} cannot be written in .*: run chattr -i for it",
                *("--generalize", "--remove-user", "azureuser"),
                first=self.bind(name),
            )

    def test_a_check_tells_what_stays_and_not_what_goes_with_the_account(self) -> None:
        for name in ("azureuser/.ssh/id_rsa", "alice/.ssh/id_rsa", "alice 2/.ssh/authorized_keys"):
            self.write("home/" + name, "secret")
        passwd = str(self.tree()["etc/passwd"][1]).replace("/home/azureuser", "/home/azureuser/")
        self.write("etc/passwd", passwd + "alice2:x:1003:1003::/home/alice 2:/bin/sh\n")
        arguments = "--generalize", "--remove-user", "azureuser", "--remove-user", "alice2"
        for check in (["--check"], []):
            done = self.install(*arguments, *check)
            told = [line for line in done.stdout.splitlines() if "private keys" in line]
            self.assertEqual(told, ["left /home/alice/.ssh/id_rsa: private keys, which every VM will have"])

    def test_what_is_mounted_in_a_home_that_is_left_is_no_obstacle(self) -> None:
        self.write("etc/passwd", str(self.tree()["etc/passwd"][1]).replace("/home/azureuser", "/"))
        done = self.install(
            *("--generalize", "--remove-user", "azureuser"), first=f"mount -t tmpfs tmpfs '{self.root}/srv'"
        )
        self.assertIn("left the home /\n", done.stdout)

    def test_more_than_one_account(self) -> None:
        self.check_generalized("--remove-user", "azureuser", "--remove-user", "alice")
        self.assertEqual(
            [line.split(":")[0] for line in str(self.tree()["etc/passwd"][1]).splitlines()], ["root", "bob"]
        )

    def test_who_cannot_be_removed_is_refused(self) -> None:
        for name in ("nobody-here", "root", "azureuse", "azureuser2"):
            self.check_refused(f"no account {name} in .* that could be removed", "--generalize", "--remove-user", name)
        for name in ("", "-x", "a b", "a/b", "*"):
            self.assertEqual(self.install("--generalize", "--remove-user", name).returncode, 2)
        self.assertEqual(self.install("--remove-user", "azureuser").returncode, 2)

    def test_a_home_that_is_not_its_alone_is_left_and_told(self) -> None:
        passwd = str(self.tree()["etc/passwd"][1])
        for home in ("/", "/home", "/home/", "/etc", "/home/alice", "/home/alice/", "/home/../etc"):
            with self.subTest(home):
                self.setUp()
                self.write("etc/passwd", passwd.replace("/home/azureuser", home))
                self.assertIn(f"left the home {home}\n", self.check_generalized("--remove-user", "azureuser"))
                self.assertLessEqual({"home/alice/notes", "home/azureuser/.bashrc"}, set(self.tree()))

    def test_a_home_in_which_somebody_else_has_theirs_is_left(self) -> None:
        for home in ("/home/azureuser/bob", "/home/azureuser/", "/home/link/bob"):
            with self.subTest(home):
                self.setUp()
                self.write("home/azureuser/bob/notes", "theirs\n")
                self.link("azureuser", "home/link")
                self.write("etc/passwd", str(self.tree()["etc/passwd"][1]).replace("/srv/bob", home))
                self.assertIn("left the home /home/azureuser\n", self.check_generalized("--remove-user", "azureuser"))
                self.assertIn("home/azureuser/bob/notes", self.tree())

    def test_a_link_to_the_home_of_somebody_else_is_left(self) -> None:
        shutil.rmtree(self.path("home/azureuser"))
        self.link("alice", "home/azureuser")
        self.assertIn("left the home /home/azureuser\n", self.check_generalized("--remove-user", "azureuser"))
        self.assertIn("home/alice/notes", self.tree())

    def test_what_is_mounted_in_a_home_is_refused(self) -> None:
        os.mkdir(self.path("home/azureuser/mnt 1"))
        self.check_refused(
            "/mnt 1 is mounted in /home/azureuser, which is to be emptied: unmount it",
            *("--generalize", "--remove-user", "azureuser", "--force"),
            first=f"mount -t tmpfs tmpfs '{self.root}/home/azureuser/mnt 1'",
        )

    def test_what_is_mounted_in_a_home_that_two_leave_is_refused(self) -> None:
        for home in ("home/azureuser", "home/azureuser/inner"):
            os.makedirs(self.path("home/azureuser/inner/mnt"), exist_ok=True)
            passwd = str(self.tree()["etc/passwd"][1]).replace("/home/alice:", f"/{home}:")
            self.write("etc/passwd", passwd)
            done = self.install(
                *("--generalize", "--remove-user", "azureuser", "--remove-user", "alice", "--force"),
                first=f"mount --bind '{self.outside}' '{self.root}/home/azureuser/inner/mnt'",
            )
            self.assertEqual(done.returncode, 1, done)
            self.assertIn("/inner/mnt is mounted in /home/azureuser, which is to be emptied: unmount it; ", done.stderr)
            self.write("etc/passwd", passwd.replace(f"/{home}:", "/home/alice:", 1))

    def test_a_spool_that_leads_out_of_the_image_is_refused_before_anything_is_changed(self) -> None:
        shutil.rmtree(self.path("var/mail"))
        self.link("/var/spool/elsewhere", "var/mail")
        self.check_refused(
            "/var/mail in .* is a link that leads nowhere in it.*, or use --force",
            *("--generalize", "--remove-user", "azureuser"),
        )

    def test_what_was_interrupted_is_done_again(self) -> None:
        for command in ("rm", "userdel", "cp", "sed"):
            with self.subTest(command):
                self.setUp()
                failing = f'mkdir /run/bin; printf "#!/bin/sh\\nexit 1\\n" >/run/bin/{command}; '
                failing += f"chmod 755 /run/bin/{command}; PATH=/run/bin:$PATH"
                done = self.install("--generalize", "--remove-user", "azureuser", first=failing)
                self.assertNotEqual(done.returncode, 0, done)
                if "no account" not in done.stderr:
                    self.check_generalized("--remove-user", "azureuser", "--remove-user", "azureuser")
                    kept = "etc/sudoers.d/azureuser2"
                    self.assertEqual([name for name in self.tree() if "azureuser" in name and name != kept], [])

    def test_a_name_is_no_pattern(self) -> None:
        self.write("etc/passwd", "root:x:0:0::/root:\na.b:x:1002:1002::/home/a.b:/bin/sh")
        self.write("etc/sudoers.d/axb", "axb ALL=(ALL) ALL\n")
        spools = {"var/spool/cron/a.b", "var/spool/mail/a.b"}
        for name in spools:
            self.write(name)
        self.check_generalized("--remove-user", "a.b")
        self.assertIn("etc/sudoers.d/axb", self.tree())
        self.assertEqual(spools & set(self.tree()), set())

    def test_rules_of_sudo_in_other_forms(self) -> None:
        for name, rule in (("a", "  azureuser ALL=ALL\n"), ("b", "azureuser ALL=(ALL) \\\n  NOPASSWD: ALL\n")):
            self.write("etc/sudoers.d/" + name, rule + "alice ALL=(ALL) ALL\n")
        self.write("etc/sudoers.d/c", "User_Alias ADMINS = alice, azureuser\n")
        self.write("etc/sudoers", "root ALL=ALL\nazureuser ALL=ALL\n")
        said = self.check_generalized("--remove-user", "azureuser")
        self.assertIn("not from rules of sudo: /etc/sudoers /etc/sudoers.d/c\n", said)
        for name in ("a", "b"):
            self.assertEqual(self.tree()["etc/sudoers.d/" + name][1], "alice ALL=(ALL) ALL\n")

    def test_links_lead_nowhere_else(self) -> None:
        shutil.rmtree(self.path("home/azureuser"))
        self.link(self.outside, "home/azureuser")
        for name in ("passwd-", "passwd+", "passwd.lock", "subuid-", "login.defs", "sudoers.d/x"):
            if os.path.exists(self.path("etc/" + name)):
                os.unlink(self.path("etc/" + name))
            self.link(self.outside + "/victim", "etc/" + name)
        done = self.install("--generalize", "--remove-user", "azureuser", "--force")
        self.assertEqual(done.returncode, 0, done)
        self.assertIn("left the home /home/azureuser", done.stdout)
        self.assertNotIn("azureuser", str(self.tree()["etc/passwd"][1]))

    def test_a_name_is_that_of_one_file_whatever_is_in_it(self) -> None:
        rule = "azureuser ALL=(ALL) NOPASSWD:ALL\n"
        for shell in (("sh",), ("busybox", "sh"), ("bash", "--posix")):
            if not shutil.which(shell[0]):
                continue
            self.setUp()
            self.link(self.outside + "/victim", "etc/sudoers.d/x")
            for name in ("x\\ny", "x\\c", "x ", "x\n/etc/passwd"):
                self.write("etc/sudoers.d/" + name.replace("/", "_"), rule)
            done = self.install("--generalize", "--remove-user", "azureuser", shell=shell)
            self.assertEqual((done.returncode, done.stderr), (0, ""), done)
            self.assertTrue(os.path.islink(self.path("etc/sudoers.d/x")))
            left = [name for name, entry in self.tree().items() if entry[1] == rule]
            self.assertEqual(left, ["etc/sudoers.d/x\n_etc_passwd"])

    def test_what_login_defs_says_is_not_done(self) -> None:
        command, told = self.outside + "/command", self.outside + "/was-run"
        with open(command, "w", encoding="utf-8") as file:
            file.write(f"#!/bin/sh\necho >{told}\n")
        os.chmod(command, 0o755)
        self.write("etc/login.defs", f"USERDEL_CMD {command}\n")
        self.check_generalized("--remove-user", "azureuser")
        self.assertFalse(os.path.exists(told))

    def test_who_is_removed_opens_no_vm(self) -> None:
        self.assertIn("authorized keys of: azureuser\n", self.check_generalized())
        self.use()
        check = self.install("--generalize", "--check", "--remove-user", "azureuser").stdout
        self.assertEqual([line for line in check.splitlines() if "opens every VM" in line], [])
        self.assertNotIn("left ", self.check_generalized("--remove-user", "azureuser"))

    def test_nothing_of_it_is_left_where_userdel_worked(self) -> None:
        for userdel in ("userdel", "false"):
            self.setUp()
            first = f"mkdir /run/bin /run/tmp; ln -s {shutil.which(userdel)} /run/bin/userdel; PATH=/run/bin:$PATH"
            done = self.install(
                *("--generalize", "--remove-user", "azureuser"),
                first=first + "; export TMPDIR=/run/tmp",
                shell=("sh", "-c", 'sh "$@"; ls -A /run/tmp', "sh"),
            )
            self.assertNotIn("tmp.", done.stdout)
            self.assertEqual("half-way" in done.stderr, userdel == "false", done)


class ResolvConfTest(GeneralizeCase):
    """/etc/resolv.conf is forgotten where it is made anew."""

    def test_it_is_kept_where_nobody_makes_it_anew(self) -> None:
        for unit, text, forgotten, told in (
            ("", "nameserver 10.0.0.1\n", False, True),
            ("", "search x\nnameserver 168.63.129.16\n", False, False),
            ("NetworkManager.service", "nameserver 10.0.0.1\n", True, False),
            ("dhcpcd.service", "nameserver 168.63.129.16\n", True, False),
            ("systemd-resolved.service", "nameserver 10.0.0.1\n", True, False),
        ):
            with self.subTest(unit, text=text):
                self.setUp()
                os.unlink(self.path("etc/systemd/system/multi-user.target.wants/systemd-resolved.service"))
                if unit:
                    self.unit(unit)
                self.write("etc/resolv.conf", text)
                said = self.check_generalized()
                self.assertEqual("forgot /etc/resolv.conf: " in said, forgotten)
                self.assertEqual("left /etc/resolv.conf: name servers of the network that" in said, told)
                self.assertEqual("etc/resolv.conf" in self.tree(), not forgotten)


class LeftTest(GeneralizeCase):
    """What opens every VM is told by name, and kept."""

    def left(self, *arguments: str) -> List[str]:
        return [line for line in self.check_generalized(*arguments).splitlines() if line.startswith("left ")]

    def test_nothing_opens_every_vm(self) -> None:
        self.write("home/alice/.ssh/authorized_keys", "# none\n\n")
        self.assertEqual(self.left(), [])

    def test_accounts_with_keys(self) -> None:
        self.write("home/alice/.ssh/authorized_keys", "# mine\nssh-ed25519 AAAA alice\n")
        self.write("root/.ssh/authorized_keys2", "ssh-ed25519 AAAA root")
        self.assertEqual(self.left(), ["left what opens every VM, authorized keys of: root alice"])
        self.assertIn("home/alice/.ssh/authorized_keys", self.tree())

    def test_accounts_with_passwords(self) -> None:
        self.write("etc/shadow", "root:$y$hash:1::::::\nalice::1::::::\nbob:!$6$hash:1::::::\n")
        self.assertEqual(self.left(), ["left what opens every VM, a password of: root alice"])

    def test_an_account_in_a_last_line_without_an_end(self) -> None:
        self.write("etc/passwd", "root:x:0:0::/root:\nbob:x:1000:1000::/srv/bob:/bin/sh")
        self.write("etc/shadow", "root:*:1::::::\nbob:$y$hash")
        self.write("srv/bob/.ssh/authorized_keys", "ssh-ed25519 AAAA bob")
        whole = "left what opens every VM, "
        self.assertEqual(self.left(), [whole + "authorized keys of: bob", whole + "a password of: bob"])

    def test_a_password_where_everybody_may_read_it(self) -> None:
        self.write("etc/passwd", "root:*:0:0::/root:\nalice:hash:1000:1000::/home/alice:/bin/sh\n")
        self.assertEqual(self.left(), ["left what opens every VM, a password of: alice"])

    def test_host_keys_elsewhere(self) -> None:
        self.write("etc/ssh/sshd_config", "#HostKey /etc/ssh/ssh_host_rsa_key\nHostKey /etc/ssh/ssh_host_ed25519_key\n")
        self.assertEqual(self.left(), [])
        self.write("etc/ssh/sshd_config.d/x.conf", "hostkey /srv/key\n")
        self.assertRegex(self.left()[0], "left SSH host keys that every VM will have: /etc/ssh/sshd_config.d/x.conf")
        self.write("etc/ssh/sshd_config", "HostKey /srv/key\n")
        self.assertRegex(self.left()[0], "left SSH host keys that every VM will have: /etc/ssh/sshd_config names")

    def test_identities_elsewhere(self) -> None:
        self.write("etc/iscsi/initiatorname.iscsi", "GenerateName=yes\n")
        self.assertEqual(self.left(), [])
        self.write("etc/iscsi/initiatorname.iscsi", "InitiatorName=iqn.1993-08.org.debian:01:a\n")
        for name in ("etc/krb5.keytab", "etc/pki/consumer/key.pem", "var/lib/ubuntu-advantage/private/token"):
            self.write(name, "secret")
            self.assertRegex(self.left()[-2], f"^left /{name}: .*, which every VM will have$")
        self.assertRegex(self.left()[-1], "^left /etc/iscsi/initiatorname.iscsi: .*, which every VM will have$")

    def test_secrets_in_homes(self) -> None:
        secrets = (
            "home/alice/.ssh/id_ed25519",
            "root/.netrc",
            "home/alice/.azure/x",
            "srv/bob/.aws/x",
            "root/.ssh/id_x",
        )
        for name in (*secrets, "home/alice/.git-credentials", "home/alice/.ssh/id_ed25519.pub", "root/.ssh/config"):
            self.write(name, "secret")
        self.assertEqual(
            self.left(),
            [
                "left /home/alice/.ssh/id_ed25519 /root/.ssh/id_x: private keys, which every VM will have",
                "left /home/alice/.azure: credentials, which every VM will have",
                "left /srv/bob/.aws: credentials, which every VM will have",
                "left /root/.netrc: passwords, which every VM will have",
                "left /home/alice/.git-credentials: passwords, which every VM will have",
            ],
        )
        self.assertLessEqual(set(secrets), set(self.tree()))

    def test_rules_of_sudo_for_accounts_with_keys(self) -> None:
        self.write("home/alice/.ssh/authorized_keys", "ssh-ed25519 AAAA alice\n")
        self.write("root/.ssh/authorized_keys", "ssh-ed25519 AAAA root\n")
        self.write("etc/sudoers.d/90-cloud-init-users", "root ALL=(ALL) ALL\nalice ALL=(ALL) NOPASSWD:ALL\n")
        self.write("etc/sudoers.d/bob", "bob ALL=(ALL) ALL\n")
        self.assertEqual(self.left()[1:], ["left rules of sudo for them: /etc/sudoers.d/90-cloud-init-users"])

    def test_names_cannot_command_the_terminal(self) -> None:
        self.write("etc/passwd", "a\x1b[2J\x9bb:hash:1000:1000::/home/alice:/bin/sh\n")
        self.assertEqual(self.left(), ["left what opens every VM, a password of: a?[2J??b"])
