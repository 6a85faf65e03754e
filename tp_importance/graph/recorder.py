"""Run a network and write down its operations as a :class:`.tape.Tape`, or say why they could not run again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakTensorKeyDictionary

from ..core.batches import tensors_in
from ..core.forward import layer_input
from .tape import Mark, Note, NotReplayable, Step, Tape, Value

__all__ = ["Recorder", "record_tape"]


def record_tape(run: Callable[[], Any], inputs: list[Tensor], units: Mapping[str, nn.Module]) -> tuple[Tape, Tensor]:
    """Run a network once and write down all operations; gradients and modes are the caller's business.

    Args:
        run: runs the network.
        inputs: the tensors that it is given there; nothing else may change between runs.
        units: modules by name of which each call counts as one operation, from one tensor to one.

    Returns:
        The tape and the (first) output.

    Raises:
        NotReplayable: if Python reads values that depend on a unit, or shapes depend on such values; if random numbers
            are drawn, or parameters, buffers or other tensors from outside are written; if a unit is called otherwise,
            or the output is no tensor that torch has computed. What happens out of sight of torch (in C++ that looks at
            memory, say) is not noticed: compare a run with one of the network.
    """
    recorder = Recorder(inputs)
    with ExitStack() as stack:
        for name, module in units.items():
            recorder.watch(stack, name, module)
        stack.enter_context(recorder)
        output = run()
    return recorder.tape(output)


class Recorder(TorchDispatchMode):
    """Writes down what runs inside of it, see :func:`record_tape`.

    Args:
        inputs: the tensors that the network is given.
        others: the operations are to run on other inputs as well: Python may not read values that depend on them.
    """

    def __init__(self, inputs: list[Tensor], others: bool = False) -> None:
        super().__init__()
        self._steps: list[Step] = []
        self._notes: list[Note] = []
        self._numbers: Any = WeakTensorKeyDictionary()
        self._of_units, self._foreign, self._rigid = set[int](), set[int](), set[int]()  # roots
        self._inside, self._reason = 0, ""
        self._marks: dict[str, Mark] = {}
        self._owners: dict[int, str] = {}  # marked modules, by the memory of their weights
        self._named: dict[Hashable, int] = {}
        self._unseen = _Unseen(self)
        self._inputs = [self._add(x, None) for x in inputs]
        if others:
            self._of_units.update(self._inputs)

    def tape(self, output: Any) -> tuple[Tape, Tensor]:
        """What was recorded, and the output."""
        found = tensors_in(output)
        number = self._numbers.get(found[0]) if found else None
        if number is None or self._reason:
            raise NotReplayable(self._reason or "its output is made out of sight")
        notes = [replace(note, dense=note.dense and note.root not in self._rigid) for note in self._notes]
        tape = Tape(self._steps, notes, self._inputs, number, self._marks, self._named)
        for name, mark in self._marks.items():
            if mark.number not in tape.live(mark.step):
                raise NotReplayable(f"{name} does not use its input")
        return tape, found[0]

    def name(self, key: Hashable, tensor: Tensor) -> None:
        """Remember which tensor this is, for :attr:`Tape.named`."""
        number = self._numbers.get(tensor)
        if number is None:
            self._refuse(f"tensor {key} is made out of sight")
        else:
            self._named[key] = number

    def mark(self, stack: ExitStack, name: str, module: nn.Module) -> None:
        """Remember where a module runs, whose weights may be others later, for :attr:`Tape.marks`.

        Hooks that change its input come before.
        """

        def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
            number = self._numbers.get(layer_input(args, kwargs))
            if number is None or name in self._marks:
                self._refuse(f"{name} runs twice, or its input is made out of sight")
            else:
                self._marks[name] = Mark(len(self._steps), number)

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            for i, x in enumerate(tensors_in(output)):
                number = self._numbers.get(x)
                if number is None:
                    self._refuse(f"the output of {name} is made out of sight")
                else:
                    self._of_units.add(self._notes[number].root)
                if not i and name in self._marks:
                    self._marks[name] = replace(self._marks[name], shape=tuple(x.shape))

        self._owners.update((place, name) for t in (*module.parameters(), *module.buffers()) if (place := _place(t)))
        stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(after).remove)

    def watch(self, stack: ExitStack, name: str, module: nn.Module) -> None:
        """Take each call of a module for one operation."""

        def before(_module: nn.Module, _args: Any) -> None:
            self._inside += 1

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._inside -= 1
            if self._inside:
                return
            plain = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(output, Tensor)
            if not plain or self._numbers.get(args[0]) is None or self._numbers.get(output) is not None:
                self._refuse(f"{name} is not called with one tensor that torch has computed")
            elif {args[0].dtype, output.dtype} != {p.dtype for p in module.parameters()}:
                self._refuse(f"{name} runs in another precision than that of its weights")
            else:
                number = self._numbers[args[0]]
                made = self._add(output, None)
                self._of_units.add(made)
                self._steps.append(Step((number,), (made,), unit=name, stride=output.stride()))

        stack.callback(module.register_forward_pre_hook(before, prepend=True).remove)
        stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)

    def __enter__(self) -> Recorder:
        self._unseen.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        finally:
            self._unseen.__exit__(*error)

    def read(self, func: Any, tensors: list[Tensor]) -> None:
        """Values of tensors are read out of sight of the dispatcher."""
        known = [n for x in tensors if (n := self._numbers.get(x)) is not None]
        if not self._inside and (self._owned(tensors) or any(map(self._depends, known))):
            self._refuse(f"{func.__name__} reads values of tensors")

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Or else the first operation imports the compiler, which takes longer than many a pass."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if not self._inside and not self._reason:
            self._write_down(func, args, kwargs, output)
        return output

    def _write_down(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        leaves, form = tree_flatten((args, kwargs))
        numbers = [self._numbers.get(x) if isinstance(x, Tensor) else None for x in leaves]
        inputs = tuple(dict.fromkeys(n for n in numbers if n is not None))
        owners = self._owned([x for x, n in zip(leaves, numbers, strict=True) if n is None and isinstance(x, Tensor)])
        depends, made = bool(owners) or any(map(self._depends, inputs)), tensors_in(output)
        for owner in owners:
            if owner not in self._marks:
                self._refuse(f"weights of {owner} are used before it runs")
        written = list(_written(func, args, kwargs))
        if torch.Tag.nondeterministic_seeded in func.tags and _argument(func, args, kwargs, "dropout_p") != 0:
            self._refuse(f"{func} may draw random numbers")
        elif depends and (_looks_at_values(func, leaves) or not (made or written)):
            self._refuse(f"{func} reads values of tensors")
        for x in written:
            number = self._numbers.get(x)
            if number is None or self._notes[number].root in self._foreign:
                self._refuse(f"{func} writes into a tensor that was there before")
            elif depends:
                self._of_units.add(self._notes[number].root)
        if func.overloadpacket is torch.ops.aten.set_:
            self._refuse("a tensor gets the memory of another one")
        if self._reason or not (made or written):
            return
        if "as_strided" in str(func):
            self._rigid.update(self._notes[n].root for n in inputs)
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        outputs = tuple(self._number(x, tensors, depends) for x in made)
        named = [x if n is None else Value(n) for x, n in zip(leaves, numbers, strict=True)]
        run: Any = func
        layout: Any = form
        if all(isinstance(x, Tensor) or not tensors_in(x) for x in args) and not tensors_in(kwargs):
            run, layout = partial(func, **kwargs) if kwargs else func, None  # several times as fast
            known = {id(x): Value(n) for x, n in zip(leaves, numbers, strict=True) if n is not None}
            named = [known.get(id(x), x) for x in args]
        changed = tuple(dict.fromkeys(self._numbers[x] for x in written))
        self._steps.append(Step(inputs, outputs, run, named, layout, written=changed))

    def _number(self, x: Tensor, given: list[Tensor], depends: bool) -> int:
        known = self._numbers.get(x)
        if known is not None:  # written in place
            return int(known)
        if type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided:
            self._refuse(f"there are tensors of type {type(x).__name__}, {x.layout}")
            return self._add(x, None)
        place = x.untyped_storage()._cdata
        base = next((t for t in given if t.layout == torch.strided and t.untyped_storage()._cdata == place), None)
        number = None if base is None else self._numbers.get(base)
        made = self._add(x, None if number is None else self._notes[number].root)
        if base is not None and number is None:
            self._foreign.add(made)
        if depends:
            self._of_units.add(self._notes[made].root)
        return made

    def _add(self, x: Tensor, root: int | None) -> int:
        number = self._numbers[x] = len(self._notes)
        dense = x.layout == torch.strided and (
            x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
        )
        self._notes.append(Note(number if root is None else root, dense, x.numel() * x.element_size()))
        return number

    def _owned(self, tensors: list[Tensor]) -> list[str]:
        """Marked modules whose weights are among tensors."""
        return [self._owners[place] for x in tensors if (place := _place(x)) in self._owners] if self._owners else []

    def _depends(self, number: int) -> bool:
        return self._notes[number].root in self._of_units

    def _refuse(self, reason: str) -> None:
        self._reason = self._reason or reason


class _Unseen(TorchFunctionMode):
    """Tells a recorder of values that leave torch or get into other tensors, which its dispatcher does not see."""

    FUNCTIONS = frozenset(
        {
            Tensor.numpy,
            Tensor.tolist,
            Tensor.__array__,
            Tensor.__dlpack__,
            Tensor.__deepcopy__,
            Tensor.data.__set__,  # type: ignore[attr-defined]
        }
    )

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.FUNCTIONS:
            self._recorder.read(func, tensors_in(args))
        return func(*args, **(kwargs or {}))


def _place(x: Tensor) -> int:
    """The memory of a tensor; 0 for one of none."""
    return int(x.untyped_storage()._cdata) if x.layout == torch.strided and not x.is_meta else 0


def _looks_at_values(func: Any, leaves: list[Any]) -> bool:
    if func is torch.ops.aten.index.Tensor:  # the shape depends on masks only
        return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in leaves[1:])
    if func is torch.ops.aten._pack_padded_sequence.default:  # how many sequences are left at each step
        return True
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """Tensors that a function writes into."""
    for argument in func._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tensors_in(_argument(func, args, kwargs, argument.name))


def _argument(func: Any, args: Any, kwargs: Any, name: str) -> Any:
    """The value of an argument, ``None`` if the function has none of this name."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            return args[i] if i < len(args) else kwargs.get(name, argument.default_value)
    return None
