"""The original's behaviour in PyTorch + DeepSpeed, for parity tests. Never imports jax or jaxprefix."""
