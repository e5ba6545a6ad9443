#!/usr/bin/python3 -IS
"""Give an Azure VM its host name, and tell Azure that the VM is ready.

This is a whole provisioning agent: without arguments it asks the Instance Metadata Service (IMDS) for the name that
the VM was created with, sets it, and then reports Ready to the WireServer. A VM that does not report Ready is declared
failed by the platform and restarted.

It runs as root at the first boot of every VM made from an image, before anybody can log in, on a network that is just
coming up and against services that answer late, wrongly or not at all. So it keeps trying, believes nothing it is told,
and depends on nothing but Python's standard library, 3.6 or later. It is read from a cold disk and waited for: import
nothing here that is not needed on the way to Ready.

The page it stands in for: https://learn.microsoft.com/azure/virtual-machines/linux/no-agent
"""

import contextlib
import gc
import sys

# As a script, start fast: all this saves 11 of 37 ms, and a fifth of what has to come from a cold disk.
unused: "Dict[str, Any]" = {}
if __name__ == "__main__":
    gc.disable()  # 4 ms: nothing of what is imported is garbage; keep_trying() enables it for what may be
    unused["ssl"] = None  # 5 ms: http.client does without OpenSSL, and both services speak plain HTTP
    for name in ("calendar", "datetime", "random"):  # 2 ms: of mail's headers http.client uses neither dates nor ids
        unused[name] = type(sys)(name)
sys.modules.update(unused)
with contextlib.suppress(AttributeError, ImportError):
    import http.client
for name in unused:
    sys.modules.pop(name, None)

import http.client  # noqa: E402  # again, and with all of it, should another Python need one of them
import os  # noqa: E402
import re  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
import time  # noqa: E402
from xml.etree import ElementTree  # noqa: E402

TYPE_CHECKING = False  # typing is for mypy alone
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, Iterator, Optional, Sequence, Tuple, TypeVar

    Answer = TypeVar("Answer")

__version__ = "1.0.0"

WIRESERVER = "168.63.129.16"  # https://learn.microsoft.com/azure/virtual-network/what-is-ip-address-168-63-129-16
WIRESERVER_BUDGET = 1200.0  # seconds; the platform gives up on a VM after 20 to 40 minutes
IMDS = "169.254.169.254"  # https://learn.microsoft.com/azure/virtual-machines/instance-metadata-service
IMDS_BUDGET = 120.0  # seconds; Ready waits for it, so it is a small part of the other

ATTEMPT_LIMIT = 10.0  # seconds for one attempt, whatever the peer does
ANSWER_LIMIT = 1 << 20  # bytes; the longest real answer has some 3 KiB
FIRST_PAUSE = 0.25  # seconds between the starts of two attempts, then twice that, and so on
LONGEST_PAUSE = 5.0
LONGEST_RETRY_AFTER = 30.0


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


# Transport: one request, and trying again.


class Connection(http.client.HTTPConnection):
    """An HTTP connection that does not load the IDNA codec to connect to an address."""

    def connect(self) -> None:
        address = (self.host.encode("ascii"), self.port)  # saves 3 ms, which is what the codec for a str takes to load
        self.sock = socket.create_connection(address, self.timeout)  # type: ignore[arg-type]
        # Headers and body are two writes: without this the second waits until the first is acknowledged.
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def request(
    connection: Connection, method: str, path: str, headers: "Dict[str, str]", body: "Optional[bytes]" = None
) -> str:
    """Send one request over connection and return the text of the answer.

    Redirects are not followed and proxies not used: http.client knows neither. Raises ProvisioningError if there is no
    complete answer, if its status is not 2xx, or if it is longer than ANSWER_LIMIT or not UTF-8.
    """
    asked = f"{method} http://{connection.host}:{connection.port}{path}"
    try:
        connection.request(method, path, body, headers)
        with connection.getresponse() as response:
            answer = response.read(ANSWER_LIMIT)
        if response.length:
            raise http.client.IncompleteRead(answer, response.length)
        status = response.status
        text = answer.decode("utf-8", "replace")
        log(DEBUG, f"{asked}: status {status}: {text:.3000}")
        if not 200 <= status < 300:
            retry_after = response.getheader("Retry-After", "")
            raise ProvisioningError(
                f"{asked}: status {status} {text or response.reason:.200}",
                status,
                # Its other form, a date, is nothing for a clock that may not be set yet.
                float(retry_after) if re.match(r"[0-9]{1,9}\Z", retry_after) else 0.0,
            )
        if len(answer) == ANSWER_LIMIT:
            raise ProvisioningError(f"{asked}: status {status}, but an answer of {ANSWER_LIMIT} bytes or more")
        return answer.decode("utf-8-sig")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ProvisioningError(f"{asked}: {str(error) or type(error).__name__:.200}") from error


