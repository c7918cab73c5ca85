"""Data: documents to shards of samples (`prepare.py`), their order (`order.py`), reading (`stream.py`)."""
