"""The whole hybrid model as a function of a state dict: full masks, no cache, no padding.

Source: Jet-Nemotron (arXiv 2508.15884); key names as in its published checkpoints.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.jet_block import jet_block
from reference.rms_norm import rms_norm


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name starts with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def llama3_frequency(frequency: float, scaling: Mapping) -> float:
    """A rotary frequency under ``rope_type`` llama3: slow ones lower, fast ones as they are, a ramp in between."""
    factor, low, high = (scaling[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    if turns <= low:
        return frequency / factor
    if turns >= high:
        return frequency
    ramp = (turns - low) / (high - low)
    return (1 - ramp) * frequency / factor + ramp * frequency


def rotate(x: Tensor, theta: float, scaling: Mapping | None = None) -> Tensor:
    """Rotary embedding of x [B, heads, T, d]: token t turns the pair (i, i + d/2) by the angle t theta^(-2i/d).

    With ``scaling``, the ``rope_scaling`` of a config, by the angle of `llama3_frequency`.
    """
    T, d = x.shape[-2:]
    frequency = theta ** (-torch.arange(0, d, 2, dtype=x.dtype, device=x.device) / d)
    if scaling is not None:
        frequency = frequency.new_tensor([llama3_frequency(f, scaling) for f in frequency.tolist()])
    angle = torch.arange(T, dtype=x.dtype, device=x.device)[:, None] * frequency
    first, second = x.chunk(2, -1)
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)


def attention(x: Tensor, w: Mapping[str, Tensor], config: Mapping, window: int | None) -> Tensor:
    """Attention over x [B, T, C]: query i sees key j when 0 <= i - j, and i - j < window where there is one."""
    T = x.shape[1]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    theta, scaling = float(config.get("rope_theta", 1e6)), config.get("rope_scaling")
    q, k, v = (x @ w[f"{name}_proj.weight"].mT for name in "qkv")
    if config.get("attention_bias", True):
        q, k, v = (y + w[f"{name}_proj.bias"] for y, name in zip((q, k, v), "qkv"))
    q, k, v = (y.unflatten(-1, (n, -1)).transpose(1, 2) for y, n in zip((q, k, v), (heads, kv_heads, kv_heads)))
    if config.get("use_qk_norm", False):
        eps = float(config.get("rms_norm_eps", 1e-6))
        q, k = (rms_norm(y, w[f"{name}_norm.weight"], eps, x.dtype) for y, name in zip((q, k), "qk"))
    q, k = rotate(q, theta, scaling), rotate(k, theta, scaling)
    k, v = (y.repeat_interleave(heads // kv_heads, 1) for y in (k, v))
    distance = torch.arange(T, device=x.device)[:, None] - torch.arange(T, device=x.device)
    visible = (distance >= 0) & (distance < (T if window is None else window))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2) @ w["o_proj.weight"].mT


def mlp(x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    """SwiGLU: down(silu(gate(x)) * up(x))."""
    return (F.silu(x @ w["gate_proj.weight"].mT) * (x @ w["up_proj.weight"].mT)) @ w["down_proj.weight"].mT


def hybrid(
    input_ids: Tensor, state_dict: Mapping[str, Tensor], config: Mapping, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Logits [B, T, vocab] in ``dtype``.

    Args:
        input_ids: [B, T], every token real.
        state_dict: tensors with the published names; ``lm_head.weight`` may be absent, then the head is tied.
        config: the parsed content of the published config.json.
        dtype: what everything is computed in, and what is returned.
    """
    w = {name: value.to(dtype) for name, value in state_dict.items()}
    eps = float(config.get("rms_norm_eps", 1e-6))
    efficient = config["efficient_attention_config"]
    h = w["model.embed_tokens.weight"][input_ids]
    for i, kind in enumerate(config["layer_types"]):
        layer = under(w, f"model.layers.{i}.")
        x = rms_norm(h, layer["input_layernorm.weight"], eps, dtype)
        if kind == "jet":
            norm_eps = float(efficient["jet"].get("norm_eps", 1e-5))
            mixed = jet_block(x, under(layer, "self_attn."), norm_eps=norm_eps, dtype=dtype)[0]
        else:
            window = efficient["swa"]["window_size"] if kind == "swa" else None
            mixed = attention(x, under(layer, "self_attn."), config, window)
        h = h + mixed
        h = h + mlp(rms_norm(h, layer["post_attention_layernorm.weight"], eps, dtype), under(layer, "mlp."))
    h = rms_norm(h, w["model.norm.weight"], eps, dtype)
    return h @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).mT
