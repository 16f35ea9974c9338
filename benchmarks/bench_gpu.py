"""What pruning is worth on a GPU: steps, whole loops, peers, bandwidth and the selection; `make bench-gpu`.

The published architecture with random weights in bf16, made on the device, at 1024x1024 with guidance: two rows. Text
encoders and autoencoder are left out; prompts are random embeddings, and the scheduler is the pipeline's own. What is
compared with each other runs in turn within every round, timed by CUDA events; medians and ratios are over the rounds.

Every measurement (`MEASUREMENTS`) is a generator of named results, written as they come, so that one that is stopped
leaves what it had. `--device cpu --tiny` runs all of it at sizes for a machine without a GPU, to test the code.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cat_pruning.runtime import kmeans, selection
from cat_pruning.settings import PruneSettings

if TYPE_CHECKING:
    from cat_pruning.exporter.published import Published

RESULTS = Path(__file__).parent / "results"
LOOP_STEPS = (28, 50)
GUIDANCE = {"sd3": 7.0, "pixart-sigma": 4.5}  # of the pipelines, at their defaults
REPEATS = 4  # steps between two events: the host runs ahead, as it does in a loop
# The same code at sizes for a machine without a GPU: (changes of the config, tokens high and wide, text rows).
TINY: dict[str, tuple[dict[str, Any], tuple[int, int], int]] = {
    "sd3": (
        {
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 24,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 20,
        },
        (8, 8),
        7,
    ),
    "pixart-sigma": (
        {
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 6,
            "cross_attention_dim": 48,
            "caption_channels": 24,
        },
        (8, 8),
        7,
    ),
}
MODELS = tuple(TINY)

Results = Iterator[tuple[str, Any]]
Run = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """What every measurement is told.

    tiny: sizes for a machine without a GPU. steps: of the loops.
    """

    model: str
    device: torch.device
    tiny: bool = False
    rounds: int = 9
    steps: tuple[int, ...] = LOOP_STEPS
    prune: PruneSettings = field(default_factory=PruneSettings)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; a CPU is exact enough to be tested in fp32 only."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def grid(self) -> tuple[int, int]:
        """Image tokens, high and wide."""
        return TINY[self.model][1] if self.tiny else (64, 64)

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]


class Case:
    """A model on the device, and what a pipeline would pass to it for one prompt with guidance."""

    def __init__(self, setting: Setting) -> None:
        from cat_pruning.exporter.published import published_models
        from cat_pruning.step_io import LATENTS

        self.setting = setting
        published = published_models()[setting.model]
        changes, _, tiny_text = TINY[setting.model]
        text_length = tiny_text if setting.tiny else published.text_length
        self.family, device, dtype = published.family, setting.device, setting.dtype
        self.transformer: Any = random_on(device, dtype, published, changes if setting.tiny else {})
        self.config = self.transformer.config
        self.dims = self.family.dims(self.config, setting.grid, batch=2, text_length=text_length, num_kept=0)
        shapes = self.family.input_shapes(self.config, self.dims)
        generator = torch.Generator(device).manual_seed(0)
        self.arguments = {
            name: torch.randn([int(d) for d in shapes[name]], generator=generator, device=device, dtype=dtype)
            for name in self.family.argument_names(self.config)
        }
        if "encoder_attention_mask" in self.arguments:  # a prompt of some 60 tokens, and an empty negative one
            mask = torch.zeros_like(self.arguments["encoder_attention_mask"])
            mask[1, : max(2, text_length // 5)] = 1
            mask[0, :1] = 1
            self.arguments["encoder_attention_mask"] = mask
        self.latents = torch.randn([1, *shapes[LATENTS][1:]], generator=generator, device=device, dtype=dtype)

    @property
    def rows(self) -> Tensor:
        """The latents as guidance passes them."""
        return torch.cat([self.latents] * 2)

    def scheduler(self, steps: int) -> Any:
        """The pipeline's own scheduler, its schedule set."""
        import diffusers

        if self.setting.model == "sd3":
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        else:
            scheduler = diffusers.DPMSolverMultistepScheduler(beta_schedule="linear")
        scheduler.set_timesteps(steps, device=self.setting.device)
        return scheduler

    def call(self, transformer: Any, rows: Tensor, timestep: Tensor) -> Tensor:
        """One call as the pipeline makes it: the noise prediction, (2, C, H, W)."""
        own = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}} if self.family.name == "pixart" else {}
        noise: Tensor = transformer(
            hidden_states=rows, timestep=timestep.expand(2), **self.arguments, **own, return_dict=False
        )[0]
        return noise[:, : self.config["in_channels"]]  # PixArt's variance is dropped

    def sample(self, transformer: Any, steps: int, on_step: Callable[[int], None] = lambda step: None) -> Tensor:
        """A whole loop: the latents at its end. `on_step` is called before every step."""
        scheduler, latents, scale = self.scheduler(steps), self.latents, GUIDANCE[self.setting.model]
        for index, timestep in enumerate(scheduler.timesteps):
            on_step(index)
            negative, positive = self.call(transformer, torch.cat([latents] * 2), timestep).chunk(2)
            noise = negative + scale * (positive - negative)
            latents = scheduler.step(noise, timestep, latents, return_dict=False)[0]
        return latents


