"""Classifiers of visible tokens: the bridging classifier (Eq. 2), linear and MLP baselines."""

from __future__ import annotations

from math import prod

import torch
from jaxtyping import Float, Int
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from mar import plugins
from mar.config.model_settings import ClassifierConfig
from mar.config.schema import TrainingConfig
from mar.model.layers import LayerNorm, attention, initialise, transformer_blocks
from mar.model.positions import sin_cos_positions


def build_classifier(settings: TrainingConfig) -> nn.Module:
    """Return the classifier that ``classifier.kind`` names.

    Each maps the visible tokens and their flat indices to class scores.

    Raises:
        UserError: the code of a package's classifier fails.
    """
    config = settings.classifier
    width = settings.encoder.dimensions[0]
    num_classes = settings.data.num_classes
    if config.kind == "bridging":
        return BridgingClassifier(config, width, prod(settings.grid), num_classes)
    if config.kind == "mlp":
        return MLPClassifier(config, width, num_classes)
    if config.kind == "attentive":
        return AttentiveClassifier(config, width, num_classes)
    if config.kind == "linear":
        return LinearClassifier(config, width, num_classes)
    factory: plugins.ClassifierFactory = plugins.load(plugins.CLASSIFIERS, config.kind)
    options = plugins.options(plugins.CLASSIFIERS, config.kind, config.options)
    with plugins.package_errors(plugins.CLASSIFIERS, config.kind):
        return factory.build(options, width, settings.grid, num_classes)


class BridgingClassifier(nn.Module):
    """The bridging classifier, p = φ(h(F_v)) (Eq. 2).

    Transformer blocks h over the visible tokens F_v, then their average φ, a norm and a linear
    layer.
    """

    positions: Tensor

    def __init__(
        self, config: ClassifierConfig, encoder_width: int, num_tokens: int, num_classes: int
    ) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.project = nn.Linear(encoder_width, config.width, bias=False)
        # Not persistent: the table follows from its shape alone.
        self.register_buffer(
            "positions", sin_cos_positions(num_tokens, config.width), persistent=False
        )
        self.add_positions = config.positions
        if config.mask_tokens:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, config.width))
        else:
            self.mask_token = None
        self.blocks = transformer_blocks(config.width, config.depth, config.heads)
        self.norm = LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.width, num_classes)
        # The projection keeps PyTorch's own initialisation, as in the release.
        for part in (self.blocks, self.head):
            initialise(part)

    def forward(
        self, tokens: Float[Tensor, "B K D"], visible: Int[Tensor, "B K"]
    ) -> Float[Tensor, "B classes"]:
        """Return the class scores of each clip."""
        # Eq. 2: h is the projection and the blocks, φ the mean over tokens. As in the release, the
        # norm comes after the mean.
        bridged = self.blocks(self._input(self.project(tokens), visible))
        return self.head(self.dropout(self.norm(bridged.mean(dim=1))))

    def _input(
        self, tokens: Float[Tensor, "B K W"], visible: Int[Tensor, "B K"]
    ) -> Float[Tensor, "B N W"]:
        """Return the input of the blocks, with the options of Table VII.

        The options are: a learned token at each hidden index, so N tokens instead of the K visible
        ones; and positions.
        """
        indices = visible
        if self.mask_token is not None:
            # Not len(tokens): torch.export would make it a constant, and the exported model would
            # take no other batch size.
            num_clips = tokens.shape[0]
            # The mask token fills all N indices; then the visible tokens overwrite theirs.
            indices = torch.arange(self.num_tokens, device=tokens.device).expand(num_clips, -1)
            everywhere = self.mask_token.to(tokens.dtype).expand(num_clips, self.num_tokens, -1)
            tokens = everywhere.scatter(1, visible[..., None].expand_as(tokens), tokens)
        if self.add_positions:
            return tokens + self.positions[indices]
        return tokens


class AttentiveClassifier(nn.Module):
    """A learned query that attends to the tokens, after blocks among these (Bardes et al., 2024).

    The probe of V-JEPA and V-JEPA 2, at the width of ``classifier.width``: ``classifier.depth``
    counts the query's block too, so at 1 there is no other.
    """

    def __init__(self, config: ClassifierConfig, encoder_width: int, num_classes: int) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.project = nn.Linear(encoder_width, width, bias=False)
        self.blocks = transformer_blocks(width, config.depth - 1, config.heads)
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        self.norm_tokens = LayerNorm(width)
        self.to_query = nn.Linear(width, width)
        self.to_keys_and_values = nn.Linear(width, 2 * width)
        self.attended = nn.Linear(width, width)
        self.norm_query = LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)
        self.norm = LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(width, num_classes)
        initialise(self)
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(
        self, tokens: Float[Tensor, "B K D"], visible: Int[Tensor, "B K"]
    ) -> Float[Tensor, "B classes"]:
        """Return the class scores of each clip."""
        x = self.norm_tokens(self.blocks(self.project(tokens)))
        # Not len(tokens): torch.export would make it a constant.
        query = self.query.to(x.dtype).expand(tokens.shape[0], -1, -1)
        keys, values = (
            self.to_keys_and_values(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        queries = self.to_query(query).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        query = query + self.attended(attention(queries, keys, values).transpose(1, 2).flatten(2))
        query = query + self.mlp(self.norm_query(query))
        return self.head(self.dropout(self.norm(query[:, 0])))


class LinearClassifier(nn.Module):
    """The linear baseline of Table V: average, dropout, one linear layer."""

    def __init__(self, config: ClassifierConfig, encoder_width: int, num_classes: int) -> None:
        super().__init__()
        # "pooled" is VideoMAE's: the norm is on the average, and the encoder has no last norm.
        if config.norm == "pooled":
            self.norm = LayerNorm(encoder_width)
        else:
            self.norm = nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(encoder_width, num_classes)
        # VideoMAE's start: a truncated normal of deviation 0.02, scaled by 0.001.
        nn.init.trunc_normal_(self.head.weight, std=0.02 * 0.001)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, tokens: Float[Tensor, "B K D"], visible: Int[Tensor, "B K"]
    ) -> Float[Tensor, "B classes"]:
        """Return the class scores of each clip."""
        return self.head(self.dropout(self.norm(tokens.mean(dim=1))))


class MLPClassifier(nn.Module):
    """The MLP of Table VI: one token-wise layer, the average, then layers on one vector.

    The paper does not describe it. Only this layout costs the paper's 80.15 GFLOPs: with a second
    token-wise layer it would be 80.36.
    """

    def __init__(self, config: ClassifierConfig, encoder_width: int, num_classes: int) -> None:
        super().__init__()
        self.project = nn.Linear(encoder_width, config.width)
        # config.depth counts the linear layers: the first, the last, and those made here.
        hidden = [
            nn.Sequential(nn.GELU(), nn.Linear(config.width, config.width))
            for _ in range(config.depth - 2)
        ]
        self.hidden = nn.Sequential(*hidden, nn.GELU())
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.width, num_classes)
        initialise(self)

    def forward(
        self, tokens: Float[Tensor, "B K D"], visible: Int[Tensor, "B K"]
    ) -> Float[Tensor, "B classes"]:
        """Return the class scores of each clip."""
        return self.head(self.dropout(self.hidden(self.project(tokens).mean(dim=1))))
