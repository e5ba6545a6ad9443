#!/usr/bin/python3 -IS
"""Give an Azure VM its host name, and tell Azure that the VM is ready.

This is a whole provisioning agent: without arguments it asks the Instance Metadata Service (IMDS) for the name that
the VM was created with, sets it, and then reports Ready to the WireServer. A VM that does not report Ready is declared
failed by the platform and restarted. On request it also makes the user that the VM was created with.

It runs as root at the first boot of every VM made from an image, on a network that is just coming up and against
services that answer late, wrongly or not at all. So it keeps trying, believes nothing it is told, and depends on
nothing but Python's standard library, 3.6 or later. It is read from a cold disk and waited for: import nothing here
that is not needed on the way to Ready.

The sections are in the order in which a VM lives them:

    Messages, Trying again, Transport    what all others use
    WireServer                           the report: Ready, or why not
    IMDS                                 what the VM was created with
    Files and programs, Host name        the name, here and in the files that repeat it
    The lease                            has the DHCP client send a name that was changed: the DNS has it from there
    The steps, and the command line      main() runs the steps in their order
    The user                             for those who ask for it (install.sh --user); nobody else passes through it

The page it stands in for: https://learn.microsoft.com/azure/virtual-machines/linux/no-agent
"""

import collections
import contextlib
import os
import socket
import stat
import sys
import time
from xml.parsers import expat

# For mypy alone. So annotations of functions are in quotes; those of variables in them are not evaluated.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import pwd
    from typing import Callable, Dict, Iterator, List, Optional, Sequence, Tuple, TypeVar

    Result = TypeVar("Result")

__version__ = "1.1.0"

WIRESERVER = "168.63.129.16"  # https://learn.microsoft.com/azure/virtual-network/what-is-ip-address-168-63-129-16
WIRESERVER_TIMEOUT = 1200.0  # seconds, after as many for network and IMDS; the platform gives up in 20 to 40 minutes
IMDS = "169.254.169.254"  # https://learn.microsoft.com/azure/virtual-machines/instance-metadata-service
IMDS_TIMEOUT = 120.0  # seconds with a network; Ready waits for it, so it is a small part of WIRESERVER_TIMEOUT
IMDS_TIMEOUT_FOR_USER = 300.0  # without its user the VM is useless, so this is as long as cloud-init waits

REQUEST_LIMIT = 10.0  # seconds for one request and its answer, whatever the peer does
FIRST_PAUSE = 0.25  # seconds between the starts of two attempts, then twice that, and so on
LONGEST_PAUSE = 5.0
LONGEST_RETRY_AFTER = 30.0
LAST_ATTEMPT = 1.0  # seconds that are left for it at the end of a timeout
TELL_AGAIN = 60.0  # seconds after which a failure that has not changed is told once more


class ProvisioningError(Exception):
    """What can go wrong in a VM, in one line: what was asked, of whom, and what came back.

    status is that of the HTTP answer, 0 if there was none; retry_after are the seconds that the service asked to wait.
    """

    def __init__(self, message: str, status: int = 0, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


# Messages: one line each, and none of them is worth stopping for.

ERROR, WARNING, INFO, DEBUG = 3, 4, 6, 7  # as in syslog(3)
log_level = INFO


def log(priority: int, message: str) -> None:
    """Write message as one line: to stderr if priority is WARNING or ERROR, else to stdout.

    Lines for the journal carry their priority, see sd-daemon(3). A line that cannot be written is lost: os.write()
    leaves nothing in a buffer, which would fail once more when the interpreter exits.
    """
    if priority > log_level:
        return
    line = printable(message) + "\n"
    with contextlib.suppress(OSError):
        if priority <= WARNING:
            stderr = os.fstat(2)
            if os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}":
                line = f"<{priority}>{line}"
        os.write(2 if priority <= WARNING else 1, line.encode())


def printable(text: str) -> str:
    """Return text with spaces for line breaks, control characters, and what else has no place in a line or in XML."""
    return "".join(char if char.isprintable() else " " for char in text)


# Trying again: on a network that is coming up, a refusal now is an answer in a minute.


def keep_trying(attempt: "Callable[[float], Result]", timeout: float) -> "Result":
    """Call attempt with a deadline, a time of time.monotonic(), and return what it returns.

    If it raises ProvisioningError, whatever the reason, it is called again until timeout, in seconds, is over; then
    the last one is raised.
    """
    end = time.monotonic() + timeout
    latest = end - LAST_ATTEMPT
    pause = FIRST_PAUSE
    last_told, tell_again = "", 0.0
    while True:
        begun = time.monotonic()
        try:
            return attempt(end)
        except ProvisioningError as error:
            failure = error
        now = time.monotonic()
        if now >= latest:
            raise ProvisioningError(f"{failure}; gave up after {timeout:g} s")
        if str(failure) != last_told or now >= tell_again:
            log(WARNING, f"{failure}; trying again, for {end - now:.0f} s at most")
            last_told, tell_again = str(failure), now + TELL_AGAIN

        import random  # here, because most VMs need it never, and it takes a tenth of what the step ready takes

        # Pauses count from the start of an attempt: a service that comes back is found within LONGEST_PAUSE, also when
        # an attempt takes long to fail. They vary by chance, so that VMs started together spread out.
        regular = begun + pause * random.uniform(0.5, 1)
        soonest = now + FIRST_PAUSE * random.uniform(0.5, 1)  # after an attempt that took longer than its pause
        asked_for = now + min(failure.retry_after, LONGEST_RETRY_AFTER)
        time.sleep(min(max(regular, soonest, asked_for), latest) - now)
        pause = min(pause * 2, LONGEST_PAUSE)


# Transport: one request over one connection. http.client is not used: it knows no deadline, takes the end of the stream
# for the end of the headers, and has the email package parse them. https://www.rfc-editor.org/rfc/rfc9112

ANSWER_LIMIT = 1 << 20  # bytes of an answer, headers and all; the longest real one has some 4 KiB


