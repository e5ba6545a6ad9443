"""The program as it is shipped, run in the sandbox: a VM whose WireServer and IMDS are at their real addresses."""

import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from typing import Any, Dict, List, Optional, Sequence

from tests import sandbox

PROGRAM = [sys.executable, "-IS", sandbox.PROGRAM]
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl alice"
SETHOSTNAME = f"{sys.executable} -c 'import socket, sys; socket.sethostname(sys.argv[1])'"


# The sandbox has no DHCP: what the module says of it, once it has changed the name.
NO_LEASE = (
    "found no DHCP lease to renew on a default route; "
    "for other machines to resolve {}, restart the DHCP client, or reboot\n"
)


class Result:
    """What a run in the sandbox came to."""

    def __init__(self, done: "subprocess.CompletedProcess[bytes]", seen: Dict[str, Any]) -> None:
        self.status = done.returncode
        self.stdout = done.stdout.decode()
        self.stderr = done.stderr.decode()
        self.seen = seen

    def __str__(self) -> str:
        return f"status {self.status}\n{self.stdout}\n{self.stderr}\n{json.dumps(self.seen, indent=1)}"


class SandboxCase(unittest.TestCase):
    """Runs the sandbox, and sees to it that the machine stays as it is."""

    @classmethod
    def setUpClass(cls) -> None:
        if sandbox.impossible():
            raise unittest.SkipTest("no namespaces: MachineTest says why")

    def setUp(self) -> None:
        self.directory = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.directory)
        self.machine = self.look_at_the_machine()

    def tearDown(self) -> None:
        self.assertEqual(self.look_at_the_machine(), self.machine)

    @staticmethod
    def look_at_the_machine() -> List[Any]:
        # What else changes meanwhile is others' business.
        files = [(path, os.lstat(path).st_mtime_ns) for path in glob.glob("/etc/host*")]
        mounts = sandbox.mounts("/", "/dev", "/etc", "/home", "/run", "/var", "/var/run")
        return [os.uname().nodename, sorted(files), mounts]

    def vm(self, *arguments: str, options: Sequence[str] = (), script: Optional[Dict[str, Any]] = None) -> Result:
        """Run the program with arguments in a VM that options describe, on an Azure that misbehaves by script."""
        return self.vm_command(*PROGRAM, *arguments, options=options, script=script)

    def vm_command(self, *command: str, options: Sequence[str] = (), script: Optional[Dict[str, Any]] = None) -> Result:
        """Run command in the VM."""
        seen = os.path.join(self.directory, "seen")
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "tests.sandbox",
                "--json",
                seen,
                "--script",
                json.dumps(script or {}),
                *options,
                *command,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=sandbox.REPOSITORY,
            check=False,
            timeout=60,
        )
        with open(seen, encoding="utf-8") as file:
            return Result(done, json.loads(file.read() or "{}"))

    def check_ready(self, result: Result, host_name: str = "web-01") -> None:
        self.assertEqual(
            [report["state"] for report in result.seen["reports"] if report["accepted"]], ["Ready"], result
        )
        self.assertEqual(result.seen["host_name"], host_name, result)
        self.assertEqual(result.seen["etc_hostname"], host_name + "\n", result)
        self.assertNotIn("Traceback", result.stderr, result)


class MachineTest(unittest.TestCase):
    """What a machine has to allow for most of the tests to run."""

    def test_this_user_may_make_namespaces_here(self) -> None:
        if sandbox.impossible():
            self.fail(sandbox.impossible())


