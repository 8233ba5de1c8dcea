"""The head of a 16-bit model → its logits in float32, before they are rounded.

In:   a model, or a view of it whose body hands over hidden states (`head`); the linear layer that makes its logits.
Out:  views of the model, with the same weights, that differ in how this one product is made. All that the model's own code does
      to logits afterwards (soft-caps, scales, a mask) follows in float32.

How:  a 16-bit product is summed in float32 and rounded at its end: to an eighth of a nat for logits of 16 and more in bfloat16. Ways
      to have it before that:

      OUT_DTYPE  `torch.mm(…, out_dtype=torch.float32)`, which CUDA has: the same product, twice the bytes written.
      RESIDUAL   the product P as it is rounded, and x·W − P, which `addmm` sums in float32 as well and which is so small that its
                 rounding is 2⁻¹⁸ of a logit: two products in 16 bits. Where neither is to be had, FLOAT32 makes it of float32 weights.
      picked     a few entries of each row alone, from float32 weights (`torch.sparse.sampled_addmm`), for a device on which a
                 second product costs too much. `Rounded` hands on what is rounded together with the way to those entries.

      The layer is not replaced but called: what others have put around it (accelerate's copies between devices, the gathering of
      tensor parallelism) stays, and only `linear` inside it is another one.

      Which of these is right is found out at load, against the product in float64 (`Teacher`).

Cost: OUT_DTYPE 4 bytes a logit in place of 2. RESIDUAL twice the product. Picked 4 to 15 µs a row for 64 entries of width 576 on one
      core, by how many of the weights are in its cache, and a float32 copy of the layer's weights.

Shape suffixes: N positions, R some of them, C picked entries, V vocabulary, D hidden.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Product = Callable[[Tensor, Tensor], Tensor]
"""[n, D] inputs and [V, D] weights, both in 16 bits → [n, V], without a bias."""

TOLERANCE = 1e-4
"""Largest mean |Δ| between a way to logits and the product in float64, in standard deviations of the logits: rounding to bfloat16 is forty
times, to float16 five times as far."""
PROBE_ENTRIES = 64
UNFIT = (AttributeError, TypeError, RuntimeError, IndexError, NotImplementedError)
"""What code raises that does not come apart."""
EXACT_AT_ONCE = 4096
"""Rows of weights that are in float64 at the same time."""
MIXED_BEST = 16
"""Entries of a row that `Picker.mixed` has in float32: those among which the next token of a text is chosen, most of the time."""


def by_out_dtype(input_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """The product in float32, where the device writes it so."""
    product_NV: Tensor = torch.mm(input_ND, weight_VD.T, out_dtype=torch.float32)
    return product_NV


def by_residual(input_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """The product in 16 bits, corrected by what its rounding took away."""
    rounded_NV = torch.mm(input_ND, weight_VD.T)
    negative_NV = torch.addmm(rounded_NV, input_ND, weight_VD.T, alpha=-1)
    return rounded_NV.float().sub_(negative_NV)


def by_float32(input_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """The product of float32 copies."""
    return torch.mm(input_ND.float(), weight_VD.float().T)


def by_float64(input_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """The product in float64, a part of the vocabulary at a time: the reference."""
    parts = [
        torch.mm(input_ND.double(), part.double().T) for part in weight_VD.split(EXACT_AT_ONCE)
    ]
    return torch.cat(parts, dim=1)


def products_for(device: torch.device) -> tuple[Product, ...]:
    """Ways to all logits in float32, the fastest first. Not every one works everywhere."""
    first = (by_out_dtype,) if device.type == "cuda" else ()
    return (*first, by_residual, by_float32)


@dataclass(frozen=True, slots=True)
class OutputLayer:
    """The linear layer that makes a model's logits, and the modules on the way to it."""

    path: tuple[str, ...]
    linear: nn.Linear


def output_layer(model: Any) -> OutputLayer | None:
    """The layer of a 16-bit model whose product can be made in float32; None if it has none, or packed weights."""
    linear = model.get_output_embeddings()
    if type(linear) is not nn.Linear or not _is_plain(linear.weight):
        return None
    if linear.weight.dtype not in (torch.bfloat16, torch.float16):
        return None
    names = (name for name, module in model.named_modules() if module is linear)
    name = next(names, None)
    return OutputLayer(path=tuple(name.split(".")), linear=linear) if name else None


