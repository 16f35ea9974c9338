"""Is the memory that an export needs told before the work, and is it what the export then holds?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cat_pruning.bundle.schema import LoraSpec
from cat_pruning.checkpoints.checkpoint import find_checkpoint, load_transformer
from cat_pruning.dtype import DType
from cat_pruning.engines.builder import build
from cat_pruning.errors import EngineError
from cat_pruning.exporter import memory
from cat_pruning.exporter.memory import check_memory, held_bytes, part_bytes, total_memory

GIB = 1 << 30


@pytest.mark.parametrize(
    ("weights", "held", "builds_plans", "message"),
    [
        (20, 20, False, r"^weights of 20\.0 GiB need about 22 GiB of memory to be exported, and this machine has 16 "
         r"GiB; in the dtype of the checkpoint's own files, .* \(--dtype\), or export on a larger machine$"),
        (12, 12, True, r"^weights of 12\.0 GiB need about 18 GiB of memory for an engine to be built from them, and "
         r"this machine has 16 GiB; --target onnx needs about 14 GiB, "),
        (12, 0, True, r"an engine to be built from them, .* --target onnx needs about 2 GiB"),
    ],
)  # fmt: skip
def test_too_little_memory_is_told_before_the_work(
    monkeypatch: pytest.MonkeyPatch, weights: int, held: int, builds_plans: bool, message: str
) -> None:
    monkeypatch.setattr(memory, "total_memory", lambda: 16 * GIB)
    with pytest.raises(EngineError, match=message):
        check_memory(weights * GIB, held_bytes=held * GIB, builds_plans=builds_plans)


@pytest.mark.parametrize(
    ("weights", "held", "builds_plans"), [(14, 14, False), (10, 10, True), (500, 0, False), (10, 0, True)]
)
def test_enough_memory(monkeypatch: pytest.MonkeyPatch, weights: int, held: int, builds_plans: bool) -> None:
    monkeypatch.setattr(memory, "total_memory", lambda: 16 * GIB)
    check_memory(weights * GIB, held_bytes=held * GIB, builds_plans=builds_plans)


@pytest.mark.parametrize("target", ["tensorrt_rtx", "tensorrt"])
def test_the_exporter_of_a_machine_that_is_too_small_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, cat_export: Callable[..., Any], tmp_path: Path, target: str
) -> None:
    monkeypatch.setattr(memory, "total_memory", lambda: 16 * GIB)
    monkeypatch.setattr(build, "tensorrt_library", lambda flavour: SimpleNamespace(__version__="11.4"))
    monkeypatch.setattr(build, "gpu_architecture", lambda: "sm90")
    out = tmp_path / "out"
    options = ["--model", "flux-dev", "--random-weights", "--dtype", "bf16", "--out", out]
    code, _, errors = cat_export(*options, "--target", target)
    assert code == 2
    assert len(errors) == 1
    assert "weights of 22.2 GiB need about 31 GiB of memory for an engine to be built from them" in errors[0]
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ what is held


@pytest.mark.parametrize("on_disk", list(DType))
@pytest.mark.parametrize("dtype", list(DType))
def test_weights_of_the_dtype_on_disk_are_mapped(
    write_checkpoint: Callable[..., Path], make_tiny: Any, tmp_path: Path, on_disk: DType, dtype: DType
) -> None:
    directory = write_checkpoint(tmp_path / "pipeline")
    make_tiny("sd3").to(on_disk.torch).save_pretrained(directory / "transformer")
    checkpoint = find_checkpoint(str(directory))
    held = held_bytes(checkpoint, dtype, verify=False)
    assert held == (0 if dtype is on_disk else checkpoint.num_parameters * dtype.num_bytes)
    # What the loaded module says of it: a mapped weight is no memory that torch allocated.
    transformer = load_transformer(checkpoint.source, dtype)
    files = _mapped_files()
    allocated = sum(
        parameter.numel() * dtype.num_bytes
        for parameter in transformer.parameters()
        if not _is_mapped(parameter, files)
    )
    assert allocated == held


def _mapped_files() -> list[range]:
    """The addresses of all weights that are mapped from files."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(".safetensors")]
    return [range(*(int(number, 16) for number in line.split(" ", 1)[0].split("-"))) for line in lines]


def _is_mapped(parameter: torch.Tensor, files: list[range]) -> bool:
    return any(parameter.data_ptr() in addresses for addresses in files)


def test_what_else_is_held(write_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "pipeline")
    everything = held_bytes(find_checkpoint(str(directory)), DType.FP32, verify=True)
    assert everything > 0
    adapted = find_checkpoint(str(directory), loras=(LoraSpec(path="adapter", scale=1.0),))
    assert held_bytes(adapted, DType.FP32, verify=False) == everything
    random = find_checkpoint("sd3", random_weights=True)
    assert held_bytes(random, DType.BF16, verify=False) == 0
    assert held_bytes(random, DType.BF16, verify=True) == 2 * random.num_parameters


def test_damaged_weights_are_left_to_the_load(write_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "pipeline")
    (directory / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"no header")
    assert held_bytes(find_checkpoint(str(directory)), DType.FP32, verify=False) > 0


# ------------------------------------------------------------------ what there is


@pytest.mark.parametrize(("content", "expected"), [("max", None), (str(GIB), GIB), (str(1 << 60), None), (None, None)])
def test_memory_is_the_machines_or_the_control_groups(
    monkeypatch: pytest.MonkeyPatch, content: str | None, expected: int | None
) -> None:
    def read(path: Path) -> str:
        assert str(path) == "/sys/fs/cgroup/memory.max"
        if content is None:
            raise FileNotFoundError
        return f"{content}\n"

    monkeypatch.setattr(Path, "read_text", read)
    machine = memory.os.sysconf("SC_PAGE_SIZE") * memory.os.sysconf("SC_PHYS_PAGES")
    assert total_memory() == (expected or machine)


def test_a_part_of_the_exports_dtype_is_not_held(tiny_checkpoint: Path) -> None:
    folder = tiny_checkpoint / "text_encoder"
    (file,) = folder.glob("*.safetensors")
    numbers = (file.stat().st_size - 4096) // 2  # the miniatures' files are of fp16, with a header
    for dtype, verify, is_held in ((DType.FP16, False, False), (DType.FP16, True, True), (DType.FP32, False, True)):
        weights, held = part_bytes(folder, dtype, verify=verify)
        assert weights == pytest.approx(numbers * dtype.num_bytes, rel=0.02)
        assert held == (weights if is_held else 0)
    file.write_bytes(b"damaged")
    assert part_bytes(folder, DType.FP32, verify=False) == (0, 0)
