"""The report says what the runs say: nothing is filled in, nothing is hidden, and no words cover one another."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.config.places import ROOT
from harness.errors import UserError
from harness.evaluation.metric import BITS_PER_BYTE, LOSS
from harness.report import study_pictures
from harness.report.colours import COLOURS, DARK_PAPER, FAMILY_COLOURS, INK, PAPER, contrast, darker, in_the_dark, styles
from harness.report.document import in_ms
from harness.report.findings import Findings, over_seeds
from harness.report.page import page
from harness.report.pictures import ForestPlot, Plot, short
from harness.report.sections import sections
from harness.report.study_pictures import trends_picture
from harness.report.tables import study_csv, study_markdown
from harness.report.verdicts_from_csv import restated
from harness.report.write import tracked_table, write_report
from harness.study.evaluation_noise import bootstrap
from harness.study.results import AT_LENGTH, load_results
from harness.study.statistics import Mean, contrasts, mean_interval, trends, with_error
from scripts import report
from tests.support.study_runs import ARMS, MANY, SHARED_LR, STAIRCASE, TOKENS, Truth, told, write_study

HOSTILE = {'<b>a</b>&"x"': Truth("mha", 1.8, 2048), "m|l*a_`x`$y$ with a very long name": Truth("mla", 1.9, 640)}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that has everything, and its report."""
    folder = write_study(
        tmp_path_factory.mktemp("full") / "full", sweep=True, sweep_tokens=TOKENS, decode=True, staircase=STAIRCASE
    )
    write_report(load_results(folder), folder)
    return folder


def findings_of(folder: Path) -> Findings:
    return Findings(load_results(folder))


def page_of(folder: Path) -> str:
    """The page of a study's report made now, without its pictures: drawing them takes seconds."""
    findings = findings_of(folder)
    return page(findings, [dataclasses.replace(part, pictures=()) for part in sections(findings)])


def table_of(markdown: str, title: str) -> dict[str, list[str]]:
    """The columns of a table of the Markdown report, by their names."""
    text = markdown.partition(f"**{title}**\n\n")[2].partition("\n\n")[0]
    head, _, *rows = ([cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines())
    return dict(zip(head, map(list, zip(*rows, strict=True)), strict=True))


def change(folder: Path, pattern: str, **values: Any) -> None:
    for path in folder.glob(pattern):
        path.write_text(json.dumps(json.loads(path.read_text()) | values))


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_whole_study_has_every_file_of_the_report_and_a_page_that_a_person_can_be_sent(full: Path) -> None:
    figures = {"pareto", "contrasts", "curves", "positions", "copying", "staircase", "sweep", "decode"}
    assert {path.stem for path in (full / "figures").iterdir()} == figures
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (full / "figures").iterdir())
    markdown = (full / "report.md").read_text()
    assert set(re.findall(r"\(figures/(\w+)\.png\)", markdown)) == figures
    titles = re.findall(r"^## (.*)$", markdown, flags=re.M)
    assert titles == [
        "Verdict",
        "Arms",
        "Quality against cache",
        "Comparisons",
        "Quality against decode time",
        "Loss curves",
        "Loss by position",
        "Staircase",
        "Learning rates",
        "What the loss does not show",
        "What differs besides",
        "How this was made",
    ]
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", (full / "report.html").read_text()) == titles


def test_the_report_of_the_same_runs_is_the_same_to_the_byte_and_drops_figures_that_are_no_longer_there(full: Path) -> None:
    names = ("report.html", "report.md", "report.csv", "report.json", "figures/pareto.png")
    before = [(full / name).read_bytes() for name in names]
    (full / "figures" / "forgotten.png").write_bytes(b"of an earlier report")
    write_report(load_results(full), full)
    assert [(full / name).read_bytes() for name in names] == before
    assert not (full / "figures" / "forgotten.png").exists()
    assert not [*full.glob("*.tmp"), *full.glob("figures/*unfinished*")]


def test_the_csv_has_one_unrounded_row_a_run(full: Path) -> None:
    results = load_results(full)
    rows = list(csv.DictReader((full / "report.csv").open()))
    assert len(rows) == len(results.runs) + len(results.sweep) == 15 + 15
    for run, row in zip(results.runs, rows, strict=False):
        record = run.evaluation()
        assert record is not None
        assert (row["run"], row["kind"], row["arm"], int(row["seed"])) == (run.folder.name, "study", run.arm, run.seed)
        assert float(row["test_bits_per_byte"]) == record["bits_per_byte"]


# --- verdicts --------------------------------------------------------------------------------------------------------


def test_verdicts_are_the_sentences_of_the_statistics_declared_ones_first(full: Path) -> None:
    results = load_results(full)
    steps = [("gqa", "mha"), ("mqa", "gqa"), ("mla_plain", "mqa")]  # mla against mla_plain is declared
    pairs: dict[str, Any] = {"primary": results.record["contrasts"], "other": steps}
    in_nats = contrasts(results.values(LOSS), **pairs)
    expected = [c.sentence(BITS_PER_BYTE, {"loss": in_nats[i]}) for i, c in enumerate(contrasts(results.values(), **pairs))]
    assert all(" nats per token)" in sentence for sentence in expected)
    content = json.loads((full / "report.json").read_text())
    assert [verdict["sentence"] for verdict in content["verdicts"]] == expected
    assert [verdict["primary"] for verdict in content["verdicts"]] == [True] * 3 + [False] * 3
    markdown, page = (full / "report.md").read_text(), (full / "report.html").read_text()
    for sentence in expected:
        assert sentence.replace("_", "\\_").replace("<", "\\<") in markdown
        assert sentence.replace("<", "&lt;") in page
    resolved = sum(verdict["resolved"] for verdict in content["verdicts"][:3])
    assert f"{resolved} of 3 declared comparisons" in markdown


def test_the_noise_of_the_evaluation_is_of_losses_averaged_over_common_seeds_and_is_said_to_be_no_verdict(full: Path) -> None:
    results = load_results(full)
    segments = {(run.arm, run.seed): run.segments() for run in results.runs}

    def nats(arm: str) -> Any:
        return np.mean([segments[arm, seed]["nats"] for seed in (0, 1, 2)], axis=0)  # type: ignore[index]

    expected = bootstrap(nats("mla"), nats("gqa"), segments["mla", 0]["bytes"])  # type: ignore[index]
    noise = json.loads((full / "report.json").read_text())["verdicts"][0]["evaluation_noise"]
    assert (noise["low"], noise["high"], noise["seeds"]) == (expected.low, expected.high, [0, 1, 2])
    markdown = (full / "report.md").read_text()
    assert "evaluation noise, no verdict" in markdown
    assert "over segments of the same 8 documents of the test split" in markdown
    assert "It says what other places in the same documents would have changed for these very weights" in markdown


