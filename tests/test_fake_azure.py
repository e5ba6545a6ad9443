"""The pretend Azure is as strict as Azure, and as unreliable as its script says."""

import functools
import http.client
import json
import select
import signal
import socket
import subprocess
import sys
import unittest
from typing import Any, Dict, List, Optional, Sequence, Tuple
from urllib.parse import urlsplit
from xml.etree import ElementTree

from tests import sandbox
from tests.fake_azure import HOST_PLUGIN, IMDS, MAC_ADDRESS, VM_ID, WIRESERVER, FakeAzure

VERSION = {"x-ms-version": "2012-11-30"}
AGENT = dict(VERSION, **{"x-ms-agent-name": "test", "Content-Type": "text/xml;charset=utf-8"})
METADATA = {"Metadata": "true"}
GOAL_STATE = "/machine?comp=goalstate"
DOCUMENT = "/metadata/instance?api-version=2021-08-01&extended=true"

READY = "<Health><State>Ready</State></Health>"
FAILED = (
    "<Health><State>NotReady</State><Details><SubStatus>ProvisioningFailed</SubStatus>"
    "<Description>{}</Description></Details></Health>"
)
REPORT = (
    "<Health><GoalStateIncarnation>{incarnation}</GoalStateIncarnation><Container><ContainerId>{container_id}"
    "</ContainerId><RoleInstanceList><Role><InstanceId>{instance_id}</InstanceId>{health}</Role></RoleInstanceList>"
    "</Container></Health>"
)

Answer = Tuple[int, Dict[str, str], str]


def ask(address: str, method: str, path: str, headers: Dict[str, str], body: Optional[str] = None) -> Answer:
    """Return status, headers and body of what address answers."""
    connection = http.client.HTTPConnection(address, timeout=10)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        answer = response.read().decode("utf-8-sig")
        return response.status, {name.lower(): value for name, value in response.getheaders()}, answer
    finally:
        connection.close()


class Case(unittest.TestCase):
    """Asks a pretend Azure."""

    def start(self, service: str, **more: Any) -> str:
        self.azure = FakeAzure(**more)
        self.addCleanup(self.azure.stop)
        return self.azure.listen(service)


