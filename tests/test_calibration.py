"""Calibration against the same statistics taken from recorded inputs."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers.pytorch_utils import Conv1D

import torchalignprune as tap
from torchalignprune import Calibration
from torchalignprune.calibration import _ROWS, InputStatistics, _Sums
from torchalignprune.parameters import PrunableParameters, prunable_parameters

Pair = tuple[nn.Module, str]


def input_norms(*args: Any, **kwargs: Any) -> dict[Pair, Tensor]:
    return Calibration.collect(*args, **kwargs).norms()


def assert_statistics(found: InputStatistics, rows: Tensor, **tolerance: float) -> None:
    """Those of the given inputs, one a row."""
    x = rows.detach().double()
    mean = x.mean(dim=0)
    covariance = (x - mean).T @ (x - mean) / len(x)
    assert found.count == len(x)
    close = torch.testing.assert_close
    close(found.norms.double(), x.square().mean(dim=0).sqrt(), **tolerance or TOLERANCE)
    close(found.mean.double(), mean, **tolerance or TOLERANCE)
    assert found.covariance is not None and found.second_moment is not None
    close(found.covariance.double(), covariance, **tolerance or TOLERANCE)
    close(found.second_moment.double(), x.T @ x / len(x), **tolerance or TOLERANCE)


TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def rms(rows: Tensor) -> Tensor:
    return rows.double().square().mean(dim=0).sqrt().float()


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def tiny_bert(**changes: object) -> transformers.BertModel:
    sizes: dict[str, object] = {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 20,
        "max_position_embeddings": 16,
    }
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**(sizes | changes)))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 3))
def test_batches_make_no_difference(sizes: list[int], dims: int) -> None:
    generator = torch.Generator().manual_seed(sum(sizes))
    batches = [torch.randn(*[size] * dims, 3, generator=generator) for size in sizes]
    layer = nn.Linear(3, 2)
    pair = (layer, "weight")
    found = input_norms(layer, batches, [pair])[pair]
    torch.testing.assert_close(found, rms(torch.cat([batch.reshape(-1, 3) for batch in batches])))


def test_inner_layers_see_their_own_inputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Conv1D(5, 4), nn.Dropout(0.5))
    params = prunable_parameters(model)
    x = torch.randn(7, 3)
    norms = input_norms(model, [x], params)
    assert list(norms) == list(params)
    torch.testing.assert_close(norms[params[0]], rms(x))
    torch.testing.assert_close(norms[params[1]], rms(model[1](model[0](x)).detach()))


def test_dtypes(dtype: torch.dtype, device: str) -> None:
    layer = nn.Linear(2, 2, dtype=dtype, device=device)
    # Squares of these would not fit into float16, their sum not into bfloat16.
    x = torch.tensor([[1000.0, 1.0]], dtype=dtype).repeat(4096, 1)
    found = input_norms(layer, [x], [(layer, "weight")])[layer, "weight"]
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.tolist() == [1000.0, 1.0]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose1d])
@pytest.mark.parametrize("batched", [True, False])
def test_convolutions_count_by_channel(kind: type[nn.Module], groups: int, batched: bool) -> None:
    conv = kind(4, 2, 3, groups=groups)
    x = torch.randn(5, 4, 9) if batched else torch.randn(4, 9)
    found = input_norms(conv, [x], [(conv, "weight")])[conv, "weight"]
    torch.testing.assert_close(found, rms(x.movedim(-2, -1).reshape(-1, 4)))


def test_image_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 2, 3))
    params = prunable_parameters(model)
    x = torch.randn(2, 3, 6, 6)
    norms = input_norms(model, [x], params)
    torch.testing.assert_close(norms[params[0]], rms(x.permute(0, 2, 3, 1).reshape(-1, 3)))
    hidden = model[1](model[0](x)).detach()
    torch.testing.assert_close(norms[params[1]], rms(hidden.permute(0, 2, 3, 1).reshape(-1, 4)))


def test_padding_does_not_count(device: str) -> None:
    model = tiny_bert().to(device)
    params = prunable_parameters(model)
    ids = torch.randint(1, 20, (2, 6))  # on the CPU: batches are moved
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    padded = input_norms(model, [{"input_ids": ids, "attention_mask": mask}], params)
    apart = input_norms(model, [{"input_ids": ids[:1]}, {"input_ids": ids[1:, :3]}], params)
    for pair in params:
        torch.testing.assert_close(padded[pair], apart[pair])
        assert padded[pair].device.type == "cpu"
    counted = input_norms(model, [{"input_ids": ids}], params)
    assert not torch.allclose(counted[params[0]], padded[params[0]])


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor,
        decoder_input_ids: Tensor,
        decoder_attention_mask: Tensor | None = None,
    ) -> None:
        self.encoder(x)
        self.decoder(decoder_input_ids[..., None].float().expand(-1, -1, 3))


def test_padding_of_encoder_and_decoder() -> None:
    model = EncoderDecoder()
    pairs = [(model.encoder, "weight"), (model.decoder, "weight")]
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    batch = {"x": torch.randn(2, 4, 3), "attention_mask": mask}
    short = torch.arange(6).view(2, 3)
    found = Calibration.collect(model, [{**batch, "decoder_input_ids": short}], pairs)
    assert [found[pair].count for pair in pairs] == [5, 6]
    own = {"decoder_input_ids": short, "decoder_attention_mask": torch.tensor([[1, 0, 0]] * 2)}
    found = Calibration.collect(model, [{**batch, **own}], pairs)
    assert [found[pair].count for pair in pairs] == [5, 2]
    long = {"decoder_input_ids": torch.arange(8).view(2, 4)}
    same = {**long, "decoder_attention_mask": mask}
    found = Calibration.collect(model, [{**batch, **same}], pairs)
    assert [found[pair].count for pair in pairs] == [5, 5]
    for bad in (long, {**long, "decoder_attention_mask": mask.flip(0)}):
        with pytest.raises(
            ValueError, match=r"only shapes tell them apart, got \(2, 4\) for both: pad them to"
        ):
            Calibration.collect(model, [{**batch, **bad}], pairs)


def test_padding_does_not_count_in_flattened_inputs() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            out: Tensor = self.layer(x.flatten(0, 1))
            return out

    model = Flat()
    x, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    pair = (model.layer, "weight")
    found = input_norms(model, [{"x": x, "attention_mask": mask}], [pair])[pair]
    torch.testing.assert_close(found, rms(x[mask.bool()]))


def test_a_head_on_the_first_token_is_not_masked() -> None:
    model = tiny_bert()
    params = prunable_parameters(model, include="pooler")
    ids, mask = torch.randint(1, 20, (2, 3)), torch.tensor([[1, 1, 1], [1, 0, 0]])
    found = input_norms(model, [{"input_ids": ids, "attention_mask": mask}], params)
    states = model.eval()(ids, attention_mask=mask).last_hidden_state[:, 0].detach()
    torch.testing.assert_close(found[params[0]], rms(states))


def test_inputs_by_keyword() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(input=x)
            return out

    model, x = Wrapper(), torch.randn(4, 3)
    pair = (model.layer, "weight")
    torch.testing.assert_close(input_norms(model, [x], [pair])[pair], rms(x))


@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention(batch_first: bool) -> None:
    class Self(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            out: Tensor = self.attention(x, x, value=x)[0]
            return out

    model, mask = Self(), torch.tensor([[1, 1, 0], [1, 0, 0]])
    x = torch.randn(2, 3, 4)
    params = prunable_parameters(model)
    given_x = x if batch_first else x.transpose(0, 1)
    found = input_norms(model, [{"x": given_x, "attention_mask": mask}], params)
    torch.testing.assert_close(found[params[0]], rms(x[mask.bool()]))


def test_attention_with_a_matrix_each() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, kdim=6, vdim=8, batch_first=True)

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out: Tensor = self.attention(query, key, value)[0]
            return out

    model = Cross()
    params = prunable_parameters(model)
    batch = {
        "query": torch.randn(2, 3, 4),
        "key": torch.randn(2, 5, 6),
        "value": torch.randn(2, 5, 8),
    }
    found = input_norms(model, [batch], params)
    assert params.names == [f"attention.{which}_proj_weight" for which in "qkv"]
    for pair, x in zip(params, batch.values(), strict=True):
        torch.testing.assert_close(found[pair], rms(x.flatten(0, 1)))


def test_cross_attention_with_one_matrix_is_refused() -> None:
    model = nn.TransformerDecoderLayer(4, 2, 8, batch_first=True)
    params = prunable_parameters(model, include="multihead_attn")

    class Run(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = model

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x, x + 1)
            return out

    with pytest.raises(ValueError, match=r"multihead_attn\.in_proj_weight projects query, key and"):
        input_norms(Run(), [torch.randn(1, 2, 4)], params)
    assert hooks(model) == 0


def test_the_fast_path_of_torchs_encoder_does_not_hide_inputs() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.5)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    params = prunable_parameters(model)
    assert len(params) == 6
    x = torch.randn(2, 3, 4)
    found = input_norms(model, [x], params)
    torch.testing.assert_close(found[params[0]], rms(x.flatten(0, 1)))


@pytest.mark.parametrize("enabled", [True, False])
def test_torchs_encoder_with_padding(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the fast path would turn into nested tensors."""
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", enabled)
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.5)
    model = nn.TransformerEncoder(layer, 2)
    params = prunable_parameters(model)
    x = torch.randn(2, 3, 4)
    padding = torch.tensor([[False, False, False], [False, True, True]])
    batch = {"src": x, "src_key_padding_mask": padding}
    assert len(input_norms(model, [batch], params)) == 6
    assert torch.backends.mha.get_fastpath_enabled() is enabled
    batch["attention_mask"] = ~padding
    with pytest.raises(TypeError, match="attention_mask"):
        input_norms(model, [batch], params)
    assert torch.backends.mha.get_fastpath_enabled() is enabled


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_modules_are_refused(kind: type[nn.Module]) -> None:
    """What goes into them at each step is not what they are called with."""
    module = kind(4, 4)
    with pytest.raises(ValueError, match=rf"weight_hh.*recurrent module \({kind.__name__}\)"):
        for name, _ in module.named_parameters():
            if name.startswith("weight_hh"):
                input_norms(module, [torch.ones(2, 4)], [(module, name)])
    assert hooks(module) == 0