def is_float32(model: Any) -> bool:
    """Whether a model in 16 bits keeps the layer that makes its logits in float32 by itself."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    return isinstance(weight, Tensor) and weight.dtype == torch.float32


def _is_plain(weight: Tensor) -> bool:
    return type(weight.data) in (Tensor, DTensor)


def with_product(model: Any, layer: OutputLayer, product: Product) -> Any:
    """A view of a model that makes its logits by another product."""
    return _with(model, layer.path, _Around(layer.linear, _Linear(layer.linear, product)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Exact:
    """A way to logits in float32."""

    layer: OutputLayer
    product: Product
    view: Any
    """The model, or its head, as it yields them."""
    expected_NV: Tensor
    """What it was found to be right by: the logits of some positions, from a product in float64."""


def find(own: Any, run: Callable[[Any], Tensor], *, device: torch.device) -> Exact | None:
    """The fastest way of a 16-bit model to logits in float32 that agrees with the product in float64, if there is one.

    Args:
        own: the model, or a view whose body hands over hidden states.
        run: makes of such a view its logits at a few positions, [n, V].
        device: where it takes its inputs.
    """
    layer = output_layer(own)
    if layer is None:
        return None
    for product in products_for(device):
        try:
            expected_NV = run(with_product(own, layer, by_float64))
            view = with_product(own, layer, product)
            found_NV = run(view)
        except torch.OutOfMemoryError:
            raise  # which says nothing of what is right
        except UNFIT:
            continue
        if found_NV.dtype == torch.float32 and error(found_NV, expected_NV) <= TOLERANCE:
            return Exact(layer=layer, product=product, view=view, expected_NV=expected_NV)
    return None


def find_picker(own: Any, exact: Exact, hidden_ND: Tensor) -> "Picker | None":
    """A way to single logits; None where the model's code does more with them than treat each alone.

    Args:
        own: a view whose body hands over hidden states.
        exact: its way to all logits.
        hidden_ND: of the first positions by which that was found to be right.
    """
    expected_NV = exact.expected_NV[: len(hidden_ND)]
    count, size = expected_NV.shape
    generator = torch.Generator().manual_seed(0)
    any_NC = torch.randint(size, (count, PROBE_ENTRIES), generator=generator)
    best_NC = expected_NV.topk(min(PROBE_ENTRIES, size)).indices
    ids_NC = torch.cat([best_NC, any_NC], dim=1)
    try:
        picker = Picker(own, exact.layer)
        found_NC = picker(hidden_ND, ids_NC)
    except torch.OutOfMemoryError:
        raise
    except UNFIT:
        return None
    if found_NC.dtype != torch.float32 or found_NC.shape != ids_NC.shape:
        return None
    return picker if error(found_NC, expected_NV.gather(1, ids_NC)) <= TOLERANCE else None


def error(logits: Tensor, expected: Tensor) -> float:
    """Mean |Δ| of finite logits, in their standard deviations. Some models mask a part of the vocabulary with −inf."""
    finite = expected.isfinite()
    difference = (logits.to(expected) - expected)[finite].abs().mean()
    return float(difference / expected[finite].std().clamp(min=1e-6))


class Picker:
    """Some logits of each row in float32, by the model's own code after a product of those alone."""

    def __init__(self, head: Any, layer: OutputLayer) -> None:
        """Prepare to pick.

        Args:
            head: a view whose body hands over hidden states.
            layer: of the same model, on a CPU.
        """
        self._layer = _Picked(layer.linear)
        self._head = _with(head, layer.path, self._layer)

    @torch.inference_mode()
    def __call__(self, hidden_RD: Tensor, ids_RC: Tensor) -> Tensor:
        """[R, C] logits of the given ids."""
        self._layer.ids_RC = ids_RC
        logits_1RC: Tensor = self._head(inputs_embeds=hidden_RD[None], use_cache=False).logits
        return logits_1RC[0]

    def mixed(self, input_ND: Tensor, weight_VD: Tensor) -> Tensor:
        """The product in 16 bits, of which the best entries of each row are then made in float32: to write text with."""
        rounded_NV = torch.mm(input_ND, weight_VD.T)
        ids_NC = rounded_NV.topk(min(MIXED_BEST, len(weight_VD))).indices
        exact_NC = _sampled(input_ND.float(), self._layer.weight_VD, ids_NC)
        return rounded_NV.float().scatter_(1, ids_NC, exact_NC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """Logits of some positions as a 16-bit head rounds them, and the ways to what they were before."""

    logits_NV: Tensor
    hidden_ND: Tensor
    picker: Picker
    all_of: Callable[[Tensor], Tensor]
    """[r, D] hidden states → [r, V] logits in float32."""

    def pick(self, rows: slice, ids_RC: Tensor) -> Tensor:
        """[R, C] logits in float32 of the given ids in some rows."""
        return self.picker(self.hidden_ND[rows], ids_RC)

    def whole(self, rows_R: Tensor) -> Tensor:
        """[R, V] logits in float32 of some rows."""
        return self.all_of(self.hidden_ND.index_select(0, rows_R))


class _Linear(TorchFunctionMode):
    """While it is entered, `linear` with a layer's weights, or with this process's part of them, is another product."""

    def __init__(self, linear: nn.Linear, product: Product) -> None:
        super().__init__()
        self._dtype, self._product = linear.weight.dtype, product

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not functional.linear:
            return func(*args, **(kwargs or {}))

        def parts(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
            return input, weight, bias

        inputs, weight_VD, bias_V = parts(*args, **(kwargs or {}))
        logits_NV = self._product(inputs.to(self._dtype).flatten(0, -2), weight_VD)
        if bias_V is not None:
            logits_NV += bias_V
        return logits_NV.unflatten(0, inputs.shape[:-1])


class _Stand(nn.Module):
    """Stands where a layer was. What else it is asked for, is the layer's."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.__dict__["linear"] = linear  # not as a part of its own
        self._parameters = linear._parameters  # a model's code may ask for the dtype of its own

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["linear"], name)


class _Around(_Stand):
    """Calls the layer with another product."""

    def __init__(self, linear: nn.Linear, mode: _Linear) -> None:
        super().__init__(linear)
        self.__dict__["mode"] = mode

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.__dict__["mode"]:
            return self.__dict__["linear"](*args, **kwargs)


class _Picked(_Stand):
    """Yields the products of some rows of the weights, others for each position."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        bias = linear.bias
        self.weight_VD = linear.weight.detach().float()
        self.bias_V = None if bias is None else bias.detach().float()
        self.ids_RC = torch.zeros(1, 1, dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says once that sparse tensors are new
            _sampled(self.weight_VD[:1], self.weight_VD, self.ids_RC)

    def forward(self, hidden_1RD: Tensor) -> Tensor:
        hidden_RD = hidden_1RD.flatten(0, -2).float()
        logits_RC = _sampled(hidden_RD, self.weight_VD, self.ids_RC)
        if self.bias_V is not None:
            logits_RC += self.bias_V[self.ids_RC]
        return logits_RC[None]


def _sampled(hidden_RD: Tensor, weight_VD: Tensor, ids_RC: Tensor) -> Tensor:
    """Some entries of a product, [R, C]."""
    rows, count = ids_RC.shape
    places = torch.sparse_csr_tensor(
        torch.arange(0, (rows + 1) * count, count),
        ids_RC.flatten(),
        hidden_RD.new_zeros(rows * count),
        size=(rows, len(weight_VD)),
        check_invariants=False,
    )
    found: Tensor = torch.sparse.sampled_addmm(places, hidden_RD, weight_VD.T, beta=0.0)
    return found.values().view(rows, count)


def _with(model: Any, path: tuple[str, ...], layer: nn.Module) -> Any:
    """A view of a model that has another layer at a place."""
    view = copy.copy(model)
    # accelerate puts a method of its own on a model that is spread over devices, which would run the original's layers.
    view.__dict__.pop("forward", None)
    inner = layer if len(path) == 1 else _with(model._modules[path[0]], path[1:], layer)
    view._modules = {**model._modules, path[0]: inner}
    return view
