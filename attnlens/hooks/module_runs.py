"""What the modules of a model were given and returned in one run, to find who reads whom."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from attnlens.anatomy import Anatomy
from attnlens.errors import UnsupportedModelError
from attnlens.hooks.replaced import of_this_thread
from attnlens.hooks.residual import Passing, Stream
from attnlens.hooks.returned import first_tensor, same_numbers, tensors_of
from attnlens.hooks.session import Handle, Observer
from attnlens.hooks.wiring import Writer


@dataclass(frozen=True)
class Ran:
    """One run of a module, in the order of the ends of runs."""

    name: str
    clock: int
    given: Tensor
    made: Tensor


class Seen:
    """What a run showed: norms, matrices, and what the writers wrote."""

    def __init__(self) -> None:
        self.runs: list[Ran] = []
        self.norms: set[str] = set()
        self.written: dict[str, Ran] = {}

    def run(self, name: str) -> Ran:
        """The only run of a module."""
        found = [run for run in self.runs if run.name == name]
        if len(found) != 1:
            raise UnsupportedModelError(
                f"{name} runs {len(found)} times in a forward pass, so what reads the stream there "
                "cannot be told."
            )
        return found[0]

    def before(self, run: Ran) -> str:
        """The place where a module reads: the norm that returned what it is given, or itself."""
        for earlier in reversed(self.runs[: run.clock]):
            if earlier.name in self.norms and same_numbers(earlier.made, run.given):
                return self.run(earlier.name).name
        return run.name

    def note(self, name: str, given: Tensor, made: Tensor) -> None:
        """One more run."""
        self.runs.append(Ran(name, len(self.runs), given.detach(), made.detach()))


class Watch(Observer):
    """Observer that fills a `Seen`."""

    def __init__(self, anatomy: Anatomy, writers: Sequence[Writer], seen: Seen) -> None:
        self._anatomy = anatomy
        self._writers = writers
        self._seen = seen

    def attach(self, model: nn.Module) -> Sequence[Handle]:
        """Hooks on norms and matrices; on MLPs, whole ones too; on what enters first blocks."""
        return list(self._hooks(model))

    def _hooks(self, model: nn.Module) -> Iterator[Handle]:
        for name, module in model.named_modules():
            if "norm" in type(module).__name__.lower():
                self._seen.norms.add(name)
            yield module.register_forward_hook(of_this_thread(self._note(name)), with_kwargs=True)
        for writer in self._writers:
            if writer.kind == "embed":
                yield embeddings(model, self._anatomy, writer, self._embedded(writer))
            else:
                module = model.get_submodule(writer.module)
                yield module.register_forward_hook(of_this_thread(self._written(writer)))

    def _note(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], made: Any) -> None:
            given = tensors_of((*args, *kwargs.values()))
            if given and tensors_of(made):
                self._seen.note(name, given[0], first_tensor(made))

        return hook

    def _written(self, writer: Writer) -> Callable[..., None]:
        def hook(_: nn.Module, __: tuple[Any, ...], made: Any) -> None:
            self._keep(writer, first_tensor(made))

        return hook

    def _embedded(self, writer: Writer) -> Callable[[Tensor], None]:
        return lambda stream: self._keep(writer, stream)

    def _keep(self, writer: Writer, tensor: Tensor) -> None:
        written, clock = self._seen.written, len(self._seen.runs)
        written[writer.name] = Ran(writer.module, clock, tensor.detach(), tensor.detach())


def embeddings(
    model: nn.Module,
    anatomy: Anatomy,
    writer: Writer,
    look: Callable[[Tensor], Tensor | None],
) -> Handle:
    """Show what enters a first block to `look`, which may return another tensor to go on with."""
    site = next(site for site in anatomy.sites if site.block == writer.module)
    return Passing(model, anatomy, [Stream(site)], lambda _, stream: look(stream))
