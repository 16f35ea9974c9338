"""Engines of one node: each token operator alone, built and run with guard bytes around every buffer.

What TensorRT passes to an ahead-of-time plugin whose output is an alias of its input (inputs, scalars, outputs, the
pair's address twice) is known from its sources only. So before any model runs, the gather and the scatter run alone at
small sizes: their results are held against torch's, and whatever a wrong argument made the kernel write beside its
output is found in the guards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from cat_pruning.bundle.schema import PlanSpec
from cat_pruning.engines.builder.build import build_plan
from cat_pruning.engines.plan import Plan
from cat_pruning.engines.side_stream import SideStream
from cat_pruning.errors import EngineError
from cat_pruning.names import Flavour
from cat_pruning.plugins import onnx_ops
from cat_pruning.plugins.token_ops import token_gather, token_scatter

GUARD_BYTES, GUARD = 4096, 0xA5
KINDS = {torch.float32: onnx.TensorProto.FLOAT, torch.bfloat16: onnx.TensorProto.BFLOAT16}  # fp16 moves as bf16 does
SIZES = ((2, 333, 101, 1536), (3, 9, 9, 6))  # (B, N, n, D): odd numbers of wide rows, all of narrow ones
SCATTER, GATHER = "TokenScatter", "TokenGather"


class Guarded:
    """A tensor on a device between two regions that nothing may write to."""

    def __init__(self, values: Tensor, device: torch.device) -> None:
        size = values.numel() * values.element_size()
        self._memory = torch.full((size + 2 * GUARD_BYTES,), GUARD, dtype=torch.uint8, device=device)
        self._end = GUARD_BYTES + size
        self.tensor = self._memory[GUARD_BYTES : self._end].view(values.dtype).view(values.shape)
        self.tensor.copy_(values)

    @property
    def damaged_bytes(self) -> int:
        """How many bytes of the guards were changed. Synchronises."""
        guards = torch.cat([self._memory[:GUARD_BYTES], self._memory[self._end :]])
        return int((guards != GUARD).sum())


@dataclass(frozen=True)
class OneNode:
    """A token operator at one size and dtype."""

    operator: str
    dtype: torch.dtype
    size: tuple[int, int, int, int]  # (B, N, n, D)

    def inputs(self, seed: int = 0) -> dict[str, Tensor]:
        """Random rows and distinct indices, on the host."""
        batch, num_tokens, num_kept, width = self.size
        generator = torch.Generator().manual_seed(seed)
        order = torch.rand(batch, num_tokens, generator=generator).argsort(dim=1)
        inputs = {
            "tokens": torch.randn(batch, num_tokens, width, generator=generator).to(self.dtype),
            "indices": order[:, :num_kept].to(torch.int32).contiguous(),
        }
        if self.operator == SCATTER:
            inputs["rows"] = torch.randn(batch, num_kept, width, generator=generator).to(self.dtype)
        return inputs

    def expected(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What torch computes."""
        operation: Any = token_scatter if self.operator == SCATTER else token_gather
        result: Tensor = operation(*inputs.values())
        return result

    def write(self, path: Path) -> None:
        """The graph of this node; B, N and n are dynamic, as in a step."""
        kind, width = KINDS[self.dtype], self.size[3]
        value = onnx.helper.make_tensor_value_info
        inputs = [value("tokens", kind, ["B", "N", width]), value("indices", onnx.TensorProto.INT32, ["B", "n"])]
        if self.operator == SCATTER:
            inputs.append(value("rows", kind, ["B", "n", width]))
        output = value("out", kind, ["B", "N" if self.operator == SCATTER else "n", width])
        node = onnx.helper.make_node(
            self.operator, [each.name for each in inputs], ["out"], domain=onnx_ops.DOMAIN, **onnx_ops.PLUGIN_ATTRIBUTES
        )
        graph = onnx.helper.make_graph([node], "one", inputs, [output])
        opset = onnx.helper.make_opsetid("", onnx_ops.OPSET_VERSION)
        model = ir.serde.deserialize_model(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10))
        onnx_ops.attach_functions(model)
        ir.save(model, path)

    def build(self, spec: PlanSpec, folder: Path) -> Path:
        """Its plan, built by a process of its own."""
        graph, plan = folder / f"{self.operator}.onnx", folder / f"{self.operator}.plan"
        self.write(graph)
        shapes = {name: tuple(tensor.shape) for name, tensor in self.inputs().items()}
        build_plan(spec, graph, plan, [{name: (shape, shape, shape) for name, shape in shapes.items()}])
        return plan

    def run(self, flavour: Flavour, plan: Path, device: torch.device, *, in_place: bool) -> dict[str, Any]:
        """Run the plan between guards, and say what is wrong: nothing, in `problems`, where all is right.

        Args:
            flavour: of the plan.
            plan: its file.
            device: where it runs.
            in_place: the scatter's output is bound to the address of its input, as a session binds a cache.
        """
        engine = Plan(flavour, plan, device)
        stream = SideStream(device)
        given = self.inputs()
        expected = self.expected(given)
        buffers = {name: Guarded(tensor, device) for name, tensor in given.items()}
        shares = in_place and self.operator == SCATTER
        buffers["out"] = buffers["tokens"] if shares else Guarded(torch.zeros_like(expected), device)
        scratch = torch.empty(max(256, engine.scratch_bytes), dtype=torch.uint8, device=device)
        engine.context(0, scratch, stream).run({name: buffer.tensor for name, buffer in buffers.items()})
        problems = [
            f"{buffer.damaged_bytes} bytes around {name} were written to"
            for name, buffer in buffers.items()
            if buffer.damaged_bytes and not (shares and name == "out")
        ]
        for name in set(given) - ({"tokens"} if shares else set()):
            if not torch.equal(buffers[name].tensor.cpu(), given[name]):
                problems.append(f"{name} was changed")
        wrong = int((buffers["out"].tensor.cpu() != expected).any(-1).sum())
        if wrong:
            problems.append(f"{wrong} of {expected.shape[0] * expected.shape[1]} rows are not torch's")
        return {"operator": self.operator, "dtype": str(self.dtype), "size": self.size, "problems": problems}


def one_nodes() -> Iterator[OneNode]:
    """Every operator in every dtype at every size."""
    for dtype in KINDS:
        for size in SIZES:
            for operator in (GATHER, SCATTER):
                yield OneNode(operator, dtype, size)


def check_token_engines(spec: PlanSpec, folder: Path, device: torch.device) -> list[dict[str, Any]]:
    """Build and run every one-node engine; each with its `problems`, the library's own words where it refused.

    Args:
        spec: by which builder and with which token operators; see `plan_specs`.
        folder: for the files.
        device: the GPU.
    """
    results = []
    for index, node in enumerate(one_nodes()):
        own = folder / str(index)
        own.mkdir(parents=True)
        try:
            plan = node.build(spec, own)
            results.append(node.run(spec.flavour, plan, device, in_place=spec.token_ops == "plugin"))
        except EngineError as error:
            results.append(
                {"operator": node.operator, "dtype": str(node.dtype), "size": node.size, "problems": [str(error)]}
            )
    return results
