"""In place of SGLang's compiled kernels, which need AVX-512 or CUDA: names resolve, calls say which kernel was wanted."""

__version__ = "0.4.10"


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **options):
        shapes = [tuple(value.shape) if hasattr(value, "shape") else type(value).__name__ for value in args]
        raise NotImplementedError(f"sgl_kernel.{name}({shapes}, {sorted(options)}) was called; the CPU rig has no such kernel")

    missing.__name__ = name
    return missing
