"""The module against the pretend Azure on loopback. Nobody waits: pauses are taken from an injected clock.

What changes a machine is not called here but in test_sandbox.py.
"""

import base64
import contextlib
import fcntl
import grp
import io
import itertools
import json
import multiprocessing
import os
import pwd
import random
import socket
import string
import tempfile
import time
import tracemalloc
import unittest
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple
from unittest import mock
from xml.etree import ElementTree

import azure_provisioning
from azure_provisioning import DEBUG, ERROR, INFO, REQUEST_LIMIT, WARNING, Instance, ProvisioningError
from tests.fake_azure import GOAL_STATE, IMDS, WIRESERVER, FakeAzure


class Clock:
    """Stands in for the module's time: sleeping takes none, what really takes time does. There is no wall clock."""

    def __init__(self) -> None:
        self.pauses: List[float] = []
        self.skipped = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.skipped

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.skipped += seconds


class Case(unittest.TestCase):
    """A VM on a pretend Azure whose time flies."""

    def setUp(self) -> None:
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)
        self.clock = Clock()
        self.lines: List[str] = []
        self.levels: List[int] = []
        self.replace(time=self.clock, log=self.log, log_level=INFO, REQUEST_LIMIT=0.5)
        untouchable = mock.Mock(side_effect=AssertionError("about to change the machine, which is not a VM"))
        self.replace(run=untouchable, replace_file=untouchable, set_host_name=untouchable)

    def replace(self, module: Any = azure_provisioning, **replacements: Any) -> None:
        """Have names of module mean something else until the test ends."""
        self.stack.enter_context(mock.patch.multiple(module, **replacements))

    def log(self, level: int, line: str) -> None:
        if level <= azure_provisioning.log_level:
            self.levels.append(level)
            self.lines.append(line)

    def warnings(self, worst: int = WARNING) -> List[str]:
        """What went wrong so far."""
        return [line for level, line in zip(self.levels, self.lines) if level <= worst]

    def forget(self) -> None:
        """Start over: what has been said and slept so far does not count."""
        del self.clock.pauses[:], self.lines[:], self.levels[:]

    def azure(self, wireserver: Sequence[Any] = (), imds: Sequence[Any] = (), **more: Any) -> FakeAzure:
        script = {WIRESERVER: list(wireserver), IMDS: list(imds)}
        return self.stack.enter_context(FakeAzure(script=script, drip_pause=0.05, **more))

    def run_on(self, azure: FakeAzure, *arguments: str, status: int = 0) -> FakeAzure:
        """Start over, and run the program with arguments on azure until it ends with status."""
        self.forget()
        addresses = ["--wireserver", azure.listen(WIRESERVER), "--imds", azure.listen(IMDS)]
        self.assertEqual(azure_provisioning.main([*addresses, *arguments]), status, self.lines)
        return azure

    def provision(self, *arguments: str, status: int = 0, **created: Any) -> FakeAzure:
        return self.run_on(self.azure(**created), *arguments, status=status)

    def instance(self, azure: FakeAzure, timeout: float = 120) -> Instance:
        """What the program learns of the VM from azure's IMDS."""
        address = azure.listen(IMDS)
        return azure_provisioning.keep_trying(
            lambda deadline: azure_provisioning.fetch_instance(address, deadline, name_is_enough=True), timeout
        )

    def check_name(self, imds: Sequence[Any], name: str = "web-01") -> FakeAzure:
        azure = self.azure(imds=imds)
        self.assertEqual(self.instance(azure).name, name)
        return azure

    @contextlib.contextmanager
    def lasting(self, least: float, most: float) -> Iterator[None]:
        """Check how many seconds of the clock pass meanwhile."""
        before = self.clock.monotonic()
        yield
        self.assertTrue(least <= self.clock.monotonic() - before <= most, self.lines)

    def in_child(self, act: Callable[..., None], *arguments: Any) -> None:
        """Do what checks something in a process of its own."""
        process = multiprocessing.get_context("fork").Process(target=act, args=arguments)
        process.start()
        process.join()
        self.assertEqual(process.exitcode, 0, arguments)


def document(compute: Any, **more: Any) -> List[Dict[str, Any]]:
    """An IMDS that has compute in its document."""
    return [{"body": json.dumps(dict(more, compute=compute))}]


def key(kind: str, *fields: bytes) -> str:
    """Return an SSH public key of kind with these fields, encoded."""
    blob = b"".join(len(field).to_bytes(4, "big") + field for field in (kind.encode(), *fields))
    return f"{kind} {base64.b64encode(blob).decode()}"


RSA = key("ssh-rsa", b"\1\0\1", bytes(range(1, 250)))
ED25519 = key("ssh-ed25519", bytes(range(32)))
KEYS = (
    RSA,
    ED25519,
    key("ecdsa-sha2-nistp256", b"nistp256", b"\4" * 65),
    key("ecdsa-sha2-nistp384", b"nistp384", b"\4" * 97),
    key("ecdsa-sha2-nistp521", b"nistp521", b"\4" * 133),
    key("sk-ssh-ed25519@openssh.com", b"k" * 32, b"ssh:"),
    key("sk-ecdsa-sha2-nistp256@openssh.com", b"nistp256", b"\4" * 65, b"ssh:"),
)


def raw(text: str, **more: Any) -> Dict[str, Any]:
    return {"do": "raw", "raw": text, **more}


# What can go wrong with one exchange, whoever the service is: what it does, and the headers and chunks that it sends.
DOES = "silent reset close drip cut cut_headers endless_body endless_header endless_continue"
OK = "HTTP/1.1 200 OK\r\n"
LENGTHS = "Content-Length", "Content-Length:", "Content-Length: -17"
HEADERS = "A: " + "x" * (1 << 20), "Transfer-Encoding: gzip, chunked", *LENGTHS
CHUNKED = OK + "Transfer-Encoding: chunked\r\n\r\n"
CHUNKS = ("frog\r\n", "-1\r\n" + "x" * 99, "1\r\nxyz0\r\n\r\n", "1\r\nx\r\n")
STATUSES = (103, 300, 304, 400, 401, 403, 404, 405, 408, 409, 410, 418, 429, 500, 501, 502, 503, 504, 599)
WHOLE = OK, "SSH-2.0-OpenSSH_9.2\r\n\r\n", "HTTP/1.1 500\r\nContent-Type: multipart/a; boundary*=; boundary*0=\r\n\r\n"
TROUBLE: Dict[str, Dict[str, Any]] = {
    **{what: {"do": what} for what in DOES.split()},
    **{text[:60]: raw(text) for text in WHOLE},
    **{headers[:60]: raw(f"{OK}{headers}\r\n\r\n0\r\n\r\n") for headers in HEADERS},
    **{chunk[:60]: raw(CHUNKED + chunk) for chunk in CHUNKS},
    **{f"status {status}": {"status": status} for status in STATUSES},
    "a redirect": {"status": 301, "headers": {"Location": "http://127.0.0.1:9/"}},
    "a body that is too long": {"body": "x", "repeat": azure_provisioning.ANSWER_LIMIT},
    "a body that is far too long": {"body": "x", "repeat": 4 * azure_provisioning.ANSWER_LIMIT},
    "no UTF-8": {"body": "\udcff\udcfe<"},
}