class WireServerTest(Case):
    """Goal state and health report."""

    def report(self, address: str, health: str = READY, headers: Optional[Dict[str, str]] = None, **wrong: str) -> int:
        """Report the goal state's own identifiers, but for those that are wrong, and return the status."""
        goal_state = ElementTree.fromstring(ask(address, "GET", GOAL_STATE, VERSION)[2])
        identifiers = {
            "incarnation": goal_state.findtext("Incarnation"),
            "container_id": goal_state.findtext("Container/ContainerId"),
            "instance_id": goal_state.findtext("Container/RoleInstanceList/RoleInstance/InstanceId"),
        }
        body = REPORT.format(**dict(identifiers, health=health, **wrong))
        return ask(address, "POST", "/machine?comp=health", headers or AGENT, body)[0]

    def test_a_report_with_the_identifiers_to_the_letter_is_accepted(self) -> None:
        address = self.start(WIRESERVER)
        self.assertEqual(self.report(address), 200)
        (report,) = self.azure.accepted
        self.assertEqual(
            [report[name] for name in ("incarnation", "container_id", "instance_id", "state")],
            ["3", self.azure.container_id, VM_ID + "._web_01", "Ready"],
        )

    def test_a_report_for_what_is_gone_is_refused_and_kept(self) -> None:
        wrongs: Sequence[Dict[str, Any]] = (
            {"incarnation": "2"},
            {"incarnation": " 3 "},
            {"container_id": "another"},
            {"container_id": "\n" + FakeAzure().container_id},
            {"instance_id": "another"},
        )
        for wrong in wrongs:
            with self.subTest(wrong):
                address = self.start(WIRESERVER)
                self.assertEqual(self.report(address, **wrong), 410)
                self.assertEqual([report["accepted"] for report in self.azure.reports], [False])
                self.assertEqual(self.azure.accepted, [])

    def test_a_failure_may_be_told_in_4096_characters(self) -> None:
        address = self.start(WIRESERVER)
        self.assertEqual(self.report(address, FAILED.format("&amp;" * 4096)), 200)
        self.assertEqual(self.azure.accepted[0]["description"], "&" * 4096)
        self.assertEqual(self.report(address, FAILED.format("x" * 4097)), 500)
        self.assertEqual([report["accepted"] for report in self.azure.reports], [True, False])

    def test_a_report_is_to_be_well_formed_and_in_order(self) -> None:
        right = REPORT.format(incarnation=3, container_id="c", instance_id="i", health="{}")
        for body in (
            "",
            "<Health>",
            right.format(READY).replace("<Health>", "<Wealth>", 1)[: -len("</Health>")] + "</Wealth>",
            right.format(READY).replace("Role>", "RoleInstance>"),
            right.format("<Health><State>Done</State></Health>"),
            right.format("<Health/>"),
            right.format(READY.replace("</State>", "</State><Details/>")),
            right.format("<Health><State>NotReady</State></Health>"),
            right.format("<Health><State>NotReady</State><Details><Description/><SubStatus/></Details></Health>"),
            "<Health><Container/><GoalStateIncarnation>3</GoalStateIncarnation></Health>",
        ):
            with self.subTest(body):
                address = self.start(WIRESERVER)
                self.assertEqual(ask(address, "POST", "/machine?comp=health", AGENT, body)[0], 400)
                self.assertEqual(self.azure.reports, [])

    def test_the_version_is_to_be_said_and_known(self) -> None:
        address = self.start(WIRESERVER)
        for version, status in {"2012-11-30": 200, "2015-04-05": 200, "2011-12-31": 400, "": 400}.items():
            with self.subTest(version):
                self.assertEqual(ask(address, "GET", GOAL_STATE, {"x-ms-version": version})[0], status)
        self.assertEqual(ask(address, "GET", GOAL_STATE, {})[0], 400)

    def test_the_versions_are_told_to_anybody(self) -> None:
        status, _, body = ask(self.start(WIRESERVER), "GET", "/?comp=versions", {})
        self.assertEqual(status, 200)
        self.assertEqual(
            body.split("?>")[1],
            "<Versions><Preferred><Version>2015-04-05</Version></Preferred><Supported><Version>2015-04-05</Version>"
            "<Version>2012-11-30</Version></Supported></Versions>",
        )

    def test_the_agent_is_to_say_its_name_under_either_header(self) -> None:
        address = self.start(WIRESERVER)
        nameless = {name: value for name, value in AGENT.items() if name != "x-ms-agent-name"}
        self.assertEqual(self.report(address, headers=nameless), 400)
        self.assertEqual(self.report(address, headers=dict(nameless, **{"x-ms-guest-agent-name": "test"})), 200)

    def test_a_report_is_xml_in_utf_8(self) -> None:
        address = self.start(WIRESERVER)
        for kind, status in {"text/xml; charset=UTF-8": 200, "text/xml": 400, "application/json": 400}.items():
            with self.subTest(kind):
                self.assertEqual(self.report(address, headers=dict(AGENT, **{"Content-Type": kind})), status)

    def test_method_and_resource_are_to_fit(self) -> None:
        address = self.start(WIRESERVER)
        for method, path, status in (
            ("GET", "/machine/?comp=goalstate", 200),
            ("POST", GOAL_STATE, 405),
            ("GET", "/machine?comp=health", 405),
            ("GET", "/machine", 404),
            ("GET", "/metal?comp=goalstate", 404),
            ("GET", "/machine?comp=config&type=sharedConfig", 404),
            ("POST", "/machine?comp=roleProperties", 200),
        ):
            with self.subTest((method, path)):
                self.assertEqual(ask(address, method, path, AGENT)[0], status)

    def test_what_the_goal_state_refers_to_is_there_for_this_incarnation_and_container(self) -> None:
        address = self.start(WIRESERVER, name="a<&b")
        goal_state = ElementTree.fromstring(ask(address, "GET", GOAL_STATE, VERSION)[2])
        configuration = goal_state.find("Container/RoleInstanceList/RoleInstance/Configuration")
        assert configuration is not None
        for name, root in {
            "HostingEnvironmentConfig": "HostingEnvironmentConfig",
            "SharedConfig": "SharedConfig",
            "ExtensionsConfig": "Extensions",
        }.items():
            with self.subTest(name):
                url = urlsplit(configuration.findtext(name) or "")
                self.assertEqual(url.netloc, "168.63.129.16:80")
                path = f"{url.path}?{url.query}".replace("<", "%3C")
                status, _, body = ask(address, "GET", path, VERSION)
                self.assertEqual(status, 200)
                document = ElementTree.fromstring(body)
                self.assertEqual((document.tag, document.get("goalStateIncarnation")), (root, "3"))
                self.assertEqual(ask(address, "GET", path.replace("type=", "type=no"), VERSION)[0], 404)
                self.azure.move()
                self.assertEqual(ask(address, "GET", path, VERSION)[0], 404)
                self.azure.moves, self.azure.incarnation = 0, 3

    def test_the_host_plugin_has_no_settings(self) -> None:
        self.assertEqual(ask(self.start(HOST_PLUGIN), "GET", "/vmSettings", {"x-ms-version": "2015-09-01"})[0], 404)

    def test_an_error_is_a_page_of_html(self) -> None:
        health = "<Health><State>&lt;Done&gt;</State></Health>"
        report = REPORT.format(incarnation=3, container_id="c", instance_id="i", health=health)
        status, headers, body = ask(self.start(WIRESERVER), "POST", "/machine?comp=health", AGENT, report)
        self.assertEqual((status, headers["server"]), (400, "Microsoft-HTTPAPI/2.0"))
        self.assertTrue(headers["content-type"].startswith("text/html"))
        self.assertTrue(body.startswith("<!DOCTYPE HTML "), body)
        self.assertIn("<TITLE>Bad Request</TITLE>", body)
        self.assertIn("HTTP Error 400. no such state: &lt;Done&gt;.", body)

    def test_it_throttles_past_so_many_requests_a_second(self) -> None:
        address = self.start(WIRESERVER, throttle=2)
        statuses = [ask(address, "GET", "/?comp=versions", {})[0] for _ in range(3)]
        self.assertEqual(statuses, [200, 200, 429])


