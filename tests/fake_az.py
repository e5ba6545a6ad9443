"""Stand-ins for az, azcopy and ssh, which keep a pretend subscription in a directory and answer as documented.

They know what tests/test_azure.py asks, refuse what Azure is known to refuse, and stop at what does not exist. Each
command is recorded.
"""

import json
import os
import sys
import time
from typing import Any, Callable, Dict, List

DIRECTORY = "FAKE_AZ"  # the environment variable that says where
FAIL = "FAKE_AZ_FAIL"  # one with the start of a command that fails
HANG = "FAKE_AZ_HANG"  # of one that does not end
RECORD = "FAKE_AZ_RECORD"  # where this is set, commands are only recorded

Resource = Dict[str, Any]
Options = Dict[str, str]

SUBSCRIPTION = "/subscriptions/00000000-0000-0000-0000-000000000000/resourceGroups/"
PROVIDER = "/providers/Microsoft.Compute"
SHORT = {"-g": "--resource-group", "-n": "--name", "-l": "--location", "-o": "--output", "-d": "--show-details"}
FLAGS = ("--yes", "--show-details")


class RefusedError(Exception):
    """What a command is refused with."""


class Subscription:
    """All that was made, by resource ID."""

    def __init__(self, resources: Dict[str, Resource]) -> None:
        self.resources = resources

    def add(self, path: str, **properties: Any) -> Resource:
        parent = path.rsplit("/", 2)[0]
        self.get(parent[: -len(PROVIDER)] if parent.endswith(PROVIDER) else parent)
        self.resources[path] = dict(properties, id=path, name=path.rpartition("/")[2])
        return self.resources[path]

    def get(self, path: str) -> Resource:
        if path not in self.resources:
            raise RefusedError(f"(ResourceNotFound) {path or 'nothing'} was not found.")
        return self.resources[path]

    # The commands, each with its options.

    @staticmethod
    def group(options: Options) -> str:
        return SUBSCRIPTION + options.get("--resource-group", options.get("--name", ""))

    def path(self, options: Options, kind: str) -> str:
        return f"{self.group(options)}{PROVIDER}/{kind}/{options['--name']}"

    def gallery(self, options: Options) -> str:
        names = {"galleries": "name", "images": "image-definition", "versions": "image-version"}
        path = [
            f"/{kind}/" + options["--gallery-" + name] for kind, name in names.items() if "--gallery-" + name in options
        ]
        return self.group(options) + PROVIDER + "".join(path)

    def group_create(self, options: Options) -> Any:
        self.resources[self.group(options)] = {"location": options["--location"]}

    def group_exists(self, options: Options) -> Any:
        return self.group(options) in self.resources

    def group_delete(self, options: Options) -> Any:
        self.get(self.group(options))
        for path in [path for path in self.resources if (path + "/").startswith(self.group(options) + "/")]:
            del self.resources[path]

    def disk_create(self, options: Options) -> Any:
        return self.add(self.path(options, "disks"), size=options["--upload-size-bytes"], state="ReadyToUpload")

    def disk_grant_access(self, options: Options) -> Any:
        disk = self.get(self.path(options, "disks"))
        disk["state"] = "ActiveUpload"
        return {"accessSAS": "https://md-impexp.z1.blob.storage.azure.net/" + disk["id"] + "?sv=2018-03-28&sig=x"}

    def disk_revoke_access(self, options: Options) -> Any:
        disk = self.get(self.path(options, "disks"))
        if disk["state"] != "Uploaded":
            raise RefusedError(f"The disk is {disk['state']}")
        disk["state"] = "Unattached"

    def disk_show(self, options: Options) -> Any:
        return self.get(self.path(options, "disks"))

    def sig_create(self, options: Options) -> Any:
        return self.add(self.gallery(options))

    def sig_image_definition_create(self, options: Options) -> Any:
        return self.add(self.gallery(options), **dict(pair.split("=") for pair in options["--features"].split()))

    def sig_image_version_create(self, options: Options) -> Any:
        wanted = self.get(self.gallery(options).rsplit("/", 2)[0])["SecurityType"]
        source = self.get(options.get("--os-snapshot") or options.get("--virtual-machine", ""))
        if source["state"] not in ("Unattached", "generalized"):
            raise RefusedError(f"The source is {source['state']}")
        # https://github.com/hashicorp/packer-plugin-azure/issues/304
        if (wanted == "TrustedLaunch") != (source.get("--security-type") == "TrustedLaunch"):
            raise RefusedError(f"(InvalidParameter) The security type '{wanted}' is not supported for the source")
        return self.add(self.gallery(options))

    def sig_image_version_show(self, options: Options) -> Any:
        return self.get(self.gallery(options))

    def vm_create(self, options: Options) -> Any:
        if options["--image"].count(":") != 3:  # which names one of the Marketplace
            self.get(options["--image"])
        address = f"192.0.2.{len(self.resources)}"
        return self.add(
            self.path(options, "virtualMachines"),
            **options,
            state="running",
            publicIps=address,
            privateIps=address.replace("192.0.2", "10.0.0"),
        )

    def vm_show(self, options: Options) -> Any:
        return self.get(self.path(options, "virtualMachines"))

    def vm_deallocate(self, options: Options) -> Any:
        self.vm_show(options)["state"] = "deallocated"

    def vm_generalize(self, options: Options) -> Any:
        vm = self.vm_show(options)
        if vm["state"] != "deallocated" or not vm.get("forgetful"):
            raise RefusedError("The VM is not deallocated, or was not made an image")
        vm["state"] = "generalized"

    def az(self, arguments: List[str]) -> str:
        """Run an az command and return what it prints."""
        words = [word for word in arguments if not word.startswith("-")]
        options: Options = {}
        rest = arguments[next((n for n, word in enumerate(arguments) if word.startswith("-")), len(arguments)) :]
        command = words[: len(arguments) - len(rest)]
        while rest:
            name = SHORT.get(rest[0], rest[0])
            options[name] = "" if name in FLAGS else rest[1]
            del rest[: 1 if name in FLAGS else 2]
        do: Callable[[Options], Any] = getattr(self, "_".join(command).replace("-", "_"))
        answer = do(options)
        if "--query" in options:
            keys = options["--query"].split(" || ")
            return next((str(answer[key]) for key in keys if key in answer), "")
        return "" if answer is None else json.dumps(answer)

    def azcopy(self, arguments: List[str]) -> str:
        """Upload a file to the disk whose address it is."""
        copy, file, url, *more = arguments
        disk = self.get(url.partition("?")[0].partition(".net/")[2])
        if [copy, *more] != ["copy", "--blob-type", "PageBlob"] or disk["state"] != "ActiveUpload":
            raise RefusedError("this is no upload to a disk that waits for one")
        if str(os.stat(file).st_size) != disk["size"]:
            raise RefusedError("the disk is for a file of another size")
        disk["state"] = "Uploaded"
        return ""

    def ssh(self, arguments: List[str]) -> str:
        """Answer for the VM whose address it is."""
        user, _, address = next(word for word in arguments if "@" in word).partition("@")
        command = arguments[-1]
        vm = next(vm for vm in self.resources.values() if vm.get("publicIps") == address)
        if (vm["--admin-username"], vm["state"]) != (user, "running"):
            raise RefusedError("Permission denied (publickey).")
        if "--generalize" in command:
            vm["forgetful"] = True
        answers = {
            "uname -n": vm["name"],
            "resolvectl": f"{vm['name']}: {vm['privateIps']}",
            "is-enabled": "disabled",
            "journalctl": "reported Ready to 168.63.129.16, incarnation 1",
        }
        return "".join(answer for part, answer in answers.items() if part in command)


