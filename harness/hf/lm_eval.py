"""Standard tasks through lm-evaluation-harness (EleutherAI, doi 10.5281/zenodo.12608602): it asks, our model answers.

`Answers` knows the model and nothing of the harness; `as_language_model` is the harness's LM around it, `load_task` and
`run_task` are its tasks. The one file that imports lm_eval, and only when one of these functions is called.

Letters: B batch, T tokens, N scored tokens, D d_model, C vocabulary.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from harness.data import Tokenizer
from harness.errors import UserError, as_user_error, in_a_line
from harness.evaluation.evaluate import CacheChoice
from harness.evaluation.perplexity import cut_windows
from modeling.generation import generate
from modeling.gpt import GPT

Tokens = Sequence[int]

_LOGITS_TOKENS = 4096  # logits are held for so many scored tokens at a time
_DEFAULT_NEW_TOKENS = 256  # the harness's, where a task does not say
_UNSAFE = "the task {} runs the programs that a model writes, which is not done here: take another one"
# How a task may call the number of new tokens, in the harness's order of preference.
_NEW_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclass(frozen=True)
class Writing:
    """How a continuation is written and where it ends. temperature 0: the likeliest token each time."""

    until: tuple[str, ...]
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None


@dataclass(frozen=True)
class Answers:
    """A causal model's answers to the harness's three questions; it is in evaluation mode already.

    batch_size: rows a call; it does not change the answers. seed: of tasks that sample. through: the kind of cache that
    everything is scored and written through, with the answers of decoding token by token; None: likelihoods are computed
    without a cache, texts through one of this precision. Raises UserError for a cache that the model cannot have.
    """

    model: GPT
    tokenizer: Tokenizer
    precision: torch.dtype
    device: torch.device
    batch_size: int
    seed: int = 0
    progress: bool = False
    through: CacheChoice | None = None

    def __post_init__(self) -> None:
        if self.through is not None:
            with as_user_error():
                self.through.cache(self.model, 1, 1)

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): log p of the continuation in nats, and whether greedy decoding writes it.

        Tokens as in `encode_pair`, windows as in `cut_pair`. An empty continuation is certain.
        """
        return self._score([encode_pair(self.tokenizer, *pair) for pair in pairs])

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """log p of each whole text in nats behind the tokenizer's opening token, in windows that overlap in the last alone.

        The same number as perplexity.evaluate_split's with per_document and a stride of one window, without the end of
        text that stands behind a document there.
        """
        opening = [self.tokenizer.opening]
        return [nats for nats, _ in self._score([(opening, self.tokenizer.encode_prompt(text)) for text in texts])]

    def continuations(self, contexts: Sequence[str], writing: Writing) -> list[str]:
        """What the model writes behind each context, up to the first of `until`, an end of text or max_new_tokens.

        A context keeps its last max_seq_len - max_new_tokens tokens. Raises UserError when that is none, or for a
        temperature, top_k or top_p out of range.
        """
        room = prompt_room(writing, self.model.max_seq_len)
        prompts = [(self.tokenizer.encode_prompt(context) or [self.tokenizer.opening])[-room:] for context in contexts]
        generator = torch.Generator(self.device).manual_seed(self.seed)
        texts = [""] * len(prompts)
        for batch in self._batches([len(prompt) for prompt in prompts], "generate"):
            with as_user_error("the task's generation_kwargs do not fit: "):
                written = self._write([prompts[number] for number in batch], writing, generator)
            for number, text in zip(batch, written, strict=True):
                texts[number] = text
        return texts

    def _score(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[tuple[float, bool]]:
        """Log-likelihood and greediness of each pair's continuation, in tokens."""
        windows = [(number, window) for number, pair in enumerate(pairs) for window in cut_pair(*pair, self.model.max_seq_len)]
        log_likelihoods, greedy = np.zeros(len(pairs)), np.ones(len(pairs), dtype=np.bool_)
        for batch in self._batches([len(inputs) for _, (inputs, _) in windows], "score"):
            numbers = np.repeat([windows[place][0] for place in batch], [len(windows[place][1][1]) for place in batch])
            nats_N, likeliest_N = self._score_batch([windows[place][1] for place in batch])
            np.subtract.at(log_likelihoods, numbers, nats_N)
            np.logical_and.at(greedy, numbers, likeliest_N)
        return list(zip(log_likelihoods.tolist(), greedy.tolist(), strict=True))

    def _score_batch(self, windows: Sequence[tuple[Tokens, Tokens]]) -> tuple[np.ndarray, np.ndarray]:
        """The targets' nats and whether each is the likeliest token, all windows' after one another."""
        shape = len(windows), max(len(inputs) for inputs, _ in windows)
        inputs_BT, scored_BT = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
        for row, (inputs, targets) in enumerate(windows):  # what pads a row stands behind all that is scored
            inputs_BT[row, : len(inputs)] = torch.tensor(inputs)
            scored_BT[row, len(inputs) - len(targets) : len(inputs)] = True
        targets_N = torch.tensor([token for _, targets in windows for token in targets]).to(self.device)
        nats, likeliest = [], []
        cache = None if self.through is None else self.through.cache(self.model, *shape)
        with torch.no_grad(), self._autocast():
            x_ND = self.model.hidden(inputs_BT.to(self.device), cache)[scored_BT.to(self.device)]
            for x, targets in zip(x_ND.split(_LOGITS_TOKENS), targets_N.split(_LOGITS_TOKENS), strict=True):
                logits_NC = self.model.logits(x)
                nats.append(F.cross_entropy(logits_NC, targets, reduction="none"))
                likeliest.append(logits_NC.argmax(dim=-1) == targets)
        return torch.cat(nats).cpu().double().numpy(), torch.cat(likeliest).cpu().numpy()

    def _write(self, prompts: Sequence[Tokens], writing: Writing, generator: torch.Generator) -> list[str]:
        stops = self.tokenizer.stops
        tokens: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(prompts)
        unfinished = set(range(len(prompts)))
        cache = self.through or CacheChoice(self.precision)
        with self._autocast():
            for token_B in generate(
                self.model,
                prompts,
                max_new_tokens=writing.max_new_tokens,
                temperature=writing.temperature,
                top_k=writing.top_k,
                top_p=writing.top_p,
                stop=stops[0] if len(stops) == 1 else None,
                cache_dtype=cache.dtype,
                window=cache.window,
                sinks=cache.sinks,
                step="eager",  # a CUDA graph would be captured anew for every batch
                generator=generator,
            ):
                token_of = token_B.tolist()
                for row in sorted(unfinished):
                    if token_of[row] in stops:
                        unfinished.remove(row)
                        continue
                    tokens[row].append(token_of[row])
                    texts[row] = self.tokenizer.decode(tokens[row])  # whole: a stop may lie across tokens
                    if any(stop in texts[row] for stop in writing.until):
                        unfinished.remove(row)
                if not unfinished:
                    break
        return [text[: min((text.find(stop) for stop in writing.until if stop in text), default=None)] for text in texts]

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision != torch.float32)

    def _batches(self, lengths: Sequence[int], what: str) -> Iterator[list[int]]:
        """Places of like length together, the longest first."""
        order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        if not self.progress:
            return iter(batches)
        from tqdm import tqdm

        return iter(tqdm(batches, desc=what, unit="batch", leave=False))


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of context and continuation as the harness's own models cut them.

    Spaces at the end of the context belong to the continuation. Both are encoded together, and the continuation is what
    follows as many tokens as the context has alone; where nothing follows, because the two melt into one token, it is
    encoded alone. An empty context is the tokenizer's opening token alone.
    """
    bare = context.rstrip()
    context, continuation = bare, context[len(bare) :] + continuation
    if not context:
        return [tokenizer.opening], tokenizer.encode(continuation)
    context_tokens = tokenizer.encode_prompt(context)
    tokens = tokenizer.encode_prompt(context + continuation)[len(context_tokens) :] or tokenizer.encode(continuation)
    return context_tokens, tokens


def cut_pair(context: Tokens, continuation: Tokens, max_seq_len: int) -> Iterator[tuple[Tokens, Tokens]]:
    """Windows (inputs, targets) whose last len(targets) outputs are scored; every token of the continuation once.

    One window with as much of the context as there is room for, where the continuation fits; otherwise perplexity's
    windows a whole window apart, the last moved back to the end, behind the context's last token.
    """
    if len(continuation) <= max_seq_len:
        if continuation:
            yield [*context, *continuation][-max_seq_len - 1 : -1], continuation
        return
    tokens = [context[-1], *continuation]
    windows = cut_windows(np.array([0, len(continuation)]), max_seq_len=max_seq_len, stride=max_seq_len)
    for start, length, skip in zip(windows.start.tolist(), windows.length.tolist(), windows.skip.tolist(), strict=True):
        yield tokens[start : start + length], tokens[start + 1 + skip : start + 1 + length]


def writing_of(settings: Mapping[str, Any]) -> Writing:
    """A task's generation_kwargs. Without do_sample a temperature above 0 samples, with do_sample=false none does.

    Raises UserError for a setting that would change the text and is not known here.
    """
    settings = dict(settings)
    until = settings.pop("until", None) or []
    given = [settings.pop(name, None) for name in _NEW_TOKENS_NAMES]
    new_tokens = next((int(number) for number in given if number is not None), _DEFAULT_NEW_TOKENS)
    temperature, samples = settings.pop("temperature", None), settings.pop("do_sample", None)
    if temperature is None:
        temperature = 1.0 if samples else 0.0
    top_k, top_p = settings.pop("top_k", None), settings.pop("top_p", None)
    if settings.pop("num_beams", 1) != 1:
        raise UserError("generation_kwargs.num_beams is not 1: there is no beam search here, set it to 1 in the task")
    if settings:
        raise UserError(
            f"generation_kwargs.{min(settings)} is not supported; until, do_sample, temperature, top_k, top_p and "
            f"{_NEW_TOKENS_NAMES[0]} are: take it out of the task"
        )
    return Writing(
        until=tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
        max_new_tokens=new_tokens,
        temperature=0.0 if samples is False else float(temperature),
        top_k=top_k or None,
        top_p=top_p,
    )


def prompt_room(writing: Writing, max_seq_len: int) -> int:
    """How many tokens of a context fit beside what is to be written. Raises UserError when none does."""
    if writing.max_new_tokens >= max_seq_len:
        raise UserError(
            f"the task writes up to {writing.max_new_tokens} new tokens and the model has {max_seq_len} positions, which "
            f"leaves none for a prompt: take a run with a longer model.max_seq_len, or set generation_kwargs.max_gen_toks "
            f"in a task of your own"
        )
    return max_seq_len - writing.max_new_tokens


# --- the harness -----------------------------------------------------------------------------------------------------


def as_language_model(answers: Answers) -> Any:
    """The harness's LM (lm_eval.api.model.LM) that answers with `answers`."""
    from lm_eval.api.model import LM

    class AnsweringModel(LM):
        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            return answers.log_likelihoods([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return answers.rolling([request.args[0] for request in requests])

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            alike: dict[Writing, list[int]] = {}
            for number, request in enumerate(requests):
                alike.setdefault(writing_of(request.args[1]), []).append(number)
            texts = [""] * len(requests)
            for writing, numbers in alike.items():
                written = answers.continuations([requests[number].args[0] for number in numbers], writing)
                for number, text in zip(numbers, written, strict=True):
                    texts[number] = text
            return texts

    return AnsweringModel()


@dataclass(frozen=True)
class ChosenTask:
    """A task, group or tag of the harness under the name that was asked for, its data there."""

    name: str
    parts: list[Any]  # what lm_eval.simple_evaluate takes: one group, or tasks
    tasks: list[Any]  # every single task in it
    manager: Any

    @property
    def writes(self) -> bool:
        """Does the model write text in it, through the cache? Likelihoods need none."""
        return any(task.OUTPUT_TYPE == "generate_until" for task in self.tasks)


def check_lm_eval() -> None:
    """Raises UserError when lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "tasks need lm-evaluation-harness, which is not installed: pip install -r requirements.txt -r "
            "requirements-extra.txt"
        )


def choose_tasks(names: Sequence[str], task_dir: Path | None = None) -> list[ChosenTask]:
    """The tasks, groups and tags of these names with their data, from task_dir's YAML files before the harness's own.

    The harness's own fetch their data from the Hugging Face hub unless it is cached. Raises UserError for an unknown
    name, a task that runs what a model writes, or one that cannot be loaded.
    """
    check_lm_eval()
    if task_dir is not None and not task_dir.is_dir():
        raise UserError(f"task_dir={task_dir} is no folder: give one with the YAML files of your tasks")
    # A metric that lies on the hub is a program; HF_EVALUATE_OFFLINE=0 lets the `evaluate` package fetch and run it.
    os.environ.setdefault("HF_EVALUATE_OFFLINE", "1")
    from lm_eval.tasks import TaskManager

    manager = None
    if task_dir is not None:  # reading the harness's 14,000 takes seconds
        manager = TaskManager(include_path=str(task_dir), include_defaults=False)
    if manager is None or not all(_written(name, manager.task_index) for name in names):
        manager = TaskManager(include_path=None if task_dir is None else str(task_dir))
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.6)
            remedy = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists all that there are"
            raise UserError(f"{name} is no task of lm-evaluation-harness{f' or {task_dir}' if task_dir else ''}; {remedy}")
        for each in _below(name, manager.task_index):
            if each in manager.task_index and (manager.task_index[each].cfg or {}).get("unsafe_code"):
                raise UserError(_UNSAFE.format(each))
    return [_load(name, manager) for name in dict.fromkeys(names)]


def _written(name: str, index: Mapping[str, Any]) -> bool:
    """Whether YAML files of this index say what the name is and all that is below it; a tag may have tasks elsewhere too."""
    return all(each in index and index[each].yaml_path is not None for each in _below(name, index))


def _below(name: str, index: Mapping[str, Any]) -> Iterator[str]:
    """The name and those of the tasks and groups that it stands for, known or not."""
    yield name
    if (entry := index.get(name)) is None:
        return
    settings = entry.cfg or {}
    children = settings.get("task") if "group" in settings else sorted(entry.tags) if entry.yaml_path is None else None
    for child in children if isinstance(children, list) else []:
        child_name = child if isinstance(child, str) else child.get("task", child.get("group"))
        if isinstance(child_name, str):
            yield from _below(child_name, index)


def _load(name: str, manager: Any) -> ChosenTask:
    try:
        loaded = manager.load([name])
    except ConnectionError as error:
        raise UserError(
            f"the data of the task {name} is not on this machine and the Hugging Face hub cannot be reached "
            f"({in_a_line(error)}): connect it, or copy a cache that holds the data to HF_HOME"
        ) from None
    except Exception as error:  # a task is whatever its YAML and its Python files say
        raise UserError(
            f"the task {name} cannot be loaded ({type(error).__name__}: {in_a_line(error)}): mend its files, or take "
            f"another task"
        ) from None
    groups, tasks = loaded.get("groups", {}), list(loaded["tasks"].values())
    for task in tasks:
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(_UNSAFE.format(task.task_name))
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"the task {task.task_name} shows pictures or plays sounds: take one of text alone")
    return ChosenTask(name, [groups[name]] if name in groups else tasks, tasks, manager)


def check_room(chosen: ChosenTask, max_seq_len: int) -> None:
    """Raises UserError, before anything is computed, for a task that writes more than the model has positions for."""
    for task in chosen.tasks:
        if task.OUTPUT_TYPE == "generate_until":
            prompt_room(writing_of(task.config.generation_kwargs or {}), max_seq_len)


def run_task(
    chosen: ChosenTask, answers: Answers, *, num_fewshot: int | None = None, limit: int | None = None
) -> dict[str, Any]:
    """Ask the model and score it.

    num_fewshot: examples in the prompt (None: what the task says; a task that insists on 0 keeps it). limit: only the
    first documents of each task. Returns `metrics` (a row for each figure: task, metric, filter, value, stderr,
    higher_is_better, num_fewshot, documents), `versions`, `lm_eval` and `fingerprint`: equal where the same documents
    were asked in the same words and scored in the same way.
    Raises UserError for a way of writing that this model has not.
    """
    import lm_eval

    results = lm_eval.simple_evaluate(
        model=as_language_model(answers), tasks=chosen.parts, task_manager=chosen.manager, num_fewshot=num_fewshot, limit=limit
    )
    return {
        "metrics": list(_rows(results)),
        "versions": results["versions"],
        "lm_eval": lm_eval.__version__,
        "fingerprint": _fingerprint(results),
    }


def _rows(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for task, figures in results["results"].items():
        for key, value in figures.items():
            metric, comma, applied = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            yield {
                "task": task,
                "metric": metric,
                "filter": applied,
                "value": _number(value),
                "stderr": _number(figures.get(f"{metric}_stderr,{applied}")),
                "higher_is_better": results["higher_is_better"].get(task, {}).get(metric),
                "num_fewshot": results["n-shot"].get(task),
                "documents": figures.get("sample_len"),
            }


def _number(value: Any) -> float | None:
    """None for what a metric did not say, or is beyond a float."""
    is_number = isinstance(value, int | float | np.number) and math.isfinite(value)
    return float(value) if is_number else None


def _fingerprint(results: Mapping[str, Any]) -> str:
    asked = [
        [sample[key] for key in ("doc_hash", "prompt_hash", "target_hash", "filter")]
        for task in sorted(results["samples"])
        for sample in results["samples"][task]
    ]
    # Where a task's files lie is no part of it.
    settings = {
        task: {key: value for key, value in config.items() if key not in ("metadata", "dataset_kwargs")}
        for task, config in results["configs"].items()
    }
    text = json.dumps([asked, settings, results["versions"]], sort_keys=True, default=_named)
    return hashlib.sha256(text.encode()).hexdigest()


def _named(value: Any) -> str:
    """Something of a task's configuration that JSON has no word for: a function by its name, not by its address."""
    named: Callable[..., Any] = value
    return getattr(named, "__qualname__", None) or type(value).__name__
