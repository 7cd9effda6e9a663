"""Complete a prompt. With --model the folder's tokenizer reads and writes text, streamed as it is made; with
--config and --random-weights there is no tokenizer, so token ids are printed.
"""

import argparse
import sys
import time

import torch

from jetkernels.cli.models import add_model_arguments, load_model
from jetkernels.model import StreamDecoder, Tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--prompt", help="text to complete (default: read standard input)")
    parser.add_argument("--prompt-ids", help="token ids to complete, separated by commas, instead of text")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the most likely token")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--prefill-chunk", type=int, help="prompt tokens per forward; bounds the memory of a long prompt")


def prompt_ids(arguments: argparse.Namespace, tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
    if arguments.prompt_ids is not None:
        try:
            ids = [int(part) for part in arguments.prompt_ids.split(",")]
        except ValueError:
            raise ValueError(f"--prompt-ids must be integers separated by commas, got {arguments.prompt_ids!r}") from None
    elif tokenizer is None:
        # Random weights complete anything equally well: bytes of the prompt stand in for its tokens.
        ids = list((arguments.prompt or "JetBlock").encode())
    else:
        ids = tokenizer.encode(arguments.prompt if arguments.prompt is not None else sys.stdin.read())
    if not ids:
        raise ValueError("the prompt must hold at least one token, got none")
    outside = [i for i in ids if not 0 <= i < vocab_size]
    if outside:
        raise ValueError(f"token ids must be below the vocabulary size {vocab_size} and not negative, got {outside[0]}")
    return ids


def run(arguments: argparse.Namespace) -> None:
    start = time.perf_counter()
    model = load_model(arguments)
    tokenizer = Tokenizer.from_pretrained(arguments.model) if arguments.model is not None else None
    print(f"model ready in {time.perf_counter() - start:.1f} s on {model.device}, {model.dtype}", file=sys.stderr)
    ids = prompt_ids(arguments, tokenizer, model.config.vocab_size)
    decoder = StreamDecoder(tokenizer) if tokenizer else None
    times = [time.perf_counter()]
    stop = set(model.config.stop_token_ids)

    def show(tokens: torch.Tensor, running: torch.Tensor) -> None:
        token = tokens.item()
        times.append(time.perf_counter())
        if token not in stop:
            print(decoder.push(token) if decoder else f"{token} ", end="", flush=True)

    generator = torch.Generator(device=model.device).manual_seed(arguments.seed)
    model.generate(
        torch.tensor([ids], device=model.device),
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        prefill_chunk=arguments.prefill_chunk,
        generator=generator,
        on_tokens=show,
    )
    print(decoder.finish() if decoder else "")
    if len(times) > 2:
        rate = (len(times) - 2) / (times[-1] - times[1])
        print(f"prompt of {len(ids)} tokens in {times[1] - times[0]:.2f} s, then {rate:.1f} tokens/s", file=sys.stderr)
