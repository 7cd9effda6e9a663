"""Train a small byte-level hybrid of JetBlock, sliding-window and full attention on the source text of this machine's
Python standard library, then complete held-out code with it, token by token from its recurrent state.

Writes the model (a folder that `jetkernels generate --model` reads) and the loss curve to the output folder.
"""

import argparse
import math
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from jetkernels.cli.info import backends
from jetkernels.cli.options import device, new_folder, number, seed
from jetkernels.model import JetNemotronConfig, JetNemotronForCausalLM, Tokenizer
from jetkernels.postnas.data import is_held_out, standard_library

B, T = 8, 256  # sequences and bytes of one training step
LEARNING_RATE = 3e-3
TEMPERATURE = 0.5
WORST_LOSS = 0.75  # of the unigram entropy: a model that learned less has learned little of the language
WORST_DIFFERENCE = 1e-3  # of a logit between decode and prefill
CONFIG = dict(
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
    parser.add_argument("--minutes", type=number(0, 24 * 60, above=True), default=2.5, help="training time (default 2.5)")
    parser.add_argument("--output", type=new_folder, default="jetkernels-demo", help="folder for model and plot")
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--seed", type=seed, default=0)


def load_corpus() -> tuple[Tensor, Tensor, int]:
    """The standard library's source as bytes: (training, held out, number of files). A file is in one of them, by name."""
    root, files = standard_library()
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in files:
        parts[is_held_out(path.relative_to(root).as_posix())].append(path.read_bytes())
    if not parts[0] or not parts[1]:
        raise ValueError(f"demo: the standard library at {root} holds too few .py files to train on")
    training, held_out = (torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8) for part in parts)
    return training, held_out, len(files)


def unigram_entropy(data: Tensor) -> float:
    """Nats per byte of a model that knows only how frequent each byte is."""
    counts = torch.tensor(list(Counter(data.tolist()).values()), dtype=torch.float64)
    p = counts / counts.sum()
    return -(p * p.log()).sum().item()


def batch(data: Tensor, generator: torch.Generator, device: torch.device) -> Tensor:
    starts = torch.randint(len(data) - T - 1, (B,), generator=generator)
    return torch.stack([data[s : s + T + 1] for s in starts.tolist()]).long().to(device)


