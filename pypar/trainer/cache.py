"""Tokenised data on disk, memory-mapped: built once per host, whole or not there.

A cache is a folder named after a hash of paths, sizes, mtimes and the tokenizer:
tokens.bin  all documents one after the other, each with its end token; uint16, or uint32 for large vocabularies
ends.bin    int64, where each document ends in tokens.bin
meta.json   counts, dtype, sha256 of tokens.bin
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pypar.atomic import sync
from pypar.trainer.documents import find_files, read_text
from pypar.trainer.errors import TrainError, reason
from pypar.trainer.tokens import Tokens

FORMAT = 1


@dataclass(frozen=True)
class TokenCache:
    """tokens: [num_tokens], read-only memory map. ends: int64 [num_documents]."""

    tokens: np.ndarray
    ends: np.ndarray
    meta: dict[str, Any]


def default_folder() -> Path:
    """`pypar` in the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pypar" / "tokens"


def build(paths: Sequence[str], tokens: Tokens, folder: Path) -> Path:
    """Returns the cache of this data in `folder`, tokenising it when it is not there. Raises TrainError."""
    files = find_files(paths)
    target = folder / _key(files, tokens)
    if (target / "meta.json").is_file():
        return target
    aside = folder / f".tmp-{os.getpid()}-{target.name}"
    try:
        _clean(folder)
        aside.mkdir(parents=True)
        _write(aside, files, paths, tokens)
        try:
            aside.rename(target)
        except OSError:
            # Another run was faster; its cache has the same content.
            if not (target / "meta.json").is_file():
                raise
        sync(folder)
    except OSError as error:
        raise TrainError(
            f"cannot write the token cache: {reason(error)}; free space or choose another --cache-dir", 1
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def load(path: Path) -> TokenCache:
    """Maps a cache that `build` returned. Raises TrainError when it was damaged since."""
    try:
        meta = json.loads((path / "meta.json").read_text())
        numbers = np.memmap(path / "tokens.bin", dtype=meta["dtype"], mode="r")
        ends = np.fromfile(path / "ends.bin", dtype=np.int64)
        if len(numbers) != meta["num_tokens"] or len(ends) != meta["num_documents"]:
            raise ValueError(f"{len(numbers)} tokens instead of {meta['num_tokens']}")
    except (OSError, ValueError, KeyError) as error:
        raise TrainError(
            f"the token cache {path} is damaged ({reason(error)}): delete that folder, try again"
        ) from error
    return TokenCache(numbers, ends, meta)


def _key(files: Sequence[Path], tokens: Tokens) -> str:
    digest = hashlib.sha256(f"{FORMAT} {tokens.identity}\n".encode())
    for path in files:
        try:
            stat = path.stat()
        except OSError:
            continue
        digest.update(f"{path.absolute()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:24]


def _write(folder: Path, files: Sequence[Path], paths: Sequence[str], tokens: Tokens) -> None:
    dtype = np.dtype(np.uint16 if tokens.vocab_size <= 1 << 16 else np.uint32)
    digest = hashlib.sha256()
    ends: list[int] = []
    total = 0
    skipped: Counter[str] = Counter()
    with open(folder / "tokens.bin", "wb") as out:
        for path in files:
            text, why = read_text(path)
            if why:
                skipped[why] += 1
                continue
            encoded = tokens.encode(text)
            # bytes are their own array of uint8; from a list numpy would go through Python integers one by one.
            numbers = np.frombuffer(encoded, np.uint8) if isinstance(encoded, bytes) else np.asarray(encoded)
            document = np.append(numbers.astype(dtype), dtype.type(tokens.end)).tobytes()
            out.write(document)
            digest.update(document)
            total += len(numbers) + 1
            ends.append(total)
    if not ends:
        counts = ", ".join(f"{number} {why}" for why, number in sorted(skipped.items()))
        named = " ".join(paths) or "the standard library"
        raise TrainError(f"--data {named}: no text in it ({counts}); give files of UTF-8 text")
    np.asarray(ends, dtype=np.int64).tofile(folder / "ends.bin")
    meta = {
        "format": FORMAT,
        "dtype": dtype.name,
        "num_tokens": total,
        "num_documents": len(ends),
        "skipped": dict(skipped),
        "tokens": tokens.identity,
        "sha256": digest.hexdigest(),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    for name in ("tokens.bin", "ends.bin", "meta.json"):
        sync(folder / name)


def _clean(folder: Path, older_than_s: float = 86400.0) -> None:
    """Removes what builds left that were killed a day ago or earlier."""
    for path in folder.glob(".tmp-*"):
        if time.time() - path.stat().st_mtime > older_than_s:
            shutil.rmtree(path, ignore_errors=True)
