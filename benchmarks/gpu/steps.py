"""Single steps: full, pruned and the selection alone; by image size, by kept tokens, and kernel by kernel."""

from __future__ import annotations

from typing import Any

import torch
from timing import REPEATS, Run, graph_of, interleaved, medians, ratio
from torch import Tensor

from gpu.bounds import step_bound, step_macs
from gpu.case import TIMESTEPS, Case, shared_case
from gpu.kernels import matmul_tflops
from gpu.setting import Results, Setting

SIZES = ((512, 1), (1024, 1), (1536, 1), (1024, 2), (1024, 4))  # pixels of a side, prompts
KEPT = (1024, 1088, 1152, 1216, 1228, 1280, 1344, 1408, 1410, 1472, 1536)  # of 4096


def steps(setting: Setting) -> Results:
    """A full step, a pruned step that selects, and the selection alone; with CUDA graphs and without."""
    case = shared_case(setting)
    yield "attention", attention_backends(case)
    rate = matmul_tflops(8192 if not setting.tiny else 64, setting)
    yield "bf16_matmul_tflops", rate
    for captured in (True, False):
        yield "with CUDA graphs" if captured else "without CUDA graphs", step_times(case, captured, rate)


def step_times(case: Case, captured: bool, rate: float) -> dict[str, Any]:
    """The contestants' times, and what they are of the bounds. rate: TFLOP/s of a matrix product."""
    setting = case.setting
    times = interleaved(step_contestants(case, captured), setting.rounds, setting.device, REPEATS)
    speedup, bound, macs = ratio(times["full"], times["pruned"]), step_bound(setting.model), step_macs(setting.model)
    tflops = {kind: 2 * macs[kind] / medians(times)[kind] / 1e9 for kind in ("full", "pruned")}
    return {
        "ms": medians(times),
        "rounds_ms": times,
        "speedup": speedup,
        "mac_bound": bound,
        "of_bound": speedup / bound,
        "selection_share": ratio(times["selection"], times["pruned"]),
        "tflops": tflops,
        "of_matmul_rate": {kind: value / rate for kind, value in tflops.items()},
    }


def step_contestants(case: Case, captured: bool, **options: bool) -> dict[str, Run]:
    """Steps in the middle of an image; each has run often enough to be captured. options: of the engine."""
    from cat_pruning.engines.step_engine import ordinary_tensors
    from cat_pruning.runtime.image import every_token
    from cat_pruning.runtime.selection.policies import CatSelector

    setting = case.setting
    engine = case.engine(captured, **options)
    session, rows = case.begun(engine), case.rows
    first, second, at = (case.timestep(each) for each in TIMESTEPS)
    every = every_token(rows, setting.num_tokens)
    with ordinary_tensors():
        noise = session.step(rows, first, every)
        selector = CatSelector(case.family, setting.prune, setting.grid, noise)
        selector.refer_to(noise)
        noise = session.step(rows * 0.9, second, every)
        selector.first(rows, noise)

    def full() -> Tensor:
        return session.step(rows, at, every)

    def pruned() -> Tensor:
        return session.step(rows, at, selector)

    @torch.no_grad()
    def select() -> None:
        selector(rows, noise)

    for run in (full, pruned, select) * 3:
        run()
    check_captured(session, 2)
    return {"full": full, "pruned": pruned, "selection": graph_of(select, setting.device) if captured else select}


def check_captured(session: Any, expected: int) -> None:
    """Check that every kind of step is replayed, where the engine captures.

    Raises:
        RuntimeError: some are not.
    """
    captured = session._graphs.num_captured
    if session.engine.cuda_graphs and captured != expected:
        raise RuntimeError(f"{captured} of {expected} kinds of steps were captured: see the warning in the log")


