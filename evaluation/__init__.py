"""Does pruning keep the picture? Policies, metrics, baselines and the report; `cat-eval` is its command."""
