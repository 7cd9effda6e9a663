"""In what dtype the search multiplies, and what stays in fp32."""

import pytest
import torch

from jetkernels.postnas import SuperNetwork, small_base
from jetkernels.postnas.blocks import BLOCKS
from jetkernels.postnas.final import logit_distillation_loss
from jetkernels.postnas.precision import NARROW, chosen_precision, multiplies_bf16
from jetkernels.postnas.shapes import Shape
from jetkernels.postnas.teacher import Teacher

SIZES = {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.1}
IDS = torch.randint(257, (2, 64), generator=torch.Generator().manual_seed(0))
PLACEMENT = ("jet", "attn", "swa", "jet")


@pytest.mark.parametrize("has_it", [False, True])
def test_auto_is_bf16_for_wide_bases_on_machines_that_have_it(monkeypatch, has_it):
    monkeypatch.setattr("jetkernels.postnas.precision.multiplies_bf16", lambda device: has_it)
    narrow, wide = (small_base(1, hidden_size=width, **SIZES) for width in (NARROW - 4, NARROW))
    assert (
        chosen_precision("auto", wide) == ("bf16" if has_it else "fp32") and chosen_precision("auto", narrow) == "fp32"
    )
    assert [chosen_precision(asked, narrow) for asked in ("fp32", "bf16")] == ["fp32", "bf16"]


def test_the_machine_is_asked_what_it_has(monkeypatch):
    for amx, avx512 in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx512=avx512: avx512)
        assert multiplies_bf16(torch.device("cpu")) == (amx or avx512)


@pytest.mark.parametrize("layers", [False, True], ids=["stream", "layers"])
@pytest.mark.parametrize("name", BLOCKS)
def test_losses_and_gradients_in_bf16_are_those_in_fp32_but_for_rounding(name, layers):
    found = []
    for precision in ("fp32", "bf16"):
        base = small_base(4, hidden_size=128, **SIZES)
        network = SuperNetwork(
            base, lambda size: BLOCKS[name](size, Shape(32, 32, 4)), teacher=Teacher(base, precision)
        )
        if layers:
            losses = list(network.layer_losses(IDS, PLACEMENT))
        else:
            losses = [network.distillation_loss(IDS, PLACEMENT)]
        loss = torch.stack(losses).sum()
        loss.backward()
        assert loss.dtype == torch.float32 and {p.dtype for p in network.parameters()} == {torch.float32}
        gradients = {n: p.grad for n, p in network.jet.named_parameters() if p.grad is not None}
        found.append((loss.item(), torch.cat([g.flatten() for g in gradients.values()])))
    (loss, gradient), (rounded_loss, rounded) = found
    assert rounded_loss != loss and rounded_loss == pytest.approx(loss, rel=0.05)
    # One token whose read-out is nearly zero in front of a norm has a large gradient with large errors: no closer.
    assert torch.cosine_similarity(rounded, gradient, 0) > 0.98


def test_the_final_distillation_in_bf16_is_that_in_fp32_but_for_rounding():
    base = small_base(2, hidden_size=32, **SIZES)
    student = SuperNetwork(base, lambda size: BLOCKS["GLA"](size, Shape(8, 8, 2))).assemble(("jet", "attn"))
    losses = [logit_distillation_loss(student, base, IDS, precision).item() for precision in ("fp32", "bf16")]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.2)
