"""Diffusion as pure functions on arrays: noise schedule, training objective, guidance and samplers."""
