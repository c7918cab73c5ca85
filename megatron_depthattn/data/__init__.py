"""Data: documents to shards of samples (`prepare.py`), order (`order.py`, `mixture.py`), reading (`corpus.py`)."""
