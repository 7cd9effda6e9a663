"""Train a small byte-level hybrid of JetBlock, sliding-window and full attention on the source text of this machine's
Python standard library, then complete held-out code with it, token by token from its recurrent state.

Writes the model (a folder that `jetkernels generate --model` reads) and the loss curve to the output folder.
"""  # noqa: D205 - this is what `jetkernels demo --help` shows

import argparse
import math
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from jetkernels import _machine
from jetkernels._optional import optional
from jetkernels._progress import progress
from jetkernels.cli.info import backends
from jetkernels.cli.options import device, new_folder, number, seed
from jetkernels.model import JetNemotronConfig, JetNemotronForCausalLM, Tokenizer
from jetkernels.postnas.base import next_token_loss
from jetkernels.postnas.data import TextCorpus, Windows
from jetkernels.postnas.report import curve
from jetkernels.postnas.training import Trainer, cosine, warm_up

B, T = 8, 256  # sequences and bytes of one training step
LEARNING_RATE = 3e-3
WARMUP = 20  # steps
WEIGHT_DECAY = 0.1
TEMPERATURE = 0.5
WORST_LOSS = 0.75  # of the unigram entropy: a model that learned less has learned little of the language
FEWEST_STEPS = 80  # of one schedule; they reach WORST_LOSS with room to spare, however long they take
SCHEDULES = 4  # one after another, until the loss is reached; a model that has not learned by then does not learn
RESTART = 0.3  # of the learning rate, with which a further schedule begins
NEW = 160  # bytes of a completion, or as many as COMPLETION_SECONDS allow, but never fewer than FEWEST_NEW
FEWEST_NEW = 16
COMPLETION_SECONDS = 12.0
WORST_DIFFERENCE = 1e-3  # of a logit between decode and prefill
CONFIG: dict[str, Any] = dict(
    vocab_size=257,  # bytes, and the end of a text
    hidden_size=192,
    intermediate_size=512,
    layer_types=["jet", "swa", "jet", "attn", "jet", "jet"],
    num_attention_heads=6,
    num_key_value_heads=2,
    bos_token_id=256,
    eos_token_id=256,
    efficient_attention_config={
        "jet": dict(num_heads=4, head_dim=32, expand_v=2.0, conv_size=4, dconv_generator_reduction=8, norm_eps="1e-5"),
        "swa": dict(window_size=64),
    },
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `jetkernels demo`."""
    minutes = "training time (default 2.5); longer where the loss needs it"
    parser.add_argument("--minutes", type=number(0, 24 * 60, above=True), default=2.5, help=minutes)
    parser.add_argument("--output", type=new_folder, default="jetkernels-demo", help="folder for model and plot")
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--seed", type=seed, default=0)


def unigram_entropy(data: Tensor) -> float:
    """Nats per byte of a model that knows only how frequent each byte is."""
    p = torch.bincount(data, minlength=256).double() / len(data)
    return -torch.special.xlogy(p, p).sum().item()


def batches(data: Tensor, seed: int) -> Iterator[Tensor]:
    """Batches [B, T + 1] of windows of the data but its last byte, in the random order of the seed."""
    windows, generator = Windows(data[:-1]), torch.Generator().manual_seed(seed)
    while True:
        yield windows.rows(B, T + 1, generator)


def autocast_pays(device: torch.device) -> bool:
    """Whether this machine multiplies bf16 matrices clearly faster than fp32 ones."""
    fastest = {torch.float32: math.inf, torch.bfloat16: math.inf}
    factors = {dtype: torch.randn(1024, 1024, device=device).to(dtype) for dtype in fastest}
    for _ in range(6):  # in turns, and the fastest counts: other processes disturb single products
        for dtype, a in factors.items():
            start = time.perf_counter()
            (a @ a)[0, 0].item()
            fastest[dtype] = min(fastest[dtype], time.perf_counter() - start)
    return fastest[torch.bfloat16] < 0.6 * fastest[torch.float32]


class CountOps(TorchDispatchMode):
    """Counts the calls of jet ops.

    Attributes:
        calls: {op: calls}.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "jet":
            self.calls[func._schema.name.removeprefix("jet::")] += 1
        return func(*args, **(kwargs or {}))


class Schedule:
    """A cosine over as many steps as ``seconds`` allow at the speed of the last ones, and over at least ``fewest``.

    ``progress`` goes from 0 to 1. Each step moves it by one part of the steps that are left, and by at most 1 / fewest:
    it arrives at 1 whether the machine turns slow or fast on the way, and never in a leap.

    Args:
        seconds: that the steps may take.
        fewest: steps that are made however long they take.
        clock: seconds, as `time.perf_counter` counts them.
    """

    def __init__(self, seconds: float, fewest: int, clock: Callable[[], float] = time.perf_counter):
        self.fewest, self.clock = fewest, clock
        self.steps, self.progress = 0, 0.0
        self.last = clock()
        self.end = self.last + seconds
        self.recent: deque[float] = deque(maxlen=9)

    def step(self) -> None:
        """Is called behind each step."""
        now = self.clock()
        self.recent.append(now - self.last)
        self.last, self.steps = now, self.steps + 1
        affordable = max(0.0, self.end - now) / max(self.step_seconds, 1e-9)
        self.progress += min(1 / self.fewest, (1 - self.progress) / (affordable + 1))
        if self.progress > 1 - 1e-6:
            self.progress = 1.0

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        return self.progress == 1.0

    @property
    def step_seconds(self) -> float:
        """The median of the last steps."""
        return statistics.median(self.recent)

    @property
    def seconds_left(self) -> float:
        """From now to the end, which comes later than was asked for where the fewest steps take longer."""
        return max(self.end - self.last, (1 - self.progress) * self.fewest * self.step_seconds)

    @property
    def factor(self) -> float:
        """Of the learning rate."""
        return cosine(self.progress)


class Training:
    """A training that says how fast it is and how long it takes.

    Args:
        model: what is trained, in place.
        data: bytes to train on.
        seed: of the batches.
        bf16: under autocast to bf16.

    Attributes:
        model: what is trained.
        seconds: from the start to the end of each step.
        losses: of each step.
    """

    def __init__(self, model: JetNemotronForCausalLM, data: Tensor, seed: int, bf16: bool):
        self.model = model
        rows = batches(data, seed)

        def step_loss(step: int) -> Tensor:
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                return next_token_loss(model, next(rows))

        self.trainer = Trainer(model.parameters(), step_loss, weight_decay=WEIGHT_DECAY, fused=True)
        self.losses = self.trainer.losses
        self.start = time.perf_counter()
        self.seconds: list[float] = []

    def step(self, factor: float) -> None:
        """One step with this part of the learning rate."""
        self.trainer.step(LEARNING_RATE * warm_up(len(self.losses), WARMUP) * factor)
        self.seconds.append(time.perf_counter() - self.start)

    def run(self, schedule: Schedule, peak: float = 1.0) -> None:
        """Steps until the schedule is done, from ``peak`` of the learning rate on.

        Says what is planned as soon as the speed is known.
        """
        while not schedule.done and schedule.steps < 5:
            self.step(peak * schedule.factor)
            schedule.step()
        print(
            f"training: a step takes {schedule.step_seconds:.2f} s ({B * T / schedule.step_seconds:,.0f} bytes/s), "
            f"done in about {schedule.seconds_left:.0f} s",
            flush=True,
        )
        smooth, shown = None, 0.0
        with progress(total=100, desc="training", leave=True, bar_format="{l_bar}{bar}| {elapsed}{postfix}") as bar:
            while not schedule.done:
                self.step(peak * schedule.factor)
                schedule.step()
                smooth = self.losses[-1] if smooth is None else 0.95 * smooth + 0.05 * self.losses[-1]
                bar.set_postfix_str(
                    f"{schedule.seconds_left:.0f} s left, step {len(self.losses)}, loss {smooth:.3f}, "
                    f"{B * T / schedule.step_seconds:,.0f} bytes/s",
                    refresh=False,
                )
                bar.update(100 * schedule.progress - shown)
                shown = 100 * schedule.progress


def train(training: Training, seconds: float, held_out: Callable[[], float], enough: float) -> float:
    """Trains for ``seconds``, and on until the held-out loss is ``enough``.

    Returns:
        That loss, which is higher where it was not reached.
    """
    training.run(Schedule(seconds, FEWEST_STEPS))
    for _ in range(SCHEDULES - 1):
        if (loss := held_out()) <= enough:
            return loss
        print(f"the held-out loss is {loss:.3f} and must be {enough:.3f}: trains {FEWEST_STEPS} steps more", flush=True)
        training.run(Schedule(0, FEWEST_STEPS), RESTART)
    return held_out()


@torch.no_grad()
def held_out_loss(model: JetNemotronForCausalLM, data: Tensor) -> float:
    """Mean over the same few batches in every call."""
    rows = batches(data, seed=1)
    return sum(next_token_loss(model, next(rows)).item() for _ in range(8)) / 8


def snippets(data: Tensor, count: int) -> list[bytes]:
    """Beginnings of held-out functions: up to 200 bytes that end behind the colon of a `def` line."""
    text = bytes(data.tolist())
    found: list[bytes] = []
    position = len(text) // 7
    while len(found) < count and (position := text.find(b"\n    def ", position + len(text) // 9)) >= 0:
        end = text.find(b":\n", position)
        if 0 < end - position < 100:
            found.append(text[max(0, end + 2 - 200) : end + 2])
    return found


class Completion(NamedTuple):
    """What decode added to a prompt.

    Attributes:
        new: the bytes.
        seconds: of decode.
        difference: largest one of the logits between decode and prefill.
    """

    new: bytes
    seconds: float
    difference: float


@torch.no_grad()
def complete(
    model: JetNemotronForCausalLM,
    prompt: bytes,
    seed: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> Completion:
    """Prefill and recurrent decode of up to NEW bytes; then the whole text again in one prefill."""
    tokens = torch.tensor([list(prompt)], device=device)
    generator = torch.Generator(device=device).manual_seed(seed)
    cache = model.new_cache(1, len(prompt) + NEW)
    logits = [model(tokens, cache=cache).logits[:, -1]]
    start = clock()
    for count in range(NEW):
        if count >= FEWEST_NEW and clock() - start > COMPLETION_SECONDS:
            break
        p = (logits[-1][:, :256] / TEMPERATURE).softmax(-1)
        token = torch.multinomial(p, 1, generator=generator)
        tokens = torch.cat([tokens, token], dim=1)
        logits.append(model(token, cache=cache).logits[:, -1])
    seconds = clock() - start
    again = model(tokens).logits[:, len(prompt) - 1 :]
    difference = (torch.stack(logits, dim=1) - again).abs().max().item()
    return Completion(bytes(tokens[0, len(prompt) :].tolist()), seconds, difference)


def complete_all(
    model: JetNemotronForCausalLM, prompts: list[bytes], seed: int, device: torch.device
) -> list[Completion]:
    """Completes and prints each."""
    found: list[Completion] = []
    for i, prompt in enumerate(prompts):
        found.append(complete(model, prompt, seed + i, device))
        print(
            f"\n--- held-out prompt {i + 1}, then the completion after >>>\n{prompt.decode('utf-8', 'replace')}>>>"
            f"{found[-1].new.decode('utf-8', 'replace')}",
            flush=True,
        )
        if len(found[-1].new) < NEW:
            print(
                f"[ended after {len(found[-1].new)} of {NEW} bytes, as decode is slow here: {found[-1].seconds:.0f} s]"
            )
    return found


def check(difference: float, loss: float, enough: float) -> None:
    """Raises where decode and prefill differ, or the loss was not reached."""
    if not difference <= WORST_DIFFERENCE:
        raise RuntimeError(f"decode and prefill must agree within {WORST_DIFFERENCE}, got {difference:.2e}")
    if not loss <= enough:
        raise RuntimeError(
            f"the held-out loss must fall to {enough:.3f} ({WORST_LOSS} of the unigram entropy), got {loss:.3f}"
        )


def report(model: JetNemotronForCausalLM, training: Training, unigram: float, final: float, folder: Path) -> None:
    """Writes the model, its tokenizer and the loss curve, and prints where the loss went."""
    losses = training.losses
    folder.mkdir(parents=True, exist_ok=True)
    curve(
        folder / "loss.png",
        losses,
        "byte-level JetBlock hybrid on the Python standard library",
        "loss (nats per byte)",
        seconds=training.seconds,
        levels={"unigram entropy": unigram, "held-out files": final},
    )
    model.save_pretrained(folder)
    Tokenizer.byte_level().save_pretrained(folder)
    last = losses[-20:]
    print(
        f"loss: {losses[0]:.3f} -> {sum(last) / len(last):.3f} (training), {final:.3f} on held-out files; "
        f"unigram entropy {unigram:.3f}"
    )


def report_speed(
    training: Training, completions: list[Completion], counted: CountOps, processors: _machine.Processors
) -> None:
    """Prints the speed of training and decode, and which backend served which op."""
    trained = len(training.losses) * B * T / training.seconds[-1]
    decoded, seconds = sum(len(each.new) for each in completions), sum(each.seconds for each in completions)
    print(
        f"speed: training {trained:,.0f} bytes/s, decode {decoded / seconds:,.0f} bytes/s (one sequence)"
        + (f", on a busy machine ({processors})" if processors.busy else "")
    )
    served_by = backends(training.model.device)
    print("ops called in one training step and the completions, and the backend that served them:")
    for op, calls in sorted(counted.calls.items()):
        print(f"  {op:34} {calls:6} calls   {served_by[op]}")


def run(arguments: argparse.Namespace) -> int:
    """Trains, saves, completes and checks."""
    for package in ("matplotlib", "numpy", "safetensors", "tokenizers"):  # before anything is trained
        optional(package, "all", "jetkernels demo")
    device = torch.device(arguments.device)
    torch.manual_seed(arguments.seed)
    found = _machine.processors()
    if notice := _machine.busy_notice(
        found, "training sees fewer bytes than on a quiet one, and may take longer than asked for"
    ):
        print(notice)
    corpus = TextCorpus.from_standard_library(between="\n")
    unigram = unigram_entropy(corpus.held_out)
    print(
        f"corpus: {corpus.files} files of the Python standard library, {len(corpus.training) / 1e6:.1f} MB to train "
        f"on, {len(corpus.held_out) / 1e6:.1f} MB held out; unigram entropy {unigram:.3f} nats per byte"
    )
    model = JetNemotronForCausalLM(JetNemotronConfig(**CONFIG)).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    bf16 = autocast_pays(device)
    print(
        f"model: {' '.join(model.config.layer_types)}, {parameters / 1e6:.2f} M parameters, {B} x {T} bytes a step, "
        f"{'bf16 autocast' if bf16 else 'fp32'} on {device}"
    )
    with CountOps() as counted:
        next_token_loss(model, next(batches(corpus.training, seed=2))).backward()
    model.zero_grad(set_to_none=True)

    training, asked, enough = (
        Training(model, corpus.training, arguments.seed, bf16),
        60 * arguments.minutes,
        WORST_LOSS * unigram,
    )
    final = train(training, asked, lambda: held_out_loss(model, corpus.held_out), enough)
    report(model, training, unigram, final, arguments.output)
    steps, taken = len(training.losses), training.seconds[-1]
    if taken > 1.2 * asked + 5:
        print(
            f"training took {taken:.0f} s instead of {asked:.0f}: the loss needs {steps} steps, "
            f"each {taken / steps:.2f} s here"
        )
    if steps < 4 * FEWEST_STEPS:
        print(f"trained on {steps * B * T:,} bytes only: the completions will be poor")

    with counted:
        completions = complete_all(model, snippets(corpus.held_out, 3), arguments.seed, device)
    difference = max(each.difference for each in completions)
    print(f"\ndecode against prefill: largest difference of a logit {difference:.2e}")
    report_speed(training, completions, counted, found)
    print(f"model and plot: {arguments.output}/ (try: jetkernels generate --model {arguments.output} --prompt 'def ')")
    check(difference, final, enough)
    return 0
