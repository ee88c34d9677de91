"""Whether backends serve: checks, and what follows from them."""
