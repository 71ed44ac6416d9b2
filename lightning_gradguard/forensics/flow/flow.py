"""How activations and gradients pass through a network in one step, measured layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_gradguard.forensics.flow.units import Units, units_of
from lightning_gradguard.forensics.nonfinite.source_location import ModuleStack
from lightning_gradguard.forensics.tensors import plain, tensors_in

Role = Literal["weights", "activation", "norm", "recurrent"]

_ROLES: dict[str, Role] = {
    **dict.fromkeys(
        ("linear", "bilinear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        "weights",
    ),
    **dict.fromkeys(("embedding", "embedding_bag", "multi_head_attention_forward"), "weights"),
    **dict.fromkeys(("rnn_tanh_cell", "rnn_relu_cell", "lstm_cell", "gru_cell"), "weights"),
    **dict.fromkeys(("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "local_response_norm"), "norm"),
    **dict.fromkeys(("rnn_tanh", "rnn_relu", "lstm", "gru"), "recurrent"),
    **dict.fromkeys(
        ("relu", "relu6", "sigmoid", "tanh", "gelu", "silu", "elu", "selu", "leaky_relu", "hardtanh", "hardsigmoid",
         "softplus", "softsign", "mish", "celu", "hardswish", "logsigmoid", "rrelu", "prelu", "glu"),
        "activation",
    ),
}  # fmt: skip
_MAX_WALK = 64


@dataclass(eq=False)
class Layer:
    """One call of a layer.

    Attributes:
        module: path of the module whose code called it; "" for the root's own.
        op: the function, as `linear`.
        role: what it is to the gradient.
        weight: name of its weight; one that is used again and again may be a recurrence in time.
        is_trained: whether that has a gradient.
        input_rms, output_rms: of the elements.
        gain: standard deviation of the weights times the square root of the inputs to a unit; what keeps the variance is 1
            (tanh) to 1.41 (ReLU). None for a layer without a matrix.
        units: state of its activation function; None where it is none, or none that can saturate.
        before: the layers that its input comes from, nearest first.
        grad_norm: norm of the loss's gradient at its output; None where none arrived.
        times: the same at each step in time of a fused recurrent layer's input, first step first.
        is_bidirectional: whether such a layer runs both ways.
        rows: what each sample adds at most to the norm of its weights' gradient; None without a row for each.
        input_rows: norm of each sample's input.
    """

    module: str
    op: str
    role: Role
    weight: str | None = None
    is_trained: bool = True
    input_rms: float = math.nan
    output_rms: float = math.nan
    gain: float | None = None
    units: Units | None = None
    before: tuple[Layer, ...] = field(default=(), repr=False)
    grad_norm: float | None = None
    times: tuple[float, ...] = ()
    is_bidirectional: bool = False
    rows: tuple[float, ...] | None = None
    input_rows: tuple[float, ...] | None = None

    @property
    def name(self) -> str:
        """What a person calls it."""
        return f"`{self.module}`" if self.module else f"`{self.op}` in the root's own code"

    @property
    def factor(self) -> float | None:
        """What the chain rule multiplies by on the way through: gradient norm at its input over that at its output."""
        if not self.before or not self.grad_norm or self.before[0].grad_norm is None:
            return None
        return self.before[0].grad_norm / self.grad_norm


@dataclass(frozen=True)
class Flow:
    """All layers of a step, in the order in which forward called them."""

    layers: tuple[Layer, ...]

    def of(self, *roles: Role) -> list[Layer]:
        """Those of some roles."""
        return [layer for layer in self.layers if layer.role in roles]

    @property
    def output(self) -> Layer | None:
        """Where the gradient begins: of the layers with weights that no other comes after, the one with the largest."""
        layers = [layer for layer in self.of("weights", "recurrent") if layer.grad_norm is not None]
        inner = ancestors_of(before for layer in layers for before in layer.before)
        last = [layer for layer in layers if layer not in inner]
        return max(last, key=lambda layer: layer.grad_norm or 0.0, default=None)


def ancestors_of(layers: Iterable[Layer]) -> set[Layer]:
    """These layers, and all that they get their inputs from."""
    open_, found = list(layers), set[Layer]()
    while open_:
        layer = open_.pop()
        if layer not in found:
            found.add(layer)
            open_.extend(layer.before)
    return found


def source_of(layer: Layer) -> Layer:
    """The layer of weights in front of an activation."""
    return next((before for before in layer.before if before.role != "activation"), layer)


class FlowMeter(TorchFunctionMode):
    """Measures each layer while it watches; hooks on tensors of this one pass, nothing on modules.

    Functions count as well as modules, since an activation often is one. Each figure is a sync, so this is for replays.

    Args:
        root: whose submodules give layers their names.
        num_samples: in a batch; 0 if that can't be told.
    """

    def __init__(self, root: nn.Module, num_samples: int = 0) -> None:
        super().__init__()
        self._stack = ModuleStack(root)
        self._names = {id(parameter): name for name, parameter in root.named_parameters()}
        self._num_samples = num_samples
        self._layers: list[Layer] = []
        self._nodes: dict[Any, Layer] = {}

    @contextmanager
    def watch(self) -> Iterator[FlowMeter]:
        """Measure all that is run inside."""
        with self._stack.watch(), self:
            yield self
        self._nodes.clear()

    @property
    def flow(self) -> Flow:
        """What was measured."""
        return Flow(tuple(self._layers))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function, and measure it if it is a layer."""
        kwargs = kwargs or {}
        op = getattr(func, "__name__", "").strip("_")
        role = _ROLES.get(op)
        inputs = list(tensors_in(args))
        if role is None or not inputs or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        values = inputs[0]
        layer = Layer(self._stack.current, op, role, before=self._producers(inputs))
        layer.input_rms = rms(values)
        if role == "weights":
            self._look_at_weight(layer, op, [*inputs, *tensors_in(list(kwargs.values()))])
            layer.input_rows = self._row_norms(values)
        if role == "recurrent":
            args = self._look_at_time(layer, args)
        output = func(*args, **kwargs)
        self._look_at_output(layer, list(tensors_in(output)))
        self._layers.append(layer)
        return output

    def _producers(self, inputs: Sequence[Tensor]) -> tuple[Layer, ...]:
        """The layers that inputs come from; a walk through the graph, up to the first layers on each way."""
        open_ = [tensor.grad_fn for tensor in inputs if tensor.grad_fn is not None]
        found: list[Layer] = []
        seen: set[Any] = set()
        while open_ and len(seen) < _MAX_WALK:
            node = open_.pop(0)
            if node in seen:
                continue
            seen.add(node)
            if node in self._nodes:
                found.append(self._nodes[node])
            else:
                open_.extend(before for before, _ in node.next_functions if before is not None)
        return tuple(dict.fromkeys(found))

    def _look_at_weight(self, layer: Layer, op: str, tensors: Sequence[Tensor]) -> None:
        weight = next((tensor for tensor in tensors if isinstance(tensor, nn.Parameter) and tensor.dim() >= 2), None)
        if weight is None or (values := plain(weight)) is None:
            return
        layer.weight = self._names.get(id(weight))
        layer.is_trained = weight.requires_grad
        if not op.startswith("embedding"):
            layer.gain = rms(values) * math.sqrt(values[0].numel())

    def _look_at_time(self, layer: Layer, args: Sequence[Any]) -> Sequence[Any]:
        """Have the gradient of each step in time told; the input must be one that has a gradient."""
        values = args[0]
        # Packed: the rows of all steps in one, and how many each step has. Else the last argument is `batch_first`.
        sizes = args[1].tolist() if values.dim() == 2 else None
        layer.is_bidirectional = bool(args[-1 if sizes is not None else -2])
        if not values.requires_grad:
            values = values.detach().requires_grad_()
        dim = 1 if sizes is None and args[-1] is True else 0

        def note(grad: Tensor) -> None:
            steps = torch.split(grad, sizes) if sizes is not None else grad.movedim(dim, 0).unbind()
            layer.times = tuple(torch.stack([step.double().norm() for step in steps]).tolist())

        values.register_hook(note)
        return (values, *args[1:])

    def _look_at_output(self, layer: Layer, outputs: Sequence[Tensor]) -> None:
        layer.output_rms = rms(outputs[0])
        layer.units = units_of(layer.op, outputs[0])
        norms: dict[int, float] = {}

        def watch(index: int, output: Tensor) -> None:
            def note(grad: Tensor) -> None:
                values = plain(grad)
                if values is None:
                    return
                norms[index] = float(values.double().norm())
                layer.grad_norm = math.hypot(*norms.values())
                if index == 0:
                    self._look_at_rows(layer, values)

            output.register_hook(note)  # type: ignore[no-untyped-call]

        # A recurrent cell hands on a hidden state and a memory; the gradient comes back through both.
        for index, output in enumerate(outputs):
            if output.requires_grad and output.grad_fn is not None:
                self._nodes[output.grad_fn] = layer
                watch(index, output)

    def _look_at_rows(self, layer: Layer, grad: Tensor) -> None:
        size = self._num_samples
        if layer.input_rows is not None and grad.dim() and grad.shape[0] == size:
            norms = grad.reshape(size, -1).double().norm(dim=1).tolist()
            layer.rows = tuple(norm * math.hypot(1.0, row) for norm, row in zip(norms, layer.input_rows, strict=True))

    def _row_norms(self, tensor: Tensor) -> tuple[float, ...] | None:
        values = plain(tensor)
        if values is None or not self._num_samples or not values.dim() or values.shape[0] != self._num_samples:
            return None
        return tuple(values.reshape(self._num_samples, -1).double().norm(dim=1).tolist())


def rms(tensor: Tensor) -> float:
    """Root of the mean square in float64; NaN for what holds no floating-point values. One sync."""
    values = plain(tensor)
    return math.nan if values is None else float(values.double().square().mean().sqrt())
