"""`python -m pmcore.validate.inside CASE KERNEL -- COMMAND`: the command inside that case's machine."""

from __future__ import annotations

import sys

from pmcore.errors import BackendUnavailable
from pmcore.mounted import Tree, execute
from pmcore.procview import ProcView
from pmcore.validate.case import cases
from pmcore.validate.run import UNAVAILABLE

__all__ = ["main"]


def main(arguments: list[str]) -> int:
    """The command's exit code."""
    name, kernel, _, *command = arguments
    [case] = cases([name])
    scene = case.scene(kernel)
    try:
        view = ProcView(scene.shown, owner=scene.owner, self_pid=scene.pid)
        return execute(Tree(view, opener=lambda _uid: scene.opener), command)
    except BackendUnavailable as error:
        print(error, file=sys.stderr)
        return UNAVAILABLE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
