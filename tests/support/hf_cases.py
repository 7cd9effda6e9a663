"""Our small models as models of transformers."""

import torch
import transformers
from support.model_cases import VOCAB, small_model

import jetkernels.hf as hf

transformers.utils.logging.set_verbosity_error()  # it tells of every config and file it reads
transformers.utils.logging.disable_progress_bar()
NO_STOP = {"eos_token_id": None, "bos_token_id": 0}


def of(model, **changes) -> hf.JetNemotronForCausalLM:
    """The model of transformers that has the parameters of one of ours, in evaluation mode."""
    other = hf.JetNemotronForCausalLM(hf.JetNemotronConfig(**model.config.to_dict() | changes)).to(model.dtype)
    other.load_state_dict({"lm_head.weight": model.head_weight} | model.state_dict())
    return other.eval()


def pair(*layer_types: str, dtype=torch.float32, **changes):
    """One of our models and the same one of transformers."""
    model = small_model(*layer_types, dtype=dtype, **NO_STOP | changes).eval()
    return model, of(model)


def mask(left: bool, *lengths: int, width: int = 11) -> torch.Tensor:
    """[B, width] with so many tokens in each row."""
    found = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in zip(found, lengths):
        row[width - length :] = 1 if left else row[width - length :]
        row[:length] = row[:length] if left else 1
    return found


__all__ = ["NO_STOP", "VOCAB", "mask", "of", "pair"]
