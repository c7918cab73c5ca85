"""Scale studies: a ladder of runs, from its plan to its report."""
