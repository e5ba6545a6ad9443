"""A pretend Azure: WireServer and IMDS, as strict as the real ones, and as unreliable as a script makes them.

Run `python3 -m tests.fake_azure --help`, or use FakeAzure in a with statement.

A script lists, for each service, what happens to its requests in turn; once it is used up, the service answers as it
should. An entry in place of a list is for all requests: {"wireserver": {"status": 503}} is never anything else. Each
entry is an object with one of these keys, and any of the others where they make sense:

    status      answer with this status; body (text) and headers (an object) may stand beside it
    body        answer 200 with this body; repeat (a number) sends it that many times
    do          silent (accept, never answer), reset (a TCP reset), close (end the connection), cut (half of the right
                answer), cut_headers (half of its headers), drip (the right answer, byte by byte), endless_body,
                endless_header, endless_continue, moved (the container moves before this request is answered), right
                (answer as it should), raw (send what stands in raw, and nothing else, repeat times; then the
                connection is closed or, with keep, left open)
    delay       seconds before any of it

Text is sent as UTF-8, but raw as Latin-1, a character a byte; lone surrogates are the bytes that they escape.

What the services are asked is recorded, and so is what became of each health report.
"""

import argparse
import contextlib
import itertools
import json
import socket
import struct
import sys
import threading
import time
from http.client import responses
from http.server import BaseHTTPRequestHandler, HTTPServer
from socketserver import ThreadingMixIn
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

WIRESERVER = "wireserver"
IMDS = "imds"
# WireServer's neighbour at the same address, of which waagent asks for settings. It has none for this VM.
HOST_PLUGIN = "hostplugin"
HOST_PLUGIN_PORT = 32526

VM_ID = "5ca1ab1e-0000-4000-8000-000000000001"
MAC_ADDRESS = "000D3A00CAFE"

# What WireServer asks for in x-ms-version, the one it prefers first.
WIRESERVER_VERSIONS = ("2015-04-05", "2012-11-30")
DESCRIPTION_LIMIT = 4096

GOAL_STATE = """\ufeff<?xml version="1.0" encoding="utf-8"?>
<GoalState xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" xsi:noNamespaceSchemaLocation="goalstate10.xsd">
  <Version>2012-11-30</Version>
  <Incarnation>{incarnation}</Incarnation>
  <Machine>
    <ExpectedState>Started</ExpectedState>
    <StopRolesDeadlineHint>300000</StopRolesDeadlineHint>
    <LBProbePorts><Port>16001</Port></LBProbePorts>
    <ExpectHealthReport>FALSE</ExpectHealthReport>
  </Machine>
  <Container>
    <ContainerId>{container_id}</ContainerId>
    <RoleInstanceList>
      <RoleInstance>
        <InstanceId>{instance_id}</InstanceId>
        <State>Started</State>
        <Configuration>
          <HostingEnvironmentConfig>http://168.63.129.16:80/machine/{container_id}/{instance_id}?comp=config&amp;type=\
hostingEnvironmentConfig&amp;incarnation={incarnation}</HostingEnvironmentConfig>
          <SharedConfig>http://168.63.129.16:80/machine/{container_id}/{instance_id}?comp=config&amp;type=\
sharedConfig&amp;incarnation={incarnation}</SharedConfig>
          <ExtensionsConfig>http://168.63.129.16:80/machine/{container_id}/{instance_id}?comp=config&amp;type=\
extensionsConfig&amp;incarnation={incarnation}</ExtensionsConfig>
          <FullConfig>http://168.63.129.16:80/machine/{container_id}/{instance_id}?comp=config&amp;type=\
fullConfig&amp;incarnation={incarnation}</FullConfig>
          <ConfigName>{container_id}.0.{container_id}.0._web.1.xml</ConfigName>
        </Configuration>
      </RoleInstance>
    </RoleInstanceList>
  </Container>
</GoalState>
"""

