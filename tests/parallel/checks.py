"""What the ranks of a torchrun check: every function `check_*`. Run as a program; rank 0 writes {name: what failed}.

python -m torch.distributed.run --standalone --nproc-per-node N tests/parallel/checks.py OUTPUT
"""

import json
import os
import random
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.model_cases import padded, small_model, tokens
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from jetkernels.model import JetNemotronForCausalLM
from jetkernels.modules import JetBlock, parameter_groups
from jetkernels.modules.jet_block import GATE_PARAMETERS
from jetkernels.parallel import (
    clip_grad_norm_,
    context_parallel_,
    fully_shard_,
    gathered,
    split_sequence,
    tensor_parallel_,
)

SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 32, "intermediate_size": 48}
JET = {"num_heads": 4, "head_dim": 8, "expand_v": 1.5, "dconv_generator_reduction": 4}


def model(*layers: str, window: int = 5, dtype: torch.dtype = torch.float32, **changes) -> JetNemotronForCausalLM:
    """The same on every rank."""
    sections = {"jet": JET, "swa": {"window_size": window}}
    kinds = layers or ("jet", "swa", "jet", "attn")
    return small_model(*kinds, dtype=dtype, **(SIZES | {"efficient_attention_config": sections} | changes))


def whole(x: Tensor | None) -> Tensor:
    assert x is not None
    return x.full_tensor() if isinstance(x, DTensor) else x


def mesh(*shape: int, names: tuple[str, ...] = ("tp",)):
    return init_device_mesh("cpu", shape or (dist.get_world_size(),), mesh_dim_names=names)


def same_gradients(divided: JetNemotronForCausalLM, one: JetNemotronForCausalLM, part: float = 1e-5) -> None:
    """Each within this part of its own largest value, which is zero where a query sees one key."""
    expected = dict(one.named_parameters())
    found = dict(divided.named_parameters())
    assert list(found) == list(expected)
    for name, parameter in found.items():
        want = whole(expected[name].grad)
        error, largest = (whole(parameter.grad) - want).abs().max(), want.abs().max()
        assert error <= part * largest + 1e-9, f"{name}: {error:.1e} of {largest:.1e}"


def check_tensor_parallel_is_one_device() -> None:
    draw = random.Random(0)
    for _ in range(4):
        layers = [draw.choice(["jet", "swa", "attn"]) for _ in range(draw.randint(1, 4))]
        bias, norm, tied = (draw.random() < 0.5 for _ in range(3))
        sizes = {"attention_bias": bias, "use_qk_norm": norm, "tie_word_embeddings": tied}
        one, divided = (model(*layers, **sizes) for _ in range(2))
        assert tensor_parallel_(divided, mesh()) is divided
        ids = tokens(draw.randint(1, 3), draw.randint(2, 90), seed=draw.randrange(100))
        out, got = one(ids, labels=ids), divided(ids, labels=ids)
        torch.testing.assert_close(got.logits, out.logits, rtol=0, atol=1e-5)
        out.loss.backward()
        got.loss.backward()
        same_gradients(divided, one)


def check_tensor_parallel_holds_its_part() -> None:
    divided, ranks = model(), dist.get_world_size()
    full = {name: p.numel() for name, p in divided.named_parameters()}
    tensor_parallel_(divided, mesh())
    for name, p in divided.named_parameters():
        layer = ".self_attn." in name or ".mlp." in name
        kept = not layer or "norm" in name or "generator.w1" in name
        held = p.to_local().numel() if isinstance(p, DTensor) else p.numel()
        assert held * (1 if kept else ranks) == full[name], name
    jet = divided.model.layers[0].self_attn
    assert jet.A_log._no_weight_decay and jet.config.num_heads == JET["num_heads"] // ranks
    cache = divided.new_cache(2, 16)
    assert cache.layers[0].recurrent_state.shape[1] == JET["num_heads"] // ranks
    assert cache.layers[3].key.shape[1] == SIZES["num_key_value_heads"] // ranks


def check_tensor_parallel_generates() -> None:
    one, divided = model(), tensor_parallel_(model(), mesh())
    ids, mask = padded([tokens(9), tokens(4, seed=2), tokens(1, seed=3)], left=True)
    for options in ({}, {"attention_mask": mask}):
        assert torch.equal(
            divided.generate(ids, max_new_tokens=12, **options), one.generate(ids, max_new_tokens=12, **options)
        )
    caches = one.new_cache(2, 40), divided.new_cache(2, 40)
    ids = tokens(2, 11)
    for piece in (ids[:, :7], ids[:, 7:8], ids[:, 8:]):
        expected, got = (m(piece, cache=cache).logits for m, cache in zip((one, divided), caches))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    drafts = tokens(2, 3, seed=5)
    expected, got = (m.verify(drafts, cache) for m, cache in zip((one, divided), caches))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    for cache in caches:
        cache.commit([2, 0])
    expected, got = (m.step(drafts[:, 0], cache) for m, cache in zip((one, divided), caches))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert divided.has_device_steps