@contextlib.contextmanager
def time_limit(seconds: float) -> "Iterator[None]":
    """Raise http.client.HTTPException in the body of the with statement once seconds have passed.

    A socket's timeout starts anew with every byte that comes in; this one does not.
    """

    def expire(signum: int, frame: object) -> None:
        raise http.client.HTTPException(f"no complete answer within {seconds:.3g} s")

    previous = signal.signal(signal.SIGALRM, expire)
    # Again every second, should the first exception get lost, as it does in a destructor.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def keep_trying(address: str, attempt: "Callable[[Connection], Answer]", budget: float) -> "Answer":
    """Call attempt, each time with a new connection to address (HOST[:PORT]), and return what it returns.

    If it fails it is called again until budget, in seconds, is spent; then the last ProvisioningError is raised. What
    made it fail does not matter: on a network that is coming up, a refusal now is an answer in a minute.
    """
    deadline = time.monotonic() + budget
    pause = FIRST_PAUSE
    while True:
        started = time.monotonic()
        limit = max(0.001, min(ATTEMPT_LIMIT, deadline - started))
        connection = Connection(address, timeout=limit)
        try:
            with time_limit(limit):
                return attempt(connection)
        except (ProvisioningError, http.client.HTTPException) as error:
            failure = error if isinstance(error, ProvisioningError) else ProvisioningError(f"{address}: {error}")
        finally:
            connection.close()
        now = time.monotonic()
        if deadline - now <= 1:
            raise ProvisioningError(f"{failure}; gave up after {budget:g} s", failure.status)

        import random  # here, because most VMs need it never

        gc.enable()

        # Counted from the start of the attempt: a service that comes back is found within LONGEST_PAUSE, also when it
        # takes long to fail. Never less than the first pause, so that VMs started together spread out.
        wait = max(pause * random.uniform(0.5, 1) - (now - started), FIRST_PAUSE * random.uniform(0.5, 1))
        wait = max(wait, min(failure.retry_after, LONGEST_RETRY_AFTER))
        wait = min(wait, deadline - now - 1)  # one second is left for the last attempt
        log(WARNING, f"{failure}; trying again in {wait:.1f} s")
        time.sleep(wait)
        pause = min(pause * 2, LONGEST_PAUSE)


# WireServer: the goal state names this VM, the health report says how it is.

WIRESERVER_HEADERS = {"x-ms-version": "2012-11-30", "x-ms-agent-name": "azure-provisioning"}
DESCRIPTION_LIMIT = 512  # characters


def fetch_goal_state(connection: Connection) -> "Dict[str, str]":
    """Return ContainerId, InstanceId and Incarnation of the WireServer's goal state.

    Raises ProvisioningError if there is no answer, or if it is not a goal state with all three.
    """
    text = request(connection, "GET", "/machine?comp=goalstate", WIRESERVER_HEADERS)
    if "<!DOCTYPE" in text:  # entities that multiply: looked for in the text, not by the parser that would expand them
        raise ProvisioningError(f"the goal state of {connection.host} has a DOCTYPE: refused")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ProvisioningError(f"the goal state of {connection.host} is not XML: {error}") from error
    goal_state = {
        "Incarnation": root.findtext("Incarnation", "").strip(),
        "ContainerId": root.findtext("Container/ContainerId", "").strip(),
        "InstanceId": root.findtext("Container/RoleInstanceList/RoleInstance/InstanceId", "").strip(),
    }
    missing = [name for name, value in goal_state.items() if not value]
    if missing:
        raise ProvisioningError("the goal state of {} has no {}".format(connection.host, ", ".join(missing)))
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


