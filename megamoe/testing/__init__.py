"""Tools for tests and demos: rank pools, inputs, comparisons."""
