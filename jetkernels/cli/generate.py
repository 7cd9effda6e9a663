"""Complete prompts.

With --model the folder's tokenizer reads and writes text; with --config and --random-weights there is no tokenizer:
bytes stand in for tokens, and token ids are printed. --prompt-ids do without a tokenizer too.

The completion of a single prompt is streamed as it is made. Several prompts (--prompt more than once, or --prompt-file)
are completed --batch at a time, at temperature 0 each as it would be alone. With --json every prompt gives a line with
an object: prompt, prompt_ids, ids (of the completion, without the token that ended it), text (null without a
tokenizer), stopped (whether it ended by itself).

With --draft N tokens are proposed at each step, what followed the last ones where they stood before in the text, and
those are kept that would have come anyway. How many were accepted per step is printed, with --json as
accepted_per_step, too.

With --tensor-parallel each process of torchrun computes a part of every layer, and the first one prints:

torchrun --standalone --nproc-per-node 2 -m jetkernels generate --tensor-parallel ...
"""

import argparse
import contextlib
import gc
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from jetkernels.cli.models import add_model_arguments, check_memory, load_model, read_config
from jetkernels.cli.options import UsageError, integer, integers, integers_of, number
from jetkernels.model import JetNemotronConfig, JetNemotronForCausalLM, StreamDecoder, Tokenizer
from jetkernels.model.drafts import MOST_PROPOSED
from jetkernels.reading import lines_of, utf8_text

STANDARD_INPUT = "standard input"


