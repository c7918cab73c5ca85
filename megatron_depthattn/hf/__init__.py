"""Hugging Face side: the model files that every export ships, and the names of its weights. Never imports Megatron."""
