"""From lines of JSON to the arrays of a batch. No jax in here."""