class MainJobTest(SandboxCase):
    """From the image's name and silence to the VM's name and Ready."""

    def test_the_first_command_of_the_readme_provisions_in_under_two_seconds(self) -> None:
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "tests.sandbox"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=sandbox.REPOSITORY,
            check=False,
        )
        self.assertLess(time.monotonic() - started, 2)
        self.assertEqual(done.returncode, 0, done)
        output = done.stdout.decode()
        self.assertRegex(output, r"(?m)^  Ready for container \S+, incarnation 3: accepted$")
        self.assertRegex(output, r"(?m)^  web-01  \(/etc/hostname: web-01\)$")

    def test_the_vm_is_named_and_then_ready(self) -> None:
        result = self.vm()
        self.assertEqual(result.status, 0, result)
        self.check_ready(result)
        self.assertEqual(
            [(request["service"], request["method"]) for request in result.seen["requests"]],
            [("imds", "GET"), ("wireserver", "GET"), ("wireserver", "POST")],
        )
        self.assertEqual(
            result.seen["etc_hosts"], "127.0.0.1\tlocalhost\n127.0.1.1\tweb-01.example.com web-01\n", result
        )
        self.assertEqual(
            result.stdout.splitlines(),
            [
                "set the host name to web-01, it was image",
                "renamed 127.0.1.1 in /etc/hosts to web-01",
                "reported Ready to 168.63.129.16, incarnation 3",
            ],
        )

    def test_nothing_is_left_in_etc(self) -> None:
        before = self.vm_command("true").seen["etc"]
        self.assertEqual(self.vm().seen["etc"], before)

    def test_a_vm_that_has_its_name_is_not_touched(self) -> None:
        # An immutable directory would be better, but a user namespace may not have one.
        look = "stat -c '%i %y' /etc /etc/hostname /etc/hosts"
        hosts = "127.0.1.1 web-01\n"
        result = self.vm_command(
            "sh",
            "-c",
            f'a=$({look}); "$@" || exit; b=$({look}); [ "$a" = "$b" ]',
            "sh",
            *PROGRAM,
            options=["--host-name", "web-01", "--hosts", hosts],
        )
        self.assertEqual(result.status, 0, result)
        self.assertIn("the host name is web-01 already\n", result.stdout)
        self.assertEqual(result.stderr, "")
        self.check_ready(result)

    def test_a_second_run_finds_all_as_wanted(self) -> None:
        result = self.vm_command("sh", "-c", '"$@" && "$@"', "sh", *PROGRAM)
        self.assertEqual(result.status, 0, result)
        self.assertIn("the host name is web-01 already\n", result.stdout)

    def test_the_line_in_etc_hosts_follows_by_itself(self) -> None:
        result = self.vm(options=["--host-name", "web-01"])
        self.assertIn("127.0.1.1\tweb-01.example.com web-01\n", result.seen["etc_hosts"])

    def test_no_etc_hosts_is_made(self) -> None:
        result = self.vm(options=["--no-hosts"])
        self.check_ready(result)
        self.assertIsNone(result.seen["etc_hosts"], result)

    def test_the_resource_name_is_made_a_host_name(self) -> None:
        result = self.vm(options=["--computer-name", "", "--name", "_scale_set_7"])
        self.assertEqual(result.status, 0, result)
        self.check_ready(result, "scale-set-7")

    def test_a_name_for_the_shell_is_not_given_to_one(self) -> None:
        result = self.vm(options=["--computer-name", "$(touch /etc/x)`touch /etc/x`;touch /etc/x"])
        self.check_ready(result, "touch--etc-x--touch--etc-x--touch--etc-x")
        self.assertNotIn("x", result.seen["etc"])


