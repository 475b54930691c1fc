"""Train one attention variant: python train_model.py [attention=mla] [dataset=...] [model=...] [seed=...]."""

# The environment comes first: what follows may only exist in the project's .venv.
# ruff: noqa: E402
from __future__ import annotations

from harness.bootstrap import enter_environment

enter_environment()

import contextlib
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.command_line import run_hydra
from harness.config import load_train_config
from harness.run import Claim, begun, finished, lock_run, read_json, run_folder, write_json, writing_to

if TYPE_CHECKING:
    from harness.evaluation.perplexity import SplitResult
    from harness.schema import TrainConfig
    from harness.session import Session
    from harness.training.parallel import Workers


def main(overrides: list[str]) -> int:
    """Train the configured run to its end, from its newest checkpoint if there is one. The status to exit with."""
    config = load_train_config(overrides)

    from harness.training.parallel import open_workers

    with open_workers(config.device) as workers:
        return train_run(config, workers, overrides)


def train_run(config: TrainConfig, workers: Workers, overrides: list[str]) -> int:
    """As `main`, by this process alone or by all of `workers`, of which the first decides and writes."""
    import torch

    from harness.build import build_model
    from harness.session import load_data, open_session
    from harness.tracking import check_tracking
    from harness.training.device import select_precision
    from harness.training.interruption import Interrupted, interruptible
    from harness.training.nonfinite import NonFiniteError
    from harness.training.optimizer import check_optimizer
    from harness.training.parallel import check_parallel
    from harness.training.schedule import build_schedule, training_steps

    steps = training_steps(config)

    def check() -> Path:
        build_schedule(config.schedule, steps)
        check_optimizer(config.optimizer)
        check_tracking(config.tracking)
        check_parallel(
            config.parallel, workers, optimizer=config.optimizer, batch_size=config.batch_size,
            precision=select_precision(config.precision, workers.device), overwrite=config.overwrite,
        )  # fmt: skip
        with torch.device("meta"):
            build_model(config, vocab_size=64)
        return run_folder(config)

    run = workers.first(check)  # what cannot work is refused before anything is written
    if workers.first(lambda: finished(run) and not config.overwrite):
        return say_finished(run) if workers.is_first else 0
    # What ended an earlier attempt may have hurt the data.
    workers.first(lambda: bool(load_data(config, verify=begun(run) and not config.overwrite)))
    data = load_data(config)  # there by now, where the machines share a disk

    with interruptible() as interruption, contextlib.ExitStack() as held:
        claim: Claim | None = None

        def claim_run() -> None:
            nonlocal claim
            held.enter_context(lock_run(run, workers.patience))
            held.enter_context(writing_to(run))
            claim = Claim(config)

        workers.first(claim_run)
        try:
            session = open_session(config, run, data, workers, steps)
            session.interruption = interruption
            if workers.is_first:
                print("\n".join(session.lines()), flush=True)
            result = session.evaluate() if session.first_step == 1 else None
            session.poll()
        except Interrupted:
            if claim is not None:
                claim.undo()
            return say_interrupted(session, overrides)
        except BaseException:
            if claim is not None:
                claim.undo()
            raise
        if claim is not None:
            claim.settle()
        try:
            summary = train_session(session, result)
        except Interrupted:
            kept = [override for override in overrides if override.partition("=")[0] != "overwrite"]
            return say_interrupted(session, kept)
        except NonFiniteError:
            if not workers.is_first:  # which says why
                return 2
            raise
        if workers.is_first:
            write_json(run / "summary.json", summary)
    if workers.is_first:
        print(json.dumps(summary))
    return 0


def train_session(session: Session, result: SplitResult | None) -> dict[str, Any]:
    """The steps that are left, logged, evaluated and saved; `result` is step 0's evaluation, None when continuing.

    Every process of several takes all of these steps; the first alone has something to say, log and write. Returns the
    run's summary. Raises Interrupted when a process was asked to stop: what was trained is saved then.
    """
    from tqdm import tqdm

    from harness.evaluation.evaluate import split_metrics
    from harness.session import steps_due
    from harness.training.interruption import Interrupted

    intervals, steps = session.config.intervals, session.steps
    is_first = session.workers.is_first
    tell = say if is_first else lambda line: None
    bar = tqdm(total=steps, initial=session.first_step - 1, unit="step", disable=None if is_first else True)
    with session.open_tracker() as tracker, bar, session.saving(tracker):

        def evaluated(number: int, tokens: int, result: SplitResult) -> None:
            facts = session.facts.metrics() if number == 0 else {}
            tracker.log(number, tokens, facts | split_metrics(result))
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
            if step.skipped is not None:
                tell(session.skipped_line(step))
            if steps_due(step.number, steps, intervals.log):
                tracker.log(step.number, step.tokens, session.step_metrics(step))
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
    return summary


def say_interrupted(session: Session, overrides: list[str]) -> int:
    """The last line of a run that was asked to stop, from the first process; the status that says by which signal."""
    if session.workers.is_first:
        said = {
            "status": "interrupted", "run": str(session.run), "step": session.saved,
            "continue": shlex.join(["python", "train_model.py", *overrides]),
        }  # fmt: skip
        print(json.dumps(said), flush=True)
    return session.interruption.exit_code


def say(line: str) -> None:
    """Above the bar, and at once also where the output is a file."""
    from tqdm import tqdm

    tqdm.write(line)
    sys.stdout.flush()


def validation_line(number: int, result: SplitResult) -> str:
    """One line for people."""
    return (
        f"step {number:,}: validation loss {result.loss:.4f}, perplexity {result.perplexity:,.2f}, "
        f"{result.bits_per_byte:.4f} bits per byte"
    )


def say_finished(run: Path) -> int:
    """A finished run is left as it is."""
    print(f"{run.name} is finished; train it anew with overwrite=true, or another one with name=... or seed=...")
    print(json.dumps(read_json(run / "summary.json")))
    return 0


if __name__ == "__main__":
    run_hydra(__file__, "train", main, description=__doc__)
