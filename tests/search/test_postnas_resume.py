"""`jetkernels search`: its command line, and runs that are killed, damaged, foreign, or spread over ranks."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
from support.postnas_cases import killed_at_write, search_command, text_folder, tiny_base_folder

from jetkernels.__main__ import main
from jetkernels.model import JetNemotronForCausalLM, Tokenizer
from jetkernels.postnas import checkpoints, join_ranks, small_base

RESULTS = (
    "report.md",
    "result.json",
    "importance-attn.png",
    "importance-swa.png",
    "tried.png",
    "model/model.safetensors",
    "model/config.json",
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("postnas")
    return text_folder(root / "text"), tiny_base_folder(root / "base")


def placement(inputs, output, **changes) -> list[str]:
    text, base = inputs
    folders = {"text": text, "base": base, "output": output}
    searched = {"full": 1, "window": 1, "window_size": 8, "examples": 4, "shape": "8x16x2", "device": "cpu"}
    searched |= {"full_objective": "accuracy", "window_objective": "loss"}
    rows = {"steps": 4, "layer_steps": 2, "batch": 2, "length": 80, "distances": "4,16", "save_every": 2}
    return search_command("placement", **folders | searched | rows | changes)


def results(folder) -> dict[str, bytes]:
    """What a run leaves, but for how fast it was."""
    found = {name: (folder / name).read_bytes() for name in RESULTS}
    found["report.md"], times = re.subn(rb"tokens in [\d,.]+ s, [\d,]+ tokens/s", b"tokens", found["report.md"])
    assert times == 1
    return found


def run_of(path) -> dict:
    """The facts of the run that a checkpoint names."""
    return json.loads(path.read_bytes().split(b"\n", 2)[1])["run"]


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """The results of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(placement(inputs, folder)) == 0
    return folder


def test_a_run_writes_report_and_a_model_that_generates(whole, capsys):
    report = (whole / "report.md").read_text()
    chosen = json.loads((whole / "result.json").read_text())["placement"]
    assert sorted(chosen) == ["attn", "jet", "swa"] and f"`{' '.join(chosen)}`" in report
    assert "| full attention | recall, accuracy |" in report
    assert "| sliding window | language modelling, minus the loss |" in report
    for column in ("recall, loss", "copy, accuracy", "language modelling, loss", "distance 16"):
        assert column in report
    assert "generated examples that the search has not seen" in report
    books = [
        checkpoints.load_state(whole / name, "scores", run_of(whole / name))["scores"]
        for name in ("scores.ckpt", "fresh_scores.ckpt")
    ]
    assert books[0]["recall|jet jet jet"] != books[1]["recall|jet jet jet"]
    for plot in re.findall(r"\]\((\S+\.png)\)", report):
        assert (whole / plot).read_bytes().startswith(b"\x89PNG"), plot
    capsys.readouterr()
    arguments = ["--prompt", "def f", "--max-new-tokens", "9", "--device", "cpu"]
    assert main(["generate", "--model", str(whole / "model"), *arguments]) == 0
    model = JetNemotronForCausalLM.from_pretrained(whole / "model")
    ids = torch.tensor([list(b"def f")])
    with torch.no_grad():
        for _ in range(9):
            token = model(ids).logits[:, -1:].argmax(-1)
            if token.item() in model.config.stop_token_ids:
                break
            ids = torch.cat([ids, token], 1)
    assert capsys.readouterr().out == Tokenizer.byte_level().decode(ids[0, 5:]) + "\n"


@pytest.mark.parametrize("moment", sorted(random.Random(7).sample(range(1, 24), 5)))
def test_a_run_killed_at_any_write_ends_with_the_same_results(inputs, whole, tmp_path, moment):
    with killed_at_write(moment):
        main(placement(inputs, tmp_path))
    assert not (tmp_path / "model").exists()
    assert main(placement(inputs, tmp_path)) == 0
    assert results(tmp_path) == results(whole)


