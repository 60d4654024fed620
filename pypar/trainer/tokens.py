"""Text to token numbers and back: bytes, or a `tokenizers` file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from pypar.trainer.errors import TrainError, reason

END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")


class Tokens(Protocol):
    """vocab_size: with the end-of-document token `end` included. identity: changes when the numbering does."""

    vocab_size: int
    end: int
    identity: str

    def encode(self, text: str) -> Sequence[int]: ...

    def decode(self, numbers: Sequence[int]) -> str: ...


class ByteTokens:
    """UTF-8 bytes are tokens 0 to 255; 256 ends a document."""

    vocab_size = 257
    end = 256
    identity = "bytes"

    def encode(self, text: str) -> Sequence[int]:
        return text.encode("utf-8")

    def decode(self, numbers: Sequence[int]) -> str:
        return bytes(n for n in numbers if n < 256).decode("utf-8", errors="replace")


class FileTokens:
    """A JSON file of the `tokenizers` library. Without a known end-of-document token it gets one more number."""

    def __init__(self, path: Path):
        from tokenizers import Tokenizer

        try:
            content = path.read_bytes()
            self._tokenizer: Any = Tokenizer.from_buffer(content)
        except OSError as error:
            raise TrainError(f"--tokenizer {path}: {reason(error)}") from error
        except Exception as error:
            raise TrainError(f"--tokenizer {path}: not a tokenizers JSON file ({reason(error)})") from error
        size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        known = (self._tokenizer.token_to_id(name) for name in END_NAMES)
        self.end = next((number for number in known if number is not None), size)
        # Numbers may have gaps: the highest counts.
        highest = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
        self.vocab_size = max(size, highest + 1, self.end + 1)
        self.identity = "file " + hashlib.sha256(content).hexdigest()

    def encode(self, text: str) -> Sequence[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, numbers: Sequence[int]) -> str:
        return self._tokenizer.decode([n for n in numbers if n != self.end])


def load_tokens(path: str | None) -> Tokens:
    """path: None or "bytes" for bytes. Raises TrainError when the file is no tokenizer."""
    if path is None or path == "bytes":
        return ByteTokens()
    return FileTokens(Path(path))
