"""What a run needs and how long it takes, from its config alone: nothing is built, no GPU is asked."""
