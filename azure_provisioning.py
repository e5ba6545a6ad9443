#!/usr/bin/python3 -IS
"""Give an Azure VM its host name, and tell Azure that the VM is ready.

This is a whole provisioning agent: without arguments it asks the Instance Metadata Service (IMDS) for the name that
the VM was created with, sets it, and then reports Ready to the WireServer. A VM that does not report Ready is declared
failed by the platform and restarted. On request it also makes the user that the VM was created with.

It runs as root at the first boot of every VM made from an image, before anybody can log in, on a network that is just
coming up and against services that answer late, wrongly or not at all. So it keeps trying, believes nothing it is told,
and depends on nothing but Python's standard library, 3.6 or later. It is read from a cold disk and waited for: import
nothing here that is not needed on the way to Ready.

The page it stands in for: https://learn.microsoft.com/azure/virtual-machines/linux/no-agent
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is no traceback, nor is it one while the rest is imported

import contextlib
import functools
import os
import re
import socket
import stat
import sys
import time
from xml.etree import ElementTree

TYPE_CHECKING = False  # typing is for mypy alone
if TYPE_CHECKING:
    import pwd
    from typing import Callable, Dict, Iterator, List, Optional, Sequence, Tuple, TypeVar, Union

    Result = TypeVar("Result")

__version__ = "1.1.0"

WIRESERVER = "168.63.129.16"  # https://learn.microsoft.com/azure/virtual-network/what-is-ip-address-168-63-129-16
WIRESERVER_TIMEOUT = 1200.0  # seconds; the platform gives up on a VM after 20 to 40 minutes
IMDS = "169.254.169.254"  # https://learn.microsoft.com/azure/virtual-machines/instance-metadata-service
IMDS_TIMEOUT = 120.0  # seconds; Ready waits for it, so it is a small part of the other

ATTEMPT_LIMIT = 10.0  # seconds for one attempt, whatever the peer does
FIRST_PAUSE = 0.25  # seconds between the starts of two attempts, then twice that, and so on
LONGEST_PAUSE = 5.0
LONGEST_RETRY_AFTER = 30.0
LAST_ATTEMPT = 1.0  # seconds that are left for it at the end of a timeout


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
    line = "".join(char if char.isprintable() else " " for char in message) + "\n"
    with contextlib.suppress(OSError):
        if priority <= WARNING:
            stderr = os.fstat(2)
            if os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}":
                line = f"<{priority}>{line}"
        os.write(2 if priority <= WARNING else 1, line.encode("utf-8", "backslashreplace"))


def open_standard_streams() -> None:
    """Open those of the three standard streams that are closed, or a message would go into the next socket's."""
    with contextlib.suppress(OSError):  # no /dev/null is no reason not to report
        while True:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor > 2:
                os.close(descriptor)
                return


# Trying again: on a network that is coming up, a refusal now is an answer in a minute.


def keep_trying(attempt: "Callable[[float], Result]", timeout: float) -> "Result":
    """Call attempt with a deadline, a time of time.monotonic(), and return what it returns.

    If it raises ProvisioningError, whatever the reason, it is called again until timeout, in seconds, is over; then
    the last one is raised.
    """
    end = time.monotonic() + timeout
    pause = FIRST_PAUSE
    while True:
        started = time.monotonic()
        try:
            return attempt(min(started + ATTEMPT_LIMIT, end))
        except ProvisioningError as error:
            failure = error
        now = time.monotonic()
        latest = end - LAST_ATTEMPT
        if now >= latest:
            raise ProvisioningError(f"{failure}; gave up after {timeout:g} s")

        import random  # here, because most VMs need it never, and it takes a tenth of what the step ready takes

        # Pauses count from the start of an attempt: a service that comes back is found within LONGEST_PAUSE, also when
        # an attempt takes long to fail. They vary by chance, so that VMs started together spread out.
        regular = started + pause * random.uniform(0.5, 1)
        soonest = now + FIRST_PAUSE * random.uniform(0.5, 1)
        asked_for = now + min(failure.retry_after, LONGEST_RETRY_AFTER)
        wait = min(max(regular, soonest, asked_for), latest) - now
        log(WARNING, f"{failure}; trying again in {wait:.1f} s")
        time.sleep(wait)
        pause = min(pause * 2, LONGEST_PAUSE)


# Transport: one request over one connection. http.client is not used: it knows no deadline, takes the end of the stream
# for the end of the headers, and has the email package parse them. https://www.rfc-editor.org/rfc/rfc9112

ANSWER_LIMIT = 1 << 20  # bytes of an answer, headers and all; the longest real one has some 4 KiB
HEADERS_LIMIT = 1 << 16


