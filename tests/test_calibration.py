"""input_norms against the same numbers taken from recorded inputs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import torchalignprune as tap
from torchalignprune.calibration import input_norms
from torchalignprune.parameters import PrunableParameters, prunable_parameters


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
        assert padded[pair].device.type == device
    counted = input_norms(model, [{"input_ids": ids}], params)
    assert not torch.allclose(counted[params[0]], padded[params[0]])


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
    with pytest.raises(ValueError, match="never reached l0, l1, l2, l3, l4 and 2 more"):
        input_norms(nn.Linear(2, 2), [torch.ones(1, 2)], many)


def test_bad_input() -> None:
    layer = nn.Linear(2, 2)
    params = prunable_parameters(nn.Sequential(layer))
    with pytest.raises(ValueError, match="there are no calibration batches"):
        input_norms(layer, [], params)
    with pytest.raises(TypeError, match="a batch should be a mapping or a tensor, got list"):
        input_norms(layer, [[torch.ones(1, 2)]], params)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"no tokens for 0\.weight"):
        input_norms(layer, [torch.ones(0, 2)], params)
    with pytest.raises(ValueError, match=r"NaN or infinity in the inputs of 0\.weight"):
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


def test_progress_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    layer = nn.Linear(2, 2)
    with pytest.raises(ImportError, match=r'pip install "torchalignprune\[transformers\]"'):
        input_norms(layer, [torch.ones(1, 2)], [(layer, "weight")], progress=True)
    assert hooks(layer) == 0
