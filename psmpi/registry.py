"""Classes by name: training methods, layers, losses and optimizers of psmpi, of other packages and of a program.

Another package offers a class by an entry point of the registry's group, such as `psmpi.layers`. A program registers a
class by the decorator `Registry.register` and then calls `psmpi.command.main`. Nobody can replace a class of psmpi. A
file can name classes of installed packages and of the program only; it cannot make psmpi import anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from psmpi.errors import UserError

# The classes in the registries, which this module does not import.
Kind = type[Any]
K = TypeVar("K", bound=type[Any])

DEFAULT = "psl"
# The method that messages suggest for a network that cannot be partitioned: it takes all networks on any ranks.
WHOLE = "data_parallel"
# Whether classes of other packages and of the program are left out, as in the look at a stranger's file.
_own_alone: ContextVar[bool] = ContextVar("own_alone", default=False)


class Registry(Mapping[str, K]):
    """Classes by name: psmpi's own first, then those of entry points, then those that the program has registered.

    noun: the kind of the classes ("loss"), also in the name of the group of entry points; asked: the words of a user
    who asks for a class, with {} for its name; base: "module:class" of the base class; own: psmpi's classes, or
    "module:class" of each; named: whether classes have their name as attribute `name`; taken: names of psmpi that are
    not in `own`.

    Iteration leaves out classes of other packages that cannot be imported; `names` has all names.
    """

    def __init__(
        self,
        noun: str,
        asked: str,
        base: str,
        own: Mapping[str, K | str],
        *,
        named: bool = False,
        taken: Collection[str] = (),
    ):
        self.noun, self.asked, self.base, self.own = noun, asked, base, own
        self.group = f"psmpi.{noun}{'es' if noun.endswith('s') else 's'}"
        self.named, self.taken = named, frozenset(taken)
        self.registered: dict[str, K] = {}

    def register(self, name: str) -> Callable[[K], K]:
        """Make a decorator that adds a class under `name`.

        ValueError for a name that psmpi, an installed package or another class has, or a class of another base.
        """

        def add(kind: K) -> K:
            place, entry = f"{kind.__module__}:{kind.__qualname__}", self.installed.get(name)
            other = self.registered.get(name, kind)
            if (
                name in self.own
                or name in self.taken
                or (entry is not None and entry.value != place)
                or other.__qualname__ != kind.__qualname__
            ):
                raise ValueError(f"a {self.noun} called {name} is there already: choose another name")
            if not self._fits(kind):
                raise ValueError(f"{kind.__qualname__} is no {self._base_name}: derive it from that class")
            self.registered[name] = self._with_name(kind, name)
            return kind

        return add

    @property
    def installed(self) -> dict[str, EntryPoint]:
        """The entry points of other packages by name, without those that have a name of psmpi's."""
        entries = {} if _own_alone.get() else _entries(self.group)
        return {name: one for name, one in entries.items() if name not in self.own and name not in self.taken}

    @property
    def names(self) -> tuple[str, ...]:
        """All names, also of classes that cannot be imported."""
        more = () if _own_alone.get() else tuple(self.registered)
        return tuple(dict.fromkeys([*self.own, *self.installed, *more]))

    def find(self, name: str, known: Collection[str] = ()) -> K:
        """The class called `name`; UserError for an unknown name, or a class that cannot be imported.

        known: the names that the message offers, `names` if empty.
        """
        if name not in self:
            raise UserError(f"{self.asked.format(name)} is unknown: choose one of {self.choices(known)}")
        return self[name]

    def choices(self, known: Collection[str] = ()) -> str:
        """The names for a message about an unknown one, with the way to make others known."""
        return f"{', '.join(known or self.names)}; {self.elsewhere}"

    @property
    def elsewhere(self) -> str:
        """The end of messages about unknown names: other packages and programs may register more."""
        kinds = self.group.removeprefix("psmpi.")
        return f"for {kinds} of other packages install these, or start the program that registers them"

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> K:
        if name in self.registered and not _own_alone.get():
            return self.registered[name]
        if name in self.own:
            own: K = _loaded(self.own[name])
            return own
        entry = self.installed[name]
        asked = f"{self.asked.format(name)}: {entry.value} of an installed package"
        try:
            kind: K = entry.load()
        except Exception as error:
            raise UserError(f"{asked} cannot be imported ({error!r}): mend or remove that package") from None
        if not self._fits(kind):
            raise UserError(f"{asked} is no {self._base_name}: mend or remove that package")
        return self._with_name(kind, name)

    def __iter__(self) -> Iterator[str]:
        for name in self.names:
            # A broken package is reported when its class is asked for.
            with suppress(UserError):
                self[name]
                yield name

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _fits(self, kind: Any) -> bool:
        return isinstance(kind, type) and issubclass(kind, _loaded(self.base))

    @property
    def _base_name(self) -> str:
        return self.base.replace(":", ".")

    def _with_name(self, kind: K, name: str) -> K:
        if self.named and getattr(kind, "name", "") != name:
            kind.name = name
        return kind


@contextmanager
def own_alone() -> Iterator[None]:
    """A block in which registries have psmpi's classes only, and import no others."""
    token = _own_alone.set(True)
    try:
        yield
    finally:
        _own_alone.reset(token)


@cache
def _entries(group: str) -> dict[str, EntryPoint]:
    """The entry points of a group by name."""
    return {one.name: one for one in _all_entries().select(group=group)}


@cache
def _all_entries() -> Any:
    return entry_points()


def _loaded(kind: Any) -> Any:
    """The class `kind`, imported if it is a text "module:class"."""
    if not isinstance(kind, str):
        return kind
    module, _, attribute = kind.partition(":")
    return getattr(import_module(module), attribute)


METHODS: Registry[Kind] = Registry(
    "method",
    "--method {}",
    "psmpi.training.method:Method",
    {
        "psl": "psmpi.methods.psl.method:PartiallySeparable",
        "data_parallel": "psmpi.methods.data_parallel:DataParallel",
        "bptt": "psmpi.methods.bptt.method:TruncatedBackPropagation",
        "local_sgd": "psmpi.methods.local_sgd:LocalSGD",
        "dni": "psmpi.methods.dni.method:DecoupledInterfaces",
        "dfa": "psmpi.methods.dfa:DirectFeedback",
        "hogwild": "psmpi.methods.hogwild.method:Hogwild",
        "ist": "psmpi.methods.ist.method:IndependentSubnets",
        "layer_parallel": "psmpi.methods.layer_parallel.method:LayerParallel",
        "next": "psmpi.methods.next.method:InNetwork",
        "sil": "psmpi.methods.sil.method:SyntheticLabels",
        "spann": "psmpi.methods.spann.method:SpatialDomains",
        "tensor": "psmpi.methods.tensor.method:TensorParallel",
        "wavefront": "psmpi.methods.wavefront.method:Wavefront",
    },
    named=True,
)
BUILTIN = METHODS.own


def register(method: K) -> K:
    """Add a method under its `name`, as a decorator of its class. ValueError: see `Registry.register`."""
    METHODS.register(method.name)(method)
    return method


def method_names() -> tuple[str, ...]:
    """The names of all training methods, psmpi's own first."""
    return METHODS.names


def find_method(name: str) -> Kind:
    """The class of the method called `name`. UserError if it is unknown or cannot be imported."""
    return METHODS.find(name)


def all_methods() -> dict[str, Kind]:
    """All training methods by name, without those of other packages that cannot be imported."""
    return dict(METHODS.items())


def summaries() -> dict[str, str]:
    """One line on each training method, by name."""
    return {name: method.summary for name, method in all_methods().items()}
