"""Plain PyTorch: the specification of every op, the fallback, and the baseline of every benchmark."""
