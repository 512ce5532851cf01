"""The encoder of a TokenMoE in one process and without DeepSpeed, for comparison with experts exported by route.

Axes: B images, T tokens, S = B x T tokens, D width, E experts, K experts per token.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moce_ds.checkpoint.format import WEIGHTS, Checkpoint
from moce_ds.checkpoint.parameters import is_decoder
from moce_ds.config.families import TOKEN_MOE
from moce_ds.models.build import ModelSpec
from moce_ds.models.mae import make_mlp, sincos_positions
from moce_ds.models.vit import Encoder, check_state, timm_vit


class TokenExperts(nn.Module):
    """The evaluation of DeepSpeed's layer: the K most probable experts of each token, without dropping.

    With K = 1 the output of the expert is multiplied by its probability; with K = 2 by its share of the two.
    """

    def __init__(self, make_expert: Callable[[], nn.Module], width: int, num_experts: int, k: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, num_experts, bias=False)
        self.experts = nn.ModuleList(make_expert() for _ in range(num_experts))
        self.k = k

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x_SD = x_BTD.flatten(0, 1)
        weight_SK, expert_SK = self.gate(x_SD.float()).softmax(dim=1).topk(self.k, dim=1)
        if self.k > 1:
            weight_SK = weight_SK / weight_SK.sum(dim=1, keepdim=True)
        y_SD = torch.zeros_like(x_SD)
        for number, expert in enumerate(self.experts):
            token, place = (expert_SK == number).nonzero(as_tuple=True)
            y_SD.index_add_(0, token, expert(x_SD[token]) * weight_SK[token, place, None].to(x_SD.dtype))
        return y_SD.view_as(x_BTD)


def token_encoder(checkpoint: Checkpoint, device: torch.device) -> Encoder:
    """The encoder of a run with model.arch=token_moe. Raises ArtefactError if its weights do not fit."""
    spec = ModelSpec.from_tree(checkpoint.entry("model"))
    experts, width = spec.experts, spec.shape.width
    assert experts is not None and spec.family is TOKEN_MOE, "the caller has looked"
    model = timm_vit(spec.shape)
    for block in experts.layers:
        model.blocks[block].mlp = TokenExperts(
            lambda: make_mlp(width, spec.shape.mlp_ratio), width, experts.num_experts, experts.k
        )
    weights = {name: tensor for name, tensor in checkpoint.load(WEIGHTS).items() if not is_decoder(name)}
    state = {**weights, "pos_embed": sincos_positions(spec.shape, width)}
    check_state(model, state, str(checkpoint.folder))
    model.load_state_dict(state)
    provenance: dict[str, object] = {"checkpoint": str(checkpoint.folder), "step": checkpoint.step, "gate": "token"}
    return Encoder(model.eval().to(device), spec.shape, spec.input, provenance)