def random_on(
    device: torch.device, dtype: torch.dtype, published: Published, changes: dict[str, Any]
) -> torch.nn.Module:
    """The architecture with random weights made where they will be; seconds for two billion on a GPU."""
    from cat_pruning.dtype import DType
    from cat_pruning.exporter.random_weights import hollow_transformer

    name = next(each for each in DType if each.torch is dtype)
    module = hollow_transformer(published.transformer_class, {**published.transformer, **changes}, name)
    generator = torch.Generator(device).manual_seed(0)
    for part in module.modules():
        for leaf, parameter in list(part.named_parameters(recurse=False)):
            values = torch.empty(parameter.shape, dtype=dtype, device=device).normal_(0.0, 0.02, generator=generator)
            setattr(part, leaf, torch.nn.Parameter(values, requires_grad=False))
        for leaf, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, leaf, buffer.to(device))
    return module


def steps(setting: Setting) -> Results:
    """A full step, a pruned step that selects, and the selection alone; with CUDA graphs and without."""
    case = Case(setting)
    yield "attention", attention_backends(case)
    rate = matmul_tflops(8192 if not setting.tiny else 64, setting)
    yield "bf16_matmul_tflops", rate
    for captured in (True, False):
        contestants = step_contestants(case, captured)
        times = interleaved(contestants, setting.rounds, setting.device, REPEATS)
        ratios = [full / pruned for full, pruned in zip(times["full"], times["pruned"], strict=True)]
        shares = [alone / pruned for alone, pruned in zip(times["selection"], times["pruned"], strict=True)]
        macs, bound = step_macs(setting.model), step_bound(setting.model)
        tflops = {kind: 2 * macs[kind] / medians(times)[kind] / 1e9 for kind in ("full", "pruned")}
        yield (
            "with CUDA graphs" if captured else "without CUDA graphs",
            {
                "ms": medians(times),
                "rounds_ms": times,
                "speedup": statistics.median(ratios),
                "mac_bound": bound,
                "of_bound": statistics.median(ratios) / bound,
                "selection_share": statistics.median(shares),
                "tflops": tflops,
                "of_matmul_rate": {kind: value / rate for kind, value in tflops.items()},
            },
        )


def step_contestants(case: Case, captured: bool) -> dict[str, Run]:
    """Steps in the middle of an image; each has run often enough to be captured."""
    from cat_pruning.runtime.image import every_token
    from cat_pruning.runtime.policies import CatSelector
    from cat_pruning.runtime.step_engine import ordinary_tensors
    from cat_pruning.runtime.torch_engine import TorchStepEngine

    setting = case.setting
    engine = TorchStepEngine(case.transformer, cuda_graphs=captured)
    session, rows = engine.session(), case.rows
    session.begin(case.dims, case.family.conditioning(case.arguments, case.config, setting.grid))
    every = every_token(rows, setting.num_tokens)
    selector = CatSelector(case.family, case.config, setting.prune, setting.grid, setting.device)
    with ordinary_tensors():
        selector.refer_to(session.step(rows, 999.0, every))
        noise = session.step(rows * 0.9, 900.0, every)
        selector.first(rows, noise)

    def full() -> Tensor:
        return session.step(rows, 500.0, every)

    def pruned() -> Tensor:
        return session.step(rows, 500.0, selector)

    @torch.no_grad()
    def select() -> None:
        selector(rows, noise)

    for run in (full, pruned, select) * 3:
        run()
    if engine.cuda_graphs and session._graphs.num_captured != 2:
        raise RuntimeError("the steps could not be captured: see the warning in the log")
    return {"full": full, "pruned": pruned, "selection": graph_of(select, setting.device) if captured else select}


