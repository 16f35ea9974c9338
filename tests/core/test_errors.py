from __future__ import annotations

import pickle

import pytest

from cat_pruning import errors
from cat_pruning.errors import CatError, SettingsError, ShapeError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CatError)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_is_its_problem_and_its_remedy(kind: type[CatError]) -> None:
    error = kind("steps=0: expected 1 or more", "give more steps")
    assert (error.problem, error.remedy) == ("steps=0: expected 1 or more", "give more steps")
    assert str(error) == "steps=0: expected 1 or more; give more steps"
    assert str(kind("steps=0; expected 1")) == "steps=0; expected 1"
    assert kind("steps=0").remedy == ""


def test_an_error_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(SettingsError("a; b", "c")))
    assert (type(error), error.problem, error.remedy) == (SettingsError, "a; b", "c")


def test_those_of_arguments_are_value_errors() -> None:
    assert issubclass(SettingsError, ValueError)
    assert issubclass(ShapeError, ValueError)