def exchange(
    address: str, deadline: float, method: str, path: str, headers: "Dict[str, str]", body: bytes = b""
) -> str:
    """Send one request to address (HOST[:PORT]) and return the text of the answer.

    Redirects are not followed and proxies not used. Raises ProvisioningError if there is no complete answer within
    REQUEST_LIMIT and before time.monotonic() is deadline, if its status is not 2xx, or if it is longer than
    ANSWER_LIMIT or not UTF-8.
    """
    asked = f"{method} http://{address}{path}"
    host, _, port = address.partition(":")
    lines = [f"{method} {path} HTTP/1.1", f"Host: {address}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    request = "".join(line + "\r\n" for line in [*lines, ""]).encode("ascii") + body
    begun = time.monotonic()
    end = min(deadline, begun + REQUEST_LIMIT)
    answer = None
    received = b""

    def time_left() -> float:
        seconds = end - time.monotonic()
        if seconds <= 0:
            raise socket.timeout
        return seconds

    try:
        with socket.socket() as connection:
            if host in (WIRESERVER, IMDS):  # and not one that was given by hand
                use_default_interface(connection, host)
            connection.settimeout(time_left())
            connection.connect((host, int(port or 80)))
            connection.settimeout(time_left())
            connection.sendall(request)
            while answer is None:
                connection.settimeout(time_left())
                piece = connection.recv(1 << 16)
                received += piece
                if len(received) > ANSWER_LIMIT:
                    raise ValueError(f"an answer of more than {ANSWER_LIMIT} bytes")
                answer = parse_answer(received, ended=not piece)
        status, reason, retry_after, content = answer
        is_success = 200 <= status < 300
        text = content.decode("utf-8-sig", "strict" if is_success else "replace")
    except socket.timeout as error:
        raise ProvisioningError(f"{asked}: no complete answer within {max(end - begun, 0):.2g} s") from error
    except (OSError, ValueError) as error:
        raise ProvisioningError(f"{asked}: {error!s:.200}") from error
    if not is_success:
        import re

        # The errors of the WireServer are pages of HTML.
        detail = " ".join(re.sub("<[^<>]*>", " ", text[:1000]).split()) or reason
        raise ProvisioningError(f"{asked}: status {status} {detail:.200}", status, retry_after)
    return text


def check_route(address: str) -> None:
    """Raise ProvisioningError while there is no route to address (HOST[:PORT]). Sends nothing."""
    host = address.partition(":")[0]
    # That to IMDS may be there before there is a lease: a DHCP client may have given itself an address beside it.
    host = WIRESERVER if host == IMDS else host
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 80))
    except OSError as error:
        raise ProvisioningError(f"no route to {host}: {error}") from error


def use_default_interface(connection: socket.socket, host: str) -> None:
    """If a route leads to host by another interface than the default route's, bind connection to that of the latter.

    On others than the VM's first nobody answers for Azure, but 168.63.129.16 is the DNS server of each:
    https://github.com/flatcar/init/pull/109. Before Linux 5.7 this takes CAP_NET_RAW. It is not done without need, for
    the proxy of the Metadata Security Protocol has connections end on the loopback interface.
    """
    address = int.from_bytes(socket.inet_aton(host), "little")
    interface = default_interface()
    leading = [name for name, network, mask, _ in ipv4_routes() if mask and address & mask == network]
    if any(name != interface for name in leading):
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())


def default_interface() -> str:
    """Return the interface of the IPv4 default route, the preferred one if there are several; '' if there is none."""
    return min([(metric, name) for name, _, mask, metric in ipv4_routes() if not mask], default=(0, ""))[1]


def ipv4_routes() -> "List[Tuple[str, int, int, int]]":
    """Return the interface, destination, mask and metric of each route; see proc_net(5), numbers are little-endian."""
    rows = []
    with contextlib.suppress(OSError), open("/proc/self/net/route", encoding="ascii", errors="replace") as file:
        rows = [line.split() for line in file][1:]  # Iface Destination Gateway Flags RefCnt Use Metric Mask ...
    return [
        (name, int(network, 16), int(mask, 16), int(metric)) for name, network, _, _, _, _, metric, mask, *_ in rows
    ]


def parse_answer(received: bytes, ended: bool) -> "Optional[Tuple[int, str, float, bytes]]":
    """Return status, reason, seconds of Retry-After and body of the HTTP answer received; None while it is incomplete.

    ended says that nothing more will come. Raises ValueError if this is not, or will not become, an HTTP answer.
    """
    head, separator, rest = received.partition(b"\r\n\r\n")
    if not separator:
        if ended:
            raise ValueError("the answer ends before its body" if received else "the connection ended, no answer")
        return None
    status_line, *lines = head.split(b"\r\n")
    version, _, outcome = status_line.partition(b" ")
    status, _, reason = outcome.partition(b" ")
    if version not in (b"HTTP/1.0", b"HTTP/1.1") or len(status) != 3 or not status.isdigit() or status < b"100":
        raise ValueError(f"not an HTTP answer: {status_line!r:.80}")
    fields: Dict[bytes, bytes] = {}
    for line in lines:
        name, _, value = line.partition(b":")
        fields.setdefault(name.lower(), value.strip())
    length, coding, pause = map(fields.get, (b"content-length", b"transfer-encoding", b"retry-after"))
    body: Optional[bytes]
    if coding is not None:
        if coding.lower() != b"chunked":
            raise ValueError(f"an encoding that was not asked for: {coding!r:.80}")
        body = join_chunks(rest)
    elif length is not None:
        if not length.isdigit() or len(length) > 15:
            raise ValueError(f"not a length: {length!r:.80}")
        body = rest[: int(length)] if len(rest) >= int(length) else None
    elif status == b"204":
        body = b""
    else:
        body = rest if ended else None
    if body is None:
        if ended:
            raise ValueError(f"the answer ends in its body, after {len(rest)} bytes")
        return None
    # Retry-After may be a date as well, which says nothing while the clock is not set.
    retry_after = float(pause) if pause and pause.isdigit() else 0.0
    return int(status), reason.decode("latin-1"), retry_after, body


def join_chunks(data: bytes) -> "Optional[bytes]":
    """Return the body that data holds in chunks, None while the last is missing. Raises ValueError for a wrong one."""
    body: List[bytes] = []
    position = 0
    while True:
        line_end = data.find(b"\r\n", position)
        if line_end == -1:
            return None
        size = data[position:line_end].partition(b";")[0].strip()
        if not 0 < len(size) < 9 or size.strip(b"0123456789abcdefABCDEF"):
            raise ValueError(f"not a chunk: {data[position:line_end]!r:.80}")
        length = int(size, 16)
        if length == 0:  # fields may follow it, and an empty line does
            return b"".join(body) if data.find(b"\r\n\r\n", line_end) >= 0 else None
        start = line_end + 2
        end = start + length
        position = end + 2
        if not b"\r\n".startswith(data[end:position]):  # as much of it as is here
            raise ValueError("a chunk is longer than it says")
        if len(data) < position:
            return None
        body.append(data[start:end])


# WireServer: the goal state names this VM, the health report says how it is.