def check_tensor_parallel_trains() -> None:
    """With an optimiser, a clipped norm and layers that are computed twice: as on one device."""
    ids = tokens(2, 30)
    one, divided = model(), tensor_parallel_(model(), mesh())
    divided.model.recompute_layers = True
    optimisers = [torch.optim.AdamW(parameter_groups(m.parameters(), 0.1), lr=1e-2) for m in (one, divided)]
    for _ in range(3):
        for m, optimiser in zip((one, divided), optimisers):
            m(ids, labels=ids).loss.backward()
            norm = clip_grad_norm_(m.parameters(), 0.5)
            if m is one:
                expected = torch.nn.utils.get_total_norm([p.grad for p in m.parameters()])
                torch.testing.assert_close(expected, torch.tensor(0.5), rtol=1e-5, atol=0)
                before = norm
            torch.testing.assert_close(norm, before, rtol=1e-5, atol=0)
            optimiser.step()
            optimiser.zero_grad()
    torch.testing.assert_close(divided(ids).logits, one(ids).logits, rtol=0, atol=1e-3)


def check_what_cannot_be_divided_is_refused() -> None:
    ranks = dist.get_world_size()
    for changes, name in (
        ({"intermediate_size": 49}, "intermediate_size"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8}, "num_attention_heads"),
        ({"num_attention_heads": 8, "num_key_value_heads": 1}, "num_key_value_heads"),
        ({"efficient_attention_config": {"jet": JET | {"num_heads": 3}, "swa": {"window_size": 5}}}, "jet.num_heads"),
    ):
        m = model(**changes)
        before = m.state_dict()
        with pytest.raises(ValueError, match=f"{name} must be a multiple of the {ranks} ranks"):
            tensor_parallel_(m, mesh())
        assert all(torch.equal(before[key], value) for key, value in m.state_dict().items())
    quantised = model()
    quantised.quantize_(8)
    with pytest.raises(ValueError, match="nor be quantised, got q_proj.scale"):
        tensor_parallel_(quantised, mesh())
    adapted = model()
    adapted.model.layers[3].mlp.up_proj.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="must have no adapter, .* got up_proj.adapter.weight"):
        tensor_parallel_(adapted, mesh())
    assert not [p for p in adapted.parameters() if isinstance(p, DTensor)]
    divided = tensor_parallel_(model(), mesh())
    with pytest.raises(ValueError, match="must not be divided yet"):
        tensor_parallel_(divided, mesh())
    assert tensor_parallel_(model("jet", num_attention_heads=3, num_key_value_heads=3, head_dim=8), mesh())


def check_a_divided_model_is_gathered() -> None:
    for dtype, divide in ((torch.float32, lambda m: tensor_parallel_(m, mesh())), (torch.bfloat16, fully_shard_)):
        expected = model(dtype=dtype).state_dict()
        got = gathered(divide(model(dtype=dtype)))
        assert (got is None) == (dist.get_rank() > 0)
        if got is not None:
            found = got.state_dict()
            assert list(found) == list(expected)
            assert all(v.dtype == expected[k].dtype and torch.equal(v, expected[k]) for k, v in found.items())


def check_fully_sharded_is_one_device() -> None:
    ids = tokens(4, 30)
    rows = ids.tensor_split(dist.get_world_size())[dist.get_rank()]
    one = model()
    one(ids, labels=ids).loss.backward()
    divided = fully_shard_(model())
    out = divided(rows, labels=rows)
    torch.testing.assert_close(out.logits, one(rows).logits, rtol=0, atol=1e-5)
    out.loss.backward()
    same_gradients(divided, one)