class NmcliTest(SandboxCase):
    """NetworkManager is told the name by nmcli; if that is missing or fails, the module sets it."""

    def vm_with_nmcli(self, program: Optional[str]) -> Result:
        """Run the program with a PATH on which nmcli is this text, or nothing."""
        if program is not None:
            path = os.path.join(self.directory, "nmcli")
            with open(path, "w", encoding="utf-8") as file:
                file.write(program)
            os.chmod(path, 0o755)
        os.chmod(self.directory, 0o755)
        path = 'PATH=$0:$PATH; [ -e "$0/nmcli" ] || PATH=$0; exec "$@"'
        return self.vm_command("sh", "-c", path, self.directory, *PROGRAM)

    def test_nmcli_gets_the_name_as_one_argument(self) -> None:
        result = self.vm_with_nmcli('#!/bin/sh\necho "$#:$*" >/proc/$PPID/fd/2; exit 1\n')
        self.assertIn("3:general hostname web-01\n", result.stderr)

    def test_the_name_is_set_by_nmcli_and_without_it(self) -> None:
        for situation, program in {
            "enough": f'#!/bin/sh\necho "$3" >/etc/hostname; {SETHOSTNAME} "$3"\n',
            "missing": None,
            "fails": "#!/bin/sh\necho 'NetworkManager is not running.' >&2\nexit 8\n",
            "does nothing": "#!/bin/sh\n",
            "sets the kernel's name only": f'#!/bin/sh\n{SETHOSTNAME} "$3"\n',
        }.items():
            with self.subTest(situation):
                result = self.vm_with_nmcli(program)
                self.assertEqual((result.status, result.stderr), (0, NO_LEASE.format("web-01")), result)
                self.check_ready(result)

    def test_a_name_that_cannot_be_set_is_an_error_and_ready_is_reported(self) -> None:
        read_only = 'mkdir /etc/x && mount --bind /etc /etc && mount -o remount,bind,ro /etc && "$@"'
        result = self.vm_command("sh", "-c", read_only, "sh", *PROGRAM)
        self.assertEqual(result.status, 1, result)
        self.assertEqual([report["state"] for report in result.seen["reports"]], ["Ready"])
        self.assertEqual(result.seen["etc_hostname"], "image\n")
        failure, last = result.stderr.splitlines()
        self.assertRegex(failure, r"^hostname failed: write /etc/\w+: .*Read-only file system")
        self.assertRegex(last, "^Azure was told Ready; .* at the next boot$")
        self.assertNotIn("Traceback", result.stderr)


class DiskTest(SandboxCase):
    """What stands where a file should, or where one is to be written, hinders nothing for long and leads nowhere."""

    def vm_after(self, preparation: str, check: str = "", **more: Any) -> Result:
        """Run the program after a preparation in the VM's /etc, and then a check, whose failure is status 99."""
        code = f'cd /etc && {preparation} && {{ s=0; "$@" || s=$?; {check or ":"} || exit 99; exit $s; }}'
        return self.vm_command("sh", "-euc", code, "sh", *PROGRAM, **more)

    def test_a_fifo_in_place_of_etc_hosts_is_an_error_and_ready_is_reported(self) -> None:
        result = self.vm_after("rm hosts && mkfifo hosts", "[ -p hosts ] && rm hosts")
        self.assertEqual(result.status, 1, result)
        self.check_ready(result)
        self.assertIn("hostname failed: read /etc/hosts: not a regular file\n", result.stderr)

    def test_a_directory_in_place_of_etc_hosts_is_an_error_and_ready_is_reported(self) -> None:
        result = self.vm_after("rm hosts && mkdir hosts", "rmdir hosts")
        self.assertEqual(result.status, 1, result)
        self.check_ready(result)
        self.assertRegex(result.stderr, "hostname failed: read /etc/hosts: .*Is a directory")

    def test_a_file_without_end_is_an_error_and_ready_is_reported(self) -> None:
        result = self.vm_after("ulimit -v 1000000; truncate -s 2G hosts hostname", "rm hosts")
        self.assertEqual(result.status, 1, result)
        self.check_ready(result)
        self.assertIn("hostname failed: read /etc/hosts: more than 4194304 characters\n", result.stderr)

    def test_what_is_no_file_in_place_of_etc_hostname_is_an_error_and_ready_is_reported(self) -> None:
        for way in ("mkfifo", "ln -s /dev/null"):
            result = self.vm_after(f"rm hostname && {way} hostname", "[ ! -f hostname ]")
            self.assertEqual(result.status, 1, result)
            self.assertEqual([report["state"] for report in result.seen["reports"]], ["Ready"])
            self.assertRegex(result.stderr, "hostname failed: write /(etc/hostname|dev/null): not a regular file\n")

    def test_what_is_in_the_way_of_the_temporary_file_is_not_written_to(self) -> None:
        for way in ("mkfifo", "ln -s /etc", "ln -s /etc/victim", "touch", "ln -s /nowhere/at/all"):
            with self.subTest(way):
                result = self.vm_after(f"touch victim && {way} hostname.azure-provisioning", "[ ! -s victim ]")
                self.assertEqual(result.status, 0, result)
                self.check_ready(result)

    def test_a_symbolic_link_in_place_of_etc_hostname_stays_one(self) -> None:
        result = self.vm_after(
            "mkdir state && mv hostname state && ln -s state/hostname hostname",
            "[ -L hostname ] && [ ! -L state/hostname ] && grep -qx web-01 state/hostname",
        )
        self.assertEqual(result.status, 0, result)
        self.check_ready(result)

    def test_files_that_are_missing_are_made_or_left_out(self) -> None:
        result = self.vm_after("rm hostname hosts", "[ ! -e hosts ]")
        self.assertEqual(result.status, 0, result)
        self.check_ready(result)