class ImdsTest(Case):
    """The instance document and its leaves."""

    def get(self, address: str, path: str) -> Any:
        status, headers, body = ask(address, "GET", path, METADATA)
        self.assertEqual((status, headers["content-type"]), (200, "application/json; charset=utf-8"), path)
        return json.loads(body)

    def test_the_document_describes_the_vm(self) -> None:
        address = self.start(
            IMDS,
            admin_username="alice",
            public_keys=["ssh-ed25519 AAAA\r\nBBBB a b\n", "ssh-rsa CCCC"],
            disable_password_authentication=True,
        )
        for path in (DOCUMENT, DOCUMENT.replace("2021-08-01", "2023-11-15") + "&format=json"):
            document = self.get(address, path)
            compute = document["compute"]
            self.assertEqual(
                compute["osProfile"],
                {"adminUsername": "alice", "computerName": "web-01", "disablePasswordAuthentication": True},
            )
            file = "/home/alice/.ssh/authorized_keys"
            self.assertEqual(
                compute["publicKeys"],
                [
                    {"keyData": "ssh-ed25519 AAAA\r\nBBBB a b\n", "path": file},
                    {"keyData": "ssh-rsa CCCC", "path": file},
                ],
            )
            self.assertEqual((compute["name"], compute["vmId"]), ("web_01", VM_ID))
            (interface,) = document["network"]["interface"]
            self.assertEqual(interface["macAddress"], MAC_ADDRESS)
            self.assertEqual(interface["ipv4"]["ipAddress"][0]["privateIpAddress"], "10.0.0.4")

    def test_a_vm_from_a_specialized_disk_has_an_empty_profile(self) -> None:
        for name in ("", None):
            compute = self.get(self.start(IMDS, computer_name=name), DOCUMENT)["compute"]
            self.assertEqual(set(compute["osProfile"].values()), {""})
            self.assertEqual((compute["name"], compute["publicKeys"]), ("web_01", []))

    def test_a_part_of_the_document_can_be_asked_for(self) -> None:
        address = self.start(IMDS)
        compute = self.get(address, DOCUMENT)["compute"]
        self.assertEqual(self.get(address, "/metadata/instance/compute?api-version=2021-08-01"), compute)
        path = "/metadata/instance/network/interface/0/ipv4/subnet/0?api-version=2021-08-01"
        self.assertEqual(self.get(address, path), {"address": "10.0.0.0", "prefix": "24"})

    def test_a_leaf_is_bare_text(self) -> None:
        address = self.start(IMDS)
        for leaf, value in {"name": "web_01", "osProfile/computerName": "web-01", "customData": ""}.items():
            path = f"/metadata/instance/compute/{leaf}?api-version=2021-02-01"
            status, headers, body = ask(address, "GET", path + "&format=text", METADATA)
            self.assertEqual((status, body, headers["content-type"]), (200, value, "text/plain; charset=utf-8"))
            self.assertEqual(ask(address, "GET", path, METADATA)[0], 400)
        path = "/metadata/instance?api-version=2021-02-01&format="
        self.assertEqual(ask(address, "GET", path + "text", METADATA)[2], "compute/\nnetwork/")
        self.assertEqual(ask(address, "GET", path + "xml", METADATA)[0], 400)

    def test_an_old_version_lacks_what_came_later(self) -> None:
        address = self.start(IMDS)
        for version, there in {
            "2017-04-02": [False] * 3,
            "2019-06-01": [False, False, True],
            "2020-07-15": [True, False, True],
            "2020-10-01": [True] * 3,
        }.items():
            with self.subTest(version):
                compute = self.get(address, "/metadata/instance/compute?api-version=" + version)
                profile = compute.get("osProfile", {})
                found = ["computerName" in profile, "disablePasswordAuthentication" in profile, "publicKeys" in compute]
                self.assertEqual(found, there)
                path = f"/metadata/instance/compute/osProfile/computerName?api-version={version}&format=text"
                self.assertEqual(ask(address, "GET", path, METADATA)[0], 200 if there[0] else 404)

    def test_a_version_that_it_does_not_know_is_refused_with_those_that_it_does(self) -> None:
        address = self.start(IMDS, imds_versions=["2019-06-01", "2017-04-02"])
        for path in (DOCUMENT, "/metadata/instance", "/metadata/instance?api-version=2099-01-01"):
            status, headers, body = ask(address, "GET", path, METADATA)
            self.assertEqual((status, headers["content-type"]), (400, "application/json; charset=utf-8"))
            self.assertEqual(json.loads(body)["newest-versions"], ["2019-06-01", "2017-04-02"])
        self.assertEqual(self.get(address, "/metadata/versions"), {"apiVersions": ["2017-04-02", "2019-06-01"]})

    def test_what_is_not_there_is_not_found(self) -> None:
        address = self.start(IMDS)
        for path in (
            "/",
            "/metadata",
            "/metadata/instances",
            "/metadata/instance/compute/nothing",
            "/metadata/instance/compute/name/more",
            "/metadata/instance/network/interface/1",
            "/metadata/instance/network/interface/first",
        ):
            with self.subTest(path):
                status, _, body = ask(address, "GET", path + "?api-version=2021-08-01", METADATA)
                self.assertEqual((status, json.loads(body)), (404, {"error": "Not found"}))

    def test_only_a_direct_question_is_answered(self) -> None:
        address = self.start(IMDS)
        for method, headers, status in (
            ("GET", {}, 400),
            ("GET", {"Metadata": "false"}, 400),
            ("GET", {"Metadata": "True"}, 200),
            ("GET", dict(METADATA, **{"X-Forwarded-For": "10.0.0.9"}), 400),
            ("PUT", METADATA, 405),
        ):
            with self.subTest((method, headers)):
                self.assertEqual(ask(address, method, DOCUMENT, headers)[0], status)


