"""Finds planted words in files, however they are written down. What is planted: leaks.py.

A word is looked for as text (upper, lower and mixed case, several codes and escapes), in base64 at
every alignment, in hexadecimal, as ids of its tokens (binary or written out) and as a list of its
tokens. Archives and tables (gzip, bz2, xz, zip, tar; npz and torch's files, which are zip; Parquet,
Arrow) are unpacked first, and what is in them is looked through in the same way.
"""

import base64
import bz2
import gzip
import html.entities
import io
import json
import lzma
import os
import re
import tarfile
import unicodedata
import urllib.parse
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet

DEEPEST = 4
"""Archives within archives are unpacked so far."""
FEWEST_TOKENS = 4
"""A word of fewer tokens would be found by chance."""
ENTITIES = {ord(letter): f"&{name};" for name, letter in html.entities.entitydefs.items()}
INTEGERS = {"int64": "<i8", "int32": "<i4", "int16": "<i2"}
Needles = dict[str, list[bytes]]


class Hit(NamedTuple):
    """A planted word, where it should not be."""

    file: str
    word: str
    encoding: str


class Scanner:
    """Looks for words.

    Args:
        words: What was planted. One with a letter outside ASCII is written otherwise by most
            escapes, so that these can be told apart.
        stem: How all words begin: they are looked for one by one only where it stands.
        tokens: By word, the ids and the names of its tokens, in each way in which the word may
            be tokenised (with a blank before it, or without).
    """

    def __init__(
        self,
        words: Sequence[str],
        stem: str = "",
        tokens: Mapping[str, Sequence[tuple[Sequence[int], Sequence[str]]]] | None = None,
    ) -> None:
        self._texts = {word: spellings(word) for word in words}
        assert all(word.startswith(stem) for word in words)
        self._stem = spellings(stem) if stem else None
        self._tokens = {
            word: as_tokens(ways, word) for word, ways in (tokens or {}).items() if word in words
        }

    def file(self, path: Path) -> list[Hit]:
        """Look through a file."""
        return [Hit(str(path), word, how) for word, how in self.content(path.read_bytes())]

    def name(self, path: Path) -> list[Hit]:
        """Look through a file's name."""
        return [
            Hit(str(path), word, f"{how} in a name")
            for word, how in self.content(os.fsencode(path))
        ]

    def content(self, content: bytes) -> list[tuple[str, str]]:
        """Look through bytes; (word, encoding) of each that is there."""
        found: dict[tuple[str, str], None] = {}
        for how, unpacked in unpack(content):
            for word, encoding in self._plain(unpacked):
                found[word, " in ".join([encoding, *how])] = None
        return list(found)

    def _plain(self, content: bytes) -> Iterator[tuple[str, str]]:
        small = content.lower()
        kinds = [
            kind
            for kind, needles in (self._stem or {}).items()
            if _any_of(needles, content, small, kind)
        ]
        for word, spelt in self._texts.items():
            for kind in spelt if self._stem is None else kinds:
                if _any_of(spelt[kind], content, small, kind):
                    yield word, kind
        if not self._tokens:
            return
        bare, single = re.sub(rb"\s+", b"", content), re.sub(rb"\s+", b" ", content)
        for word, needles in self._tokens.items():
            for kind, wanted in needles.items():
                place = {"list of ids": bare, "list of tokens": bare, "row of ids": single}
                if any(needle in place.get(kind, content) for needle in wanted):
                    yield word, kind


def spellings(word: str) -> Needles:
    """Write a word in every code, in lower case where case does not matter there."""
    cases = dict.fromkeys([word, word.lower(), word.upper()])
    texts: dict[str, Callable[[str], bytes]] = {
        "text": str.encode,
        "NFD": lambda text: unicodedata.normalize("NFD", text).encode(),
        "latin-1": lambda text: text.encode("latin-1"),
        "UTF-16 LE": lambda text: text.encode("utf-16-le"),
        "UTF-16 BE": lambda text: text.encode("utf-16-be"),
        "UTF-32": lambda text: text.encode("utf-32-le"),
        "JSON escapes": lambda text: json.dumps(text)[1:-1].encode(),
        "Python escapes": lambda text: text.encode("unicode_escape"),
        "URL": lambda text: urllib.parse.quote(text).encode(),
        "HTML numbers": lambda text: text.encode("ascii", "xmlcharrefreplace"),
        "HTML names": lambda text: text.translate(ENTITIES).encode(),
        "byte-level BPE": lambda text: "".join(map(_BYTE_LETTERS.get, text.encode())).encode(),
        "hex": lambda text: text.encode().hex().encode(),
    }
    found = {
        kind: [write(text).lower() for text in cases]
        for kind, write in texts.items()
    }  # fmt: skip
    found["base64"] = [needle for text in cases for needle in in_base64(text.encode())]
    return found