class TroubleTest(SandboxCase):
    """At the real addresses, with the real clock."""

    def test_no_network_is_tried_again_and_then_one_line(self) -> None:
        result = self.vm_command("sh", "-c", 'ip address flush dev lo; "$@"', "sh", *PROGRAM, "--timeout", "1.5")
        self.assertEqual(result.status, 1, result)
        for step, asked in (("hostname", "no route to "), ("ready", "GET http://")):
            self.assertRegex(result.stderr, f"(?m)^{asked}.*unreachable; trying again, for 1 s at most$")
            self.assertRegex(result.stderr, rf"(?m)^{step} failed: {asked}.*unreachable; gave up after 1\.5 s$")

    def test_a_network_that_comes_late_is_used(self) -> None:
        network = (
            "ip address flush dev lo; "
            "(sleep 1; ip address add 168.63.129.16 dev lo; ip address add 169.254.169.254 dev lo)& "
        )
        result = self.vm_command("sh", "-c", network + '"$@"', "sh", *PROGRAM)
        self.assertEqual(result.status, 0, result)
        self.assertIn("unreachable; trying again", result.stderr)
        self.check_ready(result)

    def test_an_interface_may_have_any_name(self) -> None:
        network = "ip link add bü0 type veth peer name y; ip link set bü0 up; ip link set y up; "
        network += "ip addr add 10.0.0.4/24 dev bü0; ip route add default via 10.0.0.1 dev bü0; "
        result = self.vm_command("sh", "-c", network + '"$@"', "sh", *PROGRAM)
        self.assertEqual(result.status, 0, result)
        self.check_ready(result)

    def test_packets_that_vanish_are_one_attempt_of_bounded_length(self) -> None:
        result = self.vm_command(
            "sh",
            "-c",
            "ip addr del 169.254.169.254/32 dev lo; ip link add x type veth peer name y; ip link set x up;"
            'ip link set y up; ip addr add 169.254.169.250/30 dev x; "$@"',
            "sh",
            *PROGRAM,
            "--timeout",
            "2",
        )
        self.assertEqual(result.status, 1, result)
        self.assertEqual([report["state"] for report in result.seen["reports"]], ["Ready"])
        self.assertRegex(result.stderr, r"(?m)^hostname failed: .*gave up after 2 s$")

    def test_ready_is_reported_although_imds_is_not_there(self) -> None:
        result = self.vm("--timeout", "1", options=["--absent", "imds"])
        self.assertEqual(result.status, 1, result)
        self.assertEqual([report["state"] for report in result.seen["reports"]], ["Ready"])
        self.assertEqual(result.seen["host_name"], "image")
        self.assertRegex(result.stderr, r"(?m)^hostname failed: GET http://169\.254\.169\.254/metadata/\S+: .*refused")

    def test_the_name_is_set_although_wireserver_is_not_there(self) -> None:
        result = self.vm("--timeout", "1", options=["--absent", "wireserver"])
        self.assertEqual(result.status, 1, result)
        self.assertEqual(result.seen["host_name"], "web-01")

    def test_troubles_one_after_the_other_end_with_ready(self) -> None:
        script = {
            "imds": [{"status": 404}, {"status": 410}, {"do": "reset"}],
            "wireserver": [{"status": 503}, {"body": "<"}, {"do": "right"}, {"do": "moved"}],
        }
        result = self.vm(script=script)
        self.assertEqual(result.status, 0, result)
        self.check_ready(result)

    def test_sigterm_ends_it_at_once_with_a_status_that_is_not_zero(self) -> None:
        code = 'trap "" PIPE; "$@" & sleep 0.7; kill -TERM $!; wait $!; s=$?; [ $s -ne 0 ] && exit 42; exit $s'
        started = time.monotonic()
        result = self.vm_command("sh", "-c", code, "sh", *PROGRAM, script={"imds": [{"do": "silent"}]})
        self.assertLess(time.monotonic() - started, 5)
        self.assertEqual(result.status, 42, result)
        self.assertNotIn("Traceback", result.stderr)

    def test_ctrl_c_is_no_traceback(self) -> None:
        code = (
            "import signal, subprocess, sys, time; signal.signal(2, signal.default_int_handler); "  # jobs ignore it
            "p = subprocess.Popen(sys.argv[1:]); time.sleep(0.7); p.send_signal(2); sys.exit(p.wait())"
        )
        result = self.vm_command(sys.executable, "-c", code, *PROGRAM, script={"imds": [{"do": "silent"}]})
        self.assertEqual((result.status, result.stderr), (128 + signal.SIGINT, ""), result)


