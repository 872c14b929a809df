"""Plain-torch twins of the ops, with the same names and arguments, and the FP64 oracle. Import from the submodules."""
