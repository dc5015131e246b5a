"""Importing the user's modules, by name or by file."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from perdure.schemas.errors import ConfigurationError
from perdure.tasks import code_version, default_registry


def load(modules: Sequence[str]) -> str:
    """Import modules (dotted names, or paths of files) and stamp their tasks with the code version, which is returned.

    Raises `ConfigurationError` that says which cannot be imported, why and where, or that none holds a task.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    names = [_import(module) for module in modules]
    if not len(default_registry):
        raise ConfigurationError(f"no task in {', '.join(modules)}: decorate a function there with @perdure.task")
    version = code_version(names)
    default_registry.stamp(version)
    return version


def _import(module: str) -> str:
    """Import one module; its name."""
    try:
        if module.endswith(".py") or os.sep in module:
            return _import_file(Path(module).resolve())
        importlib.import_module(module)
    except ConfigurationError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigurationError(f"cannot import {module}: {type(error).__name__}: {error}{_place(error)}") from error
    return module


def _import_file(path: Path) -> str:
    name = path.stem
    if name in sys.modules:
        raise ConfigurationError(f"cannot import {path}: there is a module {name!r} already; rename the file")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigurationError(f"cannot import {path}: it is no Python source file")
    sys.path.insert(0, str(path.parent))  # as Python does for a script, so that the file finds those beside it
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return name


def _place(error: BaseException) -> str:
    """The last line of the user's that the error came through."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__ and "importlib" not in f.filename
    ]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
