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

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from .cache import PastKeyValues
from .config import JetNemotronConfig
from .modeling import JetNemotronForCausalLM, JetNemotronModel

AutoConfig.register(JetNemotronConfig.model_type, JetNemotronConfig)
AutoModel.register(JetNemotronConfig, JetNemotronModel)
AutoModelForCausalLM.register(JetNemotronConfig, JetNemotronForCausalLM)
AutoTokenizer.register(JetNemotronConfig, fast_tokenizer_class=PreTrainedTokenizerFast)

__all__ = ["JetNemotronConfig", "JetNemotronForCausalLM", "JetNemotronModel", "PastKeyValues"]
