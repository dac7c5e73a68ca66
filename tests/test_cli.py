"""The command line on tiny checkpoints that are made on the spot."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import nn

import torchalignprune as tap
from torchalignprune import checkpoints, cli, criteria
from torchalignprune.alignment_report import alignment_report
from torchalignprune.checkpoints import check_output, new_folder
from torchalignprune.cli import main
from torchalignprune.parameters import PrunableParameters, prunable_parameters

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Pruning removes the weights that matter least.",
    "A row of a matrix is a unit.",
    "Short one.",
    "Every unit keeps its direction when the right weights are kept.",
]
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}


def save_tokenizer(folder: Path) -> int:
    """Trains a tokenizer, and says how many tokens it has."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(SENTENCES, trainers.WordLevelTrainer(special_tokens=specials))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=40,
    )
    fast.save_pretrained(folder)
    return len(fast)


def make_bert(folder: Path, kind: Any = transformers.BertModel, **changes: Any) -> Path:
    torch.manual_seed(0)
    tokens = save_tokenizer(folder)
    model = kind(transformers.BertConfig(**(SIZES | {"vocab_size": tokens} | changes)))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_bert(tmp_path_factory.mktemp("checkpoints") / "tiny-bert")
    (folder / "README.md").write_text("A tiny model.\n")
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "sentences.txt"
    file.write_text("\n".join([*SENTENCES, "", "  "]) + "\n", encoding="utf-8")
    return file


def params_of(model: nn.Module) -> PrunableParameters:
    return prunable_parameters(model)


