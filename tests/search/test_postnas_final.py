"""Stage 5, and the whole pipeline by one command."""

import json

import pytest
import torch
from support.postnas_cases import TINY_JET, VOCAB, PlantedRows, killed_at_write, search_command, text_folder

from jetkernels.__main__ import main
from jetkernels.model import JetNemotronForCausalLM
from jetkernels.postnas import Loader, Recipe, SuperNetwork, export, small_base
from jetkernels.postnas.base import from_pretrained
from jetkernels.postnas.final import logit_distillation_loss, train_final
from jetkernels.postnas.hybrid import is_hybrid, load_hybrid, load_student, read_path, save_hybrid
from jetkernels.postnas.linear_path import LinearPath
from jetkernels.postnas.shapes import Shape

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}


def pair() -> tuple[JetNemotronForCausalLM, JetNemotronForCausalLM]:
    base = small_base(2, initializer_range=0.3, vocab_size=VOCAB, **SIZES)
    return SuperNetwork(base, TINY_JET).extract(("jet", "attn")), base


def loader() -> Loader:
    return Loader([(PlantedRows(), 1.0)], 8, 21)


def test_distillation_moves_the_mixers_only_and_towards_the_base():
    student, base = pair()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    ids = PlantedRows().rows(8, 20, torch.Generator().manual_seed(0))
    far = logit_distillation_loss(student, base, ids).item()
    losses, more = train_final(student, base, loader(), Recipe(60, 1e-2, warmup=2), Recipe(0), {})
    assert len(losses) == 60 and more == [] and logit_distillation_loss(student, base, ids).item() < 0.7 * far
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name]) != (".self_attn." in name), name
    assert logit_distillation_loss(base, base, ids).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("moment", [1, 3, 5])
def test_then_the_whole_model_is_trained_and_a_killed_run_ends_alike(tmp_path, moment):
    whole, base = pair()
    recipe = Recipe(5, 1e-2, warmup=1, save_every=2)
    losses = train_final(whole, base, loader(), recipe, recipe, {"seed": 0})
    assert losses[1][-1] < losses[1][0]
    with killed_at_write(moment):
        train_final(*pair(), loader(), recipe, recipe, {"seed": 0}, tmp_path)
    student, base = pair()
    assert train_final(student, base, loader(), recipe, recipe, {"seed": 0}, tmp_path) == losses
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value, rtol=0, atol=0)


def test_recomputed_layers_give_the_same_gradients():
    student, base = pair()
    ids = PlantedRows().rows(3, 20, torch.Generator().manual_seed(0))
    gradients = []
    calls = []
    student.model.layers[0].register_forward_pre_hook(lambda *arguments: calls.append(1))
    for student.model.recompute_layers in (False, True):
        student.zero_grad()
        calls.clear()
        logit_distillation_loss(student, base, ids).backward()
        gradients.append({name: p.grad.clone() for name, p in student.named_parameters()})
        assert len(calls) == 1 + student.model.recompute_layers
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-6, atol=1e-9)
    with torch.no_grad():
        cache = student.new_cache(3, 20)
        steps = [student(ids[:, t : t + 1], cache=cache).logits for t in range(20)]
        torch.testing.assert_close(torch.cat(steps, 1), student(ids).logits, rtol=0, atol=1e-4)


def test_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="must have one vocabulary"):
        train_final(pair()[0], small_base(1, **SIZES), loader(), Recipe(0), Recipe(0), {})


def whole_search(folder, **changes) -> list[str]:
    folders = {"text": text_folder(folder / "text"), "output": folder / "out"}
    sizes = {"layers": 3, "hidden_size": 32, "intermediate_size": 48, "base_steps": 2, "recompute": True, "full": 1}
    rows = {"shape": "8x16x2", "steps": 2, "batch": 2, "length": 80, "distances": 4, "examples": 2}
    return search_command("all", **folders, device="cpu", **sizes, **rows, **changes)


def test_a_block_that_no_config_can_say_is_carried_to_the_end_and_kept(tmp_path, capsys):
    for _ in range(2):
        assert main(whole_search(tmp_path, block="RetNet", seeds=1, layer_steps=1)) == 0
    out, said = tmp_path / "out", "No model is exported: the config of a model cannot say that a layer is a RetNet."
    assert not (out / "design").exists() and said in capsys.readouterr().out
    assert "# Sizes of the RetNet" in (out / "shapes" / "report.md").read_text()
    assert f"The linear ones are RetNet. {said}" in (out / "final" / "report.md").read_text()
    assert "RetNet, chosen (KxVxH): " in (out / "report.md").read_text()
    assert [path.name for path in sorted((out / "final" / "model").iterdir())] == ["hybrid.ckpt", "hybrid.json"]
    base = from_pretrained(out / "base")
    shapes, final = (load_hybrid(out / stage / "model", base) for stage in ("shapes", "final"))
    assert sum(type(layer.self_attn).__name__ == "BlockMixer" for layer in final.model.layers) == 1
    different = [n for n, p in final.state_dict().items() if not torch.equal(p, shapes.state_dict()[n])]
    assert any(".block.v_proj" in name for name in different)
    (out / "final" / "model" / "hybrid.json").write_text("{}")
    arguments = {"base": out / "base", "model": out / "final" / "model", "output": tmp_path / "again", "device": "cpu"}
    assert main(search_command("final", **arguments)) == 1
    names = "placement, shape, block, design, window_size"
    assert f"hybrid.json must name {names}; KeyError('shape')" in capsys.readouterr().err


