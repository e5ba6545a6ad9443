"""The README is read once and believed: what it shows is what happens."""

import os
import re
import subprocess
import sys
import unittest

import azure_provisioning
from tests import sandbox, test_boot, test_machine


class ReadmeTest(unittest.TestCase):
    """What can be checked without a VM."""

    def setUp(self) -> None:
        with open(os.path.join(sandbox.REPOSITORY, "README.md"), encoding="utf-8") as file:
            self.text = file.read()

    def run_python(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            cwd=sandbox.REPOSITORY,
            check=True,
        )
        return done.stdout

    @unittest.skipIf(sandbox.impossible(), "no namespaces: MachineTest says why")
    def test_the_first_command_prints_what_it_shows(self) -> None:
        output = self.run_python("-m", "tests.sandbox")
        self.assertIn(f"```\n{output}```\n", self.text)

    def test_the_command_line_is_complete(self) -> None:
        usage = self.run_python(sandbox.PROGRAM, "--help")
        for option in re.findall(r"--[a-z-]+", usage):
            self.assertIn(option, self.text)
        self.assertIn("[--timeout SECONDS] [--fail REASON] [STEP ...]", self.text)

    def test_its_drop_in_runs_what_the_unit_runs(self) -> None:
        with open(os.path.join(sandbox.REPOSITORY, "azure-provisioning.service"), encoding="utf-8") as file:
            unit = re.findall(r"(?m)^ExecStart=.*", file.read())
        drop_in = re.findall(r"(?m)^ExecStart=.*", self.text)
        self.assertEqual(drop_in, ["ExecStart=", unit[0] + " --timeout 100", unit[1]])

    def test_its_figures_are_the_modules(self) -> None:
        module = azure_provisioning
        timeouts = module.WIRESERVER_TIMEOUT, module.IMDS_TIMEOUT, module.IMDS_TIMEOUT_FOR_USER
        told = "{:.0f} for WireServer and {:.0f} for IMDS otherwise, or {:.0f} with the step `user`".format(*timeouts)
        self.assertIn(told, self.text)

    def test_the_steps_are_named_in_their_order(self) -> None:
        steps = ", ".join(f"`{step}`" for step in azure_provisioning.STEPS)
        defaults = " and ".join(f"`{step}`" for step in azure_provisioning.Options.steps)
        self.assertIn(f"| `STEP` | {steps}, always in this order; {defaults} if none is given |", self.text)

    def test_every_option_of_the_installer_is_told(self) -> None:
        usage = subprocess.run(
            ["sh", os.path.join(sandbox.REPOSITORY, "install.sh"), "--root", "/no/such/image", "--help"],
            stdout=subprocess.PIPE,
            encoding="utf-8",
            check=True,
        ).stdout
        options = set(re.findall(r"--[a-z-]+", usage))
        self.assertLessEqual({"--user", "--generalize", "--uninstall", "--root", "--force"}, options)
        for option in options:
            self.assertIn(option, self.text)

    def test_it_wants_the_systemd_that_knows_the_units_filter(self) -> None:
        with open(os.path.join(sandbox.REPOSITORY, "azure-provisioning.service"), encoding="utf-8") as file:
            self.assertIn("SystemCallFilter=@system-service ", file.read())
        self.assertIn("systemd 239 or later", self.text)

    def test_the_limits_that_it_names_are_those_that_hold(self) -> None:
        module = azure_provisioning
        minutes = {120: "two minutes", 300: "five minutes"}
        pauses = {0.25: "a quarter of a second"}
        with open(os.path.join(sandbox.REPOSITORY, "install.sh"), encoding="utf-8") as file:
            host_keys = re.findall("(?m)^TimeoutStartSec=(.*)", file.read())
        self.assertEqual((module.ANSWER_LIMIT, len(host_keys)), (1 << 20, 1))
        said = " ".join(self.text.split())
        for sentence in (
            f"never waits on IMDS for more than {minutes[int(module.IMDS_TIMEOUT)]} (or "
            f"{minutes[int(module.IMDS_TIMEOUT_FOR_USER)]}, if a user was asked for), nor on any command for more than "
            f"{module.COMMAND_LIMIT:g} s, nor on the DHCP client, its answer or the network after it for more than "
            f"{module.RENEWAL_LIMIT:g} each (twice that ",
            f"nor on SSH host keys for more than {minutes[int(host_keys[0])]} (",
            f"One request takes {module.REQUEST_LIMIT:g} s at most and 1 MiB of each answer. Pauses start at "
            f"{pauses[module.FIRST_PAUSE]}, double up to {module.LONGEST_PAUSE:g} s, vary by chance, and honour "
            f"`Retry-After` up to {module.LONGEST_RETRY_AFTER:g} s.",
            f"refuses the document with 400 for {module.OLD_IMDS_AFTER:g} s",
            f"it keeps trying for {module.WIRESERVER_TIMEOUT / 60:g} minutes",
            "it is asked up to two times",
        ):
            self.assertIn(sentence, said)

    def test_the_messages_that_it_explains_are_the_modules(self) -> None:
        with open(sandbox.PROGRAM, encoding="utf-8") as file:
            module = file.read()
        for message in (
            "no complete answer within",
            "gave up after",
            " failed: ",
            "the VM was created without an SSH key for",
            "not an SSH key, which is a line of a .pub file; left out: ",
            "found no DHCP lease to renew",
            "can log in, SSH keys: ",
        ):
            self.assertIn(message, module)
            self.assertIn(message, self.text)

    def test_nothing_in_it_is_still_to_be_filled_in(self) -> None:
        self.assertEqual(re.findall(r"\b(?:TODO|FIXME|XXX|[A-Z]*SCORE)\b", self.text), [])

    def test_it_tells_how_to_boot(self) -> None:
        self.assertIn(f"sudo {test_boot.VARIABLE}=1 python3 -m unittest tests.test_boot", self.text)
        self.assertIn(f"sudo {test_machine.VARIABLE}=1 python3 -m unittest tests.test_machine", self.text)

    def test_every_file_is_where_it_belongs(self) -> None:
        made = (".", "__", "build", "azure_provisioning.egg-info")
        top = {name for name in os.listdir(sandbox.REPOSITORY) if not name.startswith(made)}
        self.assertEqual(
            top,
            {
                "README.md",
                "azure-provisioning.service",
                "azure_provisioning.py",
                "install.sh",
                "pyproject.toml",
                "tests",
            },
        )


if __name__ == "__main__":
    unittest.main()
