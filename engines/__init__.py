"""Profiles, engine builds and the bundle on disk."""
