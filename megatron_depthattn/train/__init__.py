"""The training stack over the model: build, step, checkpoint, report, loop."""
