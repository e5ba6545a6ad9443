"""A pretend Azure: WireServer and IMDS, as strict as the real ones, and as unreliable as a script makes them.

Run `python3 -m tests.fake_azure --help`, or use FakeAzure in a with statement.

A script lists, for each service, what happens to its requests in turn; once it is used up, the service answers as it
should. Each entry is an object with one of these keys, and any of the others where they make sense:

    status      answer with this status; body (text) and headers (an object) may stand beside it
    body        answer 200 with this body; repeat (a number) sends it that many times
    do          silent (accept, never answer), reset (a TCP reset), close (end the connection), cut (half of the right
                answer), drip (the right answer, byte by byte), endless_body, endless_header, endless_continue,
                moved (the container moves before this request is answered), right (answer as it should)
    delay       seconds before any of it

What the services are asked is recorded, and so is what became of each health report.
"""

import argparse
import contextlib
import json
import socket
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from socketserver import ThreadingMixIn
from typing import Any, Callable, Dict, List, Optional, Tuple
from urllib.parse import parse_qs, urlsplit
from xml.etree import ElementTree

WIRESERVER = "wireserver"
IMDS = "imds"

GOAL_STATE = """\ufeff<?xml version="1.0" encoding="utf-8"?>
<GoalState xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" xsi:noNamespaceSchemaLocation="goalstate10.xsd">
  <Version>2012-11-30</Version>
  <Incarnation> {incarnation} </Incarnation>
  <Machine><ExpectedState>Started</ExpectedState><StopRolesDeadlineHint>300000</StopRolesDeadlineHint></Machine>
  <Container>
    <ContainerId>
      {container_id}
    </ContainerId>
    <RoleInstanceList>
      <RoleInstance>
        <InstanceId>{instance_id}</InstanceId>
        <State>Started</State>
        <Configuration><HostingEnvironmentConfig>http://168.63.129.16:80/</HostingEnvironmentConfig></Configuration>
      </RoleInstance>
    </RoleInstanceList>
  </Container>
</GoalState>
"""

# The oldest version that knows each leaf; IMDS compares them as the dates that they are.
IMDS_VERSIONS = ["2017-04-02", "2018-04-02", "2019-06-01", "2020-07-15", "2021-02-01"]
LEAVES = {"compute/name": "2017-04-02", "compute/osProfile/computerName": "2020-07-15"}

Answer = Tuple[int, Dict[str, str], bytes]


