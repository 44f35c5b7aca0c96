"""What the code of each kernel depends on; neither torch nor the DSL is needed to choose it."""
