"""Let SGLang import on a machine without a GPU. Python runs this file at start-up of every process that has it on PYTHONPATH.

Two things cannot be loaded here, and neither is called by a dense model on the native torch path:

* torchvision from PyPI is a CUDA build. Importing it registers shapes for operators that its library would have
  defined, and fails because the library could not load: that one module is replaced by an empty one.
* triton exists for GPUs. SGLang decorates kernels with it at import time. A stand-in lets the definitions through and
  answers every attribute; nothing here can launch a kernel.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types

sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")


class _AnyClass:
    """Base of whatever capitalised name is asked for: can be constructed, subclassed, used in annotations."""

    def __init_subclass__(cls, **options):
        super().__init_subclass__()

    def __init__(self, *values, **named):
        self.value = values[0] if values else None
        self.__dict__.update(named)


class _StandIn(types.ModuleType):
    """A module, a decorator and an attribute, whichever the importer takes it for. It is falsy and empty."""

    def __init__(self, name):
        super().__init__(name)
        self.__path__ = []
        self.__package__ = name
        self.__spec__ = importlib.machinery.ModuleSpec(name, _FINDER, is_package=True)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        is_class = name[:1].isupper() or name == "constexpr"
        value = type(name, (_AnyClass,), {}) if is_class else _stand_in(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *args, **options):
        is_bare_decorator = len(args) == 1 and callable(args[0]) and not options
        return args[0] if is_bare_decorator else lambda function: function

    def __bool__(self):
        return False

    def __iter__(self):
        return iter(())

    def __len__(self):
        return 0


def _stand_in(name):
    if name not in sys.modules:
        sys.modules[name] = _StandIn(name)
    return sys.modules[name]


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return sys.modules.get(spec.name) or _StandIn(spec.name)

    def exec_module(self, module):
        if module.__name__ == "triton":
            module.__version__ = "3.0.0"
            # Called while modules are imported, so they have to be right.
            module.cdiv = lambda a, b: -(-a // b)
            module.next_power_of_2 = lambda n: 1 << max(0, n - 1).bit_length()


_FINDER = _Finder()
if importlib.util.find_spec("triton") is None:
    sys.meta_path.insert(0, _FINDER)
