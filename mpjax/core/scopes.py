"""How a module's path is written into the program, and read from it again."""

from __future__ import annotations

import re

from mpjax.core.tree import canonical_path

_MARK = re.compile(r"~([^/()]*)")
_ATTENTION = re.compile(r"attention:unfused:(\w+)")
_WRAPPED = re.compile(r"^\w+\((.*)\)$")


def scope_name(path: str) -> str:
    """The `jax.named_scope` under which a wrapped module runs: its whole canonical path, since jax may lose what is around it.

    (XLA cuts the name of an operation at an "@", the mark that stood here first: profiles knew no modules.)

    >>> scope_name("layers/0/attention"), scope_name("")
    ('~layers.0.attention', '~')
    """
    return "~" + path.replace("/", ".")


def attention_scope(compute: str) -> str:
    """The `jax.named_scope` of an attention that is no fused kernel: what the auditor knows it by."""
    return f"attention:unfused:{compute}"


def unfused_attention_in(name_stack: str) -> str | None:
    """The compute dtype of the unfused attention that runs what stands in this name stack; None outside of any.

    >>> unfused_attention_in(f"jvp(~)/~layers.0/{attention_scope('bfloat16')}"), unfused_attention_in("jvp(~)")
    ('bfloat16', None)
    """
    found = _ATTENTION.search(name_stack)
    return found and found[1]


def is_marked(name_stack: str) -> bool:
    """Whether a wrapped module, be it the root, runs what stands in this name stack.

    >>> is_marked("transpose(jvp(~))"), is_marked("jvp(LM)/layers_0")
    (True, False)
    """
    return _MARK.search(name_stack) is not None


def path_in(name_stack: str) -> str:
    """The canonical path of the module that runs an operation, from its name stack; "" where no module does.

    The innermost mark counts. Without one (a Flax model that is not wrapped) Linen's own names are read, as well as that
    goes: the root's class is dropped, and what a transform put around a name.

    >>> path_in("transpose(jvp(~))/~layers.0/~layers.0.up"), path_in("jvp(LM)/layers_0/up")
    ('layers/0/up', 'layers/0/up')
    """
    marks = _MARK.findall(name_stack)
    if marks:
        return marks[-1].replace(".", "/")
    segments = []
    for segment in name_stack.split("/"):
        while found := _WRAPPED.match(segment):
            segment = found[1]
        # An einsum leaves its formula behind, a backward pass through remat a word of its own.
        if re.fullmatch(r"[A-Za-z]\w*(\.\w+)?", segment) and segment != "rematted_computation":
            segments.append(segment.partition(".")[0])
    starts = [
        i for i, segment in enumerate(segments) if segment == segments[0]
    ]  # remat's backward restarts at the root
    return canonical_path("/".join(segments[starts[-1] + 1 :] if starts else []))
