"""Prefixes that start as what the frozen network computes for real words."""

import contextlib
from collections.abc import Sequence
from typing import Any, Optional, Union

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mindpet.delta._base import PROMPT
from mindpet.errors import ConfigError
from mindpet.network.kinds import AttentionKind
from mindpet.network.values import forget_graphs, value_of
from mindpet.peft.batch import Root
from mindpet.peft.model import PeftModel
from mindpet.peft.patch import AttributePatch
from mindpet.peft.state_dict import check_model
from mindpet.utils.sharding import PARALLEL_MODES


def start_prefix(
    model: PeftModel,
    token_ids: Union[Sequence[int], np.ndarray, Tensor],
    *inputs: Any,
    adapter_name: Optional[str] = None,
) -> None:
    """Have a prefix start as the keys and values of real words, Li and Liang 2021, arXiv:2101.00190, section 7.4.

    The network computes them for the words alone, without an adapter and as outside of training. In a network whose
    tokens see only what is before them, and which counts the prefix as positions, the adapter then computes what the
    network computes with the words in front of the input.

    Args:
        model: has the adapter.
        token_ids: ids of the words, `(tokens,)`, as many as the prefix has.
        inputs: what the network gets behind its ids, say a mask of ones `(1, tokens)`.
        adapter_name: Default: None, for the active adapter.

    Raises:
        TypeError: `model` is not a PeftModel.
        ValueError: `token_ids` are another number of ids.
        AdapterError: there is no such adapter; one is merged, or the call is inside of `disable_adapter`.
        ConfigError: the adapter is no prefix alone, or one that is computed; the network runs in parallel; an attention
            did not compute keys and values of these tokens.
    """
    check_model(model)
    name = model.active_adapter if adapter_name is None else adapter_name
    tensors = model.adapter_tensors(name)
    plan = model.adapters[name].plan
    problem = None
    kinds = {target.kind.name for target in plan.targets}
    if kinds != {"attention"} or len(plan.config.parts) > 1:
        problem = f"{name!r} is of {plan.config.peft_name}, which is no prefix alone"
    elif plan.config.computed() != plan.config:
        problem = f"the prefix of {name!r} is computed by a projection, which cannot be made to give keys and values"
    elif ms.get_auto_parallel_context("parallel_mode") in PARALLEL_MODES:
        problem = "in semi-auto parallel mode a rank computes slices; start it outside, and load the file"
    if problem:
        raise ConfigError(f"start_prefix: {problem}.")
    ids, tokens = np.asarray(token_ids), plan.config.num_virtual_tokens
    if ids.shape != (tokens,) or ids.dtype.kind not in "iu":
        raise ValueError(f"start_prefix: 'token_ids' must be the ids of {tokens} tokens, but are {ids.tolist()}.")
    with model._turns.change("start_prefix"):
        model._check_state("start_prefix")
        pairs = _keys_and_values(model, plan.targets, tokens, (Tensor(ids[None], ms.int32), *inputs))
    table = np.concatenate([part for pair in pairs for part in pair], 1)
    model.set_adapter_tensors(name, {**tensors, PROMPT: table.astype(tensors[PROMPT].dtype)})


def _keys_and_values(model, targets, tokens, inputs):
    """Of each attention its keys and values for one row of tokens, `(tokens, heads * head_dim)` each."""
    network, keepers = model.network, [Keeper(target.kind, tokens) for target in targets]
    patches = [AttributePatch(target.cell, target.kind.slot, keeper) for target, keeper in zip(targets, keepers)]
    modes, phase = [(cell, cell.training) for _, cell in network.cells_and_names()], network._phase
    with model._placement.bare(), contextlib.ExitStack() as stack:
        stack.callback(forget_graphs)
        for index, patch in enumerate(patches):
            patch.apply()
            stack.callback(patch.revert)
            for name, param in patch.value.parameters_and_names():
                param.name = f"mindpet_kept_{name}_{index}"
        forget_graphs()
        try:
            network.set_train(False)
            Root(network)(*inputs)
        finally:
            for cell, training in modes:
                cell.add_flags(training=training)
            network._phase = phase
    silent = [target.path for target, keeper in zip(targets, keepers) if not value_of(keeper.calls)[0]]
    if silent:
        raise ConfigError(f"start_prefix: {silent} did not compute keys and values.")
    return [
        tuple(value_of(part)[0].swapaxes(0, 1).reshape(tokens, -1) for part in (keeper.key, keeper.value))
        for keeper in keepers
    ]


class Keeper(nn.Cell):
    """In the place of a prefix: it leaves keys and values as they are, and keeps them.

    Args:
        kind: of the attention.
        tokens: of the input.

    Inputs, Outputs:
        key, value: `(1, kv_heads, tokens, head_dim)`.
    """

    def __init__(self, kind: AttentionKind, tokens: int):
        super().__init__(auto_prefix=False)
        shape = (1, kind.kv_heads, tokens, kind.head_dim)
        self.key, self.value = (Parameter(np.zeros(shape, np.float32), requires_grad=False) for _ in range(2))
        self.calls = Parameter(np.zeros(1, np.int32), requires_grad=False)
        self.assign, self.cast = ops.Assign(), ops.Cast()

    def construct(self, key, value):
        self.assign(self.key, self.cast(key, ms.float32))
        self.assign(self.value, self.cast(value, ms.float32))
        self.assign(self.calls, self.calls + 1)
        return key, value