def test_a_shape_that_a_design_does_not_fit_is_refused_before_the_first_stage(tmp_path, capsys):
    text = text_folder(tmp_path / "text")
    words = search_command("all", text=text, output=tmp_path / "out", device="cpu", shape="8x8x2")
    assert main(words) == 2
    said = "--shape must have H*V of at least 32 for the designs of stage 3, got 16"
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


@torch.no_grad()
def test_a_kept_hybrid_is_the_one_that_was_saved(tmp_path):
    base = small_base(3, vocab_size=VOCAB, **SIZES)
    path, placement = LinearPath(Shape(8, 8, 2), "GLA"), ("jet", "swa", "attn")
    model = SuperNetwork(base, path.paths(), window_size=5, train_attention=True).assemble(placement)
    model.model.layers[1].self_attn.v_proj.weight.add_(0.1)
    save_hybrid(tmp_path, model, placement, path, 5)
    ids = PlantedRows().rows(2, 12, torch.Generator().manual_seed(0))
    loaded = load_hybrid(tmp_path, base)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert is_hybrid(tmp_path) and read_path(tmp_path) == path and loaded.config.layer_types == list(placement)
    loaded.model.embed_tokens.weight.zero_()
    assert base.model.embed_tokens.weight.abs().sum() > 0
    with pytest.raises(ValueError, match="must be of a base of these sizes"):
        load_hybrid(tmp_path, small_base(3, **SIZES))
    description = json.loads((tmp_path / "hybrid.json").read_text())
    for name in ("placement", "window_size"):
        rest = {key: value for key, value in description.items() if key != name}
        (tmp_path / "hybrid.json").write_text(json.dumps(rest))
        with pytest.raises(ValueError, match=f"must name placement, .* KeyError\\('{name}'\\)"):
            load_hybrid(tmp_path, base)
    (tmp_path / "hybrid.json").write_text(json.dumps(description))
    weights = tmp_path / "hybrid.ckpt"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(ValueError, match="is damaged"):
        load_hybrid(tmp_path, base)


def test_one_command_runs_every_stage_and_ends_with_a_model_that_generates(tmp_path, capsys):
    assert main(whole_search(tmp_path)) == 0
    overview = (tmp_path / "out" / "report.md").read_text()
    for stage in ("base", "placement", "blocks", "design", "shapes", "final"):
        assert "## Provenance" in (tmp_path / "out" / stage / "report.md").read_text(), stage
        assert f"[{stage}]({stage}/report.md)" in overview
    placement = " ".join(json.loads((tmp_path / "out" / "placement" / "result.json").read_text())["placement"])
    assert f"`{placement}`" in overview and "was trained on 320 tokens" in overview and "It cannot show:" in overview
    capsys.readouterr()
    model = tmp_path / "out" / "final" / "model"
    assert (
        main(["generate", "--model", str(model), "--prompt", "def ", "--max-new-tokens", "3", "--device", "cpu"]) == 0
    )
    assert JetNemotronForCausalLM.from_pretrained(model).config.layer_types.count("attn") == 1


def test_a_folder_is_of_a_model_or_of_a_hybrid_that_none_can_say(tmp_path):
    """What a run of other options left in a folder must not pass for what this one wrote."""
    base = small_base(2, vocab_size=VOCAB, **SIZES)
    path, placement = LinearPath(Shape(8, 8, 2), "GLA"), ("jet", "attn")
    kept = SuperNetwork(base, path.paths()).assemble(placement)
    save_hybrid(tmp_path / "kept", kept, placement, path, 5)
    for folder in ("kept", "exported"):
        export(SuperNetwork(base, TINY_JET), placement, tmp_path / folder)
    with pytest.raises(ValueError, match=r"kept must hold a model or the weights of a hybrid, not both"):
        load_student(tmp_path / "kept", base)
    with pytest.raises(ValueError, match=r"exported must hold a model or the weights of a hybrid, not both"):
        save_hybrid(tmp_path / "exported", kept, placement, path, 5)
    assert not is_hybrid(tmp_path / "exported") and not (tmp_path / "exported" / "hybrid.ckpt").exists()