class KeepTryingTest(Case):
    """Whatever goes wrong between the module and a service is logged in one line and tried again."""

    def after(self, trouble: Dict[str, Any], what: str, attempt: Callable[[Dict[str, Any]], object]) -> None:
        """Check that attempt, given each trouble, succeeds with one line and one short pause, and soon."""
        for name, entry in trouble.items():
            with self.subTest(name):
                self.forget()
                started = time.monotonic()
                attempt(entry if isinstance(entry, dict) else {"body": entry})
                self.assertLess(time.monotonic() - started, 3)
                self.assertEqual(len(self.clock.pauses), 1, self.lines)
                self.assertLessEqual(self.clock.pauses[0], azure_provisioning.FIRST_PAUSE)
                (warning,) = self.warnings()
                self.assertRegex(warning, rf"{what}.*; trying again, for 1(19|20) s at most\Z")
                self.assertLess(len(warning), 450)

    def check_ready(self, script: Sequence[Any], asked: str) -> None:
        """Check that Ready is reported by requests with the methods asked."""
        azure = self.provision("--timeout", "120", "ready", wireserver=script)
        self.assertEqual((azure.accepted[-1]["state"], self.lines[-1].split(" to ")[0]), ("Ready", "reported Ready"))
        self.assertEqual(" ".join(request["method"] for request in azure.requests), asked)

    def test_ready_is_reported_after_any_trouble_with_the_goal_state(self) -> None:
        deeper = GOAL_STATE.replace("InstanceId>", "Id>").replace("{instance_id}", "<InstanceId>i</InstanceId>")
        wrong: Dict[str, Any] = {
            "no body": {"status": 200},
            "no XML": "<GoalState><Incarnation>1</Incarn",
            "another document": "<html><body>Sign in to the hotel's network</body></html>",
            "UTF-16": GOAL_STATE.encode("utf-16").decode("utf-8", "surrogateescape"),
            "depth": {"body": "<a>", "repeat": 300000},
            "a namespace in each name": f"<a xmlns:x='{'u' * 500000}'>{'<x:b/>' * 80000}</a>",
            "many attributes": f"<a {' '.join(f'a{number}=%s' % repr('') for number in range(80000))}/>",
            "a NUL": GOAL_STATE.replace("Started", "\0"),
            "no incarnation": GOAL_STATE.replace("{incarnation}", ""),
            "no container": GOAL_STATE.replace("{container_id}", " \n"),
            "no instance": GOAL_STATE.replace("RoleInstance>", "Role>"),
            "a deeper instance": deeper,
        }
        self.after({**TROUBLE, **wrong}, r"127\.0\.0\.1", lambda entry: self.check_ready([entry], "GET GET POST"))

    def test_ready_is_reported_after_any_trouble_with_the_report(self) -> None:
        # The right answer has no body to cut, and comes within the limit byte by byte.
        trouble = {name: entry for name, entry in TROUBLE.items() if name not in ("cut", "drip")}
        asked = "GET POST GET POST"  # each attempt is whole
        self.after(trouble, "POST http://127", lambda entry: self.check_ready([{"do": "right"}, entry], asked))

    def test_the_host_name_is_found_after_any_trouble_with_imds(self) -> None:
        texts = "", "<html>log in</html>", '["compute"]', "{}", '{"compute": {"name": "a"', '{"a": ' + "9" * 10**6
        profile = {"computerName": "web-01"}
        nameless = None, {"osProfile": profile}, {"name": "", "osProfile": profile}, {"name": 7}
        others = {"name": "a", "osProfile": {"computerName": 7}}, {"name": "a", "osProfile": [1]}
        wrong: Dict[str, Any] = {text[:60]: text for text in texts}
        wrong.update((str(compute), document(compute)[0]) for compute in (*nameless, *others))
        wrong["depth"] = {"body": "[", "repeat": 300000}
        trouble = {**TROUBLE, **wrong}
        del trouble["status 400"]  # it is asked for the name alone then
        self.after(trouble, "GET http://127", lambda entry: self.check_name([entry]))

    def test_a_service_that_is_not_there_yet_is_found(self) -> None:
        azure = self.azure()
        address = azure.listen(WIRESERVER)
        azure.servers[0].server_close()

        def sleep(seconds: float) -> None:
            Clock.sleep(self.clock, seconds)
            if len(self.clock.pauses) == 4:
                azure.listen(WIRESERVER, port=int(address.split(":")[1]))

        self.replace(self.clock, sleep=sleep)
        self.assertEqual(azure_provisioning.main(["--wireserver", address, "ready"]), 0)
        self.assertEqual((len(azure.accepted), len(self.clock.pauses)), (1, 4))

    def test_ready_is_reported_again_when_the_container_moved(self) -> None:
        azure = self.provision("ready", wireserver=[{"do": "right"}, {"do": "moved"}])
        self.assertEqual([report["incarnation"] for report in azure.reports], ["3", "4"])
        self.assertEqual(azure.accepted[0]["container_id"], azure.container_id)

    def test_pauses_start_small_double_stop_growing_at_five_seconds_and_vary_by_chance(self) -> None:
        self.provision("ready", wireserver=[{"status": 503}] * 25)
        for pause, longest in zip(self.clock.pauses, itertools.chain((0.25, 0.5, 1, 2, 4), itertools.repeat(5))):
            self.assertTrue(longest / 2 - 0.1 <= pause <= longest, self.clock.pauses)
        self.assertGreater(len({round(pause, 4) for pause in self.clock.pauses[5:]}), 10)

    def test_a_pause_counts_from_the_start_of_the_attempt(self) -> None:
        self.provision("ready", wireserver=[{"status": 503}] * 8 + [{"do": "silent"}, {"status": 503}])
        self.assertGreater(self.clock.pauses[-1], 2)
        self.replace(LONGEST_PAUSE=0.3)
        self.provision("ready", wireserver=[{"do": "silent"}] * 3)
        self.assertTrue(0.1 < min(self.clock.pauses) <= max(self.clock.pauses) <= azure_provisioning.FIRST_PAUSE)

    def test_retry_after_is_honoured_up_to_thirty_seconds(self) -> None:
        ignored = dict.fromkeys(("0", "Wed, 21 Oct 2037 07:28:00 GMT", "-5", "\u0663"), (0, 0.25))
        for value, (least, most) in {"7": (7, 7), "86400": (30, 30), "9" * 5000: (30, 30), **ignored}.items():
            headers = {"Retry-After": value.encode().decode("latin-1")}
            self.provision("ready", wireserver=[{"status": 429, "headers": headers}])
            self.assertTrue(least <= self.clock.pauses[0] <= most, value)

    def test_a_failure_is_told_once_when_it_changes_and_again_after_a_minute(self) -> None:
        busy, gone = {"status": 503, "body": "busy"}, {"status": 410, "body": "gone"}
        self.provision("ready", wireserver=[busy] * 3 + [gone] * 4 + [busy] * 30)
        told = [(line.split(": status ")[1][:8], int(line.split()[-4])) for line in self.warnings()]
        self.assertEqual([what for what, _ in told[:4]], ["503 busy", "410 gone", "503 busy", "503 busy"], told)
        self.assertEqual(told[0][1], 1200)
        for (_, before), (_, left) in zip(told[2:], told[3:]):
            self.assertTrue(60 <= before - left <= 66, told)
        self.assertTrue(4 <= len(told) <= 5, told)

    def test_it_gives_up_when_the_timeout_is_spent_and_says_so_in_one_line(self) -> None:
        for arguments, seconds in ((["--timeout", "0.3"], 0.3), (["--timeout", "60"], 60), ([], 1200)):
            with self.lasting(seconds - 1.1, seconds + 0.3):
                self.provision(*arguments, "ready", wireserver=[{"status": 503, "body": "busy"}] * 1000, status=1)
            failure, last = self.warnings(ERROR)
            asked = r"GET http://127\.0\.0\.1:\d+/machine\?comp=goalstate"
            self.assertRegex(failure, rf"^ready failed: {asked}: status 503 busy; gave up after {seconds} s$")
            self.assertRegex(last, "^Azure got no report, and will declare this VM failed; the unit, .* the next boot$")

    def test_imds_is_waited_for_as_long_as_somebody_depends_on_it(self) -> None:
        for steps, seconds in ([], 120), (["ready"], 0), (["user", "ready"], 300), (["hostname", "user", "ready"], 300):
            with self.lasting(seconds - 5, seconds + 1):
                azure = self.provision(*steps, imds=[{"status": 500}] * 999, status=int(seconds > 0))
            state = "NotReady" if "user" in steps else "Ready"
            self.assertEqual([report["state"] for report in azure.accepted], [state])
            failed = [line.split()[0] for line in self.lines if " failed: " in line]
            self.assertEqual((failed, bool(azure.asked(IMDS))), (steps[:-1] if steps else ["hostname"], seconds > 0))

    def test_the_timeout_of_imds_begins_when_there_is_a_network(self) -> None:
        self.replace(use_default_interface=mock.Mock())
        for network_after, told, least in (
            (500, r"GET http://169\.254\.169\.254/metadata/.*; gave up after 120 s", 615),
            (9999, r"no route to 168\.63\.129\.16: .*; gave up after 1080 s", 1071),
            (0, r"GET http://169\.254\.169\.254/metadata/.*; gave up after 120 s", 115),
        ):
            there = self.clock.monotonic() + network_after

            def connect(connection: socket.socket, address: Any, there: float = there) -> None:
                if connection.type == socket.SOCK_STREAM:  # nobody is in that network
                    raise ConnectionRefusedError
                # A DHCP client that has no lease yet may have given itself an address beside that of IMDS.
                if self.clock.monotonic() < there and not address[0].startswith("169.254."):
                    raise OSError("Network is unreachable")

            self.forget()
            with self.subTest(network_after=network_after), self.lasting(least, least + 12):
                with mock.patch.object(socket.socket, "connect", connect), mock.patch("sys.argv", ["", "hostname"]):
                    self.assertEqual(azure_provisioning.main(), 1)
                self.assertRegex(self.lines[-1], f"^hostname failed: {told}$")
                self.assertIn(f"; trying again, for {1080 if network_after else 120} s at most", self.lines[0])

    def test_the_route_is_that_to_imds_and_its_timeout_is_the_given_one(self) -> None:
        asked, azure = mock.Mock(), self.azure(imds=[{"status": 500}] * 99)
        self.replace(check_route=asked)
        with self.lasting(55, 61):
            self.run_on(azure, "--timeout", "60", "hostname", status=1)
        self.assertIn(f"http://{asked.call_args[0][0]}/metadata", self.lines[0])

    def test_whether_there_is_a_route_is_asked_of_the_kernel_alone(self) -> None:
        for address, host in (("10.0.0.9:8254", "10.0.0.9"), ("169.254.169.254", "168.63.129.16")):
            with mock.patch.object(socket, "socket") as make:
                azure_provisioning.check_route(address)
            make.assert_called_once_with(socket.AF_INET, socket.SOCK_DGRAM)
            make.return_value.__enter__.return_value.connect.assert_called_once_with((host, 80))
            refused = self.assertRaisesRegex(ProvisioningError, f"^no route to {host}: no$")
            with mock.patch.object(socket, "socket", side_effect=OSError("no")), refused:
                azure_provisioning.check_route(address)

    def test_each_request_ends_with_its_limit_the_last_one_with_the_timeout(self) -> None:
        self.assertEqual(REQUEST_LIMIT, 10)
        silent, late = [{"do": "silent"}], [{"do": "right", "delay": delay} for delay in (0.3, 0.3, 0.6)]
        self.provision("--timeout", "0.1", "ready", wireserver=silent, status=1)
        self.assertRegex(self.lines[0], r"^ready failed: .*: no complete answer within 0\.(1|09\d*) s; gave up")
        azure = self.provision("ready", wireserver=late)
        self.assertEqual(self.warnings(), [])
        self.run_on(azure, "ready")
        self.assertRegex(self.warnings()[0], r"^GET .*: no complete answer within 0\.5 s; trying again")
        with self.assertRaisesRegex(ProvisioningError, "no complete answer within 0 s$"):
            azure_provisioning.exchange("127.0.0.1:9", self.clock.monotonic() - 1, "GET", "/", {})

    def test_an_endless_answer_costs_a_few_mebibytes_at_most(self) -> None:
        def ask(address: str) -> None:
            tracemalloc.start()
            with self.assertRaises(ProvisioningError):
                azure_provisioning.exchange(address, self.clock.monotonic() + 5, "GET", "/", {})
            self.assertLess(tracemalloc.get_traced_memory()[1], 8 << 20)

        long, chunk = {"body": "x", "repeat": 1 << 26}, raw(CHUNKED + "-1\r\n" + "x" * (1 << 24))
        for entry in ({"do": "endless_body"}, {"do": "endless_header"}, long, chunk):
            self.in_child(ask, self.azure([entry]).listen(WIRESERVER))  # its own memory, without the server's


