"""Entry points by which the engines find this library; nothing of an engine is imported before it calls one."""

from __future__ import annotations

import os
from typing import Any

# Of vLLM's: architecture -> its file.
MODELS = {
    "Qwen3NextForCausalLM": "qwen3_next",
    "Qwen3_5ForCausalLM": "qwen3_5",
    "Qwen3_5MoeForCausalLM": "qwen3_5",
    "Qwen3_5ForConditionalGeneration": "qwen3_5",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_5",
}


def _serves_other_models() -> bool:
    """Whether the rule of models that the engines have themselves is to be this library's too."""
    return os.environ.get("JETKERNELS_GATED_DELTA_NETS") == "1"


def vllm() -> None:
    """Of the group vllm.general_plugins: makes Jet-Nemotron known to vLLM. May be called more than once."""
    from vllm import ModelRegistry

    import jetkernels.hf  # noqa: F401  (registers the config)

    ModelRegistry.register_model("JetNemotronForCausalLM", "jetkernels.serving.for_vllm:JetNemotronForCausalLM")
    if _serves_other_models():
        # By name: to import vLLM's layers here would start CUDA in processes that fork.
        for name in MODELS:
            ModelRegistry.register_model(name, f"jetkernels.serving.gated_delta_net_for_vllm:{name}")


def sglang() -> None:
    """Of the group sglang.srt.plugins: puts this library's JetBlock in the place of SGLang's. May be called again."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from . import for_sglang

    for_sglang.describe_states()
    hooks: list[tuple[str, Any, HookType]] = [
        ("sglang.srt.models.jet_nemotron.JetBlock", for_sglang.JetBlockLayer, HookType.REPLACE)
    ]
    if _serves_other_models():
        from .gated_delta_net_for_sglang import take_the_place_of_triton

        target = "sglang.srt.layers.attention.linear.gdn_backend.GDNKernelDispatcher.__init__"
        hooks.append((target, take_the_place_of_triton, HookType.AFTER))
    for target, hook, kind in hooks:
        if not any(known is hook for _, known, _ in HookRegistry._hooks[target]):
            HookRegistry.register(target, hook, kind)
