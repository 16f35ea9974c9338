"""`cat-export`: a diffusers checkpoint as a bundle of ONNX and engine plans."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from cat_pruning import console
from cat_pruning.arguments import (
    MOST_PROMPTS,
    MOST_TEXT,
    Parser,
    check_output_directory,
    list_of,
    number,
    path,
    resolution,
    text,
    whole,
)
from cat_pruning.checkpoints.published import published_models
from cat_pruning.components import COMPONENT_PARTS
from cat_pruning.dtype import DType
from cat_pruning.errors import SettingsError
from cat_pruning.installation import require
from cat_pruning.models import miniatures
from cat_pruning.names import TITLES, Quantization, Target
from cat_pruning.settings import PruneSettings
from cat_pruning.terminal import say, terminal, waiting

if TYPE_CHECKING:
    from rich.console import Console

    from cat_pruning.bundle.bundle import Bundle
    from cat_pruning.bundle.schema import PlanSpec
    from cat_pruning.exporter.export import ExportConfig
    from cat_pruning.exporter.progress import Advance

_DESCRIPTION = """\
Turn a diffusers checkpoint into a bundle: step.onnx (one graph for full and pruned steps, with dynamic batch, height,
width, text length and kept tokens), prompt.onnx and timestep.onnx (what need not be computed on every step), engine
plans built from them, the pipeline's other parts, and a manifest with the hash of every file. The bundle is written
whole or not at all."""
_OF_PLANS = ("add_plans", "no_plugin", "refittable", "target")  # what goes with --add-plans
_EXAMPLES = """\
examples:
  cat-export --model sd3-mini --text-length 48 --out build/sd3-mini        the packaged miniature, in seconds
  cat-export --model sd3 --dtype bf16 --out sd3                            SD3-medium from the hub (gated: log in first)
  cat-export --model ./my-finetune --dtype bf16 --out tuned                a local directory in the diffusers layout
  cat-export --model flux-dev --dtype bf16 --lora style.safetensors:0.8 --out styled    an adapter fused in
  cat-export --model sd3 --random-weights --dtype bf16 --target onnx --out random    the architecture alone, no network
  cat-export --model ./my-finetune --verify layers --out tuned             every layer under ONNX Runtime against torch
  cat-export --model sd3 --dtype bf16 --target tensorrt --out sd3          on the machine with the GPU that will run it
  cat-export --model sd3 --resolution 1024x1024 --resolution 768x1344 --batch 1 --batch 4 --out sd3
                                                                           plans for two resolutions, 1 and 4 prompts
  cat-export --model sd3 --dtype fp16 --components all --out sd3           text encoders and VAE as graphs too
  cat-export --model ./my-finetune --quantize int8 --out tuned             the step in eight bits, for a processor
  cat-export --model ./my-finetune --dtype bf16 --quantize fp8 --calibrate prompts.txt    for plans
  cat-export --add-plans sd3 --target tensorrt                             for this machine's GPU, beside the others