def zeros_of(model: nn.Module) -> int:
    return sum(int((getattr(*pair) == 0).sum()) for pair in params_of(model))


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def launch(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    code = "import sys; from torchalignprune.cli import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts the tests in the background has them ignore the interrupt.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def test_prune(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(bert)
    out = tmp_path / "made" / "out"
    assert run("prune", bert, "--sparsity", 0.5, "--out", out) == 0
    printed, err = capsys.readouterr()
    assert tree(bert) == before
    assert leftovers(out.parent) == []

    dense = transformers.BertModel.from_pretrained(bert)
    pruned, info = transformers.AutoModel.from_pretrained(out, output_loading_info=True)
    assert type(pruned) is transformers.BertModel
    assert not info["missing_keys"] and not info["unexpected_keys"]
    twin = transformers.BertModel.from_pretrained(bert)
    tap.global_unstructured(params_of(twin), tap.AlignedMagnitude, amount=0.5)
    names = params_of(dense).names
    for (name, ours), (_, original) in zip(
        pruned.named_parameters(), dense.named_parameters(), strict=True
    ):
        if name in names:
            assert torch.equal(ours, twin.get_submodule(name.rpartition(".")[0]).weight)
        else:
            assert torch.equal(ours, original)

    report = json.loads((out / "report.json").read_text())
    entries = sum(getattr(*pair).numel() for pair in params_of(dense))
    assert zeros_of(pruned) == report["totals"]["zeros"] == entries // 2
    assert [layer["name"] for layer in report["layers"]] == names
    for layer in report["layers"]:
        tensor = pruned.get_parameter(layer["name"]).detach()
        assert layer["zeros"] == int((tensor == 0).sum())
        assert 0 < layer["worst_alignment"] <= layer["mean_alignment"] <= 1
        original = dense.get_parameter(layer["name"]).detach()
        distortion = float(((tensor - original) ** 2).sum() / (original**2).sum())
        assert layer["distortion"] == pytest.approx(distortion, rel=1e-5)
    assert report["method"] == {
        "name": "aligned-magnitude",
        "criterion": None,
        "amount": 0.5,
        "budget": "global",
        "alignment": "cosine",
        "units": "out",
        "calibration": [],
        "realign": None,
        "calibration_sentences": 0,
        "include": None,
        "exclude": None,
    }
    assert report["realigned"] == []
    assert report["architecture"] == "BertModel" and report["dtype"] == "float32"
    assert report["seed"] == 0
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["torchalignprune"] == tap.__version__
    assert report["command"].startswith("torchalignprune prune ")
    assert set(report["seconds"]) == {"load", "prune", "report", "write", "verify"}
    assert report["left_out"]["pooler.dense.weight"] == "head (pooler)"
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    # Everything else came along, and the tokenizer still works.
    assert before.keys() - tree(out).keys() == set()
    for name in ("README.md", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == before[name]
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert pruned(**tokenizer(SENTENCES[0], return_tensors="pt")).last_hidden_state.isfinite().all()
    # Whoever may read the config may read the weights.
    modes = {path.name: path.stat().st_mode for path in out.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]

    assert err == ""
    assert f"{entries // 2:,} of {entries:,} weights in 12 matrices are zero (50.0%)" in printed


Direct = Callable[[PrunableParameters, tap.Calibration], None]


def direct(method: Any, **options: Any) -> Direct:
    return lambda params, calibration: tap.global_unstructured(params, method, **options)


def scored(score: Any, budget: str = "global") -> Direct:
    return lambda params, calibration: tap.global_unstructured(
        params,
        tap.Magnitude,
        importance_scores=score(params, calibration),
        amount=0.6,
        budget=budget,
    )


def realigned(what: Any, method: Any, **options: Any) -> Direct:
    def prune(params: PrunableParameters, calibration: tap.Calibration) -> None:
        if method is tap.AlignedMagnitude:
            options["input_norms"] = calibration
        tap.global_unstructured(params, method, **options)
        tap.realign(params, calibration, what)

    return prune


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


HALF = ("--sparsity", "0.6")
CASES: dict[str, tuple[tuple[str, ...], Direct]] = {
    "magnitude": ((*HALF, "--method", "magnitude"), direct(tap.Magnitude, amount=0.6)),
    "per layer": (
        (*HALF, "--method", "magnitude", "--budget", "layer"),
        direct(tap.Magnitude, amount=0.6, budget="layer"),
    ),
    "random": (
        (*HALF, "--method", "random", "--seed", "3"),
        lambda params, calibration: tap.global_unstructured(
            params, tap.Random, amount=0.6, generator=seeded(3)
        ),
    ),
    "units": (
        (*HALF, "--units", "both", "--budget", "unit"),
        direct(tap.AlignedMagnitude, amount=0.6, units="both", budget="unit"),
    ),
    "frobenius": (
        (*HALF, "--alignment", "frobenius"),
        direct(tap.AlignedMagnitude, amount=0.6, alignment="frobenius"),
    ),
    "inputs": (
        (*HALF, "--calibration", "TEXT"),
        lambda params, calibration: tap.global_unstructured(
            params, tap.AlignedMagnitude, amount=0.6, input_norms=calibration
        ),
    ),
    "2:4": (("--method", "aligned-nm"), direct(tap.AlignedNM, n=2, m=4)),
    "1:4": (
        ("--method", "aligned-nm", "--nm", "1:4", "--calibration", "TEXT"),
        lambda params, calibration: tap.global_unstructured(
            params, tap.AlignedNM, n=1, m=4, input_norms=calibration
        ),
    ),
    "lamp": (
        (*HALF, "--criterion", "lamp"),
        scored(lambda p, calibration: criteria.lamp(p)),
    ),
    "by magnitude": (
        (*HALF, "--criterion", "magnitude"),
        scored(lambda params, calibration: criteria.magnitude(params)),
    ),
    "lookahead": (
        (*HALF, "--criterion", "lookahead"),
        scored(
            lambda p, calibration: criteria.lookahead(p, criteria.transformer_chains(p)), "layer"
        ),
    ),
    "random criterion": (
        (*HALF, "--criterion", "random", "--seed", "4"),
        scored(lambda params, calibration: criteria.random(params, seeded(4))),
    ),
    "wanda": (
        (*HALF, "--criterion", "wanda", "--calibration", "TEXT"),
        scored(criteria.wanda, "unit"),
    ),
    "realigned bias": (
        (*HALF, "--method", "magnitude", "--calibration", "TEXT", "--realign", "bias"),
        realigned("bias", tap.Magnitude, amount=0.6),
    ),
    "realigned weights": (
        (*HALF, "--budget", "unit", "--calibration", "TEXT", "--realign", "weights"),
        realigned("weights", tap.AlignedMagnitude, amount=0.6, budget="unit"),
    ),
    "wanda globally": (
        (*HALF, "--criterion", "wanda", "--calibration", "TEXT", "--budget", "global"),
        scored(criteria.wanda),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_methods_do_what_the_library_does(
    case: str, bert: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, prune = CASES[case]
    out = tmp_path / "out"
    filled = [str(text) if argument == "TEXT" else argument for argument in arguments]
    assert run("prune", bert, *filled, "--out", out) == 0, capsys.readouterr().err

    twin = transformers.BertModel.from_pretrained(bert).eval()
    params = params_of(twin)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    # In the order of the command, so that sums are the same.
    batches = [tokenizer(sorted(SENTENCES, key=len), padding=True, return_tensors="pt")]
    calibration = tap.Calibration.collect(twin, batches, params, statistics="covariance")
    dense = {pair: getattr(*pair).detach().clone() for pair in params}
    prune(params, calibration)
    pruned = transformers.BertModel.from_pretrained(out)
    close = {"rtol": 0, "atol": 0}
    for name, (module, _) in zip(params.names, params, strict=True):
        torch.testing.assert_close(pruned.get_parameter(name), module.weight, **close, msg=name)
        bias = pruned.get_parameter(name.removesuffix("weight") + "bias")
        torch.testing.assert_close(bias, module.bias, **close, msg=name)
    report = json.loads((out / "report.json").read_text())
    assert report["totals"]["zeros"] == zeros_of(twin)
    if "TEXT" in arguments:
        assert report["method"]["calibration_sentences"] == len(SENTENCES)
        assert "calibrate" in report["seconds"]
    what = arguments[-1] if "--realign" in arguments else None
    assert report["method"]["realign"] == what
    assert ("realign" in report["seconds"]) == (what is not None)
    assert [entry["name"] for entry in report["realigned"]] == params.names * (what is not None)
    for entry in report["realigned"]:
        if what == "weights":
            assert 0 < entry["after"] < entry["before"]
        assert entry["bias"]
    # The report compares with the dense weights, whatever was moved since.
    for layer, figures in zip(report["layers"], alignment_report(params, dense), strict=True):
        assert layer["mean_alignment"] == pytest.approx(figures["mean_alignment"], abs=1e-4)
        assert layer["distortion"] == pytest.approx(figures["distortion"], rel=1e-3)


def test_include_and_exclude(bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    patterns = ["--include", "*attention*", "--include", "pooler", "--exclude", "*.layer.0"]
    assert run("prune", bert, "--sparsity", 0.9, *patterns, "--out", out) == 0
    report = json.loads((out / "report.json").read_text())
    names = [layer["name"] for layer in report["layers"]]
    assert len(names) == 5 and names[-1] == "pooler.dense.weight"
    assert all("layer.1.attention" in name for name in names[:-1])


def test_json_and_nothing_else(bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = launch("prune", bert, "--sparsity", 0.5, "--out", out, "--json")
    printed, err = process.communicate(timeout=120)
    assert process.returncode == 0 and err == ""
    assert json.loads(printed) == json.loads((out / "report.json").read_text())


def test_quiet_in_a_pipe(bert: Path, text: Path, tmp_path: Path) -> None:
    arguments = ["--sparsity", 0.5, "--calibration", text, "--out", tmp_path / "out"]
    process = launch("prune", bert, *arguments)
    printed, err = process.communicate(timeout=120)
    assert process.returncode == 0 and err == ""
    assert len(printed.splitlines()) == 2
    assert "\r" not in printed and "\x1b" not in printed


def test_a_reader_that_leaves_early(bert: Path, tmp_path: Path) -> None:
    with launch("prune", bert, "--sparsity", 0.5, "--out", tmp_path / "out", "--json") as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
    assert (tmp_path / "out").exists()


def buffered() -> dict[str, str]:
    """The environment of processes that print as users' do."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def test_a_reader_that_leaves_before_a_short_output(bert: Path, tmp_path: Path) -> None:
    for arguments in (["--help"], ["prune", bert, "--sparsity", 0.5, "--out", tmp_path / "out"]):
        with launch(*arguments, env=buffered()) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == ""
        assert process.returncode == 0
    assert (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_cannot_be_written() -> None:
    code = "import sys; from torchalignprune.cli import main; sys.exit(main(['info', '--json']))"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=buffered(),
        )
    assert done.returncode == 1
    assert done.stderr.startswith("torchalignprune info: error: ")
    assert "No space left on device" in done.stderr and len(done.stderr.splitlines()) == 1


def test_progress_on_a_terminal(bert: Path, text: Path, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    termios, fcntl = pytest.importorskip("termios"), pytest.importorskip("fcntl")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    code = "import sys; from torchalignprune.cli import main; sys.exit(main())"
    arguments = ["prune", bert, "--sparsity", 0.5, "--calibration", text, "--out", tmp_path / "out"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=theirs
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        seen += part
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    os.close(ours)
    for stage in (b"load", b"calibrate", b"prune", b"report", b"write", b"verify", b"5/6"):
        assert stage in seen, seen


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (
            transformers.XLMRobertaForMaskedLM,
            transformers.XLMRobertaConfig(vocab_size=50, **SIZES | {"pad_token_id": 1}),
        ),
        (
            transformers.GPT2LMHeadModel,
            transformers.GPT2Config(
                vocab_size=50, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
            ),
        ),
        (
            transformers.DistilBertForSequenceClassification,
            transformers.DistilBertConfig(
                vocab_size=50, dim=16, n_layers=2, n_heads=2, hidden_dim=32
            ),
        ),
        (
            transformers.T5ForConditionalGeneration,
            transformers.T5Config(vocab_size=50, d_model=16, d_ff=32, d_kv=8, num_layers=2),
        ),
    ],
)
def test_other_architectures(
    kind: Any, config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    torch.manual_seed(0)
    kind(config).save_pretrained(source)
    capsys.readouterr()
    assert run("prune", source, "--sparsity", 0.5, "--out", out) == 0, capsys.readouterr().err
    assert capsys.readouterr().err == ""
    dense, pruned = kind.from_pretrained(source), kind.from_pretrained(out)
    names = params_of(dense).names
    assert 2 * zeros_of(pruned) == sum(getattr(*pair).numel() for pair in params_of(dense))
    for name, tensor in dense.state_dict().items():
        kept = pruned.state_dict()[name] != 0 if name in names else ...
        assert torch.equal(pruned.state_dict()[name][kept], tensor[kept]), name
    assert load_file(out / "model.safetensors").keys() == (
        load_file(source / "model.safetensors").keys()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_is_that_of_the_stored_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    source = make_bert(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    save_file(
        {name: tensor.to(dtype) for name, tensor in weights.items()},
        source / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert json.loads((source / "config.json").read_text())["dtype"] == "float32"
    assert run("prune", source, "--sparsity", 0.5, "--out", tmp_path / "out") == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {dtype}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["dtype"] == str(dtype).removeprefix("torch.")


def test_shards(bert: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(bert, source)
    (source / "model.safetensors").unlink()
    transformers.BertModel.from_pretrained(bert).save_pretrained(source, max_shard_size="10KB")
    assert len(list(source.glob("model-*.safetensors"))) > 1
    assert run("prune", source, "--sparsity", 0.5, "--out", tmp_path / "out") == 0
    assert run("prune", bert, "--sparsity", 0.5, "--out", tmp_path / "whole") == 0
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors*")] == [
        "model.safetensors"
    ]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("names", [None, [], ["NoSuchModel"], ["logging"], "BertModel", 3])
def test_without_a_known_architecture_automodel_loads(
    names: list[str] | None, bert: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(bert, source)
    config = json.loads((source / "config.json").read_text()) | {"architectures": names}
    (source / "config.json").write_text(json.dumps(config))
    assert run("prune", source, "--sparsity", 0.5, "--out", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["architecture"] == "BertModel"


def test_weights_that_the_class_does_not_use_are_kept(tmp_path: Path) -> None:
    """As in bert-base-uncased: a masked language model's class, with pooler and next sentence."""
    source, out = tmp_path / "source", tmp_path / "out"
    make_bert(source, transformers.BertForPreTraining)
    weights = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    assert run("prune", source, "--sparsity", 0.5, "--out", out) == 0
    written = load_file(out / "model.safetensors")
    assert written.keys() == weights.keys()
    extra = {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "cls.seq_relationship.weight",
        "cls.seq_relationship.bias",
    }
    for name in extra:
        assert torch.equal(written[name], weights[name])
    report = json.loads((out / "report.json").read_text())
    assert set(report["carried_over"]) == extra and report["not_carried_over"] == []
    _, info = transformers.BertForPreTraining.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_a_pooler_that_transformers_drops_silently_is_kept(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    config = transformers.XLMRobertaConfig(vocab_size=50, **SIZES | {"pad_token_id": 1})
    transformers.XLMRobertaForMaskedLM(config).save_pretrained(source)
    weights = load_file(source / "model.safetensors")
    weights["roberta.pooler.dense.weight"] = torch.randn(16, 16)
    weights["roberta.pooler.dense.bias"] = torch.randn(16)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    assert run("prune", source, "--sparsity", 0.5, "--out", out) == 0
    written = load_file(out / "model.safetensors")
    assert written.keys() == weights.keys()
    assert torch.equal(written["roberta.pooler.dense.bias"], weights["roberta.pooler.dense.bias"])


def test_bitmasks(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = {format: tmp_path / format for format in ("dense", "bitmask")}
    for format, out in folders.items():
        arguments = ["--sparsity", 0.9, "--out", out, "--format", format]
        assert run("prune", bert, *arguments) == 0
    dense, packed = (tree(folder) for folder in folders.values())
    assert set(packed) - set(dense) == {"pruned.index.json", "pruned.safetensors"}
    assert set(dense) - set(packed) == {"model.safetensors"}
    assert json.loads(packed["report.json"])["format"] == "bitmask"
    model = transformers.BertModel.from_pretrained(folders["dense"])
    loaded = tap.load_pruned(transformers.AutoModel, folders["bitmask"])
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
        assert not bool((tensor == 0).logical_and(tensor.signbit()).any())
    # They can be pruned on, into either format, and reported on.
    capsys.readouterr()
    totals = []
    for source in folders.values():
        for format in folders:
            out = tmp_path / f"{source.name}-{format}"
            arguments = ["--sparsity", 0.95, "--out", out, "--format", format]
            assert run("prune", source, *arguments) == 0
            assert ((out / "pruned.index.json").exists()) == (format == "bitmask")
            capsys.readouterr()
            assert run("report", bert, out, "--json", "--no-matching") == 0
            totals.append(json.loads(capsys.readouterr().out)["totals"])
    assert totals[0]["sparsity"] == pytest.approx(0.95, abs=1e-3)
    assert totals == [totals[0]] * 4


def test_damaged_bitmasks(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run("prune", bert, "--sparsity", 0.9, "--out", out, "--format", "bitmask") == 0
    file = out / "pruned.safetensors"
    content = bytearray(file.read_bytes())
    for i in range(1000, len(content)):
        content[i] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    assert run("report", bert, out) == 2
    assert "pruned.safetensors " in capsys.readouterr().err
    assert run("prune", out, "--sparsity", 0.95, "--out", tmp_path / "again") == 2
    assert "pruned.safetensors " in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_a_bitmask_that_is_still_being_pruned(bert: Path, tmp_path: Path) -> None:
    """Its zeros count as those of any other folder do: the sparsity is the whole one."""
    model = transformers.BertModel.from_pretrained(bert)
    tap.Pruner(params_of(model), tap.Magnitude, tap.schedules.constant(0.5))
    tap.save_pruned(model, tmp_path / "masked", "bitmask")
    save_tokenizer(tmp_path / "masked")
    for sparsity, zeros in ((0.5, 0.5), (0.75, 0.75), (0.25, 0.5)):
        out = tmp_path / f"to-{sparsity}"
        assert run("prune", tmp_path / "masked", "--sparsity", sparsity, "--out", out) == 0
        totals = json.loads((out / "report.json").read_text())["totals"]
        assert totals["sparsity"] == pytest.approx(zeros, abs=1e-3)


@pytest.mark.parametrize("format", ["dense", "bitmask"])
def test_nan_where_nothing_is_pruned(format: str, bert: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(bert, source)
    weights = load_file(source / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][3, 0] = float("nan")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    arguments = ["--sparsity", 0.5, "--out", tmp_path / "out", "--format", format]
    assert run("prune", source, *arguments) == 0


def test_a_full_disk(
    bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("no space left on device")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    assert run("prune", bert, "--sparsity", 0.5, "--out", tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert "cannot be written: no space left on device" in err and len(err.splitlines()) == 1
    assert leftovers(tmp_path) == []


def test_what_a_bitmask_cannot_leave_out(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(bert, source)
    weights = load_file(source / "model.safetensors")
    extra = {"extra.weight": torch.ones(3)}
    save_file(weights | extra, source / "model.safetensors", metadata={"format": "pt"})
    arguments = ["--sparsity", 0.5, "--out", out, "--format", "bitmask"]
    assert run("prune", source, *arguments) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["carried_over"] == [] and report["not_carried_over"] == ["extra.weight"]
    del weights["pooler.dense.bias"]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert run("prune", source, *arguments, "--overwrite") == 2
    assert (
        "has no weights for pooler.dense.bias, which only --format dense" in capsys.readouterr().err
    )


def test_what_the_checkpoint_lacks_is_not_made_up(bert: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(bert, source)
    weights = load_file(source / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler")}
    save_file(kept, source / "model.safetensors", metadata={"format": "pt"})
    assert run("prune", source, "--sparsity", 0.5, "--out", out) == 0
    assert load_file(out / "model.safetensors").keys() == kept.keys()


def test_other_files(bert: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(bert, source)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Dense", "type": "sentence_transformers.models.Dense"},
    ]
    (source / "modules.json").write_text(json.dumps(modules))
    kept = ["1_Dense/config.json", "1_Dense/model.safetensors", "onnx/README", "training_args.bin"]
    dropped = [
        ".git/config",
        "checkpoint-900/trainer_state.json",
        ".git/lfs/model.safetensors",
        "1_Dense_old/model.safetensors",
        "flax_model.msgpack",
        "model.fp16.safetensors",
        "onnx/model.onnx",
        "optimizer.pt",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "tf_model.h5",
    ]
    for name in [*kept, *dropped]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    before = tree(source)
    assert run("prune", source, "--sparsity", 0.5, "--out", out) == 0
    after = tree(out)
    assert before.keys() - after.keys() == set(dropped)
    assert after.keys() - before.keys() == {"report.json", "report.png"}
    for name in kept:
        assert after[name] == before[name]


def test_links_are_followed(bert: Path, tmp_path: Path) -> None:
    """The hub's cache is made of links."""
    source, out = tmp_path / "snapshot", tmp_path / "out"
    source.mkdir()
    for file in bert.iterdir():
        (source / file.name).symlink_to(file)
    (source / "modules.json").write_text(json.dumps([{"path": "1_Pooling"}]))
    for name in ("1_Pooling", "data"):  # the second is no part of the model
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
        (source / name).symlink_to(tmp_path / name)
    before = tree(bert)
    assert run("prune", source, "--sparsity", 0.5, "--out", out) == 0
    assert not any(path.is_symlink() for path in out.iterdir())
    assert (out / "1_Pooling" / "config.json").read_text() == "1_Pooling"
    assert not (out / "data").exists()
    assert tree(bert) == before


def test_an_existing_folder_is_refused(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for content in (None, "mine.txt"):
        if content:
            (out / content).write_text("mine")
        before = tree(out)
        assert run("prune", bert, "--sparsity", 0.5, "--out", out) == 2
        assert "exists; --overwrite replaces it" in capsys.readouterr().err
        assert tree(out) == before
    # What is no checkpoint is not replaced even with --overwrite.
    assert run("prune", bert, "--sparsity", 0.5, "--out", out, "--overwrite") == 2
    assert "is not a checkpoint, so --overwrite does not" in capsys.readouterr().err
    assert tree(out) == before


@pytest.mark.parametrize("name", ["checkpoint-900", ".git", "runs"])
def test_work_beside_a_checkpoint_is_not_replaced(
    name: str, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in the output folder of a Trainer."""
    out = tmp_path / "out"
    shutil.copytree(bert, out)
    (out / name).mkdir()
    (out / name / "file").write_text("days of work")
    before = tree(out)
    assert run("prune", bert, "--sparsity", 0.5, "--out", out, "--overwrite") == 2
    err = capsys.readouterr().err
    assert f"holds more than a checkpoint, so --overwrite does not replace it: {name}" in err
    assert tree(out) == before
    # What the command has made is replaced whole, with folders that were copied from the source.
    (out / "report.json").write_text("{}")
    code = 0 if name == "runs" else 2
    assert run("prune", bert, "--sparsity", 0.5, "--out", out, "--overwrite") == code


def test_overwrite(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run("prune", bert, "--sparsity", 0.5, "--out", out, "--overwrite") == 0
    (out / "stale.txt").write_text("old")
    assert run("prune", bert, "--sparsity", 0.75, "--out", out, "--overwrite") == 0
    assert json.loads((out / "report.json").read_text())["totals"]["sparsity"] == 0.75
    assert not (out / "stale.txt").exists()
    assert leftovers(tmp_path) == []
    # A pruned checkpoint is a checkpoint: its zeros go first.
    assert run("prune", out, "--sparsity", 0.75, "--out", tmp_path / "again") == 0
    one, other = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("where", [".", "inner", ".."])
def test_the_checkpoint_itself_is_never_the_output(
    where: str, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "outer" / "source"
    shutil.copytree(bert, source)
    before = tree(source.parent)
    arguments = ["--sparsity", 0.5, "--out", source / where, "--overwrite"]
    assert run("prune", source, *arguments) == 2
    assert "should lie apart from the checkpoint" in capsys.readouterr().err
    assert tree(source.parent) == before
    # Not by way of a link either.
    link = tmp_path / "link"
    link.symlink_to(source)
    assert run("prune", source, "--sparsity", 0.5, "--out", link, "--overwrite") == 2
    assert tree(source.parent) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("stage", ["save_checkpoint", "copy_other_files", "verify_checkpoint"])
def test_a_failure_changes_nothing(
    stage: str,
    overwrite: bool,
    bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    if overwrite:
        shutil.copytree(bert, out)
    before = tree(tmp_path)

    def fail(*arguments: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoints, stage, fail)
    arguments = ["--sparsity", 0.5, "--out", out, *["--overwrite"] * overwrite]
    assert run("prune", bert, *arguments) == 1
    printed, err = capsys.readouterr()
    assert printed == "" and err == "torchalignprune prune: error: no space left on device\n"
    assert tree(tmp_path) == before
    assert out.exists() == overwrite and leftovers(tmp_path) == []


def test_verification_notices_a_difference(
    bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save = checkpoints.save_checkpoint

    def spoil(checkpoint: Any, folder: Path) -> None:
        save(checkpoint, folder)
        weights = load_file(folder / "model.safetensors")
        weights["encoder.layer.1.output.dense.weight"][0, 0] += 1
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(checkpoints, "save_checkpoint", spoil)
    assert run("prune", bert, "--sparsity", 0.5, "--out", tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert "RuntimeError: encoder.layer.1.output.dense.weight differs from the model when" in err
    assert list(tmp_path.iterdir()) == []


def wait_for_partial(process: subprocess.Popen[str], folder: Path) -> Path:
    """Until the run is writing: its temporary folder holds the weights."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        for partial in folder.glob(".out.*.partial"):
            if (partial / "model.safetensors").exists():
                return partial
        time.sleep(0.001)
    raise AssertionError(f"the run was over before it was seen writing: {process.communicate()}")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_killed_run_leaves_no_output(overwrite: bool, bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if overwrite:
        shutil.copytree(bert, out)
    before = tree(out) if overwrite else {}
    arguments = ["prune", bert, "--sparsity", 0.5, "--out", out, *["--overwrite"] * overwrite]
    process = launch(*arguments)
    partial = wait_for_partial(process, tmp_path)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert partial.exists() and not (partial / "report.png").exists()
    assert (tree(out) == before) if overwrite else (not out.exists())
    assert run(*arguments) == 0


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")],
)
def test_an_interrupted_run_cleans_up(
    number: signal.Signals, code: int, message: str, bert: Path, tmp_path: Path
) -> None:
    process = launch("prune", bert, "--sparsity", 0.5, "--out", tmp_path / "out")
    wait_for_partial(process, tmp_path)
    process.send_signal(number)
    printed, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert printed == "" and err == f"torchalignprune prune: {message}\n"
    assert list(tmp_path.iterdir()) == []


def test_the_signal_handler_is_given_back(bert: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert run("prune", bert, "--sparsity", 0.5, "--out", tmp_path / "out") == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_in_a_thread(bert: Path, tmp_path: Path) -> None:
    codes: list[int] = []
    arguments = ["prune", str(bert), "--sparsity", "0.5", "--out", str(tmp_path / "out")]
    thread = threading.Thread(target=lambda: codes.append(main(arguments)))
    thread.start()
    thread.join()
    assert codes == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--method aligned-magnitude needs --sparsity"),
        (["--sparsity", "1"], "argument --sparsity: should be from 0 to below 1, got 1"),
        (["--sparsity", "50"], "argument --sparsity: should be from 0 to below 1, got 50"),
        (
            ["--sparsity", ".5", "--seed", str(2**64)],
            "argument --seed: should be an integer from 0",
        ),
        (["--sparsity", "half"], "argument --sparsity: should be from 0 to below 1, got half"),
        (["--sparsity", "nan"], "argument --sparsity: should be from 0 to below 1, got nan"),
        (["--sparsity", ".5", "--method", "best"], "argument --method: invalid choice: 'best'"),
        (["--sparsity", ".5", "--criterion", "wanda"], "--criterion wanda needs --calibration"),
        (
            ["--sparsity", ".5", "--criterion", "lamp", "--method", "random"],
            "--criterion goes with --method magnitude, not random",
        ),
        (
            ["--sparsity", ".5", "--criterion", "lamp", "--calibration", "f"],
            "--calibration goes with --method aligned-magnitude or aligned-nm, with --criterion",
        ),
        (["--sparsity", ".5", "--realign", "weights"], "--realign needs --calibration FILE"),
        (["--sparsity", ".5", "--realign", "both"], "argument --realign: invalid choice: 'both'"),
        (
            ["--sparsity", ".5", "--method", "magnitude", "--units", "in"],
            "--units goes with --method aligned-magnitude, not magnitude",
        ),
        (
            ["--sparsity", ".5", "--alignment", "frobenius", "--units", "in"],
            "--units does not go with --alignment frobenius, unless --budget is unit",
        ),
        (["--sparsity", ".5", "--nm", "2:4"], "--nm goes with --method aligned-nm, not aligned"),
        (
            ["--method", "aligned-nm", "--sparsity", ".5"],
            "--sparsity does not go with --method aligned-nm",
        ),
        (
            ["--method", "aligned-nm", "--nm", "4:2"],
            "argument --nm: should be N:M with 0 < N < M, such as 2:4, got 4:2",
        ),
        (["--method", "aligned-nm", "--nm", "3:5"], "should be a multiple of m=5"),
        (["--sparsity", ".5", "--calibration", "/no/such"], "/no/such cannot be read"),
        (["--sparsity", ".5", "--include", "layers.0"], "include pattern 'layers.0' matches no"),
        (["--sparsity", ".5", "--exclude", "encoder"], "nothing to prune in BertModel"),
    ],
)
def test_wrong_usage(
    arguments: list[str],
    message: str,
    bert: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("prune", bert, *arguments, "--out", tmp_path / "out") == 2
    printed, err = capsys.readouterr()
    assert printed == ""
    assert err.startswith("torchalignprune prune: error: ") and message in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


def lose_an_encoder_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def make_integers(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    whole = {name: tensor.to(torch.int8) for name, tensor in weights.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})


def make_nan(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.0.output.dense.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def make_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "is not a checkpoint folder: it has no config.json"),
        (make_a_file, "is not a checkpoint folder: it has no config.json"),
        (drop("config.json"), "is not a checkpoint folder: it has no config.json"),
        (drop("model.safetensors"), "has neither model.safetensors nor model.safetensors.index"),
        (write("config.json", "{"), "config.json is not JSON"),
        (write("config.json", "[]"), "config.json should be a JSON object, got []"),
        (write("modules.json", '{"a": 1}'), "modules.json should be a list of modules with"),
        (write("model.safetensors", "nonsense"), "model.safetensors cannot be read"),
        (edit_config(model_type="no-such", architectures=None), "transformers cannot load"),
        (
            edit_config(model_type="own", architectures=["Own"], auto_map={"AutoConfig": "own.C"}),
            "contains custom code which must be executed",
        ),
        (edit_config(hidden_size=32), "LayerNorm.bias in"),
        (edit_config(hidden_size=15), "transformers cannot load"),
        (edit_config(quantization_config={"bits": 4}), "is quantized: only float weights"),
        (make_integers, "should be float32, float64, float16 or bfloat16, got no floating"),
        (lose_an_encoder_weight, "has no weights for encoder.layer.1.output.dense.weight"),
        (make_nan, "encoder.layer.0.output.dense.weight"),
    ],
)
def test_bad_checkpoints(
    spoil: Callable[[Path], None],
    message: str,
    bert: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "source"
    shutil.copytree(bert, source)
    spoil(source)
    assert run("prune", source, "--sparsity", 0.5, "--out", tmp_path / "out") == 2
    printed, err = capsys.readouterr()
    assert printed == "" and message in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists() and leftovers(tmp_path) == []
    # Folders that were made for it are gone too.
    assert run("prune", source, "--sparsity", 0.5, "--out", tmp_path / "made" / "out") == 2
    assert not (tmp_path / "made").exists()


def test_bad_calibration(
    bert: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(source: Path, file: Path, *more: str) -> str:
        arguments = ["--sparsity", 0.5, "--calibration", file, "--out", tmp_path / "out", *more]
        assert run("prune", source, *arguments) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and not (tmp_path / "out").exists()
        return err

    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    assert "no sentences in" in refused(bert, empty)
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\xff")
    assert "cannot be read" in refused(bert, binary)
    bare = tmp_path / "bare"
    shutil.copytree(bert, bare)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    assert "--calibration needs the tokenizer of" in refused(bare, text)
    t5 = tmp_path / "t5"
    config = transformers.T5Config(d_model=16, d_ff=32, d_kv=8, num_layers=1)
    config.vocab_size = save_tokenizer(t5)
    transformers.T5ForConditionalGeneration(config).save_pretrained(t5)
    capsys.readouterr()
    message = "with T5ForConditionalGeneration, whose decoder may need text of its own: You must"
    assert message in refused(t5, text)


def test_long_sentences_are_cut(bert: Path, tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text("the " * 500 + "\n")
    arguments = ["--sparsity", 0.5, "--calibration", file, "--out", tmp_path / "out"]
    assert run("prune", bert, *arguments) == 0


def test_a_tokenizer_without_a_padding_token(bert: Path, text: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(bert, source)
    config = json.loads((source / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "special_tokens_map.json").unlink(missing_ok=True)
    assert transformers.AutoTokenizer.from_pretrained(source).pad_token is None
    arguments = ["--sparsity", 0.5, "--calibration", text]
    assert run("prune", source, *arguments, "--out", tmp_path / "out") == 0
    assert run("prune", bert, *arguments, "--out", tmp_path / "padded") == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "padded"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_tokenizer_without_any_token_to_pad_with(
    bert: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(bert, source)
    config = json.loads((source / "tokenizer_config.json").read_text())
    del config["pad_token"], config["unk_token"]
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "special_tokens_map.json").unlink(missing_ok=True)
    assert run("prune", source, "--sparsity", 0.5, "--calibration", text, "--out", out) == 2
    err = capsys.readouterr().err
    assert "--calibration needs a tokenizer that can pad" in err and len(err.splitlines()) == 1
    assert not out.exists()


def test_a_model_without_a_limit_of_positions(text: Path, tmp_path: Path) -> None:
    """XLNet's config says -1."""
    source, out = tmp_path / "source", tmp_path / "out"
    config = transformers.XLNetConfig(
        vocab_size=save_tokenizer(source), d_model=16, n_layer=1, n_head=2, d_inner=32
    )
    assert config.max_position_embeddings == -1
    transformers.XLNetModel(config).save_pretrained(source)
    assert run("prune", source, "--sparsity", 0.5, "--calibration", text, "--out", out) == 0


@pytest.mark.parametrize("place", ["file", "/proc"])
def test_a_place_that_cannot_be_written_to_is_noticed_first(
    place: str,
    bert: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("x")
    if not (tmp_path / place).exists():
        pytest.skip(f"needs {place}")
    monkeypatch.setattr(checkpoints, "load_checkpoint", lambda *_: pytest.fail("loaded first"))
    assert run("prune", bert, "--sparsity", 0.5, "--out", tmp_path / place / "out") == 1
    err = capsys.readouterr().err
    assert f"--out: {tmp_path / place} cannot be written to: " in err
    assert len(err.splitlines()) == 1


def test_a_missing_extra_is_named(
    bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for module, message in (
        ("matplotlib.figure", "pictures need matplotlib"),
        ("transformers", "checkpoints need transformers"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            assert run("prune", bert, "--sparsity", 0.5, "--out", tmp_path / "out") == 1
        err = capsys.readouterr().err
        assert message in err and 'pip install "torchalignprune[transformers]"' in err
        assert list(tmp_path.iterdir()) == []


def test_the_verbosity_of_transformers_is_restored(bert: Path, tmp_path: Path) -> None:
    logging = transformers.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    assert run("prune", bert, "--sparsity", 0.5, "--out", tmp_path / "out") == 0
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["--help"],
        ["prune", "--help"],
        ["report", "--help"],
        ["evaluate", "--help"],
        ["demo", "--help"],
        ["info", "--help"],
    ):
        assert main(arguments) == 0
        printed = capsys.readouterr().out
        assert re.search(r"exit codes:\n  0 .*\n  1 .*\n  2 .*\n  130 ", printed)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"torchalignprune {tap.__version__}\n"
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().err


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert torch.__version__ in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["torch"] == torch.__version__


def test_unexpected_errors_show_where_they_come_from(
    bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(cli.prune, "alignment_report", fail)
    assert run("prune", bert, "--sparsity", 0.5, "--out", tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "AssertionError: a bug" in err
    assert list(tmp_path.iterdir()) == []


def test_running_out_of_memory_is_named(
    bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Python's own ``MemoryError`` has no message."""

    def fail(*arguments: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(cli.prune, "alignment_report", fail)
    assert run("prune", bert, "--sparsity", 0.5, "--out", tmp_path / "out") == 1
    assert capsys.readouterr().err == "torchalignprune prune: error: out of memory\n"


def test_new_folder_appears_at_once(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    with new_folder(out) as partial:
        (partial / "file").write_text("x")
        assert not out.exists() and partial.parent == out.parent
    assert tree(out) == {"file": b"x"} and not partial.exists()


@pytest.mark.parametrize("exchange", [True, False])
def test_new_folder_is_on_the_disk_before_the_former_one_goes(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    (out / "a").mkdir(parents=True)
    if not exchange:
        monkeypatch.setattr(checkpoints, "_exchange", lambda one, other: False)
    events: list[object] = []
    fsync, rmtree = os.fsync, shutil.rmtree

    def flush(opened: int) -> None:
        events.append(os.fstat(opened).st_ino)
        fsync(opened)

    def remove(path: Path, **options: Any) -> None:
        events.append("removed" if path.exists() else "nothing to remove")
        rmtree(path, **options)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(checkpoints.shutil, "rmtree", remove)
    with new_folder(out, overwrite=True) as partial:
        (partial / "a").mkdir()
        for name in ("file", "a/file"):
            (partial / name).write_text("x")
    flushed = [path.stat().st_ino for path in (out / "file", out / "a", out / "a" / "file", out)]
    end = events.index("removed")
    assert set(events[: end - 1]) >= set(flushed)
    assert tmp_path.stat().st_ino in events[:end]


def test_new_folder_does_not_replace_what_came_meanwhile(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OSError), new_folder(out) as partial:
        (partial / "file").write_text("x")
        out.mkdir()
        (out / "theirs").write_text("y")
    assert tree(tmp_path) == {"out/theirs": b"y"}


def test_new_folder_puts_the_former_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    monkeypatch.setattr(checkpoints, "_exchange", lambda one, other: False)
    with pytest.raises(OSError, match="no"), new_folder(out, overwrite=True):
        pass
    assert tree(tmp_path) == {"out/old": b"old"}


def test_new_folder_removes_the_former_one_when_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    rmtree = shutil.rmtree

    def interrupted(path: Path, **options: Any) -> None:
        monkeypatch.setattr(checkpoints.shutil, "rmtree", rmtree)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), new_folder(out, overwrite=True) as partial:
        (partial / "new").write_text("new")
    assert tree(tmp_path) == {"out/new": b"new"} and leftovers(tmp_path) == []


def test_check_output(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    check_output(tmp_path / "new" / "deep", source, overwrite=False)
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", source, overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="exists and is not a folder"):
        check_output(tmp_path / "file", source, overwrite=True)


def test_check_output_refuses_what_cannot_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(ValueError, match="out is the current folder, which cannot be replaced"):
        check_output(Path("."), tmp_path / "source", overwrite=True)