class StartTest(SandboxCase):
    """What is imported is read from a cold disk in every VM's first boot."""

    def test_what_is_not_needed_stays_on_the_disk(self) -> None:
        result = self.vm_command(sys.executable, "-v", "-IS", sandbox.PROGRAM, "ready")
        self.check_ready(result, sandbox.IMAGE_NAME)
        loaded = set(re.findall("(?m)^import '?([A-Za-z0-9_.]+)'? #", result.stderr))
        self.assertIn("socket", loaded)
        idle = {"ssl", "_ssl", "datetime", "email", "http.client", "json", "random", "encodings.idna", "argparse"}
        idle |= {"subprocess", "typing", "pwd", "grp", "fcntl", "shutil", "binascii", "xml.etree", "signal"}
        self.assertEqual(loaded & idle, set())


class OutputTest(SandboxCase):
    """Messages: where they go, and that none of them matters more than the report."""

    def test_output_that_cannot_be_written_does_not_stop_the_report(self) -> None:
        for situation, redirection in {
            "full disk": ">/dev/full 2>/dev/full",
            "closed": ">&- 2>&-",
            "closed pipe": "2>&1 | true",
        }.items():
            with self.subTest(situation):
                code = f'{{ "$@"; echo $? >/etc/status; }} {redirection}; sleep 0.1; exit "$(cat /etc/status)"'
                result = self.vm_command("sh", "-c", code, "sh", *PROGRAM, script={"wireserver": [{"status": 503}]})
                self.assertEqual(result.status, 0, result)
                self.check_ready(result)

    def test_ready_is_reported_where_there_is_no_dev_null(self) -> None:
        for streams in ("", ">&- 2>&-"):
            with self.subTest(streams):
                result = self.vm_command(
                    "sh", "-c", f'mount -t tmpfs tmpfs /dev; "$@" {streams}', "sh", *PROGRAM, "ready"
                )
                self.assertEqual(result.status, 0, result)
                self.check_ready(result, sandbox.IMAGE_NAME)

    def test_streams_that_are_closed_are_not_taken_for_those_of_the_services(self) -> None:
        for streams in (">&- 2>&-", "<&- >&- 2>&-", "2>&-"):
            with self.subTest(streams):
                result = self.vm_command("sh", "-c", f'"$@" {streams}', "sh", *PROGRAM, "-v")
                self.assertEqual(result.status, 0, result)
                self.check_ready(result)
                self.assertEqual([request["outcome"] for request in result.seen["requests"]], ["200"] * 3)

    def test_problems_go_to_stderr_and_messages_to_stdout_one_line_each(self) -> None:
        result = self.vm(
            script={"imds": [{"status": 500, "body": "a\nb\x1b[2J\u2028c"}]}, options=["--host-name", "web-01"]
        )
        self.assertEqual(len(result.stdout.splitlines()), 3, result)
        self.assertRegex(result.stderr, r"\AGET \S+: status 500 a b \[2J c; trying again, for 120 s at most\n\Z")

    def test_under_the_journal_problems_carry_their_priority(self) -> None:
        code = (
            "import os,subprocess,sys; r,w=os.pipe(); s=os.fstat(w); "
            "e=dict(os.environ, JOURNAL_STREAM='%d:%d'%(s.st_dev,s.st_ino)); "
            "p=subprocess.Popen(sys.argv[1:],env=e,stdout=w,stderr=w); os.close(w); "
            "sys.stdout.write(os.fdopen(r).read()); sys.exit(p.wait())"
        )
        result = self.vm_command(sys.executable, "-c", code, *PROGRAM, "--timeout", "2", options=["--absent", "imds"])
        self.assertRegex(result.stdout, r"(?m)^<4>GET .*; trying again")
        self.assertRegex(result.stdout, r"(?m)^<3>hostname failed: ")
        self.assertRegex(result.stdout, r"(?m)^reported Ready to ")

    def test_another_ones_journal_stream_is_not_ours(self) -> None:
        result = self.vm_command("env", "JOURNAL_STREAM=1:2", *PROGRAM, script={"imds": [{"status": 500}]})
        self.assertNotIn("<4>", result.stderr)

    def test_verbose_shows_what_the_services_answer(self) -> None:
        result = self.vm("-v")
        self.assertRegex(result.stdout, r"(?m)^IMDS has the document \{\"compute\": .*\"web-01\"")
        self.assertRegex(result.stdout, r"(?m)^168\.63\.129\.16 has the goal state .*<GoalState")


