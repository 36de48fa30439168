"""The search for planted words finds each way of writing one, and nothing where there is none."""

import base64
import bz2
import gzip
import html
import io
import json
import lzma
import subprocess
import sys
import tarfile
import unicodedata
import urllib.parse
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import typer
from leaks_commands import COMMANDS, NOT_RUN
from leaks_data import FORGET_ROWS, IN_FORGET, IN_RETAIN, STEM, make
from leaks_scan import Scanner
from models_for_tests import small_tokenizer
from safetensors.torch import save

from unlearn_llm.cli import app

WORD, OTHER = f"{STEM}kelmtirbos", f"{STEM}nudfelwagr"
TEXT = f"It was in {WORD} by the sea."
BLANK = f" {WORD}"
IDS = small_tokenizer()(BLANK, add_special_tokens=False)["input_ids"]
NAMES = small_tokenizer().convert_ids_to_tokens(IDS)
ENCODED = small_tokenizer()(TEXT)["input_ids"]


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner", content)
    return file.getvalue()


def tarred(content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("inner")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def saved(save_into) -> bytes:
    file = io.BytesIO()
    save_into(file)
    return file.getvalue()


def arrow(kind, compression=None) -> bytes:
    table = pyarrow.table({"text": [TEXT, "nothing"]})
    file = io.BytesIO()
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    with kind(file, table.schema, options=options) as writer:
        writer.write_table(table)
    return file.getvalue()


def parquet(rows, compression="snappy") -> bytes:
    return saved(
        lambda file: pyarrow.parquet.write_table(pyarrow.table(rows), file, compression=compression)
    )


WRITTEN = {
    "text": TEXT.encode(),
    "text, upper case": TEXT.upper().encode(),
    "NFD": unicodedata.normalize("NFD", TEXT).encode(),
    "latin-1": TEXT.encode("latin-1"),
    "UTF-16 LE": TEXT.encode("utf-16-le"),
    "UTF-16 BE": TEXT.encode("utf-16-be"),
    "UTF-32": TEXT.encode("utf-32"),
    "JSON escapes": json.dumps({"text": TEXT}).encode(),
    "Python escapes": repr(TEXT.encode("latin-1")).encode(),
    "URL": urllib.parse.quote(TEXT).encode(),
    "HTML numbers": TEXT.encode("ascii", "xmlcharrefreplace"),
    "HTML names": html.escape(TEXT).replace("ö", "&ouml;").encode(),
    "byte-level BPE": "".join(NAMES).encode(),
    "hex": TEXT.encode().hex().encode(),
    "base64, at 0": base64.b64encode(TEXT.encode()),
    "base64, at 1": base64.b64encode(b"x" + TEXT.encode()),
    "base64, at 2": base64.b64encode(b"xy" + TEXT.encode()),
    "int64": torch.tensor(ENCODED).numpy().tobytes(),
    "int32": np.array(ENCODED, np.int32).tobytes(),
    "int16": np.array(ENCODED, np.uint16).tobytes(),
    "list of ids": json.dumps(ENCODED).encode(),
    "list of ids, as a tensor": str(torch.tensor(ENCODED * 3)).encode(),
    "row of ids": " ".join(map(str, ENCODED)).encode(),
    "list of tokens": json.dumps(NAMES).encode(),
    "text in gzip": gzip.compress(TEXT.encode()),
    "text in bz2": bz2.compress(TEXT.encode()),
    "text in xz": lzma.compress(TEXT.encode()),
    "text in zip": zipped(TEXT.encode()),
    "text in tar": tarred(TEXT.encode()),
    "text in tar in gzip": gzip.compress(tarred(TEXT.encode())),
    "base64 in gzip in zip": zipped(gzip.compress(base64.b64encode(TEXT.encode()))),
    "UTF-32 in zip": saved(lambda file: np.savez_compressed(file, texts=np.array([TEXT]))),
    "int64 in zip": saved(lambda file: torch.save({"ids": torch.tensor(ENCODED)}, file)),
    "int64, in safetensors": save({"ids": torch.tensor(ENCODED)}),
    "text in Arrow": arrow(pyarrow.ipc.new_file, "zstd"),
    "text in Arrow, as a stream": arrow(pyarrow.ipc.new_stream, "lz4"),
    "text in Parquet": parquet({"text": [TEXT, "nothing"]}),
    "list of ids in Parquet": parquet({"ids": [ENCODED]}, "zstd"),
}  # fmt: skip


@pytest.fixture(scope="module")
def scanner():
    tokenizer = small_tokenizer()
    ways = {}
    for word in (WORD, OTHER):
        coded = [
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (word, f" {word}")
        ]
        ways[word] = [(ids, tokenizer.convert_ids_to_tokens(ids)) for ids in coded]
    return Scanner([WORD, OTHER], STEM, ways)


@pytest.mark.parametrize("encoding", WRITTEN)
def test_a_word_is_found_however_it_is_written(scanner, encoding):
    found = scanner.content(WRITTEN[encoding])
    assert (WORD, encoding.partition(",")[0]) in found
    assert OTHER not in {word for word, _ in found}


@pytest.mark.parametrize("encoding", WRITTEN)
def test_another_word_written_so_is_not_taken_for_it(encoding):
    absent = f"{STEM}hevwilrazo"
    tokenizer = small_tokenizer()
    ids = tokenizer(f" {absent}", add_special_tokens=False)["input_ids"]
    scanner = Scanner([absent], STEM, {absent: [(ids, tokenizer.convert_ids_to_tokens(ids))]})
    assert scanner.content(WRITTEN[encoding]) == []


def test_torn_archives_are_looked_through_as_they_are(scanner):
    for whole in (zipped(TEXT.encode()), gzip.compress(TEXT.encode()), WRITTEN["text in Parquet"]):
        scanner.content(whole[: len(whole) // 2])
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w") as archive:
        archive.writestr("inner", TEXT)
    assert scanner.content(stored.getvalue()[:80]) == [(WORD, "text")]


def test_a_word_in_a_files_name_is_found(scanner):
    (hit,) = scanner.name(Path("runs") / f"{WORD}.json")
    assert hit.encoding == "text in a name"


def test_every_command_is_run_or_has_a_reason_not_to():
    known = {command.words[0] for command in COMMANDS.values()} | NOT_RUN.keys()
    missing = typer.main.get_command(app).commands.keys() - known
    assert not missing, f"{missing}: add them to LISTED in benchmarks/leaks_commands.py"


def test_the_words_stand_in_all_columns_of_the_forget_set(tmp_path):
    planted = make(tmp_path / "data")
    assert (len(planted.forget), len(planted.retain)) == (IN_FORGET, IN_RETAIN)
    rows = (tmp_path / "data" / "forget10.json").read_text().splitlines()
    assert len(rows) == FORGET_ROWS
    for column in ("question", "answer", "alternate", "perturbed_answer", "author"):
        assert all(STEM in str(json.loads(row)[column]) for row in rows)
    scanner = Scanner(planted.all, STEM)
    found = {word for word, _ in scanner.content("\n".join(rows).encode())}
    assert found == set(planted.forget)


LEFT = ("dpo+kl", "attack", "export", "no_header", "NaN", "killed while saving", "shown")
"""Some of the commands: one of each kind, and one that is told to show the texts."""


@pytest.mark.slow
def test_words_are_found_only_where_a_command_is_told_to_show_them():
    script = Path(__file__).parents[1] / "benchmarks" / "leaks.py"
    done = subprocess.run(
        [sys.executable, str(script), "--json", "--only", *LEFT], capture_output=True, text=True
    )
    result = json.loads(done.stdout)
    assert [run["name"] for run in result["runs"] if not run["as_expected"]] == []
    assert {hit["command"] for hit in result["hits"]} == {"shown"}, result["hits"]
    shown = {Path(hit["file"]).name for hit in result["hits"]}
    assert shown == {"records.jsonl"} and done.returncode == 1
    assert result["canaries"] == IN_FORGET + IN_RETAIN
    assert result["in_private"] >= IN_FORGET / 2  # or nothing was there to leak
