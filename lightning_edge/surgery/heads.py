"""Heads of attention modules as units that can be removed."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_edge.surgery.slicing import Side


class NarrowAttention(nn.MultiheadAttention):
    """A multi-head attention with fewer heads than its width asks for: the same parameters, with fewer rows.

    ``torch.nn.MultiheadAttention`` insists on heads x head width = embedding width. :func:`narrow_` turns one into this
    class in place, so that names, types and callers stay as they are.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments, shapes and results are those of ``torch.nn.MultiheadAttention``."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = (tensor.unsqueeze(0) for tensor in (query, key, value))
        elif not self.batch_first:
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        assert self.in_proj_weight is not None
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(tensor, weight, bias).view(*tensor.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)
            for tensor, weight, bias in zip((query, key, value), self.in_proj_weight.chunk(3), biases, strict=True)
        )
        mask = self._mask(q, k, key_padding_mask, attn_mask, is_causal)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.transpose(-2, -1) / self.head_dim**0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            attended = F.dropout(weights, dropout) @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        output: Tensor = F.linear(attended.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        output = output.transpose(0, 1) if batched and not self.batch_first else output
        output = output if batched else output.squeeze(0)
        if not need_weights:
            return output, None
        weights = weights.mean(1) if average_attn_weights else weights
        return output, weights if batched else weights.squeeze(0)

    def _mask(
        self, q: Tensor, k: Tensor, padding: Tensor | None, mask: Tensor | None, is_causal: bool
    ) -> Tensor | None:
        """Return one additive mask that broadcasts to (batch, heads, queries, keys), or None."""
        if is_causal and mask is None:
            raise ValueError("attn_mask must be given with is_causal=True, which is only a hint, got None")
        total: Tensor | None = None
        if mask is not None:
            if mask.dim() == 3:
                mask = mask.view(len(q), -1, *mask.shape[1:])
                if mask.shape[1] != self.num_heads:
                    raise ValueError(
                        f"attn_mask must have a mask for each of the {self.num_heads} heads that are left, got"
                        f" {mask.shape[1]}: give one of shape (queries, keys) for all heads"
                    )
            total = _additive(mask, q.dtype)
        if padding is not None:
            padding = _additive(padding.view(len(q), 1, 1, k.shape[2]), q.dtype)
            total = padding if total is None else total + padding
        return total


def narrow_(attention: nn.Module, heads: int) -> None:
    """Set how many heads an attention module has, after its projections were cut.

    >>> attention = nn.MultiheadAttention(8, 4)
    >>> narrow_(attention, 4); type(attention).__name__
    'MultiheadAttention'
    """
    if isinstance(attention, nn.MultiheadAttention) and heads < attention.num_heads:
        attention.__class__ = NarrowAttention
        attention._qkv_same_embed_dim = False  # keeps an encoder layer from its fused path, which reads the weights
    attention.num_heads = heads  # type: ignore[assignment]  # to mypy a module's attributes are tensors and modules


def head_groups(network: nn.Module) -> Iterator[tuple[str, str, dict[Side, Tensor]]]:
    """Yield the heads of each attention module that may be one: its name, its first layer, and the members.

    Known are ``torch.nn.MultiheadAttention``, and modules with a number ``num_heads`` whose linear children are a fused
    projection to queries, keys and values (or the three), and the output projection, last.
    """
    for name, module in network.named_modules():
        heads = getattr(module, "num_heads", None)
        if not isinstance(heads, int) or heads < 2:
            continue
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.MultiheadAttention):
            if module.in_proj_weight is not None and module.bias_k is None and not module.add_zero_attn:
                fused = Side(name, "out")
                yield (
                    name,
                    name,
                    _members(heads, [(fused, module.in_proj_weight.shape[0] // 3, 3)], f"{prefix}out_proj"),
                )
            continue
        linears = [(f"{prefix}{key}", child) for key, child in module.named_children() if isinstance(child, nn.Linear)]
        if len(linears) < 2:
            continue
        *projections, (last, output) = linears
        inner = output.in_features
        inputs: list[tuple[Side, int, int]] = [
            (Side(path, "out"), inner, layer.out_features // inner) for path, layer in projections
        ]
        fits = all(layer.out_features in (inner, 3 * inner) for _, layer in projections)
        if fits and sum(blocks for _, _, blocks in inputs) == 3 and inner % heads == 0:
            yield name, projections[0][0], _members(heads, inputs, last)


def _members(heads: int, projections: Sequence[tuple[Side, int, int]], output: str) -> dict[Side, Tensor]:
    """Return the rows of each head in each projection, and its columns in the output projection."""
    members = {}
    for side, inner, blocks in projections:
        rows = torch.arange(blocks * inner).view(blocks, heads, inner // heads)
        members[side] = rows.transpose(0, 1).flatten(1)
    inner = projections[0][1]
    members[Side(output, "in")] = torch.arange(inner).view(heads, -1)
    return members


def _additive(mask: Tensor, dtype: torch.dtype) -> Any:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, float("-inf"))
