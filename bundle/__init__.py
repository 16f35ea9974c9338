"""A bundle, the directory that `cat-export` writes: its manifest, its profiles, and how it is written and checked."""
