"""Sampling from a trained run: plans, the jitted sampler, resumable jobs and galleries."""
