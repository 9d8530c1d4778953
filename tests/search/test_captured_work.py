"""What a CUDA graph captures of a step neither reads from nor writes to the host."""

import pytest
import torch
from step_cases import batches, build
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastnas.nn import cell
from fastnas.strategies.steps import Inputs


class Watch(TorchDispatchMode):
    """On meta tensors in place of a GPU's: no operator may see a tensor of the host."""

    fused = (torch.ops.aten._fused_sgd_.tensor_lr, torch.ops.aten._fused_adam_.tensor_lr)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # The fused optimizers have no meta kernel; all that they are given is looked at.
        result = None if func in self.fused else func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if torch.is_tensor(leaf) and leaf.device.type != "meta":
                raise AssertionError(f"{func} has a tensor on {leaf.device}")
        return result


class NoValues(TorchFunctionMode):
    """No tensor is made from numbers of the host, which would be copied at every step."""

    makers = (torch.tensor, torch.as_tensor, torch.from_numpy, torch.scalar_tensor)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.makers:
            raise AssertionError(f"{func.__name__} in a captured step")
        return func(*args, **(kwargs or {}))


def on_meta(space, method):
    bilevel = build(method, space, device="meta")
    bilevel.params_optimizer._need_device_dtype_check_for_fused = False  # of torch: no meta
    meta = torch.device("meta")
    draw = bilevel.network.draw(meta)
    assert (draw is None) == (method != "noisy-darts")
    drawn = bilevel.strategy.draw()
    return bilevel, Inputs(*batches(1, meta)[0], draw, None if drawn is None else drawn.to(meta))


UNFUSED = "as on a device without fused cells"


@pytest.mark.parametrize(
    ("method", "space", "fused"),
    [
        ("darts", "S0", None),
        ("noisy-darts", "S2", None),
        ("fair-darts", "S3", None),
        ("darts", "S3", UNFUSED),
        ("noisy-darts", "S3", UNFUSED),
        ("darts", "S4", None),
        ("beta-darts", "S2", None),
        ("darts-minus", "S2", None),
        ("sdarts-rs", "S2", None),
    ],
)
def test_a_captured_step_leaves_the_host_alone(monkeypatch, method, space, fused):
    monkeypatch.setattr(cell, "can_run", lambda *_: fused)
    bilevel, inputs = on_meta(space, method)
    with Watch():
        bilevel.move_alphas(inputs, inputs)  # as the steps before a capture do: cells are read once
    with NoValues(), Watch():
        loss = bilevel.move_alphas(inputs, inputs)
        results = bilevel.move_params(inputs)
    assert [t.device.type for t in (loss, *results)] == ["meta"] * 3
    assert all(p.grad is not None for p in bilevel.params)


@pytest.mark.parametrize(
    "touch",
    [
        lambda loss: float(loss),
        lambda loss: loss + torch.tensor([1.0], device="meta"),
        lambda loss: loss + torch.ones(1).to("meta"),
        lambda loss: loss.clamp(max=torch.ones(())),
    ],
    ids=["read", "from numbers", "copy", "mixed"],
)
def test_the_watch_sees_the_host(touch):
    bilevel, inputs = on_meta("S2", "darts")
    bilevel.strategy.regulariser = lambda arch: touch(arch.normal.sum())
    with pytest.raises((AssertionError, RuntimeError)), NoValues(), Watch():
        bilevel.move_alphas(inputs, inputs)
