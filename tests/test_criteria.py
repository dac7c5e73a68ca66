"""The criteria, each against its equation written out in loops."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

import torchalignprune as tap
from torchalignprune import criteria
from torchalignprune.criteria import Scores
from torchalignprune.parameters import prunable_parameters

Pair = tuple[nn.Module, str]

ALL: dict[str, Callable[[list[Pair]], Scores]] = {
    "magnitude": criteria.magnitude,
    "lamp": criteria.lamp,
    "lookahead": criteria.lookahead,
    "wanda": lambda params: criteria.wanda(
        params,
        {pair: torch.ones(getattr(*pair).shape[1]) for pair in params},  # on the CPU
    ),
    "random": criteria.random,
}


def linear(values: object, dtype: torch.dtype = torch.float32) -> Pair:
    weight = torch.tensor(values, dtype=dtype)
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=dtype)
    layer.weight.data.copy_(weight)
    return layer, "weight"


def lamp_by_loops(weight: Tensor) -> Tensor:
    flat = weight.double().flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: (abs(flat[i]), i))
    scores = torch.zeros(len(flat), dtype=torch.float64)
    for position, i in enumerate(order):
        tail = math.fsum(flat[j] ** 2 for j in order[position:])
        scores[i] = flat[i] ** 2 / tail if tail else 0.0
    return scores.view(weight.shape)


@pytest.mark.parametrize("name", ALL)
def test_shape_dtype_and_device(name: str, dtype: torch.dtype, device: str) -> None:
    params = [
        (nn.Linear(4, 6, dtype=dtype, device=device), "weight"),
        (nn.Conv1d(6, 2, 3, dtype=dtype, device=device), "weight"),
    ]
    torch.manual_seed(0)
    scores = ALL[name](params)
    torch.manual_seed(0)
    on_cpu = ALL[name]([(copy.deepcopy(module).cpu(), "weight") for module, _ in params])
    for score, twin in zip(scores.values(), on_cpu.values(), strict=True):
        torch.testing.assert_close(score.cpu(), twin)
        assert score.device.type == device
    assert list(scores) == params
    for (module, attribute), score in scores.items():
        assert score.shape == getattr(module, attribute).shape
        assert score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert not score.requires_grad
        assert bool((score >= 0).all())


@pytest.mark.parametrize("name", ALL)
def test_the_model_is_left_alone(name: str) -> None:
    params = [(nn.Linear(4, 6), "weight"), (nn.Linear(6, 4), "weight")]
    before = [module.weight.detach().clone() for module, _ in params]
    ALL[name](params)
    for (module, _), weight in zip(params, before, strict=True):
        assert torch.equal(module.weight, weight)
        assert isinstance(module.weight, nn.Parameter)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("by", ["torch", "tap"])
def test_pruned_entries_score_nothing_and_count_for_nothing(name: str, by: str) -> None:
    torch.manual_seed(0)
    pair = (nn.Linear(6, 6), "weight")
    mask = torch.rand(6, 6) > 0.4
    plain = linear((pair[0].weight.detach() * mask).tolist())
    if by == "torch":
        prune.custom_from_mask(*pair, mask)
    else:
        count = int((~mask).sum())
        tap.global_unstructured(
            [pair], tap.Magnitude, importance_scores={pair: mask.float()}, amount=count
        )
    # What is under the mask does not matter, not even if it is not a number.
    pair[0].weight_orig.data[~mask] = float("nan")
    torch.manual_seed(1)
    score = ALL[name]([pair])[pair]
    assert bool((score[~mask] == 0).all())
    assert bool((score[mask] > 0).all())
    if name != "random":
        torch.testing.assert_close(score, ALL[name]([plain])[plain], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["magnitude", "lamp", "lookahead", "wanda"])
@pytest.mark.parametrize(("bad", "called"), [("nan", "NaN"), ("inf", "infinity")])
def test_bad_weights_are_named(name: str, bad: str, called: str) -> None:
    params = prunable_parameters(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    params[1][0].weight.data[2, 3] = float(bad)
    with pytest.raises(ValueError, match=rf"1\.weight should be finite, got {called}"):
        ALL[name](params)


@pytest.mark.parametrize("name", ALL)
def test_tied_weights_share_their_scores(name: str) -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    params = [(first, "weight"), (second, "weight")]
    # With lookahead the place in a chain matters too.
    scores = criteria.lookahead(params, []) if name == "lookahead" else ALL[name](params)
    assert torch.equal(scores[params[0]], scores[params[1]])


def test_iterators_are_welcome() -> None:
    pair = linear([[1.0, 2.0]])
    norms = {pair: torch.ones(2)}
    for score in (criteria.magnitude, criteria.lamp, criteria.lookahead, criteria.random):
        assert list(score(iter([pair]))) == [pair]
    assert list(criteria.wanda(iter([pair]), norms)) == [pair]


@given(
    st.lists(
        st.one_of(st.sampled_from([0.0, 1.0, -1.0, 2.0]), st.floats(-10, 10, width=16)),
        min_size=1,
        max_size=24,
    )
)
def test_lamp_by_its_equation(values: list[float]) -> None:
    pair = linear([values], torch.float64)
    score = criteria.lamp([pair])[pair]
    torch.testing.assert_close(score, lamp_by_loops(pair[0].weight), rtol=1e-12, atol=0)
    if any(values):
        assert float(score.max()) == pytest.approx(1)


def test_lamp_ranks_within_a_tensor_by_magnitude_and_position() -> None:
    pair = linear([[1.0, -3.0, 1.0, 2.0, -1.0]])
    assert criteria.lamp([pair])[pair].argsort().tolist() == [[0, 2, 4, 3, 1]]


def test_lamp_does_not_lose_small_weights_in_a_long_sum() -> None:
    weight = torch.full((1, 1 << 16), 1e-3)
    weight[0, 0] = 100.0
    pair = linear(weight.tolist())
    score = criteria.lamp([pair])[pair]
    small = float(torch.tensor(1e-3).double() ** 2)
    assert float(score[0, 1]) == pytest.approx(small / (1e4 + 65535 * small), rel=1e-6)
    assert float(score[0, -1]) == pytest.approx(small / (1e4 + small), rel=1e-6)


def test_lamp_lets_no_layer_die() -> None:
    torch.manual_seed(0)
    params = [(nn.Linear(16, 16), "weight") for _ in range(4)]
    for i, (layer, _) in enumerate(params):
        layer.weight.data *= 1000.0**-i
    prune.global_unstructured(
        params,
        pruning_method=prune.L1Unstructured,
        importance_scores=criteria.lamp(params),
        amount=4 * 256 - 4,
    )
    assert [int((layer.weight != 0).sum()) for layer, _ in params] == [1] * 4


def test_lookahead_by_its_equation() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(3, 4), Conv1D(5, 4), nn.Linear(5, 2)]
    params = [(layer, "weight") for layer in layers]
    # Outputs x inputs.
    w = [layers[0].weight, layers[1].weight.T, layers[2].weight]
    expected = []
    for i, weight in enumerate(w):
        score = torch.zeros_like(weight)
        for k in range(weight.shape[0]):
            for j in range(weight.shape[1]):
                before = w[i - 1][j, :].norm() if i > 0 else 1.0
                after = w[i + 1][:, k].norm() if i < 2 else 1.0
                score[k, j] = weight[k, j].abs() * before * after
        expected.append(score)
    expected[1] = expected[1].T
    scores = criteria.lookahead(params)
    for pair, score in zip(params, expected, strict=True):
        torch.testing.assert_close(scores[pair], score.detach())


def test_lookahead_of_convolutions() -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(2, 3, 2), nn.ConvTranspose2d(3, 4, 2)
    scores = criteria.lookahead([(first, "weight"), (second, "weight")])
    after = torch.stack([second.weight[k].norm() for k in range(3)])
    before = torch.stack([first.weight[j].norm() for j in range(3)])
    torch.testing.assert_close(
        scores[first, "weight"], (first.weight.abs() * after.view(3, 1, 1, 1)).detach()
    )
    torch.testing.assert_close(
        scores[second, "weight"], (second.weight.abs() * before.view(3, 1, 1, 1)).detach()
    )


def test_lookahead_chains() -> None:
    params = prunable_parameters(nn.Sequential(nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)))
    with pytest.raises(
        ValueError, match=r"0\.weight should have 4 outputs to feed 1\.weight, got 6"
    ):
        criteria.lookahead(params)
    with pytest.raises(ValueError, match="pass chains= to say what feeds what"):
        criteria.lookahead(params)
    with pytest.raises(ValueError, match=r"2\.weight should be in the chains once, got twice"):
        criteria.lookahead(params, chains=[[params[0], params[2]], [params[1], params[2]]])
    scores = criteria.lookahead(params, chains=[[params[0], params[2]]])
    torch.testing.assert_close(scores[params[1]], params[1][0].weight.abs().detach())
    norms = params[0][0].weight.norm(dim=1)
    torch.testing.assert_close(scores[params[2]], (params[2][0].weight.abs() * norms).detach())
    # A chain may lead through a layer that is not to be pruned.
    alone = criteria.lookahead(params[2:], chains=[[params[0], params[2]]])
    assert list(alone) == params[2:] and torch.equal(alone[params[2]], scores[params[2]])
    with pytest.raises(ValueError, match="should have outputs and inputs, got shape"):
        criteria.lookahead([(params[0][0], "bias"), params[2]])


def test_lookahead_sees_what_is_left_of_its_neighbours() -> None:
    first, second = linear([[3.0], [4.0]]), linear([[1.0, 1.0]])
    prune.custom_from_mask(*first, torch.tensor([[1.0], [0.0]]))
    assert criteria.lookahead([first, second])[second].tolist() == [[3.0, 0.0]]


@pytest.mark.parametrize(
    ("kind", "config", "links"),
    [
        (
            transformers.BertModel,
            transformers.BertConfig,
            [("attention.self.value", "attention.output.dense"), ("intermediate.dense", "output")],
        ),
        (
            transformers.XLMRobertaForMaskedLM,
            transformers.XLMRobertaConfig,
            [("attention.self.value", "attention.output.dense"), ("intermediate.dense", "output")],
        ),
        (
            transformers.DistilBertModel,
            transformers.DistilBertConfig,
            [("attention.v_lin", "attention.out_lin"), ("ffn.lin1", "ffn.lin2")],
        ),
        (
            transformers.MPNetModel,
            transformers.MPNetConfig,
            [("attention.attn.v", "attention.attn.o"), ("intermediate.dense", "output")],
        ),
        (
            transformers.DebertaV2Model,
            transformers.DebertaV2Config,
            [
                ("attention.self.value_proj", "attention.output.dense"),
                ("intermediate.dense", "output"),
            ],
        ),
    ],
)
def test_transformer_chains(
    kind: type[nn.Module], config: type, links: list[tuple[str, str]]
) -> None:
    sizes = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind is transformers.DistilBertModel:
        sizes |= {"dim": 8, "hidden_dim": 16, "n_layers": 3, "n_heads": 2}
    else:
        sizes |= {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
        sizes["num_hidden_layers"] = 3
    model = kind(config(**sizes))
    params = prunable_parameters(model)
    names = dict(zip(params, params.names, strict=True))
    chains = [tuple(names[pair] for pair in chain) for chain in criteria.transformer_chains(params)]
    assert len(chains) == 6
    for layer in range(3):
        for first, second in links:
            assert any(
                f"layer.{layer}.{first}.weight" in a and f"layer.{layer}.{second}" in b
                for a, b in chains
            ), (layer, first, second)
    scores = criteria.lookahead(params, criteria.transformer_chains(params))
    assert list(scores) == list(params)


def test_transformer_chains_need_all_of_their_links() -> None:
    layer = nn.ModuleDict({"lin1": nn.Linear(4, 6), "lin2": nn.Linear(6, 4)})
    whole = nn.ModuleDict({"lin1": nn.Linear(4, 6), "lin2": nn.Linear(6, 4)})
    model = nn.ModuleList(nn.ModuleDict({"ffn": each}) for each in (layer, whole))
    params = prunable_parameters(model, exclude="0.ffn.lin2")
    assert criteria.transformer_chains(params) == [(params[1], params[2])]


def test_transformer_chains_are_found_by_whole_names() -> None:
    names = {"xffn": nn.ModuleDict({"lin1": nn.Linear(4, 6), "lin2": nn.Linear(6, 4)})}
    names["ffn"] = nn.ModuleDict({"lin1": nn.Linear(4, 6), "lin2": nn.Linear(6, 4)})
    params = prunable_parameters(nn.ModuleDict(names))
    assert criteria.transformer_chains(params) == [(params[2], params[3])]


def test_transformer_chains_where_there_are_none() -> None:
    params = prunable_parameters(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="layers with the names of a BERT-like encoder, got none"):
        criteria.transformer_chains(params)
    with pytest.raises(TypeError, match="should come from prunable_parameters"):
        criteria.transformer_chains(list(params))  # type: ignore[arg-type]


def test_wanda_by_its_equation() -> None:
    torch.manual_seed(0)
    x = torch.tensor([2.0, 0.5, 1.0])
    layer, gpt = nn.Linear(3, 2), Conv1D(2, 3)
    conv, transposed = nn.Conv2d(3, 2, 2), nn.ConvTranspose1d(3, 2, 2)
    params: list[Pair] = [(m, "weight") for m in (layer, gpt, conv, transposed)]
    scores = criteria.wanda(params, dict.fromkeys(params, x))
    for i in range(2):
        for j in range(3):
            for module, entry in (
                (layer, (i, j)),
                (gpt, (j, i)),
                (conv, (i, j)),
                (transposed, (j, i)),
            ):
                torch.testing.assert_close(
                    scores[module, "weight"][entry], (module.weight[entry].abs() * x[j]).detach()
                )


def test_wanda_of_a_grouped_convolution() -> None:
    conv = nn.Conv1d(4, 6, 2, groups=2)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    score = criteria.wanda([(conv, "weight")], {(conv, "weight"): x})[conv, "weight"]
    for out in range(6):
        for j in range(2):
            expected = conv.weight[out, j].abs() * x[(out // 3) * 2 + j]
            torch.testing.assert_close(score[out, j], expected.detach())
    # The weight of a transposed one shows all input channels.
    turned = nn.ConvTranspose1d(4, 6, 2, groups=2)
    score = criteria.wanda([(turned, "weight")], {(turned, "weight"): x})[turned, "weight"]
    torch.testing.assert_close(score, (turned.weight.abs() * x.view(4, 1, 1)).detach())


def test_wanda_checks_its_norms() -> None:
    params = prunable_parameters(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)))
    good = {params[0]: torch.ones(3), params[1]: torch.ones(2)}
    with pytest.raises(ValueError, match=r"input_norms has no entry for 1\.weight"):
        criteria.wanda(params, {params[0]: torch.ones(3)})
    with pytest.raises(ValueError, match=r"0\.weight should have shape \(3,\), got \(2,\)"):
        criteria.wanda(params, good | {params[0]: torch.ones(2)})
    for bad in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match=r"1\.weight should be finite and not negative"):
            criteria.wanda(params, good | {params[1]: torch.tensor([1.0, bad])})


def test_random_is_reproducible_and_never_zero() -> None:
    params = [(nn.Linear(64, 64), "weight"), (nn.Linear(8, 8), "weight")]
    one, two, other = (
        criteria.random(params, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    for pair in params:
        assert torch.equal(one[pair], two[pair])
        assert not torch.equal(one[pair], other[pair])
        assert bool((one[pair] > 0).all()) and bool((one[pair] <= 1).all())
    assert float(one[params[0]].mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("name", ALL)
def test_scores_work_in_both_global_unstructured(name: str) -> None:
    torch.manual_seed(0)
    chosen = []
    for run in (prune.global_unstructured, tap.global_unstructured):
        torch.manual_seed(1)
        params = [(nn.Linear(8, 8), "weight"), (nn.Linear(8, 8), "weight")]
        method = prune.L1Unstructured if run is prune.global_unstructured else tap.Magnitude
        run(params, method, importance_scores=ALL[name](params), amount=0.5)
        chosen.append([module.weight_mask.bool() for module, _ in params])
        assert sum(int(mask.sum()) for mask in chosen[-1]) == 64
    for ours, theirs in zip(*chosen, strict=True):
        assert torch.equal(ours, theirs)
