"""Which classes of transformers' Auto family know the model."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from .config import JetNemotronConfig
from .modeling import JetNemotronForCausalLM, JetNemotronModel


def register() -> None:
    """Makes `jet_nemotron` known to them."""
    AutoConfig.register(JetNemotronConfig.model_type, JetNemotronConfig)
    AutoModel.register(JetNemotronConfig, JetNemotronModel)
    AutoModelForCausalLM.register(JetNemotronConfig, JetNemotronForCausalLM)
    AutoTokenizer.register(JetNemotronConfig, fast_tokenizer_class=PreTrainedTokenizerFast)
