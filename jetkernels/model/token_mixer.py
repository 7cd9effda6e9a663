"""What the model asks of a token mixer, the part of a decoder layer in which the tokens of a sequence meet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.types import Device

from jetkernels.modules.stand_in import HasStandIn

from .layout import TokenLayout

if TYPE_CHECKING:
    from .config import JetNemotronConfig

# cos and sin of the tokens' rotary angles, as `attention.rotary_table` gives them.
Rotary = tuple[Tensor, Tensor]
# What a mixer remembers of the tokens it has seen: anything that gives its tensors when it is iterated over.
State = Iterable[Tensor]


class Draft(Protocol):
    """Stands for a state in a call whose tokens are drafts: any prefix of them may be accepted later, or none.

    `TokenMixer.forward` reads the state in it, writes nothing that a later call would read, and leaves in it what
    `commit` needs.
    """

    def __init__(self, state: Any): ...

    def commit(self, num_accepted: Tensor) -> None:
        """Advances the state by the first tokens of each sequence, as `forward` of them alone would have.

        Args:
            num_accepted: [N] int64, each 0..T, on the device; not to be read on the host.
        """


class TokenMixer(HasStandIn, ABC):
    """A kind of layer: a subclass of this, and its line in `jetkernels.model.mixers.MIXERS`.

    The model calls `sizes` and `initial_state` on the class, before and without any layer; it builds a layer as
    `cls(config, device=..., dtype=...)`, also on the meta device. The parameters are stored as
    `model.layers.<i>.self_attn.<name>`.

    Attributes:
        uses_rotary: whether the layer is given the rotary angles of its tokens.
        draft_type: class of the `Draft` that `forward` takes in the place of a state. A class that overrides `forward`
            names it again. None: a model with such a layer verifies no draft tokens.
    """

    uses_rotary: ClassVar[bool] = False
    draft_type: ClassVar[type[Draft] | None] = None

    @classmethod
    @abstractmethod
    def sizes(cls, config: JetNemotronConfig) -> dict[str, object]:
        """The sizes that decide the shape of a state, by their names in the config.

        A cache serves every model with the same ones. They are read when a config is made that has such a layer, so
        this is where the kind's own section, `config.section(kind)`, is checked.

        Raises:
            ValueError: the config does not have them, or not such as the layer needs.
        """

    @classmethod
    @abstractmethod
    def initial_state(
        cls,
        config: JetNemotronConfig,
        batch_size: int,
        max_length: int,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """The state of `batch_size` sequences that have seen nothing.

        Args:
            config: of the model.
            batch_size: N, the first dimension of each tensor.
            max_length: tokens that each sequence will have at most.
            device: of the tensors.
            dtype: of the layer's activations.

        Returns: a state whose tensors are all zero; `JetNemotronCache.reset` writes zeros into them again.
        """

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draws every parameter anew; does nothing on the meta device."""

    @abstractmethod
    def forward(
        self, hidden_states: Tensor, *, layout: TokenLayout, rotary: Rotary | None = None, state: Any = None
    ) -> Tensor:
        """Mixes the tokens of each sequence with those before them.

        Args:
            hidden_states: [N, T, C], or packed [1, total, C], as `layout` says. There may be no tokens.
            layout: which sequence each token belongs to, and how many came before it.
            rotary: of the tokens' positions; given if some layer of the model has `uses_rotary`.
            state: what `initial_state` made, for the N sequences; read, and updated in place. Then no gradient is
                computed. None: the sequences begin with this call. With a `draft_type` also the `Draft` of a state:
                then the tokens are drafts, T of each sequence, not packed.

        Returns: as hidden_states.
        """

    def step(self, x: Tensor, state: Any, *, lengths: Tensor, rotary: Rotary | None = None) -> Tensor:
        """`forward` of one new token of each sequence, without a gradient.

        This one calls `forward`, and reads `lengths` on the host: a model with such a layer is not captured in a CUDA
        graph. That of a kind is used where no class newer than its own overrides `forward`.

        Args:
            x: [N, C].
            state: of the N sequences, updated in place.
            lengths: [N] int64, tokens that came before in each sequence, on the device.
            rotary: cos and sin [N, head_dim].

        Returns: [N, C].
        """
        layout = TokenLayout.of_step(lengths)
        return self(x[:, None], layout=layout, rotary=rotary_of_tokens(rotary), state=state)[:, 0]


def draft_types(mixers: Iterable[TokenMixer | type[TokenMixer]]) -> list[type[Draft]]:
    """The `draft_type` of each layer's mixer, or kind, that was written beside its newest `forward`, or later.

    Raises:
        ValueError: a layer has none.
    """
    found = []
    for i, mixer in enumerate(mixers):
        kind = mixer if isinstance(mixer, type) else type(mixer)
        newest = next(c for c in kind.__mro__ if "forward" in c.__dict__ or "draft_type" in c.__dict__)
        draft_type = newest.__dict__.get("draft_type")
        if draft_type is None:
            raise ValueError(
                f"draft tokens cannot be verified by layer {i}: a {kind.__name__} has no draft_type beside its forward "
                "(see TokenMixer); go on without drafts"
            )
        found.append(draft_type)
    return found


def rotary_of_tokens(rotary: Rotary | None) -> Rotary | None:
    """Those of one token of each sequence, [N, head_dim], as a `forward` takes them."""
    return None if rotary is None else (rotary[0][:, None, None], rotary[1][:, None, None])
