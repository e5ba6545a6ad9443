"""The module against the pretend Azure on loopback. Nobody waits: pauses are taken from an injected clock.

What changes a machine is not called here but in test_sandbox.py.
"""

import email.utils
import gc
import http.client
import os
import signal
import socket
import ssl
import time
import tracemalloc
import unittest
from contextlib import ExitStack
from typing import Any, Dict, List, Optional, Tuple
from unittest import mock
from xml.etree import ElementTree

import azure_provisioning
from azure_provisioning import ProvisioningError
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
        stack.enter_context(mock.patch.object(azure_provisioning, "ATTEMPT_LIMIT", 0.3))
        for function in ("run", "replace_file", "set_host_name"):  # this is not a VM
            stack.enter_context(mock.patch.object(azure_provisioning, function, self.untouchable))
        self.stack = stack

    def log(self, level: int, line: str) -> None:
        self.levels.append(level)
        self.lines.append(line)

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

    def host_name(self, azure: FakeAzure, budget: float = 120) -> str:
        return azure_provisioning.keep_trying(azure.listen(IMDS), azure_provisioning.fetch_host_name, budget)


# What can go wrong with one exchange, whoever the service is.
TROUBLE: Dict[str, Dict[str, Any]] = {
    "silence": {"do": "silent"},
    "a reset": {"do": "reset"},
    "a connection closed at once": {"do": "close"},
    "an answer that comes byte by byte": {"do": "drip"},
    "a truncated answer": {"do": "cut"},
    "a body without end": {"do": "endless_body"},
    "headers without end": {"do": "endless_header"},
    "interim answers without end": {"do": "endless_continue"},
    "a body that is too long": {"body": "x", "repeat": azure_provisioning.ANSWER_LIMIT},
    "a body that is far too long": {"body": "x", "repeat": 40 * azure_provisioning.ANSWER_LIMIT},
    "no UTF-8": {"body": "\udcff\udcfe<"},
    "a chunk that is none": {"headers": {"Transfer-Encoding": "chunked"}, "body": "frog\r\n"},
    "a length that is none": {"headers": {"Content-Length": "-17"}, "body": "short"},
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
        warning = self.lines[self.levels.index(azure_provisioning.WARNING)]
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
            "no incarnation": {"body": GOAL_STATE.replace("{incarnation}", "")},
            "no container": {"body": GOAL_STATE.replace("{container_id}", " \n")},
            "no instance": {"body": GOAL_STATE.replace("RoleInstance>", "Role>")},
        }
        for name, entry in self.trouble(wrong):
            with self.subTest(name):
                self.forget()
                azure = self.azure([entry])
                self.assertEqual(self.ready(azure, "ready"), 0)
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
        for name, entry in self.trouble({"a name like a novel": {"body": "x" * 256}}):
            with self.subTest(name):
                self.forget()
                self.assertEqual(self.host_name(self.azure(imds=[entry])), "web-01")
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
        azure = self.azure([{"body": "<!DOCTYPE GoalState [<!ENTITY i '3'>]>" + goal_state}])
        self.assertEqual(self.ready(azure, "ready"), 0)
        self.assertIn("has a DOCTYPE: refused; trying again", self.lines[self.levels.index(azure_provisioning.WARNING)])

    def test_ready_is_reported_again_when_the_container_moved(self) -> None:
        azure = self.azure([{"do": "right"}, {"do": "moved"}])
        self.assertEqual(self.ready(azure, "ready"), 0)
        self.assertEqual([report["incarnation"] for report in azure.reports], ["4"])
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

    def test_it_gives_up_when_the_budget_is_spent_and_says_so_in_one_line(self) -> None:
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

    def test_the_timeout_sets_the_budget_of_each_service(self) -> None:
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
                self.assertLess(time.monotonic() - before, 0.3 + 0.5)

    def test_the_limit_is_ten_seconds(self) -> None:
        self.stack.close()
        self.assertEqual(azure_provisioning.ATTEMPT_LIMIT, 10)
        self.assertEqual((azure_provisioning.IMDS_BUDGET, azure_provisioning.WIRESERVER_BUDGET), (120, 1200))

    def test_no_more_than_a_mebibyte_of_an_answer_is_held(self) -> None:
        azure = self.azure([{"body": "x", "repeat": 1 << 26}])
        address = azure.listen(WIRESERVER)
        connection = azure_provisioning.Connection(address, timeout=5)
        self.addCleanup(connection.close)
        with mock.patch.object(http.client.HTTPResponse, "read", autospec=True) as read:
            read.return_value = b"x" * (1 << 20)
            with self.assertRaises(ProvisioningError):
                azure_provisioning.request(connection, "GET", "/machine?comp=goalstate", {})
            read.assert_called_once_with(mock.ANY, 1 << 20)

    def test_an_alarm_that_was_set_before_is_kept(self) -> None:
        self.addCleanup(signal.signal, signal.SIGALRM, signal.getsignal(signal.SIGALRM))
        handler = mock.Mock()
        signal.signal(signal.SIGALRM, handler)
        self.ready(self.azure(), "ready")
        self.assertIs(signal.getsignal(signal.SIGALRM), handler)
        self.assertEqual(signal.getitimer(signal.ITIMER_REAL), (0.0, 0.0))


