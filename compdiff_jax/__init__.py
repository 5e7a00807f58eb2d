"""CompDiff in JAX: hierarchical compositional diffusion for fair medical image generation."""

__version__ = "0.1.0"