# What the goal state refers to. No agent needs it to report, but waagent does not report without having read it.
CONFIGURATIONS = {
    "hostingEnvironmentConfig": """<?xml version="1.0" encoding="utf-8"?>
<HostingEnvironmentConfig version="1.0.0.0" goalStateIncarnation="{incarnation}">
  <StoredCertificates />
  <Deployment name="{container_id}" guid="{{{container_id}}}" incarnation="0">
    <Service name="web" guid="{{00000000-0000-0000-0000-000000000000}}" />
    <ServiceInstance name="{container_id}.0" guid="{{{container_id}}}" />
  </Deployment>
  <Incarnation number="1" instance="{instance_name}" guid="{{{container_id}}}" />
  <Role guid="{{{container_id}}}" name="{instance_name}" settleTimeSeconds="0" />
  <HostingEnvironmentSettings name="full" Runtime="rd_fabric_stable" />
</HostingEnvironmentConfig>
""",
    "sharedConfig": """<?xml version="1.0" encoding="utf-8"?>
<SharedConfig version="1.0.0.0" goalStateIncarnation="{incarnation}">
  <Deployment name="{container_id}" guid="{{{container_id}}}" incarnation="0" />
  <Incarnation number="1" instance="{instance_name}" guid="{{{container_id}}}" />
  <Role guid="{{{container_id}}}" name="{instance_name}" settleTimeSeconds="0" />
  <Instances><Instance id="{instance_name}" address="10.0.0.4" primaryMappedAddress="10.0.0.4" /></Instances>
</SharedConfig>
""",
    "extensionsConfig": """<?xml version="1.0" encoding="utf-8"?>
<Extensions version="1.0.0.0" goalStateIncarnation="{incarnation}">
  <GuestAgentExtension xmlns:i="http://www.w3.org/2001/XMLSchema-instance"><GAFamilies /></GuestAgentExtension>
  <Plugins />
  <PluginSettings />
</Extensions>
""",
}

# As HTTP.sys answers, on which WireServer stands.
HTML_ERROR = """<!DOCTYPE HTML PUBLIC "-//W3C//DTD HTML 4.01//EN""http://www.w3.org/TR/html4/strict.dtd">\r
<HTML><HEAD><TITLE>{title}</TITLE>\r
<META HTTP-EQUIV="Content-Type" Content="text/html; charset=us-ascii"></HEAD>\r
<BODY><h2>{title}</h2>\r
<hr><p>HTTP Error {status}. {reason}.</p>\r
</BODY></HTML>\r
"""

# Versions compare as the dates that they are.
IMDS_VERSIONS = [
    "2017-04-02",
    "2017-12-01",
    "2018-02-01",
    "2018-04-02",
    "2018-10-01",
    "2019-06-01",
    "2019-11-01",
    "2020-07-15",
    "2020-10-01",
    "2021-01-01",
    "2021-02-01",
    "2021-08-01",
    "2021-12-13",
    "2023-07-01",
    "2023-11-15",
]
# The oldest version that knows each element, where that is not the oldest of all.
# https://learn.microsoft.com/azure/virtual-machines/instance-metadata-service#instance-metadata
SINCE = {
    "azEnvironment": "2018-10-01",
    "customData": "2019-02-01",
    "disablePasswordAuthentication": "2020-10-01",
    "evictionPolicy": "2020-12-01",
    "isHostCompatibilityLayerVm": "2020-06-01",
    "licenseType": "2020-09-01",
    "osProfile": "2020-07-15",
    "placementGroupId": "2017-08-01",
    "plan": "2018-04-02",
    "priority": "2020-12-01",
    "provider": "2018-10-01",
    "publicKeys": "2018-04-02",
    "resourceGroupName": "2017-08-01",
    "resourceId": "2019-03-11",
    "securityProfile": "2020-06-01",
    "storageProfile": "2019-06-01",
    "subscriptionId": "2017-08-01",
    "tags": "2017-08-01",
    "tagsList": "2019-06-04",
    "userData": "2021-01-01",
    "vmScaleSetName": "2017-12-01",
    "zone": "2017-12-01",
}

Answer = Tuple[int, Dict[str, str], bytes]
Entry = Dict[str, Any]
Script = Mapping[str, Union[Entry, List[Entry]]]  # of each service: see above


