"""Checkpoints in a local folder: config.json and safetensors weights, one file or shards with an index."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from jetkernels._optional import optional
from jetkernels.files import replacing
from jetkernels.reading import OpenFolder, parse_json, reading

from .config import CONFIG_FILE

T = TypeVar("T")

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WEIGHT_FILES = "model*.safetensors"
MAX_SHARD_BYTES = 5 * 10**9
MANY_LAYERS = 100  # more than weights, and the config is not even tried
TIED_HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# What lies beside the weights and goes where the model goes.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
COMPANIONS = (*TOKENIZER_FILES, "generation_config.json")
# The kinds of stored weights, by their names in the files, that are numbers as they stand.
FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


# ---- loading


def opened(folder: str | Path) -> AbstractContextManager[SavedModel]:
    """The model that a local folder holds, its files open and all of one save, also while others save there.

    Raises:
        FileNotFoundError: the folder, config.json or weights are missing; for the name of a model on a hub it says how to download it.
        ValueError: a file is damaged or is not what it should be.  Other OSErrors: a file cannot be opened.
    """
    check_folder(folder, "checkpoint")
    return reading(folder, SavedModel)


def check_folder(folder: str | Path, what: str) -> None:
    """Raises unless there is such a folder."""
    if os.path.isdir(folder):
        return
    if os.path.lexists(folder):
        raise NotADirectoryError(f"{what}: {folder} must be a folder, it is a file")
    name = str(folder)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII) and not os.path.isdir(os.path.dirname(name)):
        local = name.split("/")[1]
        raise FileNotFoundError(
            f"{what}: there is no folder {name}. A model of that name on the Hugging Face Hub must be downloaded first, "
            f"`hf download {name} --local-dir {local}`; then give the folder, {local}"
        )
    raise FileNotFoundError(f"{what}: there is no folder {folder}")


class SavedModel:
    """config.json, weights and companions of a folder, all opened.

    companions: name -> content of the files beside the weights that go where the model goes (COMPANIONS).
    """

    def __init__(self, folder: OpenFolder):
        self.path = folder.path
        self.companions = read_companions(folder, COMPANIONS)
        self._config = parse_json(_needed(folder, CONFIG_FILE), f"checkpoint: {self.path / CONFIG_FILE}")
        self._opened: dict[str, object] = {}
        self._names: dict[str, frozenset[str]] = {}
        self._file_of = self._weight_files(folder)

    def _weight_files(self, folder: OpenFolder) -> dict[str, str]:
        """Parameter name -> file that holds it, for a folder with an index or a single weight file."""
        index = self.path / INDEX_FILE
        try:
            content = folder.read(INDEX_FILE)
        except FileNotFoundError:
            try:
                names = self._open(folder, SINGLE_FILE).keys()
            except FileNotFoundError:
                raise FileNotFoundError(f"checkpoint: {self.path} has neither {SINGLE_FILE} nor {INDEX_FILE}") from None
            return dict.fromkeys(names, SINGLE_FILE)
        weight_map = parse_json(content, f"checkpoint: {index}").get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"checkpoint: {index} must be JSON with a weight_map, an object, got {type(weight_map).__name__}")
        for name, file in weight_map.items():
            if not isinstance(file, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", file, re.ASCII) or len(file) > 255:
                raise ValueError(
                    f"checkpoint: {index}: weight_map must name a .safetensors file in the same folder for {name!r:.120}, got {file!r:.120}"
                )
        missing = []
        for file in sorted(set(weight_map.values())):
            try:
                self._open(folder, file)
            except FileNotFoundError:
                missing.append(file)
        if missing:
            raise FileNotFoundError(f"checkpoint: {index} names {_some(missing)}, which {self.path} does not hold")
        return weight_map

    def _open(self, folder: OpenFolder, name: str):
        safetensors = optional("safetensors", "model", "loading weights")
        path = folder.reopenable(name)
        try:
            file = folder.stack.enter_context(safetensors.safe_open(path, framework="pt"))
        except safetensors.SafetensorError as error:
            raise ValueError(f"checkpoint: {self.path / name} is not a whole safetensors file: {_short(error)}") from None
        self._opened[name] = file
        self._names[name] = frozenset(file.keys())
        return file

    def parse(self, read: Callable[[Mapping], T]) -> T:
        """What `read` makes of the values in config.json; a ValueError names the file."""
        try:
            return read(self._config)
        except ValueError as error:
            raise ValueError(f"{_short(error, 1000)} ({self.path / CONFIG_FILE})") from None

    def __len__(self) -> int:
        return len(self._file_of)

    def check(self, wanted: Mapping[str, Tensor], tied: bool) -> None:
        """Raises ValueError unless the folder has exactly these tensors, in shape, and of a floating kind.

        tied: a head may be stored beside the embedding.
        """
        names = self._file_of.keys() - ({TIED_HEAD} if tied else set())
        missing, unexpected = sorted(wanted.keys() - names), sorted(names - wanted.keys())
        if missing or unexpected:
            parts = [f"{kind} {_some(n)}" for kind, n in (("missing", missing), ("unexpected", unexpected)) if n]
            raise ValueError(f"checkpoint: {self.path} does not fit the config: {'; '.join(parts)}")
        wrong = []
        for name, file in self._file_of.items():
            shape, kind = self._facts(name, file)
            need = list(wanted[EMBEDDING if tied and name == TIED_HEAD else name].shape)
            if shape != need:
                wrong.append(f"{name} must be {need}, got {shape}")
            elif kind not in FLOATING:
                wrong.append(f"{name} in {file} must be one of {', '.join(FLOATING)}, got {kind}, which has no meaning without scales")
        if wrong:
            raise ValueError(f"checkpoint: {self.path} does not fit the config: {_some(wrong, '; ')}")

    def _facts(self, name: str, file: str) -> tuple[list[int], str]:
        if name not in self._names[file]:
            raise ValueError(f"checkpoint: {self.path / file} must hold {_short(name)}, as the index says")
        entry = self._opened[file].get_slice(name)
        return list(entry.get_shape()), entry.get_dtype()

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """A stored tensor in `dtype`. Raises ValueError if a finite number is too large for it; inf and NaN stay."""
        file = self._file_of[name]
        stored = self._opened[file].get_tensor(name)
        found = stored.to(dtype)
        if torch.finfo(dtype).max < torch.finfo(stored.dtype).max and not found.isfinite().all():
            lost = stored[found.isinf() & stored.isfinite()]
            if lost.numel():
                raise ValueError(
                    f"checkpoint: {name} in {self.path / file} holds {lost[0].item():g}, too large for {str(dtype).removeprefix('torch.')}; "
                    "load in a wider dtype"
                )
        return found

    def holds(self, name: str) -> bool:
        return name in self._file_of

    def names(self) -> list[str]:
        return list(self._file_of)


@torch.no_grad()
def load(
    kind: type[T],
    config,
    saved: SavedModel,
    *,
    dtype: torch.dtype | None = None,
    device=None,
    progress: Callable[[list], Iterable] = iter,
) -> T:
    """A model of class `kind` with the saved weights, each converted to its parameter's dtype.

    Names and shapes must match exactly, and a head stored beside a tied embedding must equal it; the error lists what is missing,
    unexpected or misshapen. Only then memory is allocated. Weights that are inf or NaN are loaded as they are; integers, complex
    numbers and 8-bit floats are refused, and so are numbers that would become inf. Tensors are read one at a time; `progress` wraps
    the list of their names, as tqdm does.
    """
    if config.num_hidden_layers > max(len(saved), MANY_LAYERS):
        raise ValueError(
            f"checkpoint: {saved.path} does not fit the config: {config.num_hidden_layers} layers, but only {len(saved)} weights"
        )
    try:
        model = kind(config, device="meta", dtype=dtype or config.dtype)
    except (TypeError, OverflowError, RuntimeError) as error:  # what torch says of sizes beyond its integers
        raise ValueError(f"checkpoint: no model has the sizes in {saved.path / CONFIG_FILE}: {_short(error)}") from error
    tied = config.tie_word_embeddings
    saved.check(model.state_dict(), tied)
    model = model.to_empty(device=device or "cpu")
    wanted = model.state_dict()
    for name in progress([name for name in saved.names() if name in wanted]):
        wanted[name].copy_(saved.tensor(name, wanted[name].dtype))
    if tied and saved.holds(TIED_HEAD):
        embedding = wanted[EMBEDDING]
        if not torch.equal(saved.tensor(TIED_HEAD, embedding.dtype).to(embedding.device).nan_to_num(), embedding.nan_to_num()):
            raise ValueError(
                f"checkpoint: {TIED_HEAD} must equal {EMBEDDING} in {saved.path}: the config ties them; "
                "set tie_word_embeddings to false if it has a head of its own"
            )
    model.companions = saved.companions
    return model


def read_companions(folder: OpenFolder, names: Iterable[str]) -> dict[str, bytes]:
    """The content of those of the files that there are."""
    found = {}
    for name in names:
        try:
            found[name] = folder.read(name)
        except FileNotFoundError:
            continue
    return found


def _needed(folder: OpenFolder, name: str) -> bytes:
    try:
        return folder.read(name)
    except FileNotFoundError:
        raise FileNotFoundError(f"checkpoint: {folder.path} has no {name}") from None


# ---- saving


def save(model: torch.nn.Module, folder: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes config.json and the weights, in shards of at most `max_shard_bytes` (a larger tensor gets its own).

    The folder changes in one step at the end: until then it is as before, whatever fails. Other files in it stay. Of the files that
    lay beside the weights when the model was loaded (COMPANIONS: tokenizer, chat template, generation_config) those that the folder
    does not have are written too.
    """
    config = model.config
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    empty = [name for name, tensor in state.items() if tensor.is_meta]
    if empty:
        raise ValueError(f"save: {_some(empty)} must hold values, they are on the meta device")
    values = config.to_dict() | {"torch_dtype": str(model.dtype).removeprefix("torch.")}
    with replacing(folder, drop=(WEIGHT_FILES, INDEX_FILE)) as new:
        shards = split(state, max_shard_bytes)
        names = [SINGLE_FILE]
        if len(shards) > 1:
            names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
            weight_map = {key: name for name, shard in zip(names, shards) for key in shard}
            index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
            (new / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name, shard in zip(names, shards):
            _save_file({key: tensor.cpu().contiguous() for key, tensor in shard.items()}, new / name)
        (new / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        for name, content in getattr(model, "companions", {}).items():
            if not os.path.lexists(Path(folder) / name):
                (new / name).write_bytes(content)


def _save_file(tensors: dict[str, Tensor], path: Path) -> None:
    optional("safetensors", "model", "saving weights")
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, str(path), metadata={"format": "pt"})
    except SafetensorError as error:
        # Its text ends in "(os error 28)".
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise OSError(f"save: {path}: {error}") from None
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None


def split(state: dict[str, Tensor], max_bytes: int) -> list[dict[str, Tensor]]:
    """Consecutive groups of tensors of at most `max_bytes` each, a larger tensor alone."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _short(text: object, most: int = 300) -> str:
    """What comes from a file may be long, or not fit a line."""
    text = str(text) if str(text).isprintable() else repr(str(text))
    return text if len(text) <= most else text[:most] + "..."


def _some(names: list[str], separator: str = ", ", limit: int = 8) -> str:
    """The first names of a list, and how many more there are."""
    shown = separator.join(map(_short, names[:limit]))
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