def test_pruned_models_are_welcome() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    params = prunable_parameters(model)
    tap.global_unstructured(params, tap.Magnitude, amount=0.5)
    x = torch.randn(8, 4)
    norms = input_norms(model, [x], params)
    torch.testing.assert_close(norms[params[1]], rms(model[0](x).detach()))
    assert hooks(model) == 2  # the masks' own
    tap.global_unstructured(params, tap.AlignedMagnitude, amount=0.5, input_norms=norms)


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.frozen = nn.Dropout(0.5).eval()

    def forward(self, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled() and not self.training
        out: Tensor = self.layer(self.frozen(x))
        if bool((x < 0).any()):
            raise RuntimeError("negative")
        return out


def test_the_model_is_left_as_it_was() -> None:
    model = Failing()
    pair = (model.layer, "weight")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    input_norms(model, [torch.ones(1, 2)], [pair])
    with pytest.raises(RuntimeError, match="negative"):
        input_norms(model, [torch.ones(1, 2), -torch.ones(1, 2)], [pair])

    def broken() -> Iterator[Tensor]:
        yield torch.ones(1, 2)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        input_norms(model, broken(), [pair])
    assert hooks(model) == 0
    assert model.training and model.layer.training and not model.frozen.training
    assert torch.is_grad_enabled()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_modules_that_never_ran_are_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)})
    params = prunable_parameters(model)
    with pytest.raises(ValueError, match=r"never reached idle\.weight$"):
        input_norms(model["used"], [torch.ones(1, 2)], params)
    many = PrunableParameters(
        [(nn.Linear(2, 2), "weight") for _ in range(7)], [f"l{i}" for i in range(7)], {}
    )
    with pytest.raises(ValueError, match="never reached l0, l1, l2 and 4 more"):
        input_norms(nn.Linear(2, 2), [torch.ones(1, 2)], many)


