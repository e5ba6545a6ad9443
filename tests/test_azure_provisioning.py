"""The module against the pretend Azure on loopback. Nobody waits: pauses are taken from an injected clock.

What changes a machine is not called here but in test_sandbox.py.
"""

import base64
import contextlib
import errno
import fcntl
import grp
import itertools
import json
import os
import pwd
import random
import shutil
import socket
import tempfile
import time
import tracemalloc
import unittest
from contextlib import ExitStack
from typing import Any, Dict, List, Optional, Sequence, Tuple
from unittest import mock
from xml.etree import ElementTree

import azure_provisioning
from azure_provisioning import DEBUG, ERROR, INFO, WARNING, GoalState, Instance, ProvisioningError
from tests.fake_azure import GOAL_STATE, IMDS, WIRESERVER, FakeAzure

Script = List[Dict[str, Any]]


class Clock:
    """Stands in for the module's time: sleeping takes no time, but what really takes time does."""

    def __init__(self) -> None:
        self.pauses: List[float] = []
        self.skipped = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.skipped

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.skipped += seconds

    def time(self) -> float:
        raise AssertionError("the wall clock may be set at any time during a first boot")


class Case(unittest.TestCase):
    """A VM on a pretend Azure whose time flies."""

    def setUp(self) -> None:
        self.stack = ExitStack()
        self.addCleanup(self.stack.close)
        self.clock = Clock()
        self.lines: List[str] = []
        self.levels: List[int] = []
        self.replace(time=self.clock, log=self.log, REQUEST_LIMIT=0.5)
        # This is not a VM.
        self.replace(run=self.untouchable, replace_file=self.untouchable, set_host_name=self.untouchable)

    def replace(self, module: Any = azure_provisioning, **replacements: Any) -> None:
        """Have names of module mean something else until the test ends."""
        for name, replacement in replacements.items():
            self.stack.enter_context(mock.patch.object(module, name, replacement))

    def log(self, level: int, line: str) -> None:
        if level <= azure_provisioning.log_level:
            self.levels.append(level)
            self.lines.append(line)

    def warnings(self) -> List[str]:
        """What went wrong so far."""
        return [line for level, line in zip(self.levels, self.lines) if level <= WARNING]

    def forget(self) -> None:
        """Start over: what has been said and slept so far does not count."""
        del self.clock.pauses[:], self.lines[:], self.levels[:]

    def untouchable(self, *what: object, **_: object) -> None:
        raise AssertionError(f"about to change the machine: {what}")

    def azure(self, wireserver: Optional[Script] = None, imds: Optional[Script] = None, **more: Any) -> FakeAzure:
        script = {WIRESERVER: wireserver or [], IMDS: imds or []}
        return self.stack.enter_context(FakeAzure(script=script, drip_pause=0.05, **more))

    def main(self, azure: FakeAzure, *arguments: str) -> int:
        """Run the program with arguments on azure."""
        return azure_provisioning.main(
            ["--wireserver", azure.listen(WIRESERVER), "--imds", azure.listen(IMDS), *arguments]
        )

    def instance(self, azure: FakeAzure, timeout: float = 120) -> Instance:
        """What the program learns of the VM from azure's IMDS."""
        return azure_provisioning.fetch_instance(azure.listen(IMDS), timeout)

    def document(self, compute: Any, **more: Any) -> FakeAzure:
        """An azure whose IMDS has compute in its document."""
        return self.azure(imds=[{"body": json.dumps(dict(more, compute=compute))}])

    def check_name(self, azure: FakeAzure, name: str = "web-01") -> None:
        self.assertEqual(self.instance(azure).name, name)


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

# What can go wrong with one exchange, whoever the service is.


def raw(text: str) -> Dict[str, Any]:
    return {"do": "raw", "raw": text}


def chunked(body: str, **headers: str) -> Dict[str, Any]:
    return {"headers": {"Transfer-Encoding": "chunked", **headers}, "body": body}


TROUBLE: Dict[str, Dict[str, Any]] = {
    "silence": {"do": "silent"},
    "a reset": {"do": "reset"},
    "a connection closed at once": {"do": "close"},
    "an answer that comes byte by byte": {"do": "drip"},
    "a truncated answer": {"do": "cut"},
    "an answer that ends in its headers": {"do": "cut_headers"},
    "a status line alone": raw("HTTP/1.1 200 OK\r\n"),
    "no HTTP": raw("SSH-2.0-OpenSSH_9.2\r\n\r\n"),
    "a header that is none": raw("HTTP/1.1 200 OK\r\nContent-Length\r\n\r\n"),
    "a folded header": raw("HTTP/1.1 200 OK\r\nA: b\r\n c: d\r\nContent-Length: 0\r\n\r\n"),
    "headers of a mebibyte": raw("HTTP/1.1 200 OK\r\nA: " + "x" * (1 << 20) + "\r\n\r\n"),
    "a body without end": {"do": "endless_body"},
    "headers without end": {"do": "endless_header"},
    "interim answers without end": {"do": "endless_continue"},
    "a body that is too long": {"body": "x", "repeat": azure_provisioning.ANSWER_LIMIT},
    "a body that is far too long": {"body": "x", "repeat": 4 * azure_provisioning.ANSWER_LIMIT},
    "no UTF-8": {"body": "\udcff\udcfe<"},
    "a chunk that is none": chunked("frog\r\n"),
    "a chunk of a negative size": chunked("-1\r\n" + "x" * 99),
    "a chunk that is longer than it says": chunked("1\r\nxyz0\r\n\r\n"),
    "chunks without their last": raw("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"),
    "an unknown coding": {"headers": {"Transfer-Encoding": "gzip, chunked"}, "body": "0\r\n\r\n"},
    "a length and chunks": {"headers": {"Transfer-Encoding": "chunked", "Content-Length": "5"}, "body": "0\r\n\r\n"},
    "a length that is none": {"headers": {"Content-Length": "-17"}, "body": "short"},
    "two lengths": raw("HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 0\r\n\r\nx"),
    "what the email package chokes on": {
        "headers": {"Content-Type": "multipart/mixed; boundary*=a; boundary*0=b"},
        "status": 500,
    },
    "a redirect": {"status": 301, "headers": {"Location": "http://127.0.0.1:9/"}},
    "something not quite an answer": {"status": 103},
}
STATUSES = (300, 304, 401, 403, 405, 408, 409, 410, 418, 429, 500, 501, 502, 503, 504, 599)
TROUBLE.update((f"status {status}", {"status": status}) for status in STATUSES)


