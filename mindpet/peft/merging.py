"""Sums of the adapters of a PeftModel, and folding them into its network."""

import warnings
from collections.abc import Sequence
from typing import Optional, Union

import numpy as np
from mindspore import nn

from mindpet.errors import AdapterError, CheckpointError, MergeError
from mindpet.files.passport import check_base
from mindpet.peft.checks import check_name, check_names
from mindpet.peft.combine import combine
from mindpet.peft.plan import plan_targets
from mindpet.peft.turns import alone


class MergesAdapters:
    """The part of PeftModel that sums adapters, and folds them into the weights."""

    @alone
    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: Optional[int] = None,
        svd_clamp: Optional[float] = None,
        svd_full_matrices: bool = True,
        svd_driver: Optional[str] = None,
        density: Optional[float] = None,
        majority_sign_method: str = "total",
        seed: Union[int, np.random.Generator, None] = None,
    ) -> None:
        """Add a LoRA adapter that is a sum of others with weights; it does not train.

        Args:
            adapters: names of LoRA adapters.
            weights: one for each.
            adapter_name: of the new adapter.
            combination_type, svd_rank, svd_clamp, svd_full_matrices, svd_driver, density, majority_sign_method, seed:
                see `mindpet.peft.combine.combine`.

        Raises:
            AdapterError: a name is unknown or taken; an adapter cannot be summed; an adapter is merged.
            TypeError, ValueError: an argument is wrong.
        """
        self._check_state("add_weighted_adapter")
        check_name(adapter_name, self.adapters)
        parts = [self._get(name) for name in check_names("adapters", adapters)]
        config, values = combine(
            parts,
            weights,
            combination_type,
            svd_rank,
            svd_clamp,
            svd_full_matrices,
            svd_driver,
            density,
            majority_sign_method,
            seed,
        )
        with self._placement.bare():
            self._placement.add(adapter_name, plan_targets(self.network, config), False, values)

    @alone
    def merge_adapter(self, adapter_names: Optional[Sequence[str]] = None, safe_merge: bool = True) -> None:
        """Fold adapters into the weights of the network; `unmerge_adapter` undoes it. `merge_report` has the errors.

        All is computed in float32, and checked for NaN and infinite numbers before the first weight is set. What the
        active adapter trains of the base goes on training meanwhile, if it is among those that are merged.

        Args:
            adapter_names: Default: None, for the active one.
            safe_merge: kept for Hugging Face PEFT; every merge is checked. Default: True.

        Raises:
            AdapterError: an adapter is unknown or named twice, or one is merged already.
            MergeError: an adapter cannot be merged, a weight would not be finite, or another Cell has the same weight;
                all is in the message, and nothing was changed.
        """
        self._merge(adapter_names)

    @alone
    def unmerge_adapter(self) -> None:
        """Undo `merge_adapter`: every weight has the bits that it had before.

        Raises:
            AdapterError: no adapter is merged; at the end, if a merged delta was trained meanwhile.
        """
        if self._placement.merged is None:
            raise AdapterError("unmerge_adapter: no adapter is merged.")
        self._placement.unmerge()

    @alone
    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = True,
        adapter_names: Optional[Sequence[str]] = None,
        untie_weights: bool = False,
    ) -> nn.Cell:
        """Fold adapters into the weights for good, and take everything else out.

        Args:
            progressbar: whether to show progress. Default: False.
            safe_merge: kept for Hugging Face PEFT; every merge is checked. Default: True.
            adapter_names: Default: None, for those that are merged, or else the active one.
            untie_weights: whether a parameter that another Cell has too, say an embedding that is tied to the head, is
                given to each; else that is an error. Default: False.

        Returns:
            The network, with base Cells only.

        Raises:
            AdapterError, MergeError: as in `merge_adapter`.
        """
        merged = self.merged_adapters
        if merged:
            if adapter_names is not None and sorted(adapter_names) != sorted(merged):
                raise AdapterError(f"merge: {merged} are merged already; call unmerge_adapter() first.")
            self.unmerge_adapter()
        try:
            self._merge(merged or adapter_names, progressbar, True, untie_weights)
        except (AdapterError, MergeError):
            if merged:
                self._merge(merged)
            raise
        return self._close()

    @alone
    def unload(self) -> nn.Cell:
        """Take the adapters out; returns the network, bit for bit as it was before the first adapter came.

        Raises:
            AdapterError: the call is inside of `disable_adapter`.
        """
        if self._placement.merged is not None:
            self.unmerge_adapter()
        self._check_state("unload")
        return self._close()

    def _merge(self, adapter_names, progressbar=False, for_good=False, untie_weights=False):
        self._check_state("merge")
        names = self.active_adapters if adapter_names is None else check_names("adapter_names", adapter_names)
        for name in names:
            self._get(name)
        if not names or len(set(names)) < len(names):
            raise AdapterError(f"merge: there is no adapter, or one is named twice: {names}.")
        self._warn_of_other_base(names)
        self.merge_report = self._placement.merge(names, progressbar, for_good, untie_weights)

    def _warn_of_other_base(self, names):
        """Warn where other values were loaded into the base since an adapter's file was found to fit."""
        with self._placement.bare():
            base = self._base_values()
        for name in names:
            try:
                check_base(repr(name), self._bases.get(name, {}), base)
            except CheckpointError as error:
                warnings.warn(f"merge: {error}", stacklevel=5)
