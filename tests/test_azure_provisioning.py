"""The module against the pretend Azure on loopback. Nobody waits: pauses are taken from an injected clock.

What changes a machine is not called here but in test_sandbox.py.
"""

import base64
import contextlib
import fcntl
import functools
import grp
import os
import pwd
import random
import shutil
import signal
import socket
import tempfile
import time
import tracemalloc
import unittest
from contextlib import ExitStack
from typing import Any, ClassVar, Dict, List, Optional, Sequence, Tuple
from unittest import mock
from xml.etree import ElementTree

import azure_provisioning
from azure_provisioning import InstanceMetadata, ProvisioningError, Renewal
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
        stack = ExitStack()
        self.addCleanup(stack.close)
        self.clock = Clock()
        self.lines: List[str] = []
        self.levels: List[int] = []
        stack.enter_context(mock.patch.object(azure_provisioning, "time", self.clock))
        stack.enter_context(mock.patch.object(azure_provisioning, "log", self.log))
        stack.enter_context(mock.patch.object(azure_provisioning, "ATTEMPT_LIMIT", 0.5))
        for function in ("run", "replace_file", "set_host_name"):  # this is not a VM
            stack.enter_context(mock.patch.object(azure_provisioning, function, self.untouchable))
        self.stack = stack

    def log(self, level: int, line: str) -> None:
        if level <= azure_provisioning.log_level:
            self.levels.append(level)
            self.lines.append(line)

    def warnings(self) -> List[str]:
        """What went wrong so far."""
        return [line for level, line in zip(self.levels, self.lines) if level <= azure_provisioning.WARNING]

    def forget(self) -> None:
        """Start over: what has been said and slept so far does not count."""
        del self.clock.pauses[:], self.lines[:], self.levels[:]

    def untouchable(self, *what: object) -> None:
        raise AssertionError(f"about to change the machine: {what}")

    def azure(self, wireserver: Optional[Script] = None, imds: Optional[Script] = None, **more: Any) -> FakeAzure:
        script = {WIRESERVER: wireserver or [], IMDS: imds or []}
        return self.stack.enter_context(FakeAzure(script=script, drip_pause=0.05, **more))

    def ready(self, azure: FakeAzure, *arguments: str) -> int:
        return azure_provisioning.main(["--wireserver", azure.listen(WIRESERVER), *arguments])

    def host_name(self, azure: FakeAzure, timeout: float = 120) -> str:
        return InstanceMetadata(azure.listen(IMDS), timeout).get().host_name


