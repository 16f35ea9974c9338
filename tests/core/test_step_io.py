from __future__ import annotations

from cat_pruning.step_io import SYMBOLIC, CacheRows, CacheSpec, Part, StepDims, input_shapes, output_names

DIMS = StepDims.of(batch=2, latent_height=6, latent_width=10, patch_size=2, text_length=7, num_kept=4)


def test_derived_dimensions() -> None:
    assert (DIMS.num_tokens, DIMS.joint_rows) == (15, 22)


def test_names_of_dimensions_become_numbers() -> None:
    assert DIMS.named((3, "batch", "joint_rows", 1)) == (3, 2, 22, 1)
    assert SYMBOLIC.named(("batch", "num_kept", 8)) == ("batch", "num_kept", 8)


def test_graphs_run_in_the_order_in_which_they_need_each_other() -> None:
    assert [part.onnx for part in Part] == ["prompt.onnx", "timestep.onnx", "step.onnx"]


def test_inputs_and_outputs_in_graph_order() -> None:
    caches = [CacheSpec(CacheRows.JOINT, 8), CacheSpec(CacheRows.IMAGE, 16)]
    shapes = input_shapes(DIMS, (2, 4, 6, 10), caches, {"hidden_states": (2, 4, 6, 10)})
    assert list(shapes.items()) == [
        ("keep_indices", (2, 4)),
        ("noise", (2, 4, 6, 10)),
        ("key_cache_0", (2, 22, 8)),
        ("value_cache_0", (2, 22, 8)),
        ("key_cache_1", (2, 15, 16)),
        ("value_cache_1", (2, 15, 16)),
        ("hidden_states", (2, 4, 6, 10)),
    ]
    assert output_names(2) == [f"{name}_out" for name in list(shapes)[1:-1]]
