"""`cat-serve`: bundles behind OpenAI's images API, on one machine."""