def test_segments_that_were_cut_differently_or_are_too_few_give_no_noise_and_the_reason(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "few", segments=30, contrasts=[["mla", "gqa"]])
    markdown, content = told(folder)
    assert content["verdicts"][0]["evaluation_noise"] is None
    assert "No evaluation noise where 30 clusters of text are too few" in markdown
    change(folder, "mla-*-seed1/segments/*.json", bytes=[1] * 30)
    assert "their segments are cut differently" in told(folder)[0]


def test_a_declared_comparison_without_an_error_bar_is_counted_apart(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "single", contrasts=[["mla", "gqa"], ["mla", "mqa"]], extras=False, segments=0)
    for arm, said in (("mqa", "of 1 declared comparison "), ("mla", "No declared comparison has an error bar")):
        for run in folder.glob(f"{arm}-*"):
            if not run.name.endswith("-seed0"):
                shutil.rmtree(run)
        markdown, _ = told(folder)
        assert said in markdown and ("(Holm). 1 more has no error bar." in markdown) is (arm == "mqa")


def test_one_seed_gives_no_error_bar_and_no_verdict(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "one", seeds=(0,), extras=False, segments=0)
    markdown, content = told(folder)
    assert all(verdict["low"] is None and verdict["resolved"] is None for verdict in content["verdicts"])
    assert "there are no error bars, and nothing below is a verdict" in markdown
    table = markdown.partition("## Arms")[2].partition("##")[0]
    assert "±" not in table
    assert "every run" not in table


def test_arms_from_the_same_runs_are_one_lineage_in_verdicts_and_words(tmp_path: Path) -> None:
    sources = {"mla": "gqa", "mla_plain": "mla"}
    folder = write_study(tmp_path / "lineages", sources=sources, segments=0, extras=False)
    found = findings_of(folder)
    assert found.lineages == {"mla": "gqa", "mla_plain": "gqa"} and found.dof == 6
    paired = {(v.contrast.a, v.contrast.b): v.contrast.paired for v in found.declared}
    assert paired == {("mla", "gqa"): True, ("mla", "mqa"): False, ("mla", "mla_plain"): True}
    markdown, content = told(folder)
    assert "Arms that descend from the same runs (mla, mla\\_plain from runs of gqa) are compared seed by seed" in markdown
    assert content["lineages"] == found.lineages and "3, paired" in markdown
    rows = csv.DictReader(study_csv(load_results(folder)).splitlines())
    assert {(row["arm"], row["lineage"]) for row in rows if row["arm"] in ("mla_plain", "mha")} == {
        ("mla_plain", "gqa"),
        ("mha", "mha"),
    }


def test_a_record_that_names_its_runs_in_a_circle_has_a_report(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "circle", sources={"mla": "gqa", "gqa": "mla"}, segments=0, extras=False)
    assert findings_of(folder).lineages.keys() == {"mla", "gqa"}


def test_a_declared_margin_is_tested_and_stands_in_the_table(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "margin", margin=0.03, segments=0, extras=False)
    markdown, content = told(folder)
    (mla, mqa, plain) = content["verdicts"][:3]
    assert mla["same"] and not plain["same"] and plain["resolved"]
    assert "mla and gqa are the same within 0.03 bits per byte:" in mla["sentence"]
    assert "same within 0.03" in markdown and "| yes (p " in markdown
    assert mqa["margin"] == 0.03


def test_what_was_added_after_the_first_result_is_marked_exploratory(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "late", segments=0, extras=False)
    assert not any("declared" in note or "exploratory" in note for note in findings_of(folder).notes)
    record = json.loads((folder / "study.json").read_text())
    (first,) = record["history"]
    early = first | {"arms": {arm: [0, 1] if arm == "mqa" else [0, 1, 2] for arm in first["arms"] if arm != "mla_plain"}}
    early |= {"contrasts": [["mla", "gqa"], ["mla", "mqa"], ["gqa", "mha"]]}
    record["history"] = [early, first | {"results": 4}]
    (folder / "study.json").write_text(json.dumps(record))
    markdown, content = told(folder)
    found = {verdict["b"]: verdict for verdict in content["verdicts"] if verdict["a"] == "mla"}
    assert found["gqa"]["primary"] and found["gqa"]["exploratory"] is None
    assert found["mqa"]["sentence"].endswith("; exploratory: seeds 2 of mqa were added after the first result")
    assert found["mla_plain"]["sentence"].endswith("; exploratory: the comparison was added after the first result")
    assert not found["mqa"]["primary"] and found["mqa"]["p_holm"] is None
    assert (
        "added or changed after the first result, so exploratory: arm mla_plain; seeds 2 of mqa; the comparison of mla with "
        "mla_plain" in content["notes"]
    )
    assert "declared, and no longer asked for: the comparison of gqa with mha" in content["notes"]
    assert "| mla\\_plain (exploratory) |" in markdown and "| mla − mqa | exploratory |" in markdown


def test_bytes_of_a_cache_say_for_which_context_they_are(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "contexts", segments=0, extras=False)
    change(folder, "*/summary.json", cache_context=256)
    markdown, _ = told(folder)
    headers = [line for line in markdown.splitlines() if "cache bytes per token" in line and line.startswith("|")]
    assert len(headers) == 2 and all("| cache bytes per token at 256 tokens" in line for line in headers)
    rows = csv.DictReader(study_csv(load_results(folder)).splitlines())
    assert {row["cache_context"] for row in rows} == {"256"}
    change(folder, "*/evaluations/*.json", cache_context=256)
    assert "cache bytes per token at 256 tokens" in tracked_table(load_results(folder))[0]
    for run in folder.glob("mla-*"):
        change(run, "summary.json", cache_context=512)
    cells = f"{ARMS['mla'].cache:,} at 512", f"{ARMS['gqa'].cache:,} at 256"
    markdown, _ = told(folder)
    for cell in cells:
        assert len([line for line in markdown.splitlines() if f"| {cell} |" in line]) == 2


