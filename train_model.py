"""Train a small GPT with one attention variant and log its perplexity and KV-cache size.

python train_model.py attention=mla
python train_model.py attention=gqa attention.n_kv_heads=1 seed=1 budget.tokens=500000
python train_model.py -m attention=mha,gqa,mqa,mla_plain,mla      runs all, one after the other
python train_model.py dataset=local dataset.path=my/texts         your own .txt .md .jsonl .parquet

The same command continues an interrupted run; a finished one is left as it is (overwrite=true trains anew).
"""

# The environment comes first: what follows may only exist in the project's .venv.
# ruff: noqa: E402
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # -I, -P and PYTHONSAFEPATH leave it out

from harness.entry.bootstrap import enter_environment

enter_environment()

import contextlib
import datetime
import json

from tqdm import tqdm

from harness.config.compose import load_train_config
from harness.config.identity import shared_fields
from harness.config.schema import TrainConfig
from harness.entry.cli import pasteable, run_hydra
from harness.evaluation.evaluate import split_metrics
from harness.evaluation.perplexity import SplitResult
from harness.runs.corpus import check_text_unchanged, load_data, refuse_other_data
from harness.runs.folder import claimed, finished, put_back, run_folder, short_line
from harness.runs.records import RunSummary, read_summary, save
from harness.runs.session import Session
from harness.training.interruption import Interrupted, interruptible
from harness.training.loop import Step
from harness.training.nonfinite import NonFiniteError
from harness.training.parallel import Workers, open_workers
from harness.training.schedule import steps_due


def main(overrides: list[str]) -> int:
    """Train the configured run to its end, from its newest checkpoint if there is one. The status to exit with."""
    config = load_train_config(overrides)
    with open_workers(config.device, shared_fields(config)) as workers:
        return train_run(config, workers, overrides)


def train_run(config: TrainConfig, workers: Workers, overrides: list[str]) -> int:
    """As `main`, by this process alone or by all of `workers`, of which the first decides and writes."""
    workers.first(lambda: put_back(config))
    session = workers.in_turn(lambda: Session(config, workers))
    run = workers.first(lambda: run_folder(config))
    if workers.first(lambda: finished(run) and not config.overwrite):
        workers.first(lambda: check_text_unchanged(config, run))
        return say_finished(run) if workers.is_first else 0
    data = workers.in_turn(lambda: load_data(config, verify=workers.local_rank == 0))
    refuse_other_data(config, data, workers)

    with interruptible() as session.interruption:
        try:
            with contextlib.ExitStack() as held:

                def claim() -> None:
                    session.writer.written = held.enter_context(claimed(config, workers.patience))

                workers.first(claim)
                session.open(data)
                summary = train_session(session)
                if workers.is_first:
                    save(run / "summary.json", RunSummary, summary)
        except Interrupted:
            kept = [each for each in overrides if each.partition("=")[0] != "overwrite"]
            return say_interrupted(session, kept if session.saved else overrides)
        except NonFiniteError:
            if not workers.is_first:
                workers.leave()
            raise
    if workers.is_first:
        print(short_line(summary, run / "summary.json"))
    return 0


def train_session(session: Session) -> RunSummary:
    """The steps that are left, logged, evaluated and saved.

    Every process of several takes all of these steps; the first alone has something to say, log and write. Returns the
    run's summary. Raises Interrupted when a process was asked to stop: what was trained is saved then.
    """
    intervals, steps = session.config.intervals, session.schedule.steps
    is_first = session.workers.is_first
    if is_first:
        print("\n".join(session.lines()), flush=True)
    result = session.evaluate() if session.first_step == 1 else None
    session.poll()
    tell = say_above_bar if is_first else lambda line: None
    bar = tqdm(total=steps, initial=session.first_step - 1, unit="step", disable=None if is_first else True)
    # Else a line at each interval stands for it: in a log file, on a terminal without a width, as containers have.
    seen = sys.stdout.isatty() and not bar.disable and (bar.ncols is None or bar.ncols > 0)
    with session.open_tracker() as tracker, bar, session.saving(tracker):

        def evaluated(number: int, tokens: int, result: SplitResult) -> None:
            tracker.log(number, tokens, split_metrics(result))
            tell(validation_line(number, result))

        if result is not None:
            evaluated(0, 0, result)
        elif session.evaluation_due and (result := session.evaluate()) is not None:
            assert session.last_step is not None
            evaluated(session.last_step.number, session.last_step.tokens, result)
            session.evaluated_late(result)
        session.poll()
        for step in session.train():
            bar.update()
            bar.set_postfix_str(f"loss {step.loss:.3f}, {step.tokens_per_second:,.0f} tokens/s", refresh=False)
            for line in session.remarks(step):
                tell(line)
            if steps_due(step.number, steps, intervals.log):
                tracker.log(step.number, step.tokens, session.step_metrics(step))
                if not seen:
                    tell(training_line(step, steps))
            is_due = steps_due(step.number, steps, intervals.evaluate)
            result = session.evaluate() if is_due else None
            if result is not None:
                evaluated(step.number, step.tokens, result)
            stopping = session.stopping()
            if stopping or steps_due(step.number, steps, intervals.checkpoint):
                session.save(step, tracker, result, evaluation_due=is_due and result is None)
            if stopping:
                raise Interrupted
        result = result or session.evaluate()
        if result is None:
            raise Interrupted
        assert session.last_step is not None
        summary = session.summary(session.last_step, result)
        tracker.summary(summary)
        tracker.check()
    return summary


def say_interrupted(session: Session, overrides: list[str]) -> int:
    """How a run that was asked to stop goes on, from the first process; the status that says by which signal."""
    if session.workers.is_first:
        print(f"interrupted; continue with\n  {pasteable(__file__, overrides)}")
        print(json.dumps({"status": "interrupted", "run": str(session.run), "step": session.saved}), flush=True)
    return session.interruption.exit_code


def say_above_bar(line: str) -> None:
    """Above the bar, and at once also where the output is a file."""
    tqdm.write(line)
    sys.stdout.flush()


def training_line(step: Step, steps: int) -> str:
    """One line for people who see no bar."""
    left = datetime.timedelta(seconds=round((steps - step.number) * step.tokens / step.number / step.tokens_per_second))
    return (
        f"step {step.number:,} of {steps:,}: training loss {step.loss:.4f}, {step.tokens_per_second:,.0f} tokens/s, "
        f"about {left} left"
    )


def validation_line(number: int, result: SplitResult) -> str:
    """One line for people."""
    return (
        f"step {number:,}: validation loss {result.loss:.4f}, perplexity {result.perplexity:,.2f}, "
        f"{result.bits_per_byte:.4f} bits per byte"
    )


def say_finished(run: Path) -> int:
    """A finished run is left as it is."""
    print(f"{run.name} is finished; train it anew with overwrite=true, or another one with name=... or seed=...")
    print(short_line(read_summary(run), run / "summary.json"))
    return 0


if __name__ == "__main__":
    run_hydra(__file__, "train", main, description=__doc__)
