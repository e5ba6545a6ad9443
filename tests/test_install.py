"""install.sh on made-up roots: it is shell, it runs as root, and what it does must be what it says."""

import os
import re
import shutil
import stat
import subprocess
import tempfile
import unittest
from typing import Dict, Optional, Tuple

from tests import sandbox

INSTALL = os.path.join(sandbox.REPOSITORY, "install.sh")
PROGRAM = "usr/local/sbin/azure-provisioning"
UNIT = "etc/systemd/system/azure-provisioning.service"
PRESET = "etc/systemd/system-preset/00-azure-provisioning.preset"
WANTS = "etc/systemd/system/multi-user.target.wants/azure-provisioning.service"
USER = "etc/systemd/system/azure-provisioning.service.d/10-user.conf"
OURS = {PROGRAM, UNIT, PRESET, WANTS}


class InstallCase(unittest.TestCase):
    """A root of a system with systemd and Python 3.11, and the installer to run on it."""

    @classmethod
    def setUpClass(cls) -> None:
        if sandbox.impossible():
            raise unittest.SkipTest("no namespaces: MachineTest says why")

    def setUp(self) -> None:
        self.directory = os.path.realpath(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.directory)
        self.outside = os.path.join(self.directory, "outside")
        os.makedirs(os.path.join(self.outside, "directory"))
        with open(os.path.join(self.outside, "victim"), "w", encoding="utf-8") as file:
            file.write("somebody else's")
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
        self.write(name + "/xml/parsers/expat.py", "from pyexpat import *\n")

    def unit(self, name: str, enabled_by: str = "multi-user.target") -> None:
        """Put a unit of the distribution there and enable it."""
        self.write("usr/lib/systemd/system/" + name, "[Service]\nExecStart=/bin/true\n")
        self.link("/usr/lib/systemd/system/" + name, f"etc/systemd/system/{enabled_by}.wants/{name}")

    def tree(self, top: str = "") -> Dict[str, Tuple[object, ...]]:
        """Return all that is in the root, or in top: type and mode, content, and the time of its last change."""
        found: Dict[str, Tuple[object, ...]] = {}
        for directory, directories, files in os.walk(top or self.root):
            for name in directories + files:
                path = os.path.join(directory, name)
                status = os.lstat(path)
                content = ""
                if stat.S_ISLNK(status.st_mode):
                    content = os.readlink(path)
                elif stat.S_ISREG(status.st_mode):
                    with open(path, encoding="utf-8") as file:
                        content = file.read()
                changed = 0 if stat.S_ISDIR(status.st_mode) else status.st_mtime_ns
                found[os.path.relpath(path, top or self.root)] = (status.st_mode, content, changed)
        return found

    def entries(self, tree: Optional[Dict[str, Tuple[object, ...]]] = None) -> Dict[str, Tuple[object, ...]]:
        """Return what is in the root, or in a tree of it, without times."""
        return {name: entry[:2] for name, entry in (tree or self.tree()).items()}

    def install(
        self,
        *arguments: str,
        shell: Tuple[str, ...] = ("sh",),
        installer: str = INSTALL,
        root: str = "",
        first: str = ":",
        **environment: str,
    ) -> "subprocess.CompletedProcess[str]":
        """Run the installer on the root with arguments, as root of a mount namespace of its own, after first."""
        # What a bug would write elsewhere is lost with the namespace, or cannot be; beside the image it is seen.
        code = """
            for d in /etc /run; do mount -t tmpfs tmpfs $d; done
            if [ -w /usr/local ]; then
                mount --bind /usr/local /usr/local && mount -o remount,bind,ro /usr/local || exit
            fi
            eval "$1"; shift; exec "$@"
        """
        command = [*sandbox.unshare_command(), "sh", "-c", code, "sh", first]
        command += [*shell, installer, "--root", root or self.root, *arguments]
        before = self.tree(self.outside)
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            cwd=self.directory,
            env=dict(os.environ, **environment),
            timeout=60,  # one that waits for a FIFO would wait for ever
            check=False,
        )
        self.assertEqual(self.tree(self.outside), before, done)
        return done

    def bind(self, name: str, read_only: bool = True) -> str:
        """Return the commands that mount what is called name once more in its place."""
        path = f"'{self.root}/{name}'"
        return f"mount --bind {path} {path}" + f"; mount -o remount,bind,ro {path}" * read_only

    def check_installed(self, *arguments: str) -> None:
        done = self.install(*arguments)
        self.assertEqual((done.returncode, done.stderr), (0, ""), done)
        self.assertLessEqual(OURS, set(self.tree()))

    def check_refused(self, reason: str, *arguments: str, first: str = ":", shell: Tuple[str, ...] = ("sh",)) -> None:
        before = self.tree()
        done = self.install(*arguments, first=first, shell=shell)
        self.assertEqual((done.returncode, done.stdout), (1, ""), done)
        self.assertRegex(done.stderr, rf"\Ainstall\.sh: .*{reason}.*; nothing was changed\n\Z")
        self.assertEqual(self.tree(), before)

    def check_refused_but_for_force(self, reason: str) -> None:
        self.check_refused(reason + ".*--force")
        done = self.install("--force")
        self.assertEqual(done.returncode, 0, done)
        self.assertRegex(done.stderr, rf"\Ainstall\.sh: .*{reason}.*; going on all the same\n\Z")
        self.check_whole()

    def check_whole(self) -> None:
        """Check that everything is in its place, as a first install would have left it."""
        tree = self.tree()
        for name, source in ((PROGRAM, sandbox.PROGRAM), (UNIT, os.path.join(sandbox.REPOSITORY, UNIT.split("/")[-1]))):
            with open(source, encoding="utf-8") as file:
                self.assertEqual(str(tree[name][1]).rsplit("\n", 2)[0] + "\n", file.read())
        self.assertEqual(tree[PROGRAM][0], 0o100755)
        self.assertEqual(tree[UNIT][0], 0o100644)
        self.assertEqual(tree[PRESET][0], 0o100644)
        self.assertEqual(tree[WANTS][1], "/" + UNIT)
        self.assertEqual([name for name in tree if name.startswith(tuple(OURS - {WANTS})) and name not in OURS], [])


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
                self.check_whole()
                self.assertRegex(str(after[PRESET][1]), r"\Aenable azure-provisioning\.service\n(#.*\n)+\Z")
                self.assertEqual(self.install("--uninstall", shell=shell).returncode, 0)
                self.assertEqual(self.tree(), before)

    def test_a_second_time_changes_nothing(self) -> None:
        self.check_installed()
        before = self.tree()
        self.check_installed()
        self.assertEqual(self.entries(), self.entries(before))

    def test_a_second_time_arms_the_unit_again(self) -> None:
        self.check_installed()
        before = self.tree()
        os.unlink(self.path(WANTS))
        self.check_installed()
        self.assertEqual(self.tree()[WANTS][:2], before[WANTS][:2])

    def test_uninstall_leaves_what_others_put_beside(self) -> None:
        self.write("etc/systemd/system-preset/10-mine.preset", "disable *\n")
        self.link("/usr/lib/systemd/system/ssh.service", "etc/systemd/system/multi-user.target.wants/ssh.service")
        before = self.tree()
        self.check_installed()
        self.assertEqual(self.install("--uninstall").returncode, 0)
        self.assertEqual(self.tree(), before)

    def test_a_relative_link_in_the_image_is_followed(self) -> None:
        # As where /usr is read-only: OSTree's.
        shutil.rmtree(self.path("usr/local"))
        os.makedirs(self.path("var/usrlocal"))
        self.link("../var/usrlocal", "usr/local")
        done = self.install()
        self.assertEqual((done.returncode, done.stderr), (0, ""), done)
        self.assertIn("var/usrlocal/sbin/azure-provisioning", self.tree())
        self.assertEqual(self.install("--uninstall").returncode, 0)
        self.assertNotIn("var/usrlocal/sbin/azure-provisioning", self.tree())
        os.rename(self.path("etc/systemd"), self.path("usr/lib/etc-systemd"))
        self.link("../usr/lib/etc-systemd", "etc/systemd")
        for arguments in ((), (), ("--uninstall",)):
            done = self.install(*arguments)
            self.assertEqual((done.returncode, done.stderr), (0, ""), done)
        self.assertEqual([name for name in self.tree() if "azure-provisioning" in name], [])