WIRESERVER_HEADERS = {
    "x-ms-version": "2012-11-30",
    "x-ms-agent-name": "azure-provisioning",
    "x-ms-guest-agent-name": f"azure-provisioning/{__version__}",
    "User-Agent": f"azure-provisioning/{__version__}",
}
DESCRIPTION_LIMIT = 512  # characters, as others cut it
HEALTH_REPORT = """<?xml version="1.0" encoding="utf-8"?>
<Health>
  <GoalStateIncarnation>{incarnation}</GoalStateIncarnation>
  <Container>
    <ContainerId>{container_id}</ContainerId>
    <RoleInstanceList>
      <Role>
        <InstanceId>{instance_id}</InstanceId>
        <Health>{health}</Health>
      </Role>
    </RoleInstanceList>
  </Container>
</Health>
"""
READY = "<State>Ready</State>"
NOT_READY = """<State>NotReady</State>
          <Details><SubStatus>ProvisioningFailed</SubStatus><Description>{}</Description></Details>"""

# Where the goal state has what identifies this VM, and its names in HEALTH_REPORT.
IDENTIFIERS = {
    ("GoalState", "Incarnation"): "incarnation",
    ("GoalState", "Container", "ContainerId"): "container_id",
    ("GoalState", "Container", "RoleInstanceList", "RoleInstance", "InstanceId"): "instance_id",
}


def parse_goal_state(text: str) -> "Dict[str, str]":
    """Return the identifiers of this VM by their names. Raises ValueError if text is no goal state, or lacks one."""
    path: List[str] = []
    goal_state: Dict[str, str] = {}

    def refuse(*_: object) -> None:
        raise ValueError("it has a DOCTYPE, and so entities, which can multiply")

    def keep(data: str) -> None:
        name = IDENTIFIERS.get(tuple(path[:6]))  # 6, for what lies deeper than the longest is none of them
        if name:
            goal_state.setdefault(name, data.strip())  # the first of each

    parser = expat.ParserCreate("utf-8")
    parser.buffer_text = True
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = lambda name, _: path.append(name)
    parser.EndElementHandler = lambda _: path.pop()
    parser.CharacterDataHandler = keep
    try:
        parser.Parse(text, True)
    except expat.ExpatError as error:
        raise ValueError(f"it is not XML: {error}") from error
    missing = [name for name in IDENTIFIERS.values() if not goal_state.get(name)]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    return goal_state


def health_report(goal_state: "Dict[str, str]", failure: "Optional[str]" = None) -> bytes:
    """Return the XML that reports Ready, or, for a failure, NotReady with it as the description."""
    escapes = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
    health = READY
    if failure is not None:
        health = NOT_READY.format(printable(failure[:DESCRIPTION_LIMIT]).translate(escapes))
    identifiers = {name: value.translate(escapes) for name, value in goal_state.items()}
    return HEALTH_REPORT.format(health=health, **identifiers).encode()


def report_health(address: str, deadline: float, failure: "Optional[str]" = None, dry_run: bool = False) -> None:
    """Fetch the goal state and report Ready for it, or NotReady with the failure as its description.

    Both are one attempt, for a report for another incarnation than the current one, or for another container, is
    answered 410: https://github.com/coreos/afterburn/issues/461. Raises ProvisioningError if either fails.
    """
    text = exchange(address, deadline, "GET", "/machine?comp=goalstate", WIRESERVER_HEADERS)
    log(DEBUG, f"{address} has the goal state {text:.3000}")
    try:
        goal_state = parse_goal_state(text)
    except ValueError as error:
        raise ProvisioningError(f"the goal state of {address}: {error!s:.200}") from error
    report = health_report(goal_state, failure)
    if dry_run:
        log(INFO, f"would report to {address}: {' '.join(report.decode().split())}")
        return
    headers = dict(WIRESERVER_HEADERS, **{"Content-Type": "text/xml;charset=utf-8"})
    exchange(address, deadline, "POST", "/machine?comp=health", headers, report)
    state = "Ready" if failure is None else "NotReady"
    log(INFO, f"reported {state} to {address}, incarnation {goal_state['incarnation']}")


# IMDS: what the VM was created with.

# extended=true: the service fails rather than answer with the part of the document that it has so far, see
# https://github.com/Azure/azure-init/issues/134
INSTANCE = "/metadata/instance?api-version=2021-08-01&extended=true"
OLD_NAME = "/metadata/instance/compute/name?api-version=2019-06-01&format=text"  # as the documentation's sample asks
OLD_IMDS_AFTER = 10.0  # seconds in which a 400 need not mean that it is old
HOST_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.-")  # see hostname(7)

# admin_username and public_keys are as they came, for the step user to judge. ignored is what we do nothing with.
Instance = collections.namedtuple("Instance", "name admin_username public_keys passwords_disabled ignored")


def fetch_instance(address: str, deadline: float, name_is_enough: bool) -> Instance:
    """Return what IMDS at address says of this VM; of one that is too old to tell, its name, if name_is_enough.

    Another service to learn that from has its place here; what takes no network, before provision() waits for one.
    Raises ProvisioningError if nothing that came back makes sense.
    """
    headers = {"Metadata": "true", "User-Agent": WIRESERVER_HEADERS["User-Agent"]}
    headers["x-ms-client-request-id"] = os.urandom(16).hex()
    try:
        try:
            return parse_instance(exchange(address, deadline, "GET", INSTANCE, headers))
        except ProvisioningError as error:
            if error.status != 400 or not name_is_enough:  # 400: it does not know this version (Azure Stack Hub)
                raise
            log(WARNING, f"{error}; taking the name of the VM resource from this old IMDS")
            return parse_old_name(exchange(address, deadline, "GET", OLD_NAME, headers))
    except ValueError as error:
        raise ProvisioningError(f"GET http://{address}/metadata/instance: {error}") from error


def parse_instance(text: str) -> Instance:
    """Return what the IMDS document text says. Raises ValueError if it is none, or one without a name.

    VMs made from specialized disks have no computer name, and are called after the VM resource.
    """
    import json  # here, because a VM that only reports Ready does without: a tenth of what that step takes

    try:
        document = json.loads(text, parse_int=float)  # int() of a million digits would take seconds
        compute = document["compute"]
        os_profile = compute.get("osProfile") or {}
        resource_name = compute["name"].strip()
        name = (os_profile.get("computerName") or "").strip() or resource_name
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        told = f"{type(error).__name__} {error!s:.100}"
        raise ValueError(f"not an instance document, but {text!r:.60}: {told}") from error
    if not resource_name:
        raise ValueError("an instance document without the name of the VM resource, and so not a whole one")
    ignored = []
    with contextlib.suppress(TypeError, KeyError):
        if str(document["extended"]["compute"]["hasCustomData"]).lower() == "true":
            ignored.append("custom data")
    if compute.get("userData"):
        ignored.append("user data")
        compute["userData"] = "..."  # not for the log: it may be secret
    if log_level == DEBUG:
        log(DEBUG, f"IMDS has the document {json.dumps(document):.3000}")
    # A string, but a boolean has been seen, too.
    passwords_disabled = str(os_profile.get("disablePasswordAuthentication")).lower() == "true"
    user, keys = os_profile.get("adminUsername") or "", compute.get("publicKeys") or []
    return Instance(name, user, keys, passwords_disabled, ignored)


