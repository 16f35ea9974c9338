"""The bundle of `bundle_files`, for every test of this folder."""

from bundle_files import bundle, manifest  # noqa: F401
