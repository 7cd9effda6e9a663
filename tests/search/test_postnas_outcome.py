"""What stage 5 reports of the hybrid beside its base: completions, the way to the base's loss, speed, what it cost."""

import hashlib
import json
import math

import pytest
import torch
from support.postnas_cases import VOCAB, PlantedRows, killed_at_write, search_command, text_folder, tiny_base_folder

from jetkernels.__main__ import main
from jetkernels.model import Tokenizer
from jetkernels.model.speed import decode_speed
from jetkernels.postnas import Loader, Recipe, small_base
from jetkernels.postnas.base import next_token_loss
from jetkernels.postnas.checkpoints import load_state
from jetkernels.postnas.completions import FIXED, FROM_TEXT, NEW_TOKENS, complete, prompts_of, read_prompts
from jetkernels.postnas.power_law import fit_power_law
from jetkernels.postnas.report.final import distance_sentence
from jetkernels.postnas.report.placement import read_budgets
from jetkernels.postnas.report.tables import quoted
from jetkernels.postnas.training import train

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}


def test_a_power_law_is_found_again_and_what_does_not_fall_has_none():
    points = [(n, 30.0 * n**-0.4) for n in (10, 100, 1000, 5000)]
    law = fit_power_law([(0, 9.0), *points, (9000, -0.1)])
    assert law.scale == pytest.approx(30) and law.exponent == pytest.approx(0.4) and law.points == 4
    assert law.error == pytest.approx(0, abs=1e-9) and law.tokens(law.distance(123.0)) == pytest.approx(123)
    assert (
        fit_power_law(points[:2]) is None
        and fit_power_law([(n, d) for (n, _), (_, d) in zip(points, points[::-1])]) is None
    )
    assert fit_power_law([(100, 3.0), (100, 2.0), (100, 1.0)]) is None  # all at one number of tokens
    assert fit_power_law([(10**6, 3.0), (10**6 + 1, 2.0), (10**6 + 2, 1.0)]) is None  # 1e2000000 at one token, or so
    noisy = fit_power_law([(n, d * math.exp(0.1 * (-1) ** i)) for i, (n, d) in enumerate(points)])
    assert 0.1 < noisy.error < 0.2  # the four deviate by 0.1, and two degrees of freedom are left


def test_the_distance_is_said_and_an_extrapolation_is_called_one():
    law = fit_power_law([(100, 2.0), (400, 1.0), (1600, 0.5)])
    far = distance_sentence([(0, 9.0), (100, 4.0), (400, 3.0), (900, 2.8)], 2.0, law)
    assert "+0.8000 nats" in far and "not reached" in far and "Extrapolation, not a measurement" in far
    assert "comes to 0.5 nats after 1.6e+03 tokens" in far
    assert "No power law" in distance_sentence([(0, 4.0), (9, 3.0)], 2.0, None)
    left = distance_sentence([(0, 4.0), (100, 2.4), (200, 2.6)], 2.0, None)
    assert "no longer within 0.5 nats, where it was after 100 tokens." in left and "not reached" not in left
    near = distance_sentence([(0, 4.0), (100, 2.5), (200, 2.4)], 2.0, law)
    assert "first measured within it after 100 tokens" in near and "Extrapolation" not in near


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_the_loss_on_held_out_rows_is_followed_and_survives_a_kill(tmp_path, moment):
    def run(folder=None):
        model = small_base(1, vocab_size=VOCAB, **SIZES)
        held_out = PlantedRows().rows(4, 21, torch.Generator().manual_seed(9))

        def measured() -> float:
            with torch.no_grad():
                return next_token_loss(model, held_out).item()

        losses = train(
            "some",
            dict(model.named_parameters()),
            lambda rows, step: next_token_loss(model, rows),
            Loader([(PlantedRows(), 1.0)], 4, 21),
            Recipe(7, 1e-2, warmup=1, save_every=3),
            {},
            None if folder is None else folder / "some.ckpt",
            held_out=measured,
            held_out_every=2,
        )
        assert losses.held_out[-1] == (7, measured())
        return losses

    whole = run()
    assert [step for step, _ in whole.held_out] == [2, 4, 6, 7] and whole.held_out[0][1] > whole.held_out[-1][1]
    assert whole.all_tokens == 7 * 4 * 20
    with killed_at_write(moment):
        run(tmp_path)
    assert run(tmp_path).held_out == whole.held_out


def test_completions_are_the_most_likely_tokens_of_each_model():
    tokenizer = Tokenizer.byte_level()
    base, hybrid = (small_base(1, seed, initializer_range=0.3, **SIZES) for seed in (1, 2))
    prompts = prompts_of(["abc", "x"], torch.arange(200) % 256, tokenizer)
    assert len(prompts) == 2 + FROM_TEXT and prompts[0].tolist() == list(b"abc")
    again = prompts_of(["abc", "x"], torch.arange(200) % 256, tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(prompts, again))
    found = complete(base, hybrid, prompts[:2], tokenizer)
    for model, text in ((base, found[0].base), (hybrid, found[0].hybrid)):
        ids = prompts[0]
        for _ in range(NEW_TOKENS):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids[None]).logits[0, -1:].argmax(-1)])
            if ids[-1] == model.config.eos_token_id:
                break
        assert tokenizer.decode(ids[3:]) == text
    assert found[0].prompt == "abc" and found[0].base != found[0].hybrid


def test_prompts_of_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("one\n\n two\r\nthree\u2028 \x0cfour\n".encode())
    assert read_prompts(path) == ["one", " two", "three\u2028 \x0cfour"]
    path.write_text("\n")
    with pytest.raises(ValueError, match="must hold a prompt a line"):
        read_prompts(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="must be UTF-8"):
        read_prompts(path)


