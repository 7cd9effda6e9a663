"""jetkernels as a backend of flash-linear-attention 0.6."""

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jetkernels
from jetkernels.integrations._calls import announce, reason_not_served
from jetkernels.integrations._patch import Patch

_CHUNK, _RECURRENT = "chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"
_OPS = {_CHUNK: "chunk_gated_delta_rule", _RECURRENT: "recurrent_gated_delta_rule"}
_LIBRARY = "flash-linear-attention"
_NOT_HERE = ("gk", "gv", "cp_context")
_FLAGS = ("use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval", "state_v_first")
_SWITCH = "FLA_JETKERNELS"  # 0: off


def register_fla_backend() -> Patch:
    """Lets jetkernels compute the gated delta rule for flash-linear-attention 0.6 and the models built on it.

    ``chunk_gated_delta_rule`` goes through the library's registry of backends, before those that it has for CUDA
    devices; ``fused_recurrent_gated_delta_rule``, which the registry does not know, is replaced by name in every module
    of the library. Both may be imported before or after, but ``from fla.ops... import
    fused_recurrent_gated_delta_rule`` in a module of your own keeps what it got. With jetkernels they run on a CPU too,
    where the library itself has no code. A call that is not served goes to flash-linear-attention: gk, gv, cp_context,
    q, k and v of several dtypes, and on a CUDA device what no kernel of this library takes; for the recurrent function
    a warning says why, once, for the other one the library's log.

    transformers takes the recurrent function when the module of a model is imported: register before that, or use
    :func:`patch_transformers`. The environment variable ``FLA_JETKERNELS=0`` switches both functions off.

    Returns:
        What is served. Used as a context manager it is undone at the end of the block, else by :meth:`Patch.undo`. What
        is served already is not registered again.

    Raises:
        ModuleNotFoundError: flash-linear-attention, or the triton package that it imports, is not installed.
        ImportError: it is another version, without the registry of 0.6.
        RuntimeError: ``FLA_DISABLE_BACKEND_DISPATCH=1`` has switched its registry off.
    """
    backends, rule = _import()
    if os.environ.get("FLA_DISABLE_BACKEND_DISPATCH") == "1":
        raise RuntimeError(
            "register_fla_backend: FLA_DISABLE_BACKEND_DISPATCH=1 switches flash-linear-attention's registry off; "
            "unset it before fla is imported"
        )
    patch = Patch(_LIBRARY)
    if _served():
        return patch
    backends.register("gated_delta_rule")(_backend(backends.BaseBackend, getattr(rule, _CHUNK)))
    patch.functions.append(f"{rule.__name__}.{_CHUNK}")
    original = getattr(rule, _RECURRENT)
    replacement = _recurrent(original)
    for module in [m for name, m in sys.modules.items() if name.partition(".")[0] == "fla"]:
        for name in [name for name, value in vars(module).items() if value is original]:
            patch.replace(module, name, replacement)
    _registered.append(patch)
    return patch


_registered: list[Patch] = []


def _served() -> bool:
    """Whether a registration holds.

    What is left behind when it is undone, in the registry and in modules that were imported meanwhile, asks this.
    """
    return any(patch.functions for patch in _registered)


def _import() -> tuple[Any, Any]:
    """The modules ``fla.backends`` and ``fla.ops.gated_delta_rule``."""
    try:
        rule = importlib.import_module("fla.ops.gated_delta_rule")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"register_fla_backend needs the package {error.name}, which is not installed: "
            "pip install flash-linear-attention triton",
            name=error.name,
        ) from None
    try:
        backends = importlib.import_module("fla.backends")
    except ModuleNotFoundError:
        backends = None
    if not hasattr(backends, "register") or not hasattr(backends, "BaseBackend"):
        version = getattr(importlib.import_module("fla"), "__version__", "an unknown version")
        raise ImportError(f"register_fla_backend needs flash-linear-attention 0.6, with fla.backends; got {version}")
    return backends, rule


def _parameters(function: Callable) -> tuple[str, ...]:
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return tuple(p.name for p in inspect.signature(function).parameters.values() if p.kind not in kinds)


def _named(names: Sequence[str], args: Sequence, keywords: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments under their names; ``None`` if they do not fit, of which the other library tells."""
    if len(args) > len(names) or any(name in keywords for name in names[: len(args)]):
        return None
    return {**dict(zip(names, args)), **keywords}


def _reason(function: str, named: Mapping[str, Any] | None) -> str | None:
    """Why a call is not served; ``None`` if it is."""
    if named is None or not {"q", "k", "v"} <= named.keys():
        return "its arguments do not fit"
    if unknown := sorted(named.keys() - _KNOWN[function]):
        return f"jetkernels does not know the argument {unknown[0]}"
    for name in _NOT_HERE:
        if named.get(name) is not None:
            return f"jetkernels does not compute {name}"
    for name in ("A_log", "dt_bias"):
        if named.get(name) is not None and not named.get("use_gate_in_kernel"):
            return f"{name} without use_gate_in_kernel, which flash-linear-attention ignores"
    for name in _FLAGS:
        if not isinstance(named.get(name, False), bool):
            return f"{name} is neither True nor False"
    if getattr(named.get("beta"), "ndim", 3) != 3:
        return "jetkernels takes one beta per token and value head"
    if named.get("cu_seqlens") is None and any(
        named.get(name) is not None for name in ("cu_seqlens_cpu", "chunk_indices")
    ):
        return "hints of packed sequences without cu_seqlens"
    if named.get("chunk_size", 64) not in (16, 32, 64):
        return f"chunk_size is {named['chunk_size']!r}"
    return reason_not_served(_OPS[function], named["q"], named["k"], named["v"], named.get("initial_state"))


_KNOWN = {name: {*_parameters(getattr(jetkernels, name))} for name in _OPS}


def _backend(base: Any, original: Callable) -> type:
    """The class that flash-linear-attention's registry asks."""
    names = _parameters(original)

    class JetBackend(base):
        backend_type = "jetkernels"
        package_name = "jetkernels"
        env_var = _SWITCH
        priority = 1  # before FlashQLA, 3; after that of another accelerator, 0

        def is_enabled(self) -> bool:
            return _served() and super().is_enabled()

        def chunk_gated_delta_rule_verifier(self, *args: Any, **keywords: Any) -> tuple[bool, str | None]:
            reason = _reason(_CHUNK, _named(names, args, keywords))
            return reason is None, reason

        def chunk_gated_delta_rule(self, *args: Any, **keywords: Any) -> tuple:
            return jetkernels.chunk_gated_delta_rule(**_named(names, args, keywords) or {})

    return JetBackend


@functools.cache  # one, also after it was undone
def _recurrent(original: Callable) -> Callable:
    names = _parameters(original)

    @functools.wraps(original)
    def fused_recurrent_gated_delta_rule(*args: Any, **keywords: Any) -> tuple:
        if not _served() or os.environ.get(_SWITCH) == "0":
            return original(*args, **keywords)
        named = _named(names, args, keywords)
        reason = _reason(_RECURRENT, named)
        if reason is not None or named is None:
            announce(_RECURRENT, _LIBRARY, str(reason))
            return original(*args, **keywords)
        return jetkernels.fused_recurrent_gated_delta_rule(**named)

    return fused_recurrent_gated_delta_rule
