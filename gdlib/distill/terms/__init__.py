"""Loss terms, one per file: a pure function with the formula, and a small class that says where its inputs come from."""
