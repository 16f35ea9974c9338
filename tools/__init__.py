"""The command-line tools around the runtime: `cat-generate` and `cat-doctor`, and the pictures they draw."""
