"""From nothing to a VM on Azure, and from that VM to an image and to another VM, by the commands of the README.

On a real Azure this runs only if AZURE_PROVISIONING_AZURE names a resource group, which is made and deleted: as root,
with az (logged in), azcopy, ssh and what the recipe needs. It makes two VMs of Azure's default size, for half an hour.

Without that, it runs against stand-ins; and if AZURE_PROVISIONING_AZ is set, Azure's own command line is asked whether
it takes each command that was run.
"""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import unittest
from typing import Dict, Iterable, List, Tuple

from tests import fake_az, sandbox
from tests.test_recipe import recipe
from tests.vm import readme_block, readme_blocks, wait_for

GROUP_VARIABLE = "AZURE_PROVISIONING_AZURE"
AZ_VARIABLE = "AZURE_PROVISIONING_AZ"
USER = "alice"
VM_SHOW, GROUP_EXISTS, GROUP_DELETE = ["az", "vm", "show"], ["az", "group", "exists"], ["az", "group", "delete"]
VHD_SIZE = 2147484160  # 2 GiB and a footer

UNPACK = "cd /dev/shm; tar -x"

# Deletes the resource group once its standard input ends, as it does when we end, however that comes about.
JANITOR = 'cat; [ "$(az group exists -n "$1")" = false ] || exec az group delete -n "$1" --yes'


class Journey:
    """The whole way, in a resource group of its own, with the programs that environment leads to."""

    patience = 120.0  # for a login, once Azure says that the VM is ready

    def __init__(self, group: str, environment: Dict[str, str], make: str) -> None:
        """Make is the commands that make build/azure.vhd; without them the builder is a Marketplace VM."""
        self.group = group
        self.environment = environment
        self.make = make

    def sh(self, commands: str, check: bool = True) -> str:
        """Run commands of the shell in a copy of the checkout, and return what they print."""
        done = subprocess.run(
            ["sh", "-euc", commands],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            env=self.environment,
            cwd=self.directory,
            check=False,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"status {done.returncode}: {commands}\n{done.stdout}{done.stderr}")
        return done.stdout.strip()

    def run_block(self, *commands: str) -> None:
        """Run the README's block in which all of commands are: in our group, with our key, and without logging in."""
        text = re.sub(r"(?m)^(ssh|scp) .*\n", "", readme_block(*commands)).replace("~/.ssh/id_ed25519", "key")
        self.sh(re.sub("( -g|az group create -n) web ", rf"\1 {self.group} ", text))

    def ask_azure(self, vm: str, key: str) -> str:
        return self.sh(f"az vm show -d -g {self.group} -n {vm} --query {key} -o tsv")

    def ssh(self, vm: str, command: str, feed: str = "", check: bool = True, user: str = USER) -> str:
        """Run command in vm as user, fed by the shell's feed."""
        options = "-F none -i key -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
        address = self.ask_azure(vm, "publicIps")
        return self.sh(f"{feed} ssh {options} {user}@{address} {shlex.quote(command)}", check)

    def check_vm(self, vm: str) -> None:
        """The VM is called vm, there and in Azure's DNS, and its unit is done."""
        name = wait_for(f"a login to {vm}", lambda: self.ssh(vm, "uname -n", check=False), self.patience)
        resolved = self.ssh(vm, f"resolvectl query --synthesize=no --legend=no {vm}")
        journal = self.ssh(vm, "sudo -n journalctl --unit=azure-provisioning --output=cat")
        enabled = self.ssh(vm, "systemctl is-enabled azure-provisioning || :")
        print(f"{vm}: {name}, {enabled}, {resolved}\n{journal}", flush=True)
        if (name, enabled) != (vm, "disabled") or "reported Ready to " not in journal:
            raise AssertionError(f"{vm} is not provisioned")
        if self.ask_azure(vm, "privateIps") not in resolved:
            raise AssertionError(f"Azure's DNS does not know {vm}")

    def go(self) -> None:
        """Go all the way, and delete all that was made on it, however it ends."""
        with tempfile.TemporaryDirectory() as self.directory:
            if self.sh(f"az group exists -n {self.group} -o tsv") != "false":
                raise AssertionError(f"there is a resource group {self.group}: name one that there is not")
            janitor = subprocess.Popen(
                ["sh", "-c", JANITOR, "sh", self.group],
                stdin=subprocess.PIPE,
                env=self.environment,
                start_new_session=True,
            )
            try:
                self.steps()
            finally:
                janitor.communicate()
        if janitor.returncode != 0:
            raise AssertionError(f"the resource group {self.group} is left: delete it")

    def steps(self) -> None:
        product = "install.sh azure_provisioning.py azure-provisioning.service"
        self.sh(f"cd {shlex.quote(sandbox.REPOSITORY)}; cp {product} README.md {self.directory}")
        self.sh("ssh-keygen -q -t ed25519 -N '' -C '' -f key")
        if self.make:
            self.sh(self.make)
            self.run_block("az disk create")
            self.check_vm("builder")
            self.ssh("builder", f"{UNPACK}; sudo -n ./install.sh --generalize", feed=f"tar -c {product} |")
        else:
            self.run_block("az vm create", "azureuser")
            # The connection ends with the machine, and so with an error.
            commands = UNPACK + "\n" + readme_block("--remove-user azureuser")
            self.ssh("builder", commands, feed=f"tar -c {product} |", check=False, user="azureuser")
        self.run_block("az sig create", "--gallery-image-definition web")
        self.run_block("az vm generalize")
        self.run_block("az vm create", "-n web-01")
        self.check_vm("web-01")