class TransportTest(Case):
    """What goes over the wire."""

    def test_goal_state_and_report_share_a_connection(self) -> None:
        azure = self.azure()
        with mock.patch.object(socket, "create_connection", wraps=socket.create_connection) as connect:
            self.ready(azure, "ready")
        self.assertEqual(connect.call_count, 1)

    def test_a_server_that_ends_the_connection_after_each_answer_is_fine(self) -> None:
        goal_state = GOAL_STATE.format(
            incarnation=3, container_id=FakeAzure().container_id, instance_id=FakeAzure().instance_id
        )
        azure = self.azure([{"body": goal_state, "headers": {"Connection": "close"}}])
        self.assertEqual(self.ready(azure, "ready"), 0)
        self.assertEqual(self.clock.pauses, [])
        self.assertEqual(len(azure.accepted), 1)

    def test_an_answer_in_chunks_is_fine(self) -> None:
        chunks = "3\r\nweb\r\n3;x=y\r\n-02\r\n0\r\n\r\n"
        azure = self.azure(imds=[{"body": chunks, "headers": {"Transfer-Encoding": "chunked"}}])
        self.assertEqual(self.host_name(azure), "web-02")

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
            self.lines[self.levels.index(azure_provisioning.WARNING)],
            r"(?s)^GET http://127\.0\.0\.1:\d+/machine\?comp=goalstate: "
            r"status 400 <Error>no\nversion</Error>; trying again in 0\.\d s$",
        )

    def test_the_module_leaves_its_importer_alone(self) -> None:
        self.assertTrue(gc.isenabled())
        self.assertTrue(hasattr(ssl, "SSLContext"))
        self.assertIn("19", email.utils.formatdate(0))


IDENTIFIERS = {"Incarnation": "7", "ContainerId": "c", "InstanceId": "i"}


class HealthReportTest(Case):
    """What the platform is told."""

    def test_the_report_names_the_incarnation_just_fetched(self) -> None:
        azure = self.azure()
        azure.incarnation = 42
        self.ready(azure, "ready")
        self.assertEqual(azure.accepted[0]["incarnation"], "42")

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

    def test_a_reason_is_cut_at_512_characters_before_it_is_escaped(self) -> None:
        azure = self.azure()
        self.assertEqual(self.ready(azure, "--fail", "&" * 600), 0)
        self.assertEqual(azure.accepted[0]["description"], "&" * 512)

    def test_a_reason_may_hold_anything(self) -> None:
        azure = self.azure()
        self.assertEqual(self.ready(azure, "--fail", "a\x00b\x1b[1mc\ud800d\udcffe\ufffff \U0001f525\tg\u00fc"), 0)
        self.assertEqual(azure.accepted[0]["description"], "a?b?[1mc?d?e?f \U0001f525\tg\u00fc")