then:
  cat-generate build/sd3-mini "a large red circle above a small blue star on a plain black background" -o out.png
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point of `cat-export`."""
    return console.run("cat-export", lambda: _export(_parser().parse_args(argv)))


def _target(text: str) -> str:
    """A target as it is spelt now; `rtx` is what it was called before."""
    if text == "rtx":
        sys.stderr.write("cat-export: --target rtx is spelt tensorrt_rtx, as --engine is\n")
        return Target.TENSORRT_RTX
    return text


def _parser() -> Parser:
    parser = Parser(
        prog="cat-export",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    checkpoint = parser.add_argument_group("checkpoint")
    what = checkpoint.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--model",
        type=text,
        help=f"{', '.join([*published_models(), *miniatures()])}; a local diffusers directory; or a hub id, owner/name",
    )
    what.add_argument(
        "--add-plans",
        type=path,
        metavar="BUNDLE",
        help="no new export: build plans (--target) from a bundle's graphs and add them to it, beside those it has",
    )
    checkpoint.add_argument("--revision", type=text, help="branch, tag or commit on the hub")
    checkpoint.add_argument(
        "--random-weights",
        action="store_true",
        help="the published architecture with random weights: no network, no pipeline, for sizes and speeds",
    )
    checkpoint.add_argument(
        "--lora",
        action="append",
        type=text,
        metavar="PATH[:SCALE]",
        help="fuse an adapter into the weights: a diffusers *.safetensors file or a PEFT directory; repeatable",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=path, help="the bundle's directory (default: the model's last name)")
    output.add_argument("--force", action="store_true", help="replace a bundle that is there")
    output.add_argument(
        "--target",
        action="append",
        type=_target,
        choices=[*map(str, Target)],  # argparse shows their repr
        help="what to build; repeatable. The ONNX graphs always are; tensorrt_rtx needs no GPU, tensorrt the one that "
        "will run the plans (default: all that this machine can build)",
    )
    output.add_argument(
        "--no-plugin",
        action="store_true",
        help="TensorRT's own kernels for the token operators instead of ours",
    )
    output.add_argument(
        "--components",
        type=list_of(str),
        default=(),
        metavar="PART,…",
        help=f"parts of the pipeline that become graphs and plans too, of {', '.join(COMPONENT_PARTS)}; or all. Their "
        "weights are in no other file then (default: none, they run in torch)",
    )
    output.add_argument(
        "--controlnet",
        action="store_true",
        help="a step that takes what a ControlNet adds to its blocks; without a ControlNet it adds zeros",
    )
    output.add_argument(
        "--refittable",
        action="store_true",
        help="plans that take adapters at run time (pipe.load_lora_weights); TensorRT-RTX builds them with a GPU only. "
        "ONNX Runtime takes adapters from any bundle",
    )
    output.add_argument(
        "--verify",
        nargs="?",
        const="outputs",
        choices=["outputs", "layers"],
        help="compare what the graphs return under ONNX Runtime with torch before the plans are built, and the built "
        "plans with both where a GPU runs them; layers: besides, every layer, and name the first that differs",
    )
    shape = parser.add_argument_group("shapes and precision")
    shape.add_argument(
        "--dtype", choices=[*map(str, DType)], default=str(DType.FP32), help="of the weights (default: fp32)"
    )
    bits = shape.add_mutually_exclusive_group()
    bits.add_argument(
        "--quantize",
        choices=["int8", "fp8"],
        help="weights and activations of the step in eight bits, and no adapters at run time. int8 without --calibrate "
        "takes activations as they come, for ONNX Runtime on a processor: no plans",
    )
    bits.add_argument(
        "--weights-only",
        choices=["int8", "int4"],
        help="the step's weights in blocks of 8 or 4 bits, for ONNX Runtime: slower than int8, and nearer to fp32 (8)",
    )
    shape.add_argument(
        "--calibrate",
        type=text,
        metavar="PROMPTS",
        help="make images of these prompts, and take the activations' scales from them, for plans: a file with one on "
        "each line, scenes:N or rich:N; a handful is enough",
    )
    shape.add_argument(
        "--unquantized",
        action="append",
        type=text,
        metavar="PATTERN",
        help="layers that stay as they are, as 'transformer_blocks.0.*'; repeatable",
    )
    shape.add_argument(
        "--resolution",
        type=resolution,
        action="append",
        metavar="HxW",
        help="pixels that the plans are built for; repeatable (default: what the model was trained on)",
    )
    shape.add_argument(
        "--batch",
        type=whole(1, MOST_PROMPTS),
        action="append",
        metavar="N",
        help="prompts per batch that the plans are built for; repeatable (default: 1)",
    )
    shape.add_argument(
        "--text-length",
        type=whole(1, MOST_TEXT),
        metavar="T",
        help="text tokens that the plans are built for (default: the pipeline's own)",
    )
    shape.add_argument(
        "--no-guidance",
        action="store_true",
        help="plans without classifier-free guidance: N rows per batch instead of 2 N",
    )
    shape.add_argument(
        "--keep-ratio",
        type=number(0, 1),
        default=PruneSettings().keep_ratio,
        metavar="R",
        help="fraction of the image tokens that a pruned step computes, in (0, 1] (default: 0.3)",
    )
    return parser


def _export(arguments: argparse.Namespace) -> None:
    if arguments.add_plans is not None:
        _add_plans(arguments)
        return
    started = time.perf_counter()
    # A wrong setting is told before the seconds that torch takes to import.
    settings = PruneSettings(keep_ratio=arguments.keep_ratio)
    if not settings.keep_ratio:
        raise SettingsError(
            "--keep-ratio 0: expected a share of the tokens, > 0",
            "to compute none on pruned steps needs no bundle of its own: any runs with cat-generate --preset forecast",
        )
    require("cat-export", "export")
    console.check_address_space()
    from cat_pruning.bundle.bundle import check_replaceable
    from cat_pruning.checkpoints.lora import parse_lora
    from cat_pruning.exporter.export import ExportConfig, default_targets, export
    from cat_pruning.exporter.verify import Verify

    console.quiet_libraries()
    quantization = _quantization(arguments)
    only_onnx = quantization is not None and not quantization.is_calibrated
    targets = tuple(map(Target, arguments.target or ((Target.ONNX,) if only_onnx else ())))
    config = ExportConfig(
        model=arguments.model,
        out=arguments.out or Path(Path(arguments.model).name),
        revision=arguments.revision,
        random_weights=arguments.random_weights,
        loras=tuple(map(parse_lora, arguments.lora or ())),
        dtype=DType(arguments.dtype),
        quantization=quantization,
        calibration=arguments.calibrate,
        unquantized=tuple(arguments.unquantized or ()),
        resolutions=tuple(arguments.resolution or ()),
        prompts=tuple(arguments.batch or (1,)),
        text_length=arguments.text_length,
        components=COMPONENT_PARTS if tuple(arguments.components) == ("all",) else tuple(arguments.components),
        guidance=not arguments.no_guidance,
        settings=settings,
        targets=targets or default_targets(refittable=arguments.refittable),
        plugin=not arguments.no_plugin,
        controlnet=arguments.controlnet,
        refittable=arguments.refittable,
        verify=Verify(arguments.verify) if arguments.verify else None,
        force=arguments.force,
    )
    check_output_directory("--out", config.out)  # before a checkpoint is downloaded
    check_replaceable(config.out, force=config.force)
    screen = terminal(stderr=True)
    bundle = export(config, lambda title: _stage(screen, title))
    _summarise(terminal(), config, bundle, time.perf_counter() - started)


def _quantization(arguments: argparse.Namespace) -> Quantization | None:
    if arguments.quantize == "int8" and arguments.calibrate is not None:
        return Quantization.INT8_CALIBRATED
    if arguments.quantize:
        return Quantization(arguments.quantize)
    return Quantization(f"weights-{arguments.weights_only}") if arguments.weights_only else None


def _tell_plans(screen: Console, plans: Sequence[PlanSpec]) -> None:
    from cat_pruning.bundle.plan_sets import plan_sets

    for each in plan_sets(plans):
        plan = each.plans[0]  # they differ in their graphs only
        say(
            f"{TITLES[plan.flavour]} {plan.version} plans for {', '.join(plan.architectures)}; token operators: "
            f"{plan.token_ops}{'; refittable' if plan.refittable else ''}",
            to=screen,
        )


def _add_plans(arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    others = [action for action in _parser()._actions if action.dest not in (*_OF_PLANS, "help")]
    if given := [each.option_strings[-1] for each in others if getattr(arguments, each.dest) != each.default]:
        raise SettingsError(f"--add-plans goes with no {', '.join(given)}: the bundle says what was exported")
    require("cat-export", "export")
    console.check_address_space()
    from cat_pruning.bundle.bundle import Bundle
    from cat_pruning.exporter.add_plans import add_plans
    from cat_pruning.exporter.export import default_targets

    console.quiet_libraries()
    had = len(Bundle.open(arguments.add_plans).manifest.plans)
    screen = terminal(stderr=True)
    bundle = add_plans(
        arguments.add_plans,
        tuple(map(Target, arguments.target or ())) or default_targets(refittable=arguments.refittable),
        plugin=not arguments.no_plugin,
        refittable=arguments.refittable,
        stage=lambda title: _stage(screen, title),
    )
    say(f"{bundle.path}  ({time.perf_counter() - started:.0f} s)", style="bold")
    _tell_plans(terminal(), bundle.manifest.plans[had:])


@contextmanager
def _stage(screen: Console, title: str) -> Iterator[Advance]:
    """A spinner while the stage runs, a line with its time when it is done."""
    from rich.text import Text

    started = time.perf_counter()
    with waiting(screen, f"{title} …") as status:

        def advance(done: int, total: int) -> None:
            status.update(f"{title} … {done}/{total}")

        yield advance
    screen.print(Text.assemble(("✓", "green"), f" {title} ", (f"{time.perf_counter() - started:.1f} s", "dim")))


def _summarise(screen: Console, config: ExportConfig, bundle: Bundle, seconds: float) -> None:
    from cat_pruning.exporter.verify_plans import can_verify

    manifest = bundle.manifest
    say(f"{bundle.path}  ({seconds:.0f} s)", to=screen, style="bold")
    files = Table()
    files.add_column("file")
    files.add_column("size", justify="right")
    parts = {name: spec.size for name, spec in manifest.files.items() if not name.startswith("pipeline/")}
    if others := sum(spec.size for name, spec in manifest.files.items() if name.startswith("pipeline/")):
        parts["pipeline/"] = others
    for name, size in parts.items():
        files.add_row(name, console.file_size(size))
    screen.print(files)

    _tell_plans(screen, manifest.plans)
    if config.verify and not all(map(can_verify, manifest.plans)):
        say(
            "plans are compared on the machine that runs them; there: "
            f"{bundle.export_command()} --verify {config.verify}",
            to=screen,
        )
    costs = Table(title="MACs of a step", title_justify="left", title_style="bold")
    for column in ("profile", "tokens", "kept", "full\nlinear", "pruned\nlinear", "full\nall", "pruned\nall", "bound"):
        costs.add_column(column, justify="left" if column == "profile" else "right", no_wrap=column == "profile")
    for profile, cost in zip(manifest.profiles, manifest.macs, strict=True):
        costs.add_row(
            profile.name,
            str(profile.num_tokens),
            str(profile.num_kept),
            *map(console.macs, (cost.full_linear, cost.pruned_linear, cost.full_total, cost.pruned_total)),
            f"{cost.full_total / cost.pruned_total:.2f}×" if cost.pruned_total else "–",
        )
    screen.print(costs)
    for profile, cost in zip(manifest.profiles, manifest.macs, strict=True):
        screen.print(
            f"{profile.name}: besides, {console.macs(cost.prompt_linear)} once per image (prompt.onnx) and "
            f"{console.macs(cost.timestep_linear)} for every step of its schedule (timestep.onnx)"
        )
    screen.print(
        "linear: linear and convolution layers only, as in the paper; all: attention scores too.\n"
        "bound: a full step's MACs (all) over a pruned one's; what the speedup of a step is measured against.",
        style="dim",
    )


if __name__ == "__main__":
    sys.exit(main())
