"""The command line, run in this process through its entry point: what it prints, and that whatever is typed ends with a
sentence.
"""

import io
import json
import os
import re
import resource
import subprocess
import sys

import pytest
import torch
from campaigns.bad_arguments import World, drive
from support.arguments import ALL_OPS

from jetkernels.__main__ import COMMANDS, TRACEBACK, main, sentence
from jetkernels._version import __version__
from jetkernels.cli import demo, generate, memory
from jetkernels.cli.info import OPS
from jetkernels.model import JetNemotronConfig, JetNemotronForCausalLM, Tokenizer


@pytest.fixture
def tiny_config(tmp_path):
    path = tmp_path / "tiny.json"
    JetNemotronConfig(**{**demo.CONFIG, "hidden_size": 48, "intermediate_size": 64}).save(path)
    return path


@pytest.fixture
def tiny_model(tmp_path, tiny_config):
    folder = tmp_path / "model"
    config = JetNemotronConfig.from_file(tiny_config)
    config.initializer_range = 0.3  # larger than usual: the most likely tokens then differ from prompt to prompt
    JetNemotronForCausalLM.random(config).save_pretrained(folder)
    Tokenizer.byte_level().save_pretrained(folder)
    return folder


def completion(folder, prompt: str, count: int) -> list[int]:
    """The most likely tokens after a prompt that is alone."""
    ids = torch.tensor([list(prompt.encode())])
    return (
        JetNemotronForCausalLM.from_pretrained(folder)
        .generate(ids, max_new_tokens=count, stop_token_ids=())[0, ids.shape[1] :]
        .tolist()
    )


def failure(capsys, *arguments, code: int = 1) -> str:
    """The one line that a failing command leaves."""
    assert main(list(map(str, arguments))) == code
    found = capsys.readouterr().err.splitlines()[-1]
    assert found.startswith("jetkernels") and "unexpected" not in found
    return found


# ---- the program


def test_help_names_every_command_and_the_exit_codes(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS) and "130 interrupted" in text


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"jetkernels {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["search"]])
def test_no_command_shows_the_help_as_wrong_usage(capsys, arguments):
    assert main(arguments) == 2
    assert "usage: jetkernels" in capsys.readouterr().err


def test_only_the_command_that_is_asked_for_is_imported(monkeypatch, capsys):
    imported = []
    monkeypatch.setattr("importlib.import_module", lambda name: imported.append(name) or pytest.fail(name))
    assert main(["--help"]) == 0 and main(["--version"]) == 0 and not imported


def test_what_was_not_expected_names_its_kind_and_how_to_see_where(capsys, monkeypatch, tiny_config):
    monkeypatch.setattr(generate, "load_model", lambda *a: {}["weights"])
    arguments = ["generate", "--config", str(tiny_config), "--random-weights", "--device", "cpu"]
    assert main(arguments) == 1
    assert (
        f"unexpected KeyError: 'weights'; this is a fault of jetkernels, and {TRACEBACK}=1 shows"
        in capsys.readouterr().err
    )
    monkeypatch.setenv(TRACEBACK, "1")
    with pytest.raises(KeyError):
        main(arguments)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "out of memory; fewer tokens"),
        (
            RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4294967296 bytes."
            ),
            "allocate 4.0 GiB;",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"),
            "out of memory: tried to allocate 20.00 GiB;",
        ),
        (FileNotFoundError(2, "No such file or directory", "a/b"), "a/b: No such file or directory"),
        (OSError(36, "File name too long", "9" * 5000), "99...: File name too long"),
        (ValueError("two\nlines"), "two lines"),
        (RuntimeError("wrong\nException raised from check at x.cpp:1 (most recent call first):\nframe #0"), "wrong"),
    ],
)
def test_sentences(error, says):
    assert says in sentence(error) and "\n" not in sentence(error)


def test_an_interrupt_ends_with_130(capsys, monkeypatch, tiny_model):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(JetNemotronForCausalLM, "generate", interrupted)
    assert main(["generate", "--model", str(tiny_model), "--prompt", "x", "--device", "cpu"]) == 130
    assert capsys.readouterr().err.endswith("jetkernels generate: interrupted\n")


