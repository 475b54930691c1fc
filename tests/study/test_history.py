"""What was added to a study once there was something to look at is exploratory, whoever declares it."""

from __future__ import annotations

from typing import Any, cast

from harness.runs.records import DeclarationRecord, StudyRecord
from harness.study.history import additions, extended

PAIR, LATER = ("mla", "gqa"), ("mla", "mha")


def record(
    history: list[DeclarationRecord] | None,
    *,
    seeds: dict[str, list[int]],
    contrasts: list[Any],
    margin: float | None = None,
    tuned: dict[str, float] | None = None,
) -> StudyRecord:
    rates = dict.fromkeys(seeds, 0.01) | (tuned or {})
    runs = [{"arm": arm, "seed": seed, "lr": rates[arm]} for arm, of_arm in seeds.items() for seed in of_arm]
    content = {"arms": dict.fromkeys(seeds), "runs": runs, "contrasts": contrasts, "margin": margin, "metric": "loss"}
    content["chosen_lr"] = tuned or {}
    return cast(StudyRecord, content if history is None else content | {"history": history})


def declare(before: StudyRecord | None, results: int, **changes: Any) -> list[DeclarationRecord]:
    given: dict[str, Any] = {"arms": {"mla": [0, 1], "gqa": [0, 1]}, "contrasts": [PAIR], "margin": None, "metric": "loss"}
    given["rates"] = dict.fromkeys(changes.get("arms", given["arms"]), 0.01)
    return extended(before, **given | changes, results=results)


def test_what_was_declared_before_the_first_result_is_not_exploratory() -> None:
    first = declare(None, 0)
    begun = record(first, seeds={"mla": [0, 1], "gqa": [0, 1]}, contrasts=[PAIR])
    # Nothing has ended yet: what is added now is declared too.
    both = declare(begun, 0, arms={"mla": [0, 1, 2], "gqa": [0, 1]}, contrasts=[PAIR, LATER], margin=0.005)
    assert [entry["results"] for entry in both] == [0, 0]
    found = additions(record(both, seeds={"mla": [0, 1, 2], "gqa": [0, 1]}, contrasts=[PAIR, LATER], margin=0.005))
    assert found.known and not (found.arms or found.seeds or found.contrasts or found.margin or found.dropped)
    assert found.reason(*PAIR) is None
    assert (
        declare(record(both, seeds={}, contrasts=[]), 7, arms=both[-1]["arms"], contrasts=[PAIR, LATER], margin=0.005) == both
    )


def test_arms_seeds_comparisons_and_margins_after_a_result_are_exploratory() -> None:
    seeds = {"mla": [0, 1, 3, 4], "gqa": [0, 1], "mha": [0]}
    begun = record(declare(None, 0), seeds={"mla": [0, 1], "gqa": [0, 1]}, contrasts=[PAIR])
    history = declare(begun, 3, arms=seeds, contrasts=[LATER, ("mla", "mha_wide")], margin=0.005)
    found = additions(record(history, seeds=seeds, contrasts=[LATER], margin=0.005))
    assert (found.arms, found.seeds, found.contrasts, found.margin) == (["mha"], {"mla": [3, 4]}, [LATER], True)
    assert found.dropped == [PAIR], "a family that shrinks after a look is told"
    assert found.reason("gqa", "mha") == "mha was added after the first result"
    assert found.reason(*PAIR) == "seeds 3, 4 of mla were added after the first result"
    assert found.reason(*LATER) == "the comparison was added after the first result"


def test_a_seed_that_was_given_up_is_no_addition_and_one_of_the_yaml_never_is() -> None:
    history = declare(None, 0, arms={"mla": [0, 1, 2], "gqa": [0, 1, 2]})
    begun = record(history, seeds={"mla": [0], "gqa": [0]}, contrasts=[PAIR])
    history = declare(begun, 2, arms={"mla": [0, 1], "gqa": [0, 1]})
    assert additions(record(history, seeds={"mla": [0, 1, 2], "gqa": [0, 1, 2]}, contrasts=[PAIR])).seeds == {}