def check_gates_stay_wide_when_fully_sharded() -> None:
    ids = tokens(2, 30)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shapes = [()] if dist.get_world_size() == 2 else [(), (2, dist.get_world_size() // 2)]
    for shape in shapes:
        for dtype, options in ((torch.bfloat16, {}), (torch.float32, {"mp_policy": policy})):
            one = model(dtype=torch.bfloat16)
            loss = one(ids, labels=ids).loss
            loss.backward()
            m = model(dtype=dtype)
            gates = [getattr(b, name) for b in m.modules() if isinstance(b, JetBlock) for name in GATE_PARAMETERS]
            values = [gate.detach().clone() for gate in gates]
            fully_shard_(m, mesh(*shape, names=("replicate", "shard")[-max(1, len(shape)) :]), **options)
            seen: list[tuple[torch.dtype, torch.dtype]] = []
            inner = JetBlock._gates

            def noted(self: JetBlock, a: Tensor, b: Tensor, inner: Callable = inner, seen: list = seen) -> tuple:
                seen.append((self.A_log.dtype, a.dtype))
                return inner(self, a, b)

            JetBlock._gates = noted
            try:
                got = m(ids, labels=ids).loss
                got.backward()
            finally:
                JetBlock._gates = inner
            assert seen == [(torch.float32, torch.bfloat16)] * 2
            torch.testing.assert_close(got, loss, rtol=0, atol=2e-3)
            optimiser = torch.optim.AdamW(m.parameters(), lr=1e-2)
            clip_grad_norm_(m.parameters(), 1.0)
            optimiser.step()
            held = [getattr(b, name) for b in m.modules() if isinstance(b, JetBlock) for name in GATE_PARAMETERS]
            for parameter, value, gate in zip(held, values, gates, strict=True):
                assert parameter.dtype == torch.float32 and not torch.equal(whole(parameter), value)
                assert whole(parameter.grad).dtype == torch.float32 and gate.shape == value.shape
            optimiser.zero_grad()
            assert m(ids, labels=ids).loss < got


def check_sharded_and_tensor_parallel() -> None:
    if dist.get_world_size() < 4:
        return
    both = mesh(dist.get_world_size() // 2, 2, names=("dp", "tp"))
    ids = tokens(4, 30)
    rows = ids.tensor_split(both["dp"].size())[both["dp"].get_local_rank()]
    one = model()
    one(ids, labels=ids).loss.backward()
    divided = fully_shard_(tensor_parallel_(model(), both["tp"]), both["dp"])
    divided(rows, labels=rows).loss.backward()
    same_gradients(divided, one)
    norm, expected = (clip_grad_norm_(m.parameters(), 1.0) for m in (divided, one))
    torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)


def check_context_parallel_is_one_device() -> None:
    draw, ranks, rank = random.Random(1), dist.get_world_size(), dist.get_rank()
    for window in (1, 2, 5, 40):
        layers = [draw.choice(["jet", "swa", "attn"]) for _ in range(draw.randint(1, 4))]
        one, divided = model(*layers, window=window), context_parallel_(model(*layers, window=window))
        divided.model.recompute_layers = draw.random() < 0.5
        ids = tokens(draw.randint(1, 3), draw.choice([ranks, ranks + 1, 37, 150]), seed=draw.randrange(100))
        mine, following = split_sequence(ids)
        start = sum(part.shape[1] for part in ids.tensor_split(ranks, 1)[:rank])
        assert torch.equal(mine, ids[:, start : start + mine.shape[1]])
        out = one(ids, labels=ids)
        got = divided(mine).logits
        torch.testing.assert_close(got, out.logits[:, start : start + mine.shape[1]], rtol=0, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(divided(mine).logits, got, rtol=0, atol=1e-5)
        loss = F.cross_entropy(got.flatten(0, 1), following.flatten(), reduction="sum")
        (loss / (ids.numel() - len(ids))).backward()
        out.loss.backward()
        for parameter in divided.parameters():
            dist.all_reduce(parameter.grad)
        same_gradients(divided, one)


def check_context_parallel_refuses() -> None:
    divided, ids = context_parallel_(model()), tokens(2, 8)
    with pytest.raises(ValueError, match="whole sequences .* got a cache"):
        divided(ids, cache=divided.new_cache(2, 8))
    with pytest.raises(ValueError, match="whole sequences .* got a packed or padded batch"):
        divided(ids, attention_mask=torch.ones(2, 8).tril())
    with pytest.raises(ValueError, match="tensor parallel: the model must not be divided yet, got a ContextParallel"):
        tensor_parallel_(divided, mesh())
    with pytest.raises(ValueError, match="context parallel: the model must not be divided yet, got a ContextParallel"):
        context_parallel_(divided)
    with pytest.raises(ValueError, match="context parallel: the model must not be divided yet, got a TensorParallel"):
        context_parallel_(tensor_parallel_(model(), mesh()))
    with pytest.raises(ValueError, match="a token for each of the"):
        split_sequence(ids[:, : dist.get_world_size() - 1])


def main(output: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    failed = {}
    for name, check in [pair for pair in globals().items() if pair[0].startswith("check_")]:
        what = ""
        try:
            check()
        except BaseException:
            what = traceback.format_exc()
        every: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(every, what)
        failed[name] = "".join(f"rank {rank}: {text}" for rank, text in enumerate(every) if text)
    if dist.get_rank() == 0:
        with open(output, "w") as file:
            json.dump(failed, file)
    leave()


def leave() -> None:
    """Ends the process: where a mesh is still held, gloo's threads abort one that ends as others do (PyTorch 2.13)."""
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
