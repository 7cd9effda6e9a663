"""Entry points by which the engines find this library; nothing of an engine is imported before it calls one."""

from __future__ import annotations


def vllm() -> None:
    """Of the group vllm.general_plugins: makes Jet-Nemotron known to vLLM. May be called more than once."""
    from vllm import ModelRegistry

    import jetkernels.hf  # noqa: F401  (registers the config)

    ModelRegistry.register_model("JetNemotronForCausalLM", "jetkernels.serving.for_vllm:JetNemotronForCausalLM")


def sglang() -> None:
    """Of the group sglang.srt.plugins: puts this library's JetBlock in the place of SGLang's. May be called again."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from . import for_sglang

    for_sglang.describe_states()
    target = "sglang.srt.models.jet_nemotron.JetBlock"
    if not any(hook is for_sglang.JetBlockLayer for _, hook, _ in HookRegistry._hooks[target]):
        HookRegistry.register(target, for_sglang.JetBlockLayer, HookType.REPLACE)