@unittest.skipUnless(os.environ.get(GROUP_VARIABLE), f"a subscription: {GROUP_VARIABLE}=RESOURCE_GROUP")
class AzureTest(unittest.TestCase):
    """The real Azure."""

    def test_from_nothing_to_a_vm_of_an_image_of_a_vm(self) -> None:
        Journey(os.environ[GROUP_VARIABLE], sandbox.environment(), recipe()).go()

    def test_from_a_marketplace_vm_to_a_vm_of_its_image(self) -> None:
        Journey(os.environ[GROUP_VARIABLE], sandbox.environment(), "").go()


class StandInCase(unittest.TestCase):
    """The same way, with stand-ins for what would reach Azure."""

    def setUp(self) -> None:
        self.directory = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.directory)
        for name in ("az", "azcopy", "scp", "ssh"):
            path = os.path.join(self.directory, name)
            with open(path, "w", encoding="utf-8") as file:
                program = " ".join(map(shlex.quote, [sys.executable, fake_az.__file__, name]))
                file.write(f'#!/bin/sh\nexec {program} "$@"\n')
            os.chmod(path, 0o755)
        environment = sandbox.environment()
        self.environment = dict(environment, PATH=self.directory + ":" + environment["PATH"])
        self.environment[fake_az.DIRECTORY] = self.directory

    def go(self, make: str = f"mkdir build; truncate -s {VHD_SIZE} build/azure.vhd", **environment: str) -> None:
        journey = Journey("throwaway", dict(self.environment, **environment), make)
        journey.patience = 1
        with contextlib.redirect_stdout(io.StringIO()):  # it would tell of VMs that nobody made
            journey.go()

    def commands(self) -> List[List[str]]:
        with open(os.path.join(self.directory, "commands"), "a+", encoding="utf-8") as file:
            file.seek(0)
            return [json.loads(line) for line in file]

    def left(self) -> List[str]:
        with open(os.path.join(self.directory, "subscription"), encoding="utf-8") as file:
            return sorted(json.load(file))