def parse_old_name(text: str) -> Instance:
    """Return what an old IMDS tells, the name alone. Raises ValueError if text is no name."""
    name = text.strip()
    if not name or not HOST_CHARACTERS.issuperset(name.replace("_", "-")):
        raise ValueError(f"compute/name is no name: {name!r:.80}")
    return Instance(name, "", [], False, [])


def valid_host_name(name: str) -> str:
    """Return name as a valid host name, see hostname(7). Raises ProvisioningError if nothing of it can stay.

    VM resources may be called web_01, hosts may not.
    """
    labels = "".join(char if char in HOST_CHARACTERS else "-" for char in name[:64]).split(".")
    valid = ".".join(filter(None, (label.strip("-")[:63].rstrip("-") for label in labels)))
    if not valid:
        raise ProvisioningError(f"nothing of {name!r:.80} can be a host name")
    return valid


# Files and programs.

COMMAND_LIMIT = 15.0  # seconds
FILE_LIMIT = 1 << 22  # characters
SELINUX_LABEL = "security.selinux"
SELINUX = ("/sys/fs/selinux/enforce", "/etc/selinux/config")  # both are there where it is on and has a policy


def run(*command: str, limit: float = COMMAND_LIMIT) -> str:
    """Run command without a shell, for limit seconds at most, and return its output.

    Raises ProvisioningError unless it succeeds.
    """
    import subprocess  # here, because a VM that has its name already runs nothing

    asked = " ".join(command)
    try:
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            try:
                output = process.communicate(timeout=limit)[0].decode("utf-8", "replace").strip()
            except subprocess.TimeoutExpired as error:  # subprocess.run() of 3.6 then waits for who has its pipe
                process.kill()
                raise ProvisioningError(f"{asked}: no end within {limit:g} s") from error
    except OSError as error:
        raise ProvisioningError(f"{asked}: {error}") from error
    if process.returncode:
        raise ProvisioningError(f"{asked}: exit status {process.returncode}: {output[-400:]}")
    return output


def read_file(path: str) -> str:
    """Return the text in path, '' if there is no such file. Raises ProvisioningError if it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO would keep us waiting for its other end
        with open(descriptor, encoding="utf-8", errors="surrogateescape", newline="") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError("not a regular file")
            text = file.read(FILE_LIMIT + 1)
        if len(text) > FILE_LIMIT:
            raise OSError(f"more than {FILE_LIMIT} characters")
        return text
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ProvisioningError(f"read {path}: {error}") from error


def replace_file(path: str, text: str, mode: int = 0o644) -> None:
    """Make text the content of path, at once and for good: no power cut leaves a part of it, or the old one later.

    Symbolic links in path are followed. Raises ProvisioningError if it cannot be written.
    """
    path = os.path.realpath(path)
    temporary = path + ".azure-provisioning"
    has_label = False
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # what a link to /dev/null, say, leads to
            raise OSError("not a regular file")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)  # a power cut left it
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(descriptor, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            os.fchmod(descriptor, mode)  # whatever the umask is
            with contextlib.suppress(OSError):  # no such file yet, or no labels here
                label = os.getxattr(path, SELINUX_LABEL)  # which a rename would leave behind
                os.setxattr(descriptor, SELINUX_LABEL, label)
                has_label = True
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        os.rename(temporary, path)
        directory = os.open(os.path.dirname(path), os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise ProvisioningError(f"write {path}: {error}") from error
    if not has_label:
        restore_label(path)


def restore_label(path: str) -> None:
    """Give path, and what is below it, the labels that it should have by SELinux's policy, where there is one."""
    if all(map(os.path.exists, SELINUX)):
        try:
            run("restorecon", "-R", path)
        except ProvisioningError as error:
            log(WARNING, f"{error}; SELinux may keep others from {path}")


# The host name, here and in the files that repeat it.

ETC_HOSTNAME = "/etc/hostname"
ETC_HOSTS = "/etc/hosts"


def host_name_is(name: str) -> bool:
    """Whether the kernel and ETC_HOSTNAME both have name."""
    try:
        return os.uname().nodename == name and read_file(ETC_HOSTNAME).strip() == name
    except ProvisioningError:  # to write it will fail, too, and tell
        return False


def set_host_name(name: str) -> None:
    """Give this machine its name, now and for later boots. Raises ProvisioningError."""
    # NetworkManager learns a name from hostnamed alone, so there the name has to go through both. Elsewhere hostnamed
    # is spared: to start it takes 60 ms even from a warm disk.
    with contextlib.suppress(ProvisioningError):
        run("nmcli", "general", "hostname", name)
    if not host_name_is(name):  # nmcli is not there, or did not do all of it
        try:
            socket.sethostname(name)
        except OSError as error:
            raise ProvisioningError(f"sethostname {name}: {error}") from error
        finally:  # each of the two whatever becomes of the other
            replace_file(ETC_HOSTNAME, name + "\n")


def rename_in_hosts(text: str, name: str) -> str:
    """Return text, that of ETC_HOSTS, with the first host of the first line of 127.0.1.1 renamed to name.

    Debian's installer writes such a line: https://www.debian.org/doc/manuals/debian-reference/ch05#_the_hostname_resolution
    The host keeps its domain, unless name has one, and its short name; other names on that line stay, and a line that
    has name already stays as it is.
    """
    short, has_domain, _ = name.partition(".")
    lines = text.split("\n")
    for number, line in enumerate(lines):
        entry = line.partition("#")[0].rstrip()
        address, names = (*entry.split(None, 1), "", "")[:2]
        hosts = names.split()
        if address != "127.0.1.1" or not hosts:
            continue
        if name not in hosts:
            old, _, domain = hosts[0].partition(".")
            renamed = [f"{name}.{domain}", name] if domain and not has_domain else [name, short]
            renamed += [host for host in hosts if host.partition(".")[0] != old]
            lines[number] = entry[: -len(names)] + " ".join(dict.fromkeys(renamed)) + line[len(entry) :]
        break
    return "\n".join(lines)


