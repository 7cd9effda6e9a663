"""The Jet-Nemotron hybrid model: configuration, caches, forward, generation, checkpoints, tokenizer."""

from .cache import JetNemotronCache
from .config import JetNemotronConfig
from .hybrid import JetNemotronForCausalLM
from .output import CausalLMOutput
from .tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "CausalLMOutput",
    "JetNemotronCache",
    "JetNemotronConfig",
    "JetNemotronForCausalLM",
    "StreamDecoder",
    "Tokenizer",
]