class StandInTest(StandInCase):
    """What can be known of it without Azure."""

    def test_it_goes_all_the_way_and_leaves_nothing(self) -> None:
        self.go()
        self.assertEqual(self.left(), [])
        made = [command[-1] for command in self.commands() if command[:3] == ["az", "vm", "create"]]
        self.assertEqual(len(made), 2)

    def test_it_goes_from_the_marketplace_and_leaves_nothing(self) -> None:
        self.go(make="")
        self.assertEqual(self.left(), [])

    def test_it_runs_every_command_of_the_readme(self) -> None:
        self.go()
        run = [" ".join(command) + " " for command in self.commands()]
        for text in readme_blocks():
            for command in re.findall(r"\b(az [a-z][a-z -]*?|azcopy [a-z]+) (?=-|build)", text):
                self.assertTrue([line for line in run if line.startswith(command + " ")], command)

    def test_whatever_fails_it_leaves_nothing(self) -> None:
        for command in ("az group create", "azcopy", "az sig image-version create", "az vm create", "ssh", "az vm gen"):
            with self.subTest(command):
                with self.assertRaises(AssertionError):
                    self.go(**{fake_az.FAIL: command})
                self.assertEqual(self.left(), [])

    def test_a_group_that_there_is_stays(self) -> None:
        subprocess.run(["az", "group", "create", "-n", "throwaway", "-l", "here"], env=self.environment, check=True)
        with self.assertRaisesRegex(AssertionError, "there is a resource group throwaway"):
            self.go()
        self.assertEqual(self.left(), [fake_az.SUBSCRIPTION + "throwaway"])

    def test_a_run_that_is_killed_leaves_nothing(self) -> None:
        code = (
            "import os; from tests.test_azure import Journey; "
            f"Journey('throwaway', dict(os.environ), 'mkdir build; truncate -s {VHD_SIZE} build/azure.vhd').go()"
        )
        run = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", sys.executable, "-c", code],
            env=dict(self.environment, **{fake_az.HANG: "az sig create", "TMPDIR": self.directory}),
            cwd=sandbox.REPOSITORY,
        )
        wait_for(
            "a command that hangs", lambda: ["az", "sig", "create"] in [command[:3] for command in self.commands()], 30
        )
        run.kill()
        run.wait()
        wait_for("the janitor", lambda: not self.left(), 10)


@unittest.skipUnless(os.environ.get(AZ_VARIABLE), f"pip install azure-cli, and {AZ_VARIABLE}=1")
class CommandLineTest(StandInCase):
    """Azure's own command line."""

    def az(self, arguments: List[str]) -> str:
        environment = dict(
            sandbox.environment(), AZURE_CONFIG_DIR=self.directory + "/config", AZURE_CORE_COLLECT_TELEMETRY="no"
        )
        done = subprocess.run(
            ["az", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, check=False
        )
        return done.stdout.decode()

    def check(self, commands: Iterable[Tuple[str, ...]]) -> None:
        self.az(["version"])  # makes the index that the others read
        for command in sorted(set(commands)):
            with self.subTest(" ".join(command)):
                self.assertEqual(command[0], "az")
                self.assertIn("Please run 'az login'", self.az([*command[1:]]))

    def test_it_takes_every_command_of_the_readme_and_then_wants_a_login(self) -> None:
        os.mkdir(self.directory + "/build")
        with open(self.directory + "/build/azure.vhd", "wb") as file:
            file.truncate(VHD_SIZE)
        # Nothing but the stand-ins can be run by what the README says.
        os.symlink(shutil.which("stat") or "", self.directory + "/stat")
        environment = dict(self.environment, PATH=self.directory, **{fake_az.RECORD: "yes"})
        for text in readme_blocks():
            if "az " in text:
                subprocess.run(
                    ["/bin/sh", "-euc", text],
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    cwd=self.directory,
                    check=True,
                )
        commands = [tuple(command) for command in self.commands() if command[0] == "az"]
        self.assertGreater(len(commands), 14)
        self.check(commands)

    def test_it_takes_what_the_run_asks_beside_them(self) -> None:
        self.go()
        self.check(
            tuple(command) for command in self.commands() if command[:3] in (VM_SHOW, GROUP_EXISTS, GROUP_DELETE)
        )

    def test_it_refuses_an_argument_that_it_does_not_know(self) -> None:
        refusal = self.az(["vm", "deallocate", "-g", "web", "-n", "builder", "--no-such-argument"])
        self.assertIn("unrecognized arguments: --no-such-argument", refusal)


if __name__ == "__main__":
    unittest.main()