class TransportTest(Case):
    """What goes over the wire."""

    def test_what_is_left_of_an_answer_is_no_answer_to_the_report(self) -> None:
        goal_state = GOAL_STATE.format(incarnation=1, container_id="c", instance_id="i").lstrip("\ufeff") + " " * 8192
        answers = f"{OK}Content-Length: {len(goal_state)}\r\n\r\n{goal_state}{OK}Content-Length: 0\r\n\r\n"
        azure = self.provision("--timeout", "0.5", "ready", wireserver=[raw(answers, keep=True)], status=1)
        self.assertEqual(azure.accepted, [])
        self.assertIn("status 410", self.lines[0])

    def test_all_forms_of_an_answer_are_fine(self) -> None:
        text = '{"compute": {"name": "web-02"}}'
        chunks = '1\r\n{\r\n1e;x=y\r\n"compute": {"name": "web-02"}}\r\n0\r\nA: trailer\r\n\r\n'
        for entry in (
            {"headers": {"Transfer-Encoding": "Chunked"}, "body": chunks},
            {"body": "\ufeff" + text},
            raw("HTTP/1.0 200\r\n\r\n" + text),  # which ends with the connection
            raw(f"{OK}Content-Length: 31\r\n\r\n{text}", keep=True),
        ):
            self.check_name([entry], "web-02")
        for empty in (OK + "Content-Length: 0\r\nContent-Length: 0\r\n\r\n", "HTTP/1.1 204 No Content\r\n\r\n"):
            self.provision("ready", wireserver=[{"do": "right"}, raw(empty, keep=True)])
            self.assertEqual(self.warnings(), [])

    def test_each_request_has_the_headers_that_azure_wants_and_its_own_connection_and_no_proxy(self) -> None:
        proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"), "http://127.0.0.1:9")
        with mock.patch.dict(os.environ, proxies), mock.patch.object(socket, "socket", wraps=socket.socket) as connect:
            azure = self.provision("ready", imds=[{"status": 404}])
            self.assertGreaterEqual(connect.call_count, 2)
            self.assertEqual(self.clock.pauses, [])
            self.instance(azure)
        goal_state, report, imds, again = [request["headers"] for request in azure.requests]
        version = f"azure-provisioning/{azure_provisioning.__version__}"
        always = {"connection": "close", "user-agent": version}
        agent = {"x-ms-version": "2012-11-30", "x-ms-agent-name": "azure-provisioning"}
        for headers in goal_state, report:
            self.assertEqual({**headers, **always, **agent, "x-ms-guest-agent-name": version}, headers)
        self.assertEqual(report["content-type"], "text/xml;charset=utf-8")
        for headers in imds, again:
            self.assertEqual({**headers, **always, "metadata": "true"}, headers)
            self.assertRegex(headers["x-ms-client-request-id"], r"\A[0-9a-f]{32}\Z")
        self.assertNotEqual(imds["x-ms-client-request-id"], again["x-ms-client-request-id"])

    def test_a_refusal_is_told_with_what_was_asked_of_whom_and_what_came_back(self) -> None:
        page = '<!DOCTYPE HTML PUBLIC "-//W3C//DTD HTML 4.01//EN">\r\n<HTML><BODY><h2>Busy</h2>\n</BODY></HTML>'
        pages = {"<Error>no\nversion</Error>": "no version", page: "Busy", "": "Service Unavailable"}
        for body, told in {**pages, "<" * 500000: "<" * 200, "a > b": "a > b", "occup\udce9": "occup\ufffd"}.items():
            started = time.monotonic()
            self.provision("ready", wireserver=[{"status": 503, "body": body}])
            self.assertLess(time.monotonic() - started, 2)
            asked = r"GET http://127\.0\.0\.1:\d+/machine\?comp=goalstate"
            self.assertRegex(self.warnings()[0], f"^{asked}: status 503 {told}; trying again, for 1200 s at most$")

    def test_a_long_answer_is_shown_in_part(self) -> None:
        goal_state = GOAL_STATE.format(incarnation=1, container_id="c", instance_id="i") + " " * 9999
        instance = '{"compute": {"name": "!", "more": "' + "x" * 100000 + '"}}'
        self.provision("-v", "--timeout", "0.2", wireserver=[{"body": goal_state}], imds=[{"body": instance}], status=1)
        self.assertEqual([len(line) // 1000 for line in self.lines if " has the " in line], [3, 3])

    def test_azures_own_addresses_are_asked_on_the_interface_of_the_default_route_and_no_others(self) -> None:
        # Routes by default, to 168.63.129.16, to 169.254.0.0/16 and to 10.0.0.0/24: (destination, mask)
        default, wireserver, link, lan = (0, 0), (0x10813FA8, 0xFFFFFFFF), (0xFEA9, 0xFFFF), (0xA, 0xFFFFFF)
        bound = mock.call(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth7")
        for address, interface, route, wanted in (
            ("168.63.129.16", "eth8", wireserver, [bound]),
            ("169.254.169.254", "eth8", link, [bound]),
            ("169.254.169.254:80", "eth8", link, [bound]),
            ("168.63.129.16", "eth8", lan, []),
            ("168.63.129.16", "eth8", link, []),
            ("168.63.129.16", "eth8", default, []),
            ("168.63.129.16", "eth7", wireserver, []),  # the proxy of the Metadata Security Protocol may be there
            ("127.0.0.1:9", "eth8", wireserver, []),
        ):
            routes = [("eth7", *default, 0), (interface, *route, 1)]
            self.replace(ipv4_routes=lambda routes=routes: routes)
            with self.subTest(address, routes=routes), mock.patch.object(socket, "socket") as make:
                connection = make.return_value.__enter__.return_value
                connection.setsockopt.side_effect = PermissionError  # of an old kernel
                connection.connect.side_effect = OSError("no")
                with self.assertRaisesRegex(ProvisioningError, ": no$"):
                    azure_provisioning.exchange(address, self.clock.monotonic() + 1, "GET", "/", {})
                self.assertEqual(connection.setsockopt.mock_calls, wanted)
                self.assertEqual(connection.connect.call_count, 1)

    def test_the_preferred_default_route_is_taken(self) -> None:
        head = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
        lan = "lan0\t0000000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
        half = "tun0\t00000000\t00000000\t0001\t0\t0\t0\t00000080\t0\t0\t0\n"  # 0.0.0.0/1 is not the default
        first = "a1\t00000000\t0100000A\t0003\t0\t0\t200\t00000000\t0\t0\t0\n"
        second = first.replace("a1", "b0").replace("200", "100")
        found = {head + lan + first: "a1", head + first + lan: "a1", head + half + first: "a1"}
        for routes, interface in {"": "", head: "", head + lan: "", **found, head + first + second: "b0"}.items():
            with mock.patch("builtins.open", return_value=io.StringIO(routes)):
                self.assertEqual(azure_provisioning.default_interface(), interface, routes)
        with mock.patch("builtins.open", side_effect=PermissionError):
            self.assertEqual(azure_provisioning.default_interface(), "")
        azure_provisioning.default_interface()  # of this machine

    ANSWERS = (
        (OK + "Content-Length: 5 \r\nA: b\r\nA: c\r\n\r\nhello", (200, "OK", 0.0, b"hello")),
        (CHUNKED + "00000005\r\nhello\r\nA;a=b\r\n, you two!\r\n0\r\nA: b\r\n\r\n", (200, "OK", 0, b"hello, you two!")),
        ("HTTP/1.0 503 B\xfcsy\r\nRetry-After: 7\r\n\r\n<p>busy</p>", (503, "B\xfcsy", 7.0, b"<p>busy</p>")),
        ("HTTP/1.1 204 No Content\r\n\r\n", (204, "No Content", 0.0, b"")),
    )

    def parse(self, received: str, ended: bool = True) -> Any:
        return azure_provisioning.parse_answer(received.encode("latin-1"), ended)

    def test_an_answer_is_what_it_was_however_it_comes(self) -> None:
        for answer, whole in self.ANSWERS:
            self.assertEqual(self.parse(answer), whole)
            self.assertEqual(self.parse(answer, ended=False), None if whole[0] == 503 else whole)
            for length in range(len(answer)):
                self.assertIsNone(self.parse(answer[:length], ended=False), answer[:length])
                if whole[0] != 503 or "\r\n\r\n" not in answer[:length]:
                    self.assertRaises(ValueError, self.parse, answer[:length])

    def test_what_follows_an_answer_is_left_out_and_what_cannot_become_one_is_wrong_at_once(self) -> None:
        for answer, found in {
            "HTTP/1.1 204 No Content\r\n\r\nleft": (204, "No Content", 0.0, b""),
            "HTTP/1.1 503\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\nleft": (503, "", 7.0, b""),
            CHUNKED + "2 \r\nhi\r\n0 \t;a\r\n\r\n": (200, "OK", 0.0, b"hi"),
        }.items():
            self.assertEqual(self.parse(answer), found)
        for chunk in ("\r\n", "1\r\nxy", "000000001\r\nx\r\n"):
            self.assertRaises(ValueError, self.parse, CHUNKED + chunk, ended=False)

    def test_ten_thousand_mutations_raise_nothing_but_value_error(self) -> None:
        choose = random.Random(8)
        pieces = ["\r\n", "\r\n\r\n", ":", " ", "-1", "0", "\0", "\xff", "Content-Length: 3", "chunked", ";", ""]
        pieces += ["Transfer-Encoding: chunked\r\n", "HTTP/1.1 ", "9" * 5000, "f" * 20, "\xb2", "\xd9\xa3"]
        outcomes = {"answer": 0, "incomplete": 0, "wrong": 0}
        for _ in range(10000):
            answer = choose.choice(self.ANSWERS)[0]
            for _ in range(choose.randrange(1, 5)):
                start = choose.randrange(len(answer) + 1)
                piece = choose.choice([*pieces, chr(choose.randrange(256)), answer[:start]])
                answer = answer[:start] + piece + answer[start + choose.randrange(6) :]
            try:
                found = self.parse(answer, ended=choose.random() < 0.5)
                outcomes["answer" if found else "incomplete"] += 1
            except ValueError as error:
                self.assertLess(len(str(error)), 300)
                outcomes["wrong"] += 1
        self.assertGreater(min(outcomes.values()), 500, outcomes)

    def test_hostile_answers_take_no_time(self) -> None:
        length = OK + "Content-Length: " + "9" * 900000 + "\r\n\r\n"
        headers = length, OK + "A: x" + " " * 60000 + "x\r\n\r\n", OK + "A:\r\n" * 10000 + "\r\n"
        chunks = CHUNKED + "1\r\nx\r\n" * 100000, CHUNKED + "1" + " " * 1000000 + "\r\n"
        for answer in headers + chunks:
            started = time.process_time()
            with self.subTest(answer[:60]), contextlib.suppress(ValueError):
                self.parse(answer, ended=False)
            self.assertLess(time.process_time() - started, 1)


class HealthReportTest(Case):
    """What the platform is told."""

    def report_of(self, goal_state: str) -> List[Dict[str, Any]]:
        """What is reported for goal_state, which is refused for good if that is none."""
        script = [{"body": goal_state}, {"do": "right"}] * 9
        return self.provision("--timeout", "0.2", "ready", wireserver=script, status=1).reports

    def test_identifiers_are_the_first_of_their_elements_without_the_space_around_them(self) -> None:
        (report,) = self.report_of(
            "<GoalState><GoalState><Container><RoleInstanceList><RoleInstance><InstanceId>d</InstanceId></RoleInstance>"
            "</RoleInstanceList></Container></GoalState><Incarnation> 3 </Incarnation><Incarnation>4</Incarnation>"
            "<Container><ContainerId>\n c\t"
            "</ContainerId><ContainerId>d</ContainerId><RoleInstanceList><RoleInstance><X><InstanceId>x</InstanceId></X>"
            "<InstanceId><Y>y</Y>\n&lt;i&#62;</InstanceId></RoleInstance><RoleInstance><InstanceId>j</InstanceId></RoleInstance>"
            "</RoleInstanceList></Container></GoalState>"
        )
        self.assertEqual([report["incarnation"], report["container_id"], report["instance_id"]], ["3", "c", "<i>"])

    def test_what_is_no_goal_state_or_could_multiply_is_refused_in_no_time_and_told(self) -> None:
        one = "<!DOCTYPE GoalState [<!ENTITY i '3'>]>" + GOAL_STATE.split("?>")[1].replace("{incarnation}", "&i;")
        entities = "".join(f'<!ENTITY e{number} "{f"&e{number - 1};" * 10}">' for number in range(1, 12))
        many = f'<!DOCTYPE GoalState [<!ENTITY e0 "xxxxxxxxxx">{entities}]><GoalState a="&e11;">&e11;</GoalState>'
        encoded = [one.encode(encoding).decode() for encoding in ("utf-8", "utf-16-le", "utf-16-be")]
        documents = [*encoded, many, many.replace(' a="&e11;"', "")]
        cases = dict.fromkeys(documents, "it has a DOCTYPE, and so entities, which can multiply; ")
        cases[one.encode("utf-32-le").decode()] = "it is not XML: "
        for inner in ("<a/>x" * 50000, "".join(f"<a{number}>x</a{number}>" for number in range(25000)), "<a>x" * 99999):
            cases[f"<R><{'L' * 500000}>{inner}"] = "it is not XML: "  # names and paths that are long
        cases["<GoalState><Incarnation>3</Incarnation></GoalState>"] = "it lacks container_id, instance_id"
        started = time.process_time()
        for document, told in cases.items():
            self.assertEqual(self.report_of(document), [])
            self.assertRegex(self.lines[0], f"the goal state of 127.*: {told}")
        self.assertLess(time.process_time() - started, 1)

    def test_ready_is_the_document_that_azure_expects_and_identifiers_cannot_break_it(self) -> None:
        identifiers = "incarnation", "container_id", "instance_id"
        report = azure_provisioning.health_report(dict(zip(identifiers, "7ci"))).decode()
        self.assertEqual(
            "".join(report.split()),
            '<?xmlversion="1.0"encoding="utf-8"?><Health><GoalStateIncarnation>7</GoalStateIncarnation><Container>'
            "<ContainerId>c</ContainerId><RoleInstanceList><Role><InstanceId>i</InstanceId>"
            "<Health><State>Ready</State></Health></Role></RoleInstanceList></Container></Health>",
        )
        for evil in ("</ContainerId><State>Ready</State>&\"'", "{health}{0}", "&amp;"):
            health = ElementTree.fromstring(azure_provisioning.health_report(dict.fromkeys(identifiers, evil), evil))
            for path in ("GoalStateIncarnation", "Container/ContainerId", "Container//InstanceId", ".//Description"):
                self.assertEqual(health.findtext(path), evil)

    def test_a_failure_is_reported_with_its_reason_cut_at_512_characters(self) -> None:
        strange, shown = "a\x00b\x1b[1mc\ud800d\udcffe\ufffff \U0001f525\tg\u00fc", "a b [1mc d e f \U0001f525 g\u00fc"
        plain = "disk <1 of 2> & no more"
        for reason, told in (("", None), (plain, plain), ("&" * 600, "&" * 512), (strange, shown)):
            azure = self.provision("--fail", reason)
            (report,) = azure.accepted
            state = report["state"], report["substatus"], report["description"], azure.asked(IMDS)
            self.assertEqual(state, ("NotReady", "ProvisioningFailed", told, []))


class ImdsTest(Case):
    """IMDS is asked for the whole document, and an old one for the name."""

    DOCUMENT = "GET /metadata/instance?api-version=2021-08-01&extended=true"
    NAME = "GET /metadata/instance/compute/name?api-version=2019-06-01&format=text"

    def test_the_resource_name_stands_in_for_a_computer_name_that_is_empty(self) -> None:
        profiles = [None, {}, *({"computerName": name} for name in (None, "", " \n"))]
        for compute in [{}, *({"osProfile": profile} for profile in profiles)]:
            self.check_name(document({"name": "db_7", **compute}), "db_7")
        self.assertEqual(self.clock.pauses, [])

    def test_nothing_that_is_for_the_user_costs_the_name(self) -> None:
        users: Sequence[Any] = (["root"], 7, None, {}, "", False)
        entries = [{"keyData": 7}, {"keyData": None}, {"keyData": []}]
        keys: Sequence[Any] = (7, None, "ssh-rsa", {}, [7, None, {}, []], entries)
        extended: Sequence[Any] = (None, 7, [], {"compute": None}, {"compute": {}})
        for (user, key), more in itertools.product(zip(users, keys), extended):
            profile = {"adminUsername": user, "disablePasswordAuthentication": user}
            compute = {"name": "web-01", "osProfile": profile, "publicKeys": key, "userData": user}
            self.check_name(document(compute, extended=more))
        self.assertEqual(self.clock.pauses, [])

    def test_what_the_vm_was_created_with_is_read(self) -> None:
        keys = [{"keyData": "ssh-rsa A", "path": "/p"}]
        for raw, wanted in (("true", True), (True, True), ("false", False), (False, False), ("", False), (None, False)):
            profile = {"adminUsername": "alice", "disablePasswordAuthentication": raw}
            azure = self.azure(imds=document({"name": "a", "osProfile": profile, "publicKeys": keys}))
            self.assertEqual(self.instance(azure), Instance("a", "alice", keys, wanted, []))

    def test_what_was_given_and_is_ignored_is_told(self) -> None:
        self.replace(host_name_is=lambda name: True, ETC_HOSTS="/no/such/file")
        given, not_given = (True, "true", "True"), (False, "false", None)
        for custom_data, user_data in itertools.product(given + not_given, ("aGk=", "", None)):
            compute, extended = {"name": "web-01", "userData": user_data}, {"compute": {"hasCustomData": custom_data}}
            self.provision("hostname", imds=document(compute, extended=extended))
            told = ["custom data"] * (custom_data in given) + ["user data"] * (user_data == "aGk=")
            lines = [f"the VM was created with {what}, which nothing here reads" for what in told]
            self.assertEqual(self.warnings(), lines)

    def test_verbose_shows_the_document_without_secrets(self) -> None:
        self.replace(log_level=DEBUG)
        simple = {"name": "web-01", "userData": "c2VjcmV0"}
        for separators, compute in itertools.product(((",", ":"), (", ", ": ")), (simple, {"a": "b", **simple})):
            self.forget()
            self.check_name([{"body": json.dumps({"compute": compute}, separators=separators)}])
            shown = "\n".join(self.lines)
            self.assertNotIn("c2VjcmV0", shown)
            self.assertIn("web-01", shown)

    def test_imds_is_asked_for_the_document_until_it_knows_the_vm(self) -> None:
        for trouble in ([], *([{"status": status}] * 4 for status in (404, 410, 429, 500, 503))):
            self.assertEqual(self.check_name(trouble).asked(IMDS), [self.DOCUMENT] * (len(trouble) + 1))

    def test_what_is_no_document_is_told(self) -> None:
        with self.assertRaisesRegex(ProvisioningError, "not an instance document, but '<p>log in': JSONDecodeError "):
            self.instance(self.azure(imds=[{"body": "<p>log in"}] * 9), timeout=0.2)

    def test_imds_that_does_not_know_the_document_is_asked_for_the_name(self) -> None:
        azure = self.azure(imds_versions=["2017-04-02", "2019-06-01"], name="web-02\r\n")
        self.assertEqual(self.instance(azure), Instance("web-02", "", [], False, []))
        self.assertEqual(azure.asked(IMDS), [self.DOCUMENT, self.NAME])
        azure = self.check_name([{"status": 400}, {"status": 400}])  # the document comes first each time
        self.assertEqual(azure.asked(IMDS), [self.DOCUMENT, self.NAME, self.DOCUMENT])

    def test_the_program_gives_imds_ten_seconds_and_a_user_all_its_time_before_it_takes_the_name_alone(self) -> None:
        self.replace(hostname_step=mock.Mock(), user_step=mock.Mock())
        with self.lasting(10, 10 + azure_provisioning.LONGEST_PAUSE + 1):
            azure = self.provision("hostname", imds_versions=["2017-04-02", "2019-06-01"])
        asked = azure.asked(IMDS)
        self.assertEqual(asked, [self.DOCUMENT] * (len(asked) - 1) + [self.NAME])
        with self.lasting(2, 4):
            self.run_on(azure, "--timeout", "4", "hostname")
        self.assertRegex(self.warnings()[-1], "status 400 .*; taking the name of the VM resource from this old IMDS$")
        for steps, trouble in (("hostname", 4), ("user", 12)):
            azure = self.provision(steps, imds=[{"status": 400}] * trouble)
            self.assertEqual(azure.asked(IMDS), [self.DOCUMENT] * (trouble + 1))

    def test_a_name_that_is_none_is_not_taken_from_an_old_imds_either(self) -> None:
        for name in ("<html>please log in</html>", "", "a b", "\u0430"):
            azure = self.azure(imds_versions=["2019-06-01"], name=name)
            with self.assertRaisesRegex(ProvisioningError, ": compute/name is no name: .*; gave up after 30 s"):
                self.instance(azure, timeout=30)

    def test_hostile_documents_take_no_time(self) -> None:
        self.replace(log_level=DEBUG)
        for text in ('"keyData":"",' * 90000, '"keyData":"' + "A" * 900000 + '",', '"userData"' + " " * 900000 + ":1,"):
            started = time.process_time()
            self.check_name([{"body": '{"compute":{' + text + '"name":"web-01"}}'}])
            self.assertLess(time.process_time() - started, 1, text[:20])


class HostNameTest(Case):
    """Any answer becomes a host name, or an error that is final; the line of 127.0.1.1 follows."""

    def test_names(self) -> None:
        every = string.ascii_letters + "-" + string.digits
        self.assertEqual(azure_provisioning.valid_host_name(every), every)
        whole = {"WEB.example.com": "WEB.example.com", "a" * 62 + ".b": "a" * 62 + ".b"}
        letters = {"web_01": "web-01", "set_0": "set-0", "web\n01\x00": "web-01"}
        others = {"web 01; rm -rf /": "web-01--rm--rf", "$(reboot)": "reboot", "m\u00fcnchen": "m-nchen"}
        ends = {"web-01": "web-01", "-web-": "web", ".web.": "web", "web..01": "web.01", "web.-01-.x": "web.01.x"}
        long = {"a" * 65: "a" * 63, "a" * 62 + "-b": "a" * 62, "a" * 63 + "--": "a" * 63, "a" * 63 + ".b": "a" * 63}
        for raw, name in {**whole, **letters, **others, **ends, **long}.items():
            self.assertEqual(azure_provisioning.valid_host_name(raw), name)

    def test_every_result_is_valid_and_stays_as_it_is(self) -> None:
        choose = random.Random(1)
        label = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
        for _ in range(2000):
            raw = "".join(choose.choices("aZ0-._\u00e9 " + "x" * choose.randrange(99), k=choose.randrange(80)))
            if set(raw[:64]) & set("aZ0x"):
                name = azure_provisioning.valid_host_name(raw)
                self.assertRegex(name, rf"\A{label}(\.{label})*\Z")
                self.assertLessEqual(len(name), 64)
                self.assertEqual(azure_provisioning.valid_host_name(name), name)

    def test_a_name_of_which_nothing_can_stay_is_final(self) -> None:
        for raw in ("___", ".-.", "\u0661\u0662"):
            azure = self.provision(computer_name=raw, status=1)
            self.assertEqual(self.lines[0], f"hostname failed: nothing of {raw!r} can be a host name")
            self.assertEqual((self.clock.pauses, len(azure.asked(IMDS)), len(azure.accepted)), ([], 1, 1))

    def test_a_name_is_that_of_the_kernel_and_of_the_file(self) -> None:
        kernel = os.uname().nodename
        for name, file, wanted in ((kernel, kernel, True), (kernel, "web-99", False), ("web-99", "web-99", False)):
            self.replace(read_file=lambda path, text=file: text + "\n")
            self.assertEqual(azure_provisioning.host_name_is(name), wanted)

    def test_a_name_that_the_kernel_refuses_is_an_error(self) -> None:
        self.stack.close()
        system = mock.Mock()
        system.sethostname.side_effect = OSError("no")
        self.replace(run=system.run, replace_file=system.replace_file)
        self.replace(socket, sethostname=system.sethostname)
        with self.assertRaisesRegex(ProvisioningError, "^sethostname web-99: no$"):
            azure_provisioning.set_host_name("web-99")
        nmcli = mock.call.run("nmcli", "general", "hostname", "web-99")
        written = mock.call.replace_file("/etc/hostname", "web-99\n")
        self.assertEqual(system.mock_calls, [nmcli, mock.call.sethostname("web-99"), written])
        system.sethostname.side_effect, system.replace_file.side_effect = None, ProvisioningError("read-only")
        with self.assertRaisesRegex(ProvisioningError, "^read-only$"):
            azure_provisioning.set_host_name("web-99")
        self.assertEqual(system.sethostname.call_count, 2)

    def check_hosts(self, name: str, changes: Dict[str, str]) -> None:
        """Check what becomes of what follows 127.0.1.1, whatever stands around it."""
        others = "127.0.0.1 localhost old\n# 127.0.1.1 old\n127.0.1.10 old\n10.127.0.1.1 old\n::1 old\n"
        for context in ("127.0.1.1{0}\n", "  127.0.1.1{0}\r\n", others + "127.0.1.1{0}\n::1 old"):
            for before, after in changes.items():
                hosts = context.format(after)
                self.assertEqual(azure_provisioning.rename_in_hosts(context.format(before), name), hosts)
                self.assertEqual(azure_provisioning.rename_in_hosts(hosts, name), hosts)

    def test_the_line_of_127_0_1_1_in_hosts_follows(self) -> None:
        space = {" old": " new", "\told.example.com old": "\tnew.example.com new", "  old  # old": "  new  # old"}
        names = {" 127": " new", " old db.local older": " new db.local older", " old.x.y": " new.x.y new"}
        literally = {" a+b(c.example a+b(c": " new.example new", " old.a.b db old old.c": " new.a.b new db"}
        self.check_hosts("new", {**space, **names, **literally})

    def test_a_name_with_a_domain_has_its_short_name_beside_it_in_hosts(self) -> None:
        long = {" old.a.b old": " new.x.y new", " old.a.b": " new.x.y new", " old old.a.b": " new.x.y new"}
        self.check_hosts("new.x.y", {**long, " old": " new.x.y new", " old db": " new.x.y new db"})

    def test_nothing_else_in_hosts_changes(self) -> None:
        second = "127.0.1.1 {} db\n127.0.1.1 old db.old"
        self.assertEqual(azure_provisioning.rename_in_hosts(second.format("old"), "new"), second.format("new"))
        for text in ("", " # old", " host new", " # \x0b\u2028127.0.1.1 old"):
            self.check_hosts("new", {text: text})


class MachineTest(Case):
    """Programs and files, and whose rights they are used with."""

    def setUp(self) -> None:
        super().setUp()
        self.stack.close()  # the real ones
        self.replace(log=self.log)
        self.directory = os.path.realpath(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.path = self.directory + "/file"
        self.keys = self.directory + "/.ssh/authorized_keys"
        self.user = pwd.struct_passwd(("nobody", "x", 12345, 12346, "", "/", "/bin/sh"))

    def check_mode(self, path: str, mode: int) -> None:
        self.assertEqual(os.stat(path).st_mode & 0o7777, mode)

    def test_a_program_that_fails_or_does_not_end_is_one_line_and_it_has_nothing_to_read(self) -> None:
        def read() -> None:
            os.dup2(os.pipe()[0], 0)
            azure_provisioning.run("sh", "-c", "! read line")

        started = time.monotonic()
        for code, limit, told in (
            ("exec sleep 60", 0.2, "no end within 0.2 s"),
            ("sleep 60 & wait", 0.2, "no end within 0.2 s"),  # its child keeps the output open
            ("echo no; exit 3", 15, "exit status 3: no"),
            ("printf %0999d 7; exit 3", 15, "exit status 3: 0{399}7"),  # its last words count
        ):
            with self.assertRaisesRegex(ProvisioningError, f"^sh -c {code}: {told}$"):
                azure_provisioning.run("sh", "-c", code, limit=limit)
        self.assertLess(time.monotonic() - started, 5)
        with self.assertRaisesRegex(ProvisioningError, "^no-such-program: .*(No such file|Permission denied)"):
            azure_provisioning.run("no-such-program")
        self.in_child(read)
        self.assertEqual(azure_provisioning.run.__kwdefaults__, {"limit": 15})

    def test_a_file_is_replaced_with_its_label_and_mode_and_for_good_or_not_at_all(self) -> None:
        self.addCleanup(os.umask, os.umask(0o077))
        os.symlink("file", self.directory + "/link")
        azure_provisioning.replace_file(self.path, "old text")
        os.mkfifo(self.path + ".azure-provisioning")  # a power cut left it
        kept, restored, sizes = mock.Mock(), mock.Mock(), []
        self.replace(restore_label=restored)
        self.replace(os, getxattr=lambda path, name: f"label of {path}".encode(), setxattr=kept)
        self.replace(os, fsync=lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
        azure_provisioning.replace_file(self.directory + "/link", "n\udcffw", 0o640)
        kept.assert_called_once_with(mock.ANY, "security.selinux", f"label of {self.path}".encode())
        self.assertEqual((restored.mock_calls, len(sizes), sizes[0]), ([], 2, 3))
        self.check_mode(self.path, 0o640)
        with open(self.path, "rb") as binary:
            self.assertEqual(binary.read(), b"n\xffw")
        self.replace(os, getxattr=mock.Mock(side_effect=OSError))
        azure_provisioning.replace_file(self.directory + "/new", "")
        restored.assert_called_once_with(self.directory + "/new")
        self.check_mode(self.directory + "/new", 0o644)
        self.replace(os, rename=mock.Mock(side_effect=OSError("no")))
        with self.assertRaisesRegex(ProvisioningError, f"^write {self.path}: no$"):
            azure_provisioning.replace_file(self.path, "new")
        self.assertEqual(azure_provisioning.read_file(self.path), "n\udcffw")
        self.assertEqual(sorted(os.listdir(self.directory)), ["file", "link", "new"])

    def test_what_is_no_file_is_not_replaced(self) -> None:
        os.mkfifo(self.directory + "/fifo")
        os.symlink("fifo", self.path)
        with self.assertRaisesRegex(ProvisioningError, f"^write {self.directory}/fifo: not a regular file$"):
            azure_provisioning.replace_file(self.path, "new")
        self.assertEqual(sorted(os.listdir(self.directory)), ["fifo", "file"])

    def test_labels_are_restored_where_selinux_is_on_and_has_a_policy(self) -> None:
        both, missing = ["/sys/fs/selinux/enforce", "/etc/selinux/config"], ProvisioningError("restorecon: no")
        for files, outcome in (([], None), (both[:1], None), (both[1:], None), (both, None), (both, missing)):
            run = mock.Mock(side_effect=outcome)
            self.replace(run=run)
            self.replace(os.path, exists=files.__contains__)
            self.forget()
            azure_provisioning.restore_label("/etc/new")
            self.assertEqual(run.mock_calls, [mock.call("restorecon", "-R", "/etc/new")] * (files == both))
            self.assertEqual(len(self.warnings()), int(outcome is missing))

    def test_a_file_is_read_as_it_is_or_not_at_all(self) -> None:
        os.mkfifo(self.directory + "/fifo")
        with open(self.path, "w", encoding="utf-8") as file:
            file.truncate(azure_provisioning.FILE_LIMIT + 1)
        for name, told in (("/fifo", "not a regular"), ("", "Is a dir"), ("/file", "more than 4194304 ch")):
            with self.assertRaisesRegex(ProvisioningError, f"^read {self.directory}{name}: .*{told}"):
                azure_provisioning.read_file(self.directory + name)
        self.assertEqual(azure_provisioning.read_file(self.directory + "/none"), "")
        os.utime(self.path, ns=(1, 7))
        self.assertEqual(azure_provisioning.modified(self.path), 7)
        self.assertEqual(azure_provisioning.modified(self.directory + "/none"), 0)

    def add_keys(self, *keys: str) -> str:
        """What is in authorized_keys after keys were added."""
        azure_provisioning.add_keys(self.directory, {line.split()[1]: line for line in keys})
        self.check_mode(self.directory + "/.ssh", 0o700)
        self.check_mode(self.keys, 0o600)
        return azure_provisioning.read_file(self.keys)

    def test_keys_are_added_to_those_that_are_there(self) -> None:
        restore = mock.Mock()
        self.replace(restore_label=restore)
        self.assertEqual(self.add_keys(RSA + " a", ED25519), f"{RSA} a\n{ED25519}\n")
        restore.assert_called_with(self.directory + "/.ssh")
        before = os.stat(self.keys).st_ino
        os.chmod(self.keys, 0o666)
        self.assertEqual(self.add_keys(ED25519 + " again", RSA), f"{RSA} a\n{ED25519}\n")
        self.assertEqual(os.stat(self.keys).st_ino, before)
        known = f'# {RSA}\nfrom="10.0.0.0/8" {ED25519} b'
        azure_provisioning.replace_file(self.keys, known, 0o666)
        os.chmod(self.directory + "/.ssh", 0o777)
        self.assertEqual(self.add_keys(RSA, ED25519), f"{known}\n{RSA}\n")
        os.unlink(self.keys)
        os.mkfifo(self.keys)
        with self.assertRaisesRegex(ProvisioningError, "not a regular file"):
            self.add_keys(RSA)

    def test_the_users_rights_are_taken_on_and_given_back_whatever_happens(self) -> None:
        became = [mock.call.initgroups("nobody", 12346), mock.call.setegid(12346), mock.call.seteuid(12345)]
        gave_back = [mock.call.seteuid(0), mock.call.setegid(0), mock.call.setgroups([4])]
        for trouble, told in ((PermissionError("no"), "as nobody: no"), (ProvisioningError("no"), "no"), (None, "")):
            system = mock.Mock()
            system.act.side_effect = trouble
            self.replace(os, getgroups=lambda: [4])
            self.replace(os, **{call[0]: getattr(system, call[0]) for call in [*became, *gave_back]})
            refused = self.assertRaisesRegex(ProvisioningError, f"^{told}$") if trouble else contextlib.ExitStack()
            with refused, azure_provisioning.as_user(self.user):
                system.act()
            self.assertEqual(system.mock_calls, [*became, mock.call.act(), *gave_back])

    def test_the_kernel_holds_it_to_the_users_rights(self) -> None:
        def act() -> None:
            before = os.getresuid(), os.getresgid(), os.getgroups()
            denied = "(?i)^as nobody: .*denied.*" if os.geteuid() == 0 else "permitted"
            with self.assertRaisesRegex(ProvisioningError, denied), azure_provisioning.as_user(self.user):
                self.assertEqual((os.getresuid(), os.getegid()), ((0, 12345, 0), 12346))
                self.assertNotIn(0, os.getgroups())
                os.mkdir(self.directory + "/.ssh")  # of another user, and closed
            self.assertEqual((os.getresuid(), os.getresgid(), os.getgroups()), before)

        self.in_child(act)  # which may lose its rights

    def test_sshd_reads_our_drop_in_before_those_that_others_usually_write(self) -> None:
        directory, name = os.path.split(azure_provisioning.SSHD_DROP_IN)
        self.assertEqual(directory, "/etc/ssh/sshd_config.d")
        self.assertLess(name, "50-cloud-init.conf")

    def test_locks_of_useradd_that_are_nobodys_are_removed_and_others_left_alone(self) -> None:
        self.assertEqual(azure_provisioning.USER_DATABASE, "/etc")
        self.replace(USER_DATABASE=self.directory)
        locks = [name + ".lock" for name in ("passwd", "shadow", "group", "gshadow", "subuid", "subgid")]
        for name in (*locks, "passwd"):
            azure_provisioning.replace_file(f"{self.directory}/{name}", "")
        with mock.patch("fcntl.lockf", side_effect=BlockingIOError("busy")) as lock:
            azure_provisioning.unlock_user_database()
        lock.assert_called_once_with(mock.ANY, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.assertEqual(set(os.listdir(self.directory)), {*locks, "passwd", ".pwd.lock"})
        self.assertEqual(len(self.lines), 1)
        for _ in range(2):
            azure_provisioning.unlock_user_database()
            self.assertEqual(set(os.listdir(self.directory)), {".pwd.lock", "passwd"})
        self.assertEqual(len(self.lines), 1)


NETWORKD = "networkctl --no-pager status eth7"
NETWORK_MANAGER = "nmcli --get-values DHCP4.OPTION device show eth7"
DHCPCD = "dhcpcd --dumplease eth7"
DHCLIENT = "systemctl --no-pager --full status"
CONNECT = "nmcli --wait 7 device connect eth7"
RENEW = "dhcpcd --renew eth7"


class PublishTest(Case):
    """The DHCP client is made to send the name; the boot tests do it with real ones."""

    def setUp(self) -> None:
        super().setUp()
        self.ran: List[str] = []
        self.later: Dict[int, Dict[str, Any]] = {}  # what changes, by how often the module has slept by then
        self.answers: Dict[str, Any] = {NETWORK_MANAGER: "ip_address = 10.0.0.4", CONNECT: ""}
        self.replace(self.clock, sleep=self.sleep)
        self.replace(
            run=self.run_in_time,
            default_interface=lambda: self.interface,
            modified=lambda path: self.written if path == "/var/lib/dhcpcd/eth7.lease" else 0,
        )

    def run_in_time(self, *command: str, limit: float) -> str:
        """A system in which there are those programs that have an answer: text, or what becomes of the network."""
        self.assertEqual(limit, azure_provisioning.RENEWAL_LIMIT)
        line = " ".join(command)
        if line not in self.answers:
            raise ProvisioningError(f"{line}: [Errno 2] No such file or directory")
        self.ran.append(line)
        answer = self.answers[line]
        if isinstance(answer, str):
            return answer
        if isinstance(answer, list):
            answer = answer.pop(0)
        self.later = {len(self.clock.pauses) + pauses: change for pauses, change in answer.items()}
        self.change()
        if self.trouble:
            raise ProvisioningError(self.trouble)
        return ""

    def change(self) -> None:
        self.__dict__.update(self.later.pop(len(self.clock.pauses), {}))

    def sleep(self, seconds: float) -> None:
        Clock.sleep(self.clock, seconds)
        self.change()

    def publish(self, level: int, told: str, tries: int = 1, interface: str = "eth7", dry_run: bool = False) -> None:
        self.interface, self.written, self.trouble, self.later = interface, 1, "", {}
        self.ran.clear()
        self.forget()
        with self.lasting(0, tries * 2 * (azure_provisioning.RENEWAL_LIMIT + 0.5)):
            azure_provisioning.publish_host_name("web-01", dry_run)
        self.assertEqual(self.levels, [WARNING] * (tries - 1) + [level], self.lines)
        for line in self.lines[:-1]:
            self.assertRegex(line, "^eth7 has no default route after .*; trying again$")
        advice = "; for other machines to resolve web-01, restart the DHCP client, or reboot$"
        self.assertRegex(self.lines[-1], f"^{told}{advice if level <= WARNING else ''}")

    def test_the_client_that_has_the_lease_is_asked(self) -> None:
        unit = "    |-networking.service\n    | `-7 /sbin/dhclient -4 -v -i -pf /run/dhclient.{0}.pid {0}\n"
        wait = "/lib/systemd/systemd-networkd-wait-online --interface=eth7 --timeout=8"
        networkd = ["networkctl reconfigure eth7", wait]
        cases: List[Tuple[str, str, List[str]]] = [
            (NETWORKD, "State: routable\nAddress: 10.0.0.4 (DHCP4 via 10.0.0.1)\n", networkd),
            (NETWORKD, "Address: 10.0.0.4 (DHCPv4 via 10.0.0.1)\n", networkd),
            (NETWORK_MANAGER, "dhcp_lease_time = 86400 | ip_address = 10.0.0.4", [CONNECT]),
            (DHCPCD, "reason=BOUND\ninterface=eth7\nip_address=10.0.0.4\n", [RENEW]),
            (DHCLIENT, unit.format("eth7"), ["systemctl restart networking.service"]),
            (NETWORKD, "Address: 10.0.0.4\nDNS: 168.63.129.16\n", []),
            (DHCPCD, "reason=CARRIER\n", []),
            (DHCLIENT, unit.format("eth0") + unit.format("eth77") + "7 dhclient xeth7\n/bin/less dhclient.txt\n", []),
        ]
        for asked, output, commands in cases:
            self.answers = dict.fromkeys([*commands, NETWORKD, NETWORK_MANAGER, DHCPCD, DHCLIENT], "")
            self.answers[asked] = output
            if RENEW in commands:
                self.answers[RENEW] = {3: {"written": 2}}
            if commands:
                self.publish(INFO, f"would publish web-01 by {commands[0]}$", dry_run=True)
                self.assertFalse({*self.ran} & {*commands})
                self.publish(INFO, rf"published web-01 by {commands[0]}, after 0\.\d s$")
                self.assertEqual([line for line in self.ran if line in commands], commands)
            else:
                self.publish(WARNING, "found no DHCP lease to renew on eth7")

    def test_it_waits_for_the_lease_and_for_the_network_and_asks_again_if_that_stays_away(self) -> None:
        no, away = "nmcli: exit status 3: no", "eth7 has no default route after "
        published, no_lease = "published web-01 by ", "dhcpcd --renew eth7: no new lease within 8 s"
        for command, changes, level, told, slept in (
            (RENEW, {3: {"written": 2}}, INFO, published, 0.03),
            (RENEW, {1: {"written": 0}, 5: {"written": 2}}, INFO, published, 0.05),  # one that vanishes is no new one
            (RENEW, {1: {"written": 0}}, WARNING, no_lease, 8),
            (RENEW, {}, WARNING, no_lease, 8),
            (CONNECT, {0: {"interface": ""}, 5: {"interface": "eth7"}}, INFO, published, 0.05),
            (CONNECT, {0: {"interface": ""}}, WARNING, away + CONNECT, 16),
            (CONNECT, {0: {"interface": "eth8"}}, WARNING, away + CONNECT, 16),  # the next best
            (CONNECT, {0: {"interface": "", "trouble": no}}, WARNING, away + no, 16),
            (CONNECT, {0: {"trouble": no}}, WARNING, no, 0),
        ):
            asked = NETWORK_MANAGER if command == CONNECT else DHCPCD
            self.answers = {asked: "ip_address=10.0.0.4", command: changes}
            tries = 2 if told.startswith(away) else 1
            self.publish(level, told, tries)
            self.assertEqual(self.ran, [asked, *[command] * tries])
            self.assertAlmostEqual(sum(self.clock.pauses), slept, delta=slept / 10)
        self.answers[CONNECT] = [{0: {"interface": "", "trouble": no}}, {0: {"interface": "eth7", "trouble": ""}}]
        self.publish(INFO, f"published web-01 by {CONNECT}, after 8", tries=2)

    def test_names_of_interfaces_are_taken_literally_and_without_one_nobody_is_asked(self) -> None:
        self.answers = {DHCLIENT: "7 dhclient -4 ethh\n"}
        self.publish(WARNING, r"found no DHCP lease to renew on eth\+", interface="eth+")
        self.assertEqual(self.ran, [DHCLIENT])
        self.publish(WARNING, "found no DHCP lease to renew on a default route", interface="")
        self.assertEqual(self.ran, [])


class KeysTest(Case):
    """What Azure hands on as SSH keys becomes lines of authorized_keys; the rest is told and left out."""

    def check(self, text: str, *wanted: str, left_out: int = 0) -> None:
        keys, rest = azure_provisioning.parse_keys(text)
        self.assertEqual((list(keys.values()), len(rest)), (list(wanted), left_out), rest)
        self.assertTrue(all(encoded.startswith("AAAA") and encoded in line.split() for encoded, line in keys.items()))

    def test_every_kind_of_key_is_one_with_options_before_it_and_a_comment_after(self) -> None:
        quoted = 'command="echo ssh-rsa \\"x y\\""'
        for one in KEYS:
            self.check(one, one)
            self.check(f"{quoted} {one}", f"{quoted} {one}")
            self.check(f"# {one}\n{one} alice\nKey: {one}\na b {one}", f"{one} alice", left_out=3)
            self.check(f"{one} alice@laptop (work)  2 \r\n", f"{one} alice@laptop (work)  2")
            self.check(f"{one} a\0b\x1b[2J\tc", f"{one} a b [2J c")  # nothing but text
            for options in ('from="10.0.0.0/8"', 'command="echo  a b",no-pty', 'environment="A=ssh-rsa B"', "restrict"):
                self.check(f"{options} {one} alice\r\n", f"{options} {one} alice")

    def test_several_in_one_text_count_each_and_once_also_one_that_was_broken_within_its_base64(self) -> None:
        for end in ("\n", "\r\n", "\r", "\n\n", " \r\n \r\n"):
            self.check(end.join([RSA + " a", ED25519, RSA]) + end, RSA + " a", ED25519)
        for end, width in itertools.product(("\r\n", "\n"), (10, 64, 76)):
            broken = end.join(RSA[start : start + width] for start in range(0, len(RSA), width))
            self.check(f"{broken} alice@laptop{end}{ED25519}{end}", RSA + " alice@laptop", ED25519)

    def test_what_is_no_key_is_left_out_and_the_others_count(self) -> None:
        encoded = RSA.split()[1]
        others = "hello", "ssh-rsa", "ssh-rsa AAAA", *(kind + encoded for kind in ("ssh-dss ", "ssh-ed25519 "))
        broken = RSA[:60], RSA[60:]
        not_base64 = RSA[:-8], ED25519 + "====", "!".join(broken), "!!!!".join(broken), "ssh-rsa \u0661"
        short = "ssh-rsa " + base64.b64encode(b"\0\0\0\7ssh-rsa\0\0\0\x09short").decode()
        fields = key("ssh-rsa", b"\1\0\1"), key("ssh-rsa", b"\1\0\1", b"n", b"more"), key("ssh-ed25519", b""), short
        certificate = f"-----BEGIN CERTIFICATE-----\n{RSA}\nMIIC\n-----END CERTIFICATE-----"
        private = "-----BEGIN OPENSSH PRIVATE KEY-----\r\nb3Bl\r\nbnNz\r\n-----END OPENSSH PRIVATE KEY-----"
        long = key("ssh-rsa", b"\1\0\1", b"n" * 6144)
        kinds = "sk-ssh-ed25519@openssh-com AAAA", "---- BEGIN SSH2 PUBLIC KEY ----"
        for wrong in (*others, *not_base64, *fields, certificate, private, long, *kinds):
            with self.subTest(wrong[:70]):
                self.check(wrong, left_out=1)
                self.check(f"{ED25519} a\n{wrong}\n{RSA}\n", ED25519 + " a", RSA, left_out=1)
        self.check(f"{RSA[:60]} a\nhello\n{ED25519}", ED25519, left_out=2)
        self.check(f'{RSA[:60]}\nfrom="::1" {ED25519}', 'from="::1" ' + ED25519, left_out=1)
        self.check(f"{RSA}\n-----BEGIN RSA PRIVATE KEY-----\nMII\nMII\n", RSA, left_out=1)  # which ends nowhere

    def test_much_of_nothing_takes_no_time(self) -> None:
        lines = "ssh-rsa A\n" * 10000, "ssh-rsa A\n" + "AAAA\n" * 20000, "x\n" * 10000, (" " * 8000 + "x\n") * 100
        words = "ssh-rsa " + "A" * 1000000, "ssh-rsa" + " " * 500000 + "x"
        many = " ssh-rsa" * 100000, ("ssh-rsa " * 900 + "\n") * 100
        begun = "-----BEGIN A-----" * 50000, "-----BEGIN " + "A" * 900000, "-----BEGIN " * 80000
        for text in lines + words + many + begun:
            started = time.process_time()
            self.assertEqual(azure_provisioning.parse_keys(text)[0], {})
            self.assertLess(time.process_time() - started, 2, text[:20])


class UserTest(Case):
    """The user that the VM was created with; the boots make real ones."""

    def setUp(self) -> None:
        super().setUp()
        self.directory = self.stack.enter_context(tempfile.TemporaryDirectory())
        self.drop_in = self.directory + "/drop.conf"
        self.users = {"root": 0, "daemon": 1, "nobody": 65534}
        self.comments: Dict[str, str] = {}
        self.groups = [grp.struct_group((name, "x", 27, ["bob"])) for name in ("adm", "sudo", "bin")]
        self.ran: List[str] = []
        self.written: Dict[str, Tuple[str, str, int]] = {}
        self.keys: List[Tuple[str, str, List[str]]] = []
        self.failing = self.settings = self.login_defs = self.acting_as = ""
        self.reason = "no"
        self.replace(
            run=self.run_command,
            replace_file=lambda path, text, mode: self.written.update({path: (self.acting_as, text, mode)}),
            read_file=lambda path: self.login_defs if path == "/etc/login.defs" else "",
            as_user=lambda user: mock.patch.object(self, "acting_as", user.pw_name),
            add_keys=lambda home, keys: self.keys.append((self.acting_as, home, list(keys.values()))),
            unlock_user_database=lambda: self.ran.append("unlock"),
            set_host_name=lambda name: self.run_command("sethostname", name),
            publish_host_name=mock.Mock(),
            SUDOERS=self.directory,
            SSHD=self.directory + "/sshd",
            SSHD_DROP_IN=self.drop_in,
        )
        self.replace(pwd, getpwnam=self.find, getpwall=lambda: [self.find(name) for name in self.users])
        self.replace(grp, getgrall=lambda: self.groups, getgrnam=lambda name: {"bin": self.groups[2]}[name])
        self.replace(os, sync=lambda: self.ran.append("sync"))

    def find(self, name: str) -> pwd.struct_passwd:
        comment = self.comments.get(name, "Somebody,,,")
        return pwd.struct_passwd((name, "x", self.users[name], 1000, comment, f"/home/{name}", "/bin/sh"))

    def run_command(self, *command: str) -> str:
        self.ran.append(" ".join(command))
        name = command[-1]
        if command[0] == "useradd":
            self.users[name] = 1000
            self.comments[name] = command[command.index("--comment") + 1]
        if self.failing and self.failing in self.ran[-1]:
            raise ProvisioningError(f"{self.failing}: exit status 1: {self.reason}")
        if command[:2] == ("usermod", "--comment"):
            self.comments[name] = command[2]
        if command[0] == "userdel":
            del self.users[name], self.comments[name]
        return self.settings

    def user(self, *arguments: str, told: str = ".*", keys: Sequence[str] = (RSA,), **more: Any) -> FakeAzure:
        """Run the step user, or with arguments, for a VM created with alice and keys; told fits the last line."""
        self.ran, self.written, self.keys = [], {}, []
        azure = self.provision(*(arguments or ["user"]), **{"admin_username": "alice", "public_keys": keys, **more})
        self.assertRegex(self.lines[-1], rf"\A{told}\Z")
        return azure

    def test_a_user_that_does_not_exist_is_made_with_a_home_groups_keys_and_sudo(self) -> None:
        marks = azure_provisioning.UNFINISHED_HOME, azure_provisioning.UNFINISHED
        for there, mark in zip((False, True), marks):  # a home that is there is not ours
            self.users.pop("alice", None)
            self.replace(os.path, lexists=lambda path, there=there: there)
            self.user()
            shell = "/bin/bash" if os.path.exists("/bin/bash") else "/bin/sh"
            made = (
                f"useradd --comment {mark} --no-log-init --create-home --home-dir "
                f"/home/alice --shell {shell} --groups adm,sudo --password * --key PASS_MAX_DAYS=-1 -- alice"
            )
            self.assertEqual(self.ran, ["unlock", made, "sync", "usermod --comment  -- alice"])
            self.assertEqual(self.keys, [("alice", "/home/alice", [RSA])])
            self.assertEqual(self.lines, ["made the user alice", "alice can log in, SSH keys: 1"])
        self.user(admin_username="bin")  # a group of that name is left alone
        self.assertIn(" --no-user-group -- bin", self.ran[1])

    def test_a_user_that_exists_is_kept_and_gets_what_it_lacks(self) -> None:
        self.users.update(alice=1001, bob=1002)
        append = ["usermod --append --groups adm,sudo -- alice"]
        for name, keys, ran in (("alice", [RSA], append), ("bob", [RSA, ED25519 + " b"], [])):
            self.user(admin_username=name, keys=keys)
            self.assertEqual((self.ran, self.keys), (["unlock", *ran], [(name, f"/home/{name}", keys)]))

    def test_where_there_is_nobody_to_make_or_no_key_or_in_a_dry_run_nothing_is_done(self) -> None:
        no_key = "the VM was created without an SSH key for alice, and IMDS has no passwords: it is not made"
        old = r"user failed: GET .*: status 400 .*; gave up after 300 s"
        system = r"user failed: the user \w+ is not a person's: its ID is \d+"
        invalid = "user failed: .* cannot be the name of a user"
        refused = "-rf --help a:b a,b ../x . .. 1000 a/b a$ %sudo #0 *"
        names = [*refused.split(), "a b", "a\nb", "\u0430lice", "x" * 33, ["root"], 7]
        cases: List[Tuple[int, str, Dict[str, Any]]] = [
            (INFO, "the VM was created without a user: nothing to do", {"admin_username": ""}),
            (WARNING, no_key, {"keys": []}),
            (WARNING, no_key, {"keys": [" \n"]}),
            (ERROR, old, {"imds_versions": ["2019-06-01"]}),
            *((ERROR, system, {"admin_username": name}) for name in ("root", "daemon", "nobody")),
            *((ERROR, invalid, {"admin_username": name}) for name in names),
        ]
        self.users["bob"] = 1000
        for name, what in (("alice", "make"), ("bob", "keep")):
            self.user("-n", "user", admin_username=name, keys=KEYS, told=f"would {what} the user {name}, SSH keys: 7")
            self.assertEqual((self.ran, self.keys, self.written), ([], [], {}))
        for level, told, created in cases:
            with self.subTest(created):
                self.user(status=int(level == ERROR), told=told, **created)
                self.assertEqual(self.levels[-1], level)
                self.assertEqual((self.ran, self.keys, self.written), ([], [], {}))

    def test_keys_that_are_none_are_told_and_the_others_count(self) -> None:
        certificate = "-----BEGIN CERTIFICATE-----\nMIIC0000\nAAAA1111\n-----END CERTIFICATE-----"
        private = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNz\nc2VjcmV0\n-----END OPENSSH PRIVATE KEY-----\n"
        putty = "PuTTY-User-Key-File-3: ssh-ed25519\nPrivate-Lines: 1\nAAAAIEkwc2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2Vj\n"
        strange: Sequence[Any] = ({"keyData": None}, {"keyData": True}, {"path": "/p"}, None, [])
        good = {"keyData": RSA}

        def check(keys: Any, left_out: Sequence[str], *failed: str) -> None:
            compute = {"name": "a", "osProfile": {"adminUsername": "alice"}, "publicKeys": keys}
            self.provision("user", imds=document(compute), status=len(failed))
            told = [f"not an SSH key, which is a line of a .pub file; left out: {line}" for line in left_out]
            self.assertEqual(self.warnings(), [*told, *failed])

        for entry, left_out in (
            ({"keyData": certificate}, ["(CERTIFICATE)"]),
            ({"keyData": private}, ["(OPENSSH PRIVATE KEY)"]),
            ({"keyData": putty}, ["PuTTY-User-Key-File-3: s", "Private-Lines: 1", "AAAAIEkwc2VjcmV0c2VjcmV0"]),
            ({"keyData": "x\n" * 10000}, ["x"] * 9),
            *((entry, [repr(entry)]) for entry in strange),
        ):
            check([entry, good], left_out)
            check([entry], left_out, "user failed: nothing of what was given as SSH keys is one")
        check(good, [], f"user failed: IMDS has publicKeys that are no list: {str(good)[:60]}")

    def test_whose_ids_are_those_of_people_is_for_login_defs_to_say(self) -> None:
        people = (500, "# people's\nUID_MIN\t\t\t  500\nUID_MAX 60000\n"), (70000, "UID_MAX 70000\n")
        systems = (500, ""), (999, "# UID_MIN 500\nSYS_UID_MIN 500\n"), (1500, "UID_MIN 2000\n"), (1, "UID_MIN 0x3e8\n")
        for uid, self.login_defs in (*people, *systems, (70000, "")):
            self.users["alice"] = uid
            self.user(status=0 if (uid, self.login_defs) in people else 1)

    def test_names_that_azure_allows_are_fine_and_the_last_that_sudo_reads(self) -> None:
        for name in ("alice", "AzureUser", "john.doe", "a", "_x", "9lives", "a-b_c", "ALL", "x" * 32):
            self.user(admin_username=name)
            file = f"zz-azure-provisioning-{name.replace('.', '_')}"
            self.assertGreater(file, max("90-cloud-init-users", "waagent", "wheel", "zfs"))
            written = "", f'"{name}" ALL=(ALL:ALL) NOPASSWD:ALL\n', 0o440
            self.assertEqual(self.written, {f"{self.directory}/{file}": written})
        self.replace(SUDOERS=self.directory + "/none")
        self.user()
        self.assertEqual(self.written, {})

    def test_a_user_that_could_not_be_made_is_undone_at_once(self) -> None:
        for self.failing in ("useradd", "usermod"):
            self.user(status=1, told=f"user failed: {self.failing}: exit status 1: no")
            self.assertEqual([line.split()[0] for line in self.ran[-2:]], ["unlock", "userdel"])
            self.assertEqual((self.keys, self.written), ([], {}))
            self.assertNotIn("alice", self.users)
        self.failing = "alice"  # nor can it be undone: the next boot will
        self.user(status=1, told="user failed: alice: exit status 1: no")
        self.assertTrue(self.comments["alice"].startswith(azure_provisioning.UNFINISHED))
        del self.users["alice"]
        self.replace(make_user=mock.Mock())
        self.user(status=1, told="user failed: there is no user alice after useradd made it")

    def test_users_that_a_power_cut_left_unfinished_are_removed(self) -> None:
        marks = (azure_provisioning.UNFINISHED, ""), (azure_provisioning.UNFINISHED_HOME, " --remove")
        for (mark, remove), left in itertools.product(marks, ("alice", "bob")):
            self.users = {"root": 0, left: 1000, "carol": 1001}
            self.comments = {left: mark}
            self.user()
            self.assertEqual(self.ran[:2], ["unlock", f"userdel --force{remove} -- {left}"])
            self.assertEqual(self.lines[0], f"removed the user {left}, which was left unfinished")
            self.assertTrue(self.ran[2].startswith("useradd "))
            self.assertIn("carol", self.users)
            self.user()  # what was undone is not undone again
            self.assertNotIn("userdel", "".join(self.ran))

    NO_PASSWORDS = "PasswordAuthentication no\nKbdInteractiveAuthentication no\nChallengeResponseAuthentication no\n"

    def sshd(self, settings: str, disabled: Any = "true", status: int = 0, told: str = ".*") -> None:
        """Run the step user where there is an sshd, which has settings, and passwords are disabled."""
        open(self.directory + "/sshd", "w").close()
        self.settings = f"port 22\n{settings}\nx11forwarding yes\n"
        self.user(disable_password_authentication=disabled, status=status, told=told)

    def test_sshd_takes_no_passwords_where_the_vm_was_created_without(self) -> None:
        self.user(disable_password_authentication="true")
        self.assertNotIn(self.drop_in, self.written)  # there is none
        for raw, disabled in (("false", False), ("", False), (False, False), ("true", True), (True, True)):
            self.sshd("", raw)
            self.assertEqual(self.written.get(self.drop_in), ("", self.NO_PASSWORDS, 0o600) if disabled else None)
            reload = "systemctl --no-block try-reload-or-restart [s]sh.service [s]shd.service"
            asked = self.directory + "/sshd -T -C user=alice,host=localhost,addr=127.0.0.1,laddr=127.0.0.1,lport=22"
            self.assertEqual(self.ran[-2:] if disabled else self.ran[-1:], [asked] + [reload] * disabled)
        self.failing = "systemctl"
        self.sshd("", status=1, told="user failed: systemctl: exit status 1: no")
        self.failing = "sshd -T"
        deprecated = "/etc/ssh/sshd_config line 1: Deprecated option X\n"
        for self.reason in ("sshd: no hostkeys available", deprecated + "Missing privilege separation directory"):
            self.sshd("")  # it cannot tell yet
            told = f"sshd -T: exit status 1: {self.reason}; whether it lets alice in is for its configuration to say"
            self.assertEqual((self.lines[-2], self.levels[-2:]), (told, [INFO] * 2))
            self.assertIn(self.drop_in, self.written)
        for self.reason in (
            "/etc/ssh/sshd_config: line 2: Bad configuration option: Prot",
            "/etc/ssh/sshd_config line 2: unsupported option",
            "/etc/ssh/sshd_config: terminating, 1 bad configuration options",
            "AuthenticationMethods cannot be satisfied by enabled authentication methods",
        ):
            open(self.drop_in, "w").close()  # as replace_file() would
            self.sshd("", status=1, told="user failed: sshd -T: exit status 1: " + self.reason)
            self.assertFalse(os.path.exists(self.drop_in))  # sshd is as it was
            self.assertNotIn(reload, self.ran)
        self.failing = ""
        self.replace(SSHD_DROP_IN="/no/such/drop.conf")  # then the image has to tell it
        for answer, status in (("no", 0), ("yes", 1)):
            self.sshd(f"passwordauthentication {answer}", status=status)
            self.assertNotIn("/no/such/drop.conf", self.written)

    def test_an_sshd_that_keeps_the_user_out_or_lets_others_in_is_an_error(self) -> None:
        self.users["alice"] = 1000
        for group in self.groups[:2]:
            group.gr_mem.append("alice")
        self.groups.append(grp.struct_group(("staff", "x", 1000, [])))  # the primary group of all here
        passwords = "passwordauthentication yes, kbdinteractiveauthentication yes, challengeresponseauthentication yes"
        for settings, wrong in (
            ("authorizedkeysfile .ssh/authorized_keys\nallowusers a*@10.0.0.*\ndenyusers alice@10.0.0.1", ""),
            ("authorizedkeysfile /home/alice/.ssh/authorized_keys\nallowgroups wheel\nallowgroups adm", ""),
            ("authorizedkeysfile /etc/ssh/keys/%u .ssh/authorized_keys2 %h/.ssh/authorized_keys", ""),
            ("allowusers bob\nallowusers alice\nallowgroups staff\ndenyusers bob\ndenygroups wheel", ""),
            ("allowusers ?lice\n" + self.NO_PASSWORDS.lower() + "pubkeyauthentication yes", ""),
            ("authenticationmethods publickey,password publickey", ""),
            ("authenticationmethods any", ""),
            ("authenticationmethods publickey,password", "authenticationmethods publickey,password"),
            ("authorizedkeysfile /etc/ssh/keys/%u none", "authorizedkeysfile /etc/ssh/keys/%u none"),
            ("authorizedkeysfile %h/keys\ndenygroups staff", "authorizedkeysfile %h/keys, denygroups staff"),
            ("allowusers bob\nallowusers root@::1\ndenygroups sudo", "allowusers bob root@::1, denygroups sudo"),
            ("allowgroups wheel\ndenyusers bob\ndenyusers al*", "denyusers bob al*, allowgroups wheel"),
            (passwords.replace(", ", "\n"), passwords),
            ("PasswordAuthentication yes", "passwordauthentication yes"),  # as OpenSSH 10.6 has it
            ("AuthorizedKeysFile /keys\nAllowUsers bob", "authorizedkeysfile /keys, allowusers bob"),
            ("pubkeyauthentication no\ndenyusers alice", "pubkeyauthentication no, denyusers alice"),
        ):
            with self.subTest(settings):
                self.sshd(settings, "false", status=1 if wrong and " yes" not in wrong else 0)
                self.sshd(settings, "true", status=1 if wrong else 0)
                told = f"user failed: sshd has {wrong}, and keeps alice out or lets others in: mend the image"
                told = told if wrong else "alice can log in, SSH keys: 1"
                self.assertEqual(self.lines[-1].lower(), told.lower())

    def test_imds_is_asked_once_for_name_and_user_and_ready_comes_last(self) -> None:
        order: List[str] = []
        self.replace(set_host_name=order.append, allow_sudo=lambda user: order.append("sudo"))
        azure = self.azure(public_keys=[RSA], admin_username="alice")
        azure.observer = lambda request: order.append(request["method"] + request["path"].partition("?")[0])
        for steps in (["ready", "user", "hostname"], ["hostname", "user", "ready"]):
            order.clear()
            self.run_on(azure, *steps)
            self.assertEqual(order, ["GET/metadata/instance", "web-01", "sudo", "GET/machine", "POST/machine"])

    def test_azure_is_told_what_keeps_the_user_out_and_that_alone(self) -> None:
        user, name = "user failed: useradd: exit status 1: no", "hostname failed: web-01: exit status 1: no"
        next_boot = "; the unit, if it is enabled, does all of this again at the next boot"
        failed, ready = f"Azure was told that provisioning failed{next_boot}", f"Azure was told Ready{next_boot}"
        success, failure = ("Ready", None, None), ("NotReady", "ProvisioningFailed", user)
        for steps, failing, report, errors in (
            (["user"], "useradd", [], [user]),
            (["user", "ready"], "useradd", [failure], [user, failed]),
            (["hostname", "user", "ready"], "useradd", [failure], [user, failed]),
            (["hostname", "ready"], "web-01", [success], [name, ready]),
            (["hostname", "user", "ready"], "web-01", [success], [name, ready]),
            (["user", "ready"], "", [success], []),  # the next boot
        ):
            self.failing = failing
            azure = self.user(*steps, status=1 if errors else 0)
            self.assertEqual([tuple(map(r.get, ("state", "substatus", "description"))) for r in azure.accepted], report)
            self.assertEqual(self.warnings(ERROR), errors)
            self.users.pop("alice", None)
        self.replace(allow_sudo=mock.Mock(side_effect=KeyError), update_hosts=mock.Mock(side_effect=TypeError))
        azure = self.user("hostname", "user", "ready", status=1, told=failed)
        self.assertEqual(self.warnings(ERROR)[:2], ["hostname failed: TypeError()", "user failed: KeyError()"])
        self.assertEqual(azure.accepted[0]["description"], "user failed: KeyError()")
        unknown = "Azure got no report, and will declare this VM failed" + next_boot
        dry = "would report to .*<State>NotReady</State>.*user failed: the user root is.*"
        self.user("-n", "user", "ready", admin_username="root", status=1, told=dry)
        self.failing = "useradd"
        self.user("--timeout", "1.5", "user", "ready", wireserver=[{"status": 503}] * 99, status=1, told=unknown)


class MainTest(Case):
    """The command line."""

    def test_a_dry_run_changes_and_reports_nothing_and_prints_what_it_would_do(self) -> None:
        self.replace(default_interface=lambda: "", read_file=lambda path: "127.0.1.1 old\n")
        name, hosts = "would set the host name to web-01, now it is", "would rename 127.0.1.1 in /etc/hosts to web-01"
        for arguments, shown in (
            (["--dry-run"], f"{name}.*{hosts}.*<State>Ready</State>"),
            (["-n", "--fail", "no disk"], "<State>NotReady</State>.*<Description>no disk</Description>"),
        ):
            azure = self.provision(*arguments)
            self.assertNotIn("POST", "".join(azure.asked(WIRESERVER)))
            self.assertRegex(" ".join(self.lines), shown)

    def test_addresses_may_be_names_and_wrong_usage_ends_with_status_2(self) -> None:
        for text in ("localhost", "localhost:65535", "127.0.0.1", "web-01.example.com:1"):
            self.assertEqual(azure_provisioning.parse_arguments(["--imds", text]).imds, text)
        self.assertEqual(azure_provisioning.main(["--wireserver", "a..b", "--timeout", "0.2", "ready"]), 1)
        self.assertEqual([("a..b" in line) for line in self.lines], [True, False])
        wrong = "reboot|--timeout 0|--timeout nan|--timeout inf|--timeout soon|--fail reason ready|--fail|--frob"
        addresses = "|host:0|host:65536|http://host/|host\r\nX-Evil: yes|h\u00f6st|[::1]"
        cases = [line.split() for line in wrong.split("|")] + [["--imds", address] for address in addresses.split("|")]
        for arguments in cases:
            with self.subTest(arguments), mock.patch("sys.stderr"), self.assertRaises(SystemExit) as caught:
                azure_provisioning.main(arguments)
            self.assertEqual(caught.exception.code, 2)


if __name__ == "__main__":
    unittest.main()
