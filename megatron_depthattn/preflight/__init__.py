"""Before any model is built: what every rank says of itself, and whether they agree."""