def test_of_an_older_record_it_is_not_known_and_only_what_comes_later_is_exploratory() -> None:
    old = record(None, seeds={"mla": [0, 1], "gqa": [0, 1]}, contrasts=[PAIR])
    assert not additions(old).known and additions(old).reason(*PAIR) is None
    history = declare(old, 4, arms={"mla": [0, 1], "gqa": [0, 1], "mha": [0, 1]}, contrasts=[PAIR, LATER])
    assert [(entry["at"] is None, entry["results"]) for entry in history] == [(True, None), (False, 4)]
    found = additions(record(history, seeds={"mla": [0, 1], "gqa": [0, 1], "mha": [0, 1]}, contrasts=[PAIR, LATER]))
    assert not found.known and (found.arms, found.contrasts) == (["mha"], [LATER])
    assert found.reason(*PAIR) is None


def test_runs_that_were_there_before_any_record_leave_it_open() -> None:
    (entry,) = declare(None, 5)
    assert entry["results"] is None
    assert not additions(record([entry], seeds={"mla": [0], "gqa": [0]}, contrasts=[PAIR])).known


def test_a_metric_that_was_chosen_after_a_result_makes_every_comparison_exploratory() -> None:
    seeds = {"mla": [0, 1], "gqa": [0, 1]}
    begun = record(declare(None, 0), seeds=seeds, contrasts=[PAIR])
    assert declare(begun, 3) == begun["history"]
    history = declare(begun, 3, metric="repeats_gain")
    assert [entry["metric"] for entry in history] == ["loss", "repeats_gain"]
    changed = cast(StudyRecord, record(history, seeds=seeds, contrasts=[PAIR]) | {"metric": "repeats_gain"})
    assert additions(changed).metric
    assert (
        additions(changed).reason(*PAIR)
        == additions(changed).late("gqa", "mla")
        == "the metric was chosen after the first result"
    )
    assert not additions(cast(StudyRecord, changed | {"metric": "loss"})).metric, "back to the one that was declared"

    older = [cast(DeclarationRecord, {key: value for key, value in begun["history"][0].items() if key != "metric"})]
    told = record(older, seeds=seeds, contrasts=[PAIR])
    assert not additions(told).metric and declare(told, 3) == older
    assert [entry["metric"] for entry in declare(told, 3, metric="repeats_gain")] == ["loss", "repeats_gain"]


def test_a_rate_that_was_chosen_again_after_a_result_makes_its_arm_exploratory() -> None:
    seeds, tuned = {"mla": [0, 1], "gqa": [0, 1]}, {"mla": 0.02}
    begun = record(declare(None, 0, rates={"mla": 0.02, "gqa": None}), seeds={"mla": [0, 1]}, contrasts=[PAIR], tuned=tuned)
    both = tuned | {"gqa": 0.03}
    swept = record(declare(begun, 2, rates=both), seeds=seeds, contrasts=[PAIR], tuned=both)
    assert additions(swept).rates == [], "a sweep was to find the rate of gqa, and did"
    untuned = record(declare(swept, 4, rates=tuned | {"gqa": 0.01}), seeds=seeds, contrasts=[PAIR], tuned=tuned)
    assert additions(untuned).rates == ["gqa"]
    assert additions(untuned).reason(*PAIR) == "the learning rate of gqa was changed after the first result"
    again = record(
        declare(untuned, 4, rates={"mla": 0.04, "gqa": 0.03}), seeds=seeds, contrasts=[PAIR], tuned=both | {"mla": 0.04}
    )
    assert additions(again).rates == ["mla"], "another grid found another rate"

    anew = tuned | {"gqa": 0.05}
    regridded = record(declare(swept, 4, rates=anew), seeds=seeds, contrasts=[PAIR], tuned=anew)
    assert additions(regridded).rates == ["gqa"], "a second sweep, after a result at the first one's rate was seen"
    unseen = record(declare(begun, 0, rates=both), seeds=seeds, contrasts=[PAIR], tuned=both)
    assert additions(record(declare(unseen, 0, rates=anew), seeds=seeds, contrasts=[PAIR], tuned=anew)).rates == []

    older = [cast(DeclarationRecord, {key: value for key, value in declare(None, 0)[0].items() if key != "rates"})]
    told = record(older, seeds=seeds, contrasts=[PAIR])
    assert declare(told, 4) == older and not additions(told).rates
    changed = declare(told, 4, rates=both)
    assert additions(record(changed, seeds=seeds, contrasts=[PAIR], tuned=both)).rates == ["mla", "gqa"]