def test_a_full_disk_behind_standard_output(capsys, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert main(["info"]) == 1
        assert "No space left on device" in capsys.readouterr().err
        monkeypatch.setattr("sys.stdout", io.StringIO())
        with pytest.raises(OSError):
            full.close()


def test_a_reader_that_leaves_is_no_failure(capsys, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    stream = os.fdopen(write, "w")
    monkeypatch.setattr("sys.stdout", stream)
    assert main(["info"]) == 0
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert not capsys.readouterr().err
    with pytest.raises(BrokenPipeError):
        stream.close()


def spent(*arguments: str, **options) -> tuple[subprocess.CompletedProcess, float]:
    """A finished process and the processor seconds it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.run([sys.executable, *arguments], capture_output="stdout" not in options, text=True, **options)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return process, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_takes_little_more_than_importing_torch():
    _, torch_alone = spent("-c", "import torch")
    shown, seconds = spent("-m", "jetkernels", "--help")
    assert shown.returncode == 0 and shown.stdout.startswith("usage: jetkernels")
    assert seconds < 1.5 * torch_alone


def test_a_process_that_cannot_write_says_so_once():
    """A full disk, an ASCII terminal, no standard input; nothing of Python's own at its end."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "jetkernels", "info"]
        process = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=lambda: os.close(0)
        )
    assert (process.returncode, process.stderr) == (1, "jetkernels info: No space left on device\n")


def test_two_hundred_bad_arguments(tmp_path):
    """`python -m tests.campaigns.bad_arguments 2000` tries more."""
    counts, wrong = drive(World(tmp_path), 200)
    assert not wrong, "\n".join(wrong)
    assert counts["refused"] == 200 and counts["ran"] > 5


# ---- info


def test_info_names_every_op_and_its_backend(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert {op.removesuffix("_backward") for op in OPS} == set(ALL_OPS)
    for op in OPS:
        assert any(line.split()[:1] == [op] and "C++ (" in line for line in text.splitlines()), op


def test_info_json(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == torch.__version__
    assert set(facts["backends"]["cpu"]) == set(OPS)


# ---- generate


def test_generate_streams_the_text_that_the_model_makes(capsys, tiny_model):
    assert (
        main(["generate", "--model", str(tiny_model), "--prompt", "def f", "--max-new-tokens", "12", "--device", "cpu"])
        == 0
    )
    streamed = capsys.readouterr().out
    model, tokenizer = JetNemotronForCausalLM.from_pretrained(tiny_model), Tokenizer.from_pretrained(tiny_model)
    ids = torch.tensor([tokenizer.encode("def f")])
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=12)[0, ids.shape[1] :])
    assert streamed == expected + "\n"


def test_generate_with_random_weights_prints_ids(capsys, tiny_config):
    arguments = ["generate", "--config", str(tiny_config), "--random-weights", "--device", "cpu"]
    assert main([*arguments, "--prompt-ids", "1,2,3", "--max-new-tokens", "5", "--temperature", "1"]) == 0
    ids = [int(part) for part in capsys.readouterr().out.split()]
    assert 1 <= len(ids) <= 5 and all(0 <= i < 257 for i in ids)


PROMPTS = ["def f", "class Shape(object):", "x", "import os", "é 世"]


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_a_file_of_prompts_gives_what_each_gives_alone(capsys, tmp_path, tiny_model, batch):
    file = tmp_path / "prompts"
    file.write_bytes("\r\n".join(PROMPTS).encode() + b"\n")
    arguments = [
        "generate",
        "--model",
        tiny_model,
        "--prompt-file",
        file,
        "--batch",
        batch,
        "--max-new-tokens",
        "9",
        "--device",
        "cpu",
        "--json",
    ]
    assert main(list(map(str, arguments))) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["prompt"] for answer in answers] == PROMPTS
    for answer in answers:
        alone = completion(tiny_model, answer["prompt"], 9)
        end = (alone + [256]).index(256)
        assert answer["ids"] == alone[:end] and answer["stopped"] == (end < 9)
        assert answer["text"] == bytes(answer["ids"]).decode("utf-8", "replace") and answer["prompt_ids"] == list(
            answer["prompt"].encode()
        )
    assert len({tuple(answer["ids"]) for answer in answers}) > 1


def test_drafts_change_no_completion_and_are_counted(capsys, tmp_path, tiny_model):
    file = tmp_path / "prompts"
    file.write_text("\n".join(PROMPTS[:3]))
    arguments = ["generate", "--model", str(tiny_model), "--max-new-tokens", "30", "--dtype", "fp32"]
    runs = []
    for options in ([], ["--draft", "4"]):
        assert main([*arguments, "--prompt-file", str(file), "--batch", "2", "--json", *options]) == 0
        shown = capsys.readouterr()
        runs.append([json.loads(line) for line in shown.out.splitlines()])
    rates = [answer.pop("accepted_per_step") for answer in runs[1]]
    assert runs[0] == runs[1] and all(0 <= rate <= 4 for rate in rates)
    said = re.search(r"^drafts: (\d\.\d\d) accepted tokens per step$", shown.err, re.MULTILINE)
    assert min(rates) - 0.005 <= float(said[1]) <= max(rates) + 0.005
    streams = []
    for options in ([], ["--draft", "4"]):
        assert main([*arguments, "--prompt", PROMPTS[0], *options]) == 0
        shown = capsys.readouterr()
        streams.append(shown.out)
    assert streams[0] == streams[1] and f"drafts: {rates[0]:.2f} accepted tokens per step" in shown.err