def test_bad_input() -> None:
    layer = nn.Linear(2, 2)
    params = prunable_parameters(nn.Sequential(layer))
    with pytest.raises(ValueError, match="batches should have at least one batch, got none"):
        input_norms(layer, [], params)
    with pytest.raises(TypeError, match="a batch should be a mapping or a tensor, got list"):
        input_norms(layer, [[torch.ones(1, 2)]], params)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"no tokens for 0\.weight"):
        input_norms(layer, [torch.ones(0, 2)], params)
    with pytest.raises(
        ValueError, match=r"the inputs of 0\.weight should be finite numbers, got NaN"
    ):
        input_norms(layer, [torch.tensor([[1.0, float("nan")]])], params)
    with pytest.raises(ValueError, match=r"belongs to an embedding, which has no input features"):
        input_norms(layer, [torch.ones(1, 2)], [(nn.Embedding(2, 2), "weight")])
    with pytest.raises(ValueError, match=r"should have outputs and inputs, got shape \(2,\)"):
        input_norms(layer, [torch.ones(1, 2)], [(layer, "bias")])
    assert hooks(layer) == 0

    class Strange(nn.Linear):
        def forward(self, x: object) -> Tensor:  # type: ignore[override]
            return torch.zeros(1)

    strange = Strange(2, 2)
    with pytest.raises(ValueError, match=r"the first input of .* should be a tensor, got dict"):
        input_norms(strange, [{"x": {}}], [(strange, "weight")])
    with pytest.raises(ValueError, match="should have 2 features, got 3"):
        input_norms(strange, [torch.ones(1, 3)], [(strange, "weight")])


