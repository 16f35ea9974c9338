from __future__ import annotations

import pytest
import torch

from cat_pruning.finite import first_not_finite, is_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_one_value_among_many(dtype: torch.dtype) -> None:
    values = torch.linspace(-3, 3, 1001)
    assert is_finite(values.to(dtype))
    for bad in (torch.nan, torch.inf, -torch.inf)[: 1 if dtype is torch.float8_e4m3fn else 3]:  # which has no infinity
        for place in (0, 500, 1000):
            damaged = values.clone()
            damaged[place] = bad
            assert not is_finite(damaged.to(dtype))


def test_what_has_nothing_to_be_infinite() -> None:
    assert is_finite(torch.empty(0))
    assert is_finite(torch.tensor([2**62]))


def test_the_first_of_several() -> None:
    good, bad = torch.ones(2), torch.tensor([1.0, torch.nan])
    assert first_not_finite([("a", good), ("b", bad), ("c", bad)]) == "b"
    assert first_not_finite([("a", good)]) is None
