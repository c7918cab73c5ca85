"""The same Megatron-Core model under DeepSpeed's ZeRO."""
