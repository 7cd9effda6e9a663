"""Checkpoints in a local folder: config.json and safetensors weights, one file or shards with an index.

GGUF files are read as well.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.types import Device

from jetkernels._optional import optional
from jetkernels.files import replacing
from jetkernels.modules import checks
from jetkernels.modules.quantized import QuantizedLinear
from jetkernels.reading import OpenFolder, parse_json, reading

from .config import CONFIG_FILE, DTYPES, JetNemotronConfig
from .gguf_file import GgufFile, is_gguf
from .stored import EMBEDDING, FLOATING, TIED_HEAD, StoredModel, misfits, short, some

T = TypeVar("T")
M = TypeVar("M", bound=torch.nn.Module)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WEIGHT_FILES = "model*.safetensors"
MAX_SHARD_BYTES = 5 * 10**9
MANY_LAYERS = 100  # more than weights, and the config is not even tried
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
# Stored in older Llama checkpoints; they follow from the config.
_FREQUENCIES = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


# ---- loading


def opened(folder: str | Path) -> AbstractContextManager[StoredModel]:
    """The model that a local folder or a GGUF file holds.

    The files of a folder are open and all of one save, also while others save there.

    Raises:
        FileNotFoundError: the folder, config.json or weights are missing; for the name of a model on a hub it says how
            to download it.
        OSError: a file cannot be opened.
        ValueError: a file is damaged or is not what it should be.
    """
    if is_gguf(folder):
        return nullcontext(GgufFile(folder))
    check_folder(folder, "checkpoint")
    return reading(folder, SavedModel)


def check_folder(folder: str | Path, what: str) -> None:
    """Raises unless there is such a folder."""
    if os.path.isdir(folder):
        return
    if not os.fspath(folder):
        raise FileNotFoundError(f"{what}: the folder must have a name, got ''")
    if os.path.lexists(folder):
        raise NotADirectoryError(f"{what}: {folder} must be a folder, it is a file")
    name = str(folder)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII) and not os.path.isdir(
        os.path.dirname(name)
    ):
        local = name.split("/")[1]
        raise FileNotFoundError(
            f"{what}: there is no folder {name}. A model of that name on the Hugging Face Hub must be downloaded "
            f"first, `hf download {name} --local-dir {local}`; then give the folder, {local}"
        )
    raise FileNotFoundError(f"{what}: there is no folder {folder}")


class SavedModel(StoredModel):
    """config.json, weights and companions (COMPANIONS) of a folder, all opened."""

    def __init__(self, folder: OpenFolder):
        super().__init__(folder.path, folder.path / CONFIG_FILE)
        self.companions = read_companions(folder, COMPANIONS)
        self.values = parse_json(_needed(folder, CONFIG_FILE), f"checkpoint: {self.config_path}")
        self._opened: dict[str, Any] = {}  # safetensors' files
        self._names: dict[str, frozenset[str]] = {}
        files = self._weight_files(folder)
        self.holders = {name: file for name, file in files.items() if not _FREQUENCIES.fullmatch(name)}

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
            raise ValueError(
                f"checkpoint: {index} must be JSON with a weight_map, an object, got {type(weight_map).__name__}"
            )
        for name, file in weight_map.items():
            if (
                not isinstance(file, str)
                or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", file, re.ASCII)
                or len(file) > 255
            ):
                raise ValueError(
                    f"checkpoint: {index}: weight_map must name a .safetensors file in the same folder for "
                    f"{name!r:.120}, got {file!r:.120}"
                )
        missing = []
        for file in sorted(set(weight_map.values())):
            try:
                self._open(folder, file)
            except FileNotFoundError:
                missing.append(file)
        if missing:
            raise FileNotFoundError(f"checkpoint: {index} names {some(missing)}, which {self.path} does not hold")
        return weight_map

    def _open(self, folder: OpenFolder, name: str) -> Any:
        safetensors = optional("safetensors", "model", "loading weights")
        path = folder.reopenable(name)
        try:
            file = folder.stack.enter_context(safetensors.safe_open(path, framework="pt"))
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"checkpoint: {self.path / name} is not a whole safetensors file: {short(error)}"
            ) from None
        self._opened[name] = file
        self._names[name] = frozenset(file.keys())
        return file

    def facts(self, name: str) -> tuple[list[int], str]:
        """See `StoredModel.facts`."""
        file = self.holders[name]
        if name not in self._names[file]:
            raise ValueError(f"checkpoint: {self.path / file} must hold {short(name)}, as the index says")
        entry = self._opened[file].get_slice(name)
        return list(entry.get_shape()), entry.get_dtype()

    def stored(self, name: str) -> Tensor:
        """See `StoredModel.stored`."""
        return self._opened[self.holders[name]].get_tensor(name)


def check_tied_head(head: Tensor, embedding: Tensor, where: str) -> None:
    """Raises ValueError unless a head that lies beside a tied embedding is the same."""
    if not torch.equal(head.to(embedding).nan_to_num(), embedding.nan_to_num()):
        raise ValueError(
            f"{where}: {TIED_HEAD} must equal {EMBEDDING}: the config ties them; set tie_word_embeddings to false if "
            "it has a head of its own"
        )


def chosen_dtype(dtype: torch.dtype | str | None, config: JetNemotronConfig) -> torch.dtype:
    """A floating dtype or the name of one; None and "auto": the config's. Raises ValueError for any other."""
    if dtype is None or isinstance(dtype, str) and dtype == "auto":
        return config.dtype
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, (str, torch.dtype)) else None
    if name not in DTYPES:
        raise ValueError(
            f"dtype must be one of {', '.join(DTYPES)}, of torch or by name, or 'auto', got {checks.shown(dtype)}"
        )
    return getattr(torch, name)


