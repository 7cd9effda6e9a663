"""Tasks of lm-evaluation-harness (package lm_eval) as objectives of a search; imported only where one is asked for."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from jetkernels._optional import optional
from jetkernels.model import Tokenizer

from .tasks import Predict, Score, log_likelihoods

_NEEDED_BY = "a task of lm-evaluation-harness"
lm_eval = optional("lm_eval", "harness", _NEEDED_BY)
TemplateLM: Any = optional("lm_eval.api.model", "harness", _NEEDED_BY).TemplateLM


class HarnessModel(TemplateLM):
    """The harness's view of a model that is given as a function of token ids.

    Args:
        predict: the model.
        tokenizer: of the model; it must have a token for the end of a text.
        max_length: tokens that the model is shown; what is longer loses its front.
    """

    def __init__(self, predict: Predict, tokenizer: Tokenizer, max_length: int = 2048):
        super().__init__()
        self.predict = predict
        self.tokenizer = tokenizer
        self.max_length = max_length

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        if self.tokenizer.end_of_text_id is None:
            raise ValueError("harness: the tokenizer must have <|endoftext|>")
        return self.tokenizer.end_of_text_id

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
        return log_likelihoods(self.predict, pairs)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows of max_length - 1 tokens.

        A window follows the token in front of it, the first one the end of a text.
        """
        totals = []
        for request in requests:
            ids = [self.eot_token_id, *self.tok_encode(request.args[0])]
            step = self.max_length - 1
            pairs = [(ids[i : i + 1], ids[i + 1 : i + 1 + step]) for i in range(0, len(ids) - 1, step)]
            totals.append(sum(value for value, _ in log_likelihoods(self.predict, pairs)))
        return totals

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy, the whole prefix at every token: for the few short answers of a search, not for speed."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, options: dict) -> str:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else until
        ids, text = self.tokenizer.encode(context) or [self.eot_token_id], ""
        start = len(ids)
        for _ in range(options.get("max_gen_toks", 256)):
            token = int(self.predict(torch.tensor([ids[-self.max_length :]]))[0, -1].argmax())
            if token == self.tokenizer.end_of_text_id:
                break
            ids.append(token)
            text = self.tokenizer.decode(ids[start:])
            ends = [text.index(word) for word in until if word and word in text]
            if ends:
                return text[: min(ends)]
        return text


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
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=[self.task],
            limit=self.limit,
            num_fewshot=self.fewshot,
            bootstrap_iters=0,
            verbosity="ERROR",
        )
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
