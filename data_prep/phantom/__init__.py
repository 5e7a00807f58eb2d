"""A procedural chest phantom: images, clinical texts and exact ground truth without any download."""

from data_prep.phantom.population import FACTORS, FINDINGS, SCHEMA, PhantomImages, example, rows

__all__ = ["FACTORS", "FINDINGS", "SCHEMA", "PhantomImages", "example", "rows"]
