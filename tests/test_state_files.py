"""States in files: what comes back is what went in, and nothing else is taken for one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import torchalignprune as tap
from models import mlp
from torchalignprune import schedules
from torchalignprune.state_files import load_state, save_state

leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from([torch.zeros(()), torch.arange(6).reshape(2, 3).T, torch.ones(0, 4).bool()])
    | st.sampled_from([torch.randn(3).to(kind) for kind in (torch.bfloat16, torch.float64)])
)
states = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        ),
        max_leaves=8,
    ),
    max_size=4,
)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return type(left) is type(right) and left == right


@given(state=states)
def test_what_comes_back_is_what_went_in(
    state: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "state.safetensors"
    save_state(path, state)
    assert same(load_state(path), state)


def test_numbers_that_json_has_no_word_for(tmp_path: Path) -> None:
    save_state(tmp_path / "s", {"low": -math.inf, "none": math.nan, "third": 1 / 3})
    found = load_state(tmp_path / "s")
    assert found["low"] == -math.inf and math.isnan(found["none"]) and found["third"] == 1 / 3


def test_tensors_that_share_memory_come_back_apart(tmp_path: Path) -> None:
    whole = torch.arange(4.0)
    save_state(tmp_path / "s", {"whole": whole, "again": whole, "part": whole[1:3]})
    found = load_state(tmp_path / "s")
    found["whole"].zero_()
    assert found["again"].tolist() == [0, 1, 2, 3] and found["part"].tolist() == [1, 2]


def test_the_state_of_a_pruner(tmp_path: Path) -> None:
    params = tap.prunable_parameters(mlp())
    movement = tap.criteria.Movement(params)
    pruner = tap.Pruner(params, tap.Magnitude, schedules.constant(0.0), criterion=movement)
    save_state(tmp_path / "s", pruner.state_dict())
    pruner.load_state_dict(load_state(tmp_path / "s"))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {"b": [1, object()]}}, r"state\.a\.b\[1\] should be a tensor, a number.* object"),
        ({"a": {1: 2}}, r"the keys of state\.a should be str, got 1"),
        ({"__tensor__": "a"}, "the keys of state should be str, got '__tensor__'"),
        ({"a": lambda: 0}, r"state\.a should be .* got function"),
    ],
)
def test_anything_else_is_refused(state: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=message):
        save_state(tmp_path / "s", state)
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    with pytest.raises(ValueError, match=r"state\.safetensors does not exist"):
        load_state(path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="should be a file that save_state wrote"):
        load_state(path)
    for tree in (
        "[1]",
        "{",
        '{"a": {"__tensor__": "b"}}',
        '{"a": {"__tensor__": [1]}}',
        "[" * 10**5,
    ):
        save_file({"a": torch.ones(2)}, path, metadata={"state": tree})
        with pytest.raises(ValueError, match="should be a file that save_state wrote"):
            load_state(path)
    save_state(path, {"a": torch.ones(20)})
    whole = path.read_bytes()
    for length in (0, 4, 40, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cannot be read"):
            load_state(path)


def test_a_file_that_is_there_is_kept_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    save_state(path, {"step": 1})

    for kind in (OSError, SafetensorError):

        def full(*args: Any, error: type[Exception] = kind, **kwargs: Any) -> None:
            raise error("no space left on device")

        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
            patch.setattr("safetensors.torch.save_file", full)
            save_state(path, {"step": 2})
    assert load_state(path) == {"step": 1} and list(tmp_path.iterdir()) == [path]
