"""transformers' Qwen3 with random weights, in the shape of a full-attention config: a peer to be timed beside ours."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.types import Device

from jetkernels._optional import optional
from jetkernels.modules.initialization import init_weight_

from .cache import fill_normal_
from .config import JetNemotronConfig
from .speed import synchronize


def _transformers() -> Any:
    return optional("transformers", "benchmark", "transformers' Qwen3")


def version() -> str:
    """That of transformers."""
    return _transformers().__version__


def check(config: JetNemotronConfig) -> None:
    """Raises unless there is such a model of a config.

    Raises:
        ValueError: a layer is not full attention.
        ModuleNotFoundError: transformers is not installed.
    """
    if others := sorted(set(config.layer_types) - {"attn"}):
        raise ValueError(f"transformers' Qwen3 has attn layers only, the config has {', '.join(others)}")
    _transformers()


@torch.no_grad()
def random_qwen3(config: JetNemotronConfig, *, dtype: torch.dtype, device: Device = None, seed: int = 0) -> Any:
    """A Qwen3ForCausalLM with the sizes of a config, in evaluation mode; raises as `check` does."""
    check(config)
    transformers = _transformers()
    sizes = transformers.Qwen3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_size,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
        dtype=dtype,
    )
    with torch.device("meta"):
        model = transformers.Qwen3ForCausalLM(sizes)
    model = model.to(dtype).to_empty(device=device or "cpu").eval()
    model.tie_weights()
    # Its frequencies are no parameters: nothing else fills them.
    model.model.rotary_emb = type(model.model.rotary_emb)(sizes).to(model.device)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                init_weight_(parameter, config.initializer_range)
    return model


class Qwen3Decoder:
    """As `speed.Decoder`, with the cache that transformers' `generate` takes by default: it grows by concatenation."""

    def __init__(self, model: Any, batch: int, context: int, steps: int, seed: int = 0):
        self.model = model
        self.cache = _transformers().DynamicCache(config=model.config)
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
        generator = torch.Generator(model.device).manual_seed(seed)
        shape = (batch, model.config.num_key_value_heads, context, model.config.head_dim)
        for layer in range(model.config.num_hidden_layers):
            key, value = (torch.empty(shape, dtype=model.dtype, device=model.device) for _ in range(2))
            fill_normal_(key, generator)
            fill_normal_(value, generator)
            self.cache.update(key, value, layer)

    @torch.no_grad()
    def step(self) -> None:
        """Reads one token of each sequence and chooses the most likely next one."""
        output = self.model(self.tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.tokens = output.logits[:, -1].argmax(-1, keepdim=True)


@torch.no_grad()
def time_prefill(model: Any, ids: torch.Tensor, chunk: int | None = None) -> float:
    """Seconds in which a Qwen3ForCausalLM reads prompts [B, T], `chunk` tokens at a time."""
    cache = _transformers().DynamicCache(config=model.config)
    synchronize(model.device)
    start = time.perf_counter()
    for part in ids.split(chunk or ids.shape[1], 1):
        model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    synchronize(model.device)
    return time.perf_counter() - start
