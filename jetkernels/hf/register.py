"""Which classes of transformers' Auto family know the model."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    configuration_utils,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .config import LAYER_NAMES, JetNemotronConfig
from .modeling import JetNemotronForCausalLM, JetNemotronModel


def register() -> None:
    """Makes `jet_nemotron` known to them."""
    AutoConfig.register(JetNemotronConfig.model_type, JetNemotronConfig)
    AutoModel.register(JetNemotronConfig, JetNemotronModel)
    AutoModelForCausalLM.register(JetNemotronConfig, JetNemotronForCausalLM)
    # By this name Trainer knows that labels are to be shifted, where it computes the loss itself (label smoothing).
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[JetNemotronConfig.model_type] = JetNemotronForCausalLM.__name__
    # Trainer reads the config.json of a run that goes on as one of any model.
    allowed = configuration_utils.ALLOWED_ATTN_LAYER_TYPES
    more = (kind for kind in LAYER_NAMES if kind not in allowed)
    configuration_utils.ALLOWED_ATTN_LAYER_TYPES = (*allowed, *more)  # type: ignore[assignment]
    AutoTokenizer.register(JetNemotronConfig, fast_tokenizer_class=PreTrainedTokenizerFast)