def test_caches_that_are_no_straight_line_are_compared_at_a_length_too(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "curved", segments=0, extras=False)
    change(folder, "*/summary.json", cache_bytes_by_context={"32768": 1024 * 32768})
    for run in folder.glob("mla-*"):
        change(run, "summary.json", cache_bytes_by_context={"32768": 64 * 32768})
    findings = findings_of(folder)
    assert findings.at_length == {arm: 64 if arm == "mla" else 1024 for arm in ARMS}
    markdown, _ = told(folder)
    assert "| at 32,768 tokens |" in markdown
    panels = dict(next(each for each in sections(findings) if each.key == "pareto").pictures[0].panels)
    assert list(panels) == ["at the model's context", "at 32,768 tokens"]
    fronts = [panel.front[0][0] for panel in panels.values() if isinstance(panel, Plot)]
    assert fronts == [findings.arm(findings.front[0]).summary("cache_bytes_per_token"), 64] and findings.front[0] != "mla"

    for arm, truth in ARMS.items():  # straight lines
        for run in folder.glob(f"{arm}-*"):
            change(run, "summary.json", cache_bytes_by_context={"32768": truth.cache * 32768})
    assert findings_of(folder).at_length == {}


def test_a_trend_is_told_beside_the_comparisons_and_marked_where_it_was_added_late(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "trend", segments=0, extras=False)
    record = json.loads((folder / "study.json").read_text())
    record["trends"] = {"mla - gqa": {"over": "model.d_model", "of": [["mla", "gqa"], ["mqa", "mla_plain"]], "at": [128, 256]}}
    record["history"][0]["trends"] = ["mla - gqa"]
    (folder / "study.json").write_text(json.dumps(record))
    markdown, content = told(folder)
    values = load_results(folder).values()
    (expected,) = trends(values, {"mla - gqa": ([("mla", "gqa"), ("mqa", "mla_plain")], [128, 256])})
    (found,) = content["trends"]
    assert (found["slope"], found["low"], found["exploratory"]) == (expected.slope, expected.low, None)
    differences = [np.mean([*values[a].values()]) - np.mean([*values[b].values()]) for a, b in expected.pairs]
    assert found["slope"] == pytest.approx(differences[1] - differences[0])
    assert "| mla - gqa | yes | mla − gqa at 128, mqa − mla\\_plain at 256 |" in markdown
    assert "- mla - gqa: for each doubling of model.d\\_model (128, 256) the difference changes by" in markdown
    findings = findings_of(folder)
    ((_, panel),) = trends_picture([trend for trend, _, _ in findings.trends], {"mla - gqa": "model.d_model"}, LOSS).panels
    assert isinstance(panel, Plot)
    ((first, second),) = [series.marks for series in panel.series]
    compared = contrasts(values, primary=(), other=expected.pairs)
    for mark, size, pair in zip((first, second), expected.at, compared, strict=True):
        assert (mark.x, mark.y, mark.low, mark.high) == (size, pair.difference, pair.low, pair.high)

    record["history"][0]["trends"] = []
    (folder / "study.json").write_text(json.dumps(record))
    markdown, content = told(folder)
    assert content["trends"][0]["sentence"].endswith("; exploratory: the trend was added after the first result")
    assert content["trends"][0]["p_holm"] is None and content["trends"][0]["p"] == expected.p
    assert "| mla - gqa | exploratory |" in markdown
    assert "added or changed after the first result, so exploratory: the trend mla - gqa" in content["notes"]

    record["history"][0]["trends"] = ["mla - gqa", "given up"]
    for run in folder.glob("mqa-*"):
        (run / "summary.json").unlink()
    (folder / "study.json").write_text(json.dumps(record))
    _, content = told(folder)
    assert not content["trends"]
    assert "the declared trend mla - gqa cannot be told yet: no run of mqa" in content["notes"]
    assert "declared, and no longer asked for: the trend given up" in content["notes"]


def test_of_an_older_record_it_is_said_that_the_declaration_is_not_known(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "old", segments=0, extras=False)
    record = json.loads((folder / "study.json").read_text())
    del record["history"], record["margin"]
    (folder / "study.json").write_text(json.dumps(record))
    _, content = told(folder)
    assert any("is not known: study.json is of a version that kept no history" in note for note in content["notes"])
    assert [verdict["primary"] for verdict in content["verdicts"]] == [True] * 3