class FetchHostNameTest(Case):
    """IMDS is asked for the computer name, and for the resource's name where there is none."""

    NAME = "GET /metadata/instance/compute/name?api-version=2019-06-01&format=text"

    def test_the_computer_name_is_all_that_is_asked_for(self) -> None:
        azure = self.azure()
        self.assertEqual(self.host_name(azure), "web-01")
        self.assertEqual(
            azure.asked(IMDS),
            ["GET /metadata/instance/compute/osProfile/computerName?api-version=2021-02-01&format=text"],
        )

    def test_the_resource_name_stands_in_for_a_missing_unknown_or_empty_computer_name(self) -> None:
        old = ["2017-04-02", "2019-06-01"]
        for situation in (
            {"computer_name": None},
            {"computer_name": ""},
            {"computer_name": " \n"},
            {"imds_versions": old},
        ):
            with self.subTest(situation):
                azure = self.azure(**situation)
                self.assertEqual(self.host_name(azure), "web_01")
                self.assertEqual(azure.asked(IMDS)[1:], [self.NAME])
                self.assertEqual(self.clock.pauses, [])

    def test_imds_that_does_not_know_the_vm_yet_is_asked_again_for_both(self) -> None:
        azure = self.azure(imds=[{"status": 404}] * 6)
        self.assertEqual(self.host_name(azure), "web-01")
        self.assertEqual(len(azure.requests), 7)

    def test_imds_that_gives_no_name_at_all_is_an_error(self) -> None:
        with self.assertRaisesRegex(ProvisioningError, "a name of 0 characters; gave up after 2 s"):
            self.host_name(self.azure(name="", computer_name=""), budget=2)


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
            "a" * 65: "a" * 64,
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
        import random

        choose = random.Random(1)
        for _ in range(2000):
            raw = "".join(choose.choice("aZ0-._\u00e9 ") for _ in range(choose.randrange(80)))
            name = azure_provisioning.valid_host_name(raw)
            self.assertRegex(
                name, r"\A([A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*)?\Z"
            )
            self.assertLessEqual(len(name), 64)
            self.assertEqual(azure_provisioning.valid_host_name(name), name)


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
        self.address = "10.0.0.4"
        self.written = 1
        self.ran: List[str] = []
        self.outcome: Optional[ProvisioningError] = None
        self.renewal: Tuple[Tuple[str, ...], str] = (("renew", "eth7"), "/lease")
        for name, replacement in {
            "default_interface": lambda: self.interface,
            "source_address": lambda: self.address,
            "find_renewal": lambda interface: self.renewal if interface else ((), ""),
            "modified": lambda path: self.written,
            "run": self.run_command,
        }.items():
            self.stack.enter_context(mock.patch.object(azure_provisioning, name, replacement))

    def run_command(self, *command: str) -> None:
        self.ran.append(" ".join(command))
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

    def publish(self, level: int, pattern: str) -> None:
        before = self.clock.monotonic()
        azure_provisioning.publish_host_name("web-01")
        self.assertLess(self.clock.monotonic() - before, azure_provisioning.COMMAND_LIMIT + 1)
        self.assertEqual(self.levels, [level], self.lines)
        self.assertRegex(self.lines[0], pattern)

    def test_it_waits_for_the_new_lease(self) -> None:
        self.publish(azure_provisioning.INFO, r"^published web-01 by renew eth7, after \d\.\d s$")
        self.assertEqual(len(self.clock.pauses), 3)

    def test_it_waits_for_the_default_route(self) -> None:
        self.renewal = ("renew", "eth7"), ""
        self.at_pause(1, interface="")
        self.at_pause(5, interface="eth7")
        with mock.patch.object(self, "renewed", lambda: setattr(self, "interface", "")):
            self.publish(azure_provisioning.INFO, "^published web-01 by ")
        self.assertEqual(len(self.clock.pauses), 5)

    def test_it_waits_for_the_address(self) -> None:
        self.renewal = ("renew", "eth7"), ""
        self.at_pause(5, address="10.0.0.4")
        with mock.patch.object(self, "renewed", lambda: setattr(self, "address", "")):
            self.publish(azure_provisioning.INFO, "^published web-01 by ")
        self.assertEqual(len(self.clock.pauses), 5)

    def test_a_network_that_stays_away_is_an_error_that_says_what_was_run(self) -> None:
        self.at_pause(1, interface="")
        self.publish(azure_provisioning.ERROR, "^eth7 has no address or no default route since renew eth7; ")
        self.assertGreater(sum(self.clock.pauses), 14)

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
        self.renewal = (), ""
        self.publish(azure_provisioning.WARNING, "^found no DHCP lease to renew on eth7; ")
        self.forget()
        self.interface = ""
        self.publish(azure_provisioning.WARNING, "^found no DHCP lease to renew on a default route; ")
        self.assertEqual(self.ran, [])

    def test_a_dry_run_says_what_would_be_run(self) -> None:
        azure_provisioning.publish_host_name("web-01", dry_run=True)
        self.assertEqual((self.lines, self.ran), (["would run renew eth7"], []))


