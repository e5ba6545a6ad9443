"""install.sh on made-up roots: it is shell, it runs as root, and what it does must be what it says."""

import os
import re
import shutil
import subprocess
import tempfile
import unittest
from typing import Dict, Tuple

from tests import sandbox

INSTALL = os.path.join(sandbox.REPOSITORY, "install.sh")
PROGRAM = "usr/local/sbin/azure-provisioning"
UNIT = "etc/systemd/system/azure-provisioning.service"
PRESET = "etc/systemd/system-preset/00-azure-provisioning.preset"
WANTS = "etc/systemd/system/multi-user.target.wants/azure-provisioning.service"
OURS = {PROGRAM, UNIT, PRESET, WANTS}


class InstallCase(unittest.TestCase):
    """A root of a system with systemd and Python 3.11, and the installer to run on it."""

    def setUp(self) -> None:
        self.directory = os.path.realpath(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.directory)
        self.root = os.path.join(self.directory, "image root")
        for directory in ("etc/systemd/system/multi-user.target.wants", "usr/local/sbin", "usr/bin"):
            os.makedirs(os.path.join(self.root, directory))
        self.program("usr/lib/systemd/systemd")
        self.program("usr/bin/python3.11")
        self.link("python3.11", "usr/bin/python3")
        self.library("usr/lib/python3.11")

    def path(self, name: str) -> str:
        """Return where name is, and see that its directory is there."""
        path = os.path.join(self.root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return path

    def write(self, name: str, text: str = "") -> None:
        with open(self.path(name), "w", encoding="utf-8") as file:
            file.write(text)

    def program(self, name: str) -> None:
        self.write(name, "#!/bin/sh\necho 'something from the image was run' >&2\nexit 1\n")
        os.chmod(self.path(name), 0o755)

    def link(self, target: str, name: str) -> None:
        os.symlink(target, self.path(name))

    def library(self, name: str) -> None:
        self.write(name + "/http/client.py")
        self.write(name + "/xml/etree/ElementTree.py")

    def tree(self) -> Dict[str, Tuple[object, ...]]:
        """Return all that is in the root: type and mode, content, and the time of its last change."""
        found: Dict[str, Tuple[object, ...]] = {}
        for directory, directories, files in os.walk(self.root):
            for name in directories + files:
                path = os.path.join(directory, name)
                status = os.lstat(path)
                content = os.readlink(path) if os.path.islink(path) else ""
                if os.path.isfile(path) and not os.path.islink(path):
                    with open(path, encoding="utf-8") as file:
                        content = file.read()
                changed = 0 if os.path.isdir(path) else status.st_mtime_ns
                found[os.path.relpath(path, self.root)] = (status.st_mode, content, changed)
        return found

    def install(self, *arguments: str, shell: Tuple[str, ...] = ("sh",)) -> "subprocess.CompletedProcess[str]":
        """Run the installer on the root with arguments, as root of a mount namespace of its own."""
        # What a bug would write elsewhere is lost with the namespace.
        code = 'for d in /etc /usr/local /run; do mount -t tmpfs tmpfs $d; done; exec "$@"'
        command = [*sandbox.unshare_command(), "sh", "-c", code, "sh", *shell, INSTALL, "--root", self.root, *arguments]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", check=False)

    def check_installed(self, *arguments: str) -> None:
        done = self.install(*arguments)
        self.assertEqual((done.returncode, done.stderr), (0, ""), done)
        self.assertLessEqual(OURS, set(self.tree()))

    def check_refused(self, reason: str, *arguments: str) -> None:
        before = self.tree()
        done = self.install(*arguments)
        self.assertEqual((done.returncode, done.stdout), (1, ""), done)
        self.assertRegex(done.stderr, rf"\Ainstall\.sh: .*{reason}.*; nothing was changed\n\Z")
        self.assertEqual(self.tree(), before)


class InstallTest(InstallCase):
    """Into an image, again, and out of it."""

    def test_it_installs_four_files_and_nothing_else(self) -> None:
        for shell in (("sh",), ("dash",), ("busybox", "sh"), ("bash", "--posix")):
            if not shutil.which(shell[0]):
                continue  # sh is there, whichever of them it is
            with self.subTest(shell):
                before = self.tree()
                done = self.install(shell=shell)
                self.assertEqual((done.returncode, done.stderr), (0, ""), done)
                self.assertRegex(done.stdout, r"\Ainstalled and enabled in .*/image root: it runs at the next boot\n\Z")
                after = self.tree()
                self.assertEqual(set(after) - set(before), OURS | {os.path.dirname(PRESET)})
                self.assertEqual(after[PROGRAM][0], 0o100755)
                self.assertEqual(after[UNIT][0], 0o100644)
                self.assertEqual(after[PRESET][:2], (0o100644, "enable azure-provisioning.service\n"))
                self.assertEqual(after[WANTS][1], "/" + UNIT)
                with open(sandbox.SCRIPT, encoding="utf-8") as file:
                    self.assertEqual(after[PROGRAM][1], file.read())
                self.assertEqual(self.install("--uninstall", shell=shell).returncode, 0)
                self.assertEqual(self.tree(), before)

    def test_a_second_time_changes_nothing(self) -> None:
        self.check_installed()
        before = self.tree()
        self.check_installed()
        self.assertEqual(self.tree(), before)

    def test_a_second_time_arms_the_unit_again(self) -> None:
        self.check_installed()
        before = self.tree()
        os.unlink(self.path(WANTS))
        self.check_installed()
        self.assertEqual(self.tree()[WANTS][:2], before[WANTS][:2])

    def test_a_file_that_was_changed_is_put_right(self) -> None:
        self.check_installed()
        before = {name: entry[:2] for name, entry in self.tree().items()}
        self.write(PROGRAM, "#!/bin/false\n")
        os.unlink(self.path(UNIT))
        self.link("/dev/null", UNIT)  # masked
        self.check_installed()
        self.assertEqual({name: entry[:2] for name, entry in self.tree().items()}, before)

    def test_uninstall_leaves_what_others_put_beside(self) -> None:
        self.write("etc/systemd/system-preset/10-mine.preset", "disable *\n")
        self.link("/usr/lib/systemd/system/ssh.service", "etc/systemd/system/multi-user.target.wants/ssh.service")
        before = self.tree()
        self.check_installed()
        self.assertEqual(self.install("--uninstall").returncode, 0)
        self.assertEqual(self.tree(), before)

    def test_uninstall_of_nothing_is_fine(self) -> None:
        self.assertEqual(self.install("--uninstall").returncode, 0)

    def test_an_absolute_link_in_the_image_stays_in_the_image(self) -> None:
        shutil.rmtree(self.path("usr/local"))
        os.makedirs(self.path("var/usrlocal/sbin"))
        self.link("/var/usrlocal", "usr/local")
        done = self.install()
        self.assertEqual(done.returncode, 0, done)
        self.assertIn("var/usrlocal/sbin/azure-provisioning", self.tree())


class PythonTest(InstallCase):
    """It finds the target's Python without running it."""

    def python(self, target: str, minor: str, library: str = "usr/lib") -> None:
        os.unlink(self.path("usr/bin/python3"))
        shutil.rmtree(self.path("usr/lib/python3.11"))
        self.link(target, "usr/bin/python3")
        self.program("usr/bin/python3." + minor)
        self.library(f"{library}/python3.{minor}")

    def test_every_python_from_3_6_on_will_do(self) -> None:
        for minor, library in (("6", "usr/lib64"), ("9", "usr/lib64"), ("14", "usr/lib")):
            with self.subTest(minor):
                self.setUp()
                self.python("python3." + minor, minor, library)
                self.check_installed()

    def test_an_absolute_chain_of_links_is_followed_in_the_image(self) -> None:
        self.python("/etc/alternatives/python3", "9", "usr/lib64")
        self.link("/usr/bin/python3.9", "etc/alternatives/python3")
        self.check_installed()

    def test_rhel_8_without_python3_has_its_platform_python(self) -> None:
        os.unlink(self.path("usr/bin/python3"))
        self.program("usr/libexec/platform-python3.6")
        self.link("platform-python3.6", "usr/libexec/platform-python")
        self.library("usr/lib64/python3.6")
        self.check_installed()
        self.assertTrue(str(self.tree()[PROGRAM][1]).startswith("#!/usr/libexec/platform-python -IS\n"))

    def test_no_python_is_refused(self) -> None:
        os.unlink(self.path("usr/bin/python3"))
        self.check_refused("no Python 3.6 or later")

    def test_an_old_python_is_refused(self) -> None:
        self.python("python3.5", "5")
        self.check_refused("no Python 3.6 or later")

    def test_a_python_without_its_standard_library_is_refused(self) -> None:
        os.unlink(self.path("usr/lib/python3.11/http/client.py"))
        self.check_refused("libpython3-stdlib")

    def test_a_loop_of_links_is_refused(self) -> None:
        os.unlink(self.path("usr/bin/python3"))
        self.link("python3", "usr/bin/python3")
        self.check_refused("no Python 3.6 or later")


class RefusalTest(InstallCase):
    """One clear line, and nothing changed."""

    def test_a_target_without_systemd_is_refused(self) -> None:
        os.unlink(self.path("usr/lib/systemd/systemd"))
        self.check_refused("no systemd in")

    def test_systemd_where_usr_is_not_merged_is_found(self) -> None:
        os.unlink(self.path("usr/lib/systemd/systemd"))
        self.program("lib/systemd/systemd")
        self.check_installed()

    def test_another_agent_that_is_enabled_is_refused_and_forced(self) -> None:
        for agent, link in {
            "cloud-init": "cloud-init.target.wants/cloud-init-local.service",
            "walinuxagent": "multi-user.target.wants/walinuxagent.service",
            "waagent": "multi-user.target.wants/waagent.service",
        }.items():
            with self.subTest(agent):
                self.setUp()
                self.link("/usr/lib/systemd/system/x.service", "etc/systemd/system/" + link)
                self.check_refused(agent + " is enabled in .*--force")
                self.check_installed("--force")

    def test_another_agent_that_is_not_enabled_is_no_obstacle(self) -> None:
        self.write("usr/lib/systemd/system/cloud-init.service")
        self.write("usr/lib/systemd/system/walinuxagent.service")
        self.check_installed()

    def test_cloud_init_that_is_disabled_is_no_obstacle(self) -> None:
        self.link("/x", "etc/systemd/system/cloud-init.target.wants/cloud-init.service")
        self.write("etc/cloud/cloud-init.disabled")
        self.check_installed()

    def test_an_agent_that_is_masked_is_no_obstacle(self) -> None:
        self.link("/x", "etc/systemd/system/multi-user.target.wants/walinuxagent.service")
        self.link("/dev/null", "etc/systemd/system/walinuxagent.service")
        self.check_installed()

    def test_who_is_not_root_is_refused(self) -> None:
        command = ["sh", INSTALL, "--root", self.root]
        if os.geteuid() == 0:
            command = ["setpriv", "--reuid=65534", "--clear-groups", *command]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
        self.assertEqual((done.returncode, done.stderr), (1, b"install.sh: this needs root; nothing was changed\n"))

    def test_wrong_usage_ends_with_status_2(self) -> None:
        before = self.tree()
        for arguments in (["--frob"], ["--root"], ["--root", ""], ["--root="], ["/mnt"]):
            with self.subTest(arguments):
                done = self.install(*arguments)
                self.assertEqual((done.returncode, done.stdout), (2, ""), done)
                self.assertIn("usage: install.sh", done.stderr)
        self.assertEqual(self.tree(), before)

    def test_a_root_that_is_not_there_is_refused(self) -> None:
        self.check_refused("no directory /no/such", "--root", "/no/such")


class UnitTest(unittest.TestCase):
    """The unit as text; test_boot.py boots it."""

    def test_it_runs_what_is_installed_and_disarms_itself_last(self) -> None:
        with open(os.path.join(sandbox.REPOSITORY, "azure-provisioning.service"), encoding="utf-8") as file:
            text = file.read()
        commands = re.findall(r"(?m)^ExecStart=(.*)", text)
        self.assertEqual(commands[0], "/" + PROGRAM)
        self.assertRegex(commands[-1], r"^\+/bin/systemctl disable .*azure-provisioning\.service$")
        self.assertEqual(len(commands), 2)


if __name__ == "__main__":
    unittest.main()