def update_hosts(name: str, dry_run: bool = False) -> None:
    """Rename the host in ETC_HOSTS to name. Raises ProvisioningError if that cannot be read or written."""
    hosts = read_file(ETC_HOSTS)
    renamed = rename_in_hosts(hosts, name)
    if renamed != hosts:
        if not dry_run:
            replace_file(ETC_HOSTS, renamed)
        log(INFO, f"{'would rename' if dry_run else 'renamed'} 127.0.1.1 in {ETC_HOSTS} to {name}")


# The lease: the virtual network's DNS learns the name from a DHCP client that asks again, and leases there never end.

RENEWAL_LIMIT = 8.0  # seconds for each of the commands below, none of which waits longer, and for what they bring about

# A DHCP client, as its manual tells; {} is the interface. Of the fields,
#   asked     is a command, which prints
#   pattern   if the client has the lease of the interface,
#   commands  make it ask again under the new name, and wait for the answer,
#   lease     is a file that is written then, where none of them waits.
# Whoever adds one: the unit says what they may do, install.sh what each leaves behind and what binds it to one machine,
# tests/vm.py how it is set up, and the README names it.
Client = collections.namedtuple("Client", "asked pattern commands lease")
CLIENTS = (
    # systemd-networkd. Its `networkctl renew` does not send the name.
    Client(
        "networkctl --no-pager status {}",
        r"\(DHCP",
        ("networkctl reconfigure {}", "/lib/systemd/systemd-networkd-wait-online --interface={} --timeout=8"),
        "",
    ),
    # NetworkManager. Its `nmcli device reapply` does not send the name.
    Client("nmcli --get-values DHCP4.OPTION device show {}", ".", ("nmcli --wait 7 device connect {}",), ""),
    # dhclient of ifupdown, which has no unit of its own: one that we started by ifup would die with ours.
    Client(
        "systemctl --no-pager --full status", r"(?m)\bdhclient .* {}$", ("systemctl restart networking.service",), ""
    ),
    # dhcpcd. Keep it the last: where it does not run, to ask it logs an error.
    Client("dhcpcd --dumplease {}", "ip_address=", ("dhcpcd --renew {}",), "/var/lib/dhcpcd/{}.lease"),
)


def run_for(interface: str, command: str) -> str:
    """Run command for interface, whose place in it is {}, and return its output. Raises ProvisioningError."""
    return run(*(word.replace("{}", interface) for word in command.split()), limit=RENEWAL_LIMIT)


def find_client(interface: str) -> "Optional[Client]":
    """Return the DHCP client that has the lease of interface, None if that is none of CLIENTS."""
    import re

    for client in CLIENTS:
        with contextlib.suppress(ProvisioningError):
            if re.search(client.pattern.replace("{}", re.escape(interface)), run_for(interface, client.asked)):
                return client
    return None


def renew(client: Client, interface: str) -> None:
    """Have client ask for the lease of interface again, and wait for it. Raises ProvisioningError."""
    lease = client.lease.format(interface)
    written = modified(lease)
    for command in client.commands:
        run_for(interface, command)
    if lease and not wait_until(lambda: modified(lease) not in (0, written)):
        raise ProvisioningError(f"{client.commands[0].format(interface)}: no new lease within {RENEWAL_LIMIT:g} s")