def report_health(connection: Connection, failure: "Optional[str]" = None, dry_run: bool = False) -> None:
    """Fetch the goal state and report Ready for it, or NotReady with the failure as its description.

    Both are one attempt, for the platform ignores a report on another incarnation than the current one, and answers 410
    once the VM's container has moved. Raises ProvisioningError if either fails.
    """
    goal_state = fetch_goal_state(connection)
    report = health_report(goal_state, failure)
    if dry_run:
        log(INFO, f"would report to {connection.host}: {report.decode()}")
        return
    headers = dict(WIRESERVER_HEADERS, **{"Content-Type": "text/xml;charset=utf-8"})
    request(connection, "POST", "/machine?comp=health", headers, report)
    state = "Ready" if failure is None else "NotReady"
    log(INFO, "reported {} to {}, incarnation {}".format(state, connection.host, goal_state["Incarnation"]))


# IMDS: the name that the VM was created with.

NAME_LIMIT = 255  # characters; no name in Azure is as long


def ask_imds(connection: Connection, leaf: str, version: str) -> str:
    """Return the value of leaf, an element of /metadata/instance. Raises ProvisioningError as request() does."""
    path = f"/metadata/instance/{leaf}?api-version={version}&format=text"
    return request(connection, "GET", path, {"Metadata": "true"}).strip()


def fetch_host_name(connection: Connection) -> str:
    """Return the VM's computer name, or the name of the VM resource where it has none, as IMDS has it.

    VMs made from specialized disks have no computer name, and the IMDS of an Azure Stack Hub knows older versions only.
    Raises ProvisioningError if neither question is answered.
    """
    try:
        name = ask_imds(connection, "compute/osProfile/computerName", "2021-02-01")
    except ProvisioningError as error:
        if error.status not in (400, 404):  # version unknown, no such element
            raise
        name = ""
    name = name or ask_imds(connection, "compute/name", "2019-06-01")
    if not name or len(name) > NAME_LIMIT:
        raise ProvisioningError(f"{connection.host} gave a name of {len(name)} characters")
    return name


# The host name, here and in the files that repeat it.

ETC_HOSTNAME = "/etc/hostname"
ETC_HOSTS = "/etc/hosts"
COMMAND_LIMIT = 15.0  # seconds


def valid_host_name(name: str) -> str:
    """Return name as a valid host name, see hostname(7); '' if nothing of it can stay.

    VM resources may be called web_01, hosts may not.
    """
    labels = re.sub("[^A-Za-z0-9.-]", "-", name)[:64].split(".")
    return ".".join(filter(None, (label.strip("-") for label in labels)))


def run(*command: str) -> None:
    """Run command without a shell, for COMMAND_LIMIT at most. Raises ProvisioningError unless it succeeds."""
    import subprocess  # here, because a VM that has its name already runs nothing

    asked = " ".join(command)
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=COMMAND_LIMIT
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProvisioningError(f"{asked}: {error}") from error
    if done.returncode:
        output = done.stdout.decode("utf-8", "replace").strip()
        raise ProvisioningError(f"{asked}: exit status {done.returncode}: {output:.200}")


