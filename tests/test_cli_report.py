"""``torchalignprune report`` on tiny checkpoints, and on one larger than the memory it may take."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune

import reference as twin
import torchalignprune as tap
from test_alignment_report import KEYS, check
from test_cli import make_bert, run, tree
from test_weight_files import shard
from torchalignprune.cli import main
from torchalignprune.parameters import prunable_parameters


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert(tmp_path_factory.mktemp("dense") / "tiny-bert")


@pytest.fixture(scope="session")
def pruned(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "tiny-bert-70"
    assert run("prune", dense, "--sparsity", 0.7, "--out", out) == 0
    return out


def report_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert run("report", *arguments, "--json") == 0
    printed, err = capsys.readouterr()
    assert err == ""
    found: dict[str, Any] = json.loads(printed)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert run("report", *arguments) == 2
    printed, err = capsys.readouterr()
    assert printed == "" and err.startswith("torchalignprune report: error: ")
    return err


def by_twin(dense: Path, pruned: Path, name: str) -> dict[str, Any]:
    r, p = (load_file(folder / "model.safetensors")[name] for folder in (dense, pruned))
    return twin.alignment_report(p, r)


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """The last bits depend on where a tensor lies in memory."""
    for own, other in zip(found, expected, strict=True):
        assert list(own) == list(other)
        check(own, other)


def copy_of(source: Path, folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """A checkpoint folder with the same config and other weights."""
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_report(dense: Path, pruned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(dense), tree(pruned)
    found = report_of(capsys, dense, pruned)
    assert (tree(dense), tree(pruned)) == before
    assert [layer["name"] for layer in found["layers"]] == [
        name
        for name in prunable_parameters(transformers.BertModel.from_pretrained(dense)).names
        if "encoder" in name
    ]
    for layer in found["layers"]:
        assert list(layer) == KEYS
        check(layer, by_twin(dense, pruned, layer["name"]))
    model = transformers.BertModel.from_pretrained(pruned)
    params = prunable_parameters(model)
    captured = tap.Reference.from_checkpoint(dense, params)
    same = tap.alignment_report(params, captured)
    assert_same([*found["layers"], found["totals"]], [*same, same.totals])
    assert found["left_out"] == params.left_out
    assert found["dense"] == str(dense) and found["pruned"] == str(pruned)
    assert found["command"].startswith("torchalignprune report ")
    assert found["versions"]["torch"] == torch.__version__ and found["seconds"] > 0
    # It agrees with what prune wrote beside the weights.
    written = json.loads((pruned / "report.json").read_text())
    assert all(layer["moved_share"] is None for layer in written["layers"])
    without = [layer | {"moved_share": None} for layer in found["layers"]]
    assert_same(written["layers"], without)


def test_the_table(dense: Path, pruned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", dense, pruned) == 0
    printed, err = capsys.readouterr()
    assert err == "" and "\x1b" not in printed
    header, *lines = printed.splitlines()
    assert header.split()[:3] == ["parameter", "sparsity", "mean"]
    assert lines[0].startswith("encoder.layer.0.attention.self.query.weight ")
    assert sum(line.startswith("encoder.layer.") for line in lines) == 12
    (total,) = (line.split() for line in lines if line.startswith("all "))
    assert total[1] == "70.0%"
    assert "moved: output units closer to another dense unit" in printed
    assert run("report", dense, pruned, "--no-matching") == 0
    printed = capsys.readouterr().out
    assert "moved:" not in printed and printed.splitlines()[1].split()[-1] == "-"


def test_the_table_on_a_terminal(
    dense: Path, pruned: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "150")
    assert run("report", dense, pruned) == 0
    printed = capsys.readouterr().out
    assert "\x1b[1m" in printed and "encoder.layer.0.attention.self.query.weight" in printed
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert run("report", dense, pruned) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_files(
    dense: Path, pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "made" / name for name in ("r.json", "r.png", "r.svg", "r.pdf")]
    found = report_of(capsys, dense, pruned, "--out", *files)
    assert json.loads(files[0].read_text()) == found
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert "tiny-bert-70 against tiny-bert" in files[2].read_text()
    assert files[3].read_bytes().startswith(b"%PDF")
    assert run("report", dense, pruned, "--out", files[0]) == 0
    assert f"written: {files[0]}" in capsys.readouterr().out


def test_files_are_replaced_together(
    dense: Path,
    pruned: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = [tmp_path / name for name in ("r.json", "r.png")]
    for file in files:
        file.write_text("former")

    def full(self: object, path: Path, title: str) -> None:
        path.write_text("half of")
        raise OSError("no space left on device")

    monkeypatch.setattr(tap.AlignmentReport, "plot", full)
    assert run("report", dense, pruned, "--out", *files) == 1
    assert capsys.readouterr().err == "torchalignprune report: error: no space left on device\n"
    assert tree(tmp_path) == {"r.json": b"former", "r.png": b"former"}
    # Of folders that were made for them nothing is left.
    assert run("report", dense, pruned, "--out", tmp_path / "made" / "deep" / "r.png") == 1
    assert not (tmp_path / "made").exists()


def test_include_and_exclude(dense: Path, pruned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = report_of(capsys, dense, pruned, "--include", "encoder.layer.1", "--exclude", "*.query")
    assert len(some["layers"]) == 5
    (pooler,) = report_of(capsys, dense, pruned, "--include", "pooler")["layers"]
    assert pooler["name"] == "pooler.dense.weight" and pooler["distortion"] == 0
    assert pooler["mean_alignment"] == pytest.approx(1)
    err = refused(capsys, dense, pruned, "--include", "layers.0")
    assert "include pattern 'layers.0' matches no" in err and len(err.splitlines()) == 1


def test_shards_and_dtypes(
    dense: Path, pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(pruned / "model.safetensors")
    half = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    names = sorted(half)
    folder = shard(tmp_path / "x", [{name: half[name] for name in names[i::3]} for i in range(3)])
    (folder / "config.json").write_bytes((pruned / "config.json").read_bytes())
    expected = load_file(dense / "model.safetensors")
    for layer in report_of(capsys, dense, folder)["layers"]:
        name = layer["name"]
        check(layer, twin.alignment_report(half[name], expected[name]))
    for layer in report_of(capsys, folder, dense)["layers"]:
        assert layer["sparsity"] == 0


@pytest.mark.parametrize("masked", [torch.bool, torch.float32])
def test_masks(
    masked: torch.dtype,
    dense: Path,
    pruned: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The state of a model whose pruning was not made permanent."""
    model = transformers.BertModel.from_pretrained(dense)
    params = prunable_parameters(model)
    if masked == torch.bool:
        tap.global_unstructured(params, tap.AlignedMagnitude, amount=0.7)
    else:
        prune.global_unstructured(params, pruning_method=tap.AlignedMagnitude, amount=0.7)
    state = {
        name: tensor.to(masked) if name.endswith("_mask") else tensor
        for name, tensor in model.state_dict().items()
    }
    assert "encoder.layer.0.output.dense.weight_mask" in state
    folder = copy_of(dense, tmp_path / "masked", state)
    found = report_of(capsys, dense, folder)
    assert_same(found["layers"], report_of(capsys, dense, pruned)["layers"])
    # The weights under the masks are the dense ones.
    assert_same(report_of(capsys, folder, folder)["layers"], found["layers"])