class KeepTryingTest(Case):
    """Whatever goes wrong between the module and a service is logged in one line and tried again."""

    def after_trouble(self, wrong: Dict[str, Any], what: str, attempt: Any) -> None:
        """Check that attempt, given each trouble there is, succeeds with one line and one short pause, and soon."""
        more = {"status 400": {"status": 400}, "status 404": {"status": 404}}
        for name, entry in sorted({**TROUBLE, **more, **wrong}.items()):
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

    def test_ready_is_reported_after_any_trouble_with_the_goal_state(self) -> None:
        def attempt(entry: Dict[str, Any]) -> None:
            azure = self.azure([entry])
            self.assertEqual(self.main(azure, "--timeout", "120", "ready"), 0)
            self.assertEqual([report["state"] for report in azure.accepted], ["Ready"])

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
            "an instance that is deeper": GOAL_STATE.replace("InstanceId>", "Id>").replace(
                "{instance_id}", "<InstanceId>i</InstanceId>"
            ),
        }
        self.after_trouble(wrong, r"127\.0\.0\.1", attempt)

    def test_ready_is_reported_after_any_trouble_with_the_report(self) -> None:
        def attempt(entry: Dict[str, Any]) -> None:
            azure = self.azure([{"do": "right"}, entry])
            self.assertEqual(self.main(azure, "--timeout", "120", "ready"), 0)
            self.assertEqual(azure.accepted[-1]["state"], "Ready")
            # Each attempt is whole: goal state and report.
            self.assertEqual(azure.asked(WIRESERVER), ["GET /machine?comp=goalstate", "POST /machine?comp=health"] * 2)

        # The right answer has no body to cut, and comes within the limit byte by byte.
        left_out = [name for name, entry in TROUBLE.items() if entry.get("do") in ("cut", "drip")]
        with mock.patch.dict(TROUBLE):
            for name in left_out:
                del TROUBLE[name]
            self.after_trouble({}, r"POST http://127\.0\.0\.1", attempt)

    def test_the_host_name_is_found_after_any_trouble_with_imds(self) -> None:
        wrong: Dict[str, Any] = {
            "no body": {"status": 200},
            "HTML": "<html>please log in</html>",
            "another document": '["compute"]',
            "a document of nothing": "{}",
            "no compute": '{"compute": null}',
            "no name": '{"compute": {"osProfile": {"computerName": "web-01"}}}',
            "an empty name": '{"compute": {"name": "", "osProfile": {"computerName": "web-01"}}}',
            "a name that is none": '{"compute": {"name": 7}}',
            "a computer name that is none": '{"compute": {"name": "a", "osProfile": {"computerName": 7}}}',
            "an osProfile that is none": '{"compute": {"name": "a", "osProfile": [1]}}',
            "a document without end": '{"compute": {"name": "a"',
            "depth": {"body": "[", "repeat": 300000},
            "a long number": '{"compute": ' + "9" * 1000000,
        }
        self.after_trouble(wrong, r"GET http://127\.0\.0\.1", lambda entry: self.check_name(self.azure(imds=[entry])))

    def test_a_service_that_is_not_there_yet_is_found(self) -> None:
        azure = self.azure()
        address = azure.listen(WIRESERVER)
        azure.servers[0].server_close()
        sleep = self.clock.sleep

        def sleep_until_it_is_there(seconds: float) -> None:
            sleep(seconds)
            if len(self.clock.pauses) == 4:
                host, port = address.split(":")
                azure.listen(WIRESERVER, host, int(port))

        self.replace(self.clock, sleep=sleep_until_it_is_there)
        self.assertEqual(azure_provisioning.main(["--wireserver", address, "ready"]), 0)
        self.assertEqual((len(azure.accepted), len(self.clock.pauses)), (1, 4))

    def test_ready_is_reported_again_when_the_container_moved(self) -> None:
        azure = self.azure([{"do": "right"}, {"do": "moved"}])
        self.assertEqual(self.main(azure, "ready"), 0)
        self.assertEqual([report["incarnation"] for report in azure.reports], ["3", "4"])
        self.assertEqual(azure.accepted[0]["container_id"], azure.container_id)

    def test_pauses_start_small_double_stop_growing_at_five_seconds_and_vary_by_chance(self) -> None:
        self.assertEqual(self.main(self.azure([{"status": 503}] * 25), "ready"), 0)
        for pause, longest in zip(self.clock.pauses, itertools.chain((0.25, 0.5, 1, 2, 4), itertools.repeat(5))):
            self.assertLessEqual(pause, longest)
            self.assertGreaterEqual(pause, longest / 2 - 0.1)
        self.assertGreater(len({round(pause, 4) for pause in self.clock.pauses[5:]}), 10)

    def test_a_pause_counts_from_the_start_of_the_attempt(self) -> None:
        self.main(self.azure([{"status": 503}] * 8 + [{"do": "silent"}, {"status": 503}]), "ready")
        self.assertGreater(self.clock.pauses[-1], 2)
        self.clock.pauses.clear()
        self.replace(LONGEST_PAUSE=0.3)
        self.main(self.azure([{"do": "silent"}] * 3), "ready")
        self.assertLessEqual(max(self.clock.pauses), azure_provisioning.FIRST_PAUSE)
        self.assertGreater(min(self.clock.pauses), 0.1)

    def test_retry_after_is_honoured_up_to_thirty_seconds(self) -> None:
        for value, least, most in (
            ("7", 7, 7),
            ("86400", 30, 30),
            ("0", 0, 0.25),
            ("Wed, 21 Oct 2037 07:28:00 GMT", 0, 0.25),
            ("-5", 0, 0.25),
            ("9" * 5000, 0, 0.25),
            ("٣", 0, 0.25),
        ):
            self.clock.pauses.clear()
            headers = {"Retry-After": value.encode().decode("latin-1")}
            self.assertEqual(self.main(self.azure([{"status": 429, "headers": headers}]), "ready"), 0)
            self.assertGreaterEqual(self.clock.pauses[0], least)
            self.assertLessEqual(self.clock.pauses[0], most)

    def test_a_failure_is_told_once_when_it_changes_and_again_after_a_minute(self) -> None:
        busy, gone = {"status": 503, "body": "busy"}, {"status": 410, "body": "gone"}
        self.main(self.azure([busy] * 3 + [gone] * 4 + [busy] * 30), "ready")
        told = [(line.split(": status ")[1][:8], int(line.split()[-4])) for line in self.warnings()]
        self.assertEqual([what for what, _ in told[:4]], ["503 busy", "410 gone", "503 busy", "503 busy"], told)
        self.assertEqual(told[0][1], 1200)
        for (_, before), (_, left) in zip(told[2:], told[3:]):
            self.assertTrue(60 <= before - left <= 66, told)
        self.assertTrue(4 <= len(told) <= 5, told)

    def test_it_gives_up_when_the_timeout_is_spent_and_says_so_in_one_line(self) -> None:
        before = self.clock.monotonic()
        self.assertEqual(self.main(self.azure([{"status": 503, "body": "busy"}] * 1000), "ready"), 1)
        self.assertTrue(1190 < self.clock.monotonic() - before < 1201)
        failure, last = [line for level, line in zip(self.levels, self.lines) if level == ERROR]
        asked = r"GET http://127\.0\.0\.1:\d+/machine\?comp=goalstate"
        self.assertRegex(failure, rf"^ready failed: {asked}: status 503 busy; gave up after 1200 s$")
        self.assertRegex(last, "^Azure got no report, and will declare this VM failed; the unit, .* at the next boot$")

    def test_the_timeout_sets_the_timeout_of_each_service(self) -> None:
        for seconds in (0.3, 3, 60):
            before = self.clock.monotonic()
            self.assertEqual(self.main(self.azure([{"status": 503}] * 99), "--timeout", str(seconds), "ready"), 1)
            self.assertTrue(seconds - 1.1 < self.clock.monotonic() - before < seconds + 0.3)

    def test_imds_is_waited_for_as_long_as_somebody_depends_on_it(self) -> None:
        self.assertEqual(self.defaults, (10, 120, 1200))
        for steps, seconds, state in (
            (["ready"], 0, "Ready"),
            ([], 120, "Ready"),
            (["user", "ready"], 300, "NotReady"),
            (["hostname", "user", "ready"], 300, "NotReady"),
        ):
            self.forget()
            before = self.clock.monotonic()
            azure = self.azure(imds=[{"status": 500}] * 999)
            self.assertEqual(self.main(azure, *steps), int(seconds > 0))
            self.assertTrue(seconds - 5 < self.clock.monotonic() - before < seconds + 1)
            self.assertEqual([report["state"] for report in azure.accepted], [state])
            failed = [line.split()[0] for line in self.lines if " failed: " in line]
            self.assertEqual((failed, bool(azure.asked(IMDS))), (steps[:-1] if steps else ["hostname"], seconds > 0))

    defaults = azure_provisioning.REQUEST_LIMIT, azure_provisioning.IMDS_TIMEOUT, azure_provisioning.WIRESERVER_TIMEOUT

    def test_the_timeout_of_imds_begins_when_there_is_a_network(self) -> None:
        unreachable, refused = (OSError(code, os.strerror(code)) for code in (errno.ENETUNREACH, errno.ECONNREFUSED))
        nobody = OSError(errno.EHOSTUNREACH, "No route to host")
        for error, interface, network_after, least, most in (
            (unreachable, "", 500, 612, 622),
            (OSError(errno.ENETDOWN, "Network is down"), "", 500, 612, 622),
            (unreachable, "", 9999, 1190, 1201),  # at the latest so that the report is still in time
            (nobody, "", 500, 612, 622),  # an address that the DHCP client gave itself
            (nobody, "eth0", 500, 115, 121),  # a network, but nobody in it
        ):
            self.replace(default_interface=lambda interface=interface: interface)
            with self.subTest(error=error, network_after=network_after):
                began = self.clock.monotonic()
                there = began + network_after

                def connect(*_: object, there: float = there, error: OSError = error) -> None:
                    raise error if self.clock.monotonic() < there else refused

                with mock.patch.object(socket.socket, "connect", connect):
                    self.assertEqual(azure_provisioning.main(["hostname"]), 1)
                self.assertTrue(least < self.clock.monotonic() - began < most, self.lines)
                self.assertRegex(self.lines[-1], r"; gave up after (120|6[12]\d(\.\d)?|1200) s$")
                total = 120 if interface else 1200
                self.assertIn(f"; trying again, for {total} s at most", self.lines[0])
                self.forget()

    def test_the_last_attempt_ends_with_the_timeout(self) -> None:
        self.assertEqual(self.main(self.azure([{"do": "silent"}]), "--timeout", "0.1", "ready"), 1)
        self.assertRegex(self.lines[0], r"no complete answer within 0\.(1|09\d*) s; gave up")

    def test_an_endless_answer_costs_a_few_mebibytes_at_most(self) -> None:
        chunk = {"do": "raw", "raw": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n" + "x" * (1 << 24)}
        for entry in ({"do": "endless_body"}, {"do": "endless_header"}, {"body": "x", "repeat": 1 << 26}, chunk):
            azure = self.azure([entry])
            address = azure.listen(WIRESERVER)
            pid = os.fork()
            if pid == 0:  # its own memory, without the server's
                status = 1
                try:
                    tracemalloc.start()
                    try:
                        azure_provisioning.exchange(address, self.clock.monotonic() + 5, "GET", "/", {})
                    except ProvisioningError:
                        status = 0 if tracemalloc.get_traced_memory()[1] < 8 << 20 else 2
                finally:
                    os._exit(status)
            self.assertEqual(os.waitpid(pid, 0)[1], 0, entry.get("do"))


class TransportTest(Case):
    """What goes over the wire."""

    def test_each_request_has_a_connection_of_its_own(self) -> None:
        azure = self.azure()
        with mock.patch.object(socket, "socket", wraps=socket.socket) as connect:
            self.main(azure, "ready")
        self.assertGreaterEqual(connect.call_count, 2)
        self.assertEqual([request["headers"]["connection"] for request in azure.requests], ["close", "close"])

    def test_what_is_left_of_an_answer_is_no_answer_to_the_report(self) -> None:
        goal_state = GOAL_STATE.format(incarnation=1, container_id="c", instance_id="i") + " " * 8192
        first = f"HTTP/1.1 200 OK\r\nContent-Length: {len(goal_state.encode())}\r\n\r\n{goal_state}".encode().decode(
            "latin-1"
        )
        azure = self.azure([{"do": "raw", "raw": first + "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "keep": True}])
        self.assertEqual(self.main(azure, "--timeout", "0.5", "ready"), 1)
        self.assertEqual(azure.accepted, [])
        self.assertIn("status 410", self.lines[0])

    def test_all_forms_of_an_answer_are_fine(self) -> None:
        document = '{"compute": {"name": "web-02"}}'
        chunks = '1\r\n{\r\n1e;x=y\r\n"compute": {"name": "web-02"}}\r\n0\r\nA: trailer\r\n\r\n'
        for entry in (
            {"body": chunks, "headers": {"Transfer-Encoding": "Chunked"}},
            {"do": "raw", "raw": "HTTP/1.0 200\r\n\r\n" + document},  # which ends with the connection
            {"do": "raw", "raw": f"HTTP/1.1 200 OK\r\nContent-Length: 31\r\n\r\n{document}", "keep": True},
        ):
            self.check_name(self.azure(imds=[entry]), "web-02")
        for status in ("200 OK\r\nContent-Length: 0\r\nContent-Length: 0", "204 No Content"):
            azure = self.azure([{"do": "right"}, {"do": "raw", "raw": f"HTTP/1.1 {status}\r\n\r\n", "keep": True}])
            self.assertEqual(self.main(azure, "ready"), 0)
        self.assertEqual(self.warnings(), [])

    def test_proxies_in_the_environment_are_ignored(self) -> None:
        proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"), "http://127.0.0.1:9")
        with mock.patch.dict(os.environ, proxies):
            self.assertEqual(self.main(self.azure(), "ready"), 0)
        self.assertEqual(self.clock.pauses, [])

    def test_the_headers_are_those_that_azure_wants_and_say_who_asks(self) -> None:
        azure = self.azure(imds=[{"status": 404}])
        self.main(azure, "ready")
        self.instance(azure)
        goal_state, report, imds, again = [request["headers"] for request in azure.requests]
        version = f"azure-provisioning/{azure_provisioning.__version__}"
        for headers in goal_state, report:
            self.assertEqual(headers["x-ms-version"], "2012-11-30")
            self.assertEqual(headers["x-ms-agent-name"], "azure-provisioning")
            self.assertEqual(headers["x-ms-guest-agent-name"], version)
        self.assertEqual(report["content-type"], "text/xml;charset=utf-8")
        self.assertEqual(imds["metadata"], "true")
        self.assertNotIn("x-forwarded-for", imds)
        self.assertEqual({headers["user-agent"] for headers in (goal_state, report, imds)}, {version})
        for headers in imds, again:
            self.assertRegex(headers["x-ms-client-request-id"], r"\A[0-9a-f]{32}\Z")
        self.assertNotEqual(imds["x-ms-client-request-id"], again["x-ms-client-request-id"])

    def test_a_refusal_is_told_with_what_was_asked_of_whom_and_what_came_back(self) -> None:
        page = '<!DOCTYPE HTML PUBLIC "-//W3C//DTD HTML 4.01//EN">\r\n<HTML><BODY><h2>Busy</h2>\n</BODY></HTML>'
        for body, told in (
            ("<Error>no\nversion</Error>", "no version"),
            (page, "Busy"),
            ("", "Service Unavailable"),
            ("<" * 500000, "<" * 200),
            ("occup\udce9", "occup\ufffd"),
        ):
            self.forget()
            started = time.monotonic()
            self.main(self.azure([{"status": 503, "body": body}]), "ready")
            self.assertLess(time.monotonic() - started, 2)
            self.assertRegex(self.warnings()[0], r"^GET http://127\.0\.0\.1:\d+/machine\?comp=goalstate: status 503 ")
            self.assertIn(f": status 503 {told}; trying again, for 1200 s at most", self.warnings()[0])

    def test_a_long_answer_is_shown_in_part(self) -> None:
        self.replace(log_level=DEBUG)
        self.check_name(self.azure(imds=[{"body": '{"compute": {"name": "web-02"}}' + " " * 100000}]), "web-02")
        self.main(
            self.azure([{"body": GOAL_STATE.format(incarnation=1, container_id="c", instance_id="i") + " " * 9999}]),
            "-v",
            "--timeout",
            "0.2",
            "ready",
        )
        self.assertEqual([len(line) // 1000 for line in self.lines if " has the " in line], [3, 3])

    def test_a_deadline_that_is_over_is_told_as_no_time(self) -> None:
        with self.assertRaisesRegex(ProvisioningError, "no complete answer within 0 s$"):
            azure_provisioning.exchange("127.0.0.1:9", self.clock.monotonic() - 1, "GET", "/", {})

    def test_each_request_of_an_attempt_has_its_own_limit(self) -> None:
        azure = self.azure(
            [{"do": "right", "delay": 0.3}, {"do": "right", "delay": 0.3}, {"do": "right", "delay": 0.6}]
        )
        self.assertEqual(self.main(azure, "ready"), 0)
        self.assertEqual(self.warnings(), [])
        self.main(azure, "ready")
        self.assertRegex(self.warnings()[0], r"^GET .*: no complete answer within 0\.5 s; trying again")

    def test_azures_own_addresses_are_asked_on_the_interface_of_the_default_route_and_no_others(self) -> None:
        # Routes by default, to 168.63.129.16, to 169.254.0.0/16 and to 10.0.0.0/24: (destination, mask)
        default, wireserver, link, lan = (0, 0), (0x10813FA8, 0xFFFFFFFF), (0xFEA9, 0xFFFF), (0xA, 0xFFFFFF)
        bound = mock.call(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth7")
        for address, routes, refusal, wanted in (
            (azure_provisioning.WIRESERVER, {"eth8": wireserver}, None, [bound]),
            (azure_provisioning.IMDS, {"eth8": link}, None, [bound]),
            (azure_provisioning.IMDS + ":80", {"eth8": link}, None, [bound]),
            (azure_provisioning.WIRESERVER, {"eth8": wireserver}, PermissionError("old kernel"), [bound]),  # goes on
            (azure_provisioning.WIRESERVER, {"eth8": lan}, None, []),
            (azure_provisioning.WIRESERVER, {"eth8": link}, None, []),
            (azure_provisioning.WIRESERVER, {"eth7": wireserver}, None, []),
            (azure_provisioning.WIRESERVER, {"eth8": default}, None, []),
            ("127.0.0.1:9", {"eth8": wireserver}, None, []),
        ):
            table = [("eth7", *default, 0), *((name, *route, 1) for name, route in routes.items())]
            self.replace(ipv4_routes=lambda table=table: table)
            with self.subTest(address, routes=routes), mock.patch.object(socket, "socket") as make:
                connection = make.return_value.__enter__.return_value
                connection.setsockopt.side_effect = refusal
                connection.connect.side_effect = OSError("no")
                with self.assertRaisesRegex(ProvisioningError, ": no$"):
                    azure_provisioning.exchange(address, self.clock.monotonic() + 1, "GET", "/", {})
                self.assertEqual(connection.setsockopt.mock_calls, wanted)
                self.assertEqual(connection.connect.call_count, 1)


ANSWERS = (
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Type: text/xml\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nServer: x\r\n\r\n5\r\nhello\r\n3;a=b\r\nyou\r\n0\r\n\r\n",
    b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 7\r\n\r\n<html>busy</html>",
    b"HTTP/1.1 204 No Content\r\n\r\n",
)


class ParseAnswerTest(unittest.TestCase):
    """Whatever comes back is an answer, the beginning of one, or wrong."""

    def parse(self, received: bytes, ended: bool = True) -> Any:
        return azure_provisioning.parse_answer(received, ended)

    def test_an_answer_is_what_it_was_however_it_comes(self) -> None:
        complete = [self.parse(answer) for answer in ANSWERS]
        self.assertEqual(
            complete,
            [
                (200, "OK", 0.0, b"hello"),
                (200, "OK", 0.0, b"helloyou"),
                (503, "Service Unavailable", 7.0, b"<html>busy</html>"),
                (204, "No Content", 0.0, b""),
            ],
        )
        for answer, whole in zip(ANSWERS, complete):
            for length in range(len(answer)):
                with self.subTest(answer[:length]):
                    self.assertIsNone(self.parse(answer[:length], ended=False))
                    if whole[0] != 503 or b"\r\n\r\n" not in answer[:length]:
                        with self.assertRaises(ValueError):
                            self.parse(answer[:length])
            self.assertEqual(self.parse(answer, ended=False), None if whole[0] == 503 else whole)

    def test_what_follows_an_answer_and_what_it_lacks_is_left_out(self) -> None:
        self.assertEqual(self.parse(b"HTTP/1.1 204 No Content\r\n\r\nleft"), (204, "No Content", 0.0, b""))
        twice = b"HTTP/1.1 503\r\nRetry-After: 7\r\nRetry-After: 9\r\nContent-Length: 0\r\n\r\nleft"
        self.assertEqual(self.parse(twice), (503, "", 9.0, b""))

    def test_space_may_follow_the_size_of_a_chunk(self) -> None:
        chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2 \r\nhi\r\n0 \t;a\r\n\r\n"
        self.assertEqual(self.parse(chunks), (200, "OK", 0.0, b"hi"))

    def test_what_cannot_become_an_answer_is_wrong_at_once(self) -> None:
        chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        for beginning in (
            chunks + b"\r\n",
            chunks + b"1\r\nxy",
            chunks + b"000000001\r\nx\r\n",
        ):
            with self.subTest(beginning[:80]), self.assertRaises(ValueError):
                self.parse(beginning, ended=False)

    def test_ten_thousand_mutations_raise_nothing_but_value_error(self) -> None:
        choose = random.Random(8)
        pieces = [b"\r\n", b"\r\n\r\n", b":", b" ", b"-1", b"0", b"\0", b"\xff", b"Content-Length: 3", b"chunked", b";"]
        pieces += [b"Transfer-Encoding: chunked\r\n", b"HTTP/1.1 ", b"9" * 5000, b"f" * 20, b"\xb2", "\u0663".encode()]
        outcomes = {"answer": 0, "incomplete": 0, "wrong": 0}
        for _ in range(10000):
            answer = bytearray(choose.choice(ANSWERS))
            for _ in range(choose.randrange(1, 5)):
                start = choose.randrange(len(answer) + 1)
                stop = min(len(answer), start + choose.randrange(6))
                answer[start:stop] = choose.choice(
                    [*pieces, bytes([choose.randrange(256)]), b"", bytes(answer[:start])]
                )
            try:
                found = self.parse(bytes(answer), ended=choose.random() < 0.5)
                outcomes["answer" if found else "incomplete"] += 1
            except ValueError as error:
                self.assertLess(len(str(error)), 300)
                outcomes["wrong"] += 1
        self.assertGreater(min(outcomes.values()), 500, outcomes)

    def test_hostile_answers_take_no_time(self) -> None:
        for answer in (
            b"HTTP/1.1 200 OK\r\nA: x" + b" " * 60000 + b"x\r\n\r\n",
            b"HTTP/1.1 200 OK\r\n" + b"A:\r\n" * 10000 + b"\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 100000,
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1" + b" " * 1000000 + b"\r\n",
        ):
            started = time.process_time()
            with self.subTest(answer[:40]), contextlib.suppress(ValueError):
                self.parse(answer, ended=False)
            self.assertLess(time.process_time() - started, 1)


IDENTIFIERS = GoalState("7", "c", "i")


class HealthReportTest(Case):
    """What the platform is told."""

    def report_of(self, goal_state: str) -> List[Dict[str, Any]]:
        """What is reported for goal_state, which is refused for good if that is none."""
        azure = self.azure([{"body": goal_state}, {"do": "right"}] * 9)
        self.forget()
        self.main(azure, "--timeout", "0.2", "ready")
        return azure.reports

    def test_identifiers_are_the_first_of_their_elements_without_the_space_around_them(self) -> None:
        report = self.report_of(
            "<GoalState><Incarnation> 3 </Incarnation><Incarnation>4</Incarnation><Container><ContainerId>\n c\t"
            "</ContainerId><ContainerId>d</ContainerId><RoleInstanceList><RoleInstance><X><InstanceId>x</InstanceId></X>"
            "<InstanceId>\n&lt;i&#62;</InstanceId></RoleInstance><RoleInstance><InstanceId>j</InstanceId></RoleInstance>"
            "</RoleInstanceList></Container></GoalState>"
        )[0]
        self.assertEqual([report["incarnation"], report["container_id"], report["instance_id"]], ["3", "c", "<i>"])

    def test_a_document_with_a_doctype_is_refused_whatever_its_encoding(self) -> None:
        goal_state = GOAL_STATE.format(incarnation="&i;", container_id="c", instance_id="i").split("?>")[1]
        hostile = "<!DOCTYPE GoalState [<!ENTITY i '3'>]>" + goal_state
        for encoding, told in (
            ("utf-8", "it has a DOCTYPE"),
            ("utf-16-le", "it has a DOCTYPE"),
            ("utf-16-be", "it has a DOCTYPE"),
            ("utf-32-le", "it is not XML"),
        ):
            self.assertEqual(self.report_of(hostile.encode(encoding).decode()), [])
            self.assertRegex(self.lines[0], f"the goal state of 127.*: {told}")

    def test_entities_that_multiply_take_no_time(self) -> None:
        entities = '<!ENTITY e0 "xxxxxxxxxx">' + "".join(
            f'<!ENTITY e{number} "{f"&e{number - 1};" * 10}">' for number in range(1, 12)
        )
        started = time.process_time()
        for document in ("<GoalState>&e11;</GoalState>", '<GoalState a="&e11;"/>'):
            self.assertEqual(self.report_of(f"<!DOCTYPE GoalState [{entities}]>{document}"), [])
            self.assertIn("has a DOCTYPE, and so entities", self.lines[0])
        self.assertLess(time.process_time() - started, 1)

    def test_a_goal_state_without_identifiers_is_told(self) -> None:
        self.assertEqual(self.report_of("<GoalState><Incarnation>3</Incarnation></GoalState>"), [])
        self.assertIn(": it lacks one of incarnation, container_id, instance_id; ", self.lines[0])

    def test_ready_is_the_document_that_azure_expects(self) -> None:
        head, _, document = azure_provisioning.health_report(IDENTIFIERS).decode().partition("\n")
        self.assertEqual(head, '<?xml version="1.0" encoding="utf-8"?>')
        self.assertEqual(
            "".join(document.split()),
            "<Health><GoalStateIncarnation>7</GoalStateIncarnation><Container><ContainerId>c</ContainerId>"
            "<RoleInstanceList><Role><InstanceId>i</InstanceId><Health><State>Ready</State></Health></Role>"
            "</RoleInstanceList></Container></Health>",
        )

    def test_identifiers_cannot_break_the_document(self) -> None:
        for evil in ("</ContainerId><State>Ready</State>&\"'", "{health}{0}", "&amp;"):
            report = ElementTree.fromstring(azure_provisioning.health_report(GoalState(evil, evil, evil), evil))
            for path in ("GoalStateIncarnation", "Container/ContainerId", "Container//InstanceId", ".//Description"):
                self.assertEqual(report.findtext(path), evil)

    def test_a_failure_is_reported_with_its_reason_cut_at_512_characters(self) -> None:
        for reason, told in (
            ("disk <1 of 2> & no more", "disk <1 of 2> & no more"),
            ("", None),
            ("&" * 600, "&" * 512),
            ("a\x00b\x1b[1mc\ud800d\udcffe\ufffff \U0001f525\tg\u00fc", "a?b?[1mc?d?e?f \U0001f525\tg\u00fc"),
        ):
            azure = self.azure()
            self.assertEqual(self.main(azure, "--fail", reason), 0)
            (report,) = azure.accepted
            state = report["state"], report["substatus"], report["description"]
            self.assertEqual(state, ("NotReady", "ProvisioningFailed", told))
            self.assertEqual(azure.asked(IMDS), [])


class ImdsTest(Case):
    """IMDS is asked for the whole document, and an old one for the name."""

    DOCUMENT = "GET /metadata/instance?api-version=2021-08-01&extended=true"
    NAME = "GET /metadata/instance/compute/name?api-version=2019-06-01&format=text"

    def test_the_document_is_all_that_is_asked_for(self) -> None:
        azure = self.azure()
        self.check_name(azure)
        self.assertEqual(azure.asked(IMDS), [self.DOCUMENT])

    def test_the_resource_name_stands_in_for_a_computer_name_that_is_empty(self) -> None:
        for computer_name in (None, "", " \n"):
            self.check_name(self.document({"name": "db_7", "osProfile": {"computerName": computer_name}}), "db_7")
        for compute in ({"name": "db_7"}, {"name": "db_7", "osProfile": None}):
            self.check_name(self.document(compute), "db_7")
        self.assertEqual(self.clock.pauses, [])

    def test_nothing_that_is_for_the_user_costs_the_name(self) -> None:
        texts = """
            "osProfile": {"adminUsername": ["root"]}, "publicKeys": 7
            "osProfile": {"adminUsername": 7}, "publicKeys": null
            "osProfile": {"adminUsername": null}, "publicKeys": "ssh-rsa"
            "osProfile": {"disablePasswordAuthentication": {}}, "publicKeys": {}
            "osProfile": {"disablePasswordAuthentication": null}, "publicKeys": [7, null, {}, []]
            "publicKeys": [{"keyData": 7}, {"keyData": null}, {"keyData": []}], "userData": 7
            "osProfile": {}, "userData": {}
        """
        for text in texts.strip().splitlines():
            for extended in ("null", "7", "[]", '{"compute": null}', '{"compute": {}}'):
                body = f'{{"compute": {{"name": "web-01", {text}}}, "extended": {extended}}}'
                self.check_name(self.azure(imds=[{"body": body}]))
        self.assertEqual(self.clock.pauses, [])

    def test_what_the_vm_was_created_with_is_read(self) -> None:
        for raw, wanted in (("true", True), (True, True), ("false", False), (False, False), ("", False), (None, False)):
            keys = [{"keyData": "ssh-rsa A", "path": "/p"}]
            profile = {"adminUsername": "alice", "disablePasswordAuthentication": raw}
            found = self.instance(self.document({"name": "a", "osProfile": profile, "publicKeys": keys}))
            self.assertEqual(found, Instance("a", "alice", keys, wanted, []))

    def test_what_was_given_and_is_ignored_is_told(self) -> None:
        for compute, extended, told in (
            ({"userData": "aGk="}, {"hasCustomData": False}, ["user data"]),
            ({"userData": ""}, {"hasCustomData": True}, ["custom data"]),
            ({"userData": None}, {"hasCustomData": "true"}, ["custom data"]),
            ({"userData": "aGk="}, {"hasCustomData": "True"}, ["custom data", "user data"]),
            ({}, {"hasCustomData": "false"}, []),
            ({}, {}, []),
        ):
            with self.subTest(compute=compute, extended=extended):
                self.forget()
                self.replace(hostname_step=mock.Mock(), host_name_is=lambda name: True, ETC_HOSTS="/no/such/file")
                azure = self.document(dict(compute, name="web-01"), extended={"compute": extended})
                self.assertEqual(self.main(azure, "hostname"), 0)
                lines = [f"the VM was created with {what}, which nothing here reads" for what in told]
                self.assertEqual(self.warnings(), lines)

    def test_verbose_shows_the_document_without_secrets(self) -> None:
        self.replace(log_level=DEBUG)
        document = {
            "name": "web-01",
            "userData": "c2VjcmV0",
        }
        for separators in ((",", ":"), (", ", ": "), None):
            for text in (document, {"a": [document], **document}):
                self.forget()
                body = json.dumps({"compute": text}, separators=separators)
                self.check_name(self.azure(imds=[{"body": body}]))
                shown = "\n".join(self.lines)
                self.assertIn("web-01", shown)
                self.assertNotIn("c2VjcmV0", shown)

    def test_imds_that_does_not_know_the_vm_yet_is_asked_for_the_same_again(self) -> None:
        for status in (400, 404, 410, 429, 500, 503):
            azure = self.azure(imds=[{"status": status}] * 4)
            self.check_name(azure)
            self.assertEqual(azure.asked(IMDS), [self.DOCUMENT] * 5)

    def test_imds_that_refuses_the_document_for_ten_seconds_is_asked_for_the_name(self) -> None:
        azure = self.azure(imds_versions=["2017-04-02", "2019-06-01"], name="web-02\r\n")
        before = self.clock.monotonic()
        self.assertEqual(self.instance(azure), Instance("web-02", None, [], False, []))
        self.assertTrue(10 <= self.clock.monotonic() - before < 10 + azure_provisioning.LONGEST_PAUSE + 1)
        asked = azure.asked(IMDS)
        self.assertEqual(asked, [self.DOCUMENT] * (len(asked) - 1) + [self.NAME])

    def test_anything_but_refusals_in_these_ten_seconds_starts_them_anew(self) -> None:
        for other in ({"status": 404}, {"body": "<html>"}, {"do": "reset"}):
            self.clock.pauses.clear()
            azure = self.azure(imds=[{"status": 400}] * 5 + [other] + [{"status": 400}] * 2, name="vm-resource")
            self.check_name(azure)
            self.assertGreater(sum(self.clock.pauses[:7]), 10)
            self.assertEqual(azure.asked(IMDS), [self.DOCUMENT] * 9)

    def test_a_name_that_is_none_is_not_taken_from_an_old_imds_either(self) -> None:
        for name in ("<html>please log in</html>", "", "a b", "\u0430"):
            azure = self.azure(imds_versions=["2019-06-01"], name=name)
            with self.assertRaisesRegex(ProvisioningError, "compute/name.*: not a name: .*; gave up after 30 s"):
                self.instance(azure, timeout=30)

    def test_hostile_documents_take_no_time(self) -> None:
        self.replace(log_level=DEBUG)
        for text in ('"keyData":"",' * 90000, '"keyData":"' + "A" * 900000 + '",', '"userData"' + " " * 900000 + ":1,"):
            started = time.process_time()
            self.check_name(self.azure(imds=[{"body": '{"compute":{' + text + '"name":"web-01"}}'}]))
            self.assertLess(time.process_time() - started, 1, text[:20])


class HostNameTest(Case):
    """Any answer becomes a host name, or an error that is final."""

    def test_names(self) -> None:
        for raw, name in {
            "web-01": "web-01",
            "WEB.example.com": "WEB.example.com",
            "web_01": "web-01",
            "set_0": "set-0",
            "-web-": "web",
            ".web.": "web",
            "web..01": "web.01",
            "web.-01-.x": "web.01.x",
            "a" * 65: "a" * 63,
            "a" * 62 + "-b": "a" * 62,
            "a" * 63 + "--": "a" * 63,
            "a" * 63 + ".b": "a" * 63,
            "m\u00fcnchen": "m-nchen",
            "web 01; rm -rf /": "web-01--rm--rf",
            "web\n01\x00": "web-01",
            "$(reboot)": "reboot",
        }.items():
            self.assertEqual(azure_provisioning.valid_host_name(raw), name)

    def test_every_result_is_valid_and_stays_as_it_is(self) -> None:
        choose = random.Random(1)
        label = "[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?"
        for _ in range(2000):
            raw = "".join(
                choose.choice("aZ0-._\u00e9 " + "x" * choose.randrange(99)) for _ in range(choose.randrange(80))
            )
            try:
                name = azure_provisioning.valid_host_name(raw)
            except ProvisioningError:
                self.assertNotRegex(raw, "[A-Za-z0-9]")
                continue
            self.assertRegex(name, rf"\A{label}(\.{label})*\Z")
            self.assertLessEqual(len(name), 64)
            self.assertLessEqual(max(map(len, name.split("."))), 63)
            self.assertEqual(azure_provisioning.valid_host_name(name), name)

    def test_a_name_of_which_nothing_can_stay_is_final(self) -> None:
        for raw in ("___", ".-.", "\u0661\u0662"):
            self.forget()
            azure = self.azure(computer_name=raw)
            self.assertEqual(self.main(azure), 1)
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
        self.assertEqual(system.mock_calls, [nmcli, written, mock.call.sethostname("web-99")])


class MachineTest(Case):
    """Programs and files."""

    def setUp(self) -> None:
        super().setUp()
        self.stack.close()  # the real ones
        self.directory = os.path.realpath(self.stack.enter_context(tempfile.TemporaryDirectory()))

    def test_a_program_is_not_waited_for_without_end(self) -> None:
        started = time.monotonic()
        for code in ("exec sleep 60", "sleep 60 & wait"):  # the latter's child keeps the output open
            with self.assertRaisesRegex(ProvisioningError, f"^sh -c {code}: no end within 0.2 s$"):
                azure_provisioning.run("sh", "-c", code, limit=0.2)
        self.assertLess(time.monotonic() - started, 5)
        self.assertEqual(azure_provisioning.COMMAND_LIMIT, 15)
        self.assertEqual(azure_provisioning.run.__kwdefaults__, {"limit": azure_provisioning.COMMAND_LIMIT})

    def test_a_program_that_fails_or_is_missing_is_one_line(self) -> None:
        with self.assertRaisesRegex(ProvisioningError, r"^sh -c echo no; exit 3: exit status 3: no$"):
            azure_provisioning.run("sh", "-c", "echo no; exit 3")
        with self.assertRaisesRegex(ProvisioningError, "^no-such-program: .*(No such file|Permission denied)"):
            azure_provisioning.run("no-such-program")
        azure_provisioning.run("true")

    def test_a_program_has_nothing_to_read(self) -> None:
        reading, writing = os.pipe()
        terminal = os.dup(0)
        try:
            os.dup2(reading, 0)
            azure_provisioning.run("sh", "-c", "! read line")
        finally:
            os.dup2(terminal, 0)
            for descriptor in (reading, writing, terminal):
                os.close(descriptor)

    def test_a_file_is_replaced_with_its_label_and_mode_and_for_good(self) -> None:
        self.addCleanup(os.umask, os.umask(0o077))
        path, new, sizes = self.directory + "/hosts", self.directory + "/new", []
        azure_provisioning.replace_file(path, "old text")
        kept, restored = mock.Mock(), mock.Mock()
        self.replace(azure_provisioning, restore_label=restored)
        self.replace(os, getxattr=lambda path, name: f"label of {path}".encode(), setxattr=kept)
        self.replace(os, fsync=lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
        azure_provisioning.replace_file(path, "n\udcffw", 0o640)
        kept.assert_called_once_with(mock.ANY, "security.selinux", f"label of {path}".encode())
        self.assertEqual((restored.mock_calls, len(sizes), sizes[0]), ([], 2, 3))
        self.assertEqual(os.listdir(self.directory), ["hosts"])
        self.assertEqual(os.stat(path).st_mode & 0o7777, 0o640)
        with open(path, "rb") as binary:
            self.assertEqual(binary.read(), b"n\xffw")
        self.assertEqual(azure_provisioning.read_file(path), "n\udcffw")
        self.replace(os, getxattr=mock.Mock(side_effect=OSError))
        azure_provisioning.replace_file(new, "")
        restored.assert_called_once_with(new)
        self.assertEqual(os.stat(new).st_mode & 0o7777, 0o644)

    def test_labels_are_restored_where_selinux_is_on_and_has_a_policy(self) -> None:
        kernel, policy = "/sys/fs/selinux/enforce", "/etc/selinux/config"
        both = [kernel, policy]
        missing = ProvisioningError("restorecon: no")
        for files, outcome in (([], None), ([kernel], None), ([policy], None), (both, None), (both, missing)):
            run, log = mock.Mock(side_effect=outcome), mock.Mock()
            self.replace(os.path, exists=files.__contains__)
            self.replace(azure_provisioning, run=run, log=log)
            azure_provisioning.restore_label("/etc/new")
            self.assertEqual(run.mock_calls, [mock.call("restorecon", "-R", "/etc/new")] * (files == both))
            self.assertEqual(log.call_count, 1 if outcome else 0)

    def test_a_file_that_cannot_be_replaced_stays_and_nothing_is_left_behind(self) -> None:
        path = self.directory + "/x"
        azure_provisioning.replace_file(path, "old")
        self.replace(os, rename=mock.Mock(side_effect=OSError("no")))
        with self.assertRaisesRegex(ProvisioningError, f"^write {path}: no$"):
            azure_provisioning.replace_file(path, "new")
        self.assertEqual((azure_provisioning.read_file(path), os.listdir(self.directory)), ("old", ["x"]))

    def test_what_is_no_file_is_not_replaced(self) -> None:
        os.mkfifo(self.directory + "/fifo")
        os.symlink("fifo", self.directory + "/x")
        with self.assertRaisesRegex(ProvisioningError, f"^write {self.directory}/fifo: not a regular file$"):
            azure_provisioning.replace_file(self.directory + "/x", "new")
        self.assertEqual(sorted(os.listdir(self.directory)), ["fifo", "x"])

    def test_a_file_is_read_as_it_is_or_not_at_all(self) -> None:
        os.mkfifo(self.directory + "/fifo")
        os.mkdir(self.directory + "/directory")
        with open(self.directory + "/long", "w", encoding="utf-8") as file:
            file.truncate(azure_provisioning.FILE_LIMIT + 1)
        for name, told in (("fifo", "not a regular"), ("directory", "Is a dir"), ("long", "more than 4194304 ch")):
            with self.assertRaisesRegex(ProvisioningError, f"^read {self.directory}/{name}: .*{told}"):
                azure_provisioning.read_file(f"{self.directory}/{name}")
        self.assertEqual(azure_provisioning.read_file(self.directory + "/none"), "")
        os.utime(self.directory + "/long", ns=(1, 7))
        self.assertEqual(azure_provisioning.modified(self.directory + "/long"), 7)
        self.assertEqual(azure_provisioning.modified(self.directory + "/none"), 0)


class RenameInHostsTest(unittest.TestCase):
    """The line of 127.0.1.1 follows the host name; nothing else changes."""

    def check(self, name: str, *lines: Tuple[str, str]) -> None:
        for before, after in lines:
            with self.subTest(before):
                self.assertEqual(azure_provisioning.rename_in_hosts(before, name), after)
                self.assertEqual(azure_provisioning.rename_in_hosts(after, name), after)

    def test_the_line_follows(self) -> None:
        others = "127.0.0.1 localhost\n127.0.1.1 {0}\n::1 old\n127.0.1.1 {0}"
        self.check(
            "new",
            ("127.0.1.1 old\n", "127.0.1.1 new\n"),
            ("127.0.1.1\told.example.com old\n", "127.0.1.1\tnew.example.com new\n"),
            ("127.0.1.1  old  # the host\n", "127.0.1.1  new  # the host\n"),
            ("127.0.1.1 old # old", "127.0.1.1 new # old"),
            (others.format("old"), others.format("new")),
            ("127.0.1.1 127\n", "127.0.1.1 new\n"),
            ("  127.0.1.1 old db.local older\r\n", "  127.0.1.1 new db.local older\r\n"),
            ("127.0.1.1 head01.test.local head01\n", "127.0.1.1 new.test.local new\n"),
            ("127.0.1.1 a+b(c a+b(c.example\n", "127.0.1.1 new new.example\n"),  # which is taken literally
        )

    def test_a_name_with_a_domain_has_its_short_name_beside_it(self) -> None:
        self.check(
            "head01.test.local",
            ("127.0.1.1 old.example.com old\n", "127.0.1.1 head01.test.local head01\n"),
            ("127.0.1.1 old old.example.com\n", "127.0.1.1 head01.test.local head01\n"),
            ("127.0.1.1 old\n", "127.0.1.1 head01.test.local head01\n"),
            ("127.0.1.1 old.example.com\n", "127.0.1.1 head01.test.local head01\n"),
            ("127.0.1.1 old db\n", "127.0.1.1 head01.test.local head01 db\n"),
        )

    def test_nothing_else_changes(self) -> None:
        for text in (
            "",
            "127.0.0.1 localhost old\n::1 old\n",
            "# 127.0.1.1 old\n",
            "127.0.1.10 old\n10.127.0.1.1 old\n127.0.1.1\n127.0.1.1 # old\n",
            "127.0.1.1 host new\n",
            "127.0.1.1 .old\n",
            "127.0.1.1 .old .older\n",
            "# 127.0.1.1\x0b127.0.1.1 old\n",
        ):
            self.check("new", (text, text))


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
        self.interface = "eth7"
        self.address = True
        self.written = 1  # when the lease was
        self.ran: List[str] = []
        self.later: Dict[int, Dict[str, Any]] = {}  # what changes, by how often the module has slept by then
        self.replace(self.clock, sleep=self.sleep)
        self.answers: Dict[str, Any] = {NETWORK_MANAGER: "ip_address = 10.0.0.4", CONNECT: ""}
        self.replace(
            run=self.run_in_time,
            default_interface=lambda: self.interface,
            is_connected=lambda interface: bool(self.address and self.interface == interface == "eth7"),
            modified=lambda path: self.written if path else 0,
        )

    def run_in_time(self, *command: str, limit: float) -> str:
        """A system in which there are those programs that have an answer: text, or an action."""
        self.assertEqual(limit, azure_provisioning.RENEWAL_LIMIT)
        line = " ".join(command)
        if line not in self.answers:
            raise ProvisioningError(f"{line}: [Errno 2] No such file or directory")
        self.ran.append(line)
        answer = self.answers[line]
        return answer if isinstance(answer, str) else str(answer() or "")

    def sleep(self, seconds: float) -> None:
        Clock.sleep(self.clock, seconds)
        self.__dict__.update(self.later.pop(len(self.clock.pauses), {}))

    def becomes(self, count: int = 0, **change: Any) -> Any:
        """What a command does: change what is true of the network, once the module has slept count times."""
        return lambda: self.later.update({count: change}) if count else self.__dict__.update(change)

    def fails(self, message: str, **change: Any) -> Any:
        """What a command does that fails with message, once what is true of the network has changed."""

        def act() -> None:
            self.__dict__.update(change)
            raise ProvisioningError(message)

        return act

    def publish(self, level: int, pattern: str, tries: int = 1, dry_run: bool = False) -> None:
        del self.ran[:]
        self.later.clear()
        self.forget()
        before = self.clock.monotonic()
        azure_provisioning.publish_host_name("web-01", dry_run)
        self.assertLess(self.clock.monotonic() - before, tries * 2 * (azure_provisioning.RENEWAL_LIMIT + 0.5))
        self.assertEqual(self.levels, [WARNING] * (tries - 1) + [level], self.lines)
        for line in self.lines[:-1]:
            self.assertRegex(line, "^eth7 has no address or no default route after .*; trying again$")
        self.assertRegex(self.lines[-1], pattern)
        if level <= WARNING:
            self.assertRegex(self.lines[-1], "for other machines to resolve web-01, restart the DHCP client, or reboot")

    def test_the_client_that_has_the_lease_is_asked(self) -> None:
        wait = "/lib/systemd/systemd-networkd-wait-online --interface=eth7 --timeout=8"
        networking = "    |-networking.service\n    | `-{} /sbin/dhclient -4 -v -i -pf /run/dhclient.{}.pid {}\n"
        for asked, output, commands in (
            (
                NETWORKD,
                "State: routable\nAddress: 10.0.0.4 (DHCP4 via 10.0.0.1)\n",
                ["networkctl reconfigure eth7", wait],
            ),
            (NETWORKD, "Address: 10.0.0.4 (DHCPv4 via 10.0.0.1)\n", ["networkctl reconfigure eth7", wait]),
            (NETWORK_MANAGER, "dhcp_lease_time = 86400 | ip_address = 10.0.0.4", [CONNECT]),
            (DHCPCD, "reason=BOUND\ninterface=eth7\nip_address=10.0.0.4\n", [RENEW]),
            (DHCLIENT, networking.format(7, "eth7", "eth7"), ["systemctl restart networking.service"]),
            (NETWORKD, "Address: 10.0.0.4\nDNS: 168.63.129.16\n", []),
            (NETWORK_MANAGER, "", []),
            (DHCPCD, "reason=CARRIER\n", []),
            (DHCLIENT, networking.format(7, "eth0", "eth0") + networking.format(8, "eth77", "eth77"), []),
            (DHCLIENT, networking.format(7, "eth7", "xeth7") + "/usr/bin/less dhclient.txt\n", []),
        ):
            self.written = 1
            self.answers = dict.fromkeys([*commands, NETWORKD, NETWORK_MANAGER, DHCPCD, DHCLIENT], "")
            self.answers[asked] = output
            if RENEW in commands:
                self.answers[RENEW] = self.becomes(3, written=2)
            told = (
                f"^published web-01 by {commands[0]}, after " if commands else "^found no DHCP lease to renew on eth7;"
            )
            self.publish(INFO if commands else WARNING, told)
            self.assertEqual([line for line in self.ran if line in commands], commands)
            if commands:
                self.publish(INFO, f"^would publish web-01 by {commands[0]}$", dry_run=True)
                self.assertEqual([line for line in self.ran if line in commands], [])

    def test_names_of_interfaces_are_taken_literally(self) -> None:
        self.interface = "eth+"
        self.answers = {DHCLIENT: "7 dhclient ethh\n"}
        self.publish(WARNING, r"^found no DHCP lease to renew on eth\+; ")

    def test_where_no_command_waits_for_the_lease_its_file_does(self) -> None:
        del self.answers[NETWORK_MANAGER]
        self.answers[DHCPCD] = "ip_address=10.0.0.4"
        for acts, pauses, level, pattern in (
            ([(3, 2)], 3, INFO, r"^published web-01 by dhcpcd --renew eth7, after 0\.\d s$"),
            ([(1, 0), (5, 2)], 5, INFO, "^published "),  # a lease that vanishes is no new one
            ([(1, 0)], None, WARNING, "^dhcpcd --renew eth7: no new lease within 8 s; "),
            ([], None, WARNING, "^dhcpcd --renew eth7: no new lease within 8 s; "),
        ):
            self.written = 1
            self.answers[RENEW] = lambda acts=acts: [self.becomes(count, written=when)() for count, when in acts]
            self.publish(level, pattern)
            self.assertEqual(self.ran.count(RENEW), 1)
            if pauses:
                self.assertEqual(len(self.clock.pauses), pauses)
                self.assertLess(sum(self.clock.pauses), 0.2)
            else:
                self.assertTrue(7.5 < sum(self.clock.pauses) < 8.5)

    def test_it_waits_for_address_and_default_route(self) -> None:
        for gone, back in (({"interface": ""}, {"interface": "eth7"}), ({"address": False}, {"address": True})):
            self.answers[CONNECT] = lambda gone=gone, back=back: [self.becomes(**gone)(), self.becomes(5, **back)()]
            self.publish(INFO, "^published web-01 by ")
            self.assertEqual(len(self.clock.pauses), 5)

    def test_a_network_that_stays_away_is_an_error_that_says_what_was_run_and_what_failed(self) -> None:
        for act, told in (
            (self.becomes(address=False), CONNECT),
            (self.becomes(interface="eth8"), CONNECT),  # what is left when the preferred one has lost its lease
            (self.fails("nmcli: exit status 3: no", address=False), "nmcli: exit status 3: no"),
        ):
            self.address, self.interface = True, "eth7"
            self.answers[CONNECT] = act
            self.publish(ERROR, f"^eth7 has no address or no default route after {told}; for other", tries=2)
            self.assertEqual(self.ran.count(CONNECT), 2)
            self.assertGreater(sum(self.clock.pauses), 2 * 7)

    def test_a_client_that_took_the_network_away_and_is_stuck_is_asked_again(self) -> None:
        def stuck() -> None:
            self.address = self.ran.count(CONNECT) == 2
            if not self.address:
                self.clock.skipped += azure_provisioning.RENEWAL_LIMIT
                raise ProvisioningError("nmcli: no end within 8 s")

        self.answers[CONNECT] = stuck
        self.publish(INFO, f"^published web-01 by {CONNECT}, after 16", tries=2)

    def test_a_command_that_fails_is_a_warning_at_once(self) -> None:
        self.answers[CONNECT] = self.fails("nmcli: exit status 3: no")
        self.publish(WARNING, "^nmcli: exit status 3: no; for other machines")
        self.assertEqual(self.clock.pauses, [])

    def test_without_a_default_route_nobody_is_asked(self) -> None:
        self.interface = ""
        self.publish(WARNING, "^found no DHCP lease to renew on a default route; ")
        self.assertEqual(self.ran, [])


class NetworkTest(Case):
    """What the module reads of the network."""

    def test_the_preferred_default_route_is_taken(self) -> None:
        head = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
        lan = "lan0\t0000000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
        first, second = [
            f"{name}\t00000000\t0100000A\t0003\t0\t0\t{metric}\t00000000\t0\t0\t0\n"
            for name, metric in (("a1", 200), ("b0", 100))
        ]
        half = "tun0\t00000000\t00000000\t0001\t0\t0\t0\t00000080\t0\t0\t0\n"  # 0.0.0.0/1 is not the default
        for routes, interface in (
            ("", ""),
            (head, ""),
            (head + lan, ""),
            (head + lan + first, "a1"),
            (head + first + second, "b0"),
            (head + first + lan, "a1"),
            (head + half + first, "a1"),
        ):
            with mock.patch("builtins.open", mock.mock_open(read_data=routes)) as opened:
                opened.return_value.__iter__ = lambda file: iter(file.readline, "")
                self.assertEqual(azure_provisioning.default_interface(), interface, routes)
        with mock.patch("builtins.open", side_effect=PermissionError):
            self.assertEqual(azure_provisioning.default_interface(), "")

    def test_this_machine_can_be_asked(self) -> None:
        azure_provisioning.default_interface()
        azure_provisioning.is_connected("eth0")

    def test_who_has_no_default_route_or_no_address_is_not_connected(self) -> None:
        for interface, refusal, wanted in (
            ("eth0", None, True),
            ("", None, False),
            ("eth1", None, False),
            ("eth0", OSError, False),
        ):
            self.replace(default_interface=lambda interface=interface: interface)
            with mock.patch.object(socket, "socket") as make:
                make.return_value.__enter__.return_value.connect.side_effect = refusal
                self.assertEqual(azure_provisioning.is_connected("eth0"), wanted)
            make.assert_called_once_with(socket.AF_INET, socket.SOCK_DGRAM)  # sends nothing


class KeysTest(Case):
    """What Azure hands on as SSH keys becomes lines of authorized_keys; the rest is told and left out."""

    def check(self, text: str, *wanted: str, left_out: int = 0) -> None:
        keys, rest = azure_provisioning.parse_keys(text)
        self.assertEqual((list(keys.values()), len(rest)), (list(wanted), left_out), rest)
        for encoded, line in keys.items():
            self.assertIn(encoded, line.split())

    def test_every_kind_of_key_is_one_with_options_before_it_and_a_comment_after(self) -> None:
        for one in KEYS:
            self.check(one, one)
            self.check(f"{one} alice@laptop (work)  2 \r\n", f"{one} alice@laptop (work)  2")
            self.check(f"{one} a\0b\x1b[2J\tc", f"{one} a b [2J c")  # nothing but text
            for options in ('from="10.0.0.0/8"', 'command="echo  a b",no-pty', 'environment="A=ssh-rsa B"', "restrict"):
                self.check(f"{options} {one} alice\r\n", f"{options} {one} alice")

    def test_several_in_one_text_count_each_and_once(self) -> None:
        for end in ("\n", "\r\n", "\r", "\n\n", " \r\n \r\n"):
            self.check(end.join([RSA + " a", ED25519, RSA]) + end, RSA + " a", ED25519)

    def test_a_key_that_was_broken_within_its_base64_is_mended(self) -> None:
        for end in ("\r\n", "\n"):
            for width in (10, 64, 76):
                broken = end.join(RSA[start : start + width] for start in range(0, len(RSA), width))
                self.check(f"{broken} alice@laptop{end}{ED25519}{end}", RSA + " alice@laptop", ED25519)

    def test_what_is_no_key_is_left_out_and_the_others_count(self) -> None:
        for wrong in (
            "hello",
            "ssh-rsa",
            "ssh-rsa AAAA",
            "ssh-dss " + RSA.split()[1],
            "ssh-ed25519 " + RSA.split()[1],
            RSA[:-8],
            RSA[:60] + "!" + RSA[61:],
            RSA[:60] + "!" * 4 + RSA[60:],
            key("ssh-rsa", b"\1\0\1"),
            key("ssh-rsa", b"\1\0\1", b"n", b"more"),
            key("ssh-ed25519", b""),
            "ssh-rsa " + base64.b64encode(bytes([0, 0, 0, 7]) + b"ssh-rsa" + bytes([0, 0, 0, 9]) + b"short").decode(),
            "ssh-rsa \u0661\u0662",
            "ssh-rsa " + "A" * azure_provisioning.KEY_LIMIT,
            f"-----BEGIN CERTIFICATE-----\n{RSA}\nMIIC\n-----END CERTIFICATE-----",
            "-----BEGIN OPENSSH PRIVATE KEY-----\r\nb3Bl\r\nbnNz\r\n-----END OPENSSH PRIVATE KEY-----",
            "---- BEGIN SSH2 PUBLIC KEY ----",
        ):
            with self.subTest(wrong[:70]):
                self.check(wrong, left_out=1)
                self.check(f"{ED25519} a\n{wrong}\n{RSA}\n", ED25519 + " a", RSA, left_out=1)
        self.check(f"{RSA}\n-----BEGIN RSA PRIVATE KEY-----\nMII\nMII\n", RSA, left_out=1)  # which ends nowhere

    def test_much_of_nothing_takes_no_time(self) -> None:
        for text in (
            "ssh-rsa " + "A" * 1000000,
            "ssh-rsa A\n" * 10000,
            "ssh-rsa A\n" + "AAAA\n" * 20000,
            "x\n" * 10000,
            " ssh-rsa" * 100000,
            ("ssh-rsa " * 900 + "\n") * 100,
            (" " * 8000 + "x\n") * 100,
            "ssh-rsa" + " " * 500000 + "x",
            "-----BEGIN A-----" * 50000,
            "-----BEGIN " + "A" * 900000,
            "-----BEGIN " * 80000,
        ):
            with self.subTest(text[:20]):
                started = time.process_time()
                self.assertEqual(azure_provisioning.parse_keys(text)[0], {})
                self.assertLess(time.process_time() - started, 2)


MARK = azure_provisioning.UNFINISHED
MARK_WITH_HOME = azure_provisioning.UNFINISHED_HOME
UNMARK = "usermod --comment  -- alice"


class UserTest(Case):
    """The user that the VM was created with; the boots make real ones."""

    def setUp(self) -> None:
        super().setUp()
        self.directory = self.stack.enter_context(tempfile.TemporaryDirectory())
        self.users = {"root": 0, "daemon": 1, "nobody": 65534}
        self.comments: Dict[str, str] = {}
        self.groups = [grp.struct_group((name, "x", 27, ["bob"])) for name in ("adm", "sudo", "bin")]
        self.ran: List[str] = []
        self.written: Dict[str, Tuple[str, int]] = {}
        self.failing = self.settings = self.login_defs = self.acting_as = ""
        self.reason = "no"
        self.replace(
            run=self.run_command,
            replace_file=self.write,
            read_file=lambda path: self.login_defs if path == "/etc/login.defs" else "",
            as_user=self.as_user,
            add_keys=self.add_keys,
            unlock_user_database=lambda: self.ran.append("unlock"),
            SUDOERS=self.directory,
            SSHD=self.directory + "/sshd",
            SSHD_DROP_IN=self.directory + "/drop.conf",
        )
        self.replace(pwd, getpwnam=self.find, getpwall=lambda: [self.find(name) for name in self.users])
        self.replace(grp, getgrall=lambda: self.groups, getgrnam=lambda name: {"bin": self.groups[2]}[name])
        self.replace(os, sync=lambda: self.ran.append("sync"))
        self.keys: List[Tuple[str, str, List[str]]] = []

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

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        self.assertFalse(self.acting_as)
        self.written[path] = text, mode

    @contextlib.contextmanager
    def as_user(self, user: pwd.struct_passwd) -> Any:
        self.acting_as = user.pw_name
        yield
        self.acting_as = ""

    def add_keys(self, home: str, keys: Dict[str, str]) -> None:
        self.keys.append((self.acting_as, home, list(keys.values())))

    def user(self, *arguments: str, status: int = 0, keys: Sequence[str] = (RSA,), **more: Any) -> FakeAzure:
        """Run the step user, unless other arguments are given, for a VM created with alice and keys."""
        more.setdefault("admin_username", "alice")
        azure = self.azure(public_keys=keys, **more)
        self.forget()
        del self.ran[:]
        self.assertEqual(self.main(azure, *(arguments or ["user"])), status, self.lines)
        return azure

    def check_untouched(self) -> None:
        self.assertEqual((self.ran, self.keys, self.written), ([], [], {}))

    def test_a_user_that_does_not_exist_is_made_with_a_home_groups_keys_and_sudo(self) -> None:
        for there, mark in ((False, MARK_WITH_HOME), (True, MARK)):  # a home that is there is not called ours
            self.users.pop("alice", None)
            self.replace(os.path, lexists=lambda path, there=there: there)
            self.user()
            shell = "/bin/bash" if os.path.exists("/bin/bash") else "/bin/sh"
            made = (
                f"useradd --comment {mark} --no-log-init --create-home --home-dir /home/alice --shell {shell} "
                "--groups adm,sudo --password * --key PASS_MAX_DAYS=-1 -- alice"
            )
            self.assertEqual(self.ran, ["unlock", made, "sync", UNMARK])
            self.assertEqual(self.keys, [("alice", "/home/alice", [RSA])])
            sudoers = self.directory + "/zz-azure-provisioning-alice"
            self.assertEqual(self.written, {sudoers: ('"alice" ALL=(ALL:ALL) NOPASSWD:ALL\n', 0o440)})
            self.assertEqual(self.lines, ["made the user alice", "alice can log in, SSH keys: 1"])
            self.keys.clear()

    def test_a_group_that_has_its_name_is_left_alone(self) -> None:
        self.user(admin_username="bin")
        self.assertIn(" --no-user-group -- bin", self.ran[1])

    def test_a_user_that_exists_is_kept_and_gets_what_it_lacks(self) -> None:
        self.users.update(alice=1001, bob=1002)
        self.user()
        self.assertEqual(self.ran, ["unlock", "usermod --append --groups adm,sudo -- alice"])
        self.user(admin_username="bob", keys=[RSA, ED25519 + " b"])
        self.assertEqual(self.ran, ["unlock"])
        self.assertEqual(self.keys, [("alice", "/home/alice", [RSA]), ("bob", "/home/bob", [RSA, ED25519 + " b"])])

    def test_no_user_or_no_key_is_told_and_nothing_is_done(self) -> None:
        no_key = "the VM was created without an SSH key for alice, and IMDS has no passwords: it is not made"
        for keys, name, level, line in (
            ([RSA], "", INFO, "the VM was created without a user: nothing to do"),
            ([], "alice", WARNING, no_key),
            ([" \n"], "alice", WARNING, no_key),
        ):
            self.user(keys=keys, admin_username=name)
            self.assertEqual((self.levels, self.lines), ([level], [line]))
        self.check_untouched()

    def test_keys_that_are_none_are_told_and_the_others_count(self) -> None:
        certificate = "-----BEGIN CERTIFICATE-----\nMIIC0000\nAAAA1111\n-----END CERTIFICATE-----"
        private = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNz\nc2VjcmV0\n-----END OPENSSH PRIVATE KEY-----\n"
        putty = "PuTTY-User-Key-File-3: ssh-ed25519\nPrivate-Lines: 1\nAAAAIEkwc2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2Vj\n"
        for entry, told in (
            ({"keyData": certificate}, ["(CERTIFICATE)"]),
            ({"keyData": private}, ["(OPENSSH PRIVATE KEY)"]),
            ({"keyData": putty}, ["PuTTY-User-Key-File-3: s", "Private-Lines: 1", "AAAAIEkwc2VjcmV0c2VjcmV0"]),
            ({"keyData": None}, ["{'keyData': None}"]),
            ({"keyData": True}, ["{'keyData': True}"]),
            ({"path": "/p"}, ["{'path': '/p'}"]),
            (None, ["None"]),
            ([], ["[]"]),
            ({"keyData": "x\n" * 10000}, ["x"] * 9),
        ):
            for others, status in (([{"keyData": RSA}], 0), ([], 1)):
                self.forget()
                profile = {"adminUsername": "alice"}
                azure = self.document({"name": "a", "osProfile": profile, "publicKeys": [entry, *others]})
                self.assertEqual(self.main(azure, "user"), status)
                begin = "not an SSH key, which is a line of a .pub file; left out: "
                failed = ["user failed: nothing of what was given as SSH keys is one"] * status
                self.assertEqual(self.warnings(), [begin + line for line in told] + failed)
        self.keys.clear()
        self.main(self.document({"name": "a", "osProfile": profile, "publicKeys": {"keyData": RSA}}), "user")
        self.assertEqual(
            self.lines[-1], f"user failed: IMDS has publicKeys that are no list: {str({'keyData': RSA})[:60]}"
        )
        self.assertEqual(self.keys, [])

    def test_who_is_not_a_person_is_refused(self) -> None:
        refused = "root|daemon|nobody|-rf|--help|a:b|a,b|../x|.|..|1000|a/b|a$|%sudo|#0|*"
        for name in (*refused.split("|"), "a b", "a\nb", "\u0430lice", "x" * 33, ["root"], 7):
            self.user(admin_username=name, status=1)
            self.assertRegex(self.lines[-1], "^user failed: .*(cannot be the name of a user|is not a person's)")
        self.check_untouched()

    def test_whose_ids_are_those_of_people_is_for_login_defs_to_say(self) -> None:
        for uid, login_defs, status in (
            (500, "", 1),
            (999, "# UID_MIN 500\nSYS_UID_MIN 500\n", 1),
            (500, "# people's\nUID_MIN\t\t\t  500\nUID_MAX 60000\n", 0),
            (70000, "", 1),
            (70000, "UID_MAX 70000\n", 0),
            (1500, "UID_MIN 2000\n", 1),
            (1, "UID_MIN 0x3e8\n", 1),
        ):
            self.login_defs, self.users["alice"] = login_defs, uid
            self.user(status=status)

    def test_names_that_azure_allows_are_fine_and_the_last_that_sudo_reads(self) -> None:
        for name in ("alice", "AzureUser", "john.doe", "a", "_x", "9lives", "a-b_c", "ALL", "x" * 32):
            self.written.clear()
            self.user(admin_username=name)
            ((path, written),) = self.written.items()
            self.assertEqual(written, (f'"{name}" ALL=(ALL:ALL) NOPASSWD:ALL\n', 0o440))
            self.assertNotIn(".", os.path.basename(path))
            self.assertGreater(os.path.basename(path), max("90-cloud-init-users", "waagent", "wheel", "zfs"))
        self.replace(SUDOERS=self.directory + "/none")
        self.written.clear()
        self.user()
        self.assertEqual(self.written, {})

    def test_a_dry_run_makes_nothing(self) -> None:
        self.user("-n", "user", keys=[RSA, ED25519])
        self.assertEqual(self.lines, ["would make the user alice, SSH keys: 2"])
        self.users["alice"] = 1000
        self.user("-n", "user")
        self.assertEqual(self.lines, ["would keep the user alice, SSH keys: 1"])
        self.check_untouched()

    def test_a_user_that_could_not_be_made_is_undone_at_once(self) -> None:
        for self.failing in ("useradd", "usermod"):
            self.user(status=1)
            self.assertEqual([line.split()[0] for line in self.ran[-2:]], ["unlock", "userdel"])
            self.assertEqual(self.lines[-1], f"user failed: {self.failing}: exit status 1: no")
            self.assertNotIn("alice", self.users)
        self.failing = "alice"  # nor can it be undone: the next boot will
        self.user(status=1)
        self.assertEqual(self.lines[-1], "user failed: alice: exit status 1: no")
        self.assertTrue(self.comments["alice"].startswith(MARK))
        self.assertEqual((self.keys, self.written), ([], {}))

    def test_users_that_a_power_cut_left_unfinished_are_removed(self) -> None:
        for mark, remove in ((MARK, ""), (MARK_WITH_HOME, " --remove")):
            for left in ("alice", "bob"):
                self.users = {"root": 0, left: 1000, "carol": 1001}
                self.comments = {left: mark}
                self.user()
                self.assertEqual(self.ran[:2], ["unlock", f"userdel --force{remove} -- {left}"])
                self.assertEqual(self.lines[0], f"removed the user {left}, which was left unfinished")
                self.assertTrue(self.ran[2].startswith("useradd "))
                self.assertIn("carol", self.users)
                self.user()  # what was undone is not undone again
                self.assertNotIn("userdel", "".join(self.ran))

    def test_a_user_that_is_not_there_although_useradd_made_it_is_an_error(self) -> None:
        self.replace(make_user=mock.Mock())
        self.user(status=1)
        self.assertEqual(self.lines[-1], "user failed: there is no user alice after useradd made it")

    def test_an_old_imds_does_not_know_the_user(self) -> None:
        self.user(imds_versions=["2019-06-01"], status=1)
        self.assertRegex(self.lines[-1], "^user failed: 127.* is too old to tell the user$")

    # What the user needs of sshd.

    NO_PASSWORDS = "PasswordAuthentication no\nKbdInteractiveAuthentication no\nChallengeResponseAuthentication no\n"
    RELOAD = "systemctl try-reload-or-restart [s]sh.service [s]shd.service"
    ASK = "/sshd -T -C user=alice,host=localhost,addr=127.0.0.1"

    def sshd(self, settings: str) -> None:
        """There is an sshd, which has settings."""
        open(self.directory + "/sshd", "w").close()
        self.settings = settings

    def test_sshd_takes_no_passwords_where_the_vm_was_created_without(self) -> None:
        self.sshd("port 22\nauthorizedkeysfile .ssh/authorized_keys\n")
        for raw, disabled in (("false", False), ("", False), (False, False), ("true", True), (True, True)):
            self.written.clear()
            self.user(disable_password_authentication=raw)
            wanted = (self.NO_PASSWORDS, 0o600) if disabled else None
            self.assertEqual(self.written.get(self.directory + "/drop.conf"), wanted)
            asked = self.directory + self.ASK
            self.assertEqual(self.ran[-2:] if disabled else self.ran[-1:], [asked] + [self.RELOAD] * disabled)
        self.failing = "systemctl"
        self.user(disable_password_authentication="true", status=1)
        self.assertEqual(self.lines[-1], "user failed: systemctl: exit status 1: no")

    def test_an_sshd_without_drop_ins_has_to_be_told_by_the_image(self) -> None:
        self.replace(SSHD_DROP_IN="/no/such/drop.conf")
        for answer, status in (("no", 0), ("yes", 1)):
            self.sshd(f"passwordauthentication {answer}\nauthorizedkeysfile .ssh/authorized_keys\n")
            self.user(disable_password_authentication="true", status=status)
        self.assertNotIn("/no/such/drop.conf", self.written)
        self.assertNotIn(self.RELOAD, self.ran)

    def test_an_sshd_that_keeps_the_user_out_or_lets_others_in_is_an_error(self) -> None:
        self.groups.append(grp.struct_group(("staff", "x", 1000, [])))  # the primary group of all here
        keys = "authorizedkeysfile .ssh/authorized_keys"
        for wrong, others in (
            ("", keys),
            ("", "authorizedkeysfile /home/alice/.ssh/authorized_keys"),
            ("", "authorizedkeysfile /etc/ssh/keys/%u .ssh/authorized_keys2 %h/.ssh/authorized_keys"),
            ("authorizedkeysfile /etc/ssh/keys/alice none", "authorizedkeysfile /etc/ssh/keys/%u none"),
            ("authorizedkeysfile /home/alice/keys", "authorizedkeysfile %h/keys"),
            ("allowusers bob root@10.0.0.1", f"{keys}\nallowusers bob\nallowusers root@10.0.0.1"),
            ("", f"{keys}\nallowusers bob\nallowusers alice"),
            ("", f"{keys}\nallowusers a*@10.0.0.*"),
            ("", f"{keys}\nallowusers ?lice"),
            ("allowgroups wheel", f"{keys}\nallowgroups wheel"),
            ("", f"{keys}\nallowgroups wheel\nallowgroups adm"),
            ("", f"{keys}\nallowgroups staff"),
            ("denyusers bob al*", f"{keys}\ndenyusers bob\ndenyusers al*"),
            ("", f"{keys}\ndenyusers bob"),
            ("", f"{keys}\ndenyusers alice@10.0.0.1"),
            ("", "port 22"),
            ("authorizedkeysfile /keys", "AuthorizedKeysFile /keys"),  # as OpenSSH 10.6 has it
            ("allowusers bob", f"{keys}\nAllowUsers bob"),
            ("PasswordAuthentication yes", f"PasswordAuthentication yes\n{keys}"),
            ("denygroups sudo", f"{keys}\ndenygroups sudo"),
            ("denygroups staff", f"{keys}\ndenygroups staff"),
            ("", f"{keys}\ndenygroups wheel"),
            ("pubkeyauthentication no", f"pubkeyauthentication no\n{keys}"),
            ("authenticationmethods publickey,password", f"authenticationmethods publickey,password\n{keys}"),
            ("", f"authenticationmethods publickey,password publickey\n{keys}"),
            ("", f"authenticationmethods any\n{keys}"),
            ("passwordauthentication yes", f"passwordauthentication yes\n{keys}"),
            ("kbdinteractiveauthentication yes", f"kbdinteractiveauthentication yes\n{keys}"),
            ("challengeresponseauthentication yes", f"challengeresponseauthentication yes\n{keys}"),
            ("pubkeyauthentication no, denyusers alice", f"pubkeyauthentication no\ndenyusers alice\n{keys}"),
            ("", f"pubkeyauthentication yes\npasswordauthentication no\nkbdinteractiveauthentication no\n{keys}"),
        ):
            with self.subTest(others):
                self.users["alice"] = 1000
                for group in self.groups[:2]:
                    group.gr_mem[:] = ["alice"]
                self.sshd(f"port 22\n{others}\nx11forwarding yes\n")
                self.user(disable_password_authentication="true", status=1 if wrong else 0)
                told = f"user failed: sshd has {wrong}, and keeps alice out or lets others in: mend the image"
                self.assertEqual(self.lines[-1], told if wrong else "alice can log in, SSH keys: 1")
                self.user(disable_password_authentication="false", status=1 if wrong and " yes" not in wrong else 0)

    def test_no_sshd_and_one_that_cannot_tell_yet_are_no_errors(self) -> None:
        self.user(disable_password_authentication="true")
        self.assertNotIn(self.directory + "/drop.conf", self.written)
        self.sshd("")
        self.failing = "sshd -T"
        for self.reason in (
            "sshd: no hostkeys available",
            "f line 1: Deprecated option X\nMissing directory: /run/sshd",
        ):
            self.user(disable_password_authentication="true")
            self.assertIn(self.directory + "/drop.conf", self.written)
            self.assertEqual(self.levels[-2:], [INFO] * 2)
            told = f"{self.reason}; whether it lets alice in is for its configuration to say"
            self.assertEqual(self.lines[-2], "sshd -T: exit status 1: " + told)

    def test_an_sshd_that_refuses_its_configuration_is_an_error_and_left_as_it_was(self) -> None:
        self.sshd("")
        self.failing = "sshd -T"
        for self.reason in (
            "/etc/ssh/sshd_config: line 2: Bad configuration option: Prot",
            "/etc/ssh/sshd_config line 2: unsupported option",
            "/etc/ssh/sshd_config: terminating, 1 bad configuration options",
            "AuthenticationMethods cannot be satisfied by enabled authentication methods",
        ):
            open(self.directory + "/drop.conf", "w").close()  # as replace_file() would
            self.user(disable_password_authentication="true", status=1)
            self.assertEqual(self.lines[-1], "user failed: sshd -T: exit status 1: " + self.reason)
            self.assertFalse(os.path.exists(self.directory + "/drop.conf"))
        self.assertNotIn(self.RELOAD, self.ran)

    # What Azure is told.

    NEXT_BOOT = "; the unit, if it is enabled, does all of this again at the next boot"

    def test_imds_is_asked_once_for_name_and_user_and_ready_comes_last(self) -> None:
        order: List[str] = []
        self.replace(
            set_host_name=order.append, publish_host_name=mock.Mock(), allow_sudo=lambda user: order.append("sudo")
        )
        azure = self.azure(public_keys=[RSA], admin_username="alice")
        azure.observer = lambda request: order.append(request["method"] + request["path"].partition("?")[0])
        self.assertEqual(self.main(azure, "ready", "user", "hostname"), 0, self.lines)
        self.assertEqual(order, ["GET/metadata/instance", "web-01", "sudo", "GET/machine", "POST/machine"])

    def test_a_user_that_could_not_be_made_is_told_to_azure_with_the_reason(self) -> None:
        self.replace(hostname_step=mock.Mock(), host_name_is=lambda name: True, ETC_HOSTS="/none")
        self.failing = "useradd"
        for steps in (["user", "ready"], ["hostname", "user", "ready"]):
            (report,) = self.user(*steps, status=1).accepted
            told = report["state"], report["substatus"], report["description"]
            reason = "user failed: useradd: exit status 1: no"
            self.assertEqual(told, ("NotReady", "ProvisioningFailed", reason))
            last = "Azure was told that provisioning failed" + self.NEXT_BOOT
            self.assertEqual([line for level, line in zip(self.levels, self.lines) if level == ERROR], [reason, last])
            self.assertEqual(self.lines[-1], last)
        self.failing = ""  # the next boot
        self.assertEqual([report["state"] for report in self.user("user", "ready").accepted], ["Ready"])

    def test_a_name_that_could_not_be_set_keeps_nobody_from_ready(self) -> None:
        def refuse(name: str) -> None:
            raise ProvisioningError(f"sethostname {name}: no")

        self.replace(set_host_name=refuse)
        for steps in (["hostname", "ready"], ["hostname", "user", "ready"]):
            azure = self.user(*steps, status=1)
            self.assertEqual([report["state"] for report in azure.accepted], ["Ready"])
            self.assertEqual(self.warnings()[0], "hostname failed: sethostname web-01: no")
            self.assertEqual(self.lines[-1], "Azure was told Ready" + self.NEXT_BOOT)

    def test_what_azure_knows_is_told_only_where_it_was_to_be_told(self) -> None:
        self.failing = "useradd"
        self.user("user", status=1)
        self.assertEqual(self.lines[-1], "user failed: useradd: exit status 1: no")
        self.user("-n", "user", "ready", admin_username="root", status=1)
        self.assertRegex(self.lines[-1], "^would report to .*<State>NotReady</State>.*user failed: the user root is")
        self.user("--timeout", "1.5", "user", "ready", wireserver=[{"status": 503}] * 99, status=1)
        self.assertEqual(self.lines[-1], "Azure got no report, and will declare this VM failed" + self.NEXT_BOOT)


class HomeTest(unittest.TestCase):
    """What is done in a home directory is done as its owner."""

    def setUp(self) -> None:
        self.user = pwd.struct_passwd(("nobody", "x", 12345, 12346, "", "/", "/bin/sh"))
        self.home = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.home)
        self.path = self.home + "/.ssh/authorized_keys"

    def add(self, *keys: str) -> str:
        azure_provisioning.add_keys(self.home, {line.split()[1]: line for line in keys})
        self.assertEqual(os.stat(self.home + "/.ssh").st_mode & 0o7777, 0o700)
        self.assertEqual(os.stat(self.path).st_mode & 0o7777, 0o600)
        with open(self.path, encoding="utf-8") as file:
            return file.read()

    def test_keys_are_added_to_those_that_are_there(self) -> None:
        self.assertEqual(self.add(RSA + " a", ED25519), f"{RSA} a\n{ED25519}\n")
        before = os.stat(self.path)
        os.chmod(self.path, 0o666)
        self.assertEqual(self.add(ED25519 + " again", RSA), f"{RSA} a\n{ED25519}\n")
        self.assertEqual(os.stat(self.path).st_ino, before.st_ino)
        with open(self.path, "w", encoding="utf-8") as file:
            file.write(f'# {RSA}\nfrom="10.0.0.0/8" {ED25519} b')
        os.chmod(self.path, 0o666)
        os.chmod(self.home + "/.ssh", 0o777)
        self.assertEqual(self.add(RSA, ED25519), f'# {RSA}\nfrom="10.0.0.0/8" {ED25519} b\n{RSA}\n')

    def test_the_directory_gets_its_label_and_a_fifo_is_an_error_at_once(self) -> None:
        with mock.patch.object(azure_provisioning, "restore_label") as restore:
            self.add(RSA)
        self.assertEqual(restore.call_args, mock.call(self.home + "/.ssh"))
        os.unlink(self.path)
        os.mkfifo(self.path)
        with self.assertRaisesRegex(ProvisioningError, "not a regular file"):
            self.add(RSA)

    def test_the_users_rights_are_taken_on_and_given_back_whatever_happens(self) -> None:
        became = [mock.call.initgroups("nobody", 12346), mock.call.setegid(12346), mock.call.seteuid(12345)]
        gave_back = [mock.call.seteuid(0), mock.call.setegid(0), mock.call.setgroups([4])]
        for trouble, told in (
            (PermissionError("not permitted"), "^as nobody: not permitted$"),
            (ProvisioningError("write /home: no"), "^write /home: no$"),
            (None, ""),
        ):
            system = mock.Mock()
            with ExitStack() as stack:
                if trouble:
                    stack.enter_context(self.assertRaisesRegex(ProvisioningError, told))
                stack.enter_context(mock.patch.object(os, "getgroups", lambda: [4]))
                for name in ("initgroups", "setegid", "seteuid", "setgroups"):
                    stack.enter_context(mock.patch.object(os, name, getattr(system, name)))
                with azure_provisioning.as_user(self.user):
                    system.act()
                    if trouble:
                        raise trouble
            self.assertEqual(system.mock_calls, [*became, mock.call.act(), *gave_back])

    def test_the_kernel_holds_it_to_the_users_rights(self) -> None:
        def act() -> None:
            before = os.getresuid(), os.getresgid(), os.getgroups()
            refused = self.assertRaisesRegex(ProvisioningError, "(?i)^as nobody: .*denied.*" if root else "permitted")
            with refused, azure_provisioning.as_user(self.user):
                self.assertEqual((os.getresuid(), os.getegid()), ((0, 12345, 0), 12346))
                self.assertNotIn(0, os.getgroups())
                os.mkdir(self.home + "/.ssh")  # of another user, and closed
            self.assertEqual((os.getresuid(), os.getresgid(), os.getgroups()), before)

        root = os.geteuid() == 0
        pid = os.fork()
        if pid == 0:  # which may lose its rights
            status = 1
            try:
                act()
                status = 0
            finally:
                os._exit(status)
        self.assertEqual(os.waitpid(pid, 0)[1], 0)


class LocksTest(unittest.TestCase):
    """useradd's locks that a power cut left are removed, those of a useradd that runs are not."""

    def setUp(self) -> None:
        self.etc = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.etc)
        stack = ExitStack()
        self.addCleanup(stack.close)
        self.assertEqual(azure_provisioning.USER_DATABASE, "/etc")
        stack.enter_context(mock.patch.object(azure_provisioning, "USER_DATABASE", self.etc))
        self.log = stack.enter_context(mock.patch.object(azure_provisioning, "log"))
        self.locks = {name + ".lock" for name in ("passwd", "shadow", "group", "gshadow", "subuid", "subgid")}
        for name in (*self.locks, "passwd"):
            open(f"{self.etc}/{name}", "w").close()

    def test_locks_that_are_nobodys_are_removed_and_others_left_alone(self) -> None:
        with mock.patch.object(fcntl, "lockf", side_effect=BlockingIOError("busy")):
            azure_provisioning.unlock_user_database()
        self.assertEqual(set(os.listdir(self.etc)), {*self.locks, "passwd", ".pwd.lock"})
        self.assertEqual(self.log.call_count, 1)
        for _ in range(2):
            azure_provisioning.unlock_user_database()
            self.assertEqual(set(os.listdir(self.etc)), {".pwd.lock", "passwd"})
        self.assertEqual(self.log.call_count, 1)


class MainTest(Case):
    """The command line, and the order of the steps."""

    def test_the_steps_always_run_in_their_order(self) -> None:
        for arguments in (["ready", "hostname"], ["hostname", "ready"], ["-v"]):
            steps = mock.Mock()
            known = {name: getattr(steps, name) for name in azure_provisioning.STEPS}
            with ExitStack() as stack:
                stack.enter_context(mock.patch.object(azure_provisioning, "STEPS", known))
                stack.enter_context(mock.patch.object(azure_provisioning, "fetch_instance"))
                self.assertEqual(azure_provisioning.main(arguments), 0)
            self.assertEqual([name for name, _, _ in steps.mock_calls], ["hostname", "ready"])

    def test_a_dry_run_changes_and_reports_nothing_and_prints_what_it_would_do(self) -> None:
        self.replace(default_interface=lambda: "")
        for arguments, shown in (
            (["--dry-run"], ["would set the host name to web-01", "<State>Ready</State>"]),
            (["-n", "--fail", "no disk"], ["<State>NotReady</State>", "<Description>no disk</Description>"]),
        ):
            self.forget()
            azure = self.azure()
            self.assertEqual(self.main(azure, *arguments), 0)
            self.assertEqual(azure.reports, [])
            self.assertNotIn("POST", "".join(azure.asked(WIRESERVER)))
            for part in shown:
                self.assertIn(part, "\n".join(self.lines))

    def test_wrong_usage_ends_with_status_2(self) -> None:
        wrong = "reboot|--timeout 0|--timeout nan|--timeout inf|--timeout soon|--fail reason ready|--fail|--frob"
        addresses = "|host:0|host:65536|http://host/|host\r\nX-Evil: yes|h\u00f6st|[::1]"
        cases = [line.split() for line in wrong.split("|")] + [["--imds", address] for address in addresses.split("|")]
        for arguments in cases:
            with self.subTest(arguments), mock.patch("sys.stderr"), self.assertRaises(SystemExit) as caught:
                azure_provisioning.main(arguments)
            self.assertEqual(caught.exception.code, 2)

    def test_addresses_may_be_names(self) -> None:
        for text in ("localhost", "localhost:8016", "127.0.0.1", "web-01.example.com:1"):
            self.assertEqual(azure_provisioning.parse_arguments(["--imds", text]).imds, text)
        self.assertEqual(azure_provisioning.main(["--wireserver", "a..b", "--timeout", "0.2", "ready"]), 1)
        self.assertEqual([("a..b" in line) for line in self.lines], [True, False])


if __name__ == "__main__":
    unittest.main()
