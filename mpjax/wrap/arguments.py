"""The keywords of `apply` that are the wrap's own: `method`, and `train` where the method has no such parameter."""

from __future__ import annotations

import inspect
from typing import Any


def call_arguments(cls: type, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any], bool | None]:
    """(method, keyword arguments that it takes, `train` if it was given and the method does not take it).

    A method that must have `train` and is not told gets False.

    Args:
      cls: the class of the user's module.
      args: what came with the call by position; `train` may be among it.
      kwargs: what came with the call, `method` and `train` among them; a method is a name or a function of the class.

    Raises:
      ValueError: the class has no such method.

    >>> class Net:
    ...     def __call__(self, x, train): ...
    ...     def encode(self, x): ...
    >>> call_arguments(Net, (1.0,), {"train": True})
    ('__call__', {'train': True}, None)
    >>> call_arguments(Net, (1.0,), {"train": True, "method": "encode"})
    ('encode', {}, True)
    """
    kwargs = dict(kwargs)
    method, train = kwargs.pop("method", None), kwargs.pop("train", None)
    method = "__call__" if method is None else method
    function = getattr(cls, method, None) if isinstance(method, str) else method
    if function is None:
        raise ValueError(f"got method={method!r}; {cls.__name__} has no such method; name one that it defines")
    parameters = inspect.signature(function).parameters
    if "train" in parameters:
        parameter, place = parameters["train"], list(parameters).index("train")  # the module itself is at place 0
        given = parameter.kind is not inspect.Parameter.KEYWORD_ONLY and len(args) >= place
        required = parameter.default is inspect.Parameter.empty and not given
        kwargs |= {"train": bool(train)} if required or train is not None else {}
        return method, kwargs, None
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()) and train is not None:
        return method, kwargs | {"train": train}, None
    return method, kwargs, train
