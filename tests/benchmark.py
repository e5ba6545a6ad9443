"""What provisioning costs, in time, disk and memory: `python3 -m tests.benchmark`, as root for all of it.

Processes are measured in the sandbox, against the pretend Azure at the real addresses, and interleaved: each round runs
every one of them once, so that a busy moment of the machine hits all alike. The figures are medians.
"""

import argparse
import contextlib
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from tests import container, machine, sandbox, vm
from tests.fake_azure import IMDS, WIRESERVER, FakeAzure

PYTHON = shutil.which("python3", path="/usr/bin") or sys.executable
MODULE = "azure_provisioning.py ready"
BARE = "python3 -I -S -c pass"

# Two requests and no retries: what a shell needs for the same.
CURL = r"""
set -eu
base=http://168.63.129.16/machine?comp=
state=$(curl -sf -H x-ms-version:2012-11-30 "${base}goalstate")
value() { [[ $state =~ \<$1\>[[:space:]]*([^[:space:]\<]+) ]] && printf %s "${BASH_REMATCH[1]}"; }
report="<Health><GoalStateIncarnation>$(value Incarnation)</GoalStateIncarnation><Container>"
report+="<ContainerId>$(value ContainerId)</ContainerId><RoleInstanceList><Role><InstanceId>$(value InstanceId)"
report+="</InstanceId><Health><State>Ready</State></Health></Role></RoleInstanceList></Container></Health>"
curl -sf -o /dev/null -H x-ms-version:2012-11-30 -H x-ms-agent-name:benchmark \
    -H 'Content-Type: text/xml;charset=utf-8' -d "$report" "${base}health"
"""

# What the documentation's sample does, in as many words, after the network as its author meant it. The incarnation is a
# literal there, too; this one is the pretend Azure's, or the report would be refused.
SAMPLE_PROGRAM = f"""\
import http.client
from xml.etree import ElementTree

wireserver = http.client.HTTPConnection("{sandbox.ADDRESSES[WIRESERVER]}")
headers = {{"x-ms-version": "2012-11-30", "x-ms-agent-name": "sample"}}
wireserver.request("GET", "/machine?comp=goalstate", headers=headers)
goal_state = ElementTree.fromstring(wireserver.getresponse().read())
report = (
    "<Health><GoalStateIncarnation>{FakeAzure().incarnation}</GoalStateIncarnation><Container><ContainerId>"
    + goal_state.findtext("./Container/ContainerId")
    + "</ContainerId><RoleInstanceList><Role><InstanceId>"
    + goal_state.findtext("./Container/RoleInstanceList/RoleInstance/InstanceId")
    + "</InstanceId><Health><State>Ready</State></Health></Role></RoleInstanceList></Container></Health>"
)
headers["Content-Type"] = "text/xml;charset=utf-8"
wireserver.request("POST", "/machine?comp=health", report, headers)
wireserver.getresponse().read()
"""
SAMPLE_UNIT = f"""\
[Unit]
Wants=network-online.target
After=network-online.target
[Service]
Type=oneshot
ExecStart=/usr/bin/python3 /usr/local/sample.py
ExecStart=/bin/bash -c "hostnamectl set-hostname $(curl -sf -H Metadata:true \\
    'http://{sandbox.ADDRESSES[IMDS]}/metadata/instance/compute/osProfile/computerName?api-version=2021-02-01&format=text')"
ExecStart=/bin/systemctl disable sample.service
[Install]
WantedBy=multi-user.target
"""

COMMANDS: Dict[str, List[str]] = {
    BARE: [PYTHON, "-I", "-S", "-c", "pass"],
    "the documentation's sample": [PYTHON, "-c", SAMPLE_PROGRAM],
    "bash and curl": ["bash", "-c", CURL],
    MODULE: [PYTHON, "-IS", sandbox.PROGRAM, "ready"],
}

