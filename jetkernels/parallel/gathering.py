"""From the parts on the ranks back to one model."""

from __future__ import annotations

from jetkernels.model import JetNemotronForCausalLM


def gathered(model: JetNemotronForCausalLM) -> JetNemotronForCausalLM | None:
    """A model of one device, on the CPU, with the weights of one that `tensor_parallel_` or `fully_shard_` divided.

    Every rank has to call it.

    Returns: the model on rank 0, such as `save_pretrained` writes; None on the others.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict  # half a second

    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not state:
        return None
    whole = JetNemotronForCausalLM.empty(model.config, dtype=model.dtype)
    whole.load_state_dict(state)
    whole.companions = model.companions
    return whole.train(model.training)