def sizes(setting: Setting) -> Results:
    """Full and pruned steps by the image's size and by prompts at once, with CUDA graphs."""
    for pixels, prompts in SIZES:
        case = shared_case(setting.replace(pixels=pixels, prompts=prompts))
        runs = step_contestants(case, captured=True)
        rounds = min(3, setting.rounds)
        times = interleaved({kind: runs[kind] for kind in ("full", "pruned")}, rounds, setting.device, 2, 1)
        yield (
            f"{pixels}x{pixels}, {prompts} prompt{'s' if prompts > 1 else ''}",
            {
                "tokens": case.setting.num_tokens,
                "kept": setting.prune.num_kept(case.setting.num_tokens),
                "ms": medians(times),
                "speedup": ratio(times["full"], times["pruned"]),
            },
        )


def kept(setting: Setting) -> Results:
    """A pruned step by the number of tokens that it keeps: random ones, without a selection, with CUDA graphs."""
    from cat_pruning.runtime.image import every_token

    case = shared_case(setting)
    engine = case.engine()
    session, rows, num_tokens = case.begun(engine), case.rows, setting.num_tokens
    first, *_, at = (case.timestep(each) for each in TIMESTEPS)
    session.step(rows, first, every_token(rows, num_tokens))
    generator = torch.Generator(setting.device).manual_seed(0)
    order = torch.rand(len(rows), num_tokens, generator=generator, device=setting.device).argsort(1)
    runs: dict[str, Run] = {}
    for of_4096 in KEPT:
        count = of_4096 * num_tokens // 4096
        tokens = order[:, :count].sort(1).values.int()
        runs[str(count)] = lambda tokens=tokens: session.step(rows, at, tokens)
    for run in (*runs.values(),) * 3:
        run()
    check_captured(session, len(runs))
    times = interleaved(runs, min(5, setting.rounds), setting.device, REPEATS, 1)
    fewest = next(iter(times))
    yield "ms", medians(times)
    yield f"of_{fewest}", {count: ratio(each, times[fewest]) for count, each in times.items()}


def select_alone(setting: Setting) -> Results:
    """Algorithm 2 alone, at SD3's 4096 tokens: KMeans once per image, the selection on every pruned step."""
    from cat_pruning.runtime.selection import kmeans, selection

    prune, device, channels = setting.prune, setting.device, 64
    noise = torch.randn(2, setting.num_tokens, channels, generator=torch.Generator().manual_seed(0)).to(device)
    position = kmeans.position_encoding(*setting.grid, channels, device)
    features = selection.cluster_features(noise, position, prune.noise_scale)
    initial = kmeans.initial_tokens(*setting.grid, prune.num_clusters, device)
    clusters = kmeans.kmeans(features, initial, prune.kmeans_iterations)
    count, num_kept = torch.zeros(noise.shape[:2], device=device), prune.num_kept(setting.num_tokens)

    def select() -> None:
        kept_tokens = selection.next_selection(noise, clusters, count, num_kept, prune)
        count.copy_(selection.count_selection(count, kept_tokens, prune.staleness_decay))

    runs: dict[str, Run] = {
        "selection": select,
        "kmeans": lambda: kmeans.kmeans(features, initial, prune.kmeans_iterations),
    }
    for run in runs.values():
        run()
    if device.type == "cuda":
        runs |= {f"{name}, captured": graph_of(run, device) for name, run in runs.items()}
    yield "ms", medians(interleaved(runs, setting.rounds, device))


def attention_backends(case: Case) -> dict[str, str]:
    """Which kernel torch takes for the image's attention, in a full and in a pruned step."""
    from torch.nn.attention import SDPBackend

    from cat_pruning.step_io import CacheRows

    setting, spec = case.setting, case.family.caches()[0]
    heads, batch = case.config["num_attention_heads"], int(case.dims.batch)
    text = int(case.dims.text_length) if spec.rows is CacheRows.JOINT else 0
    names = {}
    for kind, rows in (("full", setting.num_tokens), ("pruned", setting.prune.num_kept(setting.num_tokens))):
        query, key = (
            torch.empty(batch, heads, each + text, spec.width // heads, dtype=setting.dtype, device=setting.device)
            for each in (rows, setting.num_tokens)
        )
        chosen = torch._fused_sdp_choice(query, key, key)
        names[kind] = next((name for name, each in SDPBackend.__members__.items() if int(each) == chosen), str(chosen))
    return names
