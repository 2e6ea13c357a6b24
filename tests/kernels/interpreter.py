"""Triton's interpreter, with less to do at each call: nothing that it computes changes.

It exchanges the functions of `triton.language` for its own when a kernel starts (some 2 ms, most of them spent looking
for what there is to exchange), and again whenever the kernel calls another function, where they are exchanged already.
`quicken` leaves the second out, and remembers which numpy dtype a Triton dtype is. Another Triton, without the names
that are replaced here, is left as it is: slower."""

import inspect


def quicken() -> None:
    """Of this process, which interprets kernels and does nothing else."""
    from triton import language
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in ("_patch_lang", "_LangPatchScope", "_get_np_dtype")):
        return
    exchanged: list = []  # the modules whose functions are exchanged now
    exchange = interpreter._patch_lang

    def patch_lang(function):
        modules = [m for m in function.__globals__.values() if inspect.ismodule(m) and m in (language, language.core)]
        if modules and all(m in exchanged for m in modules):
            return interpreter._LangPatchScope()  # nothing to undo
        scope = exchange(function)
        before, restore = exchanged[:], scope.restore
        exchanged.extend(modules)

        def undo():
            exchanged[:] = before
            restore()

        scope.restore = undo
        return scope

    interpreter._patch_lang = patch_lang
    numpy_dtype = interpreter._get_np_dtype
    dtypes: dict = {}

    def remembered(dtype):
        name = dtype.scalar.name  # of a block, that of its elements
        if name not in dtypes:
            dtypes[name] = numpy_dtype(dtype)
        return dtypes[name]

    interpreter._get_np_dtype = remembered
