"""What may be saved, which is what can be loaded; and where to."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from support.model_cases import small_config, small_model
from test_checkpoint import content, saved

from jetkernels.model import JetNemotronForCausalLM, Tokenizer


class Adapter(torch.nn.Module):
    """As adapters wrap a layer."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.lora_A = layer, torch.nn.Linear(layer.in_features, 2)


def wrapped(model):
    model.model.layers[0].mlp.up_proj = Adapter(model.model.layers[0].mlp.up_proj)


def parametrized(model):
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)


def pruned(model):
    from torch.nn.utils import prune

    prune.l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", 0.5)


def shortened(model):
    del model.model.layers[1]


def widened(model):
    model.model.embed_tokens = torch.nn.Embedding(70, 32)


def integers(model):
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)


def sparse(model):
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.detach().to_sparse())


class Scaled(torch.Tensor):
    """As libraries of quantisation make them: it says that it is float32."""

    @staticmethod
    def __new__(cls, like):
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        return cls(arguments[0])


def dressed(model):
    layer = model.model.layers[0].mlp.up_proj
    like = layer.weight
    del layer.weight
    layer.register_buffer("weight", Scaled(like))


def quantized(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, inplace=True)


def own_head(model):
    model.lm_head = torch.nn.Linear(32, 61, bias=False)


UP = r"model\.layers\.0\.mlp\.up_proj"


@pytest.mark.parametrize(
    "change, message",
    [
        (
            wrapped,
            rf"do not fit the config: missing {UP}\.weight; unexpected {UP}\.base_layer\.weight, "
            r".*adapters.*merge or remove them first",
        ),
        (
            parametrized,
            rf"missing {UP}\.weight; unexpected {UP}\.parametrizations\.weight\.original0, "
            r".*torch\.save\(model\.state_dict\(\)",
        ),
        (pruned, rf"missing {UP}\.weight; unexpected {UP}\.weight_mask, {UP}\.weight_orig "),
        (shortened, r"missing model\.layers\..* and \d+ more; unexpected .*other layers or sizes\?"),
        (widened, r"model\.embed_tokens\.weight must be \[61, 32\], got \[70, 32\] \("),
        (integers, rf"{UP}\.weight in the model must be one of F64, F32, F16, BF16, got torch\.int8, which"),
        (sparse, rf"{UP}\.weight in the model must be one of .*, got torch\.sparse_coo, which"),
        (dressed, rf"{UP}\.weight in the model must be one of .*, got Scaled, which"),
        (quantized, r"missing model\.layers\.0\..*; unexpected .*quantisation"),
        (own_head, r"^save: lm_head\.weight must equal model\.embed_tokens\.weight: the config ties them"),
        (
            lambda model: setattr(model.config, "num_attention_heads", 3),
            "^config: num_attention_heads must be a multiple of num_key_value_heads = 2, got 3",
        ),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, change, message):
    saved(tmp_path / "m", 20_000)
    before = content(tmp_path)
    model = small_model(seed=7)
    change(model)
    for folder in ("m", "new"):
        with pytest.raises(ValueError, match=message):
            model.save_pretrained(tmp_path / folder)
        assert content(tmp_path) == before and [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("shard_bytes", [10**9, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_what_shares_memory_is_saved_under_each_name(tmp_path, tied, shard_bytes):
    model = small_model(tie_word_embeddings=tied)
    if tied:
        own_head(model)
    model.lm_head.weight = model.model.embed_tokens.weight
    # And two that share a part of it.
    mlp = model.model.layers[0].mlp
    both = torch.randn(72, 32)
    mlp.gate_proj.weight, mlp.up_proj.weight = torch.nn.Parameter(both[:48]), torch.nn.Parameter(both[24:])
    model.save_pretrained(tmp_path / "m", shard_bytes)
    again = JetNemotronForCausalLM.from_pretrained(tmp_path / "m")
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    places = sorted((p.data_ptr(), p.data_ptr() + p.nbytes) for p in again.parameters())
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(places))


@pytest.mark.parametrize("most", [0, -1, True, "5GB", 1.5, 5e9, None])
def test_the_size_of_a_shard_is_a_number_of_bytes(tmp_path, most):
    with pytest.raises(
        ValueError, match=f"^save: max_shard_bytes must be a positive integer, bytes of a file, got {most!r}$"
    ):
        small_model().save_pretrained(tmp_path / "m", most)
    assert list(tmp_path.iterdir()) == []


def test_saving_draws_no_random_numbers(tmp_path):
    model = small_model()
    before = torch.get_rng_state()
    model.save_pretrained(tmp_path / "m", np.int64(20_000))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_place_that_is_none_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "afile").write_text("")
    (tmp_path / "folder").mkdir()
    for save in (small_model().save_pretrained, Tokenizer.byte_level().save_pretrained):
        with pytest.raises(FileNotFoundError, match="^save: the path must have a name, got ''$"):
            save("")
        for name in ("afile", "afile/x", "afile/x/y"):
            with pytest.raises(NotADirectoryError, match=f"^save: {tmp_path}/afile is not a folder$"):
                save(name)
    for load in (JetNemotronForCausalLM.from_pretrained, Tokenizer.from_pretrained):
        with pytest.raises(FileNotFoundError, match="the folder must have a name, got ''$"):
            load("")
    with pytest.raises(IsADirectoryError, match=f"^save: {tmp_path}/folder is a folder, it must be a file$"):
        small_config().save("folder")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["afile", "folder"]