def graph_of(run: Run, device: torch.device) -> Run:
    """`run`, which has run before, as a captured graph, on a GPU."""
    if device.type != "cuda":
        return run
    from cat_pruning.runtime import cuda_graphs

    replay: Run = cuda_graphs.capture(lambda: _ignore(run()), device, []).replay
    return replay


def _ignore(result: object) -> None:
    pass


def loops(setting: Setting) -> Results:
    """Whole images, all steps full against the defaults' schedule, through one engine; with and without CUDA graphs."""
    from cat_pruning.runtime.generate import never_pruned
    from cat_pruning.runtime.torch_engine import TorchStepEngine
    from cat_pruning.runtime.transformer import CatTransformer

    case = Case(setting)
    for captured in (True, False):
        engine = TorchStepEngine(case.transformer, cuda_graphs=captured)
        for num_steps in setting.steps:
            # A transformer each: other settings would make a selector anew, and its steps would be captured anew.
            contestants: dict[str, Run] = {
                name: functools.partial(case.sample, CatTransformer(engine, settings), num_steps)
                for name, settings in (("full", never_pruned(setting.prune, num_steps)), ("CAT", setting.prune))
            }
            rounds = setting.rounds if captured else 3
            times = interleaved(contestants, rounds, setting.device)
            ratios = [full / cat for full, cat in zip(times["full"], times["CAT"], strict=True)]
            bound = loop_bound(setting.model, num_steps, setting.prune)
            yield (
                f"{num_steps} steps, {'with' if captured else 'without'} CUDA graphs",
                {
                    "ms": medians(times),
                    "rounds_ms": times,
                    "speedup": statistics.median(ratios),
                    "mac_bound": bound,
                    "of_bound": statistics.median(ratios) / bound,
                },
            )
    if setting.device.type == "cuda":
        yield "peak_memory_gb", torch.cuda.max_memory_allocated(setting.device) / 1e9


def synchronisations(setting: Setting) -> Results:
    """No host synchronisation from an image's second step on; raises where torch sees one.

    The first two images may: capturing a graph does, and that happens up to the second image's eighth step. Beginning
    an image copies the schedule and the prompt.
    """
    from cat_pruning.runtime.transformer import CatTransformer

    case = Case(setting)
    for captured in (True, False):
        transformer = CatTransformer.from_model(case.transformer, setting.prune, cuda_graphs=captured)
        num_steps = min(setting.steps)
        for _ in range(2):
            case.sample(transformer, num_steps)
        with no_synchronisation(setting.device) as begin:
            case.sample(transformer, num_steps, lambda index, begin=begin: begin() if index == 1 else None)
        yield f"{'with' if captured else 'without'} CUDA graphs", f"none in steps 2 to {num_steps}"


@contextmanager
def no_synchronisation(device: torch.device) -> Iterator[Run]:
    """Yields what to call where synchronising becomes an error, until the end of the block. On a CPU, nothing."""
    is_cuda = device.type == "cuda"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)
        try:
            yield lambda: torch.cuda.set_sync_debug_mode("error") if is_cuda else None
        finally:
            if is_cuda:
                torch.cuda.set_sync_debug_mode("default")


def diffusers_eager(setting: Setting) -> Results:
    """The module as diffusers has it, beside our full and pruned step with CUDA graphs."""
    yield from _peer(setting, "diffusers", lambda module: module)


def compiled(setting: Setting, mode: str = "default") -> Results:
    """The same module under torch.compile."""
    yield from _peer(setting, f"torch.compile, {mode}", lambda module: torch.compile(module, mode=mode, dynamic=False))