class SelinuxTest(InstallCase):
    """What is written into a mounted image has no labels of its policy."""

    def test_an_image_with_selinux_is_told_what_it_lacks(self) -> None:
        for mode, warned in (("enforcing", True), ("permissive", True), ("disabled", False)):
            self.write("etc/selinux/config", f"# SELINUX= is one of them\nSELINUX={mode}\nSELINUXTYPE=targeted\n")
            done = self.install()
            self.assertEqual(done.returncode, 0, done)
            self.assertEqual("SELinux is on in " in done.stderr, warned, done)


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
        os.unlink(self.path("usr/lib/python3.11/xml/parsers/expat.py"))
        self.check_refused("libpython3-stdlib")


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
        for agent, name, target, remedy in (
            ("cloud-init", "cloud-init-local.service", "cloud-init.target", "touch {}/etc/cloud/cloud-init.disabled"),
            ("cloud-init", "cloud-final.service", "cloud-init.target", "touch {}/etc/cloud/cloud-init.disabled"),
            ("waagent", "walinuxagent.service", "multi-user.target", "systemctl --root={} disable walinuxagent"),
            ("waagent", "waagent.service", "multi-user.target", "Provisioning.Agent=disabled in /etc/waagent.conf"),
            ("azure-init", "azure-init.service", "multi-user.target", "systemctl --root={} disable azure-init"),
            ("afterburn", "afterburn-checkin.service", "x.target", "systemctl --root={} disable afterburn-checkin"),
        ):
            with self.subTest(name):
                self.setUp()
                self.unit(name, target)
                remedy = ".*" + re.escape(remedy.format(self.root))
                self.check_refused_but_for_force(f"{agent} is enabled in .* by {re.escape(name)}, and two .*{remedy}")

    def test_all_agents_that_are_enabled_are_told_each_with_its_units(self) -> None:
        for name in ("cloud-init.service", "cloud-config.service", "walinuxagent.service"):
            self.unit(name)
        done = self.install()
        self.assertEqual(done.returncode, 1)
        self.assertRegex(
            done.stderr, r"cloud-init is enabled in .* by cloud-config\.service cloud-init\.service, .*\n.*wa"
        )
        self.assertEqual(len(done.stderr.splitlines()), 2)

    def test_an_agent_that_is_told_not_to_provision_is_let_be(self) -> None:
        self.unit("walinuxagent.service")
        for line, refused in (
            ("Provisioning.Agent=disabled", False),
            ("Provisioning.Agent = disabled", False),
            ("#Provisioning.Agent=disabled", True),
            ("Provisioning.Agent=auto", True),
            # WALinuxAgent 2.2.45 and later do not look at it.
            ("Provisioning.Enabled=n", True),
        ):
            with self.subTest(line):
                self.write("etc/waagent.conf", f"# waagent\n{line}\nOS.EnableRDMA=n\n")
                if refused:
                    self.check_refused("waagent is enabled in")
                else:
                    self.check_installed()

    def test_another_agent_that_is_not_enabled_is_no_obstacle(self) -> None:
        self.write("usr/lib/systemd/system/cloud-init.service")
        self.write("usr/lib/systemd/system/walinuxagent.service")
        self.check_installed()

    def test_cloud_init_that_is_disabled_is_no_obstacle(self) -> None:
        self.unit("cloud-init.service", "cloud-init.target")
        self.write("etc/cloud/cloud-init.disabled")
        self.check_installed()

    def test_an_agent_that_was_removed_is_no_obstacle(self) -> None:
        self.link("/usr/lib/systemd/system/x.service", "etc/systemd/system/multi-user.target.wants/waagent.service")
        self.check_installed()

    def test_an_agent_that_is_masked_is_no_obstacle(self) -> None:
        self.unit("walinuxagent.service")
        self.link("/dev/null", "etc/systemd/system/walinuxagent.service")
        self.check_installed()

    def test_who_is_not_root_is_refused(self) -> None:
        command = ["sh", INSTALL, "--root", self.root]
        if os.geteuid() == 0:
            command = [*sandbox.ORDINARY_USER, *command]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
        self.assertEqual((done.returncode, done.stderr), (1, b"install.sh: this needs root; nothing was changed\n"))

    def test_wrong_usage_ends_with_status_2(self) -> None:
        before = self.tree()
        for arguments, reason in (
            (["--frob"], "what is --frob"),
            (["--root"], "--root wants a directory"),
            (["--root", ""], "--root wants a directory"),
            (["--root="], "what is --root="),
            (["/mnt"], "what is /mnt"),
            (["--uninstall", "--generalize"], "--uninstall and --generalize at once"),
            (["--generalize", "--user"], "--user is for installing"),
            (["--check"], "--remove-user, --check and --yes are for --generalize"),
            (["--yes"], "--remove-user, --check and --yes are for --generalize"),
            (["--generalize", "--remove-user"], "--remove-user wants the name of an account"),
        ):
            with self.subTest(arguments):
                done = self.install(*arguments)
                self.assertEqual((done.returncode, done.stdout), (2, ""), done)
                self.assertEqual(done.stderr, f"install.sh: {reason}; install.sh --help shows the usage\n")
        self.assertEqual(self.tree(), before)

    def test_a_root_that_is_not_there_is_refused(self) -> None:
        self.check_refused("no directory /no/such", "--root", "/no/such")


