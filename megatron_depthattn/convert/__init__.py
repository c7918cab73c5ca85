"""Checkpoints between Megatron's distributed format and Hugging Face folders, one tensor at a time."""