class ScriptTest(Case):
    """What can be made to go wrong; the tests of the module show the rest of it."""

    def exchange(self, *entries: Dict[str, Any]) -> socket.socket:
        """Ask for the goal state, and return the connection with the answer in it."""
        host, port = self.start(WIRESERVER, script={WIRESERVER: list(entries)}).split(":")
        connection = socket.create_connection((host, int(port)), 10)
        self.addCleanup(connection.close)
        connection.sendall(b"GET /machine?comp=goalstate HTTP/1.1\r\nHost: x\r\nx-ms-version: 2012-11-30\r\n\r\n")
        return connection

    @staticmethod
    def receive(connection: socket.socket, size: int = 1 << 20) -> bytes:
        received: List[bytes] = []
        while sum(map(len, received)) < size and (not received or received[-1]):
            received.append(connection.recv(1 << 16))
        return b"".join(received)

    def test_raw_bytes_are_all_that_is_sent(self) -> None:
        entry = {"do": "raw", "raw": "HTTP/9 \xff\udcfe\x00", "repeat": 3}
        self.assertEqual(self.receive(self.exchange(entry)), b"HTTP/9 \xff\xfe\x00" * 3)
        self.assertEqual(self.azure.requests[0]["outcome"], "raw")

    def test_after_raw_bytes_the_connection_can_be_left_open(self) -> None:
        connection = self.exchange({"do": "raw", "raw": "abc", "keep": True})
        self.assertEqual(self.receive(connection, 3), b"abc")
        self.assertEqual(select.select([connection], [], [], 0.1)[0], [])
        self.azure.stop()
        self.assertEqual(connection.recv(1), b"")

    def test_an_answer_can_end_in_its_headers(self) -> None:
        received = self.receive(self.exchange({"do": "cut_headers"}))
        self.assertTrue(received.startswith(b"HTTP/1.1 200 OK\r\nServer: "), received)
        self.assertNotIn(b"\r\n\r\n", received)

    def test_an_answer_can_end_in_its_body(self) -> None:
        head, body = self.receive(self.exchange({"do": "cut"})).split(b"\r\n\r\n", 1)
        length = int(head.lower().split(b"content-length: ")[1].split()[0])
        self.assertEqual(len(body), length // 2)

    def test_a_script_that_is_used_up_leaves_right_answers(self) -> None:
        address = self.start(WIRESERVER, script={WIRESERVER: [{"status": 503, "body": "\u00fc"}, {"body": "b"}]})
        answers = [ask(address, "GET", GOAL_STATE, VERSION) for _ in range(3)]
        self.assertEqual([(status, body[:1]) for status, _, body in answers], [(503, "\u00fc"), (200, "b"), (200, "<")])


class CommandLineTest(unittest.TestCase):
    """`python3 -m tests.fake_azure`."""

    def test_the_vm_is_the_one_described(self) -> None:
        command = [sys.executable, "-m", "tests.fake_azure", "--wireserver", "127.0.0.1:0", "--imds", "127.0.0.1:0"]
        command += ["--computer-name", "", "--admin-username", "alice", "--public-key", "a", "--public-key", "b"]
        command += ["--disable-password-authentication", "true", "--script", '{"imds": [{"status": 418}]}']
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            cwd=sandbox.REPOSITORY,
            universal_newlines=True,
            # A shell's job in the background, as this may be one of, ignores it.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        ) as process:
            assert process.stdout
            addresses = dict(process.stdout.readline().split(" at ") for _ in range(2))
            address = addresses[IMDS].strip()
            self.assertEqual(ask(address, "GET", DOCUMENT, METADATA)[0], 418)
            compute = json.loads(ask(address, "GET", DOCUMENT, METADATA)[2])["compute"]
            process.send_signal(signal.SIGINT)
            output = process.stdout.read().splitlines()
        self.assertEqual(process.returncode, 0)
        self.assertEqual(
            compute["osProfile"],
            {"adminUsername": "alice", "computerName": "", "disablePasswordAuthentication": "true"},
        )
        self.assertEqual([key["keyData"] for key in compute["publicKeys"]], ["a", "b"])
        self.assertEqual(output, [f"imds: GET {DOCUMENT}: {status}" for status in (418, 200)])


if __name__ == "__main__":
    unittest.main()