def modified(path: str) -> int:
    """Return when the file path was written last, in nanoseconds; 0 if there is none."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def wait_until(condition: "Callable[[], bool]") -> bool:
    """Return True once condition() does, False if it does not within RENEWAL_LIMIT."""
    deadline = time.monotonic() + RENEWAL_LIMIT
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def publish_host_name(name: str, dry_run: bool = False) -> None:
    """Have the DHCP client of the default route send name to the virtual network's DNS, and wait for the lease.

    Best effort: trouble is one line that says what to do by hand.
    """
    advice = f"for other machines to resolve {name}, restart the DHCP client, or reboot"
    interface = default_interface()
    client = find_client(interface) if interface else None
    if not client:
        log(WARNING, f"found no DHCP lease to renew on {interface or 'a default route'}; {advice}")
        return
    command = client.commands[0].format(interface)
    if dry_run:
        log(INFO, f"would publish {name} by {command}")
        return
    started = time.monotonic()
    # Once more if the route has gone, for clients that hang have been seen; not if a command has failed.
    for is_first in (True, False):
        trouble = ""
        try:
            renew(client, interface)
        except ProvisioningError as error:
            trouble = str(error)
        if wait_until(lambda: default_interface() == interface):
            break
        trouble = f"{interface} has no default route after {trouble or command}"
        if is_first:
            log(WARNING, f"{trouble}; trying again")
    if trouble:
        log(WARNING, f"{trouble}; {advice}")
    else:
        log(INFO, f"published {name} by {command}, after {time.monotonic() - started:.1f} s")


# The steps, in the order in which a VM lives them, and the command line.


class Options:
    """The command line; the values here are those of a run without arguments."""

    steps: "Sequence[str]" = ("hostname", "ready")
    dry_run = False
    verbose = False
    fail: "Optional[str]" = None
    wireserver = WIRESERVER
    imds = IMDS
    wireserver_timeout = WIRESERVER_TIMEOUT
    imds_timeout: "Optional[float]" = None  # which depends on the steps
    timeout: "Optional[float]" = None  # for both, where it is given


def hostname_step(options: Options, instance: Instance) -> None:
    """Give the VM the name it was created with. Raises ProvisioningError."""
    name = valid_host_name(instance.name)
    if host_name_is(name):
        log(INFO, f"the host name is {name} already")
    else:
        old_name = os.uname().nodename
        if options.dry_run:
            log(INFO, f"would set the host name to {name}, now it is {old_name}")
        else:
            set_host_name(name)
            log(INFO, f"set the host name to {name}, it was {old_name}")
        publish_host_name(name, options.dry_run)
    update_hosts(name, options.dry_run)


def ready_step(options: Options, failure: "Optional[str]") -> None:
    """Report that the VM is ready, or the failure that keeps it from that. Raises ProvisioningError."""
    keep_trying(
        lambda deadline: report_health(options.wireserver, deadline, failure, options.dry_run),
        options.wireserver_timeout,
    )


# Ready comes last, for it is a promise: who is told that the VM is ready finds it under its name, and can log in.
STEPS = ("hostname", "user", "ready")


def provision(options: Options) -> "Dict[str, str]":
    """Run the steps, and return why those that failed did. One that fails does not keep the next from running.

    A name that could not be set keeps nobody out. A user that could not be made does, and so is reported to Azure.
    """
    failures: Dict[str, str] = {}
    instance: Optional[Instance] = None
    no_instance: Optional[Exception] = None
    if set(options.steps) != {"ready"}:
        timeout = options.imds_timeout or (IMDS_TIMEOUT_FOR_USER if "user" in options.steps else IMDS_TIMEOUT)

        def attempt(deadline: float) -> Instance:
            is_late = timeout - (deadline - time.monotonic()) > min(OLD_IMDS_AFTER, timeout / 2)
            return fetch_instance(options.imds, deadline, name_is_enough=is_late and "user" not in options.steps)

        try:
            # Its timeout begins when there is a network, if that comes in time for both IMDS and the report.
            keep_trying(lambda _: check_route(options.imds), max(options.wireserver_timeout - timeout, timeout))
            instance = keep_trying(attempt, timeout)
            for what in instance.ignored:
                log(WARNING, f"the VM was created with {what}, which nothing here reads")
        except Exception as error:
            no_instance = error
    for step in STEPS:
        if step not in options.steps:
            continue
        try:
            if step == "ready":
                ready_step(options, failures.get("user", options.fail))
            elif not instance:
                raise no_instance or AssertionError
            elif step == "user":
                user_step(options, instance)
            else:
                hostname_step(options, instance)
        except Exception as error:  # no bug of ours is to keep Azure from hearing of the VM, either
            failures[step] = f"{step} failed: {error if isinstance(error, ProvisioningError) else repr(error)}"
            log(ERROR, failures[step])
    return failures


def parse_arguments(arguments: "Sequence[str]") -> Options:
    """Return arguments as options. Exits with status 2 where they are wrong."""
    import argparse  # here, because systemd gives steps alone, and it takes a quarter of what the step ready takes
    import re

    def address(text: str) -> str:
        if not re.match(r"[A-Za-z0-9.-]+(:[0-9]{1,5})?\Z", text) or not 0 < int(text.partition(":")[2] or 80) < 65536:
            raise ValueError
        return text

    def seconds(text: str) -> float:
        if not 0 < float(text) < float("inf"):
            raise ValueError
        return float(text)

    parser = argparse.ArgumentParser(
        prog="azure-provisioning",
        description="Give this Azure VM the host name and the user that it was created with, and report it ready.",
        epilog="Exit status: 0 done, 1 a step failed, 2 usage.",
    )
    add = parser.add_argument
    add("--version", action="version", version="%(prog)s " + __version__)
    add("-v", "--verbose", action="store_true", help="show the services' answers")
    add("-n", "--dry-run", action="store_true", help="ask both services, but change nothing and report nothing")
    add("--wireserver", type=address, metavar="HOST[:PORT]", help="instead of " + WIRESERVER)
    add("--imds", type=address, metavar="HOST[:PORT]", help="instead of " + IMDS)
    limits = f"{WIRESERVER_TIMEOUT:g}, for IMDS {IMDS_TIMEOUT:g}, or {IMDS_TIMEOUT_FOR_USER:g} with the step user"
    add("--timeout", type=seconds, metavar="SECONDS", help=f"how long to keep trying each service (default: {limits})")
    add("--fail", metavar="REASON", help="report that provisioning failed, instead of running steps")
    steps = ", ".join(STEPS)
    default = " ".join(Options.steps)
    add("steps", nargs="*", metavar="STEP", help=f"{steps}, always in this order (default: {default})")
    options = parser.parse_args(arguments, namespace=Options())
    for step in options.steps:
        if step not in STEPS:
            parser.error(f"no such step: {step!r} (there are {steps})")
    if options.steps and options.fail is not None:
        parser.error("--fail replaces the steps: name none")
    options.steps = ("ready",) if options.fail is not None else options.steps or Options.steps
    if options.timeout:
        options.wireserver_timeout = options.imds_timeout = options.timeout
    return options


def main(arguments: "Optional[Sequence[str]]" = None) -> int:
    """Run the steps and return the exit status: 0 done, 1 a step failed. Usage errors exit with 2."""
    global log_level
    arguments = sys.argv[1:] if arguments is None else arguments
    options = Options()
    if set(arguments) <= set(STEPS):
        options.steps = arguments or options.steps
    else:
        options = parse_arguments(arguments)
    log_level = DEBUG if options.verbose else INFO
    failures = provision(options)
    if failures and "ready" in options.steps and not options.dry_run:
        if "ready" in failures:
            knows = "got no report, and will declare this VM failed"
        else:
            knows = "was told that provisioning failed" if "user" in failures else "was told Ready"
        log(ERROR, f"Azure {knows}; the unit, if it is enabled, does all of this again at the next boot")
    return 1 if failures else 0


# The user that the VM was created with: only for those who ask for the step user.

USER_NAME = r"(?![0-9]+\Z)[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}\Z"
ADMINISTRATORS = ("sudo", "wheel", "adm")  # the groups, of which each distribution has some
USER_DATABASE = "/etc"  # passwd(5), group(5), and what belongs to them
LOGIN_DEFS = "/etc/login.defs"
# The comment of a user that is being made, and of one whose home is being made, too.
UNFINISHED = "azure-provisioning is not done with this user"
UNFINISHED_HOME = UNFINISHED + ", nor with its home"
SUDOERS = "/etc/sudoers.d"
SSHD = "/usr/sbin/sshd"
SSHD_DROP_IN = "/etc/ssh/sshd_config.d/10-azure-provisioning.conf"  # sshd takes the first value that it reads
# What makes sshd take passwords; the third is what the second was called before OpenSSH 8.7.
PASSWORDS = ("PasswordAuthentication", "KbdInteractiveAuthentication", "ChallengeResponseAuthentication")


def user_step(options: Options, instance: Instance) -> None:
    """Make the user that the VM was created with, and let it in with its keys. Raises ProvisioningError."""
    import grp

    name = instance.admin_username
    if not name:
        log(INFO, "the VM was created without a user: nothing to do")
        return
    user = find_user(name)  # not yet to be used: undo_unfinished_users() may remove it
    keys = given_keys(instance)
    if not keys:
        log(WARNING, f"the VM was created without an SSH key for {name}, and IMDS has no passwords: it is not made")
        return
    if options.dry_run:
        log(INFO, f"would {'keep' if user else 'make'} the user {name}, SSH keys: {len(keys)}")
        return
    undo_unfinished_users()
    groups = {group.gr_name: group.gr_mem for group in grp.getgrall() if group.gr_name in ADMINISTRATORS}
    if not find_user(name):
        make_user(name, sorted(groups))
        log(INFO, f"made the user {name}")
    elif any(name not in members for members in groups.values()):
        run("usermod", "--append", "--groups", ",".join(sorted(groups)), "--", name)
    user = find_user(name)
    if not user:
        raise ProvisioningError(f"there is no user {name} after useradd made it")
    with as_user(user):
        add_keys(user.pw_dir, keys)
    allow_sudo(user)
    open_sshd(user, instance.passwords_disabled)
    log(INFO, f"{name} can log in, SSH keys: {len(keys)}")


# The user's keys.

KEY_LIMIT = 1 << 13  # characters; older sshds read no longer lines

# What sshd takes as a key, and of how many fields each consists: RFC 4253, 5656 and 8709, and OpenSSH's PROTOCOL.u2f
KEY_FIELDS = {
    "ssh-rsa": 3,
    "ssh-ed25519": 2,
    "ecdsa-sha2-nistp256": 3,
    "ecdsa-sha2-nistp384": 3,
    "ecdsa-sha2-nistp521": 3,
    "sk-ssh-ed25519@openssh.com": 3,
    "sk-ecdsa-sha2-nistp256@openssh.com": 4,
}
# A line: perhaps options, then the kind, the base64, and perhaps a comment.
OPTION = r'[A-Za-z0-9-]+(?:="(?:[^"\\]|\\.)*")?'
KIND = "|".join(KEY_FIELDS).replace(".", "[.]")
KEY = rf"((?:{OPTION}(?:,{OPTION})*\s+)?)({KIND})\s+([A-Za-z0-9+/]+={{0,2}})(?:\s+(.*))?\Z"


def is_key(kind: str, encoded: str) -> bool:
    """Whether encoded is the whole of an SSH public key of kind: fields, each with its length in front of it."""
    import binascii

    try:
        blob = binascii.a2b_base64(encoded)
    except ValueError:
        return False
    rest = blob
    for _ in range(KEY_FIELDS[kind]):
        end = 4 + int.from_bytes(rest[:4], "big")
        if not 4 < end <= len(rest):
            return False
        rest = rest[end:]
    return not rest and blob.startswith(len(kind).to_bytes(4, "big") + kind.encode())


def parse_keys(text: str) -> "Tuple[Dict[str, str], List[str]]":
    """Return the SSH keys in text, as lines of sshd(8)'s authorized_keys by their base64, and what in it is no key.

    Azure hands on what it was given: several keys in one, ends of lines of all kinds, lines broken within the base64.
    So what begins like a key is one, or goes on in the next line, or, where it has a comment already, is none.
    """
    import re

    keys: Dict[str, str] = {}
    rest: List[str] = []
    begun = ""
    text = re.sub(r"(?s)-----BEGIN ([A-Z0-9 ]+)-----.*?(?:-----END \1-----|\Z)", r"\n(\1)\n", text)
    for part in text.splitlines():
        line = printable(part).strip()
        if begun and re.match(KEY, line):
            rest.append(begun)
            begun = ""
        begun += line
        found = re.match(KEY, begun) if len(begun) <= KEY_LIMIT else None
        options, kind, encoded, comment = found.groups() if found else ("", "", "", "")
        if found and is_key(kind, encoded):
            keys.setdefault(encoded, " ".join(filter(None, (options.strip(), kind, encoded, comment))))
            begun = ""
        elif begun and (not found or comment):  # without a comment, its base64 may go on in the next line
            rest.append(begun)
            begun = ""
    return keys, [*rest, begun] if begun else rest


def given_keys(instance: Instance) -> "Dict[str, str]":
    """Return the SSH keys that the VM was created with, see parse_keys(), and tell what is none.

    Raises ProvisioningError if something was given, but no key.
    """
    if not isinstance(instance.public_keys, list):
        raise ProvisioningError(f"IMDS has publicKeys that are no list: {instance.public_keys!r:.60}")
    keys: Dict[str, str] = {}
    rest: List[str] = []
    for entry in instance.public_keys:
        text = entry.get("keyData") if isinstance(entry, dict) else None
        more, left_out = parse_keys(text) if isinstance(text, str) else ({}, [f"{entry!r}"])
        keys.update(more)
        rest += left_out
    for line in rest[:9]:
        log(WARNING, f"not an SSH key, which is a line of a .pub file; left out: {line:.24}")
    if rest and not keys:
        raise ProvisioningError("nothing of what was given as SSH keys is one")
    return keys


def find_user(name: str) -> "Optional[pwd.struct_passwd]":
    """Return the user called name, None if there is none. Raises ProvisioningError if name is not a person's."""
    import pwd
    import re

    if not isinstance(name, str) or not re.match(USER_NAME, name):
        raise ProvisioningError(f"{name!r:.80} cannot be the name of a user")
    try:
        user = pwd.getpwnam(name)
    except KeyError:
        return None
    limits = dict(re.findall(r"(?m)^(UID_MIN|UID_MAX)\s+([0-9]{1,9})\s*$", read_file(LOGIN_DEFS)))
    if not int(limits.get("UID_MIN", 1000)) <= user.pw_uid <= int(limits.get("UID_MAX", 60000)):
        raise ProvisioningError(f"the user {name} is not a person's: its ID is {user.pw_uid}")
    return user


