"""Hours of use in one piece: what grows, and what breaks though nothing was killed.  ``make soak``."""
