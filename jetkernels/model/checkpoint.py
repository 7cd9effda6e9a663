"""Checkpoints in a local folder: config.json and safetensors weights, one file or shards with an index."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import CONFIG_FILE

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
TIED_HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def weight_files(folder: str | Path) -> dict[str, Path]:
    """Parameter name -> file that holds it, for a folder with an index or a single weight file."""
    folder = Path(folder)
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"checkpoint: {index} must be JSON with a weight_map") from None
        missing = sorted({file for file in weight_map.values() if not (folder / file).is_file()})
        if missing:
            raise FileNotFoundError(f"checkpoint: {index} names {_some(missing)}, which {folder} does not hold")
        return {name: folder / file for name, file in weight_map.items()}
    single = folder / SINGLE_FILE
    if not single.is_file():
        raise FileNotFoundError(f"checkpoint: {folder} has neither {SINGLE_FILE} nor {INDEX_FILE}")
    with _open(single) as file:
        return {name: single for name in file.keys()}


@torch.no_grad()
def load_weights(model: torch.nn.Module, folder: str | Path, progress: Callable[[list], Iterable] = iter) -> None:
    """Copies the weights of a folder into `model`, converting each to its parameter's dtype.

    Names and shapes must match exactly: nothing is loaded otherwise, and the error lists what is missing, unexpected
    or misshapen. A head stored beside a tied embedding must equal it. Tensors are read one at a time; `progress` wraps the
    list of them, as tqdm does.
    """
    wanted = dict(model.state_dict())
    files = weight_files(folder)
    tied = model.config.tie_word_embeddings and files.pop(TIED_HEAD, None)
    missing, unexpected = sorted(wanted.keys() - files.keys()), sorted(files.keys() - wanted.keys())
    if missing or unexpected:
        parts = [f"{kind} {_some(names)}" for kind, names in (("missing", missing), ("unexpected", unexpected)) if names]
        raise ValueError(f"checkpoint: {folder} does not fit the config: {'; '.join(parts)}")
    by_file: dict[Path, list[str]] = {}
    for name, path in files.items():
        by_file.setdefault(path, []).append(name)
    wrong = []
    for path, names in by_file.items():
        with _open(path) as file:
            for name in names:
                got, need = _shape(file, name, path), list(wanted[name].shape)
                if got != need:
                    wrong.append(f"{name} must be {need}, got {got}")
    if wrong:
        raise ValueError(f"checkpoint: {folder} does not fit the config: {_some(wrong, '; ')}")
    with ExitStack() as stack:
        opened = {path: stack.enter_context(_open(path)) for path in by_file}
        for name in progress(list(files)):
            wanted[name].copy_(opened[files[name]].get_tensor(name))
    if tied:
        with _open(tied) as file:
            if not torch.equal(file.get_tensor(TIED_HEAD).to(wanted[EMBEDDING]), wanted[EMBEDDING]):
                raise ValueError(
                    f"checkpoint: {TIED_HEAD} must equal {EMBEDDING}: the config ties them; "
                    "set tie_word_embeddings to false if it has a head of its own"
                )


def save(model: torch.nn.Module, folder: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes config.json and the weights, in shards of at most `max_shard_bytes` (a larger tensor gets its own).

    The folder changes in one step at the end: until then it is as before, whatever fails. Other files in it stay.
    """
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    config = model.config
    dtype = str(model.dtype).removeprefix("torch.")
    with replacing(folder) as new:
        for old in [*new.glob("model*.safetensors"), new / INDEX_FILE]:
            old.unlink(missing_ok=True)
        shards = split(state, max_shard_bytes)
        names = [SINGLE_FILE]
        if len(shards) > 1:
            names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
            weight_map = {key: name for name, shard in zip(names, shards) for key in shard}
            index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
            (new / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name, shard in zip(names, shards):
            tensors = {key: tensor.cpu().contiguous() for key, tensor in shard.items()}
            save_file(tensors, str(new / name), metadata={"format": "pt"})
        # A file that other folders share by link must not be written through.
        (new / CONFIG_FILE).unlink(missing_ok=True)
        values = config.to_dict() | {"torch_dtype": dtype}
        (new / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


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


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """Yields a new folder with the files of `folder`, which takes its place if the block succeeds.

    The files are links to the old ones: replace them, do not write into them.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"checkpoint: {folder} is not a folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        if folder.exists():
            shutil.copytree(folder, new, copy_function=_link, dirs_exist_ok=True)
            os.chmod(new, folder.stat().st_mode)
        else:
            # mkdtemp makes a private folder; a checkpoint gets the permissions that any new folder gets.
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(new, 0o777 & ~umask)
        yield new
        _flush(new)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            os.rename(folder, old / "old")
            try:
                os.rename(new, folder)
            except BaseException:
                os.rename(old / "old", folder)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(new, folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _flush(folder: Path) -> None:
    """Waits until the files are on the disk, so that not even a power failure leaves the new name on half of them."""
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextmanager
def _open(path: Path) -> Iterator:
    try:
        file = safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise ValueError(f"checkpoint: {path} is not a whole safetensors file: {error}") from None
    with file:
        yield file


def _shape(file, name: str, path: Path) -> list[int]:
    try:
        return list(file.get_slice(name).get_shape())
    except SafetensorError:
        raise ValueError(f"checkpoint: {path} must hold {name}, as the index says") from None


def _some(names: list[str], separator: str = ", ", limit: int = 8) -> str:
    """The first names of a list, and how many more there are."""
    shown = separator.join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
