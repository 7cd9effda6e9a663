"""Text to train and test on: any folder of text files, split into training and held-out files, drawn in windows."""

from __future__ import annotations

import gzip
import hashlib
import math
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from jetkernels.model import Tokenizer
from jetkernels.model.tokenizer import ENDS_OF_TEXT

HELD_OUT = 20  # one file in 20, or the last 20th of a single file, is never trained on
PIECE = 1 << 20  # characters that are encoded at once: the tokenizer takes about 160 bytes for each of them
NOT_CODE = ("site-packages", "test", "tests", "idle_test")  # folders of the standard library that are left out


def seeded(*what: object) -> torch.Generator:
    """A CPU generator that depends on `what` alone: the same words and numbers give the same draws.

    Every random choice of a search is drawn from a generator named by its purpose, the seed and the step. So the step
    number is the whole position in the data and in the random numbers, and nothing else has to be saved to resume.
    """
    digest = hashlib.sha256(repr(what).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def is_held_out(name: str) -> bool:
    """Whether the file of this name (relative, with slashes) is held out; depends on nothing but the name."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:4], "big") % HELD_OUT == 0


def text_files(folder: str | Path, suffix: str = "", without: Sequence[str] = ()) -> list[Path]:
    """The files below `folder` whose name ends in `suffix`, sorted, none under a folder named in `without`.

    Raises:
        NotADirectoryError: `folder` is no folder.
        FileNotFoundError: it holds no such file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"text: {folder} is not a folder")
    excluded = set(without)
    found = sorted(
        p for p in folder.rglob(f"*{suffix}") if p.is_file() and not excluded & set(p.relative_to(folder).parts)
    )
    if not found:
        raise FileNotFoundError(f"text: {folder} must hold files named *{suffix}, got none")
    return found


def standard_library() -> tuple[Path, list[Path]]:
    """The folder of this Python's standard library and its source files, tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return root, text_files(root, ".py", NOT_CODE)


def _text(path: Path) -> bytes | None:
    """The UTF-8 text in a file, that of a .gz unpacked; None if there is none."""
    raw = path.read_bytes()
    try:
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
        return None if "\0" in raw.decode("utf-8") else raw
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error):
        return None


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of at most PIECE characters, cut behind a newline where there is one."""
    start = 0
    while start + PIECE < len(text):
        end = text.rfind("\n", start, start + PIECE) + 1 or start + PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def _encoded(raw: bytes, tokenizer: Tokenizer | None) -> Tensor:
    """Token ids int64 of UTF-8 text; tokenizer None: the bytes' values."""
    if tokenizer is not None:
        first, *others = _pieces(raw.decode("utf-8"))
        encoded = [tokenizer.encode(first), *map(tokenizer.encode_continuation, others)]
        return torch.cat([torch.tensor(ids, dtype=torch.int64) for ids in encoded])
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).long() if raw else torch.empty(0, dtype=torch.int64)


def end_of_text(tokenizer: Tokenizer) -> int:
    """The token for the end of a text; ValueError where the tokenizer has none."""
    if tokenizer.end_of_text_id is None:
        raise ValueError(f"text: the tokenizer must have {' or '.join(ENDS_OF_TEXT)}, the end of a text")
    return tokenizer.end_of_text_id


def _joined(parts: Sequence[Tensor], gap: Tensor) -> Tensor:
    """The parts in one, `gap` between each two."""
    return torch.cat([piece for part in parts for piece in (gap, part)][1:])