def test_progress_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    layer = nn.Linear(2, 2)
    input_norms(layer, [torch.ones(1, 2)], [(layer, "weight")])
    assert capsys.readouterr() == ("", "")
    input_norms(layer, [torch.ones(1, 2)], [(layer, "weight")], progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "calibrating" in err and "0/1" in err


def test_progress_over_batches_whose_number_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(torch.ones(3, 2))

    layer = nn.Linear(2, 2)
    batches = DataLoader(Stream(), batch_size=2)
    found = Calibration.collect(layer, batches, [(layer, "weight")], progress=True)
    assert found[layer, "weight"].count == 3
    assert "calibrating" in capsys.readouterr().err


def test_progress_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    layer = nn.Linear(2, 2)
    with pytest.raises(ImportError, match=r'pip install "torchalignprune\[transformers\]"'):
        input_norms(layer, [torch.ones(1, 2)], [(layer, "weight")], progress=True)
    assert hooks(layer) == 0


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(1, 3),
    st.sampled_from([0.0, 1.0, 1000.0]),
)
def test_means_and_covariances(sizes: list[int], dims: int, offset: float) -> None:
    """Also where the mean is a thousand times what the inputs differ by."""
    generator = torch.Generator().manual_seed(sum(sizes))
    batches = [torch.randn(*[size] * dims, 3, generator=generator) + offset for size in sizes]
    layer = nn.Linear(3, 2)
    found = Calibration.collect(layer, batches, [(layer, "weight")], statistics="covariance")
    rows = torch.cat([batch.reshape(-1, 3) for batch in batches])
    assert_statistics(found[layer, "weight"], rows)


def test_more_tokens_than_are_copied_at_a_time() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(2 * _ROWS + 5, 3) + torch.arange(2 * _ROWS + 5)[:, None]
    found = Calibration.collect(layer, [x / 4096], [(layer, "weight")], statistics="covariance")
    assert_statistics(found[layer, "weight"], x / 4096)


def test_covariance_dtypes(dtype: torch.dtype, device: str) -> None:
    layer = nn.Linear(3, 2, dtype=dtype, device=device)
    x = (torch.randn(50, 3) * torch.tensor([300.0, 1.0, 0.01])).to(device, dtype)
    calibration = Calibration.collect(layer, [x], [(layer, "weight")], statistics="covariance")
    found = calibration[layer, "weight"]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {found.norms.dtype, found.mean.dtype, found.covariance.dtype} == {wide}
    # 300^2 does not fit into float16.
    assert_statistics(found, x.cpu(), rtol=1e-5, atol=1e-4)


def test_autocast_does_not_round_the_statistics() -> None:
    layer = nn.Linear(3, 2)
    x = torch.randn(40, 3) * torch.tensor([1000.0, 1.0, 0.001])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = Calibration.collect(layer, [x], [(layer, "weight")], statistics="covariance")
    assert_statistics(found[layer, "weight"], x, rtol=1e-5, atol=0.1)