# What can go wrong with one exchange, whoever the service is.
TROUBLE: Dict[str, Dict[str, Any]] = {
    "silence": {"do": "silent"},
    "a reset": {"do": "reset"},
    "a connection closed at once": {"do": "close"},
    "an answer that comes byte by byte": {"do": "drip"},
    "a truncated answer": {"do": "cut"},
    "an answer that ends in its headers": {"do": "cut_headers"},
    "a status line alone": {"do": "raw", "raw": "HTTP/1.1 200 OK\r\n"},
    "no HTTP": {"do": "raw", "raw": "SSH-2.0-OpenSSH_9.2\r\n\r\n"},
    "a header that is none": {"do": "raw", "raw": "HTTP/1.1 200 OK\r\nContent-Length\r\n\r\n"},
    "a folded header": {"do": "raw", "raw": "HTTP/1.1 200 OK\r\nA: b\r\n c: d\r\nContent-Length: 0\r\n\r\n"},
    "headers of a mebibyte": {"do": "raw", "raw": "HTTP/1.1 200 OK\r\nA: " + "x" * (1 << 20) + "\r\n\r\n"},
    "a body without end": {"do": "endless_body"},
    "headers without end": {"do": "endless_header"},
    "interim answers without end": {"do": "endless_continue"},
    "a body that is too long": {"body": "x", "repeat": azure_provisioning.ANSWER_LIMIT},
    "a body that is far too long": {"body": "x", "repeat": 4 * azure_provisioning.ANSWER_LIMIT},
    "no UTF-8": {"body": "\udcff\udcfe<"},
    "a chunk that is none": {"headers": {"Transfer-Encoding": "chunked"}, "body": "frog\r\n"},
    "a chunk of a negative size": {"headers": {"Transfer-Encoding": "chunked"}, "body": "-1\r\n" + "x" * 99},
    "a chunk that is longer than it says": {"headers": {"Transfer-Encoding": "chunked"}, "body": "1\r\nxyz0\r\n\r\n"},
    "chunks without their last": {
        "do": "raw",
        "raw": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n",
    },
    "an unknown coding": {"headers": {"Transfer-Encoding": "gzip, chunked"}, "body": "0\r\n\r\n"},
    "a length and chunks": {"headers": {"Transfer-Encoding": "chunked", "Content-Length": "5"}, "body": "0\r\n\r\n"},
    "a length that is none": {"headers": {"Content-Length": "-17"}, "body": "short"},
    "two lengths": {"do": "raw", "raw": "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 0\r\n\r\nx"},
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

    def trouble(self, more: Dict[str, Dict[str, Any]]) -> "List[Any]":
        return sorted({**TROUBLE, **more}.items())

    def check_one_line_and_one_short_pause(self) -> None:
        self.assertEqual(len(self.clock.pauses), 1, self.lines)
        self.assertLessEqual(self.clock.pauses[0], azure_provisioning.FIRST_PAUSE)
        self.assertEqual(self.levels.count(azure_provisioning.WARNING), 1, self.lines)
        warning = self.warnings()[0]
        self.assertRegex(warning, r"127\.0\.0\.1.*; trying again in 0\.\d s\Z")
        self.assertLess(len(warning), 450)

    def test_ready_is_reported_after_any_trouble_with_the_goal_state(self) -> None:
        wrong: Dict[str, Dict[str, Any]] = {
            "status 400": {"status": 400},
            "status 404": {"status": 404},
            "no body": {"status": 200},
            "no XML": {"body": "<GoalState><Incarnation>1</Incarn"},
            "another document": {"body": "<html><body>Sign in to the hotel's network</body></html>"},
            "UTF-16": {"body": GOAL_STATE.encode("utf-16").decode("utf-8", "surrogateescape")},
            "depth": {"body": "<a>", "repeat": 300000},
            "a namespace in each name": {"body": f"<a xmlns:x='{'u' * 500000}'>{'<x:b/>' * 80000}</a>"},
            "a namespace in a few names": {"body": f"<a xmlns:x='{'u' * 9000}'>{'<x:b/>' * 1300}</a>"},
            "UTF-16 without a BOM": {"body": GOAL_STATE[1:].encode("utf-16-le").decode("utf-8")},
            "a NUL": {"body": GOAL_STATE.replace("Started", "\0")},
            "no incarnation": {"body": GOAL_STATE.replace("{incarnation}", "")},
            "no container": {"body": GOAL_STATE.replace("{container_id}", " \n")},
            "no instance": {"body": GOAL_STATE.replace("RoleInstance>", "Role>")},
        }
        for name, entry in self.trouble(wrong):
            with self.subTest(name):
                self.forget()
                started = time.monotonic()
                azure = self.azure([entry])
                self.assertEqual(self.ready(azure, "ready"), 0)
                self.assertLess(time.monotonic() - started, 3)
                self.assertEqual([report["state"] for report in azure.accepted], ["Ready"])
                self.check_one_line_and_one_short_pause()

    def test_ready_is_reported_after_any_trouble_with_the_report(self) -> None:
        wrong: Dict[str, Dict[str, Any]] = {"status 400": {"status": 400}, "status 404": {"status": 404}}
        for name, entry in self.trouble(wrong):
            if "cut" in entry.values():
                continue  # the right answer has no body to cut
            if entry == {"do": "drip"}:
                continue  # and has come within the limit
            with self.subTest(name):
                self.forget()
                azure = self.azure([{"do": "right"}, entry])
                self.assertEqual(self.ready(azure, "ready"), 0)
                self.assertEqual(azure.accepted[-1]["state"], "Ready")
                self.check_one_line_and_one_short_pause()
                # Each attempt is whole: goal state and report.
                self.assertEqual(
                    azure.asked(WIRESERVER)[-2:], ["GET /machine?comp=goalstate", "POST /machine?comp=health"]
                )
                self.assertEqual(len(azure.requests), 4)

    def test_the_host_name_is_found_after_any_trouble_with_imds(self) -> None:
        wrong: Dict[str, Dict[str, Any]] = {
            "status 400": {"status": 400},
            "status 404": {"status": 404},
            "no body": {"status": 200},
            "HTML": {"body": "<html>please log in</html>"},
            "another document": {"body": '["compute"]'},
            "a document of nothing": {"body": "{}"},
            "no compute": {"body": '{"compute": null}'},
            "no name": {"body": '{"compute": {"osProfile": {"computerName": "web-01"}}}'},
            "an empty name": {"body": '{"compute": {"name": "", "osProfile": {"computerName": "web-01"}}}'},
            "a name that is none": {"body": '{"compute": {"name": 7}}'},
            "a computer name that is none": {"body": '{"compute": {"name": "a", "osProfile": {"computerName": 7}}}'},
            "an osProfile that is none": {"body": '{"compute": {"name": "a", "osProfile": [1]}}'},
            "a user that is none": {"body": '{"compute": {"name": "a", "osProfile": {"adminUsername": ["root"]}}}'},
            "keys that are none": {"body": '{"compute": {"name": "a", "publicKeys": 7}}'},
            "a key that is none": {"body": '{"compute": {"name": "a", "publicKeys": [{"keyData": 7}]}}'},
            "a name of which nothing can stay": {"body": '{"compute": {"name": "___"}}'},
            "a document without end": {"body": '{"compute": {"name": "a"'},
            "depth": {"body": "[", "repeat": 300000},
            "a long number": {"body": '{"compute": ' + "9" * 1000000},
        }
        for name, entry in self.trouble(wrong):
            with self.subTest(name):
                self.forget()
                started = time.monotonic()
                self.assertEqual(self.host_name(self.azure(imds=[entry])), "web-01")
                self.assertLess(time.monotonic() - started, 3)
                self.check_one_line_and_one_short_pause()

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

        with mock.patch.object(self.clock, "sleep", sleep_until_it_is_there):
            self.assertEqual(azure_provisioning.main(["--wireserver", address, "ready"]), 0)
        self.assertEqual(len(azure.accepted), 1)
        self.assertEqual(len(self.clock.pauses), 4)

    def test_a_document_with_a_doctype_is_refused_unread(self) -> None:
        goal_state = GOAL_STATE.format(incarnation="&i;", container_id="c", instance_id="i").split("?>")[1]
        hostile = "<!DOCTYPE GoalState [<!ENTITY i '3'>]>" + goal_state
        for encoding in ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le"):
            with self.subTest(encoding):
                self.forget()
                azure = self.azure([{"body": hostile.encode(encoding).decode()}])
                self.assertEqual(self.ready(azure, "ready"), 0)
                self.assertEqual([report["incarnation"] for report in azure.reports], ["3"])
                self.assertIn("has a DOCTYPE or a NUL: refused; trying again", self.warnings()[0])

    def test_ready_is_reported_again_when_the_container_moved(self) -> None:
        azure = self.azure([{"do": "right"}, {"do": "moved"}])
        self.assertEqual(self.ready(azure, "ready"), 0)
        self.assertEqual([report["incarnation"] for report in azure.reports], ["3", "4"])
        self.assertEqual(azure.accepted[0]["container_id"], azure.container_id)

    def test_pauses_start_small_double_and_stop_growing_at_five_seconds(self) -> None:
        self.assertEqual(self.ready(self.azure([{"status": 503}] * 9), "ready"), 0)
        for pause, longest in zip(self.clock.pauses, (0.25, 0.5, 1, 2, 4, 5, 5, 5, 5)):
            self.assertLessEqual(pause, longest)
            self.assertGreaterEqual(pause, longest / 2 - 0.1)

    def test_pauses_vary_by_chance(self) -> None:
        self.ready(self.azure([{"status": 503}] * 20), "ready")
        self.assertGreater(len({round(pause, 4) for pause in self.clock.pauses[5:]}), 10)

    def test_a_pause_counts_from_the_start_of_the_attempt(self) -> None:
        self.ready(self.azure([{"status": 503}] * 8 + [{"do": "silent"}, {"status": 503}]), "ready")
        self.assertGreater(self.clock.pauses[-1], 2)
        self.clock.pauses.clear()
        with mock.patch.object(azure_provisioning, "LONGEST_PAUSE", 0.3):
            self.ready(self.azure([{"do": "silent"}] * 3), "ready")
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
            with self.subTest(value[:40]):
                self.clock.pauses.clear()
                headers = {"Retry-After": value.encode().decode("latin-1")}
                self.assertEqual(self.ready(self.azure([{"status": 429, "headers": headers}]), "ready"), 0)
                self.assertGreaterEqual(self.clock.pauses[0], least)
                self.assertLessEqual(self.clock.pauses[0], most)

    def test_it_gives_up_when_the_timeout_is_spent_and_says_so_in_one_line(self) -> None:
        azure = self.azure([{"status": 503, "body": "busy"}] * 1000)
        before = self.clock.monotonic()
        self.assertEqual(self.ready(azure, "ready"), 1)
        spent = self.clock.monotonic() - before
        self.assertGreater(spent, 1190)
        self.assertLess(spent, 1201)
        self.assertEqual(self.levels.count(azure_provisioning.ERROR), 1)
        self.assertRegex(
            self.lines[-1],
            r"^ready failed: GET http://127\.0\.0\.1:\d+/machine\?comp=goalstate: "
            r"status 503 busy; gave up after 1200 s$",
        )

    def test_the_timeout_sets_the_timeout_of_each_service(self) -> None:
        for seconds in (0.3, 3, 60):
            with self.subTest(seconds):
                before = self.clock.monotonic()
                self.assertEqual(self.ready(self.azure([{"status": 503}] * 99), "--timeout", str(seconds), "ready"), 1)
                self.assertGreater(self.clock.monotonic() - before, seconds - 1.1)
                self.assertLess(self.clock.monotonic() - before, seconds + 0.3)

    def test_one_attempt_never_lasts_longer_than_its_limit(self) -> None:
        for action in ("silent", "drip", "endless_continue", "endless_body"):
            with self.subTest(action):
                before = time.monotonic()
                self.ready(self.azure([{"do": action}]), "ready")
                self.assertLess(time.monotonic() - before, 0.5 + 0.5)

    def test_the_last_attempt_ends_with_the_timeout(self) -> None:
        self.assertEqual(self.ready(self.azure([{"do": "silent"}]), "--timeout", "0.1", "ready"), 1)
        self.assertRegex(self.lines[-1], r"no complete answer within 0\.(1|09\d*) s; gave up")

    def test_the_limit_is_ten_seconds(self) -> None:
        self.stack.close()
        self.assertEqual(azure_provisioning.ATTEMPT_LIMIT, 10)
        self.assertEqual((azure_provisioning.IMDS_TIMEOUT, azure_provisioning.WIRESERVER_TIMEOUT), (120, 1200))

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
            self.ready(azure, "ready")
        self.assertGreaterEqual(connect.call_count, 2)
        self.assertEqual([request["headers"]["connection"] for request in azure.requests], ["close", "close"])

    def test_what_is_left_of_an_answer_is_no_answer_to_the_report(self) -> None:
        goal_state = GOAL_STATE.format(incarnation=1, container_id="c", instance_id="i") + " " * 8192
        first = f"HTTP/1.1 200 OK\r\nContent-Length: {len(goal_state.encode())}\r\n\r\n{goal_state}".encode().decode(
            "latin-1"
        )
        azure = self.azure([{"do": "raw", "raw": first + "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "keep": True}])
        self.assertEqual(self.ready(azure, "--timeout", "0.5", "ready"), 1)
        self.assertEqual(azure.accepted, [])
        self.assertIn("status 410", self.lines[-1])

    def test_an_answer_in_chunks_is_fine(self) -> None:
        chunks = '1\r\n{\r\n1e;x=y\r\n"compute": {"name": "web-02"}}\r\n0\r\nA: trailer\r\n\r\n'
        azure = self.azure(imds=[{"body": chunks, "headers": {"Transfer-Encoding": "Chunked"}}])
        self.assertEqual(self.host_name(azure), "web-02")
        self.assertEqual(self.warnings(), [])

    def test_an_answer_that_ends_with_the_connection_is_fine(self) -> None:
        azure = self.azure(imds=[{"do": "raw", "raw": 'HTTP/1.0 200\r\n\r\n{"compute": {"name": "web-02"}}'}])
        self.assertEqual(self.host_name(azure), "web-02")
        self.assertEqual(self.warnings(), [])

    def test_an_answer_of_which_the_length_is_told_is_complete_while_the_connection_stays(self) -> None:
        for status in ("200 OK\r\nContent-Length: 0\r\nContent-Length: 0", "204 No Content"):
            azure = self.azure([{"do": "right"}, {"do": "raw", "raw": f"HTTP/1.1 {status}\r\n\r\n", "keep": True}])
            self.assertEqual(self.ready(azure, "ready"), 0)
            self.assertEqual(self.warnings(), [])

    def test_proxies_in_the_environment_are_ignored(self) -> None:
        proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"), "http://127.0.0.1:9")
        with mock.patch.dict(os.environ, proxies):
            self.assertEqual(self.ready(self.azure(), "ready"), 0)
        self.assertEqual(self.clock.pauses, [])

    def test_the_headers_are_those_that_azure_wants(self) -> None:
        azure = self.azure()
        self.ready(azure, "ready")
        self.host_name(azure)
        goal_state, report, imds = [request["headers"] for request in azure.requests]
        self.assertEqual(goal_state["x-ms-version"], "2012-11-30")
        self.assertEqual(report["x-ms-version"], "2012-11-30")
        self.assertEqual(report["x-ms-agent-name"], "azure-provisioning")
        self.assertEqual(report["content-type"], "text/xml;charset=utf-8")
        self.assertEqual(imds["metadata"], "true")
        self.assertNotIn("x-forwarded-for", imds)

    def test_a_refusal_is_told_with_what_was_asked_of_whom_and_what_came_back(self) -> None:
        azure = self.azure([{"status": 400, "body": "<Error>no\nversion</Error>"}])
        self.ready(azure, "ready")
        self.assertRegex(
            self.warnings()[0],
            r"(?s)^GET http://127\.0\.0\.1:\d+/machine\?comp=goalstate: "
            r"status 400 no version; trying again in 0\.\d s$",
        )

    def test_a_page_of_html_is_told_as_text(self) -> None:
        page = '<!DOCTYPE HTML PUBLIC "-//W3C//DTD HTML 4.01//EN">\r\n<HTML><BODY><h2>Busy</h2>\n</BODY></HTML>'
        for body, told in ((page, "Busy"), ("", "Service Unavailable"), ("<" * 500000, "<" * 200)):
            self.forget()
            started = time.monotonic()
            self.ready(self.azure([{"status": 503, "body": body}]), "ready")
            self.assertLess(time.monotonic() - started, 2)
            self.assertIn(f": status 503 {told}; trying again", self.warnings()[0])

    def test_an_error_in_another_encoding_is_told_by_its_status(self) -> None:
        self.ready(self.azure([{"status": 503, "body": "occup\udce9", "headers": {"Retry-After": "7"}}]), "ready")
        self.assertRegex(self.warnings()[0], ": status 503 occup\ufffd; trying again in 7.0 s$")

    def test_a_long_answer_is_shown_in_part(self) -> None:
        self.host_name(self.azure(imds=[{"body": '{"compute": {"name": "web-02"}}' + " " * 100000}]))
        self.assertEqual([len(line) // 1000 for line in self.lines], [3])

    def test_a_deadline_that_is_over_is_told_as_no_time(self) -> None:
        with self.assertRaisesRegex(ProvisioningError, "no complete answer within 0 s$"):
            azure_provisioning.exchange("127.0.0.1:9", self.clock.monotonic() - 1, "GET", "/", {})

    def test_one_deadline_is_for_all_of_an_attempt(self) -> None:
        azure = self.azure([{"do": "right", "delay": 0.3}, {"do": "right", "delay": 0.3}])
        self.ready(azure, "ready")
        self.assertRegex(self.warnings()[0], r"^POST .*: no complete answer within 0\.\d+ s; trying again")


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
            b"HTTP/1.1 200 OK\r\nA: " + b"x" * 65536,
        ):
            with self.subTest(beginning[:80]), self.assertRaises(ValueError):
                self.parse(beginning, ended=False)

    def test_headers_may_have_64_kib(self) -> None:
        start = b"HTTP/1.1 200 OK\r\nA: "
        self.parse(start + b"x" * (65536 - len(start)) + b"\r\n\r\n")
        with self.assertRaisesRegex(ValueError, "headers of more than 65536 bytes"):
            self.parse(start + b"x" * (65537 - len(start)) + b"\r\n\r\n")

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


IDENTIFIERS = {"Incarnation": "7", "ContainerId": "c", "InstanceId": "i"}


class HealthReportTest(Case):
    """What the platform is told."""

    def test_the_report_names_the_incarnation_just_fetched(self) -> None:
        azure = self.azure()
        azure.incarnation = 42
        self.ready(azure, "ready")
        self.assertEqual(azure.accepted[0]["incarnation"], "42")

    def test_space_around_the_identifiers_is_not_sent_back(self) -> None:
        azure = self.azure()
        values = {"incarnation": 3, "container_id": azure.container_id, "instance_id": azure.instance_id}
        body = GOAL_STATE.format(**{name: f"\n {value}\t" for name, value in values.items()})
        azure = self.azure([{"body": body}])
        self.assertEqual(self.ready(azure, "ready"), 0)
        self.assertEqual(self.warnings(), [])

    def test_nothing_is_reported_for_a_goal_state_without_identifiers(self) -> None:
        azure = self.azure([{"body": "<GoalState><Incarnation>3</Incarnation></GoalState>"}])
        self.assertEqual(self.ready(azure, "ready"), 0)
        self.assertIn("has no ContainerId, InstanceId; trying again", self.warnings()[0])
        self.assertEqual([report["accepted"] for report in azure.reports], [True])

    def test_ready_is_the_document_that_azure_expects(self) -> None:
        self.assertEqual(
            azure_provisioning.health_report(IDENTIFIERS).decode().split("?>")[-1].strip(),
            "<Health><GoalStateIncarnation>7</GoalStateIncarnation><Container><ContainerId>c</ContainerId>"
            "<RoleInstanceList><Role><InstanceId>i</InstanceId><Health><State>Ready</State></Health></Role>"
            "</RoleInstanceList></Container></Health>",
        )

    def test_identifiers_cannot_break_the_document(self) -> None:
        evil = "</ContainerId><State>Ready</State>&\"'"
        report = azure_provisioning.health_report(dict(IDENTIFIERS, ContainerId=evil))
        self.assertEqual(ElementTree.fromstring(report).findtext("Container/ContainerId"), evil)

    def test_a_failure_is_reported_with_its_reason(self) -> None:
        azure = self.azure()
        self.assertEqual(self.ready(azure, "--fail", "disk <1 of 2> & no more"), 0)
        (report,) = azure.accepted
        self.assertEqual(
            (report["state"], report["substatus"], report["description"]),
            ("NotReady", "ProvisioningFailed", "disk <1 of 2> & no more"),
        )
        self.assertEqual(azure.asked(IMDS), [])

    def test_a_failure_without_a_reason_is_reported_too(self) -> None:
        azure = self.azure()
        self.assertEqual(self.ready(azure, "--fail", ""), 0)
        self.assertEqual([report["state"] for report in azure.accepted], ["NotReady"])
        self.assertEqual(azure.asked(IMDS), [])

    def test_a_reason_is_cut_at_512_characters_before_it_is_escaped(self) -> None:
        azure = self.azure()
        self.assertEqual(self.ready(azure, "--fail", "&" * 600), 0)
        self.assertEqual(azure.accepted[0]["description"], "&" * 512)

    def test_a_reason_may_hold_anything(self) -> None:
        azure = self.azure()
        self.assertEqual(self.ready(azure, "--fail", "a\x00b\x1b[1mc\ud800d\udcffe\ufffff \U0001f525\tg\u00fc"), 0)
        self.assertEqual(azure.accepted[0]["description"], "a?b?[1mc?d?e?f \U0001f525\tg\u00fc")


class InstanceMetadataTest(Case):
    """IMDS is asked for the whole document, and an old one for the name."""

    DOCUMENT = "GET /metadata/instance?api-version=2021-08-01&extended=true"
    NAME = "GET /metadata/instance/compute/name?api-version=2019-06-01&format=text"

    def test_the_document_is_all_that_is_asked_for(self) -> None:
        azure = self.azure()
        self.assertEqual(self.host_name(azure), "web-01")
        self.assertEqual(azure.asked(IMDS), [self.DOCUMENT])

    def test_the_resource_name_stands_in_for_a_computer_name_that_is_empty(self) -> None:
        for computer_name in (None, "", " \n"):
            with self.subTest(computer_name):
                azure = self.azure(computer_name=computer_name)
                self.assertEqual(self.host_name(azure), "web-01")
                self.assertEqual(azure.asked(IMDS), [self.DOCUMENT])
        self.assertEqual(self.clock.pauses, [])

    def test_a_document_without_os_profile_has_the_resource_name(self) -> None:
        for document in ('{"compute": {"name": "db_7"}}', '{"compute": {"name": "db_7", "osProfile": null}}'):
            self.assertEqual(azure_provisioning.parse_instance(document).host_name, "db-7")

    def test_what_the_vm_was_created_with_is_read(self) -> None:
        text = (
            '{"compute": {"name": "a", "osProfile": {"adminUsername": "alice", "disablePasswordAuthentication": %s},'
            ' "publicKeys": [{"keyData": "ssh-rsa A", "path": "/p"}, {"keyData": "ssh-rsa B", "path": "/p"}]}}'
        )
        for raw, wanted in (('"true"', True), ("true", True), ('"false"', False), ("false", False), ('""', False)):
            instance = azure_provisioning.parse_instance(text % raw)
            self.assertEqual(instance.passwords_disabled, wanted, raw)
            self.assertEqual((instance.admin_username, instance.public_keys), ("alice", ["ssh-rsa A", "ssh-rsa B"]))

    def test_imds_that_does_not_know_the_vm_yet_is_asked_for_the_same_again(self) -> None:
        for status in (400, 404, 410, 429, 500, 503):
            with self.subTest(status):
                azure = self.azure(imds=[{"status": status}] * 4)
                self.assertEqual(self.host_name(azure), "web-01")
                self.assertEqual(azure.asked(IMDS), [self.DOCUMENT] * 5)

    def test_imds_that_refuses_the_document_for_ten_seconds_is_asked_for_the_name(self) -> None:
        azure = self.azure(imds_versions=["2017-04-02", "2019-06-01"])
        before = self.clock.monotonic()
        self.assertEqual(self.host_name(azure), "web-01")
        self.assertGreaterEqual(self.clock.monotonic() - before, 10)
        self.assertLess(self.clock.monotonic() - before, 10 + azure_provisioning.LONGEST_PAUSE + 1)
        asked = azure.asked(IMDS)
        self.assertEqual(asked, [self.DOCUMENT] * (len(asked) - 1) + [self.NAME])

    def test_the_name_of_an_old_imds_may_end_its_line(self) -> None:
        self.assertEqual(
            self.host_name(self.azure(imds_versions=["2019-06-01"], name="web-02\r\n"), timeout=30), "web-02"
        )

    def test_nothing_but_the_name_is_known_from_an_old_imds(self) -> None:
        azure = self.azure(imds_versions=["2019-06-01"])
        instance = InstanceMetadata(azure.listen(IMDS), 60).get()
        self.assertEqual(
            (instance.admin_username, list(instance.public_keys), instance.passwords_disabled), (None, [], False)
        )

    def test_the_name_of_which_nothing_can_stay_is_told(self) -> None:
        for document in (
            '{"compute": {"name": "vm", "osProfile": {"computerName": "___"}}}',
            '{"compute": {"name": "___"}}',
        ):
            with self.assertRaisesRegex(ValueError, "^nothing of '___' can be a host name$"):
                azure_provisioning.parse_instance(document)

    def test_anything_but_refusals_in_these_ten_seconds_starts_them_anew(self) -> None:
        for other in ({"status": 404}, {"body": "<html>"}, {"do": "reset"}):
            with self.subTest(other):
                self.clock.pauses.clear()
                script = [{"status": 400}] * 5 + [other] + [{"status": 400}] * 2
                azure = self.azure(imds=script, name="vm-resource")
                self.assertEqual(self.host_name(azure), "web-01")
                self.assertGreater(sum(self.clock.pauses[:7]), 10)
                self.assertEqual(azure.asked(IMDS), [self.DOCUMENT] * 9)

    def test_a_name_that_is_none_is_not_taken_from_an_old_imds_either(self) -> None:
        for name in ("<html>please log in</html>", "", "___", "a b"):
            with self.subTest(name):
                azure = self.azure(imds_versions=["2019-06-01"], name=name)
                with self.assertRaisesRegex(ProvisioningError, "compute/name.*: not a name: .*; gave up after 30 s"):
                    self.host_name(azure, timeout=30)

    def test_who_asks_twice_gets_the_same_and_imds_is_asked_once(self) -> None:
        azure = self.azure()
        metadata = InstanceMetadata(azure.listen(IMDS), 2)
        self.assertIs(metadata.get(), metadata.get())
        self.assertEqual(len(azure.requests), 1)
        azure = self.azure(imds=[{"status": 500}] * 99)
        metadata = InstanceMetadata(azure.listen(IMDS), 2)
        failures = []
        for _ in range(2):
            with self.assertRaisesRegex(ProvisioningError, "status 500.*; gave up after 2 s") as caught:
                metadata.get()
            failures.append((caught.exception, len(azure.requests)))
        self.assertEqual(failures[0], failures[1])


class ValidHostNameTest(unittest.TestCase):
    """Any answer becomes a host name, or nothing."""

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
            "\u0661\u0662": "",
            "___": "",
            ".-.": "",
            "": "",
        }.items():
            with self.subTest(raw):
                self.assertEqual(azure_provisioning.valid_host_name(raw), name)

    def test_every_result_is_valid_and_stays_as_it_is(self) -> None:
        choose = random.Random(1)
        for _ in range(2000):
            raw = "".join(
                choose.choice("aZ0-._\u00e9 " + "x" * choose.randrange(99)) for _ in range(choose.randrange(80))
            )
            name = azure_provisioning.valid_host_name(raw)
            self.assertRegex(
                name, r"\A([A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*)?\Z"
            )
            self.assertLessEqual(len(name), 64)
            self.assertLessEqual(max(map(len, name.split("."))), 63)
            self.assertEqual(azure_provisioning.valid_host_name(name), name)


class MachineTest(unittest.TestCase):
    """Programs and files."""

    def test_a_program_is_not_waited_for_without_end(self) -> None:
        started = time.monotonic()
        for code in ("exec sleep 60", "sleep 60 & wait"):  # the latter's child keeps the output open
            timed_out = self.assertRaisesRegex(ProvisioningError, f"^sh -c {code}: no end within 0.2 s$")
            with timed_out:
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

    def test_a_name_that_the_kernel_refuses_is_an_error(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(os.path, "isdir", return_value=False))
            stack.enter_context(mock.patch.object(azure_provisioning, "replace_file"))
            stack.enter_context(mock.patch.object(socket, "sethostname", side_effect=OSError("no")))
            with self.assertRaisesRegex(ProvisioningError, "^sethostname web-99: no$"):
                azure_provisioning.set_host_name("web-99")

    def test_a_name_is_that_of_the_kernel_and_of_the_file(self) -> None:
        kernel = os.uname().nodename
        for name, file, wanted in ((kernel, kernel, True), (kernel, "web-99", False), ("web-99", "web-99", False)):
            with mock.patch.object(azure_provisioning, "read_file", return_value=file + "\n"):
                self.assertEqual(azure_provisioning.host_name_is(name), wanted)

    def test_a_name_that_was_not_taken_is_an_error(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(os.path, "isdir", return_value=False))
            written = stack.enter_context(mock.patch.object(azure_provisioning, "replace_file"))
            given = stack.enter_context(mock.patch.object(socket, "sethostname"))
            with self.assertRaisesRegex(ProvisioningError, "^the host name is .* after it was set to web-99$"):
                azure_provisioning.set_host_name("web-99")
        written.assert_called_once_with("/etc/hostname", "web-99\n")
        given.assert_called_once_with("web-99")

    def test_a_file_is_replaced_with_its_label_and_mode_and_for_good(self) -> None:
        with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
            path = directory + "/hosts"
            sizes: List[int] = []
            with open(path, "w", encoding="utf-8") as file:
                file.write("old text")
            labels = stack.enter_context(
                mock.patch.object(os, "getxattr", return_value=b"system_u:object_r:net_conf_t")
            )
            label = stack.enter_context(mock.patch.object(os, "setxattr"))
            restored = stack.enter_context(mock.patch.object(azure_provisioning, "restore_label"))
            synced = stack.enter_context(
                mock.patch.object(
                    os, "fsync", side_effect=lambda descriptor: sizes.append(os.fstat(descriptor).st_size)
                )
            )
            azure_provisioning.replace_file(path, "n\udcffw", 0o640)
            labels.assert_called_once_with(os.path.realpath(path), "security.selinux")
            label.assert_called_once_with(mock.ANY, "security.selinux", b"system_u:object_r:net_conf_t")
            self.assertEqual(restored.mock_calls, [])
            self.assertEqual((synced.call_count, sizes[0]), (2, 3))
            self.assertEqual(os.listdir(directory), ["hosts"])
            self.assertEqual(os.stat(path).st_mode & 0o7777, 0o640)
            with open(path, "rb") as binary:
                self.assertEqual(binary.read(), b"n\xffw")
            self.assertEqual(azure_provisioning.read_file(path), "n\udcffw")
            azure_provisioning.replace_file(directory + "/new", "")
            restored.assert_called_once_with(os.path.realpath(directory) + "/new")
            self.assertEqual(os.stat(directory + "/new").st_mode & 0o7777, 0o644)

    def test_labels_are_restored_where_selinux_is_on_and_has_a_policy(self) -> None:
        kernel, policy = "/sys/fs/selinux/enforce", "/etc/selinux/config"
        both = [kernel, policy]
        missing = ProvisioningError("restorecon: no")
        for files, outcome in (([], None), ([kernel], None), ([policy], None), (both, None), (both, missing)):
            there = files == both
            with ExitStack() as stack:
                stack.enter_context(mock.patch.object(os.path, "exists", side_effect=files.__contains__))
                run = stack.enter_context(mock.patch.object(azure_provisioning, "run", side_effect=outcome))
                log = stack.enter_context(mock.patch.object(azure_provisioning, "log"))
                azure_provisioning.restore_label("/etc/new")
                self.assertEqual(run.mock_calls, [mock.call("restorecon", "-R", "/etc/new")] * there)
                self.assertEqual(log.call_count, 1 if outcome else 0)

    def test_a_file_that_cannot_be_written_leaves_nothing_behind(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            refused = self.assertRaisesRegex(ProvisioningError, "^write .*/x: no$")
            with mock.patch.object(os, "rename", side_effect=OSError("no")), refused:
                azure_provisioning.replace_file(directory + "/x", "text")
            self.assertEqual(os.listdir(directory), [])

    def test_a_file_that_cannot_be_replaced_stays(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            azure_provisioning.replace_file(directory + "/x", "old")
            with mock.patch.object(os, "rename", side_effect=OSError("no")), self.assertRaises(ProvisioningError):
                azure_provisioning.replace_file(directory + "/x", "new")
            self.assertEqual(azure_provisioning.read_file(directory + "/x"), "old")

    def test_when_a_file_was_written_is_known(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            self.assertEqual(azure_provisioning.modified(directory + "/lease"), 0)
            azure_provisioning.replace_file(directory + "/lease", "")
            os.utime(directory + "/lease", ns=(1, 7))
            self.assertEqual(azure_provisioning.modified(directory + "/lease"), 7)


class RenameInHostsTest(unittest.TestCase):
    """The line of 127.0.1.1 follows the host name; nothing else changes."""

    def check(self, before: str, after: str, name: str = "new") -> None:
        self.assertEqual(azure_provisioning.rename_in_hosts(before, name), after)
        self.assertEqual(azure_provisioning.rename_in_hosts(after, name), after)

    def test_the_line_follows(self) -> None:
        self.check("127.0.1.1 old\n", "127.0.1.1 new\n")
        self.check("127.0.1.1\told.example.com old\n", "127.0.1.1\tnew.example.com new\n")
        self.check("127.0.1.1  old  # the host\n", "127.0.1.1  new  # the host\n")
        self.check("127.0.1.1 old", "127.0.1.1 new")
        self.check(
            "127.0.0.1 localhost\n127.0.1.1 old\n::1 old\n127.0.1.1 old",
            "127.0.0.1 localhost\n127.0.1.1 new\n::1 old\n127.0.1.1 new",
        )
        self.check("127.0.1.1 old # old\n", "127.0.1.1 new # old\n")
        self.check("127.0.1.1 127\n", "127.0.1.1 new\n")
        self.check("  127.0.1.1 old db.local older\r\n", "  127.0.1.1 new db.local older\r\n")

    def test_a_name_with_a_domain_replaces_the_one_with_a_domain(self) -> None:
        self.check("127.0.1.1 old.example.com old\n", "127.0.1.1 new.example.org new.example.org\n", "new.example.org")

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
            with self.subTest(text):
                self.check(text, text)

    def test_names_are_taken_literally(self) -> None:
        self.check("127.0.1.1 a+b(c a+b(c.example\n", "127.0.1.1 new new.example\n")


ROUTES = """Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
lan0\t0000000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
"""


class PublishTest(Case):
    """The DHCP client is made to send the name; the boot tests do it with real ones."""

    def setUp(self) -> None:
        super().setUp()
        self.interface = "eth7"
        self.address = True
        self.written = 1
        self.asked = 0
        self.outcome: Optional[ProvisioningError] = None
        self.renewal: Optional[Renewal] = Renewal("renew", "eth7", lease="/lease", ask=self.ask)
        for name, replacement in {
            "default_interface": lambda: self.interface,
            "is_connected": lambda interface: bool(self.address and self.interface == interface == "eth7"),
            "find_renewal": self.find_renewal,
            "modified": lambda path: self.written if path else 0,
        }.items():
            self.stack.enter_context(mock.patch.object(azure_provisioning, name, replacement))

    def find_renewal(self, interface: str) -> Optional[Renewal]:
        self.assertEqual(interface, self.interface)
        return self.renewal

    def ask(self) -> None:
        self.asked += 1
        if self.outcome:
            raise self.outcome
        self.renewed()

    def renewed(self) -> None:
        """What the client does when it is asked: a new lease after a while, unless a test wants something else."""
        self.at_pause(3, written=2)

    def at_pause(self, count: int, **change: Any) -> None:
        """Change what is true of the network once the module has slept count times."""
        sleep = self.clock.sleep

        def then(seconds: float) -> None:
            sleep(seconds)
            if len(self.clock.pauses) == count:
                self.__dict__.update(change)

        self.stack.enter_context(mock.patch.object(self.clock, "sleep", then))

    def publish(self, level: int, pattern: str, tries: int = 1) -> None:
        before = self.clock.monotonic()
        azure_provisioning.publish_host_name("web-01")
        self.assertLess(self.clock.monotonic() - before, tries * (azure_provisioning.RENEWAL_LIMIT + 1))
        self.assertEqual(self.levels, [azure_provisioning.WARNING] * (tries - 1) + [level], self.lines)
        for line in self.lines[:-1]:
            self.assertRegex(line, "^eth7 has no address or no default route after .*; trying again$")
        self.assertRegex(self.lines[-1], pattern)

    def test_it_waits_for_the_new_lease(self) -> None:
        self.publish(azure_provisioning.INFO, r"^published web-01 by renew eth7, after \d\.\d s$")
        self.assertEqual((len(self.clock.pauses), self.asked), (3, 1))
        self.assertLess(sum(self.clock.pauses), 0.2)

    def test_a_lease_that_vanishes_is_no_new_one(self) -> None:
        self.at_pause(1, written=0)
        self.at_pause(5, written=2)
        with mock.patch.object(self, "renewed"):
            self.publish(azure_provisioning.INFO, "^published web-01 by ")
        self.assertEqual(len(self.clock.pauses), 5)

    def test_a_lease_that_vanishes_for_good_is_a_warning(self) -> None:
        self.at_pause(1, written=0)
        with mock.patch.object(self, "renewed"):
            self.publish(azure_provisioning.WARNING, "^renew eth7: no new lease; ")

    def test_a_client_that_waits_for_the_lease_itself_is_not_waited_for(self) -> None:
        self.renewal = Renewal("renew", "eth7", ask=self.ask)
        self.publish(azure_provisioning.INFO, "^published web-01 by ")
        self.assertEqual(self.clock.pauses, [])

    def test_it_waits_for_the_default_route(self) -> None:
        self.renewal = Renewal("renew", "eth7", ask=self.ask)
        self.at_pause(5, interface="eth7")
        with mock.patch.object(self, "renewed", lambda: setattr(self, "interface", "")):
            self.publish(azure_provisioning.INFO, "^published web-01 by ")
        self.assertEqual(len(self.clock.pauses), 5)

    def test_it_waits_for_the_address(self) -> None:
        self.renewal = Renewal("renew", "eth7", ask=self.ask)
        self.at_pause(5, address=True)
        with mock.patch.object(self, "renewed", lambda: setattr(self, "address", False)):
            self.publish(azure_provisioning.INFO, "^published web-01 by ")
        self.assertEqual(len(self.clock.pauses), 5)

    def test_a_network_that_stays_away_is_an_error_that_says_what_was_run(self) -> None:
        self.at_pause(1, interface="")
        self.publish(azure_provisioning.ERROR, "^eth7 has no address .* after renew eth7: no new lease; for ", tries=3)
        self.assertGreater(sum(self.clock.pauses), 3 * 7)
        self.assertEqual(self.asked, 3)

    def test_a_network_that_stays_away_after_a_command_that_did_not_fail(self) -> None:
        self.renewal = Renewal("renew", "eth7", ask=self.ask)
        self.address = False
        self.publish(azure_provisioning.ERROR, "^eth7 has no address .* after renew eth7; for ", tries=3)

    def test_a_network_that_a_failing_command_took_away_is_an_error_that_says_what_failed(self) -> None:
        self.outcome = ProvisioningError("renew eth7: exit status 3: no")
        self.address = False
        self.publish(
            azure_provisioning.ERROR,
            "^eth7 has no .* after renew eth7: exit status 3: no; for other machines",
            tries=3,
        )

    def test_a_client_that_took_the_network_away_and_is_stuck_is_asked_again(self) -> None:
        def stuck() -> None:
            self.asked += 1
            self.address = self.asked == 2
            if not self.address:
                self.clock.skipped += azure_provisioning.RENEWAL_LIMIT
                raise ProvisioningError("renew eth7: no end within 8 s")

        self.renewal = Renewal("renew", "eth7", ask=stuck)
        self.publish(azure_provisioning.INFO, r"^published web-01 by renew eth7, after 8\.", tries=2)
        self.assertEqual((self.asked, self.clock.pauses), (2, []))

    def test_a_lease_that_does_not_come_is_a_warning_that_says_what_to_do(self) -> None:
        with mock.patch.object(self, "renewed"):
            self.publish(
                azure_provisioning.WARNING, "^renew eth7: no new lease; .* resolve web-01, restart the DHCP client"
            )

    def test_a_command_that_fails_is_a_warning_at_once(self) -> None:
        self.outcome = ProvisioningError("renew eth7: exit status 3: no")
        self.publish(azure_provisioning.WARNING, "^renew eth7: exit status 3: no; for other machines to resolve web-01")
        self.assertEqual(self.clock.pauses, [])

    def test_no_default_route_and_no_lease_are_a_warning(self) -> None:
        self.renewal = None
        self.publish(azure_provisioning.WARNING, "^found no DHCP lease to renew on eth7; ")
        self.forget()
        self.interface = ""
        self.renewal = Renewal("renew", "all", ask=self.ask)  # of a client that needs no interface to have a lease
        self.publish(azure_provisioning.WARNING, "^found no DHCP lease to renew on a default route; ")
        self.assertEqual(self.asked, 0)

    def test_a_client_that_will_not_send_the_name_is_a_warning_that_says_why(self) -> None:
        with mock.patch.object(azure_provisioning, "find_renewal", side_effect=ProvisioningError("it sends no name")):
            self.publish(azure_provisioning.WARNING, "^it sends no name; for other machines to resolve web-01")

    def test_a_dry_run_says_what_would_be_done(self) -> None:
        azure_provisioning.publish_host_name("web-01", dry_run=True)
        self.assertEqual((self.lines, self.asked), (["would publish web-01 by renew eth7"], 0))


class NetworkTest(Case):
    """What the module reads of the network, and whose the lease is."""

    def setUp(self) -> None:
        super().setUp()
        self.ran: List[Tuple[str, ...]] = []
        self.stack.enter_context(mock.patch.object(azure_provisioning, "run", self.run_in_time))

    def run_in_time(self, *command: str, limit: float = 0.0) -> None:
        self.assertEqual(limit, azure_provisioning.RENEWAL_LIMIT)
        self.ran.append(command)

    def default(self, *routes: str) -> str:
        with mock.patch.object(azure_provisioning, "read_file", return_value=ROUTES + "".join(routes)):
            return azure_provisioning.default_interface()

    def test_the_preferred_default_route_is_taken(self) -> None:
        first, second = [
            f"{name}\t00000000\t0100000A\t0003\t0\t0\t{metric}\t00000000\t0\t0\t0\n"
            for name, metric in (("a1", 200), ("b0", 100))
        ]
        self.assertEqual(self.default(), "")
        self.assertEqual(self.default(first), "a1")
        self.assertEqual(self.default(first, second), "b0")
        with mock.patch.object(azure_provisioning, "read_file", return_value=ROUTES.splitlines()[0] + "\n" + first):
            self.assertEqual(azure_provisioning.default_interface(), "a1")
        half = "tun0\t00000000\t00000000\t0001\t0\t0\t0\t00000080\t0\t0\t0\n"  # 0.0.0.0/1 is not the default
        self.assertEqual(self.default(half, first), "a1")

    def test_this_machine_can_be_asked(self) -> None:
        azure_provisioning.default_interface()
        azure_provisioning.is_connected("eth0")

    def test_who_has_no_default_route_or_no_address_is_not_connected(self) -> None:
        refusing = mock.MagicMock()
        refusing.return_value.__enter__.return_value.connect.side_effect = OSError
        for interface, make, wanted in (
            ("eth0", mock.MagicMock(), True),
            ("", mock.MagicMock(), False),
            ("eth1", mock.MagicMock(), False),  # what is left when the one that was preferred has lost its lease
            ("eth0", refusing, False),
        ):
            with ExitStack() as stack:
                stack.enter_context(mock.patch.object(azure_provisioning, "default_interface", return_value=interface))
                stack.enter_context(mock.patch.object(socket, "socket", make))
                self.assertEqual(azure_provisioning.is_connected("eth0"), wanted)
                make.assert_called_once_with(socket.AF_INET, socket.SOCK_DGRAM)  # sends nothing

    def find(self, *files: str, texts: Optional[Dict[str, str]] = None) -> Optional[Renewal]:
        """Return the renewal of eth0, interface 2, in a system in which there are files, and files with texts."""
        there = {*files, *(texts or {})}
        directories = {os.path.dirname(path) for path in there}

        def listed(path: str) -> List[str]:
            if path not in directories:
                raise FileNotFoundError(path)
            return [os.path.basename(file) for file in there if os.path.dirname(file) == path]

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(socket, "if_nametoindex", return_value=2))
            stack.enter_context(mock.patch.object(os.path, "exists", lambda path: path in there))
            stack.enter_context(mock.patch.object(os.path, "isdir", lambda path: path in directories))
            stack.enter_context(mock.patch.object(os, "listdir", listed))
            stack.enter_context(
                mock.patch.object(azure_provisioning, "read_file", lambda path: (texts or {}).get(path, ""))
            )
            return azure_provisioning.find_renewal("eth0")

    def check_found(self, renewal: Optional[Renewal], command: str, lease: str = "") -> None:
        assert renewal
        self.assertEqual((renewal.by_hand, renewal.lease), (command, lease))
        renewal.ask()
        self.assertEqual(self.ran, [tuple(command.split())])
        self.ran.clear()

    DEVICE: ClassVar[Dict[str, str]] = {
        "/run/NetworkManager/devices/2": "[device]\nmanaged=true\nconnection-uuid=1-2\nnm-owned=false\n"
    }

    def test_the_client_that_holds_the_lease_is_asked(self) -> None:
        lease = "/run/systemd/netif/leases/2"
        self.check_found(self.find(lease), "networkctl reconfigure eth0", lease)
        for directory in ("/var/lib/NetworkManager", "/run/NetworkManager"):
            found = self.find(directory + "/internal-1-2-eth0.lease", texts=self.DEVICE)
            self.check_found(found, "nmcli --wait 7 device connect eth0")
        found = self.find("/run/network/ifstate.eth0", "/run/dhclient.eth0.pid")
        self.check_found(found, "systemctl restart networking.service")

    def test_who_has_no_lease_is_left_alone(self) -> None:
        self.assertIsNone(self.find())
        self.assertIsNone(self.find("/run/systemd/netif/leases/3"))
        self.assertIsNone(self.find("/var/lib/NetworkManager/internal-1-2-eth1.lease", texts=self.DEVICE))
        self.assertIsNone(self.find("/var/lib/NetworkManager/internal-9-9-eth0.lease", texts=self.DEVICE))
        self.assertIsNone(self.find("/run/dhclient.eth0.pid"))
        self.assertIsNone(self.find("/run/network/ifstate.eth0"))

    def dhcpcd(
        self, prefix: str = "eth0.", configuration: str = "hostname\n", name: str = "dhcpcd\n"
    ) -> Optional[Renewal]:
        texts = {f"/run/dhcpcd/{prefix}pid": "622\n", "/proc/622/comm": name, "/etc/dhcpcd.conf": configuration}
        return self.find(texts=texts)

    def test_dhcpcd_is_asked_through_its_socket_for_one_interface_or_for_all(self) -> None:
        with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as server:
            server.bind(directory + "/sock")
            server.listen(1)
            for prefix in ("eth0.", ""):
                renewal = self.dhcpcd(prefix)
                assert renewal
                self.assertEqual((renewal.by_hand, renewal.lease), ("dhcpcd -N eth0", "/var/lib/dhcpcd/eth0.lease"))
                with mock.patch.object(azure_provisioning, "ask_dhcpcd") as ask:
                    renewal = self.dhcpcd(prefix)
                    assert renewal
                    renewal.ask()
                ask.assert_called_once_with(f"/run/dhcpcd/{prefix}sock", "eth0")
            with mock.patch.object(socket.socket, "settimeout") as settimeout:
                azure_provisioning.ask_dhcpcd(directory + "/sock", "eth0")
            settimeout.assert_called_once_with(azure_provisioning.RENEWAL_LIMIT)
            with server.accept()[0] as connection:
                self.assertEqual(connection.recv(99), b"dhcpcd\0-N\0eth0\0")
            with self.assertRaisesRegex(ProvisioningError, "ask /no/sock to renew eth0: .*No such file"):
                azure_provisioning.ask_dhcpcd("/no/sock", "eth0")

    def test_dhcpcd_that_is_gone_or_another_interfaces_is_left_alone(self) -> None:
        self.assertIsNone(self.dhcpcd("eth1."))
        self.assertIsNone(self.dhcpcd(name="sshd\n"))
        self.assertIsNone(self.dhcpcd(name=""))

    def test_a_file_whose_name_is_none_is_one_line(self) -> None:
        with self.assertRaisesRegex(ProvisioningError, "^read /proc/6.2/comm: "):
            azure_provisioning.read_file("/proc/6\0002/comm")

    def test_dhcpcd_that_sends_no_name_is_not_asked(self) -> None:
        for configuration, sends in (
            ("# x\nhostname\n", True),
            ("\thostname # the host's\n", True),
            ("interface eth1\nclientid\ninterface eth0\nhostname\n", True),
            ("", False),
            ("#hostname\n", False),
            ("hostname fixed\n", False),
            ("option host_name\n", False),
            ("interface eth1\nhostname\n", False),
            ("ssid eth0\nhostname\n", False),
            ("profile eth0\nhostname\n", False),
        ):
            with self.subTest(configuration):
                if sends:
                    self.assertIsNotNone(self.dhcpcd(configuration=configuration))
                else:
                    with self.assertRaisesRegex(ProvisioningError, "dhcpcd sends no host name"):
                        self.dhcpcd(configuration=configuration)

    def test_an_interface_that_went_away_is_left_alone(self) -> None:
        self.assertIsNone(azure_provisioning.find_renewal("no-such-if0"))


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


class KeysTest(Case):
    """What Azure hands on as SSH keys becomes lines of authorized_keys; the rest is told and left out."""

    def check(self, text: str, *wanted: str, left_out: int = 0) -> None:
        self.forget()
        self.assertEqual(list(azure_provisioning.parse_keys(text)), list(wanted))
        self.assertEqual(len(self.lines), left_out, self.lines)
        self.assertTrue(all(line.startswith("not an SSH key, left out: ") for line in self.lines), self.lines)

    def test_every_kind_of_key_is_one(self) -> None:
        for one in KEYS:
            self.check(one, one)
            self.check(f"{one} alice@laptop (work)  2 \r\n", f"{one} alice@laptop (work)  2")

    def test_several_in_one_text_count_each(self) -> None:
        for end in ("\n", "\r\n", "\r", "\n\n", " \r\n \r\n"):
            self.check(end.join([RSA + " a", ED25519, RSA]) + end, RSA + " a", ED25519, RSA)

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
            'command="sh" ' + RSA,
            "ssh-rsa \u0661\u0662",
            "-----BEGIN OPENSSH PRIVATE KEY-----",
        ):
            with self.subTest(wrong[:70]):
                self.check(wrong, left_out=1)
                self.check(f"{ED25519} a\n{wrong}\n{RSA}\n", ED25519 + " a", RSA, left_out=1)

    def test_a_comment_holds_nothing_but_text(self) -> None:
        self.check(RSA + " a\0b\x1b[2J\tc", RSA + " a b [2J c")

    def test_much_of_nothing_takes_no_time(self) -> None:
        for text in (
            "ssh-rsa " + "A" * 1000000,
            "ssh-rsa A\n" * 10000,
            "ssh-rsa A\n" + "AAAA\n" * 20000,
            "x\n" * 10000,
        ):
            started = time.process_time()
            self.assertEqual(list(azure_provisioning.parse_keys(text)), [])
            self.assertLess(time.process_time() - started, 2)


class UserTest(Case):
    """The user that the VM was created with; the boots make real ones."""

    def setUp(self) -> None:
        super().setUp()
        self.directory = self.stack.enter_context(tempfile.TemporaryDirectory())
        self.users: Dict[str, int] = {"root": 0, "daemon": 1, "nobody": 65534}
        self.ran: List[str] = []
        self.written: Dict[str, Tuple[str, int]] = {}
        self.failing = self.settings = ""
        self.files: Dict[str, str] = {}
        self.as_user: List[Tuple[str, Any]] = []
        for name, replacement in {
            "run": self.run_command,
            "replace_file": self.write,
            "read_file": self.read,
            "administrators": lambda: {"sudo": ["bob"], "adm": ["bob"]},
            "as_user": lambda user, action: self.as_user.append((user.pw_name, action)),
            "unlock_user_database": lambda: self.ran.append("unlock"),
            "UNFINISHED": self.directory + "/unfinished",
            "SUDOERS": self.directory,
        }.items():
            self.stack.enter_context(mock.patch.object(azure_provisioning, name, replacement))
        self.stack.enter_context(mock.patch.object(pwd, "getpwnam", self.find))

    def find(self, name: str) -> pwd.struct_passwd:
        return pwd.struct_passwd((name, "x", self.users[name], 1000, "", f"/home/{name}", "/bin/sh"))

    def run_command(self, *command: str) -> str:
        self.ran.append(" ".join(command))
        if command[0] == "useradd":
            self.users[command[-1]] = 1000
        if self.failing and self.failing in self.ran[-1]:
            raise ProvisioningError(f"{self.failing}: exit status 1: no")
        if command[0] == "userdel":
            del self.users[command[-1]]
        return self.settings if command[-1] == "-T" else ""

    def read(self, path: str) -> str:
        if os.path.isfile(path) and path.startswith(self.directory):
            with open(path, encoding="utf-8") as file:
                return file.read()
        return self.files.get(path, "")

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        self.written[path] = text, mode
        if path.startswith(self.directory):
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)

    def user(self, *arguments: str, status: int = 0, keys: Sequence[str] = (RSA,), **more: Any) -> FakeAzure:
        more.setdefault("admin_username", "alice")
        azure = self.azure(public_keys=keys, **more)
        arguments = ("--imds", azure.listen(IMDS), "--timeout", "3", *arguments, "user")
        self.assertEqual(azure_provisioning.main(arguments), status, self.lines)
        return azure

    def test_a_user_that_does_not_exist_is_made_with_a_home_groups_and_keys(self) -> None:
        with mock.patch.object(grp, "getgrnam", side_effect=KeyError):
            self.user()
        shell = "/bin/bash" if os.path.exists("/bin/bash") else "/bin/sh"
        made = f"useradd --no-log-init --create-home --home-dir /home/alice --shell {shell} --groups adm,sudo -- alice"
        self.assertEqual(self.ran, ["unlock", made])
        self.assertEqual([name for name, _ in self.as_user], ["alice"])
        action = self.as_user[0][1]
        self.assertEqual((action.func, action.args), (azure_provisioning.add_keys, ("/home/alice", [RSA])))
        self.assertEqual(
            self.written[self.directory + "/90-azure-provisioning-alice"],
            ('"alice" ALL=(ALL:ALL) NOPASSWD:ALL\n', 0o440),
        )
        self.assertEqual(self.lines, ["made the user alice", "alice can log in, SSH keys: 1"])
        self.assertFalse(os.path.exists(self.directory + "/unfinished"))

    def test_a_group_that_has_its_name_is_left_alone(self) -> None:
        with mock.patch.object(grp, "getgrnam") as find:
            self.user()
        find.assert_called_once_with("alice")
        self.assertIn(" --no-user-group -- alice", self.ran[-1])

    def test_a_user_that_exists_is_kept_and_gets_what_it_lacks(self) -> None:
        self.users.update(alice=1001, bob=1002)
        self.user()
        self.assertEqual(self.ran, ["unlock", "usermod --append --groups adm,sudo -- alice"])
        self.ran.clear()
        self.user(admin_username="bob")
        self.assertEqual(self.ran, ["unlock"])
        self.assertEqual([name for name, _ in self.as_user], ["alice", "bob"])

    def test_no_user_or_no_key_is_nothing_to_do(self) -> None:
        for keys, name, line in (
            ([RSA], "", "the VM was created without a user: nothing to do"),
            ([], "alice", "the VM was created without a key for alice: nothing to do"),
            ([""], "alice", "the VM was created without a key for alice: nothing to do"),
        ):
            self.forget()
            self.user(keys=keys, admin_username=name)
            self.assertEqual(self.lines, [line])
        self.assertEqual((set(self.ran), self.as_user, self.written), ({"unlock"}, [], {}))

    def test_a_user_that_is_not_known_and_keys_that_are_none_are_errors(self) -> None:
        self.user(keys=["ssh-dss AAAA"], status=1)
        self.assertEqual(self.lines[-1], "user failed: nothing of what was given as SSH keys for alice is one")
        azure = self.azure(imds_versions=["2019-06-01"])
        self.assertEqual(azure_provisioning.main(["--imds", azure.listen(IMDS), "user"]), 1)
        self.assertRegex(self.lines[-1], "^user failed: 127.* is too old to tell the user$")

    def test_a_user_left_unfinished_is_undone_also_where_imds_does_not_answer(self) -> None:
        self.users["alice"] = 1000
        self.write(self.directory + "/unfinished", "alice\n")
        self.user(imds=[{"status": 500}] * 99, status=1)
        self.assertEqual(self.ran, ["unlock", "userdel --force alice"])

    def test_who_is_not_a_person_is_refused(self) -> None:
        for name in (
            *(
                "root",
                "daemon",
                "nobody",
                "-rf",
                "--help",
                "a b",
                "a:b",
                "a,b",
                "a\nb",
                "../x",
                ".",
                "..",
                "1000",
                "a/b",
            ),
            *("\u0430lice", "x" * 33, "a$", "%sudo", "#0", "*"),
        ):
            with self.subTest(name):
                self.forget()
                self.user(admin_username=name, status=1)
                self.assertRegex(self.lines[-1], "^user failed: .*(cannot be the name of a user|is not a person's)")
        self.assertEqual((self.as_user, self.written), ([], {}))
        self.assertEqual(set(self.ran), {"unlock"})

    def test_names_that_azure_allows_are_fine(self) -> None:
        for name in ("alice", "AzureUser", "john.doe", "a", "_x", "9lives", "a-b_c", "ALL", "x" * 32):
            self.user(admin_username=name)
        self.assertIn(self.directory + "/90-azure-provisioning-john_doe", self.written)
        sudoers = [text for path, (text, _) in self.written.items() if "90-azure-provisioning" in path]
        self.assertIn('"ALL" ALL=(ALL:ALL) NOPASSWD:ALL\n', sudoers)

    def test_a_dry_run_makes_nothing(self) -> None:
        self.user("-n", keys=[RSA, ED25519])
        self.assertEqual(self.lines, ["would make the user alice, SSH keys: 2"])
        self.users["alice"] = 1000
        self.user("-n")
        self.assertEqual(self.lines[1:], ["would keep the user alice, SSH keys: 1"])
        self.assertEqual((self.ran, self.as_user, self.written), ([], [], {}))

    def test_useradd_that_fails_is_an_error_and_is_undone_at_once(self) -> None:
        self.failing = "useradd"
        self.user(status=1)
        self.assertEqual([line.split()[0] for line in self.ran], ["unlock", "useradd", "unlock", "userdel"])
        self.assertEqual(self.lines[-1], "user failed: useradd: exit status 1: no")
        self.assertFalse(os.path.exists(self.directory + "/unfinished"))
        self.failing = "alice"
        self.user(status=1)
        self.assertEqual(self.lines[-1], "user failed: alice: exit status 1: no")
        self.assertTrue(os.path.exists(self.directory + "/unfinished"))

    def test_a_user_that_a_power_cut_left_unfinished_is_made_anew(self) -> None:
        home = self.directory + "/home"
        for text, there, removed in (
            (f"alice\n{home}", True, True),
            ("alice\n", True, False),
            (f"alice\n{home}", False, True),
        ):
            self.ran.clear()
            self.forget()
            os.makedirs(home, exist_ok=True)
            self.users = {"alice": 1000} if there else {}
            self.write(self.directory + "/unfinished", text)
            self.user()
            self.assertEqual(self.ran[: 1 + there], ["unlock", "userdel --force alice"][: 1 + there])
            self.assertTrue(self.ran[-1].startswith("useradd "))
            self.assertEqual(self.lines[0].startswith("removed the user alice,"), there)
            self.assertNotEqual(os.path.exists(home), removed)

    def test_a_home_that_is_gone_is_no_obstacle(self) -> None:
        self.write(self.directory + "/unfinished", f"alice\n{self.directory}/gone")
        self.user()
        self.assertEqual(self.lines[-1], "alice can log in, SSH keys: 1")

    def test_a_user_that_is_not_there_although_useradd_made_it_is_an_error(self) -> None:
        with mock.patch.object(azure_provisioning, "make_user"):
            self.user(status=1)
        self.assertEqual(self.lines[-1], "user failed: there is no user alice after useradd made it")

    def test_where_there_is_no_sudo_nothing_is_written_for_it(self) -> None:
        with mock.patch.object(azure_provisioning, "SUDOERS", self.directory + "/none"):
            self.user()
        self.assertEqual(list(self.written), [self.directory + "/unfinished"])

    def test_what_was_undone_is_not_undone_again(self) -> None:
        self.users = {"bob": 1001}
        self.write(self.directory + "/unfinished", "alice\n")
        self.user(admin_username="bob")
        self.users["alice"] = 1002  # made by hand
        self.user()
        self.assertNotIn("userdel --force alice", self.ran)

    def test_a_mark_that_cannot_be_removed_is_one_line(self) -> None:
        with mock.patch.object(os, "unlink", side_effect=OSError("read-only")):
            self.user(status=1)
        self.assertRegex(self.lines[-1], "^user failed: remove .*/unfinished: read-only$")

    def test_a_home_that_is_there_is_not_called_ours(self) -> None:
        with mock.patch.object(os.path, "lexists", return_value=True):
            self.user()
        self.assertEqual(self.written[self.directory + "/unfinished"], ("alice\n", 0o600))
        self.users.clear()
        with mock.patch.object(os.path, "lexists", return_value=False):
            self.user()
        self.assertEqual(self.written[self.directory + "/unfinished"], ("alice\n/home/alice", 0o600))

    NO_PASSWORDS = "PasswordAuthentication no\nKbdInteractiveAuthentication no\nChallengeResponseAuthentication no\n"

    @property
    def drop_in(self) -> str:
        return self.directory + "/drop.conf"

    def sshd(self, settings: str) -> None:
        """There is an sshd, which has settings."""
        self.stack.enter_context(mock.patch.object(azure_provisioning, "SSHD", self.directory + "/sshd"))
        self.write(self.directory + "/sshd", "")
        self.stack.enter_context(mock.patch.object(azure_provisioning, "SSHD_DROP_IN", self.drop_in))
        self.settings = settings

    def test_sshd_takes_no_passwords_where_the_vm_was_created_without(self) -> None:
        self.sshd("port 22\npasswordauthentication no\nkbdinteractiveauthentication no\n")
        for raw in ("false", "", False):
            self.user(disable_password_authentication=raw)
        self.assertNotIn(self.drop_in, self.written)
        for raw in ("true", True):
            self.ran.clear()
            self.user(disable_password_authentication=raw)
            self.assertEqual(self.written.pop(self.drop_in), (self.NO_PASSWORDS, 0o600))
            reload = "systemctl try-reload-or-restart [s]sh.service [s]shd.service"
            self.assertEqual(self.ran[-2:], [reload, self.directory + "/sshd -T"])

    def test_an_sshd_that_was_not_reloaded_is_reloaded_the_next_time(self) -> None:
        self.sshd("passwordauthentication no\n")
        self.failing = "systemctl"
        self.user(disable_password_authentication="true", status=1)
        self.failing = ""
        self.ran.clear()
        self.user(disable_password_authentication="true")
        self.assertIn("systemctl try-reload-or-restart", " ".join(self.ran))

    def test_an_sshd_without_drop_ins_has_to_be_told_by_the_image(self) -> None:
        self.sshd("passwordauthentication no\n")
        with mock.patch.object(azure_provisioning, "SSHD_DROP_IN", "/no/such/drop.conf"):
            self.user(disable_password_authentication="true")
            self.assertNotIn("/no/such/drop.conf", self.written)
            self.settings = "passwordauthentication yes\n"
            self.user(disable_password_authentication="true", status=1)

    def test_sshd_that_takes_passwords_all_the_same_is_an_error(self) -> None:
        for one in ("passwordauthentication", "kbdinteractiveauthentication", "challengeresponseauthentication"):
            self.sshd(f"port 22\n{one} yes\n")
            self.user(disable_password_authentication="true", status=1)
            self.assertRegex(self.lines[-1], f"^user failed: sshd has {one} yes, whatever {self.drop_in} says: ")

    def test_no_sshd_and_one_that_cannot_tell_yet_are_no_errors(self) -> None:
        self.stack.enter_context(mock.patch.object(azure_provisioning, "SSHD", "/no/sshd"))
        self.user(disable_password_authentication="true")
        self.assertNotIn(self.drop_in, self.written)
        self.sshd("")
        self.failing = "sshd -T"
        self.user(disable_password_authentication="true")
        self.assertIn(self.drop_in, self.written)
        self.assertEqual(self.levels[-2:], [azure_provisioning.INFO] * 2)

    def test_imds_is_asked_once_for_name_and_user_and_ready_comes_last(self) -> None:
        azure = self.azure(public_keys=[RSA], admin_username="alice")
        order: List[str] = []
        azure.observer = lambda request: order.append(request["method"] + request["path"].partition("?")[0])
        set_name = mock.patch.object(azure_provisioning, "set_host_name", lambda name: order.append(name))

        def make(name: str, _: object) -> None:
            self.users[name] = 1000
            order.append(name)

        made = mock.patch.object(azure_provisioning, "make_user", make)
        with set_name, made, mock.patch.object(azure_provisioning, "publish_host_name"):
            addresses = ("--imds", azure.listen(IMDS), "--wireserver", azure.listen(WIRESERVER))
            self.assertEqual(azure_provisioning.main([*addresses, "ready", "user", "hostname"]), 0, self.lines)
        self.assertEqual(order, ["GET/metadata/instance", "web-01", "alice", "GET/machine", "POST/machine"])

    def test_ready_is_reported_although_the_user_could_not_be_made(self) -> None:
        self.failing = "useradd"
        azure = self.azure(public_keys=[RSA], admin_username="alice")
        addresses = ("--imds", azure.listen(IMDS), "--wireserver", azure.listen(WIRESERVER))
        self.assertEqual(azure_provisioning.main([*addresses, "user", "ready"]), 1)
        self.assertEqual(len(azure.accepted), 1)


class HomeTest(unittest.TestCase):
    """What is done in a home directory is done as its owner."""

    def setUp(self) -> None:
        self.home = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.home)
        self.path = self.home + "/.ssh/authorized_keys"

    def add(self, *keys: str) -> str:
        azure_provisioning.add_keys(self.home, keys)
        self.assertEqual(os.stat(self.home + "/.ssh").st_mode & 0o7777, 0o700)
        self.assertEqual(os.stat(self.path).st_mode & 0o7777, 0o600)
        with open(self.path, encoding="utf-8") as file:
            return file.read()

    def test_keys_are_added_to_those_that_are_there(self) -> None:
        self.assertEqual(self.add(RSA + " a", ED25519), f"{RSA} a\n{ED25519}\n")
        before = os.stat(self.path)
        self.assertEqual(self.add(ED25519 + " again", RSA), f"{RSA} a\n{ED25519}\n")
        self.assertEqual(os.stat(self.path).st_ino, before.st_ino)
        with open(self.path, "w", encoding="utf-8") as file:
            file.write(f'# {RSA}\nfrom="10.0.0.0/8" {ED25519} b')
        os.chmod(self.path, 0o666)
        os.chmod(self.home + "/.ssh", 0o777)
        self.assertEqual(self.add(RSA, ED25519), f'# {RSA}\nfrom="10.0.0.0/8" {ED25519} b\n{RSA}\n')

    def test_a_file_that_has_the_keys_is_closed_to_others_all_the_same(self) -> None:
        self.add(RSA)
        os.chmod(self.path, 0o666)
        self.add(RSA)

    def test_the_directory_gets_its_label(self) -> None:
        with mock.patch.object(azure_provisioning, "restore_label") as restore:
            self.add(RSA)
        self.assertEqual(restore.call_args, mock.call(self.home + "/.ssh"))

    def test_the_administrators_groups_are_those_that_there_are(self) -> None:
        groups = [grp.struct_group((name, "x", 1, ["bob"])) for name in ("root", "wheel", "users")]
        with mock.patch.object(grp, "getgrall", return_value=groups):
            self.assertEqual(azure_provisioning.administrators(), {"wheel": ["bob"]})

    def test_a_fifo_is_an_error_at_once(self) -> None:
        os.mkdir(self.home + "/.ssh")
        os.mkfifo(self.path)
        with self.assertRaisesRegex(ProvisioningError, "not a regular file"):
            azure_provisioning.add_keys(self.home, [RSA])

    def as_nobody(self, action: Any) -> List[str]:
        """Have action run by as_user(), and return what that took on, in its order."""
        log, parent = self.home + "/log", os.getpid()

        def note(*what: object) -> None:
            with open(log, "a", encoding="utf-8") as file:
                file.write(" ".join(map(str, what)) + "\n")

        user = pwd.struct_passwd(("alice", "x", 1000, 1001, "", self.home, "/bin/sh"))
        with ExitStack() as stack:
            for name in ("initgroups", "setgid", "setuid"):
                stack.enter_context(mock.patch.object(os, name, functools.partial(note, name)))

            def acted() -> None:
                note("acted", os.getpid() != parent)
                action()

            azure_provisioning.as_user(user, acted)
        with open(log, encoding="utf-8") as file:
            return file.read().splitlines()

    def test_another_process_takes_on_the_users_rights_first(self) -> None:
        self.assertEqual(
            self.as_nobody(lambda: None), ["initgroups alice 1001", "setgid 1001", "setuid 1000", "acted True"]
        )

    def test_what_it_could_not_do_is_told(self) -> None:

        def fail() -> None:
            raise ProvisioningError("write /home/alice/.ssh: no")

        with self.assertRaisesRegex(ProvisioningError, "^as alice: write /home/alice/.ssh: no$"):
            self.as_nobody(fail)
        with self.assertRaisesRegex(ProvisioningError, "^as alice: .*not permitted"):
            self.as_nobody(mock.Mock(side_effect=PermissionError("not permitted")))
        with self.assertRaisesRegex(ProvisioningError, "^as alice: it did not end well$"):
            self.as_nobody(lambda: os.kill(os.getpid(), 9))

    def test_it_is_not_waited_for_without_end(self) -> None:
        ended = self.assertRaisesRegex(ProvisioningError, "it did not end well")
        with mock.patch.object(azure_provisioning, "COMMAND_LIMIT", 1), ended:
            self.as_nobody(lambda: time.sleep(60))

    def test_no_other_process_is_an_error(self) -> None:
        refused = self.assertRaisesRegex(ProvisioningError, "^become alice: .*Resource temporarily unavailable")
        with mock.patch.object(
            os, "fork", side_effect=BlockingIOError(11, "Resource temporarily unavailable")
        ), refused:
            azure_provisioning.as_user(mock.Mock(pw_name="alice"), mock.Mock())

    def test_it_is_not_waited_for_when_the_user_stops_it(self) -> None:
        ended = self.assertRaisesRegex(ProvisioningError, "^as alice: it did not end$")
        with mock.patch.object(azure_provisioning, "COMMAND_LIMIT", 1), ended:
            self.as_nobody(lambda: os.kill(os.getpid(), signal.SIGSTOP))


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
        for name in (
            "passwd.lock",
            "shadow.lock",
            "group.lock",
            "gshadow.lock",
            "subuid.lock",
            "subgid.lock",
            "passwd",
        ):
            open(f"{self.etc}/{name}", "w").close()

    def test_locks_that_are_nobodys_are_removed(self) -> None:
        azure_provisioning.unlock_user_database()
        self.assertEqual(sorted(os.listdir(self.etc)), [".pwd.lock", "passwd"])
        azure_provisioning.unlock_user_database()
        self.log.assert_not_called()

    def test_locks_of_a_useradd_that_runs_are_left_alone(self) -> None:
        with mock.patch.object(fcntl, "lockf", side_effect=BlockingIOError("busy")):
            azure_provisioning.unlock_user_database()
        self.assertEqual(len(os.listdir(self.etc)), 8)
        self.assertEqual(self.log.call_count, 1)


class MainTest(Case):
    """The command line, and the order of the steps."""

    def test_the_steps_always_run_in_their_order(self) -> None:
        for arguments in (["ready", "hostname"], ["hostname", "ready"], ["-v"]):
            steps = mock.Mock()
            known = {name: getattr(steps, name) for name in azure_provisioning.STEPS}
            with mock.patch.object(azure_provisioning, "STEPS", known):
                self.assertEqual(azure_provisioning.main(arguments), 0)
            self.assertEqual([name for name, _, _ in steps.mock_calls], ["hostname", "ready"])

    def test_ready_is_reported_although_imds_never_answers_and_no_later_than_its_timeout(self) -> None:
        azure = self.azure(imds=[{"status": 500}] * 1000)
        before = self.clock.monotonic()
        self.assertEqual(self.ready(azure, "--imds", azure.listen(IMDS)), 1)
        self.assertLess(self.clock.monotonic() - before, 121)
        self.assertEqual(len(azure.accepted), 1)
        self.assertEqual([line[:15] for line in self.lines if "failed" in line], ["hostname failed"])

    def test_a_dry_run_changes_nothing_and_prints_what_it_would_do(self) -> None:
        azure = self.azure()
        self.assertEqual(self.ready(azure, "--dry-run", "--imds", azure.listen(IMDS)), 0)
        self.assertEqual(azure.reports, [])
        self.assertNotIn("POST", "".join(azure.asked(WIRESERVER)))
        self.assertTrue(any("web-01" in line for line in self.lines), self.lines)
        self.assertTrue(any("<State>Ready</State>" in line for line in self.lines), self.lines)

    def test_a_dry_run_of_a_failure_reports_nothing_either(self) -> None:
        azure = self.azure()
        self.assertEqual(self.ready(azure, "-n", "--fail", "no disk"), 0)
        self.assertEqual(azure.reports, [])
        self.assertTrue(any("<Description>no disk</Description>" in line for line in self.lines), self.lines)

    def test_wrong_usage_ends_with_status_2(self) -> None:
        for arguments in (
            ["reboot"],
            ["--timeout", "0"],
            ["--timeout", "nan"],
            ["--timeout", "inf"],
            ["--timeout", "soon"],
            ["--wireserver", ""],
            ["--wireserver", "host:0"],
            ["--wireserver", "host:65536"],
            ["--wireserver", "http://host/"],
            ["--imds", "host\r\nX-Evil: yes"],
            ["--imds", "h\u00f6st"],
            ["--imds", "[::1]"],
            ["--fail", "reason", "ready"],
            ["--fail"],
            ["--frob"],
        ):
            with self.subTest(arguments), mock.patch("sys.stderr"), self.assertRaises(SystemExit) as caught:
                azure_provisioning.main(arguments)
            self.assertEqual(caught.exception.code, 2)

    def test_addresses_may_be_names(self) -> None:
        for text in ("localhost", "localhost:8016", "127.0.0.1", "web-01.example.com:1"):
            self.assertEqual(azure_provisioning.parse_arguments(["--imds", text]).imds, text)

    def test_a_name_that_cannot_be_looked_up_is_one_line(self) -> None:
        self.assertEqual(azure_provisioning.main(["--wireserver", "a..b", "--timeout", "0.2", "ready"]), 1)
        self.assertEqual(len(self.lines), 1)
        self.assertIn("a..b", self.lines[0])


if __name__ == "__main__":
    unittest.main()
