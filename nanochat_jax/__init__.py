"""nanochat-jax: from raw text to a ChatGPT-like model of your own, in JAX."""

__version__ = "0.1.0"