class CommandLineTest(SandboxCase):
    """What people run by hand."""

    def test_a_dry_run_changes_and_reports_nothing(self) -> None:
        result = self.vm("-n")
        self.assertEqual(result.status, 0, result)
        self.assertEqual(result.seen["reports"], [])
        self.assertEqual((result.seen["host_name"], result.seen["etc_hostname"]), ("image", "image\n"))
        self.assertEqual(result.seen["etc_hosts"], sandbox.HOSTS)
        self.assertIn("would set the host name to web-01, now it is image\n", result.stdout)
        self.assertRegex(result.stdout, r"(?m)^would report to 168\.63\.129\.16: .*<State>Ready</State>.*</Health>$")

    def test_a_dry_run_works_as_an_ordinary_user(self) -> None:
        if os.geteuid() == 0:
            result = self.vm_command(*sandbox.ORDINARY_USER, *PROGRAM, "-n")
        else:
            result = self.vm_command("setpriv", "--bounding-set=-all", *PROGRAM, "-n")
        self.assertEqual(result.status, 0, result)
        self.assertIn("would set the host name to web-01", result.stdout)
        self.assertIn("<State>Ready</State>", result.stdout)

    def test_ready_alone_publishes_nothing(self) -> None:
        self.assertEqual(self.vm("ready").stderr, "")

    def test_one_step_alone(self) -> None:
        result = self.vm("hostname")
        self.assertEqual((result.seen["host_name"], result.seen["reports"]), ("web-01", []), result)
        result = self.vm("ready")
        self.assertEqual((result.seen["host_name"], len(result.seen["reports"])), ("image", 1), result)
        self.assertNotIn("imds", [request["service"] for request in result.seen["requests"]])

    def test_a_failure_is_reported_instead_of_the_steps(self) -> None:
        result = self.vm("--fail", "no disk")
        self.assertEqual(result.status, 0, result)
        (report,) = result.seen["reports"]
        self.assertEqual((report["state"], report["description"]), ("NotReady", "no disk"))
        self.assertEqual(result.seen["host_name"], "image")

    def test_version_and_help(self) -> None:
        self.assertRegex(self.vm("--version").stdout, r"\Aazure-provisioning \d+\.\d+\.\d+\n\Z")
        self.assertIn("--dry-run", self.vm("--help").stdout)

    def test_wrong_usage_ends_with_status_2_before_anything_is_asked(self) -> None:
        result = self.vm("--timeout", "soon")
        self.assertEqual((result.status, result.seen["requests"]), (2, []))