def test_the_noise_is_drawn_from_whole_documents_where_there_are_enough(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "documents", segments=300, contrasts=[["mla", "gqa"]])
    change(folder, "*/segments/*.json", documents=[i // 2 for i in range(300)])
    results = load_results(folder)
    segments = {(run.arm, run.seed): run.segments() for run in results.runs}

    def nats(arm: str) -> Any:
        return np.mean([segments[arm, seed]["nats"] for seed in (0, 1, 2)], axis=0).reshape(150, 2).sum(1)  # type: ignore[index]

    sizes = np.reshape(segments["mla", 0]["bytes"], (150, 2)).sum(1)  # type: ignore[index]
    expected = bootstrap(nats("mla"), nats("gqa"), sizes)
    markdown, content = told(folder)
    noise = content["verdicts"][0]["evaluation_noise"]
    assert (noise["low"], noise["high"], noise["clusters"]) == (pytest.approx(expected.low), pytest.approx(expected.high), 150)
    assert noise["over"] == "150 documents" and "what other documents of the same kind would have changed" in markdown


def test_a_published_csv_is_restated_with_its_lineages_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, drawn = "docs/studies/convert/report.csv", tmp_path / "convert.png"
    given = ["study=convert", f"csv={ROOT / file}", "pairs=mha2mla_64_tuned:transmla_64_tuned", f"picture={drawn}"]
    assert report.main(given) == 0
    assert drawn.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "mha2mla_64_tuned is 0.0031 ± 0.0011 bits per byte (0.0075 ± 0.0027 nats per token) better than" in printed
    assert "pooled: 0.0062 bits per byte, 24 degrees of freedom" in printed
    few, width = tmp_path / "few.png", ["study=width", f"csv={ROOT / 'docs/studies/width/report.csv'}"]
    assert report.main([*given[:2], f"picture={few}", "arms=gqa,mla_64_tuned"]) == 0
    assert few.read_bytes() != drawn.read_bytes()
    assert report.main([*width, f"trends={tmp_path / 'trends.png'}"]) == 0
    assert (tmp_path / "trends.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "nor the same within 0.005" in printed
    assert "mla - gqa: for each doubling of model.d_model (192, 256, 384) the difference changes by +0.079 ± 0.058" in printed
    with pytest.raises(UserError, match=r"has an arm gqa, and study=kv_budget has none of that name"):
        report.main(["study=kv_budget", f"csv={ROOT / file}"])
    with pytest.raises(UserError, match="cannot be read as a study"):
        report.main(["study=convert", f"csv={ROOT / 'README.md'}"])
    with pytest.raises(UserError, match="pairs=gqa must name two arms each"):
        report.main(["study=convert", f"csv={ROOT / file}", "pairs=gqa"])
    with pytest.raises(UserError, match=r"picture=\.\.\. is for csv=FILE"):
        report.main(["study=convert", f"picture={drawn}"])
    with pytest.raises(UserError, match=r"has no arm mla_1 to show: it has gqa, "):
        report.main([*given[:2], f"picture={few}", "arms=gqa,mla_1"])
    with pytest.raises(UserError, match=r"^trends=.*: study=convert has no trends: name one"):
        report.main([*given[:2], f"trends={few}"])
    with pytest.raises(UserError, match=r"^arms=\.\.\. is for picture=FILE"):
        report.main([*given[:2], "arms=gqa"])
    with pytest.raises(UserError, match=r"^picture=.* cannot be written \(Is a directory\): name a file"):
        report.main(["study=convert", f"csv={ROOT / file}", f"picture={tmp_path}"])
    twice = tmp_path / "twice.csv"  # two reports in one file, of which the second row would stand for both
    twice.write_text(2 * (ROOT / file).read_text("utf-8").replace("\r\n", "\n"), "utf-8")
    with pytest.raises(UserError, match=r"cannot be read as a study's report\.csv \(two rows of arm gqa, seed \d+\)"):
        report.main(["study=convert", f"csv={twice}"])
    nothing = tmp_path / "nothing.csv"  # which has no place on a logarithmic scale
    nothing.write_text("kind,arm,seed,cache_bytes_per_token\nstudy,gqa,1,0\n", "utf-8")
    with pytest.raises(UserError, match=r"cannot be read as a study's report\.csv \(cache_bytes_per_token=0 of arm gqa\)"):
        report.main(["study=convert", f"csv={nothing}"])


def test_caches_that_are_no_straight_line_are_drawn_at_32k_from_a_csv_too(tmp_path: Path) -> None:
    rows = list(csv.DictReader((ROOT / "docs/studies/width/report.csv").open(newline="")))
    usual = {row["arm"]: float(row["cache_bytes_per_token"]) for row in rows}
    of_window = {arm: size / (4 if arm == "mla_384" else 1) for arm, size in usual.items()}
    for sizes, panels in (({}, [usual]), (usual, [usual]), (of_window, [usual, of_window])):
        file = tmp_path / "report.csv"
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, [*rows[0], AT_LENGTH])
            writer.writeheader()
            writer.writerows(row | {AT_LENGTH: sizes.get(row["arm"], 0) * 32768 or ""} for row in rows)
        _, picture, _ = restated(file, "width")
        drawn = [{one.arm: one.marks[0].x for one in panel.series} for _, panel in picture.panels if isinstance(panel, Plot)]
        assert drawn == panels
    assert [heading for heading, _ in picture.panels] == ["at the model's context", "at 32,768 tokens"]


def test_more_arms_than_a_reader_tells_apart_have_a_row_each_by_their_cache() -> None:
    _, picture, _ = restated(ROOT / "docs/studies/convert/report.csv", "convert")
    [(_, panel)] = picture.panels
    assert isinstance(panel, ForestPlot)
    rows = [(int(row.label.split()[-1].replace(",", "")), row.value) for row in panel.rows]
    assert len(rows) == 28 and rows == sorted(rows) and {size for size, _ in rows} == {512, 768, 1024, 1536}
    best = [rows.index((size, min(value for cache, value in rows if cache == size))) for size in (512, 768, 1024, 1536)]
    assert [number for number, row in enumerate(panel.rows) if row.filled] == best
    assert panel.level == next(row.value for row in panel.rows if row.arms == ("gqa",))
    assert "Line: gqa, a reference like gqa_tuned. Right of the picture: mla_96_short (2.0018)" in picture.caption


def test_more_arms_than_a_reader_tells_apart_have_a_row_each_by_their_decode_time(
    full: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = findings_of(full)
    times = [
        {row["arm"]: in_ms(row["milliseconds"]) for row in findings.decode if (row["context"], row["batch"]) == (1024, batch)}
        for batch in (1, 8)
    ]
    assert all(isinstance(panel, Plot) for _, panel in study_pictures.decode_picture(findings).panels)
    monkeypatch.setattr(study_pictures, "MOST_NAMES", len(times[0]) - 1)
    picture = study_pictures.decode_picture(findings)
    for (heading, panel), shown, batch in zip(picture.panels, times, (1, 8), strict=True):
        assert heading == f"ms a step, batch {batch}, context 1,024" and isinstance(panel, ForestPlot)
        labels = [f"{arm} · {time}" for arm, time in sorted(shown.items(), key=lambda item: float(item[1]))]
        assert [row.label for row in panel.rows] == labels and panel.rows[0].filled
    assert "the best mean up to each time" in picture.caption


@pytest.mark.parametrize(("higher", "arms", "side"), [(True, 14, "Left of"), (True, 9, "Below"), (False, 9, "Above")])
def test_arms_far_out_are_said_to_lie_where_the_axis_of_the_metric_would_have_them(higher: bool, arms: int, side: str) -> None:
    sign = -1 if higher else 1
    means = {f"a{number}": sign * (1 + number / 100) for number in range(arms - 1)} | {"far": sign * 9.0}
    placed = [study_pictures.PlacedArm(name, False, Mean(mean, None, None, 1, None), 1) for name, mean in means.items()]
    metric = dataclasses.replace(LOSS, higher_is_better=higher)
    picture = study_pictures.quality_by_cache(
        placed, styles(dict.fromkeys(means, "a")), dict.fromkeys(means, 512.0), {}, metric
    )
    assert picture.caption.endswith(f" {side} the picture: far ({metric.text(sign * 9.0)}).")


# --- what is missing -------------------------------------------------------------------------------------------------


def test_what_is_missing_or_failed_stands_at_the_top_and_nothing_is_put_in_its_place(tmp_path: Path) -> None:
    folder = write_study(
        tmp_path / "partial",
        unfinished=[("mqa", 0), ("mqa", 1), ("mqa", 2), ("mla", 2)],
        failures=[{"run": "mqa-lr0.005-seed0", "error": "out of memory (status 1; the log)"}],
    )
    markdown, content = told(folder)
    top = markdown.partition("## Verdict")[0]
    assert "mqa-lr0.005-seed0 failed:** out of memory (status 1; the log)" in top
    assert "4 of 15 runs are not finished" in top
    assert "no finished run of mqa" in top
    assert "the declared comparison of mla with mqa cannot be made yet" in top
    assert "out of memory" in page_of(folder).partition("<main>")[0]
    assert re.search(r"^\| mqa \| – \| – \| – \| – \| – \| – \| 0 \| – \| – \|$", markdown, flags=re.M)
    assert [verdict["b"] for verdict in content["verdicts"]] == ["gqa", "mla_plain"]
    assert content["arms"]["mqa"]["mean"] is None
    assert content["missing"] == 4


def test_a_section_without_data_is_left_out_with_a_word_where_it_matters(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "bare", extras=False, segments=0)
    markdown, _ = told(folder)
    pictures = [picture.name for section in sections(findings_of(folder)) for picture in section.pictures]
    assert pictures == ["pareto", "contrasts", "curves", "positions"]
    for absent in ("## Staircase", "## What the loss does not show", "evaluation noise: the"):
        assert absent not in markdown
    for said in (
        "Decode times were not measured",
        "no rate was tuned",
        "beyond the training length were not measured",
        "No evaluation noise where no segment losses are stored",
    ):
        assert said in markdown


def test_rates_that_a_study_gives_its_arms_are_called_neither_shared_nor_tuned(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "own", extras=False, segments=0)
    record = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps(record | {"shared_lr": None}))
    markdown, _ = told(folder)
    assert "Every arm ran at the rate that the study's file gives it: no rate was tuned in this study." in markdown


@pytest.mark.parametrize(("sweep", "said"), [(False, ""), (True, ", only 15 runs that tried learning rates")])
def test_a_study_without_a_finished_run_has_no_report(sweep: bool, said: str, tmp_path: Path) -> None:
    folder = write_study(tmp_path / "none", unfinished=[(arm, seed) for arm in ARMS for seed in (0, 1, 2)], sweep=sweep)
    with pytest.raises(UserError, match=f"no finished and evaluated run yet{said}, so there is nothing to report"):
        write_report(load_results(folder), folder)
    assert not (folder / "report.html").exists()


def test_a_run_that_was_not_evaluated_is_left_out_and_named(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "unscored")
    (folder / "gqa-lr0.005-seed1" / "evaluations" / "stdlib-test-00000000.json").unlink()
    markdown, content = told(folder)
    assert "not evaluated on the test split, so left out: gqa-lr0.005-seed1" in markdown
    assert content["arms"]["gqa"]["seeds"] == [0, 2]


# --- tables ----------------------------------------------------------------------------------------------------------


def test_the_main_table_has_means_with_half_widths_sizes_and_decode_times(full: Path) -> None:
    results = load_results(full)
    mean, nats = mean_interval(results.values(), "mla"), mean_interval(results.values(LOSS), "mla")
    assert mean.low is not None and mean.high is not None and mean.deviation is not None
    cells = f"{mean.mean:.4f} ± {(mean.high - mean.low) / 2:.4f} | {with_error(nats.mean, nats.low, nats.high)}"
    deviations = [run.evaluation()["bits_per_byte"] for run in results.runs if run.arm == "mla"]  # type: ignore[index]
    assert mean.deviation == pytest.approx(np.std(deviations, ddof=1))
    table = (full / "report.md").read_text().partition("## Arms")[2].partition("##")[0]
    assert f"| mla | 1,324,416 | 640 | 0.312 | {cells} | {mean.deviation:.4f} | 3 | 0.007 |" in table
    assert "Bartlett's test of equal variances: p " in table
    assert "mha (reference)" in table
    assert "decode, ms a token" in table and "one step at context 1,024, batch 1" in table


def test_the_front_is_of_the_means_and_named(full: Path) -> None:
    assert findings_of(full).front == ["mqa", "mla", "gqa", "mha"]
    assert "the best mean up to each cache size (mqa, mla, gqa, mha)" in (full / "report.md").read_text()


def test_quantities_that_are_not_equal_are_marked_and_so_are_the_fields_that_differ(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "unequal")
    change(folder, "mla-*/summary.json", data_fingerprint="e" * 64, kernel="flex", device="another", torch="2.11.0")
    found = findings_of(folder)
    unequal = {fact.name for fact in found.facts if not fact.equal}
    assert {"training data", "attention kernel that ran", "hardware", "torch", "parameters"} <= unequal
    assert "commit" not in unequal and "training tokens" not in unequal
    markdown, content = told(folder)
    assert set(content["unequal"]) == unequal
    differing = table_of(markdown, "What a fair comparison would have equal: not equal")
    assert [name.replace("\\", "") for name in differing["arm"]] == [*ARMS]
    assert differing["hardware"] == ["cpu", "cpu", "cpu", "another", "cpu"]
    assert differing["parameters (by 0.3 %)"][:2] == ["1,328,256", "1,324,160"]
    assert "commit" not in differing and "training tokens" not in differing
    equal = table_of(markdown, "What a fair comparison would have equal: equal in all arms")
    alike = dict(zip(equal[""], equal["in all arms"], strict=True))
    assert (alike["commit"], alike["training tokens"], alike["precision"]) == ("012345678", "2,000,000", "bfloat16")
    assert unequal.isdisjoint(alike)
    fields = table_of(markdown, "Fields of the configurations that differ")
    assert fields["attention.kv\\_lora\\_rank"] == ["–", "–", "–", "64", "64"]
    assert re.search(r'<tr data-arm="3"><th scope="row" class="words">mla</th><td[^>]*>[^<]*</td>.*another', page_of(folder))
    assert "| **gqa** | params | mha | model.mlp\\_hidden = 344 | 1,328,256 | 1,324,160 | −0.31 % |" in markdown


def test_thirty_arms_fit_on_a_page_with_the_values_that_differ(tmp_path: Path) -> None:
    found = findings_of(write_study(tmp_path / "wide", MANY, contrasts=[["r3", "r0"]], segments=0, seeds=(0,)))
    tables = [table for section in sections(found) if section.key == "confounds" for table in section.tables]
    assert len(tables) == 4
    # Of two dozen quantities and fields; a column for each arm would be 16.
    assert max(len(table.columns) for table in tables) <= 8
    assert all(line.arm == line.cells[0] for line in tables[0].lines)


def test_a_rate_at_the_edge_of_those_that_were_tried_stands_at_the_top(tmp_path: Path) -> None:
    arms = {**ARMS, "edge": Truth("gqa", 1.83, 1024, best_lr=0.01)}
    folder = write_study(tmp_path / "edge", arms, sweep=True, segments=0, extras=False)
    notes = [note for note in findings_of(folder).notes if "edge" in note]
    assert notes == [
        "the rate of edge, 0.01, is at the edge of those that were tried (0.0025 to 0.01): a better one may lie beyond, and "
        "this arm be tuned worse than the others"
    ]
    assert "The rate of edge, 0.01, is at the edge" in page_of(folder).partition("<main>")[0]


def test_the_command_of_the_report_does_the_whole_study_whatever_part_the_last_one_did(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "part", segments=0, extras=False)
    record = json.loads((folder / "study.json").read_text())
    record["command"] = "python scripts/run_study.py study=part report=false arms=mha,gqa 'name=a b' data_dir=artifacts/data"
    (folder / "study.json").write_text(json.dumps(record))
    markdown = study_markdown(found := findings_of(folder), sections(found))
    assert "\npython scripts/run_study.py study=part 'name=a b' data_dir=artifacts/data\n" in markdown
    assert "report=false" not in markdown


def test_a_source_with_changes_is_named_and_where_they_are_kept(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "changed", segments=0, extras=False)

    def said() -> str:
        return " ".join(sections(findings_of(folder))[-1].after)

    assert "+changes" not in said()
    change(folder, "*/summary.json", commit="a" * 40 + "+changes")
    assert "All were made from a working tree that differed from its commit (+changes). The difference was not kept." in said()
    for run in folder.glob("*-seed0"):
        (run / "changes.diff").write_text("")
    assert "The difference is in changes.diff in the folders of 5 of them; of the others it was not kept." in said()
    for run in folder.glob("*-lr*"):
        (run / "changes.diff").write_text("")
    assert said().startswith("All were made") and "The difference is in changes.diff in the folder of each." in said()


def test_runs_of_one_arm_that_are_no_repetitions_are_told(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "mixed")
    change(folder, "gqa-*-seed1/summary.json", setup_hash="other")
    assert "the runs of gqa differ in more than their seed" in told(folder)[0]


def test_a_run_whose_test_split_was_scored_otherwise_is_told(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "protocols")
    assert "not scored alike" not in told(folder)[0]
    change(folder, "gqa-*-seed1/evaluations/*.json", max_tokens=1000)
    markdown, content = told(folder)
    assert "the test split was not scored alike in all runs" in markdown
    assert any("gqa-lr0.005-seed1 (max_tokens=1000" in note for note in content["notes"])
    assert "how the test split was scored" in content["unequal"]


def test_one_run_evaluated_again_in_another_way_changes_no_figure(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "again")
    before = load_results(folder).values()
    for changes in ({"max_tokens": 1000, "evaluated_tokens": 1000}, {"stride_fraction": 0.1}):
        for file in list(folder.glob("gqa-*-seed1/evaluations/stdlib-test-00000000.json")):
            record = json.loads(file.read_text()) | changes | {"bits_per_byte": 9.0, "finished_at": "2030-01-01"}
            file.with_name(f"stdlib-test-{len(changes)}.json").write_text(json.dumps(record))
    assert load_results(folder).values() == before


def test_all_runs_evaluated_again_give_the_newer_figures(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "anew")
    for file in list(folder.glob("*/evaluations/stdlib-test-00000000.json")):
        record = json.loads(file.read_text())
        file.with_name("a-whole.json").write_text(json.dumps(record | {"bits_per_byte": 9.0, "finished_at": "2030-01-01"}))
        os.utime(file.with_name("a-whole.json"), (0, 0))  # copied from elsewhere
    assert {bits for by_seed in load_results(folder).values().values() for bits in by_seed.values()} == {9.0}


def test_a_study_says_how_far_its_seeds_differ_by_what_they_have_learned_to_copy(tmp_path: Path) -> None:
    """The picture shows every run; the correlation is that of deviations from an arm's mean, whatever the arms differ by."""
    folder = write_study(tmp_path / "copying", seeds=(0, 1, 2, 3), segments=0)
    gains, losses = {}, {}
    for place, path in enumerate(sorted(folder.glob("*/evaluations/*.json"))):
        record = json.loads(path.read_text())
        record["extras"]["repeats"]["gain"] = gains[path.parts[-3]] = 0.1 + 0.05 * (7 * place % 11)
        losses[path.parts[-3]] = record[BITS_PER_BYTE.name]
        path.write_text(json.dumps(record))
    findings = findings_of(folder)
    apart = []
    for arm in findings.arms:
        of_arm = np.array([(gains[run.folder.name], losses[run.folder.name]) for run in arm.runs])
        apart.append(of_arm - of_arm.mean(axis=0))
    x, y = np.concatenate(apart).T
    found = findings.copying_correlation
    assert found == (pytest.approx(np.corrcoef(x, y)[0, 1]), len(x))
    words = " ".join(word for section in sections(findings) for word in section.words)
    said = f"of {len(x)} runs and what repetition in the context saves them correlate by {found[0]:.2f}"
    assert said.replace("-", "−") in words
    picture = study_pictures.copying(findings)
    assert picture is not None
    plot = picture.panels[0][1]
    assert isinstance(plot, Plot)
    drawn = {(mark.x, mark.y) for series in plot.series for mark in series.marks}
    assert drawn == {(gains[name], losses[name]) for name in gains}
    assert len(plot.series) == len({arm.info["family"] for arm in findings.arms})  # a family, not an arm: few names


def test_extras_are_means_over_seeds_and_what_is_equal_for_all_is_said_once(full: Path) -> None:
    results = load_results(full)
    ranks = {
        run.arm: [r.evaluation()["extras"]["latents"]["effective_rank"] for r in results.runs if r.arm == run.arm]  # type: ignore[index]
        for run in results.runs
        if run.arm.startswith("mla")
    }
    found = findings_of(full).extras["latents"]
    assert {arm: figures["effective_rank"].mean for arm, figures in found.items()} == pytest.approx(
        {arm: np.mean(of_arm) for arm, of_arm in ranks.items()}
    )
    markdown = (full / "report.md").read_text()
    assert "For all: tokens sampled 8,192; latent width 64" in markdown
    assert re.search(r"^\| gqa \|( – \|)+$", markdown, flags=re.M)


def test_recall_is_shown_by_task_and_length_with_answers_where_the_corpus_asks_questions(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "recall", segments=0)
    assert "| arm | passkey in 128: share right |" in told(folder)[0]
    answers = {
        "accuracy": 0.75,
        "chance": 0.125,
        "newest": 0.25,
        "by_pairs": [{"pairs": 4, "accuracy": 0.875}, {"pairs": 8, "accuracy": 0.5}],
    }
    for path in folder.glob("*/evaluations/*.json"):
        record = json.loads(path.read_text())
        record["extras"]["recall"] = {"passkey": None, "copying": None, "answers": answers}
        path.write_text(json.dumps(record))
    found = findings_of(folder).extras["recall"]["mla"]
    assert {name: mean.mean for name, mean in found.items()} == pytest.approx(
        {
            "answers: share right": 0.75,
            "answers: share by guessing": 0.125,
            "answers: share by saying the newest value": 0.25,
            "answers of 4 pairs: share right": 0.875,
            "answers of 8 pairs: share right": 0.5,
        }
    )


def test_what_is_at_its_floor_for_every_seed_of_an_arm_is_said(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "floor", segments=0)
    for path in folder.glob("*/evaluations/*.json"):
        record = json.loads(path.read_text())
        arm, seed = path.parts[-3].split("-")[0], path.parts[-3]
        for entry in record["extras"]["recall"]["passkey"]:
            entry["at_floor"] = arm == "mla" or (arm == "gqa" and seed.endswith("0"))
        record["extras"]["repeats"] = {"gain": 0.01 * len(arm), "at_floor": True}
        path.write_text(json.dumps(record))
    markdown = told(folder)[0]
    notes = [line for line in markdown.splitlines() if "At its floor, where a figure says nothing" in line]
    assert any("passkey in 128 of mla" in note and "gqa" not in note for note in notes)
    assert any(note.count("repeats of ") == 1 and "gqa" in note and "mla" in note for note in notes)


def test_an_extra_that_this_file_has_never_heard_of_is_shown_too(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "new")
    for path in folder.glob("*/evaluations/*.json"):
        record = json.loads(path.read_text())
        record["extras"] = {
            "telepathy": {"hit_rate": 0.25 + 0.01 * len(path.parts[-3]), "share": 0.5, "cards": [1, 2]},
            "absent": None,
        }
        path.write_text(json.dumps(record))
    markdown = told(folder)[0]
    assert "| arm | hit rate | share |" in markdown  # its own word, not the one that another extra's share has
    assert "cards" not in markdown


def test_a_run_that_the_sweep_shares_with_the_study_has_one_row(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "shared", sweep=True)
    record = json.loads((folder / "study.json").read_text())
    record["sweep"].append(record["runs"][0])
    (folder / "study.json").write_text(json.dumps(record))
    rows = list(csv.DictReader(study_csv(load_results(folder)).splitlines()))
    assert len({row["run"] for row in rows}) == len(rows) == 30


def test_runs_of_one_arm_that_differ_are_a_difference_even_where_every_arm_has_it(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "kernels")
    facts = {fact.name: fact.equal for fact in findings_of(folder).facts}
    assert facts["attention kernel that ran"] and facts["seed: order of the data"]
    for path in folder.glob("*-seed1/summary.json"):
        summary = json.loads(path.read_text())
        path.write_text(json.dumps(summary | {"kernel": "reference"}))
    assert not {fact.name: fact.equal for fact in findings_of(folder).facts}["attention kernel that ran"]


# --- learning rates, staircase, curves -------------------------------------------------------------------------------


def test_the_sweep_shows_every_point_and_the_rate_that_was_chosen(full: Path) -> None:
    found = findings_of(full)
    assert [sweep.arm for sweep in found.sweeps] == list(ARMS)
    for sweep in found.sweeps:
        assert sorted(sweep.losses) == [0.0025, 0.005, 0.01]
        assert sweep.chosen == ARMS[sweep.arm].best_lr
        assert sweep.doubt is not None and sweep.doubt.factor is not None and 1 < sweep.doubt.factor < 3
        assert sweep.doubt.cubic_lr is None, "three rates"
        curve = sweep.parabola()
        assert curve[0] == pytest.approx((0.0025, sweep.losses[0.0025]))
        assert curve[-1] == pytest.approx((0.01, sweep.losses[0.01]))
        assert min(curve, key=lambda point: point[1])[0] == pytest.approx(ARMS[sweep.arm].best_lr, rel=0.05)


def test_the_table_at_one_shared_rate_takes_runs_with_the_whole_budget_only(full: Path, tmp_path: Path) -> None:
    shared = findings_of(full).shared
    assert shared is not None
    assert shared.lr == SHARED_LR
    at_rate = {run.arm: run.evaluation()["bits_per_byte"] for run in load_results(full).sweep if run.lr == SHARED_LR}  # type: ignore[index]
    assert {arm: mean.mean for arm, mean in shared.means.items()} == at_rate
    assert {mean.n for mean in shared.means.values()} == {1}
    assert "All arms at one learning rate, 0.005" in (full / "report.md").read_text()
    short_sweep = write_study(tmp_path / "short", sweep=True)
    assert findings_of(short_sweep).shared is None
    assert "There is no table at one shared rate" in told(short_sweep)[0]


def test_the_steps_of_the_staircase_add_up_and_are_those_of_the_verdicts(full: Path) -> None:
    found = findings_of(full)
    assert [arm for arm, _ in found.staircase] == STAIRCASE
    steps = [verdict.contrast.difference for _, verdict in found.staircase if verdict is not None]
    first, last = found.arm("mha").mean, found.arm("mla").mean
    assert first is not None and last is not None
    assert sum(steps) == pytest.approx(last.mean - first.mean)


def test_curves_are_means_over_seeds_with_bands_and_differences_within_a_seed(full: Path) -> None:
    found = findings_of(full)
    last = {run.arm: [] for run in load_results(full).runs}  # type: ignore[var-annotated]
    for run in load_results(full).runs:
        last[run.arm].append(run.metrics[-1]["val/loss"])
    for arm, points in over_seeds(found.curves).items():
        assert points[-1].x == TOKENS
        assert (points[-1].mean, points[-1].low, points[-1].high) == pytest.approx(
            (np.mean(last[arm]), min(last[arm]), max(last[arm]))
        )
    gap = found.gaps(found.curves)["mqa"][-1]
    differences = np.subtract(last["mqa"], last["mha"])
    assert (gap.mean, gap.low, gap.high) == pytest.approx((differences.mean(), differences.min(), differences.max()))


def test_another_metric_has_its_own_unit_everywhere(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "loss", metric="loss", segments=0)
    markdown = told(folder)[0]
    assert re.search(r"is [\d.]+ ± [\d.]+ nats per token \([\d.]+ ± [\d.]+ bits per byte\) better than", markdown)
    assert "| difference, nats per token | in bits per byte |" in markdown


# --- words and figures -----------------------------------------------------------------------------------------------


def test_names_are_shown_as_they_are_whatever_they_are_made_of(tmp_path: Path) -> None:
    folder = write_study(
        tmp_path / "hostile", HOSTILE, contrasts=[list(HOSTILE)], question="<script>alert(1)</script> & a | b?"
    )
    write_report(load_results(folder), folder)
    markdown, page = ((folder / name).read_text() for name in ("report.md", "report.html"))
    assert "<script>alert" not in page and "<b>a</b>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; a | b?" in page
    assert "&lt;b&gt;a&lt;/b&gt;&amp;" in page
    blocks = re.findall(r"(?:^\|.*\n)+", markdown, flags=re.M)
    assert len(blocks) > 5
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in block.splitlines()}) == 1, block