def _peer(setting: Setting, name: str, made: Callable[[Any], Any]) -> Results:
    case = Case(setting)
    timestep, rows = torch.tensor(500.0, device=setting.device), case.rows
    peer = made(case.transformer)

    @torch.no_grad()
    def step() -> Tensor:
        return case.call(peer, rows, timestep)

    started = time.perf_counter()
    step()
    synchronize(setting.device)
    yield "seconds_of_the_first_step", time.perf_counter() - started
    ours = step_contestants(case, captured=True)
    times = interleaved(
        {name: step, "full": ours["full"], "pruned": ours["pruned"]}, setting.rounds, setting.device, REPEATS
    )
    yield "attention", attention_backends(case)
    yield (
        name,
        {
            "ms": medians(times),
            "tflops": 2 * step_macs(setting.model)["full"] / medians(times)[name] / 1e9,
            "over_ours": {kind: ratio(times[name], times[kind]) for kind in ("full", "pruned")},
        },
    )


def matmul_rate(setting: Setting) -> Results:
    """The card's bf16 rate on square matrices, to hold the steps' against: the best of the sizes' medians."""
    rates = {}
    for size in (64,) if setting.tiny else (4096, 8192, 16384):
        rates[size] = matmul_tflops(size, setting)
        yield f"{size}^3", rates[size]
    yield "bf16_tflops", max(rates.values())


def matmul_tflops(size: int, setting: Setting) -> float:
    """TFLOP/s of a square bf16 product of random matrices."""
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=setting.device) for _ in range(2))
    multiply = functools.partial(torch.mm, left, right, out=torch.empty_like(left))
    times = interleaved({"mm": multiply}, setting.rounds, setting.device, REPEATS)
    return 2 * size**3 / statistics.median(times["mm"]) / 1e9


def select_alone(setting: Setting) -> Results:
    """Algorithm 2 alone, at SD3's 4096 tokens: KMeans once per image, the selection on every pruned step."""
    prune, device, channels = setting.prune, setting.device, 64
    noise = torch.randn(2, setting.num_tokens, channels, generator=torch.Generator().manual_seed(0)).to(device)
    position = kmeans.position_encoding(*setting.grid, channels, device)
    features = selection.cluster_features(noise, position, prune.noise_scale)
    initial = kmeans.initial_tokens(*setting.grid, prune.num_clusters, device)
    clusters = kmeans.kmeans(features, initial, prune.kmeans_iterations)
    count, num_kept = torch.zeros(noise.shape[:2], device=device), prune.num_kept(setting.num_tokens)

    def select() -> None:
        kept = selection.next_selection(noise, clusters, count, num_kept, prune)
        count.copy_(selection.count_selection(count, kept, prune.staleness_decay))

    runs: dict[str, Run] = {
        "selection": select,
        "kmeans": lambda: kmeans.kmeans(features, initial, prune.kmeans_iterations),
    }
    for run in runs.values():
        run()
    if device.type == "cuda":
        runs |= {f"{name}, captured": graph_of(run, device) for name, run in runs.items()}
    yield "ms", medians(interleaved(runs, setting.rounds, device))


def token_kernels(setting: Setting) -> Results:
    """Gather and scatter, torch's and ours, against a copy of the same bytes: `bench_token_kernels`."""
    import bench_token_kernels

    for name in bench_token_kernels.DTYPES:
        yield name, bench_token_kernels.measure(name, setting.device, setting.rounds)


MEASUREMENTS: dict[str, Callable[[Setting], Results]] = {
    "matmul": matmul_rate,
    "selection": select_alone,
    "kernels": token_kernels,
    "steps": steps,
    "loops": loops,
    "synchronisations": synchronisations,
    "diffusers": diffusers_eager,
    "compile": compiled,
    "autotune": functools.partial(compiled, mode="max-autotune-no-cudagraphs"),
}
WITHOUT_MODEL = ("matmul", "selection", "kernels")