class OutsideTest(InstallCase):
    """Whatever is in the image: nothing beside it is touched, and what is called installed is."""

    def test_the_name_of_a_temporary_file_may_be_taken(self) -> None:
        for name in (PROGRAM, UNIT, PRESET):
            self.link(self.outside + "/victim", name + ".new")
        self.check_installed()
        for name in (PROGRAM, UNIT, PRESET):
            os.unlink(self.path(name + ".new"))
        self.check_whole()

    def test_a_link_in_place_of_a_file_is_not_followed(self) -> None:
        for name in (PROGRAM, UNIT, PRESET):
            for target in ("/directory", "/victim", "/missing"):
                with self.subTest(name, target=target):
                    self.setUp()
                    self.link(self.outside + target, name)
                    self.check_refused_but_for_force("somebody changed /" + name)

    def test_a_link_in_place_of_the_link_is_not_followed(self) -> None:
        for target in ("/directory", "/victim", "/missing"):
            with self.subTest(target):
                self.setUp()
                self.link(self.outside + target, WANTS)
                self.check_refused_but_for_force("somebody changed /" + WANTS)

    def test_what_is_neither_file_nor_link_is_refused_whatever_is_said(self) -> None:
        for name in (PROGRAM, UNIT, PRESET, WANTS):
            for make in (os.mkdir, os.mkfifo):
                with self.subTest(name, make=make):
                    self.setUp()
                    make(self.path(name))
                    self.check_refused("remove it", "--force")

    def test_a_file_in_place_of_the_link_is_refused(self) -> None:
        self.write(WANTS, "[Unit]\n")
        self.check_refused_but_for_force("somebody changed /" + WANTS)

    def test_a_directory_that_is_a_link_out_of_the_image_is_refused_whatever_is_said(self) -> None:
        os.makedirs(self.path("opt/sbin"))
        for name in ("usr/local/sbin", "usr/local", "etc/systemd/system-preset", os.path.dirname(WANTS)):
            # Absolute links are this machine's, and one to itself is nobody's.
            for target in (
                self.outside,
                "/opt/sbin",
                "/missing",
                "../../../../../../../../tmp",
                os.path.basename(name),
            ):
                for action in ([], ["--uninstall"]):
                    with self.subTest(name, target=target, action=action):
                        if os.path.islink(self.path(name)):
                            os.unlink(self.path(name))
                        elif os.path.isdir(self.path(name)):
                            shutil.rmtree(self.path(name))
                        self.link(target, name)
                        before = self.tree()
                        done = self.install(*action, "--force")
                        self.assertEqual((done.returncode, done.stdout), (1, ""), done)
                        self.assertIn(f"is out of reach in {self.root}: /{name} is no directory in it", done.stderr)
                        self.assertEqual(self.tree(), before)
            os.unlink(self.path(name))
            os.mkdir(self.path(name))

    def test_what_is_enabled_outside_is_not_looked_at(self) -> None:
        os.makedirs(self.outside + "/x.target.wants")
        os.symlink("/x", self.outside + "/x.target.wants/waagent.service")
        self.write("usr/lib/systemd/system/waagent.service", "[Service]\n")
        self.link(self.outside + "/x.target.wants", "etc/systemd/system/x.target.wants")
        self.check_installed()

    def test_a_parent_that_is_no_directory_is_refused(self) -> None:
        for name in ("usr/local", "usr/local/sbin"):
            with self.subTest(name):
                self.setUp()
                shutil.rmtree(self.path(name))
                self.write(name)
                self.check_refused(f"/{name} is no directory")

    def test_a_machine_without_proc_installs(self) -> None:
        for _ in range(2):
            done = self.install(first="mount -t tmpfs tmpfs /proc")
            self.assertEqual((done.returncode, done.stderr), (0, ""), done)

    def test_all_reasons_are_told_at_once(self) -> None:
        os.unlink(self.path("usr/bin/python3"))
        os.mkdir(self.path(PROGRAM))
        self.write(UNIT, "[Service]\n")
        done = self.install()
        self.assertEqual(len(re.findall(r"(?m)^install\.sh: .*; nothing was changed$", done.stderr)), 3, done)

    def test_what_it_comes_with_must_be_there(self) -> None:
        for missing in ("azure_provisioning.py", "azure-provisioning.service"):
            with self.subTest(missing):
                self.setUp()
                away = os.path.join(self.directory, "copy of it")
                os.mkdir(away)
                for name in ("install.sh", "azure_provisioning.py", "azure-provisioning.service"):
                    if name != missing:
                        shutil.copy(os.path.join(sandbox.REPOSITORY, name), away)
                before = self.tree()
                done = self.install(installer="copy of it/install.sh")
                self.assertEqual((done.returncode, done.stdout), (1, ""), done)
                self.assertIn(f"no {missing} beside install.sh", done.stderr)
                self.assertEqual(self.tree(), before)
                shutil.copy(os.path.join(sandbox.REPOSITORY, missing), away)
                self.assertEqual(self.install(installer="copy of it/install.sh").returncode, 0)
                self.check_whole()

    def test_a_full_disk_is_no_installed_program(self) -> None:
        small = f"mount -t tmpfs -o size=8k tmpfs '{self.root}/usr/local/sbin'"
        done = self.install(first=small)
        self.assertNotEqual(done.returncode, 0)
        self.assertEqual(done.stdout, "")
        self.assertIn("half-way", done.stderr)
        self.assertNotIn(WANTS, self.tree())

    def test_a_tool_that_fails_is_no_installed_program(self) -> None:
        for tool in ("cksum", "sed", "cat", "mktemp", "mv", "chmod", "mkdir", "ln"):
            with self.subTest(tool):
                self.setUp()
                shutil.rmtree(self.path("usr/local"))
                failing = f"mkdir /run/bin; ln -s {shutil.which('false')} /run/bin/{tool}; PATH=/run/bin:$PATH"
                done = self.install(first=failing)
                self.assertNotEqual(done.returncode, 0, done)
                self.assertEqual(done.stdout, "")
                self.assertNotIn(WANTS, self.tree())
                self.assertEqual([name for name in self.tree() if name.startswith((UNIT + ".", PROGRAM + "."))], [])

    def test_directories_are_not_writable_for_everybody(self) -> None:
        shutil.rmtree(self.path("usr/local"))
        shutil.rmtree(self.path("etc/systemd/system"))
        self.assertEqual(self.install(shell=("sh", "-c", 'umask 000; exec sh "$@"', "sh")).returncode, 0)
        self.check_whole()
        for name in self.tree():
            if name.startswith(("usr/local", "etc/systemd")) and name != WANTS:
                self.assertEqual(os.stat(self.path(name)).st_mode & 0o022, 0, name)

    def test_a_root_is_a_directory_whatever_its_name(self) -> None:
        for name in ("-P", "-", "image\n", "a\nb\n\n", "*", "--", "plain"):
            for directory in ("", "./", "{}/"):
                with self.subTest(directory + name):
                    self.setUp()
                    for similar in {name + "x", name.rstrip("\n")} - {name}:
                        os.mkdir(os.path.join(self.directory, similar))
                    os.rename(self.root, os.path.join(self.directory, name))
                    self.root = os.path.join(self.directory, name)
                    done = self.install(root=directory.format(self.directory) + name, OLDPWD=self.outside)
                    self.assertEqual((done.returncode, done.stderr), (0, ""), done)
                    self.check_whole()

    def test_cdpath_is_not_searched(self) -> None:
        os.rename(self.root, os.path.join(self.directory, "image"))
        self.root = os.path.join(self.directory, "image")
        os.mkdir(os.path.join(self.outside, "image"))
        done = self.install(root="image", installer=os.path.relpath(INSTALL, self.directory), CDPATH=self.outside)
        self.assertEqual((done.returncode, done.stderr), (0, ""), done)
        self.check_whole()