def unlock_user_database() -> None:
    """Remove the locks that a power cut left: useradd would wait for their owners, and then fail.

    All tools that take them hold lckpwdf(3)'s lock meanwhile: while we have that one, all others are stale.
    """
    import fcntl

    try:
        with open(f"{USER_DATABASE}/.pwd.lock", "a") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for name in ("passwd", "shadow", "group", "gshadow", "subuid", "subgid"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{USER_DATABASE}/{name}.lock")
    except OSError as error:
        log(WARNING, f"{USER_DATABASE}/.pwd.lock: {error}; leaving the locks beside it alone")


def undo_unfinished_users() -> None:
    """Remove the user that a power cut left half made, with a home that was not there before. Raises ProvisioningError.

    It bears its mark in passwd(5), which useradd writes before all else, and which make_user() takes away in the end.
    """
    import pwd

    unlock_user_database()
    for user in pwd.getpwall():
        if user.pw_gecos.startswith(UNFINISHED):
            remove_home = ["--remove"] if user.pw_gecos == UNFINISHED_HOME else []
            run("userdel", "--force", *remove_home, "--", user.pw_name)
            log(INFO, f"removed the user {user.pw_name}, which was left unfinished")


def make_user(name: str, groups: "Sequence[str]") -> None:
    """Make the user name, with a home, no password, and groups. Raises ProvisioningError.

    useradd changes several files in turn, and a power cut can come between two: see undo_unfinished_users().
    """
    import grp

    home = f"/home/{name}"
    shell = "/bin/bash" if os.path.exists("/bin/bash") else "/bin/sh"
    mark = UNFINISHED if os.path.lexists(home) else UNFINISHED_HOME
    options = ["--no-log-init", "--create-home", "--home-dir", home, "--shell", shell, "--groups", ",".join(groups)]
    # "*", for without UsePAM sshd keeps out whose password is locked by "!". And what is no password must not expire.
    options += ["--password", "*", "--key", "PASS_MAX_DAYS=-1"]
    if name in [group.gr_name for group in grp.getgrall()]:  # of a package, say: useradd would refuse to make its own
        options.append("--no-user-group")
    try:
        run("useradd", "--comment", mark, *options, "--", name)
        os.sync()  # useradd leaves that to the kernel for what it puts into a home
        run("usermod", "--comment", "", "--", name)
    except ProvisioningError:
        with contextlib.suppress(ProvisioningError):
            undo_unfinished_users()  # at once: by the next boot somebody may have made this user by hand
        raise


@contextlib.contextmanager
def as_user(user: "pwd.struct_passwd") -> "Iterator[None]":
    """Have the rights of user and no more in the body of the with statement. Raises ProvisioningError.

    No link that the user has made leads where the user may not write. The real user ID remains root's, so that the
    user can neither signal nor trace this process.
    """
    groups = os.getgroups()
    try:
        try:
            os.initgroups(user.pw_name, user.pw_gid)
            os.setegid(user.pw_gid)
            os.seteuid(user.pw_uid)
            yield
        finally:
            os.seteuid(0)
            os.setegid(0)
            os.setgroups(groups)
    except OSError as error:
        raise ProvisioningError(f"as {user.pw_name}: {error}") from error


def add_keys(home: str, keys: "Dict[str, str]") -> None:
    """Add to the authorized_keys in home those of keys that are not there. To be called as the user."""
    directory = f"{home}/.ssh"
    path = f"{directory}/authorized_keys"
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory, 0o700)
    os.chmod(directory, 0o700)
    known = read_file(path)
    words = {word for line in known.splitlines() if not line.lstrip().startswith("#") for word in line.split()}
    missing = [line + "\n" for encoded, line in keys.items() if encoded not in words]
    if missing:
        end = "" if not known or known.endswith("\n") else "\n"
        replace_file(path, known + end + "".join(missing), 0o600)
    os.chmod(path, 0o600)
    restore_label(directory)


