"""Evaluation of a synthetic image set against a real one: fidelity, groups, alignment, nearest neighbours, report.

Everything here reads images and attribute tables only; no generator is needed. Statistics are NumPy float64.
"""
