"""Jet-Nemotron as a model of transformers: importing this registers it with AutoConfig, AutoModel and the other Autos.

The network is `jetkernels.model`; here are its config, cache and calls in the form that transformers, PEFT and others
expect.
"""

from jetkernels._optional import optional

OLDEST = (5, 23)
_installed = optional("transformers", "hf", "jetkernels.hf").__version__
if tuple(map(int, _installed.split(".")[:2])) < OLDEST:
    raise ImportError(
        f"jetkernels.hf needs transformers {'.'.join(map(str, OLDEST))} or newer, got {_installed}: "
        "pip install 'jetkernels[hf]'"
    )

from . import register  # noqa: E402 - after the lines above
from .cache import PastKeyValues  # noqa: E402
from .config import JetNemotronConfig  # noqa: E402
from .modeling import JetNemotronForCausalLM, JetNemotronModel  # noqa: E402

register.register()

__all__ = ["JetNemotronConfig", "JetNemotronForCausalLM", "JetNemotronModel", "PastKeyValues"]