def test_norms_come_with_means_and_without_covariances() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    calibration = Calibration.collect(layer, [x], [(layer, "weight")])
    found = calibration[layer, "weight"]
    torch.testing.assert_close(found.mean, x.mean(dim=0))
    assert calibration.statistics == "norms"
    assert found.covariance is None and found.second_moment is None


def test_query_key_and_value_share_their_statistics() -> None:
    model = tiny_bert()
    params = prunable_parameters(model)
    batches = [{"input_ids": torch.randint(1, 20, (2, 6))} for _ in range(3)]
    recorded: dict[Pair, list[Tensor]] = {pair: [] for pair in params}
    handles = [
        pair[0].register_forward_pre_hook(
            lambda module, args, pair=pair: recorded[pair].append(args[0].flatten(0, 1))
        )
        for pair in params
    ]
    calibration = Calibration.collect(model, batches, params, statistics="covariance")
    for handle in handles:
        handle.remove()
    for pair in params:
        assert_statistics(calibration[pair], torch.cat(recorded[pair]))
    by = dict(zip(params.names, params, strict=True))
    for layer in range(2):
        q, k, v = (
            calibration[by[f"encoder.layer.{layer}.attention.self.{which}.weight"]]
            for which in ("query", "key", "value")
        )
        assert q is k and k is v
    assert len({id(found) for found in calibration.values()}) == 8
    assert repr(calibration) == (
        "Calibration: covariance of 12 parameters, 8 different inputs, over 36 tokens"
    )