def test_dead_and_zero_units(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "encoder.layer.0.intermediate.dense.weight"
    r = load_file(dense / "model.safetensors")
    r[name][3] = 0
    p = {key: tensor.clone() for key, tensor in r.items()}
    p[name][[3, 5, 7]] = 0
    p[name][:, 2] = 0
    folders = [copy_of(dense, tmp_path / k, w) for k, w in (("r", r), ("p", p))]
    (layer,) = report_of(capsys, *folders, "--include", name)["layers"]
    assert (layer["dead_units_out"], layer["dead_units_in"]) == (2, 1)
    check(layer, twin.alignment_report(p[name], r[name]))


def test_a_task_model_and_its_base_model(
    dense: Path, pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = transformers.BertForSequenceClassification.from_pretrained(pruned)
    task.save_pretrained(tmp_path / "task")
    base = report_of(capsys, dense, pruned)["layers"]
    found = report_of(capsys, dense, tmp_path / "task")["layers"]
    assert_same(found, [layer | {"name": f"bert.{layer['name']}"} for layer in base])
    zeros = report_of(capsys, tmp_path / "task", pruned)["layers"]
    assert all(layer["distortion"] == 0 for layer in zeros)
    err = refused(capsys, dense, tmp_path / "task", "--include", "classifier", "--include", "bert")
    assert "does not fit 1 of" in err and "\n  classifier.weight: missing" in err


@pytest.mark.parametrize("kind", ["gpt2", "t5", "llama", "xlm-roberta", "distilbert", "vit"])
def test_other_architectures(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, include = {
        "gpt2": (transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20), None),
        "t5": (
            transformers.T5Config(
                d_model=8, d_ff=16, d_kv=4, num_layers=2, num_heads=2, vocab_size=20
            ),
            "shared",
        ),
        "llama": (
            transformers.LlamaConfig(
                hidden_size=8,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                vocab_size=20,
                tie_word_embeddings=True,
            ),
            "lm_head",
        ),
        "xlm-roberta": (
            transformers.XLMRobertaConfig(
                hidden_size=8,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                vocab_size=20,
            ),
            None,
        ),
        "vit": (
            transformers.ViTConfig(
                hidden_size=8,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=28,
                patch_size=14,
            ),
            None,
        ),
        "distilbert": (
            transformers.DistilBertConfig(
                dim=8, hidden_dim=16, n_layers=2, n_heads=2, vocab_size=20
            ),
            None,
        ),
    }[kind]
    auto = {
        "t5": transformers.AutoModelForSeq2SeqLM,
        "llama": transformers.AutoModelForCausalLM,
        "gpt2": transformers.AutoModelForCausalLM,
        "vit": transformers.AutoModelForImageClassification,
    }.get(kind, transformers.AutoModelForMaskedLM)
    model = auto.from_config(config)
    model.save_pretrained(tmp_path / "dense")
    params = prunable_parameters(model)
    reference = tap.Reference.capture(params)
    tap.global_unstructured(params, tap.AlignedMagnitude, amount=0.5)
    expected = tap.alignment_report(params, reference)
    for pair in params:
        prune.remove(*pair)
    model.save_pretrained(tmp_path / "pruned")
    found = report_of(capsys, tmp_path / "dense", tmp_path / "pruned")
    assert_same([*found["layers"], found["totals"]], [*expected, expected.totals])
    if include:  # tied: in the checkpoint once, under whichever name
        arguments = [tmp_path / "dense", tmp_path / "pruned", "--include", include]
        tied = report_of(capsys, *arguments)["layers"]
        assert len(tied) > 1 and tied[0]["tied_to"] is None
        assert {layer["tied_to"] for layer in tied[1:]} == {tied[0]["name"]}


def test_differences_are_listed(
    dense: Path, pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(dense / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    weights["encoder.layer.0.output.dense.weight"] = torch.ones(16, 31)
    other = copy_of(dense, tmp_path / "other", weights)
    for arguments in ((other, pruned), (dense, other)):
        lines = refused(capsys, *arguments).splitlines()
        assert lines[0].endswith(f"{other} does not fit 2 of 12 parameters:")
        shapes = "should have shape (16, 32), got (16, 31)"
        assert lines[1] == f"  encoder.layer.0.output.dense.weight: {shapes}"
        assert lines[2].startswith("  encoder.layer.1.output.dense.weight: missing")
        assert len(lines) == 3


def test_bad_input(
    dense: Path, pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def one_line(*arguments: object) -> str:
        err = refused(capsys, *arguments)
        assert len(err.splitlines()) == 1
        return err

    assert "none is not a checkpoint folder: it has no config.json" in one_line(dense, "none")
    assert "none does not exist" in one_line("none", pruned)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has neither model.safetensors nor" in one_line(empty, pruned)
    (empty / "config.json").write_text(json.dumps({"model_type": "no-such"}))
    assert "transformers cannot load" in one_line(dense, empty)
    (empty / "config.json").write_text(json.dumps({"quantization_config": {}}))
    assert "is quantized" in one_line(dense, empty)
    weights = load_file(pruned / "model.safetensors")
    weights["encoder.layer.0.output.dense.weight"][0, 0] = torch.nan
    bad = copy_of(pruned, tmp_path / "nan", weights)
    name = "encoder.layer.0.output.dense.weight"
    assert f"the weights of {name} should be finite numbers, got NaN" in one_line(dense, bad)
    assert f"the reference of {name} should be finite numbers, got NaN" in one_line(bad, pruned)
    assert "--out: should end in .json, .png, .pdf, .svg, got x.txt" in one_line(
        dense, pruned, "--out", "x.txt"
    )
    (tmp_path / "x.json").mkdir()
    assert "should be a file, got the folder" in one_line(
        dense, pruned, "--out", tmp_path / "x.json"
    )
    assert main(["report", str(dense)]) == 2
    assert "PRUNED" in capsys.readouterr().err


def test_a_missing_extra_is_named(
    dense: Path,
    pruned: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run("report", dense, pruned, "--out", tmp_path / "x.png") == 1
    printed, err = capsys.readouterr()
    assert printed == "" and "pictures need matplotlib" in err and len(err.splitlines()) == 1
    assert run("report", dense, pruned, "--out", tmp_path / "x.json") == 0


PEAK = """
import sys
from pathlib import Path
import transformers
from torchalignprune.cli import main
from torchalignprune.checkpoints import empty_model

def peak():  # resident memory in bytes, with the pages of mapped files
    status = Path("/proc/self/status").read_text().split()
    return 1024 * int(status[status.index("VmHWM:") + 1])

empty_model(Path(sys.argv[2]))  # brings in what transformers needs
Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
before = peak()
code = main(["report", *sys.argv[1:], "--json", "--no-matching"])
print(peak() - before, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/clear_refs")
def test_the_models_are_never_in_memory(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_hidden_layers=4,
        vocab_size=16,
        architectures=["BertModel"],
    )
    with torch.device("meta"):
        model = transformers.BertModel(config)
    sizes = {}
    for kind in ("dense", "pruned"):
        weights = {name: torch.ones(w.shape) for name, w in model.state_dict().items()}
        if kind == "pruned":
            for weight in weights.values():
                weight.flatten()[::2] = 0
        (tmp_path / kind).mkdir()
        config.save_pretrained(tmp_path / kind)
        save_file(weights, tmp_path / kind / "model.safetensors", metadata={"format": "pt"})
        sizes[kind] = sum(weight.nbytes for weight in weights.values())
        del weights
    assert sizes["dense"] > 200e6
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "dense"), str(tmp_path / "pruned")],
        check=True,
        capture_output=True,
        text=True,
    )
    found = json.loads(done.stdout)
    assert found["totals"]["sparsity"] == 0.5
    assert found["totals"]["mean_alignment"] == pytest.approx(0.5**0.5)
    # Two of the largest matrices take 34 MB, next to some buffers.
    assert int(done.stderr.splitlines()[-1]) < 100e6


def test_outputs_may_be_links(
    dense: Path, pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The format is that of the name that was given, and the file keeps its permissions."""
    (tmp_path / "store").mkdir()
    places = [tmp_path / "store" / "blob", tmp_path / "store" / ("long" * 60)]
    links = [tmp_path / "r.json", tmp_path / "r.png"]
    for link, place in zip(links, places, strict=True):
        place.write_text("former")
        place.chmod(0o600)
        link.symlink_to(place)
    report_of(capsys, dense, pruned, "--out", *links)
    assert json.loads(places[0].read_text())["layers"]
    assert places[1].read_bytes().startswith(b"\x89PNG")
    for link, place in zip(links, places, strict=True):
        assert link.is_symlink() and place.stat().st_mode & 0o777 == 0o600
