"""Models behind lm-evaluation-harness (package lm_eval), and its tasks as objectives of a search.

Imported only where a task of it is asked for.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jetkernels._optional import optional
from jetkernels.model import JetNemotronForCausalLM, Tokenizer

from .data import end_of_text
from .tasks import Predict, Score, log_likelihoods

_NEEDED_BY = "a task of lm-evaluation-harness"
lm_eval = optional("lm_eval", "harness", _NEEDED_BY)
TemplateLM: Any = optional("lm_eval.api.model", "harness", _NEEDED_BY).TemplateLM
# (token ids of a prompt, a number) -> so many tokens of the greedy continuation, one by one.
Continue = Callable[[list[int], int], Iterator[int]]


def continue_with_cache(model: JetNemotronForCausalLM) -> Continue:
    """The greedy continuation that reads each token once."""

    def tokens(ids: list[int], most: int) -> Iterator[int]:
        cache = model.new_cache(1, len(ids) + most)
        new = torch.tensor([ids], device=model.device)
        for _ in range(most):
            token = int(model(new, cache=cache, last_logits_only=True).logits[0, -1].argmax())
            yield token
            new = new.new_tensor([[token]])

    return tokens


class HarnessModel(TemplateLM):
    """The harness's view of a model that is given as a function of token ids.

    Args:
        predict: the model.
        tokenizer: of the model; it must have a token for the end of a text.
        max_length: tokens that the model is shown; what is longer loses its front.
        batch_size: texts that it is shown at once.
        continue_: writes the answers that are not listed. By default `predict` reads the whole text for every token:
            enough for the few short answers of a search.
    """

    def __init__(
        self,
        predict: Predict,
        tokenizer: Tokenizer,
        max_length: int = 2048,
        batch_size: int = 16,
        continue_: Continue | None = None,
    ):
        super().__init__()
        self.predict = predict
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.batch_size = batch_size
        self.continue_ = continue_ or self._continue

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        return end_of_text(self.tokenizer)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Token ids of a text; the harness's options mean nothing here."""
        return self.tokenizer.encode(string)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **options: Any) -> list[tuple[float, bool]]:
        pairs = []
        for (_, text), context, answer in requests:
            if len(answer) >= self.max_length:
                raise ValueError(
                    f"harness: an answer must have fewer than {self.max_length} tokens, got {len(answer)}: "
                    f"{text[:40]!r}..."
                )
            pairs.append((context[max(0, len(context) + len(answer) - self.max_length) :], answer))
        return log_likelihoods(self.predict, pairs, self.batch_size)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows of max_length - 1 tokens.

        A window follows the token in front of it, the first one the end of a text.
        """
        totals = []
        for request in requests:
            ids = [self.eot_token_id, *self.tok_encode(request.args[0])]
            step = self.max_length - 1
            pairs = [(ids[i : i + 1], ids[i + 1 : i + 1 + step]) for i in range(0, len(ids) - 1, step)]
            totals.append(sum(value for value, _ in log_likelihoods(self.predict, pairs, self.batch_size)))
        return totals

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The greedy answers."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, options: dict) -> str:
        if options.get("do_sample") and options.get("temperature", 1.0) > 0:
            raise ValueError(f"harness: answers are greedy, got a task with {options}")
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else until
        ids, answer, text = self.tokenizer.encode(context) or [self.eot_token_id], [], ""
        for token in self.continue_(ids[-self.max_length :], options.get("max_gen_toks", 256)):
            if token == self.tokenizer.end_of_text_id:
                break
            answer.append(token)
            text = self.tokenizer.decode_continuation(answer)
            ends = [text.index(word) for word in until if word and word in text]
            if ends:
                return text[: min(ends)]
        return text

    def _continue(self, ids: list[int], most: int) -> Iterator[int]:
        for _ in range(most):
            token = int(self.predict(torch.tensor([ids[-self.max_length :]]))[0, -1].argmax())
            yield token
            ids = [*ids, token]


def evaluate(
    model: HarnessModel,
    tasks: Sequence[str | dict],
    *,
    limit: int | None = None,
    fewshot: int | None = None,
    folder: str | Path | None = None,
    bootstrap: int = 0,
) -> dict:
    """What `lm_eval.simple_evaluate` finds.

    Args:
        model: to be judged.
        tasks: names that the harness knows, or configurations, as its YAML files hold them.
        limit: documents of each; None: all.
        fewshot: examples in front of each; None: the task's own number.
        folder: with YAML files of more tasks.
        bootstrap: samples by which the standard errors are estimated; 0: there are none.

    Raises:
        ValueError: there is no task of a name.
    """
    manager = None
    if folder is not None or any(isinstance(task, str) for task in tasks):
        manager = optional("lm_eval.tasks", "harness", _NEEDED_BY).TaskManager(
            include_path=None if folder is None else str(folder)
        )
        unknown = [task for task in tasks if isinstance(task, str) and task not in manager.all_tasks]
        if unknown:
            raise ValueError(f"harness: there is no task {', '.join(unknown)}; `lm-eval ls tasks` lists them")
    return lm_eval.simple_evaluate(
        model=model,
        tasks=list(tasks),
        limit=limit,
        num_fewshot=fewshot,
        bootstrap_iters=bootstrap,
        task_manager=manager,
        verbosity="ERROR",
    )


@dataclass(frozen=True)
class HarnessTask:
    """A task of the harness behind this library's `Task`.

    Attributes:
        task: a name that the harness knows, or the dict of a task's configuration, as its YAML files hold it.
        tokenizer: of the model.
        limit: documents to use; None: all.
        fewshot: examples in front of each; None: the task's own number.
        metric: of the harness's results; the score's accuracy, negated if less of it is better.
        max_length: tokens that the model is shown.
    """

    task: str | dict
    tokenizer: Tokenizer
    limit: int | None = None
    fewshot: int | None = None
    metric: str = "acc"
    max_length: int = 2048

    @property
    def name(self) -> str:
        """As the harness calls it."""
        return self.task if isinstance(self.task, str) else self.task["task"]

    def score(self, predict: Predict) -> Score:
        """The loss is minus the log-likelihood of the right choice, nats per question; NaN where there are none."""
        model = HarnessModel(predict, self.tokenizer, self.max_length)
        found = evaluate(model, [self.task], limit=self.limit, fewshot=self.fewshot)
        results = found["results"][self.name]
        # Keys are "metric,filter".
        values = [value for key, value in results.items() if key.partition(",")[0] == self.metric]
        if not values:
            known = sorted({key.partition(",")[0] for key in results if "," in key})
            raise ValueError(f"harness: metric of {self.name} must be one of {', '.join(known)}, got {self.metric!r}")
        if not found["higher_is_better"][self.name].get(self.metric, True):
            values = [-value for value in values]
        losses = [
            -sample["resps"][sample["target"]][0][0]
            for sample in found["samples"][self.name]
            if isinstance(sample["target"], int) and len(sample["resps"]) > 1
        ]
        return Score(statistics.mean(losses) if losses else float("nan"), float(values[0]))
