"""Before any model is built: what every rank says of itself, whether they agree, and how fast the links are."""