def exchange(
    address: str, deadline: float, method: str, path: str, headers: "Dict[str, str]", body: bytes = b""
) -> str:
    """Send one request to address (HOST[:PORT]) and return the text of the answer.

    Redirects are not followed and proxies not used. Raises ProvisioningError if there is no complete answer when
    time.monotonic() is deadline, if its status is not 2xx, or if it is longer than ANSWER_LIMIT or not UTF-8.
    """
    asked = f"{method} http://{address}{path}"
    host, _, port = address.partition(":")
    lines = [f"{method} {path} HTTP/1.1", f"Host: {address}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    request = "\r\n".join([*lines, "\r\n"]).encode("ascii") + body
    limit = deadline - time.monotonic()
    answer = None
    received = b""
    try:
        with socket.socket() as connection:
            connection.settimeout(seconds_until(deadline))
            connection.connect((host, int(port or 80)))
            connection.settimeout(seconds_until(deadline))
            connection.sendall(request)
            while answer is None:
                connection.settimeout(seconds_until(deadline))
                piece = connection.recv(1 << 16)
                received += piece
                if len(received) > ANSWER_LIMIT:
                    raise ValueError(f"an answer of more than {ANSWER_LIMIT} bytes")
                answer = parse_answer(received, ended=not piece)
        status, reason, retry_after, content = answer
        text = content.decode("utf-8-sig", "strict" if 200 <= status < 300 else "replace")
    except socket.timeout as error:
        raise ProvisioningError(f"{asked}: no complete answer within {max(limit, 0):.2g} s") from error
    except (OSError, ValueError) as error:
        raise ProvisioningError(f"{asked}: {error!s:.200}") from error
    log(DEBUG, f"{asked}: status {status}: {text:.3000}")
    if not 200 <= status < 300:
        # The errors of the WireServer are pages of HTML.
        detail = " ".join(re.sub("<[^<>]*>", " ", text[:1000]).split()) or reason
        raise ProvisioningError(f"{asked}: status {status} {detail:.200}", status, retry_after)
    return text


def seconds_until(deadline: float) -> float:
    """Return the seconds until time.monotonic() is deadline. Raises socket.timeout if it is."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise socket.timeout
    return seconds


def parse_answer(received: bytes, ended: bool) -> "Optional[Tuple[int, str, float, bytes]]":
    """Return status, reason, seconds of Retry-After and body of the HTTP answer received; None while it is incomplete.

    ended says that nothing more will come. Raises ValueError if this is not, or will not become, an HTTP answer.
    """
    head, separator, rest = received.partition(b"\r\n\r\n")
    if len(head) > HEADERS_LIMIT:
        raise ValueError(f"headers of more than {HEADERS_LIMIT} bytes")
    if not separator:
        if ended:
            raise ValueError("the answer ends before its body" if received else "the connection ended, no answer")
        return None
    status_line, *lines = head.decode("latin-1").split("\r\n")
    found = re.match(r"HTTP/1\.[01] ([1-9][0-9][0-9])(?: (.*))?\Z", status_line)
    if not found:
        raise ValueError(f"not an HTTP answer: {status_line!r:.80}")
    status = int(found.group(1))
    fields: Dict[str, List[str]] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not re.match(r"[!#-'*+.^-z|~0-9A-Z-]+\Z", name):
            raise ValueError(f"not a header: {line!r:.80}")
        fields.setdefault(name.lower(), []).append(value.strip(" \t"))
    lengths = fields.get("content-length", [])
    body: Optional[bytes] = rest
    if "transfer-encoding" in fields:
        if lengths or [coding.lower() for coding in fields["transfer-encoding"]] != ["chunked"]:
            raise ValueError(f"contradictory headers: {fields!s:.100}")
        body = join_chunks(rest)
    elif lengths:
        if len(set(lengths)) > 1 or not re.match(r"[0-9]{1,15}\Z", lengths[0]):
            raise ValueError(f"not a length: {lengths!s:.80}")
        body = rest[: int(lengths[0])] if len(rest) >= int(lengths[0]) else None
    elif status == 204:
        body = b""
    elif not ended:
        body = None
    if body is None:
        if ended:
            raise ValueError(f"the answer ends in its body, after {len(rest)} bytes")
        return None
    # Its other form, a date, is nothing for a clock that may not be set yet.
    pauses = [float(value) for value in fields.get("retry-after", []) if re.match(r"[0-9]{1,9}\Z", value)]
    return status, found.group(2) or "", max(pauses, default=0.0), body


def join_chunks(data: bytes) -> "Optional[bytes]":
    """Return the body that data holds in chunks, None while the last is missing. Raises ValueError if one is none."""
    body: List[bytes] = []
    position = 0
    while True:
        end = data.find(b"\r\n", position)
        if end < 0:
            return None
        size = re.match(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;.*)?\Z", data[position:end])
        if not size:
            raise ValueError(f"not a chunk: {data[position:end]!r:.80}")
        length = int(size.group(1), 16)
        if length == 0:  # fields may follow it, and an empty line does
            return b"".join(body) if data.find(b"\r\n\r\n", end) >= 0 else None
        start, position = end + 2, end + 2 + length
        after = data[position : position + 2]
        if not b"\r\n".startswith(after):
            raise ValueError("a chunk is longer than it says")
        if len(after) < 2:
            return None
        body.append(data[start:position])
        position += 2


# WireServer: the goal state names this VM, the health report says how it is.

WIRESERVER_HEADERS = {"x-ms-version": "2012-11-30", "x-ms-agent-name": "azure-provisioning"}
DESCRIPTION_LIMIT = 512  # characters
GOAL_STATE_LIMIT = 1 << 14  # characters; a real one has some 4 KiB


def fetch_goal_state(address: str, deadline: float) -> "Dict[str, str]":
    """Return ContainerId, InstanceId and Incarnation of the WireServer's goal state.

    Raises ProvisioningError if there is no answer, or if it is not a goal state with all three.
    """
    text = exchange(address, deadline, "GET", "/machine?comp=goalstate", WIRESERVER_HEADERS)
    # The parser copies a namespace into each name that is in it: a mebibyte would become gigabytes.
    if len(text) > GOAL_STATE_LIMIT:
        raise ProvisioningError(f"the goal state of {address} has more than {GOAL_STATE_LIMIT} characters: refused")
    # Entities that multiply are looked for in the text, not by the parser that would expand them. To it a NUL means
    # UTF-16, whatever encoding it is told, and the declaration would be other bytes.
    if "<!DOCTYPE" in text or "\0" in text:
        raise ProvisioningError(f"the goal state of {address} has a DOCTYPE or a NUL: refused")
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise ProvisioningError(f"the goal state of {address} is not XML: {error!s:.200}") from error
    goal_state = {
        "Incarnation": root.findtext("Incarnation", "").strip(),
        "ContainerId": root.findtext("Container/ContainerId", "").strip(),
        "InstanceId": root.findtext("Container/RoleInstanceList/RoleInstance/InstanceId", "").strip(),
    }
    missing = [name for name, value in goal_state.items() if not value]
    if missing:
        raise ProvisioningError("the goal state of {} has no {}".format(address, ", ".join(missing)))
    return goal_state


def health_report(goal_state: "Dict[str, str]", failure: "Optional[str]" = None) -> bytes:
    """Return the XML that reports Ready, or, for a failure, NotReady with it as the description."""
    health = ElementTree.Element("Health")
    ElementTree.SubElement(health, "GoalStateIncarnation").text = goal_state["Incarnation"]
    container = ElementTree.SubElement(health, "Container")
    ElementTree.SubElement(container, "ContainerId").text = goal_state["ContainerId"]
    role = ElementTree.SubElement(ElementTree.SubElement(container, "RoleInstanceList"), "Role")
    ElementTree.SubElement(role, "InstanceId").text = goal_state["InstanceId"]
    role_health = ElementTree.SubElement(role, "Health")
    ElementTree.SubElement(role_health, "State").text = "Ready" if failure is None else "NotReady"
    if failure is not None:
        details = ElementTree.SubElement(role_health, "Details")
        ElementTree.SubElement(details, "SubStatus").text = "ProvisioningFailed"
        # Neither control characters nor the stray halves of surrogate pairs may stand in XML.
        allowed = re.sub("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", failure)
        ElementTree.SubElement(details, "Description").text = allowed[:DESCRIPTION_LIMIT]
    return ElementTree.tostring(health, encoding="utf-8")  # type: ignore[no-any-return]


def report_health(address: str, deadline: float, failure: "Optional[str]" = None, dry_run: bool = False) -> None:
    """Fetch the goal state and report Ready for it, or NotReady with the failure as its description.

    Both are one attempt, for a report for another incarnation than the current one, or for another container, is
    answered 410: https://github.com/coreos/afterburn/issues/461. Raises ProvisioningError if either fails.
    """
    goal_state = fetch_goal_state(address, deadline)
    report = health_report(goal_state, failure)
    if dry_run:
        log(INFO, f"would report to {address}: {report.decode()}")
        return
    headers = dict(WIRESERVER_HEADERS, **{"Content-Type": "text/xml;charset=utf-8"})
    exchange(address, deadline, "POST", "/machine?comp=health", headers, report)
    state = "Ready" if failure is None else "NotReady"
    log(INFO, "reported {} to {}, incarnation {}".format(state, address, goal_state["Incarnation"]))


# IMDS: what the VM was created with.

# extended=true: the service fails rather than answer with the part of the document that it has so far, see
# https://github.com/Azure/azure-init/issues/134
INSTANCE = "/metadata/instance?api-version=2021-08-01&extended=true"
OLD_NAME = "/metadata/instance/compute/name?api-version=2019-06-01&format=text"  # as the documentation's sample asks
OLD_IMDS_AFTER = 10.0  # seconds in which nothing but 400 came back: this IMDS does not know INSTANCE (Azure Stack Hub)


class Instance:
    """What the IMDS document says of this VM, checked only for its types but for host_name, which is one.

    admin_username is '' if there is no user, None if that is not known; public_keys are the texts that were given as
    SSH keys; passwords_disabled says that the VM is to be entered by key.
    """

    def __init__(
        self,
        host_name: str,
        admin_username: "Optional[str]" = None,
        public_keys: "Sequence[str]" = (),
        passwords_disabled: bool = False,
    ) -> None:
        self.host_name = host_name
        self.admin_username = admin_username
        self.public_keys = public_keys
        self.passwords_disabled = passwords_disabled


def parse_instance(text: str) -> Instance:
    """Return what the IMDS document text says. Raises ValueError if it is none, or one without a usable name.

    VMs made from specialized disks have no computer name, and are called after the VM resource.
    """
    import json  # here, because a VM that only reports Ready does without: a tenth of what that step takes

    try:
        compute = json.loads(text, parse_int=float)["compute"]  # int() of a million digits would take seconds
        os_profile = compute.get("osProfile") or {}
        computer_name, resource_name = (os_profile.get("computerName") or "").strip(), compute["name"].strip()
        admin_username = os_profile.get("adminUsername") or ""
        public_keys = [key["keyData"] for key in compute.get("publicKeys") or []]
        passwords_disabled = str(os_profile.get("disablePasswordAuthentication")).lower() == "true"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"not an instance document: {type(error).__name__} {error!s:.100}") from error
    for value in [admin_username, *public_keys]:
        if not isinstance(value, str):
            raise ValueError(f"not an instance document: {value!r:.80} is no text")
    if not resource_name:
        raise ValueError("not an instance document: it has no name")
    host_name = valid_host_name(computer_name or resource_name)
    if not host_name:
        raise ValueError(f"nothing of {computer_name or resource_name!r:.80} can be a host name")
    return Instance(host_name, admin_username, public_keys, passwords_disabled)


def valid_host_name(name: str) -> str:
    """Return name as a valid host name, see hostname(7); '' if nothing of it can stay.

    VM resources may be called web_01, hosts may not.
    """
    labels = re.sub("[^A-Za-z0-9.-]", "-", name)[:64].split(".")
    return ".".join(filter(None, (label.strip("-")[:63].rstrip("-") for label in labels)))


class InstanceMetadata:
    """IMDS at address (HOST[:PORT]), asked for timeout seconds at most, and once only: see get()."""

    def __init__(self, address: str, timeout: float) -> None:
        self.address = address
        self.timeout = timeout
        self.refusing_since: Optional[float] = None
        self.outcome: Union[Instance, ProvisioningError, None] = None

    def get(self) -> Instance:
        """Return what IMDS says of this VM. Raises ProvisioningError if it says nothing, and then always the same."""
        if not self.outcome:
            try:
                self.outcome = keep_trying(self.attempt, self.timeout)
            except ProvisioningError as error:
                self.outcome = error
        if isinstance(self.outcome, ProvisioningError):
            raise self.outcome
        return self.outcome

    def attempt(self, deadline: float) -> Instance:
        """Ask for the instance document, or, of an old IMDS, for the name alone. Raises ProvisioningError."""
        headers = {"Metadata": "true"}
        try:
            text = exchange(self.address, deadline, "GET", INSTANCE, headers)
            self.refusing_since = None
        except ProvisioningError as error:
            if error.status != 400:
                self.refusing_since = None
                raise
            self.refusing_since = self.refusing_since or time.monotonic()
            if time.monotonic() - self.refusing_since < OLD_IMDS_AFTER:
                raise
            name = exchange(self.address, deadline, "GET", OLD_NAME, headers).strip()
            if not re.match(r"[A-Za-z0-9_.-]+\Z", name) or not valid_host_name(name):
                raise ProvisioningError(f"GET http://{self.address}{OLD_NAME}: not a name: {name!r:.80}") from error
            return Instance(valid_host_name(name))
        try:
            return parse_instance(text)
        except ValueError as error:
            raise ProvisioningError(f"GET http://{self.address}{INSTANCE}: {error}") from error


# The machine: its files and its programs.

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
            except subprocess.TimeoutExpired as error:  # run() of Python 3.6 would then wait for its children
                process.kill()
                raise ProvisioningError(f"{asked}: no end within {limit:g} s") from error
    except OSError as error:
        raise ProvisioningError(f"{asked}: {error}") from error
    if process.returncode:
        raise ProvisioningError(f"{asked}: exit status {process.returncode}: {output:.200}")
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
    except (OSError, ValueError) as error:  # the latter for a NUL in path
        raise ProvisioningError(f"read {path}: {error}") from error


def replace_file(path: str, text: str, mode: int = 0o644) -> None:
    """Make text the content of path, at once and for good: no power cut leaves a part of it, or the old one later.

    Symbolic links in path are followed. Raises ProvisioningError if it cannot be written.
    """
    path = os.path.realpath(path)
    is_new = not os.path.exists(path)
    temporary = path + ".azure-provisioning"
    while os.path.isdir(temporary):
        temporary += "~"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)  # a power cut left it
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(descriptor, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            os.fchmod(descriptor, mode)
            with contextlib.suppress(OSError):  # no such file yet, or no labels here
                os.setxattr(descriptor, SELINUX_LABEL, os.getxattr(path, SELINUX_LABEL))  # which a rename leaves behind
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
    if is_new:
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
    except ProvisioningError:  # no file, but a FIFO, say: it will be replaced
        return False


def set_host_name(name: str) -> None:
    """Give this machine its name, now and for later boots. Raises ProvisioningError if it has not got it afterwards.

    NetworkManager hears of a name from hostnamed alone. Nothing else that renews a lease asks it, and starting it takes
    60 ms even from a warm disk, so that elsewhere its work is done here.
    """
    if os.path.isdir("/run/NetworkManager"):
        try:
            run("hostnamectl", "--no-ask-password", "set-hostname", name)
        except ProvisioningError as error:
            log(WARNING, f"{error}; setting the host name without it")
    if not host_name_is(name):
        replace_file(ETC_HOSTNAME, name + "\n")
        try:
            socket.sethostname(name)
        except OSError as error:
            raise ProvisioningError(f"sethostname {name}: {error}") from error
    if not host_name_is(name):
        raise ProvisioningError(f"the host name is {os.uname().nodename} after it was set to {name}")


def rename_in_hosts(text: str, name: str) -> str:
    """Return text, that of ETC_HOSTS, with the host that the line of 127.0.1.1 names renamed to name.

    Debian's installer writes such a line: https://www.debian.org/doc/manuals/debian-reference/ch05#_the_hostname_resolution
    The host keeps its domain, and other names on that line stay.
    """
    return "\n".join(rename_in_line(line, name) for line in text.split("\n"))


def rename_in_line(line: str, name: str) -> str:
    """Return line, one of ETC_HOSTS, with its host renamed to name if it is the line of 127.0.1.1."""
    entry, mark, comment = line.partition("#")
    words = re.split(r"(\s+)", entry)  # every second one is the space between two
    address, *names = [word for word in words[::2] if word] or [""]
    old = names[0].partition(".")[0] if names else ""
    if address != "127.0.1.1" or not old or name in names:
        return line
    for index, word in enumerate(words):
        host, dot, domain = word.partition(".")
        if host == old and word != address:
            words[index] = name if "." in name else name + dot + domain
    return "".join(words) + mark + comment


def update_hosts(name: str, dry_run: bool = False) -> None:
    """Rename the host in ETC_HOSTS to name. Raises ProvisioningError if that cannot be read or written."""
    hosts = read_file(ETC_HOSTS)
    renamed = rename_in_hosts(hosts, name)
    if renamed == hosts:
        return
    if dry_run:
        log(INFO, f"would rename 127.0.1.1 in {ETC_HOSTS} to {name}")
        return
    replace_file(ETC_HOSTS, renamed)
    log(INFO, f"renamed 127.0.1.1 in {ETC_HOSTS} to {name}")


# The lease: the virtual network's DNS learns the name from a DHCP client that asks again, and leases there never end.


# A client can be stuck: Debian 11's dhclient misses answers, https://bugs.launchpad.net/bugs/1926139
RENEWAL_TRIES = 3
RENEWAL_LIMIT = 8.0  # seconds for each


class Renewal:
    """How a DHCP client is made to ask again: by command, or, where that cannot be run here, by calling ask.

    Both raise ProvisioningError. lease is the file that the client rewrites then, '' if they wait for that themselves.
    """

    def __init__(self, *command: str, lease: str = "", ask: "Optional[Callable[[], object]]" = None) -> None:
        self.by_hand = " ".join(command)
        self.ask = ask or functools.partial(run, *command, limit=RENEWAL_LIMIT)
        self.lease = lease


# Each client below looks whether interface has its lease from it, and returns how to renew that, else None.


def networkd(interface: str) -> "Optional[Renewal]":
    """systemd-networkd, by a command of systemd 244 and later: `networkctl renew` does not send the name."""
    lease = f"/run/systemd/netif/leases/{socket.if_nametoindex(interface)}"
    if not os.path.exists(lease):
        return None
    return Renewal("networkctl", "reconfigure", interface, lease=lease)


def network_manager(interface: str) -> "Optional[Renewal]":
    """NetworkManager: `nmcli device reapply` does not send the name. A lease from the initrd's is in /run."""
    device = read_file(f"/run/NetworkManager/devices/{socket.if_nametoindex(interface)}")
    connection = re.search("(?m)^connection-uuid=(.+)", device)
    directories = filter(os.path.isdir, ("/var/lib/NetworkManager", "/run/NetworkManager"))
    leases = [file for directory in directories for file in os.listdir(directory)]
    if not connection or not any(file.endswith(f"{connection.group(1)}-{interface}.lease") for file in leases):
        return None
    return Renewal("nmcli", "--wait", f"{RENEWAL_LIMIT - 1:.0f}", "device", "connect", interface)


def ifupdown(interface: str) -> "Optional[Renewal]":
    """ifupdown with dhclient: one that we started by ifup would die with our unit."""
    if not os.path.exists(f"/run/network/ifstate.{interface}") or not os.path.exists(f"/run/dhclient.{interface}.pid"):
        return None
    return Renewal("systemctl", "restart", "networking.service")


def dhcpcd(interface: str) -> "Optional[Renewal]":
    """dhcpcd, by its socket: `dhcpcd -N` would have to signal a process of another user, which our unit may not.

    Raises ProvisioningError if it does not send the host name: Debian 12's default.
    """
    lease = f"/var/lib/dhcpcd/{interface}.lease"
    for prefix in (f"/run/dhcpcd/{interface}.", "/run/dhcpcd/"):  # one for this interface, or one for all
        pid = read_file(prefix + "pid").strip()
        if pid and read_file(f"/proc/{pid}/comm").strip() == "dhcpcd":
            if not dhcpcd_sends_name(read_file("/etc/dhcpcd.conf"), interface):
                raise ProvisioningError("dhcpcd sends no host name, for want of a line hostname in /etc/dhcpcd.conf")
            ask = functools.partial(ask_dhcpcd, prefix + "sock", interface)
            return Renewal("dhcpcd", "-N", interface, lease=lease, ask=ask)
    return None


def dhcpcd_sends_name(configuration: str, interface: str) -> bool:
    """Whether a dhcpcd with this dhcpcd.conf(5) sends the host name, whatever it is, on interface."""
    block = interface  # all of them, until the first block
    for line in configuration.splitlines():
        words = line.partition("#")[0].split()
        if words[:1] in (["interface"], ["ssid"], ["profile"]):
            block = words[-1] if words[0] == "interface" else ""
        elif words == ["hostname"] and block == interface:
            return True
    return False


def ask_dhcpcd(path: str, interface: str) -> None:
    """Have the dhcpcd at the socket path renew the lease of interface; it does not answer. Raises ProvisioningError."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(RENEWAL_LIMIT)
            connection.connect(path)
            connection.sendall(f"dhcpcd\0-N\0{interface}\0".encode())
    except OSError as error:
        raise ProvisioningError(f"ask {path} to renew {interface}: {error}") from error


# Whoever adds one: install.sh knows its leases, its unit and what binds it to a MAC address, tests/vm.py how it is set
# up, and the README names it.
DHCP_CLIENTS = (networkd, network_manager, ifupdown, dhcpcd)


def find_renewal(interface: str) -> "Optional[Renewal]":
    """Return how the lease of interface is renewed, None if no client known here has one for it.

    Raises ProvisioningError if one has it, but will not send the name.
    """
    for client in DHCP_CLIENTS:
        with contextlib.suppress(OSError):  # the interface went away, say
            renewal = client(interface)
            if renewal:
                return renewal
    return None


def default_interface() -> str:
    """Return the interface of the IPv4 default route, the preferred one if there are several; '' if there is none."""
    routes = []
    with contextlib.suppress(ProvisioningError):
        routes = [line.split() for line in read_file("/proc/self/net/route").splitlines()[1:]]
    # The columns are: interface, destination, gateway, flags, references, uses, metric, mask, and three more.
    defaults = [(int(route[6]), route[0]) for route in routes if route[1] == "00000000" and route[7] == "00000000"]
    return min(defaults)[1] if defaults else ""


def is_connected(interface: str) -> bool:
    """Whether interface has the default route, and an address to speak to the WireServer from. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((WIRESERVER, 80))
        except OSError:
            return False
    return default_interface() == interface


def modified(path: str) -> int:
    """Return when the file path was written last, in nanoseconds; 0 if there is none."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def wait_until(condition: "Callable[[], bool]", deadline: float) -> bool:
    """Return True once condition() does, False if it does not until time.monotonic() is deadline."""
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def publish_host_name(name: str, dry_run: bool = False) -> None:
    """Have the DHCP client of the default route send name to the virtual network's DNS, and wait for the lease.

    Best effort, for RENEWAL_LIMIT at most, and again only while the interface is without an address or a default route:
    that is an error in the end, other trouble is one line that says what to do by hand.
    """
    advice = f"for other machines to resolve {name}, restart the DHCP client, or reboot"
    interface = default_interface()
    try:
        renewal = find_renewal(interface) if interface else None
        if not renewal:
            raise ProvisioningError(f"found no DHCP lease to renew on {interface or 'a default route'}")
    except ProvisioningError as error:
        log(WARNING, f"{error}; {advice}")
        return
    if dry_run:
        log(INFO, f"would publish {name} by {renewal.by_hand}")
        return
    started = time.monotonic()
    for tries_left in reversed(range(RENEWAL_TRIES)):
        deadline = time.monotonic() + RENEWAL_LIMIT
        trouble = ask_for_lease(renewal, deadline)
        if wait_until(lambda: is_connected(interface), deadline):
            if trouble:
                log(WARNING, f"{trouble}; {advice}")
            else:
                log(INFO, f"published {name} by {renewal.by_hand}, after {time.monotonic() - started:.1f} s")
            return
        trouble = f"{interface} has no address or no default route after {trouble or renewal.by_hand}"
        if tries_left:
            log(WARNING, f"{trouble}; trying again")
        else:
            log(ERROR, f"{trouble}; {advice}")


def ask_for_lease(renewal: Renewal, deadline: float) -> str:
    """Do renewal and return what went wrong, '' if there is a new lease before time.monotonic() is deadline."""
    written = modified(renewal.lease)
    try:
        renewal.ask()
    except ProvisioningError as error:
        return str(error)
    if renewal.lease and not wait_until(lambda: modified(renewal.lease) not in (0, written), deadline):
        return f"{renewal.by_hand}: no new lease"
    return ""


# The user that the VM was created with.

USER_NAME = r"(?![0-9]+\Z)[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}\Z"
USER_IDS = range(1000, 60001)  # those of people, as distributions have them in login.defs(5)
ADMINISTRATORS = ("sudo", "wheel", "adm")  # the groups, of which each distribution has some
USER_DATABASE = "/etc"  # passwd(5), group(5), and what belongs to them
UNFINISHED = "/etc/azure-provisioning.unfinished"  # names the user that is being made, and a home directory of ours
SUDOERS = "/etc/sudoers.d"
SSHD = "/usr/sbin/sshd"
SSHD_DROP_IN = "/etc/ssh/sshd_config.d/10-azure-provisioning.conf"  # sshd takes the first value that it reads
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


def is_key(kind: str, encoded: str) -> bool:
    """Whether encoded is the whole of an SSH public key of kind: fields, each with its length in front of it."""
    import binascii

    try:
        blob = binascii.a2b_base64(encoded if re.match(r"[A-Za-z0-9+/]+={0,2}\Z", encoded) else "")
    except ValueError:
        return False
    rest = blob
    for _ in range(KEY_FIELDS[kind]):
        end = 4 + int.from_bytes(rest[:4], "big")
        if not 4 < end <= len(rest):
            return False
        rest = rest[end:]
    return not rest and blob.startswith(len(kind).to_bytes(4, "big") + kind.encode())


def parse_keys(text: str) -> "Iterator[str]":
    """Return the SSH keys in text, each as a line of sshd(8)'s authorized_keys; what is no key is left out, and told.

    Azure hands on what it was given: several keys in one, lines broken within the base64, ends of lines of all kinds.
    """
    begun = ""
    for part in text.splitlines():
        line = "".join(char if char.isprintable() else " " for char in part).strip()
        if begun and line.partition(" ")[0] in KEY_FIELDS:
            log(WARNING, f"not an SSH key, left out: {begun:.60}")
            begun = ""
        begun += line
        kind, encoded, comment = [*begun.split(None, 2), "", "", ""][:3]
        if kind in KEY_FIELDS and is_key(kind, encoded):
            yield " ".join(filter(None, (kind, encoded, comment)))
            begun = ""
        elif begun and (kind not in KEY_FIELDS or comment or len(begun) > KEY_LIMIT):
            log(WARNING, f"not an SSH key, left out: {begun:.60}")
            begun = ""
    if begun:
        log(WARNING, f"not an SSH key, left out: {begun:.60}")


def find_user(name: str) -> "Optional[pwd.struct_passwd]":
    """Return the user called name, None if there is none. Raises ProvisioningError if name is not a person's."""
    import pwd

    if not re.match(USER_NAME, name):
        raise ProvisioningError(f"{name!r:.80} cannot be the name of a user")
    try:
        user = pwd.getpwnam(name)
    except KeyError:
        return None
    if user.pw_uid not in USER_IDS:
        raise ProvisioningError(f"the user {name} is not a person's: its ID is {user.pw_uid}")
    return user


def unlock_user_database() -> None:
    """Remove the locks that a power cut left: useradd would wait for their owners, or refuse to.

    All tools that take them hold lckpwdf(3)'s lock meanwhile, so that no lock is anybody's while we have that one.
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


def undo_unfinished_user() -> None:
    """Remove the user that a power cut left half made, with its home. Raises ProvisioningError."""
    name, _, home = read_file(UNFINISHED).partition("\n")
    if not name:
        return
    if find_user(name):
        run("userdel", "--force", name)
        log(INFO, f"removed the user {name}, which was left unfinished")
    if home:
        import shutil

        shutil.rmtree(home, ignore_errors=True)
    finish_user()


def finish_user() -> None:
    """Take UNFINISHED away, or a later boot would undo what was made by then. Raises ProvisioningError."""
    try:
        os.unlink(UNFINISHED)
    except OSError as error:
        raise ProvisioningError(f"remove {UNFINISHED}: {error}") from error


def make_user(name: str, groups: "Sequence[str]") -> None:
    """Make the user name, with a home, a locked password, and groups. Raises ProvisioningError.

    useradd changes several files in turn, and a power cut can come between two: the file UNFINISHED says so.
    """
    import grp

    home = f"/home/{name}"
    shell = "/bin/bash" if os.path.exists("/bin/bash") else "/bin/sh"
    options = ["--no-log-init", "--create-home", "--home-dir", home, "--shell", shell, "--groups", ",".join(groups)]
    with contextlib.suppress(KeyError):
        grp.getgrnam(name)  # of a package, say: useradd would refuse to make its own
        options.append("--no-user-group")
    replace_file(UNFINISHED, name + "\n" + ("" if os.path.lexists(home) else home), 0o600)
    try:
        run("useradd", *options, "--", name)
    except ProvisioningError:
        # At once: by the next boot somebody may have made this user by hand.
        with contextlib.suppress(ProvisioningError):
            unlock_user_database()  # of a useradd that took too long
            undo_unfinished_user()
        raise
    os.sync()  # useradd leaves that to the kernel for what it puts into a home
    finish_user()


def administrators() -> "Dict[str, Sequence[str]]":
    """Return the groups of ADMINISTRATORS that this distribution has, with their members."""
    import grp

    return {group.gr_name: group.gr_mem for group in grp.getgrall() if group.gr_name in ADMINISTRATORS}


def as_user(user: "pwd.struct_passwd", action: "Callable[[], None]") -> None:
    """Run action in a process with the rights of user and no more, for COMMAND_LIMIT at most.

    Raises ProvisioningError with what action raised.
    """
    with contextlib.ExitStack() as sockets:
        try:
            reading, writing = map(sockets.enter_context, socket.socketpair())
            child = os.fork()
        except OSError as error:
            raise ProvisioningError(f"become {user.pw_name}: {error}") from error
        if child == 0:
            try:
                signal.alarm(int(COMMAND_LIMIT))
                os.initgroups(user.pw_name, user.pw_gid)
                os.setgid(user.pw_gid)
                os.setuid(user.pw_uid)
                action()
                os._exit(0)
            except (OSError, ProvisioningError) as error:
                writing.sendall(str(error).encode("utf-8", "backslashreplace")[:1000])
            finally:
                os._exit(1)
        writing.close()
        reading.settimeout(COMMAND_LIMIT + 1)
        try:
            failure = reading.recv(1000).decode("utf-8", "replace")
        except socket.timeout:  # the user can stop its process, alarm and all
            failure = "it did not end"
            with contextlib.suppress(PermissionError):  # the unit may not; systemd does, when the unit ends
                os.kill(child, signal.SIGKILL)
    if failure or os.waitpid(child, 0)[1] != 0:
        raise ProvisioningError(f"as {user.pw_name}: {failure or 'it did not end well'}")


def add_keys(home: str, keys: "Sequence[str]") -> None:
    """Add to the authorized_keys in home those of keys that are not there. To be called as the user."""
    directory = f"{home}/.ssh"
    path = f"{directory}/authorized_keys"
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory, 0o700)
    os.chmod(directory, 0o700)
    known = read_file(path)
    words = {word for line in known.splitlines() if not line.lstrip().startswith("#") for word in line.split()}
    missing = [key + "\n" for key in keys if key.split()[1] not in words]
    if missing:
        end = "" if not known or known.endswith("\n") else "\n"
        replace_file(path, known + end + "".join(missing), 0o600)
    os.chmod(path, 0o600)
    restore_label(directory)


def allow_sudo(user: "pwd.struct_passwd") -> None:
    """Let user do everything without a password, where there is sudo. Raises ProvisioningError."""
    if os.path.isdir(SUDOERS):
        # In quotes, or a name may mean something else in sudoers(5): ALL does. It skips files with a dot in their name.
        path = f"{SUDOERS}/90-azure-provisioning-{user.pw_name.replace('.', '_')}"
        replace_file(path, f'"{user.pw_name}" ALL=(ALL:ALL) NOPASSWD:ALL\n', 0o440)


def refuse_passwords() -> None:
    """Have sshd take keys only, if there is one. Raises ProvisioningError if it does not."""
    if not os.path.exists(SSHD):
        return
    # The third is what the second was called before OpenSSH 8.7.
    wanted = "PasswordAuthentication no\nKbdInteractiveAuthentication no\nChallengeResponseAuthentication no\n"
    if os.path.isdir(os.path.dirname(SSHD_DROP_IN)):  # OpenSSH 8.2 and later have drop-ins
        replace_file(SSHD_DROP_IN, wanted, 0o600)
        # As patterns: what does not match a unit that is loaded is no error.
        run("systemctl", "try-reload-or-restart", "[s]sh.service", "[s]shd.service")
    try:
        settings = run(SSHD, "-T")
    except ProvisioningError as error:  # it wants directories and keys that may come later in the boot
        log(INFO, f"{error}; whether it takes passwords is for its configuration to say")
        return
    taken = re.findall(r"(?m)^(?:password|kbdinteractive|challengeresponse)authentication yes", settings)
    if taken:
        raise ProvisioningError(f"sshd has {', '.join(taken)}, whatever {SSHD_DROP_IN} says: change its sshd_config")


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
    imds_timeout = IMDS_TIMEOUT
    timeout: "Optional[float]" = None  # for both, where it is given


def hostname_step(options: Options, metadata: InstanceMetadata) -> None:
    """Give the VM the name it was created with. Raises ProvisioningError."""
    name = metadata.get().host_name
    if host_name_is(name):
        log(INFO, f"the host name is {name} already")
    else:
        if options.dry_run:
            log(INFO, f"would set the host name to {name}, now it is {os.uname().nodename}")
        else:
            old_name = os.uname().nodename
            set_host_name(name)
            log(INFO, f"set the host name to {name}, it was {old_name}")
        publish_host_name(name, options.dry_run)
    update_hosts(name, options.dry_run)


def user_step(options: Options, metadata: InstanceMetadata) -> None:
    """Make the user that the VM was created with, and let it in with its keys. Raises ProvisioningError."""
    if not options.dry_run:
        unlock_user_database()
        undo_unfinished_user()
    instance = metadata.get()
    name = instance.admin_username
    if name is None:
        raise ProvisioningError(f"{options.imds} is too old to tell the user")
    keys = [key for text in instance.public_keys for key in parse_keys(text)]
    if not name:
        log(INFO, "the VM was created without a user: nothing to do")
        return
    if not any(text.strip() for text in instance.public_keys):
        log(INFO, f"the VM was created without a key for {name}: nothing to do")
        return
    if not keys:
        raise ProvisioningError(f"nothing of what was given as SSH keys for {name} is one")
    if options.dry_run:
        log(INFO, f"would {'keep' if find_user(name) else 'make'} the user {name}, SSH keys: {len(keys)}")
        return
    groups = administrators()
    if not find_user(name):
        make_user(name, sorted(groups))
        log(INFO, f"made the user {name}")
    elif any(name not in members for members in groups.values()):
        run("usermod", "--append", "--groups", ",".join(sorted(groups)), "--", name)
    user = find_user(name)
    if not user:
        raise ProvisioningError(f"there is no user {name} after useradd made it")
    as_user(user, functools.partial(add_keys, user.pw_dir, keys))
    allow_sudo(user)
    if instance.passwords_disabled:
        refuse_passwords()
    log(INFO, f"{name} can log in, SSH keys: {len(keys)}")


def ready_step(options: Options, metadata: InstanceMetadata) -> None:
    """Report that the VM is ready, or why it is not. Raises ProvisioningError."""

    def attempt(deadline: float) -> None:
        report_health(options.wireserver, deadline, options.fail, options.dry_run)

    keep_trying(attempt, options.wireserver_timeout)


# Ready comes last, for it is a promise: who is told that the VM is ready finds it under its name, and can log in.
STEPS = {"hostname": hostname_step, "user": user_step, "ready": ready_step}


def parse_arguments(arguments: "Sequence[str]") -> Options:
    """Return arguments as options. Exits with status 2 where they are wrong."""
    import argparse  # here, because systemd gives steps alone, and it takes a quarter of what the step ready takes

    def address(text: str) -> str:
        match = re.match(r"[A-Za-z0-9.-]+(?::([0-9]{1,5}))?\Z", text)
        if not match or not 0 < int(match.group(1) or 80) < 65536:
            raise argparse.ArgumentTypeError(f"{text!r} is not HOST[:PORT]")
        return text

    def seconds(text: str) -> float:
        with contextlib.suppress(ValueError):
            if 0 < float(text) < float("inf"):
                return float(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")

    parser = argparse.ArgumentParser(
        prog="azure-provisioning",
        description="Give this Azure VM the host name and the user that it was created with, and report it ready.",
        epilog="Exit status: 0 done, 1 a step failed, 2 usage.",
    )
    parser.add_argument("--version", action="version", version="%(prog)s " + __version__)
    parser.add_argument("-v", "--verbose", action="store_true", help="show the services' answers")
    parser.add_argument(
        "-n", "--dry-run", action="store_true", help="ask both services, but change nothing and report nothing"
    )
    parser.add_argument("--wireserver", type=address, metavar="HOST[:PORT]", help="instead of " + WIRESERVER)
    parser.add_argument("--imds", type=address, metavar="HOST[:PORT]", help="instead of " + IMDS)
    parser.add_argument(
        "--timeout",
        type=seconds,
        metavar="SECONDS",
        help=f"how long to keep trying each service (default: {WIRESERVER_TIMEOUT:g}, for IMDS {IMDS_TIMEOUT:g})",
    )
    parser.add_argument("--fail", metavar="REASON", help="report that provisioning failed, instead of running steps")
    parser.add_argument(
        "steps",
        nargs="*",
        metavar="STEP",
        help="{}, always in this order (default: {})".format(", ".join(STEPS), " ".join(Options.steps)),
    )
    options = parser.parse_args(arguments, namespace=Options())
    for step in options.steps:
        if step not in STEPS:
            parser.error("no such step: {!r} (there are {})".format(step, ", ".join(STEPS)))
    if options.steps and options.fail is not None:
        parser.error("--fail replaces the steps: name none")
    options.steps = ("ready",) if options.fail is not None else options.steps or Options.steps
    if options.timeout:
        options.wireserver_timeout = options.imds_timeout = options.timeout
    return options


def main(arguments: "Optional[Sequence[str]]" = None) -> int:
    """Run the steps and return the exit status: 0 done, 1 a step failed. Usage errors exit with 2.

    A step that fails does not keep the next one from running.
    """
    global log_level
    open_standard_streams()
    if arguments is None:
        arguments = sys.argv[1:]
    options = Options()
    if set(arguments) <= set(STEPS):
        options.steps = arguments or options.steps
    else:
        options = parse_arguments(arguments)
    log_level = DEBUG if options.verbose else INFO
    metadata = InstanceMetadata(options.imds, options.imds_timeout)
    failed = 0
    for name, step in STEPS.items():
        if name in options.steps:
            try:
                step(options, metadata)
            except ProvisioningError as error:
                log(ERROR, f"{name} failed: {error}")
                failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
