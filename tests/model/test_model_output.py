"""What a call of the model gives, and which parameters an optimiser should let decay: as users of transformers and
flash-linear-attention expect.
"""

import copy
import io

import pytest
import torch
import torch.distributed as dist
from support.model_cases import VOCAB, small_block, small_config, small_model, tokens

from jetkernels.model import CausalLMOutput, JetNemotronForCausalLM
from jetkernels.modules import parameter_groups
from jetkernels.postnas.blocks import GatedDeltaNet, Mamba2
from jetkernels.postnas.shapes import Shape


def test_the_loss_comes_first():
    model, ids = small_model(), tokens(2, 6)
    out = model(ids, labels=ids)
    assert out[0] is out.loss is out["loss"] and out.loss.dim() == 0
    assert out[1] is out.logits is out["logits"] and out.logits.shape == (2, 6, VOCAB)
    assert out.cache is None and len(out) == 2 and list(out) == ["loss", "logits"]
    loss, logits = out.to_tuple()
    assert loss is out.loss and logits is out.logits and out[1:] == (logits,) and out[:2] == (loss, logits)
    with pytest.raises(IndexError):
        out[2]


def test_what_is_none_is_skipped():
    model, ids = small_model(), tokens(2, 6)
    out = model(ids)
    assert out[0] is out.logits and out.loss is None and "loss" not in out
    with torch.no_grad():
        cache = model.new_cache(2, 8)
        out = model(ids, cache=cache, labels=ids)
    assert out.to_tuple() == (out.loss, out.logits, cache) and out.cache is cache


def test_the_output_is_that_of_transformers():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    logits, loss = torch.randn(1, 2, 3), torch.tensor(1.0)
    for fields in ({"logits": logits}, {"logits": logits, "loss": loss}):
        ours, theirs = (
            CausalLMOutput(loss=fields.get("loss"), logits=logits, cache=None),
            outputs.CausalLMOutputWithPast(**fields),
        )
        assert list(ours) == list(theirs) and all(
            a is b for a, b in zip(ours.to_tuple(), theirs.to_tuple(), strict=True)
        )
        assert ours[0] is theirs[0] and ours[:2] == theirs[:2] and isinstance(ours, dict) and ours.get("cache") is None


def test_an_output_is_copied_pickled_and_rebuilt():
    out = CausalLMOutput(loss=torch.tensor(2.0), logits=torch.ones(1, 1, 2))
    for other in (
        copy.copy(out),
        copy.deepcopy(out),
        type(out)(out.items()),
        type(out)(dict(out)),
    ):
        assert (
            type(other) is CausalLMOutput and torch.equal(other.logits, out.logits) and torch.equal(other[0], out.loss)
        )


def test_a_compiled_model_gives_the_same_output():
    model, ids = small_model("jet", dtype=torch.float64), tokens(1, 5)
    need, got = model(ids, labels=ids), torch.compile(model, backend="aot_eager")(ids, labels=ids)
    assert type(got) is CausalLMOutput
    torch.testing.assert_close(got.to_tuple(), need.to_tuple())


# ---- weight decay


def exempt(module: torch.nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if getattr(p, "_no_weight_decay", False)}


def reload(block):
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def loaded(block, assign):
    block.load_state_dict(small_block(seed=3).state_dict(), assign=assign)
    return block


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b,
        copy.deepcopy,
        reload,
        lambda b: b.to(torch.bfloat16),
        lambda b: b.half().double(),
        lambda b: b.to("meta").to_empty(device="cpu"),
        lambda b: loaded(b, assign=False),
        lambda b: loaded(b, assign=True),
        lambda b: copy.deepcopy(b.requires_grad_(False)),
    ],
)
def test_the_gate_parameters_are_exempt_from_weight_decay(change):
    assert exempt(change(small_block())) == {"A_log", "dt_bias"}


def test_a_whole_model_keeps_the_exemption():
    model = JetNemotronForCausalLM.random(small_config())
    need = {f"model.layers.{i}.self_attn.{n}" for i in (0, 2) for n in ("A_log", "dt_bias")}
    assert exempt(model) == exempt(copy.deepcopy(model)) == need
    assert exempt(GatedDeltaNet(16, Shape(4, 4, 2))) == exempt(Mamba2(16, Shape(4, 4, 2))) == {"A_log", "dt_bias"}


def test_groups_of_an_optimiser():
    model = small_model()
    marked = model.model.layers[0].mlp.up_proj.weight
    marked._no_weight_decay = True
    decaying, rest = parameter_groups(model.parameters(), 0.1)
    assert decaying["weight_decay"] == 0.1 and rest["weight_decay"] == 0.0
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(decaying["params"]) + len(rest["params"]) == len(names)
    assert all(p.dim() >= 2 for p in decaying["params"]) and {names[id(p)] for p in rest["params"]} >= exempt(model)
    assert any(p is marked for p in rest["params"])
    assert [g["weight_decay"] for g in parameter_groups([model.model.norm.weight], 0.1)] == [0.0]


def test_a_model_under_fsdp_gives_the_same_output():
    from torch.distributed.fsdp import FullyShardedDataParallel

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ids = tokens(2, 5)
        expected = small_model()(ids, labels=ids)
        out = FullyShardedDataParallel(small_model(), device_id=torch.device("cpu"))(ids, labels=ids)
        assert isinstance(out, CausalLMOutput) and list(out) == list(expected)
        assert torch.equal(out.loss, expected.loss) and torch.equal(out.logits, expected.logits)
        out.loss.backward()
    finally:
        dist.destroy_process_group()