def test_nothing_in_a_record_can_leave_its_place_in_the_markdown_or_compute_in_a_spreadsheet(tmp_path: Path) -> None:
    arms = {"=1+1": Truth("mha", 1.8, 2048), "\x1b[2Jm": Truth("mla", 1.9, 640)}
    folder = write_study(tmp_path / "sent", arms, contrasts=[list(arms)], seeds=(0,), segments=0, extras=False)
    record = json.loads((folder / "study.json").read_text())
    record["command"] = "python scripts/run_study.py '```\n# forged\n```'"
    (folder / "study.json").write_text(json.dumps(record))
    found = findings_of(folder)
    markdown = study_markdown(found, sections(found))
    assert "\x1b" not in markdown and r"\\x1b\[2Jm" in markdown
    assert not re.search(r"^# forged", markdown, flags=re.M) and "\n````sh\n" in markdown
    rows = list(csv.DictReader(study_csv(found.results).splitlines()))
    assert {row["arm"] for row in rows} == {"'=1+1", r"\x1b[2Jm"}
    assert all(not cell.startswith(("=", "+", "@")) for row in rows for cell in row.values())


def test_arms_of_a_family_share_a_colour_and_never_colour_and_shape(full: Path) -> None:
    found = styles({"mha": "mha", "gqa": "gqa", "mla": "mla", "plain": "mla", "new": "other"})
    assert found["mla"].colour == found["plain"].colour
    assert len({style.colour for style in found.values()}) == 4
    alone = styles({arm: "mla" for arm in MANY})
    for of_study in (found, alone):
        assert len({(style.colour, style.marker) for style in of_study.values()}) == len(of_study)