def allow_sudo(user: "pwd.struct_passwd") -> None:
    """Let user do everything without a password, where there is sudo. Raises ProvisioningError."""
    if os.path.isdir(SUDOERS):
        # The last rule that fits wins, so this comes after those of groups. In quotes, or a name may mean something
        # else in sudoers(5): ALL does. It skips files with a dot in their name.
        path = f"{SUDOERS}/zz-azure-provisioning-{user.pw_name.replace('.', '_')}"
        replace_file(path, f'"{user.pw_name}" ALL=(ALL:ALL) NOPASSWD:ALL\n', 0o440)


def open_sshd(user: "pwd.struct_passwd", passwords_disabled: bool) -> None:
    """Have sshd, if there is one, let user in, by keys only if passwords are disabled. Raises ProvisioningError."""
    if not os.path.exists(SSHD):
        return
    refuse_passwords = passwords_disabled and os.path.isdir(os.path.dirname(SSHD_DROP_IN))  # OpenSSH 8.2 and later
    if refuse_passwords:
        replace_file(SSHD_DROP_IN, "".join(f"{setting} no\n" for setting in PASSWORDS), 0o600)
    check_sshd(user, passwords_disabled)
    if refuse_passwords:
        # As patterns: what does not match a unit that is loaded is no error.
        run("systemctl", "--no-block", "try-reload-or-restart", "[s]sh.service", "[s]shd.service")


def check_sshd(user: "pwd.struct_passwd", passwords_disabled: bool) -> None:
    """Ask sshd whether it lets user in by the keys, and not by a password if that is disabled.

    Raises ProvisioningError if not: that is for the image to mend.
    """
    import fnmatch
    import grp
    import re

    name, home = user.pw_name, user.pw_dir
    try:
        here = "host=localhost,addr=127.0.0.1,laddr=127.0.0.1,lport=22"
        settings = run(SSHD, "-T", "-C", f"user={name},{here}")
    except ProvisioningError as error:
        if re.search(r"( line [0-9]+: |bad configuration|cannot be satisfied).*\Z", str(error)):  # as its last words
            with contextlib.suppress(OSError):
                os.unlink(SSHD_DROP_IN)  # it may be to blame, and sshd would not start any more
            raise
        # It wants a directory and keys that may come later in the boot.
        log(INFO, f"{error}; whether it lets {name} in is for its configuration to say")
        return

    def values(setting: str) -> "List[str]":
        return " ".join(re.findall(f"(?mi)^{setting} (.*)", settings)).split()  # in capitals since OpenSSH 10.6

    def fits(names: "List[str]", patterns: "List[str]") -> bool:
        return any(fnmatch.fnmatchcase(one, pattern) for one in names for pattern in patterns)

    wrong = [setting for setting in PASSWORDS if passwords_disabled and values(setting) == ["yes"]]
    if values("PubkeyAuthentication") == ["no"]:
        wrong.append("PubkeyAuthentication")
    methods = values("AuthenticationMethods")
    if methods and not {"any", "publickey"} & {*methods}:
        wrong.append("AuthenticationMethods")
    files = [path.replace("%h", home).replace("%u", name) for path in values("AuthorizedKeysFile")]
    if files and not {".ssh/authorized_keys", f"{home}/.ssh/authorized_keys"} & {*files}:
        wrong.append("AuthorizedKeysFile")
    groups = [group.gr_name for group in grp.getgrall() if name in group.gr_mem or group.gr_gid == user.pw_gid]
    for kind, names in (("Users", [name]), ("Groups", groups)):
        allowed = [pattern.partition("@")[0] for pattern in values("Allow" + kind)]  # NAME@HOST: one host is enough
        if allowed and not fits(names, allowed):
            wrong.append("Allow" + kind)
        if fits(names, values("Deny" + kind)):
            wrong.append("Deny" + kind)
    if wrong:
        told = ", ".join(" ".join([setting, *values(setting)]) for setting in wrong)
        raise ProvisioningError(f"sshd has {told}, and keeps {name} out or lets others in: mend the image")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