def main() -> int:
    """Do what the command in sys.argv says."""
    name, *arguments = sys.argv[1:]
    directory = os.environ[DIRECTORY]
    line = " ".join([name, *arguments])
    with open(os.path.join(directory, "commands"), "a", encoding="utf-8") as file:
        file.write(json.dumps([name, *arguments]) + "\n")
    if os.environ.get(HANG) and line.startswith(os.environ[HANG]):
        time.sleep(600)
    if os.environ.get(FAIL) and line.startswith(os.environ[FAIL]):
        print("ERROR: (Conflict) as wanted", file=sys.stderr)
        return 1
    if os.environ.get(RECORD):
        print(f"{SUBSCRIPTION}web{PROVIDER}/virtualMachines/builder")
        return 0
    state = os.path.join(directory, "subscription")
    resources = {}
    if os.path.exists(state):
        with open(state, encoding="utf-8") as file:
            resources = json.load(file)
    subscription = Subscription(resources)
    try:
        answer = getattr(subscription, name)(arguments)
    except RefusedError as refused:
        print(f"ERROR: {refused}", file=sys.stderr)
        return 1
    with open(state + ".new", "w", encoding="utf-8") as file:
        json.dump(subscription.resources, file)
    os.replace(state + ".new", state)  # at once, for somebody may be reading it
    if answer:
        print(answer if answer not in ("True", "False") else answer.lower())
    return 0


if __name__ == "__main__":
    sys.exit(main())