Sample = Dict[str, float]


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table in Markdown."""
    print(f"\n### {title}\n")
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
    sys.stdout.flush()


def median(samples: Sequence[Sample], key: str) -> float:
    """Return the median of one figure."""
    return statistics.median(sample[key] for sample in samples)


def measure(command: List[str], azure: FakeAzure) -> Sample:
    """Run command once. Return milliseconds to its end and to Ready, and KiB that it read from disk."""
    known = len(azure.reports)
    started = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    ended = time.monotonic()
    process.returncode = status
    if status != 0:
        raise SystemExit(f"{command}: status {status}")
    ready = azure.requests[-1]["time"] if len(azure.reports) > known else ended
    return {
        "end": (ended - started) * 1000,
        "ready": (ready - started) * 1000,
        "read": usage.ru_inblock / 2,
    }


def peak_memory(command: List[str]) -> float:
    """Run command once more and return the most memory that it was seen to have, in MiB.

    What wait4() tells would be no less than what we have ourselves, for the child starts as a copy of us.
    """
    peak = 0
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            with open(f"/proc/{process.pid}/status", encoding="utf-8") as file:
                text = file.read()
            found = re.search("VmHWM:\\s*([0-9]+)", text)
            if found:
                peak = int(found.group(1))
    return peak / 1024


def drop_caches() -> None:
    """Forget all that the kernel remembers of the disk."""
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
        file.write("3")


def measure_processes(commands: Dict[str, List[str]], runs: int, cold: bool) -> None:
    """Print what each command costs, warm and, if cold, from a cold disk."""
    warm: Dict[str, List[Sample]] = {name: [] for name in commands}
    chilled: Dict[str, List[Sample]] = {name: [] for name in commands}
    with FakeAzure() as azure:
        azure.listen(WIRESERVER, sandbox.ADDRESSES[WIRESERVER], 80)
        for command in commands.values():
            measure(command, azure)
        for _ in range(runs):
            for name, command in commands.items():
                warm[name].append(measure(command, azure))
        if cold:
            for _ in range(runs):
                for name, command in commands.items():
                    drop_caches()
                    chilled[name].append(measure(command, azure))
        memory = {name: peak_memory(command) for name, command in commands.items()}
    reference = median(warm[MODULE], "ready")

    def row(name: str) -> List[str]:
        milliseconds = median(warm[name], "ready")
        cells = [f"{milliseconds:.1f}", f"{milliseconds / reference:.2f}", f"{memory[name]:.1f}"]
        if cold:
            milliseconds, kib = median(chilled[name], "ready"), median(chilled[name], "read")
            cells += [f"{milliseconds:.0f}", f"{milliseconds / median(chilled[MODULE], 'ready'):.2f}"]
            cells += [f"{kib:.0f}", f"{kib / median(chilled[MODULE], 'read'):.2f}"]
        return [name, *cells]

    header = ["from exec to Ready accepted, or to the end", "ms", "ratio", "peak MiB"]
    header += ["cold ms", "ratio", "cold KiB read", "ratio"] if cold else []
    table(f"One process, medians of {runs} runs", header, [row(name) for name in commands])
    if not cold:
        print("\n(As root it measures a cold disk, too.)")


def start_module(address: str) -> "subprocess.Popen[bytes]":
    """Start the module's ready step on a WireServer of its own."""
    return subprocess.Popen(
        [PYTHON, "-IS", sandbox.PROGRAM, "--wireserver", address, "ready"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def measure_recovery(outages: Sequence[float], runs: int) -> None:
    """Print how long after WireServer's return Ready is there, of runs instances a length of its absence."""
    waiting: List[Tuple[float, int, List[Any]]] = []
    for number, outage in enumerate(outages):
        port = 8100 + number
        waiting.append((outage, port, [start_module(f"127.0.0.1:{port}") for _ in range(runs)]))
    begun = time.monotonic()
    rows = []
    for outage, port, processes in waiting:
        time.sleep(max(0.0, begun + outage - time.monotonic()))
        with FakeAzure() as azure:
            back = time.monotonic()
            azure.listen(WIRESERVER, "127.0.0.1", port)
            for process in processes:
                process.wait()
            times = sorted(request["time"] - back for request in azure.requests if request["method"] == "POST")
        if len(times) != runs:
            raise SystemExit(f"{len(times)} of {runs} instances got Ready")
        rows.append([f"{outage:g}", f"{statistics.median(times):.1f}", f"{times[-1]:.1f}"])
    table(
        f"WireServer away (connections refused), {runs} instances each",
        ["away for s", "Ready after its return, median s", "the last, s"],
        rows,
    )


def measure_crowd(instances: int, throttle: int) -> None:
    """Print how instances fare that start together against one WireServer that throttles."""
    with FakeAzure(throttle=throttle) as azure:
        address = azure.listen(WIRESERVER)
        begun = time.monotonic()
        processes = [start_module(address) for _ in range(instances)]
        statuses = [process.wait() for process in processes]
        ready = [request["time"] - begun for request in azure.requests if "report" in request]
        refused = sum(1 for request in azure.requests if request["outcome"] == "429")
        total = len(azure.requests)
    table(
        f"{instances} instances started together, WireServer answers 429 past {throttle} requests a second",
        ["Ready", "all after s", "requests", "of these refused", "least possible s"],
        [
            [
                f"{statuses.count(0)} of {instances}",
                f"{max(ready):.1f}",
                str(total),
                str(refused),
                f"{2 * instances / throttle - 1:.1f}",
            ]
        ],
    )


def measure_boot(release: str, runs: int) -> None:
    """Print where the unit spends its time, in a booted and quiet system, and how long the sample's takes there."""
    lab = vm.Lab()
    try:
        with vm.Azure(lab) as azure, Quiet(lab, release) as computer, vm.explained(computer, azure):
            add_sample(computer)
            azure.start_network(delay=0).start()
            computer.boot(azure)
            computer.wait_until_booted()
            first = unit_times(computer.unit_journal())
            samples = [start_unit(computer) for _ in range(runs)]
    finally:
        lab.close()
    rows = [
        [name, f"{first[name]:.0f}" if name in first else "", f"{median(samples, name):.0f}"] for name in samples[0]
    ]
    table(
        f"The unit on {release} with systemd-networkd, milliseconds; median of {runs} starts in a quiet system",
        ["from its start to", "in the first boot", "quiet"],
        rows,
    )


def add_sample(computer: vm.VM) -> None:
    """Put what the documentation's page shows into computer."""
    computer.write("usr/local/sample.py", SAMPLE_PROGRAM)
    computer.write("etc/systemd/system/sample.service", SAMPLE_UNIT)


class Quiet(container.Container):
    """A container of what the README's images have, and what the documentation's sample needs."""

    packages = "systemd,systemd-sysv,dbus,python3-minimal,libpython3-stdlib,iproute2,curl"


MARKS = {
    "named": "set the host name to",
    "published": "published ",
    "Ready": "reported Ready",
    "finished": "Finished ",
}


def unit_times(journal: str) -> Sample:
    """Return the milliseconds from the start of the unit's last run to each of MARKS."""
    lines = [re.match(r"\[ *([0-9.]+)\] \S+ [^:]+: (.*)", line) for line in journal.splitlines()]
    found = [(float(line.group(1)), line.group(2)) for line in lines if line]
    begun = [moment for moment, text in found if text.startswith("Starting ")][-1]
    times = {}
    for name, mark in MARKS.items():
        times[name] = max(moment for moment, text in found if text.startswith(mark)) - begun
    return {name: seconds * 1000 for name, seconds in times.items()}


def start_unit(computer: container.Container) -> Sample:
    """Start the unit once more, with the name to change, and return unit_times() and the times of others alone."""

    def timed(*command: str) -> float:
        started = time.monotonic()
        computer.run(*command)
        return (time.monotonic() - started) * 1000

    def reset() -> None:
        computer.run("sh", "-c", f"echo {vm.IMAGE_NAME} >/etc/hostname; systemctl -q enable {vm.UNIT}; sync")
        computer.run("hostname", vm.IMAGE_NAME)
        computer.run("systemctl", "stop", "systemd-hostnamed.service")

    reset()
    whole = timed("systemctl", "start", vm.UNIT)
    sample = unit_times(computer.unit_journal())
    sample["`systemctl start` returns"] = whole
    sample["the same, the name being right"] = timed("systemctl", "start", vm.UNIT)
    empty = timed("true")
    for command in (
        ("networkctl", "reconfigure", "eth0"),
        ("systemctl", "disable", "--no-reload", vm.UNIT),
        ("systemctl", "disable", vm.UNIT),
        ("hostnamectl", "set-hostname", "web-01"),
        ("systemctl", "start", "sample.service"),
    ):
        reset()
        sample["alone: `" + " ".join(command) + "`"] = timed(*command) - empty
    return sample


# Whole machines: from power on, beside others that do the same.

# Prints when sshd greets at an address that was leased.
GREETED = """
import socket, sys, time
while True:
    time.sleep(0.02)
    try:
        for line in open(sys.argv[1]):
            if line[0].isdigit():
                with socket.create_connection((line.split()[2], 22), 0.5) as connection:
                    connection.settimeout(60)
                    if connection.recv(4) == b"SSH-":
                        print(time.monotonic())
                        sys.exit()
    except OSError:
        pass
"""


class Bare(machine.Machine):
    """A machine without any of them."""

    title = "none of them"
    packages = machine.Machine.packages + ",curl"

    def __init__(self, lab: vm.Lab, release: str) -> None:
        super().__init__(lab, release, install=False)


class WithSample(Bare):
    """A machine with what the documentation's page shows."""

    title = "the documentation's sample"

    def __init__(self, lab: vm.Lab, release: str) -> None:
        super().__init__(lab, release)
        add_sample(self)
        self.systemctl("enable", "sample.service")


class WithCloudInit(Bare):
    """A machine with the release's own cloud-init."""

    title = "cloud-init"
    packages = Bare.packages + ",cloud-init"

    def __init__(self, lab: vm.Lab, release: str) -> None:
        super().__init__(lab, release)
        self.write("etc/cloud/cloud.cfg.d/90-azure.cfg", "datasource_list: [ Azure ]\n")


class WithThis(Bare):
    """A machine with this."""

    title = "azure-provisioning"

    def __init__(self, lab: vm.Lab, release: str) -> None:
        super().__init__(lab, release)
        lab.run("sh", os.path.join(sandbox.REPOSITORY, "install.sh"), "--root", self.root)


def start_machine(computer: Bare) -> Sample:
    """Boot it once, from a new disk, and return the seconds from power on to all that one may wait for."""
    computer.new_disk()
    with vm.Azure(computer.lab, cable=vm.TAP) as azure, vm.explained(computer, azure), tempfile.TemporaryFile() as log:
        azure.start_network().start()
        azure.processes.start(sys.executable, "-c", GREETED, azure.leases_file, output=log, wrap=azure.enter())
        computer.switch_on(azure)
        begun = computer.switched_on
        vm.wait_for("a lease", azure.leases, 300)
        sample = {"lease": time.monotonic() - begun}
        if computer.title != Bare.title:
            vm.wait_for("Ready", azure.reports, 300)
            sample["Ready"] = azure.reports()[0]["time"] - begun
        sample["banner"] = float(vm.wait_for("sshd", lambda: azure.text(log), 300)) - begun
        computer.meet_shell()
        computer.wait_until_booted()
        sample["booted"] = time.monotonic() - begun
        # https://docs.kernel.org/block/stat.html and proc(5)
        sample["read"] = int(computer.run("cat", "/sys/block/vda/stat").split()[2]) * 512 / 2**20
        sample["processor"] = sum(map(int, computer.run("head", "-n1", "/proc/stat").split()[1:4])) / 100
        computer.cut_power()
    return sample


def measure_machines(release: str, runs: int) -> None:
    """Print when whole machines are ready and let one in, with this and with others."""
    lab = vm.Lab()
    kinds = (Bare, WithSample, WithCloudInit, WithThis)
    samples: Dict[str, List[Sample]] = {kind.title: [] for kind in kinds}
    try:
        with contextlib.ExitStack() as stack:
            computers = [stack.enter_context(kind(lab, release)) for kind in kinds]
            for _ in range(runs):
                for computer in computers:
                    samples[computer.title].append(start_machine(computer))
    finally:
        lab.close()

    def row(title: str) -> List[str]:
        some = samples[title]
        cells = [title]
        for key in ("lease", "Ready", "banner", "booted", "read", "processor"):
            cells.append(f"{median(some, key):.1f}" if key in some[0] else "")
        behind = [sample["Ready"] - sample["lease"] for sample in some if "Ready" in sample]
        cells.insert(3, f"{statistics.median(behind):.1f}" if behind else "")
        return cells

    table(
        f"Whole machines under emulation, {release} with systemd-networkd, seconds from power on; medians of {runs}",
        ["with", "lease", "Ready", "after the lease", "sshd greets", "booted", "MiB read", "CPU seconds"],
        [row(title) for title in samples],
    )


def pair_of(text: str) -> Tuple[str, List[str]]:
    """Return NAME=COMMAND as a name and a command line."""
    name, command = text.split("=", 1)
    return name, shlex.split(command)


def processor() -> str:
    """Return what the machine calls its processor."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = re.search("model name\\s*: (.*)", file.read())
    return model.group(1) if model else platform.machine()


def main(arguments: Optional[List[str]] = None) -> int:
    """Measure, in the sandbox and then in a booted machine."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python3 -m tests.benchmark", description="Measure what provisioning costs.")
    parser.add_argument("--runs", type=int, help="how often (default: 21; 5 with --machines)")
    parser.add_argument("--machines", action="store_true", help="boot whole machines, and do nothing else (as root)")
    parser.add_argument("--beside", action="append", default=[], metavar="NAME=COMMAND", help="measure this as well")
    parser.add_argument("--only", choices=("processes", "recovery", "crowd", "boot"), help="a part of it")
    parser.add_argument("--release", default="bookworm", choices=vm.RELEASES, help="to boot (default: %(default)s)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.runs = options.runs or (5 if options.machines else 21)
    if not options.inside:
        version = subprocess.run([PYTHON, "--version"], stdout=subprocess.PIPE, check=True).stdout.decode().strip()
        print(f"{processor()}, {os.cpu_count()} processors, Linux {platform.release()}, {version}")
        sys.stdout.flush()
        status = 0
        if options.machines:
            missing = vm.missing_tools(machine.TOOLS)
            if missing or os.geteuid() != 0:
                raise SystemExit(f"machines take root and {', '.join(missing) or 'no more'}")
            measure_machines(options.release, options.runs)
            return status
        if options.only != "boot":
            command = [sys.executable, "-m", "tests.sandbox", "--json", os.devnull]
            command += ["--absent", IMDS, "--absent", WIRESERVER, sys.executable, "-m", "tests.benchmark", "--inside"]
            status = subprocess.run([*command, *arguments], cwd=sandbox.REPOSITORY, check=False).returncode
        if status == 0 and options.only in (None, "boot"):
            missing = vm.missing_tools(container.TOOLS)
            if os.geteuid() == 0 and not missing:
                measure_boot(options.release, options.runs)
            else:
                print(f"\n(The boot is not measured: it takes root and {', '.join(missing) or 'no more'}.)")
        return status
    parts: Dict[str, Callable[[], Any]] = {
        "processes": lambda: measure_processes(
            dict(COMMANDS, **dict(pair_of(text) for text in options.beside)),
            options.runs,
            cold=os.access("/proc/sys/vm/drop_caches", os.W_OK),
        ),
        "crowd": lambda: measure_crowd(100, 15),
        "recovery": lambda: measure_recovery((1, 5, 30, 120), max(15, options.runs)),
    }
    for name, part in parts.items():
        if options.only in (None, name):
            part()
    return 0


if __name__ == "__main__":
    sys.exit(main())
