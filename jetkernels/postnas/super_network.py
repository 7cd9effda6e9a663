"""The once-for-all super network: every layer of a frozen base with a trained linear path beside its attention."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.types import Device

from jetkernels.model import JetNemotronConfig, JetNemotronForCausalLM
from jetkernels.model.attention import Attention, SlidingWindowAttention
from jetkernels.model.layout import TokenLayout
from jetkernels.model.mixers import JetMixer
from jetkernels.model.token_mixer import Rotary, State, TokenMixer
from jetkernels.modules import JetBlock, JetBlockConfig

from .base import check_base
from .blocks import LinearBlock, fair_start_
from .data import seeded
from .teacher import Teacher, dense_layout, feature_loss, watched
from .warm_start import warm_start_

# The paths of a layer, by the kind of layer that each of them makes of it.
PATHS = ("jet", "attn", "swa")
# One of PATHS per layer.
Placement = tuple[str, ...]
# Stands in a config whose jet layers hold another block.
_NO_JET = JetBlockConfig(num_heads=1, head_dim=1, expand_v=1.0, dconv_generator_reduction=1)


class BlockMixer(TokenMixer):
    """A block that is called as a JetBlock is, as the token mixer of a layer; it has no line in a config."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    @classmethod
    def sizes(cls, config: JetNemotronConfig) -> dict[str, object]:
        """None: the config does not know the block."""
        return {}

    def initial_state(  # type: ignore[override]  # of this block: a model with it asks the layer, not its class
        self,
        config: JetNemotronConfig,
        batch_size: int,
        max_length: int,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """The block's own."""
        return cast(Any, self.block).new_state(batch_size)

    def reset_parameters(self) -> None:
        """Does nothing: the block has its values."""

    def forward(
        self, hidden_states: Tensor, *, layout: TokenLayout, rotary: Rotary | None = None, state: State | None = None
    ) -> Tensor:
        """See `TokenMixer.forward`."""
        if state is None and layout.cu_seqlens is None:  # enough for training and features
            return self.block(hidden_states)
        return self.block(hidden_states, cu_seqlens=layout.cu_seqlens, state=state)


class SuperNetwork(nn.Module):
    """Every placement of a base at once (arXiv 2508.15884, section on full-attention placement).

        h += path_i(RMSNorm(h));  h += MLP(RMSNorm(h))
        path_i in {the layer's attention, the same over a window, its JetBlock}

    Embeddings, MLPs, norms and head are the base's own tensors and do not change; `jet[i]` are the parameters, and with
    `train_attention` those of `attention[i]`, which starts as a copy of the base's. A windowed path has no parameters
    of its own: it is the attention, cut to the window.

    Args:
        base: full attention in every layer; its parameters stop requiring gradients.
        jet: sizes of the JetBlock paths; or hidden size -> another block for each layer, which is called as a JetBlock
            is (such a network can be trained and measured, but not exported).
        window_size: of the windowed paths, tokens, the current one included.
        seed: of the initial values (`blocks.fair_start_`; `warm_start_` gives JetBlocks others).
        recompute_layers: keep only the layers' inputs for the backward pass and compute the rest twice.
        train_attention: train a copy of each layer's attention, as the paper's figure 4 has it; else the attention is
            the base's own and does not change.
        teacher: of this base; networks that share one share what it computes. None: one of its own.
    """

    def __init__(
        self,
        base: JetNemotronForCausalLM,
        jet: JetBlockConfig | Callable[[int], nn.Module],
        window_size: int = 64,
        seed: int = 0,
        recompute_layers: bool = False,
        train_attention: bool = False,
        teacher: Teacher | None = None,
    ):
        super().__init__()
        check_base(base.config)
        if window_size < 1:
            raise ValueError(f"window_size must be at least 1, got {window_size}")
        self.teacher = teacher or Teacher(base)
        if self.teacher.base is not base:
            raise ValueError("teacher must be that of the base, got one of another model")
        self.base = base
        self.jet_config = jet if isinstance(jet, JetBlockConfig) else None
        self.window_size = window_size
        self.recompute_layers = recompute_layers
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=seeded("jet paths", seed))))
            if isinstance(jet, JetBlockConfig):
                config = self.config(("jet",) * self.num_layers)
                blocks: list[nn.Module] = [JetMixer(config) for _ in range(self.num_layers)]
            else:
                blocks = [jet(base.config.hidden_size) for _ in range(self.num_layers)]
            for block, layer in zip(blocks, base.model.layers, strict=True):
                if isinstance(block, (LinearBlock, JetBlock)):
                    scale: Tensor = cast(Any, layer).input_layernorm.weight
                    # A norm without weight lets nothing through, and nothing is the same at any scale.
                    fair_start_(block, scale.float().square().mean().sqrt().item() or 1.0)
        self.jet = nn.ModuleList(blocks).to(device=base.device, dtype=base.dtype)
        own = [copy.deepcopy(layer.self_attn) for layer in base.model.layers] if train_attention else []
        self.attention = nn.ModuleList(cast(list[nn.Module], own)).requires_grad_(True)

    @property
    def num_layers(self) -> int:
        """Layers of the base, and so of every placement."""
        return self.base.config.num_hidden_layers

    def warm_start_(self, input_ids: Tensor) -> None:
        """Lets each JetBlock begin from the attention beside it (`warm_start.warm_start_`).

        Args:
            input_ids: token ids [B, T] of text as the base knows it; B*T at least the hidden size.

        Raises:
            ValueError: the linear paths are no JetBlocks; or see there.
        """
        if self.jet_config is None:
            raise ValueError(f"a warm start must be that of JetBlocks, got {self.path_name}")
        for block, layer, call in zip(self.jet, self.base.model.layers, self.teacher.attention(input_ids), strict=True):
            attention = cast(Attention, layer.self_attn)
            warm_start_(cast(JetMixer, block), attention, call.input.float(), call.output.float())

    @property
    def path_name(self) -> str:
        """What the linear paths are."""
        return "JetBlock" if self.jet_config is not None else type(self.jet[0]).__name__

    @property
    def state_elements(self) -> int:
        """Elements of recurrent state of one path and sequence: H*K*V."""
        if self.jet_config is not None:
            return self.jet_config.num_heads * self.jet_config.head_dim * self.jet_config.head_v_dim
        return cast(Any, self.jet[0]).new_state(1)[0].numel()

    def check(self, placement: Sequence[str]) -> Placement:
        """The placement as a tuple; ValueError unless it names a path for each layer."""
        wrong = [kind for kind in placement if kind not in PATHS]
        if len(placement) != self.num_layers or wrong:
            raise ValueError(
                f"placement must name one of {', '.join(PATHS)} for {self.num_layers} layers, got {list(placement)}"
            )
        return tuple(placement)

    def check_distilled(self, placement: Sequence[str]) -> Placement:
        """`check`, for a placement that is trained; ValueError too where no layer has a linear path."""
        placement = self.check(placement)
        if "jet" not in placement:
            raise ValueError(f"placement must have a jet layer to be distilled, got {' '.join(placement)}")
        return placement

    def config(self, placement: Sequence[str]) -> JetNemotronConfig:
        """The configuration of the model that a placement makes."""
        placement = self.check(placement)
        values = self.base.config.to_dict() | {
            "layer_types": list(placement),
            "efficient_attention_config": {
                "jet": (self.jet_config or _NO_JET).to_dict(),
                "swa": {"window_size": self.window_size},
            },
        }
        return JetNemotronConfig.from_dict(values)

    def mixer(self, i: int, kind: str) -> TokenMixer:
        """The path of layer i."""
        if kind == "jet":
            block = self.jet[i]
            return block if isinstance(block, TokenMixer) else BlockMixer(block)
        attention = cast(Attention, self.attention[i] if self.attention else self.base.model.layers[i].self_attn)
        if kind == "swa":
            # Shares every tensor, and differs in the window only.
            windowed = SlidingWindowAttention.__new__(SlidingWindowAttention)
            windowed.__dict__ = attention.__dict__ | {"window": self.window_size}
            return windowed
        return attention

    def path_parameters(self, placement: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
        """What is trained, by name: in the paths of a placement, or in all of them."""
        everything = [("jet", "attn")] * self.num_layers
        used = everything if placement is None else [(kind,) for kind in self.check(placement)]
        found: dict[str, nn.Parameter] = {}
        for i, kinds in enumerate(used):
            if "jet" in kinds:
                found |= {f"{i}.{name}": p for name, p in self.jet[i].named_parameters()}
            if self.attention and set(kinds) - {"jet"}:
                found |= {f"attention.{i}.{name}": p for name, p in self.attention[i].named_parameters()}
        return found

    def assemble(self, placement: Sequence[str]) -> JetNemotronForCausalLM:
        """The model that a placement makes, of the network's own tensors: for training and measuring."""
        placement = self.check(placement)
        mixers = [self.mixer(i, kind) for i, kind in enumerate(placement)]
        model = self.base.with_mixers(self.config(placement), mixers)
        model.model.recompute_layers = self.recompute_layers
        return model

    def forward(self, input_ids: Tensor, placement: Sequence[str] | None) -> Tensor:
        """Token ids [B, T] -> logits [B, T, vocab] of the model that the placement makes; None: of the base."""
        model = self.base if placement is None else self.assemble(placement)
        with self.teacher.computing():
            return self.base.head(model.model(input_ids, dense_layout(input_ids)))

    def random_placement(self, generator: torch.Generator) -> Placement:
        """Each layer independently its attention or its linear path, even odds; never attention everywhere."""
        while True:
            jet = torch.randint(2, (self.num_layers,), generator=generator)
            if jet.any():
                return tuple("jet" if flag else "attn" for flag in jet.tolist())

    def distillation_loss(self, input_ids: Tensor, placement: Sequence[str]) -> Tensor:
        """Feature distillation: how far each layer's path is from the base's attention there (`feature_loss`).

        The path is given the stream that the layers in front of it left, the base's attention the base's own. Unless
        attention is trained, layers in front of the first linear path have nothing to learn and are not in the average.

        Args:
            input_ids: token ids [B, T].
            placement: a path for each layer.

        Returns: a scalar.

        Raises:
            ValueError: no layer has a linear path.
        """
        placement = self.check_distilled(placement)
        wanted = self.teacher.attention(input_ids)
        model = self.assemble(placement)
        with self.teacher.computing(), watched(model) as got:
            model.model(input_ids, dense_layout(input_ids))
        first = 0 if self.attention else placement.index("jet")
        losses = [feature_loss(g.output, w.output) for g, w in zip(got[first:], wanted[first:], strict=True)]
        return torch.stack(losses).mean()

    def layer_losses(self, input_ids: Tensor, placement: Sequence[str] | None = None) -> Iterator[Tensor]:
        """Feature distillation layer by layer: each path is given the base's own input of its layer (`feature_loss`).

        No gradient goes through an MLP, no path depends on another, and all are trained by one forward of the base.
        Full attention is left out: on the base's input it starts as the base's output.

        Args:
            input_ids: token ids [B, T].
            placement: a path for each layer; None: the linear path of every layer.

        Yields:
            The loss of each layer divided by their number, so that their sum is the mean; to be given its gradients
            before the next is computed.
        """
        kinds = ("jet",) * self.num_layers if placement is None else self.check(placement)
        trained = [i for i, kind in enumerate(kinds) if kind == "jet" or (kind == "swa" and self.attention)]
        calls = self.teacher.attention(input_ids)
        for i in trained:
            with self.teacher.computing():
                got = self.mixer(i, kinds[i])(calls[i].input, **calls[i].told)
            yield feature_loss(got, calls[i].output) / len(trained)

    def extract(self, placement: Sequence[str]) -> JetNemotronForCausalLM:
        """The model that a placement makes, with copies of the weights: what `save_pretrained` exports."""
        placement = self.check(placement)
        if self.jet_config is None and "jet" in placement:
            raise ValueError(
                "placement must have no jet layer to be exported: the paths of this network are no JetBlocks"
            )
        assembled = self.assemble(placement)
        model = JetNemotronForCausalLM.empty(assembled.config, device=self.base.device, dtype=self.base.dtype)
        model.load_state_dict(assembled.state_dict())
        model.companions = self.base.companions
        return model.eval()
