"""Data: documents to shards of samples (`prepare.py`), order (`order.py`), reading (`corpus.py`)."""