@pytest.mark.parametrize("colour", [INK, "#595959", *FAMILY_COLOURS.values(), *COLOURS, *map(darker, COLOURS)])
def test_what_is_drawn_stands_out_on_a_dark_page_too(colour: str) -> None:
    assert contrast(in_the_dark(colour), DARK_PAPER) >= 4.5


def test_paper_turns_into_dark_paper_and_greys_keep_their_order() -> None:
    assert in_the_dark(PAPER) == DARK_PAPER
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    light = [INK, "#595959", "#8c8c8c", "#bdbdbd", "#e6e6e6", PAPER]
    found = [contrast(in_the_dark(grey), DARK_PAPER) for grey in light]
    assert found == sorted(found, reverse=True) and len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (512, "512"),
        (2048, "2,048"),
        (20_000, "20k"),
        (12_288, "12,288"),
        (2e6, "2M"),
        (0.005, "0.005"),
        (-0.5, "−0.5"),
    ],
)
def test_numbers_on_axes_are_short(value: float, text: str) -> None:
    assert short(value) == text


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_the_report_where_the_runs_lie_and_ends_with_a_json_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_study(tmp_path / "mine", seeds=(0, 1), segments=0)
    assert report.main(["study=demo", "name=mine", f"runs_dir={tmp_path}"]) == 0
    text = capsys.readouterr().out.splitlines()[-1]
    assert len(text) <= 1024
    line = json.loads(text)
    assert (line["study"], line["runs"], line["missing"]) == ("mine", 10, 0)
    assert (line["report"], line["record"]) == (str(folder / "report.html"), str(folder / "report.json"))
    assert Path(line["report"]).is_file() and Path(line["record"]).is_file()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["study=absent"], "absent holds no study.json"),
        (["tracking=wandbb"], "tracking=wandbb is unknown; did you mean wandb"),
        (["seeds=1"], "seeds is not an option here"),
    ],
)
def test_the_command_refuses_in_one_sentence(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        report.main([*arguments, f"runs_dir={tmp_path}"])


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "closed", seeds=(0,), segments=0, extras=False)
    (folder / "figures").write_text("not a folder")
    with pytest.raises(UserError, match=r"figures is no folder, as it has to be: move it away"):
        write_report(load_results(folder), folder)
    (folder / "figures").unlink()
    (folder / "report.json").mkdir()
    with pytest.raises(UserError, match=r"the report in .* cannot be written"):
        write_report(load_results(folder), folder)