def in_base64(content: bytes) -> list[bytes]:
    """Give what stands in base64 of anything that holds some bytes, for the three alignments."""
    found = []
    for shift in range(3):
        whole = base64.b64encode(b"\0" * shift + content)
        first = (0, 2, 3)[shift]  # the letters before depend on what stands before the content
        found.append(whole[first : (shift + len(content)) * 8 // 6])
    return found


def as_tokens(ways: Sequence[tuple[Sequence[int], Sequence[str]]], word: str) -> Needles:
    """Write the tokens of a word as programs write them."""
    found: Needles = {}
    for ids, names in ways:
        assert len(ids) >= FEWEST_TOKENS, f"{word} has {len(ids)} tokens only"
        for kind, dtype in INTEGERS.items():
            found.setdefault(kind, []).append(np.array(ids, dtype).tobytes())
        written = list(map(str, ids))
        found.setdefault("list of ids", []).append(",".join(written).encode())
        found.setdefault("row of ids", []).append(" ".join(written).encode())
        for as_ascii in (True, False):
            quoted = [json.dumps(name, ensure_ascii=as_ascii) for name in names]
            found.setdefault("list of tokens", []).append(",".join(quoted).encode())
    return found


def unpack(content: bytes, depth: int = 0) -> Iterator[tuple[list[str], bytes]]:
    """Yield a file's content, and everything packed in it with the kinds of packing."""
    yield [], content
    if depth == DEEPEST:
        return
    for kind, opened in UNPACKERS.items():
        try:
            inner = list(opened(content))
        except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
            # Torn archives are no archives; libraries name that in many ways.
            del error
            continue
        except (lzma.LZMAError, tarfile.TarError, pyarrow.ArrowException):
            continue
        for part in inner:
            for how, unpacked in unpack(part, depth + 1):
                yield [*how, kind], unpacked


def _gzip(content: bytes) -> Iterator[bytes]:
    if content.startswith(b"\x1f\x8b"):
        yield gzip.decompress(content)


def _bz2(content: bytes) -> Iterator[bytes]:
    if content.startswith(b"BZh"):
        yield bz2.decompress(content)


def _xz(content: bytes) -> Iterator[bytes]:
    if content.startswith(b"\xfd7zXZ"):
        yield lzma.decompress(content)


def _zip(content: bytes) -> Iterator[bytes]:
    if content.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            yield from map(archive.read, archive.namelist())


def _tar(content: bytes) -> Iterator[bytes]:
    if content[257:262] == b"ustar":
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for member in archive:
                opened = archive.extractfile(member)
                if opened is not None:
                    yield opened.read()


def _parquet(content: bytes) -> Iterator[bytes]:
    if content.startswith(b"PAR1"):
        yield _rows(pyarrow.parquet.read_table(pyarrow.BufferReader(content)))


def _arrow(content: bytes) -> Iterator[bytes]:
    if content.startswith(b"ARROW1"):
        yield _rows(pyarrow.ipc.open_file(pyarrow.BufferReader(content)).read_all())
    elif content.startswith(b"\xff\xff\xff\xff"):
        yield _rows(pyarrow.ipc.open_stream(pyarrow.BufferReader(content)).read_all())


def _rows(table: pyarrow.Table) -> bytes:
    return json.dumps(table.to_pylist(), ensure_ascii=False, default=str).encode()


UNPACKERS: dict[str, Callable[[bytes], Iterator[bytes]]] = {
    "gzip": _gzip,
    "bz2": _bz2,
    "xz": _xz,
    "zip": _zip,
    "tar": _tar,
    "Parquet": _parquet,
    "Arrow": _arrow,
}


def _any_of(needles: Sequence[bytes], content: bytes, small: bytes, kind: str) -> bool:
    return any(needle in (content if kind == "base64" else small) for needle in needles)


def _byte_letters() -> dict[int, str]:
    """Give the letter by which byte-level BPE writes each byte (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in shown]
    return {
        **{byte: chr(byte) for byte in shown},
        **{byte: chr(256 + place) for place, byte in enumerate(others)},
    }


_BYTE_LETTERS = _byte_letters()