class UserTest(InstallCase):
    """With --user the unit creates the user, too, by a drop-in; without it the unit is as it always was."""

    def setUp(self) -> None:
        super().setUp()
        self.program("usr/sbin/useradd")

    def test_user_adds_a_drop_in_and_nothing_else(self) -> None:
        self.check_installed()
        before = self.tree()
        done = self.install("--user")
        self.assertEqual((done.returncode, done.stderr), (0, ""), done)
        self.assertRegex(done.stdout, r"\Ainstalled and enabled in .*: .*creates the user\n\Z")
        after = self.tree()
        self.assertEqual(set(after) - set(before), {USER, os.path.dirname(USER)})
        self.assertEqual({name: after[name][:2] for name in before}, self.entries(before))
        self.assertEqual(after[USER][0], 0o100644)
        self.assertEqual(self.install("--user").returncode, 0)
        self.assertEqual(self.entries(), self.entries(after))
        self.assertEqual(self.install("--uninstall").returncode, 0)
        self.assertEqual({name for name in self.tree() if "azure-provisioning" in name}, set())

    def test_without_user_the_drop_in_goes_and_that_is_said(self) -> None:
        self.check_installed()
        before = self.tree()
        self.assertEqual(self.install("--user").returncode, 0)
        done = self.install()
        self.assertEqual((done.returncode, done.stderr), (0, ""), done)
        self.assertIn(f"removed /{USER}, ", done.stdout)
        self.assertEqual(self.entries(), self.entries(before))
        self.assertNotIn("removed", self.install().stdout)

    def test_the_drop_in_runs_the_step_and_disarms_itself_as_the_unit_does(self) -> None:
        self.assertEqual(self.install("--user").returncode, 0)
        commands = [re.findall(r"(?m)^ExecStart=(.*)", str(self.tree()[name][1])) for name in (UNIT, USER)]
        self.assertEqual(commands[1], ["", commands[0][0] + " hostname user ready", *commands[0][1:]])

    def test_what_somebody_else_says_is_kept(self) -> None:
        name = os.path.dirname(USER) + "/budget.conf"
        self.write(name, "[Service]\nExecStart=\nExecStart=/usr/local/sbin/azure-provisioning --timeout 300\n")
        before = self.tree()
        done = self.install("--user")
        self.assertEqual(done.returncode, 0)
        self.assertRegex(done.stderr, rf"\Ainstall\.sh: /{name} says .* without the step user.*\n\Z")
        self.assertEqual(self.install("--uninstall").returncode, 0)
        self.assertEqual(self.tree()[name], before[name])

    def test_an_edited_drop_in_is_refused(self) -> None:
        self.assertEqual(self.install("--user").returncode, 0)
        self.write(USER, str(self.tree()[USER][1]) + "# edited\n")
        for more in ([], ["--user"]):
            self.check_refused(f"somebody changed /{USER}.*--force", *more)
        done = self.install("--force")
        self.assertIn("took away /" + USER, done.stderr)
        self.assertNotIn(USER, self.tree())

    def test_nothing_that_creates_users_is_refused(self) -> None:
        os.unlink(self.path("usr/sbin/useradd"))
        self.check_refused("no useradd in", "--user")
        self.check_installed()

    def test_user_is_for_an_install_alone(self) -> None:
        for action in ("--uninstall", "--generalize"):
            self.assertEqual(self.install(action, "--user").returncode, 2)
        self.assertEqual(self.install("--uninstall", "--generalize").returncode, 2)