def attention_backends(case: Case) -> dict[str, str]:
    """Which kernel torch takes for the image's attention, in a full and in a pruned step."""
    from torch.nn.attention import SDPBackend

    from cat_pruning.step_io import CacheRows

    setting, spec = case.setting, case.family.caches(case.config)[0]
    heads = case.config["num_attention_heads"]
    text = int(case.dims.text_length) if spec.rows is CacheRows.JOINT else 0
    names = {}
    for kind, kept in (("full", setting.num_tokens), ("pruned", setting.prune.num_kept(setting.num_tokens))):
        query, key = (
            torch.empty(2, heads, rows + text, spec.width // heads, dtype=setting.dtype, device=setting.device)
            for rows in (kept, setting.num_tokens)
        )
        chosen = torch._fused_sdp_choice(query, key, key)
        names[kind] = next((name for name, each in SDPBackend.__members__.items() if int(each) == chosen), str(chosen))
    return names


def committed_macs(model: str) -> dict[str, int]:
    """MACs of the parts of an image at 1024x1024, as `make bench-macs` counted them, attention scores included."""
    content = json.loads((RESULTS / "macs.json").read_text(encoding="utf-8"))
    counted: dict[str, int] = content[model]["step"]["all"]
    return counted


def step_macs(model: str) -> dict[str, int]:
    """MACs of what the torch engine and diffusers compute in a step: nothing is split off."""
    macs = committed_macs(model)
    small = macs["prompt"] + macs["timestep"]
    return {kind: macs[kind] + small for kind in ("full", "pruned")}


def step_bound(model: str) -> float:
    """The most that a pruned step can gain."""
    macs = step_macs(model)
    return macs["full"] / macs["pruned"]


def loop_bound(model: str, num_steps: int, settings: PruneSettings) -> float:
    """The most that an image of so many steps can gain."""
    from cat_pruning.exporter.macs import ImageMacs

    image = ImageMacs(**committed_macs(model))
    return image.unpruned(num_steps) / image.pruned_image(num_steps, settings)


def interleaved(runs: dict[str, Run], rounds: int, device: torch.device, repeats: int = 1) -> dict[str, list[float]]:
    """Milliseconds of every contestant in every round, one after the other; two rounds before them are not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(-2, rounds):
        for name, run in runs.items():
            elapsed = timed(run, device, repeats)
            if index >= 0:
                times[name].append(elapsed)
    return times


def timed(run: Run, device: torch.device, repeats: int = 1) -> float:
    """Milliseconds of one of `repeats` runs, by CUDA events where there is a GPU."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - started) * 1e3 / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    """Over the rounds."""
    return {name: statistics.median(values) for name, values in times.items()}


def ratio(slow: list[float], fast: list[float]) -> float:
    """The median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def main(argv: list[str] | None = None) -> int:
    """Measure, print each result as it comes, and write them all; 2 where there is no GPU and none was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurement", nargs="*", help=f"of {', '.join(MEASUREMENTS)} (default: all)")
    parser.add_argument("--model", action="append", choices=MODELS, help="repeatable (default: both)")
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--tiny", action="store_true", help="sizes for a machine without a GPU; numbers mean nothing")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, action="append", help="of a loop; repeatable (default: 28, 50)")
    parser.add_argument("--out", type=Path, default=RESULTS / "bench-gpu.json")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.measurement) - set(MEASUREMENTS):
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(MEASUREMENTS)}")
    if arguments.device.type == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("bench_gpu needs an NVIDIA GPU, and torch has no CUDA device here\n")
        return 2
    collected: dict[str, Any] = {}
    for name in arguments.measurement or MEASUREMENTS:
        for model in MODELS[:1] if name in WITHOUT_MODEL else arguments.model or MODELS:
            place = collected.setdefault(name, {})
            if name not in WITHOUT_MODEL:
                place = place.setdefault(model, {})
            setting = Setting(
                model,
                arguments.device,
                arguments.tiny,
                arguments.rounds,
                tuple(arguments.steps or LOOP_STEPS),
                PruneSettings(num_clusters=5) if arguments.tiny else PruneSettings(),
            )
            for title, result in MEASUREMENTS[name](setting):
                place[title] = result
                arguments.out.write_text(json.dumps(collected, indent=2) + "\n", encoding="utf-8")
                print(f"{name}, {model}: {title}: {json.dumps(_without_rounds(result))}", flush=True)  # noqa: T201
            if arguments.device.type == "cuda":
                torch.cuda.empty_cache()
    return 0


def _without_rounds(result: Any) -> Any:
    if isinstance(result, dict):
        return {name: _without_rounds(value) for name, value in result.items() if name != "rounds_ms"}
    return round(result, 4) if isinstance(result, float) else result


if __name__ == "__main__":
    sys.exit(main())