@dataclass(frozen=True)
class Prompt:
    """What is to be completed.

    Attributes:
        text: None where token ids were given.
        ids: its tokens.
    """

    text: str | None
    ids: list[int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `jetkernels generate`."""
    add_model_arguments(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--prompt", action="append", help="text to complete; may be repeated (default: read standard input)"
    )
    what.add_argument(
        "--prompt-ids",
        type=integers(),
        action="append",
        help="token ids to complete, separated by commas; may be repeated",
    )
    what.add_argument("--prompt-file", help="file with a prompt in each line (UTF-8); - is standard input")
    parser.add_argument(
        "--batch", type=integer(1, 2**16), default=8, help="prompts that are completed at once (default 8)"
    )
    parser.add_argument(
        "--max-new-tokens", type=integer(), default=128, help="of each completion, at most (default 128)"
    )
    temperature = "0 (default): always the most likely token"
    parser.add_argument("--temperature", type=number(0), default=0.0, help=temperature)
    parser.add_argument("--top-k", type=integer(1), help="draw from this many most likely tokens")
    parser.add_argument(
        "--top-p", type=number(0, 1, above=True), help="draw from the fewest tokens with this probability"
    )
    parser.add_argument(
        "--prefill-chunk", type=integer(1), help="prompt tokens per forward; bounds the memory of a long prompt"
    )
    parser.add_argument(
        "--draft", type=integer(1, MOST_PROPOSED), help="tokens that are proposed at each step, at temperature 0"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object per prompt, one in each line")
    parser.add_argument(
        "--tensor-parallel", action="store_true", help="divide the model over the processes of torchrun"
    )


def _standard_input() -> str:
    if sys.stdin.isatty():
        print("reading from standard input; end with Ctrl-D", file=sys.stderr)
    # Decoded here: Python would use the encoding of the terminal.
    raw = sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else sys.stdin.read().encode("utf-8")
    return utf8_text(raw, STANDARD_INPUT)


def _texts(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """(where it comes from, text) of every prompt that is text."""
    if arguments.prompt is not None:
        # What is not UTF-8 on a command line comes as halves of surrogate pairs.
        raw = [text.encode("utf-8", "surrogateescape") for text in arguments.prompt]
        return [("--prompt", utf8_text(text, "--prompt")) for text in raw]
    if arguments.prompt_file is None:
        return [(STANDARD_INPUT, _standard_input())]
    if arguments.prompt_file == "-":
        source, text = STANDARD_INPUT, _standard_input()
    else:
        source = f"--prompt-file {arguments.prompt_file}"
        text = utf8_text(Path(arguments.prompt_file).read_bytes(), source)
    return [(f"line {n} of {source}", line) for n, line in enumerate(lines_of(text), 1)]


def read_tokenizer(arguments: argparse.Namespace) -> Tokenizer | None:
    """The one beside the weights. None without --model; and where it is missing, if only token ids are given."""
    if arguments.model is None:
        return None
    try:
        return Tokenizer.from_pretrained(arguments.model)
    except FileNotFoundError:
        if arguments.prompt_ids is None:
            raise
        return None


def read_prompts(arguments: argparse.Namespace, tokenizer: Tokenizer | None, config: JetNemotronConfig) -> list[Prompt]:
    """Every prompt that the options name, checked against the model's vocabulary and context."""
    if arguments.prompt_ids is not None:
        found = [("--prompt-ids", Prompt(None, list(integers_of(text)))) for text in arguments.prompt_ids]
    else:
        encode = tokenizer.encode if tokenizer is not None else lambda text: list(text.encode("utf-8"))
        found = [(source, Prompt(text, encode(text))) for source, text in _texts(arguments)]
    new, longest = arguments.max_new_tokens, config.max_position_embeddings
    for source, prompt in found:
        if not prompt.ids:
            raise ValueError(f"{source}: a prompt must hold at least one token, got none")
        outside = [i for i in prompt.ids if not 0 <= i < config.vocab_size]
        if outside:
            raise ValueError(
                f"{source}: token ids must be below the vocabulary size {config.vocab_size} and not negative, "
                f"got {outside[0]}"
            )
        if len(prompt.ids) + new > longest:
            raise ValueError(
                f"{source}: {len(prompt.ids):,} tokens and --max-new-tokens {new:,} are more than the {longest:,} "
                "that the model is made for (max_position_embeddings of its config.json)"
            )
    return [prompt for _, prompt in found]


def _padded(prompts: list[Prompt], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [B, T], padded on the left."""
    T = max(len(prompt.ids) for prompt in prompts)
    ids = torch.tensor([[pad] * (T - len(p.ids)) + p.ids for p in prompts], device=device)
    mask = torch.tensor([[0] * (T - len(p.ids)) + [1] * len(p.ids) for p in prompts], device=device)
    return ids, mask


class Output:
    """Prints completions, a single one as it is made."""

    def __init__(self, tokenizer: Tokenizer | None, stop: set[int], stream: bool, as_json: bool):
        self.tokenizer, self.stop, self.stream, self.as_json = tokenizer, stop, stream, as_json
        self.decoder = StreamDecoder(tokenizer, is_continuation=True) if tokenizer is not None else None
        self.times: list[float] = []
        self.tokens = 0
        # Draft tokens that were accepted, of each step of each row; rows of a batch lie side by side.
        self.accepted: list[list[int]] = []

    def step(self, tokens: torch.Tensor, running: torch.Tensor) -> None:
        """The tokens [B] of one step, and which rows were still running; prints the token of a single prompt."""
        self.times.append(time.perf_counter())
        self.tokens += int(running.sum())
        if self.stream and (token := int(tokens)) not in self.stop:
            print(self.decoder.push(token) if self.decoder is not None else f"{token} ", end="", flush=True)

    def drafted(self, proposed: torch.Tensor, accepted: torch.Tensor) -> None:
        """How many tokens of each row [B] were proposed and accepted in one step; -1 where a row had ended."""
        for n, count in enumerate(accepted.tolist()):
            if count >= 0:
                self.accepted[n - len(proposed)].append(count)

    def accepted_per_step(self, rows: list[list[int]]) -> float:
        """Of the steps of some rows; 0 without a step."""
        steps = sum(map(len, rows))
        return sum(map(sum, rows)) / steps if steps else 0.0

    def text(self, ids: list[int]) -> str:
        """What is printed of token ids: text, or the ids where there is no tokenizer."""
        return self.tokenizer.decode_continuation(ids) if self.tokenizer is not None else " ".join(map(str, ids))

    def done(self, number: int, prompt: Prompt, ids: list[int]) -> None:
        """A prompt's completion: ids up to the token that ended it, or all."""
        if self.stream:
            print(self.decoder.finish() if self.decoder is not None else "", flush=True)
            return
        end = next((n for n, token in enumerate(ids) if token in self.stop), len(ids))
        kept, stopped = ids[:end], end < len(ids)
        if self.as_json:
            text = self.text(kept) if self.tokenizer is not None else None
            values: dict[str, object] = {"prompt": prompt.text, "prompt_ids": prompt.ids}
            values |= {"ids": kept, "text": text, "stopped": stopped}
            if self.accepted:
                values["accepted_per_step"] = self.accepted_per_step([self.accepted[number - 1]])
            print(json.dumps(values), flush=True)
        else:
            print(
                f"--- prompt {number}: {prompt.text if prompt.text is not None else prompt.ids}\n{self.text(kept)}",
                flush=True,
            )


def complete(
    arguments: argparse.Namespace, model: JetNemotronForCausalLM, prompts: list[Prompt], output: Output
) -> float:
    """Completes all prompts, --batch at a time; returns the seconds until the first token of the first batch."""
    generator = torch.Generator(device=model.device).manual_seed(arguments.seed)
    start, first = time.perf_counter(), 0.0
    for begin in range(0, len(prompts), arguments.batch):
        group = prompts[begin : begin + arguments.batch]
        ids, mask = _padded(group, 0, model.device)
        if arguments.draft is not None:
            output.accepted += [[] for _ in group]
        found = model.generate(
            ids,
            mask if len(group) > 1 else None,
            arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            prefill_chunk=arguments.prefill_chunk,
            generator=generator,
            on_tokens=output.step,
            draft=arguments.draft,
            on_draft=output.drafted if arguments.draft is not None else None,
        )
        if begin == 0 and output.times:
            first = output.times[0] - start
        for n, (prompt, row) in enumerate(zip(group, found[:, ids.shape[1] :].tolist())):
            output.done(begin + n + 1, prompt, row)
    return first


def _join(arguments: argparse.Namespace, config: JetNemotronConfig) -> int:
    """Joins the processes of torchrun; returns the number of this one."""
    from jetkernels.parallel import config_of_rank  # torch.distributed takes half a second to import
    from jetkernels.postnas import join_ranks, ranks

    if arguments.quantize is not None:
        raise UsageError("--tensor-parallel divides weights that are not quantised: give it, or --quantize")
    if arguments.prompt is None and arguments.prompt_ids is None and arguments.prompt_file in (None, "-"):
        raise UsageError("--tensor-parallel needs --prompt, --prompt-ids or --prompt-file: processes share no input")
    join_ranks(torch.device(arguments.device))
    rank, count = ranks()
    if count == 1:
        line = "torchrun --standalone --nproc-per-node 2 -m jetkernels generate --tensor-parallel ..."
        raise UsageError(f"--tensor-parallel needs several processes, got one: {line}")
    config_of_rank(config, count)  # refused before weights are read
    return rank


def _leave() -> None:
    """Ends what `_join` began: a process that ends while gloo's threads are there is aborted."""
    import torch.distributed as dist

    gc.collect()  # of the model, which holds the group
    dist.destroy_process_group()


def _divide(model: JetNemotronForCausalLM) -> None:
    """Gives each process its part of the model."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from jetkernels.parallel import tensor_parallel_

    tensor_parallel_(model, init_device_mesh(model.device.type, (dist.get_world_size(),)))


def run(arguments: argparse.Namespace) -> None:
    """Completes the prompts and prints the completions."""
    if arguments.draft is not None and arguments.temperature > 0:
        raise UsageError(f"--draft needs --temperature 0 (the most likely tokens), got {arguments.temperature}")
    config = read_config(arguments)
    if not arguments.tensor_parallel:
        _complete_all(arguments, config)
        return
    with contextlib.ExitStack() as silence:
        if _join(arguments, config):  # an error is said when this has ended
            nothing = silence.enter_context(open(os.devnull, "w", encoding="utf-8"))
            silence.enter_context(contextlib.redirect_stdout(nothing))
            silence.enter_context(contextlib.redirect_stderr(nothing))
        _complete_all(arguments, config)
    _leave()


def _complete_all(arguments: argparse.Namespace, config: JetNemotronConfig) -> None:
    tokenizer = read_tokenizer(arguments)
    if (
        arguments.prompt is None
        and arguments.prompt_file is None
        and arguments.prompt_ids is None
        and tokenizer is None
    ):
        # Random weights complete anything equally well.
        arguments.prompt = ["JetBlock"]
    prompts = read_prompts(arguments, tokenizer, config)
    longest = max(len(prompt.ids) for prompt in prompts)
    check_memory(arguments, config, min(arguments.batch, len(prompts)), longest + arguments.max_new_tokens)
    start = time.perf_counter()
    model = load_model(arguments, config, max((prompt.ids for prompt in prompts), key=len))
    if arguments.tensor_parallel:
        _divide(model)
    print(f"model ready in {time.perf_counter() - start:.1f} s on {model.device}, {model.dtype}", file=sys.stderr)
    stream = len(prompts) == 1 and not arguments.json
    output = Output(tokenizer, set(config.stop_token_ids), stream, arguments.json)
    first = complete(arguments, model, prompts, output)
    times = output.times
    if len(prompts) == 1 and len(times) > 2:
        rate = (len(times) - 1) / (times[-1] - times[0])
        print(f"prompt of {len(prompts[0].ids)} tokens in {first:.2f} s, then {rate:.1f} tokens/s", file=sys.stderr)
    elif len(times) > 1:
        seconds = time.perf_counter() - start
        print(f"{len(prompts)} prompts, {output.tokens:,} new tokens in {seconds:.2f} s", file=sys.stderr)
    if output.accepted:
        print(f"drafts: {output.accepted_per_step(output.accepted):.2f} accepted tokens per step", file=sys.stderr)
