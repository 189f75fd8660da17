"""CLIP's ModifiedResNet (Radford et al. 2021, section 2.4), with the parameter names of OpenAI's weights."""

import math

import torch
from torch import nn
from torch.nn import functional as F


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return convolution, nn.BatchNorm2d(outputs)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions around a shortcut; where it shrinks, it averages before it convolves."""

    def __init__(self, inputs: int, planes: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv_norm(inputs, planes, 1)
        self.conv2, self.bn2 = conv_norm(planes, planes, 3)
        self.conv3, self.bn3 = conv_norm(planes, 4 * planes, 1)
        self.pool = nn.AvgPool2d(stride)
        self.downsample = None
        if stride > 1 or inputs != 4 * planes:
            self.downsample = nn.Sequential(*conv_norm(inputs, 4 * planes, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        y = self.bn3(self.conv3(self.pool(y)))
        return (y + (self.downsample(self.pool(x)) if self.downsample else x)).relu()


class AttentionPool(nn.Module):
    """One attention layer in place of average pooling: the mean of the grid asks all its places."""

    def __init__(self, grid: int, width: int, heads: int, outputs: int):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.empty(grid**2 + 1, width))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, 1 + G * G, P) of features (B, C, G, G): the pooled one, then each place's value on its own."""
        tokens = self._placed(x)
        values = self.v_proj(tokens)
        query, key, value = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.q_proj(tokens[:, :1]), self.k_proj(tokens), values)
        )
        pooled = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.c_proj(torch.cat([pooled, values[:, 1:]], 1))

    def _placed(self, x):
        """Tokens (B, 1 + G * G, C), the mean first, with the positions interpolated to their grid."""
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1)
        positions, side = self.positional_embedding, math.isqrt(len(self.positional_embedding) - 1)
        if x.shape[2:] != (side, side):
            grid = positions[1:].T.unflatten(1, (side, side))[None]
            grid = F.interpolate(grid, x.shape[2:], mode="bicubic", align_corners=False)
            positions = torch.cat([positions[:1], grid[0].flatten(1).T])
        return tokens + positions


class ModifiedResNet(nn.Module):
    """Three convolutions and a pool (stride 4), stages of bottlenecks, then attention pooling to `outputs` numbers.

    Stage i has blocks[i] bottlenecks, strides[i], and 4 * width * 2**i channels. `stem`: the first kernel and its
    stride are that many times CLIP's.
    """

    def __init__(self, blocks, strides, width: int, grid: int, heads: int, outputs: int, stem: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width // 2, 3 * stem, 2 * stem, padding=stem, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2, self.bn2 = conv_norm(width // 2, width // 2, 3)
        self.conv3, self.bn3 = conv_norm(width // 2, width, 3)
        channels = width
        for i, (count, stride) in enumerate(zip(blocks, strides, strict=True)):
            planes = width * 2**i
            first = Bottleneck(channels, planes, stride)
            channels = 4 * planes
            setattr(
                self,
                f"layer{i + 1}",
                nn.Sequential(first, *(Bottleneck(channels, planes, 1) for _ in range(count - 1))),
            )
        self.attnpool = AttentionPool(grid, channels, heads, outputs)
        self.depth = len(blocks)

    def stages(self, x: torch.Tensor):
        """Yield (B, C_i, G_i, G_i) after each stage; stages run only as far as the caller iterates."""
        for i in (1, 2, 3):
            x = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)).relu()
        x = F.avg_pool2d(x, 2)
        for i in range(1, self.depth + 1):
            x = getattr(self, f"layer{i}")(x)
            yield x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, 1 + G * G, P) of images (B, 3, S, S), as `AttentionPool` gives them."""
        *_, deepest = self.stages(x)
        return self.attnpool(deepest)
