"""What `metis bench` measures: ratios of two ways to do the same thing, in one run."""
