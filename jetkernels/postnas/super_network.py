"""The once-for-all super network: each layer of a frozen base with a trained linear-attention path beside its
attention.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from jetkernels.model import JetNemotronConfig, JetNemotronForCausalLM
from jetkernels.model.attention import rotary_table
from jetkernels.model.config import LAYER_TYPES
from jetkernels.model.layout import TokenLayout
from jetkernels.modules import JetBlock, JetBlockConfig

from .base import check_base
from .data import seeded

# One of LAYER_TYPES per layer.
Placement = tuple[str, ...]
# Stands in a config whose jet layers hold another block.
_NO_JET = JetBlockConfig(num_heads=1, head_dim=1, expand_v=1.0, dconv_generator_reduction=1)


class SuperNetwork(nn.Module):
    """Every placement of a base at once (arXiv 2508.15884, section on full-attention placement).

        h += path_i(RMSNorm(h));  h += MLP(RMSNorm(h)),    path_i in {the layer's attention, the same over a window, its
        JetBlock}

    Embeddings, MLPs, norms, head and attention are the base's own tensors and do not change; `jet[i]` are the
    parameters.
    A windowed path has no parameters of its own: it is the attention, cut to the window.

    Args:
        base: full attention in every layer; its parameters stop requiring gradients.
        jet: sizes of the JetBlock paths; or hidden size -> another block for each layer, which is called as a JetBlock
            is (such a network can be trained and measured, but not exported).  window_size: of the windowed paths,
            tokens, the current one included.
        seed: of the JetBlocks' initial values.
        recompute_layers: keep only the layers' inputs for the backward pass and compute the rest twice.
    """

    def __init__(
        self,
        base: JetNemotronForCausalLM,
        jet: JetBlockConfig | Callable[[int], nn.Module],
        window_size: int = 64,
        seed: int = 0,
        recompute_layers: bool = False,
    ):
        super().__init__()
        check_base(base.config)
        if window_size < 1:
            raise ValueError(f"window_size must be at least 1, got {window_size}")
        self.base = base.requires_grad_(False)
        self.jet_config = jet if isinstance(jet, JetBlockConfig) else None
        self.window_size = window_size
        self.recompute_layers = recompute_layers
        config = base.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=seeded("jet paths", seed))))
            if isinstance(jet, JetBlockConfig):
                blocks = [JetBlock(config.hidden_size, jet, config.initializer_range) for _ in config.layer_types]
            else:
                blocks = [jet(config.hidden_size) for _ in config.layer_types]
        self.jet = nn.ModuleList(blocks).to(device=base.device, dtype=base.dtype)

    @property
    def num_layers(self) -> int:
        return len(self.jet)

    @property
    def state_elements(self) -> int:
        """Elements of recurrent state of one path and sequence: H*K*V."""
        if self.jet_config is not None:
            return self.jet_config.num_heads * self.jet_config.head_dim * self.jet_config.head_v_dim
        return self.jet[0].new_state(1)[0].numel()

    def check(self, placement: Sequence[str]) -> Placement:
        """The placement as a tuple; ValueError unless it names a path for each layer."""
        wrong = [kind for kind in placement if kind not in LAYER_TYPES]
        if len(placement) != self.num_layers or wrong:
            raise ValueError(
                f"placement must name one of {', '.join(LAYER_TYPES)} for {self.num_layers} layers, got {list(placement)}"
            )
        return tuple(placement)

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

    def mixer(self, i: int, kind: str) -> nn.Module:
        """The path of layer i."""
        if kind == "jet":
            return self.jet[i]
        attention = self.base.model.layers[i].self_attn
        if kind == "swa":
            # A shallow copy shares every tensor and differs in the window only.
            attention = copy.copy(attention)
            attention.window = self.window_size
        return attention

    def _layer(self, i: int, kind: str, h: Tensor, rotary: tuple[Tensor, Tensor], layout: TokenLayout) -> Tensor:
        layer, mixer = self.base.model.layers[i], self.mixer(i, kind)
        x = layer.input_layernorm(h)
        h = h + (mixer(x) if kind == "jet" else mixer(x, rotary, layout))
        return h + layer.mlp(layer.post_attention_layernorm(h))

    def features(self, input_ids: Tensor, placement: Sequence[str]) -> list[Tensor]:
        """Token ids [B, T] -> the residual stream behind each layer, then behind the final norm: L + 1 tensors [B, T,
        C].
        """
        placement = self.check(placement)
        model = self.base.model
        B, T = input_ids.shape
        layout = TokenLayout.dense(B, T, [0] * B, None, input_ids.device)
        rotary = rotary_table(layout.positions, self.base.config.head_dim, self.base.config.rope_theta)
        h = model.embed_tokens(input_ids)
        found = []
        for i, kind in enumerate(placement):
            if self.recompute_layers and torch.is_grad_enabled():
                h = recompute(self._layer, i, kind, h, rotary, layout, use_reentrant=False)
            else:
                h = self._layer(i, kind, h, rotary, layout)
            found.append(h)
        return [*found, model.norm(h)]

    def forward(self, input_ids: Tensor, placement: Sequence[str]) -> Tensor:
        """Token ids [B, T] -> logits [B, T, vocab] of the model that the placement makes."""
        return self.base.head(self.features(input_ids, placement)[-1])

    def random_placement(self, generator: torch.Generator) -> Placement:
        """Each layer independently its attention or its JetBlock, even odds; never attention everywhere, which trains
        nothing.
        """
        while True:
            jet = torch.randint(2, (self.num_layers,), generator=generator)
            if jet.any():
                return tuple("jet" if flag else "attn" for flag in jet.tolist())

    def distillation_loss(self, input_ids: Tensor, placement: Sequence[str]) -> Tensor:
        """Feature distillation: the mean squared difference to the base's features, averaged over layers and final
        norm.

        Layers in front of the first JetBlock equal the base's and are left out of the average.
        """
        placement = self.check(placement)
        if "jet" not in placement:
            raise ValueError("placement must have a jet layer to be distilled, got attention everywhere")
        with torch.no_grad():
            wanted = self.features(input_ids, ("attn",) * self.num_layers)
        first = placement.index("jet")
        got = self.features(input_ids, placement)
        losses = [F.mse_loss(g.float(), w.float()) for g, w in zip(got[first:], wanted[first:])]
        return torch.stack(losses).mean()

    def extract(self, placement: Sequence[str]) -> JetNemotronForCausalLM:
        """The model that a placement makes, with copies of the weights: what `save_pretrained` exports."""
        placement = self.check(placement)
        if self.jet_config is None and "jet" in placement:
            raise ValueError(
                "placement must have no jet layer to be exported: the paths of this network are no JetBlocks"
            )
        model = JetNemotronForCausalLM.empty(self.config(placement), device=self.base.device, dtype=self.base.dtype)
        state = {k: v for k, v in self.base.state_dict().items()}
        for i, kind in enumerate(placement):
            if kind == "jet":
                prefix = f"model.layers.{i}.self_attn."
                state = {k: v for k, v in state.items() if not k.startswith(prefix)}
                state |= {prefix + k: v for k, v in self.jet[i].state_dict().items()}
        model.load_state_dict(state)
        model.companions = self.base.companions
        return model.eval()