class NetworkTest(unittest.TestCase):
    """What the module reads of the network, and whose the lease is."""

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
        half = "tun0\t00000000\t00000000\t0001\t0\t0\t0\t00000080\t0\t0\t0\n"  # 0.0.0.0/1 is not the default
        self.assertEqual(self.default(half, first), "a1")

    def test_this_machine_can_be_asked(self) -> None:
        azure_provisioning.default_interface()
        azure_provisioning.source_address()

    def find(self, *files: str, texts: Optional[Dict[str, str]] = None) -> Any:
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(socket, "if_nametoindex", return_value=2))
            stack.enter_context(mock.patch.object(os.path, "exists", lambda path: path in files))
            stack.enter_context(
                mock.patch.object(os, "listdir", return_value=[os.path.basename(file) for file in files])
            )
            stack.enter_context(
                mock.patch.object(azure_provisioning, "read_file", lambda path: (texts or {}).get(path, ""))
            )
            return azure_provisioning.find_renewal("eth0")

    def test_the_client_that_holds_the_lease_is_asked(self) -> None:
        lease = "/run/systemd/netif/leases/2"
        self.assertEqual(self.find(lease), (("networkctl", "reconfigure", "eth0"), lease))
        device = {"/run/NetworkManager/devices/2": "[device]\nmanaged=true\nconnection-uuid=1-2\nnm-owned=false\n"}
        self.assertEqual(
            self.find("/var/lib/NetworkManager/internal-1-2-eth0.lease", texts=device),
            (("nmcli", "--wait", "15", "device", "connect", "eth0"), ""),
        )
        self.assertEqual(
            self.find("/run/network/ifstate.eth0", "/run/dhclient.eth0.pid"),
            (("systemctl", "restart", "networking.service"), ""),
        )

    def test_who_has_no_lease_is_left_alone(self) -> None:
        nothing = ((), "")
        self.assertEqual(self.find(), nothing)
        self.assertEqual(self.find("/run/systemd/netif/leases/3"), nothing)
        device = {"/run/NetworkManager/devices/2": "[device]\nmanaged=true\nconnection-uuid=1-2\n"}
        self.assertEqual(self.find("/var/lib/NetworkManager/internal-1-2-eth1.lease", texts=device), nothing)
        self.assertEqual(self.find("/run/dhclient.eth0.pid"), nothing)
        self.assertEqual(self.find("/run/network/ifstate.eth0"), nothing)

    def test_an_interface_that_went_away_is_left_alone(self) -> None:
        self.assertEqual(azure_provisioning.find_renewal("no-such-if0"), ((), ""))


class MainTest(Case):
    """The command line, and the order of the steps."""

    def test_the_steps_always_run_in_their_order(self) -> None:
        for arguments in (["ready", "hostname"], ["hostname", "ready"], ["-v"]):
            steps = mock.Mock()
            known = {name: getattr(steps, name) for name in azure_provisioning.STEPS}
            with mock.patch.object(azure_provisioning, "STEPS", known):
                self.assertEqual(azure_provisioning.main(arguments), 0)
            self.assertEqual(steps.mock_calls, [mock.call.hostname(mock.ANY), mock.call.ready(mock.ANY)])

    def test_ready_is_reported_although_imds_never_answers_and_no_later_than_its_budget(self) -> None:
        azure = self.azure(imds=[{"status": 500}] * 1000)
        before = self.clock.monotonic()
        self.assertEqual(self.ready(azure, "--imds", azure.listen(IMDS)), 1)
        self.assertLess(self.clock.monotonic() - before, 121)
        self.assertEqual(len(azure.accepted), 1)
        self.assertEqual([line[:15] for line in self.lines if "failed" in line], ["hostname failed"])

    def test_ready_is_reported_at_once_although_nothing_of_the_name_is_left(self) -> None:
        azure = self.azure(computer_name="___")
        self.assertEqual(self.ready(azure, "--imds", azure.listen(IMDS)), 1)
        self.assertEqual(len(azure.accepted), 1)
        self.assertEqual(self.clock.pauses, [])
        self.assertIn("hostname failed: nothing of '___' can be a host name", self.lines)

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
            ["--fail", "reason", "ready"],
            ["--fail"],
            ["--frob"],
        ):
            with self.subTest(arguments), mock.patch("sys.stderr"), self.assertRaises(SystemExit) as caught:
                azure_provisioning.main(arguments)
            self.assertEqual(caught.exception.code, 2)

    def test_addresses_may_be_names_and_ipv6(self) -> None:
        for text in ("localhost", "localhost:8016", "127.0.0.1", "[::1]", "[::1]:80", "web-01.example.com:1"):
            self.assertEqual(azure_provisioning.parse_arguments(["--imds", text]).imds, text)

    def test_a_name_that_cannot_be_looked_up_is_one_line(self) -> None:
        self.assertEqual(azure_provisioning.main(["--wireserver", "a..b", "--timeout", "0.2", "ready"]), 1)
        self.assertEqual(len(self.lines), 1)
        self.assertIn("a..b", self.lines[0])


class PeakMemoryTest(Case):
    """A hostile answer does not make the module big."""

    def test_an_endless_answer_costs_a_few_mebibytes_at_most(self) -> None:
        for entry in ({"do": "endless_body"}, {"do": "endless_header"}):
            azure = self.azure()
            address = azure.listen(WIRESERVER)
            azure.script[WIRESERVER] = [entry]
            connection = azure_provisioning.Connection(address, timeout=5)
            pid = os.fork()
            if pid == 0:  # its own memory, without the server's
                status = 1
                try:
                    tracemalloc.start()
                    try:
                        azure_provisioning.request(connection, "GET", "/", {})
                    except ProvisioningError:
                        status = 0 if tracemalloc.get_traced_memory()[1] < 8 << 20 else 2
                finally:
                    os._exit(status)
            self.assertEqual(os.waitpid(pid, 0)[1], 0)


if __name__ == "__main__":
    unittest.main()
