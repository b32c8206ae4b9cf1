"""The domain classifier: an MLP on pooled features, an MLP at every position, or convolutions over neighborhoods.

Letters: N images, C channels, H x W positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

SOURCE, TARGET = 0, 1  # domain labels
Kind = Literal["pooled", "pixel", "patch"]


class Pointwise(nn.Conv2d):
    """A 1 x 1 convolution that runs as a linear layer on maps of one position.

    On a CPU, the convolution takes three to four times as long there, mostly to reorder the weights.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, features: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if features.shape[2:] != (1, 1):
            return super().forward(features)
        return functional.linear(features.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None]


class DomainClassifier(nn.Module):
    """Computes logits of D classes from features (N, C, H, W); D is `domains`, usually 2 (0 source, 1 target).

    Kinds: `pooled` (default), global average pooling and an MLP with two hidden layers, logits (N, D); `pixel`, the same MLP as
    1 x 1 convolutions, logits (N, D, H, W); `patch`, strided convolutions that see shapes (like the discriminator of Tsai et
    al. 2018, section 3.2), logits (N, D, H/4, W/4). `on_logits`: the features are class logits, so use their softmax.
    `valid` (N, h, w), 1 where a pixel counts, excludes pixels from the pooling or the loss.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_size: int = 1024,
        kind: Kind = "pooled",
        on_logits: bool = False,
        domains: int = 2,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.kind = kind
        self.on_logits = on_logits
        if kind == "patch":
            self.layers = nn.Sequential(
                nn.Conv2d(in_channels, hidden_size, 4, stride=2, padding=1),
                nn.LeakyReLU(0.2, inplace=True),
                nn.Conv2d(hidden_size, hidden_size, 4, stride=2, padding=1),
                nn.LeakyReLU(0.2, inplace=True),
                nn.Conv2d(hidden_size, hidden_size, 3, padding=1),
                nn.LeakyReLU(0.2, inplace=True),
                nn.Conv2d(hidden_size, domains, 1),
            )
            return
        # the same module for both kinds: a pooled map has one position
        self.layers = nn.Sequential(
            Pointwise(in_channels, hidden_size),
            nn.ReLU(inplace=True),
            Pointwise(hidden_size, hidden_size),
            nn.ReLU(inplace=True),
            Pointwise(hidden_size, domains),
        )

    def forward(self, features: Tensor, valid: Tensor | None = None) -> Tensor:
        if features.ndim == 2:  # already pooled
            features = features[:, :, None, None]
        if self.on_logits:
            features = features.softmax(1)
        if self.kind == "pooled":
            return self.layers(masked_mean(features, valid)).flatten(1)
        if self.kind == "patch":  # pad maps smaller than the kernels by repeating the edge
            missing = [max(4 - side, 0) for side in features.shape[2:]]
            if any(missing):
                features = functional.pad(features, (0, missing[1], 0, missing[0]), mode="replicate")
        return self.layers(features)

    def logits_of(self, batches: Sequence[tuple[Tensor, Tensor | None]]) -> Sequence[Tensor]:
        """Return the logits of each batch of (features, valid). Pooled features of all batches pass the layers together."""
        if self.kind != "pooled" or self.on_logits:
            return [self(features, valid) for features, valid in batches]
        pooled = [masked_mean(features, valid) for features, valid in batches]
        return self.layers(torch.cat(pooled)).flatten(1).split([len(features) for features in pooled])

    def domain_loss(self, features: Tensor, domain: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return mean cross-entropy and accuracy (0..1) on features that all come from `domain`."""
        return self.loss_of(self(features, valid), domain, valid)

    def loss_of(self, logits: Tensor, domain: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return `domain_loss` from logits."""
        labels = torch.full(logits.shape[:1] + logits.shape[2:], domain, device=logits.device)
        losses = functional.cross_entropy(logits.float(), labels, reduction="none")
        right = (logits.argmax(1) == labels).float().detach()
        if valid is None:
            return losses.mean(), right.mean()
        weights = self._weights(valid, logits)
        total = weights.sum().clamp_min(1e-6)
        return (losses * weights).sum() / total, (right * weights).sum() / total

    def sums_by_domain(self, logits: Tensor, domains: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return (3, D): the sum of cross-entropies, the number of correct decisions, and that of all decisions, per domain and
        weighted by valid share. `domains` (N,): the label of each image's domain."""
        labels = domains.view(-1, *[1] * (logits.ndim - 2)).expand(logits.shape[:1] + logits.shape[2:])
        losses = functional.cross_entropy(logits.float(), labels, reduction="none")
        right = (logits.argmax(1) == labels).float().detach()
        weights = torch.ones_like(losses) if valid is None else self._weights(valid, logits)
        of_images = torch.stack([losses * weights, right * weights, weights]).reshape(3, len(logits), -1).sum(2)
        return of_images.new_zeros(3, logits.shape[1]).index_add(1, domains, of_images)

    def hits(self, features: Tensor, domain: int, valid: Tensor | None = None) -> Tensor:
        """Return (2,): the number of correct decisions on features of `domain` and of all decisions, weighted by valid share.

        These are sums, so that the accuracy of a whole set can be computed from its batches.
        """
        logits = self(features, valid)
        right = (logits.argmax(1) == domain).double()
        weights = torch.ones_like(right) if valid is None else self._weights(valid, logits).double()
        return torch.stack([(right * weights).sum(), weights.sum()])

    def _weights(self, valid: Tensor, logits: Tensor) -> Tensor:
        # pooled: an image without any valid pixel has no features
        return (valid > 0).any(2).any(1).float() if self.kind == "pooled" else resize_valid(valid, logits)


def masked_mean(features: Tensor, valid: Tensor | None) -> Tensor:
    """Return the mean over positions (N, C, 1, 1), weighted by the valid share per position if `valid` (N, h, w) is set."""
    if valid is None:
        return features.mean((2, 3), keepdim=True)
    weights = resize_valid(valid, features)[:, None]
    return (features * weights).sum((2, 3), keepdim=True) / weights.sum((2, 3), keepdim=True).clamp_min(1e-6)


def resize_valid(valid: Tensor, like: Tensor) -> Tensor:
    """Return the share of valid pixels (N, H, W), 0..1, per position of the map `like` (N, C, H, W), from `valid` (N, h, w)."""
    size = (like.shape[2], like.shape[3])
    return functional.adaptive_avg_pool2d(valid[:, None].to(like.dtype), size)[:, 0]
