"""Text to token ids and back, with the `tokenizers` library and a tokenizer.json."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jetkernels._optional import optional
from jetkernels.files import replacing
from jetkernels.reading import reading

from .checkpoint import TOKENIZER_FILES, check_folder, read_companions
from .gguf_file import GgufFile, is_gguf
from .gguf_tokenizer import SPACE

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
# As GPT-2 and Qwen, Llama 3, and SentencePiece write it.
ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>")


class Tokenizer:
    """A tokenizer.json, as published with the models (byte-level BPE), or one token per byte.

    Attributes:
        backend: the library's tokenizer.
        companions: name -> content of the other files of a tokenizer that lay beside it (chat template, ...), for
            `save_pretrained`.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        self.backend = backend
        self.companions: dict[str, bytes] = {}

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Tokenizer:
        """Reads tokenizer.json in a local folder, or makes it of what a GGUF file says.

        Raises:
            OSError: the folder or the file is missing or cannot be opened.
            ValueError: the file is damaged, or it is a GGUF file with a tokenizer of another kind.
        """
        if is_gguf(folder):
            found = dict(GgufFile(folder).companions)
        else:
            check_folder(folder, "tokenizer")
            with reading(folder, lambda opened: read_companions(opened, TOKENIZER_FILES)) as companions:
                found = companions
        content = found.pop(TOKENIZER_FILE, None)
        if content is None:
            what = "tokenizer" if is_gguf(folder) else TOKENIZER_FILE
            raise FileNotFoundError(f"tokenizer: {folder} has no {what}")
        path = Path(folder) / TOKENIZER_FILE
        try:
            backend = _library().Tokenizer.from_buffer(content)
        except BaseException as error:  # the library's errors are bare Exceptions, and a panic in it is not even one
            if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError, ImportError)):
                raise
            raise ValueError(f"tokenizer: {path} is damaged: {error}") from None
        # As transformers, which leaves both to the call: files saved behind a training may ask for them.
        backend.no_truncation()
        backend.no_padding()
        tokenizer = cls(backend)
        tokenizer.companions = found
        return tokenizer

    @classmethod
    def byte_level(cls) -> Tokenizer:
        """256 tokens, the id of each the value of its byte in UTF-8, and `<|endoftext|>` = 256."""
        tokenizers = _library()
        vocab = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        backend.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True, normalized=False)])
        return cls(backend)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes tokenizer.json and what came with it; the folder changes in one step, whatever fails."""
        with replacing(folder) as new:
            (new / TOKENIZER_FILE).write_text(self.backend.to_str(pretty=True), encoding="utf-8")
            for name, content in self.companions.items():
                (new / name).write_bytes(content)

    @property
    def vocab_size(self) -> int:
        """Ids are below this, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def end_of_text_id(self) -> int | None:
        """The id of the first of ENDS_OF_TEXT that there is; None if there is none."""
        ids = map(self.backend.token_to_id, ENDS_OF_TEXT)
        return next((i for i in ids if i is not None), None)

    @property
    def is_byte_level(self) -> bool:
        """Whether it is that of `byte_level`."""
        return self.backend.to_str() == type(self).byte_level().backend.to_str()

    def encode(self, text: str) -> list[int]:
        """Token ids.

        Raises:
            ValueError: the text is not Unicode: bytes that were not UTF-8, read as surrogates.
        """
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):
            if not isinstance(text, str):
                raise TypeError(f"text must be a str, got {type(text).__name__}") from None
            bad = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
            if bad is None:
                raise
            raise ValueError(
                f"text must be Unicode, got the lone surrogate U+{ord(text[bad]):04X} at character {bad}"
            ) from None

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of text that stands behind other text.

        `encode`, without the space that SentencePiece puts in front of a text.

        Raises:
            ValueError: the text is not Unicode.
        """
        # A newline has the space in front of it, and merges with nothing.
        return self.encode("\n" + text)[len(self.encode("\n")) :] if self.space_in_front else self.encode(text)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text without special tokens; bytes that are not UTF-8 become U+FFFD."""
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        return self.backend.decode(ids, skip_special_tokens=True)

    def decode_continuation(self, ids: Sequence[int] | Tensor) -> str:
        """`decode` of tokens that stand behind others: SentencePiece too keeps the space that they begin with."""
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        return self.decode([*self.space_in_front, *ids])

    @cached_property
    def space_in_front(self) -> list[int]:
        """The token of the space that is put in front of each text, [] if none is."""
        ids = self.encode("\n")
        return ids[:1] if ids and self.backend.id_to_token(ids[0]) == SPACE else []

    def encode_batch(self, texts: Sequence[str], pad_token_id: int = 0) -> tuple[Tensor, Tensor]:
        """Texts -> ids and mask, both [B, T] int64, padded on the left."""
        rows = [self.encode(text) for text in texts]
        T = max(map(len, rows), default=0)
        ids = torch.full((len(rows), T), pad_token_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for n, row in enumerate(rows):
            ids[n, T - len(row) :] = torch.tensor(row, dtype=torch.int64)
            mask[n, T - len(row) :] = 1
        return ids, mask


class StreamDecoder:
    """Turns tokens that arrive one by one into text, holding back characters whose bytes are not all there yet.

    Args:
        tokenizer: of the tokens.
        is_continuation: whether they stand behind others (`Tokenizer.decode_continuation`).
    """

    # More than the tokens that one character can be spread over; a longer incomplete tail is not text.
    MAX_PENDING = 8

    def __init__(self, tokenizer: Tokenizer, is_continuation: bool = False):
        self.tokenizer = tokenizer
        self.context: list[int] = tokenizer.space_in_front if is_continuation else []
        self.pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that `token` completes, possibly empty."""
        self.pending.append(token)
        text = self._text()
        if text.endswith("\ufffd") and len(self.pending) < self.MAX_PENDING:
            return ""
        return self._emit(text)

    def finish(self) -> str:
        """What is still held back."""
        return self._emit(self._text()) if self.pending else ""

    def _text(self) -> str:
        # Decoded behind what came last: a decoder may treat the start of a text in its own way.
        before = self.tokenizer.decode(self.context)
        return self.tokenizer.decode(self.context + self.pending)[len(before) :]

    def _emit(self, text: str) -> str:
        self.context, self.pending = self.pending, []
        return text


def _library() -> Any:
    return optional("tokenizers", "model", "reading and writing text")


def _byte_symbols() -> list[str]:
    """The character by which byte-level BPE writes each byte: itself if visible in Latin-1, else one from U+0100 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(byte) if byte in visible else chr(next(hidden)) for byte in range(256)]