def allocate(model: M, device: Device = None) -> M:
    """Gives the parameters of a model on the meta device memory, of no particular values, in their dtypes."""
    # What `to_empty` does; but its `empty_like` of a meta tensor imports torch's Python references: seconds.
    return model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device or "cpu"))


@torch.no_grad()
def load(
    kind: type[M],
    config: JetNemotronConfig,
    saved: StoredModel,
    *,
    dtype: torch.dtype | str | None = None,
    device: Device = None,
    quantize: int | None = None,
    progress: Callable[[list], Iterable] = iter,
) -> M:
    """A model of class `kind` with the saved weights, each converted to its parameter's dtype (see `chosen_dtype`).

    Names and shapes must match exactly, and a head stored beside a tied embedding must equal it; the error lists what
    is missing, unexpected or misshapen. Only then memory is allocated. Weights that are inf or NaN are loaded as they
    are; integers, complex numbers and 8-bit floats are refused, and so are numbers that would become inf. Tensors are
    read one at a time; `progress` wraps the list of their names, as tqdm does. `quantize`, 8 or 4, loads what the
    model's `quantize_` would make of them; then weights that it quantises must be finite.
    """
    if config.num_hidden_layers > max(len(saved), MANY_LAYERS):
        raise ValueError(
            f"checkpoint: {saved.path} does not fit the config: {config.num_hidden_layers} layers, "
            f"but only {len(saved)} weights"
        )
    model = kind(config, device="meta", dtype=chosen_dtype(dtype, config))
    tied = config.tie_word_embeddings
    saved.check(model.state_dict(), tied)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    if quantize is not None:
        model.quantize_(quantize)  # type: ignore[operator]  # of JetNemotronForCausalLM
    model = allocate(model, device)
    wanted = model.state_dict()
    quantized = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    for name in progress([name for name in saved.names() if name in dtypes]):
        stored = saved.tensor(name, dtypes[name])
        if name in quantized:
            _quantize_weight(quantized[name], stored, f"checkpoint: {name} in {saved.path}")
        else:
            wanted[name].copy_(stored)
    if tied and saved.holds(TIED_HEAD):
        embedding = wanted[EMBEDDING]
        check_tied_head(saved.tensor(TIED_HEAD, embedding.dtype), embedding, f"checkpoint: {saved.path}")
    if tied and TIED_HEAD in quantized:
        _quantize_weight(quantized[TIED_HEAD], wanted[EMBEDDING], f"checkpoint: {EMBEDDING} in {saved.path}")
    model.companions = saved.companions  # type: ignore[assignment]  # no parameter and no module, for once
    return model


def _quantize_weight(module: QuantizedLinear, weight: Tensor, where: str) -> None:
    try:
        module.quantize_weight_(weight)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def load_folder(
    kind: type[M],
    folder: str | Path,
    read: Callable[[Mapping], JetNemotronConfig],
    *,
    dtype: torch.dtype | str | None = None,
    device: Device = None,
    quantize: int | None = None,
    progress: Callable[[list], Iterable] = iter,
) -> M:
    """The model of class `kind` that a local folder or a GGUF file holds.

    `read` makes a config of the values in config.json, or of those that the GGUF file has for them. See `opened` and
    `load` for the other arguments and for what is raised.
    """
    with opened(folder) as saved:
        config = saved.parse(read)
        return load(kind, config, saved, dtype=dtype, device=device, quantize=quantize, progress=progress)