class OthersTest(InstallCase):
    """What somebody else put there, or made of it, is not lost without a word."""

    def test_an_edited_file_is_refused(self) -> None:
        for name in (PROGRAM, UNIT, PRESET):
            for edit in ("# edited\n{}", "{}# edited\n", "", "something else\n"):
                with self.subTest(name, edit=edit):
                    self.setUp()
                    self.check_installed()
                    text = str(self.tree()[name][1])
                    self.write(name, edit.format(text))
                    self.check_refused_but_for_force("somebody changed /" + name)

    def test_what_a_power_cut_left_of_a_file_is_not_taken_for_ours(self) -> None:
        for name in (PROGRAM, UNIT, PRESET):
            for place in (slice(9, 9), slice(-9, -9), slice(-9, None), slice(1 << 20, None)):
                with self.subTest(name, place=place):
                    self.setUp()
                    self.check_installed()
                    text = [*str(self.tree()[name][1])]
                    text[place] = "\0" * 9
                    self.write(name, "".join(text))
                    self.check_refused_but_for_force("somebody changed /" + name)

    def test_a_machine_without_a_tool_is_refused(self) -> None:
        tools = self.directory + "/tools"
        os.mkdir(tools)
        for tool in ("cat", "cut", "find", "grep", "id", "mktemp", "readlink", "sed", "sh", "stat", "tail", "tr"):
            os.symlink(str(shutil.which(tool)), f"{tools}/{tool}")
        for action in ([], ["--uninstall"]):
            done = self.install(*action, shell=("env", "PATH=" + tools, "sh"))
            self.assertEqual((done.returncode, done.stdout), (1, ""))
            self.assertEqual(done.stderr, "install.sh: this machine has no cksum; nothing was changed\n")

    def test_a_mask_is_refused(self) -> None:
        self.check_installed()
        os.unlink(self.path(UNIT))
        self.link("/dev/null", UNIT)
        self.check_refused_but_for_force("azure-provisioning.service is masked in")

    def test_another_version_of_ours_is_replaced(self) -> None:
        away = os.path.join(self.directory, "older")
        os.mkdir(away)
        for name in ("install.sh", "azure_provisioning.py", "azure-provisioning.service"):
            shutil.copy(os.path.join(sandbox.REPOSITORY, name), away)
            if not name.endswith(".sh"):
                with open(os.path.join(away, name), "a", encoding="utf-8") as file:
                    file.write("# as it was\n")
        done = self.install(installer=os.path.join(away, "install.sh"))
        self.assertEqual((done.returncode, done.stderr), (0, ""), done)
        self.assertIn("# as it was", str(self.tree()[UNIT][1]))
        self.check_installed()
        self.check_whole()

    def test_a_wrong_owner_or_mode_is_put_right(self) -> None:
        self.check_installed()
        os.chmod(self.path(PROGRAM), 0o777)
        if os.geteuid() == 0:
            os.chown(self.path(PROGRAM), 1234, 1234)
        self.check_installed()
        self.check_whole()
        self.assertEqual(os.stat(self.path(PROGRAM)).st_uid, os.geteuid())

    def test_a_neighbour_whose_name_begins_as_the_root_s_is_not_written_to(self) -> None:
        neighbour = self.root + "2/sbin"
        os.makedirs(neighbour)
        os.rmdir(self.path("usr/local/sbin"))
        self.link(neighbour, "usr/local/sbin")
        self.check_refused("/usr/local/sbin is no directory in it", "--force")
        self.assertEqual(os.listdir(neighbour), [])

    def test_uninstall_of_nothing_says_so(self) -> None:
        before = self.tree()
        done = self.install("--uninstall")
        self.assertEqual((done.returncode, done.stdout), (0, f"nothing of it is installed in {self.root}\n"), done)
        self.assertEqual(self.tree(), before)

    def test_uninstall_leaves_what_is_not_ours_and_says_so(self) -> None:
        self.check_installed()
        self.write(PROGRAM, "#!/bin/false\n")
        self.write(UNIT, str(self.tree()[UNIT][1]) + "# edited\n")
        for name in (PRESET, WANTS):
            os.unlink(self.path(name))
            self.link("/dev/null", name)
        before = self.tree()
        done = self.install("--uninstall")
        self.assertEqual(done.returncode, 0, done)
        for name in OURS:
            self.assertIn(f"left /{name}, ", done.stderr)
        self.assertEqual(self.tree(), before)
        done = self.install("--uninstall", "--force")
        for name in OURS:
            self.assertIn(f"took away /{name}, ", done.stderr)
        self.assertEqual(OURS & set(self.tree()), set())

    def test_uninstall_of_what_cannot_be_written_is_refused(self) -> None:
        self.check_installed()
        reason = f"/{PROGRAM} cannot be written in .*: run chattr -i for it"
        self.check_refused(reason, "--uninstall", first=self.bind(PROGRAM))

    def test_uninstall_leaves_a_link_in_place_of_a_unit(self) -> None:
        self.link("/opt/mine/azure-provisioning.service", UNIT)
        done = self.install("--uninstall")
        self.assertIn(f"left /{UNIT}, ", done.stderr)
        self.assertIn(UNIT, self.tree())

    def test_uninstall_leaves_a_directory_that_has_the_name_of_a_file(self) -> None:
        for name in OURS:
            os.mkdir(self.path(name))
        before = self.tree()
        for force in ([], ["--force"]):
            done = self.install("--uninstall", *force)
            self.assertEqual((done.returncode, done.stderr.count(": left /")), (0, 4), done)
            self.assertEqual(self.tree(), before)

    def test_what_an_image_is_called_cannot_command_the_terminal(self) -> None:
        os.rename(self.root, self.root + "\x1b[2J\n")
        self.root += "\x1b[2J\n"
        done = self.install()
        self.assertRegex(done.stdout, r"\Ainstalled and enabled in [ -~]*: it runs at the next boot\n\Z")


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
