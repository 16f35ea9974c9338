"""Every command line with values, files and places that make no sense: one line, an exit code, and nothing changed."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
from bundle_files import export, small_manifest
from signing_keys import write_keys

from cat_pruning import entry
from cat_pruning.evaluation import arguments as eval_arguments
from cat_pruning.evaluation import cli as eval_cli
from cat_pruning.exporter import cli as export_cli
from cat_pruning.serving import cli as serve_cli
from cat_pruning.serving import load_cli
from cat_pruning.tools import bundle_arguments, bundle_cli, doctor_cli, generate_arguments, generate_cli
from cat_pruning.tuning import arguments as tune_arguments
from cat_pruning.tuning import cli as tune_cli

NOBODY = "http://127.0.0.1:9"  # where no server listens
# By the tool, or its command: its module, where its parser is made, what it does, and arguments that are taken.
TOOLS: dict[str, tuple[ModuleType, ModuleType, str, list[str]]] = {
    "cat-bench-serve": (load_cli, load_cli, "_bench", [NOBODY]),
    "cat-bundle diff": (bundle_cli, bundle_arguments, "_bundle", ["{bundle}", "{bundle}"]),
    "cat-bundle inspect": (bundle_cli, bundle_arguments, "_bundle", ["{bundle}"]),
    "cat-bundle prune": (bundle_cli, bundle_arguments, "_bundle", ["{bundle}", "--plans", "tensorrt"]),
    "cat-bundle pull": (bundle_cli, bundle_arguments, "_bundle", ["{bundle}", "{out}"]),
    "cat-bundle push": (bundle_cli, bundle_arguments, "_bundle", ["{bundle}", "{out}"]),
    "cat-bundle sign": (bundle_cli, bundle_arguments, "_bundle", ["{bundle}", "--key", "{key}"]),
    "cat-bundle verify": (bundle_cli, bundle_arguments, "_bundle", ["{bundle}"]),
    "cat-doctor": (doctor_cli, doctor_cli, "_doctor", ["{bundle}"]),
    "cat-eval": (eval_cli, eval_arguments, "_evaluate", ["{bundle}", "--out", "{out}", "--quick"]),
    "cat-export": (export_cli, export_cli, "_export", ["--model", "{model}", "--out", "{out}", "--target", "onnx"]),
    "cat-generate": (generate_cli, generate_arguments, "_generate", ["{bundle}", "a star", "--out", "{out}.png"]),
    "cat-serve": (serve_cli, serve_cli, "_serve", ["{bundle}"]),
    "cat-tune": (tune_cli, tune_arguments, "_tune", ["{bundle}", "--recordings", "{out}"]),
}
SECONDS = 60  # in which a refusal has to come, however busy the machine


@contextmanager
def at_once() -> Iterator[None]:
    """Fail where something waits."""

    def late(*_: object) -> None:
        raise AssertionError("it waits, or counts to a very large number")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Refused:
    """Runs a tool, which must refuse."""

    def __init__(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.place, self.capsys = place, capsys

    def __call__(self, tool: str, *more: str, changed: dict[str, str] | None = None) -> str:
        """The line, for the arguments that are taken, some of them changed, and more."""
        places = {"bundle": "no-bundle", "model": "./no-model", "out": "out", "key": "../key.pem"} | (changed or {})
        arguments = [argument.format_map(places) for argument in TOOLS[tool][3]]
        before = self.files()
        try:
            with at_once():
                code = TOOLS[tool][0].main([*tool.split()[1:], *arguments, *more])
        except SystemExit as stop:  # argparse's
            code = int(stop.code or 0)
        lines = [line for line in self.capsys.readouterr().err.splitlines() if not line.startswith("✓")]
        assert code == 2, lines
        assert len(lines) == 1, lines
        assert lines[0].startswith((f"{tool}: ", f"{tool.split()[0]}: "))
        assert len(lines[0]) < 1500 + 2 * sum(map(len, more))
        assert self.files() == before
        return lines[0]

    def files(self) -> list[tuple[str, int]]:
        return sorted((str(path), path.lstat().st_size) for path in self.place.rglob("*"))


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    write_keys(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return Refused(tmp_path / "here", capsys)


# ------------------------------------------------------------------ values


def options() -> list[tuple[str, argparse.Action]]:
    """Every option that takes a value, of every tool, as its own parser has it."""
    return [
        (tool, action)
        for tool, (_, module, _, _) in TOOLS.items()
        for action in actions(module, tool)
        if action.option_strings and action.type is not None and action.help != argparse.SUPPRESS
    ]


def actions(module: ModuleType, tool: str) -> list[argparse.Action]:
    """What the parser of a tool, or of one of its commands, takes."""
    parser = module._parser()
    for command in tool.split()[1:]:
        (commands,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
        parser = commands.choices[command]
    return list(parser._actions)


ABSURD = ["", "x", "nan", "-inf", "1e999", "-1", "999999999999", "9" * 5000, "\0", "0x10", "1,", "1,nan", "1x"]


@pytest.mark.parametrize(("tool", "action"), options(), ids=lambda value: getattr(value, "dest", value))
def test_values_that_make_no_sense(refused: Refused, tool: str, action: argparse.Action) -> None:
    """Of numbers, none is taken but the large ones that cost nothing; the bundle is not there in any case."""
    few = ("seed", "limit", "curve_prompts", "speedup", "guidance_scale")
    for value in ABSURD:
        line = refused(tool, f"{action.option_strings[0]}={value}")
        if "whole" in action.type.__qualname__ or "number" in action.type.__qualname__:
            assert action.option_strings[0] in line or action.dest in few


@pytest.mark.parametrize(
    ("tool", "option", "value"),
    [
        ("cat-export", "--batch", "999999999999"),
        ("cat-export", "--text-length", "1000000000000"),
        ("cat-export", "--resolution", "99999999x64"),
        ("cat-generate", "--steps", "100000000"),
        ("cat-generate", "--guidance-scale", "nan"),
        ("cat-generate", "--guidance-scale", "1e30"),
        ("cat-eval", "--seeds", "1000000000000"),
        ("cat-eval", "--steps", "28,100000000"),
        ("cat-eval", "--batch", "999999999999"),
        ("cat-eval", "--guidance-scale", "nan"),
        ("cat-eval", "--guidance-scale", "inf"),
        ("cat-tune", "--steps", "100000000"),
        ("cat-tune", "--full", "9,100000000"),
        ("cat-tune", "--guidance-scale", "-inf"),
    ],
)
def test_absurd_numbers_are_told_by_option(refused: Refused, tool: str, option: str, value: str) -> None:
    line = refused(tool, f"{option}={value}")
    assert f"argument {option}: " in line
    assert "expected" in line


@pytest.mark.parametrize("source", ["scenes:" + "9" * 5000, "scenes:٣", "rich:999999999999", "scenes:-1", "scenes:"])
@pytest.mark.parametrize(
    ("tool", "option"), [("cat-eval", "--prompts"), ("cat-tune", "--prompts"), ("cat-tune", "--measure")]
)
def test_scenes_that_there_are_not(refused: Refused, tool: str, option: str, source: str) -> None:
    assert "expected" in refused(tool, f"{option}={source}")


# ------------------------------------------------------------------ places

LONG = "x" * 300


@pytest.fixture
def places(refused: Refused) -> Path:
    """What can lie where a file or directory is expected."""
    here = refused.place
    (here / "folder").mkdir()
    (here / "file").write_text("mine")
    (here / "binary").write_bytes(bytes(range(256)) * 4)
    (here / "deep").write_text("[" * 99999)
    (here / "many").write_text('{"a":' * 99999)
    os.mkfifo(here / "pipe")
    (here / "loop").symlink_to("loop")
    (here / "dangling").symlink_to("nowhere/at/all")
    (here / "[red]b[bold]").mkdir()
    return here


KINDS = [
    "folder",
    "file",
    "binary",
    "deep",
    "pipe",
    "loop",
    "loop/in",
    "dangling",
    "file/in",
    "[red]b[bold]",
    LONG,
    "/",
    "nowhere",
]


OF_BUNDLES = [tool for tool in TOOLS if tool != "cat-bench-serve"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tool", OF_BUNDLES)
@pytest.mark.usefixtures("places")
def test_a_bundle_or_model_that_is_none(refused: Refused, tool: str, kind: str) -> None:
    """Refused by name; brackets in it are brackets."""
    line = refused(tool, changed={"bundle": kind, "model": kind if kind == "/" else f"./{kind}"})
    assert kind in line or (kind == "dangling" and "nowhere/at/all" in line)


@pytest.mark.parametrize("tool", [tool for tool in TOOLS if tool != "cat-bench-serve"])  # which takes no path to read
def test_names_do_not_reach_the_terminal_as_commands(refused: Refused, tool: str) -> None:
    line = refused(tool, changed={"bundle": "\x1b]0;\x9bmine\u202e", "model": "./\x1b]0;\x9bmine\u202e"})
    assert r"\x1b]0;\x9bmine\u202e" in line
    assert line.isprintable()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("folder", "[red]b[bold]", "nowhere")])
@pytest.mark.parametrize("tool", ["cat-eval", "cat-export", "cat-tune"])
@pytest.mark.usefixtures("places")
def test_a_directory_that_cannot_be_written(refused: Refused, tool: str, kind: str) -> None:
    """Told before the model or the bundle is looked for, which are not there either."""
    line = refused(tool, changed={"out": kind})
    if kind != "dangling":  # of which the directories can be made
        assert "cannot be written" in line
        assert kind in line


@pytest.mark.parametrize("place", ["bundle", "bundle/pipeline", "bundle/pipeline/new", "bundle/new"])
@pytest.mark.parametrize("tool", ["cat-eval", "cat-export", "cat-tune"])
def test_results_are_not_written_into_the_bundle(refused: Refused, tool: str, place: str) -> None:
    """Where it would not load again; an export may replace a bundle, and be in none."""
    export(refused.place / "bundle", small_manifest())
    line = refused(tool, changed={"bundle": "bundle", "out": place})
    assert f"{place} would be " in line or (tool, place) == ("cat-export", "bundle")
    assert "give another" in line


@pytest.mark.parametrize(
    ("tool", "changed", "more"),
    [
        ("cat-eval", {"out": "other/new"}, []),
        ("cat-export", {"out": "other/pipeline/new"}, []),
        ("cat-generate", {"out": "other/pipeline/out"}, []),
        ("cat-generate", {}, ["--compare", "--summary=other/manifest.json"]),
        ("cat-tune", {"out": "other"}, []),
    ],
)
def test_nothing_is_written_into_another_bundle(
    refused: Refused, tool: str, changed: dict[str, str], more: list[str]
) -> None:
    for name in ("bundle", "other"):
        export(refused.place / name, small_manifest())
    assert f"the bundle {refused.place / 'other'}" in refused(tool, *more, changed={"bundle": "bundle", **changed})


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "dangling"])
@pytest.mark.parametrize(
    ("tool", "name"), [("cat-eval", "report.html"), ("cat-tune", "tune.json"), ("cat-tune", "tune.png")]
)
def test_a_report_that_cannot_be_written_is_told_before_the_work(
    refused: Refused, places: Path, tool: str, name: str, kind: str
) -> None:
    (places / "out").mkdir()
    (places / kind).rename(places / "out" / name)
    export(places / "bundle", small_manifest())
    assert name in refused(tool, changed={"bundle": "bundle"})


def test_a_pipe_in_an_images_place(refused: Refused) -> None:
    os.mkfifo(refused.place / "out.png")
    assert "--out out.png cannot be written (it is no file, but a pipe" in refused("cat-generate")


@pytest.mark.parametrize("option", ["--out", "--summary"])
@pytest.mark.parametrize(
    "name", ["folder.png", "loop.png", "file/in.png", "nowhere/a.png", f"{LONG}.png", "dangling.png"]
)
def test_an_image_that_cannot_be_written(refused: Refused, places: Path, option: str, name: str) -> None:
    (places / "folder.png").mkdir()
    (places / "loop.png").symlink_to("loop.png")
    (places / "dangling.png").symlink_to("nowhere/at/all.png")
    line = refused("cat-generate", "--compare", f"{option}={name}")
    assert line.startswith(f"cat-generate: {option}")
    assert name.partition("/")[0] in line


@pytest.mark.parametrize("name", ["out", "out.gif", "out.png.txt", ".png", "/", ".", "a.png/"])
def test_an_image_of_another_format(refused: Refused, name: str) -> None:
    assert "--out" in refused("cat-generate", f"--out={name}")


def test_two_outputs_in_one_file(refused: Refused) -> None:
    line = refused("cat-generate", "--compare", "--summary=out.png")
    assert "--summary out.png is the same file as --out out.png" in line
    line = refused("cat-bench-serve", "--json=load.png", "--picture=load.png")
    assert "--picture load.png is the same file as --json load.png" in line


def test_no_server(refused: Refused) -> None:
    assert f"{NOBODY}/v1/images/generations did not answer" in refused("cat-bench-serve")


@pytest.mark.parametrize(
    ("tool", "option"), [("cat-eval", "--prompts"), ("cat-tune", "--prompts"), ("cat-tune", "--measure")]
)
@pytest.mark.parametrize(
    "kind", ["folder", "binary", "pipe", "loop", "dangling", "file/in", LONG, "/", "nowhere", "/dev/zero"]
)
@pytest.mark.usefixtures("places")
def test_prompts_that_are_no_file(refused: Refused, tool: str, option: str, kind: str) -> None:
    assert kind in refused(tool, f"{option}={kind}")


@pytest.mark.parametrize(
    "kind", ["folder", "file", "binary", "pipe", "loop", "dangling", "file/in", LONG, "/", "nowhere"]
)
@pytest.mark.usefixtures("places")
def test_an_adapter_that_is_none(refused: Refused, tiny_checkpoint: Path, kind: str) -> None:
    line = refused("cat-export", f"--lora={kind}", changed={"model": str(tiny_checkpoint)})
    assert kind in line or (kind == "dangling" and "nowhere/at/all" in line)


@pytest.mark.parametrize("option", ["--lpips-weights", "--clip-model"])
@pytest.mark.parametrize(
    "kind", ["folder", "file", "binary", "pipe", "loop", "dangling", "file/in", LONG, "/", "nowhere"]
)
@pytest.mark.usefixtures("places")
def test_a_metrics_weights_that_are_none(refused: Refused, option: str, kind: str) -> None:
    export(refused.place / "bundle", small_manifest())
    metric = "lpips" if option == "--lpips-weights" else "clip"
    line = refused("cat-eval", f"--metrics={metric}", f"{option}={kind}", changed={"bundle": "bundle"})
    assert kind in line


@pytest.mark.parametrize("kind", ["deep", "many", "binary"])
def test_captions_that_are_none(refused: Refused, places: Path, kind: str) -> None:
    (places / kind).rename(places / "captions.json")
    assert "captions.json is not" in refused("cat-eval", "--prompts=captions.json")


@pytest.mark.parametrize("kind", ["folder", "binary", "deep", "many", "pipe", "loop", "dangling", "file"])
@pytest.mark.parametrize("tool", [tool for tool in OF_BUNDLES if tool != "cat-export"])
def test_a_manifest_that_is_none(refused: Refused, places: Path, tool: str, kind: str) -> None:
    (places / "bundle").mkdir()
    (places / kind).rename(places / "bundle" / "manifest.json")
    if kind == "loop":
        (places / "bundle" / "manifest.json").unlink()
        (places / "bundle" / "manifest.json").symlink_to("manifest.json")
    line = refused(tool, changed={"bundle": "bundle"})
    assert "bundle" in line
    assert "--force" not in line  # which would be refused


@pytest.mark.parametrize("kind", ["folder", "binary", "deep", "many", "pipe", "file"])
@pytest.mark.parametrize("name", ["run.json", "results.jsonl"])
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_an_evaluation_that_is_none(refused: Refused, places: Path, kind: str, name: str, force: list[str]) -> None:
    (places / "out").mkdir()
    (places / kind).rename(places / "out" / name)
    line = refused("cat-eval", *force)
    assert name in line or kind == "folder"  # which is empty, and in nobody's way yet


@pytest.mark.parametrize("kind", ["binary", "deep", "many", "pipe", "file"])
@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json", "vae/config.json"])
def test_a_checkpoints_file_that_is_none(
    refused: Refused, places: Path, tiny_checkpoint: Path, kind: str, name: str
) -> None:
    (tiny_checkpoint / name).unlink()
    (places / kind).rename(tiny_checkpoint / name)
    line = refused("cat-export", changed={"model": str(tiny_checkpoint)})
    assert Path(name).name in line


# ------------------------------------------------------------------ what nobody foresaw


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            ZeroDivisionError("division by zero"),
            70,
            "unforeseen: ZeroDivisionError: division by zero; CAT_PRUNING_LOG=",
        ),
        (MemoryError(), 2, "there is not enough memory"),
        (KeyboardInterrupt(), 130, "interrupted; "),
        (BrokenPipeError(), 1, ""),
    ],
)
@pytest.mark.parametrize("tool", TOOLS)
def test_what_nobody_foresaw_is_a_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tool: str,
    error: BaseException,
    code: int,
    said: str,
) -> None:
    def fail(arguments: argparse.Namespace) -> None:
        raise error

    module, _, command, arguments = TOOLS[tool]
    monkeypatch.setattr(module, command, fail)
    assert module.main([*tool.split()[1:], *arguments]) == code
    found = capsys.readouterr().err
    assert found.startswith(f"{tool.split()[0]}: {said}") if said else found == ""
    assert found.count("\n") == bool(said)


@pytest.mark.parametrize("tool", TOOLS)
def test_a_log_level_that_is_none(refused: Refused, monkeypatch: pytest.MonkeyPatch, tool: str) -> None:
    monkeypatch.setenv("CAT_PRUNING_LOG", "foo")
    assert "CAT_PRUNING_LOG='foo': expected CRITICAL, ERROR, WARNING, INFO, DEBUG" in refused(tool)


def test_the_tools_are_all() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert {tool.split()[0] for tool in TOOLS} == project["project"]["scripts"].keys() == entry._TOOLS.keys()
    for tool, (module, *_) in TOOLS.items():
        assert module is importlib.import_module(entry._TOOLS[tool.split()[0]])
        assert isinstance(module.main, Callable)
    assert {tool.split()[1] for tool in TOOLS if tool.startswith("cat-bundle ")} == bundle_cli._COMMANDS.keys()
