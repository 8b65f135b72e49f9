"""Shard plans: strategies derived from those of the base, and checked without an accelerator."""

from mindpet.parallel.dry_run import dry_run, dry_run_many
from mindpet.parallel.report import Report
from mindpet.parallel.shard_like import shard_like

__all__ = ["Report", "dry_run", "dry_run_many", "shard_like"]
