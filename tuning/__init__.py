"""Schedules fitted to a model: which steps are full, and what the others are made of."""
