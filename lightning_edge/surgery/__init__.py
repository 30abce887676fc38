"""Acts on an ``nn.Module``: functions that end in ``_`` edit it in place and return a small frozen report."""
