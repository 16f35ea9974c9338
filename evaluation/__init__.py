"""Does pruning keep the picture? Methods, metrics and the report; `cat-eval` is its command."""