def test_text_of_a_model_fits_a_cell():
    assert quoted("a|b\n`c`\x00") == "`` a\\|b\u21b5`c`\ufffd ``"
    assert quoted("") == "(nothing)" and quoted("  \t") == "(3 blanks)"


def test_the_speed_behind_a_context_names_the_cache_that_holds_it():
    base = small_base(2, **SIZES)
    (_, small), (speed, large) = (decode_speed(base, context, 4, 1.0) for context in (10, 1000))
    # Keys and values of 16 elements, fp32, in two layers; the rest holds no tokens.
    assert large - small == 990 * 2 * 2 * 16 * 4 and speed > 0
    for wrong in ((0, 4), (10, 0)):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            decode_speed(base, *wrong)


def test_the_reports_of_a_search_hold_base_and_hybrid_side_by_side(tmp_path, capsys):
    base, prompts = tiny_base_folder(tmp_path / "base"), tmp_path / "prompts.txt"
    prompts.write_text("def f(\n")
    folders = {"text": text_folder(tmp_path / "text"), "output": tmp_path / "out", "base": base, "device": "cpu"}
    rows = {"shape": "8x16x2", "steps": 3, "batch": 2, "length": 80, "distances": 4, "examples": 2, "seeds": 1}
    more = {"budgets": "1,2", "prompts": prompts, "context": 100, "evaluate_every": 2, "design": "JetBlock"}
    assert main(search_command("all", **folders, **rows, **more)) == 0
    out = tmp_path / "out"
    report, overview = ((out / name / "report.md").read_text() for name in ("final", "."))
    for text in (report, overview):
        assert "| ` def f( ` |" in text and FIXED[0] not in text
        assert "## Behind 100 tokens" in text and "nats from the base's" in text
    digest = hashlib.sha256((out / "final" / "model" / "model.safetensors").read_bytes()).hexdigest()
    assert f"`{digest}`" in report
    result = json.loads((out / "final" / "result.json").read_text())
    assert [tokens for tokens, _ in result["held out"]] == [0, 320, 480, 800, 960]
    assert result["held out"][0][1] == result["scores"]["hybrid before"]["language modelling"][0]
    assert result["held out"][-1][1] == result["scores"]["hybrid after"]["language modelling"][0]
    assert "| 960 |" in overview and "| base |" in overview
    way = [
        line.split(" | ")
        for line in overview.split("(tokens/s) |\n|---|---|---|---|\n")[1].split("\n\n")[0].splitlines()
    ]
    stages = ["base", "placement", "blocks", "design", "shapes", "final"]
    assert [row[0].removeprefix("| ") for row in way] == stages and (out / "roadmap.png").stat().st_size
    best = json.loads((out / "shapes" / "result.json").read_text())
    assert way[4][1] == f"JetBlock, {best['best']}" and float(way[4][2]) == round(best["qualities"][best["best"]], 4)
    jet = json.loads((out / "blocks" / "result.json").read_text())["qualities"]["JetBlock"]
    assert (
        f"The line in the picture is JetBlock of stage 2: language modelling, minus the loss {jet:.4f}."
        in (out / "shapes" / "report.md").read_text()
    )
    assert "(tried.png)" in (out / "placement" / "report.md").read_text()
    # Stage 5 is judged by the examples on which stage 1 compared its placements.
    compared = json.loads((out / "placement" / "result.json").read_text())["compared"]
    assert compared[0]["scores"] == result["scores"]["base"]
    assert [(row.budget, row.how) for row in read_budgets(out / "placement")] == [
        (n, how) for n in (1, 2) for how in ("uniform", "by importance", "found")
    ]
    costs = {stage: json.loads((out / stage / "cost.json").read_text()) for stage in ("placement", "blocks", "final")}
    assert {stage: cost["tokens"] for stage, cost in costs.items()} == {
        "placement": 960,
        "blocks": 7 * 480,
        "final": 960,
    }
    assert all(cost["seconds"] > 0 for cost in costs.values())


def test_what_the_report_cannot_use_is_refused_before_anything_is_trained(tmp_path, capsys):
    base = tiny_base_folder(tmp_path / "base")
    folders = {"base": base, "model": base, "output": tmp_path / "out", "device": "cpu"}
    (tmp_path / "result.json").write_text("{}")
    assert main(search_command("final", **folders, placement_folder=tmp_path)) == 1
    assert "must have scores by budget" in capsys.readouterr().err
    assert main(search_command("final", **folders, prompts=tmp_path / "none.txt")) == 1
    assert "none.txt" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["loss", "norm of the gradient"])
def test_a_training_that_breaks_down_stops_and_keeps_its_last_checkpoint(tmp_path, what):
    weight = torch.nn.Parameter(torch.ones(3))

    def step_loss(rows, step):
        if step < 4:
            return weight.square().sum()
        if what == "loss":
            return weight.sum() * math.nan
        return (weight - weight.detach()).sqrt().sum()  # 0, with an infinite gradient

    loader, recipe = Loader([(PlantedRows(), 1.0)], 2, 21), Recipe(5, 1e-2, warmup=1, save_every=1)
    with pytest.raises(RuntimeError, match=f"some: the {what} of step 4 must be finite, got (nan|inf)"):
        train("some", {"weight": weight}, step_loss, loader, recipe, {}, tmp_path / "some.ckpt")
    run = json.loads((tmp_path / "some.ckpt").read_bytes().split(b"\n", 2)[1])["run"]
    kept = load_state(tmp_path / "some.ckpt", "some", run)
    assert len(kept["losses"]) == 4 and weight.isfinite().all()
    torch.testing.assert_close(kept["parameters"]["weight"], weight.detach(), rtol=0, atol=0)