def loss_of(model: JetNemotronForCausalLM, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def autocast_pays(device: torch.device) -> bool:
    """Whether this machine multiplies bf16 matrices clearly faster than fp32 ones."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(1024, 1024, device=device).to(dtype)
        a @ a
        start = time.perf_counter()
        for _ in range(5):
            product = a @ a
        product.sum().item()
        seconds[dtype] = time.perf_counter() - start
    return seconds[torch.bfloat16] < 0.6 * seconds[torch.float32]


class CountOps(TorchDispatchMode):
    """Counts the calls of jet ops."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "jet":
            self.calls[func._schema.name.removeprefix("jet::")] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def stopwatch(seconds: dict[str, float], name: str):
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def train(model, data: Tensor, seconds: float, seed: int, bf16: bool, device: torch.device) -> list[tuple[float, float]]:
    """AdamW with a cosine schedule over wall-clock time, under bf16 autocast if asked. Returns (seconds, loss) of every step."""
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    history: list[tuple[float, float]] = []
    smooth = None
    start = time.perf_counter()
    with tqdm(total=round(seconds), unit="s", desc="training", bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f}s{postfix}") as bar:
        while (elapsed := time.perf_counter() - start) < seconds:
            progress = elapsed / seconds
            warmup = min(1.0, (len(history) + 1) / 20)
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = loss_of(model, batch(data, generator, device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            value = loss.item()
            smooth = value if smooth is None else 0.95 * smooth + 0.05 * value
            history.append((time.perf_counter() - start, value))
            rate = len(history) * B * T / history[-1][0]
            bar.set_postfix_str(f"step {len(history)}, loss {smooth:.3f}, {rate:,.0f} bytes/s")
            bar.update(min(history[-1][0], seconds) - bar.n)
    return history


def plot(history: list[tuple[float, float]], unigram: float, held_out: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    axes.plot(*zip(*history), color="0.75", linewidth=0.7, label="training batch")
    smooth, average = [], history[0][1]
    for _, value in history:
        average = 0.95 * average + 0.05 * value
        smooth.append(average)
    axes.plot([t for t, _ in history], smooth, label="training, smoothed")
    axes.axhline(unigram, linestyle="--", color="0.4", label=f"unigram entropy {unigram:.2f}")
    axes.axhline(held_out, linestyle=":", color="C3", label=f"held-out files {held_out:.2f}")
    axes.set(xlabel="seconds", ylabel="loss (nats per byte)", title="byte-level JetBlock hybrid on the Python standard library")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


@torch.no_grad()
def held_out_loss(model, data: Tensor, device: torch.device) -> float:
    generator = torch.Generator().manual_seed(1)
    return sum(loss_of(model, batch(data, generator, device)).item() for _ in range(8)) / 8


def snippets(data: Tensor, count: int) -> list[bytes]:
    """Beginnings of held-out functions: up to 200 bytes that end behind the colon of a `def` line."""
    text = data.numpy().tobytes()
    found, position = [], len(text) // 7
    while len(found) < count and (position := text.find(b"\n    def ", position + len(text) // 9)) >= 0:
        end = text.find(b":\n", position)
        if 0 < end - position < 100:
            found.append(text[max(0, end + 2 - 200) : end + 2])
    return found


@torch.no_grad()
def complete(model, prompt: bytes, new: int, seed: int, device: torch.device, seconds: dict[str, float]) -> tuple[bytes, float]:
    """Prefill and recurrent decode; then the whole text again in one prefill. Returns the text and the largest
    difference of the logits between the two."""
    tokens = torch.tensor([list(prompt)], device=device)
    generator = torch.Generator(device=device).manual_seed(seed)
    cache = model.new_cache(1, len(prompt) + new)
    with stopwatch(seconds, "prefill"):
        logits = [model(tokens, cache=cache).logits[:, -1]]
    with stopwatch(seconds, "decode"):
        for _ in range(new):
            p = (logits[-1][:, :256] / TEMPERATURE).softmax(-1)
            token = torch.multinomial(p, 1, generator=generator)
            tokens = torch.cat([tokens, token], dim=1)
            logits.append(model(token, cache=cache).logits[:, -1])
    again = model(tokens).logits[:, len(prompt) - 1 :]
    difference = (torch.stack(logits, dim=1) - again).abs().max().item()
    return bytes(tokens[0, len(prompt) :].tolist()), difference


def run(arguments: argparse.Namespace) -> int:
    device = torch.device(arguments.device)
    torch.manual_seed(arguments.seed)
    training, held_out, files = load_corpus()
    unigram = unigram_entropy(held_out)
    print(f"corpus: {files} files of the Python standard library, {len(training) / 1e6:.1f} MB to train on, "
          f"{len(held_out) / 1e6:.1f} MB held out; unigram entropy {unigram:.3f} nats per byte")
    model = JetNemotronForCausalLM(JetNemotronConfig(**CONFIG)).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    bf16 = autocast_pays(device)
    print(f"model: {' '.join(model.config.layer_types)}, {parameters / 1e6:.2f} M parameters, {B} x {T} bytes a step, "
          f"{'bf16 autocast' if bf16 else 'fp32'} on {device}")
    with CountOps() as counted:
        loss_of(model, batch(training, torch.Generator().manual_seed(2), device)).backward()
    model.zero_grad(set_to_none=True)

    history = train(model, training, 60 * arguments.minutes, arguments.seed, bf16, device)
    final = held_out_loss(model, held_out, device)
    arguments.output.mkdir(parents=True, exist_ok=True)
    plot(history, unigram, final, arguments.output / "loss.png")
    model.save_pretrained(arguments.output)
    Tokenizer.byte_level().save_pretrained(arguments.output)
    print(f"loss: {history[0][1]:.3f} -> {sum(v for _, v in history[-20:]) / len(history[-20:]):.3f} (training), "
          f"{final:.3f} on held-out files; unigram entropy {unigram:.3f}")

    seconds: dict[str, float] = {}
    worst, new = 0.0, 160
    with counted:
        for i, prompt in enumerate(snippets(held_out, 3)):
            text, difference = complete(model, prompt, new, arguments.seed + i, device, seconds)
            worst = max(worst, difference)
            print(f"\n--- held-out prompt {i + 1}, then the completion after >>>\n{prompt.decode('utf-8', 'replace')}>>>"
                  f"{text.decode('utf-8', 'replace')}")
    print(f"\ndecode against prefill: largest difference of a logit {worst:.2e}")
    print(f"speed: training {len(history) * B * T / history[-1][0]:,.0f} bytes/s, "
          f"decode {new / seconds['decode']:,.0f} bytes/s (one sequence)")
    served_by = backends(device)
    print("ops called in one training step and the completions, and the backend that served them:")
    for op, calls in sorted(counted.calls.items()):
        print(f"  {op:34} {calls:6} calls   {served_by[op.removesuffix('_backward')]}")
    print(f"model and plot: {arguments.output}/ (try: jetkernels generate --model {arguments.output} --prompt 'def ')")
    if not worst <= WORST_DIFFERENCE:
        raise RuntimeError(f"decode and prefill must agree within {WORST_DIFFERENCE}, got {worst:.2e}")
    if not final <= WORST_LOSS * unigram:
        raise RuntimeError(f"the held-out loss {final:.3f} did not fall well below the unigram entropy {unigram:.3f}")
    return 0