def test_prompts_of_standard_input_and_of_repeated_options_are_the_same(capsys, monkeypatch, tiny_model):
    common = ["generate", "--model", str(tiny_model), "--max-new-tokens", "3", "--device", "cpu"]
    assert main([*common, "--prompt", "def f", "--prompt", "x"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0] == "--- prompt 1: def f" and "--- prompt 2: x" in shown
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"def f\nx\n")))
    assert main([*common, "--prompt-file", "-"]) == 0
    assert capsys.readouterr().out == shown


def test_a_row_that_ends_is_marked_and_cut(capsys, tmp_path, tiny_model):
    stop = completion(tiny_model, "def f", 3)[2]
    values = json.loads((tiny_model / "config.json").read_text())
    (tiny_model / "config.json").write_text(json.dumps(values | {"eos_token_id": stop}))
    assert (
        main(
            [
                "generate",
                "--model",
                str(tiny_model),
                "--prompt",
                "def f",
                "--max-new-tokens",
                "9",
                "--device",
                "cpu",
                "--json",
            ]
        )
        == 0
    )
    answer = json.loads(capsys.readouterr().out)
    assert answer["stopped"] and stop not in answer["ids"] and len(answer["ids"]) <= 2


@pytest.mark.parametrize(
    ("arguments", "sentence", "code"),
    [
        (["generate", "--config", "2b", "--prompt", "x"], "add --random-weights", 2),
        (["generate", "--config", "7b", "--random-weights"], "must be one of 2b, 4b", 1),
        (["generate", "--model", "no-such-folder", "--prompt", "x"], "no-such-folder", 1),
        (["generate", "--model", "org/name", "--prompt", "x"], "hf download org/name", 1),
        (
            ["generate", "--config", "TINY", "--random-weights", "--prompt-ids", "1,999"],
            "below the vocabulary size 257",
            1,
        ),
        (
            ["generate", "--config", "TINY", "--random-weights", "--prompt-ids", "1,x"],
            "--prompt-ids must be integers",
            2,
        ),
        (
            ["generate", "--config", "TINY", "--random-weights", "--prompt", ""],
            "--prompt: a prompt must hold at least one token",
            1,
        ),
        (
            ["generate", "--config", "TINY", "--random-weights", "--prompt", "\udcff"],
            "--prompt must be UTF-8 text, got byte 0xff at position 0",
            1,
        ),
        (
            ["generate", "--config", "TINY", "--random-weights", "--prompt", "a" * 10**6],
            "1,000,000 tokens and --max-new-tokens 128 are more than",
            1,
        ),
        (
            ["generate", "--config", "TINY", "--random-weights", "--prompt", "a", "--prompt-ids", "1"],
            "not allowed with argument",
            2,
        ),
        (
            ["generate", "--config", "TINY", "--random-weights", "--max-new-tokens", "-1"],
            "--max-new-tokens must be at least 0, got -1",
            2,
        ),
        (
            ["generate", "--config", "TINY", "--random-weights", "--temperature", "nan"],
            "--temperature must be a finite number, got nan",
            2,
        ),
        (["generate", "--config", "TINY", "--random-weights", "--draft", "0"], "--draft must be at least 1, got 0", 2),
        (
            ["generate", "--config", "TINY", "--random-weights", "--draft", "33"],
            "--draft must be at most 32, got 33",
            2,
        ),
        (
            ["generate", "--config", "TINY", "--random-weights", "--draft", "3", "--temperature", "1"],
            "--draft needs --temperature 0 (the most likely tokens), got 1.0",
            2,
        ),
        (["generate", "--config", "TINY", "--random-weights", "--top-p", "0"], "--top-p must be above 0, got 0", 2),
        (["generate", "--config", "TINY", "--random-weights", "--seed", "-1"], "--seed must be at least 0, got -1", 2),
        (
            ["throughput", "--config", "TINY", "--random-weights", "--batch", "0"],
            "--batch must be at least 1, got 0",
            2,
        ),
        (["throughput", "--config", "TINY", "--random-weights", "--dtype", "fp8"], "--dtype: invalid choice: 'fp8'", 2),
        (["demo", "--minutes", "inf"], "--minutes must be a finite number, got inf", 2),
        (["demo", "--output", "/dev/null/x"], "/dev/null is not a folder", 1),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_wrong_arguments_end_with_one_line(capsys, tiny_config, arguments, sentence, code):
    assert sentence in failure(capsys, *(tiny_config if a == "TINY" else a for a in arguments), code=code)


def test_token_ids_need_no_tokenizer(capsys, tiny_model):
    need = (
        JetNemotronForCausalLM.from_pretrained(tiny_model)
        .generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5)[0, 3:]
        .tolist()
    )
    (tiny_model / "tokenizer.json").unlink()
    common = [
        "generate",
        "--model",
        str(tiny_model),
        "--device",
        "cpu",
        "--max-new-tokens",
        "5",
        "--prompt-ids",
        "1,2,3",
    ]
    assert main(common) == 0
    assert [int(token) for token in capsys.readouterr().out.split()] == need
    assert main([*common, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["prompt_ids"], answer["ids"], answer["text"]) == ([1, 2, 3], need, None)


@pytest.mark.parametrize("command", ["demo", "generate", "throughput", "search base"])
@pytest.mark.parametrize(
    ("device", "says"),
    [("mps", "must be cpu, cuda or cuda:N, got 'mps'"), ("cuda", "--device cuda: "), ("cuda:7", "--device cuda:7: ")],
)
def test_a_device_that_this_machine_lacks(capsys, monkeypatch, tmp_path, command, device, says):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    needed = {"generate": ["--config", "2b", "--random-weights"], "search base": ["--output", tmp_path / "out"]}
    needed["throughput"] = needed["generate"]
    assert says in failure(
        capsys, *command.split(), *needed.get(command, []), "--device", device, code=2 if device == "mps" else 1
    )


def test_a_device_number_beyond_the_last(monkeypatch, capsys):
    for name, value in (("is_available", lambda: True), ("device_count", lambda: 2)):
        monkeypatch.setattr(f"torch.cuda.{name}", value)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    said = failure(capsys, "generate", "--config", "2b", "--random-weights", "--device", "cuda:2")
    assert "--device cuda:2: this machine has 2 CUDA device(s), the last one cuda:1" in said


def test_prompts_are_checked_before_weights_are_read(capsys, tmp_path, monkeypatch, tiny_model):
    monkeypatch.setattr(generate, "load_model", lambda *a: pytest.fail("weights were loaded"))
    file = tmp_path / "prompts"
    common = ["generate", "--model", tiny_model, "--device", "cpu", "--prompt-file", file]
    for content, says in (
        (b"fine\n\nx\n", "line 2 of --prompt-file"),
        (b"fine\nb\xe9d\n", "must be UTF-8 text, got byte 0xe9 at position 6"),
        (b"x\n" + b"a" * 40_000, "40,000 tokens and --max-new-tokens 128 are more than the 32,768"),
        (b"", "at least one token"),
    ):
        file.write_bytes(content)
        assert says in failure(capsys, *common)
    file.unlink()
    assert "prompts: No such file" in failure(capsys, *common)
    (tiny_model / "tokenizer.json").write_text('{"version": ')
    assert "tokenizer.json" in failure(capsys, *common[:-2], "--prompt", "x")
    (tiny_model / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in failure(capsys, *common[:-2], "--prompt", "x")


def test_what_cannot_fit_is_refused_before_it_is_allocated(capsys, monkeypatch, tiny_config):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**30)
    monkeypatch.setattr(JetNemotronForCausalLM, "empty", lambda *a, **k: pytest.fail("allocated"))
    assert "need at least" in failure(capsys, "generate", "--config", "4b", "--random-weights", "--device", "cpu")
    common = ["throughput", "--config", tiny_config, "--random-weights", "--device", "cpu"]
    assert "a cache of 65536 x 544 tokens need at least" in failure(capsys, *common, "--batch", 65536)


def test_needed_memory_is_that_of_the_model(tiny_config):
    config = JetNemotronConfig.from_file(tiny_config)
    for tied in (True, False):
        config.tie_word_embeddings = tied
        model = JetNemotronForCausalLM(config)
        assert memory.parameter_count(config) == sum(p.numel() for p in model.parameters())
        assert memory.cache_bytes(config, torch.float32, 3, 40) == model.new_cache(3, 40).nbytes
    assert memory.available_bytes("cpu") > 2**20


# ---- throughput


def test_throughput_reports_speed_and_cache(capsys, tiny_config):
    arguments = [
        "--batch",
        "2",
        "--prompt-length",
        "20",
        "--new-tokens",
        "3",
        "--repeats",
        "1",
        "--json",
        "--device",
        "cpu",
    ]
    assert main(["throughput", "--config", str(tiny_config), "--random-weights", *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    model = JetNemotronForCausalLM.random(JetNemotronConfig.from_file(tiny_config))
    assert result["cache_mib"] == model.new_cache(2, 23).nbytes / 2**20
    assert result["prefill_tokens_per_second"] > 0 and result["decode_tokens_per_second"] > 0