class Branches(nn.Module):
    """Layers that get the same tensor in some calls and not in others."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))

    def forward(self, x: Tensor, order: list[list[int]], change: bool = False) -> Tensor:
        for turn, which in enumerate(order):
            given = x + turn
            for i in which:
                self.layers[i](given)
                if change:
                    given += 1
        return x


ORDERS = st.lists(
    st.lists(st.lists(st.integers(0, 3), max_size=5), min_size=1, max_size=3),
    min_size=1,
    max_size=4,
)


@given(ORDERS, st.booleans())
def test_sharing_makes_no_difference(orders: list[list[list[int]]], change: bool) -> None:
    model = Branches()
    every = [[[0], [1], [2], [3]]]  # so that each layer has an input
    generator = torch.Generator().manual_seed(0)
    recorded: list[list[Tensor]] = [[] for _ in range(4)]
    batches: list[dict[str, Any]] = []
    for order in orders + every:
        x = torch.randn(2, 3, generator=generator)
        batches.append({"x": x, "order": order, "change": change and order not in every})
        for turn, which in enumerate(order):
            given_x = x + turn
            for i in which:
                recorded[i].append(given_x.clone())
                if batches[-1]["change"]:
                    given_x += 1
    params = [(layer, "weight") for layer in model.layers]
    found = Calibration.collect(model, batches, params, statistics="covariance")
    for pair, rows in zip(params, recorded, strict=True):
        assert_statistics(found[pair], torch.cat(rows), rtol=1e-4, atol=1e-4)


def test_layers_that_stay_together_share_and_others_leave() -> None:
    model = Branches()
    params = [(layer, "weight") for layer in model.layers]
    orders = [[[0, 1, 2, 3], [3, 2, 1, 0]], [[0, 1, 2], [3]]]
    batches = [{"x": torch.randn(2, 3), "order": order} for order in orders]
    found = Calibration.collect(model, batches, params, statistics="covariance")
    assert found[params[0]] is found[params[1]] is found[params[2]]
    assert found[params[3]] is not found[params[0]]


def test_an_input_that_changes_before_it_is_shared_again_is_refused() -> None:
    model = Branches()
    params = [(layer, "weight") for layer in model.layers[:2]]
    batches = [
        {"x": torch.randn(2, 3), "order": [[0, 1]], "change": change} for change in (False, True)
    ]
    with pytest.raises(ValueError, match=r"parameters\[0\].* should not change in place before"):
        Calibration.collect(model, batches, params, statistics="covariance")
    assert hooks(model) == 0


def test_memory_limit() -> None:
    model = tiny_bert()
    params = prunable_parameters(model)
    ran = []
    model.embeddings.register_forward_hook(lambda *given: ran.append(1))
    batches = [{"input_ids": torch.randint(1, 20, (2, 6))} for _ in range(2)]
    whole = Calibration.collect(model, batches, params, statistics="covariance")
    assert len(ran) == 2
    # Each of the two layers has five matrices of 8 inputs and then one of 16. Four of 8 fill a
    # pass, and so does the one of 16.
    limit = 8 * 16 * 16
    parts = Calibration.collect(
        model, batches, params, statistics="covariance", memory_limit=limit, progress=True
    )
    assert len(ran) == 2 + 2 * 6
    for pair in params:
        for key in ("norms", "mean", "covariance"):
            assert torch.equal(getattr(whole[pair], key), getattr(parts[pair], key))
    Calibration.collect(model, batches, params[:4], statistics="covariance", memory_limit=limit)
    assert len(ran) == 2 + 2 * 6 + 2
    Calibration.collect(model, batches, params, memory_limit=1)  # norms take no memory to speak of
    assert len(ran) == 2 + 2 * 6 + 2 + 2

    with pytest.raises(
        ValueError, match=r"at least the 2048 bytes .*0\.output\.dense\.weight takes"
    ):
        Calibration.collect(model, batches, params, statistics="covariance", memory_limit=limit - 1)
    with pytest.raises(ValueError, match=r"more than once .* takes 6 passes, got generator"):
        Calibration.collect(
            model, (b for b in batches), params, statistics="covariance", memory_limit=limit
        )
    assert len(ran) == 2 + 2 * 6 + 2 + 2 and hooks(model) == 0
    # One pass is all that a generator has.
    Calibration.collect(
        model, (b for b in batches), params, statistics="covariance", memory_limit=1 << 30
    )


def collected(layer: nn.Module, x: Tensor, **options: Any) -> Calibration:
    return Calibration.collect(layer, [x], [(layer, "weight")], **options)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.booleans())
def test_merging_is_collecting_together(sizes: list[int], covariance: bool) -> None:
    generator = torch.Generator().manual_seed(len(sizes))
    batches = [torch.randn(size, 3, generator=generator) + i for i, size in enumerate(sizes)]
    layer = nn.Linear(3, 2)
    options = {"statistics": "covariance" if covariance else "norms"}
    merged = Calibration.merge([collected(layer, batch, **options) for batch in batches])
    whole = collected(layer, torch.cat(batches), **options)
    if covariance:
        assert_statistics(merged[layer, "weight"], torch.cat(batches))
    else:
        assert merged.statistics == "norms"
        torch.testing.assert_close(merged[layer, "weight"].mean, whole[layer, "weight"].mean)
    torch.testing.assert_close(merged.norms()[layer, "weight"], whole.norms()[layer, "weight"])


def test_weights_count_whole_calibrations() -> None:
    layer = nn.Linear(3, 2)
    few, many = torch.randn(2, 3), torch.randn(8, 3) + 2
    parts = [collected(layer, x, statistics="covariance") for x in (few, many)]
    found = Calibration.merge(parts, weights=[2, 4])[layer, "weight"]
    # As if the few had been there twice as often.
    expected = collected(layer, torch.cat([*[few] * 2, many]), statistics="covariance")
    for key in ("norms", "mean", "covariance"):
        torch.testing.assert_close(
            getattr(found, key), getattr(expected[layer, "weight"], key), **TOLERANCE
        )
    assert found.count == 10
    alone = Calibration.merge(parts, weights=[0, 0.1])[layer, "weight"]
    assert_statistics(InputStatistics(8, alone.norms, alone.mean, alone.covariance), many)


def test_merging_keeps_what_is_shared() -> None:
    model = tiny_bert()
    params = prunable_parameters(model)
    parts = [
        Calibration.collect(model, [{"input_ids": torch.randint(1, 20, (2, 6))}], params)
        for _ in range(2)
    ]
    merged = Calibration.merge(parts)
    assert merged[params[0]] is merged[params[1]] is not merged[params[3]]


def test_sums_are_freed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    finish = _Sums.finish
    freed = []

    def watched(sums: _Sums, name: str) -> InputStatistics:
        assert sums.products is not None
        products = weakref.ref(sums.products)
        found = finish(sums, name)
        freed.append(products() is None)
        return found

    monkeypatch.setattr(_Sums, "finish", watched)
    params = prunable_parameters(model)
    Calibration.collect(model, [torch.randn(8, 3)], params, statistics="covariance")
    assert freed == [True] * 4


def test_statistics_are_those_that_every_parameter_has() -> None:
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    x = torch.randn(4, 3)
    found = collected(one, x, statistics="covariance")
    assert found.statistics == "covariance"
    assert Calibration({**found, **collected(other, x)}).statistics == "norms"


def test_bad_merges() -> None:
    layer, other = nn.Linear(3, 2), nn.Linear(3, 2)
    one, two = (collected(module, torch.randn(2, 3)) for module in (layer, other))
    with pytest.raises(
        ValueError, match="calibrations should have at least one Calibration, got none"
    ):
        Calibration.merge([])
    with pytest.raises(
        ValueError, match=r"calibrations\[1\] should have the parameters of calibrations\[0\]"
    ):
        Calibration.merge([one, two])
    with pytest.raises(ValueError, match=r"\[1\] should have .* norms, got covariance"):
        Calibration.merge([one, collected(layer, torch.randn(2, 3), statistics="covariance")])
    with pytest.raises(ValueError, match="one number for each of the 2 calibrations, got 1"):
        Calibration.merge([one, one], weights=[1])
    for weights in ([-1, 2], [0, 0], [float("nan"), 1], [float("inf"), 1], [1e308, 1e308]):
        with pytest.raises(ValueError, match="finite, not negative and not all 0"):
            Calibration.merge([one, one], weights=weights)


@pytest.mark.parametrize("statistics", ["norms", "covariance"])
def test_saving_and_loading(statistics: Any, tmp_path: Path) -> None:
    model, again = tiny_bert(), tiny_bert()
    params, others = prunable_parameters(model), prunable_parameters(again)
    batches = [{"input_ids": torch.randint(1, 20, (2, 6))}]
    calibration = Calibration.collect(model, batches, params, statistics=statistics)
    file = tmp_path / "calibration.safetensors"
    calibration.save(file)
    with safe_open(file, framework="pt") as stored:
        keys = set(stored.keys())
    shared = "encoder.layer.0.attention.self."
    assert f"{shared}query.weight.norms" in keys
    assert f"{shared}key.weight.norms" not in keys  # the query's
    assert (f"{shared}query.weight.covariance" in keys) == (statistics == "covariance")

    (tmp_path / "plain").touch()
    assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode

    loaded = Calibration.load(file, others)
    assert list(loaded) == list(others) and loaded.statistics == statistics
    for pair, other in zip(params, others, strict=True):
        for key in ("count", "norms", "mean", "covariance"):
            was, now = getattr(calibration[pair], key), getattr(loaded[other], key)
            assert torch.equal(was, now) if isinstance(was, Tensor) else was == now
    assert loaded[others[0]] is loaded[others[1]]
    some = prunable_parameters(again, include="encoder.layer.1")
    assert list(Calibration.load(file, some)) == list(some)
    # What was loaded or merged can be saved.
    Calibration.merge([loaded, loaded]).save(tmp_path / "merged.safetensors")


def test_bad_files(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    params = prunable_parameters(model)
    calibration = Calibration.collect(model, [torch.randn(4, 3)], params)
    file = tmp_path / "file"
    with pytest.raises(ValueError, match=r"Calibration\.save needs the dotted names"):
        Calibration.collect(model, [torch.randn(4, 3)], list(params)).save(file)
    assert not file.exists()
    calibration.save(file)
    with pytest.raises(TypeError, match=r"should come from prunable_parameters\(model\), got list"):
        Calibration.load(file, list(params))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"has no statistics for 1\.weight"):
        Calibration.load(file, prunable_parameters(nn.Sequential(nn.ReLU(), nn.Linear(3, 2))))
    with pytest.raises(ValueError, match=r"inputs of 0\.weight should have 5 features, got 3 in"):
        Calibration.load(file, prunable_parameters(nn.Sequential(nn.Linear(5, 2))))
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="cannot be read as a calibration"):
        Calibration.load(file, params)
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, file)
    with pytest.raises(ValueError, match=r"should be a file that Calibration\.save wrote"):
        Calibration.load(file, params)
    entries = json.dumps({"0.weight": {"of": "0.weight", "count": 1}})
    save_file({"x": torch.ones(1)}, file, metadata={"calibration": entries})
    with pytest.raises(ValueError, match="cannot be read as a calibration"):
        Calibration.load(file, params)
    with pytest.raises(FileNotFoundError):
        Calibration.load(tmp_path / "none", params)
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        Calibration.load(tmp_path, params)


@pytest.mark.parametrize(
    ("key", "damage", "message"),
    [
        ("mean", lambda own: own[:1].clone(), r"should have shape \(3,\), got \(1,\)"),
        ("covariance", lambda own: own[:2].clone(), r"should have shape \(3, 3\), got \(2, 3\)"),
        ("norms", lambda own: own * float("nan"), "should be finite numbers, got NaN or infinity"),
        ("covariance", lambda own: own * float("inf"), "should be finite numbers, got NaN or inf"),
    ],
)
def test_damaged_statistics(key: str, damage: Any, message: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = nn.Sequential(nn.Linear(3, 2))
    params = prunable_parameters(model)
    file = tmp_path / "file"
    Calibration.collect(model, [torch.randn(4, 3)], params, statistics="covariance").save(file)
    with safe_open(file, framework="pt") as stored:
        metadata = stored.metadata()
    tensors = load_file(file)
    tensors[f"0.weight.{key}"] = damage(tensors[f"0.weight.{key}"])
    save_file(tensors, file, metadata)
    with pytest.raises(ValueError, match=f"the {key} of 0.weight in .*file {message}"):
        Calibration.load(file, params)


def test_a_file_that_is_there_is_kept_when_saving_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    params = prunable_parameters(model)
    calibration = Calibration.collect(model, [torch.randn(4, 3)], params)
    file = tmp_path / "file"
    calibration.save(file)
    before = file.read_bytes()

    def full(tensors: Any, path: str | Path, **kwargs: Any) -> None:
        Path(path).write_bytes(b"the first bytes of it")
        raise SafetensorError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr("safetensors.torch.save_file", full)
        calibration.save(file)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_bad_statistics() -> None:
    conv = nn.Conv1d(4, 2, 3)
    with pytest.raises(ValueError, match=r"statistics should be one of .*, got 'variance'"):
        Calibration.collect(conv, [], [(conv, "weight")], statistics="variance")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Conv1d\.weight\) belongs to a convolution"):
        Calibration.collect(conv, [], [(conv, "weight")], statistics="covariance")
    with pytest.raises(ValueError, match="params should have at least one"):
        Calibration.collect(conv, [], [])
    layer = nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match=r"the inputs of .* should be finite numbers, got NaN or infinity"
    ):
        collected(layer, torch.tensor([[1e30, 1.0], [-1e30, 1.0]]), statistics="covariance")


def test_methods_and_criteria_take_a_calibration() -> None:
    def pruned(given: Any, wanda: bool) -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
        params = prunable_parameters(model)
        calibration = Calibration.collect(model, [torch.randn(9, 4) ** 3], params)
        chosen = calibration if given == "calibration" else calibration.norms()
        if wanda:
            scores = tap.criteria.wanda(params, chosen)
            tap.global_unstructured(params, tap.Magnitude, importance_scores=scores, amount=0.5)
        else:
            tap.global_unstructured(params, tap.AlignedMagnitude, amount=0.5, input_norms=chosen)
            tap.global_unstructured(params, tap.AlignedNM, n=1, m=2, input_norms=chosen)
        return model

    for wanda in (False, True):
        one, other = pruned("calibration", wanda), pruned("norms", wanda)
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a.weight_mask, b.weight_mask)


def test_a_single_batch_is_refused_and_so_is_what_cannot_be_merged() -> None:
    layer = nn.Linear(2, 2)
    for batch in (torch.ones(3, 2), {"input": torch.ones(3, 2)}):
        with pytest.raises(TypeError, match="put it into a list"):
            Calibration.collect(layer, batch, [(layer, "weight")])  # type: ignore[arg-type]
    calibration = Calibration.collect(layer, [torch.ones(3, 2)], [(layer, "weight")])
    with pytest.raises(TypeError, match=r"calibrations\[0\] should be a Calibration, got tuple"):
        Calibration.merge(calibration)