def read_file(path: str) -> str:
    """Return the text in path, '' if there is no such file. Raises ProvisioningError if it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            return file.read()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ProvisioningError(f"read {path}: {error}") from error


def replace_file(path: str, text: str) -> None:
    """Make text the content of path at once: no crash leaves a part of it. Raises ProvisioningError if it cannot be."""
    path = os.path.realpath(path)
    temporary = path + ".azure-provisioning"
    try:
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            os.fchmod(file.fileno(), 0o644)
            with contextlib.suppress(OSError):  # no such file yet, or no labels here
                label = os.getxattr(path, "security.selinux")  # which a rename does not bring along
                os.setxattr(temporary, "security.selinux", label)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise ProvisioningError(f"write {path}: {error}") from error


def host_name_is(name: str) -> bool:
    """Whether the kernel and ETC_HOSTNAME both have name."""
    return os.uname().nodename == name and read_file(ETC_HOSTNAME).strip() == name


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

    def rename(line: "re.Match[str]") -> str:
        names = line.group(2)
        if name in names.split():
            return line.group()
        old = re.escape(re.split(r"[.\s]", names)[0])
        return line.group(1) + re.sub(
            rf"(?<!\S){old}(\.\S+)?(?!\S)",
            lambda found: name if "." in name else name + (found.group(1) or ""),
            names,
        )

    return re.sub(r"(?m)^([ \t]*127\.0\.1\.1[ \t]+)([^\s#][^\r\n#]*)", rename, text)


# The lease: the virtual network's DNS learns the name from a DHCP client that asks again, and leases there never end.


def default_interface() -> str:
    """Return the interface of the IPv4 default route, the preferred one if there are several; '' if there is none."""
    routes = []
    with contextlib.suppress(ProvisioningError):
        routes = [line.split() for line in read_file("/proc/self/net/route").splitlines()[1:]]
    # The columns are: interface, destination, gateway, flags, references, uses, metric, mask, and three more.
    defaults = [(int(route[6]), route[0]) for route in routes if route[1] == "00000000" and route[7] == "00000000"]
    return min(defaults)[1] if defaults else ""


def source_address() -> str:
    """Return the address from which this machine would speak to the WireServer, '' if it could not. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((WIRESERVER, 80))
            return str(probe.getsockname()[0])
        except OSError:
            return ""


def find_renewal(interface: str) -> "Tuple[Tuple[str, ...], str]":
    """Return the command by which the DHCP client of interface asks again, and the lease file it will then rewrite.

    The file is '' where the command waits for the lease itself; the command is () if no client known here has a lease.
    Less would not send the name (networkctl renew, nmcli device reapply); an ifup's dhclient would die with our unit.
    """
    try:
        index = socket.if_nametoindex(interface)
        lease = f"/run/systemd/netif/leases/{index}"
        if os.path.exists(lease):
            return ("networkctl", "reconfigure", interface), lease
        connection = re.search("(?m)^connection-uuid=(.+)", read_file(f"/run/NetworkManager/devices/{index}"))
        if connection:
            name = f"{connection.group(1)}-{interface}.lease"
            if any(file.endswith(name) for file in os.listdir("/var/lib/NetworkManager")):
                return ("nmcli", "--wait", f"{COMMAND_LIMIT:.0f}", "device", "connect", interface), ""
        if os.path.exists(f"/run/network/ifstate.{interface}") and os.path.exists(f"/run/dhclient.{interface}.pid"):
            return ("systemctl", "restart", "networking.service"), ""
    except (OSError, ProvisioningError):  # the interface went away, say
        pass
    return (), ""


