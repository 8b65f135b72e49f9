"""Shard plans: strategies derived from those of the base, and checked without an accelerator."""

from mindpet.parallel.derive import shard_like
from mindpet.parallel.launcher import dry_run, dry_run_many
from mindpet.parallel.report import Report

__all__ = ["Report", "dry_run", "dry_run_many", "shard_like"]