class SandboxTest(SandboxCase):
    """The sandbox itself: it cannot reach the machine."""

    def test_no_bus_can_be_reached(self) -> None:
        result = self.vm_command("sh", "-c", 'ls -A /run; echo "bus: $DBUS_SYSTEM_BUS_ADDRESS"')
        self.assertEqual(result.stdout, "bus: \n")

    def test_logs_and_homes_of_the_machine_cannot_be_written(self) -> None:
        for directory in ("/var", "/home", "/dev"):
            result = self.vm_command("sh", "-c", f"touch {directory}/x && rm {directory}/x && echo written")
            self.assertEqual((result.status, result.stdout), (1, ""), result)

    def show(self, *arguments: str, user: Sequence[str] = ()) -> "subprocess.CompletedProcess[str]":
        """Run the sandbox as a person does, who reads what it prints."""
        return subprocess.run(
            [*user, sys.executable if not user else "/usr/bin/python3", "-m", "tests.sandbox", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            cwd=sandbox.REPOSITORY,
            check=False,
            timeout=60,
        )

    def test_a_user_and_a_key_are_enough_to_see_the_user_made(self) -> None:
        user = ("--admin-username", "alice", "--public-key", KEY)
        done = self.show(*user, "--disable-password-authentication", "true")
        if os.geteuid() == 0:
            self.assertEqual(done.returncode, 0, done.stdout)
            self.assertIn("made the user alice\nalice can log in, SSH keys: 1\nreported Ready", done.stdout)
            done = self.show(*user, user=(*sandbox.ORDINARY_USER, "env", "HOME=/"))
        message = "sandbox: making a user takes more user IDs than one: run this as root\n"
        self.assertEqual((done.returncode, done.stdout), (1, message))

    def test_the_reason_of_a_failure_is_shown(self) -> None:
        done = self.show(*PROGRAM, "--fail", "no disk")
        self.assertRegex(done.stdout, r"(?m)^  NotReady, 'no disk' for container \S+, incarnation 3: accepted$")

    def test_a_service_can_fail_for_ever(self) -> None:
        result = self.vm("--timeout", "1", "ready", script={"wireserver": {"status": 503}})
        self.assertEqual((result.status, result.seen["reports"]), (1, []), result)
        self.assertEqual({request["outcome"] for request in result.seen["requests"]}, {"503"})

    def test_a_script_that_is_none_is_one_line_that_says_why(self) -> None:
        for script, why in {
            "{": "not JSON: Expecting property name",
            "[]": "not an object, of services",
            '{"wire": []}': "there is no service wire",
            '{"imds": [503]}': "imds: not an object: 503",
            '{"imds": {"statsu": 503}}': 'imds: no such entry: {"statsu": 503}',
            '{"imds": {"status": "503"}}': 'imds: no such entry: {"status": "503"}',
            '{"imds": {"do": "sulk"}}': "imds: sulk is none of close, cut, ",
        }.items():
            with self.subTest(script):
                done = self.show("--script", script)
                self.assertEqual(done.returncode, 2, done.stdout)
                self.assertIn("error: argument --script: " + why, done.stdout.splitlines()[-1])
                self.assertNotIn("Traceback", done.stdout)

    def test_it_refuses_to_furnish_the_machine(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "tests.sandbox"],
            env=dict(os.environ, **{sandbox.MARK: sandbox.namespaces()}),
            stderr=subprocess.PIPE,
            cwd=sandbox.REPOSITORY,
            check=False,
        )
        self.assertEqual((done.returncode, done.stderr), (1, b"sandbox: refusing to furnish the machine itself\n"))

    def test_the_exit_status_is_that_of_the_command(self) -> None:
        self.assertEqual(self.vm_command("sh", "-c", "exit 7").status, 7)

    def test_a_command_that_does_not_exist_is_one_line(self) -> None:
        result = self.vm_command("no-such-command")
        self.assertEqual((result.status, len(result.stderr.splitlines())), (1, 1), result)


if __name__ == "__main__":
    unittest.main()