def read_folder_config(folder: str | Path, read: Callable[[Mapping], JetNemotronConfig]) -> JetNemotronConfig:
    """The config of the model that `load_folder` would load; sees that there are weights, but reads none."""
    with opened(folder) as saved:
        return saved.parse(read)


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

    The folder changes in one step at the end: until then it is as before, whatever fails. Other files in it stay. Of
    the files that lay beside the weights when the model was loaded (COMPANIONS: tokenizer, chat template,
    generation_config) those that the folder does not have are written too. What shares memory is written as often as it
    has names.

    Raises:
        ValueError: loading would refuse the folder: the tensors do not fit the config, or it is no config; or an
            argument is wrong.
        OSError: as for `replacing`.
    """
    if not isinstance(max_shard_bytes, Integral) or isinstance(max_shard_bytes, bool) or max_shard_bytes < 1:
        raise ValueError(
            f"save: max_shard_bytes must be a positive integer, bytes of a file, got {checks.shown(max_shard_bytes)}"
        )
    config = (
        json.dumps(model.config.to_dict() | {"torch_dtype": str(model.dtype).removeprefix("torch.")}, indent=2) + "\n"
    )
    state = _state(model, type(model.config).from_dict(json.loads(config)))
    with replacing(folder, drop=(WEIGHT_FILES, INDEX_FILE)) as new:
        shards = split(state, max_shard_bytes)
        names = [SINGLE_FILE]
        if len(shards) > 1:
            names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
            weight_map = {key: name for name, shard in zip(names, shards) for key in shard}
            index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
            (new / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name, shard in zip(names, shards):
            _save_file(_apart(shard), new / name)
        (new / CONFIG_FILE).write_text(config, encoding="utf-8")
        for name, content in getattr(model, "companions", {}).items():
            if not os.path.lexists(Path(folder) / name):
                (new / name).write_bytes(content)


def _state(model: torch.nn.Module, config: JetNemotronConfig) -> dict[str, Tensor]:
    """The tensors of a model. Raises ValueError unless they are those that a model of this config would load."""
    quantized = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    if quantized:
        raise ValueError(
            f"save: {some(quantized)} are quantised, and a checkpoint holds floating weights: save the model before "
            "quantize_, and load it with quantize=8 or 4; or torch.save(model, file)"
        )
    state = model.state_dict()
    tied = config.tie_word_embeddings
    wanted = type(model)(config, device="meta").state_dict()
    found = misfits(
        dict.fromkeys(state, "the model"), lambda name: (list(state[name].shape), _kind(state[name])), wanted, tied
    )
    if found:
        raise ValueError(
            f"save: the model's tensors do not fit the config: {found} (adapters, parametrizations or quantisation? "
            "merge or remove them first, or torch.save(model.state_dict(), file); other layers or sizes? model.config "
            "must have them too)"
        )
    empty = [name for name, tensor in state.items() if tensor.is_meta]
    if empty:
        raise ValueError(f"save: {some(empty)} must hold values, they are on the meta device")
    state = {name: tensor.detach() for name, tensor in state.items()}
    if tied and TIED_HEAD in state:
        check_tied_head(state[TIED_HEAD], state[EMBEDDING], "save")
    return state


def _kind(tensor: Tensor) -> str:
    """The name of its dtype in a file, if it is a plain tensor of one; else what it is, for people."""
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return type(tensor).__name__
    if tensor.layout != torch.strided:
        return str(tensor.layout)
    return next((kind for kind, dtype in FLOATING.items() if dtype == tensor.dtype), str(tensor.dtype))


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a file wants them: on the CPU, contiguous, no byte of memory in two of them."""
    taken: dict[int, list[tuple[int, int]]] = {}  # storage -> the bytes of it that are in some tensor
    apart = {}
    for name, tensor in tensors.items():
        tensor = tensor.cpu().contiguous()
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        others = taken.setdefault(tensor.untyped_storage().data_ptr(), [])
        overlaps = any(begin < other_end and other_begin < end for other_begin, other_end in others)
        apart[name] = tensor.clone() if overlaps else tensor
        others.append((begin, end))
    return apart


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