@dataclass(frozen=True)
class TextCorpus:
    """Tokens of a folder of text, the end of a text between two files.

    A file is trained on or held out, by its name. Where that would leave less than a 40th of the tokens on one side (a
    lone file, or a few), the text is cut instead, its last 20th held out.

    Attributes:
        training: tokens to train on, int64 [n].
        held_out: tokens that are never trained on, int64 [n].
        split: "by file" or "by position".
        files: how many were read.
        skipped: files that are not UTF-8 text, nor such text packed as .gz.
        digest: of the tokens, so that a resumed run can tell its data from other data.
    """

    training: Tensor
    held_out: Tensor
    split: str
    files: int
    skipped: int
    digest: str

    @classmethod
    def from_files(
        cls, root: Path, files: Sequence[Path], tokenizer: Tokenizer | None = None, between: str | None = None
    ) -> TextCorpus:
        """Reads and encodes text files; those named .gz are unpacked.

        Args:
            root: folder of the files; their names relative to it decide which are held out.
            files: what is read.
            tokenizer: None makes one token of each byte, its value, as `Tokenizer.byte_level` does.
            between: text that is put between two files; None: the token for the end of a text, 256 among bytes.

        Raises:
            ValueError: no file holds text, or the tokenizer has no such token.
        """
        if between is None:
            gap = torch.tensor([end_of_text(tokenizer or Tokenizer.byte_level())])
        else:
            gap = _encoded(between.encode(), tokenizer)
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        skipped = 0
        for path in files:
            raw = _text(path)
            if raw is None:
                skipped += 1
            else:
                parts[is_held_out(path.relative_to(root).as_posix())].append(_encoded(raw, tokenizer))
        sizes = [sum(map(len, part)) for part in parts]
        if not sum(sizes):
            raise ValueError(f"text: {root} must hold text (UTF-8) in its {len(files)} files, got none in any")
        # By file only where that leaves something worth reading on both sides.
        if 2 * HELD_OUT * min(sizes) >= sum(sizes):
            split, training, held_out = "by file", _joined(parts[0], gap), _joined(parts[1], gap)
        else:
            split, tokens = "by position", _joined(parts[0] + parts[1], gap)
            cut = len(tokens) - max(1, len(tokens) // HELD_OUT)
            training, held_out = tokens[:cut], tokens[cut:]
        digest = hashlib.sha256(training.numpy().tobytes() + b"|" + held_out.numpy().tobytes()).hexdigest()
        return cls(training, held_out, split, len(files) - skipped, skipped, digest)

    @classmethod
    def from_folder(cls, folder: str | Path, tokenizer: Tokenizer | None = None, suffix: str = "") -> TextCorpus:
        """Every text file below `folder` whose name ends in `suffix`."""
        return cls.from_files(Path(folder), text_files(folder, suffix), tokenizer)

    @classmethod
    def from_standard_library(cls, tokenizer: Tokenizer | None = None, between: str | None = None) -> TextCorpus:
        """The source text of this Python's standard library."""
        return cls.from_files(*standard_library(), tokenizer, between)


class RowSource(Protocol):
    """Draws training rows: token ids [count, length] int64, from the generator and nothing else."""

    def rows(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """Token ids [count, length]."""
        ...


@dataclass(frozen=True)
class Windows:
    """Rows that are windows of a text, each starting anywhere; one may run from a file into the next."""

    tokens: Tensor

    def rows(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """Windows [count, length]; ValueError where the text is shorter than one."""
        if len(self.tokens) < length:
            raise ValueError(f"text: must hold at least length = {length} tokens, got {len(self.tokens)}")
        starts = torch.randint(len(self.tokens) - length + 1, (count,), generator=generator)
        return torch.stack([self.tokens[s : s + length] for s in starts.tolist()])


@dataclass(frozen=True)
class Loader:
    """Batches by step number: the same seed and step give the same batch in any process, before and after a resume.

    Attributes:
        sources: what rows are drawn from, with the share that each gets. Where that is no whole number of a batch's
            rows, chance decides in each step which of the two numbers next to it is taken, so that the share holds over
            many steps.
        batch_size: rows of a batch over all ranks.
        length: tokens of a row, one more than the positions trained on.
        seed: of the draws.
    """

    sources: Sequence[tuple[RowSource, float]]
    batch_size: int
    length: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.length < 2:
            raise ValueError(
                f"loader: batch_size >= 1 and length >= 2 are needed, got {self.batch_size} and {self.length}"
            )
        shares = [share for _, share in self.sources]
        if not shares or min(shares) < 0 or sum(shares) <= 0:
            raise ValueError(f"loader: shares must not be negative, their sum positive, got {shares}")

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> Tensor:
        """Token ids [batch_size / ranks, length] of one rank.

        Args:
            step: number of the batch.
            rank: whose rows: every ranks-th row of the batch, from row `rank` on.
            ranks: how many there are.
        """
        if self.batch_size % ranks:
            raise ValueError(f"loader: batch_size must be a multiple of the {ranks} ranks, got {self.batch_size}")
        generator = seeded("batch", self.seed, step)
        total = sum(share for _, share in self.sources)
        # Systematic sampling: of the points 0, 1, 2, ... moved by one random offset, those in each source's part of the
        # batch.
        offset = torch.rand((), generator=seeded("shares", self.seed, step), dtype=torch.float64).item()
        ends = [share / total * self.batch_size for share in accumulate(share for _, share in self.sources)]
        bounds = [0, *(math.ceil(end - offset) for end in ends[:-1]), self.batch_size]
        counts = [end - start for start, end in pairwise(bounds)]
        drawn = [source.rows(n, self.length, generator) for (source, _), n in zip(self.sources, counts) if n]
        return torch.cat(drawn)[rank::ranks]
