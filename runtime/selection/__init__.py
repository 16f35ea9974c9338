"""Which tokens a pruned step computes: clusters, scores, stale tokens (algorithm 2), and the policies beside it."""
