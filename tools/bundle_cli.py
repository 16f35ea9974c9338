"""`cat-bundle`: what is in a bundle, whether it is what was exported, what is dropped from it, how two differ."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from cat_pruning import console
from cat_pruning.errors import BundleError
from cat_pruning.terminal import Waiting, say, terminal, waiting
from cat_pruning.tools.bundle_arguments import parse


def main(argv: list[str] | None = None) -> int:
    """Entry point of `cat-bundle`."""
    codes: list[int] = []
    code = console.run("cat-bundle", lambda: codes.append(_bundle(parse(argv))))
    return code or codes[0]


def _bundle(arguments: argparse.Namespace) -> int:
    """Run a command; the exit code: 1 where a bundle does not hold, or two differ."""
    return _COMMANDS[arguments.command](arguments)


def _inspect(arguments: argparse.Namespace) -> int:
    from cat_pruning.bundle.bundle import Bundle
    from cat_pruning.tools.bundle_contents import contents_of
    from cat_pruning.tools.bundle_tables import print_contents

    contents = contents_of(Bundle.open(arguments.bundle))
    if arguments.json:
        _write_json(dataclasses.asdict(contents))
    else:
        print_contents(terminal(), contents)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from cat_pruning.bundle.bundle import Bundle
    from cat_pruning.bundle.signatures import PublicKey
    from cat_pruning.tools.bundle_verification import verify_bundle
    from cat_pruning.tools.findings_table import findings_table

    with waiting(terminal(stderr=True), "Read and hash every file …"):
        public_key = None if arguments.public_key is None else PublicKey.read(arguments.public_key)
        bundle = Bundle.open(arguments.bundle, public_key)
        findings = verify_bundle(bundle)
    holds = all(finding.status != "problem" for finding in findings)
    if arguments.json:
        _write_json(
            {
                "path": str(bundle.path),
                "holds": holds,
                "signed_with": str(arguments.public_key) if arguments.public_key else None,
                "findings": [dataclasses.asdict(each) for each in findings],
            }
        )
        return int(not holds)
    screen = terminal()
    screen.print(findings_table(findings, set()))
    signed = f", signed with the key of {arguments.public_key}" if arguments.public_key else ""
    verdict = f"is what was exported{signed}" if holds else "is not what was exported"
    say(f"{bundle.path} {verdict}.", to=screen, style="bold green" if holds else "bold red")
    return int(not holds)


def _prune(arguments: argparse.Namespace) -> int:
    from cat_pruning.bundle.pruning import prune_bundle

    dropped = prune_bundle(arguments.bundle, arguments.plans or (), arguments.schedules or ())
    if arguments.json:
        _write_json({"path": str(arguments.bundle), **dataclasses.asdict(dropped)})
        return 0
    for kind, names in (("plans", dropped.plans), ("schedule", dropped.schedules)):
        for name in names:
            say(f"dropped the {kind} {name}")
    say(f"{arguments.bundle} is smaller by {console.file_size(dropped.num_bytes)}", style="bold")
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from cat_pruning.bundle.bundle import Bundle
    from cat_pruning.tools.bundle_diff import differences
    from cat_pruning.tools.bundle_tables import print_differences

    first, second = Bundle.open(arguments.bundle), Bundle.open(arguments.other)
    found = differences(first, second)
    if arguments.json:
        fields = {"first": str(first.path), "second": str(second.path), "same": not found}
        _write_json(fields | {"differences": [dataclasses.asdict(each) for each in found]})
    elif found:
        print_differences(terminal(), first, second, found)
    else:
        say(f"{first.path} and {second.path} are the same bundle")
    return int(bool(found))


def _sign(arguments: argparse.Namespace) -> int:
    from cat_pruning.bundle.bundle import Bundle
    from cat_pruning.bundle.changes import sign_bundle
    from cat_pruning.bundle.signatures import read_private_key
    from cat_pruning.tools.bundle_verification import verify_bundle

    read_private_key(arguments.key)  # before the files are read
    with waiting(terminal(stderr=True), "Read and hash every file …"):
        bundle = Bundle.open(arguments.bundle)
        for finding in verify_bundle(bundle):
            if finding.status == "problem":
                raise BundleError(f"{bundle.path} is not signed: {finding.text}", finding.remedy)
    sign_bundle(bundle, arguments.key)
    say(f"{bundle.path} is signed", style="bold")
    return 0


def _push(arguments: argparse.Namespace) -> int:
    from cat_pruning.bundle.bundle import Bundle
    from cat_pruning.bundle.pulling import copy_bundle
    from cat_pruning.bundle.pushing import push

    bundle = Bundle.open(arguments.bundle)
    with waiting(terminal(stderr=True), "Hash every file …") as status:
        told = partial(_tell, status)
        if isinstance(arguments.to, str):
            push(bundle, arguments.to, force=arguments.force, told=told)
        else:
            copy_bundle(bundle, arguments.to, force=arguments.force, told=told)
    say(f"{arguments.to} has {bundle.path}", style="bold")
    return 0


def _pull(arguments: argparse.Namespace) -> int:
    from cat_pruning.bundle.bundle import Bundle
    from cat_pruning.bundle.pulling import copy_bundle, pull
    from cat_pruning.bundle.signatures import PublicKey

    public_key = None if arguments.public_key is None else PublicKey.read(arguments.public_key)
    with waiting(terminal(stderr=True), "Look for the bundle …") as status:
        if isinstance(arguments.bundle, str):
            told = partial(_tell, status)
            bundle = pull(arguments.bundle, arguments.out, force=arguments.force, public_key=public_key, told=told)
        else:
            source = Bundle.open(arguments.bundle, public_key)
            bundle = copy_bundle(source, arguments.out, force=arguments.force, told=partial(_tell, status))
    size = sum(spec.size for spec in bundle.manifest.files.values())
    say(f"{bundle.path}  {console.file_size(size)}", style="bold")
    return 0


def _tell(status: Waiting, name: str) -> None:
    status.update(f"{name} …")


def _write_json(fields: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(fields, indent=2) + "\n")


_COMMANDS: Final[dict[str, Callable[[argparse.Namespace], int]]] = {
    "diff": _diff,
    "inspect": _inspect,
    "prune": _prune,
    "pull": _pull,
    "push": _push,
    "sign": _sign,
    "verify": _verify,
}


if __name__ == "__main__":
    sys.exit(main())