def modified(path: str) -> int:
    """Return when the file path was written last, in nanoseconds; 0 if there is none."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def publish_host_name(name: str, dry_run: bool = False) -> None:
    """Have the DHCP client of the default route send name to the virtual network's DNS, and wait for the lease.

    Best effort, for COMMAND_LIMIT at most: trouble is one line that says what to do by hand, and an error only if the
    interface has lost its address or its default route.
    """
    by_hand = f"for other machines to resolve {name}, restart the DHCP client, or reboot"
    interface = default_interface()
    command, lease = find_renewal(interface)
    asked = " ".join(command)
    if not command:
        log(WARNING, f"found no DHCP lease to renew on {interface or 'a default route'}; {by_hand}")
        return
    if dry_run:
        log(INFO, f"would run {asked}")
        return
    started = time.monotonic()
    written = modified(lease)
    failure = ""
    try:
        run(*command)
    except ProvisioningError as error:
        failure = str(error)
    while True:
        connected = default_interface() and source_address()
        renewed = not lease or modified(lease) not in (0, written)
        if (connected and (renewed or failure)) or time.monotonic() - started > COMMAND_LIMIT:
            break
        time.sleep(0.01)
    if not connected:
        log(ERROR, f"{interface} has no address or no default route since {asked}; {failure or by_hand}")
    elif failure or not renewed:
        log(WARNING, f"{failure or asked + ': no new lease'}; {by_hand}")
    else:
        log(INFO, f"published {name} by {asked}, after {time.monotonic() - started:.1f} s")


# The steps, in the order in which a VM lives them, and the command line.


class Options:
    """The command line; the values here are those of a run without arguments, as systemd runs it."""

    steps: "Sequence[str]" = ()
    dry_run = False
    verbose = False
    fail: "Optional[str]" = None
    wireserver = WIRESERVER
    imds = IMDS
    timeout: "Optional[float]" = None


def hostname_step(options: Options) -> None:
    """Give the VM the name it was created with. Raises ProvisioningError."""
    answer = keep_trying(options.imds, fetch_host_name, options.timeout or IMDS_BUDGET)
    name = valid_host_name(answer)
    if not name:
        raise ProvisioningError(f"nothing of {answer!r} can be a host name")
    old_name = os.uname().nodename
    hosts = read_file(ETC_HOSTS)
    wanted_hosts = rename_in_hosts(hosts, name)
    if host_name_is(name):
        log(INFO, f"the host name is {name} already")
    elif options.dry_run:
        log(INFO, f"would set the host name to {name}, now it is {old_name}")
        publish_host_name(name, dry_run=True)
    else:
        set_host_name(name)
        log(INFO, f"set the host name to {name}, it was {old_name}")
        publish_host_name(name)
    if hosts != wanted_hosts and not options.dry_run:
        replace_file(ETC_HOSTS, wanted_hosts)
        log(INFO, f"renamed 127.0.1.1 in {ETC_HOSTS} to {name}")


def ready_step(options: Options) -> None:
    """Report that the VM is ready, or why it is not. Raises ProvisioningError."""

    def attempt(connection: Connection) -> None:
        report_health(connection, options.fail, options.dry_run)

    keep_trying(options.wireserver, attempt, options.timeout or WIRESERVER_BUDGET)


# Ready comes last, for it is a promise: who is told that the VM is ready finds it under its name.
STEPS = {"hostname": hostname_step, "ready": ready_step}


def parse_arguments(arguments: "Sequence[str]") -> Options:
    """Return arguments as options. Exits with status 2 where they are wrong."""
    import argparse  # here, because systemd gives no arguments

    def address(text: str) -> str:
        match = re.match(r"(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?\Z", text)
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
        description="Set the host name that this Azure VM was created with, then tell Azure that it is ready.",
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
        help=f"how long to keep trying each service (default: {WIRESERVER_BUDGET:g}, for IMDS {IMDS_BUDGET:g})",
    )
    parser.add_argument("--fail", metavar="REASON", help="report that provisioning failed, instead of running steps")
    parser.add_argument(
        "steps", nargs="*", metavar="STEP", help="hostname or ready; both, in this order, if none is given"
    )
    options = parser.parse_args(arguments, namespace=Options())
    for step in options.steps:
        if step not in STEPS:
            parser.error("no such step: {!r} (there are {})".format(step, " and ".join(STEPS)))
    if options.steps and options.fail is not None:
        parser.error("--fail replaces the steps: name none")
    return options


def main(arguments: "Optional[Sequence[str]]" = None) -> int:
    """Run the steps and return the exit status: 0 done, 1 a step failed. Usage errors exit with 2.

    A step that fails does not keep the next one from running.
    """
    global log_level
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is no traceback, either
    if arguments is None:
        arguments = sys.argv[1:]
    options = Options()
    if set(arguments) <= set(STEPS):
        options.steps = arguments  # saves 5 ms: argparse is not needed for these, nor for none
    else:
        options = parse_arguments(arguments)
    log_level = DEBUG if options.verbose else INFO
    wanted = ["ready"] if options.fail is not None else options.steps or STEPS
    failed = 0
    for name, step in STEPS.items():
        if name in wanted:
            try:
                step(options)
            except ProvisioningError as error:
                log(ERROR, f"{name} failed: {error}")
                failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