class RefusedError(Exception):
    """A request that the real service would refuse, with the status that it would use."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class FakeAzure:
    """WireServer and IMDS for one VM.

    A computer_name of "" or None is a VM made from a specialized disk. public_keys are the keyData of each key.
    imds_versions are those that IMDS knows. throttle is the number of requests in any second past which WireServer
    answers 429. listen() starts a service, stop() ends both.
    """

    def __init__(
        self,
        name: str = "web_01",
        computer_name: Optional[str] = "web-01",
        script: Optional[Script] = None,
        imds_versions: Optional[Sequence[str]] = None,
        throttle: Optional[int] = None,
        drip_pause: float = 1.0,
        admin_username: str = "",
        public_keys: Sequence[str] = (),
        disable_password_authentication: Union[str, bool] = "",
    ) -> None:
        self.name = name
        self.os_profile = {
            "adminUsername": admin_username,
            "computerName": computer_name or "",
            "disablePasswordAuthentication": disable_password_authentication,
        }
        self.public_keys = [
            {"keyData": key, "path": f"/home/{admin_username}/.ssh/authorized_keys"} for key in public_keys
        ]
        self.script: Dict[str, Iterator[Entry]] = {}
        for service, entries in (script or {}).items():
            self.script[service] = itertools.repeat(entries) if isinstance(entries, dict) else iter(entries)
        self.imds_versions = sorted(IMDS_VERSIONS if imds_versions is None else imds_versions)
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
        return f"{VM_ID}._{self.name}"

    @property
    def accepted(self) -> List[Dict[str, Any]]:
        """The health reports that were not refused."""
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
        if request["service"] != IMDS:
            try:
                if request["service"] == HOST_PLUGIN:
                    raise RefusedError(404, "There are no settings")
                return self.wireserver(request)
            except RefusedError as refused:
                title = responses[refused.status]
                page = HTML_ERROR.format(title=title, status=refused.status, reason=escape(str(refused)))
                return refused.status, {"Content-Type": "text/html; charset=us-ascii"}, page.encode("ascii", "replace")
        try:
            return self.imds(request)
        except RefusedError as refused:
            error: Dict[str, Any] = {"error": str(refused)}
            if "api-version" in str(refused):
                error["newest-versions"] = self.imds_versions[:-4:-1]
            return refused.status, {"Content-Type": "application/json; charset=utf-8"}, json.dumps(error).encode()

    def wireserver(self, request: Dict[str, Any]) -> Answer:
        """Answer for the WireServer. Raises RefusedError."""
        method, headers = request["method"], request["headers"]
        url = urlsplit(request["path"])
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        subject = query.get("comp", "")
        if self.throttle is not None:
            now = time.monotonic()
            with self.lock:
                self.served = [moment for moment in self.served if now - moment < 1]
                throttled = len(self.served) >= self.throttle
                if not throttled:
                    self.served.append(now)
            if throttled:
                raise RefusedError(429, "There were too many requests")
        if (method, url.path, subject) == ("GET", "/", "versions"):
            supported = "".join(f"<Version>{version}</Version>" for version in WIRESERVER_VERSIONS)
            return self.xml(
                '<?xml version="1.0" encoding="utf-8"?>'
                f"<Versions><Preferred><Version>{WIRESERVER_VERSIONS[0]}</Version></Preferred>"
                f"<Supported>{supported}</Supported></Versions>"
            )
        if headers.get("x-ms-version") not in WIRESERVER_VERSIONS:
            raise RefusedError(400, "x-ms-version is missing or unknown")
        allowed = {"goalstate": "GET", "config": "GET", "health": "POST", "roleProperties": "POST"}.get(subject)
        machine = f"/machine/{self.container_id}/{self.instance_id}" if subject == "config" else "/machine"
        if unquote(url.path).rstrip("/") != machine or allowed is None:
            raise RefusedError(404, "There is no such resource")
        if method != allowed:
            raise RefusedError(405, f"This is to be asked with {allowed}")
        if subject == "goalstate":
            return self.xml(self.describe(GOAL_STATE))
        if subject == "config":
            if query.get("type") not in CONFIGURATIONS:
                raise RefusedError(404, "There is no such configuration")
            return self.xml(self.describe(CONFIGURATIONS[query["type"]]))
        if not (headers.get("x-ms-agent-name") or headers.get("x-ms-guest-agent-name")):
            raise RefusedError(400, "x-ms-agent-name is missing")
        if headers.get("content-type", "").replace(" ", "").lower() != "text/xml;charset=utf-8":
            raise RefusedError(400, "The content type is not text/xml;charset=utf-8")
        if subject == "health":
            self.health(request)
        return 200, {}, b""

    @staticmethod
    def xml(document: str) -> Answer:
        """Return document as an answer."""
        return 200, {"Content-Type": "text/xml; charset=utf-8"}, document.encode()

    def describe(self, template: str) -> str:
        """Fill in a template what is true of the VM now."""
        return template.format(
            incarnation=self.incarnation,
            container_id=self.container_id,
            instance_id=escape(self.instance_id),
            instance_name=escape(self.name, {'"': "&quot;"}),
        )

    def health(self, request: Dict[str, Any]) -> None:
        """Take notice of a health report. Raises RefusedError unless it is about this VM as it is now."""
        report = self.parse_report(request["body"])
        report["accepted"] = False
        request["report"] = report
        with self.lock:
            self.reports.append(report)
        if len(report.get("description") or "") > DESCRIPTION_LIMIT:
            raise RefusedError(500, f"The description is longer than {DESCRIPTION_LIMIT} characters")
        if (report["container_id"], report["instance_id"]) != (self.container_id, self.instance_id):
            raise RefusedError(410, "There is no such container")
        if report["incarnation"] != str(self.incarnation):
            raise RefusedError(410, "The goal state has another incarnation")
        report["accepted"] = True

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
        if url.path == "/metadata/versions":
            return self.json({"apiVersions": self.imds_versions})
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        version = query.get("api-version", "")
        if version not in self.imds_versions:
            raise RefusedError(400, "Bad request. api-version is invalid or was not specified in the request")
        path = url.path.strip("/").split("/")
        if path[:2] != ["metadata", "instance"]:
            raise RefusedError(404, "Not found")
        found = self.instance(version)
        for name in path[2:]:
            try:
                found = found[int(name)] if isinstance(found, list) else found[name]
            except (LookupError, TypeError, ValueError):
                raise RefusedError(404, "Not found") from None
        if query.get("format", "json") == "json":
            if not isinstance(found, (dict, list)):
                raise RefusedError(400, "Bad request. A leaf wants format=text")
            return self.json(found)
        if query["format"] != "text":
            raise RefusedError(400, "Bad request. No such format")
        if isinstance(found, (dict, list)):
            entries = found.items() if isinstance(found, dict) else enumerate(found)
            found = "\n".join(f"{key}/" if isinstance(value, (dict, list)) else str(key) for key, value in entries)
        return 200, {"Content-Type": "text/plain; charset=utf-8"}, str(found).encode()

    @staticmethod
    def json(document: Any) -> Answer:
        """Return document as an answer."""
        return 200, {"Content-Type": "application/json; charset=utf-8"}, json.dumps(document).encode()

    def instance(self, version: str) -> Any:
        """Return the whole instance document, as version has it."""
        group = "/subscriptions/8d10da13-8125-4ba9-a717-bf7490507b3d/resourceGroups/web"
        image = {"offer": "debian-12", "publisher": "Debian", "sku": "12-gen2", "version": "latest"}
        disk = {"caching": "ReadWrite", "createOption": "FromImage", "diskSizeGB": "30", "name": self.name + "_OsDisk"}
        compute = {
            "azEnvironment": "AzurePublicCloud",
            "customData": "",
            "evictionPolicy": "",
            "isHostCompatibilityLayerVm": "false",
            "licenseType": "",
            "location": "westeurope",
            "name": self.name,
            "offer": image["offer"],
            "osProfile": self.os_profile,
            "osType": "Linux",
            "placementGroupId": "",
            "plan": {"name": "", "product": "", "publisher": ""},
            "platformFaultDomain": "0",
            "platformUpdateDomain": "0",
            "priority": "",
            "provider": "Microsoft.Compute",
            "publicKeys": self.public_keys,
            "publisher": image["publisher"],
            "resourceGroupName": "web",
            "resourceId": f"{group}/providers/Microsoft.Compute/virtualMachines/{self.name}",
            "securityProfile": {"secureBootEnabled": "false", "virtualTpmEnabled": "false"},
            "sku": image["sku"],
            "storageProfile": {"dataDisks": [], "imageReference": image, "osDisk": disk},
            "subscriptionId": group.split("/")[2],
            "tags": "",
            "tagsList": [],
            "userData": "",
            "version": image["version"],
            "vmId": VM_ID,
            "vmScaleSetName": "",
            "vmSize": "Standard_B1s",
            "zone": "",
        }
        interface = {
            "ipv4": {
                "ipAddress": [{"privateIpAddress": "10.0.0.4", "publicIpAddress": ""}],
                "subnet": [{"address": "10.0.0.0", "prefix": "24"}],
            },
            "ipv6": {"ipAddress": []},
            "macAddress": MAC_ADDRESS,
        }

        def known(element: Any) -> Any:
            if not isinstance(element, dict):
                return element
            return {name: known(value) for name, value in element.items() if SINCE.get(name, "") <= version}

        return {"compute": known(compute), "network": {"interface": [interface]}}


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
            entry = next(azure.script.get(service, iter(())), {})
        action = entry.get("do", "right")
        self.entry: Entry = entry
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
        if action in ("right", "moved", "cut", "cut_headers", "drip") and not {"status", "body"} & set(entry):
            answer = azure.answer(request)
            request["outcome"] = str(answer[0]) + ("" if action in ("right", "moved") else f", {action}")
        else:
            body = (entry.get("body", "") * entry.get("repeat", 1)).encode("utf-8", "surrogateescape")
            answer = entry.get("status", 200), entry.get("headers", {}), body
            request["outcome"] = str(answer[0]) if action == "right" else action
        azure.record(request)
        getattr(self, "do_" + action)(*answer)

    do_GET = do_POST = do_PUT = do_HEAD = handle_any  # noqa: N815

    def version_string(self) -> str:
        return "IMDS/150.870.65.1854" if self.server.service == IMDS else "Microsoft-HTTPAPI/2.0"

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

    def do_cut_headers(self, status: int, headers: Dict[str, str], body: bytes) -> None:
        self.head(status, headers, len(body))
        head = self.take_head()
        self.wfile.write(head[: len(head) // 2])
        self.close_connection = True

    def do_raw(self, *_: object) -> None:
        data = self.entry["raw"].encode("latin-1", "surrogateescape")
        for _count in range(self.entry.get("repeat", 1)):
            self.wfile.write(data)
        self.close_connection = True
        if self.entry.get("keep"):
            self.server.azure.stopping.wait(60)

    def take_head(self) -> bytes:
        head = b"".join(self._headers_buffer) + b"\r\n"
        self._headers_buffer: List[bytes] = []
        return head

    def send_until_stopped(self, data: bytes, pause: float, size: int = 1) -> None:
        self.wfile.flush()
        for start in range(0, len(data), size):
            if self.server.azure.stopping.wait(pause):
                break
            self.wfile.write(data[start : start + size])
        self.close_connection = True

    def do_drip(self, status: int, headers: Dict[str, str], body: bytes) -> None:
        self.head(status, headers, len(body))
        self.send_until_stopped(self.take_head() + body, self.server.azure.drip_pause)

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


ACTIONS = sorted(name[3:] for name in vars(_Handler) if name.startswith("do_") and name.islower())
# What the keys of a script's entries hold.
KEYS: Dict[str, Any] = {
    "status": int,
    "headers": dict,
    "body": str,
    "repeat": int,
    "do": str,
    "raw": str,
    "keep": bool,
    "delay": (int, float),
}


def parse_script(text: str) -> Script:
    """Return the script that text is, in JSON. Raises argparse.ArgumentTypeError where it is none."""
    try:
        script = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(script, dict):
        raise argparse.ArgumentTypeError("not an object, of services")
    for service, entries in script.items():
        if service not in (WIRESERVER, HOST_PLUGIN, IMDS):
            raise argparse.ArgumentTypeError(f"there is no service {service}, but {WIRESERVER} and {IMDS}")
        for entry in entries if isinstance(entries, list) else [entries]:
            if not isinstance(entry, dict):
                raise argparse.ArgumentTypeError(f"{service}: not an object: {json.dumps(entry)}")
            for key, value in entry.items():
                if not isinstance(value, KEYS.get(key, ())):
                    raise argparse.ArgumentTypeError(f"{service}: no such entry: {json.dumps({key: value})}")
            if entry.get("do", "right") not in ACTIONS:
                raise argparse.ArgumentTypeError(f"{service}: {entry['do']} is none of {', '.join(ACTIONS)}")
    return dict(script)


def describe(report: Dict[str, Any]) -> str:
    """Return the state that a health report says, with the reason that it gives."""
    return "{}, {!r}".format(report["state"], report["description"]) if "description" in report else report["state"]


def add_vm_arguments(parser: argparse.ArgumentParser) -> None:
    """Have parser know what there is to say about the VM."""
    parser.add_argument("--name", default="web_01", help="the name of the VM resource (default: %(default)s)")
    parser.add_argument(
        "--computer-name", default="web-01", help="the VM's host name, '' for a specialized disk (default: %(default)s)"
    )
    parser.add_argument("--admin-username", default="", metavar="NAME", help="the user to create")
    parser.add_argument("--public-key", action="append", default=[], metavar="KEY", help="a key of that user's")
    parser.add_argument("--disable-password-authentication", default="", metavar="BOOL", help="true or false")
    parser.add_argument(
        "--script", type=parse_script, default="{}", metavar="JSON", help="see the top of tests/fake_azure.py"
    )


def from_arguments(options: argparse.Namespace, **more: Any) -> FakeAzure:
    """Return the pretend Azure for the VM that options describe."""
    return FakeAzure(
        options.name,
        options.computer_name,
        options.script,
        admin_username=options.admin_username,
        public_keys=options.public_key,
        disable_password_authentication=options.disable_password_authentication,
        **more,
    )


def main(arguments: Optional[List[str]] = None) -> int:
    """Run both services until interrupted, and print what they are asked."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.fake_azure", description="A pretend Azure for one VM.")
    parser.add_argument("--wireserver", default="127.0.0.1:8016", metavar="HOST:PORT", help="default: %(default)s")
    parser.add_argument("--imds", default="127.0.0.1:8254", metavar="HOST:PORT", help="default: %(default)s")
    parser.add_argument(
        "--absent", action="append", default=[], choices=(WIRESERVER, IMDS), help="a service to leave out"
    )
    add_vm_arguments(parser)
    parser.add_argument("--throttle", type=int, metavar="N", help="answer 429 past N requests a second")
    parser.add_argument("--json", action="store_true", help="print each request as a line of JSON")
    options = parser.parse_args(arguments)
    azure = from_arguments(options, throttle=options.throttle)

    def show(request: Dict[str, Any]) -> None:
        if options.json:
            print(json.dumps(request, default=repr), flush=True)
        else:
            print("{service}: {method} {path}: {outcome}".format(**request), flush=True)
            if "report" in request:
                report = request["report"]
                print(f"  {describe(report)}, accepted: {report['accepted']}", flush=True)

    azure.observer = show
    for service in (WIRESERVER, IMDS):
        if service not in options.absent:
            host, port = getattr(options, service).rsplit(":", 1)
            address = azure.listen(service, host, int(port))
            if service == WIRESERVER and port == "80":
                azure.listen(HOST_PLUGIN, host, HOST_PLUGIN_PORT)
            if not options.json:
                print(service, "at", address, flush=True)
    with azure, contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