def test_a_process_that_is_killed_goes_on(inputs, whole, tmp_path):
    command = [sys.executable, "-m", "jetkernels", *placement(inputs, tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "super_network.ckpt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert main(placement(inputs, tmp_path)) == 0
    assert results(tmp_path) == results(whole)


def test_budgets_are_held_against_uniform_and_the_order_of_importance(inputs, tmp_path):
    assert main(placement(inputs, tmp_path, budgets="1,2,3", window=0, exhaustive_up_to=0)) == 0
    report = (tmp_path / "report.md").read_text()
    assert "## Budgets of full layers" in report and "(budgets.png)" in report
    assert (tmp_path / "budgets.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "result.json").read_text())
    gains = result["importance"]["attn"]["recall"]
    alone = min(gains, key=lambda i: (-gains[i], int(i)))
    for how, layers in (("uniform", "1"), ("by importance", alone), ("found", str(result["full"]["chosen"][0]))):
        assert f"| 1 | {how} | {layers} |" in report and f"| 3 | {how} | 0, 1, 2 |" in report
    assert list(result["full"]["budgets"]) == ["1", "2", "3"]
    assert [row["name"].split(",")[0] for row in result["compared"][-3:]] == ["uniform", "by importance", "found"]
    assert main(placement(inputs, tmp_path / "other", budgets="4")) == 2


def test_another_budget_does_not_train_again(inputs, whole, tmp_path, monkeypatch):
    (tmp_path / "super_network.ckpt").write_bytes((whole / "super_network.ckpt").read_bytes())
    monkeypatch.setattr("jetkernels.postnas.SuperNetwork.distillation_loss", lambda *arguments: pytest.fail("trained"))
    assert main(placement(inputs, tmp_path, full=2, window=0)) == 0
    assert sorted(json.loads((tmp_path / "result.json").read_text())["placement"]) == ["attn", "attn", "jet"]


@pytest.mark.parametrize("name", ["super_network.ckpt", "scores.ckpt"])
def test_damaged_and_foreign_checkpoints_end_with_one_line(inputs, whole, tmp_path, capsys, name):
    other = "scores.ckpt" if name == "super_network.ckpt" else "super_network.ckpt"
    good, foreign = (whole / name).read_bytes(), (whole / other).read_bytes()
    for content, sentence in (
        (good[:-9], "is damaged"),
        (foreign, "must be of stage"),
        (b"hello", "is not a checkpoint"),
    ):
        (tmp_path / name).write_bytes(content)
        untrained = {"steps": 0, "layer_steps": 0} if name == "scores.ckpt" else {}
        assert main(placement(inputs, tmp_path, **untrained)) == 1
        error = capsys.readouterr().err
        assert sentence in error.splitlines()[-1] and name in error and "Traceback" not in error
        assert (tmp_path / name).read_bytes() == content
    (tmp_path / name).write_bytes(good)
    assert main(placement(inputs, tmp_path, seed=1)) == 1
    assert "belongs to a run with other options: --seed was 0, now it is 1; give those again" in capsys.readouterr().err


def test_what_differs_from_the_run_before_is_named_as_an_option(inputs, whole, tmp_path, capsys):
    other = text_folder(tmp_path / "text", 20)
    kept = tmp_path / "out"
    kept.mkdir()
    content = (whole / "super_network.ckpt").read_bytes()
    (kept / "super_network.ckpt").write_bytes(content)
    for changes, named in (
        (
            {"learning_rate": 0.01, "length": 81},
            ("--learning-rate was 0.003, now it is 0.01", "--length was 80, now it is 81"),
        ),
        ({"distances": "4"}, ("--distances was 4,16, now it is 4",)),
        ({"text": other}, ("the text (--text, --suffix) is another one",)),
        ({"base": tiny_base_folder(tmp_path / "base", seed=7)}, ("the base (--base) has other weights",)),
    ):
        assert main(placement(inputs, kept, **changes)) == 1
        error = capsys.readouterr().err
        assert all(sentence in error.splitlines()[-1] for sentence in named), error
        assert error.count(" was ") + error.count(" is another") + error.count(" has other") == len(named)
        assert [path.name for path in kept.iterdir()] == ["super_network.ckpt"]
        assert (kept / "super_network.ckpt").read_bytes() == content


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"full": 4}, "--full must be between 0 and the 3 layers of the base, got 4"),
        ({"window": 3}, "--window must be between 0 and the 2 layers that --full leaves, got 3"),
        ({"full_task": "reading"}, "--full-task must be one of recall, copy, language modelling, got 'reading'"),
        ({"distances": "4,16,4"}, "--distances must be different integers, got 4,16,4"),
        ({"distances": "4,x"}, "--distances must be integers separated by commas, got '4,x'"),
        ({"base": "nowhere"}, "there is no folder nowhere"),
        ({"text": "nowhere"}, "nowhere is not a folder"),
        ({"batch": 0}, "--batch must be at least 1, got 0"),
        ({"examples": 0}, "--examples must be at least 1, got 0"),
        ({"shape": "8x16"}, "--shape must be KxVxH, such as 96x256x12, got '8x16'"),
        ({"length": 63}, "--length must be at least 64 for --distances 4,16, got 63"),
        ({"length": 64, "distances": "48"}, "--length must be at least 96 for --distances 48, got 64"),
        ({"steps": "nan"}, "--steps must be an integer, got 'nan'"),
        ({"learning_rate": "nan"}, "--learning-rate must be a finite number, got nan"),
        ({"linear_path": "RetNet", "shape": "7x8x2"}, "RetNet: K must be even (rotary positions), got 7"),
        ({"hidden_size": 8}, "unrecognized arguments: --hidden-size 8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_end_with_one_line(inputs, tmp_path, capsys, changes, sentence):
    assert main(placement(inputs, tmp_path, **changes)) in (1, 2)
    error = capsys.readouterr().err
    assert sentence in error.splitlines()[-1] and "Traceback" not in error
    assert not list(tmp_path.iterdir()), "found out only after the training"


def test_a_search_on_other_blocks_and_trained_attention_says_that_it_exports_none(inputs, tmp_path, capsys):
    changes = {"linear_path": "GLA", "train_attention": True, "steps": 2, "window": 0}
    for _ in range(2):
        assert main(placement(inputs, tmp_path, **changes)) == 0
        said = "No model is exported: the config of a model cannot say that a layer is a GLA."
        report = (tmp_path / "report.md").read_text()
        assert said in capsys.readouterr().out and said in report and not (tmp_path / "model").exists()
    rows = json.loads((tmp_path / "result.json").read_text())["compared"]
    assert [row["name"] for row in rows[:3]] == [
        "base, attention everywhere",
        "trained attention everywhere",
        "GLA everywhere",
    ]
    assert rows[0]["placement"] is None and rows[0]["scores"] != rows[1]["scores"]
    assert main(placement(inputs, tmp_path, **changes | {"linear_path": "JetBlock"})) == 1
    assert "--linear-path was GLA, now it is JetBlock" in capsys.readouterr().err
    assert main(placement(inputs, tmp_path, linear_path="LSTM")) == 2


def test_precision_is_a_part_of_a_run(inputs, whole, tmp_path, capsys):
    (tmp_path / "super_network.ckpt").write_bytes((whole / "super_network.ckpt").read_bytes())
    assert main(placement(inputs, tmp_path, precision="bf16")) == 1  # auto is fp32 for so narrow a base
    assert "--precision was fp32, now it is bf16; give those again" in capsys.readouterr().err
    assert main(placement(inputs, tmp_path / "bf16", precision="bf16", window=0, examples=2)) == 0
    assert losses(tmp_path / "bf16") != losses(whole)
    assert losses(tmp_path / "bf16") == pytest.approx(losses(whole), rel=0.1)


def test_a_warm_start_is_another_run_and_goes_on_alike(inputs, whole, tmp_path, capsys):
    base = small_base(3, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1)
    base.save_pretrained(tmp_path / "base")
    Tokenizer.byte_level().save_pretrained(tmp_path / "base")
    warm = {"base": tmp_path / "base", "start": "warm", "shape": "16x16x2", "window": 0, "examples": 2}
    for folder in ("one", "two"):
        assert main(placement(inputs, tmp_path / folder, **warm)) == 0
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    assert main(placement(inputs, tmp_path / "one", **warm | {"start": "random"})) == 1
    assert "--start was warm, now it is random" in capsys.readouterr().err
    assert main(placement(inputs, tmp_path / "random", **warm | {"start": "random"})) == 0
    assert losses(tmp_path / "random")[0] != losses(tmp_path / "one")[0]
    assert main(placement(inputs, tmp_path / "none", **warm, linear_path="GLA")) == 2
    assert "--start warm needs --linear-path JetBlock, got GLA" in capsys.readouterr().err


def test_saving_more_often_is_no_other_run(inputs, whole, tmp_path):
    (tmp_path / "super_network.ckpt").write_bytes((whole / "super_network.ckpt").read_bytes())
    assert main(placement(inputs, tmp_path, save_every=3)) == 0
    assert results(tmp_path)["result.json"] == results(whole)["result.json"]


def test_several_ranks_need_a_device_each(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="must be cuda, without a number, for several ranks, got cuda:1"):
        join_ranks(torch.device("cuda:1"))


def test_ranks_wait_for_what_rank_0_does_alone(monkeypatch):
    """Longer than the half hour after which gloo gives up by itself."""
    asked = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.distributed.init_process_group", lambda name, timeout: asked.append((name, timeout)))
    join_ranks(torch.device("cpu"))
    assert asked == [("gloo", timedelta(days=1))]


def test_search_base_trains_resumes_and_is_a_base(inputs, tmp_path, capsys):
    sizes = {"layers": 2, "hidden_size": 32, "intermediate_size": 32, "device": "cpu"}
    rows = {"batch": 2, "length": 80, "steps": 4, "save_every": 2, "distances": "4,16"}
    command = search_command("base", text=inputs[0], output=tmp_path / "out", **sizes, **rows)
    assert main(command) == 0
    first = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert "held-out text" in (tmp_path / "out" / "report.md").read_text()
    assert main(command) == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == first
    assert main(placement(inputs, tmp_path / "placed", base=tmp_path / "out", steps=0, full=1, window=0)) == 0


def losses(folder) -> list[float]:
    path = folder / "super_network.ckpt"
    return checkpoints.load_state(path, "super network", run_of(path))["losses"]


def test_two_gloo_ranks_give_the_losses_of_one(inputs, whole, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "jetkernels", *placement(inputs, tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=0, abs=1e-5)
    chosen = [json.loads((folder / "result.json").read_text())["placement"] for folder in (tmp_path, whole)]
    assert chosen[0] == chosen[1]


def test_seeds_are_tabled(inputs, tmp_path, monkeypatch, capsys):
    from benchmarks import postnas_seeds

    words = placement(inputs, tmp_path / "seeds", steps=1, window=0, full="1,2")[2:]
    monkeypatch.setattr(sys, "argv", ["postnas_seeds", "--seeds", "2", *words])
    assert postnas_seeds.main() == 0
    report = (tmp_path / "seeds" / "report.md").read_text()
    assert "## 1 full layer\n" in report and "## 2 full layers\n" in report
    assert "| found |" in report and "| uniform |" in report and "± " in report
    result = json.loads((tmp_path / "seeds" / "seed1" / "full2" / "result.json").read_text())
    chosen = ", ".join(str(i) for i, kind in enumerate(result["placement"]) if kind == "attn")
    assert any(line.startswith("| 1 |") and line.endswith(f"| {chosen} |") for line in report.splitlines())
