"""Whatever a corpus, a tokenizer.json or a prepared folder holds is read or refused in one sentence."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from harness.data import Tokenizer, open_prepared, prepare, verify_prepared
from harness.data.loader import WindowLoader
from harness.errors import UserError
from tests.fuzz.conftest import Fuzzing
from tests.support.corpora import BPE, BYTES, folder_of_texts, local, text
from tests.support.mutations import as_json, mutated_bytes, mutated_value


def test_a_damaged_prepared_folder_is_read_or_refused(fuzzing: Fuzzing, choice: random.Random, tmp_path: Path) -> None:
    folder_of_texts(tmp_path / "texts", 8)
    folder = prepare(local(tmp_path / "texts"), BPE, tmp_path / "data", progress=False).folder
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    meta = json.loads(whole["meta.json"])

    def attempt() -> None:
        prepared = open_prepared(folder)
        for split in prepared.splits.values():  # what was opened can be read, whatever it says
            WindowLoader(split.tokens, max_seq_len=8, batch_size=2, data_seed=0).batch(3)
            assert int(split.document_bytes.sum()) is not None and len(split.document_starts) == split.n_documents + 1
        prepared.summary()
        verify_prepared(prepared)

    for number in fuzzing.share(13):
        name = choice.choice(["meta.json", *whole])
        if name == "meta.json" and number % 2:
            (folder / name).write_bytes(as_json(mutated_value(meta, choice)))
        else:
            wrong = mutated_bytes(whole[name], choice)
            (folder / name).write_bytes(wrong)
            if len(wrong) != len(whole[name]) and name != "meta.json":  # the sizes agree: the content is what is wrong
                sizes = meta["files"] | {name: len(wrong)}
                (folder / "meta.json").write_text(json.dumps(meta | {"files": sizes}))
        fuzzing.try_one(f"{name} {number}", attempt, leaves=folder)
        for kept, content in whole.items():
            (folder / kept).write_bytes(content)


def test_a_damaged_tokenizer_is_used_or_refused(fuzzing: Fuzzing, choice: random.Random, tmp_path: Path) -> None:
    Tokenizer.train_bpe([text(seed) for seed in range(20)], 300).save(tmp_path)
    file = tmp_path / "tokenizer.json"
    whole = file.read_bytes()
    specification = json.loads(whole)

    def attempt() -> None:
        tokenizer = Tokenizer.load(file)
        tokenizer.decode(tokenizer.encode(text(99) + "\u2028 海 <|endoftext|>"))

    for number in fuzzing.share(10):
        if number % 2:
            file.write_bytes(as_json(mutated_value(specification, choice)))
        else:
            file.write_bytes(mutated_bytes(whole, choice))
        fuzzing.try_one(f"tokenizer.json {number}", attempt, leaves=tmp_path)


def _corpora() -> dict[str, bytes]:
    rows = [text(seed, 12) for seed in range(12)]
    parquet = {}
    for compression in ("none", "snappy", "zstd"):
        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"text": rows, "n": list(range(12))}), sink, compression=compression)
        parquet[f"{compression}.parquet"] = sink.getvalue()
    lines = "".join(json.dumps({"text": row, "n": 1}) + "\n" for row in rows)
    return {"a.txt": "\n".join(rows).encode(), "a.jsonl": lines.encode(), **parquet}


def test_a_damaged_corpus_is_prepared_or_refused(fuzzing: Fuzzing, choice: random.Random, tmp_path: Path) -> None:
    corpora, texts = _corpora(), tmp_path / "texts"
    texts.mkdir()
    for number in fuzzing.share(13):
        name = choice.choice(list(corpora))
        (texts / name).write_bytes(mutated_bytes(corpora[name], choice))
        fuzzing.try_one(
            f"{name} {number}", lambda: prepare(local(texts), BYTES, tmp_path / "data", progress=False), leaves=texts
        )
        (texts / name).unlink()
    left = {path.name.split("-")[0] for path in (tmp_path / "data").iterdir() if not path.name.endswith(".lock")}
    assert left == {"local"}, "a refused corpus leaves nothing"


def test_a_fuzzer_would_notice_an_error_a_change_and_a_silent_refusal(fuzzing: Fuzzing, tmp_path: Path) -> None:
    (tmp_path / "input").write_text("whole")

    def change() -> None:
        (tmp_path / "input").write_text("changed")

    def refuse() -> None:
        raise UserError("")

    for action in (lambda: 1 // 0, change, refuse):
        with pytest.raises(AssertionError):
            fuzzing.try_one("planted", action, leaves=tmp_path)
