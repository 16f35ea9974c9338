"""The container's files: their syntax, and that what they name is there. None of them has run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from cat_pruning.serving.cli import API_KEY, parse

DEPLOY = Path(__file__).parents[2] / "deploy"
INSTRUCTIONS = {"ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN"}
INSTRUCTIONS |= {"USER", "VOLUME", "EXPOSE", "STOPSIGNAL", "ENTRYPOINT", "CMD"}


def instructions() -> list[tuple[str, str]]:
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return loaded


def test_the_dockerfile_has_known_instructions_and_a_command_that_is_taken() -> None:
    found = instructions()
    assert {name for name, _ in found} == INSTRUCTIONS
    assert [name for name, _ in found][:2] == ["ARG", "FROM"]
    commands = dict(found)
    assert json.loads(commands["ENTRYPOINT"]) == ["/opt/venv/bin/cat-serve"]
    assert parse(json.loads(commands["CMD"])).host == "0.0.0.0"


def test_the_services_fit_the_dockerfile_and_the_command_line() -> None:
    services = compose()["services"]
    serve = services["serve"]
    arguments = parse(serve["command"])
    assert serve["environment"].keys() == {API_KEY}
    assert (DEPLOY / serve["build"]["context"] / serve["build"]["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    assert float(serve["stop_grace_period"].removesuffix("s")) > arguments.grace
    assert [str(path) for path in arguments.bundle] == [serve["volumes"][0].split(":")[-2]]
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service["ports"])
    compile(serve["healthcheck"]["test"][-1], "healthcheck", "exec")


def test_prometheus_asks_the_service() -> None:
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    host, port = target.split(":")
    assert host in compose()["services"]
    assert compose()["services"][host]["ports"][0].endswith(f":{port}")
