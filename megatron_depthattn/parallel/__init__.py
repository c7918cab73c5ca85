"""Process groups, the pipeline payload and the CPU runtime."""
