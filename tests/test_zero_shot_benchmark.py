"""The grid of benchmarks/zero_shot.py: its statistics, going on after a kill, and its page."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from test_crosslingual_readers import write
from tiny_xlmr import SENTENCES, wordpiece, xlmr
from torchalignprune.crosslingual.experiment import Experiment

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")


@pytest.fixture(autouse=True)
def path() -> Iterator[None]:
    sys.path.append(BENCHMARKS)
    yield
    sys.path.remove(BENCHMARKS)


# Statistics


def test_holm() -> None:
    from zero_shot_statistics import holm

    assert holm([]) == []
    assert holm([0.2]) == [0.2]
    # Holm's steps by hand: 4 * 0.005, 3 * 0.01, 2 * 0.03, 1 * 0.04 which may not fall.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_a_difference_over_seeds_alone_is_students() -> None:
    from zero_shot_statistics import difference

    values = [0.01, 0.03, 0.02, 0.05, 0.04]
    draws = np.repeat(np.array(values)[:, None], 100, axis=1)  # as if sentences did not matter
    found = difference(values, draws, sentences=200)
    expected = stats.ttest_1samp(values, 0)
    interval = expected.confidence_interval(0.95)
    assert found.value == pytest.approx(0.03) and found.seeds == 5
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_a_difference_over_sentences_and_both() -> None:
    from zero_shot_statistics import difference

    draws = np.random.default_rng(0).normal(0.02, 0.01, (1, 20000))
    alone = difference([0.02], draws, sentences=10001)
    assert alone.half == pytest.approx(1.96 * 0.01, rel=0.02) and alone.seeds == 1
    assert alone.p == 1.0
    # Two variances: of five seeds (0.00025 / 5 = 0.00005), and of the sentences (0.0001).
    values = [0.01, 0.03, 0.02, 0.05, 0.04]
    both = difference(values, np.repeat(draws, 5, axis=0), sentences=10001)
    error = (0.00005 + 0.0001) ** 0.5
    freedom = 0.00015**2 / (0.00005**2 / 4 + 0.0001**2 / 10000)
    assert both.half == pytest.approx(stats.t.ppf(0.975, freedom) * error, rel=0.02)
    same = difference([0.0, 0.0], np.zeros((2, 10)), sentences=5)
    assert (same.value, same.half, same.p) == (0.0, 0.0, 1.0)
    assert difference([0.1, 0.1], np.full((2, 10), 0.1), sentences=5).p == 0.0


def test_friedman() -> None:
    from zero_shot_statistics import friedman

    blocks = np.array([[1.0, 2.0, 3.0], [1.5, 2.5, 3.5], [1.0, 2.2, 2.9], [0.5, 2.0, 4.0]])
    # Ranks 1, 2, 3 in all four: chi squared 8 with 2 degrees of freedom.
    assert friedman(blocks) == pytest.approx(np.exp(-4))
    assert friedman(np.zeros((4, 3))) == 1.0
    assert friedman(blocks[:2]) is None and friedman(blocks[:, :2]) is None


def test_friedman_takes_rounded_off_digits_for_ties() -> None:
    from zero_shot_statistics import friedman

    # 0.1 + 0.2 is 0.30000000000000004: a tie that the last digit would break, the same way always.
    blocks = np.array([[0.3, 0.1 + 0.2, 0.5], [0.5, 0.3, 0.3], [0.3, 0.1 + 0.2, 0.4]])
    tied = np.array([[0.3, 0.3, 0.5], [0.5, 0.3, 0.3], [0.3, 0.3, 0.4]])
    assert friedman(blocks) == friedman(tied)
    assert friedman(np.array([[0.3, 0.1 + 0.2, 0.3]] * 4)) == 1.0


def tags_lost(seed: int) -> tuple[Any, Any]:
    """Hits lost, the mean of five seeds, by sentences that differ much and languages that do not.

    Languages differ in how many words they take, and two of them are kin: what one loses in a
    sentence the other mostly loses too.
    """
    generator = np.random.default_rng(seed)
    out_of = generator.integers(5, 30, 100) * np.array([[0.8], [1.0], [1.2], [1.0]])
    out_of = np.maximum(1, out_of.round()).astype(np.int64)
    hard = generator.gamma(0.5, 0.2, (4, 100)).clip(max=1)
    hard[1] = np.where(generator.random(100) < 0.7, hard[0], hard[1])
    # Seeds have all of the sentences' differences in common.
    lost = generator.binomial(out_of, hard, (5, 4, 100))
    return lost, out_of


def test_sentences_alone_make_no_difference_between_languages() -> None:
    from zero_shot_statistics import friedman, sentence_test

    of_sentences, of_seeds = [], []
    for draw in range(200):
        lost, out_of = tags_lost(draw)
        of_sentences.append(sentence_test(lost.mean(axis=0), out_of, flips=199))
        of_seeds.append(friedman(lost.sum(axis=2) / out_of.sum(axis=1)))
    assert 0.02 <= np.mean(np.array(of_sentences) <= 0.05) <= 0.09
    assert 0.3 <= np.mean(np.array(of_sentences) <= 0.5) <= 0.7
    # Why it takes the test over sentences: that over seeds finds a difference nearly always.
    assert np.mean(np.array(of_seeds) < 0.05) > 0.5


def test_permuted_languages_make_no_difference() -> None:
    """Texts, of which each language gets some wrong; which language is which is drawn."""
    from zero_shot_statistics import sentence_test

    generator = np.random.default_rng(0)
    lost = generator.choice([-0.4, 0.0, 0.0, 0.2, 1.0], (6, 200)) * (generator.random(200) < 0.5)
    found = []
    for _ in range(300):
        permuted = generator.permuted(lost, axis=0)
        found.append(sentence_test(permuted, np.ones((6, 200), np.int64), flips=199))
    assert 0.02 <= np.mean(np.array(found) <= 0.05) <= 0.09


def test_a_language_that_loses_more_is_found() -> None:
    from zero_shot_statistics import sentence_test

    lost, out_of = tags_lost(0)
    more = lost.mean(axis=0)
    more[2] += 0.15 * out_of[2]
    assert sentence_test(more, out_of) == 1 / 10001
    assert sentence_test(more, out_of, flips=99) == 1 / 100
    # Drops that are equal in points, of whatever lengths, are no difference at all.
    assert sentence_test(0.2 * out_of, out_of) == 1.0
    assert sentence_test(np.zeros((4, 100)), out_of) == 1.0


def test_lines_that_say_the_same() -> None:
    from zero_shot_statistics import distinct

    strength = {"kind": "strength", "settings_id": "a", "regularizer": "cosine", "strength": 1.0}
    tuning = {"kind": "tuning", "settings_id": "a", "method": "aligned", "regularizer": "cosine"}
    tuning |= {"strength": 1.0, "seed": 1000}
    run = {"kind": "run", "settings_id": "a", "method": "aligned", "regularizer": "none", "seed": 0}
    settings = {"kind": "settings", "settings_id": "a"}
    lines = [settings, strength, tuning, run]
    again = [line | {"seconds": 1.0} for line in lines] + [strength | {"strength": 10.0}]
    other = [line | {"settings_id": "b"} for line in lines]
    other += [tuning | {"strength": 10.0}, tuning | {"seed": 1001}, run | {"seed": 1}]
    assert distinct([*lines, *again, *other]) == [*lines, *other]


def test_packed_counts_come_back() -> None:
    from zero_shot_statistics import pack, unpack

    misses = np.random.default_rng(0).integers(0, 256, (7, 4, 50))
    before = misses.copy()
    assert (unpack(pack(misses), misses.shape) == misses).all() and (misses == before).all()
    slow = np.cumsum(np.random.default_rng(0).random((7, 12, 300)) < 0.1, axis=0)
    assert len(pack(slow)) < slow.size / 6
    with pytest.raises(ValueError, match="misses should be from 0 to 255, got up to 256"):
        pack(np.full((1, 1, 1), 256))


def test_figures_of_scores() -> None:
    """Three languages before and after, of which English is the first."""
    from zero_shot_statistics import Results

    settings = next(made_up({})) | {"chance": {"en": 0.2, "de": 0.2, "fi": 0.3, "zh": 0.3}}
    results = Results(settings, [])
    dense = np.array([[0.9, 0.6, 0.5, 0.4], [0.9, 0.21, 0.32, 0.3]])
    pruned = np.array([[0.8, 0.5, 0.3, 0.3], [0.55, 0.2, 0.3, 0.3]])
    assert results.zero_shot(dense) == pytest.approx([0.5, 0.83 / 3])
    # (0.1 + 0.2 + 0.1) / 3 - 0.1, and (0.01 + 0.02 + 0) / 3 - 0.35
    assert results.excess(dense, pruned) == pytest.approx([0.1 / 3, -0.34])
    # 0.4 of 0.4 + 0.2 + 0.1 above chance, and 0.1 of 0.7; of less than 0.05 as if it were that
    assert results.relative_excess(dense, pruned) == pytest.approx(
        [0.4 / 0.7 - 0.1 / 0.7, 0.01 / 0.05 - 0.5]
    )


# The page


LANGUAGES = ["en", "de", "fi", "zh"]
SENTENCES_EACH, WORDS = 60, 10
SPARSITIES = [0.5, 0.9]


def made_up(
    drops: dict[tuple[str, str], dict[str, float]], seeds: int = 5
) -> Iterator[dict[str, Any]]:
    """Lines of runs in which each language loses so many points at 90%, and half at 50%."""
    from zero_shot_statistics import pack

    yield {
        "kind": "settings",
        "settings_id": "a",
        "settings": {
            "task": "pos",
            "evaluated": "pud",
            "languages": LANGUAGES,
            "sentences": dict.fromkeys(LANGUAGES, SENTENCES_EACH),
            "sparsities": SPARSITIES,
            "model": "abc",
            "training": {
                "epochs": 1.0,
                "retraining_epochs": 0.5,
                "batch_size": 32,
                "learning_rate": 5e-4,
                "head_learning_rate": 1e-3,
            },
        },
        "machine": {"cpu": "a CPU", "torch": "2"},
        "chance": dict.fromkeys(LANGUAGES, 0.2),
        "out_of": dict.fromkeys(LANGUAGES, " ".join([str(WORDS)] * SENTENCES_EACH)),
    }
    for (method, regularizer), lost in drops.items():
        for seed in range(seeds):
            generator = np.random.default_rng(seed)
            dense = generator.random((len(LANGUAGES), SENTENCES_EACH, WORDS))
            wrong = []
            for share in (0, 0.5, 1):
                bounds = [0.1 + 0.1 * (i > 0) + share * lost[c] for i, c in enumerate(LANGUAGES)]
                wrong.append((dense < np.array(bounds)[:, None, None]).sum(axis=2))
            yield {
                "kind": "run",
                "settings_id": "a",
                "method": method,
                "regularizer": regularizer,
                "seed": seed,
                "strength": 0.0,
                "misses": pack(np.array(wrong)),
                "cpu": f"processor {seed % 2}",
                "seconds": 30.0,
            }


def languages(english: float, *others: float) -> dict[str, float]:
    return dict(zip(LANGUAGES, (english, *others), strict=True))


def test_the_page_finds_what_is_there() -> None:
    from zero_shot_page import page

    lines = [
        *made_up(
            {
                ("dense", "none"): languages(0, 0, 0, 0),
                ("magnitude", "none"): languages(0.1, 0.2, 0.4, 0.6),
                ("magnitude", "cosine"): languages(0.1, 0.1, 0.2, 0.3),
                ("magnitude", "frobenius"): languages(0.1, 0.3, 0.5, 0.7),
                ("magnitude", "both"): languages(0.1, 0.2, 0.4, 0.6),
                ("lamp", "none"): languages(0.1, 0.2, 0.3, 0.4),
            }
        )
    ]
    found = page(lines)
    assert "**30 of the 300 runs of the grid are in**" in found
    first, second, third = (found.split(f"### {i}. ")[1] for i in (1, 2, 3))
    assert "holds: of 4 settings (method and sparsity) 4 are significant for it, 0 against" in first
    assert "is not shown: of 6 settings (method and sparsity) 2 are significant for it, 2" in second
    assert "Helped significantly at some sparsity: magnitude + cosine." in second
    assert "Hurt significantly at some sparsity: magnitude + frobenius." in second
    assert "at any sparsity: magnitude + frobenius; magnitude + both." in second
    assert "holds: of 4 settings" in third
    # zero-shot (0.2 + 0.4 + 0.6) / 3 against English 0.1, at 90% and at half of it, in points
    row = next(line for line in first.splitlines() if line.startswith("| magnitude | 5 |"))
    cells = [float(cell.split("±")[0].strip(" *")) for cell in row.split("|")[3:5]]
    assert cells == pytest.approx([15, 30], abs=2)
    rows = [line.split(" | ")[0] for line in third.splitlines() if line[:4] in languages_rows()]
    assert rows[:4] == ["| en", "| zh", "| fi", "| de"]
    assert "Not significantly better at any sparsity: none." in found


def test_calibration_texts_are_compared() -> None:
    from zero_shot_page import page

    title = "### Calibration text: many languages against English"
    drops = {
        ("wanda-en", "none"): languages(0.1, 0.1, 0.1, 0.1),
        ("wanda-multi", "none"): languages(0.1, 0.4, 0.4, 0.4),
        ("aligned-inputs-en", "none"): languages(0.1, 0.4, 0.4, 0.4),
    }
    found = page([*made_up(drops)]).split(title)[1]
    assert "Significantly better: none. Significantly worse: Wanda, multilingual" in found
    assert found.count("| 5 |") == 1
    drops[("aligned-inputs-multi", "none")] = languages(0.1, 0.4, 0.4, 0.25)
    found = page([*made_up(drops)]).split(title)[1]
    assert "Significantly better: aligned, multilingual inputs (50%, 90%). " in found
    assert "Significantly worse: Wanda, multilingual inputs (50%, 90%)." in found
    row = next(line for line in found.splitlines() if line.startswith("| aligned, multiling"))
    # 15 points in one of three languages; half of it at 50%.
    cells = [float(cell.split("±")[0].strip(" *")) for cell in row.split("|")[3:5]]
    assert cells == pytest.approx([2.5, 5.0], abs=0.5)
    assert title not in page([*made_up({("wanda-en", "none"): languages(0, 0, 0, 0)})])


def test_what_is_corrected_together() -> None:
    """Neither rows of the dense model nor those of a single seed make others harder to show."""
    from zero_shot_page import Cell, _corrected
    from zero_shot_statistics import Difference

    def stages(p: float, seeds: int = 5) -> list[Difference]:
        return [Difference(0.0, 0.0, 1.0, seeds), Difference(0.1, 0.1, p, seeds)]

    pruned, dense = ("magnitude", "cosine"), ("dense", "cosine")
    found = _corrected(
        {
            dense: stages(0.03),
            pruned: stages(0.02),
            ("lamp", "cosine"): stages(0.02),
            ("taylor", "cosine"): stages(1.0, seeds=1),
            ("movement", "cosine"): None,
        }
    )
    assert list(found) == [dense, pruned, ("lamp", "cosine"), ("taylor", "cosine")]
    assert [cells[0].p for cells in found.values()] == pytest.approx([0.03, 0.04, 0.04, 1.0])
    assert [cells[0].sign for cells in found.values()] == [1, 1, 1, 0]
    assert not Cell(stages(0.0, seeds=1)[1], 0.0).tested


def test_a_single_seed_is_no_setting_of_a_claim() -> None:
    from zero_shot_page import page

    drops = {
        ("dense", "none"): languages(0, 0, 0, 0),
        ("magnitude", "none"): languages(0.1, 0.2, 0.4, 0.6),
        ("magnitude", "cosine"): languages(0.1, 0.1, 0.2, 0.3),
        ("dense", "cosine"): languages(0, 0.1, 0.1, 0.1),
    }
    more = [*made_up({("lamp", "none"): languages(0.1, 0.1, 0.1, 0.1)}, seeds=1)][1:]
    more += [*made_up({("lamp", "cosine"): languages(0.1, 0.5, 0.5, 0.5)}, seeds=1)][1:]
    found = page([*made_up(drops), *more])
    first, second, _ = (found.split(f"### {i}. ")[1] for i in (1, 2, 3))
    assert "holds: of 2 settings (method and sparsity) 2 are significant for it, 0" in first
    assert "holds: of 2 settings (method and sparsity) 2 are significant for it, 0" in second
    assert "Has run with one seed, and is not tested: LAMP + cosine." in second
    assert "| LAMP + cosine | 1 |" in second and "| dense + cosine | 5 | **-5." in second
    against = found.split("### Methods against magnitude")[1].split("###")[0]
    assert "Not significantly better at any sparsity: none. Significantly worse" in against
    assert "Has run with one seed, and is not tested: LAMP." in against


def test_languages_that_drop_alike_but_for_these_sentences() -> None:
    """Every seed has the same sentences wrong, which are others in each language."""
    from zero_shot_page import page
    from zero_shot_statistics import pack, unpack

    lines = [*made_up({("dense", "none"): languages(0, 0, 0, 0)})]
    generator = np.random.default_rng(1)
    wrong = 5 * (generator.random((4, SENTENCES_EACH)) < [[0.3], [0.28], [0.3], [0.32]])
    for line in lines[1:]:
        misses = unpack(line["misses"], (3, 4, SENTENCES_EACH)) // 2
        line["misses"] = pack(misses)
        misses[1:] += wrong
        lines.append(line | {"method": "magnitude", "misses": pack(misses)})
    third = page(lines).split("### 3. ")[1]
    assert "is not shown: of 2 settings (method and sparsity) 0 are significant" in third
    assert "No difference between languages was shown with magnitude (50%, 90%)." in third


def languages_rows() -> set[str]:
    return {f"| {code}" for code in LANGUAGES}


def test_the_page_says_when_a_claim_does_not_hold() -> None:
    from zero_shot_page import page

    lines = [
        *made_up(
            {
                ("dense", "none"): languages(0, 0, 0, 0),
                ("magnitude", "none"): languages(0.4, 0.1, 0.1, 0.1),
                ("magnitude", "cosine"): languages(0.4, 0.1, 0.1, 0.1),
            }
        )
    ]
    found = page(lines)
    first, second, _ = (found.split(f"### {i}. ")[1] for i in (1, 2, 3))
    assert "is not shown: of 2 settings (method and sparsity) 0 are significant for it, 2" in first
    assert "English loses significantly more points at some sparsity with magnitude." in first
    assert "Helped significantly at some sparsity: none." in second


def test_the_page_of_few_runs() -> None:
    from zero_shot_page import page

    assert page([]).rstrip().endswith("There are no runs yet.")
    drops = {("magnitude", "none"): languages(0.1, 0.2, 0.2, 0.2)}
    lines = [*made_up(drops, seeds=1)]
    found = page(lines)
    assert "**1 of the 300 runs of the grid are in**" in found
    assert found.count("Not tested yet") == 3 and "No strength of a regularizer" in found
    assert "| magnitude (1) | English |" in found
    assert "on processor 0.\n" in found
    # One seed of both: intervals over sentences, no test between languages.
    drops |= {("dense", "none"): languages(0, 0, 0, 0)}
    found = page([*made_up(drops, seeds=1)])
    assert "| magnitude | 1 |" in found and found.count("Not tested yet") == 2
    assert "on processor 0, processor 1.\nRuns of one seed on different" in page(
        [*made_up(drops, seeds=2)]
    )
    # Runs of other settings are left out, and said to be.
    other = [line | {"settings_id": "b"} for line in made_up(drops, seeds=3)]
    found = page([*other, *lines])
    assert "**1 of the 300" in found and "runs of 1 other settings" in found


def test_the_page_shows_how_strengths_were_chosen() -> None:
    from zero_shot import best_strength, tuning_means
    from zero_shot_page import page

    tuning = [
        {
            "kind": "tuning",
            "settings_id": "a",
            "method": "aligned",
            "regularizer": "cosine" if strength else "none",
            "strength": strength,
            "seed": seed,
            "validation": {"0.0": 0.99, "0.5": score + 0.1 + 0.02 * (seed - 1000), "0.9": score},
            "seconds": 1.0,
        }
        for seed in (1000, 1001)
        for strength, score in ((0.0, 0.9), (1.0, 0.7), (10.0, 0.8), (100.0, 0.8))
    ]
    means = tuning_means(tuning, "cosine")
    assert means == pytest.approx({0.0: 0.955, 1.0: 0.755, 10.0: 0.855, 100.0: 0.855})
    assert best_strength(means) == 10.0
    chosen = {
        "kind": "strength",
        "settings_id": "a",
        "regularizer": "cosine",
        "strength": 10.0,
        "means": {str(strength): mean for strength, mean in means.items()},
    }
    found = page([*made_up({("dense", "none"): languages(0, 0, 0, 0)}), *tuning, chosen])
    assert "| cosine | 95.50 | 75.50 | **85.50** | 85.50 |" in found
    assert "No strength of cosine was better there than no regularizer." in found
    assert "seeds 1000, 1001" in found and "is the lowest or highest" not in found
    assert "in 100 sentences of English validation data" in found
    # A second process that chose too changes nothing.
    again = [line | {"validation": {"0.0": 1.0, "0.5": 1.0}} for line in tuning]
    dense = [*made_up({("dense", "none"): languages(0, 0, 0, 0)})]
    assert page([*dense, *tuning, chosen, *again, chosen, dense[0]]) == found
    told = [line | {"sentences": 40} for line in tuning]
    assert "in 40 sentences of English" in page([*dense, *told, chosen])
    edge = chosen | {"strength": 100.0}
    found = page([*made_up({("dense", "none"): languages(0, 0, 0, 0)}), *tuning, edge])
    assert "The strength chosen for cosine is the lowest or highest that was tried." in found


# The grid


def test_the_order_of_the_runs() -> None:
    from zero_shot import METHODS, phases

    regularizers = ["none", "cosine", "both"]
    parts = phases(METHODS, regularizers, [0, 1])
    keys = [key for part in parts for key in part]
    assert len(keys) == len(set(keys)) == len(METHODS) * 3 * 2
    assert {name for _, name, _ in parts[0]} == {"none"}
    assert {method for method, _, _ in parts[1]} == {"dense", "magnitude", "aligned"}
    assert parts[0][0] == ("dense", "none", 0) and parts[0][-1][2] == 1
    # Runs that share their dense training follow each other.
    assert parts[1][:3] == [(m, "cosine", 0) for m in ("dense", "magnitude", "aligned")]
    assert METHODS[-2:] == ["taylor", "movement"]
    assert [len(part) for part in phases(["lamp"], ["cosine"], [3])] == [0, 0, 1]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for code in ("en", "vi", "ar"):
        words = SENTENCES[code]
        topics = "".join(
            f"{i}\t{('sports', 'travel')[i % 2]}\t{words[i % len(words)]}\n" for i in range(12)
        )
        for split in ("train", "dev", "test"):
            write(tmp_path / "sib200" / f"{split}.{code}.tsv.gz", topics)
    xlmr(("A", "B")).base_model.save_pretrained(tmp_path / "model")
    wordpiece().save_pretrained(tmp_path / "model")
    return tmp_path


def test_the_grid_goes_on(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import zero_shot
    from zero_shot_statistics import unpack

    monkeypatch.setattr(zero_shot, "STRENGTHS", (1.0, 10.0))
    monkeypatch.setattr(zero_shot, "TUNING_SEEDS", (1000,))
    ran = []
    run = Experiment.run

    def counted(self: Experiment, method: str, regularizer: str, *rest: Any, **options: Any) -> Any:
        if len(ran) == 4:
            raise KeyboardInterrupt
        ran.append((method, regularizer, *rest[:2]))
        return run(self, method, regularizer, *rest, **options)

    monkeypatch.setattr(Experiment, "run", counted)
    out = data / "out"
    arguments = ["--data", str(data), "--model", str(data / "model"), "--out", str(out)]
    arguments += ["--tasks", "topics", "--languages", "vi", "ar", "--epochs", "1"]
    arguments += ["--methods", "dense", "magnitude", "--regularizers", "none", "cosine"]
    arguments += ["--seeds", "0"]
    with pytest.raises(KeyboardInterrupt):
        zero_shot.main(arguments)
    with (out / "runs.jsonl").open("a") as file:
        file.write('{"kind": "run", "settings')
    first, ran[:] = ran.copy(), ["from here on", "there is", "no"]
    monkeypatch.setattr(Experiment, "run", lambda *a, **o: ran.append(a[1:5]) or run(*a, **o))
    zero_shot.main(arguments)
    assert first == [
        ("dense", "none", 0.0, 0),
        ("magnitude", "none", 0.0, 0),
        ("aligned", "none", 0.0, 1000),
        ("aligned", "cosine", 1.0, 1000),
    ]
    assert ran[3:4] == [("aligned", "cosine", 10.0, 1000)]
    assert [(method, name) for method, name, _, _ in ran[4:]] == [
        ("dense", "cosine"),
        ("magnitude", "cosine"),
    ]
    lines = [
        json.loads(line)
        for line in (out / "runs.jsonl").read_text().splitlines()
        if line.endswith("}")
    ]
    kinds = [line["kind"] for line in lines]
    assert kinds == ["settings", "run", "run", *["tuning"] * 3, "strength", "run", "run"]
    chosen = lines[6]["strength"]
    assert [line["strength"] for line in lines if line["kind"] == "run"] == [0, 0, chosen, chosen]
    # The packed counts are those of the scores.
    last = lines[-1]
    misses = unpack(last["misses"], (7, 3, 12))
    scores = [list(by_language.values()) for by_language in last["scores"].values()]
    assert np.allclose(1 - misses.mean(axis=2), scores, atol=1e-4)
    # Nothing is left to do, and there is a page of it.
    del ran[:]
    zero_shot.main(arguments)
    assert not ran
    zero_shot.main(["--report", "--out", str(out)])
    text = (out / "README.md").read_text()
    assert "**4 of the 300 runs" in text and "![scores by sparsity](topics.png)" in text
    assert (out / "topics.png").read_bytes().startswith(b"\x89PNG")
    # Other data, of as many sentences, does not go with the lines that there are.
    path = data / "sib200" / "test.vi.tsv.gz"
    write(path, gzip.decompress(path.read_bytes()).decode().replace("travel", "sports", 1))
    before = (out / "runs.jsonl").read_bytes()
    with pytest.raises(SystemExit):
        zero_shot.main([*arguments, "--seeds", "1"])
    assert "runs.jsonl, got other sentences in vi; give another folder" in capsys.readouterr().err
    assert not ran and (out / "runs.jsonl").read_bytes() == before
    with pytest.raises(SystemExit):
        zero_shot.main([*arguments, "--out", str(path)])
    assert "error: --out: " in capsys.readouterr().err and not ran
    with pytest.raises(SystemExit):
        zero_shot.main([*arguments, "--seeds", "1000"])
    assert "not be those that strengths are chosen with, got 1000" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        zero_shot.main([])
    assert "--data should be a folder with udpos, pud and sib200, got" in capsys.readouterr().err


def test_no_run_begins_that_would_end_too_late(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import zero_shot

    out = data / "out"
    arguments = ["--data", str(data), "--model", str(data / "model"), "--out", str(out)]
    arguments += ["--tasks", "topics", "--languages", "vi", "--minutes", "1e-9"]
    zero_shot.main(arguments)
    assert "the time is up" in capsys.readouterr().out
    assert (out / "runs.jsonl").read_bytes() == b""
