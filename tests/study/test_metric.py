"""A metric's direction turns everything round: the study of a figure that is good where bits per byte are low says the same.

The accuracy of answers is made as 2.4 minus the bits per byte of the same runs, so that both studies have one truth.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.errors import UserError
from harness.evaluation.metric import METRICS
from harness.report.colours import BETTER, WORSE
from harness.report.findings import Findings
from harness.report.page import page
from harness.report.pictures import ForestPlot, Plot
from harness.report.sections import sections
from harness.report.tables import study_csv, study_markdown
from harness.report.write import as_dict
from harness.study.plan import load_study
from harness.study.results import load_results
from tests.support.study_runs import ARMS, HALF, TOKENS, Truth, write_study

STAIRCASE = ["mha", "gqa", "mqa", "mla_plain", "mla"]
LEVELS = {
    "gqa_512": Truth("gqa", 1.82, 512, level="512 bytes"),
    "mla_512": Truth("mla", 1.85, 512, level="512 bytes"),
    "mqa_512": Truth("mqa", 1.8201, 512, level="512 bytes"),
    "gqa_1024": Truth("gqa", 1.84, 1024, level="1,024 bytes"),
    "mla_1024": Truth("mla", 1.80, 1024, level="1,024 bytes"),
    "mha": Truth("mha", 1.7, 2048, reference=True),
}


def both(folder: Path, **content: Any) -> tuple[Findings, Findings]:
    """The same runs compared by bits per byte and by the accuracy of answers."""
    return tuple(
        Findings(load_results(write_study(folder / m, metric=m, **content)))  # type: ignore[return-value]
        for m in ("bits_per_byte", "answer_accuracy")
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Findings, Findings]:
    return both(tmp_path_factory.mktemp("pair"), staircase=STAIRCASE, sweep=True, sweep_tokens=TOKENS, decode=True)


def panels(found: Findings, key: str) -> list[Any]:
    (section,) = (section for section in sections(found) if section.key == key)
    return [panel for picture in section.pictures for _, panel in picture.panels]


def test_verdicts_have_the_other_sign_and_the_same_words(pair: tuple[Findings, Findings]) -> None:
    bits, accuracy = pair
    assert len(bits.declared) == 3 and len(bits.looked_at) == 3
    for low, high in zip([*bits.declared, *bits.looked_at], [*accuracy.declared, *accuracy.looked_at], strict=True):
        assert high.contrast.difference == pytest.approx(-low.contrast.difference)
        assert high.contrast.resolved == low.contrast.resolved
        if low.contrast.resolved:
            said = low.contrast.sentence(METRICS["bits_per_byte"])
            assert high.sentence == said.replace("bits per byte", "answer accuracy")
            assert low.sentence == said.replace("byte", f"byte ({low.also['loss'].size(METRICS['loss'], signed=False)})", 1)
    assert any(verdict.contrast.resolved for verdict in bits.declared)
    mla = next(verdict for verdict in accuracy.declared if verdict.contrast.b == "mla_plain")
    assert mla.contrast.difference > 0 and " answer accuracy better than mla_plain (3 seeds" in mla.sentence


def test_the_best_arm_the_order_and_the_front_are_the_same(pair: tuple[Findings, Findings]) -> None:
    bits, accuracy = pair
    assert accuracy.best == bits.best and accuracy.best[0].arms[-1] == "mla_plain"
    assert accuracy.front == bits.front == ["mqa", "mla", "gqa", "mha"]
    assert accuracy.shared is not None and bits.shared is not None
    assert [c.difference for c in accuracy.shared.verdicts] == pytest.approx([-c.difference for c in bits.shared.verdicts])
    (best,) = accuracy.best
    mean = accuracy.arm(best.arms[0]).mean
    assert mean is not None and mean.mean == max(a.mean.mean for a in accuracy.arms if a.mean and not a.info["reference"])
    assert f"Highest test answer accuracy: {best.arms[0]}, {mean.mean:.4f} ±" in sections(accuracy)[0].words[0]


def test_axes_forest_and_staircase_say_and_show_the_direction(pair: tuple[Findings, Findings]) -> None:
    bits, accuracy = pair
    for key in ("pareto", "decode"):
        for low, high in zip(panels(bits, key), panels(accuracy, key), strict=True):
            assert isinstance(low, Plot) and low.y_label == "test bits per byte, lower is better"
            assert high.y_label == "test answer accuracy, higher is better"
    (low,), (high,) = panels(bits, "contrasts"), panels(accuracy, "contrasts")
    assert isinstance(low, ForestPlot) and low.sides == ("← first arm better", "second arm better →")
    assert high.sides == ("← second arm better", "first arm better →")
    assert all(row.noise is None for row in high.rows), "the bootstrap is in bits per byte"
    (low,), (high,) = panels(bits, "staircase"), panels(accuracy, "staircase")
    assert high.x_label == "test answer accuracy, higher is better"
    assert [row.colour for row in high.rows] == [row.colour for row in low.rows]
    assert {row.colour for row in high.rows[1:]} == {WORSE, BETTER}
    assert [row.value for row in high.rows] == pytest.approx([HALF - row.value for row in low.rows])


def test_no_word_of_the_report_says_the_other_direction(pair: tuple[Findings, Findings]) -> None:
    _, accuracy = pair
    parts = sections(accuracy)
    words = study_markdown(accuracy, parts).partition("## Learning rates")[0] + page(accuracy, parts).partition('id="rates"')[0]
    assert "lower is better" not in words and "Lowest" not in words
    # The bootstrap's note and its column alone speak of bits.
    assert words.count("bits per byte") == words.count("interval of the difference in bits per byte over segments")
    content = as_dict(accuracy)
    assert (content["metric"], content["higher_is_better"]) == ("answer_accuracy", True)
    assert content["arms"]["mla"]["answer_accuracy"] == pytest.approx(HALF - content["arms"]["mla"]["bits_per_byte"])
    assert "test_answer_accuracy" in study_csv(accuracy.results).splitlines()[0]


def test_an_arm_far_on_the_bad_side_leaves_the_picture_and_is_named(tmp_path: Path) -> None:
    arms = {f"arm_{i}": Truth("gqa", 1.8 + 0.001 * i, 512 + i) for i in range(8)} | {"lost": Truth("mla", 2.3, 512)}
    contrasts = [["arm_1", "arm_0"]]
    bits, accuracy = both(tmp_path, arms=arms, contrasts=contrasts, segments=0)
    for found, side in ((bits, "Above"), (accuracy, "Below")):
        (figure,) = (p for section in sections(found) if section.key == "pareto" for p in section.pictures)
        assert f"{side} the picture: lost (" in figure.caption
        assert "lost" not in {series.arm for series in figure.panels[0][1].series}  # type: ignore[union-attr]


def test_the_best_arm_is_named_at_every_level_and_references_do_not_compete(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "levels", LEVELS, contrasts=[["mla_512", "gqa_512"]], segments=0, extras=False)
    found = Findings(load_results(folder))
    by_level = {best.level: best for best in found.best}
    assert list(by_level) == ["512 bytes", "1,024 bytes", None]
    assert by_level["512 bytes"].worse == ["mla_512"]
    assert {by_level["512 bytes"].arms[0], *by_level["512 bytes"].even} == {"gqa_512", "mqa_512"}
    assert (by_level["1,024 bytes"].arms, by_level["1,024 bytes"].worse) == (["mla_1024", "gqa_1024"], ["gqa_1024"])
    assert by_level[None].arms[0] == "mla_1024" and "mha" not in by_level[None].arms
    # Two at 512 bytes, one at 1,024, and of the four of all the one that was counted at 1,024 already.
    assert {best.comparisons for best in found.best} == {6}
    words = sections(found)[0].words
    assert words[1].startswith("Lowest test bits per byte at 1,024 bytes: mla_1024, 1.7984 ±")
    assert words[1].endswith("Worse: gqa_1024.")
    assert "corrected for all 6 differences from the best" in words[2]


def test_who_is_best_is_no_finding_without_error_bars(tmp_path: Path) -> None:
    found = Findings(load_results(write_study(tmp_path / "one", seeds=(0,), segments=0, extras=False)))
    (best,) = found.best
    assert (best.comparisons, best.worse) == (0, [])
    assert sections(found)[0].words[0].endswith("Without error bars that is no finding.")


def test_runs_whose_evaluation_lacks_the_metric_are_left_out_and_named(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "lacking", metric="answer_accuracy", segments=0)
    for path in folder.glob("gqa-*-seed1/evaluations/*.json"):
        record = json.loads(path.read_text())
        record["extras"]["recall"] = None
        path.write_text(json.dumps(record))
    found = Findings(load_results(folder))
    assert [run.seed for run in found.arm("gqa").runs] == [0, 2]
    assert any("has no answer accuracy, so left out: gqa-lr0.005-seed1" in note for note in found.notes)
    for path in folder.glob("*/evaluations/*.json"):
        record = json.loads(path.read_text())
        record["extras"]["recall"] = None
        path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"no finished run of .* has answer accuracy \(metric=answer_accuracy\)"):
        Findings(load_results(folder))


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_makes_a_whole_report(name: str, tmp_path: Path) -> None:
    found = Findings(load_results(write_study(tmp_path / name, metric=name, segments=0)))
    text = study_markdown(found, sections(found))
    assert METRICS[name].axis.partition(",")[0] in text and f"{METRICS[name].unit} " in text
    assert set(found.results.values()) == set(ARMS)


def test_an_unknown_metric_is_refused_with_the_nearest(tmp_path: Path) -> None:
    text = "question: q\nbase: []\nseeds: [0]\nmetric: answer_acuracy\narms: {mha: {family: mha}}\n"
    (tmp_path / "given.yaml").write_text(text)
    with pytest.raises(UserError, match=r"metric=answer_acuracy .* did you mean answer_accuracy\?"):
        load_study("given", tmp_path)
    folder = write_study(tmp_path / "old", metric="speed", segments=0, extras=False, seeds=(0,))
    with pytest.raises(UserError, match="metric=speed is none of loss, perplexity"):
        load_results(folder)
