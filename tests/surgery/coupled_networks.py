"""Networks whose channels are coupled in every way that is known, with what they are called with."""

import torch
import torch.nn.functional as F
from torch import nn


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.inner = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.shortcut = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16 * 4, 10)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = x + F.relu(self.norm(self.inner(x)))
        x = x + self.shortcut(x)
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


class Concatenation(nn.Module):
    def __init__(self):
        super().__init__()
        self.left = nn.Conv2d(3, 16, 3, padding=1)
        self.right = nn.Conv2d(3, 8, 3, padding=1)
        self.both = nn.Conv2d(24, 16, 1)
        self.dense = nn.Conv2d(16 + 24, 8, 1)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        y = torch.cat([F.relu(self.left(x)), self.right(x)], 1)
        return self.head(self.dense(torch.cat([self.both(y), y], 1)).mean((2, 3)))


class Separable(nn.Module):
    """Depthwise, grouped and transposed convolutions, PReLU."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16, padding=1)
        self.pointwise = nn.Conv2d(16, 32, 1)
        self.grouped = nn.Conv2d(32, 32, 3, groups=4)
        self.mixed = nn.Conv2d(32, 16, 1)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.act = nn.PReLU(8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = F.relu(self.depthwise(F.relu(self.norm(self.first(x)))))
        x = self.mixed(F.hardswish(self.grouped(F.relu(self.pointwise(x)))))
        return self.head(self.act(self.up(x)))


class Attention(nn.Module):
    def __init__(self, dim=32, heads=4, fused=True):
        super().__init__()
        self.num_heads, self.head_dim, self.fused = heads, dim // heads, fused
        if fused:
            self.qkv = nn.Linear(dim, 3 * dim)
        else:
            self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        batch, tokens, _ = x.shape
        joint = self.qkv(x) if self.fused else torch.cat([self.q(x), self.k(x), self.v(x)], -1)
        q, k, v = joint.reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).reshape(batch, tokens, -1))


class Block(nn.Module):
    def __init__(self, fused=True):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(32), Attention(fused=fused)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(x.mean(1))


def encoder(batch_first=True, norm_first=False):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def padding_first():
    return encoder(batch_first=False, norm_first=True)


IMAGES = torch.Size((2, 3, 8, 8))
TOKENS = torch.Size((2, 6, 32))
COUPLED = [
    (Residual, IMAGES),
    (Concatenation, IMAGES),
    (Separable, IMAGES),
    (Block, TOKENS),
    (lambda: Block(fused=False), TOKENS),
    (encoder, TOKENS),
    (padding_first, TOKENS),
]
NAMES = ["residual", "concatenation", "separable", "attention", "three_projections", "encoder", "encoder_norm_first"]


def randomized(network):
    """Weights and statistics that are far from their initial values: a mistake shows."""
    generator = torch.Generator().manual_seed(0)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            draw = torch.rand(value.shape, generator=generator)
            value.copy_(draw + 0.5 if name.endswith("running_var") else draw - 0.4)
    return network