class RefusedError(Exception):
    """A request that the real service would refuse, with the status that it would use."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class FakeAzure:
    """WireServer and IMDS for one VM.

    computer_name None is a VM made from a specialized disk. imds_versions are those that IMDS knows. throttle is the
    number of requests in any second past which WireServer answers 429. listen() starts a service, stop() ends both.
    """

    def __init__(
        self,
        name: str = "web_01",
        computer_name: Optional[str] = "web-01",
        script: Optional[Dict[str, List[Dict[str, Any]]]] = None,
        imds_versions: Optional[List[str]] = None,
        throttle: Optional[int] = None,
        drip_pause: float = 1.0,
    ) -> None:
        self.leaves = {"compute/name": name}
        if computer_name is not None:
            self.leaves["compute/osProfile/computerName"] = computer_name
        script = script or {}
        self.script = {service: list(script.get(service, [])) for service in (WIRESERVER, IMDS)}
        self.imds_versions = IMDS_VERSIONS if imds_versions is None else imds_versions
        self.throttle = throttle
        self.drip_pause = drip_pause
        self.incarnation = 3
        self.moves = 0
        self.requests: List[Dict[str, Any]] = []
        self.reports: List[Dict[str, Any]] = []
        self.stopping = threading.Event()
        self.lock = threading.Lock()
        self.served: List[float] = []
        self.servers: List[_Server] = []
        self.observer: Optional[Callable[[Dict[str, Any]], None]] = None

    # What a test wants to know.

    @property
    def container_id(self) -> str:
        """The identifier of the container, which changes when it moves."""
        return f"c0ffee00-0000-4000-8000-{self.moves:012d}"

    @property
    def instance_id(self) -> str:
        """The identifier of the role instance."""
        return "5ca1ab1e-0000-4000-8000-000000000001._" + self.leaves["compute/name"]

    @property
    def accepted(self) -> List[Dict[str, Any]]:
        """The health reports that the platform took notice of."""
        return [report for report in self.reports if report["accepted"]]

    def asked(self, service: str) -> List[str]:
        """What service was asked: method and path of each request."""
        return ["{method} {path}".format(**request) for request in self.requests if request["service"] == service]

    def move(self) -> None:
        """Move the VM to another container, as live migration does."""
        with self.lock:
            self.moves += 1
            self.incarnation += 1

    # Its life.

    def listen(self, service: str, host: str = "127.0.0.1", port: int = 0) -> str:
        """Start service at host and port, and return its address as HOST:PORT."""
        server = _Server((host, port), self, service)
        self.servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return f"{host}:{server.server_port}"

    def stop(self) -> None:
        """Stop both services and end the connections that are left."""
        self.stopping.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def __enter__(self) -> "FakeAzure":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def record(self, request: Dict[str, Any]) -> None:
        """Remember a request with its outcome, and tell the observer."""
        with self.lock:
            self.requests.append(request)
            if self.observer:
                self.observer(request)

    # How the services answer.

    def answer(self, request: Dict[str, Any]) -> Answer:
        """Return status, headers and body of the right answer to a request, to which a health report is added."""
        try:
            return self.wireserver(request) if request["service"] == WIRESERVER else self.imds(request)
        except RefusedError as refused:
            document = {"error": str(refused), "newest-versions": list(reversed(self.imds_versions))}
            return refused.status, {"Content-Type": "application/json"}, json.dumps(document).encode()

    def wireserver(self, request: Dict[str, Any]) -> Answer:
        """Answer for the WireServer. Raises RefusedError."""
        method, path, headers = request["method"], request["path"], request["headers"]
        if headers.get("x-ms-version") != "2012-11-30":
            raise RefusedError(400, "x-ms-version is missing or unknown")
        if self.throttle is not None:
            now = time.monotonic()
            with self.lock:
                self.served = [moment for moment in self.served if now - moment < 1]
                throttled = len(self.served) >= self.throttle
                if not throttled:
                    self.served.append(now)
            if throttled:
                raise RefusedError(429, "too many requests")
        url = urlsplit(path)
        if url.path.rstrip("/") != "/machine" or parse_qs(url.query).get("comp") not in (["goalstate"], ["health"]):
            raise RefusedError(404, "no such resource")
        if url.query == "comp=goalstate":
            if method != "GET":
                raise RefusedError(405, "GET the goal state")
            goal_state = GOAL_STATE.format(
                incarnation=self.incarnation, container_id=self.container_id, instance_id=self.instance_id
            )
            return 200, {"Content-Type": "text/xml; charset=utf-8"}, goal_state.encode()
        if method != "POST":
            raise RefusedError(405, "POST the health report")
        if not headers.get("x-ms-agent-name"):
            raise RefusedError(400, "x-ms-agent-name is missing")
        if headers.get("content-type", "").replace(" ", "").lower() != "text/xml;charset=utf-8":
            raise RefusedError(400, "the content type is not text/xml;charset=utf-8")
        report = self.parse_report(request["body"])
        if report["container_id"] != self.container_id or report["instance_id"] != self.instance_id:
            raise RefusedError(410, "no such container")
        # A report on another incarnation is answered as any other, and ignored.
        report["accepted"] = report["incarnation"] == str(self.incarnation)
        request["report"] = report
        with self.lock:
            self.reports.append(report)
        return 200, {}, b""

    @staticmethod
    def parse_report(body: bytes) -> Dict[str, Any]:
        """Return what a health report says. Raises RefusedError unless it has the right elements in the right order."""
        try:
            health = ElementTree.fromstring(body.decode("utf-8"))
        except (ElementTree.ParseError, UnicodeDecodeError) as error:
            raise RefusedError(400, f"the report is not XML: {error}") from error

        def children(element: ElementTree.Element, *tags: str) -> List[ElementTree.Element]:
            found = [child.tag for child in element]
            if found != list(tags):
                raise RefusedError(400, f"{element.tag} holds {found} instead of {list(tags)}")
            return list(element)

        if health.tag != "Health":
            raise RefusedError(400, "the report is not a Health")
        incarnation, container = children(health, "GoalStateIncarnation", "Container")
        container_id, roles = children(container, "ContainerId", "RoleInstanceList")
        instance_id, role_health = children(children(roles, "Role")[0], "InstanceId", "Health")
        state = role_health.findtext("State")
        report = {
            "incarnation": incarnation.text,
            "container_id": container_id.text,
            "instance_id": instance_id.text,
            "state": state,
        }
        if state == "Ready":
            children(role_health, "State")
        elif state == "NotReady":
            substatus, description = children(children(role_health, "State", "Details")[1], "SubStatus", "Description")
            report.update(substatus=substatus.text, description=description.text)
            if len(description.text or "") > 512:
                raise RefusedError(400, "the description is longer than 512 characters")
        else:
            raise RefusedError(400, f"no such state: {state}")
        return report

    def imds(self, request: Dict[str, Any]) -> Answer:
        """Answer for the Instance Metadata Service. Raises RefusedError."""
        headers = request["headers"]
        if request["method"] != "GET":
            raise RefusedError(405, "IMDS is only to be read")
        if headers.get("metadata", "").lower() != "true":
            raise RefusedError(400, "Bad request. Required metadata header not specified")
        if "x-forwarded-for" in headers:
            raise RefusedError(400, "Bad request. Forwarded requests are refused")
        url = urlsplit(request["path"])
        query = parse_qs(url.query)
        version = query.get("api-version", [""])[0]
        if version not in self.imds_versions:
            raise RefusedError(400, "Bad request. api-version is invalid or was not specified in the request")
        prefix = "/metadata/instance/"
        leaf = url.path[len(prefix) :]
        if not url.path.startswith(prefix) or leaf not in self.leaves or version < LEAVES[leaf]:
            raise RefusedError(404, "Not found")
        if query.get("format") != ["text"]:
            raise RefusedError(400, "Bad request. A leaf wants format=text")
        return 200, {"Content-Type": "text/plain; charset=utf-8"}, self.leaves[leaf].encode()


class _Server(ThreadingMixIn, HTTPServer):
    daemon_threads = True
    block_on_close = False  # from 3.7 on; connections end with stopping
    request_queue_size = 128

    def __init__(self, address: Tuple[str, int], azure: FakeAzure, service: str) -> None:
        self.azure = azure
        self.service = service
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # Not HTTPServer's, which looks up its own name: nothing here may wait for a resolver.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = self.socket.getsockname()[:2]

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that went away


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Any = None

    def handle_any(self) -> None:
        azure: FakeAzure = self.server.azure
        service: str = self.server.service
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with azure.lock:
            entry = azure.script[service].pop(0) if azure.script[service] else {}
        action = entry.get("do", "right")
        request = {
            "service": service,
            "method": self.command,
            "path": self.path,
            "headers": {name.lower(): value for name, value in self.headers.items()},
            "body": body,
            "time": time.monotonic(),
        }
        if entry.get("delay"):
            azure.stopping.wait(entry["delay"])
        if action == "moved":
            azure.move()
        if action in ("right", "moved", "cut", "drip") and not {"status", "body"} & set(entry):
            answer = azure.answer(request)
            request["outcome"] = str(answer[0]) + ("" if action in ("right", "moved") else f", {action}")
        else:
            body = (entry.get("body", "") * entry.get("repeat", 1)).encode("utf-8", "surrogateescape")
            answer = entry.get("status", 200), entry.get("headers", {}), body
            request["outcome"] = str(answer[0]) if action == "right" else action
        azure.record(request)
        getattr(self, "do_" + action)(*answer)

    do_GET = do_POST = do_PUT = do_HEAD = handle_any  # noqa: N815

    def head(self, status: int, headers: Dict[str, str], length: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if not {"Content-Length", "Transfer-Encoding"} & set(headers):
            self.send_header("Content-Length", str(length))

    def do_right(self, status: int, headers: Dict[str, str], body: bytes) -> None:
        self.head(status, headers, len(body))
        self.end_headers()
        self.wfile.write(body)

    do_moved = do_right

    def do_silent(self, *_: object) -> None:
        self.close_connection = True
        self.server.azure.stopping.wait(60)

    def do_reset(self, *_: object) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.do_close()

    def do_close(self, *_: object) -> None:
        self.close_connection = True

    def do_cut(self, status: int, headers: Dict[str, str], body: bytes) -> None:
        self.head(status, headers, len(body))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])
        self.close_connection = True

    def send_until_stopped(self, data: bytes, pause: float, size: int = 1) -> None:
        self.wfile.flush()
        for start in range(0, len(data), size):
            if self.server.azure.stopping.wait(pause):
                break
            self.wfile.write(data[start : start + size])
        self.close_connection = True

    def do_drip(self, status: int, headers: Dict[str, str], body: bytes) -> None:
        self.head(status, headers, len(body))
        head = b"".join(self._headers_buffer) + b"\r\n"
        self._headers_buffer: List[bytes] = []
        self.send_until_stopped(head + body, self.server.azure.drip_pause)

    # Bounded all the same, should the client never stop to read.

    def do_endless_body(self, status: int, headers: Dict[str, str], _: bytes) -> None:
        self.head(status, dict(headers, **{"Transfer-Encoding": "chunked"}), 0)
        self.end_headers()

        for _count in range(1 << 12):
            self.wfile.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")

    def do_endless_header(self, *_: object) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for count in range(1 << 12):
            self.wfile.write(b"X-%d: %s\r\n" % (count, b"x" * 0x8000))
        self.close_connection = True

    def do_endless_continue(self, *_: object) -> None:
        while not self.server.azure.stopping.wait(0.001):
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def log_message(self, *_: object) -> None:
        pass


def main(arguments: Optional[List[str]] = None) -> int:
    """Run both services until interrupted, and print what they are asked."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.fake_azure", description="A pretend Azure for one VM.")
    parser.add_argument("--wireserver", default="127.0.0.1:8016", metavar="HOST:PORT", help="default: %(default)s")
    parser.add_argument("--imds", default="127.0.0.1:8254", metavar="HOST:PORT", help="default: %(default)s")
    parser.add_argument(
        "--absent", action="append", default=[], choices=(WIRESERVER, IMDS), help="a service to leave out"
    )
    parser.add_argument("--name", default="web_01", help="the name of the VM resource (default: %(default)s)")
    parser.add_argument("--computer-name", default="web-01", help="the VM's host name (default: %(default)s)")
    parser.add_argument("--script", default="{}", metavar="JSON", help="see the top of tests/fake_azure.py")
    parser.add_argument("--throttle", type=int, metavar="N", help="answer 429 past N requests a second")
    parser.add_argument("--json", action="store_true", help="print each request as a line of JSON")
    options = parser.parse_args(arguments)
    azure = FakeAzure(options.name, options.computer_name, json.loads(options.script), throttle=options.throttle)

    def show(request: Dict[str, Any]) -> None:
        if options.json:
            print(json.dumps(request, default=repr), flush=True)
        else:
            print("{service}: {method} {path}: {outcome}".format(**request), flush=True)
            if "report" in request:
                print("  {state}, accepted: {accepted}".format(**request["report"]), flush=True)

    azure.observer = show
    for service in (WIRESERVER, IMDS):
        if service not in options.absent:
            host, port = getattr(options, service).rsplit(":", 1)
            address = azure.listen(service, host, int(port))
            if not options.json:
                print(service, "at", address, flush=True)
    with azure, contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
