"""Exchange with PyTorch: key tables and model directories of diffusers, without importing torch."""
